/* Where the time of a step goes, on this rank: the same parts in a run's metrics and in `qshard
 * bench step`. They add up to the whole.
 *
 *   wait       compute stood still for units and for rows of the embedding; gathers that hide
 *              behind compute are not in it
 *   compute    the rest of the passes: embedding, layers, head
 *   reduce     compute stood still for sums of gradients between layers; and behind the passes
 *              what was left of them, the norm, the loss
 *   optimizer  the update of this rank's share, and what it is told by others about theirs
 *   lora       gather of everybody's new weights */
#ifndef QS_TRAIN_STEP_CLOCK_H
#define QS_TRAIN_STEP_CLOCK_H

#include "train/trainer.h"

enum {
    QS_STEP_WAIT,
    QS_STEP_COMPUTE,
    QS_STEP_REDUCE,
    QS_STEP_OPTIMIZER,
    QS_STEP_LORA,
    QS_STEP_TOTAL,
    QS_STEP_PARTS
};

typedef struct {
    const qs_trainer *trainer; /* borrowed */
    double begin_s, waited_s, reduced_s;
    double passed_s, summed_s, updated_s; /* when that was done */
    double between_s;                     /* sums waited for between layers */
} qs_step_clock;

void qs_step_clock_begin(qs_step_clock *clock, const qs_trainer *trainer);

/** Behind the passes, the sums, and the update, in this order. */
void qs_step_clock_passed(qs_step_clock *clock);
void qs_step_clock_summed(qs_step_clock *clock);
void qs_step_clock_updated(qs_step_clock *clock);

/** Behind the gather of the new weights: seconds of each part. */
void qs_step_clock_end(const qs_step_clock *clock, double parts[QS_STEP_PARTS]);

#endif
