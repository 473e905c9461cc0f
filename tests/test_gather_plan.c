/* Which unit is gathered when: over many orders, by rules that any answer must keep and by the
 * fewest gathers that there can be. No device, no communicator. */
#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <limits.h>

#include "base/rng.h"
#include "fsdp/gather_plan.h"

enum { UNITS = 9, MOST = 3 * UNITS };

/* A plan with what a run would see: which unit's bytes lie in each buffer. */
typedef struct {
    qs_gather_plan plan;
    bool at_hand[UNITS];
    int bytes_of[QS_GATHER_BUFFERS_MAX];
    int gathers;
} rig;

static void rig_make(rig *r, unsigned at_hand, int prefetch)
{
    *r = (rig){0};
    for (int u = 0; u < UNITS; u++) {
        r->at_hand[u] = (at_hand >> u & 1) != 0;
    }
    cr_assert_eq(qs_gather_plan_create(&r->plan, r->at_hand, UNITS, prefetch), QS_OK);
    for (int b = 0; b < QS_GATHER_BUFFERS_MAX; b++) {
        r->bytes_of[b] = -1;
    }
}

/* `uses`: how many hold the buffer by now. */
static void start(rig *r, const qs_gather *g, int uses)
{
    cr_assert(g->buffer >= 0 && g->buffer < r->plan.n_buffers);
    cr_assert_eq(r->plan.held[g->buffer], uses, "a held unit is overwritten");
    r->bytes_of[g->buffer] = g->unit;
    r->gathers++;
}

/* Distinct units among order[from, to) that are gathered. */
static int gathered_between(const rig *r, const int *order, int from, int to)
{
    int count = 0;
    for (int i = from; i < to; i++) {
        bool first = !r->at_hand[order[i]];
        for (int j = from; j < i; j++) {
            first = first && order[j] != order[i];
        }
        count += first;
    }
    return count;
}

static void use(rig *r, const int *order, int count, int i)
{
    qs_gather mine, next;
    bool gather = false;
    cr_assert_eq(qs_gather_plan_acquire(&r->plan, order[i], &mine, &gather), QS_OK);
    cr_assert_eq(mine.buffer < 0, r->at_hand[order[i]]);
    if (gather) {
        start(r, &mine, 1);
    }
    while (qs_gather_plan_ahead(&r->plan, &next)) {
        cr_assert(next.position > i && next.position < count);
        cr_assert_eq(order[next.position], next.unit);
        cr_assert_leq(gathered_between(r, order, i + 1, next.position + 1), r->plan.prefetch,
                      "too far ahead");
        start(r, &next, 0);
    }
    if (mine.buffer >= 0) { /* still there after whatever was started */
        cr_assert_eq(r->bytes_of[mine.buffer], order[i]);
        qs_gather_plan_release(&r->plan, order[i]);
    }
}

static int run(rig *r, const int *order, int count)
{
    const int before = r->gathers;
    cr_assert_eq(qs_gather_plan_begin(&r->plan, order, count), QS_OK);
    for (int i = 0; i < count; i++) {
        use(r, order, count, i);
    }
    return r->gathers - before;
}

/* The fewest: gather when needed, and overwrite what is needed last. */
static int fewest(const rig *r, const int *order, int count, int buffers)
{
    int in[QS_GATHER_BUFFERS_MAX], gathers = 0, used = 0;
    for (int i = 0; i < count; i++) {
        int at = -1, farthest = -1, victim = 0;
        for (int b = 0; b < used; b++) {
            int use = i + 1;
            while (use < count && order[use] != in[b]) {
                use++;
            }
            at = in[b] == order[i] ? b : at;
            victim = use > farthest ? b : victim;
            farthest = use > farthest ? use : farthest;
        }
        if (at < 0 && !r->at_hand[order[i]]) {
            gathers++;
            in[used < buffers ? used++ : victim] = order[i];
        }
    }
    return gathers;
}

Test(gather_plan, random_orders_keep_the_rules)
{
    for (unsigned trial = 0; trial < 3000; trial++) {
        const qs_rng rng = qs_rng_make(7, trial, 0, 0, 0);
        const int prefetch = 1 + (int)(qs_rng_u32(&rng, 0) % 6);
        rig r;
        rig_make(&r, qs_rng_u32(&rng, 1) & qs_rng_u32(&rng, 2), prefetch);
        for (uint64_t pass = 0; pass < 3; pass++) {
            int order[MOST];
            const int count = (int)(qs_rng_u32(&rng, 3 + pass) % (MOST + 1));
            for (int i = 0; i < count; i++) {
                order[i] = (int)(qs_rng_u32(&rng, 100 * (pass + 1) + (uint64_t)i) % UNITS);
            }
            const int gathers = run(&r, order, count);
            const int least = fewest(&r, order, count, r.plan.n_buffers);
            cr_assert(pass > 0 || gathers >= least);
            /* gathering ahead costs at most what fits into the buffers less */
            cr_assert_leq(gathers, fewest(&r, order, count, 1));
        }
        qs_gather_plan_destroy(&r.plan);
    }
}

Test(gather_plan, up_and_down_keeps_what_the_turn_needs)
{
    static const int order[] = {0, 1, 2, 3, 4, 5, 4, 3, 2, 1, 0}; /* 5: a head of one unit */
    enum { COUNT = sizeof order / sizeof *order };
    for (int prefetch = 1; prefetch <= 8; prefetch++) {
        rig r;
        rig_make(&r, 7u << 6, prefetch);
        const int buffers = prefetch + 1 < 6 ? prefetch + 1 : 6;
        /* up: all; down: all but those that the buffers still hold, one of which is the head's */
        cr_expect_eq(run(&r, order, COUNT), 6 + 5 - (buffers - 1), "prefetch %d", prefetch);
        /* and again, with the first layers (of more buffers than layers, the head too) there */
        const int there = buffers;
        cr_expect_eq(run(&r, order, COUNT), 6 - there + 5 - (buffers - 1), "prefetch %d", prefetch);
        qs_gather_plan_destroy(&r.plan);
    }
}

Test(gather_plan, nothing_is_gathered_that_is_at_hand)
{
    static const int order[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 7, 6, 5, 4, 3, 2, 1, 0};
    rig r;
    rig_make(&r, (1u << UNITS) - 1, 4);
    cr_expect_eq(r.plan.n_buffers, 0);
    cr_expect_eq(run(&r, order, 2 * UNITS), 0);
    qs_gather_plan_destroy(&r.plan);
    /* Every second unit stays: one gather ahead is two uses ahead. */
    rig_make(&r, 0x155, 1);
    cr_assert_eq(qs_gather_plan_begin(&r.plan, order, 2 * UNITS), QS_OK);
    qs_gather mine, next;
    bool gather = true;
    cr_expect_eq(qs_gather_plan_acquire(&r.plan, 0, &mine, &gather), QS_OK);
    cr_expect(!gather && mine.buffer == -1);
    cr_expect(qs_gather_plan_ahead(&r.plan, &next) && next.unit == 1 && next.position == 1);
    cr_expect(!qs_gather_plan_ahead(&r.plan, &next));
    cr_expect_eq(qs_gather_plan_acquire(&r.plan, 1, &mine, &gather), QS_OK);
    cr_expect(!gather);
    cr_expect(qs_gather_plan_ahead(&r.plan, &next) && next.unit == 3 && next.position == 3);
    qs_gather_plan_destroy(&r.plan);
}

Test(gather_plan, a_held_unit_stays)
{
    static const int order[] = {0, 1, 2, 3};
    rig r;
    qs_gather mine, next;
    bool gather = false;
    rig_make(&r, 0, 1);
    cr_assert_eq(qs_gather_plan_begin(&r.plan, order, 4), QS_OK);
    cr_expect_eq(qs_gather_plan_acquire(&r.plan, 0, &mine, &gather), QS_OK);
    cr_expect(gather && qs_gather_plan_ahead(&r.plan, &next) && next.unit == 1);
    cr_expect_eq(qs_gather_plan_acquire(&r.plan, 1, &mine, &gather), QS_OK);
    cr_expect(!gather && !qs_gather_plan_ahead(&r.plan, &next), "no room for 2");
    cr_expect_eq(qs_gather_plan_acquire(&r.plan, 2, &mine, &gather), QS_ERR_BUG);
    qs_gather_plan_release(&r.plan, 0);
    cr_expect_eq(qs_gather_plan_acquire(&r.plan, 2, &mine, &gather), QS_OK);
    cr_expect(gather);
    qs_gather_plan_drop(&r.plan, mine.buffer);
    cr_expect_eq(qs_gather_plan_buffer_of(&r.plan, 2), -1);
    cr_expect_eq(qs_gather_plan_acquire(&r.plan, 3, &mine, &gather), QS_OK,
                 "a dropped buffer is held");
    qs_gather_plan_destroy(&r.plan);
}
