/* The matrix products of a step at Llama-3-8B's shapes, one by one: by each of the algorithms that
 * cuBLASLt proposes, in its order.
 *
 *     bench_products PLUGIN [--small] [--csv FILE] [--tokens T]...
 *
 * A run takes the first algorithm. A row says what the others take, whether the first MiB of their
 * results has the same bits, and what bounds a product: its FLOPs at the rate of a large square
 * product or its bytes at that of a copy, both measured in the same run. The last row adds up what
 * a step without recompute takes with the first of each and with the fastest. Rows in brackets are
 * what one of joined linears takes by itself; they do not count. Repeated calls find in the L2
 * cache what fits there. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/minmax.h"
#include "gpu_main.h"
#include "kernels/cuda/core/border.h"

enum {
    ALGORITHMS = 8, /* as many as gemm_lt.c asks for */
    PRODUCTS_MAX = 48,
    LAYERS = 32,
    RANK = 16,
    BATCHES = 3,
    COMPARED = 1 << 20, /* bytes of a result */
};

typedef struct {
    int64_t hidden, kv, ffn, vocab, head_rows;
} model_shape;

static const model_shape llama8 = {4096, 1024, 14336, 128256, 4096};
static const model_shape tiny = {128, 64, 192, 512, 128};

/* Linears that read the same x, of which each B has a gradient of its own. */
typedef struct {
    const char *name;
    int64_t in, out;     /* of all */
    int64_t each[2];     /* outs that differ, */
    int times[2], count; /* how often, and how many linears there are */
    bool residual;       /* y is added to the stream, in fp32 */
} linear_group;

typedef struct {
    char name[32];
    double times; /* a step */
    qs_gemm_call call;
} product;

typedef struct {
    const gpu_main *g;
    qs_bench by[ALGORITHMS]; /* a queue an algorithm; the first has the buffers */
    void *c;
    model_shape s;
    int64_t tokens;
    product products[PRODUCTS_MAX];
    int n;
    double first, fastest; /* sums over a step */
} state;

/* ---- the products, without matrices yet ---- */

static qs_gemm_call bf16_product(int64_t m, int64_t n, int64_t k, int64_t a_stride,
                                 int64_t b_stride)
{
    return (qs_gemm_call){.m = m,
                          .n = n,
                          .k = k,
                          .alpha = 1.0F,
                          .a_stride = a_stride,
                          .b_stride = b_stride,
                          .c_stride = n,
                          .c_dtype = QS_BF16};
}

static void add_product(state *st, const char *what, const char *of, double times,
                        qs_gemm_call call)
{
    product *p = &st->products[st->n++];
    (void)snprintf(p->name, sizeof p->name, "%s %s", what, of);
    p->times = times;
    p->call = call;
}

static void sum_in_place(qs_gemm_call *call)
{
    call->c_dtype = QS_F32;
    call->c0_stride = call->c_stride;
}

static qs_gemm_call gradient(const state *st, int64_t m, int64_t n, int64_t a_stride,
                             int64_t b_stride)
{
    qs_gemm_call call = bf16_product(m, n, st->tokens, a_stride, b_stride);
    call.a_transposed = true;
    call.c_dtype = QS_F32;
    return call;
}

/* What one of the linears takes by itself, to be compared: not part of a step. */
static void add_alone(state *st, const linear_group *g, int64_t out)
{
    const int64_t border = qs_border_width(RANK);
    const int64_t x = qs_border_stride(g->in, border), y = qs_border_stride(out, border);
    qs_gemm_call forward = bf16_product(st->tokens, out, g->in + border, x, x);
    const qs_gemm_call backward = bf16_product(st->tokens, g->in, out + border, y, x);
    forward.b_transposed = true;
    add_product(st, "(y) of", g->name, 0, forward);
    add_product(st, "(dx) of", g->name, 0, backward);
}

/* linear.cu's products, without dropout. */
static void add_group(state *st, const linear_group *g)
{
    const int64_t border = g->count * qs_border_width(RANK);
    const int64_t x = qs_border_stride(g->in, border), y = qs_border_stride(g->out, border);
    qs_gemm_call forward = bf16_product(st->tokens, g->out, g->in + border, x, x);
    qs_gemm_call by_a = bf16_product(st->tokens, border, g->in, x, x);
    const qs_gemm_call by_b = bf16_product(st->tokens, border, g->out, y, x);
    const qs_gemm_call backward = bf16_product(st->tokens, g->in, g->out + border, y, x);
    forward.b_transposed = by_a.b_transposed = true;
    by_a.c_stride = x;
    if (g->residual) {
        sum_in_place(&forward);
    }
    add_product(st, "y", g->name, LAYERS, forward);
    add_product(st, "dx", g->name, LAYERS, backward);
    add_product(st, "x A^T", g->name, LAYERS, by_a);
    add_product(st, "dy B", g->name, LAYERS, by_b);
    add_product(st, "dA", g->name, LAYERS, gradient(st, border, g->in, y, x));
    for (int i = 0; i < 2; i++) {
        if (g->times[i] > 0) {
            add_product(st, i == 0 ? "dB" : "dB'", g->name, g->times[i] * LAYERS,
                        gradient(st, g->each[i], RANK, y, RANK));
        }
        if (g->count > 1 && g->times[i] > 0) {
            add_alone(st, g, g->each[i]);
        }
    }
}

static void add_head(state *st)
{
    const model_shape *s = &st->s;
    const double chunks = (double)s->vocab / (double)s->head_rows;
    qs_gemm_call logits = bf16_product(st->tokens, s->head_rows, s->hidden, s->hidden, s->hidden);
    qs_gemm_call values =
        bf16_product(st->tokens, s->hidden, s->head_rows, s->head_rows, s->hidden);
    logits.b_transposed = true;
    logits.c_dtype = QS_F32;
    sum_in_place(&values);
    add_product(st, "logits", "of a chunk", chunks, logits);
    add_product(st, "dx", "of a chunk", chunks, values);
}

static void list_products(state *st)
{
    const model_shape *s = &st->s;
    const linear_group groups[] = {
        {"q k v", s->hidden, s->hidden + 2 * s->kv, {s->hidden, s->kv}, {1, 2}, 3, false},
        {"o", s->hidden, s->hidden, {s->hidden}, {1}, 1, true},
        {"gate up", s->hidden, 2 * s->ffn, {s->ffn}, {2}, 2, false},
        {"down", s->ffn, s->hidden, {s->hidden}, {1}, 1, true},
    };
    st->n = 0;
    for (size_t i = 0; i < sizeof groups / sizeof *groups; i++) {
        add_group(st, &groups[i]);
    }
    add_head(st);
}

/* One A, one B and one C for all. */
static qs_status give_matrices(state *st)
{
    int64_t most_a = 0, most_b = 0, most_c = COMPARED;
    void *a, *b;
    for (int i = 0; i < st->n; i++) {
        const qs_gemm_call *g = &st->products[i].call;
        most_a = qs_max_i64(most_a, (g->a_transposed ? g->k : g->m) * g->a_stride);
        most_b = qs_max_i64(most_b, (g->b_transposed ? g->n : g->k) * g->b_stride);
        most_c = qs_max_i64(most_c, g->m * g->c_stride * (int64_t)qs_dtype_bytes(g->c_dtype));
    }
    QS_TRY(qs_bench_random(&st->by[0], &a, QS_BF16, most_a));
    QS_TRY(qs_bench_random(&st->by[0], &b, QS_BF16, most_b));
    QS_TRY(qs_bench_zeros(&st->by[0], &st->c, (size_t)most_c));
    for (int i = 0; i < st->n; i++) {
        qs_gemm_call *g = &st->products[i].call;
        g->a = a;
        g->b = b;
        g->c = st->c;
        g->c0 = g->c0_stride > 0 ? st->c : NULL;
    }
    return QS_OK;
}

/* ---- times ---- */

static qs_status multiply(qs_bench *b, void *ctx)
{
    const product *p = ctx;
    return b->plugin->gemm(b->queue, &p->call);
}

/* Seconds, or 0 where there is no such algorithm. What it leaves of C's beginning goes to `left`.
 */
static qs_status time_of(state *st, qs_bench *b, product *p, void **left, double *seconds)
{
    qs_bench_times times = {0};
    *left = NULL;
    *seconds = 0;
    QS_TRY(qs_queue_zero(b->queue, st->c, COMPARED));
    if (multiply(b, p) != QS_OK) {
        qs_error_clear();
        return QS_OK;
    }
    QS_TRY(qs_queue_wait(b->queue));
    QS_TRY(qs_bench_download(b, left, st->c, COMPARED));
    QS_TRY(qs_bench_time(b, multiply, p, &times));
    *seconds = times.median;
    return QS_OK;
}

/* The larger of both bounds, seconds. */
static double bound_of(const state *st, const product *p, const char **by)
{
    const qs_gemm_call *g = &p->call;
    const double m = (double)g->m, n = (double)g->n, k = (double)g->k;
    const double c = m * n * (double)qs_dtype_bytes(g->c_dtype) * (g->c0 != NULL ? 2 : 1);
    const double flops = 2 * m * n * k / st->by[0].matmul_rate;
    const double bytes = (2 * (m + n) * k + c) / st->by[0].copy_rate;
    *by = flops > bytes ? "product" : "copy";
    return flops > bytes ? flops : bytes;
}

static void print_row(const state *st, const product *p, const double *ms, const bool *same)
{
    const char *by;
    const double bound = bound_of(st, p, &by) * 1e3;
    char shape[48];
    (void)snprintf(shape, sizeof shape, "%lld x %lld x %lld", (long long)p->call.m,
                   (long long)p->call.n, (long long)p->call.k);
    printf("%-16s %-22s %8.4f %-7s", p->name, shape, bound, by);
    for (int i = 0; i < ALGORITHMS; i++) {
        ms[i] > 0 ? printf(" %8.4f%s", ms[i], same[i] ? "=" : " ") : printf("        - ");
    }
    printf("\n");
    if (st->g->csv != NULL) {
        (void)fprintf(st->g->csv, "%s,%lld,%s,%.0f,%.5f,%s", p->name, (long long)st->tokens, shape,
                      p->times, bound, by);
        for (int i = 0; i < ALGORITHMS; i++) {
            (void)fprintf(st->g->csv, ",%.5f,%d", ms[i], same[i]);
        }
        (void)fprintf(st->g->csv, "\n");
    }
    (void)fflush(stdout);
}

static qs_status bench_product(state *st, product *p)
{
    double ms[ALGORITHMS], fastest;
    bool same[ALGORITHMS];
    void *first = NULL;
    for (int i = 0; i < ALGORITHMS; i++) {
        void *left;
        QS_TRY(time_of(st, &st->by[i], p, &left, &ms[i]));
        ms[i] *= 1e3;
        first = i == 0 ? left : first;
        same[i] = left != NULL && first != NULL && memcmp(first, left, COMPARED) == 0;
        if (left != first) {
            free(left);
        }
    }
    free(first);
    print_row(st, p, ms, same);
    fastest = ms[0];
    for (int i = 1; i < ALGORITHMS; i++) {
        fastest = ms[i] > 0 && ms[i] < fastest ? ms[i] : fastest;
    }
    st->first += p->times * ms[0];
    st->fastest += p->times * fastest;
    return QS_OK;
}

static qs_status bench_all(state *st)
{
    list_products(st);
    QS_TRY(give_matrices(st));
    st->first = st->fastest = 0;
    printf("# T %lld, ms: the bound, then algorithms 0 to %d (=: the bits of 0)\n",
           (long long)st->tokens, ALGORITHMS - 1);
    for (int i = 0; i < st->n; i++) {
        QS_TRY(bench_product(st, &st->products[i]));
    }
    printf("# products of a step, T %lld: first %.2f ms, fastest %.2f ms\n", (long long)st->tokens,
           st->first, st->fastest);
    return QS_OK;
}

/* ---- all of it ---- */

static qs_status open_queue(const gpu_main *g, qs_bench *b)
{
    const qs_ops_limits limits = {.threads = 1,
                                  .tokens = 8,
                                  .documents = 1,
                                  .loss_rows = 1,
                                  .widest = 8,
                                  .n_heads = 1,
                                  .n_kv_heads = 1,
                                  .head_dim = 8,
                                  .lora_rank = RANK,
                                  .hidden = 8,
                                  .head_rows = 8};
    QS_TRY(qs_bench_open(b, g->plugin, g->device, g->plugin->ops(), 1, g->small));
    b->batches = BATCHES;
    return qs_bench_open_ops(b, &limits);
}

static qs_status open_queues(state *st)
{
    char number[16];
    for (int i = 0; i < ALGORITHMS; i++) {
        (void)snprintf(number, sizeof number, "%d", i);
        (void)setenv("QSHARD_CUDA_ALGORITHM", number, 1);
        QS_TRY(open_queue(st->g, &st->by[i]));
    }
    (void)unsetenv("QSHARD_CUDA_ALGORITHM");
    QS_TRY(qs_bench_bounds(&st->by[0]));
    printf("# bounds of this run: copy %.1f GB/s (read + written), product %s %.2f TFLOP/s\n",
           st->by[0].copy_rate * 1e-9, st->by[0].matmul_name, st->by[0].matmul_rate * 1e-12);
    return QS_OK;
}

static qs_status measure(state *st)
{
    const int64_t usual = st->g->small ? 48 : 4096;
    const int n = st->g->n_tokens > 0 ? st->g->n_tokens : 1;
    QS_TRY(open_queues(st));
    for (int i = 0; i < n; i++) {
        st->tokens = st->g->n_tokens > 0 ? st->g->tokens[i] : usual;
        QS_TRY(bench_all(st));
        qs_bench_free(&st->by[0]);
    }
    return QS_OK;
}

static qs_status run(const gpu_main *g)
{
    state st = {.g = g, .s = g->small ? tiny : llama8};
    const qs_status status = measure(&st);
    for (int i = 0; i < ALGORITHMS; i++) {
        qs_bench_close(&st.by[i]);
    }
    return status;
}

int main(int argc, char **argv)
{
    char heading[256] = "name,tokens,shape,times,bound_ms,bound";
    for (int i = 0; i < ALGORITHMS; i++) {
        const size_t length = strlen(heading);
        (void)snprintf(heading + length, sizeof heading - length, ",ms_%d,same_%d", i, i);
    }
    return gpu_main_run(argc, argv, heading, run);
}
