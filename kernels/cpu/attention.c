/* Causal attention within documents, forward: online softmax over blocks of keys (Milakov &
 * Gimelshein 2018, arXiv:1805.02867). The running maximum is that of the scaled, capped scores. */
#include <math.h>

#include "kernels/cpu/attention_impl.h"
#include "kernels/cpu/parallel.h"

enum { OWN = QS_ATTENTION_OWN, STEP = QS_ATTENTION_STEP };

typedef struct {
    qs_attention_plan plan;
    const qs_mat *qm, *km, *vm;
    qs_mat *o;
    float *lse;
} forward_args;

/* One head of a task. */
typedef struct {
    float *max, *sum, *by; /* [OWN] running maximum and sum; factor of what was summed before */
    float *queries, *out;  /* [OWN][copy_stride]; out is scaled at the end */
} head_state;

/* Scores of some keys and the task's queries from number `from` on to probabilities relative to the
 * new maximum; older sums are scaled down. */
static void softmax_step(const forward_args *f, const qs_attention_task *task,
                         const head_state *head, int64_t from, float *scores, int64_t key,
                         int64_t cols)
{
    const qs_attention_shape *shape = f->plan.shape;
    const float scale = shape->cap > 0.0F ? 1.0F : shape->scale; /* the cap takes scaled scores */
    for (int64_t i = from; i < task->rows; i++) {
        qs_visible_keys visible = qs_visible(shape, task->begin + i, key, cols);
        float *row = scores + i * STEP + visible.first;
        if (visible.count == 0) { /* of a window's first block; there may be no maximum yet */
            head->by[i] = 0.0F;
            continue;
        }
        if (shape->cap > 0.0F) {
            f->plan.isa->soft_cap(row, visible.count, shape->scale, shape->cap);
        }
        float most = f->plan.isa->max(row, visible.count) * scale, before = head->max[i];
        head->max[i] = most > before ? most : before;
        head->by[i] = before - head->max[i];
    }
    f->plan.isa->exp_sum(head->by + from, task->rows - from, 1.0F, 0.0F);
    for (int64_t i = from; i < task->rows; i++) {
        float *row = scores + i * STEP;
        qs_visible_keys visible = qs_visible(shape, task->begin + i, key, cols);
        float sum = f->plan.isa->exp_sum(row + visible.first, visible.count, scale, head->max[i]);
        head->sum[i] = head->sum[i] * head->by[i] + sum;
        qs_zero_hidden(row, cols, visible);
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

/* `vectors` and `copies` are what the head may use of the workspace. */
static void head_begin(const forward_args *f, const qs_attention_task *task, int number,
                       float *vectors, float *copies, head_state *head)
{
    head->max = vectors;
    head->sum = vectors + OWN;
    head->by = vectors + 2 * OWN;
    head->queries = copies;
    head->out = copies + f->plan.copy_count;
    qs_block_copy(&f->plan, f->qm, task->begin, task->rows, task->head + number, head->queries);
    for (int64_t i = 0; i < task->rows; i++) {
        head->max[i] = -INFINITY;
        head->sum[i] = 0.0F;
    }
}

static void head_end(const forward_args *f, const qs_attention_task *task, int number,
                     const head_state *head)
{
    int dim = f->plan.shape->head_dim, at = task->head + number;
    float *lse = f->lse + at * f->qm->rows + task->begin;
    float *o = qs_mat_f32(f->o) + task->begin * f->o->stride + (int64_t)at * dim;
    for (int64_t i = 0; i < task->rows; i++) {
        head->by[i] = 1.0F / head->sum[i];
        lse[i] = (float)((double)head->max[i] + qs_log_fixed((double)head->sum[i]));
    }
    scale_rows(head->out, f->plan.copy_stride, task->rows, dim, head->by);
    for (int64_t i = 0; i < task->rows; i++) {
        memcpy(o + i * f->o->stride, head->out + i * f->plan.copy_stride, (size_t)dim * sizeof *o);
    }
}

/* Keys [key, key + cols), copied and turned, and the queries that see some of them. */
static void take_keys(const forward_args *f, const qs_attention_task *task, const head_state *head,
                      int64_t key, int64_t cols, const float *keys, const float *values,
                      float *scores)
{
    const int64_t dim = f->plan.shape->head_dim, stride = f->plan.copy_stride;
    const int64_t from = key > task->begin ? key - task->begin : 0, rows = task->rows - from;
    const bool more = key > qs_attention_first_key(&f->plan, task);
    qs_block queries = {head->queries + from * stride, stride, false};
    float *out = head->out + from * stride, *words = scores + OWN * STEP;
    qs_block_multiply(&f->plan, rows, cols, dim, queries, keys, QS_ATTENTION_TURNED,
                      scores + from * STEP, STEP, false);
    softmax_step(f, task, head, from, scores, key, cols);
    qs_block weights = qs_block_scores(&f->plan, scores + from * STEP, STEP, rows, cols, words);
    if (more) {
        scale_rows(out, stride, rows, dim, head->by + from);
    }
    qs_block_multiply(&f->plan, rows, dim, cols, weights, values, stride, out, stride, more);
}

static void forward_task(void *ctx, int64_t index, int thread)
{
    const forward_args *f = ctx;
    qs_attention_task task = qs_attention_task_at(&f->plan, index, true);
    float *scores = f->plan.workspace + thread * f->plan.per_thread;
    float *vectors = scores + QS_ATTENTION_SCORES * OWN * STEP;
    float *keys = vectors + QS_ATTENTION_VECTORS * OWN, *copy = keys + f->plan.copy_count;
    head_state head[QS_ATTENTION_HEADS];
    for (int h = 0; h < task.heads; h++) {
        head_begin(f, &task, h, vectors + h * 3 * OWN, copy + (1 + 2 * h) * f->plan.copy_count,
                   &head[h]);
    }
    for (int64_t key = qs_attention_first_key(&f->plan, &task); key < task.begin + task.rows;
         key += STEP) {
        int64_t cols = qs_min_i64(STEP, task.doc_end - key);
        qs_block_turn(&f->plan, f->km, key, cols, task.kv_head, keys);
        const float *values = qs_block_right(&f->plan, f->vm, key, cols, task.kv_head, NULL, copy);
        for (int h = 0; h < task.heads; h++) {
            take_keys(f, &task, &head[h], key, cols, keys, values, scores);
        }
    }
    for (int h = 0; h < task.heads; h++) {
        head_end(f, &task, h, &head[h]);
    }
}

qs_status qs_attention_forward_by(qs_queue *q, qs_products products,
                                  const qs_attention_shape *shape, const qs_mat *qm,
                                  const qs_mat *km, const qs_mat *vm, qs_mat *o, float *lse)
{
    forward_args args = {.qm = qm, .km = km, .vm = vm, .o = o, .lse = lse};
    QS_TRY(qs_attention_plan_make(q, products, shape, &args.plan));
    qs_parallel_for(q, qs_attention_tasks(&args.plan), qs_attention_work(shape), forward_task,
                    &args);
    return QS_OK;
}
