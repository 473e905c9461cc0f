/* A run on paper: GPUs by name, the forecast's fit and its monotony, remedies. What a plan says of
 * memory and work is compared with real runs in tests/e2e/test_plan.py. */
#define _GNU_SOURCE
#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/log.h"
#include "device/gpu_kinds.h"
#include "store/io.h"
#include "tests/scratch.h"
#include "train/outlook.h"

/* ---- GPUs by name ---- */

TestSuite(gpu_kinds, .timeout = 30);
TestSuite(outlook, .timeout = 120);

Test(gpu_kinds, are_found_however_they_are_written)
{
    static const char *const names[][2] = {
        {"H100", "H100"},        {"h200", "H200"},
        {"rtx 4090", "RTX4090"}, {"NVIDIA GeForce RTX 3090", "RTX3090"},
        {"a100-80", "A100-80"},  {"A100 40GB", "A100-40"},
        {"RTX A6000", "A6000"},  {"5090", "RTX5090"},
    };
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        const qs_gpu_kind *kind = qs_gpu_kind_find(names[i][0]);
        cr_assert_not_null(kind, "%s", names[i][0]);
        cr_assert_str_eq(kind->name, names[i][1]);
    }
}

Test(gpu_kinds, unknown_names_have_no_kind)
{
    static const char *const names[] = {"", "V100", "A100", "H100 PCIe", "4090 Ti", "nvidia"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        cr_assert_null(qs_gpu_kind_find(names[i]), "%s", names[i]);
    }
}

Test(gpu_kinds, a_card_is_known_by_its_whole_name_only)
{
    static const struct {
        const char *description, *name;
    } cards[] = {
        {"NVIDIA H200, sm_90, 132 SMs, 139.8 GiB; driver 12.8, runtime 12.8", "H200"},
        {"NVIDIA H100 80GB HBM3, sm_90, 132 SMs, 79.1 GiB; driver 12.4", "H100"},
        {"NVIDIA GeForce RTX 4090, sm_89, 128 SMs, 23.6 GiB", "RTX4090"},
        {"NVIDIA H200 NVL, sm_90, 132 SMs, 139.8 GiB", NULL},
        {"NVIDIA H100 PCIe, sm_90", NULL},
        {"NVIDIA GeForce RTX 4090 Laptop GPU, sm_89", NULL},
        {"NVIDIA H100 80GB HBM3 MIG 1g.10gb, sm_90", NULL},
        {"cpu", NULL},
    };
    for (size_t i = 0; i < sizeof cards / sizeof *cards; i++) {
        const qs_gpu_kind *kind = qs_gpu_kind_of(cards[i].description);
        cr_assert_eq(kind == NULL, cards[i].name == NULL, "%s", cards[i].description);
        cr_assert(kind == NULL || strcmp(kind->name, cards[i].name) == 0);
    }
}

Test(gpu_kinds, rows_are_complete_and_named_once)
{
    for (int i = 0; i < qs_gpu_kinds_count; i++) {
        const qs_gpu_kind *k = &qs_gpu_kinds[i];
        cr_assert_eq(qs_gpu_kind_find(k->name), k, "%s", k->name);
        cr_assert_not_null(k->models[0]);
        cr_assert_eq(qs_gpu_kind_of(k->models[0]), k);
        cr_assert(k->bf16_tflops > 50 && k->memory_gbps > 500 && k->memory_gib >= 24 &&
                  k->link_gbps > 10);
    }
}

/* ---- a run ---- */

static const char LLAMA_3_8B[] =
    "{\"architectures\": [\"LlamaForCausalLM\"], \"model_type\": \"llama\", \"hidden_size\": 4096,"
    " \"intermediate_size\": 14336, \"num_hidden_layers\": 32, \"num_attention_heads\": 32,"
    " \"num_key_value_heads\": 8, \"vocab_size\": 128256, \"max_position_embeddings\": 8192,"
    " \"rms_norm_eps\": 1e-5, \"rope_theta\": 500000.0, \"hidden_act\": \"silu\","
    " \"tie_word_embeddings\": false, \"torch_dtype\": \"bfloat16\"}";

static const char LLAMA_3_70B[] =
    "{\"architectures\": [\"LlamaForCausalLM\"], \"model_type\": \"llama\", \"hidden_size\": 8192,"
    " \"intermediate_size\": 28672, \"num_hidden_layers\": 80, \"num_attention_heads\": 64,"
    " \"num_key_value_heads\": 8, \"vocab_size\": 128256, \"max_position_embeddings\": 8192,"
    " \"rms_norm_eps\": 1e-5, \"rope_theta\": 500000.0, \"hidden_act\": \"silu\","
    " \"tie_word_embeddings\": false, \"torch_dtype\": \"bfloat16\"}";

typedef struct {
    char folder[SCRATCH_MAX];
    qs_config config;
    qs_outlook_inputs inputs;
} fixture;

/* One sequence of 4,096 tokens a step on a base that is nothing but its config.json, with the
 * residual stream in bf16, by which the limits of memory below were chosen. */
static fixture on_base(const char *config_json, const char *const *sets, int n_sets)
{
    fixture f = {0};
    char path[128], yaml[512];
    qs_log_init(0, 1, QS_LOG_QUIET, false);
    scratch_make(f.folder, NULL);
    snprintf(path, sizeof path, "%s/config.json", f.folder);
    cr_assert_eq(qs_io_write_file(path, config_json, strlen(config_json)), QS_OK);
    snprintf(yaml, sizeof yaml,
             "base: %s\n"
             "train: {global_batch: 1, micro_batch: 1, seq_len: 4096, residual_fp32: false}\n",
             f.folder);
    cr_assert_eq(qs_config_parse(&f.config, yaml, strlen(yaml), "run.yaml", sets, n_sets), QS_OK,
                 "%s", qs_error_text());
    cr_assert_eq(qs_outlook_open(&f.inputs, &f.config), QS_OK, "%s", qs_error_text());
    cr_assert(f.inputs.assumed);
    return f;
}

static fixture llama(const char *const *sets, int n_sets)
{
    return on_base(LLAMA_3_8B, sets, n_sets);
}

static void done(fixture *f)
{
    char path[128];
    qs_outlook_close(&f->inputs);
    snprintf(path, sizeof path, "%s/config.json", f->folder);
    cr_assert_eq(unlink(path), 0);
    cr_assert_eq(rmdir(f->folder), 0);
}

static qs_outlook look_at(const fixture *f, const char *gpu, int nranks, int per_node)
{
    qs_outlook outlook;
    const qs_outlook_place place = {
        .gpu = qs_gpu_kind_find(gpu), .nranks = nranks, .per_node = per_node, .threads = 1};
    cr_assert_eq(qs_outlook_make(&outlook, &f->inputs, &f->config, &place), QS_OK, "%s",
                 qs_error_text());
    return outlook;
}

static qs_outlook look(const fixture *f, const char *gpu, int nranks)
{
    return look_at(f, gpu, nranks, 4096);
}

static double step_s(const fixture *f, const char *gpu, int nranks, int per_node, double gbps)
{
    const qs_outlook outlook = look_at(f, gpu, nranks, per_node);
    const qs_links links = {per_node, gbps, gbps};
    return qs_forecast_make(&outlook.work, qs_gpu_kind_find(gpu), &links).step_s;
}

Test(outlook, the_forecast_has_the_measured_steps_of_an_h200)
{
    static const struct {
        const char *recompute;
        double measured_s;
    } steps[] = {{"train.recompute=none", 0.2515},
                 {"train.recompute=selective", 0.2913},
                 {"train.recompute=full", 0.327}};
    for (int i = 0; i < 3; i++) {
        fixture f = llama(&steps[i].recompute, 1);
        const double forecast = step_s(&f, "H200", 1, 1, 1);
        cr_assert_lt(fabs(forecast / steps[i].measured_s - 1), 0.04, "%s: %g s", steps[i].recompute,
                     forecast); /* the fit leaves 3 % of selective, 1 % of the others */
        done(&f);
    }
}

Test(outlook, flops_are_those_of_the_published_formula)
{
    static const char *const sets[] = {"train.recompute=none"};
    fixture f = llama(sets, 1);
    const qs_outlook outlook = look(&f, "H200", 1);
    /* a token: 4 P + 4 h V + 6 s hq L + 6 r S L; here causal, so half of the scores */
    const double p = 32 * 218.1e6, head = 4 * 4096 * 128256.0, lora = 6 * 16 * 81920.0 * 32;
    const double attention = 6 * 4096 * 4096.0 * 32;
    const double expected = 4096 * (4 * p + head + lora + attention);
    cr_assert_lt(fabs(qs_step_flops(&outlook.work) / expected - 1), 0.005, "%g of %g",
                 qs_step_flops(&outlook.work), expected); /* no dX below the first layer: 0.3 % */
    done(&f);
}

Test(outlook, slower_links_and_more_nodes_never_help)
{
    static const char *const sets[] = {"train.global_batch=8", "shard.group=world"};
    fixture f = llama(sets, 2);
    double before = 0;
    for (double gbps = 1000; gbps > 0.5; gbps /= 10) {
        const double now = step_s(&f, "H100", 8, 4, gbps);
        cr_assert_geq(now, before);
        before = now;
    }
    cr_assert_geq(step_s(&f, "H100", 8, 1, 10), step_s(&f, "H100", 8, 8, 10));
    cr_assert_lt(step_s(&f, "H100", 8, 8, 450), step_s(&f, "RTX3090", 8, 8, 450));
    done(&f);
}

Test(outlook, the_time_of_gathers_is_their_bytes_over_the_narrowest_link)
{
    const qs_step_work work = {.forward = {.gather_bytes = 7e9}, .nranks = 8, .group = 8};
    const qs_step_work alone = {.forward = {.gather_bytes = 7e9}, .nranks = 1, .group = 1};
    const qs_gpu_kind *gpu = qs_gpu_kind_find("H100");
    const qs_links one_node = {8, 100, 1}, two_nodes = {4, 100, 10}, single = {1, 1, 10};
    cr_assert_float_eq(qs_forecast_make(&work, gpu, &one_node).gather_s, 0.07, 1e-9);
    /* 4 of the 7 other ranks' bytes come from the other node, once */
    cr_assert_float_eq(qs_forecast_make(&work, gpu, &two_nodes).gather_s, 0.4, 1e-9);
    cr_assert_float_eq(qs_forecast_make(&work, gpu, &single).gather_s, 0.7, 1e-9);
    cr_assert_eq(qs_forecast_make(&alone, gpu, &single).gather_s, 0);
}

Test(outlook, more_ranks_hold_less_each)
{
    fixture f = llama(NULL, 0);
    size_t before = SIZE_MAX;
    for (int nranks = 2; nranks <= 64; nranks *= 2) {
        const size_t now = look(&f, "H100", nranks).memory.bytes[QS_MEM_DEVICE][QS_MEM_BASE_SHARD];
        cr_assert_lt(now, before);
        before = now;
    }
    done(&f);
}

Test(outlook, a_copy_of_the_base_is_shared_by_whom_the_configuration_says)
{
    static const struct {
        const char *set;
        int per_node, group;
    } cases[] = {{"shard.group=auto", 4, 4}, /* 3.6 GiB are less than half of 80 */
                 {"shard.group=auto", 8, 8},  {"shard.group=node", 2, 2},
                 {"shard.group=world", 2, 8}, {"shard.group=2", 4, 2},
                 {"shard.group=node", 16, 8}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        fixture f = llama(&cases[i].set, 1);
        const qs_outlook outlook = look_at(&f, "H100", 8, cases[i].per_node);
        cr_assert_eq(outlook.work.group, cases[i].group, "%s on nodes of %d: %d", cases[i].set,
                     cases[i].per_node, outlook.work.group);
        done(&f);
    }
    static const char *const tight[] = {"memory.device_limit=7500M"}; /* of which a half is 3.7 */
    fixture f = llama(tight, 1);
    cr_assert_eq(look_at(&f, "H100", 8, 1).work.group, 8);
    cr_assert_eq(look_at(&f, "H100", 8, 4).work.group, 4);
    done(&f);
}

/* The world's, a shard group's, and two levels of LoRA's sums where nodes have several ranks: each
 * counts once, and none of a single rank. 1 GiB and 0.75 for each further one. */
Test(outlook, communicators_of_nccl_are_counted_as_a_run_opens_them)
{
    static const struct {
        const char *set;
        int nranks, per_node, count;
        size_t mib;
    } cases[] = {{"shard.group=world", 1, 8, 0, 0},    {"shard.group=world", 8, 8, 1, 1024},
                 {"shard.group=world", 2, 1, 1, 1024}, {"shard.group=1", 8, 8, 1, 1024},
                 {"shard.group=4", 8, 8, 2, 1792},     {"shard.group=node", 4, 1, 1, 1024},
                 {"shard.group=2", 4, 1, 2, 1792},     {"shard.group=world", 16, 8, 3, 2560},
                 {"shard.group=node", 16, 8, 3, 2560}, {"shard.group=1", 16, 8, 3, 2560},
                 {"shard.group=4", 16, 8, 4, 3328},    {"shard.group=node", 12, 8, 2, 1792}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        fixture f = llama(&cases[i].set, 1);
        const qs_outlook outlook = look_at(&f, "H100", cases[i].nranks, cases[i].per_node);
        const qs_memory_plan *plan = &outlook.memory;
        const size_t code = (size_t)256 << 20, held = plan->total_bytes[QS_MEM_DEVICE];
        cr_assert_eq(plan->nccl_count, cases[i].count, "%s, %d ranks, %d a node: %d", cases[i].set,
                     cases[i].nranks, cases[i].per_node, plan->nccl_count);
        cr_assert_eq(qs_memory_plan_nccl_bytes(plan), cases[i].mib << 20);
        cr_assert_eq(qs_memory_plan_needed(plan), held + code + (cases[i].mib << 20));
        done(&f);
    }
}

/* ---- what auto stands for ---- */

static int64_t lack_on(const fixture *f, const qs_outlook *outlook, const char *gpu)
{
    const qs_outlook_place place = {
        .gpu = qs_gpu_kind_find(gpu), .nranks = 4, .per_node = 8, .threads = 1};
    return (int64_t)qs_outlook_needed(outlook) - (int64_t)qs_outlook_allowed(&f->config, &place);
}

/* Bytes that each of 4 ranks lacks with `group` micro-batches a pass; 0: auto, whose choice is
 * *chosen. */
static int64_t lack_with(const char *gpu, const char *limit, int group, int64_t *chosen)
{
    char groups[48];
    snprintf(groups, sizeof groups, group > 0 ? "train.gather_group=%d" : "train.gather_group=auto",
             group);
    const char *const sets[] = {"train.global_batch=16", "train.seq_len=2048", limit, groups};
    fixture f = on_base(LLAMA_3_70B, sets, 4);
    const qs_outlook outlook = look_at(&f, gpu, 4, 8);
    const int64_t lack = lack_on(&f, &outlook, gpu);
    *chosen = outlook.choice.group;
    done(&f);
    return lack;
}

/* Four slots a rank take 1 pass of 4, 2 of 2 or 3 + 1 (which fit into 26 GiB, and save none), 4 of
 * 1. */
Test(outlook, auto_takes_the_fewest_passes_that_fit)
{
    static const struct {
        const char *gpu, *limit;
        int64_t group;
    } cases[] = {{"A6000", "memory.device_limit=0", 4},
                 {"RTX3090", "memory.device_limit=0", 2},
                 {"A6000", "memory.device_limit=26G", 2},
                 {"A6000", "memory.device_limit=21G", 1},
                 {"RTX3090", "memory.device_limit=30G", 2}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int64_t chosen = 0, same = 0;
        const int64_t lack = lack_with(cases[i].gpu, cases[i].limit, 0, &chosen);
        cr_assert_eq(chosen, cases[i].group, "%s, %s: %lld", cases[i].gpu, cases[i].limit,
                     (long long)chosen);
        cr_assert_leq(lack, 0);
        cr_assert_eq(lack, lack_with(cases[i].gpu, cases[i].limit, (int)chosen, &same));
        for (int more = 2 * (int)chosen; more <= 4; more *= 2) { /* so many did not fit */
            cr_assert_gt(lack_with(cases[i].gpu, cases[i].limit, more, &same), 0);
            cr_assert_eq(same, more, "a number stays");
        }
    }
}

/* A larger group keeps more inputs, but fewer sums of gradients: the least is not always 1. */
Test(outlook, auto_lacks_least_where_nothing_fits)
{
    static const char *const lengths[] = {"train.seq_len=256", "train.seq_len=2048"};
    for (int i = 0; i < 2; i++) {
        int64_t least = INT64_MAX, best = 0;
        for (int group = 4; group >= 0; group--) { /* auto is the last */
            char groups[48];
            snprintf(groups, sizeof groups,
                     group > 0 ? "train.gather_group=%d" : "train.gather_group=auto", group);
            const char *const sets[] = {"train.global_batch=16", "memory.device_limit=4G",
                                        lengths[i], groups};
            fixture f = on_base(LLAMA_3_70B, sets, 4);
            const qs_outlook outlook = look_at(&f, "H100", 4, 8);
            const int64_t lack = lack_on(&f, &outlook, "H100");
            cr_assert_gt(lack, 0);
            cr_assert(group > 0 || (lack == least && outlook.choice.group == best), "%s: %lld",
                      lengths[i], (long long)outlook.choice.group);
            best = lack < least ? group : best;
            least = lack < least ? lack : least;
            done(&f);
        }
        cr_assert_eq(best, i == 0 ? 4 : 1, "%s: %lld", lengths[i], (long long)best);
    }
}

/* ---- layers that stay ---- */

typedef struct {
    const char *key; /* shard.keep_resident or memory.keep_decoded */
    const char *gpu, *limit;
    int nranks, low, high; /* what auto may be */
} kept_case;

/* With `kept` for the key: "auto", "none", a number. *over: bytes beyond 19 of 20 that there are.
 */
static qs_outlook with_kept(const kept_case *c, const char *kept, double *step_s, int64_t *over)
{
    char set[64];
    snprintf(set, sizeof set, "%s=%s", c->key, kept);
    const char *const sets[] = {"train.recompute=none", c->limit, set};
    fixture f = llama(sets, 3);
    const qs_outlook_place place = {
        .gpu = qs_gpu_kind_find(c->gpu), .nranks = c->nranks, .per_node = 8, .threads = 1};
    const qs_outlook outlook = look_at(&f, c->gpu, c->nranks, 8);
    const qs_links links = {8, 1, 1};
    *over = (int64_t)((double)qs_outlook_needed(&outlook) -
                      0.95 * (double)qs_outlook_allowed(&f.config, &place));
    *step_s = qs_forecast_make(&outlook.work, place.gpu, &links).step_s;
    done(&f);
    return outlook;
}

Test(outlook, auto_keeps_as_many_layers_as_fit)
{
    static const kept_case cases[] = {
        {"memory.keep_decoded", "H200", "memory.device_limit=0", 1, 32, 32},
        {"memory.keep_decoded", "RTX5090", "memory.device_limit=0", 1, 10, 31},
        {"memory.keep_decoded", "RTX5090", "memory.device_limit=0", 2, 10, 31},
        {"memory.keep_decoded", "H200", "memory.device_limit=21G", 1, 0, 1},
        {"memory.keep_decoded", "H200", "memory.device_limit=10G", 1, 0, 0}, /* too little */
        {"shard.keep_resident", "H200", "memory.device_limit=0", 4, 32, 32},
        {"shard.keep_resident", "H200", "memory.device_limit=19G", 4, 10, 31}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const kept_case *c = &cases[i];
        const bool decoded = strstr(c->key, "decoded") != NULL;
        char number[24];
        double auto_s = 0, other_s = 0;
        int64_t over = 0;
        const qs_outlook best = with_kept(c, "auto", &auto_s, &over);
        const qs_plan_kept *kept = decoded ? &best.choice.decoded : &best.choice.resident;
        cr_assert(kept->by_room && kept->of == 32);
        cr_assert(kept->layers >= c->low && kept->layers <= c->high, "%s on %s, %s: %lld", c->key,
                  c->gpu, c->limit, (long long)kept->layers);
        cr_assert(over <= 0 || kept->layers == 0);
        snprintf(number, sizeof number, "%lld", (long long)kept->layers);
        const qs_outlook same = with_kept(c, number, &other_s, &over);
        cr_assert(!same.choice.resident.by_room && !same.choice.decoded.by_room);
        cr_assert_eq(qs_outlook_needed(&same), qs_outlook_needed(&best), "a number stays");
        cr_assert_eq(other_s, auto_s);
        (void)with_kept(c, "none", &other_s, &over);
        cr_assert(kept->layers == 0 ? other_s == auto_s : other_s > auto_s);
        if (kept->layers < kept->of - 1) { /* the last decoded layer takes no room of its own */
            snprintf(number, sizeof number, "%lld", (long long)kept->layers + 1);
            (void)with_kept(c, number, &other_s, &over);
            cr_assert_gt(over, 0, "%s on %s, %s: one more fits", c->key, c->gpu, c->limit);
        }
    }
}

/* Whole layers first: what is left is decoded. Where nothing is gathered none has to stay whole. */
Test(outlook, layers_stay_whole_before_they_stay_decoded)
{
    static const char *const sets[] = {"shard.keep_resident=auto", "memory.keep_decoded=auto",
                                       "train.recompute=none", "memory.device_limit=24G"};
    fixture f = llama(sets, 4);
    const qs_outlook four = look_at(&f, "H200", 4, 8), one = look_at(&f, "H200", 1, 8);
    cr_assert(four.choice.resident.by_room && four.choice.resident.layers == 32);
    cr_assert(four.choice.decoded.layers > 0 && four.choice.decoded.layers < 32);
    cr_assert(!one.choice.resident.by_room && one.choice.decoded.layers > 0);
    done(&f);
}

/* 2 nodes of 4: a node's copy is 44 % of a 3090, and long sequences need what it takes more
 * than the world's. */
Test(outlook, auto_gives_a_node_no_copy_that_leaves_no_room_for_the_rest)
{
    static const struct {
        const char *group, *length;
        int ranks; /* 0: does not fit */
    } cases[] = {{"shard.group=auto", "train.seq_len=2048", 4},
                 {"shard.group=auto", "train.seq_len=5632", 8},
                 {"shard.group=node", "train.seq_len=5632", 0},
                 {"shard.group=world", "train.seq_len=5632", 8}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *const sets[] = {"train.global_batch=8", cases[i].length, cases[i].group};
        fixture f = on_base(LLAMA_3_70B, sets, 3);
        const qs_outlook outlook = look_at(&f, "RTX3090", 8, 4);
        const bool fit = lack_on(&f, &outlook, "RTX3090") <= 0;
        cr_assert_eq(fit ? outlook.work.group : 0, cases[i].ranks, "%s, %s: %d", cases[i].group,
                     cases[i].length, outlook.work.group);
        cr_assert_eq(outlook.choice.widened, i == 1);
        done(&f);
    }
}

Test(outlook, a_group_that_does_not_divide_the_ranks_is_refused)
{
    static const char *const sets[] = {"shard.group=3"};
    fixture f = llama(sets, 1);
    qs_outlook outlook;
    const qs_outlook_place place = {
        .gpu = qs_gpu_kind_find("H100"), .nranks = 8, .per_node = 8, .threads = 1};
    cr_assert_eq(qs_outlook_make(&outlook, &f.inputs, &f.config, &place), QS_ERR_CONFIG_PAIR);
    done(&f);
}

/* Whether the limit holds on so many ranks, by the plan itself. */
static bool fits_on(const fixture *f, int nranks, int per_node)
{
    const qs_outlook outlook = look_at(f, "H100", nranks, per_node);
    const qs_outlook_place place = {
        .gpu = qs_gpu_kind_find("H100"), .nranks = nranks, .per_node = per_node, .threads = 1};
    return qs_outlook_needed(&outlook) <= qs_outlook_allowed(&f->config, &place);
}

/* Started from 3, doubling looks at 6, 12, 24; on nodes of 4 the others are 5, and 8, 16, 20. Of
 * 70B, since several nodes take two communicators more, of which shares of 8B would not make up. */
Test(outlook, the_fewest_ranks_that_are_enough_are_named)
{
    static const char *const limits[] = {"15500M", "16600M", "17500M", "18500M",
                                         "20500M", "24000M", "25000M"};
    bool within = false, beyond = false;
    for (size_t i = 0; i < sizeof limits / sizeof *limits; i++) {
        char limit[64];
        snprintf(limit, sizeof limit, "memory.device_limit=%s", limits[i]);
        const char *const sets[] = {limit, "shard.group=world"};
        fixture f = on_base(LLAMA_3_70B, sets, 2);
        qs_outlook_remedy remedy;
        const qs_outlook_place place = {
            .gpu = qs_gpu_kind_find("H100"), .nranks = 3, .per_node = 4, .threads = 1};
        cr_assert(!fits_on(&f, 3, 4), "%s", limit);
        cr_assert_eq(qs_outlook_find_remedy(&remedy, &f.inputs, &f.config, &place), QS_OK);
        const int n = remedy.nranks;
        cr_assert(n > 3 && fits_on(&f, n, 4), "%s: %d", limit, n);
        cr_assert(n == 4 || !fits_on(&f, n / 4 * 4 - (n % 4 == 0 ? 4 : 0), 4), "%s: %d", limit, n);
        within = within || n == 4;
        beyond = beyond || (n > 4 && n % 4 == 0);
        done(&f);
    }
    cr_assert(within && beyond);
}

static qs_outlook_remedy remedy_for(const fixture *f, const char *gpu)
{
    qs_outlook_remedy remedy;
    const qs_outlook_place place = {
        .gpu = qs_gpu_kind_find(gpu), .nranks = 1, .per_node = 8, .threads = 1};
    cr_assert_eq(qs_outlook_find_remedy(&remedy, &f->inputs, &f->config, &place), QS_OK);
    return remedy;
}

Test(outlook, a_remedy_names_only_what_is_needed)
{
    static const char *const none[] = {"train.recompute=none", "train.seq_len=8192"};
    fixture f = llama(none, 2);
    cr_assert_str_eq(remedy_for(&f, "RTX4090").settings, "train.recompute: selective", "%s",
                     remedy_for(&f, "RTX4090").settings);
    done(&f);
    static const char *const many[] = {"train.global_batch=64", "train.micro_batch=64",
                                       "train.recompute=full"};
    fixture g = llama(many, 3);
    const qs_outlook_remedy remedy = remedy_for(&g, "A6000");
    cr_assert_str_eq(remedy.settings, "train.micro_batch: 1", "%s", remedy.settings);
    done(&g);
    static const char *const decoded[] = {"memory.keep_decoded=20", "train.recompute=full",
                                          "memory.device_limit=20G"};
    fixture h = llama(decoded, 3);
    cr_assert_str_eq(remedy_for(&h, "RTX3090").settings, "", "it fits");
    h.config.memory.keep_decoded = 64; /* of 32 */
    cr_assert_str_eq(remedy_for(&h, "RTX3090").settings, "memory.keep_decoded: none");
    done(&h);
}

/* What is suggested for a number of micro-batches a pass is the largest that fits and saves a pass;
 * a number that is in the way is not lowered further than it has to be. */
Test(outlook, a_smaller_group_is_the_largest_that_fits)
{
    static const char *const limits[] = {"22G", "23G", "24G", "26G", "28G", "30G", "33G", "36G"};
    const int per_rank = 12;
    int64_t seen[16] = {0}, kinds = 0;
    for (size_t i = 0; i < sizeof limits / sizeof *limits; i++) {
        char limit[64];
        snprintf(limit, sizeof limit, "memory.device_limit=%s", limits[i]);
        const char *const sets[] = {"train.global_batch=48", "train.seq_len=2048", limit,
                                    "train.gather_group=12"};
        fixture f = on_base(LLAMA_3_70B, sets, 4);
        qs_outlook_remedy remedy;
        const qs_outlook_place place = {
            .gpu = qs_gpu_kind_find("H100"), .nranks = 4, .per_node = 8, .threads = 1};
        int64_t best = 0, chosen = 0;
        for (int group = 11; group > 0 && best == 0; group--) {
            const qs_config was = f.config;
            f.config.train.gather_group = group;
            const qs_outlook outlook = look_at(&f, "H100", 4, 8);
            const int passes = (per_rank + group - 1) / group;
            const bool saves = group == 1 || passes < (per_rank + group - 2) / (group - 1);
            best = saves && lack_on(&f, &outlook, "H100") <= 0 ? group : 0;
            f.config = was;
        }
        cr_assert_eq(qs_outlook_find_remedy(&remedy, &f.inputs, &f.config, &place), QS_OK);
        const char *at = strstr(remedy.settings, "train.gather_group: ");
        chosen = at != NULL ? atoll(at + strlen("train.gather_group: ")) : 0;
        cr_assert_gt(best, 0, "%s", limits[i]);
        cr_assert_eq(chosen, best, "%s: %s, not %lld", limits[i], remedy.settings, (long long)best);
        kinds += seen[chosen]++ == 0;
        done(&f);
    }
    cr_assert_geq(kinds, 3);
}

Test(outlook, what_nothing_helps_has_no_remedy)
{
    static const char *const huge[] = {"train.seq_len=1048576"};
    fixture f = llama(huge, 1);
    const qs_outlook_remedy remedy = remedy_for(&f, "RTX3090");
    cr_assert_str_eq(remedy.settings, "");
    cr_assert_eq(remedy.nranks, 0);
    done(&f);
}

Test(outlook, offloaded_activations_come_with_full_recompute_only)
{
    static const char *const tight[] = {"train.recompute=none", "train.seq_len=32768",
                                        "memory.device_limit=14G"};
    fixture f = llama(tight, 3);
    const qs_outlook_remedy remedy = remedy_for(&f, "H100");
    cr_assert(strstr(remedy.settings, "activations") == NULL ||
                  strstr(remedy.settings, "train.recompute: full") != NULL,
              "%s", remedy.settings);
    done(&f);
}
