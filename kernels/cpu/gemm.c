#include "kernels/cpu/gemm.h"

#include <assert.h>
#include <string.h>

#include "kernels/cpu/panels.h"
#include "kernels/cpu/parallel.h"

enum {
    STEP_PANELS = 12,     /* rows of A that are multiplied in one go: 168 KiB of the L2 cache */
    SLIVERS_PER_TASK = 8, /* most columns of a task: 256 KiB of the L2 cache */
    THIN_ROWS = 64,       /* of an A for which B is not packed; beyond, packing pays */
    THIN_COLS = 128,      /* of a B for which A is not */
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
    bool a_in_place, b_in_place; /* B: but for a sliver that is not whole */
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

/* Columns [first, first + count) of an operand whose stored rows run across k; else as `pack`. */
static void pack_along(const qs_panels *p, const qs_panels_part *part, const qs_operand *op,
                       int64_t first, int64_t count, float *dst, int width)
{
    const format *f = &((const operands *)p->ctx)->f;
    const int64_t deep = words(f, part->depth), from = part->k0 / f->per_word;
    float space[SEGMENT];
    for (int64_t word = 0; word < deep; word++) {
        const float *src = words_across(f, op, from + word, p->k, first, count, space);
        spread(src, count, dst + word * width, width, width * deep);
    }
}

/* Rows of an operand whose stored rows run along k; else as `pack`. */
static void pack_rows(const qs_panels *p, const qs_panels_part *part, const qs_operand *op,
                      int64_t first, int64_t count, float *dst, int width)
{
    enum { LANES = 16 };
    const format *f = &((const operands *)p->ctx)->f;
    const int64_t group_stride = width * words(f, part->depth);
    for (int64_t i = 0; i < count; i += width, dst += group_stride) {
        for (int at = 0; at < width; at += LANES) {
            const int lanes = width - at < LANES ? width - at : LANES;
            const int64_t there = count - i - at;
            const int here = there < 0 ? 0 : (int)qs_min_i64(lanes, there);
            pack_across(f, op, first + i + at, here, part->k0, part->depth, dst + at, width, lanes);
        }
    }
}

static bool scaled(const qs_operand *op)
{
    return op->scale != 0.0F && op->scale != 1.0F;
}

/* Rows of A or columns of B, [first, first + count), with the part's numbers along k: groups of
 * [words][width], the last one filled up. */
static void pack(const qs_panels *p, const qs_panels_part *part, const qs_operand *op,
                 bool rows_along_k, int64_t first, int64_t count, float *dst, int width)
{
    (rows_along_k ? pack_rows : pack_along)(p, part, op, first, count, dst, width);
    if (scaled(op)) {
        const format *f = &((const operands *)p->ctx)->f;
        const int64_t packed = qs_ceil_div(count, width) * width * words(f, part->depth);
        for (int64_t i = 0; i < packed; i++) {
            dst[i] *= op->scale;
        }
    }
}

/* Where a part of packed A starts. */
static float *left_at(const qs_panels *p, const qs_panels_part *part)
{
    const format *f = &((const operands *)p->ctx)->f;
    return p->left + qs_ceil_div(p->m, f->mr) * f->mr * words(f, part->k0) +
           part->i * words(f, part->depth);
}

static void pack_left(const qs_panels *p, const qs_panels_part *part)
{
    const operands *o = p->ctx;
    pack(p, part, o->a, !o->a->transposed, p->row0 + part->i, part->rows, left_at(p, part),
         o->f.mr);
}

static void pack_right(const qs_panels *p, const qs_panels_part *part)
{
    const operands *o = p->ctx;
    const int64_t nr = o->f.nr, from = o->b_in_place ? part->cols / nr * nr : 0;
    pack(p, part, o->b, o->b->transposed, part->j + from, part->cols - from,
         part->right + from * words(&o->f, part->depth), (int)nr);
}

/* Panels times slivers. */
static void multiply(const qs_panels *p, const qs_panels_part *part)
{
    const format *f = &((const operands *)p->ctx)->f;
    const float *panels = left_at(p, part);
    const int64_t deep = words(f, part->depth);
    const unsigned mode = f->pairs != NULL ? f->pairs->begin() : 0;
    for (int64_t j = 0; j < part->cols; j += f->nr) {
        int width = (int)qs_min_i64(f->nr, part->cols - j);
        for (int64_t i = 0; i < part->rows; i += f->mr) {
            int height = (int)qs_min_i64(f->mr, part->rows - i);
            const float *left = panels + i * deep, *right = part->right + j * deep;
            float *to = p->c + (part->i + i) * p->c_stride + part->j + j;
            if (f->pairs == NULL) {
                f->isa->tile(height, width, deep, left, right, to, p->c_stride, part->accumulate);
            } else {
                f->pairs->tile(height, width, deep, (const uint32_t *)(const void *)left,
                               (const uint32_t *)(const void *)right, to, p->c_stride,
                               part->accumulate);
            }
        }
    }
    if (f->pairs != NULL) {
        f->pairs->end(mode);
    }
}

/* Operands of tile_plain, where they are or packed. */
typedef struct {
    const float *at;
    int64_t stride;
} plain;

static plain left_panel(const qs_panels *p, const qs_panels_part *part, int64_t i)
{
    const operands *o = p->ctx;
    const qs_operand *a = o->a;
    const int64_t row = p->row0 + part->i + i, k = part->k0;
    if (!o->a_in_place) {
        return (plain){left_at(p, part) + i * part->depth, o->f.mr};
    }
    return (plain){a->data + (a->transposed ? k * a->stride + row : row * a->stride + k),
                   a->stride};
}

static plain right_sliver(const qs_panels *p, const qs_panels_part *part, int64_t j)
{
    const operands *o = p->ctx;
    if (!o->b_in_place || part->cols - j < o->f.nr) {
        return (plain){part->right + j * part->depth, o->f.nr};
    }
    return (plain){o->b->data + part->k0 * o->b->stride + part->j + j, o->b->stride};
}

/* The same, in fp32, with an operand in place. */
static void multiply_plain(const qs_panels *p, const qs_panels_part *part)
{
    const operands *o = p->ctx;
    const int64_t mr = o->f.mr, nr = o->f.nr;
    const bool in_columns = !o->a_in_place || o->a->transposed;
    for (int64_t j = 0; j < part->cols; j += nr) {
        const plain right = right_sliver(p, part, j);
        for (int64_t i = 0; i < part->rows; i += mr) {
            const plain left = left_panel(p, part, i);
            float *to = p->c + (part->i + i) * p->c_stride + part->j + j;
            o->f.isa->tile_plain((int)qs_min_i64(mr, part->rows - i),
                                 (int)qs_min_i64(nr, part->cols - j), part->depth, left.at,
                                 left.stride, in_columns, right.at, right.stride, to, p->c_stride,
                                 part->accumulate);
        }
    }
}

static qs_status multiply_by(const operands *o, qs_queue *queue, int64_t m, int64_t n, int64_t k,
                             float *c, int64_t c_stride, bool accumulate)
{
    const qs_panels_kind kind = {.mr = o->f.mr,
                                 .nr = o->f.nr,
                                 .kc = QS_GEMM_KC,
                                 .left_panels = STEP_PANELS,
                                 .left_depth = QS_GEMM_KC,
                                 .step_panels = STEP_PANELS,
                                 .task_slivers = SLIVERS_PER_TASK,
                                 .panel_floats = o->f.mr * words(&o->f, k),
                                 .sliver_floats = o->f.nr * words(&o->f, QS_GEMM_KC),
                                 .speed = 32 * o->f.per_word,
                                 .pack_left = o->a_in_place ? NULL : pack_left,
                                 .pack_right = pack_right,
                                 .multiply =
                                     o->a_in_place || o->b_in_place ? multiply_plain : multiply};
    return qs_panels_multiply(queue, &kind, o, m, n, k, c, c_stride, accumulate);
}

qs_status qs_gemm(qs_queue *queue, int64_t m, int64_t n, int64_t k, const qs_operand *a,
                  const qs_operand *b, float *c, int64_t c_stride, bool accumulate)
{
    const qs_isa *isa = qs_isa_get();
    operands fp32 = {{.per_word = 1, .mr = isa->mr, .nr = isa->nr, .isa = isa}, a, b, false, false};
    fp32.a_in_place = n <= THIN_COLS && a->load == NULL && !scaled(a);
    fp32.b_in_place = m <= THIN_ROWS && b->load == NULL && !b->transposed && !scaled(b);
    if (fp32.b_in_place && m > 0) {
        fp32.f.mr = (int)qs_ceil_div(m, qs_ceil_div(m, isa->mr)); /* panels of even heights */
    }
    return multiply_by(&fp32, queue, m, n, k, c, c_stride, accumulate);
}

qs_status qs_gemm_bf16(qs_queue *queue, int64_t m, int64_t n, int64_t k, const qs_operand *a,
                       const qs_operand *b, float *c, int64_t c_stride, bool accumulate)
{
    const qs_pairs *pairs = qs_pairs_get();
    const operands bf16 = {
        {.per_word = 2, .mr = pairs->mr, .nr = pairs->nr, .isa = qs_isa_get(), .pairs = pairs},
        a,
        b,
        false,
        false};
    assert(!scaled(a) && !scaled(b));
    return multiply_by(&bf16, queue, m, n, k, c, c_stride, accumulate);
}

int64_t qs_gemm_scratch_count(int threads, int64_t rows, int64_t cols)
{
    const int64_t right = (int64_t)threads * SLIVERS_PER_TASK * QS_GEMM_NR_MAX * QS_GEMM_KC;
    return qs_panels_left_most(rows, cols, QS_GEMM_MR_MAX, STEP_PANELS) + right;
}
