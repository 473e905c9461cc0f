/* NCCL over MPI does what NCCL's manual says, for any number of ranks:  mpirun -n 3
 * test_emulator_nccl. Without mpirun: one rank, and no MPI. */
#include <mpi.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "cuda_runtime_api.h"
#include "nccl.h"

enum { BYTES = 1000 };

static int rank, nranks = 1;

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "rank %d, %s:%d: %s\n", rank, __FILE__, __LINE__, #condition);         \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)
#define CUDA(call) CHECK((call) == cudaSuccess)

static unsigned char *device(size_t bytes)
{
    void *out = NULL;
    CUDA(cudaMalloc(&out, bytes));
    return out;
}

static unsigned char byte_of(int r)
{
    return (unsigned char)(r + 1);
}

static cudaStream_t new_stream(void)
{
    cudaStream_t out;
    CUDA(cudaStreamCreateWithFlags(&out, cudaStreamNonBlocking));
    return out;
}

/* Reads without waiting for any stream but its own. */
static unsigned char read_byte(const unsigned char *at)
{
    static cudaStream_t own;
    own = own != NULL ? own : new_stream();
    unsigned char out = 0;
    CUDA(cudaMemcpyAsync(&out, at, 1, cudaMemcpyDeviceToHost, own));
    return out;
}

/* A call of a non-blocking communicator: in progress, then over. */
static void finish(ncclComm_t comm, ncclResult_t taken)
{
    ncclResult_t state = ncclInProgress;
    int polls = 0;
    CHECK(taken == ncclInProgress);
    while (state == ncclInProgress) {
        CHECK(ncclCommGetAsyncError(comm, &state) == ncclSuccess);
        polls++;
    }
    CHECK(state == ncclSuccess && polls > 1);
}

static ncclComm_t join(bool blocking)
{
    ncclUniqueId id, garbage = {{0}};
    ncclComm_t comm;
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    CHECK(ncclGetUniqueId(&id) == ncclSuccess);
    CHECK(ncclCommInitRank(&comm, nranks, garbage, rank) == ncclInvalidArgument);
    CHECK(ncclCommInitRank(&comm, nranks + 1, id, rank) == ncclInvalidUsage);
    if (blocking) {
        CHECK(ncclCommInitRank(&comm, nranks, id, rank) == ncclSuccess);
        return comm;
    }
    config.blocking = 0;
    ncclConfig_t unmade = config;
    unmade.magic = 0;
    CHECK(ncclCommInitRankConfig(&comm, nranks, id, rank, &unmade) == ncclInvalidArgument);
    finish(comm, ncclCommInitRankConfig(&comm, nranks, id, rank, &config));
    return comm;
}

static void all_gather(void)
{
    ncclComm_t comm = join(false);
    cudaStream_t stream = new_stream();
    unsigned char *all = device((size_t)nranks * BYTES), *mine = all + (size_t)rank * BYTES;
    for (int round = 0; round < 3; round++) {
        CUDA(cudaMemsetAsync(mine, byte_of(rank + round), BYTES, stream));
        finish(comm, ncclAllGather(mine, all, BYTES, ncclUint8, comm, stream));
        for (int r = 0; r < nranks; r++) { /* the stream has not got there yet */
            CHECK(r == rank || read_byte(all + (size_t)r * BYTES) == 0xff);
        }
        CUDA(cudaStreamSynchronize(stream));
        for (int r = 0; r < nranks; r++) {
            CHECK(read_byte(all + (size_t)r * BYTES) == byte_of(r + round));
            CHECK(read_byte(all + (size_t)(r + 1) * BYTES - 1) == byte_of(r + round));
        }
    }
    finish(comm, ncclCommFinalize(comm));
    CHECK(ncclCommDestroy(comm) == ncclSuccess);
}

/* What is sent was made by another stream: the call runs that too. */
static void waits_for_what_is_sent(void)
{
    ncclComm_t comm = join(true);
    cudaStream_t compute = new_stream(), stream = new_stream();
    cudaEvent_t event;
    CUDA(cudaEventCreate(&event));
    unsigned char *mine = device(BYTES), *all = device((size_t)nranks * BYTES);
    CUDA(cudaMemsetAsync(mine, byte_of(rank), BYTES, compute));
    CUDA(cudaEventRecord(event, compute));
    CUDA(cudaStreamWaitEvent(stream, event, 0));
    CHECK(ncclAllGather(mine, all, BYTES, ncclUint8, comm, stream) == ncclSuccess);
    CUDA(cudaStreamSynchronize(stream));
    for (int r = 0; r < nranks; r++) {
        CHECK(read_byte(all + (size_t)r * BYTES + 1) == byte_of(r));
    }
    CHECK(ncclCommDestroy(comm) == ncclSuccess);
}

/* A later call on the stream does not make the data of an earlier one arrive, a mark behind it
 * does. */
static void arrives_when_waited_for(void)
{
    ncclComm_t comm = join(false);
    cudaStream_t stream = new_stream();
    cudaEvent_t event;
    CUDA(cudaEventCreate(&event));
    const size_t bytes = (size_t)nranks * BYTES;
    const int other = (rank + 1) % nranks;
    unsigned char *mine = device(BYTES), *first = device(bytes), *second = device(bytes);
    CUDA(cudaMemsetAsync(mine, byte_of(rank), BYTES, stream));
    finish(comm, ncclAllGather(mine, first, BYTES, ncclUint8, comm, stream));
    CUDA(cudaEventRecord(event, stream));
    finish(comm, ncclAllGather(mine, second, BYTES, ncclUint8, comm, stream));
    CHECK(read_byte(first + (size_t)other * BYTES) == 0xff);
    CUDA(cudaEventSynchronize(event));
    CHECK(read_byte(first + (size_t)other * BYTES) == byte_of(other));
    CHECK(read_byte(second + (size_t)other * BYTES) == 0xff);
    /* what has come is sent on: then it has to be there */
    unsigned char *third = device(bytes);
    finish(comm,
           ncclAllGather(second + (size_t)other * BYTES, third, BYTES, ncclUint8, comm, stream));
    CUDA(cudaStreamSynchronize(stream));
    for (int r = 0; r < nranks; r++) {
        CHECK(read_byte(third + (size_t)r * BYTES) == byte_of((r + 1) % nranks));
    }
    finish(comm, ncclCommFinalize(comm));
    CHECK(ncclCommDestroy(comm) == ncclSuccess);
}

static size_t size_of(int from, int to)
{
    return (size_t)(10 * from + to + 1);
}

static void exchange(void)
{
    ncclComm_t comm = join(false);
    cudaStream_t stream = new_stream();
    unsigned char *out = device((size_t)nranks * BYTES), *in = device((size_t)nranks * BYTES);
    for (int r = 0; r < nranks; r++) {
        CUDA(cudaMemsetAsync(out + (size_t)r * BYTES, byte_of(10 * rank + r), BYTES, stream));
    }
    CHECK(ncclGroupStart() == ncclSuccess);
    for (int r = 0; r < nranks; r++) { /* itself included */
        const size_t at = (size_t)r * BYTES;
        CHECK(ncclSend(out + at, size_of(rank, r), ncclUint8, r, comm, stream) == ncclSuccess);
        CHECK(ncclRecv(in + at, size_of(r, rank), ncclUint8, r, comm, stream) == ncclSuccess);
    }
    finish(comm, ncclGroupEnd());
    CUDA(cudaStreamSynchronize(stream));
    for (int r = 0; r < nranks; r++) {
        const size_t at = (size_t)r * BYTES;
        CHECK(read_byte(in + at) == byte_of(10 * r + rank));
        CHECK(read_byte(in + at + size_of(r, rank) - 1) == byte_of(10 * r + rank));
        CHECK(read_byte(in + at + size_of(r, rank)) == 0xff);
    }
    finish(comm, ncclCommFinalize(comm));
    CHECK(ncclCommDestroy(comm) == ncclSuccess);
}

static void broadcast(void)
{
    ncclComm_t comm = join(false);
    cudaStream_t stream = new_stream();
    unsigned char *data = device(BYTES);
    const int root = nranks - 1;
    CUDA(cudaMemsetAsync(data, byte_of(rank), BYTES, stream));
    finish(comm, ncclBroadcast(data, data, BYTES, ncclUint8, root, comm, stream));
    CUDA(cudaStreamSynchronize(stream));
    CHECK(read_byte(data + 5) == byte_of(root));
    finish(comm, ncclCommFinalize(comm));
    CHECK(ncclCommDestroy(comm) == ncclSuccess);
}

static void misuse(void)
{
    ncclComm_t comm = join(false);
    cudaStream_t stream = new_stream();
    unsigned char *data = device((size_t)nranks * BYTES);
    CUDA(cudaMemsetAsync(data, 0, BYTES, stream));
    CHECK(ncclGroupEnd() == ncclInvalidUsage);
    CHECK(ncclAllGather(data, data, 1, ncclFloat32, comm, stream) == ncclInvalidArgument);
    CHECK(ncclSend(data, 1, ncclUint8, nranks, comm, stream) == ncclInvalidArgument);
    CHECK(ncclAllGather(data, data, 8, ncclUint8, comm, stream) == ncclInProgress);
    CHECK(ncclAllGather(data, data, 8, ncclUint8, comm, stream) == ncclInvalidArgument);
    finish(comm, ncclInProgress);
    CHECK(ncclGroupStart() == ncclSuccess);
    CHECK(ncclSend(data, 1, ncclUint8, nranks, comm, stream) == ncclInvalidArgument);
    CHECK(ncclGroupEnd() == ncclInvalidArgument);
    finish(comm, ncclCommFinalize(comm));
    CHECK(ncclCommDestroy(comm) == ncclSuccess);
    CUDA(cudaDeviceSynchronize()); /* what a stream still has may come after the communicator */
}

static void failures(void)
{
    cudaStream_t stream = new_stream();
    unsigned char *data = device((size_t)nranks * BYTES);
    ncclComm_t comm = join(false);
    ncclResult_t state;
    CUDA(cudaMemset(data, 0, (size_t)nranks * BYTES));
    CHECK(ncclAllGather(data, data, 8, ncclUint8, comm, stream) == ncclInProgress);
    finish(comm, ncclInProgress);
    const ncclResult_t second = ncclAllGather(data, data, 8, ncclUint8, comm, stream);
    const bool later = strncmp(getenv("QSHARD_EMULATOR_NCCL_FAIL"), "async", 5) == 0;
    CHECK(second == (later ? ncclInProgress : ncclRemoteError));
    CHECK(ncclCommGetAsyncError(comm, &state) == ncclSuccess && state == ncclRemoteError);
    CHECK(ncclAllGather(data, data, 8, ncclUint8, comm, stream) == ncclRemoteError);
    CHECK(strlen(ncclGetLastError(comm)) > 0);
    CHECK(ncclCommAbort(comm) == ncclSuccess);
}

static void leave(int number)
{
    (void)number;
    _exit(1);
}

/* Two communicators in two streams: in order if one stream waits for the other, or the host does;
 * `apart`: neither, which ends the program. */
static void two_communicators(bool apart)
{
    ncclComm_t one = join(false), two = join(false);
    cudaStream_t stream = new_stream(), other = new_stream();
    cudaEvent_t event;
    CUDA(cudaEventCreate(&event));
    unsigned char *data = device((size_t)nranks * BYTES), *more = device((size_t)nranks * BYTES);
    CUDA(cudaMemset(data, 0, (size_t)nranks * BYTES));
    CUDA(cudaMemset(more, 0, (size_t)nranks * BYTES));
    finish(one, ncclAllGather(data, data, BYTES, ncclUint8, one, stream));
    finish(two, ncclAllGather(more, more, BYTES, ncclUint8, two, stream)); /* the same stream */
    CUDA(cudaEventRecord(event, stream));
    CUDA(cudaStreamWaitEvent(other, event, 0));
    finish(two, ncclAllGather(more, more, BYTES, ncclUint8, two, other));
    CUDA(cudaStreamSynchronize(other));
    finish(one, ncclAllGather(data, data, BYTES, ncclUint8, one, stream));
    finish(one,
           ncclAllGather(data, data, BYTES, ncclUint8, one, other)); /* the same communicator */
    if (apart) {
        signal(SIGABRT, leave); /* what was said is looked at, not how the program ended */
        (void)ncclAllGather(more, more, BYTES, ncclUint8, two, stream);
    }
    CUDA(cudaDeviceSynchronize());
    finish(one, ncclCommFinalize(one));
    finish(two, ncclCommFinalize(two));
    CHECK(ncclCommDestroy(one) == ncclSuccess && ncclCommDestroy(two) == ncclSuccess);
}

/* ---- what ends the program, on two ranks ---- */

static ncclComm_t one;
static cudaStream_t stream;
static unsigned char *data, *more;

/* Rank 1 does what it should not; whoever finds out ends the program. */
static void another_kind(void)
{
    if (rank == 1) {
        finish(one, ncclBroadcast(data, more, BYTES, ncclUint8, 0, one, stream));
    } else {
        finish(one, ncclAllGather(data, more, BYTES, ncclUint8, one, stream));
    }
}

static void another_size(void)
{
    const size_t bytes = rank == 1 ? 2 * BYTES : BYTES; /* the bytes of rank 0 would fit */
    finish(one, ncclAllGather(data, more, bytes, ncclUint8, one, stream));
}

static void another_root(void)
{
    finish(one, ncclBroadcast(data, more, BYTES, ncclUint8, rank, one, stream));
}

static ncclResult_t swap(void)
{
    CHECK(ncclGroupStart() == ncclSuccess);
    CHECK(ncclSend(data, BYTES, ncclUint8, 1 - rank, one, stream) == ncclSuccess);
    CHECK(ncclRecv(more, BYTES, ncclUint8, 1 - rank, one, stream) == ncclSuccess);
    return ncclGroupEnd();
}

static void another_order(void)
{
    if (rank == 1) {
        finish(one, swap());
    }
    finish(one, ncclAllGather(data, more, BYTES, ncclUint8, one, stream));
    if (rank == 0) {
        finish(one, swap());
    }
}

static void never_received(void)
{
    if (rank == 1) {
        finish(one, ncclSend(data, BYTES, ncclUint8, 0, one, stream));
    }
    MPI_Barrier(MPI_COMM_WORLD);
    finish(one, ncclCommFinalize(one));
    MPI_Barrier(MPI_COMM_WORLD);
}

static void used_after_its_end(void)
{
    CHECK(ncclCommAbort(one) == ncclSuccess);
    (void)ncclAllGather(data, more, BYTES, ncclUint8, one, stream);
}

static void *call(void *unused)
{
    (void)unused;
    (void)ncclAllGather(data, more, BYTES, ncclUint8, one, stream);
    return NULL;
}

static void two_threads(void)
{
    pthread_t thread;
    CHECK(ncclGroupStart() == ncclSuccess);
    CHECK(pthread_create(&thread, NULL, call, NULL) == 0);
    pthread_join(thread, NULL);
}

/* Kernels of a communicator that is aborted end: what waits for the stream goes on. */
static void ended_by_abort(void)
{
    if (rank == 1) {
        CHECK(ncclAllGather(data, more, BYTES, ncclUint8, one, stream) == ncclInProgress);
        CHECK(ncclCommAbort(one) == ncclSuccess);
        CUDA(cudaStreamSynchronize(stream));
        printf("the stream of an aborted communicator goes on\n");
    }
}

static const struct {
    const char *name;
    void (*run)(void);
} wrong[] = {
    {"another_kind", another_kind},     {"another_size", another_size},
    {"another_root", another_root},     {"another_order", another_order},
    {"never_received", never_received}, {"used_after_its_end", used_after_its_end},
    {"two_threads", two_threads},       {"ended_by_abort", ended_by_abort},
};

static void go_wrong(const char *name)
{
    signal(SIGABRT, leave);
    one = join(false);
    stream = new_stream();
    data = device((size_t)nranks * 2 * BYTES);
    more = device((size_t)nranks * 2 * BYTES);
    CUDA(cudaMemset(data, 0, (size_t)nranks * 2 * BYTES));
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        if (strcmp(wrong[i].name, name) == 0) {
            wrong[i].run();
        }
    }
    fflush(stdout);
    _exit(0);
}

int main(int argc, char **argv)
{
    if (getenv("OMPI_COMM_WORLD_SIZE") != NULL) {
        MPI_Init(&argc, &argv);
        MPI_Comm_rank(MPI_COMM_WORLD, &rank);
        MPI_Comm_size(MPI_COMM_WORLD, &nranks);
    }
    if (getenv("QSHARD_EMULATOR_NCCL_FAIL") != NULL) {
        failures();
    } else if (argc > 1 && strcmp(argv[1], "apart") == 0) {
        two_communicators(true);
    } else if (argc > 1) {
        go_wrong(argv[1]);
    } else {
        all_gather();
        waits_for_what_is_sent();
        arrives_when_waited_for();
        exchange();
        broadcast();
        misuse();
        two_communicators(false);
    }
    if (nranks > 1) {
        MPI_Barrier(MPI_COMM_WORLD);
        MPI_Finalize();
    }
    return 0;
}
