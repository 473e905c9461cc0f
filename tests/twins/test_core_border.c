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

/* Linears of one matrix [rows of all + adapters, in + border]. */
typedef struct {
    int count;
    int64_t out[3], in;
    int rank[3]; /* 0: no adapter */
    int64_t width, border, rows, stride;
    int64_t row[3], at[3]; /* where each and its adapter begin */
} joined;

static joined joined_of(int count, const int64_t *out, int64_t in, const int *rank, int64_t width)
{
    joined j = {.count = count, .in = in, .width = width};
    for (int i = 0; i < count; i++) {
        j.out[i] = out[i];
        j.rank[i] = rank[i];
        j.row[i] = j.rows;
        j.at[i] = j.border;
        j.rows += out[i];
        j.border += rank[i] > 0 ? width : 0;
    }
    j.stride = qs_border_stride(in, j.border);
    return j;
}

/* A and B of linear i hold a number of their own in each element. */
static int element_of(int i, bool b, int64_t at)
{
    return 1 + (int)at + 10000 * (2 * i + b);
}

/* What linear i writes. */
static void fill(const joined *j, int i, int *matrix, int *writes)
{
    const bool adapted = j->rank[i] > 0;
    const qs_border_linear l = {j->out[i],
                                j->in,
                                j->stride,
                                j->border,
                                j->rows - j->row[i] + j->at[i],
                                adapted ? (int)j->width : 0,
                                (int)j->at[i],
                                j->rank[i]};
    const int64_t elems = qs_border_elems(j->rows, j->in, j->border);
    for (int64_t g = 0; g < qs_border_groups(&l); g++) {
        const qs_border_group group = qs_border_group_at(g, &l);
        const bool b = group.source == QS_BORDER_B;
        const int64_t at = j->row[i] * j->stride + group.at;
        const int64_t there = b ? j->out[i] * j->rank[i] : j->rank[i] * j->in;
        cr_assert(at >= 0 && at + 8 <= elems);
        cr_assert(group.taken >= 0 && group.taken <= 8);
        cr_assert(group.taken == 0 || (group.from >= 0 && group.from + group.taken <= there));
        cr_assert(at % 8 == 0 || (b && j->in % 8 != 0), "off 16 bytes");
        for (int k = 0; k < 8; k++) {
            matrix[at + k] = k < group.taken ? element_of(i, b, group.from + k) : 0;
            writes[at + k]++;
        }
    }
}

/* The linear whose rows, or whose adapter's rows or columns, hold number `n`; -1: none. */
static int owner_of(const joined *j, const int64_t *begin, int64_t n, bool adapters)
{
    for (int i = 0; i < j->count; i++) {
        const int64_t size = adapters ? j->rank[i] : j->out[i];
        if (n >= begin[i] && n < begin[i] + size) {
            return i;
        }
    }
    return -1;
}

/* What belongs into a cell around W. */
static int wanted(const joined *j, int64_t row, int64_t col)
{
    const int by_row = owner_of(j, j->row, row, false);
    const int by_col = owner_of(j, j->at, col - j->in, true);
    const int below = owner_of(j, j->at, row - j->rows, true);
    if (by_row >= 0 && by_row == by_col) {
        const int64_t k = col - j->in - j->at[by_row];
        return element_of(by_row, true, (row - j->row[by_row]) * j->rank[by_row] + k);
    }
    if (below >= 0 && col < j->in) {
        return element_of(below, false, (row - j->rows - j->at[below]) * j->in + col);
    }
    return 0;
}

/* Every cell around W once, W never; of what fills a row up, only as much as groups reach into. */
static void check(const joined *j)
{
    const int64_t elems = qs_border_elems(j->rows, j->in, j->border);
    int *writes = matrix_of(elems), *matrix = matrix_of(elems);
    for (int i = 0; i < j->count; i++) {
        fill(j, i, matrix, writes);
    }
    for (int64_t row = 0; row < j->rows + j->border; row++) {
        for (int64_t col = 0; col < j->stride; col++) {
            const int64_t at = row * j->stride + col;
            const bool is_w = row < j->rows && col < j->in, inside = col < j->in + j->border;
            const bool filling = row >= j->rows && !inside && col < (j->in + j->border + 7) / 8 * 8;
            cr_assert_eq(writes[at], (inside && !is_w) || filling ? 1 : 0,
                         "%d linears, %lld x %lld border %lld: cell %lld, %lld written %d times",
                         j->count, (long long)j->rows, (long long)j->in, (long long)j->border,
                         (long long)row, (long long)col, writes[at]);
            cr_assert_eq(matrix[at], wanted(j, row, col), "cell %lld, %lld", (long long)row,
                         (long long)col);
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
                for (int beyond = 0; beyond <= 8; beyond += 8) { /* another has the larger rank */
                    const joined j = joined_of(1, &out, in, &rank, qs_border_width(rank) + beyond);
                    check(&j);
                }
            }
        }
    }
}

/* Two and three in one matrix; any of them may have no adapter. */
Test(core_border, every_cell_of_joined_linears_once)
{
    static const int64_t out[][3] = {{5, 1, 9}, {1, 8, 3}, {7, 7, 7}};
    static const int ranks[][3] = {{3, 8, 1}, {8, 8, 8}, {0, 5, 2}, {5, 0, 2},
                                   {5, 2, 0}, {0, 0, 7}, {4, 0, 0}};
    for (int o = 0; o < 3; o++) {
        for (int64_t in = 1; in <= 18; in++) {
            for (int r = 0; r < 7; r++) {
                for (int count = 2; count <= 3; count++) {
                    for (int64_t width = 8; width <= 16; width += 8) {
                        const joined j = joined_of(count, out[o], in, ranks[r], width);
                        check(&j);
                    }
                }
            }
        }
    }
}

Test(core_border, nothing_without_adapters)
{
    const qs_border_linear none = {.out = 5, .in = 7, .stride = 64};
    cr_assert_eq(qs_border_groups(&none), 0);
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
