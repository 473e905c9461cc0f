/* DoRA beside a linear: row norms, values, and gradients by differences of the formula in fp64, in
 * which the norms are constants. */
#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <math.h>
#include <string.h>

#include "kernels/ops.h"
#include "ops_fixture.h"

typedef enum { NO_RESIDUAL, RESIDUAL, RESIDUAL_IN_PLACE } residual_kind;

typedef struct {
    int64_t rows, in, out;
    int rank;
    float dropout;
    residual_kind residual;
    bool bias, accumulate;
} dora_case;

/* One linear in fp32, and what differences are taken of in fp64. */
typedef struct {
    const dora_case *c;
    fx_unit unit;
    qs_lora lora;
    qs_mat x, y, dy, xa, work, dx, residual;
    float *bias, *magnitude, *norm, *gain, *da, *db, *dm;
    int64_t *sample, *row_at;
    double *x64, *a64, *b64, *m64, *kept; /* kept: mask / (1 - p) */
} fixture;

static double weight_at(const fixture *f, int64_t o, int64_t i)
{
    double ba = 0;
    for (int r = 0; r < f->c->rank; r++) {
        ba += f->b64[o * f->c->rank + r] * f->a64[r * f->c->in + i];
    }
    return (double)f->unit.plain[o * f->c->in + i] + (double)f->lora.scale * ba;
}

static double norm_at(const fixture *f, int64_t o)
{
    double squares = 0;
    for (int64_t i = 0; i < f->c->in; i++) {
        squares += weight_at(f, o, i) * weight_at(f, o, i);
    }
    return sqrt(squares);
}

static void draw_masks(fixture *f)
{
    const dora_case *c = f->c;
    f->kept = malloc((size_t)(c->rows * c->in + 1) * sizeof *f->kept);
    for (int64_t t = 0; t < c->rows; t++) {
        f->sample[t] = t / 3;
        f->row_at[t] = t % 3;
        const qs_rng rng = qs_rng_make(42, 7, (uint64_t)f->sample[t], QS_RNG_DROPOUT + 2, 5);
        for (int64_t i = 0; i < c->in; i++) {
            const float u = qs_rng_uniform(&rng, (uint64_t)(f->row_at[t] * c->in + i));
            f->kept[t * c->in + i] = u >= c->dropout ? 1.0 / (1.0 - (double)c->dropout) : 0.0;
        }
    }
}

static fixture make(const dora_case *c)
{
    const fx_weight_spec spec = {QS_WEIGHT_NF4, c->out, c->in, QS_BF16, true, 2, 0};
    fixture f = {.c = c, .unit = fx_unit_create(&spec, 20)};
    f.x = fx_mat(c->rows, c->in, 3, 1);
    f.y = fx_mat(c->rows, c->out, 1, 2);
    f.residual = fx_mat(c->rows, c->out, 1, 2);
    f.dy = fx_mat(c->rows, c->out, 2, 3);
    f.xa = fx_mat(c->rows, c->rank, 0, 4);
    f.work = fx_mat(c->rows, c->rank, 0, 5);
    f.dx = fx_mat(c->rows, c->in, 4, 6);
    f.bias = fx_random(c->out, 7);
    f.magnitude = fx_random(c->out, 8);
    f.norm = fx_random(c->out, 9);
    f.gain = fx_random(c->out, 10);
    f.da = fx_random(c->rank * c->in, 11);
    f.db = fx_random(c->rank * c->out, 12);
    f.dm = fx_random(c->out, 13);
    f.sample = malloc((size_t)(c->rows + 1) * sizeof *f.sample);
    f.row_at = malloc((size_t)(c->rows + 1) * sizeof *f.row_at);
    f.lora = fx_adapter(c->rank, c->in, c->out, c->dropout, 14);
    f.lora.sample = f.sample;
    f.lora.row_at = f.row_at;
    draw_masks(&f);
    f.x64 = malloc((size_t)(c->rows * c->in + 1) * sizeof *f.x64);
    for (int64_t t = 0; t < c->rows; t++) {
        for (int64_t i = 0; i < c->in; i++) {
            f.x64[t * c->in + i] = fx_at(&f.x, t, i);
        }
    }
    f.a64 = fx_double(f.lora.a, c->rank * c->in);
    f.b64 = fx_double(f.lora.b, c->rank * c->out);
    f.m64 = fx_double(f.magnitude, c->out);
    return f;
}

static void destroy(fixture *f)
{
    qs_mat *mats[] = {&f->x, &f->y, &f->dy, &f->xa, &f->work, &f->dx, &f->residual};
    for (size_t i = 0; i < sizeof mats / sizeof *mats; i++) {
        fx_mat_free(mats[i]);
    }
    void *rest[] = {
        f->bias,           f->magnitude,      f->norm,   f->gain, f->da,  f->db,  f->dm,  f->sample,
        (void *)f->lora.a, (void *)f->lora.b, f->row_at, f->x64,  f->a64, f->b64, f->m64, f->kept};
    for (size_t i = 0; i < sizeof rest / sizeof *rest; i++) {
        free(rest[i]);
    }
    fx_unit_destroy(&f->unit);
}

static void compute_norms(qs_queue *q, fixture *f)
{
    cr_assert_eq(qs_ops_cpu()->dora_norms(q, &f->unit.view, &f->unit.weight, &f->lora, f->magnitude,
                                          f->norm, f->gain),
                 QS_OK);
    f->lora.gain = f->gain;
    f->lora.norm = f->norm;
}

/* W x + bias + (g - 1) W drop(x) + g s B A drop(x); the norms are the operation's. */
static double output_at(const fixture *f, int64_t t, int64_t o)
{
    const int64_t in = f->c->in;
    const double gain = f->m64[o] / (double)f->norm[o];
    double y = f->c->bias ? (double)f->bias[o] : 0;
    for (int64_t i = 0; i < in; i++) {
        const double w = (double)f->unit.plain[o * in + i], x = f->x64[t * in + i];
        const double dropped = x * f->kept[t * in + i];
        y += w * x + (gain - 1) * w * dropped + gain * (weight_at(f, o, i) - w) * dropped;
    }
    return y;
}

/* sum dy * y: its derivatives are what the backward returns. */
static double loss(const void *ctx)
{
    const fixture *f = ctx;
    double sum = 0;
    for (int64_t t = 0; t < f->c->rows; t++) {
        for (int64_t o = 0; o < f->c->out; o++) {
            sum += fx_at(&f->dy, t, o) * output_at(f, t, o);
        }
    }
    return sum;
}

/* A row of x, and one longer than a quantum's block of 64; rows beyond the block of 256. */
#define DORA_CASES                                                                                 \
    {5, 40, 24, 4, 0.0F, NO_RESIDUAL, true, false}, {7, 70, 19, 3, 0.3F, RESIDUAL, true, true},    \
        {4, 64, 9, 2, 0.0F, RESIDUAL_IN_PLACE, false, true},                                       \
        {4, 33, 9, 2, 0.5F, RESIDUAL_IN_PLACE, true, false},                                       \
        {1, 5, 3, 1, 0.0F, RESIDUAL, false, false}, {0, 16, 16, 2, 0.5F, RESIDUAL, true, false},

static const qs_mat *residual_of(fixture *f)
{
    if (f->c->residual == NO_RESIDUAL) {
        return NULL;
    }
    return f->c->residual == RESIDUAL ? &f->residual : &f->y; /* the same numbers */
}

static void run_forward(qs_queue *q, fixture *f)
{
    compute_norms(q, f);
    cr_assert_eq(qs_ops_cpu()->linear_lora_forward(q, &f->unit.view, &f->unit.weight,
                                                   f->c->bias ? f->bias : NULL, residual_of(f),
                                                   &f->lora, &f->x, &f->xa, &f->y),
                 QS_OK);
}

ParameterizedTestParameters(dora, forward_is_the_formula)
{
    static dora_case c[] = {DORA_CASES{300, 40, 24, 4, 0.0F, RESIDUAL_IN_PLACE, true, false},
                            {300, 40, 24, 4, 0.2F, RESIDUAL_IN_PLACE, true, false},
                            {530, 20, 600, 2, 0.2F, NO_RESIDUAL, false, false}};
    return cr_make_param_array(dora_case, c, sizeof c / sizeof *c);
}
ParameterizedTest(dora_case *c, dora, forward_is_the_formula)
{
    qs_queue *queue = fx_queue(2);
    fixture f = make(c);
    run_forward(queue, &f);
    for (int64_t t = 0; t < c->rows; t++) {
        for (int64_t o = 0; o < c->out; o++) {
            double want = output_at(&f, t, o);
            want += c->residual != NO_RESIDUAL ? fx_at(&f.residual, t, o) : 0;
            /* Sums of at most 70 terms of about 3 / (1 - p), and a few roundings beside. */
            cr_assert_float_eq(fx_at(&f.y, t, o), want, 1e-4, "%ld,%ld: %g, not %g", (long)t,
                               (long)o, fx_at(&f.y, t, o), want);
        }
    }
    cr_assert(fx_mat_gap_intact(&f.y));
    destroy(&f);
    qs_queue_destroy(queue);
}

/* Element `at` of a gradient against the difference, 1e-5 of the whole gradient's largest. */
static void check(const fixture *f, const float *got, double *of, int64_t count, int64_t stride,
                  const char *what)
{
    double largest = 1;
    for (int64_t i = 0; i < count; i++) {
        largest = fmax(largest, fabs((double)got[i]));
    }
    for (int64_t i = 0; i < count; i += stride) {
        const double want = fx_difference(loss, f, of, i, 1e-3);
        cr_assert_float_eq((double)got[i], want, 1e-5 * largest, "%s[%ld]: %g, not %g", what,
                           (long)i, (double)got[i], want);
    }
}

ParameterizedTestParameters(dora, backward_is_the_derivative_with_constant_norms)
{
    static dora_case c[] = {DORA_CASES{300, 20, 12, 2, 0.0F, NO_RESIDUAL, true, true},
                            {300, 20, 12, 2, 0.25F, NO_RESIDUAL, true, true}};
    return cr_make_param_array(dora_case, c, sizeof c / sizeof *c);
}
ParameterizedTest(dora_case *c, dora, backward_is_the_derivative_with_constant_norms)
{
    const qs_ops *ops = qs_ops_cpu();
    qs_queue *queue = fx_queue(2);
    fixture f = make(c);
    run_forward(queue, &f);
    double *before = malloc((size_t)(c->rows * c->in + 1) * sizeof *before);
    float *dx = malloc((size_t)(c->rows * c->in + 1) * sizeof *dx);
    for (int64_t e = 0; e < c->rows * c->in; e++) {
        before[e] = c->accumulate ? fx_at(&f.dx, e / c->in, e % c->in) : 0;
    }
    cr_assert_eq(
        ops->dora_backward(queue, &f.unit.view, &f.unit.weight, &f.lora, &f.x, &f.xa, &f.dy, f.dm),
        QS_OK);
    cr_assert_eq(ops->linear_lora_backward(queue, &f.unit.view, &f.unit.weight, &f.lora, &f.x,
                                           &f.xa, &f.dy, &f.work, f.da, f.db, &f.dx, c->accumulate),
                 QS_OK);
    for (int64_t e = 0; e < c->rows * c->in; e++) {
        dx[e] = (float)(fx_at(&f.dx, e / c->in, e % c->in) - before[e]);
    }
    const int64_t stride = c->rows > 100 ? 37 : 1; /* of many differences, some */
    check(&f, f.dm, f.m64, c->out, 1, "dm");
    check(&f, f.da, f.a64, c->rank * c->in, 1, "da");
    check(&f, f.db, f.b64, c->rank * c->out, 1, "db");
    check(&f, dx, f.x64, c->rows * c->in, stride, "dx");
    cr_assert(fx_mat_gap_intact(&f.dx));

    /* Below the first layer no dx is wanted: the rest is the same. */
    float *da = fx_random(c->rank * c->in, 30), *db = fx_random(c->rank * c->out, 31);
    cr_assert_eq(ops->linear_lora_backward(queue, &f.unit.view, &f.unit.weight, &f.lora, &f.x,
                                           &f.xa, &f.dy, &f.work, da, db, NULL, false),
                 QS_OK);
    cr_assert_eq(memcmp(da, f.da, (size_t)(c->rank * c->in) * sizeof *da), 0);
    cr_assert_eq(memcmp(db, f.db, (size_t)(c->rank * c->out) * sizeof *db), 0);
    free(da);
    free(db);
    free(dx);
    free(before);
    destroy(&f);
    qs_queue_destroy(queue);
}

ParameterizedTestParameters(dora, norms_are_those_of_the_rows)
{
    static dora_case c[] = {{1, 5, 3, 1, 0, NO_RESIDUAL, false, false},
                            {1, 300, 150, 16, 0, NO_RESIDUAL, false, false}};
    return cr_make_param_array(dora_case, c, sizeof c / sizeof *c);
}
ParameterizedTest(dora_case *c, dora, norms_are_those_of_the_rows)
{
    qs_queue *queue = fx_queue(2);
    fixture f = make(c);
    compute_norms(queue, &f);
    for (int64_t o = 0; o < c->out; o++) {
        const double want = norm_at(&f, o);
        cr_assert_float_eq((double)f.norm[o], want, 1e-6 * want);
        cr_assert_float_eq((double)f.gain[o], f.m64[o] / want, 2e-6 * fabs(f.m64[o] / want));
    }
    /* Without an adapter those of W alone, and without magnitudes no gain. */
    const qs_lora none = {0};
    memset(f.b64, 0, (size_t)(c->rank * c->out) * sizeof *f.b64);
    cr_assert_eq(
        qs_ops_cpu()->dora_norms(queue, &f.unit.view, &f.unit.weight, &none, NULL, f.norm, NULL),
        QS_OK);
    for (int64_t o = 0; o < c->out; o++) {
        cr_assert_float_eq((double)f.norm[o], norm_at(&f, o), 1e-6 * norm_at(&f, o));
    }
    destroy(&f);
    qs_queue_destroy(queue);
}

/* A row that B A takes to zero has no direction: it stays zero, and no gradient is infinite. */
Test(dora, zero_rows_stay_zero)
{
    enum { IN = 24, OUT = 4, ROWS = 3 };
    const dora_case c = {ROWS, IN, OUT, 1, 0.0F, NO_RESIDUAL, false, false};
    qs_queue *queue = fx_queue(1);
    fixture f = make(&c);
    float *a = (float *)f.lora.a, *b = (float *)f.lora.b;
    f.lora.scale = 1.0F;
    memcpy(a, f.unit.plain + IN, IN * sizeof *a); /* A is row 1 of W */
    b[1] = -1.0F;
    run_forward(queue, &f);
    cr_assert_eq(f.norm[1], 0.0F);
    cr_assert_eq(f.gain[1], 0.0F);
    cr_assert_gt(f.norm[0], 0.0F);
    for (int64_t t = 0; t < ROWS; t++) {
        cr_assert_eq(fx_at(&f.y, t, 1), 0.0);
    }
    cr_assert_eq(qs_ops_cpu()->dora_backward(queue, &f.unit.view, &f.unit.weight, &f.lora, &f.x,
                                             &f.xa, &f.dy, f.dm),
                 QS_OK);
    cr_assert_eq(f.dm[1], 0.0F);
    cr_assert(isfinite(f.dm[0]) && f.dm[0] != 0.0F);
    destroy(&f);
    qs_queue_destroy(queue);
}
