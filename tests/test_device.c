/* The CPU queue: order, events, errors, and the idle callback. */
#include <criterion/criterion.h>
#include <stdbool.h>

#include "base/timer.h"
#include "device/device.h"

/* An operation that finishes after `polls` polls, or fails. */
typedef struct {
    int polls;
    qs_status fail;
    int released;
    int *clock; /* counts finished operations */
    int finished_at;
} fake_op;

static qs_status fake_poll(void *ctx, bool *finished)
{
    fake_op *op = ctx;
    if (op->fail != QS_OK) {
        return op->fail;
    }
    *finished = op->polls-- <= 0;
    if (*finished) {
        op->finished_at = ++*op->clock;
    }
    return QS_OK;
}

static void fake_release(void *ctx)
{
    ((fake_op *)ctx)->released++;
}

static qs_queue *queue;
static int clock_now;

static void setup(void)
{
    clock_now = 0;
    cr_assert_eq(qs_queue_create(&queue, 2), QS_OK);
}

static void teardown(void)
{
    qs_queue_destroy(queue);
}

TestSuite(device, .init = setup, .fini = teardown);

Test(device, operations_finish_in_order_and_are_released_once)
{
    enum { N = 100 }; /* more than the first ring */
    fake_op ops[N];
    for (int i = 0; i < N; i++) {
        ops[i] = (fake_op){.polls = (i * 7) % 5, .clock = &clock_now};
        cr_assert_eq(qs_queue_push(queue, fake_poll, fake_release, &ops[i]), QS_OK);
    }
    cr_assert_eq(qs_queue_wait(queue), QS_OK);
    for (int i = 0; i < N; i++) {
        cr_assert_eq(ops[i].finished_at, i + 1);
        cr_assert_eq(ops[i].released, 1);
    }
}

Test(device, ring_grows_while_its_start_is_not_at_zero)
{
    fake_op first[10], more[40];
    for (int i = 0; i < 10; i++) {
        first[i] = (fake_op){.clock = &clock_now};
        qs_queue_push(queue, fake_poll, fake_release, &first[i]);
    }
    cr_assert_eq(qs_queue_poll(queue), QS_OK);
    for (int i = 0; i < 40; i++) {
        more[i] = (fake_op){.polls = 1, .clock = &clock_now};
        qs_queue_push(queue, fake_poll, fake_release, &more[i]);
    }
    cr_assert_eq(qs_queue_wait(queue), QS_OK);
    for (int i = 0; i < 40; i++) {
        cr_assert_eq(more[i].finished_at, 11 + i);
    }
}

Test(device, poll_does_not_wait)
{
    static fake_op slow = {.polls = 1000000, .clock = &clock_now};
    qs_queue_push(queue, fake_poll, fake_release, &slow);
    cr_assert_eq(qs_queue_poll(queue), QS_OK);
    cr_assert_eq(slow.released, 0);
    cr_assert_eq(slow.polls, 999999);
}

Test(device, event_waits_for_what_was_before_it_only)
{
    fake_op before = {.polls = 3, .clock = &clock_now};
    static fake_op after = {.polls = 1000000, .clock = &clock_now};
    qs_queue_push(queue, fake_poll, fake_release, &before);
    qs_event mark = qs_event_record(queue);
    qs_queue_push(queue, fake_poll, fake_release, &after);
    cr_assert_eq(qs_event_wait(mark), QS_OK);
    cr_assert_eq(before.released, 1);
    cr_assert_eq(after.released, 0);
    cr_assert_eq(qs_event_wait(mark), QS_OK, "a mark that has passed");
    cr_assert_eq(qs_event_wait((qs_event){0}), QS_OK, "no mark at all");
}

Test(device, first_error_stays_and_releases_the_rest)
{
    fake_op good = {.clock = &clock_now}, bad = {.fail = QS_ERR_PEER, .clock = &clock_now},
            behind = {.clock = &clock_now};
    qs_queue_push(queue, fake_poll, fake_release, &good);
    qs_queue_push(queue, fake_poll, fake_release, &bad);
    qs_queue_push(queue, fake_poll, fake_release, &behind);
    qs_event mark = qs_event_record(queue);
    cr_assert_eq(qs_queue_wait(queue), QS_ERR_PEER);
    cr_assert(good.released == 1 && bad.released == 1 && behind.released == 1);
    cr_assert_eq(behind.finished_at, 0);
    cr_assert_eq(qs_event_wait(mark), QS_ERR_PEER);
    cr_assert_eq(qs_queue_poll(queue), QS_ERR_PEER);
    cr_assert_eq(qs_queue_push(queue, fake_poll, fake_release, &good), QS_ERR_PEER);
}

Test(device, destroy_releases_what_is_under_way)
{
    qs_queue *other;
    fake_op op = {.polls = 1000, .clock = &clock_now};
    cr_assert_eq(qs_queue_create(&other, 1), QS_OK);
    qs_queue_push(other, fake_poll, fake_release, &op);
    qs_queue_destroy(other);
    cr_assert_eq(op.released, 1);
    qs_queue_destroy(NULL);
}

Test(device, zero_threads_are_refused)
{
    qs_queue *other = queue;
    cr_assert_eq(qs_queue_create(&other, 0), QS_ERR_BUG);
    cr_assert_null(other);
    cr_assert_eq(qs_queue_threads(queue), 2);
}

static qs_status poll_own_queue(void *ctx, bool *finished)
{
    *finished = true;
    return qs_queue_poll(ctx);
}

Test(device, a_poll_that_polls_its_queue_does_not_recurse)
{
    qs_queue_push(queue, poll_own_queue, NULL, queue);
    cr_assert_eq(qs_queue_wait(queue), QS_OK);
}

typedef struct {
    int calls;
    double last_s, shortest_s;
} idle_log;

static void log_idle(void *ctx)
{
    idle_log *log = ctx;
    double now_s = qs_time_s();
    double gap_s = now_s - log->last_s;
    if (log->calls > 0 && gap_s < log->shortest_s) {
        log->shortest_s = gap_s;
    }
    log->last_s = now_s;
    log->calls++;
    qs_queue_idle(queue); /* must not call us again */
}

/* Not a speed test: a busy machine makes the gaps longer, never shorter. */
Test(device, idle_is_called_at_most_every_200_us)
{
    idle_log log = {.shortest_s = 1e9};
    qs_queue_idle(queue); /* none installed */
    qs_queue_set_idle(queue, log_idle, &log);
    while (log.calls < 20) {
        qs_queue_idle(queue);
    }
    cr_assert_geq(log.shortest_s, 199e-6);
    qs_queue_set_idle(queue, NULL, NULL);
    qs_queue_idle(queue);
    cr_assert_eq(log.calls, 20);
}
