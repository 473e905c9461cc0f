/* The error record of a thread. The first error is kept, because what follows is usually its
 * consequence: a reader that failed makes its caller fail, and the user needs the file and the
 * field, not the caller. */
#include "base/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "base/log.h"

enum { TEXT_MAX = 2048 };

static _Thread_local struct {
    qs_status status; /* QS_OK: nothing recorded */
    bool silent;
    bool printed;
    int cause; /* errno, 0: not noted */
    char text[TEXT_MAX];
} record;

int qs_exit_code(qs_status status)
{
    return (int)status / 100;
}

static const char *base_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash != NULL ? slash + 1 : path;
}

qs_status qs_error_set(qs_status status, const char *file, int line, const char *format, ...)
{
    char text[TEXT_MAX];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    qs_log_debug("E%d at %s:%d: %s", (int)status, base_name(file), line, text);
    if (record.status != QS_OK) {
        return status;
    }
    record.status = status;
    record.silent = false;
    record.printed = false;
    record.cause = 0;
    if (status == QS_ERR_BUG) { /* our mistake: the report needs the place */
        snprintf(record.text, sizeof record.text, "%s:%d: %.*s", base_name(file), line,
                 TEXT_MAX - 256, text);
    } else {
        memcpy(record.text, text, sizeof text);
    }
    return status;
}

void qs_error_because(int error)
{
    record.cause = record.status != QS_OK ? error : 0;
}

int qs_error_cause(void)
{
    return record.cause;
}

const char *qs_error_text(void)
{
    return record.status != QS_OK ? record.text : "";
}

void qs_error_adopt(qs_status status, const char *text, bool silent)
{
    char copy[TEXT_MAX]; /* `text` may be our own record */
    snprintf(copy, sizeof copy, "%s", text != NULL ? text : "");
    memcpy(record.text, copy, sizeof copy);
    record.status = status;
    record.silent = silent;
    record.printed = false;
    record.cause = 0;
}

bool qs_error_is_silent(void)
{
    return record.silent;
}

void qs_error_clear(void)
{
    record.status = QS_OK;
    record.silent = false;
    record.printed = false;
    record.cause = 0;
    record.text[0] = '\0';
}

void qs_error_print(qs_status status)
{
    if (status == QS_OK || status == QS_REQUEUE || record.printed ||
        (record.status != QS_OK && record.silent)) {
        return;
    }
    const char *text = record.text;
    if (record.status == QS_OK || text[0] == '\0') {
        text = "no text was recorded: please report this as a bug";
    }
    /* One write, so that lines of other processes cannot end up inside; one line, whatever the text
     * holds. */
    char line[TEXT_MAX + 64];
    int head = snprintf(line, sizeof line, "error[E%03d] ", (int)status);
    size_t end = (size_t)head;
    for (const char *c = text; *c != '\0' && end < sizeof line - 2; c++) {
        line[end++] = *c;
    }
    qs_flatten(line, end);
    while (line[end - 1] == ' ') {
        end--;
    }
    line[end++] = '\n';
    qs_progress_end();
    fflush(stdout);
    fwrite(line, 1, end, stderr);
    fflush(stderr);
    if (record.status == QS_OK) {
        record.status = status;
    }
    record.printed = true;
}
