/* The bf16 product's tile on AVX2: the bits of AMX by fused multiply-adds in fp32 that flush what
 * is subnormal, so that a run which began on AMX goes on elsewhere, and loss curves can be had.
 *
 * A step's operands are widened to floats once, 8 KiB in the L1 cache; then 2 rows x 16 columns of
 * sums, of even and of odd k, stay in registers: a fused multiply-add for each load. */
#include <stddef.h>

#include "kernels/cpu/tile.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

#include "kernels/cpu/flush.h"

enum {
    SIDE = QS_TILE_SIDE,
    HALF = QS_TILE_HALF,
    STEP = QS_TILE_STEP,
    LANES = 8,
    ROWS = 2,   /* of a register block */
    VECTORS = 2 /* of LANES columns of a register block */
};

/* A step of one operand as floats. `a`: [row][k] for k of [even 16 | odd 16]. `b`: [k][column]. */
typedef struct {
    _Alignas(32) float a[SIDE][2][HALF], b[STEP][SIDE];
} step_floats;

/* Eight words of two bf16: the lower ones, and the upper ones. */
static inline void widen(const uint16_t *words, float *even, float *odd)
{
    const __m256i both = _mm256_loadu_si256((const __m256i *)(const void *)words);
    const __m256i upper = _mm256_set1_epi32((int)0xFFFF0000U);
    _mm256_storeu_ps(even, _mm256_castsi256_ps(_mm256_slli_epi32(both, 16)));
    _mm256_storeu_ps(odd, _mm256_castsi256_ps(_mm256_and_si256(both, upper)));
}

static void widen_step(const uint16_t *a, const uint16_t *b, step_floats *out)
{
    for (int i = 0; i < SIDE; i++) {
        for (int pair = 0; pair < HALF; pair += LANES) {
            widen(a + i * STEP + (ptrdiff_t)2 * pair, out->a[i][0] + pair, out->a[i][1] + pair);
        }
    }
    for (int j = 0; j < SIDE; j += LANES) {
        const uint16_t *column = b + j / HALF * HALF * STEP + (ptrdiff_t)(j % HALF) * 2;
        for (int pair = 0; pair < HALF; pair++) {
            widen(column + pair * STEP, out->b[2 * pair] + j, out->b[2 * pair + 1] + j);
        }
    }
}

/* y[ROWS, VECTORS * LANES] += one step. */
static inline void block(const step_floats *in, int i, int j, float *y)
{
    __m256 even[ROWS][VECTORS] = {{{0}}}, odd[ROWS][VECTORS] = {{{0}}};
    for (int pair = 0; pair < HALF; pair++) {
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) {
            const __m256 w0 = _mm256_load_ps(in->b[2 * pair] + j + v * LANES);
            const __m256 w1 = _mm256_load_ps(in->b[2 * pair + 1] + j + v * LANES);
#pragma GCC unroll 2
            for (int r = 0; r < ROWS; r++) {
                const __m256 x0 = _mm256_set1_ps(in->a[i + r][0][pair]);
                const __m256 x1 = _mm256_set1_ps(in->a[i + r][1][pair]);
                even[r][v] = _mm256_fmadd_ps(x0, w0, even[r][v]);
                odd[r][v] = _mm256_fmadd_ps(x1, w1, odd[r][v]);
            }
        }
    }
#pragma GCC unroll 2
    for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) {
            float *to = y + r * SIDE + v * LANES;
            const __m256 sum = _mm256_add_ps(even[r][v], odd[r][v]);
            _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), sum));
        }
    }
}

static void avx2_tile(int64_t steps, const uint16_t *a, const uint16_t *b, float *y)
{
    step_floats wide;
    memset(y, 0, sizeof *y * SIDE * SIDE);
    for (int64_t s = 0; s < steps; s++, a += QS_TILE_STEP_ELEMS, b += QS_TILE_STEP_ELEMS) {
        widen_step(a, b, &wide);
        for (int i = 0; i < SIDE; i += ROWS) {
            for (int j = 0; j < SIDE; j += VECTORS * LANES) {
                block(&wide, i, j, y + (ptrdiff_t)i * SIDE + j);
            }
        }
    }
}

const qs_tile *qs_tile_avx2(void)
{
    static const qs_tile table = {.name = "avx2",
                                  .begin = qs_flush_begin,
                                  .end = qs_flush_end,
                                  .tile = avx2_tile,
                                  .round = qs_tile_round,
                                  .pair = qs_tile_pair};
    return &table;
}

#else

const qs_tile *qs_tile_avx2(void)
{
    return NULL;
}

#endif
