/* The training run. A step is
 *
 *   for each pass:  up to G micro-batches forward, head, backward through the gathered units
 *   finish the slot trees, norm, clip, AdamW on this rank's share, gather of the new LoRA weights
 *   metrics, evaluation, checkpoint, stop signals: decided alike on all ranks
 *
 * Nothing but LoRA, the moments and the step number is state: everything else follows from the
 * seed. */
#include "train/train.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "base/mem.h"
#include "base/timer.h"
#include "store/input.h"
#include "store/manifest.h"
#include "train/forecast.h"
#include "train/gathers.h"
#include "train/run_impl.h"
#include "train/session_plan.h"
#include "train/tokenizers.h"
#include "train/trace_file.h"

/* ---- setting up ---- */

static qs_status check_targets(const qs_data *data)
{
    return data->n_targets > 0
               ? QS_OK
               : QS_FAIL(QS_ERR_INPUT_VALUE,
                         "%s: n_targets=0: no position carries loss; prepare the data with "
                         "assistant turns or --format text",
                         data->path);
}

static qs_status open_inputs(qs_run *r)
{
    const qs_config *cfg = r->cfg;
    QS_TRY(qs_run_dir_settle(&r->config, r->comm));
    QS_TRY(qs_session_open(&r->session, cfg, r->comm));
    r->config.device = r->session.on.config.device; /* what auto stands for: recorded */
    r->config.cpu.gemm = r->session.on.config.cpu.gemm;
    const int64_t vocab = r->session.on.index->config.vocab;
    QS_TRY(qs_input_expect("data.train", cfg->data_train, QS_INPUT_DATA, r->comm));
    QS_TRY(qs_data_open(&r->train_data, cfg->data_train, vocab, cfg->train.seq_len, r->comm));
    if (cfg->data_eval[0] != '\0') {
        QS_TRY(qs_input_expect("data.eval", cfg->data_eval, QS_INPUT_DATA, r->comm));
        QS_TRY(qs_data_open(&r->eval_data, cfg->data_eval, vocab, 0, r->comm));
        QS_TRY(qs_data_check_hashes(r->eval_data, r->comm));
    }
    qs_tokenizers_compare(r->session.on.index, (const qs_data *[]){r->train_data, r->eval_data}, 2);
    QS_TRY(qs_data_check_hashes(r->train_data, r->comm));
    QS_TRY(qs_comm_agree(r->comm, check_targets(r->train_data)));
    return qs_comm_agree(
        r->comm, qs_lora_layout_make(&r->session.on.layout, &r->session.on.index->config, cfg));
}

/* A GPU's work is not the host's to time. */
static qs_status check_trace(const qs_run *r)
{
    if (r->options->trace == NULL || r->options->dry_run) {
        return QS_OK;
    }
    if (!r->session.on.apart) {
        return qs_trace_file_check(r->options->trace, r->comm);
    }
    return qs_comm_agree(
        r->comm, QS_FAIL(QS_ERR_CONFIG_PAIR,
                         "--trace: the run is on a GPU, whose time the host does not see; run it "
                         "under nsys profile --capture-range=cudaProfilerApi with --profile-steps "
                         "instead"));
}

static qs_status shape_run(qs_run *r)
{
    QS_TRY(qs_comm_agree(r->comm, qs_sampler_check(r->cfg, r->train_data)));
    r->sampler = qs_sampler_make(r->cfg, r->train_data);
    const qs_plan_job job = qs_plan_training(r->train_data, r->eval_data, r->sampler.slots);
    r->shape = qs_plan_shape(&r->session.on, &job);
    QS_TRY(qs_session_settle(&r->session, &job, &r->shape));
    r->plan = qs_memory_plan_make(&r->session.on, &job, &r->shape);
    return QS_OK;
}

/* ---- the end ---- */

/* What `qshard plan` would have said of this run, beside what it did: on cards that the table
 * knows, each with one rank. */
static void compare_with_forecast(const qs_run *r)
{
    const qs_gpu_kind *kind = qs_gpu_kind_of(qs_device_description(r->session.device));
    const int64_t timed = r->steps_done - QS_WARM_UP_STEPS;
    if (kind == NULL || timed < 1 || r->cfg->allow_shared_device) {
        return;
    }
    const qs_links links = qs_links_usual(kind, qs_comm_local_nranks(r->comm));
    qs_step_work work;
    if (qs_step_work_make(&work, &r->session.on, r->train_data, &r->shape, r->sampler.slots) !=
        QS_OK) {
        qs_error_clear(); /* no memory for a line that says nothing about the run's success */
        return;
    }
    const qs_forecast f = qs_forecast_make(&work, kind, &links);
    qs_log_info("a step took %.1f ms (mean of %" PRId64
                "); forecast for %s: %.1f ms (compute %.1f, "
                "waiting for gathers %.1f, reduce %.1f)",
                1e3 * r->timed_s / (double)timed, timed, kind->name, 1e3 * f.step_s,
                1e3 * f.compute_s, 1e3 * f.gather_waited_s, 1e3 * f.reduce_s);
}

static qs_status finish(qs_run *r)
{
    const double seconds = qs_time_s() - r->started_s;
    const qs_best_of best = qs_run_best(r);
    qs_watch_section(true, "end");
    QS_TRY(qs_best_settle(&best, &r->best));
    qs_status st = qs_metrics_summary(r->metrics, r->step, seconds, r->nranks,
                                      qs_mem_peak_total_bytes(r->plan.space), &r->best);
    QS_TRY(qs_comm_agree(r->comm, st));
    QS_TRY(qs_run_dir_finish(&r->run_dir, r->comm));
    qs_best_say(&best, &r->best, r->step);
    if (r->rank == 0 && qs_log_says(QS_LOG_INFO)) {
        qs_memory_plan_print(&r->plan, true);
    }
    compare_with_forecast(r);
    qs_log_end("%s: done: %" PRId64 " steps in %.1f s", r->cfg->output, r->step, seconds);
    return QS_OK;
}

/* ---- the whole ---- */

/* The plan, with room for the alignment of some hundred buffers and for what --dump-grads gathers.
 */
static size_t reserve_bytes(const qs_run *r)
{
    const size_t alignment = 1 << 20;
    const qs_lora_layout *layout = &r->session.on.layout;
    const size_t gradient = (size_t)(layout->n_layers * layout->per_layer) * sizeof(float);
    return r->plan.total_bytes[QS_MEM_DEVICE] + alignment +
           (r->options->dump_grads != NULL ? gradient : 0);
}

/* Tokens of a rank that pass a gathered unit, in the mean. */
static double tokens_of_pass(const qs_run *r)
{
    const qs_data *data = r->train_data;
    const double sequences = (double)(r->shape.group * r->cfg->train.micro_batch);
    return sequences * (double)data->n_tokens / (double)data->n_sequences;
}

/* --dump-grads: the first step up to the reduced gradient, nothing else. */
static qs_status first_gradient(qs_run *r)
{
    QS_TRY(qs_run_step(r, &r->last));
    if (r->rank == 0) {
        printf("loss %.17g grad_norm %.17g\n", r->last.loss, r->last.grad_norm);
    }
    return QS_OK;
}

/* Load, resume, train, finish: what needs the run directory. */
static qs_status run_training(qs_run *r)
{
    QS_TRY(qs_comm_agree(r->comm, qs_device_reserve(r->session.device, reserve_bytes(r))));
    QS_TRY(qs_session_connect(&r->session, &r->shape, true));
    QS_TRY(qs_comm_agree(r->comm,
                         qs_trainer_create(&r->trainer, &r->session, &r->shape, r->sampler.slots)));
    QS_TRY(qs_session_build(&r->session, &r->shape));
    qs_grads_attach(r->trainer.grads, r->session.fsdp);
    QS_TRY(qs_run_begin(r));
    QS_TRY(qs_trainer_gather(&r->trainer));
    if (r->options->dump_grads != NULL) {
        return first_gradient(r);
    }
    r->trainer.signals = qs_signals_caught;
    r->trainer.hurry = qs_signals_hurry;
    QS_TRY(qs_gathers_report(&r->session, &r->shape, tokens_of_pass(r)));
    QS_TRY(qs_run_dir_begin(&r->run_dir, r->cfg, r->comm));
    const int64_t done = r->step > 0 ? r->step : -1; /* a run that starts anew keeps no line */
    QS_TRY(qs_comm_agree(r->comm, qs_metrics_open(&r->metrics, r->cfg->output, done,
                                                  r->run_dir.contested, r->rank)));
    QS_TRY(qs_run_loop(r));
    return finish(r);
}

/* For one checkpoint at the least: a run that cannot keep what it computes need not begin. */
static qs_status check_room(const qs_run *r)
{
    return qs_comm_agree(r->comm,
                         r->rank == 0
                             ? qs_ckpt_expect_room(r->cfg->output, &r->session.on.layout, r->nranks)
                             : QS_OK);
}

/* What the user set out to do, before it takes hours. */
static void tell_length(const qs_run *r)
{
    const qs_data *data = r->train_data;
    const double passes = (double)r->sampler.total / (double)data->n_sequences;
    qs_log_info("%" PRId64 " steps of %" PRId64 " sequences, %.3g times the %" PRId64
                " of %s (%" PRId64 " tokens); %" PRId64 " adapter weights are trained",
                r->sampler.steps, r->sampler.global_batch, passes, data->n_sequences,
                r->cfg->data_train, data->n_tokens, qs_lora_count(&r->session.on.layout));
}

/* Of checkpoints that cannot be listed, whoever needs them says why. */
static void say_finished(const qs_run *r)
{
    int64_t *steps = NULL;
    int count = 1;
    if (r->rank == 0 && qs_manifest_scan(r->cfg->output, &steps, &count) != QS_OK) {
        qs_error_clear();
        count = 1;
    }
    free(steps);
    qs_log_end("%s: this run is finished; nothing to do%s", r->cfg->output,
               count > 0 ? ""
                         : ", and it holds no checkpoint any more: another output trains it again");
}

/* Of the output, for a dry run: what would end the run before its first step. Rank 0 only. */
static qs_status foresee_output(const qs_run *r)
{
    bool finished = false;
    QS_TRY(qs_run_dir_foresee(r->cfg, r->options->resume, &finished));
    if (finished) {
        say_finished(r);
        return QS_OK;
    }
    return qs_ckpt_expect_room(r->cfg->output, &r->session.on.layout, r->nranks);
}

static qs_status run_all(qs_run *r)
{
    QS_TRY(open_inputs(r));
    QS_TRY(check_trace(r));
    QS_TRY(qs_run_check_dumps(r));
    QS_TRY(shape_run(r));
    if (r->options->dump_order != NULL) {
        return qs_comm_agree(r->comm, r->rank == 0 ? qs_run_dump_order(r) : QS_OK);
    }
    QS_TRY(qs_session_require(&r->session, &r->plan, r->options->dry_run));
    tell_length(r);
    if (r->options->dry_run) {
        QS_TRY(qs_comm_agree(r->comm, r->rank == 0 ? foresee_output(r) : QS_OK));
        return qs_comm_agree(r->comm, qs_run_check_init(r));
    }
    if (r->options->dump_grads == NULL) {
        QS_TRY(qs_run_dir_open(&r->run_dir, r->cfg, r->options->resume, r->options->takeover,
                               r->comm));
        if (r->run_dir.finished) {
            say_finished(r);
            return QS_OK;
        }
        QS_TRY(check_room(r));
    }
    return run_training(r);
}

qs_status qs_train_run(const qs_train_options *options, qs_comm *comm)
{
    qs_run r = {.options = options,
                .comm = comm,
                .rank = qs_comm_rank(comm),
                .nranks = qs_comm_nranks(comm),
                .best = {.step = -1, .loss = NAN},
                .started_s = qs_time_s()};
    r.config = options->config;
    r.cfg = &r.config;
    qs_signals_install();
    const qs_status st = run_all(&r);
    qs_progress_end();
    qs_metrics_close(r.metrics);
    if (st != QS_OK && r.step == 0) {
        qs_run_dir_abandon(&r.run_dir); /* nothing has been done in it */
    }
    qs_run_dir_close(&r.run_dir);
    qs_comm_end_unagreed(comm, st); /* what follows waits for what peers may never send */
    qs_trainer_destroy(&r.trainer);
    qs_data_close(r.train_data);
    qs_data_close(r.eval_data);
    qs_session_close(&r.session);
    return st;
}
