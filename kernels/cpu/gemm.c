#include "kernels/cpu/gemm.h"

#include <assert.h>
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

/* What operands are packed as: words of one fp32 number, or of two bf16 (pairs.h). Words are moved,
 * never computed with, so both are kept as floats. */
typedef struct {
    int per_word; /* numbers along k */
    int mr, nr;
    const qs_isa *isa;
    const qs_pairs *pairs; /* NULL: fp32 */
} format;

/* One block of rows of C. A task owns some of its columns, and of its rows where columns are few.
 */
typedef struct {
    qs_queue *queue;
    format f;
    const qs_operand *a, *b;
    int64_t i0, m, n, k;
    int64_t task_rows, task_cols, row_tasks;
    float *packed_a; /* [blocks of k][panels][words of depth][mr] */
    float *packed_b; /* [threads][task_cols * words of QS_GEMM_KC] */
    float *c;        /* row i0 */
    int64_t c_stride;
    bool accumulate;
} product;

/* Words that `count` numbers along k take. */
static int64_t words(const format *f, int64_t count)
{
    return qs_ceil_div(count, f->per_word);
}

static uint32_t *pairs_in(float *words)
{
    return (uint32_t *)(void *)words;
}

/* Elements [first, first + count) of a stored row; `space` holds what is produced on demand. */
static const float *stored(const qs_operand *op, int64_t row, int64_t first, int64_t count,
                           float *space)
{
    if (op->load == NULL) {
        return op->data + row * op->stride + first;
    }
    op->load(op, row, first, count, space);
    return space;
}

/* Likewise as pairs along the row. */
static void stored_pairs(const qs_pairs *pairs, const qs_operand *op, int64_t row, int64_t first,
                         int64_t count, uint32_t *out)
{
    float space[QS_GEMM_KC];
    if (op->load_pairs == NULL || !op->load_pairs(op, pairs, row, first, count, out)) {
        pairs->round(stored(op, row, first, count, space), count, out);
    }
}

/* Rows [row, row + rows) of a stored matrix that run along k, elements [first, first + count), to
 * dst[e * dst_stride + r], e counting words. */
static void pack_across(const format *f, const qs_operand *op, int64_t row, int rows, int64_t first,
                        int64_t count, float *dst, int64_t dst_stride, int lanes)
{
    float space[16 * QS_GEMM_KC];
    const float *src = space;
    int64_t stride = QS_GEMM_KC;
    if (f->pairs == NULL && op->load == NULL) {
        src = op->data + row * op->stride + first;
        stride = op->stride;
    } else {
        for (int r = 0; r < rows; r++) {
            if (f->pairs != NULL) {
                stored_pairs(f->pairs, op, row + r, first, count, pairs_in(space + r * stride));
            } else {
                op->load(op, row + r, first, count, space + r * stride);
            }
        }
    }
    f->isa->transpose(src, stride, rows, words(f, count), dst, dst_stride, lanes);
}

enum { SEGMENT = SLIVERS_PER_TASK * QS_GEMM_NR_MAX }; /* most elements that go across k at once */

/* Elements [first, first + count) of the stored rows of word `word` of k, of which there are `k`;
 * `space` is for SEGMENT words. */
static const float *words_across(const format *f, const qs_operand *op, int64_t word, int64_t k,
                                 int64_t first, int64_t count, float *space)
{
    if (f->pairs == NULL) {
        return stored(op, word, first, count, space);
    }
    uint32_t above[SEGMENT / 2], below[SEGMENT / 2];
    stored_pairs(f->pairs, op, 2 * word, first, count, above);
    if (2 * word + 1 < k) {
        stored_pairs(f->pairs, op, 2 * word + 1, first, count, below);
    } else {
        memset(below, 0, sizeof below);
    }
    f->pairs->zip(above, below, count, pairs_in(space));
    return space;
}

/* `count` words to consecutive groups of `width`, `group_stride` apart; the last group is filled up
 * with zeros. */
static void spread(const float *src, int64_t count, float *dst, int width, int64_t group_stride)
{
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

/* Columns [first, first + count) of an operand whose stored rows run across k: numbers [k0, k0 +
 * depth) of k, in groups of `width`. */
static void pack_along(const product *p, const qs_operand *op, int64_t first, int64_t count,
                       int64_t k0, int64_t depth, float *dst, int width)
{
    const format *f = &p->f;
    const int64_t there = words(f, depth);
    float space[SEGMENT];
    for (int64_t word = 0; word < there; word++) {
        const float *src = words_across(f, op, k0 / f->per_word + word, p->k, first, count, space);
        spread(src, count, dst + word * width, width, width * there);
    }
}

/* Rows [i0, i0 + rows) of A, at most PANELS_PER_BLOCK panels. */
static void pack_a(const product *p, int64_t i0, int64_t rows, int64_t k0, int64_t depth,
                   float *dst)
{
    const qs_operand *a = p->a;
    const int mr = p->f.mr;
    const int64_t panel_stride = mr * words(&p->f, depth);
    if (a->transposed) {
        pack_along(p, a, i0, rows, k0, depth, dst, mr);
    } else {
        for (int64_t i = 0; i < rows; i += mr) {
            int here = (int)qs_min_i64(mr, rows - i);
            pack_across(&p->f, a, i0 + i, here, k0, depth, dst + i / mr * panel_stride, mr, mr);
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
static void pack_b(const product *p, int64_t j0, int64_t cols, int64_t k0, int64_t depth,
                   float *dst)
{
    const int nr = p->f.nr;
    const int64_t sliver_stride = nr * words(&p->f, depth);
    if (!p->b->transposed) {
        pack_along(p, p->b, j0, cols, k0, depth, dst, nr);
        return;
    }
    for (int64_t j = 0; j < cols; j += nr) {
        for (int at = 0; at < nr; at += 16) {
            int lanes = nr - at < 16 ? nr - at : 16;
            int64_t there = cols - j - at;
            int here = there < 0 ? 0 : (int)qs_min_i64(lanes, there);
            pack_across(&p->f, p->b, j0 + j + at, here, k0, depth,
                        dst + j / nr * sliver_stride + at, nr, lanes);
        }
    }
}

/* Panels times slivers of `depth` words. */
static void multiply(const format *f, int64_t rows, int64_t cols, int64_t depth,
                     const float *packed_a, const float *packed_b, float *c, int64_t c_stride,
                     bool accumulate)
{
    const unsigned mode = f->pairs != NULL ? f->pairs->begin() : 0;
    for (int64_t j = 0; j < cols; j += f->nr) {
        int width = (int)qs_min_i64(f->nr, cols - j);
        for (int64_t i = 0; i < rows; i += f->mr) {
            int height = (int)qs_min_i64(f->mr, rows - i);
            const float *left = packed_a + i * depth, *right = packed_b + j * depth;
            float *to = c + i * c_stride + j;
            if (f->pairs == NULL) {
                f->isa->tile(height, width, depth, left, right, to, c_stride, accumulate);
            } else {
                f->pairs->tile(height, width, depth, (const uint32_t *)(const void *)left,
                               (const uint32_t *)(const void *)right, to, c_stride, accumulate);
            }
        }
    }
    if (f->pairs != NULL) {
        f->pairs->end(mode);
    }
}

/* Where a block of k starts in packed A. */
static float *packed_block(const product *p, int64_t k0)
{
    return p->packed_a + qs_ceil_div(p->m, p->f.mr) * p->f.mr * words(&p->f, k0);
}

static void pack_task(void *ctx, int64_t index, int thread)
{
    (void)thread;
    const product *p = ctx;
    int64_t step = (int64_t)PANELS_PER_BLOCK * p->f.mr;
    int64_t blocks = qs_ceil_div(p->m, step);
    int64_t i = index % blocks * step, k0 = index / blocks * QS_GEMM_KC;
    int64_t depth = qs_min_i64(QS_GEMM_KC, p->k - k0);
    pack_a(p, p->i0 + i, qs_min_i64(step, p->m - i), k0, depth,
           packed_block(p, k0) + i * words(&p->f, depth));
}

static void multiply_task(void *ctx, int64_t index, int thread)
{
    const product *p = ctx;
    int64_t step = (int64_t)PANELS_PER_BLOCK * p->f.mr;
    int64_t first = index % p->row_tasks * p->task_rows, j0 = index / p->row_tasks * p->task_cols;
    int64_t last = qs_min_i64(first + p->task_rows, p->m);
    int64_t cols = qs_min_i64(p->task_cols, p->n - j0);
    float *packed_b = p->packed_b + thread * p->task_cols * words(&p->f, QS_GEMM_KC);
    for (int64_t k0 = 0; k0 < p->k; k0 += QS_GEMM_KC) {
        int64_t depth = qs_min_i64(QS_GEMM_KC, p->k - k0), deep = words(&p->f, depth);
        pack_b(p, j0, cols, k0, depth, packed_b);
        for (int64_t i = first; i < last; i += step) {
            multiply(&p->f, qs_min_i64(step, last - i), cols, deep, packed_block(p, k0) + i * deep,
                     packed_b, p->c + i * p->c_stride + j0, p->c_stride, p->accumulate || k0 > 0);
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
    int64_t slivers = qs_ceil_div(p->n, p->f.nr);
    int64_t per_task = qs_min_i64(SLIVERS_PER_TASK, slivers / wanted);
    per_task = per_task < 1 ? 1 : per_task;
    p->task_cols = per_task * p->f.nr;
    int64_t col_tasks = qs_ceil_div(slivers, per_task);
    int64_t step = (int64_t)PANELS_PER_BLOCK * p->f.mr;
    int64_t parts = qs_min_i64(qs_ceil_div(wanted, col_tasks), qs_ceil_div(p->m, step));
    p->task_rows = round_up(qs_ceil_div(p->m, parts), p->f.mr);
    p->row_tasks = qs_ceil_div(p->m, p->task_rows);
}

static qs_status multiply_rows(product *p)
{
    int threads = qs_queue_threads(p->queue);
    share_out(p, threads);
    int64_t rows = round_up(p->m, p->f.mr);
    QS_TRY(qs_scratch(QS_SCRATCH_PACK_A, rows * words(&p->f, p->k), &p->packed_a));
    QS_TRY(qs_scratch(QS_SCRATCH_PACK_B, threads * p->task_cols * words(&p->f, QS_GEMM_KC),
                      &p->packed_b));
    int64_t packs =
        qs_ceil_div(p->m, (int64_t)PANELS_PER_BLOCK * p->f.mr) * qs_ceil_div(p->k, QS_GEMM_KC);
    qs_parallel_for(p->queue, packs, p->m * p->k, pack_task, p);
    qs_parallel_for(p->queue, p->row_tasks * qs_ceil_div(p->n, p->task_cols),
                    p->m * p->n * p->k / 32 + p->n * p->k, multiply_task, p);
    return QS_OK;
}

static qs_status multiply_by(const format *f, qs_queue *queue, int64_t m, int64_t n, int64_t k,
                             const qs_operand *a, const qs_operand *b, float *c, int64_t c_stride,
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
    product p = {.queue = queue,
                 .f = *f,
                 .a = a,
                 .b = b,
                 .n = n,
                 .k = k,
                 .c_stride = c_stride,
                 .accumulate = accumulate};
    int64_t step = (int64_t)PANELS_PER_BLOCK * f->mr;
    int64_t block = PACKED_MAX / words(f, k) / step * step;
    block = block < step ? step : block;
    for (p.i0 = 0; p.i0 < m; p.i0 += block) {
        p.m = qs_min_i64(block, m - p.i0);
        p.c = c + p.i0 * c_stride;
        QS_TRY(multiply_rows(&p));
    }
    return QS_OK;
}

qs_status qs_gemm(qs_queue *queue, int64_t m, int64_t n, int64_t k, const qs_operand *a,
                  const qs_operand *b, float *c, int64_t c_stride, bool accumulate)
{
    const qs_isa *isa = qs_isa_get();
    const format fp32 = {.per_word = 1, .mr = isa->mr, .nr = isa->nr, .isa = isa};
    return multiply_by(&fp32, queue, m, n, k, a, b, c, c_stride, accumulate);
}

qs_status qs_gemm_bf16(qs_queue *queue, int64_t m, int64_t n, int64_t k, const qs_operand *a,
                       const qs_operand *b, float *c, int64_t c_stride, bool accumulate)
{
    const qs_pairs *pairs = qs_pairs_get();
    const format bf16 = {
        .per_word = 2, .mr = pairs->mr, .nr = pairs->nr, .isa = qs_isa_get(), .pairs = pairs};
    assert(a->scale == 0.0F || a->scale == 1.0F);
    return multiply_by(&bf16, queue, m, n, k, a, b, c, c_stride, accumulate);
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
