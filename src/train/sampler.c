#include "train/sampler.h"

#include <inttypes.h>

#include "base/minmax.h"

qs_sampler qs_sampler_make(const qs_config *cfg, const qs_data *data)
{
    qs_sampler s = {.data = data,
                    .seed = (uint64_t)cfg->seed,
                    .global_batch = cfg->train.global_batch,
                    .micro_batch = cfg->train.micro_batch};
    s.slots = (s.global_batch + s.micro_batch - 1) / s.micro_batch;
    if (cfg->train.epochs > 0) {
        s.total = cfg->train.epochs * data->n_sequences;
        s.steps = (s.total + s.global_batch - 1) / s.global_batch;
    } else {
        s.steps = cfg->train.steps;
        s.total = s.steps * s.global_batch;
    }
    return s;
}

qs_status qs_sampler_check(const qs_config *cfg, const qs_data *data)
{
    const int64_t steps = qs_sampler_make(cfg, data).steps;
    const double warmup = cfg->optim.warmup;
    return warmup < 1 || warmup < (double)steps
               ? QS_OK
               : QS_FAIL(QS_ERR_CONFIG_PAIR,
                         "%s: optim.warmup=%.0f steps leaves nothing of the %" PRId64
                         " that train.epochs=%" PRId64 " makes of it; lower it",
                         data->path, warmup, steps, cfg->train.epochs);
}

int64_t qs_sampler_step_size(const qs_sampler *s, int64_t step)
{
    const int64_t left = s->total - step * s->global_batch;
    return left < s->global_batch ? left : s->global_batch;
}

int64_t qs_sampler_sequence(const qs_sampler *s, int64_t step, int64_t i, int64_t *number)
{
    const int64_t n = s->data->n_sequences;
    *number = step * s->global_batch + i;
    return qs_data_order(s->data, s->seed, *number / n, *number % n);
}

int64_t qs_sampler_slot(const qs_sampler *s, int64_t step, int64_t slot, int64_t *sequence,
                        int64_t *number)
{
    const int64_t size = qs_sampler_step_size(s, step);
    const int64_t begin = slot * s->micro_batch;
    int64_t count = 0;
    for (int64_t i = begin; i < begin + s->micro_batch && i < size; i++) {
        sequence[count] = qs_sampler_sequence(s, step, i, &number[count]);
        count++;
    }
    return count;
}

static int64_t epochs_over(const qs_sampler *s, int64_t steps)
{
    return qs_min_i64(steps * s->global_batch, s->total) / s->data->n_sequences;
}

bool qs_sampler_ends_epoch(const qs_sampler *s, int64_t steps)
{
    return steps > 0 && epochs_over(s, steps) > epochs_over(s, steps - 1);
}

int64_t qs_sampler_targets(const qs_sampler *s, int64_t step)
{
    const int64_t size = qs_sampler_step_size(s, step);
    int64_t targets = 0;
    for (int64_t i = 0; i < size; i++) {
        int64_t number = 0;
        targets += s->data->seq_targets[qs_sampler_sequence(s, step, i, &number)];
    }
    return targets;
}
