/* The inner loops for AVX-512 (F, BW, VL): register tile 14 x 32, 28 sums of 16 lanes, two of W,
 * one of x. */
#include "kernels/cpu/isa.h"

#include <stddef.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#include <math.h>

#include "kernels/cpu/nf4_avx512.h"

#define ISA_NAME "avx512"
#define ISA_TABLE qs_isa_avx512
#define ISA_MR 14
#define ISA_NV 2
#define VEC_LANES 16

typedef __m512 vec;

#define vec_load(p) _mm512_loadu_ps(p)
#define vec_store(p, v) _mm512_storeu_ps(p, v)
#define vec_zero() _mm512_setzero_ps()
#define vec_splat(x) _mm512_set1_ps(x)
#define vec_add(a, b) _mm512_add_ps(a, b)
#define vec_fma(a, b, c) _mm512_fmadd_ps(a, b, c)

/* 16 x 16 in registers: pairs, quads, then 128-bit lanes twice. */
static inline void transpose16(__m512 r[16])
{
    __m512 pair[16], quad[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        pair[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        pair[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        quad[4 * i] = _mm512_shuffle_ps(pair[4 * i], pair[4 * i + 2], 0x44);
        quad[4 * i + 1] = _mm512_shuffle_ps(pair[4 * i], pair[4 * i + 2], 0xEE);
        quad[4 * i + 2] = _mm512_shuffle_ps(pair[4 * i + 1], pair[4 * i + 3], 0x44);
        quad[4 * i + 3] = _mm512_shuffle_ps(pair[4 * i + 1], pair[4 * i + 3], 0xEE);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m512 even_low = _mm512_shuffle_f32x4(quad[i], quad[i + 4], 0x88);
        __m512 odd_low = _mm512_shuffle_f32x4(quad[i], quad[i + 4], 0xDD);
        __m512 even_high = _mm512_shuffle_f32x4(quad[i + 8], quad[i + 12], 0x88);
        __m512 odd_high = _mm512_shuffle_f32x4(quad[i + 8], quad[i + 12], 0xDD);
        r[i] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
        r[i + 4] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
        r[i + 8] = _mm512_shuffle_f32x4(even_low, even_high, 0xDD);
        r[i + 12] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xDD);
    }
}

static void isa_transpose(const float *src, int64_t src_stride, int rows, int64_t count, float *dst,
                          int64_t dst_stride, int lanes)
{
    const __mmask16 kept = (__mmask16)((1U << lanes) - 1U);
    for (int64_t k = 0; k < count; k += 16) {
        int64_t left = count - k < 16 ? count - k : 16;
        const __mmask16 there = (__mmask16)((1U << left) - 1U);
        __m512 r[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            r[i] = i < rows ? _mm512_maskz_loadu_ps(there, src + i * src_stride + k)
                            : _mm512_setzero_ps();
        }
        transpose16(r);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            if (i < left) {
                _mm512_mask_storeu_ps(dst + (k + i) * dst_stride, kept, r[i]);
            }
        }
    }
}

/* They are scaled and rounded once, and the 64 codes look them up, sixteen codes from eight bytes
 * at a time: a byte in each 64-bit lane, its high nibble to the lower half, the byte itself to the
 * upper; the permutation looks at the low four bits only. */
static inline void isa_nf4_block(const uint8_t *packed, float absmax, qs_dtype dtype, float *out)
{
    if (!isfinite(absmax)) {
        qs_isa_portable()->nf4_decode(packed, &absmax, 1, dtype, out);
        return;
    }
    const __m512 values = qs_nf4_values(absmax, dtype);
    for (int i = 0; i < QS_NF4_BLOCK / 16; i++) {
        __m128i bytes = _mm_loadl_epi64((const __m128i *)(const void *)(packed + 8 * i));
        __m512i wide = _mm512_cvtepu8_epi64(bytes);
        __m512i code = _mm512_or_epi64(_mm512_slli_epi64(wide, 32), _mm512_srli_epi64(wide, 4));
        _mm512_storeu_ps(out + 16 * i, _mm512_permutexvar_ps(code, values));
    }
}

static inline void isa_widen_f16(const uint8_t *src, int64_t count, float *out)
{
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        __m256i half = _mm256_loadu_si256((const __m256i *)(const void *)(src + 2 * i));
        _mm512_storeu_ps(out + i, _mm512_cvtph_ps(half));
    }
    qs_f32_load(out + i, src + 2 * i, QS_F16, count - i);
}

#define ISA_LANES 16
#define isa_max(a, b) ((lanes)_mm512_max_ps((__m512)(a), (__m512)(b)))
#define isa_min(a, b) ((lanes)_mm512_min_ps((__m512)(a), (__m512)(b)))
#define isa_fma(a, b, c) ((lanes)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))

/* Products of the lower halves of eight 64-bit lanes. */
#define isa_mul_even(a, b) ((lanes_u64)_mm512_mul_epu32((__m512i)(a), (__m512i)(b)))

/* Upper half to the lower, down to one lane. */
static inline float isa_fold(__m512 v)
{
    __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), upper);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

#include "kernels/cpu/isa_template.h"

#else

const qs_isa *qs_isa_avx512(void)
{
    return NULL;
}

#endif
