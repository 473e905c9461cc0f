/* Attention's forward for Hopper: attention_forward.cu with the products of warpgroups (wgmma), in
 * the order of FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608): the scores of the next tile
 * of keys and the weighted sums of this one are under way while the softmax of the next is
 * computed, and the second warpgroup is half a tile behind the first (attention_hopper.cuh).
 *
 * A block has 128 queries of one head and goes over tiles of 128 keys. Pairs that are not visible
 * are hidden, not left out: a tile is skipped only if none of the block's queries sees it.
 *
 * Bound: 4 pairs head_dim FLOP a head, in tiles, on the tensor cores. One block a multiprocessor.
 *
 *   head_dim   shared memory   registers on sm_90a, with a cap (none spilled)
 *      64          113 KB       176            190
 *     128          225 KB       212            227
 */
#include "kernels/cuda/attention_forward.cuh"
#include "kernels/cuda/attention_hopper.cuh"

enum { KEYS = 128, STAGES = 3 };

/* Shared memory: the block's queries, the stages of keys and those of values, the first key of each
 * query. */
template <int D> static constexpr size_t shared_bytes()
{
    return (size_t)(QS_HOPPER_OWN + 2 * STAGES * KEYS) * D * sizeof(qs_bf16) +
           QS_HOPPER_OWN * sizeof(int);
}

/* Bytes from the stages' first to the keys, and the values, of a tile of the block's span. */
template <int D> static __device__ __forceinline__ uint32_t keys_at(int number)
{
    return (uint32_t)(number % STAGES * KEYS * D) * sizeof(qs_bf16);
}

template <int D> static __device__ __forceinline__ uint32_t values_at(int number)
{
    return (uint32_t)((STAGES + number % STAGES) * KEYS * D) * sizeof(qs_bf16);
}

/* Start copying the values of a tile, and the keys of the next if there is one. */
template <int D>
static __device__ __forceinline__ void load_pair(qs_bf16 *stages, qs_head_rows k, qs_head_rows v,
                                                 int number, qs_attention_span span,
                                                 const qs_attention_launch &l)
{
    const int tile = span.begin + number;
    qs_bf16 *keys = stages + keys_at<D>(number + 1) / sizeof(qs_bf16);
    if (tile + 1 < span.end) {
        qs_panel_load<D, KEYS>(keys, k, (tile + 1) * KEYS, l);
    }
    qs_panel_load<D, KEYS>(stages + values_at<D>(number) / sizeof(qs_bf16), v, tile * KEYS, l);
    qs_cp_async_commit();
}

/* What one warpgroup does; the second is BEHIND. */
template <int D, bool CAP, bool BEHIND>
static __device__ __forceinline__ void forward_group(const qs_forward_args &args)
{
    QS_DYNAMIC_SHARED_PANELS(qs_bf16, queries);
    qs_bf16 *stages = queries + QS_HOPPER_OWN * D;
    int *bounds = reinterpret_cast<int *>(stages + 2 * STAGES * KEYS * D);
    const qs_attention_launch &l = args.launch;
    const qs_attention_block block = qs_attention_block_at(blockIdx.x, l.tiles, l.n_heads, true);
    const int row0 = block.tile * QS_HOPPER_OWN;
    const int last = (int)qs_hd_min(row0 + QS_HOPPER_OWN, l.rows) - 1;
    const int kv_head = block.head / l.heads_per_kv;
    const qs_head_rows k = qs_head_rows_at(args.k, kv_head, l.dim);
    const qs_head_rows v = qs_head_rows_at(args.v, kv_head, l.dim);

    /* Each thread finds the first key of all: through shared memory the first copies would wait. */
    qs_panel_load<D, QS_HOPPER_OWN>(queries, qs_head_rows_at(args.q, block.head, l.dim), row0, l);
    const int first = qs_attention_first_key(l.cu_seqlens, l.n_docs, l.window, row0);
    const qs_attention_span span = qs_attention_tiles(first, last, KEYS);
    const int count = span.end - span.begin;
    qs_panel_load<D, KEYS>(stages, k, span.begin * KEYS, l);
    qs_cp_async_commit();
    load_pair<D>(stages, k, v, 0, span, l);
    for (int i = (int)threadIdx.x; i < QS_HOPPER_OWN; i += QS_HOPPER_THREADS) {
        bounds[i] = qs_attention_first_key(l.cu_seqlens, l.n_docs, l.window,
                                           (int)qs_hd_min(row0 + i, last));
    }

    const int within = (int)threadIdx.x / QS_WARP * 16, row = row0 + within;
    const int group_row = BEHIND ? QS_WGMMA_ROWS : 0;
    const uint32_t own = qs_shared_address(queries), tiles = qs_shared_address(stages);
    float max[1][2] = {{-INFINITY, -INFINITY}}, sum[1][2] = {{0.0f, 0.0f}}, by[1][2];
    float scores[1][KEYS / 8][4], out[1][D / 8][4];
    uint32_t weights[1][KEYS / 16][4];
    qs_zero(out);

    const auto start_scores = [&](int number) {
        qs_wgmma_fence();
        qs_panel_scores<D, KEYS>(scores, own, group_row, tiles + keys_at<D>(number));
        qs_wgmma_commit();
    };
    const auto start_sums = [&](int number) {
        qs_panel_sums<D>(out, weights, tiles + values_at<D>(number));
        qs_wgmma_commit();
    };
    const auto softmax = [&](int number) {
        const int key = (span.begin + number) * KEYS;
        if (CAP) {
            qs_cap_scores(scores, l.tanh_scale);
        }
        const qs_attention_view view = qs_attention_view_of_keys(
            row, row + 15, bounds[within], bounds[within + 15], key, key + KEYS - 1);
        if (view != QS_ATTENTION_ALL) {
            qs_hide(scores, bounds + within, row, key);
        }
        qs_softmax_step(scores, max, sum, by, qs_softmax_scale<CAP>(l) * QS_LOG2_E);
    };
    /* Weights of the last softmax to operands, and what was summed up before to its maximum. */
    const auto take_weights = [&]() {
        qs_wgmma_wait<0>();
        qs_wgmma_keep(out[0]);
        if (qs_any_moved(by)) {
            qs_scale_rows(out, by);
        }
        qs_as_left(weights, scores);
    };
    const auto load = [&](int number) {
        if (number < count) {
            load_pair<D>(stages, k, v, number, span, l);
        }
    };

    qs_cp_async_wait<1>();
    qs_fence_shared_for_wgmma();
    __syncthreads();
    start_scores(0);
    if (BEHIND) {
        qs_wait_for_tiles();
        load(1);
    }
    qs_wgmma_wait<0>();
    qs_wgmma_keep(scores[0]);
    softmax(0);
    /* The wait for a tile's sums is in the next turn: in the same one ptxas moves it up to the
     * softmax' begin, and the tensor cores have nothing to do meanwhile. */
    for (int number = 1; number < count; number++) {
        take_weights();
        if (!BEHIND) {
            qs_wait_for_tiles(); /* keys of this tile, values of the one before */
        }
        start_scores(number);
        start_sums(number - 1);
        if (BEHIND) {
            qs_wait_for_tiles();
        }
        load(BEHIND ? number + 1 : number);
        qs_wgmma_wait<1>();
        qs_wgmma_keep(scores[0]);
        softmax(number);
    }
    take_weights();
    if (!BEHIND) {
        qs_wait_for_tiles();
    }
    qs_wgmma_fence();
    start_sums(count - 1);
    qs_wgmma_wait<0>();
    qs_wgmma_keep(out[0]);
    __syncthreads(); /* of queries, too, nothing is read any more */
    qs_finish_rows<CAP>(max, sum, args.lse + (int64_t)block.head * l.rows, row, l);
    qs_panel_store<D>(out, sum, queries, within, qs_head_rows_at(args.o, block.head, l.dim), row,
                      l);
}

template <int D, bool CAP>
static __global__ void __launch_bounds__(QS_HOPPER_THREADS, 1)
    forward_kernel(const qs_forward_args args)
{
    if constexpr (QS_WGMMA) {
        if (qs_hopper_behind()) {
            forward_group<D, CAP, true>(args);
        } else {
            forward_group<D, CAP, false>(args);
        }
    } else {
        qs_not_hopper();
    }
}

template <int D, bool CAP> static qs_status launch(qs_queue *q, qs_forward_args *args)
{
    static_assert(shared_bytes<D>() <= QS_HOPPER_SHARED_MAX, "fits the card");
    args->launch.tiles = (int)qs_hd_ceil_div(args->launch.rows, QS_HOPPER_OWN);
    const unsigned blocks = (unsigned)args->launch.tiles * (unsigned)args->launch.n_heads;
    QS_TRY(qs_cuda_prepare(forward_kernel<D, CAP>, shared_bytes<D>()));
    QS_LAUNCH((forward_kernel<D, CAP>), blocks, QS_HOPPER_THREADS, shared_bytes<D>(),
              qs_cuda_stream(q), *args);
    return qs_cuda_launched("attention_forward");
}

template <bool CAP> static qs_status launch_width(qs_queue *q, qs_forward_args *args)
{
    return qs_attention_padded_dim(args->launch.dim) == 64 ? launch<64, CAP>(q, args)
                                                           : launch<128, CAP>(q, args);
}

qs_status qs_hopper_attention_forward(qs_queue *q, qs_forward_args *args)
{
    return args->launch.cap > 0.0f ? launch_width<true>(q, args) : launch_width<false>(q, args);
}
