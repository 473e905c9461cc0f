/* What the CUDA kernels share: the core's headers as C, errors, launches, and what an opened queue
 * carries. Kernels are compiled without contraction (-fmad=false): a * b + c is fused only where
 * the source says fmaf, as on the CPU. */
#ifndef QS_KERNELS_CUDA_CUDA_IMPL_CUH
#define QS_KERNELS_CUDA_CUDA_IMPL_CUH

extern "C" {
#include "device/device_impl.h"
#include "kernels/cuda/ops_cuda.h"
#include "kernels/ops.h"
}

#include "kernels/cuda/core/bf16.h"
#include "kernels/cuda/core/hd.h"
#include "kernels/cuda/ptx.cuh"

#include "device/cuda_status.h" /* behind CUDA's own header, which ptx.cuh brings */

enum { QS_WARP = 32 };
static const unsigned QS_ALL_LANES = 0xffffffffu;

/** The error of the launches just made. */
#define qs_cuda_launched(name) qs_cuda_status(cudaGetLastError(), (name), __FILE__, __LINE__)

static inline cudaStream_t qs_cuda_stream(const qs_queue *q)
{
    return (cudaStream_t)qs_queue_native(q);
}

/** Let `kernel` use `bytes` of shared memory: past 48 KB, its own arrays included, it has to ask.
 */
template <typename kernel_type>
static inline qs_status qs_cuda_prepare(kernel_type kernel, size_t bytes)
{
    return QS_CUDA(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
}

/** Grid size for a loop over `tasks` in which each block takes several: enough for every
 * multiprocessor of any card, bounded so that a huge `tasks` is no invalid grid. */
static inline unsigned qs_cuda_grid(int64_t tasks)
{
    const int64_t most = 1 << 16;
    return (unsigned)(tasks < most ? tasks : most);
}

/** Sum over a warp, the same bits in every lane. */
__device__ __forceinline__ float qs_warp_sum(float value)
{
    for (int step = QS_WARP / 2; step > 0; step /= 2) {
        value += __shfl_xor_sync(QS_ALL_LANES, value, step);
    }
    return value;
}

__device__ __forceinline__ float qs_warp_max(float value)
{
    for (int step = QS_WARP / 2; step > 0; step /= 2) {
        value = fmaxf(value, __shfl_xor_sync(QS_ALL_LANES, value, step));
    }
    return value;
}

#endif
