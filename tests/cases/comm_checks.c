#include "comm_checks.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/timer.h"

static _Thread_local char problem[1024];

static const char *fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
static const char *fail(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(problem, sizeof problem, format, args);
    va_end(args);
    return problem;
}

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            return fail("line %d: %s [%s]", __LINE__, #condition, qs_error_text());                \
        }                                                                                          \
    } while (0)

#define CHECK_SUB(expression)                                                                      \
    do {                                                                                           \
        const char *wrong_ = (expression);                                                         \
        if (wrong_ != NULL) {                                                                      \
            return wrong_;                                                                         \
        }                                                                                          \
    } while (0)

/* Byte i of what rank `from` sends to rank `to` in operation `op`. */
static unsigned char pattern(int from, int to, int op, size_t i)
{
    return (unsigned char)(17 * from + 59 * to + 101 * op + 7 * (int)(i % 4099) + 1);
}

static void fill(unsigned char *data, size_t bytes, int from, int to, int op)
{
    for (size_t i = 0; i < bytes; i++) {
        data[i] = pattern(from, to, op, i);
    }
}

static const char *expect(const unsigned char *data, size_t bytes, int from, int to, int op)
{
    for (size_t i = 0; i < bytes; i++) {
        if (data[i] != pattern(from, to, op, i)) {
            return fail("op %d: byte %zu of %zu from rank %d to %d is %d, not %d", op, i, bytes,
                        from, to, data[i], pattern(from, to, op, i));
        }
    }
    return NULL;
}

/* ---- one all-gather under way ---- */

typedef struct {
    unsigned char *send, *recv;
    size_t bytes;
    int op;
    bool in_place;
} gather;

/* Everybody gets the same, hence `to` = 0 in the pattern; one guard byte past the end. */
static gather gather_create(qs_comm *comm, size_t bytes, int op, bool in_place)
{
    size_t total = bytes * (size_t)qs_comm_nranks(comm);
    gather g = {.bytes = bytes, .op = op, .in_place = in_place};
    g.recv = calloc(total + 1, 1);
    g.recv[total] = 0xa5;
    g.send = in_place ? g.recv + bytes * (size_t)qs_comm_rank(comm) : malloc(bytes + 1);
    fill(g.send, bytes, qs_comm_rank(comm), 0, op);
    return g;
}

static qs_status gather_start(qs_comm *comm, gather *g, qs_queue *queue)
{
    return qs_comm_all_gather(comm, g->send, g->recv, g->bytes, queue);
}

static const char *gather_verify(qs_comm *comm, const gather *g)
{
    int nranks = qs_comm_nranks(comm);
    for (int r = 0; r < nranks; r++) {
        CHECK_SUB(expect(g->recv + (size_t)r * g->bytes, g->bytes, r, 0, g->op));
    }
    CHECK(g->recv[g->bytes * (size_t)nranks] == 0xa5);
    return NULL;
}

static void gather_destroy(gather *g)
{
    if (!g->in_place) {
        free(g->send);
    }
    free(g->recv);
}

static const char *all_gather(qs_comm *comm)
{
    static const size_t sizes[] = {0, 1, 7, 4096, 100003, 3 << 20};
    qs_queue *queue;
    CHECK(qs_queue_create(&queue, 1) == QS_OK);
    for (int i = 0; i < 12; i++) {
        gather g = gather_create(comm, sizes[i / 2], i, i % 2 == 1);
        CHECK(gather_start(comm, &g, queue) == QS_OK);
        CHECK(qs_queue_wait(queue) == QS_OK);
        CHECK_SUB(gather_verify(comm, &g));
        gather_destroy(&g);
    }
    qs_queue_destroy(queue);
    return NULL;
}

static const char *several_under_way(qs_comm *comm)
{
    enum { N = 6 };
    static const size_t sizes[N] = {70000, 0, 5, 1 << 20, 300, 64};
    gather g[N];
    qs_event passed[N];
    qs_queue *queue;
    CHECK(qs_queue_create(&queue, 1) == QS_OK);
    for (int i = 0; i < N; i++) {
        g[i] = gather_create(comm, sizes[i], i, i % 2 == 0);
        CHECK(gather_start(comm, &g[i], queue) == QS_OK);
        passed[i] = qs_event_record(queue);
    }
    for (int i = 0; i < N; i++) {
        CHECK(qs_event_wait(passed[i]) == QS_OK);
        CHECK_SUB(gather_verify(comm, &g[i]));
        gather_destroy(&g[i]); /* its buffers are ours again, the later ones are still under way */
    }
    CHECK(qs_queue_wait(queue) == QS_OK);
    qs_queue_destroy(queue);
    return NULL;
}

/* Same order of calls on all ranks, but the ranks wait for the queues in different order. */
static const char *interleaved_queues(qs_comm *comm)
{
    enum { N = 8 };
    gather g[N];
    qs_queue *queue[2];
    CHECK(qs_queue_create(&queue[0], 1) == QS_OK && qs_queue_create(&queue[1], 1) == QS_OK);
    for (int i = 0; i < N; i++) {
        g[i] = gather_create(comm, 1000 + 30000 * (size_t)(i % 3), i, false);
        CHECK(gather_start(comm, &g[i], queue[i % 2]) == QS_OK);
        CHECK(qs_comm_barrier(comm) == QS_OK); /* blocking calls in between */
    }
    int first = qs_comm_rank(comm) % 2;
    CHECK(qs_queue_wait(queue[first]) == QS_OK);
    CHECK(qs_queue_wait(queue[1 - first]) == QS_OK);
    for (int i = 0; i < N; i++) {
        CHECK_SUB(gather_verify(comm, &g[i]));
        gather_destroy(&g[i]);
    }
    qs_queue_destroy(queue[0]);
    qs_queue_destroy(queue[1]);
    return NULL;
}

static void poll_queue(void *queue)
{
    (void)qs_queue_poll(queue);
}

/* The way of the training step: nobody waits, the compute loop's idle callback moves the gather. */
static const char *progress_by_idle(qs_comm *comm)
{
    qs_queue *compute, *transfer;
    CHECK(qs_queue_create(&compute, 1) == QS_OK && qs_queue_create(&transfer, 1) == QS_OK);
    qs_queue_set_idle(compute, poll_queue, transfer);
    gather g = gather_create(comm, 1 << 20, 3, true);
    CHECK(gather_start(comm, &g, transfer) == QS_OK);
    double give_up_s = qs_time_s() + 30.0;
    bool there = false;
    while (!there && qs_time_s() < give_up_s) {
        qs_queue_idle(compute);
        there = gather_verify(comm, &g) == NULL;
    }
    CHECK(there);
    CHECK(qs_queue_wait(transfer) == QS_OK); /* the sends may still be under way */
    gather_destroy(&g);
    qs_queue_destroy(compute);
    qs_queue_destroy(transfer);
    return NULL;
}

/* ---- all-to-all ---- */

/* Ragged, with empty pieces, not symmetric. */
static size_t piece_size(int from, int to, int op)
{
    return (size_t)((3 * from + 5 * to + op) % 4) * (size_t)(op == 2 ? 50000 : 13);
}

static const char *one_all_to_all(qs_comm *comm, qs_queue *queue, int op)
{
    enum { MAX = 64 };
    int me = qs_comm_rank(comm), n = qs_comm_nranks(comm);
    size_t send_bytes[MAX], send_at[MAX], recv_bytes[MAX], recv_at[MAX];
    size_t send_total = 0, recv_total = 0;
    for (int r = 0; r < n; r++) {
        send_bytes[r] = piece_size(me, r, op);
        recv_bytes[r] = piece_size(r, me, op);
        send_at[r] = send_total;
        send_total += send_bytes[r];
    }
    for (int r = n - 1; r >= 0; r--) { /* pieces arrive in another order, with gaps of 3 */
        recv_at[r] = recv_total;
        recv_total += recv_bytes[r] + 3;
    }
    unsigned char *send = malloc(send_total + 1), *recv = malloc(recv_total);
    memset(recv, 0xa5, recv_total);
    for (int r = 0; r < n; r++) {
        fill(send + send_at[r], send_bytes[r], me, r, op);
    }
    CHECK(qs_comm_all_to_all_v(comm, send, send_bytes, send_at, recv, recv_bytes, recv_at, queue) ==
          QS_OK);
    size_t received[MAX], places[MAX];
    memcpy(received, recv_bytes, sizeof received);
    memcpy(places, recv_at, sizeof places);
    memset(send_bytes, 0xff, sizeof send_bytes); /* the arrays are ours again at once */
    memset(send_at, 0xff, sizeof send_at);
    memset(recv_bytes, 0xff, sizeof recv_bytes);
    memset(recv_at, 0xff, sizeof recv_at);
    CHECK(qs_queue_wait(queue) == QS_OK);
    for (int r = 0; r < n; r++) {
        const unsigned char *piece = recv + places[r];
        CHECK_SUB(expect(piece, received[r], r, me, op));
        for (int gap = 0; gap < 3; gap++) {
            CHECK(piece[received[r] + (size_t)gap] == 0xa5);
        }
    }
    free(send);
    free(recv);
    return NULL;
}

static const char *all_to_all_v(qs_comm *comm)
{
    qs_queue *queue;
    CHECK(qs_queue_create(&queue, 1) == QS_OK);
    for (int op = 0; op < 4; op++) {
        CHECK_SUB(one_all_to_all(comm, queue, op));
    }
    qs_queue_destroy(queue);
    return NULL;
}

/* The own piece lies where it belongs already. */
static const char *all_to_all_v_own_piece_in_place(qs_comm *comm)
{
    enum { MAX = 64, BYTES = 100 };
    int me = qs_comm_rank(comm), n = qs_comm_nranks(comm);
    size_t bytes[MAX], at[MAX], own_at[MAX];
    unsigned char recv[MAX * BYTES];
    for (int r = 0; r < n; r++) {
        bytes[r] = BYTES;
        at[r] = (size_t)r * BYTES;
        own_at[r] = (size_t)me * BYTES; /* everybody gets my piece: an all-gather */
    }
    fill(recv + own_at[me], BYTES, me, 0, 9);
    qs_queue *queue;
    CHECK(qs_queue_create(&queue, 1) == QS_OK);
    CHECK(qs_comm_all_to_all_v(comm, recv, bytes, own_at, recv, bytes, at, queue) == QS_OK);
    CHECK(qs_queue_wait(queue) == QS_OK);
    for (int r = 0; r < n; r++) {
        CHECK_SUB(expect(recv + at[r], BYTES, r, 0, 9));
    }
    qs_queue_destroy(queue);
    return NULL;
}

/* ---- the blocking ones ---- */

static const char *bcast(qs_comm *comm)
{
    static const size_t sizes[] = {0, 1, 100001};
    unsigned char *data = malloc(100001);
    for (int root = 0; root < qs_comm_nranks(comm); root++) {
        for (int s = 0; s < 3; s++) {
            memset(data, 0, 100001);
            if (qs_comm_rank(comm) == root) {
                fill(data, sizes[s], root, 0, s);
            }
            CHECK(qs_comm_bcast(comm, data, sizes[s], root) == QS_OK);
            CHECK_SUB(expect(data, sizes[s], root, 0, s));
        }
    }
    free(data);
    return NULL;
}

static const char *max_and_sum(qs_comm *comm)
{
    enum { N = 200 }; /* more than one piece of the scratch */
    int64_t me = qs_comm_rank(comm), n = qs_comm_nranks(comm);
    int64_t highest[N], total[N];
    for (int64_t i = 0; i < N; i++) {
        highest[i] = (me * 7 + i) % n - 5; /* negative ones as well */
        total[i] = (me + 1) * (i - 100) * (INT64_C(1) << 40);
    }
    CHECK(qs_comm_max_i64(comm, highest, N) == QS_OK);
    CHECK(qs_comm_sum_i64(comm, total, N) == QS_OK);
    for (int64_t i = 0; i < N; i++) {
        int64_t expected = INT64_MIN;
        for (int64_t r = 0; r < n; r++) {
            int64_t value = (r * 7 + i) % n - 5;
            expected = value > expected ? value : expected;
        }
        CHECK(highest[i] == expected);
        CHECK(total[i] == n * (n + 1) / 2 * (i - 100) * (INT64_C(1) << 40));
    }
    int64_t none = 3;
    CHECK(qs_comm_sum_i64(comm, &none, 0) == QS_OK && none == 3);
    return NULL;
}

static const char *all_gather_now(qs_comm *comm)
{
    int me = qs_comm_rank(comm), n = qs_comm_nranks(comm);
    unsigned char mine[11], all[64 * 11];
    for (int in_place = 0; in_place < 2; in_place++) {
        memset(all, 0, sizeof all);
        unsigned char *send = in_place ? all + me * 11 : mine;
        fill(send, 11, me, 0, in_place);
        CHECK(qs_comm_all_gather_now(comm, send, all, 11) == QS_OK);
        for (int r = 0; r < n; r++) {
            CHECK_SUB(expect(all + r * 11, 11, r, 0, in_place));
        }
    }
    return NULL;
}

/* A rank enters late: the others must not come out of the barrier before. */
static const char *barrier(qs_comm *comm)
{
    double entered_s = 0.0;
    for (int late = 0; late < qs_comm_nranks(comm); late++) {
        if (qs_comm_rank(comm) == late) {
            double until_s = qs_time_s() + 0.01;
            while (qs_time_s() < until_s) {
            }
            entered_s = qs_time_s();
        }
        CHECK(qs_comm_barrier(comm) == QS_OK);
        double left_s = qs_time_s(); /* one clock: all ranks of these tests are on one machine */
        double entry_s = entered_s;
        CHECK(qs_comm_bcast(comm, &entry_s, sizeof entry_s, late) == QS_OK);
        CHECK(left_s >= entry_s);
    }
    return NULL;
}

static const char *bcast_text(qs_comm *comm)
{
    char *longest = malloc(70001);
    memset(longest, 'z', 70000);
    longest[70000] = '\0';
    const char *texts[] = {NULL, "", "a: 1\nb: 2\n", longest};
    for (int i = 0; i < 4; i++) {
        int root = i % qs_comm_nranks(comm);
        char *text = NULL;
        if (qs_comm_rank(comm) == root && texts[i] != NULL) {
            text = strdup(texts[i]);
        }
        CHECK(qs_comm_bcast_text(comm, &text, root) == QS_OK);
        CHECK((text == NULL) == (texts[i] == NULL));
        CHECK(text == NULL || strcmp(text, texts[i]) == 0);
        free(text);
    }
    free(longest);
    return NULL;
}

/* ---- agreement, counters, places ---- */

static const char *agree(qs_comm *comm)
{
    int me = qs_comm_rank(comm), n = qs_comm_nranks(comm);
    CHECK(qs_comm_agree(comm, QS_OK) == QS_OK);
    for (int failing = 0; failing < n; failing++) {
        qs_status mine = QS_OK;
        if (me == failing) {
            mine = QS_FAIL(QS_ERR_INPUT_VALUE, "file.%d: a value", me);
        }
        if (me == failing + 1) { /* a second one, higher: the lowest counts */
            mine = QS_FAIL(QS_ERR_MEMORY, "memory of %d", me);
        }
        CHECK(qs_comm_agree(comm, mine) == QS_ERR_INPUT_VALUE);
        char text[64];
        snprintf(text, sizeof text, "file.%d: a value", failing);
        CHECK(strcmp(qs_error_text(), text) == 0);
        qs_error_clear();
        CHECK(qs_comm_agree(comm, QS_OK) == QS_OK); /* it works on after a failure */

        int64_t most = failing == me ? 1000 + me : me; /* with a value that comes along */
        CHECK(qs_comm_agree_most(comm, QS_OK, &most) == QS_OK && most == 1000 + failing);
        mine = failing == me ? QS_FAIL(QS_ERR_INPUT_VALUE, "mine") : QS_OK;
        most = me;
        CHECK(qs_comm_agree_most(comm, mine, &most) == QS_ERR_INPUT_VALUE && most == me);
        qs_error_clear();
    }
    /* Only the last asks for a requeue: all leave with it. An error anywhere wins. */
    qs_status mine = me == n - 1 ? QS_REQUEUE : QS_OK;
    CHECK(qs_comm_agree(comm, mine) == QS_REQUEUE);
    qs_error_clear();
    mine = me == 0 ? QS_REQUEUE : QS_OK;
    if (me == n - 1) {
        mine = QS_FAIL(QS_ERR_IO, "disk");
    }
    CHECK(qs_comm_agree(comm, mine) == QS_ERR_IO);
    qs_error_clear();
    return NULL;
}

static const char *received_bytes(qs_comm *comm)
{
    int me = qs_comm_rank(comm);
    uint64_t peers = (uint64_t)qs_comm_nranks(comm) - 1;
    qs_queue *queue;
    CHECK(qs_queue_create(&queue, 1) == QS_OK);
    uint64_t before = qs_comm_received_bytes(comm);
    gather g = gather_create(comm, 1000, 0, false);
    CHECK(gather_start(comm, &g, queue) == QS_OK && qs_queue_wait(queue) == QS_OK);
    gather_destroy(&g);
    CHECK(qs_comm_received_bytes(comm) - before == 1000 * peers);
    before = qs_comm_received_bytes(comm);
    CHECK_SUB(one_all_to_all(comm, queue, 1));
    uint64_t expected = 0;
    for (int r = 0; r < qs_comm_nranks(comm); r++) {
        expected += r != me ? piece_size(r, me, 1) : 0;
    }
    CHECK(qs_comm_received_bytes(comm) - before == expected);
    char text[10] = "";
    before = qs_comm_received_bytes(comm);
    CHECK(qs_comm_bcast(comm, text, sizeof text, 0) == QS_OK);
    CHECK(qs_comm_received_bytes(comm) - before == (me == 0 ? 0 : sizeof text));
    qs_queue_destroy(queue);
    return NULL;
}

static const char *places(qs_comm *comm)
{
    int64_t seen[64] = {0};
    int me = qs_comm_rank(comm), n = qs_comm_nranks(comm);
    CHECK(me >= 0 && me < n);
    CHECK(qs_comm_local_rank(comm) >= 0 && qs_comm_local_rank(comm) < qs_comm_local_nranks(comm));
    CHECK(qs_comm_local_nranks(comm) == n); /* these tests run on one host */
    seen[me] = 1;
    CHECK(qs_comm_sum_i64(comm, seen, n) == QS_OK);
    for (int r = 0; r < n; r++) {
        CHECK(seen[r] == 1);
    }
    int threads = 0;
    CHECK(qs_comm_threads(comm, 3, &threads) == QS_OK && threads == 3);
    CHECK(qs_comm_threads(comm, 0, &threads) == QS_OK && threads >= 1);
    return NULL;
}

/* Ranks by the remainder of their number; each part works like a communicator of its own, beside
 * the whole one, in whatever state that is. */
static const char *split(qs_comm *comm)
{
    const int me = qs_comm_rank(comm), n = qs_comm_nranks(comm);
    for (int parts = 1; parts <= 3; parts++) {
        qs_comm *part = NULL;
        qs_queue *queue = NULL;
        const int color = me % parts, size = (n - color + parts - 1) / parts;
        CHECK(qs_comm_split(comm, color, &part) == QS_OK);
        CHECK(qs_comm_rank(part) == me / parts && qs_comm_nranks(part) == size);
        CHECK(qs_comm_local_nranks(part) == size && qs_comm_host(part) == 0);
        CHECK(qs_queue_create(&queue, 1) == QS_OK);
        int64_t mine[2] = {me, 0}, whole[64] = {0}, own[64] = {0};
        /* under way on both at once, and waited for crosswise: the whole one by a blocking call */
        CHECK(qs_comm_all_gather(part, mine, own, sizeof *mine, queue) == QS_OK);
        CHECK(qs_comm_all_gather_now(comm, mine, whole, sizeof *mine) == QS_OK);
        CHECK(qs_queue_wait(queue) == QS_OK);
        for (int r = 0; r < n; r++) {
            CHECK(whole[r] == r);
        }
        for (int r = 0; r < size; r++) {
            CHECK(own[r] == color + r * parts);
        }
        CHECK_SUB(one_all_to_all(part, queue, 2));
        /* an error in one part is that part's */
        const qs_status st =
            qs_comm_agree(part, color == 0 && me == 0 ? QS_FAIL(QS_ERR_IO, "disk") : QS_OK);
        CHECK(st == (color == 0 ? QS_ERR_IO : QS_OK) && qs_comm_agreed(part) == (color == 0));
        qs_error_clear();
        CHECK(qs_comm_agree(comm, QS_OK) == QS_OK);
        qs_queue_destroy(queue);
        qs_comm_destroy(part);
    }
    return NULL;
}

const comm_check_entry comm_checks[] = {
    {"all_gather", all_gather},
    {"several_under_way", several_under_way},
    {"interleaved_queues", interleaved_queues},
    {"progress_by_idle", progress_by_idle},
    {"all_to_all_v", all_to_all_v},
    {"all_to_all_v_own_piece_in_place", all_to_all_v_own_piece_in_place},
    {"bcast", bcast},
    {"max_and_sum", max_and_sum},
    {"all_gather_now", all_gather_now},
    {"barrier", barrier},
    {"bcast_text", bcast_text},
    {"agree", agree},
    {"received_bytes", received_bytes},
    {"places", places},
    {"split", split},
    {NULL, NULL},
};

comm_check comm_check_find(const char *name)
{
    for (const comm_check_entry *e = comm_checks; e->name != NULL; e++) {
        if (strcmp(e->name, name) == 0) {
            return e->run;
        }
    }
    return NULL;
}
