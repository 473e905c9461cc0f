#include "train/plan.h"

#include <stdio.h>

static const double MIB = 1048576.0;

static size_t index_bytes(const qs_data *data)
{
    return (size_t)(data->n_sequences + 1) * (2 * sizeof(int64_t) + sizeof(uint32_t)) +
           (size_t)(data->n_docs + 1) * sizeof(int64_t);
}

static size_t batch_bytes(const qs_model_shape *shape)
{
    const size_t per_token = 4 * sizeof(int32_t) + 2 * sizeof(int64_t);
    return (size_t)(shape->group * shape->max_tokens) * per_token;
}

/* Scratch of the kernels. */
static size_t kernel_bytes(const qs_session *s, const qs_model_shape *shape)
{
    const qs_hf_config *model = &s->index->config;
    qs_ops_limits limits = {.threads = qs_queue_threads(s->queue),
                            .tokens = shape->max_tokens,
                            .documents = shape->max_tokens,
                            .loss_rows = shape->max_targets,
                            .head_dim = model->head_dim,
                            .dropout = s->config.lora.dropout > 0};
    for (int i = 0; i < QS_LINEAR_COUNT; i++) {
        int64_t out = 0, in = 0;
        qs_linear_shape(model, (qs_linear)i, &out, &in);
        limits.widest = out > limits.widest ? out : limits.widest;
        limits.widest = in > limits.widest ? in : limits.widest;
    }
    return s->ops->scratch_bytes(&limits);
}

/* Rows of the embedding on their way: those wanted, those asked of this rank, and a mark per token
 * of the vocabulary. */
static size_t embed_bytes(const qs_session *s, const qs_model_shape *shape)
{
    const qs_hf_config *model = &s->index->config;
    const size_t row = (size_t)model->hidden * qs_dtype_bytes(model->dtype) + 2 * sizeof(int32_t);
    return (size_t)model->vocab * sizeof(int32_t) + 2 * (size_t)shape->max_tokens * row;
}

qs_memory_plan qs_memory_plan_make(const qs_session *s, const qs_data *train, const qs_data *eval,
                                   const qs_model_shape *shape, int64_t slots)
{
    const int nranks = qs_comm_nranks(s->comm);
    const qs_lora_layout *layout = &s->layout;
    const qs_model_bytes model = qs_model_plan(&s->index->config, layout, shape);
    const size_t shard = (size_t)(layout->n_layers * qs_lora_shard_width(layout, nranks));
    qs_memory_plan plan = {0};
    plan.bytes[QS_MEM_BASE_SHARD] = qs_fsdp_shard_bytes(s->index, 0, nranks);
    plan.bytes[QS_MEM_BASE_GATHER] = qs_fsdp_gather_bytes(s->index, nranks);
    plan.bytes[QS_MEM_BASE_SMALL] = model.small_bytes;
    plan.bytes[QS_MEM_LORA] = (size_t)(layout->n_layers * layout->per_layer) * sizeof(float);
    plan.bytes[QS_MEM_LORA_GRAD] = qs_grads_bytes(layout, nranks, slots, shape->group);
    plan.bytes[QS_MEM_OPTIM] = 3 * shard * sizeof(float);
    plan.bytes[QS_MEM_ACTIVATION] = model.activation_bytes;
    plan.bytes[QS_MEM_WORK] = model.work_bytes + kernel_bytes(s, shape) + embed_bytes(s, shape);
    plan.bytes[QS_MEM_DATA] =
        index_bytes(train) + batch_bytes(shape) + (eval != NULL ? index_bytes(eval) : 0);
    for (int c = 0; c < QS_MEM_CLASS_COUNT; c++) {
        plan.total_bytes += plan.bytes[c];
    }
    return plan;
}

void qs_memory_plan_print(const qs_memory_plan *plan, bool measured)
{
    printf("%-28s %12s%s\n", "memory of rank 0", "plan MiB", measured ? "     peak MiB" : "");
    for (int c = 0; c < QS_MEM_CLASS_COUNT; c++) {
        printf("  %-26s %12.1f", qs_mem_class_name((qs_mem_class)c), (double)plan->bytes[c] / MIB);
        if (measured) {
            printf(" %12.1f", (double)qs_mem_peak_bytes((qs_mem_class)c) / MIB);
        }
        printf("\n");
    }
    printf("  %-26s %12.1f", "total", (double)plan->total_bytes / MIB);
    if (measured) {
        printf(" %12.1f", (double)qs_mem_peak_total_bytes() / MIB);
    }
    printf("\n");
    fflush(stdout);
}

qs_status qs_memory_plan_check(const qs_memory_plan *plan, int64_t limit_bytes)
{
    if (limit_bytes == 0 || plan->total_bytes <= (size_t)limit_bytes) {
        return QS_OK;
    }
    return QS_FAIL(QS_ERR_MEMORY,
                   "memory.device_limit is %lld bytes, a rank would need %zu: lower "
                   "train.micro_batch or train.gather_group, set train.recompute: full, or use "
                   "more ranks",
                   (long long)limit_bytes, plan->total_bytes);
}
