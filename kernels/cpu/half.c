/* Choice of the table, and the portable one: the definition of the bits. */
#include "kernels/cpu/half.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "base/dtype.h"
#include "kernels/cpu/choice.h"
#include "kernels/cpu/isa.h"
#include "quant/nf4.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

/* ---- portable ---- */

/* The half nearest to `value`, ties to even, as a double. Adding 1.5 * 2^52 units of the half's
 * last place and taking them away again leaves a multiple of that unit, rounded once. */
static inline double round_to_half(double value)
{
    const uint64_t hidden = 52, bias = 1023, half_least = bias - 14, half_most = bias + 16;
    uint64_t bits, exponent;
    memcpy(&bits, &value, sizeof bits);
    exponent = bits >> hidden & 0x7FF;
    exponent = exponent < half_least ? half_least : exponent;
    exponent = exponent > half_most ? half_most : exponent;
    const uint64_t shift_bits = (exponent - 10 + hidden) << hidden | UINT64_C(1) << (hidden - 1);
    double shift, rounded;
    memcpy(&shift, &shift_bits, sizeof shift);
    rounded = copysign((value + shift) - shift, value);
    return fabs(rounded) > 65504.0 ? copysign(HUGE_VAL, value) : rounded;
}

/* Products of two halves are exact in double, and so is their sum with a half wherever that could
 * change what it rounds to: a tie needs both within 2^53 of each other. */
static void stretch(int64_t depth, const uint16_t *a, const uint16_t *b, const float *scale,
                    float *y)
{
    double sum[QS_HALF_MR][QS_HALF_NR] = {{0}};
    for (int64_t k = 0; k < depth; k++) {
        double row[QS_HALF_NR];
        for (int j = 0; j < QS_HALF_NR; j++) {
            row[j] = (double)qs_f32_from_f16(b[k * QS_HALF_NR + j]);
        }
        for (int i = 0; i < QS_HALF_MR; i++) {
            const double left = (double)qs_f32_from_f16(a[k * QS_HALF_MR + i]);
            for (int j = 0; j < QS_HALF_NR; j++) {
                sum[i][j] = round_to_half(left * row[j] + sum[i][j]);
            }
        }
    }
    for (int i = 0; i < QS_HALF_MR; i++) {
        for (int j = 0; j < QS_HALF_NR; j++) {
            float *to = y + (int64_t)i * QS_HALF_NR + j;
            *to = fmaf((float)sum[i][j], scale[j], *to);
        }
    }
}

static void portable_tile(int64_t depth, const uint16_t *a, const uint16_t *b, const float *scale,
                          float *y)
{
    qs_half_by_stretches(stretch, depth, a, b, scale, y);
}

void qs_half_pack(const float *const x[QS_HALF_MR], const float *scale, int64_t count,
                  uint16_t *out)
{
    for (int i = 0; i < QS_HALF_MR; i++) {
        for (int64_t k = 0; k < count; k++) {
            out[k * QS_HALF_MR + i] = x[i] == NULL ? 0 : qs_f16_from_f32(x[i][k] * scale[i]);
        }
    }
}

enum { CODES = 16 };

/* half(code * factor) of each code: whoever decodes a block rounds 16 values, not all of its. */
static void values_of(float factor, uint16_t half[CODES])
{
    for (int code = 0; code < CODES; code++) {
        half[code] = qs_f16_from_f32(qs_nf4_code[code] * factor);
    }
}

void qs_half_decode_columns(const uint8_t *const packed[QS_HALF_GROUP], uint16_t *out)
{
    uint16_t half[CODES];
    values_of(1.0F, half);
    for (int j = 0; j < QS_HALF_GROUP; j++) {
        for (int k = 0; k < QS_NF4_BLOCK; k += 2) {
            const uint8_t two = packed[j] == NULL ? QS_NF4_ZERO_BYTE : packed[j][k / 2];
            out[k * QS_HALF_NR + j] = half[two >> 4];
            out[(k + 1) * QS_HALF_NR + j] = half[two & 15];
        }
    }
}

void qs_half_decode_row(const uint8_t *packed, float factor, uint16_t *out)
{
    uint16_t half[CODES];
    values_of(factor, half);
    for (int j = 0; j < QS_HALF_GROUP; j += 2) {
        out[j] = half[packed[j / 2] >> 4];
        out[j + 1] = half[packed[j / 2] & 15];
    }
}

const qs_half *qs_half_portable(void)
{
    static const qs_half table = {.name = "portable",
                                  .tile = portable_tile,
                                  .pack = qs_half_pack,
                                  .decode_columns = qs_half_decode_columns,
                                  .decode_row = qs_half_decode_row};
    return &table;
}

/* ---- choice ---- */

bool qs_half_supported(void)
{
#if defined(__x86_64__)
    enum { FP16 = 1U << 23 }; /* leaf 7, EDX */
    /* 0: not yet, else 1 + the answer. Under a hypervisor cpuid takes long. */
    static _Atomic int known;
    if (known == 0) {
        unsigned a, b, c, d;
        known = 1 + (qs_half_avx512() != NULL && qs_isa_runs("avx512") &&
                     __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & FP16) != 0);
    }
    return known == 2;
#else
    return false;
#endif
}

/* By name, NULL if there is none or this CPU cannot run it. */
static const void *find(const char *name)
{
    if (strcmp(name, "avx512fp16") == 0) {
        return qs_half_supported() ? qs_half_avx512() : NULL;
    }
    if (strcmp(name, "avx2") == 0) {
        return qs_isa_runs("avx2") ? qs_half_avx2() : NULL;
    }
    return strcmp(name, "portable") == 0 ? qs_half_portable() : NULL;
}

static qs_choice choice = {
    .variable = "QSHARD_CPU_FP16", .names = {"avx512fp16", "avx2", "portable"}, .find = find};

const qs_half *qs_half_get(void)
{
    return qs_choice_get(&choice);
}

bool qs_half_force(const char *name)
{
    return qs_choice_force(&choice, name);
}
