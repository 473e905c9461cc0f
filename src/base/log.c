/* One writer for stderr. Each message is put together first and written at once, so that the ranks'
 * lines do not mix.
 *
 * On a terminal a drawn progress line stays under the log: a message erases it, and the next
 * qs_progress draws it anew. Elsewhere (a file, a pipe, TERM=dumb) nothing is ever redrawn. */
#include "base/log.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "base/timer.h"

enum { LINE_MAX_BYTES = 4096 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static struct {
    int rank;
    bool speaks;
    bool all_ranks;
    qs_log_level level;
} who = {.rank = 0, .speaks = true, .all_ranks = false, .level = QS_LOG_INFO};

static struct {
    bool drawn;         /* a line without its newline stands on the terminal */
    char what[64];      /* which activity `start_*` belong to */
    double start_s;     /* when it was first shown, */
    int64_t start_done; /* and how much was done then */
    int64_t last_done;
} progress;

static bool on_terminal(void)
{
    const char *term = getenv("TERM");
    return isatty(STDERR_FILENO) == 1 && (term == NULL || strcmp(term, "dumb") != 0);
}

static bool in_colour(void)
{
    const char *no_color = getenv("NO_COLOR"); /* no-color.org: any value but the empty one */
    return on_terminal() && (no_color == NULL || no_color[0] == '\0');
}

static int terminal_columns(void)
{
    struct winsize size;
    bool known = ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 1;
    return known ? size.ws_col : 80;
}

void qs_log_init(int rank, int nranks, qs_log_level level, bool all_ranks)
{
    pthread_mutex_lock(&lock);
    who.rank = rank;
    who.speaks = rank == 0 || all_ranks;
    who.all_ranks = all_ranks && nranks > 1;
    who.level = level;
    pthread_mutex_unlock(&lock);
}

void qs_flatten(char *text, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++) {
        unsigned char c = (unsigned char)text[i];
        text[i] = c < 0x20 || c == 0x7F ? ' ' : text[i];
    }
}

static void erase_progress(void)
{
    if (progress.drawn) {
        fputs("\r\033[K", stderr);
        progress.drawn = false;
    }
}

/* `label` "warning: " or "", `colour` an SGR number or NULL. */
static void write_line(qs_log_level level, const char *label, const char *colour,
                       const char *format, va_list args)
{
    if (!who.speaks || level > who.level) {
        return;
    }
    char line[LINE_MAX_BYTES];
    size_t room = sizeof line - 1; /* the newline */
    size_t end = 0;
    if (who.all_ranks) {
        end += (size_t)snprintf(line, room, "[rank %d] ", who.rank);
    }
    if (label[0] != '\0') {
        bool paint = colour != NULL && in_colour();
        end +=
            (size_t)snprintf(line + end, room - end, "%s%s%s%s%s", paint ? "\033[" : "",
                             paint ? colour : "", paint ? "m" : "", label, paint ? "\033[0m" : "");
    }
    int body = vsnprintf(line + end, room - end, format, args);
    if (body > 0) {
        size_t begin = end;
        end = (size_t)body < room - end ? end + (size_t)body : room - 1;
        qs_flatten(line + begin, end - begin);
    }
    line[end++] = '\n';
    pthread_mutex_lock(&lock);
    erase_progress();
    fwrite(line, 1, end, stderr);
    fflush(stderr);
    pthread_mutex_unlock(&lock);
}

void qs_log_warn(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    write_line(QS_LOG_WARN, "warning: ", "33", format, args);
    va_end(args);
}

void qs_log_info(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    write_line(QS_LOG_INFO, "", NULL, format, args);
    va_end(args);
}

void qs_log_debug(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    write_line(QS_LOG_DEBUG, "debug: ", "2", format, args);
    va_end(args);
}

void qs_log_end(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    write_line(QS_LOG_WARN, "", NULL, format, args);
    va_end(args);
}

bool qs_log_says(qs_log_level level)
{
    return who.speaks && level <= who.level;
}

/* "0:07", "12:05", "3:02:01" */
static void format_duration(char *out, size_t size, double seconds)
{
    long s = seconds < 1e8 ? (long)(seconds + 0.5) : 99999999L;
    if (s >= 3600) {
        snprintf(out, size, "%ld:%02ld:%02ld", s / 3600, s / 60 % 60, s % 60);
    } else {
        snprintf(out, size, "%ld:%02ld", s / 60, s % 60);
    }
}

static void format_time_left(char *out, size_t size, int64_t done, int64_t total)
{
    out[0] = '\0';
    int64_t moved = done - progress.start_done;
    if (moved <= 0 || done >= total) {
        return;
    }
    double per_item_s = (qs_time_s() - progress.start_s) / (double)moved;
    char left[32];
    format_duration(left, sizeof left, per_item_s * (double)(total - done));
    snprintf(out, size, "  left %s", left);
}

static void format_progress(char *line, size_t size, const char *what, int64_t done, int64_t total,
                            const char *text)
{
    bool note = text != NULL && text[0] != '\0';
    const char *gap = note ? "  " : "";
    const char *tail = note ? text : "";
    if (total <= 0) {
        snprintf(line, size, "%s  %lld%s%s", what, (long long)done, gap, tail);
        return;
    }
    char left[48];
    format_time_left(left, sizeof left, done, total);
    int percent = (int)(100.0 * (double)done / (double)total);
    snprintf(line, size, "%s  %lld/%lld  %d%%%s%s%s", what, (long long)done, (long long)total,
             percent, left, gap, tail);
}

void qs_progress(const char *what, int64_t done, int64_t total, const char *text)
{
    if (who.rank != 0 || who.level < QS_LOG_INFO) {
        return;
    }
    pthread_mutex_lock(&lock);
    if (strncmp(progress.what, what, sizeof progress.what - 1) != 0 || done < progress.last_done) {
        snprintf(progress.what, sizeof progress.what, "%s", what);
        progress.start_s = qs_time_s();
        progress.start_done = done;
    }
    progress.last_done = done;
    char line[LINE_MAX_BYTES];
    format_progress(line, sizeof line, what, done, total, text);
    if (on_terminal()) {
        /* One column is left free: some terminals wrap when the last one is written. */
        fprintf(stderr, "\r%.*s\033[K", terminal_columns() - 1, line);
        progress.drawn = true;
    } else {
        fprintf(stderr, "%s\n", line);
    }
    fflush(stderr);
    pthread_mutex_unlock(&lock);
}

void qs_progress_end(void)
{
    pthread_mutex_lock(&lock);
    if (progress.drawn) {
        fputc('\n', stderr);
        fflush(stderr);
        progress.drawn = false;
    }
    progress.what[0] = '\0';
    progress.last_done = 0;
    pthread_mutex_unlock(&lock);
}
