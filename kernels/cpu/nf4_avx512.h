/* NF4 in AVX-512 registers, for the files that are compiled for it. */
#ifndef QS_KERNELS_CPU_NF4_AVX512_H
#define QS_KERNELS_CPU_NF4_AVX512_H

#include <immintrin.h>

#include "quant/nf4.h"

/* The 16 values of a block. Rounding to bf16 is done in integers as in qs_bf16_from_f32; NaN, which
 * would need more, is the caller's. */
static inline __m512 qs_nf4_values(float absmax, qs_dtype dtype)
{
    __m512 value = _mm512_mul_ps(_mm512_loadu_ps(qs_nf4_code), _mm512_set1_ps(absmax));
    if (dtype == QS_BF16) {
        __m512i bits = _mm512_castps_si512(value);
        __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
        return _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32((int)0xFFFF0000U)));
    }
    if (dtype == QS_F16) {
        return _mm512_cvtph_ps(_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
    }
    return value;
}

#endif
