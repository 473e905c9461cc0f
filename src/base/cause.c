#include "base/cause.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/log.h"

static const double GRACE_S = 10.0;

/* NOBODY -> PREPARED -> WAITS -> (SAID ->) NOBODY; the line belongs to the rank's thread but while
 * one waits. */
enum { NOBODY, PREPARED, WAITS, SAID };

static struct {
    atomic_int state;
    qs_status status;
    char line[QS_ERROR_LINE_MAX];
    size_t bytes;
    struct sigaction before; /* what TERM did */
} cause;

static _Thread_local bool is_mine;

/* The thread that says it when the grace is over. */
static struct {
    pthread_t thread;
    bool runs, stop;
    double grace_s;
    pthread_mutex_t lock;
    pthread_cond_t wake;
} herald = {.lock = PTHREAD_MUTEX_INITIALIZER, .grace_s = -1};

/* Also in a handler of a signal: nothing here takes a lock. */
qs_status qs_cause_say(void)
{
    int state = WAITS;
    if (atomic_compare_exchange_strong(&cause.state, &state, SAID)) {
        for (size_t at = 0; at < cause.bytes;) {
            const ssize_t written = write(STDERR_FILENO, cause.line + at, cause.bytes - at);
            if (written <= 0) {
                break;
            }
            at += (size_t)written;
        }
        return cause.status;
    }
    return state == SAID ? cause.status : QS_OK;
}

/* ---- told to end ---- */

/* And what TERM did before. */
static void on_term(int number, siginfo_t *info, void *context)
{
    const struct sigaction *before = &cause.before;
    (void)qs_cause_say();
    if ((before->sa_flags & SA_SIGINFO) != 0) {
        before->sa_sigaction(number, info, context);
    } else if (before->sa_handler == SIG_DFL) {
        sigaction(number, before, NULL);
        raise(number); /* held back until this handler returns */
    } else if (before->sa_handler != SIG_IGN) {
        before->sa_handler(number);
    }
}

static void catch_term(void)
{
    struct sigaction action = {.sa_sigaction = on_term, .sa_flags = SA_SIGINFO | SA_RESTART};
    sigemptyset(&action.sa_mask);
    sigaction(SIGTERM, NULL, &cause.before);
    sigaction(SIGTERM, &action, NULL);
}

/* ---- the grace ---- */

static void *herald_main(void *unused)
{
    struct timespec until;
    (void)unused;
    clock_gettime(CLOCK_MONOTONIC, &until);
    const int64_t ns = until.tv_nsec + (int64_t)(herald.grace_s * 1e9);
    until.tv_sec += (time_t)(ns / 1000000000);
    until.tv_nsec = (long)(ns % 1000000000);
    int late = 0;
    pthread_mutex_lock(&herald.lock);
    while (!herald.stop && late == 0) {
        late = pthread_cond_timedwait(&herald.wake, &herald.lock, &until);
    }
    if (!herald.stop) {
        (void)qs_cause_say();
    }
    pthread_mutex_unlock(&herald.lock);
    return NULL;
}

/* Without a further thread the other two are left. */
static void start_herald(void)
{
    sigset_t all, before;
    pthread_condattr_t attributes;
    herald.grace_s = herald.grace_s < 0 ? GRACE_S : herald.grace_s;
    herald.stop = false;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&herald.wake, &attributes);
    pthread_condattr_destroy(&attributes);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    herald.runs = pthread_create(&herald.thread, NULL, herald_main, NULL) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void stop_herald(void)
{
    if (herald.runs) {
        pthread_mutex_lock(&herald.lock);
        herald.stop = true;
        pthread_cond_signal(&herald.wake);
        pthread_mutex_unlock(&herald.lock);
        pthread_join(herald.thread, NULL);
    }
    pthread_cond_destroy(&herald.wake);
}

void qs_cause_set_grace(double seconds)
{
    herald.grace_s = seconds;
}

/* ---- the wait ---- */

void qs_cause_wait(qs_status status)
{
    int state = NOBODY;
    if (qs_error_is_silent() || qs_error_is_printed() ||
        !atomic_compare_exchange_strong(&cause.state, &state, PREPARED)) {
        return;
    }
    cause.status = status;
    cause.bytes = qs_error_line(cause.line, sizeof cause.line, status);
    if (cause.bytes == 0) {
        atomic_store(&cause.state, NOBODY);
        return;
    }
    is_mine = true;
    qs_progress_end();
    catch_term();
    atomic_store(&cause.state, WAITS);
    start_herald();
}

bool qs_cause_end(void)
{
    if (is_mine) {
        is_mine = false;
        stop_herald();
        if (atomic_exchange(&cause.state, PREPARED) == SAID) { /* from here on nobody says it */
            qs_error_set_printed();
        }
        sigaction(SIGTERM, &cause.before, NULL);
        atomic_store(&cause.state, NOBODY);
    }
    return qs_error_is_printed();
}
