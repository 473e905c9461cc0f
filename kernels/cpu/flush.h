/* SSE's control register of a thread, for tables whose results are 0 where they would be subnormal
 * (pairs.h, tile.h). Included by files that are compiled for AVX2 or more. */
#ifndef QS_KERNELS_CPU_FLUSH_H
#define QS_KERNELS_CPU_FLUSH_H

#include <immintrin.h>

/** Subnormal operands count as 0, subnormal results become 0. \return what was set before. */
static inline unsigned qs_flush_begin(void)
{
    const unsigned flush_to_zero = 1U << 15, denormals_are_zero = 1U << 6, before = _mm_getcsr();
    _mm_setcsr(before | flush_to_zero | denormals_are_zero);
    return before;
}

static inline void qs_flush_end(unsigned before)
{
    _mm_setcsr(before);
}

#endif
