/* NF4's quantizer as the kernels compute it: the same operations in the same order as
 * src/quant/nf4.c, which says why each is so (Dettmers et al. 2023, arXiv:2305.14314, app. E). */
#ifndef QS_KERNELS_CUDA_CORE_NF4_ENCODE_H
#define QS_KERNELS_CUDA_CORE_NF4_ENCODE_H

#include <float.h>

#include "kernels/cuda/core/bf16.h"
#include "kernels/cuda/core/hd.h"

enum {
    QS_ENCODE_BLOCK = 64, /* elements that share an absmax */
    QS_ENCODE_LANE = 8,   /* of them a lane takes: 4 packed bytes */
    QS_ENCODE_LANES = QS_ENCODE_BLOCK / QS_ENCODE_LANE,
    QS_ENCODE_GROUP = 256, /* absmax that share a nested one */
    QS_ENCODE_MAP = 256,   /* entries of the second level's map */
};

/** The second level's map, ascending; a kernel gets it by value. */
typedef struct {
    float value[QS_ENCODE_MAP];
} qs_encode_map;

/** Code of a value that was divided by its absmax: how many thresholds it exceeds. A NaN exceeds
 * none. */
QS_HD uint32_t qs_encode_code(float y)
{
    uint32_t code = 0;
    code += y > (-1.0f + -0.6961928009986877f) / 2.0f;
    code += y > (-0.6961928009986877f + -0.5250730514526367f) / 2.0f;
    code += y > (-0.5250730514526367f + -0.39491748809814453f) / 2.0f;
    code += y > (-0.39491748809814453f + -0.28444138169288635f) / 2.0f;
    code += y > (-0.28444138169288635f + -0.18477343022823334f) / 2.0f;
    code += y > (-0.18477343022823334f + -0.09105003625154495f) / 2.0f;
    code += y > (-0.09105003625154495f + 0.0f) / 2.0f;
    code += y > (0.0f + 0.07958029955625534f) / 2.0f;
    code += y > (0.07958029955625534f + 0.16093020141124725f) / 2.0f;
    code += y > (0.16093020141124725f + 0.24611230194568634f) / 2.0f;
    code += y > (0.24611230194568634f + 0.33791524171829224f) / 2.0f;
    code += y > (0.33791524171829224f + 0.44070982933044434f) / 2.0f;
    code += y > (0.44070982933044434f + 0.5626170039176941f) / 2.0f;
    code += y > (0.5626170039176941f + 0.7229568362236023f) / 2.0f;
    code += y > (0.7229568362236023f + 1.0f) / 2.0f;
    return code;
}

/** |x|, or `largest` if that is larger or x is a NaN. */
QS_HD float qs_encode_larger(float largest, float x)
{
    const float a = qs_hd_bits_float(qs_hd_float_bits(x) & 0x7fffffffu);
    return a > largest ? a : largest;
}

/** 1 / absmax, kept finite. */
QS_HD float qs_encode_inverse(float absmax)
{
    const float inverse = 1.0f / absmax;
    return inverse > FLT_MAX ? FLT_MAX : inverse;
}

/** A lane's 8 values to 4 bytes, the first value in the high nibble of the lowest byte. Values that
 * are not there are 0, which is code 7. `absmax` 0: an all-zero block, 0x77. */
QS_HD uint32_t qs_encode_pack(const float x[QS_ENCODE_LANE], float absmax)
{
    if (!(absmax > 0.0f)) {
        return 0x77777777u;
    }
    const float inverse = qs_encode_inverse(absmax);
    uint32_t packed = 0;
    for (int i = 0; i < QS_ENCODE_LANE; i++) {
        packed |= qs_encode_code(x[i] * inverse) << (8 * (i / 2) + (i % 2 == 0 ? 4 : 0));
    }
    return packed;
}

/** Nearest entry of the map, ties to the lower; the midpoint of two neighbours is exact in fp64. */
QS_HD uint32_t qs_encode_nearest(const float map[QS_ENCODE_MAP], float y)
{
    int low = 0, high = QS_ENCODE_MAP - 1;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (y >= map[middle]) {
            low = middle;
        } else {
            high = middle;
        }
    }
    const double border = ((double)map[low] + (double)map[high]) / 2.0;
    return (uint32_t)((double)y > border ? high : low);
}

#endif
