/* The units of a model: which tensors there are, in which unit, and where within it. A pure
 * function of config.json and the chunk height, used by the quantizer to make the table and by the
 * reader to check it. */
#include <stdlib.h>
#include <string.h>

#include "weights/base_impl.h"

enum { SMALL_ALIGN = 4 };

static int64_t chunks_of(const qs_hf_config *config, int64_t rows)
{
    return (config->vocab + rows - 1) / rows;
}

int64_t qs_base_count_units(const qs_hf_config *config, int64_t head_chunk_rows)
{
    return config->n_layers + chunks_of(config, head_chunk_rows) * (config->tied ? 1 : 2);
}

int64_t qs_base_tensor_count(const qs_base_tensor *tensor)
{
    return tensor->rank == 2 ? tensor->shape[0] * tensor->shape[1] : tensor->shape[0];
}

static char *formatted(const char *format, long long number, const char *middle, const char *end)
{
    char text[QS_BASE_NAME];
    (void)snprintf(text, sizeof text, format, number, middle, end);
    return strdup(text);
}

static qs_status no_memory(const qs_base_index *index)
{
    return QS_FAIL(QS_ERR_MEMORY, "%s: no memory for the table of units", index->path);
}

/* Append a tensor to a unit whose array is large enough. `columns` 0: a vector. */
static qs_status add(const qs_base_index *index, qs_base_unit *unit, char *name,
                     qs_tensor_kind kind, int64_t rows, int64_t columns)
{
    if (name == NULL) {
        return no_memory(index);
    }
    unit->tensors[unit->n_tensors++] = (qs_base_tensor){.name = name,
                                                        .kind = kind,
                                                        .rank = columns > 0 ? 2 : 1,
                                                        .shape = {rows, columns},
                                                        .dtype = index->config.dtype};
    return QS_OK;
}

static qs_status start_unit(const qs_base_index *index, qs_base_unit *unit, char *name,
                            int n_tensors)
{
    *unit = (qs_base_unit){.name = name,
                           .packed_at = -1,
                           .absmax8_at = -1,
                           .absmax32_at = -1,
                           .raw_at = -1,
                           .small_at = -1,
                           .hash_at = -1};
    unit->tensors = calloc((size_t)n_tensors, sizeof *unit->tensors);
    return unit->tensors == NULL || name == NULL ? no_memory(index) : QS_OK;
}

static qs_status make_layer(const qs_base_index *index, qs_base_unit *unit, int layer)
{
    static const char *const tensor = "model.layers.%lld.%s.%s";
    int64_t rows, columns;
    QS_TRY(start_unit(index, unit, formatted("layers.%lld", layer, "", ""),
                      2 * QS_LINEAR_COUNT + QS_NORM_COUNT));
    for (int i = 0; i < QS_LINEAR_COUNT; i++) {
        qs_linear_shape(&index->config, (qs_linear)i, &rows, &columns);
        if (rows == 0) {
            continue;
        }
        char *name = formatted(tensor, layer, qs_linear_path((qs_linear)i), "weight");
        QS_TRY(add(index, unit, name, QS_TENSOR_NF4, rows, columns));
    }
    for (int i = 0; i < QS_NORM_COUNT; i++) {
        const int64_t width = qs_norm_width(&index->config, (qs_norm)i);
        if (width > 0) {
            char *name = formatted(tensor, layer, qs_norm_path((qs_norm)i), "weight");
            QS_TRY(add(index, unit, name, QS_TENSOR_SMALL, width, 0));
        }
    }
    for (int i = 0; i < QS_LINEAR_COUNT; i++) {
        if (index->config.bias[i]) {
            qs_linear_shape(&index->config, (qs_linear)i, &rows, &columns);
            char *name = formatted(tensor, layer, qs_linear_path((qs_linear)i), "bias");
            QS_TRY(add(index, unit, name, QS_TENSOR_SMALL, rows, 0));
        }
    }
    return QS_OK;
}

/* Chunks of the embedding table or of the head: one raw tensor each, a row a quantum. */
static qs_status make_chunks(qs_base_index *index, int first_unit, const char *unit_format,
                             const char *tensor)
{
    int64_t rows = index->head_chunk_rows;
    for (int64_t c = 0; c < chunks_of(&index->config, rows); c++) {
        qs_base_unit *unit = &index->units[first_unit + c];
        int64_t left = index->config.vocab - c * rows;
        QS_TRY(start_unit(index, unit, formatted(unit_format, c, "", ""), 1));
        QS_TRY(add(index, unit, strdup(tensor), QS_TENSOR_RAW, left < rows ? left : rows,
                   index->config.hidden));
    }
    return QS_OK;
}

qs_status qs_base_make_units(qs_base_index *index)
{
    int layers = index->config.n_layers;
    int chunks = (int)chunks_of(&index->config, index->head_chunk_rows);
    index->n_units = (int)qs_base_count_units(&index->config, index->head_chunk_rows);
    index->units = calloc((size_t)index->n_units, sizeof *index->units);
    if (index->units == NULL) {
        return no_memory(index);
    }
    for (int l = 0; l < layers; l++) {
        QS_TRY(make_layer(index, &index->units[l], l));
    }
    QS_TRY(make_chunks(index, layers, "embed.%lld", "model.embed_tokens.weight"));
    if (!index->config.tied) {
        QS_TRY(make_chunks(index, layers + chunks, "head.%lld", "lm_head.weight"));
    }
    QS_TRY(start_unit(index, &index->final, strdup("final"), 1));
    return add(index, &index->final, strdup("model.norm.weight"), QS_TENSOR_SMALL,
               index->config.hidden, 0);
}

int64_t qs_base_raw_elems(const qs_base_index *index, int u)
{
    bool chunk = u >= index->config.n_layers && u < index->n_units;
    return chunk ? index->config.hidden : QS_NF4_QUANTUM;
}

void qs_base_place(const qs_base_index *index, qs_base_unit *unit, int64_t raw_elems)
{
    unit->size = (qs_unit_size){.raw_quantum_elems = raw_elems,
                                .raw_dtype = index->config.dtype,
                                .absmax8_per_quantum = index->nested ? QS_NF4_QUANTUM_BLOCKS : 0,
                                .absmax32_per_quantum = index->nested ? 1 : QS_NF4_QUANTUM_BLOCKS};
    unit->small_bytes = 0;
    for (int i = 0; i < unit->n_tensors; i++) {
        qs_base_tensor *t = &unit->tensors[i];
        int64_t count = qs_base_tensor_count(t);
        switch (t->kind) {
        case QS_TENSOR_NF4:
            t->quantum = unit->size.nf4_quanta;
            unit->size.nf4_quanta += qs_nf4_quanta(count);
            break;
        case QS_TENSOR_RAW:
            t->quantum = unit->size.raw_quanta;
            unit->size.raw_quanta += (count + raw_elems - 1) / raw_elems;
            unit->size.raw_dtype = t->dtype;
            break;
        case QS_TENSOR_SMALL:
            t->byte = (unit->small_bytes + SMALL_ALIGN - 1) / SMALL_ALIGN * SMALL_ALIGN;
            unit->small_bytes = t->byte + count * (int64_t)qs_dtype_bytes(t->dtype);
            break;
        }
    }
}

void qs_base_unit_datasets(qs_base_unit *unit, qs_base_dataset out[QS_BASE_DATASETS])
{
    const qs_unit_size *s = &unit->size;
    int64_t nf4 = s->nf4_quanta;
    int64_t absmax8 = s->absmax8_per_quantum == 0 ? 0 : nf4;
    qs_base_dataset all[QS_BASE_DATASETS] = {
        {"packed", {QS_U8, 2, {nf4, QS_NF4_QUANTUM_PACKED_BYTES}, -1}, &unit->packed_at},
        {"absmax8", {QS_U8, 2, {absmax8, QS_NF4_QUANTUM_BLOCKS}, -1}, &unit->absmax8_at},
        {"absmax32", {QS_F32, 2, {nf4, s->absmax32_per_quantum}, -1}, &unit->absmax32_at},
        {"raw", {QS_U8, 2, {s->raw_quanta, (int64_t)qs_raw_quantum_bytes(s)}, -1}, &unit->raw_at},
        {"small", {QS_U8, 1, {unit->small_bytes, 0}, -1}, &unit->small_at},
        {"hash", {QS_I64, 1, {nf4 + s->raw_quanta, 0}, -1}, &unit->hash_at},
    };
    memcpy(out, all, sizeof all);
}
