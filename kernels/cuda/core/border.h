/* The bordered matrix: a decoded weight with its adapter at its edges, so that one product does
 * both.
 *
 *              in        border
 *        +------------+--------+
 *        |     W      | B    0 |   out rows     [X | s X A^T] [W | B]^T = X W^T + s X A^T B^T
 *        +------------+--------+
 *        | A          | 0      |   border rows  [dY | s dY B] [W ; A] = dY W + s dY B A
 *        | 0          |        |
 *        +------------+--------+
 *
 * The border is the largest rank rounded up to 8 elements (16 bytes of bf16), one width for all
 * linears. Rows start on 128 bytes: the stride is in + border, rounded up to 64 elements; what that
 * adds is never read. So a warp that decodes writes 512 bytes as four lines of the cache, not as
 * five, and a product that reads 64 elements of a row reads one line, not two; it costs 1 % of the
 * scratch of Llama-3-8B's layer. */
#ifndef QS_KERNELS_CUDA_CORE_BORDER_H
#define QS_KERNELS_CUDA_CORE_BORDER_H

#include <stddef.h>

#include "kernels/cuda/core/hd.h"

enum {
    QS_BORDER_ALIGN = 8,
    QS_BORDER_GROUP = 8, /* cells that are filled together, 16 bytes */
    QS_BORDER_ROW = 64,  /* a row starts on a line of the cache */
};

QS_HD int64_t qs_border_width(int rank)
{
    return qs_hd_round_up(rank, QS_BORDER_ALIGN);
}

QS_HD int64_t qs_border_stride(int64_t in, int64_t border)
{
    return qs_hd_round_up(in + border, QS_BORDER_ROW);
}

/** Elements of the whole bordered matrix. */
QS_HD int64_t qs_border_elems(int64_t out, int64_t in, int64_t border)
{
    return (out + border) * qs_border_stride(in, border);
}

/** Bytes that a matrix of `elems` takes of a scratch: the next one starts on 256 again. */
QS_HD size_t qs_border_bytes(int64_t elems)
{
    return (size_t)qs_hd_round_up(elems * (int64_t)sizeof(uint16_t), 256);
}

/** True if a matrix of `cols` columns has a border behind them that the products can use: free
 * columns, and 16-byte rows so that the wide product runs at full speed. */
QS_HD bool qs_border_usable(uintptr_t data, int64_t cols, int64_t stride, int64_t border)
{
    return stride >= cols + border && cols % QS_BORDER_ALIGN == 0 &&
           stride % QS_BORDER_ALIGN == 0 && data % 16 == 0;
}

/** Groups of QS_BORDER_GROUP neighbouring cells around W: those of the right border row by row,
 * then those of the rows below, of which the last may reach into what fills the row up. */
QS_HD int64_t qs_border_groups(int64_t out, int64_t in, int64_t border)
{
    return border / QS_BORDER_GROUP * out + border * qs_hd_ceil_div(in + border, QS_BORDER_GROUP);
}

typedef enum { QS_BORDER_B, QS_BORDER_A } qs_border_source;

typedef struct {
    int64_t at;   /* its first element of the bordered matrix */
    int64_t from; /* of B [out, rank] or A [rank, in] */
    int taken;    /* so many come from there, the others are zero */
    qs_border_source source;
} qs_border_group;

/** What stands in group `index` < qs_border_groups. */
QS_HD qs_border_group qs_border_group_at(int64_t index, int64_t out, int64_t in, int64_t border,
                                         int rank)
{
    const int64_t stride = qs_border_stride(in, border), of_row = border / QS_BORDER_GROUP;
    qs_border_group group;
    int64_t left; /* of B's or A's row, from the group's first cell on */
    if (index < of_row * out) {
        const int64_t row = index / of_row, k = (index - row * of_row) * QS_BORDER_GROUP;
        group.source = QS_BORDER_B;
        group.at = row * stride + in + k;
        group.from = row * rank + k;
        left = rank - k;
    } else {
        const int64_t below = index - of_row * out;
        const int64_t wide = qs_hd_ceil_div(in + border, QS_BORDER_GROUP);
        const int64_t k = below / wide, col = (below - k * wide) * QS_BORDER_GROUP;
        group.source = QS_BORDER_A;
        group.at = (out + k) * stride + col;
        group.from = k * in + col;
        left = k < rank ? in - col : 0;
    }
    group.taken = (int)qs_hd_max(qs_hd_min(left, QS_BORDER_GROUP), 0);
    return group;
}

#endif
