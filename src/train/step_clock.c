#include "train/step_clock.h"

#include "base/timer.h"

static double waited_s(const qs_trainer *trainer)
{
    return qs_fsdp_get_stats(trainer->session->fsdp).wait_s;
}

void qs_step_clock_begin(qs_step_clock *clock, const qs_trainer *trainer)
{
    *clock = (qs_step_clock){.trainer = trainer,
                             .begin_s = qs_time_s(),
                             .waited_s = waited_s(trainer),
                             .reduced_s = qs_grads_wait_s(trainer->grads)};
}

void qs_step_clock_passed(qs_step_clock *clock)
{
    clock->passed_s = qs_time_s();
    clock->between_s = qs_grads_wait_s(clock->trainer->grads) - clock->reduced_s;
}

void qs_step_clock_summed(qs_step_clock *clock)
{
    clock->summed_s = qs_time_s();
}

void qs_step_clock_updated(qs_step_clock *clock)
{
    clock->updated_s = qs_time_s();
}

void qs_step_clock_end(const qs_step_clock *clock, double parts[QS_STEP_PARTS])
{
    const double end_s = qs_time_s();
    parts[QS_STEP_WAIT] = waited_s(clock->trainer) - clock->waited_s;
    parts[QS_STEP_COMPUTE] =
        clock->passed_s - clock->begin_s - parts[QS_STEP_WAIT] - clock->between_s;
    parts[QS_STEP_REDUCE] = clock->between_s + clock->summed_s - clock->passed_s;
    parts[QS_STEP_OPTIMIZER] = clock->updated_s - clock->summed_s;
    parts[QS_STEP_LORA] = end_s - clock->updated_s;
    parts[QS_STEP_TOTAL] = end_s - clock->begin_s;
}
