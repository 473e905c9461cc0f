/* How a product with one short side is cut into blocks: X A^T and dY B of an adapter, and the
 * gradients of A and B (thin.cu).
 *
 * C has a wide side and a thin one of at most QS_THIN_MOST; what is summed over is its depth. A
 * block has QS_THIN_WIDE of the wide side, all of the thin one, and a range of the depth in chunks
 * of QS_THIN_DEPTH. Where there are few such tiles, the depth is split among blocks so that a large
 * card is full: by a rule of the sizes alone, so that the bits of a sum do not depend on the card.
 */
#ifndef QS_KERNELS_CUDA_CORE_THIN_H
#define QS_KERNELS_CUDA_CORE_THIN_H

#include "kernels/cuda/core/hd.h"

enum {
    QS_THIN_MOST = 64,
    QS_THIN_WIDE = 128,
    QS_THIN_DEPTH = 64,
    QS_THIN_BLOCKS = 264, /* two for each of an H100's 132 multiprocessors */
    QS_THIN_CHUNKS = 4,   /* at least so many chunks a block, or the wait for the first is all */
};

typedef struct {
    int64_t tiles;     /* of the wide side */
    int64_t chunks;    /* of the depth */
    int64_t per_split; /* chunks of each part of the depth but the last, */
    int splits;        /* and how many parts there are: none is empty */
} qs_thin_cut;

/** wide, depth > 0. With more than one split, tiles * splits <= QS_THIN_BLOCKS. */
QS_HD qs_thin_cut qs_thin_cut_of(int64_t wide, int64_t depth)
{
    qs_thin_cut cut;
    cut.tiles = qs_hd_ceil_div(wide, QS_THIN_WIDE);
    cut.chunks = qs_hd_ceil_div(depth, QS_THIN_DEPTH);
    const int64_t most = qs_hd_max(cut.chunks / QS_THIN_CHUNKS, 1);
    const int64_t wanted = qs_hd_max(QS_THIN_BLOCKS / cut.tiles, 1);
    cut.per_split = qs_hd_ceil_div(cut.chunks, qs_hd_min(most, wanted));
    cut.splits = (int)qs_hd_ceil_div(cut.chunks, cut.per_split);
    return cut;
}

/** First element of piece `piece` (16 bytes) of row `row` in a tile of shared memory whose rows are
 * `pieces` long, a power of two from 2 on. The eight pieces of one 8 x 8 matrix of ldmatrix lie in
 * different banks: eight rows are turned against each other, or as many as share 128 bytes stay. */
QS_HD int qs_thin_at(int pieces, int row, int piece)
{
    const int turned = pieces < 8 ? row / (8 / pieces) & (pieces - 1) : row & 7;
    return (row * pieces + (piece ^ turned)) * 8;
}

#endif
