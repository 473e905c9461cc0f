/* Who owns what: contiguous equal shares, and the fixed binary tree over the slots of a step.
 * Arithmetic only. */
#ifndef QS_SHARD_SHARD_H
#define QS_SHARD_SHARD_H

#include <stdint.h>

/** Half-open range. */
typedef struct {
    int64_t begin, end;
} qs_range;

/** Elements per rank when `total` is cut in equal contiguous shares: ceil(total / nranks). */
int64_t qs_shard_width(int64_t total, int nranks);

/** Rank r's share: [r p, (r+1) p) cut at total, p = qs_shard_width; empty past the end. */
qs_range qs_shard_of(int64_t total, int rank, int nranks);

/** The rank that owns element `index`. */
int qs_shard_owner(int64_t total, int64_t index, int nranks);

/* ---- the slot tree ----
 * The micro-batches of a step are numbered 0..slots-1 over all ranks. Their gradients are added
 * along one fixed binary tree: node (level k, index i) covers slots [i 2^k, (i+1) 2^k), and is the
 * sum of its two children, left + right; a child beyond the last slot is skipped. A rank with a
 * contiguous range of slots computes the largest nodes that lie wholly inside its range (a node
 * that reaches past the last slot counts as inside when its slots below `slots` are), sends those,
 * and the receiver finishes the tree: the same additions in the same order for every number of
 * ranks. */

enum { QS_SLOT_NODES_MAX = 128 };

typedef struct {
    int level;
    int64_t index;
} qs_slot_node;

/** Slots of rank r: the balanced contiguous cut [r * slots / nranks, (r+1) * slots / nranks). */
qs_range qs_slots_of(int64_t slots, int rank, int nranks);

/** The largest tree nodes inside `range`, in slot order. \return how many (at most
 * QS_SLOT_NODES_MAX). */
int qs_slot_nodes(int64_t slots, qs_range range, qs_slot_node out[QS_SLOT_NODES_MAX]);

/** True if node `left` is a left child and `right` its sibling. */
int qs_slot_siblings(qs_slot_node left, qs_slot_node right);

/** True if `node` is a left child whose sibling lies wholly beyond `slots`, so that it is its
 * parent's value. */
int qs_slot_alone(int64_t slots, qs_slot_node node);

qs_slot_node qs_slot_parent(qs_slot_node node);

#endif
