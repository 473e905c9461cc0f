/* The memory of a run by class, computed before anything large is allocated. */
#ifndef QS_TRAIN_PLAN_H
#define QS_TRAIN_PLAN_H

#include "base/mem.h"
#include "data/data.h"
#include "train/setting.h"

/** What is planned for: a training run, or passes that only go forward (eval, sample). */
typedef struct {
    const qs_data *train, *eval; /* the token files that are open; NULL: none */
    int64_t slots; /* micro-batches over all ranks: of a step, or forward of the whole file */
    bool trained;
    size_t result_bytes;  /* in host memory, beside the model: what a command asks of it */
    const char *settings; /* of a command that does not train: what makes it less, for a message */
} qs_plan_job;

/** A training run's; `eval` may be NULL. */
qs_plan_job qs_plan_training(const qs_data *train, const qs_data *eval, int64_t slots);

typedef struct {
    size_t bytes[QS_MEM_SPACE_COUNT][QS_MEM_CLASS_COUNT];
    size_t total_bytes[QS_MEM_SPACE_COUNT];
    qs_mem_space space; /* where it computes: the device's memory, or on the CPU the host's */
    int nccl_count;     /* NCCL's communicators of a rank */
    bool trained;
    const char *settings; /* that make it less: for a message */
} qs_memory_plan;

/** What the model of a training run is built for: the largest micro-batch of either file decides
 * the room. Its group is the most that `auto` stands for: qs_plan_settle. */
qs_model_shape qs_plan_shape(const qs_setting *on, const qs_plan_job *job);

/** Bytes that rank 0, which has the largest share, will hold for `job` with `shape`. Buffers that
 * are the host's alone (tokens, tables) are listed apart where the device has memory of its own.
 * An adapter that is not trained must have been loaded. */
qs_memory_plan qs_memory_plan_make(const qs_setting *on, const qs_plan_job *job,
                                   const qs_model_shape *shape);

/** Layers that stay because there is room: so many, of so many that could. */
typedef struct {
    bool by_room; /* the setting is auto */
    int64_t layers, of;
} qs_plan_kept;

/** What `auto` was settled on by memory, and why. Lacking bytes are those of the rank that lacks
 * most; below 0 it has them to spare. */
typedef struct {
    bool widened;            /* shard.group: all ranks share a copy, since with one a node, */
    int64_t node_lack;       /* a rank would lack so much */
    int64_t group, most;     /* train.gather_group: it is `group`, since for the `most` that auto */
    int64_t lack, most_lack; /* takes a rank would lack most_lack; for `group` it lacks `lack` */
    qs_plan_kept resident, decoded; /* shard.keep_resident, memory.keep_decoded */
} qs_plan_choice;

/** Settle what `auto` stands for by the memory that the plan takes, before anything is allocated:
 * as few passes as fit (train.gather_group, into shape->group) beside a node's copy of the base
 * (shard.group, on->group); where none fits, beside a copy that all ranks share; where that is not
 * enough either, what lacks least. What is left then takes as many layers as fit, whole
 * (shard.keep_resident), then decoded (memory.keep_decoded; both into *shape). Settings that say a
 * number or a word stay. The same on all ranks of `comm`, collective over it; NULL on paper. */
qs_status qs_plan_settle(qs_plan_choice *out, qs_setting *on, const qs_plan_job *job,
                         qs_model_shape *shape, qs_comm *comm);

enum { QS_PLAN_REASONS_MAX = 4, QS_PLAN_REASON_BYTES = 160 };

/** Does a group of `group` of a rank's `per_rank` micro-batches save a pass over the next smaller
 * one? Of four, 3 + 1 hide gathers worse than 2 + 2. */
bool qs_plan_saves_pass(int64_t per_rank, int64_t group);

/** A line for each setting that memory decided. \return how many. */
int qs_plan_reasons(const qs_plan_choice *choice,
                    char out[QS_PLAN_REASONS_MAX][QS_PLAN_REASON_BYTES]);

/** Print the table: class, planned MiB and, if `measured`, the peak that this process reached. */
void qs_memory_plan_print(const qs_memory_plan *plan, bool measured);

/** Bytes that a rank must have where it computes: what the plan takes there and, on a GPU, code
 * that is loaded when it is first called, and the buffers of NCCL where there are peers. */
size_t qs_memory_plan_needed(const qs_memory_plan *plan);

/** Those of NCCL: 1 GiB for one communicator, 0.75 GiB for each further one (docs/planning.md). */
size_t qs_memory_plan_nccl_bytes(const qs_memory_plan *plan);

/** With --verbose: bytes that were planned and reached, by class. */
void qs_memory_plan_compare(const qs_memory_plan *plan);

#endif
