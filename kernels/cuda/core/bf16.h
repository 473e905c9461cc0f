/* bf16 as the kernels move it: 16 bits, the upper half of a float. Conversion rounds to nearest
 * even; a NaN stays one. */
#ifndef QS_KERNELS_CUDA_CORE_BF16_H
#define QS_KERNELS_CUDA_CORE_BF16_H

#include <string.h>

#include "kernels/cuda/core/hd.h"

typedef struct {
    uint16_t bits;
} qs_bf16;

QS_HD uint32_t qs_hd_float_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

QS_HD float qs_hd_bits_float(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

QS_HD float qs_bf16_to_f32(qs_bf16 value)
{
    return qs_hd_bits_float((uint32_t)value.bits << 16);
}

QS_HD qs_bf16 qs_bf16_round(float value)
{
    const uint32_t bits = qs_hd_float_bits(value);
    qs_bf16 out;
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        out.bits = (uint16_t)((bits >> 16) | 0x40u); /* quiet */
    } else {
        out.bits = (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    }
    return out;
}

/** Two floats to one word of two bf16, `low` in the lower half. */
QS_HD uint32_t qs_bf16_pair(float low, float high)
{
    return (uint32_t)qs_bf16_round(low).bits | ((uint32_t)qs_bf16_round(high).bits << 16);
}

#endif
