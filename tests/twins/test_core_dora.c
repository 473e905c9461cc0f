/* core/dora.h: where columns of a strip lie, and how tokens are cut into blocks and scratch. */
#include <criterion/criterion.h>

#include "kernels/cuda/core/dora.h"

/* Tile j's column n as ldmatrix reads it is the column that a thread of the product holds as
 * element n % 2 of pair j of its eight. */
Test(core_dora, a_tile_holds_the_columns_whose_sums_its_threads_have)
{
    int column_at[QS_DORA_STRIP];
    bool seen[QS_DORA_STRIP] = {false};
    for (int thread = 0; thread < 4; thread++) {
        for (int pair = 0; pair < 4; pair++) {
            for (int i = 0; i < 2; i++) {
                const int at = 2 * qs_dora_word(thread, pair) + i;
                cr_assert(at >= 0 && at < QS_DORA_STRIP && !seen[at]);
                seen[at] = true;
                column_at[at] = 8 * thread + 2 * pair + i;
            }
        }
    }
    for (int tile = 0; tile < QS_DORA_TILES; tile++) {
        for (int n = 0; n < 8; n++) { /* sums of tile: thread n / 2 has columns n, n + 1 */
            cr_assert_eq(column_at[8 * tile + n], 8 * (n / 2) + 2 * tile + n % 2);
        }
    }
}

/* Eight rows of 16 bytes, as ldmatrix takes them at once, touch each bank once. */
Test(core_dora, rows_of_a_strip_lie_in_different_banks)
{
    bool bank[32] = {false};
    for (int row = 0; row < 8; row++) {
        cr_assert_eq(row * QS_DORA_WORDS % 4, 0);
        for (int word = 0; word < 4; word++) {
            bool *one = &bank[(row * QS_DORA_WORDS + word) % 32];
            cr_assert_not(*one);
            *one = true;
        }
    }
}

Test(core_dora, blocks_cover_the_tokens_and_fit)
{
    for (int64_t rows = 1; rows <= 3 * QS_DORA_TOKENS_MAX + 70; rows++) {
        const int64_t each = qs_dora_block_rows(rows);
        cr_assert(each >= 1 && each <= rows && each <= QS_DORA_TOKENS_MAX);
        const int64_t blocks = (rows + each - 1) / each;
        cr_assert_eq(blocks, (rows + QS_DORA_TOKENS_MAX - 1) / QS_DORA_TOKENS_MAX, "%d", (int)rows);
        cr_assert(blocks == 1 || each % QS_DORA_SUM_ROWS == 0);
        cr_assert_geq(2 * (rows - (blocks - 1) * each), blocks == 1 ? 0 : each, "%d", (int)rows);
    }
    cr_assert_eq(qs_dora_block_rows(0), 1);
}

Test(core_dora, scratch_holds_every_block)
{
    static const int64_t tokens[] = {1, 63, 64, 65, 2048, 2049, 5000}, widest[] = {1, 8, 333, 4096};
    for (int t = 0; t < 7; t++) {
        for (int w = 0; w < 4; w++) {
            const qs_dora_scratch s = qs_dora_scratch_of(tokens[t], widest[w], 24);
            for (int64_t rows = 1; rows <= tokens[t]; rows += 1 + rows / 7) {
                const int64_t each = qs_dora_block_rows(rows);
                const int64_t wide = qs_rows_stride(widest[w]);
                cr_assert_leq((size_t)(each * qs_border_stride(widest[w], 24) * 2), s.operand);
                cr_assert_leq((size_t)(each * wide * 4), s.product);
                cr_assert_leq((size_t)((each + QS_DORA_SUM_ROWS - 1) / QS_DORA_SUM_ROWS * wide * 4),
                              s.sums);
            }
            cr_assert_eq(s.operand % 256 + s.product % 256 + s.sums % 256, 0);
            cr_assert_eq(s.total, s.operand + s.product + s.sums);
        }
    }
}
