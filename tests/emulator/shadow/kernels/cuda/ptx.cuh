/* kernels/cuda/ptx.cuh for the emulator: the same functions in terms of the host. This folder
 * stands before the project's own in the include path. */
#ifndef QS_EMULATOR_PTX_CUH
#define QS_EMULATOR_PTX_CUH

#include <cuda_runtime.h>
#include <stdint.h>

#include "kernels/cuda/core/bf16.h"

#define QS_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...)                                \
    emu::launcher(#kernel, (kernel), (grid), (threads), (shared_bytes), (stream))(__VA_ARGS__)

#define QS_DYNAMIC_SHARED(type, name) type *name = reinterpret_cast<type *>(emu::dynamic_shared)

#define QS_DYNAMIC_SHARED_PANELS(type, name) QS_DYNAMIC_SHARED(type, name)

/** fp32 sums: starting from d, the 16 products are added in order of k, each rounded to nearest (a
 * tensor core adds several at a time and truncates). */
static inline void qs_mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2])
{
    emu::mma_bf16(d, a, b);
}

static inline void qs_ldmatrix_x4(uint32_t r[4], const void *row)
{
    emu::ldmatrix_x4(r, row, false);
}

static inline void qs_ldmatrix_x4_trans(uint32_t r[4], const void *row)
{
    emu::ldmatrix_x4(r, row, true);
}

/** The destination holds 0xff until the wait; the source is read at the wait. */
static inline void qs_cp_async_16(void *shared, const void *global, bool valid)
{
    emu::cp_async_16(shared, global, valid);
}

static inline void qs_cp_async_commit()
{
    emu::cp_async_commit();
}

template <int N> static inline void qs_cp_async_wait()
{
    emu::cp_async_wait(N);
}

/** On a card an address off 16 bytes ends the kernel. */
static inline uint4 qs_load_16(const void *global)
{
    emu::check_aligned(global, sizeof(uint4));
    return *static_cast<const uint4 *>(global);
}

static inline void qs_store_16(void *global, uint4 value)
{
    emu::check_aligned(global, sizeof value);
    *static_cast<uint4 *>(global) = value;
}

/** As the instruction has it: any NaN becomes 0x7fff. */
static inline uint32_t qs_round_pair(float low, float high)
{
    const uint32_t nan = 0x7fff;
    return (isnan(low) ? nan : (uint32_t)qs_bf16_round(low).bits) |
           (isnan(high) ? nan : (uint32_t)qs_bf16_round(high).bits) << 16;
}

static inline float qs_exp2(float x)
{
    const float y = exp2f(x);
    return y < 0x1p-126f ? 0.0f : y;
}

static inline float qs_reciprocal(float x)
{
    return 1.0f / x;
}

/* ---- Hopper: products of a warpgroup ---- */

static constexpr bool QS_WGMMA = true;

/** Dynamic shared memory begins at 0. */
static inline uint32_t qs_shared_address(const void *shared)
{
    return (uint32_t)(reinterpret_cast<const unsigned char *>(shared) - emu::dynamic_shared);
}

static inline void qs_warpgroup_sync(int group)
{
    emu::warpgroup_barrier(group);
}

static inline void qs_fence_shared_for_wgmma()
{
    emu::fence_shared_for_wgmma();
}

static inline void qs_wgmma_fence()
{
    emu::wgmma_fence();
}

static inline void qs_wgmma_commit()
{
    emu::wgmma_commit();
}

template <int N> static inline void qs_wgmma_wait()
{
    emu::wgmma_wait(N);
}

template <int NT> static inline void qs_wgmma_keep(float (&)[NT][4])
{
}

/** Operands in shared memory are read at the wait; d holds NaN until then. */
template <int N, int MN>
static inline void qs_wgmma(float (&d)[N / 8][4], uint64_t a, uint64_t b, int add)
{
    emu::wgmma(&d[0][0], N, nullptr, a, b, MN != 0, add != 0);
}

template <int N>
static inline void qs_wgmma(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b, int add)
{
    emu::wgmma(&d[0][0], N, a, 0, b, true, add != 0);
}

#endif
