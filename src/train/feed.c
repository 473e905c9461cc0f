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

size_t qs_feed_bytes(int64_t group, int64_t tokens)
{
    return (size_t)(2 * group) * (sizeof(qs_batch *) + qs_batch_bytes(tokens, tokens));
}

void qs_feed_destroy(qs_feed *feed)
{
    for (int64_t g = 0; feed->batches != NULL && g < 2 * feed->group; g++) {
        qs_batch_destroy(feed->batches[g]);
    }
    qs_mem_free(feed->batches);
    *feed = (qs_feed){0};
}

qs_feed_source qs_feed_source_make(qs_comm *comm, int64_t slots, qs_slot_load load, void *ctx)
{
    return (qs_feed_source){.comm = comm,
                            .slots = slots,
                            .mine = qs_slots_of(slots, qs_comm_rank(comm), qs_comm_nranks(comm)),
                            .load = load,
                            .ctx = ctx};
}

/* Into the half that the pass at hand does not have, unless it is there already. */
static qs_status load_pass(qs_feed *feed, qs_feed_source *source, int64_t step, int64_t first)
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
    return qs_comm_agree_most(source->comm, st, &source->haste);
}

qs_status qs_feed_turn(qs_feed *feed, qs_feed_source *source, int64_t step, int64_t first,
                       bool more, qs_micro_batch **micro, bool *last)
{
    const int64_t per_rank = qs_shard_width(source->slots, qs_comm_nranks(source->comm));
    const int64_t next = first + feed->group;
    *last = source->ends || next >= per_rank;
    QS_TRY(load_pass(feed, source, step, first));
    feed->now = 1 - feed->now;
    feed->ahead = false;
    *micro = feed->micro[feed->now];
    if (!*last) {
        return load_pass(feed, source, step, next);
    }
    return more ? load_pass(feed, source, step + 1, 0)
                : qs_comm_agree_most(source->comm, QS_OK, &source->haste);
}

const qs_micro_batch *qs_feed_ahead(const qs_feed *feed)
{
    return feed->ahead ? feed->micro[1 - feed->now] : NULL;
}

void qs_feed_keep_losses(const qs_feed *feed, const qs_feed_source *source, double *sums)
{
    const qs_micro_batch *micro = feed->micro[feed->now];
    for (int64_t g = 0; g < feed->group; g++) {
        if (micro[g].slot >= 0) {
            sums[micro[g].slot - source->mine.begin] = micro[g].loss_sum;
        }
    }
}

int64_t qs_slot_sums_work(int64_t slots, int nranks)
{
    return qs_shard_width(slots, nranks) * (nranks + 1);
}

qs_status qs_sum_slots(qs_comm *comm, int64_t slots, const double *mine, double *work, double *sum)
{
    const int nranks = qs_comm_nranks(comm);
    const qs_range range = qs_slots_of(slots, qs_comm_rank(comm), nranks);
    const int64_t width = qs_shard_width(slots, nranks);
    double *all = work + width;
    *sum = 0;
    for (int64_t i = 0; i < range.end - range.begin; i++) {
        work[i] = mine[i];
    }
    QS_TRY(qs_comm_all_gather_now(comm, work, all, (size_t)width * sizeof *work));
    for (int r = 0; r < nranks; r++) {
        const qs_range of = qs_slots_of(slots, r, nranks);
        for (int64_t i = 0; i < of.end - of.begin; i++) {
            *sum += all[r * width + i];
        }
    }
    return QS_OK;
}
