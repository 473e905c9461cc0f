/* The functions behind qs_ops_cuda(), one file per group, and what those files share on the host
 * side. C and C++; no CUDA header. */
#ifndef QS_KERNELS_CUDA_OPS_CUDA_H
#define QS_KERNELS_CUDA_OPS_CUDA_H

#include "device/device_impl.h"
#include "kernels/cuda/core/dora.h"
#include "kernels/cuda/core/head_slices.h"
#include "kernels/ops.h"

/* ---- what an opened queue carries (context.c) ---- */

/** A linear of the opened unit, decoded into the bordered scratch (core/border.h). */
typedef struct {
    qs_weight_kind kind;
    int64_t quantum; /* where it lies in its unit, among those of its kind */
    int64_t out, in;
    int64_t stride; /* in + border, rounded up to 128 bytes */
    void *matrix;   /* bf16 [out, in] of a bordered matrix, which is that of the linears that it is
                       joined with, too: */
    int place, joined; /* which of them it is, and how many there are, with it */
    int64_t border;    /* columns (and rows) of the adapters in that matrix, */
    int64_t at;        /* the first one of this linear's, */
    int rank;          /* and the rank; 0: none of its own */
} qs_cuda_linear;

/** Pieces of one allocation, made by open and used by one group of operations each. */
typedef struct {
    qs_ops_limits limits;
    void *block;         /* everything below but `kept` */
    void *decoded;       /* the opened unit, if it lies in slot 0 */
    void *kept;          /* slots 1 to limits.kept_units */
    void *single;        /* bf16: one weight outside of an opened unit, or a chunk of the head */
    float *logits;       /* [loss_rows, QS_HEAD_SLICE] */
    void *probabilities; /* bf16 [loss_rows, QS_HEAD_SLICE] */
    void *lora;          /* bf16 [tokens, widest] with dropout, else nothing */
    void *lora_sum;      /* fp32 [adapters, in]: gradients of the A's of joined linears */
    void *dora;          /* with DoRA a block of tokens (core/dora.h), else nothing */
    void *gemm_workspace;
    size_t single_bytes, lora_bytes, lora_sum_bytes, gemm_workspace_bytes;
    const uint8_t *open_base; /* of the opened unit, NULL: none */
    qs_cuda_linear linears[QS_OPS_LINEARS_MAX];
    int n_linears;
    void *gemm; /* handle, plans (gemm_lt.c) */
} qs_cuda_context;

/** The context of an opened queue; NULL (with QS_ERR_BUG recorded) if it is not open. */
qs_cuda_context *qs_cuda_context_of(qs_queue *q);

size_t qs_cuda_scratch_bytes(const qs_ops_limits *limits);
qs_status qs_cuda_open(qs_queue *q, const qs_ops_limits *limits);
void qs_cuda_close(qs_queue *q);

/* ---- what needs no device (sizes.c): in the plugin and in the program ---- */

/** Bytes of a slot. */
size_t qs_cuda_decoded_bytes(const qs_ops_limits *limits);

/** What context->dora is cut into. */
qs_dora_scratch qs_cuda_dora_pieces(const qs_ops_limits *limits);

/** What the context's scratch is cut into: the member of the same name. */
typedef enum {
    QS_PIECE_DECODED,
    QS_PIECE_SINGLE,
    QS_PIECE_LOGITS,
    QS_PIECE_PROBABILITIES,
    QS_PIECE_LORA,
    QS_PIECE_LORA_SUM,
    QS_PIECE_DORA,
    QS_PIECE_GEMM_WORKSPACE,
    QS_PIECE_COUNT
} qs_cuda_piece;

/** All of them, one behind the other. */
typedef struct {
    size_t bytes[QS_PIECE_COUNT];
    size_t at[QS_PIECE_COUNT];
    size_t total;
} qs_cuda_pieces;
qs_cuda_pieces qs_cuda_pieces_of(const qs_ops_limits *limits, size_t gemm_workspace_bytes);

/** cuBLASLt's workspace: large enough for what split-K keeps of an adapter's gradients, where k is
 * the tokens. */
enum { QS_CUDA_GEMM_WORKSPACE_BYTES = 64 << 20 };

/** Bytes of all slots but 0. */
size_t qs_cuda_kept_bytes(const qs_ops_limits *limits);

/** How many linears from number i on are one matrix. */
int qs_cuda_joined(const qs_ops_limits *limits, int i);

bool qs_cuda_takes(const qs_ops_limits *limits, char *why, size_t capacity);
int64_t qs_cuda_border(int lora_rank);

/** The table of the CUDA operations with name, act_dtype, joins, takes, scratch_bytes, kept_bytes
 * and border alone: for planning where there is no plugin. Everything else in it is NULL. */
const qs_ops *qs_ops_cuda_sizes(void);

/* ---- matrix products (gemm_lt.c: cuBLASLt) ---- */

/** C[m, n] = alpha op(A)[m, k] op(B)[k, n] + C0, all row-major. A and B are bf16; a transposed one
 * lies as [k, m] or [n, k]. Sums are fp32. A bf16 C is rounded once; with C0 the product may have
 * been rounded before C0 was added: whether it was depends on the kernel that cuBLASLt picks for
 * the shape. */
typedef struct {
    int64_t m, n, k;
    float alpha;
    const void *a, *b;
    int64_t a_stride, b_stride;
    bool a_transposed, b_transposed;
    const void *c0; /* NULL: nothing is added; of c's type; may be c */
    int64_t c0_stride;
    void *c;
    int64_t c_stride;
    qs_dtype c_dtype; /* QS_BF16 or QS_F32; sums are fp32 either way */
} qs_gemm_call;

/** The algorithm of a shape is chosen once, by a rule that gives the same one in every run on the
 * same card and library, and is listed in the debug log. m, n or k of 0: c = c0, or zeros.
 * QSHARD_CUDA_ALGORITHM=K passes over the first K that the rule could take: for measurements. */
qs_status qs_cuda_gemm(qs_queue *q, const qs_gemm_call *call);
qs_status qs_cuda_gemm_open(qs_queue *q, qs_cuda_context *context);
void qs_cuda_gemm_close(qs_cuda_context *context);
size_t qs_cuda_gemm_workspace_bytes(void);
/** Name and version of the library behind it. */
void qs_cuda_gemm_version(char *out, size_t capacity);

/* ---- weights (unit.cu) ---- */

/** A weight as a bf16 matrix [out, in]: the opened unit's, the stored bytes themselves where they
 * lie in one piece, or decoded into context->single (valid until the next such call). */
qs_status qs_cuda_weight_matrix(qs_queue *q, const qs_unit_view *unit, const qs_weight *w,
                                const void **matrix, int64_t *stride);

/** The opened linear for `w`, or NULL. */
const qs_cuda_linear *qs_cuda_opened(const qs_cuda_context *context, const qs_unit_view *unit,
                                     const qs_weight *w);

/* ---- the operations ---- */

qs_status qs_cuda_unit_open(qs_queue *q, const qs_unit_view *unit, const qs_weight *w,
                            const qs_lora *lora, int count, int slot, bool decoded);
void qs_cuda_unit_close(qs_queue *q);
qs_status qs_cuda_linear_forward(qs_queue *q, const qs_unit_view *unit, const qs_weight *w,
                                 const float *bias, const qs_mat *x, qs_mat *y);
qs_status qs_cuda_linear_backward(qs_queue *q, const qs_unit_view *unit, const qs_weight *w,
                                  const qs_mat *dy, qs_mat *dx, bool accumulate);
qs_status qs_cuda_linear_lora_forward(qs_queue *q, const qs_unit_view *unit, const qs_weight *w,
                                      const float *bias, const qs_mat *residual,
                                      const qs_lora *lora, const qs_mat *x, qs_mat *xa, qs_mat *y);
qs_status qs_cuda_linear_lora_backward(qs_queue *q, const qs_unit_view *unit, const qs_weight *w,
                                       const qs_lora *lora, const qs_mat *x, const qs_mat *xa,
                                       const qs_mat *dy, qs_mat *work, float *da, float *db,
                                       qs_mat *dx, bool accumulate);
qs_status qs_cuda_linears_lora_forward(qs_queue *q, const qs_unit_view *unit,
                                       const qs_joined_linear *linears, int count, const qs_mat *x);
qs_status qs_cuda_linears_lora_backward(qs_queue *q, const qs_unit_view *unit,
                                        const qs_joined_linear *linears, int count, const qs_mat *x,
                                        qs_mat *dx, bool accumulate);
qs_status qs_cuda_dora_norms(qs_queue *q, const qs_unit_view *unit, const qs_weight *w,
                             const qs_lora *lora, const float *magnitude, float *norm, float *gain);
qs_status qs_cuda_dora_backward(qs_queue *q, const qs_unit_view *unit, const qs_weight *w,
                                const qs_lora *lora, const qs_mat *x, const qs_mat *xa,
                                const qs_mat *dy, float *dm);
qs_status qs_cuda_lora_forward(qs_queue *q, const qs_lora *lora, const qs_mat *x, qs_mat *xa,
                               qs_mat *y);
qs_status qs_cuda_lora_backward(qs_queue *q, const qs_lora *lora, const qs_mat *x, const qs_mat *xa,
                                const qs_mat *dy, qs_mat *work, float *da, float *db, qs_mat *dx);
qs_status qs_cuda_rmsnorm_forward(qs_queue *q, const qs_mat *x, const float *w, float eps,
                                  float *rstd, qs_mat *y);
qs_status qs_cuda_rmsnorm_backward(qs_queue *q, const qs_mat *dy, const qs_mat *x, const float *w,
                                   const float *rstd, qs_mat *dx);
qs_status qs_cuda_rope(qs_queue *q, qs_mat *x, int n_heads, int head_dim, int rotary_dim,
                       const float *cos, const float *sin, const int32_t *position, bool inverse);
qs_status qs_cuda_attention_forward(qs_queue *q, const qs_attention_shape *shape, const qs_mat *qm,
                                    const qs_mat *km, const qs_mat *vm, qs_mat *o, float *lse);
qs_status qs_cuda_attention_backward(qs_queue *q, const qs_attention_shape *shape, const qs_mat *qm,
                                     const qs_mat *km, const qs_mat *vm, const qs_mat *o,
                                     const float *lse, const qs_mat *d_o, float *delta, qs_mat *dq,
                                     qs_mat *dk, qs_mat *dv);
qs_status qs_cuda_glu_forward(qs_queue *q, qs_glu glu, const qs_mat *gate, const qs_mat *up,
                              qs_mat *act);
qs_status qs_cuda_glu_backward(qs_queue *q, qs_glu glu, const qs_mat *gate, const qs_mat *up,
                               const qs_mat *dact, qs_mat *dgate, qs_mat *dup);
qs_status qs_cuda_add(qs_queue *q, const qs_mat *a, const qs_mat *b, qs_mat *y);
qs_status qs_cuda_scale(qs_queue *q, float by, qs_mat *y);
qs_status qs_cuda_gather_rows(qs_queue *q, const qs_mat *x, const int32_t *index, qs_mat *y);
qs_status qs_cuda_scatter_rows(qs_queue *q, const qs_mat *x, const int32_t *index, qs_mat *y);
qs_status qs_cuda_copy_rows(qs_queue *q, const uint8_t *base, const int64_t *at, int64_t count,
                            size_t row_bytes, uint8_t *out);
qs_status qs_cuda_convert(qs_queue *q, const float *src, int64_t count, void *dst);
qs_status qs_cuda_head_chunk(qs_queue *q, const qs_unit_view *unit, const qs_weight *w,
                             int64_t row0, qs_head_state *state);
qs_status qs_cuda_head_finish(qs_queue *q, qs_head_state *state, float scale, float *loss,
                              void *dx);
qs_status qs_cuda_square_sums(qs_queue *q, const float *x, int64_t chunks, double *out);
qs_status qs_cuda_accumulate(qs_queue *q, float *x, const float *y, int64_t count);
qs_status qs_cuda_update(qs_queue *q, const qs_update_args *args, int64_t count, const float *grad,
                         float *master, float *m, float *v);
qs_status qs_cuda_nf4_quantize_blocks(qs_queue *q, const void *x, qs_dtype dtype, int64_t count,
                                      uint8_t *packed, float *absmax, int64_t *zero_blocks);
qs_status qs_cuda_nf4_quantize_absmax(qs_queue *q, const float *absmax, int64_t n_blocks,
                                      float offset, uint8_t *absmax8, float *absmax32);

/** The table; what the plugin hands out. */
const qs_ops *qs_ops_cuda(void);

#endif
