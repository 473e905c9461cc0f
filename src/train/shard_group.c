#include "train/shard_group.h"

#include <unistd.h>

#include "base/log.h"

static const double GIB = 1073741824.0;

/* Memory that is free for this rank where its share is to lie. */
static size_t free_bytes(const qs_device *device, const qs_comm *world)
{
    size_t free = 0, total = 0;
    qs_device_memory(device, &free, &total);
    if (total == 0) { /* the host's, which its ranks share */
        const long pages = sysconf(_SC_AVPHYS_PAGES), page = sysconf(_SC_PAGESIZE);
        free = pages > 0 && page > 0 ? (size_t)pages * (size_t)page : 0;
        free /= (size_t)qs_comm_local_nranks(world);
    }
    return free;
}

/* What `auto` stands for on several hosts. */
static qs_status choose(int64_t *group, const qs_base_index *index, const qs_fsdp_options *options,
                        const qs_device *device, qs_comm *world)
{
    const qs_fsdp_bytes alone = qs_fsdp_plan(index, qs_comm_local_nranks(world), options);
    const qs_fsdp_bytes shared = qs_fsdp_plan(index, qs_comm_nranks(world), options);
    const size_t needed = alone.device_shard_bytes + alone.host_shard_bytes + alone.gather_bytes;
    const size_t there = free_bytes(device, world);
    int64_t tight = needed > there / 2;
    QS_TRY(qs_comm_max_i64(world, &tight, 1));
    *group = tight != 0 ? QS_SHARD_WORLD : QS_SHARD_NODE;
    qs_log_info(
        "shard.group: auto is %s: a rank would keep %.2f GiB of the base and two units in a "
        "node's group, %.2f in the world's; %.2f are free, half of which may be taken",
        tight != 0 ? "world" : "node", (double)needed / GIB,
        (double)(shared.device_shard_bytes + shared.host_shard_bytes + shared.gather_bytes) / GIB,
        (double)there / GIB);
    return QS_OK;
}

static int color_of(int64_t group, const qs_comm *world)
{
    return group == QS_SHARD_NODE ? qs_comm_host(world) : qs_comm_rank(world) / (int)group;
}

qs_status qs_shard_group_make(qs_shard_group *out, const qs_config *config,
                              const qs_base_index *index, const qs_fsdp_options *options,
                              const qs_device *device, qs_comm *world)
{
    const int nranks = qs_comm_nranks(world);
    int64_t group = config->shard.group, other_host = qs_comm_host(world) != 0;
    *out = (qs_shard_group){.comm = world, .most = nranks};
    QS_TRY(qs_comm_max_i64(world, &other_host, 1));
    if (other_host == 0 && group <= 0) {
        return QS_OK; /* one node: all words mean the same */
    }
    if (group == QS_SHARD_AUTO) {
        QS_TRY(choose(&group, index, options, device, world));
    }
    if (group > 0 && nranks % group != 0) {
        return qs_comm_agree(
            world, QS_FAIL(QS_ERR_CONFIG_PAIR,
                           "shard.group: %lld, but the run has %d ranks, which is no multiple of "
                           "it; start another number of ranks, or set world, node or auto",
                           (long long)group, nranks));
    }
    if (group == QS_SHARD_WORLD || group == nranks) {
        return QS_OK;
    }
    QS_TRY(qs_comm_split(world, color_of(group, world), &out->comm));
    int64_t most = qs_comm_nranks(out->comm);
    QS_TRY(qs_comm_max_i64(world, &most, 1));
    out->most = (int)most;
    qs_log_info("shard.group: the base is shared by groups of %s%d rank%s",
                group == QS_SHARD_NODE ? "at most " : "", out->most, out->most == 1 ? "" : "s");
    return QS_OK;
}

void qs_shard_group_destroy(qs_shard_group *group, const qs_comm *world)
{
    if (group->comm != NULL && group->comm != world) {
        qs_comm_destroy(group->comm);
    }
    group->comm = NULL;
}
