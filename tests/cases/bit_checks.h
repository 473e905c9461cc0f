/* What the comparisons of inner loops share (isa.c, half.c, pairs.c, tile.c): random operands, the
 * same in every run, and floats compared bit for bit. Needs no library but libc's, as those
 * programs do. */
#ifndef QS_TESTS_BIT_CHECKS_H
#define QS_TESTS_BIT_CHECKS_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

/** Whether the CPU itself says that it has what that bit of leaf 7's EDX stands for, whatever the
 * system makes of it. */
static inline bool cpu_has(int bit)
{
#if defined(__x86_64__)
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d >> bit & 1U) != 0;
#else
    (void)bit;
    return false;
#endif
}

/** 32 random bits: the next of one sequence. */
static inline uint32_t random_bits(void)
{
    static uint64_t state;
    state = state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (uint32_t)(state >> 32);
}

/** A random float in [-1, 1). */
static inline float random_float(void)
{
    return (float)(random_bits() >> 8) * 0x1p-23F - 1.0F;
}

enum { BF16_KINDS = 6 };

/** A random bf16 by kind of round: around 1; products around the smallest normal number, where
 * results vanish; squares of the smallest; subnormal operands among others; any finite; any at all.
 */
static inline uint16_t random_bf16(int kind)
{
    const uint32_t any = random_bits();
    const uint16_t sign = any & 0x8000U, fraction = any & 0x7FU;
    const unsigned spread = any >> 16 & 255U;
    const unsigned exponent = kind == 0   ? 120 + spread % 12
                              : kind == 1 ? 62 + spread % 6
                              : kind == 2 ? 58 + spread % 12
                              : kind == 3 ? (spread % 3 == 0 ? 0 : 100 + spread % 20)
                              : kind == 4 ? (spread == 255 ? 254 : spread)
                                          : spread;
    return (uint16_t)(sign | exponent << 7 | fraction);
}

/** Whether a and b differ; the first element that does is printed, as `what` of that round. NaN is
 * NaN: which one is not defined. */
static inline int differ_f32(const char *what, int round, const float *a, const float *b, int count)
{
    for (int i = 0; i < count; i++) {
        if (memcmp(&a[i], &b[i], sizeof *a) != 0 && !(isnan(a[i]) && isnan(b[i]))) {
            printf("%s, round %d: element %d is %a, not %a\n", what, round, i, (double)a[i],
                   (double)b[i]);
            return 1;
        }
    }
    return 0;
}

#endif
