/* What is said of keys and values that are none of ours: other trainers' words, typing errors, keys
 * in another shape. */
#include <criterion/criterion.h>
#include <ctype.h>
#include <stdio.h>
#include <string.h>

#include "config/config_hints.h"
#include "config/config_keys.h"
#include "config/nearest.h"

#define B "base: b.h5\n"

static qs_status parse_with(const char *text, const char *const *set)
{
    qs_config c;
    qs_error_clear();
    return qs_config_parse(&c, text, strlen(text), "run.yaml", set, set != NULL);
}

/* Alone and in any section. */
Test(config_hints, another_trainers_name_leads_to_a_key)
{
    for (int i = 0; i < qs_other_names_count; i++) {
        const qs_other_name *row = &qs_other_names[i];
        char hint[96], expected[96], within[64];
        snprintf(expected, sizeof expected, "did you mean \"%s\"?", row->ours);
        snprintf(within, sizeof within, "train.%s", row->theirs);
        qs_key_hint(row->theirs, false, hint, sizeof hint);
        cr_assert_str_eq(hint, expected, "%s: %s", row->theirs, hint);
        qs_key_hint(within, false, hint, sizeof hint);
        cr_assert_str_eq(hint, expected, "%s: %s", within, hint);
        cr_assert_geq(qs_key_find(row->ours), 0, "%s", row->ours);
        cr_assert_eq(qs_key_find(row->theirs), -1, "%s", row->theirs);
    }
}

Test(config_hints, another_trainers_word_leads_to_what_does_it_here)
{
    for (int i = 0; i < qs_other_remarks_count; i++) {
        const qs_other_remark *row = &qs_other_remarks[i];
        char hint[QS_KEY_HINT_MAX], within[64];
        snprintf(within, sizeof within, "train.%s", row->theirs);
        cr_assert_lt(strlen(row->says), sizeof hint);
        qs_key_hint(row->theirs, i % 2 == 0, hint, sizeof hint);
        cr_assert_str_eq(hint, row->says, "%s", row->theirs);
        qs_key_hint(within, false, hint, sizeof hint);
        cr_assert_str_eq(hint, row->says, "%s", within);
        cr_assert_eq(qs_key_find(row->theirs), -1, "%s", row->theirs);
        for (int k = 0; k < qs_other_names_count; k++) {
            cr_assert_str_neq(qs_other_names[k].theirs, row->theirs);
        }
        for (int k = 0; k < i; k++) {
            cr_assert_str_neq(qs_other_remarks[k].theirs, row->theirs);
        }
        for (const char *at = row->says; (at = strchr(at, '.')) != NULL; at++) { /* keys in it */
            const char *begin = at;
            while (begin > row->says && (islower((unsigned char)begin[-1]) || begin[-1] == '_')) {
                begin--;
            }
            char key[64];
            const size_t length =
                (size_t)(at - begin) + 1 + strspn(at + 1, "abcdefghijklmnopqrstuvwxyz_0123456789");
            snprintf(key, sizeof key, "%.*s", (int)length, begin);
            snprintf(within, sizeof within, "%.*s", (int)(at - begin), begin);
            cr_assert(!qs_key_is_section(within) || qs_key_find(key) >= 0, "%s: %s", row->theirs,
                      key);
        }
    }
}

/* docs/parity.md has a row for each. */
Test(config_hints, every_flag_of_fsdp_qlora_is_answered)
{
    static const char *const flags[] = {"world_size",
                                        "train_type",
                                        "llama_pro_path",
                                        "batch_size",
                                        "context_length",
                                        "gradient_accumulation_steps",
                                        "num_epochs",
                                        "max_steps",
                                        "dataset",
                                        "dataset_samples",
                                        "sharding_strategy",
                                        "use_gradient_checkpointing",
                                        "reentrant_checkpointing",
                                        "use_cpu_offload",
                                        "use_activation_cpu_offload",
                                        "low_memory",
                                        "no_sync",
                                        "precision",
                                        "model_name",
                                        "save_model",
                                        "output_dir",
                                        "lora_rank",
                                        "lora_alpha",
                                        "lora_dropout",
                                        "lora_target_modules",
                                        "verbose",
                                        "lr",
                                        "wd",
                                        "apply_gradient_clipping",
                                        "grad_norm",
                                        "optimizer",
                                        "lr_scheduler",
                                        "loading_workers",
                                        "log_to",
                                        "project_name",
                                        "name",
                                        "group",
                                        "entity",
                                        "master_addr",
                                        "master_port",
                                        "n_bits",
                                        "profile_memory",
                                        "profile",
                                        "profiling_output",
                                        "overwrite_profiling_output",
                                        "with_stack",
                                        "with_shapes",
                                        "export_trace",
                                        "export_memory_timeline",
                                        "wait_steps",
                                        "warmup_steps",
                                        "active_steps",
                                        "repeat",
                                        "profiling_frequency"};
    for (size_t i = 0; i < sizeof flags / sizeof *flags; i++) {
        char hint[QS_KEY_HINT_MAX];
        qs_key_hint(flags[i], false, hint, sizeof hint);
        cr_assert_null(strstr(hint, "lists all"), "%s: %s", flags[i], hint);
    }
    cr_assert_geq(qs_key_find("seed"), 0);
}

/* Known keys, written so that YAML or the reader takes them for others. */
Test(config_hints, known_keys_in_another_shape_are_told_how_to_write_them)
{
    static const struct {
        const char *text, *says;
    } cases[] = {
        {B "data.train: t.h5\n",
         "run.yaml:2: unknown key \"data.train\"; write it as a section: data: {train: ...}"},
        {B "optim.lr: 1e-4\n", "; write it as a section: optim: {lr: ...}"},
        {B "optim.learning_rate: 1e-4\n", "; did you mean \"optim.lr\"?"},
        {B "data: {train:train.h5}\n", "; a blank is missing behind \"train:\""},
        {B "data: {train:/some/where/with/dots.and/a/path/of/more/than/eighty/letters/in/all/to"
           "/train.h5}\n",
         "is no key; a colon is followed by a blank"},
        {B "train:{steps: 5}\n", "; a blank is missing behind \"train:\""},
        {"{base:b.h5, output: x}\n", "; a blank is missing behind \"base:\""},
        {B "data:\n  train:t.h5\n", "with a blank behind each colon"},
        {B "output:run\n", "followed by a colon and a blank"},
        {B "output:run\ntrain: {steps: 1}\n", "followed by a colon and a blank"},
        {"base:b.h5\n", "with a blank behind the colon"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        cr_assert_neq(parse_with(cases[i].text, NULL), QS_OK, "%s", cases[i].text);
        cr_assert_not_null(strstr(qs_error_text(), cases[i].says), "%s: %s", cases[i].text,
                           qs_error_text());
    }
}

Test(config_hints, another_trainers_value_is_told_what_there_is)
{
    for (int i = 0; i < qs_other_values_count; i++) {
        const qs_other_value *row = &qs_other_values[i];
        char set[96], expected[160];
        const char *sets[] = {set};
        cr_assert_geq(qs_key_find(row->key), 0, "%s", row->key);
        snprintf(set, sizeof set, "%s=%s", row->key, row->theirs);
        snprintf(expected, sizeof expected, "--set: %s: \"%s\" %s; allowed: ", row->key,
                 row->theirs, row->says);
        cr_assert_eq(parse_with(B, sets), QS_ERR_CONFIG_VALUE);
        cr_assert(strncmp(qs_error_text(), expected, strlen(expected)) == 0, "%s: %s", set,
                  qs_error_text());
    }
    const char *paged[] = {"optim.name=paged_adamw_32bit"};
    cr_assert_eq(parse_with(B, paged), QS_ERR_CONFIG_VALUE);
    cr_assert_not_null(strstr(qs_error_text(), "adamw keeps its state in fp32"), "%s",
                       qs_error_text());
}

/* Nobody who gives a value means a section. */
Test(config_hints, a_section_is_never_suggested_for_a_value)
{
    static const struct {
        const char *set, *says;
    } cases[] = {
        {"memory=1", "--set memory: unknown key; it is a section of keys, as memory.offload"},
        {"train=1", "it is a section of keys, as train.steps"},
        {"memroy=1", "unknown key; qshard train --help lists all"},
        {"low_memory=True", "so it is in any case: no rank holds more"},
        {"train_type=qlora", "it is QLoRA in any case"},
        {"sharding_strategy=full_shard", "did you mean \"shard.group\"?"},
        {"precision=bf16", "cpu.gemm"},
        {"profile=True", "--profile-steps"},
        {"log_to=wandb", "metrics.jsonl"},
        {"sample_packing=True", "qshard-prep --pack"},
        {"group_by_length=True", "qshard-prep --pack"},
        {"load_best_model_at_end=True", "qshard export RUN --best"},
        {"early_stopping_patience=3", "did you mean \"train.patience\"?"},
        {"train.early_stopping=True", "did you mean \"train.patience\"?"},
        {"early_stopping_threshold=0", "not below the lowest, by however little"},
        {"patience=3", "did you mean \"train.patience\"?"},
        {"gradient_accumulation_steps=4",
         "unknown key; train.global_batch = train.micro_batch x ranks x accumulation"},
        {"train.gradient_accumulation=4", "train.global_batch = train.micro_batch x ranks"},
        {"neftune_noise_alpha=5", "nothing is added to embeddings"},
        {"lora.bias=none", "only linears of layers get adapters"},
        {"train.stesp=3", "did you mean \"train.steps\"?"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        cr_assert_eq(parse_with(B, &cases[i].set), QS_ERR_CONFIG_KEY, "%s", cases[i].set);
        cr_assert_not_null(strstr(qs_error_text(), cases[i].says), "%s: %s", cases[i].set,
                           qs_error_text());
    }
}

Test(nearest, distance_counts_edits)
{
    cr_assert_eq(qs_edit_distance("", ""), 0);
    cr_assert_eq(qs_edit_distance("abc", ""), 3);
    cr_assert_eq(qs_edit_distance("", "ab"), 2);
    cr_assert_eq(qs_edit_distance("kitten", "sitting"), 3);
    cr_assert_eq(qs_edit_distance("train", "trian"), 1);
    cr_assert_eq(qs_edit_distance("abcd", "abcd"), 0);
    static const char *const words[] = {"quantize", "train", "eval"};
    cr_assert_str_eq(qs_nearest("trian", words, 3), "train");
    cr_assert_null(qs_nearest("x", words, 0));
    cr_assert_str_eq(qs_nearest("evaluate", words, 3), "eval"); /* it begins with the word */
    cr_assert_null(qs_nearest("generate", words, 3));           /* 5 edits: a guess */
}
