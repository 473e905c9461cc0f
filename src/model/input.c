/* What the operations read of a micro-batch, brought to the device in one copy. The arrays lie one
 * behind the other in the mirror, the losses that come back at its end:
 *
 *   | position | cu_seqlens | sample | row_at | target_row | head_target || row_loss | */
#include <string.h>

#include "model/model_impl.h"

/* Hands out the pieces of the mirror: the same walk for the size, for the host and for the device.
 */
static void *take(char *base, size_t *used, int64_t count, size_t size)
{
    enum { ALIGNMENT = 256 };
    void *at = base != NULL ? base + *used : NULL;
    *used += ((size_t)count * size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return at;
}

/* The arrays in a buffer at `base`; *pushed is where row_loss begins. Returns the size of all. */
static size_t lay_out(const qs_model_shape *shape, void *base, qs_input_arrays *out, size_t *pushed)
{
    const int64_t t = shape->max_tokens, r = shape->max_targets;
    size_t used = 0;
    out->position = take(base, &used, t, sizeof *out->position);
    out->cu_seqlens = take(base, &used, t + 1, sizeof *out->cu_seqlens);
    out->sample = take(base, &used, t, sizeof *out->sample);
    out->row_at = take(base, &used, t, sizeof *out->row_at);
    out->target_row = take(base, &used, r, sizeof *out->target_row);
    out->head_target = take(base, &used, r, sizeof *out->head_target);
    *pushed = used;
    out->row_loss = take(base, &used, r, sizeof *out->row_loss);
    return used;
}

size_t qs_input_bytes(const qs_model_shape *shape)
{
    qs_input_arrays arrays;
    size_t pushed = 0;
    return lay_out(shape, NULL, &arrays, &pushed);
}

qs_status qs_input_create(qs_model *m, qs_micro_input *input)
{
    const size_t bytes = qs_input_bytes(&m->shape);
    QS_TRY(qs_mirror_create(m->device, &input->mirror, bytes, QS_MEM_DATA));
    lay_out(&m->shape, input->mirror.host, &input->host, &input->pushed_bytes);
    lay_out(&m->shape, input->mirror.device, &input->device, &input->pushed_bytes);
    return QS_OK;
}

static void copy_to(void *to, const void *from, int64_t count, size_t size)
{
    memcpy(to, from, (size_t)count * size);
}

qs_status qs_input_load(qs_model *m, qs_micro_acts *micro, const qs_batch *batch)
{
    qs_micro_input *input = &micro->input;
    qs_input_arrays *to = &input->host;
    copy_to(to->position, batch->position, batch->n_tokens, sizeof *to->position);
    copy_to(to->cu_seqlens, batch->cu_seqlens, batch->n_docs + 1, sizeof *to->cu_seqlens);
    copy_to(to->sample, batch->sample, batch->n_tokens, sizeof *to->sample);
    copy_to(to->row_at, batch->row_at, batch->n_tokens, sizeof *to->row_at);
    int64_t rows = 0;
    for (int64_t t = 0; t < batch->n_tokens; t++) {
        if (batch->target[t] >= 0) {
            to->target_row[rows] = (int32_t)t;
            to->head_target[rows] = batch->target[t];
            rows++;
        }
    }
    micro->head.rows = rows;
    input->longest = 0;
    for (int d = 0; d < batch->n_docs; d++) {
        const int64_t length = batch->cu_seqlens[d + 1] - batch->cu_seqlens[d];
        input->longest = length > input->longest ? length : input->longest;
    }
    return qs_mirror_push(m->queue, &input->mirror, 0, input->pushed_bytes);
}
