#include "kernels/cpu/attention_impl.h"

#include "kernels/cpu/parallel.h"
#include "kernels/cpu/scratch.h"

enum { OWN = QS_ATTENTION_OWN, STEP = QS_ATTENTION_STEP };

/* Rows an odd number of cache lines apart, so that they spread over all sets of the cache. */
static int64_t copy_stride(int64_t dim)
{
    return qs_ceil_div(dim, QS_GEMM_NR_MAX) * QS_GEMM_NR_MAX + 16;
}

static int64_t copy_count(int64_t dim)
{
    return qs_max_i64(OWN * copy_stride(dim), dim * QS_ATTENTION_TURNED);
}

static int64_t per_thread_count(int64_t dim)
{
    return QS_ATTENTION_SCORES * OWN * STEP + QS_ATTENTION_VECTORS * OWN +
           QS_ATTENTION_COPIES * copy_count(dim);
}

/* Floats of `count` numbers of 8 bytes. */
static int64_t numbers(int64_t count)
{
    return qs_ceil_div(2 * count, 16) * 16;
}

int64_t qs_attention_scratch_count(int threads, int64_t tokens, int64_t documents, int kv_heads,
                                   int head_dim)
{
    int64_t blocks = tokens / OWN + documents; /* each document's last one may be shorter */
    return numbers(documents + 1) + numbers(blocks * kv_heads) +
           threads * per_thread_count(head_dim);
}

qs_status qs_attention_plan_make(qs_queue *q, qs_products products, const qs_attention_shape *shape,
                                 qs_attention_plan *out)
{
    int threads = qs_queue_threads(q);
    out->shape = shape;
    out->isa = qs_isa_get();
    out->pairs = products == QS_PRODUCTS_BF16 ? qs_pairs_get() : NULL;
    out->heads_per_kv = shape->n_heads / shape->n_kv_heads;
    out->groups_per_kv = (int)qs_ceil_div(out->heads_per_kv, QS_ATTENTION_HEADS);
    out->copy_stride = copy_stride(shape->head_dim);
    out->copy_count = copy_count(shape->head_dim);
    out->per_thread = per_thread_count(shape->head_dim);
    float *memory;
    QS_TRY(qs_scratch(QS_SCRATCH_ATTENTION,
                      qs_attention_scratch_count(threads, shape->cu_seqlens[shape->n_docs],
                                                 shape->n_docs, shape->n_kv_heads, shape->head_dim),
                      &memory));
    out->first = (int64_t *)(void *)memory;
    memory += numbers(shape->n_docs + 1);
    out->count = 0;
    for (int d = 0; d < shape->n_docs; d++) {
        out->first[d] = out->count;
        out->count += qs_ceil_div(shape->cu_seqlens[d + 1] - shape->cu_seqlens[d], OWN);
    }
    out->first[shape->n_docs] = out->count;
    out->passed = (_Atomic int64_t *)(void *)memory;
    for (int64_t i = 0; i < out->count * shape->n_kv_heads; i++) {
        atomic_init(&out->passed[i], 0);
    }
    out->workspace = memory + numbers(out->count * shape->n_kv_heads);
    return QS_OK;
}

static int64_t groups(const qs_attention_plan *plan)
{
    return (int64_t)plan->shape->n_kv_heads * plan->groups_per_kv;
}

int64_t qs_attention_tasks(const qs_attention_plan *plan)
{
    return plan->count * groups(plan);
}

static int doc_of_block(const qs_attention_plan *plan, int64_t block)
{
    int low = 0, high = plan->shape->n_docs; /* first[low] <= block < first[high] */
    while (high - low > 1) {
        int middle = low + (high - low) / 2;
        if (plan->first[middle] <= block) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

qs_attention_task qs_attention_task_at(const qs_attention_plan *plan, int64_t number,
                                       bool late_first)
{
    int64_t block = number / groups(plan);
    int group = (int)(number % groups(plan));
    if (late_first) {
        block = plan->count - 1 - block;
    }
    int doc = doc_of_block(plan, block);
    qs_attention_task task = {.number = number,
                              .doc_begin = plan->shape->cu_seqlens[doc],
                              .doc_end = plan->shape->cu_seqlens[doc + 1],
                              .kv_head = group / plan->groups_per_kv};
    task.begin = task.doc_begin + (block - plan->first[doc]) * OWN;
    task.rows = qs_min_i64(OWN, task.doc_end - task.begin);
    int within = group % plan->groups_per_kv * QS_ATTENTION_HEADS;
    task.head = task.kv_head * plan->heads_per_kv + within;
    task.heads = (int)qs_min_i64(QS_ATTENTION_HEADS, plan->heads_per_kv - within);
    return task;
}

qs_attention_task qs_attention_keys_task_at(const qs_attention_plan *plan, int64_t number)
{
    /* The first group of its kv_head stands for all of them. */
    qs_attention_task task = qs_attention_task_at(plan, number * plan->groups_per_kv, false);
    task.number = number;
    task.heads = plan->heads_per_kv;
    return task;
}

int64_t qs_attention_first_key(const qs_attention_plan *plan, const qs_attention_task *task)
{
    int64_t before = task->begin - task->doc_begin; /* rows of the document */
    if (plan->shape->window == 0) {
        return task->doc_begin;
    }
    int64_t first = qs_max_i64(0, before - plan->shape->window + 1);
    return task->doc_begin + first / STEP * STEP;
}

int64_t qs_attention_query_end(const qs_attention_plan *plan, const qs_attention_task *task)
{
    if (plan->shape->window == 0) {
        return task->doc_end;
    }
    return qs_min_i64(task->doc_end, task->begin + task->rows - 1 + plan->shape->window);
}

int64_t qs_attention_work(const qs_attention_shape *shape)
{
    int64_t scores = 0;
    for (int d = 0; d < shape->n_docs; d++) {
        int64_t len = shape->cu_seqlens[d + 1] - shape->cu_seqlens[d];
        scores += len * (shape->window > 0 ? qs_min_i64(len, shape->window) : len);
    }
    return scores * shape->n_heads * (2 + shape->head_dim / 16);
}
