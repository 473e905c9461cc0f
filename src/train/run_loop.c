#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "base/mem.h"
#include "base/timer.h"
#include "base/trace.h"
#include "train/evaluate.h"
#include "train/run_impl.h"
#include "train/trace_file.h"

/* ---- what a run survives ---- */

/* A warning is all that comes of an error: a later one is a new one. */
static qs_status settle(qs_run *r)
{
    qs_error_clear();
    return qs_comm_agree(r->comm, QS_OK);
}

/* A full disk does not end a run: the line waits for room, and if there is none until the end, that
 * says so. */
static qs_status keep_going(qs_run *r, qs_status st)
{
    st = qs_comm_agree(r->comm, st);
    if (st != QS_ERR_IO_FULL) {
        return st;
    }
    if (!r->lines_wait) {
        qs_log_warn("step %" PRId64 ": %s; the run goes on, and the line waits", r->step,
                    qs_error_text());
    }
    r->lines_wait = true;
    return settle(r);
}

/* ---- evaluation ---- */

static bool due(const qs_run *r, int64_t step, int64_t every)
{
    return every == QS_EVERY_EPOCH ? qs_sampler_ends_epoch(&r->sampler, step)
                                   : every > 0 && step % every == 0;
}

bool qs_run_eval_due(const qs_run *r, int64_t step)
{
    const bool wanted = step > 0
                            ? due(r, step, r->cfg->train.eval_every) || step == r->sampler.steps
                            : r->cfg->train.eval_first;
    return r->eval_data != NULL && wanted;
}

/* A signal anywhere is everyone's. */
static qs_status signal_caught(void *ctx, bool *stop)
{
    const qs_run *r = ctx;
    int64_t flag = qs_signals_caught() > 0;
    QS_TRY(qs_comm_max_i64(r->comm, &flag, 1));
    *stop = flag != 0;
    return QS_OK;
}

/* A stop signal ends it, and the next start makes up for it; `max_time` alone does not, or a run
 * that is started again and again by it would never see the end of a long one. */
static qs_status evaluate(qs_run *r, bool *stop)
{
    qs_eval_result result;
    QS_TRY(qs_evaluate(&r->session, r->eval_data, r->cfg->train.micro_batch, &r->trainer.feed,
                       signal_caught, r, &result));
    if (result.stopped) {
        qs_log_info("step %" PRId64 ": the evaluation is left to the next start", r->step);
        r->unevaluated = *stop = true;
        return QS_OK;
    }
    QS_TRY(qs_data_check_unchanged(r->eval_data, r->comm));
    qs_log_info("step %" PRId64 "  eval_loss %.6f  perplexity %.4f  (%" PRId64 " tokens)", r->step,
                result.loss, exp(result.loss), result.targets);
    return keep_going(r, qs_metrics_eval(r->metrics, r->step, result.loss, result.targets));
}

/* Before the first step of this start: train.eval_first, and what a run makes up for that was
 * stopped between a checkpoint and its evaluation. */
static qs_status first_evaluation(qs_run *r, bool *stop)
{
    int64_t last = qs_metrics_last_eval(r->metrics);
    QS_TRY(qs_comm_bcast(r->comm, &last, sizeof last, 0));
    return qs_run_eval_due(r, r->step) && last < r->step ? evaluate(r, stop) : QS_OK;
}

/* Has the loss not been lower for train.patience evaluations, those of earlier starts among them?
 * The same on all ranks, and at the same step on any number of them. */
static qs_status look_for_patience(qs_run *r)
{
    const qs_ckpt_evals evals = qs_metrics_evals(r->metrics); /* rank 0's */
    int64_t best = 0;
    for (int64_t i = 1; i < evals.count; i++) {
        best =
            evals.list[i].loss < evals.list[best].loss || isnan(evals.list[best].loss) ? i : best;
    }
    int64_t tired = r->cfg->train.patience > 0 && evals.count - 1 - best >= r->cfg->train.patience;
    QS_TRY(qs_comm_max_i64(r->comm, &tired, 1));
    r->tired = tired != 0;
    if (r->tired && r->rank == 0) {
        qs_log_info("step %" PRId64 ": eval_loss was lowest at step %" PRId64
                    ", %.6f, and has not been lower in %" PRId64
                    " evaluations: the run ends (train.patience)",
                    r->step, evals.list[best].step, evals.list[best].loss, evals.count - 1 - best);
    }
    return QS_OK;
}

/* ---- checkpoints ---- */

qs_best_of qs_run_best(const qs_run *r)
{
    return (qs_best_of){
        .config = r->cfg, .dir = &r->run_dir, .metrics = r->metrics, .comm = r->comm};
}

static qs_status save_state(qs_run *r)
{
    qs_status st = QS_OK;
    char *yaml = NULL;
    QS_GOTO(qs_run_config_text(r, &yaml));
    r->trainer.optim->step = r->step;
    QS_GOTO(qs_comm_agree(r->comm, qs_optim_pull(r->trainer.optim, r->session.queue)));
    const qs_ckpt_meta meta = qs_run_meta(r, yaml);
    st = qs_ckpt_save(r->cfg->output, &meta, &r->session.on.layout, r->trainer.optim, r->comm);
done:
    free(yaml);
    return st;
}

/* Save and rotate. A full disk keeps the older checkpoints and the run goes on; it counts at the
 * end. */
static qs_status save(qs_run *r, qs_status *last_save)
{
    qs_watch_section(true, "saving step %" PRId64, r->step);
    *last_save = qs_data_check_unchanged(r->train_data, r->comm);
    QS_TRY(*last_save);
    *last_save = qs_run_dir_still_ours(&r->run_dir, r->comm);
    QS_TRY(*last_save);
    QS_TRY(keep_going(r, qs_metrics_sync(r->metrics)));
    *last_save = save_state(r);
    if (*last_save == QS_ERR_IO_FULL) {
        qs_log_warn("step %" PRId64 ": not saved: %s", r->step, qs_error_text());
        return settle(r);
    }
    QS_TRY(*last_save);
    qs_log_info("%s: saved step %" PRId64, r->cfg->output, r->step);
    const qs_best_of best = qs_run_best(r);
    return qs_best_rotate(&best);
}

static qs_status report_ranks(qs_run *r)
{
    const qs_fsdp_stats stats = qs_fsdp_get_stats(r->session.fsdp);
    uint64_t received = 0, foreign = 0;
    qs_session_traffic(&r->session, &received, &foreign);
    qs_rank_metrics mine = {
        .tokens = r->trainer.tokens,
        .targets = r->trainer.targets,
        .gather_group = r->shape.group,
        .shard_group = r->session.on.group.nranks,
        .keep_resident = r->shape.keep_resident,
        .keep_decoded = r->shape.keep_decoded,
        .flops = qs_model_flops(r->session.model),
        .read_bytes = stats.read_bytes,
        .data_bytes = r->train_data->bytes_read,
        .gathered_bytes = stats.gathered_bytes,
        .received_bytes = received,
        .foreign_bytes = foreign,
        .base_bytes = qs_mem_peak_bytes(r->plan.space, QS_MEM_BASE_SHARD) +
                      qs_mem_peak_bytes(r->plan.space, QS_MEM_BASE_GATHER),
        .peak_bytes = qs_mem_peak_total_bytes(r->plan.space),
        .rss_bytes = qs_mem_peak_rss_bytes(),
    };
    memcpy(mine.parts, r->parts_s, sizeof mine.parts);
    return keep_going(r, qs_metrics_ranks(r->metrics, r->step, &mine, r->comm));
}

static qs_status save_here(qs_run *r, qs_status *last_save, int64_t *saved)
{
    QS_TRY(save(r, last_save));
    *saved = *last_save == QS_OK ? r->step : *saved;
    r->saved_s = qs_time_s();
    return report_ranks(r);
}

/* `saved`: the newest step of which there is a checkpoint, 0: none. */
static qs_status not_saved(const qs_run *r, qs_status st, int64_t saved)
{
    char newest[48] = "none is there yet";
    if (saved > 0) {
        snprintf(newest, sizeof newest, "the newest good one is step %" PRId64, saved);
    }
    return QS_FAIL(st,
                   "%s: the last checkpoint could not be saved, as the warning says; %s; make room "
                   "and start again",
                   r->cfg->output, newest);
}

/* ---- profile ---- */

/* With --trace alone: two steps of this start, behind its warm-up if there are so many. */
static void choose_profile(qs_run *r)
{
    memcpy(r->profiled, r->options->profile_steps, sizeof r->profiled);
    if (r->options->trace != NULL && r->profiled[0] == 0) {
        const int64_t left = r->sampler.steps - r->step;
        const int64_t skipped = left > QS_WARM_UP_STEPS ? QS_WARM_UP_STEPS : 0;
        r->profiled[0] = r->step + skipped + 1;
        r->profiled[1] = r->profiled[0] + 1;
    }
}

static qs_status start_profile(qs_run *r)
{
    qs_device_profile(r->session.device, true);
    return r->options->trace != NULL ? qs_trace_file_start(r->comm) : QS_OK;
}

/* A trace that finds no room is not worth a run's steps. */
static qs_status end_profile(qs_run *r)
{
    qs_device_profile(r->session.device, false);
    if (r->options->trace == NULL) {
        return QS_OK;
    }
    const qs_status st = qs_trace_file_write(r->options->trace, r->comm);
    if (qs_exit_code(st) != qs_exit_code(QS_ERR_IO)) {
        return st;
    }
    qs_log_warn("%s; the run goes on without the trace", qs_error_text());
    return settle(r);
}

/* ---- step after step ---- */

/* Of rank 0's clock: 0 turns it off. */
static bool passed(const qs_run *r, double since_s, double limit_s)
{
    return r->rank == 0 && limit_s > 0 && qs_time_s() - since_s >= limit_s;
}

/* What time and signals ask for behind a step, of all ranks the most. */
enum { GO_ON, SAVE, STOP };

static qs_status ask(const qs_run *r, int64_t *wish)
{
    const bool stop = qs_signals_caught() > 0 || passed(r, r->started_s, r->cfg->train.max_time);
    *wish = stop ? STOP : passed(r, r->saved_s, r->cfg->train.save_time) ? SAVE : GO_ON;
    return qs_comm_max_i64(r->comm, wish, 1);
}

static void show(const qs_run *r, const qs_step_metrics *m)
{
    char text[160];
    snprintf(text, sizeof text, "loss %.4f  lr %.3g  norm %.3f  %.0f tokens/s", m->loss, m->lr,
             m->grad_norm, m->step_time_s > 0 ? (double)m->all_tokens / m->step_time_s : 0);
    if (due(r, m->step, r->cfg->train.log_every) || m->step == r->sampler.steps) {
        qs_progress("train", m->step, r->sampler.steps, text);
    }
}

/* The trainer has given up the step behind r->step, which is the state to save. A start that is
 * stopped before its first step is done makes no progress, nor does the next one like it. */
static qs_status leave_step(qs_run *r, qs_status *last_save, int64_t *saved)
{
    qs_log_info("step %" PRId64 ": given up for a stop signal, with about %.3g s of it left; the "
                "next start begins it anew",
                r->step + 1, r->trainer.given_up_s);
    if (r->steps_done == 0) {
        qs_log_warn("this start has done no step: where a step takes longer than the time limit "
                    "allows, raise that or the number of ranks");
    }
    return *saved < r->step ? save_here(r, last_save, saved) : QS_OK;
}

/* Once: mpirun leaves its ranks a second behind a Ctrl-C, too little for a long step and a save. */
static void tell_how_to_stop(const qs_run *r)
{
    const bool slow = r->steps_done == QS_WARM_UP_STEPS && r->last.step_time_s > 1;
    const int mpirun = slow ? qs_signals_mpirun() : 0;
    if (mpirun > 0) {
        qs_log_info("to stop this run and save, kill -USR1 %d, which is mpirun; at Ctrl-C that "
                    "leaves the ranks a second, and a step takes %.1f s",
                    mpirun, r->last.step_time_s);
    }
}

/* One step with everything that follows it. A stop signal saves first and leaves the evaluation to
 * the next start. */
static qs_status step_and_after(qs_run *r, qs_status *last_save, int64_t *saved, bool *stop)
{
    const int64_t *profiled = r->profiled;
    if (r->step + 1 == profiled[0]) {
        QS_TRY(start_profile(r));
    }
    qs_span_begin(r->session.queue, "step %" PRId64, r->step + 1);
    QS_TRY(qs_run_step(r, &r->last));
    qs_span_end(r->session.queue);
    if (r->trainer.given_up_s > 0) {
        *stop = true;
        return leave_step(r, last_save, saved);
    }
    r->step++;
    r->timed_s += ++r->steps_done > QS_WARM_UP_STEPS ? r->last.step_time_s : 0;
    if (r->step == profiled[1]) {
        QS_TRY(end_profile(r));
    }
    r->tokens_seen += r->last.all_tokens;
    QS_TRY(keep_going(r, qs_metrics_step(r->metrics, &r->last)));
    show(r, &r->last);
    tell_how_to_stop(r);
    int64_t wish = GO_ON;
    QS_TRY(ask(r, &wish));
    *stop = wish == STOP;
    const bool ends = r->step == r->sampler.steps;
    if (wish != GO_ON || ends || due(r, r->step, r->cfg->train.save_every)) {
        QS_TRY(save_here(r, last_save, saved));
    }
    if (qs_run_eval_due(r, r->step) && (!*stop || ends)) {
        QS_TRY(evaluate(r, stop));
        const qs_best_of best = qs_run_best(r);
        QS_TRY(qs_best_find(&best, false, &r->best));
        QS_TRY(look_for_patience(r));
    }
    const bool last = r->unevaluated || r->tired;
    return last && *saved < r->step ? save_here(r, last_save, saved) : QS_OK;
}

static qs_status write_last_lines(const qs_run *r)
{
    const qs_status st = qs_comm_agree(r->comm, qs_metrics_sync(r->metrics));
    if (st != QS_ERR_IO_FULL) {
        return st;
    }
    qs_error_clear();
    return qs_comm_agree(r->comm, QS_FAIL(st,
                                          "%s: lines of metrics are lost: disk full; the "
                                          "checkpoints are complete",
                                          r->cfg->output));
}

qs_status qs_run_loop(qs_run *r)
{
    qs_status last_save = QS_OK;
    bool stop = false;
    int64_t saved = r->step;
    choose_profile(r);
    r->saved_s = qs_time_s();
    QS_TRY(first_evaluation(r, &stop));
    QS_TRY(look_for_patience(r));
    qs_watch_section(true, "looking for the best checkpoint");
    const qs_best_of best = qs_run_best(r);
    QS_TRY(qs_best_find(&best, true, &r->best));
    while (r->step < r->sampler.steps && !stop && !r->tired) {
        QS_TRY(step_and_after(r, &last_save, &saved, &stop));
    }
    if (qs_trace_on()) { /* the run was shorter */
        QS_TRY(end_profile(r));
    }
    qs_progress_end();
    if (last_save != QS_OK) {
        return qs_comm_agree(r->comm, not_saved(r, last_save, saved));
    }
    QS_TRY(write_last_lines(r));
    const bool unfinished = r->unevaluated || (r->step < r->sampler.steps && !r->tired);
    if (stop && unfinished) {
        qs_log_end("%s: stopped behind step %" PRId64 " of %" PRId64 "; the same command goes on",
                   r->cfg->output, r->step, r->sampler.steps);
    }
    return qs_comm_agree(r->comm, stop && unfinished ? QS_REQUEUE : QS_OK);
}
