/* The communicator of MPI ranks, in host memory. The only file that includes mpi.h.
 *
 * Asynchronous collectives are receives and sends in pieces of at most 1 GiB (MPI counts are int),
 * all posted at once and tested together when the queue is polled. MPI_Iallgather is as fast
 * (docs/decisions.md, "Communication"), but takes no size past 2^31, does not tell when a peer
 * sends too little, and leaves its schedule to the library; all-to-all goes the same way. Peers are
 * taken in ring order, so that not all ranks send to rank 0 first.
 *
 * Messages between two ranks match in the order in which they are posted, and every rank posts its
 * collectives in the same order: one tag is enough. */
#include <mpi.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/watch.h"
#include "comm/comm_impl.h"

enum { TAG = 1, MISSING_MAX = 4 };
static const size_t PIECE_BYTES = (size_t)1 << 30;

typedef struct comm_mpi comm_mpi;

/* An asynchronous collective under way. The receives stand first in `requests`. Kept for reuse when
 * it is over. */
typedef struct operation {
    comm_mpi *comm;
    struct operation *next_free;
    int count, receives, capacity;
    bool finished;
    MPI_Request *requests; /* [capacity] */
    MPI_Status *statuses;  /* [capacity] */
    int *expected;         /* [capacity] bytes of each receive */
    int *peers;            /* [capacity] to or from whom */
} operation;

struct comm_mpi {
    qs_comm base;
    comm_mpi *parent; /* that it was split from, NULL: none */
    MPI_Comm world;   /* our own duplicate, or a part of the parent's */
    int *world_ranks; /* [nranks] as in MPI_COMM_WORLD, by which people know them */
    bool owns_mpi;    /* we called MPI_Init */
    bool broken;      /* a call failed: MPI_Finalize could hang */
    operation *unused;
};

/* Turns an MPI code into a status; `call` is the source text, of which the function's name is
 * printed. */
static qs_status mpi_check(int code, const char *call, int line)
{
    if (code == MPI_SUCCESS) {
        return QS_OK;
    }
    char text[MPI_MAX_ERROR_STRING] = "";
    int length = 0;
    MPI_Error_string(code, text, &length);
    return qs_error_set(QS_ERR_PEER, __FILE__, line,
                        "%.*s: %s: another rank or the network may have failed; look for the first "
                        "error of the job",
                        (int)strcspn(call, "("), call, text);
}

#define QS_MPI(call) mpi_check((call), #call, __LINE__)

/* Remember a failure, so that destroy does not wait for ranks that are gone. */
static qs_status note(comm_mpi *c, qs_status st)
{
    for (; st != QS_OK && c != NULL; c = c->parent) {
        c->broken = true;
    }
    return st;
}

/* ---- operations ---- */

static void free_operation(operation *op)
{
    free(op->requests);
    free(op->statuses);
    free(op->expected);
    free(op->peers);
    free(op);
}

static qs_status reserve(operation *op, size_t capacity)
{
    if (capacity <= (size_t)op->capacity) {
        return QS_OK;
    }
    free(op->requests);
    free(op->statuses);
    free(op->expected);
    free(op->peers);
    op->requests = calloc(capacity, sizeof *op->requests);
    op->statuses = calloc(capacity, sizeof *op->statuses);
    op->expected = calloc(capacity, sizeof *op->expected);
    op->peers = calloc(capacity, sizeof *op->peers);
    op->capacity = (int)capacity;
    if (op->requests == NULL || op->statuses == NULL || op->expected == NULL || op->peers == NULL) {
        op->capacity = 0;
        return QS_FAIL(QS_ERR_MEMORY, "memory: %zu messages cannot be kept", capacity);
    }
    return QS_OK;
}

/* An operation with room for `capacity` messages. */
static qs_status take_operation(comm_mpi *c, size_t capacity, operation **out)
{
    operation *op = c->unused;
    if (op != NULL) {
        c->unused = op->next_free;
    } else {
        op = calloc(1, sizeof *op);
        if (op == NULL) {
            return QS_FAIL(QS_ERR_MEMORY, "memory: a collective cannot be allocated");
        }
    }
    op->comm = c;
    op->count = op->receives = 0;
    op->finished = false;
    qs_status st = reserve(op, capacity);
    if (st != QS_OK) {
        free_operation(op);
        return st;
    }
    *out = op;
    return QS_OK;
}

/* Back to the unused ones. Messages still under way (an error, or a queue destroyed early) are
 * given up: MPI may still write into their buffers until it ends, so that a receive is cancelled
 * first. */
static void release_operation(void *ctx)
{
    operation *op = ctx;
    for (comm_mpi *c = op->comm; !op->finished && c != NULL; c = c->parent) {
        c->broken = true;
    }
    for (int i = 0; !op->finished && i < op->count; i++) {
        if (op->requests[i] != MPI_REQUEST_NULL) {
            if (i < op->receives) {
                MPI_Cancel(&op->requests[i]);
            }
            MPI_Request_free(&op->requests[i]);
        }
    }
    op->next_free = op->comm->unused;
    op->comm->unused = op;
}

static size_t pieces_of(size_t bytes)
{
    return bytes / PIECE_BYTES + (bytes % PIECE_BYTES != 0 ? 1 : 0);
}

static int piece_bytes(size_t bytes, size_t at)
{
    return (int)(bytes - at < PIECE_BYTES ? bytes - at : PIECE_BYTES);
}

static qs_status post_receives(operation *op, char *to, size_t bytes, int from)
{
    for (size_t at = 0; at < bytes; at += PIECE_BYTES) {
        int n = op->count++;
        op->requests[n] = MPI_REQUEST_NULL;
        op->expected[n] = piece_bytes(bytes, at);
        op->peers[n] = from;
        QS_TRY(QS_MPI(MPI_Irecv(to + at, op->expected[n], MPI_BYTE, from, TAG, op->comm->world,
                                &op->requests[n])));
    }
    op->receives = op->count;
    return QS_OK;
}

static qs_status post_sends(operation *op, const char *from, size_t bytes, int to)
{
    for (size_t at = 0; at < bytes; at += PIECE_BYTES) {
        int n = op->count++;
        op->requests[n] = MPI_REQUEST_NULL;
        op->peers[n] = to;
        QS_TRY(QS_MPI(MPI_Isend(from + at, piece_bytes(bytes, at), MPI_BYTE, to, TAG,
                                op->comm->world, &op->requests[n])));
    }
    return QS_OK;
}

/* The message that failed, out of MPI_ERR_IN_STATUS. */
static qs_status failed_message(const operation *op, int code)
{
    for (int i = 0; code == MPI_ERR_IN_STATUS && i < op->count; i++) {
        int own = op->statuses[i].MPI_ERROR;
        if (own != MPI_SUCCESS && own != MPI_ERR_PENDING) {
            return mpi_check(own, i < op->receives ? "MPI_Irecv" : "MPI_Isend", __LINE__);
        }
    }
    return mpi_check(code, "MPI_Testall", __LINE__);
}

/* A message that is too long is MPI's error; one that is too short would go unnoticed. */
static qs_status check_lengths(const operation *op)
{
    for (int i = 0; i < op->receives; i++) {
        int got = 0;
        MPI_Get_count(&op->statuses[i], MPI_BYTE, &got);
        if (got != op->expected[i]) {
            return QS_FAIL(QS_ERR_BUG, "rank %d expects %d bytes of rank %d, which sent %d",
                           op->comm->base.rank, op->expected[i], op->statuses[i].MPI_SOURCE, got);
        }
    }
    return QS_OK;
}

/* For the watch: the ranks that have not sent what is expected of them, or, where all have, that
 * have not taken what was sent to them. */
static void name_missing(const operation *op)
{
    int ranks[MISSING_MAX], count = 0;
    for (int part = 0; part < 2 && count == 0; part++) {
        const int first = part == 0 ? 0 : op->receives, end = part == 0 ? op->receives : op->count;
        int last = -1; /* a peer's pieces are neighbours: one of them will do */
        for (int i = first; i < end; i++) {
            int over = 0;
            MPI_Request_get_status(op->requests[i], &over, MPI_STATUS_IGNORE);
            if (over || op->peers[i] == last) {
                continue;
            }
            last = op->peers[i];
            if (count < MISSING_MAX) {
                ranks[count] = op->comm->world_ranks[last];
            }
            count++;
        }
    }
    qs_watch_missing(ranks, count);
}

static qs_status poll_operation(void *ctx, bool *finished)
{
    operation *op = ctx;
    int flag = 0;
    int code = MPI_Testall(op->count, op->requests, &flag, op->statuses);
    if (code != MPI_SUCCESS) {
        return note(op->comm, failed_message(op, code));
    }
    op->finished = flag != 0;
    *finished = op->finished;
    if (!op->finished && qs_watch_asks()) {
        name_missing(op);
    }
    return op->finished ? note(op->comm, check_lengths(op)) : QS_OK;
}

static qs_status give_to_queue(operation *op, qs_queue *queue)
{
    qs_status st = qs_queue_push(queue, poll_operation, release_operation, op);
    if (st != QS_OK) {
        note(op->comm, st);
        release_operation(op);
    }
    return st;
}

/* ---- collectives ---- */

static void copy_own(char *to, const char *from, size_t bytes)
{
    if (bytes > 0 && to != from) {
        memmove(to, from, bytes);
    }
}

static int peer_before(const qs_comm *comm, int distance)
{
    return (comm->rank - distance + comm->nranks) % comm->nranks;
}

static int peer_after(const qs_comm *comm, int distance)
{
    return (comm->rank + distance) % comm->nranks;
}

static qs_status post_all_gather(operation *op, const char *send, char *recv, size_t bytes_per_rank)
{
    const qs_comm *comm = &op->comm->base;
    for (int d = 1; d < comm->nranks; d++) {
        int peer = peer_before(comm, d);
        QS_TRY(post_receives(op, recv + (size_t)peer * bytes_per_rank, bytes_per_rank, peer));
    }
    for (int d = 1; d < comm->nranks; d++) {
        QS_TRY(post_sends(op, send, bytes_per_rank, peer_after(comm, d)));
    }
    copy_own(recv + (size_t)comm->rank * bytes_per_rank, send, bytes_per_rank);
    return QS_OK;
}

static qs_status start_all_gather(comm_mpi *c, const void *send, void *recv, size_t bytes_per_rank,
                                  operation **out)
{
    size_t peers = (size_t)(c->base.nranks - 1);
    QS_TRY(take_operation(c, 2 * peers * pieces_of(bytes_per_rank), out));
    qs_status st = post_all_gather(*out, send, recv, bytes_per_rank);
    if (st != QS_OK) {
        release_operation(*out);
    }
    return st;
}

static qs_status mpi_all_gather(qs_comm *comm, const void *send, void *recv, size_t bytes_per_rank,
                                qs_queue *queue)
{
    comm_mpi *c = (comm_mpi *)comm;
    operation *op;
    QS_TRY(note(c, start_all_gather(c, send, recv, bytes_per_rank, &op)));
    return give_to_queue(op, queue);
}

typedef struct {
    const char *send;
    const size_t *send_bytes, *send_at;
    char *recv;
    const size_t *recv_bytes, *recv_at;
} exchange;

static qs_status post_exchange(operation *op, const exchange *x)
{
    const qs_comm *comm = &op->comm->base;
    for (int d = 1; d < comm->nranks; d++) {
        int peer = peer_before(comm, d);
        QS_TRY(post_receives(op, x->recv + x->recv_at[peer], x->recv_bytes[peer], peer));
    }
    for (int d = 1; d < comm->nranks; d++) {
        int peer = peer_after(comm, d);
        QS_TRY(post_sends(op, x->send + x->send_at[peer], x->send_bytes[peer], peer));
    }
    int me = comm->rank;
    copy_own(x->recv + x->recv_at[me], x->send + x->send_at[me], x->send_bytes[me]);
    return QS_OK;
}

static qs_status mpi_all_to_all_v(qs_comm *comm, const void *send, const size_t *send_bytes,
                                  const size_t *send_at, void *recv, const size_t *recv_bytes,
                                  const size_t *recv_at, qs_queue *queue)
{
    comm_mpi *c = (comm_mpi *)comm;
    const exchange x = {send, send_bytes, send_at, recv, recv_bytes, recv_at};
    size_t messages = 0;
    for (int r = 0; r < comm->nranks; r++) {
        messages += pieces_of(send_bytes[r]) + pieces_of(recv_bytes[r]);
    }
    operation *op;
    QS_TRY(note(c, take_operation(c, messages, &op)));
    qs_status st = note(c, post_exchange(op, &x));
    if (st != QS_OK) {
        release_operation(op);
        return st;
    }
    return give_to_queue(op, queue);
}

static qs_status wait_operation(operation *op)
{
    bool finished = false;
    qs_status st = poll_operation(op, &finished);
    while (st == QS_OK && !finished) {
        sched_yield();
        st = poll_operation(op, &finished);
    }
    release_operation(op);
    return st;
}

static qs_status mpi_all_gather_now(qs_comm *comm, const void *send, void *recv,
                                    size_t bytes_per_rank)
{
    comm_mpi *c = (comm_mpi *)comm;
    if (bytes_per_rank > PIECE_BYTES / (size_t)comm->nranks) { /* some MPIs add counts up in int */
        operation *op;
        QS_TRY(note(c, start_all_gather(c, send, recv, bytes_per_rank, &op)));
        return wait_operation(op);
    }
    const char *own_place = (char *)recv + (size_t)comm->rank * bytes_per_rank;
    const void *from = send == own_place ? MPI_IN_PLACE : send;
    int count = (int)bytes_per_rank;
    return note(c, QS_MPI(MPI_Allgather(from, count, MPI_BYTE, recv, count, MPI_BYTE, c->world)));
}

static qs_status mpi_bcast(qs_comm *comm, void *data, size_t bytes, int root)
{
    comm_mpi *c = (comm_mpi *)comm;
    for (size_t at = 0; at < bytes; at += PIECE_BYTES) {
        QS_TRY(note(c, QS_MPI(MPI_Bcast((char *)data + at, piece_bytes(bytes, at), MPI_BYTE, root,
                                        c->world))));
    }
    return QS_OK;
}

static qs_status mpi_barrier(qs_comm *comm)
{
    comm_mpi *c = (comm_mpi *)comm;
    return note(c, QS_MPI(MPI_Barrier(c->world)));
}

/* A message that was sent may still need this rank: a long one until its receiver asks for it, a
 * short one while a buffer on the way is full. Whatever looks at MPI moves all of them. */
static void mpi_progress(qs_comm *comm)
{
    int found = 0;
    (void)MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, ((comm_mpi *)comm)->world, &found,
                     MPI_STATUS_IGNORE);
}

/* ---- life ---- */

void qs_comm_mpi_version(char *out, size_t capacity)
{
    char text[MPI_MAX_LIBRARY_VERSION_STRING] = "";
    int length = 0;
    MPI_Get_library_version(text, &length);
    /* Open MPI puts the whole build after a comma, MPICH on further lines. */
    (void)snprintf(out, capacity, "%.*s", (int)strcspn(text, ",\n"), text);
}

static void mpi_abort(qs_comm *comm, qs_status status)
{
    (void)comm;
    MPI_Abort(MPI_COMM_WORLD, qs_exit_code(status));
    _exit(qs_exit_code(status)); /* MPI_Abort may return where the launcher is gone */
}

static void forget(comm_mpi *c)
{
    qs_comm_fini(&c->base);
    free(c->world_ranks);
    free(c);
}

static void mpi_destroy(qs_comm *comm)
{
    comm_mpi *c = (comm_mpi *)comm;
    while (c->unused != NULL) {
        operation *op = c->unused;
        c->unused = op->next_free;
        free_operation(op);
    }
    if (!c->broken) {
        if (c->world != MPI_COMM_NULL) {
            MPI_Comm_free(&c->world);
        }
        if (c->owns_mpi) {
            MPI_Finalize();
        }
    }
    forget(c);
}

static qs_status mpi_split(qs_comm *comm, int color, qs_comm **out);

static const qs_comm_ops mpi_ops = {
    .name = "mpi",
    .all_gather = mpi_all_gather,
    .all_to_all_v = mpi_all_to_all_v,
    .all_gather_now = mpi_all_gather_now,
    .bcast = mpi_bcast,
    .barrier = mpi_barrier,
    .split = mpi_split,
    .progress = mpi_progress,
    .abort = mpi_abort,
    .destroy = mpi_destroy,
};

/* Over TCP, Open MPI's receivers ask for a long message by a word that waits in the one stream
 * behind what they send themselves, so that the two directions of an exchange take turns: twice the
 * time (docs/decisions.md, "Communication"). Without `put` the sender goes on by itself. Other
 * transports and other MPIs know nothing of it, and a user's own setting stands. */
static void tune_tcp(void)
{
    (void)setenv("OMPI_MCA_btl_tcp_flags", "send", 0);
}

/* FUNNELED: only the thread that created the communicator calls MPI, from the idle callback too. */
static qs_status start_mpi(int *argc, char ***argv, bool *started)
{
    int initialized = 0, finalized = 0, level = MPI_THREAD_SINGLE;
    MPI_Initialized(&initialized);
    MPI_Finalized(&finalized);
    if (finalized) {
        return QS_FAIL(QS_ERR_ENVIRONMENT, "MPI: it has ended in this process and cannot be "
                                           "started again");
    }
    if (!initialized) {
        tune_tcp();
        if (MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &level) != MPI_SUCCESS) {
            return QS_FAIL(QS_ERR_ENVIRONMENT,
                           "MPI: MPI_Init_thread failed; is this program started by the mpirun or "
                           "srun --mpi of the MPI that it was built with?");
        }
        *started = true;
    }
    MPI_Query_thread(&level);
    if (level < MPI_THREAD_FUNNELED) {
        return QS_FAIL(QS_ERR_ENVIRONMENT,
                       "MPI: thread level %d is provided, MPI_THREAD_FUNNELED (%d) is needed; use "
                       "an MPI built with thread support",
                       level, MPI_THREAD_FUNNELED);
    }
    return QS_OK;
}

static qs_status find_local_ranks(comm_mpi *c)
{
    MPI_Comm host = MPI_COMM_NULL;
    QS_TRY(QS_MPI(
        MPI_Comm_split_type(c->world, MPI_COMM_TYPE_SHARED, c->base.rank, MPI_INFO_NULL, &host)));
    MPI_Comm_rank(host, &c->base.local_rank);
    MPI_Comm_size(host, &c->base.local_nranks);
    int lowest = c->base.rank;
    QS_TRY(QS_MPI(MPI_Bcast(&lowest, 1, MPI_INT, 0, host)));
    QS_TRY(QS_MPI(MPI_Allgather(&lowest, 1, MPI_INT, c->base.hosts, 1, MPI_INT, c->world)));
    return QS_MPI(MPI_Comm_free(&host));
}

static qs_status find_world_ranks(comm_mpi *c)
{
    int mine = 0;
    c->world_ranks = calloc((size_t)c->base.nranks, sizeof *c->world_ranks);
    if (c->world_ranks == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "memory: a communicator of %d ranks cannot be allocated",
                       c->base.nranks);
    }
    QS_TRY(QS_MPI(MPI_Comm_rank(MPI_COMM_WORLD, &mine)));
    c->base.world_rank = mine;
    return QS_MPI(MPI_Allgather(&mine, 1, MPI_INT, c->world_ranks, 1, MPI_INT, c->world));
}

/* What there is to know about c->world. */
static qs_status look_around(comm_mpi *c)
{
    int rank = 0, nranks = 1;
    QS_TRY(QS_MPI(MPI_Comm_rank(c->world, &rank)));
    QS_TRY(QS_MPI(MPI_Comm_size(c->world, &nranks)));
    QS_TRY(qs_comm_init(&c->base, &mpi_ops, rank, nranks));
    QS_TRY(find_world_ranks(c));
    return find_local_ranks(c);
}

static qs_status set_up(comm_mpi *c)
{
    QS_TRY(QS_MPI(MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN)));
    QS_TRY(QS_MPI(MPI_Comm_dup(MPI_COMM_WORLD, &c->world)));
    return look_around(c);
}

static qs_status mpi_split(qs_comm *comm, int color, qs_comm **out)
{
    comm_mpi *parent = (comm_mpi *)comm;
    comm_mpi *c = calloc(1, sizeof *c);
    if (c == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "memory: a communicator cannot be allocated");
    }
    c->parent = parent;
    c->world = MPI_COMM_NULL;
    qs_status st = QS_MPI(MPI_Comm_split(parent->world, color, comm->rank, &c->world));
    if (st == QS_OK) {
        st = look_around(c);
    }
    if (note(parent, st) != QS_OK) {
        forget(c);
        return st;
    }
    *out = &c->base;
    return QS_OK;
}

qs_status qs_comm_mpi_create(qs_comm **out, int *argc, char ***argv)
{
    *out = NULL;
    comm_mpi *c = calloc(1, sizeof *c);
    if (c == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "memory: a communicator cannot be allocated");
    }
    c->world = MPI_COMM_NULL;
    const bool by_mpirun = qs_comm_launched_by_mpirun();
    qs_status st = start_mpi(argc, argv, &c->owns_mpi);
    if (st == QS_OK) {
        st = set_up(c);
    }
    if (st != QS_OK) { /* MPI is left as it is: the caller can only end the process */
        forget(c);
        return st;
    }
    c->base.by_mpirun = by_mpirun;
    *out = &c->base;
    return QS_OK;
}
