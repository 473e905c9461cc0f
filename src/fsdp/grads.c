/* Gradients of a step: partial sums of this rank's slots, their way to the owners, and the owners'
 * end of the tree (reduce_stage.c). The result has the bits of one rank's tree, whatever the number
 * of ranks.
 *
 * Where hosts have several ranks each, sums take two levels: the ranks of a host first make one sum
 * of theirs, each for the pieces that ranks of its number on any host own, and only that crosses
 * between hosts. While a layer computes, the one before it is inside of the host, and the one
 * before that is on its way across. */
#include "fsdp/grads.h"

#include <math.h>
#include <string.h>

#include "base/mem.h"
#include "base/timer.h"
#include "base/trace.h"
#include "fsdp/reduce_stage.h"

enum { IN_FLIGHT = 2 };

/* A reduction that is under way. */
typedef struct {
    int layer;   /* -1: none */
    bool inside; /* of the first of two stages */
    qs_event landed;
    double departed_s;
    float *host_pieces; /* what arrives inside of the host; NULL with one level */
    float *received;    /* pieces of this rank's shard from all over, in slot order */
} reduction;

struct qs_grads {
    qs_lora_layout layout;
    qs_levels levels;
    qs_device *device;
    qs_queue *compute, *queue;
    bool own_queue;
    int rank, nranks;
    int per_host, hosts; /* ranks of a host, and hosts; with one level all ranks, and 1 */
    qs_range slots;      /* of this rank */
    qs_range shard;      /* of this rank within a layer, in elements */
    int64_t width;       /* of a shard, padded */
    qs_tree add_full;    /* additions of whole gradients / of shard pieces */
    qs_tree add_shard;

    qs_reduce_stage inside;  /* with two levels: the ranks of the host, a set for every host */
    qs_reduce_stage last;    /* hosts, or with one level all ranks */
    qs_reduce_piece *pieces; /* [nranks] of one exchange */
    int *leaf_of;   /* with two levels: the inner node that each of the host's nodes begins with */
    int n_buffers;  /* gradients that are held at most */
    float *buffers; /* [n_buffers * per_layer] */
    qs_float_pool pool;   /* those that are free */
    qs_partial *partials; /* [n_layers * room] behind the stacks */
    qs_partials *stacks;  /* [n_layers] */
    int64_t *added;       /* [n_layers] slots folded so far */
    bool *reduced;        /* [n_layers] */
    float *open;          /* the buffer that qs_grads_slot has given, NULL: none */
    int open_layer;
    int started; /* reductions of this step */
    reduction flights[IN_FLIGHT];
    qs_partials finish; /* stack of a finishing tree */
    double wait_s;      /* time that compute stood still for reductions */
    float *result;      /* [n_layers * width] */
    qs_mirror sums;     /* [n_layers * p] doubles: squares of this rank's chunks */
    double *all_sums;   /* [nranks * n_layers * p] */
};

/* ---- sizes ---- */

static void ranges_of_ranks(qs_range *ranges, int64_t slots, int nranks, int first, int count)
{
    for (int i = 0; i < count; i++) {
        ranges[i] = qs_slots_of(slots, first + i, nranks);
    }
}

static void ranges_of_hosts(qs_range *ranges, int64_t slots, int nranks, int per_host)
{
    for (int h = 0; h < nranks / per_host; h++) {
        ranges[h] = (qs_range){qs_slots_of(slots, h * per_host, nranks).begin,
                               qs_slots_of(slots, (h + 1) * per_host - 1, nranks).end};
    }
}

/* Floats that the two stages of one reduction receive, on the rank of all that receives most. */
static size_t received_floats(const qs_lora_layout *layout, int nranks, int per_host, int64_t slots)
{
    const int64_t width = qs_lora_shard_width(layout, nranks);
    qs_range *ranges = NULL;
    int most = 0, inside = 0, last = 0;
    if (QS_ALLOC(&ranges, nranks, QS_MEM_WORK) != QS_OK) {
        qs_error_clear();
        return SIZE_MAX / 1024; /* more than there is: the plan does not fit either */
    }
    if (per_host > 0) {
        for (int first = 0; first < nranks; first += per_host) {
            ranges_of_ranks(ranges, slots, nranks, first, per_host);
            const int nodes = qs_reduce_stage_nodes(slots, ranges, per_host, &most);
            inside = nodes > inside ? nodes : inside;
        }
        ranges_of_hosts(ranges, slots, nranks, per_host);
        last = qs_reduce_stage_nodes(slots, ranges, nranks / per_host, &most);
        inside *= nranks / per_host; /* a set for every host */
    } else {
        ranges_of_ranks(ranges, slots, nranks, 0, nranks);
        last = qs_reduce_stage_nodes(slots, ranges, nranks, &most);
    }
    qs_mem_free(ranges);
    return (size_t)(inside + last) * (size_t)width;
}

size_t qs_grads_bytes(const qs_lora_layout *layout, int nranks, int per_host, int64_t slots,
                      int64_t group)
{
    size_t layers = (size_t)layout->n_layers, buffers = 0;
    for (int r = 0; r < nranks; r++) {
        int n = qs_partials_buffers(layout->n_layers, slots, nranks, r, group, IN_FLIGHT);
        buffers = (size_t)n > buffers ? (size_t)n : buffers;
    }
    size_t width = (size_t)qs_lora_shard_width(layout, nranks);
    size_t floats = buffers * (size_t)layout->per_layer +
                    IN_FLIGHT * received_floats(layout, nranks, per_host, slots) + layers * width;
    size_t sums = layers * (width / QS_LORA_CHUNK) * ((size_t)nranks + 1);
    return floats * sizeof(float) + sums * sizeof(double);
}

/* ---- create, destroy ---- */

/* The inner node that each node of this host begins with: additions leave a sum where its first
 * part lay. */
static void find_leaves(qs_grads *g)
{
    const int host = g->rank / g->per_host, first = g->last.first_node[host];
    for (int k = 0; k < g->last.first_node[host + 1] - first; k++) {
        const qs_slot_node node = g->last.nodes[first + k];
        const int64_t slot = node.index << node.level;
        int leaf = 0;
        while (g->inside.nodes[leaf].index << g->inside.nodes[leaf].level != slot) {
            leaf++;
        }
        g->leaf_of[k] = leaf;
    }
}

static qs_status make_stages(qs_grads *g, int64_t slots)
{
    qs_status st = QS_OK;
    qs_range *ranges = NULL;
    const int first = g->rank - g->rank % g->per_host;
    QS_GOTO(QS_ALLOC(&ranges, g->nranks, QS_MEM_WORK));
    QS_GOTO(QS_ALLOC(&g->pieces, g->nranks, QS_MEM_LORA_GRAD));
    ranges_of_ranks(ranges, slots, g->nranks, first, g->per_host);
    if (g->hosts == 1) {
        st = qs_reduce_stage_create(&g->last, g->levels.world, g->nranks, 1, slots, ranges,
                                    g->width);
        goto done;
    }
    QS_GOTO(qs_reduce_stage_create(&g->inside, g->levels.inside, g->per_host, g->hosts, slots,
                                   ranges, g->width));
    ranges_of_hosts(ranges, slots, g->nranks, g->per_host);
    QS_GOTO(
        qs_reduce_stage_create(&g->last, g->levels.across, g->hosts, 1, slots, ranges, g->width));
    QS_GOTO(QS_ALLOC(&g->leaf_of, g->last.most_nodes, QS_MEM_LORA_GRAD));
    find_leaves(g);
done:
    qs_mem_free(ranges);
    return st;
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
        QS_TRY(QS_DEVICE_ALLOC(g->device, &g->flights[i].host_pieces,
                               qs_reduce_stage_floats(&g->inside), QS_MEM_LORA_GRAD));
        QS_TRY(QS_DEVICE_ALLOC(g->device, &g->flights[i].received, qs_reduce_stage_floats(&g->last),
                               QS_MEM_LORA_GRAD));
    }
    QS_TRY(QS_ALLOC(&g->finish.at, g->inside.n_nodes + g->last.n_nodes + 1, QS_MEM_LORA_GRAD));
    QS_TRY(QS_DEVICE_ALLOC(g->device, &g->result, layers * g->width, QS_MEM_LORA_GRAD));
    const int64_t chunks = layers * (g->width / QS_LORA_CHUNK);
    QS_TRY(
        qs_mirror_create(g->device, &g->sums, (size_t)chunks * sizeof(double), QS_MEM_LORA_GRAD));
    return QS_ALLOC(&g->all_sums, g->nranks * chunks, QS_MEM_LORA_GRAD);
}

qs_status qs_grads_create(qs_grads **out, const qs_lora_layout *layout, const qs_ops *ops,
                          const qs_levels *levels, qs_queue *compute, int64_t slots, int64_t group)
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
    g->levels = *levels;
    g->device = qs_queue_device(compute);
    g->compute = compute;
    g->rank = qs_comm_rank(levels->world);
    g->nranks = qs_comm_nranks(levels->world);
    g->per_host = levels->inside != NULL ? qs_comm_nranks(levels->inside) : g->nranks;
    g->hosts = g->nranks / g->per_host;
    g->slots = qs_slots_of(slots, g->rank, g->nranks);
    g->shard = qs_lora_shard(layout, g->rank, g->nranks);
    g->width = qs_lora_shard_width(layout, g->nranks);
    g->add_full = (qs_tree){ops, compute, slots, layout->per_layer};
    g->add_shard = (qs_tree){ops, compute, slots, g->shard.end - g->shard.begin};
    g->n_buffers =
        qs_partials_buffers(layout->n_layers, slots, g->nranks, g->rank, group, IN_FLIGHT);
    g->flights[0].layer = g->flights[1].layer = -1;
    QS_GOTO(make_stages(g, slots));
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
        qs_device_free(g->device, g->flights[i].host_pieces);
        qs_device_free(g->device, g->flights[i].received);
    }
    qs_reduce_stage_destroy(&g->inside);
    qs_reduce_stage_destroy(&g->last);
    qs_device_free(g->device, g->buffers);
    qs_device_free(g->device, g->result);
    qs_mirror_destroy(g->device, &g->sums);
    void *const owned[] = {g->pieces, g->leaf_of, g->pool.free, g->partials, g->stacks,
                           g->added,  g->reduced, g->finish.at, g->all_sums};
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
    g->queue = qs_fsdp_queue(fsdp);
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

/* Take a buffer from the pool, zeroed. */
static qs_status open_slot(qs_grads *g, int layer, int64_t slot)
{
    if (g->pool.count == 0) {
        return QS_FAIL(QS_ERR_BUG,
                       "gradient of layer %d, slot %lld: all %d buffers are taken; a "
                       "pass is longer than `group`, or out of order",
                       layer, (long long)slot, g->n_buffers);
    }
    float *buffer = g->pool.free[g->pool.count - 1];
    QS_TRY(qs_queue_zero(g->compute, buffer, (size_t)g->layout.per_layer * sizeof(float)));
    g->pool.count--;
    g->open = buffer;
    g->open_layer = layer;
    return QS_OK;
}

qs_status qs_grads_slot(qs_grads *g, int layer, int64_t slot, float **out)
{
    *out = NULL;
    if (!is_next(g, layer, slot)) {
        return QS_FAIL(QS_ERR_BUG, "gradient of layer %d, slot %lld is not the next one", layer,
                       (long long)slot);
    }
    if (g->open == NULL) {
        QS_TRY(open_slot(g, layer, slot));
    } else if (layer != g->open_layer) {
        return QS_FAIL(QS_ERR_BUG, "gradient of layer %d while layer %d is open", layer,
                       g->open_layer);
    }
    *out = g->open;
    return QS_OK;
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

/* The piece of a whole gradient that rank r owns. */
static qs_reduce_piece piece_of(const qs_grads *g, int r)
{
    const qs_range shard = qs_lora_shard(&g->layout, r, g->nranks);
    return (qs_reduce_piece){shard.begin, shard.end - shard.begin};
}

static const float *node_of(const qs_partials *stack, int k)
{
    return k < stack->depth ? stack->at[k].sum : NULL;
}

/* The layer's nodes to all ranks. */
static qs_status send_to_all(qs_grads *g, reduction *flight)
{
    const qs_partials *stack = &g->stacks[flight->layer];
    for (int r = 0; r < g->nranks; r++) {
        g->pieces[r] = piece_of(g, r);
    }
    for (int k = 0; k < g->last.most_nodes; k++) {
        QS_TRY(qs_reduce_stage_send(&g->last, k, 0, node_of(stack, k), g->pieces,
                                    g->add_shard.count, flight->received, g->queue));
    }
    return QS_OK;
}

/* The layer's nodes to the ranks of this host: set h are the pieces that ranks of host h own. */
static qs_status send_inside(qs_grads *g, reduction *flight)
{
    const qs_partials *stack = &g->stacks[flight->layer];
    const int local = g->rank % g->per_host;
    for (int h = 0; h < g->hosts; h++) {
        for (int i = 0; i < g->per_host; i++) {
            g->pieces[i] = piece_of(g, h * g->per_host + i);
        }
        for (int k = 0; k < g->inside.most_nodes; k++) {
            QS_TRY(qs_reduce_stage_send(&g->inside, k, h, node_of(stack, k), g->pieces,
                                        g->pieces[local].count, flight->host_pieces, g->queue));
        }
    }
    return QS_OK;
}

/* What is left of the host's tree, to the owners on other hosts. */
static qs_status send_across(qs_grads *g, reduction *flight)
{
    const int host = g->rank / g->per_host, local = g->rank % g->per_host;
    const int mine = g->last.first_node[host + 1] - g->last.first_node[host];
    for (int k = 0; k < g->last.most_nodes; k++) {
        const float *from = k < mine ? flight->host_pieces : NULL;
        for (int h = 0; k < mine && h < g->hosts; h++) {
            const float *piece =
                qs_reduce_stage_piece(&g->inside, h, g->leaf_of[k], flight->host_pieces);
            g->pieces[h] = (qs_reduce_piece){piece - flight->host_pieces,
                                             piece_of(g, h * g->per_host + local).count};
        }
        QS_TRY(qs_reduce_stage_send(&g->last, k, 0, from, g->pieces, g->add_shard.count,
                                    flight->received, g->queue));
    }
    return QS_OK;
}

/* Behind an exchange in the queue: it is over now. */
static qs_status note_end(void *ctx, bool *finished)
{
    const reduction *flight = ctx;
    qs_trace_add(QS_LANE_REDUCE, flight->departed_s, qs_time_s(), "layer %d%s", flight->layer,
                 flight->inside ? " inside" : "");
    *finished = true;
    return QS_OK;
}

/* Give the exchange of `flight` to the queue, behind all that compute has been given: its sums must
 * be there, and what lay in the buffers added. */
static qs_status depart(qs_grads *g, reduction *flight,
                        qs_status (*send)(qs_grads *g, reduction *flight))
{
    qs_comm *comm = flight->inside ? g->inside.comm : g->last.comm;
    QS_TRY(qs_queue_after(g->queue, qs_event_record(g->compute)));
    flight->departed_s = qs_time_s();
    QS_TRY(qs_comm_batch_begin(comm));
    QS_TRY(qs_comm_batch_end(comm, send(g, flight)));
    if (qs_device_is_host(g->device)) {
        QS_TRY(qs_queue_push(g->queue, note_end, NULL, flight));
    }
    flight->landed = qs_event_record(g->queue);
    return QS_OK;
}

/* Compute goes on when the exchange of `flight` has landed. */
static qs_status wait_for(qs_grads *g, const reduction *flight)
{
    const double since = qs_time_s();
    const qs_status st = qs_queue_after(g->compute, flight->landed);
    g->wait_s += qs_trace_wait(since, "wait for sums of layer %d", flight->layer);
    return st;
}

double qs_grads_wait_s(const qs_grads *g)
{
    return g->wait_s;
}

/* The layer's own sums have been sent: their buffers are free again. */
static void free_sums(qs_grads *g, int layer)
{
    qs_partials *sent = &g->stacks[layer];
    while (sent->depth > 0) {
        g->pool.free[g->pool.count++] = sent->at[--sent->depth].sum;
    }
}

/* End the stage inside of the host, if that is where the reduction is, and start the one across. */
static qs_status cross_over(qs_grads *g, reduction *flight)
{
    if (flight->layer < 0 || !flight->inside) {
        return QS_OK;
    }
    QS_TRY(wait_for(g, flight));
    free_sums(g, flight->layer);
    for (int h = 0; h < g->hosts; h++) {
        qs_tree add = g->add_shard;
        add.count = piece_of(g, h * g->per_host + g->rank % g->per_host).count;
        if (add.count > 0) {
            QS_TRY(qs_reduce_stage_add(&g->inside, h, &add, flight->host_pieces, &g->finish));
        }
    }
    flight->inside = false;
    return depart(g, flight, send_across);
}

/* End the reduction: the pieces become the shard's sum. */
static qs_status settle(qs_grads *g, reduction *flight)
{
    QS_TRY(cross_over(g, flight));
    const int layer = flight->layer;
    if (layer < 0) {
        return QS_OK;
    }
    QS_TRY(wait_for(g, flight));
    flight->layer = -1;
    free_sums(g, layer);
    if (g->add_shard.count == 0) {
        return QS_OK; /* more ranks than chunks */
    }
    QS_TRY(qs_reduce_stage_add(&g->last, 0, &g->add_shard, flight->received, &g->finish));
    if (g->finish.depth != 1) {
        return QS_FAIL(QS_ERR_BUG, "the slot tree of layer %d ends in %d nodes", layer,
                       g->finish.depth);
    }
    return qs_queue_copy(g->compute, g->result + layer * g->width, g->finish.at[0].sum,
                         (size_t)g->add_shard.count * sizeof(float));
}

/* The reduction that was started `back` before the next one. */
static reduction *flight_before(qs_grads *g, int back)
{
    return &g->flights[(g->started + IN_FLIGHT - back) % IN_FLIGHT];
}

qs_status qs_grads_reduce(qs_grads *g, int layer)
{
    if (layer < 0 || layer >= g->layout.n_layers || g->reduced[layer] || g->open != NULL ||
        g->added[layer] != g->slots.end - g->slots.begin) {
        return QS_FAIL(QS_ERR_BUG, "reduction of layer %d before its slots are complete, or twice",
                       layer);
    }
    reduction *flight = flight_before(g, IN_FLIGHT);
    QS_TRY(settle(g, flight));
    QS_TRY(cross_over(g, flight_before(g, 1)));
    flight->layer = layer;
    flight->inside = g->hosts > 1;
    QS_TRY(depart(g, flight, flight->inside ? send_inside : send_to_all));
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
    for (int back = IN_FLIGHT; back > 0; back--) {
        QS_TRY(cross_over(g, flight_before(g, back)));
    }
    for (int back = IN_FLIGHT; back > 0; back--) {
        QS_TRY(settle(g, flight_before(g, back)));
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
    QS_TRY(qs_comm_all_gather_now(g->levels.world, g->sums.host, g->all_sums, g->sums.bytes));
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
