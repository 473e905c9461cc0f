/* A training step and its parts, over and over: the same calls as a run makes
 * (src/train/run_step.c), on made-up tokens, with nothing written. The parts are those of one rank,
 * which in each repeat is the one that computed longest, so that they add up to its step; others
 * wait for it, in whatever part they are.
 *
 * train/step_clock.h says what the parts are; the bound of `wait` moves all units, hidden or not.
 * The bounds come from figures of the same run, of the slowest rank: FLOPs over the rate of
 * products, bytes received over the rate of an all-gather of a layer, bytes of the optimizer over
 * the rate of a copy. A second table counts what a rank receives in a step, by what it is for. */
#include <inttypes.h>
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/log.h"
#include "base/minmax.h"
#include "base/rng.h"
#include "base/timer.h"
#include "bench/bench_impl.h"
#include "train/forecast.h"
#include "train/session_plan.h"
#include "train/step_clock.h"

enum { REPEATS = 5, WARMUP = 2, GATHER_TRIES = 5 };
enum { LONG_S = 30 }; /* a measurement that takes longer says so */

static const char *const part_names[QS_STEP_PARTS] = {
    [QS_STEP_WAIT] = "wait",           [QS_STEP_COMPUTE] = "compute", [QS_STEP_REDUCE] = "reduce",
    [QS_STEP_OPTIMIZER] = "optimizer", [QS_STEP_LORA] = "lora",       [QS_STEP_TOTAL] = "total"};

/* What is taken of a rank in a repeat: the parts of its step, in seconds, and those of its CPUs. */
enum { CPU = QS_STEP_PARTS, FIGURES };

/* Threads that compute for less than this share of the time do not have their cores alone. */
static const double CONTENDED = 0.9;

/* Who causes traffic; the agreements are what is left of the small calls. */
enum { FOR_UNITS, FOR_EMBEDDING, FOR_GRADIENTS, FOR_LORA, FOR_AGREEMENT, PURPOSES };
static const char *const purpose_names[PURPOSES] = {"units", "embedding", "gradients", "lora",
                                                    "agreement"};

typedef struct {
    uint64_t calls, messages, bytes;
} amount;

typedef struct {
    qs_bench_job *job;
    qs_session session;
    qs_data *data; /* on paper */
    qs_model_shape shape;
    int64_t slots, sequences; /* of a step */
    int64_t tokens, targets;  /* of a step, all ranks */
    qs_trainer trainer;
    int64_t step;
    double loss;
    /* measured */
    int64_t repeats;
    double *times[FIGURES];              /* [repeats] each: this rank's, then the busiest one's */
    double *mean[FIGURES];               /* [repeats] each: of all ranks */
    double *least[FIGURES];              /* ditto */
    double *everyone;                    /* [nranks, FIGURES] of one repeat */
    double flops;                        /* this rank's, then the most of all */
    double mean_flops, mean_model_flops; /* of all ranks; without what is computed again */
    amount traffic[PURPOSES];
    double copy_rate, matmul_rate, link_rate;
    char matmul_name[32];
    double startup_s, startup_cpu_s, step_cpu_s;
} bench_step;

static double cpu_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- what has been received ---- */

/* By all communicators of the session, each once. */
static amount received(const qs_session *s, qs_comm_kind kind)
{
    const qs_comm *comms[QS_SESSION_COMMS_MAX];
    amount sum = {0, 0, 0};
    for (int i = qs_session_comms(s, comms) - 1; i >= 0; i--) {
        const qs_comm_traffic t = qs_comm_get_traffic(comms[i], kind);
        sum.calls += t.calls;
        sum.messages += t.messages;
        sum.bytes += t.bytes;
    }
    return sum;
}

typedef struct {
    amount kind[QS_COMM_KIND_COUNT];
} snapshot;

static snapshot look(const qs_session *s)
{
    snapshot now;
    for (int k = 0; k < QS_COMM_KIND_COUNT; k++) {
        now.kind[k] = received(s, (qs_comm_kind)k);
    }
    return now;
}

static amount minus(amount a, amount b)
{
    return (amount){a.calls - b.calls, a.messages - b.messages, a.bytes - b.bytes};
}

static amount since(const snapshot *before, const snapshot *now, qs_comm_kind kind)
{
    return minus(now->kind[kind], before->kind[kind]);
}

/* ---- batches ---- */

/* qs_slot_load: whole sequences of random ids, each position but the last with loss. */
static qs_status fill_batch(void *ctx, int64_t step, int64_t slot, qs_batch *batch)
{
    (void)step;
    const bench_step *b = ctx;
    const qs_config *cfg = &b->session.on.config;
    const int64_t vocab = b->session.on.index->config.vocab, length = cfg->train.seq_len;
    const int64_t first = slot * cfg->train.micro_batch, left = b->sequences - first;
    const int64_t sequences = left < cfg->train.micro_batch ? left : cfg->train.micro_batch;
    const qs_rng rng = qs_rng_make((uint64_t)cfg->seed, 0, (uint64_t)slot, 0, 0);
    qs_batch_lay_out(batch, sequences * length, length, first);
    batch->n_targets = sequences * (length - 1);
    for (int64_t t = 0; t < batch->n_tokens; t++) {
        batch->tokens[t] =
            (int32_t)((double)qs_rng_uniform(&rng, (uint64_t)t) * (double)(vocab - 1));
    }
    for (int64_t t = 0; t < batch->n_tokens; t++) {
        batch->target[t] = t % length + 1 < length ? batch->tokens[t + 1] : -1;
    }
    return QS_OK;
}

/* ---- a step ---- */

/* For rows of the embedding, which are exchanged inside the passes. */
static amount embedding(const qs_session *s)
{
    const qs_comm_traffic t = qs_fsdp_get_stats(s->fsdp).embedding;
    return (amount){t.calls, t.messages, t.bytes};
}

static qs_status one_step(bench_step *b, double figures[FIGURES])
{
    qs_session *s = &b->session;
    double norm = 0, loss_sum = 0;
    float *shard = NULL;
    const snapshot before = look(s);
    const amount embedded = embedding(s);
    qs_step_clock clock;
    const double flops = qs_model_flops(s->model);
    const qs_model_noise noise = {.dropout = (float)s->on.config.lora.dropout,
                                  .seed = (uint64_t)s->on.config.seed,
                                  .step = (uint64_t)b->step};
    const double cpu = cpu_s();
    qs_step_clock_begin(&clock, &b->trainer);
    QS_TRY(qs_trainer_passes(&b->trainer, (float)(1.0 / (double)b->targets), &noise, fill_batch, b,
                             true));
    qs_step_clock_passed(&clock);
    QS_TRY(qs_trainer_sums(&b->trainer, &shard, &norm, &loss_sum));
    qs_step_clock_summed(&clock);
    b->trainer.optim->step = b->step;
    QS_TRY(
        qs_comm_agree(s->comm, qs_optim_step(b->trainer.optim, s->on.ops, s->queue, &s->on.config,
                                             s->on.config.optim.lr,
                                             qs_clip_scale(s->on.config.optim.clip, norm), shard)));
    QS_TRY(qs_queue_wait(s->queue));
    qs_step_clock_updated(&clock);
    const snapshot without_lora = look(s);
    QS_TRY(qs_trainer_gather(&b->trainer));
    qs_step_clock_end(&clock, figures);
    figures[CPU] = cpu_s() - cpu;
    const snapshot now = look(s);

    b->step++;
    b->loss = loss_sum / (double)b->targets;
    b->flops = qs_model_flops(s->model) - flops;
    b->traffic[FOR_UNITS] = since(&before, &now, QS_COMM_GATHERS);
    b->traffic[FOR_LORA] = since(&without_lora, &now, QS_COMM_EXCHANGES);
    b->traffic[FOR_EMBEDDING] = minus(embedding(s), embedded);
    b->traffic[FOR_GRADIENTS] =
        minus(minus(since(&before, &now, QS_COMM_EXCHANGES), b->traffic[FOR_LORA]),
              b->traffic[FOR_EMBEDDING]);
    b->traffic[FOR_AGREEMENT] = since(&before, &now, QS_COMM_SMALL);
    return QS_OK;
}

/* ---- bounds ---- */

static qs_status least_of_ranks(qs_comm *comm, double *value)
{
    int64_t negative = -llround(*value);
    QS_TRY(qs_comm_max_i64(comm, &negative, 1));
    *value = -(double)negative;
    return QS_OK;
}

/* On all ranks at the same time, as they compute in a step. */
static qs_status measure_processor(bench_step *b)
{
    qs_session *s = &b->session;
    qs_bench bench = {0};
    const qs_ops_limits limits = qs_bench_least_limits(s->on.threads);
    qs_status st =
        qs_bench_open(&bench, s->backend.plugin, s->device, s->on.ops, s->on.threads, false);
    bench.sharers = qs_comm_local_nranks(s->comm);
    st = st == QS_OK ? qs_bench_open_ops(&bench, &limits) : st;
    QS_TRY(qs_comm_agree(s->comm, st));
    st = qs_bench_bounds(&bench);
    double copy_rate = bench.copy_rate, matmul_rate = bench.matmul_rate;
    memcpy(b->matmul_name, bench.matmul_name, sizeof b->matmul_name);
    qs_bench_close(&bench);
    QS_TRY(qs_comm_agree(s->comm, st));
    QS_TRY(least_of_ranks(s->comm, &copy_rate));
    QS_TRY(least_of_ranks(s->comm, &matmul_rate));
    b->copy_rate = fmax(b->copy_rate, copy_rate);
    b->matmul_rate = fmax(b->matmul_rate, matmul_rate);
    return QS_OK;
}

static size_t largest_share_bytes(const qs_session *s)
{
    size_t most = 1;
    for (int u = 0; u < s->on.index->n_units; u++) {
        const size_t bytes =
            qs_unit_layout_make(&s->on.index->units[u].size, s->on.group.nranks).message_bytes;
        most = bytes > most ? bytes : most;
    }
    return most;
}

/* Bytes a second that a rank receives in an all-gather of the largest unit: the best of some. */
static qs_status measure_link(bench_step *b)
{
    qs_session *s = &b->session;
    const size_t share = largest_share_bytes(s);
    const int nranks = qs_comm_nranks(s->base_comm);
    void *send = NULL, *recv = NULL;
    double best = INFINITY;
    qs_status st = qs_device_alloc(s->device, &send, share, QS_MEM_WORK);
    st = st == QS_OK ? qs_device_alloc(s->device, &recv, share * (size_t)nranks, QS_MEM_WORK) : st;
    st = qs_comm_agree(s->comm, st);
    for (int i = 0; i < GATHER_TRIES && st == QS_OK; i++) {
        st = qs_comm_barrier(s->comm);
        double start = qs_time_s();
        st = st == QS_OK ? qs_comm_all_gather(s->base_comm, send, recv, share, s->queue) : st;
        st = st == QS_OK ? qs_queue_wait(s->queue) : st;
        double seconds = qs_time_s() - start;
        st = st == QS_OK ? qs_bench_slowest(s->comm, &seconds, 1) : st;
        best = seconds < best ? seconds : best;
    }
    qs_device_free(s->device, send);
    qs_device_free(s->device, recv);
    b->link_rate = nranks > 1 ? fmax(b->link_rate, (double)share * (nranks - 1) / best) : NAN;
    return st;
}

/* Before the steps and behind them, and the better counts, since other programs may come or go. */
static qs_status measure_bounds(bench_step *b)
{
    QS_TRY(measure_processor(b));
    return measure_link(b);
}

/* Seconds that each part takes at least. */
static void find_bounds(const bench_step *b, double bound[QS_STEP_PARTS])
{
    const amount *t = b->traffic;
    const double link = isfinite(b->link_rate) ? b->link_rate : INFINITY;
    bound[QS_STEP_COMPUTE] = b->flops / b->matmul_rate;
    bound[QS_STEP_WAIT] = (double)t[FOR_UNITS].bytes / link;
    bound[QS_STEP_REDUCE] = (double)t[FOR_GRADIENTS].bytes / link;
    bound[QS_STEP_LORA] = (double)t[FOR_LORA].bytes / link;
    bound[QS_STEP_OPTIMIZER] = 28.0 * (double)b->trainer.optim->count / b->copy_rate;
    const double passes =
        bound[QS_STEP_COMPUTE] > bound[QS_STEP_WAIT] ? bound[QS_STEP_COMPUTE] : bound[QS_STEP_WAIT];
    bound[QS_STEP_TOTAL] =
        passes + bound[QS_STEP_REDUCE] + bound[QS_STEP_OPTIMIZER] + bound[QS_STEP_LORA];
}

/* ---- set up ---- */

static qs_status open_session(bench_step *b)
{
    qs_session *s = &b->session;
    qs_config config = b->job->options->config;
    qs_comm *world = b->job->world;
    QS_TRY(qs_session_open(s, &config, world));
    QS_TRY(qs_comm_agree(world, qs_data_assume(&b->data, config.train.seq_len)));
    QS_TRY(qs_comm_agree(world, qs_lora_layout_make(&s->on.layout, &s->on.index->config, &config)));
    b->sequences = config.train.global_batch;
    b->slots = (b->sequences + config.train.micro_batch - 1) / config.train.micro_batch;
    b->tokens = b->sequences * config.train.seq_len;
    b->targets = b->sequences * (config.train.seq_len - 1);
    const qs_plan_job plan = qs_plan_training(b->data, NULL, b->slots);
    b->shape = qs_plan_shape(&s->on, &plan);
    return qs_session_settle(s, &plan, &b->shape);
}

static qs_status allocate(bench_step *b)
{
    for (int i = 0; i < FIGURES; i++) {
        QS_TRY(QS_ALLOC(&b->times[i], b->repeats, QS_MEM_WORK));
        QS_TRY(QS_ALLOC(&b->mean[i], b->repeats, QS_MEM_WORK));
        QS_TRY(QS_ALLOC(&b->least[i], b->repeats, QS_MEM_WORK));
    }
    QS_TRY(QS_ALLOC(&b->everyone, b->session.on.nranks * FIGURES, QS_MEM_WORK));
    return qs_trainer_create(&b->trainer, &b->session, &b->shape, b->slots);
}

static qs_status set_up(bench_step *b)
{
    qs_session *s = &b->session;
    const double start = qs_time_s();
    QS_TRY(open_session(b));
    QS_TRY(qs_session_connect(s, &b->shape, true));
    QS_TRY(qs_comm_agree(s->comm, allocate(b)));
    QS_TRY(qs_session_build(s, &b->shape));
    qs_grads_attach(b->trainer.grads, s->fsdp);
    QS_TRY(qs_trainer_start_anew(&b->trainer, (uint64_t)s->on.config.seed));
    QS_TRY(qs_comm_agree(s->comm, qs_optim_push(b->trainer.optim, s->queue)));
    QS_TRY(qs_trainer_gather(&b->trainer));
    b->startup_s = qs_time_s() - start;
    b->startup_cpu_s = cpu_s();
    return QS_OK;
}

static void close_all(bench_step *b)
{
    qs_trainer_destroy(&b->trainer);
    for (int i = 0; i < FIGURES; i++) {
        qs_mem_free(b->times[i]);
        qs_mem_free(b->mean[i]);
        qs_mem_free(b->least[i]);
    }
    qs_mem_free(b->everyone);
    qs_data_close(b->data);
    qs_session_close(&b->session);
}

/* ---- what is said ---- */

/* The rank of `everyone` that computed longest. */
static int busiest(const bench_step *b)
{
    int most = 0;
    for (int r = 1; r < b->session.on.nranks; r++) {
        if (b->everyone[r * FIGURES + QS_STEP_COMPUTE] >
            b->everyone[most * FIGURES + QS_STEP_COMPUTE]) {
            most = r;
        }
    }
    return most;
}

/* From this rank's parts to those of the busiest rank of each repeat, and of all. */
static qs_status compare_ranks(bench_step *b)
{
    const int nranks = b->session.on.nranks;
    double mine[FIGURES];
    for (int64_t i = 0; i < b->repeats; i++) {
        for (int p = 0; p < FIGURES; p++) {
            mine[p] = b->times[p][i];
        }
        QS_TRY(qs_comm_all_gather_now(b->session.comm, mine, b->everyone, sizeof mine));
        const double *most = b->everyone + (ptrdiff_t)busiest(b) * FIGURES;
        for (int p = 0; p < FIGURES; p++) {
            double sum = 0, least = INFINITY;
            for (int r = 0; r < nranks; r++) {
                const double one = b->everyone[r * FIGURES + p];
                sum += one;
                least = one < least ? one : least;
            }
            b->times[p][i] = most[p];
            b->mean[p][i] = sum / nranks;
            b->least[p][i] = least;
        }
    }
    return QS_OK;
}

/* Ranks that have fewer micro-batches of a step than others, for whom they wait. */
static void warn_of_idle_ranks(const bench_step *b)
{
    const int64_t nranks = b->session.on.nranks, turns = qs_shard_width(b->slots, (int)nranks);
    char last[48] = "";
    if (b->slots % nranks == 0) {
        return;
    }
    if (turns > 1) {
        snprintf(last, sizeof last, " in the last of %" PRId64 " turns", turns);
    }
    qs_log_warn("%" PRId64 " of the %" PRId64 " ranks have no micro-batch%s, and wait: a step has "
                "%" PRId64 " (train.global_batch / train.micro_batch)",
                nranks - b->slots % nranks, nranks, last, b->slots);
}

static qs_status largest_of_ranks(bench_step *b)
{
    qs_comm *comm = b->session.comm;
    int64_t flops = llround(b->flops);
    QS_TRY(qs_comm_max_i64(comm, &flops, 1));
    b->flops = (double)flops;
    for (int p = 0; p < PURPOSES; p++) {
        int64_t values[3] = {(int64_t)b->traffic[p].calls, (int64_t)b->traffic[p].messages,
                             (int64_t)b->traffic[p].bytes};
        QS_TRY(qs_comm_max_i64(comm, values, 3));
        b->traffic[p] = (amount){(uint64_t)values[0], (uint64_t)values[1], (uint64_t)values[2]};
    }
    QS_TRY(compare_ranks(b));
    return qs_bench_slowest(comm, &b->startup_s, 1);
}

/* What this rank computes again of a step, since it does not keep it: by the formula, which is
 * that of the rank with the most sequences, and is in proportion to them. */
static qs_status recomputed_flops(const bench_step *b, double *flops)
{
    const qs_session *s = &b->session;
    const int64_t micro_batch = s->on.config.train.micro_batch;
    const int64_t most =
        qs_min_i64(qs_shard_width(b->slots, s->on.nranks) * micro_batch, b->sequences);
    const qs_range slots = qs_slots_of(b->slots, qs_comm_rank(s->comm), s->on.nranks);
    const int64_t mine = qs_min_i64(slots.end * micro_batch, b->sequences) -
                         qs_min_i64(slots.begin * micro_batch, b->sequences);
    qs_model_shape keeps_all = b->shape;
    qs_step_work with, without;
    keeps_all.recompute = QS_RECOMPUTE_NONE;
    QS_TRY(qs_step_work_make(&with, &s->on, b->data, &b->shape, b->slots));
    QS_TRY(qs_step_work_make(&without, &s->on, b->data, &keeps_all, b->slots));
    *flops = (qs_step_flops(&with) - qs_step_flops(&without)) * (double)mine / (double)most;
    return QS_OK;
}

static qs_status count_work(bench_step *b)
{
    qs_comm *comm = b->session.comm;
    double again = 0;
    QS_TRY(qs_comm_agree(comm, recomputed_flops(b, &again)));
    int64_t sums[2] = {llround(b->flops), llround(b->flops - again)};
    QS_TRY(qs_comm_sum_i64(comm, sums, 2));
    b->mean_flops = (double)sums[0] / b->session.on.nranks;
    b->mean_model_flops = (double)sums[1] / b->session.on.nranks;
    return QS_OK;
}

/* CPU seconds of all ranks, as the mean of a rank: those that wait by polling count, too. */
static qs_status mean_cpu(bench_step *b)
{
    qs_comm *comm = b->session.comm;
    int64_t us[2] = {llround(b->startup_cpu_s * 1e6), llround(b->step_cpu_s * 1e6)};
    QS_TRY(qs_comm_sum_i64(comm, us, 2));
    b->startup_cpu_s = (double)us[0] * 1e-6 / qs_comm_nranks(comm);
    b->step_cpu_s = (double)us[1] * 1e-6 / qs_comm_nranks(comm);
    return QS_OK;
}

static void report_facts(const bench_step *b)
{
    const qs_session *s = &b->session;
    qs_bench_report *r = b->job->report;
    qs_bench_report_text(r, "settings", "base", s->on.config.base);
    qs_bench_report_number(r, "settings", "global_batch", (double)s->on.config.train.global_batch);
    qs_bench_report_number(r, "settings", "micro_batch", (double)s->on.config.train.micro_batch);
    qs_bench_report_number(r, "settings", "seq_len", (double)s->on.config.train.seq_len);
    qs_bench_report_number(r, "settings", "layers", s->on.layout.n_layers);
    qs_bench_report_number(r, "settings", "slots", (double)b->slots);
    qs_bench_report_number(r, "settings", "gather_group", (double)b->shape.group);
    qs_bench_report_number(r, "settings", "shard_group", s->on.group.nranks);
    qs_bench_report_number(r, "settings", "repeats", (double)b->repeats);
    char *yaml = qs_config_dump(&s->on.config);
    qs_bench_report_json(r, "config", json_string(yaml != NULL ? yaml : ""));
    free(yaml);
    qs_bench_report_json(r, "base_sha256", json_string(s->on.index->hashes_sha256));
    qs_bench_report_number(r, "bounds", "copy GB/s", b->copy_rate * 1e-9);
    qs_bench_report_number(r, "bounds", "products GFLOP/s", b->matmul_rate * 1e-9);
    qs_bench_report_text(r, "bounds", "products by", b->matmul_name);
    qs_bench_report_number(r, "bounds", "all-gather GB/s", b->link_rate * 1e-9);
}

/* Of the rank that computes longest. */
static double median(const bench_step *b, int figure)
{
    return qs_bench_summary(b->times[figure], b->repeats).median;
}

/* A rank that waits polls, so that its CPU time is at least what its threads had while they
 * computed. */
static void warn_of_contended_cores(const bench_step *b)
{
    const qs_session *s = &b->session;
    const double cores = median(b, CPU) / median(b, QS_STEP_COMPUTE);
    if (!s->on.apart && cores < CONTENDED * s->on.threads) {
        qs_log_warn("the rank that computed longest was on %.2f cores with %d thread%s: others are "
                    "on them too, or there are too few; times are no measure of this program",
                    cores, s->on.threads, s->on.threads > 1 ? "s" : "");
    }
}

static void report_parts(const bench_step *b)
{
    static const qs_bench_column columns[] = {
        {"part", "", 12, QS_BENCH_TEXT},
        {"time", "ms", 11, 3},
        {"min", "ms", 11, 3},
        {"max", "ms", 11, 3},
        {"bound", "ms", 11, 3},
        {"share", "%", 7, 1},
        {"mean", "ms", 11, 3},
        {"least", "ms", 11, 3},
    };
    qs_bench_report *r = b->job->report;
    double bound[QS_STEP_PARTS], total = 0;
    find_bounds(b, bound);
    qs_bench_report_note(
        r, "time: median, of the rank that computes longest; mean, least: of all "
           "ranks; share: bound / time, by this run's copy rate, products and all-gather "
           "(-: they were slower). Gathers hide behind compute: time is what was "
           "waited for");
    qs_bench_report_table(r, "parts", columns, (int)(sizeof columns / sizeof *columns));
    for (int i = 0; i < QS_STEP_PARTS; i++) {
        qs_bench_report_samples(r, b->times[i], b->repeats, 1e3, "ms");
        const qs_bench_times t = qs_bench_summary(b->times[i], b->repeats);
        const qs_bench_cell cells[] = {
            QS_BENCH_T(part_names[i]),
            QS_BENCH_N(t.median * 1e3),
            QS_BENCH_N(t.min * 1e3),
            QS_BENCH_N(t.max * 1e3),
            QS_BENCH_N(bound[i] * 1e3),
            QS_BENCH_N(i == QS_STEP_WAIT ? NAN : qs_bench_share(bound[i], t.median)),
            QS_BENCH_N(qs_bench_summary(b->mean[i], b->repeats).median * 1e3),
            QS_BENCH_N(qs_bench_summary(b->least[i], b->repeats).median * 1e3)};
        qs_bench_report_row(r, cells);
        total = t.median;
    }
    qs_bench_report_number(r, "speed", "tokens/s", (double)b->tokens / total);
    qs_bench_report_number(r, "speed", "bound tokens/s", (double)b->tokens / bound[QS_STEP_TOTAL]);
    qs_bench_report_number(r, "speed", "GFLOP a rank", b->flops * 1e-9);
    qs_bench_report_number(r, "speed", "loss", b->loss);
    qs_bench_report_number(r, "speed", "startup s", b->startup_s);
    qs_bench_report_number(r, "speed", "startup CPU s a rank", b->startup_cpu_s);
    qs_bench_report_number(r, "speed", "step CPU s a rank", b->step_cpu_s);
    qs_bench_report_number(r, "speed", "CPU / wall", median(b, CPU) / total);
}

/* Of a rank, in the mean; rates by the time of the whole step. */
static void report_work(const bench_step *b)
{
    qs_bench_report *r = b->job->report;
    const double total = median(b, QS_STEP_TOTAL);
    const double model = b->mean_model_flops, all = b->mean_flops;
    qs_bench_report_note(r, "work: of a rank, mean; GFLOP are model GFLOP and what is computed "
                            "again; MFU, HFU: their rates over this run's products");
    qs_bench_report_number(r, "work", "model GFLOP", model * 1e-9);
    qs_bench_report_number(r, "work", "recomputed GFLOP", (all - model) * 1e-9);
    qs_bench_report_number(r, "work", "GFLOP", all * 1e-9);
    qs_bench_report_number(r, "work", "most GFLOP", b->flops * 1e-9);
    qs_bench_report_number(r, "work", "model GFLOP/s", model / total * 1e-9);
    qs_bench_report_number(r, "work", "GFLOP/s", all / total * 1e-9);
    qs_bench_report_number(r, "work", "MFU %", 100 * model / total / b->matmul_rate);
    qs_bench_report_number(r, "work", "HFU %", 100 * all / total / b->matmul_rate);
}

static void report_traffic(const bench_step *b)
{
    static const qs_bench_column columns[] = {
        {"traffic", "", 12, QS_BENCH_TEXT},
        {"calls", "", 11, 0},
        {"messages", "", 11, 0},
        {"bytes", "B", 13, 0},
    };
    qs_bench_report *r = b->job->report;
    qs_bench_report_note(r, "received by a rank in a step, the most of all ranks; the messages of "
                            "agreements (allgather, bcast) are the library's");
    qs_bench_report_table(r, "traffic", columns, (int)(sizeof columns / sizeof *columns));
    for (int p = 0; p < PURPOSES; p++) {
        const qs_bench_cell cells[] = {
            QS_BENCH_T(purpose_names[p]), QS_BENCH_N(b->traffic[p].calls),
            QS_BENCH_N(p == FOR_AGREEMENT ? NAN : (double)b->traffic[p].messages),
            QS_BENCH_N(b->traffic[p].bytes)};
        qs_bench_report_row(r, cells);
    }
}

/* ---- the whole ---- */

/* Behind the first step: who waits for the table would like to know for how long. */
static void announce(double step_s, int64_t left)
{
    if (step_s * (double)left > LONG_S) {
        qs_log_info("the first step took %.3g s; %" PRId64 " more take about %.3g s (--warmup, "
                    "--repeats)",
                    step_s, left, step_s * (double)left);
    }
}

static qs_status measure(bench_step *b, int64_t warmup)
{
    double figures[FIGURES];
    QS_TRY(measure_bounds(b)); /* before the warm-up, which fills the caches again */
    for (int64_t i = 0; i < warmup; i++) {
        QS_TRY(one_step(b, figures));
        if (i == 0) {
            announce(figures[QS_STEP_TOTAL], warmup + b->repeats - 1);
        }
    }
    const double cpu = cpu_s();
    for (int64_t i = 0; i < b->repeats; i++) {
        QS_TRY(one_step(b, figures));
        for (int p = 0; p < FIGURES; p++) {
            b->times[p][i] = figures[p];
        }
    }
    b->step_cpu_s = (cpu_s() - cpu) / (double)b->repeats;
    return measure_bounds(b);
}

static qs_status run_step(bench_step *b)
{
    const qs_bench_options *o = b->job->options;
    qs_session *s = &b->session;
    b->repeats = o->repeats > 0 ? o->repeats : REPEATS;
    QS_TRY(set_up(b));
    QS_TRY(qs_bench_describe(b->job, s->device, s->on.ops, s->on.threads,
                             qs_comm_name(s->device_comm)));
    warn_of_idle_ranks(b);
    QS_TRY(measure(b, o->warmup >= 0 ? o->warmup : WARMUP));
    QS_TRY(count_work(b));
    QS_TRY(largest_of_ranks(b));
    QS_TRY(mean_cpu(b));
    report_facts(b);
    report_parts(b);
    report_work(b);
    report_traffic(b);
    warn_of_contended_cores(b);
    b->job->wrong += !isfinite(b->loss);
    return QS_OK;
}

qs_status qs_bench_step(qs_bench_job *job)
{
    bench_step b = {.job = job};
    const qs_status st = run_step(&b);
    qs_comm_end_unagreed(job->world, st); /* what follows waits for what peers may never send */
    close_all(&b);
    return st;
}
