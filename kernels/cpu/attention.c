/* Causal attention within documents, forward: online softmax over blocks of keys (Milakov &
 * Gimelshein 2018, arXiv:1805.02867). The running maximum is that of the scaled scores. */
#include "kernels/cpu/attention_impl.h"

#include <math.h>
#include <string.h>

#include "kernels/cpu/parallel.h"
#include "kernels/cpu/scratch.h"

enum { BLOCK = QS_ATTENTION_BLOCK };

qs_status qs_attention_blocks_make(qs_queue *q, const qs_attention_shape *shape, int squares,
                                   int vectors, qs_attention_blocks *out)
{
    int64_t widest = shape->head_dim > BLOCK ? shape->head_dim : BLOCK;
    int64_t index = 2 * ((int64_t)shape->n_docs + 1); /* in floats */
    index = qs_ceil_div(index, 16) * 16;
    out->shape = shape;
    out->per_thread =
        squares * BLOCK * BLOCK + vectors * BLOCK + qs_gemm_small_scratch(widest, widest);
    float *memory;
    QS_TRY(
        qs_scratch(QS_SCRATCH_ATTENTION, index + qs_queue_threads(q) * out->per_thread, &memory));
    out->first = (int64_t *)(void *)memory;
    out->workspace = memory + index;
    out->count = 0;
    for (int d = 0; d < shape->n_docs; d++) {
        out->first[d] = out->count;
        out->count += qs_ceil_div(shape->cu_seqlens[d + 1] - shape->cu_seqlens[d], BLOCK);
    }
    out->first[shape->n_docs] = out->count;
    return QS_OK;
}

qs_attention_block qs_attention_block_at(const qs_attention_blocks *blocks, int64_t number)
{
    int low = 0, high = blocks->shape->n_docs; /* first[low] <= number < first[high] */
    while (high - low > 1) {
        int middle = low + (high - low) / 2;
        if (blocks->first[middle] <= number) {
            low = middle;
        } else {
            high = middle;
        }
    }
    qs_attention_block block = {.doc_begin = blocks->shape->cu_seqlens[low],
                                .doc_end = blocks->shape->cu_seqlens[low + 1]};
    block.begin = block.doc_begin + (number - blocks->first[low]) * BLOCK;
    block.rows = qs_min_i64(BLOCK, block.doc_end - block.begin);
    return block;
}

int64_t qs_attention_work(const qs_attention_shape *shape)
{
    int64_t scores = 0;
    for (int d = 0; d < shape->n_docs; d++) {
        int64_t len = shape->cu_seqlens[d + 1] - shape->cu_seqlens[d];
        scores += len * len;
    }
    return scores * shape->n_heads * (2 + shape->head_dim / 16);
}

typedef struct {
    qs_attention_blocks blocks;
    const qs_isa *isa;
    const qs_mat *qm, *km, *vm;
    qs_mat *o;
    float *lse;
} forward_args;

/* What a thread works with. */
typedef struct {
    float *scores;         /* [BLOCK][BLOCK] */
    float *max, *sum, *by; /* [BLOCK] running maximum and sum; factor of what was summed before */
    float *pack;
} forward_work;

/* Scores of one block of keys to probabilities relative to the new maximum; older sums are scaled
 * down. */
static void softmax_step(const forward_args *f, const forward_work *w, const qs_attention_block *b,
                         int64_t key, int64_t cols)
{
    float scale = f->blocks.shape->scale;
    for (int64_t i = 0; i < b->rows; i++) {
        int64_t visible = qs_visible(b->begin + i, key, cols);
        float most = visible == 0 ? -INFINITY : f->isa->max(w->scores + i * BLOCK, visible) * scale;
        float before = w->max[i];
        w->max[i] = most > before ? most : before;
        w->by[i] = before - w->max[i];
    }
    f->isa->exp_sum(w->by, b->rows, 1.0F, 0.0F);
    for (int64_t i = 0; i < b->rows; i++) {
        float *row = w->scores + i * BLOCK;
        int64_t visible = qs_visible(b->begin + i, key, cols);
        float sum = f->isa->exp_sum(row, visible, scale, w->max[i]);
        w->sum[i] = w->sum[i] * w->by[i] + sum;
        memset(row + visible, 0, (size_t)(cols - visible) * sizeof *row);
    }
}

static void scale_rows(float *data, int64_t stride, int64_t rows, int64_t cols, const float *by)
{
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t j = 0; j < cols; j++) {
            data[i * stride + j] *= by[i];
        }
    }
}

static void forward_task(void *ctx, int64_t index, int thread)
{
    const forward_args *f = ctx;
    const qs_attention_shape *shape = f->blocks.shape;
    int head = (int)(index % shape->n_heads);
    int kv_head = head / (shape->n_heads / shape->n_kv_heads);
    int dim = shape->head_dim;
    /* Late blocks see the most keys: they go first, so that no thread is left with one at the end.
     */
    qs_attention_block b =
        qs_attention_block_at(&f->blocks, f->blocks.count - 1 - index / shape->n_heads);
    float *memory = f->blocks.workspace + thread * f->blocks.per_thread;
    forward_work w = {memory, memory + BLOCK * BLOCK, NULL, NULL, NULL};
    w.sum = w.max + BLOCK;
    w.by = w.sum + BLOCK;
    w.pack = w.by + BLOCK;

    qs_operand queries = qs_head_operand(f->qm, b.begin, head, dim, false);
    qs_operand scores = qs_square_operand(w.scores, false);
    float *out = f->o->data + b.begin * f->o->stride + (int64_t)head * dim;
    for (int64_t i = 0; i < b.rows; i++) {
        w.max[i] = -INFINITY;
        w.sum[i] = 0.0F;
    }
    for (int64_t key = b.doc_begin; key < b.begin + b.rows; key += BLOCK) {
        int64_t cols = qs_min_i64(BLOCK, b.doc_end - key);
        qs_operand keys = qs_head_operand(f->km, key, kv_head, dim, true);
        qs_operand values = qs_head_operand(f->vm, key, kv_head, dim, false);
        qs_gemm_small(f->isa, b.rows, cols, dim, &queries, &keys, w.scores, BLOCK, false, w.pack);
        softmax_step(f, &w, &b, key, cols);
        if (key > b.doc_begin) {
            scale_rows(out, f->o->stride, b.rows, dim, w.by);
        }
        qs_gemm_small(f->isa, b.rows, dim, cols, &scores, &values, out, f->o->stride,
                      key > b.doc_begin, w.pack);
    }
    for (int64_t i = 0; i < b.rows; i++) {
        w.by[i] = 1.0F / w.sum[i];
        f->lse[head * f->qm->rows + b.begin + i] =
            (float)((double)w.max[i] + qs_log_fixed((double)w.sum[i]));
    }
    scale_rows(out, f->o->stride, b.rows, dim, w.by);
}

qs_status qs_cpu_attention_forward(qs_queue *q, const qs_attention_shape *shape, const qs_mat *qm,
                                   const qs_mat *km, const qs_mat *vm, qs_mat *o, float *lse)
{
    forward_args args = {.isa = qs_isa_get(), .qm = qm, .km = km, .vm = vm, .o = o, .lse = lse};
    QS_TRY(qs_attention_blocks_make(q, shape, 1, 3, &args.blocks));
    qs_parallel_for(q, args.blocks.count * shape->n_heads, qs_attention_work(shape), forward_task,
                    &args);
    return QS_OK;
}
