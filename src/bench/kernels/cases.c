#include "bench/kernels/cases.h"

#include <math.h>
#include <stdlib.h>

#include "base/dtype.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/ops_impl.h"
#include "kernels/cpu/parallel.h"
#include "quant/nf4.h"

/* ---- a unit ---- */

/* The scales of the second level must be numbers: random bytes are not. */
static qs_status fill_absmax32(qs_bench *b, const qs_unit_layout *layout, void *bytes,
                               int64_t quanta)
{
    float *absmax32 = malloc((size_t)quanta * sizeof *absmax32);
    if (absmax32 == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "no memory for %lld floats", (long long)quanta);
    }
    for (int64_t i = 0; i < quanta; i++) {
        absmax32[i] = 0.01F;
    }
    qs_status st = qs_queue_copy(b->queue, (char *)bytes + layout->absmax32_at, absmax32,
                                 (size_t)quanta * sizeof *absmax32);
    st = st == QS_OK ? qs_queue_wait(b->queue) : st;
    free(absmax32);
    return st;
}

static qs_status make_adapter(qs_bench *b, qs_lora *lora, int rank, int64_t out, int64_t in)
{
    void *a = NULL, *bb = NULL;
    QS_TRY(qs_bench_random(b, &a, b->ops->act_dtype, rank * in));
    QS_TRY(qs_bench_random(b, &bb, b->ops->act_dtype, rank * out));
    *lora = (qs_lora){.a = a, .b = bb, .rank = rank, .scale = 2.0F};
    return QS_OK;
}

qs_status qs_bench_unit_make(qs_bench *b, qs_bench_unit *u, int count, const int64_t *out,
                             const int64_t *in, int lora_rank)
{
    int64_t quanta = 0;
    void *bytes = NULL, *map = NULL;
    *u = (qs_bench_unit){.count = count, .adapted = lora_rank > 0};
    QS_TRY(qs_bench_upload(b, &map, qs_dynamic_map, 256 * sizeof(float)));
    for (int i = 0; i < count; i++) {
        u->w[i] = (qs_weight){QS_WEIGHT_NF4, out[i], in[i], quanta, QS_BF16, map, 0.02F};
        quanta += qs_nf4_quanta(out[i] * in[i]);
        u->most = out[i] * in[i] > u->most ? out[i] * in[i] : u->most;
        if (u->adapted) {
            QS_TRY(make_adapter(b, &u->lora[i], lora_rank, out[i], in[i]));
        }
    }
    const qs_unit_size size = {quanta, 0, 1, QS_BF16, 256, 1};
    u->view = (qs_unit_view){.layout = qs_unit_layout_make(&size, 1)};
    QS_TRY(qs_bench_random(b, &bytes, QS_U8, (int64_t)u->view.layout.message_bytes));
    u->view.base = bytes;
    return fill_absmax32(b, &u->view.layout, bytes, quanta);
}

double qs_bench_unit_weights(const qs_bench_unit *u)
{
    double sum = 0;
    for (int i = 0; i < u->count; i++) {
        sum += (double)u->w[i].out * (double)u->w[i].in;
    }
    return sum;
}

qs_status qs_bench_unit_open(qs_bench *b, void *unit)
{
    const qs_bench_unit *u = unit;
    return b->ops->unit_open(b->queue, &u->view, u->w, u->adapted ? u->lora : NULL, u->count, 0,
                             false);
}

qs_status qs_bench_unit_decode_make(qs_bench *b, qs_bench_unit *u)
{
    void *out = NULL;
    if (b->plugin == NULL) {
        QS_TRY(qs_bench_zeros(b, &out, (size_t)u->most * sizeof(float)));
        u->out = out;
    }
    return QS_OK;
}

typedef struct {
    const qs_bench_unit *u;
    const qs_weight *w;
    int64_t count;
    const qs_pairs *pairs; /* of bf16 products; NULL: floats */
} decode_args;

static void decode_quantum(void *ctx, int64_t index, int thread)
{
    (void)thread;
    const decode_args *args = ctx;
    const int64_t first = index * QS_NF4_QUANTUM;
    const int64_t count = qs_min_i64(QS_NF4_QUANTUM, args->count - first);
    if (args->pairs != NULL) {
        qs_weight_decode_pairs(args->pairs, &args->u->view, args->w, first, count + count % 2,
                               (uint32_t *)(void *)args->u->out + first / 2);
    } else {
        qs_weight_decode_fast(qs_isa_get(), &args->u->view, args->w, first, count,
                              args->u->out + first);
    }
}

qs_status qs_bench_unit_decode(qs_bench *b, void *unit)
{
    const qs_bench_unit *u = unit;
    if (b->plugin != NULL) {
        return qs_bench_unit_open(b, unit);
    }
    for (int i = 0; i < u->count; i++) {
        decode_args args = {u, &u->w[i], u->w[i].out * u->w[i].in,
                            b->ops == qs_ops_cpu_bf16() ? qs_pairs_get() : NULL};
        qs_parallel_for(b->queue, qs_nf4_quanta(args.count), args.count, decode_quantum, &args);
    }
    return QS_OK;
}

double qs_bench_unit_decode_bytes(const qs_bench *b, const qs_bench_unit *u)
{
    const qs_dtype dtype = b->ops == qs_ops_cpu_bf16() ? QS_BF16 : b->ops->act_dtype;
    const double written = (double)qs_dtype_bytes(dtype);
    return qs_bench_unit_weights(u) * (QS_BENCH_NF4_BYTES + written);
}

/* ---- a product ---- */

qs_status qs_bench_linear_make(qs_bench *b, qs_bench_linear *l, const qs_bench_unit *u, int i,
                               int64_t tokens)
{
    const qs_weight *w = &u->w[i];
    const int64_t rank = u->adapted ? u->lora[i].rank : 0;
    const int64_t border = rank > 0 ? b->ops->border((int)rank) : 0;
    *l = (qs_bench_linear){.unit = u, .w = w};
    QS_TRY(qs_bench_mat(b, &l->x, tokens, w->in, border));
    QS_TRY(qs_bench_mat(b, &l->y, tokens, w->out, border));
    return qs_bench_mat(b, &l->dx, tokens, w->in, border);
}

qs_status qs_bench_linear_forward(qs_bench *b, void *linear)
{
    qs_bench_linear *l = linear;
    return b->ops->linear_forward(b->queue, &l->unit->view, l->w, NULL, &l->x, &l->y);
}

qs_status qs_bench_linear_backward(qs_bench *b, void *linear)
{
    qs_bench_linear *l = linear;
    return b->ops->linear_backward(b->queue, &l->unit->view, l->w, &l->y, &l->dx, false);
}

qs_status qs_bench_dense_make(qs_bench *b, qs_bench_linear *l)
{
    return qs_bench_random(b, &l->dense, b->ops->act_dtype, l->w->out * l->w->in);
}

qs_status qs_bench_dense(qs_bench *b, void *linear)
{
    const qs_bench_linear *l = linear;
    if (b->plugin == NULL) {
        const qs_operand left = {.data = l->x.data, .stride = l->x.stride};
        const qs_operand right = {.data = l->dense, .stride = l->w->in, .transposed = true};
        return qs_gemm(b->queue, l->x.rows, l->w->out, l->w->in, &left, &right, l->y.data,
                       l->y.stride, false);
    }
    const qs_gemm_call call = {.m = l->x.rows,
                               .n = l->w->out,
                               .k = l->w->in,
                               .alpha = 1.0F,
                               .a = l->x.data,
                               .b = l->dense,
                               .a_stride = l->x.stride,
                               .b_stride = l->w->in,
                               .b_transposed = true,
                               .c = l->y.data,
                               .c_stride = l->y.stride,
                               .c_dtype = QS_BF16};
    return b->plugin->gemm(b->queue, &call);
}

double qs_bench_linear_flops(const qs_bench_linear *l)
{
    return 2.0 * (double)l->x.rows * (double)l->w->out * (double)l->w->in;
}

/* ---- joined ---- */

static qs_status joined_adapter(qs_bench *b, qs_joined_linear *l, const qs_lora *lora,
                                int64_t tokens)
{
    void *da = NULL, *db = NULL;
    l->lora = *lora;
    QS_TRY(qs_bench_mat(b, &l->xa, tokens, lora->rank, 0));
    QS_TRY(qs_bench_mat(b, &l->work, tokens, lora->rank, 0));
    QS_TRY(qs_bench_zeros(b, &da, (size_t)(lora->rank * l->w->in) * sizeof(float)));
    QS_TRY(qs_bench_zeros(b, &db, (size_t)(lora->rank * l->w->out) * sizeof(float)));
    l->da = da;
    l->db = db;
    return QS_OK;
}

qs_status qs_bench_joined_make(qs_bench *b, qs_bench_joined *j, const qs_bench_unit *u, int first,
                               int count, int64_t tokens)
{
    const int64_t in = u->w[first].in;
    const int64_t border = u->adapted ? count * b->ops->border(u->lora[first].rank) : 0;
    int64_t out = 0, col = 0;
    *j = (qs_bench_joined){.unit = u, .count = count};
    for (int i = 0; i < count; i++) {
        out += u->w[first + i].out;
    }
    QS_TRY(qs_bench_mat(b, &j->x, tokens, in, border));
    QS_TRY(qs_bench_mat(b, &j->y, tokens, out, border));
    QS_TRY(qs_bench_mat(b, &j->dx, tokens, in, border));
    for (int i = 0; i < count; i++) {
        qs_joined_linear *l = &j->linear[i];
        l->w = &u->w[first + i];
        l->y = j->y;
        l->y.data = (char *)j->y.data + (size_t)col * qs_dtype_bytes(j->y.dtype);
        l->y.cols = l->w->out;
        col += l->w->out;
        if (u->adapted) {
            QS_TRY(joined_adapter(b, l, &u->lora[first + i], tokens));
        }
    }
    return QS_OK;
}

qs_status qs_bench_joined_forward(qs_bench *b, void *joined)
{
    const qs_bench_joined *j = joined;
    return b->ops->linears_lora_forward(b->queue, &j->unit->view, j->linear, j->count, &j->x);
}

qs_status qs_bench_joined_backward(qs_bench *b, void *joined)
{
    qs_bench_joined *j = joined;
    return b->ops->linears_lora_backward(b->queue, &j->unit->view, j->linear, j->count, &j->x,
                                         &j->dx, false);
}

double qs_bench_joined_flops(const qs_bench_joined *j)
{
    return 2.0 * (double)j->x.rows * (double)j->y.cols * (double)j->x.cols;
}

double qs_bench_joined_lora_flops(const qs_bench_joined *j)
{
    double sum = 0;
    for (int i = 0; i < j->count; i++) {
        const qs_joined_linear *l = &j->linear[i];
        sum += 2.0 * (double)j->x.rows * (double)l->lora.rank * (double)(l->w->in + l->w->out);
    }
    return sum;
}

/* ---- attention ---- */

qs_status qs_bench_attention_make(qs_bench *b, qs_bench_attention *a, int64_t tokens, int n_heads,
                                  int n_kv_heads, int head_dim)
{
    const int64_t wide = (int64_t)n_heads * head_dim, narrow = (int64_t)n_kv_heads * head_dim;
    const int32_t cu[2] = {0, (int32_t)tokens};
    const size_t per_head = (size_t)(tokens * n_heads) * sizeof(float);
    void *cu_seqlens = NULL, *lse = NULL, *delta = NULL;
    *a = (qs_bench_attention){.tokens = tokens};
    qs_mat *const mats[] = {&a->q, &a->o, &a->d_o, &a->dq, &a->k, &a->v, &a->dk, &a->dv};
    for (int i = 0; i < 8; i++) {
        QS_TRY(qs_bench_mat(b, mats[i], tokens, i < 4 ? wide : narrow, 0));
    }
    QS_TRY(qs_bench_zeros(b, &lse, per_head));
    QS_TRY(qs_bench_zeros(b, &delta, per_head));
    QS_TRY(qs_bench_upload(b, &cu_seqlens, cu, sizeof cu));
    a->lse = lse;
    a->delta = delta;
    a->shape = (qs_attention_shape){.n_heads = n_heads,
                                    .n_kv_heads = n_kv_heads,
                                    .head_dim = head_dim,
                                    .scale = 1.0F / sqrtf((float)head_dim),
                                    .cu_seqlens = cu_seqlens,
                                    .n_docs = 1,
                                    .longest = tokens};
    return QS_OK;
}

qs_status qs_bench_attention_forward(qs_bench *b, void *attention)
{
    qs_bench_attention *a = attention;
    return b->ops->attention_forward(b->queue, &a->shape, &a->q, &a->k, &a->v, &a->o, a->lse);
}

qs_status qs_bench_attention_backward(qs_bench *b, void *attention)
{
    qs_bench_attention *a = attention;
    return b->ops->attention_backward(b->queue, &a->shape, &a->q, &a->k, &a->v, &a->o, a->lse,
                                      &a->d_o, a->delta, &a->dq, &a->dk, &a->dv);
}

double qs_bench_attention_flops(const qs_bench_attention *a, bool backward)
{
    const double wide = (double)a->shape.n_heads * a->shape.head_dim;
    return (backward ? 5.0 : 2.0) * (double)a->tokens * (double)a->tokens * wide;
}

/* ---- head ---- */

qs_status qs_bench_head_make(qs_bench *b, qs_bench_head *h, int64_t rows, int64_t chunk,
                             int64_t hidden)
{
    qs_mat x, dx;
    void *bytes = NULL, *target = NULL, *state = NULL, *o = NULL, *w_target = NULL, *loss = NULL;
    const int64_t quanta = (chunk * hidden + QS_NF4_QUANTUM - 1) / QS_NF4_QUANTUM;
    const size_t row_floats = (size_t)(rows * hidden) * sizeof(float);
    const qs_unit_size size = {0, quanta, QS_NF4_QUANTUM, QS_BF16, 256, 1};
    *h = (qs_bench_head){.view = {.layout = qs_unit_layout_make(&size, 1)},
                         .w = {QS_WEIGHT_RAW, chunk, hidden, 0, QS_BF16, NULL, 0}};
    QS_TRY(qs_bench_random(b, &bytes, QS_BF16, (int64_t)h->view.layout.message_bytes / 2));
    h->view.base = bytes;
    QS_TRY(qs_bench_mat(b, &x, rows, hidden, 0));
    QS_TRY(qs_bench_mat(b, &dx, rows, hidden, 0));
    QS_TRY(qs_bench_zeros(b, &target, (size_t)rows * sizeof(int32_t)));
    QS_TRY(qs_bench_zeros(b, &state, 3 * (size_t)rows * sizeof(float)));
    QS_TRY(qs_bench_zeros(b, &o, row_floats));
    QS_TRY(qs_bench_zeros(b, &w_target, row_floats));
    QS_TRY(qs_bench_zeros(b, &loss, (size_t)rows * sizeof(float)));
    float *per_row = state;
    h->dx = dx.data;
    h->loss = loss;
    h->state = (qs_head_state){.rows = rows,
                               .hidden = hidden,
                               .x = x.data,
                               .target = target,
                               .max = per_row,
                               .sum = per_row + rows,
                               .target_logit = per_row + 2 * rows,
                               .o = o,
                               .w_target = w_target};
    return QS_OK;
}

qs_status qs_bench_head_chunk(qs_bench *b, void *head)
{
    qs_bench_head *h = head;
    return b->ops->head_chunk(b->queue, &h->view, &h->w, 0, &h->state);
}

qs_status qs_bench_head_finish(qs_bench *b, void *head)
{
    qs_bench_head *h = head;
    return b->ops->head_finish(b->queue, &h->state, 1e-4F, h->loss, h->dx);
}

double qs_bench_head_flops(const qs_bench_head *h)
{
    return 4.0 * (double)h->state.rows * (double)h->w.out * (double)h->w.in;
}
