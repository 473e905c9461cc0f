/* The one-pass head: loss and gradient against the full softmax in fp64. */
#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <math.h>
#include <string.h>

#include "kernels/ops.h"
#include "ops_fixture.h"

typedef struct {
    int64_t rows, hidden, vocab, chunk;
    qs_dtype dtype;
    int nranks;
} head_case;

typedef struct {
    const head_case *c;
    double *x;
    float *w; /* [vocab, hidden] */
    const int32_t *target;
    double scale, cap;
} reference;

static double reference_row_loss(const reference *r, int64_t row)
{
    double most = -INFINITY, sum = 0.0, target = 0.0;
    for (int pass = 0; pass < 2; pass++) {
        for (int64_t v = 0; v < r->c->vocab; v++) {
            double logit = 0.0;
            for (int64_t i = 0; i < r->c->hidden; i++) {
                logit += r->x[row * r->c->hidden + i] * (double)r->w[v * r->c->hidden + i];
            }
            logit = r->cap > 0.0 ? r->cap * tanh(logit / r->cap) : logit;
            if (pass == 0) {
                most = fmax(most, logit);
                target = v == r->target[row] ? logit : target;
            } else {
                sum += exp(logit - most);
            }
        }
    }
    return most + log(sum) - target;
}

static double reference_loss(const void *ctx)
{
    const reference *r = ctx;
    double loss = 0.0;
    for (int64_t t = 0; t < r->c->rows; t++) {
        loss += r->scale * reference_row_loss(r, t);
    }
    return loss;
}

typedef struct {
    qs_head_state s;
    float *x, *loss, *dx;
    int32_t *target;
} head_fixture;

static head_fixture head_create(const head_case *c, bool want_gradient)
{
    int64_t size = c->rows * c->hidden;
    head_fixture f = {.x = fx_random(size, 1),
                      .loss = fx_random(c->rows, 2),
                      .dx = fx_random(size, 3),
                      .target = malloc((size_t)(c->rows + 1) * sizeof(int32_t))};
    for (int64_t t = 0; t < c->rows; t++) {
        /* First and last token, and some between. */
        f.target[t] = (int32_t)(t == 0 ? 0 : t == 1 ? c->vocab - 1 : (t * 37) % c->vocab);
    }
    for (int64_t i = 0; i < size; i++) {
        f.x[i] *= 2.0F;
    }
    /* No initial values: the chunk with token 0 starts the state. */
    f.s = (qs_head_state){.rows = c->rows,
                          .hidden = c->hidden,
                          .x = f.x,
                          .target = f.target,
                          .max = fx_random(c->rows, 4),
                          .sum = fx_random(c->rows, 5),
                          .target_logit = fx_random(c->rows, 6),
                          .o = want_gradient ? fx_random(size, 7) : NULL,
                          .w_target = want_gradient ? fx_random(size, 8) : NULL};
    return f;
}

static void head_destroy(head_fixture *f)
{
    void *all[] = {f->x,     f->loss,           f->dx,  f->target,    f->s.max,
                   f->s.sum, f->s.target_logit, f->s.o, f->s.w_target};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        free(all[i]);
    }
}

/* All chunks of the vocabulary; their weights are also appended to `w`. */
static void run_chunks(qs_queue *queue, const head_case *c, head_fixture *f, float *w)
{
    for (int64_t row0 = 0; row0 < c->vocab; row0 += c->chunk) {
        int64_t rows = c->vocab - row0 < c->chunk ? c->vocab - row0 : c->chunk;
        fx_weight_spec spec = {QS_WEIGHT_RAW, rows,      c->hidden, c->dtype,
                               true,          c->nranks, c->hidden};
        fx_unit unit = fx_unit_create(&spec, 100 + (uint64_t)row0);
        memcpy(w + row0 * c->hidden, unit.plain, (size_t)(rows * c->hidden) * sizeof *w);
        cr_assert_eq(qs_ops_cpu()->head_chunk(queue, &unit.view, &unit.weight, row0, &f->s), QS_OK);
        fx_unit_destroy(&unit);
    }
}

static void check_softmax(const head_case *c, float cap)
{
    qs_queue *queue = fx_queue(2);
    head_fixture f = head_create(c, true);
    f.s.cap = cap;
    float *w = malloc((size_t)(c->vocab * c->hidden) * sizeof *w);
    run_chunks(queue, c, &f, w);
    cr_assert_eq(qs_ops_cpu()->head_finish(queue, &f.s, 0.25F, f.loss, f.dx), QS_OK);
    reference r = {c, fx_double(f.x, c->rows * c->hidden), w, f.target, 0.25, (double)cap};
    for (int64_t t = 0; t < c->rows; t++) {
        cr_assert_float_eq((double)f.loss[t], reference_row_loss(&r, t), 1e-5, "row %ld", (long)t);
    }
    int64_t size = c->rows * c->hidden;
    for (int64_t i = 0; i < size; i += 1 + size / 40) {
        cr_assert_float_eq((double)f.dx[i], fx_difference(reference_loss, &r, r.x, i, 1e-5), 1e-6);
    }
    free(r.x);
    free(w);
    head_destroy(&f);
    qs_queue_destroy(queue);
}

ParameterizedTestParameters(head, loss_and_gradient_are_those_of_the_full_softmax)
{
    static head_case c[] = {
        {1, 4, 1, 1, QS_F32, 1},       {0, 16, 40, 16, QS_BF16, 1},    {5, 24, 100, 33, QS_BF16, 3},
        {19, 33, 600, 600, QS_F16, 2}, {3, 16, 1100, 1024, QS_F32, 5},
    };
    return cr_make_param_array(head_case, c, sizeof c / sizeof *c);
}
ParameterizedTest(head_case *c, head, loss_and_gradient_are_those_of_the_full_softmax)
{
    check_softmax(c, 0.0F);
    check_softmax(c, 1.5F); /* some logits are beyond it */
}

Test(head, without_gradient_the_loss_has_the_same_bits)
{
    static const head_case c = {7, 40, 300, 128, QS_BF16, 2};
    qs_queue *queue = fx_queue(2);
    head_fixture with = head_create(&c, true), without = head_create(&c, false);
    float *w = malloc((size_t)(c.vocab * c.hidden) * sizeof *w);
    run_chunks(queue, &c, &with, w);
    run_chunks(queue, &c, &without, w);
    cr_assert_eq(qs_ops_cpu()->head_finish(queue, &with.s, 1.0F, with.loss, with.dx), QS_OK);
    cr_assert_eq(qs_ops_cpu()->head_finish(queue, &without.s, 1.0F, without.loss, NULL), QS_OK);
    cr_assert_eq(memcmp(with.loss, without.loss, sizeof(float) * 7), 0);
    free(w);
    head_destroy(&with);
    head_destroy(&without);
    qs_queue_destroy(queue);
}

Test(head, the_cut_into_chunks_changes_rounding_only)
{
    /* One unit, read as one chunk and as chunks of 100 rows. */
    static const head_case c = {6, 24, 700, 700, QS_BF16, 1};
    qs_queue *queue = fx_queue(2);
    fx_weight_spec spec = {QS_WEIGHT_RAW, 700, 24, QS_BF16, true, 1, 24};
    fx_unit unit = fx_unit_create(&spec, 100);
    head_fixture one = head_create(&c, true), many = head_create(&c, true);
    const qs_ops *ops = qs_ops_cpu();
    cr_assert_eq(ops->head_chunk(queue, &unit.view, &unit.weight, 0, &one.s), QS_OK);
    for (int64_t row0 = 0; row0 < 700; row0 += 100) {
        qs_weight part = unit.weight;
        part.quantum += row0;
        part.out = 100;
        cr_assert_eq(ops->head_chunk(queue, &unit.view, &part, row0, &many.s), QS_OK);
    }
    cr_assert_eq(ops->head_finish(queue, &one.s, 1.0F, one.loss, one.dx), QS_OK);
    cr_assert_eq(ops->head_finish(queue, &many.s, 1.0F, many.loss, many.dx), QS_OK);
    for (int i = 0; i < 6 * 24; i++) {
        cr_assert_float_eq((double)one.dx[i], (double)many.dx[i], 1e-6);
        cr_assert_float_eq((double)one.loss[i / 24], (double)many.loss[i / 24], 4e-6);
    }
    fx_unit_destroy(&unit);
    head_destroy(&one);
    head_destroy(&many);
    qs_queue_destroy(queue);
}

Test(head, huge_logits_stay_finite_and_nan_shows)
{
    static const head_case c = {3, 8, 90, 45, QS_F32, 1};
    qs_queue *queue = fx_queue(1);
    head_fixture f = head_create(&c, true);
    float *w = malloc((size_t)(c.vocab * c.hidden) * sizeof *w);
    for (int i = 0; i < 16; i++) {
        f.x[i] *= 1e5F;
    }
    f.x[16] = NAN;
    run_chunks(queue, &c, &f, w);
    cr_assert_eq(qs_ops_cpu()->head_finish(queue, &f.s, 1.0F, f.loss, f.dx), QS_OK);
    cr_assert(isfinite(f.loss[0]) && f.loss[0] >= 0.0F);
    cr_assert(isfinite(f.loss[1]) && f.loss[1] >= 0.0F);
    cr_assert(!isfinite(f.loss[2]));
    for (int i = 0; i < 16; i++) {
        cr_assert(isfinite(f.dx[i]));
    }
    free(w);
    head_destroy(&f);
    qs_queue_destroy(queue);
}
