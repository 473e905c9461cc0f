/* The frozen linear: each result is rounded once, and a product to which something is added may be
 * (ad_add_rounded_product). Sums are fp32 on both sides. */
#include "linear_layer.h"

typedef struct {
    int64_t rows, out, in, pad;
    bool bias, f32, opened;
} frozen_case;

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
        tw_ok(b, b->ops->linear_forward(b->queue, &unit->view, &unit->weight,
                                        c->bias ? bias_device : NULL, &x.device, &y.device));
        got[i] = tw_mat_read(b, &y.device);
    }
    cr_assert(tw_gap_intact(b, &y.device) && tw_gap_intact(b, &x.device));
    tw_ok(b, qs_ops_cpu()->linear_forward(b->cpu_queue, &unit->host.view, &unit->host.weight,
                                          c->bias ? bias : NULL, &x.host, &y.host));
    float *want = ad_compact(&y.host), *start = c->bias ? ad_zeros(c->rows * c->out) : NULL;
    double *limit = ad_limits(c->rows * c->out);
    for (int64_t i = 0; c->bias && i < c->rows * c->out; i++) {
        start[i] = bias[i % c->out];
    }
    /* fp32 out: no rounding but the sum's, 1e-6 of its terms. */
    ad_add_products(limit, c->rows, c->out, c->in, ad_of(&x),
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
    tw_ok(b, b->ops->linear_backward(b->queue, &unit->view, &unit->weight, &dy.device, &dx.device,
                                     accumulate));
    float *got = tw_mat_read(b, &dx.device), *start = accumulate ? ad_compact(&dx.host) : NULL;
    cr_assert(tw_gap_intact(b, &dx.device) && tw_gap_intact(b, &dy.device));
    tw_ok(b, qs_ops_cpu()->linear_backward(b->cpu_queue, &unit->host.view, &unit->host.weight,
                                           &dy.host, &dx.host, accumulate));
    float *want = ad_compact(&dx.host);
    double *limit = ad_limits(c->rows * c->in);
    ad_add_values(limit, &dx.host, AD_HALF_ULP);
    ad_add_rounded_product(limit, &dx.host, start);
    ad_add_products(limit, c->rows, c->in, c->out, ad_of(&dy),
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
    tw_unit unit = layer_weight(b, NF4, c->out, c->in);
    const qs_ops_limits limits = ad_limits_of(c->rows, c->out, c->in, 8, false);
    const qs_lora none = {0};
    tw_open(b, &limits);
    if (c->opened) {
        tw_ok(b, b->ops->unit_open(b->queue, &unit.view, &unit.weight, &none, 1, 0, false));
    }
    check_forward(b, c, &unit);
    check_backward(b, c, &unit, false);
    check_backward(b, c, &unit, true);
    b->ops->unit_close(b->queue);
    b->ops->close(b->queue);
    tw_unit_free(b, &unit);
}

Test(twin_linear_frozen, products)
{
    static const frozen_case cases[] = {
        {1, 1, 1, 0, false, false, false},   {1, 64, 64, 0, true, false, true},
        {17, 40, 333, 3, true, false, true}, {17, 40, 333, 0, false, true, false},
        {33, 72, 128, 8, true, true, true},  {33, 72, 128, 8, false, false, false},
        {5, 130, 200, 16, true, false, true}};
    TW_CHECK_CASES(check_frozen, cases);
}
