/* The error record of a thread. The first error is kept, because what follows is usually its
 * consequence: a reader that failed makes its caller fail, and the user needs the file and the
 * field, not the caller. */
#include "base/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "base/log.h"

enum { TEXT_MAX = 2048, PLACE_MAX = 128 };

static _Thread_local struct {
    qs_status status; /* QS_OK: nothing recorded */
    bool silent;
    bool printed;
    int cause; /* errno, 0: not noted */
    char text[TEXT_MAX];
    char place[PLACE_MAX]; /* "": not named */
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
    record.place[0] = '\0';
    if (status == QS_ERR_BUG) { /* our mistake: the report needs the place */
        snprintf(record.text, sizeof record.text, "%s:%d: %.*s", base_name(file), line,
                 TEXT_MAX - 256, text);
    } else {
        memcpy(record.text, text, sizeof text);
    }
    return status;
}

void qs_error_rename(const char *from, const char *to)
{
    const size_t length = strlen(from), put = strlen(to);
    if (length == 0 || put > length) {
        return;
    }
    for (char *at = strstr(record.text, from); at != NULL; at = strstr(at + put, from)) {
        memcpy(at, to, put);
        memmove(at + put, at + length, strlen(at + length) + 1);
    }
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
    record.place[0] = '\0';
}

bool qs_error_is_silent(void)
{
    return record.silent;
}

void qs_error_name_place(const char *place)
{
    if (record.status != QS_OK) {
        snprintf(record.place, sizeof record.place, "%s", place);
    }
}

void qs_error_clear(void)
{
    record.status = QS_OK;
    record.silent = false;
    record.printed = false;
    record.cause = 0;
    record.text[0] = '\0';
    record.place[0] = '\0';
}

static bool is_printable(qs_status status)
{
    return status != QS_OK && status != QS_REQUEUE && !record.printed &&
           (record.status == QS_OK || !record.silent);
}

/* One line, whatever the text holds. */
static size_t format_line(char *line, size_t capacity, qs_status status, const char *text,
                          const char *place)
{
    char tail[PLACE_MAX + 8] = "";
    if (place[0] != '\0') {
        snprintf(tail, sizeof tail, " (%s)", place);
    }
    const size_t rest = strlen(tail) + 2; /* its end of line, and the string's */
    size_t end = (size_t)snprintf(line, capacity, "error[E%03d] ", (int)status);
    for (const char *c = text; *c != '\0' && end < capacity - rest; c++) {
        line[end++] = *c;
    }
    qs_flatten(line, end);
    while (line[end - 1] == ' ') {
        end--;
    }
    qs_flatten(tail, strlen(tail));
    memcpy(line + end, tail, strlen(tail));
    end += strlen(tail);
    line[end++] = '\n';
    return end;
}

size_t qs_error_line(char *out, size_t capacity, qs_status status)
{
    return is_printable(status) && record.text[0] != '\0'
               ? format_line(out, capacity, status, record.text, record.place)
               : 0;
}

bool qs_error_is_printed(void)
{
    return record.printed;
}

void qs_error_set_printed(void)
{
    record.printed = true;
}

void qs_error_print(qs_status status)
{
    if (!is_printable(status)) {
        return;
    }
    /* One write, so that lines of other processes cannot end up inside. */
    char line[QS_ERROR_LINE_MAX];
    size_t end = qs_error_line(line, sizeof line, status);
    if (end == 0) {
        end = format_line(line, sizeof line, status,
                          "no text was recorded: please report this as a bug", "");
    }
    qs_progress_end();
    fflush(stdout);
    fwrite(line, 1, end, stderr);
    fflush(stderr);
    if (record.status == QS_OK) {
        record.status = status;
    }
    record.printed = true;
}
