/* The CPU as a device: compute runs in the caller, communication is a list of operations under way.
 *
 * The list is a ring that grows by doubling; operations leave it in the order in which they were
 * pushed, so that an event is nothing but the number of operations pushed before it. After the
 * first error the operations behind it are dropped (their buffers may be freed then) and the error
 * stays: the communicator behind them is not usable any more. */
#include "device/device_impl.h"

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/timer.h"
#include "base/trace.h"
#include "base/watch.h"

enum { FIRST_CAPACITY = 16, SPANS_MAX = 8 };
static const double IDLE_PERIOD_S = 200e-6;

typedef struct {
    qs_pending_poll poll;
    void (*release)(void *);
    void *ctx;
} pending;

/* A range that has begun, while tracing is on. */
typedef struct {
    char name[64];
    double begin_s;
} open_span;

typedef struct {
    qs_queue base;
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
    open_span spans[SPANS_MAX];
    int depth; /* of the spans, kept or not */
} cpu_queue;

static qs_status queue_create(qs_device *device, qs_queue **out, int threads)
{
    if (threads < 1) {
        return QS_FAIL(QS_ERR_BUG, "a queue needs at least 1 thread, not %d", threads);
    }
    cpu_queue *queue = calloc(1, sizeof *queue);
    pending *ring = calloc(FIRST_CAPACITY, sizeof *ring);
    if (queue == NULL || ring == NULL) {
        free(queue);
        free(ring);
        return QS_FAIL(QS_ERR_MEMORY, "memory: a queue cannot be allocated");
    }
    queue->base = (qs_queue){.ops = &qs_device_cpu_ops, .device = device};
    queue->threads = threads;
    queue->ring = ring;
    queue->capacity = FIRST_CAPACITY;
    *out = &queue->base;
    return QS_OK;
}

static pending *pending_at(cpu_queue *queue, uint64_t number)
{
    return &queue->ring[number & (queue->capacity - 1)];
}

static void drop_first(cpu_queue *queue)
{
    pending done = *pending_at(queue, queue->first);
    queue->first++;
    if (done.release != NULL) {
        done.release(done.ctx);
    }
}

static void drop_all(cpu_queue *queue)
{
    while (queue->first < queue->end) {
        drop_first(queue);
    }
}

static void queue_destroy(qs_queue *base)
{
    cpu_queue *queue = (cpu_queue *)base;
    drop_all(queue);
    free(queue->ring);
    free(queue);
}

static int queue_threads(const qs_queue *base)
{
    return ((const cpu_queue *)base)->threads;
}

static qs_status grow(cpu_queue *queue)
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

static qs_status push(qs_queue *base, qs_pending_poll poll, void (*release)(void *), void *ctx)
{
    cpu_queue *queue = (cpu_queue *)base;
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

static qs_status poll_all(qs_queue *base)
{
    cpu_queue *queue = (cpu_queue *)base;
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
        qs_watch_moved();
        if (queue->failed == QS_OK) {
            drop_first(queue);
        } else {
            drop_all(queue);
        }
    }
    queue->polling = false;
    return queue->failed;
}

static qs_status wait_for(qs_queue *base, uint64_t number)
{
    const cpu_queue *queue = (const cpu_queue *)base;
    QS_TRY(poll_all(base));
    while (queue->first < number) {
        sched_yield(); /* ranks may share a core; the one that is waited for should have it */
        QS_TRY(poll_all(base));
    }
    return QS_OK;
}

static uint64_t record(qs_queue *base)
{
    return ((const cpu_queue *)base)->end;
}

static qs_status wait_empty(qs_queue *base)
{
    return wait_for(base, record(base));
}

static void set_idle(qs_queue *base, void (*idle)(void *), void *ctx)
{
    cpu_queue *queue = (cpu_queue *)base;
    queue->idle = idle;
    queue->idle_ctx = ctx;
    queue->idle_at_s = 0.0;
}

static void call_idle(qs_queue *base)
{
    cpu_queue *queue = (cpu_queue *)base;
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

/* ---- spans of the trace ---- */

static void span_begin(qs_queue *base, const char *name)
{
    cpu_queue *queue = (cpu_queue *)base;
    if (queue->depth < SPANS_MAX) {
        open_span *span = &queue->spans[queue->depth];
        snprintf(span->name, sizeof span->name, "%s", name);
        span->begin_s = qs_time_s();
    }
    queue->depth++;
}

static void span_end(qs_queue *base)
{
    cpu_queue *queue = (cpu_queue *)base;
    if (--queue->depth < SPANS_MAX) {
        const open_span *span = &queue->spans[queue->depth];
        qs_trace_add(QS_LANE_COMPUTE, span->begin_s, qs_time_s(), "%s", span->name);
    }
}

/* ---- memory: the host's ---- */

static qs_status alloc(qs_device *device, void **out, size_t bytes, qs_mem_class kind)
{
    (void)device;
    return qs_mem_alloc(out, bytes, kind);
}

static void free_memory(qs_device *device, void *ptr)
{
    (void)device;
    qs_mem_free(ptr);
}

static qs_status copy(qs_queue *queue, void *to, const void *from, size_t bytes)
{
    (void)queue;
    memcpy(to, from, bytes);
    return QS_OK;
}

static qs_status zero(qs_queue *queue, void *ptr, size_t bytes)
{
    (void)queue;
    memset(ptr, 0, bytes);
    return QS_OK;
}

const qs_device_ops qs_device_cpu_ops = {
    .name = "cpu",
    .is_host = true,
    .alloc = alloc,
    .free = free_memory,
    .host_alloc = alloc,
    .host_free = free_memory,
    .queue_create = queue_create,
    .queue_destroy = queue_destroy,
    .queue_threads = queue_threads,
    .copy = copy,
    .zero = zero,
    .wait = wait_empty,
    .record = record,
    .wait_for = wait_for,
    .push = push,
    .poll = poll_all,
    .set_idle = set_idle,
    .idle = call_idle,
    .span_begin = span_begin,
    .span_end = span_end,
};
