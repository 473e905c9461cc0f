/* Inner loops of the fp16 product (gemm_fp16.h): one table for AVX512-FP16, one in portable C that
 * computes the same bits anywhere, slowly, and one for AVX2 that does so less slowly. The table is
 * the instruction set; the arithmetic is one.
 *
 * A tile is 8 rows x 96 columns. Its operands are packed:
 *     a      [k][8]            halves: rows of X or dY, each scaled by its own power of two
 *     b      [k][96]           halves: decoded weights, |b| <= 1
 *     scale  [stretch][96]     floats: one for each stretch of 64 k and each column */
#ifndef QS_KERNELS_CPU_HALF_H
#define QS_KERNELS_CPU_HALF_H

#include <stdbool.h>
#include <stdint.h>

enum {
    QS_HALF_MR = 8,
    QS_HALF_NR = 96,
    QS_HALF_STRETCH = 64, /* k that are summed in fp16: an NF4 block of the forward product */
    QS_HALF_GROUP = 32,   /* columns that are decoded together */
};

typedef struct {
    const char *name;

    /** y[8, 96] += the sums of `depth` products, by stretches of 64 k (the last one shorter):
     *     s = 0; s = half(a[k] b[k] + s) for ascending k; y = fp32(s scale + y), fused.
     * Whatever is not finite stays so. y is contiguous. */
    void (*tile)(int64_t depth, const uint16_t *a, const uint16_t *b, const float *scale, float *y);

    /** One stretch of X: out[k * 8 + i] = half(x[i][k] * scale[i]) for k < count <= 64, i < 8. A
     * row that is NULL counts as zeros. */
    void (*pack)(const float *const x[QS_HALF_MR], const float *scale, int64_t count,
                 uint16_t *out);

    /** 64 values of each of 32 rows, one NF4 block each (32 bytes; NULL: zeros), as columns: out[k
     * * 96 + j] = half(code). */
    void (*decode_columns)(const uint8_t *const packed[QS_HALF_GROUP], uint16_t *out);

    /** 32 values of one NF4 block (16 bytes) along a row: out[j] = half(code * factor). */
    void (*decode_row)(const uint8_t *packed, float factor, uint16_t *out);
} qs_half;

/** The table for AVX512-FP16, NULL where the assembler could not build it; runs only where
 * qs_half_supported. */
const qs_half *qs_half_avx512(void);
const qs_half *qs_half_avx2(void); /* runs where qs_isa_runs("avx2") */
const qs_half *qs_half_portable(void);

/** Whether this CPU, and this build, have AVX512-FP16. */
bool qs_half_supported(void);

/** The table in use, never NULL: the fastest that the CPU has, or what QSHARD_CPU_FP16 names. */
const qs_half *qs_half_get(void);

/** Use the table called `name` ("avx512fp16", "avx2", "portable") from now on, NULL: by the CPU
 * again (for tests). \return false if this CPU cannot run it. */
bool qs_half_force(const char *name);

/* ---- what more than one table is made of ---- */

/** `pack`, `decode_columns` and `decode_row` of the portable table, and of AVX2's. */
void qs_half_pack(const float *const x[QS_HALF_MR], const float *scale, int64_t count,
                  uint16_t *out);
void qs_half_decode_columns(const uint8_t *const packed[QS_HALF_GROUP], uint16_t *out);
void qs_half_decode_row(const uint8_t *packed, float factor, uint16_t *out);

/** A tile of `depth` <= QS_HALF_STRETCH: y[8, 96] += one stretch. */
typedef void (*qs_half_stretch)(int64_t depth, const uint16_t *a, const uint16_t *b,
                                const float *scale, float *y);

/** A tile as its stretches, one after the other: `tile` of all tables. */
static inline void qs_half_by_stretches(qs_half_stretch stretch, int64_t depth, const uint16_t *a,
                                        const uint16_t *b, const float *scale, float *y)
{
    for (int64_t k = 0; k < depth; k += QS_HALF_STRETCH, scale += QS_HALF_NR) {
        const int64_t here = depth - k < QS_HALF_STRETCH ? depth - k : QS_HALF_STRETCH;
        stretch(here, a + k * QS_HALF_MR, b + k * QS_HALF_NR, scale, y);
    }
}

#endif
