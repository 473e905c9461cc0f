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
 * linears. Rows start on 16 bytes: the stride is in + border, rounded up to 8 elements; what that
 * adds is never read. */
#ifndef QS_KERNELS_CUDA_CORE_BORDER_H
#define QS_KERNELS_CUDA_CORE_BORDER_H

#include <stddef.h>

#include "kernels/cuda/core/hd.h"

enum { QS_BORDER_ALIGN = 8 };

QS_HD int64_t qs_border_width(int rank)
{
    return qs_hd_round_up(rank, QS_BORDER_ALIGN);
}

QS_HD int64_t qs_border_stride(int64_t in, int64_t border)
{
    return qs_hd_round_up(in + border, QS_BORDER_ALIGN);
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

/** Number of cells around W: the right border and the rows below. */
QS_HD int64_t qs_border_cells(int64_t out, int64_t in, int64_t border)
{
    return out * border + border * (in + border);
}

typedef enum { QS_BORDER_ZERO, QS_BORDER_B, QS_BORDER_A } qs_border_source;

typedef struct {
    int64_t at;   /* element of the bordered matrix */
    int64_t from; /* element of B [out, rank] or A [rank, in] */
    qs_border_source source;
} qs_border_cell;

/** What stands in cell `index` < qs_border_cells: first the right border row by row, then the rows
 * below. */
QS_HD qs_border_cell qs_border_cell_at(int64_t index, int64_t out, int64_t in, int64_t border,
                                       int rank)
{
    const int64_t stride = qs_border_stride(in, border);
    qs_border_cell cell;
    int64_t row, col;
    cell.from = 0;
    cell.source = QS_BORDER_ZERO;
    if (index < out * border) {
        const int64_t k = index % border;
        row = index / border;
        col = in + k;
        if (k < rank) {
            cell.from = row * rank + k;
            cell.source = QS_BORDER_B;
        }
    } else {
        const int64_t below = index - out * border;
        const int64_t k = below / (in + border);
        row = out + k;
        col = below % (in + border);
        if (k < rank && col < in) {
            cell.from = k * in + col;
            cell.source = QS_BORDER_A;
        }
    }
    cell.at = row * stride + col;
    return cell;
}

#endif
