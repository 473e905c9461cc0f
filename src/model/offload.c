#include "model/offload.h"

#include "base/mem.h"

/* The state of one micro-batch: marks of the copy queue, a slot each. */
typedef struct {
    qs_event stored[QS_OFFLOAD_SLOTS];  /* the slot's input is on the host */
    qs_event fetched[QS_OFFLOAD_SLOTS]; /* the slot's input is on the device again */
} slots;

struct qs_offload {
    qs_queue *queue;
    char *host;         /* [group][stored layers][max_tokens * hidden] of the stream */
    slots *micro;       /* [group] */
    size_t layer_bytes; /* of one input */
    int stored_layers;
};

/* The last SLOTS inputs are never overwritten on the way up. */
static int stored_layers(const qs_model *m)
{
    const int layers = m->config->n_layers - QS_OFFLOAD_SLOTS;
    return layers > 0 ? layers : 0;
}

static size_t layer_bytes(const qs_model *m)
{
    return (size_t)(m->shape.max_tokens * m->config->hidden) * m->stream_bytes;
}

size_t qs_offload_bytes(const qs_model *m)
{
    return (size_t)m->shape.group * (size_t)stored_layers(m) * layer_bytes(m);
}

qs_status qs_offload_create(qs_model *m)
{
    QS_TRY(QS_ALLOC(&m->offload, 1, QS_MEM_ACTIVATION));
    struct qs_offload *o = m->offload;
    o->stored_layers = stored_layers(m);
    o->layer_bytes = layer_bytes(m);
    QS_TRY(QS_ALLOC(&o->micro, m->shape.group, QS_MEM_ACTIVATION));
    QS_TRY(QS_HOST_ALLOC(m->device, &o->host, qs_offload_bytes(m), QS_MEM_ACTIVATION));
    return qs_queue_create_on(m->device, &o->queue, 1);
}

void qs_offload_destroy(qs_model *m)
{
    struct qs_offload *o = m->offload;
    if (o == NULL) {
        return;
    }
    if (o->queue != NULL) {
        (void)qs_queue_wait(o->queue);
        qs_queue_destroy(o->queue);
    }
    qs_device_host_free(m->device, o->host);
    qs_mem_free(o->micro);
    qs_mem_free(o);
    m->offload = NULL;
}

static char *host_of(const struct qs_offload *o, int64_t g, int layer)
{
    return o->host + (size_t)(g * o->stored_layers + layer) * o->layer_bytes;
}

static size_t bytes_of(const qs_model *m, int64_t n_tokens)
{
    return (size_t)(n_tokens * m->config->hidden) * m->stream_bytes;
}

/* The layer writes the next input: what lay in that slot must have left. */
qs_status qs_offload_before_forward(qs_model *m, int64_t g, int layer)
{
    if (m->offload == NULL) {
        return QS_OK;
    }
    return qs_queue_after(m->queue, m->offload->micro[g].stored[(layer + 1) % QS_OFFLOAD_SLOTS]);
}

qs_status qs_offload_after_forward(qs_model *m, int64_t g, int layer, int64_t n_tokens)
{
    struct qs_offload *o = m->offload;
    if (o == NULL || layer >= o->stored_layers) {
        return QS_OK;
    }
    QS_TRY(qs_queue_after(o->queue, qs_event_record(m->queue)));
    QS_TRY(qs_queue_copy(o->queue, host_of(o, g, layer), m->micro[g].layers[layer].x,
                         bytes_of(m, n_tokens)));
    o->micro[g].stored[layer % QS_OFFLOAD_SLOTS] = qs_event_record(o->queue);
    return QS_OK;
}

qs_status qs_offload_before_backward(qs_model *m, int64_t g, int layer)
{
    if (m->offload == NULL) {
        return QS_OK;
    }
    return qs_queue_after(m->queue, m->offload->micro[g].fetched[layer % QS_OFFLOAD_SLOTS]);
}

qs_status qs_offload_after_backward(qs_model *m, int64_t g, int layer, int64_t n_tokens)
{
    struct qs_offload *o = m->offload;
    const int wanted = layer - QS_OFFLOAD_SLOTS;
    if (o == NULL || wanted < 0) {
        return QS_OK;
    }
    QS_TRY(qs_queue_after(o->queue, qs_event_record(m->queue)));
    QS_TRY(qs_queue_copy(o->queue, m->micro[g].layers[wanted].x, host_of(o, g, wanted),
                         bytes_of(m, n_tokens)));
    o->micro[g].fetched[layer % QS_OFFLOAD_SLOTS] = qs_event_record(o->queue);
    return QS_OK;
}
