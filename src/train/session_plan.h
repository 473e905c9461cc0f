/* The plan of a session: settled among its ranks, and held against the memory that they have. */
#ifndef QS_TRAIN_SESSION_PLAN_H
#define QS_TRAIN_SESSION_PLAN_H

#include "train/plan.h"
#include "train/session.h"

/** qs_plan_settle among the ranks, said to the log; the group that shares the base follows it.
 * Before qs_session_connect. Collective. */
qs_status qs_session_settle(qs_session *s, const qs_plan_job *job, qs_model_shape *shape);

/** QS_ERR_MEMORY if a rank needs more than memory.device_limit or than its device has free, or if
 * the host's part is above what it may have there (room.h), naming what to change. Before anything
 * large is allocated: rank 0 prints the table if somebody lacks memory, or where `print` says so.
 * Collective. */
qs_status qs_session_require(const qs_session *s, const qs_memory_plan *plan, bool print);

/** Both, for passes that only go forward: the plan with what has been settled on, which must fit.
 * Collective. */
qs_status qs_session_plan(qs_session *s, const qs_plan_job *job, qs_model_shape *shape,
                          qs_memory_plan *out);

#endif
