/* DoRA's linears against the CPU: norms and gains, forward, gradients, magnitudes. The way an
 * operation takes (bordered or plain, opened or not, one block of tokens or several) must not show:
 * all meet the same limits, which are what rounding to bf16 can change: y once; xa, drop(x), g dy,
 * (g - 1) dy and s (g dy) B each; dx as in test_twin_linear.c; the product that dm is made of. Sums
 * are fp32, or fp64 on the CPU. */
#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <stdio.h>

#include "adapter.h"

typedef enum { NO_RESIDUAL, RESIDUAL, RESIDUAL_IS_Y } residual_kind;
typedef enum { NO_DX, DX, DX_ADD } dx_kind;
typedef enum { NF4, NF4_PLAIN_SCALES, NF4_F16, RAW_BF16, RAW_F32 } weight_form;

typedef struct {
    int64_t rows, out, in;
    int rank, most_rank; /* of this linear; of the largest one */
    float dropout;
    weight_form weight;
    bool opened, x_border; /* room behind x */
    bool bias;
    residual_kind residual;
    dx_kind dx;
} dora_case;

typedef struct {
    const tw_backend *b;
    const dora_case *c;
    char what[200];
    tw_unit unit;
    adapter ad;
    float *bias, *magnitude, *norm_host, *gain_host;
    void *bias_device, *magnitude_device, *norm, *gain;
    tw_mat x, y, residual, xa, dy, work, dx;
    void *da, *db, *dm;
    float *da_host, *db_host, *dm_host;
    float *dropped; /* [rows, in] */
} layer;

static fx_weight_spec spec_of(const dora_case *c)
{
    const bool raw = c->weight == RAW_BF16 || c->weight == RAW_F32;
    return (fx_weight_spec){.kind = raw ? QS_WEIGHT_RAW : QS_WEIGHT_NF4,
                            .out = c->out,
                            .in = c->in,
                            .dtype = c->weight == NF4_F16   ? QS_F16
                                     : c->weight == RAW_F32 ? QS_F32
                                                            : QS_BF16,
                            .nested = c->weight == NF4,
                            .nranks = raw ? 1 : 2,
                            .raw_quantum_elems = 256};
}

/* What rounding W's elements to bf16 can change of them; such weights are exact already. */
static double weight_rounding(const dora_case *c)
{
    return c->weight == NF4_F16 || c->weight == RAW_F32 ? AD_HALF_ULP : 0.0;
}

static void *upload_floats(const tw_backend *b, const float *x, int64_t count)
{
    return tw_upload(b, x, (size_t)count * sizeof *x);
}

static layer layer_make(const tw_backend *b, const dora_case *c)
{
    const fx_weight_spec spec = spec_of(c);
    layer l = {.b = b, .c = c, .unit = tw_unit_make(b, &spec, 21)};
    const int64_t pad = c->x_border ? b->ops->border(c->most_rank) + 8 : 5;
    snprintf(l.what, sizeof l.what,
             "T %lld out %lld in %lld rank %d of %d p %g weight %d opened %d border %d bias %d "
             "residual %d dx %d",
             (long long)c->rows, (long long)c->out, (long long)c->in, c->rank, c->most_rank,
             (double)c->dropout, (int)c->weight, c->opened, c->x_border, c->bias, (int)c->residual,
             (int)c->dx);
    l.ad = adapter_make(b, c->rows, c->in, c->out, c->rank, c->dropout);
    l.bias = fx_random(c->out, 41);
    l.magnitude = fx_random(c->out, 42);
    l.norm_host = fx_random(c->out, 43);
    l.gain_host = fx_random(c->out, 44);
    l.x = tw_mat_make(b, c->rows, c->in, pad, 1.0F, 45);
    l.y = tw_mat_make(b, c->rows, c->out, 8, 1.0F, 46);
    l.residual = tw_mat_make(b, c->rows, c->out, 16, 1.0F, 47);
    l.xa = tw_mat_make(b, c->rows, c->rank, 3, 1.0F, 48);
    l.dy = tw_mat_make(b, c->rows, c->out, 8, 1.0F, 49);
    l.work = tw_mat_make(b, c->rows, c->rank, 0, 1.0F, 50);
    l.dx = tw_mat_make(b, c->rows, c->in, 8, 1.0F, 51);
    l.da_host = fx_random(c->rank * c->in, 52);
    l.db_host = fx_random(c->out * c->rank, 53);
    l.dm_host = fx_random(c->out, 54);
    l.da = upload_floats(b, l.da_host, c->rank * c->in);
    l.db = upload_floats(b, l.db_host, c->out * c->rank);
    l.dm = upload_floats(b, l.dm_host, c->out);
    l.bias_device = upload_floats(b, l.bias, c->out);
    l.norm = upload_floats(b, l.norm_host, c->out);
    l.gain = upload_floats(b, l.gain_host, c->out);
    l.dropped = adapter_dropped(&l.ad, &l.x.host);
    return l;
}

static void layer_free(layer *l)
{
    tw_mat *const mats[] = {&l->x, &l->y, &l->residual, &l->xa, &l->dy, &l->work, &l->dx};
    for (size_t i = 0; i < sizeof mats / sizeof *mats; i++) {
        tw_mat_free(l->b, mats[i]);
    }
    void *const device[] = {l->da,   l->db,  l->dm, l->bias_device, l->magnitude_device,
                            l->norm, l->gain};
    for (size_t i = 0; i < sizeof device / sizeof *device; i++) {
        tw_free(l->b, device[i]);
    }
    void *const host[] = {l->da_host,   l->db_host,   l->dm_host,   l->bias,
                          l->magnitude, l->norm_host, l->gain_host, l->dropped};
    for (size_t i = 0; i < sizeof host / sizeof *host; i++) {
        free(host[i]);
    }
    adapter_free(l->b, &l->ad);
    tw_unit_free(l->b, &l->unit);
}

/* ---- norms ---- */

static void cpu_norms(layer *l, const qs_lora *lora, const float *magnitude)
{
    cr_assert_eq(qs_ops_cpu()->dora_norms(l->b->cpu_queue, &l->unit.host.view, &l->unit.host.weight,
                                          lora, magnitude, l->norm_host, l->gain_host),
                 QS_OK);
}

static void device_norms(const layer *l, const qs_lora *lora, const void *magnitude)
{
    tw_ok(l->b, l->b->ops->dora_norms(l->b->queue, &l->unit.view, &l->unit.weight, lora, magnitude,
                                      l->norm, l->gain));
}

/* Sums of squares in fp32 that are made in trees: a millionth; and what rounding W changes. */
static void check_rows_of(const layer *l, const void *device, const float *host, const char *name)
{
    char what[240];
    const int64_t out = l->c->out;
    float *got = tw_read(l->b, device, (size_t)out * sizeof *got);
    double *limit = ad_limits(out);
    for (int64_t i = 0; i < out; i++) {
        limit[i] = (1e-6 + weight_rounding(l->c)) * fabs((double)host[i]);
    }
    snprintf(what, sizeof what, "%s: %s", l->what, name);
    ad_assert_within(l->b, got, host, limit, out, what);
    free(got);
    free(limit);
}

/* Magnitudes near the norms of W, as they are in training: gains of 0.75 to 1.25. */
static void check_norms(layer *l)
{
    const qs_lora none = {0};
    cpu_norms(l, &none, NULL);
    device_norms(l, &none, NULL);
    check_rows_of(l, l->norm, l->norm_host, "norm of W");
    for (int64_t i = 0; i < l->c->out; i++) {
        l->magnitude[i] = l->norm_host[i] * (1.0F + 0.25F * l->magnitude[i]);
    }
    l->magnitude_device = upload_floats(l->b, l->magnitude, l->c->out);
    cpu_norms(l, &l->ad.host, l->magnitude);
    device_norms(l, &l->ad.device, l->magnitude_device);
    check_rows_of(l, l->norm, l->norm_host, "norm");
    check_rows_of(l, l->gain, l->gain_host, "gain");
    l->ad.host.norm = l->norm_host;
    l->ad.host.gain = l->gain_host;
    l->ad.device.norm = l->norm;
    l->ad.device.gain = l->gain;
}

/* ---- both passes ---- */

static const qs_mat *residual_of(const layer *l, bool device)
{
    switch (l->c->residual) {
    case RESIDUAL:
        return device ? &l->residual.device : &l->residual.host;
    case RESIDUAL_IS_Y:
        return device ? &l->y.device : &l->y.host;
    default:
        return NULL;
    }
}

static void run_device(layer *l)
{
    const dora_case *c = l->c;
    const tw_backend *b = l->b;
    tw_ok(b, b->ops->linear_lora_forward(b->queue, &l->unit.view, &l->unit.weight,
                                         c->bias ? l->bias_device : NULL, residual_of(l, true),
                                         &l->ad.device, &l->x.device, &l->xa.device, &l->y.device));
    tw_ok(b, b->ops->linear_lora_backward(b->queue, &l->unit.view, &l->unit.weight, &l->ad.device,
                                          &l->x.device, &l->xa.device, &l->dy.device,
                                          &l->work.device, l->da, l->db,
                                          c->dx == NO_DX ? NULL : &l->dx.device, c->dx == DX_ADD));
    tw_ok(b, b->ops->dora_backward(b->queue, &l->unit.view, &l->unit.weight, &l->ad.device,
                                   &l->x.device, &l->xa.device, &l->dy.device, l->dm));
}

static void run_cpu(layer *l)
{
    const dora_case *c = l->c;
    const qs_ops *ops = qs_ops_cpu();
    qs_queue *q = l->b->cpu_queue;
    cr_assert_eq(ops->linear_lora_forward(q, &l->unit.host.view, &l->unit.host.weight,
                                          c->bias ? l->bias : NULL, residual_of(l, false),
                                          &l->ad.host, &l->x.host, &l->xa.host, &l->y.host),
                 QS_OK);
    cr_assert_eq(ops->linear_lora_backward(q, &l->unit.host.view, &l->unit.host.weight, &l->ad.host,
                                           &l->x.host, &l->xa.host, &l->dy.host, &l->work.host,
                                           l->da_host, l->db_host,
                                           c->dx == NO_DX ? NULL : &l->dx.host, c->dx == DX_ADD),
                 QS_OK);
    cr_assert_eq(ops->dora_backward(q, &l->unit.host.view, &l->unit.host.weight, &l->ad.host,
                                    &l->x.host, &l->xa.host, &l->dy.host, l->dm_host),
                 QS_OK);
}

/* ---- limits ---- */

static ad_factor factor(const tw_mat *mat)
{
    return (ad_factor){mat->host.data, mat->host.stride, 1};
}

static ad_factor transposed(ad_factor f)
{
    return (ad_factor){f.data, f.col, f.row};
}

/* Sizes as floats, contiguous, to be a factor of the next product. */
static float *sizes_of(int64_t rows, int64_t cols, int64_t k, ad_factor a, ad_factor b,
                       double times)
{
    double *sum = ad_limits(rows * cols);
    float *out = ad_zeros(rows * cols);
    ad_add_products(sum, rows, cols, k, a, b, times);
    for (int64_t i = 0; i < rows * cols; i++) {
        out[i] = (float)sum[i];
    }
    free(sum);
    return out;
}

/* |gain - minus| times the limits of a row, column by column. */
static void times_gains(const layer *l, double *limit, double minus)
{
    for (int64_t i = 0; i < l->c->rows * l->c->out; i++) {
        limit[i] *= fabs((double)l->gain_host[i % l->c->out] - minus);
    }
}

/* |xa| of s A drop(x) and what its own rounding and drop(x)'s can change of it, [rows, rank]. */
static float *xa_changes(const layer *l)
{
    const dora_case *c = l->c;
    const double s = l->ad.host.scale;
    const double of_drop = c->dropout > 0.0F ? AD_HALF_ULP : 0.0;
    float *out = sizes_of(c->rows, c->rank, c->in, (ad_factor){l->dropped, c->in, 1},
                          (ad_factor){l->ad.a, 1, c->in}, s * (1e-6 + of_drop));
    for (int64_t i = 0; i < c->rows * c->rank; i++) {
        const float xa = qs_mat_f32(&l->xa.host)[i / c->rank * l->xa.host.stride + i % c->rank];
        out[i] += (float)(s * AD_HALF_ULP) * fabsf(xa);
    }
    return out;
}

/* Element by element; and, as limits of many tokens' sums are wide, the whole within 1 %: roundings
 * are as often up as down. */
static void assert_values(const layer *l, const char *name, float *got, float *want, double *limit,
                          int64_t count)
{
    char what[240];
    snprintf(what, sizeof what, "%s: %s", l->what, name);
    ad_assert_within(l->b, got, want, limit, count, what);
    if (l->c->rows > 100) {
        tw_assert_norm(l->b, got, want, count, 1e-2, what);
    }
    free(got);
    free(want);
    free(limit);
}

static void assert_mat(const layer *l, const char *name, const tw_mat *mat, double *limit)
{
    assert_values(l, name, tw_mat_read(l->b, &mat->device), ad_compact(&mat->host), limit,
                  mat->host.rows * mat->host.cols);
}

static void assert_vector(const layer *l, const char *name, const void *device, const float *host,
                          double *limit, int64_t count)
{
    float *want = ad_zeros(count);
    memcpy(want, host, (size_t)count * sizeof *want);
    assert_values(l, name, tw_read(l->b, device, (size_t)count * sizeof(float)), want, limit,
                  count);
}

/* y is rounded once, from fp32. */
static void check_y(const layer *l)
{
    const dora_case *c = l->c;
    const int64_t count = c->rows * c->out;
    const ad_factor w = {l->unit.host.plain, 1, c->in}, b = {l->ad.b, 1, c->rank};
    double *limit = ad_limits(count), *of_drop = ad_limits(count);
    float *xa = xa_changes(l);
    ad_add_products(limit, c->rows, c->out, c->rank, (ad_factor){xa, c->rank, 1}, b, 1.0);
    ad_add_products(limit, c->rows, c->out, c->in, factor(&l->x), w, 1e-6 + weight_rounding(c));
    times_gains(l, limit, 0.0);
    if (c->dropout > 0.0F) { /* both products with W count, and drop(x) was rounded */
        ad_add_products(of_drop, c->rows, c->out, c->in, (ad_factor){l->dropped, c->in, 1}, w,
                        1e-6 + weight_rounding(c) + AD_HALF_ULP);
        times_gains(l, of_drop, 1.0);
        ad_add_products(limit, c->rows, c->out, c->in, factor(&l->x), w, 1e-6 + weight_rounding(c));
    }
    for (int64_t i = 0; i < count; i++) {
        limit[i] += of_drop[i] + 1e-6;
    }
    ad_add_values(limit, &l->y.host, AD_HALF_ULP);
    assert_mat(l, "y", &l->y, limit);
    free(of_drop);
    free(xa);
}

/* dy times |gain - minus|, contiguous. */
static float *gained_dy(const layer *l, float minus)
{
    float *out = ad_compact(&l->dy.host);
    for (int64_t i = 0; i < l->c->rows * l->c->out; i++) {
        out[i] *= l->gain_host[i % l->c->out] - minus;
    }
    return out;
}

/* |s (g dy) B| and what rounding g dy and the product can change of it, [rows, rank]. */
static float *work_changes(const layer *l, const float *gained)
{
    const dora_case *c = l->c;
    const double s = l->ad.host.scale;
    float *out = sizes_of(c->rows, c->rank, c->out, (ad_factor){gained, c->out, 1},
                          (ad_factor){l->ad.b, c->rank, 1}, s * (1e-6 + AD_HALF_ULP));
    for (int64_t i = 0; i < c->rows * c->rank; i++) {
        const float work =
            qs_mat_f32(&l->work.host)[i / c->rank * l->work.host.stride + i % c->rank];
        out[i] += (float)(s * AD_HALF_ULP) * fabsf(work);
    }
    return out;
}

/* Without a border the adapter's part is a product of its own: rounded, and the sum before it. */
static void check_dx(const layer *l, const float *start)
{
    const dora_case *c = l->c;
    const double kept = 1.0 / (1.0 - (double)c->dropout), s = l->ad.host.scale;
    const ad_factor w = {l->unit.host.plain, c->in, 1}, a = {l->ad.a, c->in, 1};
    const double of_weight = 1e-6 + weight_rounding(c);
    float *gained = gained_dy(l, 0.0F), *but_one = gained_dy(l, 1.0F);
    float *work = work_changes(l, gained);
    double *limit = ad_limits(c->rows * c->in);
    ad_add_values(limit, &l->dx.host, 2 * AD_HALF_ULP);
    ad_add_rounded_product(limit, &l->dx.host, start);
    ad_add_products(limit, c->rows, c->in, c->rank, (ad_factor){work, c->rank, 1}, a, kept);
    ad_add_products(limit, c->rows, c->in, c->rank, factor(&l->work), a,
                    (start != NULL ? 3 : 2) * s * kept * AD_HALF_ULP);
    if (c->dropout > 0.0F) {
        ad_add_products(limit, c->rows, c->in, c->out, factor(&l->dy), w, of_weight);
        /* rounded as an operand, and its product with what it is added to */
        ad_add_products(limit, c->rows, c->in, c->out, (ad_factor){but_one, c->out, 1}, w,
                        kept * (of_weight + 3 * AD_HALF_ULP));
    } else {
        ad_add_products(limit, c->rows, c->in, c->out, (ad_factor){gained, c->out, 1}, w,
                        of_weight + AD_HALF_ULP);
    }
    assert_mat(l, "dx", &l->dx, limit);
    free(gained);
    free(but_one);
    free(work);
}

static void check_gradients(const layer *l)
{
    const dora_case *c = l->c;
    const double s = l->ad.host.scale, of_drop = c->dropout > 0.0F ? AD_HALF_ULP : 0.0;
    const ad_factor dropped = {l->dropped, c->in, 1};
    float *gained = gained_dy(l, 0.0F), *work = work_changes(l, gained), *xa = xa_changes(l);
    double *a_limit = ad_limits(c->rank * c->in), *b_limit = ad_limits(c->out * c->rank);
    ad_add_products(a_limit, c->rank, c->in, c->rows, (ad_factor){work, 1, c->rank}, dropped, 1.0);
    ad_add_products(a_limit, c->rank, c->in, c->rows, transposed(factor(&l->work)), dropped,
                    s * (of_drop + 1e-6));
    ad_add_products(b_limit, c->out, c->rank, c->rows, (ad_factor){gained, 1, c->out},
                    (ad_factor){xa, c->rank, 1}, 1.0);
    ad_add_products(b_limit, c->out, c->rank, c->rows, (ad_factor){gained, 1, c->out},
                    factor(&l->xa), s * (AD_HALF_ULP + 1e-6));
    assert_vector(l, "da", l->da, l->da_host, a_limit, c->rank * c->in);
    assert_vector(l, "db", l->db, l->db_host, b_limit, c->out * c->rank);
    free(gained);
    free(work);
    free(xa);
}

/* (W + s B A) drop(x) is rounded; as two products, each and their sum. */
static void check_magnitudes(const layer *l)
{
    const dora_case *c = l->c;
    const double s = l->ad.host.scale, of_drop = c->dropout > 0.0F ? AD_HALF_ULP : 0.0;
    const ad_factor w = {l->unit.host.plain, 1, c->in}, b = {l->ad.b, 1, c->rank};
    const ad_factor dropped = {l->dropped, c->in, 1};
    double *z = ad_limits(c->rows * c->out), *limit = ad_limits(c->out);
    float *xa = xa_changes(l);
    ad_add_products(z, c->rows, c->out, c->rank, (ad_factor){xa, c->rank, 1}, b, 1.0);
    ad_add_products(z, c->rows, c->out, c->rank, factor(&l->xa), b, 2 * s * AD_HALF_ULP);
    ad_add_products(z, c->rows, c->out, c->in, dropped, w, 1e-6 + weight_rounding(c) + of_drop);
    for (int64_t t = 0; t < c->rows; t++) {
        for (int64_t o = 0; o < c->out; o++) {
            double product = 0;
            for (int64_t i = 0; i < c->in; i++) {
                product +=
                    (double)l->dropped[t * c->in + i] * (double)l->unit.host.plain[o * c->in + i];
            }
            const double dy = fabs((double)qs_mat_f32(&l->dy.host)[t * l->dy.host.stride + o]);
            limit[o] += dy * (z[t * c->out + o] + (2 * AD_HALF_ULP + 1e-6) * fabs(product));
        }
    }
    for (int64_t o = 0; o < c->out; o++) {
        limit[o] = limit[o] / (double)l->norm_host[o] +
                   (1e-5 + weight_rounding(c)) * fabs((double)l->dm_host[o]);
    }
    assert_vector(l, "dm", l->dm, l->dm_host, limit, c->out);
    free(z);
    free(xa);
}

/* ---- a case ---- */

/* Everything that a pass gave, to compare two passes bit by bit. */
static float *results_of(const layer *l, int64_t *count)
{
    const dora_case *c = l->c;
    const tw_mat *const mats[] = {&l->y, &l->xa, &l->dx};
    const void *const vectors[] = {l->da, l->db, l->dm};
    const int64_t counts[] = {c->rows * c->out, c->rows * c->rank, c->rows * c->in,
                              c->rank * c->in,  c->out * c->rank,  c->out};
    *count = 0;
    for (int i = 0; i < 6; i++) {
        *count += counts[i];
    }
    float *all = ad_zeros(*count), *to = all;
    for (int i = 0; i < 6; i++) {
        float *part = i < 3 ? tw_mat_read(l->b, &mats[i]->device)
                            : tw_read(l->b, vectors[i - 3], (size_t)counts[i] * sizeof *part);
        memcpy(to, part, (size_t)counts[i] * sizeof *to);
        to += counts[i];
        free(part);
    }
    return all;
}

static void open_layer(const layer *l)
{
    const dora_case *c = l->c;
    qs_ops_limits limits = ad_limits_of(c->rows, c->out, c->in, c->most_rank, c->dropout > 0.0F);
    limits.dora = true;
    tw_open(l->b, &limits);
    if (c->opened) {
        tw_ok(l->b,
              l->b->ops->unit_open(l->b->queue, &l->unit.view, &l->unit.weight, &l->ad.device, 1));
    }
}

/* dy is the next linear's, too: nothing of it may change, and of x only its border may. */
static void check_untouched(const layer *l)
{
    cr_assert(tw_gap_intact(l->b, &l->dy.device) && tw_gap_intact(l->b, &l->y.device) &&
                  tw_gap_intact(l->b, &l->xa.device) && tw_gap_intact(l->b, &l->dx.device),
              "%s: a gap was written", l->what);
    const tw_mat *const inputs[] = {&l->x, &l->dy};
    for (int i = 0; i < 2; i++) {
        float *got = tw_mat_read(l->b, &inputs[i]->device), *want = ad_compact(&inputs[i]->host);
        cr_assert_arr_eq(got, want,
                         (size_t)(inputs[i]->host.rows * inputs[i]->host.cols) * sizeof *got,
                         "%s: input %d was changed", l->what, i);
        free(got);
        free(want);
    }
    qs_mat behind = l->x.device;
    behind.cols += l->c->x_border ? l->b->ops->border(l->c->most_rank) : 0;
    cr_assert(tw_gap_intact(l->b, &behind), "%s: behind x's border was written", l->what);
}

static void check_case(const tw_backend *b, const dora_case *c)
{
    layer l = layer_make(b, c);
    float *dx_start = c->dx == DX_ADD ? ad_compact(&l.dx.host) : NULL;
    int64_t count;
    open_layer(&l);
    check_norms(&l);
    run_device(&l);
    float *first = results_of(&l, &count);
    ad_upload_again(b, &l.y);
    ad_upload_again(b, &l.dx);
    run_device(&l);
    float *second = results_of(&l, &count);
    cr_assert_arr_eq(first, second, (size_t)count * sizeof *first,
                     "%s on %s: other bits in a second run", l.what, b->name);
    check_untouched(&l);
    run_cpu(&l);
    check_y(&l);
    check_gradients(&l);
    check_magnitudes(&l);
    if (c->dx != NO_DX) {
        check_dx(&l, dx_start);
    }
    b->ops->unit_close(b->queue);
    b->ops->close(b->queue);
    free(first);
    free(second);
    free(dx_start);
    layer_free(&l);
}

static void check_cases(const dora_case *cases, size_t count)
{
    tw_backend backends[TW_BACKENDS_MAX];
    const int n = tw_backends(backends);
    for (int i = 0; i < n; i++) {
        for (size_t c = 0; c < count; c++) {
            check_case(&backends[i], &cases[c]);
        }
    }
    tw_backends_close(backends, n);
}

#define CHECK_CASES(cases) check_cases((cases), sizeof(cases) / sizeof *(cases))

Test(twin_dora, every_way_gives_the_same)
{
    static const dora_case cases[] = {
        {21, 72, 88, 8, 8, 0.0F, NF4, true, true, false, NO_RESIDUAL, DX},
        {21, 72, 88, 8, 8, 0.0F, NF4, true, false, false, NO_RESIDUAL, DX},
        {21, 72, 88, 8, 8, 0.0F, NF4, false, true, false, NO_RESIDUAL, DX_ADD},
        {21, 72, 88, 8, 8, 0.3F, NF4, true, true, false, NO_RESIDUAL, DX},
        {21, 72, 88, 8, 8, 0.3F, NF4, true, false, false, NO_RESIDUAL, DX_ADD},
        {21, 72, 88, 8, 8, 0.3F, NF4, false, true, false, NO_RESIDUAL, DX},
    };
    CHECK_CASES(cases);
}

/* Ranks that are no whole pieces, or smaller than the border, or more than a kernel takes at once;
 * rows from one on; widths that are no multiples of 8, where borders cannot be used. */
Test(twin_dora, shapes)
{
    static const dora_case cases[] = {
        {1, 8, 8, 1, 1, 0.0F, NF4, true, true, false, NO_RESIDUAL, DX},
        {17, 64, 128, 13, 13, 0.0F, NF4, true, true, false, NO_RESIDUAL, DX_ADD},
        {17, 64, 128, 13, 30, 0.2F, NF4, true, true, false, NO_RESIDUAL, DX},
        {19, 136, 72, 64, 64, 0.0F, NF4, true, true, false, NO_RESIDUAL, DX},
        {19, 136, 72, 20, 64, 0.0F, NF4, true, true, false, NO_RESIDUAL, DX},
        {11, 40, 304, 100, 100, 0.0F, NF4, true, true, false, NO_RESIDUAL, DX},
        {9, 45, 333, 5, 5, 0.0F, NF4, true, true, true, RESIDUAL, DX},
        {9, 45, 333, 70, 70, 0.1F, NF4, true, true, true, RESIDUAL, DX_ADD},
        {9, 64, 333, 13, 13, 0.0F, NF4, true, true, true, RESIDUAL, DX_ADD},
        {9, 45, 64, 8, 8, 0.4F, NF4, true, true, true, RESIDUAL_IS_Y, DX},
        {30, 200, 104, 16, 16, 0.0F, NF4, true, true, false, NO_RESIDUAL, NO_DX},
        {130, 24, 40, 4, 4, 0.0F, NF4, true, true, true, RESIDUAL_IS_Y, DX},
    };
    CHECK_CASES(cases);
}

Test(twin_dora, bias_and_residual)
{
    static const dora_case cases[] = {
        {13, 40, 48, 4, 4, 0.0F, NF4, true, true, true, NO_RESIDUAL, DX},
        {13, 40, 48, 4, 4, 0.0F, NF4, true, true, false, RESIDUAL, DX_ADD},
        {13, 40, 48, 4, 4, 0.0F, NF4, true, true, true, RESIDUAL_IS_Y, DX},
        {13, 40, 48, 4, 4, 0.5F, NF4, true, true, true, RESIDUAL, DX_ADD},
        {13, 40, 48, 4, 4, 0.5F, NF4, true, true, true, RESIDUAL_IS_Y, DX},
        {13, 40, 48, 4, 4, 0.5F, NF4, false, false, true, NO_RESIDUAL, NO_DX},
    };
    CHECK_CASES(cases);
}

Test(twin_dora, weights_of_all_kinds)
{
    static const dora_case cases[] = {
        {12, 56, 72, 6, 8, 0.0F, RAW_BF16, true, true, false, NO_RESIDUAL, DX},
        {12, 56, 72, 6, 8, 0.3F, RAW_BF16, false, true, true, RESIDUAL, DX_ADD},
        {12, 45, 35, 6, 8, 0.0F, RAW_BF16, true, true, false, NO_RESIDUAL, DX},
        {12, 56, 72, 6, 8, 0.0F, RAW_F32, true, true, false, NO_RESIDUAL, DX},
        {12, 56, 72, 6, 8, 0.3F, NF4_F16, true, true, true, NO_RESIDUAL, DX},
        {12, 56, 72, 6, 8, 0.0F, NF4_PLAIN_SCALES, true, true, false, RESIDUAL, DX},
    };
    CHECK_CASES(cases);
}

/* More tokens than pass through scratch at once: two blocks, and three. */
Test(twin_dora, blocks_of_tokens)
{
    static const dora_case cases[] = {
        {2100, 16, 24, 4, 4, 0.0F, NF4, true, true, true, RESIDUAL_IS_Y, DX_ADD},
        {2100, 16, 24, 3, 4, 0.25F, NF4, true, true, true, RESIDUAL, DX},
        {4100, 8, 16, 2, 2, 0.25F, NF4, false, false, false, NO_RESIDUAL, DX_ADD},
    };
    CHECK_CASES(cases);
}

/* ---- properties ---- */

static const dora_case plain_case = {24,  64,   96,   8,     8,           0.0F,
                                     NF4, true, true, false, NO_RESIDUAL, DX};

/* Where training begins, B is zero and a magnitude is the norm that the operation itself gave, of
 * the weight outside of an opened unit: every gain is 1, bit by bit. */
static void check_start(const tw_backend *b, int64_t out, int64_t in, int rank)
{
    dora_case c = plain_case;
    c.out = out;
    c.in = in;
    c.rank = c.most_rank = rank;
    c.opened = false;
    layer l = layer_make(b, &c);
    const qs_lora none = {0};
    float *zeros = ad_zeros(out * rank);
    void *b_device = tw_upload_as_act(b, zeros, out * rank);
    qs_lora start = l.ad.device;
    start.b = b_device;
    open_layer(&l);
    device_norms(&l, &none, NULL);
    float *magnitude = tw_read(b, l.norm, (size_t)out * sizeof *magnitude);
    l.magnitude_device = upload_floats(b, magnitude, out);
    for (int opened = 0; opened <= 1; opened++) {
        if (opened) {
            tw_ok(b, b->ops->unit_open(b->queue, &l.unit.view, &l.unit.weight, &start, 1));
        }
        device_norms(&l, &start, l.magnitude_device);
        float *gain = tw_read(b, l.gain, (size_t)out * sizeof *gain);
        for (int64_t i = 0; i < out; i++) {
            cr_assert_eq(gain[i], 1.0F, "%s: gain %lld is %.9g, opened %d", b->name, (long long)i,
                         (double)gain[i], opened);
        }
        free(gain);
    }
    b->ops->unit_close(b->queue);
    b->ops->close(b->queue);
    tw_free(b, b_device);
    free(zeros);
    free(magnitude);
    layer_free(&l);
}

static void starts(const tw_backend *b)
{
    check_start(b, 64, 96, 8);
    check_start(b, 70, 2100, 40);
    check_start(b, 33, 333, 13);
}

static void on_backends(void (*body)(const tw_backend *b))
{
    tw_backend backends[TW_BACKENDS_MAX];
    const int n = tw_backends(backends);
    for (int i = 0; i < n; i++) {
        body(&backends[i]);
    }
    tw_backends_close(backends, n);
}

Test(twin_dora, gains_begin_as_one)
{
    on_backends(starts);
}

/* Sum of |y| with all gains at `gain`. */
static double size_with(layer *l, float gain)
{
    const dora_case *c = l->c;
    float *gains = ad_zeros(c->out);
    for (int64_t i = 0; i < c->out; i++) {
        gains[i] = gain;
    }
    tw_free(l->b, l->gain);
    l->gain = upload_floats(l->b, gains, c->out);
    l->ad.device.gain = l->gain;
    l->ad.device.norm = l->norm;
    tw_ok(l->b,
          l->b->ops->linear_lora_forward(l->b->queue, &l->unit.view, &l->unit.weight, NULL, NULL,
                                         &l->ad.device, &l->x.device, &l->xa.device, &l->y.device));
    float *y = tw_mat_read(l->b, &l->y.device);
    double sum = 0;
    for (int64_t i = 0; i < c->rows * c->out; i++) {
        sum += fabs((double)y[i]);
    }
    free(y);
    free(gains);
    return sum;
}

/* A gain of 1 + 2^-11 is nearer to 1 than bf16 can tell. Of many elements it moves some to the next
 * number, so that the whole grows by as much as it should, which it would not if the product were
 * rounded before it is scaled. */
static void small_gains(const tw_backend *b)
{
    for (int dropout = 0; dropout <= 1; dropout++) {
        dora_case c = plain_case;
        c.rows = 96;
        c.out = 200;
        c.dropout = dropout ? 0.25F : 0.0F;
        layer l = layer_make(b, &c);
        open_layer(&l);
        const double step = ldexp(1.0, -11);
        const double grown = size_with(&l, 1.0F + (float)step) / size_with(&l, 1.0F) - 1.0;
        if (!dropout) {
            cr_assert_float_eq(grown, step, 0.15 * step, "%s: by %g", b->name, grown);
        } else { /* of W x only drop(x)'s part, which is the whole on average */
            cr_assert(grown > 0.3 * step && grown < 1.7 * step, "%s: by %g", b->name, grown);
        }
        b->ops->unit_close(b->queue);
        b->ops->close(b->queue);
        layer_free(&l);
    }
}

Test(twin_dora, small_gains_are_not_rounded_away)
{
    on_backends(small_gains);
}

/* A row that B A takes to zero has no direction: its norm and gain are 0, it stays zero, and no
 * gradient is infinite. */
static void zero_row(const tw_backend *b)
{
    enum { ROW = 37 };
    dora_case c = plain_case;
    c.rank = c.most_rank = 1;
    c.opened = false;
    layer l = layer_make(b, &c);
    l.ad.b[ROW] = -1.0F;
    void *a_device = tw_upload_as_act(b, l.unit.host.plain + ROW * c.in, c.in);
    void *b_device = tw_upload_as_act(b, l.ad.b, c.out);
    tw_free(b, (void *)(uintptr_t)l.ad.device.a);
    tw_free(b, (void *)(uintptr_t)l.ad.device.b);
    l.ad.device.a = a_device;
    l.ad.device.b = b_device;
    l.ad.device.scale = 1.0F;
    l.magnitude_device = upload_floats(b, l.magnitude, c.out);
    open_layer(&l);
    device_norms(&l, &l.ad.device, l.magnitude_device);
    l.ad.device.norm = l.norm;
    l.ad.device.gain = l.gain;
    run_device(&l);
    float *norm = tw_read(b, l.norm, (size_t)c.out * sizeof *norm);
    float *gain = tw_read(b, l.gain, (size_t)c.out * sizeof *gain);
    float *dm = tw_read(b, l.dm, (size_t)c.out * sizeof *dm);
    float *y = tw_mat_read(b, &l.y.device);
    for (int64_t i = 0; i < c.out; i++) {
        const bool zero = i == ROW;
        cr_assert(zero == (norm[i] == 0.0F) && zero == (gain[i] == 0.0F) &&
                      zero == (dm[i] == 0.0F) && isfinite(dm[i]),
                  "%s: row %lld: norm %g, gain %g, dm %g", b->name, (long long)i, (double)norm[i],
                  (double)gain[i], (double)dm[i]);
    }
    for (int64_t t = 0; t < c.rows; t++) {
        cr_assert_eq(y[t * c.out + ROW], 0.0F);
    }
    b->ops->close(b->queue);
    free(norm);
    free(gain);
    free(dm);
    free(y);
    layer_free(&l);
}

Test(twin_dora, a_zero_row_stays_zero)
{
    on_backends(zero_row);
}

/* No tokens: nothing is written but gradients of zero. */
static void no_rows(const tw_backend *b)
{
    layer l = layer_make(b, &plain_case);
    const dora_case *c = l.c;
    open_layer(&l);
    check_norms(&l);
    tw_mat *const mats[] = {&l.x, &l.y, &l.xa, &l.dy, &l.work, &l.dx};
    for (size_t i = 0; i < sizeof mats / sizeof *mats; i++) {
        mats[i]->device.rows = 0;
    }
    run_device(&l);
    const void *const vectors[] = {l.da, l.db, l.dm};
    const int64_t counts[] = {c->rank * c->in, c->out * c->rank, c->out};
    for (int v = 0; v < 3; v++) {
        float *got = tw_read(b, vectors[v], (size_t)counts[v] * sizeof *got);
        for (int64_t i = 0; i < counts[v]; i++) {
            cr_assert_eq(got[i], 0.0F, "%s: gradient %d", b->name, v);
        }
        free(got);
    }
    b->ops->unit_close(b->queue);
    b->ops->close(b->queue);
    layer_free(&l);
}

Test(twin_dora, no_rows)
{
    on_backends(no_rows);
}
