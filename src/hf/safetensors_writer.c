/* A safetensors file written piece by piece.
 *
 * Sizes are known before the first byte, so the header comes first and every piece has its place. A
 * hash is kept of each piece; after the sync the pieces are read back and compared with it. */
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "hf/safetensors.h"
#include "hf/safetensors_impl.h"
#include "store/hash.h"
#include "store/io.h"

typedef struct {
    int64_t at;
    size_t bytes;
    uint64_t hash;
} piece;

struct qs_st_writer {
    char *path;
    int fd;
    const qs_st_item *items;
    int64_t count;
    int64_t *next, *end; /* [count] where the next byte of an item goes, and where it ends */
    piece *pieces;
    int64_t n_pieces, capacity;
    size_t largest; /* bytes of a piece */
};

static qs_status no_memory(const char *path)
{
    return QS_FAIL(QS_ERR_MEMORY, "%s: no memory for writing", path);
}

void qs_st_writer_abandon(qs_st_writer *w)
{
    if (w == NULL) {
        return;
    }
    if (w->fd >= 0) {
        (void)close(w->fd); /* after a failure, which has been recorded */
    }
    free(w->pieces);
    free(w->next);
    free(w->end);
    free(w->path);
    free(w);
}

static qs_status write_piece(qs_st_writer *w, const void *data, size_t bytes, int64_t at)
{
    if (w->n_pieces == w->capacity) {
        int64_t capacity = 2 * w->capacity + 64;
        piece *grown = realloc(w->pieces, (size_t)capacity * sizeof *grown);
        if (grown == NULL) {
            return no_memory(w->path);
        }
        w->pieces = grown;
        w->capacity = capacity;
    }
    w->pieces[w->n_pieces++] = (piece){at, bytes, qs_xxh3_64(data, bytes)};
    w->largest = bytes > w->largest ? bytes : w->largest;
    return qs_io_write_all(w->fd, data, bytes, at, w->path);
}

static qs_status write_header(qs_st_writer *w, const qs_st_arranged *arranged)
{
    size_t bytes = 8 + arranged->header_bytes;
    uint8_t *head = malloc(bytes);
    if (head == NULL) {
        return no_memory(w->path);
    }
    qs_st_put_header(arranged, head);
    int64_t at = (int64_t)bytes;
    for (int64_t i = 0; i < w->count; i++) {
        int64_t item = arranged->sorted[i] - w->items;
        w->next[item] = at;
        at += (int64_t)qs_st_item_bytes(arranged->sorted[i]);
        w->end[item] = at;
    }
    qs_status st = write_piece(w, head, bytes, 0);
    free(head);
    return st;
}

qs_status qs_st_writer_open(qs_st_writer **out, const char *path, const qs_st_item *items,
                            int64_t count)
{
    qs_status st = QS_OK;
    qs_st_arranged arranged = {0};
    qs_st_writer *w = calloc(1, sizeof *w);
    if (w == NULL) {
        return no_memory(path);
    }
    *w = (qs_st_writer){.fd = -1, .items = items, .count = count, .path = strdup(path)};
    w->next = calloc((size_t)count + 1, sizeof *w->next);
    w->end = calloc((size_t)count + 1, sizeof *w->end);
    if (w->path == NULL || w->next == NULL || w->end == NULL) {
        QS_GOTO(no_memory(path));
    }
    QS_GOTO(qs_st_arrange(&arranged, path, items, count, NULL));
    QS_GOTO(qs_io_create(path, &w->fd));
    QS_GOTO(qs_io_reserve(w->fd, arranged.file_bytes, path));
    QS_GOTO(write_header(w, &arranged));
    *out = w;
    w = NULL;
done:
    qs_st_arranged_free(&arranged);
    qs_st_writer_abandon(w);
    return st;
}

qs_status qs_st_writer_put(qs_st_writer *w, int64_t item, const void *data, size_t bytes)
{
    if (item < 0 || item >= w->count || (int64_t)bytes > w->end[item] - w->next[item]) {
        return QS_FAIL(QS_ERR_BUG, "%s: item %lld of %lld has no room for %zu bytes", w->path,
                       (long long)item, (long long)w->count, bytes);
    }
    QS_TRY(bytes == 0 ? QS_OK : write_piece(w, data, bytes, w->next[item]));
    w->next[item] += (int64_t)bytes;
    return QS_OK;
}

static qs_status check_complete(const qs_st_writer *w)
{
    for (int64_t i = 0; i < w->count; i++) {
        if (w->next[i] != w->end[i]) {
            return QS_FAIL(QS_ERR_BUG, "%s: tensor %s is not complete", w->path, w->items[i].name);
        }
    }
    return QS_OK;
}

static qs_status read_back(const qs_st_writer *w)
{
    uint8_t *data = malloc(w->largest + 1);
    if (data == NULL) {
        return no_memory(w->path);
    }
    (void)posix_fadvise(w->fd, 0, 0, POSIX_FADV_DONTNEED); /* from the disk, where that works */
    qs_status st = QS_OK;
    for (int64_t i = 0; i < w->n_pieces && st == QS_OK; i++) {
        const piece *p = &w->pieces[i];
        if (qs_io_read_all(w->fd, data, p->bytes, p->at, w->path) != QS_OK ||
            qs_xxh3_64(data, p->bytes) != p->hash) {
            qs_error_clear();
            st = QS_FAIL(QS_ERR_IO_VERIFY,
                         "%s: reads back differently from what was written, in the %zu bytes from "
                         "%lld; check the disk",
                         w->path, p->bytes, (long long)p->at);
        }
    }
    free(data);
    return st;
}

qs_status qs_st_writer_close(qs_st_writer *w)
{
    qs_status st = check_complete(w);
    st = st == QS_OK ? qs_io_fsync(w->fd, w->path) : st;
    st = st == QS_OK ? read_back(w) : st;
    if (st == QS_OK) {
        int fd = w->fd;
        w->fd = -1;
        st = qs_io_close(fd, w->path);
    }
    qs_st_writer_abandon(w);
    return st;
}
