/* Rows of the embedding table by all-to-all: ids go to the owners, rows come back as stored.
 *
 *   tokens    7 3 7 9 3        each id is asked for once
 *   want    | 3 | 7 9 |        grouped by owner
 *   rows    | r3| r7 r9|       the answers lie where their ids lay
 *   out       r7 r3 r7 r9 r3   widened or rounded to the compute type
 *
 * Row i of the table is raw quantum i % head_chunk_rows of chunk i / head_chunk_rows, so its owner
 * is arithmetic. Ids are the host's affair; rows move between device memories.
 *
 * A request goes through three calls, so that compute can lie between them: `ask` sends the ids,
 * `answer` sends the rows that the others' ids ask for, `place` takes the rows that have come.
 * While rows of one request are on their way, the ids of the next can be.
 *
 * Rows come in rounds, in which a rank gets at most `round` of them from each owner: an owner of
 * frequent ids needs room for one round of everybody's, not for all that everybody wants. With ids
 * spread evenly there is one round. `ask` sends those of the first; should there be more, `answer`
 * waits for them. Everybody knows how many there are, for every message of ids begins with what
 * its sender wants of its receiver, and with the most that it wants of anybody:
 *
 *   | count | most | id id id ... |      one size for all, so that nothing need be told before */
#include <assert.h>
#include <string.h>

#include "base/mem.h"
#include "base/minmax.h"
#include "base/timer.h"
#include "base/trace.h"
#include "fsdp/fsdp_impl.h"

enum { COUNT, MOST, HEADER }; /* of a message of ids */
enum { NO_IDS = -1 };         /* as a count: the sender has failed */

typedef struct {
    int unit;
    int owner;
    int64_t local; /* quantum within the owner's message */
} row_place;

static row_place place_of(const qs_fsdp *f, int64_t id)
{
    row_place place;
    place.unit = qs_base_embed_unit(f->index, (int)(id / f->index->head_chunk_rows));
    int64_t row = id % f->index->head_chunk_rows;
    int64_t per_rank = f->layouts[place.unit].raw_per_rank;
    place.owner = (int)(row / per_rank);
    place.local = row % per_rank;
    return place;
}

static const qs_unit_size *table_size(const qs_base_index *index)
{
    return &index->units[qs_base_embed_unit(index, 0)].size;
}

/* ---- sizes, create, destroy ---- */

static int64_t room_of(const qs_base_index *index, const qs_fsdp_options *options)
{
    return qs_min_i64(options->max_tokens, index->config.vocab);
}

/* Twice the even share, so that uneven ids rarely need a second round. */
static int64_t round_of(int64_t room, int nranks)
{
    return qs_min_i64(room, (2 * room + nranks - 1) / nranks);
}

/* Elements of a message of ids to one rank. */
static size_t message_of(int64_t round)
{
    return (size_t)round + HEADER;
}

void qs_embed_plan(const qs_base_index *index, int nranks, const qs_fsdp_options *options,
                   qs_fsdp_bytes *bytes)
{
    const size_t room = (size_t)room_of(index, options), n = (size_t)nranks;
    const int64_t round = round_of((int64_t)room, nranks);
    const size_t asked = (size_t)round * n;
    const size_t row_bytes = qs_raw_quantum_bytes(table_size(index));
    const size_t index_bytes = (size_t)options->max_tokens * sizeof(int32_t);
    const size_t ids = room + 2 * n * message_of(round); /* of a request */
    bytes->embed_device_bytes =
        (room + asked) * row_bytes + asked * sizeof(int64_t) + QS_EMBED_OPEN_MAX * index_bytes;
    bytes->embed_host_bytes =
        ((size_t)index->config.vocab + room + QS_EMBED_OPEN_MAX * ids) * sizeof(int32_t);
}

void qs_embed_free(qs_fsdp *f)
{
    qs_embed *e = &f->embed;
    for (int i = 0; i < QS_EMBED_OPEN_MAX; i++) {
        qs_embed_request *r = &e->requests[i];
        void *const owned[] = {r->want, r->at, r->sent, r->received};
        for (size_t k = 0; k < sizeof owned / sizeof *owned; k++) {
            qs_mem_free(owned[k]);
        }
        qs_mirror_destroy(f->device, &r->index);
    }
    void *const owned[] = {e->row_of, e->unique, e->counts, e->exchange};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) {
        qs_mem_free(owned[i]);
    }
    qs_mirror_destroy(f->device, &e->asked_at);
    qs_device_free(f->device, e->answer);
    qs_device_free(f->device, e->rows);
}

static qs_status allocate_request(qs_fsdp *f, qs_embed_request *r)
{
    const size_t ids = (size_t)f->nranks * message_of(f->embed.round);
    QS_TRY(QS_ALLOC(&r->want, f->embed.room, QS_MEM_WORK));
    QS_TRY(QS_ALLOC(&r->at, f->nranks + 1, QS_MEM_WORK));
    QS_TRY(QS_ALLOC(&r->sent, ids, QS_MEM_WORK));
    QS_TRY(QS_ALLOC(&r->received, ids, QS_MEM_WORK));
    return qs_mirror_create(f->device, &r->index, (size_t)f->options.max_tokens * sizeof(int32_t),
                            QS_MEM_WORK);
}

qs_status qs_embed_init(qs_fsdp *f)
{
    qs_embed *e = &f->embed;
    const int64_t vocab = f->index->config.vocab, n = f->nranks;
    const int64_t row_bytes = (int64_t)qs_raw_quantum_bytes(table_size(f->index));
    e->room = room_of(f->index, &f->options);
    e->round = round_of(e->room, f->nranks);
    const int64_t asked = n * e->round;
    QS_TRY(QS_ALLOC(&e->row_of, vocab, QS_MEM_WORK));
    for (int64_t i = 0; i < vocab; i++) {
        e->row_of[i] = -1;
    }
    QS_TRY(QS_ALLOC(&e->unique, e->room, QS_MEM_WORK));
    QS_TRY(QS_ALLOC(&e->counts, 4 * n, QS_MEM_WORK));
    QS_TRY(QS_ALLOC(&e->exchange, 4 * n, QS_MEM_WORK));
    for (int i = 0; i < QS_EMBED_OPEN_MAX; i++) {
        QS_TRY(allocate_request(f, &e->requests[i]));
    }
    QS_TRY(qs_mirror_create(f->device, &e->asked_at, (size_t)asked * sizeof(int64_t), QS_MEM_WORK));
    QS_TRY(QS_DEVICE_ALLOC(f->device, &e->answer, asked * row_bytes, QS_MEM_WORK));
    return QS_DEVICE_ALLOC(f->device, &e->rows, e->room * row_bytes, QS_MEM_WORK);
}

/* ---- exchanges ---- */

/* An all-to-all of `item` bytes each: items [send_at[r], + send_count[r]) go to rank r, what comes
 * from it lies at recv_at[r]. */
typedef struct {
    const void *send;
    void *recv;
    const int64_t *send_count, *recv_count; /* NULL: `every` for each rank */
    const int64_t *send_at, *recv_at;       /* NULL: one behind the other */
    int64_t every;
    size_t item;
} exchange;

static qs_status run_exchange(qs_fsdp *f, qs_queue *queue, const exchange *x)
{
    const size_t n = (size_t)f->nranks;
    size_t *send_bytes = f->embed.exchange, *send_at = send_bytes + n;
    size_t *recv_bytes = send_at + n, *recv_at = recv_bytes + n;
    size_t sent = 0, received = 0;
    for (size_t r = 0; r < n; r++) {
        send_bytes[r] = (size_t)(x->send_count != NULL ? x->send_count[r] : x->every) * x->item;
        recv_bytes[r] = (size_t)(x->recv_count != NULL ? x->recv_count[r] : x->every) * x->item;
        send_at[r] = x->send_at != NULL ? (size_t)x->send_at[r] * x->item : sent;
        recv_at[r] = x->recv_at != NULL ? (size_t)x->recv_at[r] * x->item : received;
        sent += send_bytes[r];
        received += recv_bytes[r];
    }
    const qs_comm_traffic before = qs_comm_get_traffic(f->comm, QS_COMM_EXCHANGES);
    QS_TRY(qs_comm_all_to_all_v(f->comm, x->send, send_bytes, send_at, x->recv, recv_bytes, recv_at,
                                queue));
    const qs_comm_traffic after = qs_comm_get_traffic(f->comm, QS_COMM_EXCHANGES);
    f->stats.embedding.calls += after.calls - before.calls;
    f->stats.embedding.messages += after.messages - before.messages;
    f->stats.embedding.bytes += after.bytes - before.bytes;
    return QS_OK;
}

/* ---- ask ---- */

static qs_status check_ids(const qs_fsdp *f, const int32_t *tokens, int64_t count)
{
    const int64_t vocab = f->index->config.vocab;
    if (count > f->options.max_tokens) {
        return QS_FAIL(QS_ERR_BUG, "embedding of %lld tokens in room for %lld", (long long)count,
                       (long long)f->options.max_tokens);
    }
    for (int64_t i = 0; i < count; i++) {
        if (tokens[i] < 0 || tokens[i] >= vocab) {
            return QS_FAIL(QS_ERR_BUG, "token id %d at %lld is outside the vocabulary of %lld",
                           (int)tokens[i], (long long)i, (long long)vocab);
        }
    }
    return QS_OK;
}

/* Fill `want`, `at` and `index` of the request: which ids, of whom, and where each token's row will
 * lie. */
static qs_status collect_ids(qs_fsdp *f, qs_embed_request *r, const int32_t *tokens)
{
    qs_embed *e = &f->embed;
    int64_t n_unique = 0;
    int32_t *index = r->index.host;
    memset(r->at, 0, (size_t)(f->nranks + 1) * sizeof *r->at);
    QS_TRY(qs_event_wait(r->index_read));
    for (int64_t i = 0; i < r->tokens; i++) {
        if (e->row_of[tokens[i]] < 0) {
            e->row_of[tokens[i]] = 0;
            e->unique[n_unique++] = tokens[i];
            r->at[place_of(f, tokens[i]).owner + 1]++;
        }
    }
    for (int k = 0; k < f->nranks; k++) {
        r->at[k + 1] += r->at[k];
    }
    /* Place the ids owner by owner; at[k] runs to the end of k's group, and is turned back after.
     */
    for (int64_t i = 0; i < n_unique; i++) {
        const int64_t to = r->at[place_of(f, e->unique[i]).owner]++;
        r->want[to] = e->unique[i];
        e->row_of[e->unique[i]] = (int32_t)to;
    }
    for (int k = f->nranks; k > 0; k--) {
        r->at[k] = r->at[k - 1];
    }
    r->at[0] = 0;
    for (int64_t i = 0; i < r->tokens; i++) {
        index[i] = e->row_of[tokens[i]];
    }
    for (int64_t i = 0; i < n_unique; i++) {
        e->row_of[e->unique[i]] = -1;
    }
    return QS_OK;
}

/* The messages of a request that could be collected, or not. */
static void write_messages(const qs_fsdp *f, qs_embed_request *r)
{
    const bool good = r->st == QS_OK;
    int64_t most = 0;
    for (int k = 0; k < f->nranks && good; k++) {
        const int64_t wanted = r->at[k + 1] - r->at[k];
        most = wanted > most ? wanted : most;
    }
    for (int k = 0; k < f->nranks; k++) {
        int32_t *message = r->sent + (size_t)k * message_of(f->embed.round);
        const int64_t wanted = good ? r->at[k + 1] - r->at[k] : 0;
        message[COUNT] = good ? (int32_t)wanted : NO_IDS;
        message[MOST] = (int32_t)most;
        memcpy(message + HEADER, r->want + (good ? r->at[k] : 0),
               (size_t)qs_min_i64(wanted, f->embed.round) * sizeof *message);
    }
}

int qs_fsdp_embed_open(const qs_fsdp *f)
{
    return f->embed.open;
}

qs_status qs_fsdp_embed_ask(qs_fsdp *f, const int32_t *tokens, int64_t count)
{
    qs_embed *e = &f->embed;
    if (e->open == QS_EMBED_OPEN_MAX) {
        return QS_FAIL(QS_ERR_BUG, "more than %d requests for rows of the embedding",
                       QS_EMBED_OPEN_MAX);
    }
    qs_embed_request *r = &e->requests[(e->first + e->open) % QS_EMBED_OPEN_MAX];
    e->open++;
    r->tokens = count;
    r->st = check_ids(f, tokens, count);
    r->st = r->st == QS_OK ? collect_ids(f, r, tokens) : r->st;
    write_messages(f, r);
    const exchange ids = {.send = r->sent,
                          .recv = r->received,
                          .every = (int64_t)message_of(e->round),
                          .item = sizeof *r->sent};
    QS_TRY(run_exchange(f, f->host_queue, &ids));
    r->arrived = qs_event_record(f->host_queue);
    return QS_OK;
}

/* ---- answer ---- */

/* What is asked of this rank has come: rounds that everybody takes part in. A rank that failed
 * makes all of them fail alike. */
static qs_status read_headers(qs_fsdp *f, const qs_embed_request *r, int64_t *rounds)
{
    int64_t most = 0;
    bool failed = false;
    for (int k = 0; k < f->nranks; k++) {
        const int32_t *message = r->received + (size_t)k * message_of(f->embed.round);
        failed = failed || message[COUNT] == NO_IDS;
        most = message[MOST] > most ? message[MOST] : most;
    }
    *rounds = (most + f->embed.round - 1) / f->embed.round;
    return failed ? qs_comm_agree(f->comm, r->st) : QS_OK;
}

/* Start of the vocabulary's shares: rows are found by their distance from it. */
static const uint8_t *vocabulary_base(const qs_fsdp *f)
{
    return f->options.offload_vocabulary ? f->host_shares : f->shares;
}

/* Copy the rows that were asked for into `answer`, rank by rank, on the queue of their exchange. */
static qs_status copy_answer(qs_fsdp *f, const qs_embed_request *r, const int64_t *asked,
                             size_t row_bytes)
{
    qs_embed *e = &f->embed;
    const uint8_t *base = vocabulary_base(f);
    int64_t *at = e->asked_at.host, count = 0;
    QS_TRY(qs_event_wait(e->answered)); /* `answer` may still be on its way */
    for (int k = 0; k < f->nranks; k++) {
        const int32_t *ids = r->received + (size_t)k * message_of(e->round) + HEADER;
        for (int64_t i = 0; i < asked[k]; i++) {
            const row_place place = place_of(f, ids[i]);
            assert(place.owner == f->rank);
            at[count++] = (f->share[place.unit] - base) + (int64_t)f->layouts[place.unit].raw_at +
                          place.local * (int64_t)row_bytes;
        }
    }
    QS_TRY(qs_mirror_push(f->row_queue, &e->asked_at, 0, (size_t)count * sizeof *at));
    return f->options.ops->copy_rows(f->row_queue, base, e->asked_at.device, count, row_bytes,
                                     e->answer);
}

/* The ids of a later round, behind the headers, where those of the first one came. */
static qs_status exchange_ids(qs_fsdp *f, qs_embed_request *r, const int64_t *send_at,
                              const int64_t *wanted, const int64_t *asked, int64_t *recv_at)
{
    for (int k = 0; k < f->nranks; k++) {
        recv_at[k] = (int64_t)((size_t)k * message_of(f->embed.round) + HEADER);
    }
    const exchange ids = {.send = r->want,
                          .recv = r->received,
                          .send_count = wanted,
                          .recv_count = asked,
                          .send_at = send_at,
                          .recv_at = recv_at,
                          .item = sizeof *r->want};
    QS_TRY(run_exchange(f, f->host_queue, &ids));
    return qs_event_wait(qs_event_record(f->host_queue));
}

/* Round `number`: ids and rows [number * round, + round) of every pair of ranks. */
static qs_status run_round(qs_fsdp *f, qs_embed_request *r, int64_t number, size_t row_bytes)
{
    qs_embed *e = &f->embed;
    const int64_t n = f->nranks, done = number * e->round;
    int64_t *wanted = e->counts, *asked = wanted + n, *at = asked + n, *recv_at = at + n;
    for (int k = 0; k < n; k++) {
        const int64_t of_mine = r->at[k + 1] - r->at[k] - done;
        const int64_t of_theirs = r->received[(size_t)k * message_of(e->round) + COUNT] - done;
        wanted[k] = of_mine > 0 ? qs_min_i64(of_mine, e->round) : 0;
        asked[k] = of_theirs > 0 ? qs_min_i64(of_theirs, e->round) : 0;
        at[k] = r->at[k] + done; /* not looked at where nothing is wanted */
    }
    if (number > 0) {
        QS_TRY(exchange_ids(f, r, at, wanted, asked, recv_at));
    }
    QS_TRY(copy_answer(f, r, asked, row_bytes));
    const exchange rows = {.send = e->answer,
                           .recv = e->rows,
                           .send_count = asked,
                           .recv_count = wanted,
                           .recv_at = at,
                           .item = row_bytes};
    QS_TRY(run_exchange(f, f->row_queue, &rows));
    e->answered = qs_event_record(f->row_queue);
    return QS_OK;
}

/* Behind the rows in their queue: they are there now. */
static qs_status note_end(void *ctx, bool *finished)
{
    const qs_embed *e = ctx;
    qs_trace_add(QS_LANE_GATHER, e->departed_s, qs_time_s(), "rows of the embedding");
    *finished = true;
    return QS_OK;
}

qs_status qs_fsdp_embed_answer(qs_fsdp *f)
{
    qs_embed *e = &f->embed;
    qs_embed_request *r = &e->requests[e->first];
    const size_t row_bytes = qs_raw_quantum_bytes(table_size(f->index));
    int64_t rounds = 0;
    if (e->open == 0 || e->is_answered) {
        return QS_OK;
    }
    e->is_answered = true;
    QS_TRY(qs_event_wait(r->arrived));
    QS_TRY(read_headers(f, r, &rounds));
    QS_TRY(qs_queue_after(f->row_queue, e->rows_read));
    e->departed_s = qs_time_s();
    for (int64_t i = 0; i < rounds; i++) {
        QS_TRY(run_round(f, r, i, row_bytes));
    }
    if (f->nranks > 1 && qs_device_is_host(f->device)) { /* a GPU's queue does not tell */
        QS_TRY(qs_queue_push(f->row_queue, note_end, NULL, e));
    }
    e->landed = qs_event_record(f->row_queue);
    return QS_OK;
}

/* ---- place ---- */

static qs_status wait_for_rows(qs_fsdp *f)
{
    const double since = qs_time_s();
    const qs_status st = qs_queue_after(f->compute, f->embed.landed);
    f->stats.wait_s += qs_trace_wait(since, "wait for rows of the embedding");
    return st;
}

static qs_status spread_rows(qs_fsdp *f, qs_embed_request *r, qs_dtype dtype, void *out)
{
    qs_embed *e = &f->embed;
    const qs_unit_size *table = table_size(f->index);
    const int64_t hidden = table->raw_quantum_elems;
    QS_TRY(qs_mirror_push(f->compute, &r->index, 0, (size_t)r->tokens * sizeof(int32_t)));
    r->index_read = qs_event_record(f->compute);
    const qs_mat rows = {e->rows, e->room, hidden, hidden, table->raw_dtype};
    qs_mat to = {out, r->tokens, hidden, hidden, dtype};
    QS_TRY(f->options.ops->gather_rows(f->compute, &rows, r->index.device, &to));
    e->rows_read = qs_event_record(f->compute);
    return QS_OK;
}

qs_status qs_fsdp_embed_place(qs_fsdp *f, qs_dtype dtype, void *out)
{
    qs_embed *e = &f->embed;
    if (e->open == 0) {
        return QS_FAIL(QS_ERR_BUG, "no rows of the embedding have been asked for");
    }
    QS_TRY(qs_fsdp_embed_answer(f));
    QS_TRY(wait_for_rows(f));
    QS_TRY(spread_rows(f, &e->requests[e->first], dtype, out));
    e->first = (e->first + 1) % QS_EMBED_OPEN_MAX;
    e->open--;
    e->is_answered = false;
    return QS_OK;
}

qs_status qs_fsdp_embed(qs_fsdp *f, const int32_t *tokens, int64_t count, void *out)
{
    if (f->embed.open > 0) {
        return QS_FAIL(QS_ERR_BUG, "rows of the embedding have been asked for and not taken");
    }
    QS_TRY(qs_fsdp_embed_ask(f, tokens, count));
    return qs_fsdp_embed_place(f, f->options.ops->act_dtype, out);
}
