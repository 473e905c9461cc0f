/* Attention against its CPU twin. The twin gets the same rounded inputs and computes in fp32; what
 * a GPU adds is the rounding of P and dS to bf16, as operands of the next product, and of its
 * results. Each element's limit is made of exactly these, from sums of absolute values in fp64. */
#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "twin.h"

enum { MAX_DOCS = 9 };

typedef struct {
    int n_heads, n_kv_heads, head_dim, window;
    int64_t pad; /* odd: rows lie at no multiple of 16 bytes */
    int n_docs;
    int32_t length[MAX_DOCS];
    int repeat; /* the documents, so many times */
    bool large; /* too much for the emulator */
} attention_case;

typedef struct {
    const attention_case *c;
    const tw_backend *b;
    int64_t rows, wide, narrow;
    int n_docs;
    int32_t *cu, *device_cu;
    int64_t *begin; /* [rows] first key that a query sees */
    qs_attention_shape shape;
    tw_mat q, k, v, o, d_o, dq, dk, dv;
    float *lse, *delta;               /* host [n_heads, rows] */
    float *device_lse, *device_delta; /* device */
} fixture;

static void set_documents(fixture *f)
{
    const attention_case *c = f->c;
    f->n_docs = c->n_docs * c->repeat;
    f->cu = calloc((size_t)f->n_docs + 1, sizeof *f->cu);
    for (int d = 0; d < f->n_docs; d++) {
        f->cu[d + 1] = f->cu[d] + c->length[d % c->n_docs];
    }
    f->rows = f->cu[f->n_docs];
    f->begin = calloc((size_t)f->rows + 1, sizeof *f->begin);
    for (int d = 0; d < f->n_docs; d++) {
        for (int64_t t = f->cu[d]; t < f->cu[d + 1]; t++) {
            const int64_t first = c->window > 0 ? t - c->window + 1 : 0;
            f->begin[t] = first > f->cu[d] ? first : f->cu[d];
        }
    }
}

static int32_t longest(const attention_case *c)
{
    int32_t most = 0;
    for (int d = 0; d < c->n_docs; d++) {
        most = c->length[d] > most ? c->length[d] : most;
    }
    return most;
}

static fixture make_fixture(const tw_backend *b, const attention_case *c)
{
    fixture f = {.c = c,
                 .b = b,
                 .wide = (int64_t)c->n_heads * c->head_dim,
                 .narrow = (int64_t)c->n_kv_heads * c->head_dim};
    set_documents(&f);
    f.q = tw_mat_make(b, f.rows, f.wide, c->pad, 3.0F, 1); /* scores far from uniform */
    f.k = tw_mat_make(b, f.rows, f.narrow, c->pad, 1.0F, 2);
    f.v = tw_mat_make(b, f.rows, f.narrow, c->pad, 1.0F, 3);
    f.o = tw_mat_make(b, f.rows, f.wide, c->pad, 1.0F, 4);
    f.d_o = tw_mat_make(b, f.rows, f.wide, c->pad, 1.0F, 5);
    f.dq = tw_mat_make(b, f.rows, f.wide, c->pad, 1.0F, 6);
    f.dk = tw_mat_make(b, f.rows, f.narrow, c->pad, 1.0F, 7);
    f.dv = tw_mat_make(b, f.rows, f.narrow, c->pad, 1.0F, 8);
    f.device_cu = tw_upload(b, f.cu, ((size_t)f.n_docs + 1) * sizeof *f.cu);
    const size_t bytes = (size_t)(f.rows * c->n_heads) * sizeof(float);
    f.lse = fx_random(f.rows * c->n_heads, 9);
    f.delta = fx_random(f.rows * c->n_heads, 10);
    f.device_lse = tw_upload(b, f.lse, bytes);
    f.device_delta = tw_upload(b, f.delta, bytes);
    f.shape = (qs_attention_shape){.n_heads = c->n_heads,
                                   .n_kv_heads = c->n_kv_heads,
                                   .head_dim = c->head_dim,
                                   .scale = 1.0F / sqrtf((float)c->head_dim),
                                   .window = c->window,
                                   .cu_seqlens = f.cu,
                                   .n_docs = f.n_docs,
                                   .longest = longest(c)};
    return f;
}

static void free_fixture(fixture *f)
{
    tw_mat *mats[] = {&f->q, &f->k, &f->v, &f->o, &f->d_o, &f->dq, &f->dk, &f->dv};
    for (size_t i = 0; i < sizeof mats / sizeof *mats; i++) {
        tw_mat_free(f->b, mats[i]);
    }
    void *device[] = {f->device_cu, f->device_lse, f->device_delta};
    for (size_t i = 0; i < sizeof device / sizeof *device; i++) {
        tw_free(f->b, device[i]);
    }
    void *host[] = {f->cu, f->begin, f->lse, f->delta};
    for (size_t i = 0; i < sizeof host / sizeof *host; i++) {
        free(host[i]);
    }
}

/* ---- running both sides ---- */

static qs_attention_shape device_shape(const fixture *f)
{
    qs_attention_shape shape = f->shape;
    shape.cu_seqlens = f->device_cu;
    return shape;
}

static void forward(fixture *f)
{
    const qs_attention_shape shape = device_shape(f);
    cr_assert_eq(f->b->ops->attention_forward(f->b->queue, &shape, &f->q.device, &f->k.device,
                                              &f->v.device, &f->o.device, f->device_lse),
                 QS_OK, "%s: %s", f->b->name, qs_error_text());
}

static void twin_forward(fixture *f)
{
    cr_assert_eq(qs_ops_cpu()->attention_forward(f->b->cpu_queue, &f->shape, &f->q.host, &f->k.host,
                                                 &f->v.host, &f->o.host, f->lse),
                 QS_OK);
}

static void backward(fixture *f)
{
    const qs_attention_shape shape = device_shape(f);
    cr_assert_eq(f->b->ops->attention_backward(f->b->queue, &shape, &f->q.device, &f->k.device,
                                               &f->v.device, &f->o.device, f->device_lse,
                                               &f->d_o.device, f->device_delta, &f->dq.device,
                                               &f->dk.device, &f->dv.device),
                 QS_OK, "%s: %s", f->b->name, qs_error_text());
}

static void twin_backward(fixture *f)
{
    cr_assert_eq(qs_ops_cpu()->attention_backward(
                     f->b->cpu_queue, &f->shape, &f->q.host, &f->k.host, &f->v.host, &f->o.host,
                     f->lse, &f->d_o.host, f->delta, &f->dq.host, &f->dk.host, &f->dv.host),
                 QS_OK);
}

/* Forward on both sides; then the twin's results, rounded, are the backward's inputs of both. */
static void share_forward(fixture *f)
{
    twin_forward(f);
    float *o = qs_mat_f32(&f->o.host);
    tw_round(f->b, o, f->rows * f->o.host.stride); /* the gap's NaN stays one */
    tw_free(f->b, f->o.device.data);
    tw_free(f->b, f->device_lse);
    f->o.device.data = tw_upload_as_act(f->b, o, f->rows * f->o.host.stride);
    f->device_lse = tw_upload(f->b, f->lse, (size_t)(f->rows * f->c->n_heads) * sizeof *f->lse);
}

/* ---- limits ---- */

/* What an element of the results may be off by: fp64 [rows, width]. */
typedef struct {
    double *o, *dq, *dk, *dv;
} limits;

static const float *row_of(const qs_mat *mat, int64_t row, int head, int dim)
{
    return qs_mat_f32(mat) + row * mat->stride + (int64_t)head * dim;
}

typedef struct {
    double sum, size; /* of the products, of their absolute values */
} product;

static product dot(const float *x, const float *y, int count)
{
    product p = {0.0, 0.0};
    for (int i = 0; i < count; i++) {
        p.sum += (double)x[i] * (double)y[i];
        p.size += fabs((double)x[i] * (double)y[i]);
    }
    return p;
}

static void add_scaled(double *to, double by, const float *x, int count)
{
    for (int i = 0; i < count; i++) {
        to[i] += by * fabs((double)x[i]);
    }
}

/* Rounding P costs up to TW_BF16 P; dS = P (dP - delta) as much of itself, and its fp32 sums of
 * head_dim products some 2^-17 of their absolute values, which counts where dP and delta cancel. */
static void add_pair(const fixture *f, limits *l, int head, int64_t query, int64_t key)
{
    const int dim = f->c->head_dim, kv = head / (f->c->n_heads / f->c->n_kv_heads);
    const double scale = (double)f->shape.scale;
    const float *q = row_of(&f->q.host, query, head, dim), *k = row_of(&f->k.host, key, kv, dim);
    const float *v = row_of(&f->v.host, key, kv, dim), *o = row_of(&f->o.host, query, head, dim);
    const float *d_o = row_of(&f->d_o.host, query, head, dim);
    const double cap = (double)f->shape.cap, score = scale * dot(q, k, dim).sum;
    const double t = cap > 0.0 ? tanh(score / cap) : 0.0, slope = 1.0 - t * t;
    const double p = exp((cap > 0.0 ? cap * t : score) - (double)f->lse[head * f->rows + query]);
    const product dp = dot(d_o, v, dim), delta = dot(d_o, o, dim);
    const double ds =
        p * slope * scale * (TW_BF16 * fabs(dp.sum - delta.sum) + 0x1p-17 * (dp.size + delta.size));
    const int64_t at = query * f->wide + (int64_t)head * dim;
    const int64_t kv_at = key * f->narrow + (int64_t)kv * dim;
    add_scaled(l->o + at, TW_BF16 * p, v, dim);
    add_scaled(l->dv + kv_at, TW_BF16 * p, d_o, dim);
    add_scaled(l->dq + at, ds, k, dim);
    add_scaled(l->dk + kv_at, ds, q, dim);
}

static double *zeros(int64_t count)
{
    double *x = calloc((size_t)count + 1, sizeof *x);
    cr_assert_not_null(x);
    return x;
}

/* From the twin's lse and o. */
static limits make_limits(const fixture *f)
{
    limits l = {zeros(f->rows * f->wide), zeros(f->rows * f->wide), zeros(f->rows * f->narrow),
                zeros(f->rows * f->narrow)};
    for (int h = 0; h < f->c->n_heads; h++) {
        for (int64_t t = 0; t < f->rows; t++) {
            for (int64_t s = f->begin[t]; s <= t; s++) {
                add_pair(f, &l, h, t, s);
            }
        }
    }
    return l;
}

static void free_limits(limits *l)
{
    free(l->o);
    free(l->dq);
    free(l->dk);
    free(l->dv);
}

/* Element by element within `limit`, the rounding of the result and a little fp32; as a whole
 * within `norm` of the norm, because roundings are not all of one sign. The gap is as it was. */
static void check(const fixture *f, const tw_mat *mat, const double *limit, double norm,
                  const char *what)
{
    float *got = tw_mat_read(f->b, &mat->device);
    const int64_t rows = mat->host.rows, cols = mat->host.cols;
    float *want = malloc((size_t)(rows * cols + 1) * sizeof *want);
    double squares = 0.0;
    for (int64_t t = 0; t < rows; t++) {
        memcpy(want + t * cols, row_of(&mat->host, t, 0, 0), (size_t)cols * sizeof *want);
    }
    for (int64_t i = 0; i < rows * cols && !tw_is_cpu(f->b); i++) {
        const double off = fabs((double)got[i] - (double)want[i]);
        const double most = 1.01 * limit[i] + TW_BF16 * fabs((double)want[i]) + 1e-6;
        cr_assert(off <= most, "%s on %s: row %lld column %lld is %.9g, not %.9g (limit %.3g)",
                  what, f->b->name, (long long)(i / cols), (long long)(i % cols), (double)got[i],
                  (double)want[i], most);
        squares += (double)want[i] * (double)want[i];
    }
    if (tw_is_cpu(f->b) || squares > 1e-8 * (double)(rows * cols)) {
        tw_assert_norm(f->b, got, want, rows * cols, norm, what);
    }
    cr_assert(tw_gap_intact(f->b, &mat->device), "%s on %s: written behind a row", what,
              f->b->name);
    free(got);
    free(want);
}

/* ---- backends ---- */

static int open_backends(tw_backend out[TW_BACKENDS_MAX])
{
    const int count = tw_backends(out);
    for (int i = 0; i < count; i++) {
        tw_open(&out[i], &(qs_ops_limits){.threads = 2,
                                          .tokens = 4096,
                                          .documents = 512,
                                          .loss_rows = 1,
                                          .widest = 256,
                                          .n_heads = 8,
                                          .n_kv_heads = 4,
                                          .head_dim = 264});
    }
    return count;
}

static void close_backends(tw_backend *backends, int count)
{
    for (int i = 0; i < count; i++) {
        backends[i].ops->close(backends[i].queue);
    }
    tw_backends_close(backends, count);
}

/* ---- cases ---- */

static attention_case cases[] = {
    {1, 1, 8, 0, 0, 1, {1}, 1, false},
    {2, 1, 16, 0, 3, 5, {1, 2, 15, 16, 17}, 1, false},
    {2, 2, 64, 0, 8, 3, {63, 64, 65}, 1, false},
    {4, 1, 64, 0, 0, 1, {130}, 1, false},
    {8, 1, 32, 0, 8, 4, {5, 0, 33, 31}, 1, false},
    {6, 2, 24, 0, 1, 3, {40, 1, 29}, 1, false},
    {1, 1, 64, 0, 8, 5, {1, 1, 2, 3, 1}, 25, false},
    {2, 1, 80, 0, 8, 2, {65, 15}, 1, false},
    {2, 2, 96, 0, 0, 2, {2, 66}, 1, false},
    {2, 1, 80, 0, 5, 2, {17, 30}, 1, false},
    {2, 1, 128, 0, 8, 3, {63, 1, 70}, 1, false},
    {1, 1, 128, 0, 4, 2, {3, 34}, 1, false},
    {1, 1, 160, 0, 0, 2, {20, 50}, 1, false},
    {1, 1, 192, 0, 7, 2, {1, 36}, 1, false},
    {2, 1, 256, 0, 8, 2, {66, 5}, 1, false},
    {2, 1, 64, 1, 8, 2, {70, 9}, 1, false},
    {2, 1, 64, 7, 0, 3, {2, 130, 8}, 1, false},
    {2, 2, 64, 64, 8, 2, {65, 130}, 1, false},
    {4, 2, 32, 65, 3, 1, {200}, 1, false},
    {1, 1, 128, 33, 8, 2, {31, 134}, 1, false},
    {1, 1, 256, 20, 8, 2, {50, 30}, 1, false},
    {2, 1, 96, 7, 8, 2, {90, 30}, 1, false},
    {2, 1, 32, 1000, 8, 2, {90, 30}, 1, false},
    {2, 1, 128, 0, 0, 1, {290}, 1, false},
    {2, 2, 64, 140, 8, 2, {10, 300}, 1, false},
    {4, 2, 104, 0, 8, 2, {129, 130}, 1, false},
    {1, 1, 128, 0, 8, 1, {460}, 1, false}, /* Hopper: stages come round in both warpgroups */
    {1, 1, 64, 300, 0, 2, {3, 470}, 1, false},
    {4, 2, 64, 0, 0, 3, {1000, 1, 499}, 1, true},
    {4, 1, 128, 0, 8, 2, {700, 353}, 1, true},
    {2, 1, 128, 256, 0, 2, {900, 100}, 1, true},
    {2, 1, 256, 0, 0, 2, {513, 1}, 1, true},
    {2, 1, 64, 0, 0, 3, {7, 1, 12}, 150, true},
    {8, 2, 128, 0, 0, 3, {2048, 1, 999}, 1, true},
    {2, 1, 128, 300, 8, 4, {127, 128, 129, 1500}, 1, true},
};

static bool is_left_out(const tw_backend *b, const attention_case *c)
{
    return c->large && strcmp(b->name, "emulated") == 0;
}

/* All cases, or each `step`-th; a few small ones under QSHARD_TWIN_SHORT, for tools that make
 * everything slow. */
static struct criterion_test_params chosen_cases(size_t step)
{
    enum { ALL = sizeof cases / sizeof *cases, SHORT = 4 };
    static attention_case few[ALL];
    size_t count = 0;
    const bool brief = getenv("QSHARD_TWIN_SHORT") != NULL;
    for (size_t i = 0; i < ALL; i += brief ? SHORT : step) {
        if (!brief || !cases[i].large) {
            few[count++] = cases[i];
        }
    }
    return cr_make_param_array(attention_case, few, count);
}

static void compare_forward(const attention_case *c, float cap)
{
    tw_backend backends[TW_BACKENDS_MAX];
    const int count = open_backends(backends);
    for (int i = 0; i < count; i++) {
        const tw_backend *b = &backends[i];
        if (is_left_out(b, c)) {
            continue;
        }
        fixture f = make_fixture(b, c);
        f.shape.cap = cap;
        forward(&f);
        twin_forward(&f);
        limits l = make_limits(&f);
        check(&f, &f.o, l.o, 5e-3, "o");
        /* fp32 on both sides: scores of up to 3 sqrt(head_dim), and a logarithm. */
        float *lse = tw_read(b, f.device_lse, (size_t)(f.rows * c->n_heads) * sizeof *lse);
        tw_assert_close(b, lse, f.lse, f.rows * c->n_heads, 1e-6, 3e-5, "lse");
        free(lse);
        free_limits(&l);
        free_fixture(&f);
    }
    close_backends(backends, count);
}

ParameterizedTestParameters(twin_attention, forward)
{
    return chosen_cases(1);
}
ParameterizedTest(attention_case *c, twin_attention, forward)
{
    compare_forward(c, 0.0F);
}

ParameterizedTestParameters(twin_attention, forward_with_a_cap)
{
    return chosen_cases(2);
}
ParameterizedTest(attention_case *c, twin_attention, forward_with_a_cap)
{
    compare_forward(c, 3.0F); /* many scores are beyond it */
}

static void compare_backward(const attention_case *c, float cap)
{
    tw_backend backends[TW_BACKENDS_MAX];
    const int count = open_backends(backends);
    for (int i = 0; i < count; i++) {
        const tw_backend *b = &backends[i];
        if (is_left_out(b, c)) {
            continue;
        }
        fixture f = make_fixture(b, c);
        f.shape.cap = cap;
        share_forward(&f);
        backward(&f);
        twin_backward(&f);
        limits l = make_limits(&f);
        check(&f, &f.dq, l.dq, 8e-3, "dq");
        check(&f, &f.dk, l.dk, 8e-3, "dk");
        check(&f, &f.dv, l.dv, 5e-3, "dv");
        free_limits(&l);
        free_fixture(&f);
    }
    close_backends(backends, count);
}

ParameterizedTestParameters(twin_attention, backward)
{
    return chosen_cases(1);
}
ParameterizedTest(attention_case *c, twin_attention, backward)
{
    compare_backward(c, 0.0F);
}

ParameterizedTestParameters(twin_attention, backward_with_a_cap)
{
    return chosen_cases(2);
}
ParameterizedTest(attention_case *c, twin_attention, backward_with_a_cap)
{
    compare_backward(c, 3.0F); /* many scores are beyond it */
}

/* ---- properties ---- */

/* The bytes of a matrix on the device. */
static void *bytes_of(const tw_backend *b, const qs_mat *mat)
{
    return tw_read(b, mat->data, (size_t)(mat->rows * mat->stride) * qs_dtype_bytes(mat->dtype));
}

Test(twin_attention, twice_the_same_bits)
{
    static const attention_case c = {4, 2, 64, 50, 8, 3, {40, 1, 89}, 1, false};
    tw_backend backends[TW_BACKENDS_MAX];
    const int count = open_backends(backends);
    for (int i = 0; i < count; i++) {
        const tw_backend *b = &backends[i];
        fixture f = make_fixture(b, &c);
        const qs_mat *mats[] = {&f.o.device, &f.dq.device, &f.dk.device, &f.dv.device};
        void *first[4], *lse = NULL;
        const size_t lse_bytes = (size_t)(f.rows * c.n_heads) * sizeof(float);
        for (int time = 0; time < 2; time++) {
            forward(&f);
            backward(&f);
            for (int m = 0; m < 4; m++) {
                void *now = bytes_of(b, mats[m]);
                if (time == 0) {
                    first[m] = now;
                    continue;
                }
                cr_assert_arr_eq(now, first[m],
                                 (size_t)(mats[m]->rows * mats[m]->stride) *
                                     qs_dtype_bytes(mats[m]->dtype));
                free(now);
                free(first[m]);
            }
            void *now = tw_read(b, f.device_lse, lse_bytes);
            if (time == 1) {
                cr_assert_arr_eq(now, lse, lse_bytes);
                free(lse);
            }
            lse = now;
        }
        free(lse);
        free_fixture(&f);
    }
    close_backends(backends, count);
}

/* Documents are cut anywhere in a tile; what stands in the others changes no bit. */
Test(twin_attention, a_document_does_not_see_its_neighbours)
{
    static const attention_case c = {2, 1, 64, 0, 8, 3, {70, 5, 60}, 1, false};
    tw_backend backends[TW_BACKENDS_MAX];
    const int count = open_backends(backends);
    for (int i = 0; i < count; i++) {
        const tw_backend *b = &backends[i];
        fixture f = make_fixture(b, &c);
        tw_mat *inputs[] = {&f.q, &f.k, &f.v, &f.d_o};
        const qs_mat *outputs[] = {&f.o.device, &f.dq.device, &f.dk.device, &f.dv.device};
        float *first[4];
        forward(&f);
        backward(&f);
        for (int m = 0; m < 4; m++) {
            first[m] = tw_mat_read(b, outputs[m]);
            qs_mat *mat = &inputs[m]->host;
            for (int64_t t = 0; t < f.rows; t++) {
                for (int64_t j = 0; j < mat->cols && (t < 70 || t >= 75); j++) {
                    qs_mat_f32(mat)[t * mat->stride + j] *= -8.0F;
                }
            }
            tw_free(b, inputs[m]->device.data);
            inputs[m]->device.data = tw_upload_as_act(b, qs_mat_f32(mat), f.rows * mat->stride);
        }
        forward(&f);
        backward(&f);
        for (int m = 0; m < 4; m++) {
            float *now = tw_mat_read(b, outputs[m]);
            const int64_t cols = outputs[m]->cols;
            cr_assert_arr_eq(now + 70 * cols, first[m] + 70 * cols,
                             (size_t)(5 * cols) * sizeof *now);
            cr_assert_arr_neq(now, first[m], (size_t)(5 * cols) * sizeof *now);
            free(now);
            free(first[m]);
        }
        free_fixture(&f);
    }
    close_backends(backends, count);
}

/* exp2 of a score overflows; of a score less the maximum it does not. */
Test(twin_attention, large_scores_do_not_overflow)
{
    static const attention_case c = {1, 1, 16, 0, 0, 1, {70}, 1, false};
    tw_backend backends[TW_BACKENDS_MAX];
    const int count = open_backends(backends);
    for (int i = 0; i < count; i++) {
        const tw_backend *b = &backends[i];
        fixture f = make_fixture(b, &c);
        f.shape.scale = 1000.0F;
        forward(&f);
        twin_forward(&f);
        float *o = tw_mat_read(b, &f.o.device);
        float *lse = tw_read(b, f.device_lse, (size_t)f.rows * sizeof *lse);
        tw_assert_close(b, lse, f.lse, f.rows, 1e-6, 1000.0 * 48.0 * 0x1p-20, "lse");
        for (int64_t j = 0; j < f.rows * f.wide; j++) {
            cr_assert(isfinite(o[j]) && fabsf(o[j]) <= 1.01F);
        }
        free(o);
        free(lse);
        free_fixture(&f);
    }
    close_backends(backends, count);
}

Test(twin_attention, no_rows_are_no_work)
{
    static const attention_case c = {2, 1, 64, 0, 0, 2, {0, 0}, 1, false};
    tw_backend backends[TW_BACKENDS_MAX];
    const int count = open_backends(backends);
    for (int i = 0; i < count; i++) {
        fixture f = make_fixture(&backends[i], &c);
        forward(&f);
        backward(&f);
        f.shape.n_docs = 0;
        forward(&f);
        backward(&f);
        free_fixture(&f);
    }
    close_backends(backends, count);
}

/* The CUDA kernels move 8 elements at once; the CPU takes any width. */
Test(twin_attention, other_widths_are_refused)
{
    static const attention_case c[] = {{1, 1, 12, 0, 0, 1, {3}, 1, false},
                                       {1, 1, 264, 0, 0, 1, {3}, 1, false}};
    tw_backend backends[TW_BACKENDS_MAX];
    const int count = open_backends(backends);
    for (int i = 0; i < count; i++) {
        const tw_backend *b = &backends[i];
        for (int j = 0; j < 2; j++) {
            fixture f = make_fixture(b, &c[j]);
            const qs_attention_shape shape = device_shape(&f);
            const qs_status want = tw_is_cpu(b) ? QS_OK : QS_ERR_BUG;
            cr_assert_eq(b->ops->attention_forward(b->queue, &shape, &f.q.device, &f.k.device,
                                                   &f.v.device, &f.o.device, f.device_lse),
                         want);
            cr_assert_eq(b->ops->attention_backward(b->queue, &shape, &f.q.device, &f.k.device,
                                                    &f.v.device, &f.o.device, f.device_lse,
                                                    &f.d_o.device, f.device_delta, &f.dq.device,
                                                    &f.dk.device, &f.dv.device),
                         want);
            free_fixture(&f);
        }
    }
    close_backends(backends, count);
}
