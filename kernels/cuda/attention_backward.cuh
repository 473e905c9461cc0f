/* What the two backward kernels of attention share: P out of scores, from either side, and the way
 * of a block of keys over the queries of several heads. */
#ifndef QS_KERNELS_CUDA_ATTENTION_BACKWARD_CUH
#define QS_KERNELS_CUDA_ATTENTION_BACKWARD_CUH

#include "kernels/cuda/attention.cuh"

typedef struct {
    qs_attention_launch launch;
    qs_head_rows q, k, v, o, d_o, dq, dk, dv;
    const float *lse; /* [n_heads, rows] */
    float *delta;
    /* The factor of what the softmax takes: scores or, with a cap, their tanh. A number of its own:
     * where launch.scale is read in a loop and behind it, ptxas serializes the products of dQ on
     * Hopper. */
    float softmax_scale;
} qs_backward_args;

/** Scores to P = exp(scale s - lse), 0 where nothing is visible; with a cap to P = exp(cap t - lse)
 * times its slope 1 - t^2, t = tanh(scale s / cap): as dQ wants it. `lse` in units of log2. */
template <bool CAP, int MT, int NT>
__device__ __forceinline__ void
qs_weights_of_rows(float (&scores)[MT][NT][4], const float (&lse)[MT][2],
                   const qs_backward_args &args, const int *bounds, int row, int key, bool all)
{
    const float scale = args.softmax_scale * QS_LOG2_E;
    if (CAP) {
        qs_cap_scores(scores, args.launch.tanh_scale);
    }
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int n = 0; n < NT; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float s = scores[m][n][i], p = qs_exp2(fmaf(s, scale, -lse[m][i / 2]));
                scores[m][n][i] = CAP ? p * fmaf(-s, s, 1.0f) : p;
            }
        }
    }
    if (!all) {
        qs_mask(scores, 0.0f, [&](int at, int col) {
            return qs_attention_within(bounds[at], row + at, key + col);
        });
    }
}

/** A block goes over heads and, within a head, over tiles of queries. */
typedef struct {
    int head, query;
} qs_dkv_step;

__device__ __forceinline__ void qs_step_on(qs_dkv_step *step, qs_attention_span span, int size)
{
    step->query += size;
    if (step->query >= span.end * size) {
        step->query = span.begin * size;
        step->head++;
    }
}

/** This thread's number of a step: lse of a query, or delta. Behind the last row P = exp2(0 -
 * infinity) = 0. */
template <int BQ>
__device__ __forceinline__ float qs_load_stat(const qs_backward_args &args, qs_dkv_step step)
{
    const int i = (int)threadIdx.x, query = step.query + i % BQ;
    if (i >= 2 * BQ || query >= args.launch.rows) {
        return i < BQ ? INFINITY : 0.0f;
    }
    const int64_t at = step.head * (int64_t)args.launch.rows + query;
    return i < BQ ? args.lse[at] : args.delta[at];
}

/** The same as it is read, lse in units of log2: computed when it is put away, since at the load
 * the warp would wait for memory. */
template <int BQ> __device__ __forceinline__ float qs_stat_as_read(float stat)
{
    return (int)threadIdx.x < BQ ? stat * QS_LOG2_E : stat;
}

/** Scores of keys (rows) and queries (columns) to P, and P as left operands in `weights`. */
template <int MT, int NT>
__device__ __forceinline__ void
qs_weights_of_cols(float (&scores)[MT][NT][4], uint32_t (&weights)[MT][NT / 2][4], const float *lse,
                   const qs_backward_args &args, const int *bounds, int row, int query, bool all)
{
    const float scale = args.softmax_scale * QS_LOG2_E;
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int n = 0; n < NT; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int col = qs_thread_col(n) + i % 2;
                scores[m][n][i] = qs_exp2(fmaf(scores[m][n][i], scale, -lse[col]));
            }
        }
    }
    if (!all) {
        qs_mask(scores, 0.0f, [&](int at, int col) {
            return qs_attention_within(row + at, bounds[at], query + col);
        });
    }
    qs_as_left(weights, scores);
}

/** The same with a cap: `weights` get P, which dV is made of, and the scores become P times the
 * slope 1 - t^2, which dK is made of. Pair by pair, so that P takes no registers but those of
 * `weights`. */
template <int MT, int NT>
__device__ __forceinline__ void
qs_capped_weights_of_cols(float (&scores)[MT][NT][4], uint32_t (&weights)[MT][NT / 2][4],
                          const float *lse, const qs_backward_args &args, const int *bounds,
                          int row, int query, bool all)
{
    const float scale = args.softmax_scale * QS_LOG2_E;
    qs_cap_scores(scores, args.launch.tanh_scale);
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int n = 0; n < NT; n++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int at = qs_thread_row(m, half);
                float p[2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int col = qs_thread_col(n) + i;
                    float *score = &scores[m][n][2 * half + i];
                    p[i] = qs_exp2(fmaf(*score, scale, -lse[col]));
                    if (!all && !qs_attention_within(row + at, bounds[at], query + col)) {
                        p[i] = 0.0f;
                    }
                    *score = p[i] * fmaf(-*score, *score, 1.0f);
                }
                weights[m][n / 2][n % 2 * 2 + half] = qs_round_pair(p[0], p[1]);
            }
        }
    }
}

/** dQ, dK and dV on a card with warpgroup products (attention_backward_hopper.cu), for what it
 * takes; delta is there already. */
qs_status qs_hopper_attention_gradients(qs_queue *q, const qs_backward_args *args);

#endif
