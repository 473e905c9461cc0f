#include "linear_layer.h"

#include <stdio.h>

/* ---- what it is made of ---- */

tw_unit layer_weight(const tw_backend *b, weight_form form, int64_t out, int64_t in)
{
    const bool raw = form == RAW_BF16 || form == RAW_F32;
    const fx_weight_spec spec = {.kind = raw ? QS_WEIGHT_RAW : QS_WEIGHT_NF4,
                                 .out = out,
                                 .in = in,
                                 .dtype = form == NF4_F16   ? QS_F16
                                          : form == RAW_F32 ? QS_F32
                                                            : QS_BF16,
                                 .nested = form == NF4,
                                 .nranks = raw ? 1 : 2,
                                 .raw_quantum_elems = 256};
    return tw_unit_make(b, &spec, 21);
}

double layer_weight_rounding(const layer_case *c)
{
    return c->weight == NF4_F16 || c->weight == RAW_F32 ? AD_HALF_ULP : 0.0;
}

static layer_vector vector_make(const tw_backend *b, int64_t count, uint64_t seed)
{
    layer_vector v = {.host = fx_random(count, seed), .count = count};
    v.device = tw_upload(b, v.host, (size_t)count * sizeof *v.host);
    return v;
}

static int64_t columns_behind(const layer *l, int pad)
{
    enum { BEYOND = 8 };
    return pad == BORDER ? l->b->ops->border(l->c->most_rank) + BEYOND : pad;
}

static void describe(layer *l)
{
    const layer_case *c = l->c;
    snprintf(l->what, sizeof l->what,
             "T %lld out %lld in %lld rank %d of %d p %g weight %d opened %d pads %d %d bias %d "
             "residual %d dx %d",
             (long long)c->rows, (long long)c->out, (long long)c->in, c->rank, c->most_rank,
             (double)c->dropout, (int)c->weight, c->opened, c->x_pad, c->dy_pad, c->bias,
             (int)c->residual, (int)c->dx);
}

bool layer_residual_is_y(const layer_case *c)
{
    return c->residual == RESIDUAL_IS_Y || c->residual == RESIDUAL_IS_Y_F32;
}

bool layer_y_is_f32(const layer_case *c)
{
    return c->residual == RESIDUAL_F32 || c->residual == RESIDUAL_IS_Y_F32;
}

layer layer_make(const tw_backend *b, const layer_case *c, adapter_kind kind)
{
    const qs_dtype stream = layer_y_is_f32(c) ? QS_F32 : b->ops->act_dtype;
    layer l = {.b = b, .c = c, .kind = kind, .unit = layer_weight(b, c->weight, c->out, c->in)};
    uint64_t seed = 41;
    describe(&l);
    l.ad = adapter_make(b, c->rows, c->in, c->out, c->rank, c->dropout);
    l.bias = vector_make(b, c->out, seed++);
    if (kind == DORA) {
        l.magnitude = vector_make(b, c->out, seed++);
        l.norm = vector_make(b, c->out, seed++);
        l.gain = vector_make(b, c->out, seed++);
    }
    l.x = tw_mat_make(b, c->rows, c->in, columns_behind(&l, c->x_pad), 1.0F, seed++);
    l.y = tw_mat_make_as(b, stream, c->rows, c->out, 8, 1.0F, seed++);
    l.residual = tw_mat_make_as(b, stream, c->rows, c->out, 16, 1.0F, seed++);
    l.xa = tw_mat_make(b, c->rows, c->rank, 3, 1.0F, seed++);
    l.dy = tw_mat_make(b, c->rows, c->out, columns_behind(&l, c->dy_pad), 1.0F, seed++);
    l.work = tw_mat_make(b, c->rows, c->rank, 0, 1.0F, seed++);
    l.dx = tw_mat_make(b, c->rows, c->in, 8, 1.0F, seed++);
    l.da = vector_make(b, c->rank * c->in, seed++);
    l.db = vector_make(b, c->out * c->rank, seed++);
    if (kind == DORA) {
        l.dm = vector_make(b, c->out, seed++);
    }
    l.dropped = adapter_dropped(&l.ad, &l.x.host);
    return l;
}

void layer_free(layer *l)
{
    tw_mat *const mats[] = {&l->x, &l->y, &l->residual, &l->xa, &l->dy, &l->work, &l->dx};
    for (size_t i = 0; i < sizeof mats / sizeof *mats; i++) {
        tw_mat_free(l->b, mats[i]);
    }
    const layer_vector vectors[] = {l->bias, l->da, l->db, l->magnitude, l->norm, l->gain, l->dm};
    for (size_t i = 0; i < sizeof vectors / sizeof *vectors; i++) {
        tw_free(l->b, vectors[i].device);
        free(vectors[i].host);
    }
    free(l->dropped);
    adapter_free(l->b, &l->ad);
    tw_unit_free(l->b, &l->unit);
}

void layer_upload(const layer *l, const layer_vector *v)
{
    tw_ok(l->b, qs_queue_copy(l->b->queue, v->device, v->host, (size_t)v->count * sizeof *v->host));
    tw_ok(l->b, qs_queue_wait(l->b->queue));
}

float *layer_read(const layer *l, const layer_vector *v)
{
    return tw_read(l->b, v->device, (size_t)v->count * sizeof *v->host);
}

/* ---- opening ---- */

void layer_open_unit(const layer *l, const qs_lora *lora, bool decoded)
{
    tw_ok(l->b,
          l->b->ops->unit_open(l->b->queue, &l->unit.view, &l->unit.weight, lora, 1, 0, decoded));
}

/* The unit was open before with another adapter, of the largest rank: its weights stay, of its
 * border nothing may. */
void layer_open(const layer *l)
{
    const layer_case *c = l->c;
    qs_ops_limits limits = ad_limits_of(c->rows, c->out, c->in, c->most_rank, c->dropout > 0.0F);
    limits.dora = l->kind == DORA;
    tw_open(l->b, &limits);
    if (c->opened) {
        adapter other = adapter_make(l->b, c->rows, c->in, c->out, c->most_rank, 0.0F);
        layer_open_unit(l, &other.device, false);
        layer_open_unit(l, &l->ad.device, true);
        adapter_free(l->b, &other);
    }
}

void layer_close(const layer *l)
{
    l->b->ops->unit_close(l->b->queue);
    l->b->ops->close(l->b->queue);
}

/* ---- comparisons ---- */

/* Frees `got` and `limit`. */
static void assert_values(const layer *l, const char *name, float *got, const float *want,
                          double *limit, int64_t count)
{
    char what[240];
    snprintf(what, sizeof what, "%s: %s", l->what, name);
    ad_assert_within(l->b, got, want, limit, count, what);
    if (l->c->rows > 100) {
        tw_assert_norm(l->b, got, want, count, 1e-2, what);
    }
    free(got);
    free(limit);
}

void layer_assert_mat(const layer *l, const char *name, const tw_mat *mat, double *limit)
{
    float *want = ad_compact(&mat->host);
    assert_values(l, name, tw_mat_read(l->b, &mat->device), want, limit,
                  mat->host.rows * mat->host.cols);
    free(want);
}

void layer_assert_vector(const layer *l, const char *name, const layer_vector *v, double *limit)
{
    assert_values(l, name, layer_read(l, v), v->host, limit, v->count);
}

/* ---- limits of LoRA's results ---- */

void layer_check_y(const layer *l, const float *start)
{
    const layer_case *c = l->c;
    const double s = l->ad.host.scale;
    double *limit = ad_limits(c->rows * c->out);
    const ad_factor b = {l->ad.b, 1, c->rank};
    const bool f32 = layer_y_is_f32(c); /* then xa alone is rounded */
    ad_add_products(limit, c->rows, c->out, c->rank, ad_of(&l->xa), b,
                    (f32 ? 1 : ad_part_roundings(start)) * s * AD_HALF_ULP);
    if (f32) {
        ad_add_values(limit, &l->y.host, 1e-6);
    } else {
        ad_add_values(limit, &l->y.host, 2 * AD_HALF_ULP);
        ad_add_rounded_product(limit, &l->y.host, start);
    }
    if (c->bias && !f32) {
        ad_add_rounded_start(limit, start, c->rows * c->out);
    }
    ad_add_products(limit, c->rows, c->out, c->in, ad_of(&l->x),
                    (ad_factor){l->unit.host.plain, 1, c->in}, 1e-6);
    if (c->dropout > 0.0F) { /* drop(x) was rounded: what that does to A drop(x), and B to that */
        double *xa = ad_limits(c->rows * c->rank);
        ad_add_products(xa, c->rows, c->rank, c->in, (ad_factor){l->dropped, c->in, 1},
                        (ad_factor){l->ad.a, 1, c->in}, s * AD_HALF_ULP);
        for (int64_t t = 0; t < c->rows; t++) {
            for (int64_t o = 0; o < c->out; o++) {
                for (int k = 0; k < c->rank; k++) {
                    limit[t * c->out + o] +=
                        xa[t * c->rank + k] * fabs((double)l->ad.b[o * c->rank + k]);
                }
            }
        }
        free(xa);
    }
    layer_assert_mat(l, "y", &l->y, limit);
}

/* da: s dy B and drop(x) were rounded. db: s xa, itself from rounded drop(x). */
void layer_check_gradients(const layer *l)
{
    const layer_case *c = l->c;
    const double s = l->ad.host.scale;
    const ad_factor dropped = {l->dropped, c->in, 1};
    double *a_limit = ad_limits(c->rank * c->in), *b_limit = ad_limits(c->out * c->rank);
    double *xa = ad_limits(c->rows * c->rank);
    float *xa_sizes = ad_zeros(c->rows * c->rank);
    ad_add_products(a_limit, c->rank, c->in, c->rows, ad_transposed(ad_of(&l->work)), dropped,
                    s * AD_HALF_ULP * (c->dropout > 0.0F ? 2 : 1));
    if (c->dropout > 0.0F) {
        ad_add_products(xa, c->rows, c->rank, c->in, dropped, (ad_factor){l->ad.a, 1, c->in}, 1.0);
    }
    for (int64_t t = 0; t < c->rows; t++) {
        for (int k = 0; k < c->rank; k++) {
            const float *kept = qs_mat_f32(&l->xa.host) + t * l->xa.host.stride;
            xa_sizes[t * c->rank + k] = fabsf(kept[k]) + (float)xa[t * c->rank + k];
        }
    }
    ad_add_products(b_limit, c->out, c->rank, c->rows, ad_transposed(ad_of(&l->dy)),
                    (ad_factor){xa_sizes, c->rank, 1}, s * AD_HALF_ULP);
    layer_assert_vector(l, "da", &l->da, a_limit);
    layer_assert_vector(l, "db", &l->db, b_limit);
    free(xa);
    free(xa_sizes);
}

/* ---- DoRA's norms ---- */

void layer_norms(const layer *l, const qs_lora *lora, const void *magnitude)
{
    tw_ok(l->b, l->b->ops->dora_norms(l->b->queue, &l->unit.view, &l->unit.weight, lora, magnitude,
                                      l->norm.device, l->gain.device));
}

static void cpu_norms(const layer *l, const qs_lora *lora, const float *magnitude)
{
    tw_ok(l->b, qs_ops_cpu()->dora_norms(l->b->cpu_queue, &l->unit.host.view, &l->unit.host.weight,
                                         lora, magnitude, l->norm.host, l->gain.host));
}

/* Sums of squares in fp32 that are made in trees: a millionth; and what rounding W changes. */
static void check_rows(const layer *l, const char *name, const layer_vector *v)
{
    double *limit = ad_limits(v->count);
    for (int64_t i = 0; i < v->count; i++) {
        limit[i] = (1e-6 + layer_weight_rounding(l->c)) * fabs((double)v->host[i]);
    }
    layer_assert_vector(l, name, v, limit);
}

void layer_set_gains(layer *l)
{
    const qs_lora none = {0};
    cpu_norms(l, &none, NULL);
    layer_norms(l, &none, NULL);
    check_rows(l, "norm of W", &l->norm);
    for (int64_t i = 0; i < l->c->out; i++) {
        l->magnitude.host[i] = l->norm.host[i] * (1.0F + 0.25F * l->magnitude.host[i]);
    }
    layer_upload(l, &l->magnitude);
    cpu_norms(l, &l->ad.host, l->magnitude.host);
    layer_norms(l, &l->ad.device, l->magnitude.device);
    check_rows(l, "norm", &l->norm);
    check_rows(l, "gain", &l->gain);
    l->ad.host.norm = l->norm.host;
    l->ad.host.gain = l->gain.host;
    l->ad.device.norm = l->norm.device;
    l->ad.device.gain = l->gain.device;
}

/* ---- both passes ---- */

static void ok(const layer *l, qs_status status)
{
    cr_assert_eq(status, QS_OK, "%s on %s: %s", l->what, l->b->name, qs_error_text());
}

static const tw_mat *residual_of(const layer *l)
{
    return layer_residual_is_y(l->c) ? &l->y : &l->residual;
}

void layer_forward(layer *l)
{
    const layer_case *c = l->c;
    ok(l, l->b->ops->linear_lora_forward(
              l->b->queue, &l->unit.view, &l->unit.weight, c->bias ? l->bias.device : NULL,
              c->residual == NO_RESIDUAL ? NULL : &residual_of(l)->device, &l->ad.device,
              &l->x.device, &l->xa.device, &l->y.device));
}

void layer_backward(layer *l)
{
    const layer_case *c = l->c;
    const qs_ops *ops = l->b->ops;
    ok(l, ops->linear_lora_backward(l->b->queue, &l->unit.view, &l->unit.weight, &l->ad.device,
                                    &l->x.device, &l->xa.device, &l->dy.device, &l->work.device,
                                    l->da.device, l->db.device,
                                    c->dx == NO_DX ? NULL : &l->dx.device, c->dx == DX_ADD));
    if (l->kind == DORA) {
        ok(l, ops->dora_backward(l->b->queue, &l->unit.view, &l->unit.weight, &l->ad.device,
                                 &l->x.device, &l->xa.device, &l->dy.device, l->dm.device));
    }
}

static void run_cpu(layer *l)
{
    const layer_case *c = l->c;
    const qs_ops *ops = qs_ops_cpu();
    const qs_unit_view *view = &l->unit.host.view;
    const qs_weight *w = &l->unit.host.weight;
    qs_queue *q = l->b->cpu_queue;
    ok(l, ops->linear_lora_forward(q, view, w, c->bias ? l->bias.host : NULL,
                                   c->residual == NO_RESIDUAL ? NULL : &residual_of(l)->host,
                                   &l->ad.host, &l->x.host, &l->xa.host, &l->y.host));
    ok(l, ops->linear_lora_backward(q, view, w, &l->ad.host, &l->x.host, &l->xa.host, &l->dy.host,
                                    &l->work.host, l->da.host, l->db.host,
                                    c->dx == NO_DX ? NULL : &l->dx.host, c->dx == DX_ADD));
    if (l->kind == DORA) {
        ok(l, ops->dora_backward(q, view, w, &l->ad.host, &l->x.host, &l->xa.host, &l->dy.host,
                                 l->dm.host));
    }
}

/* Everything that a run gave, in one piece, to compare two runs bit by bit. */
static float *results_of(const layer *l, size_t *bytes)
{
    const tw_mat *const mats[] = {&l->y, &l->xa, &l->dx};
    const layer_vector *const vectors[] = {&l->da, &l->db, &l->dm};
    int64_t count = 0, at = 0;
    for (int i = 0; i < 3; i++) {
        count += mats[i]->host.rows * mats[i]->host.cols + vectors[i]->count;
    }
    float *all = ad_zeros(count);
    for (int i = 0; i < 6; i++) {
        const int64_t here =
            i < 3 ? mats[i]->host.rows * mats[i]->host.cols : vectors[i - 3]->count;
        float *part = i < 3 ? tw_mat_read(l->b, &mats[i]->device) : layer_read(l, vectors[i - 3]);
        memcpy(all + at, part, (size_t)here * sizeof *all);
        at += here;
        free(part);
    }
    *bytes = (size_t)count * sizeof *all;
    return all;
}

/* An input as it was, and so is what lies behind its border. DoRA uses no border of dy's: that is
 * the next linear's, too. */
static void check_input(const layer *l, const char *name, const tw_mat *mat, bool may_border)
{
    qs_mat all = mat->device;
    all.cols = all.stride;
    float *got = tw_mat_read(l->b, &all);
    const int64_t cols = mat->host.cols;
    const int64_t behind = cols + (may_border ? l->b->ops->border(l->c->most_rank) : 0);
    for (int64_t t = 0; t < all.rows; t++) {
        const float *row = got + t * all.stride, *host = qs_mat_f32(&mat->host) + t * all.stride;
        cr_assert_arr_eq(row, host, (size_t)cols * sizeof *row, "%s on %s: %s was changed", l->what,
                         l->b->name, name);
        for (int64_t i = behind; i < all.stride; i++) {
            cr_assert(isnan(row[i]), "%s on %s: column %lld of %s was written", l->what, l->b->name,
                      (long long)i, name);
        }
    }
    free(got);
}

static void check_untouched(const layer *l)
{
    check_input(l, "x", &l->x, l->c->x_pad == BORDER);
    check_input(l, "dy", &l->dy, l->c->dy_pad == BORDER && l->kind == LORA);
    check_input(l, "residual", &l->residual, false);
    cr_assert(tw_gap_intact(l->b, &l->y.device) && tw_gap_intact(l->b, &l->xa.device) &&
                  tw_gap_intact(l->b, &l->dx.device),
              "%s on %s: a gap was written", l->what, l->b->name);
}

void layer_run(layer *l)
{
    size_t bytes;
    layer_forward(l);
    layer_backward(l);
    float *first = results_of(l, &bytes);
    /* Again, from the same y and dx. */
    ad_upload_again(l->b, &l->y);
    ad_upload_again(l->b, &l->dx);
    layer_forward(l);
    layer_backward(l);
    float *second = results_of(l, &bytes);
    cr_assert_arr_eq(first, second, bytes, "%s on %s: other bits in a second run", l->what,
                     l->b->name);
    check_untouched(l);
    run_cpu(l);
    free(first);
    free(second);
}

void layer_check_empty(layer *l)
{
    tw_mat *const mats[] = {&l->x, &l->y, &l->residual, &l->xa, &l->dy, &l->work, &l->dx};
    for (size_t i = 0; i < sizeof mats / sizeof *mats; i++) {
        mats[i]->device.rows = 0;
    }
    layer_forward(l);
    layer_backward(l);
    const layer_vector *const vectors[] = {&l->da, &l->db, &l->dm};
    for (int v = 0; v < 3; v++) {
        float *got = layer_read(l, vectors[v]);
        for (int64_t i = 0; i < vectors[v]->count; i++) {
            cr_assert_eq(got[i], 0.0F, "%s: gradient %d", l->b->name, v);
        }
        free(got);
    }
}
