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
    qs_range mine; /* slots of this rank in every step */
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

/** Read the pass of `step` that begins with slot `first` of this rank's, unless one is ahead
 * already. Collective. */
qs_status qs_feed_load(qs_feed *feed, qs_comm *comm, const qs_feed_source *source, int64_t step,
                       int64_t first);

/** The pass that was loaded, [group], until the next call. */
qs_micro_batch *qs_feed_take(qs_feed *feed);

/** The pass behind the one that was taken; NULL where it has not been loaded. */
const qs_micro_batch *qs_feed_ahead(const qs_feed *feed);

#endif
