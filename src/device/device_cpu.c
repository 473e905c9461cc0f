/* The CPU as a device: compute runs in the caller, communication is a list of operations under way.
 *
 * The list is a ring that grows by doubling; operations leave it in the order in which they were
 * pushed, so that an event is nothing but the number of operations pushed before it. After the
 * first error the operations behind it are dropped (their buffers may be freed then) and the error
 * stays: the communicator behind them is not usable any more. */
#include "device/device.h"

#include <sched.h>
#include <stdlib.h>

#include "base/timer.h"

enum { FIRST_CAPACITY = 16 };
static const double IDLE_PERIOD_S = 200e-6;

typedef struct {
    qs_pending_poll poll;
    void (*release)(void *);
    void *ctx;
} pending;

struct qs_queue {
    int threads;
    pending *ring; /* [capacity], a power of two; operation n is at n & (capacity - 1) */
    uint64_t capacity;
    uint64_t first, end; /* numbers of the oldest operation and of the next one to be pushed */
    bool polling;        /* an operation's poll is running: it must not poll this queue again */
    qs_status failed;    /* first error of an operation, kept for good */
    void (*idle)(void *);
    void *idle_ctx;
    bool in_idle;
    double idle_at_s; /* when the callback was last called */
};

qs_status qs_queue_create(qs_queue **out, int threads)
{
    *out = NULL;
    if (threads < 1) {
        return QS_FAIL(QS_ERR_BUG, "a queue needs at least 1 thread, not %d", threads);
    }
    qs_queue *queue = calloc(1, sizeof *queue);
    pending *ring = calloc(FIRST_CAPACITY, sizeof *ring);
    if (queue == NULL || ring == NULL) {
        free(queue);
        free(ring);
        return QS_FAIL(QS_ERR_MEMORY, "memory: a queue cannot be allocated");
    }
    queue->threads = threads;
    queue->ring = ring;
    queue->capacity = FIRST_CAPACITY;
    *out = queue;
    return QS_OK;
}

static pending *pending_at(qs_queue *queue, uint64_t number)
{
    return &queue->ring[number & (queue->capacity - 1)];
}

static void drop_first(qs_queue *queue)
{
    pending done = *pending_at(queue, queue->first);
    queue->first++;
    if (done.release != NULL) {
        done.release(done.ctx);
    }
}

static void drop_all(qs_queue *queue)
{
    while (queue->first < queue->end) {
        drop_first(queue);
    }
}

void qs_queue_destroy(qs_queue *queue)
{
    if (queue == NULL) {
        return;
    }
    drop_all(queue);
    free(queue->ring);
    free(queue);
}

int qs_queue_threads(const qs_queue *queue)
{
    return queue->threads;
}

static qs_status grow(qs_queue *queue)
{
    pending *ring = calloc(2 * queue->capacity, sizeof *ring);
    if (ring == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "memory: a queue cannot grow to %llu operations",
                       (unsigned long long)(2 * queue->capacity));
    }
    for (uint64_t n = queue->first; n < queue->end; n++) {
        ring[n & (2 * queue->capacity - 1)] = *pending_at(queue, n);
    }
    free(queue->ring);
    queue->ring = ring;
    queue->capacity *= 2;
    return QS_OK;
}

qs_status qs_queue_push(qs_queue *queue, qs_pending_poll poll, void (*release)(void *), void *ctx)
{
    if (queue->failed != QS_OK) {
        return queue->failed;
    }
    if (queue->end - queue->first == queue->capacity) {
        QS_TRY(grow(queue));
    }
    *pending_at(queue, queue->end) = (pending){.poll = poll, .release = release, .ctx = ctx};
    queue->end++;
    return QS_OK;
}

qs_status qs_queue_poll(qs_queue *queue)
{
    if (queue->polling) {
        return queue->failed;
    }
    queue->polling = true;
    while (queue->failed == QS_OK && queue->first < queue->end) {
        pending op = *pending_at(queue, queue->first);
        bool finished = false;
        queue->failed = op.poll(op.ctx, &finished);
        if (queue->failed == QS_OK && !finished) {
            break;
        }
        if (queue->failed == QS_OK) {
            drop_first(queue);
        } else {
            drop_all(queue);
        }
    }
    queue->polling = false;
    return queue->failed;
}

static qs_status wait_until(qs_queue *queue, uint64_t number)
{
    QS_TRY(qs_queue_poll(queue));
    while (queue->first < number) {
        sched_yield(); /* ranks may share a core; the one that is waited for should have it */
        QS_TRY(qs_queue_poll(queue));
    }
    return QS_OK;
}

qs_status qs_queue_wait(qs_queue *queue)
{
    return wait_until(queue, queue->end);
}

qs_event qs_event_record(qs_queue *queue)
{
    return (qs_event){.queue = queue, .number = queue->end};
}

qs_status qs_event_wait(qs_event event)
{
    return event.queue != NULL ? wait_until(event.queue, event.number) : QS_OK;
}

void qs_queue_set_idle(qs_queue *queue, void (*idle)(void *), void *ctx)
{
    queue->idle = idle;
    queue->idle_ctx = ctx;
    queue->idle_at_s = 0.0;
}

void qs_queue_idle(qs_queue *queue)
{
    if (queue->idle == NULL || queue->in_idle) {
        return;
    }
    double now_s = qs_time_s();
    if (now_s - queue->idle_at_s < IDLE_PERIOD_S) {
        return;
    }
    queue->in_idle = true;
    queue->idle(queue->idle_ctx);
    queue->in_idle = false;
    queue->idle_at_s = qs_time_s();
}
