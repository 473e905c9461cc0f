/* A linear as a layer has it, from the operations that it is made of, in this order: the frozen
 * product with its bias, the adapter's, and the residual. */
#include "kernels/cpu/ops_impl.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/scratch.h"

enum { BLOCK_ROWS = 256 }; /* of a result that cannot be built where it belongs */

static qs_mat rows_from(const qs_mat *mat, int64_t row0, int64_t rows)
{
    qs_mat part = *mat;
    part.data = qs_mat_f32(mat) + row0 * mat->stride;
    part.rows = rows;
    return part;
}

/* y = x W^T + bias + adapter. */
static qs_status products(qs_queue *q, const qs_unit_view *unit, const qs_weight *w,
                          const float *bias, const qs_lora *lora, const qs_mat *x, qs_mat *xa,
                          qs_mat *y)
{
    QS_TRY(qs_cpu_linear_forward(q, unit, w, bias, x, y));
    return lora->a == NULL ? QS_OK : qs_cpu_lora_forward(q, lora, x, xa, y);
}

/* The residual lies where the result belongs: a block of rows is built in scratch and added to it.
 * The same bits as with a result of its own, since no row of a product knows of the others. */
static qs_status add_in_place(qs_queue *q, const qs_unit_view *unit, const qs_weight *w,
                              const float *bias, const qs_lora *lora, const qs_mat *x, qs_mat *xa,
                              qs_mat *y)
{
    float *block;
    QS_TRY(qs_scratch(QS_SCRATCH_LORA, qs_lora_scratch_count(y->rows, y->cols), &block));
    for (int64_t row0 = 0; row0 < y->rows; row0 += BLOCK_ROWS) {
        int64_t rows = qs_min_i64(BLOCK_ROWS, y->rows - row0);
        qs_mat x_part = rows_from(x, row0, rows);
        qs_mat y_part = rows_from(y, row0, rows);
        qs_mat result = {block, rows, y->cols, y->cols, QS_F32};
        qs_mat xa_part = {0};
        qs_lora lora_part = *lora;
        if (lora->a != NULL) {
            xa_part = rows_from(xa, row0, rows);
        }
        if (lora->a != NULL && lora->dropout > 0.0F) {
            lora_part.sample += row0;
            lora_part.row_at += row0;
        }
        QS_TRY(products(q, unit, w, bias, &lora_part, &x_part, &xa_part, &result));
        QS_TRY(qs_cpu_add(q, &result, &y_part));
    }
    return QS_OK;
}

qs_status qs_cpu_linear_lora_forward(qs_queue *q, const qs_unit_view *unit, const qs_weight *w,
                                     const float *bias, const qs_mat *residual, const qs_lora *lora,
                                     const qs_mat *x, qs_mat *xa, qs_mat *y)
{
    if (residual != NULL && residual->data == y->data) {
        return add_in_place(q, unit, w, bias, lora, x, xa, y);
    }
    QS_TRY(products(q, unit, w, bias, lora, x, xa, y));
    return residual == NULL ? QS_OK : qs_cpu_add(q, residual, y);
}

qs_status qs_cpu_linear_lora_backward(qs_queue *q, const qs_unit_view *unit, const qs_weight *w,
                                      const qs_lora *lora, const qs_mat *x, const qs_mat *xa,
                                      const qs_mat *dy, qs_mat *work, float *da, float *db,
                                      qs_mat *dx, bool accumulate)
{
    if (dx != NULL) {
        QS_TRY(qs_cpu_linear_backward(q, unit, w, dy, dx, accumulate));
    }
    return lora->a == NULL ? QS_OK : qs_cpu_lora_backward(q, lora, x, xa, dy, work, da, db, dx);
}
