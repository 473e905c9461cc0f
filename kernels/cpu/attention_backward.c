/* Attention's gradients. With P = exp(scale Q K^T - lse) and delta = rowsum(dO * O):
 *     dV = P^T dO,   dS = P * (dO V^T - delta) * scale,   dQ = dS K,   dK = dS^T Q.
 * P and dS are recomputed for each output block, once for dQ and once for dK and dV: 7 products
 * instead of 5, and no two threads add to the same place. */
#include "kernels/cpu/attention_impl.h"

#include <string.h>

#include "kernels/cpu/parallel.h"

enum { BLOCK = QS_ATTENTION_BLOCK };

typedef struct {
    qs_attention_blocks blocks;
    const qs_isa *isa;
    const qs_mat *qm, *km, *vm, *o, *d_o;
    const float *lse;
    float *delta;
    qs_mat *dq, *dk, *dv;
} backward_args;

/* What a thread works with: P and dS of one pair of blocks. */
typedef struct {
    float *p, *ds; /* [BLOCK][BLOCK] */
    float *pack;
} backward_work;

static backward_work work_of(const backward_args *g, int thread)
{
    float *memory = g->blocks.workspace + thread * g->blocks.per_thread;
    return (backward_work){memory, memory + BLOCK * BLOCK, memory + 2 * BLOCK * BLOCK};
}

static void delta_task(void *ctx, int64_t index, int thread)
{
    (void)thread;
    const backward_args *g = ctx;
    int64_t row = index;
    int dim = g->blocks.shape->head_dim;
    for (int h = 0; h < g->blocks.shape->n_heads; h++) {
        const float *o = g->o->data + row * g->o->stride + (int64_t)h * dim;
        const float *d_o = g->d_o->data + row * g->d_o->stride + (int64_t)h * dim;
        g->delta[h * g->o->rows + row] = g->isa->dot(o, d_o, dim);
    }
}

/* P and dS of queries [query, query + rows) and keys [key, key + cols) of one head. */
static void pair(const backward_args *g, const backward_work *w, int head, int64_t query,
                 int64_t rows, int64_t key, int64_t cols)
{
    const qs_attention_shape *shape = g->blocks.shape;
    int dim = shape->head_dim;
    int kv_head = head / (shape->n_heads / shape->n_kv_heads);
    qs_operand queries = qs_head_operand(g->qm, query, head, dim, false);
    qs_operand keys = qs_head_operand(g->km, key, kv_head, dim, true);
    qs_operand d_out = qs_head_operand(g->d_o, query, head, dim, false);
    qs_operand values = qs_head_operand(g->vm, key, kv_head, dim, true);
    qs_gemm_small(g->isa, rows, cols, dim, &queries, &keys, w->p, BLOCK, false, w->pack);
    qs_gemm_small(g->isa, rows, cols, dim, &d_out, &values, w->ds, BLOCK, false, w->pack);
    for (int64_t i = 0; i < rows; i++) {
        float *p = w->p + i * BLOCK, *ds = w->ds + i * BLOCK;
        int64_t at = head * g->qm->rows + query + i;
        int64_t visible = qs_visible(query + i, key, cols);
        g->isa->exp_sum(p, visible, shape->scale, g->lse[at]);
        g->isa->softmax_backward(p, visible, g->delta[at], shape->scale, ds);
        memset(p + visible, 0, (size_t)(cols - visible) * sizeof *p);
        memset(ds + visible, 0, (size_t)(cols - visible) * sizeof *ds);
    }
}

static void dq_task(void *ctx, int64_t index, int thread)
{
    const backward_args *g = ctx;
    const qs_attention_shape *shape = g->blocks.shape;
    backward_work w = work_of(g, thread);
    int head = (int)(index % shape->n_heads);
    int kv_head = head / (shape->n_heads / shape->n_kv_heads);
    int dim = shape->head_dim;
    qs_attention_block b =
        qs_attention_block_at(&g->blocks, g->blocks.count - 1 - index / shape->n_heads);
    float *dq = g->dq->data + b.begin * g->dq->stride + (int64_t)head * dim;
    qs_operand ds = qs_square_operand(w.ds, false);
    for (int64_t key = b.doc_begin; key < b.begin + b.rows; key += BLOCK) {
        int64_t cols = qs_min_i64(BLOCK, b.doc_end - key);
        pair(g, &w, head, b.begin, b.rows, key, cols);
        qs_operand keys = qs_head_operand(g->km, key, kv_head, dim, false);
        qs_gemm_small(g->isa, b.rows, dim, cols, &ds, &keys, dq, g->dq->stride, key > b.doc_begin,
                      w.pack);
    }
}

static void dkv_task(void *ctx, int64_t index, int thread)
{
    const backward_args *g = ctx;
    const qs_attention_shape *shape = g->blocks.shape;
    backward_work w = work_of(g, thread);
    int kv_head = (int)(index % shape->n_kv_heads);
    int group = shape->n_heads / shape->n_kv_heads;
    int dim = shape->head_dim;
    qs_attention_block b = qs_attention_block_at(&g->blocks, index / shape->n_kv_heads);
    float *dk = g->dk->data + b.begin * g->dk->stride + (int64_t)kv_head * dim;
    float *dv = g->dv->data + b.begin * g->dv->stride + (int64_t)kv_head * dim;
    qs_operand p = qs_square_operand(w.p, true), ds = qs_square_operand(w.ds, true);
    bool accumulate = false;
    for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
        for (int64_t query = b.begin; query < b.doc_end; query += BLOCK) {
            int64_t rows = qs_min_i64(BLOCK, b.doc_end - query);
            pair(g, &w, head, query, rows, b.begin, b.rows);
            qs_operand queries = qs_head_operand(g->qm, query, head, dim, false);
            qs_operand d_out = qs_head_operand(g->d_o, query, head, dim, false);
            qs_gemm_small(g->isa, b.rows, dim, rows, &p, &d_out, dv, g->dv->stride, accumulate,
                          w.pack);
            qs_gemm_small(g->isa, b.rows, dim, rows, &ds, &queries, dk, g->dk->stride, accumulate,
                          w.pack);
            accumulate = true;
        }
    }
}

qs_status qs_cpu_attention_backward(qs_queue *q, const qs_attention_shape *shape, const qs_mat *qm,
                                    const qs_mat *km, const qs_mat *vm, const qs_mat *o,
                                    const float *lse, const qs_mat *d_o, float *delta, qs_mat *dq,
                                    qs_mat *dk, qs_mat *dv)
{
    backward_args args = {.isa = qs_isa_get(),
                          .qm = qm,
                          .km = km,
                          .vm = vm,
                          .o = o,
                          .d_o = d_o,
                          .lse = lse,
                          .delta = delta,
                          .dq = dq,
                          .dk = dk,
                          .dv = dv};
    int64_t work = qs_attention_work(shape);
    QS_TRY(qs_attention_blocks_make(q, shape, 2, 0, &args.blocks));
    qs_parallel_for(q, o->rows, o->rows * o->cols, delta_task, &args);
    qs_parallel_for(q, args.blocks.count * shape->n_heads, work, dq_task, &args);
    qs_parallel_for(q, args.blocks.count * shape->n_kv_heads, work, dkv_task, &args);
    return QS_OK;
}
