/* What train, eval and sample share: the opened base, the sharded weights, the adapter and the
 * model on one queue. */
#ifndef QS_TRAIN_SESSION_H
#define QS_TRAIN_SESSION_H

#include "backend/levels.h"
#include "comm/comm.h"
#include "config/config.h"
#include "data/data.h"
#include "fsdp/fsdp.h"
#include "model/model.h"
#include "train/room.h"
#include "train/shard_group.h"
#include "train/watchdog.h"

/** The plan of a run (plan.h) looks at config, index, layout, ops and numbers alone, no object that
 * a device or other ranks are behind, so that it can be made for a run that nobody has started. */
typedef struct {
    qs_config config;    /* adapter settings may come from the adapter itself */
    int nranks, threads; /* ranks, and threads of each */
    bool apart;          /* the device has memory of its own: it is no CPU */
    qs_watchdog watchdog;
    qs_comm *comm;        /* over the host's memory; borrowed */
    qs_comm *device_comm; /* over the device's memory; on the CPU the same */
    qs_shard_group shard; /* the ranks that share one copy of the base with this one */
    qs_comm *base_comm;   /* theirs over the device's memory; may be device_comm */
    int per_host;         /* ranks of each host where LoRA takes two levels (comm.h), else 0 */
    qs_room host;         /* what this rank may have of its host's memory */
    size_t room;          /* bytes that it may have where it computes */
    qs_backend_levels levels;
    qs_backend backend;
    qs_device *device;
    qs_queue *queue;
    const qs_ops *ops;
    bool ops_open;
    qs_base_index *index;
    qs_lora_layout layout;
    float *adapter;    /* [n_layers * per_layer] as loaded, on the host; NULL: none was */
    void *lora;        /* the same in the ops' act_dtype on the device; NULL: base only */
    void *lora_send;   /* [n_layers * shard_width] of that type: scratch of the gather, or NULL */
    float *magnitudes; /* DoRA's [n_layers * qs_lora_magnitudes] on the device, where that type is
                          not fp32; else NULL: they are read of `lora` */
    float *magnitudes_send; /* [n_layers * qs_lora_magnitude_width]: ditto */
    qs_fsdp *fsdp;
    qs_model *model;
} qs_session;

/** Watch over this rank from now on; open the base; choose the device, the same kind on all ranks,
 * and threads. A model that the GPU's operations do not take is refused with device: cuda
 * (QS_ERR_CONFIG_PAIR) and computed on the CPU with auto. Collective. */
qs_status qs_session_open(qs_session *s, const qs_config *config, qs_comm *comm);

/** Load an adapter: a PEFT directory, a checkpoint step-N, or a run directory (its newest
 * checkpoint); its settings replace those of the configuration. Rank 0 reads it, the others need
 * not see it. NULL or "": base only. Collective. */
qs_status qs_session_load_adapter(qs_session *s, const char *path);

/** Start the communicator of the device, prepare the operations for `shape`, and make room for the
 * LoRA vector where there is an adapter to train (`trained`) or one was loaded. Collective. */
qs_status qs_session_connect(qs_session *s, const qs_model_shape *shape, bool trained);

/** Load this rank's shares and make the model. Collective, after qs_session_connect. */
qs_status qs_session_build(qs_session *s, const qs_model_shape *shape);

/** What a rank's device talks over, by the number of ranks: all of the run; those of its shard
 * group (gathers); those of its host, and those of its number on all hosts (LoRA's sums and
 * weights). 0: nothing is opened for it, since it is another of them, or nobody asks. Decided by
 * numbers alone, so that a plan knows what a run opens. */
typedef struct {
    int world, group, inside, across;
} qs_session_parts;

qs_session_parts qs_session_parts_of(const qs_session *s, bool trained);

/** NCCL's communicators among them: of more than one rank, on a device with memory of its own. */
int qs_session_nccl_count(const qs_session *s, bool trained);

/** What the operations and the sharded base are asked for by a model of `shape`: for the plan. */
qs_ops_limits qs_session_limits(const qs_session *s, const qs_model_shape *shape);
qs_fsdp_options qs_session_fsdp_options(const qs_session *s, const qs_model_shape *shape);

/** The same before there is a shape: what `shard.group: auto` goes by. */
qs_fsdp_options qs_session_group_options(const qs_session *s);

/** Bytes of s->lora and what stands beside it on the device; more of them in training. */
size_t qs_session_lora_bytes(const qs_session *s, bool trained);

/** Bytes of s->adapter. */
size_t qs_session_adapter_bytes(const qs_session *s);

void qs_session_close(qs_session *s);

enum { QS_SESSION_COMMS_MAX = 8 };

/** All communicators of the session, each once. \return how many. */
int qs_session_comms(const qs_session *session, const qs_comm *out[QS_SESSION_COMMS_MAX]);

/** Bytes that this rank has received so far by all communicators, and those from other hosts. */
void qs_session_traffic(const qs_session *s, uint64_t *received, uint64_t *foreign);

enum { QS_AUTO_GROUP_MAX = 4 };

/** Micro-batches per pass: the configured number, or the most that `auto` stands for: up to 4 when
 * units have to be gathered, else 1. The same on every rank. */
int64_t qs_session_group(const qs_session *s, int64_t slots);

#endif
