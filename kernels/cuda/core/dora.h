/* Who computes what for DoRA: the strips of a row whose norm is taken, the blocks of tokens whose
 * products pass through scratch, and the parts of a block whose columns are added up.
 *
 * Norms. A block of threads takes 32 rows, its 8 warps every 8th strip of 32 columns. A thread
 * holds eight neighbouring columns of a row, 16 bytes, and a product's tile is eight columns of the
 * strip of which a thread holds two: so tile j holds columns 2 j and 2 j + 1 of each eight,
 *
 *     column of the strip      0  1  2  3  4  5  6  7 |  8  9 10 11 ...
 *     thread of the four       0  0  0  0  0  0  0  0 |  1  1  1  1
 *     tile                     0  0  1  1  2  2  3  3 |  0  0  1  1
 *     its column in the tile   0  1  0  1  0  1  0  1 |  2  3  2  3
 *
 * and A's columns are stored tile by tile. A row's sum is made in an order that depends on its
 * length alone: not on rank, adapter or alignment. */
#ifndef QS_KERNELS_CUDA_CORE_DORA_H
#define QS_KERNELS_CUDA_CORE_DORA_H

#include <stddef.h>

#include "kernels/cuda/core/bf16.h"
#include "kernels/cuda/core/border.h"
#include "kernels/cuda/core/hd.h"
#include "kernels/cuda/core/rows.h"

enum {
    QS_DORA_NORM_WARPS = 8,
    QS_DORA_NORM_ROWS = 32,
    QS_DORA_STRIP = 32,                    /* columns */
    QS_DORA_TILES = QS_DORA_STRIP / 8,     /* of a strip */
    QS_DORA_RANKS_MAX = 64,                /* of A that lie in shared memory at once */
    QS_DORA_WORDS = QS_DORA_STRIP / 2 + 4, /* from row to row there: eight rows' 16 bytes lie in
                                              different banks */
    QS_DORA_TOKENS_MAX = 2048,             /* of a block of tokens */
    QS_DORA_SUM_ROWS = 64,                 /* of a part */
};

/** The word (two columns) of a stored row where the pair `pair` < 4 of the eight columns of thread
 * `thread` < 4 stands: pair j is the thread's share of tile j. */
QS_HD int qs_dora_word(int thread, int pair)
{
    return pair * 4 + thread;
}

/** Tokens of each block that `rows` of them are cut into, the last one apart: as few blocks as fit,
 * about equally long. At least 1. */
QS_HD int64_t qs_dora_block_rows(int64_t rows)
{
    const int64_t blocks = qs_hd_max(qs_hd_ceil_div(rows, QS_DORA_TOKENS_MAX), 1);
    const int64_t each = qs_hd_round_up(qs_hd_ceil_div(rows, blocks), QS_DORA_SUM_ROWS);
    return qs_hd_max(qs_hd_min(each, rows), 1);
}

/** Scratch for blocks of up to `tokens` tokens and linears of up to `widest` columns. */
typedef struct {
    size_t operand; /* bf16 [tokens, widest + border]: what is multiplied, with its border */
    size_t product; /* fp32 [tokens, widest] */
    size_t sums;    /* fp32 [parts, widest] */
    size_t total;   /* bytes of the three, which start on 256 each */
} qs_dora_scratch;

QS_HD qs_dora_scratch qs_dora_scratch_of(int64_t tokens, int64_t widest, int64_t border)
{
    const int64_t rows = qs_hd_max(qs_hd_min(tokens, QS_DORA_TOKENS_MAX), 1);
    const int64_t parts = qs_hd_ceil_div(rows, QS_DORA_SUM_ROWS);
    const int64_t wide = qs_rows_stride(widest);
    qs_dora_scratch s;
    s.operand = (size_t)qs_hd_round_up(
        rows * qs_border_stride(widest, border) * (int64_t)sizeof(qs_bf16), 256);
    s.product = (size_t)qs_hd_round_up(rows * wide * (int64_t)sizeof(float), 256);
    s.sums = (size_t)qs_hd_round_up(parts * wide * (int64_t)sizeof(float), 256);
    s.total = s.operand + s.product + s.sums;
    return s;
}

#endif
