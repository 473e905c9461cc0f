#include "store/lines.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "store/io.h"

struct qs_lines {
    char *path;
    int fd;
    int64_t bytes;     /* of the file */
    int64_t at;        /* where `begin` stands in it */
    size_t begin, end; /* of what was read and is still to be handed out, in the window */
    char window[QS_LINE_MAX];
};

qs_status qs_lines_open(qs_lines **out, const char *path)
{
    qs_status st = QS_OK;
    *out = NULL;
    qs_lines *l = malloc(sizeof *l);
    if (l == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory for reading it", path);
    }
    l->fd = -1;
    l->at = 0;
    l->begin = l->end = 0;
    l->path = strdup(path);
    if (l->path == NULL) {
        QS_GOTO(QS_FAIL(QS_ERR_MEMORY, "%s: no memory for reading it", path));
    }
    QS_GOTO(qs_io_open_plain(path, &l->fd, &l->bytes));
    *out = l;
done:
    if (st != QS_OK) {
        qs_lines_close(l);
    }
    return st;
}

void qs_lines_close(qs_lines *l)
{
    if (l == NULL) {
        return;
    }
    if (l->fd >= 0) {
        close(l->fd); /* read only */
    }
    free(l->path);
    free(l);
}

/* What is left in the window goes to its beginning, and what follows in the file behind it. */
static qs_status read_more(qs_lines *l, size_t left)
{
    memmove(l->window, l->window + l->begin, left);
    l->begin = 0;
    l->end = left;
    const int64_t from = l->at + (int64_t)left, unread = l->bytes - from;
    const size_t room = sizeof l->window - left;
    const size_t count = unread < (int64_t)room ? (size_t)unread : room;
    QS_TRY(qs_io_read_all(l->fd, l->window + left, count, from, l->path));
    l->end += count;
    return QS_OK;
}

/* `bytes` of the window, of which `ending` are the newline. */
static void hand_out(qs_lines *l, size_t bytes, size_t ending, qs_line *line)
{
    line->text = l->window + l->begin;
    line->bytes = bytes - ending;
    l->begin += bytes;
    l->at += (int64_t)bytes;
    line->end = l->at;
}

qs_status qs_lines_next(qs_lines *l, qs_line *line)
{
    size_t searched = 0;
    *line = (qs_line){.at = l->at};
    for (;;) {
        const char *from = l->window + l->begin;
        const size_t left = l->end - l->begin;
        const char *newline = memchr(from + searched, '\n', left - searched);
        if (newline != NULL) {
            line->whole = line->at == l->at;
            hand_out(l, (size_t)(newline - from) + 1, 1, line);
            return QS_OK;
        }
        if (l->at + (int64_t)left == l->bytes) {
            hand_out(l, left, 0, line);
            return QS_OK;
        }
        searched = left;
        if (left == sizeof l->window) { /* too long for a line: nobody wants to see its text */
            l->at += (int64_t)left;
            l->begin = l->end = searched = 0;
        }
        QS_TRY(read_more(l, searched));
    }
}

/* ---- a file without some of its lines ---- */

typedef struct {
    const char *path;
    qs_line_stays stays;
    void *ctx;
} filter;

/* The next line that stays; at the end `at` and `end` are the same. */
static qs_status next_kept(const filter *f, qs_lines *lines, qs_line *line)
{
    do {
        QS_TRY(qs_lines_next(lines, line));
    } while (line->end > line->at && !(line->whole && f->stays(line, f->ctx)));
    return QS_OK;
}

static qs_status copy_kept(const filter *f, int fd, const char *temp)
{
    qs_status st = QS_OK;
    qs_lines *lines = NULL;
    qs_line line;
    QS_TRY(qs_lines_open(&lines, f->path));
    for (int64_t at = 0;; at += line.end - line.at) {
        QS_GOTO(next_kept(f, lines, &line));
        if (line.end == line.at) {
            break;
        }
        QS_GOTO(qs_io_write_all(fd, line.text, line.bytes + 1, at, temp));
    }
    st = qs_io_fsync(fd, temp);
done:
    qs_lines_close(lines);
    return st;
}

/* Read back: line for line what stays of the file. */
static qs_status compare_kept(const filter *f, const char *temp)
{
    qs_status st = QS_OK;
    qs_lines *lines = NULL, *written = NULL;
    qs_line line, back;
    QS_GOTO(qs_lines_open(&lines, f->path));
    QS_GOTO(qs_lines_open(&written, temp));
    do {
        QS_GOTO(next_kept(f, lines, &line));
        QS_GOTO(qs_lines_next(written, &back));
        if (back.end - back.at != line.end - line.at || back.whole != line.whole ||
            memcmp(back.text, line.text, line.bytes) != 0) {
            QS_GOTO(QS_FAIL(QS_ERR_IO_VERIFY,
                            "%s: reads back differently from what was written, at byte %lld; check "
                            "the disk",
                            temp, (long long)back.at));
        }
    } while (line.end > line.at);
done:
    qs_lines_close(lines);
    qs_lines_close(written);
    return st;
}

static qs_status make_filtered(const char *temp, void *ctx)
{
    int fd = -1;
    QS_TRY(qs_io_create(temp, &fd));
    const qs_status st = copy_kept(ctx, fd, temp);
    const qs_status closed = qs_io_close(fd, temp);
    QS_TRY(st);
    QS_TRY(closed);
    return compare_kept(ctx, temp);
}

qs_status qs_lines_filter(const char *path, qs_line_stays stays, void *ctx)
{
    return qs_io_replace(path, make_filtered, &(filter){.path = path, .stays = stays, .ctx = ctx});
}
