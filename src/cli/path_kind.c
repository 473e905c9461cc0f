/* What a path is, by what it holds and not by its name. */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "ckpt/adapter_dir.h"
#include "cli/cli_impl.h"
#include "store/h5.h"

static qs_path_kind kind_of_dir(const char *dir)
{
    char path[QS_PATH_MAX + 64];
    struct stat info;
    switch (qs_adapter_kind_of(dir)) {
    case QS_ADAPTER_CHECKPOINT:
        return QS_PATH_CHECKPOINT;
    case QS_ADAPTER_RUN:
        return QS_PATH_RUN;
    case QS_ADAPTER_PEFT:
        return QS_PATH_ADAPTER;
    default:
        snprintf(path, sizeof path, "%s/config.json", dir);
        return lstat(path, &info) == 0 ? QS_PATH_MODEL : QS_PATH_UNKNOWN;
    }
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
