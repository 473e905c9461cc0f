/* Parallel loops on OpenMP: a shared counter hands out tasks, so that a thread that is late gets
 * fewer of them. */
#include "kernels/cpu/parallel.h"

#include <omp.h>
#include <stdatomic.h>

/* Operations that make waking one more thread (about 3 us) worth while. */
enum { WORK_PER_THREAD = 32768 };

void qs_parallel_for(qs_queue *queue, int64_t count, int64_t work, qs_task task, void *ctx)
{
    int64_t threads = qs_min_i64(qs_queue_threads(queue), count);
    threads = qs_min_i64(threads, 1 + work / WORK_PER_THREAD);
    if (threads <= 1) {
        for (int64_t i = 0; i < count; i++) {
            task(ctx, i, 0);
            qs_queue_idle(queue);
        }
        return;
    }
    _Atomic int64_t next = 0;
#pragma omp parallel num_threads((int)threads) default(none) shared(next, count, task, ctx, queue)
    {
        int thread = omp_get_thread_num();
        for (int64_t i = next++; i < count; i = next++) {
            task(ctx, i, thread);
            if (thread == 0) {
                qs_queue_idle(queue);
            }
        }
    }
}
