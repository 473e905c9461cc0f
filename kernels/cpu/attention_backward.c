/* Attention's gradients. With P = exp(scale Q K^T - lse) and delta = rowsum(dO * O):
 *     dV = P^T dO,   dS = P * (dO V^T - delta) * scale,   dQ = dS K,   dK = dS^T Q.
 * A cap makes c = cap tanh(scale Q K^T / cap) of the scores, and dS gets its slope 1 - (c / cap)^2.
 *
 * A task owns a block of keys and goes over the blocks of queries, so P and dS are computed once
 * for all three gradients: 5 products. dK and dV are its own. To a block of dQ the tasks add one
 * after the other, in ascending order of their keys: a task waits until the one before it has
 * passed the block. Tasks begin in that order and see the same blocks of queries but for one at
 * either end, so one that started later follows at a distance and seldom waits. */
#include "kernels/cpu/attention_impl.h"
#include "kernels/cpu/parallel.h"

enum { OWN = QS_ATTENTION_OWN, STEP = QS_ATTENTION_STEP, DELTA_ROWS = 32 };

typedef struct {
    qs_attention_plan plan;
    const qs_mat *qm, *km, *vm, *o, *d_o;
    const float *lse;
    float *delta;
    qs_mat *dq, *dk, *dv;
} backward_args;

/* A thread's workspace: P and dS of one pair of blocks, copies, and sums. Of K and V also what is
 * turned, as the right operands of products over head_dim. */
typedef struct {
    float *p, *ds, *p_words, *ds_words; /* [STEP][OWN]; the last two for bf16 */
    float *keys_turned, *values_turned;
    float *queries, *d_out;                          /* [OWN][copy_stride] */
    float *keys_space, *queries_space, *d_out_space; /* likewise, for qs_block_right */
    const float *keys;
    float *dk, *dv;
} pair_work;

static pair_work workspace(const backward_args *g, int thread)
{
    float *scores = g->plan.workspace + thread * g->plan.per_thread;
    float *copies = scores + QS_ATTENTION_SCORES * OWN * STEP;
    int64_t count = g->plan.copy_count;
    return (pair_work){.p = scores,
                       .ds = scores + OWN * STEP,
                       .p_words = scores + 2 * OWN * STEP,
                       .ds_words = scores + 3 * OWN * STEP,
                       .keys_turned = copies,
                       .values_turned = copies + count,
                       .keys_space = copies + 2 * count,
                       .queries = copies + 3 * count,
                       .d_out = copies + 4 * count,
                       .dk = copies + 5 * count,
                       .dv = copies + 6 * count,
                       .queries_space = copies + 7 * count,
                       .d_out_space = copies + 8 * count};
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
            g->delta[h * g->o->rows + t] = g->plan.isa->dot(o, d_o, dim);
        }
    }
}

/* P and dS of queries [query, query + rows) and keys [key, key + cols) of one head. */
static void pair(const backward_args *g, const pair_work *w, int head, int64_t query, int64_t rows,
                 int64_t key, int64_t cols)
{
    const qs_attention_shape *shape = g->plan.shape;
    const bool capped = shape->cap > 0.0F;
    qs_block queries = {w->queries, g->plan.copy_stride, false};
    qs_block d_out = {w->d_out, g->plan.copy_stride, false};
    qs_block_multiply(&g->plan, rows, cols, shape->head_dim, queries, w->keys_turned,
                      QS_ATTENTION_TURNED, w->p, OWN, false);
    qs_block_multiply(&g->plan, rows, cols, shape->head_dim, d_out, w->values_turned,
                      QS_ATTENTION_TURNED, w->ds, OWN, false);
    for (int64_t i = 0; i < rows; i++) {
        float *p = w->p + i * OWN, *ds = w->ds + i * OWN;
        int64_t at = head * g->qm->rows + query + i;
        qs_visible_keys visible = qs_visible(shape, query + i, key, cols);
        int64_t from = visible.first;
        if (capped) {
            g->plan.isa->soft_cap(p + from, visible.count, shape->scale, shape->cap);
            g->plan.isa->soft_cap_backward(p + from, visible.count, g->delta[at], shape->cap,
                                           ds + from);
        }
        g->plan.isa->exp_sum(p + from, visible.count, capped ? 1.0F : shape->scale, g->lse[at]);
        g->plan.isa->softmax_backward(p + from, visible.count, capped ? 0.0F : g->delta[at],
                                      shape->scale, ds + from);
        qs_zero_hidden(p, cols, visible);
        qs_zero_hidden(ds, cols, visible);
    }
}

/* dQ of some queries of one head, when the tasks of earlier keys have added theirs. `step` numbers
 * the steps over all heads. */
static void add_dq(const backward_args *g, const qs_attention_task *task, const pair_work *w,
                   int head, int64_t query, int64_t rows, int64_t cols, int64_t step)
{
    const int64_t dim = g->plan.shape->head_dim;
    const qs_attention_task queries = {.doc_begin = task->doc_begin, .begin = query};
    const bool more = qs_attention_first_key(&g->plan, &queries) < task->begin;
    float *dq = qs_mat_f32(g->dq) + query * g->dq->stride + head * dim;
    if (more) {
        qs_parallel_await(&g->plan.passed[task->number - g->plan.shape->n_kv_heads], step + 1);
    }
    qs_block ds = qs_block_scores(&g->plan, w->ds, OWN, rows, cols, w->ds_words);
    qs_block_multiply(&g->plan, rows, dim, cols, ds, w->keys, g->plan.copy_stride, dq,
                      g->dq->stride, more);
    atomic_store_explicit(&g->plan.passed[task->number], step + 1, memory_order_release);
}

/* The gradients that the task's keys and queries [query, query + rows) of its head `h` make. */
static void take_queries(const backward_args *g, const qs_attention_task *task, const pair_work *w,
                         int h, int64_t query, int64_t rows)
{
    const int64_t dim = g->plan.shape->head_dim, stride = g->plan.copy_stride;
    const int64_t cols =
        qs_min_i64(task->rows, query + rows - task->begin); /* later keys are hidden */
    const int64_t step = (h * g->plan.count * OWN + query - task->doc_begin) / STEP;
    int head = task->head + h;
    qs_block_copy(&g->plan, g->qm, query, rows, head, w->queries);
    qs_block_copy(&g->plan, g->d_o, query, rows, head, w->d_out);
    pair(g, w, head, query, rows, task->begin, cols);
    add_dq(g, task, w, head, query, rows, cols, step);
    const qs_block p = qs_block_scores_turned(&g->plan, w->p, OWN, rows, cols, w->p_words);
    const qs_block ds = qs_block_scores_turned(&g->plan, w->ds, OWN, rows, cols, w->ds_words);
    const float *queries =
        qs_block_right(&g->plan, g->qm, query, rows, head, w->queries, w->queries_space);
    const float *d_out =
        qs_block_right(&g->plan, g->d_o, query, rows, head, w->d_out, w->d_out_space);
    qs_block_multiply(&g->plan, cols, dim, rows, p, d_out, stride, w->dv, stride, true);
    qs_block_multiply(&g->plan, cols, dim, rows, ds, queries, stride, w->dk, stride, true);
}

static void copy_out(const backward_args *g, const qs_attention_task *task, const float *sums,
                     qs_mat *to)
{
    const int64_t dim = g->plan.shape->head_dim;
    float *out = qs_mat_f32(to) + task->begin * to->stride + task->kv_head * dim;
    for (int64_t i = 0; i < task->rows; i++) {
        memcpy(out + i * to->stride, sums + i * g->plan.copy_stride, (size_t)dim * sizeof *out);
    }
}

/* One block of keys against all queries that see them, of all heads that share them. */
static void keys_task(void *ctx, int64_t index, int thread)
{
    const backward_args *g = ctx;
    qs_attention_task task = qs_attention_keys_task_at(&g->plan, index);
    pair_work w = workspace(g, thread);
    qs_block_turn(&g->plan, g->km, task.begin, task.rows, task.kv_head, w.keys_turned);
    qs_block_turn(&g->plan, g->vm, task.begin, task.rows, task.kv_head, w.values_turned);
    w.keys =
        qs_block_right(&g->plan, g->km, task.begin, task.rows, task.kv_head, NULL, w.keys_space);
    memset(w.dk, 0, (size_t)g->plan.copy_count * sizeof *w.dk);
    memset(w.dv, 0, (size_t)g->plan.copy_count * sizeof *w.dv);
    int64_t query_end = qs_attention_query_end(&g->plan, &task);
    for (int h = 0; h < task.heads; h++) {
        for (int64_t query = task.begin; query < query_end; query += STEP) {
            take_queries(g, &task, &w, h, query, qs_min_i64(STEP, task.doc_end - query));
        }
    }
    atomic_store_explicit(&g->plan.passed[task.number], INT64_MAX, memory_order_release);
    copy_out(g, &task, w.dk, g->dk);
    copy_out(g, &task, w.dv, g->dv);
}

qs_status qs_attention_backward_by(qs_queue *q, qs_products products,
                                   const qs_attention_shape *shape, const qs_mat *qm,
                                   const qs_mat *km, const qs_mat *vm, const qs_mat *o,
                                   const float *lse, const qs_mat *d_o, float *delta, qs_mat *dq,
                                   qs_mat *dk, qs_mat *dv)
{
    backward_args args = {.qm = qm,
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
    QS_TRY(qs_attention_plan_make(q, products, shape, &args.plan));
    qs_parallel_for(q, qs_ceil_div(o->rows, DELTA_ROWS), o->rows * o->cols, delta_task, &args);
    qs_parallel_for(q, args.plan.count * shape->n_kv_heads, work, keys_task, &args);
    return QS_OK;
}
