/* Partial sums along the slot tree, on the side that computes gradients and on the side that
 * finishes them.
 *
 * Slots come in ascending order, so the nodes that wait for their sibling are the digits of a
 * binary counter: after slots 0..5 they are (0..3) and (4, 5). Whoever adds in this order makes the
 * additions of the tree and no others. */
#include "fsdp/partials.h"

#include "base/minmax.h"

qs_status qs_partials_push(qs_partials *stack, qs_partial partial, const qs_tree *tree,
                           qs_float_pool *pool)
{
    stack->at[stack->depth++] = partial;
    for (;;) {
        qs_partial *last = &stack->at[stack->depth - 1];
        if (qs_slot_alone(tree->slots, last->node)) {
            last->node = qs_slot_parent(last->node);
            continue;
        }
        if (stack->depth < 2 || !qs_slot_siblings(last[-1].node, last->node)) {
            return QS_OK;
        }
        QS_TRY(tree->ops->accumulate(tree->compute, last[-1].sum, last->sum, tree->count));
        if (pool != NULL) {
            pool->free[pool->count++] = last->sum;
        }
        stack->depth--;
        last[-1].node = qs_slot_parent(last[-1].node);
    }
}

/* Nodes that wait after the first `done` slots of `range`. */
static int waiting(int64_t slots, qs_range range, int64_t done)
{
    qs_slot_node nodes[QS_SLOT_NODES_MAX];
    return qs_slot_nodes(slots, (qs_range){range.begin, range.begin + done}, nodes);
}

int qs_partials_buffers(int n_layers, int64_t slots, int nranks, int rank, int64_t group,
                        int in_flight)
{
    qs_range range = qs_slots_of(slots, rank, nranks);
    int64_t n = range.end - range.begin;
    int64_t passes = ((slots + nranks - 1) / nranks + group - 1) / group;
    int most = 0;
    for (int64_t pass = 0; pass < passes; pass++) {
        int64_t from = qs_min_i64(pass * group, n), to = qs_min_i64((pass + 1) * group, n);
        int before = waiting(slots, range, from), after = waiting(slots, range, to);
        int during = after;
        for (int64_t done = from; done < to; done++) {
            int with_open = waiting(slots, range, done) + 1;
            during = with_open > during ? with_open : during;
        }
        for (int passed = 0; passed < n_layers; passed++) {
            int kept = pass < passes - 1 || passed < in_flight ? passed : in_flight;
            int held = kept * after + during + (n_layers - 1 - passed) * before;
            most = held > most ? held : most;
        }
    }
    return most;
}
