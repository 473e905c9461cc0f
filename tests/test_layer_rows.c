/* How a layer gives linears that read the same x to operations that join (qs_ops.linears_lora_*):
 * whether their results and gradients stand side by side, with room for all adapters behind what is
 * multiplied. The operations here record that and compute nothing. */
#include <criterion/criterion.h>
#include <stdlib.h>

#include "model/model_impl.h"

enum { TOKENS = 3, RANK = 5, BORDER = 8, LAYERS = 2, CALLS_MAX = 8 };

/* A call of linears_lora_*: of how many, and whether they can be one product. */
typedef struct {
    int count;
    bool one;
} call_seen;

static call_seen seen[CALLS_MAX];
static int n_seen;
static const qs_model *model; /* whose blocks everything must lie in */
static size_t activation_bytes, work_bytes;

static bool lies_in(const qs_mat *mat, const void *block, size_t bytes)
{
    const char *from = mat->data, *base = block;
    const size_t size =
        (size_t)((mat->rows - 1) * mat->stride + mat->cols) * qs_dtype_bytes(mat->dtype);
    return from >= base && from + size <= base + bytes;
}

static void check_place(const qs_mat *mat)
{
    cr_assert(lies_in(mat, model->activation_block, activation_bytes) ||
              lies_in(mat, model->work_block, work_bytes));
    cr_assert_geq(mat->stride, mat->cols);
}

static int adapters_of(const qs_joined_linear *l, int count)
{
    int adapters = 0;
    for (int i = 0; i < count; i++) {
        adapters += l[i].lora.a != NULL;
    }
    return adapters;
}

/* Nothing of what the adapters keep lies where the operations may write. */
static void check_apart(const qs_mat *wide, const qs_joined_linear *l, int count)
{
    const char *from = wide->data;
    const char *behind =
        from + (size_t)((wide->rows - 1) * wide->stride + wide->cols) * qs_dtype_bytes(wide->dtype);
    for (int i = 0; i < count; i++) {
        const char *xa = l[i].xa.data;
        cr_assert(xa == NULL || xa < from || xa >= behind, "xa of %d in a border", i);
    }
}

/* `multiplied`: what needs the border, x or, NULL, the row of all. */
static void record(const qs_joined_linear *l, int count, const qs_mat *multiplied)
{
    qs_mat row = l[0].y;
    bool one = true;
    for (int i = 0; i < count; i++) {
        check_place(&l[i].y);
        if (i > 0) {
            const char *behind = (char *)row.data + (size_t)row.cols * qs_dtype_bytes(row.dtype);
            one = one && l[i].y.data == behind && l[i].y.stride == row.stride;
            row.cols += l[i].y.cols;
        }
    }
    qs_mat wide = multiplied != NULL ? *multiplied : row;
    wide.cols += adapters_of(l, count) * BORDER;
    one = one && wide.stride >= wide.cols;
    if (one) {
        check_place(&wide);
        check_apart(&wide, l, count);
    }
    cr_assert_lt(n_seen, CALLS_MAX);
    seen[n_seen++] = (call_seen){count, one};
}

static qs_status linears_forward(qs_queue *q, const qs_unit_view *unit, const qs_joined_linear *l,
                                 int count, const qs_mat *x)
{
    (void)q;
    (void)unit;
    check_place(x);
    record(l, count, x);
    return QS_OK;
}

static qs_status linears_backward(qs_queue *q, const qs_unit_view *unit, const qs_joined_linear *l,
                                  int count, const qs_mat *x, qs_mat *dx, bool accumulate)
{
    (void)q;
    (void)unit;
    (void)dx;
    check_place(x);
    cr_assert_not(accumulate);
    record(l, count, NULL);
    return QS_OK;
}

static qs_status linear_forward(qs_queue *q, const qs_unit_view *unit, const qs_weight *w,
                                const float *bias, const qs_mat *residual, const qs_lora *lora,
                                const qs_mat *x, qs_mat *xa, qs_mat *y)
{
    (void)q;
    (void)unit;
    (void)w;
    (void)bias;
    (void)residual;
    (void)xa;
    check_place(x);
    check_place(y);
    cr_assert_geq(x->stride, x->cols + (lora->a != NULL ? BORDER : 0));
    return QS_OK;
}

static qs_status dora_backward(qs_queue *q, const qs_unit_view *unit, const qs_weight *w,
                               const qs_lora *lora, const qs_mat *x, const qs_mat *xa,
                               const qs_mat *dy, float *dm)
{
    (void)q;
    (void)unit;
    (void)w;
    (void)lora;
    (void)x;
    (void)xa;
    (void)dy;
    (void)dm;
    return QS_OK;
}

static qs_status norm_forward(qs_queue *q, const qs_mat *x, const float *w, float eps, float *rstd,
                              qs_mat *y)
{
    (void)q;
    (void)w;
    (void)eps;
    (void)rstd;
    check_place(x);
    check_place(y);
    return QS_OK;
}

static qs_status norm_backward(qs_queue *q, const qs_mat *dy, const qs_mat *x, const float *w,
                               const float *rstd, qs_mat *dx)
{
    (void)q;
    (void)w;
    (void)rstd;
    (void)dx;
    check_place(dy);
    check_place(x);
    return QS_OK;
}

/* The stream as it is: all rows, by their numbers. */
static qs_status gather_rows(qs_queue *q, const qs_mat *x, const int32_t *index, qs_mat *y)
{
    (void)q;
    cr_assert_eq(index, model->every_row);
    check_place(x);
    check_place(y);
    cr_assert(x->rows == y->rows && x->cols == y->cols);
    return QS_OK;
}

static qs_status add(qs_queue *q, const qs_mat *a, const qs_mat *b, qs_mat *y)
{
    (void)q;
    check_place(a);
    check_place(b);
    check_place(y);
    return QS_OK;
}

static qs_status rope(qs_queue *q, qs_mat *x, int n_heads, int head_dim, int rotary_dim,
                      const float *cos, const float *sin, const int32_t *position, bool inverse)
{
    (void)q;
    (void)rotary_dim;
    (void)cos;
    (void)sin;
    (void)position;
    (void)inverse;
    check_place(x);
    cr_assert_eq(x->cols, n_heads * head_dim);
    return QS_OK;
}

static qs_status attention_forward(qs_queue *q, const qs_attention_shape *shape, const qs_mat *qm,
                                   const qs_mat *km, const qs_mat *vm, qs_mat *o, float *lse)
{
    (void)q;
    (void)shape;
    (void)lse;
    check_place(qm);
    check_place(km);
    check_place(vm);
    check_place(o);
    return QS_OK;
}

static qs_status attention_backward(qs_queue *q, const qs_attention_shape *shape, const qs_mat *qm,
                                    const qs_mat *km, const qs_mat *vm, const qs_mat *o,
                                    const float *lse, const qs_mat *d_o, float *delta, qs_mat *dq,
                                    qs_mat *dk, qs_mat *dv)
{
    (void)delta;
    (void)d_o;
    (void)attention_forward(q, shape, qm, km, vm, (qs_mat *)(uintptr_t)o, (float *)(uintptr_t)lse);
    check_place(dq);
    check_place(dk);
    check_place(dv);
    return QS_OK;
}

static qs_status glu_forward(qs_queue *q, qs_glu glu, const qs_mat *gate, const qs_mat *up,
                             qs_mat *act)
{
    (void)q;
    (void)glu;
    check_place(gate);
    check_place(up);
    check_place(act);
    return QS_OK;
}

static qs_status glu_backward(qs_queue *q, qs_glu glu, const qs_mat *gate, const qs_mat *up,
                              const qs_mat *dact, qs_mat *dgate, qs_mat *dup)
{
    (void)glu_forward(q, glu, gate, up, (qs_mat *)(uintptr_t)dact);
    check_place(dgate);
    check_place(dup);
    return QS_OK;
}

static int64_t border(int lora_rank)
{
    return (lora_rank + BORDER - 1) / BORDER * BORDER;
}

static qs_ops ops_of(bool joins)
{
    return (qs_ops){.act_dtype = QS_BF16,
                    .joins = joins,
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
}

/* ---- a model of such operations ---- */

typedef enum { PLAIN, NORMED_HEADS, NORMS_BEHIND, FUSED } kind;

static qs_hf_config config_of(kind k)
{
    return (qs_hf_config){.n_layers = LAYERS,
                          .n_heads = 4,
                          .n_kv_heads = 2,
                          .head_dim = 8,
                          .hidden = 24,
                          .ffn_hidden = 40,
                          .score_scale = 1,
                          .residual_multiplier = 1,
                          .rotary_dim = 8,
                          .fused = k == FUSED,
                          .norms = k == NORMS_BEHIND ? QS_NORMS_BEHIND : QS_NORMS_IN_FRONT,
                          .qk_norm = k == NORMED_HEADS || k == NORMS_BEHIND,
                          .qk_whole = k == NORMS_BEHIND};
}

static qs_lora_layout layout_of(const qs_hf_config *config, bool dora)
{
    qs_lora_layout layout = {.n_layers = LAYERS, .lora_rank = RANK, .scale = 1, .dora = dora};
    for (int i = 0; i < QS_LINEAR_COUNT; i++) {
        layout.targeted[i] = qs_linears(config->fused) >> i & 1;
    }
    return layout;
}

/* Up and down through layer 1; what was seen stays in `seen`. */
static void pass(const qs_ops *ops, const qs_hf_config *config, const qs_lora_layout *layout,
                 int recompute)
{
    static float numbers[64];
    int32_t cu_seqlens[2] = {0, TOKENS};
    const qs_batch batch = {.n_tokens = TOKENS, .cu_seqlens = cu_seqlens, .n_docs = 1};
    int32_t every_row[TOKENS] = {0, 1, 2};
    qs_layer_params params[LAYERS] = {{.norm1 = NULL}};
    qs_micro_acts micro = {.layers = calloc(LAYERS, sizeof *micro.layers)};
    qs_model m = {.config = config,
                  .ops = ops,
                  .layout = layout,
                  .lora = numbers,
                  .layers = params,
                  .micro = &micro,
                  .every_row = every_row,
                  .dora = {.norm = numbers, .gain = numbers},
                  .shape = {.max_tokens = TOKENS,
                            .max_targets = 1,
                            .group = 1,
                            .recompute = recompute,
                            .backward = true}};
    for (int i = 0; i < QS_LINEAR_COUNT; i++) {
        qs_weight *w = &params[1].linear[i];
        qs_linear_shape(config, (qs_linear)i, &w->out, &w->in);
    }
    if (qs_norms_in_front(config)) {
        params[1].norm1 = params[1].norm2 = numbers;
    }
    if (qs_norms_behind(config)) {
        params[1].post1 = params[1].post2 = numbers;
    }
    if (config->qk_norm) {
        params[1].q_norm = params[1].k_norm = numbers;
    }
    cr_assert_eq(qs_queue_create(&m.queue, 1), QS_OK);
    qs_model_set_widths(&m);
    qs_model_carve(&m, &activation_bytes, &work_bytes);
    m.activation_block = calloc(1, activation_bytes);
    m.work_block = calloc(1, work_bytes);
    qs_model_carve(&m, &activation_bytes, &work_bytes);
    model = &m;
    n_seen = 0;
    const qs_layer_call call = {
        .model = &m, .layer = 1, .batch = &batch, .input = &micro.input, .acts = &micro.layers[1]};
    cr_assert_eq(qs_layer_forward(&call, micro.x_last), QS_OK);
    cr_assert_eq(qs_layer_backward(&call, micro.dx, numbers), QS_OK);
    qs_queue_destroy(m.queue);
    free(m.activation_block);
    free(m.work_block);
    free(micro.layers);
}

static void expect(const char *what, int qkv, bool qkv_is_one, int gate_up, bool gate_up_is_one)
{
    const call_seen want[] = {{qkv, qkv_is_one}, {gate_up, gate_up_is_one},
                              {1, true},         {gate_up, gate_up_is_one},
                              {1, true},         {qkv, qkv_is_one}};
    cr_assert_eq(n_seen, 6, "%s", what);
    for (int i = 0; i < n_seen; i++) {
        cr_assert(seen[i].count == want[i].count && seen[i].one == want[i].one,
                  "%s: call %d is of %d linears, one product: %d", what, i, seen[i].count,
                  seen[i].one);
    }
}

Test(layer_rows, linears_of_one_x_stand_side_by_side)
{
    const qs_ops joins = ops_of(true), apart = ops_of(false);
    for (int recompute = QS_RECOMPUTE_FULL; recompute <= QS_RECOMPUTE_NONE; recompute++) {
        const qs_hf_config plain = config_of(PLAIN), normed = config_of(NORMED_HEADS);
        const qs_hf_config behind = config_of(NORMS_BEHIND), fused = config_of(FUSED);
        const qs_lora_layout lora = layout_of(&plain, false), dora = layout_of(&plain, true);
        const qs_lora_layout of_fused = layout_of(&fused, false);
        pass(&joins, &plain, &lora, recompute);
        expect("joined", 3, true, 2, true);
        pass(&joins, &plain, NULL, recompute);
        expect("without an adapter", 3, true, 2, true);
        pass(&joins, &normed, &lora, recompute);
        expect("norms of heads", 3, false, 2, true);
        pass(&joins, &behind, &lora, recompute);
        expect("norms behind", 3, false, 2, true);
        pass(&joins, &plain, &dora, recompute);
        expect("DoRA", 3, false, 2, false);
        pass(&joins, &fused, &of_fused, recompute);
        expect("fused", 1, true, 1, true);
        pass(&apart, &plain, &lora, recompute);
        expect("operations that do not join", 3, false, 2, false);
    }
}

/* What the operations are opened for is what the rows are laid out for. */
Test(layer_rows, limits_join_what_stands_side_by_side)
{
    for (kind k = PLAIN; k <= FUSED; k++) {
        const qs_hf_config config = config_of(k);
        for (int i = 0; i < QS_LINEAR_COUNT; i++) {
            const bool qkv = (i == QS_K || i == QS_V) && k == PLAIN;
            const bool gate_up = i == QS_UP && k != FUSED;
            cr_assert_eq(qs_model_joins(&config, false, (qs_linear)i), qkv || gate_up);
            cr_assert_not(qs_model_joins(&config, true, (qs_linear)i));
        }
    }
}
