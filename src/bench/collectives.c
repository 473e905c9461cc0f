/* Collectives over sizes, in the manner of NVIDIA's nccl-tests: time of the slowest rank,
 * algorithm and bus bandwidth, elements that are wrong.
 *
 *   gather   every rank's share to every rank (qs_comm_all_gather): what a unit's gather is
 *   reduce   a gradient a rank, to the owners of its pieces along the slot tree (qs_grads): what
 *            the reduction of a layer is
 *
 * The size is that of the whole: what a rank has after a gather, or puts into a reduction. In both
 * a rank receives (n - 1) / n of it, so that the bus bandwidth is size / time times that, and is to
 * be compared with what one link of a rank carries. With a group smaller than the world all groups
 * work at the same time. */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/levels.h"
#include "base/timer.h"
#include "bench/bench_impl.h"
#include "fsdp/fsdp.h"
#include "fsdp/grads.h"
#include "train/shard_group.h"

enum { BEGIN_BYTES = 1 << 14, END_BYTES = 1 << 24, FACTOR = 4, REPEATS = 20, WARMUP = 5 };

typedef struct {
    qs_bench_job *job;
    qs_backend backend;
    qs_comm *group;           /* over the host's memory; the world, or a part of it */
    qs_comm *comm;            /* over the device's memory, of the same ranks */
    qs_backend_levels levels; /* of the group: what reductions take */
    qs_queue *queue;
    bool ops_open;
    int rank, nranks; /* of the group */
    int64_t repeats, warmup;
    double *times; /* [repeats] */
    int64_t wrong; /* elements of the last size, of all ranks */
} place;

/* One collective of one size. */
typedef struct {
    place *p;
    size_t bytes; /* of the whole */
    int64_t round;
    /* gather */
    size_t share_bytes;
    uint8_t *send, *recv; /* on the device */
    uint8_t *host;        /* [bytes] */
    /* reduce */
    qs_lora_layout layout;
    qs_grads *grads;
    float *shard;
    float *pattern; /* [layout.per_layer] on the host */
} collective;

/* ---- gather ---- */

/* Byte i of rank r's share in a round: neither neighbours nor ranks nor rounds look alike. */
static uint8_t gather_pattern(int rank, size_t i, int64_t round)
{
    const uint32_t x = (uint32_t)i * 2654435761U + (uint32_t)rank * 40503U + (uint32_t)round * 97U;
    return (uint8_t)(x >> 24 ^ x >> 8);
}

static void gather_size(collective *c, int64_t bytes)
{
    const size_t nranks = (size_t)c->p->nranks;
    c->share_bytes = (size_t)bytes / nranks > 0 ? (size_t)bytes / nranks : 1;
    c->bytes = c->share_bytes * nranks;
}

static qs_status gather_make(collective *c)
{
    qs_device *device = c->p->backend.device;
    QS_TRY(QS_DEVICE_ALLOC(device, &c->send, c->share_bytes, QS_MEM_WORK));
    QS_TRY(QS_DEVICE_ALLOC(device, &c->recv, c->bytes, QS_MEM_WORK));
    return QS_ALLOC(&c->host, c->bytes, QS_MEM_WORK);
}

/* Fresh contents; what is received lies over zeros. */
static qs_status gather_fill(collective *c)
{
    for (size_t i = 0; i < c->share_bytes; i++) {
        c->host[i] = gather_pattern(c->p->rank, i, c->round);
    }
    QS_TRY(qs_queue_copy(c->p->queue, c->send, c->host, c->share_bytes));
    QS_TRY(qs_queue_zero(c->p->queue, c->recv, c->bytes));
    return qs_queue_wait(c->p->queue);
}

static qs_status gather_run(collective *c)
{
    return qs_comm_all_gather(c->p->comm, c->send, c->recv, c->share_bytes, c->p->queue);
}

static qs_status gather_check(collective *c, int64_t *wrong)
{
    QS_TRY(qs_queue_copy(c->p->queue, c->host, c->recv, c->bytes));
    QS_TRY(qs_queue_wait(c->p->queue));
    for (int r = 0; r < c->p->nranks; r++) {
        const uint8_t *share = c->host + (size_t)r * c->share_bytes;
        for (size_t i = 0; i < c->share_bytes; i++) {
            *wrong += share[i] != gather_pattern(r, i, c->round);
        }
    }
    return QS_OK;
}

static void gather_free(collective *c)
{
    qs_device_free(c->p->backend.device, c->send);
    qs_device_free(c->p->backend.device, c->recv);
    qs_mem_free(c->host);
}

/* ---- reduce ---- */

/* Whole numbers of which no sum over all slots is rounded, so that any order gives the same. */
static float reduce_pattern(int64_t slot, int64_t i, int64_t round)
{
    const uint32_t x = (uint32_t)i * 2654435761U + (uint32_t)slot * 40503U + (uint32_t)round * 97U;
    return (float)((int)(x >> 23 & 255) - 128);
}

static void reduce_size(collective *c, int64_t bytes)
{
    const int64_t chunk = QS_LORA_CHUNK * (int64_t)sizeof(float);
    const int64_t chunks = (bytes + chunk - 1) / chunk;
    c->layout = (qs_lora_layout){.n_layers = 1,
                                 .lora_rank = 1,
                                 .used = chunks * QS_LORA_CHUNK,
                                 .chunks = chunks,
                                 .per_layer = chunks * QS_LORA_CHUNK};
    c->bytes = (size_t)(chunks * chunk);
}

static qs_status reduce_make(collective *c)
{
    place *p = c->p;
    QS_TRY(QS_ALLOC(&c->pattern, c->layout.per_layer, QS_MEM_WORK));
    return qs_grads_create(&c->grads, &c->layout, p->backend.ops, &p->levels.levels, p->queue,
                           p->nranks, 1);
}

static qs_status reduce_fill(collective *c)
{
    for (int64_t i = 0; i < c->layout.per_layer; i++) {
        c->pattern[i] = reduce_pattern(c->p->rank, i, c->round);
    }
    qs_grads_begin(c->grads);
    float *slot = NULL;
    QS_TRY(qs_grads_slot(c->grads, 0, c->p->rank, &slot));
    QS_TRY(qs_queue_copy(c->p->queue, slot, c->pattern, c->bytes));
    QS_TRY(qs_grads_add(c->grads, 0, c->p->rank));
    return qs_queue_wait(c->p->queue);
}

static qs_status reduce_run(collective *c)
{
    QS_TRY(qs_grads_reduce(c->grads, 0));
    return qs_grads_finish(c->grads, &c->shard);
}

static qs_status reduce_check(collective *c, int64_t *wrong)
{
    const qs_range mine = qs_lora_shard(&c->layout, c->p->rank, c->p->nranks);
    const size_t bytes = (size_t)(mine.end - mine.begin) * sizeof(float);
    QS_TRY(qs_queue_copy(c->p->queue, c->pattern, c->shard, bytes));
    QS_TRY(qs_queue_wait(c->p->queue));
    for (int64_t i = mine.begin; i < mine.end; i++) {
        float sum = 0;
        for (int slot = 0; slot < c->p->nranks; slot++) {
            sum += reduce_pattern(slot, i, c->round);
        }
        *wrong += !(c->pattern[i - mine.begin] == sum);
    }
    return QS_OK;
}

static void reduce_free(collective *c)
{
    qs_grads_destroy(c->grads);
    qs_mem_free(c->pattern);
}

/* ---- either ---- */

typedef struct {
    void (*size)(collective *c, int64_t bytes);
    qs_status (*make)(collective *c);
    qs_status (*fill)(collective *c);
    qs_status (*run)(collective *c);
    qs_status (*check)(collective *c, int64_t *wrong);
    void (*free)(collective *c);
} collective_kind;

static const collective_kind gather_kind = {gather_size, gather_make,  gather_fill,
                                            gather_run,  gather_check, gather_free};
static const collective_kind reduce_kind = {reduce_size, reduce_make,  reduce_fill,
                                            reduce_run,  reduce_check, reduce_free};

/* Messages that this rank has received by the collective under test so far. */
static uint64_t messages(const place *p)
{
    const qs_comm *const comms[] = {p->comm, p->levels.levels.inside, p->levels.levels.across};
    uint64_t sum = 0;
    for (int i = 0; i < 3 && comms[i] != NULL; i++) {
        sum += qs_comm_get_traffic(comms[i], QS_COMM_GATHERS).messages +
               qs_comm_get_traffic(comms[i], QS_COMM_EXCHANGES).messages;
    }
    return sum;
}

/* All rounds of a size; times[] is what this rank took in those behind the warm-up, and the last
 * one is checked. */
static qs_status run_rounds(const collective_kind *kind, collective *c, double *received)
{
    place *p = c->p;
    uint64_t before = 0;
    for (int64_t i = -p->warmup; i < p->repeats; i++) {
        c->round = i + p->warmup;
        QS_TRY(kind->fill(c));
        before = messages(p);
        QS_TRY(qs_comm_barrier(p->job->world));
        const double start = qs_time_s();
        QS_TRY(kind->run(c));
        QS_TRY(qs_queue_wait(p->queue));
        if (i >= 0) {
            p->times[i] = qs_time_s() - start;
        }
    }
    *received = (double)(messages(p) - before);
    return kind->check(c, &p->wrong);
}

static void report_size(place *p, size_t bytes, double received)
{
    qs_bench_report_samples(p->job->report, p->times, p->repeats, 1e6, "us");
    const qs_bench_times t = qs_bench_summary(p->times, p->repeats);
    const double rate = (double)bytes / t.median * 1e-9;
    const double factor = (double)(p->nranks - 1) / p->nranks;
    const qs_bench_cell cells[] = {QS_BENCH_N(bytes),       QS_BENCH_N(t.median * 1e6),
                                   QS_BENCH_N(t.min * 1e6), QS_BENCH_N(t.max * 1e6),
                                   QS_BENCH_N(rate),        QS_BENCH_N(rate * factor),
                                   QS_BENCH_N(received),    QS_BENCH_N(p->wrong)};
    qs_bench_report_row(p->job->report, cells);
}

static qs_status measure_size(place *p, const collective_kind *kind, int64_t bytes)
{
    collective c = {.p = p};
    double received = 0;
    p->wrong = 0;
    kind->size(&c, bytes);
    qs_status st = kind->make(&c);
    if (st == QS_ERR_MEMORY) {
        qs_error_clear(); /* its advice is for a run */
        st = QS_FAIL(QS_ERR_MEMORY,
                     "memory: the buffers for %zu bytes in all cannot be allocated; give a smaller "
                     "--end-bytes",
                     c.bytes);
    }
    st = qs_comm_agree(p->job->world, st);
    if (st == QS_OK) {
        st = run_rounds(kind, &c, &received);
    }
    kind->free(&c);
    QS_TRY(st);
    QS_TRY(qs_bench_slowest(p->job->world, p->times, p->repeats));
    QS_TRY(qs_comm_sum_i64(p->job->world, &p->wrong, 1));
    report_size(p, c.bytes, received);
    p->job->wrong += p->wrong;
    return QS_OK;
}

/* ---- the place ---- */

static qs_status open_group(place *p)
{
    const int64_t group = p->job->options->group;
    QS_TRY(qs_shard_group_split(&p->group, group != 0 ? group : QS_SHARD_WORLD, p->job->world,
                                "--group"));
    QS_TRY(qs_comm_agree_after(p->job->world, p->group,
                               qs_backend_comm(&p->comm, &p->backend, p->group)));
    p->rank = qs_comm_rank(p->group);
    p->nranks = qs_comm_nranks(p->group);
    return qs_comm_agree_after(
        p->job->world, p->group,
        qs_backend_levels_open(&p->levels, &p->backend, p->group, p->comm, NULL, NULL));
}

static qs_status open_place(place *p)
{
    const qs_bench_options *o = p->job->options;
    qs_comm *world = p->job->world;
    int threads = 1;
    p->repeats = o->repeats > 0 ? o->repeats : REPEATS;
    p->warmup = o->warmup >= 0 ? o->warmup : WARMUP;
    QS_TRY(qs_comm_agree(world,
                         qs_backend_open(&p->backend, o->device, world, o->allow_shared_device)));
    QS_TRY(qs_comm_threads(world, (int)o->threads, &threads));
    QS_TRY(open_group(p));
    const qs_ops_limits limits = qs_bench_least_limits(threads);
    qs_status st = QS_ALLOC(&p->times, p->repeats, QS_MEM_WORK);
    st = st == QS_OK ? qs_queue_create_on(p->backend.device, &p->queue, threads) : st;
    st = st == QS_OK ? p->backend.ops->open(p->queue, &limits) : st;
    p->ops_open = st == QS_OK;
    QS_TRY(qs_comm_agree(world, st));
    return qs_bench_describe(p->job, p->backend.device, p->backend.ops, threads,
                             qs_comm_name(p->comm));
}

static void close_place(place *p)
{
    if (p->ops_open) {
        p->backend.ops->close(p->queue);
    }
    qs_queue_destroy(p->queue);
    qs_mem_free(p->times);
    qs_backend_levels_close(&p->levels);
    if (p->comm != NULL) {
        qs_backend_comm_destroy(p->comm, p->group);
    }
    if (p->group != p->job->world) {
        qs_comm_destroy(p->group);
    }
    qs_backend_close(&p->backend);
}

static void start_table(const place *p)
{
    static const qs_bench_column columns[] = {
        {"size", "B", 12, 0},   {"time", "us", 11, 1},   {"min", "us", 11, 1},
        {"max", "us", 11, 1},   {"algbw", "GB/s", 8, 2}, {"busbw", "GB/s", 8, 2},
        {"messages", "", 8, 0}, {"#wrong", "", 8, 0},
    };
    qs_bench_report *r = p->job->report;
    char note[192];
    qs_bench_report_number(r, "settings", "group", p->nranks);
    qs_bench_report_number(r, "settings", "repeats", (double)p->repeats);
    qs_bench_report_number(r, "settings", "warmup", (double)p->warmup);
    snprintf(
        note, sizeof note,
        "time: median, slowest rank; algbw = size / time; busbw = algbw * (n - 1) / n, n = %d; "
        "messages: received by rank 0 in a round",
        p->nranks);
    qs_bench_report_note(r, note);
    qs_bench_report_table(r, "sizes", columns, (int)(sizeof columns / sizeof *columns));
}

static int64_t first_size(const qs_bench_options *o)
{
    return o->begin_bytes > 0 ? o->begin_bytes : BEGIN_BYTES;
}

static int64_t last_size(const qs_bench_options *o)
{
    const int64_t begin = first_size(o);
    const int64_t usual = begin > END_BYTES ? begin : END_BYTES;
    return o->end_bytes > 0 ? o->end_bytes : usual;
}

static qs_status check_sizes(const qs_bench_options *o)
{
    return first_size(o) <= last_size(o)
               ? QS_OK
               : QS_FAIL(QS_ERR_USAGE,
                         "--begin-bytes: %" PRId64 " is more than --end-bytes %" PRId64,
                         first_size(o), last_size(o));
}

static qs_status measure_all(place *p)
{
    const qs_bench_options *o = p->job->options;
    const collective_kind *kind = o->kind == QS_BENCH_GATHER ? &gather_kind : &reduce_kind;
    const int64_t begin = first_size(o), end = last_size(o);
    const int64_t factor = o->factor > 0 ? o->factor : FACTOR;
    start_table(p);
    for (int64_t bytes = begin; bytes <= end; bytes *= factor) {
        QS_TRY(measure_size(p, kind, bytes));
        if (bytes > INT64_MAX / factor) {
            break;
        }
    }
    return QS_OK;
}

qs_status qs_bench_collectives(qs_bench_job *job)
{
    place p = {.job = job};
    QS_TRY(qs_comm_agree(job->world, check_sizes(job->options)));
    qs_status st = open_place(&p);
    st = st == QS_OK ? measure_all(&p) : st;
    close_place(&p);
    return st;
}
