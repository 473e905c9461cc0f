/* A pass through the model: embedding, layers upwards, head, layers downwards. Every rank makes the
 * same sequence of acquires, whether it has work or not. */
#include "model/model.h"

#include <string.h>

#include "base/mem.h"
#include "model/model_impl.h"

static void set_widths(qs_model *m)
{
    m->q_width = (int64_t)m->config->n_heads * m->config->head_dim;
    m->kv_width = (int64_t)m->config->n_kv_heads * m->config->head_dim;
}

qs_model_bytes qs_model_plan(const qs_hf_config *config, const qs_lora_layout *layout,
                             const qs_model_shape *shape)
{
    qs_model m = {.config = config, .layout = layout, .shape = *shape};
    qs_model_bytes bytes = {0};
    set_widths(&m);
    qs_model_carve(&m, &bytes.activation_bytes, &bytes.work_bytes);
    const int64_t biases =
        (config->attention_bias ? m.q_width + 2 * m.kv_width + config->hidden : 0) +
        (config->mlp_bias ? 2 * config->ffn_hidden + config->hidden : 0);
    const int64_t norms = 2 * config->hidden;
    const int64_t floats =
        config->n_layers * (norms + biases) + config->hidden + shape->max_tokens * config->head_dim;
    bytes.small_bytes =
        (size_t)floats * sizeof(float) + (size_t)config->n_layers * sizeof(qs_layer_params);
    return bytes;
}

static qs_status allocate_buffers(qs_model *m)
{
    size_t activation_bytes = 0, work_bytes = 0;
    const int64_t layers = m->config->n_layers;
    qs_model_carve(m, &activation_bytes, &work_bytes);
    QS_TRY(qs_mem_alloc(&m->activation_block, activation_bytes, QS_MEM_ACTIVATION));
    QS_TRY(qs_mem_alloc(&m->work_block, work_bytes, QS_MEM_WORK));
    QS_TRY(QS_ALLOC(&m->micro, m->shape.group, QS_MEM_ACTIVATION));
    for (int64_t g = 0; g < m->shape.group; g++) {
        QS_TRY(QS_ALLOC(&m->micro[g].layers, layers, QS_MEM_ACTIVATION));
    }
    qs_model_carve(m, &activation_bytes, &work_bytes);
    return QS_OK;
}

qs_status qs_model_create(qs_model **out, const qs_base_index *index, qs_fsdp *fsdp,
                          const qs_ops *ops, qs_queue *queue, const qs_lora_layout *layout,
                          const float *lora, const qs_model_shape *shape)
{
    qs_status st = QS_OK;
    qs_model *m = NULL;
    *out = NULL;
    QS_TRY(QS_ALLOC(&m, 1, QS_MEM_WORK));
    m->index = index;
    m->config = &index->config;
    m->fsdp = fsdp;
    m->ops = ops;
    m->queue = queue;
    m->layout = lora != NULL ? layout : NULL;
    m->lora = lora;
    m->shape = *shape;
    set_widths(m);
    QS_GOTO(qs_model_load_params(m));
    QS_GOTO(allocate_buffers(m));
    *out = m;
done:
    if (st != QS_OK) {
        qs_model_destroy(m);
    }
    return st;
}

void qs_model_destroy(qs_model *m)
{
    if (m == NULL) {
        return;
    }
    for (int64_t g = 0; m->micro != NULL && g < m->shape.group; g++) {
        qs_mem_free(m->micro[g].layers);
    }
    qs_mem_free(m->micro);
    qs_mem_free(m->activation_block);
    qs_mem_free(m->work_block);
    qs_mem_free(m->layers);
    qs_mem_free(m->small);
    qs_mem_free(m->rope_cos);
    qs_mem_free(m->rope_sin);
    qs_mem_free(m);
}

double qs_model_flops(const qs_model *m)
{
    return m->flops;
}

static bool is_idle(const qs_micro_batch *micro)
{
    return micro->slot < 0 || micro->batch == NULL || micro->batch->n_tokens == 0;
}

static qs_layer_call call_of(qs_model *m, int layer, int64_t g, const qs_unit_view *view,
                             const qs_batch *batch, const qs_model_noise *noise)
{
    return (qs_layer_call){.model = m,
                           .layer = layer,
                           .unit = view,
                           .batch = batch,
                           .noise = noise,
                           .acts = &m->micro[g].layers[layer]};
}

static qs_status check_sizes(const qs_model *m, const qs_batch *batch)
{
    if (batch != NULL &&
        (batch->n_tokens > m->shape.max_tokens || batch->n_targets > m->shape.max_targets)) {
        return QS_FAIL(QS_ERR_BUG,
                       "micro-batch of %lld tokens, %lld targets in room for %lld, %lld",
                       (long long)batch->n_tokens, (long long)batch->n_targets,
                       (long long)m->shape.max_tokens, (long long)m->shape.max_targets);
    }
    return QS_OK;
}

/* Token rows to the input of layer 0. Collective for each micro-batch of the group. */
static qs_status embed(qs_model *m, const qs_micro_batch *group, int64_t count)
{
    for (int64_t g = 0; g < count; g++) {
        const qs_batch *batch = is_idle(&group[g]) ? NULL : group[g].batch;
        QS_TRY(check_sizes(m, batch));
        QS_TRY(qs_fsdp_embed(m->fsdp, batch != NULL ? batch->tokens : NULL,
                             batch != NULL ? batch->n_tokens : 0, m->micro[g].layers[0].x));
    }
    return QS_OK;
}

/* Where layer `layer` of micro-batch g writes: the next layer's input. */
static float *output_of(qs_model *m, int64_t g, int layer)
{
    return layer + 1 < m->config->n_layers ? m->micro[g].layers[layer + 1].x : m->micro[g].x_last;
}

/* Layers upwards; the gather after the last one is the first chunk of the head. */
static qs_status forward(qs_model *m, const qs_micro_batch *group, int64_t count,
                         const qs_model_noise *noise)
{
    const int layers = m->config->n_layers;
    QS_TRY(embed(m, group, count));
    for (int l = 0; l < layers; l++) {
        const int u = qs_base_layer_unit(m->index, l);
        const int next =
            l + 1 < layers ? qs_base_layer_unit(m->index, l + 1) : qs_base_head_unit(m->index, 0);
        qs_unit_view view;
        QS_TRY(qs_fsdp_acquire(m->fsdp, u, next, &view));
        for (int64_t g = 0; g < count; g++) {
            if (!is_idle(&group[g])) {
                qs_layer_call call = call_of(m, l, g, &view, group[g].batch, noise);
                QS_TRY(qs_layer_forward(&call, output_of(m, g, l)));
            }
        }
        QS_TRY(qs_fsdp_release(m->fsdp, u));
    }
    return QS_OK;
}

static qs_status head(qs_model *m, qs_micro_batch *group, int64_t count, float loss_scale,
                      bool keep, int next)
{
    for (int64_t g = 0; g < count; g++) {
        m->micro[g].head.rows = 0;
        group[g].loss_sum = 0;
        if (!is_idle(&group[g])) {
            QS_TRY(qs_head_begin(m, &m->micro[g], group[g].batch));
        }
    }
    QS_TRY(qs_head_run(m, count, keep, next));
    for (int64_t g = 0; g < count; g++) {
        if (!is_idle(&group[g])) {
            QS_TRY(
                qs_head_end(m, &m->micro[g], group[g].batch, loss_scale, keep, &group[g].loss_sum));
        }
    }
    return QS_OK;
}

/* Layers downwards. A slot without work still takes part in the tree, with zeros. */
static qs_status backward(qs_model *m, const qs_micro_batch *group, int64_t count,
                          const qs_model_noise *noise, qs_grads *grads, bool reduce)
{
    for (int l = m->config->n_layers - 1; l >= 0; l--) {
        const int u = qs_base_layer_unit(m->index, l);
        const int next = l > 0 ? qs_base_layer_unit(m->index, l - 1) : -1;
        qs_unit_view view;
        QS_TRY(qs_fsdp_acquire(m->fsdp, u, next, &view));
        for (int64_t g = 0; g < count; g++) {
            if (group[g].slot < 0) {
                continue;
            }
            float *grad = qs_grads_slot(grads, l, group[g].slot);
            if (grad == NULL) {
                return QS_ERR_BUG; /* recorded there */
            }
            if (!is_idle(&group[g])) {
                qs_layer_call call = call_of(m, l, g, &view, group[g].batch, noise);
                QS_TRY(qs_layer_recompute(&call));
                QS_TRY(qs_layer_backward(&call, m->micro[g].dx, grad));
            }
            QS_TRY(qs_grads_add(grads, l, group[g].slot));
        }
        QS_TRY(qs_fsdp_release(m->fsdp, u));
        if (reduce) {
            QS_TRY(qs_grads_reduce(grads, l));
        }
    }
    return QS_OK;
}

qs_status qs_model_train_pass(qs_model *m, qs_micro_batch *group, int64_t count, float loss_scale,
                              const qs_model_noise *noise, qs_grads *grads, bool reduce)
{
    const int last_layer = qs_base_layer_unit(m->index, m->config->n_layers - 1);
    QS_TRY(forward(m, group, count, noise));
    QS_TRY(head(m, group, count, loss_scale, true, last_layer));
    return backward(m, group, count, noise, grads, reduce);
}

qs_status qs_model_eval_pass(qs_model *m, qs_micro_batch *group, int64_t count)
{
    QS_TRY(forward(m, group, count, NULL));
    return head(m, group, count, 0, false, -1);
}

/* Rows of x_last that logits are wanted of: all, or the last of each document. */
static int64_t pick_rows(qs_model *m, const qs_batch *batch, bool all)
{
    const int64_t hidden = m->config->hidden;
    qs_micro_acts *micro = &m->micro[0];
    int64_t rows = 0;
    for (int d = 0; d < batch->n_docs; d++) {
        const int64_t end = batch->cu_seqlens[d + 1];
        for (int64_t t = all ? batch->cu_seqlens[d] : end - 1; t < end; t++) {
            memcpy(m->work.rows + rows++ * hidden, micro->x_last + t * hidden,
                   (size_t)hidden * sizeof(float));
        }
    }
    return rows;
}

qs_status qs_model_logits(qs_model *m, const qs_batch *batch, bool all, float *logits)
{
    qs_micro_batch one = {.batch = batch, .slot = batch->n_tokens > 0 ? 0 : -1};
    const int64_t hidden = m->config->hidden, vocab = m->config->vocab;
    qs_micro_acts *micro = &m->micro[0];
    QS_TRY(forward(m, &one, 1, NULL));
    int64_t rows = one.slot < 0 ? 0 : pick_rows(m, batch, all);
    qs_mat x = qs_mat_of(m->work.rows, rows, hidden);
    qs_mat y = qs_mat_of(micro->head_rows, rows, hidden);
    QS_TRY(m->ops->rmsnorm_forward(m->queue, &x, m->final_norm, m->config->rms_norm_eps,
                                   micro->row_rstd, &y));
    const int chunks = qs_base_head_chunks(m->index);
    for (int c = 0; c < chunks; c++) {
        const int u = qs_base_head_unit(m->index, c);
        const qs_weight w = qs_base_weight(m->index, &m->index->units[u].tensors[0]);
        qs_unit_view view;
        QS_TRY(qs_fsdp_acquire(m->fsdp, u, c + 1 < chunks ? qs_base_head_unit(m->index, c + 1) : -1,
                               &view));
        if (rows > 0) {
            qs_mat part = {.data = logits + c * m->index->head_chunk_rows,
                           .rows = rows,
                           .cols = w.out,
                           .stride = vocab};
            QS_TRY(m->ops->linear_forward(m->queue, &view, &w, NULL, &y, &part));
        }
        QS_TRY(qs_fsdp_release(m->fsdp, u));
    }
    return QS_OK;
}
