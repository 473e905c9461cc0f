/* The optimizer's passes over this rank's LoRA shard: the operations of kernels/cpu/optim.c and
 * kernels/cpu/elementwise.c in the same order. There is no contraction, and division and square
 * root round as IEEE says, so that the bits are the CPU's.
 *
 * Memory-bound. Bytes an element: square_sums 4, accumulate 12, update 28. On cards with few fp64
 * units (sm_86, 89, 120) square_sums also asks them for a conversion, a product and a sum an
 * element.
 *
 * Registers (sm_80, 86, 89, 90a, 100, 120): square_sums 57-91 and 4,224 bytes of shared memory;
 * by 8 elements accumulate 26-28; on sm_90a adamw 47, adam 50, sgd 38, adadelta 51. No spills
 * there. square_sums is bound by latency: 4,096 additions in a row, whatever the size. */
#include <math.h>

#include "kernels/cuda/vector.cuh"
#include "kernels/update_rule.h"

namespace
{

/* ---- sums of squares ---- */

/* A chunk is one chain of additions in element order: a lane a chunk. So that a warp reads whole
 * lines nevertheless, it carries a slice of 32 elements of its 32 chunks through shared memory; the
 * next slice is on its way to registers while this one is added up.
 *
 *            element 0 .. 31 of the slice
 *   chunk 0  |  read by the warp at once: lane = element
 *   chunk 1  |
 *     ..        added up by column: lane = chunk; rows 33 words apart hit 32 banks either way */
enum { CHUNK = 4096, SLICE = QS_WARP };

__device__ __forceinline__ void load_slice(float out[SLICE], const float *x, int64_t chunks_here,
                                           int slice)
{
    for (int c = 0; c < SLICE; c++) {
        out[c] = c < chunks_here ? x[(int64_t)c * CHUNK + slice * SLICE + (int)threadIdx.x] : 0.0f;
    }
}

__global__ void __launch_bounds__(QS_WARP)
    square_sums_kernel(const float *x, int64_t chunks, double *out)
{
    __shared__ float staged[SLICE][SLICE + 1];
    const int64_t first = (int64_t)blockIdx.x * QS_WARP;
    const int64_t here = qs_hd_min(QS_WARP, chunks - first);
    const int lane = (int)threadIdx.x;
    float next[SLICE];
    double sum = 0.0;
    load_slice(next, x + first * CHUNK, here, 0);
    for (int slice = 0; slice < CHUNK / SLICE; slice++) {
        for (int c = 0; c < SLICE; c++) {
            staged[c][lane] = next[c];
        }
        __syncwarp();
        if (slice + 1 < CHUNK / SLICE) {
            load_slice(next, x + first * CHUNK, here, slice + 1);
        }
        for (int i = 0; i < SLICE; i++) {
            const double value = (double)staged[lane][i];
            sum += value * value;
        }
        __syncwarp(); /* everybody has read before the next slice is staged */
    }
    if (lane < here) {
        out[first + lane] = sum;
    }
}

/* ---- element by element ---- */

struct accumulate_op {
    float *x;
    const float *y;

    template <int WIDTH> __device__ __forceinline__ void at(int64_t i) const
    {
        float a[WIDTH], b[WIDTH];
        qs_load<WIDTH>(a, x + i);
        qs_load<WIDTH>(b, y + i);
        for (int k = 0; k < WIDTH; k++) {
            a[k] += b[k];
        }
        qs_store<WIDTH>(x + i, a);
    }
};

/* One rule of kernels/update_rule.h, which the CPU's loop shares. */
template <qs_optim_kind KIND> struct update_op {
    const float *grad;
    float *master, *m, *v;
    qs_update_rule rule;

    __device__ __forceinline__ void one(float g, float *w, float *m1, float *v1) const
    {
        if constexpr (KIND == QS_OPTIM_ADAMW) {
            qs_update_adamw(&rule, g, w, m1, v1);
        } else if constexpr (KIND == QS_OPTIM_ADAM) {
            qs_update_adam(&rule, g, w, m1, v1);
        } else if constexpr (KIND == QS_OPTIM_SGD) {
            qs_update_sgd(&rule, g, w, m1, v1);
        } else {
            qs_update_adadelta(&rule, g, w, m1, v1);
        }
    }

    template <int WIDTH> __device__ __forceinline__ void at(int64_t i) const
    {
        float g[WIDTH], w[WIDTH], m1[WIDTH], v1[WIDTH];
        qs_load<WIDTH>(g, grad + i);
        qs_load<WIDTH>(w, master + i);
        qs_load<WIDTH>(m1, m + i);
        qs_load<WIDTH>(v1, v + i);
        for (int k = 0; k < WIDTH; k++) {
            one(g[k], &w[k], &m1[k], &v1[k]);
        }
        qs_store<WIDTH>(master + i, w);
        qs_store<WIDTH>(m + i, m1);
        qs_store<WIDTH>(v + i, v1);
    }
};

template <qs_optim_kind KIND>
qs_status update(qs_queue *q, const qs_update_rule &rule, int64_t count, const float *grad,
                 float *master, float *m, float *v)
{
    const update_op<KIND> op = {grad, master, m, v, rule};
    const uintptr_t all = (uintptr_t)grad | (uintptr_t)master | (uintptr_t)m | (uintptr_t)v;
    return qs_launch_flat(q, op, count, all % 16 == 0, "update");
}

} // namespace

extern "C" qs_status qs_cuda_square_sums(qs_queue *q, const float *x, int64_t chunks, double *out)
{
    if (chunks == 0) {
        return QS_OK;
    }
    const unsigned grid = (unsigned)qs_hd_ceil_div(chunks, QS_WARP);
    QS_LAUNCH(square_sums_kernel, grid, QS_WARP, 0, qs_cuda_stream(q), x, chunks, out);
    return qs_cuda_launched("square_sums");
}

extern "C" qs_status qs_cuda_accumulate(qs_queue *q, float *x, const float *y, int64_t count)
{
    const accumulate_op op = {x, y};
    return qs_launch_flat(q, op, count, ((uintptr_t)x | (uintptr_t)y) % 16 == 0, "accumulate");
}

extern "C" qs_status qs_cuda_update(qs_queue *q, const qs_update_args *args, int64_t count,
                                    const float *grad, float *master, float *m, float *v)
{
    const qs_update_rule rule =
        qs_update_rule_make(args->lr, args->beta1, args->beta2, args->eps, args->weight_decay,
                            args->grad_scale, args->bias_correction1, args->bias_correction2);
    switch (args->kind) {
    case QS_OPTIM_ADAMW:
        return update<QS_OPTIM_ADAMW>(q, rule, count, grad, master, m, v);
    case QS_OPTIM_ADAM:
        return update<QS_OPTIM_ADAM>(q, rule, count, grad, master, m, v);
    case QS_OPTIM_SGD:
        return update<QS_OPTIM_SGD>(q, rule, count, grad, master, m, v);
    case QS_OPTIM_ADADELTA:
        return update<QS_OPTIM_ADADELTA>(q, rule, count, grad, master, m, v);
    }
    return QS_FAIL(QS_ERR_BUG, "optimizer %d is not known", (int)args->kind);
}
