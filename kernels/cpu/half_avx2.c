/* The fp16 product's tile on AVX2: the bits of half.c, five to ten times faster, for tests and for
 * loss curves on CPUs without AVX512-FP16. No one trains with it: strict is faster still. Packing
 * and decoding are half.c's: a few percent of the tiles' time. */
#include <stddef.h>

#include "kernels/cpu/half.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>

enum { LANES = 8, VECTORS = 4 /* sums of a row that are under way together */ };

static inline __m256 widen(const uint16_t *half)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)half));
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
    qs_half_by_stretches(stretch, depth, a, b, scale, y);
}

const qs_half *qs_half_avx2(void)
{
    static const qs_half table = {.name = "avx2",
                                  .tile = avx2_tile,
                                  .pack = qs_half_pack,
                                  .decode_columns = qs_half_decode_columns,
                                  .decode_row = qs_half_decode_row};
    return &table;
}

#else

const qs_half *qs_half_avx2(void)
{
    return NULL;
}

#endif
