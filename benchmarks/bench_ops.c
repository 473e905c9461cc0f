/* How near each operation of the GPU's step comes to what the card can do, at Llama-3-8B's shapes.
 *
 *     bench_ops PLUGIN [--small] [--csv FILE] [--tokens T]...
 *
 * The bounds are measured in the same run: a copy of 1 GiB inside device memory for what moves
 * bytes, a large square product for what multiplies. Bytes are those that an operation must move,
 * each input read once and each output written once; operations are 2 per multiply-add, the causal
 * half only for attention. Inputs are random: zeros run faster. The last rows add the operations of
 * a step up, which is what a step would take without gathers, launch gaps and the host: the
 * distance to the real step (qshard bench step) is what those cost. The four that cost most are
 * also measured by `qshard bench`, on any backend, with their results checked; this program needs
 * neither MPI nor HDF5. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench/kernels/cases.h"
#include "gpu_main.h"

enum { N_LINEARS = 7, N_GROUPS = 4, NAME_BYTES = 64 };

typedef struct {
    int64_t hidden, kv, ffn, vocab, head_rows;
    int n_heads, n_kv_heads, head_dim, n_layers, lora_rank;
} model_shape;

static const model_shape llama8 = {4096, 1024, 14336, 128256, 4096, 32, 8, 128, 32, 16};
static const model_shape tiny = {128, 64, 192, 512, 128, 4, 2, 32, 2, 8};

/* Times of one micro-batch of T tokens, seconds. */
typedef struct {
    double rmsnorm[2], rope, swiglu[2], attention[2], linears[N_GROUPS][2], head_chunk, head_finish;
} layer_times;

typedef struct {
    qs_bench b;
    FILE *csv; /* NULL: none */
    model_shape s;
    int64_t tokens;
    qs_bench_unit unit;  /* the layer's */
    double unit_seconds; /* to open it */
    layer_times times;
} state;

/* What a call of the small operations needs; every case fills what it uses. */
typedef struct {
    const state *st;
    qs_mat x, y, z, u, v, dx;
    void *a, *c, *d, *e, *f;
    int64_t count;
} op_case;

/* A layer's linears in order; those that read the same x together, as a layer computes them. */
typedef struct {
    const char *name;
    int first, count;
} linear_group;

static const linear_group groups[N_GROUPS] = {
    {"q k v", 0, 3}, {"o", 3, 1}, {"gate up", 4, 2}, {"down", 6, 1}};

static void linear_shape(const model_shape *s, int i, int64_t *out, int64_t *in)
{
    const int64_t q = (int64_t)s->n_heads * s->head_dim;
    const int64_t outs[N_LINEARS] = {q, s->kv, s->kv, s->hidden, s->ffn, s->ffn, s->hidden};
    *out = outs[i];
    *in = i == 3 ? q : i == 6 ? s->ffn : s->hidden;
}

/* Time `call` and print a row. `amount`: the bytes that it must move or the operations that it must
 * do. The seconds also go to *seconds, if not NULL. */
static qs_status row(state *st, const char *name, const char *shape, qs_bench_bound bound,
                     double amount, qs_bench_call call, void *ctx, double *seconds)
{
    qs_bench_times times;
    QS_TRY(qs_bench_time(&st->b, call, ctx, &times));
    const bool copies = bound == QS_BENCH_COPY;
    const double rate = amount / times.median;
    const double ceiling = copies ? st->b.copy_rate : st->b.matmul_rate;
    const double figure = rate * (copies ? 1e-9 : 1e-12);
    const char *unit = copies ? "GB/s" : "TFLOP/s", *of = copies ? "copy" : "matmul";
    const double share = ceiling > 0 ? 100 * rate / ceiling : 0;
    printf("%-22s %-30s %10.4f ms %9.2f %-7s %6.1f %% of %s\n", name, shape, times.median * 1e3,
           figure, unit, share, of);
    if (st->csv != NULL) {
        (void)fprintf(st->csv, "%s,%s,%.6f,%.4f,%s,%.2f,%s\n", name, shape, times.median * 1e3,
                      figure, unit, share, of);
    }
    (void)fflush(stdout);
    if (seconds != NULL) {
        *seconds = times.median;
    }
    return QS_OK;
}

static qs_status bench_decode(state *st)
{
    char shape[NAME_BYTES];
    (void)snprintf(shape, sizeof shape, "%.1f M weights of a layer",
                   qs_bench_unit_weights(&st->unit) * 1e-6);
    return row(st, "unit_open", shape, QS_BENCH_COPY, qs_bench_unit_decode_bytes(&st->b, &st->unit),
               qs_bench_unit_open, &st->unit, &st->unit_seconds);
}

/* ---- quantize ---- */

static qs_status quantize_blocks(qs_bench *b, void *ctx)
{
    op_case *c = ctx;
    return b->ops->nf4_quantize_blocks(b->queue, c->x.data, c->x.dtype, c->count, c->a, c->c, c->d);
}

static qs_status quantize_absmax(qs_bench *b, void *ctx)
{
    op_case *c = ctx;
    return b->ops->nf4_quantize_absmax(b->queue, c->c, c->count / QS_NF4_BLOCK, 0.5F, c->e, c->f);
}

static qs_status bench_quantize(state *st)
{
    qs_bench *b = &st->b;
    op_case c = {.st = st, .count = st->s.ffn * st->s.hidden};
    const int64_t blocks = c.count / QS_NF4_BLOCK;
    char shape[NAME_BYTES];
    QS_TRY(qs_bench_mat(b, &c.x, st->s.ffn, st->s.hidden, 0));
    QS_TRY(qs_bench_zeros(b, &c.a, (size_t)c.count / 2));
    QS_TRY(qs_bench_zeros(b, &c.c, (size_t)blocks * sizeof(float)));
    QS_TRY(qs_bench_zeros(b, &c.d, sizeof(int64_t)));
    QS_TRY(qs_bench_zeros(b, &c.e, (size_t)blocks));
    QS_TRY(qs_bench_zeros(b, &c.f, (size_t)qs_nf4_quanta(c.count) * sizeof(float)));
    (void)snprintf(shape, sizeof shape, "%lld x %lld", (long long)st->s.ffn,
                   (long long)st->s.hidden);
    QS_TRY(row(st, "nf4_quantize_blocks", shape, QS_BENCH_COPY,
               (double)c.count * (2 + 0.5 + 4.0 / 64), quantize_blocks, &c, NULL));
    return row(st, "nf4_quantize_absmax", shape, QS_BENCH_COPY, (double)blocks * (4 + 1),
               quantize_absmax, &c, NULL);
}

/* ---- linears ---- */

/* The product alone, once a shape. */
static qs_status bench_frozen(state *st, int i, const char *name)
{
    qs_bench_linear l;
    char shape[NAME_BYTES];
    QS_TRY(qs_bench_linear_make(&st->b, &l, &st->unit, i, st->tokens));
    (void)snprintf(shape, sizeof shape, "T %lld, %lld x %lld", (long long)st->tokens,
                   (long long)l.w->out, (long long)l.w->in);
    return row(st, name, shape, QS_BENCH_MATMUL, qs_bench_linear_flops(&l), qs_bench_linear_forward,
               &l, NULL);
}

/* FLOPs: the frozen product 2 out in T either way; LoRA's 2 r (in + out) T forward, 4 backward. */
static qs_status bench_adapted(state *st, int g)
{
    const linear_group *group = &groups[g];
    qs_bench_joined j;
    char shape[NAME_BYTES], name[NAME_BYTES];
    QS_TRY(qs_bench_joined_make(&st->b, &j, &st->unit, group->first, group->count, st->tokens));
    const double frozen = qs_bench_joined_flops(&j), lora = qs_bench_joined_lora_flops(&j);
    (void)snprintf(shape, sizeof shape, "T %lld, %lld x %lld", (long long)st->tokens,
                   (long long)j.y.cols, (long long)j.x.cols);
    (void)snprintf(name, sizeof name, "lora fwd %s", group->name);
    QS_TRY(row(st, name, shape, QS_BENCH_MATMUL, frozen + lora, qs_bench_joined_forward, &j,
               &st->times.linears[g][0]));
    (void)snprintf(name, sizeof name, "lora bwd %s", group->name);
    return row(st, name, shape, QS_BENCH_MATMUL, frozen + 2 * lora, qs_bench_joined_backward, &j,
               &st->times.linears[g][1]);
}

/* ---- attention, head ---- */

static qs_status bench_attention(state *st)
{
    qs_bench_attention a;
    char shape[NAME_BYTES];
    QS_TRY(qs_bench_attention_make(&st->b, &a, st->tokens, st->s.n_heads, st->s.n_kv_heads,
                                   st->s.head_dim));
    (void)snprintf(shape, sizeof shape, "T %lld, %d / %d heads of %d", (long long)st->tokens,
                   st->s.n_heads, st->s.n_kv_heads, st->s.head_dim);
    QS_TRY(row(st, "attention fwd", shape, QS_BENCH_MATMUL, qs_bench_attention_flops(&a, false),
               qs_bench_attention_forward, &a, &st->times.attention[0]));
    return row(st, "attention bwd", shape, QS_BENCH_MATMUL, qs_bench_attention_flops(&a, true),
               qs_bench_attention_backward, &a, &st->times.attention[1]);
}

static qs_status bench_head(state *st)
{
    qs_bench_head h;
    char shape[NAME_BYTES];
    QS_TRY(qs_bench_head_make(&st->b, &h, st->tokens, st->s.head_rows, st->s.hidden));
    (void)snprintf(shape, sizeof shape, "%lld rows, %lld x %lld", (long long)st->tokens,
                   (long long)st->s.head_rows, (long long)st->s.hidden);
    QS_TRY(row(st, "head_chunk", shape, QS_BENCH_MATMUL, qs_bench_head_flops(&h),
               qs_bench_head_chunk, &h, &st->times.head_chunk));
    return row(st, "head_finish", shape, QS_BENCH_COPY,
               (double)st->tokens * (double)st->s.hidden * (4 + 4 + 2), qs_bench_head_finish, &h,
               &st->times.head_finish);
}

/* ---- rows ---- */

static qs_status rmsnorm_forward(qs_bench *b, void *ctx)
{
    op_case *c = ctx;
    return b->ops->rmsnorm_forward(b->queue, &c->x, c->a, 1e-5F, c->c, &c->y);
}

static qs_status rmsnorm_backward(qs_bench *b, void *ctx)
{
    op_case *c = ctx;
    return b->ops->rmsnorm_backward(b->queue, &c->y, &c->x, c->a, c->c, &c->dx);
}

static qs_status rope(qs_bench *b, void *ctx)
{
    op_case *c = ctx;
    return b->ops->rope(b->queue, &c->x, c->st->s.n_heads, c->st->s.head_dim, c->st->s.head_dim,
                        c->d, c->e, c->f, false);
}

static qs_status add(qs_bench *b, void *ctx)
{
    op_case *c = ctx;
    return b->ops->add(b->queue, &c->x, &c->y, &c->y);
}

static qs_status gather_rows(qs_bench *b, void *ctx)
{
    op_case *c = ctx;
    return b->ops->gather_rows(b->queue, &c->x, c->f, &c->y);
}

static qs_status swiglu_forward(qs_bench *b, void *ctx)
{
    op_case *c = ctx;
    return b->ops->glu_forward(b->queue, QS_GLU_SILU, &c->x, &c->y, &c->z);
}

static qs_status swiglu_backward(qs_bench *b, void *ctx)
{
    op_case *c = ctx;
    return b->ops->glu_backward(b->queue, QS_GLU_SILU, &c->x, &c->y, &c->z, &c->u, &c->v);
}

static qs_status positions(qs_bench *b, void **out, int64_t count)
{
    int32_t *host = malloc((size_t)count * sizeof *host);
    if (host == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "no memory for positions");
    }
    for (int64_t i = 0; i < count; i++) {
        host[i] = (int32_t)i;
    }
    const qs_status st = qs_bench_upload(b, out, host, (size_t)count * sizeof *host);
    free(host);
    return st;
}

static qs_status bench_hidden_rows(state *st)
{
    qs_bench *b = &st->b;
    const int64_t t = st->tokens, h = st->s.hidden;
    op_case c = {.st = st};
    char shape[NAME_BYTES];
    const double matrix = (double)t * (double)h * 2;
    QS_TRY(qs_bench_mat(b, &c.x, t, h, 0));
    QS_TRY(qs_bench_mat(b, &c.y, t, h, 0));
    QS_TRY(qs_bench_mat(b, &c.dx, t, h, 0));
    QS_TRY(qs_bench_random(b, &c.a, QS_F32, h));
    QS_TRY(qs_bench_zeros(b, &c.c, (size_t)t * sizeof(float)));
    QS_TRY(qs_bench_random(b, &c.d, QS_F32, t * st->s.head_dim / 2));
    QS_TRY(qs_bench_random(b, &c.e, QS_F32, t * st->s.head_dim / 2));
    QS_TRY(positions(b, &c.f, t));
    (void)snprintf(shape, sizeof shape, "T %lld x %lld", (long long)t, (long long)h);
    QS_TRY(row(st, "rmsnorm fwd", shape, QS_BENCH_COPY, 2 * matrix, rmsnorm_forward, &c,
               &st->times.rmsnorm[0]));
    QS_TRY(row(st, "rmsnorm bwd", shape, QS_BENCH_COPY, 4 * matrix, rmsnorm_backward, &c,
               &st->times.rmsnorm[1]));
    QS_TRY(row(st, "rope", shape, QS_BENCH_COPY, 2 * matrix, rope, &c, &st->times.rope));
    QS_TRY(row(st, "add", shape, QS_BENCH_COPY, 3 * matrix, add, &c, NULL));
    return row(st, "gather_rows", shape, QS_BENCH_COPY, 2 * matrix, gather_rows, &c, NULL);
}

static qs_status bench_swiglu(state *st)
{
    qs_bench *b = &st->b;
    const int64_t t = st->tokens, f = st->s.ffn;
    op_case c = {.st = st};
    char shape[NAME_BYTES];
    const double matrix = (double)t * (double)f * 2;
    QS_TRY(qs_bench_mat(b, &c.x, t, f, 0));
    QS_TRY(qs_bench_mat(b, &c.y, t, f, 0));
    QS_TRY(qs_bench_mat(b, &c.z, t, f, 0));
    QS_TRY(qs_bench_mat(b, &c.u, t, f, 0));
    QS_TRY(qs_bench_mat(b, &c.v, t, f, 0));
    (void)snprintf(shape, sizeof shape, "T %lld x %lld", (long long)t, (long long)f);
    QS_TRY(row(st, "swiglu fwd", shape, QS_BENCH_COPY, 3 * matrix, swiglu_forward, &c,
               &st->times.swiglu[0]));
    return row(st, "swiglu bwd", shape, QS_BENCH_COPY, 5 * matrix, swiglu_backward, &c,
               &st->times.swiglu[1]);
}

/* ---- the optimizer ---- */

static qs_status adamw(qs_bench *b, void *ctx)
{
    op_case *c = ctx;
    const qs_update_args args = {.lr = 1e-4,
                                 .beta1 = 0.9,
                                 .beta2 = 0.999,
                                 .eps = 1e-8,
                                 .grad_scale = 1.0,
                                 .bias_correction1 = 0.1,
                                 .bias_correction2 = 0.001};
    return b->ops->update(b->queue, &args, c->count, c->a, c->c, c->d, c->e);
}

static qs_status square_sums(qs_bench *b, void *ctx)
{
    op_case *c = ctx;
    return b->ops->square_sums(b->queue, c->a, c->count / 4096, c->f);
}

static qs_status accumulate(qs_bench *b, void *ctx)
{
    op_case *c = ctx;
    return b->ops->accumulate(b->queue, c->d, c->a, c->count);
}

static qs_status convert(qs_bench *b, void *ctx)
{
    op_case *c = ctx;
    return b->ops->convert(b->queue, c->a, c->count, c->x.data);
}

static qs_status bench_optimizer(state *st)
{
    qs_bench *b = &st->b;
    op_case c = {.st = st};
    char shape[NAME_BYTES];
    for (int i = 0; i < N_LINEARS; i++) {
        c.count += st->s.n_layers * st->s.lora_rank * (st->unit.w[i].in + st->unit.w[i].out);
    }
    c.count -= c.count % 4096;
    QS_TRY(qs_bench_random(b, &c.a, QS_F32, c.count));
    QS_TRY(qs_bench_random(b, &c.c, QS_F32, c.count));
    QS_TRY(qs_bench_zeros(b, &c.d, (size_t)c.count * sizeof(float)));
    QS_TRY(qs_bench_zeros(b, &c.e, (size_t)c.count * sizeof(float)));
    QS_TRY(qs_bench_zeros(b, &c.f, (size_t)(c.count / 4096) * sizeof(double)));
    QS_TRY(qs_bench_mat(b, &c.x, 1, c.count, 0));
    (void)snprintf(shape, sizeof shape, "%.1f M LoRA weights", (double)c.count * 1e-6);
    QS_TRY(row(st, "adamw", shape, QS_BENCH_COPY, 28.0 * (double)c.count, adamw, &c, NULL));
    QS_TRY(
        row(st, "square_sums", shape, QS_BENCH_COPY, 4.0 * (double)c.count, square_sums, &c, NULL));
    QS_TRY(
        row(st, "accumulate", shape, QS_BENCH_COPY, 12.0 * (double)c.count, accumulate, &c, NULL));
    return row(st, "convert", shape, QS_BENCH_COPY, 6.0 * (double)c.count, convert, &c, NULL);
}

/* ---- a step, added up ---- */

/* Llama's FLOPs a token: 4 P + 4 h V + 6 T hq L + 6 r (in + out) L. */
static double model_flops(const state *st)
{
    const model_shape *s = &st->s;
    const double layers = s->n_layers, hq = (double)s->n_heads * s->head_dim;
    double sides = 0;
    for (int i = 0; i < N_LINEARS; i++) {
        sides += (double)(st->unit.w[i].in + st->unit.w[i].out);
    }
    return 4 * qs_bench_unit_weights(&st->unit) * layers +
           4.0 * (double)s->hidden * (double)s->vocab + 6.0 * (double)st->tokens * hq * layers +
           6.0 * s->lora_rank * sides * layers;
}

static void print_sum(const state *st)
{
    const layer_times *t = &st->times;
    const double layers = st->s.n_layers;
    double forward = 2 * t->rmsnorm[0] + 1.25 * t->rope + t->attention[0] + t->swiglu[0];
    double backward = 2 * t->rmsnorm[1] + 1.25 * t->rope + t->attention[1] + t->swiglu[1];
    for (int g = 0; g < N_GROUPS; g++) {
        forward += t->linears[g][0];
        backward += t->linears[g][1];
    }
    const double head =
        t->head_chunk * (double)st->s.vocab / (double)st->s.head_rows + t->head_finish;
    const double units = 2 * st->unit_seconds * layers;
    const double none = layers * (forward + backward) + head + units;
    const double full = none + layers * forward;
    const double flops = model_flops(st) * (double)st->tokens;
    printf("sum of a step          T %-8lld forward %.2f, backward %.2f, decode %.3f ms a layer, "
           "head %.2f ms\n",
           (long long)st->tokens, forward * 1e3, backward * 1e3, st->unit_seconds * 1e3,
           head * 1e3);
    const double seconds[2] = {none, full};
    for (int i = 0; i < 2; i++) {
        const double share = 100 * flops / seconds[i] / st->b.matmul_rate;
        const char *what = i == 0 ? "without recompute" : "with full recompute";
        printf("                       %-22s %10.2f ms %9.0f tokens/s, model FLOPs at %.1f %% of "
               "matmul\n",
               what, seconds[i] * 1e3, (double)st->tokens / seconds[i], share);
        if (st->csv != NULL) {
            (void)fprintf(st->csv, "sum %s,T %lld,%.6f,%.2f,tokens/s,%.2f,matmul\n", what,
                          (long long)st->tokens, seconds[i] * 1e3, (double)st->tokens / seconds[i],
                          share);
        }
    }
}

/* ---- all of it ---- */

static qs_ops_limits limits_of(const model_shape *s, int64_t tokens)
{
    qs_ops_limits limits = {.threads = 1,
                            .tokens = tokens,
                            .documents = 1,
                            .loss_rows = tokens,
                            .widest = s->ffn,
                            .n_heads = s->n_heads,
                            .n_kv_heads = s->n_kv_heads,
                            .head_dim = s->head_dim,
                            .lora_rank = s->lora_rank,
                            .n_linears = N_LINEARS,
                            .hidden = s->hidden,
                            .head_rows = s->head_rows};
    for (int i = 0; i < N_LINEARS; i++) {
        linear_shape(s, i, &limits.out[i], &limits.in[i]);
    }
    for (int g = 0; g < N_GROUPS; g++) {
        for (int i = 1; i < groups[g].count; i++) {
            limits.joined[groups[g].first + i] = true;
        }
    }
    return limits;
}

typedef qs_status (*group)(state *st);

/* The layer stays; what a group took goes after it. */
static qs_status run_group(state *st, group g)
{
    int64_t out[N_LINEARS], in[N_LINEARS];
    for (int i = 0; i < N_LINEARS; i++) {
        linear_shape(&st->s, i, &out[i], &in[i]);
    }
    QS_TRY(qs_bench_unit_make(&st->b, &st->unit, N_LINEARS, out, in, st->s.lora_rank));
    QS_TRY(qs_bench_unit_open(&st->b, &st->unit));
    QS_TRY(g(st));
    QS_TRY(qs_queue_wait(st->b.queue));
    st->b.ops->unit_close(st->b.queue);
    qs_bench_free(&st->b);
    return QS_OK;
}

static qs_status bench_linears(state *st)
{
    QS_TRY(bench_frozen(st, 0, "linear q"));
    QS_TRY(bench_frozen(st, 1, "linear k"));
    QS_TRY(bench_frozen(st, 4, "linear gate"));
    QS_TRY(bench_frozen(st, 6, "linear down"));
    for (int g = 0; g < N_GROUPS; g++) {
        QS_TRY(bench_adapted(st, g));
    }
    return QS_OK;
}

static void print_bounds(const state *st)
{
    printf("# bounds of this run: copy %.1f GB/s (read + written), product %s %.2f TFLOP/s\n",
           st->b.copy_rate * 1e-9, st->b.matmul_name, st->b.matmul_rate * 1e-12);
    if (st->csv != NULL) {
        (void)fprintf(st->csv, "bound copy,,,%.4f,GB/s,100,copy\n", st->b.copy_rate * 1e-9);
        (void)fprintf(st->csv, "bound matmul,%s,,%.4f,TFLOP/s,100,matmul\n", st->b.matmul_name,
                      st->b.matmul_rate * 1e-12);
    }
}

static qs_status measure(state *st, const int64_t *tokens, int n_tokens)
{
    static const group once[] = {bench_decode, bench_quantize, bench_optimizer};
    static const group each[] = {bench_hidden_rows, bench_swiglu, bench_linears, bench_attention,
                                 bench_head};
    int64_t most = 0;
    for (int i = 0; i < n_tokens; i++) {
        most = tokens[i] > most ? tokens[i] : most;
    }
    const qs_ops_limits limits = limits_of(&st->s, most);
    QS_TRY(qs_bench_open_ops(&st->b, &limits));
    QS_TRY(qs_bench_bounds(&st->b));
    print_bounds(st);
    for (size_t i = 0; i < sizeof once / sizeof *once; i++) {
        QS_TRY(run_group(st, once[i]));
    }
    for (int t = 0; t < n_tokens; t++) {
        st->tokens = tokens[t];
        for (size_t i = 0; i < sizeof each / sizeof *each; i++) {
            QS_TRY(run_group(st, each[i]));
        }
        print_sum(st);
    }
    return QS_OK;
}

static qs_status run(const gpu_main *g)
{
    static const int64_t usual[] = {512, 4096, 16384}, few[] = {48};
    const bool asked = g->n_tokens > 0;
    state st = {.s = g->small ? tiny : llama8, .csv = g->csv};
    qs_status status = qs_bench_open(&st.b, g->plugin, g->device, g->plugin->ops(), 1, g->small);
    if (status == QS_OK) {
        status = measure(&st,
                         asked      ? g->tokens
                         : g->small ? few
                                    : usual,
                         asked      ? g->n_tokens
                         : g->small ? 1
                                    : 3);
    }
    qs_bench_close(&st.b);
    return status;
}

int main(int argc, char **argv)
{
    return gpu_main_run(argc, argv, "name,shape,ms,figure,unit,share,bound", run);
}
