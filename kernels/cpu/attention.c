/* Causal attention within documents, forward: online softmax over blocks of keys (Milakov &
 * Gimelshein 2018, arXiv:1805.02867). The running maximum is that of the scaled, capped scores. */
#include <math.h>

#include "kernels/cpu/attention_impl.h"
#include "kernels/cpu/parallel.h"

enum { BLOCK = QS_ATTENTION_BLOCK };

typedef struct {
    qs_attention_plan plan;
    const qs_isa *isa;
    const qs_mat *qm, *km, *vm;
    qs_mat *o;
    float *lse;
} forward_args;

/* One head of a task. */
typedef struct {
    float *max, *sum, *by; /* [BLOCK] running maximum and sum; factor of what was summed before */
    float *queries;        /* packed */
    float *out;            /* of the task's first row */
} head_state;

/* Scores of one block of keys to probabilities relative to the new maximum; older sums are scaled
 * down. */
static void softmax_step(const forward_args *f, const qs_attention_task *task,
                         const head_state *head, float *scores, int64_t key, int64_t cols)
{
    const qs_attention_shape *shape = f->plan.shape;
    const float scale = shape->cap > 0.0F ? 1.0F : shape->scale; /* the cap takes scaled scores */
    for (int64_t i = 0; i < task->rows; i++) {
        qs_visible_keys visible = qs_visible(shape, task->begin + i, key, cols);
        if (shape->cap > 0.0F) {
            f->isa->soft_cap(scores + i * BLOCK + visible.first, visible.count, shape->scale,
                             shape->cap);
        }
        if (visible.count == 0) { /* of a window's first block; there may be no maximum yet */
            head->by[i] = 0.0F;
            continue;
        }
        float most = f->isa->max(scores + i * BLOCK + visible.first, visible.count) * scale;
        float before = head->max[i];
        head->max[i] = most > before ? most : before;
        head->by[i] = before - head->max[i];
    }
    f->isa->exp_sum(head->by, task->rows, 1.0F, 0.0F);
    for (int64_t i = 0; i < task->rows; i++) {
        float *row = scores + i * BLOCK;
        qs_visible_keys visible = qs_visible(f->plan.shape, task->begin + i, key, cols);
        float sum = f->isa->exp_sum(row + visible.first, visible.count, scale, head->max[i]);
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

static void head_begin(const forward_args *f, const qs_attention_task *task, int number,
                       float *vectors, float *packed, head_state *head)
{
    int dim = f->plan.shape->head_dim, at = task->head + number;
    head->max = vectors;
    head->sum = vectors + BLOCK;
    head->by = vectors + 2 * BLOCK;
    head->queries = packed;
    head->out = qs_mat_f32(f->o) + task->begin * f->o->stride + (int64_t)at * dim;
    qs_operand queries = qs_head_operand(f->qm, task->begin, at, dim, false);
    qs_pack_left(f->isa, &queries, task->rows, dim, packed);
    for (int64_t i = 0; i < task->rows; i++) {
        head->max[i] = -INFINITY;
        head->sum[i] = 0.0F;
    }
}

static void head_end(const forward_args *f, const qs_attention_task *task, int number,
                     const head_state *head)
{
    float *lse = f->lse + (task->head + number) * f->qm->rows + task->begin;
    for (int64_t i = 0; i < task->rows; i++) {
        head->by[i] = 1.0F / head->sum[i];
        lse[i] = (float)((double)head->max[i] + qs_log_fixed((double)head->sum[i]));
    }
    scale_rows(head->out, f->o->stride, task->rows, f->plan.shape->head_dim, head->by);
}

static void forward_task(void *ctx, int64_t index, int thread)
{
    const forward_args *f = ctx;
    int dim = f->plan.shape->head_dim;
    qs_attention_task task = qs_attention_task_at(&f->plan, index, true);
    float *scores = f->plan.workspace + thread * f->plan.per_thread;
    float *vectors = scores + BLOCK * BLOCK;
    float *keys = vectors + QS_ATTENTION_HEADS * 3 * BLOCK;
    float *values = keys + f->plan.pack_count, *p = values + f->plan.pack_count;
    head_state head[QS_ATTENTION_HEADS];
    for (int h = 0; h < task.heads; h++) {
        head_begin(f, &task, h, vectors + h * 3 * BLOCK, p + (1 + h) * f->plan.pack_count,
                   &head[h]);
    }
    qs_operand weights = qs_square_operand(scores, false);
    int64_t first = qs_attention_first_key(&f->plan, &task);
    for (int64_t key = first; key < task.begin + task.rows; key += BLOCK) {
        int64_t cols = qs_min_i64(BLOCK, task.doc_end - key);
        bool more = key > first;
        qs_operand k = qs_head_operand(f->km, key, task.kv_head, dim, true);
        qs_operand v = qs_head_operand(f->vm, key, task.kv_head, dim, false);
        qs_pack_right(f->isa, &k, cols, dim, keys);
        qs_pack_right(f->isa, &v, dim, cols, values);
        for (int h = 0; h < task.heads; h++) {
            qs_multiply_packed(f->isa, task.rows, cols, dim, head[h].queries, keys, scores, BLOCK,
                               false);
            softmax_step(f, &task, &head[h], scores, key, cols);
            if (more) {
                scale_rows(head[h].out, f->o->stride, task.rows, dim, head[h].by);
            }
            qs_pack_left(f->isa, &weights, task.rows, cols, p);
            qs_multiply_packed(f->isa, task.rows, dim, cols, p, values, head[h].out, f->o->stride,
                               more);
        }
    }
    for (int h = 0; h < task.heads; h++) {
        head_end(f, &task, h, &head[h]);
    }
}

qs_status qs_cpu_attention_forward(qs_queue *q, const qs_attention_shape *shape, const qs_mat *qm,
                                   const qs_mat *km, const qs_mat *vm, qs_mat *o, float *lse)
{
    forward_args args = {.isa = qs_isa_get(), .qm = qm, .km = km, .vm = vm, .o = o, .lse = lse};
    QS_TRY(qs_attention_plan_make(q, shape, &args.plan));
    qs_parallel_for(q, qs_attention_tasks(&args.plan), qs_attention_work(shape), forward_task,
                    &args);
    return QS_OK;
}
