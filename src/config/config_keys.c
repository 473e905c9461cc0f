/* The one table of keys. Defaults, parser, ranges, help, dump and the list of what may change on
 * resume are all made from it. */
#include "config/config_keys.h"

#include <stdio.h>
#include <string.h>

#include "config/nearest.h"

#define AT(field) offsetof(qs_config, field)
#define G 1073741824.0

/* Bounds that no sensible run reaches; they keep the arithmetic on these numbers far from overflow.
 */
#define STEPS_MAX 1e9
#define SECONDS_MAX 1e9
#define RANKS_MAX 1e6
#define LAYERS_MAX 1e6

const qs_key qs_keys[] = {
    {.name = "base",
     .type = QS_KEY_PATH,
     .offset = AT(base),
     .preset = "",
     .neutral = true,
     .meaning = "quantized base, made by qshard quantize"},
    {.name = "data.train",
     .type = QS_KEY_PATH,
     .offset = AT(data_train),
     .preset = "",
     .neutral = true,
     .meaning = "token file to train on, made by qshard-prep"},
    {.name = "data.eval",
     .type = QS_KEY_PATH,
     .offset = AT(data_eval),
     .preset = "",
     .neutral = true,
     .meaning = "token file to evaluate on"},
    {.name = "output",
     .type = QS_KEY_PATH,
     .offset = AT(output),
     .preset = "",
     .neutral = true,
     .meaning = "run directory: checkpoints, metrics, resolved configuration"},
    {.name = "seed",
     .type = QS_KEY_I64,
     .offset = AT(seed),
     .preset = "42",
     .low = 0,
     .high = 9007199254740991.0, /* 2^53 - 1: exact in every reader of the dump */
     .meaning = "seed of LoRA's start, the order of samples and dropout"},
    {.name = "device",
     .type = QS_KEY_ENUM,
     .offset = AT(device),
     .preset = "auto",
     .names = {"auto", "cpu", "cuda"},
     .meaning = "where to compute"},

    {.name = "train.steps",
     .type = QS_KEY_I64,
     .offset = AT(train.steps),
     .preset = "100",
     .high = STEPS_MAX,
     .unit = "steps",
     .meaning = "length of the run; 0: train.epochs says it"},
    {.name = "train.epochs",
     .type = QS_KEY_I64,
     .offset = AT(train.epochs),
     .preset = "0",
     .high = 1e6,
     .unit = "epochs",
     .meaning = "length of the run in passes over the data; 0: train.steps says it"},
    {.name = "train.global_batch",
     .type = QS_KEY_I64,
     .offset = AT(train.global_batch),
     .preset = "16",
     .low = 1,
     .high = 1048576,
     .unit = "sequences",
     .meaning = "sequences of a step, over all ranks"},
    {.name = "train.micro_batch",
     .type = QS_KEY_I64,
     .offset = AT(train.micro_batch),
     .preset = "2",
     .low = 1,
     .high = QS_MICRO_BATCH_MAX,
     .unit = "sequences",
     .meaning = "sequences that pass the model together on one rank"},
    {.name = "train.seq_len",
     .type = QS_KEY_I64,
     .offset = AT(train.seq_len),
     .preset = "512",
     .low = 2,
     .high = 1048576,
     .unit = "tokens",
     .meaning = "longest sequence that is accepted, and the length for which longrope and dynamic "
                "RoPE scale"},
    {.name = "train.recompute",
     .type = QS_KEY_ENUM,
     .offset = AT(train.recompute),
     .preset = "full",
     .neutral = true,
     .names = {"full", "selective", "none"},
     .meaning = "what the backward computes again: a layer, its gate and up only, nothing"},
    {.name = "train.residual_fp32",
     .type = QS_KEY_BOOL,
     .offset = AT(train.residual_fp32),
     .preset = "true",
     .meaning =
         "residual stream of a GPU in fp32, as the CPU's always is; false: in bf16, for half "
         "the memory of the layers' inputs and losses further from fp32's"},
    {.name = "train.gather_group",
     .type = QS_KEY_I64,
     .offset = AT(train.gather_group),
     .preset = "auto",
     .low = 1,
     .high = QS_GROUP_MAX,
     .neutral = true,
     .zero = "auto",
     .unit = "micro-batches",
     .meaning =
         "micro-batches that pass one gathered unit; auto: where ranks share the base as many, "
         "up to 4, as fit into memory, else 1"},
    {.name = "train.eval_every",
     .type = QS_KEY_I64,
     .offset = AT(train.eval_every),
     .preset = "0",
     .high = STEPS_MAX,
     .neutral = true,
     .unit = "steps",
     .meaning = "evaluate on data.eval every so often; 0: at the end only"},
    {.name = "train.patience",
     .type = QS_KEY_I64,
     .offset = AT(train.patience),
     .preset = "0",
     .high = STEPS_MAX,
     .neutral = true,
     .unit = "evaluations",
     .meaning = "end the run when eval_loss has not been lower in so many of them; 0: never"},
    {.name = "train.log_every",
     .type = QS_KEY_I64,
     .offset = AT(train.log_every),
     .preset = "1",
     .low = 1,
     .high = STEPS_MAX,
     .neutral = true,
     .unit = "steps",
     .meaning = "a progress line every so often; metrics.jsonl has every step"},
    {.name = "train.save_every",
     .type = QS_KEY_I64,
     .offset = AT(train.save_every),
     .preset = "0",
     .high = STEPS_MAX,
     .neutral = true,
     .unit = "steps",
     .meaning = "a checkpoint every so often; 0: by train.save_time, and at the end"},
    {.name = "train.save_time",
     .type = QS_KEY_F64,
     .offset = AT(train.save_time),
     .preset = "1800.0",
     .high = SECONDS_MAX,
     .neutral = true,
     .unit = "s",
     .meaning =
         "a checkpoint also where the last one is so old, behind the step at hand; 0: never"},
    {.name = "train.keep_last",
     .type = QS_KEY_I64,
     .offset = AT(train.keep_last),
     .preset = "2",
     .low = 1,
     .high = 1000,
     .neutral = true,
     .unit = "checkpoints",
     .meaning = "newest checkpoints to keep; the one of the lowest eval_loss stays beside them"},
    {.name = "train.keep_every",
     .type = QS_KEY_I64,
     .offset = AT(train.keep_every),
     .preset = "0",
     .high = STEPS_MAX,
     .neutral = true,
     .unit = "steps",
     .meaning = "keep checkpoints of these steps for ever; 0: none"},
    {.name = "train.max_time",
     .type = QS_KEY_F64,
     .offset = AT(train.max_time),
     .preset = "0.0",
     .high = SECONDS_MAX,
     .neutral = true,
     .unit = "s",
     .meaning = "save and leave with code 75 after this time; 0: no limit"},
    {.name = "train.stall_limit",
     .type = QS_KEY_F64,
     .offset = AT(train.stall_limit),
     .preset = "300.0",
     .high = SECONDS_MAX,
     .neutral = true,
     .unit = "s",
     .meaning = "leave with code 6 where nothing has moved for so long, and for four times as long "
                "as the step had been under way; twelve times the limit for files; 0: wait for "
                "ever"},

    {.name = "lora.rank",
     .type = QS_KEY_I64,
     .offset = AT(lora.rank),
     .preset = "16",
     .low = 1,
     .high = 1024,
     .meaning = "inner width of the adapters"},
    {.name = "lora.alpha",
     .type = QS_KEY_F64,
     .offset = AT(lora.alpha),
     .preset = "32.0",
     .high = 1e6,
     .above_low = true,
     .meaning = "scale: alpha / rank, or alpha / sqrt(rank) with lora.rslora"},
    {.name = "lora.dropout",
     .type = QS_KEY_F64,
     .offset = AT(lora.dropout),
     .preset = "0.0",
     .high = 0.95,
     .meaning = "probability that an input feature of an adapter is dropped"},
    {.name = "lora.targets",
     .type = QS_KEY_TARGETS,
     .offset = AT(lora.targets),
     .preset = "all-linear",
     .meaning = "linears that get an adapter; a set is what the model has of it"},
    {.name = "lora.rslora",
     .type = QS_KEY_BOOL,
     .offset = AT(lora.rslora),
     .preset = "false",
     .meaning = "rank-stabilized scale (arXiv:2312.03732)"},
    {.name = "lora.dora",
     .type = QS_KEY_BOOL,
     .offset = AT(lora.dora),
     .preset = "false",
     .meaning = "weight-decomposed adapters, as peft computes them (DoRA, arXiv:2402.09353)"},
    {.name = "lora.init",
     .type = QS_KEY_PATH,
     .offset = AT(lora.init),
     .preset = "",
     .meaning = "PEFT directory to continue from; \"\": start anew"},

    {.name = "optim.name",
     .type = QS_KEY_ENUM,
     .offset = AT(optim.name),
     .preset = "adamw",
     .names = {"adamw", "adam", "sgd", "adadelta"},
     .meaning =
         "optimizer; adam, sgd and adadelta add weight_decay to the gradient, rho of adadelta is "
         "the first of betas"},
    {.name = "optim.lr",
     .type = QS_KEY_F64,
     .offset = AT(optim.lr),
     .preset = "2.0e-4",
     .high = 1,
     .above_low = true,
     .meaning = "peak learning rate"},
    {.name = "optim.betas",
     .type = QS_KEY_PAIR,
     .offset = AT(optim.beta1),
     .preset = "[0.9, 0.999]",
     .high = 0.9999999,
     .meaning = "decay of the two moments"},
    {.name = "optim.eps",
     .type = QS_KEY_F64,
     .offset = AT(optim.eps),
     .preset = "1.0e-8",
     .high = 1,
     .above_low = true,
     .meaning = "added to the root of the second moment"},
    {.name = "optim.weight_decay",
     .type = QS_KEY_F64,
     .offset = AT(optim.weight_decay),
     .preset = "0.0",
     .high = 10,
     .meaning = "decoupled weight decay"},
    {.name = "optim.lora_plus_ratio",
     .type = QS_KEY_F64,
     .offset = AT(optim.lora_plus_ratio),
     .preset = "1.0",
     .high = 1e4,
     .above_low = true,
     .meaning = "learning rate of every B, and of magnitudes, over that of A (LoRA+, "
                "arXiv:2402.12354)"},
    {.name = "optim.clip",
     .type = QS_KEY_F64,
     .offset = AT(optim.clip),
     .preset = "1.0",
     .high = 1e9,
     .meaning = "largest norm of the gradient; 0: no clipping"},
    {.name = "optim.schedule",
     .type = QS_KEY_ENUM,
     .offset = AT(optim.schedule),
     .preset = "cosine",
     .names = {"constant", "linear", "cosine"},
     .meaning = "learning rate after the warm-up"},
    {.name = "optim.warmup",
     .type = QS_KEY_F64,
     .offset = AT(optim.warmup),
     .preset = "0.03",
     .high = STEPS_MAX,
     .meaning = "below 1: fraction of the steps; else steps"},
    {.name = "optim.min_lr_ratio",
     .type = QS_KEY_F64,
     .offset = AT(optim.min_lr_ratio),
     .preset = "0.1",
     .high = 1,
     .meaning = "last learning rate / optim.lr (linear and cosine)"},

    {.name = "shard.group",
     .type = QS_KEY_I64,
     .offset = AT(shard.group),
     .preset = "auto",
     .low = 1,
     .high = RANKS_MAX,
     .neutral = true,
     .zero = "auto",
     .names = {"world", "node"},
     .unit = "ranks",
     .meaning =
         "ranks that share one copy of the base: all, those of a node, or so many; auto: a node's "
         "if there are several and the run fits beside it"},
    {.name = "shard.keep_resident",
     .type = QS_KEY_I64,
     .offset = AT(shard.keep_resident),
     .preset = "none",
     .high = LAYERS_MAX,
     .neutral = true,
     .zero = "none",
     .names = {"auto"},
     .unit = "layers",
     .meaning = "layers that every rank keeps whole, spread over the model: memory for fewer "
                "gathers; auto: as many as fit"},
    {.name = "shard.prefetch",
     .type = QS_KEY_I64,
     .offset = AT(shard.prefetch),
     .preset = "1",
     .low = 1,
     .high = QS_PREFETCH_MAX,
     .neutral = true,
     .unit = "units",
     .meaning = "units gathered ahead of use; each costs a buffer of the largest unit"},

    {.name = "memory.offload",
     .type = QS_KEY_FLAGS,
     .offset = AT(memory.offload),
     .preset = "[]",
     .neutral = true,
     .names = {"activations", "weights", "embedding"},
     .meaning = "what lies in the host's memory instead of a GPU's; on the CPU it is all there"},
    {.name = "memory.keep_decoded",
     .type = QS_KEY_I64,
     .offset = AT(memory.keep_decoded),
     .preset = "none",
     .high = LAYERS_MAX,
     .neutral = true,
     .zero = "none",
     .names = {"auto"},
     .unit = "layers",
     .meaning =
         "layers of which a GPU keeps the decoded weights beside the NF4 ones, for steps that "
         "decode less: 2 bytes a weight; auto: as many as fit"},
    {.name = "memory.device_limit",
     .type = QS_KEY_BYTES,
     .offset = AT(memory.device_limit),
     .preset = "0",
     .high = 1024.0 * 1024.0 * G,
     .neutral = true,
     .unit = "bytes",
     .meaning = "most that a rank may need on its device (8G = 8 * 2^30); 0: what a GPU has free, "
                "on the CPU its part of the host"},

    {.name = "cpu.gemm",
     .type = QS_KEY_ENUM,
     .offset = AT(cpu.gemm),
     .preset = "auto",
     .names = {"auto", "strict", "bf16", "fp16", "amx"},
     .meaning =
         "products with frozen matrices: strict is fp32, the reference; amx, bf16 and fp16 run "
         "anywhere and are fast with AMX-BF16, AMD's AVX512-BF16, AVX512-FP16; auto is the first "
         "of these that is fast on every rank, else strict; a resumed run keeps what it had"},
    {.name = "cpu.threads",
     .type = QS_KEY_I64,
     .offset = AT(cpu.threads),
     .preset = "0",
     .high = 4096,
     .neutral = true,
     .unit = "threads",
     .meaning = "threads of a rank; 0: the cores that the launcher gave"},
};
const int qs_keys_count = (int)(sizeof qs_keys / sizeof *qs_keys);

int qs_key_find(const char *name)
{
    for (int i = 0; i < qs_keys_count; i++) {
        if (strcmp(qs_keys[i].name, name) == 0) {
            return i;
        }
    }
    return -1;
}

bool qs_key_is_section(const char *name)
{
    size_t length = strlen(name);
    for (int i = 0; i < qs_keys_count; i++) {
        if (strncmp(qs_keys[i].name, name, length) == 0 && qs_keys[i].name[length] == '.') {
            return true;
        }
    }
    return false;
}

static const char *last_part(const char *name)
{
    const char *dot = strrchr(name, '.');
    return dot ? dot + 1 : name;
}

/* What transformers' and TRL's arguments, peft, axolotl and fsdp_qlora call our keys. */
const qs_other_name qs_other_names[] = {
    {"base_model", "base"},
    {"model_name", "base"},
    {"model_name_or_path", "base"},
    {"dataset", "data.train"},
    {"train_file", "data.train"},
    {"validation_file", "data.eval"},
    {"output_dir", "output"},
    {"max_steps", "train.steps"},
    {"num_epochs", "train.epochs"},
    {"num_train_epochs", "train.epochs"},
    {"batch_size", "train.micro_batch"},
    {"micro_batch_size", "train.micro_batch"},
    {"per_device_train_batch_size", "train.micro_batch"},
    {"context_length", "train.seq_len"},
    {"cutoff_len", "train.seq_len"},
    {"max_length", "train.seq_len"},
    {"max_seq_length", "train.seq_len"},
    {"sequence_len", "train.seq_len"},
    {"fp32_residual_connection", "train.residual_fp32"},
    {"residual_in_fp32", "train.residual_fp32"},
    {"gradient_checkpointing", "train.recompute"},
    {"use_gradient_checkpointing", "train.recompute"},
    {"eval_steps", "train.eval_every"},
    {"logging_steps", "train.log_every"},
    {"save_steps", "train.save_every"},
    {"save_total_limit", "train.keep_last"},
    {"r", "lora.rank"},
    {"lora_r", "lora.rank"},
    {"lora_rank", "lora.rank"},
    {"lora_alpha", "lora.alpha"},
    {"lora_dropout", "lora.dropout"},
    {"target_modules", "lora.targets"},
    {"lora_target_modules", "lora.targets"},
    {"use_rslora", "lora.rslora"},
    {"use_dora", "lora.dora"},
    {"optimizer", "optim.name"},
    {"learning_rate", "optim.lr"},
    {"wd", "optim.weight_decay"},
    {"adam_epsilon", "optim.eps"},
    {"gradient_clipping", "optim.clip"},
    {"grad_norm", "optim.clip"},
    {"max_grad_norm", "optim.clip"},
    {"lr_scheduler", "optim.schedule"},
    {"lr_scheduler_type", "optim.schedule"},
    {"num_warmup_steps", "optim.warmup"},
    {"warmup_ratio", "optim.warmup"},
    {"warmup_steps", "optim.warmup"},
    {"use_cpu_offload", "memory.offload"},
    {"use_activation_cpu_offload", "memory.offload"},
    {"activation_offloading", "memory.offload"},
    {"sharding_strategy", "shard.group"},
    {"apply_gradient_clipping", "optim.clip"},
    {"per_device_eval_batch_size", "train.micro_batch"},
    {"early_stopping", "train.patience"},
    {"early_stopping_patience", "train.patience"},
    {"eval_strategy", "train.eval_every"},
    {"evaluation_strategy", "train.eval_every"},
    {"save_strategy", "train.save_every"},
    {"save_model", "train.save_every"},
    {"loraplus_lr_ratio", "optim.lora_plus_ratio"},
};
const int qs_other_names_count = (int)(sizeof qs_other_names / sizeof *qs_other_names);

static const char arithmetic[] = "the device chooses: cpu.gemm on a CPU, bf16 with fp32 sums on a "
                                 "GPU, where train.residual_fp32 keeps the residual stream in fp32";
static const char keeps_best[] =
    "the checkpoint of the lowest eval_loss stays in any case; qshard export RUN --best takes it";
static const char accumulation[] =
    "train.global_batch = train.micro_batch x ranks x accumulation, and may stay as ranks change";
static const char packing[] = "rows are never padded; qshard-prep --pack packs them";
static const char prepared[] = "the data are prepared before: see qshard-prep --help";
static const char profiling[] = "--trace FILE, --profile-steps A:B; --dry-run says the memory";
static const char launched[] = "the launcher says it: mpirun -np N, or srun";
static const char logging[] =
    "metrics.jsonl has every step; src/prep/qshard_log.py sends it to W&B or TensorBoard";
static const char nf4[] = "the base is NF4 in any case, made by qshard quantize";
static const char frozen[] = "only linears of layers get adapters, all else stays as it is";

/* What they call what is no key here, and where it is. */
const qs_other_remark qs_other_remarks[] = {
    {"train_type", "it is QLoRA in any case; lora.dora: true for DoRA"},
    {"adapter", "it is QLoRA in any case; lora.dora: true for DoRA, lora.init to go on from one"},
    {"peft_type", "it is LoRA in any case; lora.dora: true for DoRA"},
    {"llama_pro_path", "blocks are not inserted here; see docs/parity.md"},
    {"n_bits", nf4},
    {"load_in_4bit", nf4},
    {"load_in_8bit", nf4},
    {"bnb_4bit_quant_type", nf4},
    {"bnb_4bit_use_double_quant", "qshard quantize has --no-double-quant"},
    {"bnb_4bit_compute_dtype", arithmetic},
    {"precision", arithmetic},
    {"bf16", arithmetic},
    {"fp16", arithmetic},
    {"tf32", arithmetic},
    {"low_memory", "so it is in any case: no rank holds more of the base than its share"},
    {"no_sync", "sums have a fixed order, for the same bits on any number of ranks"},
    {"reentrant_checkpointing", "there is one way to compute again; train.recompute says how much"},
    {"attn_implementation", "there is one attention, and nothing to choose"},
    {"flash_attention", "there is one attention, and nothing to choose"},
    {"packing", packing},
    {"sample_packing", packing},
    {"pad_to_sequence_len", packing},
    {"group_by_length", packing},
    {"chat_template", prepared},
    {"dataset_samples", prepared},
    {"dataset_text_field", prepared},
    {"train_on_inputs", prepared},
    {"val_set_size", prepared},
    {"load_best_model_at_end", keeps_best},
    {"metric_for_best_model", keeps_best},
    {"greater_is_better", keeps_best},
    {"early_stopping_threshold",
     "train.patience counts evaluations that are not below the lowest, by however little"},
    {"gradient_accumulation", accumulation},
    {"gradient_accumulation_steps", accumulation},
    {"neftune_noise_alpha", "nothing is added to embeddings; lora.dropout is there"},
    {"resume_from_checkpoint", "a run that is started again resumes; --resume must | never"},
    {"auto_resume_from_checkpoints", "a run that is started again resumes; --resume must | never"},
    {"profile", profiling},
    {"profile_memory", profiling},
    {"profiling_output", profiling},
    {"profiling_frequency", profiling},
    {"overwrite_profiling_output", profiling},
    {"with_stack", profiling},
    {"with_shapes", profiling},
    {"export_trace", profiling},
    {"export_memory_timeline", profiling},
    {"wait_steps", profiling},
    {"active_steps", profiling},
    {"repeat", profiling},
    {"log_to", logging},
    {"report_to", logging},
    {"project_name", logging},
    {"run_name", logging},
    {"entity", logging},
    {"wandb_project", logging},
    {"use_tensorboard", logging},
    {"logging_dir", logging},
    {"verbose", "it is an option: --verbose"},
    {"world_size", launched},
    {"num_processes", launched},
    {"local_rank", launched},
    {"master_addr", launched},
    {"master_port", launched},
    {"fsdp", "the base is shared out in any case; shard.group says over which ranks"},
    {"fsdp_config", "the base is shared out in any case; shard.group says over which ranks"},
    {"deepspeed", "the base is shared out in any case; shard.group says over which ranks"},
    {"loading_workers", "qshard quantize reads the model, once, with --threads"},
    {"dataloader_num_workers", "the data are tokens already: there is nothing for workers to do"},
    {"modules_to_save", frozen},
    {"lora_modules_to_save", frozen},
    {"lora_bias", frozen},
    {"bias", frozen},
    {"layers_to_transform", "all layers have the same adapters; lora.targets says on what"},
    {"layers_pattern", "all layers have the same adapters; lora.targets says on what"},
    {"rank_pattern", "all layers have the same adapters; lora.rank is that of each"},
    {"alpha_pattern", "all layers have the same adapters; lora.alpha is that of each"},
    {"init_lora_weights", "A is uniform, B is zero; lora.init goes on from an adapter"},
    {"push_to_hub", "nothing is sent anywhere; qshard export makes what can be uploaded"},
    {"hub_model_id", "nothing is sent anywhere; qshard export makes what can be uploaded"},
    {"torch_compile", "it is compiled already"},
};
const int qs_other_remarks_count = (int)(sizeof qs_other_remarks / sizeof *qs_other_remarks);

static const char sharded_adamw[] =
    "is not there; adamw keeps its state in fp32, shared out over the ranks";

/* What they call values of ours, and what is here. */
const qs_other_value qs_other_values[] = {
    {"optim.name", "adamw_8bit", sharded_adamw},
    {"optim.name", "adamw_bnb_8bit", sharded_adamw},
    {"optim.name", "adamw_hf", sharded_adamw},
    {"optim.name", "adamw_torch", sharded_adamw},
    {"optim.name", "adamw_torch_fused", sharded_adamw},
    {"optim.name", "paged_adamw", sharded_adamw},
    {"optim.name", "paged_adamw_8bit", sharded_adamw},
    {"optim.name", "paged_adamw_32bit", sharded_adamw},
    {"optim.schedule", "constant_with_warmup", "is constant here, with optim.warmup"},
};
const int qs_other_values_count = (int)(sizeof qs_other_values / sizeof *qs_other_values);

static const char *ours_of(const char *theirs)
{
    for (int i = 0; i < qs_other_names_count; i++) {
        if (strcmp(qs_other_names[i].theirs, theirs) == 0) {
            return qs_other_names[i].ours;
        }
    }
    return NULL;
}

static const char *remark_on(const char *theirs)
{
    for (int i = 0; i < qs_other_remarks_count; i++) {
        if (strcmp(qs_other_remarks[i].theirs, theirs) == 0) {
            return qs_other_remarks[i].says;
        }
    }
    return NULL;
}

const char *qs_key_meant(const char *name)
{
    const char *found = ours_of(last_part(name));
    int matches = 0;
    if (qs_key_find(name) >= 0) {
        return qs_keys[qs_key_find(name)].name;
    }
    for (int i = 0; i < qs_keys_count && found == NULL && strchr(name, '.') == NULL; i++) {
        matches += strcmp(last_part(qs_keys[i].name), name) == 0;
    }
    for (int i = 0; i < qs_keys_count && found == NULL && matches == 1; i++) {
        found = strcmp(last_part(qs_keys[i].name), name) == 0 ? qs_keys[i].name : NULL;
    }
    return found;
}

const char *qs_key_remark(const char *name)
{
    return remark_on(last_part(name));
}

/* The key that `name` is a typing error of, NULL if none is near. A key written at the wrong level
 * ("steps" for "train.steps") is found too: comparing the last parts alone costs 1. What counts as
 * near follows from the last part, as a section that is right says nothing of it. */
static const char *nearest_key(const char *name, int *least)
{
    const char *best = NULL;
    *least = qs_typing_errors(strlen(last_part(name))) + 1;
    for (int i = 0; i < qs_keys_count; i++) {
        int whole = qs_edit_distance(name, qs_keys[i].name);
        int part = qs_edit_distance(last_part(name), last_part(qs_keys[i].name)) + 1;
        int distance = whole < part ? whole : part;
        if (distance < *least) {
            *least = distance;
            best = qs_keys[i].name;
        }
    }
    return best;
}

/* The first key of section `name`, as an example. */
static const char *key_of_section(const char *name)
{
    const size_t length = strlen(name);
    for (int i = 0; i < qs_keys_count; i++) {
        if (strncmp(qs_keys[i].name, name, length) == 0 && qs_keys[i].name[length] == '.') {
            return qs_keys[i].name;
        }
    }
    return NULL;
}

/* The section that `name` is a typing error of; false if there is none as near as `least`. */
static bool nearest_section(const char *name, int least, char *section, size_t capacity)
{
    bool found = false;
    for (int i = 0; i < qs_keys_count; i++) {
        char word[64];
        snprintf(word, sizeof word, "%.*s", (int)strcspn(qs_keys[i].name, "."), qs_keys[i].name);
        if (qs_key_is_section(word) && qs_edit_distance(name, word) < least) {
            least = qs_edit_distance(name, word);
            snprintf(section, capacity, "%s", word);
            found = true;
        }
    }
    return found;
}

/* Known, and yet not found where it stands: a key with a dot at the top level, or a colon that the
 * value follows without a blank. */
static bool misspelled(const char *name, char *out, size_t capacity)
{
    const char *colon = strchr(name, ':'), *dot = strchr(name, '.');
    if (colon != NULL) {
        const char *key = dot != NULL && dot < colon ? dot + 1 : name;
        snprintf(out, capacity, "a blank is missing behind \"%.*s:\"", (int)(colon - key), key);
    } else if (qs_key_find(name) >= 0 && dot != NULL) {
        snprintf(out, capacity, "write it as a section: %.*s: {%s: ...}", (int)(dot - name), name,
                 dot + 1);
    }
    return colon != NULL || (qs_key_find(name) >= 0 && dot != NULL);
}

void qs_key_hint(const char *name, bool holds_keys, char *out, size_t capacity)
{
    if (misspelled(name, out, capacity)) {
        return;
    }
    int least = 0;
    char section[64] = "";
    const char *says = remark_on(last_part(name));
    const char *best_key = ours_of(last_part(name));
    if (best_key == NULL && says == NULL) {
        best_key = nearest_key(name, &least);
    }
    if (qs_key_is_section(name)) {
        snprintf(out, capacity, "it is a section of keys, as %s", key_of_section(name));
    } else if (says != NULL) {
        snprintf(out, capacity, "%s", says);
    } else if (holds_keys && nearest_section(name, least, section, sizeof section)) {
        snprintf(out, capacity, "did you mean \"%s\"?", section);
    } else if (best_key != NULL) {
        snprintf(out, capacity, "did you mean \"%s\"?", best_key);
    } else {
        snprintf(out, capacity, "qshard train --help lists all");
    }
}

const char *qs_config_first_difference(const qs_config *a, const qs_config *b, char *values,
                                       size_t capacity)
{
    char left[QS_KEY_TEXT_MAX], right[QS_KEY_TEXT_MAX];
    for (int i = 0; i < qs_keys_count; i++) {
        if (qs_keys[i].neutral) {
            continue;
        }
        qs_key_format(a, &qs_keys[i], left, sizeof left);
        qs_key_format(b, &qs_keys[i], right, sizeof right);
        if (strcmp(left, right) != 0) {
            snprintf(values, capacity, "%.200s and %.200s", left, right);
            return qs_keys[i].name;
        }
    }
    return NULL;
}
