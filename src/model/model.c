/* A pass through the model: embedding, layers upwards, head, layers downwards. Every rank makes the
 * same sequence of acquires, whether it has work or not. */
#include "model/model.h"

#include <math.h>
#include <string.h>

#include "base/dtype.h"
#include "base/mem.h"
#include "model/model_impl.h"
#include "model/offload.h"

bool qs_model_joins(const qs_hf_config *config, bool dora, qs_linear linear)
{
    const bool of_qkv = linear == QS_K || linear == QS_V;
    return !config->fused && !dora && (linear == QS_UP || (of_qkv && !config->qk_norm));
}

/* q, k and v share the rows of one matrix where one linear makes them, or one product does for all;
 * then each of these linears has an adapter, which wants a border. So do gate and up. */
static void set_rows(qs_model *m)
{
    const bool fused = m->config->fused, dora = m->layout != NULL && m->layout->dora;
    const bool qkv = m->ops->joins && qs_model_joins(m->config, dora, QS_K);
    const bool gate_up = m->ops->joins && qs_model_joins(m->config, dora, QS_UP);
    m->qkv_width = fused || qkv ? m->q_width + 2 * m->kv_width : 0;
    m->gate_up_width = fused || gate_up ? 2 * m->config->ffn_hidden : 0;
    m->qkv_border = (qkv ? 3 : 1) * m->border;
    m->gate_up_border = (gate_up ? 2 : 1) * m->border;
    m->norm_border = m->qkv_border > m->gate_up_border ? m->qkv_border : m->gate_up_border;
}

void qs_model_set_widths(qs_model *m)
{
    m->act_bytes = qs_dtype_bytes(m->ops->act_dtype);
    m->stream_dtype = m->shape.residual_f32 ? QS_F32 : m->ops->act_dtype;
    m->stream_bytes = qs_dtype_bytes(m->stream_dtype);
    const double of_branches = m->config->residual_multiplier;
    m->stream_eps = (float)((double)m->config->rms_norm_eps / (of_branches * of_branches));
    m->border = m->layout != NULL ? m->ops->border(m->layout->lora_rank) : 0;
    m->q_width = (int64_t)m->config->n_heads * m->config->head_dim;
    m->kv_width = (int64_t)m->config->n_kv_heads * m->config->head_dim;
    set_rows(m);
}

qs_model_bytes qs_model_plan(const qs_hf_config *config, const qs_lora_layout *layout,
                             const qs_ops *ops, const qs_model_shape *shape)
{
    qs_model m = {.config = config, .layout = layout, .ops = ops, .shape = *shape};
    qs_model_bytes bytes = {0};
    qs_model_set_widths(&m);
    qs_model_carve(&m, &bytes.activation_bytes, &bytes.work_bytes);
    int64_t biases = 0, norms = 0;
    for (int i = 0; i < QS_LINEAR_COUNT; i++) {
        int64_t out = 0, in = 0;
        qs_linear_shape(config, (qs_linear)i, &out, &in);
        biases += config->bias[i] ? out : 0;
    }
    for (int i = 0; i < QS_NORM_COUNT; i++) {
        norms += qs_norm_width(config, (qs_norm)i);
    }
    const int64_t rope_tables = config->rope_local_theta > 0 ? 2 : 1;
    const int64_t floats = config->n_layers * (norms + biases) + config->hidden +
                           rope_tables * shape->max_tokens * config->rotary_dim;
    const int64_t rows = qs_norms_in_front(config) ? 0 : shape->max_tokens;
    bytes.small_bytes = (size_t)floats * sizeof(float) + (size_t)rows * sizeof(int32_t) +
                        (size_t)config->n_layers * sizeof(qs_layer_params);
    bytes.adapter_bytes = qs_dora_bytes(&m);
    bytes.input_bytes = (size_t)shape->group * qs_input_bytes(shape);
    if (shape->offload) {
        bytes.host_activation_bytes = qs_offload_bytes(&m);
    }
    return bytes;
}

static qs_status allocate_buffers(qs_model *m)
{
    size_t activation_bytes = 0, work_bytes = 0;
    const int64_t layers = m->config->n_layers;
    qs_model_carve(m, &activation_bytes, &work_bytes);
    QS_TRY(qs_device_alloc(m->device, &m->activation_block, activation_bytes, QS_MEM_ACTIVATION));
    QS_TRY(qs_device_alloc(m->device, &m->work_block, work_bytes, QS_MEM_WORK));
    QS_TRY(QS_ALLOC(&m->micro, m->shape.group, QS_MEM_ACTIVATION));
    for (int64_t g = 0; g < m->shape.group; g++) {
        QS_TRY(QS_ALLOC(&m->micro[g].layers, layers, QS_MEM_ACTIVATION));
        QS_TRY(qs_input_create(m, &m->micro[g].input));
    }
    qs_model_carve(m, &activation_bytes, &work_bytes);
    return m->shape.offload ? qs_offload_create(m) : QS_OK;
}

qs_status qs_model_create(qs_model **out, const qs_base_index *index, qs_fsdp *fsdp,
                          const qs_ops *ops, qs_queue *queue, const qs_lora_layout *layout,
                          const void *lora, const float *magnitudes, const qs_model_shape *shape)
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
    m->device = qs_queue_device(queue);
    m->layout = lora != NULL ? layout : NULL;
    m->lora = lora;
    m->dora.magnitude = magnitudes;
    m->shape = *shape;
    qs_model_set_widths(m);
    QS_GOTO(QS_ALLOC(&m->order, 3 * index->n_units, QS_MEM_BASE_SMALL));
    QS_GOTO(qs_model_load_params(m));
    QS_GOTO(qs_decoded_create(m));
    QS_GOTO(qs_dora_create(m));
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
    (void)qs_queue_wait(m->queue); /* operations may still use the buffers */
    qs_offload_destroy(m);
    qs_dora_destroy(m);
    qs_decoded_destroy(m);
    for (int64_t g = 0; m->micro != NULL && g < m->shape.group; g++) {
        qs_mem_free(m->micro[g].layers);
        qs_mirror_destroy(m->device, &m->micro[g].input.mirror);
    }
    qs_mem_free(m->micro);
    qs_mem_free(m->layers);
    qs_mem_free(m->order);
    void *const on_device[] = {
        m->activation_block, m->work_block,     m->small,          m->maps,     m->rope.cos,
        m->rope.sin,         m->rope_local.cos, m->rope_local.sin, m->every_row};
    for (size_t i = 0; i < sizeof on_device / sizeof *on_device; i++) {
        qs_device_free(m->device, on_device[i]);
    }
    qs_mem_free(m);
}

int qs_model_order(const qs_base_index *index, bool backward, int *units)
{
    const int layers = index->config.n_layers, chunks = qs_base_head_chunks(index);
    int count = 0;
    for (int l = 0; l < layers; l++) {
        units[count++] = qs_base_layer_unit(index, l);
    }
    for (int c = 0; c < chunks; c++) {
        units[count++] = qs_base_head_unit(index, c);
    }
    for (int l = layers - 1; backward && l >= 0; l--) {
        units[count++] = qs_base_layer_unit(index, l);
    }
    return count;
}

/* Tell the gathers what this pass will use. */
static qs_status announce(qs_model *m, bool backward)
{
    const int count = qs_model_order(m->index, backward, m->order);
    return qs_fsdp_begin(m->fsdp, m->order, count);
}

double qs_model_flops(const qs_model *m)
{
    return m->flops;
}

static qs_layer_call call_of(qs_model *m, int layer, int64_t g, const qs_unit_view *view,
                             const qs_batch *batch, const qs_model_noise *noise)
{
    return (qs_layer_call){.model = m,
                           .layer = layer,
                           .unit = view,
                           .batch = batch,
                           .input = &m->micro[g].input,
                           .noise = noise,
                           .acts = &m->micro[g].layers[layer]};
}

/* Where layer `layer` of micro-batch g writes: the next layer's input. */
static void *output_of(qs_model *m, int64_t g, int layer)
{
    return layer + 1 < m->config->n_layers ? m->micro[g].layers[layer + 1].x : m->micro[g].x_last;
}

/* One layer of one micro-batch upwards. */
static qs_status layer_up(qs_model *m, int layer, int64_t g, const qs_unit_view *view,
                          const qs_batch *batch, const qs_model_noise *noise)
{
    const qs_layer_call call = call_of(m, layer, g, view, batch, noise);
    QS_TRY(qs_offload_before_forward(m, g, layer));
    QS_TRY(qs_layer_forward(&call, output_of(m, g, layer)));
    return qs_offload_after_forward(m, g, layer, batch->n_tokens);
}

/* Layers upwards, the first one behind the rows of the embedding. `next`: the group of the pass
 * that follows, NULL for none. */
static qs_status forward(qs_model *m, const qs_micro_batch *group, const qs_micro_batch *next,
                         int64_t count, const qs_model_noise *noise)
{
    const int layers = m->config->n_layers;
    QS_TRY(qs_embedding_begin(m, group, next, count));
    for (int l = 0; l < layers; l++) {
        const int u = qs_base_layer_unit(m->index, l);
        qs_unit_view view;
        qs_span_begin(m->queue, "layer %d forward", l);
        QS_TRY(qs_fsdp_acquire(m->fsdp, u, &view));
        QS_TRY(qs_layer_open(m, l, &view));
        QS_TRY(qs_dora_layer_norms(m, l, &view));
        if (l == 1) {
            QS_TRY(qs_embedding_proceed(m));
        }
        for (int64_t g = 0; g < count; g++) {
            if (l == 0) {
                QS_TRY(qs_embedding_place(m, g));
            }
            if (!qs_model_is_idle(&group[g])) {
                QS_TRY(layer_up(m, l, g, &view, group[g].batch, noise));
            }
        }
        qs_layer_close(m);
        QS_TRY(qs_fsdp_release(m->fsdp, u));
        qs_span_end(m->queue);
    }
    qs_dora_pass_done(m);
    return QS_OK;
}

static qs_status head(qs_model *m, const qs_micro_batch *group, int64_t count, float loss_scale,
                      bool keep)
{
    qs_span_begin(m->queue, "head");
    for (int64_t g = 0; g < count; g++) {
        if (!qs_model_is_idle(&group[g])) {
            QS_TRY(qs_head_begin(m, &m->micro[g]));
        }
    }
    QS_TRY(qs_head_run(m, count, keep));
    for (int64_t g = 0; g < count; g++) {
        if (!qs_model_is_idle(&group[g])) {
            QS_TRY(qs_head_end(m, &m->micro[g], group[g].batch->n_tokens, loss_scale, keep));
        }
    }
    qs_span_end(m->queue);
    return QS_OK;
}

/* One layer of one micro-batch downwards, into its slot of the tree. A slot without work takes part
 * with zeros. */
static qs_status layer_down(qs_model *m, int layer, int64_t g, const qs_unit_view *view,
                            const qs_micro_batch *micro, const qs_model_noise *noise,
                            qs_grads *grads)
{
    float *grad = NULL;
    QS_TRY(qs_grads_slot(grads, layer, micro->slot, &grad));
    if (!qs_model_is_idle(micro)) {
        const qs_layer_call call = call_of(m, layer, g, view, micro->batch, noise);
        QS_TRY(qs_offload_before_backward(m, g, layer));
        QS_TRY(qs_layer_recompute(&call));
        QS_TRY(qs_layer_backward(&call, m->micro[g].dx, grad));
        QS_TRY(qs_offload_after_backward(m, g, layer, micro->batch->n_tokens));
    }
    return qs_grads_add(grads, layer, micro->slot);
}

static qs_status backward(qs_model *m, const qs_micro_batch *group, int64_t count,
                          const qs_model_noise *noise, qs_grads *grads, bool reduce)
{
    for (int l = m->config->n_layers - 1; l >= 0; l--) {
        const int u = qs_base_layer_unit(m->index, l);
        qs_unit_view view;
        qs_span_begin(m->queue, "layer %d backward", l);
        QS_TRY(qs_fsdp_acquire(m->fsdp, u, &view));
        QS_TRY(qs_layer_open(m, l, &view));
        for (int64_t g = 0; g < count; g++) {
            if (group[g].slot >= 0) {
                QS_TRY(layer_down(m, l, g, &view, &group[g], noise, grads));
            }
        }
        qs_layer_close(m);
        QS_TRY(qs_fsdp_release(m->fsdp, u));
        if (reduce) {
            QS_TRY(qs_grads_reduce(grads, l));
        }
        qs_span_end(m->queue);
    }
    return QS_OK;
}

/* Wait for the pass, and add up the losses that it left in the mirrors. Behind this point the next
 * pass may write the mirrors. */
static qs_status collect_losses(qs_model *m, qs_micro_batch *group, int64_t count)
{
    QS_TRY(qs_queue_wait(m->queue));
    for (int64_t g = 0; g < count; g++) {
        group[g].loss_sum = qs_head_loss(&m->micro[g]);
    }
    return QS_OK;
}

qs_status qs_model_train_pass(qs_model *m, qs_micro_batch *group, const qs_micro_batch *next,
                              int64_t count, float loss_scale, const qs_model_noise *noise,
                              qs_grads *grads, bool reduce)
{
    QS_TRY(announce(m, true));
    QS_TRY(forward(m, group, next, count, noise));
    QS_TRY(head(m, group, count, loss_scale, true));
    QS_TRY(backward(m, group, count, noise, grads, reduce));
    return collect_losses(m, group, count);
}

qs_status qs_model_eval_pass(qs_model *m, qs_micro_batch *group, const qs_micro_batch *next,
                             int64_t count)
{
    QS_TRY(announce(m, false));
    QS_TRY(forward(m, group, next, count, NULL));
    QS_TRY(head(m, group, count, 0, false));
    return collect_losses(m, group, count);
}

/* Rows of x_last that logits are wanted of: all, or the last of each document. They take the place
 * of the rows that carry loss. */
static qs_status pick_rows(qs_model *m, const qs_batch *batch, bool all, int64_t *rows)
{
    const qs_micro_input *input = &m->micro[0].input;
    const int64_t room =
        m->shape.logit_rows < m->shape.max_targets ? m->shape.logit_rows : m->shape.max_targets;
    const int64_t wanted = all ? batch->n_tokens : batch->n_docs;
    *rows = 0;
    if (wanted > room) {
        return QS_FAIL(QS_ERR_BUG, "logits of %lld rows in room for %lld", (long long)wanted,
                       (long long)room);
    }
    QS_TRY(qs_queue_wait(m->queue)); /* the mirror has been read */
    for (int d = 0; d < batch->n_docs; d++) {
        const int32_t end = batch->cu_seqlens[d + 1];
        for (int32_t t = all ? batch->cu_seqlens[d] : end - 1; t < end; t++) {
            input->host.target_row[(*rows)++] = t;
        }
    }
    return qs_mirror_push(m->queue, &input->mirror, 0, input->pushed_bytes);
}

/* One chunk of the vocabulary: logits of all rows, to their columns of the host's matrix. */
static qs_status logits_of_chunk(qs_model *m, int chunk, const qs_unit_view *view, const qs_mat *x,
                                 float *logits)
{
    const int u = qs_base_head_unit(m->index, chunk);
    const qs_weight w = qs_model_weight(m, &m->index->units[u].tensors[0]);
    qs_mat part = {m->work.logits, x->rows, w.out, w.out, QS_F32};
    QS_TRY(m->ops->linear_forward(m->queue, view, &w, NULL, x, &part));
    for (int64_t r = 0; r < x->rows; r++) {
        float *to = logits + r * m->config->vocab + chunk * m->index->head_chunk_rows;
        QS_TRY(qs_queue_copy(m->queue, to, m->work.logits + r * w.out, (size_t)w.out * sizeof *to));
    }
    return QS_OK;
}

/* Logits on the host as the model gives them: capped where it does so. */
static void cap_logits(const qs_model *m, float *logits, int64_t rows)
{
    const double cap = (double)m->config->final_cap;
    for (int64_t i = 0; i < rows * m->config->vocab && cap > 0; i++) {
        logits[i] = (float)(cap * tanh((double)logits[i] / cap));
    }
}

qs_status qs_model_logits(qs_model *m, const qs_batch *batch, bool all, float *logits)
{
    qs_micro_batch one = {.batch = batch, .slot = batch->n_tokens > 0 ? 0 : -1};
    const int64_t hidden = m->config->hidden;
    qs_micro_acts *micro = &m->micro[0];
    int64_t rows = 0;
    QS_TRY(announce(m, false));
    QS_TRY(forward(m, &one, NULL, 1, NULL));
    if (!qs_model_is_idle(&one)) {
        QS_TRY(pick_rows(m, batch, all, &rows));
    }
    micro->head.rows = rows;
    QS_TRY(qs_head_begin(m, micro));
    const qs_mat x = qs_model_mat(m, micro->head_rows, rows, hidden, 0);
    const int chunks = qs_base_head_chunks(m->index);
    for (int c = 0; c < chunks; c++) {
        const int u = qs_base_head_unit(m->index, c);
        qs_unit_view view;
        QS_TRY(qs_fsdp_acquire(m->fsdp, u, &view));
        if (rows > 0) {
            QS_TRY(logits_of_chunk(m, c, &view, &x, logits));
        }
        QS_TRY(qs_fsdp_release(m->fsdp, u));
    }
    QS_TRY(qs_queue_wait(m->queue));
    cap_logits(m, logits, rows);
    return QS_OK;
}
