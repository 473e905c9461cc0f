#include "fsdp/reduce_stage.h"

#include "base/mem.h"

int qs_reduce_stage_nodes(int64_t slots, const qs_range *ranges, int members, int *most)
{
    int total = 0;
    *most = 0;
    for (int m = 0; m < members; m++) {
        qs_slot_node nodes[QS_SLOT_NODES_MAX];
        const int n = qs_slot_nodes(slots, ranges[m], nodes);
        total += n;
        *most = n > *most ? n : *most;
    }
    return total;
}

qs_status qs_reduce_stage_create(qs_reduce_stage *stage, qs_comm *comm, int members, int sets,
                                 int64_t slots, const qs_range *ranges, int64_t width)
{
    *stage = (qs_reduce_stage){.comm = comm, .members = members, .sets = sets, .width = width};
    stage->n_nodes = qs_reduce_stage_nodes(slots, ranges, members, &stage->most_nodes);
    QS_TRY(QS_ALLOC(&stage->first_node, members + 1, QS_MEM_LORA_GRAD));
    QS_TRY(QS_ALLOC(&stage->nodes, stage->n_nodes, QS_MEM_LORA_GRAD));
    QS_TRY(QS_ALLOC(&stage->exchange, 4 * members, QS_MEM_LORA_GRAD));
    for (int m = 0, at = 0; m < members; m++) {
        qs_slot_node nodes[QS_SLOT_NODES_MAX];
        const int n = qs_slot_nodes(slots, ranges[m], nodes);
        for (int i = 0; i < n; i++) {
            stage->nodes[at++] = nodes[i];
        }
        stage->first_node[m + 1] = at;
    }
    return QS_OK;
}

void qs_reduce_stage_destroy(qs_reduce_stage *stage)
{
    qs_mem_free(stage->first_node);
    qs_mem_free(stage->nodes);
    qs_mem_free(stage->exchange);
}

int64_t qs_reduce_stage_floats(const qs_reduce_stage *stage)
{
    return stage->sets * stage->n_nodes * stage->width;
}

/* Floats in front of the piece. */
static int64_t place_of(const qs_reduce_stage *stage, int set, int i)
{
    return ((int64_t)set * stage->n_nodes + i) * stage->width;
}

float *qs_reduce_stage_piece(const qs_reduce_stage *stage, int set, int i, float *received)
{
    return received + place_of(stage, set, i);
}

qs_status qs_reduce_stage_send(qs_reduce_stage *stage, int k, int set, const float *sum,
                               const qs_reduce_piece *pieces, int64_t own, float *received,
                               qs_queue *queue)
{
    const size_t n = (size_t)stage->members;
    size_t *send_bytes = stage->exchange, *send_at = send_bytes + n;
    size_t *recv_bytes = send_at + n, *recv_at = recv_bytes + n;
    for (int m = 0; m < stage->members; m++) {
        const int node = stage->first_node[m] + k;
        const int64_t coming = node < stage->first_node[m + 1] ? own : 0;
        const int64_t going = sum != NULL ? pieces[m].count : 0;
        send_bytes[m] = (size_t)going * sizeof *sum;
        send_at[m] = going > 0 ? (size_t)pieces[m].at * sizeof *sum : 0;
        recv_bytes[m] = (size_t)coming * sizeof *sum;
        recv_at[m] = coming > 0 ? (size_t)place_of(stage, set, node) * sizeof *sum : 0;
    }
    return qs_comm_all_to_all_v(stage->comm, sum != NULL ? sum : received, send_bytes, send_at,
                                received, recv_bytes, recv_at, queue);
}

qs_status qs_reduce_stage_add(const qs_reduce_stage *stage, int set, const qs_tree *tree,
                              float *received, qs_partials *stack)
{
    stack->depth = 0;
    for (int i = 0; i < stage->n_nodes; i++) {
        const qs_partial part = {.node = stage->nodes[i],
                                 .sum = qs_reduce_stage_piece(stage, set, i, received)};
        QS_TRY(qs_partials_push(stack, part, tree, NULL));
    }
    return QS_OK;
}
