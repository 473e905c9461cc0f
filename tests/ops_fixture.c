#include "ops_fixture.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/rng.h"

float *fx_random(int64_t count, uint64_t seed)
{
    qs_rng rng = qs_rng_make(seed, 0, 0, 99, 0);
    float *x = malloc((size_t)(count > 0 ? count : 1) * sizeof *x);
    cr_assert_not_null(x);
    for (int64_t i = 0; i < count; i++) {
        x[i] = 2.0F * qs_rng_uniform(&rng, (uint64_t)i) - 1.0F;
    }
    return x;
}

qs_mat fx_mat(int64_t rows, int64_t cols, int64_t pad, uint64_t seed)
{
    qs_mat mat = {.rows = rows, .cols = cols, .stride = cols + pad};
    mat.data = fx_random(rows * mat.stride, seed);
    for (int64_t t = 0; t < rows; t++) {
        for (int64_t i = cols; i < mat.stride; i++) {
            qs_mat_f32(&mat)[t * mat.stride + i] = NAN;
        }
    }
    return mat;
}

bool fx_mat_gap_intact(const qs_mat *mat)
{
    for (int64_t t = 0; t < mat->rows; t++) {
        for (int64_t i = mat->cols; i < mat->stride; i++) {
            if (!isnan(qs_mat_f32(mat)[t * mat->stride + i])) {
                return false;
            }
        }
    }
    return true;
}

void fx_mat_free(qs_mat *mat)
{
    free(mat->data);
    mat->data = NULL;
}

qs_lora fx_adapter(int rank, int64_t in, int64_t out, float dropout, uint64_t seed)
{
    return (qs_lora){.a = fx_random(rank * in, seed),
                     .b = fx_random(rank * out, seed + 1),
                     .rank = rank,
                     .scale = 1.25F,
                     .dropout = dropout,
                     .seed = 42,
                     .step = 7,
                     .site = QS_RNG_DROPOUT + 2,
                     .layer = 5};
}

double fx_at(const qs_mat *mat, int64_t row, int64_t col)
{
    return (double)qs_mat_f32(mat)[row * mat->stride + col];
}

double *fx_double(const float *x, int64_t count)
{
    double *copy = malloc((size_t)(count > 0 ? count : 1) * sizeof *copy);
    cr_assert_not_null(copy);
    for (int64_t i = 0; i < count; i++) {
        copy[i] = (double)x[i];
    }
    return copy;
}

double fx_difference(double (*f)(const void *ctx), const void *ctx, double *x, int64_t at,
                     double step)
{
    double kept = x[at];
    x[at] = kept + step;
    double above = f(ctx);
    x[at] = kept - step;
    double below = f(ctx);
    x[at] = kept;
    return (above - below) / (2.0 * step);
}

qs_queue *fx_queue(int threads)
{
    qs_queue *queue = NULL;
    cr_assert_eq(qs_queue_create(&queue, threads), QS_OK);
    return queue;
}

/* The unit's quanta one after the other, before they are cut into messages. */
typedef struct {
    int64_t quanta;
    uint8_t *packed, *absmax8, *raw;
    float *absmax32;
} flat_unit;

static void *random_bytes(int64_t bytes, uint64_t seed)
{
    qs_rng rng = qs_rng_make(seed, 1, 0, 99, 0);
    uint8_t *out = malloc((size_t)bytes + 1);
    cr_assert_not_null(out);
    for (int64_t i = 0; i < bytes; i++) {
        out[i] = (uint8_t)(qs_rng_u32(&rng, (uint64_t)i) >> 7);
    }
    return out;
}

static flat_unit flat_create(const qs_unit_size *size, uint64_t seed)
{
    flat_unit flat = {.quanta = size->nf4_quanta};
    int64_t scales = size->nf4_quanta * size->absmax32_per_quantum;
    flat.packed = random_bytes(size->nf4_quanta * QS_NF4_QUANTUM_PACKED_BYTES, seed);
    flat.absmax8 = random_bytes(size->nf4_quanta * size->absmax8_per_quantum, seed + 1);
    flat.absmax32 = fx_random(scales, seed + 2);
    for (int64_t i = 0; i < scales; i++) {
        flat.absmax32[i] = 0.05F + 0.02F * flat.absmax32[i];
    }
    float *values = fx_random(size->raw_quanta * size->raw_quantum_elems, seed + 3);
    flat.raw = malloc((size_t)size->raw_quanta * qs_raw_quantum_bytes(size) + 1);
    cr_assert_not_null(flat.raw);
    qs_f32_store(flat.raw, size->raw_dtype, values, size->raw_quanta * size->raw_quantum_elems);
    free(values);
    return flat;
}

static uint8_t *messages(const qs_unit_layout *l, const flat_unit *flat)
{
    uint8_t *bytes = NULL;
    size_t total = l->message_bytes * (size_t)l->nranks;
    cr_assert_eq(posix_memalign((void **)&bytes, 64, total + 64), 0);
    memset(bytes, 0xA5, total); /* padding is never zero by luck */
    size_t per8 = (size_t)l->size.absmax8_per_quantum;
    size_t per32 = (size_t)l->size.absmax32_per_quantum * sizeof(float);
    for (int64_t i = 0; i < l->size.nf4_quanta; i++) {
        uint8_t *message = bytes + (size_t)(i / l->nf4_per_rank) * l->message_bytes;
        size_t at = (size_t)(i % l->nf4_per_rank), from = (size_t)i;
        memcpy(message + l->packed_at + at * QS_NF4_QUANTUM_PACKED_BYTES,
               flat->packed + from * QS_NF4_QUANTUM_PACKED_BYTES, QS_NF4_QUANTUM_PACKED_BYTES);
        memcpy(message + l->absmax8_at + at * per8, flat->absmax8 + from * per8, per8);
        memcpy(message + l->absmax32_at + at * per32,
               (const uint8_t *)flat->absmax32 + from * per32, per32);
    }
    size_t raw = qs_raw_quantum_bytes(&l->size);
    for (int64_t i = 0; i < l->size.raw_quanta; i++) {
        uint8_t *message = bytes + (size_t)(i / l->raw_per_rank) * l->message_bytes;
        memcpy(message + l->raw_at + (size_t)(i % l->raw_per_rank) * raw,
               flat->raw + (size_t)i * raw, raw);
    }
    return bytes;
}

/* Element by element from the flat arrays: the formula of file-formats.md written down a second
 * time. */
static float plain_element(const flat_unit *flat, const qs_weight *w, int64_t element)
{
    int64_t at = w->quantum * QS_NF4_QUANTUM + element;
    int64_t block = at / QS_NF4_BLOCK;
    float absmax;
    if (w->map != NULL) {
        absmax = w->map[flat->absmax8[block]] * flat->absmax32[block / 256];
        absmax = absmax + w->offset;
    } else {
        absmax = flat->absmax32[block];
    }
    uint8_t byte = flat->packed[at / 2];
    int code = at % 2 == 0 ? byte / 16 : byte % 16;
    return qs_f32_round(qs_nf4_code[code] * absmax, w->dtype);
}

fx_unit fx_unit_create(const fx_weight_spec *spec, uint64_t seed)
{
    int64_t count = spec->out * spec->in;
    bool nf4 = spec->kind == QS_WEIGHT_NF4;
    int64_t elems = nf4 ? QS_NF4_QUANTUM : spec->raw_quantum_elems;
    int64_t quanta =
        1 + (count + elems - 1) / elems + 1; /* a quantum of another tensor on each side */
    qs_unit_size size = {.nf4_quanta = nf4 ? quanta : 0,
                         .raw_quanta = nf4 ? 0 : quanta,
                         .raw_quantum_elems = nf4 ? 1 : elems,
                         .raw_dtype = nf4 ? QS_BF16 : spec->dtype,
                         .absmax8_per_quantum = spec->nested ? 256 : 0,
                         .absmax32_per_quantum = spec->nested ? 1 : 256};
    fx_unit unit = {.weight = {.kind = spec->kind,
                               .out = spec->out,
                               .in = spec->in,
                               .quantum = 1,
                               .dtype = spec->dtype,
                               .map = spec->nested ? qs_dynamic_map : NULL,
                               .offset = spec->nested ? 0.0437F : 0.0F}};
    unit.view.layout = qs_unit_layout_make(&size, spec->nranks);
    flat_unit flat = flat_create(&size, seed);
    unit.bytes = messages(&unit.view.layout, &flat);
    unit.view.base = unit.bytes;
    unit.plain = malloc((size_t)(count + 1) * sizeof *unit.plain);
    cr_assert_not_null(unit.plain);
    if (nf4) {
        for (int64_t i = 0; i < count; i++) {
            unit.plain[i] = plain_element(&flat, &unit.weight, i);
        }
    } else {
        qs_f32_load(unit.plain, flat.raw + qs_raw_quantum_bytes(&size), spec->dtype, count);
    }
    free(flat.packed);
    free(flat.absmax8);
    free(flat.absmax32);
    free(flat.raw);
    return unit;
}

void fx_unit_destroy(fx_unit *unit)
{
    free(unit->plain);
    free(unit->bytes);
    *unit = (fx_unit){0};
}
