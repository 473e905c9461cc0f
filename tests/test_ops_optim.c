/* The optimizer's operations: AdamW, sums of squares, the slot tree's addition. */
#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <math.h>
#include <string.h>

#include "kernels/ops.h"
#include "ops_fixture.h"

ParameterizedTestParameters(square_sums, are_sequential_fp64_sums)
{
    static int64_t n[] = {0, 1, 7, 8, 9, 37};
    return cr_make_param_array(int64_t, n, sizeof n / sizeof *n);
}
ParameterizedTest(int64_t *n, square_sums, are_sequential_fp64_sums)
{
    qs_queue *queue = fx_queue(2);
    float *x = fx_random(*n * 4096, 1);
    double out[38];
    out[*n] = 17.0;
    cr_assert_eq(qs_ops_cpu()->square_sums(queue, x, *n, out), QS_OK);
    for (int64_t c = 0; c < *n; c++) {
        double sum = 0.0;
        for (int64_t i = 0; i < 4096; i++) {
            sum += (double)x[c * 4096 + i] * (double)x[c * 4096 + i];
        }
        cr_assert_eq(out[c], sum, "chunk %ld", (long)c);
    }
    cr_assert_eq(out[*n], 17.0);
    free(x);
    qs_queue_destroy(queue);
}

ParameterizedTestParameters(accumulate, adds_count_elements)
{
    static int64_t n[] = {0, 1, 15, 16384, 50001};
    return cr_make_param_array(int64_t, n, sizeof n / sizeof *n);
}
ParameterizedTest(int64_t *n, accumulate, adds_count_elements)
{
    qs_queue *queue = fx_queue(3);
    float *x = fx_random(*n + 1, 1), *before = fx_random(*n + 1, 1), *y = fx_random(*n + 1, 2);
    cr_assert_eq(qs_ops_cpu()->accumulate(queue, x, y, *n), QS_OK);
    for (int64_t i = 0; i < *n; i++) {
        cr_assert_eq(x[i], before[i] + y[i]);
    }
    cr_assert_eq(x[*n], before[*n]);
    free(x);
    free(before);
    free(y);
    qs_queue_destroy(queue);
}

typedef struct {
    int64_t count;
    double weight_decay, grad_scale;
} adamw_case;

ParameterizedTestParameters(adamw, follows_the_paper_over_steps)
{
    static adamw_case c[] = {{0, 0.0, 1.0}, {1, 0.0, 1.0}, {33, 0.1, 0.25}, {20000, 0.01, 1.0}};
    return cr_make_param_array(adamw_case, c, sizeof c / sizeof *c);
}
ParameterizedTest(adamw_case *c, adamw, follows_the_paper_over_steps)
{
    qs_queue *queue = fx_queue(2);
    float *p = fx_random(c->count, 1), *m = fx_random(c->count, 2), *v = fx_random(c->count, 3);
    double *p64 = fx_double(p, c->count);
    double *m64 = calloc((size_t)c->count + 1, sizeof *m64);
    double *v64 = calloc((size_t)c->count + 1, sizeof *v64);
    memset(m, 0, (size_t)c->count * sizeof *m);
    memset(v, 0, (size_t)c->count * sizeof *v);
    for (int step = 1; step <= 5; step++) {
        float *grad = fx_random(c->count, 10 + (uint64_t)step);
        qs_update_args a = {.lr = 1e-2,
                            .beta1 = 0.9,
                            .beta2 = 0.999,
                            .eps = 1e-8,
                            .weight_decay = c->weight_decay,
                            .grad_scale = c->grad_scale,
                            .bias_correction1 = 1.0 - pow(0.9, step),
                            .bias_correction2 = 1.0 - pow(0.999, step)};
        cr_assert_eq(qs_ops_cpu()->update(queue, &a, c->count, grad, p, m, v), QS_OK);
        for (int64_t i = 0; i < c->count; i++) {
            double g = (double)grad[i] * c->grad_scale;
            m64[i] = 0.9 * m64[i] + 0.1 * g;
            v64[i] = 0.999 * v64[i] + 0.001 * g * g;
            double denominator = sqrt(v64[i] / a.bias_correction2) + 1e-8;
            p64[i] *= 1.0 - 1e-2 * c->weight_decay;
            p64[i] -= 1e-2 * m64[i] / a.bias_correction1 / denominator;
            /* A step moves a parameter of size 1 by at most about lr: a few ulp of both. */
            cr_assert_float_eq((double)p[i], p64[i], 1e-6, "step %d element %ld", step, (long)i);
            cr_assert_float_eq((double)m[i], m64[i], 2e-7);
            cr_assert_leq(fabs((double)v[i] - v64[i]), 1e-6 * v64[i] + 1e-12);
        }
        free(grad);
    }
    free(p);
    free(m);
    free(v);
    free(p64);
    free(m64);
    free(v64);
    qs_queue_destroy(queue);
}

Test(adamw, a_parameter_without_gradient_only_decays)
{
    qs_queue *queue = fx_queue(1);
    float p = 2.0F, m = 0.0F, v = 0.0F, grad = 0.0F;
    qs_update_args a = {QS_OPTIM_ADAMW, 1e-2, 0.9, 0.999, 1e-8, 0.5, 1.0, 0.1, 0.001};
    cr_assert_eq(qs_ops_cpu()->update(queue, &a, 1, &grad, &p, &m, &v), QS_OK);
    cr_assert_eq(p, 2.0F * (float)(1.0 - 1e-2 * 0.5));
    cr_assert_eq(m, 0.0F);
    cr_assert_eq(v, 0.0F);
    qs_queue_destroy(queue);
}

/* Three steps of torch.optim 2.15 in fp64 on w = [0.5, -1.25, 2, 0] with gradients [0.3 s, -0.2, 0,
 * 2.5 - s] at step s, weight decay 0.1; lr 0.01, for adadelta 1 with rho 0.9 and eps 1e-6. */
typedef struct {
    qs_optim_kind kind;
    const char *name;
    double w[3][4];
} torch_case;

ParameterizedTestParameters(update, three_steps_are_torchs)
{
    static torch_case c[] = {
        {QS_OPTIM_ADAM,
         "adam",
         {{0.4900000002857143, -1.2400000003076923, 1.9900000005, -0.009999999933333333},
          {0.48027031738957615, -1.230000815742507, 1.9800013389550066, -0.018707672443254476},
          {0.4706109261680111, -1.2200029910343033, 1.9700049129954467, -0.02318795613395827}}},
        {QS_OPTIM_SGD,
         "sgd",
         {{0.4965, -1.24675, 1.998, -0.015},
          {0.4900035, -1.24350325, 1.996002, -0.019985},
          {0.48051349649999997, -1.24025974675, 1.994005998, -0.014965015}}},
        {QS_OPTIM_ADADELTA,
         "adadelta",
         {{0.49683785140448733, -1.2468378720228204, 1.9968381175504386, -0.003162270632908115},
          {0.49285577184021584, -1.2435950976545118, 1.9935965379983454, -0.004643929698052817},
          {0.48808534902526235, -1.2402980386851992, 1.9903019883912414, -0.003123917857030191}}},
    };
    return cr_make_param_array(torch_case, c, sizeof c / sizeof *c);
}
ParameterizedTest(torch_case *c, update, three_steps_are_torchs)
{
    qs_queue *queue = fx_queue(1);
    float w[4] = {0.5F, -1.25F, 2.0F, 0.0F}, m[4] = {0}, v[4] = {0};
    const bool adadelta = c->kind == QS_OPTIM_ADADELTA;
    for (int step = 1; step <= 3; step++) {
        const float grad[4] = {0.3F * (float)step, -0.2F, 0.0F, 2.5F - (float)step};
        qs_update_args a = {.kind = c->kind,
                            .lr = adadelta ? 1.0 : 0.01,
                            .beta1 = 0.9,
                            .beta2 = 0.999,
                            .eps = adadelta ? 1e-6 : 1e-8,
                            .weight_decay = 0.1,
                            .grad_scale = 1.0,
                            .bias_correction1 = 1.0 - pow(0.9, step),
                            .bias_correction2 = 1.0 - pow(0.999, step)};
        cr_assert_eq(qs_ops_cpu()->update(queue, &a, 4, grad, w, m, v), QS_OK);
        for (int i = 0; i < 4; i++) {
            /* A few roundings of numbers of size 1 and of steps of 0.01. */
            cr_assert_float_eq((double)w[i], c->w[step - 1][i], 5e-7, "%s, step %d, element %d",
                               c->name, step, i);
        }
    }
    qs_queue_destroy(queue);
}
