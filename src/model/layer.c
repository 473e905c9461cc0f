/* One decoder layer, forward and backward, for one micro-batch.
 *
 *   x (-> norm1) -> q k v (-> norm of q and k) -> RoPE -> attention -> o_proj
 *     (-> post1) -> + x = x2 (-> norm2) -> gate up -> GLU -> down (-> post2) -> + x2
 *
 * Norms stand in front (norm1, norm2), behind (post1, post2), or both. The backward needs q, k, v,
 * o, lse, x2, gate, up and the A x of every adapter, and what goes into post1 and post2 where there
 * are such norms; the outputs of norm1, norm2 and GLU are cheap and always computed again. What
 * else is computed again is the recompute mode:
 *
 *   none       everything is kept
 *   selective  gate and up are computed again (two of the three large matrices of the layer)
 *   full       all but x and the A x of down_proj: with the latter kept, down_proj itself is never
 *              computed twice, unless a norm stands behind it
 *
 * All modes give the same bits, because recomputing is the same operations on the same inputs.
 *
 * Phi-3 has one linear for q, k and v and one for gate and up, which adapters and quantization take
 * as one: the operations behind them read columns of its rows, and their gradients meet in the rows
 * of one matrix, so that nothing is copied together or apart. The same rows make the linears of
 * other models one product, where the operations join (qs_ops.joins). */
#include "model/flops.h"
#include "model/model_impl.h"

qs_mat qs_model_mat(const qs_model *model, void *data, int64_t rows, int64_t cols, int64_t border)
{
    return (qs_mat){.data = data,
                    .rows = rows,
                    .cols = cols,
                    .stride = cols + border,
                    .dtype = model->ops->act_dtype};
}

qs_mat qs_model_stream(const qs_model *model, void *data, int64_t rows)
{
    const int64_t hidden = model->config->hidden;
    return (qs_mat){data, rows, hidden, hidden, model->stream_dtype};
}

static qs_mat stream(const qs_layer_call *call, void *data)
{
    return qs_model_stream(call->model, data, call->batch->n_tokens);
}

/* [T, cols]; `bordered` has the room behind its rows that a linear's operand should have. */
static qs_mat tokens_by(const qs_layer_call *call, void *data, int64_t cols)
{
    return qs_model_mat(call->model, data, call->batch->n_tokens, cols, 0);
}

static qs_mat bordered(const qs_layer_call *call, void *data, int64_t cols)
{
    return qs_model_mat(call->model, data, call->batch->n_tokens, cols, call->model->border);
}

/* Columns of rows that are `stride` long. */
static qs_mat columns(const qs_layer_call *call, void *data, int64_t cols, int64_t stride)
{
    return qs_model_mat(call->model, data, call->batch->n_tokens, cols, stride - cols);
}

static const qs_layer_params *params_of(const qs_layer_call *call)
{
    return &call->model->layers[call->layer];
}

static qs_flops flops_of(const qs_layer_call *call)
{
    const qs_model *m = call->model;
    return (qs_flops){m->config, m->layout, call->noise != NULL && call->noise->dropout > 0};
}

static void count_forward(const qs_layer_call *call, qs_linear linear)
{
    const qs_flops of = flops_of(call);
    call->model->flops += qs_flops_forward(&of, linear, (double)call->batch->n_tokens);
}

static void count_backward(const qs_layer_call *call, qs_linear linear, bool dx)
{
    const qs_flops of = flops_of(call);
    call->model->flops += qs_flops_backward(&of, linear, (double)call->batch->n_tokens, dx);
}

static void count_attention(const qs_layer_call *call, bool backward)
{
    const qs_batch *batch = call->batch;
    const qs_hf_config *cfg = call->model->config;
    double pairs = 0;
    for (int d = 0; d < batch->n_docs; d++) {
        pairs += qs_flops_pairs(batch->cu_seqlens[d + 1] - batch->cu_seqlens[d],
                                cfg->windowed[call->layer] ? (double)cfg->window : 0);
    }
    call->model->flops += qs_flops_attention(cfg, pairs, backward);
}

qs_lora qs_layer_adapter(const qs_model *m, int layer, qs_linear linear)
{
    const qs_lora_layout *layout = m->layout;
    if (layout == NULL || !layout->targeted[linear]) {
        return (qs_lora){0};
    }
    const char *segment =
        (const char *)m->lora + (size_t)((int64_t)layer * layout->per_layer) * m->act_bytes;
    qs_lora lora = {.a = segment + (size_t)layout->a_at[linear] * m->act_bytes,
                    .b = segment + (size_t)layout->b_at[linear] * m->act_bytes,
                    .rank = layout->lora_rank,
                    .scale = layout->scale};
    qs_dora_attach(m, layer, linear, &lora);
    return lora;
}

/* The same with the dropout of this micro-batch. */
static qs_lora adapter_of(const qs_layer_call *call, qs_linear linear)
{
    qs_lora lora = qs_layer_adapter(call->model, call->layer, linear);
    if (lora.a != NULL && call->noise != NULL && call->noise->dropout > 0) {
        lora.dropout = call->noise->dropout;
        lora.seed = call->noise->seed;
        lora.step = call->noise->step;
        lora.site = (uint32_t)QS_RNG_DROPOUT + (uint32_t)linear;
        lora.layer = (uint32_t)call->layer;
        lora.sample = call->input->device.sample;
        lora.row_at = call->input->device.row_at;
    }
    return lora;
}

qs_status qs_layer_open(qs_model *model, int layer, const qs_unit_view *unit)
{
    qs_weight w[QS_LINEAR_COUNT];
    qs_lora lora[QS_LINEAR_COUNT];
    int count = 0;
    for (int i = 0; i < QS_LINEAR_COUNT; i++) {
        if (qs_linears(model->config->fused) >> i & 1) {
            w[count] = model->layers[layer].linear[i];
            lora[count++] = qs_layer_adapter(model, layer, (qs_linear)i);
        }
    }
    return qs_decoded_open(model, layer, unit, w, lora, count);
}

void qs_layer_close(qs_model *model)
{
    model->ops->unit_close(model->queue);
}

/* y = x W^T + bias + adapter + residual (which may be NULL). */
static qs_status linear_to(const qs_layer_call *call, qs_linear linear, const qs_mat *x,
                           const qs_mat *residual, qs_mat *y)
{
    const qs_model *m = call->model;
    const qs_layer_params *p = params_of(call);
    const qs_weight *w = &p->linear[linear];
    const qs_lora lora = adapter_of(call, linear);
    qs_mat xa = tokens_by(call, call->acts->xa[linear], lora.rank);
    QS_TRY(m->ops->linear_lora_forward(m->queue, call->unit, w, p->bias[linear], residual, &lora, x,
                                       &xa, y));
    count_forward(call, linear);
    return QS_OK;
}

static qs_status linear_forward(const qs_layer_call *call, qs_linear linear, const qs_mat *x,
                                void *y)
{
    qs_mat to = tokens_by(call, y, params_of(call)->linear[linear].out);
    return linear_to(call, linear, x, NULL, &to);
}

/* Linears that read the same x, and their results or the gradients of these. */
typedef struct {
    int count;
    qs_linear linear[QS_OPS_JOINED_MAX];
    qs_mat y[QS_OPS_JOINED_MAX];
} siblings;

/* What the operations want of them; grad NULL: only what the forward does. */
static void describe_siblings(const qs_layer_call *call, const siblings *s, float *grad,
                              qs_joined_linear *out)
{
    const qs_model *m = call->model;
    const qs_layer_params *p = params_of(call);
    for (int i = 0; i < s->count; i++) {
        const qs_linear linear = s->linear[i];
        const qs_lora lora = adapter_of(call, linear);
        out[i] = (qs_joined_linear){.w = &p->linear[linear],
                                    .bias = p->bias[linear],
                                    .lora = lora,
                                    .xa = tokens_by(call, call->acts->xa[linear], lora.rank),
                                    .y = s->y[i]};
        if (grad != NULL && lora.a != NULL) {
            out[i].work = tokens_by(call, m->work.lora, lora.rank);
            out[i].da = grad + m->layout->a_at[linear];
            out[i].db = grad + m->layout->b_at[linear];
        }
    }
}

static qs_status linears_forward(const qs_layer_call *call, const siblings *s, const qs_mat *x)
{
    const qs_model *m = call->model;
    qs_joined_linear joined[QS_OPS_JOINED_MAX];
    describe_siblings(call, s, NULL, joined);
    QS_TRY(m->ops->linears_lora_forward(m->queue, call->unit, joined, s->count, x));
    for (int i = 0; i < s->count; i++) {
        count_forward(call, s->linear[i]);
    }
    return QS_OK;
}

/* The gradient of the magnitudes; FLOPs of a linear's backward, with `dx` that of its input. */
static qs_status finish_backward(const qs_layer_call *call, qs_linear linear, const qs_mat *x,
                                 const qs_joined_linear *l, bool dx, float *grad)
{
    qs_model *m = call->model;
    if (l->lora.gain != NULL) {
        QS_TRY(m->ops->dora_backward(m->queue, call->unit, l->w, &l->lora, x, &l->xa, &l->y,
                                     grad + m->layout->m_at[linear]));
    }
    count_backward(call, linear, dx);
    return QS_OK;
}

/* dx = the sum of dy W + adapter, and the adapters' gradients. dx NULL: only the latter. */
static qs_status linears_backward(const qs_layer_call *call, const siblings *s, const qs_mat *x,
                                  qs_mat *dx, float *grad)
{
    const qs_model *m = call->model;
    qs_joined_linear joined[QS_OPS_JOINED_MAX];
    describe_siblings(call, s, grad, joined);
    QS_TRY(m->ops->linears_lora_backward(m->queue, call->unit, joined, s->count, x, dx, false));
    for (int i = 0; i < s->count; i++) {
        QS_TRY(finish_backward(call, s->linear[i], x, &joined[i], dx != NULL, grad));
    }
    return QS_OK;
}

static qs_status linear_backward(const qs_layer_call *call, qs_linear linear, const qs_mat *x,
                                 const qs_mat *dy, qs_mat *dx, float *grad)
{
    const siblings alone = {1, {linear}, {*dy}};
    return linears_backward(call, &alone, x, dx, grad);
}

/* x, of the stream or what a branch gave, through a norm into work.norm, which is also what *norm
 * describes. */
static qs_status norm_forward(const qs_layer_call *call, const qs_mat *x, const float *w, float eps,
                              float *rstd, qs_mat *norm)
{
    const qs_model *m = call->model;
    *norm = columns(call, m->work.norm, m->config->hidden, m->config->hidden + m->norm_border);
    return m->ops->rmsnorm_forward(m->queue, x, w, eps, rstd, norm);
}

/* A branch of the layer begins: the stream through the norm `w` in front of its linears or, where
 * there is none, as it is, but of their type and with their border. */
static qs_status branch_begin(const qs_layer_call *call, void *x, const float *w, float *rstd,
                              qs_mat *norm)
{
    const qs_model *m = call->model;
    const qs_mat from = stream(call, x);
    if (w != NULL) {
        return norm_forward(call, &from, w, m->stream_eps, rstd, norm);
    }
    *norm = columns(call, m->work.norm, m->config->hidden, m->config->hidden + m->norm_border);
    return m->ops->gather_rows(m->queue, &from, m->every_row, norm);
}

/* What attention's linears read, and the MLP's. */
static qs_status branch1_input(const qs_layer_call *call, qs_mat *norm)
{
    return branch_begin(call, call->acts->x, params_of(call)->norm1, call->acts->rstd1, norm);
}

static qs_status branch2_input(const qs_layer_call *call, qs_mat *norm)
{
    return branch_begin(call, call->acts->x2, params_of(call)->norm2, call->acts->rstd2, norm);
}

/* Its backward: work.d_norm, through the norm, is added to dx. */
static qs_status branch_begin_backward(const qs_layer_call *call, void *x, const float *w,
                                       const float *rstd, qs_mat *dx)
{
    const qs_model *m = call->model;
    const qs_mat dy = tokens_by(call, m->work.d_norm, m->config->hidden);
    const qs_mat xm = stream(call, x);
    return w != NULL ? m->ops->rmsnorm_backward(m->queue, &dy, &xm, w, rstd, dx)
                     : m->ops->add(m->queue, dx, &dy, dx);
}

static qs_status rotate(const qs_layer_call *call, qs_mat *x, int heads, bool inverse)
{
    const qs_model *m = call->model;
    if (m->config->unturned[call->layer]) {
        return QS_OK;
    }
    const bool local = m->config->windowed[call->layer] && m->rope_local.cos != NULL;
    const qs_rope_table *table = local ? &m->rope_local : &m->rope;
    return m->ops->rope(m->queue, x, heads, m->config->head_dim, m->config->rotary_dim, table->cos,
                        table->sin, call->input->device.position, inverse);
}

/* A matrix of heads as one of what the norm of q or k goes over: rows of a head, or of all of a
 * token. Only without a border. */
static qs_mat by_norm(const qs_layer_call *call, void *data, int heads)
{
    const qs_hf_config *cfg = call->model->config;
    const int64_t width = qs_qk_norm_width(cfg, heads);
    return qs_model_mat(call->model, data,
                        call->batch->n_tokens * ((int64_t)heads * cfg->head_dim / width), width, 0);
}

/* RMSNorm of q or k: `in` to `out`. */
static qs_status qk_norm(const qs_layer_call *call, void *in, const float *w, int heads,
                         float *rstd, void *out)
{
    const qs_model *m = call->model;
    const qs_mat x = by_norm(call, in, heads);
    qs_mat y = by_norm(call, out, heads);
    return m->ops->rmsnorm_forward(m->queue, &x, w, m->config->rms_norm_eps, rstd, &y);
}

/* Its backward: d_out to d_in, which describes what the linear behind it goes on with. */
static qs_status qk_norm_backward(const qs_layer_call *call, void *in, const float *w, int heads,
                                  const float *rstd, void *d_out, void *d_in, qs_mat *d_linear)
{
    const qs_model *m = call->model;
    const qs_mat dy = by_norm(call, d_out, heads), x = by_norm(call, in, heads);
    qs_mat dx = by_norm(call, d_in, heads);
    QS_TRY(qs_queue_zero(m->queue, d_in, (size_t)(dx.rows * dx.cols) * m->act_bytes));
    QS_TRY(m->ops->rmsnorm_backward(m->queue, &dy, &x, w, rstd, &dx));
    *d_linear = tokens_by(call, d_in, (int64_t)heads * m->config->head_dim);
    return QS_OK;
}

static qs_attention_shape attention_shape(const qs_layer_call *call)
{
    const qs_hf_config *cfg = call->model->config;
    return (qs_attention_shape){.n_heads = cfg->n_heads,
                                .n_kv_heads = cfg->n_kv_heads,
                                .head_dim = cfg->head_dim,
                                .scale = cfg->score_scale,
                                .cap = cfg->attention_cap,
                                .window = cfg->windowed[call->layer] ? (int)cfg->window : 0,
                                .cu_seqlens = call->input->device.cu_seqlens,
                                .n_docs = call->batch->n_docs,
                                .longest = call->input->longest};
}

/* How a branch of the layer ends: a linear and, where there is one, a norm behind it, for whose
 * backward what it goes over and what it divided by stay. */
typedef struct {
    qs_linear linear;
    const float *norm; /* [hidden]; NULL: none, nor the two below */
    void *given;       /* [T, hidden] of act_dtype: what the linear gave */
    float *rstd;       /* [T] */
} branch_ending;

static branch_ending attention_ending(const qs_layer_call *call)
{
    const qs_layer_acts *acts = call->acts;
    return (branch_ending){QS_O, params_of(call)->post1, acts->branch1, acts->rstd_post1};
}

static branch_ending mlp_ending(const qs_layer_call *call)
{
    const qs_layer_acts *acts = call->acts;
    return (branch_ending){QS_DOWN, params_of(call)->post2, acts->branch2, acts->rstd_post2};
}

/* y = x + what the branch gives for `in`. With a norm y may be NULL: what stays for its backward is
 * wanted alone. */
static qs_status branch_end(const qs_layer_call *call, const branch_ending *end, const qs_mat *in,
                            void *x, void *y)
{
    const qs_model *m = call->model;
    const qs_mat from = stream(call, x), given = tokens_by(call, end->given, m->config->hidden);
    qs_mat to = stream(call, y), norm;
    if (end->norm == NULL) {
        return linear_to(call, end->linear, in, &from, &to);
    }
    QS_TRY(linear_forward(call, end->linear, in, end->given));
    QS_TRY(norm_forward(call, &given, end->norm, m->config->rms_norm_eps, end->rstd, &norm));
    return y != NULL ? m->ops->add(m->queue, &from, &norm, &to) : QS_OK;
}

/* Its backward: from the gradient of y to that of what the linear gave, which *d_linear describes.
 */
static qs_status branch_end_backward(const qs_layer_call *call, const branch_ending *end,
                                     const qs_mat *dy, qs_mat *d_linear)
{
    const qs_model *m = call->model;
    if (end->norm == NULL) {
        *d_linear = *dy;
        return QS_OK;
    }
    const qs_mat from = tokens_by(call, end->given, m->config->hidden);
    *d_linear = bordered(call, m->work.d_branch, m->config->hidden);
    QS_TRY(qs_queue_zero(m->queue, d_linear->data,
                         (size_t)(d_linear->rows * d_linear->stride) * m->act_bytes));
    return m->ops->rmsnorm_backward(m->queue, dy, &from, end->norm, end->rstd, d_linear);
}

/* A matrix each for q, k and v, or the same columns of one. */
typedef struct {
    qs_mat q, k, v;
} qkv_mats;

static qkv_mats kept_qkv(const qs_layer_call *call)
{
    const qs_model *m = call->model;
    const qs_layer_acts *acts = call->acts;
    const int64_t row = m->qkv_width;
    return (qkv_mats){columns(call, acts->q, m->q_width, row > 0 ? row : m->q_width),
                      columns(call, acts->k, m->kv_width, row > 0 ? row : m->kv_width),
                      columns(call, acts->v, m->kv_width, row > 0 ? row : m->kv_width)};
}

/* The linears that make q, k and v, or what their norms go over. */
static siblings of_qkv(const qs_layer_call *call, const qkv_mats *x, int64_t border)
{
    const qs_model *m = call->model;
    if (m->config->fused) {
        return (siblings){
            1, {QS_QKV}, {columns(call, x->q.data, m->qkv_width, m->qkv_width + border)}};
    }
    return (siblings){3, {QS_Q, QS_K, QS_V}, {x->q, x->k, x->v}};
}

/* norm -> q, k, v */
static qs_status project(const qs_layer_call *call, const qs_mat *norm)
{
    const qs_layer_acts *acts = call->acts;
    const qs_layer_params *p = params_of(call);
    const qs_hf_config *cfg = call->model->config;
    const bool normed = p->q_norm != NULL;
    qkv_mats to = kept_qkv(call);
    if (normed) {
        to.q.data = acts->q_in;
        to.k.data = acts->k_in;
    }
    const siblings s = of_qkv(call, &to, 0);
    QS_TRY(linears_forward(call, &s, norm));
    if (normed) {
        QS_TRY(qk_norm(call, acts->q_in, p->q_norm, cfg->n_heads, acts->rstd_q, acts->q));
        QS_TRY(qk_norm(call, acts->k_in, p->k_norm, cfg->n_kv_heads, acts->rstd_k, acts->k));
    }
    return QS_OK;
}

/* x -> q, k, v, o, lse, x2 */
static qs_status attention_half(const qs_layer_call *call)
{
    qs_model *m = call->model;
    qs_layer_acts *acts = call->acts;
    const branch_ending end = attention_ending(call);
    qs_mat norm;
    QS_TRY(branch1_input(call, &norm));
    QS_TRY(project(call, &norm));

    qs_attention_shape shape = attention_shape(call);
    qkv_mats x = kept_qkv(call);
    qs_mat o = bordered(call, acts->o, m->q_width);
    QS_TRY(rotate(call, &x.q, m->config->n_heads, false));
    QS_TRY(rotate(call, &x.k, m->config->n_kv_heads, false));
    QS_TRY(m->ops->attention_forward(m->queue, &shape, &x.q, &x.k, &x.v, &o, acts->lse));
    count_attention(call, false);
    return branch_end(call, &end, &o, acts->x, acts->x2);
}

/* gate or up as it is kept. */
static qs_mat half_of_glu(const qs_layer_call *call, void *data)
{
    const qs_model *m = call->model;
    const int64_t ffn = m->config->ffn_hidden, row = m->gate_up_width + m->gate_up_border;
    return columns(call, data, ffn, m->gate_up_width > 0 ? row : ffn);
}

/* The linears that make gate and up, and these or their gradients. */
static siblings of_gate_and_up(const qs_layer_call *call, const qs_mat *gate, const qs_mat *up)
{
    const qs_model *m = call->model;
    if (m->config->fused) {
        return (siblings){
            1, {QS_GATE_UP}, {columns(call, gate->data, m->gate_up_width, gate->stride)}};
    }
    return (siblings){2, {QS_GATE, QS_UP}, {*gate, *up}};
}

/* x2 -> gate, up */
static qs_status gate_and_up(const qs_layer_call *call)
{
    const qs_mat gates = half_of_glu(call, call->acts->gate);
    const qs_mat up = half_of_glu(call, call->acts->up);
    const siblings s = of_gate_and_up(call, &gates, &up);
    qs_mat norm;
    QS_TRY(branch2_input(call, &norm));
    return linears_forward(call, &s, &norm);
}

/* gate, up -> act, which is what *act describes */
static qs_status glu_forward(const qs_layer_call *call, qs_mat *act)
{
    const qs_model *m = call->model;
    const qs_mat gates = half_of_glu(call, call->acts->gate);
    const qs_mat up = half_of_glu(call, call->acts->up);
    *act = bordered(call, m->work.act, m->config->ffn_hidden);
    return m->ops->glu_forward(m->queue, m->config->glu, &gates, &up, act);
}

/* gate, up, x2 -> x_next */
static qs_status down_proj(const qs_layer_call *call, void *x_next)
{
    const branch_ending end = mlp_ending(call);
    qs_mat act;
    QS_TRY(glu_forward(call, &act));
    return branch_end(call, &end, &act, call->acts->x2, x_next);
}

qs_status qs_layer_forward(const qs_layer_call *call, void *x_next)
{
    QS_TRY(attention_half(call));
    QS_TRY(gate_and_up(call));
    return down_proj(call, x_next);
}

/* What the backward of the norm behind down_proj has to find. The layer's output is not wanted. */
static qs_status recompute_down(const qs_layer_call *call)
{
    return params_of(call)->post2 != NULL ? down_proj(call, NULL) : QS_OK;
}

qs_status qs_layer_recompute(const qs_layer_call *call)
{
    switch (call->model->shape.recompute) {
    case QS_RECOMPUTE_FULL:
        QS_TRY(attention_half(call));
        QS_TRY(gate_and_up(call));
        return recompute_down(call);
    case QS_RECOMPUTE_SELECTIVE:
        return gate_and_up(call);
    default:
        return QS_OK;
    }
}

/* gate, up and the gradient of what they give -> d_norm, which is what *d_norm describes. In
 * matrices of their own, d_gate takes the place of d_act and d_up that of act; in the rows of one,
 * they take those of gate and up. Nobody needs any of these any more. */
static qs_status backward_glu(const qs_layer_call *call, qs_mat *d_act, qs_mat *act, float *grad,
                              qs_mat *d_norm)
{
    const qs_model *m = call->model;
    const bool in_rows = m->gate_up_width > 0;
    qs_mat gates = half_of_glu(call, call->acts->gate), up = half_of_glu(call, call->acts->up);
    qs_mat *d_gate = in_rows ? &gates : d_act, *d_up = in_rows ? &up : act, norm;
    QS_TRY(m->ops->glu_backward(m->queue, m->config->glu, &gates, &up, d_act, d_gate, d_up));
    QS_TRY(branch2_input(call, &norm));
    *d_norm = tokens_by(call, m->work.d_norm, m->config->hidden);
    const siblings s = of_gate_and_up(call, d_gate, d_up);
    return linears_backward(call, &s, &norm, d_norm, grad);
}

/* dx (of the layer's output) -> dx (of x2): the MLP's branch is added to what passes by. */
static qs_status backward_mlp(const qs_layer_call *call, qs_mat *dx, float *grad)
{
    const qs_model *m = call->model;
    const qs_layer_acts *acts = call->acts;
    const branch_ending end = mlp_ending(call);
    qs_mat act, d_down, d_norm;
    qs_mat d_act = bordered(call, m->work.d_act, m->config->ffn_hidden);
    QS_TRY(glu_forward(call, &act));
    QS_TRY(branch_end_backward(call, &end, dx, &d_down));
    QS_TRY(linear_backward(call, QS_DOWN, &act, &d_down, &d_act, grad));
    QS_TRY(backward_glu(call, &d_act, &act, grad, &d_norm));
    return branch_begin_backward(call, acts->x2, params_of(call)->norm2, acts->rstd2, dx);
}

/* Where attention's backward leaves the gradients of q, k and v: for linears, so with a border, but
 * where norms come between. */
static qkv_mats gradients_of_qkv(const qs_layer_call *call)
{
    const qs_model *m = call->model;
    const qs_model_work *work = &m->work;
    const int64_t row = m->qkv_width + m->qkv_border;
    if (m->qkv_width > 0) {
        return (qkv_mats){columns(call, work->d_q, m->q_width, row),
                          columns(call, work->d_k, m->kv_width, row),
                          columns(call, work->d_v, m->kv_width, row)};
    }
    const int64_t border = m->config->qk_norm ? 0 : m->border;
    return (qkv_mats){columns(call, work->d_q, m->q_width, m->q_width + border),
                      columns(call, work->d_k, m->kv_width, m->kv_width + border),
                      bordered(call, work->d_v, m->kv_width)};
}

/* dx (of x2) -> dx (of x). Below the first layer nothing is trained, so its dx is not computed. */
static qs_status backward_attention(const qs_layer_call *call, qs_mat *dx, float *grad)
{
    qs_model *m = call->model;
    qs_layer_acts *acts = call->acts;
    qs_model_work *work = &m->work;
    const qkv_mats x = kept_qkv(call);
    const qs_mat o = bordered(call, acts->o, m->q_width);
    qs_mat d_o = tokens_by(call, work->d_o, m->q_width);
    const qs_layer_params *p = params_of(call);
    const branch_ending end = attention_ending(call);
    qkv_mats d = gradients_of_qkv(call);
    qs_mat d_attention;
    QS_TRY(branch_end_backward(call, &end, dx, &d_attention));
    QS_TRY(linear_backward(call, QS_O, &o, &d_attention, &d_o, grad));

    const qs_attention_shape shape = attention_shape(call);
    QS_TRY(m->ops->attention_backward(m->queue, &shape, &x.q, &x.k, &x.v, &o, acts->lse, &d_o,
                                      work->delta, &d.q, &d.k, &d.v));
    count_attention(call, true);
    QS_TRY(rotate(call, &d.q, m->config->n_heads, true));
    QS_TRY(rotate(call, &d.k, m->config->n_kv_heads, true));
    if (p->q_norm != NULL) {
        QS_TRY(qk_norm_backward(call, acts->q_in, p->q_norm, m->config->n_heads, acts->rstd_q,
                                work->d_q, work->d_q_in, &d.q));
        QS_TRY(qk_norm_backward(call, acts->k_in, p->k_norm, m->config->n_kv_heads, acts->rstd_k,
                                work->d_k, work->d_k_in, &d.k));
    }

    qs_mat norm, d_norm = tokens_by(call, work->d_norm, m->config->hidden);
    qs_mat *wanted = call->layer > 0 ? &d_norm : NULL;
    QS_TRY(branch1_input(call, &norm));
    const siblings s = of_qkv(call, &d, m->qkv_border);
    QS_TRY(linears_backward(call, &s, &norm, wanted, grad));
    return wanted != NULL
               ? branch_begin_backward(call, acts->x, params_of(call)->norm1, acts->rstd1, dx)
               : QS_OK;
}

qs_status qs_layer_backward(const qs_layer_call *call, void *dx, float *grad)
{
    qs_mat gradient = bordered(call, dx, call->model->config->hidden);
    QS_TRY(backward_mlp(call, &gradient, grad));
    return backward_attention(call, &gradient, grad);
}
