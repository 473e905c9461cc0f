/* How RMSNorm shares a row among lanes. The sum over a row is a tree whose shape must follow from
 * the row's length alone, so that no launch, stride or alignment changes a bit:
 *
 *   a lane holds vectors lane, lane + lanes, lane + 2 lanes, .. of QS_VECTOR elements and adds them
 *   in that order; the lanes of a warp add up by exchange, then the warps in order.
 *
 * Rows of up to 256 elements (heads) take 8, 16 or 32 lanes of a warp, several rows a warp; longer
 * ones (hidden) take a block each. */
#ifndef QS_KERNELS_CUDA_CORE_NORM_H
#define QS_KERNELS_CUDA_CORE_NORM_H

#include "kernels/cuda/core/rows.h"

enum {
    QS_NORM_SHORT = 256,     /* columns that a warp takes */
    QS_NORM_THREADS = 256,   /* of a block, unless a row needs more */
    QS_NORM_VECTORS_MAX = 4, /* that a lane holds */
    QS_NORM_THREADS_MAX = 1024,
    QS_NORM_COLS_MAX = QS_NORM_THREADS_MAX * QS_NORM_VECTORS_MAX * QS_VECTOR,
};

typedef struct {
    int lanes;   /* of a row: 8, 16, 32, or all threads of a block */
    int vectors; /* that a lane holds: 1, 2 or 4 */
    int threads; /* of a block */
} qs_norm_plan;

/** For rows of 1 .. QS_NORM_COLS_MAX columns. */
QS_HD qs_norm_plan qs_norm_plan_make(int64_t cols)
{
    qs_norm_plan p;
    const int64_t groups = qs_hd_ceil_div(cols, QS_VECTOR);
    p.vectors = 1;
    if (cols <= QS_NORM_SHORT) {
        p.lanes = groups <= 8 ? 8 : groups <= 16 ? 16 : 32;
        p.threads = QS_NORM_THREADS;
        return p;
    }
    while (p.vectors < QS_NORM_VECTORS_MAX && groups > (int64_t)p.vectors * QS_NORM_THREADS) {
        p.vectors *= 2;
    }
    p.lanes = (int)qs_hd_round_up(qs_hd_ceil_div(groups, p.vectors), 32);
    p.threads = p.lanes;
    return p;
}

/** First column of vector `k` of a lane; at or past the row's end there is none. */
QS_HD int64_t qs_norm_column(int lanes, int lane, int k)
{
    return ((int64_t)k * lanes + lane) * QS_VECTOR;
}

#endif
