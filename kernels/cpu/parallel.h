/* Parallel loops of the CPU kernels.
 *
 * Every index is a task that writes its own part of the output, or adds to one in the order of the
 * indices, so that results do not depend on how many threads there are or on which of them runs
 * what. Between its tasks thread 0 (the
 * caller) lets the communication make progress. */
#ifndef QS_KERNELS_CPU_PARALLEL_H
#define QS_KERNELS_CPU_PARALLEL_H

#include <stdatomic.h>
#include <stdint.h>

#include "base/minmax.h"
#include "device/device.h"

/** One task; `thread` is below qs_queue_threads. */
typedef void (*qs_task)(void *ctx, int64_t index, int thread);

/** Run task(ctx, i, thread) for i = 0..count-1, started in this order, and wait for all of them.
 * `work` is roughly the number of simple operations of the whole loop: a small loop runs in the
 * calling thread, because waking another costs more. */
void qs_parallel_for(qs_queue *queue, int64_t count, int64_t work, qs_task task, void *ctx);

/** In a task: wait until tasks with a lower index, which alone may be waited for, have brought
 * *counter to at least `count` (with memory_order_release). */
void qs_parallel_await(const _Atomic int64_t *counter, int64_t count);

/** Rows per task so that a task touches about 16 Ki elements of rows of `width`. */
static inline int64_t qs_rows_per_task(int64_t width)
{
    int64_t rows = 16384 / (width > 0 ? width : 1);
    return rows > 0 ? rows : 1;
}

static inline int64_t qs_ceil_div(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

#endif
