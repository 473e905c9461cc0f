/* The parallel loop below all operations. */
#define _GNU_SOURCE /* sched_getaffinity */
#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <unistd.h>

#include "base/places.h"
#include "kernels/cpu/parallel.h"
#include "ops_fixture.h"

enum { MUCH_WORK = 1 << 30, MOST = 100 };

typedef struct {
    int threads;
    int hits[MOST];
    _Atomic int inside[8]; /* tasks under way with this thread number */
    _Atomic int wrong;
} loop_record;

static void record_task(void *ctx, int64_t index, int thread)
{
    loop_record *r = ctx;
    if (thread < 0 || thread >= r->threads || ++r->inside[thread] != 1) {
        r->wrong++;
    }
    r->hits[index]++;
    r->inside[thread]--;
}

/* Many loops of changing length and number of threads, one after the other. */
static void *loops_main(void *arg)
{
    int *failures = arg;
    for (int round = 0; round < 400; round++) {
        int threads = 1 + round % 5;
        qs_queue *queue = fx_queue(threads);
        for (int count = 0; count <= MOST; count += 1 + count / 3) {
            loop_record r = {.threads = threads};
            qs_parallel_for(queue, count, MUCH_WORK, record_task, &r);
            for (int i = 0; i < MOST; i++) {
                *failures += r.hits[i] != (i < count);
            }
            *failures += r.wrong;
        }
        qs_queue_destroy(queue);
    }
    return NULL;
}

Test(parallel, every_task_runs_once_with_a_thread_number_of_its_own)
{
    int failures = 0;
    loops_main(&failures);
    cr_assert_eq(failures, 0);
}

Test(parallel, several_callers_do_not_meet)
{
    enum { CALLERS = 3 };
    pthread_t caller[CALLERS];
    int failures[CALLERS] = {0};
    for (int i = 0; i < CALLERS; i++) {
        cr_assert_eq(pthread_create(&caller[i], NULL, loops_main, &failures[i]), 0);
    }
    for (int i = 0; i < CALLERS; i++) {
        pthread_join(caller[i], NULL);
        cr_assert_eq(failures[i], 0, "caller %d", i);
    }
}

/* Waits, for at most 20 s, until as many tasks are under way as there are threads. */
static void meet_task(void *ctx, int64_t index, int thread)
{
    (void)index;
    (void)thread;
    loop_record *r = ctx;
    r->inside[0]++;
    for (int i = 0; i < 20000 && r->inside[0] < r->threads; i++) {
        usleep(1000);
    }
}

ParameterizedTestParameters(parallel, all_threads_are_at_work_at_once)
{
    static int threads[] = {1, 2, 3, 4};
    return cr_make_param_array(int, threads, sizeof threads / sizeof *threads);
}
ParameterizedTest(int *threads, parallel, all_threads_are_at_work_at_once, .timeout = 60)
{
    qs_queue *queue = fx_queue(*threads);
    for (int round = 0; round < 3; round++) {
        loop_record r = {.threads = *threads};
        qs_parallel_for(queue, *threads, MUCH_WORK, meet_task, &r);
        cr_assert_eq(r.inside[0], *threads);
        usleep(2000); /* the helpers fall asleep, and must wake again */
    }
    qs_queue_destroy(queue);
}

static void note_thread(void *ctx, int64_t index, int thread)
{
    ((int *)ctx)[index] = thread;
}

Test(parallel, little_work_stays_in_the_calling_thread)
{
    int thread[MOST];
    qs_queue *queue = fx_queue(4);
    qs_parallel_for(queue, MOST, 1000, note_thread, thread);
    for (int i = 0; i < MOST; i++) {
        cr_assert_eq(thread[i], 0);
    }
    qs_queue_destroy(queue);
}

typedef struct {
    _Atomic int64_t done;
    uint64_t value;
} ordered_sum;

/* Does not commute: another order is another value. */
static void ordered_task(void *ctx, int64_t index, int thread)
{
    ordered_sum *sum = ctx;
    qs_parallel_await(&sum->done, index);
    sum->value = sum->value * 31 + (uint64_t)index;
    if (index % 7 == 3 && thread % 2 == 1) {
        usleep(500); /* the others come to wait */
    }
    atomic_store_explicit(&sum->done, index + 1, memory_order_release);
}

Test(parallel, tasks_may_wait_for_earlier_ones, .timeout = 60)
{
    ordered_sum alone = {0};
    for (int threads = 1; threads <= 9; threads += 2) {
        qs_queue *queue = fx_queue(threads);
        ordered_sum sum = {0};
        qs_parallel_for(queue, 300, MUCH_WORK, ordered_task, &sum);
        cr_assert_eq(sum.done, 300);
        alone = threads == 1 ? sum : alone;
        cr_assert_eq(sum.value, alone.value, "%d threads", threads);
        qs_queue_destroy(queue);
    }
}

typedef struct {
    _Atomic int inside;
    cpu_set_t set[3]; /* of each thread */
} affinities;

static void note_affinity(void *ctx, int64_t index, int thread)
{
    (void)index;
    affinities *a = ctx;
    sched_getaffinity(0, sizeof a->set[thread], &a->set[thread]);
    a->inside++;
    for (int i = 0; i < 20000 && a->inside < 3; i++) {
        usleep(1000);
    }
}

/* On the two ends of what there is, in either order; the caller goes where it went before. */
Test(parallel, helpers_go_to_their_places, .timeout = 60)
{
    cpu_set_t all;
    cr_assert_eq(sched_getaffinity(0, sizeof all, &all), 0);
    int first = CPU_SETSIZE, last = 0;
    for (int i = 0; i < CPU_SETSIZE; i++) {
        if (CPU_ISSET((size_t)i, &all)) {
            first = i < first ? i : first;
            last = i;
        }
    }
    qs_places_set((const int[]){first, last, first}, 3);
    qs_queue *queue = fx_queue(3);
    affinities a = {0};
    qs_parallel_for(queue, 3, MUCH_WORK, note_affinity, &a);
    cr_assert(CPU_EQUAL(&a.set[0], &all));
    cr_assert(CPU_COUNT(&a.set[1]) == 1 && CPU_COUNT(&a.set[2]) == 1);
    cr_assert((CPU_ISSET((size_t)last, &a.set[1]) && CPU_ISSET((size_t)first, &a.set[2])) ||
              (CPU_ISSET((size_t)first, &a.set[1]) && CPU_ISSET((size_t)last, &a.set[2])));
    qs_queue_destroy(queue);
}
