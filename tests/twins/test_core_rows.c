/* Who touches which element (kernels/cuda/core/rows.h): everything once, nothing beside it. */
#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/core/rows.h"

/* ---- tiles ---- */

static void check_tiles(int64_t rows, int64_t groups)
{
    const qs_row_tiles t = qs_row_tiles_make(rows, groups);
    uint8_t *visits = calloc((size_t)(rows * groups), 1);
    cr_assert_not_null(visits);
    cr_assert(t.blocks_x >= 1 && t.blocks_x < INT32_MAX && t.blocks_y >= 1 &&
              t.blocks_y <= QS_ROW_BLOCKS_Y_MAX);
    for (int64_t y = 0; y < t.blocks_y; y++) {
        for (int64_t x = 0; x < t.blocks_x; x++) {
            for (int thread = 0; thread < QS_ROW_THREADS; thread++) {
                const int64_t group = qs_row_group(&t, x, thread);
                for (int64_t row = qs_row_first(&t, y, thread); row < rows && group < groups;
                     row += qs_row_step(&t)) {
                    visits[row * groups + group]++;
                }
            }
        }
    }
    for (int64_t i = 0; i < rows * groups; i++) {
        cr_assert_eq(visits[i], 1, "%lld x %lld: row %lld, group %lld is visited %d times",
                     (long long)rows, (long long)groups, (long long)(i / groups),
                     (long long)(i % groups), visits[i]);
    }
    free(visits);
}

Test(core_rows, tiles_visit_every_group_once)
{
    for (int64_t rows = 1; rows <= 40; rows++) {
        for (int64_t groups = 1; groups <= 70; groups++) {
            check_tiles(rows, groups);
        }
    }
    const int64_t edge[] = {127, 128, 129, 255, 256, 257, 511, 512, 513, 1000, 3584};
    for (size_t i = 0; i < sizeof edge / sizeof *edge; i++) {
        check_tiles(1, edge[i]);
        check_tiles(3, edge[i]);
        check_tiles(edge[i], 1);
        check_tiles(edge[i], 3);
    }
}

Test(core_rows, more_rows_than_a_grid_has_blocks_are_taken_in_turns)
{
    check_tiles(QS_ROW_BLOCKS_Y_MAX + 2, 256);
    check_tiles((int64_t)QS_ROW_BLOCKS_Y_MAX * QS_ROW_THREADS + 300, 1);
}

Test(core_rows, tiles_of_narrow_rows_leave_at_most_half_of_their_threads_idle)
{
    for (int64_t groups = 1; groups <= QS_ROW_THREADS; groups++) {
        const qs_row_tiles t = qs_row_tiles_make(1000, groups);
        cr_assert_eq(t.blocks_x, 1);
        cr_assert_lt((1 << t.log2), 2 * groups);
    }
}

/* ---- alignment ---- */

Test(core_rows, vectors_need_start_stride_and_length_in_whole_pieces)
{
    cr_assert(qs_rows_are_vectors((void *)256, 64, 64));
    cr_assert(qs_rows_are_vectors((void *)256, 72, 64));
    cr_assert(qs_rows_are_vectors(NULL, 8, 0));
    cr_assert_not(qs_rows_are_vectors((void *)258, 64, 64));
    cr_assert_not(qs_rows_are_vectors((void *)264, 64, 64));
    cr_assert_not(qs_rows_are_vectors((void *)256, 65, 64));
    cr_assert_not(qs_rows_are_vectors((void *)256, 64, 63));
}

Test(core_rows, copies_go_as_wide_as_addresses_and_length_allow)
{
    for (uint64_t a = 0; a < 64; a++) {
        for (uint64_t b = 0; b < 64; b++) {
            const uint64_t width = (uint64_t)qs_copy_width(a | b);
            cr_assert(a % width == 0 && b % width == 0);
            cr_assert(width == 16 || (a | b) % 16 != 0);
            cr_assert(width >= 4 || (a | b) % 4 != 0);
            cr_assert(width >= 2 || (a | b) % 2 != 0);
        }
    }
}

/* ---- rotary pairs ---- */

static void check_rope_pairs(int width, int half, int heads, int head_dim)
{
    int visits[5 * (2 * 16 + 2) * QS_VECTOR] = {0};
    for (int64_t group = 0; group < (int64_t)heads * (half / width); group++) {
        const qs_rope_pair p = qs_rope_pair_at(group, head_dim, half, width);
        cr_assert_eq(p.high, p.low + half);
        cr_assert_eq(p.angle, p.low % head_dim, "the angle is the place in the head");
        cr_assert_eq(p.angle % width, 0);
        for (int i = 0; i < width; i++) {
            visits[p.low + i]++;
            visits[p.high + i]++;
        }
    }
    for (int i = 0; i < heads * head_dim; i++) {
        cr_assert_eq(visits[i], i % head_dim < 2 * half,
                     "half %d of %d, %d heads: column %d, %d times", half, head_dim, heads, i,
                     visits[i]);
    }
}

Test(core_rows, rope_turns_every_pair_of_every_head_once)
{
    for (int width = 1; width <= QS_VECTOR; width += QS_VECTOR - 1) {
        for (int half = width; half <= 16 * width; half += width) {
            for (int heads = 1; heads <= 5; heads++) {
                for (int rest = 0; rest <= 2 * width; rest += width) {
                    check_rope_pairs(width, half, heads, 2 * half + rest);
                }
            }
        }
    }
}

/* ---- search ---- */

Test(core_rows, a_row_is_found_where_it_is_and_nowhere_else)
{
    enum { ROWS = 10 };
    for (unsigned set = 0; set < 1U << ROWS; set++) { /* every ascending list below ROWS */
        int32_t index[ROWS];
        int64_t count = 0;
        for (int row = 0; row < ROWS; row++) {
            if (set >> row & 1U) {
                index[count++] = row;
            }
        }
        for (int64_t row = 0; row < ROWS; row++) {
            const int64_t at = qs_row_find(index, count, row);
            if (set >> row & 1U) {
                cr_assert(at >= 0 && at < count && index[at] == row);
            } else {
                cr_assert_eq(at, -1);
            }
        }
    }
}
