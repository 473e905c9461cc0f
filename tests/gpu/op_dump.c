/* Inputs and results of the main operations on a device, as files that op_errors.py compares with
 * float64 and with PyTorch's bf16 operations.
 *
 *     op_dump PLUGIN DIR [--small]
 *
 * A file is DIR/OPERATION.NAME.ROWSxCOLS.f32: row-major floats. Inputs are rounded to the device's
 * type first, so that both sides start from the same numbers. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/plugin.h"
#include "quant/nf4.h"

enum { BUFFERS_MAX = 128, PATH_BYTES = 512, JOINED = 3 };

typedef struct {
    const char *dir, *op; /* op: of the files written now */
    bool small;
    qs_device *device;
    const qs_ops *ops;
    qs_queue *queue;
    uint64_t random;
    void *buffers[BUFFERS_MAX];
    int n_buffers;
} dump;

/* ---- files and memory ---- */

static qs_status write_file(const dump *d, const char *name, int64_t rows, int64_t cols,
                            const float *x)
{
    char path[PATH_BYTES];
    (void)snprintf(path, sizeof path, "%s/%s.%s.%lldx%lld.f32", d->dir, d->op, name,
                   (long long)rows, (long long)cols);
    FILE *file = fopen(path, "wb");
    const size_t count = (size_t)(rows * cols);
    const bool written = file != NULL && fwrite(x, sizeof *x, count, file) == count;
    if (file == NULL || fclose(file) != 0 || !written) {
        return QS_FAIL(QS_ERR_IO, "%s: cannot be written", path);
    }
    return QS_OK;
}

static qs_status take(dump *d, void **out, size_t bytes)
{
    if (d->n_buffers == BUFFERS_MAX) {
        return QS_FAIL(QS_ERR_BUG, "more than %d buffers", BUFFERS_MAX);
    }
    QS_TRY(qs_device_alloc(d->device, out, bytes, QS_MEM_WORK));
    d->buffers[d->n_buffers++] = *out;
    return QS_OK;
}

static void give_back(dump *d)
{
    while (d->n_buffers > 0) {
        qs_device_free(d->device, d->buffers[--d->n_buffers]);
    }
}

static qs_status upload(dump *d, void **out, const void *host, size_t bytes)
{
    QS_TRY(take(d, out, bytes));
    QS_TRY(qs_queue_copy(d->queue, *out, host, bytes));
    return qs_queue_wait(d->queue);
}

static float *floats(int64_t count)
{
    float *x = malloc((size_t)count * sizeof *x + 1);
    if (x == NULL) {
        (void)fprintf(stderr, "op_dump: no memory for %lld floats\n", (long long)count);
        exit(7);
    }
    return x;
}

/* About normal, deviation `scale`: the sum of four uniform numbers. */
static float draw(dump *d, float scale)
{
    float sum = 0;
    for (int i = 0; i < 4; i++) {
        d->random = d->random * 6364136223846793005U + 1442695040888963407U;
        sum += (float)(d->random >> 40) * 0x1p-24F - 0.5F;
    }
    return sum * scale * 1.7320508F;
}

/* A random matrix on the device and in a file; `free_cols` elements lie free behind each row. */
static qs_status input(dump *d, const char *name, qs_dtype dtype, int64_t rows, int64_t cols,
                       int64_t free_cols, float scale, qs_mat *out)
{
    const int64_t stride = cols + free_cols;
    const size_t size = qs_dtype_bytes(dtype);
    float *x = floats(rows * cols);
    char *stored = calloc((size_t)(rows * stride), size);
    qs_status st = QS_OK;
    for (int64_t i = 0; i < rows * cols; i++) {
        x[i] = qs_f32_round(draw(d, scale), d->ops->act_dtype);
    }
    for (int64_t row = 0; stored != NULL && row < rows; row++) {
        qs_f32_store(stored + (size_t)(row * stride) * size, dtype, x + row * cols, cols);
    }
    *out = (qs_mat){NULL, rows, cols, stride, dtype};
    QS_GOTO(write_file(d, name, rows, cols, x));
    QS_GOTO(upload(d, &out->data, stored, (size_t)(rows * stride) * size));
done:
    free(x);
    free(stored);
    return st;
}

static qs_status act_input(dump *d, const char *name, int64_t rows, int64_t cols, qs_mat *out)
{
    return input(d, name, d->ops->act_dtype, rows, cols, 0, 1.0F, out);
}

static qs_status empty(dump *d, qs_dtype dtype, int64_t rows, int64_t cols, int64_t free_cols,
                       qs_mat *out)
{
    *out = (qs_mat){NULL, rows, cols, cols + free_cols, dtype};
    return take(d, &out->data, (size_t)(rows * out->stride) * qs_dtype_bytes(dtype));
}

static qs_status output(dump *d, const char *name, const qs_mat *mat)
{
    const size_t size = qs_dtype_bytes(mat->dtype),
                 bytes = (size_t)(mat->rows * mat->stride) * size;
    char *stored = malloc(bytes + 1);
    float *x = floats(mat->rows * mat->cols);
    qs_status st = QS_OK;
    QS_GOTO(qs_queue_copy(d->queue, stored, mat->data, bytes));
    QS_GOTO(qs_queue_wait(d->queue));
    for (int64_t row = 0; row < mat->rows; row++) {
        qs_f32_load(x + row * mat->cols, stored + (size_t)(row * mat->stride) * size, mat->dtype,
                    mat->cols);
    }
    QS_GOTO(write_file(d, name, mat->rows, mat->cols, x));
done:
    free(stored);
    free(x);
    return st;
}

/* ---- weights ---- */

/* A unit of one tensor: random codes with double quantization, or a random matrix of 16 bits. */
static qs_status weight(dump *d, const char *name, qs_weight_kind kind, int64_t out, int64_t in,
                        qs_unit_view *view, qs_weight *w)
{
    qs_status st = QS_OK;
    const int64_t quanta = qs_nf4_quanta(out * in);
    const bool nf4 = kind == QS_WEIGHT_NF4;
    const qs_unit_size size = {nf4 ? quanta : 0, nf4 ? 0 : quanta, QS_NF4_QUANTUM, QS_BF16, 256, 1};
    qs_unit_view host = {.layout = qs_unit_layout_make(&size, 1)};
    const qs_unit_layout *layout = &host.layout;
    uint8_t *bytes = calloc(1, layout->message_bytes);
    float *plain = floats(out * in);
    void *map = NULL, *base = NULL;
    for (int64_t i = 0; nf4 && i < quanta * QS_NF4_QUANTUM_PACKED_BYTES; i++) {
        bytes[layout->packed_at + (size_t)i] = (uint8_t)(d->random >> 56);
        (void)draw(d, 1);
    }
    for (int64_t i = 0; nf4 && i < quanta * QS_NF4_QUANTUM_BLOCKS; i++) {
        bytes[layout->absmax8_at + (size_t)i] = (uint8_t)(d->random >> 56);
        (void)draw(d, 1);
    }
    for (int64_t i = 0; nf4 && i < quanta; i++) {
        const float scale = 0.02F;
        memcpy(bytes + layout->absmax32_at + (size_t)i * sizeof scale, &scale, sizeof scale);
    }
    for (int64_t i = 0; !nf4 && i < out * in; i++) {
        const uint16_t bits = qs_bf16_from_f32(draw(d, 0.05F));
        memcpy(bytes + layout->raw_at + (size_t)i * sizeof bits, &bits, sizeof bits);
    }
    host.base = bytes;
    *w = (qs_weight){kind, out, in, 0, QS_BF16, nf4 ? qs_dynamic_map : NULL, nf4 ? 0.05F : 0.0F};
    qs_weight_decode(&host, w, 0, out * in, plain);
    QS_GOTO(write_file(d, name, out, in, plain));
    QS_GOTO(upload(d, &base, bytes, layout->message_bytes));
    QS_GOTO(upload(d, &map, qs_dynamic_map, 256 * sizeof(float)));
    *view = (qs_unit_view){.layout = host.layout, .base = base};
    w->map = nf4 ? map : NULL;
done:
    free(bytes);
    free(plain);
    return st;
}

/* ---- the operations ---- */

typedef struct {
    const qs_unit_view *unit;
    const qs_weight *w;
    qs_lora lora;
    const qs_mat *x, *dy;
} dora_inputs;

/* The same linear and adapter with magnitudes, on the unit that is open. */
static qs_status dump_dora(dump *d, const dora_inputs *in)
{
    const qs_weight *w = in->w;
    const int64_t t = in->x->rows, rank = in->lora.rank;
    const qs_dtype act = d->ops->act_dtype;
    qs_lora lora = in->lora;
    qs_mat m, norm, gain, y, xa, work, dx, da, db, dm;
    d->op = "dora";
    QS_TRY(input(d, "m", QS_F32, 1, w->out, 0, 1.0F, &m));
    QS_TRY(empty(d, QS_F32, 1, w->out, 0, &norm));
    QS_TRY(empty(d, QS_F32, 1, w->out, 0, &gain));
    QS_TRY(empty(d, act, t, w->out, 0, &y));
    QS_TRY(empty(d, act, t, rank, 0, &xa));
    QS_TRY(empty(d, act, t, rank, 0, &work));
    QS_TRY(empty(d, act, t, w->in, 0, &dx));
    QS_TRY(empty(d, QS_F32, rank, w->in, 0, &da));
    QS_TRY(empty(d, QS_F32, w->out, rank, 0, &db));
    QS_TRY(empty(d, QS_F32, 1, w->out, 0, &dm));
    QS_TRY(d->ops->dora_norms(d->queue, in->unit, w, &lora, m.data, norm.data, gain.data));
    QS_TRY(output(d, "norm", &norm));
    lora.norm = norm.data;
    lora.gain = gain.data;
    QS_TRY(d->ops->linear_lora_forward(d->queue, in->unit, w, NULL, NULL, &lora, in->x, &xa, &y));
    QS_TRY(output(d, "y", &y));
    QS_TRY(d->ops->linear_lora_backward(d->queue, in->unit, w, &lora, in->x, &xa, in->dy, &work,
                                        da.data, db.data, &dx, false));
    QS_TRY(d->ops->dora_backward(d->queue, in->unit, w, &lora, in->x, &xa, in->dy, dm.data));
    QS_TRY(output(d, "dx", &dx));
    QS_TRY(output(d, "da", &da));
    QS_TRY(output(d, "db", &db));
    return output(d, "dm", &dm);
}

static qs_status dump_linear(dump *d)
{
    const int64_t t = d->small ? 24 : 512, out = d->small ? 96 : 1024, in = d->small ? 64 : 2048;
    const int rank = 16;
    const float scale = 2.0F;
    const int64_t border = d->ops->border(rank);
    qs_unit_view unit;
    qs_weight w;
    qs_mat x, y, dy, dx, a, b, xa, work, da, db;
    d->op = "linear";
    QS_TRY(weight(d, "w", QS_WEIGHT_NF4, out, in, &unit, &w));
    QS_TRY(input(d, "x", d->ops->act_dtype, t, in, border, 1.0F, &x));
    QS_TRY(input(d, "dy", d->ops->act_dtype, t, out, border, 1.0F, &dy));
    QS_TRY(empty(d, d->ops->act_dtype, t, out, 0, &y));
    QS_TRY(empty(d, d->ops->act_dtype, t, in, 0, &dx));
    QS_TRY(d->ops->linear_forward(d->queue, &unit, &w, NULL, &x, &y));
    QS_TRY(output(d, "y", &y));
    QS_TRY(d->ops->linear_backward(d->queue, &unit, &w, &dy, &dx, false));
    QS_TRY(output(d, "dx", &dx));

    d->op = "lora";
    QS_TRY(input(d, "a", d->ops->act_dtype, rank, in, 0, 0.03F, &a));
    QS_TRY(input(d, "b", d->ops->act_dtype, out, rank, 0, 0.03F, &b));
    QS_TRY(empty(d, d->ops->act_dtype, t, rank, 0, &xa));
    QS_TRY(empty(d, d->ops->act_dtype, t, rank, 0, &work));
    QS_TRY(empty(d, QS_F32, rank, in, 0, &da));
    QS_TRY(empty(d, QS_F32, out, rank, 0, &db));
    const qs_lora lora = {.a = a.data, .b = b.data, .rank = rank, .scale = scale};
    QS_TRY(d->ops->unit_open(d->queue, &unit, &w, &lora, 1, 0, false));
    QS_TRY(d->ops->linear_lora_forward(d->queue, &unit, &w, NULL, NULL, &lora, &x, &xa, &y));
    QS_TRY(output(d, "y", &y));
    QS_TRY(d->ops->linear_lora_backward(d->queue, &unit, &w, &lora, &x, &xa, &dy, &work, da.data,
                                        db.data, &dx, false));
    QS_TRY(output(d, "dx", &dx));
    QS_TRY(output(d, "da", &da));
    QS_TRY(output(d, "db", &db));
    QS_TRY(dump_dora(d, &(dora_inputs){&unit, &w, lora, &x, &dy}));
    QS_TRY(qs_queue_wait(d->queue));
    d->ops->unit_close(d->queue);
    return QS_OK;
}

/* Rows of q, k and v, whole quanta each. */
static int64_t joined_out(const dump *d, int i)
{
    return i > 0 ? 256 : d->small ? 512 : 1024;
}

/* Adapter i of the linears that read one x, and what its gradients are written to. */
static qs_status joined_adapter(dump *d, int i, int64_t t, qs_joined_linear *l, qs_mat *da,
                                qs_mat *db)
{
    static const char *const names[JOINED][2] = {{"a0", "b0"}, {"a1", "b1"}, {"a2", "b2"}};
    const int rank = 16;
    qs_mat a, b;
    QS_TRY(input(d, names[i][0], d->ops->act_dtype, rank, l->w->in, 0, 0.03F, &a));
    QS_TRY(input(d, names[i][1], d->ops->act_dtype, l->w->out, rank, 0, 0.03F, &b));
    QS_TRY(empty(d, d->ops->act_dtype, t, rank, 0, &l->xa));
    QS_TRY(empty(d, d->ops->act_dtype, t, rank, 0, &l->work));
    QS_TRY(empty(d, QS_F32, rank, l->w->in, 0, da));
    QS_TRY(empty(d, QS_F32, l->w->out, rank, 0, db));
    l->lora = (qs_lora){.a = a.data, .b = b.data, .rank = rank, .scale = 2.0F};
    l->da = da->data;
    l->db = db->data;
    return QS_OK;
}

/* Columns of the rows of `all` to each of the linears. */
static void joined_columns(const dump *d, const qs_mat *all, qs_joined_linear *l)
{
    int64_t col = 0;
    for (int i = 0; i < JOINED; i++) {
        l[i].y = *all;
        l[i].y.data = (char *)all->data + (size_t)col * qs_dtype_bytes(all->dtype);
        l[i].y.cols = joined_out(d, i);
        col += l[i].y.cols;
    }
}

/* q, k and v of one x as one product. */
static qs_status dump_joined(dump *d)
{
    static const char *const names[JOINED][2] = {{"da0", "db0"}, {"da1", "db1"}, {"da2", "db2"}};
    const int64_t t = d->small ? 24 : 512, in = d->small ? 64 : 2048;
    const int64_t border = JOINED * d->ops->border(16);
    qs_joined_linear l[JOINED] = {{0}};
    qs_weight whole, w[JOINED];
    qs_lora lora[JOINED];
    qs_unit_view unit;
    qs_mat x, y, dy, dx, da[JOINED], db[JOINED];
    int64_t out = 0;
    d->op = "joined";
    for (int i = 0; i < JOINED; i++) {
        out += joined_out(d, i);
    }
    QS_TRY(weight(d, "w", QS_WEIGHT_NF4, out, in, &unit, &whole));
    QS_TRY(input(d, "x", d->ops->act_dtype, t, in, border, 1.0F, &x));
    QS_TRY(input(d, "dy", d->ops->act_dtype, t, out, border, 1.0F, &dy));
    QS_TRY(empty(d, d->ops->act_dtype, t, out, 0, &y));
    QS_TRY(empty(d, d->ops->act_dtype, t, in, 0, &dx));
    for (int i = 0; i < JOINED; i++) {
        w[i] = whole;
        w[i].out = joined_out(d, i);
        w[i].quantum = i > 0 ? w[i - 1].quantum + w[i - 1].out * in / QS_NF4_QUANTUM : 0;
        l[i].w = &w[i];
        QS_TRY(joined_adapter(d, i, t, &l[i], &da[i], &db[i]));
        lora[i] = l[i].lora;
    }
    QS_TRY(d->ops->unit_open(d->queue, &unit, w, lora, JOINED, 0, false));
    joined_columns(d, &y, l);
    QS_TRY(d->ops->linears_lora_forward(d->queue, &unit, l, JOINED, &x));
    joined_columns(d, &dy, l);
    QS_TRY(d->ops->linears_lora_backward(d->queue, &unit, l, JOINED, &x, &dx, false));
    QS_TRY(output(d, "y", &y));
    QS_TRY(output(d, "dx", &dx));
    for (int i = 0; i < JOINED; i++) {
        QS_TRY(output(d, names[i][0], &da[i]));
        QS_TRY(output(d, names[i][1], &db[i]));
    }
    d->ops->unit_close(d->queue);
    return QS_OK;
}

static qs_status dump_rmsnorm(dump *d)
{
    const int64_t t = d->small ? 24 : 512, h = d->small ? 64 : 2048;
    qs_mat x, w, y, dy, dx, rstd;
    d->op = "rmsnorm";
    QS_TRY(act_input(d, "x", t, h, &x));
    QS_TRY(input(d, "w", QS_F32, 1, h, 0, 1.0F, &w));
    QS_TRY(act_input(d, "dy", t, h, &dy));
    QS_TRY(empty(d, d->ops->act_dtype, t, h, 0, &y));
    QS_TRY(empty(d, d->ops->act_dtype, t, h, 0, &dx));
    QS_TRY(empty(d, QS_F32, 1, t, 0, &rstd));
    QS_TRY(d->ops->rmsnorm_forward(d->queue, &x, w.data, 1e-5F, rstd.data, &y));
    QS_TRY(output(d, "y", &y));
    QS_TRY(d->ops->rmsnorm_backward(d->queue, &dy, &x, w.data, rstd.data, &dx));
    return output(d, "dx", &dx);
}

static qs_status dump_glu(dump *d, const char *name, qs_glu glu)
{
    const int64_t t = d->small ? 24 : 512, f = d->small ? 96 : 4096;
    qs_mat gate, up, act, dact, dgate, dup;
    d->op = name;
    QS_TRY(act_input(d, "gate", t, f, &gate));
    QS_TRY(act_input(d, "up", t, f, &up));
    QS_TRY(act_input(d, "dact", t, f, &dact));
    QS_TRY(empty(d, d->ops->act_dtype, t, f, 0, &act));
    QS_TRY(empty(d, d->ops->act_dtype, t, f, 0, &dgate));
    QS_TRY(empty(d, d->ops->act_dtype, t, f, 0, &dup));
    QS_TRY(d->ops->glu_forward(d->queue, glu, &gate, &up, &act));
    QS_TRY(output(d, "act", &act));
    QS_TRY(d->ops->glu_backward(d->queue, glu, &gate, &up, &dact, &dgate, &dup));
    QS_TRY(output(d, "dgate", &dgate));
    return output(d, "dup", &dup);
}

static qs_status dump_swiglu(dump *d)
{
    return dump_glu(d, "swiglu", QS_GLU_SILU);
}

static qs_status dump_geglu(dump *d)
{
    return dump_glu(d, "geglu", QS_GLU_GELU_TANH);
}

static qs_status dump_rope(dump *d)
{
    const int heads = 4;
    const int64_t t = d->small ? 24 : 512, dim = d->small ? 16 : 128, half = dim / 2;
    qs_status st = QS_OK;
    qs_mat x, cos_table, sin_table;
    float *table = floats(2 * t * half);
    int32_t *at = calloc((size_t)t, sizeof *at);
    void *position = NULL;
    d->op = "rope";
    for (int64_t i = 0; at != NULL && i < t * half; i++) {
        const double angle = (double)(i / half) * pow(10000.0, -(double)(i % half) / (double)half);
        table[i] = (float)cos(angle);
        table[t * half + i] = (float)sin(angle);
        at[i / half] = (int32_t)(i / half);
    }
    QS_GOTO(write_file(d, "cos", t, half, table));
    QS_GOTO(write_file(d, "sin", t, half, table + t * half));
    QS_GOTO(empty(d, QS_F32, t, half, 0, &cos_table));
    QS_GOTO(empty(d, QS_F32, t, half, 0, &sin_table));
    QS_GOTO(qs_queue_copy(d->queue, cos_table.data, table, (size_t)(t * half) * sizeof *table));
    QS_GOTO(qs_queue_copy(d->queue, sin_table.data, table + t * half,
                          (size_t)(t * half) * sizeof *table));
    QS_GOTO(upload(d, &position, at, (size_t)t * sizeof *at));
    QS_GOTO(act_input(d, "x", t, heads * dim, &x));
    QS_GOTO(d->ops->rope(d->queue, &x, heads, (int)dim, (int)dim, cos_table.data, sin_table.data,
                         position, false));
    QS_GOTO(output(d, "y", &x));
done:
    free(table);
    free(at);
    return st;
}

static qs_status dump_attention(dump *d)
{
    const int64_t t = d->small ? 70 : 1024, dim = d->small ? 32 : 128;
    const int heads = 4, kv_heads = 2;
    const int32_t cu[2] = {0, (int32_t)t};
    qs_mat q, k, v, d_o, o, dq, dk, dv, lse, delta;
    void *cu_seqlens = NULL;
    d->op = "attention";
    QS_TRY(act_input(d, "q", t, heads * dim, &q));
    QS_TRY(act_input(d, "k", t, kv_heads * dim, &k));
    QS_TRY(act_input(d, "v", t, kv_heads * dim, &v));
    QS_TRY(act_input(d, "do", t, heads * dim, &d_o));
    QS_TRY(empty(d, d->ops->act_dtype, t, heads * dim, 0, &o));
    QS_TRY(empty(d, d->ops->act_dtype, t, heads * dim, 0, &dq));
    QS_TRY(empty(d, d->ops->act_dtype, t, kv_heads * dim, 0, &dk));
    QS_TRY(empty(d, d->ops->act_dtype, t, kv_heads * dim, 0, &dv));
    QS_TRY(empty(d, QS_F32, heads, t, 0, &lse));
    QS_TRY(empty(d, QS_F32, heads, t, 0, &delta));
    QS_TRY(upload(d, &cu_seqlens, cu, sizeof cu));
    const qs_attention_shape shape = {.n_heads = heads,
                                      .n_kv_heads = kv_heads,
                                      .head_dim = (int)dim,
                                      .scale = (float)(1.0 / sqrt((double)dim)),
                                      .cu_seqlens = cu_seqlens,
                                      .n_docs = 1,
                                      .longest = t};
    QS_TRY(d->ops->attention_forward(d->queue, &shape, &q, &k, &v, &o, lse.data));
    QS_TRY(output(d, "o", &o));
    QS_TRY(d->ops->attention_backward(d->queue, &shape, &q, &k, &v, &o, lse.data, &d_o, delta.data,
                                      &dq, &dk, &dv));
    QS_TRY(output(d, "dq", &dq));
    QS_TRY(output(d, "dk", &dk));
    return output(d, "dv", &dv);
}

/* The vocabulary is one chunk. */
static qs_status dump_head(dump *d)
{
    const int64_t rows = d->small ? 20 : 256, h = d->small ? 64 : 2048;
    const int64_t vocab = d->small ? 160 : 4096;
    qs_status st = QS_OK;
    qs_unit_view unit;
    qs_weight w;
    qs_mat x, dx, kept, sums, w_target, loss;
    void *target = NULL;
    float *as_float = floats(rows);
    int32_t *ids = calloc((size_t)rows, sizeof *ids);
    d->op = "head";
    for (int64_t i = 0; ids != NULL && i < rows; i++) {
        ids[i] = (int32_t)((i * 2654435761) % vocab);
        as_float[i] = (float)ids[i];
    }
    QS_GOTO(write_file(d, "target", 1, rows, as_float));
    QS_GOTO(weight(d, "w", QS_WEIGHT_RAW, vocab, h, &unit, &w));
    QS_GOTO(act_input(d, "x", rows, h, &x));
    QS_GOTO(empty(d, d->ops->act_dtype, rows, h, 0, &dx));
    QS_GOTO(empty(d, QS_F32, rows, h, 0, &kept));
    QS_GOTO(empty(d, QS_F32, rows, h, 0, &w_target));
    QS_GOTO(empty(d, QS_F32, 3, rows, 0, &sums));
    QS_GOTO(empty(d, QS_F32, 1, rows, 0, &loss));
    QS_GOTO(upload(d, &target, ids, (size_t)rows * sizeof *ids));
    qs_head_state state = {.rows = rows,
                           .hidden = h,
                           .x = x.data,
                           .target = target,
                           .max = sums.data,
                           .sum = (float *)sums.data + rows,
                           .target_logit = (float *)sums.data + 2 * rows,
                           .o = kept.data,
                           .w_target = w_target.data};
    QS_GOTO(d->ops->head_chunk(d->queue, &unit, &w, 0, &state));
    QS_GOTO(d->ops->head_finish(d->queue, &state, 1.0F / (float)rows, loss.data, dx.data));
    QS_GOTO(output(d, "loss", &loss));
    QS_GOTO(output(d, "dx", &dx));
done:
    free(as_float);
    free(ids);
    return st;
}

static qs_status run(dump *d, const char *path)
{
    static qs_status (*const all[])(dump *) = {dump_linear,    dump_joined, dump_rmsnorm,
                                               dump_swiglu,    dump_geglu,  dump_rope,
                                               dump_attention, dump_head};
    char why[1024] = "";
    const qs_plugin *plugin = qs_plugin_load(path, why, sizeof why);
    if (plugin == NULL || plugin->probe(why, sizeof why) < 1) {
        return QS_FAIL(QS_ERR_ENVIRONMENT, "%s", why);
    }
    QS_TRY(plugin->device_open(&d->device, 0));
    d->ops = plugin->ops();
    QS_TRY(qs_queue_create_on(d->device, &d->queue, 1));
    qs_ops_limits limits = {.threads = 1,
                            .tokens = 1024,
                            .documents = 1,
                            .loss_rows = 256,
                            .widest = 4096,
                            .n_heads = 4,
                            .n_kv_heads = 2,
                            .head_dim = d->small ? 32 : 128,
                            .dora = true,
                            .lora_rank = 16,
                            .n_linears = JOINED,
                            .hidden = 2048,
                            .head_rows = 4096};
    for (int i = 0; i < JOINED; i++) {
        limits.out[i] = joined_out(d, i);
        limits.in[i] = d->small ? 64 : 2048;
        limits.joined[i] = i > 0;
    }
    QS_TRY(d->ops->open(d->queue, &limits));
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        QS_TRY(all[i](d));
        give_back(d);
    }
    return QS_OK;
}

int main(int argc, char **argv)
{
    dump d = {.random = 20261101};
    if (argc < 3 || argc > 4 || (argc == 4 && strcmp(argv[3], "--small") != 0)) {
        (void)fprintf(stderr, "usage: op_dump PLUGIN DIR [--small]\n");
        return 2;
    }
    d.dir = argv[2];
    d.small = argc == 4;
    const qs_status st = run(&d, argv[1]);
    if (st != QS_OK) {
        qs_error_print(st);
    }
    if (d.queue != NULL) {
        d.ops->close(d.queue);
    }
    give_back(&d);
    qs_queue_destroy(d.queue);
    qs_device_close(d.device);
    return qs_exit_code(st);
}
