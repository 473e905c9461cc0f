/* What attention's kernels for Hopper share: tiles in panels (core/wgmma.h), the two products that
 * are made of them, and the way of results to memory.
 *
 * A block is two warpgroups, each with 64 rows of the block's own tile of 128. Their sums lie in
 * registers exactly as those of qs_mma_bf16 do, 16 rows a warp, so that masks, softmax and
 * gradients are the same code as on other cards.
 *
 * Tiles come and are read in step, a barrier each, but the second warpgroup is half a tile behind:
 * between two barriers the first starts the products of a tile and then computes with them, while
 * the second computes with those of the tile before and then starts those of this one. So the
 * tensor cores have the one's products while the other's exponentials are computed
 * (FlashAttention-3's "pingpong", Shah et al. 2024, arXiv:2407.08608, without its barriers). What
 * the second one still reads keeps a stage more. */
#ifndef QS_KERNELS_CUDA_ATTENTION_HOPPER_CUH
#define QS_KERNELS_CUDA_ATTENTION_HOPPER_CUH

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/core/wgmma.h"

enum {
    QS_HOPPER_THREADS = 256,
    QS_HOPPER_GROUP = 128,             /* threads of a warpgroup */
    QS_HOPPER_OWN = 128,               /* rows of a block's own tile */
    QS_HOPPER_SHARED_MAX = 227 * 1024, /* of a block */
};

/** Can these kernels serve `launch` on the current device? */
static inline bool qs_hopper_serves(const qs_attention_launch *launch)
{
    int device = 0, major = 0;
    const int width = qs_attention_padded_dim(launch->dim);
    return launch->aligned && (width == 64 || width == 128) &&
           cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) ==
               cudaSuccess &&
           major == 9;
}

/** In code for another architecture than sm_90a, which has no wgmma: a build that leaves that out
 * for a Hopper card ends with an error, not with results that nobody wrote. */
__device__ __forceinline__ void qs_not_hopper()
{
    __trap();
}

/** Is this thread one of the second warpgroup? The same for a warp, as the compiler sees by the
 * shuffle. */
__device__ __forceinline__ bool qs_hopper_behind()
{
    return __shfl_sync(QS_ALL_LANES, (int)threadIdx.x / QS_HOPPER_GROUP, 0) > 0;
}

/** All threads of the block, or of a warpgroup: start copying rows [row, row + ROWS) to a tile;
 * zeros behind the last row and behind the head's width. A thread stays in its column. */
template <int D, int ROWS, int THREADS = QS_HOPPER_THREADS>
__device__ __forceinline__ void qs_panel_load(qs_bf16 *tile, qs_head_rows from, int row,
                                              const qs_attention_launch &launch)
{
    const int chunks = D / 8, step = THREADS / chunks, thread = (int)threadIdx.x % THREADS;
    static_assert(step % 8 == 0 && ROWS % step == 0, "chunks are exchanged alike in each turn");
    const int chunk = thread % chunks, first = thread / chunks;
    const int rows = chunk * 8 < launch.dim ? launch.rows - row : 0;
    const qs_bf16 *source = from.data + (int64_t)(row + first) * from.stride + chunk * 8;
    qs_bf16 *target = tile + qs_panel_chunk(ROWS, first, chunk) * 8;
#pragma unroll
    for (int r = 0; r < ROWS; r += step) {
        qs_cp_async_16(target + r * QS_PANEL_COLS, source, first + r < rows);
        source += step * from.stride;
    }
}

/** All copies have come, everybody's, but those of a thread's last PENDING groups; and of the tiles
 * before the last one nobody reads any more: products of the second warpgroup with the last one may
 * be under way. */
template <int PENDING = 0> __device__ __forceinline__ void qs_wait_for_tiles()
{
    qs_cp_async_wait<PENDING>();
    qs_fence_shared_for_wgmma();
    __syncthreads();
}

/** One warp: write its 16 rows of sums, times by[0][half], to rows [row, ...) of `to`, through rows
 * [within, within + 16) of `tile`, which nobody reads any more. */
template <int D>
__device__ __forceinline__ void
qs_panel_store(const float (&acc)[1][D / 8][4], const float (&by)[1][2], qs_bf16 *tile, int within,
               qs_head_rows to, int row, const qs_attention_launch &launch)
{
    const int lane = (int)threadIdx.x % QS_WARP, chunks = D / 8;
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int at = qs_panel_chunk(QS_HOPPER_OWN, within + half * 8 + lane / 4, n) * 8;
            *reinterpret_cast<uint32_t *>(tile + at + lane % 4 * 2) = qs_round_pair(
                acc[0][n][2 * half] * by[0][half], acc[0][n][2 * half + 1] * by[0][half]);
        }
    }
    __syncwarp();
    for (int i = lane; i < 16 * chunks; i += QS_WARP) {
        const int r = i / chunks, chunk = i % chunks;
        if (row + r < launch.rows && chunk * 8 < launch.dim) {
            *reinterpret_cast<uint4 *>(to.data + (row + r) * to.stride + chunk * 8) =
                *reinterpret_cast<const uint4 *>(
                    tile + qs_panel_chunk(QS_HOPPER_OWN, within + r, chunk) * 8);
        }
    }
    __syncwarp();
}

/** Start acc = rows [row, row + 64) of the block's own tile `a` times the N rows of tile `b`, both
 * over D: scores. A product waits for its descriptors: each is one addition to the first one. */
template <int D, int N>
__device__ __forceinline__ void qs_panel_scores(float (&acc)[1][N / 8][4], uint32_t a, int row,
                                                uint32_t b)
{
    const uint64_t left = qs_wgmma_k_major(a + qs_panel_k_major_at(QS_HOPPER_OWN, row, 0));
    const uint64_t right = qs_wgmma_k_major(b);
#pragma unroll
    for (int k = 0; k < D / QS_WGMMA_K; k++) {
        qs_wgmma<N, 0>(acc[0], qs_wgmma_further(left, qs_panel_k_major_at(QS_HOPPER_OWN, 0, k)),
                       qs_wgmma_further(right, qs_panel_k_major_at(N, 0, k)), k > 0);
    }
}

/** Start acc += `left` [64, 16 KT] times the 16 KT rows of tile `b`: weighted sums of rows. */
template <int D, int KT>
__device__ __forceinline__ void qs_panel_sums(float (&acc)[1][D / 8][4],
                                              const uint32_t (&left)[1][KT][4], uint32_t b)
{
    const uint64_t right = qs_wgmma_mn_major(b, KT * QS_WGMMA_K);
#pragma unroll
    for (int k = 0; k < KT; k++) {
        qs_wgmma<D>(acc[0], left[0][k], qs_wgmma_further(right, qs_panel_mn_major_at(k)), 1);
    }
}

#endif
