/* Attention's gradients. With P = exp(scale Q K^T - lse) and delta = rowsum(dO * O):
 *     dV = P^T dO,   dS = P * (dO V^T - delta) * scale,   dQ = dS K,   dK = dS^T Q.
 * A cap makes c = cap tanh(scale Q K^T / cap) of the scores, and dS gets its slope 1 - (c / cap)^2.
 * P and dS are recomputed for each output block, once for dQ and once for dK and dV: 7 products
 * instead of 5, and no two threads add to the same place. */
#include "kernels/cpu/attention_impl.h"
#include "kernels/cpu/parallel.h"

enum { BLOCK = QS_ATTENTION_BLOCK, DELTA_ROWS = 32 };

typedef struct {
    qs_attention_plan plan;
    const qs_isa *isa;
    const qs_mat *qm, *km, *vm, *o, *d_o;
    const float *lse;
    float *delta;
    qs_mat *dq, *dk, *dv;
} backward_args;

/* P and dS of one pair of blocks, and the packed operands of the products that make them. */
typedef struct {
    float *p, *ds; /* [BLOCK][BLOCK] */
    const float *queries, *d_out, *keys, *values;
} pair_work;

/* A thread's workspace: two squares, then packed operands. */
static float *workspace(const backward_args *g, int thread, pair_work *w)
{
    w->p = g->plan.workspace + thread * g->plan.per_thread;
    w->ds = w->p + BLOCK * BLOCK;
    return w->ds + BLOCK * BLOCK;
}

static void delta_task(void *ctx, int64_t index, int thread)
{
    (void)thread;
    const backward_args *g = ctx;
    int dim = g->plan.shape->head_dim;
    int64_t last = qs_min_i64((index + 1) * DELTA_ROWS, g->o->rows);
    for (int64_t t = index * DELTA_ROWS; t < last; t++) {
        for (int h = 0; h < g->plan.shape->n_heads; h++) {
            const float *o = qs_mat_f32(g->o) + t * g->o->stride + (int64_t)h * dim;
            const float *d_o = qs_mat_f32(g->d_o) + t * g->d_o->stride + (int64_t)h * dim;
            g->delta[h * g->o->rows + t] = g->isa->dot(o, d_o, dim);
        }
    }
}

/* P and dS of queries [query, query + rows) and keys [key, key + cols) of one head. */
static void pair(const backward_args *g, const pair_work *w, int head, int64_t query, int64_t rows,
                 int64_t key, int64_t cols)
{
    const qs_attention_shape *shape = g->plan.shape;
    const bool capped = shape->cap > 0.0F;
    int dim = g->plan.shape->head_dim;
    qs_multiply_packed(g->isa, rows, cols, dim, w->queries, w->keys, w->p, BLOCK, false);
    qs_multiply_packed(g->isa, rows, cols, dim, w->d_out, w->values, w->ds, BLOCK, false);
    for (int64_t i = 0; i < rows; i++) {
        float *p = w->p + i * BLOCK, *ds = w->ds + i * BLOCK;
        int64_t at = head * g->qm->rows + query + i;
        qs_visible_keys visible = qs_visible(shape, query + i, key, cols);
        int64_t from = visible.first;
        if (capped) {
            g->isa->soft_cap(p + from, visible.count, shape->scale, shape->cap);
            g->isa->soft_cap_backward(p + from, visible.count, g->delta[at], shape->cap, ds + from);
        }
        g->isa->exp_sum(p + from, visible.count, capped ? 1.0F : shape->scale, g->lse[at]);
        g->isa->softmax_backward(p + from, visible.count, capped ? 0.0F : g->delta[at],
                                 shape->scale, ds + from);
        qs_zero_hidden(p, cols, visible);
        qs_zero_hidden(ds, cols, visible);
    }
}

static void pack_left(const backward_args *g, const qs_mat *mat, int64_t row, int64_t rows,
                      int head, float *packed)
{
    int dim = g->plan.shape->head_dim;
    qs_operand operand = qs_head_operand(mat, row, head, dim, false);
    qs_pack_left(g->isa, &operand, rows, dim, packed);
}

/* As the right side of a product over dim (`transposed`), or over rows. */
static void pack_right(const backward_args *g, const qs_mat *mat, int64_t row, int64_t rows,
                       int head, bool transposed, float *packed)
{
    int dim = g->plan.shape->head_dim;
    qs_operand operand = qs_head_operand(mat, row, head, dim, transposed);
    if (transposed) {
        qs_pack_right(g->isa, &operand, rows, dim, packed);
    } else {
        qs_pack_right(g->isa, &operand, dim, rows, packed);
    }
}

static void dq_task(void *ctx, int64_t index, int thread)
{
    const backward_args *g = ctx;
    int dim = g->plan.shape->head_dim;
    int64_t size = g->plan.pack_count;
    qs_attention_task task = qs_attention_task_at(&g->plan, index, true);
    pair_work w;
    float *keys_t = workspace(g, thread, &w), *values_t = keys_t + size;
    float *keys = values_t + size, *ds = keys + size, *of_heads = ds + size;
    w.keys = keys_t;
    w.values = values_t;
    for (int h = 0; h < task.heads; h++) {
        float *queries = of_heads + 2 * h * size;
        pack_left(g, g->qm, task.begin, task.rows, task.head + h, queries);
        pack_left(g, g->d_o, task.begin, task.rows, task.head + h, queries + size);
    }
    qs_operand left = qs_square_operand(w.ds, false);
    int64_t first = qs_attention_first_key(&g->plan, &task);
    for (int64_t key = first; key < task.begin + task.rows; key += BLOCK) {
        int64_t cols = qs_min_i64(BLOCK, task.doc_end - key);
        pack_right(g, g->km, key, cols, task.kv_head, true, keys_t);
        pack_right(g, g->vm, key, cols, task.kv_head, true, values_t);
        pack_right(g, g->km, key, cols, task.kv_head, false, keys);
        for (int h = 0; h < task.heads; h++) {
            int head = task.head + h;
            float *dq = qs_mat_f32(g->dq) + task.begin * g->dq->stride + (int64_t)head * dim;
            w.queries = of_heads + 2 * h * size;
            w.d_out = w.queries + size;
            pair(g, &w, head, task.begin, task.rows, key, cols);
            qs_pack_left(g->isa, &left, task.rows, cols, ds);
            qs_multiply_packed(g->isa, task.rows, dim, cols, ds, keys, dq, g->dq->stride,
                               key > first);
        }
    }
}

/* One block of keys against all queries that see them, of all heads that share them. */
static void dkv_task(void *ctx, int64_t index, int thread)
{
    const backward_args *g = ctx;
    int dim = g->plan.shape->head_dim;
    int64_t size = g->plan.pack_count;
    /* The first group of its kv_head stands for all of them. */
    qs_attention_task task = qs_attention_task_at(&g->plan, index * g->plan.groups_per_kv, false);
    pair_work w;
    float *keys = workspace(g, thread, &w), *values = keys + size, *left = values + size;
    float *queries = left + size, *d_out = queries + size, *right = d_out + size;
    w.keys = keys;
    w.values = values;
    w.queries = queries;
    w.d_out = d_out;
    pack_right(g, g->km, task.begin, task.rows, task.kv_head, true, keys);
    pack_right(g, g->vm, task.begin, task.rows, task.kv_head, true, values);
    float *dk = qs_mat_f32(g->dk) + task.begin * g->dk->stride + (int64_t)task.kv_head * dim;
    float *dv = qs_mat_f32(g->dv) + task.begin * g->dv->stride + (int64_t)task.kv_head * dim;
    qs_operand p = qs_square_operand(w.p, true), ds = qs_square_operand(w.ds, true);
    int64_t query_end = qs_attention_query_end(&g->plan, &task);
    bool more = false;
    for (int head = task.head; head < task.head + g->plan.heads_per_kv; head++) {
        for (int64_t query = task.begin; query < query_end; query += BLOCK) {
            int64_t rows = qs_min_i64(BLOCK, query_end - query);
            pack_left(g, g->qm, query, rows, head, queries);
            pack_left(g, g->d_o, query, rows, head, d_out);
            pair(g, &w, head, query, rows, task.begin, task.rows);
            qs_pack_left(g->isa, &p, task.rows, rows, left);
            pack_right(g, g->d_o, query, rows, head, false, right);
            qs_multiply_packed(g->isa, task.rows, dim, rows, left, right, dv, g->dv->stride, more);
            qs_pack_left(g->isa, &ds, task.rows, rows, left);
            pack_right(g, g->qm, query, rows, head, false, right);
            qs_multiply_packed(g->isa, task.rows, dim, rows, left, right, dk, g->dk->stride, more);
            more = true;
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
    QS_TRY(qs_attention_plan_make(q, shape, &args.plan));
    qs_parallel_for(q, qs_ceil_div(o->rows, DELTA_ROWS), o->rows * o->cols, delta_task, &args);
    qs_parallel_for(q, qs_attention_tasks(&args.plan), work, dq_task, &args);
    qs_parallel_for(q, args.plan.count * shape->n_kv_heads, work, dkv_task, &args);
    return QS_OK;
}
