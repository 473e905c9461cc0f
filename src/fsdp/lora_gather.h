/* LoRA weights: from the ranks that own and update the pieces to all. */
#ifndef QS_FSDP_LORA_GATHER_H
#define QS_FSDP_LORA_GATHER_H

#include "comm/comm.h"
#include "kernels/ops.h"
#include "lora/lora.h"

/** Gather a sharded LoRA-shaped vector [n_layers * shard_width] to full segments [n_layers *
 * per_layer]; with two levels, first from other hosts, each piece to one rank of the host, then
 * inside. `exchange` [4 * nranks] is scratch. Collective; waits until `queue` is empty. */
qs_status qs_lora_gather(const qs_lora_layout *layout, const qs_levels *levels, qs_queue *queue,
                         size_t *exchange, const float *shard, float *full);

/** The same, rounded to the ops' act_dtype on the way. `send` [n_layers * shard_width] of that type
 * is scratch on the device; not used, and may be NULL, where that type is fp32. */
qs_status qs_lora_gather_as(const qs_lora_layout *layout, const qs_ops *ops,
                            const qs_levels *levels, qs_queue *queue, size_t *exchange,
                            const float *shard, void *send, void *full);

/** DoRA's magnitudes of the vector alone, in fp32: to full [n_layers * qs_lora_magnitudes]. `send`
 * [n_layers * qs_lora_magnitude_width] is scratch on the device. Collective; waits. */
qs_status qs_lora_gather_magnitudes(const qs_lora_layout *layout, const qs_levels *levels,
                                    qs_queue *queue, size_t *exchange, const float *shard,
                                    float *send, float *full);

#endif
