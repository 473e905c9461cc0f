/* A libnccl over MPI, for what src/comm/comm_nccl.c calls. The ranks of a communicator are some or
 * all of MPI_COMM_WORLD; one rank needs no MPI.
 *
 * A call runs the stream's earlier work, copies what is to be sent aside, and starts to exchange it
 * at once: ranks that call in the same order cannot wait for each other crosswise, whatever their
 * streams have run by then. What arrives is put aside as well, and written to where it belongs when
 * somebody waits for the stream (or a later call uses the same memory), so that whoever does not
 * wait reads 0xff.
 *
 * What NCCL would hang on, or would answer with wrong bytes, ends the program with a line that
 * begins with "emulator:":
 *   - two communicators at work in two streams of which neither waits for the other;
 *   - ranks whose calls on a communicator are not the same: kind, size, root, order. Before a piece
 *     goes a word that says what it belongs to. Sends and receives only have to lie between the
 *     same collectives, since a rank that has no piece makes no call;
 *   - messages that nobody has received when the communicator is closed;
 *   - two threads in calls at the same time, and a communicator that is used after its end.
 *
 * A non-blocking communicator is in progress until its exchange has arrived, and at least once: who
 * calls the next one before is refused, as NCCL does.
 *
 *   QSHARD_EMULATOR_NCCL_FAIL     n: the n-th exchange returns ncclRemoteError; async:n: it seems
 * to begin, then ncclCommGetAsyncError says so; init: the communicator cannot be made. With @r
 * behind it on rank r alone. QSHARD_EMULATOR_NCCL_VERSION  22809 or 22809@r: what ncclGetVersion
 * says
 */
#include <mpi.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "emulator_c.h"
#include "nccl.h"

enum { TAG = 7, WORD_TAG = 8, JOIN_TAG = 100, POISON = 0xff, TEXT_BYTES = 160 };
static const size_t CHUNK_BYTES = (size_t)1 << 30; /* MPI counts in int */
#define ID_TEXT "qshard emulator"

/** What ncclUniqueId holds. */
typedef struct {
    char text[16];
    int maker, number; /* rank in MPI_COMM_WORLD, and how many it had made before */
} unique_id;

typedef enum { ALL_GATHER, BROADCAST, POINT_TO_POINT } call_kind;

/** What a piece belongs to, which both sides must agree on. */
typedef struct {
    int64_t bytes, collectives; /* that this communicator has had before */
    int32_t kind, root;
} word;

/** What goes to a peer or comes from it. */
typedef struct {
    char *at;    /* device memory */
    char *aside; /* host memory */
    size_t bytes;
    int peer;
    bool send;
    word mine, theirs;
    MPI_Request request; /* of the word that comes */
    bool open;           /* it has come, and so may the bytes */
} piece;

/** Everything of a call, or of a group of calls. */
typedef struct exchange {
    ncclComm_t comm;
    struct exchange *older;        /* of the communicator */
    struct exchange *next, **from; /* of all that this process has under way */
    cudaStream_t stream;
    piece *pieces;
    int n_pieces, capacity;
    MPI_Request *requests;
    int *expected; /* bytes of each request */
    int n_requests;
    bool collective, arrived;
} exchange;

struct ncclComm {
    int rank, nranks;
    bool blocking;
    MPI_Comm mpi;        /* MPI_COMM_NULL: one rank */
    MPI_Request joining; /* of the duplicate that mpi is to be */
    exchange *current;   /* those that streams still have, the last one first */
    bool destroyed;      /* freed with the last of them */
    bool was_polled;     /* since the last call */
    int64_t collectives; /* so far */
    atomic_bool ended;   /* aborted: nothing arrives any more, and it may not be used */
    ncclResult_t failed;
};

/* Of all communicators, what has not arrived. */
static exchange *under_way;

/* A thread is between the start and the end of a group, or in a call. */
static atomic_bool busy;

/* A group of calls of this thread. */
static _Thread_local int group_depth;
static _Thread_local exchange *group;
static _Thread_local ncclResult_t group_failed;

static _Noreturn void die(const char *what)
{
    fprintf(stderr, "emulator: %s\n", what);
    abort();
}

static void check_alive(ncclComm_t comm)
{
    if (comm->ended) {
        die("a communicator of NCCL is used after ncclCommAbort");
    }
}

/* ---- settings ---- */

static int world_rank(void)
{
    int initialized = 0, rank = 0;
    MPI_Initialized(&initialized);
    if (initialized) {
        MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    }
    return rank;
}

/* The variable's text, if it means this rank: "text" or "text@rank". */
static const char *setting(const char *name)
{
    const char *text = getenv(name);
    if (text == NULL || *text == '\0') {
        return NULL;
    }
    const char *at = strchr(text, '@');
    return at == NULL || atoi(at + 1) == world_rank() ? text : NULL;
}

/* Counts the exchanges of this process. */
static ncclResult_t injected(ncclComm_t comm)
{
    static long calls;
    const char *text = setting("QSHARD_EMULATOR_NCCL_FAIL");
    calls++;
    if (text == NULL) {
        return ncclSuccess;
    }
    const bool later = strncmp(text, "async:", 6) == 0;
    if (atol(later ? text + 6 : text) != calls) {
        return ncclSuccess;
    }
    comm->failed = ncclRemoteError;
    return later ? ncclInProgress : ncclRemoteError;
}

/* ---- an exchange ---- */

static void *allocate(size_t count, size_t bytes)
{
    void *out = calloc(count > 0 ? count : 1, bytes);
    if (out == NULL) {
        fprintf(stderr, "emulator: no memory for an exchange of NCCL\n");
        abort();
    }
    return out;
}

static void add(exchange *x, piece p)
{
    if (x->n_pieces == x->capacity) {
        x->capacity = 2 * x->capacity + 8;
        x->pieces = realloc(x->pieces, (size_t)x->capacity * sizeof *x->pieces);
        if (x->pieces == NULL) {
            abort();
        }
    }
    p.aside = allocate(p.bytes, 1);
    x->pieces[x->n_pieces++] = p;
}

static void exchange_free(exchange *x)
{
    for (int i = 0; i < x->n_pieces; i++) {
        free(x->pieces[i].aside);
    }
    free(x->pieces);
    free(x->requests);
    free(x->expected);
    free(x);
}

/* What is sent is read before anything is poisoned: it may lie within what is received. */
static void take_aside(void *ctx)
{
    exchange *x = ctx;
    for (int i = 0; i < x->n_pieces; i++) {
        if (x->pieces[i].send) {
            memcpy(x->pieces[i].aside, x->pieces[i].at, x->pieces[i].bytes);
        }
    }
    for (int i = 0; i < x->n_pieces; i++) {
        if (!x->pieces[i].send && x->pieces[i].peer != x->comm->rank) {
            memset(x->pieces[i].at, POISON, x->pieces[i].bytes);
        }
    }
}

/* What a rank sends to itself: its sends meet its receives in their order. */
static void pass_to_self(exchange *x)
{
    const int me = x->comm->rank;
    int send = -1;
    for (int i = 0; i < x->n_pieces; i++) {
        piece *to = &x->pieces[i];
        if (to->send || to->peer != me) {
            continue;
        }
        do {
            send++;
        } while (send < x->n_pieces && (!x->pieces[send].send || x->pieces[send].peer != me));
        if (send == x->n_pieces || x->pieces[send].bytes != to->bytes) {
            fprintf(stderr, "emulator: rank %d receives from itself what it does not send\n", me);
            abort();
        }
        memcpy(to->aside, x->pieces[send].aside, to->bytes);
    }
}

static int chunks_of(size_t bytes)
{
    return (int)((bytes + CHUNK_BYTES - 1) / CHUNK_BYTES);
}

static bool is_mine(const exchange *x, const piece *p)
{
    return p->peer == x->comm->rank;
}

static MPI_Request *next_request(exchange *x, int expected)
{
    x->expected[x->n_requests] = expected;
    return &x->requests[x->n_requests++];
}

static void move_bytes(exchange *x, piece *p)
{
    for (size_t at = 0; at < p->bytes; at += CHUNK_BYTES) {
        const size_t rest = p->bytes - at;
        const int bytes = (int)(rest < CHUNK_BYTES ? rest : CHUNK_BYTES);
        if (p->send) {
            MPI_Isend(p->aside + at, bytes, MPI_BYTE, p->peer, TAG, x->comm->mpi,
                      next_request(x, 0));
        } else {
            MPI_Irecv(p->aside + at, bytes, MPI_BYTE, p->peer, TAG, x->comm->mpi,
                      next_request(x, bytes));
        }
    }
}

/* Send all, behind their words, and wait for the words of what comes. */
static void start(exchange *x)
{
    int n = 0;
    for (int i = 0; i < x->n_pieces; i++) {
        n += chunks_of(x->pieces[i].bytes) + 1;
    }
    x->requests = allocate((size_t)n, sizeof *x->requests);
    x->expected = allocate((size_t)n, sizeof *x->expected);
    for (int i = 0; i < x->n_pieces; i++) {
        piece *p = &x->pieces[i];
        p->open = p->send || is_mine(x, p);
        if (is_mine(x, p)) {
            continue;
        }
        p->mine.collectives = x->comm->collectives;
        if (p->send) {
            MPI_Isend(&p->mine, sizeof p->mine, MPI_BYTE, p->peer, WORD_TAG, x->comm->mpi,
                      next_request(x, 0));
            move_bytes(x, p);
        } else {
            MPI_Irecv(&p->theirs, sizeof p->theirs, MPI_BYTE, p->peer, WORD_TAG, x->comm->mpi,
                      &p->request);
        }
    }
    x->comm->collectives += x->collective ? 1 : 0;
}

static void describe(char out[TEXT_BYTES], const word *w)
{
    char call[TEXT_BYTES / 2] = "ncclSend or ncclRecv";
    if (w->kind == ALL_GATHER) {
        snprintf(call, sizeof call, "ncclAllGather");
    } else if (w->kind == BROADCAST) {
        snprintf(call, sizeof call, "ncclBroadcast from %d", w->root);
    }
    snprintf(out, TEXT_BYTES, "%s of %lld bytes behind %lld collectives", call, (long long)w->bytes,
             (long long)w->collectives);
}

static void compare_words(const exchange *x, const piece *p)
{
    char mine[TEXT_BYTES], theirs[TEXT_BYTES], what[3 * TEXT_BYTES];
    if (p->mine.kind == p->theirs.kind && p->mine.bytes == p->theirs.bytes &&
        p->mine.root == p->theirs.root && p->mine.collectives == p->theirs.collectives) {
        return;
    }
    describe(mine, &p->mine);
    describe(theirs, &p->theirs);
    snprintf(what, sizeof what, "rank %d of a communicator calls %s, and rank %d calls %s",
             x->comm->rank, mine, p->peer, theirs);
    die(what);
}

/* A peer's pieces come one behind the other. */
static bool is_next_of_peer(const exchange *x, int i)
{
    for (int k = 0; k < i; k++) {
        if (!x->pieces[k].open && x->pieces[k].peer == x->pieces[i].peer) {
            return false;
        }
    }
    return true;
}

/* \return all words have come. */
static bool open_pieces(exchange *x)
{
    bool all = true;
    for (int i = 0; i < x->n_pieces; i++) {
        piece *p = &x->pieces[i];
        int here = 0;
        if (p->open) {
            continue;
        }
        if (is_next_of_peer(x, i)) {
            MPI_Test(&p->request, &here, MPI_STATUS_IGNORE);
        }
        if (here) {
            compare_words(x, p);
            p->open = true;
            move_bytes(x, p);
        }
        all = all && here;
    }
    return all;
}

/* Has everything come? */
static bool look(exchange *x)
{
    int arrived = 1;
    if (x->arrived) {
        return true;
    }
    if (!open_pieces(x)) {
        return false;
    }
    if (x->n_requests == 0) { /* one rank: there may be no MPI */
        x->arrived = true;
        return true;
    }
    MPI_Status *statuses = allocate((size_t)x->n_requests, sizeof *statuses);
    MPI_Testall(x->n_requests, x->requests, &arrived, statuses);
    for (int i = 0; arrived && i < x->n_requests; i++) {
        int bytes = 0;
        MPI_Get_count(&statuses[i], MPI_BYTE, &bytes);
        if (x->expected[i] > 0 && bytes != x->expected[i]) {
            fprintf(stderr, "emulator: rank %d wants %d bytes of rank %d and gets %d\n",
                    x->comm->rank, x->expected[i], statuses[i].MPI_SOURCE, bytes);
            abort();
        }
    }
    free(statuses);
    x->arrived = arrived != 0;
    return x->arrived;
}

/* With `wait`, true unless the communicator is aborted meanwhile. */
static bool has_arrived(exchange *x, bool wait)
{
    const struct timespec nap = {.tv_nsec = 20000};
    while (!look(x)) {
        if (!wait || x->comm->ended) {
            return false;
        }
        nanosleep(&nap, NULL);
    }
    return true;
}

/* Wait for what comes, and put it where it belongs. */
static void deliver(exchange *x)
{
    if (x->comm->ended || !has_arrived(x, true)) {
        return; /* its kernel was ended */
    }
    for (int i = 0; i < x->n_pieces; i++) {
        if (!x->pieces[i].send) {
            memcpy(x->pieces[i].at, x->pieces[i].aside, x->pieces[i].bytes);
        }
    }
}

static void comm_free(ncclComm_t comm)
{
    if (comm->current == NULL) {
        free(comm);
    }
}

static void forget(exchange *x)
{
    ncclComm_t comm = x->comm;
    exchange **at = &comm->current;
    while (*at != x) {
        at = &(*at)->older;
    }
    *at = x->older;
    *x->from = x->next;
    if (x->next != NULL) {
        x->next->from = x->from;
    }
    if (x->arrived) { /* else MPI may still write into it */
        exchange_free(x);
    }
    if (comm->destroyed) {
        comm_free(comm);
    }
}

static void arrive(void *ctx)
{
    deliver(ctx);
    forget(ctx);
}

static bool overlap(const piece *a, const piece *b)
{
    return a->at < b->at + b->bytes && b->at < a->at + a->bytes;
}

/* Does `x` touch what an exchange that has not been delivered is to write? */
static bool needs(const exchange *x, const exchange *earlier)
{
    for (int i = 0; i < x->n_pieces; i++) {
        for (int k = 0; k < earlier->n_pieces; k++) {
            if (!earlier->pieces[k].send && overlap(&x->pieces[i], &earlier->pieces[k])) {
                return true;
            }
        }
    }
    return false;
}

/* Run what stands before `x` on its stream. */
static void catch_up(const exchange *x)
{
    qs_emulator_advance(x->stream);
    for (const exchange *e = x->comm->current; e != NULL; e = e->older) {
        if (e->stream == x->stream && needs(x, e)) {
            qs_emulator_force(x->stream);
            return;
        }
    }
}

/* NCCL's kernels wait for those of the peers. Two communicators at work in two streams may begin in
 * one order here and in the other there, and wait for each other for good where a GPU has no room
 * for both (NCCL's manual, "Using multiple NCCL communicators concurrently"). One communicator's
 * operations NCCL brings into order by itself. */
static void check_alone(const exchange *x)
{
    for (const exchange *e = under_way; e != NULL; e = e->next) {
        if (e->comm != x->comm && e->stream != x->stream) {
            die("two communicators of NCCL are at work in two streams, and neither waits for the "
                "other");
        }
    }
}

static ncclResult_t run(exchange *x)
{
    ncclComm_t comm = x->comm;
    const ncclResult_t bad = injected(comm);
    if (bad != ncclSuccess) {
        exchange_free(x);
        return bad;
    }
    catch_up(x);
    check_alone(x);
    qs_emulator_access(take_aside, x);
    pass_to_self(x);
    start(x);
    x->older = comm->current;
    comm->current = x;
    x->next = under_way;
    x->from = &under_way;
    if (x->next != NULL) {
        x->next->from = &x->next;
    }
    under_way = x;
    comm->was_polled = false;
    if (comm->blocking) {
        has_arrived(x, true);
    }
    const ncclResult_t taken = comm->blocking ? ncclSuccess : ncclInProgress;
    qs_emulator_push_arrival(x->stream, arrive, x);
    return taken;
}

/* ---- groups ---- */

ncclResult_t ncclGroupStart(void)
{
    if (group_depth == 0 && atomic_exchange(&busy, true)) {
        die("two threads call NCCL at the same time");
    }
    group_depth++;
    return ncclSuccess;
}

ncclResult_t ncclGroupEnd(void)
{
    if (group_depth == 0) {
        return ncclInvalidUsage;
    }
    if (--group_depth > 0) {
        return ncclSuccess;
    }
    exchange *x = group;
    ncclResult_t result = group_failed;
    group = NULL;
    group_failed = ncclSuccess;
    if (x != NULL && result == ncclSuccess) {
        result = run(x);
    } else if (x != NULL) {
        exchange_free(x);
    }
    atomic_store(&busy, false);
    return result;
}

static ncclResult_t refuse(ncclResult_t why)
{
    group_failed = why;
    return why;
}

/* Is the communicator free for another call, and is it the group's? */
static ncclResult_t enter(ncclComm_t comm, cudaStream_t stream, ncclDataType_t type)
{
    ncclResult_t state = ncclSuccess;
    if (comm == NULL || (type != ncclUint8 && type != ncclInt8)) {
        return refuse(ncclInvalidArgument);
    }
    check_alive(comm);
    if (comm->failed != ncclSuccess) {
        return refuse(comm->failed);
    }
    if (!comm->was_polled && !comm->blocking) {
        state = ncclInProgress;
    } else {
        ncclCommGetAsyncError(comm, &state);
    }
    if (state == ncclInProgress) {
        return refuse(ncclInvalidArgument); /* NCCL: used before the last call was through */
    }
    if (group == NULL) {
        group = allocate(1, sizeof *group);
        group->comm = comm;
        group->stream = stream;
    }
    return group->comm == comm && group->stream == stream ? ncclSuccess : refuse(ncclInvalidUsage);
}

/* In NCCL a call within a group succeeds, and the group's end says what became of it. */
static ncclResult_t leave(ncclResult_t entered)
{
    const bool alone = group_depth == 1;
    const ncclResult_t ended = ncclGroupEnd();
    return alone ? ended : entered;
}

static bool is_peer(ncclComm_t comm, int peer)
{
    return peer >= 0 && peer < comm->nranks;
}

ncclResult_t ncclAllGather(const void *send, void *recv, size_t count, ncclDataType_t type,
                           ncclComm_t comm, cudaStream_t stream)
{
    ncclGroupStart();
    const ncclResult_t entered = enter(comm, stream, type);
    const word w = {.kind = ALL_GATHER, .bytes = (int64_t)count};
    for (int r = 0; entered == ncclSuccess && count > 0 && r < comm->nranks; r++) {
        char *to = (char *)recv + (size_t)r * count;
        add(group, (piece){.at = (char *)send, .bytes = count, .peer = r, .send = true, .mine = w});
        add(group, (piece){.at = to, .bytes = count, .peer = r, .mine = w});
        group->collective = true;
    }
    return leave(entered);
}

ncclResult_t ncclBroadcast(const void *send, void *recv, size_t count, ncclDataType_t type,
                           int root, ncclComm_t comm, cudaStream_t stream)
{
    ncclGroupStart();
    ncclResult_t entered = enter(comm, stream, type);
    if (entered == ncclSuccess && !is_peer(comm, root)) {
        entered = refuse(ncclInvalidArgument);
    }
    const word w = {.kind = BROADCAST, .bytes = (int64_t)count, .root = root};
    for (int r = 0; entered == ncclSuccess && count > 0 && r < comm->nranks; r++) {
        const size_t out = comm->rank == root ? count : 0, in = r == root ? count : 0;
        add(group, (piece){.at = (char *)send, .bytes = out, .peer = r, .send = true, .mine = w});
        add(group, (piece){.at = recv, .bytes = in, .peer = r, .mine = w});
        group->collective = true;
    }
    return leave(entered);
}

static ncclResult_t send_or_receive(piece p, ncclDataType_t type, ncclComm_t comm,
                                    cudaStream_t stream)
{
    ncclGroupStart();
    ncclResult_t entered = enter(comm, stream, type);
    if (entered == ncclSuccess && !is_peer(comm, p.peer)) {
        entered = refuse(ncclInvalidArgument);
    }
    if (entered == ncclSuccess && p.bytes > 0) {
        p.mine = (word){.kind = POINT_TO_POINT, .bytes = (int64_t)p.bytes};
        add(group, p);
    }
    return leave(entered);
}

ncclResult_t ncclSend(const void *send, size_t count, ncclDataType_t type, int peer,
                      ncclComm_t comm, cudaStream_t stream)
{
    const piece p = {.at = (char *)send, .bytes = count, .peer = peer, .send = true};
    return send_or_receive(p, type, comm, stream);
}

ncclResult_t ncclRecv(void *recv, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream)
{
    const piece p = {.at = recv, .bytes = count, .peer = peer};
    return send_or_receive(p, type, comm, stream);
}

/* ---- communicators ---- */

ncclResult_t ncclGetVersion(int *version)
{
    const char *text = setting("QSHARD_EMULATOR_NCCL_VERSION");
    *version = text != NULL ? atoi(text) : NCCL_VERSION_CODE;
    return ncclSuccess;
}

ncclResult_t ncclGetUniqueId(ncclUniqueId *id)
{
    static int made;
    const unique_id mine = {.text = ID_TEXT, .maker = world_rank(), .number = made++};
    memset(id, 0, sizeof *id);
    memcpy(id->internal, &mine, sizeof mine);
    return ncclSuccess;
}

/* The ranks of MPI_COMM_WORLD that join, by their rank in the communicator: the maker of the id
 * hears from everybody and tells everybody. */
static void meet_members(const ncclComm_t comm, const unique_id *id, int *members)
{
    int mine[2] = {comm->rank, world_rank()};
    if (mine[1] != id->maker) {
        MPI_Send(mine, 2, MPI_INT, id->maker, JOIN_TAG + id->number, MPI_COMM_WORLD);
        MPI_Recv(members, comm->nranks, MPI_INT, id->maker, JOIN_TAG + id->number, MPI_COMM_WORLD,
                 MPI_STATUS_IGNORE);
        return;
    }
    members[mine[0]] = mine[1];
    for (int i = 1; i < comm->nranks; i++) {
        int other[2];
        MPI_Recv(other, 2, MPI_INT, MPI_ANY_SOURCE, JOIN_TAG + id->number, MPI_COMM_WORLD,
                 MPI_STATUS_IGNORE);
        members[other[0]] = other[1];
    }
    for (int i = 0; i < comm->nranks; i++) {
        if (members[i] != mine[1]) {
            MPI_Send(members, comm->nranks, MPI_INT, members[i], JOIN_TAG + id->number,
                     MPI_COMM_WORLD);
        }
    }
}

/* Some ranks: they wait for each other here. */
static void join_some(ncclComm_t comm, const unique_id *id)
{
    MPI_Group world, joined;
    int *members = allocate((size_t)comm->nranks, sizeof *members);
    meet_members(comm, id, members);
    MPI_Comm_group(MPI_COMM_WORLD, &world);
    MPI_Group_incl(world, comm->nranks, members, &joined);
    MPI_Comm_create_group(MPI_COMM_WORLD, joined, JOIN_TAG + id->number, &comm->mpi);
    MPI_Group_free(&joined);
    MPI_Group_free(&world);
    free(members);
}

static ncclResult_t join(ncclComm_t comm, const unique_id *id)
{
    int initialized = 0, size = 1;
    MPI_Initialized(&initialized);
    if (comm->nranks == 1) {
        return ncclSuccess;
    }
    if (initialized) {
        MPI_Comm_size(MPI_COMM_WORLD, &size);
    }
    if (comm->nranks > size || (comm->nranks == size && comm->rank != world_rank())) {
        return ncclInvalidUsage;
    }
    if (comm->nranks < size) {
        join_some(comm, id);
        return ncclSuccess;
    }
    MPI_Comm_idup(MPI_COMM_WORLD, &comm->mpi, &comm->joining);
    if (comm->blocking) {
        MPI_Wait(&comm->joining, MPI_STATUS_IGNORE);
    }
    return ncclSuccess;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t *out, int nranks, ncclUniqueId id, int rank,
                                    ncclConfig_t *config)
{
    *out = NULL;
    unique_id made;
    memcpy(&made, id.internal, sizeof made);
    if (nranks < 1 || rank < 0 || rank >= nranks || strcmp(made.text, ID_TEXT) != 0) {
        return ncclInvalidArgument;
    }
    if (config != NULL && config->magic != 0xcafebeef) {
        return ncclInvalidArgument;
    }
    const char *fail = setting("QSHARD_EMULATOR_NCCL_FAIL");
    if (fail != NULL && strncmp(fail, "init", 4) == 0) {
        return ncclSystemError;
    }
    ncclComm_t comm = allocate(1, sizeof *comm);
    comm->rank = rank;
    comm->nranks = nranks;
    comm->blocking = config == NULL || config->blocking != 0; /* undefined: 1 */
    comm->mpi = MPI_COMM_NULL;
    comm->joining = MPI_REQUEST_NULL;
    const ncclResult_t joined = join(comm, &made);
    if (joined != ncclSuccess) {
        free(comm);
        return joined;
    }
    *out = comm;
    return comm->blocking ? ncclSuccess : ncclInProgress;
}

ncclResult_t ncclCommInitRank(ncclComm_t *out, int nranks, ncclUniqueId id, int rank)
{
    return ncclCommInitRankConfig(out, nranks, id, rank, NULL);
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *state)
{
    const bool first_look = !comm->was_polled;
    int arrived = 1;
    check_alive(comm);
    comm->was_polled = true;
    *state = comm->failed;
    if (comm->failed != ncclSuccess) {
        return ncclSuccess;
    }
    if (first_look && !comm->blocking) {
        *state = ncclInProgress;
        return ncclSuccess;
    }
    if (comm->joining != MPI_REQUEST_NULL) {
        MPI_Test(&comm->joining, &arrived, MPI_STATUS_IGNORE);
    } else if (comm->current != NULL) {
        arrived = has_arrived(comm->current, false);
    }
    *state = arrived ? ncclSuccess : ncclInProgress;
    return ncclSuccess;
}

/* Sends that no receive was called for. One that is still on its way is not seen. */
static void check_all_received(ncclComm_t comm)
{
    int found = 0;
    MPI_Status status;
    if (comm->mpi == MPI_COMM_NULL || comm->joining != MPI_REQUEST_NULL) {
        return;
    }
    MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, comm->mpi, &found, &status);
    if (found) {
        char what[TEXT_BYTES];
        snprintf(what, sizeof what,
                 "rank %d of a communicator has sent what rank %d never received",
                 status.MPI_SOURCE, comm->rank);
        die(what);
    }
}

ncclResult_t ncclCommFinalize(ncclComm_t comm)
{
    check_alive(comm);
    while (comm->current != NULL) {
        qs_emulator_force(comm->current->stream);
    }
    check_all_received(comm);
    comm->was_polled = false;
    return comm->blocking ? ncclSuccess : ncclInProgress;
}

ncclResult_t ncclCommDestroy(ncclComm_t comm)
{
    if (comm == NULL) {
        return ncclSuccess;
    }
    ncclCommFinalize(comm);
    if (comm->mpi != MPI_COMM_NULL && comm->joining == MPI_REQUEST_NULL) {
        int finalized = 0;
        MPI_Finalized(&finalized);
        if (!finalized) {
            MPI_Comm_free(&comm->mpi);
        }
    }
    comm->destroyed = true;
    comm_free(comm);
    return ncclSuccess;
}

/* No word to MPI, which may be busy in another thread; what is on its way stays where it is, and
 * streams that wait for it go on. */
ncclResult_t ncclCommAbort(ncclComm_t comm)
{
    if (atomic_exchange(&comm->ended, true)) {
        die("ncclCommAbort is called a second time");
    }
    return ncclSuccess;
}

ncclResult_t ncclCommCount(const ncclComm_t comm, int *count)
{
    *count = comm->nranks;
    return ncclSuccess;
}

ncclResult_t ncclCommUserRank(const ncclComm_t comm, int *rank)
{
    *rank = comm->rank;
    return ncclSuccess;
}

const char *ncclGetErrorString(ncclResult_t result)
{
    static const char *const texts[] = {
        "no error",         "unhandled cuda error", "unhandled system error", "internal error",
        "invalid argument", "invalid usage",        "remote process exited",  "in progress"};
    return (unsigned)result < sizeof texts / sizeof *texts ? texts[result] : "unknown result code";
}

const char *ncclGetLastError(ncclComm_t comm)
{
    return comm != NULL && comm->failed != ncclSuccess ? "an emulated failure" : "";
}
