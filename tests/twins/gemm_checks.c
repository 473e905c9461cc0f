#include "gemm_checks.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef enum { NO_C0, C0_APART, C0_IN_PLACE, N_C0 } c0_kind;

typedef struct {
    int64_t m, n, k;
    bool a_transposed, b_transposed;
    int64_t pad;
    c0_kind c0;
    qs_dtype c_dtype;
} gemm_case;

static double at(const tw_mat *x, bool transposed, int64_t row, int64_t col)
{
    return transposed ? fx_at(&x->host, col, row) : fx_at(&x->host, row, col);
}

/* The element, and what fp32 sums in any order, and one rounding, may be off by. */
static double want_of(const gemm_case *t, const tw_mat *a, const tw_mat *b, const tw_mat *c0,
                      double alpha, int64_t row, int64_t col, double *limit)
{
    double sum = 0.0, size = 0.0;
    for (int64_t p = 0; p < t->k; p++) {
        const double term = at(a, t->a_transposed, row, p) * at(b, t->b_transposed, p, col);
        sum += term;
        size += fabs(term);
    }
    const double added = t->c0 == NO_C0 ? 0.0 : fx_at(&c0->host, row, col);
    const double want = alpha * sum + added;
    const double rounded = fabs(want) + (t->c0 == NO_C0 ? 0.0 : fabs(alpha * sum));
    *limit = ((double)t->k + 3.0) * 0x1p-24 * (fabs(alpha) * size + fabs(added)) +
             (t->c_dtype == QS_BF16 ? 0x1.01p-8 * rounded : 0.0);
    return want;
}

static float *run(const tw_backend *b, const gemm_case *t, const qs_gemm_call *call, qs_mat *c)
{
    cr_assert_eq(b->plugin->gemm(b->queue, call), QS_OK, "%s", qs_error_text());
    cr_assert(tw_gap_intact(b, c), "m=%d n=%d k=%d pad=%d: the gap", (int)t->m, (int)t->n,
              (int)t->k, (int)t->pad);
    return tw_mat_read(b, c);
}

static void check(const tw_backend *b, const gemm_case *t)
{
    const float alpha = 0.75F;
    tw_mat x = tw_mat_make_as(b, QS_BF16, t->a_transposed ? t->k : t->m,
                              t->a_transposed ? t->m : t->k, t->pad, 1.0F, 1);
    tw_mat y = tw_mat_make_as(b, QS_BF16, t->b_transposed ? t->n : t->k,
                              t->b_transposed ? t->k : t->n, (t->pad + 5) % 16, 1.0F, 2);
    /* One more row and column than the product may need: something is there even if m or n is 0. */
    const int64_t more = t->n == 0;
    tw_mat c0 = tw_mat_make_as(b, t->c_dtype, t->m + 1, t->n, t->pad + more, 1.0F, 3);
    tw_mat c = tw_mat_make_as(b, t->c_dtype, t->m + 1, t->n, (t->pad + 8) % 16 + more, 1.0F, 4);
    c0.device.rows = c.device.rows = t->m;
    qs_gemm_call call = {.m = t->m,
                         .n = t->n,
                         .k = t->k,
                         .alpha = alpha,
                         .a = x.device.data != NULL ? x.device.data : c.device.data,
                         .b = y.device.data != NULL ? y.device.data : c.device.data,
                         .a_stride = x.device.stride,
                         .b_stride = y.device.stride,
                         .a_transposed = t->a_transposed,
                         .b_transposed = t->b_transposed,
                         .c0 = t->c0 == NO_C0 ? NULL : c0.device.data,
                         .c0_stride = t->c0 == NO_C0 ? 0 : c0.device.stride,
                         .c = c.device.data,
                         .c_stride = c.device.stride,
                         .c_dtype = t->c_dtype};
    qs_mat *result = &c.device;
    if (t->c0 == C0_IN_PLACE) {
        call.c = c0.device.data;
        call.c_stride = c0.device.stride;
        result = &c0.device;
    }
    float *got = run(b, t, &call, result);
    for (int64_t row = 0; row < t->m; row++) {
        for (int64_t col = 0; col < t->n; col++) {
            double limit;
            const double want = want_of(t, &x, &y, &c0, (double)alpha, row, col, &limit);
            const double is = (double)got[row * t->n + col];
            cr_assert(fabs(is - want) <= limit,
                      "%s m=%d n=%d k=%d %c%c pad=%d c0=%d %s: (%d, %d) is %.9g, not %.9g (limit "
                      "%.3g)",
                      b->name, (int)t->m, (int)t->n, (int)t->k, t->a_transposed ? 't' : 'n',
                      t->b_transposed ? 't' : 'n', (int)t->pad, (int)t->c0,
                      qs_dtype_name(t->c_dtype), (int)row, (int)col, is, want, limit);
        }
    }
    if (t->c0 != C0_IN_PLACE) { /* the same bits again */
        float *again = run(b, t, &call, result);
        cr_assert_eq(memcmp(got, again, (size_t)(t->m * t->n) * sizeof *got), 0);
        free(again);
    }
    free(got);
    tw_mat_free(b, &x);
    tw_mat_free(b, &y);
    tw_mat_free(b, &c0);
    tw_mat_free(b, &c);
}

static void for_all(const tw_backend *b, int64_t m, int64_t n, int64_t k)
{
    static const int64_t pads[] = {0, 3, 8};
    for (int flags = 0; flags < 4; flags++) {
        for (int p = 0; p < 3; p++) {
            for (int c0 = NO_C0; c0 < N_C0; c0++) {
                for (int f32 = 0; f32 < 2; f32++) {
                    check(b, &(gemm_case){.m = m,
                                          .n = n,
                                          .k = k,
                                          .a_transposed = flags & 1,
                                          .b_transposed = flags & 2,
                                          .pad = pads[p],
                                          .c0 = (c0_kind)c0,
                                          .c_dtype = f32 ? QS_F32 : QS_BF16});
                }
            }
        }
    }
}

void gemm_check_layouts(const tw_backend *b)
{
    static const int64_t sizes[][3] = {{1, 1, 1},   {1, 16, 8},   {3, 5, 7},
                                       {16, 8, 64}, {17, 24, 33}, {33, 40, 130}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        for_all(b, sizes[i][0], sizes[i][1], sizes[i][2]);
    }
}

void gemm_check_long_sums(const tw_backend *b)
{
    check(b, &(gemm_case){16, 40, 3000, true, false, 0, NO_C0, QS_F32});
    check(b, &(gemm_case){40, 16, 3001, true, false, 8, C0_IN_PLACE, QS_F32});
}

void gemm_check_zeros(const tw_backend *b)
{
    for_all(b, 0, 5, 7);
    for_all(b, 5, 0, 7);
    for_all(b, 5, 7, 0); /* c0, or zeros; the gap stays */
    for_all(b, 0, 0, 0);
}

void gemm_check_many_shapes(const tw_backend *b)
{
    for (int round = 0; round < 2; round++) {
        for (int64_t m = 1; m <= 300; m++) {
            check(b, &(gemm_case){m, 8, 8, false, true, 0, NO_C0, QS_BF16});
        }
    }
}

void gemm_check_mistakes(const tw_backend *b)
{
    uint16_t none[64];
    memset(none, 0, sizeof none);
    void *x = tw_upload(b, none, sizeof none);
    const qs_gemm_call good = {.m = 4,
                               .n = 4,
                               .k = 4,
                               .alpha = 1.0F,
                               .a = x,
                               .b = x,
                               .a_stride = 4,
                               .b_stride = 4,
                               .c = x,
                               .c_stride = 4,
                               .c_dtype = QS_BF16};
    qs_gemm_call bad = good;
    bad.a_stride = 3;
    cr_assert_eq(b->plugin->gemm(b->queue, &bad), QS_ERR_BUG);
    bad = good;
    bad.c_stride = 3;
    cr_assert_eq(b->plugin->gemm(b->queue, &bad), QS_ERR_BUG);
    bad = good;
    bad.c_dtype = QS_F16;
    cr_assert_eq(b->plugin->gemm(b->queue, &bad), QS_ERR_BUG);
    qs_error_clear();
    tw_free(b, x);
}
