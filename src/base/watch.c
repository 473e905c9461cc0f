#include "base/watch.h"

#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "base/cause.h"
#include "base/timer.h"

enum { MISSING_MAX = 4, SLOWER = 4, PRINT_LIMIT_S = 5, TURNS = 10 };
static const double TICK_MAX_S = 1.0, TURN_MAX_S = 1.0;

/* The rank's thread writes, the watching one reads; what is not atomic under the lock. */
struct qs_watch {
    qs_watch_options options;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    bool stop;
    char section[48];
    double section_s; /* when it began */
    bool patient;

    _Atomic uint64_t moves;
    const char *_Atomic waits_for; /* NULL: works */
    atomic_bool asks;
    int missing[MISSING_MAX], missing_count; /* so many that there are more: not in full */
};

static _Thread_local qs_watch *mine;

/* ---- notes ---- */

void qs_watch_moved(void)
{
    if (mine != NULL) {
        atomic_fetch_add_explicit(&mine->moves, 1, memory_order_relaxed);
    }
}

const char *qs_watch_wait(const char *what)
{
    if (mine == NULL) {
        return NULL;
    }
    qs_watch_moved();
    return atomic_exchange_explicit(&mine->waits_for, what, memory_order_relaxed);
}

void qs_watch_section(bool patient, const char *format, ...)
{
    if (mine == NULL) {
        return;
    }
    va_list args;
    va_start(args, format);
    pthread_mutex_lock(&mine->lock);
    vsnprintf(mine->section, sizeof mine->section, format, args);
    mine->section_s = qs_time_s();
    mine->patient = patient;
    qs_watch_moved(); /* before the watch looks: a limit that is less patient meets a new move */
    pthread_mutex_unlock(&mine->lock);
    va_end(args);
}

bool qs_watch_asks(void)
{
    return mine != NULL && atomic_load_explicit(&mine->asks, memory_order_relaxed);
}

void qs_watch_missing(const int *ranks, int count)
{
    pthread_mutex_lock(&mine->lock);
    mine->missing_count = count;
    for (int i = 0; i < count && i < MISSING_MAX; i++) {
        mine->missing[i] = ranks[i];
    }
    pthread_mutex_unlock(&mine->lock);
    atomic_store_explicit(&mine->asks, false, memory_order_relaxed);
}

/* ---- the watching thread ---- */

static double at_most(double limit, double value)
{
    return value < limit ? value : limit;
}

/* How long nothing has moved, in time that this process was awake. */
typedef struct {
    uint64_t moves;
    double at_s, idle_s, moved_s; /* last look; awake since the last move; when that was */
} stillness;

static void look(qs_watch *w, stillness *still, double tick_s)
{
    const double now = qs_time_s(), passed = now - still->at_s;
    const uint64_t moves = atomic_load_explicit(&w->moves, memory_order_relaxed);
    still->at_s = now;
    if (moves != still->moves) {
        still->moves = moves;
        still->moved_s = now;
        still->idle_s = 0;
        w->missing_count = 0;
        atomic_store_explicit(&w->asks, false, memory_order_relaxed);
    } else {
        still->idle_s += passed < 2 * tick_s ? passed : tick_s;
    }
}

static double limit_of(const qs_watch *w, const stillness *still)
{
    const double limit = w->options.limit_s, worked = SLOWER * (still->moved_s - w->section_s);
    if (w->patient) {
        return QS_WATCH_PATIENT * limit;
    }
    return worked > limit ? worked : limit;
}

static void name_rank(const qs_watch *w, int rank, char *out, size_t capacity)
{
    if (w->options.hosts != NULL) {
        snprintf(out, capacity, "rank %d on %s", rank, w->options.hosts[rank]);
    } else {
        snprintf(out, capacity, "rank %d", rank);
    }
}

/* "rank 3 on c and rank 5 on d", "rank 3 on c and 12 more ranks" */
static void name_missing(const qs_watch *w, char *out, size_t capacity)
{
    size_t at = 0;
    const int named = w->missing_count <= MISSING_MAX ? w->missing_count : 1;
    for (int i = 0; i < named && at < capacity; i++) {
        char name[QS_WATCH_NAME_MAX + 32];
        name_rank(w, w->missing[i], name, sizeof name);
        const char *joint = i == 0 ? "" : i == named - 1 ? " and " : ", ";
        at += (size_t)snprintf(out + at, capacity - at, "%s%s", joint, name);
    }
    if (named < w->missing_count && at < capacity) {
        snprintf(out + at, capacity - at, " and %d more ranks", w->missing_count - named);
    }
}

static qs_status describe(const qs_watch *w, const char *waits_for, double idle_s)
{
    char me[QS_WATCH_NAME_MAX + 32], missing[512] = "";
    name_rank(w, w->options.rank, me, sizeof me);
    name_missing(w, missing, sizeof missing);
    if (waits_for == NULL) {
        return QS_FAIL(QS_ERR_STALL, "%s: %s has not got on for %.0f s, and waits for no other; %s",
                       w->section, me, idle_s, w->options.remedy);
    }
    return w->missing_count > 0
               ? QS_FAIL(QS_ERR_STALL, "%s: nothing has come from %s for %.0f s; %s", w->section,
                         missing, idle_s, w->options.remedy)
               : QS_FAIL(QS_ERR_STALL, "%s: %s has waited %.0f s for %s; %s", w->section, me,
                         idle_s, waits_for, w->options.remedy);
}

/* Who speaks, since the launcher ends the others then: a rank that is stuck by itself, else one
 * that lacks few others, for it is near to where the trouble is; of several the lowest. */
static double grace_s(const qs_watch *w, const char *waits_for)
{
    const int turn = w->options.rank < TURNS ? w->options.rank : TURNS;
    const bool knows = w->missing_count > 0 && w->missing_count < MISSING_MAX;
    const int lacks = knows ? w->missing_count : MISSING_MAX;
    const double turn_s = at_most(TURN_MAX_S, w->options.limit_s / 4);
    return waits_for == NULL ? 0 : turn_s * (1 + turn + 4 * lacks);
}

static int terminations_of(const qs_watch *w)
{
    return w->options.terminations != NULL ? w->options.terminations() : 0;
}

/* Nobody may read what is printed, and the rank's thread may stand in the log and have its lock,
 * which an error asks for with --verbose. */
static void end_process(const qs_watch *w, const char *waits_for, double idle_s)
{
    signal(SIGALRM, SIG_DFL);
    alarm(PRINT_LIMIT_S);
    qs_status st = qs_cause_say(); /* this rank has failed before, and nobody came to hear of it */
    if (st == QS_OK) {
        st = describe(w, waits_for, idle_s);
        qs_error_print(st);
    }
    _exit(qs_exit_code(st));
}

/* The next look, after `tick_s` or when the watch ends. */
static void sleep_locked(qs_watch *w, double tick_s)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    const int64_t ns = until.tv_nsec + (int64_t)(tick_s * 1e9);
    until.tv_sec += (time_t)(ns / 1000000000);
    until.tv_nsec = (long)(ns % 1000000000);
    (void)pthread_cond_timedwait(&w->wake, &w->lock, &until);
}

static void *watch_main(void *ctx)
{
    qs_watch *w = ctx;
    const double tick_s = at_most(TICK_MAX_S, w->options.limit_s / 20);
    int before = 0;
    stillness still = {.at_s = qs_time_s(), .moved_s = qs_time_s()};
    pthread_mutex_lock(&w->lock);
    while (!w->stop) {
        sleep_locked(w, tick_s);
        look(w, &still, tick_s);
        const char *waits_for = atomic_load_explicit(&w->waits_for, memory_order_relaxed);
        const double limit_s = limit_of(w, &still);
        if (still.idle_s <= limit_s) {
            before = terminations_of(w);
        } else if (terminations_of(w) > before) { /* the launcher's: another rank has spoken */
            _exit(qs_exit_code(QS_ERR_STALL));
        }
        if (still.idle_s > limit_s / 2) { /* each time: some may come late */
            atomic_store_explicit(&w->asks, true, memory_order_relaxed);
        }
        if (!w->stop && still.idle_s > limit_s + grace_s(w, waits_for)) {
            end_process(w, waits_for, still.idle_s);
        }
    }
    pthread_mutex_unlock(&w->lock);
    return NULL;
}

/* ---- life ---- */

/* Signals are the rank's thread's. */
static int start_thread(qs_watch *w)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    const int failed = pthread_create(&w->thread, NULL, watch_main, w);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return failed;
}

qs_status qs_watch_start(qs_watch **out, const qs_watch_options *options)
{
    *out = NULL;
    qs_watch *w = calloc(1, sizeof *w);
    if (w == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "memory: the watch over this rank cannot be allocated");
    }
    w->options = *options;
    w->section_s = qs_time_s();
    w->patient = true;
    snprintf(w->section, sizeof w->section, "start");
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_mutex_init(&w->lock, NULL);
    pthread_cond_init(&w->wake, &attributes);
    pthread_condattr_destroy(&attributes);
    if (start_thread(w) != 0) {
        pthread_cond_destroy(&w->wake);
        pthread_mutex_destroy(&w->lock);
        free(w);
        return QS_FAIL(QS_ERR_MEMORY, "memory: the watch over this rank cannot have a thread");
    }
    mine = w;
    *out = w;
    return QS_OK;
}

void qs_watch_stop(qs_watch *w)
{
    if (w == NULL) {
        return;
    }
    mine = NULL;
    pthread_mutex_lock(&w->lock);
    w->stop = true;
    pthread_cond_signal(&w->wake);
    pthread_mutex_unlock(&w->lock);
    pthread_join(w->thread, NULL);
    pthread_cond_destroy(&w->wake);
    pthread_mutex_destroy(&w->lock);
    free(w);
}
