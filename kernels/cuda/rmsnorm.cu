/* RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467). bf16 in and out, or x, of the residual stream,
 * in fp32; fp32 between, one rounding at the end. core/norm.h says which lane holds what: a row
 * stays in registers between the sum and its use, so that it is read once, and the order of the sum
 * depends on its length alone.
 *
 * Memory-bound. Bytes an element: forward 4, backward 8 (dx is read and written), 2 more with x in
 * fp32; w comes from the caches. Rows of heads (up to 256 columns) share a warp, because a block
 * each would be mostly barriers.
 *
 * Registers (sm_80, 86, 89, 90a, 100, 120; aligned rows; tests/gpu/registers.py), in brackets where
 * x in fp32 differs by more than two: short rows 32-38 forward, 53-62 backward; longer ones with 1,
 * 2, 4 vectors a lane 32-39, 46-48 (46-54), 56-78 (62-76) forward, 48-62, 48-70, 64-116 (94-122)
 * backward, 128 bytes of shared memory. Forward spills 8 bytes with 2 vectors on sm_120 (x in fp32:
 * none) and with 4 on sm_100. Rows past 16,384 columns are held to 64 registers, and spill up to
 * 180 bytes backward, on sm_86, 89 and 90a none (x in fp32: 72 to 168 bytes on all). */
#include "kernels/cuda/core/norm.h"
#include "kernels/cuda/vector.cuh"

namespace
{

/* X: of the residual stream, bf16 or float. */
template <typename X> struct norm_call {
    qs_rows_of<const X> x;
    qs_rows_of<const qs_bf16> dy;
    qs_rows_of<qs_bf16> out;
    const float *w;
    float eps;
    float *rstd;
    const float *rstd_in;
    int64_t rows, cols;
};

/* ---- a lane's part of a row ---- */

/* 8 elements from `column` on, zeros past the row's end. Without VECTORS nothing is known about
 * alignment. */
template <bool VECTORS, typename T>
__device__ __forceinline__ void load_part(float out[QS_VECTOR], const T *row, int64_t column,
                                          int64_t cols)
{
    if (VECTORS && column < cols) {
        qs_load_vector(out, row + column);
        return;
    }
    for (int i = 0; i < QS_VECTOR; i++) {
        out[i] = !VECTORS && column + i < cols ? qs_widen(row[column + i]) : 0.0f;
    }
}

template <bool VECTORS>
__device__ __forceinline__ void store_part(qs_bf16 *row, int64_t column, int64_t cols,
                                           const float in[QS_VECTOR])
{
    if constexpr (VECTORS) {
        if (column < cols) {
            qs_store_vector(row + column, in);
        }
    } else {
        for (int i = 0; i < QS_VECTOR; i++) {
            if (column + i < cols) {
                row[column + i] = qs_bf16_round(in[i]);
            }
        }
    }
}

/* A part that stays in registers: bf16 as it is, which takes half of them and loses nothing. */
template <typename T> struct held_part {
    float value[QS_VECTOR];
};

template <> struct held_part<qs_bf16> {
    uint4 words;
};

template <bool VECTORS>
__device__ __forceinline__ void hold(held_part<float> &held, const float *row, int64_t column,
                                     int64_t cols)
{
    load_part<VECTORS>(held.value, row, column, cols);
}

template <bool VECTORS>
__device__ __forceinline__ void hold(held_part<qs_bf16> &held, const qs_bf16 *row, int64_t column,
                                     int64_t cols)
{
    if constexpr (VECTORS) {
        held.words = column < cols ? qs_load_16(row + column) : make_uint4(0, 0, 0, 0);
    } else {
        float part[QS_VECTOR];
        load_part<false>(part, row, column, cols);
        held.words = qs_pack_bf16(part);
    }
}

__device__ __forceinline__ void take(float out[QS_VECTOR], const held_part<float> &held)
{
    for (int i = 0; i < QS_VECTOR; i++) {
        out[i] = held.value[i];
    }
}

__device__ __forceinline__ void take(float out[QS_VECTOR], const held_part<qs_bf16> &held)
{
    qs_unpack_bf16(out, held.words);
}

/* ---- the sum over a row ---- */

/* LANES neighbouring lanes of a warp. Every lane of the warp calls. */
template <int LANES> __device__ __forceinline__ float sum_of_lanes(float value)
{
    for (int step = LANES / 2; step > 0; step /= 2) {
        value += __shfl_xor_sync(QS_ALL_LANES, value, step);
    }
    return value;
}

/* All threads of the block: its warps in order. Every thread gets the same bits. */
__device__ __forceinline__ float sum_of_block(float value)
{
    __shared__ float of_warp[QS_NORM_THREADS_MAX / QS_WARP];
    value = sum_of_lanes<QS_WARP>(value);
    if (threadIdx.x % QS_WARP == 0) {
        of_warp[threadIdx.x / QS_WARP] = value;
    }
    __syncthreads();
    float sum = 0.0f;
    for (unsigned warp = 0; warp < blockDim.x / QS_WARP; warp++) {
        sum += of_warp[warp];
    }
    __syncthreads(); /* the block's next row writes of_warp again */
    return sum;
}

/* LANES 0: a row a block. */
template <int LANES> __device__ __forceinline__ float sum_of_row(float value)
{
    if constexpr (LANES == 0) {
        return sum_of_block(value);
    } else {
        return sum_of_lanes<LANES>(value);
    }
}

/* ---- one row ---- */

template <int LANES, int VECTORS_HELD, bool VECTORS, typename X>
__device__ __forceinline__ void forward_row(const norm_call<X> &c, int64_t t, int lane, int lanes,
                                            bool there)
{
    const int64_t cols = there ? c.cols : 0;
    const X *x = c.x.data + t * c.x.stride;
    qs_bf16 *y = c.out.data + t * c.out.stride;
    held_part<X> held[VECTORS_HELD];
    float sum = 0.0f;
    for (int k = 0; k < VECTORS_HELD; k++) {
        hold<VECTORS>(held[k], x, qs_norm_column(lanes, lane, k), cols);
        float part[QS_VECTOR];
        take(part, held[k]);
        for (int i = 0; i < QS_VECTOR; i++) {
            sum += part[i] * part[i];
        }
    }
    const float mean = sum_of_row<LANES>(sum) / (float)c.cols;
    const float rstd = 1.0f / sqrtf(mean + c.eps);
    if (there && lane == 0) {
        c.rstd[t] = rstd;
    }
    for (int k = 0; k < VECTORS_HELD; k++) {
        const int64_t column = qs_norm_column(lanes, lane, k);
        float part[QS_VECTOR], w[QS_VECTOR];
        take(part, held[k]);
        load_part<VECTORS>(w, c.w, column, cols);
        for (int i = 0; i < QS_VECTOR; i++) {
            part[i] = part[i] * rstd * w[i];
        }
        store_part<VECTORS>(y, column, cols, part);
    }
}

/* With g = dy * w and x_hat = x * rstd: dx += rstd * (g - x_hat * mean(g * x_hat)). */
template <int LANES, int VECTORS_HELD, bool VECTORS, typename X>
__device__ __forceinline__ void backward_row(const norm_call<X> &c, int64_t t, int lane, int lanes,
                                             bool there)
{
    const int64_t cols = there ? c.cols : 0;
    const X *x = c.x.data + t * c.x.stride;
    const qs_bf16 *dy = c.dy.data + t * c.dy.stride;
    qs_bf16 *dx = c.out.data + t * c.out.stride;
    held_part<X> x_held[VECTORS_HELD];
    held_part<qs_bf16> dy_held[VECTORS_HELD];
    float sum = 0.0f;
    for (int k = 0; k < VECTORS_HELD; k++) {
        const int64_t column = qs_norm_column(lanes, lane, k);
        hold<VECTORS>(x_held[k], x, column, cols);
        hold<VECTORS>(dy_held[k], dy, column, cols);
        float part[QS_VECTOR], grad[QS_VECTOR], w[QS_VECTOR];
        take(part, x_held[k]);
        take(grad, dy_held[k]);
        load_part<VECTORS>(w, c.w, column, cols);
        for (int i = 0; i < QS_VECTOR; i++) {
            sum += grad[i] * w[i] * part[i];
        }
    }
    const float rstd = there ? c.rstd_in[t] : 0.0f;
    const float mean = sum_of_row<LANES>(sum) * rstd / (float)c.cols;
    for (int k = 0; k < VECTORS_HELD; k++) {
        const int64_t column = qs_norm_column(lanes, lane, k);
        float part[QS_VECTOR], grad[QS_VECTOR], w[QS_VECTOR], old[QS_VECTOR];
        take(part, x_held[k]);
        take(grad, dy_held[k]);
        load_part<VECTORS>(w, c.w, column, cols);
        load_part<VECTORS>(old, dx, column, cols);
        for (int i = 0; i < QS_VECTOR; i++) {
            old[i] += rstd * (grad[i] * w[i] - part[i] * rstd * mean);
        }
        store_part<VECTORS>(dx, column, cols, old);
    }
}

/* ---- all rows ---- */

struct forward_op {
    template <int LANES, int VECTORS_HELD, bool VECTORS, typename X>
    __device__ __forceinline__ static void row(const norm_call<X> &c, int64_t t, int lane,
                                               int lanes, bool there)
    {
        forward_row<LANES, VECTORS_HELD, VECTORS>(c, t, lane, lanes, there);
    }
};

struct backward_op {
    template <int LANES, int VECTORS_HELD, bool VECTORS, typename X>
    __device__ __forceinline__ static void row(const norm_call<X> &c, int64_t t, int lane,
                                               int lanes, bool there)
    {
        backward_row<LANES, VECTORS_HELD, VECTORS>(c, t, lane, lanes, there);
    }
};

/* Rows of at most QS_NORM_SHORT columns. All lanes of a warp go around equally often, so that they
 * can exchange; what they do for a row past the last reaches nothing. */
template <typename OP, int LANES, bool VECTORS, typename X>
__global__ void __launch_bounds__(QS_NORM_THREADS) short_rows_kernel(norm_call<X> c)
{
    const int rows_here = QS_NORM_THREADS / LANES;
    const int lane = (int)threadIdx.x % LANES;
    const int64_t step = (int64_t)gridDim.x * rows_here;
    for (int64_t first = (int64_t)blockIdx.x * rows_here; first < c.rows; first += step) {
        const int64_t t = first + (int)threadIdx.x / LANES;
        const bool there = t < c.rows;
        OP::template row<LANES, 1, VECTORS>(c, there ? t : 0, lane, LANES, there);
    }
}

template <typename OP, int VECTORS_HELD, int THREADS, bool VECTORS, typename X>
__global__ void __launch_bounds__(THREADS) rows_kernel(norm_call<X> c)
{
    for (int64_t t = blockIdx.x; t < c.rows; t += gridDim.x) {
        OP::template row<0, VECTORS_HELD, VECTORS>(c, t, (int)threadIdx.x, (int)blockDim.x, true);
    }
}

/* ---- launches ---- */

template <typename OP, int LANES, typename X>
void launch_short(const norm_call<X> &call, bool vectors, cudaStream_t stream)
{
    const unsigned grid = qs_cuda_grid(qs_hd_ceil_div(call.rows, QS_NORM_THREADS / LANES));
    if (vectors) {
        QS_LAUNCH((short_rows_kernel<OP, LANES, true, X>), grid, QS_NORM_THREADS, 0, stream, call);
    } else {
        QS_LAUNCH((short_rows_kernel<OP, LANES, false, X>), grid, QS_NORM_THREADS, 0, stream, call);
    }
}

template <typename OP, int VECTORS_HELD, int THREADS, typename X>
void launch_long(const norm_call<X> &call, int threads, bool vectors, cudaStream_t stream)
{
    const unsigned grid = qs_cuda_grid(call.rows);
    if (vectors) {
        QS_LAUNCH((rows_kernel<OP, VECTORS_HELD, THREADS, true, X>), grid, threads, 0, stream,
                  call);
    } else {
        QS_LAUNCH((rows_kernel<OP, VECTORS_HELD, THREADS, false, X>), grid, threads, 0, stream,
                  call);
    }
}

template <typename OP, typename X>
qs_status launch(qs_queue *q, const norm_call<X> &call, bool vectors, const char *name)
{
    if (call.rows == 0 || call.cols == 0) {
        return QS_OK;
    }
    if (call.cols > QS_NORM_COLS_MAX) {
        return QS_FAIL(QS_ERR_BUG, "%s: rows of %lld columns, the kernel takes up to %d", name,
                       (long long)call.cols, QS_NORM_COLS_MAX);
    }
    const qs_norm_plan plan = qs_norm_plan_make(call.cols);
    const cudaStream_t stream = qs_cuda_stream(q);
    if (call.cols <= QS_NORM_SHORT) {
        switch (plan.lanes) {
        case 8:
            launch_short<OP, 8>(call, vectors, stream);
            break;
        case 16:
            launch_short<OP, 16>(call, vectors, stream);
            break;
        default:
            launch_short<OP, 32>(call, vectors, stream);
        }
    } else if (plan.vectors == 1) {
        launch_long<OP, 1, QS_NORM_THREADS>(call, plan.threads, vectors, stream);
    } else if (plan.vectors == 2) {
        launch_long<OP, 2, QS_NORM_THREADS>(call, plan.threads, vectors, stream);
    } else if (plan.threads <= QS_NORM_THREADS) {
        launch_long<OP, 4, QS_NORM_THREADS>(call, plan.threads, vectors, stream);
    } else if (plan.threads <= 2 * QS_NORM_THREADS) {
        launch_long<OP, 4, 2 * QS_NORM_THREADS>(call, plan.threads, vectors, stream);
    } else {
        launch_long<OP, 4, QS_NORM_THREADS_MAX>(call, plan.threads, vectors, stream);
    }
    return qs_cuda_launched(name);
}

template <typename X>
qs_status forward_of(qs_queue *q, const qs_mat *x, const float *w, float eps, float *rstd,
                     const qs_mat *y)
{
    norm_call<X> call = {};
    call.x = qs_rows<const X>(x);
    call.out = qs_rows<qs_bf16>(y);
    call.w = w;
    call.eps = eps;
    call.rstd = rstd;
    call.rows = x->rows;
    call.cols = x->cols;
    const bool vectors =
        qs_mat_is_vectors(x) && qs_mat_is_vectors(y) && qs_rows_are_vectors(w, 0, x->cols);
    return launch<forward_op>(q, call, vectors, "rmsnorm_forward");
}

template <typename X>
qs_status backward_of(qs_queue *q, const qs_mat *dy, const qs_mat *x, const float *w,
                      const float *rstd, const qs_mat *dx)
{
    norm_call<X> call = {};
    call.x = qs_rows<const X>(x);
    call.dy = qs_rows<const qs_bf16>(dy);
    call.out = qs_rows<qs_bf16>(dx);
    call.w = w;
    call.rstd_in = rstd;
    call.rows = x->rows;
    call.cols = x->cols;
    const bool vectors = qs_mat_is_vectors(x) && qs_mat_is_vectors(dy) && qs_mat_is_vectors(dx) &&
                         qs_rows_are_vectors(w, 0, x->cols);
    return launch<backward_op>(q, call, vectors, "rmsnorm_backward");
}

} // namespace

extern "C" qs_status qs_cuda_rmsnorm_forward(qs_queue *q, const qs_mat *x, const float *w,
                                             float eps, float *rstd, qs_mat *y)
{
    return x->dtype == QS_F32 ? forward_of<float>(q, x, w, eps, rstd, y)
                              : forward_of<qs_bf16>(q, x, w, eps, rstd, y);
}

extern "C" qs_status qs_cuda_rmsnorm_backward(qs_queue *q, const qs_mat *dy, const qs_mat *x,
                                              const float *w, const float *rstd, qs_mat *dx)
{
    return x->dtype == QS_F32 ? backward_of<float>(q, dy, x, w, rstd, dx)
                              : backward_of<qs_bf16>(q, dy, x, w, rstd, dx);
}
