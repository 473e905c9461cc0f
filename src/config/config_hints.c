/* The end of the message for a key or value that is none of ours: what others call it, what is near
 * to it, or how it is written. */
#include "config/config_hints.h"

#include <stdio.h>
#include <string.h>

#include "config/config_keys.h"
#include "config/nearest.h"

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
    {"eval_on_start", "train.eval_first"},
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
static const char mixed[] =
    "qshard-prep takes several files, of any format, and --take FILE=N says how often each";
static const char profiling[] = "--trace FILE, --profile-steps A:B; --dry-run says the memory";
static const char launched[] = "the launcher says it: mpirun --bind-to none -np N, or srun";
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
    {"datasets", mixed},
    {"interleave_probs", mixed},
    {"mix_strategy", mixed},
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
