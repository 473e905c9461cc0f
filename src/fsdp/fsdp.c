/* Shares, gathers and their buffers; which unit goes into which buffer and when, gather_plan.c
 * says.
 *
 *   acquire(u):       [ buffer 0: u, held ]  [ buffer 1: gather of the next under way ]
 *   release(u)        [ buffer 0: u, free ]  ...
 *   acquire(next)     [ buffer 0: gather ]   [ buffer 1: next, held ]
 */
#include "fsdp/fsdp_impl.h"

#include "base/mem.h"
#include "base/timer.h"
#include "base/trace.h"

/* ---- sizes ---- */

static bool is_vocabulary(const qs_base_index *index, int u)
{
    return u >= index->config.n_layers;
}

static bool is_offloaded(const qs_base_index *index, int u, const qs_fsdp_options *options)
{
    return is_vocabulary(index, u) ? options->offload_vocabulary : options->offload_layers;
}

/* A layer that every rank keeps whole: `keep` of them, spread evenly. */
static bool is_resident(const qs_base_index *index, int u, const qs_fsdp_options *options)
{
    const int64_t layers = index->config.n_layers;
    const int64_t keep = options->keep_resident < layers ? options->keep_resident : layers;
    return u < layers && (u + 1) * keep / layers != u * keep / layers;
}

bool qs_fsdp_at_hand(const qs_base_index *index, int u, int nranks, const qs_fsdp_options *options)
{
    return is_resident(index, u, options) || (nranks == 1 && !is_offloaded(index, u, options));
}

qs_fsdp_bytes qs_fsdp_plan(const qs_base_index *index, int nranks, const qs_fsdp_options *options)
{
    qs_fsdp_bytes bytes = {0};
    size_t largest = 0; /* a gather buffer takes any unit that is gathered */
    int gathered = 0;
    for (int u = 0; u < index->n_units; u++) { /* shares are padded to the same size */
        const size_t message = qs_unit_layout_make(&index->units[u].size, nranks).message_bytes;
        const size_t whole = message * (size_t)nranks;
        if (qs_fsdp_at_hand(index, u, nranks, options)) {
            bytes.device_shard_bytes += whole;
            continue;
        }
        *(is_offloaded(index, u, options) ? &bytes.host_shard_bytes : &bytes.device_shard_bytes) +=
            message;
        largest = whole > largest ? whole : largest;
        gathered++;
    }
    bytes.gather_bytes = (size_t)qs_gather_plan_buffers(gathered, options->prefetch) * largest;
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
    (void)qs_queue_poll(f->host_queue);
}

/* Bytes of unit `u` that this rank keeps: its share, or the whole unit if it stays. */
static size_t kept_bytes(const qs_fsdp *f, int u)
{
    return f->layouts[u].message_bytes * (size_t)(f->at_hand[u] ? f->nranks : 1);
}

static qs_status allocate_shares(qs_fsdp *f)
{
    const int n_units = f->index->n_units;
    size_t on_device = 0, on_host = 0;
    for (int u = 0; u < n_units; u++) {
        f->layouts[u] = qs_unit_layout_make(&f->index->units[u].size, f->nranks);
        f->offloaded[u] = !f->at_hand[u] && is_offloaded(f->index, u, &f->options);
        *(f->offloaded[u] ? &on_host : &on_device) += kept_bytes(f, u);
    }
    QS_TRY(QS_DEVICE_ALLOC(f->device, &f->shares, on_device, QS_MEM_BASE_SHARD));
    QS_TRY(QS_HOST_ALLOC(f->device, &f->host_shares, on_host, QS_MEM_BASE_SHARD));
    uint8_t *device_at = f->shares, *host_at = f->host_shares;
    for (int u = 0; u < n_units; u++) {
        uint8_t **at = f->offloaded[u] ? &host_at : &device_at;
        f->share[u] = *at + (f->at_hand[u] ? f->layouts[u].message_bytes * (size_t)f->rank : 0);
        *at += kept_bytes(f, u);
    }
    return QS_OK;
}

static qs_status allocate(qs_fsdp *f)
{
    const int n_units = f->index->n_units;
    QS_TRY(QS_ALLOC(&f->layouts, n_units, QS_MEM_BASE_SMALL));
    QS_TRY(QS_ALLOC(&f->share, n_units, QS_MEM_BASE_SMALL));
    QS_TRY(QS_ALLOC(&f->offloaded, n_units, QS_MEM_BASE_SMALL));
    QS_TRY(QS_ALLOC(&f->at_hand, n_units, QS_MEM_BASE_SMALL));
    QS_TRY(QS_ALLOC(&f->held, n_units, QS_MEM_BASE_SMALL));
    for (int u = 0; u < n_units; u++) {
        f->at_hand[u] = qs_fsdp_at_hand(f->index, u, f->nranks, &f->options);
    }
    QS_TRY(allocate_shares(f));
    QS_TRY(qs_gather_plan_create(&f->plan, f->at_hand, n_units, f->options.prefetch));
    const qs_fsdp_bytes planned = qs_fsdp_plan(f->index, f->nranks, &f->options);
    const int buffers = f->plan.n_buffers;
    for (int b = 0; b < buffers; b++) {
        QS_TRY(QS_DEVICE_ALLOC(f->device, &f->buffers[b].bytes,
                               planned.gather_bytes / (size_t)buffers, QS_MEM_BASE_GATHER));
    }
    QS_TRY(qs_queue_create_on(f->device, &f->queue, 1));
    QS_TRY(qs_queue_create(&f->host_queue, 1));
    f->row_queue = qs_device_is_host(f->device) ? f->host_queue : f->queue;
    return qs_embed_init(f);
}

/* A unit at hand, from its first rank's message on. */
static uint8_t *whole_unit(const qs_fsdp *f, int u)
{
    return f->share[u] - f->layouts[u].message_bytes * (size_t)f->rank;
}

/* The layers that stay, once and for all. Collective. */
static qs_status gather_residents(qs_fsdp *f)
{
    for (int u = 0; u < f->index->n_units && f->nranks > 1; u++) {
        if (f->at_hand[u]) {
            const size_t bytes = f->layouts[u].message_bytes;
            QS_TRY(qs_comm_all_gather(f->comm, f->share[u], whole_unit(f, u), bytes, f->queue));
            f->stats.gathered_bytes += bytes * (uint64_t)(f->nranks - 1);
        }
    }
    return qs_queue_wait(f->queue);
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
        st = allocate(f);
    }
    st = qs_comm_agree(comm, qs_shares_fill(f, st, source));
    if (st == QS_OK) {
        st = gather_residents(f);
    }
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
    /* What was started ahead may still write into a buffer. */
    if (f->host_queue != NULL) {
        (void)qs_queue_wait(f->queue);
        (void)qs_queue_wait(f->host_queue);
        (void)qs_queue_wait(f->compute);
    }
    qs_queue_destroy(f->host_queue);
    qs_queue_destroy(f->queue);
    for (int b = 0; b < QS_GATHER_BUFFERS_MAX; b++) {
        qs_device_free(f->device, f->buffers[b].bytes);
    }
    qs_gather_plan_destroy(&f->plan);
    qs_embed_free(f);
    qs_device_free(f->device, f->shares);
    qs_device_host_free(f->device, f->host_shares);
    void *const owned[] = {f->held, f->at_hand, f->offloaded, f->share, f->layouts};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) {
        qs_mem_free(owned[i]);
    }
    qs_mem_free(f);
}

/* ---- gathers ---- */

/* Compute waits until the buffer's gather has landed. */
static qs_status settle(qs_fsdp *f, int b)
{
    qs_gather_buffer *buffer = &f->buffers[b];
    if (!buffer->in_flight) {
        return QS_OK;
    }
    buffer->in_flight = false;
    return qs_queue_after(f->compute, buffer->landed);
}

/* Behind a gather in the queue: it is over now. */
static qs_status note_end(void *ctx, bool *finished)
{
    const qs_gather_buffer *buffer = ctx;
    qs_fsdp *f = buffer->fsdp;
    const double now_s = qs_time_s();
    const double since_s =
        buffer->started_s > f->gathers_until_s ? buffer->started_s : f->gathers_until_s;
    f->stats.gather_s += now_s - since_s;
    f->gathers_until_s = now_s;
    qs_trace_add(QS_LANE_GATHER, buffer->started_s, now_s, "%s",
                 f->index->units[buffer->unit].name);
    *finished = true;
    return QS_OK;
}

/* Keep the time of a gather that was just given to the queue. A GPU's queue does not tell. */
static qs_status clock_gather(qs_fsdp *f, qs_gather_buffer *buffer, int u)
{
    buffer->fsdp = f;
    buffer->unit = u;
    return qs_device_is_host(f->device) ? qs_queue_push(f->queue, note_end, NULL, buffer) : QS_OK;
}

static qs_status start_gather(qs_fsdp *f, const qs_gather *gather)
{
    qs_gather_buffer *buffer = &f->buffers[gather->buffer];
    QS_TRY(settle(f, gather->buffer)); /* a gather ahead that nobody came for */
    const int u = gather->unit;
    const size_t bytes = f->layouts[u].message_bytes;
    const uint8_t *share = f->share[u];
    qs_event *lead = &f->last_landed[f->stats.gathers % QS_FSDP_LEAD_MAX];
    QS_TRY(qs_event_wait(*lead));
    QS_TRY(qs_queue_after(f->queue, buffer->released)); /* kernels may still read the old unit */
    if (f->offloaded[u]) {
        uint8_t *place = buffer->bytes + bytes * (size_t)f->rank;
        QS_TRY(qs_queue_copy(f->queue, place, share, bytes));
        share = place;
    }
    buffer->started_s = qs_time_s();
    if (f->nranks > 1) {
        QS_TRY(qs_comm_all_gather(f->comm, share, buffer->bytes, bytes, f->queue));
        QS_TRY(clock_gather(f, buffer, u));
    }
    buffer->in_flight = true;
    buffer->landed = *lead = qs_event_record(f->queue);
    f->stats.gathers++;
    f->stats.gathered_bytes += bytes * (uint64_t)(f->nranks - 1);
    return QS_OK;
}

/* A buffer whose gather could not start or end holds nothing. */
static qs_status drop_on_error(qs_fsdp *f, int buffer, qs_status st)
{
    if (st != QS_OK) {
        qs_gather_plan_drop(&f->plan, buffer);
    }
    return st;
}

/* ---- acquire, release ---- */

bool qs_fsdp_is_gathered(const qs_fsdp *f, int u)
{
    return f->nranks > 1 && !f->at_hand[u];
}

bool qs_fsdp_stays(const qs_fsdp *f, int u)
{
    return f->at_hand[u];
}

qs_status qs_fsdp_barrier(qs_fsdp *f)
{
    return qs_comm_barrier(f->comm);
}

qs_status qs_fsdp_begin(qs_fsdp *f, const int *units, int count)
{
    return qs_gather_plan_begin(&f->plan, units, count);
}

static qs_status wait_for_gather(qs_fsdp *f, int buffer)
{
    if (!f->buffers[buffer].in_flight) {
        return QS_OK;
    }
    const double since = qs_time_s();
    const qs_status st = settle(f, buffer);
    f->stats.wait_s +=
        qs_trace_wait(since, "wait for %s", f->index->units[f->buffers[buffer].unit].name);
    return st;
}

static qs_status gather_ahead(qs_fsdp *f)
{
    qs_gather next;
    while (qs_gather_plan_ahead(&f->plan, &next)) {
        QS_TRY(drop_on_error(f, next.buffer, start_gather(f, &next)));
    }
    return QS_OK;
}

qs_status qs_fsdp_acquire(qs_fsdp *f, int u, qs_unit_view *view)
{
    qs_gather mine;
    bool gather = false;
    QS_TRY(qs_gather_plan_acquire(&f->plan, u, &mine, &gather));
    if (gather) {
        QS_TRY(drop_on_error(f, mine.buffer, start_gather(f, &mine)));
    }
    if (mine.buffer >= 0) {
        QS_TRY(drop_on_error(f, mine.buffer, wait_for_gather(f, mine.buffer)));
    }
    view->layout = f->layouts[u];
    view->base = mine.buffer < 0 ? whole_unit(f, u) : f->buffers[mine.buffer].bytes;
    f->held[u]++;
    return gather_ahead(f);
}

qs_status qs_fsdp_release(qs_fsdp *f, int u)
{
    if (u < 0 || u >= f->index->n_units || f->held[u] == 0) {
        return QS_FAIL(QS_ERR_BUG, "release of unit %d, which is not held", u);
    }
    f->held[u]--;
    if (!f->at_hand[u]) {
        const int buffer = qs_gather_plan_buffer_of(&f->plan, u);
        qs_gather_plan_release(&f->plan, u);
        f->buffers[buffer].released = qs_event_record(f->compute);
    }
    return QS_OK;
}

qs_fsdp_stats qs_fsdp_get_stats(const qs_fsdp *f)
{
    return f->stats;
}

qs_queue *qs_fsdp_queue(const qs_fsdp *f)
{
    return f->queue;
}
