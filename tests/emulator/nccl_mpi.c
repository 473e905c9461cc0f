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
 *   QSHARD_EMULATOR_NCCL_FAIL
 *     n         the n-th exchange returns ncclRemoteError
 *     async:n   it seems to begin, then ncclCommGetAsyncError says so
 *     wrong:n   what it brings is spoiled
 *     init      the communicator cannot be made
 *   QSHARD_EMULATOR_NCCL_VERSION
 *     22809     what ncclGetVersion says
 *
 * With @r behind the value, on rank r alone.
 */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "emulator_c.h"
#include "nccl_exchange.h"

enum { JOIN_TAG = 100 };
#define ID_TEXT "qshard emulator"

/** What ncclUniqueId holds. */
typedef struct {
    char text[16];
    int maker, number; /* rank in MPI_COMM_WORLD, and how many it had made before */
} unique_id;

/* A thread is between the start and the end of a group, or in a call. */
static atomic_bool busy;

/* A group of calls of this thread. */
static _Thread_local int group_depth;
static _Thread_local exchange *group;
static _Thread_local ncclResult_t group_failed;

static void check_alive(ncclComm_t comm)
{
    if (comm->ended) {
        nm_die("a communicator of NCCL is used after ncclCommAbort");
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
static ncclResult_t injected(exchange *x)
{
    static long calls;
    const char *text = setting("QSHARD_EMULATOR_NCCL_FAIL");
    calls++;
    if (text == NULL) {
        return ncclSuccess;
    }
    const bool later = strncmp(text, "async:", 6) == 0, wrong = strncmp(text, "wrong:", 6) == 0;
    if (atol(later || wrong ? text + 6 : text) != calls) {
        return ncclSuccess;
    }
    x->spoiled = wrong;
    if (wrong) {
        return ncclSuccess;
    }
    x->comm->failed = ncclRemoteError;
    return later ? ncclInProgress : ncclRemoteError;
}

/* ---- groups ---- */

ncclResult_t ncclGroupStart(void)
{
    if (group_depth == 0 && atomic_exchange(&busy, true)) {
        nm_die("two threads call NCCL at the same time");
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
        result = injected(x);
    }
    if (x != NULL && result == ncclSuccess) {
        result = nm_run(x);
    } else if (x != NULL) {
        nm_free(x);
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
        group = nm_allocate(1, sizeof *group);
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
        nm_add(group,
               (piece){.at = (char *)send, .bytes = count, .peer = r, .send = true, .mine = w});
        nm_add(group, (piece){.at = to, .bytes = count, .peer = r, .mine = w});
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
        nm_add(group,
               (piece){.at = (char *)send, .bytes = out, .peer = r, .send = true, .mine = w});
        nm_add(group, (piece){.at = recv, .bytes = in, .peer = r, .mine = w});
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
        nm_add(group, p);
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
    int *members = nm_allocate((size_t)comm->nranks, sizeof *members);
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
    ncclComm_t comm = nm_allocate(1, sizeof *comm);
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
        arrived = nm_has_arrived(comm->current, false);
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
        nm_die(what);
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
    nm_comm_free(comm);
    return ncclSuccess;
}

/* No word to MPI, which may be busy in another thread; what is on its way stays where it is, and
 * streams that wait for it go on. */
ncclResult_t ncclCommAbort(ncclComm_t comm)
{
    if (atomic_exchange(&comm->ended, true)) {
        nm_die("ncclCommAbort is called a second time");
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
