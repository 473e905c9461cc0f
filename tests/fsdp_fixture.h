/* A base without a file: bytes, table rows and gradients that are functions of where they belong,
 * so that any rank can check what it got from any other. Shared by test_fsdp, test_grads and the
 * mpirun case. */
#ifndef QS_TESTS_FSDP_FIXTURE_H
#define QS_TESTS_FSDP_FIXTURE_H

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/rng.h"
#include "fsdp/fsdp_impl.h"
#include "fsdp/grads.h"

enum {
    FX_LAYERS = 4,
    FX_CHUNKS = 3,
    FX_CHUNK_ROWS = 13,
    FX_VOCAB = 2 * FX_CHUNK_ROWS + 4,
    FX_HIDDEN = 24,
    FX_UNITS = FX_LAYERS + FX_CHUNKS,
    FX_EXCHANGE = 4 * 64, /* sizes of an exchange of the weights, for as many as 64 ranks */
};

typedef struct {
    qs_base_index index;
    qs_base_unit units[FX_UNITS];
} fx_base;

/** Options for the CPU with room for `max_tokens` in one embedding call. */
static inline qs_fsdp_options fx_options(int64_t max_tokens)
{
    return (qs_fsdp_options){.ops = qs_ops_cpu(), .max_tokens = max_tokens, .prefetch = 1};
}

/** Layers of different sizes (some with fewer quanta than ranks) and an embedding table of 30 rows
 * in 3 chunks. */
static inline void fx_base_make(fx_base *b, qs_dtype table)
{
    static const int64_t nf4[FX_LAYERS] = {5, 16, 1, 8}, raw[FX_LAYERS] = {0, 3, 0, 9};
    memset(b, 0, sizeof *b);
    b->index.path = "/nonexistent/base.h5";
    b->index.head_chunk_rows = FX_CHUNK_ROWS;
    b->index.config.n_layers = FX_LAYERS;
    b->index.config.vocab = FX_VOCAB;
    b->index.config.hidden = FX_HIDDEN;
    b->index.config.tied = true;
    b->index.n_units = FX_UNITS;
    b->index.units = b->units;
    for (int u = 0; u < FX_LAYERS; u++) {
        b->units[u].size = (qs_unit_size){.nf4_quanta = nf4[u],
                                          .raw_quanta = raw[u],
                                          .raw_quantum_elems = 64,
                                          .raw_dtype = QS_BF16,
                                          .absmax8_per_quantum = 256,
                                          .absmax32_per_quantum = 1};
    }
    for (int c = 0; c < FX_CHUNKS; c++) {
        int64_t rows = FX_VOCAB - c * FX_CHUNK_ROWS;
        b->units[FX_LAYERS + c].size =
            (qs_unit_size){.raw_quanta = rows < FX_CHUNK_ROWS ? rows : FX_CHUNK_ROWS,
                           .raw_quantum_elems = FX_HIDDEN,
                           .raw_dtype = table,
                           .absmax8_per_quantum = 256,
                           .absmax32_per_quantum = 1};
    }
}

static inline uint8_t fx_byte(int unit, int section, int64_t quantum, size_t at)
{
    uint64_t x = ((uint64_t)unit * 4 + (uint64_t)section) * 1000003u + (uint64_t)quantum * 8209u;
    x = (x + at) * 0x9e3779b97f4a7c15u;
    return (uint8_t)(x >> 56);
}

/** Element `column` of the table's row `id`: exact in every dtype. */
static inline float fx_row(int64_t id, int64_t column)
{
    return (float)((id * 31 + column * 7) % 251 - 125) / 64.0f;
}

static inline void fx_fill_bytes(uint8_t *to, size_t bytes, int unit, int section, int64_t quantum)
{
    for (size_t i = 0; i < bytes; i++) {
        to[i] = fx_byte(unit, section, quantum, i);
    }
}

static inline bool fx_same_bytes(const void *got, size_t bytes, int unit, int section,
                                 int64_t quantum)
{
    for (size_t i = 0; i < bytes; i++) {
        if (((const uint8_t *)got)[i] != fx_byte(unit, section, quantum, i)) {
            return false;
        }
    }
    return true;
}

static inline void fx_raw_quantum(uint8_t *to, const qs_unit_size *size, int unit, int64_t quantum)
{
    if (unit < FX_LAYERS) {
        fx_fill_bytes(to, qs_raw_quantum_bytes(size), unit, 3, quantum);
        return;
    }
    float row[FX_HIDDEN];
    for (int64_t c = 0; c < FX_HIDDEN; c++) {
        row[c] = fx_row((unit - FX_LAYERS) * FX_CHUNK_ROWS + quantum, c);
    }
    qs_f32_store(to, size->raw_dtype, row, FX_HIDDEN);
}

/** qs_share_fill; ctx is an fx_base. */
static inline qs_status fx_fill(void *ctx, int u, int rank, int nranks, uint8_t *message,
                                uint64_t *bytes_read)
{
    const qs_unit_size *size = &((fx_base *)ctx)->units[u].size;
    qs_unit_layout l = qs_unit_layout_make(size, nranks);
    size_t raw = qs_raw_quantum_bytes(size);
    for (int64_t i = 0; i < l.nf4_per_rank; i++) {
        int64_t q = rank * l.nf4_per_rank + i;
        if (q < size->nf4_quanta) {
            fx_fill_bytes(message + l.packed_at + (size_t)i * 8192, 8192, u, 0, q);
            fx_fill_bytes(message + l.absmax8_at + (size_t)i * 256, 256, u, 1, q);
            fx_fill_bytes(message + l.absmax32_at + (size_t)i * 4, 4, u, 2, q);
            *bytes_read += 8192 + 256 + 4;
        }
    }
    for (int64_t i = 0; i < l.raw_per_rank; i++) {
        int64_t q = rank * l.raw_per_rank + i;
        if (q < size->raw_quanta) {
            fx_raw_quantum(message + l.raw_at + (size_t)i * raw, size, u, q);
            *bytes_read += raw;
        }
    }
    return QS_OK;
}

/** All units, in order, announced as what comes next. */
static inline qs_status fx_announce_all(qs_fsdp *f)
{
    int order[FX_UNITS];
    for (int u = 0; u < FX_UNITS; u++) {
        order[u] = u;
    }
    return qs_fsdp_begin(f, order, FX_UNITS);
}

/** Every quantum of the gathered unit is where the view says, with its own bytes. */
static inline qs_status fx_check_view(const qs_unit_view *view, int unit)
{
    const qs_unit_size *size = &view->layout.size;
    for (int64_t q = 0; q < size->nf4_quanta; q++) {
        qs_nf4_quantum got = qs_unit_nf4_quantum(view, q);
        if (!fx_same_bytes(got.packed, 8192, unit, 0, q) ||
            !fx_same_bytes(got.absmax8, 256, unit, 1, q) ||
            !fx_same_bytes(got.absmax32, 4, unit, 2, q)) {
            return QS_FAIL(QS_ERR_BUG, "unit %d, NF4 quantum %d differs", unit, (int)q);
        }
    }
    for (int64_t q = 0; q < size->raw_quanta; q++) {
        uint8_t want[FX_HIDDEN * 4 > 128 ? FX_HIDDEN * 4 : 128];
        fx_raw_quantum(want, size, unit, q);
        if (memcmp(qs_unit_raw_quantum(view, q), want, qs_raw_quantum_bytes(size)) != 0) {
            return QS_FAIL(QS_ERR_BUG, "unit %d, raw quantum %d differs", unit, (int)q);
        }
    }
    return QS_OK;
}

/** The row of each token, as floats. */
static inline qs_status fx_check_rows(const int32_t *tokens, int64_t count, const float *rows)
{
    for (int64_t i = 0; i < count; i++) {
        for (int64_t c = 0; c < FX_HIDDEN; c++) {
            if (rows[i * FX_HIDDEN + c] != fx_row(tokens[i], c)) {
                return QS_FAIL(QS_ERR_BUG, "token %d at %d: element %d is %g, not %g", tokens[i],
                               (int)i, (int)c, (double)rows[i * FX_HIDDEN + c],
                               (double)fx_row(tokens[i], c));
            }
        }
    }
    return QS_OK;
}

static inline qs_lora_layout fx_lora(int layers, int64_t chunks)
{
    return (qs_lora_layout){.n_layers = layers,
                            .used = chunks * QS_LORA_CHUNK - 5,
                            .chunks = chunks,
                            .per_layer = chunks * QS_LORA_CHUNK};
}

/** Gradient of a slot: signs and sizes so mixed that almost every order of addition has its own
 * bits. */
static inline void fx_gradient(float *grad, const qs_lora_layout *layout, int layer, int64_t slot)
{
    qs_rng rng = qs_rng_make(11, 0, (uint64_t)slot, 99, (uint32_t)layer);
    for (int64_t i = 0; i < layout->used; i++) {
        uint32_t bits = qs_rng_u32(&rng, (uint64_t)i);
        grad[i] += ldexpf((float)(int32_t)bits, -31 + (int)(bits % 17) - 8);
    }
}

/** The gradients of a step as a trainer makes them: passes of `group` slots, layers downwards,
 * slots ascending. */
static inline qs_status fx_backward(qs_grads *grads, const qs_lora_layout *layout, int rank,
                                    int nranks, int64_t slots, int64_t group)
{
    qs_range mine = qs_slots_of(slots, rank, nranks);
    int64_t passes = ((slots + nranks - 1) / nranks + group - 1) / group;
    qs_grads_begin(grads);
    for (int64_t pass = 0; pass < passes; pass++) {
        for (int l = layout->n_layers - 1; l >= 0; l--) {
            for (int64_t g = 0; g < group; g++) {
                int64_t slot = mine.begin + pass * group + g;
                if (slot >= mine.end) {
                    break;
                }
                float *grad = NULL;
                QS_TRY(qs_grads_slot(grads, l, slot, &grad));
                fx_gradient(grad, layout, l, slot);
                QS_TRY(qs_grads_add(grads, l, slot));
            }
            if (pass == passes - 1) {
                QS_TRY(qs_grads_reduce(grads, l));
            }
        }
    }
    return QS_OK;
}

#endif
