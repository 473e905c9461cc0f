/* Schedules against their formulas; AdamW against a scalar reference in double precision. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/rng.h"
#include "optim/optim.h"

static qs_config config(int schedule, double warmup)
{
    qs_config c;
    qs_config_defaults(&c);
    c.optim.schedule = schedule;
    c.optim.warmup = warmup;
    c.optim.lr = 1e-3;
    return c;
}

Test(schedule, warm_up_rises_by_equal_steps_to_the_peak)
{
    qs_config c = config(QS_SCHEDULE_COSINE, 5);
    for (int k = 0; k < 5; k++) {
        cr_assert_float_eq(qs_lr_at(&c, k, 100), 1e-3 * (k + 1) / 5, 1e-18);
    }
    cr_assert_float_eq(qs_lr_at(&c, 5, 100), 1e-3, 1e-18);
}

Test(schedule, fraction_of_the_steps_is_rounded_up)
{
    qs_config c = config(QS_SCHEDULE_CONSTANT, 0.03);
    cr_assert_float_eq(qs_lr_at(&c, 0, 100), 1e-3 / 3, 1e-18); /* 3 of 100 */
    cr_assert_float_eq(qs_lr_at(&c, 0, 40), 1e-3 / 2, 1e-18);  /* 1.2: 2 */
    c.optim.warmup = 0.07;
    cr_assert_float_eq(qs_lr_at(&c, 0, 100), 1e-3 / 7, 1e-18); /* 0.07 * 100 is above 7 in binary */
    c.optim.warmup = 0;
    cr_assert_eq(qs_lr_at(&c, 0, 100), 1e-3);
}

Test(schedule, cosine_and_linear_follow_their_formulas)
{
    const double pi = acos(-1.0);
    qs_config cosine = config(QS_SCHEDULE_COSINE, 10), linear = config(QS_SCHEDULE_LINEAR, 10);
    for (int k = 10; k < 110; k++) {
        double p = (k - 10) / 100.0;
        double c = 1e-3 * (0.1 + 0.9 * 0.5 * (1 + cos(pi * p)));
        cr_assert_float_eq(qs_lr_at(&cosine, k, 110), c, 1e-15, "k=%d", k);
        cr_assert_float_eq(qs_lr_at(&linear, k, 110), 1e-3 * (0.1 + 0.9 * (1 - p)), 1e-15, "k=%d",
                           k);
    }
    cr_assert_float_eq(qs_lr_at(&cosine, 110, 110), 1e-4, 1e-15); /* the end, and beyond it */
    cr_assert_float_eq(qs_lr_at(&linear, 500, 110), 1e-4, 1e-15);
    qs_config constant = config(QS_SCHEDULE_CONSTANT, 0);
    cr_assert_eq(qs_lr_at(&constant, 99, 100), 1e-3);
}

Test(clip, scale_is_that_of_torch)
{
    cr_assert_eq(qs_clip_scale(1.0, 0.5), 1.0);
    cr_assert_float_eq(qs_clip_scale(1.0, 4.0), 1.0 / (4.0 + 1e-6), 1e-16);
    cr_assert_eq(qs_clip_scale(0.0, 1e9), 1.0); /* off */
    cr_assert_eq(qs_clip_scale(1.0, 0.0), 1.0);
}

/* One layer of `count` weights. */
static qs_status create(qs_optim **out, int64_t count)
{
    const qs_lora_layout layout = {
        .n_layers = 1, .chunks = count / QS_LORA_CHUNK, .per_layer = count};
    return qs_optim_create(out, qs_device_cpu(), &layout, 0, 1);
}

/* torch.optim.AdamW, one element, in double */
typedef struct {
    double w, m, v;
} scalar;

static void scalar_step(scalar *s, const qs_config *c, double lr, double grad, int t)
{
    s->w *= 1 - lr * c->optim.weight_decay;
    s->m = c->optim.beta1 * s->m + (1 - c->optim.beta1) * grad;
    s->v = c->optim.beta2 * s->v + (1 - c->optim.beta2) * grad * grad;
    double m_hat = s->m / (1 - pow(c->optim.beta1, t)), v_hat = s->v / (1 - pow(c->optim.beta2, t));
    s->w -= lr * m_hat / (sqrt(v_hat) + c->optim.eps);
}

Test(adamw, twenty_steps_stay_with_the_double_reference)
{
    enum { N = 4096 + 4096 };
    static scalar ref[N];
    static float grad[N];
    qs_config c = config(QS_SCHEDULE_COSINE, 3);
    c.optim.weight_decay = 0.01;
    qs_optim *o = NULL;
    qs_queue *q = NULL;
    cr_assert_eq(create(&o, N), QS_OK);
    cr_assert_eq(qs_queue_create(&q, 2), QS_OK);
    qs_rng rng = qs_rng_make(3, 0, 0, 50, 0);
    for (int i = 0; i < N; i++) {
        o->master[i] = qs_rng_uniform(&rng, (uint64_t)i) - 0.5f;
        ref[i].w = o->master[i];
    }
    for (int t = 1; t <= 20; t++) {
        double lr = qs_lr_at(&c, t - 1, 20), scale = 0.25 * t;
        for (int i = 0; i < N; i++) {
            grad[i] = (qs_rng_uniform(&rng, (uint64_t)(t * N + i)) - 0.5f) * 1e-3f;
            scalar_step(&ref[i], &c, lr, scale * grad[i], t);
        }
        cr_assert_eq(qs_optim_step(o, qs_ops_cpu(), q, &c, lr, scale, grad), QS_OK);
        cr_assert_eq(o->step, t);
    }
    for (int i = 0; i < N; i++) {
        /* 20 updates of about lr = 1e-3, each with a few fp32 roundings of w (6e-8 * 0.5) and of
         * the update (1e-3 * 1e-6) */
        cr_assert_float_eq(o->master[i], ref[i].w, 2e-6, "i=%d", i);
        cr_assert_float_eq(o->m[i], ref[i].m, 1e-6 * 5e-3, "i=%d", i);
        cr_assert_float_eq(o->v[i], ref[i].v, 1e-5 * ref[i].v + 1e-14, "i=%d", i);
    }
    qs_queue_destroy(q);
    qs_optim_destroy(o);
}

Test(adamw, elements_without_gradient_only_decay_and_padding_stays_zero)
{
    enum { N = 4096 };
    static float grad[N];
    qs_config c = config(QS_SCHEDULE_CONSTANT, 0);
    c.optim.weight_decay = 0.1;
    qs_optim *o = NULL;
    qs_queue *q = NULL;
    cr_assert_eq(create(&o, N), QS_OK);
    cr_assert_eq(qs_queue_create(&q, 1), QS_OK);
    o->master[0] = 2.0f;
    cr_assert_eq(qs_optim_step(o, qs_ops_cpu(), q, &c, 1e-3, 1.0, grad), QS_OK);
    cr_assert_float_eq(o->master[0], 2.0 * (1 - 1e-4), 3e-7);
    for (int i = 1; i < N; i++) {
        cr_assert_eq(o->master[i], 0.0f);
    }
    qs_queue_destroy(q);
    qs_optim_destroy(o);
}

/* Each rank of three updates its share of two layers; put together that is every A at one rate and
 * every B, and every magnitude, at sixteen times it. SGD, so that the update is the rate times the
 * gradient. */
static void check_lora_plus(bool dora)
{
    enum { RANKS = 3, LAYERS = 2, IN = 300, OUT = 700, LORA = 8 };
    qs_lora_layout layout;
    qs_config c = config(QS_SCHEDULE_CONSTANT, 0);
    int64_t outs[QS_LINEAR_COUNT], ins[QS_LINEAR_COUNT];
    for (int i = 0; i < QS_LINEAR_COUNT; i++) {
        outs[i] = OUT + i;
        ins[i] = IN + i;
    }
    c.lora.rank = LORA;
    c.lora.targets = 0x2d; /* q, v, o, up */
    c.optim.name = QS_OPTIMIZER_SGD;
    c.optim.lora_plus_ratio = 16.0;
    c.lora.dora = dora;
    cr_assert_eq(qs_lora_layout_of_shapes(&layout, LAYERS, outs, ins, &c), QS_OK);
    const int64_t width = qs_lora_shard_width(&layout, RANKS);
    float *grad = malloc((size_t)(LAYERS * width) * sizeof *grad);
    cr_assert_not_null(grad);
    for (int64_t i = 0; i < LAYERS * width; i++) {
        grad[i] = 1.0F;
    }
    for (int rank = 0; rank < RANKS; rank++) {
        const qs_range mine = qs_lora_shard(&layout, rank, RANKS);
        qs_optim *o = NULL;
        qs_queue *q = NULL;
        cr_assert_eq(qs_optim_create(&o, qs_device_cpu(), &layout, rank, RANKS), QS_OK);
        cr_assert_eq(qs_queue_create(&q, 1), QS_OK);
        cr_assert_eq(qs_optim_step(o, qs_ops_cpu(), q, &c, 0.25, 1.0, grad), QS_OK);
        for (int64_t i = 0; i < LAYERS * width; i++) {
            const int64_t at = mine.begin + i % width;
            float want = 0.0F; /* padding */
            for (int l = 0; l < QS_LINEAR_COUNT && at < mine.end; l++) {
                if (layout.targeted[l] && at >= layout.a_at[l] && at < layout.b_at[l]) {
                    want = -0.25F;
                } else if (layout.targeted[l] && at >= layout.b_at[l] &&
                           at < layout.b_at[l] + (LORA + dora) * layout.out[l]) {
                    want = -4.0F;
                }
            }
            cr_assert_eq(o->master[i], want, "rank %d element %lld: %g, not %g", rank, (long long)i,
                         (double)o->master[i], (double)want);
        }
        qs_queue_destroy(q);
        qs_optim_destroy(o);
    }
    free(grad);
}

Test(optim, lora_plus_gives_every_b_a_rate_of_its_own)
{
    check_lora_plus(false);
    check_lora_plus(true);
}

Test(optim, share_of_nothing_is_allowed)
{
    qs_optim *o = NULL;
    cr_assert_eq(qs_optim_create(&o, qs_device_cpu(), &(qs_lora_layout){0}, 0, 1), QS_OK);
    qs_optim_destroy(o);
    qs_optim_destroy(NULL);
}
