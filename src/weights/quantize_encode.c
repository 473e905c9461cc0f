/* NF4 from the floats of a checkpoint, on whatever device the operations run on: a piece of the
 * source goes there through a buffer that both sides see, its codes and absmax come back. The
 * second level needs the mean of all absmax of a tensor, which the host adds up in order, and so
 * the device keeps them until the last piece. The bytes are the same on every device. */
#include <string.h>

#include "quant/nf4.h"
#include "weights/quantize_impl.h"

/* ---- room ---- */

/* Elements of the largest tensor that is to be quantized, 0 if all are NF4 already. */
static int64_t largest_tensor(const qs_plan *plan)
{
    int64_t largest = 0;
    for (int u = 0; u <= plan->index->n_units; u++) {
        const qs_base_unit *unit = qs_plan_unit(plan, u);
        for (int i = 0; i < unit->n_tensors; i++) {
            const int64_t count = qs_base_tensor_count(&unit->tensors[i]);
            const bool encoded =
                unit->tensors[i].kind == QS_TENSOR_NF4 && plan->sources[u][i].absmax == NULL;
            largest = encoded && count > largest ? count : largest;
        }
    }
    return largest;
}

/* A piece also holds a quantum of a raw table, which a wide row may fill alone. */
static size_t largest_piece(const qs_plan *plan)
{
    size_t largest = QS_PIECE_BYTES;
    for (int u = 0; u < plan->index->n_units; u++) {
        const size_t raw = qs_raw_quantum_bytes(&plan->index->units[u].size);
        largest = raw > largest ? raw : largest;
    }
    return largest;
}

static qs_status make_room(qs_encoder *e, const qs_plan *plan)
{
    const int64_t quanta = qs_nf4_quanta(largest_tensor(plan));
    const int64_t blocks = quanta * QS_NF4_QUANTUM_BLOCKS;
    const size_t packed = (size_t)QS_PIECE_QUANTA * QS_NF4_QUANTUM_PACKED_BYTES;
    QS_TRY(qs_mirror_create(e->device, &e->source, largest_piece(plan), QS_MEM_WORK));
    QS_TRY(qs_mirror_create(e->device, &e->packed, packed, QS_MEM_WORK));
    QS_TRY(qs_mirror_create(e->device, &e->zero_blocks, sizeof(int64_t), QS_MEM_WORK));
    QS_TRY(qs_mirror_create(e->device, &e->absmax, (size_t)blocks * sizeof(float), QS_MEM_WORK));
    QS_TRY(QS_DEVICE_ALLOC(e->device, &e->absmax8, blocks, QS_MEM_WORK));
    return QS_DEVICE_ALLOC(e->device, &e->absmax32, quanta, QS_MEM_WORK);
}

qs_status qs_encoder_open(qs_encoder *e, const qs_backend *backend, const qs_plan *plan,
                          int threads)
{
    *e = (qs_encoder){.device = backend != NULL ? backend->device : qs_device_cpu(),
                      .ops = backend != NULL ? backend->ops : qs_ops_cpu()};
    qs_status st = qs_queue_create_on(e->device, &e->queue, threads);
    if (st == QS_OK) {
        st = make_room(e, plan);
    }
    if (st != QS_OK) {
        qs_encoder_close(e);
    }
    return st;
}

void qs_encoder_close(qs_encoder *e)
{
    if (e->device == NULL) {
        return;
    }
    if (e->queue != NULL) {
        (void)qs_queue_wait(e->queue); /* after a failure, the buffers may still be in use */
    }
    qs_mirror *const mirrors[] = {&e->source, &e->packed, &e->zero_blocks, &e->absmax};
    for (size_t i = 0; i < sizeof mirrors / sizeof *mirrors; i++) {
        qs_mirror_destroy(e->device, mirrors[i]);
    }
    qs_device_free(e->device, e->absmax8);
    qs_device_free(e->device, e->absmax32);
    qs_queue_destroy(e->queue);
    *e = (qs_encoder){0};
}

/* ---- the two levels ---- */

/* The queue's part of a piece; the host looks at the numbers meanwhile. */
static qs_status start_piece(qs_encoder *e, qs_dtype dtype, int64_t first, int64_t count)
{
    const int64_t block = first / QS_NF4_BLOCK;
    const int64_t blocks = (count + QS_NF4_BLOCK - 1) / QS_NF4_BLOCK;
    QS_TRY(qs_mirror_push(e->queue, &e->source, 0, (size_t)count * qs_dtype_bytes(dtype)));
    QS_TRY(e->ops->nf4_quantize_blocks(e->queue, e->source.device, dtype, count, e->packed.device,
                                       (float *)e->absmax.device + block, e->zero_blocks.device));
    QS_TRY(qs_mirror_pull(e->queue, &e->packed, 0, (size_t)(count + 1) / 2));
    QS_TRY(qs_mirror_pull(e->queue, &e->absmax, (size_t)block * sizeof(float),
                          (size_t)blocks * sizeof(float)));
    return qs_mirror_pull(e->queue, &e->zero_blocks, 0, sizeof(int64_t));
}

qs_status qs_encoder_piece(qs_encoder *e, qs_dtype dtype, int64_t first, int64_t count,
                           int64_t *zero_blocks, bool *finite)
{
    memset(e->packed.host, QS_NF4_ZERO_BYTE,
           (size_t)(qs_nf4_quanta(count) * QS_NF4_QUANTUM_PACKED_BYTES));
    QS_TRY(start_piece(e, dtype, first, count));
    *finite = qs_all_finite(e->source.host, dtype, count);
    QS_TRY(qs_queue_wait(e->queue));
    *zero_blocks = *(const int64_t *)e->zero_blocks.host;
    return QS_OK;
}

static float mean_of(const float *absmax, int64_t n)
{
    double sum = 0.0;
    for (int64_t i = 0; i < n; i++) {
        sum += (double)absmax[i];
    }
    return (float)(sum / (double)n);
}

qs_status qs_encoder_finish(qs_encoder *e, int64_t blocks, float *offset, uint8_t *absmax8,
                            float *absmax32)
{
    const size_t groups = (size_t)(blocks + QS_NF4_QUANTUM_BLOCKS - 1) / QS_NF4_QUANTUM_BLOCKS;
    *offset = mean_of(e->absmax.host, blocks);
    QS_TRY(e->ops->nf4_quantize_absmax(e->queue, e->absmax.device, blocks, *offset, e->absmax8,
                                       e->absmax32));
    QS_TRY(qs_queue_copy(e->queue, absmax8, e->absmax8, (size_t)blocks));
    QS_TRY(qs_queue_copy(e->queue, absmax32, e->absmax32, groups * sizeof *absmax32));
    return qs_queue_wait(e->queue);
}
