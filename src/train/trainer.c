#include "train/trainer.h"

#include "base/mem.h"
#include "train/evaluate.h"

qs_status qs_trainer_create(qs_trainer *t, qs_session *s, const qs_model_shape *shape,
                            int64_t slots)
{
    const int rank = qs_comm_rank(s->comm);
    *t = (qs_trainer){.session = s, .slots = slots, .mine = qs_slots_of(slots, rank, s->nranks)};
    QS_TRY(QS_ALLOC(&t->slot_sums, t->mine.end - t->mine.begin, QS_MEM_WORK));
    QS_TRY(qs_optim_create(&t->optim, s->device, &s->layout, rank, s->nranks));
    QS_TRY(qs_grads_create(&t->grads, &s->layout, s->ops, &s->levels.levels, s->queue, slots,
                           shape->group));
    return qs_feed_create(&t->feed, shape->group, shape->max_tokens);
}

void qs_trainer_destroy(qs_trainer *t)
{
    qs_feed_destroy(&t->feed);
    qs_grads_destroy(t->grads);
    qs_optim_destroy(t->optim);
    qs_mem_free(t->slot_sums);
}

qs_status qs_trainer_start_anew(qs_trainer *t, uint64_t seed)
{
    const qs_session *s = t->session;
    const int64_t width = qs_lora_shard_width(&s->layout, s->nranks);
    const qs_range mine = qs_lora_shard(&s->layout, qs_comm_rank(s->comm), s->nranks);
    for (int l = 0; l < s->layout.n_layers; l++) {
        qs_lora_init(&s->layout, seed, l, mine, t->optim->master + l * width);
    }
    return qs_model_magnitudes(s->model, mine, width, t->optim->master);
}

qs_status qs_trainer_passes(qs_trainer *t, float loss_scale, const qs_model_noise *noise,
                            qs_slot_load load, void *ctx, bool more)
{
    const qs_session *s = t->session;
    const qs_feed_source source = {.mine = t->mine, .load = load, .ctx = ctx};
    const int64_t per_rank = qs_shard_width(t->slots, s->nranks), group = t->feed.group;
    const int64_t step = (int64_t)noise->step;
    qs_grads_begin(t->grads);
    QS_TRY(qs_feed_load(&t->feed, s->comm, &source, step, 0));
    for (int64_t first = 0; first < per_rank; first += group) {
        const bool last = first + group >= per_rank;
        qs_micro_batch *micro = qs_feed_take(&t->feed);
        if (!last || more) {
            QS_TRY(qs_feed_load(&t->feed, s->comm, &source, last ? step + 1 : step,
                                last ? 0 : first + group));
        }
        QS_TRY(qs_model_train_pass(s->model, micro, qs_feed_ahead(&t->feed), group, loss_scale,
                                   noise, t->grads, last));
        for (int64_t g = 0; g < group; g++) {
            if (micro[g].slot >= 0) {
                t->slot_sums[micro[g].slot - t->mine.begin] = micro[g].loss_sum;
            }
        }
        t->tokens += t->feed.tokens[t->feed.now];
        t->targets += t->feed.targets[t->feed.now];
    }
    return QS_OK;
}

qs_status qs_trainer_sums(qs_trainer *t, float **shard, double *norm, double *loss_sum)
{
    QS_TRY(qs_grads_finish(t->grads, shard));
    QS_TRY(qs_grads_norm(t->grads, *shard, norm));
    return qs_sum_slots(t->session->comm, t->slots, t->slot_sums, loss_sum);
}

qs_status qs_trainer_gather(qs_trainer *t)
{
    qs_session *s = t->session;
    const qs_levels *levels = &s->levels.levels;
    qs_model_adapter_changed(s->model);
    QS_TRY(qs_lora_gather_as(&s->layout, s->ops, levels, s->queue, t->optim->d_master, s->lora_send,
                             s->lora));
    return s->magnitudes == NULL
               ? QS_OK
               : qs_lora_gather_magnitudes(&s->layout, levels, s->queue, t->optim->d_master,
                                           s->magnitudes_send, s->magnitudes);
}
