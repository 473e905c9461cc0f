/* Partial sums of the slot tree: the nodes that wait for their sibling. */
#ifndef QS_FSDP_PARTIALS_H
#define QS_FSDP_PARTIALS_H

#include "device/device.h"
#include "kernels/ops.h"
#include "shard/shard.h"

/** A node of the tree and its sum. */
typedef struct {
    qs_slot_node node;
    float *sum;
} qs_partial;

/** The nodes that wait for a sibling, in slot order: the digits of a binary counter. */
typedef struct {
    qs_partial *at;
    int depth;
} qs_partials;

/** Buffers of one size, handed out last in, first out. */
typedef struct {
    float **free;
    int count;
} qs_float_pool;

/** What the additions need. */
typedef struct {
    const qs_ops *ops;
    qs_queue *compute;
    int64_t slots;
    int64_t count; /* elements of a sum */
} qs_tree;

/** Push a node and carry: as long as the last two are siblings, left += right, and the right
 * buffer goes to `pool` (NULL: nowhere); a node without a sibling rises. */
qs_status qs_partials_push(qs_partials *stack, qs_partial partial, const qs_tree *tree,
                           qs_float_pool *pool);

/** Gradient buffers that a rank with `range` of the slots holds at most, in passes of `group`
 * slots through `n_layers`. In the last pass a layer's buffers are free again when its reduction,
 * one of `in_flight`, has ended. */
int qs_partials_buffers(int n_layers, int64_t slots, int nranks, int rank, int64_t group,
                        int in_flight);

#endif
