/* Which tile of keys meets which tile of queries, which pairs in it are visible, and where its
 * elements lie in shared memory.
 *
 * Tiles are cut at absolute rows of the micro-batch: tile i is rows [i n, i n + n), whatever
 * documents they belong to. So there is no schedule, a block knows its rows by its number, and
 * thousands of short documents need no more blocks than one long one. What a query sees is an
 * interval that ends at itself, and both ends never go back from a row to the next:
 *
 *     keys      0 1 2 3 4 5 6 7        documents 0..2, 3..7, window 3
 *     query 2   x x x                  first key 0
 *     query 3         x                          3
 *     query 5         x x x                      3
 *     query 7             x x x                  5
 *
 * Therefore the keys of a tile of queries are one interval as well, from its first query's first
 * key to its last query, and the same from the other side: key k is seen by the queries k .. last
 * query of k. */
#ifndef QS_KERNELS_CUDA_CORE_ATTENTION_TILES_H
#define QS_KERNELS_CUDA_CORE_ATTENTION_TILES_H

#include "kernels/cuda/core/hd.h"

/** The document of a row: the last one that begins at or before it (empty ones lie before). n_docs
 * > 0, 0 <= row < cu_seqlens[n_docs]. */
QS_HD int qs_attention_document(const int32_t *cu_seqlens, int n_docs, int row)
{
    int low = 0, high = n_docs; /* cu_seqlens[low] <= row < cu_seqlens[high] */
    while (high - low > 1) {
        const int middle = low + (high - low) / 2;
        if (cu_seqlens[middle] <= row) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

/** The first key that the query at `row` sees; the last one is `row` itself. */
QS_HD int qs_attention_first_key(const int32_t *cu_seqlens, int n_docs, int window, int row)
{
    const int begin = cu_seqlens[qs_attention_document(cu_seqlens, n_docs, row)];
    return window > 0 && row - begin >= window ? row - window + 1 : begin;
}

/** The last query that sees the key at `row`; the first one is `row` itself. */
QS_HD int qs_attention_last_query(const int32_t *cu_seqlens, int n_docs, int window, int row)
{
    const int last = cu_seqlens[qs_attention_document(cu_seqlens, n_docs, row) + 1] - 1;
    return window > 0 && last - row >= window ? row + window - 1 : last;
}

/** Is `at` within [first, last]? first <= last. */
QS_HD bool qs_attention_within(int first, int last, int at)
{
    return (unsigned)at - (unsigned)first <= (unsigned)last - (unsigned)first;
}

/** Tiles [begin, end). */
typedef struct {
    int begin, end;
} qs_attention_span;

/** The tiles of `size` rows that hold a row of [first, last]. */
QS_HD qs_attention_span qs_attention_tiles(int first, int last, int size)
{
    const qs_attention_span span = {first / size, last / size + 1};
    return span;
}

typedef enum {
    QS_ATTENTION_NONE, /* no pair is visible */
    QS_ATTENTION_PART, /* look at each pair */
    QS_ATTENTION_ALL,
} qs_attention_view;

/** How queries [query, query_last] see keys [key, key_last], when the first of these queries sees
 * keys from `first` on and the last of them from `first_of_last` on. */
QS_HD qs_attention_view qs_attention_view_of_keys(int query, int query_last, int first,
                                                  int first_of_last, int key, int key_last)
{
    if (key > query_last || key_last < first) {
        return QS_ATTENTION_NONE;
    }
    return key_last <= query && key >= first_of_last ? QS_ATTENTION_ALL : QS_ATTENTION_PART;
}

/** The same from the other side: the first of these keys is seen up to query `last_of_first`, the
 * last of them up to `last`. */
QS_HD qs_attention_view qs_attention_view_of_queries(int key, int key_last, int last_of_first,
                                                     int last, int query, int query_last)
{
    if (query_last < key || query > last) {
        return QS_ATTENTION_NONE;
    }
    return query >= key_last && query_last <= last_of_first ? QS_ATTENTION_ALL : QS_ATTENTION_PART;
}

/** A block's tile and head. Heads change fastest, so that the blocks that share keys run together.
 */
typedef struct {
    int tile, head;
} qs_attention_block;

/** Block `number` of tiles * heads; with `late_first` from the last tile on, because late queries
 * see the most keys and long work should not be begun at the end. */
QS_HD qs_attention_block qs_attention_block_at(int64_t number, int tiles, int heads,
                                               bool late_first)
{
    const int tile = (int)(number / heads);
    const qs_attention_block block = {late_first ? tiles - 1 - tile : tile, (int)(number % heads)};
    return block;
}

/** Where chunk `chunk` (16 bytes) of row `row` stands within that row of a tile in shared memory
 * whose rows are `chunks` long, a multiple of 4: the eight chunks that one 8 x 8 matrix of ldmatrix
 * reads, and the rows of a fragment that are written together, lie in different banks. */
QS_HD int qs_attention_chunk(int chunks, int row, int chunk)
{
    return chunks % 8 == 0 ? chunk ^ (row & 7) : chunk ^ ((row >> 1) & 3);
}

/** qs_attention_chunk(chunks, row, even + odd) for an even constant and odd = 0 or 1 of the thread:
 * what depends on the thread takes few values, which a compiler can keep. */
QS_HD int qs_attention_chunk_of(int chunks, int row, int even, int odd)
{
    const int mask = chunks % 8 == 0 ? 7 : 3;
    const int of_thread = odd ^ (chunks % 8 == 0 ? row & 7 : (row >> 1) & 3);
    return (even & ~mask) + ((even & mask) ^ of_thread);
}

/** Width of a head in shared memory: what the kernels are compiled for. 0: too wide. */
QS_HD int qs_attention_padded_dim(int head_dim)
{
    return head_dim <= 32    ? 32
           : head_dim <= 64  ? 64
           : head_dim <= 96  ? 96
           : head_dim <= 128 ? 128
           : head_dim <= 192 ? 192
           : head_dim <= 256 ? 256
                             : 0;
}

#endif
