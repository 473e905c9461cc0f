/* Attention's gradients for Hopper: attention_backward.cu with the products of warpgroups (wgmma).
 * The same two passes, one with queries that stay (dQ), one with keys that stay (dK, dV), and
 * nothing added from two blocks: the same bits every time.
 *
 * A block has 128 rows that stay, 64 a warpgroup, of which the second is half a tile behind
 * (attention_hopper.cuh). For dQ tiles of 128 keys pass, for dK and dV tiles of 64 queries, of one
 * head that shares the keys after the other. Pairs that are not visible are hidden, not left out.
 *
 * Bound: 14 pairs head_dim FLOP a head, in tiles, on the tensor cores. One block a multiprocessor.
 *
 *   head_dim   shared memory      registers on sm_90a, with a cap (8 bytes of the last one spilled)
 *               dQ   dK, dV        dQ   dK, dV      dQ   dK, dV
 *      64      113     82 KB      219   190        254   229
 *     128      225    162 KB      249   242        249   255
 */
#include "kernels/cuda/attention_backward.cuh"
#include "kernels/cuda/attention_hopper.cuh"

enum {
    KEYS = 128,   /* that pass, for dQ */
    QUERIES = 64, /* that pass, for dK and dV */
};

/* ---- dQ: queries stay, keys pass ---- */

enum { KEY_STAGES = 3, VALUE_STAGES = 2 };

/* Shared memory: queries, dO, the stages of keys and those of values, the first key of each query.
 */
template <int D> static constexpr size_t dq_shared_bytes()
{
    return (size_t)(2 * QS_HOPPER_OWN + (KEY_STAGES + VALUE_STAGES) * KEYS) * D * sizeof(qs_bf16) +
           QS_HOPPER_OWN * sizeof(int);
}

/* dS = P (dP - delta of the row), into `ds`. */
template <int NT>
static __device__ __forceinline__ void
gradients_of_rows(float (&ds)[1][NT][4], const float (&p)[1][NT][4], const float (&delta)[1][2])
{
#pragma unroll
    for (int n = 0; n < NT; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            ds[0][n][i] = p[0][n][i] * (ds[0][n][i] - delta[0][i / 2]);
        }
    }
}

/* What one warpgroup does; the second is BEHIND. The first loads keys, of which the second still
 * reads the tile before; the second loads values, as soon as it has done with those of the tile
 * before. */
template <int D, bool CAP, bool BEHIND>
static __device__ __forceinline__ void dq_group(const qs_backward_args &args)
{
    QS_DYNAMIC_SHARED_PANELS(qs_bf16, queries);
    qs_bf16 *d_out = queries + QS_HOPPER_OWN * D, *keys = d_out + QS_HOPPER_OWN * D;
    qs_bf16 *values = keys + KEY_STAGES * KEYS * D;
    int *bounds = reinterpret_cast<int *>(values + VALUE_STAGES * KEYS * D);
    const qs_attention_launch &l = args.launch;
    const qs_attention_block block = qs_attention_block_at(blockIdx.x, l.tiles, l.n_heads, true);
    const int row0 = block.tile * QS_HOPPER_OWN;
    const int last = (int)qs_hd_min(row0 + QS_HOPPER_OWN, l.rows) - 1;
    const int kv_head = block.head / l.heads_per_kv;
    const qs_head_rows k = qs_head_rows_at(args.k, kv_head, l.dim);
    const qs_head_rows v = qs_head_rows_at(args.v, kv_head, l.dim);

    /* Each thread finds the first key of all: through shared memory the first copies would wait. */
    qs_panel_load<D, QS_HOPPER_OWN>(queries, qs_head_rows_at(args.q, block.head, l.dim), row0, l);
    qs_panel_load<D, QS_HOPPER_OWN>(d_out, qs_head_rows_at(args.d_o, block.head, l.dim), row0, l);
    const int first = qs_attention_first_key(l.cu_seqlens, l.n_docs, l.window, row0);
    const qs_attention_span span = qs_attention_tiles(first, last, KEYS);
    const int count = span.end - span.begin;
    /* This warpgroup's part of a tile, if there is one; a group of copies in any case. */
    const auto load = [&](int number) {
        qs_bf16 *stage = BEHIND ? values + number % VALUE_STAGES * KEYS * D
                                : keys + number % KEY_STAGES * KEYS * D;
        if (number < count) {
            qs_panel_load<D, KEYS, QS_HOPPER_GROUP>(stage, BEHIND ? v : k,
                                                    (span.begin + number) * KEYS, l);
        }
        qs_cp_async_commit();
    };
    load(0);
    if (BEHIND) {
        load(1);
    }
    for (int i = (int)threadIdx.x; i < QS_HOPPER_OWN; i += QS_HOPPER_THREADS) {
        bounds[i] = qs_attention_first_key(l.cu_seqlens, l.n_docs, l.window,
                                           (int)qs_hd_min(row0 + i, last));
    }

    const int within = (int)threadIdx.x / QS_WARP * 16, row = row0 + within;
    const int group_row = BEHIND ? QS_WGMMA_ROWS : 0;
    const uint32_t own_queries = qs_shared_address(queries), own_d_out = qs_shared_address(d_out);
    const uint32_t key_tiles = qs_shared_address(keys), value_tiles = qs_shared_address(values);
    const uint32_t tile_bytes = KEYS * D * sizeof(qs_bf16);
    float lse[1][2], delta[1][2], dq[1][D / 8][4], p[1][KEYS / 8][4], ds[1][KEYS / 8][4];
    uint32_t left[1][KEYS / 16][4];
    qs_zero(dq);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int query = row + qs_thread_row(0, half);
        const int64_t at = block.head * (int64_t)l.rows + query;
        lse[0][half] = query < l.rows ? args.lse[at] * QS_LOG2_E : INFINITY;
        delta[0][half] = query < l.rows ? args.delta[at] : 0.0f;
    }
    /* Scores and dP of a tile. */
    const auto start = [&](int number) {
        qs_wgmma_fence();
        qs_panel_scores<D, KEYS>(p, own_queries, group_row,
                                 key_tiles + (uint32_t)(number % KEY_STAGES) * tile_bytes);
        qs_wgmma_commit();
        qs_panel_scores<D, KEYS>(ds, own_d_out, group_row,
                                 value_tiles + (uint32_t)(number % VALUE_STAGES) * tile_bytes);
        qs_wgmma_commit();
    };
    /* P, dS, and start dQ. */
    const auto finish = [&](int number) {
        const int key = (span.begin + number) * KEYS;
        qs_wgmma_wait<1>();
        qs_wgmma_keep(p[0]);
        const qs_attention_view view = qs_attention_view_of_keys(
            row, row + 15, bounds[within], bounds[within + 15], key, key + KEYS - 1);
        qs_weights_of_rows<CAP>(p, lse, args, bounds + within, row, key, view == QS_ATTENTION_ALL);
        qs_wgmma_wait<0>();
        qs_wgmma_keep(ds[0]);
        if (BEHIND) { /* the first warpgroup has done with these values since the barrier */
            qs_warpgroup_sync(1);
            load(number + 2);
        }
        gradients_of_rows(ds, p, delta);
        qs_as_left(left, ds);
        qs_wgmma_fence();
        qs_panel_sums<D>(dq, left, key_tiles + (uint32_t)(number % KEY_STAGES) * tile_bytes);
        qs_wgmma_commit();
    };
    const auto wait_for_sums = [&]() {
        qs_wgmma_wait<0>();
        qs_wgmma_keep(dq[0]);
    };

    if (BEHIND) {
        qs_wait_for_tiles<1>(); /* values of the second tile are read behind the next one */
    }
    for (int number = 0; number < count; number++) {
        if (!BEHIND) {
            qs_wait_for_tiles();
        }
        start(number);
        if (BEHIND) {
            qs_wait_for_tiles();
        } else {
            load(number + 1);
        }
        finish(number);
        wait_for_sums(); /* the other warpgroup has work for the tensor cores */
    }
    if (!BEHIND) {
        qs_wait_for_tiles(); /* the second warpgroup's last time */
    }
    __syncthreads(); /* of queries nothing is read any more */
    const float by[1][2] = {{l.scale, l.scale}};
    qs_panel_store<D>(dq, by, queries, within, qs_head_rows_at(args.dq, block.head, l.dim), row, l);
}

template <int D, bool CAP>
static __global__ void __launch_bounds__(QS_HOPPER_THREADS, 1)
    dq_kernel(const qs_backward_args args)
{
    if constexpr (QS_WGMMA) {
        if (qs_hopper_behind()) {
            dq_group<D, CAP, true>(args);
        } else {
            dq_group<D, CAP, false>(args);
        }
    } else {
        qs_not_hopper();
    }
}

/* ---- dK and dV: keys stay, the queries of all heads that share them pass ---- */

enum { QUERY_STAGES = 3 };

/* Shared memory: keys, values, the stages of queries and dO, those of lse and delta, the last query
 * of each key. */
template <int D> static constexpr size_t dkv_shared_bytes()
{
    return (size_t)(2 * QS_HOPPER_OWN + 2 * QUERY_STAGES * QUERIES) * D * sizeof(qs_bf16) +
           2 * QUERY_STAGES * QUERIES * sizeof(float) + QS_HOPPER_OWN * sizeof(int);
}

template <int D>
static __device__ __forceinline__ void load_queries(qs_bf16 *stage, const qs_backward_args &args,
                                                    qs_dkv_step step)
{
    const qs_attention_launch &l = args.launch;
    qs_panel_load<D, QUERIES>(stage, qs_head_rows_at(args.q, step.head, l.dim), step.query, l);
    qs_panel_load<D, QUERIES>(stage + QUERIES * D, qs_head_rows_at(args.d_o, step.head, l.dim),
                              step.query, l);
    qs_cp_async_commit();
}

/* dS = P (dP - delta of the column), into `ds`. */
template <int NT>
static __device__ __forceinline__ void
gradients_of_cols(float (&ds)[1][NT][4], const float (&p)[1][NT][4], const float *delta)
{
#pragma unroll
    for (int n = 0; n < NT; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            ds[0][n][i] = p[0][n][i] * (ds[0][n][i] - delta[qs_thread_col(n) + i % 2]);
        }
    }
}

/* What one warpgroup does; the second is BEHIND. */
template <int D, bool CAP, bool BEHIND>
static __device__ __forceinline__ void dkv_group(const qs_backward_args &args)
{
    QS_DYNAMIC_SHARED_PANELS(qs_bf16, keys);
    qs_bf16 *values = keys + QS_HOPPER_OWN * D, *stages = values + QS_HOPPER_OWN * D;
    float *stats = reinterpret_cast<float *>(stages + 2 * QUERY_STAGES * QUERIES * D);
    int *bounds = reinterpret_cast<int *>(stats + 2 * QUERY_STAGES * QUERIES);
    const qs_attention_launch &l = args.launch;
    const qs_attention_block block =
        qs_attention_block_at(blockIdx.x, l.tiles, l.n_kv_heads, false);
    const int row0 = block.tile * QS_HOPPER_OWN;
    const int last = (int)qs_hd_min(row0 + QS_HOPPER_OWN, l.rows) - 1;

    qs_panel_load<D, QS_HOPPER_OWN>(keys, qs_head_rows_at(args.k, block.head, l.dim), row0, l);
    qs_panel_load<D, QS_HOPPER_OWN>(values, qs_head_rows_at(args.v, block.head, l.dim), row0, l);
    const int seen = qs_attention_last_query(l.cu_seqlens, l.n_docs, l.window, last);
    const qs_attention_span span = qs_attention_tiles(row0, seen, QUERIES);
    const int count = l.heads_per_kv * (span.end - span.begin);
    qs_dkv_step step = {block.head * l.heads_per_kv, span.begin * QUERIES};
    load_queries<D>(stages, args, step);
    float stat = qs_load_stat<QUERIES>(args, step);
    for (int i = (int)threadIdx.x; i < QS_HOPPER_OWN; i += QS_HOPPER_THREADS) {
        bounds[i] = qs_attention_last_query(l.cu_seqlens, l.n_docs, l.window,
                                            (int)qs_hd_min(row0 + i, last));
    }

    const int within = (int)threadIdx.x / QS_WARP * 16, row = row0 + within;
    const int group_row = BEHIND ? QS_WGMMA_ROWS : 0;
    const uint32_t own_keys = qs_shared_address(keys), own_values = qs_shared_address(values);
    const uint32_t tiles = qs_shared_address(stages), tile_bytes = QUERIES * D * sizeof(qs_bf16);
    float dk[1][D / 8][4], dv[1][D / 8][4], p[1][QUERIES / 8][4], ds[1][QUERIES / 8][4];
    uint32_t weights[1][QUERIES / 16][4], left[1][QUERIES / 16][4];
    qs_zero(dk);
    qs_zero(dv);
    /* Scores and dP of a step. */
    const auto start = [&](int number) {
        const uint32_t queries = tiles + (uint32_t)(number % QUERY_STAGES) * 2 * tile_bytes;
        qs_wgmma_fence();
        qs_panel_scores<D, QUERIES>(p, own_keys, group_row, queries);
        qs_wgmma_commit();
        qs_panel_scores<D, QUERIES>(ds, own_values, group_row, queries + tile_bytes);
        qs_wgmma_commit();
    };
    /* P, start dV, dS, start dK. */
    const auto finish = [&](int number, int query) {
        const uint32_t queries = tiles + (uint32_t)(number % QUERY_STAGES) * 2 * tile_bytes;
        const float *lse = stats + number % QUERY_STAGES * 2 * QUERIES, *delta = lse + QUERIES;
        qs_wgmma_wait<1>();
        qs_wgmma_keep(p[0]);
        const qs_attention_view view = qs_attention_view_of_queries(
            row, row + 15, bounds[within], bounds[within + 15], query, query + QUERIES - 1);
        if constexpr (CAP) {
            qs_capped_weights_of_cols(p, weights, lse, args, bounds + within, row, query,
                                      view == QS_ATTENTION_ALL);
        } else {
            qs_weights_of_cols(p, weights, lse, args, bounds + within, row, query,
                               view == QS_ATTENTION_ALL);
        }
        qs_wgmma_fence();
        qs_panel_sums<D>(dv, weights, queries + tile_bytes);
        qs_wgmma_commit();
        qs_wgmma_wait<1>();
        qs_wgmma_keep(ds[0]);
        gradients_of_cols(ds, p, delta);
        qs_as_left(left, ds);
        qs_wgmma_fence();
        qs_panel_sums<D>(dk, left, queries);
        qs_wgmma_commit();
    };
    const auto wait_for_sums = [&]() {
        qs_wgmma_wait<0>();
        qs_wgmma_keep(dk[0]);
        qs_wgmma_keep(dv[0]);
    };
    /* Both warpgroups, before a step is read; then the next one may be loaded to where the one
     * before the last was. */
    const auto meet = [&](int number) {
        if (!BEHIND && number < count) {
            stats[number % QUERY_STAGES * 2 * QUERIES + (int)threadIdx.x] =
                qs_stat_as_read<QUERIES>(stat);
        }
        qs_wait_for_tiles();
    };
    /* The next step, in order, if there is one. */
    const auto load = [&](int number) {
        if (number < count) {
            qs_step_on(&step, span, QUERIES);
            load_queries<D>(stages + number % QUERY_STAGES * 2 * QUERIES * D, args, step);
            stat = qs_load_stat<QUERIES>(args, step);
        }
    };
    qs_dkv_step own = step;
    if (BEHIND) {
        meet(0);
        load(1);
    }
    for (int number = 0; number < count; number++) {
        if (!BEHIND) {
            meet(number);
        }
        start(number);
        if (BEHIND) {
            meet(number + 1);
        }
        load(BEHIND ? number + 2 : number + 1);
        finish(number, own.query);
        qs_step_on(&own, span, QUERIES);
        wait_for_sums(); /* the other warpgroup has work for the tensor cores */
    }
    if (!BEHIND) {
        meet(count); /* the second warpgroup's last time */
    }
    __syncthreads(); /* of keys and values nothing is read any more */
    const float one[1][2] = {{1.0f, 1.0f}}, by[1][2] = {{l.scale, l.scale}};
    qs_panel_store<D>(dv, one, values, within, qs_head_rows_at(args.dv, block.head, l.dim), row, l);
    qs_panel_store<D>(dk, by, keys, within, qs_head_rows_at(args.dk, block.head, l.dim), row, l);
}

template <int D, bool CAP>
static __global__ void __launch_bounds__(QS_HOPPER_THREADS, 1)
    dkv_kernel(const qs_backward_args args)
{
    if constexpr (QS_WGMMA) {
        if (qs_hopper_behind()) {
            dkv_group<D, CAP, true>(args);
        } else {
            dkv_group<D, CAP, false>(args);
        }
    } else {
        qs_not_hopper();
    }
}

/* ---- launches ---- */

template <int D, bool CAP> static qs_status launch(qs_queue *q, qs_backward_args args)
{
    static_assert(dq_shared_bytes<D>() <= QS_HOPPER_SHARED_MAX, "fits the card");
    static_assert(dkv_shared_bytes<D>() <= QS_HOPPER_SHARED_MAX, "fits the card");
    static_assert(2 * QUERIES == QS_HOPPER_GROUP, "a thread of the first a number of a step");
    args.launch.tiles = (int)qs_hd_ceil_div(args.launch.rows, QS_HOPPER_OWN);
    const unsigned tiles = (unsigned)args.launch.tiles;
    QS_TRY(qs_cuda_prepare(dq_kernel<D, CAP>, dq_shared_bytes<D>()));
    QS_LAUNCH((dq_kernel<D, CAP>), tiles * (unsigned)args.launch.n_heads, QS_HOPPER_THREADS,
              dq_shared_bytes<D>(), qs_cuda_stream(q), args);
    QS_TRY(qs_cuda_launched("attention_backward: dq"));
    QS_TRY(qs_cuda_prepare(dkv_kernel<D, CAP>, dkv_shared_bytes<D>()));
    QS_LAUNCH((dkv_kernel<D, CAP>), tiles * (unsigned)args.launch.n_kv_heads, QS_HOPPER_THREADS,
              dkv_shared_bytes<D>(), qs_cuda_stream(q), args);
    return qs_cuda_launched("attention_backward: dk, dv");
}

template <bool CAP> static qs_status launch_width(qs_queue *q, const qs_backward_args *args)
{
    return qs_attention_padded_dim(args->launch.dim) == 64 ? launch<64, CAP>(q, *args)
                                                           : launch<128, CAP>(q, *args);
}

qs_status qs_hopper_attention_gradients(qs_queue *q, const qs_backward_args *args)
{
    return args->launch.cap > 0.0f ? launch_width<true>(q, args) : launch_width<false>(q, args);
}
