/* How thin products are cut, and where their tiles lie in shared memory. */
#include <criterion/criterion.h>
#include <string.h>

#include "kernels/cuda/core/thin.h"

static void check_cut(int64_t wide, int64_t depth)
{
    const qs_thin_cut cut = qs_thin_cut_of(wide, depth);
    cr_assert(cut.tiles * QS_THIN_WIDE >= wide && (cut.tiles - 1) * QS_THIN_WIDE < wide);
    cr_assert(cut.chunks * QS_THIN_DEPTH >= depth && (cut.chunks - 1) * QS_THIN_DEPTH < depth);
    /* Every chunk is in one split, and none is empty. */
    cr_assert_geq(cut.splits, 1);
    cr_assert_lt((cut.splits - 1) * cut.per_split, cut.chunks);
    cr_assert_geq(cut.splits * cut.per_split, cut.chunks);
    if (cut.splits > 1) {
        cr_assert_leq(cut.tiles * cut.splits, QS_THIN_BLOCKS, "%lld x %lld", (long long)wide,
                      (long long)depth);
        cr_assert_geq(cut.per_split, QS_THIN_CHUNKS);
    } else {
        /* All is done by one block a tile where these are many, or the depth is short. */
        cr_assert(2 * cut.tiles > QS_THIN_BLOCKS || cut.chunks < 2 * QS_THIN_CHUNKS);
    }
}

Test(core_thin, every_chunk_has_a_block)
{
    for (int64_t wide = 1; wide < 40000; wide += 1 + wide / 7) {
        for (int64_t depth = 1; depth < 140000; depth += 1 + depth / 5) {
            check_cut(wide, depth);
        }
    }
    check_cut(INT64_C(1) << 36, 8);
    check_cut(8, INT64_C(1) << 36);
}

Test(core_thin, a_large_model_fills_the_card)
{
    static const int64_t wide[] = {1024, 4096, 6144, 14336, 28672}, depth[] = {4096, 14336, 28672};
    for (size_t i = 0; i < sizeof wide / sizeof *wide; i++) {
        for (size_t j = 0; j < sizeof depth / sizeof *depth; j++) {
            const qs_thin_cut cut = qs_thin_cut_of(wide[i], depth[j]);
            const bool full = 4 * cut.tiles * cut.splits >= 3 * QS_THIN_BLOCKS;
            cr_assert(full || cut.per_split <= 2 * QS_THIN_CHUNKS, "%lld x %lld: %lld blocks",
                      (long long)wide[i], (long long)depth[j], (long long)cut.tiles * cut.splits);
        }
    }
}

/* Pieces of a tile: each has a place of its own, and the eight that ldmatrix reads together lie in
 * eight different sixteens of 128 bytes. */
static void check_places(int pieces)
{
    enum { ROWS = 128, MOST = 16 };
    bool used[ROWS * MOST];
    memset(used, 0, sizeof used);
    for (int row = 0; row < ROWS; row++) {
        for (int piece = 0; piece < pieces; piece++) {
            const int at = qs_thin_at(pieces, row, piece);
            cr_assert(at % 8 == 0 && at / 8 < ROWS * pieces && !used[at / 8]);
            used[at / 8] = true;
        }
    }
    for (int row = 0; row < ROWS; row += 8) {
        for (int piece = 0; piece < pieces; piece++) {
            unsigned banks = 0;
            for (int i = 0; i < 8; i++) {
                banks |= 1U << qs_thin_at(pieces, row + i, piece) / 8 % 8;
            }
            cr_assert_eq(banks, 0xffU, "%d pieces, row %d, piece %d", pieces, row, piece);
        }
    }
}

Test(core_thin, pieces_lie_apart)
{
    check_places(2);
    check_places(4);
    check_places(8);
    check_places(16);
}
