/* What the comparisons of inner loops share (isa.c, half.c, tile.c): random operands, the same in
 * every run, and floats compared bit for bit. Needs no library but libc's, as those programs do. */
#ifndef QS_TESTS_BIT_CHECKS_H
#define QS_TESTS_BIT_CHECKS_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

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
