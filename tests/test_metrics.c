/* The logs of a run: what a start keeps of those that it finds, however long they are, and ranks of
 * which one has no memory. */
#define _GNU_SOURCE /* pwrite */
#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "scratch.h"
#include "store/io.h"
#include "store/lines.h"
#include "team.h"
#include "train/metrics.h"

TestSuite(metrics, .timeout = 120);

static char dir[SCRATCH_MAX];
static char path[SCRATCH_MAX + 32];

static void make_dir(void)
{
    scratch_make(dir, scratch_in_memory());
    snprintf(path, sizeof path, "%s/metrics.jsonl", dir);
}

static void remove_dir(void)
{
    scratch_remove(dir);
}

/* ---- what is kept ---- */

#define STEP(n) "{\"step\": " #n ", \"loss\": 1." #n "}\n"
#define EVAL(n) "{\"step\": " #n ", \"eval_loss\": 2." #n ", \"eval_tokens\": 9}\n"

typedef struct {
    const char *there, *kept; /* of steps up to 2 */
    bool in_place;            /* the file is cut, or left alone */
} log_case;

static const log_case cases[] = {
    {"", "", true},
    {STEP(1), STEP(1), true},
    {STEP(1) STEP(2), STEP(1) STEP(2), true},
    {STEP(1) EVAL(1) STEP(2) EVAL(2) STEP(3), STEP(1) EVAL(1) STEP(2) EVAL(2), true},
    {STEP(3), "", true},
    {STEP(1) STEP(2) "{\"step\": 3, \"lo", STEP(1) STEP(2), true},
    {STEP(1) "{\"step\": 2, \"loss\": 1.5}", STEP(1), true}, /* whole but for its end */
    {"{\"step\": 1, \"lo", "", true},
    {STEP(1) "\n", STEP(1), true},
    /* nothing that a run leaves */
    {STEP(1) "\n" STEP(2), STEP(1) STEP(2), false},
    {STEP(3) STEP(1), STEP(1), false},
    {STEP(1) STEP(3) STEP(2) STEP(4), STEP(1) STEP(2), false},
    {"a note\n" STEP(1) "{\"step\": 2\n" STEP(2) "x", STEP(1) STEP(2), false},
};
enum { N_CASES = sizeof cases / sizeof *cases };

static void write_log(const char *name, const char *text, size_t bytes)
{
    char file[sizeof path];
    snprintf(file, sizeof file, "%s/%s", dir, name);
    FILE *out = fopen(file, "w");
    cr_assert_not_null(out);
    cr_assert_eq(fwrite(text, 1, bytes, out), bytes);
    cr_assert_eq(fclose(out), 0);
}

static void expect_log(const char *name, const char *text, int number)
{
    char file[sizeof path];
    void *data = NULL;
    size_t bytes = 0;
    snprintf(file, sizeof file, "%s/%s", dir, name);
    cr_assert_eq(qs_io_read_file(file, 1 << 24, &data, &bytes), QS_OK, "%s", qs_error_text());
    cr_assert_eq(bytes, strlen(text), "case %d, %s: %s", number, name, (char *)data);
    cr_assert_eq(memcmp(data, text, bytes), 0, "case %d, %s: %s", number, name, (char *)data);
    free(data);
}

static ino_t inode(void)
{
    struct stat info;
    cr_assert_eq(stat(path, &info), 0);
    return info.st_ino;
}

static int names_in_dir(void)
{
    int count = 0;
    DIR *d = opendir(dir);
    cr_assert_not_null(d);
    for (const struct dirent *entry; (entry = readdir(d)) != NULL;) {
        count += entry->d_name[0] != '.';
    }
    closedir(d);
    return count;
}

static qs_metrics *open_at(int64_t step)
{
    qs_metrics *m = NULL;
    cr_assert_eq(qs_metrics_open(&m, dir, step, false, 0), QS_OK, "%s", qs_error_text());
    return m;
}

Test(metrics, whole_lines_up_to_the_step_are_kept, .init = make_dir, .fini = remove_dir)
{
    for (int i = 0; i < N_CASES; i++) {
        const log_case *c = &cases[i];
        write_log("metrics.jsonl", c->there, strlen(c->there));
        write_log("ranks.jsonl", c->there, strlen(c->there));
        const ino_t before = inode();
        qs_metrics_close(open_at(2));
        expect_log("metrics.jsonl", c->kept, i);
        expect_log("ranks.jsonl", c->kept, i);
        cr_assert_eq(inode() == before, c->in_place, "case %d", i);
        cr_assert_eq(names_in_dir(), 2, "case %d: a temporary file is left", i);
    }
}

Test(metrics, a_line_goes_on_behind_what_was_kept, .init = make_dir, .fini = remove_dir)
{
    static const char there[] = STEP(1) STEP(2) STEP(3) STEP(4);
    write_log("metrics.jsonl", there, strlen(there));
    qs_metrics *m = open_at(2);
    cr_assert_eq(qs_metrics_eval(m, 2, 0.5, 9), QS_OK);
    qs_metrics_close(m);
    expect_log("metrics.jsonl",
               STEP(1) STEP(2) "{\"step\": 2, \"eval_loss\": 0.5, \"eval_tokens\": 9}\n", 0);
}

/* Of a run that was taken over and has not noticed yet. */
Test(metrics, what_another_process_appends_to_the_old_files_is_in_none, .init = make_dir,
     .fini = remove_dir)
{
    static const char there[] = STEP(1) STEP(2);
    qs_metrics *old = open_at(0), *m = NULL;
    write_log("metrics.jsonl", there, strlen(there));
    cr_assert_eq(qs_metrics_open(&m, dir, 2, true, 0), QS_OK, "%s", qs_error_text());
    cr_assert_eq(qs_metrics_eval(old, 3, 0.5, 9), QS_OK);
    cr_assert_eq(qs_metrics_eval(m, 4, 0.25, 9), QS_OK);
    qs_metrics_close(old);
    qs_metrics_close(m);
    expect_log("metrics.jsonl",
               STEP(1) STEP(2) "{\"step\": 4, \"eval_loss\": 0.25, \"eval_tokens\": 9}\n", 0);
    cr_assert_eq(names_in_dir(), 2);
}

/* The limit on a file's size is a disk that is full for this one. */
static void limit_files(rlim_t bytes)
{
    struct rlimit limit;
    signal(SIGXFSZ, SIG_IGN);
    cr_assert_eq(getrlimit(RLIMIT_FSIZE, &limit), 0);
    limit.rlim_cur = bytes < limit.rlim_max ? bytes : limit.rlim_max;
    cr_assert_eq(setrlimit(RLIMIT_FSIZE, &limit), 0);
}

Test(metrics, lines_wait_for_room_on_a_full_disk, .init = make_dir, .fini = remove_dir)
{
    static const char *const lines[] = {"{\"step\": 1, \"eval_loss\": 0.5, \"eval_tokens\": 9}\n",
                                        "{\"step\": 2, \"eval_loss\": 0.5, \"eval_tokens\": 9}\n",
                                        "{\"step\": 3, \"eval_loss\": 0.5, \"eval_tokens\": 9}\n"};
    char all[256] = "";
    qs_metrics *m = open_at(0);
    for (int i = 0; i < 3; i++) { /* the second one has room for its half only */
        limit_files(i == 1 ? 3 * strlen(lines[0]) / 2 : i == 2 ? 0 : RLIM_INFINITY);
        cr_assert_eq(qs_metrics_eval(m, i + 1, 0.5, 9), i == 0 ? QS_OK : QS_ERR_IO_FULL, "%d: %s",
                     i, qs_error_text());
        qs_error_clear();
        expect_log("metrics.jsonl", lines[0], i);
        strcat(all, lines[i]);
    }
    cr_assert_eq(qs_metrics_sync(m), QS_ERR_IO_FULL);
    limit_files(RLIM_INFINITY);
    qs_error_clear();
    cr_assert_eq(qs_metrics_sync(m), QS_OK, "%s", qs_error_text());
    qs_metrics_close(m);
    expect_log("metrics.jsonl", all, 3);
}

Test(metrics, a_disk_that_is_full_for_too_long_is_told, .init = make_dir, .fini = remove_dir)
{
    qs_metrics *m = open_at(0);
    limit_files(0);
    for (int i = 0; i < 30000; i++) { /* of at least 50 bytes: above 1 MiB */
        cr_assert_eq(qs_metrics_eval(m, i, 0.5, 9), QS_ERR_IO_FULL);
        qs_error_clear();
    }
    limit_files(RLIM_INFINITY);
    cr_assert_eq(qs_metrics_sync(m), QS_ERR_IO_FULL);
    cr_assert_not_null(strstr(qs_error_text(), "lines are lost"), "%s", qs_error_text());
    qs_metrics_close(m);
}

Test(metrics, evaluations_are_remembered_once, .init = make_dir, .fini = remove_dir)
{
    for (int junk = 0; junk < 2; junk++) { /* cut, and written anew */
        char there[512];
        snprintf(there, sizeof there, "%s%s%s", STEP(1) EVAL(1), junk ? "\n" : "",
                 STEP(2) EVAL(2) STEP(3) EVAL(3));
        write_log("metrics.jsonl", there, strlen(there));
        qs_metrics *m = open_at(2);
        const qs_ckpt_evals evals = qs_metrics_evals(m);
        cr_assert_eq(evals.count, 2);
        cr_assert(evals.list[0].step == 1 && evals.list[0].loss == 2.1);
        cr_assert(evals.list[1].step == 2 && evals.list[1].loss == 2.2);
        cr_assert_eq(qs_metrics_last_eval(m), 2);
        qs_metrics_close(m);
    }
}

Test(metrics, a_step_says_where_its_time_went, .init = make_dir, .fini = remove_dir)
{
    const qs_step_metrics step = {.step = 1,
                                  .tokens = 2,
                                  .all_tokens = 3,
                                  .step_time_s = 1.5,
                                  .gather_s = -1,
                                  .parts = {[QS_STEP_WAIT] = 0.125,
                                            [QS_STEP_COMPUTE] = 0.5,
                                            [QS_STEP_REDUCE] = 0.25,
                                            [QS_STEP_OPTIMIZER] = 0.375,
                                            [QS_STEP_LORA] = 0.25,
                                            [QS_STEP_TOTAL] = 1.5}};
    qs_metrics *m = open_at(0);
    cr_assert_eq(qs_metrics_step(m, &step), QS_OK);
    qs_metrics_close(m);
    expect_log(
        "metrics.jsonl",
        "{\"step\": 1, \"tokens\": 2, \"targets\": 2, \"all_tokens\": 3, \"loss\": 0, \"lr\": 0, "
        "\"grad_norm\": 0, \"step_time_s\": 1.500000, \"tokens_per_s\": 2.0, "
        "\"peak_bytes\": 0, \"gather_s\": null, \"wait_s\": 0.125000, \"compute_s\": "
        "0.500000, \"reduce_s\": 0.250000, \"optimizer_s\": 0.375000, \"lora_s\": "
        "0.250000}\n",
        0);
}

/* ---- long files ---- */

/* Lines of steps 1 to `count`, `bytes` each: holes but for their ends, so that they take no room.
 */
static int64_t write_sparse(int64_t count, int64_t bytes)
{
    char start[64];
    const int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    cr_assert_geq(fd, 0);
    for (int64_t i = 0; i < count; i++) {
        const int length = snprintf(start, sizeof start, "{\"step\": %lld, ", (long long)i + 1);
        cr_assert_eq(pwrite(fd, start, (size_t)length, i * bytes), length);
        cr_assert_eq(pwrite(fd, "}\n", 2, (i + 1) * bytes - 2), 2);
    }
    cr_assert_eq(close(fd), 0);
    return count * bytes;
}

static int64_t size_of_log(void)
{
    struct stat info;
    cr_assert_eq(stat(path, &info), 0);
    return info.st_size;
}

Test(metrics, a_log_above_a_gibibyte_is_cut_in_little_memory, .init = make_dir, .fini = remove_dir)
{
    const int64_t line = 1 << 19, count = 2200;
    struct rusage before, after;
    cr_assert_gt(write_sparse(count, line), (int64_t)1 << 30);
    getrusage(RUSAGE_SELF, &before);
    qs_metrics_close(open_at(count));
    cr_assert_eq(size_of_log(), count * line, "all stays");
    qs_metrics_close(open_at(count - 1));
    cr_assert_eq(size_of_log(), (count - 1) * line);
    cr_assert_eq(truncate(path, count * line), 0); /* as a host that goes down may leave it */
    qs_metrics_close(open_at(count));
    cr_assert_eq(size_of_log(), (count - 1) * line);
    getrusage(RUSAGE_SELF, &after);
    cr_assert_lt(after.ru_maxrss - before.ru_maxrss, 64 * 1024, "KiB"); /* windows of 1 MiB */
}

static int64_t line_lengths[] = {
    1, 60, QS_LINE_MAX - 1, QS_LINE_MAX, QS_LINE_MAX + 1, 3 * QS_LINE_MAX};

ParameterizedTestParameters(metrics, lines_of_every_length_are_found)
{
    return cr_make_param_array(int64_t, line_lengths, sizeof line_lengths / sizeof *line_lengths);
}

ParameterizedTest(int64_t *bytes, metrics, lines_of_every_length_are_found, .init = make_dir,
                  .fini = remove_dir)
{
    enum { LINES = 5 };
    qs_lines *lines = NULL;
    qs_line line;
    char *text = malloc((size_t)*bytes);
    FILE *out = fopen(path, "w");
    memset(text, 'x', (size_t)*bytes);
    text[*bytes - 1] = '\n';
    for (int i = 0; i < LINES; i++) {
        cr_assert_eq(fwrite(text, 1, (size_t)*bytes, out), (size_t)*bytes);
    }
    fputs("cut off", out);
    cr_assert_eq(fclose(out), 0);
    cr_assert_eq(qs_lines_open(&lines, path), QS_OK);
    for (int64_t i = 0; i < LINES; i++) {
        cr_assert_eq(qs_lines_next(lines, &line), QS_OK);
        cr_assert(line.at == i * *bytes && line.end == (i + 1) * *bytes, "line %d", (int)i);
        cr_assert_eq(line.whole, *bytes <= QS_LINE_MAX);
        if (line.whole) {
            cr_assert_eq(line.bytes, (size_t)*bytes - 1);
            cr_assert_eq(memcmp(line.text, text, (size_t)*bytes), 0);
        }
    }
    cr_assert_eq(qs_lines_next(lines, &line), QS_OK);
    cr_assert(!line.whole && line.bytes == 7 && memcmp(line.text, "cut off", 7) == 0);
    for (int i = 0; i < 2; i++) {
        cr_assert_eq(qs_lines_next(lines, &line), QS_OK);
        cr_assert(!line.whole && line.bytes == 0 && line.at == line.end);
    }
    qs_lines_close(lines);
    free(text);
}

/* ---- a rank without memory ---- */

static _Thread_local bool without_memory;

void *__real_calloc(size_t count, size_t bytes);
void *__wrap_calloc(size_t count, size_t bytes);

/* The linker's, for every calloc of the program (tests/CMakeLists.txt). */
void *__wrap_calloc(size_t count, size_t bytes)
{
    return without_memory && bytes == sizeof(qs_rank_metrics) ? NULL : __real_calloc(count, bytes);
}

static qs_status ranks_body(team_member *me)
{
    const int *lacking = me->ctx;
    const qs_rank_metrics mine = {.tokens = me->rank};
    without_memory = me->rank == *lacking;
    const qs_status st = qs_metrics_ranks(NULL, 1, &mine, me->comm);
    const qs_status agreed = qs_comm_agree(me->comm, st); /* as the loop does with what it gets */
    TEAM_CHECK(st == (*lacking < 0 ? QS_OK : QS_ERR_MEMORY) && agreed == st,
               "rank %d of %d: %d, then %d: %s", me->rank, me->nranks, (int)st, (int)agreed,
               qs_error_text());
    return QS_OK;
}

static int rank_counts[] = {1, 2, 3, 4, 5, 8};

ParameterizedTestParameters(metrics, a_rank_without_memory_is_everyones_failure)
{
    return cr_make_param_array(int, rank_counts, sizeof rank_counts / sizeof *rank_counts);
}

ParameterizedTest(int *n, metrics, a_rank_without_memory_is_everyones_failure)
{
    for (int lacking = -1; lacking < *n; lacking++) {
        team_expect_ok(*n, ranks_body, &lacking);
    }
}
