/* The frozen linears: Y = X W^T and dX = dY W, with W decoded from the gathered unit while it is
 * packed, so that there is never more of a matrix in floats than one packed block (QS_GEMM_KC rows
 * or columns of it). */
#include <string.h>

#include "kernels/cpu/gemm_amx.h"
#include "kernels/cpu/gemm_fp16.h"
#include "kernels/cpu/ops_impl.h"
#include "kernels/cpu/parallel.h"

/* To what a weight is decoded: floats, or words of two bf16 along a row, which start and end with a
 * word. */
typedef struct {
    const qs_isa *isa;
    const qs_pairs *pairs; /* NULL: floats */
    int elem_bytes;
} form;

/* Blocks [block, block + blocks) of one quantum, whole blocks only. */
static void decode_blocks(const form *f, const qs_nf4_quantum *quantum, const qs_weight *w,
                          int64_t block, int64_t blocks, uint8_t *out)
{
    float absmax[QS_NF4_QUANTUM_BLOCKS];
    const float *scales = absmax;
    const uint8_t *packed = quantum->packed + block * (QS_NF4_BLOCK / 2);
    if (quantum->absmax8 == NULL) {
        scales = quantum->absmax32 + block;
    } else {
        for (int64_t i = 0; i < blocks; i++) { /* qs_nf4_absmax, in line */
            float scaled = w->map[quantum->absmax8[block + i]] * quantum->absmax32[0];
            absmax[i] = scaled + w->offset;
        }
    }
    if (f->pairs != NULL) {
        f->pairs->nf4_decode(packed, scales, blocks, w->dtype, (uint32_t *)(void *)out);
    } else {
        f->isa->nf4_decode(packed, scales, blocks, w->dtype, (float *)(void *)out);
    }
}

/* Elements [at, at + count) of one quantum: whole blocks in one go, the ends by way of a copy of
 * their block. */
static void decode_run(const form *f, const qs_nf4_quantum *quantum, const qs_weight *w, int64_t at,
                       int64_t count, uint8_t *out)
{
    while (count > 0) {
        int64_t block = at / QS_NF4_BLOCK, skip = at % QS_NF4_BLOCK;
        int64_t here;
        if (skip == 0 && count >= QS_NF4_BLOCK) {
            here = count / QS_NF4_BLOCK * QS_NF4_BLOCK;
            decode_blocks(f, quantum, w, block, here / QS_NF4_BLOCK, out);
        } else {
            _Alignas(float) uint8_t whole[QS_NF4_BLOCK * sizeof(float)];
            here = qs_min_i64(QS_NF4_BLOCK - skip, count);
            decode_blocks(f, quantum, w, block, 1, whole);
            memcpy(out, whole + skip * f->elem_bytes, (size_t)(here * f->elem_bytes));
        }
        at += here;
        count -= here;
        out += here * f->elem_bytes;
    }
}

/* Elements of a quantum that is not NF4. */
static void widen_run(const form *f, const uint8_t *raw, qs_dtype dtype, int64_t count,
                      uint8_t *out)
{
    if (f->pairs == NULL) {
        f->isa->widen(raw, dtype, count, (float *)(void *)out);
    } else {
        f->pairs->take(raw, count, (uint32_t *)(void *)out);
    }
}

/* Ask for what will be read `ahead` bytes further on. It may lie outside of the unit: a prefetch of
 * nothing is harmless. */
static void prefetch(const uint8_t *from, int64_t bytes, int64_t ahead)
{
    enum { LINE = 64 };
    uintptr_t at = (uintptr_t)from + (uintptr_t)ahead;
    for (int64_t i = 0; i < bytes; i += LINE) {
        __builtin_prefetch((const void *)(at + (uintptr_t)i));
    }
}

/* `ahead` elements further on the next call will read; 0: unknown. */
static void decode(const form *f, const qs_unit_view *view, const qs_weight *w, int64_t first,
                   int64_t count, int64_t ahead, void *to)
{
    uint8_t *out = to;
    bool nf4 = w->kind == QS_WEIGHT_NF4;
    int64_t elems = nf4 ? QS_NF4_QUANTUM : view->layout.size.raw_quantum_elems;
    int64_t size = nf4 ? 0 : (int64_t)qs_dtype_bytes(w->dtype);
    while (count > 0) {
        int64_t at = first % elems;
        int64_t run = qs_min_i64(elems - at, count);
        int64_t number = w->quantum + first / elems;
        if (nf4) {
            qs_nf4_quantum quantum = qs_unit_nf4_quantum(view, number);
            prefetch(quantum.packed + at / 2, run / 2, ahead / 2);
            decode_run(f, &quantum, w, at, run, out);
        } else {
            const uint8_t *raw = qs_unit_raw_quantum(view, number) + at * size;
            prefetch(raw, run * size, ahead * size);
            widen_run(f, raw, w->dtype, run, out);
        }
        first += run;
        count -= run;
        out += run * f->elem_bytes;
    }
}

void qs_weight_decode_fast(const qs_isa *isa, const qs_unit_view *view, const qs_weight *w,
                           int64_t first, int64_t count, float *out)
{
    const form f = {.isa = isa, .elem_bytes = sizeof(float)};
    decode(&f, view, w, first, count, 0, out);
}

void qs_weight_decode_pairs(const qs_pairs *pairs, const qs_unit_view *view, const qs_weight *w,
                            int64_t first, int64_t count, uint32_t *out)
{
    const form f = {.pairs = pairs, .elem_bytes = sizeof(uint16_t)};
    decode(&f, view, w, first, count, 0, out);
}

/* Packing jumps from row to row, where no hardware prefetcher follows. W^T: the same row is next
 * read one block of k further on. W: this is done with it, and the rows below come next. */
static void load(const form *f, const qs_operand *operand, int64_t row, int64_t first,
                 int64_t count, void *out)
{
    enum { ROWS_AHEAD = 12 };
    const qs_weight_source *source = operand->ctx;
    int64_t in = source->weight->in;
    int64_t ahead = operand->transposed ? QS_GEMM_KC : ROWS_AHEAD * in;
    decode(f, source->view, source->weight, (source->row0 + row) * in + first, count, ahead, out);
}

static void weight_load(const qs_operand *operand, int64_t row, int64_t first, int64_t count,
                        float *out)
{
    const qs_weight_source *source = operand->ctx;
    const form f = {.isa = source->isa, .elem_bytes = sizeof(float)};
    load(&f, operand, row, first, count, out);
}

/* NF4 and bf16, where no run of elements is cut inside of a word. */
static bool weight_load_pairs(const qs_operand *operand, const qs_pairs *pairs, int64_t row,
                              int64_t first, int64_t count, uint32_t *out)
{
    const qs_weight_source *source = operand->ctx;
    const qs_weight *w = source->weight;
    const bool nf4 = w->kind == QS_WEIGHT_NF4;
    const int64_t run = nf4 ? QS_NF4_BLOCK : source->view->layout.size.raw_quantum_elems;
    if (w->in % 2 != 0 || count % 2 != 0 || run % 2 != 0 || (!nf4 && w->dtype != QS_BF16)) {
        return false;
    }
    const form f = {.isa = source->isa, .pairs = pairs, .elem_bytes = sizeof(uint16_t)};
    load(&f, operand, row, first, count, out);
    return true;
}

qs_operand qs_weight_operand(const qs_weight_source *source, bool transposed)
{
    return (qs_operand){.load = weight_load,
                        .load_pairs = weight_load_pairs,
                        .ctx = source,
                        .transposed = transposed};
}

typedef struct {
    qs_mat *y;
    const float *bias;
    int64_t rows_per_task;
} bias_args;

static void bias_task(void *ctx, int64_t index, int thread)
{
    (void)thread;
    const bias_args *args = ctx;
    int64_t first = index * args->rows_per_task;
    int64_t last = qs_min_i64(first + args->rows_per_task, args->y->rows);
    for (int64_t t = first; t < last; t++) {
        float *row = qs_mat_f32(args->y) + t * args->y->stride;
        for (int64_t j = 0; j < args->y->cols; j++) {
            row[j] += args->bias[j];
        }
    }
}

/* The product of any operands that multiplies `w`. */
static qs_gemm_function *gemm_for(qs_products products, const qs_weight *w)
{
    if (products == QS_PRODUCTS_BF16) {
        return qs_gemm_bf16;
    }
    return products == QS_PRODUCTS_AMX && w->kind == QS_WEIGHT_NF4 ? qs_gemm_amx : qs_gemm;
}

qs_status qs_frozen_product(qs_queue *q, qs_products products, const qs_unit_view *unit,
                            const qs_weight *w, bool transposed, int64_t rows,
                            const qs_operand *left, qs_mat *to, bool accumulate)
{
    if (products == QS_PRODUCTS_FP16 && qs_gemm_fp16_takes(w)) {
        return qs_gemm_fp16(q, unit, w, transposed, rows, left, to->data, to->stride, accumulate);
    }
    const qs_weight_source source = {unit, w, qs_isa_get(), 0};
    const qs_operand right = qs_weight_operand(&source, transposed);
    return gemm_for(products, w)(q, rows, transposed ? w->out : w->in, transposed ? w->in : w->out,
                                 left, &right, to->data, to->stride, accumulate);
}

qs_status qs_linear_forward_by(qs_queue *q, qs_products products, const qs_unit_view *unit,
                               const qs_weight *w, const float *bias, const qs_mat *x, qs_mat *y)
{
    const qs_operand left = {.data = x->data, .stride = x->stride};
    QS_TRY(qs_frozen_product(q, products, unit, w, true, x->rows, &left, y, false));
    if (bias != NULL) {
        bias_args args = {y, bias, qs_rows_per_task(w->out)};
        qs_parallel_for(q, qs_ceil_div(x->rows, args.rows_per_task), x->rows * w->out, bias_task,
                        &args);
    }
    return QS_OK;
}

qs_status qs_linear_backward_by(qs_queue *q, qs_products products, const qs_unit_view *unit,
                                const qs_weight *w, const qs_mat *dy, qs_mat *dx, bool accumulate)
{
    const qs_operand left = {.data = dy->data, .stride = dy->stride};
    return qs_frozen_product(q, products, unit, w, false, dy->rows, &left, dx, accumulate);
}
