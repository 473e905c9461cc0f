/* The run directory and its lock: one writer at a time, a stranger's directory left alone, and a
 * run that was taken over does no harm. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <libgen.h>
#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "ckpt/run_dir.h"
#include "ckpt_fixture.h"
#include "store/io.h"

TestSuite(run_dir, .init = fx_make_folder, .fini = fx_remove_folder, .timeout = 120);

static qs_status open_as(qs_run_dir *run, const qs_config *c, qs_resume resume, bool takeover)
{
    qs_comm *comm = NULL;
    qs_error_clear();
    cr_assert_eq(qs_comm_self_create(&comm), QS_OK);
    qs_status st = qs_run_dir_open(run, c, resume, takeover, comm);
    qs_comm_destroy(comm);
    return st;
}

static qs_status begin_as(qs_run_dir *run, const qs_config *c)
{
    qs_comm *comm = NULL;
    cr_assert_eq(qs_comm_self_create(&comm), QS_OK);
    const qs_status st = qs_run_dir_begin(run, c, comm);
    qs_comm_destroy(comm);
    return st;
}

/* What config.yaml says. */
static qs_config recorded(void)
{
    char path[256];
    qs_config found;
    snprintf(path, sizeof path, "%s/config.yaml", fx_run_dir);
    cr_assert_eq(qs_config_load(&found, path, NULL, 0), QS_OK, "%s", qs_error_text());
    return found;
}

static void write_text(const char *name, const char *text)
{
    char path[256];
    snprintf(path, sizeof path, "%s/%s", fx_run_dir, name);
    cr_assert_eq(qs_io_write_file(path, text, strlen(text)), QS_OK);
}

Test(run_dir, is_made_with_all_above_it_and_recognised_later)
{
    qs_config c = fx_config();
    qs_run_dir run, again;
    char other[160], path[256];
    snprintf(other, sizeof other, "%s/runs/a/b/demo", fx_folder);
    snprintf(c.output, sizeof c.output, "%s", other);
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK, "%s", qs_error_text());
    cr_assert_gt(strlen(run.run_id), 8);
    cr_assert(!run.finished && run.locked);
    qs_run_dir_close(&run);
    cr_assert_eq(open_as(&again, &c, QS_RESUME_AUTO, false), QS_OK, "%s", qs_error_text());
    cr_assert_str_eq(again.run_id, run.run_id);
    qs_config found;
    snprintf(path, sizeof path, "%s/config.yaml", other);
    cr_assert_eq(qs_config_load(&found, path, NULL, 0), QS_OK);
    cr_assert(memcmp(&found, &c, sizeof c) == 0);
    qs_run_dir_close(&again);
}

Test(run_dir, finished_run_is_told_and_not_touched)
{
    qs_config c = fx_config();
    qs_run_dir run;
    qs_comm *comm = NULL;
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK);
    cr_assert_eq(qs_comm_self_create(&comm), QS_OK);
    cr_assert_eq(qs_run_dir_finish(&run, comm), QS_OK, "%s", qs_error_text());
    qs_comm_destroy(comm);
    qs_run_dir_close(&run);
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK);
    cr_assert(run.finished && !run.locked);
    cr_assert(!fx_exists("run.lock"));
    c.optim.lr = 0.5;
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_ERR_RESUME);
    cr_assert_not_null(strstr(qs_error_text(), "optim.lr"), "%s", qs_error_text());
}

static void expect_best(int64_t step, double loss)
{
    qs_ckpt_eval best = {.step = -7};
    cr_assert_eq(qs_run_dir_read_best(fx_run_dir, &best), QS_OK, "%s", qs_error_text());
    cr_assert_eq(best.step, step);
    cr_assert(step < 0 || best.loss == loss, "every digit");
}

Test(run_dir, the_best_checkpoint_is_noted_and_survives_the_next_start)
{
    qs_config c = fx_config();
    qs_run_dir run;
    struct stat before, after;
    char path[256];
    const qs_ckpt_eval best = {.step = 16, .loss = 1.0 / 3}, none = {.step = -1, .loss = NAN};
    snprintf(path, sizeof path, "%s/run.json", fx_run_dir);
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK, "%s", qs_error_text());
    expect_best(-1, 0);
    cr_assert_eq(qs_run_dir_note_best(&run, &none), QS_OK, "%s", qs_error_text());
    cr_assert_eq(qs_run_dir_note_best(&run, &best), QS_OK, "%s", qs_error_text());
    cr_assert_eq(stat(path, &before), 0);
    cr_assert_eq(qs_run_dir_note_best(&run, &best), QS_OK, "%s", qs_error_text());
    cr_assert_eq(stat(path, &after), 0);
    cr_assert_eq(before.st_ino, after.st_ino, "nothing new to write");
    qs_run_dir_close(&run);
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK, "%s", qs_error_text());
    expect_best(16, 1.0 / 3);
    cr_assert_eq(qs_run_dir_note_best(&run, &none), QS_OK, "%s", qs_error_text());
    expect_best(-1, 0);
    qs_run_dir_close(&run);
}

Test(run_dir, a_best_that_is_none_is_refused_and_written_anew)
{
    static const char *const bad[] = {"3",
                                      "[]",
                                      "{}",
                                      "{\"step\": -1, \"eval_loss\": 1}",
                                      "{\"step\": 4, \"eval_loss\": \"1\"}",
                                      "{\"step\": 4, \"eval_loss\": null}"};
    qs_config c = fx_config();
    qs_run_dir run;
    const qs_ckpt_eval good = {.step = 4, .loss = 2};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char text[256];
        qs_ckpt_eval best;
        cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK, "%s", qs_error_text());
        snprintf(text, sizeof text,
                 "{\"format\": \"qshard-run\", \"format_version\": 1, \"run_id\": \"a\", "
                 "\"finished\": false, \"best\": %s}",
                 bad[i]);
        write_text("run.json", text);
        cr_assert_eq(qs_exit_code(qs_run_dir_read_best(fx_run_dir, &best)), 3, "%s", bad[i]);
        cr_assert_not_null(strstr(qs_error_text(), "run.json: best"), "%s", qs_error_text());
        qs_error_clear();
        cr_assert_eq(qs_run_dir_note_best(&run, &good), QS_OK, "%s", qs_error_text());
        expect_best(4, 2);
        qs_run_dir_close(&run);
    }
}

static void expect_length_refused(const qs_config *c, const char *text)
{
    qs_run_dir run;
    cr_assert_eq(open_as(&run, c, QS_RESUME_AUTO, false), QS_ERR_RESUME, "%s", text);
    cr_assert_not_null(strstr(qs_error_text(), text), "%s", qs_error_text());
    cr_assert(!fx_exists("run.lock"));
}

Test(run_dir, finished_run_goes_on_with_more_steps_where_those_done_stay_the_same)
{
    qs_config c = fx_config();
    qs_run_dir run;
    qs_comm *comm = NULL;
    c.train.steps = 40;
    c.optim.schedule = QS_SCHEDULE_CONSTANT;
    c.optim.warmup = 0.05;
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK);
    cr_assert_eq(qs_comm_self_create(&comm), QS_OK);
    cr_assert_eq(qs_run_dir_finish(&run, comm), QS_OK, "%s", qs_error_text());
    qs_comm_destroy(comm);
    qs_run_dir_close(&run);

    c.train.steps = 80;
    c.optim.warmup = 2;
    expect_length_refused(&c, "train.steps (then and now: 40 and 80); give the old value");
    fx_save_step(40, 1); /* without a checkpoint it would begin anew */
    c.optim.warmup = 0.05;
    expect_length_refused(&c, "give optim.warmup=2 as well");
    c.optim.schedule = QS_SCHEDULE_LINEAR;
    c.optim.warmup = 2;
    expect_length_refused(&c, "other learning rates");
    c.optim.schedule = QS_SCHEDULE_CONSTANT;
    c.train.steps = 39;
    expect_length_refused(&c, "40 steps are done; give at least as many");
    c.train.steps = 0;
    c.train.epochs = 3;
    expect_length_refused(&c, "train.steps (then and now: 40 and 0)");
    c.train.epochs = 0;

    c.train.steps = 40;
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK, "%s", qs_error_text());
    cr_assert(run.finished && !run.locked, "the same steps in another word");
    c.train.steps = 80;
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK, "%s", qs_error_text());
    cr_assert(!run.finished && run.locked);
    qs_run_dir_close(&run);
}

Test(run_dir, strangers_directory_is_refused_and_left_alone)
{
    qs_config c = fx_config();
    qs_run_dir run;
    write_text("thesis.tex", "x");
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_ERR_OUTPUT_TAKEN);
    cr_assert_not_null(strstr(qs_error_text(), "thesis.tex"), "%s", qs_error_text());
    cr_assert_eq(fx_entries(), 1);
    write_text("run.json", "{\"format\": \"other\"}");
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, true), QS_ERR_OUTPUT_TAKEN);
    write_text("run.json", "{\"format\": ");
    cr_assert_eq(qs_exit_code(open_as(&run, &c, QS_RESUME_AUTO, true)), 3);
    cr_assert_eq(fx_entries(), 2);
    char file[160];
    snprintf(file, sizeof file, "%s/thesis.tex", fx_run_dir);
    snprintf(c.output, sizeof c.output, "%s", file);
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, true), QS_ERR_OUTPUT_TAKEN);
}

Test(run_dir, wishes_about_resuming_are_kept)
{
    qs_config c = fx_config();
    qs_run_dir run;
    cr_assert_eq(open_as(&run, &c, QS_RESUME_MUST, false), QS_ERR_CHECKPOINT);
    cr_assert_eq(open_as(&run, &c, QS_RESUME_NEVER, false), QS_OK);
    qs_run_dir_close(&run);
    cr_assert_eq(open_as(&run, &c, QS_RESUME_NEVER, false), QS_ERR_OUTPUT_TAKEN);
    cr_assert_eq(open_as(&run, &c, QS_RESUME_MUST, false), QS_ERR_CHECKPOINT, "none written yet");
}

Test(run_dir, abandoned_directory_goes_only_if_it_was_made_and_nothing_else_is_in_it)
{
    qs_config c = fx_config();
    qs_run_dir run;
    snprintf(c.output, sizeof c.output, "%s/new/a/b/demo", fx_folder);
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK);
    qs_run_dir_abandon(&run);
    snprintf(c.output, sizeof c.output, "%s/new", fx_folder);
    cr_assert_neq(access(c.output, F_OK), 0, "those above it were made as well");
    cr_assert_eq(access(fx_folder, F_OK), 0);
    snprintf(c.output, sizeof c.output, "%s/new/a/b/demo", fx_folder);
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK);
    snprintf(c.output, sizeof c.output, "%s/new/a/mine", fx_folder);
    cr_assert_eq(qs_io_write_new(c.output, "x", 1), QS_OK);
    qs_run_dir_abandon(&run);
    cr_assert_eq(access(c.output, F_OK), 0);
    snprintf(c.output, sizeof c.output, "%s/new/a/b", fx_folder);
    cr_assert_neq(access(c.output, F_OK), 0);
    c = fx_config();
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK);
    qs_run_dir_abandon(&run);
    cr_assert(fx_exists("run.json"), "the directory was there before");
    qs_run_dir_close(&run);
    cr_assert(!fx_exists("run.lock"));
}

Test(run_dir, configuration_may_change_until_there_is_a_checkpoint)
{
    qs_config c = fx_config();
    qs_run_dir run;
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK);
    qs_run_dir_close(&run);
    c.optim.lr = 0.5;
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK);
    qs_run_dir_close(&run);
    fx_save_step(1, 1);
    c.train.log_every = 7;
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK);
    qs_run_dir_close(&run);
    cr_assert_neq(recorded().train.log_every, 7, "its checkpoint may be of other data");
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK);
    cr_assert_eq(begin_as(&run, &c), QS_OK, "%s", qs_error_text());
    qs_run_dir_close(&run);
    cr_assert_eq(recorded().train.log_every, 7);
    c.optim.lr = 0.25;
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_ERR_RESUME);
    cr_assert_not_null(strstr(qs_error_text(), "optim.lr (then and now: 0.5 and 0.25)"), "%s",
                       qs_error_text());
    cr_assert(!fx_exists("run.lock"));
}

Test(run_dir, second_writer_is_refused_while_the_first_lives)
{
    qs_config c = fx_config();
    qs_run_dir run, other;
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK);
    pid_t child = fork();
    if (child == 0) {
        qs_status st = open_as(&other, &c, QS_RESUME_AUTO, false);
        _exit(st == QS_ERR_OUTPUT_TAKEN && strstr(qs_error_text(), "--takeover") ? 0 : 1);
    }
    int status = 0;
    cr_assert_eq(waitpid(child, &status, 0), child);
    cr_assert(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    cr_assert(fx_exists("run.lock"), "still the first one's");
    qs_run_dir_close(&run);
    cr_assert(!fx_exists("run.lock"));
}

Test(run_dir, lock_of_a_killed_process_is_taken_over)
{
    qs_config c = fx_config();
    qs_run_dir run;
    int status = 0;
    pid_t child = fork();
    if (child == 0) {
        _exit(open_as(&run, &c, QS_RESUME_AUTO, false) == QS_OK ? 0 : 1); /* without close */
    }
    cr_assert_eq(waitpid(child, &status, 0), child);
    cr_assert(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    cr_assert(fx_exists("run.lock"));
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK, "%s", qs_error_text());
    cr_assert(!run.contested);
    qs_run_dir_close(&run);
    cr_assert_eq(fx_entries(), 2, "config.yaml and run.json");
}

Test(run_dir, lock_of_a_dead_process_that_nobody_collected_is_taken_over)
{
    qs_config c = fx_config();
    qs_run_dir run;
    pid_t child = fork();
    if (child == 0) {
        _exit(open_as(&run, &c, QS_RESUME_AUTO, false) == QS_OK ? 0 : 1); /* without close */
    }
    siginfo_t info; /* see that it is dead, and leave it so */
    cr_assert_eq(waitid(P_PID, (id_t)child, &info, WEXITED | WNOWAIT), 0);
    cr_assert_eq(info.si_status, 0);
    cr_assert(fx_exists("run.lock"));
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK, "%s", qs_error_text());
    qs_run_dir_close(&run);
    cr_assert_eq(fx_entries(), 2, "config.yaml and run.json");
}

Test(run_dir, writer_that_is_just_dying_is_waited_for)
{
    qs_config c = fx_config();
    qs_run_dir run;
    int ready[2], status = 0;
    char byte = 0;
    cr_assert_eq(pipe(ready), 0);
    pid_t child = fork();
    if (child == 0) {
        bool good = open_as(&run, &c, QS_RESUME_AUTO, false) == QS_OK;
        good = write(ready[1], "x", 1) == 1 && good;
        usleep(500000);
        _exit(good ? 0 : 1); /* without close */
    }
    cr_assert_eq(read(ready[0], &byte, 1), 1);
    pid_t second = fork(); /* a dead child counts as alive until somebody waits for it */
    if (second == 0) {
        _exit(open_as(&run, &c, QS_RESUME_AUTO, false) == QS_OK ? 0 : 1);
    }
    cr_assert_eq(waitpid(child, &status, 0), child);
    cr_assert(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    cr_assert_eq(waitpid(second, &status, 0), second);
    cr_assert(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

Test(run_dir, lock_of_another_host_needs_takeover_or_the_same_job)
{
    static const char *const lock = "{\"host\": \"elsewhere\", \"job\": \"77\", \"pid\": 1, "
                                    "\"born\": 5, \"restart\": 0}";
    qs_config c = fx_config();
    qs_run_dir run;
    unsetenv("SLURM_JOB_ID");
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK);
    qs_run_dir_close(&run);
    write_text("run.lock", lock);
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_ERR_OUTPUT_TAKEN);
    cr_assert_not_null(strstr(qs_error_text(), "host elsewhere, job 77"), "%s", qs_error_text());
    setenv("SLURM_JOB_ID", "77", 1);
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_ERR_OUTPUT_TAKEN);
    setenv("SLURM_RESTART_COUNT", "1", 1);
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK, "%s", qs_error_text());
    cr_assert(run.contested, "nobody knows that it is gone");
    qs_run_dir_close(&run);
    unsetenv("SLURM_JOB_ID");
    write_text("run.lock", lock);
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, true), QS_OK, "%s", qs_error_text());
    cr_assert(run.contested);
    qs_run_dir_close(&run);
    write_text("run.lock", "");
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_ERR_OUTPUT_TAKEN);
    cr_assert_not_null(strstr(qs_error_text(), "cannot be read"), "%s", qs_error_text());
}

static void lock_path(char path[256])
{
    snprintf(path, 256, "%s/run.lock", fx_run_dir);
}

/* Add to a member of the lock; 0: as an older program, that has none. */
static void change_lock(const char *name, int64_t more)
{
    char path[256];
    lock_path(path);
    json_t *lock = json_load_file(path, 0, NULL);
    json_t *value = json_object_get(lock, name);
    cr_assert_gt(json_integer_value(value), 0, "%s", name);
    cr_assert_eq(more != 0 ? json_integer_set(value, json_integer_value(value) + more)
                           : json_object_del(lock, name),
                 0);
    cr_assert_eq(json_dump_file(lock, path, 0), 0);
    json_decref(lock);
}

/* As this host and this PID namespace write it, of a process that nobody is any more. */
static void write_lock(void)
{
    qs_config c = fx_config();
    qs_run_dir run;
    void *text = NULL;
    size_t bytes = 0;
    char path[256];
    lock_path(path);
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, true), QS_OK, "%s", qs_error_text());
    cr_assert_eq(qs_io_read_file(path, 4096, &text, &bytes), QS_OK);
    qs_run_dir_close(&run);
    write_text("run.lock", text);
    change_lock("born", 1);
    free(text);
}

static qs_status open_over_lock(void)
{
    qs_config c = fx_config();
    qs_run_dir run;
    const qs_status st = open_as(&run, &c, QS_RESUME_AUTO, false);
    if (st == QS_OK) {
        qs_run_dir_close(&run);
    }
    return st;
}

/* Its number is another one's here, and says nothing: the file does, which it keeps locked. */
Test(run_dir, a_process_of_another_container_lives_as_long_as_it_holds_its_lock)
{
    char path[256];
    lock_path(path);
    write_lock();
    cr_assert_eq(open_over_lock(), QS_OK, "numbered together: %s", qs_error_text());
    write_lock();
    change_lock("pids", 1);
    const int fd = open(path, O_RDWR | O_CLOEXEC);
    cr_assert(fd >= 0 && flock(fd, LOCK_EX) == 0);
    cr_assert_eq(open_over_lock(), QS_ERR_OUTPUT_TAKEN);
    cr_assert_not_null(strstr(qs_error_text(), "in another container writes here"), "%s",
                       qs_error_text());
    close(fd);
    cr_assert_eq(open_over_lock(), QS_OK, "%s", qs_error_text());
    write_lock();
    change_lock("pids", 1);
    change_lock("held", 0); /* where files cannot be locked nobody can tell */
    cr_assert_eq(open_over_lock(), QS_ERR_OUTPUT_TAKEN);
}

Test(run_dir, a_lock_is_held_by_its_process)
{
    qs_config c = fx_config();
    qs_run_dir run;
    char path[256];
    lock_path(path);
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK);
    const int fd = open(path, O_RDWR | O_CLOEXEC);
    cr_assert(fd >= 0 && flock(fd, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK);
    qs_run_dir_close(&run);
    cr_assert_eq(flock(fd, LOCK_EX | LOCK_NB), 0);
    close(fd);
}

/* Two machines may have one name; one that was started again is known by its machine-id. */
Test(run_dir, another_kernel_of_the_same_name_is_the_same_machine_only_by_its_id)
{
    struct stat id;
    const bool known = stat("/etc/machine-id", &id) == 0 && id.st_size > 0;
    write_lock();
    change_lock("kernel", 0); /* by an older program: the name decides */
    cr_assert_eq(open_over_lock(), QS_OK, "%s", qs_error_text());
    write_lock();
    change_lock("kernel", 1);
    cr_assert_eq(open_over_lock(), known ? QS_OK : QS_ERR_OUTPUT_TAKEN, "%s", qs_error_text());
    write_lock();
    change_lock("kernel", 1);
    if (known) {
        change_lock("machine", 1);
    }
    cr_assert_eq(open_over_lock(), QS_ERR_OUTPUT_TAKEN);
}

/* What only looks like ours makes a directory somebody's, and stays where it is in one of ours. */
Test(run_dir, files_of_others_are_neither_replaced_nor_removed)
{
    static const char *const names[] = {"config.yaml",      "run.json.tmp-mine", "run.lock.notes",
                                        "run.lock.new-",    "mine.tmp-17",       "run.json.tmp-0",
                                        "run.json.tmp-+17", "run.lock.17.17"};
    qs_config c = fx_config();
    qs_run_dir run;
    void *text = NULL;
    size_t bytes = 0;
    char path[256];
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        snprintf(path, sizeof path, "%s/%s", fx_run_dir, names[i]);
        cr_assert_eq(qs_io_mkdir(fx_run_dir), QS_OK);
        write_text(names[i], "my thesis");
        cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, true), QS_ERR_OUTPUT_TAKEN, "%s", names[i]);
        cr_assert_not_null(strstr(qs_error_text(), names[i]));
        cr_assert_eq(unlink(path), 0);
        cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK, "%s", qs_error_text());
        qs_run_dir_close(&run);
        if (i > 0) { /* config.yaml is ours in a directory of ours */
            write_text(names[i], "my thesis");
            cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK, "%s", qs_error_text());
            qs_run_dir_close(&run);
            cr_assert_eq(qs_io_read_file(path, 100, &text, &bytes), QS_OK, "%s", names[i]);
            cr_assert_str_eq(text, "my thesis");
            free(text);
            cr_assert_eq(unlink(path), 0);
        }
        write_text("run.json.tmp-17", "half"); /* of ours */
        write_text("run.lock.new-17", "half");
        write_text("run.lock.17", "half");
        cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK, "%s", qs_error_text());
        qs_run_dir_close(&run);
        cr_assert_eq(fx_entries(), 2, "config.yaml and run.json");
        cr_assert_eq(qs_io_remove_dir(fx_run_dir), QS_OK);
    }
}

Test(run_dir, a_start_that_was_killed_before_run_json_is_no_strangers)
{
    qs_config c = fx_config();
    qs_run_dir run;
    char path[256];
    snprintf(path, sizeof path, "%s/run.json", fx_run_dir);
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK);
    qs_run_dir_close(&run);
    cr_assert_eq(unlink(path), 0);
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK, "%s", qs_error_text());
    qs_run_dir_close(&run);
}

/* link() of the process, which taking the lock uses: tests act in the moment before it. */
static void (*before_link)(void);
static bool no_hard_links;
static int links;

int link(const char *from, const char *to)
{
    void (*act)(void) = before_link;
    before_link = NULL;
    links++;
    if (act != NULL) {
        act();
    }
    if (no_hard_links) {
        errno = EPERM;
        return -1;
    }
    return linkat(AT_FDCWD, from, AT_FDCWD, to, 0);
}

static void in_another_process(void (*work)(void))
{
    int status = 0;
    const pid_t child = fork();
    if (child == 0) {
        work();
        _exit(0);
    }
    cr_assert_eq(waitpid(child, &status, 0), child);
    cr_assert(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void hold_the_lock(void) /* and die without releasing it */
{
    qs_config c = fx_config();
    qs_run_dir run;
    if (open_as(&run, &c, QS_RESUME_AUTO, false) != QS_OK) {
        _exit(1);
    }
}

static void run_to_the_end(void)
{
    qs_config c = fx_config();
    qs_run_dir run;
    qs_comm *comm = NULL;
    c.optim.lr = 0.5;
    if (qs_comm_self_create(&comm) != QS_OK || open_as(&run, &c, QS_RESUME_AUTO, true) != QS_OK ||
        qs_run_dir_finish(&run, comm) != QS_OK) {
        _exit(1);
    }
    qs_run_dir_close(&run);
    qs_comm_destroy(comm);
}

Test(run_dir, locks_do_without_hard_links)
{
    qs_config c = fx_config();
    qs_run_dir run, other;
    no_hard_links = true;
    in_another_process(hold_the_lock);
    cr_assert(fx_exists("run.lock"));
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK, "%s", qs_error_text());
    const pid_t child = fork();
    if (child == 0) {
        const qs_status st = open_as(&other, &c, QS_RESUME_AUTO, false);
        _exit(st == QS_ERR_OUTPUT_TAKEN && strstr(qs_error_text(), "--takeover") ? 0 : 1);
    }
    int status = 0;
    cr_assert_eq(waitpid(child, &status, 0), child);
    cr_assert(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the first one lives");
    cr_assert_eq(open_as(&other, &c, QS_RESUME_AUTO, true), QS_OK, "%s", qs_error_text());
    qs_run_dir_close(&other);
    cr_assert_eq(fx_entries(), 2, "config.yaml and run.json");
}

static void sweep_all(void)
{
    char path[400];
    DIR *d = opendir(fx_run_dir);
    for (const struct dirent *e = readdir(d); e != NULL; e = readdir(d)) {
        if (strncmp(e->d_name, "run.lock.new-", 13) == 0) {
            snprintf(path, sizeof path, "%s/%s", fx_run_dir, e->d_name);
            cr_assert_eq(unlink(path), 0);
        }
    }
    closedir(d);
}

/* What a process that has just got the lock takes for leftovers. */
Test(run_dir, a_lock_that_is_swept_away_half_taken_is_written_again)
{
    qs_config c = fx_config();
    qs_run_dir run;
    before_link = sweep_all;
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK, "%s", qs_error_text());
    cr_assert_eq(links, 2, "nobody may see half a lock");
    cr_assert(fx_exists("run.lock"));
    qs_run_dir_close(&run);
    cr_assert_eq(fx_entries(), 2, "config.yaml and run.json");
}

/* Of a run that was killed while it removed its oldest checkpoint after the last save: no other
 * save follows. */
Test(run_dir, half_removed_checkpoints_go_at_the_start)
{
    qs_config c = fx_config();
    qs_run_dir run;
    char path[256];
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK);
    qs_run_dir_close(&run);
    snprintf(path, sizeof path, "%s/step-00000036.tmp-old", fx_run_dir);
    cr_assert_eq(mkdir(path, 0777), 0);
    strcat(path, "/rank-00000.h5");
    cr_assert_eq(qs_io_write_new(path, "x", 1), QS_OK);
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK, "%s", qs_error_text());
    cr_assert(!fx_exists("step-00000036.tmp-old"));
    qs_run_dir_close(&run);
}

static void finish_another(void)
{
    in_another_process(run_to_the_end);
}

Test(run_dir, a_run_that_came_and_went_before_the_lock_was_ours_is_seen)
{
    qs_config c = fx_config();
    qs_run_dir run;
    cr_assert_eq(rmdir(fx_run_dir), 0);
    before_link = finish_another;
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_ERR_RESUME, "%s", qs_error_text());
    cr_assert(fx_exists("run.json") && fx_exists("config.yaml"), "they are the other one's");
    cr_assert(!fx_exists("run.lock"));
    c.optim.lr = 0.5;
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK, "%s", qs_error_text());
    cr_assert(run.finished);
}

Test(run_dir, a_run_that_was_taken_over_notices_and_leaves_the_other_alone)
{
    qs_config c = fx_config();
    qs_run_dir run;
    qs_comm *comm = NULL;
    char path[256];
    void *before = NULL, *after = NULL;
    size_t bytes = 0;
    cr_assert_eq(rmdir(fx_run_dir), 0);
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK);
    cr_assert_eq(qs_comm_self_create(&comm), QS_OK);
    cr_assert_eq(qs_run_dir_still_ours(&run, comm), QS_OK, "%s", qs_error_text());
    write_text("run.lock", "{\"host\": \"elsewhere\", \"job\": \"77\", \"pid\": 1, "
                           "\"born\": 5, \"restart\": 0}");
    snprintf(path, sizeof path, "%s/run.json", fx_run_dir);
    cr_assert_eq(qs_io_read_file(path, 1000, &before, &bytes), QS_OK);
    cr_assert_eq(qs_run_dir_still_ours(&run, comm), QS_ERR_OUTPUT_TAKEN);
    cr_assert_not_null(strstr(qs_error_text(), "process 1 on host elsewhere, job 77"), "%s",
                       qs_error_text());
    cr_assert_eq(qs_run_dir_finish(&run, comm), QS_ERR_OUTPUT_TAKEN);
    qs_run_dir_abandon(&run);
    qs_error_clear();
    cr_assert_eq(qs_io_read_file(path, 1000, &after, &bytes), QS_OK, "%s", qs_error_text());
    cr_assert_str_eq(after, before);
    cr_assert(fx_exists("run.lock"));
    qs_comm_destroy(comm);
    free(before);
    free(after);
}

Test(run_dir, an_error_is_still_told_where_the_directory_went_away)
{
    qs_config c = fx_config();
    qs_run_dir run;
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK);
    scratch_remove(fx_folder);
    (void)QS_FAIL(QS_ERR_IO, "what happened");
    qs_run_dir_abandon(&run);
    qs_run_dir_close(&run);
    cr_assert_str_eq(qs_error_text(), "what happened");
}

Test(run_dir, a_start_without_room_leaves_nothing)
{
    struct rlimit limit;
    qs_config c = fx_config();
    qs_run_dir run;
    signal(SIGXFSZ, SIG_IGN);
    cr_assert_eq(getrlimit(RLIMIT_FSIZE, &limit), 0);
    for (rlim_t room = 0; room < 1200; room += 100) { /* lock, config.yaml, run.json */
        snprintf(c.output, sizeof c.output, "%s/new/demo", fx_folder);
        const rlim_t most = limit.rlim_cur;
        limit.rlim_cur = room;
        cr_assert_eq(setrlimit(RLIMIT_FSIZE, &limit), 0);
        const qs_status st = open_as(&run, &c, QS_RESUME_AUTO, false);
        limit.rlim_cur = most;
        cr_assert_eq(setrlimit(RLIMIT_FSIZE, &limit), 0);
        cr_assert_eq(st, QS_ERR_IO_FULL, "%s", qs_error_text());
        cr_assert_not_null(strstr(qs_error_text(), "ulimit -f"), "%s", qs_error_text());
        cr_assert_neq(access(dirname(c.output), F_OK), 0, "with room for %d bytes", (int)room);
    }
}

static qs_status open_body(team_member *me)
{
    qs_run_dir run;
    qs_status st = qs_run_dir_open(&run, me->ctx, QS_RESUME_AUTO, false, me->comm);
    if (st == QS_OK) {
        TEAM_CHECK(run.run_id[0], "rank %d was not told the run id", me->rank);
        TEAM_CHECK(run.locked == (me->rank == 0), "rank %d: locked", me->rank);
        QS_TRY(qs_run_dir_finish(&run, me->comm));
        qs_run_dir_close(&run);
    }
    return st;
}

Test(run_dir, all_ranks_hear_what_rank_0_found)
{
    qs_config c = fx_config();
    team_member members[TEAM_MAX];
    team_expect_ok(3, open_body, &c);
    write_text("run.json", "{}");
    team_run(members, 3, open_body, &c);
    for (int r = 0; r < 3; r++) {
        cr_assert_eq(qs_exit_code(members[r].st), 3);
    }
}
