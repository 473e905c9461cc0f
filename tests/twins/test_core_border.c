/* The bordered matrix: every cell around W is written once, with what belongs there, W is not, and
 * the two products come out of it. */
#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/core/border.h"

Test(core_border, widths)
{
    cr_assert_eq(qs_border_width(0), 0);
    for (int rank = 1; rank <= 256; rank++) {
        const int64_t border = qs_border_width(rank);
        cr_assert(border >= rank && border < rank + 8 && border % 8 == 0, "rank %d", rank);
        for (int64_t in = 1; in <= 40; in++) {
            const int64_t stride = qs_border_stride(in, border);
            cr_assert(stride >= in + border && stride < in + border + 64 && stride % 64 == 0);
        }
    }
}

static int *matrix_of(int64_t elems)
{
    int *m = calloc((size_t)elems + 1, sizeof *m);
    cr_assert_not_null(m);
    return m;
}

/* A and B hold a number of their own in each element. */
static int *fill(int64_t out, int64_t in, int64_t border, int rank, int *writes)
{
    int *matrix = matrix_of(qs_border_elems(out, in, border));
    for (int64_t i = 0; i < qs_border_groups(out, in, border); i++) {
        const qs_border_group group = qs_border_group_at(i, out, in, border, rank);
        const bool b = group.source == QS_BORDER_B;
        cr_assert(group.at >= 0 && group.at + 8 <= qs_border_elems(out, in, border));
        cr_assert(group.taken >= 0 && group.taken <= 8);
        cr_assert(group.taken == 0 ||
                  (group.from >= 0 && group.from + group.taken <= (b ? out * rank : rank * in)));
        cr_assert(group.at % 8 == 0 || (b && in % 8 != 0), "off 16 bytes");
        for (int k = 0; k < 8; k++) {
            const int from = (int)group.from + k;
            matrix[group.at + k] = k >= group.taken ? 0 : b ? 1000 + from : 100000 + from;
            writes[group.at + k]++;
        }
    }
    return matrix;
}

/* Every cell around W once, W never; of what fills a row up, only as much as groups reach into. */
static void check(int64_t out, int64_t in, int64_t border, int rank)
{
    const int64_t stride = qs_border_stride(in, border);
    int *writes = matrix_of(qs_border_elems(out, in, border));
    int *matrix = fill(out, in, border, rank, writes);
    for (int64_t i = 0; i < out + border; i++) {
        for (int64_t j = 0; j < stride; j++) {
            const int64_t at = i * stride + j;
            const bool is_w = i < out && j < in, inside = j < in + border;
            const bool filling = i >= out && !inside && j < (in + border + 7) / 8 * 8;
            int want = 0;
            if (i < out && j >= in && j < in + rank) {
                want = 1000 + (int)(i * rank + j - in); /* B[i][j - in] */
            } else if (i >= out && i < out + rank && j < in) {
                want = 100000 + (int)((i - out) * in + j); /* A[i - out][j] */
            }
            cr_assert_eq(writes[at], (inside && !is_w) || filling ? 1 : 0,
                         "%lld x %lld border %lld rank %d: cell %lld, %lld written %d times",
                         (long long)out, (long long)in, (long long)border, rank, (long long)i,
                         (long long)j, writes[at]);
            cr_assert_eq(matrix[at], want);
        }
    }
    free(matrix);
    free(writes);
}

Test(core_border, every_cell_once)
{
    for (int64_t out = 0; out <= 9; out++) {
        for (int64_t in = 1; in <= 18; in++) {
            for (int rank = 1; rank <= 17; rank++) {
                const int64_t border = qs_border_width(rank);
                check(out, in, border, rank);
                check(out, in, border + 8, rank); /* another linear has the larger rank */
            }
        }
    }
}

Test(core_border, nothing_without_adapters)
{
    cr_assert_eq(qs_border_groups(5, 7, 0), 0);
    cr_assert_eq(qs_border_elems(5, 7, 0), 5 * 64);
}

Test(core_border, usable_only_with_room_and_whole_pieces)
{
    cr_assert(qs_border_usable(4096, 64, 72, 8));
    cr_assert(qs_border_usable(4096, 64, 200, 8));
    cr_assert_not(qs_border_usable(4096, 64, 71, 8), "no room");
    cr_assert_not(qs_border_usable(4096, 64, 64, 8), "no room");
    cr_assert_not(qs_border_usable(4096, 64, 73, 8), "rows off 16 bytes");
    cr_assert_not(qs_border_usable(4096, 63, 80, 8), "a border off 16 bytes");
    cr_assert_not(qs_border_usable(4098, 64, 72, 8), "a matrix off 16 bytes");
}
