/* What DoRA's linears must keep to whatever the limits of test_twin_dora.c allow: gains of one,
 * small ones and zero, and calls without tokens. */
#include "linear_layer.h"

static const layer_case plain_case = {24,   64,     96, 8,     8,           0.0F, NF4,
                                      true, BORDER, 8,  false, NO_RESIDUAL, DX};

/* Where training begins, B is zero and a magnitude is the norm that the operation itself gave, of
 * the weight outside of an opened unit: every gain is 1, bit by bit. */
static void check_start(const tw_backend *b, int64_t out, int64_t in, int rank)
{
    layer_case c = plain_case;
    c.out = out;
    c.in = in;
    c.rank = c.most_rank = rank;
    c.opened = false;
    layer l = layer_make(b, &c, DORA);
    const qs_lora none = {0};
    float *zeros = ad_zeros(out * rank);
    void *b_device = tw_upload_as_act(b, zeros, out * rank);
    qs_lora start = l.ad.device;
    start.b = b_device;
    layer_open(&l);
    layer_norms(&l, &none, NULL);
    free(l.magnitude.host);
    l.magnitude.host = layer_read(&l, &l.norm);
    layer_upload(&l, &l.magnitude);
    for (int opened = 0; opened <= 1; opened++) {
        if (opened) {
            layer_open_unit(&l, &start, false);
        }
        layer_norms(&l, &start, l.magnitude.device);
        float *gain = layer_read(&l, &l.gain);
        for (int64_t i = 0; i < out; i++) {
            cr_assert_eq(gain[i], 1.0F, "%s: gain %lld is %.9g, opened %d", b->name, (long long)i,
                         (double)gain[i], opened);
        }
        free(gain);
    }
    layer_close(&l);
    tw_free(b, b_device);
    free(zeros);
    layer_free(&l);
}

static void starts(const tw_backend *b)
{
    check_start(b, 64, 96, 8);
    check_start(b, 70, 2100, 40);
    check_start(b, 33, 333, 13);
}

Test(twin_dora_properties, gains_begin_as_one)
{
    tw_each_backend(starts);
}

/* Sum of |y| with all gains at `gain`. */
static double size_with(layer *l, float gain)
{
    for (int64_t i = 0; i < l->gain.count; i++) {
        l->gain.host[i] = gain;
    }
    layer_upload(l, &l->gain);
    l->ad.device.gain = l->gain.device;
    l->ad.device.norm = l->norm.device;
    layer_forward(l);
    float *y = tw_mat_read(l->b, &l->y.device);
    double sum = 0;
    for (int64_t i = 0; i < l->c->rows * l->c->out; i++) {
        sum += fabs((double)y[i]);
    }
    free(y);
    return sum;
}

/* A gain of 1 + 2^-11 is nearer to 1 than bf16 can tell. Of many elements it moves some to the next
 * number, so that the whole grows by as much as it should, which it would not if the product were
 * rounded before it is scaled. */
static void small_gains(const tw_backend *b)
{
    for (int dropout = 0; dropout <= 1; dropout++) {
        layer_case c = plain_case;
        c.rows = 96;
        c.out = 200;
        c.dropout = dropout ? 0.25F : 0.0F;
        layer l = layer_make(b, &c, DORA);
        layer_open(&l);
        const double step = ldexp(1.0, -11);
        const double grown = size_with(&l, 1.0F + (float)step) / size_with(&l, 1.0F) - 1.0;
        if (!dropout) {
            cr_assert_float_eq(grown, step, 0.15 * step, "%s: by %g", b->name, grown);
        } else { /* of W x only drop(x)'s part, which is the whole on average */
            cr_assert(grown > 0.3 * step && grown < 1.7 * step, "%s: by %g", b->name, grown);
        }
        layer_close(&l);
        layer_free(&l);
    }
}

Test(twin_dora_properties, small_gains_are_not_rounded_away)
{
    tw_each_backend(small_gains);
}

/* A row that B A takes to zero has no direction: its norm and gain are 0, it stays zero, and no
 * gradient is infinite. */
static void zero_row(const tw_backend *b)
{
    enum { ROW = 37 };
    layer_case c = plain_case;
    c.rank = c.most_rank = 1;
    c.opened = false;
    layer l = layer_make(b, &c, DORA);
    l.ad.b[ROW] = -1.0F;
    void *a_device = tw_upload_as_act(b, l.unit.host.plain + ROW * c.in, c.in);
    void *b_device = tw_upload_as_act(b, l.ad.b, c.out);
    tw_free(b, (void *)(uintptr_t)l.ad.device.a);
    tw_free(b, (void *)(uintptr_t)l.ad.device.b);
    l.ad.device.a = a_device;
    l.ad.device.b = b_device;
    l.ad.device.scale = 1.0F;
    layer_open(&l);
    layer_norms(&l, &l.ad.device, l.magnitude.device);
    l.ad.device.norm = l.norm.device;
    l.ad.device.gain = l.gain.device;
    layer_forward(&l);
    layer_backward(&l);
    float *norm = layer_read(&l, &l.norm), *gain = layer_read(&l, &l.gain);
    float *dm = layer_read(&l, &l.dm), *y = tw_mat_read(b, &l.y.device);
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
    layer_close(&l);
    free(norm);
    free(gain);
    free(dm);
    free(y);
    layer_free(&l);
}

Test(twin_dora_properties, a_zero_row_stays_zero)
{
    tw_each_backend(zero_row);
}

/* No tokens: nothing is written but gradients of zero. */
static void no_rows(const tw_backend *b)
{
    layer l = layer_make(b, &plain_case, DORA);
    layer_open(&l);
    layer_set_gains(&l);
    layer_check_empty(&l);
    layer_close(&l);
    layer_free(&l);
}

Test(twin_dora_properties, no_rows)
{
    tw_each_backend(no_rows);
}
