/* What a step of training holds and does, whatever its tokens come from and whatever is written
 * about it: a run (run_step.c) and the benchmark of a step make the same calls. */
#ifndef QS_TRAIN_TRAINER_H
#define QS_TRAIN_TRAINER_H

#include "fsdp/grads.h"
#include "optim/optim.h"
#include "train/feed.h"
#include "train/session.h"

typedef struct {
    qs_session *session; /* borrowed */
    int64_t slots;       /* micro-batches of a step, over all ranks */
    qs_feed feed;
    int64_t tokens, targets; /* of this rank's slots so far */
    double *slot_sums;       /* [slots of this rank] losses of the last step */
    double *sums_work;       /* [qs_slot_sums_work] */
    size_t *exchange;        /* [4 nranks] of the gather of the weights */
    qs_optim *optim;
    qs_grads *grads;
    int (*signals)(void); /* that want a stop, so far; NULL: a step is always finished */
    bool (*hurry)(void);  /* with signals: is one of them of somebody who does not wait? */
    double given_up_s; /* what the rest of the last step would take, which was given up; else 0 */
} qs_trainer;

/* For what is left of a step behind a stop signal; and where the process is killed in a second, of
 * which the save takes a part. */
enum { QS_TRAINER_PATIENCE_MS = 20000, QS_TRAINER_HURRY_MS = 300 };

/** Between qs_session_connect and qs_session_build. Not collective. */
qs_status qs_trainer_create(qs_trainer *trainer, qs_session *session, const qs_model_shape *shape,
                            int64_t slots);
void qs_trainer_destroy(qs_trainer *trainer);

/** A fresh adapter on the host's side of the optimizer: A by counter of `seed`, B zero, and with
 * DoRA magnitudes that keep every row as it is. Collective. */
qs_status qs_trainer_start_anew(qs_trainer *trainer, uint64_t seed);

/** All passes of step noise->step, whose number is the same on every rank: gradients of the loss
 * sums times `loss_scale`, on their way to the owners. `more`: the session's model is next used for
 * the step behind this one, whose first pass is then loaded ahead. Collective.
 *
 * Between passes everybody learns of a signal that any rank has caught. If the passes that are left
 * are expected to take longer than QS_TRAINER_PATIENCE_MS (QS_TRAINER_HURRY_MS), at the rate of
 * those done, the step is given up (given_up_s): its sums are worth nothing, the optimizer and the
 * adapter are those of the step before, and the model takes no further pass, since rows for one may
 * be on their way. */
qs_status qs_trainer_passes(qs_trainer *trainer, float loss_scale, const qs_model_noise *noise,
                            qs_slot_load load, void *ctx, bool more);

/** Behind them: this rank's shard of the gradient (borrowed until the next passes), the norm of the
 * whole, and the loss sum of all slots in their order. Collective. */
qs_status qs_trainer_sums(qs_trainer *trainer, float **shard, double *norm, double *loss_sum);

/** Everybody's new weights, from the optimizers to the model. Collective. */
qs_status qs_trainer_gather(qs_trainer *trainer);

#endif
