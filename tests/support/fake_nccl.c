#include "fake_nccl.h"

#include <criterion/criterion.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- libnccl ---- */

_Thread_local fake_nccl fake;

static void record(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void record(const char *format, ...)
{
    const size_t end = strlen(fake.calls);
    va_list args;
    va_start(args, format);
    vsnprintf(fake.calls + end, sizeof fake.calls - end, format, args);
    va_end(args);
}

void fake_forget(void)
{
    fake.calls[0] = '\0';
}

static ncclResult_t outcome(const char *call)
{
    if (fake.failing != NULL && strcmp(fake.failing, call) == 0) {
        return fake.code;
    }
    return ncclSuccess;
}

/* A call of a non-blocking communicator: taken now, done some polls later. */
static ncclResult_t take(const char *call)
{
    const ncclResult_t code = outcome(call);
    if (code != ncclSuccess || fake.depth > 0) {
        return code;
    }
    fake.comm.polls_left = fake.polls;
    fake.comm.state = fake.polls != 0 ? ncclInProgress : fake.async;
    return fake.comm.state == ncclInProgress ? ncclInProgress : ncclSuccess;
}

ncclResult_t ncclGetVersion(int *version)
{
    *version = fake.version != 0 ? fake.version : 22809;
    return outcome("GetVersion");
}

ncclResult_t ncclGetUniqueId(ncclUniqueId *id)
{
    memset(id, 7, sizeof *id);
    record("id ");
    return outcome("GetUniqueId");
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t *comm, int nranks, ncclUniqueId id, int rank,
                                    ncclConfig_t *config)
{
    record("init(%d/%d,%s,%s) ", rank, nranks, id.internal[5] == 7 ? "id" : "no id",
           config->blocking == 0 ? "nonblocking" : "blocking");
    if (outcome("Init") != ncclSuccess) {
        *comm = NULL;
        return fake.code;
    }
    *comm = &fake.comm;
    return take("Init");
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *state)
{
    if (comm->polls_left > 0 && --comm->polls_left == 0) {
        comm->state = fake.async;
    }
    *state = comm->state;
    return outcome("GetAsyncError");
}

ncclResult_t ncclCommFinalize(ncclComm_t comm)
{
    (void)comm;
    record("finalize ");
    return take("Finalize");
}

ncclResult_t ncclCommDestroy(ncclComm_t comm)
{
    (void)comm;
    record("destroy ");
    return ncclSuccess;
}

atomic_int fake_aborts;
volatile bool fake_abort_hangs;
int fake_aborts_awaited;

ncclResult_t ncclCommAbort(ncclComm_t comm)
{
    (void)comm;
    fake_aborts++;
    while (fake_abort_hangs || fake_aborts < fake_aborts_awaited) {
        usleep(1000);
    }
    return ncclSuccess;
}

ncclResult_t ncclGroupStart(void)
{
    const ncclResult_t code = outcome("GroupStart");
    fake.depth += code == ncclSuccess ? 1 : 0;
    record("( ");
    return code;
}

ncclResult_t ncclGroupEnd(void)
{
    fake.depth--;
    record(") ");
    return take("GroupEnd");
}

void *fake_stream;

ncclResult_t ncclAllGather(const void *send, void *recv, size_t count, ncclDataType_t type,
                           ncclComm_t comm, cudaStream_t stream)
{
    (void)comm;
    const long at = (long)((const char *)send - (char *)recv);
    record("gather(%zu,%s,%s,at %ld) ", count, type == ncclUint8 ? "u8" : "other",
           (void *)stream == fake_stream ? "stream" : "other stream", labs(at) < 100000 ? at : -1);
    return take("AllGather");
}

ncclResult_t ncclSend(const void *send, size_t count, ncclDataType_t type, int peer,
                      ncclComm_t comm, cudaStream_t stream)
{
    (void)comm;
    record("send(%zu,%s,%s,%d,%d) ", count, type == ncclUint8 ? "u8" : "other",
           (void *)stream == fake_stream ? "stream" : "other stream", peer, *(const char *)send);
    return take("Send");
}

ncclResult_t ncclRecv(void *recv, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream)
{
    (void)comm, (void)recv, (void)stream;
    record("recv(%zu,%s,%d) ", count, type == ncclUint8 ? "u8" : "other", peer);
    return take("Recv");
}

const char *ncclGetErrorString(ncclResult_t code)
{
    return code == ncclRemoteError ? "remote process exited" : "some error";
}

const char *ncclGetLastError(ncclComm_t comm)
{
    (void)comm;
    return fake.detail != NULL ? fake.detail : "socket closed";
}

/* ---- a device and its queue ---- */

void *fake_native(const qs_queue *queue)
{
    return (void *)(uintptr_t) & ((const fake_queue *)queue)->native;
}

static qs_status copy(qs_queue *queue, void *to, const void *from, size_t bytes)
{
    (void)queue;
    record("copy(%zu) ", bytes);
    memmove(to, from, bytes);
    return QS_OK;
}

bool fake_stuck;

static qs_status wait_for_queue(qs_queue *queue)
{
    for (int i = 0; fake_stuck; i = (i + 1) % QS_DEVICE_WATCHES_MAX) {
        const qs_device *device = queue->device;
        if (device->watches[i].watch != NULL) {
            QS_TRY(device->watches[i].watch(device->watches[i].ctx));
        }
    }
    return QS_OK;
}

static const qs_device_ops device_ops = {
    .name = "fake", .queue_native = fake_native, .copy = copy, .wait = wait_for_queue};
qs_device fake_device = {.ops = &device_ops};

fake_queue fake_queue_make(void)
{
    return (fake_queue){.base = {.ops = &device_ops, .device = &fake_device}};
}

/* ---- a host communicator whose other ranks do as this one does ---- */

static qs_status mirror_gather_now(qs_comm *comm, const void *send, void *recv, size_t bytes)
{
    for (int r = 0; r < comm->nranks; r++) {
        memmove((char *)recv + (size_t)r * bytes, send, bytes);
    }
    return QS_OK;
}

static qs_status mirror_gather(qs_comm *comm, const void *send, void *recv, size_t bytes,
                               qs_queue *queue)
{
    (void)queue;
    record("host-gather(%zu) ", bytes);
    return mirror_gather_now(comm, send, recv, bytes);
}

static qs_status mirror_exchange(qs_comm *comm, const void *send, const size_t *send_bytes,
                                 const size_t *send_at, void *recv, const size_t *recv_bytes,
                                 const size_t *recv_at, qs_queue *queue)
{
    (void)comm, (void)send, (void)send_at, (void)recv, (void)recv_at, (void)queue;
    record("host-exchange(%zu,%zu) ", send_bytes[0], recv_bytes[1]);
    return QS_OK;
}

static qs_status mirror_bcast(qs_comm *comm, void *data, size_t bytes, int root)
{
    (void)comm, (void)root;
    if (bytes == sizeof(ncclUniqueId)) { /* as if rank 0 had sent it */
        memset(data, 7, bytes);
    }
    return QS_OK;
}

static qs_status mirror_barrier(qs_comm *comm)
{
    (void)comm;
    record("host-barrier ");
    return QS_OK;
}

int fake_moves;

static void mirror_progress(qs_comm *comm)
{
    (void)comm;
    fake_moves++;
}

static void mirror_abort(qs_comm *comm, qs_status status)
{
    (void)comm;
    _exit(qs_exit_code(status));
}

static const qs_comm_ops mirror_ops = {
    .name = "mirror",
    .all_gather = mirror_gather,
    .all_to_all_v = mirror_exchange,
    .all_gather_now = mirror_gather_now,
    .bcast = mirror_bcast,
    .barrier = mirror_barrier,
    .progress = mirror_progress,
    .abort = mirror_abort,
};

qs_comm fake_host(int rank, int nranks)
{
    qs_comm host;
    cr_assert_eq(qs_comm_init(&host, &mirror_ops, rank, nranks), QS_OK);
    host.local_rank = rank % 2;
    host.local_nranks = 2;
    return host;
}
