/* N ranks as N threads of one process, for tests.
 *
 * Every collective is an exchange of pieces (an all-gather sends one piece to everybody), and
 * exchange number n of each rank meets in round n. As with MPI nothing moves by itself: a rank
 * copies its pieces out of the others' buffers when it polls after all have posted, and its own
 * exchange is over when all others have copied theirs. One lock guards the team, copies included:
 * simple, and a rank that gives up cannot free a buffer that is being read. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "comm/comm_impl.h"

typedef struct {
    size_t bytes, at;
} piece;

/* What one rank brings to a round. */
typedef struct {
    bool posted, copied, left;
    const char *send;
    char *recv;
    piece *out, *in; /* [nranks] each, one allocation at `out` */
} posting;

typedef struct round {
    struct round *next;
    uint64_t number;
    int posted, copied, left;
    bool broken;       /* somebody left before it was over */
    posting by_rank[]; /* [nranks] */
} round;

typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int nranks;
    int members;   /* communicators not yet destroyed */
    int ended_by;  /* the rank that aborted, -1 if none */
    bool *gone;    /* [nranks] its communicator was destroyed */
    round *rounds; /* under way */
} team;

typedef struct {
    qs_comm base;
    team *team;
    uint64_t next_round;
} comm_threads;

/* An exchange of one rank: ctx of the queue. */
typedef struct {
    comm_threads *comm;
    round *round;
} exchange;

static void free_round(team *t, round *r)
{
    round **link = &t->rounds;
    while (*link != r) {
        link = &(*link)->next;
    }
    *link = r->next;
    for (int i = 0; i < t->nranks; i++) {
        free(r->by_rank[i].out);
    }
    free(r);
}

static round *find_or_add_round(team *t, uint64_t number)
{
    for (round *r = t->rounds; r != NULL; r = r->next) {
        if (r->number == number) {
            return r;
        }
    }
    round *r = calloc(1, sizeof *r + (size_t)t->nranks * sizeof r->by_rank[0]);
    if (r != NULL) {
        r->number = number;
        r->next = t->rounds;
        t->rounds = r;
    }
    return r;
}

static qs_status peer_status(const comm_threads *c, const round *r)
{
    team *t = c->team;
    if (t->ended_by >= 0) {
        return QS_FAIL(QS_ERR_PEER, "rank %d: rank %d ended the run", c->base.rank, t->ended_by);
    }
    if (r->broken) {
        return QS_FAIL(QS_ERR_PEER, "rank %d: another rank gave up a collective", c->base.rank);
    }
    for (int i = 0; i < t->nranks; i++) {
        if (t->gone[i] && !r->by_rank[i].posted) {
            return QS_FAIL(QS_ERR_PEER, "rank %d: rank %d has left", c->base.rank, i);
        }
    }
    return QS_OK;
}

static qs_status copy_pieces(comm_threads *c, round *r)
{
    int me = c->base.rank;
    posting *mine = &r->by_rank[me];
    for (int i = 0; i < c->team->nranks; i++) {
        const posting *from = &r->by_rank[i];
        piece sent = from->out[me], wanted = mine->in[i];
        if (sent.bytes != wanted.bytes) {
            return QS_FAIL(QS_ERR_BUG, "rank %d expects %zu bytes of rank %d, which sends %zu", me,
                           wanted.bytes, i, sent.bytes);
        }
        if (sent.bytes > 0 && mine->recv + wanted.at != from->send + sent.at) {
            memmove(mine->recv + wanted.at, from->send + sent.at, sent.bytes);
        }
    }
    mine->copied = true;
    r->copied++;
    pthread_cond_broadcast(&c->team->changed);
    return QS_OK;
}

/* Copy what has arrived for this rank, in all rounds and not only in the one that is asked about: a
 * rank may wait for one queue while a peer waits for another, and a call of MPI moves everything
 * along, too. */
static qs_status progress(comm_threads *c)
{
    for (round *r = c->team->rounds; r != NULL; r = r->next) {
        const posting *mine = &r->by_rank[c->base.rank];
        bool ready = r->posted == c->team->nranks && !r->broken;
        if (ready && !mine->copied && !mine->left) {
            QS_TRY(copy_pieces(c, r));
        }
    }
    return QS_OK;
}

/* One step of an exchange; the lock is held. */
static qs_status advance(exchange *x, bool *finished)
{
    QS_TRY(progress(x->comm));
    QS_TRY(peer_status(x->comm, x->round));
    *finished = x->round->copied == x->comm->team->nranks;
    return QS_OK;
}

static qs_status poll_exchange(void *ctx, bool *finished)
{
    exchange *x = ctx;
    pthread_mutex_lock(&x->comm->team->lock);
    qs_status st = advance(x, finished);
    pthread_mutex_unlock(&x->comm->team->lock);
    return st;
}

static void leave_round(exchange *x)
{
    team *t = x->comm->team;
    round *r = x->round;
    pthread_mutex_lock(&t->lock);
    if (r->copied < t->nranks) {
        r->broken = true;
        pthread_cond_broadcast(&t->changed);
    }
    r->by_rank[x->comm->base.rank].left = true;
    if (++r->left == t->nranks) {
        free_round(t, r);
    }
    pthread_mutex_unlock(&t->lock);
}

static void release_exchange(void *ctx)
{
    leave_round(ctx);
    free(ctx);
}

/* Post this rank's part, taking over `pieces` (out[nranks], in[nranks]), which is freed on failure
 * as well. */
static qs_status post(comm_threads *c, const void *send, void *recv, piece *pieces, exchange *x)
{
    team *t = c->team;
    if (pieces == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "memory: a collective of %d threads cannot be allocated",
                       t->nranks);
    }
    pthread_mutex_lock(&t->lock);
    round *r = find_or_add_round(t, c->next_round);
    if (r != NULL) {
        c->next_round++;
        r->by_rank[c->base.rank] = (posting){
            .posted = true, .send = send, .recv = recv, .out = pieces, .in = pieces + t->nranks};
        r->posted++;
        pthread_cond_broadcast(&t->changed);
    }
    pthread_mutex_unlock(&t->lock);
    if (r == NULL) {
        free(pieces);
        return QS_FAIL(QS_ERR_MEMORY, "memory: a collective of %d threads cannot be allocated",
                       t->nranks);
    }
    *x = (exchange){.comm = c, .round = r};
    return QS_OK;
}

static qs_status exchange_now(comm_threads *c, const void *send, void *recv, piece *pieces)
{
    exchange x;
    QS_TRY(post(c, send, recv, pieces, &x));
    bool finished = false;
    pthread_mutex_lock(&c->team->lock);
    qs_status st = advance(&x, &finished);
    while (st == QS_OK && !finished) {
        pthread_cond_wait(&c->team->changed, &c->team->lock);
        st = advance(&x, &finished);
    }
    pthread_mutex_unlock(&c->team->lock);
    leave_round(&x);
    return st;
}

static qs_status exchange_on_queue(comm_threads *c, const void *send, void *recv, piece *pieces,
                                   qs_queue *queue)
{
    exchange *x = calloc(1, sizeof *x);
    if (x == NULL) {
        free(pieces);
        return QS_FAIL(QS_ERR_MEMORY, "memory: a collective cannot be allocated");
    }
    qs_status st = post(c, send, recv, pieces, x);
    if (st != QS_OK) {
        free(x);
        return st;
    }
    st = qs_queue_push(queue, poll_exchange, release_exchange, x);
    if (st != QS_OK) {
        release_exchange(x);
    }
    return st;
}

static piece *new_pieces(const comm_threads *c)
{
    return calloc(2 * (size_t)c->team->nranks, sizeof(piece));
}

static piece *gather_pieces(const comm_threads *c, size_t bytes_per_rank)
{
    size_t n = (size_t)c->team->nranks;
    piece *pieces = new_pieces(c);
    for (size_t i = 0; pieces != NULL && i < n; i++) {
        pieces[i] = (piece){.bytes = bytes_per_rank, .at = 0};
        pieces[n + i] = (piece){.bytes = bytes_per_rank, .at = i * bytes_per_rank};
    }
    return pieces;
}

static qs_status threads_all_gather(qs_comm *comm, const void *send, void *recv,
                                    size_t bytes_per_rank, qs_queue *queue)
{
    comm_threads *c = (comm_threads *)comm;
    return exchange_on_queue(c, send, recv, gather_pieces(c, bytes_per_rank), queue);
}

static qs_status threads_all_gather_now(qs_comm *comm, const void *send, void *recv,
                                        size_t bytes_per_rank)
{
    comm_threads *c = (comm_threads *)comm;
    return exchange_now(c, send, recv, gather_pieces(c, bytes_per_rank));
}

static qs_status threads_all_to_all_v(qs_comm *comm, const void *send, const size_t *send_bytes,
                                      const size_t *send_at, void *recv, const size_t *recv_bytes,
                                      const size_t *recv_at, qs_queue *queue)
{
    comm_threads *c = (comm_threads *)comm;
    piece *pieces = new_pieces(c);
    for (int i = 0; pieces != NULL && i < comm->nranks; i++) {
        pieces[i] = (piece){.bytes = send_bytes[i], .at = send_at[i]};
        pieces[comm->nranks + i] = (piece){.bytes = recv_bytes[i], .at = recv_at[i]};
    }
    return exchange_on_queue(c, send, recv, pieces, queue);
}

static qs_status threads_bcast(qs_comm *comm, void *data, size_t bytes, int root)
{
    comm_threads *c = (comm_threads *)comm;
    piece *pieces = new_pieces(c);
    for (int i = 0; pieces != NULL && i < comm->nranks; i++) {
        pieces[i].bytes = comm->rank == root ? bytes : 0;
        pieces[comm->nranks + i].bytes = i == root ? bytes : 0;
    }
    return exchange_now(c, data, data, pieces);
}

static qs_status threads_barrier(qs_comm *comm)
{
    comm_threads *c = (comm_threads *)comm;
    return exchange_now(c, NULL, NULL, new_pieces(c));
}

static void threads_abort(qs_comm *comm, qs_status status)
{
    (void)status; /* the process goes on: a test looks at what the other ranks make of it */
    team *t = ((comm_threads *)comm)->team;
    pthread_mutex_lock(&t->lock);
    t->ended_by = comm->rank;
    pthread_cond_broadcast(&t->changed);
    pthread_mutex_unlock(&t->lock);
}

static void free_team(team *t)
{
    while (t->rounds != NULL) { /* rounds that some rank never joined */
        free_round(t, t->rounds);
    }
    pthread_cond_destroy(&t->changed);
    pthread_mutex_destroy(&t->lock);
    free(t->gone);
    free(t);
}

static void threads_destroy(qs_comm *comm)
{
    team *t = ((comm_threads *)comm)->team;
    pthread_mutex_lock(&t->lock);
    t->gone[comm->rank] = true;
    pthread_cond_broadcast(&t->changed);
    int members = --t->members;
    pthread_mutex_unlock(&t->lock);
    if (members == 0) {
        free_team(t);
    }
    qs_comm_fini(comm);
    free(comm);
}

static const qs_comm_ops threads_ops = {
    .name = "threads",
    .all_gather = threads_all_gather,
    .all_to_all_v = threads_all_to_all_v,
    .all_gather_now = threads_all_gather_now,
    .bcast = threads_bcast,
    .barrier = threads_barrier,
    .abort = threads_abort,
    .destroy = threads_destroy,
};

static team *team_create(int nranks)
{
    team *t = calloc(1, sizeof *t);
    bool *gone = calloc((size_t)nranks, sizeof *gone);
    if (t == NULL || gone == NULL) {
        free(t);
        free(gone);
        return NULL;
    }
    t->nranks = nranks;
    t->ended_by = -1;
    t->gone = gone;
    pthread_mutex_init(&t->lock, NULL);
    pthread_cond_init(&t->changed, NULL);
    return t;
}

static qs_status add_member(team *t, int rank, qs_comm **out)
{
    comm_threads *c = calloc(1, sizeof *c);
    if (c == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "memory: a communicator cannot be allocated");
    }
    qs_status st = qs_comm_init(&c->base, &threads_ops, rank, t->nranks);
    if (st != QS_OK) {
        free(c);
        return st;
    }
    c->team = t;
    t->members++;
    *out = &c->base;
    return QS_OK;
}

qs_status qs_comm_threads_create(qs_comm **out, int nranks)
{
    memset(out, 0, (size_t)nranks * sizeof *out);
    team *t = team_create(nranks);
    if (t == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "memory: a team of %d threads cannot be allocated", nranks);
    }
    for (int rank = 0; rank < nranks; rank++) {
        qs_status st = add_member(t, rank, &out[rank]);
        if (st != QS_OK) {
            if (rank == 0) {
                free_team(t);
            }
            for (int r = 0; r < rank; r++) { /* the last one frees the team */
                qs_comm_destroy(out[r]);
                out[r] = NULL;
            }
            return st;
        }
    }
    return QS_OK;
}
