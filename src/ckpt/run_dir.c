/* Opening a run's directory, who sees it, and what is left of it at the end. */
#include "ckpt/run_dir.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "ckpt/ckpt_impl.h"
#include "ckpt/run_lock.h"
#include "ckpt/run_look.h"
#include "ckpt/run_record.h"
#include "store/io.h"
#include "store/manifest.h"

enum { LOCK_MAX = 4096, PATH_ROOM = QS_PATH_MAX + 64 };

/* ---- opening ---- */

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

static qs_status check_wish(const char *dir, qs_run_found what, qs_resume resume)
{
    if (what == QS_RUN_THERE && resume == QS_RESUME_NEVER) {
        return QS_FAIL(QS_ERR_OUTPUT_TAKEN,
                       "%s: holds a run, and --resume never was given; choose another output or "
                       "use --resume auto",
                       dir);
    }
    if (what != QS_RUN_THERE && resume == QS_RESUME_MUST) {
        return QS_FAIL(QS_ERR_CHECKPOINT,
                       "%s: holds no run, and --resume must was given; use --resume auto", dir);
    }
    return QS_OK;
}

/* A run in the directory: its run.json, and its newest checkpoint's step, *count 1, if it has one.
 */
static qs_status read_found(const qs_config *cfg, qs_run_record *record, int64_t *step, int *count)
{
    QS_TRY(qs_run_record_read(record, cfg->output, QS_ERR_OUTPUT_TAKEN));
    return qs_manifest_list(cfg->output, step, 1, count);
}

/* A run that was there before: that it is ours, and may go on as it is wished. */
static qs_status look_at_run(qs_run_dir *run, const qs_config *cfg, qs_resume resume,
                             qs_run_record *record)
{
    int64_t step = -1;
    int count = 0;
    QS_TRY(read_found(cfg, record, &step, &count));
    run->finished = record->finished;
    run->goes_on = count > 0;
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
static qs_status look_locked(qs_run_dir *run, const qs_config *cfg, qs_resume resume,
                             qs_run_record *record)
{
    qs_run_found what;
    qs_run_record_free(record);
    run->goes_on = false;
    QS_TRY(qs_run_look(cfg->output, &what));
    QS_TRY(check_wish(cfg->output, what, resume));
    if (what != QS_RUN_THERE) {
        return QS_OK;
    }
    run->made = 0; /* whatever we made, it is the other's by now */
    return look_at_run(run, cfg, resume, record);
}

/* config.yaml and run.json of this start. */
static qs_status write_start(const qs_config *cfg, const qs_run_record *record)
{
    QS_TRY(write_config(cfg)); /* before run.json: a directory with that is complete */
    return qs_run_record_write(record, cfg->output);
}

static qs_status open_here(qs_run_dir *run, const qs_config *cfg, qs_resume resume, bool takeover,
                           const char (*hosts)[QS_HOST_NAME_BYTES], int nranks)
{
    qs_run_found what;
    qs_run_record *record = &run->record;
    qs_status st = QS_OK;
    QS_TRY(qs_run_look(cfg->output, &what));
    QS_TRY(check_wish(cfg->output, what, resume));
    if (what == QS_RUN_NONE) {
        QS_GOTO(qs_io_make_dirs(cfg->output, &run->made));
    }
    if (what == QS_RUN_THERE) {
        QS_GOTO(look_at_run(run, cfg, resume, record));
    }
    if (!run->finished) {
        QS_GOTO(qs_run_lock_take(cfg->output, takeover, &run->lock, &run->contested));
        run->locked = true;
        QS_GOTO(look_locked(run, cfg, resume, record));
    }
    if (!run->finished) {
        QS_GOTO(qs_run_sweep(cfg->output));
        QS_GOTO(qs_run_record_start(record, cfg->output, hosts, nranks));
        QS_GOTO(run->goes_on ? QS_OK : write_start(cfg, record));
    }
    memcpy(run->run_id, record->run_id, sizeof run->run_id);
    if (run->finished) {
        qs_run_dir_close(run);
    }
done:
    if (st != QS_OK) {
        qs_run_dir_abandon(run);
    }
    return st;
}

/* ---- before ---- */

static qs_gemm_kind recorded_gemm(const qs_config *cfg)
{
    qs_run_found what;
    int64_t step = -1;
    int count = 0;
    qs_gemm_kind gemm = QS_GEMM_AUTO;
    qs_run_record record = {.finished = false};
    qs_config *old = NULL;
    if (qs_run_look(cfg->output, &what) == QS_OK && what == QS_RUN_THERE &&
        read_found(cfg, &record, &step, &count) == QS_OK &&
        old_config(cfg, record.finished, count, &old) == QS_OK && old != NULL) {
        gemm = old->cpu.gemm;
    }
    qs_error_clear(); /* opening says what is wrong with the directory */
    qs_run_record_free(&record);
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
    cfg->cpu.gemm = (qs_gemm_kind)gemm;
    return QS_OK;
}

qs_status qs_run_dir_foresee(const qs_config *cfg, qs_resume resume, bool *finished)
{
    qs_run_found what;
    qs_run_dir run = {.finished = false};
    *finished = false;
    QS_TRY(qs_run_look(cfg->output, &what));
    QS_TRY(check_wish(cfg->output, what, resume));
    if (what != QS_RUN_THERE) {
        return QS_OK;
    }
    const qs_status st = look_at_run(&run, cfg, resume, &run.record);
    qs_run_record_free(&run.record);
    *finished = st == QS_OK && run.finished;
    return st;
}

/* ---- who sees it ---- */

/* Another run in a directory of this name, on a host that does not see rank 0's: it would be taken
 * for this one by whoever looks there. */
static qs_status check_stranger(const qs_run_dir *run, const char *root_host)
{
    char host[QS_HOST_NAME_BYTES];
    qs_run_record record;
    qs_status st = QS_OK;
    if (qs_run_record_read(&record, run->dir, QS_ERR_OUTPUT_TAKEN) != QS_OK) {
        qs_error_clear(); /* no run: nothing that could be mistaken for this one */
        return QS_OK;
    }
    if (strcmp(record.run_id, run->run_id) != 0) {
        qs_host_name(host);
        st = QS_FAIL(QS_ERR_DISAGREE,
                     "%s: host %s has run %s in a directory of this name, host %s writes run %s "
                     "there; remove the one that is not wanted, or choose another output",
                     run->dir, host, record.run_id, root_host, run->run_id);
    }
    qs_run_record_free(&record);
    return st;
}

/* Rank 0's lock names its process: whoever reads the same text sees the same directory. */
static qs_status find_sight(qs_run_dir *run, qs_comm *comm)
{
    struct {
        char lock[LOCK_MAX], host[QS_HOST_NAME_BYTES];
    } root = {{0}, {0}};
    char mine[LOCK_MAX] = "";
    int error = qs_run_lock_text(run->dir, mine, sizeof mine);
    memcpy(root.lock, mine, sizeof mine);
    qs_host_name(root.host);
    QS_TRY(qs_comm_bcast(comm, &root, sizeof root, 0));
    error = error == 0 && strcmp(mine, root.lock) != 0 ? ENOENT : error;
    error = qs_comm_rank(comm) == 0 ? 0 : error;
    QS_TRY(qs_comm_agree(comm, error == 0 ? QS_OK : check_stranger(run, root.host)));
    return qs_seen_agree(&run->seen, run->dir, error, "the checkpoints of its ranks are kept on",
                         comm);
}

/* Rank 0 opens, and tells what it has found. */
static qs_status open_for_all(qs_run_dir *out, const qs_config *cfg, qs_resume resume,
                              bool takeover, const char (*hosts)[QS_HOST_NAME_BYTES], qs_comm *comm)
{
    struct {
        char run_id[sizeof out->run_id];
        bool finished;
    } told;
    const bool first = qs_comm_rank(comm) == 0;
    QS_TRY(qs_comm_agree(
        comm, first ? open_here(out, cfg, resume, takeover, hosts, qs_comm_nranks(comm)) : QS_OK));
    memset(&told, 0, sizeof told);
    memcpy(told.run_id, out->run_id, sizeof told.run_id);
    told.finished = out->finished;
    QS_TRY(qs_comm_bcast(comm, &told, sizeof told, 0));
    memcpy(out->run_id, told.run_id, sizeof told.run_id);
    out->finished = told.finished;
    return QS_OK;
}

qs_status qs_run_dir_open(qs_run_dir *out, const qs_config *cfg, qs_resume resume, bool takeover,
                          qs_comm *comm)
{
    qs_status st = QS_OK;
    char mine[QS_HOST_NAME_BYTES];
    char(*hosts)[QS_HOST_NAME_BYTES] = calloc((size_t)qs_comm_nranks(comm), sizeof *hosts);
    memset(out, 0, sizeof *out);
    snprintf(out->dir, sizeof out->dir, "%s", cfg->output);
    qs_host_name(mine);
    QS_GOTO(qs_comm_agree(
        comm, hosts != NULL ? QS_OK : QS_FAIL(QS_ERR_MEMORY, "no memory for host names")));
    QS_GOTO(qs_comm_all_gather_now(comm, mine, hosts, sizeof mine));
    QS_GOTO(
        open_for_all(out, cfg, resume, takeover, (const char(*)[QS_HOST_NAME_BYTES])hosts, comm));
    st = out->finished ? QS_OK : find_sight(out, comm);
done:
    free(hosts);
    return st;
}

/* ---- during a run and at its end ---- */

static qs_status begin_here(qs_run_dir *run, const qs_config *cfg)
{
    QS_TRY(qs_run_lock_check(run->dir));
    return run->goes_on ? write_start(cfg, &run->record) : QS_OK;
}

qs_status qs_run_dir_begin(qs_run_dir *run, const qs_config *cfg, qs_comm *comm)
{
    return qs_comm_agree(comm, run->locked ? begin_here(run, cfg) : QS_OK);
}

qs_status qs_run_dir_still_ours(const qs_run_dir *run, qs_comm *comm)
{
    return qs_comm_agree(comm, run->locked ? qs_run_lock_check(run->dir) : QS_OK);
}

qs_status qs_run_dir_check(const char *dir)
{
    qs_run_record record;
    QS_TRY(qs_run_record_read(&record, dir, QS_ERR_INPUT_FORMAT));
    qs_run_record_free(&record);
    return QS_OK;
}

qs_status qs_run_dir_read_best(const char *dir, qs_ckpt_eval *best)
{
    qs_run_record record;
    QS_TRY(qs_run_record_read(&record, dir, QS_ERR_INPUT_FORMAT));
    const qs_status st = qs_run_record_best(&record, dir, best);
    qs_run_record_free(&record);
    return st;
}

qs_status qs_run_dir_note_best(const qs_run_dir *run, const qs_ckpt_eval *best)
{
    QS_TRY(qs_run_lock_check(run->dir));
    return qs_run_record_note_best(run->dir, best);
}

static qs_status finish_here(const qs_run_dir *run)
{
    QS_TRY(qs_run_lock_check(run->dir));
    return qs_run_record_finish(run->dir);
}

qs_status qs_run_dir_finish(qs_run_dir *run, qs_comm *comm)
{
    return qs_comm_agree(comm, qs_comm_rank(comm) == 0 ? finish_here(run) : QS_OK);
}

void qs_run_dir_abandon(qs_run_dir *run)
{
    static const char *const names[] = {"config.yaml", "run.json", "metrics.jsonl", "ranks.jsonl"};
    char path[PATH_ROOM];
    const bool ours = run->made > 0 && run->locked && qs_run_lock_check(run->dir) == QS_OK;
    for (size_t i = 0; ours && i < sizeof names / sizeof *names; i++) {
        snprintf(path, sizeof path, "%s/%s", run->dir, names[i]);
        (void)unlink(path);
    }
    qs_run_dir_close(run);
    qs_io_take_back_dirs(run->dir, run->made); /* not while anything else is in there */
}

void qs_run_dir_close(qs_run_dir *run)
{
    if (run->locked) {
        qs_run_lock_release(run->dir, run->lock);
        run->locked = false;
    }
    qs_run_record_free(&run->record);
}
