/* Queues, events and buffers: what a GPU calls stream, event and device memory, with the CPU as
 * one more device.
 *
 * On the CPU work given to a compute queue runs at once in the calling thread. Communication does
 * not: a queue holds the operations that are under way, in order, and moves them along whenever
 * somebody polls it. MPI makes no progress by itself, so the compute queue has an idle callback,
 * which the parallel loops call between tiles, and which polls the communication queue. */
#ifndef QS_DEVICE_DEVICE_H
#define QS_DEVICE_DEVICE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

typedef struct qs_queue qs_queue;

/** A mark in a queue: everything given to the queue before the mark. */
typedef struct {
    qs_queue *queue;
    uint64_t number;
} qs_event;

/** Create a CPU queue. `threads` is how many threads its parallel loops use (at least 1). */
qs_status qs_queue_create(qs_queue **out, int threads);
void qs_queue_destroy(qs_queue *queue);
int qs_queue_threads(const qs_queue *queue);

/** Moves one operation along: sets *finished when it is over. Called from the thread that polls. */
typedef qs_status (*qs_pending_poll)(void *ctx, bool *finished);

/** Append an operation that is already under way. It is polled until finished, then `release(ctx)`
 * is called. */
qs_status qs_queue_push(qs_queue *queue, qs_pending_poll poll, void (*release)(void *), void *ctx);

/** Move the oldest pending operations along without waiting. */
qs_status qs_queue_poll(qs_queue *queue);

/** Wait until the queue is empty. \return the first error of an operation. */
qs_status qs_queue_wait(qs_queue *queue);

/** Mark this point of the queue / wait for a mark. */
qs_event qs_event_record(qs_queue *queue);
qs_status qs_event_wait(qs_event event);

/** Install what the loops of `queue` call from thread 0 between tiles, at most every 200 us. NULL
 * removes it. */
void qs_queue_set_idle(qs_queue *queue, void (*idle)(void *), void *ctx);

/** Call the idle callback if 200 us have passed. Thread 0 of a parallel loop only. */
void qs_queue_idle(qs_queue *queue);

#endif
