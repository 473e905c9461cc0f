#include "kernels/cpu/gemm_amx.h"

#include <string.h>

#include "kernels/cpu/panels.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/tile.h"

enum {
    SIDE = QS_TILE_SIDE,
    HALF = QS_TILE_HALF,
    STEP = QS_TILE_STEP,
    KC = 1024, /* depth of a decoded sliver; part of the definition */
    NR = 256,  /* columns of a sliver, 512 KiB of the L2 cache: X is read once for all of them */
    SLIVER = KC * NR / 2, /* floats */
    STEP_PANELS = 8,      /* of a task: fewer are not worth decoding a sliver again */
};

/* A packed panel is [steps][32 * 32]. */
typedef struct {
    const qs_tile *tile;
    const qs_isa *isa;
    const qs_operand *a, *b;
} operands;

static int64_t steps_of(int64_t depth)
{
    return qs_ceil_div(depth, STEP);
}

/* One panel of A: its rows side by side in each step. */
static void pack_left(const qs_panels *p, const qs_panels_part *part)
{
    const operands *o = p->ctx;
    uint16_t *out = (uint16_t *)(void *)qs_panels_left(p, part->i);
    if (part->rows < SIDE || p->k % STEP != 0) {
        memset(out, 0, (size_t)p->kind->panel_floats * sizeof(float));
    }
    for (int64_t i = 0; i < part->rows; i++) {
        for (int64_t k0 = 0; k0 < p->k; k0 += KC) {
            float space[KC];
            const int64_t depth = qs_min_i64(KC, p->k - k0);
            const float *x = qs_operand_row(o->a, p->row0 + part->i + i, k0, depth, space);
            for (int64_t k = 0; k < depth; k += STEP) {
                o->tile->round(x + k, qs_min_i64(STEP, depth - k),
                               out + (k0 + k) / STEP * QS_TILE_STEP_ELEMS + i * STEP);
            }
        }
    }
}

/* Where columns [j, j + 16) of a sliver start; their pairs of one step are 16 * 16 words. */
static int64_t columns_at(int64_t steps, int64_t j)
{
    return j / SIDE * steps * (QS_TILE_STEP_ELEMS / 2) + j % SIDE / HALF * HALF * HALF;
}

/* B's columns are stored rows: 16 of them are rounded, and turned as words of two. */
static void pack_columns(const operands *o, const qs_panels_part *part, uint32_t *out)
{
    const int64_t cols = part->cols, depth = part->depth;
    const int64_t steps = steps_of(depth), pairs = steps * HALF;
    for (int64_t j = 0; j < qs_ceil_div(cols, SIDE) * SIDE; j += HALF) {
        const int rows = (int)(j < cols ? qs_min_i64(HALF, cols - j) : 0);
        float words[HALF * KC / 2]; /* two bf16 each: moved, never computed with */
        for (int r = 0; r < rows; r++) {
            float space[KC];
            uint16_t *row = (uint16_t *)(void *)(words + r * pairs);
            o->tile->round(qs_operand_row(o->b, part->j + j + r, part->k0, depth, space), depth,
                           row);
            memset(row + depth, 0, (size_t)(2 * pairs - depth) * sizeof *row);
        }
        uint32_t *to = out + columns_at(steps, j);
        for (int64_t s = 0; s < steps; s++, to += QS_TILE_STEP_ELEMS / 2) {
            o->isa->transpose(words + s * HALF, pairs, rows, HALF, (float *)(void *)to, HALF, HALF);
        }
    }
}

/* B is stored by its rows: two of them make a row of pairs. */
static void pack_rows(const operands *o, const qs_panels_part *part, uint32_t *out)
{
    const int64_t cols = part->cols, depth = part->depth;
    static const float zeros[NR] = {0};
    const int64_t steps = steps_of(depth);
    for (int64_t k = 0; k < steps * STEP; k += 2) {
        float space[2][NR];
        uint32_t pairs[NR] = {0};
        const float *even =
            k < depth ? qs_operand_row(o->b, part->k0 + k, part->j, cols, space[0]) : zeros;
        const float *odd =
            k + 1 < depth ? qs_operand_row(o->b, part->k0 + k + 1, part->j, cols, space[1]) : zeros;
        o->tile->pair(even, odd, cols, pairs);
        for (int64_t j = 0; j < qs_ceil_div(cols, SIDE) * SIDE; j += HALF) {
            memcpy(out + columns_at(steps, j) + k / STEP * (QS_TILE_STEP_ELEMS / 2) +
                       k % STEP / 2 * HALF,
                   pairs + j, HALF * sizeof *pairs);
        }
    }
}

static void pack_right(const qs_panels *p, const qs_panels_part *part)
{
    const operands *o = p->ctx;
    (o->b->transposed ? pack_columns : pack_rows)(o, part, (uint32_t *)(void *)part->right);
}

static void multiply(const qs_panels *p, const qs_panels_part *part)
{
    const operands *o = p->ctx;
    const int64_t steps = steps_of(part->depth);
    const unsigned before = o->tile->begin();
    for (int64_t i = part->i; i < part->i + part->rows; i += SIDE) {
        const uint16_t *a = (const uint16_t *)(const void *)qs_panels_left(p, i);
        for (int64_t j = 0; j < part->cols; j += SIDE) {
            _Alignas(64) float y[SIDE * SIDE];
            const float *b = part->right + columns_at(steps, j);
            o->tile->tile(steps, a + part->k0 / STEP * QS_TILE_STEP_ELEMS,
                          (const uint16_t *)(const void *)b, y);
            qs_panels_store(p, i, part->j + j, y, SIDE, NULL, part->accumulate);
        }
    }
    o->tile->end(before);
}

qs_status qs_gemm_amx(qs_queue *queue, int64_t m, int64_t n, int64_t k, const qs_operand *a,
                      const qs_operand *b, float *c, int64_t c_stride, bool accumulate)
{
    const qs_panels_kind kind = {.mr = SIDE,
                                 .nr = NR,
                                 .kc = KC,
                                 .left_panels = 1,
                                 .left_depth = k,
                                 .step_panels = STEP_PANELS,
                                 .task_slivers = 1,
                                 .panel_floats = steps_of(k) * QS_TILE_STEP_ELEMS / 2,
                                 .sliver_floats = SLIVER,
                                 .speed = 128,
                                 .pack_left = pack_left,
                                 .pack_right = pack_right,
                                 .multiply = multiply};
    const operands o = {qs_tile_get(), qs_isa_get(), a, b};
    return qs_panels_multiply(queue, &kind, &o, m, n, k, c, c_stride, accumulate);
}

int64_t qs_gemm_amx_scratch_count(int threads, int64_t longest)
{
    return (int64_t)threads * SLIVER + (int64_t)SIDE * (longest + STEP);
}
