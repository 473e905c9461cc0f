/* Which tiles of keys and queries meet, what is visible in them, and where elements lie in shared
 * memory: all of core/attention_tiles.h over every split of a few rows into documents. */
#include <criterion/criterion.h>
#include <string.h>

#include "kernels/cuda/core/attention_tiles.h"

enum { MAX_ROWS = 9, MAX_CUTS = 2 * MAX_ROWS + 3, MAX_TILE = 4 };

typedef struct {
    int rows, window, n_docs;
    int32_t cu[MAX_CUTS];
    bool visible[MAX_ROWS][MAX_ROWS]; /* [query][key], by the definition */
    int first[MAX_ROWS], last[MAX_ROWS];
} layout;

/* Where empty documents stand. */
enum { EMPTY_NONE, EMPTY_FRONT, EMPTY_END, EMPTY_ALL, EMPTY_KINDS };

static void cut(layout *l, int row, bool twice)
{
    l->cu[l->n_docs++] = row;
    if (twice) {
        l->cu[l->n_docs++] = row;
    }
}

/* Bit i of `cuts`: a document begins at row i + 1. */
static layout make_layout(int rows, unsigned cuts, int empty, int window)
{
    layout l = {.rows = rows, .window = window};
    cut(&l, 0, empty == EMPTY_FRONT || empty == EMPTY_ALL);
    for (int i = 1; i < rows; i++) {
        if ((cuts >> (i - 1) & 1U) != 0) {
            cut(&l, i, empty == EMPTY_ALL);
        }
    }
    cut(&l, rows, empty == EMPTY_END || empty == EMPTY_ALL);
    l.n_docs--; /* of n + 1 numbers */
    for (int d = 0; d < l.n_docs; d++) {
        for (int q = l.cu[d]; q < l.cu[d + 1]; q++) {
            for (int k = l.cu[d]; k <= q; k++) {
                l.visible[q][k] = window == 0 || q - k < window;
            }
        }
    }
    for (int t = 0; t < rows; t++) {
        l.first[t] = qs_attention_first_key(l.cu, l.n_docs, window, t);
        l.last[t] = qs_attention_last_query(l.cu, l.n_docs, window, t);
    }
    return l;
}

/* Calls `check` with every layout of up to MAX_ROWS rows. */
static void for_all(void (*check)(const layout *l))
{
    for (int rows = 1; rows <= MAX_ROWS; rows++) {
        for (unsigned cuts = 0; cuts < 1U << (rows - 1); cuts++) {
            for (int empty = 0; empty < EMPTY_KINDS; empty++) {
                for (int window = 0; window <= rows + 1; window++) {
                    const layout l = make_layout(rows, cuts, empty, window);
                    check(&l);
                }
            }
        }
    }
}

static void check_bounds(const layout *l)
{
    int wrong = 0;
    for (int q = 0; q < l->rows; q++) {
        const int d = qs_attention_document(l->cu, l->n_docs, q);
        wrong += d < 0 || d >= l->n_docs || l->cu[d] > q || q >= l->cu[d + 1];
        wrong += q > 0 && (l->first[q] < l->first[q - 1] || l->last[q] < l->last[q - 1]);
        for (int k = 0; k < l->rows; k++) {
            wrong += qs_attention_within(l->first[q], q, k) != l->visible[q][k];
            wrong += qs_attention_within(k, l->last[k], q) != l->visible[q][k];
        }
    }
    cr_assert_eq(wrong, 0, "%d rows, %d documents, window %d: %d wrong", l->rows, l->n_docs,
                 l->window, wrong);
}

Test(core_attention_tiles, bounds_are_the_definition_of_visible)
{
    for_all(check_bounds);
}

/* Visible pairs of existing rows in a tile, and pairs of an existing query or key with any row. */
typedef struct {
    int visible, pairs;
} tile_count;

static tile_count count_pairs(const layout *l, int query, int queries, int key, int keys)
{
    tile_count c = {0, 0};
    for (int q = query; q < query + queries; q++) {
        for (int k = key; k < key + keys; k++) {
            if (q < l->rows && k < l->rows) {
                c.visible += l->visible[q][k];
            }
            c.pairs++;
        }
    }
    return c;
}

static int clamp(const layout *l, int row)
{
    return row < l->rows ? row : l->rows - 1;
}

/* A block of queries goes over the tiles that hold a pair, and over no other. */
static int wrong_key_tiles(const layout *l, int own, int other)
{
    int wrong = 0;
    for (int q = 0; q < l->rows; q += own) {
        const qs_attention_span span =
            qs_attention_tiles(l->first[q], clamp(l, q + own - 1), other);
        for (int tile = 0; tile * other < l->rows + other; tile++) {
            const tile_count c = count_pairs(l, q, own, tile * other, other);
            wrong += (c.visible > 0) != (tile >= span.begin && tile < span.end);
        }
    }
    return wrong;
}

static int wrong_query_tiles(const layout *l, int own, int other)
{
    int wrong = 0;
    for (int k = 0; k < l->rows; k += own) {
        const qs_attention_span span = qs_attention_tiles(k, l->last[clamp(l, k + own - 1)], other);
        for (int tile = 0; tile * other < l->rows + other; tile++) {
            const tile_count c = count_pairs(l, tile * other, other, k, own);
            wrong += (c.visible > 0) != (tile >= span.begin && tile < span.end);
        }
    }
    return wrong;
}

/* NONE and ALL exactly where they are true, for tiles of existing rows; where a tile ends behind
 * the last row, ALL is never said of keys that do not exist. */
static int wrong_views(const layout *l, int queries, int keys)
{
    int wrong = 0;
    for (int q = 0; q < l->rows; q++) {
        for (int k = 0; k < l->rows; k++) {
            const tile_count c = count_pairs(l, q, queries, k, keys);
            const int q_last = q + queries - 1, k_last = k + keys - 1;
            const bool inside = q_last < l->rows && k_last < l->rows;
            const qs_attention_view view[2] = {
                qs_attention_view_of_keys(q, q_last, l->first[q], l->first[clamp(l, q_last)], k,
                                          k_last),
                qs_attention_view_of_queries(k, k_last, l->last[k], l->last[clamp(l, k_last)], q,
                                             q_last)};
            for (int i = 0; i < 2; i++) {
                wrong += view[i] == QS_ATTENTION_NONE && c.visible > 0;
                wrong += view[i] == QS_ATTENTION_ALL && k_last >= l->rows;
                if (inside) {
                    wrong += (view[i] == QS_ATTENTION_NONE) != (c.visible == 0);
                    wrong += (view[i] == QS_ATTENTION_ALL) != (c.visible == c.pairs);
                } else if (view[i] == QS_ATTENTION_ALL) {
                    for (int t = q; t < l->rows && t <= q_last; t++) {
                        wrong += count_pairs(l, t, 1, k, keys).visible != keys;
                    }
                }
            }
        }
    }
    return wrong;
}

static void check_tiles(const layout *l)
{
    for (int own = 1; own <= MAX_TILE; own++) {
        for (int other = 1; other <= MAX_TILE; other++) {
            const int keys = wrong_key_tiles(l, own, other);
            const int queries = wrong_query_tiles(l, own, other);
            const int views = wrong_views(l, own, other);
            cr_assert(keys == 0 && queries == 0 && views == 0,
                      "%d rows, %d documents, window %d, tiles of %d and %d: %d, %d, %d wrong",
                      l->rows, l->n_docs, l->window, own, other, keys, queries, views);
        }
    }
}

Test(core_attention_tiles, tiles_are_visited_exactly_where_a_pair_is_visible)
{
    for_all(check_tiles);
}

Test(core_attention_tiles, blocks_are_all_tiles_and_heads_once)
{
    for (int tiles = 1; tiles <= 5; tiles++) {
        for (int heads = 1; heads <= 5; heads++) {
            for (int late = 0; late < 2; late++) {
                int seen[5][5] = {{0}};
                for (int i = 0; i < tiles * heads; i++) {
                    const qs_attention_block at = qs_attention_block_at(i, tiles, heads, late == 1);
                    const int tile = late == 1 ? tiles - 1 - i / heads : i / heads;
                    cr_assert(at.tile == tile && at.head >= 0 && at.head < heads);
                    seen[at.tile][at.head]++;
                }
                for (int i = 0; i < tiles * heads; i++) {
                    cr_assert_eq(seen[i / heads][i % heads], 1);
                }
            }
        }
    }
}

/* The 32 banks of 4 bytes are 8 places for a chunk: ldmatrix reads 8 rows of a chunk at once. */
Test(core_attention_tiles, eight_rows_of_a_chunk_lie_in_eight_banks)
{
    for (int chunks = 4; chunks <= 32; chunks += 4) {
        for (int row = 0; row < 64; row++) {
            uint64_t taken = 0;
            for (int chunk = 0; chunk < chunks; chunk++) {
                const int at = qs_attention_chunk(chunks, row, chunk);
                cr_assert(at >= 0 && at < chunks);
                taken |= UINT64_C(1) << at;
                cr_assert_eq(qs_attention_chunk_of(chunks, row, chunk - chunk % 2, chunk % 2), at);
            }
            cr_assert_eq(taken, (UINT64_C(1) << chunks) - 1, "%d chunks, row %d", chunks, row);
        }
        for (int row = 0; row < 64; row += 8) {
            for (int chunk = 0; chunk < chunks; chunk++) {
                unsigned banks = 0;
                for (int r = row; r < row + 8; r++) {
                    banks |= 1U << ((r * chunks + qs_attention_chunk(chunks, r, chunk)) % 8);
                }
                cr_assert_eq(banks, 0xFFU, "%d chunks, row %d, chunk %d", chunks, row, chunk);
            }
        }
    }
}

Test(core_attention_tiles, every_head_dim_has_a_padded_one)
{
    for (int dim = 8; dim <= 256; dim += 8) {
        const int padded = qs_attention_padded_dim(dim);
        cr_assert(padded >= dim && padded % 32 == 0 && padded - dim < 64, "%d: %d", dim, padded);
    }
    cr_assert_eq(qs_attention_padded_dim(264), 0);
}
