/* Causal attention within documents, forward, on tensor cores: online softmax over tiles of keys
 * (Milakov & Gimelshein 2018, arXiv:1805.02867), scores and weights in registers (FlashAttention-2:
 * Dao 2023, arXiv:2307.08691).
 *
 * A block has 64 or 128 queries of one head: rows of the micro-batch, whatever documents they
 * belong to (core/attention_tiles.h). It goes over the tiles of keys that any of them sees. A warp
 * has 16 or 32 of the queries, and leaves out tiles that none of these sees. Maximum, sum and
 * output are fp32; weights are summed, then rounded to bf16 as operands of the second product.
 * Nothing depends on which block runs when: the same bits every time. Weights of hidden keys are 0,
 * so a key that is not visible changes nothing while its value is finite.
 *
 * Bound: 4 pairs head_dim FLOP a head, in tiles, on the tensor cores. Queries and output cross
 * memory once; keys and values once for each block of queries, mostly from the L2 cache. With 32
 * queries a warp (head_dim up to 128) reads 24 KB of fragments for 32 x 32 scores at head_dim 128:
 * 192 clocks of shared memory, beside 256 of an A100's tensor cores.
 *
 *   head_dim, queries, keys; shared memory; registers (none spilled, but for a word of
 *   head_dim 128 on sm_120 and three of 192 on sm_80) on
 *                               sm_80 86, 89   90a   100   120
 *     32   128   64    24 KB    168     159   167   156   152
 *     64   128   64    48 KB    228     227   227   188   182
 *     96   128   32    48 KB    220     217   222   172   167
 *    128   128   32    64 KB    250     247   247   255   255
 *    192    64   32    72 KB    168     167   168   167   167
 *    256    64   32    96 KB    238     239   243   246   252
 *
 * Kernels for a cap of the scores are their own (CAP): at most 21 registers more, and 39 at
 * head_dim 64 on sm_100; no other spills, but for one word more of 192. */
#include "kernels/cuda/attention_forward.cuh"
#include "kernels/cuda/attention_hopper.cuh"

/* MT * 64 queries of one head against BC keys at a time. Shared memory: the queries, then two
 * stages of keys and values, of which one is filled while the other is used. */
template <int D, int MT, int BC, bool CAP>
static __global__ void __launch_bounds__(QS_ATTENTION_THREADS)
    forward_kernel(const qs_forward_args args)
{
    const int own = MT * 16 * QS_ATTENTION_WARPS;
    QS_DYNAMIC_SHARED(qs_bf16, queries);
    qs_bf16 *stages = queries + own * D;
    __shared__ int bounds[own]; /* first key of each query */
    const qs_attention_launch &l = args.launch;
    const qs_attention_block block = qs_attention_block_at(blockIdx.x, l.tiles, l.n_heads, true);
    const int row0 = block.tile * own, last = (int)qs_hd_min(row0 + own, l.rows) - 1;
    const int kv_head = block.head / l.heads_per_kv;
    const qs_head_rows k = qs_head_rows_at(args.k, kv_head, l.dim);
    const qs_head_rows v = qs_head_rows_at(args.v, kv_head, l.dim);

    qs_tile_load<D, own>(queries, qs_head_rows_at(args.q, block.head, l.dim), row0, l);
    for (int i = (int)threadIdx.x; i < own; i += QS_ATTENTION_THREADS) {
        bounds[i] = qs_attention_first_key(l.cu_seqlens, l.n_docs, l.window,
                                           (int)qs_hd_min(row0 + i, last));
    }
    __syncthreads();
    const qs_attention_span span = qs_attention_tiles(bounds[0], last, BC);
    qs_bf16 *first = stages + span.begin % 2 * 2 * BC * D;
    qs_tile_load<D, BC>(first, k, span.begin * BC, l);
    qs_tile_load<D, BC>(first + BC * D, v, span.begin * BC, l);
    qs_cp_async_commit();

    const int within = (int)threadIdx.x / QS_WARP * MT * 16, row = row0 + within;
    float max[MT][2], sum[MT][2], by[MT][2], out[MT][D / 8][4];
    qs_zero(out);
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            max[m][half] = -INFINITY;
            sum[m][half] = 0.0f;
        }
    }
    for (int key = span.begin * BC; key <= last; key += BC) {
        const int stage = key / BC % 2;
        const qs_bf16 *keys = stages + stage * 2 * BC * D, *values = keys + BC * D;
        qs_cp_async_wait<0>();
        __syncthreads(); /* all copies have come, and nobody reads the other stage any more */
        if (key + BC <= last) {
            qs_bf16 *next = stages + (1 - stage) * 2 * BC * D;
            qs_tile_load<D, BC>(next, k, key + BC, l);
            qs_tile_load<D, BC>(next + BC * D, v, key + BC, l);
            qs_cp_async_commit();
        }
        const qs_attention_view view =
            qs_attention_view_of_keys(row, row + MT * 16 - 1, bounds[within],
                                      bounds[within + MT * 16 - 1], key, key + BC - 1);
        if (view == QS_ATTENTION_NONE || row >= l.rows) {
            continue; /* the whole warp */
        }
        float scores[MT][BC / 8][4];
        qs_product_of_rows<D>(scores, queries + within * D, keys);
        if (CAP) {
            qs_cap_scores(scores, l.tanh_scale);
        }
        if (view == QS_ATTENTION_PART) {
            qs_hide(scores, bounds + within, row, key);
        }
        qs_softmax_step(scores, max, sum, by, qs_softmax_scale<CAP>(l) * QS_LOG2_E);
        qs_scale_rows(out, by);
        uint32_t weights[MT][BC / 16][4];
        qs_as_left(weights, scores);
        qs_sum_of_rows<D>(out, weights, values);
    }
    qs_finish_rows<CAP>(max, sum, args.lse + (int64_t)block.head * l.rows, row, l);
    qs_rows_store<D>(out, sum, queries + within * D, qs_head_rows_at(args.o, block.head, l.dim),
                     row, l);
}

template <int D, int MT, int BC, bool CAP>
static qs_status launch_as(qs_queue *q, qs_forward_args *args)
{
    const int own = MT * 16 * QS_ATTENTION_WARPS;
    const size_t bytes = (size_t)(own + 4 * BC) * D * sizeof(qs_bf16);
    static_assert((own + 4 * BC) * D * 2 + own * 4 <= QS_ATTENTION_SHARED_MAX, "fits every card");
    args->launch.tiles = (int)qs_hd_ceil_div(args->launch.rows, own);
    const unsigned blocks = (unsigned)args->launch.tiles * (unsigned)args->launch.n_heads;
    QS_TRY(qs_cuda_prepare(forward_kernel<D, MT, BC, CAP>, bytes));
    QS_LAUNCH((forward_kernel<D, MT, BC, CAP>), blocks, QS_ATTENTION_THREADS, bytes,
              qs_cuda_stream(q), *args);
    return qs_cuda_launched("attention_forward");
}

template <int D, int MT, int BC> static qs_status launch(qs_queue *q, qs_forward_args *args)
{
    return args->launch.cap > 0.0f ? launch_as<D, MT, BC, true>(q, args)
                                   : launch_as<D, MT, BC, false>(q, args);
}

extern "C" qs_status qs_cuda_attention_forward(qs_queue *q, const qs_attention_shape *shape,
                                               const qs_mat *qm, const qs_mat *km, const qs_mat *vm,
                                               qs_mat *o, float *lse)
{
    qs_forward_args args = {};
    QS_TRY(qs_attention_launch_make(shape, qm, &args.launch));
    if (qm->rows == 0) {
        return QS_OK;
    }
    args.q = qs_head_rows_of(qm);
    args.k = qs_head_rows_of(km);
    args.v = qs_head_rows_of(vm);
    args.o = qs_head_rows_of(o);
    args.lse = lse;
    args.launch.aligned = qs_attention_aligned(qm) && qs_attention_aligned(km) &&
                          qs_attention_aligned(vm) && qs_attention_aligned(o);
    if (qs_hopper_serves(&args.launch)) {
        return qs_hopper_attention_forward(q, &args);
    }
    switch (qs_attention_padded_dim(shape->head_dim)) {
    case 32:
        return launch<32, 2, 64>(q, &args);
    case 64:
        return launch<64, 2, 64>(q, &args);
    case 96:
        return launch<96, 2, 32>(q, &args);
    case 128:
        return launch<128, 2, 32>(q, &args);
    case 192:
        return launch<192, 1, 32>(q, &args);
    default:
        return launch<256, 1, 32>(q, &args);
    }
}
