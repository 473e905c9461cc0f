/* The adapter alone: y += s B (A drop(x)) and its gradients, against the CPU; dropout's mask bit by
 * bit. Limits as in test_twin_linear.c: what rounding xa, dy B, drop(x), the products that are
 * added to y and dx, and the results to bf16 can change. */
#include <criterion/criterion.h>
#include <stdio.h>

#include "adapter.h"

typedef struct {
    int64_t rows, out, in;
    int rank;
    float dropout;
    int64_t pad;
    bool dx;
} lora_case;

typedef struct {
    const lora_case *c;
    adapter ad;
    tw_mat x, y, xa, dy, work, dx;
    float *da_host, *db_host;
    void *da, *db;
    float *dropped;
    float *y_start, *dx_start; /* what the products are added to */
} bench;

static bench bench_make(const tw_backend *b, const lora_case *c)
{
    bench n = {.c = c, .ad = adapter_make(b, c->rows, c->in, c->out, c->rank, c->dropout)};
    n.x = tw_mat_make(b, c->rows, c->in, c->pad, 1.0F, 1);
    n.y = tw_mat_make(b, c->rows, c->out, c->pad, 1.0F, 2);
    n.xa = tw_mat_make(b, c->rows, c->rank, c->pad, 1.0F, 3);
    n.dy = tw_mat_make(b, c->rows, c->out, c->pad, 1.0F, 4);
    n.work = tw_mat_make(b, c->rows, c->rank, c->pad, 1.0F, 5);
    n.dx = tw_mat_make(b, c->rows, c->in, c->pad, 1.0F, 6);
    n.da_host = fx_random(c->rank * c->in, 7);
    n.db_host = fx_random(c->out * c->rank, 8);
    n.da = tw_upload(b, n.da_host, (size_t)(c->rank * c->in) * sizeof(float));
    n.db = tw_upload(b, n.db_host, (size_t)(c->out * c->rank) * sizeof(float));
    n.dropped = adapter_dropped(&n.ad, &n.x.host);
    n.y_start = ad_compact(&n.y.host);
    n.dx_start = ad_compact(&n.dx.host);
    return n;
}

static void bench_free(const tw_backend *b, bench *n)
{
    tw_mat *const mats[] = {&n->x, &n->y, &n->xa, &n->dy, &n->work, &n->dx};
    for (size_t i = 0; i < sizeof mats / sizeof *mats; i++) {
        tw_mat_free(b, mats[i]);
    }
    tw_free(b, n->da);
    tw_free(b, n->db);
    free(n->da_host);
    free(n->db_host);
    free(n->dropped);
    free(n->y_start);
    free(n->dx_start);
    adapter_free(b, &n->ad);
}

static void run(const tw_backend *b, bench *n)
{
    qs_mat *dx = n->c->dx ? &n->dx.device : NULL;
    cr_assert_eq(
        b->ops->lora_forward(b->queue, &n->ad.device, &n->x.device, &n->xa.device, &n->y.device),
        QS_OK, "%s: %s", b->name, qs_error_text());
    cr_assert_eq(b->ops->lora_backward(b->queue, &n->ad.device, &n->x.device, &n->xa.device,
                                       &n->dy.device, &n->work.device, n->da, n->db, dx),
                 QS_OK, "%s: %s", b->name, qs_error_text());
}

static void run_cpu(const tw_backend *b, bench *n)
{
    const qs_ops *ops = qs_ops_cpu();
    qs_mat *dx = n->c->dx ? &n->dx.host : NULL;
    cr_assert_eq(ops->lora_forward(b->cpu_queue, &n->ad.host, &n->x.host, &n->xa.host, &n->y.host),
                 QS_OK);
    cr_assert_eq(ops->lora_backward(b->cpu_queue, &n->ad.host, &n->x.host, &n->xa.host, &n->dy.host,
                                    &n->work.host, n->da_host, n->db_host, dx),
                 QS_OK);
}

static void assert_mat(const tw_backend *b, const tw_mat *mat, const double *limit,
                       const char *what)
{
    float *got = tw_mat_read(b, &mat->device), *want = ad_compact(&mat->host);
    ad_assert_within(b, got, want, limit, mat->host.rows * mat->host.cols, what);
    free(got);
    free(want);
}

/* |xa| as its own rounding and drop(x)'s see it: |xa| + sum |A| |drop(x)|. */
static float *xa_sizes(const bench *n)
{
    const lora_case *c = n->c;
    double *sizes = ad_limits(c->rows * c->rank);
    float *out = malloc((size_t)(c->rows * c->rank + 1) * sizeof *out);
    cr_assert_not_null(out);
    ad_add_values(sizes, &n->xa.host, 1.0);
    if (c->dropout > 0.0F) {
        ad_add_products(sizes, c->rows, c->rank, c->in, (ad_factor){n->dropped, c->in, 1},
                        (ad_factor){n->ad.a, 1, c->in}, 1.0);
    }
    for (int64_t i = 0; i < c->rows * c->rank; i++) {
        out[i] = (float)sizes[i];
    }
    free(sizes);
    return out;
}

static void check_results(const tw_backend *b, const bench *n, const char *what)
{
    const lora_case *c = n->c;
    const double s = n->ad.host.scale;
    float *xa = xa_sizes(n);
    const ad_factor sizes = {xa, c->rank, 1};
    double *y = ad_limits(c->rows * c->out), *dx = ad_limits(c->rows * c->in);
    double *da = ad_limits(c->rank * c->in), *db = ad_limits(c->out * c->rank);
    double *kept = ad_limits(c->rows * c->rank);
    for (int64_t i = 0; i < c->rows * c->rank; i++) {
        kept[i] = AD_HALF_ULP * (double)xa[i];
    }
    assert_mat(b, &n->xa, kept, what);
    ad_add_values(y, &n->y.host, AD_HALF_ULP);
    ad_add_rounded_product(y, &n->y.host, n->y_start);
    ad_add_products(y, c->rows, c->out, c->rank, sizes, (ad_factor){n->ad.b, 1, c->rank},
                    s * AD_HALF_ULP);
    assert_mat(b, &n->y, y, what);
    if (c->dx) {
        ad_add_values(dx, &n->dx.host, AD_HALF_ULP);
        if (c->dropout == 0.0F) { /* a masked product is fp32 until it has been added */
            ad_add_rounded_product(dx, &n->dx.host, n->dx_start);
        }
        ad_add_products(dx, c->rows, c->in, c->rank, ad_of(&n->work),
                        (ad_factor){n->ad.a, c->in, 1},
                        s / (1.0 - (double)c->dropout) * AD_HALF_ULP);
        assert_mat(b, &n->dx, dx, what);
    }
    ad_add_products(da, c->rank, c->in, c->rows, ad_transposed(ad_of(&n->work)),
                    (ad_factor){n->dropped, c->in, 1},
                    s * AD_HALF_ULP * (c->dropout > 0.0F ? 2 : 1));
    ad_add_products(db, c->out, c->rank, c->rows, ad_transposed(ad_of(&n->dy)), sizes,
                    s * AD_HALF_ULP);
    float *got_da = tw_read(b, n->da, (size_t)(c->rank * c->in) * sizeof *got_da);
    float *got_db = tw_read(b, n->db, (size_t)(c->out * c->rank) * sizeof *got_db);
    ad_assert_within(b, got_da, n->da_host, da, c->rank * c->in, what);
    ad_assert_within(b, got_db, n->db_host, db, c->out * c->rank, what);
    free(got_da);
    free(got_db);
    free(xa);
    free(y);
    free(dx);
    free(da);
    free(db);
    free(kept);
}

static void check(const tw_backend *b, const lora_case *c)
{
    char what[120];
    bench n = bench_make(b, c), again = bench_make(b, c);
    const qs_ops_limits limits = ad_limits_of(c->rows, c->out, c->in, c->rank, c->dropout > 0.0F);
    snprintf(what, sizeof what, "T %lld out %lld in %lld rank %d p %g pad %lld", (long long)c->rows,
             (long long)c->out, (long long)c->in, c->rank, (double)c->dropout, (long long)c->pad);
    tw_open(b, &limits);
    run(b, &n);
    run(b, &again);
    const tw_mat *const mats[] = {&n.y, &n.xa, &n.dx, &n.x, &n.dy, &n.work};
    const tw_mat *const mats2[] = {&again.y, &again.xa, &again.dx,
                                   &again.x, &again.dy, &again.work};
    for (size_t i = 0; i < sizeof mats / sizeof *mats; i++) {
        float *first = tw_mat_read(b, &mats[i]->device),
              *second = tw_mat_read(b, &mats2[i]->device);
        cr_assert_arr_eq(first, second,
                         (size_t)(mats[i]->host.rows * mats[i]->host.cols) * sizeof *first);
        cr_assert(tw_gap_intact(b, &mats[i]->device), "%s: gap %zu", what, i);
        free(first);
        free(second);
    }
    run_cpu(b, &n);
    check_results(b, &n, what);
    b->ops->close(b->queue);
    bench_free(b, &n);
    bench_free(b, &again);
}

Test(twin_lora, products)
{
    static const lora_case cases[] = {
        {1, 1, 1, 1, 0.0F, 0, true},      {9, 24, 40, 8, 0.0F, 8, true},
        {17, 45, 333, 13, 0.0F, 3, true}, {33, 64, 128, 64, 0.0F, 0, true},
        {33, 64, 128, 1, 0.0F, 0, false},
    };
    TW_CHECK_CASES(check, cases);
}

/* Widths of whole pieces and not; rows that begin on a Philox block and not (333 * row_at); one
 * row, whose fp32 product does not fit in the room of its bf16 input. */
Test(twin_lora, dropout)
{
    static const lora_case cases[] = {
        {9, 24, 40, 8, 0.5F, 8, true},   {17, 45, 333, 13, 0.1F, 3, true},
        {17, 333, 45, 4, 0.3F, 0, true}, {1, 8, 64, 8, 0.3F, 0, true},
        {40, 16, 136, 8, 0.9F, 1, true}, {21, 30, 50, 8, 0.3F, 0, false},
    };
    TW_CHECK_CASES(check, cases);
}

/* One-hot adapters show the mask itself: with A = e_f^T and B = 1, y is s drop(x)'s feature f. */
static void check_mask(const tw_backend *b, int64_t in, float p)
{
    enum { ROWS = 31 };
    adapter ad = adapter_make(b, ROWS, in, 1, 1, p);
    const qs_ops_limits limits = ad_limits_of(ROWS, 1, in, 1, true);
    tw_mat x = tw_mat_make(b, ROWS, in, 0, 1.0F, 9);
    tw_mat xa = tw_mat_make(b, ROWS, 1, 0, 1.0F, 10), y = tw_mat_make(b, ROWS, 1, 0, 1.0F, 11);
    float *a = calloc((size_t)in, sizeof *a);
    cr_assert_not_null(a);
    float *dropped = adapter_dropped(&ad, &x.host);
    tw_open(b, &limits);
    for (int64_t f = 0; f < in; f++) {
        a[f] = 1.0F;
        void *one = tw_upload_as_act(b, a, in);
        a[f] = 0.0F;
        qs_lora lora = ad.device;
        lora.a = one;
        cr_assert_eq(b->ops->lora_forward(b->queue, &lora, &x.device, &xa.device, &y.device),
                     QS_OK);
        float *got = tw_mat_read(b, &xa.device);
        for (int t = 0; t < ROWS; t++) {
            const float want = dropped[t * in + f];
            cr_assert_eq(got[t] == 0.0F, want == 0.0F, "%s: row %d feature %lld", b->name, t,
                         (long long)f);
            cr_assert_float_eq(got[t], want, (float)AD_HALF_ULP * 3 * fabsf(want));
        }
        free(got);
        tw_free(b, one);
    }
    b->ops->close(b->queue);
    free(a);
    free(dropped);
    tw_mat_free(b, &x);
    tw_mat_free(b, &xa);
    tw_mat_free(b, &y);
    adapter_free(b, &ad);
}

static void masks(const tw_backend *b)
{
    check_mask(b, 24, 0.4F); /* whole pieces */
    check_mask(b, 13, 0.4F);
    check_mask(b, 9, 1.0F); /* nothing is kept */
}

Test(twin_lora, the_mask_is_the_hosts)
{
    tw_each_backend(masks);
}

static void check_none(const tw_backend *b)
{
    const qs_lora none = {0};
    const qs_ops_limits limits = ad_limits_of(4, 8, 8, 1, false);
    tw_mat x = tw_mat_make(b, 4, 8, 0, 1.0F, 12), y = tw_mat_make(b, 4, 8, 0, 1.0F, 13);
    tw_open(b, &limits);
    cr_assert_eq(b->ops->lora_forward(b->queue, &none, &x.device, NULL, &y.device), QS_OK);
    cr_assert_eq(b->ops->lora_backward(b->queue, &none, &x.device, NULL, &y.device, NULL, NULL,
                                       NULL, &x.device),
                 QS_OK);
    float *got = tw_mat_read(b, &y.device);
    cr_assert_arr_eq(got, qs_mat_f32(&y.host), 32 * sizeof *got);
    free(got);
    b->ops->close(b->queue);
    tw_mat_free(b, &x);
    tw_mat_free(b, &y);
}

/* No rows: y is left, the gradients are zeros. */
static void check_empty(const tw_backend *b)
{
    static const lora_case c = {2, 8, 16, 4, 0.5F, 0, true};
    bench n = bench_make(b, &c);
    const qs_ops_limits limits = ad_limits_of(c.rows, c.out, c.in, c.rank, true);
    tw_mat *const mats[] = {&n.x, &n.y, &n.xa, &n.dy, &n.work, &n.dx};
    for (size_t i = 0; i < sizeof mats / sizeof *mats; i++) {
        mats[i]->device.rows = 0;
    }
    tw_open(b, &limits);
    run(b, &n);
    float *da = tw_read(b, n.da, (size_t)(c.rank * c.in) * sizeof *da);
    for (int64_t i = 0; i < c.rank * c.in; i++) {
        cr_assert_eq(da[i], 0.0F);
    }
    free(da);
    b->ops->close(b->queue);
    bench_free(b, &n);
}

Test(twin_lora, no_adapter_and_no_rows)
{
    tw_each_backend(check_none);
    tw_each_backend(check_empty);
}
