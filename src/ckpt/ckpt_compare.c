/* Whether a run may go on under another configuration. What changes no bit may change, and so may
 * the run's length, as long as the steps done are the new run's own: with a schedule that does not
 * look at the end of the run, a finished one can be trained on. */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "ckpt/ckpt_impl.h"

enum { REMEDY_ROOM = 256 };

static double rate(const qs_config *cfg, int64_t step)
{
    return qs_lr_at(cfg, step, cfg->train.steps);
}

/* Under both, had the steps done the same learning rate? Nothing else depends on the length. */
static bool same_rates(const qs_config *then, const qs_config *now, int64_t done)
{
    bool same = true;
    for (int64_t step = 0; step < done && same; step++) {
        same = rate(then, step) == rate(now, step);
    }
    return same;
}

static const char elsewhere[] = "another output, where lora.init goes on from the exported adapter";

/* What to do about another train.steps. A fraction as warm-up means other steps. */
static void say_remedy(char out[REMEDY_ROOM], const qs_config *then, const qs_config *now,
                       int64_t done)
{
    qs_config same_warmup = *now;
    same_warmup.optim.warmup = qs_warmup_steps(then, then->train.steps);
    if (now->train.steps < done) {
        snprintf(out, REMEDY_ROOM, "%" PRId64 " steps are done; give at least as many, or %s", done,
                 elsewhere);
    } else if (same_rates(then, &same_warmup, done)) {
        snprintf(out, REMEDY_ROOM,
                 "give optim.warmup=%.0f as well, the steps that the warm-up has had, and the run "
                 "goes on",
                 same_warmup.optim.warmup);
    } else {
        snprintf(
            out, REMEDY_ROOM,
            "the steps done would have had other learning rates (optim.schedule); give the old "
            "value, or %s",
            elsewhere);
    }
}

qs_status qs_ckpt_compare_configs(qs_config *then, const qs_config *now, int64_t done,
                                  const char *subject)
{
    char values[512], remedy[REMEDY_ROOM];
    const bool by_steps = done > 0 && then->train.steps > 0 && now->train.steps > 0;
    const bool other_length =
        then->train.steps != now->train.steps || then->optim.warmup != now->optim.warmup;
    if (other_length && by_steps && now->train.steps >= done && same_rates(then, now, done)) {
        then->train.steps = now->train.steps;
        then->optim.warmup = now->optim.warmup;
    }
    const char *key = qs_config_first_difference(then, now, values, sizeof values);
    if (key == NULL) {
        return QS_OK;
    }
    snprintf(remedy, sizeof remedy, "give the old value, or %s", elsewhere);
    if (by_steps && strcmp(key, "train.steps") == 0) {
        say_remedy(remedy, then, now, done);
    }
    return QS_FAIL(QS_ERR_RESUME, "%s with another %s (then and now: %s); %s", subject, key, values,
                   remedy);
}
