/* Operations on rows: RMSNorm, RoPE, gated MLPs, addition; and the elementary functions below them.
 */
#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <math.h>
#include <string.h>

#include "kernels/cpu/isa.h"
#include "kernels/ops.h"
#include "ops_fixture.h"

typedef struct {
    int64_t rows, cols;
} shape_case;

#define SHAPES {0, 8}, {1, 1}, {1, 16}, {3, 17}, {5, 64}, {2, 333}, {40, 576},

/* ---- exp and log ---- */

Test(math, exp_is_within_two_ulp_and_ends_where_it_should)
{
    double worst = 0.0;
    for (int64_t i = 0; i <= 176000; i++) {
        float x = -87.68F + (float)i * 1e-3F;
        double want = exp((double)x);
        if (x > 88.37F) {
            break; /* from here on infinity, a little early */
        }
        int exponent = ilogb(want) > -126 ? ilogb(want) : -126; /* the first ones are denormal */
        double off = fabs((double)qs_exp_fixed(x) - want) / ldexp(1.0, exponent - 23);
        worst = off > worst ? off : worst;
    }
    cr_assert_leq(worst, 2.0, "%g ulp", worst);
    cr_assert_eq(qs_exp_fixed(0.0F), 1.0F);
    cr_assert_eq(qs_exp_fixed(-INFINITY), 0.0F);
    cr_assert_eq(qs_exp_fixed(-87.69F), 0.0F); /* from here down */
    cr_assert_eq(qs_exp_fixed(-200.0F), 0.0F);
    cr_assert_eq(qs_exp_fixed(88.4F), INFINITY);
    cr_assert_eq(qs_exp_fixed(100.0F), INFINITY);
    cr_assert_eq(qs_exp_fixed(INFINITY), INFINITY);
    cr_assert(isnan(qs_exp_fixed(NAN)));
}

Test(math, log_is_within_four_ulp_of_fp64)
{
    const double x[] = {1.0, 1.0 + 1e-9, 0.70710678, 1.41421357, 2.0, 49152.0, 1e-30, 3.3e38, 7.25};
    for (size_t i = 0; i < sizeof x / sizeof *x; i++) {
        double want = log(x[i]);
        cr_assert_leq(fabs(qs_log_fixed(x[i]) - want), 4 * 0x1p-53 * fabs(want) + 1e-300, "log(%g)",
                      x[i]);
    }
    cr_assert_eq(qs_log_fixed(1.0), 0.0);
}

Test(math, soft_cap_is_within_four_ulp_and_ends_at_the_cap)
{
    enum { COUNT = 60001 };
    float *x = malloc(COUNT * sizeof *x), *d = malloc(COUNT * sizeof *d);
    for (int i = 0; i < COUNT; i++) {
        x[i] = (float)(i - COUNT / 2) * 1e-3F;
        d[i] = 3.0F;
    }
    qs_isa_get()->soft_cap(x, COUNT, 0.5F, 2.0F);
    qs_isa_get()->soft_cap_backward(x, COUNT, 1.0F, 2.0F, d);
    for (int i = 0; i < COUNT; i++) {
        const double s = 0.5 * (double)((float)(i - COUNT / 2) * 1e-3F), t = tanh(s / 2.0);
        cr_assert_float_eq((double)x[i], 2.0 * t, 4 * 0x1p-24 * fabs(2.0 * t), "%g", s);
        cr_assert_float_eq((double)d[i], 2.0 * (1.0 - t * t), 1e-6, "%g", s);
    }
    cr_assert_eq(x[COUNT / 2], 0.0F);
    float ends[4] = {-INFINITY, INFINITY, 1e30F, NAN};
    qs_isa_get()->soft_cap(ends, 4, 1.0F, 30.0F);
    cr_assert(ends[0] == -30.0F && ends[1] == 30.0F && ends[2] == 30.0F && isnan(ends[3]));
    free(x);
    free(d);
}

/* ---- RMSNorm ---- */

typedef struct {
    int64_t rows, cols;
    double *x, *w, *dy;
    double eps;
} norm_reference;

static double norm_loss(const void *ctx)
{
    const norm_reference *n = ctx;
    double loss = 0.0;
    for (int64_t t = 0; t < n->rows; t++) {
        const double *x = n->x + t * n->cols;
        double mean = 0.0;
        for (int64_t i = 0; i < n->cols; i++) {
            mean += x[i] * x[i] / (double)n->cols;
        }
        for (int64_t i = 0; i < n->cols; i++) {
            loss += n->dy[t * n->cols + i] * x[i] / sqrt(mean + n->eps) * n->w[i];
        }
    }
    return loss;
}

ParameterizedTestParameters(rmsnorm, forward_matches_fp64)
{
    static shape_case c[] = {SHAPES};
    return cr_make_param_array(shape_case, c, sizeof c / sizeof *c);
}
ParameterizedTest(shape_case *c, rmsnorm, forward_matches_fp64)
{
    qs_queue *queue = fx_queue(2);
    qs_mat x = fx_mat(c->rows, c->cols, 3, 1), y = fx_mat(c->rows, c->cols, 2, 2);
    float *w = fx_random(c->cols, 3), *rstd = fx_random(c->rows, 4);
    cr_assert_eq(qs_ops_cpu()->rmsnorm_forward(queue, &x, w, 1e-5F, rstd, &y), QS_OK);
    for (int64_t t = 0; t < c->rows; t++) {
        double mean = 0.0;
        for (int64_t i = 0; i < c->cols; i++) {
            mean += fx_at(&x, t, i) * fx_at(&x, t, i) / (double)c->cols;
        }
        double want = 1.0 / sqrt(mean + 1e-5);
        /* Half of the sum's relative error (cols / 16 + 4 roundings), and five more roundings. */
        double relative = ((double)c->cols / 32.0 + 8.0) * 0x1p-24;
        cr_assert_leq(fabs((double)rstd[t] - want), relative * want);
        for (int64_t i = 0; i < c->cols; i++) {
            double out = fx_at(&x, t, i) * want * (double)w[i];
            cr_assert_leq(fabs(fx_at(&y, t, i) - out), relative * fabs(out) + 1e-30);
        }
    }
    cr_assert(fx_mat_gap_intact(&y));
    free(w);
    free(rstd);
    fx_mat_free(&x);
    fx_mat_free(&y);
    qs_queue_destroy(queue);
}

ParameterizedTestParameters(rmsnorm, backward_adds_the_derivative)
{
    static shape_case c[] = {{0, 8}, {1, 1}, {1, 16}, {3, 17}, {5, 64}};
    return cr_make_param_array(shape_case, c, sizeof c / sizeof *c);
}
ParameterizedTest(shape_case *c, rmsnorm, backward_adds_the_derivative)
{
    qs_queue *queue = fx_queue(2);
    const float eps = 1e-3F;
    qs_mat x = fx_mat(c->rows, c->cols, 0, 1), y = fx_mat(c->rows, c->cols, 0, 2);
    qs_mat dy = fx_mat(c->rows, c->cols, 0, 3), dx = fx_mat(c->rows, c->cols, 0, 4);
    float *w = fx_random(c->cols, 5), *rstd = fx_random(c->rows, 6);
    double *before = fx_double(dx.data, c->rows * c->cols);
    norm_reference n = {c->rows,
                        c->cols,
                        fx_double(x.data, c->rows * c->cols),
                        fx_double(w, c->cols),
                        fx_double(dy.data, c->rows * c->cols),
                        (double)eps};
    cr_assert_eq(qs_ops_cpu()->rmsnorm_forward(queue, &x, w, eps, rstd, &y), QS_OK);
    cr_assert_eq(qs_ops_cpu()->rmsnorm_backward(queue, &dy, &x, w, rstd, &dx), QS_OK);
    for (int64_t i = 0; i < c->rows * c->cols; i++) {
        double want = before[i] + fx_difference(norm_loss, &n, n.x, i, 1e-5);
        cr_assert_float_eq((double)qs_mat_f32(&dx)[i], want, 2e-5 * (1.0 + fabs(want)),
                           "element %ld", (long)i);
    }
    free(n.x);
    free(n.w);
    free(n.dy);
    free(before);
    free(w);
    free(rstd);
    fx_mat_free(&x);
    fx_mat_free(&y);
    fx_mat_free(&dy);
    fx_mat_free(&dx);
    qs_queue_destroy(queue);
}

/* ---- RoPE ---- */

typedef struct {
    int64_t rows;
    int n_heads, head_dim, rotary_dim;
} rope_case;

ParameterizedTestParameters(rope, turns_pairs_by_the_angle_and_back)
{
    static rope_case c[] = {{0, 2, 8, 8},    {1, 1, 2, 2}, {7, 3, 6, 6},
                            {33, 9, 64, 64}, {7, 3, 8, 6}, {9, 2, 64, 48}};
    return cr_make_param_array(rope_case, c, sizeof c / sizeof *c);
}
ParameterizedTest(rope_case *c, rope, turns_pairs_by_the_angle_and_back)
{
    enum { POSITIONS = 50 };
    qs_queue *queue = fx_queue(2);
    int half = c->rotary_dim / 2;
    int64_t width = (int64_t)c->n_heads * c->head_dim;
    qs_mat x = fx_mat(c->rows, width, 3, 1), before = fx_mat(c->rows, width, 3, 1);
    float *angle = fx_random((int64_t)POSITIONS * half, 2);
    float *cosine = malloc(sizeof(float) * (size_t)(POSITIONS * half));
    float *sine = malloc(sizeof(float) * (size_t)(POSITIONS * half));
    int32_t position[64];
    for (int i = 0; i < POSITIONS * half; i++) {
        cosine[i] = cosf(3.0F * angle[i]);
        sine[i] = sinf(3.0F * angle[i]);
    }
    for (int t = 0; t < 64; t++) {
        position[t] = (t * 7) % POSITIONS; /* not ascending: documents restart */
    }
    const qs_ops *ops = qs_ops_cpu();
    cr_assert_eq(
        ops->rope(queue, &x, c->n_heads, c->head_dim, c->rotary_dim, cosine, sine, position, false),
        QS_OK);
    for (int64_t t = 0; t < c->rows; t++) {
        for (int64_t i = 0; i < width; i++) {
            int64_t in_head = i % c->head_dim, pair = in_head % half;
            if (in_head >= c->rotary_dim) {
                cr_assert_eq(fx_at(&x, t, i), fx_at(&before, t, i), "what does not turn stays");
                continue;
            }
            double cos1 = (double)cosine[position[t] * half + pair];
            double sin1 = (double)sine[position[t] * half + pair];
            double other =
                in_head < half ? -fx_at(&before, t, i + half) : fx_at(&before, t, i - half);
            double want =
                fx_at(&before, t, i) * cos1 + other * sin1; /* x cos + rotate_half(x) sin */
            cr_assert_float_eq(fx_at(&x, t, i), want, 4 * 0x1p-24);
        }
    }
    cr_assert(fx_mat_gap_intact(&x));
    cr_assert_eq(
        ops->rope(queue, &x, c->n_heads, c->head_dim, c->rotary_dim, cosine, sine, position, true),
        QS_OK);
    for (int64_t t = 0; t < c->rows; t++) {
        for (int64_t i = 0; i < width; i++) {
            cr_assert_float_eq(fx_at(&x, t, i), fx_at(&before, t, i), 1e-6);
        }
    }
    free(angle);
    free(cosine);
    free(sine);
    fx_mat_free(&x);
    fx_mat_free(&before);
    qs_queue_destroy(queue);
}

/* ---- gated MLPs ---- */

typedef struct {
    double gate, up, dact;
    qs_glu glu;
} glu_point;

static double glu_loss(const void *ctx)
{
    const glu_point *p = ctx;
    const double g = p->gate, u = sqrt(2.0 / 3.14159265358979323846) * (g + 0.044715 * g * g * g);
    const double gated = p->glu == QS_GLU_SILU ? g / (1.0 + exp(-g)) : 0.5 * g * (1.0 + tanh(u));
    return p->dact * gated * p->up;
}

static void check_glu(const shape_case *c, qs_glu glu)
{
    qs_queue *queue = fx_queue(2);
    qs_mat gate = fx_mat(c->rows, c->cols, 1, 1), up = fx_mat(c->rows, c->cols, 2, 2);
    qs_mat dact = fx_mat(c->rows, c->cols, 3, 3), act = fx_mat(c->rows, c->cols, 4, 4);
    qs_mat dgate = fx_mat(c->rows, c->cols, 0, 5), dup = fx_mat(c->rows, c->cols, 0, 6);
    for (int64_t i = 0; i < c->rows * gate.stride; i++) {
        qs_mat_f32(&gate)[i] *= 8.0F;
    }
    const qs_ops *ops = qs_ops_cpu();
    cr_assert_eq(ops->glu_forward(queue, glu, &gate, &up, &act), QS_OK);
    cr_assert_eq(ops->glu_backward(queue, glu, &gate, &up, &dact, &dgate, &dup), QS_OK);
    for (int64_t t = 0; t < c->rows; t++) {
        for (int64_t i = 0; i < c->cols; i++) {
            glu_point p = {fx_at(&gate, t, i), fx_at(&up, t, i), 1.0, glu};
            double want = glu_loss(&p);
            /* an ulp of z is one of the exponent: |z| of them in a gate that is nearly closed, and
             * |z| is 40 times larger at -8 for GELU */
            const double relative = glu == QS_GLU_SILU ? 1e-6 : 1e-5;
            cr_assert_float_eq(fx_at(&act, t, i), want, relative * fabs(want) + 1e-9);
            p.dact = fx_at(&dact, t, i);
            /* fp64 differences with this step are good to 1e-9. */
            double dg = fx_difference(glu_loss, &p, &p.gate, 0, 1e-5);
            double du = fx_difference(glu_loss, &p, &p.up, 0, 1e-5);
            cr_assert_float_eq(fx_at(&dgate, t, i), dg, 2e-6);
            cr_assert_float_eq(fx_at(&dup, t, i), du, 4e-6);
        }
    }
    cr_assert(fx_mat_gap_intact(&act));
    /* In place: dgate over dact, and dup over dact. */
    qs_mat other = fx_mat(c->rows, c->cols, 0, 7), over = fx_mat(c->rows, c->cols, 3, 3);
    cr_assert_eq(ops->glu_backward(queue, glu, &gate, &up, &over, &over, &other), QS_OK);
    for (int64_t t = 0; t < c->rows; t++) {
        for (int64_t i = 0; i < c->cols; i++) {
            cr_assert_eq(fx_at(&over, t, i), fx_at(&dgate, t, i));
            cr_assert_eq(fx_at(&other, t, i), fx_at(&dup, t, i));
        }
    }
    cr_assert_eq(ops->glu_backward(queue, glu, &gate, &up, &dact, &other, &dact), QS_OK);
    for (int64_t t = 0; t < c->rows; t++) {
        for (int64_t i = 0; i < c->cols; i++) {
            cr_assert_eq(fx_at(&dact, t, i), fx_at(&dup, t, i));
            cr_assert_eq(fx_at(&other, t, i), fx_at(&dgate, t, i));
        }
    }
    /* dgate and dup over gate and up. */
    qs_mat again = fx_mat(c->rows, c->cols, 3, 3);
    cr_assert_eq(ops->glu_backward(queue, glu, &gate, &up, &again, &gate, &up), QS_OK);
    for (int64_t t = 0; t < c->rows; t++) {
        for (int64_t i = 0; i < c->cols; i++) {
            cr_assert_eq(fx_at(&gate, t, i), fx_at(&dgate, t, i));
            cr_assert_eq(fx_at(&up, t, i), fx_at(&dup, t, i));
        }
    }
    qs_mat *mats[] = {&gate, &up, &dact, &act, &dgate, &dup, &other, &over, &again};
    for (size_t i = 0; i < sizeof mats / sizeof *mats; i++) {
        fx_mat_free(mats[i]);
    }
    qs_queue_destroy(queue);
}

ParameterizedTestParameters(glu, forward_and_backward_match_fp64)
{
    static shape_case c[] = {SHAPES};
    return cr_make_param_array(shape_case, c, sizeof c / sizeof *c);
}
ParameterizedTest(shape_case *c, glu, forward_and_backward_match_fp64)
{
    check_glu(c, QS_GLU_SILU);
    check_glu(c, QS_GLU_GELU_TANH);
}

static void check_large_gates(qs_glu glu)
{
    float g[4] = {-1000.0F, -90.0F, 90.0F, 1000.0F}, u[4] = {1, 1, 1, 1}, d[4] = {1, 1, 1, 1};
    float y[4], dg[4], du[4];
    qs_mat gate = {g, 1, 4, 4, QS_F32}, up = {u, 1, 4, 4, QS_F32}, dact = {d, 1, 4, 4, QS_F32};
    qs_mat act = {y, 1, 4, 4, QS_F32}, dgate = {dg, 1, 4, 4, QS_F32}, dup = {du, 1, 4, 4, QS_F32};
    qs_queue *queue = fx_queue(1);
    cr_assert_eq(qs_ops_cpu()->glu_forward(queue, glu, &gate, &up, &act), QS_OK);
    cr_assert_eq(qs_ops_cpu()->glu_backward(queue, glu, &gate, &up, &dact, &dgate, &dup), QS_OK);
    for (int i = 0; i < 4; i++) {
        cr_assert_float_eq((double)y[i], i < 2 ? 0.0 : (double)g[i], 1e-30);
        cr_assert_float_eq((double)dg[i], i < 2 ? 0.0 : 1.0, 1e-30);
        cr_assert_float_eq((double)du[i], i < 2 ? 0.0 : (double)g[i], 1e-30);
    }
    qs_queue_destroy(queue);
}

Test(glu, large_gates_neither_overflow_nor_vanish)
{
    check_large_gates(QS_GLU_SILU);
    check_large_gates(QS_GLU_GELU_TANH);
}

/* ---- additions ---- */

Test(add, adds_every_element_once_and_keeps_the_gap)
{
    qs_queue *queue = fx_queue(3);
    qs_mat x = fx_mat(301, 333, 4, 1), y = fx_mat(301, 333, 2, 2), before = fx_mat(301, 333, 2, 2);
    cr_assert_eq(qs_ops_cpu()->add(queue, &x, &y, &y), QS_OK);
    for (int64_t t = 0; t < x.rows; t++) {
        for (int64_t i = 0; i < x.cols; i++) {
            float want =
                qs_mat_f32(&before)[t * before.stride + i] + qs_mat_f32(&x)[t * x.stride + i];
            cr_assert_eq(qs_mat_f32(&y)[t * y.stride + i], want);
        }
    }
    cr_assert(fx_mat_gap_intact(&y));
    fx_mat_free(&x);
    fx_mat_free(&y);
    fx_mat_free(&before);
    qs_queue_destroy(queue);
}

Test(scale, multiplies_every_element_and_keeps_the_gap)
{
    qs_queue *queue = fx_queue(3);
    qs_mat y = fx_mat(301, 333, 2, 2), before = fx_mat(301, 333, 2, 2);
    cr_assert_eq(qs_ops_cpu()->scale(queue, 7.3F, &y), QS_OK);
    for (int64_t t = 0; t < y.rows; t++) {
        for (int64_t i = 0; i < y.cols; i++) {
            cr_assert_eq(qs_mat_f32(&y)[t * y.stride + i],
                         qs_mat_f32(&before)[t * before.stride + i] * 7.3F);
        }
    }
    cr_assert(fx_mat_gap_intact(&y));
    fx_mat_free(&y);
    fx_mat_free(&before);
    qs_queue_destroy(queue);
}
