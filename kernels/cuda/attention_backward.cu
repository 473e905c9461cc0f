/* Attention's gradients on tensor cores (FlashAttention-2: Dao 2023, arXiv:2307.08691). With
 * P = exp(scale Q K^T - lse) and delta = rowsum(dO * O):
 *
 *     dV = P^T dO,   dS = P * (dO V^T - delta),   dQ = scale dS K,   dK = scale dS^T Q.
 *
 * With a cap P = exp(cap t - lse), t = tanh(scale Q K^T / cap), and dS gets the slope 1 - t^2.
 *
 * FlashAttention adds to dQ from the blocks of keys, with atomics, in whatever order. Here nothing
 * is added from two blocks: one pass has queries stay and keys pass (dQ), one has keys stay and the
 * queries of all heads that share them pass, head by head (dK, dV). P and dO V^T are computed in
 * both: 14 pairs head_dim FLOP a head instead of 10, for the same bits every time, and no scratch.
 * Above head_dim 128 dK and dV do not fit into registers together, and P is computed a third time
 * (16). P and dS are rounded to bf16 as operands; all sums are fp32.
 *
 * Bound: those FLOP, in tiles, on the tensor cores; delta is a pass over memory, 4 B an element of
 * O. For dK and dV at head_dim 128 a warp reads 40 KB of fragments for 16 keys x 32 queries: 320
 * clocks of shared memory, beside 256 of an A100's tensor cores; for dQ 32 KB and 256 beside 192.
 *
 *   head_dim, rows that stay, rows that pass; shared memory; registers (none spilled) on
 *                                 sm_80  86, 89   90a   100   120
 *   dQ      32   128   32    24 KB    159     142   142   158   158
 *   dQ      64   128   32    48 KB    216     202   208   176   174
 *   dQ      96   128   32    72 KB    243     242   242   251   245
 *   dQ     128    64   32    64 KB    173     172   177   168   133
 *   dQ     192    64   32    96 KB    217     201   175   248   244
 *   dQ     256    64   16    96 KB    243     241   241   242   238
 *   dK dV   32   128   32    24 KB    191     186   190   168   168
 *   dK dV   64    64   64    48 KB    216     181   181   174   173
 *   dK dV   96    64   32    48 KB    219     209   173   171   167
 *   dK dV  128    64   32    64 KB    254     254   254   239   217
 *   dK     192    64   32    96 KB    221     201   173   244   241
 *   dV     192    64   32    72 KB    170     168   168   166   168
 *   dK     256    64   16    96 KB    242     240   241   240   236
 *   dV     256    64   32    96 KB    241     241   245   243   242
 *
 * With a cap (CAP) up to 255, none spilled.
 */
#include "kernels/cuda/attention_backward.cuh"
#include "kernels/cuda/attention_hopper.cuh"

/* ---- delta: rowsum(dO * O) ---- */

/* A warp a row and head; lanes take pairs of elements, so that a load of the warp is one line. */
static __global__ void __launch_bounds__(QS_ATTENTION_THREADS)
    delta_kernel(const qs_backward_args args)
{
    const qs_attention_launch &l = args.launch;
    const int lane = (int)threadIdx.x % QS_WARP;
    const int64_t number = (int64_t)blockIdx.x * QS_ATTENTION_WARPS + (int)threadIdx.x / QS_WARP;
    const int64_t row = number / l.n_heads;
    const int head = (int)(number % l.n_heads);
    if (row >= l.rows) {
        return; /* the whole warp */
    }
    const qs_bf16 *o = qs_head_rows_at(args.o, head, l.dim).data + row * args.o.stride;
    const qs_bf16 *d_o = qs_head_rows_at(args.d_o, head, l.dim).data + row * args.d_o.stride;
    float sum = 0.0f;
    for (int i = 2 * lane; i < l.dim; i += 2 * QS_WARP) {
        uint32_t x, y;
        if (l.aligned) {
            x = *reinterpret_cast<const uint32_t *>(o + i);
            y = *reinterpret_cast<const uint32_t *>(d_o + i);
        } else {
            x = (uint32_t)o[i].bits | ((uint32_t)o[i + 1].bits << 16);
            y = (uint32_t)d_o[i].bits | ((uint32_t)d_o[i + 1].bits << 16);
        }
        sum = fmaf(qs_hd_bits_float(x << 16), qs_hd_bits_float(y << 16), sum);
        sum = fmaf(qs_hd_bits_float(x & 0xffff0000u), qs_hd_bits_float(y & 0xffff0000u), sum);
    }
    sum = qs_warp_sum(sum);
    if (lane == 0) {
        args.delta[head * (int64_t)l.rows + row] = sum;
    }
}

/* ---- dQ: queries stay, keys pass ---- */

/* MT * 64 queries of one head against BC keys at a time. Shared memory: queries, dO, and two stages
 * of keys and values. */
template <int D, int MT, int BC, bool CAP>
static __global__ void __launch_bounds__(QS_ATTENTION_THREADS)
    dq_kernel(const qs_backward_args args)
{
    const int own = MT * 16 * QS_ATTENTION_WARPS;
    QS_DYNAMIC_SHARED(qs_bf16, queries);
    qs_bf16 *d_out = queries + own * D, *stages = d_out + own * D;
    __shared__ int bounds[own]; /* first key of each query */
    const qs_attention_launch &l = args.launch;
    const qs_attention_block block = qs_attention_block_at(blockIdx.x, l.tiles, l.n_heads, true);
    const int row0 = block.tile * own, last = (int)qs_hd_min(row0 + own, l.rows) - 1;
    const int kv_head = block.head / l.heads_per_kv;
    const qs_head_rows k = qs_head_rows_at(args.k, kv_head, l.dim);
    const qs_head_rows v = qs_head_rows_at(args.v, kv_head, l.dim);

    qs_tile_load<D, own>(queries, qs_head_rows_at(args.q, block.head, l.dim), row0, l);
    qs_tile_load<D, own>(d_out, qs_head_rows_at(args.d_o, block.head, l.dim), row0, l);
    for (int i = (int)threadIdx.x; i < own; i += QS_ATTENTION_THREADS) {
        bounds[i] = qs_attention_first_key(l.cu_seqlens, l.n_docs, l.window,
                                           (int)qs_hd_min(row0 + i, last));
    }
    __syncthreads();
    const qs_attention_span span = qs_attention_tiles(bounds[0], last, BC);
    qs_tile_load<D, BC>(stages, k, span.begin * BC, l);
    qs_tile_load<D, BC>(stages + BC * D, v, span.begin * BC, l);
    qs_cp_async_commit();

    const int within = (int)threadIdx.x / QS_WARP * MT * 16, row = row0 + within;
    float lse[MT][2], delta[MT][2], by[MT][2], dq[MT][D / 8][4];
    qs_zero(dq);
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int query = row + qs_thread_row(m, half);
            const int64_t at = block.head * (int64_t)l.rows + query;
            lse[m][half] = query < l.rows ? args.lse[at] * QS_LOG2_E : INFINITY;
            delta[m][half] = query < l.rows ? args.delta[at] : 0.0f;
            by[m][half] = l.scale;
        }
    }
    for (int tile = span.begin; tile < span.end; tile++) {
        const int stage = (tile - span.begin) % 2, key = tile * BC;
        const qs_bf16 *keys = stages + stage * 2 * BC * D, *values = keys + BC * D;
        qs_cp_async_wait<0>();
        __syncthreads(); /* all copies have come, and nobody reads the other stage any more */
        if (tile + 1 < span.end) {
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
        float p[MT][BC / 8][4], ds[MT][BC / 8][4];
        qs_product_of_rows<D>(p, queries + within * D, keys);
        qs_weights_of_rows<CAP>(p, lse, args, bounds + within, row, key, view == QS_ATTENTION_ALL);
        qs_product_of_rows<D>(ds, d_out + within * D, values);
#pragma unroll
        for (int m = 0; m < MT; m++) {
#pragma unroll
            for (int n = 0; n < BC / 8; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    ds[m][n][i] = p[m][n][i] * (ds[m][n][i] - delta[m][i / 2]);
                }
            }
        }
        uint32_t left[MT][BC / 16][4];
        qs_as_left(left, ds);
        qs_sum_of_rows<D>(dq, left, keys);
    }
    qs_rows_store<D>(dq, by, queries + within * D, qs_head_rows_at(args.dq, block.head, l.dim), row,
                     l);
}

/* ---- dK and dV: keys stay, the queries of all heads that share them pass ---- */

template <int D, int BQ>
static __device__ __forceinline__ void load_step(qs_bf16 *stage, const qs_backward_args &args,
                                                 qs_dkv_step step)
{
    const qs_attention_launch &l = args.launch;
    qs_tile_load<D, BQ>(stage, qs_head_rows_at(args.q, step.head, l.dim), step.query, l);
    qs_tile_load<D, BQ>(stage + BQ * D, qs_head_rows_at(args.d_o, step.head, l.dim), step.query, l);
    qs_cp_async_commit();
}

/* dV += P^T dO. */
/* dK += (P * (V dO^T - delta)) Q, still without the scale. */
template <int D, int MT, int NT>
static __device__ __forceinline__ void
add_dk(float (&dk)[MT][D / 8][4], const float (&p)[MT][NT][4], const qs_bf16 *values,
       const qs_bf16 *queries, const qs_bf16 *d_out, const float *delta)
{
    float ds[MT][NT][4];
    uint32_t left[MT][NT / 2][4];
    qs_product_of_rows<D>(ds, values, d_out);
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int n = 0; n < NT; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                ds[m][n][i] = p[m][n][i] * (ds[m][n][i] - delta[qs_thread_col(n) + i % 2]);
            }
        }
    }
    qs_as_left(left, ds);
    qs_sum_of_rows<D>(dk, left, queries);
}

/* MT * 64 keys of one kv head against BQ queries at a time. Shared memory: keys, values, and two
 * stages of queries and dO, each with lse and delta. */
template <int D, int MT, int BQ, bool DK, bool DV, bool CAP>
static __global__ void __launch_bounds__(QS_ATTENTION_THREADS)
    dkv_kernel(const qs_backward_args args)
{
    const int own = MT * 16 * QS_ATTENTION_WARPS;
    QS_DYNAMIC_SHARED(qs_bf16, keys);
    qs_bf16 *values = keys + own * D, *stages = DK ? values + own * D : values;
    __shared__ int bounds[own];        /* last query of each key */
    __shared__ float stats[2][2 * BQ]; /* lse, delta */
    const qs_attention_launch &l = args.launch;
    const qs_attention_block block =
        qs_attention_block_at(blockIdx.x, l.tiles, l.n_kv_heads, false);
    const int row0 = block.tile * own, last = (int)qs_hd_min(row0 + own, l.rows) - 1;

    qs_tile_load<D, own>(keys, qs_head_rows_at(args.k, block.head, l.dim), row0, l);
    if (DK) {
        qs_tile_load<D, own>(values, qs_head_rows_at(args.v, block.head, l.dim), row0, l);
    }
    for (int i = (int)threadIdx.x; i < own; i += QS_ATTENTION_THREADS) {
        bounds[i] = qs_attention_last_query(l.cu_seqlens, l.n_docs, l.window,
                                            (int)qs_hd_min(row0 + i, last));
    }
    __syncthreads();
    const qs_attention_span span = qs_attention_tiles(row0, bounds[last - row0], BQ);
    const int last_head = (block.head + 1) * l.heads_per_kv - 1;
    qs_dkv_step step = {block.head * l.heads_per_kv, span.begin * BQ};
    load_step<D, BQ>(stages, args, step);
    float stat = qs_load_stat<BQ>(args, step);

    const int within = (int)threadIdx.x / QS_WARP * MT * 16, row = row0 + within;
    float dk[MT][DK ? D / 8 : 1][4], dv[MT][DV ? D / 8 : 1][4];
    qs_zero(dk);
    qs_zero(dv);
    bool more = true;
    for (int stage = 0; more; stage = 1 - stage) {
        const int query = step.query;
        const qs_bf16 *queries = stages + stage * 2 * BQ * D;
        if (threadIdx.x < 2 * BQ) {
            stats[stage][threadIdx.x] = qs_stat_as_read<BQ>(stat);
        }
        qs_cp_async_wait<0>();
        __syncthreads(); /* all copies have come, and nobody reads the other stage any more */
        qs_step_on(&step, span, BQ);
        more = step.head <= last_head;
        if (more) {
            load_step<D, BQ>(stages + (1 - stage) * 2 * BQ * D, args, step);
            stat = qs_load_stat<BQ>(args, step);
        }
        const qs_attention_view view =
            qs_attention_view_of_queries(row, row + MT * 16 - 1, bounds[within],
                                         bounds[within + MT * 16 - 1], query, query + BQ - 1);
        if (view == QS_ATTENTION_NONE || row >= l.rows) {
            continue; /* the whole warp */
        }
        float p[MT][BQ / 8][4];
        uint32_t weights[MT][BQ / 16][4];
        qs_product_of_rows<D>(p, keys + within * D, queries);
        if constexpr (CAP) {
            qs_capped_weights_of_cols(p, weights, stats[stage], args, bounds + within, row, query,
                                      view == QS_ATTENTION_ALL);
        } else {
            qs_weights_of_cols(p, weights, stats[stage], args, bounds + within, row, query,
                               view == QS_ATTENTION_ALL);
        }
        if constexpr (DV) { /* dV += P^T dO */
            qs_sum_of_rows<D>(dv, weights, queries + BQ * D);
        }
        if constexpr (DK) {
            add_dk<D>(dk, p, values + within * D, queries, queries + BQ * D, stats[stage] + BQ);
        }
    }
    float by[MT][2];
#pragma unroll
    for (int m = 0; m < MT; m++) {
        by[m][0] = by[m][1] = 1.0f;
    }
    if constexpr (DV) {
        qs_rows_store<D>(dv, by, (DK ? values : keys) + within * D,
                         qs_head_rows_at(args.dv, block.head, l.dim), row, l);
    }
#pragma unroll
    for (int m = 0; m < MT; m++) {
        by[m][0] = by[m][1] = l.scale;
    }
    if constexpr (DK) {
        qs_rows_store<D>(dk, by, keys + within * D, qs_head_rows_at(args.dk, block.head, l.dim),
                         row, l);
    }
}

/* ---- launches ---- */

static qs_status launch_delta(qs_queue *q, const qs_backward_args *args)
{
    const int64_t warps = (int64_t)args->launch.rows * args->launch.n_heads;
    QS_LAUNCH(delta_kernel, (unsigned)qs_hd_ceil_div(warps, QS_ATTENTION_WARPS),
              QS_ATTENTION_THREADS, 0, qs_cuda_stream(q), *args);
    return qs_cuda_launched("attention_backward: delta");
}

template <int D, int MT, int BC, bool CAP>
static qs_status launch_dq(qs_queue *q, qs_backward_args args)
{
    const int own = MT * 16 * QS_ATTENTION_WARPS;
    const size_t bytes = (size_t)(2 * own + 4 * BC) * D * sizeof(qs_bf16);
    static_assert((2 * own + 4 * BC) * D * 2 + own * 4 <= QS_ATTENTION_SHARED_MAX,
                  "fits every card");
    args.launch.tiles = (int)qs_hd_ceil_div(args.launch.rows, own);
    QS_TRY(qs_cuda_prepare(dq_kernel<D, MT, BC, CAP>, bytes));
    QS_LAUNCH((dq_kernel<D, MT, BC, CAP>),
              (unsigned)args.launch.tiles * (unsigned)args.launch.n_heads, QS_ATTENTION_THREADS,
              bytes, qs_cuda_stream(q), args);
    return qs_cuda_launched("attention_backward: dq");
}

template <int D, int MT, int BQ, bool DK, bool DV, bool CAP>
static qs_status launch_dkv(qs_queue *q, qs_backward_args args)
{
    const int own = MT * 16 * QS_ATTENTION_WARPS, kept = DK ? 2 : 1;
    const size_t bytes = (size_t)(kept * own + 4 * BQ) * D * sizeof(qs_bf16);
    static_assert((kept * own + 4 * BQ) * D * 2 + own * 4 + 16 * BQ <= QS_ATTENTION_SHARED_MAX,
                  "fits every card");
    static_assert(2 * BQ <= QS_ATTENTION_THREADS, "a thread a number of a step");
    args.launch.tiles = (int)qs_hd_ceil_div(args.launch.rows, own);
    QS_TRY(qs_cuda_prepare(dkv_kernel<D, MT, BQ, DK, DV, CAP>, bytes));
    QS_LAUNCH((dkv_kernel<D, MT, BQ, DK, DV, CAP>),
              (unsigned)args.launch.tiles * (unsigned)args.launch.n_kv_heads, QS_ATTENTION_THREADS,
              bytes, qs_cuda_stream(q), args);
    return qs_cuda_launched("attention_backward: dk, dv");
}

template <bool CAP> static qs_status launch_gradients(qs_queue *q, const qs_backward_args &args)
{
    switch (qs_attention_padded_dim(args.launch.dim)) {
    case 32:
        QS_TRY((launch_dq<32, 2, 32, CAP>(q, args)));
        return launch_dkv<32, 2, 32, true, true, CAP>(q, args);
    case 64:
        QS_TRY((launch_dq<64, 2, 32, CAP>(q, args)));
        return launch_dkv<64, 1, 64, true, true, CAP>(q, args);
    case 96:
        QS_TRY((launch_dq<96, 2, 32, CAP>(q, args)));
        return launch_dkv<96, 1, 32, true, true, CAP>(q, args);
    case 128:
        QS_TRY((launch_dq<128, 1, 32, CAP>(q, args)));
        return launch_dkv<128, 1, 32, true, true, CAP>(q, args);
    case 192:
        QS_TRY((launch_dq<192, 1, 32, CAP>(q, args)));
        QS_TRY((launch_dkv<192, 1, 32, false, true, CAP>(q, args)));
        return launch_dkv<192, 1, 32, true, false, CAP>(q, args);
    default:
        QS_TRY((launch_dq<256, 1, 16, CAP>(q, args)));
        QS_TRY((launch_dkv<256, 1, 32, false, true, CAP>(q, args)));
        return launch_dkv<256, 1, 16, true, false, CAP>(q, args);
    }
}

extern "C" qs_status qs_cuda_attention_backward(qs_queue *q, const qs_attention_shape *shape,
                                                const qs_mat *qm, const qs_mat *km,
                                                const qs_mat *vm, const qs_mat *o, const float *lse,
                                                const qs_mat *d_o, float *delta, qs_mat *dq,
                                                qs_mat *dk, qs_mat *dv)
{
    qs_backward_args args = {};
    QS_TRY(qs_attention_launch_make(shape, qm, &args.launch));
    if (qm->rows == 0) {
        return QS_OK;
    }
    const qs_mat *mats[] = {qm, km, vm, o, d_o, dq, dk, dv};
    qs_head_rows *rows[] = {&args.q,   &args.k,  &args.v,  &args.o,
                            &args.d_o, &args.dq, &args.dk, &args.dv};
    for (int i = 0; i < 8; i++) {
        *rows[i] = qs_head_rows_of(mats[i]);
        args.launch.aligned = args.launch.aligned && qs_attention_aligned(mats[i]);
    }
    args.lse = lse;
    args.delta = delta;
    args.softmax_scale = shape->cap > 0.0f ? shape->cap : shape->scale;
    QS_TRY(launch_delta(q, &args));
    if (qs_hopper_serves(&args.launch)) {
        return qs_hopper_attention_gradients(q, &args);
    }
    return args.launch.cap > 0.0f ? launch_gradients<true>(q, args)
                                  : launch_gradients<false>(q, args);
}
