/* The first bytes that go through NCCL: a pattern of every rank's, gathered, then exchanged in
 * pieces. Small, since what goes wrong between GPUs does with any size, and in time that the limit
 * for connecting covers: the all-to-all makes the connections that an all-gather has no need of. */
#include <stdlib.h>

#include "base/mem.h"
#include "comm/comm_impl.h"
#include "comm/comm_nccl.h"

static const size_t PIECE_BYTES = 4096;

typedef struct {
    qs_comm *comm, *host;
    qs_queue *queue;
    size_t bytes;                 /* of all pieces */
    uint8_t *on_device;           /* [nranks * PIECE_BYTES] */
    uint8_t *on_host;             /* likewise */
    size_t *sizes, *own, *places; /* [nranks] */
} trial;

static uint8_t pattern(int rank, size_t i)
{
    return (uint8_t)(31 * (size_t)rank + 7 * i + i / 251 + 1);
}

static size_t own_at(const trial *t)
{
    return (size_t)qs_comm_rank(t->comm) * PIECE_BYTES;
}

static qs_status allocate(trial *t, qs_device *device)
{
    const int nranks = qs_comm_nranks(t->comm);
    QS_TRY(QS_DEVICE_ALLOC(device, &t->on_device, t->bytes, QS_MEM_WORK));
    QS_TRY(QS_ALLOC(&t->on_host, t->bytes, QS_MEM_WORK));
    QS_TRY(QS_ALLOC(&t->sizes, 3 * nranks, QS_MEM_WORK));
    t->own = t->sizes + nranks;
    t->places = t->own + nranks;
    for (int r = 0; r < nranks; r++) {
        t->sizes[r] = PIECE_BYTES;
        t->own[r] = own_at(t);
        t->places[r] = (size_t)r * PIECE_BYTES;
    }
    return qs_queue_create_on(device, &t->queue, 1);
}

/* Nothing but this rank's own piece. */
static qs_status put(trial *t)
{
    uint8_t *own = t->on_host + own_at(t);
    for (size_t i = 0; i < PIECE_BYTES; i++) {
        own[i] = pattern(qs_comm_rank(t->comm), i);
    }
    QS_TRY(qs_queue_zero(t->queue, t->on_device, t->bytes));
    return qs_queue_copy(t->queue, t->on_device + own_at(t), own, PIECE_BYTES);
}

/* Everybody's. */
static qs_status look(trial *t, const char *call)
{
    QS_TRY(qs_comm_nccl_wait(t->comm, t->queue, call));
    QS_TRY(qs_queue_copy(t->queue, t->on_host, t->on_device, t->bytes));
    for (size_t at = 0; at < t->bytes; at++) {
        const int from = (int)(at / PIECE_BYTES);
        const uint8_t expected = pattern(from, at % PIECE_BYTES);
        if (t->on_host[at] != expected) {
            return QS_FAIL(QS_ERR_DEVICE,
                           "NCCL: %s brings rank %d from rank %d a byte of %d in place of %d: the "
                           "GPUs spoil what they send each other; try NCCL_P2P_DISABLE=1, and see "
                           "docs/troubleshooting.md",
                           call, qs_comm_rank(t->comm), from, t->on_host[at], expected);
        }
    }
    return QS_OK;
}

static qs_status gather(trial *t)
{
    QS_TRY(put(t));
    QS_TRY(
        qs_comm_all_gather(t->comm, t->on_device + own_at(t), t->on_device, PIECE_BYTES, t->queue));
    return look(t, "the first all-gather");
}

static qs_status exchange(trial *t)
{
    QS_TRY(put(t));
    QS_TRY(qs_comm_all_to_all_v(t->comm, t->on_device, t->sizes, t->own, t->on_device, t->sizes,
                                t->places, t->queue));
    return look(t, "the first exchange");
}

/* What a transport lost is this rank's own error; what is wrong is told to all. */
static qs_status agree(const trial *t, qs_status st)
{
    return st == QS_ERR_PEER ? st : qs_comm_agree(t->host, st);
}

static qs_status run(trial *t, qs_device *device)
{
    QS_TRY(qs_comm_agree(t->host, allocate(t, device)));
    QS_TRY(agree(t, gather(t)));
    return agree(t, exchange(t));
}

qs_status qs_comm_nccl_try(qs_comm *comm, qs_comm *host, qs_device *device)
{
    trial t = {.comm = comm, .host = host, .bytes = (size_t)qs_comm_nranks(comm) * PIECE_BYTES};
    const qs_comm before = *comm;
    const qs_status st = run(&t, device);
    comm->received_bytes = before.received_bytes; /* the counters tell what a run's work moves */
    comm->foreign_bytes = before.foreign_bytes;
    for (int kind = 0; kind < QS_COMM_KIND_COUNT; kind++) {
        comm->traffic[kind] = before.traffic[kind];
    }
    qs_queue_destroy(t.queue);
    qs_device_free(device, t.on_device);
    qs_mem_free(t.on_host);
    qs_mem_free(t.sizes);
    return st;
}
