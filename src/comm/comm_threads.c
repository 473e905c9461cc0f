/* N ranks as N threads of one process, for tests.
 *
 * Every collective is an exchange of pieces (an all-gather sends one piece to everybody), and
 * exchange number n of each rank meets in round n. As with MPI nothing moves by itself: a rank
 * copies its pieces out of the others' buffers when it polls after all have posted, and its own
 * exchange is over when all others have copied theirs. One lock guards the team and those split
 * from it, copies included: simple, and a rank that gives up cannot free a buffer that is being
 * read. */
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

/* What a team shares with those split from it. */
typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int teams;
} family;

typedef struct {
    family *family;
    int nranks;
    int members;   /* communicators not yet destroyed */
    int ended_by;  /* the rank that aborted, -1 if none */
    bool *gone;    /* [nranks] its communicator was destroyed */
    round *rounds; /* under way */
} team;

typedef struct comm_threads {
    qs_comm base;
    team *team;
    uint64_t next_round;
    struct comm_threads *parent;          /* that it was split from, NULL: none */
    struct comm_threads *children, *next; /* split from it; the parent's next one */
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
    pthread_cond_broadcast(&c->team->family->changed);
    return QS_OK;
}

/* Copy what has arrived for this rank, in all rounds of all its communicators and not only in the
 * one that is asked about: a rank may wait for one queue while a peer waits for another, and a call
 * of MPI moves everything along, too. */
static qs_status progress_team(comm_threads *c)
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

static qs_status progress_tree(comm_threads *c)
{
    QS_TRY(progress_team(c));
    for (comm_threads *child = c->children; child != NULL; child = child->next) {
        QS_TRY(progress_tree(child));
    }
    return QS_OK;
}

static qs_status progress(comm_threads *c)
{
    while (c->parent != NULL) {
        c = c->parent;
    }
    return progress_tree(c);
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
    pthread_mutex_lock(&x->comm->team->family->lock);
    qs_status st = advance(x, finished);
    pthread_mutex_unlock(&x->comm->team->family->lock);
    return st;
}

static void leave_round(exchange *x)
{
    team *t = x->comm->team;
    round *r = x->round;
    pthread_mutex_lock(&t->family->lock);
    if (r->copied < t->nranks) {
        r->broken = true;
        pthread_cond_broadcast(&t->family->changed);
    }
    r->by_rank[x->comm->base.rank].left = true;
    if (++r->left == t->nranks) {
        free_round(t, r);
    }
    pthread_mutex_unlock(&t->family->lock);
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
    pthread_mutex_lock(&t->family->lock);
    round *r = find_or_add_round(t, c->next_round);
    if (r != NULL) {
        c->next_round++;
        r->by_rank[c->base.rank] = (posting){
            .posted = true, .send = send, .recv = recv, .out = pieces, .in = pieces + t->nranks};
        r->posted++;
        pthread_cond_broadcast(&t->family->changed);
    }
    pthread_mutex_unlock(&t->family->lock);
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
    pthread_mutex_lock(&c->team->family->lock);
    qs_status st = advance(&x, &finished);
    while (st == QS_OK && !finished) {
        pthread_cond_wait(&c->team->family->changed, &c->team->family->lock);
        st = advance(&x, &finished);
    }
    pthread_mutex_unlock(&c->team->family->lock);
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
    pthread_mutex_lock(&t->family->lock);
    t->ended_by = comm->rank;
    pthread_cond_broadcast(&t->family->changed);
    pthread_mutex_unlock(&t->family->lock);
}

static void free_team(team *t)
{
    while (t->rounds != NULL) { /* rounds that some rank never joined */
        free_round(t, t->rounds);
    }
    family *f = t->family;
    free(t->gone);
    free(t);
    pthread_mutex_lock(&f->lock);
    const int teams = --f->teams;
    pthread_mutex_unlock(&f->lock);
    if (teams == 0) {
        pthread_cond_destroy(&f->changed);
        pthread_mutex_destroy(&f->lock);
        free(f);
    }
}

static void leave_parent(comm_threads *c)
{
    comm_threads **link = &c->parent->children;
    while (*link != c) {
        link = &(*link)->next;
    }
    *link = c->next;
}

static void threads_destroy(qs_comm *comm)
{
    comm_threads *c = (comm_threads *)comm;
    team *t = c->team;
    pthread_mutex_lock(&t->family->lock);
    t->gone[comm->rank] = true;
    if (c->parent != NULL) {
        leave_parent(c);
    }
    pthread_cond_broadcast(&t->family->changed);
    int members = --t->members;
    pthread_mutex_unlock(&t->family->lock);
    if (members == 0) {
        free_team(t);
    }
    qs_comm_fini(comm);
    free(comm);
}

static qs_status threads_split(qs_comm *comm, int color, qs_comm **out);

static const qs_comm_ops threads_ops = {
    .name = "threads",
    .all_gather = threads_all_gather,
    .all_to_all_v = threads_all_to_all_v,
    .all_gather_now = threads_all_gather_now,
    .bcast = threads_bcast,
    .barrier = threads_barrier,
    .split = threads_split,
    .abort = threads_abort,
    .destroy = threads_destroy,
};

static family *family_create(void)
{
    family *f = calloc(1, sizeof *f);
    if (f != NULL) {
        pthread_mutex_init(&f->lock, NULL);
        pthread_cond_init(&f->changed, NULL);
    }
    return f;
}

/* A team of the family, NULL: of a new one. */
static team *team_create(family *f, int nranks)
{
    team *t = calloc(1, sizeof *t);
    bool *gone = calloc((size_t)nranks, sizeof *gone);
    f = t != NULL && gone != NULL && f == NULL ? family_create() : f;
    if (t == NULL || gone == NULL || f == NULL) {
        free(t);
        free(gone);
        return NULL;
    }
    t->family = f;
    t->nranks = nranks;
    t->ended_by = -1;
    t->gone = gone;
    pthread_mutex_lock(&f->lock);
    f->teams++;
    pthread_mutex_unlock(&f->lock);
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

static qs_status make_team(family *f, qs_comm **out, int nranks)
{
    memset(out, 0, (size_t)nranks * sizeof *out);
    team *t = team_create(f, nranks);
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

qs_status qs_comm_threads_create(qs_comm **out, int nranks)
{
    return make_team(NULL, out, nranks);
}

/* What a rank tells the others of a split: its color, and where the first of a color has put the
 * members of the new team. */
typedef struct {
    int64_t color;
    qs_comm **members;
} splitting;

/* The lowest rank of a color makes the team for all of them; each takes its own member. */
static qs_status threads_split(qs_comm *comm, int color, qs_comm **out)
{
    comm_threads *parent = (comm_threads *)comm;
    qs_status st = QS_OK;
    splitting mine = {.color = color};
    splitting *all = calloc((size_t)comm->nranks, sizeof *all);
    qs_comm **members = calloc((size_t)comm->nranks, sizeof *members);
    if (all == NULL || members == NULL) {
        st = QS_FAIL(QS_ERR_MEMORY, "memory: a communicator cannot be allocated");
    }
    QS_GOTO(qs_comm_agree(comm, st));
    QS_GOTO(qs_comm_all_gather_now(comm, &mine, all, sizeof mine));
    int first = -1, count = 0, index = 0;
    for (int r = 0; r < comm->nranks; r++) {
        const bool same = all[r].color == color;
        first = same && first < 0 ? r : first;
        index += same && r < comm->rank;
        count += same;
    }
    if (first == comm->rank) {
        st = make_team(parent->team->family, members, count);
        mine.members = members;
    }
    QS_GOTO(qs_comm_agree(comm, st));
    QS_GOTO(qs_comm_all_gather_now(comm, &mine, all, sizeof mine));
    comm_threads *child = (comm_threads *)all[first].members[index];
    child->base.world_rank = comm->world_rank;
    pthread_mutex_lock(&parent->team->family->lock);
    child->parent = parent;
    child->next = parent->children;
    parent->children = child;
    pthread_mutex_unlock(&parent->team->family->lock);
    *out = &child->base;
    st = qs_comm_barrier(comm); /* all have taken theirs out of the lists */
done:
    free(all);
    free(members);
    return st;
}
