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
 * Linears that read the same x are one matrix, their rows one below the other. On the right the B's
 * stand block by block, below them the A's, also one below the other:
 *
 *              in      border
 *        +------------+-------+
 *        |     W1     | B1  0 |   out1 rows     [X | s X A1^T | s X A2^T] [W1 B1 0 ; W2 0 B2]^T
 *        |     W2     | 0  B2 |   out2 rows         = [Y1 | Y2]
 *        +------------+-------+
 *        |     A1     | 0     |   border rows   [dY1 | dY2 | s dY1 B1 | s dY2 B2]
 *        |     A2     |       |                     [W1 ; W2 ; A1 ; A2] = dX, the sum for both
 *        +------------+-------+
 *
 * One without an adapter has zeros beside its W and no rows below. The border of an adapter is the
 * largest rank rounded up to 8 elements (16 bytes of bf16), one width for all linears. Rows start
 * on 128 bytes: the stride is in + border, rounded up to 64 elements; what that adds is never read.
 * So a warp that decodes writes 512 bytes as four lines of the cache, not as five, and a product
 * that reads 64 elements of a row reads one line, not two; it costs 1 % of the scratch of
 * Llama-3-8B's layer. */
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

/** A linear in its bordered matrix, and what of the border belongs to it: the cells beside its
 * rows, and its adapter's rows below. */
typedef struct {
    int64_t out, in;
    int64_t stride; /* of the matrix */
    int64_t border; /* columns of all adapters in it */
    int64_t below;  /* the adapter's first row, counted from the linear's own first one, */
    int rows;       /* and how many: the width of an adapter's border; 0 without one */
    int at;         /* the adapter's first column of the border */
    int rank;       /* 0: no adapter */
} qs_border_linear;

/** Groups of QS_BORDER_GROUP neighbouring cells: those of the right border row by row, then those
 * of the rows below, of which the last may reach into what fills the row up. */
QS_HD int64_t qs_border_groups(const qs_border_linear *l)
{
    return l->border / QS_BORDER_GROUP * l->out +
           l->rows * qs_hd_ceil_div(l->in + l->border, QS_BORDER_GROUP);
}

typedef enum { QS_BORDER_B, QS_BORDER_A } qs_border_source;

typedef struct {
    int64_t at;   /* its first element, counted from the linear's first one */
    int64_t from; /* of B [out, rank] or A [rank, in] */
    int taken;    /* so many come from there, the others are zero */
    qs_border_source source;
} qs_border_group;

/** What stands in group `index` < qs_border_groups. */
QS_HD qs_border_group qs_border_group_at(int64_t index, const qs_border_linear *l)
{
    const int64_t of_row = l->border / QS_BORDER_GROUP;
    qs_border_group group;
    int64_t left; /* of B's or A's row, from the group's first cell on */
    if (index < of_row * l->out) {
        const int64_t row = index / of_row, col = (index - row * of_row) * QS_BORDER_GROUP;
        const int64_t k = col - l->at;
        group.source = QS_BORDER_B;
        group.at = row * l->stride + l->in + col;
        group.from = row * l->rank + k;
        left = k >= 0 ? l->rank - k : 0;
    } else {
        const int64_t below = index - of_row * l->out;
        const int64_t wide = qs_hd_ceil_div(l->in + l->border, QS_BORDER_GROUP);
        const int64_t k = below / wide, col = (below - k * wide) * QS_BORDER_GROUP;
        group.source = QS_BORDER_A;
        group.at = (l->below + k) * l->stride + col;
        group.from = k * l->in + col;
        left = k < l->rank ? l->in - col : 0;
    }
    group.taken = (int)qs_hd_max(qs_hd_min(left, QS_BORDER_GROUP), 0);
    return group;
}

#endif
