/* What the two forward kernels of attention share: masks and the online softmax, on sums in
 * registers as attention.cuh lays them out. */
#ifndef QS_KERNELS_CUDA_ATTENTION_FORWARD_CUH
#define QS_KERNELS_CUDA_ATTENTION_FORWARD_CUH

#include "kernels/cuda/attention.cuh"

typedef struct {
    qs_attention_launch launch;
    qs_head_rows q, k, v, o;
    float *lse; /* [n_heads, rows] */
} qs_forward_args;

/** Pairs that are not visible get minus infinity. */
template <int MT, int NT>
__device__ __forceinline__ void qs_hide(float (&scores)[MT][NT][4], const int *bounds, int row,
                                        int key)
{
    qs_mask(scores, -INFINITY,
            [&](int at, int col) { return qs_attention_within(bounds[at], row + at, key + col); });
}

/** The largest score of each row, of the four threads that share it. */
template <int NT>
__device__ __forceinline__ float qs_row_max(const float (&scores)[NT][4], int half)
{
    float most = -INFINITY;
#pragma unroll
    for (int n = 0; n < NT; n++) {
        most = fmaxf(most, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
    }
    most = fmaxf(most, __shfl_xor_sync(QS_ALL_LANES, most, 1));
    return fmaxf(most, __shfl_xor_sync(QS_ALL_LANES, most, 2));
}

/** Scores to weights relative to the new maximum; what was summed before is to be scaled `by`,
 * which is 1 where the maximum stays. `sum` is this thread's share. A row that has seen no key yet
 * has maximum minus infinity and stays empty. */
template <int MT, int NT>
__device__ __forceinline__ void qs_softmax_step(float (&scores)[MT][NT][4], float (&max)[MT][2],
                                                float (&sum)[MT][2], float (&by)[MT][2],
                                                float scale)
{
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float most = fmaxf(max[m][half], qs_row_max(scores[m], half));
            const float shift = most == -INFINITY ? 0.0f : most * scale;
            by[m][half] = most == max[m][half] ? 1.0f : qs_exp2(fmaf(max[m][half], scale, -shift));
            max[m][half] = most;
            float added = 0.0f;
#pragma unroll
            for (int n = 0; n < NT; n++) {
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; i++) {
                    scores[m][n][i] = qs_exp2(fmaf(scores[m][n][i], scale, -shift));
                    added += scores[m][n][i];
                }
            }
            sum[m][half] = fmaf(sum[m][half], by[m][half], added);
        }
    }
}

/** Is any row of the warp to be scaled? */
template <int MT> __device__ __forceinline__ bool qs_any_moved(const float (&by)[MT][2])
{
    bool moved = false;
#pragma unroll
    for (int m = 0; m < MT; m++) {
        moved = moved || by[m][0] != 1.0f || by[m][1] != 1.0f;
    }
    return __any_sync(QS_ALL_LANES, moved);
}

/** Each row times its factor. */
template <int MT, int NT>
__device__ __forceinline__ void qs_scale_rows(float (&out)[MT][NT][4], const float (&by)[MT][2])
{
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int n = 0; n < NT; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                out[m][n][i] *= by[m][i / 2];
            }
        }
    }
}

/** Sums over the four threads of a row; lse; and the factor of the output. */
template <bool CAP, int MT>
__device__ __forceinline__ void qs_finish_rows(const float (&max)[MT][2], float (&sum)[MT][2],
                                               float *lse, int row, const qs_attention_launch &l)
{
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float total = sum[m][half];
            total += __shfl_xor_sync(QS_ALL_LANES, total, 1);
            total += __shfl_xor_sync(QS_ALL_LANES, total, 2);
            const int query = row + qs_thread_row(m, half);
            if (query < l.rows && threadIdx.x % 4 == 0) {
                lse[query] = fmaf(max[m][half], qs_softmax_scale<CAP>(l), logf(total));
            }
            sum[m][half] = 1.0f / total;
        }
    }
}

/** On a card with warpgroup products (attention_forward_hopper.cu), for what it takes. */
qs_status qs_hopper_attention_forward(qs_queue *q, qs_forward_args *args);

#endif
