/* What a step counts is what its forecast foresaw, for models of every kind: layers run here on
 * operations that compute nothing. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"
#include "model/flops.h"
#include "model/model_impl.h"
#include "store/io.h"
#include "tests/scratch.h"
#include "train/outlook.h"

enum { TOKENS = 24 };

TestSuite(flops, .timeout = 120);

/* ---- operations that do nothing ---- */

static qs_status linear_forward(qs_queue *q, const qs_unit_view *unit, const qs_weight *w,
                                const float *bias, const qs_mat *residual, const qs_lora *lora,
                                const qs_mat *x, qs_mat *xa, qs_mat *y)
{
    (void)q, (void)unit, (void)w, (void)bias, (void)residual, (void)lora, (void)x, (void)xa;
    (void)y;
    return QS_OK;
}

static qs_status linears_forward(qs_queue *q, const qs_unit_view *unit, const qs_joined_linear *l,
                                 int count, const qs_mat *x)
{
    (void)q, (void)unit, (void)l, (void)count, (void)x;
    return QS_OK;
}

static qs_status linears_backward(qs_queue *q, const qs_unit_view *unit, const qs_joined_linear *l,
                                  int count, const qs_mat *x, qs_mat *dx, bool accumulate)
{
    (void)q, (void)unit, (void)l, (void)count, (void)x, (void)dx, (void)accumulate;
    return QS_OK;
}

static qs_status dora_backward(qs_queue *q, const qs_unit_view *unit, const qs_weight *w,
                               const qs_lora *lora, const qs_mat *x, const qs_mat *xa,
                               const qs_mat *dy, float *dm)
{
    (void)q, (void)unit, (void)w, (void)lora, (void)x, (void)xa, (void)dy, (void)dm;
    return QS_OK;
}

static qs_status norm_forward(qs_queue *q, const qs_mat *x, const float *w, float eps, float *rstd,
                              qs_mat *y)
{
    (void)q, (void)x, (void)w, (void)eps, (void)rstd, (void)y;
    return QS_OK;
}

static qs_status norm_backward(qs_queue *q, const qs_mat *dy, const qs_mat *x, const float *w,
                               const float *rstd, qs_mat *dx)
{
    (void)q, (void)dy, (void)x, (void)w, (void)rstd, (void)dx;
    return QS_OK;
}

static qs_status gather_rows(qs_queue *q, const qs_mat *x, const int32_t *index, qs_mat *y)
{
    (void)q, (void)x, (void)index, (void)y;
    return QS_OK;
}

static qs_status add(qs_queue *q, const qs_mat *a, const qs_mat *b, qs_mat *y)
{
    (void)q, (void)a, (void)b, (void)y;
    return QS_OK;
}

static qs_status rope(qs_queue *q, qs_mat *x, int n_heads, int head_dim, int rotary_dim,
                      const float *cos, const float *sin, const int32_t *position, bool inverse)
{
    (void)q, (void)x, (void)n_heads, (void)head_dim, (void)rotary_dim, (void)cos, (void)sin;
    (void)position, (void)inverse;
    return QS_OK;
}

static qs_status attention_forward(qs_queue *q, const qs_attention_shape *shape, const qs_mat *qm,
                                   const qs_mat *km, const qs_mat *vm, qs_mat *o, float *lse)
{
    (void)q, (void)shape, (void)qm, (void)km, (void)vm, (void)o, (void)lse;
    return QS_OK;
}

static qs_status attention_backward(qs_queue *q, const qs_attention_shape *shape, const qs_mat *qm,
                                    const qs_mat *km, const qs_mat *vm, const qs_mat *o,
                                    const float *lse, const qs_mat *d_o, float *delta, qs_mat *dq,
                                    qs_mat *dk, qs_mat *dv)
{
    (void)q, (void)shape, (void)qm, (void)km, (void)vm, (void)o, (void)lse, (void)d_o;
    (void)delta, (void)dq, (void)dk, (void)dv;
    return QS_OK;
}

static qs_status glu_forward(qs_queue *q, qs_glu glu, const qs_mat *gate, const qs_mat *up,
                             qs_mat *act)
{
    (void)q, (void)glu, (void)gate, (void)up, (void)act;
    return QS_OK;
}

static qs_status glu_backward(qs_queue *q, qs_glu glu, const qs_mat *gate, const qs_mat *up,
                              const qs_mat *dact, qs_mat *dgate, qs_mat *dup)
{
    (void)q, (void)glu, (void)gate, (void)up, (void)dact, (void)dgate, (void)dup;
    return QS_OK;
}

static int64_t border(int lora_rank)
{
    return lora_rank;
}

static const qs_ops nothing = {.act_dtype = QS_BF16,
                               .border = border,
                               .linear_lora_forward = linear_forward,
                               .linears_lora_forward = linears_forward,
                               .linears_lora_backward = linears_backward,
                               .dora_backward = dora_backward,
                               .rmsnorm_forward = norm_forward,
                               .rmsnorm_backward = norm_backward,
                               .gather_rows = gather_rows,
                               .add = add,
                               .rope = rope,
                               .attention_forward = attention_forward,
                               .attention_backward = attention_backward,
                               .glu_forward = glu_forward,
                               .glu_backward = glu_backward};

/* ---- what the layers count ---- */

typedef struct {
    double forward, backward;
} counts;

static void *zeros(size_t bytes)
{
    void *at = calloc(1, bytes);
    cr_assert_not_null(at);
    return at;
}

static void name_norms(const qs_hf_config *config, const float *some, qs_layer_params *p)
{
    p->norm1 = p->norm2 = qs_norms_in_front(config) ? some : NULL;
    p->post1 = p->post2 = qs_norms_behind(config) ? some : NULL;
    p->q_norm = p->k_norm = config->qk_norm ? some : NULL;
}

/* One sequence of TOKENS through all layers, up and down. */
static counts count(const qs_hf_config *config, const qs_config *cfg)
{
    const int layers = config->n_layers;
    int32_t cu_seqlens[2] = {0, TOKENS}, every_row[TOKENS] = {0};
    const float some = 0;
    const qs_batch batch = {.n_tokens = TOKENS, .cu_seqlens = cu_seqlens, .n_docs = 1};
    const qs_model_noise noise = {.dropout = (float)cfg->lora.dropout};
    qs_lora_layout layout;
    cr_assert_eq(qs_lora_layout_make(&layout, config, cfg), QS_OK);
    const size_t elements = (size_t)(layers * layout.per_layer);
    float *lora = zeros(elements * sizeof *lora), *grad = zeros(elements * sizeof *grad);
    qs_micro_acts micro = {.layers = zeros((size_t)layers * sizeof *micro.layers)};
    qs_model m = {.config = config,
                  .ops = &nothing,
                  .layout = &layout,
                  .lora = lora,
                  .layers = zeros((size_t)layers * sizeof *m.layers),
                  .micro = &micro,
                  .every_row = every_row,
                  .shape = {.max_tokens = TOKENS,
                            .max_targets = 1,
                            .group = 1,
                            .recompute = cfg->train.recompute,
                            .backward = true}};
    size_t activation_bytes, work_bytes;
    if (layout.dora) {
        m.dora.norm = m.dora.gain = lora;
    }
    for (int l = 0; l < layers; l++) {
        name_norms(config, &some, &m.layers[l]);
        for (int i = 0; i < QS_LINEAR_COUNT; i++) {
            qs_weight *w = &m.layers[l].linear[i];
            qs_linear_shape(config, (qs_linear)i, &w->out, &w->in);
        }
    }
    cr_assert_eq(qs_queue_create(&m.queue, 1), QS_OK);
    qs_model_set_widths(&m);
    qs_model_carve(&m, &activation_bytes, &work_bytes);
    m.activation_block = zeros(activation_bytes);
    m.work_block = zeros(work_bytes);
    qs_model_carve(&m, &activation_bytes, &work_bytes);

    counts seen = {0};
    qs_layer_call call = {.model = &m, .batch = &batch, .input = &micro.input, .noise = &noise};
    for (call.layer = 0; call.layer < layers; call.layer++) {
        call.acts = &micro.layers[call.layer];
        cr_assert_eq(qs_layer_forward(&call, micro.x_last), QS_OK);
    }
    seen.forward = m.flops;
    for (call.layer = layers - 1; call.layer >= 0; call.layer--) {
        call.acts = &micro.layers[call.layer];
        cr_assert_eq(qs_layer_recompute(&call), QS_OK);
        cr_assert_eq(qs_layer_backward(&call, micro.dx, grad), QS_OK);
    }
    seen.backward = m.flops - seen.forward;
    qs_queue_destroy(m.queue);
    void *const taken[] = {m.activation_block, m.work_block, m.layers, micro.layers, lora, grad};
    for (size_t i = 0; i < sizeof taken / sizeof *taken; i++) {
        free(taken[i]);
    }
    return seen;
}

/* ---- beside the forecast ---- */

#define SIZES                                                                                      \
    "\"hidden_size\": 64, \"intermediate_size\": 80, \"num_hidden_layers\": 3,"                    \
    " \"num_attention_heads\": 4, \"num_key_value_heads\": 2, \"vocab_size\": 300,"                \
    " \"max_position_embeddings\": 64, \"torch_dtype\": \"bfloat16\""

static const char *const models[] = {
    "{\"model_type\": \"llama\", " SIZES "}",
    /* a window, which is shorter than the sequence; norms behind, and of heads */
    "{\"model_type\": \"gemma3_text\", \"head_dim\": 8, \"sliding_window\": 5,"
    " \"sliding_window_pattern\": 2, " SIZES "}",
    /* one linear for q, k and v, one for gate and up */
    "{\"model_type\": \"phi3\", \"pad_token_id\": 0, " SIZES "}",
    "{\"model_type\": \"olmo2\", " SIZES "}",
};

static const char *const adapters[][3] = {
    {"lora.targets=all-linear", "lora.dropout=0.0", "lora.dora=false"},
    {"lora.targets=attention", "lora.dropout=0.1", "lora.dora=false"},
    {"lora.targets=all-linear", "lora.dropout=0.0", "lora.dora=true"},
    {"lora.targets=mlp", "lora.dropout=0.1", "lora.dora=true"},
    {"lora.targets=all-linear", "lora.dropout=0.1", "lora.dora=true"},
};

static double flops_of(const qs_step_phase *phase)
{
    return phase->product_flops + phase->attention_flops;
}

static void compare(const char *what, double counted, double foreseen, const char *model,
                    const char *const *sets)
{
    cr_expect_lt(fabs(foreseen / counted - 1), 1e-12,
                 "%s: %.17g counted, %.17g foreseen; %s %s %s %s; %.40s", what, counted, foreseen,
                 sets[0], sets[1], sets[2], sets[3], model);
}

static void check(const char *model, const char *const *sets, int n_sets)
{
    char folder[SCRATCH_MAX], path[SCRATCH_MAX + 16], yaml[SCRATCH_MAX + 128];
    qs_config cfg;
    qs_outlook_inputs inputs;
    qs_outlook outlook;
    const qs_outlook_place place = {
        .gpu = qs_gpu_kind_find("H100"), .nranks = 1, .per_node = 1, .threads = 1};
    scratch_make(folder, NULL);
    snprintf(path, sizeof path, "%s/config.json", folder);
    cr_assert_eq(qs_io_write_file(path, model, strlen(model)), QS_OK);
    snprintf(yaml, sizeof yaml,
             "base: %s\ntrain: {global_batch: 1, micro_batch: 1, seq_len: %d}\nlora: {rank: 4}\n",
             folder, TOKENS);
    cr_assert_eq(qs_config_parse(&cfg, yaml, strlen(yaml), "run.yaml", sets, n_sets), QS_OK, "%s",
                 qs_error_text());
    cr_assert_eq(qs_outlook_open(&inputs, &cfg), QS_OK, "%s", qs_error_text());
    cr_assert_eq(qs_outlook_make(&outlook, &inputs, &cfg, &place), QS_OK, "%s", qs_error_text());

    const qs_hf_config *config = &inputs.index->config;
    const counts seen = count(config, &cfg);
    compare("up", seen.forward, flops_of(&outlook.work.forward), model, sets);
    compare("down", seen.backward, flops_of(&outlook.work.backward), model, sets);
    compare("head",
            qs_flops_head(config, (double)inputs.train->n_targets, (double)config->vocab, true),
            flops_of(&outlook.work.head), model, sets);
    qs_outlook_close(&inputs);
    cr_assert_eq(unlink(path), 0);
    cr_assert_eq(rmdir(folder), 0);
}

Test(flops, a_step_counts_what_its_forecast_foresaw)
{
    static const char *const recompute[] = {"train.recompute=none", "train.recompute=selective",
                                            "train.recompute=full"};
    qs_log_init(0, 1, QS_LOG_QUIET, false);
    for (size_t m = 0; m < sizeof models / sizeof *models; m++) {
        for (size_t a = 0; a < sizeof adapters / sizeof *adapters; a++) {
            for (size_t r = 0; r < sizeof recompute / sizeof *recompute; r++) {
                const char *const sets[] = {adapters[a][0], adapters[a][1], adapters[a][2],
                                            recompute[r]};
                check(models[m], sets, 4);
            }
        }
    }
}

Test(flops, pairs_are_those_that_mask_and_window_let_through)
{
    for (int n = 1; n <= 12; n++) {
        for (int window = 0; window <= 14; window++) {
            int pairs = 0;
            for (int query = 0; query < n; query++) {
                pairs += window > 0 && query >= window ? window : query + 1;
            }
            cr_expect_eq(qs_flops_pairs(n, window), pairs, "%d tokens, window %d", n, window);
        }
    }
}
