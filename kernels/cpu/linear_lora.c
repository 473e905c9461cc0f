/* A linear as a layer has it, from the operations that it is made of, in this order: the frozen
 * product with its bias, the adapter's, and the residual. */
#include "kernels/cpu/ops_impl.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/scratch.h"

enum { BLOCK_ROWS = 256 }; /* of a result that cannot be built where it belongs */

/* y = x W^T + bias + adapter. */
static qs_status multiply(qs_queue *q, qs_products products, const qs_unit_view *unit,
                          const qs_weight *w, const float *bias, const qs_lora *lora,
                          const qs_mat *x, qs_mat *xa, qs_mat *y)
{
    if (lora->gain != NULL) {
        return qs_dora_forward(q, products, unit, w, bias, lora, x, xa, y);
    }
    QS_TRY(qs_linear_forward_by(q, products, unit, w, bias, x, y));
    return lora->a == NULL ? QS_OK : qs_cpu_lora_forward(q, lora, x, xa, y);
}

/* The residual lies where the result belongs: a block of rows is built in scratch and added to it.
 * The same bits as with a result of its own, since no row of a product knows of the others. */
static qs_status add_in_place(qs_queue *q, qs_products products, const qs_unit_view *unit,
                              const qs_weight *w, const float *bias, const qs_lora *lora,
                              const qs_mat *x, qs_mat *xa, qs_mat *y)
{
    float *block;
    QS_TRY(qs_scratch(QS_SCRATCH_LORA, qs_lora_scratch_count(y->rows, y->cols), &block));
    for (int64_t row0 = 0; row0 < y->rows; row0 += BLOCK_ROWS) {
        int64_t rows = qs_min_i64(BLOCK_ROWS, y->rows - row0);
        qs_mat x_part = qs_mat_rows(x, row0, rows);
        qs_mat y_part = qs_mat_rows(y, row0, rows);
        qs_mat result = {block, rows, y->cols, y->cols, QS_F32};
        qs_mat xa_part = {0};
        qs_lora lora_part = {0};
        if (lora->a != NULL) {
            xa_part = qs_mat_rows(xa, row0, rows);
            lora_part = qs_lora_rows(lora, row0);
        }
        QS_TRY(multiply(q, products, unit, w, bias, &lora_part, &x_part, &xa_part, &result));
        QS_TRY(qs_cpu_add(q, &y_part, &result, &y_part));
    }
    return QS_OK;
}

qs_status qs_linear_lora_forward_by(qs_queue *q, qs_products products, const qs_unit_view *unit,
                                    const qs_weight *w, const float *bias, const qs_mat *residual,
                                    const qs_lora *lora, const qs_mat *x, qs_mat *xa, qs_mat *y)
{
    if (residual != NULL && residual->data == y->data) {
        return add_in_place(q, products, unit, w, bias, lora, x, xa, y);
    }
    QS_TRY(multiply(q, products, unit, w, bias, lora, x, xa, y));
    return residual == NULL ? QS_OK : qs_cpu_add(q, residual, y, y);
}

qs_status qs_linear_lora_backward_by(qs_queue *q, qs_products products, const qs_unit_view *unit,
                                     const qs_weight *w, const qs_lora *lora, const qs_mat *x,
                                     const qs_mat *xa, const qs_mat *dy, qs_mat *work, float *da,
                                     float *db, qs_mat *dx, bool accumulate)
{
    const qs_weight_source frozen = {unit, w, qs_isa_get(), 0};
    if (dx != NULL) {
        /* With dropout the gain belongs to the masked part, which comes with the adapter's. */
        const qs_gained left = {dy, lora->dropout > 0.0F ? NULL : lora->gain, 0.0F};
        const qs_operand gradient = qs_gained_operand(&left);
        QS_TRY(qs_frozen_product(q, products, unit, w, false, dy->rows, &gradient, dx, accumulate));
    }
    return lora->a == NULL ? QS_OK
                           : qs_lora_backward_beside(q, &frozen, lora, x, xa, dy, work, da, db, dx);
}

qs_status qs_linears_lora_forward_by(qs_queue *q, qs_products products, const qs_unit_view *unit,
                                     const qs_joined_linear *linears, int count, const qs_mat *x)
{
    for (int i = 0; i < count; i++) {
        const qs_joined_linear *l = &linears[i];
        qs_mat xa = l->xa, y = l->y;
        QS_TRY(qs_linear_lora_forward_by(q, products, unit, l->w, l->bias, NULL, &l->lora, x, &xa,
                                         &y));
    }
    return QS_OK;
}

qs_status qs_linears_lora_backward_by(qs_queue *q, qs_products products, const qs_unit_view *unit,
                                      const qs_joined_linear *linears, int count, const qs_mat *x,
                                      qs_mat *dx, bool accumulate)
{
    for (int i = 0; i < count; i++) {
        const qs_joined_linear *l = &linears[i];
        qs_mat work = l->work;
        QS_TRY(qs_linear_lora_backward_by(q, products, unit, l->w, &l->lora, x, &l->xa, &l->y,
                                          &work, l->da, l->db, dx, accumulate || i > 0));
    }
    return QS_OK;
}
