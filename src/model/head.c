/* The head and the loss in one pass over the vocabulary.
 *
 * The head is frozen, so its gradient is not wanted, and loss and dX together are attention of the
 * rows over the vocabulary with keys = values = W: the running maximum m, the sum Z = sum exp(l -
 * m) and O = sum exp(l - m) W are all that is kept, then loss = m + log Z - l[target] and dX = O /
 * Z - W[target]. The T x V logits never exist, and each chunk is gathered once. Only rows that
 * carry loss take part. */
#include "model/model_impl.h"

#include <string.h>

static int64_t collect_target_rows(qs_micro_acts *micro, const qs_batch *batch)
{
    int64_t rows = 0;
    for (int64_t t = 0; t < batch->n_tokens; t++) {
        if (batch->target[t] >= 0) {
            micro->target_row[rows] = (int32_t)t;
            micro->head_target[rows] = batch->target[t];
            rows++;
        }
    }
    return rows;
}

static void gather_rows(const qs_micro_acts *micro, int64_t rows, int64_t hidden, float *out)
{
    for (int64_t i = 0; i < rows; i++) {
        memcpy(out + i * hidden, micro->x_last + micro->target_row[i] * hidden,
               (size_t)hidden * sizeof *out);
    }
}

/* The rows through the final norm into head_rows. */
static qs_status norm_rows(qs_model *model, qs_micro_acts *micro)
{
    const int64_t hidden = model->config->hidden;
    const int64_t rows = micro->head.rows;
    gather_rows(micro, rows, hidden, model->work.rows);
    qs_mat x = qs_mat_of(model->work.rows, rows, hidden);
    qs_mat y = qs_mat_of(micro->head_rows, rows, hidden);
    return model->ops->rmsnorm_forward(model->queue, &x, model->final_norm,
                                       model->config->rms_norm_eps, micro->row_rstd, &y);
}

qs_status qs_head_begin(qs_model *model, qs_micro_acts *micro, const qs_batch *batch)
{
    qs_head_state *head = &micro->head;
    head->hidden = model->config->hidden;
    head->rows = collect_target_rows(micro, batch);
    head->x = micro->head_rows;
    head->target = micro->head_target;
    return norm_rows(model, micro);
}

/* The state as an operation sees it: o and w_target are hidden when only the loss is wanted. */
static qs_head_state state_for(const qs_micro_acts *micro, bool keep)
{
    qs_head_state state = micro->head;
    if (!keep) {
        state.o = NULL;
        state.w_target = NULL;
    }
    return state;
}

qs_status qs_head_run(qs_model *model, int64_t count, bool keep, int next)
{
    const int chunks = qs_base_head_chunks(model->index);
    for (int c = 0; c < chunks; c++) {
        const int u = qs_base_head_unit(model->index, c);
        const qs_base_unit *unit = &model->index->units[u];
        const qs_weight w = qs_base_weight(model->index, &unit->tensors[0]);
        const int after = c + 1 < chunks ? qs_base_head_unit(model->index, c + 1) : next;
        qs_unit_view view;
        QS_TRY(qs_fsdp_acquire(model->fsdp, u, after, &view));
        for (int64_t g = 0; g < count; g++) {
            qs_head_state state = state_for(&model->micro[g], keep);
            if (state.rows == 0) {
                continue;
            }
            QS_TRY(model->ops->head_chunk(model->queue, &view, &w,
                                          c * model->index->head_chunk_rows, &state));
            model->flops += (keep ? 4.0 : 2.0) * (double)state.rows * (double)(w.out * w.in);
        }
        QS_TRY(qs_fsdp_release(model->fsdp, u));
    }
    return QS_OK;
}

/* Back through the final norm: head_rows, now a gradient, to the rows of the micro-batch, zero
 * elsewhere. */
static qs_status scatter_gradient(qs_model *model, qs_micro_acts *micro, const qs_batch *batch)
{
    const int64_t hidden = model->config->hidden;
    const int64_t rows = micro->head.rows;
    qs_model_work *work = &model->work;
    gather_rows(micro, rows, hidden, work->rows);
    memset(work->d_rows, 0, (size_t)(rows * hidden) * sizeof(float));
    qs_mat x = qs_mat_of(work->rows, rows, hidden);
    qs_mat dy = qs_mat_of(micro->head_rows, rows, hidden);
    qs_mat dx = qs_mat_of(work->d_rows, rows, hidden);
    QS_TRY(model->ops->rmsnorm_backward(model->queue, &dy, &x, model->final_norm, micro->row_rstd,
                                        &dx));
    memset(micro->dx, 0, (size_t)(batch->n_tokens * hidden) * sizeof(float));
    for (int64_t i = 0; i < rows; i++) {
        memcpy(micro->dx + micro->target_row[i] * hidden, work->d_rows + i * hidden,
               (size_t)hidden * sizeof(float));
    }
    return QS_OK;
}

qs_status qs_head_end(qs_model *model, qs_micro_acts *micro, const qs_batch *batch,
                      float loss_scale, bool keep, double *loss_sum)
{
    qs_head_state state = state_for(micro, keep);
    /* the rows themselves are done with: their buffer takes the gradient */
    float *dx = keep ? micro->head_rows : NULL;
    *loss_sum = 0;
    if (state.rows == 0) {
        return QS_OK;
    }
    QS_TRY(model->ops->head_finish(model->queue, &state, loss_scale, model->work.row_loss, dx));
    for (int64_t i = 0; i < state.rows; i++) {
        *loss_sum += (double)model->work.row_loss[i];
    }
    return keep ? scatter_gradient(model, micro, batch) : QS_OK;
}
