/* NF4's quantizer, both levels: byte for byte what src/quant/nf4.c writes (core/nf4_encode.h has
 * the arithmetic).
 *
 * First level: 8 lanes a block of 64, 8 elements a lane, which become 4 packed bytes. Bytes an
 * element: 2 (bf16) + 1/2 + 4/64. With 15 comparisons an element arithmetic is the nearer bound,
 * and both are far above what files and the bus deliver. Second level: a block of threads a group
 * of 256 absmax, 5 bytes each; 1/64 of the first level's elements.
 *
 * Registers (sm_80, 86, 89, 90a, 100, 120): first level 28-39; second 23-25 and 1,056 bytes of
 * shared memory. No spills. */
#include "kernels/cuda/core/nf4_encode.h"
#include "kernels/cuda/vector.cuh"

extern "C" {
#include "quant/nf4.h"
}

static_assert((int)QS_ENCODE_BLOCK == (int)QS_NF4_BLOCK &&
                  (int)QS_ENCODE_GROUP == (int)QS_NF4_QUANTUM_BLOCKS,
              "the kernels and the format agree");
static_assert((int)QS_ENCODE_LANE == (int)QS_VECTOR, "a lane loads its elements at once");

namespace
{

/* ---- first level ---- */

enum { THREADS = 256 };

template <typename X> struct blocks_call {
    const X *x;
    int64_t count;
    uint8_t *packed;
    float *absmax;
    unsigned long long *zero_blocks;
};

/* A lane's elements from `first` on; zeros past the end. */
template <typename X, bool VECTORS>
__device__ __forceinline__ void load_lane(float out[QS_ENCODE_LANE], const blocks_call<X> &c,
                                          int64_t first)
{
    if (VECTORS && first + QS_ENCODE_LANE <= c.count) {
        qs_load_vector(out, c.x + first);
        return;
    }
    for (int i = 0; i < QS_ENCODE_LANE; i++) {
        out[i] = first + i < c.count ? qs_widen(c.x[first + i]) : 0.0f;
    }
}

template <typename X, bool VECTORS>
__device__ __forceinline__ void store_lane(const blocks_call<X> &c, int64_t first, uint32_t packed)
{
    if (VECTORS && first + QS_ENCODE_LANE <= c.count) {
        *reinterpret_cast<uint32_t *>(c.packed + first / 2) = packed;
        return;
    }
    for (int i = 0; i < QS_ENCODE_LANE / 2; i++) {
        if (first + 2 * i < c.count) {
            c.packed[first / 2 + i] = (uint8_t)(packed >> (8 * i));
        }
    }
}

/* Largest magnitude among the lanes that share a block. */
__device__ __forceinline__ float largest_of_block(const float x[QS_ENCODE_LANE])
{
    float largest = 0.0f;
    for (int i = 0; i < QS_ENCODE_LANE; i++) {
        largest = qs_encode_larger(largest, x[i]);
    }
    for (int step = QS_ENCODE_LANES / 2; step > 0; step /= 2) {
        largest = qs_encode_larger(largest, __shfl_xor_sync(QS_ALL_LANES, largest, step));
    }
    return largest;
}

/* All lanes go around equally often, so that they can exchange; those past the end have nothing to
 * store. */
template <typename X, bool VECTORS>
__global__ void __launch_bounds__(THREADS) blocks_kernel(blocks_call<X> c)
{
    const int64_t step = (int64_t)gridDim.x * THREADS * QS_ENCODE_LANE;
    int64_t zero = 0;
    for (int64_t at = (int64_t)blockIdx.x * THREADS * QS_ENCODE_LANE; at < c.count; at += step) {
        const int64_t first = at + (int)threadIdx.x * QS_ENCODE_LANE;
        float x[QS_ENCODE_LANE];
        load_lane<X, VECTORS>(x, c, first);
        const float largest = largest_of_block(x);
        store_lane<X, VECTORS>(c, first, qs_encode_pack(x, largest));
        const bool leader = threadIdx.x % QS_ENCODE_LANES == 0 && first < c.count;
        if (leader) {
            c.absmax[first / QS_ENCODE_BLOCK] = largest;
        }
        zero += __popc(__ballot_sync(QS_ALL_LANES, leader && !(largest > 0.0f)));
    }
    if (threadIdx.x % QS_WARP == 0 && zero > 0) { /* integers: any order gives the same sum */
        atomicAdd(c.zero_blocks, (unsigned long long)zero);
    }
}

template <typename X>
qs_status quantize_blocks(qs_queue *q, const void *x, int64_t count, uint8_t *packed, float *absmax,
                          int64_t *zero_blocks)
{
    const blocks_call<X> call = {static_cast<const X *>(x), count, packed, absmax,
                                 reinterpret_cast<unsigned long long *>(zero_blocks)};
    const unsigned grid = qs_cuda_grid(qs_hd_ceil_div(count, THREADS * QS_ENCODE_LANE));
    if ((uintptr_t)x % 16 == 0 && (uintptr_t)packed % 4 == 0) {
        QS_LAUNCH((blocks_kernel<X, true>), grid, THREADS, 0, qs_cuda_stream(q), call);
    } else {
        QS_LAUNCH((blocks_kernel<X, false>), grid, THREADS, 0, qs_cuda_stream(q), call);
    }
    return qs_cuda_launched("nf4_quantize_blocks");
}

/* ---- second level ---- */

/* Largest of a block of QS_ENCODE_GROUP threads, in every thread. */
__device__ __forceinline__ float largest_of_group(float value)
{
    __shared__ float of_warp[QS_ENCODE_GROUP / QS_WARP];
    value = qs_warp_max(value);
    if (threadIdx.x % QS_WARP == 0) {
        of_warp[threadIdx.x / QS_WARP] = value;
    }
    __syncthreads();
    float largest = of_warp[0];
    for (int warp = 1; warp < QS_ENCODE_GROUP / QS_WARP; warp++) {
        largest = fmaxf(largest, of_warp[warp]);
    }
    __syncthreads(); /* the next group writes of_warp again */
    return largest;
}

__global__ void __launch_bounds__(QS_ENCODE_GROUP)
    absmax_kernel(const float *absmax, int64_t n_blocks, float offset, qs_encode_map map,
                  uint8_t *absmax8, float *absmax32)
{
    __shared__ float shared_map[QS_ENCODE_MAP]; /* lanes search at different places */
    static_assert(QS_ENCODE_MAP == QS_ENCODE_GROUP, "a thread copies an entry");
    shared_map[threadIdx.x] = map.value[threadIdx.x];
    __syncthreads();
    const int64_t groups = qs_hd_ceil_div(n_blocks, QS_ENCODE_GROUP);
    for (int64_t group = blockIdx.x; group < groups; group += gridDim.x) {
        const int64_t i = group * QS_ENCODE_GROUP + (int)threadIdx.x;
        const float difference = i < n_blocks ? absmax[i] - offset : 0.0f;
        const float largest = largest_of_group(qs_encode_larger(0.0f, difference));
        if (i < n_blocks) {
            absmax8[i] =
                (uint8_t)qs_encode_nearest(shared_map, difference * qs_encode_inverse(largest));
        }
        if (threadIdx.x == 0) {
            absmax32[group] = largest;
        }
    }
}

} // namespace

extern "C" qs_status qs_cuda_nf4_quantize_blocks(qs_queue *q, const void *x, qs_dtype dtype,
                                                 int64_t count, uint8_t *packed, float *absmax,
                                                 int64_t *zero_blocks)
{
    QS_TRY(qs_queue_zero(q, zero_blocks, sizeof *zero_blocks));
    if (count == 0) {
        return QS_OK;
    }
    switch (dtype) {
    case QS_F32:
        return quantize_blocks<float>(q, x, count, packed, absmax, zero_blocks);
    case QS_BF16:
        return quantize_blocks<qs_bf16>(q, x, count, packed, absmax, zero_blocks);
    case QS_F16:
        return quantize_blocks<qs_f16>(q, x, count, packed, absmax, zero_blocks);
    default:
        return QS_FAIL(QS_ERR_BUG, "nf4_quantize_blocks: elements of %s", qs_dtype_name(dtype));
    }
}

extern "C" qs_status qs_cuda_nf4_quantize_absmax(qs_queue *q, const float *absmax, int64_t n_blocks,
                                                 float offset, uint8_t *absmax8, float *absmax32)
{
    if (n_blocks == 0) {
        return QS_OK;
    }
    qs_encode_map map;
    for (int i = 0; i < QS_ENCODE_MAP; i++) {
        map.value[i] = qs_dynamic_map[i];
    }
    const unsigned grid = qs_cuda_grid(qs_hd_ceil_div(n_blocks, QS_ENCODE_GROUP));
    QS_LAUNCH(absmax_kernel, grid, QS_ENCODE_GROUP, 0, qs_cuda_stream(q), absmax, n_blocks, offset,
              map, absmax8, absmax32);
    return qs_cuda_launched("nf4_quantize_absmax");
}
