#include "train/best.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>

#include "base/log.h"
#include "ckpt/ckpt.h"

static qs_status find_here(const qs_best_of *run, bool verify, qs_ckpt_eval *best)
{
    const char *output = run->config->output;
    QS_TRY(qs_ckpt_best(output, qs_metrics_evals(run->metrics), verify, best));
    const qs_status st = qs_run_dir_note_best(run->dir, best);
    if (st == QS_ERR_IO_FULL) { /* metrics.jsonl has the losses: the next one to look finds it */
        qs_log_warn("%s: run.json does not say which checkpoint is the best: %s", output,
                    qs_error_text());
        qs_error_clear();
        return QS_OK;
    }
    return st;
}

qs_status qs_best_find(const qs_best_of *run, bool verify, qs_ckpt_eval *best)
{
    *best = (qs_ckpt_eval){.step = -1, .loss = NAN};
    return qs_comm_agree(run->comm,
                         qs_comm_rank(run->comm) == 0 ? find_here(run, verify, best) : QS_OK);
}

static qs_status rotate_here(const qs_best_of *run)
{
    return qs_ckpt_rotate(run->config->output, run->config->train.keep_last,
                          run->config->train.keep_every, qs_metrics_evals(run->metrics));
}

qs_status qs_best_rotate(const qs_best_of *run)
{
    return qs_comm_agree(run->comm, qs_comm_rank(run->comm) == 0 ? rotate_here(run) : QS_OK);
}

qs_status qs_best_settle(const qs_best_of *run, qs_ckpt_eval *best)
{
    QS_TRY(qs_run_dir_still_ours(run->dir, run->comm));
    QS_TRY(qs_best_find(run, true, best));
    const bool evaluated = qs_metrics_evals(run->metrics).count > 0; /* rank 0 alone knows */
    return qs_comm_agree(run->comm, evaluated ? rotate_here(run) : QS_OK);
}

void qs_best_say(const qs_best_of *run, const qs_ckpt_eval *best, int64_t last)
{
    char lower[160] = "";
    const char *output = run->config->output;
    const qs_ckpt_evals evals = qs_metrics_evals(run->metrics);
    const int64_t untrained = evals.count > 0 && evals.list[0].step == 0; /* train.eval_first */
    const int64_t count = evals.count - untrained;
    qs_ckpt_eval lowest = *best;
    for (int64_t i = untrained; i < evals.count; i++) {
        lowest = evals.list[i].loss < lowest.loss ? evals.list[i] : lowest;
    }
    if (untrained && evals.list[0].loss < lowest.loss) {
        qs_log_warn("%s: eval_loss was lower before the first step, %.6f, than behind any, %.6f at "
                    "best; lower optim.lr, or look at what data.train teaches",
                    output, evals.list[0].loss, lowest.loss);
    }
    if (count < 2 || best->step < 0) {
        return;
    }
    if (lowest.step != best->step) {
        snprintf(lower, sizeof lower,
                 "; %.6f at step %" PRId64 " has no checkpoint (train.save_every)", lowest.loss,
                 lowest.step);
    }
    if (best->step == last) {
        qs_log_end("%s: the last eval_loss, %.6f, is the best of %" PRId64 "%s", output, best->loss,
                   count, lower);
    } else {
        qs_log_end("%s: best eval_loss %.6f at step %" PRId64 ", kept in step-%08" PRId64
                   "; the last is %.6f%s",
                   output, best->loss, best->step, best->step, evals.list[evals.count - 1].loss,
                   lower);
    }
}
