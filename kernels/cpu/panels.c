#include "kernels/cpu/panels.h"

#include <string.h>

#include "kernels/cpu/parallel.h"
#include "kernels/cpu/scratch.h"

enum {
    TASKS_PER_THREAD = 4,  /* wanted, so that a late thread does not hold up the others */
    PACKED_MAX = 16 << 20, /* floats of A that are packed at once; larger products go by blocks of
                              rows */
};

static void pack_task(void *ctx, int64_t index, int thread)
{
    (void)thread;
    const qs_panels *p = ctx;
    const int64_t step = p->kind->left_panels * p->kind->mr, steps = qs_ceil_div(p->m, step);
    const int64_t i = index % steps * step, k0 = index / steps * p->kind->left_depth;
    p->kind->pack_left(p, &(qs_panels_part){.i = i,
                                            .rows = qs_min_i64(step, p->m - i),
                                            .k0 = k0,
                                            .depth = qs_min_i64(p->kind->left_depth, p->k - k0)});
}

static void multiply_task(void *ctx, int64_t index, int thread)
{
    const qs_panels *p = ctx;
    const qs_panels_kind *kind = p->kind;
    const int64_t first = index % p->row_tasks * p->task_rows;
    const int64_t last = qs_min_i64(first + p->task_rows, p->m);
    const int64_t step = kind->step_panels * kind->mr;
    qs_panels_part part = {.j = index / p->row_tasks * p->task_cols};
    part.cols = qs_min_i64(p->task_cols, p->n - part.j);
    part.right = p->right + thread * (p->task_cols / kind->nr) * kind->sliver_floats;
    for (; part.k0 < p->k; part.k0 += kind->kc) {
        part.depth = qs_min_i64(kind->kc, p->k - part.k0);
        part.accumulate = p->accumulate || part.k0 > 0;
        kind->pack_right(p, &part);
        for (part.i = first; part.i < last; part.i += step) {
            part.rows = qs_min_i64(step, last - part.i);
            kind->multiply(p, &part);
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
    const int64_t slivers = qs_ceil_div(p->n, kind->nr), panels = qs_ceil_div(p->m, kind->mr);
    int64_t per_task = qs_min_i64(kind->task_slivers, slivers / wanted);
    per_task = per_task < 1 ? 1 : per_task;
    const int64_t col_tasks = qs_ceil_div(slivers, per_task);
    const int64_t parts =
        qs_min_i64(qs_ceil_div(wanted, col_tasks), qs_ceil_div(panels, kind->step_panels));
    p->task_cols = per_task * kind->nr;
    p->task_rows = qs_ceil_div(panels, parts) * kind->mr;
    p->row_tasks = qs_ceil_div(p->m, p->task_rows);
}

static qs_status multiply_rows(qs_panels *p)
{
    const qs_panels_kind *kind = p->kind;
    const int threads = qs_queue_threads(p->queue);
    share_out(p, threads);
    QS_TRY(qs_scratch(QS_SCRATCH_PACK_B, threads * (p->task_cols / kind->nr) * kind->sliver_floats,
                      &p->right));
    if (kind->pack_left != NULL) {
        QS_TRY(qs_scratch(QS_SCRATCH_PACK_A, qs_ceil_div(p->m, kind->mr) * kind->panel_floats,
                          &p->left));
        qs_parallel_for(p->queue,
                        qs_ceil_div(p->m, kind->left_panels * kind->mr) *
                            qs_ceil_div(p->k, kind->left_depth),
                        p->m * p->k, pack_task, p);
    }
    qs_parallel_for(p->queue, p->row_tasks * qs_ceil_div(p->n, p->task_cols),
                    p->m * p->n * p->k / kind->speed + p->n * p->k, multiply_task, p);
    return QS_OK;
}

qs_status qs_panels_multiply(qs_queue *queue, const qs_panels_kind *kind, const void *ctx,
                             int64_t m, int64_t n, int64_t k, float *c, int64_t c_stride,
                             bool accumulate)
{
    if (n == 0) {
        return QS_OK;
    }
    if (k == 0) {
        for (int64_t i = 0; !accumulate && i < m; i++) {
            memset(c + i * c_stride, 0, (size_t)n * sizeof *c);
        }
        return QS_OK;
    }
    const int64_t steps = PACKED_MAX / (kind->step_panels * kind->panel_floats);
    const int64_t block = kind->step_panels * kind->mr * (steps > 1 ? steps : 1);
    qs_panels p = {
        kind, ctx, queue, .n = n, .k = k, .c_stride = c_stride, .accumulate = accumulate};
    for (p.row0 = 0; p.row0 < m; p.row0 += block) {
        p.m = qs_min_i64(block, m - p.row0);
        p.c = c + p.row0 * c_stride;
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

float *qs_panels_left(const qs_panels *p, int64_t i)
{
    return p->left + i / p->kind->mr * p->kind->panel_floats;
}

void qs_panels_store(const qs_panels *p, int64_t i, int64_t j, const float *y, int64_t cols,
                     const float *factor, bool accumulate)
{
    const int64_t rows = qs_min_i64(p->kind->mr, p->m - i), here = qs_min_i64(cols, p->n - j);
    for (int64_t r = 0; r < rows; r++, y += cols) {
        const float by = factor != NULL ? factor[r] : 1.0F;
        float *c = p->c + (i + r) * p->c_stride + j;
        if (accumulate) {
            for (int64_t col = 0; col < here; col++) {
                const float sum = y[col] * by; /* two roundings */
                c[col] += sum;
            }
        } else {
            for (int64_t col = 0; col < here; col++) {
                c[col] = y[col] * by;
            }
        }
    }
}
