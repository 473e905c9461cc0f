/* What attention's forward and backward share: the cut into tasks, each thread's workspace, and
 * products of blocks.
 *
 * Within a document queries and keys are cut into blocks of QS_ATTENTION_OWN. A task owns one block
 * (of queries in the forward, of keys in the backward) of some heads that share their keys, and
 * goes over the others in ascending order, QS_ATTENTION_STEP at a time, leaving out those that lie
 * after it or outside of its window. Nothing depends on how many threads there are (after Dao
 * 2023, arXiv:2307.08691). A task copies rows once for all products that take them; only K and V
 * are turned as well. */
#ifndef QS_KERNELS_CPU_ATTENTION_IMPL_H
#define QS_KERNELS_CPU_ATTENTION_IMPL_H

#include <stdatomic.h>
#include <string.h>

#include "kernels/cpu/ops_impl.h"

enum {
    QS_ATTENTION_OWN = 128,
    QS_ATTENTION_STEP = 64,
    QS_ATTENTION_HEADS = 4, /* most query heads of a task of the forward */
    /* Workspace of a thread, enough for the forward and the backward. */
    QS_ATTENTION_SCORES = 4,
    QS_ATTENTION_VECTORS = 3 * QS_ATTENTION_HEADS,
    QS_ATTENTION_COPIES = 2 + 2 * QS_ATTENTION_HEADS,
};

/** The tasks of a launch: blocks of all documents, numbered through, times groups of heads. */
typedef struct {
    const qs_attention_shape *shape;
    const qs_isa *isa;
    const qs_pairs *pairs; /* products in bf16; NULL: in fp32 */
    int64_t *first;        /* [n_docs + 1] number of a document's first block */
    int64_t count;         /* blocks in all */
    int heads_per_kv;      /* query heads that share keys and values */
    int groups_per_kv;     /* tasks that they are dealt to */
    int64_t copy_stride;   /* of copied rows: head_dim, and room */
    int64_t copy_count;    /* floats of a block's rows, as they are or turned */
    float *workspace;      /* [threads][per_thread] */
    int64_t per_thread;
    _Atomic int64_t *passed; /* [count][n_kv_heads] for the backward's tasks; zeros */
} qs_attention_plan;

/** One task: a block of rows, the document they belong to, and heads [head, head + heads) of one
 * kv_head. */
typedef struct {
    int64_t number;
    int64_t doc_begin, doc_end; /* rows */
    int64_t begin, rows;
    int kv_head, head, heads;
} qs_attention_task;

/** Floats that attention keeps at most. */
int64_t qs_attention_scratch_count(int threads, int64_t tokens, int64_t documents, int kv_heads,
                                   int head_dim);

/** Number the blocks and provide each thread with QS_ATTENTION_SCORES matrices of OWN x STEP,
 * _VECTORS vectors of OWN, and space for _COPIES blocks. Memory is the calling thread's, until its
 * next attention. */
qs_status qs_attention_plan_make(qs_queue *q, qs_products products, const qs_attention_shape *shape,
                                 qs_attention_plan *out);

/** Tasks in all: blocks times groups of heads. */
int64_t qs_attention_tasks(const qs_attention_plan *plan);

/** Task `number`; with `late_first` the blocks are taken from the end, because late queries see
 * the most keys. */
qs_attention_task qs_attention_task_at(const qs_attention_plan *plan, int64_t number,
                                       bool late_first);

/** Task `number` of the backward, of blocks times kv_heads: a block of keys and all heads that
 * share them. That of the block before, of the same kv_head, has the number less n_kv_heads. */
qs_attention_task qs_attention_keys_task_at(const qs_attention_plan *plan, int64_t number);

/** The first row of the first QS_ATTENTION_STEP keys that queries from task->begin on see. */
int64_t qs_attention_first_key(const qs_attention_plan *plan, const qs_attention_task *task);

/** The row behind the last query that sees one of a task's keys. */
int64_t qs_attention_query_end(const qs_attention_plan *plan, const qs_attention_task *task);

/** Operations of a whole pass over the scores, for qs_parallel_for. */
int64_t qs_attention_work(const qs_attention_shape *shape);

/* ---- blocks of one head in a thread's cache ----
 * In fp32 a block is its floats. In bf16 it is words of two numbers along the dimension that a
 * product sums over (pairs.h), so that the same rows may be needed in more than one form. */

/** A left operand: element, or word, (i, k) at data[i * stride + k], or at data[k * stride + i]. */
typedef struct {
    const float *data;
    int64_t stride;
    bool in_columns;
} qs_block;

/** Rows [row, row + rows) of a head as a left operand of products over head_dim:
 * copy[rows][copy_stride]; in fp32 as a right one of products over the rows as well. */
void qs_block_copy(const qs_attention_plan *plan, const qs_mat *mat, int64_t row, int64_t rows,
                   int head, float *copy);

/** As a right operand of products over the rows, in `space`, or in `copy`, what qs_block_copy made
 * of them (or NULL), where that is the same. \return the operand, of stride copy_stride. */
const float *qs_block_right(const qs_attention_plan *plan, const qs_mat *mat, int64_t row,
                            int64_t rows, int head, const float *copy, float *space);

/** As a right operand of products over head_dim: turned[head_dim][QS_ATTENTION_TURNED]. */
enum { QS_ATTENTION_TURNED = QS_ATTENTION_OWN + 16 };
void qs_block_turn(const qs_attention_plan *plan, const qs_mat *mat, int64_t row, int64_t rows,
                   int head, float *turned);

/** Scores[rows, cols] as a left operand of products over the columns, or over the rows
 * (in columns); in bf16 in `space`, which is as large. */
qs_block qs_block_scores(const qs_attention_plan *plan, const float *scores, int64_t stride,
                         int64_t rows, int64_t cols, float *space);
qs_block qs_block_scores_turned(const qs_attention_plan *plan, const float *scores, int64_t stride,
                                int64_t rows, int64_t cols, float *space);

/** c[m, n] (+)= left[m, k] right[k, n]: the bits of qs_gemm, or of qs_gemm_bf16. */
void qs_block_multiply(const qs_attention_plan *plan, int64_t m, int64_t n, int64_t k,
                       qs_block left, const float *right, int64_t right_stride, float *c,
                       int64_t c_stride, bool accumulate);

/** Of some keys those that a query sees: `count` of them from number `first` on. */
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
