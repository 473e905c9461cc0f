#include "train/trainer.h"

#include <math.h>

#include "base/mem.h"
#include "base/timer.h"
#include "fsdp/lora_gather.h"

static const int64_t IN_A_HURRY = (int64_t)1 << 40; /* above all milliseconds */

qs_status qs_trainer_create(qs_trainer *t, qs_session *s, const qs_model_shape *shape,
                            int64_t slots)
{
    const int rank = qs_comm_rank(s->comm);
    const qs_range mine = qs_slots_of(slots, rank, s->on.nranks);
    *t = (qs_trainer){.session = s, .slots = slots};
    QS_TRY(QS_ALLOC(&t->slot_sums, mine.end - mine.begin, QS_MEM_WORK));
    QS_TRY(QS_ALLOC(&t->sums_work, qs_slot_sums_work(slots, s->on.nranks), QS_MEM_WORK));
    QS_TRY(QS_ALLOC(&t->exchange, 4 * s->on.nranks, QS_MEM_WORK));
    QS_TRY(qs_optim_create(&t->optim, s->device, &s->on.layout, rank, s->on.nranks));
    QS_TRY(qs_grads_create(&t->grads, &s->on.layout, s->on.ops, &s->levels.levels, s->queue, slots,
                           shape->group));
    return qs_feed_create(&t->feed, shape->group, shape->max_tokens);
}

void qs_trainer_destroy(qs_trainer *t)
{
    qs_feed_destroy(&t->feed);
    qs_grads_destroy(t->grads);
    qs_optim_destroy(t->optim);
    qs_mem_free(t->slot_sums);
    qs_mem_free(t->sums_work);
    qs_mem_free(t->exchange);
}

qs_status qs_trainer_start_anew(qs_trainer *t, uint64_t seed)
{
    const qs_session *s = t->session;
    const int64_t width = qs_lora_shard_width(&s->on.layout, s->on.nranks);
    const qs_range mine = qs_lora_shard(&s->on.layout, qs_comm_rank(s->comm), s->on.nranks);
    for (int l = 0; l < s->on.layout.n_layers; l++) {
        qs_lora_init(&s->on.layout, seed, l, mine, t->optim->master + l * width);
    }
    return qs_model_magnitudes(s->model, mine, width, t->optim->master);
}

/* In milliseconds: what is left of the step, at the rate of `done` of its passes, if this rank has
 * caught a signal, and IN_A_HURRY on top of that if it is one. Before the first pass is done nobody
 * knows. */
static int64_t haste(const qs_trainer *t, double since_s, int64_t done, int64_t passes)
{
    if (t->signals == NULL || t->signals() == 0 || done == 0) {
        return 0;
    }
    const double left_s = (qs_time_s() - since_s) * (double)(passes - done) / (double)done;
    return llround(1e3 * left_s) + (t->hurry != NULL && t->hurry() ? IN_A_HURRY : 0);
}

/* What is left of the step in seconds if that is too long for the most hasty rank, else 0. */
static double too_long_s(int64_t haste)
{
    const int64_t left_ms = haste % IN_A_HURRY;
    const int64_t patience_ms = haste >= IN_A_HURRY ? QS_TRAINER_HURRY_MS : QS_TRAINER_PATIENCE_MS;
    return left_ms > patience_ms ? 1e-3 * (double)left_ms : 0;
}

qs_status qs_trainer_passes(qs_trainer *t, float loss_scale, const qs_model_noise *noise,
                            qs_slot_load load, void *ctx, bool more)
{
    const qs_session *s = t->session;
    const double since_s = qs_time_s();
    qs_feed_source source = qs_feed_source_make(s->comm, t->slots, load, ctx);
    qs_feed *feed = &t->feed;
    const int64_t per_rank = qs_shard_width(t->slots, s->on.nranks);
    const int64_t passes = (per_rank + feed->group - 1) / feed->group;
    qs_micro_batch *micro;
    int64_t tokens = 0, targets = 0;
    bool last = false;
    qs_grads_begin(t->grads);
    for (int64_t done = 0; !last; done++) {
        source.haste = haste(t, since_s, done, passes);
        QS_TRY(qs_feed_turn(feed, &source, (int64_t)noise->step, done * feed->group, more, &micro,
                            &last));
        t->given_up_s = too_long_s(source.haste);
        if (t->given_up_s > 0) {
            return QS_OK;
        }
        QS_TRY(qs_model_train_pass(s->model, micro, qs_feed_ahead(feed), feed->group, loss_scale,
                                   noise, t->grads, last));
        qs_feed_keep_losses(feed, &source, t->slot_sums);
        tokens += feed->tokens[feed->now];
        targets += feed->targets[feed->now];
    }
    t->tokens += tokens;
    t->targets += targets;
    return QS_OK;
}

qs_status qs_trainer_sums(qs_trainer *t, float **shard, double *norm, double *loss_sum)
{
    QS_TRY(qs_grads_finish(t->grads, shard));
    QS_TRY(qs_grads_norm(t->grads, *shard, norm));
    return qs_sum_slots(t->session->comm, t->slots, t->slot_sums, t->sums_work, loss_sum);
}

qs_status qs_trainer_gather(qs_trainer *t)
{
    qs_session *s = t->session;
    const qs_levels *levels = &s->levels.levels;
    qs_model_adapter_changed(s->model);
    QS_TRY(qs_lora_gather_as(&s->on.layout, s->on.ops, levels, s->queue, t->exchange,
                             t->optim->d_master, s->lora.send, s->lora.weights));
    return s->lora.magnitudes == NULL
               ? QS_OK
               : qs_lora_gather_magnitudes(&s->on.layout, levels, s->queue, t->exchange,
                                           t->optim->d_master, s->lora.magnitudes_send,
                                           s->lora.magnitudes);
}
