/* What lets a header be compiled three ways: as C for tests on the host, as C++ by the host
 * compiler, and as CUDA C++ for both sides. The headers in this folder hold what kernels compute
 * besides floating point: who decodes which element, which tile sees which key, where a border
 * begins. Tests on the host go through all of it. */
#ifndef QS_KERNELS_CUDA_CORE_HD_H
#define QS_KERNELS_CUDA_CORE_HD_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __CUDACC__
#define QS_HD static __host__ __device__ __forceinline__
#else
#define QS_HD static inline
#endif

QS_HD int64_t qs_hd_min(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

QS_HD int64_t qs_hd_max(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

/** ceil(a / b) for a >= 0, b > 0. */
QS_HD int64_t qs_hd_ceil_div(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

QS_HD int64_t qs_hd_round_up(int64_t a, int64_t multiple)
{
    return qs_hd_ceil_div(a, multiple) * multiple;
}

#endif
