/* The one-pass head against its CPU twin and against the full softmax in fp64. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "twin.h"

typedef struct {
    int64_t rows, hidden, vocab, chunk;
    qs_dtype dtype;
    int nranks;
    float x_scale;
} head_case;

/* The weights' elements are below 1 (tests/ops_fixture.h). A logit is a sum of `hidden` products of
 * fp32: what another order of additions may change. */
static double logit_error(const head_case *c)
{
    return 0x1p-22 * (double)c->hidden * (double)c->x_scale;
}

/* ---- inputs ---- */

typedef struct {
    const head_case *c;
    float *x;        /* [rows, hidden], of the backend's type */
    int32_t *target; /* [rows] */
    float *w;        /* [vocab, hidden] as the backend multiplies it */
    tw_unit *chunks;
    int n_chunks;
    float cap;
} inputs;

/* The first and last token, those beside each border of a chunk and of a slice, and some between.
 */
static int32_t pick_target(const head_case *c, int64_t row)
{
    const int64_t special[] = {0,    c->vocab - 1, c->chunk - 1,    c->chunk,
                               4095, 4096,         c->chunk + 4095, c->chunk + 4096};
    const int64_t count = (int64_t)(sizeof special / sizeof *special);
    const int64_t at = row < count ? special[row] : row * 37;
    return (int32_t)(at % c->vocab);
}

static inputs make_inputs(const tw_backend *b, const head_case *c)
{
    inputs in = {.c = c, .n_chunks = (int)((c->vocab + c->chunk - 1) / c->chunk)};
    in.x = fx_random(c->rows * c->hidden, 1);
    for (int64_t i = 0; i < c->rows * c->hidden; i++) {
        in.x[i] *= c->x_scale;
    }
    tw_round(b, in.x, c->rows * c->hidden);
    in.target = malloc((size_t)(c->rows + 1) * sizeof *in.target);
    for (int64_t r = 0; r < c->rows; r++) {
        in.target[r] = pick_target(c, r);
    }
    in.w = malloc((size_t)(c->vocab * c->hidden) * sizeof *in.w);
    in.chunks = calloc((size_t)in.n_chunks, sizeof *in.chunks);
    for (int i = 0; i < in.n_chunks; i++) {
        const int64_t row0 = i * c->chunk;
        const int64_t out = row0 + c->chunk < c->vocab ? c->chunk : c->vocab - row0;
        const fx_weight_spec spec = {QS_WEIGHT_RAW, out,       c->hidden, c->dtype,
                                     false,         c->nranks, c->hidden};
        in.chunks[i] = tw_unit_make(b, &spec, 100 + (uint64_t)i);
        memcpy(in.w + row0 * c->hidden, in.chunks[i].host.plain,
               (size_t)(out * c->hidden) * sizeof *in.w);
    }
    tw_round(b, in.w, c->vocab * c->hidden);
    return in;
}

static void free_inputs(const tw_backend *b, inputs *in)
{
    for (int i = 0; i < in->n_chunks; i++) {
        tw_unit_free(b, &in->chunks[i]);
    }
    free(in->chunks);
    free(in->x);
    free(in->target);
    free(in->w);
}

/* ---- results ---- */

typedef struct {
    float *loss, *dx, *max, *sum, *target_logit, *w_target;
} results;

static void free_results(results *r)
{
    float *all[] = {r->loss, r->dx, r->max, r->sum, r->target_logit, r->w_target};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        free(all[i]);
    }
}

/* Device memory full of NaN: nothing relies on what a buffer held before. */
static void *upload_nan(const tw_backend *b, int64_t count)
{
    float *nan = malloc((size_t)(count + 1) * sizeof *nan);
    for (int64_t i = 0; i < count; i++) {
        nan[i] = NAN;
    }
    void *device = tw_upload(b, nan, (size_t)count * sizeof *nan);
    free(nan);
    return device;
}

typedef struct {
    bool gradient, dx_over_x;
} mode;

static float *read_dx(const tw_backend *b, const head_case *c, void *dx)
{
    const qs_mat mat = {.data = dx,
                        .rows = c->rows,
                        .cols = c->hidden,
                        .stride = c->hidden,
                        .dtype = b->ops->act_dtype};
    return tw_mat_read(b, &mat);
}

static results run_device(const tw_backend *b, const inputs *in, mode how)
{
    const head_case *c = in->c;
    const int64_t size = c->rows * c->hidden;
    const size_t row_bytes = (size_t)c->rows * sizeof(float);
    void *x = tw_upload_as_act(b, in->x, size);
    qs_head_state s = {.rows = c->rows,
                       .hidden = c->hidden,
                       .cap = in->cap,
                       .x = x,
                       .target = tw_upload(b, in->target, (size_t)c->rows * sizeof(int32_t)),
                       .max = upload_nan(b, c->rows),
                       .sum = upload_nan(b, c->rows),
                       .target_logit = upload_nan(b, c->rows),
                       .o = how.gradient ? upload_nan(b, size) : NULL,
                       .w_target = how.gradient ? upload_nan(b, size) : NULL};
    float *loss = upload_nan(b, c->rows);
    void *dx = how.dx_over_x ? x : upload_nan(b, size);
    for (int i = 0; i < in->n_chunks; i++) {
        cr_assert_eq(b->ops->head_chunk(b->queue, &in->chunks[i].view, &in->chunks[i].weight,
                                        i * c->chunk, &s),
                     QS_OK, "%s: %s", b->name, qs_error_text());
    }
    cr_assert_eq(b->ops->head_finish(b->queue, &s, 0.25F, loss, how.gradient ? dx : NULL), QS_OK,
                 "%s: %s", b->name, qs_error_text());
    results r = {.loss = tw_read(b, loss, row_bytes),
                 .max = tw_read(b, s.max, row_bytes),
                 .sum = tw_read(b, s.sum, row_bytes),
                 .target_logit = tw_read(b, s.target_logit, row_bytes)};
    if (how.gradient) {
        r.dx = read_dx(b, c, dx);
        r.w_target = tw_read(b, s.w_target, (size_t)size * sizeof(float));
    }
    void *all[] = {x,    (void *)(uintptr_t)s.target, s.max,     s.sum, s.target_logit, s.o,
                   loss, how.dx_over_x ? NULL : dx,   s.w_target};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        tw_free(b, all[i]);
    }
    return r;
}

static results run_twin(const tw_backend *b, const inputs *in)
{
    const head_case *c = in->c;
    const int64_t size = c->rows * c->hidden;
    results r = {.loss = fx_random(c->rows, 2),
                 .dx = fx_random(size, 3),
                 .max = fx_random(c->rows, 4),
                 .sum = fx_random(c->rows, 5),
                 .w_target = fx_random(size, 7),
                 .target_logit = fx_random(c->rows, 6)};
    float *o = fx_random(size, 8);
    qs_head_state s = {.rows = c->rows,
                       .hidden = c->hidden,
                       .cap = in->cap,
                       .x = in->x,
                       .target = in->target,
                       .max = r.max,
                       .sum = r.sum,
                       .target_logit = r.target_logit,
                       .o = o,
                       .w_target = r.w_target};
    const qs_ops *cpu = qs_ops_cpu();
    for (int i = 0; i < in->n_chunks; i++) {
        cr_assert_eq(cpu->head_chunk(b->cpu_queue, &in->chunks[i].host.view,
                                     &in->chunks[i].host.weight, i * c->chunk, &s),
                     QS_OK);
    }
    cr_assert_eq(cpu->head_finish(b->cpu_queue, &s, 0.25F, r.loss, r.dx), QS_OK);
    free(o);
    return r;
}

/* ---- the full softmax in fp64 ---- */

static double *reference_logits(const inputs *in, int64_t row)
{
    double *logits = malloc((size_t)in->c->vocab * sizeof *logits);
    for (int64_t v = 0; v < in->c->vocab; v++) {
        logits[v] = 0.0;
        for (int64_t i = 0; i < in->c->hidden; i++) {
            logits[v] +=
                (double)in->x[row * in->c->hidden + i] * (double)in->w[v * in->c->hidden + i];
        }
        if (in->cap > 0.0F) {
            logits[v] = (double)in->cap * tanh(logits[v] / (double)in->cap);
        }
    }
    return logits;
}

/* Of a capped logit with respect to the logit. */
static double reference_slope(const inputs *in, double logit)
{
    const double tanh = in->cap > 0.0F ? logit / (double)in->cap : 0.0;
    return 1.0 - tanh * tanh;
}

static void reference_row(const inputs *in, int64_t row, float *loss, float *dx)
{
    const int64_t hidden = in->c->hidden;
    double *logits = reference_logits(in, row);
    double most = -INFINITY, sum = 0.0;
    for (int64_t v = 0; v < in->c->vocab; v++) {
        most = fmax(most, logits[v]);
    }
    for (int64_t v = 0; v < in->c->vocab; v++) {
        sum += exp(logits[v] - most);
    }
    *loss = (float)(most + log(sum) - logits[in->target[row]]);
    for (int64_t i = 0; i < hidden; i++) {
        const int32_t target = in->target[row];
        double d = -reference_slope(in, logits[target]) * (double)in->w[target * hidden + i];
        for (int64_t v = 0; v < in->c->vocab; v++) {
            d += exp(logits[v] - most) / sum * reference_slope(in, logits[v]) *
                 (double)in->w[v * hidden + i];
        }
        dx[i] = (float)(0.25 * d);
    }
    free(logits);
}

/* ---- comparisons ---- */

/* The loss is fp32 throughout: 2e-5 relative (exp, the order of a sum over the vocabulary), and
 * what the logits' own errors make of it. */
static void compare_loss(const tw_backend *b, const head_case *c, const float *got,
                         const float *want, const char *what)
{
    tw_assert_close(b, got, want, c->rows, 2e-5, 2.0 * logit_error(c), what);
}

/* dx: rounded to bf16 (TW_BF16 of its size), and made of probabilities that are: 2^-9 of each,
 * whose sum is 1, times weights below 1; with a cap the target's slope is rounded as well. */
static void compare_dx(const tw_backend *b, const inputs *in, const float *got, const float *want,
                       const char *what)
{
    const head_case *c = in->c;
    const double roundings = in->cap > 0.0F ? 2.0 : 1.0;
    const double absolute = 0.25 * (roundings * 0x1p-9 + 4.0 * logit_error(c));
    tw_assert_close(b, got, want, c->rows * c->hidden, TW_BF16, absolute, what);
}

static void compare_to_twin(const tw_backend *b, const inputs *in, const results *got,
                            const results *want)
{
    const head_case *c = in->c;
    const double error = logit_error(c);
    /* of a slope, which is rounded to bf16: 2 t / cap times the logit's error */
    const double relative = in->cap > 0.0F ? TW_BF16 : 0.0;
    const double absolute = in->cap > 0.0F ? 1e-6 + 2.0 * error : 0.0;
    tw_assert_close(b, got->max, want->max, c->rows, 0.0, error, "max");
    tw_assert_close(b, got->sum, want->sum, c->rows, 2e-5 + 2.0 * error, 0.0, "sum");
    tw_assert_close(b, got->target_logit, want->target_logit, c->rows, 0.0, error, "target_logit");
    tw_assert_close(b, got->w_target, want->w_target, c->rows * c->hidden, relative, absolute,
                    "w_target");
    compare_loss(b, c, got->loss, want->loss, "loss");
    compare_dx(b, in, got->dx, want->dx, "dx");
}

/* The sizes of the errors as a whole: rounding to bf16 twice, 2^-9 / sqrt(3) each at most; with a
 * cap that of the target's slope, too, which is large beside a small dx. */
static void compare_to_softmax(const tw_backend *b, const inputs *in, const results *got)
{
    const head_case *c = in->c;
    float *loss = fx_random(c->rows, 2), *dx = fx_random(c->rows * c->hidden, 3);
    for (int64_t r = 0; r < c->rows; r++) {
        reference_row(in, r, &loss[r], dx + r * c->hidden);
    }
    const double limit = (in->cap > 0.0F ? 1.0 / 180 : 1.0 / 360) + 4.0 * logit_error(c);
    if (!tw_is_cpu(b)) { /* tests/test_ops_head.c compares the CPU, without equal bits */
        compare_loss(b, c, got->loss, loss, "loss of the softmax");
        compare_dx(b, in, got->dx, dx, "dx of the softmax");
        tw_assert_norm(b, got->dx, dx, c->rows * c->hidden, limit, "dx of the softmax");
    }
    free(loss);
    free(dx);
}

static void assert_same(const float *a, const float *b, int64_t count, const char *what)
{
    cr_assert_eq(memcmp(a, b, (size_t)count * sizeof *a), 0, "%s has other bits", what);
}

static void open_for(const tw_backend *b, const head_case *c)
{
    const qs_ops_limits limits = {.threads = 2,
                                  .tokens = c->rows + 1,
                                  .documents = 1,
                                  .loss_rows = c->rows + 1,
                                  .widest = c->hidden,
                                  .n_heads = 1,
                                  .n_kv_heads = 1,
                                  .head_dim = 64,
                                  .hidden = c->hidden,
                                  .head_rows = c->chunk};
    tw_open(b, &limits);
}

static void run_case(const tw_backend *b, const head_case *c, float cap)
{
    open_for(b, c);
    inputs in = make_inputs(b, c);
    in.cap = cap;
    results got = run_device(b, &in, (mode){.gradient = true});
    results again = run_device(b, &in, (mode){.gradient = true, .dx_over_x = true});
    results loss_only = run_device(b, &in, (mode){.gradient = false});
    results want = run_twin(b, &in);
    if (c->dtype == QS_BF16) { /* else the twin multiplies other weights: fp64 is asked alone */
        compare_to_twin(b, &in, &got, &want);
    }
    compare_to_softmax(b, &in, &got);
    assert_same(got.loss, again.loss, c->rows, "the loss of a second run");
    assert_same(got.dx, again.dx, c->rows * c->hidden, "dx of a second run, over x");
    assert_same(got.loss, loss_only.loss, c->rows, "the loss without a gradient");
    free_results(&got);
    free_results(&again);
    free_results(&loss_only);
    free_results(&want);
    free_inputs(b, &in);
    b->ops->close(b->queue);
}

static void with_and_without_cap(const tw_backend *b, const head_case *c)
{
    run_case(b, c, 0.0F);
    run_case(b, c, 2.5F);
}

#define RUN_CASES(cases) TW_CHECK_CASES(with_and_without_cap, cases)

Test(twin_head, one_slice_of_any_width, .timeout = 120)
{
    static const head_case cases[] = {
        {1, 4, 1, 1, QS_BF16, 1, 2.0F},       {1, 8, 2, 2, QS_BF16, 1, 2.0F},
        {5, 24, 33, 33, QS_BF16, 3, 2.0F},    {70, 32, 255, 255, QS_BF16, 1, 2.0F},
        {9, 64, 256, 256, QS_BF16, 1, 1.0F},  {3, 16, 1027, 1027, QS_BF16, 2, 2.0F},
        {2, 8, 4095, 4095, QS_BF16, 1, 2.0F}, {3, 16, 4096, 4096, QS_BF16, 1, 2.0F},
    };
    RUN_CASES(cases);
}

Test(twin_head, several_slices_and_chunks, .timeout = 120)
{
    static const head_case cases[] = {
        {5, 24, 100, 33, QS_BF16, 3, 2.0F},    {19, 40, 600, 200, QS_BF16, 1, 2.0F},
        {9, 8, 4097, 4097, QS_BF16, 1, 2.0F},  {10, 16, 8200, 4100, QS_BF16, 1, 2.0F},
        {12, 8, 9001, 4500, QS_BF16, 2, 2.0F},
    };
    RUN_CASES(cases);
}

/* Rows of W that are no multiple of 16 bytes, and rows that start anywhere. */
Test(twin_head, any_hidden_size, .timeout = 120)
{
    static const head_case cases[] = {
        {4, 1, 40, 16, QS_BF16, 1, 2.0F},   {7, 33, 130, 64, QS_BF16, 1, 2.0F},
        {11, 7, 65, 65, QS_BF16, 3, 2.0F},  {3, 20, 77, 40, QS_BF16, 1, 2.0F},
        {6, 576, 50, 25, QS_BF16, 1, 0.5F},
    };
    RUN_CASES(cases);
}

/* Logits up to +-150: probabilities from 1 down to zero, the maximum that rises by tens. */
Test(twin_head, extreme_logits, .timeout = 120)
{
    static const head_case cases[] = {
        {16, 8, 500, 100, QS_BF16, 1, 80.0F},
        {8, 16, 5000, 2500, QS_BF16, 1, 40.0F},
    };
    RUN_CASES(cases);
}

/* Heads that are stored wider are multiplied as bf16. */
Test(twin_head, other_types_of_weight, .timeout = 120)
{
    static const head_case cases[] = {
        {5, 24, 90, 45, QS_F16, 1, 2.0F},
        {5, 24, 90, 45, QS_F32, 2, 2.0F},
    };
    RUN_CASES(cases);
}

static void no_rows(const tw_backend *b)
{
    static const head_case c = {0, 16, 40, 16, QS_BF16, 1, 2.0F};
    open_for(b, &c);
    inputs in = make_inputs(b, &c);
    qs_head_state s = {.rows = 0, .hidden = c.hidden};
    cr_assert_eq(b->ops->head_chunk(b->queue, &in.chunks[0].view, &in.chunks[0].weight, 0, &s),
                 QS_OK);
    cr_assert_eq(b->ops->head_finish(b->queue, &s, 1.0F, NULL, NULL), QS_OK);
    cr_assert_eq(qs_queue_wait(b->queue), QS_OK);
    free_inputs(b, &in);
    b->ops->close(b->queue);
}

Test(twin_head, no_rows_no_work, .timeout = 60)
{
    tw_each_backend(no_rows);
}

/* A broken row shows in its own loss and in no other. */
static void broken_row(const tw_backend *b)
{
    static const head_case c = {4, 16, 4200, 4200, QS_BF16, 1, 2.0F};
    open_for(b, &c);
    inputs in = make_inputs(b, &c);
    in.x[2 * c.hidden + 5] = NAN;
    results got = run_device(b, &in, (mode){.gradient = true});
    for (int64_t r = 0; r < c.rows; r++) {
        cr_assert_eq(isfinite(got.loss[r]) != 0, r != 2, "%s: row %lld", b->name, (long long)r);
        for (int64_t k = 0; k < c.hidden; k++) {
            cr_assert_eq(isfinite(got.dx[r * c.hidden + k]) != 0, r != 2);
        }
    }
    free_results(&got);
    free_inputs(b, &in);
    b->ops->close(b->queue);
}

Test(twin_head, nan_shows_in_its_row_alone, .timeout = 60)
{
    tw_each_backend(broken_row);
}
