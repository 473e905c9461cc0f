#include <inttypes.h>
#include <math.h>

#include "base/log.h"
#include "base/mem.h"
#include "train/run_impl.h"

enum { NOT_FINITE_MAX = 3 }; /* skipped updates in a row before the run stops */

/* qs_slot_load: from the token file, in the order of the sampler. */
static qs_status load_slot(void *ctx, int64_t step, int64_t slot, qs_batch *batch)
{
    const qs_run *r = ctx;
    int64_t sequence[QS_MICRO_BATCH_MAX], number[QS_MICRO_BATCH_MAX];
    const int64_t count = qs_sampler_slot(&r->sampler, step, slot, sequence, number);
    return qs_data_read(r->train_data, sequence, number, count, batch);
}

/* The update, unless the gradient is not finite: then the step is skipped on all ranks alike. */
static qs_status apply_update(qs_run *r, const float *shard, const qs_step_metrics *m)
{
    if (!isfinite(m->grad_norm) || !isfinite(m->loss)) {
        r->not_finite++;
        qs_log_warn("step %" PRId64 ": loss %g, gradient norm %g: not finite, update skipped",
                    m->step, m->loss, m->grad_norm);
        if (r->not_finite >= NOT_FINITE_MAX) {
            return QS_FAIL(QS_ERR_NUMERIC,
                           "step %" PRId64 ": %d steps in a row were not finite; lower optim.lr "
                           "or look at the data of these steps (--dump-order)",
                           m->step, NOT_FINITE_MAX);
        }
        return QS_OK;
    }
    r->not_finite = 0;
    r->trainer.optim->step = r->step;
    QS_TRY(qs_optim_step(r->trainer.optim, r->session.on.ops, r->session.queue, r->cfg, m->lr,
                         qs_clip_scale(r->cfg->optim.clip, m->grad_norm), shard));
    return qs_queue_wait(r->session.queue); /* the gather would: so that its time is told apart */
}

static int64_t step_tokens(const qs_run *r)
{
    int64_t tokens = 0;
    for (int64_t i = 0; i < qs_sampler_step_size(&r->sampler, r->step); i++) {
        int64_t number = 0;
        const int64_t s = qs_sampler_sequence(&r->sampler, r->step, i, &number);
        tokens += r->train_data->seq_offsets[s + 1] - r->train_data->seq_offsets[s];
    }
    return tokens;
}

/* Does the model go on with another step, as far as one knows? */
static bool another_follows(const qs_run *r)
{
    const int64_t done = r->step + 1;
    return r->options->dump_grads == NULL && done < r->sampler.steps && !qs_run_eval_due(r, done);
}

/* A rank without a sequence of the step does not learn from its own how long others' take. */
static bool has_work(const qs_run *r)
{
    const qs_range slots = qs_slots_of(r->sampler.slots, r->rank, r->nranks);
    return slots.begin < slots.end &&
           slots.begin * r->sampler.micro_batch < qs_sampler_step_size(&r->sampler, r->step);
}

qs_status qs_run_step(qs_run *r, qs_step_metrics *m)
{
    qs_step_clock clock;
    const double gathered_s = qs_fsdp_get_stats(r->session.fsdp).gather_s;
    double loss_sum = 0;
    float *shard = NULL;
    qs_step_clock_begin(&clock, &r->trainer);
    qs_watch_section(!has_work(r), "step %" PRId64, r->step + 1);
    *m = (qs_step_metrics){.step = r->step + 1,
                           .tokens = qs_sampler_targets(&r->sampler, r->step),
                           .all_tokens = step_tokens(r),
                           .lr = qs_lr_at(r->cfg, r->step, r->sampler.steps)};
    const float loss_scale = m->tokens > 0 ? (float)(1.0 / (double)m->tokens) : 0;

    const qs_model_noise noise = {.dropout = (float)r->cfg->lora.dropout,
                                  .seed = (uint64_t)r->cfg->seed,
                                  .step = (uint64_t)r->step};
    QS_TRY(qs_trainer_passes(&r->trainer, loss_scale, &noise, load_slot, r, another_follows(r)));
    if (r->trainer.given_up_s > 0) {
        return QS_OK;
    }
    qs_step_clock_passed(&clock);
    qs_span_begin(r->session.queue, "sums");
    QS_TRY(qs_trainer_sums(&r->trainer, &shard, &m->grad_norm, &loss_sum));
    m->loss = m->tokens > 0 ? loss_sum / (double)m->tokens : 0;
    qs_step_clock_summed(&clock);
    qs_span_end(r->session.queue);
    if (r->options->dump_grads != NULL) {
        return qs_run_dump_gradient(r, shard);
    }
    qs_span_begin(r->session.queue, "update");
    QS_TRY(qs_comm_agree(r->comm, apply_update(r, shard, m)));
    qs_step_clock_updated(&clock);
    QS_TRY(qs_trainer_gather(&r->trainer));
    qs_span_end(r->session.queue);
    qs_step_clock_end(&clock, m->parts);
    m->step_time_s = m->parts[QS_STEP_TOTAL];
    m->gather_s =
        r->session.on.apart ? -1 : qs_fsdp_get_stats(r->session.fsdp).gather_s - gathered_s;
    for (int p = 0; p < QS_STEP_PARTS; p++) {
        r->parts_s[p] += m->parts[p];
    }
    m->peak_bytes = qs_mem_peak_total_bytes(r->plan.space);
    return QS_OK;
}
