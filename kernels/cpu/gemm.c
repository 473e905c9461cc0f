#include "kernels/cpu/gemm.h"

#include <assert.h>
#include <string.h>

#include "kernels/cpu/panels.h"
#include "kernels/cpu/parallel.h"

enum {
    STEP_PANELS = 12,     /* rows of A that are multiplied in one go: 168 KiB of the L2 cache */
    SLIVERS_PER_TASK = 8, /* most columns of a task: 256 KiB of the L2 cache */
};

/* What operands are packed as: words of one fp32 number, or of two bf16 (pairs.h). Words are moved,
 * never computed with, so both are kept as floats. */
typedef struct {
    int per_word; /* numbers along k */
    int mr, nr;
    const qs_isa *isa;
    const qs_pairs *pairs; /* NULL: fp32 */
} format;

/* Packed A is [blocks of k][panels][words of depth][mr], packed B [slivers][words of depth][nr]. */
typedef struct {
    format f;
    const qs_operand *a, *b;
} operands;

/* Words that `count` numbers along k take. */
static int64_t words(const format *f, int64_t count)
{
    return qs_ceil_div(count, f->per_word);
}

static uint32_t *pairs_in(float *words)
{
    return (uint32_t *)(void *)words;
}

/* Elements [first, first + count) of a stored row as pairs along it. */
static void stored_pairs(const qs_pairs *pairs, const qs_operand *op, int64_t row, int64_t first,
                         int64_t count, uint32_t *out)
{
    float space[QS_GEMM_KC];
    if (op->load_pairs == NULL || !op->load_pairs(op, pairs, row, first, count, out)) {
        pairs->round(qs_operand_row(op, row, first, count, space), count, out);
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
        return qs_operand_row(op, word, first, count, space);
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
 * depth) of the k, in groups of `width`. */
static void pack_along(const format *f, const qs_operand *op, int64_t k, int64_t first,
                       int64_t count, int64_t k0, int64_t depth, float *dst, int width)
{
    const int64_t there = words(f, depth);
    float space[SEGMENT];
    for (int64_t word = 0; word < there; word++) {
        const float *src = words_across(f, op, k0 / f->per_word + word, k, first, count, space);
        spread(src, count, dst + word * width, width, width * there);
    }
}

static int64_t round_up(int64_t value, int64_t step)
{
    return qs_ceil_div(value, step) * step;
}

static int64_t left_count(const qs_panels *p)
{
    const operands *o = p->ctx;
    return round_up(p->m, o->f.mr) * words(&o->f, p->k);
}

static int64_t right_count(const qs_panels *p, int64_t cols)
{
    const operands *o = p->ctx;
    return cols * words(&o->f, QS_GEMM_KC);
}

/* Where row i, of a panel, starts in packed A with its part of a block of k. */
static float *left_at(const qs_panels *p, int64_t i, int64_t k0, int64_t depth)
{
    const format *f = &((const operands *)p->ctx)->f;
    return p->left + round_up(p->m, f->mr) * words(f, k0) + i * words(f, depth);
}

/* The panels of a step with their part of a block of k make a task. */
static int64_t left_steps(const qs_panels *p)
{
    return qs_ceil_div(p->m, p->kind->step_panels * p->kind->mr);
}

static int64_t left_tasks(const qs_panels *p)
{
    return left_steps(p) * qs_ceil_div(p->k, QS_GEMM_KC);
}

static void pack_left(const qs_panels *p, int64_t task)
{
    const operands *o = p->ctx;
    const qs_operand *a = o->a;
    const int64_t step = p->kind->step_panels * p->kind->mr, steps = left_steps(p);
    const int64_t i0 = task % steps * step, rows = qs_min_i64(step, p->m - i0);
    const int64_t k0 = task / steps * QS_GEMM_KC, depth = qs_min_i64(QS_GEMM_KC, p->k - k0);
    const int64_t panel_stride = o->f.mr * words(&o->f, depth);
    float *dst = left_at(p, i0, k0, depth);
    if (a->transposed) {
        pack_along(&o->f, a, p->k, p->i0 + i0, rows, k0, depth, dst, o->f.mr);
    } else {
        for (int64_t i = 0; i < rows; i += o->f.mr) {
            int here = (int)qs_min_i64(o->f.mr, rows - i);
            pack_across(&o->f, a, p->i0 + i0 + i, here, k0, depth, dst + i / o->f.mr * panel_stride,
                        o->f.mr, o->f.mr);
        }
    }
    if (a->scale != 0.0F && a->scale != 1.0F) {
        int64_t count = qs_ceil_div(rows, o->f.mr) * panel_stride;
        for (int64_t i = 0; i < count; i++) {
            dst[i] *= a->scale;
        }
    }
}

static void pack_right(const qs_panels *p, int64_t j0, int64_t cols, int64_t k0, int64_t depth,
                       float *dst)
{
    const operands *o = p->ctx;
    const int nr = o->f.nr;
    const int64_t sliver_stride = nr * words(&o->f, depth);
    if (!o->b->transposed) {
        pack_along(&o->f, o->b, p->k, j0, cols, k0, depth, dst, nr);
        return;
    }
    for (int64_t j = 0; j < cols; j += nr) {
        for (int at = 0; at < nr; at += 16) {
            int lanes = nr - at < 16 ? nr - at : 16;
            int64_t there = cols - j - at;
            int here = there < 0 ? 0 : (int)qs_min_i64(lanes, there);
            pack_across(&o->f, o->b, j0 + j + at, here, k0, depth,
                        dst + j / nr * sliver_stride + at, nr, lanes);
        }
    }
}

/* Panels times slivers. */
static void multiply(const qs_panels *p, int64_t i0, int64_t rows, int64_t j0, int64_t cols,
                     int64_t k0, int64_t depth, const float *packed, bool accumulate)
{
    const format *f = &((const operands *)p->ctx)->f;
    const float *panels = left_at(p, i0, k0, depth);
    const int64_t deep = words(f, depth);
    const unsigned mode = f->pairs != NULL ? f->pairs->begin() : 0;
    for (int64_t j = 0; j < cols; j += f->nr) {
        int width = (int)qs_min_i64(f->nr, cols - j);
        for (int64_t i = 0; i < rows; i += f->mr) {
            int height = (int)qs_min_i64(f->mr, rows - i);
            const float *left = panels + i * deep, *right = packed + j * deep;
            float *to = p->c + (i0 + i) * p->c_stride + j0 + j;
            if (f->pairs == NULL) {
                f->isa->tile(height, width, deep, left, right, to, p->c_stride, accumulate);
            } else {
                f->pairs->tile(height, width, deep, (const uint32_t *)(const void *)left,
                               (const uint32_t *)(const void *)right, to, p->c_stride, accumulate);
            }
        }
    }
    if (f->pairs != NULL) {
        f->pairs->end(mode);
    }
}

static qs_status multiply_by(const operands *o, qs_queue *queue, int64_t m, int64_t n, int64_t k,
                             float *c, int64_t c_stride, bool accumulate)
{
    const qs_panels_kind kind = {.mr = o->f.mr,
                                 .nr = o->f.nr,
                                 .kc = QS_GEMM_KC,
                                 .step_panels = STEP_PANELS,
                                 .task_slivers = SLIVERS_PER_TASK,
                                 .numbers_a_float = o->f.per_word,
                                 .speed = 32 * o->f.per_word,
                                 .left_count = left_count,
                                 .right_count = right_count,
                                 .left_tasks = left_tasks,
                                 .pack_left = pack_left,
                                 .pack_right = pack_right,
                                 .multiply = multiply};
    return qs_panels_multiply(queue, &kind, o, m, n, k, c, c_stride, accumulate);
}

qs_status qs_gemm(qs_queue *queue, int64_t m, int64_t n, int64_t k, const qs_operand *a,
                  const qs_operand *b, float *c, int64_t c_stride, bool accumulate)
{
    const qs_isa *isa = qs_isa_get();
    const operands fp32 = {{.per_word = 1, .mr = isa->mr, .nr = isa->nr, .isa = isa}, a, b};
    return multiply_by(&fp32, queue, m, n, k, c, c_stride, accumulate);
}

qs_status qs_gemm_bf16(qs_queue *queue, int64_t m, int64_t n, int64_t k, const qs_operand *a,
                       const qs_operand *b, float *c, int64_t c_stride, bool accumulate)
{
    const qs_pairs *pairs = qs_pairs_get();
    const operands bf16 = {
        {.per_word = 2, .mr = pairs->mr, .nr = pairs->nr, .isa = qs_isa_get(), .pairs = pairs},
        a,
        b};
    assert(a->scale == 0.0F || a->scale == 1.0F);
    return multiply_by(&bf16, queue, m, n, k, c, c_stride, accumulate);
}

int64_t qs_gemm_scratch_count(int threads, int64_t rows, int64_t cols)
{
    const int64_t right = (int64_t)threads * SLIVERS_PER_TASK * QS_GEMM_NR_MAX * QS_GEMM_KC;
    return qs_panels_left_most(rows, cols, QS_GEMM_MR_MAX, STEP_PANELS) + right;
}
