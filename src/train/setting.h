/* The setting of a run: configuration, base and ranks, in numbers alone. It is all that plans and
 * forecasts look at, no object that a device or other ranks are behind, so that they can be made
 * for a run that nobody has started (outlook.h). Nothing here is collective. */
#ifndef QS_TRAIN_SETTING_H
#define QS_TRAIN_SETTING_H

#include "config/config.h"
#include "fsdp/fsdp.h"
#include "lora/lora.h"
#include "model/model.h"
#include "train/shard_group.h"

typedef struct {
    qs_config config;    /* adapter settings may come from the adapter itself */
    int nranks, threads; /* ranks, and threads of each */
    int per_host;        /* ranks of each host where LoRA takes two levels (comm.h), else 0 */
    bool apart;          /* the device has memory of its own: it is no CPU */
    bool loaded;         /* an adapter has been read (lora_vector.h) */
    size_t room;         /* bytes that a rank may have where it computes */
    qs_group_size group; /* of the ranks that share one copy of the base */
    const qs_ops *ops;
    qs_base_index *index; /* a session's own; on paper borrowed */
    qs_lora_layout layout;
} qs_setting;

/** What the operations and the sharded base are asked for by a model of `shape`. */
qs_ops_limits qs_setting_limits(const qs_setting *on, const qs_model_shape *shape);
qs_fsdp_options qs_setting_fsdp_options(const qs_setting *on, const qs_model_shape *shape);

/** The same before there is a shape: what `shard.group: auto` goes by. */
qs_fsdp_options qs_setting_group_options(const qs_setting *on);

/** What a rank's device talks over, by the number of ranks: all of the run; those of its shard
 * group (gathers); those of its host, and those of its number on all hosts (LoRA's sums and
 * weights). 0: nothing is opened for it, since it is another of them, or nobody asks. */
typedef struct {
    int world, group, inside, across;
} qs_setting_parts;

qs_setting_parts qs_setting_parts_of(const qs_setting *on, bool trained);

/** NCCL's communicators among them: of more than one rank, on a device with memory of its own. */
int qs_setting_nccl_count(const qs_setting *on, bool trained);

enum { QS_AUTO_GROUP_MAX = 4 };

/** Micro-batches per pass, of `slots` over all ranks: the configured number, or the most that
 * `auto` stands for: up to 4 when units have to be gathered, else 1. The same on every rank. */
int64_t qs_setting_gather_group(const qs_setting *on, int64_t slots);

#endif
