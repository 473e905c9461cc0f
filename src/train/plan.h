/* The memory of a run by class, computed before anything large is allocated. */
#ifndef QS_TRAIN_PLAN_H
#define QS_TRAIN_PLAN_H

#include "base/mem.h"
#include "data/data.h"
#include "train/session.h"

typedef struct {
    size_t bytes[QS_MEM_SPACE_COUNT][QS_MEM_CLASS_COUNT];
    size_t total_bytes[QS_MEM_SPACE_COUNT];
    qs_mem_space space; /* where it computes: the device's memory, or on the CPU the host's */
    bool peers;         /* more than one rank */
} qs_memory_plan;

/** What the model of a training run is built for: the largest micro-batch of either file decides
 * the room, `eval` may be NULL; `slots` micro-batches a step. */
qs_model_shape qs_plan_shape(const qs_session *s, const qs_data *train, const qs_data *eval,
                             int64_t slots);

/** Bytes that rank 0, which has the largest share, will hold for training with `shape` and `slots`
 * micro-batches a step; `eval` may be NULL. Buffers that are the host's alone (tokens, tables) are
 * listed apart where the device has memory of its own. */
qs_memory_plan qs_memory_plan_make(const qs_session *s, const qs_data *train, const qs_data *eval,
                                   const qs_model_shape *shape, int64_t slots);

/** Print the table: class, planned MiB and, if `measured`, the peak that this process reached. */
void qs_memory_plan_print(const qs_memory_plan *plan, bool measured);

/** Bytes that a device must have free: what the plan takes there, code that is loaded when it is
 * first called, and the buffers of NCCL where there are peers. */
size_t qs_memory_plan_needed(const qs_memory_plan *plan);

/** QS_ERR_MEMORY if what the plan takes where it computes is above `limit_bytes` (0: no limit) or
 * above what `device` has free, naming what to change. */
qs_status qs_memory_plan_check(const qs_memory_plan *plan, const qs_device *device,
                               int64_t limit_bytes);

#endif
