/* Causal attention within documents, against plain fp64 loops and differences. */
#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <math.h>
#include <string.h>

#include "kernels/cpu/pairs.h"
#include "kernels/ops.h"
#include "ops_fixture.h"

enum { MAX_DOCS = 6, MAX_DIM = 272 };

typedef struct {
    int n_heads, n_kv_heads, head_dim, n_docs;
    int32_t cu[MAX_DOCS + 1];
    int window;
} attention_case;

typedef struct {
    const attention_case *c;
    int64_t rows;
    double scale, cap;
    double *q, *k, *v, *d_o;
} reference;

static int64_t rows_of(const attention_case *c)
{
    return c->cu[c->n_docs];
}

/* Output of one query row and head, and its log-sum-exp. */
static double reference_row(const reference *r, int64_t begin, int64_t t, int head, double *out)
{
    const attention_case *c = r->c;
    if (c->window > 0 && begin < t - c->window + 1) {
        begin = t - c->window + 1;
    }
    int dim = c->head_dim, kv_head = head / (c->n_heads / c->n_kv_heads);
    int64_t q_width = (int64_t)c->n_heads * dim, kv_width = (int64_t)c->n_kv_heads * dim;
    double most = -INFINITY, sum = 0.0;
    double *score = calloc((size_t)(t - begin + 1), sizeof *score);
    for (int64_t s = begin; s <= t; s++) {
        for (int i = 0; i < dim; i++) {
            score[s - begin] += r->scale * r->q[t * q_width + head * dim + i] *
                                r->k[s * kv_width + kv_head * dim + i];
        }
        if (r->cap > 0.0) {
            score[s - begin] = r->cap * tanh(score[s - begin] / r->cap);
        }
        most = fmax(most, score[s - begin]);
    }
    memset(out, 0, (size_t)dim * sizeof *out);
    for (int64_t s = begin; s <= t; s++) {
        double p = exp(score[s - begin] - most);
        sum += p;
        for (int i = 0; i < dim; i++) {
            out[i] += p * r->v[s * kv_width + kv_head * dim + i];
        }
    }
    for (int i = 0; i < dim; i++) {
        out[i] /= sum;
    }
    free(score);
    return most + log(sum);
}

static double reference_loss(const void *ctx)
{
    const reference *r = ctx;
    const attention_case *c = r->c;
    double loss = 0.0, out[MAX_DIM];
    for (int d = 0; d < c->n_docs; d++) {
        for (int64_t t = c->cu[d]; t < c->cu[d + 1]; t++) {
            for (int h = 0; h < c->n_heads; h++) {
                reference_row(r, c->cu[d], t, h, out);
                for (int i = 0; i < c->head_dim; i++) {
                    loss += out[i] * r->d_o[(t * c->n_heads + h) * c->head_dim + i];
                }
            }
        }
    }
    return loss;
}

typedef struct {
    qs_attention_shape shape;
    qs_mat q, k, v, o, d_o, dq, dk, dv;
    float *lse, *delta;
    reference r;
} fixture;

static fixture fixture_capped(const attention_case *c, float cap)
{
    int64_t rows = rows_of(c), wide = (int64_t)c->n_heads * c->head_dim;
    int64_t narrow = (int64_t)c->n_kv_heads * c->head_dim;
    fixture f = {.q = fx_mat(rows, wide, 0, 1),
                 .k = fx_mat(rows, narrow, 0, 2),
                 .v = fx_mat(rows, narrow, 0, 3),
                 .o = fx_mat(rows, wide, 3, 4),
                 .d_o = fx_mat(rows, wide, 0, 5),
                 .dq = fx_mat(rows, wide, 2, 6),
                 .dk = fx_mat(rows, narrow, 1, 7),
                 .dv = fx_mat(rows, narrow, 5, 8)};
    f.shape = (qs_attention_shape){.n_heads = c->n_heads,
                                   .n_kv_heads = c->n_kv_heads,
                                   .head_dim = c->head_dim,
                                   .scale = 1.0F / sqrtf((float)c->head_dim),
                                   .cap = cap,
                                   .window = c->window,
                                   .cu_seqlens = c->cu,
                                   .n_docs = c->n_docs};
    for (int64_t i = 0; i < rows * wide; i++) {
        qs_mat_f32(&f.q)[i] *= 3.0F; /* scores far from uniform */
    }
    f.lse = fx_random(rows * c->n_heads, 9);
    f.delta = fx_random(rows * c->n_heads, 10);
    f.r = (reference){.c = c,
                      .rows = rows,
                      .scale = (double)f.shape.scale,
                      .cap = (double)cap,
                      .q = fx_double(qs_mat_f32(&f.q), rows * wide),
                      .k = fx_double(qs_mat_f32(&f.k), rows * narrow),
                      .v = fx_double(qs_mat_f32(&f.v), rows * narrow),
                      .d_o = fx_double(qs_mat_f32(&f.d_o), rows * wide)};
    return f;
}

static fixture fixture_create(const attention_case *c)
{
    return fixture_capped(c, 0.0F);
}

static void fixture_destroy(fixture *f)
{
    qs_mat *mats[] = {&f->q, &f->k, &f->v, &f->o, &f->d_o, &f->dq, &f->dk, &f->dv};
    for (size_t i = 0; i < sizeof mats / sizeof *mats; i++) {
        fx_mat_free(mats[i]);
    }
    void *rest[] = {f->lse, f->delta, f->r.q, f->r.k, f->r.v, f->r.d_o};
    for (size_t i = 0; i < sizeof rest / sizeof *rest; i++) {
        free(rest[i]);
    }
}

static void check_forward(const attention_case *c, float cap)
{
    qs_queue *queue = fx_queue(2);
    fixture f = fixture_capped(c, cap);
    cr_assert_eq(qs_ops_cpu()->attention_forward(queue, &f.shape, &f.q, &f.k, &f.v, &f.o, f.lse),
                 QS_OK);
    double out[MAX_DIM];
    for (int d = 0; d < c->n_docs; d++) {
        for (int64_t t = c->cu[d]; t < c->cu[d + 1]; t++) {
            for (int h = 0; h < c->n_heads; h++) {
                double lse = reference_row(&f.r, c->cu[d], t, h, out);
                /* Scores of size up to 3 sqrt(dim) with dim roundings; probabilities inherit their
                 * absolute error. */
                cr_assert_float_eq((double)f.lse[h * f.r.rows + t], lse, 1e-5);
                for (int i = 0; i < c->head_dim; i++) {
                    cr_assert_float_eq(fx_at(&f.o, t, h * c->head_dim + i), out[i], 1e-5,
                                       "row %ld head %d element %d", (long)t, h, i);
                }
            }
        }
    }
    cr_assert(fx_mat_gap_intact(&f.o));
    fixture_destroy(&f);
    qs_queue_destroy(queue);
}

ParameterizedTestParameters(attention, forward_matches_fp64)
{
    static attention_case c[] = {
        {1, 1, 4, 0, {0}, 0},
        {2, 1, 8, 1, {0, 0}, 0},
        {1, 1, 1, 1, {0, 1}, 0},
        {3, 1, 6, 4, {0, 1, 2, 2, 9}, 0},
        {4, 2, 16, 3, {0, 63, 127, 192}, 0},
        {2, 2, 64, 2, {0, 65, 300}, 0},
        {9, 3, 20, 3, {0, 130, 131, 200}, 0},
        {2, 1, 130, 2, {0, 3, 70}, 0},
        {10, 2, 4, 2, {0, 70, 75}, 0},
        {2, 1, 8, 2, {0, 70, 200}, 1},
        {2, 1, 8, 2, {0, 70, 200}, 7},
        {3, 1, 8, 2, {0, 7, 200}, 63},
        {2, 2, 8, 2, {0, 65, 200}, 64},
        {5, 1, 8, 2, {0, 65, 260}, 65},
        {2, 1, 8, 2, {0, 65, 400}, 129},
        {2, 1, 8, 2, {0, 65, 100}, 1000},
        {2, 1, 260, 1, {0, 140}, 0}, /* a sum of more than 256 */
    };
    return cr_make_param_array(attention_case, c, sizeof c / sizeof *c);
}
ParameterizedTest(attention_case *c, attention, forward_matches_fp64)
{
    check_forward(c, 0.0F);
    check_forward(c, 2.0F); /* most scores are beyond it */
}

static void check_gradient(const reference *r, double *x, int64_t count, const qs_mat *got,
                           const char *name)
{
    int64_t step =
        1 + count / 60; /* differences are slow: a sample of the elements, ends included */
    for (int64_t i = 0; i < count; i = i + step < count || i == count - 1 ? i + step : count - 1) {
        double want = fx_difference(reference_loss, r, x, i, 1e-5);
        cr_assert_float_eq(fx_at(got, i / got->cols, i % got->cols), want, 3e-5,
                           "%s element %ld: %g instead of %g", name, (long)i,
                           fx_at(got, i / got->cols, i % got->cols), want);
    }
}

static void check_backward(const attention_case *c, float cap)
{
    qs_queue *queue = fx_queue(2);
    fixture f = fixture_capped(c, cap);
    const qs_ops *ops = qs_ops_cpu();
    cr_assert_eq(ops->attention_forward(queue, &f.shape, &f.q, &f.k, &f.v, &f.o, f.lse), QS_OK);
    cr_assert_eq(ops->attention_backward(queue, &f.shape, &f.q, &f.k, &f.v, &f.o, f.lse, &f.d_o,
                                         f.delta, &f.dq, &f.dk, &f.dv),
                 QS_OK);
    check_gradient(&f.r, f.r.q, f.r.rows * f.dq.cols, &f.dq, "dq");
    check_gradient(&f.r, f.r.k, f.r.rows * f.dk.cols, &f.dk, "dk");
    check_gradient(&f.r, f.r.v, f.r.rows * f.dv.cols, &f.dv, "dv");
    cr_assert(fx_mat_gap_intact(&f.dq) && fx_mat_gap_intact(&f.dk) && fx_mat_gap_intact(&f.dv));
    fixture_destroy(&f);
    qs_queue_destroy(queue);
}

ParameterizedTestParameters(attention, backward_is_the_derivative)
{
    static attention_case c[] = {
        {1, 1, 4, 0, {0}, 0},
        {2, 1, 8, 1, {0, 0}, 0},
        {1, 1, 1, 1, {0, 1}, 0},
        {3, 1, 6, 4, {0, 1, 2, 2, 9}, 0},
        {4, 2, 5, 3, {0, 7, 71, 90}, 0},
        {2, 1, 3, 2, {0, 65, 140}, 0},
        {5, 1, 3, 2, {0, 66, 70}, 0},
        {2, 1, 3, 2, {0, 4, 80}, 1},
        {4, 2, 3, 2, {0, 65, 140}, 7},
        {2, 1, 3, 2, {0, 65, 150}, 64},
        {5, 1, 3, 2, {0, 66, 210}, 66},
        {2, 1, 3, 2, {0, 20, 60}, 1000},
        {4, 2, 3, 3, {0, 300, 310, 440}, 0}, /* several blocks of keys */
        {2, 1, 3, 1, {0, 420}, 150},
        {2, 1, 3, 2, {0, 10, 330}, 100},
        {1, 1, 260, 1, {0, 40}, 0},
    };
    return cr_make_param_array(attention_case, c, sizeof c / sizeof *c);
}
ParameterizedTest(attention_case *c, attention, backward_is_the_derivative)
{
    check_backward(c, 0.0F);
    check_backward(c, 2.0F); /* most scores are beyond it */
}

/* The tasks of a block of queries add to its gradient one after the other; with more threads than
 * cores they do wait for each other. */
Test(attention, gradients_are_added_in_the_order_of_the_keys, .timeout = 120)
{
    static const attention_case c = {6, 2, 16, 3, {0, 900, 910, 1300}, 0};
    fixture f = fixture_create(&c);
    const qs_ops *ops = qs_ops_cpu();
    const size_t bytes = (size_t)f.dq.rows * (size_t)f.dq.stride * sizeof(float);
    float *first = malloc(bytes);
    for (int window = 0; window <= 400; window += 200) {
        f.shape.window = window;
        for (int round = 0; round < 12; round++) {
            qs_queue *queue = fx_queue(1 + round % 6 * 2);
            cr_assert_eq(ops->attention_forward(queue, &f.shape, &f.q, &f.k, &f.v, &f.o, f.lse),
                         QS_OK);
            cr_assert_eq(ops->attention_backward(queue, &f.shape, &f.q, &f.k, &f.v, &f.o, f.lse,
                                                 &f.d_o, f.delta, &f.dq, &f.dk, &f.dv),
                         QS_OK);
            if (round == 0) {
                memcpy(first, qs_mat_f32(&f.dq), bytes);
            }
            cr_assert_arr_eq(first, qs_mat_f32(&f.dq), bytes, "window %d, %d threads", window,
                             1 + round % 6 * 2);
            qs_queue_destroy(queue);
        }
    }
    free(first);
    fixture_destroy(&f);
}

Test(attention, a_document_does_not_see_its_neighbours)
{
    static const attention_case c = {2, 1, 8, 3, {0, 70, 75, 150}, 0};
    qs_queue *queue = fx_queue(2);
    fixture f = fixture_create(&c);
    const qs_ops *ops = qs_ops_cpu();
    cr_assert_eq(ops->attention_forward(queue, &f.shape, &f.q, &f.k, &f.v, &f.o, f.lse), QS_OK);
    qs_mat before = f.o, again = fx_mat(f.o.rows, f.o.cols, 3, 4);
    for (int64_t t = 0; t < 150; t++) {
        if (t < 70 || t >= 75) {
            memset(qs_mat_f32(&f.k) + t * f.k.stride, 0x7F,
                   (size_t)f.k.cols * sizeof(float)); /* huge */
        }
    }
    cr_assert_eq(ops->attention_forward(queue, &f.shape, &f.q, &f.k, &f.v, &again, f.lse), QS_OK);
    for (int64_t t = 70; t < 75; t++) {
        for (int64_t i = 0; i < f.o.cols; i++) {
            cr_assert_eq(fx_at(&before, t, i), fx_at(&again, t, i));
        }
    }
    fx_mat_free(&again);
    fixture_destroy(&f);
    qs_queue_destroy(queue);
}

/* A window that holds the whole document is no window: the same bits, the same work. */
Test(attention, a_window_as_long_as_the_longest_document_changes_no_bit)
{
    static const attention_case c = {2, 1, 8, 3, {0, 70, 75, 205}, 0};
    qs_queue *queue = fx_queue(2);
    fixture f = fixture_create(&c);
    const qs_ops *ops = qs_ops_cpu();
    qs_mat got[2][4];
    for (int i = 0; i < 2; i++) {
        f.shape.window = i * 130;
        qs_mat *out[] = {&f.o, &f.dq, &f.dk, &f.dv};
        for (int m = 0; m < 4; m++) {
            got[i][m] = fx_mat(out[m]->rows, out[m]->cols, 0, 20);
        }
        cr_assert_eq(ops->attention_forward(queue, &f.shape, &f.q, &f.k, &f.v, &got[i][0], f.lse),
                     QS_OK);
        cr_assert_eq(ops->attention_backward(queue, &f.shape, &f.q, &f.k, &f.v, &got[i][0], f.lse,
                                             &f.d_o, f.delta, &got[i][1], &got[i][2], &got[i][3]),
                     QS_OK);
    }
    for (int m = 0; m < 4; m++) {
        cr_assert_arr_eq(got[0][m].data, got[1][m].data,
                         (size_t)(got[0][m].rows * got[0][m].cols) * sizeof(float));
        fx_mat_free(&got[0][m]);
        fx_mat_free(&got[1][m]);
    }
    fixture_destroy(&f);
    qs_queue_destroy(queue);
}

/* Keys that have left the window do not matter, however large they are. */
Test(attention, a_query_does_not_see_behind_its_window)
{
    static const attention_case c = {2, 1, 8, 1, {0, 200}, 70};
    qs_queue *queue = fx_queue(2);
    fixture f = fixture_create(&c);
    const qs_ops *ops = qs_ops_cpu();
    qs_mat again = fx_mat(f.o.rows, f.o.cols, 3, 4);
    cr_assert_eq(ops->attention_forward(queue, &f.shape, &f.q, &f.k, &f.v, &f.o, f.lse), QS_OK);
    for (int64_t t = 0; t <= 100; t++) {
        memset(qs_mat_f32(&f.k) + t * f.k.stride, 0x7F, (size_t)f.k.cols * sizeof(float));
    }
    cr_assert_eq(ops->attention_forward(queue, &f.shape, &f.q, &f.k, &f.v, &again, f.lse), QS_OK);
    for (int64_t t = 170; t < 200; t++) { /* 101 is the first key of 170 */
        for (int64_t i = 0; i < f.o.cols; i++) {
            cr_assert_eq(fx_at(&f.o, t, i), fx_at(&again, t, i));
        }
    }
    cr_assert_neq(fx_at(&f.o, 169, 0), fx_at(&again, 169, 0));
    fx_mat_free(&again);
    fixture_destroy(&f);
    qs_queue_destroy(queue);
}

Test(attention, large_scores_do_not_overflow)
{
    static const attention_case c = {1, 1, 4, 1, {0, 100}, 0};
    qs_queue *queue = fx_queue(1);
    fixture f = fixture_create(&c);
    for (int64_t i = 0; i < 400; i++) {
        qs_mat_f32(&f.q)[i] *= 1e4F;
        f.r.q[i] = (double)qs_mat_f32(&f.q)[i];
    }
    cr_assert_eq(qs_ops_cpu()->attention_forward(queue, &f.shape, &f.q, &f.k, &f.v, &f.o, f.lse),
                 QS_OK);
    for (int64_t t = 0; t < 100; t++) {
        double out[4], lse = reference_row(&f.r, 0, t, 0, out);
        cr_assert_float_eq((double)f.lse[t], lse, 1e-6 * fabs(lse) + 0.02);
        cr_assert(isfinite(fx_at(&f.o, t, 0)));
    }
    fixture_destroy(&f);
    qs_queue_destroy(queue);
}

/* ---- in bf16 ---- */

typedef struct {
    qs_mat o, dq, dk, dv;
    float *lse;
} results;

static results run(const qs_ops *ops, int threads, const fixture *f)
{
    qs_queue *queue = fx_queue(threads);
    results r = {.o = fx_mat(f->o.rows, f->o.cols, 0, 20),
                 .dq = fx_mat(f->q.rows, f->q.cols, 0, 20),
                 .dk = fx_mat(f->k.rows, f->k.cols, 0, 20),
                 .dv = fx_mat(f->v.rows, f->v.cols, 0, 20),
                 .lse = fx_random(f->r.rows * f->shape.n_heads, 9)};
    cr_assert_eq(ops->attention_forward(queue, &f->shape, &f->q, &f->k, &f->v, &r.o, r.lse), QS_OK);
    cr_assert_eq(ops->attention_backward(queue, &f->shape, &f->q, &f->k, &f->v, &r.o, r.lse,
                                         &f->d_o, f->delta, &r.dq, &r.dk, &r.dv),
                 QS_OK);
    qs_queue_destroy(queue);
    return r;
}

static void results_free(results *r)
{
    fx_mat_free(&r->o);
    fx_mat_free(&r->dq);
    fx_mat_free(&r->dk);
    fx_mat_free(&r->dv);
    free(r->lse);
}

static void same_floats(const qs_mat *a, const qs_mat *b, const char *what)
{
    cr_assert_eq(memcmp(a->data, b->data, (size_t)(a->rows * a->cols) * sizeof(float)), 0, "%s",
                 what);
}

static double size_of(const qs_mat *mat, int64_t first, int64_t rows)
{
    double sum = 0;
    for (int64_t i = first * mat->cols; i < (first + rows) * mat->cols; i++) {
        sum += (double)qs_mat_f32(mat)[i] * (double)qs_mat_f32(mat)[i];
    }
    return sqrt(sum / (double)(rows * mat->cols));
}

/* Each row within what operands of 8 bits lose, of its own size and of that of all rows (a row's
 * gradient may cancel). */
static void close_rows(const qs_mat *got, const qs_mat *strict, const char *what)
{
    const double all = size_of(strict, 0, strict->rows);
    for (int64_t t = 0; t < got->rows; t++) {
        double error = 0;
        for (int64_t i = 0; i < got->cols; i++) {
            const double off = fx_at(got, t, i) - fx_at(strict, t, i);
            error += off * off;
        }
        error = sqrt(error / (double)got->cols);
        cr_assert_leq(error, 0x1p-5 * (size_of(strict, t, 1) + all), "%s row %d: %g of %g", what,
                      (int)t, error, size_of(strict, t, 1));
    }
}

ParameterizedTestParameters(attention, bf16_is_near_strict_and_one_value_on_every_cpu)
{
    static attention_case c[] = {
        {1, 1, 4, 0, {0}, 0},
        {2, 1, 8, 1, {0, 0}, 0},
        {3, 1, 6, 4, {0, 1, 2, 2, 9}, 0},
        {2, 2, 64, 2, {0, 65, 300}, 0},
        {9, 3, 20, 3, {0, 130, 131, 200}, 0},
        {2, 1, 130, 2, {0, 3, 70}, 0},
        {4, 2, 5, 3, {0, 7, 71, 90}, 0}, /* odd head_dim: half a word */
        {10, 2, 4, 2, {0, 70, 75}, 0},
        {2, 1, 8, 2, {0, 70, 200}, 7},
        {3, 1, 8, 2, {0, 7, 200}, 63},
        {5, 1, 8, 2, {0, 65, 260}, 65},
        {2, 1, 8, 2, {0, 65, 401}, 129},
        {4, 2, 16, 3, {0, 300, 310, 441}, 0},
        {2, 1, 260, 1, {0, 141}, 0}, /* a sum of more than 256 */
    };
    return cr_make_param_array(attention_case, c, sizeof c / sizeof *c);
}
ParameterizedTest(attention_case *c, attention, bf16_is_near_strict_and_one_value_on_every_cpu)
{
    static const char *const tables[] = {"portable", "avx2", "avx512bf16"};
    for (int capped = 0; capped < 2; capped++) {
        fixture f = fixture_capped(c, capped ? 2.0F : 0.0F);
        cr_assert(qs_pairs_force("portable"));
        results strict = run(qs_ops_cpu(), 2, &f), want = run(qs_ops_cpu_bf16(), 1, &f);
        close_rows(&want.o, &strict.o, "o");
        close_rows(&want.dq, &strict.dq, "dq");
        close_rows(&want.dk, &strict.dk, "dk");
        close_rows(&want.dv, &strict.dv, "dv");
        for (int i = 0; i < 3; i++) {
            for (int threads = 1; threads <= 5 && qs_pairs_force(tables[i]); threads += 2) {
                results got = run(qs_ops_cpu_bf16(), threads, &f);
                same_floats(&got.o, &want.o, tables[i]);
                same_floats(&got.dq, &want.dq, tables[i]);
                same_floats(&got.dk, &want.dk, tables[i]);
                same_floats(&got.dv, &want.dv, tables[i]);
                results_free(&got);
            }
        }
        results_free(&strict);
        results_free(&want);
        fixture_destroy(&f);
    }
}

/* None of the results is left to the strict products. */
Test(attention, bf16_computes_in_bf16)
{
    static const attention_case c = {2, 1, 16, 1, {0, 90}, 0};
    fixture f = fixture_create(&c);
    results strict = run(qs_ops_cpu(), 2, &f), got = run(qs_ops_cpu_bf16(), 2, &f);
    const qs_mat *pairs[4][2] = {
        {&got.o, &strict.o}, {&got.dq, &strict.dq}, {&got.dk, &strict.dk}, {&got.dv, &strict.dv}};
    for (int i = 0; i < 4; i++) {
        int same = 0, count = (int)(pairs[i][0]->rows * pairs[i][0]->cols);
        for (int e = 0; e < count; e++) {
            same += qs_mat_f32(pairs[i][0])[e] == qs_mat_f32(pairs[i][1])[e];
        }
        cr_assert_lt(same, count / 10, "result %d is strict", i);
    }
    results_free(&strict);
    results_free(&got);
    fixture_destroy(&f);
}
