/* The matrix product, decoding while packing, the frozen linears and LoRA. */
#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <math.h>
#include <string.h>

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/ops_impl.h"
#include "kernels/ops.h"
#include "ops_fixture.h"

static const char *const isas[] = {"avx512", "avx2", "portable"};
enum { N_ISAS = 3 };

/* What fused multiply-adds in blocks of 256 may be off by, for a sum whose absolute terms add up to
 * `size`: one rounding of 2^-24 for each of the block's steps and each block. */
static double sum_bound(int64_t depth, double size)
{
    double steps = (double)(depth < QS_GEMM_KC ? depth : QS_GEMM_KC) +
                   (double)((depth + QS_GEMM_KC - 1) / QS_GEMM_KC) + 2.0;
    return steps * 0x1p-24 * size + 1e-30;
}

typedef struct {
    int64_t m, n, k;
    bool a_transposed, b_transposed, accumulate;
    float a_scale, b_scale; /* 0: 1 */
} gemm_case;

ParameterizedTestParameters(gemm, matches_fp64)
{
    static gemm_case c[] = {
        {1, 1, 1, false, false, false, 0, 0},
        {14, 32, 256, false, true, false, 0.75F, 0},
        {15, 33, 257, false, false, true, 0, 0.75F},
        {13, 31, 255, true, true, true, 0, 0},
        {169, 257, 300, true, false, false, 0.75F, 0},
        {5, 1100, 3, false, true, true, 0, 0.75F},
        {400, 16, 70, false, true, false, 0, 0},
        {400, 16, 70, true, false, false, 0, 0.75F},
        {400, 130, 70, false, true, true, 0.75F, 0.75F},
        {16, 500, 900, true, false, false, 0.75F, 0},
        {3, 7, 0, false, false, false, 0.75F, 0},
        {3, 7, 0, false, false, true, 0, 0},
        {0, 7, 5, false, false, false, 0, 0},
        {3, 0, 5, false, true, false, 0, 0},
        {50, 2500, 40, false, true, false, 0, 0},
        {400, 3, 50000, false, true, true, 0.75F, 0}, /* more of A than is packed at once */
        {400, 3, 50000, false, true, true, 0, 0},
    };
    return cr_make_param_array(gemm_case, c, sizeof c / sizeof *c);
}
ParameterizedTest(gemm_case *c, gemm, matches_fp64)
{
    qs_queue *queue = fx_queue(2);
    qs_mat a = fx_mat(c->a_transposed ? c->k : c->m, c->a_transposed ? c->m : c->k, 3, 1);
    qs_mat b = fx_mat(c->b_transposed ? c->n : c->k, c->b_transposed ? c->k : c->n, 5, 2);
    qs_mat before = fx_mat(c->m, c->n, 2, 3), out = fx_mat(c->m, c->n, 2, 3);
    qs_operand left = {.data = a.data, .stride = a.stride, .transposed = c->a_transposed};
    qs_operand right = {.data = b.data, .stride = b.stride, .transposed = c->b_transposed};
    const double scale =
        (c->a_scale != 0.0F ? c->a_scale : 1.0) * (c->b_scale != 0.0F ? c->b_scale : 1.0);
    left.scale = c->a_scale; /* exact on the inputs but for one rounding */
    right.scale = c->b_scale;
    cr_assert_eq(
        qs_gemm(queue, c->m, c->n, c->k, &left, &right, out.data, out.stride, c->accumulate),
        QS_OK);
    for (int64_t i = 0; i < c->m; i++) {
        for (int64_t j = 0; j < c->n; j++) {
            double sum = c->accumulate ? fx_at(&before, i, j) : 0.0, size = fabs(sum);
            for (int64_t k = 0; k < c->k; k++) {
                double x = scale * (c->a_transposed ? fx_at(&a, k, i) : fx_at(&a, i, k));
                double y = c->b_transposed ? fx_at(&b, j, k) : fx_at(&b, k, j);
                sum += x * y;
                size += fabs(x * y);
            }
            cr_assert_leq(fabs(sum - fx_at(&out, i, j)), sum_bound(c->k, size),
                          "element %ld,%ld: %g instead of %g", (long)i, (long)j, fx_at(&out, i, j),
                          sum);
        }
    }
    cr_assert(fx_mat_gap_intact(&out));
    fx_mat_free(&a);
    fx_mat_free(&b);
    fx_mat_free(&before);
    fx_mat_free(&out);
    qs_queue_destroy(queue);
}

/* The definition in gemm.h, element by element: what makes results independent of threads and CPUs.
 */
static float defined_element(const gemm_case *c, const qs_mat *a, const qs_mat *b, int64_t i,
                             int64_t j, float before)
{
    float out = before;
    for (int64_t k0 = 0; k0 < c->k; k0 += QS_GEMM_KC) {
        float sum = 0.0F;
        for (int64_t k = k0; k < k0 + QS_GEMM_KC && k < c->k; k++) {
            float x = c->a_transposed ? qs_mat_f32(a)[k * a->stride + i]
                                      : qs_mat_f32(a)[i * a->stride + k];
            float y = c->b_transposed ? qs_mat_f32(b)[j * b->stride + k]
                                      : qs_mat_f32(b)[k * b->stride + j];
            sum = fmaf(x, y, sum);
        }
        out = k0 == 0 && !c->accumulate ? sum : out + sum;
    }
    return out;
}

ParameterizedTestParameters(gemm, bits_are_the_definition_for_any_threads_and_cpu)
{
    static gemm_case c[] = {
        {33, 70, 600, false, true, false, 0, 0},
        {200, 300, 300, true, false, true, 0, 0},
        {61, 1030, 257, false, false, false, 0, 0},
        {70, 1030, 257, false, false, true, 0, 0},
        /* Thin ones: operands in place, ragged edges, several blocks of k. */
        {400, 16, 600, false, true, false, 0, 0},
        {203, 5, 513, true, false, true, 0, 0},
        {100, 128, 300, true, true, false, 0, 0},
        {100, 129, 300, false, true, false, 0, 0},
        {16, 500, 700, true, false, true, 0, 0},
        {17, 96, 300, false, false, false, 0, 0},
        {64, 65, 300, true, false, false, 0, 0},
    };
    return cr_make_param_array(gemm_case, c, sizeof c / sizeof *c);
}
ParameterizedTest(gemm_case *c, gemm, bits_are_the_definition_for_any_threads_and_cpu)
{
    qs_mat a = fx_mat(c->a_transposed ? c->k : c->m, c->a_transposed ? c->m : c->k, 0, 1);
    qs_mat b = fx_mat(c->b_transposed ? c->n : c->k, c->b_transposed ? c->k : c->n, 0, 2);
    qs_operand left = {.data = a.data, .stride = a.stride, .transposed = c->a_transposed};
    qs_operand right = {.data = b.data, .stride = b.stride, .transposed = c->b_transposed};
    qs_mat before = fx_mat(c->m, c->n, 0, 3);
    int ran = 0;
    for (int isa = 0; isa < N_ISAS; isa++) {
        if (!qs_isa_force(isas[isa])) {
            continue;
        }
        for (int threads = 1; threads <= 3; threads++) {
            qs_queue *queue = fx_queue(threads);
            qs_mat out = fx_mat(c->m, c->n, 0, 3);
            cr_assert_eq(qs_gemm(queue, c->m, c->n, c->k, &left, &right, out.data, out.stride,
                                 c->accumulate),
                         QS_OK);
            for (int64_t i = 0; i < c->m; i++) {
                for (int64_t j = 0; j < c->n; j++) {
                    float want =
                        defined_element(c, &a, &b, i, j, qs_mat_f32(&before)[i * c->n + j]);
                    cr_assert_eq(qs_mat_f32(&out)[i * c->n + j], want, "%s, %d threads: %ld,%ld",
                                 isas[isa], threads, (long)i, (long)j);
                }
            }
            fx_mat_free(&out);
            qs_queue_destroy(queue);
            ran++;
        }
    }
    cr_assert_geq(ran, 3);
    fx_mat_free(&a);
    fx_mat_free(&b);
    fx_mat_free(&before);
}

ParameterizedTestParameters(linear, fast_decode_is_the_scalar_decode_bit_for_bit)
{
    static fx_weight_spec c[] = {
        {QS_WEIGHT_NF4, 40, 1024, QS_BF16, true, 1, 0},
        {QS_WEIGHT_NF4, 130, 333, QS_BF16, true, 2, 0},
        {QS_WEIGHT_NF4, 57, 1000, QS_F16, true, 3, 0},
        {QS_WEIGHT_NF4, 91, 700, QS_F32, false, 5, 0},
        {QS_WEIGHT_NF4, 1, 1, QS_BF16, true, 3, 0},
        {QS_WEIGHT_RAW, 77, 96, QS_BF16, true, 3, 96},
        {QS_WEIGHT_RAW, 130, 333, QS_F16, true, 2, 16384},
        {QS_WEIGHT_RAW, 5, 33, QS_F32, true, 5, 100},
    };
    return cr_make_param_array(fx_weight_spec, c, sizeof c / sizeof *c);
}
ParameterizedTest(fx_weight_spec *spec, linear, fast_decode_is_the_scalar_decode_bit_for_bit)
{
    fx_unit unit = fx_unit_create(spec, 17);
    int64_t count = spec->out * spec->in;
    float *slow = fx_random(count, 1), *fast = fx_random(count + 1, 2), guard = fast[count];
    qs_weight_decode(&unit.view, &unit.weight, 0, count, slow);
    for (int isa = 0; isa < N_ISAS; isa++) {
        if (!qs_isa_force(isas[isa])) {
            continue;
        }
        qs_weight_decode_fast(qs_isa_get(), &unit.view, &unit.weight, 0, count, fast);
        cr_assert_eq(memcmp(slow, fast, (size_t)count * sizeof *slow), 0, "%s", isas[isa]);
        for (int64_t first = 0; first < count; first += 1 + count / 37) {
            for (int64_t run = 1; run <= count - first && run < 2000; run += 1 + run / 2) {
                fast[first + run] = guard;
                qs_weight_decode_fast(qs_isa_get(), &unit.view, &unit.weight, first, run,
                                      fast + first);
                cr_assert_eq(memcmp(slow + first, fast + first, (size_t)run * sizeof *slow), 0,
                             "%s: %ld elements from %ld", isas[isa], (long)run, (long)first);
                cr_assert_eq(fast[first + run], guard);
            }
        }
    }
    free(slow);
    free(fast);
    fx_unit_destroy(&unit);
}

Test(linear, fast_decode_of_extreme_scales_is_the_scalar_decode)
{
    /* Zero, denormal, overflow of the half type, infinity and NaN in the scale of a block. */
    const float scales[] = {0.0F, 1e-40F, 3e-8F, 65519.0F, 65520.0F, 1e30F, 3.4e38F, INFINITY, NAN};
    enum { N_SCALES = sizeof scales / sizeof *scales };
    const qs_dtype dtypes[] = {QS_BF16, QS_F16, QS_F32};
    fx_weight_spec spec = {QS_WEIGHT_NF4, 1, QS_NF4_BLOCK * N_SCALES, QS_BF16, false, 1, 0};
    fx_unit unit = fx_unit_create(&spec, 3);
    qs_nf4_quantum quantum = qs_unit_nf4_quantum(&unit.view, 1);
    memcpy(unit.bytes + ((const uint8_t *)quantum.absmax32 - unit.bytes), scales, sizeof scales);
    float slow[QS_NF4_BLOCK * N_SCALES], fast[QS_NF4_BLOCK * N_SCALES];
    for (int d = 0; d < 3; d++) {
        unit.weight.dtype = dtypes[d];
        qs_weight_decode(&unit.view, &unit.weight, 0, spec.in, slow);
        for (int isa = 0; isa < N_ISAS; isa++) {
            if (qs_isa_force(isas[isa])) {
                qs_weight_decode_fast(qs_isa_get(), &unit.view, &unit.weight, 0, spec.in, fast);
                for (int64_t i = 0; i < spec.in; i++) {
                    cr_assert(slow[i] == fast[i] || (isnan(slow[i]) && isnan(fast[i])),
                              "%s: scale %g, dtype %d: %g instead of %g", isas[isa],
                              (double)scales[i / 64], (int)dtypes[d], (double)fast[i],
                              (double)slow[i]);
                }
            }
        }
    }
    fx_unit_destroy(&unit);
}

typedef struct {
    fx_weight_spec weight;
    int64_t rows;
} linear_case;

#define LINEAR_CASES                                                                               \
    {{QS_WEIGHT_NF4, 96, 64, QS_BF16, true, 1, 0}, 0},                                             \
        {{QS_WEIGHT_NF4, 96, 64, QS_BF16, true, 1, 0}, 1},                                         \
        {{QS_WEIGHT_NF4, 130, 333, QS_BF16, true, 2, 0}, 37},                                      \
        {{QS_WEIGHT_NF4, 300, 700, QS_F16, true, 3, 0}, 15},                                       \
        {{QS_WEIGHT_NF4, 65, 1000, QS_F32, false, 5, 0}, 50},                                      \
        {{QS_WEIGHT_RAW, 77, 96, QS_BF16, true, 3, 96}, 20},                                       \
        {{QS_WEIGHT_RAW, 130, 333, QS_F16, true, 2, 16384}, 9},

ParameterizedTestParameters(linear, forward_matches_fp64)
{
    static linear_case c[] = {LINEAR_CASES};
    return cr_make_param_array(linear_case, c, sizeof c / sizeof *c);
}
ParameterizedTest(linear_case *c, linear, forward_matches_fp64)
{
    qs_queue *queue = fx_queue(2);
    int64_t in = c->weight.in, out = c->weight.out;
    fx_unit unit = fx_unit_create(&c->weight, 11);
    qs_mat x = fx_mat(c->rows, in, 3, 1), y = fx_mat(c->rows, out, 5, 2);
    float *bias = fx_random(out, 3);
    for (int with_bias = 0; with_bias < 2; with_bias++) {
        cr_assert_eq(qs_ops_cpu()->linear_forward(queue, &unit.view, &unit.weight,
                                                  with_bias ? bias : NULL, &x, &y),
                     QS_OK);
        for (int64_t t = 0; t < c->rows; t++) {
            for (int64_t o = 0; o < out; o++) {
                double sum = with_bias ? (double)bias[o] : 0.0, size = fabs(sum);
                for (int64_t i = 0; i < in; i++) {
                    double term = fx_at(&x, t, i) * (double)unit.plain[o * in + i];
                    sum += term;
                    size += fabs(term);
                }
                cr_assert_leq(fabs(sum - fx_at(&y, t, o)), sum_bound(in, size));
            }
        }
    }
    cr_assert(fx_mat_gap_intact(&y));
    free(bias);
    fx_mat_free(&x);
    fx_mat_free(&y);
    fx_unit_destroy(&unit);
    qs_queue_destroy(queue);
}

ParameterizedTestParameters(linear, backward_matches_fp64)
{
    static linear_case c[] = {LINEAR_CASES};
    return cr_make_param_array(linear_case, c, sizeof c / sizeof *c);
}
ParameterizedTest(linear_case *c, linear, backward_matches_fp64)
{
    qs_queue *queue = fx_queue(2);
    int64_t in = c->weight.in, out = c->weight.out;
    fx_unit unit = fx_unit_create(&c->weight, 12);
    qs_mat dy = fx_mat(c->rows, out, 3, 1), before = fx_mat(c->rows, in, 1, 2);
    for (int accumulate = 0; accumulate < 2; accumulate++) {
        qs_mat dx = fx_mat(c->rows, in, 1, 2);
        cr_assert_eq(
            qs_ops_cpu()->linear_backward(queue, &unit.view, &unit.weight, &dy, &dx, accumulate),
            QS_OK);
        for (int64_t t = 0; t < c->rows; t++) {
            for (int64_t i = 0; i < in; i++) {
                double sum = accumulate ? fx_at(&before, t, i) : 0.0, size = fabs(sum);
                for (int64_t o = 0; o < out; o++) {
                    double term = fx_at(&dy, t, o) * (double)unit.plain[o * in + i];
                    sum += term;
                    size += fabs(term);
                }
                cr_assert_leq(fabs(sum - fx_at(&dx, t, i)), sum_bound(out, size));
            }
        }
        cr_assert(fx_mat_gap_intact(&dx));
        fx_mat_free(&dx);
    }
    fx_mat_free(&dy);
    fx_mat_free(&before);
    fx_unit_destroy(&unit);
    qs_queue_destroy(queue);
}
