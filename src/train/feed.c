#include "train/feed.h"

#include "base/mem.h"

qs_status qs_feed_create(qs_feed *feed, int64_t group, int64_t tokens)
{
    *feed = (qs_feed){.group = group};
    QS_TRY(QS_ALLOC(&feed->batches, 2 * group, QS_MEM_DATA));
    for (int64_t g = 0; g < 2 * group; g++) {
        QS_TRY(qs_batch_create(&feed->batches[g], tokens, tokens));
    }
    return QS_OK;
}

void qs_feed_destroy(qs_feed *feed)
{
    for (int64_t g = 0; feed->batches != NULL && g < 2 * feed->group; g++) {
        qs_batch_destroy(feed->batches[g]);
    }
    qs_mem_free(feed->batches);
    *feed = (qs_feed){0};
}

qs_status qs_feed_load(qs_feed *feed, qs_comm *comm, const qs_feed_source *source, int64_t step,
                       int64_t first)
{
    qs_status st = QS_OK;
    if (feed->ahead) {
        return QS_OK;
    }
    const int to = 1 - feed->now;
    feed->tokens[to] = feed->targets[to] = 0;
    for (int64_t g = 0; g < feed->group; g++) {
        const int64_t slot = source->mine.begin + first + g;
        qs_micro_batch *micro = &feed->micro[to][g];
        qs_batch *batch = feed->batches[to * feed->group + g];
        *micro = (qs_micro_batch){.slot = -1};
        if (slot < source->mine.end && st == QS_OK) {
            st = source->load(source->ctx, step, slot, batch);
            micro->slot = slot;
            micro->batch = batch->n_targets > 0 ? batch : NULL;
            feed->tokens[to] += batch->n_tokens;
            feed->targets[to] += batch->n_targets;
        }
    }
    feed->ahead = true;
    return qs_comm_agree(comm, st);
}

qs_micro_batch *qs_feed_take(qs_feed *feed)
{
    feed->now = 1 - feed->now;
    feed->ahead = false;
    return feed->micro[feed->now];
}

const qs_micro_batch *qs_feed_ahead(const qs_feed *feed)
{
    return feed->ahead ? feed->micro[1 - feed->now] : NULL;
}
