#include "nccl_exchange.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "emulator_c.h"

enum { TAG = 7, WORD_TAG = 8, POISON = 0xff };
static const size_t CHUNK_BYTES = (size_t)1 << 30; /* MPI counts in int */

/* Of all communicators, what has not arrived. */
static exchange *under_way;

_Noreturn void nm_die(const char *what)
{
    fprintf(stderr, "emulator: %s\n", what);
    abort();
}

void *nm_allocate(size_t count, size_t bytes)
{
    void *out = calloc(count > 0 ? count : 1, bytes);
    if (out == NULL) {
        nm_die("no memory for an exchange of NCCL");
    }
    return out;
}

void nm_add(exchange *x, piece p)
{
    if (x->n_pieces == x->capacity) {
        x->capacity = 2 * x->capacity + 8;
        x->pieces = realloc(x->pieces, (size_t)x->capacity * sizeof *x->pieces);
        if (x->pieces == NULL) {
            nm_die("no memory for an exchange of NCCL");
        }
    }
    p.aside = nm_allocate(p.bytes, 1);
    x->pieces[x->n_pieces++] = p;
}

void nm_free(exchange *x)
{
    for (int i = 0; i < x->n_pieces; i++) {
        free(x->pieces[i].aside);
    }
    free(x->pieces);
    free(x->requests);
    free(x);
}

/* What is sent is read before anything is poisoned: it may lie within what is received. */
static void take_aside(void *ctx)
{
    exchange *x = ctx;
    for (int i = 0; i < x->n_pieces; i++) {
        if (x->pieces[i].send) {
            memcpy(x->pieces[i].aside, x->pieces[i].at, x->pieces[i].bytes);
        }
    }
    for (int i = 0; i < x->n_pieces; i++) {
        if (!x->pieces[i].send && x->pieces[i].peer != x->comm->rank) {
            memset(x->pieces[i].at, POISON, x->pieces[i].bytes);
        }
    }
}

/* What a rank sends to itself: its sends meet its receives in their order. */
static void pass_to_self(exchange *x)
{
    const int me = x->comm->rank;
    int send = -1;
    for (int i = 0; i < x->n_pieces; i++) {
        piece *to = &x->pieces[i];
        if (to->send || to->peer != me) {
            continue;
        }
        do {
            send++;
        } while (send < x->n_pieces && (!x->pieces[send].send || x->pieces[send].peer != me));
        if (send == x->n_pieces || x->pieces[send].bytes != to->bytes) {
            nm_die("a rank receives from itself what it does not send");
        }
        memcpy(to->aside, x->pieces[send].aside, to->bytes);
    }
}

static int chunks_of(size_t bytes)
{
    return (int)((bytes + CHUNK_BYTES - 1) / CHUNK_BYTES);
}

static bool is_mine(const exchange *x, const piece *p)
{
    return p->peer == x->comm->rank;
}

static MPI_Request *next_request(exchange *x)
{
    return &x->requests[x->n_requests++];
}

static void move_bytes(exchange *x, piece *p)
{
    for (size_t at = 0; at < p->bytes; at += CHUNK_BYTES) {
        const size_t rest = p->bytes - at;
        const int bytes = (int)(rest < CHUNK_BYTES ? rest : CHUNK_BYTES);
        if (p->send) {
            MPI_Isend(p->aside + at, bytes, MPI_BYTE, p->peer, TAG, x->comm->mpi, next_request(x));
        } else {
            MPI_Irecv(p->aside + at, bytes, MPI_BYTE, p->peer, TAG, x->comm->mpi, next_request(x));
        }
    }
}

/* Send all, behind their words, and wait for the words of what comes. */
static void start(exchange *x)
{
    int n = 0;
    for (int i = 0; i < x->n_pieces; i++) {
        n += chunks_of(x->pieces[i].bytes) + 1;
    }
    x->requests = nm_allocate((size_t)n, sizeof *x->requests);
    for (int i = 0; i < x->n_pieces; i++) {
        piece *p = &x->pieces[i];
        p->open = p->send || is_mine(x, p);
        if (is_mine(x, p)) {
            continue;
        }
        p->mine.collectives = x->comm->collectives;
        if (p->send) {
            MPI_Isend(&p->mine, sizeof p->mine, MPI_BYTE, p->peer, WORD_TAG, x->comm->mpi,
                      next_request(x));
            move_bytes(x, p);
        } else {
            MPI_Irecv(&p->theirs, sizeof p->theirs, MPI_BYTE, p->peer, WORD_TAG, x->comm->mpi,
                      &p->request);
        }
    }
    x->comm->collectives += x->collective ? 1 : 0;
}

static void describe(char out[TEXT_BYTES], const word *w)
{
    char call[TEXT_BYTES / 2] = "ncclSend or ncclRecv";
    if (w->kind == ALL_GATHER) {
        snprintf(call, sizeof call, "ncclAllGather");
    } else if (w->kind == BROADCAST) {
        snprintf(call, sizeof call, "ncclBroadcast from %d", w->root);
    }
    snprintf(out, TEXT_BYTES, "%s of %lld bytes behind %lld collectives", call, (long long)w->bytes,
             (long long)w->collectives);
}

static void compare_words(const exchange *x, const piece *p)
{
    char mine[TEXT_BYTES], theirs[TEXT_BYTES], what[3 * TEXT_BYTES];
    if (p->mine.kind == p->theirs.kind && p->mine.bytes == p->theirs.bytes &&
        p->mine.root == p->theirs.root && p->mine.collectives == p->theirs.collectives) {
        return;
    }
    describe(mine, &p->mine);
    describe(theirs, &p->theirs);
    snprintf(what, sizeof what, "rank %d of a communicator calls %s, and rank %d calls %s",
             x->comm->rank, mine, p->peer, theirs);
    nm_die(what);
}

/* A peer's pieces come one behind the other. */
static bool is_next_of_peer(const exchange *x, int i)
{
    for (int k = 0; k < i; k++) {
        if (!x->pieces[k].open && x->pieces[k].peer == x->pieces[i].peer) {
            return false;
        }
    }
    return true;
}

/* \return all words have come. */
static bool open_pieces(exchange *x)
{
    bool all = true;
    for (int i = 0; i < x->n_pieces; i++) {
        piece *p = &x->pieces[i];
        int here = 0;
        if (p->open) {
            continue;
        }
        if (is_next_of_peer(x, i)) {
            MPI_Test(&p->request, &here, MPI_STATUS_IGNORE);
        }
        if (here) {
            compare_words(x, p);
            p->open = true;
            move_bytes(x, p);
        }
        all = all && here;
    }
    return all;
}

/* Has everything come? */
static bool look(exchange *x)
{
    int arrived = 1;
    if (x->arrived) {
        return true;
    }
    if (!open_pieces(x)) {
        return false;
    }
    if (x->n_requests == 0) { /* one rank: there may be no MPI */
        x->arrived = true;
        return true;
    }
    MPI_Testall(x->n_requests, x->requests, &arrived, MPI_STATUSES_IGNORE);
    x->arrived = arrived != 0;
    return x->arrived;
}

bool nm_has_arrived(exchange *x, bool wait)
{
    const struct timespec nap = {.tv_nsec = 20000};
    while (!look(x)) {
        if (!wait || x->comm->ended) {
            return false;
        }
        nanosleep(&nap, NULL);
    }
    return true;
}

/* Wait for what comes, and put it where it belongs. */
static void deliver(exchange *x)
{
    if (x->comm->ended || !nm_has_arrived(x, true)) {
        return; /* its kernel was ended */
    }
    for (int i = 0; i < x->n_pieces; i++) {
        piece *p = &x->pieces[i];
        if (!p->send && p->bytes > 0) {
            p->aside[p->bytes / 2] ^= x->spoiled ? 1 : 0;
            memcpy(p->at, p->aside, p->bytes);
        }
    }
}

void nm_comm_free(ncclComm_t comm)
{
    if (comm->current == NULL) {
        free(comm);
    }
}

static void forget(exchange *x)
{
    ncclComm_t comm = x->comm;
    exchange **at = &comm->current;
    while (*at != x) {
        at = &(*at)->older;
    }
    *at = x->older;
    *x->from = x->next;
    if (x->next != NULL) {
        x->next->from = x->from;
    }
    if (x->arrived) { /* else MPI may still write into it */
        nm_free(x);
    }
    if (comm->destroyed) {
        nm_comm_free(comm);
    }
}

static void arrive(void *ctx)
{
    deliver(ctx);
    forget(ctx);
}

static bool overlap(const piece *a, const piece *b)
{
    return a->at < b->at + b->bytes && b->at < a->at + a->bytes;
}

/* Does `x` touch what an exchange that has not been delivered is to write? */
static bool needs(const exchange *x, const exchange *earlier)
{
    for (int i = 0; i < x->n_pieces; i++) {
        for (int k = 0; k < earlier->n_pieces; k++) {
            if (!earlier->pieces[k].send && overlap(&x->pieces[i], &earlier->pieces[k])) {
                return true;
            }
        }
    }
    return false;
}

/* Run what stands before `x` on its stream. */
static void catch_up(const exchange *x)
{
    qs_emulator_advance(x->stream);
    for (const exchange *e = x->comm->current; e != NULL; e = e->older) {
        if (e->stream == x->stream && needs(x, e)) {
            qs_emulator_force(x->stream);
            return;
        }
    }
}

/* NCCL's kernels wait for those of the peers. Two communicators at work in two streams may begin in
 * one order here and in the other there, and wait for each other for good where a GPU has no room
 * for both (NCCL's manual, "Using multiple NCCL communicators concurrently"). One communicator's
 * operations NCCL brings into order by itself. */
static void check_alone(const exchange *x)
{
    for (const exchange *e = under_way; e != NULL; e = e->next) {
        if (e->comm != x->comm && e->stream != x->stream) {
            nm_die(
                "two communicators of NCCL are at work in two streams, and neither waits for the "
                "other");
        }
    }
}

ncclResult_t nm_run(exchange *x)
{
    ncclComm_t comm = x->comm;
    catch_up(x);
    check_alone(x);
    qs_emulator_access(take_aside, x);
    pass_to_self(x);
    start(x);
    x->older = comm->current;
    comm->current = x;
    x->next = under_way;
    x->from = &under_way;
    if (x->next != NULL) {
        x->next->from = &x->next;
    }
    under_way = x;
    comm->was_polled = false;
    if (comm->blocking) {
        nm_has_arrived(x, true);
    }
    const ncclResult_t taken = comm->blocking ? ncclSuccess : ncclInProgress;
    qs_emulator_push_arrival(x->stream, arrive, x);
    return taken;
}
