/* How near each operation of the GPU's step comes to what the card can do, at Llama-3-8B's shapes.
 *
 *     bench_ops PLUGIN [--small] [--csv FILE] [--tokens T]...
 *
 * The bounds are measured in the same run: a copy of 1 GiB inside device memory for what moves
 * bytes, a large square product for what multiplies. Bytes are those that an operation must move,
 * each input read once and each output written once; operations are 2 per multiply-add, the causal
 * half only for attention. Inputs are random: zeros run faster. The last rows add the operations of
 * a step up, which is what a step would take without gathers, launch gaps and the host: the
 * distance to the real step (qshard train) is what those cost. */
#include <stdlib.h>
#include <string.h>

#include "bench_device.h"
#include "quant/nf4.h"

enum { N_LINEARS = 7, TOKENS_MAX = 8, NAME_BYTES = 64 };

typedef struct {
    int64_t hidden, kv, ffn, vocab, head_rows;
    int n_heads, n_kv_heads, head_dim, n_layers, lora_rank;
} model_shape;

static const model_shape llama8 = {4096, 1024, 14336, 128256, 4096, 32, 8, 128, 32, 16};
static const model_shape tiny = {128, 64, 192, 512, 128, 4, 2, 32, 2, 8};

/* Times of one micro-batch of T tokens, seconds. */
typedef struct {
    double rmsnorm[2], rope, swiglu[2], attention[2], linear[N_LINEARS][2], head_chunk, head_finish;
} layer_times;

typedef struct {
    bench *b;
    model_shape s;
    int64_t tokens;
    /* the layer's unit */
    qs_unit_view unit;
    qs_weight w[N_LINEARS];
    qs_lora lora[N_LINEARS];
    double unit_seconds; /* to open it */
    layer_times times;
} state;

/* What a call needs; every case fills what it uses. */
typedef struct {
    state *st;
    int i;
    qs_mat x, y, z, u, v, dx, xa, work;
    void *a, *c, *d, *e, *f;
    int64_t count;
    qs_attention_shape attention;
    qs_head_state head;
    qs_unit_view unit;
    qs_weight w;
    bool plain;
} op_case;

static const char *const linear_names[N_LINEARS] = {"q", "k", "v", "o", "gate", "up", "down"};

static void linear_shape(const model_shape *s, int i, int64_t *out, int64_t *in)
{
    const int64_t q = (int64_t)s->n_heads * s->head_dim;
    const int64_t outs[N_LINEARS] = {q, s->kv, s->kv, s->hidden, s->ffn, s->ffn, s->hidden};
    *out = outs[i];
    *in = i == 3 ? q : i == 6 ? s->ffn : s->hidden;
}

/* ---- a layer of NF4 weights with adapters ---- */

static qs_status make_layer(state *st)
{
    bench *b = st->b;
    int64_t quanta = 0;
    void *bytes = NULL, *map = NULL;
    QS_TRY(bench_upload(b, &map, qs_dynamic_map, 256 * sizeof(float)));
    for (int i = 0; i < N_LINEARS; i++) {
        int64_t out, in;
        linear_shape(&st->s, i, &out, &in);
        st->w[i] = (qs_weight){QS_WEIGHT_NF4, out, in, quanta, QS_BF16, map, 0.02F};
        quanta += qs_nf4_quanta(out * in);
        void *a = NULL, *bb = NULL;
        QS_TRY(bench_random(b, &a, b->ops->act_dtype, st->s.lora_rank * in));
        QS_TRY(bench_random(b, &bb, b->ops->act_dtype, st->s.lora_rank * out));
        st->lora[i] = (qs_lora){.a = a, .b = bb, .rank = st->s.lora_rank, .scale = 2.0F};
    }
    const qs_unit_size size = {quanta, 0, 1, QS_BF16, 256, 1};
    st->unit = (qs_unit_view){.layout = qs_unit_layout_make(&size, 1)};
    const qs_unit_layout *layout = &st->unit.layout;
    QS_TRY(bench_random(b, &bytes, QS_U8, (int64_t)layout->message_bytes));
    /* The second level must be numbers: random bytes are not. */
    float *absmax32 = malloc((size_t)quanta * sizeof *absmax32);
    if (absmax32 == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "no memory for %lld floats", (long long)quanta);
    }
    for (int64_t i = 0; i < quanta; i++) {
        absmax32[i] = 0.01F;
    }
    qs_status status = qs_queue_copy(b->queue, (char *)bytes + layout->absmax32_at, absmax32,
                                     (size_t)quanta * sizeof *absmax32);
    status = status == QS_OK ? qs_queue_wait(b->queue) : status;
    free(absmax32);
    st->unit.base = bytes;
    return status;
}

static qs_status open_unit(bench *b, void *ctx)
{
    const op_case *c = ctx;
    state *st = c->st;
    return b->ops->unit_open(b->queue, &st->unit, st->w, c->plain ? NULL : st->lora, N_LINEARS);
}

static double layer_weights(const state *st)
{
    double sum = 0;
    for (int i = 0; i < N_LINEARS; i++) {
        sum += (double)st->w[i].out * (double)st->w[i].in;
    }
    return sum;
}

static const double NF4_BYTES = 0.5 + 1.0 / 64 + 4.0 / 16384;

static qs_status bench_decode(state *st)
{
    char shape[NAME_BYTES];
    op_case c = {.st = st};
    const double bytes = layer_weights(st) * (NF4_BYTES + 2);
    (void)snprintf(shape, sizeof shape, "%.1f M weights of a layer", layer_weights(st) * 1e-6);
    return bench_row(st->b, "unit_open", shape, BENCH_COPY, bytes, open_unit, &c,
                     &st->unit_seconds);
}

/* ---- quantize ---- */

static qs_status quantize_blocks(bench *b, void *ctx)
{
    op_case *c = ctx;
    return b->ops->nf4_quantize_blocks(b->queue, c->x.data, c->x.dtype, c->count, c->a, c->c, c->d);
}

static qs_status quantize_absmax(bench *b, void *ctx)
{
    op_case *c = ctx;
    return b->ops->nf4_quantize_absmax(b->queue, c->c, c->count / QS_NF4_BLOCK, 0.5F, c->e, c->f);
}

static qs_status bench_quantize(state *st)
{
    bench *b = st->b;
    op_case c = {.st = st, .count = st->s.ffn * st->s.hidden};
    const int64_t blocks = c.count / QS_NF4_BLOCK;
    char shape[NAME_BYTES];
    QS_TRY(bench_mat(b, &c.x, st->s.ffn, st->s.hidden, 0));
    QS_TRY(bench_zeros(b, &c.a, (size_t)c.count / 2));
    QS_TRY(bench_zeros(b, &c.c, (size_t)blocks * sizeof(float)));
    QS_TRY(bench_zeros(b, &c.d, sizeof(int64_t)));
    QS_TRY(bench_zeros(b, &c.e, (size_t)blocks));
    QS_TRY(bench_zeros(b, &c.f, (size_t)qs_nf4_quanta(c.count) * sizeof(float)));
    (void)snprintf(shape, sizeof shape, "%lld x %lld", (long long)st->s.ffn,
                   (long long)st->s.hidden);
    QS_TRY(bench_row(b, "nf4_quantize_blocks", shape, BENCH_COPY,
                     (double)c.count * (2 + 0.5 + 4.0 / 64), quantize_blocks, &c, NULL));
    return bench_row(b, "nf4_quantize_absmax", shape, BENCH_COPY, (double)blocks * (4 + 1),
                     quantize_absmax, &c, NULL);
}

/* ---- linears ---- */

static qs_status linear_forward(bench *b, void *ctx)
{
    op_case *c = ctx;
    return b->ops->linear_lora_forward(b->queue, &c->st->unit, &c->st->w[c->i], NULL, NULL,
                                       &c->st->lora[c->i], &c->x, &c->xa, &c->y);
}

static qs_status linear_backward(bench *b, void *ctx)
{
    op_case *c = ctx;
    return b->ops->linear_lora_backward(b->queue, &c->st->unit, &c->st->w[c->i], &c->st->lora[c->i],
                                        &c->x, &c->xa, &c->y, &c->work, c->a, c->c, &c->dx, false);
}

static qs_status plain_forward(bench *b, void *ctx)
{
    op_case *c = ctx;
    return b->ops->linear_forward(b->queue, &c->st->unit, &c->st->w[c->i], NULL, &c->x, &c->y);
}

/* FLOPs: the frozen product 2 out in T either way; LoRA's 2 r (in + out) T forward, 4 backward. */
static qs_status bench_linear(state *st, int i)
{
    bench *b = st->b;
    const int64_t rank = st->s.lora_rank, border = b->ops->border(st->s.lora_rank);
    const qs_weight *w = &st->w[i];
    op_case c = {.st = st, .i = i};
    char shape[NAME_BYTES], name[NAME_BYTES];
    QS_TRY(bench_mat(b, &c.x, st->tokens, w->in, border));
    QS_TRY(bench_mat(b, &c.y, st->tokens, w->out, border));
    QS_TRY(bench_mat(b, &c.dx, st->tokens, w->in, border));
    QS_TRY(bench_mat(b, &c.xa, st->tokens, rank, 0));
    QS_TRY(bench_mat(b, &c.work, st->tokens, rank, 0));
    QS_TRY(bench_zeros(b, &c.a, (size_t)(rank * w->in) * sizeof(float)));
    QS_TRY(bench_zeros(b, &c.c, (size_t)(rank * w->out) * sizeof(float)));
    const double frozen = 2.0 * (double)st->tokens * (double)w->out * (double)w->in;
    const double lora = 2.0 * (double)st->tokens * (double)rank * (double)(w->in + w->out);
    (void)snprintf(shape, sizeof shape, "T %lld, %lld x %lld", (long long)st->tokens,
                   (long long)w->out, (long long)w->in);
    if (i == 0 || i == 1 || i == 4 || i == 6) { /* the product alone, once a shape */
        (void)snprintf(name, sizeof name, "linear %s", linear_names[i]);
        QS_TRY(bench_row(b, name, shape, BENCH_MATMUL, frozen, plain_forward, &c, NULL));
    }
    (void)snprintf(name, sizeof name, "lora fwd %s", linear_names[i]);
    QS_TRY(bench_row(b, name, shape, BENCH_MATMUL, frozen + lora, linear_forward, &c,
                     &st->times.linear[i][0]));
    (void)snprintf(name, sizeof name, "lora bwd %s", linear_names[i]);
    return bench_row(b, name, shape, BENCH_MATMUL, frozen + 2 * lora, linear_backward, &c,
                     &st->times.linear[i][1]);
}

/* ---- attention ---- */

static qs_status attention_forward(bench *b, void *ctx)
{
    op_case *c = ctx;
    return b->ops->attention_forward(b->queue, &c->attention, &c->x, &c->y, &c->z, &c->u, c->a);
}

static qs_status attention_backward(bench *b, void *ctx)
{
    op_case *c = ctx;
    qs_mat dk = c->y, dv = c->z;
    dk.data = c->d;
    dv.data = c->e;
    return b->ops->attention_backward(b->queue, &c->attention, &c->x, &c->y, &c->z, &c->u, c->a,
                                      &c->v, c->c, &c->dx, &dk, &dv);
}

/* One document. FLOPs: 2 T^2 hq forward, 2.5 times that backward (which recomputes the scores). */
static qs_status bench_attention(state *st)
{
    bench *b = st->b;
    const int64_t t = st->tokens, hq = (int64_t)st->s.n_heads * st->s.head_dim;
    const int32_t cu[2] = {0, (int32_t)t};
    op_case c = {.st = st};
    void *cu_seqlens = NULL;
    char shape[NAME_BYTES];
    QS_TRY(bench_mat(b, &c.x, t, hq, 0));
    QS_TRY(bench_mat(b, &c.y, t, st->s.kv, 0));
    QS_TRY(bench_mat(b, &c.z, t, st->s.kv, 0));
    QS_TRY(bench_mat(b, &c.u, t, hq, 0));
    QS_TRY(bench_mat(b, &c.v, t, hq, 0));
    QS_TRY(bench_mat(b, &c.dx, t, hq, 0));
    QS_TRY(bench_zeros(b, &c.a, (size_t)(t * st->s.n_heads) * sizeof(float)));
    QS_TRY(bench_zeros(b, &c.c, (size_t)(t * st->s.n_heads) * sizeof(float)));
    QS_TRY(bench_zeros(b, &c.d, (size_t)(t * st->s.kv) * sizeof(float)));
    QS_TRY(bench_zeros(b, &c.e, (size_t)(t * st->s.kv) * sizeof(float)));
    QS_TRY(bench_upload(b, &cu_seqlens, cu, sizeof cu));
    c.attention = (qs_attention_shape){.n_heads = st->s.n_heads,
                                       .n_kv_heads = st->s.n_kv_heads,
                                       .head_dim = st->s.head_dim,
                                       .scale = 0.0884F,
                                       .cu_seqlens = cu_seqlens,
                                       .n_docs = 1,
                                       .longest = t};
    const double flops = 2.0 * (double)t * (double)t * (double)hq;
    (void)snprintf(shape, sizeof shape, "T %lld, %d / %d heads of %d", (long long)t, st->s.n_heads,
                   st->s.n_kv_heads, st->s.head_dim);
    QS_TRY(bench_row(b, "attention fwd", shape, BENCH_MATMUL, flops, attention_forward, &c,
                     &st->times.attention[0]));
    return bench_row(b, "attention bwd", shape, BENCH_MATMUL, 2.5 * flops, attention_backward, &c,
                     &st->times.attention[1]);
}

/* ---- head ---- */

static qs_status head_chunk(bench *b, void *ctx)
{
    op_case *c = ctx;
    return b->ops->head_chunk(b->queue, &c->unit, &c->w, 0, &c->head);
}

static qs_status head_finish(bench *b, void *ctx)
{
    op_case *c = ctx;
    return b->ops->head_finish(b->queue, &c->head, 1e-4F, c->e, c->dx.data);
}

static qs_status bench_head(state *st)
{
    bench *b = st->b;
    const int64_t rows = st->tokens, h = st->s.hidden, chunk = st->s.head_rows;
    op_case c = {.st = st};
    char shape[NAME_BYTES];
    void *bytes = NULL, *target = NULL;
    const qs_unit_size size = {
        0, (chunk * h + QS_NF4_QUANTUM - 1) / QS_NF4_QUANTUM, QS_NF4_QUANTUM, QS_BF16, 256, 1};
    c.unit = (qs_unit_view){.layout = qs_unit_layout_make(&size, 1)};
    QS_TRY(bench_random(b, &bytes, QS_BF16, (int64_t)c.unit.layout.message_bytes / 2));
    c.unit.base = bytes;
    c.w = (qs_weight){QS_WEIGHT_RAW, chunk, h, 0, QS_BF16, NULL, 0};
    QS_TRY(bench_mat(b, &c.x, rows, h, 0));
    QS_TRY(bench_mat(b, &c.dx, rows, h, 0));
    QS_TRY(bench_zeros(b, &target, (size_t)rows * sizeof(int32_t)));
    QS_TRY(bench_zeros(b, &c.a, (size_t)rows * 3 * sizeof(float)));
    QS_TRY(bench_zeros(b, &c.c, (size_t)(rows * h) * sizeof(float)));
    QS_TRY(bench_zeros(b, &c.d, (size_t)(rows * h) * sizeof(float)));
    QS_TRY(bench_zeros(b, &c.e, (size_t)rows * sizeof(float)));
    float *state_rows = c.a;
    c.head = (qs_head_state){.rows = rows,
                             .hidden = h,
                             .x = c.x.data,
                             .target = target,
                             .max = state_rows,
                             .sum = state_rows + rows,
                             .target_logit = state_rows + 2 * rows,
                             .o = c.c,
                             .w_target = c.d};
    (void)snprintf(shape, sizeof shape, "%lld rows, %lld x %lld", (long long)rows, (long long)chunk,
                   (long long)h);
    QS_TRY(bench_row(b, "head_chunk", shape, BENCH_MATMUL,
                     4.0 * (double)rows * (double)chunk * (double)h, head_chunk, &c,
                     &st->times.head_chunk));
    return bench_row(b, "head_finish", shape, BENCH_COPY, (double)rows * (double)h * (4 + 4 + 2),
                     head_finish, &c, &st->times.head_finish);
}

/* ---- rows ---- */

static qs_status rmsnorm_forward(bench *b, void *ctx)
{
    op_case *c = ctx;
    return b->ops->rmsnorm_forward(b->queue, &c->x, c->a, 1e-5F, c->c, &c->y);
}

static qs_status rmsnorm_backward(bench *b, void *ctx)
{
    op_case *c = ctx;
    return b->ops->rmsnorm_backward(b->queue, &c->y, &c->x, c->a, c->c, &c->dx);
}

static qs_status rope(bench *b, void *ctx)
{
    op_case *c = ctx;
    return b->ops->rope(b->queue, &c->x, c->st->s.n_heads, c->st->s.head_dim, c->st->s.head_dim,
                        c->d, c->e, c->f, false);
}

static qs_status add(bench *b, void *ctx)
{
    op_case *c = ctx;
    return b->ops->add(b->queue, &c->x, &c->y);
}

static qs_status gather_rows(bench *b, void *ctx)
{
    op_case *c = ctx;
    return b->ops->gather_rows(b->queue, &c->x, c->f, &c->y);
}

static qs_status swiglu_forward(bench *b, void *ctx)
{
    op_case *c = ctx;
    return b->ops->glu_forward(b->queue, QS_GLU_SILU, &c->x, &c->y, &c->z);
}

static qs_status swiglu_backward(bench *b, void *ctx)
{
    op_case *c = ctx;
    return b->ops->glu_backward(b->queue, QS_GLU_SILU, &c->x, &c->y, &c->z, &c->u, &c->v);
}

static qs_status positions(bench *b, void **out, int64_t count)
{
    int32_t *host = malloc((size_t)count * sizeof *host);
    if (host == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "no memory for positions");
    }
    for (int64_t i = 0; i < count; i++) {
        host[i] = (int32_t)i;
    }
    const qs_status st = bench_upload(b, out, host, (size_t)count * sizeof *host);
    free(host);
    return st;
}

static qs_status bench_hidden_rows(state *st)
{
    bench *b = st->b;
    const int64_t t = st->tokens, h = st->s.hidden;
    op_case c = {.st = st};
    char shape[NAME_BYTES];
    const double matrix = (double)t * (double)h * 2;
    QS_TRY(bench_mat(b, &c.x, t, h, 0));
    QS_TRY(bench_mat(b, &c.y, t, h, 0));
    QS_TRY(bench_mat(b, &c.dx, t, h, 0));
    QS_TRY(bench_random(b, &c.a, QS_F32, h));
    QS_TRY(bench_zeros(b, &c.c, (size_t)t * sizeof(float)));
    QS_TRY(bench_random(b, &c.d, QS_F32, t * st->s.head_dim / 2));
    QS_TRY(bench_random(b, &c.e, QS_F32, t * st->s.head_dim / 2));
    QS_TRY(positions(b, &c.f, t));
    (void)snprintf(shape, sizeof shape, "T %lld x %lld", (long long)t, (long long)h);
    QS_TRY(bench_row(b, "rmsnorm fwd", shape, BENCH_COPY, 2 * matrix, rmsnorm_forward, &c,
                     &st->times.rmsnorm[0]));
    QS_TRY(bench_row(b, "rmsnorm bwd", shape, BENCH_COPY, 4 * matrix, rmsnorm_backward, &c,
                     &st->times.rmsnorm[1]));
    QS_TRY(bench_row(b, "rope", shape, BENCH_COPY, 2 * matrix, rope, &c, &st->times.rope));
    QS_TRY(bench_row(b, "add", shape, BENCH_COPY, 3 * matrix, add, &c, NULL));
    return bench_row(b, "gather_rows", shape, BENCH_COPY, 2 * matrix, gather_rows, &c, NULL);
}

static qs_status bench_swiglu(state *st)
{
    bench *b = st->b;
    const int64_t t = st->tokens, f = st->s.ffn;
    op_case c = {.st = st};
    char shape[NAME_BYTES];
    const double matrix = (double)t * (double)f * 2;
    QS_TRY(bench_mat(b, &c.x, t, f, 0));
    QS_TRY(bench_mat(b, &c.y, t, f, 0));
    QS_TRY(bench_mat(b, &c.z, t, f, 0));
    QS_TRY(bench_mat(b, &c.u, t, f, 0));
    QS_TRY(bench_mat(b, &c.v, t, f, 0));
    (void)snprintf(shape, sizeof shape, "T %lld x %lld", (long long)t, (long long)f);
    QS_TRY(bench_row(b, "swiglu fwd", shape, BENCH_COPY, 3 * matrix, swiglu_forward, &c,
                     &st->times.swiglu[0]));
    return bench_row(b, "swiglu bwd", shape, BENCH_COPY, 5 * matrix, swiglu_backward, &c,
                     &st->times.swiglu[1]);
}

/* ---- the optimizer ---- */

static qs_status adamw(bench *b, void *ctx)
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

static qs_status square_sums(bench *b, void *ctx)
{
    op_case *c = ctx;
    return b->ops->square_sums(b->queue, c->a, c->count / 4096, c->f);
}

static qs_status accumulate(bench *b, void *ctx)
{
    op_case *c = ctx;
    return b->ops->accumulate(b->queue, c->d, c->a, c->count);
}

static qs_status convert(bench *b, void *ctx)
{
    op_case *c = ctx;
    return b->ops->convert(b->queue, c->a, c->count, c->x.data);
}

static qs_status bench_optimizer(state *st)
{
    bench *b = st->b;
    op_case c = {.st = st};
    char shape[NAME_BYTES];
    for (int i = 0; i < N_LINEARS; i++) {
        c.count += st->s.n_layers * st->s.lora_rank * (st->w[i].in + st->w[i].out);
    }
    c.count -= c.count % 4096;
    QS_TRY(bench_random(b, &c.a, QS_F32, c.count));
    QS_TRY(bench_random(b, &c.c, QS_F32, c.count));
    QS_TRY(bench_zeros(b, &c.d, (size_t)c.count * sizeof(float)));
    QS_TRY(bench_zeros(b, &c.e, (size_t)c.count * sizeof(float)));
    QS_TRY(bench_zeros(b, &c.f, (size_t)(c.count / 4096) * sizeof(double)));
    QS_TRY(bench_mat(b, &c.x, 1, c.count, 0));
    (void)snprintf(shape, sizeof shape, "%.1f M LoRA weights", (double)c.count * 1e-6);
    QS_TRY(bench_row(b, "adamw", shape, BENCH_COPY, 28.0 * (double)c.count, adamw, &c, NULL));
    QS_TRY(bench_row(b, "square_sums", shape, BENCH_COPY, 4.0 * (double)c.count, square_sums, &c,
                     NULL));
    QS_TRY(bench_row(b, "accumulate", shape, BENCH_COPY, 12.0 * (double)c.count, accumulate, &c,
                     NULL));
    return bench_row(b, "convert", shape, BENCH_COPY, 6.0 * (double)c.count, convert, &c, NULL);
}

/* ---- a step, added up ---- */

/* Llama's FLOPs a token: 4 P + 4 h V + 6 T hq L + 6 r (in + out) L. */
static double model_flops(const state *st)
{
    const model_shape *s = &st->s;
    const double layers = s->n_layers, hq = (double)s->n_heads * s->head_dim;
    double sides = 0;
    for (int i = 0; i < N_LINEARS; i++) {
        sides += (double)(st->w[i].in + st->w[i].out);
    }
    return 4 * layer_weights(st) * layers + 4.0 * (double)s->hidden * (double)s->vocab +
           6.0 * (double)st->tokens * hq * layers + 6.0 * s->lora_rank * sides * layers;
}

static void print_sum(const state *st)
{
    const layer_times *t = &st->times;
    const double layers = st->s.n_layers;
    double forward = 2 * t->rmsnorm[0] + 1.25 * t->rope + t->attention[0] + t->swiglu[0];
    double backward = 2 * t->rmsnorm[1] + 1.25 * t->rope + t->attention[1] + t->swiglu[1];
    for (int i = 0; i < N_LINEARS; i++) {
        forward += t->linear[i][0];
        backward += t->linear[i][1];
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
        const double share = 100 * flops / seconds[i] / st->b->matmul_rate;
        const char *what = i == 0 ? "without recompute" : "with full recompute";
        printf("                       %-22s %10.2f ms %9.0f tokens/s, model FLOPs at %.1f %% of "
               "matmul\n",
               what, seconds[i] * 1e3, (double)st->tokens / seconds[i], share);
        if (st->b->csv != NULL) {
            (void)fprintf(st->b->csv, "sum %s,T %lld,%.6f,%.2f,tokens/s,%.2f,matmul\n", what,
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
    return limits;
}

typedef qs_status (*group)(state *st);

/* The layer stays; what a group took goes after it. */
static qs_status run_group(state *st, group g)
{
    QS_TRY(make_layer(st));
    op_case c = {.st = st};
    QS_TRY(open_unit(st->b, &c));
    QS_TRY(g(st));
    QS_TRY(qs_queue_wait(st->b->queue));
    st->b->ops->unit_close(st->b->queue);
    bench_free_all(st->b);
    return QS_OK;
}

static qs_status bench_linears(state *st)
{
    for (int i = 0; i < N_LINEARS; i++) {
        QS_TRY(bench_linear(st, i));
    }
    return QS_OK;
}

static qs_status run(bench *b, const int64_t *tokens, int n_tokens)
{
    static const group once[] = {bench_decode, bench_quantize, bench_optimizer};
    static const group each[] = {bench_hidden_rows, bench_swiglu, bench_linears, bench_attention,
                                 bench_head};
    state st = {.b = b, .s = b->small ? tiny : llama8};
    int64_t most = 0;
    for (int i = 0; i < n_tokens; i++) {
        most = tokens[i] > most ? tokens[i] : most;
    }
    const qs_ops_limits limits = limits_of(&st.s, most);
    QS_TRY(b->ops->open(b->queue, &limits));
    QS_TRY(bench_ceilings(b));
    for (size_t i = 0; i < sizeof once / sizeof *once; i++) {
        QS_TRY(run_group(&st, once[i]));
    }
    for (int t = 0; t < n_tokens; t++) {
        st.tokens = tokens[t];
        for (size_t i = 0; i < sizeof each / sizeof *each; i++) {
            QS_TRY(run_group(&st, each[i]));
        }
        print_sum(&st);
    }
    return QS_OK;
}

int main(int argc, char **argv)
{
    const char *plugin = NULL, *csv = NULL;
    int64_t tokens[TOKENS_MAX];
    int n_tokens = 0;
    bool small = false, usage = false;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--small") == 0) {
            small = true;
        } else if (strcmp(argv[i], "--csv") == 0 && i + 1 < argc) {
            csv = argv[++i];
        } else if (strcmp(argv[i], "--tokens") == 0 && i + 1 < argc && n_tokens < TOKENS_MAX) {
            tokens[n_tokens] = strtoll(argv[++i], NULL, 10);
            usage = usage || tokens[n_tokens++] < 1;
        } else if (plugin == NULL && argv[i][0] != '-') {
            plugin = argv[i];
        } else {
            usage = true;
        }
    }
    if (plugin == NULL || usage) {
        (void)fprintf(stderr, "usage: bench_ops PLUGIN [--small] [--csv FILE] [--tokens T]...\n");
        return 2;
    }
    if (n_tokens == 0) {
        const int64_t usual[] = {512, 4096, 16384};
        n_tokens = small ? 1 : 3;
        memcpy(tokens, usual, sizeof usual);
        tokens[0] = small ? 48 : tokens[0];
    }
    bench b;
    qs_status st = bench_open(&b, plugin, small, csv);
    st = st == QS_OK ? run(&b, tokens, n_tokens) : st;
    if (st != QS_OK) {
        qs_error_print(st);
    }
    bench_close(&b);
    return qs_exit_code(st);
}
