/* One exchange of the reduction: partial sums of the slot tree go, cut in pieces, from the ranks
 * that made them to those that own the pieces, and the owners carry the tree on.
 *
 *   members and their slots      0 1 2 | 3 4 5
 *   nodes, k = 0 and k = 1       (0 1) (2) | (3) (4 5)
 *   a member's pieces of them    (0 1), (2), (3), (4 5)  ->  ((0 1) + (2 3)) + (4 5)
 *
 * Which nodes a member has is arithmetic on its slots, so no sizes are exchanged; the k-th nodes of
 * all members travel together. With one level all ranks are the members of one stage. With two, the
 * ranks of a host are, and collect pieces for their peers on other hosts as well (a set for each);
 * then a second stage takes what is left of a host's tree across. */
#ifndef QS_FSDP_REDUCE_STAGE_H
#define QS_FSDP_REDUCE_STAGE_H

#include "comm/comm.h"
#include "fsdp/partials.h"

typedef struct {
    qs_comm *comm;
    int members, sets;
    int64_t width;           /* floats from one piece to the next where they arrive */
    int n_nodes, most_nodes; /* of all members together, and the most that one has */
    int *first_node;         /* [members + 1] */
    qs_slot_node *nodes;     /* [n_nodes] in slot order */
    size_t *exchange;        /* [4 members] bytes and offsets */
} qs_reduce_stage;

/** Where a piece lies in a sum. In floats. */
typedef struct {
    int64_t at, count;
} qs_reduce_piece;

/** Nodes of all members together, where member m has `ranges`[m] of the `slots`; the most that one
 * of them has in *most. */
int qs_reduce_stage_nodes(int64_t slots, const qs_range *ranges, int members, int *most);

/** `comm` has `members` ranks, whose slots are `ranges` [members], neighbours in order. */
qs_status qs_reduce_stage_create(qs_reduce_stage *stage, qs_comm *comm, int members, int sets,
                                 int64_t slots, const qs_range *ranges, int64_t width);
void qs_reduce_stage_destroy(qs_reduce_stage *stage);

/** Floats that arrive: [sets, n_nodes, width]. */
int64_t qs_reduce_stage_floats(const qs_reduce_stage *stage);

/** Exchange the k-th nodes for `set`: of `sum` (NULL: this member has none) member m gets
 * pieces[m], and `own` floats come from each that has a k-th node. Asynchronous on `queue`;
 * `received` is the buffer of qs_reduce_stage_floats. Collective over the members. */
qs_status qs_reduce_stage_send(qs_reduce_stage *stage, int k, int set, const float *sum,
                               const qs_reduce_piece *pieces, int64_t own, float *received,
                               qs_queue *queue);

/** Make the additions of the tree on what has arrived for `set`, tree->count floats each, in place:
 * a node's sum ends where its first slot's lay. `stack` has room for n_nodes + 1. */
qs_status qs_reduce_stage_add(const qs_reduce_stage *stage, int set, const qs_tree *tree,
                              float *received, qs_partials *stack);

/** The piece of `set` that belongs to the i-th node. */
float *qs_reduce_stage_piece(const qs_reduce_stage *stage, int set, int i, float *received);

#endif
