#include "train/setting.h"

#include "base/minmax.h"

qs_ops_limits qs_setting_limits(const qs_setting *on, const qs_model_shape *shape)
{
    const qs_hf_config *model = &on->index->config;
    qs_ops_limits limits = {.n_heads = model->n_heads,
                            .n_kv_heads = model->n_kv_heads,
                            .head_dim = model->head_dim,
                            .q_norm = qs_norm_width(model, QS_NORM_Q),
                            .hidden = model->hidden,
                            .threads = on->threads,
                            .tokens = shape->max_tokens,
                            .documents = shape->max_tokens,
                            .loss_rows = shape->max_targets,
                            .dropout = on->config.lora.dropout > 0,
                            .dora = on->config.lora.dora,
                            .lora_rank = on->layout.lora_rank,
                            .head_rows = on->index->head_chunk_rows,
                            .kept_units = qs_model_kept_units(model, shape)};
    for (int i = 0; i < QS_LINEAR_COUNT; i++) {
        if (qs_linears(model->fused) >> i & 1) {
            const int n = limits.n_linears++;
            qs_linear_shape(model, (qs_linear)i, &limits.out[n], &limits.in[n]);
            limits.joined[n] = qs_model_joins(model, limits.dora, (qs_linear)i);
            limits.widest = qs_max_i64(limits.widest, qs_max_i64(limits.out[n], limits.in[n]));
        }
    }
    return limits;
}

qs_fsdp_options qs_setting_fsdp_options(const qs_setting *on, const qs_model_shape *shape)
{
    const uint32_t offload =
        on->apart ? on->config.memory.offload : 0; /* the CPU's is the host's */
    return (qs_fsdp_options){.ops = on->ops,
                             .max_tokens = shape->max_tokens,
                             .offload_layers = (offload & QS_OFFLOAD_WEIGHTS) != 0,
                             .offload_vocabulary = (offload & QS_OFFLOAD_EMBEDDING) != 0,
                             .prefetch = on->config.shard.prefetch,
                             .keep_resident =
                                 qs_max_i64(shape->keep_resident, shape->keep_decoded)};
}

qs_fsdp_options qs_setting_group_options(const qs_setting *on)
{
    const int64_t kept = on->config.shard.keep_resident;
    return qs_setting_fsdp_options(
        on, &(qs_model_shape){.max_tokens = 1, .keep_resident = qs_max_i64(kept, 0)});
}

qs_setting_parts qs_setting_parts_of(const qs_setting *on, bool trained)
{
    const bool grouped = on->group.most < on->nranks, levelled = trained && on->per_host > 0;
    const bool group_is_host = grouped && on->group.most == on->per_host;
    return (qs_setting_parts){.world = on->nranks,
                              .group = grouped ? on->group.nranks : 0,
                              .inside = levelled && !group_is_host ? on->per_host : 0,
                              .across = levelled ? on->nranks / on->per_host : 0};
}

int qs_setting_nccl_count(const qs_setting *on, bool trained)
{
    const qs_setting_parts p = qs_setting_parts_of(on, trained);
    return on->apart ? (p.world > 1) + (p.group > 1) + (p.inside > 1) + (p.across > 1) : 0;
}

int64_t qs_setting_gather_group(const qs_setting *on, int64_t slots)
{
    const int64_t per_rank = qs_shard_width(slots, on->nranks);
    int64_t group = on->config.train.gather_group;
    if (group == 0) {
        group = on->group.most > 1 ? QS_AUTO_GROUP_MAX : 1;
    }
    return group < per_rank ? group : per_rank;
}
