/* The watch over a rank: each case is a process of its own, whose end and last line are looked at.
 */
#define _GNU_SOURCE
#include <criterion/criterion.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "base/cause.h"
#include "base/log.h"
#include "base/timer.h"
#include "base/watch.h"
#include "fsdp_fixture.h"
#include "store/io.h"
#include "train/session.h"

#define LIMIT_S 0.4 /* a look every 20 ms */

static const char hosts[8][QS_WATCH_NAME_MAX] = {"a", "b", "c", "d", "e", "f", "g", "h"};

static void start(qs_watch **watch, int rank)
{
    const qs_watch_options options = {
        .rank = rank, .hosts = hosts, .limit_s = LIMIT_S, .remedy = "look there"};
    if (qs_watch_start(watch, &options) != QS_OK) {
        _exit(1);
    }
}

static void sleep_s(double seconds)
{
    const double end = qs_time_s() + seconds;
    while (qs_time_s() < end) {
        usleep(2000);
    }
}

typedef struct {
    int exit_code; /* -1: a signal */
    char text[4096];
    double took_s;
} outcome;

/* Runs `body`, which is to return if nothing ends it; `stopped_s`: the process is stopped for so
 * long in between. */
static outcome run(void (*body)(void), double stopped_s)
{
    outcome o = {.exit_code = -1};
    int pipes[2], status = 0;
    cr_assert_eq(pipe(pipes), 0);
    fflush(NULL);
    const double begin = qs_time_s();
    const pid_t child = fork();
    if (child == 0) {
        dup2(pipes[1], STDERR_FILENO);
        close(pipes[0]);
        close(pipes[1]);
        body();
        _exit(0);
    }
    close(pipes[1]);
    if (stopped_s > 0) {
        sleep_s(LIMIT_S / 4);
        kill(child, SIGSTOP);
        sleep_s(stopped_s);
        kill(child, SIGCONT);
    }
    size_t got = 0;
    for (ssize_t n = 1; n > 0 && got < sizeof o.text - 1; got += (size_t)(n > 0 ? n : 0)) {
        n = read(pipes[0], o.text + got, sizeof o.text - 1 - got);
    }
    close(pipes[0]);
    waitpid(child, &status, 0);
    o.took_s = qs_time_s() - begin;
    o.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    return o;
}

static void ended_with(const outcome *o, const char *text)
{
    cr_assert_eq(o->exit_code, 6, "%d: %s", o->exit_code, o->text);
    cr_assert_not_null(strstr(o->text, text), "%s", o->text);
    cr_assert_not_null(strstr(o->text, "look there\n"), "%s", o->text);
    cr_assert_eq(strncmp(o->text, "error[E601] ", 12), 0, "%s", o->text);
    cr_assert_eq(strchr(o->text, '\n'), o->text + strlen(o->text) - 1, "one line: %s", o->text);
    cr_assert_geq(o->took_s, LIMIT_S);
}

static void lived(const outcome *o)
{
    cr_assert_eq(o->exit_code, 0, "%s", o->text);
    cr_assert_str_empty(o->text);
}

static void works_without_end(void)
{
    qs_watch *watch;
    start(&watch, 2);
    qs_watch_section(false, "step %d", 14);
    sleep_s(20 * LIMIT_S);
}

Test(watch, a_rank_that_does_not_get_on_says_so)
{
    const outcome o = run(works_without_end, 0);
    ended_with(&o, "step 14: rank 2 on c has not got on for ");
    cr_assert_lt(o.took_s, 10 * LIMIT_S);
}

static void waits_without_end(void)
{
    qs_watch *watch;
    start(&watch, 2);
    qs_watch_section(false, "step %d", 1);
    qs_watch_wait("all ranks to answer");
    sleep_s(60 * LIMIT_S);
}

Test(watch, a_rank_that_waits_says_for_whom)
{
    const outcome o = run(waits_without_end, 0);
    ended_with(&o, "step 1: rank 2 on c has waited ");
    cr_assert_not_null(strstr(o.text, " s for all ranks to answer; "), "%s", o.text);
}

static void has_failed_itself(void)
{
    qs_watch *watch;
    start(&watch, 2);
    qs_watch_section(false, "step %d", 1);
    const qs_status st = QS_FAIL(QS_ERR_INPUT_MISSING, "base.h5: cannot be opened");
    qs_error_name_place("rank 2 on c");
    qs_cause_wait(st);
    qs_watch_wait("all ranks to answer");
    sleep_s(60 * LIMIT_S); /* the others do not come */
}

Test(watch, a_rank_that_has_failed_says_that_and_not_that_it_waits)
{
    const outcome o = run(has_failed_itself, 0);
    cr_assert_eq(o.exit_code, 3, "%d: %s", o.exit_code, o.text);
    cr_assert_str_eq(o.text, "error[E300] base.h5: cannot be opened (rank 2 on c)\n");
}

/* Asked once a look, which counts for 20 to 40 ms: 10 to 20 make the limit, and 70 to 140 that with
 * the grace of rank 7, however late they are. */
static int a_signal(void)
{
    static int looks;
    return ++looks > 40;
}

static void is_told(void)
{
    qs_watch *watch;
    const qs_watch_options options = {
        .rank = 7, .hosts = hosts, .limit_s = LIMIT_S, .terminations = a_signal, .remedy = "look"};
    qs_watch_start(&watch, &options);
    qs_watch_section(false, "step %d", 1);
    qs_watch_wait("all ranks to answer");
    sleep_s(60 * LIMIT_S);
}

Test(watch, where_another_rank_has_spoken_this_one_leaves)
{
    const outcome o = run(is_told, 0);
    cr_assert_eq(o.exit_code, 6);
    cr_assert_str_empty(o.text);
}

static int a_signal_before(void)
{
    return 1;
}

static void was_told_before(void)
{
    qs_watch *watch;
    const qs_watch_options options = {.rank = 7,
                                      .hosts = hosts,
                                      .limit_s = LIMIT_S,
                                      .terminations = a_signal_before,
                                      .remedy = "look there"};
    qs_watch_start(&watch, &options);
    qs_watch_section(false, "step %d", 1);
    sleep_s(60 * LIMIT_S);
}

Test(watch, a_signal_before_the_stall_is_none_of_that)
{
    const outcome o = run(was_told_before, 0);
    ended_with(&o, "step 1: rank 7 on h has not got on for ");
}

/* As a queue does, which polls while it waits. */
static void answers(const int *ranks, int count)
{
    qs_watch *watch;
    start(&watch, 0);
    qs_watch_section(false, "step %d", 3);
    qs_watch_wait("other ranks");
    const double end = qs_time_s() + 60 * LIMIT_S;
    while (qs_time_s() < end) {
        if (qs_watch_asks()) {
            qs_watch_missing(ranks, count);
        }
        usleep(1000);
    }
}

static void lacks_two(void)
{
    answers((const int[]){5, 7}, 2);
}

static void lacks_many(void)
{
    answers((const int[]){6, 1, 2, 3}, 7);
}

/* One of two comes later than it should, and is not to be looked at. */
static void lacks_one_in_the_end(void)
{
    qs_watch *watch;
    start(&watch, 0);
    qs_watch_section(false, "step %d", 3);
    qs_watch_wait("other ranks");
    const double begin = qs_time_s();
    while (qs_time_s() < begin + 60 * LIMIT_S) {
        if (qs_watch_asks()) {
            const bool late = qs_time_s() > begin + 0.8 * LIMIT_S;
            qs_watch_missing(late ? (const int[]){7} : (const int[]){5, 7}, late ? 1 : 2);
        }
        usleep(1000);
    }
}

Test(watch, who_is_missing_is_named)
{
    const outcome two = run(lacks_two, 0), many = run(lacks_many, 0),
                  one = run(lacks_one_in_the_end, 0);
    ended_with(&two, "step 3: nothing has come from rank 5 on f and rank 7 on h for ");
    ended_with(&many, "step 3: nothing has come from rank 6 on g and 6 more ranks for ");
    ended_with(&one, "step 3: nothing has come from rank 7 on h for ");
}

static void moves_all_the_time(void)
{
    qs_watch *watch;
    start(&watch, 0);
    qs_watch_section(false, "step %d", 1);
    for (int i = 0; i < 12; i++) {
        sleep_s(LIMIT_S / 4);
        if (i % 3 == 0) {
            qs_watch_moved();
        } else {
            qs_watch_wait(qs_watch_wait("others"));
        }
    }
    qs_watch_stop(watch);
    sleep_s(3 * LIMIT_S); /* nobody watches any more */
}

Test(watch, whoever_moves_is_left_alone)
{
    const outcome o = run(moves_all_the_time, 0);
    lived(&o);
}

/* A share of the base from a slow file system, piece by piece. */
static void reads_slowly(void)
{
    qs_watch *watch;
    char piece[64];
    const int zeros = open("/dev/zero", O_RDONLY), nowhere = open("/dev/null", O_WRONLY);
    start(&watch, 0);
    qs_watch_section(false, "step %d", 1);
    for (int i = 0; i < 12; i++) {
        sleep_s(LIMIT_S / 4);
        const qs_status st = i < 6 ? qs_io_read_all(zeros, piece, sizeof piece, 0, "zeros")
                                   : qs_io_write_all(nowhere, piece, sizeof piece, 0, "nowhere");
        if (st != QS_OK) {
            _exit(1);
        }
    }
    qs_watch_stop(watch);
}

Test(watch, whoever_reads_or_writes_moves)
{
    const outcome o = run(reads_slowly, 0);
    lived(&o);
}

static void waits_for_a_slower_one(void)
{
    qs_watch *watch;
    start(&watch, 0);
    qs_watch_section(false, "step %d", 1);
    const double end = qs_time_s() + 1.5 * LIMIT_S;
    while (qs_time_s() < end) {
        qs_watch_moved();
        usleep(1000);
    }
    sleep_s(4 * LIMIT_S); /* of 4 times 1.5 */
    qs_watch_stop(watch);
}

Test(watch, a_step_that_took_long_may_take_four_times_longer_elsewhere)
{
    const outcome o = run(waits_for_a_slower_one, 0);
    lived(&o);
}

static void reads_files(void)
{
    qs_watch *watch;
    start(&watch, 0); /* the start of a run is patient */
    sleep_s(4 * LIMIT_S);
    qs_watch_section(false, "step %d", 1);
    qs_watch_section(true, "saving step %d", 1);
    sleep_s(4 * LIMIT_S);
    qs_watch_stop(watch);
}

static void never_reads(void)
{
    qs_watch *watch;
    start(&watch, 4);
    qs_watch_section(true, "saving step %d", 1);
    sleep_s(40 * LIMIT_S);
}

Test(watch, files_may_take_longer)
{
    const outcome o = run(reads_files, 0), hangs = run(never_reads, 0);
    lived(&o);
    ended_with(&hangs, "saving step 1: rank 4 on e has not got on for ");
    cr_assert_geq(hangs.took_s, QS_WATCH_PATIENT * LIMIT_S);
}

static void rests_briefly(void)
{
    qs_watch *watch;
    start(&watch, 0);
    qs_watch_section(false, "step %d", 1);
    const double begin = qs_time_s();
    while (qs_time_s() - begin < 4 * LIMIT_S) { /* most of it stopped */
        usleep(1000);
    }
    qs_watch_stop(watch);
}

Test(watch, time_in_which_all_were_stopped_does_not_count)
{
    const outcome o = run(rests_briefly, 3.5 * LIMIT_S);
    lived(&o);
}

static void *notes(void *ctx)
{
    (void)ctx;
    for (int i = 0; i < 1000; i++) {
        qs_watch_moved();
        qs_watch_wait(qs_watch_wait("others"));
        usleep(1000);
    }
    qs_watch_section(false, "other");
    return qs_watch_asks() ? "asked" : NULL;
}

static void another_thread_notes(void)
{
    qs_watch *watch;
    pthread_t thread;
    start(&watch, 1);
    qs_watch_section(false, "step %d", 1);
    pthread_create(&thread, NULL, notes, NULL);
    pthread_join(thread, NULL);
}

Test(watch, notes_of_threads_that_are_not_watched_count_for_nothing)
{
    const outcome o = run(another_thread_notes, 0);
    ended_with(&o, "step 1: rank 1 on b has not got on for ");
}

/* The line comes out, or the process ends without: nobody reads, and the pipe is full. */
static void fill_stderr(void)
{
    int full[2];
    char page[4096] = "";
    if (pipe(full) != 0) {
        _exit(1);
    }
    fcntl(full[1], F_SETFL, O_NONBLOCK);
    while (write(full[1], page, sizeof page) > 0) {
    }
    fcntl(full[1], F_SETFL, 0);
    dup2(full[1], STDERR_FILENO);
}

static void nobody_reads(void)
{
    fill_stderr();
    works_without_end();
    sleep_s(20);
}

/* The rank itself has the log, and stands in it; with --verbose an error is noted there, too. */
static void nobody_reads_the_log(void)
{
    qs_watch *watch;
    start(&watch, 2);
    qs_watch_section(false, "step %d", 14);
    qs_log_init(0, 1, QS_LOG_DEBUG, true);
    fill_stderr();
    qs_log_info("step 14");
}

Test(watch, a_line_that_nobody_reads_does_not_keep_the_process, .timeout = 60)
{
    const outcome o = run(nobody_reads, 0), log = run(nobody_reads_the_log, 0);
    cr_assert_eq(o.exit_code, -1);
    cr_assert_lt(o.took_s, 15);
    cr_assert_eq(log.exit_code, -1);
    cr_assert_lt(log.took_s, 15);
}

/* ---- closing a session ---- */

/* Rank 1 of two is stopped before it takes part in the gather of unit 1, which rank 0 has started
 * ahead. */
static void *stops_early(void *comm)
{
    fx_base base;
    qs_fsdp *f = NULL;
    qs_queue *queue = NULL;
    qs_unit_view view;
    const qs_fsdp_options options = fx_options(1);
    fx_base_make(&base, QS_BF16);
    if (qs_queue_create(&queue, 1) != QS_OK ||
        qs_fsdp_create_from(&f, &base.index, comm, queue, &options, fx_fill, &base) != QS_OK ||
        qs_fsdp_begin(f, (const int[]){0}, 1) != QS_OK || qs_fsdp_acquire(f, 0, &view) != QS_OK) {
        _exit(1);
    }
    for (;;) {
        pause();
    }
}

static void closes_beside_a_stopped_rank(void)
{
    fx_base base;
    qs_session s = {0};
    qs_comm *comms[2];
    pthread_t other;
    qs_unit_view view;
    const qs_fsdp_options options = fx_options(1);
    fx_base_make(&base, QS_BF16);
    alarm(60); /* unwatched it waits for ever */
    if (qs_comm_threads_create(comms, 2) != QS_OK ||
        pthread_create(&other, NULL, stops_early, comms[1]) != 0) {
        _exit(1);
    }
    start(&s.watchdog.watch, 0);
    qs_watch_section(false, "step %d", 3);
    if (qs_queue_create(&s.queue, 1) != QS_OK ||
        qs_fsdp_create_from(&s.fsdp, &base.index, comms[0], s.queue, &options, fx_fill, &base) !=
            QS_OK ||
        qs_fsdp_begin(s.fsdp, (const int[]){0, 1}, 2) != QS_OK ||
        qs_fsdp_acquire(s.fsdp, 0, &view) != QS_OK) {
        _exit(1);
    }
    qs_session_close(&s);
}

Test(watch, a_rank_that_waits_in_closing_is_watched)
{
    const outcome o = run(closes_beside_a_stopped_rank, 0);
    ended_with(&o, "step 3: ");
    cr_assert_lt(o.took_s, 30);
}
