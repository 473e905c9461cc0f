/* The inner loops for AVX2 with FMA and F16C: register tile 6 x 16, 12 sums of 8 lanes. */
#include "kernels/cpu/isa.h"

#include <stddef.h>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "quant/nf4.h"

#define ISA_NAME "avx2"
#define ISA_TABLE qs_isa_avx2
#define ISA_MR 6
#define ISA_NV 2
#define VEC_LANES 8

typedef __m256 vec;

#define vec_load(p) _mm256_loadu_ps(p)
#define vec_store(p, v) _mm256_storeu_ps(p, v)
#define vec_zero() _mm256_setzero_ps()
#define vec_splat(x) _mm256_set1_ps(x)
#define vec_add(a, b) _mm256_add_ps(a, b)
#define vec_fma(a, b, c) _mm256_fmadd_ps(a, b, c)

/* 8 x 8 in registers. */
static inline void transpose8(__m256 r[8])
{
    __m256 pair[8], quad[8];
    for (int i = 0; i < 4; i++) {
        pair[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        pair[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++) {
        quad[4 * i] = _mm256_shuffle_ps(pair[4 * i], pair[4 * i + 2], 0x44);
        quad[4 * i + 1] = _mm256_shuffle_ps(pair[4 * i], pair[4 * i + 2], 0xEE);
        quad[4 * i + 2] = _mm256_shuffle_ps(pair[4 * i + 1], pair[4 * i + 3], 0x44);
        quad[4 * i + 3] = _mm256_shuffle_ps(pair[4 * i + 1], pair[4 * i + 3], 0xEE);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x20);
        r[i + 4] = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x31);
    }
}

/* The first `lanes`. Not _mm256_maskstore_ps: on AMD's CPUs that is 20 operations. */
static inline __attribute__((always_inline)) void store_first(float *dst, __m256 v, int lanes)
{
    if (lanes == 8) {
        _mm256_storeu_ps(dst, v);
        return;
    }
    __m128 part = _mm256_castps256_ps128(v);
    if (lanes & 4) {
        _mm_storeu_ps(dst, part);
        part = _mm256_extractf128_ps(v, 1);
        dst += 4;
    }
    if (lanes & 2) {
        _mm_storel_pi((__m64 *)(void *)dst, part);
        part = _mm_movehl_ps(part, part);
        dst += 2;
    }
    if (lanes & 1) {
        _mm_store_ss(dst, part);
    }
}

/* Eight of the lanes; constants where it matters. */
static inline __attribute__((always_inline)) void transpose_half(const float *src,
                                                                 int64_t src_stride, int rows,
                                                                 int64_t count, float *dst,
                                                                 int64_t dst_stride, int lanes)
{
    int64_t k = 0;
    for (; k + 8 <= count; k += 8) {
        __m256 r[8];
        for (int i = 0; i < 8; i++) {
            r[i] = i < rows ? _mm256_loadu_ps(src + i * src_stride + k) : _mm256_setzero_ps();
        }
        transpose8(r);
        for (int i = 0; i < 8; i++) {
            store_first(dst + (k + i) * dst_stride, r[i], lanes);
        }
    }
    for (; k < count; k++) {
        for (int i = 0; i < lanes; i++) {
            dst[k * dst_stride + i] = i < rows ? src[i * src_stride + k] : 0.0F;
        }
    }
}

static void transpose_lanes(const float *src, int64_t src_stride, int rows, int64_t count,
                            float *dst, int64_t dst_stride, int lanes)
{
    if (lanes == 8 && rows == 8) {
        transpose_half(src, src_stride, 8, count, dst, dst_stride, 8);
    } else if (lanes == ISA_MR && rows == ISA_MR) {
        transpose_half(src, src_stride, ISA_MR, count, dst, dst_stride, ISA_MR);
    } else {
        transpose_half(src, src_stride, rows, count, dst, dst_stride, lanes);
    }
}

static void isa_transpose(const float *src, int64_t src_stride, int rows, int64_t count, float *dst,
                          int64_t dst_stride, int lanes)
{
    transpose_lanes(src, src_stride, rows < 8 ? rows : 8, count, dst, dst_stride,
                    lanes < 8 ? lanes : 8);
    if (lanes > 8) {
        transpose_lanes(rows > 8 ? src + 8 * src_stride : src, src_stride, rows > 8 ? rows - 8 : 0,
                        count, dst + 8, dst_stride, lanes - 8);
    }
}

/* Half of a block's 16 values. Rounding to bf16 is done in integers as in qs_bf16_from_f32; NaN,
 * which would need more, is the caller's. */
static inline __m256 nf4_values(const float *code, float absmax, qs_dtype dtype)
{
    __m256 value = _mm256_mul_ps(_mm256_loadu_ps(code), _mm256_set1_ps(absmax));
    if (dtype == QS_BF16) {
        __m256i bits = _mm256_castps_si256(value);
        __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        bits = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
        return _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32((int)0xFFFF0000U)));
    }
    if (dtype == QS_F16) {
        return _mm256_cvtph_ps(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
    }
    return value;
}

/* A block has 16 possible values: they are scaled and rounded once, and the 64 codes look them up,
 * eight codes from four bytes at a time; bit 3 of a code picks the upper half of the table. */
static inline void isa_nf4_block(const uint8_t *packed, float absmax, qs_dtype dtype, float *out)
{
    if (!isfinite(absmax)) {
        qs_isa_portable()->nf4_decode(packed, &absmax, 1, dtype, out);
        return;
    }
    const __m256 lower = nf4_values(qs_nf4_code, absmax, dtype);
    const __m256 upper = nf4_values(qs_nf4_code + 8, absmax, dtype);
    const __m256i shift = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
    for (int i = 0; i < QS_NF4_BLOCK / 8; i++) {
        int bytes;
        memcpy(&bytes, packed + 4 * i, sizeof bytes);
        __m256i code = _mm256_srlv_epi32(_mm256_set1_epi32(bytes), shift);
        __m256 low = _mm256_permutevar8x32_ps(lower, code);
        __m256 high = _mm256_permutevar8x32_ps(upper, code);
        __m256 pick = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));
        _mm256_storeu_ps(out + 8 * i, _mm256_blendv_ps(low, high, pick));
    }
}

static inline void isa_widen_f16(const uint8_t *src, int64_t count, float *out)
{
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        __m128i half = _mm_loadu_si128((const __m128i *)(const void *)(src + 2 * i));
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(half));
    }
    qs_f32_load(out + i, src + 2 * i, QS_F16, count - i);
}

#define ISA_LANES 8
#define isa_max(a, b) ((lanes)_mm256_max_ps((__m256)(a), (__m256)(b)))
#define isa_min(a, b) ((lanes)_mm256_min_ps((__m256)(a), (__m256)(b)))
#define isa_fma(a, b, c) ((lanes)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))

/* Products of the lower halves of four 64-bit lanes. */
#define isa_mul_even(a, b) ((lanes_u64)_mm256_mul_epu32((__m256i)(a), (__m256i)(b)))

/* Upper half to the lower, down to one lane. */
static inline float isa_fold(__m256 v)
{
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

#include "kernels/cpu/isa_template.h"

#else

const qs_isa *qs_isa_avx2(void)
{
    return NULL;
}

#endif
