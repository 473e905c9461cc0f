/* The operations of the step. One table per backend; the CPU's `strict` table is complete,
 * threaded, fp32, and the definition of right: its results do not depend on the number of
 * threads, on tile sizes at run time, or on the CPU's vector width. A GPU's table computes with
 * bf16 matrices and fp32 sums, and gives the same bits every time.
 *
 * Matrices are row-major, `stride` elements from row to row, of the backend's `act_dtype` unless
 * said otherwise; they, and every other pointer, are memory of the queue's device. "Stream" is said
 * of matrices of the residual stream, which may be fp32 instead, all those of one call alike.
 * Operations are asynchronous on their queue. One launch sees exactly one micro-batch: T tokens of
 * ragged sequences, cut by cu_seqlens[n_docs + 1] (cu_seqlens[0] = 0, cu_seqlens[n_docs] = T). T
 * may be 0: nothing happens. All pointers are borrowed until the queue has passed.
 *
 * An operation's own scratch is counted as QS_MEM_WORK (scratch_bytes says how much). On the CPU it
 * belongs to the calling thread and grows to the largest call; on a GPU `open` allocates it. */
#ifndef QS_KERNELS_OPS_H
#define QS_KERNELS_OPS_H

#include <stdbool.h>
#include <stdint.h>

#include "base/rng.h"
#include "base/status.h"
#include "device/device.h"
#include "quant/layout.h"

typedef struct {
    void *data;
    int64_t rows, cols, stride;
    qs_dtype dtype;
} qs_mat;

/** The elements of an fp32 matrix: what every matrix of the CPU is. */
static inline float *qs_mat_f32(const qs_mat *mat)
{
    return (float *)mat->data;
}

/** LoRA on one linear: y += s * B (A drop(x)). A [rank, in], B [out, rank], contiguous, of the
 * backend's act_dtype. Hu et al. 2021, arXiv:2106.09685. */
typedef struct {
    const void *a, *b; /* NULL: no adapter on this linear */
    int rank;
    float scale;   /* alpha / r, or alpha / sqrt(r) */
    float dropout; /* 0..1: probability that an element of x is dropped; kept ones are scaled by 1 /
                      (1 - p). Element `row_at[t] * in + feature` of the generator
                      qs_rng_make(seed, step, sample[t], site, layer) decides. */
    uint64_t seed, step;
    uint32_t site, layer;
    const int64_t *sample; /* [T] with dropout: the row's global sample */
    const int64_t *row_at; /* [T] with dropout: the row's number within its sample */
    const float *gain; /* [out] fp32, DoRA (Liu et al. 2024, arXiv:2402.09353): magnitude / norm;
                          NULL: plain LoRA. With it a linear is
                              y = W x + bias + (gain - 1) W drop(x) + gain s B (A drop(x)),
                          which without dropout is gain (W x + s B A x) + bias, as in peft */
    const float *norm; /* [out] with gain: of the rows of W + s B A; no gradient passes it */
} qs_lora;

/** One of several linears that read the same x, with what belongs to it alone: as the arguments of
 * linear_lora_forward and _backward. */
typedef struct {
    const qs_weight *w;
    const float *bias; /* forward */
    qs_lora lora;
    qs_mat xa;
    qs_mat y;    /* backward: dy */
    qs_mat work; /* backward, as are da and db; the linears may share it */
    float *da, *db;
} qs_joined_linear;

/** Geometry of one attention launch. q is [T, n_heads * head_dim], k and v are [T, n_kv_heads *
 * head_dim]. */
typedef struct {
    int n_heads, n_kv_heads, head_dim;
    float scale;
    float cap;  /* 0: none; else scaled scores s become cap tanh(s / cap) before the softmax */
    int window; /* 0: none; else query i sees keys i - window + 1 .. i of its document */
    const int32_t *cu_seqlens; /* [n_docs + 1] in device memory */
    int n_docs;
    int64_t longest; /* tokens of the longest document, or more: the host's bound for the grid */
} qs_attention_shape;

/** Running state of the one-pass head over the rows that carry loss (R rows of the micro-batch).
 * Chunks come in ascending order; the one with token 0 starts the state, so the buffers need no
 * initial values. */
typedef struct {
    int64_t rows, hidden;
    float cap;             /* 0: none; else logits l become cap tanh(l / cap) */
    const void *x;         /* [rows, hidden] final-norm output, act_dtype */
    const int32_t *target; /* [rows] token id */
    float *max, *sum;      /* [rows] running maximum and sum of exp(l - max) */
    float *target_logit;   /* [rows] */
    float *o;        /* [rows, hidden] sum of exp(l - max) W; NULL when only the loss is wanted */
    float *w_target; /* [rows, hidden] W[target]; NULL likewise. With a cap rows of W count here and
                        in o times the slope of their logit, 1 - (l / cap)^2 */
} qs_head_state;

/** How parameters follow gradients (kernels/update_rule.h). */
typedef enum { QS_OPTIM_ADAMW, QS_OPTIM_ADAM, QS_OPTIM_SGD, QS_OPTIM_ADADELTA } qs_optim_kind;

typedef struct {
    qs_optim_kind kind;
    double lr, beta1, beta2, eps, weight_decay;
    double grad_scale;                         /* clip factor */
    double bias_correction1, bias_correction2; /* 1 - beta^t */
} qs_update_args;

/** What gates an MLP: silu(g) = g sigmoid(g), or GELU in its tanh form, g (1 + tanh u) / 2 with u =
 * sqrt(2 / pi) (g + 0.044715 g^3). Hendrycks & Gimpel 2016, arXiv:1606.08415. */
typedef enum { QS_GLU_SILU, QS_GLU_GELU_TANH } qs_glu;

enum { QS_OPS_LINEARS_MAX = 8, QS_OPS_JOINED_MAX = 3 };

/** The largest that the operations will be asked for. */
typedef struct {
    int threads;
    int64_t tokens;    /* of a micro-batch */
    int64_t documents; /* of a micro-batch */
    int64_t loss_rows; /* rows of a micro-batch that carry loss */
    int64_t widest;    /* the longer side of the widest linear */
    int n_heads, n_kv_heads, head_dim;
    int64_t q_norm; /* columns of the norm over q, 0: there is none */
    bool dropout;
    bool dora;
    int lora_rank; /* 0: no adapters */
    int n_linears; /* of a layer, which unit_open makes ready together */
    int64_t out[QS_OPS_LINEARS_MAX], in[QS_OPS_LINEARS_MAX];
    bool joined[QS_OPS_LINEARS_MAX]; /* reads the x of the linear before it, with which it will be
                                        given to linears_lora_*; up to QS_OPS_JOINED_MAX in a row */
    int kept_units; /* units whose decoded weights stay, beside those of the unit at hand */
    int64_t hidden;
    int64_t head_rows; /* of the largest chunk of the vocabulary */
} qs_ops_limits;

typedef struct {
    const char *name;   /* "strict", "bf16", "fp16", "amx", "cuda" */
    qs_dtype act_dtype; /* of activations, of LoRA weights in compute, of what the ops multiply */
    bool joins;         /* linears_lora_* can be one product for all: worth limits.joined, and y's
                           side by side */

    /** Can the operations compute a model of these head_dim, hidden and q_norm (the rest of
     * `limits` is not looked at)? If not, `why` gets one line: the field, its value, what is taken.
     * Needs neither `open` nor a device. */
    bool (*takes)(const qs_ops_limits *limits, char *why, size_t capacity);

    /** Upper bound of the scratch that one calling thread (CPU) or one queue (GPU) keeps. */
    size_t (*scratch_bytes)(const qs_ops_limits *limits);

    /** What `open` allocates beside it for kept_units, QS_MEM_BASE_DECODED; 0 where weights are not
     * decoded ahead of use (CPU), so that none can stay. */
    size_t (*kept_bytes)(const qs_ops_limits *limits);

    /** Allocate what the operations need on `q`, for calls up to `limits`; nothing is allocated
     * afterwards. Once per queue, before the first operation. `close` before the queue goes. */
    qs_status (*open)(qs_queue *q, const qs_ops_limits *limits);
    void (*close)(qs_queue *q);

    /** Columns that a matrix which feeds linear_lora_* should have free behind its own (stride >=
     * cols + border): the operation writes into them. Without them it is slower, and right. */
    int64_t (*border)(int lora_rank);

    /** A gathered layer has arrived: make the `count` linears `w` with their adapters `lora`
     * [count] ready for linear_* until unit_close or the next unit_open. Decoded once, used by
     * every micro-batch of the group. The adapters' weights must not change in between. Linears of
     * a unit that is not open are decoded call by call.
     *
     * `slot`: which of the 1 + kept_units places takes the decoded weights. `decoded`: those of `w`
     * lie there already, since the last call with this slot was for them; then the unit's bytes are
     * not read, and only the adapters are made ready. */
    qs_status (*unit_open)(qs_queue *q, const qs_unit_view *unit, const qs_weight *w,
                           const qs_lora *lora, int count, int slot, bool decoded);
    void (*unit_close)(qs_queue *q);

    /** y = x W^T (+ bias) [T, out] <- [T, in]. bias [out] fp32 or NULL. y may be fp32 (logits). On
     * the CPU W is decoded while it is packed: no dequantized copy of the matrix. */
    qs_status (*linear_forward)(qs_queue *q, const qs_unit_view *unit, const qs_weight *w,
                                const float *bias, const qs_mat *x, qs_mat *y);
    /** dx += dy W if `accumulate`, else dx = dy W. */
    qs_status (*linear_backward)(qs_queue *q, const qs_unit_view *unit, const qs_weight *w,
                                 const qs_mat *dy, qs_mat *dx, bool accumulate);

    /** A linear as a layer has it: y = residual + x W^T + bias + s B (A drop(x)); bias, residual
     * [T, out] and the adapter (lora->a) may be NULL; y may be residual; both stream. Keeps xa for
     * the backward; what lies there is the backend's own affair (a GPU keeps s A x). With
     * lora->gain: DoRA. */
    qs_status (*linear_lora_forward)(qs_queue *q, const qs_unit_view *unit, const qs_weight *w,
                                     const float *bias, const qs_mat *residual, const qs_lora *lora,
                                     const qs_mat *x, qs_mat *xa, qs_mat *y);
    /** Its backward: dx = dy W + s ((dy B) A) * mask / (1 - p), added to dx if `accumulate`; da and
     * db as lora_backward. dx NULL: only the adapter's gradients are wanted. With lora->gain g:
     * dx = dy W + (((g - 1) dy) W + s (((g dy) B) A)) * mask / (1 - p), da and db from g dy. */
    qs_status (*linear_lora_backward)(qs_queue *q, const qs_unit_view *unit, const qs_weight *w,
                                      const qs_lora *lora, const qs_mat *x, const qs_mat *xa,
                                      const qs_mat *dy, qs_mat *work, float *da, float *db,
                                      qs_mat *dx, bool accumulate);

    /** The same of `count` linears of one unit that read the same x: linear_lora_forward of each,
     * without a residual; linear_lora_backward of each, where dx, which may be NULL, is the sum for
     * all. Where the operations join, the unit is open, limits.joined has the linears, their y's
     * (dy's) are neighbouring columns of the rows of one matrix, and these and x have a border for
     * each adapter behind them (`count` times border()), that is one product each way, and dx is
     * rounded once; else they come one by one. */
    qs_status (*linears_lora_forward)(qs_queue *q, const qs_unit_view *unit,
                                      const qs_joined_linear *linears, int count, const qs_mat *x);
    qs_status (*linears_lora_backward)(qs_queue *q, const qs_unit_view *unit,
                                       const qs_joined_linear *linears, int count, const qs_mat *x,
                                       qs_mat *dx, bool accumulate);

    /** DoRA: norm[i] of row i of W + s B A, of W alone without an adapter (lora->a NULL), and, with
     * `magnitude` [out], gain[i] = magnitude[i] / norm[i]; 0 where the row is zero. All fp32. */
    qs_status (*dora_norms)(qs_queue *q, const qs_unit_view *unit, const qs_weight *w,
                            const qs_lora *lora, const float *magnitude, float *norm, float *gain);
    /** DoRA: gradient of the magnitudes [out], overwritten: dm[i] = sum over t of dy[t, i] times
     * (W drop(x) + s B xa)[t, i], over norm[i]; 0 where the norm is. xa: of linear_lora_forward. */
    qs_status (*dora_backward)(qs_queue *q, const qs_unit_view *unit, const qs_weight *w,
                               const qs_lora *lora, const qs_mat *x, const qs_mat *xa,
                               const qs_mat *dy, float *dm);

    /** y += s B (A drop(x)); keeps xa = A drop(x) [T, rank] for the backward (linear_lora_forward's
     * xa is not for this backward, nor this one's for linear_lora_backward). */
    qs_status (*lora_forward)(qs_queue *q, const qs_lora *lora, const qs_mat *x, qs_mat *xa,
                              qs_mat *y);
    /** da [rank, in] = s (dy B)^T drop(x); db [out, rank] = s dy^T xa; dx += s ((dy B) A) * mask /
     * (1 - p), unless dx is NULL. da and db are fp32 and overwritten. `work` [T, rank] scratch. */
    qs_status (*lora_backward)(qs_queue *q, const qs_lora *lora, const qs_mat *x, const qs_mat *xa,
                               const qs_mat *dy, qs_mat *work, float *da, float *db, qs_mat *dx);

    /** y = x * rstd * w, rstd[t] = 1 / sqrt(mean(x^2) + eps); x stream. Zhang & Sennrich 2019,
     * arXiv:1910.07467. */
    qs_status (*rmsnorm_forward)(qs_queue *q, const qs_mat *x, const float *w, float eps,
                                 float *rstd, qs_mat *y);
    /** dx += gradient of the norm's input (w is frozen); x stream. */
    qs_status (*rmsnorm_backward)(qs_queue *q, const qs_mat *dy, const qs_mat *x, const float *w,
                                  const float *rstd, qs_mat *dx);

    /** Rotate the first `rotary_dim` elements of each head of q or k in place, rotate-half
     * convention; `cos`, `sin` [max_position, rotary_dim / 2]; `position` [T]; `inverse` turns
     * backwards (the gradient). Su et al. 2021, arXiv:2104.09864. */
    qs_status (*rope)(qs_queue *q, qs_mat *x, int n_heads, int head_dim, int rotary_dim,
                      const float *cos, const float *sin, const int32_t *position, bool inverse);

    /** Causal attention within each document; o [T, n_heads * head_dim], lse [n_heads, T] natural
     * log. No T x T matrix. Dao 2023, arXiv:2307.08691. */
    qs_status (*attention_forward)(qs_queue *q, const qs_attention_shape *shape, const qs_mat *qm,
                                   const qs_mat *km, const qs_mat *vm, qs_mat *o, float *lse);
    /** dq, dk, dv are overwritten. `delta` [n_heads, T] scratch. */
    qs_status (*attention_backward)(qs_queue *q, const qs_attention_shape *shape, const qs_mat *qm,
                                    const qs_mat *km, const qs_mat *vm, const qs_mat *o,
                                    const float *lse, const qs_mat *d_o, float *delta, qs_mat *dq,
                                    qs_mat *dk, qs_mat *dv);

    /** act = glu(gate) * up [T, ffn]. Shazeer 2020, arXiv:2002.05202. */
    qs_status (*glu_forward)(qs_queue *q, qs_glu glu, const qs_mat *gate, const qs_mat *up,
                             qs_mat *act);
    /** dgate and dup from dact; dgate or dup may alias dact, or they gate and up. */
    qs_status (*glu_backward)(qs_queue *q, qs_glu glu, const qs_mat *gate, const qs_mat *up,
                              const qs_mat *dact, qs_mat *dgate, qs_mat *dup);

    /** y = a + b, element by element; y may be either; a and y stream. */
    qs_status (*add)(qs_queue *q, const qs_mat *a, const qs_mat *b, qs_mat *y);
    /** y *= by, element by element; stream. */
    qs_status (*scale)(qs_queue *q, float by, qs_mat *y);

    /** y[i] = x[index[i]], row by row; x of any of fp32, bf16, fp16 is converted to y's type. */
    qs_status (*gather_rows)(qs_queue *q, const qs_mat *x, const int32_t *index, qs_mat *y);
    /** y[index[i]] = x[i], every other row of y becomes zero. Indices ascend and differ. */
    qs_status (*scatter_rows)(qs_queue *q, const qs_mat *x, const int32_t *index, qs_mat *y);
    /** out[i] = the row_bytes bytes at base + at[i], for i < count. `base` may be pinned host
     * memory.
     */
    qs_status (*copy_rows)(qs_queue *q, const uint8_t *base, const int64_t *at, int64_t count,
                           size_t row_bytes, uint8_t *out);
    /** dst [count] of act_dtype = src, rounded to nearest even. */
    qs_status (*convert)(qs_queue *q, const float *src, int64_t count, void *dst);

    /** Take one vocabulary chunk [w->out rows, hidden], first row = token id `row0`, into the
     * running state (online softmax: Milakov & Gimelshein 2018, arXiv:1805.02867). */
    qs_status (*head_chunk)(qs_queue *q, const qs_unit_view *unit, const qs_weight *w, int64_t row0,
                            qs_head_state *state);
    /** loss[r] = max + log(sum) - target_logit; and, when o is kept, dx = (o / sum - w_target) *
     * scale [rows, hidden], act_dtype; dx may lie where x lay. */
    qs_status (*head_finish)(qs_queue *q, qs_head_state *state, float scale, float *loss, void *dx);

    /** out[c] = sum over elements 4096 c .. 4096 c + 4095 of x^2 in fp64, in element order. */
    qs_status (*square_sums)(qs_queue *q, const float *x, int64_t chunks, double *out);

    /** x += y for `count` elements: an addition of the slot tree. */
    qs_status (*accumulate)(qs_queue *q, float *x, const float *y, int64_t count);

    /** One update of `count` elements with the gradient `grad`, by the rule of args->kind, as
     * torch.optim computes it. m and v are the rule's two moments. */
    qs_status (*update)(qs_queue *q, const qs_update_args *args, int64_t count, const float *grad,
                        float *master, float *m, float *v);

    /** First level of NF4: `count` elements of `dtype` (fp32, bf16 or fp16) that start on a block
     * to packed [(count + 1) / 2] and absmax [ceil(count / 64)]; *zero_blocks [1] is their number
     * of all-zero blocks. The bytes of qs_nf4_quantize_blocks. Needs no `open`, nor does the second
     * level. */
    qs_status (*nf4_quantize_blocks)(qs_queue *q, const void *x, qs_dtype dtype, int64_t count,
                                     uint8_t *packed, float *absmax, int64_t *zero_blocks);
    /** Second level, the bytes of qs_nf4_quantize_absmax. */
    qs_status (*nf4_quantize_absmax)(qs_queue *q, const float *absmax, int64_t n_blocks,
                                     float offset, uint8_t *absmax8, float *absmax32);
} qs_ops;

/** The CPU's reference table. */
const qs_ops *qs_ops_cpu(void);

/** The same with the products of linears and attention in bf16 (qs_gemm_bf16). The same bits on
 * every CPU, other bits than qs_ops_cpu's. */
const qs_ops *qs_ops_cpu_bf16(void);

/** Whether they take about half the time of qs_ops_cpu's here: by the CPU's features. */
bool qs_ops_cpu_bf16_is_faster(void);

/** Likewise with those of NF4 matrices in fp16 (kernels/cpu/gemm_fp16.h). */
const qs_ops *qs_ops_cpu_fp16(void);

/** Whether they are multiplied by AVX512-FP16 here; elsewhere they take ten times as long as
 * strict's. */
bool qs_ops_cpu_fp16_is_faster(void);

/** Likewise in bf16 tiles (kernels/cpu/gemm_amx.h). */
const qs_ops *qs_ops_cpu_amx(void);

/** Whether they are multiplied by AMX here, which takes a third of strict's time; elsewhere it is
 * two to three times as much. */
bool qs_ops_cpu_amx_is_faster(void);

#endif
