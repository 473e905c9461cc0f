#include "kernels/cpu/gemm.h"

#include <string.h>

#include "kernels/cpu/parallel.h"
#include "kernels/cpu/scratch.h"

enum {
    PANELS_PER_TASK = 12, /* rows of a tile of C: its part of A (168 KiB) stays in the L2 cache */
    SLIVERS_PER_TASK = 8, /* columns of a tile of C */
    COLUMNS = 1024,       /* columns of C per packed block of B and thread, ... */
    COLUMNS_MAX = 8192,   /* ... and in all */
};

/* One pass: the block of k, and the block of columns. */
typedef struct {
    const qs_isa *isa;
    const qs_operand *a, *b;
    int64_t m, k0, depth;
    int64_t j0, cols;
    float *pack_a, *pack_b;
    float *c;
    int64_t c_stride;
    bool accumulate;
    int64_t a_tasks, row_tasks, col_tasks;
} pass;

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
        if (count >= width) {
            memcpy(dst, src, (size_t)width * sizeof *dst);
        } else {
            memset(dst, 0, (size_t)width * sizeof *dst);
            memcpy(dst, src, (size_t)count * sizeof *dst);
        }
    }
}

/* Rows [i0, i0 + rows) of A, at most PANELS_PER_TASK panels. */
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

static void pack_task(void *ctx, int64_t index, int thread)
{
    (void)thread;
    const pass *p = ctx;
    if (index < p->a_tasks) {
        int64_t step = (int64_t)PANELS_PER_TASK * p->isa->mr;
        int64_t i = index * step;
        pack_a(p->isa, p->a, i, qs_min_i64(step, p->m - i), p->k0, p->depth,
               p->pack_a + i * p->depth);
    } else {
        int64_t step = (int64_t)SLIVERS_PER_TASK * p->isa->nr;
        int64_t j = (index - p->a_tasks) * step;
        pack_b(p->isa, p->b, p->j0 + j, qs_min_i64(step, p->cols - j), p->k0, p->depth,
               p->pack_b + j * p->depth);
    }
}

static void multiply_task(void *ctx, int64_t index, int thread)
{
    (void)thread;
    const pass *p = ctx;
    int64_t row_step = (int64_t)PANELS_PER_TASK * p->isa->mr;
    int64_t col_step = (int64_t)SLIVERS_PER_TASK * p->isa->nr;
    int64_t i = index % p->row_tasks * row_step, j = index / p->row_tasks * col_step;
    multiply(p->isa, qs_min_i64(row_step, p->m - i), qs_min_i64(col_step, p->cols - j), p->depth,
             p->pack_a + i * p->depth, p->pack_b + j * p->depth, p->c + i * p->c_stride + p->j0 + j,
             p->c_stride, p->accumulate);
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

qs_status qs_gemm(qs_queue *queue, int64_t m, int64_t n, int64_t k, const qs_operand *a,
                  const qs_operand *b, float *c, int64_t c_stride, bool accumulate)
{
    const qs_isa *isa = qs_isa_get();
    if (m == 0 || n == 0) {
        return QS_OK;
    }
    if (k == 0) {
        if (!accumulate) {
            zero(m, n, c, c_stride);
        }
        return QS_OK;
    }
    int64_t row_step = (int64_t)PANELS_PER_TASK * isa->mr;
    int64_t col_step = (int64_t)SLIVERS_PER_TASK * isa->nr;
    int64_t block = qs_min_i64((int64_t)COLUMNS * qs_queue_threads(queue), COLUMNS_MAX);
    block = qs_min_i64(round_up(n, col_step), round_up(block, col_step));
    int64_t deepest = qs_min_i64(k, QS_GEMM_KC);
    pass p = {.isa = isa, .a = a, .b = b, .m = m, .c = c, .c_stride = c_stride};
    p.row_tasks = qs_ceil_div(m, row_step);
    p.a_tasks = p.row_tasks;
    QS_TRY(qs_scratch(QS_SCRATCH_PACK_A, round_up(m, isa->mr) * deepest, &p.pack_a));
    QS_TRY(qs_scratch(QS_SCRATCH_PACK_B, block * deepest, &p.pack_b));
    for (p.j0 = 0; p.j0 < n; p.j0 += block) {
        p.cols = qs_min_i64(block, n - p.j0);
        p.col_tasks = qs_ceil_div(p.cols, col_step);
        for (p.k0 = 0; p.k0 < k; p.k0 += QS_GEMM_KC) {
            p.depth = qs_min_i64(QS_GEMM_KC, k - p.k0);
            p.accumulate = accumulate || p.k0 > 0;
            qs_parallel_for(queue, p.a_tasks + p.col_tasks, (m + p.cols) * p.depth, pack_task, &p);
            qs_parallel_for(queue, p.row_tasks * p.col_tasks, m * p.cols * p.depth / 32,
                            multiply_task, &p);
        }
    }
    return QS_OK;
}

int64_t qs_gemm_small_scratch(int64_t m, int64_t n)
{
    return (m + QS_GEMM_MR_MAX + n + QS_GEMM_NR_MAX) * QS_GEMM_KC;
}

void qs_gemm_small(const qs_isa *isa, int64_t m, int64_t n, int64_t k, const qs_operand *a,
                   const qs_operand *b, float *c, int64_t c_stride, bool accumulate, float *scratch)
{
    float *packed_a = scratch, *packed_b = scratch + (m + QS_GEMM_MR_MAX) * QS_GEMM_KC;
    int64_t row_step = (int64_t)PANELS_PER_TASK * isa->mr;
    int64_t col_step = (int64_t)SLIVERS_PER_TASK * isa->nr;
    if (k == 0 && !accumulate) {
        zero(m, n, c, c_stride);
    }
    for (int64_t k0 = 0; k0 < k; k0 += QS_GEMM_KC) {
        int64_t depth = qs_min_i64(QS_GEMM_KC, k - k0);
        for (int64_t i = 0; i < m; i += row_step) {
            pack_a(isa, a, i, qs_min_i64(row_step, m - i), k0, depth, packed_a + i * depth);
        }
        for (int64_t j = 0; j < n; j += col_step) {
            pack_b(isa, b, j, qs_min_i64(col_step, n - j), k0, depth, packed_b + j * depth);
        }
        multiply(isa, m, n, depth, packed_a, packed_b, c, c_stride, accumulate || k0 > 0);
    }
}
