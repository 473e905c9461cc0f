/* What a directory holds, by the names in it. */
#define _GNU_SOURCE
#include "ckpt/run_look.h"

#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "ckpt/ckpt_impl.h"
#include "ckpt/run_lock.h"
#include "store/io.h"
#include "store/temp.h"

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

qs_status qs_run_look(const char *dir, qs_run_found *out)
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
    *out = !there ? QS_RUN_NONE : seen.run ? QS_RUN_THERE : QS_RUN_EMPTY;
    if (*out == QS_RUN_EMPTY && seen.stranger[0]) {
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

qs_status qs_run_sweep(const char *dir)
{
    QS_TRY(qs_io_list(dir, QS_ERR_IO, sweep_entry, NULL, NULL));
    return qs_ckpt_sweep(dir, true);
}
