/* Inner loops of the bf16 product (gemm_amx.h): one table for AMX, two that compute the same bits
 * elsewhere, for AVX2 and in portable C, slowly. The portable one is the definition.
 *
 * A tile is 32 rows x 32 columns, four of AMX's accumulators. Its operands are packed in steps of
 * 32 k, each two halves of AMX's tiles:
 *     a      [step][2][16 rows][32 k]          bf16: rows of X or dY
 *     b      [step][2][16 pairs][16 columns]   two bf16 of one column each, the even k below */
#ifndef QS_KERNELS_CPU_TILE_H
#define QS_KERNELS_CPU_TILE_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

enum {
    QS_TILE_SIDE = 32,                                /* rows and columns of a tile */
    QS_TILE_HALF = 16,                                /* rows, columns and pairs of one of AMX's */
    QS_TILE_STEP = 32,                                /* k of a step */
    QS_TILE_STEP_ELEMS = QS_TILE_SIDE * QS_TILE_STEP, /* bf16 of an operand in a step */
};

typedef struct {
    const char *name;

    /** Around the calls of `tile` in one thread: the registers' shape and their release, or the
     * thread's floating-point modes. */
    unsigned (*begin)(void);
    void (*end)(unsigned before);

    /** y[32, 32] = the sums of `steps` steps. In a step, for each element:
     *     even = odd = 0; for its 16 pairs in ascending k: even = a b + even, odd = a b + odd,
     *     fused; y = y + (even + odd), two roundings.
     * Rounded to nearest even. Operands that are subnormal count as 0, results that are (after
     * rounding with any exponent) become 0, of their sign. Whatever is not finite stays so. */
    void (*tile)(int64_t steps, const uint16_t *a, const uint16_t *b, float *y);

    /** out[i] = bf16(x[i]), to nearest even. */
    void (*round)(const float *x, int64_t count, uint16_t *out);

    /** out[i] = bf16(even[i]) below bf16(odd[i]). */
    void (*pair)(const float *even, const float *odd, int64_t count, uint32_t *out);
} qs_tile;

/** The table in use, never NULL: the fastest that the CPU has, or what QSHARD_CPU_AMX names. */
const qs_tile *qs_tile_get(void);

/** Use the table called `name` ("portable", "avx2", "amx") from now on, NULL: by the CPU again (for
 * tests). \return false if this CPU cannot run it. */
bool qs_tile_force(const char *name);

/** Whether CPU, kernel and build can multiply AMX's tiles. The first call asks the kernel for their
 * registers, for the whole process. */
bool qs_tile_supported(void);

/** The tables, NULL where compiler or assembler did not know the instructions. */
const qs_tile *qs_tile_portable(void);
const qs_tile *qs_tile_avx2(void);
const qs_tile *qs_tile_amx(void);

/* ---- what the tables are compiled from ---- */

static inline uint16_t qs_tile_round_one(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const uint32_t nan = bits >> 16 | 0x40U;
    const uint32_t rounded = (bits + 0x7FFFU + (bits >> 16 & 1U)) >> 16;
    return (uint16_t)((bits & 0x7FFFFFFFU) > 0x7F800000U ? nan : rounded);
}

static inline void qs_tile_round(const float *x, int64_t count, uint16_t *out)
{
    for (int64_t i = 0; i < count; i++) {
        out[i] = qs_tile_round_one(x[i]);
    }
}

static inline void qs_tile_pair(const float *even, const float *odd, int64_t count, uint32_t *out)
{
    for (int64_t i = 0; i < count; i++) {
        out[i] = qs_tile_round_one(even[i]) | (uint32_t)qs_tile_round_one(odd[i]) << 16;
    }
}

#endif
