/* The public calls: dispatch, byte counts, and what is the same on every transport. */
#include "comm/comm.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/cause.h"
#include "base/cores.h"
#include "base/log.h"
#include "base/minmax.h"
#include "base/proc.h"
#include "base/watch.h"
#include "comm/comm_impl.h"

/* Who speaks first (qs_comm_end_unagreed). */
enum { LAST_TURN = 10, TURN_US = 100000 };

qs_status qs_comm_init(qs_comm *comm, const qs_comm_ops *ops, int rank, int nranks)
{
    *comm = (qs_comm){.ops = ops,
                      .rank = rank,
                      .nranks = nranks,
                      .world_rank = rank,
                      .local_rank = rank,
                      .local_nranks = nranks};
    comm->scratch = calloc((size_t)nranks * QS_COMM_SCRATCH_VALUES, sizeof *comm->scratch);
    comm->hosts = calloc((size_t)nranks, sizeof *comm->hosts);
    if (comm->scratch == NULL || comm->hosts == NULL) {
        qs_comm_fini(comm);
        return QS_FAIL(QS_ERR_MEMORY, "memory: a communicator of %d ranks cannot be allocated",
                       nranks);
    }
    return QS_OK;
}

void qs_comm_fini(qs_comm *comm)
{
    free(comm->scratch);
    free(comm->hosts);
    comm->scratch = NULL;
    comm->hosts = NULL;
}

static int env_int(const char *name)
{
    const char *text = getenv(name);
    return text != NULL ? atoi(text) : 0;
}

/* Slurm says how many tasks a step has. Two traps: a batch script has SLURM_PROCID and
 * SLURM_NTASKS, but is no step; and a shell of `srun --pty` is a step of one task whose PMIx
 * variables every command in it inherits, while only the first of them could start MPI. */
bool qs_comm_launched_by_mpirun(void)
{
    return getenv("OMPI_COMM_WORLD_SIZE") != NULL;
}

int qs_comm_launched(void)
{
    if (qs_comm_launched_by_mpirun() || env_int("PMI_SIZE") > 1) {
        return 1;
    }
    if (getenv("SLURM_STEP_ID") != NULL && getenv("SLURM_STEP_NUM_TASKS") != NULL) {
        return env_int("SLURM_STEP_NUM_TASKS") > 1;
    }
    return getenv("PMIX_RANK") != NULL || getenv("PMI_RANK") != NULL;
}

void qs_comm_destroy(qs_comm *comm)
{
    if (comm != NULL) {
        comm->ops->destroy(comm);
    }
}

qs_status qs_comm_split(qs_comm *comm, int color, qs_comm **out)
{
    *out = NULL;
    if (comm->ops->split == NULL || color < 0) {
        return QS_FAIL(QS_ERR_BUG, "a communicator (%s) is to be split by color %d",
                       comm->ops->name, color);
    }
    return comm->ops->split(comm, color, out);
}

int qs_comm_rank(const qs_comm *comm)
{
    return comm->rank;
}

int qs_comm_nranks(const qs_comm *comm)
{
    return comm->nranks;
}

int qs_comm_local_rank(const qs_comm *comm)
{
    return comm->local_rank;
}

int qs_comm_local_nranks(const qs_comm *comm)
{
    return comm->local_nranks;
}

int qs_comm_host(const qs_comm *comm)
{
    return comm->hosts[comm->rank];
}

/* Several hosts with as many ranks each, several too. */
static bool are_alike(const qs_comm *comm)
{
    const int n = comm->local_nranks;
    bool alike = n > 1 && n < comm->nranks;
    for (int r = 0; r < comm->nranks && alike; r++) {
        int there = 0;
        for (int other = 0; other < comm->nranks; other++) {
            there += comm->hosts[other] == comm->hosts[r];
        }
        alike = there == n;
    }
    return alike;
}

static bool are_neighbours(const qs_comm *comm)
{
    bool neighbours = true;
    for (int r = 0; r < comm->nranks; r++) {
        neighbours = neighbours && comm->hosts[r] == r - r % comm->local_nranks;
    }
    return neighbours;
}

int qs_comm_per_host(const qs_comm *comm)
{
    return are_alike(comm) && are_neighbours(comm) ? comm->local_nranks : 0;
}

bool qs_comm_in_turns(const qs_comm *comm)
{
    return are_alike(comm) && !are_neighbours(comm);
}

const char *qs_comm_name(const qs_comm *comm)
{
    return comm->ops->name;
}

uint64_t qs_comm_received_bytes(const qs_comm *comm)
{
    return comm->received_bytes;
}

uint64_t qs_comm_foreign_bytes(const qs_comm *comm)
{
    return comm->foreign_bytes;
}

qs_comm_traffic qs_comm_get_traffic(const qs_comm *comm, qs_comm_kind kind)
{
    return comm->traffic[kind];
}

static void count(qs_comm *comm, qs_comm_kind kind, int from, size_t bytes)
{
    if (from == comm->rank || bytes == 0) {
        return;
    }
    comm->received_bytes += bytes;
    comm->foreign_bytes += comm->hosts[from] != comm->hosts[comm->rank] ? bytes : 0;
    comm->traffic[kind].messages += kind != QS_COMM_SMALL;
    comm->traffic[kind].bytes += bytes;
}

static void count_gathered(qs_comm *comm, qs_comm_kind kind, size_t bytes_per_rank)
{
    comm->traffic[kind].calls++;
    for (int r = 0; r < comm->nranks; r++) {
        count(comm, kind, r, bytes_per_rank);
    }
}

/* What a call waits for, for the watch; one that is asynchronous may stand still in NCCL. */
static const char ALL[] = "all ranks to answer";

qs_status qs_comm_all_gather(qs_comm *comm, const void *send, void *recv, size_t bytes_per_rank,
                             qs_queue *queue)
{
    count_gathered(comm, QS_COMM_GATHERS, bytes_per_rank);
    qs_status st;
    QS_WHILE_WAITING(ALL, st = comm->ops->all_gather(comm, send, recv, bytes_per_rank, queue));
    return st;
}

qs_status qs_comm_all_to_all_v(qs_comm *comm, const void *send, const size_t *send_bytes,
                               const size_t *send_at, void *recv, const size_t *recv_bytes,
                               const size_t *recv_at, qs_queue *queue)
{
    int me = comm->rank;
    if (send_bytes[me] != recv_bytes[me]) {
        return QS_FAIL(QS_ERR_BUG, "rank %d sends itself %zu bytes and expects %zu", me,
                       send_bytes[me], recv_bytes[me]);
    }
    comm->traffic[QS_COMM_EXCHANGES].calls++;
    for (int r = 0; r < comm->nranks; r++) {
        count(comm, QS_COMM_EXCHANGES, r, recv_bytes[r]);
    }
    qs_status st;
    QS_WHILE_WAITING(ALL, st = comm->ops->all_to_all_v(comm, send, send_bytes, send_at, recv,
                                                       recv_bytes, recv_at, queue));
    return st;
}

qs_status qs_comm_batch_begin(qs_comm *comm)
{
    return comm->ops->batch_begin != NULL ? comm->ops->batch_begin(comm) : QS_OK;
}

qs_status qs_comm_batch_end(qs_comm *comm, qs_status st)
{
    qs_status ended = QS_OK;
    if (comm->ops->batch_end != NULL) {
        QS_WHILE_WAITING(ALL, ended = comm->ops->batch_end(comm, st));
    }
    return st != QS_OK ? st : ended;
}

qs_status qs_comm_all_gather_now(qs_comm *comm, const void *send, void *recv, size_t bytes_per_rank)
{
    count_gathered(comm, QS_COMM_SMALL, bytes_per_rank);
    qs_status st;
    QS_WHILE_WAITING(ALL, st = comm->ops->all_gather_now(comm, send, recv, bytes_per_rank));
    return st;
}

qs_status qs_comm_bcast(qs_comm *comm, void *data, size_t bytes, int root)
{
    comm->traffic[QS_COMM_SMALL].calls++;
    count(comm, QS_COMM_SMALL, root, bytes);
    qs_status st;
    QS_WHILE_WAITING(ALL, st = comm->ops->bcast(comm, data, bytes, root));
    return st;
}

qs_status qs_comm_barrier(qs_comm *comm)
{
    comm->traffic[QS_COMM_SMALL].calls++;
    qs_status st;
    QS_WHILE_WAITING(ALL, st = comm->ops->barrier(comm));
    return st;
}

static int64_t sum(int64_t a, int64_t b)
{
    return a + b;
}

/* Integers: the order of the additions does not matter, so that gathering everything and reducing
 * locally is right, and for the few values of a step cheap. */
static qs_status reduce_i64(qs_comm *comm, int64_t *values, int count,
                            int64_t (*combine)(int64_t, int64_t))
{
    for (int first = 0; first < count; first += QS_COMM_SCRATCH_VALUES) {
        int left = count - first;
        int now = left < QS_COMM_SCRATCH_VALUES ? left : QS_COMM_SCRATCH_VALUES;
        QS_TRY(qs_comm_all_gather_now(comm, values + first, comm->scratch,
                                      (size_t)now * sizeof *values));
        for (int i = 0; i < now; i++) {
            int64_t value = comm->scratch[i];
            for (int r = 1; r < comm->nranks; r++) {
                value = combine(value, comm->scratch[(int64_t)r * now + i]);
            }
            values[first + i] = value;
        }
    }
    return QS_OK;
}

qs_status qs_comm_max_i64(qs_comm *comm, int64_t *values, int count)
{
    return reduce_i64(comm, values, count, qs_max_i64);
}

qs_status qs_comm_sum_i64(qs_comm *comm, int64_t *values, int count)
{
    return reduce_i64(comm, values, count, sum);
}

/* How much a rank's status counts: an error of its own, one that says that a peer is lost (which
 * has failed by itself, most likely), one that another rank has spoken for (negative), a wish to be
 * started again, none. */
static int weight_of(int64_t status)
{
    return status == QS_OK         ? 0
           : status == QS_REQUEUE  ? 1
           : status < QS_OK        ? 2
           : status == QS_ERR_PEER ? 3
                                   : 4;
}

/* The rank whose status, the first of its `width` values, counts most, the lowest of several; -1:
 * all is well. */
static int speaker_among(const int64_t *values, int width, int nranks)
{
    int speaker = -1, most = 0;
    for (int r = 0; r < nranks; r++) {
        const int weight = weight_of(values[(int64_t)r * width]);
        if (weight > most) {
            speaker = r;
            most = weight;
        }
    }
    return speaker;
}

/* This rank's error is said with its rank and host. */
static void name_place(const qs_comm *comm)
{
    char host[QS_WATCH_NAME_MAX] = "", place[QS_WATCH_NAME_MAX + 32];
    if (comm->nranks > 1) {
        qs_host_name(host);
        snprintf(place, sizeof place, "rank %d on %s", comm->world_rank, host);
        qs_error_name_place(place);
    }
}

/* Gather every rank's values into the scratch: its status, and what comes along. A rank that has
 * failed says so by itself if the others do not come (base/cause.h). */
static qs_status gather_statuses(qs_comm *comm, qs_status mine, int64_t *values, int width)
{
    /* an error that another rank speaks for has been agreed on before: it is no reason to choose
     * this rank */
    const bool is_own = mine != QS_OK && !qs_error_is_silent();
    const size_t bytes = (size_t)width * sizeof *values;
    values[0] = is_own ? (int64_t)mine : -(int64_t)mine;
    if (!is_own || comm->nranks == 1) {
        return qs_comm_all_gather_now(comm, values, comm->scratch, bytes);
    }
    name_place(comm);
    qs_cause_wait(mine);
    const qs_status st = qs_comm_all_gather_now(comm, values, comm->scratch, bytes);
    if (!qs_cause_end() && st == QS_OK && comm->world_rank == 0) {
        qs_error_name_place(""); /* as most errors are rank 0's, or all ranks' */
    }
    return st == QS_OK || mine == QS_REQUEUE ? st : mine; /* that came of it, if both failed */
}

/* A rank that has printed its error while it waited for the others has spoken for all, unless it
 * knows of a lost peer alone and another one knows more. */
static qs_status prefer_spoken(qs_comm *comm, qs_status mine, int *speaker, qs_status *agreed)
{
    int64_t status = mine != QS_OK && qs_error_is_printed() ? (int64_t)mine : 0;
    QS_TRY(qs_comm_all_gather_now(comm, &status, comm->scratch, sizeof status));
    const int spoken = speaker_among(comm->scratch, 1, comm->nranks);
    if (spoken >= 0 && weight_of(comm->scratch[spoken]) >= weight_of(*agreed)) {
        *speaker = spoken;
        *agreed = (qs_status)comm->scratch[spoken];
    }
    return QS_OK;
}

/* `values` [width] begins with room for this rank's status; what others say is left in the scratch,
 * if all is well. */
static qs_status agree(qs_comm *comm, qs_status mine, int64_t *values, int width)
{
    QS_TRY(gather_statuses(comm, mine, values, width));
    int speaker = speaker_among(comm->scratch, width, comm->nranks);
    comm->agreed = speaker >= 0;
    if (speaker < 0) {
        return QS_OK;
    }
    qs_status agreed = (qs_status)llabs(comm->scratch[(int64_t)speaker * width]);
    if (agreed != QS_REQUEUE) {
        QS_TRY(prefer_spoken(comm, mine, &speaker, &agreed));
    }
    char text[2048] = "";
    if (speaker == comm->rank) {
        snprintf(text, sizeof text, "%s", qs_error_text());
    }
    QS_TRY(qs_comm_bcast(comm, text, sizeof text, speaker));
    if (speaker != comm->rank) {
        text[sizeof text - 1] = '\0';
        qs_error_adopt(agreed, text, true);
    }
    return agreed;
}

qs_status qs_comm_agree(qs_comm *comm, qs_status mine)
{
    int64_t status;
    return agree(comm, mine, &status, 1);
}

qs_status qs_comm_agree_most(qs_comm *comm, qs_status mine, int64_t *most)
{
    int64_t told[2] = {0, *most};
    QS_TRY(agree(comm, mine, told, 2));
    for (int r = 0; r < comm->nranks; r++) {
        *most = qs_max_i64(*most, comm->scratch[2 * r + 1]);
    }
    return QS_OK;
}

qs_status qs_comm_agree_after(qs_comm *comm, const qs_comm *part, qs_status st)
{
    return st == QS_OK || qs_comm_agreed(part) ? qs_comm_agree(comm, st) : st;
}

bool qs_comm_agreed(const qs_comm *comm)
{
    return comm->agreed;
}

qs_status qs_comm_bcast_text(qs_comm *comm, char **text, int root)
{
    int64_t bytes = -1; /* NULL stays NULL */
    if (comm->rank == root && *text != NULL) {
        bytes = (int64_t)strlen(*text) + 1;
    }
    QS_TRY(qs_comm_bcast(comm, &bytes, sizeof bytes, root));
    if (comm->rank != root) {
        *text = NULL;
    }
    if (bytes < 0) {
        return QS_OK;
    }
    qs_status st = QS_OK;
    if (comm->rank != root) {
        *text = malloc((size_t)bytes);
        if (*text == NULL) {
            st = QS_FAIL(QS_ERR_MEMORY, "memory: %lld bytes of text cannot be allocated",
                         (long long)bytes);
        }
    }
    QS_TRY(qs_comm_agree(comm, st));
    return qs_comm_bcast(comm, *text, (size_t)bytes, root);
}

/* Open MPI binds ranks to a core each where there are one or two, whatever the machine: silently a
 * thread for a run on the CPU, and a core for NCCL's. Not said of a wish for threads. */
static void warn_of_single_cores(const qs_comm *comm, const qs_cores_binding *all, int wanted)
{
    if (!comm->by_mpirun || qs_threads_asked_for(wanted) > 0 || qs_cores_available() > 1) {
        return;
    }
    const qs_cores_use use = qs_cores_count_use(all, comm->nranks);
    if (2 * use.used <= use.all) {
        qs_log_warn("each rank is bound to one core, and this host has %d for the job: mpirun "
                    "--bind-to none lets a rank use %d",
                    use.all, use.all / comm->local_nranks);
    }
}

qs_status qs_comm_threads(qs_comm *comm, int wanted, int *threads)
{
    qs_status st = QS_OK;
    qs_cores_binding mine;
    qs_cores_get_binding(&mine);
    qs_cores_binding *all = calloc((size_t)comm->nranks, sizeof *all);
    if (all == NULL) {
        st =
            QS_FAIL(QS_ERR_MEMORY, "memory: the bindings of %d ranks cannot be kept", comm->nranks);
    }
    QS_GOTO(qs_comm_agree(comm, st));
    QS_GOTO(qs_comm_all_gather_now(comm, &mine, all, sizeof mine));
    int sharers = 0, index = 0;
    for (int r = 0; r < comm->nranks; r++) {
        int competes = qs_cores_overlap(&mine, &all[r]);
        sharers += competes;
        index += r < comm->rank ? competes : 0;
    }
    *threads = qs_threads_for_share(sharers, index, wanted);
    if (sharers == 1) {
        warn_of_single_cores(comm, all, wanted);
        qs_cores_place(*threads);
    }
done:
    free(all);
    return st;
}

/* Where the launcher ends a rank that speaks of a lost peer, another rank has said what happened:
 * by TERM, which a run would catch. */
void qs_comm_end_unagreed(qs_comm *comm, qs_status status)
{
    if (status == QS_OK || status == QS_REQUEUE || qs_comm_agreed(comm)) {
        return;
    }
    const bool is_consequence = status == QS_ERR_PEER;
    const int turn = comm->rank < LAST_TURN ? comm->rank : LAST_TURN;
    if (is_consequence) {
        signal(SIGTERM, SIG_DFL);
    }
    usleep(TURN_US * (useconds_t)(turn + (is_consequence ? LAST_TURN : 0)));
    qs_comm_abort(comm, status);
}

void qs_comm_abort(qs_comm *comm, qs_status status)
{
    if (comm != NULL) {
        name_place(comm);
    }
    qs_error_print(status);
    fflush(stdout);
    if (comm != NULL) {
        comm->ops->abort(comm, status);
    } else {
        _exit(qs_exit_code(status));
    }
}
