/* Shards of a LoRA-shaped vector to full segments.
 *
 *   rank 0  | layer 0, chunks 0..p-1 | layer 1, chunks 0..p-1 | ...
 *   rank 1  | layer 0, chunks p..    | layer 1, chunks p..    | ...
 *   full    | layer 0 of rank 0, rank 1, ... | layer 1 of rank 0, rank 1, ... | ...
 *
 * What travels is the compute type: half the bytes on a GPU, and the master stays with its owner.
 *
 * An all-to-all in which everybody gets the same piece: unlike an all-gather it takes a short last
 * shard, so that every piece lands in its place, and neither a copy nor room for padding is needed.
 */
#include "base/mem.h"
#include "fsdp/fsdp.h"

enum { LAYERS_IN_FLIGHT = 8 }; /* enough to fill a network; bounds the requests that are open */

static qs_status gather_layers(const qs_lora_layout *layout, qs_comm *comm, qs_queue *queue,
                               const uint8_t *shard, size_t element, uint8_t *full,
                               size_t *exchange)
{
    const int nranks = qs_comm_nranks(comm), rank = qs_comm_rank(comm);
    const int64_t width = qs_lora_shard_width(layout, nranks);
    const size_t n = (size_t)nranks;
    size_t *send_bytes = exchange, *send_at = send_bytes + n;
    size_t *recv_bytes = send_at + n, *recv_at = recv_bytes + n;
    const qs_range mine = qs_lora_shard(layout, rank, nranks);
    for (int r = 0; r < nranks; r++) {
        qs_range theirs = qs_lora_shard(layout, r, nranks);
        send_bytes[r] = (size_t)(mine.end - mine.begin) * element;
        send_at[r] = 0;
        recv_bytes[r] = (size_t)(theirs.end - theirs.begin) * element;
        recv_at[r] = (size_t)theirs.begin * element;
    }
    qs_event landed[LAYERS_IN_FLIGHT] = {{0}};
    for (int l = 0; l < layout->n_layers; l++) {
        qs_event *slot = &landed[l % LAYERS_IN_FLIGHT];
        QS_TRY(qs_event_wait(*slot));
        QS_TRY(qs_comm_all_to_all_v(comm, shard + (size_t)(l * width) * element, send_bytes,
                                    send_at, full + (size_t)(l * layout->per_layer) * element,
                                    recv_bytes, recv_at, queue));
        *slot = qs_event_record(queue);
    }
    return qs_queue_wait(queue);
}

qs_status qs_lora_gather(const qs_lora_layout *layout, qs_comm *comm, qs_queue *queue,
                         const float *shard, float *full)
{
    size_t *exchange = NULL;
    QS_TRY(QS_ALLOC(&exchange, 4 * qs_comm_nranks(comm), QS_MEM_WORK));
    qs_status st = gather_layers(layout, comm, queue, (const uint8_t *)shard, sizeof *shard,
                                 (uint8_t *)full, exchange);
    qs_mem_free(exchange);
    return st;
}

qs_status qs_lora_gather_as(const qs_lora_layout *layout, const qs_ops *ops, qs_comm *comm,
                            qs_queue *queue, const float *shard, void *send, void *full)
{
    if (ops->act_dtype == QS_F32) {
        return qs_lora_gather(layout, comm, queue, shard, full);
    }
    const int64_t width = qs_lora_shard_width(layout, qs_comm_nranks(comm));
    size_t *exchange = NULL;
    QS_TRY(ops->convert(queue, shard, layout->n_layers * width, send));
    QS_TRY(QS_ALLOC(&exchange, 4 * qs_comm_nranks(comm), QS_MEM_WORK));
    qs_status st =
        gather_layers(layout, comm, queue, send, qs_dtype_bytes(ops->act_dtype), full, exchange);
    qs_mem_free(exchange);
    return st;
}
