/* The communicator of one rank: everything is there already. What moves is copied on its queue, so
 * that it serves a GPU's memory as well. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "comm/comm_impl.h"

static qs_status copy(qs_queue *queue, void *to, const void *from, size_t bytes)
{
    return to != from ? qs_queue_copy(queue, to, from, bytes) : QS_OK;
}

static qs_status self_all_gather_now(qs_comm *comm, const void *send, void *recv,
                                     size_t bytes_per_rank)
{
    (void)comm;
    if (bytes_per_rank > 0 && recv != send) {
        memmove(recv, send, bytes_per_rank);
    }
    return QS_OK;
}

static qs_status self_all_gather(qs_comm *comm, const void *send, void *recv, size_t bytes_per_rank,
                                 qs_queue *queue)
{
    (void)comm;
    return copy(queue, recv, send, bytes_per_rank);
}

static qs_status self_all_to_all_v(qs_comm *comm, const void *send, const size_t *send_bytes,
                                   const size_t *send_at, void *recv, const size_t *recv_bytes,
                                   const size_t *recv_at, qs_queue *queue)
{
    (void)comm, (void)recv_bytes;
    if (send_bytes[0] == 0) {
        return QS_OK; /* then the buffers may be NULL */
    }
    return copy(queue, (char *)recv + recv_at[0], (const char *)send + send_at[0], send_bytes[0]);
}

static qs_status self_bcast(qs_comm *comm, void *data, size_t bytes, int root)
{
    (void)comm, (void)data, (void)bytes, (void)root;
    return QS_OK;
}

static qs_status self_barrier(qs_comm *comm)
{
    (void)comm;
    return QS_OK;
}

static qs_status self_split(qs_comm *comm, int color, qs_comm **out)
{
    (void)comm, (void)color;
    return qs_comm_self_create(out);
}

static void self_abort(qs_comm *comm, qs_status status)
{
    (void)comm;
    _exit(qs_exit_code(status));
}

static void self_destroy(qs_comm *comm)
{
    qs_comm_fini(comm);
    free(comm);
}

static const qs_comm_ops self_ops = {
    .name = "self",
    .all_gather = self_all_gather,
    .all_to_all_v = self_all_to_all_v,
    .all_gather_now = self_all_gather_now,
    .bcast = self_bcast,
    .barrier = self_barrier,
    .split = self_split,
    .abort = self_abort,
    .destroy = self_destroy,
};

qs_status qs_comm_self_create(qs_comm **out)
{
    *out = NULL;
    qs_comm *comm = calloc(1, sizeof *comm);
    if (comm == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "memory: a communicator cannot be allocated");
    }
    qs_status st = qs_comm_init(comm, &self_ops, 0, 1);
    if (st != QS_OK) {
        free(comm);
        return st;
    }
    *out = comm;
    return QS_OK;
}
