#include "train/shard_group.h"

#include <stdio.h>

#include "base/log.h"
#include "train/forecast.h"

static const double GIB = 1073741824.0;

/* What a rank keeps of the base that `nranks` share, and its two units. */
static size_t kept_bytes(const qs_base_index *index, const qs_fsdp_options *options, int nranks)
{
    const qs_fsdp_bytes bytes = qs_fsdp_plan(index, nranks, options);
    return bytes.device_shard_bytes + bytes.host_shard_bytes + bytes.gather_bytes;
}

/* A node's copy takes memory for time: more of it where there is more to win. */
static double allowed_share(const qs_group_links *links)
{
    return links->node_s > 0 && links->world_s > 2 * links->node_s ? 0.8 : 0.5;
}

qs_group_links qs_group_links_usual(const qs_gpu_kind *gpu, int nranks, int per_node)
{
    if (gpu == NULL) {
        return (qs_group_links){1, 3};
    }
    const qs_links usual = qs_links_usual(gpu, per_node);
    return (qs_group_links){qs_links_receive_s(per_node - 1, per_node, &usual),
                            qs_links_receive_s(nranks - 1, nranks, &usual)};
}

static bool is_tight(size_t needed, size_t room, const qs_group_links *links)
{
    return (double)needed > allowed_share(links) * (double)room;
}

/* Bytes of an average layer. */
static size_t layer_bytes(const qs_base_index *index)
{
    size_t bytes = 0;
    for (int l = 0; l < index->config.n_layers; l++) {
        bytes +=
            qs_unit_layout_make(&index->units[qs_base_layer_unit(index, l)].size, 1).message_bytes;
    }
    return bytes / (size_t)index->config.n_layers;
}

/* What a layer's gather takes, among a node's ranks and among all, over the host's links. */
static qs_status measure(qs_group_links *links, const qs_base_index *index, qs_comm *node,
                         qs_comm *world)
{
    const size_t bytes = layer_bytes(index);
    QS_TRY(qs_comm_gather_time(node, bytes, &links->node_s));
    QS_TRY(qs_comm_gather_time(world, bytes, &links->world_s));
    int64_t slowest[2] = {(int64_t)(1e9 * links->node_s), (int64_t)(1e9 * links->world_s)};
    QS_TRY(qs_comm_max_i64(world, slowest, 2));
    *links = (qs_group_links){1e-9 * (double)slowest[0], 1e-9 * (double)slowest[1]};
    return QS_OK;
}

/* Whether a node's copy takes too much on any rank; says why to `why`. */
static qs_status find_tight(bool *out, char *why, size_t capacity, const qs_base_index *index,
                            const qs_fsdp_options *options, size_t room,
                            const qs_group_links *usual, qs_comm *node, qs_comm *world)
{
    qs_group_links links = {0};
    char measured[96] = "";
    const size_t needed = kept_bytes(index, options, qs_comm_nranks(node));
    if (usual != NULL) {
        links = *usual;
    } else {
        QS_TRY(measure(&links, index, node, world));
        snprintf(measured, sizeof measured,
                 "gathering a layer takes %.3g ms among a node's ranks, %.3g among all; ",
                 1e3 * links.node_s, 1e3 * links.world_s);
    }
    int64_t tight = is_tight(needed, room, &links);
    QS_TRY(qs_comm_max_i64(world, &tight, 1));
    *out = tight != 0;
    snprintf(why, capacity,
             "%sa rank would keep %.2f GiB of the base and its buffers in a node's group, %.2f in "
             "the world's; it has %.2f, of which %.0f %% may be taken",
             measured, (double)needed / GIB,
             (double)kept_bytes(index, options, qs_comm_nranks(world)) / GIB, (double)room / GIB,
             100 * allowed_share(&links));
    return QS_OK;
}

/* What `auto` stands for on several hosts: out->comm is the node's, which its gathers were measured
 * over, or the world. */
static qs_status choose(qs_shard_group *out, const qs_base_index *index,
                        const qs_fsdp_options *options, size_t room, const qs_group_links *links,
                        qs_comm *world)
{
    bool tight = false;
    qs_comm *node = NULL;
    QS_TRY(qs_comm_split(world, qs_comm_host(world), &node));
    const qs_status st =
        find_tight(&tight, out->why, sizeof out->why, index, options, room, links, node, world);
    out->comm = st != QS_OK || tight ? world : node;
    if (out->comm == world) {
        qs_comm_destroy(node);
    }
    return st;
}

static qs_status check_multiple(int64_t group, int nranks, const char *name)
{
    return group <= 0 || nranks % group == 0
               ? QS_OK
               : QS_FAIL(QS_ERR_CONFIG_PAIR,
                         "%s: %lld, but the run has %d ranks, which is no multiple of it; "
                         "start another number of ranks, or set world, node or auto",
                         name, (long long)group, nranks);
}

qs_status qs_shard_group_split(qs_comm **out, int64_t group, qs_comm *world, const char *name)
{
    const int nranks = qs_comm_nranks(world), rank = qs_comm_rank(world);
    *out = world;
    QS_TRY(qs_comm_agree(world, check_multiple(group, nranks, name)));
    if (group == QS_SHARD_WORLD || group == nranks) {
        return QS_OK;
    }
    const int color = group == QS_SHARD_NODE ? qs_comm_host(world) : rank / (int)group;
    return qs_comm_split(world, color, out);
}

qs_status qs_shard_group_make(qs_shard_group *out, qs_group_size *size, const qs_config *config,
                              const qs_base_index *index, const qs_fsdp_options *options,
                              size_t room, const qs_group_links *links, qs_comm *world)
{
    const int nranks = qs_comm_nranks(world);
    const int64_t group = config->shard.group;
    int64_t other_host = qs_comm_host(world) != 0;
    *out = (qs_shard_group){.comm = world};
    *size = (qs_group_size){.nranks = nranks, .most = nranks};
    QS_TRY(qs_comm_max_i64(world, &other_host, 1));
    if (other_host == 0 && group <= 0) {
        return QS_OK; /* one node: all words mean the same */
    }
    QS_TRY(group == QS_SHARD_AUTO ? choose(out, index, options, room, links, world)
                                  : qs_shard_group_split(&out->comm, group, world, "shard.group"));
    if (out->comm == world) {
        return QS_OK;
    }
    size->nranks = qs_comm_nranks(out->comm);
    int64_t most = size->nranks;
    QS_TRY(qs_comm_max_i64(world, &most, 1));
    size->most = (int)most;
    return QS_OK;
}

qs_status qs_shard_group_assume(qs_group_size *out, const qs_config *config,
                                const qs_base_index *index, const qs_fsdp_options *options,
                                size_t room, int nranks, int per_node, const qs_group_links *links)
{
    int64_t group = config->shard.group;
    QS_TRY(check_multiple(group, nranks, "shard.group"));
    if (group == QS_SHARD_AUTO) {
        const size_t needed = kept_bytes(index, options, per_node);
        group = is_tight(needed, room, links) ? QS_SHARD_WORLD : QS_SHARD_NODE;
    }
    const int64_t size = group == QS_SHARD_WORLD  ? nranks
                         : group == QS_SHARD_NODE ? per_node
                                                  : group;
    const int ranks = size < nranks ? (int)size : nranks;
    *out = (qs_group_size){.nranks = ranks, .most = ranks};
    return QS_OK;
}

void qs_shard_group_widen(qs_shard_group *group, qs_comm *world)
{
    qs_shard_group_destroy(group, world);
    *group = (qs_shard_group){.comm = world};
}

void qs_shard_group_report(const qs_shard_group *group, const qs_group_size *size,
                           const qs_config *config, const qs_comm *world)
{
    const bool is_world = group->comm == world;
    if (group->why[0] != '\0') {
        qs_log_info("shard.group: auto is %s: %s", is_world ? "world" : "node", group->why);
    }
    if (!is_world) {
        qs_log_info("shard.group: the base is shared by groups of %s%d rank%s",
                    config->shard.group <= 0 ? "at most " : "", size->most,
                    size->most == 1 ? "" : "s");
    }
}

void qs_shard_group_destroy(qs_shard_group *group, const qs_comm *world)
{
    if (group->comm != NULL && group->comm != world) {
        qs_comm_destroy(group->comm);
    }
    group->comm = NULL;
}
