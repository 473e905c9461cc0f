#include "train/trainer.h"

#include "base/mem.h"
#include "train/evaluate.h"

qs_status qs_trainer_create(qs_trainer *t, qs_session *s, const qs_model_shape *shape,
                            int64_t slots)
{
    const int rank = qs_comm_rank(s->comm);
    *t = (qs_trainer){.session = s,
                      .slots = slots,
                      .group = shape->group,
                      .mine = qs_slots_of(slots, rank, s->nranks)};
    QS_TRY(QS_ALLOC(&t->slot_sums, t->mine.end - t->mine.begin, QS_MEM_WORK));
    QS_TRY(qs_optim_create(&t->optim, s->device, &s->layout, rank, s->nranks));
    QS_TRY(qs_grads_create(&t->grads, &s->layout, s->ops, &s->levels.levels, s->queue, slots,
                           shape->group));
    return qs_batches_create(&t->batches, shape->group, shape->max_tokens);
}

void qs_trainer_destroy(qs_trainer *t)
{
    qs_batches_destroy(t->batches, t->group);
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

/* What the pass that begins with this rank's slot `first` has to do. */
static qs_status load_pass(qs_trainer *t, int64_t first, qs_slot_load load, void *ctx,
                           qs_micro_batch *micro)
{
    qs_status st = QS_OK;
    for (int64_t g = 0; g < t->group; g++) {
        const int64_t slot = t->mine.begin + first + g;
        micro[g] = (qs_micro_batch){.slot = -1};
        if (slot < t->mine.end && st == QS_OK) {
            st = load(ctx, slot, t->batches[g]);
            micro[g].slot = slot;
            micro[g].batch = t->batches[g]->n_targets > 0 ? t->batches[g] : NULL;
        }
    }
    return qs_comm_agree(t->session->comm, st);
}

qs_status qs_trainer_passes(qs_trainer *t, float loss_scale, const qs_model_noise *noise,
                            qs_slot_load load, void *ctx)
{
    qs_micro_batch micro[QS_GROUP_MAX];
    const int64_t per_rank = qs_shard_width(t->slots, t->session->nranks);
    qs_grads_begin(t->grads);
    for (int64_t first = 0; first < per_rank; first += t->group) {
        QS_TRY(load_pass(t, first, load, ctx, micro));
        QS_TRY(qs_model_train_pass(t->session->model, micro, t->group, loss_scale, noise, t->grads,
                                   first + t->group >= per_rank));
        for (int64_t g = 0; g < t->group; g++) {
            if (micro[g].slot >= 0) {
                t->slot_sums[micro[g].slot - t->mine.begin] = micro[g].loss_sum;
            }
        }
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
