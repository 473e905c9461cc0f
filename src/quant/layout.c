#include "quant/layout.h"

#include <assert.h>
#include <string.h>

enum { SECTION_ALIGN = 128 };

static size_t padded(size_t bytes)
{
    return (bytes + SECTION_ALIGN - 1) / SECTION_ALIGN * SECTION_ALIGN;
}

static int64_t per_rank(int64_t count, int nranks)
{
    return (count + nranks - 1) / nranks;
}

size_t qs_raw_quantum_bytes(const qs_unit_size *size)
{
    return (size_t)size->raw_quantum_elems * qs_dtype_bytes(size->raw_dtype);
}

qs_unit_layout qs_unit_layout_make(const qs_unit_size *size, int nranks)
{
    assert(nranks > 0 && size->nf4_quanta >= 0 && size->raw_quanta >= 0);
    qs_unit_layout layout = {
        .size = *size,
        .nranks = nranks,
        .nf4_per_rank = per_rank(size->nf4_quanta, nranks),
        .raw_per_rank = per_rank(size->raw_quanta, nranks),
    };
    size_t quanta = (size_t)layout.nf4_per_rank;
    size_t absmax8 = quanta * (size_t)size->absmax8_per_quantum;
    size_t absmax32 = quanta * (size_t)size->absmax32_per_quantum * sizeof(float);
    size_t raw = (size_t)layout.raw_per_rank * qs_raw_quantum_bytes(size);
    layout.packed_at = 0;
    layout.absmax8_at = layout.packed_at + padded(quanta * QS_NF4_QUANTUM_PACKED_BYTES);
    layout.absmax32_at = layout.absmax8_at + padded(absmax8);
    layout.raw_at = layout.absmax32_at + padded(absmax32);
    layout.message_bytes = layout.raw_at + padded(raw);
    return layout;
}

qs_nf4_quantum qs_unit_nf4_quantum(const qs_unit_view *view, int64_t quantum)
{
    const qs_unit_layout *l = &view->layout;
    assert(quantum >= 0 && quantum < l->size.nf4_quanta);
    const uint8_t *message = view->base + (size_t)(quantum / l->nf4_per_rank) * l->message_bytes;
    size_t at = (size_t)(quantum % l->nf4_per_rank);
    size_t absmax32 = at * (size_t)l->size.absmax32_per_quantum * sizeof(float);
    return (qs_nf4_quantum){
        .packed = message + l->packed_at + at * QS_NF4_QUANTUM_PACKED_BYTES,
        .absmax8 = l->size.absmax8_per_quantum == 0
                       ? NULL
                       : message + l->absmax8_at + at * (size_t)l->size.absmax8_per_quantum,
        /* Sections are padded to 128 bytes and a view starts on 64, so the floats are aligned. */
        .absmax32 = (const float *)(const void *)(message + l->absmax32_at + absmax32),
    };
}

const uint8_t *qs_unit_raw_quantum(const qs_unit_view *view, int64_t quantum)
{
    const qs_unit_layout *l = &view->layout;
    assert(quantum >= 0 && quantum < l->size.raw_quanta);
    const uint8_t *message = view->base + (size_t)(quantum / l->raw_per_rank) * l->message_bytes;
    return message + l->raw_at +
           (size_t)(quantum % l->raw_per_rank) * qs_raw_quantum_bytes(&l->size);
}

static float nf4_element(const qs_nf4_quantum *quantum, const qs_weight *w, int64_t at)
{
    int64_t block = at / QS_NF4_BLOCK;
    float absmax = quantum->absmax8 == NULL ? quantum->absmax32[block]
                                            : qs_nf4_absmax(w->map, quantum->absmax8[block],
                                                            quantum->absmax32[0], w->offset);
    uint8_t byte = quantum->packed[at / 2];
    unsigned code = at % 2 == 0 ? (unsigned)byte >> 4 : byte & 15U;
    return qs_f32_round(qs_nf4_code[code] * absmax, w->dtype);
}

void qs_weight_decode(const qs_unit_view *view, const qs_weight *w, int64_t first, int64_t count,
                      float *out)
{
    const qs_unit_size *size = &view->layout.size;
    int64_t elems = w->kind == QS_WEIGHT_NF4 ? QS_NF4_QUANTUM : size->raw_quantum_elems;
    while (count > 0) {
        int64_t at = first % elems;
        int64_t run = elems - at < count ? elems - at : count;
        int64_t number = w->quantum + first / elems;
        if (w->kind == QS_WEIGHT_NF4) {
            qs_nf4_quantum quantum = qs_unit_nf4_quantum(view, number);
            for (int64_t i = 0; i < run; i++) {
                out[i] = nf4_element(&quantum, w, at + i);
            }
        } else {
            const uint8_t *raw = qs_unit_raw_quantum(view, number);
            qs_f32_load(out, raw + (size_t)at * qs_dtype_bytes(w->dtype), w->dtype, run);
        }
        first += run;
        count -= run;
        out += run;
    }
}
