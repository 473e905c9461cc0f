/* The directories of a run: which steps there are, which of them are good, which may go. Order is
 * by the step in the name and the manifest; times of files are never looked at. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/log.h"
#include "ckpt/ckpt_impl.h"
#include "store/io.h"

/* ---- names ---- */

/* N of "step-N" as qs_manifest_step_dir writes it; -1 for anything else. */
static int64_t step_of(const char *name)
{
    char canonical[QS_CKPT_PATH];
    if (strncmp(name, "step-", 5) != 0 || strlen(name) > 20 ||
        strspn(name + 5, "0123456789") != strlen(name + 5)) {
        return -1;
    }
    int64_t step = strtoll(name + 5, NULL, 10);
    qs_manifest_step_dir(canonical, sizeof canonical, ".", step);
    return strcmp(canonical + 2, name) == 0 ? step : -1;
}

static int descending(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x < y) - (x > y);
}

static qs_status open_run(const char *run_dir, DIR **out)
{
    *out = opendir(run_dir);
    return *out || errno == ENOENT
               ? QS_OK
               : QS_FAIL(QS_ERR_IO, "%s: cannot be listed: %s", run_dir, strerror(errno));
}

qs_status qs_ckpt_scan(const char *run_dir, int64_t *steps, int capacity, int *count)
{
    DIR *entries = NULL;
    *count = 0;
    QS_TRY(open_run(run_dir, &entries));
    if (!entries) {
        return QS_OK;
    }
    qs_status st = QS_OK;
    for (const struct dirent *e = readdir(entries); e && st == QS_OK; e = readdir(entries)) {
        int64_t step = step_of(e->d_name);
        if (step >= 0 && *count == capacity) {
            st = QS_FAIL(QS_ERR_CHECKPOINT, "%s: more than %d checkpoints; delete some", run_dir,
                         capacity);
        } else if (step >= 0) {
            steps[(*count)++] = step;
        }
    }
    closedir(entries);
    qsort(steps, (size_t)*count, sizeof *steps, descending);
    return st;
}

qs_status qs_ckpt_sweep(const char *run_dir)
{
    DIR *entries = NULL;
    QS_TRY(open_run(run_dir, &entries));
    qs_status st = QS_OK;
    for (const struct dirent *e = entries ? readdir(entries) : NULL; e && st == QS_OK;
         e = readdir(entries)) {
        char path[QS_CKPT_PATH + sizeof e->d_name];
        if (strncmp(e->d_name, "step-", 5) == 0 && strstr(e->d_name, ".tmp-")) {
            snprintf(path, sizeof path, "%s/%s", run_dir, e->d_name);
            st = qs_io_remove_dir(path);
        }
    }
    if (entries) {
        closedir(entries);
    }
    return st;
}

qs_status qs_ckpt_set_aside(const char *run_dir, int64_t step)
{
    char from[QS_CKPT_PATH], to[QS_CKPT_PATH + 16];
    struct stat info;
    qs_manifest_step_dir(from, sizeof from, run_dir, step);
    for (int n = 1;; n++) {
        char number[12] = "";
        if (n > 1) {
            snprintf(number, sizeof number, "%d", n);
        }
        snprintf(to, sizeof to, "%s.bad%s", from, number);
        if (lstat(to, &info) != 0) {
            break;
        }
    }
    QS_TRY(qs_io_rename(from, to));
    return qs_io_fsync_dir(run_dir);
}

qs_status qs_ckpt_find_blind(const qs_ckpt_meta *meta, qs_comm *comm, bool **blind)
{
    *blind = NULL;
    if (meta->seen == NULL || qs_seen_by_all(meta->seen)) {
        return QS_OK;
    }
    const bool mine = !meta->seen->mine;
    *blind = calloc((size_t)qs_comm_nranks(comm), sizeof **blind);
    QS_TRY(qs_comm_agree(
        comm, *blind != NULL ? QS_OK : QS_FAIL(QS_ERR_MEMORY, "no memory for a flag a rank")));
    return qs_comm_all_gather_now(comm, &mine, *blind, sizeof mine);
}

/* ---- the newest good one ---- */

static qs_status latest_here(const char *run_dir, int64_t *found)
{
    int64_t *steps = calloc(QS_CKPT_STEPS_MAX, sizeof *steps);
    int count = 0;
    qs_status st = QS_OK;
    if (!steps) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory", run_dir);
    }
    QS_GOTO(qs_ckpt_scan(run_dir, steps, QS_CKPT_STEPS_MAX, &count));
    for (int i = 0; i < count && *found < 0; i++) {
        char dir[QS_CKPT_PATH];
        qs_manifest m;
        qs_manifest_step_dir(dir, sizeof dir, run_dir, steps[i]);
        st = qs_manifest_verify(dir, &m);
        if (st == QS_OK) {
            qs_manifest_free(&m);
            *found = steps[i];
            break;
        }
        if (qs_manifest_undecided(st)) { /* to go on without it would lose its steps */
            goto done;
        }
        char why[512];
        snprintf(why, sizeof why, "%s", qs_error_text());
        qs_error_clear();
        QS_GOTO(qs_ckpt_set_aside(run_dir, steps[i]));
        qs_log_warn("%s: no good checkpoint, renamed to .bad: %s", dir, why);
    }
done:
    free(steps);
    return st;
}

qs_status qs_ckpt_latest(const char *run_dir, int64_t *step, qs_comm *comm)
{
    *step = -1;
    QS_TRY(qs_comm_agree(comm, qs_comm_rank(comm) == 0 ? latest_here(run_dir, step) : QS_OK));
    return qs_comm_bcast(comm, step, sizeof *step, 0);
}

/* ---- rotation ---- */

/* The manifest reads well and all files have their sizes; with `fully` their hashes too. */
static bool is_good(const char *run_dir, int64_t step, bool fully, char run_id[40])
{
    char dir[QS_CKPT_PATH], path[QS_CKPT_PATH + 80];
    qs_manifest m;
    struct stat info;
    qs_manifest_step_dir(dir, sizeof dir, run_dir, step);
    if ((fully ? qs_manifest_verify(dir, &m) : qs_manifest_read(dir, &m)) != QS_OK) {
        qs_error_clear();
        return false;
    }
    bool good = true;
    for (int i = 0; i < m.n_files; i++) {
        snprintf(path, sizeof path, "%s/%s", dir, m.files[i].name);
        good = good && stat(path, &info) == 0 && info.st_size == m.files[i].bytes;
    }
    snprintf(run_id, 40, "%s", m.run_id);
    qs_manifest_free(&m);
    return good;
}

/* Under a name that no reader takes for a checkpoint first: a killed deletion leaves no half one.
 */
static qs_status delete_step(const char *run_dir, int64_t step)
{
    char from[QS_CKPT_PATH], to[QS_CKPT_PATH + 16];
    qs_manifest_step_dir(from, sizeof from, run_dir, step);
    snprintf(to, sizeof to, "%s.tmp-old", from);
    QS_TRY(qs_io_remove_dir(to));
    QS_TRY(qs_io_rename(from, to));
    return qs_io_remove_dir(to);
}

qs_status qs_ckpt_rotate(const char *run_dir, int64_t keep_last, int64_t keep_every)
{
    int64_t *steps = calloc(QS_CKPT_STEPS_MAX, sizeof *steps);
    int count = 0;
    int64_t good = 0;
    char newest[40] = "", run_id[40] = "";
    qs_status st = QS_OK;
    if (!steps) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory", run_dir);
    }
    QS_GOTO(qs_ckpt_scan(run_dir, steps, QS_CKPT_STEPS_MAX, &count));
    for (int i = 0; i < count; i++) {
        /* Only the newest has not been looked at by an earlier rotation. */
        bool counts = is_good(run_dir, steps[i], i == 0, run_id);
        if (counts && good == 0) {
            memcpy(newest, run_id, sizeof newest);
        }
        bool milestone = keep_every > 0 && steps[i] % keep_every == 0;
        bool ours = counts && strcmp(run_id, newest) == 0;
        if (ours && good >= keep_last && !milestone) {
            QS_GOTO(delete_step(run_dir, steps[i]));
        }
        good += ours;
    }
done:
    free(steps);
    return st;
}
