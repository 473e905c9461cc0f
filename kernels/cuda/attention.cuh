/* What attention's forward and backward share on the device: tiles of rows in shared memory, the
 * two products that are made of them, and the rows of a warp.
 *
 * A block is four warps. Each owns MT times 16 rows of the block's own tile (queries, or keys for
 * dK and dV) and goes over tiles of the other kind, which all warps read. Fragments are those of
 * qs_mma_bf16: with g = lane / 4 and t = lane % 4 a thread holds of a 16 x 8 tile of sums
 *
 *     [0], [1] = row g, columns 2 t, 2 t + 1        [2], [3] = row g + 8
 *
 * and two such tiles side by side, rounded to bf16, are a left operand of the next product as they
 * stand: scores become weights without passing through memory (Dao 2023, arXiv:2307.08691). */
#ifndef QS_KERNELS_CUDA_ATTENTION_CUH
#define QS_KERNELS_CUDA_ATTENTION_CUH

#include "kernels/cuda/core/attention_tiles.h"
#include "kernels/cuda/cuda_impl.cuh"

enum {
    QS_ATTENTION_WARPS = 4,
    QS_ATTENTION_THREADS = QS_ATTENTION_WARPS * QS_WARP,
    QS_ATTENTION_SHARED_MAX = 99 * 1024, /* of a block on sm_86, 89 and 120 */
};

static const float QS_LOG2_E = 1.44269504088896340736f;

/** One launch. */
typedef struct {
    const int32_t *cu_seqlens;
    int n_docs, rows, window;
    int n_heads, n_kv_heads, heads_per_kv, dim;
    int tiles; /* of the blocks' own kind */
    float scale;
    bool aligned;     /* every matrix can be moved in pieces of 16 bytes */
    float cap;        /* 0: none */
    float tanh_scale; /* with a cap: of scores, for qs_cap_scores */
} qs_attention_launch;

/** The factor of what the softmax takes: scores or, with a cap, their tanh. */
template <bool CAP>
__device__ __forceinline__ float qs_softmax_scale(const qs_attention_launch &launch)
{
    return CAP ? launch.cap : launch.scale;
}

/** The columns of one head in a matrix, from its first row on. */
typedef struct {
    qs_bf16 *data;
    int64_t stride;
} qs_head_rows;

static inline qs_head_rows qs_head_rows_of(const qs_mat *mat)
{
    const qs_head_rows rows = {(qs_bf16 *)mat->data, mat->stride};
    return rows;
}

__device__ __forceinline__ qs_head_rows qs_head_rows_at(qs_head_rows rows, int head, int dim)
{
    rows.data += (int64_t)head * dim;
    return rows;
}

/* ---- tiles ---- */

/** The 16 bytes of a tile with rows of D elements. */
template <int D> __device__ __forceinline__ qs_bf16 *qs_tile_at(qs_bf16 *tile, int row, int chunk)
{
    return tile + row * D + qs_attention_chunk(D / 8, row, chunk) * 8;
}

/** The same for a chunk of which the even part is a constant. */
template <int D>
__device__ __forceinline__ const qs_bf16 *qs_fragment_at(const qs_bf16 *tile, int row, int even,
                                                         int odd)
{
    return tile + row * D + qs_attention_chunk_of(D / 8, row, even, odd) * 8;
}

/* Eight elements of a row whose address has no particular alignment. */
__device__ __forceinline__ uint4 qs_gather_8(const qs_bf16 *from)
{
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        word[i] = (uint32_t)from[2 * i].bits | ((uint32_t)from[2 * i + 1].bits << 16);
    }
    return make_uint4(word[0], word[1], word[2], word[3]);
}

__device__ __forceinline__ void qs_spread_8(qs_bf16 *to, uint4 value)
{
    const uint32_t word[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        to[2 * i].bits = (uint16_t)word[i];
        to[2 * i + 1].bits = (uint16_t)(word[i] >> 16);
    }
}

/* Rows [row, row + ROWS) to a tile. Where the chunks of a row divide the threads, a thread stays in
 * its column: one address, one offset. */
template <int D, int ROWS>
__device__ __forceinline__ void qs_tile_copy(qs_bf16 *tile, qs_head_rows from, int row,
                                             const qs_attention_launch &launch)
{
    const int chunks = D / 8, step = QS_ATTENTION_THREADS / chunks;
    if (QS_ATTENTION_THREADS % chunks == 0 && ROWS % step == 0 && step % 8 == 0) {
        const int chunk = (int)threadIdx.x % chunks, first = (int)threadIdx.x / chunks;
        const int rows = chunk * 8 < launch.dim ? launch.rows - row : 0;
        const qs_bf16 *source = from.data + (int64_t)(row + first) * from.stride + chunk * 8;
        qs_bf16 *target = qs_tile_at<D>(tile, first, chunk);
#pragma unroll
        for (int r = 0; r < ROWS; r += step) {
            qs_cp_async_16(target + r * D, source, first + r < rows);
            source += step * from.stride;
        }
    } else {
#pragma unroll
        for (int i = (int)threadIdx.x; i < ROWS * chunks; i += QS_ATTENTION_THREADS) {
            const int r = i / chunks, chunk = i % chunks;
            qs_cp_async_16(qs_tile_at<D>(tile, r, chunk),
                           from.data + (int64_t)(row + r) * from.stride + chunk * 8,
                           row + r < launch.rows && chunk * 8 < launch.dim);
        }
    }
}

/* The same, slowly, from rows of any alignment. */
template <int D, int ROWS>
__device__ __forceinline__ void qs_tile_gather(qs_bf16 *tile, qs_head_rows from, int row,
                                               const qs_attention_launch &launch)
{
    const int chunks = D / 8;
#pragma unroll 1
    for (int i = (int)threadIdx.x; i < ROWS * chunks; i += QS_ATTENTION_THREADS) {
        const int r = i / chunks, chunk = i % chunks;
        uint4 value = make_uint4(0, 0, 0, 0);
        if (row + r < launch.rows && chunk * 8 < launch.dim) {
            value = qs_gather_8(from.data + (int64_t)(row + r) * from.stride + chunk * 8);
        }
        *reinterpret_cast<uint4 *>(qs_tile_at<D>(tile, r, chunk)) = value;
    }
}

/** All threads of the block: start copying rows [row, row + ROWS) to a tile. Zeros stand behind the
 * last row and behind the head's width, so that products need no bounds. */
template <int D, int ROWS>
__device__ __forceinline__ void qs_tile_load(qs_bf16 *tile, qs_head_rows from, int row,
                                             const qs_attention_launch &launch)
{
    if (launch.aligned) {
        qs_tile_copy<D, ROWS>(tile, from, row, launch);
    } else {
        qs_tile_gather<D, ROWS>(tile, from, row, launch);
    }
}

/** One warp: write its 16 MT rows of sums, times by[m][half], to rows [row, ...) of `to`. They pass
 * through its rows of `tile`, which no other warp reads, so that memory sees whole pieces. */
template <int D, int MT>
__device__ __forceinline__ void
qs_rows_store(const float (&acc)[MT][D / 8][4], const float (&by)[MT][2], qs_bf16 *tile,
              qs_head_rows to, int row, const qs_attention_launch &launch)
{
    const int lane = (int)threadIdx.x % QS_WARP, chunks = D / 8;
    __syncwarp();
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                qs_bf16 *at = qs_tile_at<D>(tile, m * 16 + half * 8 + lane / 4, n) + lane % 4 * 2;
                *reinterpret_cast<uint32_t *>(at) = qs_round_pair(
                    acc[m][n][2 * half] * by[m][half], acc[m][n][2 * half + 1] * by[m][half]);
            }
        }
    }
    __syncwarp();
    for (int i = lane; i < MT * 16 * chunks; i += QS_WARP) {
        const int r = i / chunks, chunk = i % chunks;
        if (row + r < launch.rows && chunk * 8 < launch.dim) {
            qs_bf16 *target = to.data + (row + r) * to.stride + chunk * 8;
            const uint4 value = *reinterpret_cast<const uint4 *>(qs_tile_at<D>(tile, r, chunk));
            if (launch.aligned) {
                *reinterpret_cast<uint4 *>(target) = value;
            } else {
                qs_spread_8(target, value);
            }
        }
    }
}

/* ---- products ---- */

template <int MT, int NT> __device__ __forceinline__ void qs_zero(float (&acc)[MT][NT][4])
{
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int n = 0; n < NT; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                acc[m][n][i] = 0.0f;
            }
        }
    }
}

/** acc = rows [0, 16 MT) of `a` times rows [0, 8 NT) of `b`, both over D: scores. */
template <int D, int MT, int NT>
__device__ __forceinline__ void qs_product_of_rows(float (&acc)[MT][NT][4], const qs_bf16 *a,
                                                   const qs_bf16 *b)
{
    const int lane = (int)threadIdx.x % QS_WARP;
    qs_zero(acc);
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        uint32_t left[MT][4];
#pragma unroll
        for (int m = 0; m < MT; m++) {
            qs_ldmatrix_x4(left[m], qs_fragment_at<D>(a, m * 16 + lane % 16, 2 * k, lane / 16));
        }
#pragma unroll
        for (int n = 0; n < NT / 2; n++) {
            uint32_t right[4]; /* columns 16 n .. 16 n + 7, then the next eight */
            qs_ldmatrix_x4(right, qs_fragment_at<D>(b, n * 16 + lane / 16 * 8 + lane % 8, 2 * k,
                                                    lane / 8 % 2));
#pragma unroll
            for (int m = 0; m < MT; m++) {
                qs_mma_bf16(acc[m][2 * n], left[m], right);
                qs_mma_bf16(acc[m][2 * n + 1], left[m], right + 2);
            }
        }
    }
}

/** Sums as left operands of a product over their columns. */
template <int MT, int NT>
__device__ __forceinline__ void qs_as_left(uint32_t (&left)[MT][NT / 2][4],
                                           const float (&acc)[MT][NT][4])
{
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int k = 0; k < NT / 2; k++) {
            left[m][k][0] = qs_round_pair(acc[m][2 * k][0], acc[m][2 * k][1]);
            left[m][k][1] = qs_round_pair(acc[m][2 * k][2], acc[m][2 * k][3]);
            left[m][k][2] = qs_round_pair(acc[m][2 * k + 1][0], acc[m][2 * k + 1][1]);
            left[m][k][3] = qs_round_pair(acc[m][2 * k + 1][2], acc[m][2 * k + 1][3]);
        }
    }
}

/** acc += `left` [16 MT, 16 KT] times rows [0, 16 KT) of `b`: weighted sums of rows. */
template <int D, int MT, int KT>
__device__ __forceinline__ void qs_sum_of_rows(float (&acc)[MT][D / 8][4],
                                               const uint32_t (&left)[MT][KT][4], const qs_bf16 *b)
{
    const int lane = (int)threadIdx.x % QS_WARP;
#pragma unroll
    for (int k = 0; k < KT; k++) {
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            uint32_t right[4];
            qs_ldmatrix_x4_trans(right, qs_fragment_at<D>(b, k * 16 + lane % 16, 2 * n, lane / 16));
#pragma unroll
            for (int m = 0; m < MT; m++) {
                qs_mma_bf16(acc[m][2 * n], left[m][k], right);
                qs_mma_bf16(acc[m][2 * n + 1], left[m][k], right + 2);
            }
        }
    }
}

/** Scores s to tanh(scale s / cap) as 1 - 2 / (1 + exp(2 x)), of which `by` = 2 log2(e) scale / cap
 * has the constants. It is off by 2^-23 at most: that times the cap is far below what rounding q
 * and k to bf16 leaves of a score. */
template <int MT, int NT>
__device__ __forceinline__ void qs_cap_scores(float (&scores)[MT][NT][4], float by)
{
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int n = 0; n < NT; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float e = qs_exp2(scores[m][n][i] * by);
                scores[m][n][i] = fmaf(-2.0f, qs_reciprocal(1.0f + e), 1.0f);
            }
        }
    }
}

/* ---- rows ---- */

/** Row `m`, `half` of this thread, counted from the warp's first. */
__device__ __forceinline__ int qs_thread_row(int m, int half)
{
    return m * 16 + half * 8 + (int)threadIdx.x % QS_WARP / 4;
}

/** Columns of this thread in the n-th tile of eight. */
__device__ __forceinline__ int qs_thread_col(int n)
{
    return n * 8 + (int)threadIdx.x % 4 * 2;
}

/** Sums whose row of the warp and column of the tile are not visible(row, column) get the value
 * `hidden`. */
template <int MT, int NT, typename predicate>
__device__ __forceinline__ void qs_mask(float (&acc)[MT][NT][4], float hidden, predicate visible)
{
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int n = 0; n < NT; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (!visible(qs_thread_row(m, i / 2), qs_thread_col(n) + i % 2)) {
                    acc[m][n][i] = hidden;
                }
            }
        }
    }
}

/* ---- host ---- */

/** Check a launch and fill what does not depend on the kernel. */
static inline qs_status qs_attention_launch_make(const qs_attention_shape *shape, const qs_mat *qm,
                                                 qs_attention_launch *out)
{
    if (shape->head_dim < 8 || shape->head_dim % 8 != 0 ||
        qs_attention_padded_dim(shape->head_dim) == 0 || shape->n_kv_heads < 1 ||
        shape->n_heads % shape->n_kv_heads != 0 || shape->window < 0 ||
        qm->rows > INT32_MAX - 256) {
        return QS_FAIL(QS_ERR_BUG,
                       "attention of %d heads on %d, head_dim %d, window %d, %lld rows: the CUDA "
                       "kernels take head_dim 8, 16, .. 256",
                       shape->n_heads, shape->n_kv_heads, shape->head_dim, shape->window,
                       (long long)qm->rows);
    }
    out->cu_seqlens = shape->cu_seqlens;
    out->n_docs = shape->n_docs;
    out->rows = (int)qm->rows;
    out->window = shape->window;
    out->n_heads = shape->n_heads;
    out->n_kv_heads = shape->n_kv_heads;
    out->heads_per_kv = shape->n_heads / shape->n_kv_heads;
    out->dim = shape->head_dim;
    out->tiles = 0;
    out->scale = shape->scale;
    out->cap = shape->cap;
    out->tanh_scale = shape->cap > 0.0f ? 2.0f * QS_LOG2_E * shape->scale / shape->cap : 0.0f;
    out->aligned = true;
    return QS_OK;
}

/** Can rows and heads of `mat` be moved in pieces of 16 bytes? (head_dim is a multiple of 8.) */
static inline bool qs_attention_aligned(const qs_mat *mat)
{
    return (uintptr_t)mat->data % 16 == 0 && mat->stride % 8 == 0;
}

#endif
