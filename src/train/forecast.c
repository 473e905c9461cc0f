#include "train/forecast.h"

#include <string.h>

#include "base/mem.h"
#include "fsdp/gather_plan.h"
#include "kernels/cuda/ops_cuda.h"
#include "model/flops.h"

/* ---- what the device and the links give: docs/planning.md ---- */

/* Of the datasheet's figures. Fitted to one H200 with Llama-3-8B's shape, 4,096 tokens a step, rank
 * 16 on all linears: 251.5, 291.3 and 327 ms with recompute none, selective and full and the
 * residual stream in bf16. A large product alone reached 0.81 of the peak and a copy 0.88; a step's
 * products reach 0.85 of the one, its other memory 0.93 of the other, and attention follows from
 * what full takes beyond selective. */
static const double PRODUCT_SHARE = 0.69, ATTENTION_SHARE = 0.41, MEMORY_SHARE = 0.82;

/* Collectives reach about this much of a link's own figure. */
static const double LINK_SHARE = 0.8;

static const double NODE_GBPS = 25; /* 200 Gbit/s */

/* ---- the work ---- */

/* Sizes of a layer and of the tokens that a rank takes through it in a step. */
typedef struct {
    const qs_setting *on;
    double h, q, kv, f, v; /* widths: hidden, heads, kv heads, ffn; vocabulary */
    double layers;
    double tokens, targets; /* of the rank */
    double pairs;           /* of queries and keys, over all layers */
    double passes;
    double decoded_share; /* of the layers, that a pass decodes */
    double act_bytes;
    double more_bytes; /* of an element of the residual stream than of act_dtype */
} work_sizes;

/* Pairs of queries and keys in all layers and documents, for each token of the data. */
static double pairs_per_token(const qs_hf_config *model, const qs_data *data)
{
    double windowed = 0, whole = 0, layers_windowed = 0;
    for (int64_t d = 0; d < data->n_docs; d++) {
        const double n = (double)(data->doc_offsets[d + 1] - data->doc_offsets[d]);
        whole += qs_flops_pairs(n, 0);
        windowed += qs_flops_pairs(n, (double)model->window);
    }
    for (int l = 0; l < model->n_layers; l++) {
        layers_windowed += model->windowed[l];
    }
    return ((model->n_layers - layers_windowed) * whole + layers_windowed * windowed) /
           (double)data->n_tokens;
}

static work_sizes sizes_of(const qs_setting *on, const qs_data *train, const qs_model_shape *shape,
                           int64_t slots)
{
    const qs_hf_config *model = &on->index->config;
    const int64_t most = qs_shard_width(slots, on->nranks); /* slots of the busiest rank */
    const double batch = (double)on->config.train.global_batch;
    const double held = (double)(most * on->config.train.micro_batch);
    const double sequences = held < batch ? held : batch;
    work_sizes z = {.on = on,
                    .h = (double)model->hidden,
                    .q = (double)model->n_heads * model->head_dim,
                    .kv = (double)model->n_kv_heads * model->head_dim,
                    .f = (double)model->ffn_hidden,
                    .v = (double)model->vocab,
                    .layers = model->n_layers,
                    .tokens = sequences * (double)train->n_tokens / (double)train->n_sequences,
                    .targets = sequences * (double)train->n_targets / (double)train->n_sequences,
                    .passes = (double)((most + shape->group - 1) / shape->group),
                    .act_bytes = (double)qs_dtype_bytes(on->ops->act_dtype)};
    z.decoded_share = 1 - (double)shape->keep_decoded / z.layers;
    z.more_bytes = shape->residual_f32 ? (double)sizeof(float) - z.act_bytes : 0;
    z.pairs = z.tokens * pairs_per_token(model, train);
    return z;
}

static qs_flops flops_of(const work_sizes *z)
{
    return (qs_flops){&z->on->index->config, &z->on->layout, z->on->config.lora.dropout > 0};
}

static double forward_flops(const work_sizes *z, unsigned linears)
{
    const qs_flops of = flops_of(z);
    double flops = 0;
    for (int i = 0; i < QS_LINEAR_COUNT; i++) {
        if (linears >> i & 1) {
            flops += z->layers * qs_flops_forward(&of, (qs_linear)i, z->tokens);
        }
    }
    return flops;
}

static double backward_flops(const work_sizes *z)
{
    const qs_flops of = flops_of(z);
    double flops = 0;
    for (int i = 0; i < QS_LINEAR_COUNT; i++) {
        const double without_dx = QS_LINEARS_QKV >> i & 1; /* layers */
        flops += (z->layers - without_dx) * qs_flops_backward(&of, (qs_linear)i, z->tokens, true) +
                 without_dx * qs_flops_backward(&of, (qs_linear)i, z->tokens, false);
    }
    return flops;
}

static double attention_flops(const work_sizes *z, bool backward)
{
    return qs_flops_attention(&z->on->index->config, z->pairs, backward);
}

static bool has_norms_behind(const work_sizes *z)
{
    return qs_norms_behind(&z->on->index->config);
}

/* Of a norm behind a branch and the addition of what it gives, and as many of its gradient. */
static double norm_behind_elements(const work_sizes *z)
{
    return has_norms_behind(z) ? 5 * z->h : 0;
}

/* Elements a token that the operations around the products read and write in the halves of a
 * layer: norm (or copy), RoPE, what adapters read; norm, ditto; the gated MLP, ditto. */
static double attention_elements(const work_sizes *z)
{
    return 5 * z->h + 3 * z->q + 2 * z->kv + norm_behind_elements(z);
}

static double gate_elements(const work_sizes *z)
{
    return 4 * z->h;
}

static double down_elements(const work_sizes *z)
{
    return 4 * z->f + norm_behind_elements(z);
}

/* Norms and gates again, their gradients, those of RoPE and attention's sums; adapters read x
 * once and dY twice. */
static double backward_elements(const work_sizes *z)
{
    return 21 * z->h + 7 * z->q + 6 * z->kv + 13 * z->f + 2 * norm_behind_elements(z);
}

/* What a wider residual stream adds: norms read it, and what ends a branch reads and writes it. */
static double stream_bytes(const work_sizes *z, bool backward, qs_recompute recompute)
{
    const double forward = 6 * z->h, norms_twice = 4 * z->h;
    const double again = recompute == QS_RECOMPUTE_FULL        ? 4 * z->h
                         : recompute == QS_RECOMPUTE_SELECTIVE ? z->h
                                                               : 0;
    return z->tokens * z->layers * (backward ? norms_twice + again : forward) * z->more_bytes;
}

/* The unit of every layer that does not stay decoded, once a pass: what is read of it, and bf16
 * written. */
static double decode_bytes(const work_sizes *z)
{
    double bytes = 0;
    for (int l = 0; l < (int)z->layers; l++) {
        const qs_base_unit *unit = &z->on->index->units[qs_base_layer_unit(z->on->index, l)];
        bytes += (double)qs_unit_layout_make(&unit->size, 1).message_bytes;
        for (int i = 0; i < unit->n_tensors; i++) {
            if (unit->tensors[i].kind != QS_TENSOR_SMALL) {
                bytes +=
                    z->act_bytes * (double)(unit->tensors[i].shape[0] * unit->tensors[i].shape[1]);
            }
        }
    }
    return z->passes * bytes * z->decoded_share;
}

/* ---- gathers ---- */

typedef enum { UP, HEAD, DOWN, STRETCHES } stretch;

/* Which stretch of a pass the use at `position` belongs to. */
static stretch stretch_of(const qs_base_index *index, int position)
{
    const int layers = index->config.n_layers;
    return position < layers ? UP : position < layers + qs_base_head_chunks(index) ? HEAD : DOWN;
}

static void count_gather(const qs_setting *on, const qs_gather *gather, double *bytes)
{
    const int nranks = on->group.nranks;
    const qs_base_unit *unit = &on->index->units[gather->unit];
    const double message = (double)qs_unit_layout_make(&unit->size, nranks).message_bytes;
    bytes[stretch_of(on->index, gather->position)] += message * (nranks - 1);
}

/* One pass through the plan that the run itself follows. */
static qs_status walk_pass(const qs_setting *on, qs_gather_plan *plan, const int *order, int count,
                           double *bytes)
{
    QS_TRY(qs_gather_plan_begin(plan, order, count));
    for (int i = 0; i < count; i++) {
        qs_gather mine, next;
        bool gather = false;
        QS_TRY(qs_gather_plan_acquire(plan, order[i], &mine, &gather));
        if (gather) {
            count_gather(on, &mine, bytes);
        }
        while (qs_gather_plan_ahead(plan, &next)) {
            count_gather(on, &next, bytes);
        }
        if (mine.buffer >= 0) {
            qs_gather_plan_release(plan, order[i]);
        }
    }
    return QS_OK;
}

/* What a rank receives in a pass, by stretches: in the second of two, since the first finds empty
 * buffers. */
static qs_status gathers_of_pass(const qs_setting *on, const qs_model_shape *shape,
                                 double bytes[STRETCHES])
{
    qs_status st = QS_OK;
    const int units = on->index->n_units;
    const qs_fsdp_options options = qs_setting_fsdp_options(on, shape);
    qs_gather_plan plan = {0};
    bool *at_hand = NULL;
    int *order = NULL;
    QS_GOTO(QS_ALLOC(&at_hand, units, QS_MEM_WORK));
    QS_GOTO(QS_ALLOC(&order, 3 * units, QS_MEM_WORK));
    for (int u = 0; u < units; u++) {
        at_hand[u] = qs_fsdp_at_hand(on->index, u, on->group.nranks, &options);
    }
    QS_GOTO(qs_gather_plan_create(&plan, at_hand, units, options.prefetch));
    const int count = qs_model_order(on->index, true, order);
    for (int pass = 0; pass < 2; pass++) {
        memset(bytes, 0, STRETCHES * sizeof *bytes);
        QS_GOTO(walk_pass(on, &plan, order, count, bytes));
    }
done:
    qs_gather_plan_destroy(&plan);
    qs_mem_free(order);
    qs_mem_free(at_hand);
    return st;
}

/* ---- stretches ---- */

static qs_step_phase forward_phase(const work_sizes *z)
{
    const double elements = attention_elements(z) + gate_elements(z) + down_elements(z);
    return (qs_step_phase){.product_flops = forward_flops(z, QS_LINEARS_ALL),
                           .attention_flops = attention_flops(z, false),
                           .memory_bytes = decode_bytes(z) +
                                           z->tokens * z->layers * elements * z->act_bytes +
                                           stream_bytes(z, false, QS_RECOMPUTE_NONE)};
}

/* Logits are written in fp32, read twice, and their exponentials written and read in bf16; the
 * running sum over the vocabulary is read and written once a slice. */
static qs_step_phase head_phase(const work_sizes *z)
{
    return (qs_step_phase){.product_flops =
                               qs_flops_head(&z->on->index->config, z->targets, z->v, true),
                           .memory_bytes = z->targets * z->v * (16 + 8 * z->h / QS_HEAD_SLICE)};
}

static qs_step_phase backward_phase(const work_sizes *z, qs_recompute recompute)
{
    qs_step_phase p = {.product_flops = backward_flops(z),
                       .attention_flops = attention_flops(z, true)};
    double elements = backward_elements(z);
    if (recompute == QS_RECOMPUTE_FULL) {
        p.product_flops += forward_flops(z, QS_LINEARS_ATTENTION);
        p.attention_flops += attention_flops(z, false);
        elements += attention_elements(z);
        if (has_norms_behind(z)) {
            p.product_flops += forward_flops(z, QS_LINEARS_DOWN);
            elements += down_elements(z);
        }
    }
    if (recompute != QS_RECOMPUTE_NONE) {
        p.product_flops += forward_flops(z, QS_LINEARS_GATE_UP);
        elements += gate_elements(z);
    }
    p.memory_bytes = decode_bytes(z) + z->tokens * z->layers * elements * z->act_bytes +
                     stream_bytes(z, true, recompute);
    return p;
}

/* fp32 pieces of the gradient for the own share, and everybody's new weights. */
static double reduce_bytes(const work_sizes *z)
{
    const double share = z->layers * (double)qs_lora_shard_width(&z->on->layout, z->on->nranks);
    return (z->on->nranks - 1) * share * ((double)sizeof(float) + z->act_bytes);
}

qs_status qs_step_work_make(qs_step_work *out, const qs_setting *on, const qs_data *train,
                            const qs_model_shape *shape, int64_t slots)
{
    const work_sizes z = sizes_of(on, train, shape, slots);
    double gathered[STRETCHES];
    QS_TRY(gathers_of_pass(on, shape, gathered));
    *out = (qs_step_work){.forward = forward_phase(&z),
                          .head = head_phase(&z),
                          .backward = backward_phase(&z, shape->recompute),
                          .nranks = on->nranks,
                          .group = on->group.nranks,
                          .reduce_bytes = reduce_bytes(&z),
                          .all_tokens = (double)on->config.train.global_batch *
                                        (double)train->n_tokens / (double)train->n_sequences};
    out->forward.gather_bytes = z.passes * gathered[UP];
    out->head.gather_bytes = z.passes * gathered[HEAD];
    out->backward.gather_bytes = z.passes * gathered[DOWN];
    return QS_OK;
}

static double phase_flops(const qs_step_phase *phase)
{
    return phase->product_flops + phase->attention_flops;
}

double qs_step_flops(const qs_step_work *work)
{
    return phase_flops(&work->forward) + phase_flops(&work->head) + phase_flops(&work->backward);
}

double qs_step_gather_bytes(const qs_step_work *work)
{
    return work->forward.gather_bytes + work->head.gather_bytes + work->backward.gather_bytes;
}

/* ---- the time ---- */

qs_links qs_links_usual(const qs_gpu_kind *kind, int per_node)
{
    return (qs_links){.per_node = per_node,
                      .in_node_gbps = LINK_SHARE * kind->link_gbps,
                      .between_gbps = LINK_SHARE * NODE_GBPS};
}

/* A rank receives `bytes` over its own link; what comes from other nodes enters a node once and is
 * passed on inside. */
double qs_links_receive_s(double bytes, int nranks, const qs_links *links)
{
    if (nranks == 1) {
        return 0;
    }
    const int per_node = links->per_node < nranks ? links->per_node : nranks;
    const double foreign = bytes * (nranks - per_node) / (nranks - 1);
    const double inside_s = per_node > 1 ? bytes / (links->in_node_gbps * 1e9) : 0;
    const double between_s = foreign / (links->between_gbps * 1e9);
    return inside_s > between_s ? inside_s : between_s;
}

static void add_phase(qs_forecast *f, const qs_step_phase *phase, int group,
                      const qs_gpu_kind *kind, const qs_links *links)
{
    const double peak = kind->bf16_tflops * 1e12, bandwidth = kind->memory_gbps * 1e9;
    const double product = phase->product_flops / (PRODUCT_SHARE * peak);
    const double attention = phase->attention_flops / (ATTENTION_SHARE * peak);
    const double memory = phase->memory_bytes / (MEMORY_SHARE * bandwidth);
    const double compute = product + attention + memory;
    const double gather = qs_links_receive_s(phase->gather_bytes, group, links);
    f->product_s += product;
    f->attention_s += attention;
    f->memory_s += memory;
    f->compute_s += compute;
    f->gather_s += gather;
    f->gather_waited_s += gather > compute ? gather - compute : 0;
}

qs_forecast qs_forecast_make(const qs_step_work *work, const qs_gpu_kind *kind,
                             const qs_links *links)
{
    qs_forecast f = {.reduce_s = qs_links_receive_s(work->reduce_bytes, work->nranks, links)};
    add_phase(&f, &work->forward, work->group, kind, links);
    add_phase(&f, &work->head, work->group, kind, links);
    add_phase(&f, &work->backward, work->group, kind, links);
    f.step_s = f.compute_s + f.gather_waited_s + f.reduce_s;
    return f;
}
