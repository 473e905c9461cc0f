/* LoRA (Hu et al. 2021, arXiv:2106.09685) beside a frozen linear, all by qs_gemm. Dropout is
 * applied to x while it is packed, and to the gradient block by block: no masked copy of x and no
 * mask in memory. */
#include "kernels/cpu/ops_impl.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/scratch.h"

enum { BLOCK_ROWS = 256 }; /* of the masked gradient */

static bool has_dropout(const qs_lora *lora)
{
    return lora->dropout > 0.0F;
}

/* drop(x) of elements [first, first + count) of a row `width` wide. */
static void dropout_row(const qs_lora *lora, int64_t row, int64_t width, int64_t first,
                        int64_t count, const float *x, float *out)
{
    /* At p = 1 nothing is kept, and the factor of what is kept does not matter. */
    float keep = lora->dropout < 1.0F ? 1.0F / (1.0F - lora->dropout) : 0.0F;
    uint64_t element = (uint64_t)(lora->row_at[row] * width + first);
    const qs_rng rng =
        qs_rng_make(lora->seed, lora->step, (uint64_t)lora->sample[row], lora->site, lora->layer);
    qs_isa_get()->dropout(&rng, element, count, lora->dropout, keep, x, out);
}

static void dropped_load(const qs_operand *operand, int64_t row, int64_t first, int64_t count,
                         float *out)
{
    const qs_dropped *d = operand->ctx;
    dropout_row(d->lora, row, d->x->cols, first, count,
                qs_mat_f32(d->x) + row * d->x->stride + first, out);
}

qs_operand qs_dropped_operand(const qs_dropped *d)
{
    if (has_dropout(d->lora)) {
        return (qs_operand){.load = dropped_load, .ctx = d};
    }
    return (qs_operand){.data = d->x->data, .stride = d->x->stride};
}

qs_status qs_lora_project(qs_queue *q, const qs_lora *lora, const qs_mat *x, qs_mat *xa)
{
    const qs_dropped d = {lora, x};
    qs_operand input = qs_dropped_operand(&d);
    qs_operand a = {.data = lora->a, .stride = x->cols, .transposed = true};
    return qs_gemm(q, x->rows, lora->rank, x->cols, &input, &a, xa->data, xa->stride, false);
}

qs_status qs_cpu_lora_forward(qs_queue *q, const qs_lora *lora, const qs_mat *x, qs_mat *xa,
                              qs_mat *y)
{
    if (lora->a == NULL) {
        return QS_OK;
    }
    QS_TRY(qs_lora_project(q, lora, x, xa));
    qs_operand scaled = {.data = xa->data, .stride = xa->stride, .scale = lora->scale};
    qs_operand b = {.data = lora->b, .stride = lora->rank, .transposed = true};
    return qs_gemm(q, x->rows, y->cols, lora->rank, &scaled, &b, y->data, y->stride, true);
}

typedef struct {
    const qs_lora *lora;
    const float *product; /* [rows, width] */
    qs_mat *dx;
    int64_t row0, rows_per_task, rows;
} masked_add;

static void masked_add_task(void *ctx, int64_t index, int thread)
{
    (void)thread;
    const masked_add *args = ctx;
    int64_t width = args->dx->cols;
    int64_t first = index * args->rows_per_task;
    int64_t last = qs_min_i64(first + args->rows_per_task, args->rows);
    for (int64_t t = first; t < last; t++) {
        const float *product = args->product + t * width;
        float *dx = qs_mat_f32(args->dx) + (args->row0 + t) * args->dx->stride;
        for (int64_t j = 0; j < width; j += QS_GEMM_KC) {
            float kept[QS_GEMM_KC];
            int64_t count = qs_min_i64(QS_GEMM_KC, width - j);
            dropout_row(args->lora, args->row0 + t, width, j, count, product + j, kept);
            for (int64_t i = 0; i < count; i++) {
                dx[j + i] += kept[i];
            }
        }
    }
}

int64_t qs_lora_scratch_count(int64_t tokens, int64_t widest)
{
    return qs_min_i64(BLOCK_ROWS, tokens) * widest;
}

/* product += ((gain - 1) dy) W of some rows: DoRA's frozen weight saw drop(x), too. */
static qs_status add_gained_product(qs_queue *q, const qs_weight_source *frozen,
                                    const qs_lora *lora, const qs_mat *dy, float *product)
{
    const qs_gained gained = {dy, lora->gain, 1.0F};
    const qs_operand left = qs_gained_operand(&gained), w = qs_weight_operand(frozen, false);
    const int64_t in = frozen->weight->in;
    return qs_gemm(q, dy->rows, in, dy->cols, &left, &w, product, in, true);
}

/* dx += (s (work A), and with DoRA ((gain - 1) dy) W) * mask / (1 - p), a block of rows at a time.
 */
static qs_status add_masked_product(qs_queue *q, const qs_weight_source *frozen,
                                    const qs_lora *lora, const qs_mat *dy, const qs_mat *work,
                                    qs_mat *dx)
{
    int64_t width = dx->cols;
    masked_add args = {.lora = lora, .dx = dx, .rows_per_task = qs_rows_per_task(width)};
    float *product;
    QS_TRY(qs_scratch(QS_SCRATCH_LORA, qs_lora_scratch_count(dx->rows, width), &product));
    args.product = product;
    for (; args.row0 < dx->rows; args.row0 += BLOCK_ROWS) {
        args.rows = qs_min_i64(BLOCK_ROWS, dx->rows - args.row0);
        qs_operand left = {.data = qs_mat_f32(work) + args.row0 * work->stride,
                           .stride = work->stride,
                           .scale = lora->scale};
        qs_operand a = {.data = lora->a, .stride = width};
        QS_TRY(qs_gemm(q, args.rows, width, lora->rank, &left, &a, product, width, false));
        if (lora->gain != NULL) {
            const qs_mat part = qs_mat_rows(dy, args.row0, args.rows);
            QS_TRY(add_gained_product(q, frozen, lora, &part, product));
        }
        qs_parallel_for(q, qs_ceil_div(args.rows, args.rows_per_task), args.rows * width * 16,
                        masked_add_task, &args);
    }
    return QS_OK;
}

qs_status qs_lora_backward_beside(qs_queue *q, const qs_weight_source *frozen, const qs_lora *lora,
                                  const qs_mat *x, const qs_mat *xa, const qs_mat *dy, qs_mat *work,
                                  float *da, float *db, qs_mat *dx)
{
    int64_t rows = dy->rows, in = x->cols, out = dy->cols, rank = lora->rank;
    const qs_gained gradient = {dy, lora->gain, 0.0F};
    qs_operand left = qs_gained_operand(&gradient);
    qs_operand b = {.data = lora->b, .stride = rank};
    QS_TRY(qs_gemm(q, rows, rank, out, &left, &b, work->data, work->stride, false));

    const qs_dropped d = {lora, x};
    qs_operand input = qs_dropped_operand(&d);
    qs_operand work_t = {
        .data = work->data, .stride = work->stride, .transposed = true, .scale = lora->scale};
    QS_TRY(qs_gemm(q, rank, in, rows, &work_t, &input, da, in, false));

    qs_operand dy_t = left;
    dy_t.transposed = true;
    qs_operand kept = {.data = xa->data, .stride = xa->stride, .scale = lora->scale};
    QS_TRY(qs_gemm(q, out, rank, rows, &dy_t, &kept, db, rank, false));

    if (dx == NULL) {
        return QS_OK;
    }
    if (has_dropout(lora)) {
        return add_masked_product(q, frozen, lora, dy, work, dx);
    }
    qs_operand scaled = {.data = work->data, .stride = work->stride, .scale = lora->scale};
    qs_operand a = {.data = lora->a, .stride = in};
    return qs_gemm(q, rows, in, rank, &scaled, &a, dx->data, dx->stride, true);
}

qs_status qs_cpu_lora_backward(qs_queue *q, const qs_lora *lora, const qs_mat *x, const qs_mat *xa,
                               const qs_mat *dy, qs_mat *work, float *da, float *db, qs_mat *dx)
{
    return lora->a == NULL ? QS_OK
                           : qs_lora_backward_beside(q, NULL, lora, x, xa, dy, work, da, db, dx);
}
