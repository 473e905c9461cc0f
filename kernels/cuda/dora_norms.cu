/* DoRA's row norms (Liu et al. 2024, arXiv:2402.09353): ||W + s B A|| row by row, and the gains
 * m / norm, once a step and layer. B A is never stored: a warp makes a strip of it with tensor
 * cores, adds W's, and keeps the squares (core/dora.h says who holds what).
 *
 * The bound is memory: 2 B a weight, W in bf16 as the opened unit has it; Llama-3-8B's layer, 218 M
 * weights: 0.13 ms at 3.35 TB/s. Beside it rank / 16 B a weight of A, which comes from the L2
 * cache, and 2 rank flops on tensor cores. Not opened, W is decoded first.
 *
 * Precision: W, A and B are bf16 and their products exact; sums are fp32, those of squares along a
 * row in trees over (8 elements, every 8th strip, 4 threads, 8 warps), about 35 additions of 4096
 * columns one behind the other. An element's bits are those of W alone where B is zero, so that a
 * gain begins as 1.
 *
 * Ranks beyond 64 go in pieces of 64, and read B's part again for each strip.
 *
 * Registers of norms_kernel for up to 16, 32, 64 ranks on sm_80, 86, 89, 90a, 100, 120, aligned
 * rows and others alike within 8: 112 112 112 113 120 114, 120 120 120 121 118 120, 128 126 126 126
 * 122 123; shared memory 11, 21, 42 kB; no spills, but 28 bytes on sm_80 with aligned rows and 64
 * ranks.
 */
#include "kernels/cuda/bordered.cuh"
#include "kernels/cuda/core/dora.h"
#include "kernels/cuda/lora.cuh"
#include "kernels/cuda/vector.cuh"

namespace
{

constexpr int ROW_TILES = QS_DORA_NORM_ROWS / 16; /* of a product, 16 rows each */
constexpr int STEPS_MAX = QS_DORA_RANKS_MAX / 16; /* products along the ranks of a piece */

static_assert(QS_DORA_RANKS_MAX % 16 == 0 && QS_DORA_NORM_ROWS % 16 == 0 && QS_DORA_TILES == 4,
              "tiles of qs_mma_bf16, and eight columns a thread");
static_assert(QS_DORA_WORDS % 4 == 0, "rows of the strip start on 16 bytes");
static_assert(QS_DORA_NORM_ROWS <= QS_DORA_NORM_WARPS * (int)QS_WARP,
              "a thread writes a row's norm");

struct norm_call {
    qs_rows_of<const qs_bf16> w, a, b; /* [out, in], [rank, in], [out, rank] */
    int64_t out, in;
    int rank; /* 0: W alone */
    float scale;
    const float *magnitude; /* NULL: no gains are wanted */
    float *norm, *gain;
};

/* Eight elements of a row from `column` on, zeros past its end. VECTORS: rows hold whole pieces of
 * 16 bytes, and start on one. */
template <bool VECTORS>
__device__ __forceinline__ uint4 load_piece(const qs_bf16 *row, int64_t column, int64_t cols)
{
    if constexpr (VECTORS) {
        return column < cols ? qs_load_16(row + column) : make_uint4(0, 0, 0, 0);
    } else {
        uint32_t word[4];
        for (int i = 0; i < 4; i++) {
            const int64_t at = column + 2 * i;
            const uint32_t low = at < cols ? row[at].bits : 0u;
            const uint32_t high = at + 1 < cols ? row[at + 1].bits : 0u;
            word[i] = low | high << 16;
        }
        return make_uint4(word[0], word[1], word[2], word[3]);
    }
}

/* B's elements [row][k], [row][k + 1] as a word; zeros outside. */
__device__ __forceinline__ uint32_t load_pair(const norm_call &c, int64_t row, int k)
{
    if (row >= c.out || k >= c.rank) {
        return 0;
    }
    const qs_bf16 *from = c.b.data + row * c.b.stride + k;
    return from[0].bits | (k + 1 < c.rank ? (uint32_t)from[1].bits << 16 : 0u);
}

/* B's rows from `row0` and ranks from `k0` on, as left operands. */
template <int STEPS>
__device__ __forceinline__ void load_b(const norm_call &c, int64_t row0, int k0,
                                       uint32_t (&b)[ROW_TILES][STEPS][4])
{
    const int g = (int)threadIdx.x % QS_WARP / 4, t = (int)threadIdx.x % 4;
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) {
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                b[m][step][i] =
                    load_pair(c, row0 + m * 16 + i % 2 * 8 + g, k0 + step * 16 + i / 2 * 8 + 2 * t);
            }
        }
    }
}

/* A's ranks from `k0` on, columns of one strip, to this warp's shared memory, tile by tile; zeros
 * behind the last rank of the piece's last product. */
template <bool VECTORS, int STEPS>
__device__ __forceinline__ void store_a(const norm_call &c, int64_t column0, int k0,
                                        uint32_t *strip)
{
    const int lane = (int)threadIdx.x % QS_WARP, t = lane % 4;
    const int ranks = min(c.rank - k0, 16 * STEPS);
    for (int k = lane / 4; k < (ranks + 15) / 16 * 16; k += QS_WARP / 4) {
        uint4 piece = make_uint4(0, 0, 0, 0);
        if (k < ranks) {
            piece = load_piece<VECTORS>(c.a.data + (k0 + k) * c.a.stride, column0 + 8 * t, c.in);
        }
        uint32_t *row = strip + k * QS_DORA_WORDS;
        row[qs_dora_word(t, 0)] = piece.x;
        row[qs_dora_word(t, 1)] = piece.y;
        row[qs_dora_word(t, 2)] = piece.z;
        row[qs_dora_word(t, 3)] = piece.w;
    }
}

/* sums += B A for the piece of ranks that begins with k0. */
template <int STEPS>
__device__ __forceinline__ void add_products(float (&sums)[ROW_TILES][QS_DORA_TILES][4],
                                             const uint32_t (&b)[ROW_TILES][STEPS][4],
                                             const uint32_t *strip, int ranks)
{
    const int lane = (int)threadIdx.x % QS_WARP, matrix = lane / 8;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        if (step * 16 >= ranks) {
            break;
        }
        const uint32_t *row = strip + (step * 16 + matrix % 2 * 8 + lane % 8) * QS_DORA_WORDS;
#pragma unroll
        for (int tile = 0; tile < QS_DORA_TILES; tile += 2) {
            uint32_t a[4]; /* of two tiles */
            qs_ldmatrix_x4_trans(a, row + (tile + matrix / 2) * 4);
#pragma unroll
            for (int m = 0; m < ROW_TILES; m++) {
                qs_mma_bf16(sums[m][tile], b[m][step], a);
                qs_mma_bf16(sums[m][tile + 1], b[m][step], a + 2);
            }
        }
    }
}

/* The squares of a row's eight elements: a pair is in word `tile` of W's piece and in the same half
 * of tile `tile` of the sums. */
__device__ __forceinline__ float squares_of(uint4 piece, const float (&sums)[QS_DORA_TILES][4],
                                            int half, float scale)
{
    const uint32_t word[QS_DORA_TILES] = {piece.x, piece.y, piece.z, piece.w};
    float squares = 0.0f;
#pragma unroll
    for (int tile = 0; tile < QS_DORA_TILES; tile++) {
        float w[2];
        qs_unpack_pair(w, word[tile]);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float value = w[i] + scale * sums[tile][2 * half + i];
            squares += value * value;
        }
    }
    return squares;
}

/* A warp's share of the squares of 32 rows: every 8th strip. */
template <bool VECTORS, int STEPS>
__device__ __forceinline__ void add_strips(const norm_call &c, int64_t row0, uint32_t *strip,
                                           float (&squares)[ROW_TILES][2])
{
    const int lane = (int)threadIdx.x % QS_WARP, warp = (int)threadIdx.x / QS_WARP;
    uint32_t b[ROW_TILES][STEPS][4];
    load_b<STEPS>(c, row0, 0, b);
    for (int64_t column0 = (int64_t)warp * QS_DORA_STRIP; column0 < c.in;
         column0 += QS_DORA_NORM_WARPS * QS_DORA_STRIP) {
        uint4 piece[ROW_TILES][2];
        float sums[ROW_TILES][QS_DORA_TILES][4] = {};
#pragma unroll
        for (int i = 0; i < 2 * ROW_TILES; i++) {
            const int64_t row = row0 + i * 8 + lane / 4;
            piece[i / 2][i % 2] = row < c.out ? load_piece<VECTORS>(c.w.data + row * c.w.stride,
                                                                    column0 + lane % 4 * 8, c.in)
                                              : make_uint4(0, 0, 0, 0);
        }
        for (int k0 = 0; k0 < c.rank; k0 += 16 * STEPS) {
            if (c.rank > 16 * STEPS) {
                load_b<STEPS>(c, row0, k0, b);
            }
            __syncwarp(); /* all have read the piece before */
            store_a<VECTORS, STEPS>(c, column0, k0, strip);
            __syncwarp();
            add_products<STEPS>(sums, b, strip, c.rank - k0);
        }
#pragma unroll
        for (int i = 0; i < 2 * ROW_TILES; i++) {
            squares[i / 2][i % 2] += squares_of(piece[i / 2][i % 2], sums[i / 2], i % 2, c.scale);
        }
    }
}

template <bool VECTORS, int STEPS>
__global__ void __launch_bounds__(QS_DORA_NORM_WARPS *QS_WARP) norms_kernel(norm_call c)
{
    __shared__ __align__(16) uint32_t strips[QS_DORA_NORM_WARPS][16 * STEPS * QS_DORA_WORDS];
    __shared__ float of_warp[QS_DORA_NORM_WARPS][QS_DORA_NORM_ROWS];
    const int lane = (int)threadIdx.x % QS_WARP, warp = (int)threadIdx.x / QS_WARP;
    const int64_t row0 = (int64_t)blockIdx.x * QS_DORA_NORM_ROWS;
    float squares[ROW_TILES][2] = {};
    add_strips<VECTORS, STEPS>(c, row0, strips[warp], squares);
#pragma unroll
    for (int i = 0; i < 2 * ROW_TILES; i++) {
        float sum = squares[i / 2][i % 2];
        sum += __shfl_xor_sync(QS_ALL_LANES, sum, 1);
        sum += __shfl_xor_sync(QS_ALL_LANES, sum, 2);
        if (lane % 4 == 0) {
            of_warp[warp][i * 8 + lane / 4] = sum;
        }
    }
    __syncthreads(); /* all warps' sums are there */
    const int64_t row = row0 + threadIdx.x;
    if (threadIdx.x >= QS_DORA_NORM_ROWS || row >= c.out) {
        return;
    }
    float sum = 0.0f;
    for (int i = 0; i < QS_DORA_NORM_WARPS; i++) {
        sum += of_warp[i][threadIdx.x];
    }
    const float norm = sqrtf(sum);
    c.norm[row] = norm;
    if (c.magnitude != NULL) {
        c.gain[row] = norm > 0.0f ? c.magnitude[row] / norm : 0.0f;
    }
}

template <int STEPS> void launch(qs_queue *q, const norm_call &call, bool vectors)
{
    const unsigned grid = (unsigned)qs_hd_ceil_div(call.out, QS_DORA_NORM_ROWS);
    if (vectors) {
        QS_LAUNCH((norms_kernel<true, STEPS>), grid, QS_DORA_NORM_WARPS * QS_WARP, 0,
                  qs_cuda_stream(q), call);
    } else {
        QS_LAUNCH((norms_kernel<false, STEPS>), grid, QS_DORA_NORM_WARPS * QS_WARP, 0,
                  qs_cuda_stream(q), call);
    }
}

/* The adapter, from the border where it stands there: rows on 16 bytes. */
void set_adapter(const qs_bordered *to, const qs_lora *lora, norm_call *call, bool *vectors)
{
    if (lora->a == NULL) {
        return;
    }
    qs_mat a = qs_cuda_lora_a(lora, call->in), b = qs_cuda_lora_b(lora, call->out);
    if (to->linear != NULL) {
        a = qs_bordered_part(to->linear, call->out, lora->rank, 0, call->in);
        b = qs_bordered_part(to->linear, 0, call->out, call->in, lora->rank);
    }
    call->a = qs_rows<const qs_bf16>(&a);
    call->b = qs_rows<const qs_bf16>(&b);
    call->rank = lora->rank;
    call->scale = lora->scale;
    *vectors = *vectors && qs_mat_is_vectors(&a);
}

} // namespace

extern "C" qs_status qs_cuda_dora_norms(qs_queue *q, const qs_unit_view *unit, const qs_weight *w,
                                        const qs_lora *lora, const float *magnitude, float *norm,
                                        float *gain)
{
    const qs_bordered to = qs_bordered_linear(q, unit, w, lora);
    qs_mat matrix;
    norm_call call = {};
    QS_TRY(qs_frozen_matrix(q, unit, w, &matrix));
    call.w = qs_rows<const qs_bf16>(&matrix);
    call.out = w->out;
    call.in = w->in;
    call.magnitude = magnitude;
    call.norm = norm;
    call.gain = gain;
    bool vectors = qs_mat_is_vectors(&matrix);
    set_adapter(&to, lora, &call, &vectors);
    if (call.out == 0) {
        return QS_OK;
    }
    if (call.rank <= 16) {
        launch<1>(q, call, vectors);
    } else if (call.rank <= 32) {
        launch<2>(q, call, vectors);
    } else {
        launch<STEPS_MAX>(q, call, vectors);
    }
    return qs_cuda_launched("norms_kernel");
}
