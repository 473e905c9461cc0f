/* Rows of the embedding table by all-to-all: ids go to the owners, rows come back as stored.
 *
 *   tokens    7 3 7 9 3        each id is asked for once
 *   want    | 3 | 7 9 |        grouped by owner
 *   rows    | r3| r7 r9|       the answers lie where their ids lay
 *   out       r7 r3 r7 r9 r3   widened or rounded to the compute type
 *
 * Row i of the table is raw quantum i % head_chunk_rows of chunk i / head_chunk_rows, so its owner
 * is arithmetic. Ids are the host's affair; rows move between device memories. They come in rounds,
 * in which a rank gets at most `round` rows from each owner: an owner of frequent ids needs room
 * for one round of everybody's, not for all that everybody wants. With ids spread evenly there is
 * one round. */
#include <assert.h>
#include <string.h>

#include "base/mem.h"
#include "fsdp/fsdp_impl.h"

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

static int64_t least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static int64_t room_of(const qs_base_index *index, const qs_fsdp_options *options)
{
    return least(options->max_tokens, index->config.vocab);
}

/* Twice the even share, so that uneven ids rarely need a second round. */
static int64_t round_of(int64_t room, int nranks)
{
    return least(room, (2 * room + nranks - 1) / nranks);
}

void qs_embed_plan(const qs_base_index *index, int nranks, const qs_fsdp_options *options,
                   qs_fsdp_bytes *bytes)
{
    const size_t room = (size_t)room_of(index, options);
    const size_t asked = (size_t)(round_of((int64_t)room, nranks) * nranks);
    const size_t row_bytes = qs_raw_quantum_bytes(table_size(index));
    bytes->embed_device_bytes = (room + asked) * row_bytes + asked * sizeof(int64_t) +
                                (size_t)options->max_tokens * sizeof(int32_t);
    bytes->embed_host_bytes = ((size_t)index->config.vocab + 2 * room + asked) * sizeof(int32_t);
}

void qs_embed_free(qs_fsdp *f)
{
    qs_embed *e = &f->embed;
    void *const owned[] = {e->row_of, e->unique, e->want, e->asked, e->counts, e->exchange, e->at};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) {
        qs_mem_free(owned[i]);
    }
    qs_mirror_destroy(f->device, &e->asked_at);
    qs_mirror_destroy(f->device, &e->index);
    qs_device_free(f->device, e->answer);
    qs_device_free(f->device, e->rows);
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
    QS_TRY(QS_ALLOC(&e->want, e->room, QS_MEM_WORK));
    QS_TRY(QS_ALLOC(&e->asked, asked, QS_MEM_WORK));
    QS_TRY(QS_ALLOC(&e->counts, 4 * n, QS_MEM_WORK));
    QS_TRY(QS_ALLOC(&e->exchange, 4 * n, QS_MEM_WORK));
    QS_TRY(QS_ALLOC(&e->at, n + 1, QS_MEM_WORK));
    QS_TRY(qs_mirror_create(f->device, &e->asked_at, (size_t)asked * sizeof(int64_t), QS_MEM_WORK));
    QS_TRY(qs_mirror_create(f->device, &e->index, (size_t)f->options.max_tokens * sizeof(int32_t),
                            QS_MEM_WORK));
    QS_TRY(QS_DEVICE_ALLOC(f->device, &e->answer, asked * row_bytes, QS_MEM_WORK));
    return QS_DEVICE_ALLOC(f->device, &e->rows, e->room * row_bytes, QS_MEM_WORK);
}

/* ---- which ids, of whom ---- */

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

/* Fill `unique`, `want`, `row_of`, `at` and the first quarter of `counts`. On an error no row is
 * wanted. */
static qs_status collect_ids(qs_fsdp *f, const int32_t *tokens, int64_t count, int64_t *n_unique)
{
    qs_embed *e = &f->embed;
    memset(e->counts, 0, 2 * (size_t)f->nranks * sizeof *e->counts);
    memset(e->at, 0, (size_t)(f->nranks + 1) * sizeof *e->at);
    *n_unique = 0;
    QS_TRY(check_ids(f, tokens, count));
    for (int64_t i = 0; i < count; i++) {
        if (e->row_of[tokens[i]] < 0) {
            e->row_of[tokens[i]] = 0;
            e->unique[(*n_unique)++] = tokens[i];
            e->counts[place_of(f, tokens[i]).owner]++;
        }
    }
    for (int r = 0; r < f->nranks; r++) {
        e->at[r + 1] = e->at[r] + e->counts[r];
    }
    /* Place the ids owner by owner; at[r] runs to the end of r's group, and is turned back after.
     */
    for (int64_t i = 0; i < *n_unique; i++) {
        int64_t to = e->at[place_of(f, e->unique[i]).owner]++;
        e->want[to] = e->unique[i];
        e->row_of[e->unique[i]] = (int32_t)to;
    }
    for (int r = f->nranks; r > 0; r--) {
        e->at[r] = e->at[r - 1];
    }
    e->at[0] = 0;
    return QS_OK;
}

static void forget_ids(qs_embed *e, int64_t n_unique)
{
    for (int64_t i = 0; i < n_unique; i++) {
        e->row_of[e->unique[i]] = -1;
    }
}

/* Tell every owner how many rows are wanted (one number to each rank), and agree on the rounds. */
static qs_status exchange_counts(qs_fsdp *f, qs_status mine, int64_t *rounds)
{
    const size_t n = (size_t)f->nranks;
    size_t *bytes = f->embed.exchange, *at = bytes + n;
    for (size_t r = 0; r < n; r++) {
        bytes[r] = sizeof(int64_t);
        at[r] = r * sizeof(int64_t);
    }
    QS_TRY(qs_comm_all_to_all_v(f->comm, f->embed.counts, bytes, at, f->embed.counts + n, bytes, at,
                                f->host_queue));
    QS_TRY(qs_queue_wait(f->host_queue));
    QS_TRY(qs_comm_agree(f->comm, mine)); /* after a failure here nothing was wanted */
    *rounds = 0;
    for (size_t r = 0; r < n; r++) {
        const int64_t of_rank = (f->embed.counts[r] + f->embed.round - 1) / f->embed.round;
        *rounds = of_rank > *rounds ? of_rank : *rounds;
    }
    return qs_comm_max_i64(f->comm, rounds, 1);
}

/* ---- a round ---- */

/* Bytes and offsets of an exchange of `item` bytes: items [send_at[r], + send_counts[r]) go to rank
 * r; what comes from it lies at recv_at[r]. Offsets NULL: packed in rank order. */
static qs_status exchange_items(qs_fsdp *f, qs_queue *queue, const void *send,
                                const int64_t *send_first, const int64_t *send_counts, void *recv,
                                const int64_t *recv_first, const int64_t *recv_counts, size_t item)
{
    const size_t n = (size_t)f->nranks;
    size_t *send_bytes = f->embed.exchange, *send_at = send_bytes + n;
    size_t *recv_bytes = send_at + n, *recv_at = recv_bytes + n;
    size_t sent = 0, received = 0;
    for (size_t r = 0; r < n; r++) {
        send_bytes[r] = (size_t)send_counts[r] * item;
        recv_bytes[r] = (size_t)recv_counts[r] * item;
        send_at[r] = send_first != NULL ? (size_t)send_first[r] * item : sent;
        recv_at[r] = recv_first != NULL ? (size_t)recv_first[r] * item : received;
        sent += send_bytes[r];
        received += recv_bytes[r];
    }
    return qs_comm_all_to_all_v(f->comm, send, send_bytes, send_at, recv, recv_bytes, recv_at,
                                queue);
}

/* Start of the vocabulary's shares: rows are found by their distance from it. */
static const uint8_t *vocabulary_base(const qs_fsdp *f)
{
    return f->options.offload_vocabulary ? f->host_shares : f->shares;
}

/* Copy the rows that were asked for into `answer`, on the queue of the exchange. */
static qs_status answer_ids(qs_fsdp *f, int64_t n_asked, size_t row_bytes)
{
    qs_embed *e = &f->embed;
    const uint8_t *base = vocabulary_base(f);
    int64_t *at = e->asked_at.host;
    QS_TRY(qs_event_wait(e->answered)); /* `answer` may still be on its way */
    for (int64_t i = 0; i < n_asked; i++) {
        const row_place place = place_of(f, e->asked[i]);
        assert(place.owner == f->rank);
        at[i] = (f->share[place.unit] - base) + (int64_t)f->layouts[place.unit].raw_at +
                place.local * (int64_t)row_bytes;
    }
    QS_TRY(qs_mirror_push(f->queue, &e->asked_at, 0, (size_t)n_asked * sizeof *at));
    return f->options.ops->copy_rows(f->queue, base, e->asked_at.device, n_asked, row_bytes,
                                     e->answer);
}

/* Round `number`: ids [number * round, + round) of every pair of ranks. */
static qs_status run_round(qs_fsdp *f, int64_t number, size_t row_bytes)
{
    qs_embed *e = &f->embed;
    const int64_t *wanted = e->counts, *asked_of_me = e->counts + f->nranks;
    int64_t *now_wanted = e->counts + 2 * f->nranks, *now_asked = now_wanted + f->nranks;
    const int64_t done = number * e->round;
    int64_t n_asked = 0;
    for (int r = 0; r < f->nranks; r++) {
        now_wanted[r] = least(wanted[r] > done ? wanted[r] - done : 0, e->round);
        now_asked[r] = least(asked_of_me[r] > done ? asked_of_me[r] - done : 0, e->round);
        n_asked += now_asked[r];
    }
    /* at[r] is where the round's part of owner r's group begins. */
    QS_TRY(exchange_items(f, f->host_queue, e->want, e->at, now_wanted, e->asked, NULL, now_asked,
                          sizeof *e->want));
    QS_TRY(qs_queue_wait(f->host_queue));
    QS_TRY(answer_ids(f, n_asked, row_bytes));
    QS_TRY(exchange_items(f, f->queue, e->answer, NULL, now_asked, e->rows, e->at, now_wanted,
                          row_bytes));
    e->answered = qs_event_record(f->queue);
    for (int r = 0; r < f->nranks; r++) {
        e->at[r] += now_wanted[r];
    }
    return QS_OK;
}

/* ---- the whole ---- */

static qs_status fetch_rows(qs_fsdp *f, qs_status mine, size_t row_bytes)
{
    int64_t rounds = 0;
    QS_TRY(exchange_counts(f, mine, &rounds));
    QS_TRY(qs_queue_after(f->queue, f->embed.rows_read));
    for (int64_t i = 0; i < rounds; i++) {
        QS_TRY(run_round(f, i, row_bytes));
    }
    return qs_queue_after(f->compute, qs_event_record(f->queue));
}

static qs_status place_rows(qs_fsdp *f, const int32_t *tokens, int64_t count, void *out)
{
    qs_embed *e = &f->embed;
    const qs_unit_size *table = table_size(f->index);
    const int64_t hidden = table->raw_quantum_elems;
    int32_t *index = e->index.host;
    QS_TRY(qs_event_wait(e->index_read));
    for (int64_t i = 0; i < count; i++) {
        index[i] = e->row_of[tokens[i]];
    }
    QS_TRY(qs_mirror_push(f->compute, &e->index, 0, (size_t)count * sizeof *index));
    e->index_read = qs_event_record(f->compute);
    const qs_mat rows = {e->rows, e->room, hidden, hidden, table->raw_dtype};
    qs_mat to = {out, count, hidden, hidden, f->options.ops->act_dtype};
    QS_TRY(f->options.ops->gather_rows(f->compute, &rows, e->index.device, &to));
    e->rows_read = qs_event_record(f->compute);
    return QS_OK;
}

qs_status qs_fsdp_embed(qs_fsdp *f, const int32_t *tokens, int64_t count, void *out)
{
    const size_t row_bytes = qs_raw_quantum_bytes(table_size(f->index));
    int64_t n_unique = 0;
    qs_status st = collect_ids(f, tokens, count, &n_unique);
    st = fetch_rows(f, st, row_bytes);
    if (st == QS_OK) {
        st = place_rows(f, tokens, count, out);
    }
    forget_ids(&f->embed, n_unique);
    return st;
}
