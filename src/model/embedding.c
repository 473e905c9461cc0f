/* Rows of the embedding, a little ahead of their use. The micro-batches of this pass and of the
 * next one are a sequence; while layer 0 computes one of them, the rows of the following one and
 * the ids of the one after that are on their way:
 *
 *   layer 0    of 0 | of 1 | of 2     layer 1 and above, head, backward
 *   rows       of 1 | of 2 |  of 0 of the next pass
 *   ids        of 2 |   of 0, 1 of the next pass
 *
 * Only the first pass of all, with nothing behind it, waits for both. */
#include "base/dtype.h"
#include "model/model_impl.h"

bool qs_model_is_idle(const qs_micro_batch *micro)
{
    return micro->slot < 0 || micro->batch == NULL || micro->batch->n_tokens == 0;
}

/* Ask for the rows of what comes next, as far ahead as requests can be open. Collective. */
static qs_status ask_ahead(qs_model *m)
{
    qs_coming *c = &m->coming;
    const int64_t end = c->next != NULL ? 2 * c->count : c->count;
    while (c->asked < end && qs_fsdp_embed_open(m->fsdp) < QS_EMBED_OPEN_MAX) {
        const qs_micro_batch *micro =
            c->asked < c->count ? &c->now[c->asked] : &c->next[c->asked - c->count];
        const qs_batch *batch = qs_model_is_idle(micro) ? NULL : micro->batch;
        c->asked++;
        QS_TRY(qs_fsdp_embed_ask(m->fsdp, batch != NULL ? batch->tokens : NULL,
                                 batch != NULL ? batch->n_tokens : 0));
    }
    return QS_OK;
}

static qs_status check_sizes(const qs_model *m, const qs_batch *batch)
{
    if (batch->n_tokens > m->shape.max_tokens || batch->n_targets > m->shape.max_targets) {
        return QS_FAIL(QS_ERR_BUG,
                       "micro-batch of %lld tokens, %lld targets in room for %lld, %lld",
                       (long long)batch->n_tokens, (long long)batch->n_targets,
                       (long long)m->shape.max_tokens, (long long)m->shape.max_targets);
    }
    return QS_OK;
}

qs_status qs_embedding_begin(qs_model *m, const qs_micro_batch *now, const qs_micro_batch *next,
                             int64_t count)
{
    m->coming =
        (qs_coming){.now = now, .next = next, .count = count, .asked = qs_fsdp_embed_open(m->fsdp)};
    QS_TRY(ask_ahead(m));
    for (int64_t g = 0; g < count; g++) {
        m->micro[g].head.rows = 0;
        if (!qs_model_is_idle(&now[g])) {
            QS_TRY(check_sizes(m, now[g].batch));
            QS_TRY(qs_input_load(m, &m->micro[g], now[g].batch));
        }
    }
    return QS_OK;
}

/* The factor of token rows, for a stream that is divided by that of the branches (stream_eps).
 * Gemma's is rounded as transformers rounds it: to the type of the rows. */
static qs_status scale_rows(qs_model *m, void *rows, int64_t tokens)
{
    float by = (float)(m->config->embedding_multiplier / m->config->residual_multiplier);
    if (by == 1.0F) {
        return QS_OK;
    }
    if (m->config->embedding_factor_rounded && m->stream_dtype == QS_BF16) {
        by = qs_f32_from_bf16(qs_bf16_from_f32(by));
    }
    qs_mat x = qs_model_stream(m, rows, tokens);
    return m->ops->scale(m->queue, by, &x);
}

qs_status qs_embedding_place(qs_model *m, int64_t g)
{
    const qs_micro_batch *micro = &m->coming.now[g];
    void *rows = m->micro[g].layers[0].x;
    qs_span_begin(m->queue, "embedding");
    QS_TRY(qs_fsdp_embed_place(m->fsdp, m->stream_dtype, rows));
    if (!qs_model_is_idle(micro)) {
        QS_TRY(scale_rows(m, rows, micro->batch->n_tokens));
    }
    qs_span_end(m->queue);
    return qs_embedding_proceed(m);
}

qs_status qs_embedding_proceed(qs_model *m)
{
    QS_TRY(qs_fsdp_embed_answer(m->fsdp));
    return ask_ahead(m);
}
