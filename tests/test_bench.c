/* The checks of `qshard bench` find what is wrong, and nothing where all is right; what is measured
 * is in order. Shapes have ragged ends. */
#include <criterion/criterion.h>
#include <math.h>
#include <string.h>

#include "base/log.h"
#include "bench/bench_impl.h"
#include "bench/kernels/check.h"

static qs_bench b;

static void open_bench(void)
{
    qs_log_init(0, 1, QS_LOG_QUIET, false);
    cr_assert_eq(qs_bench_open(&b, NULL, qs_device_cpu(), qs_ops_cpu(), 2, true), QS_OK);
}

static void close_bench(void)
{
    qs_bench_close(&b);
}

TestSuite(bench, .init = open_bench, .fini = close_bench, .timeout = 120);

static void is_right(qs_status st, const qs_bench_check *check, double error)
{
    cr_assert_eq(st, QS_OK, "%s", qs_error_text());
    cr_assert_gt(check->checked, 0);
    cr_assert_eq(check->wrong, 0, "%lld wrong, error %g", (long long)check->wrong, check->error);
    cr_assert_lt(check->error, error);
}

/* Exactly one element was changed. */
static void is_wrong(qs_status st, const qs_bench_check *check)
{
    cr_assert_eq(st, QS_OK, "%s", qs_error_text());
    cr_assert_eq(check->wrong, 1, "%lld", (long long)check->wrong);
    cr_assert(!(check->error < 1e-5), "%g", check->error);
}

/* An element of the last row, which every check looks at. */
static float *last_row(const qs_mat *mat)
{
    return qs_mat_f32(mat) + (mat->rows - 1) * mat->stride + mat->cols / 2;
}

/* ---- products and weights ---- */

static const int64_t OUT = 70, IN = 333, TOKENS = 19;

static void make_linear(qs_bench_unit *u, qs_bench_linear *l)
{
    cr_assert_eq(qs_bench_unit_make(&b, u, 1, &OUT, &IN, 0), QS_OK);
    cr_assert_eq(qs_bench_linear_make(&b, l, u, 0, TOKENS), QS_OK);
    cr_assert_eq(qs_bench_dense_make(&b, l), QS_OK);
}

Test(bench, forward_and_dense_products_are_checked)
{
    qs_bench_unit u;
    qs_bench_linear l;
    qs_bench_check check;
    make_linear(&u, &l);
    cr_assert_eq(qs_bench_linear_forward(&b, &l), QS_OK);
    is_right(qs_bench_check_forward(&b, &l, &check), &check, 1e-5);
    const float kept = *last_row(&l.y);
    *last_row(&l.y) = kept + 0.01F * fabsf(kept) + 1e-3F;
    is_wrong(qs_bench_check_forward(&b, &l, &check), &check);
    *last_row(&l.y) = NAN;
    is_wrong(qs_bench_check_forward(&b, &l, &check), &check);

    cr_assert_eq(qs_bench_dense(&b, &l), QS_OK);
    is_right(qs_bench_check_dense(&b, &l, &check), &check, 1e-5);
    *last_row(&l.y) += 1e-2F;
    is_wrong(qs_bench_check_dense(&b, &l, &check), &check);
}

/* An element that is off by a hundredth of what it can be is found among rounded operands, too. */
static void check_path(const qs_ops *ops)
{
    const int64_t out = 96, in = 320;
    qs_bench_unit u;
    qs_bench_linear l;
    qs_bench_check check;
    cr_assert_not_null(ops);
    b.ops = ops;
    cr_assert_eq(qs_bench_unit_make(&b, &u, 1, &out, &in, 0), QS_OK);
    cr_assert_eq(qs_bench_linear_make(&b, &l, &u, 0, TOKENS), QS_OK);
    cr_assert_eq(qs_bench_linear_backward(&b, &l), QS_OK);
    is_right(qs_bench_check_backward(&b, &l, &check), &check, 1e-2);
    cr_assert_gt(check.error, 1e-5, "%s: operands were not rounded", ops->name);
    *last_row(&l.dx) += 0.5F;
    cr_assert_eq(qs_bench_check_backward(&b, &l, &check), QS_OK);
    cr_assert_eq(check.wrong, 1);
    cr_assert_eq(qs_bench_linear_forward(&b, &l), QS_OK);
    is_right(qs_bench_check_forward(&b, &l, &check), &check, 1e-2);
    *last_row(&l.y) += 0.5F;
    cr_assert_eq(qs_bench_check_forward(&b, &l, &check), QS_OK);
    cr_assert_eq(check.wrong, 1);
    const char *by = NULL;
    cr_assert_gt(qs_bench_products_rate(&b, ops, &by), 1e6);
    cr_assert_not_null(by);
    b.ops = qs_ops_cpu();
}

Test(bench, products_of_other_paths_are_checked)
{
    setenv("QSHARD_CPU_FP16", "portable", 1);
    setenv("QSHARD_CPU_AMX", "portable", 1);
    check_path(qs_ops_cpu_bf16());
    check_path(qs_ops_cpu_fp16());
    check_path(qs_ops_cpu_amx());
}

Test(bench, backward_products_are_checked)
{
    qs_bench_unit u;
    qs_bench_linear l;
    qs_bench_check check;
    make_linear(&u, &l);
    cr_assert_eq(qs_bench_linear_backward(&b, &l), QS_OK);
    is_right(qs_bench_check_backward(&b, &l, &check), &check, 1e-5);
    *last_row(&l.dx) += 1e-3F;
    is_wrong(qs_bench_check_backward(&b, &l, &check), &check);
}

Test(bench, every_decoded_weight_is_checked)
{
    qs_bench_unit u;
    qs_bench_check check;
    cr_assert_eq(qs_bench_unit_make(&b, &u, 1, &OUT, &IN, 0), QS_OK);
    cr_assert_eq(qs_bench_unit_decode_make(&b, &u), QS_OK);
    cr_assert_eq(qs_bench_unit_decode(&b, &u), QS_OK);
    is_right(qs_bench_check_decode(&b, &u, &check), &check, 1e-300);
    cr_assert_eq(check.checked, OUT * IN);
    u.out[OUT * IN / 3] += 1e-3F;
    is_wrong(qs_bench_check_decode(&b, &u, &check), &check);
    b.ops = qs_ops_cpu_bf16();
    cr_assert_eq(qs_bench_unit_decode(&b, &u), QS_OK);
    is_right(qs_bench_check_decode(&b, &u, &check), &check, 1e-300);
    cr_assert_eq(check.checked, OUT * IN);
    ((uint32_t *)(void *)u.out)[OUT * IN / 6] ^= 1U << 6;
    is_wrong(qs_bench_check_decode(&b, &u, &check), &check);
    b.ops = qs_ops_cpu();
}

/* ---- attention, head ---- */

Test(bench, attention_is_checked_both_ways)
{
    qs_bench_attention a;
    qs_bench_check check;
    cr_assert_eq(qs_bench_attention_make(&b, &a, 37, 6, 3, 20), QS_OK);
    cr_assert_eq(qs_bench_attention_forward(&b, &a), QS_OK);
    is_right(qs_bench_check_attention(&b, &a, false, &check), &check, 1e-5);
    cr_assert_eq(qs_bench_attention_backward(&b, &a), QS_OK);
    is_right(qs_bench_check_attention(&b, &a, true, &check), &check, 1e-5);
    /* the first head of the last query, the first group's last key */
    float *const elements[] = {qs_mat_f32(&a.dq) + 36 * a.dq.stride + 3,
                               qs_mat_f32(&a.dk) + 36 * a.dk.stride + 3,
                               qs_mat_f32(&a.dv) + 36 * a.dv.stride + 3};
    for (int i = 0; i < 3; i++) {
        const float kept = *elements[i];
        *elements[i] += 1e-2F;
        is_wrong(qs_bench_check_attention(&b, &a, true, &check), &check);
        *elements[i] = kept;
    }
    qs_mat_f32(&a.o)[36 * a.o.stride + 3] += 1e-2F;
    is_wrong(qs_bench_check_attention(&b, &a, false, &check), &check);
}

Test(bench, head_is_checked)
{
    qs_bench_head h;
    qs_bench_check check;
    cr_assert_eq(qs_bench_head_make(&b, &h, 11, 75, 48), QS_OK);
    cr_assert_eq(qs_bench_head_chunk(&b, &h), QS_OK);
    is_right(qs_bench_check_head(&b, &h, &check), &check, 1e-4);
    float *const elements[] = {&h.state.max[10], &h.state.target_logit[10],
                               &h.state.o[10 * 48 + 7]};
    for (int i = 0; i < 3; i++) {
        const float kept = *elements[i];
        *elements[i] += 0.5F;
        is_wrong(qs_bench_check_head(&b, &h, &check), &check);
        *elements[i] = kept;
    }
}

/* ---- what is measured ---- */

static int calls;

static qs_status count_call(qs_bench *bench, void *ctx)
{
    (void)bench;
    (void)ctx;
    calls++;
    return QS_OK;
}

Test(bench, a_figure_is_the_median_of_its_batches)
{
    qs_bench_times t;
    b.batches = 5;
    cr_assert_eq(qs_bench_time(&b, count_call, NULL, &t), QS_OK);
    cr_assert_eq(calls,
                 2 + 1 + 5); /* warm-up, one to size the batches, which `small` keeps at one */
    cr_assert_leq(t.min, t.median);
    cr_assert_leq(t.median, t.max);
}

Test(bench, bounds_are_measured)
{
    cr_assert_eq(qs_bench_bounds(&b), QS_OK);
    cr_assert_gt(b.copy_rate, 1e6);
    cr_assert_gt(b.matmul_rate, 1e6);
    cr_assert_eq(b.n_taken, 0);
}

Test(bench, a_median_is_between_the_middle_two)
{
    double even[] = {4, 1, 8, 2}, odd[] = {5, 1, 3}, one[] = {7};
    const qs_bench_times t = qs_bench_summary(even, 4);
    cr_assert(t.median == 3 && t.min == 1 && t.max == 8);
    cr_assert_eq(qs_bench_summary(odd, 3).median, 3);
    cr_assert_eq(qs_bench_summary(one, 1).median, 7);
}

Test(bench, a_share_above_the_whole_is_none)
{
    cr_assert_eq(qs_bench_share(1, 4), 25);
    cr_assert_eq(qs_bench_share(4, 4), 100);
    cr_assert(isnan(qs_bench_share(5, 4)));
}

Test(bench, names_are_found)
{
    qs_bench_kind kind = QS_BENCH_COUNT;
    cr_assert_eq(qs_bench_find("reduce", &kind), QS_OK);
    cr_assert_eq(kind, QS_BENCH_REDUCE);
    cr_assert_eq(qs_bench_find("gathr", &kind), QS_ERR_USAGE);
    cr_assert_not_null(
        strstr(qs_error_text(), "gather, reduce, step, gemm, decode, attention, head"));
}
