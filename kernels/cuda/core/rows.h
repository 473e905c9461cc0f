/* Who touches which element in the kernels that walk over rows.
 *
 * A row is cut into groups of `width` neighbouring elements, one group a thread. A block is a tile:
 * 2^log2 groups of a row by QS_ROW_THREADS / 2^log2 rows, so that short rows leave no thread idle
 * and the threads of a warp read neighbouring addresses. Tiles of a row lie along x of the grid;
 * along y a block takes every blocks_y-th tile, because a grid ends at 65,535 there. */
#ifndef QS_KERNELS_CUDA_CORE_ROWS_H
#define QS_KERNELS_CUDA_CORE_ROWS_H

#include "kernels/cuda/core/hd.h"

enum {
    QS_ROW_THREADS = 256,
    QS_ROW_BLOCKS_Y_MAX = 65535,
    QS_VECTOR = 8, /* elements a thread moves at once: 16 bytes of bf16 */
};

/** Elements from row to row of a scratch whose rows hold `cols`: each starts on a vector. */
QS_HD int64_t qs_rows_stride(int64_t cols)
{
    return qs_hd_round_up(cols, QS_VECTOR);
}

typedef struct {
    int64_t rows, groups; /* groups of a row */
    int log2;             /* of the groups of a row that a tile holds */
    int64_t blocks_x, blocks_y;
} qs_row_tiles;

/** Tiles of `rows` rows (at least 1) of `groups` groups (at least 1). */
QS_HD qs_row_tiles qs_row_tiles_make(int64_t rows, int64_t groups)
{
    qs_row_tiles t;
    t.rows = rows;
    t.groups = groups;
    t.log2 = 0;
    while ((1 << t.log2) < QS_ROW_THREADS && ((int64_t)1 << t.log2) < groups) {
        t.log2++;
    }
    t.blocks_x = qs_hd_ceil_div(groups, (int64_t)1 << t.log2);
    t.blocks_y = qs_hd_min(qs_hd_ceil_div(rows, QS_ROW_THREADS >> t.log2), QS_ROW_BLOCKS_Y_MAX);
    return t;
}

/** The group of a thread; none if it is not below t->groups. */
QS_HD int64_t qs_row_group(const qs_row_tiles *t, int64_t block_x, int thread)
{
    return (block_x << t->log2) + (thread & ((1 << t->log2) - 1));
}

/** The first row of a thread; qs_row_step further lies its next one, up to t->rows. */
QS_HD int64_t qs_row_first(const qs_row_tiles *t, int64_t block_y, int thread)
{
    return block_y * (QS_ROW_THREADS >> t->log2) + (thread >> t->log2);
}

QS_HD int64_t qs_row_step(const qs_row_tiles *t)
{
    return t->blocks_y * (QS_ROW_THREADS >> t->log2);
}

/** True if every group of QS_VECTOR elements can be moved in pieces of 16 bytes: the matrix starts
 * on one, its rows follow each other in whole ones, and a row holds whole groups. */
QS_HD bool qs_rows_are_vectors(const void *data, int64_t stride, int64_t cols)
{
    return (uintptr_t)data % 16 == 0 && stride % QS_VECTOR == 0 && cols % QS_VECTOR == 0;
}

/* ---- rotary embedding: element i of a head turns with i + half; what lies behind 2 half stays --
 */

typedef struct {
    int64_t low, high; /* columns of the row */
    int angle;         /* column of the tables */
} qs_rope_pair;

/** Group `group` of a row whose heads hold half / width groups of pairs each; `half` is a multiple
 * of `width`. */
QS_HD qs_rope_pair qs_rope_pair_at(int64_t group, int head_dim, int half, int width)
{
    const int per_head = half / width;
    const int64_t head = group / per_head;
    qs_rope_pair p;
    p.angle = (int)(group - head * per_head) * width;
    p.low = head * head_dim + p.angle;
    p.high = p.low + half;
    return p;
}

/* ---- scatter: which row of x comes to a row of y ---- */

/** The place of `row` among `count` ascending indices, -1 if it is not there. */
QS_HD int64_t qs_row_find(const int32_t *index, int64_t count, int64_t row)
{
    int64_t low = 0, high = count;
    while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (index[middle] < row) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low < count && index[low] == row ? low : -1;
}

/* ---- copies of bytes ---- */

/** The widest of 16, 4, 2 and 1 bytes in which a copy can go whose addresses and length, or'ed
 * together, are `bits`. */
QS_HD int qs_copy_width(uint64_t bits)
{
    return bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : bits % 2 == 0 ? 2 : 1;
}

#endif
