/* Whether a run's gathers hide behind its compute, measured before the first step. */
#ifndef QS_TRAIN_GATHERS_H
#define QS_TRAIN_GATHERS_H

#include "model/model.h"
#include "train/session.h"

/** Measure a layer's gather and its forward, and say them with T*: the tokens of a rank whose
 * forward of a layer takes as long as the gather of the next one. Above it gathers cost no time
 * (the forward is the tight side: a backward computes at least twice as much for the same bytes).
 * Warn if `tokens`, what a pass takes of a rank, is below it. Collective; says nothing where
 * nothing is gathered. */
qs_status qs_gathers_report(const qs_session *s, const qs_model_shape *shape, double tokens);

#endif
