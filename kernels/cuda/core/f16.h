/* fp16 in integer arithmetic, for tables that are stored so: widening is exact. */
#ifndef QS_KERNELS_CUDA_CORE_F16_H
#define QS_KERNELS_CUDA_CORE_F16_H

#include "kernels/cuda/core/bf16.h"

typedef struct {
    uint16_t bits;
} qs_f16;

/** 1 sign, 5 exponent (bias 15) and 10 mantissa bits to 1, 8 (bias 127) and 23. */
QS_HD float qs_f16_to_f32(qs_f16 value)
{
    const uint32_t sign = (uint32_t)(value.bits & 0x8000u) << 16;
    const uint32_t magnitude = value.bits & 0x7fffu;
    uint32_t out;
    if (magnitude >= 0x7c00u) { /* infinity, NaN */
        out = 0x7f800000u | (magnitude & 0x3ffu) << 13;
    } else if (magnitude >= 0x0400u) {
        out = (magnitude << 13) + ((127u - 15u) << 23);
    } else { /* subnormal: a multiple of 2^-24, 1 / 16777216 */
        out = qs_hd_float_bits((float)magnitude * (1.0f / 16777216.0f));
    }
    return qs_hd_bits_float(sign | out);
}

#endif
