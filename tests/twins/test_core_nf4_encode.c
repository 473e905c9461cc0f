/* NF4's quantizer as kernels compute it (core/nf4_encode.h) against src/quant/nf4.c. */
#include <criterion/criterion.h>
#include <math.h>
#include <string.h>

#include "base/rng.h"
#include "kernels/cuda/core/nf4_encode.h"
#include "quant/nf4.h"

/* `steps` floats further up (down). */
static float neighbour(float x, int steps)
{
    for (; steps > 0; steps--) {
        x = nextafterf(x, INFINITY);
    }
    for (; steps < 0; steps++) {
        x = nextafterf(x, -INFINITY);
    }
    return x;
}

Test(core_nf4_encode, codes_agree_around_every_threshold_and_elsewhere)
{
    for (int t = 0; t < 15; t++) {
        for (int step = -3; step <= 3; step++) {
            const float y = neighbour(qs_nf4_threshold[t], step);
            cr_assert_eq(qs_encode_code(y), qs_nf4_encode(y, 1.0F), "%.9g", (double)y);
        }
    }
    const float odd[] = {0.0F, -0.0F, 1.0F, -1.0F, 2.0F, -2.0F, INFINITY, -INFINITY, NAN, 1e-45F};
    for (size_t i = 0; i < sizeof odd / sizeof *odd; i++) {
        cr_assert_eq(qs_encode_code(odd[i]), qs_nf4_encode(odd[i], 1.0F), "%g", (double)odd[i]);
    }
    for (int i = -20000; i <= 20000; i++) {
        const float y = (float)i * 1e-4F;
        cr_assert_eq(qs_encode_code(y), qs_nf4_encode(y, 1.0F));
    }
}

/* A block by its lanes, as the kernel does it. */
static float encode_block(const float *x, int64_t count, uint8_t *packed)
{
    float padded[QS_ENCODE_BLOCK] = {0}, largest = 0.0F;
    memcpy(padded, x, (size_t)count * sizeof *x);
    for (int i = 0; i < QS_ENCODE_BLOCK; i++) {
        largest = qs_encode_larger(largest, padded[i]);
    }
    for (int lane = 0; lane < QS_ENCODE_LANES; lane++) {
        const uint32_t word = qs_encode_pack(padded + lane * QS_ENCODE_LANE, largest);
        for (int i = 0; i < 4; i++) {
            packed[4 * lane + i] = (uint8_t)(word >> (8 * i));
        }
    }
    return largest;
}

static void check_block(const float *x, int64_t count)
{
    uint8_t want[QS_ENCODE_BLOCK / 2], got[QS_ENCODE_BLOCK / 2];
    float want_absmax = -1.0F;
    qs_nf4_quantize_blocks(x, count, want, &want_absmax);
    const float got_absmax = encode_block(x, count, got);
    cr_assert_eq(memcmp(&got_absmax, &want_absmax, sizeof got_absmax), 0, "absmax %g, not %g",
                 (double)got_absmax, (double)want_absmax);
    cr_assert_arr_eq(got, want, (size_t)(count + 1) / 2);
}

Test(core_nf4_encode, blocks_of_every_length_have_the_same_bytes)
{
    qs_rng rng = qs_rng_make(11, 0, 0, 99, 0);
    for (int64_t count = 1; count <= QS_ENCODE_BLOCK; count++) {
        for (int round = 0; round < 40; round++) {
            float x[QS_ENCODE_BLOCK];
            for (int64_t i = 0; i < count; i++) {
                const uint64_t at = (uint64_t)((count * 40 + round) * QS_ENCODE_BLOCK + i);
                x[i] = ldexpf(2.0F * qs_rng_uniform(&rng, at) - 1.0F, 8 * (round - 20));
            }
            check_block(x, count); /* from denormal to infinite magnitudes */
        }
    }
}

Test(core_nf4_encode, odd_blocks_have_the_same_bytes)
{
    const float odd[][4] = {{0, 0, 0, 0},
                            {-0.0F, 0, -0.0F, 0},
                            {NAN, 0, 0, 0},
                            {NAN, 1, -1, 0.5F},
                            {INFINITY, 1, -1, 0},
                            {-INFINITY, INFINITY, NAN, 3},
                            {1e-45F, 0, -1e-45F, -0.0F},
                            {1e-39F, 5e-40F, -1e-39F, 0},
                            {3.4e38F, -3.4e38F, 1, 0}};
    for (size_t i = 0; i < sizeof odd / sizeof *odd; i++) {
        for (int64_t count = 1; count <= 4; count++) {
            check_block(odd[i], count);
        }
    }
}

/* With a 1 beside it and no offset, the second level looks y itself up. */
static uint8_t want_nearest(float y)
{
    const float absmax[2] = {y, 1.0F};
    uint8_t absmax8[2];
    float absmax32;
    qs_nf4_quantize_absmax(absmax, 2, 0.0F, absmax8, &absmax32);
    return absmax8[0];
}

Test(core_nf4_encode, the_second_level_finds_the_same_entries)
{
    for (int i = 0; i < 255; i++) {
        const double middle = ((double)qs_dynamic_map[i] + (double)qs_dynamic_map[i + 1]) / 2.0;
        for (int step = -3; step <= 3; step++) {
            const float close[] = {neighbour((float)middle, step),
                                   neighbour(qs_dynamic_map[i], step)};
            for (int k = 0; k < 2; k++) {
                if (fabsf(close[k]) <= 1.0F) {
                    cr_assert_eq(qs_encode_nearest(qs_dynamic_map, close[k]),
                                 want_nearest(close[k]), "%.9g", (double)close[k]);
                }
            }
        }
    }
    cr_assert_eq(qs_encode_nearest(qs_dynamic_map, NAN), want_nearest(NAN));
    cr_assert_eq(qs_encode_nearest(qs_dynamic_map, 1.0F), 255);
    cr_assert_eq(qs_encode_nearest(qs_dynamic_map, -1.0F), 0);
}

Test(core_nf4_encode, the_inverse_stays_finite)
{
    cr_assert_eq(qs_encode_inverse(0.0F), FLT_MAX);
    cr_assert_eq(qs_encode_inverse(1e-45F), FLT_MAX);
    cr_assert_eq(qs_encode_inverse(3.0F), 1.0F / 3.0F);
    cr_assert_eq(qs_encode_inverse(INFINITY), 0.0F);
}
