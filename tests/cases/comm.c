/* case_comm NAME: a check of comm_checks.c, all of them ("all"), or one of the failures below, on
 * the ranks of mpirun (or alone, where nobody launched it). */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/cause.h"
#include "base/cores.h"
#include "comm/comm.h"
#include "comm_checks.h"

#define LONG_S 1000.0

/* The last rank cannot read its input; all must leave with its code, and only it may speak. */
static qs_status last_rank_fails(qs_comm *comm)
{
    qs_status mine = QS_OK;
    if (qs_comm_rank(comm) == qs_comm_nranks(comm) - 1) {
        mine = QS_FAIL(QS_ERR_INPUT_MISSING, "model.safetensors: no such\nfile");
    }
    qs_status agreed = qs_comm_agree(comm, mine);
    printf("rank leaves: %d %s\n", (int)agreed, agreed == QS_OK ? "" : "told");
    return agreed;
}

/* The last rank cannot read its input, and rank 0 comes late, or is killed before it comes. The
 * line is the last rank's, which says it when the grace is over, or when the launcher ends it. */
static qs_status last_rank_waits(qs_comm *comm, double grace_s, bool killed)
{
    const int me = qs_comm_rank(comm), last = qs_comm_nranks(comm) - 1;
    qs_cause_set_grace(me == last ? grace_s : LONG_S);
    if (me == 0) {
        sleep(2);
        if (killed) {
            raise(SIGKILL);
        }
    }
    if (me == 1 && last > 1) { /* fails as well, later, and is to keep silent */
        sleep(1);
        return qs_comm_agree(comm, QS_FAIL(QS_ERR_INPUT_FORMAT, "config.json: no JSON"));
    }
    return last_rank_fails(comm);
}

static qs_status late(qs_comm *comm)
{
    return last_rank_waits(comm, 0.2, false);
}

static qs_status never_comes(qs_comm *comm)
{
    return last_rank_waits(comm, 0.2, true);
}

static qs_status never_comes_before_the_grace(qs_comm *comm)
{
    return last_rank_waits(comm, LONG_S, true);
}

static void on_term(int number)
{
    (void)!write(STDERR_FILENO, number == SIGTERM ? "caught\n" : "?\n", 7);
    _exit(75);
}

/* With a handler of its own for TERM, as a run has. */
static qs_status never_comes_with_a_handler(qs_comm *comm)
{
    signal(SIGTERM, on_term);
    return last_rank_waits(comm, LONG_S, true);
}

/* The others have found that a peer is lost; the last rank knows why. */
static qs_status why(qs_comm *comm)
{
    return qs_comm_rank(comm) < qs_comm_nranks(comm) - 1
               ? QS_FAIL(QS_ERR_PEER, "a peer is lost")
               : QS_FAIL(QS_ERR_DEVICE, "the card fell off");
}

static qs_status one_knows_why(qs_comm *comm)
{
    const qs_status st = why(comm);
    signal(SIGTERM, SIG_IGN); /* as if caught */
    qs_comm_end_unagreed(comm, st);
    return st;
}

static qs_status one_knows_why_and_all_agree(qs_comm *comm)
{
    return qs_comm_agree(comm, why(comm));
}

/* Rank 0 aborts while the others wait. */
static qs_status rank_0_aborts(qs_comm *comm)
{
    if (qs_comm_rank(comm) == 0) {
        (void)QS_FAIL(QS_ERR_IO_FULL, "out/base.h5: no space left");
        qs_comm_abort(comm, QS_ERR_IO_FULL);
    }
    return qs_comm_barrier(comm);
}

static qs_status last_rank_is_killed(qs_comm *comm)
{
    if (qs_comm_rank(comm) == qs_comm_nranks(comm) - 1) {
        raise(SIGKILL);
    }
    return qs_comm_barrier(comm);
}

/* Rank 0 expects `expected` bytes of everybody, who send 8. */
static qs_status mismatched(qs_comm *comm, size_t expected)
{
    size_t send_bytes[64] = {0}, recv_bytes[64] = {0}, at[64] = {0};
    char send[64] = {0}, recv[64 * 64] = {0};
    int me = qs_comm_rank(comm), n = qs_comm_nranks(comm);
    for (int r = 0; r < n; r++) {
        at[r] = me == 0 ? (size_t)r * 64 : 0;
        recv_bytes[r] = me == 0 && r != 0 ? expected : 0;
        send_bytes[r] = r == 0 && me != 0 ? 8 : 0;
    }
    size_t zero[64] = {0};
    qs_queue *queue;
    QS_TRY(qs_queue_create(&queue, 1));
    qs_status st = qs_comm_all_to_all_v(comm, send, send_bytes, zero, recv, recv_bytes, at, queue);
    st = st == QS_OK ? qs_queue_wait(queue) : st;
    if (st != QS_OK) {
        qs_comm_abort(comm, st);
    }
    (void)qs_comm_barrier(comm);
    qs_queue_destroy(queue);
    return QS_OK;
}

static qs_status too_long(qs_comm *comm)
{
    return mismatched(comm, 4);
}

static qs_status too_short(qs_comm *comm)
{
    return mismatched(comm, 12);
}

/* More than one piece a message, and a buffer past 2^31 bytes. */
static qs_status huge(qs_comm *comm)
{
    size_t bytes = ((size_t)1 << 30) + ((size_t)200 << 20) + 3;
    int me = qs_comm_rank(comm), n = qs_comm_nranks(comm);
    unsigned char *all = malloc(bytes * (size_t)n);
    if (all == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "huge");
    }
    memset(all + bytes * (size_t)me, 100 + me, bytes);
    qs_queue *queue;
    QS_TRY(qs_queue_create(&queue, 1));
    QS_TRY(qs_comm_all_gather(comm, all + bytes * (size_t)me, all, bytes, queue));
    QS_TRY(qs_queue_wait(queue));
    for (int r = 0; r < n; r++) {
        for (size_t i = 0; i < bytes; i++) {
            if (all[(size_t)r * bytes + i] != 100 + r) {
                return QS_FAIL(QS_ERR_BUG, "byte %zu of rank %d", i, r);
            }
        }
    }
    memset(all + bytes * (size_t)me, me, bytes);
    QS_TRY(qs_comm_bcast(comm, all, bytes, 0));
    QS_TRY(qs_comm_all_gather_now(comm, all + bytes * (size_t)me, all, bytes));
    qs_queue_destroy(queue);
    int ok = all[bytes - 1] == 0 && all[bytes * (size_t)n - 1] == n - 1;
    free(all);
    return ok ? QS_OK : QS_FAIL(QS_ERR_BUG, "the second gather");
}

/* Shares of the cores: the largest number of threads that does not give a core to two ranks. */
static qs_status threads(qs_comm *comm)
{
    int mine = 0;
    QS_TRY(qs_comm_threads(comm, 0, &mine));
    printf("threads %d\n", mine);
    int64_t total = mine;
    QS_TRY(qs_comm_sum_i64(comm, &total, 1));
    int fair =
        qs_cores_available() > qs_comm_nranks(comm) ? qs_cores_available() : qs_comm_nranks(comm);
    return total == fair ? QS_OK
                         : QS_FAIL(QS_ERR_BUG, "%d threads in all, not %d", (int)total, fair);
}

static const struct {
    const char *name;
    qs_status (*run)(qs_comm *);
} failures[] = {
    {"last_rank_fails", last_rank_fails},
    {"late", late},
    {"never_comes", never_comes},
    {"never_comes_before_the_grace", never_comes_before_the_grace},
    {"never_comes_with_a_handler", never_comes_with_a_handler},
    {"one_knows_why", one_knows_why},
    {"one_knows_why_and_all_agree", one_knows_why_and_all_agree},
    {"rank_0_aborts", rank_0_aborts},
    {"last_rank_is_killed", last_rank_is_killed},
    {"too_long", too_long},
    {"too_short", too_short},
    {"huge", huge},
    {"threads", threads},
};

static qs_status run_check(qs_comm *comm, const char *name, comm_check check)
{
    const char *wrong = check(comm);
    if (wrong != NULL) {
        (void)QS_FAIL(QS_ERR_BUG, "rank %d, %s: %s", qs_comm_rank(comm), name, wrong);
        qs_comm_abort(comm, QS_ERR_BUG);
    }
    printf("passed %s\n", name);
    return QS_OK;
}

static qs_status run(qs_comm *comm, const char *name)
{
    for (size_t i = 0; i < sizeof failures / sizeof *failures; i++) {
        if (strcmp(name, failures[i].name) == 0) {
            return failures[i].run(comm);
        }
    }
    if (strcmp(name, "all") == 0) {
        for (const comm_check_entry *e = comm_checks; e->name != NULL; e++) {
            QS_TRY(run_check(comm, e->name, e->run));
        }
        return QS_OK;
    }
    comm_check check = comm_check_find(name);
    if (check == NULL) {
        return QS_FAIL(QS_ERR_USAGE, "case_comm: there is no case '%s'", name);
    }
    return run_check(comm, name, check);
}

int main(int argc, char **argv)
{
    qs_comm *comm = NULL;
    bool with_mpi = qs_comm_launched() || (argc > 2 && strcmp(argv[2], "singleton") == 0);
    qs_status st = with_mpi ? qs_comm_mpi_create(&comm, &argc, &argv) : qs_comm_self_create(&comm);
    if (st == QS_OK) {
        if (qs_comm_rank(comm) == 0) {
            printf("comm %s of %d\n", qs_comm_name(comm), qs_comm_nranks(comm));
        }
        st = run(comm, argc > 1 ? argv[1] : "all");
    }
    qs_error_print(st);
    fflush(stdout);
    qs_comm_destroy(comm);
    return qs_exit_code(st);
}
