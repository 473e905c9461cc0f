/* DoRA (Liu et al. 2024, arXiv:2402.09353) beside a frozen linear, as peft computes it: a row of W
 * + s B A is scaled to the length m of its own, and the gradient takes the length that it had for a
 * constant.
 *
 *     y = W x + bias + (g - 1) W drop(x) + g s B (A drop(x)),   g = m / ||W + s B A|| row by row
 *
 * Without dropout x and drop(x) are one, and a single product with W serves both terms; with it
 * there are two, as in peft.
 *
 * What only DoRA needs, beside what LoRA does, with r the rank and T the tokens:
 *     norms       once a step and layer: W decoded once, r + 1 multiply-adds a weight
 *     magnitudes  a product with W for each micro-batch's backward, since nobody keeps
 *                 (W + s B A) drop(x): out * in multiply-adds a token, and no memory
 *
 * The norms are those of the sums themselves: expanding them into ||W||^2 + 2 s W.(B A) + ... takes
 * as many multiply-adds, and subtracts large numbers where B A opposes W. */
#include <math.h>
#include <string.h>

#include "kernels/cpu/ops_impl.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/scratch.h"

enum {
    TOKEN_ROWS = 256, /* of a product that is looked at and thrown away */
    NORM_ROWS = 64,   /* of W + s B A: a row's sum is its own, so that no bit depends on it */
    COLUMNS = 512,    /* of a task that adds up columns */
    LANES = 8,
};

int64_t qs_dora_scratch_count(int64_t tokens, int64_t widest)
{
    int64_t rows = qs_min_i64(TOKEN_ROWS, tokens);
    return (rows > NORM_ROWS ? rows : NORM_ROWS) * widest;
}

/* ---- a matrix times (gain - minus), column by column ---- */

static void gained_load(const qs_operand *operand, int64_t row, int64_t first, int64_t count,
                        float *out)
{
    const qs_gained *g = operand->ctx;
    const float *from = qs_mat_f32(g->mat) + row * g->mat->stride + first;
    for (int64_t i = 0; i < count; i++) {
        out[i] = from[i] * (g->gain[first + i] - g->minus);
    }
}

qs_operand qs_gained_operand(const qs_gained *g)
{
    if (g->gain == NULL) {
        return (qs_operand){.data = g->mat->data, .stride = g->mat->stride};
    }
    return (qs_operand){.load = gained_load, .ctx = g};
}

typedef struct {
    const qs_mat *from; /* NULL: y itself is scaled */
    const float *gain, *bias;
    float minus;
    qs_mat *y;
    int64_t rows_per_task;
} gain_args;

/* y = gain y + bias, or y += (gain - minus) from. */
static void gain_task(void *ctx, int64_t index, int thread)
{
    (void)thread;
    const gain_args *args = ctx;
    int64_t first = index * args->rows_per_task;
    int64_t last = qs_min_i64(first + args->rows_per_task, args->y->rows);
    for (int64_t t = first; t < last; t++) {
        float *y = qs_mat_f32(args->y) + t * args->y->stride;
        const float *from =
            args->from != NULL ? qs_mat_f32(args->from) + t * args->from->stride : y;
        for (int64_t j = 0; args->from == NULL && j < args->y->cols; j++) {
            float scaled = args->gain[j] * y[j];
            y[j] = args->bias != NULL ? scaled + args->bias[j] : scaled;
        }
        for (int64_t j = 0; args->from != NULL && j < args->y->cols; j++) {
            y[j] += (args->gain[j] - args->minus) * from[j];
        }
    }
}

static void apply_gain(qs_queue *q, gain_args args)
{
    args.rows_per_task = qs_rows_per_task(args.y->cols);
    qs_parallel_for(q, qs_ceil_div(args.y->rows, args.rows_per_task), args.y->rows * args.y->cols,
                    gain_task, &args);
}

/* ---- blocks of rows ---- */

/* Some rows of the operands of one call. */
typedef struct {
    qs_lora lora;
    qs_mat x, xa, z; /* z: scratch */
} token_rows;

static token_rows rows_of(const qs_lora *lora, const qs_mat *x, const qs_mat *xa, float *scratch,
                          int64_t out, int64_t row0)
{
    int64_t rows = qs_min_i64(TOKEN_ROWS, x->rows - row0);
    return (token_rows){.lora = qs_lora_rows(lora, row0),
                        .x = qs_mat_rows(x, row0, rows),
                        .xa = qs_mat_rows(xa, row0, rows),
                        .z = {scratch, rows, out, out, QS_F32}};
}

/* z = W drop(x) */
static qs_status frozen_product(qs_queue *q, const qs_weight_source *source, token_rows *part)
{
    const qs_dropped dropped = {&part->lora, &part->x};
    const qs_operand input = qs_dropped_operand(&dropped);
    const qs_operand w = qs_weight_operand(source, true);
    return qs_gemm(q, part->x.rows, source->weight->out, source->weight->in, &input, &w,
                   part->z.data, part->z.stride, false);
}

/* z (+)= s B xa */
static qs_status adapter_product(qs_queue *q, token_rows *part, bool accumulate)
{
    const qs_lora *lora = &part->lora;
    const qs_operand kept = {
        .data = part->xa.data, .stride = part->xa.stride, .scale = lora->scale};
    const qs_operand b = {.data = lora->b, .stride = lora->rank, .transposed = true};
    return qs_gemm(q, part->x.rows, part->z.cols, lora->rank, &kept, &b, part->z.data,
                   part->z.stride, accumulate);
}

/* ---- forward ---- */

/* y has W x + bias; what the adapter adds comes a block of rows at a time. */
static qs_status add_dropped(qs_queue *q, const qs_weight_source *source, const qs_lora *lora,
                             const qs_mat *x, qs_mat *xa, qs_mat *y)
{
    float *scratch;
    QS_TRY(qs_lora_project(q, lora, x, xa));
    QS_TRY(qs_scratch(QS_SCRATCH_DORA, qs_dora_scratch_count(y->rows, y->cols), &scratch));
    for (int64_t row0 = 0; row0 < y->rows; row0 += TOKEN_ROWS) {
        token_rows part = rows_of(lora, x, xa, scratch, y->cols, row0);
        qs_mat to = qs_mat_rows(y, row0, part.x.rows);
        QS_TRY(frozen_product(q, source, &part));
        apply_gain(q, (gain_args){.from = &part.z, .gain = lora->gain, .minus = 1.0F, .y = &to});
        QS_TRY(adapter_product(q, &part, false));
        apply_gain(q, (gain_args){.from = &part.z, .gain = lora->gain, .y = &to});
    }
    return QS_OK;
}

qs_status qs_dora_forward(qs_queue *q, qs_products products, const qs_unit_view *unit,
                          const qs_weight *w, const float *bias, const qs_lora *lora,
                          const qs_mat *x, qs_mat *xa, qs_mat *y)
{
    const qs_weight_source source = {unit, w, qs_isa_get(), 0};
    if (lora->dropout > 0.0F) {
        QS_TRY(qs_linear_forward_by(q, products, unit, w, bias, x, y));
        return add_dropped(q, &source, lora, x, xa, y);
    }
    QS_TRY(qs_linear_forward_by(q, products, unit, w, NULL, x, y));
    QS_TRY(qs_cpu_lora_forward(q, lora, x, xa, y));
    apply_gain(q, (gain_args){.gain = lora->gain, .bias = bias, .y = y});
    return QS_OK;
}

/* ---- backward of the magnitudes ---- */

typedef struct {
    const qs_mat *dy, *z;
    float *dm;
} column_args;

/* dm += sum over the block's rows of dy z: rows in order and in fp64, whoever computes it. */
static void column_task(void *ctx, int64_t index, int thread)
{
    (void)thread;
    const column_args *args = ctx;
    double sum[COLUMNS] = {0};
    int64_t first = index * COLUMNS, n = qs_min_i64(COLUMNS, args->z->cols - first);
    for (int64_t t = 0; t < args->z->rows; t++) {
        const float *dy = qs_mat_f32(args->dy) + t * args->dy->stride + first;
        const float *z = qs_mat_f32(args->z) + t * args->z->stride + first;
        for (int64_t j = 0; j < n; j++) {
            sum[j] += (double)dy[j] * (double)z[j];
        }
    }
    for (int64_t j = 0; j < n; j++) {
        args->dm[first + j] += (float)sum[j];
    }
}

qs_status qs_cpu_dora_backward(qs_queue *q, const qs_unit_view *unit, const qs_weight *w,
                               const qs_lora *lora, const qs_mat *x, const qs_mat *xa,
                               const qs_mat *dy, float *dm)
{
    const qs_weight_source source = {unit, w, qs_isa_get(), 0};
    float *scratch;
    memset(dm, 0, (size_t)w->out * sizeof *dm);
    QS_TRY(qs_scratch(QS_SCRATCH_DORA, qs_dora_scratch_count(dy->rows, w->out), &scratch));
    for (int64_t row0 = 0; row0 < dy->rows; row0 += TOKEN_ROWS) {
        token_rows part = rows_of(lora, x, xa, scratch, w->out, row0);
        const qs_mat from = qs_mat_rows(dy, row0, part.x.rows);
        column_args args = {&from, &part.z, dm};
        QS_TRY(frozen_product(q, &source, &part));
        QS_TRY(adapter_product(q, &part, true));
        qs_parallel_for(q, qs_ceil_div(w->out, COLUMNS), from.rows * w->out, column_task, &args);
    }
    for (int64_t i = 0; i < w->out; i++) {
        dm[i] = lora->norm[i] > 0.0F ? dm[i] / lora->norm[i] : 0.0F;
    }
    return QS_OK;
}

/* ---- norms ---- */

typedef struct {
    qs_weight_source source; /* from the block's first row on */
    float *block;            /* [NORM_ROWS, in] */
    const float *magnitude;
    float *norm, *gain; /* of the block's first row on */
} norm_args;

static void decode_task(void *ctx, int64_t row, int thread)
{
    (void)thread;
    const norm_args *args = ctx;
    const qs_weight_source *s = &args->source;
    const int64_t in = s->weight->in;
    qs_weight_decode_fast(s->isa, s->view, s->weight, (s->row0 + row) * in, in,
                          args->block + row * in);
}

static double square_sum(const float *x, int64_t count)
{
    double lane[LANES] = {0}, sum = 0;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        for (int l = 0; l < LANES; l++) {
            lane[l] += (double)x[i + l] * (double)x[i + l];
        }
    }
    for (; i < count; i++) {
        sum += (double)x[i] * (double)x[i];
    }
    for (int l = 0; l < LANES; l++) {
        sum += lane[l];
    }
    return sum;
}

static void norm_task(void *ctx, int64_t row, int thread)
{
    (void)thread;
    const norm_args *args = ctx;
    const int64_t in = args->source.weight->in;
    const float norm = (float)sqrt(square_sum(args->block + row * in, in));
    args->norm[row] = norm;
    if (args->magnitude != NULL) {
        args->gain[row] = norm > 0.0F ? args->magnitude[row] / norm : 0.0F;
    }
}

qs_status qs_cpu_dora_norms(qs_queue *q, const qs_unit_view *unit, const qs_weight *w,
                            const qs_lora *lora, const float *magnitude, float *norm, float *gain)
{
    float *block;
    QS_TRY(qs_scratch(QS_SCRATCH_DORA, qs_dora_scratch_count(1, w->in), &block));
    for (int64_t row0 = 0; row0 < w->out; row0 += NORM_ROWS) {
        const int64_t rows = qs_min_i64(NORM_ROWS, w->out - row0);
        norm_args args = {.source = {unit, w, qs_isa_get(), row0},
                          .block = block,
                          .magnitude = magnitude != NULL ? magnitude + row0 : NULL,
                          .norm = norm + row0,
                          .gain = magnitude != NULL ? gain + row0 : NULL};
        qs_parallel_for(q, rows, rows * w->in, decode_task, &args);
        if (lora->a != NULL) {
            const qs_operand b = {.data = (const float *)lora->b + row0 * lora->rank,
                                  .stride = lora->rank,
                                  .scale = lora->scale};
            const qs_operand a = {.data = lora->a, .stride = w->in};
            QS_TRY(qs_gemm(q, rows, w->in, lora->rank, &b, &a, block, w->in, true));
        }
        qs_parallel_for(q, rows, rows * w->in, norm_task, &args);
    }
    return QS_OK;
}
