/* LoRA beside a linear: values, gradients by differences, and the dropout mask. */
#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <math.h>
#include <string.h>

#include "kernels/cpu/isa.h"
#include "kernels/ops.h"
#include "ops_fixture.h"

typedef struct {
    int64_t rows, in, out;
    int rank;
    float dropout;
} lora_case;

/* One call's operands in fp32, and the same in fp64 for differences. */
typedef struct {
    const lora_case *c;
    qs_lora lora;
    int64_t *sample, *row_at;
    qs_mat x, y, dy, xa, work, dx;
    float *da, *db;
    double *x64, *a64, *b64, *dy64, *mask;
} lora_fixture;

static qs_mat dense(int64_t rows, int64_t cols, uint64_t seed)
{
    return fx_mat(rows, cols, 0, seed);
}

static lora_fixture lora_create(const lora_case *c)
{
    lora_fixture f = {.c = c};
    f.x = dense(c->rows, c->in, 1);
    f.y = dense(c->rows, c->out, 2);
    f.dy = dense(c->rows, c->out, 3);
    f.xa = dense(c->rows, c->rank, 4);
    f.work = dense(c->rows, c->rank, 5);
    f.dx = dense(c->rows, c->in, 6);
    f.da = fx_random(c->rank * c->in, 7);
    f.db = fx_random(c->rank * c->out, 8);
    f.sample = malloc((size_t)(c->rows + 1) * sizeof *f.sample);
    f.row_at = malloc((size_t)(c->rows + 1) * sizeof *f.row_at);
    f.lora = fx_adapter(c->rank, c->in, c->out, c->dropout, 9);
    f.lora.sample = f.sample;
    f.lora.row_at = f.row_at;
    f.mask = malloc((size_t)(c->rows * c->in + 1) * sizeof *f.mask);
    for (int64_t t = 0; t < c->rows; t++) {
        f.sample[t] = t / 3; /* samples of three rows */
        qs_rng rng = qs_rng_make(42, 7, (uint64_t)f.sample[t], QS_RNG_DROPOUT + 2, 5);
        f.row_at[t] = t % 3;
        for (int64_t i = 0; i < c->in; i++) {
            float u = qs_rng_uniform(&rng, (uint64_t)(f.row_at[t] * c->in + i));
            f.mask[t * c->in + i] = u >= c->dropout ? 1.0 / (1.0 - (double)c->dropout) : 0.0;
        }
    }
    f.x64 = fx_double(f.x.data, c->rows * c->in);
    f.a64 = fx_double(f.lora.a, c->rank * c->in);
    f.b64 = fx_double(f.lora.b, c->rank * c->out);
    f.dy64 = fx_double(f.dy.data, c->rows * c->out);
    return f;
}

static void lora_destroy(lora_fixture *f)
{
    qs_mat *mats[] = {&f->x, &f->y, &f->dy, &f->xa, &f->work, &f->dx};
    for (size_t i = 0; i < sizeof mats / sizeof *mats; i++) {
        fx_mat_free(mats[i]);
    }
    void *rest[] = {
        f->da,  f->db,  f->sample, f->row_at, (void *)f->lora.a, (void *)f->lora.b, f->x64,
        f->a64, f->b64, f->dy64,   f->mask};
    for (size_t i = 0; i < sizeof rest / sizeof *rest; i++) {
        free(rest[i]);
    }
}

static double reference_output(const lora_fixture *f, int64_t t, int64_t o)
{
    const lora_case *c = f->c;
    double y = 0.0;
    for (int64_t r = 0; r < c->rank; r++) {
        double xa = 0.0;
        for (int64_t i = 0; i < c->in; i++) {
            xa += f->x64[t * c->in + i] * f->mask[t * c->in + i] * f->a64[r * c->in + i];
        }
        y += f->b64[o * c->rank + r] * xa;
    }
    return (double)f->lora.scale * y;
}

/* sum dy * y: its derivatives are what the backward returns. */
static double reference_loss(const void *ctx)
{
    const lora_fixture *f = ctx;
    double sum = 0.0;
    for (int64_t t = 0; t < f->c->rows; t++) {
        for (int64_t o = 0; o < f->c->out; o++) {
            sum += f->dy64[t * f->c->out + o] * reference_output(f, t, o);
        }
    }
    return sum;
}

#define LORA_CASES                                                                                 \
    {5, 40, 24, 4, 0.0F}, {7, 33, 19, 3, 0.3F}, {1, 5, 3, 1, 0.5F}, {0, 16, 16, 2, 0.0F},          \
        {0, 16, 16, 2, 0.5F}, {4, 8, 6, 8, 0.9F}, {4, 8, 6, 2, 1.0F},

ParameterizedTestParameters(lora, forward_adds_the_scaled_product)
{
    static lora_case c[] = {LORA_CASES{70, 300, 90, 16, 0.1F}};
    return cr_make_param_array(lora_case, c, sizeof c / sizeof *c);
}
ParameterizedTest(lora_case *c, lora, forward_adds_the_scaled_product)
{
    if (c->dropout >= 1.0F) {
        return; /* 1 / (1 - p) of the reference is infinite; the next test covers it */
    }
    qs_queue *queue = fx_queue(2);
    lora_fixture f = lora_create(c);
    double *before = fx_double(f.y.data, c->rows * c->out);
    cr_assert_eq(qs_ops_cpu()->lora_forward(queue, &f.lora, &f.x, &f.xa, &f.y), QS_OK);
    for (int64_t t = 0; t < c->rows; t++) {
        for (int64_t o = 0; o < c->out; o++) {
            double want = before[t * c->out + o] + reference_output(&f, t, o);
            /* A few hundred roundings of sums of at most in * rank / (1 - p) terms of size 1. */
            cr_assert_float_eq(fx_at(&f.y, t, o), want, 2e-4, "%ld,%ld", (long)t, (long)o);
        }
    }
    free(before);
    lora_destroy(&f);
    qs_queue_destroy(queue);
}

ParameterizedTestParameters(lora, backward_is_the_derivative)
{
    static lora_case c[] = {LORA_CASES};
    return cr_make_param_array(lora_case, c, sizeof c / sizeof *c);
}
ParameterizedTest(lora_case *c, lora, backward_is_the_derivative)
{
    if (c->dropout >= 1.0F) {
        return;
    }
    qs_queue *queue = fx_queue(2);
    lora_fixture f = lora_create(c);
    double *before = fx_double(f.dx.data, c->rows * c->in);
    const qs_ops *ops = qs_ops_cpu();
    cr_assert_eq(ops->lora_forward(queue, &f.lora, &f.x, &f.xa, &f.y), QS_OK);
    cr_assert_eq(ops->lora_backward(queue, &f.lora, &f.x, &f.xa, &f.dy, &f.work, f.da, f.db, &f.dx),
                 QS_OK);
    /* The loss is linear in each element, so the difference is exact to fp64; 1e-4 is for the fp32
     * sums. */
    for (int64_t i = 0; i < c->rank * c->in; i++) {
        cr_assert_float_eq((double)f.da[i], fx_difference(reference_loss, &f, f.a64, i, 1e-3),
                           1e-4);
    }
    for (int64_t i = 0; i < c->rank * c->out; i++) {
        cr_assert_float_eq((double)f.db[i], fx_difference(reference_loss, &f, f.b64, i, 1e-3),
                           1e-4);
    }
    for (int64_t i = 0; i < c->rows * c->in; i++) {
        double want = before[i] + fx_difference(reference_loss, &f, f.x64, i, 1e-3);
        cr_assert_float_eq((double)qs_mat_f32(&f.dx)[i], want, 1e-4);
    }
    free(before);
    lora_destroy(&f);
    qs_queue_destroy(queue);
}

Test(lora, dropping_everything_leaves_zero_and_no_nan)
{
    static const lora_case c = {4, 8, 6, 2, 1.0F};
    qs_queue *queue = fx_queue(1);
    lora_fixture f = lora_create(&c);
    qs_mat_f32(&f.x)[0] = INFINITY; /* a dropped element is zero whatever it was */
    double *y = fx_double(f.y.data, c.rows * c.out), *dx = fx_double(f.dx.data, c.rows * c.in);
    const qs_ops *ops = qs_ops_cpu();
    cr_assert_eq(ops->lora_forward(queue, &f.lora, &f.x, &f.xa, &f.y), QS_OK);
    cr_assert_eq(ops->lora_backward(queue, &f.lora, &f.x, &f.xa, &f.dy, &f.work, f.da, f.db, &f.dx),
                 QS_OK);
    for (int64_t i = 0; i < c.rows * c.out; i++) {
        cr_assert_eq((double)qs_mat_f32(&f.y)[i], y[i]);
    }
    for (int64_t i = 0; i < c.rows * c.in; i++) {
        cr_assert_eq((double)qs_mat_f32(&f.dx)[i], dx[i]);
    }
    for (int64_t i = 0; i < c.rank * c.in; i++) {
        cr_assert_eq(f.da[i], 0.0F);
    }
    free(y);
    free(dx);
    lora_destroy(&f);
    qs_queue_destroy(queue);
}

Test(lora, no_adapter_changes_nothing)
{
    qs_queue *queue = fx_queue(1);
    qs_mat x = dense(3, 4, 1), y = dense(3, 5, 2), same = dense(3, 5, 2);
    qs_lora none = {0};
    cr_assert_eq(qs_ops_cpu()->lora_forward(queue, &none, &x, NULL, &y), QS_OK);
    cr_assert_eq(qs_ops_cpu()->lora_backward(queue, &none, &x, NULL, &y, NULL, NULL, NULL, &x),
                 QS_OK);
    cr_assert_eq(memcmp(y.data, same.data, sizeof(float) * 15), 0);
    fx_mat_free(&x);
    fx_mat_free(&y);
    fx_mat_free(&same);
    qs_queue_destroy(queue);
}

/* With A the identity, xa is drop(x): the mask itself, for rows of ones. */
static void masked_ones(qs_queue *queue, float dropout, uint64_t sample, int64_t row_at,
                        int64_t width, float *out)
{
    float *identity = calloc((size_t)(width * width), sizeof *identity);
    float *ones = malloc((size_t)width * sizeof *ones),
          *zero_b = calloc((size_t)width, sizeof *zero_b);
    for (int64_t i = 0; i < width; i++) {
        identity[i * width + i] = 1.0F;
        ones[i] = 1.0F;
    }
    int64_t of = (int64_t)sample;
    qs_lora lora = {.a = identity,
                    .b = zero_b,
                    .rank = (int)width,
                    .scale = 1.0F,
                    .dropout = dropout,
                    .seed = 1,
                    .step = 2,
                    .site = QS_RNG_DROPOUT,
                    .layer = 3,
                    .sample = &of,
                    .row_at = &row_at};
    float unused = 0.0F;
    qs_mat x = {ones, 1, width, width, QS_F32}, xa = {out, 1, width, width, QS_F32};
    qs_mat y = {&unused, 1, 1, 1, QS_F32};
    cr_assert_eq(qs_ops_cpu()->lora_forward(queue, &lora, &x, &xa, &y), QS_OK);
    free(identity);
    free(ones);
    free(zero_b);
}

Test(lora, mask_keeps_the_right_share_and_differs_between_rows_and_samples)
{
    enum { WIDTH = 500, ROWS = 40 };
    qs_queue *queue = fx_queue(1);
    float *mask = malloc(sizeof(float) * WIDTH * ROWS), other[WIDTH];
    int64_t kept = 0;
    for (int64_t t = 0; t < ROWS; t++) {
        masked_ones(queue, 0.25F, 9, t, WIDTH, mask + t * WIDTH);
        for (int64_t i = 0; i < WIDTH; i++) {
            float v = mask[t * WIDTH + i];
            cr_assert(v == 0.0F || v == 1.0F / 0.75F);
            kept += v != 0.0F;
        }
    }
    /* 20,000 draws at 0.75: standard deviation 61; five of them. */
    cr_assert_float_eq((double)kept, 15000.0, 306.0);
    cr_assert_neq(memcmp(mask, mask + WIDTH, sizeof other), 0);
    masked_ones(queue, 0.25F, 10, 0, WIDTH, other);
    cr_assert_neq(memcmp(mask, other, sizeof other), 0);
    masked_ones(queue, 0.25F, 9, 0, WIDTH, other);
    cr_assert_eq(memcmp(mask, other, sizeof other), 0);
    free(mask);
    qs_queue_destroy(queue);
}

Test(lora, vector_dropout_draws_the_numbers_of_the_generator)
{
    enum { COUNT = 333 };
    const char *const isas[] = {"avx512", "avx2", "portable"};
    /* Offsets within a block, and where the block number passes 32 bits. */
    const uint64_t first[] = {0, 1, 2, 3, 7, 1000001, 4ULL * 0xFFFFFFF0U + 1, 4ULL << 40};
    float x[COUNT], out[COUNT + 1];
    for (int i = 0; i < COUNT; i++) {
        x[i] = (float)(i + 1);
    }
    for (int v = 0; v < 3; v++) {
        if (!qs_isa_force(isas[v])) {
            continue;
        }
        for (size_t f = 0; f < sizeof first / sizeof *first; f++) {
            qs_rng rng = qs_rng_make(f, 1, 2, QS_RNG_DROPOUT + 3, 0xDEADBEEF);
            float p = qs_rng_uniform(&rng, first[f] + 5); /* element 5 is just kept */
            out[COUNT] = -1.0F;
            qs_isa_get()->dropout(&rng, first[f], COUNT, p, 2.0F, x, out);
            cr_assert_eq(out[5], 2.0F * x[5]);
            for (int i = 0; i < COUNT; i++) {
                bool kept = qs_rng_uniform(&rng, first[f] + (uint64_t)i) >= p;
                cr_assert_eq(out[i], kept ? 2.0F * x[i] : 0.0F, "%s: element %d from %lu", isas[v],
                             i, (unsigned long)first[f]);
            }
            cr_assert_eq(out[COUNT], -1.0F);
        }
    }
}
