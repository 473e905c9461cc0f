/* Loss over a token file: micro-batches are slots shared by the ranks, their sums are added in
 * slot order. */
#ifndef QS_TRAIN_EVALUATE_H
#define QS_TRAIN_EVALUATE_H

#include "train/feed.h"
#include "train/session.h"

typedef struct {
    double loss; /* mean over targets */
    int64_t targets, sequences;
    bool stopped; /* given up: the rest is not set */
} qs_eval_result;

/** Whether to give the evaluation up, asked before each pass. Collective: the same on all ranks. */
typedef qs_status (*qs_eval_stop)(void *ctx, bool *stop);

/** Evaluate `data` with the session's model, whose shape and `feed`, with no pass ahead, must have
 * room for micro_batch sequences of it. `stop` may be NULL: to the end. Collective. */
qs_status qs_evaluate(qs_session *s, qs_data *data, int64_t micro_batch, qs_feed *feed,
                      qs_eval_stop stop, void *ctx, qs_eval_result *out);

#endif
