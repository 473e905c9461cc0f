/* Which ranks share one copy of the base: shard.group. */
#ifndef QS_TRAIN_SHARD_GROUP_H
#define QS_TRAIN_SHARD_GROUP_H

#include "comm/comm.h"
#include "config/config.h"
#include "device/gpu_kinds.h"
#include "fsdp/fsdp.h"

typedef struct {
    int nranks; /* of this rank's group */
    int most;   /* of the largest group, the same on every rank */
} qs_group_size;

typedef struct {
    qs_comm *comm; /* of this rank's group; the world's own if it is that */
    char why[320]; /* how `auto` was decided by links and the base's share; "": it was not */
} qs_shard_group;

/** Cut `world` into groups: of `group` neighbours, of a node's ranks (QS_SHARD_NODE), or one of
 * all. *out is this rank's, `world` itself where that is all. Collective. `name` is for the
 * message. \return QS_ERR_CONFIG_PAIR: the ranks are no multiple of the group. */
qs_status qs_shard_group_split(qs_comm **out, int64_t group, qs_comm *world, const char *name);

/** How much longer the gathers of the whole run take than those of a node. */
typedef struct {
    double node_s, world_s; /* of a layer, or of anything else; 0: not known */
} qs_group_links;

/** What is known of such a GPU's links; NULL: of a kind that nobody knows, whose node's links are
 * taken to be the faster ones. */
qs_group_links qs_group_links_usual(const qs_gpu_kind *gpu, int nranks, int per_node);

/** Make the group that `config` asks for. With `auto` a node's ranks if there are several nodes and
 * the share of the base that a rank then keeps, with its gather buffers, takes at most half of its
 * `room` (room.h) on every rank, or four fifths where gathers of the whole run take more than twice
 * as long as a node's; else all ranks. `links`: by these, as GPUs are not connected yet; NULL: by
 * the host's, which are measured. Whether the rest of the run fits beside it is the plan's question
 * (qs_plan_settle). Collective over `world`, which must outlive the group.
 * \return QS_ERR_CONFIG_PAIR: the ranks are no multiple of the group. */
qs_status qs_shard_group_make(qs_shard_group *out, qs_group_size *size, const qs_config *config,
                              const qs_base_index *index, const qs_fsdp_options *options,
                              size_t room, const qs_group_links *links, qs_comm *world);

/** Its size on paper, for rank 0 of `nranks` ranks, `per_node` on each node, with `room` for each
 * and assumed `links`. Not collective. */
qs_status qs_shard_group_assume(qs_group_size *out, const qs_config *config,
                                const qs_base_index *index, const qs_fsdp_options *options,
                                size_t room, int nranks, int per_node, const qs_group_links *links);

/** Make it one group of all ranks after all. Collective over `world`. */
void qs_shard_group_widen(qs_shard_group *group, qs_comm *world);

/** Say to the log which it is, and why; nothing where it could be no other. Once it is final. */
void qs_shard_group_report(const qs_shard_group *group, const qs_group_size *size,
                           const qs_config *config, const qs_comm *world);

/** Does nothing to the world's communicator. */
void qs_shard_group_destroy(qs_shard_group *group, const qs_comm *world);

#endif
