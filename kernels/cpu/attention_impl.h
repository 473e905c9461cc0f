/* What attention's forward and backward share: the cut into tasks, and each thread's workspace.
 *
 * Within a document queries and keys are cut into blocks of QS_ATTENTION_BLOCK. A task owns one
 * block (of queries for the output and dQ, of keys for dK and dV) of some heads that share their
 * keys, and goes over the blocks of the other kind in ascending order, leaving out those that lie
 * after it or outside of its window. So nothing is added from two threads, and nothing depends on
 * how many there are (Dao 2023, arXiv:2307.08691, without the atomics). Operands are packed once
 * for all products of a task that use them. */
#ifndef QS_KERNELS_CPU_ATTENTION_IMPL_H
#define QS_KERNELS_CPU_ATTENTION_IMPL_H

#include <string.h>

#include "kernels/cpu/ops_impl.h"

enum {
    QS_ATTENTION_BLOCK = 64,
    QS_ATTENTION_HEADS = 4, /* most query heads of a task */
    /* Workspace of a thread, enough for the forward and the backward. */
    QS_ATTENTION_SQUARES = 2,
    QS_ATTENTION_VECTORS = 3 * QS_ATTENTION_HEADS,
    QS_ATTENTION_PACKS = 4 + 2 * QS_ATTENTION_HEADS,
};

/** The tasks of a launch: blocks of all documents, numbered through, times groups of heads. */
typedef struct {
    const qs_attention_shape *shape;
    int64_t *first;     /* [n_docs + 1] number of a document's first block */
    int64_t count;      /* blocks in all */
    int heads_per_kv;   /* query heads that share keys and values */
    int groups_per_kv;  /* tasks that they are dealt to */
    int64_t pack_count; /* floats of one packed operand */
    float *workspace;   /* [threads][per_thread] */
    int64_t per_thread;
} qs_attention_plan;

/** One task: a block of rows, the document they belong to, and heads [head, head + heads) of one
 * kv_head. */
typedef struct {
    int64_t doc_begin, doc_end; /* rows */
    int64_t begin, rows;
    int kv_head, head, heads;
} qs_attention_task;

/** Floats that attention keeps at most. */
int64_t qs_attention_scratch_count(int threads, int64_t documents, int head_dim);

/** Number the blocks and provide each thread with QS_ATTENTION_SQUARES block x block matrices,
 * _VECTORS rows of a block, and space for _PACKS operands. Memory is the calling thread's, until
 * its next attention. */
qs_status qs_attention_plan_make(qs_queue *q, const qs_attention_shape *shape,
                                 qs_attention_plan *out);

/** Tasks in all: blocks times groups of heads. */
int64_t qs_attention_tasks(const qs_attention_plan *plan);

/** Task `number`; with `late_first` the blocks are taken from the end, because late queries see
 * the most keys. */
qs_attention_task qs_attention_task_at(const qs_attention_plan *plan, int64_t number,
                                       bool late_first);

/** The first row of the first block of keys that a task's queries see. */
int64_t qs_attention_first_key(const qs_attention_plan *plan, const qs_attention_task *task);

/** The row behind the last query that sees one of a task's keys. */
int64_t qs_attention_query_end(const qs_attention_plan *plan, const qs_attention_task *task);

/** Operations of a whole pass over the scores, for qs_parallel_for. */
int64_t qs_attention_work(const qs_attention_shape *shape);

/** The columns of a head in a matrix, from row `row` on. */
static inline qs_operand qs_head_operand(const qs_mat *mat, int64_t row, int head, int head_dim,
                                         bool transposed)
{
    return (qs_operand){.data = qs_mat_f32(mat) + row * mat->stride + (int64_t)head * head_dim,
                        .stride = mat->stride,
                        .transposed = transposed};
}

static inline qs_operand qs_square_operand(const float *square, bool transposed)
{
    return (qs_operand){.data = square, .stride = QS_ATTENTION_BLOCK, .transposed = transposed};
}

/** Keys of a block that a query sees: `count` of them from the block's number `first` on. */
typedef struct {
    int64_t first, count;
} qs_visible_keys;

/** Of `cols` keys from row `key` on, those that the query at row `query` sees: up to itself, and
 * with a window no further back than window - 1. */
static inline qs_visible_keys qs_visible(const qs_attention_shape *shape, int64_t query,
                                         int64_t key, int64_t cols)
{
    int64_t first = shape->window > 0 ? query - shape->window + 1 - key : 0;
    int64_t end = query - key + 1;
    first = first < 0 ? 0 : first;
    end = end < cols ? end : cols;
    return end > first ? (qs_visible_keys){first, end - first} : (qs_visible_keys){0, 0};
}

/** Set the elements of a row of `cols` that are not visible to 0. */
static inline void qs_zero_hidden(float *row, int64_t cols, qs_visible_keys visible)
{
    int64_t end = visible.first + visible.count;
    memset(row, 0, (size_t)visible.first * sizeof *row);
    memset(row + end, 0, (size_t)(cols - end) * sizeof *row);
}

#endif
