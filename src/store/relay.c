/* Rounds: every rank says which piece it wants next, so that each knows what it has to send; then
 * the pieces travel in one exchange. A piece goes straight to its place, and only the ranks that
 * serve hold a copy of what they send. */
#include "store/relay.h"

#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "device/device.h"

/** What a rank asks for in a round; bytes 0: nothing. */
typedef struct {
    int64_t from, offset, bytes, status;
} request;

typedef struct {
    qs_comm *comm;
    int rank, nranks;
    qs_queue *queue;
    request *all;    /* [nranks] of this round */
    size_t *sizes;   /* [4 nranks] bytes and places of the exchange */
    size_t *rooms;   /* [nranks] bytes that each rank has room to send: the same on all ranks */
    uint8_t *pieces; /* [rooms[rank]] what this rank sends */
} relay;

static void relay_end(relay *r)
{
    qs_queue_destroy(r->queue);
    qs_mem_free(r->pieces);
    free(r->all);
    free(r->sizes);
    free(r->rooms);
}

static qs_status relay_begin(relay *r)
{
    r->all = calloc((size_t)r->nranks, sizeof *r->all);
    r->sizes = calloc((size_t)r->nranks * 4, sizeof *r->sizes);
    r->rooms = calloc((size_t)r->nranks, sizeof *r->rooms);
    if (r->all == NULL || r->sizes == NULL || r->rooms == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "no memory for the requests of %d ranks", r->nranks);
    }
    QS_TRY(QS_ALLOC(&r->pieces, 1, QS_MEM_WORK)); /* no rank passes a null pointer on */
    return qs_queue_create(&r->queue, 1);
}

qs_status qs_relay_read_memory(void *ctx, int64_t offset, size_t bytes, void *out)
{
    memcpy(out, (const uint8_t *)ctx + offset, bytes);
    return QS_OK;
}

static size_t bytes_of_server(const relay *r, int server)
{
    size_t bytes = 0;
    for (int i = 0; i < r->nranks; i++) {
        bytes += r->all[i].from == server ? (size_t)r->all[i].bytes : 0;
    }
    return bytes;
}

/* Room for what this rank sends. All ranks know when anyone needs more than it has, and agree then,
 * since a rank without memory could not keep its part of the exchange. */
static qs_status make_room(relay *r)
{
    qs_status st = QS_OK;
    bool any = false;
    for (int s = 0; s < r->nranks; s++) {
        const size_t bytes = bytes_of_server(r, s);
        if (bytes <= r->rooms[s]) {
            continue;
        }
        any = true;
        r->rooms[s] = bytes;
        if (s == r->rank) {
            qs_mem_free(r->pieces);
            r->pieces = NULL;
            st = QS_ALLOC(&r->pieces, bytes, QS_MEM_WORK);
        }
    }
    return any ? qs_comm_agree(r->comm, st) : QS_OK;
}

/* One round's pieces. A piece that cannot be read is sent all the same: the next round's request
 * says so. */
static qs_status exchange(relay *r, const request *mine, void *to, qs_relay_read read, void *ctx,
                          qs_status *st)
{
    size_t *send_bytes = r->sizes, *send_at = send_bytes + r->nranks;
    size_t *recv_bytes = send_at + r->nranks, *recv_at = recv_bytes + r->nranks;
    memset(r->sizes, 0, (size_t)r->nranks * 4 * sizeof *r->sizes);
    size_t at = 0;
    for (int i = 0; i < r->nranks; i++) {
        const request *theirs = &r->all[i];
        if (theirs->bytes == 0 || theirs->from != r->rank) {
            continue;
        }
        send_bytes[i] = (size_t)theirs->bytes;
        send_at[i] = at;
        if (*st == QS_OK) {
            *st = read(ctx, theirs->offset, send_bytes[i], r->pieces + at);
        }
        at += send_bytes[i];
    }
    if (mine->bytes > 0) {
        recv_bytes[mine->from] = (size_t)mine->bytes;
    }
    QS_TRY(qs_comm_all_to_all_v(r->comm, r->pieces, send_bytes, send_at, to, recv_bytes, recv_at,
                                r->queue));
    return qs_queue_wait(r->queue);
}

/* Told in this round's requests. */
static bool any_failed(const relay *r)
{
    for (int i = 0; i < r->nranks; i++) {
        if (r->all[i].status != QS_OK) {
            return true;
        }
    }
    return false;
}

static bool any_wants(const relay *r)
{
    for (int i = 0; i < r->nranks; i++) {
        if (r->all[i].bytes > 0) {
            return true;
        }
    }
    return false;
}

static qs_status rounds(relay *r, size_t piece_bytes, const qs_relay_want *wants, int count,
                        qs_relay_read read, void *ctx)
{
    qs_status st = QS_OK;
    int next = 0;
    size_t done = 0; /* of wants[next] */
    for (;;) {
        while (next < count && done == wants[next].bytes) {
            next++;
            done = 0;
        }
        request mine = {.from = -1, .status = st};
        uint8_t nothing = 0, *to = &nothing;
        if (next < count) {
            const qs_relay_want *want = &wants[next];
            const size_t left = want->bytes - done;
            mine.from = want->from;
            mine.offset = want->offset + (int64_t)done;
            mine.bytes = (int64_t)(left < piece_bytes ? left : piece_bytes);
            to = (uint8_t *)want->to + done;
        }
        QS_TRY(qs_comm_all_gather_now(r->comm, &mine, r->all, sizeof mine));
        if (any_failed(r)) {
            return qs_comm_agree(r->comm, st);
        }
        if (!any_wants(r)) {
            return QS_OK;
        }
        QS_TRY(make_room(r));
        QS_TRY(exchange(r, &mine, to, read, ctx, &st));
        done += (size_t)mine.bytes;
    }
}

qs_status qs_relay(qs_comm *comm, qs_status so_far, size_t piece_bytes, const qs_relay_want *wants,
                   int count, qs_relay_read read, void *ctx)
{
    relay r = {.comm = comm, .rank = qs_comm_rank(comm), .nranks = qs_comm_nranks(comm)};
    qs_status st = qs_comm_agree(comm, so_far != QS_OK ? so_far : relay_begin(&r));
    if (st == QS_OK) {
        st = rounds(&r, piece_bytes, wants, count, read, ctx);
    }
    relay_end(&r);
    return st;
}
