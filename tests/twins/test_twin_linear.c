/* A layer's linear: a frozen product and what LoRA, bias and residual add to it. The way an
 * operation takes (bordered or plain, opened or not) must not show: all meet the same limits, which
 * are what rounding to bf16 can change on the longest way. A result is rounded once, and once more
 * where the adapter is a product of its own; so is a product to which something is added
 * (ad_add_rounded_product), bias + residual, each xa, each s dy B and, with dropout, each drop(x).
 * Sums are fp32 on both sides. */
#include "linear_layer.h"

/* What the product is added to, before y is overwritten: bias + residual; NULL without either. */
static float *start_of_y(const layer *l)
{
    const layer_case *c = l->c;
    float *start = layer_residual_is_y(c)       ? ad_compact(&l->y.host)
                   : c->residual != NO_RESIDUAL ? ad_compact(&l->residual.host)
                   : c->bias                    ? ad_zeros(c->rows * c->out)
                                                : NULL;
    for (int64_t i = 0; c->bias && i < c->rows * c->out; i++) {
        start[i] += l->bias.host[i % c->out];
    }
    return start;
}

static void check_dx(const layer *l, const float *start)
{
    const layer_case *c = l->c;
    const double s = l->ad.host.scale / (1.0 - (double)l->ad.host.dropout);
    double *limit = ad_limits(c->rows * c->in);
    ad_add_values(limit, &l->dx.host, 2 * AD_HALF_ULP);
    ad_add_rounded_product(limit, &l->dx.host, start);
    ad_add_products(limit, c->rows, c->in, c->rank, ad_of(&l->work), (ad_factor){l->ad.a, c->in, 1},
                    ad_part_roundings(start) * s * AD_HALF_ULP);
    ad_add_products(limit, c->rows, c->in, c->out, ad_of(&l->dy),
                    (ad_factor){l->unit.host.plain, c->in, 1}, 1e-6);
    layer_assert_mat(l, "dx", &l->dx, limit);
}

static void check_layer(const tw_backend *b, const layer_case *c)
{
    layer l = layer_make(b, c, LORA);
    float *y_start = start_of_y(&l), *dx_start = c->dx == DX_ADD ? ad_compact(&l.dx.host) : NULL;
    layer_open(&l);
    layer_run(&l);
    layer_check_y(&l, y_start);
    layer_check_gradients(&l);
    if (c->dx != NO_DX) {
        check_dx(&l, dx_start);
    }
    layer_close(&l);
    free(y_start);
    free(dx_start);
    layer_free(&l);
}

/* Room behind both, behind one, behind none; opened and not. */
Test(twin_linear, every_way_gives_the_same)
{
    static const layer_case cases[] = {
        {21, 72, 88, 8, 8, 0.0F, NF4, true, BORDER, BORDER, false, NO_RESIDUAL, DX},
        {21, 72, 88, 8, 8, 0.0F, NF4, true, BORDER, 3, false, NO_RESIDUAL, DX},
        {21, 72, 88, 8, 8, 0.0F, NF4, true, 3, BORDER, false, NO_RESIDUAL, DX},
        {21, 72, 88, 8, 8, 0.0F, NF4, true, 3, 3, false, NO_RESIDUAL, DX},
        {21, 72, 88, 8, 8, 0.0F, NF4, false, BORDER, BORDER, false, NO_RESIDUAL, DX},
    };
    TW_CHECK_CASES(check_layer, cases);
}

/* Ranks that are, and are not, whole pieces; smaller than the border; rows from one on; widths that
 * are no multiples of 8, where borders cannot be used. */
Test(twin_linear, shapes)
{
    static const layer_case cases[] = {
        {1, 8, 8, 1, 1, 0.0F, NF4, true, BORDER, BORDER, false, NO_RESIDUAL, DX},
        {17, 64, 128, 13, 13, 0.0F, NF4, true, BORDER, BORDER, false, NO_RESIDUAL, DX_ADD},
        {17, 64, 128, 13, 30, 0.0F, NF4, true, BORDER, BORDER, false, NO_RESIDUAL, DX},
        {19, 136, 72, 64, 64, 0.0F, NF4, true, BORDER, BORDER, false, NO_RESIDUAL, DX_ADD},
        {19, 136, 72, 1, 64, 0.0F, NF4, true, BORDER, BORDER, false, NO_RESIDUAL, DX},
        {9, 45, 333, 5, 5, 0.0F, NF4, true, BORDER, BORDER, false, RESIDUAL, DX},
        {9, 64, 333, 13, 13, 0.0F, NF4, true, BORDER, BORDER, true, RESIDUAL, DX_ADD},
        {9, 45, 64, 8, 8, 0.0F, NF4, true, BORDER, BORDER, true, RESIDUAL_IS_Y, DX},
        {30, 200, 104, 16, 16, 0.0F, NF4, true, BORDER, BORDER, false, NO_RESIDUAL, NO_DX},
        {30, 200, 104, 16, 16, 0.0F, NF4, false, 3, 3, false, NO_RESIDUAL, NO_DX},
    };
    TW_CHECK_CASES(check_layer, cases);
}

Test(twin_linear, bias_and_residual)
{
    static const layer_case cases[] = {
        {13, 40, 48, 4, 4, 0.0F, NF4, true, BORDER, BORDER, true, NO_RESIDUAL, DX},
        {13, 40, 48, 4, 4, 0.0F, NF4, true, BORDER, BORDER, false, RESIDUAL, DX_ADD},
        {13, 40, 48, 4, 4, 0.0F, NF4, true, BORDER, BORDER, true, RESIDUAL, DX},
        {13, 40, 48, 4, 4, 0.0F, NF4, true, BORDER, BORDER, false, RESIDUAL_IS_Y, DX_ADD},
        {13, 40, 48, 4, 4, 0.0F, NF4, true, BORDER, BORDER, true, RESIDUAL_IS_Y, DX},
        {13, 40, 48, 4, 4, 0.0F, NF4, true, 3, 3, true, RESIDUAL, DX_ADD},
        {13, 40, 48, 4, 4, 0.0F, NF4, false, 3, 3, true, RESIDUAL_IS_Y, DX_ADD},
        {300, 16, 16, 4, 4, 0.0F, NF4, true, BORDER, BORDER, true, RESIDUAL_IS_Y, DX},
    };
    TW_CHECK_CASES(check_layer, cases);
}

/* The residual stream in fp32: y is not rounded at all. */
Test(twin_linear, fp32_residual)
{
    static const layer_case cases[] = {
        {13, 40, 48, 4, 4, 0.0F, NF4, true, BORDER, BORDER, false, RESIDUAL_F32, DX_ADD},
        {13, 40, 48, 4, 4, 0.0F, NF4, true, BORDER, BORDER, true, RESIDUAL_F32, DX},
        {13, 40, 48, 4, 4, 0.3F, NF4, true, BORDER, BORDER, false, RESIDUAL_IS_Y_F32, DX},
        {13, 40, 48, 4, 4, 0.0F, NF4, true, BORDER, BORDER, true, RESIDUAL_IS_Y_F32, DX},
        {13, 40, 48, 4, 4, 0.3F, NF4, true, 3, 3, true, RESIDUAL_F32, DX_ADD},
        {9, 45, 333, 5, 5, 0.0F, NF4, false, 3, 3, true, RESIDUAL_IS_Y_F32, DX_ADD},
        {9, 45, 333, 5, 5, 0.1F, NF4, true, BORDER, BORDER, false, RESIDUAL_F32, DX},
        {300, 16, 16, 4, 4, 0.0F, NF4, true, BORDER, BORDER, true, RESIDUAL_IS_Y_F32, DX},
    };
    TW_CHECK_CASES(check_layer, cases);
}

Test(twin_linear, dropout)
{
    static const layer_case cases[] = {
        {23, 72, 88, 8, 8, 0.3F, NF4, true, BORDER, BORDER, false, NO_RESIDUAL, DX},
        {23, 72, 88, 8, 8, 0.3F, NF4, true, 3, 3, false, NO_RESIDUAL, DX_ADD},
        {23, 72, 88, 13, 16, 0.3F, NF4, true, BORDER, BORDER, true, RESIDUAL_IS_Y, DX_ADD},
        {23, 45, 333, 5, 5, 0.1F, NF4, true, BORDER, BORDER, false, RESIDUAL, DX},
        {23, 72, 88, 8, 8, 0.3F, NF4, false, BORDER, BORDER, true, RESIDUAL, DX},
        {23, 72, 88, 8, 8, 0.3F, NF4, true, BORDER, BORDER, false, NO_RESIDUAL, NO_DX},
        {1, 72, 88, 8, 8, 0.5F, NF4, true, BORDER, BORDER, false, NO_RESIDUAL, DX},
        {300, 16, 24, 4, 4, 0.5F, NF4, true, BORDER, BORDER, true, RESIDUAL_IS_Y, DX},
    };
    TW_CHECK_CASES(check_layer, cases);
}

/* ---- the CPU's, which the others are measured by: the bits of its parts, in their order ---- */

static void check_parts(const layer_case *c)
{
    tw_backend b = {.device = qs_device_cpu(), .ops = qs_ops_cpu()};
    cr_assert_eq(qs_queue_create(&b.queue, 2), QS_OK);
    b.cpu_queue = b.queue;
    const qs_ops *ops = b.ops;
    layer l = layer_make(&b, c, LORA);
    const qs_unit_view *view = &l.unit.host.view;
    const qs_weight *w = &l.unit.host.weight;
    tw_mat sum = tw_mat_make(&b, c->rows, c->out, 8, 1.0F, 43);
    tw_mat xa = tw_mat_make(&b, c->rows, c->rank, 0, 1.0F, 1);
    const tw_mat *from = layer_residual_is_y(c) ? &l.y : &l.residual;
    tw_ok(&b, ops->linear_forward(b.queue, view, w, c->bias ? l.bias.host : NULL, &l.x.host,
                                  &sum.host));
    tw_ok(&b, ops->lora_forward(b.queue, &l.ad.host, &l.x.host, &xa.host, &sum.host));
    if (c->residual != NO_RESIDUAL) {
        tw_ok(&b, ops->add(b.queue, &from->host, &sum.host, &sum.host));
    }
    layer_forward(&l);
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
        {600, 24, 40, 5, 5, 0.3F, NF4, false, 3, 3, true, RESIDUAL_IS_Y, DX},
        {600, 24, 40, 5, 5, 0.0F, NF4, false, 3, 3, false, RESIDUAL_IS_Y, DX},
        {600, 24, 40, 5, 5, 0.3F, NF4, false, 3, 3, true, RESIDUAL, DX},
        {7, 24, 40, 5, 5, 0.0F, NF4, false, 3, 3, true, NO_RESIDUAL, DX},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        check_parts(&cases[i]);
    }
}
