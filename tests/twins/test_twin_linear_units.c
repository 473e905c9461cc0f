/* Units of several linears: every one meets its own adapter, and one has none. And calls with
 * little to do: no adapter, no rows. Limits as in test_twin_linear.c. */
#include "linear_layer.h"

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
    tw_ok(b, b->ops->linear_lora_forward(b->queue, &unit->view, &s->device[i], NULL, NULL,
                                         &s->lora[i], &x.device, &xa.device, &y.device));
    tw_ok(b, qs_ops_cpu()->linear_lora_forward(b->cpu_queue, &unit->host.view, w, NULL, NULL,
                                               &s->ad[i].host, &x.host, &xa.host, &y.host));
    float *got = tw_mat_read(b, &y.device);
    double *limit = ad_limits(rows * w->out);
    ad_add_values(limit, &y.host, AD_HALF_ULP);
    if (s->ad[i].host.a != NULL) { /* as in layer_check_y */
        ad_add_values(limit, &y.host, AD_HALF_ULP);
        ad_add_products(limit, rows, w->out, rank, ad_of(&xa), (ad_factor){s->ad[i].b, 1, rank},
                        ad_part_roundings(NULL) * (double)s->ad[i].host.scale * AD_HALF_ULP);
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
    tw_unit unit = layer_weight(b, NF4, 200, 240); /* three quanta between two of others */
    qs_ops_limits limits = ad_limits_of(rows, 8, 8, 13, false);
    several s = several_make(b, &unit, rows, &limits);
    tw_open(b, &limits);
    tw_ok(b, b->ops->unit_open(b->queue, &unit.view, s.device, s.lora, SEVERAL, 0, false));
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

Test(twin_linear_units, several_in_a_unit)
{
    tw_each_backend(check_several);
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
    tw_unit unit = layer_weight(b, NF4, out, in);
    const qs_ops_limits limits = ad_limits_of(rows, out, in, 8, false);
    const qs_lora none = {0};
    tw_mat x = tw_mat_make(b, rows, in, 8, 1.0F, 61), y = tw_mat_make(b, rows, out, 0, 1.0F, 62);
    tw_mat dy = tw_mat_make(b, rows, out, 8, 1.0F, 63), dx = tw_mat_make(b, rows, in, 0, 1.0F, 64);
    float *y_start = ad_compact(&y.host), *dx_start = ad_compact(&dx.host);
    tw_open(b, &limits);
    tw_ok(b, b->ops->unit_open(b->queue, &unit.view, &unit.weight, &none, 1, 0, false));
    tw_ok(b, b->ops->linear_lora_forward(b->queue, &unit.view, &unit.weight, NULL, &y.device, &none,
                                         &x.device, NULL, &y.device));
    tw_ok(b, b->ops->linear_lora_backward(b->queue, &unit.view, &unit.weight, &none, &x.device,
                                          NULL, &dy.device, NULL, NULL, NULL, &dx.device, true));
    tw_ok(b, b->ops->linear_lora_backward(b->queue, &unit.view, &unit.weight, &none, &x.device,
                                          NULL, &dy.device, NULL, NULL, NULL, NULL, false));
    cr_assert(tw_gap_intact(b, &x.device) && tw_gap_intact(b, &dy.device));
    float *got_y = tw_mat_read(b, &y.device), *got_dx = tw_mat_read(b, &dx.device);
    const qs_ops *ops = qs_ops_cpu();
    tw_ok(b, ops->linear_lora_forward(b->cpu_queue, &unit.host.view, &unit.host.weight, NULL,
                                      &y.host, &none, &x.host, NULL, &y.host));
    tw_ok(b, ops->linear_lora_backward(b->cpu_queue, &unit.host.view, &unit.host.weight, &none,
                                       &x.host, NULL, &dy.host, NULL, NULL, NULL, &dx.host, true));
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
    static const layer_case c = {3,    16,     24,     5,    5,        0.5F, NF4,
                                 true, BORDER, BORDER, true, RESIDUAL, DX};
    layer l = layer_make(b, &c, LORA);
    layer_open(&l);
    layer_check_empty(&l);
    layer_close(&l);
    layer_free(&l);
}

Test(twin_linear_units, no_adapter_and_no_rows)
{
    tw_each_backend(check_bare);
    tw_each_backend(check_empty);
}
