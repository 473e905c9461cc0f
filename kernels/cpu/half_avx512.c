/* The fp16 product for AVX512-FP16. The tile is one block of assembly: 24 sums of 32 halves, three
 * of W, one of X fill 28 of the 32 registers, and compilers spill them.
 *
 * A step of k: 24 multiply-adds on ports 0 and 5, 12 cycles at least. Seven rows take X as an
 * operand from memory, broadcast, one load for each multiply-add; the eighth is broadcast to a
 * register (port 5). So 25 operations for two ports and 25 loads for two: 12.5 cycles. With all
 * eight rows from memory the loads (27) would take 13.5. */
#include "kernels/cpu/half.h"

#include <stddef.h>

#if defined(QS_HALF_ASSEMBLER) && defined(__AVX512F__) && defined(__AVX512BW__) &&                 \
    defined(__AVX512VL__) && defined(__F16C__)
#include <immintrin.h>

#include "quant/nf4.h"

#define ZERO(z) "vpxord %%zmm" #z ", %%zmm" #z ", %%zmm" #z "\n\t"
#define ZERO_ROW(z0, z1, z2) ZERO(z0) ZERO(z1) ZERO(z2)

#define FROM_MEMORY(at, b, z) "vfmadd231ph " #at "(%[a])%{1to32%}, %%zmm" #b ", %%zmm" #z "\n\t"
#define ROW_FROM_MEMORY(at, z0, z1, z2)                                                            \
    FROM_MEMORY(at, 24, z0) FROM_MEMORY(at, 25, z1) FROM_MEMORY(at, 26, z2)

#define FROM_REGISTER(b, z) "vfmadd231ph %%zmm27, %%zmm" #b ", %%zmm" #z "\n\t"
#define ROW_FROM_REGISTER(at, z0, z1, z2)                                                          \
    "vpbroadcastw " #at "(%[a]), %%zmm27\n\t" FROM_REGISTER(24, z0) FROM_REGISTER(25, z1)          \
        FROM_REGISTER(26, z2)

/* 32 sums: widen, times scale, to y. */
#define FLUSH(z, y_low, y_high, s_low, s_high)                                                     \
    "vcvtph2ps %%ymm" #z ", %%zmm28\n\t"                                                           \
    "vextractf64x4 $1, %%zmm" #z ", %%ymm29\n\t"                                                   \
    "vcvtph2ps %%ymm29, %%zmm29\n\t"                                                               \
    "vmovups " #y_low "(%[y]), %%zmm30\n\t"                                                        \
    "vmovups " #y_high "(%[y]), %%zmm31\n\t"                                                       \
    "vfmadd231ps " #s_low "(%[scale]), %%zmm28, %%zmm30\n\t"                                       \
    "vfmadd231ps " #s_high "(%[scale]), %%zmm29, %%zmm31\n\t"                                      \
    "vmovups %%zmm30, " #y_low "(%[y])\n\t"                                                        \
    "vmovups %%zmm31, " #y_high "(%[y])\n\t"
#define FLUSH_ROW(row, z0, z1, z2)                                                                 \
    FLUSH(z0, 384 * row, 384 * row + 64, 0, 64)                                                    \
    FLUSH(z1, 384 * row + 128, 384 * row + 192, 128, 192)                                          \
    FLUSH(z2, 384 * row + 256, 384 * row + 320, 256, 320)

static void avx512_stretch(int64_t depth, const uint16_t *a, const uint16_t *b, const float *scale,
                           float *y)
{
    __asm__ volatile(
        ZERO_ROW(0, 1, 2) ZERO_ROW(3, 4, 5) ZERO_ROW(6, 7, 8) ZERO_ROW(9, 10, 11)
            ZERO_ROW(12, 13, 14) ZERO_ROW(15, 16, 17) ZERO_ROW(18, 19, 20) ZERO_ROW(
                21, 22,
                23) ".p2align 5\n"
                    "1:\n\t"
                    "vmovups (%[b]), %%zmm24\n\t"
                    "vmovups 64(%[b]), %%zmm25\n\t"
                    "vmovups 128(%[b]), %%zmm26\n\t" ROW_FROM_MEMORY(0, 0, 1, 2) ROW_FROM_MEMORY(
                        2, 3, 4, 5) ROW_FROM_MEMORY(4, 6, 7, 8) ROW_FROM_MEMORY(6, 9, 10, 11)
                        ROW_FROM_MEMORY(8, 12, 13, 14) ROW_FROM_MEMORY(10, 15, 16, 17)
                            ROW_FROM_MEMORY(12, 18, 19, 20) ROW_FROM_REGISTER(
                                14, 21, 22,
                                23) "add $16, %[a]\n\t"
                                    "add $192, %[b]\n\t"
                                    "dec %[depth]\n\t"
                                    "jnz 1b\n\t" FLUSH_ROW(0, 0, 1, 2) FLUSH_ROW(1, 3, 4, 5)
                                        FLUSH_ROW(2, 6, 7, 8) FLUSH_ROW(3, 9, 10, 11)
                                            FLUSH_ROW(4, 12, 13, 14) FLUSH_ROW(5, 15, 16, 17)
                                                FLUSH_ROW(6, 18, 19, 20) FLUSH_ROW(7, 21, 22, 23)
        : [a] "+r"(a), [b] "+r"(b), [depth] "+r"(depth)
        : [scale] "r"(scale), [y] "r"(y)
        : "cc", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8",
          "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18",
          "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28",
          "xmm29", "xmm30", "xmm31");
}

static void avx512_tile(int64_t depth, const uint16_t *a, const uint16_t *b, const float *scale,
                        float *y)
{
    qs_half_by_stretches(avx512_stretch, depth, a, b, scale, y);
}

/* 8 x 8 halves: three perfect shuffles of all 64. */
static inline void transpose8(__m128i r[8])
{
    for (int round = 0; round < 3; round++) {
        __m128i next[8];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            next[2 * i] = _mm_unpacklo_epi16(r[i], r[i + 4]);
            next[2 * i + 1] = _mm_unpackhi_epi16(r[i], r[i + 4]);
        }
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            r[i] = next[i];
        }
    }
}

static void avx512_pack(const float *const x[QS_HALF_MR], const float *scale, int64_t count,
                        uint16_t *out)
{
    for (int64_t k = 0; k < count; k += 8) {
        const int64_t here = count - k < 8 ? count - k : 8;
        const __mmask8 there = (__mmask8)((1U << here) - 1U);
        __m128i r[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            __m256 wide =
                x[i] == NULL ? _mm256_setzero_ps() : _mm256_maskz_loadu_ps(there, x[i] + k);
            wide = _mm256_mul_ps(wide, _mm256_set1_ps(scale[i]));
            r[i] = _mm256_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT);
        }
        transpose8(r);
        for (int i = 0; i < here; i++) {
            _mm_storeu_si128((__m128i *)(void *)(out + (k + i) * QS_HALF_MR), r[i]);
        }
    }
}

/* The 16 values times `factor` as halves, twice, so that a permutation may look at five bits. */
static inline __m512i values_of(float factor)
{
    const __m512 wide = _mm512_mul_ps(_mm512_loadu_ps(qs_nf4_code), _mm512_set1_ps(factor));
    return _mm512_broadcast_i64x4(_mm512_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT));
}

/* Two steps of k for 32 columns: their bytes are the high codes of one and the low ones of the
 * next. */
static inline void store_two(__m256i bytes, __m512i values, uint16_t *out)
{
    const __m512i wide = _mm512_cvtepu8_epi16(bytes);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(_mm512_srli_epi16(wide, 4), values));
    _mm512_storeu_si512(out + QS_HALF_NR, _mm512_permutexvar_epi16(wide, values));
}

/* Four 16 x 16 squares of bytes side by side, transposed by four perfect shuffles: lanes 0 and 2
 * hold bytes 0-15 of rows 0-15 and 16-31, lanes 1 and 3 bytes 16-31. */
static void avx512_decode_columns(const uint8_t *const packed[QS_HALF_GROUP], uint16_t *out)
{
    enum { HALF = QS_HALF_GROUP / 2 };
    static const uint8_t zeros[QS_NF4_BLOCK / 2] = {
        QS_NF4_ZERO_BYTE, QS_NF4_ZERO_BYTE, QS_NF4_ZERO_BYTE, QS_NF4_ZERO_BYTE, QS_NF4_ZERO_BYTE,
        QS_NF4_ZERO_BYTE, QS_NF4_ZERO_BYTE, QS_NF4_ZERO_BYTE, QS_NF4_ZERO_BYTE, QS_NF4_ZERO_BYTE,
        QS_NF4_ZERO_BYTE, QS_NF4_ZERO_BYTE, QS_NF4_ZERO_BYTE, QS_NF4_ZERO_BYTE, QS_NF4_ZERO_BYTE,
        QS_NF4_ZERO_BYTE, QS_NF4_ZERO_BYTE, QS_NF4_ZERO_BYTE, QS_NF4_ZERO_BYTE, QS_NF4_ZERO_BYTE,
        QS_NF4_ZERO_BYTE, QS_NF4_ZERO_BYTE, QS_NF4_ZERO_BYTE, QS_NF4_ZERO_BYTE, QS_NF4_ZERO_BYTE,
        QS_NF4_ZERO_BYTE, QS_NF4_ZERO_BYTE, QS_NF4_ZERO_BYTE, QS_NF4_ZERO_BYTE, QS_NF4_ZERO_BYTE,
        QS_NF4_ZERO_BYTE, QS_NF4_ZERO_BYTE};
    __m512i r[HALF];
#pragma GCC unroll 16
    for (int i = 0; i < HALF; i++) {
        const uint8_t *low = packed[i] != NULL ? packed[i] : zeros;
        const uint8_t *high = packed[i + HALF] != NULL ? packed[i + HALF] : zeros;
        r[i] = _mm512_inserti64x4(
            _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(const void *)low)),
            _mm256_loadu_si256((const __m256i *)(const void *)high), 1);
    }
    for (int round = 0; round < 4; round++) {
        __m512i next[HALF];
#pragma GCC unroll 8
        for (int i = 0; i < HALF / 2; i++) {
            next[2 * i] = _mm512_unpacklo_epi8(r[i], r[i + HALF / 2]);
            next[2 * i + 1] = _mm512_unpackhi_epi8(r[i], r[i + HALF / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < HALF; i++) {
            r[i] = next[i];
        }
    }
    const __m512i values = values_of(1.0F);
    for (int i = 0; i < HALF; i++) {
        const __m512i sorted = _mm512_shuffle_i64x2(r[i], r[i], 0xD8); /* lanes 0, 2, 1, 3 */
        store_two(_mm512_castsi512_si256(sorted), values, out + (int64_t)2 * i * QS_HALF_NR);
        store_two(_mm512_extracti64x4_epi64(sorted, 1), values,
                  out + (int64_t)2 * (i + HALF) * QS_HALF_NR);
    }
}

static void avx512_decode_row(const uint8_t *packed, float factor, uint16_t *out)
{
    const __m512i wide =
        _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(const void *)packed));
    const __m512i code = _mm512_or_epi32(_mm512_srli_epi32(wide, 4), _mm512_slli_epi32(wide, 16));
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(code, values_of(factor)));
}

const qs_half *qs_half_avx512(void)
{
    static const qs_half table = {.name = "avx512fp16",
                                  .tile = avx512_tile,
                                  .pack = avx512_pack,
                                  .decode_columns = avx512_decode_columns,
                                  .decode_row = avx512_decode_row};
    return &table;
}

#else

const qs_half *qs_half_avx512(void)
{
    return NULL;
}

#endif
