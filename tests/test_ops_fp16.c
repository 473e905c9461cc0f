/* The fp16 products (kernels/cpu/gemm_fp16.h), on any CPU by way of the portable inner loops, and
 * on one with AVX512-FP16 by the assembly, too. */
#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/dtype.h"
#include "kernels/cpu/gemm_fp16.h"
#include "kernels/cpu/half.h"
#include "ops_fixture.h"

static const char *const tables[] = {"portable", "avx2", "avx512fp16"};

enum { N_TABLES = 2 };

typedef struct {
    fx_weight_spec weight;
    int64_t rows;
} product_case;

static product_case cases[] = {
    {{QS_WEIGHT_NF4, 96, 64, QS_BF16, true, 1, 0}, 0},
    {{QS_WEIGHT_NF4, 96, 64, QS_BF16, true, 1, 0}, 5}, /* one block: W's rounding shows most */
    {{QS_WEIGHT_NF4, 1, 64, QS_BF16, true, 1, 0}, 9},
    {{QS_WEIGHT_NF4, 130, 320, QS_BF16, true, 2, 0}, 37},
    {{QS_WEIGHT_NF4, 300, 704, QS_F16, true, 3, 0}, 15},
    {{QS_WEIGHT_NF4, 65, 1024, QS_F32, false, 5, 0}, 50},
    {{QS_WEIGHT_NF4, 97, 4224, QS_BF16, true, 3, 0}, 20},  /* deeper than a block of k */
    {{QS_WEIGHT_NF4, 4200, 128, QS_BF16, true, 3, 0}, 11}, /* likewise in dX */
};

enum { N_CASES = sizeof cases / sizeof *cases };

/* to = left W^T or left W with the table of the fp16 operations. */
static void multiply(int threads, const fx_unit *unit, bool transposed, const qs_mat *left,
                     qs_mat *to, bool accumulate)
{
    qs_queue *queue = fx_queue(threads);
    const qs_ops *ops = qs_ops_cpu_fp16();
    cr_assert_eq(
        transposed ? ops->linear_forward(queue, &unit->view, &unit->weight, NULL, left, to)
                   : ops->linear_backward(queue, &unit->view, &unit->weight, left, to, accumulate),
        QS_OK);
    cr_assert(fx_mat_gap_intact(to));
    qs_queue_destroy(queue);
}

static double weight_at(const fx_unit *unit, bool transposed, int64_t k, int64_t j)
{
    const int64_t in = unit->weight.in;
    return (double)(transposed ? unit->plain[j * in + k] : unit->plain[k * in + j]);
}

static double to_bf16(double value)
{
    return (double)qs_f32_from_bf16(qs_bf16_from_f32((float)value));
}

/* Squares of one row's differences from fp64, over those of a sum of such terms with random signs
 * (a sum that happens to cancel would say little): of `got`, and of what bf16 operands give at
 * best, summed exactly, rounded to bf16 and added to what is there in bf16. Others train with that.
 */
typedef struct {
    double got, bf16;
} row_errors;

static row_errors errors_of(const fx_unit *unit, bool transposed, const qs_mat *left, int64_t t,
                            const qs_mat *before, const qs_mat *got)
{
    row_errors e = {0, 0};
    double size = 0;
    for (int64_t j = 0; j < got->cols; j++) {
        const double start = before != NULL ? fx_at(before, t, j) : 0.0;
        double sum = 0, bf16 = 0;
        size += start * start;
        for (int64_t k = 0; k < left->cols; k++) {
            const double x = fx_at(left, t, k), w = weight_at(unit, transposed, k, j);
            sum += x * w;
            bf16 += to_bf16(x) * to_bf16(w);
            size += x * w * x * w;
        }
        const double product = to_bf16(bf16), mine = sum - (fx_at(got, t, j) - start);
        const double theirs = start + sum - (before != NULL ? to_bf16(start + product) : product);
        e.got += mine * mine;
        e.bf16 += theirs * theirs;
    }
    return (row_errors){e.got / size, e.bf16 / size};
}

/* Rows of very different sizes, which each have a power of two of their own. */
static qs_mat left_operand(int64_t rows, int64_t cols, uint64_t seed)
{
    qs_mat mat = fx_mat(rows, cols, 3, seed);
    for (int64_t t = 0; t < rows; t++) {
        for (int64_t k = 0; k < cols; k++) {
            float *x = qs_mat_f32(&mat) + t * mat.stride + k;
            *x = ldexpf(*x, (int)(t % 5) * 20 - 40) * (k % 61 == 7 ? 60.0F : 1.0F);
        }
    }
    return mat;
}

ParameterizedTestParameters(fp16, is_better_than_bf16_operands)
{
    return cr_make_param_array(product_case, cases, N_CASES);
}
ParameterizedTest(product_case *c, fp16, is_better_than_bf16_operands)
{
    fx_unit unit = fx_unit_create(&c->weight, 11);
    for (int transposed = 0; transposed < 2; transposed++) {
        const int64_t n = transposed ? c->weight.out : c->weight.in;
        const int64_t k = transposed ? c->weight.in : c->weight.out;
        qs_mat left = left_operand(c->rows, k, 1);
        for (int accumulate = 0; accumulate < (transposed ? 1 : 2); accumulate++) {
            for (int t = 0; t < N_TABLES; t++) {
                if (!qs_half_force(tables[t])) {
                    continue;
                }
                qs_mat before = fx_mat(c->rows, n, 1, 2), to = fx_mat(c->rows, n, 1, 2);
                multiply(2, &unit, transposed, &left, &to, accumulate);
                row_errors sum = {0, 0}; /* each row over its own size: they are far apart */
                for (int64_t row = 0; row < c->rows; row++) {
                    const row_errors e =
                        errors_of(&unit, transposed, &left, row, accumulate ? &before : NULL, &to);
                    sum.got += e.got;
                    sum.bf16 += e.bf16;
                }
                /* The sum of one block alone, which no model has: W is not rounded to bf16 here,
                 * and that is as large a difference as all that bf16 operands lose. */
                const double limit = k <= QS_HALF_STRETCH ? 1.5 * 1.5 : 1.0;
                cr_log_info("%s, %d rows, %d columns, k %d, accumulate %d: %.2f of bf16's error",
                            tables[t], (int)c->rows, (int)n, (int)k, accumulate,
                            sqrt(sum.got / sum.bf16));
                cr_expect_leq(sum.got, limit * sum.bf16,
                              "%s, %d columns, k %d, accumulate %d: %g, bf16 %g", tables[t], (int)n,
                              (int)k, accumulate, sqrt(sum.got), sqrt(sum.bf16));
                fx_mat_free(&before);
                fx_mat_free(&to);
            }
        }
        fx_mat_free(&left);
    }
    fx_unit_destroy(&unit);
}

ParameterizedTestParameters(fp16, bits_do_not_depend_on_threads_rows_or_table)
{
    return cr_make_param_array(product_case, cases, N_CASES);
}
ParameterizedTest(product_case *c, fp16, bits_do_not_depend_on_threads_rows_or_table)
{
    fx_unit unit = fx_unit_create(&c->weight, 12);
    for (int transposed = 0; transposed < 2; transposed++) {
        const int64_t n = transposed ? c->weight.out : c->weight.in;
        const int64_t k = transposed ? c->weight.in : c->weight.out;
        qs_mat left = left_operand(c->rows, k, 3), want = fx_mat(c->rows, n, 0, 4);
        cr_assert(qs_half_force("portable"));
        multiply(1, &unit, transposed, &left, &want, false);
        const size_t bytes = (size_t)(c->rows * n) * sizeof(float);
        for (int t = 0; t < N_TABLES; t++) {
            for (int threads = 1; threads <= 5 && qs_half_force(tables[t]); threads += 2) {
                qs_mat got = fx_mat(c->rows, n, 0, 5);
                multiply(threads, &unit, transposed, &left, &got, false);
                cr_assert_eq(memcmp(got.data, want.data, bytes), 0, "%s, %d threads", tables[t],
                             threads);
                fx_mat_free(&got);
            }
        }
        if (c->rows > 1) { /* the last row alone: no row knows of the others */
            qs_mat row = left, got = fx_mat(1, n, 0, 6);
            row.data = qs_mat_f32(&left) + (c->rows - 1) * left.stride;
            row.rows = 1;
            multiply(1, &unit, transposed, &row, &got, false);
            cr_assert_eq(
                memcmp(got.data, qs_mat_f32(&want) + (c->rows - 1) * n, (size_t)n * sizeof(float)),
                0);
            fx_mat_free(&got);
        }
        fx_mat_free(&left);
        fx_mat_free(&want);
    }
    fx_unit_destroy(&unit);
}

/* Matrices that the path does not take are multiplied strictly: the same bits. */
Test(fp16, other_matrices_are_strict)
{
    fx_weight_spec specs[] = {{QS_WEIGHT_NF4, 130, 333, QS_BF16, true, 2, 0},
                              {QS_WEIGHT_NF4, 40, 96, QS_BF16, true, 2, 0},
                              {QS_WEIGHT_RAW, 77, 128, QS_BF16, true, 3, 128},
                              {QS_WEIGHT_RAW, 64, 64, QS_F32, true, 1, 64}};
    cr_assert(qs_half_force("portable"));
    qs_queue *queue = fx_queue(2);
    for (size_t i = 0; i < sizeof specs / sizeof *specs; i++) {
        fx_unit unit = fx_unit_create(&specs[i], 7);
        cr_assert_not(qs_gemm_fp16_takes(&unit.weight));
        qs_mat x = fx_mat(9, specs[i].in, 0, 1),
               y[2] = {fx_mat(9, specs[i].out, 0, 2), fx_mat(9, specs[i].out, 0, 3)};
        cr_assert_eq(qs_ops_cpu()->linear_forward(queue, &unit.view, &unit.weight, NULL, &x, &y[0]),
                     QS_OK);
        cr_assert_eq(
            qs_ops_cpu_fp16()->linear_forward(queue, &unit.view, &unit.weight, NULL, &x, &y[1]),
            QS_OK);
        cr_assert_eq(memcmp(y[0].data, y[1].data, (size_t)(9 * specs[i].out) * sizeof(float)), 0);
        fx_mat_free(&x);
        fx_mat_free(&y[0]);
        fx_mat_free(&y[1]);
        fx_unit_destroy(&unit);
    }
    qs_queue_destroy(queue);
}

/* Of the largest and the smallest floats nothing overflows or is lost on the way. */
Test(fp16, extremes_of_fp32_come_out_as_they_went_in)
{
    fx_weight_spec spec = {QS_WEIGHT_NF4, 64, 128, QS_BF16, true, 1, 0};
    fx_unit unit = fx_unit_create(&spec, 5);
    qs_mat plain = fx_mat(1, 128, 0, 1), small = fx_mat(1, 128, 0, 1), large = fx_mat(1, 128, 0, 1);
    qs_mat y[3] = {fx_mat(1, 64, 0, 2), fx_mat(1, 64, 0, 2), fx_mat(1, 64, 0, 2)};
    cr_assert(qs_half_force("portable"));
    for (int k = 0; k < 128; k++) {
        qs_mat_f32(&small)[k] = ldexpf(qs_mat_f32(&plain)[k], -90);
        qs_mat_f32(&large)[k] = ldexpf(qs_mat_f32(&plain)[k], 115);
    }
    multiply(1, &unit, true, &plain, &y[0], false);
    multiply(1, &unit, true, &small, &y[1], false);
    multiply(1, &unit, true, &large, &y[2], false);
    for (int j = 0; j < 64; j++) {
        cr_assert_eq(ldexpf(qs_mat_f32(&y[1])[j], 90), qs_mat_f32(&y[0])[j]);
        cr_assert_eq(ldexpf(qs_mat_f32(&y[2])[j], -115), qs_mat_f32(&y[0])[j]);
    }
    for (int i = 0; i < 3; i++) {
        fx_mat_free(&y[i]);
    }
    fx_mat_free(&plain);
    fx_mat_free(&small);
    fx_mat_free(&large);
    fx_unit_destroy(&unit);
}

/* NaN and infinity stay in their row and make every element of it that they touch not finite. */
Test(fp16, what_is_not_finite_stays_in_its_row)
{
    fx_weight_spec spec = {QS_WEIGHT_NF4, 96, 192, QS_BF16, true, 1, 0};
    const float bad[] = {NAN, INFINITY, -INFINITY};
    for (int transposed = 0; transposed < 2; transposed++) {
        fx_unit unit = fx_unit_create(&spec, 6);
        const int64_t k = transposed ? 192 : 96, n = transposed ? 96 : 192;
        for (int t = 0; t < N_TABLES; t++) {
            for (int i = 0; i < 3 && qs_half_force(tables[t]); i++) {
                qs_mat left = fx_mat(3, k, 0, 1), to = fx_mat(3, n, 0, 2);
                qs_mat_f32(&left)[k + 70] = bad[i];
                multiply(1, &unit, transposed, &left, &to, false);
                for (int64_t j = 0; j < n; j++) {
                    cr_assert(isfinite(fx_at(&to, 0, j)) && isfinite(fx_at(&to, 2, j)));
                    cr_assert_not(isfinite(fx_at(&to, 1, j)));
                }
                fx_mat_free(&left);
                fx_mat_free(&to);
            }
        }
        fx_unit_destroy(&unit);
    }
}

Test(fp16, is_no_choice_without_the_instructions)
{
    cr_assert(qs_half_force(NULL));
    cr_assert_eq(unsetenv("QSHARD_CPU_FP16"), 0);
    cr_assert_eq(qs_ops_cpu_fp16() != NULL, qs_half_supported());
    cr_assert_eq(setenv("QSHARD_CPU_FP16", "portable", 1), 0);
    cr_assert_str_eq(qs_ops_cpu_fp16()->name, "fp16");
    cr_assert_eq(unsetenv("QSHARD_CPU_FP16"), 0);
}
