/* Conversions in integer arithmetic, the same on every machine: the hardware's bf16 instructions
 * flush denormals. */
#include "base/dtype.h"

#include <string.h>
#include <strings.h>

static uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

size_t qs_dtype_bytes(qs_dtype dtype)
{
    switch (dtype) {
    case QS_F32:
    case QS_I32:
        return 4;
    case QS_BF16:
    case QS_F16:
        return 2;
    case QS_U8:
        return 1;
    case QS_I64:
        return 8;
    }
    return 0;
}

const char *qs_dtype_name(qs_dtype dtype)
{
    static const char *const names[] = {[QS_F32] = "f32", [QS_BF16] = "bf16", [QS_F16] = "f16",
                                        [QS_U8] = "u8",   [QS_I32] = "i32",   [QS_I64] = "i64"};
    return (unsigned)dtype < sizeof names / sizeof *names ? names[dtype] : "unknown";
}

int qs_dtype_parse(const char *name)
{
    static const struct {
        const char *name;
        qs_dtype dtype;
    } names[] = {
        {"f32", QS_F32},       {"float32", QS_F32}, {"float", QS_F32},   {"bf16", QS_BF16},
        {"bfloat16", QS_BF16}, {"f16", QS_F16},     {"float16", QS_F16}, {"half", QS_F16},
        {"u8", QS_U8},         {"uint8", QS_U8},    {"i32", QS_I32},     {"int32", QS_I32},
        {"i64", QS_I64},       {"int64", QS_I64},
    };
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (strcasecmp(name, names[i].name) == 0) {
            return (int)names[i].dtype;
        }
    }
    return -1;
}

float qs_f32_from_bf16(uint16_t bits)
{
    return float_of((uint32_t)bits << 16);
}

uint16_t qs_bf16_from_f32(float value)
{
    uint32_t bits = bits_of(value);
    uint32_t nan = (bits >> 16) | 0x40; /* quiet, sign and upper payload kept */
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}

/* f16: 1 sign, 5 exponent (bias 15), 10 mantissa bits; f32: 8 exponent bits (bias 127), 23 mantissa
 * bits. */
float qs_f32_from_f16(uint16_t bits)
{
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16;
    uint32_t magnitude = bits & 0x7fff;
    uint32_t out;
    if (magnitude >= 0x7c00) { /* infinity, NaN */
        out = 0x7f800000 | (magnitude & 0x3ff) << 13;
    } else if (magnitude >= 0x0400) {
        out = (magnitude << 13) + ((127 - 15) << 23);
    } else { /* subnormal: multiples of 2^-24 */
        out = bits_of((float)magnitude * 0x1p-24f);
    }
    return float_of(sign | out);
}

uint16_t qs_f16_from_f32(float value)
{
    uint32_t bits = bits_of(value);
    uint32_t sign = (bits >> 16) & 0x8000;
    uint32_t magnitude = bits & 0x7fffffff;
    uint32_t out;
    if (magnitude > 0x7f800000) { /* NaN, quiet */
        out = 0x7e00 | ((magnitude >> 13) & 0x3ff);
    } else if (magnitude >= 0x477ff000) { /* 65520 and more round past the largest, 65504 */
        out = 0x7c00;
    } else if (magnitude >= 0x38800000) { /* 2^-14, the smallest normal */
        out = (magnitude + 0xfff + ((magnitude >> 13) & 1) - ((127 - 15) << 23)) >> 13;
    } else { /* 0.5 has f16's subnormal spacing 2^-24 as its ulp: the addition rounds */
        out = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
    }
    return (uint16_t)(sign | out);
}

static uint16_t load_u16(const unsigned char *from)
{
    uint16_t bits;
    memcpy(&bits, from, sizeof bits);
    return bits;
}

void qs_f32_load(float *dst, const void *src, qs_dtype dtype, int64_t count)
{
    const unsigned char *from = src;
    if (dtype == QS_BF16) {
        for (int64_t i = 0; i < count; i++) {
            dst[i] = qs_f32_from_bf16(load_u16(from + 2 * i));
        }
    } else if (dtype == QS_F16) {
        for (int64_t i = 0; i < count; i++) {
            dst[i] = qs_f32_from_f16(load_u16(from + 2 * i));
        }
    } else if (count > 0) {
        memmove(dst, src, (size_t)count * sizeof *dst);
    }
}

void qs_f32_store(void *dst, qs_dtype dtype, const float *src, int64_t count)
{
    unsigned char *to = dst;
    if (dtype == QS_BF16) {
        for (int64_t i = 0; i < count; i++) {
            uint16_t bits = qs_bf16_from_f32(src[i]);
            memcpy(to + 2 * i, &bits, sizeof bits);
        }
    } else if (dtype == QS_F16) {
        for (int64_t i = 0; i < count; i++) {
            uint16_t bits = qs_f16_from_f32(src[i]);
            memcpy(to + 2 * i, &bits, sizeof bits);
        }
    } else if (count > 0) {
        memmove(dst, src, (size_t)count * sizeof *src);
    }
}

/* All exponent bits set: infinity or NaN. Integers, so that the loops vectorize. */
static bool finite_32(const uint8_t *x, int64_t count)
{
    uint32_t bad = 0;
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, x + 4 * i, sizeof bits);
        bad |= (bits & 0x7F800000U) == 0x7F800000U;
    }
    return bad == 0;
}

static bool finite_16(const uint8_t *x, int64_t count, uint16_t exponent)
{
    uint16_t bad = 0;
    for (int64_t i = 0; i < count; i++) {
        uint16_t bits;
        memcpy(&bits, x + 2 * i, sizeof bits);
        bad = (uint16_t)(bad | ((bits & exponent) == exponent));
    }
    return bad == 0;
}

bool qs_all_finite(const void *src, qs_dtype dtype, int64_t count)
{
    return dtype == QS_F32 ? finite_32(src, count)
                           : finite_16(src, count, dtype == QS_BF16 ? 0x7F80 : 0x7C00);
}

float qs_f32_round(float value, qs_dtype dtype)
{
    switch (dtype) {
    case QS_BF16:
        return qs_f32_from_bf16(qs_bf16_from_f32(value));
    case QS_F16:
        return qs_f32_from_f16(qs_f16_from_f32(value));
    default:
        return value;
    }
}
