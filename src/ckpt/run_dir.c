#define _GNU_SOURCE
#include "ckpt/run_dir.h"

#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <jansson.h>
#include <libgen.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "ckpt/ckpt_impl.h"
#include "ckpt/run_lock.h"
#include "qshard_version.h"
#include "store/io.h"
#include "store/json.h"
#include "store/manifest.h"
#include "store/temp.h"

enum { HOST_MAX = 64, LOCK_MAX = 4096, RUN_JSON_MAX = 1 << 20, PATH_ROOM = QS_PATH_MAX + 64 };

/* What rank 0 finds. */
typedef enum { FOUND_NOTHING, FOUND_EMPTY, FOUND_RUN } found;

/* ---- looking ---- */

/* A lock or a file of ours that is being written, or was by a killed process. */
static bool is_half_written(const char *name)
{
    static const char *const files[] = {"run.json", "config.yaml", "metrics.jsonl", "ranks.jsonl",
                                        "summary.csv"};
    bool is = qs_temp_pid(name, QS_RUN_LOCK_NAME, ".new-") > 0 ||
              qs_temp_pid(name, QS_RUN_LOCK_NAME, ".") > 0;
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        is = is || qs_temp_pid(name, files[i], QS_TEMP_MARK) > 0;
    }
    return is;
}

/* One that this program wrote: by its first line. */
static bool is_resolved_config(int dir, const char *name)
{
    char line[sizeof QS_CONFIG_FIRST_LINE] = "";
    const int fd = openat(dir, name, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    const ssize_t bytes = fd < 0 ? -1 : read(fd, line, sizeof line - 1);
    if (fd >= 0) {
        close(fd);
    }
    return bytes > 0 && strcmp(line, QS_CONFIG_FIRST_LINE) == 0;
}

/* Locks and files of ours that are half written do not make a directory anybody's; nor does a
 * lock's first name, which is removed while the file is open (run_lock.c). */
static bool is_leftover(int dir, const char *name)
{
    return strcmp(name, QS_RUN_LOCK_NAME) == 0 || is_half_written(name) ||
           qs_io_is_removed_open(name) ||
           (strcmp(name, "config.yaml") == 0 && is_resolved_config(dir, name));
}

typedef struct {
    bool run;
    char stranger[256];
} seen_entries;

static qs_status look_at_entry(void *user, int dir, const char *name)
{
    seen_entries *seen = user;
    if (strcmp(name, "run.json") == 0) {
        seen->run = true;
    } else if (!is_leftover(dir, name)) {
        snprintf(seen->stranger, sizeof seen->stranger, "%s", name);
    }
    return QS_OK;
}

static qs_status look(const char *dir, found *out)
{
    seen_entries seen = {false, ""};
    bool there = false;
    const qs_status st = qs_io_list(dir, QS_ERR_IO, look_at_entry, &seen, &there);
    if (st != QS_OK && !there) {
        const int error = qs_error_cause();
        qs_error_clear();
        return QS_FAIL(QS_ERR_OUTPUT_TAKEN, "%s: %s; choose another output", dir, strerror(error));
    }
    QS_TRY(st);
    *out = !there ? FOUND_NOTHING : seen.run ? FOUND_RUN : FOUND_EMPTY;
    if (*out == FOUND_EMPTY && seen.stranger[0]) {
        return QS_FAIL(QS_ERR_OUTPUT_TAKEN,
                       "%s: holds \"%s\" but no run.json, so it is not a run of ours; choose "
                       "another output",
                       dir, seen.stranger);
    }
    return QS_OK;
}

static qs_status sweep_entry(void *user, int dir, const char *name)
{
    (void)user;
    if (is_half_written(name)) {
        (void)unlinkat(dir, name, 0); /* refuses directories, as it should */
    }
    return QS_OK;
}

/* Remove what a killed process left half written or half removed, be there another save or not. The
 * lock is ours by now. */
static qs_status sweep(const char *dir)
{
    QS_TRY(qs_io_list(dir, QS_ERR_IO, sweep_entry, NULL, NULL));
    return qs_ckpt_sweep(dir, true);
}

/* ---- run.json ---- */

/* `foreign`: what it is called if the file belongs to another program. */
static qs_status read_run(const char *dir, qs_status foreign, json_t **out)
{
    char path[PATH_ROOM];
    void *text = NULL;
    size_t bytes = 0;
    const char *format = NULL, *run_id = NULL;
    int64_t version = 0;
    qs_status st = QS_OK;
    *out = NULL;
    snprintf(path, sizeof path, "%s/run.json", dir);
    QS_GOTO(qs_io_read_file(path, RUN_JSON_MAX, &text, &bytes));
    QS_GOTO(qs_json_parse(out, text, bytes, path));
    if (!json_is_object(*out)) {
        QS_GOTO(QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: is not a JSON object", path));
    }
    QS_GOTO(qs_json_text(*out, "format", &format, path));
    if (strcmp(format, "qshard-run") != 0) {
        QS_GOTO(QS_FAIL(
            foreign, "%s: format: \"%.40s\" is not \"qshard-run\"; it is not a run of ours%s", path,
            format, foreign == QS_ERR_OUTPUT_TAKEN ? "; choose another output" : ""));
    }
    QS_GOTO(qs_json_i64(*out, "format_version", 0, INT32_MAX, &version, path));
    if (version != 1) {
        QS_GOTO(QS_FAIL(QS_ERR_INPUT_UNKNOWN, "%s: format_version=%d; this program reads 1", path,
                        (int)version));
    }
    QS_GOTO(qs_json_text(*out, "run_id", &run_id, path));
    if (strlen(run_id) >= sizeof((qs_run_dir *)0)->run_id) {
        QS_GOTO(QS_FAIL(QS_ERR_INPUT_VALUE, "%s: run_id is longer than 39 letters", path));
    }
    if (!json_is_boolean(json_object_get(*out, "finished"))) {
        QS_GOTO(QS_FAIL(QS_ERR_INPUT_VALUE, "%s: finished is neither true nor false", path));
    }
done:
    free(text);
    if (st != QS_OK) {
        json_decref(*out);
        *out = NULL;
    }
    return st;
}

qs_status qs_run_dir_check(const char *dir)
{
    json_t *run = NULL;
    QS_TRY(read_run(dir, QS_ERR_INPUT_FORMAT, &run));
    json_decref(run);
    return QS_OK;
}

static qs_status write_run(const char *dir, const json_t *run)
{
    char path[PATH_ROOM];
    snprintf(path, sizeof path, "%s/run.json", dir);
    char *text = json_dumps(run, JSON_INDENT(2) | JSON_SORT_KEYS);
    if (!text) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory", path);
    }
    qs_status st = qs_io_write_file(path, text, strlen(text));
    free(text);
    return st;
}

/* Time for humans, random digits so that two runs never share an id. */
static void make_run_id(char *out, size_t capacity, const char *created)
{
    uint32_t random = 0;
    if (getrandom(&random, sizeof random, 0) != (ssize_t)sizeof random) {
        random = (uint32_t)getpid();
    }
    snprintf(out, capacity, "%s-%08x", created, random);
}

static void now_text(char out[24])
{
    time_t now = time(NULL);
    struct tm utc;
    gmtime_r(&now, &utc);
    strftime(out, 24, "%Y%m%dT%H%M%SZ", &utc);
}

/* A fresh object, or what a resumed run's file becomes. */
static qs_status fill_run(json_t **run, const qs_config *cfg, const char *hosts, int nranks)
{
    char created[24], run_id[40];
    now_text(created);
    make_run_id(run_id, sizeof run_id, created);
    if (!*run) {
        *run = json_pack("{s:s, s:i, s:s, s:s, s:i}", "format", "qshard-run", "format_version", 1,
                         "run_id", run_id, "created", created, "starts", 0);
    }
    json_t *list = json_array();
    for (int r = 0; r < nranks; r++) { /* each host once, in the order of its first rank */
        const char *host = hosts + (size_t)r * HOST_MAX;
        if (r == 0 || strcmp(host, host - HOST_MAX) != 0) {
            json_array_append_new(list, json_string(host));
        }
    }
    json_int_t starts = json_integer_value(json_object_get(*run, "starts")) + 1;
    int failed = !*run || !list;
    failed |= json_object_set_new(*run, "hosts", list) != 0;
    failed |= json_object_set_new(*run, "nranks", json_integer(nranks)) != 0;
    failed |= json_object_set_new(*run, "starts", json_integer(starts)) != 0;
    failed |= json_object_set_new(*run, "version", json_string(QSHARD_VERSION)) != 0;
    failed |= json_object_set_new(*run, "build", json_string(QSHARD_COMMIT)) != 0;
    failed |= json_object_set_new(*run, "finished", json_false()) != 0;
    (void)json_object_del(*run, "ended"); /* of a run that goes on longer; else it is not there */
    return failed ? QS_FAIL(QS_ERR_MEMORY, "%s: no memory for run.json", cfg->output) : QS_OK;
}

/* ---- opening ---- */

static qs_status make_directory(const char *dir, bool *made_parent)
{
    char parent[QS_PATH_MAX];
    snprintf(parent, sizeof parent, "%s", dir);
    size_t length = strlen(parent);
    while (length > 1 && parent[length - 1] == '/') {
        parent[--length] = '\0';
    }
    char *slash = strrchr(parent, '/');
    struct stat info;
    if (slash && slash != parent) {
        *slash = '\0';
        if (stat(parent, &info) != 0 && errno == ENOENT) {
            QS_TRY(qs_io_mkdir(parent));
            *made_parent = true;
        }
    }
    return qs_io_mkdir(dir);
}

/* What the run in cfg->output was started with: NULL unless it has something to lose. */
static qs_status old_config(const qs_config *cfg, bool finished, int count, qs_config **old)
{
    char path[PATH_ROOM];
    snprintf(path, sizeof path, "%s/config.yaml", cfg->output);
    struct stat info;
    *old = NULL;
    if ((count == 0 && !finished) || stat(path, &info) != 0) {
        return QS_OK;
    }
    *old = malloc(sizeof **old);
    if (*old == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory", path);
    }
    return qs_config_load(*old, path, NULL, 0);
}

/* A run that has something to lose goes on with its own configuration only, or with another length
 * that the `done` steps of its newest checkpoint allow: a finished one that is given more steps is
 * not finished any more. */
static qs_status compare_config(const qs_config *cfg, int count, int64_t done, bool *finished)
{
    char subject[PATH_ROOM];
    qs_config *old = NULL;
    qs_status st = old_config(cfg, *finished, count, &old);
    if (st == QS_OK && old != NULL) {
        const int64_t steps = old->train.steps;
        snprintf(subject, sizeof subject, "%s: this run %s", cfg->output,
                 *finished ? "has finished" : "was started");
        st = qs_ckpt_compare_configs(old, cfg, count > 0 ? done : 0, subject);
        *finished = *finished && (st != QS_OK || old->train.steps <= steps);
    }
    free(old);
    return st;
}

static qs_status write_config(const qs_config *cfg)
{
    char path[PATH_ROOM];
    snprintf(path, sizeof path, "%s/config.yaml", cfg->output);
    char *text = qs_config_dump(cfg);
    if (!text) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory", path);
    }
    qs_status st = qs_io_write_file(path, text, strlen(text));
    free(text);
    return st;
}

static qs_status check_wish(const char *dir, found what, qs_resume resume)
{
    if (what == FOUND_RUN && resume == QS_RESUME_NEVER) {
        return QS_FAIL(QS_ERR_OUTPUT_TAKEN,
                       "%s: holds a run, and --resume never was given; choose another output or "
                       "use --resume auto",
                       dir);
    }
    if (what != FOUND_RUN && resume == QS_RESUME_MUST) {
        return QS_FAIL(QS_ERR_CHECKPOINT,
                       "%s: holds no run, and --resume must was given; use --resume auto", dir);
    }
    return QS_OK;
}

/* A run in the directory: its run.json, and its newest checkpoint's step, *count 1, if it has one.
 */
static qs_status read_found(qs_run_dir *run, const qs_config *cfg, json_t **json, int64_t *step,
                            int *count)
{
    QS_TRY(read_run(cfg->output, QS_ERR_OUTPUT_TAKEN, json));
    run->finished = json_is_true(json_object_get(*json, "finished"));
    return qs_manifest_list(cfg->output, step, 1, count);
}

/* A run that was there before: that it is ours, and may go on as it is wished. */
static qs_status look_at_run(qs_run_dir *run, const qs_config *cfg, qs_resume resume, json_t **json)
{
    int64_t step = -1;
    int count = 0;
    QS_TRY(read_found(run, cfg, json, &step, &count));
    if (count == 0 && !run->finished && resume == QS_RESUME_MUST) {
        return QS_FAIL(QS_ERR_CHECKPOINT,
                       "%s: no checkpoint that verifies, and --resume must was given; use --resume "
                       "auto to start anew",
                       cfg->output);
    }
    return compare_config(cfg, count, step, &run->finished);
}

/* Look again: until the lock was ours, another process may have started, or even finished, a run.
 */
static qs_status look_locked(qs_run_dir *run, const qs_config *cfg, qs_resume resume, json_t **json)
{
    found what;
    json_decref(*json);
    *json = NULL;
    QS_TRY(look(cfg->output, &what));
    QS_TRY(check_wish(cfg->output, what, resume));
    if (what != FOUND_RUN) {
        return QS_OK;
    }
    run->made = run->made_parent = false; /* whatever we made, it is the other's by now */
    return look_at_run(run, cfg, resume, json);
}

static qs_status open_here(qs_run_dir *run, const qs_config *cfg, qs_resume resume, bool takeover,
                           const char *hosts, int nranks)
{
    found what;
    json_t *json = NULL;
    qs_status st = QS_OK;
    QS_TRY(look(cfg->output, &what));
    QS_TRY(check_wish(cfg->output, what, resume));
    if (what == FOUND_NOTHING) {
        QS_GOTO(make_directory(cfg->output, &run->made_parent));
        run->made = true;
    }
    if (what == FOUND_RUN) {
        QS_GOTO(look_at_run(run, cfg, resume, &json));
    }
    if (!run->finished) {
        QS_GOTO(qs_run_lock_take(cfg->output, takeover, &run->lock));
        run->locked = true;
        QS_GOTO(look_locked(run, cfg, resume, &json));
    }
    if (run->finished) {
        qs_run_dir_close(run);
    } else {
        QS_GOTO(sweep(cfg->output));
        QS_GOTO(fill_run(&json, cfg, hosts, nranks));
        QS_GOTO(write_config(cfg)); /* before run.json: a directory with that is complete */
        QS_GOTO(write_run(cfg->output, json));
    }
    snprintf(run->run_id, sizeof run->run_id, "%s",
             json_string_value(json_object_get(json, "run_id")));
done:
    json_decref(json);
    if (st != QS_OK) {
        qs_run_dir_abandon(run);
    }
    return st;
}

/* ---- before ---- */

static int recorded_gemm(const qs_config *cfg)
{
    found what;
    int64_t step = -1;
    int count = 0, gemm = QS_GEMM_AUTO;
    json_t *json = NULL;
    qs_config *old = NULL;
    qs_run_dir run = {.finished = false};
    if (look(cfg->output, &what) == QS_OK && what == FOUND_RUN &&
        read_found(&run, cfg, &json, &step, &count) == QS_OK &&
        old_config(cfg, run.finished, count, &old) == QS_OK && old != NULL) {
        gemm = old->cpu.gemm;
    }
    qs_error_clear(); /* opening says what is wrong with the directory */
    json_decref(json);
    free(old);
    return gemm;
}

qs_status qs_run_dir_settle(qs_config *cfg, qs_comm *comm)
{
    if (cfg->cpu.gemm != QS_GEMM_AUTO) {
        return QS_OK;
    }
    int64_t gemm = qs_comm_rank(comm) == 0 ? recorded_gemm(cfg) : QS_GEMM_AUTO;
    QS_TRY(qs_comm_max_i64(comm, &gemm, 1));
    cfg->cpu.gemm = (int)gemm;
    return QS_OK;
}

/* ---- who sees it ---- */

/* Another run in a directory of this name, on a host that does not see rank 0's: it would be taken
 * for this one by whoever looks there. */
static qs_status check_stranger(const qs_run_dir *run, const char *root_host)
{
    char host[HOST_MAX] = "";
    json_t *json = NULL;
    qs_status st = QS_OK;
    if (read_run(run->dir, QS_ERR_OUTPUT_TAKEN, &json) != QS_OK) {
        qs_error_clear(); /* no run: nothing that could be mistaken for this one */
        return QS_OK;
    }
    const char *run_id = json_string_value(json_object_get(json, "run_id"));
    if (strcmp(run_id, run->run_id) != 0) {
        gethostname(host, sizeof host - 1);
        st = QS_FAIL(QS_ERR_DISAGREE,
                     "%s: host %s has run %s in a directory of this name, host %s writes run %s "
                     "there; remove the one that is not wanted, or choose another output",
                     run->dir, host, run_id, root_host, run->run_id);
    }
    json_decref(json);
    return st;
}

/* Rank 0's lock names its process: whoever reads the same text sees the same directory. */
static qs_status find_sight(qs_run_dir *run, qs_comm *comm)
{
    struct {
        char lock[LOCK_MAX], host[HOST_MAX];
    } root = {{0}, {0}};
    char mine[LOCK_MAX] = "";
    int error = qs_run_lock_text(run->dir, mine, sizeof mine);
    memcpy(root.lock, mine, sizeof mine);
    gethostname(root.host, sizeof root.host - 1);
    QS_TRY(qs_comm_bcast(comm, &root, sizeof root, 0));
    error = error == 0 && strcmp(mine, root.lock) != 0 ? ENOENT : error;
    error = qs_comm_rank(comm) == 0 ? 0 : error;
    QS_TRY(qs_comm_agree(comm, error == 0 ? QS_OK : check_stranger(run, root.host)));
    return qs_seen_agree(&run->seen, run->dir, error, "the checkpoints of its ranks are kept on",
                         comm);
}

qs_status qs_run_dir_open(qs_run_dir *out, const qs_config *cfg, qs_resume resume, bool takeover,
                          qs_comm *comm)
{
    memset(out, 0, sizeof *out);
    snprintf(out->dir, sizeof out->dir, "%s", cfg->output);
    int nranks = qs_comm_nranks(comm);
    char mine[HOST_MAX] = "";
    gethostname(mine, sizeof mine - 1);
    char *hosts = calloc((size_t)nranks, HOST_MAX);
    QS_TRY(qs_comm_agree(comm, hosts ? QS_OK : QS_FAIL(QS_ERR_MEMORY, "no memory for host names")));
    qs_status st = qs_comm_all_gather_now(comm, mine, hosts, HOST_MAX);
    if (st == QS_OK) {
        bool first = qs_comm_rank(comm) == 0;
        st = qs_comm_agree(comm,
                           first ? open_here(out, cfg, resume, takeover, hosts, nranks) : QS_OK);
    }
    free(hosts);
    struct {
        char run_id[sizeof out->run_id];
        bool finished;
    } told;
    memset(&told, 0, sizeof told);
    memcpy(told.run_id, out->run_id, sizeof told.run_id);
    told.finished = out->finished;
    QS_TRY(st);
    QS_TRY(qs_comm_bcast(comm, &told, sizeof told, 0));
    memcpy(out->run_id, told.run_id, sizeof told.run_id);
    out->finished = told.finished;
    return out->finished ? QS_OK : find_sight(out, comm);
}

/* ---- during a run and at its end ---- */

qs_status qs_run_dir_still_ours(const qs_run_dir *run, qs_comm *comm)
{
    return qs_comm_agree(comm, run->locked ? qs_run_lock_check(run->dir) : QS_OK);
}

/* Object "best" of run.json. */
static qs_status parse_best(const json_t *run, const char *dir, qs_ckpt_eval *best)
{
    char path[PATH_ROOM];
    const json_t *object = json_object_get(run, "best");
    *best = (qs_ckpt_eval){.step = -1, .loss = NAN};
    if (object == NULL) {
        return QS_OK;
    }
    snprintf(path, sizeof path, "%s/run.json: best", dir);
    if (!json_is_object(object)) {
        return QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: is not a JSON object", path);
    }
    QS_TRY(qs_json_i64(object, "step", 0, INT64_MAX, &best->step, path));
    return qs_json_f64(object, "eval_loss", -DBL_MAX, DBL_MAX, &best->loss, path);
}

qs_status qs_run_dir_read_best(const char *dir, qs_ckpt_eval *best)
{
    json_t *json = NULL;
    QS_TRY(read_run(dir, QS_ERR_INPUT_FORMAT, &json));
    const qs_status st = parse_best(json, dir, best);
    json_decref(json);
    return st;
}

qs_status qs_run_dir_note_best(const qs_run_dir *run, const qs_ckpt_eval *best)
{
    json_t *json = NULL;
    qs_ckpt_eval noted;
    qs_status st = QS_OK;
    QS_TRY(qs_run_lock_check(run->dir));
    QS_TRY(read_run(run->dir, QS_ERR_OUTPUT_TAKEN, &json));
    if (parse_best(json, run->dir, &noted) != QS_OK) {
        qs_error_clear(); /* what cannot be read is written anew */
        noted = (qs_ckpt_eval){.step = -2, .loss = NAN};
    }
    if (noted.step == best->step && (best->step < 0 || noted.loss == best->loss)) {
        goto done;
    }
    (void)json_object_del(json, "best");
    if (best->step >= 0 &&
        json_object_set_new(json, "best",
                            json_pack("{s:I, s:f}", "step", (json_int_t)best->step, "eval_loss",
                                      best->loss)) != 0) {
        QS_GOTO(QS_FAIL(QS_ERR_MEMORY, "%s: no memory for run.json", run->dir));
    }
    st = write_run(run->dir, json);
done:
    json_decref(json);
    return st;
}

static qs_status finish_here(const qs_run_dir *run)
{
    json_t *json = NULL;
    char now[24];
    now_text(now);
    QS_TRY(qs_run_lock_check(run->dir));
    QS_TRY(read_run(run->dir, QS_ERR_OUTPUT_TAKEN, &json));
    qs_status st = QS_OK;
    if (json_object_set_new(json, "finished", json_true()) != 0 ||
        json_object_set_new(json, "ended", json_string(now)) != 0) {
        st = QS_FAIL(QS_ERR_MEMORY, "%s: no memory for run.json", run->dir);
    }
    st = st == QS_OK ? write_run(run->dir, json) : st;
    json_decref(json);
    return st;
}

qs_status qs_run_dir_finish(qs_run_dir *run, qs_comm *comm)
{
    return qs_comm_agree(comm, qs_comm_rank(comm) == 0 ? finish_here(run) : QS_OK);
}

void qs_run_dir_abandon(qs_run_dir *run)
{
    static const char *const names[] = {"config.yaml", "run.json", "metrics.jsonl", "ranks.jsonl"};
    char path[PATH_ROOM];
    const bool ours = run->made && run->locked && qs_run_lock_check(run->dir) == QS_OK;
    for (size_t i = 0; ours && i < sizeof names / sizeof *names; i++) {
        snprintf(path, sizeof path, "%s/%s", run->dir, names[i]);
        (void)unlink(path);
    }
    qs_run_dir_close(run);
    snprintf(path, sizeof path, "%s", run->dir);
    if (run->made) { /* refused while anything else is in there, and so is its parent */
        (void)rmdir(path);
    }
    if (run->made_parent) {
        (void)rmdir(dirname(path));
    }
}

void qs_run_dir_close(qs_run_dir *run)
{
    if (run->locked) {
        qs_run_lock_release(run->dir, run->lock);
        run->locked = false;
    }
}
