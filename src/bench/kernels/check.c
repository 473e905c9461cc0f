#include "bench/kernels/check.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/minmax.h"
#include "kernels/cpu/isa.h"

enum { ROWS = 8, KEYS = 4, COLUMNS = 32 };

/* Half a unit in the last place of fp32 and bf16. */
static const double HALF_ULP_F32 = 0x1p-24, HALF_ULP_BF16 = 0x1p-9;

static bool exact_inputs_in_f32(const qs_bench *b)
{
    return b->ops->act_dtype == QS_F32;
}

static qs_status take(void **out, size_t count, size_t size)
{
    *out = calloc(count > 0 ? count : 1, size);
    return *out != NULL ? QS_OK : QS_FAIL(QS_ERR_MEMORY, "memory: %zu elements for a check", count);
}

#define TAKE(pp, count) take((void **)(pp), (size_t)(count), sizeof **(pp))

/* ---- what is looked at ---- */

/* `i` of `n` numbers spread over 0 .. count - 1, the last first: rows at the end see most. */
static int64_t pick(int64_t count, int64_t n, int64_t i)
{
    return count - 1 - i * count / n;
}

/* Rows `first` .. of a device matrix as floats [rows, cols], to be freed. */
static qs_status fetch(qs_bench *b, float **out, const qs_mat *mat, int64_t first, int64_t rows)
{
    const size_t size = qs_dtype_bytes(mat->dtype);
    void *raw = NULL;
    *out = NULL;
    QS_TRY(qs_bench_download(b, &raw,
                             (const char *)mat->data + (size_t)(first * mat->stride) * size,
                             (size_t)((rows - 1) * mat->stride + mat->cols) * size));
    const qs_status st = TAKE(out, rows * mat->cols);
    for (int64_t r = 0; st == QS_OK && r < rows; r++) {
        qs_f32_load(*out + r * mat->cols, (const char *)raw + (size_t)(r * mat->stride) * size,
                    mat->dtype, mat->cols);
    }
    free(raw);
    return st;
}

/* The whole weight as floats [out, in], to be freed. */
static qs_status fetch_weight(qs_bench *b, float **out, const qs_unit_view *view,
                              const qs_weight *w)
{
    void *bytes = NULL;
    *out = NULL;
    QS_TRY(qs_bench_download(b, &bytes, view->base, view->layout.message_bytes));
    const qs_unit_view host = {.layout = view->layout, .base = bytes};
    qs_weight on_host = *w;
    on_host.map = w->map != NULL ? qs_dynamic_map : NULL;
    const qs_status st = TAKE(out, w->out * w->in);
    if (st == QS_OK) {
        qs_weight_decode(&host, &on_host, 0, w->out * w->in, *out);
    }
    free(bytes);
    return st;
}

/* ---- judging ---- */

/* The larger one; a NaN stays. */
static double worse(double a, double b)
{
    return isnan(a) || isnan(b) ? NAN : a > b ? a : b;
}

/* One row; limit[i] is what the difference may be. */
static void judge(qs_bench_check *c, const float *got, const double *want, const double *limit,
                  int64_t count)
{
    double largest = 0, difference = 0;
    for (int64_t i = 0; i < count; i++) {
        const double d = fabs((double)got[i] - want[i]);
        largest = worse(largest, fabs(want[i]));
        difference = worse(difference, d);
        c->wrong += !(d <= limit[i]);
    }
    c->checked += count;
    c->error = worse(c->error, difference / (largest > 0 ? largest : 1));
}

/* The same with one limit, a share of the row's largest magnitude. */
static void judge_row(qs_bench_check *c, const float *got, const double *want, double share,
                      double *limit, int64_t count)
{
    double largest = 1e-3; /* a row of zeros has rounding errors, too */
    for (int64_t i = 0; i < count; i++) {
        largest = worse(largest, fabs(want[i]));
    }
    for (int64_t i = 0; i < count; i++) {
        limit[i] = share * largest;
    }
    judge(c, got, want, limit, count);
}

/* ---- products ---- */

typedef struct {
    const float *w; /* [out, in] */
    int64_t out, in;
    bool transposed; /* y = x W^T; else y = x W */
    bool f32;
    bool rounded; /* operands are rounded to bf16, or lose as much */
} product;

static product product_of(const qs_bench *b, const float *w, const qs_weight *shape,
                          bool transposed, bool dense)
{
    const bool host = b->plugin == NULL;
    return (product){w,
                     shape->out,
                     shape->in,
                     transposed,
                     exact_inputs_in_f32(b),
                     host && !dense && b->ops != qs_ops_cpu()};
}

/* One row of the product in fp64, and what it may be off by: a sum of k products in fp32 rounds k
 * times (on the CPU in blocks), and errors of random sign add up like sqrt(k); four times that.
 * Those of rounded operands add up as the terms' squares do; six times that. */
static void multiply_row(const product *p, const float *x, double *want, double *limit,
                         double *squares)
{
    const int64_t cols = p->transposed ? p->out : p->in, k = p->transposed ? p->in : p->out;
    memset(want, 0, (size_t)cols * sizeof *want);
    memset(limit, 0, (size_t)cols * sizeof *limit);
    memset(squares, 0, (size_t)cols * sizeof *squares);
    for (int64_t o = 0; o < p->out; o++) {
        const float *row = p->w + o * p->in;
        for (int64_t i = 0; i < p->in; i++) {
            const double term = (double)row[i] * (double)x[p->transposed ? i : o];
            const int64_t to = p->transposed ? o : i;
            want[to] += term;
            limit[to] += fabs(term);
            squares[to] += term * term;
        }
    }
    const double roundings = p->f32 ? (double)QS_GEMM_KC + (double)k / QS_GEMM_KC : (double)k;
    const double sum = 4 * sqrt(roundings) * HALF_ULP_F32;
    for (int64_t i = 0; i < cols; i++) {
        limit[i] = sum * limit[i] + (p->f32 ? 0 : 2 * HALF_ULP_BF16 * fabs(want[i])) +
                   (p->rounded ? 6 * HALF_ULP_BF16 * sqrt(squares[i]) : 0);
    }
}

static qs_status check_product(qs_bench *b, const product *p, const qs_mat *x, const qs_mat *y,
                               qs_bench_check *out)
{
    qs_status st = QS_OK;
    double *want = NULL, *limit = NULL, *squares = NULL;
    const int64_t n = qs_min_i64(ROWS, x->rows);
    *out = (qs_bench_check){0};
    QS_GOTO(TAKE(&want, y->cols));
    QS_GOTO(TAKE(&limit, y->cols));
    QS_GOTO(TAKE(&squares, y->cols));
    for (int64_t i = 0; i < n; i++) {
        float *from = NULL, *got = NULL;
        st = fetch(b, &from, x, pick(x->rows, n, i), 1);
        st = st == QS_OK ? fetch(b, &got, y, pick(x->rows, n, i), 1) : st;
        if (st == QS_OK) {
            multiply_row(p, from, want, limit, squares);
            judge(out, got, want, limit, y->cols);
        }
        free(from);
        free(got);
        QS_GOTO(st);
    }
done:
    free(want);
    free(limit);
    free(squares);
    return st;
}

static qs_status check_linear(qs_bench *b, const qs_bench_linear *l, bool backward,
                              qs_bench_check *out)
{
    float *w = NULL;
    QS_TRY(fetch_weight(b, &w, &l->unit->view, l->w));
    const product p = product_of(b, w, l->w, !backward, false);
    const qs_status st =
        check_product(b, &p, backward ? &l->y : &l->x, backward ? &l->dx : &l->y, out);
    free(w);
    return st;
}

qs_status qs_bench_check_forward(qs_bench *b, const qs_bench_linear *l, qs_bench_check *out)
{
    return check_linear(b, l, false, out);
}

qs_status qs_bench_check_backward(qs_bench *b, const qs_bench_linear *l, qs_bench_check *out)
{
    return check_linear(b, l, true, out);
}

qs_status qs_bench_check_dense(qs_bench *b, const qs_bench_linear *l, qs_bench_check *out)
{
    const qs_mat dense = {l->dense, l->w->out, l->w->in, l->w->in, b->ops->act_dtype};
    float *w = NULL;
    QS_TRY(fetch(b, &w, &dense, 0, dense.rows));
    const product p = product_of(b, w, l->w, true, true);
    const qs_status st = check_product(b, &p, &l->x, &l->y, out);
    free(w);
    return st;
}

/* ---- decode ---- */

static void compare_exactly(qs_bench_check *c, float got, float want, double *difference,
                            double *largest)
{
    const double d = fabs((double)got - (double)want);
    c->wrong += !(d == 0);
    c->checked++;
    *difference = worse(*difference, d);
    *largest = worse(*largest, fabs((double)want));
}

/* y = x W^T with x = unit vectors: columns of W, which bf16 holds exactly. */
static qs_status check_columns(qs_bench *b, const qs_bench_unit *u, const qs_weight *w,
                               const float *want, qs_bench_check *out, double *difference,
                               double *largest)
{
    qs_status st = QS_OK;
    const int64_t n = qs_min_i64(COLUMNS, w->in);
    const int kept = b->n_taken;
    const float one = 1;
    float *got = NULL, *units = NULL;
    void *ones = NULL;
    qs_mat x, y;
    QS_GOTO(TAKE(&units, n * w->in));
    QS_GOTO(take(&ones, (size_t)(n * w->in), qs_dtype_bytes(b->ops->act_dtype)));
    for (int64_t i = 0; i < n; i++) {
        units[i * w->in + pick(w->in, n, i)] = one;
    }
    qs_f32_store(ones, b->ops->act_dtype, units, n * w->in);
    x = (qs_mat){NULL, n, w->in, w->in, b->ops->act_dtype};
    QS_GOTO(qs_bench_upload(b, &x.data, ones, (size_t)(n * w->in) * qs_dtype_bytes(x.dtype)));
    QS_GOTO(qs_bench_mat(b, &y, n, w->out, 0));
    QS_GOTO(b->ops->linear_forward(b->queue, &u->view, w, NULL, &x, &y));
    QS_GOTO(fetch(b, &got, &y, 0, n));
    for (int64_t i = 0; i < n; i++) {
        for (int64_t o = 0; o < w->out; o++) {
            compare_exactly(out, got[i * w->out + o], want[o * w->in + pick(w->in, n, i)],
                            difference, largest);
        }
    }
done:
    while (b->n_taken > kept) {
        qs_device_free(b->device, b->taken[--b->n_taken]);
    }
    free(units);
    free(ones);
    free(got);
    return st;
}

/* Every weight, as floats or as words of two bf16, the earlier one above. */
static void check_decoded(const qs_bench *b, const qs_bench_unit *u, const float *want,
                          int64_t count, qs_bench_check *out, double *difference, double *largest)
{
    const bool pairs = b->ops == qs_ops_cpu_bf16();
    const uint32_t *words = (const uint32_t *)(const void *)u->out;
    for (int64_t e = 0; e < count; e++) {
        if (pairs) {
            const uint32_t word = words[e / 2];
            const uint16_t bits = (uint16_t)(e % 2 == 0 ? word >> 16 : word);
            compare_exactly(out, qs_f32_from_bf16(bits), qs_f32_round(want[e], QS_BF16), difference,
                            largest);
        } else {
            compare_exactly(out, u->out[e], want[e], difference, largest);
        }
    }
}

qs_status qs_bench_check_decode(qs_bench *b, const qs_bench_unit *u, qs_bench_check *out)
{
    double difference = 0, largest = 0;
    *out = (qs_bench_check){0};
    for (int i = 0; i < u->count; i++) {
        const qs_weight *w = &u->w[i];
        float *want = NULL;
        qs_status st = fetch_weight(b, &want, &u->view, w);
        if (st == QS_OK && b->plugin != NULL) {
            st = check_columns(b, u, w, want, out, &difference, &largest);
        }
        if (st == QS_OK && b->plugin == NULL && i == u->count - 1) { /* what was decoded last */
            check_decoded(b, u, want, w->out * w->in, out, &difference, &largest);
        }
        free(want);
        QS_TRY(st);
    }
    out->error = difference / (largest > 0 ? largest : 1);
    return QS_OK;
}

/* ---- attention ---- */

typedef struct {
    const qs_bench_attention *a;
    float *q, *k, *v, *d_o; /* [T, width] */
    int64_t wide, narrow;
    double *p; /* [T] softmax of one query */
    double *o; /* [head_dim] its output */
} attention_data;

static const float *head_of(const float *matrix, int64_t width, int64_t row, int64_t head, int dim)
{
    return matrix + row * width + head * dim;
}

static double dot(const float *x, const float *y, int64_t count)
{
    double sum = 0;
    for (int64_t i = 0; i < count; i++) {
        sum += (double)x[i] * (double)y[i];
    }
    return sum;
}

/* p and o of query t, head h. */
static void attend(attention_data *d, int64_t t, int h)
{
    const qs_attention_shape *s = &d->a->shape;
    const int group = h / (s->n_heads / s->n_kv_heads), dim = s->head_dim;
    const float *q = head_of(d->q, d->wide, t, h, dim);
    double most = -INFINITY, sum = 0;
    for (int64_t j = 0; j <= t; j++) {
        d->p[j] = (double)s->scale * dot(q, head_of(d->k, d->narrow, j, group, dim), dim);
        most = d->p[j] > most ? d->p[j] : most;
    }
    for (int64_t j = 0; j <= t; j++) {
        d->p[j] = exp(d->p[j] - most);
        sum += d->p[j];
    }
    memset(d->o, 0, (size_t)dim * sizeof *d->o);
    for (int64_t j = 0; j <= t; j++) {
        const float *v = head_of(d->v, d->narrow, j, group, dim);
        d->p[j] /= sum;
        for (int i = 0; i < dim; i++) {
            d->o[i] += d->p[j] * (double)v[i];
        }
    }
}

/* Gradient of the score of query t and key j, scale included; attend(t, h) has been called. */
static double score_gradient(const attention_data *d, int64_t t, int h, int64_t j)
{
    const qs_attention_shape *s = &d->a->shape;
    const int group = h / (s->n_heads / s->n_kv_heads), dim = s->head_dim;
    const float *d_o = head_of(d->d_o, d->wide, t, h, dim);
    double delta = 0;
    for (int i = 0; i < dim; i++) {
        delta += (double)d_o[i] * d->o[i];
    }
    const double dp = dot(d_o, head_of(d->v, d->narrow, j, group, dim), dim);
    return (double)s->scale * d->p[j] * (dp - delta);
}

static void query_gradient(attention_data *d, int64_t t, int h, double *dq)
{
    const qs_attention_shape *s = &d->a->shape;
    const int group = h / (s->n_heads / s->n_kv_heads), dim = s->head_dim;
    memset(dq, 0, (size_t)dim * sizeof *dq);
    for (int64_t j = 0; j <= t; j++) {
        const double g = score_gradient(d, t, h, j);
        const float *k = head_of(d->k, d->narrow, j, group, dim);
        for (int i = 0; i < dim; i++) {
            dq[i] += g * (double)k[i];
        }
    }
}

/* dk and dv of key j: from all queries from j on, of all heads of the group. */
static void key_gradient(attention_data *d, int64_t j, int group, double *dk, double *dv)
{
    const qs_attention_shape *s = &d->a->shape;
    const int heads = s->n_heads / s->n_kv_heads, dim = s->head_dim;
    memset(dk, 0, (size_t)dim * sizeof *dk);
    memset(dv, 0, (size_t)dim * sizeof *dv);
    for (int h = group * heads; h < (group + 1) * heads; h++) {
        for (int64_t t = j; t < d->a->tokens; t++) {
            attend(d, t, h);
            const double g = score_gradient(d, t, h, j);
            const float *q = head_of(d->q, d->wide, t, h, dim);
            const float *d_o = head_of(d->d_o, d->wide, t, h, dim);
            for (int i = 0; i < dim; i++) {
                dk[i] += g * (double)q[i];
                dv[i] += d->p[j] * (double)d_o[i];
            }
        }
    }
}

typedef struct {
    double *want, *also, *limit; /* [head_dim] */
    float *o, *dq, *dk, *dv;     /* what the operations wrote */
} attention_results;

static void check_queries(attention_data *d, attention_results *r, bool backward, double share,
                          qs_bench_check *out)
{
    const qs_attention_shape *s = &d->a->shape;
    const int64_t n = qs_min_i64(ROWS, d->a->tokens), dim = s->head_dim;
    for (int64_t i = 0; i < n; i++) {
        const int64_t t = pick(d->a->tokens, n, i);
        const int h = (int)(i * s->n_heads / n);
        attend(d, t, h);
        if (backward) {
            query_gradient(d, t, h, r->want);
        }
        judge_row(out, head_of(backward ? r->dq : r->o, d->wide, t, h, (int)dim),
                  backward ? r->want : d->o, share, r->limit, dim);
    }
}

static void check_keys(attention_data *d, attention_results *r, double share, qs_bench_check *out)
{
    const qs_attention_shape *s = &d->a->shape;
    const int dim = s->head_dim;
    for (int64_t i = 0; i < qs_min_i64(KEYS, d->a->tokens); i++) {
        const int64_t j = d->a->tokens - 1 - i;
        const int group = (int)(i * s->n_kv_heads / KEYS);
        key_gradient(d, j, group, r->want, r->also);
        judge_row(out, head_of(r->dk, d->narrow, j, group, dim), r->want, share, r->limit, dim);
        judge_row(out, head_of(r->dv, d->narrow, j, group, dim), r->also, share, r->limit, dim);
    }
}

qs_status qs_bench_check_attention(qs_bench *b, const qs_bench_attention *a, bool backward,
                                   qs_bench_check *out)
{
    qs_status st = QS_OK;
    const int64_t t = a->tokens, dim = a->shape.head_dim;
    attention_data d = {.a = a, .wide = a->q.cols, .narrow = a->k.cols};
    attention_results r = {0};
    float **const to[] = {&d.q, &d.k, &d.v, &d.d_o, &r.o, &r.dq, &r.dk, &r.dv};
    const qs_mat *const from[] = {&a->q, &a->k, &a->v, &a->d_o, &a->o, &a->dq, &a->dk, &a->dv};
    double **const rows[] = {&d.o, &r.want, &r.also, &r.limit};
    /* exp of 2^-22 accuracy and T-term sums; in bf16 probabilities and their gradients are rounded,
     * on the CPU the operands as well */
    const bool exact = exact_inputs_in_f32(b) && b->ops != qs_ops_cpu_bf16();
    const double share = exact ? 2e-5 : backward ? 0x1p-5 : 0x1p-6;
    *out = (qs_bench_check){0};
    for (int i = 0; i < 8; i++) {
        QS_GOTO(fetch(b, to[i], from[i], 0, t));
    }
    for (int i = 0; i < 4; i++) {
        QS_GOTO(TAKE(rows[i], dim));
    }
    QS_GOTO(TAKE(&d.p, t));
    check_queries(&d, &r, backward, share, out);
    if (backward) {
        check_keys(&d, &r, share, out);
    }
done:
    for (int i = 0; i < 8; i++) {
        free(*to[i]);
    }
    for (int i = 0; i < 4; i++) {
        free(*rows[i]);
    }
    free(d.p);
    return st;
}

/* ---- head ---- */

typedef struct {
    const float *w; /* [chunk, hidden] */
    int64_t chunk, hidden;
    double *logits; /* [chunk] */
    double *o;      /* [hidden] */
} head_data;

/* Logarithm of the sum and the mean of W of a row. */
static double head_row(head_data *d, const float *x)
{
    double most = -INFINITY, sum = 0;
    for (int64_t r = 0; r < d->chunk; r++) {
        d->logits[r] = dot(x, d->w + r * d->hidden, d->hidden);
        most = d->logits[r] > most ? d->logits[r] : most;
    }
    memset(d->o, 0, (size_t)d->hidden * sizeof *d->o);
    for (int64_t r = 0; r < d->chunk; r++) {
        const double p = exp(d->logits[r] - most);
        sum += p;
        for (int64_t i = 0; i < d->hidden; i++) {
            d->o[i] += p * (double)d->w[r * d->hidden + i];
        }
    }
    for (int64_t i = 0; i < d->hidden; i++) {
        d->o[i] /= sum;
    }
    return most + log(sum);
}

/* Row `r` of the state against the reference. */
static void judge_head_row(head_data *d, const float *x, const float *state, int64_t rows,
                           int64_t r, float *o, double share, double *limit, qs_bench_check *out)
{
    const double lse = head_row(d, x), sum = (double)state[rows + r];
    const float got[2] = {(float)((double)state[r] + log(sum)), state[2 * rows + r]};
    const double want[2] = {lse, d->logits[0]};
    judge_row(out, got, want, share, limit, 2);
    for (int64_t i = 0; i < d->hidden; i++) {
        o[i] = (float)((double)o[i] / sum);
    }
    judge_row(out, o, d->o, share, limit, d->hidden);
}

qs_status qs_bench_check_head(qs_bench *b, const qs_bench_head *h, qs_bench_check *out)
{
    qs_status st = QS_OK;
    const int64_t rows = h->state.rows, hidden = h->state.hidden, n = qs_min_i64(ROWS, rows);
    const qs_mat x = {(void *)(uintptr_t)h->state.x, rows, hidden, hidden, b->ops->act_dtype};
    const qs_mat o = {h->state.o, rows, hidden, hidden, QS_F32};
    head_data d = {.chunk = h->w.out, .hidden = hidden};
    float *w = NULL;
    double *limit = NULL;
    void *state = NULL;
    /* logits of magnitude sqrt(hidden) to a few 1e-7 of it, and exp of them */
    const double share = exact_inputs_in_f32(b) ? 1e-4 : 0x1p-5;
    *out = (qs_bench_check){0};
    QS_GOTO(fetch_weight(b, &w, &h->view, &h->w));
    QS_GOTO(TAKE(&d.logits, d.chunk));
    QS_GOTO(TAKE(&d.o, hidden));
    QS_GOTO(TAKE(&limit, hidden > 2 ? hidden : 2));
    QS_GOTO(qs_bench_download(b, &state, h->state.max, 3 * (size_t)rows * sizeof(float)));
    d.w = w;
    for (int64_t i = 0; i < n; i++) {
        float *from = NULL, *got = NULL;
        const int64_t r = pick(rows, n, i);
        st = fetch(b, &from, &x, r, 1);
        st = st == QS_OK ? fetch(b, &got, &o, r, 1) : st;
        if (st == QS_OK) {
            judge_head_row(&d, from, state, rows, r, got, share, limit, out);
        }
        free(from);
        free(got);
        QS_GOTO(st);
    }
done:
    free(w);
    free(limit);
    free(state);
    free(d.logits);
    free(d.o);
    return st;
}
