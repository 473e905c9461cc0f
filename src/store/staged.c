#define _GNU_SOURCE
#include "store/staged.h"

#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "store/io.h"
#include "store/temp.h"

qs_status qs_staged_name(qs_staged *s, const char *output, const char *inner)
{
    size_t length = strlen(output);
    *s = (qs_staged){.inner = inner};
    while (length > 1 && output[length - 1] == '/') {
        length--;
    }
    if (length == 0 || length >= sizeof s->place) {
        return QS_FAIL(QS_ERR_USAGE, "\"%.80s\" is no name for an output", output);
    }
    memcpy(s->place, output, length);
    memcpy(s->temp, output, length);
    snprintf(s->temp + length, sizeof s->temp - length, "%s%ld", QS_TEMP_MARK, (long)getpid());
    return qs_io_parent(s->place, s->parent, sizeof s->parent);
}

qs_status qs_staged_expect_free(const qs_staged *s)
{
    struct stat info;
    if (lstat(s->place, &info) == 0) {
        return QS_FAIL(QS_ERR_OUTPUT_TAKEN, "%s: exists already; choose another name or remove it",
                       s->place);
    }
    return stat(s->parent, &info) == 0 && S_ISDIR(info.st_mode)
               ? QS_OK
               : QS_FAIL(QS_ERR_IO, "%s: there is no directory %s; create it first", s->place,
                         s->parent);
}

static qs_status expect_room(const qs_staged *s, uint64_t bytes)
{
    return bytes == 0 ? QS_OK
                      : qs_io_expect_room(s->parent, bytes, s->place,
                                          "free some space, or write to another place");
}

qs_status qs_staged_begin(qs_staged *s, uint64_t bytes)
{
    QS_TRY(qs_staged_expect_free(s));
    qs_temp_remove_stale(s->place, s->inner);
    QS_TRY(expect_room(s, bytes));
    qs_temp_guard(s->temp);
    s->ours = true;
    return QS_OK;
}

static qs_status remove_temp(const qs_staged *s)
{
    char inner[QS_STAGED_PATH + 64];
    struct stat info;
    if (lstat(s->temp, &info) != 0) {
        return QS_OK;
    }
    if (!S_ISDIR(info.st_mode)) {
        return qs_io_remove(s->temp);
    }
    if (s->inner != NULL) {
        snprintf(inner, sizeof inner, "%s/%s", s->temp, s->inner);
        QS_TRY(qs_io_remove_dir(inner));
    }
    return qs_io_remove_dir(s->temp);
}

qs_status qs_staged_make_dir(qs_staged *s)
{
    QS_TRY(remove_temp(s));
    return qs_io_mkdir(s->temp);
}

void qs_staged_disown(qs_staged *s)
{
    qs_temp_release();
    s->ours = false;
    s->taken = true;
}

qs_status qs_staged_publish(const qs_staged *s)
{
    QS_TRY(qs_staged_expect_free(s));
    QS_TRY(qs_io_rename(s->temp, s->place));
    return qs_io_fsync_dir(s->parent);
}

void qs_staged_end(qs_staged *s, qs_status st)
{
    if (st != QS_OK && s->ours) {
        (void)remove_temp(s); /* the first error is the one to report */
    }
    if (st != QS_OK && !s->taken) { /* on ranks that write for another, too */
        qs_error_rename(s->temp + strlen(s->place), "");
    }
    if (s->ours) {
        qs_temp_release();
    }
    s->ours = false;
}
