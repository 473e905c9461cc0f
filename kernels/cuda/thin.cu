/* Products with one short side, by mma.sync: what an adapter adds to a linear.
 *
 *     X A^T, dY B        C [wide, thin], bf16: rows of X or dY times the adapter's matrix
 *     dB, dA             C [wide, thin] or [thin, wide], fp32: columns of dY or X times xa or s dY
 * B, summed over the tokens
 *
 * The bound is the bytes: the wide matrix is read once. 2 thin FLOPs an element of 2 bytes are 64
 * for a thin side of 32: 107 TFLOP/s at an H100's 3.35 TB/s, a ninth of its tensor cores' rate. So
 * a block of eight warps streams chunks of 128 x 64 through four stages of shared memory, 48 KB
 * ahead, two blocks a multiprocessor where they fit: 96 KB under way, where latency times bandwidth
 * of an H100 asks for some 32. What is thin comes from the L2 cache, once a block: thin / 128 of
 * the wide bytes.
 *
 * Few tiles are split along the depth (core/thin.h). Each block leaves its fp32 sums in scratch, as
 * its registers have them, and the last one to arrive adds all of a tile up, in order of the depth:
 * the same bits, whoever is last. (Counting is the one atomic; it starts and ends at 0.)
 *
 * Sums are fp32; alpha, C0, one rounding.
 *
 * Shared memory 72, 80, 96 KB for a thin side of 16, 32, 64; registers of the three layouts on
 * sm_80 to sm_90a and sm_100, 120: 52 to 64 and 86 to 90; 92 and 94 to 96; 107 to 112 and 111 to
 * 116. No spills.
 */
#include "kernels/cuda/core/thin.h"

#include "kernels/cuda/cuda_impl.cuh"

enum {
    WARPS = 8,
    THREADS = WARPS * QS_WARP,
    STAGES = 4,
    SHARED_MAX = 99 * 1024, /* of a block on sm_86, 89 and 120 */
    WIDE_ELEMS = QS_THIN_WIDE * QS_THIN_DEPTH,
};

static_assert(QS_THIN_WIDE == WARPS * 16, "sixteen of the wide side a warp");

/* The wide operand lies as [wide, depth] (ROWS) or [depth, wide] (COLUMNS); so the thin one. */
enum layout { ROWS, COLUMNS };

typedef struct {
    const qs_bf16 *data;
    int64_t stride;
    int64_t size; /* of its side that is not the depth */
} operand;

typedef struct {
    operand wide, thin;
    int64_t depth;
    qs_thin_cut cut;
    float alpha;
    void *c; /* bf16 [wide, thin] if the wide operand lies in rows, else fp32 */
    int64_t c_stride;
    bool turned;       /* fp32: c is [thin, wide] */
    bool add;          /* fp32: to what c holds */
    float4 *parts;     /* [tiles, splits, NT, THREADS] */
    unsigned *arrived; /* [tiles], zeros before and after */
} thin_args;

/* ---- shared memory ---- */

/* A tile of `SIDE` of an operand by a chunk of the depth, as the operand lies. */
template <int SIDE, layout LAYOUT> struct tile_of {
    static constexpr int HEIGHT = LAYOUT == ROWS ? SIDE : QS_THIN_DEPTH;
    static constexpr int PIECES = (LAYOUT == ROWS ? QS_THIN_DEPTH : SIDE) / 8;
};

/* Start copying the tile from (first, depth) on; zeros stand where the matrix has ended, so that
 * products need no bounds. A thread stays in its column of pieces. */
template <int SIDE, layout LAYOUT>
static __device__ __forceinline__ void load_tile(qs_bf16 *tile, const operand &from, int64_t first,
                                                 int64_t depth, int64_t depth_end)
{
    const int height = tile_of<SIDE, LAYOUT>::HEIGHT, pieces = tile_of<SIDE, LAYOUT>::PIECES;
    const int step = THREADS / pieces;
    static_assert(THREADS % pieces == 0 && step % 8 == 0, "rows of a thread are turned alike");
    const int own = (int)threadIdx.x / pieces, piece = (int)threadIdx.x % pieces;
    const int64_t row = (LAYOUT == ROWS ? first : depth) + own;
    const int64_t column = (LAYOUT == ROWS ? depth : first) + piece * 8;
    const int64_t rows = LAYOUT == ROWS ? from.size : depth_end;
    const bool inside = column < (LAYOUT == ROWS ? depth_end : from.size);
    const qs_bf16 *source = from.data + row * from.stride + column;
    qs_bf16 *target = tile + qs_thin_at(pieces, own, piece);
#pragma unroll
    for (int r = 0; r < height; r += step) {
        if (own + r < height) {
            qs_cp_async_16(target + r * pieces * 8, source, inside && row + r < rows);
        }
        source += step * from.stride;
    }
}

/* ---- a chunk ---- */

/* sums [16 of the warp, 8 NT] += the chunk's products; fragments as qs_mma_bf16 has them. */
template <int NT, layout WIDE, layout THIN>
static __device__ __forceinline__ void multiply(float (&sums)[NT][4], const qs_bf16 *wide,
                                                const qs_bf16 *thin)
{
    const int lane = (int)threadIdx.x % QS_WARP, warp = (int)threadIdx.x / QS_WARP;
    const int wide_pieces = tile_of<QS_THIN_WIDE, WIDE>::PIECES;
    const int thin_pieces = tile_of<NT * 8, THIN>::PIECES;
#pragma unroll
    for (int k = 0; k < QS_THIN_DEPTH / 16; k++) {
        uint32_t left[4];
        if (WIDE == ROWS) {
            qs_ldmatrix_x4(
                left, wide + qs_thin_at(wide_pieces, warp * 16 + lane % 16, 2 * k + lane / 16));
        } else {
            qs_ldmatrix_x4_trans(left,
                                 wide + qs_thin_at(wide_pieces, k * 16 + lane / 16 * 8 + lane % 8,
                                                   2 * warp + lane / 8 % 2));
        }
#pragma unroll
        for (int n = 0; n < NT / 2; n++) {
            uint32_t right[4]; /* columns 16 n .. 16 n + 7, then the next eight */
            if (THIN == ROWS) {
                qs_ldmatrix_x4(right,
                               thin + qs_thin_at(thin_pieces, n * 16 + lane / 16 * 8 + lane % 8,
                                                 2 * k + lane / 8 % 2));
            } else {
                qs_ldmatrix_x4_trans(
                    right, thin + qs_thin_at(thin_pieces, k * 16 + lane % 16, 2 * n + lane / 16));
            }
            qs_mma_bf16(sums[2 * n], left, right);
            qs_mma_bf16(sums[2 * n + 1], left, right + 2);
        }
    }
}

/* ---- the splits of a tile ---- */

/* Every thread of the block: is this block the last of its tile? What the others have written is
 * seen then. */
static __device__ __forceinline__ bool is_last(unsigned *arrived, int splits)
{
    __shared__ bool last;
    __syncthreads(); /* all threads of the block have written */
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(arrived, 1u) == (unsigned)splits - 1;
        __threadfence();
        if (last) {
            *arrived = 0; /* for the next launch */
        }
    }
    __syncthreads();
    return last;
}

/* Leave the sums of a split; for the last block of a tile, true and the sums of all. */
template <int NT>
static __device__ __forceinline__ bool add_splits(float (&sums)[NT][4], const thin_args &args,
                                                  int64_t tile, int split)
{
    const int splits = args.cut.splits;
    float4 *parts = args.parts + tile * splits * NT * THREADS + threadIdx.x;
#pragma unroll
    for (int n = 0; n < NT; n++) {
        parts[(split * NT + n) * THREADS] =
            make_float4(sums[n][0], sums[n][1], sums[n][2], sums[n][3]);
        sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0.0f;
    }
    if (!is_last(&args.arrived[tile], splits)) {
        return false;
    }
    for (int s = 0; s < splits; s++) {
#pragma unroll
        for (int n = 0; n < NT; n++) {
            const float4 part = __ldcg(&parts[(s * NT + n) * THREADS]);
            sums[n][0] += part.x;
            sums[n][1] += part.y;
            sums[n][2] += part.z;
            sums[n][3] += part.w;
        }
    }
    return true;
}

/* ---- the result ---- */

static __device__ __forceinline__ void store_sum(const thin_args &args, int64_t wide, int thin,
                                                 float sum)
{
    float *at =
        (float *)args.c + (args.turned ? thin * args.c_stride + wide : wide * args.c_stride + thin);
    *at = args.add ? *at + args.alpha * sum : args.alpha * sum;
}

template <int NT, layout WIDE>
static __device__ __forceinline__ void store(const float (&sums)[NT][4], const thin_args &args,
                                             int64_t first)
{
    const int lane = (int)threadIdx.x % QS_WARP, warp = (int)threadIdx.x / QS_WARP;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int64_t wide = first + warp * 16 + half * 8 + lane / 4;
        if (wide >= args.wide.size) {
            continue;
        }
#pragma unroll
        for (int n = 0; n < NT; n++) {
            const int thin = n * 8 + lane % 4 * 2; /* and the next: their number is even */
            const float *pair = &sums[n][2 * half];
            if (thin >= args.thin.size) {
                continue;
            }
            if (WIDE == ROWS) {
                qs_bf16 *at = (qs_bf16 *)args.c + wide * args.c_stride + thin;
                *reinterpret_cast<uint32_t *>(at) =
                    qs_round_pair(args.alpha * pair[0], args.alpha * pair[1]);
            } else {
                store_sum(args, wide, thin, pair[0]);
                store_sum(args, wide, thin + 1, pair[1]);
            }
        }
    }
}

/* ---- the kernel ---- */

/* NT: eights of the thin side, 2, 4 or 8. */
template <int NT, layout WIDE, layout THIN>
static __global__ void __launch_bounds__(THREADS, 2) thin_kernel(const thin_args args)
{
    const int stage_elems = WIDE_ELEMS + NT * 8 * QS_THIN_DEPTH;
    QS_DYNAMIC_SHARED(qs_bf16, stages);
    const int64_t tile = blockIdx.x / (unsigned)args.cut.splits;
    const int split = (int)(blockIdx.x % (unsigned)args.cut.splits);
    const int64_t first = tile * QS_THIN_WIDE;
    const int64_t begin = split * args.cut.per_split;
    const int count = (int)qs_hd_min(args.cut.per_split, args.cut.chunks - begin);
    const auto load = [&](int chunk) {
        qs_bf16 *stage = stages + chunk % STAGES * stage_elems;
        const int64_t depth = (begin + chunk) * QS_THIN_DEPTH;
        if (chunk < count) {
            load_tile<QS_THIN_WIDE, WIDE>(stage, args.wide, first, depth, args.depth);
            load_tile<NT * 8, THIN>(stage + WIDE_ELEMS, args.thin, 0, depth, args.depth);
        }
        qs_cp_async_commit(); /* empty ones count, too */
    };
    float sums[NT][4] = {};
#pragma unroll
    for (int chunk = 0; chunk < STAGES - 1; chunk++) {
        load(chunk);
    }
    for (int chunk = 0; chunk < count; chunk++) {
        const qs_bf16 *stage = stages + chunk % STAGES * stage_elems;
        qs_cp_async_wait<STAGES - 2>();
        __syncthreads(); /* all copies have come, and nobody reads the stage before any more */
        load(chunk + STAGES - 1);
        multiply<NT, WIDE, THIN>(sums, stage, stage + WIDE_ELEMS);
    }
    if (args.cut.splits == 1 || add_splits(sums, args, tile, split)) {
        store<NT, WIDE>(sums, args, first);
    }
}

template <int NT, layout WIDE, layout THIN>
static qs_status launch(qs_queue *q, const thin_args &args)
{
    const size_t bytes = (size_t)STAGES * (WIDE_ELEMS + NT * 8 * QS_THIN_DEPTH) * sizeof(qs_bf16);
    static_assert(STAGES * (WIDE_ELEMS + NT * 8 * QS_THIN_DEPTH) * 2 + 16 <= SHARED_MAX,
                  "fits every card");
    QS_TRY(qs_cuda_prepare(thin_kernel<NT, WIDE, THIN>, bytes));
    QS_LAUNCH((thin_kernel<NT, WIDE, THIN>), (unsigned)(args.cut.tiles * args.cut.splits), THREADS,
              bytes, qs_cuda_stream(q), args);
    return qs_cuda_launched("thin_kernel");
}

template <layout WIDE, layout THIN>
static qs_status launch_width(qs_queue *q, const thin_args &args)
{
    return args.thin.size <= 16   ? launch<2, WIDE, THIN>(q, args)
           : args.thin.size <= 32 ? launch<4, WIDE, THIN>(q, args)
                                  : launch<8, WIDE, THIN>(q, args);
}

/* ---- which products ---- */

static bool in_pieces(const void *data, int64_t stride)
{
    return (uintptr_t)data % 16 == 0 && stride % 8 == 0;
}

/* X A^T or dY B. */
static bool take_rows(const qs_gemm_call *g, thin_args *args)
{
    args->wide = {(const qs_bf16 *)g->a, g->a_stride, g->m};
    args->thin = {(const qs_bf16 *)g->b, g->b_stride, g->n};
    return g->c_dtype == QS_BF16 && g->c0 == NULL && g->n <= QS_THIN_MOST && g->k % 8 == 0 &&
           (uintptr_t)g->c % 4 == 0 && g->c_stride % 2 == 0;
}

/* A gradient: B is the thin one, or A and C is turned. */
static bool take_sums(const qs_gemm_call *g, thin_args *args)
{
    args->wide = {(const qs_bf16 *)g->a, g->a_stride, g->m};
    args->thin = {(const qs_bf16 *)g->b, g->b_stride, g->n};
    args->turned = g->n > g->m;
    if (args->turned) {
        const operand kept = args->wide;
        args->wide = args->thin;
        args->thin = kept;
    }
    args->add = g->c0 != NULL;
    return g->c_dtype == QS_F32 && !g->b_transposed && args->thin.size <= QS_THIN_MOST &&
           args->wide.size % 8 == 0 && (g->c0 == NULL || g->c0 == g->c);
}

extern "C" qs_status qs_cuda_thin(qs_queue *q, const qs_gemm_call *g, bool *taken)
{
    const qs_cuda_context *context = qs_cuda_context_of(q);
    thin_args args = {};
    *taken = false;
    if (context == NULL) {
        return QS_ERR_BUG;
    }
    if (context->thin == NULL || g->m <= 0 || g->n <= 0 || g->k <= 0 ||
        !in_pieces(g->a, g->a_stride) || !in_pieces(g->b, g->b_stride) ||
        !(g->a_transposed ? take_sums(g, &args) : take_rows(g, &args)) || args.thin.size % 8 != 0) {
        return QS_OK;
    }
    args.depth = g->k;
    args.cut = qs_thin_cut_of(args.wide.size, g->k);
    if (args.cut.tiles > INT32_MAX || args.cut.per_split > INT32_MAX) {
        return QS_OK;
    }
    args.alpha = g->alpha;
    args.c = g->c;
    args.c_stride = g->c_stride;
    args.arrived = (unsigned *)context->thin;
    args.parts = (float4 *)((char *)context->thin + QS_CUDA_THIN_COUNTERS);
    *taken = true;
    return g->a_transposed   ? launch_width<COLUMNS, COLUMNS>(q, args)
           : g->b_transposed ? launch_width<ROWS, ROWS>(q, args)
                             : launch_width<ROWS, COLUMNS>(q, args);
}
