/* Single operations of one rank, each beside its bound and checked: gemm, decode, attention, head.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/minmax.h"
#include "bench/bench_impl.h"
#include "bench/kernels/check.h"

enum { TOKENS = 512, SHAPE_BYTES = 48 };

/* A CPU's further products with NF4 (cpu.gemm), those that it can do: each beside its own bound. */
typedef struct {
    const qs_ops *ops;
    double rate;
} gemm_path;

enum { PATHS_MAX = 3 };

/* What the four share. */
typedef struct {
    qs_bench_job *job;
    qs_bench b;
    int64_t tokens;
    gemm_path paths[PATHS_MAX];
    int n_paths;
} bench_run;

typedef struct {
    int64_t rows, cols;
} weight_shape;

/* A square, a wide and a tall linear of small and middle-sized models. */
static const weight_shape usual_shapes[] = {{2048, 2048}, {8192, 2048}, {2048, 8192}, {4096, 4096}};

/* Time a call that has just been checked, and print its row. */
static qs_status add_row(bench_run *r, const char *name, const char *shape, qs_bench_bound bound,
                         double amount, qs_bench_call call, void *ctx, const qs_bench_check *check)
{
    qs_bench_times t;
    QS_TRY(qs_bench_time(&r->b, call, ctx, &t));
    const bool copies = bound == QS_BENCH_COPY;
    const double limit = copies ? r->b.copy_rate : r->b.matmul_rate;
    const qs_bench_cell cells[] = {QS_BENCH_T(name),
                                   QS_BENCH_T(shape),
                                   QS_BENCH_N(t.median * 1e3),
                                   QS_BENCH_N(t.min * 1e3),
                                   QS_BENCH_N(t.max * 1e3),
                                   QS_BENCH_N(amount / t.median * 1e-9),
                                   QS_BENCH_T(copies ? "GB/s" : "GFLOP/s"),
                                   QS_BENCH_N(limit * 1e-9),
                                   QS_BENCH_N(100 * amount / t.median / limit),
                                   QS_BENCH_N(check->error),
                                   QS_BENCH_N(check->checked),
                                   QS_BENCH_N(check->wrong)};
    qs_bench_report_row(r->job->report, cells);
    r->job->wrong += check->wrong;
    return QS_OK;
}

/* ---- products ---- */

/* Without the instructions that it is made for a product takes long: it is measured only if its
 * variable of the environment is set. */
static const qs_ops *if_worth_timing(const qs_ops *ops, bool faster, const char *variable)
{
    return faster || getenv(variable) != NULL ? ops : NULL;
}

/* Of a CPU: for products all that it can do; for decoding and attention bf16's alone, since the
 * others take strict's; for the head none, which is the same in all. */
static void find_paths(bench_run *r)
{
    const qs_ops *all[PATHS_MAX] = {
        qs_ops_cpu_bf16(),
        if_worth_timing(qs_ops_cpu_fp16(), qs_ops_cpu_fp16_is_faster(), "QSHARD_CPU_FP16"),
        if_worth_timing(qs_ops_cpu_amx(), qs_ops_cpu_amx_is_faster(), "QSHARD_CPU_AMX")};
    const qs_bench_kind kind = r->job->options->kind;
    const int count = kind == QS_BENCH_GEMM ? PATHS_MAX : kind == QS_BENCH_HEAD ? 0 : 1;
    for (int i = 0; i < count && r->b.plugin == NULL; i++) {
        if (all[i] != NULL) {
            const char *by;
            char name[48];
            gemm_path *path = &r->paths[r->n_paths++];
            *path = (gemm_path){all[i], qs_bench_products_rate(&r->b, all[i], &by)};
            snprintf(name, sizeof name, "%s products GFLOP/s", path->ops->name);
            qs_bench_report_number(r->job->report, "bounds", name, path->rate * 1e-9);
            snprintf(name, sizeof name, "%s products by", path->ops->name);
            qs_bench_report_text(r->job->report, "bounds", name, by);
        }
    }
}

/* NF4 both ways, with whatever operations the bench has. */
static qs_status nf4_rows(bench_run *r, const char *prefix, const char *shape, qs_bench_linear *l)
{
    qs_bench *b = &r->b;
    qs_bench_check check;
    char name[32];
    const double flops = qs_bench_linear_flops(l);
    QS_TRY(qs_bench_linear_backward(b, l)); /* reads y: before the forward writes it */
    QS_TRY(qs_bench_check_backward(b, l, &check));
    snprintf(name, sizeof name, "%s backward", prefix);
    QS_TRY(add_row(r, name, shape, QS_BENCH_MATMUL, flops, qs_bench_linear_backward, l, &check));
    QS_TRY(qs_bench_linear_forward(b, l));
    QS_TRY(qs_bench_check_forward(b, l, &check));
    snprintf(name, sizeof name, "%s forward", prefix);
    return add_row(r, name, shape, QS_BENCH_MATMUL, flops, qs_bench_linear_forward, l, &check);
}

/* The bench computes by `path` from now on. \return what it did before. */
static gemm_path take_path(bench_run *r, const gemm_path *path)
{
    const gemm_path before = {r->b.ops, r->b.matmul_rate};
    r->b.ops = path->ops;
    r->b.matmul_rate = path->rate;
    return before;
}

static qs_status path_rows(bench_run *r, const gemm_path *path, const char *shape,
                           qs_bench_linear *l)
{
    const gemm_path before = take_path(r, path);
    const qs_status st = nf4_rows(r, path->ops->name, shape, l);
    (void)take_path(r, &before);
    return st;
}

static qs_status gemm_shape(bench_run *r, const weight_shape *shape)
{
    qs_bench *b = &r->b;
    qs_bench_unit u;
    qs_bench_linear l;
    qs_bench_check check;
    char text[SHAPE_BYTES];
    QS_TRY(qs_bench_unit_make(b, &u, 1, &shape->rows, &shape->cols, 0));
    QS_TRY(qs_bench_linear_make(b, &l, &u, 0, r->tokens));
    QS_TRY(qs_bench_dense_make(b, &l));
    snprintf(text, sizeof text, "T %" PRId64 ", %" PRId64 "x%" PRId64, r->tokens, shape->rows,
             shape->cols);
    const double flops = qs_bench_linear_flops(&l);

    QS_TRY(qs_bench_dense(b, &l));
    QS_TRY(qs_bench_check_dense(b, &l, &check));
    QS_TRY(add_row(r, "dense", text, QS_BENCH_MATMUL, flops, qs_bench_dense, &l, &check));

    QS_TRY(qs_bench_unit_open(b, &u));
    QS_TRY(nf4_rows(r, "nf4", text, &l));
    for (int i = 0; i < r->n_paths; i++) {
        QS_TRY(path_rows(r, &r->paths[i], text, &l));
    }
    b->ops->unit_close(b->queue);
    qs_bench_free(b);
    return QS_OK;
}

static qs_status decode_row(bench_run *r, const char *name, const char *shape, qs_bench_unit *u)
{
    qs_bench_check check;
    QS_TRY(qs_bench_unit_decode(&r->b, u));
    QS_TRY(qs_bench_check_decode(&r->b, u, &check));
    return add_row(r, name, shape, QS_BENCH_COPY, qs_bench_unit_decode_bytes(&r->b, u),
                   qs_bench_unit_decode, u, &check);
}

static qs_status decode_shape(bench_run *r, const weight_shape *shape)
{
    qs_bench *b = &r->b;
    qs_bench_unit u;
    char text[SHAPE_BYTES];
    QS_TRY(qs_bench_unit_make(b, &u, 1, &shape->rows, &shape->cols, 0));
    QS_TRY(qs_bench_unit_decode_make(b, &u));
    snprintf(text, sizeof text, "%" PRId64 "x%" PRId64, shape->rows, shape->cols);
    QS_TRY(decode_row(r, "decode", text, &u));
    for (int i = 0; i < r->n_paths; i++) {
        const gemm_path before = take_path(r, &r->paths[i]);
        const qs_status st = decode_row(r, "bf16 decode", text, &u);
        (void)take_path(r, &before);
        QS_TRY(st);
    }
    b->ops->unit_close(b->queue);
    qs_bench_free(b);
    return QS_OK;
}

/* ---- attention, head ---- */

static int heads_of(const qs_bench_options *o, int *n_kv_heads, int *head_dim)
{
    const int n_heads = o->heads > 0 ? (int)o->heads : 32;
    *n_kv_heads = o->kv_heads > 0 ? (int)o->kv_heads : n_heads % 4 == 0 ? n_heads / 4 : n_heads;
    *head_dim = o->head_dim > 0 ? (int)o->head_dim : 64;
    return n_heads;
}

static qs_status attention_rows(bench_run *r, const char *forward, const char *backward,
                                const char *shape, qs_bench_attention *a)
{
    qs_bench_check check;
    QS_TRY(qs_bench_attention_forward(&r->b, a));
    QS_TRY(qs_bench_check_attention(&r->b, a, false, &check));
    QS_TRY(add_row(r, forward, shape, QS_BENCH_MATMUL, qs_bench_attention_flops(a, false),
                   qs_bench_attention_forward, a, &check));
    QS_TRY(qs_bench_attention_backward(&r->b, a));
    QS_TRY(qs_bench_check_attention(&r->b, a, true, &check));
    return add_row(r, backward, shape, QS_BENCH_MATMUL, qs_bench_attention_flops(a, true),
                   qs_bench_attention_backward, a, &check);
}

static qs_status attention(bench_run *r)
{
    int n_kv_heads, head_dim;
    const int n_heads = heads_of(r->job->options, &n_kv_heads, &head_dim);
    qs_bench_attention a;
    char text[SHAPE_BYTES];
    QS_TRY(qs_bench_attention_make(&r->b, &a, r->tokens, n_heads, n_kv_heads, head_dim));
    snprintf(text, sizeof text, "T %" PRId64 ", %d/%d heads of %d", r->tokens, n_heads, n_kv_heads,
             head_dim);
    QS_TRY(attention_rows(r, "forward", "backward", text, &a));
    for (int i = 0; i < r->n_paths; i++) {
        const gemm_path before = take_path(r, &r->paths[i]);
        const qs_status st = attention_rows(r, "bf16 forward", "bf16 backward", text, &a);
        (void)take_path(r, &before);
        QS_TRY(st);
    }
    return QS_OK;
}

static const weight_shape usual_chunk = {4096, 2048};

static qs_status head(bench_run *r, const weight_shape *shape)
{
    qs_bench_head h;
    qs_bench_check check;
    char text[SHAPE_BYTES];
    QS_TRY(qs_bench_head_make(&r->b, &h, r->tokens, shape->rows, shape->cols));
    snprintf(text, sizeof text, "%" PRId64 " rows, %" PRId64 "x%" PRId64, r->tokens, shape->rows,
             shape->cols);
    QS_TRY(qs_bench_head_chunk(&r->b, &h));
    QS_TRY(qs_bench_check_head(&r->b, &h, &check));
    return add_row(r, "chunk", text, QS_BENCH_MATMUL, qs_bench_head_flops(&h), qs_bench_head_chunk,
                   &h, &check);
}

/* ---- the whole ---- */

/* The shapes that are asked for: one, or the usual ones. */
static int shapes_of(const qs_bench_options *o, weight_shape *one, const weight_shape **shapes)
{
    if (o->rows > 0) {
        *one = (weight_shape){o->rows, o->cols};
        *shapes = one;
        return 1;
    }
    *shapes = o->kind == QS_BENCH_HEAD ? &usual_chunk : usual_shapes;
    return o->kind == QS_BENCH_HEAD ? 1 : (int)(sizeof usual_shapes / sizeof *usual_shapes);
}

static qs_ops_limits limits_of(const bench_run *r, int threads)
{
    const qs_bench_options *o = r->job->options;
    qs_ops_limits limits = qs_bench_least_limits(threads);
    weight_shape one;
    const weight_shape *shapes;
    const int count = shapes_of(o, &one, &shapes);
    limits.tokens = limits.loss_rows =
        qs_max_i64(r->tokens, 32); /* the check of decode has rows, too */
    limits.n_linears = o->kind == QS_BENCH_GEMM || o->kind == QS_BENCH_DECODE;
    for (int i = 0; i < count; i++) {
        const int64_t widest = qs_max_i64(shapes[i].rows, shapes[i].cols);
        const bool most = shapes[i].rows * shapes[i].cols > limits.out[0] * limits.in[0];
        limits.widest = qs_max_i64(limits.widest, widest);
        limits.out[0] = most ? shapes[i].rows : limits.out[0];
        limits.in[0] = most ? shapes[i].cols : limits.in[0];
    }
    if (o->kind == QS_BENCH_ATTENTION) {
        limits.n_heads = heads_of(o, &limits.n_kv_heads, &limits.head_dim);
    } else if (o->kind == QS_BENCH_HEAD) {
        limits.head_rows = shapes[0].rows;
        limits.hidden = shapes[0].cols;
    }
    return limits;
}

static qs_status check_shape(const bench_run *r, const qs_ops_limits *limits)
{
    char why[256] = "";
    if (limits->n_heads % limits->n_kv_heads != 0) {
        return QS_FAIL(QS_ERR_USAGE, "--heads: %d is no multiple of --kv-heads %d", limits->n_heads,
                       limits->n_kv_heads);
    }
    return r->job->options->kind != QS_BENCH_ATTENTION || r->b.ops->takes(limits, why, sizeof why)
               ? QS_OK
               : QS_FAIL(QS_ERR_USAGE, "--head-dim: %s; or use --device cpu", why);
}

static void start_table(bench_run *r)
{
    static const qs_bench_column columns[] = {
        {"operation", "", 14, QS_BENCH_TEXT},
        {"shape", "", 26, QS_BENCH_TEXT},
        {"time", "ms", 10, 3},
        {"min", "ms", 10, 3},
        {"max", "ms", 10, 3},
        {"rate", "G/s", 10, 1},
        {"unit", "", 7, QS_BENCH_TEXT},
        {"bound", "G/s", 10, 1},
        {"share", "%", 6, 1},
        {"error", "", 9, QS_BENCH_SCIENTIFIC},
        {"checked", "", 9, 0},
        {"#wrong", "", 6, 0},
    };
    qs_bench_report *report = r->job->report;
    qs_bench_report_number(report, "bounds", "copy GB/s", r->b.copy_rate * 1e-9);
    qs_bench_report_number(report, "bounds", "products GFLOP/s", r->b.matmul_rate * 1e-9);
    qs_bench_report_text(report, "bounds", "products by", r->b.matmul_name);
    find_paths(r);
    qs_bench_report_note(report, "time: median of the batches; error: against fp64, over the "
                                 "largest magnitude of a row");
    qs_bench_report_table(report, "operations", columns, (int)(sizeof columns / sizeof *columns));
}

static qs_status measure(bench_run *r)
{
    const qs_bench_options *o = r->job->options;
    weight_shape one;
    const weight_shape *shapes;
    const int count = shapes_of(o, &one, &shapes);
    QS_TRY(qs_bench_bounds(&r->b));
    start_table(r);
    if (o->kind == QS_BENCH_ATTENTION) {
        return attention(r);
    }
    for (int i = 0; i < count; i++) {
        QS_TRY(o->kind == QS_BENCH_GEMM     ? gemm_shape(r, &shapes[i])
               : o->kind == QS_BENCH_DECODE ? decode_shape(r, &shapes[i])
                                            : head(r, &shapes[i]));
    }
    return QS_OK;
}

static qs_status run_on(bench_run *r, qs_backend *backend)
{
    const qs_bench_options *o = r->job->options;
    int threads = 1;
    QS_TRY(qs_backend_open(backend, o->device, r->job->world, o->allow_shared_device));
    QS_TRY(qs_comm_threads(r->job->world, (int)o->threads, &threads));
    QS_TRY(qs_bench_open(&r->b, backend->plugin, backend->device, backend->ops, threads, false));
    r->b.batches = o->repeats > 0 ? (int)o->repeats : r->b.batches;
    const qs_ops_limits limits = limits_of(r, threads);
    QS_TRY(check_shape(r, &limits));
    QS_TRY(qs_bench_open_ops(&r->b, &limits));
    QS_TRY(qs_bench_describe(r->job, backend->device, backend->ops, threads, "self"));
    return measure(r);
}

qs_status qs_bench_single(qs_bench_job *job)
{
    const int64_t tokens = job->options->tokens;
    qs_backend backend = {0};
    bench_run r = {.job = job, .tokens = tokens > 0 ? tokens : TOKENS};
    const qs_status st = run_on(&r, &backend);
    qs_bench_close(&r.b);
    qs_backend_close(&backend);
    return qs_comm_agree(job->world, st);
}
