/* The head and its loss in one pass over the vocabulary (kernels/cpu/head.c is the twin), without
 * its R x V logits: attention of X over keys = values = W with an online softmax (Milakov &
 * Gimelshein 2018, arXiv:1805.02867). A chunk W [out, hidden] is taken in slices of 4,096 rows:
 *
 *     l = X W^T          product, fp32 out
 *     p = exp(l - m')    slice_kernel, a block a row: m' = max(m, max l), sum = sum f + sum p with
 *                        f = exp(m - m'), O = O f, the target's logit and row of W on the way
 *     O = O + p W        product, bf16 p, fp32 O
 *
 * With a cap l = cap tanh(X W^T / cap) in slice_kernel, and what multiplies W is p times the slope
 * 1 - (l / cap)^2; a kernel of its own, so that others lose nothing. W[target] counts times its
 * slope rounded to bf16, so that a confident row, with p = 1, still has none of it left.
 *
 * Rounding. The sum adds the fp32 p, so that the loss knows nothing of bf16. What multiplies W is p
 * rounded to bf16, as every product here has bf16 factors: 2^-9 relative to nearest even, which is
 * unbiased, and the largest p of a row, exp(0) = 1, is exact, so that a confident row keeps its
 * gradient p - 1. The softmax in dX then sums to 1 within 2^-9 (less, as errors average), below
 * what rounding dX itself to bf16 costs per element.
 *
 * Bound: compute. 4 R V h FLOPs. Beside them per row and token: logits 4 B written and read, p 2 B
 * written and read (12 B), W read by both products (4 h B a token), O read and written once a slice
 * (8 h / 4096 B per row and token). slice_kernel alone is memory-bound: 6 B an element; O's rescale
 * costs 8 h B a row and only where the maximum rose, about ln(V / 4096) times over a vocabulary in
 * random order. With R = 8,192, h = 4,096, V = 128,256: 17.2 TFLOP and 23 GB, of which
 * slice_kernel's 6.3 GB are not hidden behind a product.
 *
 * Slices of 4,096: long enough that O's traffic is about a tenth of the products' time, short
 * enough that logits and p of 8,192 rows take 192 MiB.
 *
 * Registers (sm_80, 86, 89, 90a, 100 / 120): slice_kernel 60 / 62 with 64 B of shared memory, so
 * that four blocks of 256 share a multiprocessor, each thread with 64 B of loads under way (with a
 * cap three, 74-78 registers);
 * finish_kernel 31-32. No spills. */
#include "kernels/cuda/cuda_impl.cuh"

#include "kernels/cuda/core/head_slices.h"

static_assert(QS_HEAD_GROUPS * QS_HEAD_THREADS * QS_HEAD_QUAD == QS_HEAD_SLICE, "a row is a block");

enum { WARPS = QS_HEAD_THREADS / QS_WARP, HELD = QS_HEAD_GROUPS * QS_HEAD_QUAD, OCTET = 8 };

typedef struct {
    const float *logits;    /* [rows, QS_HEAD_SLICE] */
    qs_bf16 *probabilities; /* the same */
    const qs_bf16 *matrix;  /* [count, hidden], the slice's rows of W */
    int64_t stride;         /* of the matrix */
    int64_t hidden, token, count;
    float cap;
    const int32_t *target;
    float *max, *sum, *target_logit;
    float *o, *w_target; /* NULL: only the loss */
    bool first;          /* token 0: the state starts */
    bool wide;           /* rows of W, o and w_target can be moved in vectors of eight elements */
} slice_args;

/* One value of every warp to one of the block, the same bits in every thread: `parts` in order. */
__device__ __forceinline__ float block_max(float value, float parts[WARPS])
{
    value = qs_warp_max(value);
    if (threadIdx.x % QS_WARP == 0) {
        parts[threadIdx.x / QS_WARP] = value;
    }
    __syncthreads();
    value = parts[0];
    for (int w = 1; w < WARPS; w++) {
        value = fmaxf(value, parts[w]);
    }
    return value;
}

__device__ __forceinline__ float block_sum(float value, float parts[WARPS])
{
    value = qs_warp_sum(value);
    if (threadIdx.x % QS_WARP == 0) {
        parts[threadIdx.x / QS_WARP] = value;
    }
    __syncthreads();
    value = parts[0];
    for (int w = 1; w < WARPS; w++) {
        value += parts[w];
    }
    return value;
}

template <bool CAP> __device__ __forceinline__ float capped(float logit, float cap)
{
    return CAP ? cap * tanhf(logit / cap) : logit;
}

/* Of a capped logit. */
template <bool CAP> __device__ __forceinline__ float slope(float logit, float cap)
{
    const float tanh = CAP ? logit / cap : 0.0f;
    return 1.0f - tanh * tanh;
}

/* This thread's logits; what lies behind the slice's width counts as -infinity. */
template <bool CAP>
__device__ __forceinline__ float load_row(const float *logits, int count, float cap,
                                          float held[HELD])
{
    float most = -INFINITY;
#pragma unroll
    for (int g = 0; g < QS_HEAD_GROUPS; g++) {
        const int at = qs_head_element((int)threadIdx.x, g);
        float4 quad = make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
        if (at < count) {
            quad = *(const float4 *)(logits + at);
        }
        held[4 * g] = at < count ? capped<CAP>(quad.x, cap) : -INFINITY;
        held[4 * g + 1] = at + 1 < count ? capped<CAP>(quad.y, cap) : -INFINITY;
        held[4 * g + 2] = at + 2 < count ? capped<CAP>(quad.z, cap) : -INFINITY;
        held[4 * g + 3] = at + 3 < count ? capped<CAP>(quad.w, cap) : -INFINITY;
#pragma unroll
        for (int e = 0; e < QS_HEAD_QUAD; e++) {
            most = fmaxf(most, held[4 * g + e]); /* a NaN is passed over here and met in the sum */
        }
    }
    return most;
}

/* exp(l - most) in place; the sum of this thread's. */
__device__ __forceinline__ float exponentials(float held[HELD], float most)
{
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        held[i] = expf(held[i] - most);
        sum += held[i];
    }
    return sum;
}

__device__ __forceinline__ void store_row(const float held[HELD], int count, qs_bf16 *probabilities)
{
#pragma unroll
    for (int g = 0; g < QS_HEAD_GROUPS; g++) {
        const int at = qs_head_element((int)threadIdx.x, g);
        if (at < count) { /* zeros behind the width */
            *(uint2 *)(probabilities + at) =
                make_uint2(qs_bf16_pair(held[4 * g], held[4 * g + 1]),
                           qs_bf16_pair(held[4 * g + 2], held[4 * g + 3]));
        }
    }
}

__device__ __forceinline__ void scale_row(float *o, int64_t hidden, float factor, bool wide)
{
    if (wide) {
        float4 *quads = (float4 *)o;
        for (int64_t i = threadIdx.x; i < hidden / QS_HEAD_QUAD; i += QS_HEAD_THREADS) {
            const float4 v = quads[i];
            quads[i] = make_float4(v.x * factor, v.y * factor, v.z * factor, v.w * factor);
        }
        return;
    }
    for (int64_t i = threadIdx.x; i < hidden; i += QS_HEAD_THREADS) {
        o[i] *= factor;
    }
}

/* The two bf16 of a word as floats. */
__device__ __forceinline__ float2 unpack(uint32_t word)
{
    return make_float2(qs_hd_bits_float(word << 16), qs_hd_bits_float(word & 0xffff0000u));
}

template <bool CAP>
__device__ __forceinline__ void copy_row(const qs_bf16 *from, float *to, int64_t hidden, bool wide,
                                         float by)
{
    if (wide) {
        for (int64_t i = threadIdx.x; i < hidden / OCTET; i += QS_HEAD_THREADS) {
            const uint4 v = ((const uint4 *)from)[i];
            const float2 a = unpack(v.x), b = unpack(v.y), c = unpack(v.z), d = unpack(v.w);
            float4 low = make_float4(a.x, a.y, b.x, b.y), high = make_float4(c.x, c.y, d.x, d.y);
            if (CAP) {
                low = make_float4(low.x * by, low.y * by, low.z * by, low.w * by);
                high = make_float4(high.x * by, high.y * by, high.z * by, high.w * by);
            }
            ((float4 *)to)[2 * i] = low;
            ((float4 *)to)[2 * i + 1] = high;
        }
        return;
    }
    for (int64_t i = threadIdx.x; i < hidden; i += QS_HEAD_THREADS) {
        to[i] = CAP ? qs_bf16_to_f32(from[i]) * by : qs_bf16_to_f32(from[i]);
    }
}

template <bool CAP>
__global__ void __launch_bounds__(QS_HEAD_THREADS, CAP ? 3 : 4) slice_kernel(const slice_args s)
{
    __shared__ float max_parts[WARPS], sum_parts[WARPS];
    const int64_t row = blockIdx.x;
    const int count = (int)s.count;
    const float *logits = s.logits + row * QS_HEAD_SLICE;
    const float before = s.first ? -INFINITY : s.max[row];
    const int64_t place = qs_head_place(s.target[row], s.token, s.count);

    float held[HELD], slopes[CAP ? HELD : 1];
    const float most =
        fmaxf(before, block_max(load_row<CAP>(logits, count, s.cap, held), max_parts));
    if constexpr (CAP) {
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            slopes[i] = slope<CAP>(held[i], s.cap);
        }
    }
    const float sum = block_sum(exponentials(held, most), sum_parts);
    const float factor = s.first ? 0.0f : expf(before - most); /* exp(0) is 1, exactly */
    if (threadIdx.x == 0) { /* everybody has read the old maximum: two barriers ago */
        s.max[row] = most;
        s.sum[row] = s.first ? sum : s.sum[row] * factor + sum;
        if (place >= 0) {
            s.target_logit[row] = capped<CAP>(logits[place], s.cap);
        } else if (s.first) {
            s.target_logit[row] = 0.0f;
        }
    }
    if constexpr (CAP) {
#pragma unroll
        for (int i = 0; i < HELD; i++) { /* behind the width 0 stays 0, whatever its slope */
            held[i] = held[i] > 0.0f ? held[i] * slopes[i] : held[i];
        }
    }
    if (s.o != NULL) {
        store_row(held, count, s.probabilities + row * QS_HEAD_SLICE);
        if (!s.first && factor != 1.0f) {
            scale_row(s.o + row * s.hidden, s.hidden, factor, s.wide);
        }
    }
    if (s.w_target != NULL && place >= 0) {
        const float by =
            qs_bf16_to_f32(qs_bf16_round(slope<CAP>(capped<CAP>(logits[place], s.cap), s.cap)));
        copy_row<CAP>(s.matrix + place * s.stride, s.w_target + row * s.hidden, s.hidden, s.wide,
                      by);
    }
}

/* ---- a chunk, on the host ---- */

static bool is_aligned(const void *pointer)
{
    return (uintptr_t)pointer % 16 == 0; /* NULL is */
}

static qs_status slice_logits(qs_queue *q, const qs_head_state *state, const slice_args *s)
{
    qs_gemm_call call = {};
    call.m = state->rows;
    call.n = s->count;
    call.k = state->hidden;
    call.alpha = 1.0f;
    call.a = state->x;
    call.a_stride = state->hidden;
    call.b = s->matrix;
    call.b_stride = s->stride;
    call.b_transposed = true;
    call.c = (void *)s->logits;
    call.c_stride = QS_HEAD_SLICE;
    call.c_dtype = QS_F32;
    return qs_cuda_gemm(q, &call);
}

/* The first product overwrites: O needs no zeros. */
static qs_status add_values(qs_queue *q, const qs_head_state *state, const slice_args *s)
{
    qs_gemm_call call = {};
    call.m = state->rows;
    call.n = state->hidden;
    call.k = s->count;
    call.alpha = 1.0f;
    call.a = s->probabilities;
    call.a_stride = QS_HEAD_SLICE;
    call.b = s->matrix;
    call.b_stride = s->stride;
    call.c0 = s->first ? NULL : state->o;
    call.c0_stride = state->hidden;
    call.c = state->o;
    call.c_stride = state->hidden;
    call.c_dtype = QS_F32;
    return qs_cuda_gemm(q, &call);
}

static qs_status check_limits(const qs_cuda_context *context, const qs_weight *w,
                              const qs_head_state *state)
{
    if (state->rows > context->limits.loss_rows || w->in != state->hidden) {
        return QS_FAIL(QS_ERR_BUG,
                       "the head has %lld rows of %lld, W %lld, and open allowed %lld rows",
                       (long long)state->rows, (long long)state->hidden, (long long)w->in,
                       (long long)context->limits.loss_rows);
    }
    return QS_OK;
}

static qs_status take_slice(qs_queue *q, const qs_head_state *state, const slice_args *s)
{
    QS_TRY(slice_logits(q, state, s));
    if (s->cap > 0.0f) {
        QS_LAUNCH(slice_kernel<true>, (unsigned)state->rows, QS_HEAD_THREADS, 0, qs_cuda_stream(q),
                  *s);
    } else {
        QS_LAUNCH(slice_kernel<false>, (unsigned)state->rows, QS_HEAD_THREADS, 0, qs_cuda_stream(q),
                  *s);
    }
    QS_TRY(qs_cuda_launched("head_chunk"));
    return state->o != NULL ? add_values(q, state, s) : QS_OK;
}

extern "C" qs_status qs_cuda_head_chunk(qs_queue *q, const qs_unit_view *unit, const qs_weight *w,
                                        int64_t row0, qs_head_state *state)
{
    qs_cuda_context *context = qs_cuda_context_of(q);
    if (context == NULL) {
        return QS_ERR_BUG;
    }
    if (state->rows == 0) {
        return QS_OK;
    }
    QS_TRY(check_limits(context, w, state));
    const void *matrix = NULL;
    slice_args s = {};
    QS_TRY(qs_cuda_weight_matrix(q, unit, w, &matrix, &s.stride));
    s.logits = context->logits;
    s.probabilities = (qs_bf16 *)context->probabilities;
    s.hidden = state->hidden;
    s.cap = state->cap;
    s.target = state->target;
    s.max = state->max;
    s.sum = state->sum;
    s.target_logit = state->target_logit;
    s.o = state->o;
    s.w_target = state->w_target;
    s.wide = state->hidden % OCTET == 0 && s.stride % OCTET == 0 && is_aligned(matrix) &&
             is_aligned(state->o) && is_aligned(state->w_target);
    for (int64_t i = 0; i < qs_head_slice_count(w->out); i++) {
        const qs_head_slice slice = qs_head_slice_at(w->out, i);
        s.matrix = (const qs_bf16 *)matrix + slice.first * s.stride;
        s.token = row0 + slice.first;
        s.count = slice.count;
        s.first = s.token == 0;
        QS_TRY(take_slice(q, state, &s));
    }
    return QS_OK;
}

/* ---- the end ---- */

typedef struct {
    const float *max, *sum, *target_logit;
    const float *o, *w_target;
    qs_bf16 *dx; /* NULL: only the loss */
    float *loss;
    int64_t hidden;
    float scale;
    bool wide;
} finish_args;

__device__ __forceinline__ float gradient(float o, float inverse, float w, float scale)
{
    return (o * inverse - w) * scale;
}

__device__ __forceinline__ uint32_t gradient_pair(float2 o, float inverse, float2 w, float scale)
{
    return qs_bf16_pair(gradient(o.x, inverse, w.x, scale), gradient(o.y, inverse, w.y, scale));
}

__device__ __forceinline__ void finish_wide(const float *o, const float *w, qs_bf16 *dx,
                                            int64_t hidden, float inverse, float scale)
{
    for (int64_t i = threadIdx.x; i < hidden / OCTET; i += QS_HEAD_THREADS) {
        const float4 o0 = ((const float4 *)o)[2 * i], o1 = ((const float4 *)o)[2 * i + 1];
        const float4 w0 = ((const float4 *)w)[2 * i], w1 = ((const float4 *)w)[2 * i + 1];
        ((uint4 *)dx)[i] = make_uint4(
            gradient_pair(make_float2(o0.x, o0.y), inverse, make_float2(w0.x, w0.y), scale),
            gradient_pair(make_float2(o0.z, o0.w), inverse, make_float2(w0.z, w0.w), scale),
            gradient_pair(make_float2(o1.x, o1.y), inverse, make_float2(w1.x, w1.y), scale),
            gradient_pair(make_float2(o1.z, o1.w), inverse, make_float2(w1.z, w1.w), scale));
    }
}

/* A block a row: 8 h B read, 2 h B written. The logarithm is in fp64 as the CPU's, once a row. */
__global__ void __launch_bounds__(QS_HEAD_THREADS) finish_kernel(const finish_args f)
{
    const int64_t row = blockIdx.x;
    if (threadIdx.x == 0) {
        const double log_sum = (double)f.max[row] + log((double)f.sum[row]);
        f.loss[row] = (float)(log_sum - (double)f.target_logit[row]);
    }
    if (f.dx == NULL) {
        return;
    }
    const float *o = f.o + row * f.hidden, *w = f.w_target + row * f.hidden;
    qs_bf16 *dx = f.dx + row * f.hidden;
    const float inverse = 1.0f / f.sum[row];
    if (f.wide) {
        finish_wide(o, w, dx, f.hidden, inverse, f.scale);
        return;
    }
    for (int64_t i = threadIdx.x; i < f.hidden; i += QS_HEAD_THREADS) {
        dx[i] = qs_bf16_round(gradient(o[i], inverse, w[i], f.scale));
    }
}

extern "C" qs_status qs_cuda_head_finish(qs_queue *q, qs_head_state *state, float scale,
                                         float *loss, void *dx)
{
    if (state->rows == 0) {
        return QS_OK;
    }
    finish_args f = {};
    f.max = state->max;
    f.sum = state->sum;
    f.target_logit = state->target_logit;
    f.o = state->o;
    f.w_target = state->w_target;
    f.dx = state->o != NULL ? (qs_bf16 *)dx : NULL;
    f.loss = loss;
    f.hidden = state->hidden;
    f.scale = scale;
    f.wide = state->hidden % OCTET == 0 && is_aligned(state->o) && is_aligned(state->w_target) &&
             is_aligned(dx);
    QS_LAUNCH(finish_kernel, (unsigned)state->rows, QS_HEAD_THREADS, 0, qs_cuda_stream(q), f);
    return qs_cuda_launched("head_finish");
}
