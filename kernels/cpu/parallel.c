/* Parallel loops on a team of threads of our own.
 *
 * A team belongs to the thread that starts loops (a rank; ranks may be threads of one process). A
 * shared counter hands out tasks, so that a late thread gets fewer of them. A helper joins a loop
 * when it wakes up; when the tasks are all handed out nobody may join any more, and the caller
 * waits only for those who did. So on a machine with more work than cores (ranks side by side) a
 * loop never waits for a helper that has not been scheduled yet; an OpenMP region does, at its
 * closing barrier, and spins meanwhile: a product of 0.17 ms then took 12 ms. */
#include "kernels/cpu/parallel.h"

#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>

#include "base/places.h"

enum {
    WORK_PER_THREAD =
        32768, /* operations that make waking one more thread (about 5 us) worth while */
    MAX_HELPERS = 1023,
    SPINS = 4000, /* 50 to 200 us, between a layer's operations; after that a thread sleeps */
};

typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t wake;
    pthread_t helper[MAX_HELPERS];
    int helpers, sleeping;
    bool stop;
    /* The loop, written by the caller under the lock. */
    qs_task task;
    void *ctx;
    int64_t count;
    bool open;          /* helpers may join */
    int joined, places; /* helpers of this loop, at most `places` */
    _Atomic uint64_t number;
    _Atomic int64_t next;
    _Atomic int working; /* helpers that joined and have not left */
} team;

static pthread_key_t team_key;
static pthread_once_t team_once = PTHREAD_ONCE_INIT;
static int team_key_error;

static void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/* Under the lock: take a place in a loop that this helper has not seen. \return the thread number,
 * 0 if there is none. */
static int take_place(team *t, uint64_t *seen)
{
    if (t->number == *seen) {
        return 0;
    }
    *seen = t->number;
    if (!t->open || t->joined >= t->places) {
        return 0;
    }
    t->working++;
    return ++t->joined;
}

/* Spin, then sleep, until there is a loop to join. \return the thread number in it, 0 to stop. */
static int join_next(team *t, uint64_t *seen)
{
    int thread = 0;
    bool stop = false;
    while (thread == 0 && !stop) {
        for (int i = 0; i < SPINS && t->number == *seen; i++) {
            relax();
        }
        pthread_mutex_lock(&t->lock);
        if (t->number == *seen && !t->stop) {
            t->sleeping++;
            pthread_cond_wait(&t->wake, &t->lock);
            t->sleeping--;
        }
        stop = t->stop;
        thread = stop ? 0 : take_place(t, seen);
        pthread_mutex_unlock(&t->lock);
    }
    return thread;
}

typedef struct {
    team *team;
    int number; /* from 1, for its place; a loop has numbers of its own for those who come */
} helper_start;

static void *helper_main(void *arg)
{
    helper_start start = *(helper_start *)arg;
    free(arg);
    qs_places_take(start.number);
    team *t = start.team;
    uint64_t seen = 0;
    for (int thread = join_next(t, &seen); thread > 0; thread = join_next(t, &seen)) {
        for (int64_t i = t->next++; i < t->count; i = t->next++) {
            t->task(t->ctx, i, thread);
        }
        t->working--; /* the last access: the caller may go on */
    }
    return NULL;
}

static void team_destroy(void *ptr)
{
    team *t = ptr;
    pthread_mutex_lock(&t->lock);
    t->stop = true;
    pthread_cond_broadcast(&t->wake);
    pthread_mutex_unlock(&t->lock);
    for (int i = 0; i < t->helpers; i++) {
        pthread_join(t->helper[i], NULL);
    }
    pthread_cond_destroy(&t->wake);
    pthread_mutex_destroy(&t->lock);
    free(t);
}

static void key_create(void)
{
    team_key_error = pthread_key_create(&team_key, team_destroy);
}

static bool helper_create(team *t)
{
    helper_start *start = malloc(sizeof *start);
    if (start == NULL) {
        return false;
    }
    *start = (helper_start){t, t->helpers + 1};
    if (pthread_create(&t->helper[t->helpers], NULL, helper_main, start) != 0) {
        free(start);
        return false;
    }
    return true;
}

/* This thread's team with as many of `helpers` as can be had; NULL if there can be none. */
static team *team_of_thread(int helpers)
{
    pthread_once(&team_once, key_create);
    if (team_key_error != 0) {
        return NULL;
    }
    team *t = pthread_getspecific(team_key);
    if (t == NULL) {
        t = calloc(1, sizeof *t);
        if (t == NULL || pthread_setspecific(team_key, t) != 0) {
            free(t);
            return NULL;
        }
        pthread_mutex_init(&t->lock, NULL);
        pthread_cond_init(&t->wake, NULL);
    }
    while (t->helpers < helpers && t->helpers < MAX_HELPERS && helper_create(t)) {
        t->helpers++;
    }
    return t;
}

static void begin(team *t, int64_t count, qs_task task, void *ctx, int places)
{
    pthread_mutex_lock(&t->lock);
    t->task = task;
    t->ctx = ctx;
    t->count = count;
    t->next = 0;
    t->joined = 0;
    t->places = places;
    t->open = true;
    t->number++;
    if (t->sleeping > 0) {
        pthread_cond_broadcast(&t->wake);
    }
    pthread_mutex_unlock(&t->lock);
}

/* Close the loop and wait for the helpers that are in it. */
static void end(team *t, qs_queue *queue)
{
    const struct timespec pause = {.tv_nsec = 50000};
    pthread_mutex_lock(&t->lock);
    t->open = false;
    pthread_mutex_unlock(&t->lock);
    for (int spins = 0; t->working > 0; spins++) {
        if (spins < SPINS) {
            relax();
        } else {
            qs_queue_idle(queue); /* a task may be long */
            nanosleep(&pause, NULL);
        }
    }
}

void qs_parallel_for(qs_queue *queue, int64_t count, int64_t work, qs_task task, void *ctx)
{
    int64_t threads = qs_min_i64(qs_queue_threads(queue), count);
    threads = qs_min_i64(threads, 1 + work / WORK_PER_THREAD);
    team *t = threads > 1 ? team_of_thread((int)threads - 1) : NULL;
    if (t == NULL) {
        for (int64_t i = 0; i < count; i++) {
            task(ctx, i, 0);
            qs_queue_idle(queue);
        }
        return;
    }
    begin(t, count, task, ctx, (int)threads - 1);
    for (int64_t i = t->next++; i < count; i = t->next++) {
        task(ctx, i, 0);
        qs_queue_idle(queue);
    }
    end(t, queue);
}

void qs_parallel_await(const _Atomic int64_t *counter, int64_t count)
{
    for (int spins = 0; atomic_load_explicit(counter, memory_order_acquire) < count; spins++) {
        if (spins < SPINS) {
            relax();
        } else {
            sched_yield(); /* more threads than cores: the other one may need this one's */
        }
    }
}
