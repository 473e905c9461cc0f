/* Filling the shares: read by every rank for itself, or, where some ranks do not see the file, by
 * all of them together, unit by unit, so that those that see it can read for the others. */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "fsdp/fsdp_impl.h"

static size_t largest_message(const qs_fsdp *f)
{
    size_t most = 0;
    for (int u = 0; u < f->index->n_units; u++) {
        most = f->layouts[u].message_bytes > most ? f->layouts[u].message_bytes : most;
    }
    return most;
}

/* Shares of another memory than the host's come by way of two pinned buffers: one is filled while
 * the other is copied. */
typedef struct {
    qs_fsdp *fsdp;
    bool direct;
    uint8_t *bytes[2];
    qs_event copied[2];
} staging;

static qs_status staging_make(staging *s, qs_fsdp *f)
{
    s->fsdp = f;
    s->direct = qs_device_is_host(f->device);
    for (int i = 0; i < 2 && !s->direct; i++) {
        QS_TRY(QS_HOST_ALLOC(f->device, &s->bytes[i], largest_message(f), QS_MEM_WORK));
    }
    return QS_OK;
}

static void staging_free(staging *s)
{
    for (int i = 0; i < 2 && s->fsdp != NULL; i++) {
        qs_device_host_free(s->fsdp->device, s->bytes[i]);
    }
}

/* Where unit `u` is to be filled in. */
static qs_status staging_open(staging *s, int u, uint8_t **message)
{
    const qs_fsdp *f = s->fsdp;
    if (s->direct || f->offloaded[u]) {
        *message = f->share[u];
        return QS_OK;
    }
    *message = s->bytes[u % 2];
    return qs_event_wait(s->copied[u % 2]);
}

/* Unit `u` is filled: bring it where it belongs. */
static qs_status staging_close(staging *s, int u, const uint8_t *message)
{
    const qs_fsdp *f = s->fsdp;
    if (message == f->share[u]) {
        return QS_OK;
    }
    QS_TRY(qs_queue_copy(f->queue, f->share[u], message, f->layouts[u].message_bytes));
    s->copied[u % 2] = qs_event_record(f->queue);
    return QS_OK;
}

/* Before ranks fill a unit together, they must know that all of them do. */
static qs_status agree(const qs_share_source *source, qs_status st)
{
    return source->together == NULL ? st : qs_comm_agree(source->together, st);
}

/* An error of one rank is told before the next unit; after the last, by whoever creates. */
static qs_status fill_all(qs_fsdp *f, staging *s, const qs_share_source *source)
{
    qs_status st = QS_OK;
    for (int u = 0; u < f->index->n_units; u++) {
        uint8_t *message = NULL;
        QS_TRY(agree(source, st != QS_OK ? st : staging_open(s, u, &message)));
        st = source->fill(source->ctx, u, f->rank, f->nranks, message, &f->stats.read_bytes);
        st = st != QS_OK ? st : staging_close(s, u, message);
        if (st != QS_OK && source->together == NULL) {
            return st;
        }
    }
    return st != QS_OK ? st : qs_queue_wait(f->queue);
}

qs_status qs_shares_fill(qs_fsdp *f, qs_status so_far, const qs_share_source *source)
{
    staging s = {.fsdp = NULL};
    qs_status st = so_far != QS_OK ? so_far : staging_make(&s, f);
    st = st != QS_OK ? agree(source, st) : fill_all(f, &s, source);
    staging_free(&s);
    return st;
}

qs_status qs_fsdp_create_from(qs_fsdp **out, const qs_base_index *index, qs_comm *comm,
                              qs_queue *compute, const qs_fsdp_options *options, qs_share_fill fill,
                              void *ctx)
{
    const qs_share_source source = {.fill = fill, .ctx = ctx};
    return qs_fsdp_create_filled(out, index, comm, compute, options, &source);
}

/* ---- from base.h5 ---- */

typedef struct {
    const qs_base_index *index;
    int fd;
    int error; /* errno of a failed open */
} base_file;

static qs_status fill_from_file(void *ctx, int u, int rank, int nranks, uint8_t *message,
                                uint64_t *bytes_read)
{
    base_file *file = ctx;
    if (file->fd < 0 && qs_seen_by_all(&file->index->seen)) {
        return QS_FAIL(QS_ERR_INPUT_MISSING, "%s: cannot be opened: %s", file->index->path,
                       strerror(file->error));
    }
    return qs_base_fetch_share(file->index, file->fd, u, rank, nranks, message, bytes_read);
}

qs_status qs_fsdp_create(qs_fsdp **out, const qs_base_index *index, qs_comm *comm,
                         qs_queue *compute, const qs_fsdp_options *options)
{
    base_file file = {.index = index, .fd = open(index->path, O_RDONLY | O_CLOEXEC)};
    file.error = errno;
    const qs_share_source source = {.fill = fill_from_file,
                                    .ctx = &file,
                                    .together =
                                        qs_seen_by_all(&index->seen) ? NULL : index->seen.comm};
    qs_status st = qs_fsdp_create_filled(out, index, comm, compute, options, &source);
    if (file.fd >= 0) {
        close(file.fd);
    }
    return st;
}
