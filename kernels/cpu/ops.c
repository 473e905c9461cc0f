#include "kernels/ops.h"

#include "base/minmax.h"
#include "kernels/cpu/attention_impl.h"
#include "kernels/cpu/gemm_amx.h"
#include "kernels/cpu/gemm_fp16.h"
#include "kernels/cpu/half.h"
#include "kernels/cpu/ops_impl.h"
#include "kernels/cpu/tile.h"

/* The users of scratch.h, each at its largest. */
static size_t scratch_bytes(const qs_ops_limits *l)
{
    /* The head multiplies slices of the vocabulary, which may be wider than the linears of a small
     * model. */
    int64_t slice = qs_head_scratch_count(1);
    int64_t packs =
        qs_max_i64(qs_gemm_scratch_count(l->threads, l->tokens, l->widest),
                   qs_gemm_scratch_count(l->threads, l->loss_rows, qs_max_i64(l->widest, slice)));
    int64_t floats =
        packs + qs_head_scratch_count(l->loss_rows) +
        qs_attention_scratch_count(l->threads, l->tokens, l->documents, l->n_kv_heads, l->head_dim);
    if (l->dropout) {
        floats += qs_lora_scratch_count(l->tokens, l->widest);
    }
    if (l->dora) {
        floats += qs_dora_scratch_count(l->tokens, l->widest);
    }
    return (size_t)floats * sizeof(float);
}

/* Products of other kinds share their packing space with the strict ones. */
static size_t fp16_scratch_bytes(const qs_ops_limits *l)
{
    return scratch_bytes(l) + (size_t)qs_gemm_fp16_scratch_count(l->threads) * sizeof(float);
}

static size_t amx_scratch_bytes(const qs_ops_limits *l)
{
    const int64_t longest = l->tokens > l->widest ? l->tokens : l->widest;
    return scratch_bytes(l) +
           (size_t)qs_gemm_amx_scratch_count(l->threads, longest) * sizeof(float);
}

static bool takes(const qs_ops_limits *limits, char *why, size_t capacity)
{
    (void)limits;
    (void)why;
    (void)capacity;
    return true;
}

/* Scratch grows by itself, decoded matrices do not exist: nothing to prepare. */
static qs_status open_queue(qs_queue *q, const qs_ops_limits *limits)
{
    (void)q;
    (void)limits;
    return QS_OK;
}

static void close_queue(qs_queue *q)
{
    (void)q;
}

static int64_t border(int lora_rank)
{
    (void)lora_rank;
    return 0;
}

static size_t kept_bytes(const qs_ops_limits *limits)
{
    (void)limits;
    return 0;
}

static qs_status unit_open(qs_queue *q, const qs_unit_view *unit, const qs_weight *w,
                           const qs_lora *lora, int count, int slot, bool decoded)
{
    (void)q;
    (void)unit;
    (void)w;
    (void)lora;
    (void)count;
    (void)slot;
    (void)decoded;
    return QS_OK;
}

/* What the tables have in common. */
#define COMMON                                                                                     \
    .act_dtype = QS_F32, .takes = takes, .open = open_queue, .close = close_queue,                 \
    .border = border, .kept_bytes = kept_bytes, .unit_open = unit_open, .unit_close = close_queue, \
    .dora_norms = qs_cpu_dora_norms, .dora_backward = qs_cpu_dora_backward,                        \
    .lora_forward = qs_cpu_lora_forward, .lora_backward = qs_cpu_lora_backward,                    \
    .rmsnorm_forward = qs_cpu_rmsnorm_forward, .rmsnorm_backward = qs_cpu_rmsnorm_backward,        \
    .rope = qs_cpu_rope, .glu_forward = qs_cpu_glu_forward, .glu_backward = qs_cpu_glu_backward,   \
    .add = qs_cpu_add, .scale = qs_cpu_scale, .gather_rows = qs_cpu_gather_rows,                   \
    .scatter_rows = qs_cpu_scatter_rows, .copy_rows = qs_cpu_copy_rows,                            \
    .head_chunk = qs_cpu_head_chunk, .convert = qs_cpu_convert, .head_finish = qs_cpu_head_finish, \
    .square_sums = qs_cpu_square_sums, .accumulate = qs_cpu_accumulate, .update = qs_cpu_update,   \
    .nf4_quantize_blocks = qs_cpu_nf4_quantize_blocks,                                             \
    .nf4_quantize_absmax = qs_cpu_nf4_quantize_absmax

/* A table: the operations with a frozen matrix filled in with their kind of products, and those
 * that are the same in all. */
#define TABLE(prefix, products, scratch)                                                           \
    static qs_status prefix##_linear_forward(qs_queue *q, const qs_unit_view *unit,                \
                                             const qs_weight *w, const float *bias,                \
                                             const qs_mat *x, qs_mat *y)                           \
    {                                                                                              \
        return qs_linear_forward_by(q, products, unit, w, bias, x, y);                             \
    }                                                                                              \
    static qs_status prefix##_linear_backward(qs_queue *q, const qs_unit_view *unit,               \
                                              const qs_weight *w, const qs_mat *dy, qs_mat *dx,    \
                                              bool accumulate)                                     \
    {                                                                                              \
        return qs_linear_backward_by(q, products, unit, w, dy, dx, accumulate);                    \
    }                                                                                              \
    static qs_status prefix##_linear_lora_forward(                                                 \
        qs_queue *q, const qs_unit_view *unit, const qs_weight *w, const float *bias,              \
        const qs_mat *residual, const qs_lora *lora, const qs_mat *x, qs_mat *xa, qs_mat *y)       \
    {                                                                                              \
        return qs_linear_lora_forward_by(q, products, unit, w, bias, residual, lora, x, xa, y);    \
    }                                                                                              \
    static qs_status prefix##_linear_lora_backward(                                                \
        qs_queue *q, const qs_unit_view *unit, const qs_weight *w, const qs_lora *lora,            \
        const qs_mat *x, const qs_mat *xa, const qs_mat *dy, qs_mat *work, float *da, float *db,   \
        qs_mat *dx, bool accumulate)                                                               \
    {                                                                                              \
        return qs_linear_lora_backward_by(q, products, unit, w, lora, x, xa, dy, work, da, db, dx, \
                                          accumulate);                                             \
    }                                                                                              \
    static qs_status prefix##_linears_lora_forward(qs_queue *q, const qs_unit_view *unit,          \
                                                   const qs_joined_linear *linears, int count,     \
                                                   const qs_mat *x)                                \
    {                                                                                              \
        return qs_linears_lora_forward_by(q, products, unit, linears, count, x);                   \
    }                                                                                              \
    static qs_status prefix##_linears_lora_backward(qs_queue *q, const qs_unit_view *unit,         \
                                                    const qs_joined_linear *linears, int count,    \
                                                    const qs_mat *x, qs_mat *dx, bool accumulate)  \
    {                                                                                              \
        return qs_linears_lora_backward_by(q, products, unit, linears, count, x, dx, accumulate);  \
    }                                                                                              \
    static qs_status prefix##_attention_forward(qs_queue *q, const qs_attention_shape *shape,      \
                                                const qs_mat *qm, const qs_mat *km,                \
                                                const qs_mat *vm, qs_mat *o, float *lse)           \
    {                                                                                              \
        return qs_attention_forward_by(q, products, shape, qm, km, vm, o, lse);                    \
    }                                                                                              \
    static qs_status prefix##_attention_backward(                                                  \
        qs_queue *q, const qs_attention_shape *shape, const qs_mat *qm, const qs_mat *km,          \
        const qs_mat *vm, const qs_mat *o, const float *lse, const qs_mat *d_o, float *delta,      \
        qs_mat *dq, qs_mat *dk, qs_mat *dv)                                                        \
    {                                                                                              \
        return qs_attention_backward_by(q, products, shape, qm, km, vm, o, lse, d_o, delta, dq,    \
                                        dk, dv);                                                   \
    }                                                                                              \
    static const qs_ops prefix##_table = {                                                         \
        .name = #prefix,                                                                           \
        .scratch_bytes = scratch,                                                                  \
        .linear_forward = prefix##_linear_forward,                                                 \
        .linear_backward = prefix##_linear_backward,                                               \
        .linear_lora_forward = prefix##_linear_lora_forward,                                       \
        .linear_lora_backward = prefix##_linear_lora_backward,                                     \
        .linears_lora_forward = prefix##_linears_lora_forward,                                     \
        .linears_lora_backward = prefix##_linears_lora_backward,                                   \
        .attention_forward = prefix##_attention_forward,                                           \
        .attention_backward = prefix##_attention_backward,                                         \
        COMMON,                                                                                    \
    }

TABLE(strict, QS_PRODUCTS_STRICT, scratch_bytes);
TABLE(fp16, QS_PRODUCTS_FP16, fp16_scratch_bytes);
TABLE(amx, QS_PRODUCTS_AMX, amx_scratch_bytes);
TABLE(bf16, QS_PRODUCTS_BF16, scratch_bytes);

const qs_ops *qs_ops_cpu(void)
{
    return &strict_table;
}

const qs_ops *qs_ops_cpu_fp16(void)
{
    return &fp16_table;
}

bool qs_ops_cpu_fp16_is_faster(void)
{
    return qs_half_supported() && qs_half_get() == qs_half_avx512();
}

const qs_ops *qs_ops_cpu_amx(void)
{
    return &amx_table;
}

bool qs_ops_cpu_amx_is_faster(void)
{
    return qs_tile_supported() && qs_tile_get() == qs_tile_amx();
}

const qs_ops *qs_ops_cpu_bf16(void)
{
    return &bf16_table;
}

bool qs_ops_cpu_bf16_is_faster(void)
{
    return qs_pairs_are_faster();
}
