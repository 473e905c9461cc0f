/* What a layer's gather and its forward take here, measured with the run's own units, buffers and
 * operations before its first pass. The two layers that are gathered for it are the first that the
 * pass will use: nothing is moved in vain. */
#include <string.h>

#include "base/timer.h"
#include "model/model_impl.h"

/* The first two layers that are gathered; -1 where there are fewer. */
static void find_gathered(const qs_model *m, int found[2])
{
    found[0] = found[1] = -1;
    for (int l = m->config->n_layers - 1; l >= 0; l--) {
        if (qs_fsdp_is_gathered(m->fsdp, qs_base_layer_unit(m->index, l))) {
            found[1] = found[0];
            found[0] = l;
        }
    }
}

/* Acquire the layer by itself, all ranks together, and wait until it is there. */
static qs_status acquire_alone(qs_model *m, int layer, qs_unit_view *view, double *seconds)
{
    const int u = qs_base_layer_unit(m->index, layer);
    QS_TRY(qs_fsdp_begin(m->fsdp, &u, 1));
    QS_TRY(qs_queue_wait(m->queue));
    QS_TRY(qs_fsdp_barrier(m->fsdp));
    const double since = qs_time_s();
    QS_TRY(qs_fsdp_acquire(m->fsdp, u, view));
    QS_TRY(qs_queue_wait(m->queue));
    *seconds = qs_time_s() - since;
    return QS_OK;
}

static qs_status release(qs_model *m, int layer)
{
    return qs_fsdp_release(m->fsdp, qs_base_layer_unit(m->index, layer));
}

/* The second of two forwards: the first finds algorithms and fills caches. */
static qs_status time_forward(qs_model *m, int layer, const qs_unit_view *view,
                              const qs_batch *batch, double *seconds)
{
    qs_micro_acts *micro = &m->micro[0];
    const qs_layer_call call = {.model = m,
                                .layer = layer,
                                .unit = view,
                                .batch = batch,
                                .input = &micro->input,
                                .acts = &micro->layers[layer]};
    const double flops = m->flops;
    const size_t row_bytes = (size_t)m->config->hidden * m->stream_bytes;
    QS_TRY(qs_input_load(m, micro, batch));
    QS_TRY(qs_queue_zero(m->queue, micro->layers[layer].x, (size_t)batch->n_tokens * row_bytes));
    QS_TRY(qs_layer_open(m, layer, view));
    for (int i = 0; i < 2; i++) {
        QS_TRY(qs_queue_wait(m->queue));
        const double since = qs_time_s();
        QS_TRY(qs_layer_forward(&call, micro->x_last));
        QS_TRY(qs_queue_wait(m->queue));
        *seconds = qs_time_s() - since;
    }
    qs_layer_close(m);
    m->flops = flops;
    return QS_OK;
}

static qs_status probe_forward(qs_model *m, int layer, const qs_unit_view *view, int64_t tokens,
                               int64_t length, double *seconds)
{
    qs_batch *batch = NULL;
    QS_TRY(qs_batch_create(&batch, tokens, tokens));
    qs_batch_lay_out(batch, tokens, length, 0); /* which tokens does not matter: rows are zeros */
    for (int64_t t = 0; t < tokens; t++) {
        batch->target[t] = -1;
    }
    const qs_status st = time_forward(m, layer, view, batch, seconds);
    qs_batch_destroy(batch);
    return st;
}

qs_status qs_model_probe(qs_model *m, int64_t tokens, int64_t length, qs_probe *out)
{
    int layers[2];
    qs_unit_view view;
    double seconds = 0;
    *out = (qs_probe){0};
    find_gathered(m, layers);
    if (layers[0] < 0) {
        return QS_OK;
    }
    if (layers[1] >= 0) {
        QS_TRY(acquire_alone(m, layers[1], &view, &out->gather_s[0]));
        QS_TRY(release(m, layers[1]));
    }
    QS_TRY(acquire_alone(m, layers[0], &view, &out->gather_s[1]));
    out->gather_bytes = view.layout.message_bytes;
    if (tokens > 0) {
        QS_TRY(probe_forward(m, layers[0], &view, tokens, length, &seconds));
        out->token_s = seconds / (double)tokens;
    }
    return release(m, layers[0]);
}
