/* The functions behind qs_ops_cpu(), one file per group, and what those files share. */
#ifndef QS_KERNELS_CPU_OPS_IMPL_H
#define QS_KERNELS_CPU_OPS_IMPL_H

#include "kernels/cpu/gemm.h"
#include "kernels/ops.h"

/** A weight, from row `row0` on, as an operand of qs_gemm: decoded while it is packed. Borrowed by
 * the operand. */
typedef struct {
    const qs_unit_view *view;
    const qs_weight *weight;
    const qs_isa *isa;
    int64_t row0;
} qs_weight_source;

qs_operand qs_weight_operand(const qs_weight_source *source, bool transposed);

/** How a frozen matrix is multiplied. */
typedef enum {
    QS_PRODUCTS_STRICT, /* qs_gemm */
    QS_PRODUCTS_FP16,   /* qs_gemm_fp16 where it takes the matrix, else qs_gemm */
    QS_PRODUCTS_AMX,    /* qs_gemm_amx for NF4, else qs_gemm */
    QS_PRODUCTS_BF16,   /* qs_gemm_bf16; attention's products likewise */
} qs_products;

/** to (+)= left W^T if `transposed`, else left W; `left` has `rows` rows and is not transposed. */
qs_status qs_frozen_product(qs_queue *q, qs_products products, const qs_unit_view *unit,
                            const qs_weight *w, bool transposed, int64_t rows,
                            const qs_operand *left, qs_mat *to, bool accumulate);

/** qs_weight_decode at full speed: the same bits. */
void qs_weight_decode_fast(const qs_isa *isa, const qs_unit_view *view, const qs_weight *w,
                           int64_t first, int64_t count, float *out);

/** The same as words of pairs.h, of an NF4 weight; `first` and `count` are even. */
void qs_weight_decode_pairs(const qs_pairs *pairs, const qs_unit_view *view, const qs_weight *w,
                            int64_t first, int64_t count, uint32_t *out);

/** Rows [row0, row0 + rows) of a matrix, and the adapter of a call as seen from row `row0` on. */
static inline qs_mat qs_mat_rows(const qs_mat *mat, int64_t row0, int64_t rows)
{
    qs_mat part = *mat;
    part.data = qs_mat_f32(mat) + row0 * mat->stride;
    part.rows = rows;
    return part;
}

static inline qs_lora qs_lora_rows(const qs_lora *lora, int64_t row0)
{
    qs_lora part = *lora;
    if (lora->dropout > 0.0F) {
        part.sample += row0;
        part.row_at += row0;
    }
    return part;
}

/** drop(x) as an operand: x itself without dropout. Both are borrowed by the operand. */
typedef struct {
    const qs_lora *lora;
    const qs_mat *x;
} qs_dropped;

qs_operand qs_dropped_operand(const qs_dropped *dropped);

/** A matrix with its columns times (gain - minus) as an operand: itself with gain NULL. */
typedef struct {
    const qs_mat *mat;
    const float *gain; /* [cols] or NULL */
    float minus;
} qs_gained;

qs_operand qs_gained_operand(const qs_gained *gained);

/** xa = A drop(x). */
qs_status qs_lora_project(qs_queue *q, const qs_lora *lora, const qs_mat *x, qs_mat *xa);

/** lora_backward; with lora->gain what belongs to the adapter of linear_lora_backward, for which
 * `frozen` is the weight beside it. */
qs_status qs_lora_backward_beside(qs_queue *q, const qs_weight_source *frozen, const qs_lora *lora,
                                  const qs_mat *x, const qs_mat *xa, const qs_mat *dy, qs_mat *work,
                                  float *da, float *db, qs_mat *dx);

/** y = W x + bias + (gain - 1) W drop(x) + gain s B (A drop(x)); keeps xa. */
qs_status qs_dora_forward(qs_queue *q, qs_products products, const qs_unit_view *unit,
                          const qs_weight *w, const float *bias, const qs_lora *lora,
                          const qs_mat *x, qs_mat *xa, qs_mat *y);

/** Floats that lora_backward with dropout, DoRA, and the head keep at most. */
int64_t qs_lora_scratch_count(int64_t tokens, int64_t widest);
int64_t qs_dora_scratch_count(int64_t tokens, int64_t widest);
int64_t qs_head_scratch_count(int64_t loss_rows);

/** Operations that differ between tables, by their `products`. */
qs_status qs_linear_forward_by(qs_queue *q, qs_products products, const qs_unit_view *unit,
                               const qs_weight *w, const float *bias, const qs_mat *x, qs_mat *y);
qs_status qs_linear_backward_by(qs_queue *q, qs_products products, const qs_unit_view *unit,
                                const qs_weight *w, const qs_mat *dy, qs_mat *dx, bool accumulate);
qs_status qs_linear_lora_forward_by(qs_queue *q, qs_products products, const qs_unit_view *unit,
                                    const qs_weight *w, const float *bias, const qs_mat *residual,
                                    const qs_lora *lora, const qs_mat *x, qs_mat *xa, qs_mat *y);
qs_status qs_linear_lora_backward_by(qs_queue *q, qs_products products, const qs_unit_view *unit,
                                     const qs_weight *w, const qs_lora *lora, const qs_mat *x,
                                     const qs_mat *xa, const qs_mat *dy, qs_mat *work, float *da,
                                     float *db, qs_mat *dx, bool accumulate);
qs_status qs_linears_lora_forward_by(qs_queue *q, qs_products products, const qs_unit_view *unit,
                                     const qs_joined_linear *linears, int count, const qs_mat *x);
qs_status qs_linears_lora_backward_by(qs_queue *q, qs_products products, const qs_unit_view *unit,
                                      const qs_joined_linear *linears, int count, const qs_mat *x,
                                      qs_mat *dx, bool accumulate);
qs_status qs_attention_forward_by(qs_queue *q, qs_products products,
                                  const qs_attention_shape *shape, const qs_mat *qm,
                                  const qs_mat *km, const qs_mat *vm, qs_mat *o, float *lse);
qs_status qs_attention_backward_by(qs_queue *q, qs_products products,
                                   const qs_attention_shape *shape, const qs_mat *qm,
                                   const qs_mat *km, const qs_mat *vm, const qs_mat *o,
                                   const float *lse, const qs_mat *d_o, float *delta, qs_mat *dq,
                                   qs_mat *dk, qs_mat *dv);
qs_status qs_cpu_dora_norms(qs_queue *q, const qs_unit_view *unit, const qs_weight *w,
                            const qs_lora *lora, const float *magnitude, float *norm, float *gain);
qs_status qs_cpu_dora_backward(qs_queue *q, const qs_unit_view *unit, const qs_weight *w,
                               const qs_lora *lora, const qs_mat *x, const qs_mat *xa,
                               const qs_mat *dy, float *dm);
qs_status qs_cpu_lora_forward(qs_queue *q, const qs_lora *lora, const qs_mat *x, qs_mat *xa,
                              qs_mat *y);
qs_status qs_cpu_lora_backward(qs_queue *q, const qs_lora *lora, const qs_mat *x, const qs_mat *xa,
                               const qs_mat *dy, qs_mat *work, float *da, float *db, qs_mat *dx);
qs_status qs_cpu_rmsnorm_forward(qs_queue *q, const qs_mat *x, const float *w, float eps,
                                 float *rstd, qs_mat *y);
qs_status qs_cpu_rmsnorm_backward(qs_queue *q, const qs_mat *dy, const qs_mat *x, const float *w,
                                  const float *rstd, qs_mat *dx);
qs_status qs_cpu_rope(qs_queue *q, qs_mat *x, int n_heads, int head_dim, int rotary_dim,
                      const float *cos, const float *sin, const int32_t *position, bool inverse);
qs_status qs_cpu_glu_forward(qs_queue *q, qs_glu glu, const qs_mat *gate, const qs_mat *up,
                             qs_mat *act);
qs_status qs_cpu_glu_backward(qs_queue *q, qs_glu glu, const qs_mat *gate, const qs_mat *up,
                              const qs_mat *dact, qs_mat *dgate, qs_mat *dup);
qs_status qs_cpu_add(qs_queue *q, const qs_mat *a, const qs_mat *b, qs_mat *y);
qs_status qs_cpu_scale(qs_queue *q, float by, qs_mat *y);
qs_status qs_cpu_gather_rows(qs_queue *q, const qs_mat *x, const int32_t *index, qs_mat *y);
qs_status qs_cpu_scatter_rows(qs_queue *q, const qs_mat *x, const int32_t *index, qs_mat *y);
qs_status qs_cpu_copy_rows(qs_queue *q, const uint8_t *base, const int64_t *at, int64_t count,
                           size_t row_bytes, uint8_t *out);
qs_status qs_cpu_convert(qs_queue *q, const float *src, int64_t count, void *dst);
qs_status qs_cpu_head_chunk(qs_queue *q, const qs_unit_view *unit, const qs_weight *w, int64_t row0,
                            qs_head_state *state);
qs_status qs_cpu_head_finish(qs_queue *q, qs_head_state *state, float scale, float *loss, void *dx);
qs_status qs_cpu_square_sums(qs_queue *q, const float *x, int64_t chunks, double *out);
qs_status qs_cpu_accumulate(qs_queue *q, float *x, const float *y, int64_t count);
qs_status qs_cpu_update(qs_queue *q, const qs_update_args *args, int64_t count, const float *grad,
                        float *master, float *m, float *v);
qs_status qs_cpu_nf4_quantize_blocks(qs_queue *q, const void *x, qs_dtype dtype, int64_t count,
                                     uint8_t *packed, float *absmax, int64_t *zero_blocks);
qs_status qs_cpu_nf4_quantize_absmax(qs_queue *q, const float *absmax, int64_t n_blocks,
                                     float offset, uint8_t *absmax8, float *absmax32);

#endif
