/* LoRA gradients: partial sums of a rank's micro-batches, and their reduction along the slot tree
 * to the ranks that own the pieces. A step is qs_grads_begin; for each layer and slot qs_grads_slot
 * and qs_grads_add, from the last layer to the first; qs_grads_reduce of each layer when all of its
 * slots have passed; qs_grads_finish. */
#ifndef QS_FSDP_GRADS_H
#define QS_FSDP_GRADS_H

#include "comm/comm.h"
#include "fsdp/fsdp.h"
#include "kernels/ops.h"
#include "lora/lora.h"

typedef struct qs_grads qs_grads;

/** Partial sums of this rank's slots for all layers, and the buffers of the reduction, which takes
 * two levels where `levels` has them. Not collective. `slots`: micro-batches of a step over all
 * ranks; `group`: micro-batches per pass. A pass takes the next `group` slots of this rank's own
 * range (qs_slots_of), layer by layer; the buffers are counted for that order. */
qs_status qs_grads_create(qs_grads **out, const qs_lora_layout *layout, const qs_ops *ops,
                          const qs_levels *levels, qs_queue *compute, int64_t slots, int64_t group);
void qs_grads_destroy(qs_grads *grads);

/** Send the reductions through the queue of the gathers from now on, so that compute polls both.
 * Without it they are right, but move only while somebody waits for them. `fsdp` must outlive
 * `grads`; call before the first reduction. */
void qs_grads_attach(qs_grads *grads, qs_fsdp *fsdp);

/** Most bytes that a rank's qs_grads holds, for the plan. `per_host`: ranks of each host where sums
 * take two levels, else 0. */
size_t qs_grads_bytes(const qs_lora_layout *layout, int nranks, int per_host, int64_t slots,
                      int64_t group);

/** Start a step. */
void qs_grads_begin(qs_grads *grads);

/** Where the backward writes the gradient of layer `layer` for the micro-batch in slot `slot`:
 * *out [per_layer], zeroed. Within a layer, slots come in ascending order. One slot is open at a
 * time, until qs_grads_add; asked again for the open one, it gives the same buffer, not zeroed.
 * \return QS_ERR_BUG out of order; or why the buffer could not be zeroed. */
qs_status qs_grads_slot(qs_grads *grads, int layer, int64_t slot, float **out);

/** The slot's gradient is complete: fold it into the tree. */
qs_status qs_grads_add(qs_grads *grads, int layer, int64_t slot);

/** All slots of this rank have passed `layer`: start sending its nodes to the owners of the
 * shards. Collective. Two layers are under way at a time: a third waits for the first. */
qs_status qs_grads_reduce(qs_grads *grads, int layer);

/** Wait for all reductions and finish the trees: this rank's shard of the gradient, [n_layers *
 * shard_width]. Collective. Borrowed until the next qs_grads_begin. */
qs_status qs_grads_finish(qs_grads *grads, float **shard);

/** Time that compute stood still for reductions, since qs_grads_create. On a GPU it waits on its
 * own, and the host knows nothing of it. */
double qs_grads_wait_s(const qs_grads *grads);

/** Norm of the whole gradient: fp64 sums over 4,096-element chunks, all-gathered, added in layer
 * and chunk order. Collective. */
qs_status qs_grads_norm(qs_grads *grads, const float *shard, double *norm);

#endif
