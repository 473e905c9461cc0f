#include "kernels/cpu/panels.h"

#include <string.h>

#include "kernels/cpu/parallel.h"
#include "kernels/cpu/scratch.h"

enum {
    TASKS_PER_THREAD = 4,  /* wanted, so that a late thread does not hold up the others */
    PACKED_MAX = 16 << 20, /* floats of A that are packed at once; larger products go by blocks of
                              rows */
};

int64_t qs_panels_count(const qs_panels *p)
{
    return qs_ceil_div(p->m, p->kind->mr);
}

static void pack_task(void *ctx, int64_t index, int thread)
{
    (void)thread;
    const qs_panels *p = ctx;
    p->kind->pack_left(p, index);
}

static void multiply_task(void *ctx, int64_t index, int thread)
{
    const qs_panels *p = ctx;
    const qs_panels_kind *kind = p->kind;
    const int64_t first = index % p->row_tasks * p->task_panels * kind->mr;
    const int64_t last = qs_min_i64(first + p->task_panels * kind->mr, p->m);
    const int64_t j0 = index / p->row_tasks * p->task_cols;
    const int64_t cols = qs_min_i64(p->task_cols, p->n - j0), step = kind->step_panels * kind->mr;
    float *right = p->right + thread * kind->right_count(p, p->task_cols);
    for (int64_t k0 = 0; k0 < p->k; k0 += kind->kc) {
        const int64_t depth = qs_min_i64(kind->kc, p->k - k0);
        kind->pack_right(p, j0, cols, k0, depth, right);
        for (int64_t i = first; i < last; i += step) {
            kind->multiply(p, i, qs_min_i64(step, last - i), j0, cols, k0, depth, right,
                           p->accumulate || k0 > 0);
            if (thread == 0) {
                qs_queue_idle(p->queue); /* a task may take long */
            }
        }
    }
}

/* Columns and rows of a task. Columns first: B is then packed once. Only where there are too few of
 * them are rows cut too, and B packed once for each part. */
static void share_out(qs_panels *p, int threads)
{
    const qs_panels_kind *kind = p->kind;
    const int64_t wanted = threads == 1 ? 1 : (int64_t)threads * TASKS_PER_THREAD;
    const int64_t slivers = qs_ceil_div(p->n, kind->nr), panels = qs_panels_count(p);
    int64_t per_task = qs_min_i64(kind->task_slivers, slivers / wanted);
    per_task = per_task < 1 ? 1 : per_task;
    const int64_t col_tasks = qs_ceil_div(slivers, per_task);
    const int64_t parts =
        qs_min_i64(qs_ceil_div(wanted, col_tasks), qs_ceil_div(panels, kind->step_panels));
    p->task_cols = per_task * kind->nr;
    p->task_panels = qs_ceil_div(panels, parts);
    p->row_tasks = qs_ceil_div(panels, p->task_panels);
}

static qs_status multiply_rows(qs_panels *p)
{
    const qs_panels_kind *kind = p->kind;
    const int threads = qs_queue_threads(p->queue);
    share_out(p, threads);
    QS_TRY(qs_scratch(QS_SCRATCH_PACK_A, kind->left_count(p), &p->left));
    QS_TRY(qs_scratch(QS_SCRATCH_PACK_B, threads * kind->right_count(p, p->task_cols), &p->right));
    qs_parallel_for(p->queue, kind->left_tasks(p), p->m * p->k, pack_task, p);
    qs_parallel_for(p->queue, p->row_tasks * qs_ceil_div(p->n, p->task_cols),
                    p->m * p->n * p->k / kind->speed + p->n * p->k, multiply_task, p);
    return QS_OK;
}

static void zero(int64_t m, int64_t n, float *c, int64_t c_stride)
{
    for (int64_t i = 0; i < m; i++) {
        memset(c + i * c_stride, 0, (size_t)n * sizeof *c);
    }
}

/* Rows that are packed at once. */
static int64_t rows_at_once(const qs_panels_kind *kind, int64_t k)
{
    const int64_t step = kind->step_panels * kind->mr;
    const int64_t rows = PACKED_MAX / qs_ceil_div(k, kind->numbers_a_float) / step * step;
    return rows < step ? step : rows;
}

qs_status qs_panels_multiply(qs_queue *queue, const qs_panels_kind *kind, const void *ctx,
                             int64_t m, int64_t n, int64_t k, float *c, int64_t c_stride,
                             bool accumulate)
{
    if (m == 0 || n == 0) {
        return QS_OK;
    }
    if (k == 0) {
        if (!accumulate) {
            zero(m, n, c, c_stride);
        }
        return QS_OK;
    }
    qs_panels p = {.kind = kind,
                   .ctx = ctx,
                   .queue = queue,
                   .n = n,
                   .k = k,
                   .c_stride = c_stride,
                   .accumulate = accumulate};
    const int64_t block = rows_at_once(kind, k);
    for (p.i0 = 0; p.i0 < m; p.i0 += block) {
        p.m = qs_min_i64(block, m - p.i0);
        p.c = c + p.i0 * c_stride;
        QS_TRY(multiply_rows(&p));
    }
    return QS_OK;
}

int64_t qs_panels_left_most(int64_t rows, int64_t cols, int64_t mr, int64_t step_panels)
{
    const int64_t longer = rows > cols ? rows : cols;
    const int64_t least = step_panels * mr * longer, whole = rows * cols + mr * longer;
    return qs_min_i64(whole, least > PACKED_MAX ? least : PACKED_MAX);
}
