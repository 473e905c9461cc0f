/* Compares the fp16 product's inner loops bit for bit, tiles with the portable ones, packing and
 * decoding with what half.h says of an element: exit 0 if all tables agree, AVX512-FP16's among
 * them, 1 if not, 77 if that one could not be compared and the others agree. Links statically and
 * needs nothing else, so that it can run as the only program of an emulated machine. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/dtype.h"
#include "bit_checks.h"
#include "kernels/cpu/half.h"
#include "kernels/cpu/isa.h"
#include "quant/nf4.h"

enum {
    MR = QS_HALF_MR,
    NR = QS_HALF_NR,
    DEPTH = 4 * QS_HALF_STRETCH,
    SCALES = DEPTH / QS_HALF_STRETCH * NR,
    ROUNDS = 40,
};

/* Halves by kind of round: |.| < 512; small, to subnormal; any finite; any at all. */
static uint16_t some_half(int kind)
{
    const uint32_t any = random_bits();
    const uint16_t sign = any & 0x8000U, fraction = any & 0x3FFU;
    const unsigned spread = any >> 16 & 31U;
    const unsigned exponent = kind == 0   ? spread % 24
                              : kind == 1 ? spread % 4
                              : kind == 2 ? (spread == 31 ? 30 : spread)
                                          : spread;
    return (uint16_t)(sign | exponent << 10 | fraction);
}

static int is_nan(uint16_t half)
{
    return (half & 0x7FFF) > 0x7C00;
}

static int differ_f16(const char *what, int round, const uint16_t *a, const uint16_t *b, int count)
{
    for (int i = 0; i < count; i++) {
        if (a[i] != b[i] && !(is_nan(a[i]) && is_nan(b[i]))) {
            printf("%s, round %d: element %d is %04x, not %04x\n", what, round, i, a[i], b[i]);
            return 1;
        }
    }
    return 0;
}

/* ---- element by element, as half.h has it ---- */

static void plain_pack(const float *const x[MR], const float *scale, int64_t count, uint16_t *out)
{
    for (int64_t k = 0; k < count; k++) {
        for (int i = 0; i < MR; i++) {
            out[k * MR + i] = qs_f16_from_f32(x[i] != NULL ? x[i][k] * scale[i] : 0.0F);
        }
    }
}

static float code_at(const uint8_t *packed, int k)
{
    return qs_nf4_code[k % 2 == 0 ? packed[k / 2] >> 4 : packed[k / 2] & 15];
}

static void plain_decode_columns(const uint8_t *const packed[QS_HALF_GROUP], uint16_t *out)
{
    for (int k = 0; k < QS_NF4_BLOCK; k++) {
        for (int j = 0; j < QS_HALF_GROUP; j++) {
            out[k * NR + j] = qs_f16_from_f32(packed[j] != NULL ? code_at(packed[j], k) : 0.0F);
        }
    }
}

static void plain_decode_row(const uint8_t *packed, float factor, uint16_t *out)
{
    for (int j = 0; j < QS_HALF_GROUP; j++) {
        out[j] = qs_f16_from_f32(code_at(packed, j) * factor);
    }
}

/* ---- comparisons ---- */

static int compare_tiles(const qs_half *fast, const qs_half *slow)
{
    static uint16_t a[DEPTH * MR], b[DEPTH * NR];
    static float scale[SCALES], y[2][MR * NR];
    for (int round = 0; round < ROUNDS; round++) {
        const int kind = round % 4;
        const int64_t depth = round < 4 ? DEPTH : 1 + random_bits() % DEPTH;
        for (int i = 0; i < DEPTH * MR; i++) {
            a[i] = some_half(kind);
        }
        for (int i = 0; i < DEPTH * NR; i++) { /* kind 3: infinities from sums alone, and NaN */
            b[i] = kind == 3 && random_bits() % 2000 != 0 ? some_half(1)
                                                          : some_half(kind == 0 ? 1 : kind);
            b[i] =
                kind == 0 ? (uint16_t)(0x3C00U - random_bits() % 0x2000U) | (b[i] & 0x8000U) : b[i];
        }
        for (int i = 0; i < SCALES; i++) {
            scale[i] = random_float();
        }
        for (int i = 0; i < MR * NR; i++) {
            y[0][i] = y[1][i] = round % 2 == 0 ? 0.0F : random_float();
        }
        fast->tile(depth, a, b, scale, y[0]);
        slow->tile(depth, a, b, scale, y[1]);
        if (differ_f32("tile", round, y[0], y[1], MR * NR)) {
            return 1;
        }
    }
    return 0;
}

static int compare_packs(const qs_half *half)
{
    static float x[MR][QS_HALF_STRETCH];
    static uint16_t out[2][QS_HALF_STRETCH * MR];
    for (int round = 0; round < ROUNDS; round++) {
        const float *rows[MR];
        float scale[MR];
        for (int i = 0; i < MR; i++) {
            rows[i] = random_bits() % 8 == 0 ? NULL : x[i];
            scale[i] = ldexpf(1.0F, (int)(random_bits() % 40) - 20);
            for (int k = 0; k < QS_HALF_STRETCH; k++) {
                const uint32_t any = random_bits();
                if (round % 2 == 0) {
                    x[i][k] = random_float() * 512;
                } else {
                    memcpy(&x[i][k], &any, sizeof any);
                }
            }
        }
        const int64_t count = round < 2 ? QS_HALF_STRETCH : 1 + random_bits() % QS_HALF_STRETCH;
        memset(out, 0x55, sizeof out);
        half->pack(rows, scale, count, out[0]);
        plain_pack(rows, scale, count, out[1]);
        if (differ_f16("pack", round, out[0], out[1], QS_HALF_STRETCH * MR)) {
            return 1;
        }
    }
    return 0;
}

static int compare_decoders(const qs_half *half)
{
    static uint8_t packed[QS_HALF_GROUP][QS_NF4_BLOCK / 2];
    static uint16_t out[2][QS_HALF_STRETCH * NR];
    static const float extremes[] = {0.0F, 1e-40F, 1e-7F, -0.3F, 65519.0F, 3e38F, INFINITY, NAN};
    for (int round = 0; round < ROUNDS; round++) {
        const uint8_t *rows[QS_HALF_GROUP];
        for (int i = 0; i < QS_HALF_GROUP; i++) {
            rows[i] = random_bits() % 8 == 0 ? NULL : packed[i];
            for (int k = 0; k < QS_NF4_BLOCK / 2; k++) {
                packed[i][k] = (uint8_t)(random_bits() >> 8);
            }
        }
        memset(out, 0x55, sizeof out);
        half->decode_columns(rows, out[0]);
        plain_decode_columns(rows, out[1]);
        if (differ_f16("decode_columns", round, out[0], out[1], QS_HALF_STRETCH * NR)) {
            return 1;
        }
        const float factor = round < 8 ? extremes[round] : random_float();
        half->decode_row(packed[0], factor, out[0]);
        plain_decode_row(packed[0], factor, out[1]);
        if (differ_f16("decode_row", round, out[0], out[1], QS_HALF_STRETCH * NR)) {
            return 1;
        }
    }
    return 0;
}

static int compare(const qs_half *half)
{
    const qs_half *slow = qs_half_portable();
    const int wrong = (half != slow ? compare_tiles(half, slow) : 0) + compare_packs(half) +
                      compare_decoders(half);
    printf("half: %s: %s\n", half->name, wrong == 0 ? "the same bits" : "DIFFERENT BITS");
    return wrong;
}

/* Why qs_half_supported says no. */
static const char *why_not(void)
{
    enum { FP16 = 23 }; /* bit of leaf 7's EDX */
    if (qs_half_avx512() == NULL) {
        return "this build has no code for AVX512-FP16, for want of a compiler that knows it";
    }
    return cpu_has(FP16) ? "this CPU has AVX512-FP16, but the kernel keeps no AVX-512 registers"
                         : "this CPU has no AVX512-FP16";
}

int main(void)
{
    enum { SKIPPED = 77 };
    int wrong = compare(qs_half_portable());
    if (qs_half_avx2() != NULL && qs_isa_runs("avx2")) {
        wrong += compare(qs_half_avx2());
    }
    if (qs_half_supported()) {
        wrong += compare(qs_half_avx512());
    } else {
        printf("half: %s: not compared\n", why_not());
    }
    return wrong > 0 ? 1 : qs_half_supported() ? 0 : SKIPPED;
}
