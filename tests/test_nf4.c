/* NF4: the constants bit for bit, stored vectors, and what must hold for any input. */
#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "quant/nf4.h"
#include "store/hash.h"

static uint32_t bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* ---- constants ---- */

Test(nf4, code_has_the_published_bits)
{
    static const uint32_t bits[16] = {0xbf800000, 0xbf3239b1, 0xbf066b30, 0xbeca32a0,
                                      0xbe91a24d, 0xbe3d353f, 0xbdba7871, 0x00000000,
                                      0x3da2faff, 0x3e24cae3, 0x3e7c04dd, 0x3ead033a,
                                      0x3ee1a4b8, 0x3f1007ab, 0x3f3913b3, 0x3f800000};
    for (int i = 0; i < 16; i++) {
        cr_assert_eq(bits_of(qs_nf4_code[i]), bits[i], "code %d", i);
    }
}

Test(nf4, thresholds_are_fp32_midpoints)
{
    for (int i = 0; i < 15; i++) {
        float sum = qs_nf4_code[i] + qs_nf4_code[i + 1];
        cr_assert_eq(bits_of(qs_nf4_threshold[i]), bits_of(sum * 0.5f), "threshold %d", i);
    }
}

Test(nf4, dynamic_map_has_the_known_sha256)
{
    char hex[QS_SHA256_HEX];
    qs_sha256_hex(qs_dynamic_map, sizeof qs_dynamic_map, hex);
    cr_assert_str_eq(hex, "035c4114538df2a03bbcb4d8a39b9325d26d84a00cf6cf29018d1a6608ab14c4");
    cr_assert_eq(qs_dynamic_map[127], 0.0f);
    cr_assert_eq(qs_dynamic_map[255], 1.0f);
    for (int i = 1; i < 256; i++) {
        cr_assert_lt(qs_dynamic_map[i - 1], qs_dynamic_map[i], "entry %d", i);
    }
}

/* ---- stored vectors ----
 * Made by tests/oracle/nf4_reference.py, whose first level equals bitsandbytes 0.50.2's on the same
 * data. */

typedef struct {
    uint32_t seed;
    int64_t count;
    uint64_t packed, absmax, absmax8, absmax32; /* XXH3-64 */
    double offset;
} vector;

static float next_uniform(uint32_t *state)
{
    *state = *state * 1664525U + 1013904223U;
    return (float)(*state >> 8) * 0x1p-24f - 0.5f;
}

/* Products of uniforms, with outliers and all-zero blocks. Every operation is exact or rounded
 * once. */
static float *make_input(uint32_t seed, int64_t count)
{
    float *x = malloc((size_t)count * sizeof *x);
    for (int64_t i = 0; i < count; i++) {
        float a = next_uniform(&seed);
        float b = next_uniform(&seed);
        x[i] = a * b;
        x[i] *= i % 997 == 5 ? 64.0f : 1.0f;
        x[i] = i / 64 % 7 == 3 ? 0.0f : x[i];
    }
    return x;
}

typedef struct {
    int64_t count, blocks, groups, zero_blocks;
    float *x, *absmax, *absmax32, offset;
    uint8_t *packed, *absmax8;
} quantized;

static quantized quantize(uint32_t seed, int64_t count)
{
    quantized q = {.count = count, .blocks = (count + 63) / 64, .groups = qs_nf4_quanta(count)};
    double sum = 0.0;
    q.x = make_input(seed, count);
    q.absmax = malloc((size_t)q.blocks * sizeof *q.absmax);
    q.absmax32 = malloc((size_t)q.groups * sizeof *q.absmax32);
    q.packed = malloc((size_t)(count + 1) / 2);
    q.absmax8 = malloc((size_t)q.blocks);
    q.zero_blocks = qs_nf4_quantize_blocks(q.x, count, q.packed, q.absmax);
    for (int64_t i = 0; i < q.blocks; i++) {
        sum += (double)q.absmax[i];
    }
    q.offset = (float)(sum / (double)q.blocks);
    qs_nf4_quantize_absmax(q.absmax, q.blocks, q.offset, q.absmax8, q.absmax32);
    return q;
}

static void destroy(quantized *q)
{
    free(q->x);
    free(q->absmax);
    free(q->absmax32);
    free(q->packed);
    free(q->absmax8);
}

ParameterizedTestParameters(nf4, bytes_equal_the_stored_vectors)
{
    static vector v[] = {
        {1, 1, 0x9b10c698ca2c129d, 0x327119d426ef43b4, 0x2a140471f45ff181, 0x48b2c92616fc193d,
         0x1.1a3d320000000p-5},
        {2, 63, 0xfa68cb761f3fe4a9, 0xe0d4e51834b7926e, 0x2a140471f45ff181, 0x48b2c92616fc193d,
         0x1.4882a20000000p+2},
        {3, 65, 0x75171ee6c439d5c0, 0x0dc17382f031c6d6, 0x0b06685630f819e7, 0x957855f86dcbb675,
         0x1.a625b60000000p+1},
        {4, 16384, 0x8be86f422557e18f, 0xd76c094685ffcf7d, 0x71c016902de699e9, 0xed92abe4c2468a99,
         0x1.5eacf00000000p-2},
        {5, 16448, 0x04d7865c336f8c31, 0xae7393537eb0c19e, 0x55226fb82c7518ad, 0x0111648589ea9274,
         0x1.de0f4a0000000p-2},
        {6, 40001, 0xc36a1b188a217b10, 0x7123394ed265499e, 0x6206fdfea0db83fc, 0x7894ae0b5f776e86,
         0x1.7de3620000000p-2},
        {7, 49151, 0x1a23e50ba583567e, 0xc5e0d5c9a6e7386d, 0xdae0f564c5fb004a, 0x97c68fd9fb2d7844,
         0x1.bdd9340000000p-2},
    };
    return cr_make_param_array(vector, v, sizeof v / sizeof *v);
}

ParameterizedTest(vector *v, nf4, bytes_equal_the_stored_vectors)
{
    quantized q = quantize(v->seed, v->count);
    cr_expect_eq(qs_xxh3_64(q.packed, (size_t)(q.count + 1) / 2), v->packed, "packed, n=%ld",
                 v->count);
    cr_expect_eq(qs_xxh3_64(q.absmax, (size_t)q.blocks * 4), v->absmax, "absmax, n=%ld", v->count);
    cr_expect_eq(qs_xxh3_64(q.absmax8, (size_t)q.blocks), v->absmax8, "absmax8, n=%ld", v->count);
    cr_expect_eq(qs_xxh3_64(q.absmax32, (size_t)q.groups * 4), v->absmax32, "absmax32, n=%ld",
                 v->count);
    cr_expect_eq((double)q.offset, v->offset, "offset, n=%ld", v->count);
    destroy(&q);
}

/* ---- properties ---- */

static float code_at(const uint8_t *packed, int64_t i)
{
    return qs_nf4_code[i % 2 == 0 ? packed[i / 2] >> 4 : packed[i / 2] & 15];
}

ParameterizedTestParameters(nf4, first_level_error_is_bounded)
{
    static int64_t n[] = {1, 63, 64, 65, 4096 + 7, 16384 + 1};
    return cr_make_param_array(int64_t, n, sizeof n / sizeof *n);
}

ParameterizedTest(int64_t *n, nf4, first_level_error_is_bounded)
{
    const float half_gap = 0.15191f; /* (1.0 - 0.6962) / 2, half the widest gap, and a rounding */
    quantized q = quantize(11, *n);
    for (int64_t i = 0; i < *n; i++) {
        float y = code_at(q.packed, i) * q.absmax[i / 64];
        cr_assert_leq(fabsf(q.x[i] - y), half_gap * q.absmax[i / 64], "i=%ld of %ld", i, *n);
    }
    destroy(&q);
}

Test(nf4, second_level_takes_the_nearest_entry)
{
    quantized q = quantize(12, 40 * 16384 + 100);
    for (int64_t i = 0; i < q.blocks; i++) {
        float inverse = 1.0f / q.absmax32[i / 256];
        double y = (double)((q.absmax[i] - q.offset) * inverse);
        double taken = fabs(y - (double)qs_dynamic_map[q.absmax8[i]]);
        for (int k = 0; k < 256; k++) {
            double other = fabs(y - (double)qs_dynamic_map[k]);
            cr_assert(taken < other || (taken == other && q.absmax8[i] <= k), "block %ld, entry %d",
                      i, k);
        }
    }
    destroy(&q);
}

Test(nf4, value_on_a_threshold_takes_the_lower_code)
{
    for (int i = 0; i < 15; i++) {
        float t = qs_nf4_threshold[i];
        cr_expect_eq(qs_nf4_encode(t, 1.0f), i, "on threshold %d", i);
        cr_expect_eq(qs_nf4_encode(nextafterf(t, 2.0f), 1.0f), i + 1, "above threshold %d", i);
        cr_expect_eq(qs_nf4_encode(nextafterf(t, -2.0f), 1.0f), i, "below threshold %d", i);
    }
    for (int i = 0; i < 16; i++) {
        cr_expect_eq(qs_nf4_encode(qs_nf4_code[i], 1.0f), i, "code %d encodes to itself", i);
    }
}

Test(nf4, second_level_tie_takes_the_lower_entry)
{
    /* Offset 0 and a group whose largest absmax is 1: z = absmax. Only some midpoints are exact in
     * fp32. */
    int ties = 0;
    for (int i = 127; i < 255; i++) {
        double exact = ((double)qs_dynamic_map[i] + (double)qs_dynamic_map[i + 1]) / 2.0;
        float middle = (float)exact;
        float absmax[4] = {1.0f, middle, nextafterf(middle, 2.0f), nextafterf(middle, -2.0f)};
        uint8_t absmax8[4];
        float absmax32;
        if ((double)middle != exact) {
            continue;
        }
        ties++;
        qs_nf4_quantize_absmax(absmax, 4, 0.0f, absmax8, &absmax32);
        cr_assert_eq(absmax32, 1.0f);
        cr_expect_eq(absmax8[0], 255);
        cr_expect_eq(absmax8[1], i, "on the midpoint above entry %d", i);
        cr_expect_eq(absmax8[2], i + 1, "past the midpoint above entry %d", i);
        cr_expect_eq(absmax8[3], i, "before the midpoint above entry %d", i);
    }
    cr_assert_gt(ties, 10);
}

Test(nf4, zero_blocks_are_0x77_and_counted)
{
    float x[64 * 5 + 3] = {0};
    uint8_t packed[(64 * 5 + 4) / 2];
    float absmax[6];
    x[64 * 2 + 9] = -3.0f; /* block 2 is not zero */
    x[64 * 4] = -0.0f;     /* block 4 is */
    cr_assert_eq(qs_nf4_quantize_blocks(x, 64 * 5 + 3, packed, absmax), 5);
    for (int i = 0; i < (int)sizeof packed; i++) {
        if (i / 32 != 2) {
            cr_assert_eq(packed[i], QS_NF4_ZERO_BYTE, "byte %d", i);
        }
    }
    cr_assert_eq(absmax[2], 3.0f);
    cr_assert_eq(absmax[4], 0.0f);
    cr_assert_eq(packed[32 * 2 + 4] & 15, 0, "-absmax is code 0");
}

Test(nf4, odd_count_pads_with_the_code_of_zero)
{
    float x[3] = {1.0f, -1.0f, 1.0f};
    uint8_t packed[2];
    float absmax[1];
    qs_nf4_quantize_blocks(x, 3, packed, absmax);
    cr_assert_eq(packed[0], 0xF0);
    cr_assert_eq(packed[1], 0xF7);
}

Test(nf4, denormal_blocks_keep_zeros_zero)
{
    float x[64] = {0};
    uint8_t packed[32];
    float absmax[1];
    x[0] = FLT_TRUE_MIN; /* 1 / absmax overflows */
    cr_assert_eq(qs_nf4_quantize_blocks(x, 64, packed, absmax), 0);
    for (int i = 1; i < 64; i++) {
        cr_assert_eq(code_at(packed, i), 0.0f, "element %d", i);
    }
}

Test(nf4, equal_absmax_decode_to_themselves)
{
    float absmax[300], absmax32[2];
    uint8_t absmax8[300];
    for (int i = 0; i < 300; i++) {
        absmax[i] = 0.37f;
    }
    qs_nf4_quantize_absmax(absmax, 300, 0.37f, absmax8, absmax32);
    for (int i = 0; i < 300; i++) {
        cr_assert_eq(qs_nf4_absmax(qs_dynamic_map, absmax8[i], absmax32[i / 256], 0.37f), 0.37f);
    }
}

Test(nf4, absmax_is_decoded_in_two_roundings)
{
    /* 0.1f * 0.3f rounds up; a fused multiply-add would keep the exact product and give another
     * sum. */
    float map[256] = {0};
    int differ = 0;
    uint32_t seed = 9;
    for (int i = 0; i < 1000; i++) {
        map[5] = next_uniform(&seed);
        float scale = next_uniform(&seed);
        float offset = next_uniform(&seed);
        volatile float product = map[5] * scale;
        cr_assert_eq(qs_nf4_absmax(map, 5, scale, offset), product + offset);
        differ += fmaf(map[5], scale, offset) != product + offset;
    }
    cr_assert_gt(differ, 0, "the inputs must be able to tell the two apart");
}
