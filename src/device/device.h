/* A processor with its memory: buffers, queues and events, which a GPU calls device memory, streams
 * and events. The CPU is one more device, and the one that defines what the calls mean.
 *
 * Work is given to a queue and runs in the order in which it was given. On the CPU, work given to a
 * compute queue runs at once in the calling thread. Communication does not: a queue holds the
 * operations that are under way, in order, and moves them along whenever somebody polls it. MPI
 * makes no progress by itself, so the compute queue has an idle callback, which the parallel loops
 * call between tiles, and which polls the communication queue. On a GPU everything is asynchronous;
 * what depends on another queue says so with qs_queue_after, and the host waits with qs_queue_wait
 * or qs_event_wait alone. Code that keeps to this runs on both without asking which it is. */
#ifndef QS_DEVICE_DEVICE_H
#define QS_DEVICE_DEVICE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/mem.h"
#include "base/status.h"

typedef struct qs_device qs_device;
typedef struct qs_queue qs_queue;

/** A mark in a queue: everything given to the queue before the mark. */
typedef struct {
    qs_queue *queue; /* NULL: a mark that has passed */
    uint64_t number;
} qs_event;

/* ---- device and memory ---- */

/** The CPU. It lives as long as the process. */
qs_device *qs_device_cpu(void);

/** Close a device from a plugin: all its buffers and queues are gone. The CPU and NULL are fine. */
void qs_device_close(qs_device *device);

const char *qs_device_name(const qs_device *device); /* "cpu", "cuda" */

/** True where device memory is the host's own: what is copied there need not be copied. */
bool qs_device_is_host(const qs_device *device);

/** What the log and the run's record say about the device, one line: name, capability, versions. */
const char *qs_device_description(const qs_device *device);

/** What of it can decide the bits of a result, likewise: "" for the CPU, where nothing does. */
const char *qs_device_traits(const qs_device *device);

/** Bytes that can still be allocated, and in all; 0 where nobody knows (the CPU). */
void qs_device_memory(const qs_device *device, size_t *free_bytes, size_t *total_bytes);

/** Take `bytes` from the device at once, as the arena that qs_device_alloc then carves, so that
 * nothing else can fail for lack of memory. The CPU needs none.
 * \return QS_ERR_MEMORY with both numbers. */
qs_status qs_device_reserve(qs_device *device, size_t bytes);

/** Allocate zeroed memory of the device, aligned to 256 bytes (CPU: 64), counted under `kind` of
 * its space. 0 bytes gives NULL. Synchronous: not for the step loop. */
qs_status qs_device_alloc(qs_device *device, void **out, size_t bytes, qs_mem_class kind);
void qs_device_free(qs_device *device, void *ptr);

/** Host memory that the device copies from and to asynchronously (pinned), and can read from its
 * kernels. Zeroed, counted under `kind` of the host. */
qs_status qs_device_host_alloc(qs_device *device, void **out, size_t bytes, qs_mem_class kind);
void qs_device_host_free(qs_device *device, void *ptr);

/** Allocation with the macro's own type: QS_TRY(QS_DEVICE_ALLOC(device, &p, n, class)) */
#define QS_DEVICE_ALLOC(device, pp, count, kind)                                                   \
    qs_device_alloc((device), (void **)(pp), (size_t)(count) * sizeof **(pp), (kind))
#define QS_HOST_ALLOC(device, pp, count, kind)                                                     \
    qs_device_host_alloc((device), (void **)(pp), (size_t)(count) * sizeof **(pp), (kind))

enum { QS_DEVICE_WATCHES_MAX = 4 };

/** While the host waits for a queue of the device, call `watch` some times a second; an error that
 * it returns ends the wait. For communicators whose operations never end when a peer is lost. The
 * CPU's queues poll by themselves and need none. QS_ERR_BUG: too many. */
qs_status qs_device_watch(qs_device *device, qs_status (*watch)(void *ctx), void *ctx);
/** No longer; nothing if `ctx` is none of them. */
void qs_device_unwatch(qs_device *device, const void *ctx);

/* ---- queues ---- */

/** Create a CPU queue. `threads` is how many threads its parallel loops use (at least 1). */
qs_status qs_queue_create(qs_queue **out, int threads);

/** Create a queue of `device`. `threads` matters to the CPU only. */
qs_status qs_queue_create_on(qs_device *device, qs_queue **out, int threads);
void qs_queue_destroy(qs_queue *queue);
qs_device *qs_queue_device(const qs_queue *queue);
int qs_queue_threads(const qs_queue *queue);

/** What the vendor calls this queue (cudaStream_t); NULL on the CPU. */
void *qs_queue_native(const qs_queue *queue);

/** Copy `bytes` between any two of host memory and the queue's device memory, in queue order.
 * Pageable host memory may be reused when the call returns, pinned memory when the queue has
 * passed. */
qs_status qs_queue_copy(qs_queue *queue, void *to, const void *from, size_t bytes);

/** Set `bytes` of device memory to zero, in queue order. */
qs_status qs_queue_zero(qs_queue *queue, void *ptr, size_t bytes);

/** Wait until the queue is empty. \return the first error of an operation. */
qs_status qs_queue_wait(qs_queue *queue);

/** Mark this point of the queue. */
qs_event qs_event_record(qs_queue *queue);

/** The host waits for the mark. */
qs_status qs_event_wait(qs_event event);

/** What is given to `queue` from now on runs after the mark. On the CPU the host waits, since work
 * runs in the caller. */
qs_status qs_queue_after(qs_queue *queue, qs_event event);

/* ---- mirrors ---- */

/** A buffer that both sides see: pinned memory of the host and memory of the device, brought in
 * step by push and pull. On the CPU both are one buffer, and nothing is copied. */
typedef struct {
    void *host, *device;
    size_t bytes;
} qs_mirror;

/** Allocate both sides, zeroed, under `kind` of their spaces. */
qs_status qs_mirror_create(qs_device *device, qs_mirror *mirror, size_t bytes, qs_mem_class kind);
void qs_mirror_destroy(qs_device *device, qs_mirror *mirror);

/** Copy bytes [at, at + bytes) to the device / to the host, in queue order. The host side must not
 * be written before the queue has passed a push, nor read before it has passed a pull. */
qs_status qs_mirror_push(qs_queue *queue, const qs_mirror *mirror, size_t at, size_t bytes);
qs_status qs_mirror_pull(qs_queue *queue, const qs_mirror *mirror, size_t at, size_t bytes);

/* ---- what a profiler shows ---- */

/** Name what the host gives to the queue until qs_span_end; spans nest. For a profiler on a GPU;
 * on the CPU in the trace (base/trace.h). Costs next to nothing without either. */
void qs_span_begin(qs_queue *queue, const char *format, ...) __attribute__((format(printf, 2, 3)));
void qs_span_end(qs_queue *queue);

/** Tell an attached profiler to start or stop collecting. */
void qs_device_profile(qs_device *device, bool on);

/* ---- operations that are moved along by polling: CPU queues only ---- */

/** Moves one operation along: sets *finished when it is over. Called from the thread that polls. */
typedef qs_status (*qs_pending_poll)(void *ctx, bool *finished);

/** Append an operation that is already under way. It is polled until finished, then `release(ctx)`
 * is called. */
qs_status qs_queue_push(qs_queue *queue, qs_pending_poll poll, void (*release)(void *), void *ctx);

/** Move the oldest pending operations along without waiting. */
qs_status qs_queue_poll(qs_queue *queue);

/** Install what the loops of `queue` call from thread 0 between tiles, at most every 200 us. NULL
 * removes it. Elsewhere than on the CPU nothing needs it and nothing happens. */
void qs_queue_set_idle(qs_queue *queue, void (*idle)(void *), void *ctx);

/** Call the idle callback if 200 us have passed. Thread 0 of a parallel loop only. */
void qs_queue_idle(qs_queue *queue);

#endif
