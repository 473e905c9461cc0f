/* The bf16 product for AVX512-BF16: register tile 14 x 32, 28 sums of 16 lanes, two of W, one of X.
 * A vdpbf16ps does twice the work of a fused multiply-add in fp32, and takes as long on AMD's Zen 5
 * (measured: docs/performance.md), but four times as long on Intel's Sapphire Rapids. */
#include "kernels/cpu/pairs.h"

#include <stddef.h>

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__F16C__)
#include <immintrin.h>
#include <math.h>

#include "kernels/cpu/flush.h"
#include "kernels/cpu/nf4_avx512.h"

#define PAIRS_NAME "avx512bf16"
#define PAIRS_TABLE qs_pairs_avx512
#define pairs_begin qs_flush_begin
#define pairs_end qs_flush_end
#define TILE_MR 14
#define TILE_NV 2
#define TILE_LANES 16

typedef __m512 vec;
typedef __m512i tile_elems;

#define vec_load(p) _mm512_loadu_ps(p)
#define vec_store(p, v) _mm512_storeu_ps(p, v)
#define vec_zero() _mm512_setzero_ps()
#define vec_add(a, b) _mm512_add_ps(a, b)
#define add_one(a, b) ((a) + (b))
#define tile_load(p) _mm512_loadu_si512(p)
#define tile_splat(x) _mm512_set1_epi32((int)(x))
#define tile_fma(left, right, sum) _mm512_dpbf16_ps(sum, (__m512bh)(right), (__m512bh)(left))

/* The words of 32 floats, of which the first `there` exist. */
static inline __m512i words_of(const float *x, __mmask32 there)
{
    const __m512 low = _mm512_maskz_loadu_ps((__mmask16)there, x);
    const __m512 high = _mm512_maskz_loadu_ps((__mmask16)(there >> 16), x + 16);
    return _mm512_rol_epi32((__m512i)_mm512_cvtne2ps_pbh(high, low), 16);
}

static void pairs_round(const float *x, int64_t count, uint32_t *out)
{
    for (; count >= 32; count -= 32, x += 32, out += 16) {
        _mm512_storeu_si512(out, words_of(x, UINT32_MAX));
    }
    if (count > 0) {
        const __mmask16 words = (__mmask16)((1U << (count + 1) / 2) - 1U);
        _mm512_mask_storeu_epi32(out, words, words_of(x, (1U << count) - 1U));
    }
}

/* A byte is a word: its high nibble, the earlier code, to the upper half. The permutation looks at
 * five bits, so it has the 16 values twice. */
static inline void nf4_block(const uint8_t *packed, float absmax, qs_dtype dtype, uint32_t *out)
{
    const __m512i values =
        _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(qs_nf4_values(absmax, dtype)));
    for (int half = 0; half < 2; half++, packed += 16, out += 16) {
        const __m512i bytes =
            _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(const void *)packed));
        const __m512i codes = _mm512_or_epi32(bytes, _mm512_slli_epi32(bytes, 12));
        _mm512_storeu_si512(out, _mm512_permutexvar_epi16(codes, values));
    }
}

static void pairs_nf4_blocks(const uint8_t *packed, const float *absmax, int64_t blocks,
                             qs_dtype dtype, uint32_t *out)
{
    for (int64_t i = 0; i < blocks; i++) {
        const uint8_t *from = packed + i * (QS_NF4_BLOCK / 2);
        uint32_t *to = out + i * (QS_NF4_BLOCK / 2);
        if (isfinite(absmax[i])) {
            nf4_block(from, absmax[i], dtype, to);
        } else {
            qs_pairs_nf4_by_floats(qs_isa_portable(), from, absmax + i, 1, dtype, to);
        }
    }
}

#include "kernels/cpu/pairs_template.h"

#else

const qs_pairs *qs_pairs_avx512(void)
{
    return NULL;
}

#endif
