/* The two bounds: bytes that a copy moves, multiply-adds that the arithmetic does. */
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "bench/kernels/measure.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/half.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/tile.h"

enum { SIDE_MIN = 128, SIDE_MAX = 8192, SIDE_FACTOR = 8 };
static const double QUICK_S = 5e-3;

/* ---- a copy ---- */

typedef struct {
    char *to;
    const char *from;
    size_t bytes;
    int64_t parts; /* of the host's copy, one a thread */
} copy_case;

static qs_status device_copy(qs_bench *b, void *ctx)
{
    const copy_case *c = ctx;
    return qs_queue_copy(b->queue, c->to, c->from, c->bytes);
}

static void copy_part(void *ctx, int64_t index, int thread)
{
    (void)thread;
    const copy_case *c = ctx;
    const size_t part = c->bytes / (size_t)c->parts, at = (size_t)index * part;
    memcpy(c->to + at, c->from + at, part);
}

static qs_status host_copy(qs_bench *b, void *ctx)
{
    const copy_case *c = ctx;
    qs_parallel_for(b->queue, c->parts, (int64_t)c->bytes, copy_part, ctx);
    return QS_OK;
}

static qs_status time_copy(qs_bench *b, copy_case *c, bool host, qs_bench_times *times)
{
    void *from = NULL, *to = NULL;
    QS_TRY(qs_bench_random(b, &from, QS_U8, (int64_t)c->bytes));
    QS_TRY(qs_bench_zeros(b, &to, c->bytes));
    c->from = from;
    c->to = to;
    QS_TRY(qs_bench_time(b, host ? host_copy : device_copy, c, times));
    qs_bench_free(b);
    return QS_OK;
}

/* On the host all sharers together larger than any cache; on a device 64 MiB, and 1 GiB where that
 * is quick. */
static qs_status measure_copy(qs_bench *b, bool host)
{
    const size_t full = host ? ((size_t)1 << 28) / (size_t)b->sharers : (size_t)1 << 26;
    copy_case c = {.bytes = b->small ? 1 << 16 : full, .parts = qs_queue_threads(b->queue)};
    qs_bench_times times;
    QS_TRY(time_copy(b, &c, host, &times));
    if (!host && !b->small && times.median < QUICK_S) {
        c.bytes = (size_t)1 << 30;
        QS_TRY(time_copy(b, &c, host, &times));
    }
    const size_t moved = host ? c.bytes / (size_t)c.parts * (size_t)c.parts : c.bytes;
    b->copy_rate = 2.0 * (double)moved / times.min;
    return QS_OK;
}

/* ---- products on the CPU: a path's tile with both operands in L1 ---- */

enum { TILE_DEPTH = 128, TILES_A_TASK = 500, TASKS_A_THREAD = 150, TRIES = 7 };

typedef struct {
    _Alignas(64) float a[QS_GEMM_MR_MAX * TILE_DEPTH], b[QS_GEMM_NR_MAX * TILE_DEPTH];
    float c[QS_GEMM_MR_MAX * QS_GEMM_NR_MAX];
} tile_operands;

static void tile_task(void *ctx, int64_t index, int thread)
{
    (void)ctx;
    (void)index;
    (void)thread;
    tile_operands o;
    const qs_isa *isa = qs_isa_get();
    memset(&o, 0, sizeof o);
    for (int i = 0; i < TILES_A_TASK; i++) {
        isa->tile(isa->mr, isa->nr, TILE_DEPTH, o.a, o.b, o.c, isa->nr, false);
    }
}

static void pairs_task(void *ctx, int64_t index, int thread)
{
    (void)ctx;
    (void)index;
    (void)thread;
    tile_operands o;
    const qs_pairs *pairs = qs_pairs_get();
    memset(&o, 0, sizeof o);
    const unsigned mode = pairs->begin();
    for (int i = 0; i < TILES_A_TASK; i++) {
        pairs->tile(pairs->mr, pairs->nr, TILE_DEPTH, (const uint32_t *)(const void *)o.a,
                    (const uint32_t *)(const void *)o.b, o.c, pairs->nr, false);
    }
    pairs->end(mode);
}

static void half_task(void *ctx, int64_t index, int thread)
{
    (void)ctx;
    (void)index;
    (void)thread;
    struct {
        _Alignas(64) uint16_t a[TILE_DEPTH * QS_HALF_MR], b[TILE_DEPTH * QS_HALF_NR];
        _Alignas(64) float scale[TILE_DEPTH / QS_HALF_STRETCH * QS_HALF_NR];
        _Alignas(64) float y[QS_HALF_MR * QS_HALF_NR];
    } o;
    const qs_half *half = qs_half_get();
    memset(&o, 0, sizeof o);
    for (int i = 0; i < TILES_A_TASK; i++) {
        half->tile(TILE_DEPTH, o.a, o.b, o.scale, o.y);
    }
}

enum { TILE_STEPS = 8 };

static void amx_task(void *ctx, int64_t index, int thread)
{
    (void)ctx;
    (void)index;
    (void)thread;
    struct {
        _Alignas(64) uint16_t a[TILE_STEPS * QS_TILE_STEP_ELEMS];
        _Alignas(64) uint16_t b[TILE_STEPS * QS_TILE_STEP_ELEMS];
        _Alignas(64) float y[QS_TILE_SIDE * QS_TILE_SIDE];
    } o;
    const qs_tile *tile = qs_tile_get();
    memset(&o, 0, sizeof o);
    const unsigned before = tile->begin();
    for (int i = 0; i < TILES_A_TASK; i++) {
        tile->tile(TILE_STEPS, o.a, o.b, o.y);
    }
    tile->end(before);
}

static double cpu_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* By the CPU time of all threads together, times their number: a core that others use meanwhile
 * does not lower it. `slow`: as many tasks as take some time without instructions for them. */
static double measure_tiles(qs_bench *b, qs_task task, double flops_a_tile, bool slow)
{
    const int threads = qs_queue_threads(b->queue);
    const int64_t tasks = b->small || slow ? threads : (int64_t)TASKS_A_THREAD * threads;
    const double flops = flops_a_tile * TILES_A_TASK * (double)tasks;
    double best = 0;
    for (int i = 0; i < (slow ? 1 : TRIES); i++) {
        const double start = cpu_s();
        qs_parallel_for(b->queue, tasks, INT32_MAX, task, NULL);
        const double rate = flops / (cpu_s() - start) * threads;
        best = rate > best ? rate : best;
    }
    return best;
}

double qs_bench_products_rate(qs_bench *b, const qs_ops *ops, const char **name)
{
    const qs_isa *isa = qs_isa_get();
    if (ops == qs_ops_cpu_bf16()) {
        const qs_pairs *pairs = qs_pairs_get();
        *name = "bf16 register tile in L1";
        return measure_tiles(b, pairs_task, 4.0 * pairs->mr * pairs->nr * TILE_DEPTH,
                             strcmp(pairs->name, "portable") == 0);
    }
    if (ops == qs_ops_cpu_fp16()) {
        *name = "fp16 register tile in L1";
        return measure_tiles(b, half_task, 2.0 * QS_HALF_MR * QS_HALF_NR * TILE_DEPTH,
                             !qs_ops_cpu_fp16_is_faster());
    }
    if (ops == qs_ops_cpu_amx()) {
        *name = "bf16 tiles in L1";
        return measure_tiles(b, amx_task, 2.0 * QS_TILE_SIDE * QS_TILE_STEP_ELEMS * TILE_STEPS,
                             strcmp(qs_tile_get()->name, "portable") == 0);
    }
    *name = "fp32 register tile in L1";
    return measure_tiles(b, tile_task, 2.0 * isa->mr * isa->nr * TILE_DEPTH, false);
}

/* ---- products on a GPU ---- */

static qs_status matmul(qs_bench *b, void *ctx)
{
    return b->plugin->gemm(b->queue, ctx);
}

static qs_status time_matmul(qs_bench *b, int64_t side, qs_bench_times *times)
{
    qs_mat x, w, y;
    QS_TRY(qs_bench_mat(b, &x, side, side, 0));
    QS_TRY(qs_bench_mat(b, &w, side, side, 0));
    QS_TRY(qs_bench_mat(b, &y, side, side, 0));
    qs_gemm_call call = {.m = side,
                         .n = side,
                         .k = side,
                         .alpha = 1.0F,
                         .a = x.data,
                         .b = w.data,
                         .a_stride = side,
                         .b_stride = side,
                         .b_transposed = true,
                         .c = y.data,
                         .c_stride = side,
                         .c_dtype = QS_BF16};
    QS_TRY(qs_bench_time(b, matmul, &call, times));
    qs_bench_free(b);
    return QS_OK;
}

/* Up to 8192^3, or as large as is still quick: an emulated card stops early. */
static qs_status measure_matmul(qs_bench *b)
{
    const int64_t most = b->small ? SIDE_MIN : SIDE_MAX;
    qs_bench_times times = {0, 0, 0};
    for (int64_t side = SIDE_MIN; side <= most && times.median < QUICK_S; side *= SIDE_FACTOR) {
        QS_TRY(time_matmul(b, side, &times));
        b->matmul_rate = 2.0 * (double)side * (double)side * (double)side / times.min;
        (void)snprintf(b->matmul_name, sizeof b->matmul_name, "bf16 %lld^3", (long long)side);
    }
    return QS_OK;
}

qs_status qs_bench_bounds(qs_bench *b)
{
    const bool host = b->plugin == NULL;
    QS_TRY(measure_copy(b, host));
    if (!host) {
        return measure_matmul(b);
    }
    const char *name;
    b->matmul_rate = qs_bench_products_rate(b, b->ops, &name);
    (void)snprintf(b->matmul_name, sizeof b->matmul_name, "%s", name);
    return QS_OK;
}
