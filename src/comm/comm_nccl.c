/* Collectives of GPU memory over NCCL. The only file that includes nccl.h, of which it uses the
 * types and the queue's native handle (a cudaStream_t) and no call of the CUDA runtime, so that a
 * stand-in for libnccl can drive it without a GPU.
 *
 * Everything travels as ncclUint8, never as a float type: a float on its way through a library that
 * looks at it may change its bits (bitsandbytes#1945). NCCL moves bytes for all types of the same
 * size, so that this costs nothing. No call sums.
 *
 * The communicator is non-blocking (blocking = 0): a call returns at once, a thread of NCCL's does
 * the connecting, and this file polls until the work stands in the stream, with a time limit. In a
 * blocking one a peer that is lost while ranks connect (at the start, and again when a pair first
 * speaks) hangs the call for good; here it ends in QS_ERR_PEER. The price is that thread a call,
 * some 50 us of the host, which runs ahead of the GPU. What is in the stream already is another
 * matter: if a peer is lost then, the kernel spins, and the launcher (mpirun, srun -K) ends the
 * job.
 *
 * NCCL and the host's transport wait for each other's ranks: whoever waits for NCCL lets the host's
 * messages move on meanwhile, since a peer may not come to NCCL before it has got them ("MPI
 * Progress" in NCCL's manual). */
#define _GNU_SOURCE
#include <nccl.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/log.h"
#include "base/timer.h"
#include "comm/comm_impl.h"
#include "comm/comm_nccl.h"
#include "device/device_impl.h"

#if NCCL_VERSION_CODE < 21400
#error "NCCL 2.14 or later is needed: non-blocking communicators"
#endif

static const double DEFAULT_LIMIT_S = 120.0;
static const double FAREWELL_LIMIT_S = 10.0; /* what closing may take; results are safe by then */
static const double SPIN_S = 200e-6;         /* longer than a call whose ranks are connected */
enum { ABORT_LIMIT_S = 5, ABORTS_MAX = QS_DEVICE_WATCHES_MAX + 1 };

typedef struct {
    qs_comm base;
    qs_comm *host;     /* borrowed */
    qs_device *device; /* borrowed: its waits ask us whether a peer is lost; NULL: not yet */
    ncclComm_t nccl;   /* NULL with one rank */
    qs_status broken;  /* the first failure: what every later call returns */
    double limit_s;
    bool batch;        /* calls are taken down until qs_comm_batch_end */
    const char *first; /* under way for the first time, since first_s; NULL: nothing is timed */
    double first_s;
} comm_nccl;

/* ---- errors ---- */

static qs_status status_of(ncclResult_t code, const char *detail)
{
    if (detail != NULL && strstr(detail, "out of memory") != NULL) {
        return QS_ERR_MEMORY;
    }
    switch (code) {
    case ncclSuccess:
    case ncclInProgress: /* a call that was taken; wait_until_ready sees it through */
        return QS_OK;
    case ncclSystemError:
    case ncclRemoteError:
        return QS_ERR_PEER;
    case ncclUnhandledCudaError:
        return QS_ERR_DEVICE;
    case ncclInvalidArgument:
        return QS_ERR_BUG;
    default: /* ncclInvalidUsage (two ranks on one GPU), ncclInternalError, what later ones add */
        return QS_ERR_ENVIRONMENT;
    }
}

static const char *advice(qs_status status)
{
    switch (status) {
    case QS_ERR_PEER:
        return "another rank or the network may have failed: look for the first error of the job; "
               "NCCL_DEBUG=INFO says what NCCL tries, NCCL_SOCKET_IFNAME=... names the interface "
               "that it should use";
    case QS_ERR_DEVICE:
        return "NCCL_DEBUG=INFO says which call of CUDA failed";
    case QS_ERR_MEMORY:
        return "the GPU has no room for NCCL's buffers: lower train.micro_batch or "
               "memory.keep_decoded, or NCCL_MAX_P2P_NCHANNELS=4 (2, 1) makes them smaller";
    default:
        return "NCCL_DEBUG=INFO says more; every rank needs a GPU of its own";
    }
}

/* Turns a code of NCCL's into a status; `call` is the source text, of which the function's name is
 * printed. `nccl` may be NULL. */
static qs_status nccl_status(ncclComm_t nccl, ncclResult_t code, const char *call, int line)
{
    if (status_of(code, NULL) == QS_OK) {
        return QS_OK;
    }
    const char *detail = ncclGetLastError(nccl);
    const qs_status status = status_of(code, detail);
    const bool known = detail != NULL && *detail != '\0';
    return qs_error_set(status, __FILE__, line, "%.*s: %s%s%s%s; %s", (int)strcspn(call, "("), call,
                        ncclGetErrorString(code), known ? " (" : "", known ? detail : "",
                        known ? ")" : "", advice(status));
}

#define QS_NCCL(nccl, call) nccl_status((nccl), (call), #call, __LINE__)

/* Remember a failure: nothing goes through NCCL afterwards, and destroy does not wait. */
static qs_status note(comm_nccl *c, qs_status st)
{
    if (c->broken == QS_OK) {
        c->broken = st;
    }
    return st;
}

/* ---- waiting for NCCL's threads ---- */

static void pause_since(double start_s)
{
    if (qs_time_s() - start_s < SPIN_S) {
        sched_yield();
        return;
    }
    const struct timespec nap = {.tv_nsec = 100000};
    nanosleep(&nap, NULL);
}

/* What this rank has said to its peers through the host may need it to move on. */
static void let_host_go_on(const comm_nccl *c)
{
    if (c->host->ops->progress != NULL) {
        c->host->ops->progress(c->host);
    }
}

/* Poll until the last call is done with connecting and its work stands in the stream. `call` names
 * it in messages. `timed_out` may be NULL. */
static qs_status wait_until_ready(const comm_nccl *c, double limit_s, const char *call,
                                  bool *timed_out)
{
    const double start_s = qs_time_s();
    for (;;) {
        ncclResult_t state = ncclSuccess;
        QS_TRY(QS_NCCL(c->nccl, ncclCommGetAsyncError(c->nccl, &state)));
        if (state != ncclInProgress) {
            return nccl_status(c->nccl, state, call, __LINE__);
        }
        if (qs_time_s() - start_s > limit_s) {
            if (timed_out != NULL) {
                *timed_out = true;
            }
            return QS_FAIL(QS_ERR_PEER,
                           "%s: rank %d of %d has waited %g s for the others "
                           "(QSHARD_NCCL_TIMEOUT); %s",
                           call, c->base.rank, c->base.nranks, limit_s, advice(QS_ERR_PEER));
        }
        let_host_go_on(c);
        pause_since(start_s);
    }
}

static qs_status check(comm_nccl *c)
{
    if (c->broken != QS_OK) {
        return QS_FAIL(c->broken, "NCCL: an earlier call of rank %d has failed", c->base.rank);
    }
    if (c->nccl == NULL) {
        return QS_OK;
    }
    ncclResult_t state = ncclSuccess;
    QS_TRY(note(c, QS_NCCL(c->nccl, ncclCommGetAsyncError(c->nccl, &state))));
    return note(c, nccl_status(c->nccl, state, "NCCL", __LINE__));
}

static qs_status watch(void *ctx);

static void *run_abort(void *nccl)
{
    ncclCommAbort(nccl);
    return NULL;
}

/* End what these have on the GPU, which spins for a peer that is gone: without that the device
 * could not be closed. All at once, for a kernel of one may stand in a stream behind a kernel of
 * another, and ncclCommAbort waits for the kernels of its own. It has been seen to hang by itself
 * too (nccl#863, nccl#992): then the whole job ends here. */
static void abort_together(comm_nccl *const *lost, int count)
{
    pthread_t threads[ABORTS_MAX];
    bool runs[ABORTS_MAX];
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += ABORT_LIMIT_S;
    for (int i = 0; i < count; i++) {
        runs[i] = pthread_create(&threads[i], NULL, run_abort, lost[i]->nccl) == 0;
    }
    for (int i = 0; i < count; i++) {
        if (!runs[i]) {
            run_abort(lost[i]->nccl);
        } else if (pthread_timedjoin_np(threads[i], NULL, &until) != 0) {
            const qs_status st = lost[i]->broken != QS_OK ? lost[i]->broken : QS_ERR_PEER;
            (void)QS_FAIL(st, "NCCL: ncclCommAbort has not returned; %s", advice(QS_ERR_PEER));
            qs_comm_abort(&lost[i]->base, st);
        }
        lost[i]->nccl = NULL;
    }
}

/* After the first failure NCCL's kernels may spin for ever, and whatever frees memory would wait
 * for them: they are ended here, not when the communicator is destroyed, which comes last. Those of
 * the device's other communicators may wait for the same peer and not find out: among the cards of
 * a host there is no connection that breaks. Nothing goes through any of them any more. */
static qs_status give_up_if_failed(comm_nccl *c, qs_status st)
{
    comm_nccl *lost[ABORTS_MAX] = {c};
    int count = 1;
    if (st == QS_OK) {
        return QS_OK;
    }
    for (int i = 0; c->device != NULL && i < QS_DEVICE_WATCHES_MAX; i++) {
        if (c->device->watches[i].watch == watch && c->device->watches[i].ctx != c) {
            lost[count++] = c->device->watches[i].ctx;
        }
    }
    int connected = 0;
    for (int i = 0; i < count; i++) {
        (void)note(lost[i], st);
        if (lost[i]->nccl != NULL) {
            lost[connected++] = lost[i];
        }
    }
    abort_together(lost, connected);
    return st;
}

/* ---- collectives ---- */

static bool is_on_host(const qs_queue *queue)
{
    return qs_device_is_host(qs_queue_device(queue));
}

static cudaStream_t stream_of(const qs_queue *queue)
{
    return (cudaStream_t)qs_queue_native(queue);
}

static qs_status copy_own(qs_queue *queue, void *to, const void *from, size_t bytes)
{
    return bytes > 0 && to != from ? qs_queue_copy(queue, to, from, bytes) : QS_OK;
}

/* Within a batch nothing is asked and nobody gives up: its end does both. */
static qs_status is_free(comm_nccl *c)
{
    return c->batch ? QS_OK : give_up_if_failed(c, check(c));
}

static qs_status judge(comm_nccl *c, qs_status st)
{
    return c->batch ? st : give_up_if_failed(c, st);
}

static qs_status issue_all_gather(comm_nccl *c, const void *send, void *recv, size_t bytes_per_rank,
                                  qs_queue *queue)
{
    QS_TRY(QS_NCCL(
        c->nccl, ncclAllGather(send, recv, bytes_per_rank, ncclUint8, c->nccl, stream_of(queue))));
    return c->batch ? QS_OK : wait_until_ready(c, c->limit_s, "ncclAllGather", NULL);
}

/* A batch is a group of NCCL's: one launch, and one thread that sees to it. */
static qs_status nccl_batch_begin(qs_comm *comm)
{
    comm_nccl *c = (comm_nccl *)comm;
    QS_TRY(give_up_if_failed(c, check(c)));
    if (c->nccl != NULL) {
        QS_TRY(give_up_if_failed(c, QS_NCCL(c->nccl, ncclGroupStart())));
        c->batch = true;
    }
    return QS_OK;
}

/* Also after a failure: a group left open would swallow every later call of this thread. */
static qs_status end_group(const comm_nccl *c, qs_status posted)
{
    const qs_status ended = QS_NCCL(c->nccl, ncclGroupEnd());
    QS_TRY(posted);
    QS_TRY(ended);
    return wait_until_ready(c, c->limit_s, "ncclGroupEnd", NULL);
}

static qs_status nccl_batch_end(qs_comm *comm, qs_status st)
{
    comm_nccl *c = (comm_nccl *)comm;
    if (!c->batch) {
        return st;
    }
    c->batch = false;
    return give_up_if_failed(c, end_group(c, st));
}

/* In place (`send` at its own place in `recv`) is NCCL's own convention too. */
static qs_status nccl_all_gather(qs_comm *comm, const void *send, void *recv, size_t bytes_per_rank,
                                 qs_queue *queue)
{
    comm_nccl *c = (comm_nccl *)comm;
    if (is_on_host(queue)) {
        return c->host->ops->all_gather(c->host, send, recv, bytes_per_rank, queue);
    }
    QS_TRY(is_free(c));
    if (c->nccl == NULL) {
        return copy_own(queue, recv, send, bytes_per_rank);
    }
    if (bytes_per_rank == 0) { /* on all ranks */
        return QS_OK;
    }
    return judge(c, issue_all_gather(c, send, recv, bytes_per_rank, queue));
}

typedef struct {
    const char *send;
    const size_t *send_bytes, *send_at;
    char *recv;
    const size_t *recv_bytes, *recv_at;
} exchange;

/* In ring order, so that not all ranks send to rank 0 first. Sizes match, so that an empty piece is
 * left out on both sides. */
static qs_status post_pieces(const comm_nccl *c, const exchange *x, cudaStream_t stream)
{
    const int me = c->base.rank, n = c->base.nranks;
    for (int d = 1; d < n; d++) {
        const int to = (me + d) % n, from = (me - d + n) % n;
        if (x->recv_bytes[from] > 0) {
            QS_TRY(QS_NCCL(c->nccl, ncclRecv(x->recv + x->recv_at[from], x->recv_bytes[from],
                                             ncclUint8, from, c->nccl, stream)));
        }
        if (x->send_bytes[to] > 0) {
            QS_TRY(QS_NCCL(c->nccl, ncclSend(x->send + x->send_at[to], x->send_bytes[to], ncclUint8,
                                             to, c->nccl, stream)));
        }
    }
    return QS_OK;
}

static qs_status issue_exchange(const comm_nccl *c, const exchange *x, qs_queue *queue)
{
    if (c->batch) {
        return post_pieces(c, x, stream_of(queue));
    }
    QS_TRY(QS_NCCL(c->nccl, ncclGroupStart()));
    return end_group(c, post_pieces(c, x, stream_of(queue)));
}

static qs_status nccl_all_to_all_v(qs_comm *comm, const void *send, const size_t *send_bytes,
                                   const size_t *send_at, void *recv, const size_t *recv_bytes,
                                   const size_t *recv_at, qs_queue *queue)
{
    comm_nccl *c = (comm_nccl *)comm;
    if (is_on_host(queue)) {
        return c->host->ops->all_to_all_v(c->host, send, send_bytes, send_at, recv, recv_bytes,
                                          recv_at, queue);
    }
    QS_TRY(is_free(c));
    const exchange x = {send, send_bytes, send_at, recv, recv_bytes, recv_at};
    const int me = comm->rank;
    if (send_bytes[me] > 0) { /* places of empty pieces need not lie in the buffer */
        QS_TRY(copy_own(queue, x.recv + recv_at[me], x.send + send_at[me], send_bytes[me]));
    }
    return c->nccl != NULL ? judge(c, issue_exchange(c, &x, queue)) : QS_OK;
}

/* ---- what the host says to its peers ---- */

static qs_status nccl_all_gather_now(qs_comm *comm, const void *send, void *recv,
                                     size_t bytes_per_rank)
{
    qs_comm *host = ((comm_nccl *)comm)->host;
    return host->ops->all_gather_now(host, send, recv, bytes_per_rank);
}

static qs_status nccl_bcast(qs_comm *comm, void *data, size_t bytes, int root)
{
    qs_comm *host = ((comm_nccl *)comm)->host;
    return host->ops->bcast(host, data, bytes, root);
}

static qs_status nccl_barrier(qs_comm *comm)
{
    qs_comm *host = ((comm_nccl *)comm)->host;
    return host->ops->barrier(host);
}

/* Nothing is said to NCCL: ncclCommAbort may itself wait for ever, and the process ends anyway. */
static void nccl_abort(qs_comm *comm, qs_status status)
{
    qs_comm *host = ((comm_nccl *)comm)->host;
    host->ops->abort(host, status);
}

/* ---- life ---- */

/* Finalize waits for what is under way, and so for ever where a peer has gone its own way. Where
 * nothing has failed all is done and saved, and the process is about to end: an abort, which may
 * hang and would end the job as failed, is for what has. */
static void close_nccl(comm_nccl *c)
{
    const double limit_s = c->limit_s < FAREWELL_LIMIT_S ? c->limit_s : FAREWELL_LIMIT_S;
    ncclResult_t state = c->broken == QS_OK ? ncclCommFinalize(c->nccl) : ncclInternalError;
    const double start_s = qs_time_s();
    while (state == ncclInProgress && qs_time_s() - start_s < limit_s) {
        pause_since(start_s);
        if (ncclCommGetAsyncError(c->nccl, &state) != ncclSuccess) {
            state = ncclInternalError;
        }
    }
    if (state == ncclSuccess) {
        ncclCommDestroy(c->nccl);
    } else if (c->broken != QS_OK) {
        abort_together(&c, 1);
    }
}

static void nccl_destroy(qs_comm *comm)
{
    comm_nccl *c = (comm_nccl *)comm;
    if (c->device != NULL) {
        qs_device_unwatch(c->device, c);
    }
    if (c->nccl != NULL) {
        close_nccl(c);
    }
    qs_comm_fini(comm);
    free(c);
}

static const qs_comm_ops nccl_ops = {
    .name = "nccl",
    .all_gather = nccl_all_gather,
    .all_to_all_v = nccl_all_to_all_v,
    .batch_begin = nccl_batch_begin,
    .batch_end = nccl_batch_end,
    .all_gather_now = nccl_all_gather_now,
    .bcast = nccl_bcast,
    .barrier = nccl_barrier,
    .abort = nccl_abort,
    .destroy = nccl_destroy,
};

static qs_status read_limit(double *limit_s)
{
    const char *text = getenv("QSHARD_NCCL_TIMEOUT");
    *limit_s = DEFAULT_LIMIT_S;
    if (text == NULL || *text == '\0') {
        return QS_OK;
    }
    char *end = NULL;
    *limit_s = strtod(text, &end);
    if (*end != '\0' || !(*limit_s > 0.0 && *limit_s < 1e9)) {
        return QS_FAIL(QS_ERR_CONFIG_VALUE, "QSHARD_NCCL_TIMEOUT=%s: a number of seconds above 0",
                       text);
    }
    return QS_OK;
}

/* What a rank does by itself; the others are told afterwards. */
static qs_status make(comm_nccl **out, qs_comm *host, const qs_device *device)
{
    *out = NULL;
    if (qs_device_is_host(device)) {
        return QS_FAIL(QS_ERR_BUG, "NCCL is asked to carry the CPU's memory");
    }
    comm_nccl *c = calloc(1, sizeof *c);
    if (c == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "memory: a communicator cannot be allocated");
    }
    qs_status st = qs_comm_init(&c->base, &nccl_ops, host->rank, host->nranks);
    c->host = host;
    c->base.world_rank = host->world_rank;
    c->base.local_rank = host->local_rank;
    c->base.local_nranks = host->local_nranks;
    if (st == QS_OK) {
        memcpy(c->base.hosts, host->hosts, (size_t)host->nranks * sizeof *host->hosts);
        st = read_limit(&c->limit_s);
    }
    if (st != QS_OK) {
        qs_comm_fini(&c->base);
        free(c);
        return st;
    }
    *out = c;
    return QS_OK;
}

static void version_text(int version, char *out, size_t capacity)
{
    (void)snprintf(out, capacity, "NCCL %d.%d.%d", version / 10000, version / 100 % 100,
                   version % 100);
}

void qs_comm_nccl_version(char *out, size_t capacity)
{
    int version = 0;
    if (ncclGetVersion(&version) != ncclSuccess) {
        version = 0;
    }
    version_text(version, out, capacity);
}

/* Of 2.18, 2.26 and 2.27: the thread that sends between hosts logs what failed, and tells nobody.
 */
static void warn_of_silence(const qs_comm *host, int version)
{
    const int minor = version / 100 % 100;
    bool one_host = true;
    char text[32];
    for (int r = 1; r < host->nranks; r++) {
        one_host = one_host && host->hosts[r] == host->hosts[0];
    }
    if (host->rank == 0 && !one_host && version / 10000 == 2 &&
        (minor == 18 || minor == 26 || minor == 27)) {
        version_text(version, text, sizeof text);
        qs_log_warn("%s does not tell when the network between hosts fails: such a job ends after "
                    "train.stall_limit only; NCCL 2.19 to 2.25, and 2.28 or later, do",
                    text);
    }
}

/* Libraries of different versions may connect and then fail, or not: they are not tried. */
static qs_status compare_versions(qs_comm *host)
{
    int version = 0;
    const qs_status st = QS_NCCL(NULL, ncclGetVersion(&version));
    QS_TRY(qs_comm_agree(host, st));
    int64_t highest = version, lowest = -(int64_t)version;
    QS_TRY(qs_comm_max_i64(host, &highest, 1));
    QS_TRY(qs_comm_max_i64(host, &lowest, 1));
    if (highest == -lowest) {
        warn_of_silence(host, version);
        return QS_OK;
    }
    char mine[32], other[32];
    version_text(version, mine, sizeof mine);
    version_text((int)(version == highest ? -lowest : highest), other, sizeof other);
    return qs_comm_agree(host, QS_FAIL(QS_ERR_DISAGREE,
                                       "rank %d has %s and another rank %s: all hosts need the "
                                       "same libnccl.so (LD_LIBRARY_PATH, modules)",
                                       host->rank, mine, other));
}

static qs_status share_id(qs_comm *host, ncclUniqueId *id)
{
    memset(id, 0, sizeof *id);
    const qs_status st = host->rank == 0 ? QS_NCCL(NULL, ncclGetUniqueId(id)) : QS_OK;
    QS_TRY(qs_comm_agree(host, st));
    return qs_comm_bcast(host, id, sizeof *id, 0);
}

/* A rank whose start fails tears its communicator down, so that the others' sockets close and they
 * fail soon too, and then all agree. One that has waited in vain cannot agree: those it has waited
 * for are not there. */
static qs_status start(comm_nccl *c)
{
    ncclUniqueId id;
    /* Else up to 32 for every pair of GPUs, with buffers of their own: GiBs on a host with eight
     * (nccl#1685), for exchanges that hide behind compute. All-gathers have channels of theirs. */
    (void)setenv("NCCL_MAX_P2P_NCHANNELS", "8", 0);
    QS_TRY(compare_versions(c->host));
    QS_TRY(share_id(c->host, &id));
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    bool timed_out = false;
    qs_status st =
        QS_NCCL(NULL, ncclCommInitRankConfig(&c->nccl, c->base.nranks, id, c->base.rank, &config));
    if (st == QS_OK) {
        st = wait_until_ready(c, c->limit_s, "ncclCommInitRankConfig", &timed_out);
    }
    if (timed_out) {
        c->nccl = NULL; /* neither abort nor destroy is sure to return; the process is to end */
        return st;
    }
    return qs_comm_agree(c->host, give_up_if_failed(c, st));
}

/* Asked while the host waits for the GPU. */
static qs_status watch(void *ctx)
{
    comm_nccl *c = ctx;
    let_host_go_on(c);
    qs_status st = check(c);
    if (st == QS_OK && c->first != NULL && qs_time_s() - c->first_s > c->limit_s) {
        st = note(c, QS_FAIL(QS_ERR_PEER,
                             "NCCL has connected %d ranks, but %s has not arrived on rank %d in %g "
                             "s (QSHARD_NCCL_TIMEOUT): most often GPUs that cannot reach each "
                             "other's memory though they say so, and NCCL_P2P_DISABLE=1 helps; or "
                             "a network that is not the right one, for NCCL_SOCKET_IFNAME=... or "
                             "NCCL_IB_HCA=...; docs/troubleshooting.md",
                             c->base.nranks, c->first, c->base.rank, c->limit_s));
    }
    return give_up_if_failed(c, st);
}

qs_status qs_comm_nccl_wait(qs_comm *comm, qs_queue *queue, const char *what)
{
    comm_nccl *c = (comm_nccl *)comm;
    c->first_s = qs_time_s();
    c->first = what;
    const qs_status st = qs_queue_wait(queue);
    c->first = NULL;
    return st;
}

qs_status qs_comm_nccl_create(qs_comm **out, qs_comm *host, qs_device *device)
{
    *out = NULL;
    comm_nccl *c = NULL;
    qs_status st = QS_OK;
    QS_GOTO(qs_comm_agree(host, make(&c, host, device)));
    if (host->nranks > 1) {
        QS_GOTO(start(c));
        c->device = device;
        QS_GOTO(qs_device_watch(device, watch, c));
    }
    *out = &c->base;
    return QS_OK;
done:
    if (c != NULL) {
        c->base.ops->destroy(&c->base);
    }
    return st;
}

qs_status qs_comm_nccl_check(qs_comm *comm)
{
    return comm->ops == &nccl_ops ? check((comm_nccl *)comm) : QS_OK;
}
