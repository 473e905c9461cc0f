/* Greedy continuations. The prompts are dealt out to the ranks; every rank makes the same number of
 * passes, because every pass gathers every unit. A pass sees the whole text again: short samples
 * that show what an adapter has learned, not a server. So a text is printed as soon as it and those
 * before it have ended. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "store/input.h"
#include "store/json.h"
#include "train/evaluate.h"
#include "train/session_plan.h"
#include "train/tokenizers.h"
#include "train/train.h"

typedef struct {
    int64_t prompt_tokens; /* of the prompt alone */
    int64_t length, capacity;
    int32_t *tokens;
    bool ended; /* the model said end of text */
} text;

typedef struct {
    qs_session *session;
    qs_data *data;
    int64_t new_tokens;
    int64_t count; /* texts of this rank */
    int64_t most;  /* texts of the rank that has most */
    text *texts;
    int32_t *shown;  /* [new_tokens + 1] the text that is printed: count, then the new ids */
    int64_t printed; /* prompts of all ranks, in their order */
    int32_t eos[2 * QS_EOS_MAX]; /* of config.json, then of generation_config.json */
    int eos_count;
    qs_batch *batch;
    float *logits; /* [count, vocab] */
    qs_model_shape shape;
    qs_decode_table table;
} sampler;

static qs_status add_eos(sampler *s, const json_t *id)
{
    const qs_base_index *index = s->session->on.index;
    const json_int_t value = json_integer_value(id);
    if (!json_is_integer(id) || s->eos_count == QS_EOS_MAX) {
        return QS_FAIL(QS_ERR_INPUT_VALUE,
                       "%s: eos_token_id of the model's config is neither a token id nor a list of "
                       "at most %d; correct config.json and quantize again",
                       index->path, QS_EOS_MAX);
    }
    if (value >= 0 && value < index->config.vocab) { /* no other comes up */
        s->eos[s->eos_count++] = (int32_t)value;
    }
    return QS_OK;
}

/* eos_token_id of config.json: one id, a list, or none; and what base.h5 has of
 * generation_config.json, which in chat models names the end of a turn. */
static qs_status read_eos(sampler *s)
{
    qs_status st = QS_OK;
    const qs_base_index *index = s->session->on.index;
    json_t *root = NULL;
    QS_TRY(qs_json_parse(&root, index->config_text, strlen(index->config_text), index->path));
    const json_t *eos = json_object_get(root, "eos_token_id");
    if (json_is_array(eos)) {
        for (size_t i = 0; i < json_array_size(eos) && st == QS_OK; i++) {
            st = add_eos(s, json_array_get(eos, i));
        }
    } else if (eos != NULL && !json_is_null(eos)) {
        st = add_eos(s, eos);
    }
    for (int i = 0; i < index->n_eos; i++) {
        s->eos[s->eos_count++] = index->eos[i];
    }
    json_decref(root);
    return st;
}

static bool is_eos(const sampler *s, int32_t id)
{
    for (int i = 0; i < s->eos_count; i++) {
        if (s->eos[i] == id) {
            return true;
        }
    }
    return false;
}

/* Prompt number of this rank's i-th text. */
static int64_t prompt_of(const sampler *s, int rank, int64_t i)
{
    return rank + i * qs_comm_nranks(s->session->comm);
}

static qs_status read_prompts(sampler *s)
{
    const int rank = qs_comm_rank(s->session->comm);
    const qs_data *data = s->data;
    QS_TRY(QS_ALLOC(&s->texts, s->count, QS_MEM_DATA));
    for (int64_t i = 0; i < s->count; i++) {
        const int64_t p = prompt_of(s, rank, i);
        text *t = &s->texts[i];
        t->length = t->prompt_tokens = data->seq_offsets[p + 1] - data->seq_offsets[p];
        t->capacity = t->length + s->new_tokens;
        QS_TRY(QS_ALLOC(&t->tokens, t->capacity, QS_MEM_DATA));
        QS_TRY(qs_data_read(s->data, &p, &p, 1, s->batch));
        memcpy(t->tokens, s->batch->tokens, (size_t)t->length * sizeof *t->tokens);
    }
    return QS_OK;
}

/* All texts of this rank as the documents of one batch. */
static void fill_batch(sampler *s)
{
    qs_batch *b = s->batch;
    int64_t at = 0;
    b->n_sequences = s->count;
    b->n_docs = (int)s->count;
    b->cu_seqlens[0] = 0;
    for (int64_t i = 0; i < s->count; i++) {
        const text *t = &s->texts[i];
        for (int64_t j = 0; j < t->length; j++, at++) {
            b->tokens[at] = t->tokens[j];
            b->position[at] = (int32_t)j;
            b->target[at] = -1;
            b->sample[at] = i;
            b->row_at[at] = j;
        }
        b->cu_seqlens[i + 1] = (int32_t)at;
    }
    b->n_tokens = at;
    b->n_targets = 0;
}

/* The likeliest token; the lowest id of equals. */
static int32_t argmax(const float *logits, int64_t vocab)
{
    int64_t best = 0;
    for (int64_t v = 1; v < vocab; v++) {
        best = logits[v] > logits[best] ? v : best;
    }
    return (int32_t)best;
}

static qs_status extend_all(sampler *s)
{
    const int64_t vocab = s->session->on.index->config.vocab;
    fill_batch(s);
    QS_TRY(qs_model_logits(s->session->model, s->batch, false, s->logits));
    for (int64_t i = 0; i < s->count; i++) {
        text *t = &s->texts[i];
        if (t->ended) {
            continue;
        }
        const int32_t id = argmax(s->logits + i * vocab, vocab);
        t->ended = is_eos(s, id);
        if (!t->ended) {
            t->tokens[t->length++] = id;
        }
    }
    return QS_OK;
}

static void print_tokens(const qs_decode_table *table, const int32_t *tokens, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        if (tokens[i] < table->vocab) {
            const int64_t from = table->offsets[tokens[i]], to = table->offsets[tokens[i] + 1];
            fwrite(table->bytes + from, 1, (size_t)(to - from), stdout);
        }
    }
}

static qs_status print_prompt(const sampler *s, int64_t p)
{
    QS_TRY(qs_data_read(s->data, &p, &p, 1, s->batch));
    printf("--- prompt %lld\n", (long long)p + 1);
    print_tokens(&s->table, s->batch->tokens, s->batch->n_tokens);
    printf("\n--- continuation\n");
    print_tokens(&s->table, s->shown + 1, s->shown[0]);
    printf("\n");
    fflush(stdout);
    return QS_OK;
}

/* The new tokens of prompt `p`, from the rank that has it to all. */
static qs_status share_text(sampler *s, int64_t p)
{
    qs_comm *comm = s->session->comm;
    const int nranks = qs_comm_nranks(comm), owner = (int)(p % nranks);
    const size_t bytes = (size_t)(s->new_tokens + 1) * sizeof *s->shown;
    memset(s->shown, 0, bytes);
    if (qs_comm_rank(comm) == owner) {
        const text *t = &s->texts[p / nranks];
        const int64_t added = t->length - t->prompt_tokens;
        s->shown[0] = (int32_t)added;
        memcpy(s->shown + 1, t->tokens + t->prompt_tokens, (size_t)added * sizeof *s->shown);
    }
    return qs_comm_bcast(comm, s->shown, bytes, owner);
}

/* Rank 0 prints the texts before prompt `end`, in the order of the prompts. */
static qs_status print_until(sampler *s, int64_t end)
{
    for (; s->printed < end; s->printed++) {
        QS_TRY(share_text(s, s->printed));
        const bool prints = qs_comm_rank(s->session->comm) == 0;
        QS_TRY(qs_comm_agree(s->session->comm, prints ? print_prompt(s, s->printed) : QS_OK));
    }
    return QS_OK;
}

/* Beyond its positions a text means nothing to the model, and a token there costs the most. A run
 * that trains on longer sequences has decided otherwise. */
static qs_status check_length(const sampler *s)
{
    const int64_t own = s->session->on.index->config.max_position;
    const int64_t trained = s->session->on.config.train.seq_len;
    const int64_t most = own > trained ? own : trained, longest = qs_data_longest(s->data, 1);
    const char *name = own > trained ? "the model's max_position_embeddings" : "train.seq_len";
    if (longest + s->new_tokens <= most) {
        return QS_OK;
    }
    return longest < most
               ? QS_FAIL(QS_ERR_USAGE,
                         "--tokens %lld: together with the longest prompt of %s, %lld tokens, more "
                         "than %s, %lld; give at most --tokens %lld",
                         (long long)s->new_tokens, s->data->path, (long long)longest, name,
                         (long long)most, (long long)(most - longest))
               : QS_FAIL(QS_ERR_USAGE,
                         "--tokens %lld: the longest prompt of %s, %lld tokens, leaves nothing of "
                         "%s, %lld; give shorter prompts",
                         (long long)s->new_tokens, s->data->path, (long long)longest, name,
                         (long long)most);
}

/* One shape for all ranks: they exchange rows of the embedding. */
static void deal_out(sampler *s)
{
    const qs_session *session = s->session;
    const int rank = qs_comm_rank(session->comm), nranks = qs_comm_nranks(session->comm);
    s->most = (s->data->n_sequences + nranks - 1) / nranks;
    int64_t tokens = qs_data_longest(s->data, 1); /* rank 0 prints any prompt */
    for (int r = 0; r < nranks; r++) {
        int64_t of_rank = 1;
        for (int64_t p = r; p < s->data->n_sequences; p += nranks) {
            of_rank += s->data->seq_offsets[p + 1] - s->data->seq_offsets[p] + s->new_tokens;
            s->count += r == rank;
        }
        tokens = of_rank > tokens ? of_rank : tokens;
    }
    s->shape = (qs_model_shape){.max_tokens = tokens,
                                .max_targets = s->most,
                                .seq_len = session->on.config.train.seq_len,
                                .group = 1,
                                .recompute = QS_RECOMPUTE_FULL,
                                .logit_rows = s->most,
                                .residual_f32 = session->on.config.train.residual_fp32,
                                .head_chunk_rows = session->on.index->head_chunk_rows};
}

/* Logits, the texts, and the one that is printed. */
static size_t result_bytes(const sampler *s)
{
    const int64_t ids = s->shape.max_tokens + s->new_tokens + 1;
    return (size_t)(s->most * s->session->on.index->config.vocab) * sizeof(float) +
           (size_t)ids * sizeof(int32_t);
}

static qs_status check_memory(sampler *s, qs_memory_plan *plan)
{
    const qs_plan_job job = {.eval = s->data,
                             .slots = 1, /* the rank's texts are one micro-batch */
                             .result_bytes = result_bytes(s),
                             .settings =
                                 "take fewer or shorter prompts or fewer --tokens, lower "
                                 "memory.keep_decoded, shard.keep_resident or shard.prefetch"};
    return qs_session_plan(s->session, &job, &s->shape, plan);
}

static qs_status prepare(sampler *s)
{
    const qs_session *session = s->session;
    const int64_t tokens = s->shape.max_tokens;
    if (qs_comm_rank(session->comm) == 0) { /* it prints */
        QS_TRY(qs_decode_table_read(&s->table, s->data->path));
    }
    QS_TRY(qs_batch_create(&s->batch, tokens, tokens));
    QS_TRY(QS_ALLOC(&s->shown, s->new_tokens + 1, QS_MEM_WORK));
    QS_TRY(QS_ALLOC(&s->logits, s->count * session->on.index->config.vocab, QS_MEM_WORK));
    QS_TRY(read_eos(s));
    return read_prompts(s);
}

/* The first prompt, of all ranks', whose text goes on; their number if none does. */
static qs_status first_alive(const sampler *s, int64_t *first)
{
    const int rank = qs_comm_rank(s->session->comm);
    int64_t before = -s->data->n_sequences; /* negated: the least is wanted */
    for (int64_t i = s->count - 1; i >= 0; i--) {
        before = s->texts[i].ended ? before : -prompt_of(s, rank, i);
    }
    QS_TRY(qs_comm_max_i64(s->session->comm, &before, 1));
    *first = -before;
    return QS_OK;
}

static qs_status sample_with(sampler *s)
{
    int64_t alive = 0;
    qs_memory_plan plan;
    QS_TRY(qs_comm_agree(s->session->comm, check_length(s)));
    deal_out(s);
    QS_TRY(check_memory(s, &plan));
    QS_TRY(qs_comm_agree(s->session->comm, prepare(s)));
    QS_TRY(qs_session_connect(s->session, &s->shape, false));
    QS_TRY(qs_session_build(s->session, &s->shape));
    for (int64_t i = 0; i < s->new_tokens && alive < s->data->n_sequences; i++) {
        qs_watch_section(s->count == 0, "token %" PRId64, i + 1);
        QS_TRY(extend_all(s));
        QS_TRY(first_alive(s, &alive));
        QS_TRY(print_until(s, alive));
    }
    QS_TRY(print_until(s, s->data->n_sequences));
    qs_memory_plan_compare(&plan);
    return QS_OK;
}

static void destroy(sampler *s)
{
    for (int64_t i = 0; s->texts != NULL && i < s->count; i++) {
        qs_mem_free(s->texts[i].tokens);
    }
    qs_mem_free(s->texts);
    qs_mem_free(s->shown);
    qs_mem_free(s->logits);
    qs_decode_table_free(&s->table);
    qs_batch_destroy(s->batch);
}

qs_status qs_sample_run(const qs_sample_options *options, qs_comm *comm)
{
    qs_status st = QS_OK;
    qs_session session = {0};
    qs_data *data = NULL;
    sampler s = {.session = &session, .new_tokens = options->tokens};
    QS_GOTO(qs_session_open(&session, &options->config, comm));
    QS_GOTO(qs_session_load_adapter(&session, options->adapter));
    QS_GOTO(qs_input_expect("--prompts", options->prompts, QS_INPUT_PROMPTS, comm));
    QS_GOTO(qs_data_open(&data, options->prompts, session.on.index->config.vocab, 0, comm));
    QS_GOTO(qs_data_check_hashes(data, comm));
    qs_tokenizers_compare(session.on.index, (const qs_data *[]){data}, 1);
    s.data = data;
    QS_GOTO(sample_with(&s));
done:
    qs_comm_end_unagreed(comm, st); /* what follows waits for what peers may never send */
    destroy(&s);
    qs_data_close(data);
    qs_session_close(&session);
    return st;
}
