/* Linears, with and without what a layer adds to them. The way an operation takes (bordered or
 * plain, opened or not) must not show: all meet the same limits, which are what rounding to bf16
 * can change on the longest way. A result is rounded once, and once more where the adapter is a
 * product of its own; so is a product to which something is added (ad_add_rounded_product), bias +
 * residual, each xa, each s dy B and, with dropout, each drop(x). Sums are fp32 on both sides. */
#include <criterion/criterion.h>
#include <stdio.h>

#include "adapter.h"

/* ---- the frozen linear ---- */

typedef struct {
    int64_t rows, out, in, pad;
    bool bias, f32, opened;
} frozen_case;

static tw_unit unit_of(const tw_backend *b, int64_t out, int64_t in)
{
    const fx_weight_spec spec = {
        .kind = QS_WEIGHT_NF4, .out = out, .in = in, .dtype = QS_BF16, .nested = true, .nranks = 2};
    return tw_unit_make(b, &spec, 21);
}

/* The CPU's operation on the host's copy; b's on the device's. Twice: the same bits. */
static void check_forward(const tw_backend *b, const frozen_case *c, const tw_unit *unit)
{
    float *bias = fx_random(c->out, 22);
    void *bias_device = tw_upload(b, bias, (size_t)c->out * sizeof *bias);
    tw_mat x = tw_mat_make(b, c->rows, c->in, c->pad, 1.0F, 23);
    tw_mat y =
        tw_mat_make_as(b, c->f32 ? QS_F32 : b->ops->act_dtype, c->rows, c->out, c->pad, 1.0F, 24);
    float *got[2];
    for (int i = 0; i < 2; i++) {
        cr_assert_eq(b->ops->linear_forward(b->queue, &unit->view, &unit->weight,
                                            c->bias ? bias_device : NULL, &x.device, &y.device),
                     QS_OK, "%s: %s", b->name, qs_error_text());
        got[i] = tw_mat_read(b, &y.device);
    }
    cr_assert(tw_gap_intact(b, &y.device) && tw_gap_intact(b, &x.device));
    cr_assert_eq(qs_ops_cpu()->linear_forward(b->cpu_queue, &unit->host.view, &unit->host.weight,
                                              c->bias ? bias : NULL, &x.host, &y.host),
                 QS_OK);
    float *want = ad_compact(&y.host), *start = c->bias ? ad_zeros(c->rows * c->out) : NULL;
    double *limit = ad_limits(c->rows * c->out);
    for (int64_t i = 0; c->bias && i < c->rows * c->out; i++) {
        start[i] = bias[i % c->out];
    }
    /* fp32 out: no rounding but the sum's, 1e-6 of its terms. */
    ad_add_products(limit, c->rows, c->out, c->in, (ad_factor){x.host.data, x.host.stride, 1},
                    (ad_factor){unit->host.plain, 1, c->in}, 1e-6);
    if (!c->f32) {
        ad_add_values(limit, &y.host, AD_HALF_ULP);
        ad_add_rounded_start(limit, start, c->rows * c->out);
        ad_add_rounded_product(limit, &y.host, start);
    }
    ad_assert_within(b, got[0], want, limit, c->rows * c->out, "y");
    cr_assert_arr_eq(got[0], got[1], (size_t)(c->rows * c->out) * sizeof **got, "same bits twice");
    free(limit);
    free(want);
    free(start);
    free(got[0]);
    free(got[1]);
    tw_mat_free(b, &x);
    tw_mat_free(b, &y);
    tw_free(b, bias_device);
    free(bias);
}

static void check_backward(const tw_backend *b, const frozen_case *c, const tw_unit *unit,
                           bool accumulate)
{
    tw_mat dy = tw_mat_make(b, c->rows, c->out, c->pad, 1.0F, 25);
    tw_mat dx = tw_mat_make(b, c->rows, c->in, c->pad, 1.0F, 26);
    cr_assert_eq(b->ops->linear_backward(b->queue, &unit->view, &unit->weight, &dy.device,
                                         &dx.device, accumulate),
                 QS_OK, "%s: %s", b->name, qs_error_text());
    float *got = tw_mat_read(b, &dx.device), *start = accumulate ? ad_compact(&dx.host) : NULL;
    cr_assert(tw_gap_intact(b, &dx.device) && tw_gap_intact(b, &dy.device));
    cr_assert_eq(qs_ops_cpu()->linear_backward(b->cpu_queue, &unit->host.view, &unit->host.weight,
                                               &dy.host, &dx.host, accumulate),
                 QS_OK);
    float *want = ad_compact(&dx.host);
    double *limit = ad_limits(c->rows * c->in);
    ad_add_values(limit, &dx.host, AD_HALF_ULP);
    ad_add_rounded_product(limit, &dx.host, start);
    ad_add_products(limit, c->rows, c->in, c->out, (ad_factor){dy.host.data, dy.host.stride, 1},
                    (ad_factor){unit->host.plain, c->in, 1}, 1e-6);
    ad_assert_within(b, got, want, limit, c->rows * c->in, "dx");
    free(limit);
    free(want);
    free(start);
    free(got);
    tw_mat_free(b, &dy);
    tw_mat_free(b, &dx);
}

static void check_frozen(const tw_backend *b, const frozen_case *c)
{
    tw_unit unit = unit_of(b, c->out, c->in);
    const qs_ops_limits limits = ad_limits_of(c->rows, c->out, c->in, 8, false);
    const qs_lora none = {0};
    tw_open(b, &limits);
    if (c->opened) {
        cr_assert_eq(b->ops->unit_open(b->queue, &unit.view, &unit.weight, &none, 1), QS_OK);
    }
    check_forward(b, c, &unit);
    check_backward(b, c, &unit, false);
    check_backward(b, c, &unit, true);
    b->ops->unit_close(b->queue);
    b->ops->close(b->queue);
    tw_unit_free(b, &unit);
}

Test(twin_linear, frozen)
{
    static const frozen_case cases[] = {
        {1, 1, 1, 0, false, false, false},   {1, 64, 64, 0, true, false, true},
        {17, 40, 333, 3, true, false, true}, {17, 40, 333, 0, false, true, false},
        {33, 72, 128, 8, true, true, true},  {33, 72, 128, 8, false, false, false},
        {5, 130, 200, 16, true, false, true}};
    tw_backend backends[TW_BACKENDS_MAX];
    const int count = tw_backends(backends);
    for (int i = 0; i < count; i++) {
        for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
            check_frozen(&backends[i], &cases[c]);
        }
    }
    tw_backends_close(backends, count);
}

/* ---- a layer's linear ---- */

typedef enum { NO_RESIDUAL, RESIDUAL, RESIDUAL_IS_Y } residual_kind;
typedef enum { NO_DX, DX, DX_ADD } dx_kind;

typedef struct {
    int64_t rows, out, in;
    int rank, most_rank; /* of this linear; of the largest one */
    float dropout;
    bool opened, x_border, dy_border; /* room behind x and dy */
    bool bias;
    residual_kind residual;
    dx_kind dx;
} layer_case;

typedef struct {
    const tw_backend *b;
    const layer_case *c;
    char what[160];
    tw_unit unit;
    adapter ad;
    float *bias;
    void *bias_device;
    tw_mat x, y, residual, xa, dy, work, dx;
    void *da, *db;
    float *da_host, *db_host;
    float *dropped;
} layer;

enum { BEYOND = 8, TOO_FEW = 3 }; /* columns behind the border, which nobody may touch; no border */

static int64_t pad_of(const layer *l, bool border)
{
    return border ? l->b->ops->border(l->c->most_rank) + BEYOND : TOO_FEW;
}

static layer layer_make(const tw_backend *b, const layer_case *c)
{
    layer l = {.b = b, .c = c, .unit = unit_of(b, c->out, c->in)};
    snprintf(
        l.what, sizeof l.what,
        "T %lld out %lld in %lld rank %d of %d p %g opened %d borders %d %d bias %d residual %d "
        "dx %d",
        (long long)c->rows, (long long)c->out, (long long)c->in, c->rank, c->most_rank,
        (double)c->dropout, c->opened, c->x_border, c->dy_border, c->bias, c->residual, c->dx);
    l.ad = adapter_make(b, c->rows, c->in, c->out, c->rank, c->dropout);
    l.bias = fx_random(c->out, 41);
    l.bias_device = tw_upload(b, l.bias, (size_t)c->out * sizeof *l.bias);
    l.x = tw_mat_make(b, c->rows, c->in, pad_of(&l, c->x_border), 1.0F, 42);
    l.y = tw_mat_make(b, c->rows, c->out, 8, 1.0F, 43);
    l.residual = tw_mat_make(b, c->rows, c->out, 16, 1.0F, 44);
    l.xa = tw_mat_make(b, c->rows, c->rank, 3, 1.0F, 45);
    l.dy = tw_mat_make(b, c->rows, c->out, pad_of(&l, c->dy_border), 1.0F, 46);
    l.work = tw_mat_make(b, c->rows, c->rank, 0, 1.0F, 47);
    l.dx = tw_mat_make(b, c->rows, c->in, 8, 1.0F, 48);
    l.da_host = fx_random(c->rank * c->in, 49);
    l.db_host = fx_random(c->out * c->rank, 50);
    l.da = tw_upload(b, l.da_host, (size_t)(c->rank * c->in) * sizeof(float));
    l.db = tw_upload(b, l.db_host, (size_t)(c->out * c->rank) * sizeof(float));
    l.dropped = adapter_dropped(&l.ad, &l.x.host);
    return l;
}

static void layer_free(layer *l)
{
    tw_mat *const mats[] = {&l->x, &l->y, &l->residual, &l->xa, &l->dy, &l->work, &l->dx};
    for (size_t i = 0; i < sizeof mats / sizeof *mats; i++) {
        tw_mat_free(l->b, mats[i]);
    }
    tw_free(l->b, l->da);
    tw_free(l->b, l->db);
    tw_free(l->b, l->bias_device);
    free(l->da_host);
    free(l->db_host);
    free(l->dropped);
    free(l->bias);
    adapter_free(l->b, &l->ad);
    tw_unit_free(l->b, &l->unit);
}

static void run_forward(layer *l)
{
    const layer_case *c = l->c;
    const tw_backend *b = l->b;
    const qs_mat *from = c->residual == RESIDUAL        ? &l->residual.device
                         : c->residual == RESIDUAL_IS_Y ? &l->y.device
                                                        : NULL;
    cr_assert_eq(b->ops->linear_lora_forward(b->queue, &l->unit.view, &l->unit.weight,
                                             c->bias ? l->bias_device : NULL, from, &l->ad.device,
                                             &l->x.device, &l->xa.device, &l->y.device),
                 QS_OK, "%s on %s: %s", l->what, b->name, qs_error_text());
}

static void run_backward(layer *l)
{
    const layer_case *c = l->c;
    const tw_backend *b = l->b;
    cr_assert_eq(b->ops->linear_lora_backward(
                     b->queue, &l->unit.view, &l->unit.weight, &l->ad.device, &l->x.device,
                     &l->xa.device, &l->dy.device, &l->work.device, l->da, l->db,
                     c->dx == NO_DX ? NULL : &l->dx.device, c->dx == DX_ADD),
                 QS_OK, "%s on %s: %s", l->what, b->name, qs_error_text());
}

/* The twin. Afterwards the host's xa is s A drop(x), for the limits. */
static void run_cpu(layer *l)
{
    const layer_case *c = l->c;
    const qs_ops *ops = qs_ops_cpu();
    qs_queue *q = l->b->cpu_queue;
    const qs_mat *from = c->residual == RESIDUAL        ? &l->residual.host
                         : c->residual == RESIDUAL_IS_Y ? &l->y.host
                                                        : NULL;
    cr_assert_eq(ops->linear_lora_forward(q, &l->unit.host.view, &l->unit.host.weight,
                                          c->bias ? l->bias : NULL, from, &l->ad.host, &l->x.host,
                                          &l->xa.host, &l->y.host),
                 QS_OK);
    cr_assert_eq(ops->linear_lora_backward(q, &l->unit.host.view, &l->unit.host.weight, &l->ad.host,
                                           &l->x.host, &l->xa.host, &l->dy.host, &l->work.host,
                                           l->da_host, l->db_host,
                                           c->dx == NO_DX ? NULL : &l->dx.host, c->dx == DX_ADD),
                 QS_OK);
}

static ad_factor factor(const tw_mat *mat)
{
    return (ad_factor){mat->host.data, mat->host.stride, 1};
}

static ad_factor transposed(ad_factor f)
{
    return (ad_factor){f.data, f.col, f.row};
}

static void assert_mat(const layer *l, const char *name, const tw_mat *mat, const double *limit)
{
    char what[200];
    float *got = tw_mat_read(l->b, &mat->device);
    float *want = ad_compact(&mat->host);
    snprintf(what, sizeof what, "%s: %s", l->what, name);
    ad_assert_within(l->b, got, want, limit, mat->host.rows * mat->host.cols, what);
    free(got);
    free(want);
}

/* What the product is added to, before y is overwritten: bias + residual; NULL without either. */
static float *start_of_y(const layer *l)
{
    const layer_case *c = l->c;
    float *start = c->residual == RESIDUAL        ? ad_compact(&l->residual.host)
                   : c->residual == RESIDUAL_IS_Y ? ad_compact(&l->y.host)
                   : c->bias                      ? ad_zeros(c->rows * c->out)
                                                  : NULL;
    for (int64_t i = 0; c->bias && i < c->rows * c->out; i++) {
        start[i] += l->bias[i % c->out];
    }
    return start;
}

/* Roundings that the size of the adapter's part adds to, on the longest way: of xa (or s dy B), of
 * the part as a product of its own, of the sum that it is added to and, with a start, of the frozen
 * product in that sum. */
static int adapter_roundings(const float *start)
{
    return start != NULL ? 4 : 3;
}

static void check_y(const layer *l, const float *start)
{
    const layer_case *c = l->c;
    const double s = l->ad.host.scale;
    double *limit = ad_limits(c->rows * c->out);
    const ad_factor b = {l->ad.b, 1, c->rank};
    ad_add_values(limit, &l->y.host, 2 * AD_HALF_ULP);
    ad_add_rounded_product(limit, &l->y.host, start);
    ad_add_products(limit, c->rows, c->out, c->rank, factor(&l->xa), b,
                    adapter_roundings(start) * s * AD_HALF_ULP);
    if (c->bias) {
        ad_add_rounded_start(limit, start, c->rows * c->out);
    }
    ad_add_products(limit, c->rows, c->out, c->in, factor(&l->x),
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
    assert_mat(l, "y", &l->y, limit);
    free(limit);
}

static void check_dx(const layer *l, const float *start)
{
    const layer_case *c = l->c;
    const double s = l->ad.host.scale / (1.0 - (double)l->ad.host.dropout);
    double *limit = ad_limits(c->rows * c->in);
    ad_add_values(limit, &l->dx.host, 2 * AD_HALF_ULP);
    ad_add_rounded_product(limit, &l->dx.host, start);
    ad_add_products(limit, c->rows, c->in, c->rank, factor(&l->work),
                    (ad_factor){l->ad.a, c->in, 1}, adapter_roundings(start) * s * AD_HALF_ULP);
    ad_add_products(limit, c->rows, c->in, c->out, factor(&l->dy),
                    (ad_factor){l->unit.host.plain, c->in, 1}, 1e-6);
    assert_mat(l, "dx", &l->dx, limit);
    free(limit);
}

/* da: s dy B and drop(x) were rounded. db: s xa, itself from rounded drop(x). */
static void check_gradients(const layer *l)
{
    const layer_case *c = l->c;
    const double s = l->ad.host.scale;
    const ad_factor dropped = {l->dropped, c->in, 1};
    double *a_limit = ad_limits(c->rank * c->in), *b_limit = ad_limits(c->out * c->rank);
    double *xa = ad_limits(c->rows * c->rank);
    float *xa_sizes = calloc((size_t)(c->rows * c->rank) + 1, sizeof *xa_sizes);
    cr_assert_not_null(xa_sizes);
    ad_add_products(a_limit, c->rank, c->in, c->rows, transposed(factor(&l->work)), dropped,
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
    ad_add_products(b_limit, c->out, c->rank, c->rows, transposed(factor(&l->dy)),
                    (ad_factor){xa_sizes, c->rank, 1}, s * AD_HALF_ULP);
    float *da = tw_read(l->b, l->da, (size_t)(c->rank * c->in) * sizeof *da);
    float *db = tw_read(l->b, l->db, (size_t)(c->out * c->rank) * sizeof *db);
    char what[200];
    snprintf(what, sizeof what, "%s: da", l->what);
    ad_assert_within(l->b, da, l->da_host, a_limit, c->rank * c->in, what);
    snprintf(what, sizeof what, "%s: db", l->what);
    ad_assert_within(l->b, db, l->db_host, b_limit, c->out * c->rank, what);
    free(da);
    free(db);
    free(a_limit);
    free(b_limit);
    free(xa);
    free(xa_sizes);
}

/* x and dy as they were, and so is what lies behind their borders. */
static void check_untouched(const layer *l, const tw_mat *mat, bool border, const char *name)
{
    qs_mat all = mat->device;
    all.cols = all.stride;
    float *got = tw_mat_read(l->b, &all);
    const int64_t cols = mat->host.cols;
    const int64_t behind = cols + (border ? l->b->ops->border(l->c->most_rank) : 0);
    for (int64_t t = 0; t < all.rows; t++) {
        const float *row = got + t * all.stride, *host = qs_mat_f32(&mat->host) + t * all.stride;
        cr_assert_arr_eq(row, host, (size_t)cols * sizeof *row, "%s: %s was changed", l->what,
                         name);
        for (int64_t i = behind; i < all.stride; i++) {
            cr_assert(isnan(row[i]), "%s: column %lld of %s was written", l->what, (long long)i,
                      name);
        }
    }
    free(got);
}

/* Everything that a pass gave, in one piece, to compare two passes bit by bit. */
static float *results_of(const layer *l, size_t *bytes)
{
    const tw_mat *const mats[] = {&l->y, &l->xa, &l->dx};
    const layer_case *c = l->c;
    const int64_t counts[] = {c->rows * c->out, c->rows * c->rank, c->rows * c->in, c->rank * c->in,
                              c->out * c->rank};
    float *all = malloc((size_t)(counts[0] + counts[1] + counts[2] + counts[3] + counts[4] + 1) *
                        sizeof *all);
    cr_assert_not_null(all);
    int64_t at = 0;
    for (int i = 0; i < 5; i++) {
        float *part = i < 3
                          ? tw_mat_read(l->b, &mats[i]->device)
                          : tw_read(l->b, i == 3 ? l->da : l->db, (size_t)counts[i] * sizeof *part);
        memcpy(all + at, part, (size_t)counts[i] * sizeof *all);
        at += counts[i];
        free(part);
    }
    *bytes = (size_t)at * sizeof *all;
    return all;
}

static void open_unit(const layer *l, const adapter *ad)
{
    cr_assert_eq(l->b->ops->unit_open(l->b->queue, &l->unit.view, &l->unit.weight, &ad->device, 1),
                 QS_OK, "%s: %s", l->b->name, qs_error_text());
}

/* Another unit, with the largest rank, was open before: nothing of its border may stay. */
static void open_layer(layer *l)
{
    const layer_case *c = l->c;
    const qs_ops_limits limits =
        ad_limits_of(c->rows, c->out, c->in, c->most_rank, c->dropout > 0.0F);
    tw_open(l->b, &limits);
    if (c->opened) {
        adapter other = adapter_make(l->b, c->rows, c->in, c->out, c->most_rank, 0.0F);
        open_unit(l, &other);
        open_unit(l, &l->ad);
        adapter_free(l->b, &other);
    }
}

static void check_layer(const tw_backend *b, const layer_case *c)
{
    layer l = layer_make(b, c);
    float *y_start = start_of_y(&l), *dx_start = c->dx == DX_ADD ? ad_compact(&l.dx.host) : NULL;
    size_t bytes;
    open_layer(&l);
    run_forward(&l);
    run_backward(&l);
    float *first = results_of(&l, &bytes);
    /* Again, from the same y and dx. */
    ad_upload_again(b, &l.y);
    ad_upload_again(b, &l.dx);
    run_forward(&l);
    run_backward(&l);
    float *second = results_of(&l, &bytes);
    cr_assert_arr_eq(first, second, bytes, "%s on %s: other bits in a second run", l.what, b->name);
    check_untouched(&l, &l.x, c->x_border, "x");
    check_untouched(&l, &l.dy, c->dy_border, "dy");
    cr_assert(tw_gap_intact(b, &l.y.device) && tw_gap_intact(b, &l.xa.device) &&
              tw_gap_intact(b, &l.dx.device));
    run_cpu(&l);
    check_y(&l, y_start);
    check_gradients(&l);
    if (c->dx != NO_DX) {
        check_dx(&l, dx_start);
    }
    b->ops->unit_close(b->queue);
    b->ops->close(b->queue);
    free(first);
    free(second);
    free(y_start);
    free(dx_start);
    layer_free(&l);
}

static void check_layers(const layer_case *cases, size_t count)
{
    tw_backend backends[TW_BACKENDS_MAX];
    const int n = tw_backends(backends);
    for (int i = 0; i < n; i++) {
        for (size_t c = 0; c < count; c++) {
            check_layer(&backends[i], &cases[c]);
        }
    }
    tw_backends_close(backends, n);
}

#define CHECK_LAYERS(cases) check_layers((cases), sizeof(cases) / sizeof *(cases))

/* Room behind both, behind one, behind none; opened and not. */
Test(twin_linear, every_way_gives_the_same)
{
    static const layer_case cases[] = {
        {21, 72, 88, 8, 8, 0.0F, true, true, true, false, NO_RESIDUAL, DX},
        {21, 72, 88, 8, 8, 0.0F, true, true, false, false, NO_RESIDUAL, DX},
        {21, 72, 88, 8, 8, 0.0F, true, false, true, false, NO_RESIDUAL, DX},
        {21, 72, 88, 8, 8, 0.0F, true, false, false, false, NO_RESIDUAL, DX},
        {21, 72, 88, 8, 8, 0.0F, false, true, true, false, NO_RESIDUAL, DX},
    };
    CHECK_LAYERS(cases);
}

/* Ranks that are, and are not, whole pieces; smaller than the border; rows from one on; widths that
 * are no multiples of 8, where borders cannot be used. */
Test(twin_linear, shapes)
{
    static const layer_case cases[] = {
        {1, 8, 8, 1, 1, 0.0F, true, true, true, false, NO_RESIDUAL, DX},
        {17, 64, 128, 13, 13, 0.0F, true, true, true, false, NO_RESIDUAL, DX_ADD},
        {17, 64, 128, 13, 30, 0.0F, true, true, true, false, NO_RESIDUAL, DX},
        {19, 136, 72, 64, 64, 0.0F, true, true, true, false, NO_RESIDUAL, DX_ADD},
        {19, 136, 72, 1, 64, 0.0F, true, true, true, false, NO_RESIDUAL, DX},
        {9, 45, 333, 5, 5, 0.0F, true, true, true, false, RESIDUAL, DX},
        {9, 64, 333, 13, 13, 0.0F, true, true, true, true, RESIDUAL, DX_ADD},
        {9, 45, 64, 8, 8, 0.0F, true, true, true, true, RESIDUAL_IS_Y, DX},
        {30, 200, 104, 16, 16, 0.0F, true, true, true, false, NO_RESIDUAL, NO_DX},
        {30, 200, 104, 16, 16, 0.0F, false, false, false, false, NO_RESIDUAL, NO_DX},
    };
    CHECK_LAYERS(cases);
}

Test(twin_linear, bias_and_residual)
{
    static const layer_case cases[] = {
        {13, 40, 48, 4, 4, 0.0F, true, true, true, true, NO_RESIDUAL, DX},
        {13, 40, 48, 4, 4, 0.0F, true, true, true, false, RESIDUAL, DX_ADD},
        {13, 40, 48, 4, 4, 0.0F, true, true, true, true, RESIDUAL, DX},
        {13, 40, 48, 4, 4, 0.0F, true, true, true, false, RESIDUAL_IS_Y, DX_ADD},
        {13, 40, 48, 4, 4, 0.0F, true, true, true, true, RESIDUAL_IS_Y, DX},
        {13, 40, 48, 4, 4, 0.0F, true, false, false, true, RESIDUAL, DX_ADD},
        {13, 40, 48, 4, 4, 0.0F, false, false, false, true, RESIDUAL_IS_Y, DX_ADD},
        {300, 16, 16, 4, 4, 0.0F, true, true, true, true, RESIDUAL_IS_Y, DX},
    };
    CHECK_LAYERS(cases);
}

Test(twin_linear, dropout)
{
    static const layer_case cases[] = {
        {23, 72, 88, 8, 8, 0.3F, true, true, true, false, NO_RESIDUAL, DX},
        {23, 72, 88, 8, 8, 0.3F, true, false, false, false, NO_RESIDUAL, DX_ADD},
        {23, 72, 88, 13, 16, 0.3F, true, true, true, true, RESIDUAL_IS_Y, DX_ADD},
        {23, 45, 333, 5, 5, 0.1F, true, true, true, false, RESIDUAL, DX},
        {23, 72, 88, 8, 8, 0.3F, false, true, true, true, RESIDUAL, DX},
        {23, 72, 88, 8, 8, 0.3F, true, true, true, false, NO_RESIDUAL, NO_DX},
        {1, 72, 88, 8, 8, 0.5F, true, true, true, false, NO_RESIDUAL, DX},
        {300, 16, 24, 4, 4, 0.5F, true, true, true, true, RESIDUAL_IS_Y, DX},
    };
    CHECK_LAYERS(cases);
}

/* ---- a unit of several linears: every one meets its own adapter, and one has none ---- */

enum { SEVERAL = 4 };

typedef struct {
    qs_weight host[SEVERAL], device[SEVERAL];
    adapter ad[SEVERAL];
    qs_lora lora[SEVERAL];
} several;

/* Tensors of their own shapes out of the quanta of one. */
static several several_make(const tw_backend *b, const tw_unit *unit, int64_t rows,
                            qs_ops_limits *limits)
{
    static const struct {
        int64_t quantum, out, in;
        int rank;
    } linears[SEVERAL] = {{1, 40, 56, 8}, {0, 24, 56, 0}, {2, 72, 40, 3}, {3, 21, 64, 13}};
    several s;
    limits->n_linears = SEVERAL;
    for (int i = 0; i < SEVERAL; i++) {
        s.host[i] = unit->host.weight;
        s.host[i].quantum = linears[i].quantum;
        s.host[i].out = limits->out[i] = linears[i].out;
        s.host[i].in = limits->in[i] = linears[i].in;
        s.device[i] = s.host[i];
        s.device[i].map = unit->weight.map;
        const int rank = linears[i].rank;
        s.ad[i] = adapter_make(b, rows, linears[i].in, linears[i].out, rank > 0 ? rank : 1, 0.0F);
        s.lora[i] = rank > 0 ? s.ad[i].device : (qs_lora){0};
        s.ad[i].host = rank > 0 ? s.ad[i].host : (qs_lora){0};
    }
    return s;
}

static void check_one_of(const tw_backend *b, const tw_unit *unit, several *s, int i, int64_t rows)
{
    const qs_weight *w = &s->host[i];
    const int64_t pad = b->ops->border(13), rank = s->ad[i].device.rank;
    tw_mat x = tw_mat_make(b, rows, w->in, pad, 1.0F, 71),
           y = tw_mat_make(b, rows, w->out, 0, 1, 72);
    tw_mat xa = tw_mat_make(b, rows, rank, 0, 1.0F, 73);
    cr_assert_eq(b->ops->linear_lora_forward(b->queue, &unit->view, &s->device[i], NULL, NULL,
                                             &s->lora[i], &x.device, &xa.device, &y.device),
                 QS_OK, "%s", qs_error_text());
    cr_assert_eq(qs_ops_cpu()->linear_lora_forward(b->cpu_queue, &unit->host.view, w, NULL, NULL,
                                                   &s->ad[i].host, &x.host, &xa.host, &y.host),
                 QS_OK);
    float *got = tw_mat_read(b, &y.device);
    double *limit = ad_limits(rows * w->out);
    ad_add_values(limit, &y.host, AD_HALF_ULP);
    if (s->ad[i].host.a != NULL) { /* as in check_y */
        ad_add_values(limit, &y.host, AD_HALF_ULP);
        ad_add_products(limit, rows, w->out, rank, factor(&xa), (ad_factor){s->ad[i].b, 1, rank},
                        adapter_roundings(NULL) * (double)s->ad[i].host.scale * AD_HALF_ULP);
    }
    for (int64_t e = 0; e < rows * w->out; e++) {
        limit[e] += 1e-5;
    }
    ad_assert_within(b, got, qs_mat_f32(&y.host), limit, rows * w->out, "y of several");
    free(limit);
    free(got);
    tw_mat_free(b, &x);
    tw_mat_free(b, &y);
    tw_mat_free(b, &xa);
}

static void check_several(const tw_backend *b)
{
    const int64_t rows = 12;
    tw_unit unit = unit_of(b, 200, 240); /* three quanta between two of others */
    qs_ops_limits limits = ad_limits_of(rows, 8, 8, 13, false);
    several s = several_make(b, &unit, rows, &limits);
    tw_open(b, &limits);
    cr_assert_eq(b->ops->unit_open(b->queue, &unit.view, s.device, s.lora, SEVERAL), QS_OK, "%s",
                 qs_error_text());
    for (int i = SEVERAL - 1; i >= 0; i--) {
        check_one_of(b, &unit, &s, i, rows);
    }
    b->ops->unit_close(b->queue);
    for (int i = 0; i < SEVERAL; i++) { /* decoded call by call, the same */
        check_one_of(b, &unit, &s, i, rows);
        adapter_free(b, &s.ad[i]);
    }
    b->ops->close(b->queue);
    tw_unit_free(b, &unit);
}

Test(twin_linear, several_in_a_unit)
{
    tw_backend backends[TW_BACKENDS_MAX];
    const int count = tw_backends(backends);
    for (int i = 0; i < count; i++) {
        check_several(&backends[i]);
    }
    tw_backends_close(backends, count);
}

/* `want` is contiguous and a product added to `start`. */
static void assert_added(const tw_backend *b, const float *got, const qs_mat *want,
                         const float *start, const char *what)
{
    const int64_t count = want->rows * want->cols;
    double *limit = ad_limits(count);
    ad_add_values(limit, want, AD_HALF_ULP);
    ad_add_rounded_product(limit, want, start);
    for (int64_t i = 0; i < count; i++) {
        limit[i] += 1e-5;
    }
    ad_assert_within(b, got, qs_mat_f32(want), limit, count, what);
    free(limit);
}

/* Without an adapter: the frozen product alone; the other linears' borders are not looked at. */
static void check_bare(const tw_backend *b)
{
    const int64_t rows = 11, out = 40, in = 56;
    tw_unit unit = unit_of(b, out, in);
    const qs_ops_limits limits = ad_limits_of(rows, out, in, 8, false);
    const qs_lora none = {0};
    tw_mat x = tw_mat_make(b, rows, in, 8, 1.0F, 61), y = tw_mat_make(b, rows, out, 0, 1.0F, 62);
    tw_mat dy = tw_mat_make(b, rows, out, 8, 1.0F, 63), dx = tw_mat_make(b, rows, in, 0, 1.0F, 64);
    float *y_start = ad_compact(&y.host), *dx_start = ad_compact(&dx.host);
    tw_open(b, &limits);
    cr_assert_eq(b->ops->unit_open(b->queue, &unit.view, &unit.weight, &none, 1), QS_OK);
    cr_assert_eq(b->ops->linear_lora_forward(b->queue, &unit.view, &unit.weight, NULL, &y.device,
                                             &none, &x.device, NULL, &y.device),
                 QS_OK, "%s", qs_error_text());
    cr_assert_eq(b->ops->linear_lora_backward(b->queue, &unit.view, &unit.weight, &none, &x.device,
                                              NULL, &dy.device, NULL, NULL, NULL, &dx.device, true),
                 QS_OK, "%s", qs_error_text());
    cr_assert_eq(b->ops->linear_lora_backward(b->queue, &unit.view, &unit.weight, &none, &x.device,
                                              NULL, &dy.device, NULL, NULL, NULL, NULL, false),
                 QS_OK, "%s", qs_error_text());
    cr_assert(tw_gap_intact(b, &x.device) && tw_gap_intact(b, &dy.device));
    float *got_y = tw_mat_read(b, &y.device), *got_dx = tw_mat_read(b, &dx.device);
    const qs_ops *ops = qs_ops_cpu();
    cr_assert_eq(ops->linear_lora_forward(b->cpu_queue, &unit.host.view, &unit.host.weight, NULL,
                                          &y.host, &none, &x.host, NULL, &y.host),
                 QS_OK);
    cr_assert_eq(ops->linear_lora_backward(b->cpu_queue, &unit.host.view, &unit.host.weight, &none,
                                           &x.host, NULL, &dy.host, NULL, NULL, NULL, &dx.host,
                                           true),
                 QS_OK);
    assert_added(b, got_y, &y.host, y_start, "y");
    assert_added(b, got_dx, &dx.host, dx_start, "dx");
    b->ops->unit_close(b->queue);
    b->ops->close(b->queue);
    free(got_y);
    free(got_dx);
    free(y_start);
    free(dx_start);
    tw_mat_free(b, &x);
    tw_mat_free(b, &y);
    tw_mat_free(b, &dy);
    tw_mat_free(b, &dx);
    tw_unit_free(b, &unit);
}

/* No rows: nothing but zero gradients. */
static void check_empty(const tw_backend *b)
{
    static const layer_case c = {3, 16, 24, 5, 5, 0.5F, true, true, true, true, RESIDUAL, DX};
    layer l = layer_make(b, &c);
    tw_mat *const mats[] = {&l.x, &l.y, &l.residual, &l.xa, &l.dy, &l.work, &l.dx};
    open_layer(&l);
    for (size_t i = 0; i < sizeof mats / sizeof *mats; i++) {
        mats[i]->device.rows = 0;
    }
    run_forward(&l);
    run_backward(&l);
    float *da = tw_read(b, l.da, (size_t)(c.rank * c.in) * sizeof *da);
    float *db = tw_read(b, l.db, (size_t)(c.out * c.rank) * sizeof *db);
    for (int64_t i = 0; i < c.rank * c.in; i++) {
        cr_assert_eq(da[i], 0.0F);
    }
    for (int64_t i = 0; i < c.out * c.rank; i++) {
        cr_assert_eq(db[i], 0.0F);
    }
    b->ops->unit_close(b->queue);
    b->ops->close(b->queue);
    free(da);
    free(db);
    layer_free(&l);
}

Test(twin_linear, no_adapter_and_no_rows)
{
    tw_backend backends[TW_BACKENDS_MAX];
    const int count = tw_backends(backends);
    for (int i = 0; i < count; i++) {
        check_bare(&backends[i]);
        check_empty(&backends[i]);
    }
    tw_backends_close(backends, count);
}

/* ---- the CPU's, which the others are measured by: the bits of its parts, in their order ---- */

static void check_parts(const layer_case *c)
{
    tw_backend b = {.device = qs_device_cpu(), .ops = qs_ops_cpu()};
    cr_assert_eq(qs_queue_create(&b.queue, 2), QS_OK);
    b.cpu_queue = b.queue;
    const qs_ops *ops = b.ops;
    layer l = layer_make(&b, c);
    const qs_unit_view *view = &l.unit.host.view;
    const qs_weight *w = &l.unit.host.weight;
    tw_mat sum = tw_mat_make(&b, c->rows, c->out, 8, 1.0F, 43);
    tw_mat xa = tw_mat_make(&b, c->rows, c->rank, 0, 1.0F, 1);
    const tw_mat *from = c->residual == RESIDUAL_IS_Y ? &l.y : &l.residual;
    cr_assert_eq(
        ops->linear_forward(b.queue, view, w, c->bias ? l.bias : NULL, &l.x.host, &sum.host),
        QS_OK);
    cr_assert_eq(ops->lora_forward(b.queue, &l.ad.host, &l.x.host, &xa.host, &sum.host), QS_OK);
    if (c->residual != NO_RESIDUAL) {
        cr_assert_eq(ops->add(b.queue, &from->host, &sum.host), QS_OK);
    }
    run_forward(&l);
    float *got = tw_mat_read(&b, &l.y.device), *want = ad_compact(&sum.host);
    float *got_xa = tw_mat_read(&b, &l.xa.device), *want_xa = ad_compact(&xa.host);
    tw_assert_close(&b, got, want, c->rows * c->out, 0.0, 0.0, l.what);
    tw_assert_close(&b, got_xa, want_xa, c->rows * c->rank, 0.0, 0.0, l.what);
    free(got);
    free(want);
    free(got_xa);
    free(want_xa);
    tw_mat_free(&b, &sum);
    tw_mat_free(&b, &xa);
    layer_free(&l);
    qs_queue_destroy(b.queue);
}

/* More rows than the blocks in which the sum is built where the residual lies. */
Test(twin_linear, the_cpu_is_its_parts)
{
    static const layer_case cases[] = {
        {600, 24, 40, 5, 5, 0.3F, false, false, false, true, RESIDUAL_IS_Y, DX},
        {600, 24, 40, 5, 5, 0.0F, false, false, false, false, RESIDUAL_IS_Y, DX},
        {600, 24, 40, 5, 5, 0.3F, false, false, false, true, RESIDUAL, DX},
        {7, 24, 40, 5, 5, 0.0F, false, false, false, true, NO_RESIDUAL, DX},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        check_parts(&cases[i]);
    }
}
