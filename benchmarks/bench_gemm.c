/* How near the matrix product comes to what the core can do.
 *
 *     bench_gemm [threads] [repetitions]
 *
 * The ceiling is measured in the same run: the register tile alone, on operands that stay in the L1
 * cache, times the threads. Shapes are micro-batches of 50 to 2048 tokens against linears of small
 * and middle-sized models; the weight is dense, or NF4 decoded while it is packed (forward: W^T,
 * backward: W). */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/timer.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/ops_impl.h"
#include "kernels/ops.h"

typedef struct {
    int64_t tokens, out, in;
} shape;

typedef enum { DENSE, NF4_FORWARD, NF4_BACKWARD, N_KINDS } bench_kind;

static const char *const kind_names[N_KINDS] = {"dense", "nf4_forward", "nf4_backward"};

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double cpu_time_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Best rate of the register tile with both operands in L1. */
static double tile_gflops(void)
{
    const qs_isa *isa = qs_isa_get();
    static _Alignas(64) float a[QS_GEMM_MR_MAX * 128], b[QS_GEMM_NR_MAX * 128];
    static _Alignas(64) float c[QS_GEMM_MR_MAX * QS_GEMM_NR_MAX];
    double best = 0.0;
    for (int trial = 0; trial < 20; trial++) {
        enum { REPEAT = 2000 };
        double start = cpu_time_s();
        for (int i = 0; i < REPEAT; i++) {
            isa->tile(isa->mr, isa->nr, 128, a, b, c, isa->nr, false);
        }
        double rate = 2.0 * isa->mr * isa->nr * 128 * REPEAT / (cpu_time_s() - start) * 1e-9;
        best = rate > best ? rate : best;
    }
    return best;
}

static void *zeroed(size_t bytes)
{
    void *p = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (p == NULL) {
        fprintf(stderr, "bench_gemm: no memory for %zu bytes\n", bytes);
        exit(7);
    }
    memset(p, 0, bytes);
    return p;
}

/* A unit of one NF4 tensor in one message, bytes and scales of no meaning. */
static qs_unit_view make_unit(const shape *s, qs_weight *w)
{
    qs_unit_size size = {qs_nf4_quanta(s->out * s->in), 0, 1, QS_BF16, 256, 1};
    qs_unit_view view = {.layout = qs_unit_layout_make(&size, 1)};
    uint8_t *bytes = zeroed(view.layout.message_bytes);
    for (size_t i = 0; i < view.layout.absmax32_at; i++) {
        bytes[i] = (uint8_t)(i * 131 + i / 256);
    }
    view.base = bytes;
    *w = (qs_weight){QS_WEIGHT_NF4, s->out, s->in, 0, QS_BF16, qs_dynamic_map, 0.05F};
    return view;
}

static qs_status once(qs_queue *queue, bench_kind kind, const qs_unit_view *view,
                      const qs_weight *w, const float *dense, qs_mat *x, qs_mat *y)
{
    const qs_ops *ops = qs_ops_cpu();
    if (kind == NF4_FORWARD) {
        return ops->linear_forward(queue, view, w, NULL, x, y);
    }
    if (kind == NF4_BACKWARD) {
        return ops->linear_backward(queue, view, w, y, x, false);
    }
    qs_operand left = {.data = x->data, .stride = x->stride};
    qs_operand right = {.data = dense, .stride = w->in, .transposed = true};
    return qs_gemm(queue, x->rows, w->out, w->in, &left, &right, y->data, y->stride, false);
}

static int run(qs_queue *queue, const shape *s, bench_kind kind, int repetitions, double ceiling)
{
    qs_weight w;
    qs_unit_view view = make_unit(s, &w);
    qs_mat x = {zeroed((size_t)(s->tokens * s->in) * sizeof(float)), s->tokens, s->in, s->in,
                QS_F32};
    qs_mat y = {zeroed((size_t)(s->tokens * s->out) * sizeof(float)), s->tokens, s->out, s->out,
                QS_F32};
    float *dense = zeroed((size_t)(s->out * s->in) * sizeof *dense);
    double *times = zeroed((size_t)repetitions * sizeof *times);
    qs_status st = once(queue, kind, &view, &w, dense, &x, &y); /* warm up */
    double cpu_s = cpu_time_s();
    for (int i = 0; i < repetitions && st == QS_OK; i++) {
        double start = qs_time_s();
        st = once(queue, kind, &view, &w, dense, &x, &y);
        times[i] = qs_time_s() - start;
    }
    cpu_s = cpu_time_s() - cpu_s;
    if (st == QS_OK) {
        qsort(times, (size_t)repetitions, sizeof *times, compare);
        double flops = 2.0 * (double)s->tokens * (double)s->out * (double)s->in * 1e-9;
        double median = flops / times[repetitions / 2], best = flops / times[0];
        double per_core = flops * repetitions / cpu_s;
        printf("%-13s %6ld %6ld %6ld %10.3f %8.1f %8.1f %8.2f %8.1f\n", kind_names[kind],
               (long)s->tokens, (long)s->out, (long)s->in, times[repetitions / 2] * 1e3, median,
               best, best / ceiling, per_core);
    } else {
        qs_error_print(st);
    }
    free((void *)view.base);
    free(x.data);
    free(y.data);
    free(dense);
    free(times);
    return qs_exit_code(st);
}

int main(int argc, char **argv)
{
    static const shape shapes[] = {{50, 576, 576},    {512, 1536, 576},   {512, 2048, 2048},
                                   {64, 4096, 4096},  {50, 2048, 2048},   {2048, 2048, 2048},
                                   {512, 5632, 2048}, {1024, 2048, 8192}, {512, 4097, 333}};
    int threads = argc > 1 ? atoi(argv[1]) : 1, repetitions = argc > 2 ? atoi(argv[2]) : 7;
    if (threads < 1 || repetitions < 1) {
        fprintf(stderr, "usage: bench_gemm [threads] [repetitions]\n");
        return 2;
    }
    qs_queue *queue = NULL;
    qs_status st = qs_queue_create(&queue, threads);
    if (st != QS_OK) {
        qs_error_print(st);
        return qs_exit_code(st);
    }
    double ceiling = tile_gflops() * threads;
    printf("# bench_gemm  isa=%s threads=%d repetitions=%d tile_in_L1=%.1f GFLOP/s (all threads)\n",
           qs_isa_get()->name, threads, repetitions, ceiling);
    printf("# kind        tokens    out     in     med_ms  med_GFs best_GFs best/ceiling "
           "GFs_per_cpu_s\n");
    int code = 0;
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes && code == 0; i++) {
        for (bench_kind kind = DENSE; kind < N_KINDS && code == 0; kind++) {
            code = run(queue, &shapes[i], kind, repetitions, ceiling);
        }
    }
    qs_queue_destroy(queue);
    return code;
}
