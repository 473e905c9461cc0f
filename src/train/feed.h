/* The micro-batches of a pass, and those of the pass that follows: they are read a pass ahead, so
 * that the rows of the embedding that they need can travel behind compute. */
#ifndef QS_TRAIN_FEED_H
#define QS_TRAIN_FEED_H

#include "config/config.h"
#include "model/model.h"
#include "shard/shard.h"

/** Fill `batch` with the micro-batch of `slot` of step `step` (from 0). One without targets takes
 * no part. */
typedef qs_status (*qs_slot_load)(void *ctx, int64_t step, int64_t slot, qs_batch *batch);

/** Where micro-batches come from. */
typedef struct {
    qs_comm *comm;
    int64_t slots; /* of every step, over all ranks */
    qs_range mine; /* those of this rank */
    bool ends;     /* no pass behind the one that is turned to next: a step that is given up */
    int64_t haste; /* how much this rank wants to stop; behind a turn, the most of any rank */
    qs_slot_load load;
    void *ctx;
} qs_feed_source;

typedef struct {
    int64_t group;      /* micro-batches of a pass */
    qs_batch **batches; /* [2 group] */
    qs_micro_batch micro[2][QS_GROUP_MAX];
    int64_t tokens[2], targets[2]; /* of a pass on this rank */
    int now;                       /* which of the two the pass at hand is */
    bool ahead;                    /* the other is loaded */
} qs_feed;

/** Room for micro-batches of `tokens` tokens. Not collective. */
qs_status qs_feed_create(qs_feed *feed, int64_t group, int64_t tokens);
void qs_feed_destroy(qs_feed *feed);

/** Bytes that it takes: for the plan. */
size_t qs_feed_bytes(int64_t group, int64_t tokens);

/** Slots `slots` of every step, shared out among the ranks of `comm`. */
qs_feed_source qs_feed_source_make(qs_comm *comm, int64_t slots, qs_slot_load load, void *ctx);

/** Turn to the pass of `step` that begins with slot `first` of this rank's (micro-batches [group],
 * until the next call), and read the pass behind it: the next of the step or, behind the last one
 * and with `more`, the first of the next step. The ranks agree once on what they read and on
 * source->haste, also where nothing is to be read. \param [out] last  no pass of the step follows.
 * Collective. */
qs_status qs_feed_turn(qs_feed *feed, qs_feed_source *source, int64_t step, int64_t first,
                       bool more, qs_micro_batch **micro, bool *last);

/** The pass behind that; NULL where it has not been read. */
const qs_micro_batch *qs_feed_ahead(const qs_feed *feed);

/** The losses of the pass at hand to sums [slots of this rank]. */
void qs_feed_keep_losses(const qs_feed *feed, const qs_feed_source *source, double *sums);

/** Add per-slot sums over all ranks in slot order: `mine` [slots of this rank]; `work`
 * [qs_slot_sums_work] is scratch. Collective. */
qs_status qs_sum_slots(qs_comm *comm, int64_t slots, const double *mine, double *work, double *sum);
int64_t qs_slot_sums_work(int64_t slots, int nranks);

#endif
