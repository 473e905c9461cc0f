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
 *
 * DoRA's magnitudes travel once more where the compute type is not fp32, as they are: rounded to
 * bf16, a row's length could not change by less than 2^-9. A rank's lie one behind the other among
 * those of the layer, as its chunks do among all elements.
 *
 * With two levels a piece crosses to another host once, to the rank of the same number, and is then
 * handed on inside: 1 / (ranks of a host) of the bytes between hosts. */
#include "fsdp/lora_gather.h"

/* Layers that set out together, which a GPU's transport starts in one call, and how many such are
 * under way: enough to fill a network; it bounds the requests that are open. */
enum { LAYERS_TOGETHER = 4, BATCHES_IN_FLIGHT = 2 };

/* What an exchange works on. */
typedef struct {
    const qs_lora_layout *layout;
    qs_range (*piece)(const qs_lora_layout *layout, int rank, int nranks);
    int64_t per_layer, width; /* elements from layer to layer, in the full vector and in a shard */
    qs_queue *queue;
    size_t element; /* bytes of one */
    uint8_t *full;
    size_t *exchange; /* [4 nranks] bytes and offsets; the caller's */
    int nranks;
} vector;

/* Every member m of `comm` sends the piece of rank first + m * stride to all of them, of layer
 * `layer`. `from`: where this member's lies; in the full vector if it has come there before. */
static qs_status exchange_pieces(const vector *v, qs_comm *comm, int layer, int first, int stride,
                                 const uint8_t *from)
{
    const size_t n = (size_t)qs_comm_nranks(comm);
    size_t *send_bytes = v->exchange, *send_at = send_bytes + n;
    size_t *recv_bytes = send_at + n, *recv_at = recv_bytes + n;
    const qs_range mine = v->piece(v->layout, first + qs_comm_rank(comm) * stride, v->nranks);
    for (int m = 0; m < (int)n; m++) {
        const qs_range theirs = v->piece(v->layout, first + m * stride, v->nranks);
        send_bytes[m] = (size_t)(mine.end - mine.begin) * v->element;
        send_at[m] = 0;
        recv_bytes[m] = (size_t)(theirs.end - theirs.begin) * v->element;
        recv_at[m] = (size_t)theirs.begin * v->element;
    }
    uint8_t *to = v->full + (size_t)(layer * v->per_layer) * v->element;
    if (from == NULL) {
        from = to + (size_t)mine.begin * v->element;
    }
    return qs_comm_all_to_all_v(comm, from, send_bytes, send_at, to, recv_bytes, recv_at, v->queue);
}

static qs_status exchange_batch(const vector *v, qs_comm *comm, qs_range layers, int first,
                                int stride, int sets, const uint8_t *shard)
{
    const size_t width_bytes = (size_t)v->width * v->element;
    for (int l = (int)layers.begin; l < layers.end; l++) {
        const uint8_t *from = shard != NULL ? shard + (size_t)l * width_bytes : NULL;
        for (int s = 0; s < sets; s++) {
            QS_TRY(exchange_pieces(v, comm, l, first + s * qs_comm_nranks(comm), stride, from));
        }
    }
    return QS_OK;
}

/* All layers: own pieces, in the shard, to the members of `comm`; or with `shard` NULL what has
 * come across, `sets` pieces a layer, on to the other ranks of this host. */
static qs_status exchange_layers(const vector *v, qs_comm *comm, int first, int stride, int sets,
                                 const uint8_t *shard)
{
    qs_event landed[BATCHES_IN_FLIGHT] = {{0}};
    const int layers = v->layout->n_layers;
    for (int begin = 0, batch = 0; begin < layers; begin += LAYERS_TOGETHER, batch++) {
        qs_event *slot = &landed[batch % BATCHES_IN_FLIGHT];
        const int end = begin + LAYERS_TOGETHER < layers ? begin + LAYERS_TOGETHER : layers;
        QS_TRY(qs_event_wait(*slot));
        QS_TRY(qs_comm_batch_begin(comm));
        const qs_status st =
            exchange_batch(v, comm, (qs_range){begin, end}, first, stride, sets, shard);
        QS_TRY(qs_comm_batch_end(comm, st));
        *slot = qs_event_record(v->queue);
    }
    return qs_queue_wait(v->queue);
}

static qs_status gather_vector(const vector *v, const qs_levels *levels, const void *shard)
{
    if (levels->inside == NULL) {
        return exchange_layers(v, levels->world, 0, 1, 1, shard);
    }
    const int per_host = qs_comm_nranks(levels->inside), hosts = qs_comm_nranks(levels->across);
    const int local = qs_comm_rank(levels->inside);
    QS_TRY(exchange_layers(v, levels->across, local, per_host, 1, shard));
    return exchange_layers(v, levels->inside, 0, 1, hosts, NULL);
}

static qs_status gather(const qs_lora_layout *layout, const qs_levels *levels, qs_queue *queue,
                        size_t *exchange, const void *shard, size_t element, void *full)
{
    const int nranks = qs_comm_nranks(levels->world);
    const vector v = {.layout = layout,
                      .piece = qs_lora_shard,
                      .per_layer = layout->per_layer,
                      .width = qs_lora_shard_width(layout, nranks),
                      .queue = queue,
                      .element = element,
                      .full = full,
                      .exchange = exchange,
                      .nranks = nranks};
    return gather_vector(&v, levels, shard);
}

qs_status qs_lora_gather(const qs_lora_layout *layout, const qs_levels *levels, qs_queue *queue,
                         size_t *exchange, const float *shard, float *full)
{
    return gather(layout, levels, queue, exchange, shard, sizeof *shard, full);
}

qs_status qs_lora_gather_as(const qs_lora_layout *layout, const qs_ops *ops,
                            const qs_levels *levels, qs_queue *queue, size_t *exchange,
                            const float *shard, void *send, void *full)
{
    if (ops->act_dtype == QS_F32) {
        return qs_lora_gather(layout, levels, queue, exchange, shard, full);
    }
    const int64_t width = qs_lora_shard_width(layout, qs_comm_nranks(levels->world));
    QS_TRY(ops->convert(queue, shard, layout->n_layers * width, send));
    return gather(layout, levels, queue, exchange, send, qs_dtype_bytes(ops->act_dtype), full);
}

/* A layer's magnitudes out of this rank's elements, one linear's behind the other's. */
static qs_status pack_magnitudes(const qs_lora_layout *layout, qs_queue *queue, qs_range elements,
                                 const float *shard, float *send)
{
    qs_lora_stretch part[QS_LORA_STRETCHES_MAX];
    const int n = qs_lora_stretches(layout, elements, part);
    for (int i = 0; i < n; i++) {
        if (part[i].which == 'm') {
            const int64_t count = part[i].elements.end - part[i].elements.begin;
            QS_TRY(qs_queue_copy(queue, send, shard + (part[i].elements.begin - elements.begin),
                                 (size_t)count * sizeof *send));
            send += count;
        }
    }
    return QS_OK;
}

qs_status qs_lora_gather_magnitudes(const qs_lora_layout *layout, const qs_levels *levels,
                                    qs_queue *queue, size_t *exchange, const float *shard,
                                    float *send, float *full)
{
    const int nranks = qs_comm_nranks(levels->world);
    const qs_range mine = qs_lora_shard(layout, qs_comm_rank(levels->world), nranks);
    const vector v = {.layout = layout,
                      .piece = qs_lora_magnitude_shard,
                      .per_layer = qs_lora_magnitudes(layout),
                      .width = qs_lora_magnitude_width(layout, nranks),
                      .queue = queue,
                      .element = sizeof *full,
                      .full = (uint8_t *)full,
                      .exchange = exchange,
                      .nranks = nranks};
    for (int l = 0; l < layout->n_layers; l++) {
        QS_TRY(pack_magnitudes(layout, queue, mine, shard + l * qs_lora_shard_width(layout, nranks),
                               send + l * v.width));
    }
    return gather_vector(&v, levels, send);
}
