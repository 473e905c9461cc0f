/* Gradients of a step: partial sums of this rank's slots, their way to the owners, and the owners'
 * end of the tree.
 *
 *   slots of rank 0 and 1     0 1 2 | 3 4 5
 *   nodes, a buffer each      (0 1) (2) | (3) (4 5)
 *   owner of a shard          its pieces of (0 1), (2), (3), (4 5)  ->  ((0 1) + (2 3)) + (4 5)
 *
 * Which nodes a rank has is arithmetic, so no sizes are exchanged. The k-th nodes of all ranks
 * travel together, straight from the buffers they were summed in. The result has the bits of one
 * rank's tree, whatever the number of ranks. */
#include <math.h>
#include <string.h>

#include "base/mem.h"
#include "fsdp/fsdp_impl.h"

enum { IN_FLIGHT = 2 };

/* A reduction that is under way. */
typedef struct {
    int layer; /* -1: none */
    qs_event landed;
    float *received; /* [n_nodes * width] pieces of all ranks' nodes, in slot order */
} reduction;

struct qs_grads {
    qs_lora_layout layout;
    qs_comm *comm;
    qs_device *device;
    qs_queue *compute, *queue;
    bool own_queue;
    int rank, nranks;
    qs_range slots;   /* of this rank */
    qs_range shard;   /* of this rank within a layer, in elements */
    int64_t width;    /* of a shard, padded */
    qs_tree add_full; /* additions of whole gradients / of shard pieces */
    qs_tree add_shard;

    int n_nodes, most_nodes; /* of all ranks together, and the most that one rank has */
    int *first_node;         /* [nranks + 1] numbers of each rank's nodes */
    qs_slot_node *nodes;     /* [n_nodes] */
    int n_buffers;           /* gradients that are held at most */
    float *buffers;          /* [n_buffers * per_layer] */
    qs_float_pool pool;      /* those that are free */
    qs_partial *partials;    /* [n_layers * room] behind the stacks */
    qs_partials *stacks;     /* [n_layers] */
    int64_t *added;          /* [n_layers] slots folded so far */
    bool *reduced;           /* [n_layers] */
    float *open;             /* the buffer handed out by qs_grads_slot, NULL: none */
    int open_layer;
    int started; /* reductions of this step */
    reduction flights[IN_FLIGHT];
    qs_partials finish; /* stack of the finishing tree [n_nodes + 1] */
    float *result;      /* [n_layers * width] */
    qs_mirror sums;     /* [n_layers * p] doubles: squares of this rank's chunks */
    double *all_sums;   /* [nranks * n_layers * p] */
    size_t *exchange;   /* [4 nranks] bytes and offsets */
};

/* ---- sizes ---- */

static int count_nodes(int64_t slots, int nranks, int *most)
{
    int total = 0;
    *most = 0;
    for (int r = 0; r < nranks; r++) {
        qs_slot_node nodes[QS_SLOT_NODES_MAX];
        int n = qs_slot_nodes(slots, qs_slots_of(slots, r, nranks), nodes);
        total += n;
        *most = n > *most ? n : *most;
    }
    return total;
}

size_t qs_grads_bytes(const qs_lora_layout *layout, int nranks, int64_t slots, int64_t group)
{
    size_t layers = (size_t)layout->n_layers, buffers = 0;
    for (int r = 0; r < nranks; r++) {
        int n = qs_partials_buffers(layout->n_layers, slots, nranks, r, group, IN_FLIGHT);
        buffers = (size_t)n > buffers ? (size_t)n : buffers;
    }
    int most;
    size_t width = (size_t)qs_lora_shard_width(layout, nranks);
    size_t nodes = (size_t)count_nodes(slots, nranks, &most);
    size_t floats =
        buffers * (size_t)layout->per_layer + IN_FLIGHT * nodes * width + layers * width;
    size_t sums = layers * (width / QS_LORA_CHUNK) * ((size_t)nranks + 1);
    return floats * sizeof(float) + sums * sizeof(double);
}

/* ---- create, destroy ---- */

static qs_status list_nodes(qs_grads *g, int64_t slots)
{
    g->n_nodes = count_nodes(slots, g->nranks, &g->most_nodes);
    QS_TRY(QS_ALLOC(&g->first_node, g->nranks + 1, QS_MEM_LORA_GRAD));
    QS_TRY(QS_ALLOC(&g->nodes, g->n_nodes, QS_MEM_LORA_GRAD));
    for (int r = 0, at = 0; r < g->nranks; r++) {
        qs_slot_node nodes[QS_SLOT_NODES_MAX];
        int n = qs_slot_nodes(slots, qs_slots_of(slots, r, g->nranks), nodes);
        memcpy(g->nodes + at, nodes, (size_t)n * sizeof *nodes);
        at += n;
        g->first_node[r + 1] = at;
    }
    return QS_OK;
}

static qs_status allocate(qs_grads *g)
{
    const int layers = g->layout.n_layers;
    const int room = QS_SLOT_NODES_MAX;
    QS_TRY(QS_DEVICE_ALLOC(g->device, &g->buffers, g->n_buffers * g->layout.per_layer,
                           QS_MEM_LORA_GRAD));
    QS_TRY(QS_ALLOC(&g->pool.free, g->n_buffers, QS_MEM_LORA_GRAD));
    QS_TRY(QS_ALLOC(&g->partials, layers * room, QS_MEM_LORA_GRAD));
    QS_TRY(QS_ALLOC(&g->stacks, layers, QS_MEM_LORA_GRAD));
    for (int l = 0; l < layers; l++) {
        g->stacks[l].at = g->partials + l * room;
    }
    QS_TRY(QS_ALLOC(&g->added, layers, QS_MEM_LORA_GRAD));
    QS_TRY(QS_ALLOC(&g->reduced, layers, QS_MEM_LORA_GRAD));
    for (int i = 0; i < IN_FLIGHT; i++) {
        QS_TRY(QS_DEVICE_ALLOC(g->device, &g->flights[i].received, g->n_nodes * g->width,
                               QS_MEM_LORA_GRAD));
    }
    QS_TRY(QS_ALLOC(&g->finish.at, g->n_nodes + 1, QS_MEM_LORA_GRAD));
    QS_TRY(QS_DEVICE_ALLOC(g->device, &g->result, layers * g->width, QS_MEM_LORA_GRAD));
    const int64_t chunks = layers * (g->width / QS_LORA_CHUNK);
    QS_TRY(
        qs_mirror_create(g->device, &g->sums, (size_t)chunks * sizeof(double), QS_MEM_LORA_GRAD));
    QS_TRY(QS_ALLOC(&g->all_sums, g->nranks * chunks, QS_MEM_LORA_GRAD));
    return QS_ALLOC(&g->exchange, 4 * g->nranks, QS_MEM_LORA_GRAD);
}

qs_status qs_grads_create(qs_grads **out, const qs_lora_layout *layout, const qs_ops *ops,
                          qs_comm *comm, qs_queue *compute, int64_t slots, int64_t group)
{
    qs_status st = QS_OK;
    qs_grads *g = NULL;
    *out = NULL;
    if (slots < 1 || group < 1) {
        return QS_FAIL(QS_ERR_BUG, "gradients of %lld slots in groups of %lld: both start at 1",
                       (long long)slots, (long long)group);
    }
    QS_TRY(QS_ALLOC(&g, 1, QS_MEM_LORA_GRAD));
    g->layout = *layout;
    g->comm = comm;
    g->device = qs_queue_device(compute);
    g->compute = compute;
    g->rank = qs_comm_rank(comm);
    g->nranks = qs_comm_nranks(comm);
    g->slots = qs_slots_of(slots, g->rank, g->nranks);
    g->shard = qs_lora_shard(layout, g->rank, g->nranks);
    g->width = qs_lora_shard_width(layout, g->nranks);
    g->add_full = (qs_tree){ops, compute, slots, layout->per_layer};
    g->add_shard = (qs_tree){ops, compute, slots, g->shard.end - g->shard.begin};
    g->n_buffers =
        qs_partials_buffers(layout->n_layers, slots, g->nranks, g->rank, group, IN_FLIGHT);
    g->flights[0].layer = g->flights[1].layer = -1;
    QS_GOTO(list_nodes(g, slots));
    QS_GOTO(allocate(g));
    QS_GOTO(qs_queue_create_on(g->device, &g->queue, 1));
    g->own_queue = true;
    qs_grads_begin(g);
    *out = g;
done:
    if (st != QS_OK) {
        qs_grads_destroy(g);
    }
    return st;
}

static void wait_for_flights(qs_grads *g)
{
    for (int i = 0; i < IN_FLIGHT; i++) {
        if (g->flights[i].layer >= 0) {
            (void)qs_event_wait(g->flights[i].landed); /* its error stays in the queue */
            g->flights[i].layer = -1;
        }
    }
}

void qs_grads_destroy(qs_grads *g)
{
    if (g == NULL) {
        return;
    }
    if (g->queue != NULL) {
        wait_for_flights(g); /* they read and write our buffers */
    }
    if (g->own_queue) {
        qs_queue_destroy(g->queue);
    }
    for (int i = 0; i < IN_FLIGHT; i++) {
        qs_device_free(g->device, g->flights[i].received);
    }
    qs_device_free(g->device, g->buffers);
    qs_device_free(g->device, g->result);
    qs_mirror_destroy(g->device, &g->sums);
    void *const owned[] = {g->first_node, g->nodes,   g->pool.free, g->partials, g->stacks,
                           g->added,      g->reduced, g->finish.at, g->all_sums, g->exchange};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) {
        qs_mem_free(owned[i]);
    }
    qs_mem_free(g);
}

void qs_grads_attach(qs_grads *g, qs_fsdp *fsdp)
{
    if (g->own_queue) {
        qs_queue_destroy(g->queue);
        g->own_queue = false;
    }
    g->queue = fsdp->queue;
}

/* ---- a step: slots ---- */

void qs_grads_begin(qs_grads *g)
{
    wait_for_flights(g); /* of a step that was given up */
    const size_t layers = (size_t)g->layout.n_layers;
    memset(g->added, 0, layers * sizeof *g->added);
    memset(g->reduced, 0, layers * sizeof *g->reduced);
    for (size_t l = 0; l < layers; l++) {
        g->stacks[l].depth = 0;
    }
    g->pool.count = g->n_buffers;
    for (int i = 0; i < g->n_buffers; i++) {
        g->pool.free[i] = g->buffers + (g->n_buffers - 1 - i) * g->layout.per_layer;
    }
    g->open = NULL;
    g->started = 0;
}

/* The slot that `layer` has to take next. */
static bool is_next(const qs_grads *g, int layer, int64_t slot)
{
    return layer >= 0 && layer < g->layout.n_layers && !g->reduced[layer] &&
           slot == g->slots.begin + g->added[layer] && slot < g->slots.end;
}

float *qs_grads_slot(qs_grads *g, int layer, int64_t slot)
{
    if (!is_next(g, layer, slot)) {
        (void)QS_FAIL(QS_ERR_BUG, "gradient of layer %d, slot %lld is not the next one", layer,
                      (long long)slot);
        return NULL;
    }
    if (g->open != NULL) {
        if (layer == g->open_layer) {
            return g->open;
        }
        (void)QS_FAIL(QS_ERR_BUG, "gradient of layer %d while layer %d is open", layer,
                      g->open_layer);
        return NULL;
    }
    if (g->pool.count == 0) {
        (void)QS_FAIL(QS_ERR_BUG,
                      "gradient of layer %d, slot %lld: all %d buffers are taken; a "
                      "pass is longer than `group`, or out of order",
                      layer, (long long)slot, g->n_buffers);
        return NULL;
    }
    g->open = g->pool.free[--g->pool.count];
    g->open_layer = layer;
    if (qs_queue_zero(g->compute, g->open, (size_t)g->layout.per_layer * sizeof(float)) != QS_OK) {
        return NULL;
    }
    return g->open;
}

qs_status qs_grads_add(qs_grads *g, int layer, int64_t slot)
{
    if (g->open == NULL || layer != g->open_layer || !is_next(g, layer, slot)) {
        return QS_FAIL(QS_ERR_BUG, "gradient of layer %d, slot %lld was not handed out", layer,
                       (long long)slot);
    }
    qs_partial leaf = {.node = {.level = 0, .index = slot}, .sum = g->open};
    g->open = NULL;
    g->added[layer]++;
    return qs_partials_push(&g->stacks[layer], leaf, &g->add_full, &g->pool);
}

/* ---- reduction ---- */

/* The shard of rank r in elements, and how many bytes a piece of it takes. */
static size_t piece_bytes(const qs_grads *g, int r)
{
    qs_range shard = qs_lora_shard(&g->layout, r, g->nranks);
    return (size_t)(shard.end - shard.begin) * sizeof(float);
}

/* The k-th node of every rank: the piece of each shard goes to its owner. */
static qs_status send_nodes(qs_grads *g, const qs_partials *stack, int k, float *received)
{
    const size_t n = (size_t)g->nranks, width_bytes = (size_t)g->width * sizeof(float);
    size_t *send_bytes = g->exchange, *send_at = send_bytes + n;
    size_t *recv_bytes = send_at + n, *recv_at = recv_bytes + n;
    const size_t mine = piece_bytes(g, g->rank);
    for (int r = 0; r < g->nranks; r++) {
        bool has = k < g->first_node[r + 1] - g->first_node[r];
        send_bytes[r] = k < stack->depth ? piece_bytes(g, r) : 0;
        send_at[r] = send_bytes[r] > 0 ? (size_t)r * width_bytes : 0;
        recv_bytes[r] = has ? mine : 0;
        recv_at[r] = recv_bytes[r] > 0 ? (size_t)(g->first_node[r] + k) * width_bytes : 0;
    }
    const float *sum = k < stack->depth ? stack->at[k].sum : g->buffers;
    return qs_comm_all_to_all_v(g->comm, sum, send_bytes, send_at, received, recv_bytes, recv_at,
                                g->queue);
}

/* End the reduction: its buffers are free again, and the pieces become the shard's sum. */
static qs_status settle(qs_grads *g, reduction *flight)
{
    const int layer = flight->layer;
    if (layer < 0) {
        return QS_OK;
    }
    flight->layer = -1;
    QS_TRY(qs_queue_after(g->compute, flight->landed));
    qs_partials *sent = &g->stacks[layer];
    while (sent->depth > 0) {
        g->pool.free[g->pool.count++] = sent->at[--sent->depth].sum;
    }
    if (g->add_shard.count == 0) {
        return QS_OK; /* more ranks than chunks */
    }
    g->finish.depth = 0;
    for (int i = 0; i < g->n_nodes; i++) {
        qs_partial part = {.node = g->nodes[i], .sum = flight->received + i * g->width};
        QS_TRY(qs_partials_push(&g->finish, part, &g->add_shard, NULL));
    }
    if (g->finish.depth != 1) {
        return QS_FAIL(QS_ERR_BUG, "the slot tree of layer %d ends in %d nodes", layer,
                       g->finish.depth);
    }
    return qs_queue_copy(g->compute, g->result + layer * g->width, g->finish.at[0].sum,
                         (size_t)g->add_shard.count * sizeof(float));
}

qs_status qs_grads_reduce(qs_grads *g, int layer)
{
    if (layer < 0 || layer >= g->layout.n_layers || g->reduced[layer] || g->open != NULL ||
        g->added[layer] != g->slots.end - g->slots.begin) {
        return QS_FAIL(QS_ERR_BUG, "reduction of layer %d before its slots are complete, or twice",
                       layer);
    }
    reduction *flight = &g->flights[g->started % IN_FLIGHT];
    QS_TRY(settle(g, flight));
    /* The sums must be there before they are sent, and the pieces that lay in `received` added. */
    QS_TRY(qs_queue_after(g->queue, qs_event_record(g->compute)));
    for (int k = 0; k < g->most_nodes; k++) {
        QS_TRY(send_nodes(g, &g->stacks[layer], k, flight->received));
    }
    flight->layer = layer;
    flight->landed = qs_event_record(g->queue);
    g->reduced[layer] = true;
    g->started++;
    return QS_OK;
}

qs_status qs_grads_finish(qs_grads *g, float **shard)
{
    *shard = NULL;
    if (g->started != g->layout.n_layers) {
        return QS_FAIL(QS_ERR_BUG, "finish after %d reductions of %d layers", g->started,
                       g->layout.n_layers);
    }
    for (int i = 0; i < IN_FLIGHT; i++) { /* oldest first */
        QS_TRY(settle(g, &g->flights[(g->started + i) % IN_FLIGHT]));
    }
    *shard = g->result;
    return QS_OK;
}

/* ---- norm ---- */

qs_status qs_grads_norm(qs_grads *g, const float *shard, double *norm)
{
    const int64_t per_rank = g->width / QS_LORA_CHUNK; /* chunks of a layer */
    const int64_t mine = g->layout.n_layers * per_rank;
    QS_TRY(g->add_shard.ops->square_sums(g->compute, shard, mine, g->sums.device));
    QS_TRY(qs_mirror_pull(g->compute, &g->sums, 0, g->sums.bytes));
    QS_TRY(qs_queue_wait(g->compute));
    QS_TRY(qs_comm_all_gather_now(g->comm, g->sums.host, g->all_sums, g->sums.bytes));
    double sum = 0;
    for (int l = 0; l < g->layout.n_layers; l++) {
        for (int64_t c = 0; c < g->layout.chunks; c++) {
            const double *owner = g->all_sums + c / per_rank * mine;
            sum += owner[l * per_rank + c % per_rank];
        }
    }
    *norm = sqrt(sum);
    return QS_OK;
}
