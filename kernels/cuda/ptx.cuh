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

#endif
