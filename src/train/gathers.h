/* Whether a run's gathers hide behind its compute, measured before the first step. */
#ifndef QS_TRAIN_GATHERS_H
#define QS_TRAIN_GATHERS_H

#include "model/model.h"
#include "train/session.h"

/** Tokens of one rank that must pass a gathered layer's forward for as long as the gather of the
 * next one takes: T*, above which gathers cost no time (the forward is the tight side: a backward
 * computes at least twice as much for the same bytes), from the times of a layer's gather and of
 * its forward for a token. 0: nothing is gathered, or not measured. */
double qs_gathers_hidden_from(double gather_s, double token_s);

/** Measure both, say them with T*, and warn if `tokens`, what a pass takes of a rank, is below it.
 * Collective; says nothing where nothing is gathered. */
qs_status qs_gathers_report(const qs_session *s, const qs_model_shape *shape, double tokens);

#endif
