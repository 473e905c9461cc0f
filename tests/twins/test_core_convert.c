/* bf16 and fp16 as kernels convert them (core/bf16.h, core/f16.h) against src/base/dtype.c. */
#include <criterion/criterion.h>
#include <string.h>

#include "base/dtype.h"
#include "kernels/cuda/core/f16.h"

Test(core_convert, every_fp16_widens_to_the_same_bits)
{
    for (uint32_t bits = 0; bits < 65536; bits++) {
        const qs_f16 half = {(uint16_t)bits};
        const float want = qs_f32_from_f16((uint16_t)bits), got = qs_f16_to_f32(half);
        cr_assert_eq(memcmp(&got, &want, sizeof got), 0, "%04x is %g, not %g", bits, (double)got,
                     (double)want);
    }
}

Test(core_convert, every_bf16_widens_to_the_same_bits_and_back)
{
    for (uint32_t bits = 0; bits < 65536; bits++) {
        const qs_bf16 value = {(uint16_t)bits};
        const float want = qs_f32_from_bf16((uint16_t)bits), got = qs_bf16_to_f32(value);
        cr_assert_eq(memcmp(&got, &want, sizeof got), 0, "%04x", bits);
        cr_assert_eq(qs_bf16_round(got).bits, qs_bf16_from_f32(want), "%04x", bits);
    }
}

Test(core_convert, rounding_to_bf16_is_to_nearest_even)
{
    const uint32_t low[] = {0, 1, 0x7fff, 0x8000, 0x8001, 0xffff}; /* around a tie */
    for (uint32_t high = 0; high < 65536; high++) {
        for (size_t i = 0; i < sizeof low / sizeof *low; i++) {
            const float value = qs_hd_bits_float(high << 16 | low[i]);
            cr_assert_eq(qs_bf16_round(value).bits, qs_bf16_from_f32(value), "%04x%04x", high,
                         low[i]);
        }
    }
    cr_assert_eq(qs_bf16_pair(1.0F, -2.0F), 0xc0003f80U, "the first lies low");
}
