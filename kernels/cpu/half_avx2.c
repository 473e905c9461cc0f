/* The fp16 product's inner loops on AVX2: the bits of half.c, some ten times faster, for tests and
 * for loss curves on CPUs without AVX512-FP16. No one trains with it: strict is faster still. */
#include <stddef.h>

#include "kernels/cpu/half.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#include <string.h>

#include "quant/nf4.h"

enum { LANES = 8, VECTORS = 4 /* sums of a row that are under way together */ };

static inline __m256 widen(const uint16_t *half)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)half));
}

static inline void narrow(uint16_t *half, __m256 v)
{
    __m128i bits = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128((__m128i *)(void *)half, bits);
}

/* half(product + sum), `product` exact. Rounded to fp32 first, a sum could come to lie between two
 * halves where it was not; so it is rounded to odd (Boldo & Melquiond 2008,
 * doi:10.1109/TC.2007.70819): where the rounding lost something (Knuth's two-sum), the neighbour
 * with an odd last bit that lies on the other side. */
static inline __m256 add_to_half(__m256 product, __m256 sum)
{
    const __m256 near = _mm256_add_ps(product, sum);
    const __m256 part = _mm256_sub_ps(near, product);
    const __m256 lost =
        _mm256_add_ps(_mm256_sub_ps(product, _mm256_sub_ps(near, part)), _mm256_sub_ps(sum, part));
    const __m256i bits = _mm256_castps_si256(near), one = _mm256_set1_epi32(1);
    const __m256i inexact =
        _mm256_castps_si256(_mm256_cmp_ps(lost, _mm256_setzero_ps(), _CMP_NEQ_OQ));
    const __m256i even = _mm256_cmpeq_epi32(_mm256_and_si256(bits, one), _mm256_setzero_si256());
    /* Away from 0 if what was lost has the sum's sign, else towards it: 1 or -1. */
    const __m256i against =
        _mm256_srai_epi32(_mm256_xor_si256(bits, _mm256_castps_si256(lost)), 31);
    const __m256i step =
        _mm256_and_si256(_mm256_and_si256(inexact, even), _mm256_or_si256(against, one));
    const __m256 odd = _mm256_castsi256_ps(_mm256_add_epi32(bits, step));
    return _mm256_cvtph_ps(_mm256_cvtps_ph(odd, _MM_FROUND_TO_NEAREST_INT));
}

static void stretch(int64_t depth, const uint16_t *a, const uint16_t *b, const float *scale,
                    float *y)
{
    float right[QS_HALF_STRETCH][QS_HALF_NR], left[QS_HALF_STRETCH][QS_HALF_MR];
    for (int64_t k = 0; k < depth; k++) {
        _mm256_storeu_ps(left[k], widen(a + k * QS_HALF_MR));
        for (int j = 0; j < QS_HALF_NR; j += LANES) {
            _mm256_storeu_ps(right[k] + j, widen(b + k * QS_HALF_NR + j));
        }
    }
    for (int i = 0; i < QS_HALF_MR; i++, y += QS_HALF_NR) {
        for (int j = 0; j < QS_HALF_NR; j += VECTORS * LANES) {
            __m256 sum[VECTORS] = {{0}};
            for (int64_t k = 0; k < depth; k++) {
                const __m256 x = _mm256_set1_ps(left[k][i]);
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++) {
                    const __m256 w = _mm256_loadu_ps(right[k] + j + v * LANES);
                    sum[v] = add_to_half(_mm256_mul_ps(x, w), sum[v]);
                }
            }
            for (int v = 0; v < VECTORS; v++) {
                float *to = y + j + v * LANES;
                const __m256 by = _mm256_loadu_ps(scale + j + v * LANES);
                _mm256_storeu_ps(to, _mm256_fmadd_ps(sum[v], by, _mm256_loadu_ps(to)));
            }
        }
    }
}

static void avx2_tile(int64_t depth, const uint16_t *a, const uint16_t *b, const float *scale,
                      float *y)
{
    for (int64_t k = 0; k < depth; k += QS_HALF_STRETCH, scale += QS_HALF_NR) {
        const int64_t here = depth - k < QS_HALF_STRETCH ? depth - k : QS_HALF_STRETCH;
        stretch(here, a + k * QS_HALF_MR, b + k * QS_HALF_NR, scale, y);
    }
}

static void avx2_pack(const float *const x[QS_HALF_MR], const float *scale, int64_t count,
                      uint16_t *out)
{
    for (int64_t k = 0; k < count; k++) {
        float column[QS_HALF_MR];
        for (int i = 0; i < QS_HALF_MR; i++) {
            column[i] = x[i] == NULL ? 0.0F : x[i][k] * scale[i];
        }
        narrow(out + k * QS_HALF_MR, _mm256_loadu_ps(column));
    }
}

/* The 16 halves of a block. */
static inline void values(float factor, uint16_t table[16])
{
    narrow(table, _mm256_mul_ps(_mm256_loadu_ps(qs_nf4_code), _mm256_set1_ps(factor)));
    narrow(table + LANES,
           _mm256_mul_ps(_mm256_loadu_ps(qs_nf4_code + LANES), _mm256_set1_ps(factor)));
}

static void avx2_decode_columns(const uint8_t *const packed[QS_HALF_GROUP], uint16_t *out)
{
    uint16_t table[16];
    values(1.0F, table);
    for (int j = 0; j < QS_HALF_GROUP; j++) {
        for (int k = 0; k < QS_NF4_BLOCK / 2; k++) {
            const bool there = packed[j] != NULL;
            out[2 * k * QS_HALF_NR + j] = there ? table[packed[j][k] >> 4] : 0;
            out[(2 * k + 1) * QS_HALF_NR + j] = there ? table[packed[j][k] & 15] : 0;
        }
    }
}

static void avx2_decode_row(const uint8_t *packed, float factor, uint16_t *out)
{
    uint16_t table[16];
    values(factor, table);
    for (int k = 0; k < QS_HALF_GROUP / 2; k++) {
        out[2 * k] = table[packed[k] >> 4];
        out[2 * k + 1] = table[packed[k] & 15];
    }
}

const qs_half *qs_half_avx2(void)
{
    static const qs_half table = {.name = "avx2",
                                  .tile = avx2_tile,
                                  .pack = avx2_pack,
                                  .decode_columns = avx2_decode_columns,
                                  .decode_row = avx2_decode_row};
    return &table;
}

#else

const qs_half *qs_half_avx2(void)
{
    return NULL;
}

#endif
