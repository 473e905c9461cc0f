#include "train/plan.h"

#include <stdio.h>

#include "base/log.h"
#include "base/minmax.h"
#include "fsdp/grads.h"

static const double MIB = 1048576.0, GIB = 1073741824.0;

/* What a GPU has to hold beside the plan: code that is loaded when it is first called, and the
 * buffers of NCCL's communicators. nccl#964: 544 MiB for one of two ranks, 688 MiB for one of more,
 * among A100s with NVLink, as often as there are; the first has some more for what they share. */
static const size_t CODE_BYTES = (size_t)256 << 20;
static const size_t NCCL_BYTES = (size_t)1 << 30, FURTHER_NCCL_BYTES = (size_t)768 << 20;

/* The index, and what is held of a file that this rank does not see. */
static size_t data_bytes(const qs_data *data)
{
    return data == NULL
               ? 0
               : qs_data_held_bytes(data) +
                     (size_t)(data->n_sequences + 1) * (2 * sizeof(int64_t) + sizeof(uint32_t)) +
                     (size_t)(data->n_docs + 1) * sizeof(int64_t);
}

/* Micro-batches of a pass and of the one behind it. */
static size_t batch_bytes(const qs_model_shape *shape)
{
    const size_t per_token = 4 * sizeof(int32_t) + 2 * sizeof(int64_t);
    return (size_t)(2 * shape->group * shape->max_tokens) * per_token;
}

qs_plan_job qs_plan_training(const qs_data *train, const qs_data *eval, int64_t slots)
{
    return (qs_plan_job){.train = train,
                         .eval = eval,
                         .slots = slots,
                         .trained = true,
                         .settings = "lower train.micro_batch, train.gather_group, "
                                     "memory.keep_decoded, shard.keep_resident or shard.prefetch, "
                                     "set train.recompute: full"};
}

qs_model_shape qs_plan_shape(const qs_session *s, const qs_plan_job *job)
{
    const qs_config *cfg = &s->config;
    const int64_t micro = cfg->train.micro_batch;
    qs_model_shape shape = {
        .max_tokens = qs_data_longest(job->train, micro),
        .max_targets = qs_data_most_targets(job->train, micro),
        .seq_len = cfg->train.seq_len,
        .group = qs_session_group(s, job->slots),
        .recompute = cfg->train.recompute,
        .backward = true,
        .head_chunk_rows = s->index->head_chunk_rows,
        .residual_f32 = cfg->train.residual_fp32,
        .offload = s->apart && (cfg->memory.offload & QS_OFFLOAD_ACTIVATIONS) != 0,
    };
    if (job->eval != NULL) {
        shape.max_tokens = qs_max_i64(shape.max_tokens, qs_data_longest(job->eval, micro));
        shape.max_targets = qs_max_i64(shape.max_targets, qs_data_most_targets(job->eval, micro));
    }
    return shape;
}

/* Gradients and the optimizer's state. */
static void add_training(qs_memory_plan *plan, const qs_session *s, int64_t slots, int64_t group)
{
    const qs_lora_layout *layout = &s->layout;
    const size_t state =
        3 * sizeof(float) * (size_t)(layout->n_layers * qs_lora_shard_width(layout, s->nranks));
    size_t *device = plan->bytes[plan->space], *host = plan->bytes[QS_MEM_HOST];
    device[QS_MEM_LORA_GRAD] += qs_grads_bytes(layout, s->nranks, s->per_host, slots, group);
    device[QS_MEM_OPTIM] += state;
    host[QS_MEM_OPTIM] += state;                /* the image of a checkpoint */
    host[QS_MEM_OPTIM] += s->apart ? state : 0; /* the other side of the mirrors */
}

qs_memory_plan qs_memory_plan_make(const qs_session *s, const qs_plan_job *job,
                                   const qs_model_shape *shape)
{
    const bool adapted = job->trained || s->adapter != NULL;
    const qs_lora_layout *layout = adapted ? &s->layout : NULL;
    const qs_ops_limits limits = qs_session_limits(s, shape);
    const qs_fsdp_options options = qs_session_fsdp_options(s, shape);
    const qs_model_bytes model = qs_model_plan(&s->index->config, layout, s->ops, shape);
    const qs_fsdp_bytes fsdp = qs_fsdp_plan(s->index, s->shard.nranks, &options);
    qs_memory_plan plan = {.space = s->apart ? QS_MEM_DEVICE : QS_MEM_HOST,
                           .nccl_count = qs_session_nccl_count(s, job->trained),
                           .trained = job->trained,
                           .settings = job->settings};
    size_t *device = plan.bytes[plan.space], *host = plan.bytes[QS_MEM_HOST];

    device[QS_MEM_BASE_SHARD] += fsdp.device_shard_bytes;
    device[QS_MEM_BASE_GATHER] += fsdp.gather_bytes;
    device[QS_MEM_BASE_DECODED] += s->ops->kept_bytes(&limits);
    device[QS_MEM_BASE_SMALL] += model.small_bytes;
    device[QS_MEM_LORA] +=
        model.adapter_bytes + (adapted ? qs_session_lora_bytes(s, job->trained) : 0);
    device[QS_MEM_ACTIVATION] += model.activation_bytes;
    device[QS_MEM_WORK] +=
        model.work_bytes + s->ops->scratch_bytes(&limits) + fsdp.embed_device_bytes;
    device[QS_MEM_DATA] += model.input_bytes;

    host[QS_MEM_BASE_SHARD] += fsdp.host_shard_bytes;
    host[QS_MEM_LORA] += s->adapter != NULL ? qs_session_adapter_bytes(s) : 0;
    host[QS_MEM_ACTIVATION] += model.host_activation_bytes;
    host[QS_MEM_WORK] += fsdp.embed_host_bytes + job->result_bytes;
    host[QS_MEM_DATA] += data_bytes(job->train) + batch_bytes(shape) + data_bytes(job->eval);
    host[QS_MEM_DATA] += s->apart ? model.input_bytes : 0; /* the other side of the mirrors */
    if (job->trained) {
        add_training(&plan, s, job->slots, shape->group);
    }
    for (int space = 0; space < QS_MEM_SPACE_COUNT; space++) {
        for (int c = 0; c < QS_MEM_CLASS_COUNT; c++) {
            plan.total_bytes[space] += plan.bytes[space][c];
        }
    }
    return plan;
}

/* ---- what auto stands for ---- */

static int64_t passes(int64_t per_rank, int64_t group)
{
    return (per_rank + group - 1) / group;
}

/* Groups from `low` to `high`, and the bytes that a rank lacks for each. */
typedef struct {
    int64_t low, high;
    int64_t lack[QS_AUTO_GROUP_MAX]; /* from `low` on */
} candidates;

static int64_t lack_of(const candidates *c, int64_t group)
{
    return c->lack[group - c->low];
}

static qs_status find_lack(candidates *c, const qs_session *s, const qs_plan_job *job,
                           const qs_model_shape *shape)
{
    qs_model_shape tried = *shape;
    c->high = qs_session_group(s, job->slots);
    c->low = s->config.train.gather_group == 0 ? 1 : c->high;
    for (tried.group = c->low; tried.group <= c->high; tried.group++) {
        const qs_memory_plan plan = qs_memory_plan_make(s, job, &tried);
        c->lack[tried.group - c->low] = (int64_t)qs_memory_plan_needed(&plan) - (int64_t)s->room;
    }
    return s->comm != NULL ? qs_comm_max_i64(s->comm, c->lack, (int)(c->high - c->low + 1)) : QS_OK;
}

bool qs_plan_saves_pass(int64_t per_rank, int64_t group)
{
    return group == 1 || passes(per_rank, group) < passes(per_rank, group - 1);
}

/* The largest that fits, past those that save no pass; or the one that lacks least. */
static int64_t best_group(const candidates *c, int64_t per_rank)
{
    int64_t least = c->high;
    for (int64_t g = c->high; g >= c->low; g--) {
        const bool saves = g == c->high || qs_plan_saves_pass(per_rank, g);
        if (lack_of(c, g) <= 0 && saves) {
            return g;
        }
        least = lack_of(c, g) < lack_of(c, least) ? g : least;
    }
    return least;
}

static qs_status choose_group(qs_plan_choice *out, const qs_session *s, const qs_plan_job *job,
                              const qs_model_shape *shape)
{
    candidates c;
    QS_TRY(find_lack(&c, s, job, shape));
    out->most = c.high;
    out->group = best_group(&c, qs_shard_width(job->slots, s->nranks));
    out->lack = lack_of(&c, out->group);
    out->most_lack = lack_of(&c, c.high);
    return QS_OK;
}

/* ---- layers that stay ---- */

/* All layers, or none where no layer is gathered or moved for its use. */
static int64_t gatherable(const qs_session *s)
{
    const bool moved = s->apart && (s->config.memory.offload & QS_OFFLOAD_WEIGHTS) != 0;
    return s->shard.nranks > 1 || moved ? s->index->config.n_layers : 0;
}

/* All layers, or none where the operations keep none decoded. */
static int64_t decodable(const qs_session *s)
{
    qs_ops_limits limits = qs_session_limits(s, &(qs_model_shape){0});
    limits.kept_units = 1;
    return s->ops->kept_bytes(&limits) > 0 ? s->index->config.n_layers : 0;
}

/* A number is settled before the group, which has to fit beside it; auto takes what is left. */
static int64_t asked(int64_t setting, int64_t most)
{
    return setting == QS_KEEP_AUTO ? 0 : setting < most ? setting : most;
}

/* Has the rank that lacks most room for *shape, with a twentieth to spare for whatever else uses
 * the memory? */
static qs_status has_room(bool *out, const qs_session *s, const qs_plan_job *job,
                          const qs_model_shape *shape)
{
    const qs_memory_plan plan = qs_memory_plan_make(s, job, shape);
    int64_t lack = (int64_t)qs_memory_plan_needed(&plan) - (int64_t)(s->room - s->room / 20);
    QS_TRY(s->comm != NULL ? qs_comm_max_i64(s->comm, &lack, 1) : QS_OK);
    *out = lack <= 0;
    return QS_OK;
}

/* auto: set *layers, which is of *shape, to the largest number that fits, at most `most`; 0 needs
 * no room. */
static qs_status keep_most(qs_plan_kept *out, int64_t *layers, int64_t most, const qs_session *s,
                           const qs_plan_job *job, const qs_model_shape *shape)
{
    int64_t low = 0, high = most;
    while (low < high) {
        bool fits = false;
        *layers = (low + high + 1) / 2;
        QS_TRY(has_room(&fits, s, job, shape));
        low = fits ? *layers : low;
        high = fits ? high : *layers - 1;
    }
    *layers = low;
    *out = (qs_plan_kept){.by_room = most > 0, .layers = low, .of = most};
    return QS_OK;
}

/* What stays whole comes first: a gather that does not hide costs more than decoding. */
static qs_status choose_kept(qs_plan_choice *out, const qs_session *s, const qs_plan_job *job,
                             qs_model_shape *shape)
{
    if (s->config.shard.keep_resident == QS_KEEP_AUTO) {
        QS_TRY(keep_most(&out->resident, &shape->keep_resident, gatherable(s), s, job, shape));
    }
    if (s->config.memory.keep_decoded == QS_KEEP_AUTO) {
        QS_TRY(keep_most(&out->decoded, &shape->keep_decoded, decodable(s), s, job, shape));
    }
    return QS_OK;
}

/* ---- all of it ---- */

/* What is final alone: a node's copy that the plan took back is not said to be there first. */
static void report(const qs_plan_choice *choice, const qs_session *s)
{
    char reasons[QS_PLAN_REASONS_MAX][QS_PLAN_REASON_BYTES];
    const int count = qs_plan_reasons(choice, reasons);
    qs_shard_group_report(&s->shard, &s->config, s->comm);
    for (int i = 0; i < count; i++) {
        qs_log_info("%s", reasons[i]);
    }
}

qs_status qs_plan_settle(qs_plan_choice *out, qs_session *s, const qs_plan_job *job,
                         qs_model_shape *shape)
{
    *out = (qs_plan_choice){0};
    shape->keep_resident = asked(s->config.shard.keep_resident, s->index->config.n_layers);
    shape->keep_decoded = asked(s->config.memory.keep_decoded, decodable(s));
    QS_TRY(choose_group(out, s, job, shape));
    if (out->lack > 0 && s->config.shard.group == QS_SHARD_AUTO && s->shard.most < s->nranks) {
        out->widened = true;
        out->node_lack = out->lack;
        qs_shard_group_widen(&s->shard, s->comm, s->nranks);
        QS_TRY(choose_group(out, s, job, shape));
    }
    shape->group = out->group;
    QS_TRY(choose_kept(out, s, job, shape));
    if (s->comm != NULL) {
        report(out, s);
    }
    return QS_OK;
}

static void add_kept(char out[QS_PLAN_REASONS_MAX][QS_PLAN_REASON_BYTES], int *count,
                     const char *name, const qs_plan_kept *kept)
{
    if (kept->by_room) {
        snprintf(out[(*count)++], QS_PLAN_REASON_BYTES, "%s: auto is %lld of %lld layers%s", name,
                 (long long)kept->layers, (long long)kept->of,
                 kept->layers < kept->of ? ": a rank has no room for more" : "");
    }
}

int qs_plan_reasons(const qs_plan_choice *choice,
                    char out[QS_PLAN_REASONS_MAX][QS_PLAN_REASON_BYTES])
{
    int count = 0;
    if (choice->widened) {
        snprintf(out[count++], QS_PLAN_REASON_BYTES,
                 "shard.group: auto is world: with a copy of the base on each node a rank would "
                 "lack %.2f GiB",
                 (double)choice->node_lack / GIB);
    }
    if (choice->group < choice->most) {
        snprintf(out[count++], QS_PLAN_REASON_BYTES,
                 "train.gather_group: auto is %lld: with %lld micro-batches a pass a rank would "
                 "lack %.2f GiB",
                 (long long)choice->group, (long long)choice->most,
                 (double)choice->most_lack / GIB);
    }
    add_kept(out, &count, "shard.keep_resident", &choice->resident);
    add_kept(out, &count, "memory.keep_decoded", &choice->decoded);
    return count;
}

/* ---- what is printed ---- */

static void print_space(const qs_memory_plan *plan, qs_mem_space space, const char *title,
                        bool measured)
{
    printf("%-28s %12s%s\n", title, "plan MiB", measured ? "     peak MiB" : "");
    for (int c = 0; c < QS_MEM_CLASS_COUNT; c++) {
        printf("  %-26s %12.1f", qs_mem_class_name((qs_mem_class)c),
               (double)plan->bytes[space][c] / MIB);
        if (measured) {
            printf(" %12.1f", (double)qs_mem_peak_bytes(space, (qs_mem_class)c) / MIB);
        }
        printf("\n");
    }
    printf("  %-26s %12.1f", "total", (double)plan->total_bytes[space] / MIB);
    if (measured) {
        printf(" %12.1f", (double)qs_mem_peak_total_bytes(space) / MIB);
    }
    printf("\n");
}

/* What is not ours to count, so that no peak stands beside it. */
static void print_beside(const qs_memory_plan *plan)
{
    char what[64];
    const int count = plan->nccl_count;
    printf("  %-26s %12.1f\n", "beside it: code", (double)CODE_BYTES / MIB);
    if (count > 0) {
        snprintf(what, sizeof what, "NCCL, %d communicator%s", count, count == 1 ? "" : "s");
        printf("  %-26s %12.1f\n", what, (double)qs_memory_plan_nccl_bytes(plan) / MIB);
    }
}

void qs_memory_plan_print(const qs_memory_plan *plan, bool measured)
{
    if (plan->space == QS_MEM_DEVICE) {
        print_space(plan, QS_MEM_DEVICE, "device memory of rank 0", measured);
        print_beside(plan);
        print_space(plan, QS_MEM_HOST, "host memory of rank 0", measured);
    } else {
        print_space(plan, QS_MEM_HOST, "memory of rank 0", measured);
    }
    fflush(stdout);
}

size_t qs_memory_plan_nccl_bytes(const qs_memory_plan *plan)
{
    const int further = plan->nccl_count - 1;
    return further < 0 ? 0 : NCCL_BYTES + (size_t)further * FURTHER_NCCL_BYTES;
}

size_t qs_memory_plan_needed(const qs_memory_plan *plan)
{
    const size_t beside = CODE_BYTES + qs_memory_plan_nccl_bytes(plan);
    return plan->total_bytes[plan->space] + (plan->space == QS_MEM_DEVICE ? beside : 0);
}

static qs_status check_limit(const qs_memory_plan *plan, int64_t limit_bytes)
{
    const size_t needed = qs_memory_plan_needed(plan);
    return limit_bytes <= 0 || needed <= (size_t)limit_bytes
               ? QS_OK
               : QS_FAIL(QS_ERR_MEMORY,
                         "memory.device_limit is %lld bytes, a rank would need %zu: %s, or use "
                         "more ranks",
                         (long long)limit_bytes, needed, plan->settings);
}

static qs_status check_device(const qs_memory_plan *plan, const qs_device *device)
{
    const size_t needed = qs_memory_plan_needed(plan), held = plan->total_bytes[plan->space];
    size_t free_bytes = 0, total_bytes = 0;
    qs_device_memory(device, &free_bytes, &total_bytes);
    return total_bytes == 0 || needed <= free_bytes
               ? QS_OK
               : QS_FAIL(QS_ERR_MEMORY,
                         "%s: a rank would need %zu bytes of device memory and %zu for code and "
                         "NCCL, %zu of %zu are free: %s%s, or use more ranks",
                         qs_device_name(device), held, needed - held, free_bytes, total_bytes,
                         plan->settings,
                         plan->trained ? " or memory.offload: [activations, weights, embedding]"
                                       : ", set memory.offload: [weights, embedding]");
}

/* The kernel would end the run later, without a word. */
static qs_status check_host(const qs_memory_plan *plan, const qs_room *host)
{
    const size_t needed = plan->total_bytes[QS_MEM_HOST];
    char what[QS_ROOM_TEXT_MAX];
    if (needed <= host->bytes) {
        return QS_OK;
    }
    qs_room_describe(host, what, sizeof what);
    const char *remedy = qs_limit_remedy(&host->limit);
    return QS_FAIL(QS_ERR_MEMORY,
                   "memory of the host: a rank would need %zu bytes and has %zu, its part of %s: "
                   "%s%s%s, or use more hosts",
                   needed, host->bytes, what, remedy, remedy[0] != '\0' ? "; " : "",
                   plan->space == QS_MEM_HOST ? plan->settings
                                              : "take entries out of memory.offload");
}

qs_status qs_memory_plan_check(const qs_memory_plan *plan, const qs_session *s)
{
    QS_TRY(check_limit(plan, s->config.memory.device_limit));
    QS_TRY(check_device(plan, s->device));
    return check_host(plan, &s->host);
}

qs_status qs_memory_plan_require(const qs_memory_plan *plan, const qs_session *s, bool print)
{
    const qs_status fits = qs_memory_plan_check(plan, s);
    const bool explains = fits != QS_OK && qs_log_says(QS_LOG_INFO);
    if (qs_comm_rank(s->comm) == 0 && (print || explains)) {
        qs_memory_plan_print(plan, false);
    }
    return qs_comm_agree(s->comm, fits);
}

qs_status qs_plan_forward(qs_memory_plan *out, qs_session *s, const qs_plan_job *job,
                          qs_model_shape *shape)
{
    qs_plan_choice choice;
    QS_TRY(qs_plan_settle(&choice, s, job, shape));
    *out = qs_memory_plan_make(s, job, shape);
    return qs_memory_plan_require(out, s, false);
}

void qs_memory_plan_compare(const qs_memory_plan *plan)
{
    for (int c = 0; c < QS_MEM_CLASS_COUNT; c++) {
        qs_log_debug("memory: %s: %zu planned, %zu reached", qs_mem_class_name((qs_mem_class)c),
                     plan->bytes[plan->space][c], qs_mem_peak_bytes(plan->space, (qs_mem_class)c));
    }
    qs_log_debug("memory: total: %zu planned, %zu reached", plan->total_bytes[plan->space],
                 qs_mem_peak_total_bytes(plan->space));
}
