/* The head and the loss in one pass over the vocabulary.
 *
 * The head is frozen, so its gradient is not wanted, and loss and dX together are attention of the
 * rows over the vocabulary with keys = values = W: the running maximum m, the sum Z = sum exp(l -
 * m) and O = sum exp(l - m) W are all that is kept, then loss = m + log Z - l[target] and dX = O /
 * Z - W[target]. The T x V logits never exist, and each chunk is gathered once. Only rows that
 * carry loss take part. A cap of the logits is the operation's. */
#include "model/flops.h"
#include "model/model_impl.h"

/* The rows of the micro-batch that carry loss, as they leave the last layer, in work.rows. */
static qs_status loss_rows(qs_model *model, const qs_micro_acts *micro, qs_mat *rows)
{
    const qs_mat x = qs_model_stream(model, micro->x_last, model->shape.max_tokens);
    *rows = qs_model_stream(model, model->work.rows, micro->head.rows);
    return model->ops->gather_rows(model->queue, &x, micro->input.device.target_row, rows);
}

/* The rows through the final norm into head_rows. */
static qs_status norm_rows(qs_model *model, qs_micro_acts *micro)
{
    qs_mat x;
    QS_TRY(loss_rows(model, micro, &x));
    qs_mat y = qs_model_mat(model, micro->head_rows, x.rows, x.cols, 0);
    return model->ops->rmsnorm_forward(model->queue, &x, model->final_norm, model->stream_eps,
                                       micro->row_rstd, &y);
}

qs_status qs_head_begin(qs_model *model, qs_micro_acts *micro)
{
    qs_head_state *head = &micro->head;
    head->hidden = model->config->hidden;
    head->cap = model->config->final_cap;
    head->x = micro->head_rows;
    head->target = micro->input.device.head_target;
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

qs_status qs_head_run(qs_model *model, int64_t count, bool keep)
{
    const int chunks = qs_base_head_chunks(model->index);
    for (int c = 0; c < chunks; c++) {
        const int u = qs_base_head_unit(model->index, c);
        const qs_base_unit *unit = &model->index->units[u];
        const qs_weight w = qs_model_weight(model, &unit->tensors[0]);
        qs_unit_view view;
        QS_TRY(qs_fsdp_acquire(model->fsdp, u, &view));
        for (int64_t g = 0; g < count; g++) {
            qs_head_state state = state_for(&model->micro[g], keep);
            if (state.rows == 0) {
                continue;
            }
            QS_TRY(model->ops->head_chunk(model->queue, &view, &w,
                                          c * model->index->head_chunk_rows, &state));
            model->flops += qs_flops_head(model->config, (double)state.rows, (double)w.out, keep);
        }
        QS_TRY(qs_fsdp_release(model->fsdp, u));
    }
    return QS_OK;
}

/* Back through the final norm: head_rows, now a gradient, to the rows of the micro-batch, zero
 * elsewhere. */
static qs_status scatter_gradient(qs_model *model, qs_micro_acts *micro, int64_t n_tokens)
{
    qs_mat x;
    QS_TRY(loss_rows(model, micro, &x));
    const qs_mat dy = qs_model_mat(model, micro->head_rows, x.rows, x.cols, 0);
    qs_mat d_rows = qs_model_mat(model, model->work.d_rows, x.rows, x.cols, 0);
    qs_mat dx = qs_model_mat(model, micro->dx, n_tokens, x.cols, model->border);
    QS_TRY(qs_queue_zero(model->queue, d_rows.data, (size_t)(x.rows * x.cols) * model->act_bytes));
    QS_TRY(model->ops->rmsnorm_backward(model->queue, &dy, &x, model->final_norm, micro->row_rstd,
                                        &d_rows));
    return model->ops->scatter_rows(model->queue, &d_rows, micro->input.device.target_row, &dx);
}

qs_status qs_head_end(qs_model *model, qs_micro_acts *micro, int64_t n_tokens, float loss_scale,
                      bool keep)
{
    const qs_micro_input *input = &micro->input;
    qs_head_state state = state_for(micro, keep);
    /* the rows themselves are done with: their buffer takes the gradient */
    void *dx = keep ? micro->head_rows : NULL;
    if (state.rows == 0) {
        return QS_OK;
    }
    QS_TRY(model->ops->head_finish(model->queue, &state, loss_scale, input->device.row_loss, dx));
    QS_TRY(qs_mirror_pull(model->queue, &input->mirror, input->pushed_bytes,
                          (size_t)state.rows * sizeof(float)));
    return keep ? scatter_gradient(model, micro, n_tokens) : QS_OK;
}

double qs_head_loss(const qs_micro_acts *micro)
{
    double sum = 0;
    for (int64_t i = 0; i < micro->head.rows; i++) {
        sum += (double)micro->input.host.row_loss[i];
    }
    return sum;
}
