/* What moves whole rows: gather, scatter, copies of bytes; conversions; and NF4's quantizer as an
 * operation. Memory-bound, but for the quantizer. */
#include <string.h>

#include "kernels/cpu/ops_impl.h"
#include "kernels/cpu/parallel.h"
#include "quant/nf4.h"

/* ---- rows of matrices ---- */

typedef struct {
    const qs_mat *x;
    const int32_t *index;
    qs_mat *y;
    int64_t rows_per_task;
} index_args;

static void gather_task(void *ctx, int64_t index, int thread)
{
    (void)thread;
    const index_args *args = ctx;
    const qs_mat *x = args->x;
    const size_t size = qs_dtype_bytes(x->dtype);
    int64_t first = index * args->rows_per_task;
    int64_t last = qs_min_i64(first + args->rows_per_task, args->y->rows);
    for (int64_t i = first; i < last; i++) {
        const char *row =
            (const char *)x->data + (int64_t)args->index[i] * x->stride * (int64_t)size;
        qs_f32_load(qs_mat_f32(args->y) + i * args->y->stride, row, x->dtype, args->y->cols);
    }
}

qs_status qs_cpu_gather_rows(qs_queue *q, const qs_mat *x, const int32_t *index, qs_mat *y)
{
    index_args args = {x, index, y, qs_rows_per_task(y->cols)};
    qs_parallel_for(q, qs_ceil_div(y->rows, args.rows_per_task), y->rows * y->cols, gather_task,
                    &args);
    return QS_OK;
}

/* The first place whose index is not below `row`, among `count` that ascend. */
static int64_t first_not_below(const int32_t *index, int64_t count, int64_t row)
{
    int64_t low = 0, high = count;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (index[middle] < row) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

static void scatter_task(void *ctx, int64_t index, int thread)
{
    (void)thread;
    const index_args *args = ctx;
    const size_t bytes = (size_t)args->y->cols * sizeof(float);
    int64_t first = index * args->rows_per_task;
    int64_t last = qs_min_i64(first + args->rows_per_task, args->y->rows);
    int64_t from = first_not_below(args->index, args->x->rows, first);
    for (int64_t row = first; row < last; row++) {
        float *y = qs_mat_f32(args->y) + row * args->y->stride;
        if (from < args->x->rows && args->index[from] == row) {
            memcpy(y, qs_mat_f32(args->x) + from * args->x->stride, bytes);
            from++;
        } else {
            memset(y, 0, bytes);
        }
    }
}

qs_status qs_cpu_scatter_rows(qs_queue *q, const qs_mat *x, const int32_t *index, qs_mat *y)
{
    index_args args = {x, index, y, qs_rows_per_task(y->cols)};
    qs_parallel_for(q, qs_ceil_div(y->rows, args.rows_per_task), y->rows * y->cols, scatter_task,
                    &args);
    return QS_OK;
}

/* ---- rows of bytes ---- */

typedef struct {
    const uint8_t *base;
    const int64_t *at;
    int64_t count;
    size_t row_bytes;
    uint8_t *out;
    int64_t rows_per_task;
} copy_args;

static void copy_task(void *ctx, int64_t index, int thread)
{
    (void)thread;
    const copy_args *args = ctx;
    int64_t last = qs_min_i64((index + 1) * args->rows_per_task, args->count);
    for (int64_t i = index * args->rows_per_task; i < last; i++) {
        memcpy(args->out + (size_t)i * args->row_bytes, args->base + args->at[i], args->row_bytes);
    }
}

qs_status qs_cpu_copy_rows(qs_queue *q, const uint8_t *base, const int64_t *at, int64_t count,
                           size_t row_bytes, uint8_t *out)
{
    if (row_bytes == 0) {
        return QS_OK;
    }
    const int64_t words = qs_ceil_div((int64_t)row_bytes, (int64_t)sizeof(float));
    copy_args args = {base, at, count, row_bytes, out, qs_rows_per_task(words)};
    qs_parallel_for(q, qs_ceil_div(count, args.rows_per_task), count * words, copy_task, &args);
    return QS_OK;
}

/* Activations are fp32 here: nothing to round. */
qs_status qs_cpu_convert(qs_queue *q, const float *src, int64_t count, void *dst)
{
    (void)q;
    if (count > 0) {
        memcpy(dst, src, (size_t)count * sizeof *src);
    }
    return QS_OK;
}

/* ---- NF4's quantizer (src/quant/nf4.h), cut where its blocks and its groups of blocks begin ----
 */

enum {
    QUANTIZE_PER_TASK = 4096, /* elements: whole blocks, 16 KiB as floats on the stack */
    ABSMAX_PER_TASK = 4 * QS_NF4_QUANTUM_BLOCKS,
    QUANTIZE_COST = 32, /* simple operations an element */
};

typedef struct {
    const char *x;
    qs_dtype dtype;
    int64_t count;
    uint8_t *packed;
    float *absmax;
    _Atomic int64_t zero_blocks;
} blocks_args;

static void blocks_task(void *ctx, int64_t index, int thread)
{
    (void)thread;
    blocks_args *args = ctx;
    const int64_t first = index * QUANTIZE_PER_TASK;
    const int64_t count = qs_min_i64(QUANTIZE_PER_TASK, args->count - first);
    float x[QUANTIZE_PER_TASK];
    qs_f32_load(x, args->x + first * (int64_t)qs_dtype_bytes(args->dtype), args->dtype, count);
    const int64_t zero = qs_nf4_quantize_blocks(x, count, args->packed + first / 2,
                                                args->absmax + first / QS_NF4_BLOCK);
    if (zero > 0) { /* integers: any order gives the same sum */
        args->zero_blocks += zero;
    }
}

qs_status qs_cpu_nf4_quantize_blocks(qs_queue *q, const void *x, qs_dtype dtype, int64_t count,
                                     uint8_t *packed, float *absmax, int64_t *zero_blocks)
{
    blocks_args args = {x, dtype, count, packed, absmax, 0};
    qs_parallel_for(q, qs_ceil_div(count, QUANTIZE_PER_TASK), count * QUANTIZE_COST, blocks_task,
                    &args);
    *zero_blocks = args.zero_blocks;
    return QS_OK;
}

typedef struct {
    const float *absmax;
    int64_t n_blocks;
    float offset;
    uint8_t *absmax8;
    float *absmax32;
} absmax_args;

static void absmax_task(void *ctx, int64_t index, int thread)
{
    (void)thread;
    const absmax_args *args = ctx;
    const int64_t first = index * ABSMAX_PER_TASK;
    qs_nf4_quantize_absmax(args->absmax + first,
                           qs_min_i64(ABSMAX_PER_TASK, args->n_blocks - first), args->offset,
                           args->absmax8 + first, args->absmax32 + first / QS_NF4_QUANTUM_BLOCKS);
}

qs_status qs_cpu_nf4_quantize_absmax(qs_queue *q, const float *absmax, int64_t n_blocks,
                                     float offset, uint8_t *absmax8, float *absmax32)
{
    absmax_args args = {absmax, n_blocks, offset, absmax8, absmax32};
    qs_parallel_for(q, qs_ceil_div(n_blocks, ABSMAX_PER_TASK), n_blocks * QUANTIZE_COST,
                    absmax_task, &args);
    return QS_OK;
}
