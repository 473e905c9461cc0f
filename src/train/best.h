/* Which checkpoint of a run has the best evaluation. It follows from metrics.jsonl and the
 * directories that are there, so that it survives whatever happens to a run; run.json and the end
 * of the run say it. */
#ifndef QS_TRAIN_BEST_H
#define QS_TRAIN_BEST_H

#include "ckpt/run_dir.h"
#include "train/metrics.h"

/** What is looked at; borrowed. `metrics` is NULL but on rank 0, which does the work. */
typedef struct {
    const qs_config *config;
    const qs_run_dir *dir;
    const qs_metrics *metrics;
    qs_comm *comm;
} qs_best_of;

/** Find it (step -1: none), and write it into run.json. With `verify` it is read, and a damaged one
 * gives way to the next best. On rank 0 *best has it, elsewhere none. Collective. */
qs_status qs_best_find(const qs_best_of *run, bool verify, qs_ckpt_eval *best);

/** Delete the checkpoints that are not to be kept. Collective. */
qs_status qs_best_rotate(const qs_best_of *run);

/** At the end: find it, and rotate if there were evaluations, since the one that was the best
 * before the last of them may be one too many. Collective. */
qs_status qs_best_settle(const qs_best_of *run, qs_ckpt_eval *best);

/** Say which of several evaluations was the best and where its checkpoint is; a lower one may have
 * none (train.save_every). `last`: the run's last step. */
void qs_best_say(const qs_best_of *run, const qs_ckpt_eval *best, int64_t last);

#endif
