/* All buffers of a model, laid out once before the first step in two blocks: what lives between
 * forward and backward, and scratch. The same walk computes the sizes for the plan and hands out
 * the pointers, so that the two cannot differ. */
#include "model/model_impl.h"

#include "model/offload.h"

enum { ALIGNMENT = 256 }; /* of every buffer; a matrix of columns begins anywhere in its rows */

/* A block that is being handed out; with base NULL it is only measured. */
typedef struct {
    char *base;
    size_t used;
} arena;

static void *take(arena *block, int64_t count, size_t size)
{
    void *at = block->base != NULL ? block->base + block->used : NULL;
    size_t bytes = (size_t)count * size;
    block->used += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return at;
}

static float *take_floats(arena *block, int64_t count)
{
    return take(block, count, sizeof(float));
}

/* [rows, cols] of act_dtype, and for what feeds a linear the border behind each row. */
static void *take_acts(const qs_model *m, arena *block, int64_t rows, int64_t cols)
{
    return take(block, rows * cols, m->act_bytes);
}

static void *take_stream(const qs_model *m, arena *block, int64_t rows)
{
    return take(block, rows * m->config->hidden, m->stream_bytes);
}

static void *take_bordered(const qs_model *m, arena *block, int64_t rows, int64_t cols)
{
    return take_acts(m, block, rows, cols + m->border);
}

/* `columns` further on in the rows of a matrix of act_dtype; NULL stays NULL. */
static void *beside(const qs_model *m, void *data, int64_t columns)
{
    return data != NULL ? (char *)data + (size_t)columns * m->act_bytes : NULL;
}

/* q, k and v or their gradients: one matrix a linear, or side by side in one. */
static void take_qkv(const qs_model *m, arena *block, int64_t border, void **q, void **k, void **v)
{
    const int64_t t = m->shape.max_tokens;
    if (m->qkv_width > 0) {
        *q = take_acts(m, block, t, m->qkv_width + border);
        *k = beside(m, *q, m->q_width);
        *v = beside(m, *k, m->kv_width);
        return;
    }
    *q = take_acts(m, block, t, m->q_width + border);
    *k = take_acts(m, block, t, m->kv_width + border);
    *v = take_acts(m, block, t, m->kv_width + border);
}

/* The members of `acts` that belong to the mode: everything but x and the A x of down_proj may be
 * shared. */
static void carve_attention(const qs_model *m, arena *block, qs_layer_acts *acts)
{
    const int64_t t = m->shape.max_tokens;
    if (qs_norms_in_front(m->config)) {
        acts->rstd1 = take_floats(block, t);
        acts->rstd2 = take_floats(block, t);
    }
    if (m->config->qk_norm) {
        acts->q_in = take_acts(m, block, t, m->q_width);
        acts->k_in = take_acts(m, block, t, m->kv_width);
        acts->rstd_q = take_floats(block, t * (m->config->qk_whole ? 1 : m->config->n_heads));
        acts->rstd_k = take_floats(block, t * (m->config->qk_whole ? 1 : m->config->n_kv_heads));
    }
    take_qkv(m, block, 0, &acts->q, &acts->k, &acts->v);
    acts->o = take_bordered(m, block, t, m->q_width);
    acts->lse = take_floats(block, t * m->config->n_heads);
    acts->x2 = take_stream(m, block, t);
    if (qs_norms_behind(m->config)) {
        acts->branch1 = take_acts(m, block, t, m->config->hidden);
        acts->branch2 = take_acts(m, block, t, m->config->hidden);
        acts->rstd_post1 = take_floats(block, t);
        acts->rstd_post2 = take_floats(block, t);
    }
}

/* Side by side they have a border: their gradients take their place and feed a linear. */
static void carve_gate_and_up(const qs_model *m, arena *block, qs_layer_acts *acts)
{
    const int64_t t = m->shape.max_tokens, ffn = m->config->ffn_hidden;
    if (m->gate_up_width > 0) {
        acts->gate = take_acts(m, block, t, m->gate_up_width + m->gate_up_border);
        acts->up = beside(m, acts->gate, ffn);
        return;
    }
    acts->gate = take_acts(m, block, t, ffn);
    acts->up = take_acts(m, block, t, ffn);
}

static void carve_adapters(const qs_model *m, arena *block, qs_layer_acts *acts, unsigned linears)
{
    for (int i = 0; i < QS_LINEAR_COUNT; i++) {
        if (!(linears >> i & 1)) {
            continue;
        }
        const bool used = m->layout != NULL && m->layout->targeted[i];
        acts->xa[i] = used ? take_acts(m, block, m->shape.max_tokens, m->layout->lora_rank) : NULL;
    }
}

/* Activations of one micro-batch: `shared` is what all layers use in turn. */
static void carve_micro(qs_model *m, arena *block, qs_micro_acts *micro,
                        const qs_layer_acts *shared)
{
    const int64_t t = m->shape.max_tokens, hidden = m->config->hidden;
    const bool keep = m->shape.backward;
    const bool keep_attention = keep && m->shape.recompute != QS_RECOMPUTE_FULL;
    const bool keep_gate = keep && m->shape.recompute == QS_RECOMPUTE_NONE;
    /* Inputs that take turns: without a backward two, in and out change places; with offload a few;
     * else each layer has its own. */
    const int turns = !keep ? 2 : m->shape.offload ? QS_OFFLOAD_SLOTS : 0;
    void *boundary[QS_OFFLOAD_SLOTS] = {NULL};
    for (int i = 0; i < turns; i++) {
        boundary[i] = take_stream(m, block, t);
    }
    for (int l = 0; l < m->config->n_layers; l++) {
        qs_layer_acts acts = *shared;
        acts.x = turns > 0 ? boundary[l % turns] : take_stream(m, block, t);
        if (keep_attention) {
            carve_attention(m, block, &acts);
            carve_adapters(m, block, &acts, QS_LINEARS_ATTENTION);
        }
        if (keep_gate) {
            carve_gate_and_up(m, block, &acts);
            carve_adapters(m, block, &acts, QS_LINEARS_GATE_UP);
        }
        if (keep) {
            carve_adapters(m, block, &acts, QS_LINEARS_DOWN);
        }
        if (micro != NULL) {
            micro->layers[l] = acts;
        }
    }
    qs_micro_acts out = {0};
    if (micro != NULL) {
        out.layers = micro->layers;
        out.input = micro->input;
    }
    out.x_last = keep ? take_stream(m, block, t) : boundary[m->config->n_layers % 2];
    out.dx = keep ? take_bordered(m, block, t, hidden) : NULL;
    const int64_t r = m->shape.max_targets;
    out.head_rows = take_acts(m, block, r, hidden);
    out.row_rstd = take_floats(block, r);
    out.head.max = take_floats(block, r);
    out.head.sum = take_floats(block, r);
    out.head.target_logit = take_floats(block, r);
    out.head.o = keep ? take_floats(block, r * hidden) : NULL;
    out.head.w_target = keep ? take_floats(block, r * hidden) : NULL;
    if (micro != NULL) {
        *micro = out;
    }
}

static void carve_work(qs_model *m, arena *block)
{
    const int64_t t = m->shape.max_tokens, r = m->shape.max_targets;
    const int64_t hidden = m->config->hidden, ffn = m->config->ffn_hidden;
    const int lora_rank = m->layout != NULL ? m->layout->lora_rank : 0;
    qs_model_work *w = &m->work;
    w->norm = take_acts(m, block, t, hidden + m->norm_border);
    w->act = take_bordered(m, block, t, ffn);
    w->rows = take_stream(m, block, r);
    w->logits = take_floats(block, m->shape.logit_rows * m->shape.head_chunk_rows);
    if (m->shape.backward) {
        w->d_act = take_bordered(m, block, t, ffn);
        w->d_norm = take_acts(m, block, t, hidden);
        if (qs_norms_behind(m->config)) {
            w->d_branch = take_bordered(m, block, t, hidden);
        }
        w->d_o = take_acts(m, block, t, m->q_width);
        take_qkv(m, block, m->qkv_border, &w->d_q, &w->d_k, &w->d_v);
        if (m->config->qk_norm) {
            w->d_q_in = take_acts(m, block, t, m->q_width);
            w->d_k_in = take_acts(m, block, t, m->kv_width);
        }
        w->delta = take_floats(block, t * m->config->n_heads);
        w->lora = take_acts(m, block, t, lora_rank);
        w->d_rows = take_acts(m, block, r, hidden);
    }
}

void qs_model_carve(qs_model *m, size_t *activation_bytes, size_t *work_bytes)
{
    arena work = {m->work_block, 0};
    arena kept = {m->activation_block, 0};
    qs_layer_acts shared = {0};
    carve_work(m, &work);
    carve_attention(m, &work, &shared);
    carve_gate_and_up(m, &work, &shared);
    carve_adapters(m, &work, &shared, QS_LINEARS_ALL);
    for (int64_t g = 0; g < m->shape.group; g++) {
        carve_micro(m, &kept, m->micro != NULL ? &m->micro[g] : NULL, &shared);
    }
    *activation_bytes = kept.used;
    *work_bytes = work.used;
}
