/* CUDA C++ for the host's compiler: qualifiers, built-in variables, and the intrinsics that this
 * project's kernels may use. Floating point: -ffp-contract=off, so that a * b + c is two roundings,
 * as with nvcc's -fmad=false. */
#ifndef QS_EMULATOR_DEVICE_H
#define QS_EMULATOR_DEVICE_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <type_traits>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
/* One block runs at a time, so that its shared memory may be the program's. */
#define __shared__ static

#define threadIdx (emu::self->index)
#define blockIdx (emu::block_index)
#define blockDim (emu::block_dim)
#define gridDim (emu::grid_dim)
static constexpr int warpSize = emu::LANES;

/* ---- barriers ---- */

static inline void __syncthreads()
{
    emu::barrier();
}

namespace emu
{

static inline void whole_warp(unsigned mask)
{
    if (mask != 0xffffffffu) {
        die("a warp operation with the mask %08x: only whole warps are emulated", mask);
    }
}

/** Bits of a value, and back. */
template <class T> static inline uint64_t pack(T value)
{
    static_assert((sizeof(T) == 4 || sizeof(T) == 8) && std::is_arithmetic_v<T>,
                  "shuffles take 4 or 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    return bits;
}

template <class T> static inline T unpack(uint64_t bits)
{
    T value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/** Segments of `width` lanes: first lane and end of the caller's. */
struct segment {
    int first, end;
};

static inline segment segment_of(int width)
{
    if (width < 1 || width > LANES || (width & (width - 1)) != 0) {
        die("a shuffle of width %d", width);
    }
    const int first = (int)self->lane & ~(width - 1);
    return {first, first + width};
}

} // namespace emu

static inline void __trap(void)
{
    abort();
}

static inline void __syncwarp(unsigned mask = 0xffffffffu)
{
    emu::whole_warp(mask);
    emu::meet(emu::meeting::sync, 0);
}

/* ---- shuffles and votes ---- */

template <class T>
static inline T __shfl_sync(unsigned mask, T value, int from, int width = emu::LANES)
{
    emu::whole_warp(mask);
    const emu::segment s = emu::segment_of(width);
    return emu::unpack<T>(
        emu::meet(emu::meeting::shuffle, emu::pack(value))[s.first + (from & (width - 1))]);
}

template <class T>
static inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = emu::LANES)
{
    emu::whole_warp(mask);
    const emu::segment s = emu::segment_of(width);
    const int lane = (int)emu::self->lane, from = lane ^ lane_mask;
    return emu::unpack<T>(emu::meet(emu::meeting::shuffle,
                                    emu::pack(value))[from >= 0 && from < s.end ? from : lane]);
}

template <class T>
static inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = emu::LANES)
{
    emu::whole_warp(mask);
    const emu::segment s = emu::segment_of(width);
    const int lane = (int)emu::self->lane, from = lane + (int)delta;
    return emu::unpack<T>(
        emu::meet(emu::meeting::shuffle, emu::pack(value))[from < s.end ? from : lane]);
}

template <class T>
static inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = emu::LANES)
{
    emu::whole_warp(mask);
    const emu::segment s = emu::segment_of(width);
    const int lane = (int)emu::self->lane, from = lane - (int)delta;
    return emu::unpack<T>(
        emu::meet(emu::meeting::shuffle, emu::pack(value))[from >= s.first ? from : lane]);
}

static inline unsigned __ballot_sync(unsigned mask, int predicate)
{
    emu::whole_warp(mask);
    const uint64_t *votes = emu::meet(emu::meeting::vote, predicate != 0);
    unsigned out = 0;
    for (int lane = 0; lane < emu::LANES; lane++) {
        out |= (unsigned)votes[lane] << lane;
    }
    return out;
}

static inline int __any_sync(unsigned mask, int predicate)
{
    return __ballot_sync(mask, predicate) != 0;
}

static inline int __all_sync(unsigned mask, int predicate)
{
    return __ballot_sync(mask, predicate) == 0xffffffffu;
}

/* ---- memory ---- */

template <class T> static inline T __ldg(const T *at)
{
    return *at;
}

static inline void __threadfence()
{
}

/* Threads run one at a time between meeting points. */
template <class T> static inline T qs_emulator_atomic_add(T *at, T value)
{
    const T old = *at;
    *at = (T)(old + value);
    return old;
}

static inline int atomicAdd(int *at, int value)
{
    return qs_emulator_atomic_add(at, value);
}

static inline unsigned atomicAdd(unsigned *at, unsigned value)
{
    return qs_emulator_atomic_add(at, value);
}

static inline unsigned long long atomicAdd(unsigned long long *at, unsigned long long value)
{
    return qs_emulator_atomic_add(at, value);
}

/* ---- bits ---- */

static inline unsigned __float_as_uint(float value)
{
    unsigned bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float __uint_as_float(unsigned bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline int __float_as_int(float value)
{
    return (int)__float_as_uint(value);
}

static inline float __int_as_float(int bits)
{
    return __uint_as_float((unsigned)bits);
}

static inline unsigned __umulhi(unsigned a, unsigned b)
{
    return (unsigned)(((uint64_t)a * b) >> 32);
}

static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b)
{
    return (unsigned long long)(((unsigned __int128)a * b) >> 64);
}

static inline int __popc(unsigned x)
{
    return __builtin_popcount(x);
}

static inline int __popcll(unsigned long long x)
{
    return __builtin_popcountll(x);
}

static inline int __clz(int x)
{
    return x == 0 ? 32 : __builtin_clz((unsigned)x);
}

static inline int __ffs(int x)
{
    return __builtin_ffs(x);
}

/* ---- arithmetic with the rounding said aloud ---- */

static inline float __fadd_rn(float a, float b)
{
    return a + b;
}

static inline float __fsub_rn(float a, float b)
{
    return a - b;
}

static inline float __fmul_rn(float a, float b)
{
    return a * b;
}

static inline float __fdiv_rn(float a, float b)
{
    return a / b;
}

static inline float __fsqrt_rn(float a)
{
    return sqrtf(a);
}

static inline float __frcp_rn(float a)
{
    return 1.0f / a;
}

static inline float __fmaf_rn(float a, float b, float c)
{
    return fmaf(a, b, c);
}

static inline double __dadd_rn(double a, double b)
{
    return a + b;
}

static inline double __dsub_rn(double a, double b)
{
    return a - b;
}

static inline double __dmul_rn(double a, double b)
{
    return a * b;
}

static inline double __ddiv_rn(double a, double b)
{
    return a / b;
}

static inline double __dsqrt_rn(double a)
{
    return sqrt(a);
}

static inline double __fma_rn(double a, double b, double c)
{
    return fma(a, b, c);
}

static inline float rsqrtf(float x)
{
    return 1.0f / sqrtf(x);
}

/* CUDA has these in the global namespace, for every pair of number types. */
template <class A, class B> static inline typename std::common_type<A, B>::type min(A a, B b)
{
    using T = typename std::common_type<A, B>::type;
    return (T)b < (T)a ? (T)b : (T)a;
}

template <class A, class B> static inline typename std::common_type<A, B>::type max(A a, B b)
{
    using T = typename std::common_type<A, B>::type;
    return (T)a < (T)b ? (T)b : (T)a;
}

#endif
