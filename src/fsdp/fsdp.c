/* Shares, gathers and the two buffers.
 *
 *   acquire(u, next):   [ buffer 0: u, held ]  [ buffer 1: gather of next under way ]
 *   release(u)          [ buffer 0: u, free ]  ...
 *   acquire(next, ...)  [ buffer 0: gather ]   [ buffer 1: next, held ]
 *
 * A released buffer keeps its unit until the room is needed, so the last layer of the forward pass
 * is there when the backward starts with it. Which buffer is taken depends on the order of the
 * calls alone, never on what has arrived, so that all ranks gather the same units in the same
 * order. */
#include "fsdp/fsdp_impl.h"

#include "base/mem.h"
#include "base/timer.h"

/* ---- sizes ---- */

static bool is_vocabulary(const qs_base_index *index, int u)
{
    return u >= index->config.n_layers;
}

static bool is_offloaded(const qs_base_index *index, int u, const qs_fsdp_options *options)
{
    return is_vocabulary(index, u) ? options->offload_vocabulary : options->offload_layers;
}

/* The two buffers are there for units that are not whole on this device. */
static bool needs_buffers(int nranks, const qs_fsdp_options *options)
{
    return nranks > 1 || options->offload_layers || options->offload_vocabulary;
}

static size_t largest_unit_bytes(const qs_base_index *index, int nranks)
{
    size_t most = 0;
    for (int u = 0; u < index->n_units; u++) {
        qs_unit_layout layout = qs_unit_layout_make(&index->units[u].size, nranks);
        size_t bytes = layout.message_bytes * (size_t)nranks;
        most = bytes > most ? bytes : most;
    }
    return most;
}

qs_fsdp_bytes qs_fsdp_plan(const qs_base_index *index, int nranks, const qs_fsdp_options *options)
{
    qs_fsdp_bytes bytes = {0};
    for (int u = 0; u < index->n_units; u++) { /* shares are padded to the same size */
        const size_t message = qs_unit_layout_make(&index->units[u].size, nranks).message_bytes;
        if (is_offloaded(index, u, options)) {
            bytes.host_shard_bytes += message;
        } else {
            bytes.device_shard_bytes += message;
        }
    }
    if (needs_buffers(nranks, options)) {
        bytes.gather_bytes = QS_GATHER_BUFFERS * largest_unit_bytes(index, nranks);
    }
    qs_embed_plan(index, nranks, options, &bytes);
    return bytes;
}

/* ---- create, destroy ---- */

/* Between tiles of the compute queue. An error stays with the operation and comes back from the
 * wait. */
static void poll_queue(void *ctx)
{
    qs_fsdp *f = ctx;
    (void)qs_queue_poll(f->queue);
}

static qs_status allocate_shares(qs_fsdp *f)
{
    const int n_units = f->index->n_units;
    size_t on_device = 0, on_host = 0;
    for (int u = 0; u < n_units; u++) {
        f->layouts[u] = qs_unit_layout_make(&f->index->units[u].size, f->nranks);
        f->offloaded[u] = is_offloaded(f->index, u, &f->options);
        *(f->offloaded[u] ? &on_host : &on_device) += f->layouts[u].message_bytes;
    }
    QS_TRY(QS_DEVICE_ALLOC(f->device, &f->shares, on_device, QS_MEM_BASE_SHARD));
    QS_TRY(QS_HOST_ALLOC(f->device, &f->host_shares, on_host, QS_MEM_BASE_SHARD));
    uint8_t *device_at = f->shares, *host_at = f->host_shares;
    for (int u = 0; u < n_units; u++) {
        uint8_t **at = f->offloaded[u] ? &host_at : &device_at;
        f->share[u] = *at;
        *at += f->layouts[u].message_bytes;
    }
    return QS_OK;
}

static qs_status allocate(qs_fsdp *f)
{
    const int n_units = f->index->n_units;
    QS_TRY(QS_ALLOC(&f->layouts, n_units, QS_MEM_BASE_SMALL));
    QS_TRY(QS_ALLOC(&f->share, n_units, QS_MEM_BASE_SMALL));
    QS_TRY(QS_ALLOC(&f->offloaded, n_units, QS_MEM_BASE_SMALL));
    QS_TRY(QS_ALLOC(&f->held, n_units, QS_MEM_BASE_SMALL));
    QS_TRY(allocate_shares(f));
    if (needs_buffers(f->nranks, &f->options)) {
        size_t bytes = largest_unit_bytes(f->index, f->nranks);
        for (int b = 0; b < QS_GATHER_BUFFERS; b++) {
            QS_TRY(QS_DEVICE_ALLOC(f->device, &f->buffers[b].bytes, bytes, QS_MEM_BASE_GATHER));
        }
    }
    QS_TRY(qs_queue_create_on(f->device, &f->queue, 1));
    if (qs_device_is_host(f->device)) {
        f->host_queue = f->queue;
    } else {
        QS_TRY(qs_queue_create(&f->host_queue, 1));
    }
    return qs_embed_init(f);
}

qs_status qs_fsdp_create_filled(qs_fsdp **out, const qs_base_index *index, qs_comm *comm,
                                qs_queue *compute, const qs_fsdp_options *options,
                                const qs_share_source *source)
{
    *out = NULL;
    qs_fsdp *f = NULL;
    qs_status st = QS_ALLOC(&f, 1, QS_MEM_BASE_SMALL);
    if (st == QS_OK) {
        f->index = index;
        f->options = *options;
        f->comm = comm;
        f->device = qs_queue_device(compute);
        f->compute = compute;
        f->rank = qs_comm_rank(comm);
        f->nranks = qs_comm_nranks(comm);
        for (int b = 0; b < QS_GATHER_BUFFERS; b++) {
            f->buffers[b].unit = -1;
        }
        st = allocate(f);
    }
    st = qs_comm_agree(comm, qs_shares_fill(f, st, source));
    if (st != QS_OK) {
        qs_fsdp_destroy(f);
        return st;
    }
    if (f->nranks > 1) {
        qs_queue_set_idle(compute, poll_queue, f);
    }
    *out = f;
    return QS_OK;
}

void qs_fsdp_destroy(qs_fsdp *f)
{
    if (f == NULL) {
        return;
    }
    if (f->nranks > 1) {
        qs_queue_set_idle(f->compute, NULL, NULL);
    }
    if (f->queue != NULL) {
        (void)qs_queue_wait(f->queue); /* a prefetch may still write into a buffer */
        (void)qs_queue_wait(f->compute);
    }
    if (f->host_queue != f->queue) {
        qs_queue_destroy(f->host_queue);
    }
    qs_queue_destroy(f->queue);
    for (int b = 0; b < QS_GATHER_BUFFERS; b++) {
        qs_device_free(f->device, f->buffers[b].bytes);
    }
    qs_embed_free(f);
    qs_device_free(f->device, f->shares);
    qs_device_host_free(f->device, f->host_shares);
    void *const owned[] = {f->held, f->offloaded, f->share, f->layouts};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) {
        qs_mem_free(owned[i]);
    }
    qs_mem_free(f);
}

/* ---- the two buffers ---- */

static qs_gather_buffer *buffer_of(qs_fsdp *f, int u)
{
    for (int b = 0; b < QS_GATHER_BUFFERS; b++) {
        if (f->buffers[b].unit == u) {
            return &f->buffers[b];
        }
    }
    return NULL;
}

/* Compute waits until the buffer's gather has landed. */
static qs_status settle(qs_fsdp *f, qs_gather_buffer *buffer)
{
    if (!buffer->in_flight) {
        return QS_OK;
    }
    buffer->in_flight = false;
    qs_status st = qs_queue_after(f->compute, buffer->landed);
    if (st != QS_OK) {
        buffer->unit = -1;
    }
    return st;
}

/* The buffer to overwrite: not held; one that does not hold `spare`, which is wanted soon; then the
 * least recently used. */
static qs_gather_buffer *choose_buffer(qs_fsdp *f, int spare)
{
    qs_gather_buffer *best = NULL;
    for (int b = 0; b < QS_GATHER_BUFFERS; b++) {
        qs_gather_buffer *c = &f->buffers[b];
        if (c->held > 0) {
            continue;
        }
        bool c_spare = spare >= 0 && c->unit == spare;
        bool best_spare = best != NULL && spare >= 0 && best->unit == spare;
        if (best == NULL || (best_spare && !c_spare) ||
            (best_spare == c_spare && c->used < best->used)) {
            best = c;
        }
    }
    return best;
}

static qs_status start_gather(qs_fsdp *f, qs_gather_buffer *buffer, int u)
{
    QS_TRY(settle(f, buffer)); /* a prefetch that nobody came for */
    const size_t bytes = f->layouts[u].message_bytes;
    const uint8_t *share = f->share[u];
    buffer->unit = -1;
    QS_TRY(qs_queue_after(f->queue, buffer->released)); /* kernels may still read the old unit */
    if (f->offloaded[u]) {
        uint8_t *place = buffer->bytes + bytes * (size_t)f->rank;
        QS_TRY(qs_queue_copy(f->queue, place, share, bytes));
        share = place;
    }
    if (f->nranks > 1) {
        QS_TRY(qs_comm_all_gather(f->comm, share, buffer->bytes, bytes, f->queue));
    }
    buffer->unit = u;
    buffer->in_flight = true;
    buffer->landed = qs_event_record(f->queue);
    f->stats.gathers++;
    f->stats.gathered_bytes += bytes * (uint64_t)(f->nranks - 1);
    return QS_OK;
}

/* ---- acquire, release ---- */

static int units_held(const qs_fsdp *f)
{
    int count = 0;
    for (int u = 0; u < f->index->n_units; u++) {
        count += f->held[u] > 0;
    }
    return count;
}

static qs_status check_acquire(const qs_fsdp *f, int u, int next)
{
    int n_units = f->index->n_units;
    if (u < 0 || u >= n_units || next < -1 || next >= n_units) {
        return QS_FAIL(QS_ERR_BUG, "acquire of unit %d and %d: there are %d", u, next, n_units);
    }
    if (f->held[u] == 0 && units_held(f) == QS_GATHER_BUFFERS) {
        return QS_FAIL(QS_ERR_BUG, "acquire of unit %d while %d others are held", u,
                       QS_GATHER_BUFFERS);
    }
    return QS_OK;
}

/* True where the unit is whole in this rank's share, so that nothing has to move. */
static bool is_at_hand(const qs_fsdp *f, int u)
{
    return f->nranks == 1 && !f->offloaded[u];
}

static qs_status acquire_gathered(qs_fsdp *f, int u, int next, const uint8_t **base)
{
    qs_gather_buffer *mine = buffer_of(f, u);
    if (mine == NULL) {
        mine = choose_buffer(f, next);
        QS_TRY(start_gather(f, mine, u));
    }
    if (mine->in_flight) {
        double since = qs_time_s();
        qs_status st = settle(f, mine);
        f->stats.wait_s += qs_time_s() - since;
        QS_TRY(st);
    }
    mine->held++;
    mine->used = ++f->clock;
    *base = mine->bytes;
    if (next >= 0 && !is_at_hand(f, next) && buffer_of(f, next) == NULL) {
        qs_gather_buffer *other = choose_buffer(f, -1);
        if (other != NULL) { /* else both are held, and `next` is gathered when its turn comes */
            QS_TRY(start_gather(f, other, next));
        }
    }
    return QS_OK;
}

qs_status qs_fsdp_acquire(qs_fsdp *f, int u, int next, qs_unit_view *view)
{
    QS_TRY(check_acquire(f, u, next));
    view->layout = f->layouts[u];
    if (is_at_hand(f, u)) {
        view->base = f->share[u];
    } else {
        QS_TRY(acquire_gathered(f, u, next, &view->base));
    }
    f->held[u]++;
    return QS_OK;
}

qs_status qs_fsdp_release(qs_fsdp *f, int u)
{
    if (u < 0 || u >= f->index->n_units || f->held[u] == 0) {
        return QS_FAIL(QS_ERR_BUG, "release of unit %d, which is not held", u);
    }
    f->held[u]--;
    if (!is_at_hand(f, u)) {
        qs_gather_buffer *buffer = buffer_of(f, u);
        buffer->held--;
        buffer->released = qs_event_record(f->compute);
    }
    return QS_OK;
}

qs_fsdp_stats qs_fsdp_get_stats(const qs_fsdp *f)
{
    return f->stats;
}
