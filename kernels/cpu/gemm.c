#include "kernels/cpu/gemm.h"

#include <string.h>

#include "kernels/cpu/parallel.h"
#include "kernels/cpu/scratch.h"

enum {
    PANELS_PER_BLOCK = 12, /* rows of A that are multiplied in one go: 168 KiB of the L2 cache */
    SLIVERS_PER_TASK = 8,  /* most columns of a task: 256 KiB of the L2 cache */
    TASKS_PER_THREAD = 4,  /* wanted, so that a late thread does not hold up the others */
    PACKED_MAX =
        16 << 20, /* floats of A that are packed at once; larger products go by blocks of rows */
};

/* One block of rows of C. A task owns some of its columns, and of its rows where columns are few.
 */
typedef struct {
    qs_queue *queue;
    const qs_isa *isa;
    const qs_operand *a, *b;
    int64_t i0, m, n, k;
    int64_t task_rows, task_cols, row_tasks;
    float *packed_a; /* [blocks of k][panels][depth][mr] */
    float *packed_b; /* [threads][task_cols * QS_GEMM_KC] */
    float *c;        /* row i0 */
    int64_t c_stride;
    bool accumulate;
} product;

/* Rows [row, row + rows) of a stored matrix, elements [first, first + count), to dst[e * dst_stride
 * + r]. */
static void pack_across(const qs_isa *isa, const qs_operand *op, int64_t row, int rows,
                        int64_t first, int64_t count, float *dst, int64_t dst_stride, int lanes)
{
    float loaded[16 * QS_GEMM_KC];
    const float *src;
    int64_t stride;
    if (op->load != NULL) {
        for (int r = 0; r < rows; r++) {
            op->load(op, row + r, first, count, loaded + r * QS_GEMM_KC);
        }
        src = loaded;
        stride = QS_GEMM_KC;
    } else {
        src = op->data + row * op->stride + first;
        stride = op->stride;
    }
    isa->transpose(src, stride, rows, count, dst, dst_stride, lanes);
}

/* Elements [first, first + count) of one stored row to consecutive groups of `width`,
 * `group_stride` apart; the last group is filled up with zeros. */
static void pack_along(const qs_operand *op, int64_t row, int64_t first, int64_t count, float *dst,
                       int width, int64_t group_stride)
{
    enum { SEGMENT = SLIVERS_PER_TASK * QS_GEMM_NR_MAX };
    float loaded[SEGMENT];
    const float *src = loaded;
    if (op->load != NULL) {
        op->load(op, row, first, count, loaded);
    } else {
        src = op->data + row * op->stride + first;
    }
    for (; count > 0; count -= width, src += width, dst += group_stride) {
        /* Constant sizes for the widths of AVX-512: no call for a few bytes. */
        if (count >= width && width == QS_GEMM_NR_MAX) {
            memcpy(dst, src, QS_GEMM_NR_MAX * sizeof *dst);
        } else if (count >= width && width == QS_GEMM_MR_MAX) {
            memcpy(dst, src, QS_GEMM_MR_MAX * sizeof *dst);
        } else if (count >= width) {
            memcpy(dst, src, (size_t)width * sizeof *dst);
        } else {
            memset(dst, 0, (size_t)width * sizeof *dst);
            memcpy(dst, src, (size_t)count * sizeof *dst);
        }
    }
}

/* Rows [i0, i0 + rows) of A, at most PANELS_PER_BLOCK panels. */
static void pack_a(const qs_isa *isa, const qs_operand *a, int64_t i0, int64_t rows, int64_t k0,
                   int64_t depth, float *dst)
{
    int mr = isa->mr;
    int64_t panel_stride = mr * depth;
    if (a->transposed) {
        for (int64_t k = 0; k < depth; k++) {
            pack_along(a, k0 + k, i0, rows, dst + k * mr, mr, panel_stride);
        }
    } else {
        for (int64_t i = 0; i < rows; i += mr) {
            int here = (int)qs_min_i64(mr, rows - i);
            pack_across(isa, a, i0 + i, here, k0, depth, dst + i / mr * panel_stride, mr, mr);
        }
    }
    if (a->scale != 0.0F && a->scale != 1.0F) {
        int64_t count = qs_ceil_div(rows, mr) * panel_stride;
        for (int64_t i = 0; i < count; i++) {
            dst[i] *= a->scale;
        }
    }
}

/* Columns [j0, j0 + cols) of B, at most SLIVERS_PER_TASK slivers. */
static void pack_b(const qs_isa *isa, const qs_operand *b, int64_t j0, int64_t cols, int64_t k0,
                   int64_t depth, float *dst)
{
    int nr = isa->nr;
    int64_t sliver_stride = nr * depth;
    if (!b->transposed) {
        for (int64_t k = 0; k < depth; k++) {
            pack_along(b, k0 + k, j0, cols, dst + k * nr, nr, sliver_stride);
        }
        return;
    }
    for (int64_t j = 0; j < cols; j += nr) {
        for (int at = 0; at < nr; at += 16) {
            int lanes = nr - at < 16 ? nr - at : 16;
            int64_t there = cols - j - at;
            int here = there < 0 ? 0 : (int)qs_min_i64(lanes, there);
            pack_across(isa, b, j0 + j + at, here, k0, depth, dst + j / nr * sliver_stride + at, nr,
                        lanes);
        }
    }
}

/* Panels times slivers. */
static void multiply(const qs_isa *isa, int64_t rows, int64_t cols, int64_t depth,
                     const float *packed_a, const float *packed_b, float *c, int64_t c_stride,
                     bool accumulate)
{
    for (int64_t j = 0; j < cols; j += isa->nr) {
        int width = (int)qs_min_i64(isa->nr, cols - j);
        for (int64_t i = 0; i < rows; i += isa->mr) {
            int height = (int)qs_min_i64(isa->mr, rows - i);
            isa->tile(height, width, depth, packed_a + i * depth, packed_b + j * depth,
                      c + i * c_stride + j, c_stride, accumulate);
        }
    }
}

/* Where a block of k starts in packed A. */
static float *packed_block(const product *p, int64_t k0)
{
    return p->packed_a + qs_ceil_div(p->m, p->isa->mr) * p->isa->mr * k0;
}

static void pack_task(void *ctx, int64_t index, int thread)
{
    (void)thread;
    const product *p = ctx;
    int64_t step = (int64_t)PANELS_PER_BLOCK * p->isa->mr;
    int64_t blocks = qs_ceil_div(p->m, step);
    int64_t i = index % blocks * step, k0 = index / blocks * QS_GEMM_KC;
    int64_t depth = qs_min_i64(QS_GEMM_KC, p->k - k0);
    pack_a(p->isa, p->a, p->i0 + i, qs_min_i64(step, p->m - i), k0, depth,
           packed_block(p, k0) + i * depth);
}

static void multiply_task(void *ctx, int64_t index, int thread)
{
    const product *p = ctx;
    int64_t step = (int64_t)PANELS_PER_BLOCK * p->isa->mr;
    int64_t first = index % p->row_tasks * p->task_rows, j0 = index / p->row_tasks * p->task_cols;
    int64_t last = qs_min_i64(first + p->task_rows, p->m);
    int64_t cols = qs_min_i64(p->task_cols, p->n - j0);
    float *packed_b = p->packed_b + thread * p->task_cols * QS_GEMM_KC;
    for (int64_t k0 = 0; k0 < p->k; k0 += QS_GEMM_KC) {
        int64_t depth = qs_min_i64(QS_GEMM_KC, p->k - k0);
        pack_b(p->isa, p->b, j0, cols, k0, depth, packed_b);
        for (int64_t i = first; i < last; i += step) {
            multiply(p->isa, qs_min_i64(step, last - i), cols, depth,
                     packed_block(p, k0) + i * depth, packed_b, p->c + i * p->c_stride + j0,
                     p->c_stride, p->accumulate || k0 > 0);
            if (thread == 0) {
                qs_queue_idle(p->queue); /* a task may take long */
            }
        }
    }
}

static int64_t round_up(int64_t value, int64_t step)
{
    return qs_ceil_div(value, step) * step;
}

static void zero(int64_t m, int64_t n, float *c, int64_t c_stride)
{
    for (int64_t i = 0; i < m; i++) {
        memset(c + i * c_stride, 0, (size_t)n * sizeof *c);
    }
}

/* Columns and rows of a task. Columns first: B is then packed once. Only where there are too few of
 * them are rows cut too, and B packed once for each part. */
static void share_out(product *p, int threads)
{
    int64_t wanted = threads == 1 ? 1 : (int64_t)threads * TASKS_PER_THREAD;
    int64_t slivers = qs_ceil_div(p->n, p->isa->nr);
    int64_t per_task = qs_min_i64(SLIVERS_PER_TASK, slivers / wanted);
    per_task = per_task < 1 ? 1 : per_task;
    p->task_cols = per_task * p->isa->nr;
    int64_t col_tasks = qs_ceil_div(slivers, per_task);
    int64_t step = (int64_t)PANELS_PER_BLOCK * p->isa->mr;
    int64_t parts = qs_min_i64(qs_ceil_div(wanted, col_tasks), qs_ceil_div(p->m, step));
    p->task_rows = round_up(qs_ceil_div(p->m, parts), p->isa->mr);
    p->row_tasks = qs_ceil_div(p->m, p->task_rows);
}

static qs_status multiply_rows(product *p)
{
    int threads = qs_queue_threads(p->queue);
    share_out(p, threads);
    int64_t rows = round_up(p->m, p->isa->mr);
    QS_TRY(qs_scratch(QS_SCRATCH_PACK_A, rows * p->k, &p->packed_a));
    QS_TRY(qs_scratch(QS_SCRATCH_PACK_B, threads * p->task_cols * QS_GEMM_KC, &p->packed_b));
    int64_t packs =
        qs_ceil_div(p->m, (int64_t)PANELS_PER_BLOCK * p->isa->mr) * qs_ceil_div(p->k, QS_GEMM_KC);
    qs_parallel_for(p->queue, packs, p->m * p->k, pack_task, p);
    qs_parallel_for(p->queue, p->row_tasks * qs_ceil_div(p->n, p->task_cols),
                    p->m * p->n * p->k / 32 + p->n * p->k, multiply_task, p);
    return QS_OK;
}

qs_status qs_gemm(qs_queue *queue, int64_t m, int64_t n, int64_t k, const qs_operand *a,
                  const qs_operand *b, float *c, int64_t c_stride, bool accumulate)
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
    product p = {.queue = queue,
                 .isa = qs_isa_get(),
                 .a = a,
                 .b = b,
                 .n = n,
                 .k = k,
                 .c_stride = c_stride,
                 .accumulate = accumulate};
    int64_t step = (int64_t)PANELS_PER_BLOCK * p.isa->mr;
    int64_t block = PACKED_MAX / k / step * step;
    block = block < step ? step : block;
    for (p.i0 = 0; p.i0 < m; p.i0 += block) {
        p.m = qs_min_i64(block, m - p.i0);
        p.c = c + p.i0 * c_stride;
        QS_TRY(multiply_rows(&p));
    }
    return QS_OK;
}

int64_t qs_gemm_scratch_count(int threads, int64_t rows, int64_t cols)
{
    int64_t longer = rows > cols ? rows : cols;
    int64_t least = (int64_t)PANELS_PER_BLOCK * QS_GEMM_MR_MAX * longer;
    int64_t whole = rows * cols + QS_GEMM_MR_MAX * longer;
    int64_t packed_a = qs_min_i64(whole, least > PACKED_MAX ? least : PACKED_MAX);
    int64_t packed_b = (int64_t)threads * SLIVERS_PER_TASK * QS_GEMM_NR_MAX * QS_GEMM_KC;
    return packed_a + packed_b;
}

void qs_pack_left(const qs_isa *isa, const qs_operand *a, int64_t m, int64_t k, float *packed)
{
    int64_t step = (int64_t)PANELS_PER_BLOCK * isa->mr;
    int64_t rows = round_up(m, isa->mr);
    for (int64_t k0 = 0; k0 < k; k0 += QS_GEMM_KC) {
        int64_t depth = qs_min_i64(QS_GEMM_KC, k - k0);
        for (int64_t i = 0; i < m; i += step) {
            pack_a(isa, a, i, qs_min_i64(step, m - i), k0, depth, packed + rows * k0 + i * depth);
        }
    }
}

void qs_pack_right(const qs_isa *isa, const qs_operand *b, int64_t n, int64_t k, float *packed)
{
    int64_t step = (int64_t)SLIVERS_PER_TASK * isa->nr;
    int64_t cols = round_up(n, isa->nr);
    for (int64_t k0 = 0; k0 < k; k0 += QS_GEMM_KC) {
        int64_t depth = qs_min_i64(QS_GEMM_KC, k - k0);
        for (int64_t j = 0; j < n; j += step) {
            pack_b(isa, b, j, qs_min_i64(step, n - j), k0, depth, packed + cols * k0 + j * depth);
        }
    }
}

void qs_multiply_packed(const qs_isa *isa, int64_t m, int64_t n, int64_t k, const float *left,
                        const float *right, float *c, int64_t c_stride, bool accumulate)
{
    int64_t rows = round_up(m, isa->mr), cols = round_up(n, isa->nr);
    for (int64_t k0 = 0; k0 < k; k0 += QS_GEMM_KC) {
        multiply(isa, m, n, qs_min_i64(QS_GEMM_KC, k - k0), left + rows * k0, right + cols * k0, c,
                 c_stride, accumulate || k0 > 0);
    }
}
