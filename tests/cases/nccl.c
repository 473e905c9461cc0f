/* case_nccl NAME [PLUGIN]: a check of the NCCL communicator with device memory, all of them
 * ("all"), the checks of comm_checks.c on queues of the CPU ("host"), or one of the failures below,
 * on the ranks of mpirun (or alone, where nobody launched it). PLUGIN is "emulated" (the plugin's
 * code on the CPU, NCCL over MPI) unless given. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/plugin.h"
#include "comm/comm.h"
#include "comm_checks.h"

enum { MAX_RANKS = 16, GUARD = 0xa5 };

typedef struct {
    qs_comm *comm;
    qs_device *device;
    int rank, nranks;
} place;

/* Byte i of what rank `from` sends to rank `to` in operation `op`. */
static unsigned char pattern(int from, int to, int op, size_t i)
{
    return (unsigned char)(17 * from + 59 * to + 101 * op + 7 * (int)(i % 4099) + 1);
}

static unsigned char *host_bytes(size_t bytes)
{
    unsigned char *out = malloc(bytes + 1);
    if (out == NULL) {
        abort();
    }
    memset(out, GUARD, bytes + 1);
    return out;
}

static qs_status put(qs_queue *queue, unsigned char *device, size_t bytes, int from, int to, int op)
{
    unsigned char *host = host_bytes(bytes);
    for (size_t i = 0; i < bytes; i++) {
        host[i] = pattern(from, to, op, i);
    }
    qs_status st = bytes > 0 ? qs_queue_copy(queue, device, host, bytes) : QS_OK;
    free(host); /* pageable: ours again */
    return st;
}

static qs_status expect(const unsigned char *data, size_t bytes, int from, int to, int op)
{
    for (size_t i = 0; i < bytes; i++) {
        if (data[i] != pattern(from, to, op, i)) {
            return QS_FAIL(QS_ERR_BUG, "op %d: byte %zu of %zu from rank %d to %d is %d, not %d",
                           op, i, bytes, from, to, data[i], pattern(from, to, op, i));
        }
    }
    return QS_OK;
}

/* Device memory with GUARD in every byte and one more behind. */
static qs_status guarded(const place *p, qs_queue *queue, unsigned char **out, size_t bytes)
{
    unsigned char *host = host_bytes(bytes);
    qs_status st = qs_device_alloc(p->device, (void **)out, bytes + 1, QS_MEM_WORK);
    st = st == QS_OK ? qs_queue_copy(queue, *out, host, bytes + 1) : st;
    free(host);
    return st;
}

/* ---- all-gather ---- */

typedef struct {
    unsigned char *send, *recv;
    size_t bytes;
    int op;
    bool in_place;
} gather;

static qs_status gather_start(const place *p, qs_queue *queue, gather *g)
{
    const size_t total = g->bytes * (size_t)p->nranks;
    QS_TRY(guarded(p, queue, &g->recv, total));
    g->send = g->recv + g->bytes * (size_t)p->rank;
    if (!g->in_place) {
        QS_TRY(guarded(p, queue, &g->send, g->bytes));
    }
    QS_TRY(put(queue, g->send, g->bytes, p->rank, 0, g->op));
    /* nobody waits: what was copied above must be there, and below too */
    return qs_comm_all_gather(p->comm, g->send, g->recv, g->bytes, queue);
}

static qs_status gather_verify(const place *p, qs_queue *queue, gather *g)
{
    const size_t total = g->bytes * (size_t)p->nranks;
    unsigned char *all = host_bytes(total);
    QS_TRY(qs_queue_copy(queue, all, g->recv, total + 1));
    QS_TRY(qs_queue_wait(queue));
    for (int r = 0; r < p->nranks; r++) {
        QS_TRY(expect(all + (size_t)r * g->bytes, g->bytes, r, 0, g->op));
    }
    const bool intact = all[total] == GUARD;
    free(all);
    if (!g->in_place) {
        qs_device_free(p->device, g->send);
    }
    qs_device_free(p->device, g->recv);
    return intact ? QS_OK : QS_FAIL(QS_ERR_BUG, "op %d writes past its end", g->op);
}

static qs_status all_gather(const place *p)
{
    static const size_t sizes[] = {0, 1, 7, 4096, 100003, 3 << 20};
    qs_queue *queue = NULL;
    QS_TRY(qs_queue_create_on(p->device, &queue, 1));
    for (int i = 0; i < 12; i++) {
        gather g = {.bytes = sizes[i / 2], .op = i, .in_place = i % 2 == 1};
        QS_TRY(gather_start(p, queue, &g));
        QS_TRY(gather_verify(p, queue, &g));
    }
    qs_queue_destroy(queue);
    return QS_OK;
}

/* Several under way on two queues, with calls of the host and its queues in between. */
static qs_status several_under_way(const place *p)
{
    enum { N = 6 };
    static const size_t sizes[N] = {70000, 0, 5, 1 << 20, 300, 64};
    gather g[N];
    qs_queue *queues[2], *cpu = NULL;
    unsigned char mine = (unsigned char)p->rank, all[MAX_RANKS] = {0};
    QS_TRY(qs_queue_create_on(p->device, &queues[0], 1));
    QS_TRY(qs_queue_create_on(p->device, &queues[1], 1));
    QS_TRY(qs_queue_create(&cpu, 1));
    for (int i = 0; i < N; i++) {
        g[i] = (gather){.bytes = sizes[i], .op = i, .in_place = i % 3 == 0};
        QS_TRY(gather_start(p, queues[i % 2], &g[i]));
        QS_TRY(qs_comm_all_gather(p->comm, &mine, all, 1, cpu));
        QS_TRY(qs_comm_barrier(p->comm));
    }
    QS_TRY(qs_queue_wait(cpu));
    for (int i = N - 1; i >= 0; i--) {
        QS_TRY(gather_verify(p, queues[i % 2], &g[i]));
    }
    for (int r = 0; r < p->nranks; r++) {
        if (all[r] != r) {
            return QS_FAIL(QS_ERR_BUG, "the CPU's queue brought %d of rank %d", all[r], r);
        }
    }
    qs_queue_destroy(queues[0]);
    qs_queue_destroy(queues[1]);
    qs_queue_destroy(cpu);
    return QS_OK;
}

/* As the training step does: gather on one queue, use on another behind an event. */
static qs_status events_order_queues(const place *p)
{
    qs_queue *transfer = NULL, *compute = NULL;
    QS_TRY(qs_queue_create_on(p->device, &transfer, 1));
    QS_TRY(qs_queue_create_on(p->device, &compute, 1));
    gather g = {.bytes = 50001, .op = 3, .in_place = true};
    QS_TRY(gather_start(p, transfer, &g));
    QS_TRY(qs_queue_after(compute, qs_event_record(transfer)));
    QS_TRY(gather_verify(p, compute, &g));
    QS_TRY(qs_queue_wait(transfer));
    qs_queue_destroy(transfer);
    qs_queue_destroy(compute);
    return QS_OK;
}

/* ---- all-to-all ---- */

/* Ragged, with empty pieces, not symmetric; in operation 3 nothing but the own piece. */
static size_t piece_size(int from, int to, int op)
{
    if (op == 3) {
        return from == to ? 100 : 0;
    }
    return (size_t)((3 * from + 5 * to + op) % 4) * (size_t)(op == 2 ? 50000 : 13);
}

typedef struct {
    size_t send_bytes[MAX_RANKS], send_at[MAX_RANKS], recv_bytes[MAX_RANKS], recv_at[MAX_RANKS];
    size_t send_total, recv_total;
} pieces;

static pieces plan(const place *p, int op)
{
    pieces x = {.send_total = 0};
    for (int r = 0; r < p->nranks; r++) {
        x.send_bytes[r] = piece_size(p->rank, r, op);
        x.recv_bytes[r] = piece_size(r, p->rank, op);
        x.send_at[r] = x.send_total;
        x.send_total += x.send_bytes[r];
    }
    for (int r = p->nranks - 1; r >= 0; r--) { /* in another order, with gaps of 3 */
        x.recv_at[r] = x.recv_total;
        x.recv_total += x.recv_bytes[r] + 3;
    }
    return x;
}

static qs_status one_exchange(const place *p, qs_queue *queue, int op)
{
    const pieces x = plan(p, op);
    unsigned char *send = NULL, *recv = NULL;
    QS_TRY(guarded(p, queue, &send, x.send_total));
    QS_TRY(guarded(p, queue, &recv, x.recv_total));
    for (int r = 0; r < p->nranks; r++) {
        QS_TRY(put(queue, send + x.send_at[r], x.send_bytes[r], p->rank, r, op));
    }
    pieces lent = x;
    QS_TRY(qs_comm_all_to_all_v(p->comm, send, lent.send_bytes, lent.send_at, recv, lent.recv_bytes,
                                lent.recv_at, queue));
    memset(&lent, 0xff, sizeof lent); /* the arrays are ours again at once */
    unsigned char *got = host_bytes(x.recv_total);
    QS_TRY(qs_queue_copy(queue, got, recv, x.recv_total));
    QS_TRY(qs_queue_wait(queue));
    for (int r = 0; r < p->nranks; r++) {
        const unsigned char *piece = got + x.recv_at[r];
        QS_TRY(expect(piece, x.recv_bytes[r], r, p->rank, op));
        for (size_t gap = 0; gap < 3; gap++) {
            if (piece[x.recv_bytes[r] + gap] != GUARD) {
                return QS_FAIL(QS_ERR_BUG, "op %d writes behind the piece of rank %d", op, r);
            }
        }
    }
    free(got);
    qs_device_free(p->device, send);
    qs_device_free(p->device, recv);
    return QS_OK;
}

static qs_status all_to_all_v(const place *p)
{
    qs_queue *queue = NULL;
    QS_TRY(qs_queue_create_on(p->device, &queue, 1));
    for (int op = 0; op < 5; op++) {
        QS_TRY(one_exchange(p, queue, op));
    }
    qs_queue_destroy(queue);
    return QS_OK;
}

/* The own piece lies where it belongs already: an all-gather. */
static qs_status own_piece_in_place(const place *p)
{
    enum { BYTES = 100 };
    size_t bytes[MAX_RANKS], at[MAX_RANKS], own_at[MAX_RANKS];
    qs_queue *queue = NULL;
    QS_TRY(qs_queue_create_on(p->device, &queue, 1));
    gather g = {.bytes = BYTES, .op = 9, .in_place = true};
    QS_TRY(guarded(p, queue, &g.recv, BYTES * (size_t)p->nranks));
    for (int r = 0; r < p->nranks; r++) {
        bytes[r] = BYTES;
        at[r] = (size_t)r * BYTES;
        own_at[r] = (size_t)p->rank * BYTES;
    }
    QS_TRY(put(queue, g.recv + at[p->rank], BYTES, p->rank, 0, g.op));
    QS_TRY(qs_comm_all_to_all_v(p->comm, g.recv, bytes, own_at, g.recv, bytes, at, queue));
    QS_TRY(gather_verify(p, queue, &g));
    qs_queue_destroy(queue);
    return QS_OK;
}

static qs_status received_bytes(const place *p)
{
    qs_queue *queue = NULL;
    QS_TRY(qs_queue_create_on(p->device, &queue, 1));
    const uint64_t start = qs_comm_received_bytes(p->comm);
    gather g = {.bytes = 1000};
    QS_TRY(gather_start(p, queue, &g));
    QS_TRY(gather_verify(p, queue, &g));
    QS_TRY(one_exchange(p, queue, 1));
    uint64_t expected = 1000 * (uint64_t)(p->nranks - 1);
    for (int r = 0; r < p->nranks; r++) {
        expected += r != p->rank ? piece_size(r, p->rank, 1) : 0;
    }
    const uint64_t counted = qs_comm_received_bytes(p->comm) - start;
    qs_queue_destroy(queue);
    return counted == expected ? QS_OK
                               : QS_FAIL(QS_ERR_BUG, "%llu bytes are counted, not %llu",
                                         (unsigned long long)counted, (unsigned long long)expected);
}

static const struct {
    const char *name;
    qs_status (*run)(const place *);
} checks[] = {
    {"all_gather", all_gather},
    {"several_under_way", several_under_way},
    {"events_order_queues", events_order_queues},
    {"all_to_all_v", all_to_all_v},
    {"own_piece_in_place", own_piece_in_place},
    {"received_bytes", received_bytes},
};

/* ---- failures ---- */

/* The last rank cannot go on; all must leave with its code, and the communicators close. */
static qs_status last_rank_fails(const place *p)
{
    qs_status mine = QS_OK;
    if (p->rank == p->nranks - 1) {
        mine = QS_FAIL(QS_ERR_INPUT_MISSING, "model.safetensors: no such file");
    }
    return qs_comm_agree(p->comm, mine);
}

/* Rank 0 aborts while the others wait for its part of a gather. */
static qs_status rank_0_aborts(const place *p)
{
    if (p->rank == 0) {
        (void)QS_FAIL(QS_ERR_IO_FULL, "out/base.h5: no space left");
        qs_comm_abort(p->comm, QS_ERR_IO_FULL);
    }
    qs_queue *queue = NULL;
    QS_TRY(qs_queue_create_on(p->device, &queue, 1));
    gather g = {.bytes = 1000};
    QS_TRY(gather_start(p, queue, &g));
    return gather_verify(p, queue, &g);
}

static const struct {
    const char *name;
    qs_status (*run)(const place *);
} failures[] = {
    {"last_rank_fails", last_rank_fails},
    {"rank_0_aborts", rank_0_aborts},
};

/* ---- main ---- */

static qs_status run_host_checks(const place *p)
{
    for (const comm_check_entry *e = comm_checks; e->name != NULL; e++) {
        if (strcmp(e->name, "split") == 0) {
            continue; /* a part is made of a part of the host's communicator */
        }
        const char *wrong = e->run(p->comm);
        if (wrong != NULL) {
            return QS_FAIL(QS_ERR_BUG, "rank %d, %s: %s", p->rank, e->name, wrong);
        }
        printf("passed %s\n", e->name);
    }
    return QS_OK;
}

static qs_status run(const place *p, const char *name)
{
    if (strcmp(name, "host") == 0) {
        return run_host_checks(p);
    }
    for (size_t i = 0; i < sizeof failures / sizeof *failures; i++) {
        if (strcmp(name, failures[i].name) == 0) {
            return failures[i].run(p);
        }
    }
    int found = 0;
    for (size_t i = 0; i < sizeof checks / sizeof *checks; i++) {
        if (strcmp(name, "all") == 0 || strcmp(name, checks[i].name) == 0) {
            QS_TRY(checks[i].run(p));
            printf("passed %s\n", checks[i].name);
            found++;
        }
    }
    return found > 0 ? QS_OK : QS_FAIL(QS_ERR_USAGE, "case_nccl: there is no case '%s'", name);
}

static qs_status open_plugin(const char *name, qs_comm *host, place *p)
{
    char path[4096], why[1024] = "";
    const char *folder = getenv("QSHARD_BINARY_DIR");
    snprintf(path, sizeof path, "%s/libqshard_%s.so", folder != NULL ? folder : ".", name);
    const qs_plugin *plugin = qs_plugin_load(path, why, sizeof why);
    const int devices = plugin != NULL ? plugin->probe(why, sizeof why) : 0;
    if (devices < 1) {
        return QS_FAIL(QS_ERR_ENVIRONMENT, "%s", why);
    }
    QS_TRY(plugin->device_open(&p->device, qs_comm_local_rank(host) % devices));
    QS_TRY(plugin->comm_create(&p->comm, host, p->device));
    p->rank = qs_comm_rank(p->comm);
    p->nranks = qs_comm_nranks(p->comm);
    return QS_OK;
}

int main(int argc, char **argv)
{
    qs_comm *host = NULL;
    place p = {.comm = NULL};
    qs_status st =
        qs_comm_launched() ? qs_comm_mpi_create(&host, &argc, &argv) : qs_comm_self_create(&host);
    if (st == QS_OK) {
        st = open_plugin(argc > 2 ? argv[2] : "emulated", host, &p);
    }
    if (st == QS_OK) {
        if (p.rank == 0) {
            printf("comm %s of %d\n", qs_comm_name(p.comm), p.nranks);
        }
        st = run(&p, argc > 1 ? argv[1] : "all");
    }
    qs_comm *last = p.comm != NULL ? p.comm : host;
    if (st != QS_OK && last != NULL && !qs_comm_agreed(last)) {
        qs_comm_abort(last, st);
    }
    qs_error_print(st);
    fflush(stdout);
    qs_comm_destroy(p.comm);
    qs_device_close(p.device);
    qs_comm_destroy(host);
    return qs_exit_code(st);
}
