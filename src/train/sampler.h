/* Which sequences a step trains on, and how they fall into slots. A pure function of the
 * configuration and the data: the micro-batches of a step are numbered globally, whatever the
 * number of ranks. */
#ifndef QS_TRAIN_SAMPLER_H
#define QS_TRAIN_SAMPLER_H

#include <stdbool.h>
#include <stdint.h>

#include "config/config.h"
#include "data/data.h"

typedef struct {
    const qs_data *data; /* borrowed */
    uint64_t seed;
    int64_t steps;
    int64_t global_batch, micro_batch;
    int64_t slots; /* micro-batches of a full step: ceil(global_batch / micro_batch) */
    int64_t total; /* sequences of the whole run, epochs after one another */
} qs_sampler;

/** Sampler of a run: `steps` full steps, or `epochs` times the data with a last step that may be
 * short. */
qs_sampler qs_sampler_make(const qs_config *cfg, const qs_data *data);

/** With train.epochs the data say how many steps there are, so that optim.warmup is compared with
 * them here, as the configuration's check does with train.steps. */
qs_status qs_sampler_check(const qs_config *cfg, const qs_data *data);

/** Sequences of step `step`: global_batch, or what is left. */
int64_t qs_sampler_step_size(const qs_sampler *s, int64_t step);

/** Sequence at place `i` of step `step`; *number is its number in the run (the key of its random
 * numbers). */
int64_t qs_sampler_sequence(const qs_sampler *s, int64_t step, int64_t i, int64_t *number);

/** The sequences of a slot: at most micro_batch. \return how many; 0 past the end of a short step.
 */
int64_t qs_sampler_slot(const qs_sampler *s, int64_t step, int64_t slot, int64_t *sequence,
                        int64_t *number);

/** Is one of the run's epochs over behind `steps` steps that was not behind one less? */
bool qs_sampler_ends_epoch(const qs_sampler *s, int64_t steps);

/** Positions of the whole step that carry loss. */
int64_t qs_sampler_targets(const qs_sampler *s, int64_t step);

#endif
