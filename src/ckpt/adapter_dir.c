#include "ckpt/adapter_dir.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "ckpt/run_dir.h"
#include "store/manifest.h"

/* A link counts wherever it leads. */
static bool holds(const char *dir, const char *name)
{
    char path[QS_PATH_MAX + 128];
    struct stat info;
    snprintf(path, sizeof path, "%s/%s", dir, name);
    return lstat(path, &info) == 0;
}

qs_adapter_kind qs_adapter_kind_of(const char *path)
{
    static const struct {
        const char *name;
        qs_adapter_kind kind;
    } marks[] = {{"manifest.json", QS_ADAPTER_CHECKPOINT},
                 {"run.json", QS_ADAPTER_RUN},
                 {"adapter_config.json", QS_ADAPTER_PEFT}};
    for (size_t i = 0; i < sizeof marks / sizeof *marks; i++) {
        if (holds(path, marks[i].name)) {
            return marks[i].kind;
        }
    }
    return QS_ADAPTER_NONE;
}

/* ---- the checkpoint of a run ---- */

static qs_status count_steps(const char *path, int *count)
{
    int64_t *any = NULL;
    QS_TRY(qs_manifest_scan(path, &any, count));
    free(any);
    return QS_OK;
}

static qs_status find_best(const char *path, qs_adapter_dir *out)
{
    qs_ckpt_eval best;
    QS_TRY(qs_run_dir_read_best(path, &best));
    if (best.step < 0) {
        return QS_FAIL(QS_ERR_CHECKPOINT,
                       "%s: no checkpoint of the run has an evaluation, so none is the best: "
                       "data.eval, train.eval_every; without --best the newest is taken",
                       path);
    }
    qs_manifest_step_dir(out->dir, sizeof out->dir, path, best.step);
    return holds(out->dir, "manifest.json")
               ? QS_OK
               : QS_FAIL(QS_ERR_CHECKPOINT,
                         "%s: the best checkpoint, as run.json says, is no longer there; name "
                         "another step-N, or start the run again, which looks for the next best",
                         out->dir);
}

static qs_status find_newest(const char *path, qs_adapter_dir *out)
{
    int64_t step = -1;
    int count = 0;
    QS_TRY(qs_manifest_list(path, &step, 1, &count));
    if (count > 0) {
        qs_manifest_step_dir(out->dir, sizeof out->dir, path, step);
        return QS_OK;
    }
    QS_TRY(count_steps(path, &count));
    return count == 0
               ? QS_FAIL(QS_ERR_CHECKPOINT, "%s: the run has no checkpoint; train it first", path)
               : QS_FAIL(QS_ERR_CHECKPOINT,
                         "%s: no checkpoint of the run verifies; qshard check %s says what is "
                         "wrong with each",
                         path, path);
}

/* ---- what it is ---- */

static qs_status look(const char *path, qs_adapter_kind *kind)
{
    struct stat info;
    int count = 0;
    if (strlen(path) >= QS_PATH_MAX || stat(path, &info) != 0) {
        return QS_FAIL(QS_ERR_INPUT_MISSING, "%s: %s", path,
                       strlen(path) >= QS_PATH_MAX ? "the path is too long" : strerror(errno));
    }
    *kind = qs_adapter_kind_of(path);
    if (*kind == QS_ADAPTER_NONE && S_ISDIR(info.st_mode)) {
        QS_TRY(count_steps(path, &count));
        *kind = count > 0 ? QS_ADAPTER_RUN : QS_ADAPTER_NONE;
    }
    return *kind != QS_ADAPTER_NONE
               ? QS_OK
               : QS_FAIL(QS_ERR_INPUT_FORMAT,
                         "%s: neither a checkpoint (manifest.json), nor a run (run.json), nor a "
                         "PEFT directory (adapter_config.json)",
                         path);
}

qs_status qs_adapter_find(qs_adapter_dir *out, const char *path, bool best)
{
    qs_adapter_kind kind;
    QS_TRY(look(path, &kind));
    if (best && kind != QS_ADAPTER_RUN) {
        return QS_FAIL(QS_ERR_USAGE,
                       "%s: is no run directory, of which --best chooses a checkpoint", path);
    }
    if (kind != QS_ADAPTER_RUN) {
        out->kind = kind;
        snprintf(out->dir, sizeof out->dir, "%s", path);
        return QS_OK;
    }
    out->kind = QS_ADAPTER_CHECKPOINT;
    return best ? find_best(path, out) : find_newest(path, out);
}

/* ---- another one ---- */

/* The newest checkpoint of the run that verifies, other than `damaged`; "" if there is none. */
static void find_good(const char *run, const char *damaged, char *out, size_t capacity)
{
    int64_t *steps = NULL;
    int count = 0;
    bool found = false;
    if (qs_manifest_scan(run, &steps, &count) != QS_OK) {
        count = 0;
    }
    for (int i = 0; i < count && !found; i++) {
        qs_manifest m;
        qs_manifest_step_dir(out, capacity, run, steps[i]);
        if (strcmp(out, damaged) != 0 && qs_manifest_verify(out, &m) == QS_OK) {
            qs_manifest_free(&m);
            found = true;
        }
        qs_error_clear();
    }
    free(steps);
    if (!found) {
        out[0] = '\0';
    }
}

qs_status qs_adapter_name_good(qs_status st, const char *path, const char *dir)
{
    char text[1024], good[QS_PATH_MAX + 64] = "";
    if (qs_exit_code(st) != qs_exit_code(QS_ERR_INPUT_HASH) || qs_manifest_undecided(st)) {
        return st;
    }
    snprintf(text, sizeof text, "%s", qs_error_text());
    qs_error_clear();
    if (strcmp(path, dir) != 0) { /* a run's */
        find_good(path, dir, good, sizeof good);
    }
    qs_error_clear();
    if (good[0] != '\0') {
        return QS_FAIL(st, "%s; %s verifies: name that one", text, good);
    }
    qs_error_adopt(st, text, false);
    return st;
}
