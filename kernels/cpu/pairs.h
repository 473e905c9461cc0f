/* Inner loops of the product in bf16 (qs_gemm_bf16): one table for AVX512-BF16, one for AVX2, one
 * in portable C. All give the same bits; the portable one is the definition.
 *
 * Packed operands are words of two bf16 that are neighbours along k, the earlier one above: the
 * order in which vdpbf16ps adds them. Whatever is subnormal counts as 0, an operand as well as a
 * result (after rounding with any exponent); it keeps its sign. */
#ifndef QS_KERNELS_CPU_PAIRS_H
#define QS_KERNELS_CPU_PAIRS_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "kernels/cpu/isa.h"
#include "quant/nf4.h"

typedef struct {
    const char *name;
    int mr, nr; /* rows and columns of a register tile, at most QS_GEMM_MR_MAX and QS_GEMM_NR_MAX */

    /** Around the calls of `tile` in one thread: they may set the thread's floating-point modes. */
    unsigned (*begin)(void);
    void (*end)(unsigned before);

    /** c[rows, cols] (+)= sum over p < pairs of a[p * mr + i] . b[p * nr + j]; rows <= mr, cols <=
     * nr. An element is a chain of fused multiply-adds in ascending k, from 0. */
    void (*tile)(int rows, int cols, int64_t pairs, const uint32_t *a, const uint32_t *b, float *c,
                 int64_t c_stride, bool accumulate);

    /** The same of operands that were not packed, as in isa.h. */
    void (*tile_plain)(int rows, int cols, int64_t pairs, const uint32_t *a, int64_t a_stride,
                       bool a_in_columns, const uint32_t *b, int64_t b_stride, float *c,
                       int64_t c_stride, bool accumulate);

    /** Words along a row: out[i] = (bf16(x[2 i]), bf16(x[2 i + 1])) for 2 i < count, rounded to
     * nearest even; beyond `count` there are zeros. */
    void (*round)(const float *x, int64_t count, uint32_t *out);

    /** Words along a row of whole NF4 blocks: bf16 of what isa->nf4_decode gives. */
    void (*nf4_decode)(const uint8_t *packed, const float *absmax, int64_t blocks, qs_dtype dtype,
                       uint32_t *out);

    /** Words along a row of bf16 numbers at `src` (any alignment), as `round` gives them. */
    void (*take)(const uint8_t *src, int64_t count, uint32_t *out);

    /** Words across two rows, of words along them: out[j] = (above[j], below[j]) for j < count.
     * Writes up to the next even count. */
    void (*zip)(const uint32_t *above, const uint32_t *below, int64_t count, uint32_t *out);
} qs_pairs;

/** The table in use, never NULL: the fastest that the CPU has, or what QSHARD_CPU_BF16 names. */
const qs_pairs *qs_pairs_get(void);

/** Use the table called `name` ("avx512bf16", "avx2", "portable") from now on, NULL: by the CPU
 * again (for tests). \return false if this CPU cannot run it. */
bool qs_pairs_force(const char *name);

/** Whether the table in use takes about half the time of fp32: AVX512-BF16 on AMD's CPUs. (Intel's
 * up to Sapphire Rapids issue vdpbf16ps so seldom that fp32 is faster.) */
bool qs_pairs_are_faster(void);

/** The tables, NULL where the compiler could not build one. */
const qs_pairs *qs_pairs_portable(void);
const qs_pairs *qs_pairs_avx2(void);
const qs_pairs *qs_pairs_avx512(void);

/* ---- what the tables are compiled from ---- */

/* bf16 of a float, in the upper half; NaN stays NaN. */
static inline uint32_t qs_pairs_round_one(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const uint32_t size = bits & 0x7FFFFFFFU;
    const uint32_t rounded = bits + 0x7FFFU + (bits >> 16 & 1U);
    const uint32_t number = size < 0x00800000U ? bits & 0x80000000U : rounded;
    return (size > 0x7F800000U ? bits | 0x00400000U : number) & 0xFFFF0000U;
}

static inline void qs_pairs_round(const float *x, int64_t count, uint32_t *out)
{
    for (int64_t i = 0; i < count / 2; i++) {
        out[i] = qs_pairs_round_one(x[2 * i]) | qs_pairs_round_one(x[2 * i + 1]) >> 16;
    }
    if (count % 2 != 0) {
        out[count / 2] = qs_pairs_round_one(x[count - 1]);
    }
}

/* nf4_decode by way of floats. */
static inline void qs_pairs_nf4_by_floats(const qs_isa *isa, const uint8_t *packed,
                                          const float *absmax, int64_t blocks, qs_dtype dtype,
                                          uint32_t *out)
{
    for (int64_t i = 0; i < blocks; i++) {
        float floats[QS_NF4_BLOCK];
        isa->nf4_decode(packed + i * (QS_NF4_BLOCK / 2), absmax + i, 1, dtype, floats);
        qs_pairs_round(floats, QS_NF4_BLOCK, out + i * (QS_NF4_BLOCK / 2));
    }
}

#endif
