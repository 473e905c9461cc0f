#include "train/plan.h"

#include <stdio.h>

#include "base/log.h"
#include "base/minmax.h"
#include "fsdp/grads.h"
#include "train/feed.h"
#include "train/lora_vector.h"

static const double MIB = 1048576.0, GIB = 1073741824.0;

/* What a GPU has to hold beside the plan: code that is loaded when it is first called, and the
 * buffers of NCCL's communicators. nccl#964: 544 MiB for one of two ranks, 688 MiB for one of more,
 * among A100s with NVLink, as often as there are; the first has some more for what they share. */
static const size_t CODE_BYTES = (size_t)256 << 20;
static const size_t NCCL_BYTES = (size_t)1 << 30, FURTHER_NCCL_BYTES = (size_t)768 << 20;

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

qs_model_shape qs_plan_shape(const qs_setting *on, const qs_plan_job *job)
{
    const qs_config *cfg = &on->config;
    const int64_t micro = cfg->train.micro_batch;
    qs_model_shape shape = {
        .max_tokens = qs_data_longest(job->train, micro),
        .max_targets = qs_data_most_targets(job->train, micro),
        .seq_len = cfg->train.seq_len,
        .group = qs_setting_gather_group(on, job->slots),
        .recompute = cfg->train.recompute,
        .backward = true,
        .head_chunk_rows = on->index->head_chunk_rows,
        .residual_f32 = cfg->train.residual_fp32,
        .offload = on->apart && (cfg->memory.offload & QS_OFFLOAD_ACTIVATIONS) != 0,
    };
    if (job->eval != NULL) {
        shape.max_tokens = qs_max_i64(shape.max_tokens, qs_data_longest(job->eval, micro));
        shape.max_targets = qs_max_i64(shape.max_targets, qs_data_most_targets(job->eval, micro));
    }
    return shape;
}

/* Gradients and the optimizer's state. */
static void add_training(qs_memory_plan *plan, const qs_setting *on, int64_t slots, int64_t group)
{
    const qs_lora_layout *layout = &on->layout;
    const size_t state =
        3 * sizeof(float) * (size_t)(layout->n_layers * qs_lora_shard_width(layout, on->nranks));
    size_t *device = plan->bytes[plan->space], *host = plan->bytes[QS_MEM_HOST];
    device[QS_MEM_LORA_GRAD] += qs_grads_bytes(layout, on->nranks, on->per_host, slots, group);
    device[QS_MEM_OPTIM] += state;
    host[QS_MEM_OPTIM] += state;                 /* the image of a checkpoint */
    host[QS_MEM_OPTIM] += on->apart ? state : 0; /* the other side of the mirrors */
}

qs_memory_plan qs_memory_plan_make(const qs_setting *on, const qs_plan_job *job,
                                   const qs_model_shape *shape)
{
    const bool adapted = job->trained || on->loaded;
    const qs_lora_layout *layout = adapted ? &on->layout : NULL;
    const qs_ops_limits limits = qs_setting_limits(on, shape);
    const qs_fsdp_options options = qs_setting_fsdp_options(on, shape);
    const qs_model_bytes model = qs_model_plan(&on->index->config, layout, on->ops, shape);
    const qs_fsdp_bytes fsdp = qs_fsdp_plan(on->index, on->group.nranks, &options);
    qs_memory_plan plan = {.space = on->apart ? QS_MEM_DEVICE : QS_MEM_HOST,
                           .nccl_count = qs_setting_nccl_count(on, job->trained),
                           .trained = job->trained,
                           .settings = job->settings};
    size_t *device = plan.bytes[plan.space], *host = plan.bytes[QS_MEM_HOST];

    device[QS_MEM_BASE_SHARD] += fsdp.device_shard_bytes;
    device[QS_MEM_BASE_GATHER] += fsdp.gather_bytes;
    device[QS_MEM_BASE_DECODED] += on->ops->kept_bytes(&limits);
    device[QS_MEM_BASE_SMALL] += model.small_bytes;
    device[QS_MEM_LORA] +=
        model.adapter_bytes + (adapted ? qs_lora_vector_bytes(on, job->trained) : 0);
    device[QS_MEM_ACTIVATION] += model.activation_bytes;
    device[QS_MEM_WORK] +=
        model.work_bytes + on->ops->scratch_bytes(&limits) + fsdp.embed_device_bytes;
    device[QS_MEM_DATA] += model.input_bytes;

    host[QS_MEM_BASE_SHARD] += fsdp.host_shard_bytes;
    host[QS_MEM_LORA] += qs_lora_vector_loaded_bytes(on);
    host[QS_MEM_ACTIVATION] += model.host_activation_bytes;
    host[QS_MEM_WORK] += fsdp.embed_host_bytes + job->result_bytes;
    host[QS_MEM_DATA] += qs_feed_bytes(shape->group, shape->max_tokens);
    host[QS_MEM_DATA] += job->train != NULL ? qs_data_bytes(job->train) : 0;
    host[QS_MEM_DATA] += job->eval != NULL ? qs_data_bytes(job->eval) : 0;
    host[QS_MEM_DATA] += on->apart ? model.input_bytes : 0; /* the other side of the mirrors */
    if (job->trained) {
        add_training(&plan, on, job->slots, shape->group);
    }
    for (int space = 0; space < QS_MEM_SPACE_COUNT; space++) {
        for (int c = 0; c < QS_MEM_CLASS_COUNT; c++) {
            plan.total_bytes[space] += plan.bytes[space][c];
        }
    }
    return plan;
}

/* ---- what auto stands for ---- */

/* For whom something is settled. */
typedef struct {
    const qs_setting *on;
    const qs_plan_job *job;
    qs_comm *comm; /* of the ranks that agree; NULL on paper */
} candidate_run;

/* The most of all ranks. */
static qs_status agree_on_most(const candidate_run *run, int64_t *values, int count)
{
    return run->comm != NULL ? qs_comm_max_i64(run->comm, values, count) : QS_OK;
}

/* Bytes that this rank lacks of `room` with `shape`. */
static int64_t lack_of_shape(const candidate_run *run, const qs_model_shape *shape, size_t room)
{
    const qs_memory_plan plan = qs_memory_plan_make(run->on, run->job, shape);
    return (int64_t)qs_memory_plan_needed(&plan) - (int64_t)room;
}

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

static qs_status find_lack(candidates *c, const candidate_run *run, const qs_model_shape *shape)
{
    const qs_setting *on = run->on;
    qs_model_shape tried = *shape;
    c->high = qs_setting_gather_group(on, run->job->slots);
    c->low = on->config.train.gather_group == 0 ? 1 : c->high;
    for (tried.group = c->low; tried.group <= c->high; tried.group++) {
        c->lack[tried.group - c->low] = lack_of_shape(run, &tried, on->room);
    }
    return agree_on_most(run, c->lack, (int)(c->high - c->low + 1));
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

static qs_status choose_group(qs_plan_choice *out, const candidate_run *run,
                              const qs_model_shape *shape)
{
    candidates c;
    QS_TRY(find_lack(&c, run, shape));
    out->most = c.high;
    out->group = best_group(&c, qs_shard_width(run->job->slots, run->on->nranks));
    out->lack = lack_of(&c, out->group);
    out->most_lack = lack_of(&c, c.high);
    return QS_OK;
}

/* ---- layers that stay ---- */

/* All layers, or none where no layer is gathered or moved for its use: on no rank, for all look for
 * what fits together. */
static int64_t gatherable(const qs_setting *on)
{
    const bool moved = on->apart && (on->config.memory.offload & QS_OFFLOAD_WEIGHTS) != 0;
    return on->group.most > 1 || moved ? on->index->config.n_layers : 0;
}

/* All layers, or none where the operations keep none decoded. */
static int64_t decodable(const qs_setting *on)
{
    qs_ops_limits limits = qs_setting_limits(on, &(qs_model_shape){0});
    limits.kept_units = 1;
    return on->ops->kept_bytes(&limits) > 0 ? on->index->config.n_layers : 0;
}

/* A number is settled before the group, which has to fit beside it; auto takes what is left. */
static int64_t asked(int64_t setting, int64_t most)
{
    return setting == QS_KEEP_AUTO ? 0 : setting < most ? setting : most;
}

/* Has the rank that lacks most room for *shape, with a twentieth to spare for whatever else uses
 * the memory? */
static qs_status has_room(bool *out, const candidate_run *run, const qs_model_shape *shape)
{
    const size_t room = run->on->room;
    int64_t lack = lack_of_shape(run, shape, room - room / 20);
    QS_TRY(agree_on_most(run, &lack, 1));
    *out = lack <= 0;
    return QS_OK;
}

/* auto: set *layers, which is of *shape, to the largest number that fits, at most `most`; 0 needs
 * no room. */
static qs_status keep_most(qs_plan_kept *out, int64_t *layers, int64_t most,
                           const candidate_run *run, const qs_model_shape *shape)
{
    int64_t low = 0, high = most;
    while (low < high) {
        bool fits = false;
        *layers = (low + high + 1) / 2;
        QS_TRY(has_room(&fits, run, shape));
        low = fits ? *layers : low;
        high = fits ? high : *layers - 1;
    }
    *layers = low;
    *out = (qs_plan_kept){.by_room = most > 0, .layers = low, .of = most};
    return QS_OK;
}

/* What stays whole comes first: a gather that does not hide costs more than decoding. */
static qs_status choose_kept(qs_plan_choice *out, const candidate_run *run, qs_model_shape *shape)
{
    const qs_setting *on = run->on;
    if (on->config.shard.keep_resident == QS_KEEP_AUTO) {
        QS_TRY(keep_most(&out->resident, &shape->keep_resident, gatherable(on), run, shape));
    }
    if (on->config.memory.keep_decoded == QS_KEEP_AUTO) {
        QS_TRY(keep_most(&out->decoded, &shape->keep_decoded, decodable(on), run, shape));
    }
    return QS_OK;
}

/* ---- all of it ---- */

qs_status qs_plan_settle(qs_plan_choice *out, qs_setting *on, const qs_plan_job *job,
                         qs_model_shape *shape, qs_comm *comm)
{
    const candidate_run run = {on, job, comm};
    *out = (qs_plan_choice){0};
    shape->keep_resident = asked(on->config.shard.keep_resident, on->index->config.n_layers);
    shape->keep_decoded = asked(on->config.memory.keep_decoded, decodable(on));
    QS_TRY(choose_group(out, &run, shape));
    if (out->lack > 0 && on->config.shard.group == QS_SHARD_AUTO && on->group.most < on->nranks) {
        out->widened = true;
        out->node_lack = out->lack;
        on->group = (qs_group_size){on->nranks, on->nranks};
        QS_TRY(choose_group(out, &run, shape));
    }
    shape->group = out->group;
    return choose_kept(out, &run, shape);
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

void qs_memory_plan_compare(const qs_memory_plan *plan)
{
    for (int c = 0; c < QS_MEM_CLASS_COUNT; c++) {
        qs_log_debug("memory: %s: %zu planned, %zu reached", qs_mem_class_name((qs_mem_class)c),
                     plan->bytes[plan->space][c], qs_mem_peak_bytes(plan->space, (qs_mem_class)c));
    }
    qs_log_debug("memory: total: %zu planned, %zu reached", plan->total_bytes[plan->space],
                 qs_mem_peak_total_bytes(plan->space));
}
