/* DoRA's row norms of W + s B A, and the gains m / norm that the linears are scaled by. They follow
 * from the adapter and the base alone, so they are computed once after each change of the adapter,
 * in the first pass upwards, while the unit is there; the backward finds them. */
#include "model/model_impl.h"

#include <string.h>

#include "base/mem.h"
#include "base/minmax.h"

static bool has_dora(const qs_model *m)
{
    return m->layout != NULL && m->layout->dora;
}

static int64_t float_count(const qs_model *m)
{
    return has_dora(m) ? 2 * m->config->n_layers * qs_lora_magnitudes(m->layout) : 0;
}

size_t qs_dora_bytes(const qs_model *m)
{
    return (size_t)float_count(m) * sizeof(float);
}

qs_status qs_dora_create(qs_model *m)
{
    if (!has_dora(m)) {
        return QS_OK;
    }
    const int64_t rows = qs_lora_magnitudes(m->layout);
    QS_TRY(QS_DEVICE_ALLOC(m->device, &m->dora.norm, float_count(m), QS_MEM_LORA));
    m->dora.gain = m->dora.norm + m->config->n_layers * rows;
    m->dora.rows = rows;
    for (int i = 0, at = 0; i < QS_LINEAR_COUNT; i++) {
        m->dora.at[i] = at;
        at += m->layout->targeted[i] ? (int)m->layout->out[i] : 0;
    }
    return QS_OK;
}

void qs_dora_destroy(qs_model *m)
{
    qs_device_free(m->device, m->dora.norm);
}

void qs_dora_attach(const qs_model *m, int layer, qs_linear linear, qs_lora *lora)
{
    if (has_dora(m)) {
        const int64_t at = layer * m->dora.rows + m->dora.at[linear];
        lora->gain = m->dora.gain + at;
        lora->norm = m->dora.norm + at;
    }
}

static const float *magnitudes_of(const qs_model *m, int layer, int linear)
{
    if (m->dora.magnitude != NULL) {
        return m->dora.magnitude + layer * m->dora.rows + m->dora.at[linear];
    }
    return (const float *)m->lora + layer * m->layout->per_layer + m->layout->m_at[linear];
}

qs_status qs_dora_layer_norms(qs_model *m, int layer, const qs_unit_view *unit)
{
    if (!has_dora(m) || m->dora.ready) {
        return QS_OK;
    }
    for (int i = 0; i < QS_LINEAR_COUNT; i++) {
        if (m->layout->targeted[i]) {
            const qs_lora lora = qs_layer_adapter(m, layer, (qs_linear)i);
            const int64_t at = layer * m->dora.rows + m->dora.at[i];
            QS_TRY(m->ops->dora_norms(m->queue, unit, &m->layers[layer].linear[i], &lora,
                                      magnitudes_of(m, layer, i), m->dora.norm + at,
                                      m->dora.gain + at));
        }
    }
    return QS_OK;
}

void qs_dora_pass_done(qs_model *m)
{
    m->dora.ready = true;
}

void qs_model_adapter_changed(qs_model *m)
{
    m->dora.ready = false;
}

/* ---- the start ---- */

/* The part of `rows`, norms of a linear whose magnitudes begin at `at`, that lies in `elements`. */
static void copy_common(const float *rows, int64_t at, int64_t count, qs_range elements, float *out)
{
    const int64_t begin = qs_max_i64(at, elements.begin);
    const int64_t end = qs_min_i64(at + count, elements.end);
    if (begin < end) {
        memcpy(out + begin - elements.begin, rows + begin - at,
               (size_t)(end - begin) * sizeof *out);
    }
}

static qs_status layer_magnitudes(qs_model *m, int layer, const qs_unit_view *unit, float *host,
                                  qs_range elements, float *out)
{
    const qs_lora none = {0};
    for (int i = 0; i < QS_LINEAR_COUNT; i++) {
        if (m->layout->targeted[i]) {
            QS_TRY(m->ops->dora_norms(m->queue, unit, &m->layers[layer].linear[i], &none, NULL,
                                      m->dora.norm + m->dora.at[i], NULL));
        }
    }
    QS_TRY(qs_queue_copy(m->queue, host, m->dora.norm, (size_t)m->dora.rows * sizeof *host));
    QS_TRY(qs_queue_wait(m->queue));
    for (int i = 0; i < QS_LINEAR_COUNT; i++) {
        if (m->layout->targeted[i]) {
            copy_common(host + m->dora.at[i], m->layout->m_at[i], m->layout->out[i], elements, out);
        }
    }
    return QS_OK;
}

static qs_status all_magnitudes(qs_model *m, float *host, qs_range elements, int64_t stride,
                                float *out)
{
    const int layers = m->config->n_layers;
    for (int l = 0; l < layers; l++) {
        m->order[l] = qs_base_layer_unit(m->index, l);
    }
    QS_TRY(qs_fsdp_begin(m->fsdp, m->order, layers));
    for (int l = 0; l < layers; l++) {
        const int u = m->order[l];
        qs_unit_view view;
        QS_TRY(qs_fsdp_acquire(m->fsdp, u, &view));
        QS_TRY(layer_magnitudes(m, l, &view, host, elements, out + l * stride));
        QS_TRY(qs_fsdp_release(m->fsdp, u));
    }
    return QS_OK;
}

qs_status qs_model_magnitudes(qs_model *m, qs_range elements, int64_t stride, float *out)
{
    float *host = NULL;
    if (!has_dora(m)) {
        return QS_OK;
    }
    QS_TRY(QS_ALLOC(&host, m->dora.rows, QS_MEM_WORK));
    const qs_status st = all_magnitudes(m, host, elements, stride, out);
    m->dora.ready = false; /* the norms of the first layer were overwritten */
    qs_mem_free(host);
    return st;
}
