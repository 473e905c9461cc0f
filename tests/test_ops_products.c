/* The products of cpu.gemm: bf16, fp16 and amx (kernels/cpu/gemm.h, gemm_fp16.h, gemm_amx.h), on
 * any CPU by way of the portable inner loops, and by the instructions where the CPU has them. */
#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/dtype.h"
#include "kernels/cpu/half.h"
#include "kernels/cpu/pairs.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/tile.h"
#include "ops_fixture.h"

enum { N_TABLES = 3, N_PATHS = 3, FP16 = 0, AMX = 1, BF16 = 2 };

typedef struct {
    const char *name, *variable; /* the variable that forces a table */
    const qs_ops *(*ops)(void);
    bool (*is_faster)(void);
    bool (*force)(const char *table);
    const char *tables[N_TABLES];
    int64_t rounded_once; /* up to so deep sums may lose 1.5 times what bf16 operands do */
} product_path;

static const product_path paths[N_PATHS] = {
    {"fp16",
     "QSHARD_CPU_FP16",
     qs_ops_cpu_fp16,
     qs_ops_cpu_fp16_is_faster,
     qs_half_force,
     {"portable", "avx2", "avx512fp16"},
     QS_HALF_STRETCH},
    {"amx",
     "QSHARD_CPU_AMX",
     qs_ops_cpu_amx,
     qs_ops_cpu_amx_is_faster,
     qs_tile_force,
     {"portable", "avx2", "amx"},
     0},
    {"bf16",
     "QSHARD_CPU_BF16",
     qs_ops_cpu_bf16,
     qs_ops_cpu_bf16_is_faster,
     qs_pairs_force,
     {"portable", "avx2", "avx512bf16"},
     0},
};

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

/* to = left W^T or left W with the table of the path in use. */
static void multiply(const product_path *path, int threads, const fx_unit *unit, bool transposed,
                     const qs_mat *left, qs_mat *to, bool accumulate)
{
    qs_queue *queue = fx_queue(threads);
    const qs_ops *ops = path->ops();
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

static void better(const product_path *path, const product_case *c)
{
    fx_unit unit = fx_unit_create(&c->weight, 11);
    for (int transposed = 0; transposed < 2; transposed++) {
        const int64_t n = transposed ? c->weight.out : c->weight.in;
        const int64_t k = transposed ? c->weight.in : c->weight.out;
        qs_mat left = left_operand(c->rows, k, 1);
        for (int accumulate = 0; accumulate < (transposed ? 1 : 2); accumulate++) {
            for (int t = 0; t < N_TABLES && path->tables[t] != NULL; t++) {
                if (!path->force(path->tables[t])) {
                    continue;
                }
                qs_mat before = fx_mat(c->rows, n, 1, 2), to = fx_mat(c->rows, n, 1, 2);
                multiply(path, 2, &unit, transposed, &left, &to, accumulate);
                row_errors sum = {0, 0}; /* each row over its own size: they are far apart */
                for (int64_t row = 0; row < c->rows; row++) {
                    const row_errors e =
                        errors_of(&unit, transposed, &left, row, accumulate ? &before : NULL, &to);
                    sum.got += e.got;
                    sum.bf16 += e.bf16;
                }
                /* The sum of one block alone, which no model has: W is not rounded to bf16 here,
                 * and that is as large a difference as all that bf16 operands lose. */
                const double limit = k <= path->rounded_once ? 1.5 * 1.5 : 1.0;
                cr_log_info("%s %s, %d rows, %d columns, k %d, accumulate %d: %.2f of bf16's error",
                            path->name, path->tables[t], (int)c->rows, (int)n, (int)k, accumulate,
                            sqrt(sum.got / sum.bf16));
                cr_expect_leq(sum.got, limit * sum.bf16,
                              "%s %s, %d columns, k %d, accumulate %d: %g, bf16 %g", path->name,
                              path->tables[t], (int)n, (int)k, accumulate, sqrt(sum.got),
                              sqrt(sum.bf16));
                fx_mat_free(&before);
                fx_mat_free(&to);
            }
        }
        fx_mat_free(&left);
    }
    fx_unit_destroy(&unit);
}

ParameterizedTestParameters(products, is_better_than_bf16_operands)
{
    return cr_make_param_array(product_case, cases, N_CASES);
}
ParameterizedTest(product_case *c, products, is_better_than_bf16_operands)
{
    for (int i = 0; i < N_PATHS; i++) {
        better(&paths[i], c);
    }
}

static void same_bits(const product_path *path, const product_case *c)
{
    fx_unit unit = fx_unit_create(&c->weight, 12);
    for (int transposed = 0; transposed < 2; transposed++) {
        const int64_t n = transposed ? c->weight.out : c->weight.in;
        const int64_t k = transposed ? c->weight.in : c->weight.out;
        qs_mat left = left_operand(c->rows, k, 3), want = fx_mat(c->rows, n, 0, 4);
        cr_assert(path->force("portable"));
        multiply(path, 1, &unit, transposed, &left, &want, false);
        const size_t bytes = (size_t)(c->rows * n) * sizeof(float);
        for (int t = 0; t < N_TABLES && path->tables[t] != NULL; t++) {
            for (int threads = 1; threads <= 5 && path->force(path->tables[t]); threads += 2) {
                qs_mat got = fx_mat(c->rows, n, 0, 5);
                multiply(path, threads, &unit, transposed, &left, &got, false);
                cr_assert_eq(memcmp(got.data, want.data, bytes), 0, "%s %s, %d threads", path->name,
                             path->tables[t], threads);
                fx_mat_free(&got);
            }
        }
        if (c->rows > 1) { /* the last row alone: no row knows of the others */
            qs_mat row = left, got = fx_mat(1, n, 0, 6);
            row.data = qs_mat_f32(&left) + (c->rows - 1) * left.stride;
            row.rows = 1;
            multiply(path, 1, &unit, transposed, &row, &got, false);
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

ParameterizedTestParameters(products, bits_do_not_depend_on_threads_rows_or_table)
{
    return cr_make_param_array(product_case, cases, N_CASES);
}
ParameterizedTest(product_case *c, products, bits_do_not_depend_on_threads_rows_or_table)
{
    for (int i = 0; i < N_PATHS; i++) {
        same_bits(&paths[i], c);
    }
}

/* Matrices that the path does not take are multiplied strictly: the same bits. */
static void strict(const product_path *path, const fx_weight_spec *spec)
{
    cr_assert(path->force("portable"));
    qs_queue *queue = fx_queue(2);
    fx_unit unit = fx_unit_create(spec, 7);
    qs_mat x = fx_mat(9, spec->in, 0, 1);
    qs_mat y[2] = {fx_mat(9, spec->out, 0, 2), fx_mat(9, spec->out, 0, 3)};
    const qs_ops *ops[2] = {qs_ops_cpu(), path->ops()};
    for (int i = 0; i < 2; i++) {
        cr_assert_eq(ops[i]->linear_forward(queue, &unit.view, &unit.weight, NULL, &x, &y[i]),
                     QS_OK);
    }
    cr_assert_eq(memcmp(y[0].data, y[1].data, (size_t)(9 * spec->out) * sizeof(float)), 0);
    fx_mat_free(&x);
    fx_mat_free(&y[0]);
    fx_mat_free(&y[1]);
    fx_unit_destroy(&unit);
    qs_queue_destroy(queue);
}

Test(products, other_matrices_are_strict)
{
    const fx_weight_spec raw[] = {{QS_WEIGHT_RAW, 77, 128, QS_BF16, true, 3, 128},
                                  {QS_WEIGHT_RAW, 64, 64, QS_F32, true, 1, 64}};
    const fx_weight_spec across[] = {{QS_WEIGHT_NF4, 130, 333, QS_BF16, true, 2, 0},
                                     {QS_WEIGHT_NF4, 40, 96, QS_BF16, true, 2, 0}};
    for (int i = 0; i < 2; i++) {
        strict(&paths[FP16], &raw[i]);
        strict(&paths[AMX], &raw[i]);
        strict(&paths[FP16], &across[i]); /* rows that do not start on a block */
    }
}

/* Of the largest and the smallest floats nothing overflows or is lost on the way. */
static void extremes(const product_path *path)
{
    fx_weight_spec spec = {QS_WEIGHT_NF4, 64, 128, QS_BF16, true, 1, 0};
    fx_unit unit = fx_unit_create(&spec, 5);
    qs_mat plain = fx_mat(1, 128, 0, 1), small = fx_mat(1, 128, 0, 1), large = fx_mat(1, 128, 0, 1);
    qs_mat y[3] = {fx_mat(1, 64, 0, 2), fx_mat(1, 64, 0, 2), fx_mat(1, 64, 0, 2)};
    cr_assert(path->force("portable"));
    for (int k = 0; k < 128; k++) {
        qs_mat_f32(&small)[k] = ldexpf(qs_mat_f32(&plain)[k], -90);
        qs_mat_f32(&large)[k] = ldexpf(qs_mat_f32(&plain)[k], 115);
    }
    multiply(path, 1, &unit, true, &plain, &y[0], false);
    multiply(path, 1, &unit, true, &small, &y[1], false);
    multiply(path, 1, &unit, true, &large, &y[2], false);
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

Test(products, extremes_of_fp32_come_out_as_they_went_in)
{
    for (int i = 0; i < N_PATHS; i++) {
        extremes(&paths[i]);
    }
}

/* NaN and infinity stay in their row and make every element of it that they touch not finite. */
static void not_finite(const product_path *path)
{
    fx_weight_spec spec = {QS_WEIGHT_NF4, 96, 192, QS_BF16, true, 1, 0};
    const float bad[] = {NAN, INFINITY, -INFINITY};
    for (int transposed = 0; transposed < 2; transposed++) {
        fx_unit unit = fx_unit_create(&spec, 6);
        const int64_t k = transposed ? 192 : 96, n = transposed ? 96 : 192;
        for (int t = 0; t < N_TABLES && path->tables[t] != NULL; t++) {
            for (int i = 0; i < 3 && path->force(path->tables[t]); i++) {
                qs_mat left = fx_mat(3, k, 0, 1), to = fx_mat(3, n, 0, 2);
                qs_mat_f32(&left)[k + 70] = bad[i];
                multiply(path, 1, &unit, transposed, &left, &to, false);
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

Test(products, what_is_not_finite_stays_in_its_row)
{
    for (int i = 0; i < N_PATHS; i++) {
        not_finite(&paths[i]);
    }
}

/* More rows than are packed at once, by a block's worth: those of the second block are what they
 * are alone. (amx in portable C would take minutes.) */
Test(products, rows_beyond_a_block_are_what_they_are_alone, .timeout = 120)
{
    enum { DEEP = 50048, ROWS = 675, COLUMNS = 3 }; /* 2 * 2^24 / 50048 = 670.4 */
    const fx_weight_spec spec = {QS_WEIGHT_NF4, COLUMNS, DEEP, QS_BF16, true, 1, 0};
    fx_unit unit = fx_unit_create(&spec, 8);
    for (int i = 0; i < N_PATHS; i++) {
        const product_path *path = &paths[i];
        if (i == AMX || !path->force("avx2")) {
            continue;
        }
        qs_mat left = left_operand(ROWS, DEEP, 3), all = fx_mat(ROWS, COLUMNS, 0, 4);
        multiply(path, 2, &unit, true, &left, &all, false);
        for (int64_t t = 0; t < ROWS; t += t < ROWS - 6 ? 223 : 1) {
            qs_mat row = left, alone = fx_mat(1, COLUMNS, 0, 6);
            row.data = qs_mat_f32(&left) + t * left.stride;
            row.rows = 1;
            multiply(path, 1, &unit, true, &row, &alone, false);
            cr_assert_eq(
                memcmp(alone.data, qs_mat_f32(&all) + t * COLUMNS, COLUMNS * sizeof(float)), 0,
                "%s, row %d", path->name, (int)t);
            fx_mat_free(&alone);
        }
        fx_mat_free(&left);
        fx_mat_free(&all);
    }
    fx_unit_destroy(&unit);
}

Test(products, are_not_faster_without_their_instructions)
{
    for (int i = 0; i < N_PATHS; i++) {
        cr_assert(paths[i].force(NULL));
        cr_assert_str_eq(paths[i].ops()->name, paths[i].name);
        cr_assert_eq(setenv(paths[i].variable, "portable", 1), 0);
        cr_assert_not(paths[i].is_faster(), "%s", paths[i].name);
        cr_assert_eq(unsetenv(paths[i].variable), 0);
        const bool has_them = paths[i].force(paths[i].tables[N_TABLES - 1]);
        cr_assert(has_them || !paths[i].is_faster(), "%s", paths[i].name);
    }
}

/* amx: operands in bf16 and nothing else is lost but by sums in fp32. An element's terms pass at
 * most 16 additions in a step, one of even and odd, one to its block's sum for each step of the
 * block, and one for each block. Rows of W that start anywhere, odd depths, both directions. */
ParameterizedTestParameters(products, amx_loses_roundings_of_sums_alone)
{
    static product_case odd[] = {
        {{QS_WEIGHT_NF4, 130, 333, QS_BF16, true, 2, 0}, 33},
        {{QS_WEIGHT_NF4, 257, 1025, QS_F32, true, 3, 0}, 3},
        {{QS_WEIGHT_NF4, 1056, 31, QS_F16, false, 2, 0}, 64},
        {{QS_WEIGHT_NF4, 300, 704, QS_BF16, true, 3, 0}, 70},
    };
    return cr_make_param_array(product_case, odd, sizeof odd / sizeof *odd);
}
ParameterizedTest(product_case *c, products, amx_loses_roundings_of_sums_alone)
{
    const product_path *path = &paths[AMX];
    fx_unit unit = fx_unit_create(&c->weight, 21);
    for (int transposed = 0; transposed < 2; transposed++) {
        const int64_t n = transposed ? c->weight.out : c->weight.in;
        const int64_t k = transposed ? c->weight.in : c->weight.out;
        const double additions =
            16 + 1 + (double)qs_min_i64(k, 1024) / 32 + 1 + (double)k / 1024 + 1;
        qs_mat left = left_operand(c->rows, k, 1), to = fx_mat(c->rows, n, 1, 2);
        cr_assert(path->force("portable"));
        multiply(path, 2, &unit, transposed, &left, &to, false);
        for (int64_t t = 0; t < c->rows; t++) {
            for (int64_t j = 0; j < n; j++) {
                double sum = 0, size = 0;
                for (int64_t i = 0; i < k; i++) {
                    const double term =
                        to_bf16(fx_at(&left, t, i)) * to_bf16(weight_at(&unit, transposed, i, j));
                    sum += term;
                    size += fabs(term);
                }
                cr_assert_leq(fabs(fx_at(&to, t, j) - sum), additions * 0x1p-24 * size,
                              "row %d, column %d of %d, k %d", (int)t, (int)j, (int)n, (int)k);
            }
        }
        fx_mat_free(&left);
        fx_mat_free(&to);
    }
    fx_unit_destroy(&unit);
}

/* bf16 is the strict product of operands that are rounded to bf16, bit for bit, as long as nothing
 * is subnormal; raw matrices, too, rows of W that start anywhere, odd depths, both directions. */
static product_case rounded[] = {
    {{QS_WEIGHT_NF4, 130, 333, QS_BF16, true, 2, 0}, 33},
    {{QS_WEIGHT_NF4, 257, 1025, QS_F32, true, 3, 0}, 3},
    {{QS_WEIGHT_NF4, 1056, 31, QS_F16, false, 2, 0}, 64},
    {{QS_WEIGHT_NF4, 300, 704, QS_BF16, true, 3, 0}, 170},
    {{QS_WEIGHT_NF4, 97, 98, QS_BF16, true, 3, 0}, 20}, /* rows start within a block */
    {{QS_WEIGHT_RAW, 77, 128, QS_BF16, true, 3, 128}, 9},
    {{QS_WEIGHT_RAW, 70, 63, QS_BF16, true, 3, 63}, 9},
    {{QS_WEIGHT_RAW, 64, 64, QS_F32, true, 1, 64}, 50},
    {{QS_WEIGHT_RAW, 64, 66, QS_F16, true, 1, 66}, 5},
};

/* A row of the product as gemm.h defines it. */
static void product_of_rounded(const fx_unit *unit, bool transposed, const qs_mat *left, int64_t t,
                               float *out, int64_t n)
{
    enum { KC = 256 }; /* a block's sum is a chain from 0, added to those before it */
    for (int64_t j = 0; j < n; j++) {
        float total = 0;
        for (int64_t k0 = 0; k0 < left->cols; k0 += KC) {
            float sum = 0;
            for (int64_t k = k0; k < qs_min_i64(k0 + KC, left->cols); k++) {
                sum = fmaf((float)to_bf16(fx_at(left, t, k)),
                           (float)to_bf16(weight_at(unit, transposed, k, j)), sum);
            }
            total = k0 == 0 ? sum : total + sum;
        }
        out[j] = total;
    }
}

ParameterizedTestParameters(products, bf16_is_strict_with_rounded_operands)
{
    return cr_make_param_array(product_case, rounded, sizeof rounded / sizeof *rounded);
}
ParameterizedTest(product_case *c, products, bf16_is_strict_with_rounded_operands)
{
    const product_path *path = &paths[BF16];
    fx_unit unit = fx_unit_create(&c->weight, 31);
    for (int transposed = 0; transposed < 2; transposed++) {
        const int64_t n = transposed ? c->weight.out : c->weight.in;
        const int64_t k = transposed ? c->weight.in : c->weight.out;
        float *want = malloc((size_t)n * sizeof *want);
        qs_mat left = fx_mat(c->rows, k, 3, 1);
        for (int i = 0; i < N_TABLES; i++) {
            if (!path->force(path->tables[i])) {
                continue;
            }
            qs_mat to = fx_mat(c->rows, n, 1, 2);
            multiply(path, 2, &unit, transposed, &left, &to, false);
            for (int64_t t = 0; t < c->rows; t++) {
                product_of_rounded(&unit, transposed, &left, t, want, n);
                cr_assert_eq(
                    memcmp(qs_mat_f32(&to) + t * to.stride, want, (size_t)n * sizeof *want), 0,
                    "%s, row %d of %d columns, k %d", path->tables[i], (int)t, (int)n, (int)k);
            }
            fx_mat_free(&to);
        }
        fx_mat_free(&left);
        free(want);
    }
    fx_unit_destroy(&unit);
}
