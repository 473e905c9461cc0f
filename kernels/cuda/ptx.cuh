/* What CUDA C++ has no portable word for: launches, tensor-core products, asynchronous copies.
 * Every line of PTX of the project stands here, so that the kernels themselves are plain C++ and
 * can run elsewhere: tests/emulator/ has a second ptx.cuh with the same functions in terms of the
 * host. */
#ifndef QS_KERNELS_CUDA_PTX_CUH
#define QS_KERNELS_CUDA_PTX_CUH

#include <cuda_runtime.h>
#include <stdint.h>

/** Launch `kernel` on the queue's stream. QS_LAUNCH is a statement; the launch's own error is found
 * by qs_cuda_launched (cuda_impl.cuh). */
#define QS_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...)                                \
    kernel<<<(grid), (threads), (shared_bytes), (stream)>>>(__VA_ARGS__)

/** Declare `name` as the block's dynamic shared memory, 128-byte aligned. */
#define QS_DYNAMIC_SHARED(type, name)                                                              \
    extern __shared__ __align__(128) unsigned char qs_dynamic_shared_[];                           \
    type *name = reinterpret_cast<type *>(qs_dynamic_shared_)

/** The same, aligned for tiles in panels (core/wgmma.h): where a kernel has no static shared memory
 * before it, it begins there. */
#define QS_DYNAMIC_SHARED_PANELS(type, name)                                                       \
    extern __shared__ __align__(1024) unsigned char qs_dynamic_panels_[];                          \
    type *name = reinterpret_cast<type *>(qs_dynamic_panels_)

/** d[16 x 8] += a[16 x 16] b[16 x 8], bf16 in, fp32 sums: mma.m16n8k16 row.col. Fragments as PTX
 * lays them out: with g = lane / 4 and t = lane % 4,
 *     a[0] = A[g][2t..]  a[1] = A[g + 8][2t..]  a[2] = A[g][2t + 8..]  a[3] = A[g + 8][2t + 8..]
 *     b[0] = B[2t..][g]  b[1] = B[2t + 8..][g]
 *     d[0], d[1] = D[g][2t, 2t + 1]            d[2], d[3] = D[g + 8][2t, 2t + 1] */
__device__ __forceinline__ void qs_mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2])
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/** Load four 8 x 8 matrices of 16-bit elements from shared memory: lane l gives the address of row
 * l % 8 of matrix l / 8 (16 bytes, aligned), and gets in r[i] the elements [l / 4][2 (l % 4)..] of
 * matrix i. */
__device__ __forceinline__ void qs_ldmatrix_x4(uint32_t r[4], const void *row)
{
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}

/** The same, each matrix transposed: r[i] holds the elements [2 (l % 4)..][l / 4]. */
__device__ __forceinline__ void qs_ldmatrix_x4_trans(uint32_t r[4], const void *row)
{
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}

/** Start copying 16 bytes from global to shared memory (both 16-byte aligned); zeros, and nothing
 * is read, if not `valid`. */
__device__ __forceinline__ void qs_cp_async_16(void *shared, const void *global, bool valid)
{
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(shared);
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(at), "l"(global),
                 "r"(bytes)
                 : "memory");
}

/** Close a group of copies / wait until at most N groups of this thread are open. Other threads'
 * copies are seen after a __syncthreads behind the wait. */
__device__ __forceinline__ void qs_cp_async_commit()
{
    asm volatile("cp.async.commit_group;\n" ::: "memory");
}

template <int N> __device__ __forceinline__ void qs_cp_async_wait()
{
    asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

/** Read 16 bytes of global memory, aligned. (The emulator looks at the address.) */
__device__ __forceinline__ uint4 qs_load_16(const void *global)
{
    return *static_cast<const uint4 *>(global);
}

/** Write 16 bytes of global memory, aligned, in one piece. Said as C++ the compiler takes the four
 * words of some stores apart, as in rmsnorm.cu's rows of four vectors a lane: four times the
 * instructions and requests to the L2 cache. */
__device__ __forceinline__ void qs_store_16(void *global, uint4 value)
{
    asm volatile(
        "st.global.v4.u32 [%0], {%1, %2, %3, %4};\n" ::"l"(__cvta_generic_to_global(global)),
        "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
        : "memory");
}

/** Two floats rounded to nearest even bf16 in one instruction, `low` in the lower half:
 * qs_bf16_pair of core/bf16.h but for a NaN, which becomes 0x7fff. */
__device__ __forceinline__ uint32_t qs_round_pair(float low, float high)
{
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

/** 2^x, within 2 ulp; 0 for -infinity. */
__device__ __forceinline__ float qs_exp2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/** 1 / x, within 1 ulp; 0 for infinity. */
__device__ __forceinline__ float qs_reciprocal(float x)
{
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* ---- Hopper: products of a warpgroup (sm_90a) ---- */

/** Is this pass of the compiler for a card with wgmma? Kernels that need it have no code elsewhere
 * and are not launched there. */
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
static constexpr bool QS_WGMMA = true;
#else
static constexpr bool QS_WGMMA = false;
#endif

/** An address in shared memory, as descriptors have it. */
__device__ __forceinline__ uint32_t qs_shared_address(const void *shared)
{
    return (uint32_t)__cvta_generic_to_shared(shared);
}

/** The threads of the block's warpgroup number `group` wait for each other. */
__device__ __forceinline__ void qs_warpgroup_sync(int group)
{
    asm volatile("bar.sync %0, 128;\n" ::"r"(group + 1) : "memory"); /* 0 is __syncthreads */
}

/** What this thread has written to shared memory is there for the products of warpgroups, after the
 * barrier that follows. */
__device__ __forceinline__ void qs_fence_shared_for_wgmma()
{
    asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

/** Before products: registers that they take are written. */
__device__ __forceinline__ void qs_wgmma_fence()
{
    asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}

__device__ __forceinline__ void qs_wgmma_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

/** Wait until at most N groups of this warp's products are under way; all four warps of a warpgroup
 * come here alike, never under a condition of one warp. What was computed is there after
 * qs_wgmma_keep on it. Another warp's products may still read their operands. */
template <int N> __device__ __forceinline__ void qs_wgmma_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(N) : "memory");
}

/** The compiler does not know that products write their sums later than it sees: tell it that they
 * have changed here. */
template <int NT> __device__ __forceinline__ void qs_wgmma_keep(float (&d)[NT][4])
{
#pragma unroll
    for (int n = 0; n < NT; n++) {
        asm volatile("" : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])::"memory");
    }
}

#define QS_D1_(d, n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define QS_D4_(d, n) QS_D1_(d, n), QS_D1_(d, n + 1), QS_D1_(d, n + 2), QS_D1_(d, n + 3)
#define QS_D8_(d, n) QS_D4_(d, n), QS_D4_(d, n + 4)

/** Start d[64 x N] (+)= A[64 x 16] B[16 x N], bf16 in, fp32 sums, of the four warps of a warpgroup:
 * wgmma.m64nNk16. `add` 0: d is written, not added to. Each warp holds 16 rows of d, as N / 8 tiles
 * of qs_mma_bf16. a and b are descriptors (core/wgmma.h): A k-major, B [N, 16] k-major (MN 0) or
 * [16, N] mn-major (MN 1). */
template <int N, int MN>
__device__ __forceinline__ void qs_wgmma(float (&d)[N / 8][4], uint64_t a, uint64_t b, int add)
{
    static_assert(N == 64 || N == 128, "a number of columns that is written out here");
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    if constexpr (N == 64) {
        asm volatile(
            "{\n.reg .pred p;\n"
            "setp.ne.b32 p, %34, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
            "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
            "%32, %33, p, 1, 1, 0, %35;\n}\n"
            : QS_D8_(d, 0)
            : "l"(a), "l"(b), "r"(add), "n"(MN));
    } else {
        asm volatile(
            "{\n.reg .pred p;\n"
            "setp.ne.b32 p, %66, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
            "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
            "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
            "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
            "%64, %65, p, 1, 1, 0, %67;\n}\n"
            : QS_D8_(d, 0), QS_D8_(d, 8)
            : "l"(a), "l"(b), "r"(add), "n"(MN));
    }
#endif
}

/** The same with A in registers, as qs_mma_bf16 takes it: each warp its 16 rows. B is mn-major. */
template <int N>
__device__ __forceinline__ void qs_wgmma(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b,
                                         int add)
{
    static_assert(N == 64 || N == 128, "a number of columns that is written out here");
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    if constexpr (N == 64) {
        asm volatile(
            "{\n.reg .pred p;\n"
            "setp.ne.b32 p, %37, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
            "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
            "{%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}\n"
            : QS_D8_(d, 0)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
    } else {
        asm volatile(
            "{\n.reg .pred p;\n"
            "setp.ne.b32 p, %69, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
            "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
            "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
            "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
            "{%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}\n"
            : QS_D8_(d, 0), QS_D8_(d, 8)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
    }
#endif
}

#undef QS_D8_
#undef QS_D4_
#undef QS_D1_

#endif
