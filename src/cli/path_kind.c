/* What a path is, by what it holds and not by its name; and the newest checkpoint of a run. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "cli/cli_impl.h"
#include "store/h5.h"
#include "store/manifest.h"

/* A link counts wherever it leads: opening it says what is wrong with it. */
static bool holds(const char *dir, const char *name)
{
    char path[QS_PATH_MAX + 64];
    struct stat info;
    snprintf(path, sizeof path, "%s/%s", dir, name);
    return lstat(path, &info) == 0;
}

static qs_path_kind kind_of_dir(const char *dir)
{
    static const struct {
        const char *name;
        qs_path_kind kind;
    } marks[] = {{"manifest.json", QS_PATH_CHECKPOINT},
                 {"run.json", QS_PATH_RUN},
                 {"adapter_config.json", QS_PATH_ADAPTER},
                 {"config.json", QS_PATH_MODEL}};
    for (size_t i = 0; i < sizeof marks / sizeof *marks; i++) {
        if (holds(dir, marks[i].name)) {
            return marks[i].kind;
        }
    }
    return QS_PATH_UNKNOWN;
}

static qs_status kind_of_h5(const char *path, qs_path_kind *kind)
{
    qs_h5 *file = NULL;
    char format[32] = "";
    QS_TRY(qs_h5_open(&file, path));
    qs_status st = qs_h5_attr_get_text(file, "format", format, sizeof format);
    qs_status closed = qs_h5_close(file);
    QS_TRY(st != QS_OK ? st : closed);
    *kind = strcmp(format, "qshard-base") == 0   ? QS_PATH_BASE
            : strcmp(format, "qshard-data") == 0 ? QS_PATH_DATA
            : strcmp(format, "qshard-ckpt") == 0 ? QS_PATH_SHARD
                                                 : QS_PATH_UNKNOWN;
    return *kind != QS_PATH_UNKNOWN
               ? QS_OK
               : QS_FAIL(QS_ERR_INPUT_FORMAT,
                         "%s: format: \"%s\" is not one of qshard-base, qshard-data, qshard-ckpt",
                         path, format);
}

static bool ends_in(const char *text, const char *end)
{
    size_t length = strlen(text), wanted = strlen(end);
    return length >= wanted && strcmp(text + length - wanted, end) == 0;
}

qs_status qs_cli_path_kind(const char *path, qs_path_kind *kind)
{
    struct stat info;
    *kind = QS_PATH_UNKNOWN;
    if (strlen(path) >= QS_PATH_MAX || stat(path, &info) != 0) {
        return QS_FAIL(QS_ERR_INPUT_MISSING, "%s: %s", path,
                       strlen(path) >= QS_PATH_MAX ? "the path is too long" : strerror(errno));
    }
    if (S_ISDIR(info.st_mode)) {
        *kind = kind_of_dir(path);
        return *kind != QS_PATH_UNKNOWN
                   ? QS_OK
                   : QS_FAIL(QS_ERR_INPUT_FORMAT,
                             "%s: not a checkpoint (manifest.json), run (run.json), adapter "
                             "(adapter_config.json) or model (config.json)",
                             path);
    }
    if (!S_ISREG(info.st_mode)) {
        return QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: is neither a file nor a directory", path);
    }
    if (ends_in(path, ".yaml") || ends_in(path, ".yml")) {
        *kind = QS_PATH_CONFIG;
        return QS_OK;
    }
    return kind_of_h5(path, kind);
}

static qs_status find_best(const char *path, char *out, size_t capacity)
{
    qs_ckpt_eval best;
    QS_TRY(qs_run_dir_read_best(path, &best));
    if (best.step < 0) {
        return QS_FAIL(QS_ERR_CHECKPOINT,
                       "%s: no checkpoint of the run has an evaluation, so none is the best: "
                       "data.eval, train.eval_every; without --best the newest is taken",
                       path);
    }
    qs_manifest_step_dir(out, capacity, path, best.step);
    return holds(out, "manifest.json")
               ? QS_OK
               : QS_FAIL(QS_ERR_CHECKPOINT,
                         "%s: the best checkpoint, as run.json says, is no longer there; name "
                         "another step-N, or start the run again, which looks for the next best",
                         out);
}

qs_status qs_cli_find_step(const char *path, bool best, char *out, size_t capacity)
{
    qs_path_kind kind;
    int64_t step = -1;
    int count = 0;
    QS_TRY(qs_cli_path_kind(path, &kind));
    if (best && kind != QS_PATH_RUN) {
        return QS_FAIL(QS_ERR_USAGE,
                       "%s: is no run directory, of which --best chooses a checkpoint", path);
    }
    if (best) {
        return find_best(path, out, capacity);
    }
    if (kind == QS_PATH_CHECKPOINT) {
        snprintf(out, capacity, "%s", path);
        return QS_OK;
    }
    if (kind != QS_PATH_RUN) {
        return QS_FAIL(QS_ERR_INPUT_FORMAT,
                       "%s: neither a checkpoint (step-N) nor a run directory; name one of them",
                       path);
    }
    QS_TRY(qs_manifest_list(path, &step, 1, &count));
    if (count == 0) {
        int64_t *any = NULL;
        QS_TRY(qs_manifest_scan(path, &any, &count));
        free(any);
        return count == 0
                   ? QS_FAIL(QS_ERR_CHECKPOINT, "%s: the run has no checkpoint; train it first",
                             path)
                   : QS_FAIL(QS_ERR_CHECKPOINT,
                             "%s: no checkpoint of the run verifies; qshard check %s says what is "
                             "wrong with each",
                             path, path);
    }
    qs_manifest_step_dir(out, capacity, path, step);
    return QS_OK;
}

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

qs_status qs_cli_name_good_step(qs_status st, const char *path, const char *step_dir)
{
    qs_path_kind kind;
    char text[1024], good[QS_PATH_MAX + 64];
    if (qs_exit_code(st) != qs_exit_code(QS_ERR_INPUT_HASH) || qs_manifest_undecided(st)) {
        return st;
    }
    snprintf(text, sizeof text, "%s", qs_error_text());
    qs_error_clear();
    good[0] = '\0';
    if (qs_cli_path_kind(path, &kind) == QS_OK && kind == QS_PATH_RUN) {
        find_good(path, step_dir, good, sizeof good);
    }
    qs_error_clear();
    if (good[0] != '\0') {
        return QS_FAIL(st, "%s; %s verifies: name that one", text, good);
    }
    qs_error_adopt(st, text, false);
    return st;
}
