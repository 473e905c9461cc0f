/* Where layers are decoded to (slots of qs_ops.unit_open). Those that stay take a place each, the
 * others take turns in place 0, which still holds its last layer when a pass turns around, and
 * layer 0 when the next one begins. */
#include "model/model_impl.h"

#include "base/mem.h"
#include "base/minmax.h"

/* Of those that stay the last needs none of its own if it is alone in place 0. */
int qs_model_kept_units(const qs_hf_config *config, const qs_model_shape *shape)
{
    return (int)qs_min_i64(shape->keep_decoded, config->n_layers - 1);
}

qs_status qs_decoded_create(qs_model *m)
{
    const int layers = m->config->n_layers, kept = qs_model_kept_units(m->config, &m->shape);
    qs_decoded *d = &m->decoded;
    int taken = 0;
    QS_TRY(QS_ALLOC(&d->of_layer, layers, QS_MEM_BASE_SMALL));
    QS_TRY(QS_ALLOC(&d->holds, 1 + kept, QS_MEM_BASE_SMALL));
    for (int l = 0; l < layers && taken < kept; l++) {
        if (qs_fsdp_stays(m->fsdp, qs_base_layer_unit(m->index, l))) {
            d->of_layer[l] = ++taken;
        }
    }
    for (int i = 0; i <= kept; i++) {
        d->holds[i] = -1;
    }
    return QS_OK;
}

void qs_decoded_destroy(qs_model *m)
{
    qs_mem_free(m->decoded.of_layer);
    qs_mem_free(m->decoded.holds);
}

qs_status qs_decoded_open(qs_model *m, int layer, const qs_unit_view *unit, const qs_weight *w,
                          const qs_lora *lora, int count)
{
    const int place = m->decoded.of_layer[layer];
    const bool decoded = m->decoded.holds[place] == layer;
    m->decoded.holds[place] = -1; /* should it fail */
    QS_TRY(m->ops->unit_open(m->queue, unit, w, lora, count, place, decoded));
    m->decoded.holds[place] = layer;
    return QS_OK;
}
