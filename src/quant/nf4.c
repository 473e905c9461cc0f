/* NF4: constants, the two levels of the quantizer, and the scalar decode of an absmax. */
#include "quant/nf4.h"

#include <float.h>
#include <math.h>
#include <string.h>

const float qs_nf4_code[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

/* (code[i] + code[i + 1]) / 2, the sum rounded to fp32: the same bits as the constants of the CUDA
 * decision tree. */
const float qs_nf4_threshold[15] = {
    (-1.0f + -0.6961928009986877f) / 2.0f,
    (-0.6961928009986877f + -0.5250730514526367f) / 2.0f,
    (-0.5250730514526367f + -0.39491748809814453f) / 2.0f,
    (-0.39491748809814453f + -0.28444138169288635f) / 2.0f,
    (-0.28444138169288635f + -0.18477343022823334f) / 2.0f,
    (-0.18477343022823334f + -0.09105003625154495f) / 2.0f,
    (-0.09105003625154495f + 0.0f) / 2.0f,
    (0.0f + 0.07958029955625534f) / 2.0f,
    (0.07958029955625534f + 0.16093020141124725f) / 2.0f,
    (0.16093020141124725f + 0.24611230194568634f) / 2.0f,
    (0.24611230194568634f + 0.33791524171829224f) / 2.0f,
    (0.33791524171829224f + 0.44070982933044434f) / 2.0f,
    (0.44070982933044434f + 0.5626170039176941f) / 2.0f,
    (0.5626170039176941f + 0.7229568362236023f) / 2.0f,
    (0.7229568362236023f + 1.0f) / 2.0f,
};

int64_t qs_nf4_quanta(int64_t count)
{
    return (count + QS_NF4_QUANTUM - 1) / QS_NF4_QUANTUM;
}

uint8_t qs_nf4_encode(float value, float inverse_absmax)
{
    float y = value * inverse_absmax;
    int code = 0;
    for (int i = 0; i < 15; i++) {
        code += y > qs_nf4_threshold[i];
    }
    return (uint8_t)code;
}

/* 1 / absmax, kept finite: for a denormal absmax the quotient overflows, and 0 * infinity would
 * turn zeros into code 0. */
static float inverse_of(float absmax)
{
    return fminf(1.0f / absmax, FLT_MAX);
}

static float largest_magnitude(const float *x, int64_t count)
{
    float largest = 0.0f;
    for (int64_t i = 0; i < count; i++) {
        float a = fabsf(x[i]);
        largest = a > largest ? a : largest;
    }
    return largest;
}

/* One block of at most 64 values. Codes first, nibbles second, so that the compiler vectorizes both
 * loops. */
static void quantize_block(const float *x, int64_t count, float absmax, uint8_t *packed)
{
    uint8_t code[QS_NF4_BLOCK];
    float inverse = inverse_of(absmax);
    for (int64_t i = 0; i < count; i++) {
        code[i] = qs_nf4_encode(x[i], inverse);
    }
    if (count % 2 != 0) {
        code[count] = QS_NF4_ZERO_BYTE & 0xF;
    }
    for (int64_t i = 0; i < (count + 1) / 2; i++) {
        packed[i] = (uint8_t)(code[2 * i] << 4 | code[2 * i + 1]);
    }
}

int64_t qs_nf4_quantize_blocks(const float *x, int64_t count, uint8_t *packed, float *absmax)
{
    int64_t zero_blocks = 0;
    for (int64_t first = 0; first < count; first += QS_NF4_BLOCK) {
        int64_t n = count - first < QS_NF4_BLOCK ? count - first : QS_NF4_BLOCK;
        float largest = largest_magnitude(x + first, n);
        absmax[first / QS_NF4_BLOCK] = largest;
        if (largest > 0.0f) {
            quantize_block(x + first, n, largest, packed + first / 2);
        } else {
            memset(packed + first / 2, QS_NF4_ZERO_BYTE, (size_t)((n + 1) / 2));
            zero_blocks++;
        }
    }
    return zero_blocks;
}

/* Nearest entry of the dynamic map, ties to the lower. The midpoint of two neighbours is exact in
 * double. */
static uint8_t nearest_in_map(float y)
{
    int low = 0;
    int high = 255;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (y >= qs_dynamic_map[middle]) {
            low = middle;
        } else {
            high = middle;
        }
    }
    double border = ((double)qs_dynamic_map[low] + (double)qs_dynamic_map[high]) / 2.0;
    return (uint8_t)((double)y > border ? high : low);
}

void qs_nf4_quantize_absmax(const float *absmax, int64_t n_blocks, float offset, uint8_t *absmax8,
                            float *absmax32)
{
    for (int64_t first = 0; first < n_blocks; first += QS_NF4_QUANTUM_BLOCKS) {
        int64_t n =
            n_blocks - first < QS_NF4_QUANTUM_BLOCKS ? n_blocks - first : QS_NF4_QUANTUM_BLOCKS;
        float largest = 0.0f;
        for (int64_t i = first; i < first + n; i++) {
            float a = fabsf(absmax[i] - offset);
            largest = a > largest ? a : largest;
        }
        absmax32[first / QS_NF4_QUANTUM_BLOCKS] = largest;
        float inverse = inverse_of(largest); /* all equal to the offset: 0 * FLT_MAX is entry 0 */
        for (int64_t i = first; i < first + n; i++) {
            absmax8[i] = nearest_in_map((absmax[i] - offset) * inverse);
        }
    }
}

float qs_nf4_absmax(const float *map, uint8_t absmax8, float absmax32, float offset)
{
    float scaled = map[absmax8] * absmax32;
    return scaled + offset;
}
