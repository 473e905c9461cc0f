/* Slots of decoded layers (qs_ops.unit_open). Those that stay take one each, the others take turns
 * in slot 0, which still holds its last layer when a pass turns around, and layer 0 when the next
 * one begins. */
#include "model/model_impl.h"

#include "base/mem.h"

/* Of those that stay the last needs none of its own if it is alone in slot 0. */
int qs_model_kept_units(const qs_hf_config *config, const qs_model_shape *shape)
{
    const int64_t others = config->n_layers - 1;
    return (int)(shape->keep_decoded < others ? shape->keep_decoded : others);
}

qs_status qs_slots_create(qs_model *m)
{
    const int layers = m->config->n_layers, kept = qs_model_kept_units(m->config, &m->shape);
    qs_decoded_slots *s = &m->slots;
    int taken = 0;
    QS_TRY(QS_ALLOC(&s->of_layer, layers, QS_MEM_BASE_SMALL));
    QS_TRY(QS_ALLOC(&s->holds, 1 + kept, QS_MEM_BASE_SMALL));
    for (int l = 0; l < layers && taken < kept; l++) {
        if (qs_fsdp_stays(m->fsdp, qs_base_layer_unit(m->index, l))) {
            s->of_layer[l] = ++taken;
        }
    }
    for (int i = 0; i <= kept; i++) {
        s->holds[i] = -1;
    }
    return QS_OK;
}

void qs_slots_destroy(qs_model *m)
{
    qs_mem_free(m->slots.of_layer);
    qs_mem_free(m->slots.holds);
}

qs_status qs_slots_open(qs_model *m, int layer, const qs_unit_view *unit, const qs_weight *w,
                        const qs_lora *lora, int count)
{
    const int slot = m->slots.of_layer[layer];
    const bool decoded = m->slots.holds[slot] == layer;
    m->slots.holds[slot] = -1; /* should it fail */
    QS_TRY(m->ops->unit_open(m->queue, unit, w, lora, count, slot, decoded));
    m->slots.holds[slot] = layer;
    return QS_OK;
}
