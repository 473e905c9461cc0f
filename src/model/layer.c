/* One decoder layer, forward and backward, for one micro-batch.
 *
 *   x -> norm1 -> q k v -> RoPE -> attention -> o_proj -> + x = x2 -> norm2 -> gate up -> SwiGLU ->
 * down -> + x2
 *
 * The backward needs q, k, v, o, lse, x2, gate, up and the A x of every adapter; the two norm
 * outputs and the SwiGLU output are cheap and always computed again. What else is computed again is
 * the recompute mode:
 *
 *   none       everything is kept
 *   selective  gate and up are computed again (two of the three large matrices of the layer)
 *   full       all but x and the A x of down_proj: with the latter kept, down_proj itself is never
 * computed twice
 *
 * All modes give the same bits, because recomputing is the same operations on the same inputs. */
#include "model/model_impl.h"

#include <string.h>

qs_mat qs_mat_of(float *data, int64_t rows, int64_t cols)
{
    return (qs_mat){.data = data, .rows = rows, .cols = cols, .stride = cols};
}

static qs_mat tokens_by(const qs_layer_call *call, float *data, int64_t cols)
{
    return qs_mat_of(data, call->batch->n_tokens, cols);
}

static const qs_layer_params *params_of(const qs_layer_call *call)
{
    return &call->model->layers[call->layer];
}

/* Multiply-adds of a linear and its adapter, twice: one launch of either direction. */
static void count_linear(const qs_layer_call *call, qs_linear linear, double launches)
{
    qs_model *m = call->model;
    const qs_weight *w = &params_of(call)->linear[linear];
    double tokens = (double)call->batch->n_tokens;
    m->flops += launches * 2.0 * tokens * (double)w->out * (double)w->in;
    if (m->layout != NULL && m->layout->targeted[linear]) {
        m->flops += launches * 2.0 * tokens * (double)(w->out + w->in) * m->layout->lora_rank;
    }
}

/* Query-key pairs that the causal mask lets through. */
static double attention_pairs(const qs_batch *batch)
{
    double pairs = 0;
    for (int d = 0; d < batch->n_docs; d++) {
        double n = batch->cu_seqlens[d + 1] - batch->cu_seqlens[d];
        pairs += n * (n + 1) / 2;
    }
    return pairs;
}

/* The adapter of a linear; a and b stay NULL where there is none. */
static qs_lora adapter_of(const qs_layer_call *call, qs_linear linear)
{
    qs_model *m = call->model;
    const qs_lora_layout *layout = m->layout;
    qs_lora lora = {0};
    if (layout == NULL || !layout->targeted[linear]) {
        return lora;
    }
    const float *segment = m->lora + (int64_t)call->layer * layout->per_layer;
    lora.a = segment + layout->a_at[linear];
    lora.b = segment + layout->b_at[linear];
    lora.rank = layout->lora_rank;
    lora.scale = layout->scale;
    if (call->noise != NULL && call->noise->dropout > 0) {
        for (int64_t t = 0; t < call->batch->n_tokens; t++) {
            m->work.row_rng[t] =
                qs_rng_make(call->noise->seed, call->noise->step, (uint64_t)call->batch->sample[t],
                            (uint32_t)QS_RNG_DROPOUT + (uint32_t)linear, (uint32_t)call->layer);
        }
        lora.dropout = call->noise->dropout;
        lora.row_rng = m->work.row_rng;
        lora.row_at = call->batch->row_at;
    }
    return lora;
}

/* y = x W^T + bias + adapter. */
static qs_status linear_forward(const qs_layer_call *call, qs_linear linear, float *x, float *y)
{
    const qs_ops *ops = call->model->ops;
    qs_queue *queue = call->model->queue;
    const qs_layer_params *p = params_of(call);
    const qs_weight *w = &p->linear[linear];
    qs_mat xm = tokens_by(call, x, w->in);
    qs_mat ym = tokens_by(call, y, w->out);
    QS_TRY(ops->linear_forward(queue, call->unit, w, p->bias[linear], &xm, &ym));
    qs_lora lora = adapter_of(call, linear);
    if (lora.a != NULL) {
        qs_mat xa = tokens_by(call, call->acts->xa[linear], lora.rank);
        QS_TRY(ops->lora_forward(queue, &lora, &xm, &xa, &ym));
    }
    count_linear(call, linear, 1);
    return QS_OK;
}

/* dx (+)= dy W + adapter, and the adapter's gradients. `want_dx` false leaves the frozen part out.
 */
static qs_status linear_backward(const qs_layer_call *call, qs_linear linear, float *x, float *dy,
                                 float *dx, bool accumulate, bool want_dx, float *grad)
{
    qs_model *m = call->model;
    const qs_weight *w = &params_of(call)->linear[linear];
    qs_mat xm = tokens_by(call, x, w->in);
    qs_mat dym = tokens_by(call, dy, w->out);
    qs_mat dxm = tokens_by(call, dx, w->in);
    if (want_dx) {
        QS_TRY(m->ops->linear_backward(m->queue, call->unit, w, &dym, &dxm, accumulate));
    }
    qs_lora lora = adapter_of(call, linear);
    if (lora.a != NULL) {
        qs_mat xa = tokens_by(call, call->acts->xa[linear], lora.rank);
        qs_mat scratch = tokens_by(call, m->work.lora, lora.rank);
        QS_TRY(m->ops->lora_backward(m->queue, &lora, &xm, &xa, &dym, &scratch,
                                     grad + m->layout->a_at[linear], grad + m->layout->b_at[linear],
                                     &dxm));
        m->flops += 2.0 * (double)call->batch->n_tokens * (double)(w->out + w->in) * lora.rank;
    }
    if (want_dx) {
        count_linear(call, linear, 1);
    }
    return QS_OK;
}

static qs_status norm_forward(const qs_layer_call *call, float *x, const float *w, float *rstd)
{
    qs_model *m = call->model;
    qs_mat xm = tokens_by(call, x, m->config->hidden);
    qs_mat ym = tokens_by(call, m->work.norm, m->config->hidden);
    return m->ops->rmsnorm_forward(m->queue, &xm, w, m->config->rms_norm_eps, rstd, &ym);
}

static qs_status norm_backward(const qs_layer_call *call, float *x, const float *w,
                               const float *rstd, float *dx)
{
    qs_model *m = call->model;
    qs_mat dy = tokens_by(call, m->work.d_norm, m->config->hidden);
    qs_mat xm = tokens_by(call, x, m->config->hidden);
    qs_mat dxm = tokens_by(call, dx, m->config->hidden);
    return m->ops->rmsnorm_backward(m->queue, &dy, &xm, w, rstd, &dxm);
}

static qs_status rotate(const qs_layer_call *call, float *x, int heads, bool inverse)
{
    qs_model *m = call->model;
    qs_mat xm = tokens_by(call, x, (int64_t)heads * m->config->head_dim);
    return m->ops->rope(m->queue, &xm, heads, m->config->head_dim, m->rope_cos, m->rope_sin,
                        call->batch->position, inverse);
}

static qs_attention_shape attention_shape(const qs_layer_call *call)
{
    const qs_hf_config *cfg = call->model->config;
    return (qs_attention_shape){.n_heads = cfg->n_heads,
                                .n_kv_heads = cfg->n_kv_heads,
                                .head_dim = cfg->head_dim,
                                .scale = 1.0f / __builtin_sqrtf((float)cfg->head_dim),
                                .cu_seqlens = call->batch->cu_seqlens,
                                .n_docs = call->batch->n_docs};
}

/* x += residual, for [T, hidden]. */
static qs_status add_residual(const qs_layer_call *call, float *residual, float *x)
{
    qs_model *m = call->model;
    qs_mat from = tokens_by(call, residual, m->config->hidden);
    qs_mat to = tokens_by(call, x, m->config->hidden);
    return m->ops->add(m->queue, &from, &to);
}

/* x -> q, k, v, o, lse, x2 */
static qs_status attention_half(const qs_layer_call *call)
{
    qs_model *m = call->model;
    qs_layer_acts *acts = call->acts;
    QS_TRY(norm_forward(call, acts->x, params_of(call)->norm1, acts->rstd1));
    QS_TRY(linear_forward(call, QS_Q, m->work.norm, acts->q));
    QS_TRY(linear_forward(call, QS_K, m->work.norm, acts->k));
    QS_TRY(linear_forward(call, QS_V, m->work.norm, acts->v));
    QS_TRY(rotate(call, acts->q, m->config->n_heads, false));
    QS_TRY(rotate(call, acts->k, m->config->n_kv_heads, false));

    qs_attention_shape shape = attention_shape(call);
    qs_mat q = tokens_by(call, acts->q, m->q_width);
    qs_mat k = tokens_by(call, acts->k, m->kv_width);
    qs_mat v = tokens_by(call, acts->v, m->kv_width);
    qs_mat o = tokens_by(call, acts->o, m->q_width);
    QS_TRY(m->ops->attention_forward(m->queue, &shape, &q, &k, &v, &o, acts->lse));
    m->flops += 4.0 * attention_pairs(call->batch) * (double)m->q_width;

    QS_TRY(linear_forward(call, QS_O, acts->o, acts->x2));
    return add_residual(call, acts->x, acts->x2);
}

/* x2 -> gate, up */
static qs_status gate_and_up(const qs_layer_call *call)
{
    float *norm = call->model->work.norm;
    QS_TRY(norm_forward(call, call->acts->x2, params_of(call)->norm2, call->acts->rstd2));
    QS_TRY(linear_forward(call, QS_GATE, norm, call->acts->gate));
    return linear_forward(call, QS_UP, norm, call->acts->up);
}

/* gate, up -> act */
static qs_status swiglu(const qs_layer_call *call)
{
    qs_model *m = call->model;
    qs_mat gate = tokens_by(call, call->acts->gate, m->config->ffn_hidden);
    qs_mat up = tokens_by(call, call->acts->up, m->config->ffn_hidden);
    qs_mat act = tokens_by(call, m->work.act, m->config->ffn_hidden);
    return m->ops->swiglu_forward(m->queue, &gate, &up, &act);
}

qs_status qs_layer_forward(const qs_layer_call *call, float *x_next)
{
    QS_TRY(attention_half(call));
    QS_TRY(gate_and_up(call));
    QS_TRY(swiglu(call));
    QS_TRY(linear_forward(call, QS_DOWN, call->model->work.act, x_next));
    return add_residual(call, call->acts->x2, x_next);
}

qs_status qs_layer_recompute(const qs_layer_call *call)
{
    switch (call->model->shape.recompute) {
    case QS_RECOMPUTE_FULL:
        QS_TRY(attention_half(call));
        return gate_and_up(call);
    case QS_RECOMPUTE_SELECTIVE:
        return gate_and_up(call);
    default:
        return QS_OK;
    }
}

/* dx (of the layer's output) -> dx (of x2): the MLP's branch is added to what passes by. */
static qs_status backward_mlp(const qs_layer_call *call, float *dx, float *grad)
{
    qs_model *m = call->model;
    qs_layer_acts *acts = call->acts;
    const int64_t ffn = m->config->ffn_hidden;
    QS_TRY(swiglu(call));
    QS_TRY(linear_backward(call, QS_DOWN, m->work.act, dx, m->work.d_act, false, true, grad));

    /* d_gate takes the place of d_act, d_up that of act: neither is needed any more */
    qs_mat gate = tokens_by(call, acts->gate, ffn), up = tokens_by(call, acts->up, ffn);
    qs_mat d_act = tokens_by(call, m->work.d_act, ffn), d_gate = d_act;
    qs_mat d_up = tokens_by(call, m->work.act, ffn);
    QS_TRY(m->ops->swiglu_backward(m->queue, &gate, &up, &d_act, &d_gate, &d_up));

    QS_TRY(norm_forward(call, acts->x2, params_of(call)->norm2, acts->rstd2));
    QS_TRY(linear_backward(call, QS_GATE, m->work.norm, d_gate.data, m->work.d_norm, false, true,
                           grad));
    QS_TRY(linear_backward(call, QS_UP, m->work.norm, d_up.data, m->work.d_norm, true, true, grad));
    return norm_backward(call, acts->x2, params_of(call)->norm2, acts->rstd2, dx);
}

/* dx (of x2) -> dx (of x). Below the first layer nothing is trained, so its dx is not computed. */
static qs_status backward_attention(const qs_layer_call *call, float *dx, float *grad)
{
    qs_model *m = call->model;
    qs_layer_acts *acts = call->acts;
    qs_model_work *work = &m->work;
    const bool want_dx = call->layer > 0;
    QS_TRY(linear_backward(call, QS_O, acts->o, dx, work->d_o, false, true, grad));

    qs_attention_shape shape = attention_shape(call);
    qs_mat q = tokens_by(call, acts->q, m->q_width), k = tokens_by(call, acts->k, m->kv_width);
    qs_mat v = tokens_by(call, acts->v, m->kv_width), o = tokens_by(call, acts->o, m->q_width);
    qs_mat d_o = tokens_by(call, work->d_o, m->q_width);
    qs_mat d_q = tokens_by(call, work->d_q, m->q_width);
    qs_mat d_k = tokens_by(call, work->d_k, m->kv_width);
    qs_mat d_v = tokens_by(call, work->d_v, m->kv_width);
    QS_TRY(m->ops->attention_backward(m->queue, &shape, &q, &k, &v, &o, acts->lse, &d_o,
                                      work->delta, &d_q, &d_k, &d_v));
    m->flops += 8.0 * attention_pairs(call->batch) * (double)m->q_width;
    QS_TRY(rotate(call, work->d_q, m->config->n_heads, true));
    QS_TRY(rotate(call, work->d_k, m->config->n_kv_heads, true));

    QS_TRY(norm_forward(call, acts->x, params_of(call)->norm1, acts->rstd1));
    QS_TRY(linear_backward(call, QS_Q, work->norm, work->d_q, work->d_norm, false, want_dx, grad));
    QS_TRY(linear_backward(call, QS_K, work->norm, work->d_k, work->d_norm, true, want_dx, grad));
    QS_TRY(linear_backward(call, QS_V, work->norm, work->d_v, work->d_norm, true, want_dx, grad));
    return want_dx ? norm_backward(call, acts->x, params_of(call)->norm1, acts->rstd1, dx) : QS_OK;
}

qs_status qs_layer_backward(const qs_layer_call *call, float *dx, float *grad)
{
    QS_TRY(backward_mlp(call, dx, grad));
    return backward_attention(call, dx, grad);
}
