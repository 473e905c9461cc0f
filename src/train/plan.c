#include "train/plan.h"

#include <stdio.h>

#include "base/log.h"

static const double MIB = 1048576.0, GIB = 1073741824.0;

/* What a GPU has to hold beside the plan: code that is loaded when it is first called, and the
 * buffers of NCCL where there are peers. */
static const size_t CODE_BYTES = (size_t)256 << 20, NCCL_BYTES = (size_t)1 << 30;

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

static int64_t larger(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

qs_model_shape qs_plan_shape(const qs_session *s, const qs_data *train, const qs_data *eval,
                             int64_t slots)
{
    const qs_config *cfg = &s->config;
    const int64_t micro = cfg->train.micro_batch;
    qs_model_shape shape = {
        .max_tokens = qs_data_longest(train, micro),
        .max_targets = qs_data_most_targets(train, micro),
        .seq_len = cfg->train.seq_len,
        .group = qs_session_group(s, slots),
        .recompute = cfg->train.recompute,
        .backward = true,
        .head_chunk_rows = s->index->head_chunk_rows,
        .residual_f32 = cfg->train.residual_fp32,
        .offload = s->apart && (cfg->memory.offload & QS_OFFLOAD_ACTIVATIONS) != 0,
    };
    if (eval != NULL) {
        shape.max_tokens = larger(shape.max_tokens, qs_data_longest(eval, micro));
        shape.max_targets = larger(shape.max_targets, qs_data_most_targets(eval, micro));
    }
    return shape;
}

qs_memory_plan qs_memory_plan_make(const qs_session *s, const qs_data *train, const qs_data *eval,
                                   const qs_model_shape *shape, int64_t slots)
{
    const int nranks = s->nranks;
    const qs_lora_layout *layout = &s->layout;
    const qs_ops_limits limits = qs_session_limits(s, shape);
    const qs_fsdp_options options = qs_session_fsdp_options(s, shape);
    const qs_model_bytes model = qs_model_plan(&s->index->config, layout, s->ops, shape);
    const qs_fsdp_bytes fsdp = qs_fsdp_plan(s->index, s->shard.nranks, &options);
    const size_t shard = (size_t)(layout->n_layers * qs_lora_shard_width(layout, nranks));
    qs_memory_plan plan = {.space = s->apart ? QS_MEM_DEVICE : QS_MEM_HOST, .peers = nranks > 1};
    size_t *device = plan.bytes[plan.space], *host = plan.bytes[QS_MEM_HOST];

    device[QS_MEM_BASE_SHARD] += fsdp.device_shard_bytes;
    device[QS_MEM_BASE_GATHER] += fsdp.gather_bytes;
    device[QS_MEM_BASE_SMALL] += model.small_bytes;
    device[QS_MEM_LORA] += qs_session_lora_bytes(s) + model.adapter_bytes;
    device[QS_MEM_LORA_GRAD] += qs_grads_bytes(layout, nranks, s->per_host, slots, shape->group);
    device[QS_MEM_OPTIM] += 3 * shard * sizeof(float);
    device[QS_MEM_ACTIVATION] += model.activation_bytes;
    device[QS_MEM_WORK] +=
        model.work_bytes + s->ops->scratch_bytes(&limits) + fsdp.embed_device_bytes;
    device[QS_MEM_DATA] += model.input_bytes;

    host[QS_MEM_BASE_SHARD] += fsdp.host_shard_bytes;
    host[QS_MEM_ACTIVATION] += model.host_activation_bytes;
    host[QS_MEM_WORK] += fsdp.embed_host_bytes;
    host[QS_MEM_DATA] += data_bytes(train) + batch_bytes(shape) + data_bytes(eval);
    host[QS_MEM_OPTIM] += 3 * shard * sizeof(float); /* the image of a checkpoint */
    if (s->apart) {                                  /* the other side of the mirrors */
        host[QS_MEM_OPTIM] += 3 * shard * sizeof(float);
        host[QS_MEM_DATA] += model.input_bytes;
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

static qs_status find_lack(candidates *c, const qs_session *s, const qs_data *train,
                           const qs_data *eval, const qs_model_shape *shape, int64_t slots)
{
    qs_model_shape tried = *shape;
    c->high = qs_session_group(s, slots);
    c->low = s->config.train.gather_group == 0 ? 1 : c->high;
    for (tried.group = c->low; tried.group <= c->high; tried.group++) {
        const qs_memory_plan plan = qs_memory_plan_make(s, train, eval, &tried, slots);
        c->lack[tried.group - c->low] = (int64_t)qs_memory_plan_needed(&plan) - (int64_t)s->room;
    }
    return s->comm != NULL ? qs_comm_max_i64(s->comm, c->lack, (int)(c->high - c->low + 1)) : QS_OK;
}

/* The largest that fits, past those that take as many passes as the next smaller one (of four
 * micro-batches 3 + 1 hide gathers worse than 2 + 2); or the one that lacks least. */
static int64_t best_group(const candidates *c, int64_t per_rank)
{
    int64_t least = c->high;
    for (int64_t g = c->high; g >= c->low; g--) {
        const bool saves = g == c->high || g == 1 || passes(per_rank, g) < passes(per_rank, g - 1);
        if (lack_of(c, g) <= 0 && saves) {
            return g;
        }
        least = lack_of(c, g) < lack_of(c, least) ? g : least;
    }
    return least;
}

static qs_status choose_group(qs_plan_choice *out, const qs_session *s, const qs_data *train,
                              const qs_data *eval, const qs_model_shape *shape, int64_t slots)
{
    candidates c;
    QS_TRY(find_lack(&c, s, train, eval, shape, slots));
    out->most = c.high;
    out->group = best_group(&c, qs_shard_width(slots, s->nranks));
    out->lack = lack_of(&c, out->group);
    out->most_lack = lack_of(&c, c.high);
    return QS_OK;
}

qs_status qs_plan_settle(qs_plan_choice *out, qs_session *s, const qs_data *train,
                         const qs_data *eval, qs_model_shape *shape, int64_t slots)
{
    char reasons[QS_PLAN_REASONS_MAX][QS_PLAN_REASON_BYTES];
    *out = (qs_plan_choice){0};
    QS_TRY(choose_group(out, s, train, eval, shape, slots));
    if (out->lack > 0 && s->config.shard.group == QS_SHARD_AUTO && s->shard.most < s->nranks) {
        out->widened = true;
        out->node_lack = out->lack;
        qs_shard_group_widen(&s->shard, s->comm, s->nranks);
        QS_TRY(choose_group(out, s, train, eval, shape, slots));
    }
    shape->group = out->group;
    const int count = s->comm != NULL ? qs_plan_reasons(out, reasons) : 0;
    for (int i = 0; i < count; i++) {
        qs_log_info("%s", reasons[i]);
    }
    return QS_OK;
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

void qs_memory_plan_print(const qs_memory_plan *plan, bool measured)
{
    if (plan->space == QS_MEM_DEVICE) {
        print_space(plan, QS_MEM_DEVICE, "device memory of rank 0", measured);
        print_space(plan, QS_MEM_HOST, "host memory of rank 0", measured);
    } else {
        print_space(plan, QS_MEM_HOST, "memory of rank 0", measured);
    }
    fflush(stdout);
}

size_t qs_memory_plan_needed(const qs_memory_plan *plan)
{
    const size_t beside = CODE_BYTES + (plan->peers ? NCCL_BYTES : 0);
    return plan->total_bytes[plan->space] + (plan->space == QS_MEM_DEVICE ? beside : 0);
}

static qs_status check_limit(const qs_memory_plan *plan, int64_t limit_bytes)
{
    const size_t needed = qs_memory_plan_needed(plan);
    return limit_bytes <= 0 || needed <= (size_t)limit_bytes
               ? QS_OK
               : QS_FAIL(QS_ERR_MEMORY,
                         "memory.device_limit is %lld bytes, a rank would need %zu: lower "
                         "train.micro_batch, train.gather_group, shard.keep_resident or "
                         "shard.prefetch, set train.recompute: full, or use more ranks",
                         (long long)limit_bytes, needed);
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
                         "NCCL, %zu of %zu are free: lower train.micro_batch, train.gather_group, "
                         "shard.keep_resident or shard.prefetch, set train.recompute: full or "
                         "memory.offload: [activations, weights, embedding], or use more ranks",
                         qs_device_name(device), held, needed - held, free_bytes, total_bytes);
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
                   plan->space == QS_MEM_HOST
                       ? "lower train.micro_batch, train.gather_group, shard.keep_resident or "
                         "shard.prefetch, set train.recompute: full"
                       : "take entries out of memory.offload");
}

qs_status qs_memory_plan_check(const qs_memory_plan *plan, const qs_session *s)
{
    QS_TRY(check_limit(plan, s->config.memory.device_limit));
    QS_TRY(check_device(plan, s->device));
    return check_host(plan, &s->host);
}
