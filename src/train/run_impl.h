/* A run of training, which train.c opens and ends: what it holds, and its parts.
 *
 *   run_begin.c    weights and step to begin with: fresh, an adapter's, or a checkpoint's
 *   run_step.c     one step, up to the new LoRA weights
 *   run_loop.c     step after step, with metrics, evaluation, checkpoints and stop signals
 *   run_dumps.c    --dump-order and --dump-grads
 */
#ifndef QS_TRAIN_RUN_IMPL_H
#define QS_TRAIN_RUN_IMPL_H

#include "ckpt/ckpt.h"
#include "train/best.h"
#include "train/metrics.h"
#include "train/plan.h"
#include "train/sampler.h"
#include "train/train.h"
#include "train/trainer.h"

enum { QS_WARM_UP_STEPS = 2 }; /* of a start: products choose algorithms, files enter caches */

/* Everything that a run holds. */
typedef struct {
    const qs_train_options *options;
    qs_config config; /* as given, with what `auto` stands for */
    const qs_config *cfg;
    qs_comm *comm;
    int rank, nranks;
    qs_session session;
    qs_data *train_data, *eval_data;
    qs_sampler sampler;
    qs_model_shape shape;
    qs_memory_plan plan;
    qs_run_dir run_dir;
    qs_trainer trainer;
    qs_metrics *metrics;
    int64_t step; /* updates done */
    int64_t not_finite;
    int64_t tokens_seen; /* of all ranks, over all starts */
    bool lines_wait;     /* a line of metrics has found the disk full */
    bool unevaluated;    /* a stop signal came during an evaluation */
    bool tired;          /* train.patience is at its end */
    double started_s, saved_s;
    int64_t profiled[2]; /* first and last step of the profile, from 1; 0: none */
    qs_step_metrics last;
    qs_ckpt_eval best;             /* of steps that have a checkpoint; on rank 0 */
    int64_t steps_done;            /* of this start */
    double timed_s;                /* of those behind the warm-up */
    double parts_s[QS_STEP_PARTS]; /* of all of them, on this rank */
} qs_run;

/** The newest checkpoint that verifies, if there is one and the user wants it; else LoRA weights
 * anew or those of lora.init. Collective. */
qs_status qs_run_begin(qs_run *r);

/** --dry-run: an adapter to start from is opened and checked, not read. Rank 0's alone. */
qs_status qs_run_check_init(const qs_run *r);

/** The configuration as a checkpoint keeps it; the caller frees it, after an error as well.
 * Collective. */
qs_status qs_run_config_text(const qs_run *r, char **yaml);

/** What a checkpoint says of the run. Borrows from `r` and `config_yaml`. */
qs_ckpt_meta qs_run_meta(const qs_run *r, const char *config_yaml);

/** Step r->step + 1 up to everybody's new weights; with --dump-grads up to the gradient, which is
 * written. r->step stays. A stop signal may make the trainer give it up (given_up_s): then nothing
 * has changed. Collective. */
qs_status qs_run_step(qs_run *r, qs_step_metrics *m);

/** Steps to the end or to a stop signal. Collective. QS_REQUEUE where something is left to do. */
qs_status qs_run_loop(qs_run *r);

/** Is there an evaluation behind the update that makes `step` of them? 0: before the first. */
bool qs_run_eval_due(const qs_run *r, int64_t step);

qs_best_of qs_run_best(const qs_run *r);

/** Can the files of --dump-grads and --dump-order be written? Collective. */
qs_status qs_run_check_dumps(const qs_run *r);

/** --dump-order: one line a step, the sequences that it trains on, for comparing with other
 * programs. Not collective. */
qs_status qs_run_dump_order(const qs_run *r);

/** --dump-grads: the reduced gradient, of which `shard` is this rank's part, under PEFT's names.
 * Collective. */
qs_status qs_run_dump_gradient(qs_run *r, const float *shard);

#endif
