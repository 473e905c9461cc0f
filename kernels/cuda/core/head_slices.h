/* Who holds which logit of the head, and where a token lies.
 *
 * A chunk of the vocabulary is taken in slices of QS_HEAD_SLICE rows; a row of a slice's logits is
 * one block's, which keeps it in registers between its maximum and its exponentials:
 *
 *     element   0 1 2 3   4 5 6 7  ...  1020..1023   1024..1027  ...          4092..4095
 *     thread    0         1        ...  255          0           ...          255
 *               |<------- group 0 ----------------->|<- group 1 ->  ... group 3 ------->|
 *
 * Four neighbours a thread are one 16-byte load of fp32 and one 8-byte store of bf16; buffers have
 * QS_HEAD_SLICE columns whatever a slice's width, so that every row starts aligned and the last
 * four of a ragged slice can be read and written whole. */
#ifndef QS_KERNELS_CUDA_CORE_HEAD_SLICES_H
#define QS_KERNELS_CUDA_CORE_HEAD_SLICES_H

#include "kernels/cuda/core/hd.h"

enum {
    QS_HEAD_SLICE = 4096,
    QS_HEAD_THREADS = 256,
    QS_HEAD_QUAD = 4,
    QS_HEAD_GROUPS = QS_HEAD_SLICE / (QS_HEAD_THREADS * QS_HEAD_QUAD)
};

typedef struct {
    int64_t first; /* row of the chunk */
    int64_t count; /* 1..QS_HEAD_SLICE */
} qs_head_slice;

QS_HD int64_t qs_head_slice_count(int64_t out)
{
    return qs_hd_ceil_div(out, QS_HEAD_SLICE);
}

QS_HD qs_head_slice qs_head_slice_at(int64_t out, int64_t index)
{
    qs_head_slice slice;
    slice.first = index * QS_HEAD_SLICE;
    slice.count = qs_hd_min(QS_HEAD_SLICE, out - slice.first);
    return slice;
}

/** The first of the four elements that `thread` holds in `group`. */
QS_HD int qs_head_element(int thread, int group)
{
    return (group * QS_HEAD_THREADS + thread) * QS_HEAD_QUAD;
}

/** Where token `target` lies in the slice whose first row is token `token`, -1: elsewhere. */
QS_HD int64_t qs_head_place(int64_t target, int64_t token, int64_t count)
{
    const int64_t at = target - token;
    return at >= 0 && at < count ? at : -1;
}

#endif
