/* Rows of the embedding table by all-to-all: ids go to the owners, rows come back as stored.
 *
 *   tokens    7 3 7 9 3        each id is asked for once
 *   want    | 3 | 7 9 |        grouped by owner
 *   rows    | r3| r7 r9|       the answers lie where their ids lay
 *   out       r7 r3 r7 r9 r3   widened to floats
 *
 * Row i of the table is raw quantum i % head_chunk_rows of chunk i / head_chunk_rows, so its owner
 * is arithmetic. */
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

static const qs_unit_size *table_size(const qs_fsdp *f)
{
    return &f->index->units[qs_base_embed_unit(f->index, 0)].size;
}

void qs_embed_free(qs_embed *e)
{
    qs_mem_free(e->row_of);
    qs_mem_free(e->unique);
    qs_mem_free(e->want);
    qs_mem_free(e->rows);
    qs_mem_free(e->asked);
    qs_mem_free(e->answer);
    qs_mem_free(e->counts);
    qs_mem_free(e->exchange);
    qs_mem_free(e->at);
}

qs_status qs_embed_init(qs_fsdp *f)
{
    qs_embed *e = &f->embed;
    int64_t vocab = f->index->config.vocab;
    QS_TRY(QS_ALLOC(&e->row_of, vocab, QS_MEM_WORK));
    for (int64_t i = 0; i < vocab; i++) {
        e->row_of[i] = -1;
    }
    QS_TRY(QS_ALLOC(&e->counts, 2 * f->nranks, QS_MEM_WORK));
    QS_TRY(QS_ALLOC(&e->exchange, 4 * f->nranks, QS_MEM_WORK));
    return QS_ALLOC(&e->at, f->nranks + 1, QS_MEM_WORK);
}

/* A larger capacity for `rows` rows, at most `limit` (each id once, or each asker's whole table).
 */
static int64_t grown(int64_t rows, int64_t limit)
{
    return rows > limit / 2 ? limit : 2 * rows;
}

static qs_status reserve_want(qs_embed *e, int64_t rows, int64_t vocab, size_t row_bytes)
{
    if (rows <= e->want_capacity) {
        return QS_OK;
    }
    qs_mem_free(e->unique);
    qs_mem_free(e->want);
    qs_mem_free(e->rows);
    e->unique = e->want = NULL;
    e->rows = NULL;
    e->want_capacity = 0;
    int64_t capacity = grown(rows, vocab);
    QS_TRY(QS_ALLOC(&e->unique, capacity, QS_MEM_WORK));
    QS_TRY(QS_ALLOC(&e->want, capacity, QS_MEM_WORK));
    QS_TRY(QS_ALLOC(&e->rows, (size_t)capacity * row_bytes, QS_MEM_WORK));
    e->want_capacity = capacity;
    return QS_OK;
}

static qs_status reserve_asked(qs_embed *e, int64_t rows, int64_t limit, size_t row_bytes)
{
    if (rows <= e->asked_capacity) {
        return QS_OK;
    }
    qs_mem_free(e->asked);
    qs_mem_free(e->answer);
    e->asked = NULL;
    e->answer = NULL;
    e->asked_capacity = 0;
    int64_t capacity = grown(rows, limit);
    QS_TRY(QS_ALLOC(&e->asked, capacity, QS_MEM_WORK));
    QS_TRY(QS_ALLOC(&e->answer, (size_t)capacity * row_bytes, QS_MEM_WORK));
    e->asked_capacity = capacity;
    return QS_OK;
}

/* Fill `unique`, `want`, `row_of`, `at` and the first half of `counts`. On an error no row is
 * wanted. */
static qs_status collect_ids(qs_fsdp *f, const int32_t *tokens, int64_t count, size_t row_bytes,
                             int64_t *n_unique)
{
    qs_embed *e = &f->embed;
    int64_t vocab = f->index->config.vocab;
    memset(e->counts, 0, 2 * (size_t)f->nranks * sizeof *e->counts);
    memset(e->at, 0, (size_t)(f->nranks + 1) * sizeof *e->at);
    *n_unique = 0;
    for (int64_t i = 0; i < count; i++) {
        if (tokens[i] < 0 || tokens[i] >= vocab) {
            return QS_FAIL(QS_ERR_BUG, "token id %d at %lld is outside the vocabulary of %lld",
                           (int)tokens[i], (long long)i, (long long)vocab);
        }
    }
    QS_TRY(reserve_want(e, count < vocab ? count : vocab, vocab, row_bytes));
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

/* All-to-all of pieces of `item` bytes: send_counts[r] items to rank r, recv_counts[r] from it,
 * both packed in rank order. */
static qs_status exchange_items(qs_fsdp *f, const void *send, const int64_t *send_counts,
                                void *recv, const int64_t *recv_counts, size_t item)
{
    size_t n = (size_t)f->nranks;
    size_t *send_bytes = f->embed.exchange, *send_at = send_bytes + n;
    size_t *recv_bytes = send_at + n, *recv_at = recv_bytes + n;
    size_t sent = 0, received = 0;
    for (size_t r = 0; r < n; r++) {
        send_bytes[r] = (size_t)send_counts[r] * item;
        recv_bytes[r] = (size_t)recv_counts[r] * item;
        send_at[r] = sent;
        recv_at[r] = received;
        sent += send_bytes[r];
        received += recv_bytes[r];
    }
    QS_TRY(qs_comm_all_to_all_v(f->comm, send, send_bytes, send_at, recv, recv_bytes, recv_at,
                                f->queue));
    return qs_event_wait(qs_event_record(f->queue));
}

/* Tell every owner how many rows are wanted: one number to each rank. */
static qs_status exchange_counts(qs_fsdp *f)
{
    size_t n = (size_t)f->nranks;
    size_t *bytes = f->embed.exchange, *at = bytes + n;
    for (size_t r = 0; r < n; r++) {
        bytes[r] = sizeof(int64_t);
        at[r] = r * sizeof(int64_t);
    }
    QS_TRY(qs_comm_all_to_all_v(f->comm, f->embed.counts, bytes, at, f->embed.counts + n, bytes, at,
                                f->queue));
    return qs_event_wait(qs_event_record(f->queue));
}

static void copy_asked_rows(qs_fsdp *f, int64_t n_asked, size_t row_bytes)
{
    qs_embed *e = &f->embed;
    for (int64_t i = 0; i < n_asked; i++) {
        row_place place = place_of(f, e->asked[i]);
        assert(place.owner == f->rank);
        const uint8_t *raw = f->shares + f->share_at[place.unit] + f->layouts[place.unit].raw_at;
        memcpy(e->answer + (size_t)i * row_bytes, raw + (size_t)place.local * row_bytes, row_bytes);
    }
}

static void forget_ids(qs_embed *e, int64_t n_unique)
{
    for (int64_t i = 0; i < n_unique; i++) {
        e->row_of[e->unique[i]] = -1;
    }
}

static qs_status fetch_rows(qs_fsdp *f, qs_status mine, size_t row_bytes)
{
    qs_embed *e = &f->embed;
    const int64_t *wanted = e->counts, *asked_of_me = e->counts + f->nranks;
    QS_TRY(exchange_counts(f)); /* also after a failure here: nothing is wanted then */
    int64_t n_asked = 0;
    for (int r = 0; r < f->nranks; r++) {
        n_asked += asked_of_me[r];
    }
    if (mine == QS_OK) {
        int64_t limit = f->index->config.vocab * f->nranks;
        mine = reserve_asked(e, n_asked, limit, row_bytes);
    }
    QS_TRY(qs_comm_agree(f->comm, mine));
    QS_TRY(exchange_items(f, e->want, wanted, e->asked, asked_of_me, sizeof *e->want));
    copy_asked_rows(f, n_asked, row_bytes);
    return exchange_items(f, e->answer, asked_of_me, e->rows, wanted, row_bytes);
}

qs_status qs_fsdp_embed(qs_fsdp *f, const int32_t *tokens, int64_t count, float *out)
{
    qs_embed *e = &f->embed;
    const qs_unit_size *table = table_size(f);
    size_t row_bytes = qs_raw_quantum_bytes(table);
    int64_t hidden = table->raw_quantum_elems;
    int64_t n_unique = 0;
    qs_status st = collect_ids(f, tokens, count, row_bytes, &n_unique);
    st = fetch_rows(f, st, row_bytes);
    for (int64_t i = 0; st == QS_OK && i < count; i++) {
        const uint8_t *row = e->rows + (size_t)e->row_of[tokens[i]] * row_bytes;
        qs_f32_load(out + i * hidden, row, table->raw_dtype, hidden);
    }
    forget_ids(e, n_unique);
    return st;
}
