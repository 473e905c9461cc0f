/* kernels/cuda/core/gemm_map.h: a column-major product, called as the map says, gives the row-major
 * product that was asked for. The column-major one is written here as BLAS defines it. */
#include <criterion/criterion.h>
#include <stdlib.h>

#include "kernels/cuda/core/gemm_map.h"

enum { MOST = 4, PADS = 3, CELLS = MOST * (MOST + PADS) };

/* D = op(A) op(B) + C in column-major terms: A lies as [a->rows, a->cols] with leading dimension
 * a->ld, and so on. Small integers, so that sums are exact. */
static void column_major(const qs_gemm_map *map, int64_t k, const int *a, const int *b,
                         const int *c, int64_t c_ld, int *d, int64_t d_ld)
{
    const qs_gemm_operand *x = &map->first, *y = &map->second;
    cr_assert_eq(x->transposed ? x->cols : x->rows, map->rows);
    cr_assert_eq(x->transposed ? x->rows : x->cols, k);
    cr_assert_eq(y->transposed ? y->cols : y->rows, k);
    cr_assert_eq(y->transposed ? y->rows : y->cols, map->cols);
    cr_assert_geq(x->ld, x->rows);
    cr_assert_geq(y->ld, y->rows);
    for (int64_t row = 0; row < map->rows; row++) {
        for (int64_t col = 0; col < map->cols; col++) {
            int sum = c[row + col * c_ld];
            for (int64_t p = 0; p < k; p++) {
                const int left = x->transposed ? a[p + row * x->ld] : a[row + p * x->ld];
                const int right = y->transposed ? b[col + p * y->ld] : b[p + col * y->ld];
                sum += left * right;
            }
            d[row + col * d_ld] = sum;
        }
    }
}

static void fill(int *x, int seed)
{
    for (int i = 0; i < CELLS; i++) {
        x[i] = (i * 7 + seed * 13) % 23 - 11;
    }
}

static void check(int64_t m, int64_t n, int64_t k, bool a_transposed, bool b_transposed, int pad)
{
    int a[CELLS], b[CELLS], c0[CELLS], c[CELLS];
    fill(a, 1);
    fill(b, 2);
    fill(c0, 3);
    fill(c, 4);
    const int64_t a_stride = (a_transposed ? m : k) + pad;
    const int64_t b_stride = (b_transposed ? k : n) + (pad + 1) % PADS;
    const int64_t c0_stride = n + (pad + 2) % PADS, c_stride = n + pad;
    const qs_gemm_map map =
        qs_gemm_map_make(m, n, k, a_stride, a_transposed, b_stride, b_transposed);
    column_major(&map, k, b, a, c0, c0_stride, c, c_stride); /* B first */
    for (int64_t i = 0; i < m; i++) {
        for (int64_t j = 0; j < n; j++) {
            int want = c0[i * c0_stride + j];
            for (int64_t p = 0; p < k; p++) {
                want += (a_transposed ? a[p * a_stride + i] : a[i * a_stride + p]) *
                        (b_transposed ? b[j * b_stride + p] : b[p * b_stride + j]);
            }
            cr_assert_eq(c[i * c_stride + j], want, "m=%d n=%d k=%d %d %d: (%d, %d)", (int)m,
                         (int)n, (int)k, a_transposed, b_transposed, (int)i, (int)j);
        }
    }
}

Test(core_gemm_map, column_major_code_gives_the_row_major_product)
{
    for (int64_t m = 1; m <= MOST; m++) {
        for (int64_t n = 1; n <= MOST; n++) {
            for (int64_t k = 1; k <= MOST; k++) {
                for (int flags = 0; flags < 4; flags++) {
                    for (int pad = 0; pad < PADS; pad++) {
                        check(m, n, k, flags & 1, flags & 2, pad);
                    }
                }
            }
        }
    }
}

Test(core_gemm_map, alignment_is_that_of_every_row)
{
    cr_assert_eq(qs_gemm_alignment(0x1000, 8, 2), 16);
    cr_assert_eq(qs_gemm_alignment(0x1000, 12, 2), 2);
    cr_assert_eq(qs_gemm_alignment(0x1008, 8, 2), 2);
    cr_assert_eq(qs_gemm_alignment(0x1010, 8, 2), 16);
    cr_assert_eq(qs_gemm_alignment(0x1000, 4, 4), 16);
    cr_assert_eq(qs_gemm_alignment(0x1000, 5, 4), 4);
}
