/* The training run. A step is
 *
 *   for each pass:  up to G micro-batches forward, head, backward through the gathered units
 *   finish the slot trees, norm, clip, AdamW on this rank's share, gather of the new LoRA weights
 *   metrics, evaluation, checkpoint, stop signals: decided alike on all ranks
 *
 * Nothing but LoRA, the moments and the step number is state: everything else follows from the
 * seed. */
#include "train/train.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "base/mem.h"
#include "base/timer.h"
#include "base/trace.h"
#include "ckpt/ckpt.h"
#include "ckpt/run_dir.h"
#include "hf/safetensors.h"
#include "shard/shard.h"
#include "store/io.h"
#include "train/best.h"
#include "train/evaluate.h"
#include "train/forecast.h"
#include "train/gathers.h"
#include "train/metrics.h"
#include "train/plan.h"
#include "train/sampler.h"
#include "train/session.h"
#include "train/trace_file.h"
#include "train/trainer.h"

enum { WARM_UP_STEPS = 2 };  /* of a start: products choose their algorithms, files enter caches */
enum { NOT_FINITE_MAX = 3 }; /* skipped updates in a row before the run stops */

/* Everything that a run holds. */
typedef struct {
    const qs_train_options *options;
    qs_config config; /* as given, with what `auto` stands for */
    const qs_config *cfg;
    qs_comm *comm;
    int rank, nranks;
    qs_session session;
    qs_data *train_data, *eval_data;
    qs_sampler sampler;
    qs_model_shape shape;
    qs_memory_plan plan;
    qs_run_dir run_dir;
    qs_trainer trainer;
    qs_metrics *metrics;
    int64_t step; /* updates done */
    int64_t not_finite;
    int64_t tokens_seen; /* of all ranks, over all starts */
    int64_t lines_lost;  /* metrics that a full disk swallowed */
    bool unevaluated;    /* a stop signal came during an evaluation */
    double started_s;
    int64_t profiled[2]; /* first and last step of the profile, from 1; 0: none */
    qs_step_metrics last;
    qs_ckpt_eval best;  /* of steps that have a checkpoint; on rank 0 */
    int64_t steps_done; /* of this start */
    double timed_s;     /* of those behind the warm-up */
} run;

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

/* A tokenizer that was saved again has another hash, so that this is no error. */
static void compare_tokenizers(const qs_data *train, const qs_data *eval)
{
    if (train->tokenizer[0] != '\0' && eval->tokenizer[0] != '\0' &&
        strcmp(train->tokenizer, eval->tokenizer) != 0) {
        qs_log_warn("%s was made with another tokenizer.json (%.12s...) than %s (%.12s...): if it "
                    "is not the same tokenizer saved again, eval_loss means nothing; prepare both "
                    "with the model's",
                    eval->path, eval->tokenizer, train->path, train->tokenizer);
    }
}

static qs_status open_inputs(run *r)
{
    const qs_config *cfg = r->cfg;
    QS_TRY(qs_run_dir_settle(&r->config, r->comm));
    QS_TRY(qs_session_open(&r->session, cfg, r->comm));
    r->config.device = r->session.config.device; /* what auto stands for: recorded */
    r->config.cpu.gemm = r->session.config.cpu.gemm;
    const int64_t vocab = r->session.index->config.vocab;
    QS_TRY(qs_data_open(&r->train_data, cfg->data_train, vocab, cfg->train.seq_len, r->comm));
    if (cfg->data_eval[0] != '\0') {
        QS_TRY(qs_data_open(&r->eval_data, cfg->data_eval, vocab, 0, r->comm));
        QS_TRY(qs_data_check_hashes(r->eval_data, r->comm));
        compare_tokenizers(r->train_data, r->eval_data);
    }
    QS_TRY(qs_data_check_hashes(r->train_data, r->comm));
    QS_TRY(qs_comm_agree(r->comm, check_targets(r->train_data)));
    return qs_comm_agree(r->comm,
                         qs_lora_layout_make(&r->session.layout, &r->session.index->config, cfg));
}

#define GRADIENTS "gradients" /* what tells files of --dump-grads */

static qs_status check_dumps(const run *r)
{
    const char *grads = r->options->dump_grads, *order = r->options->dump_order;
    qs_status st = QS_OK;
    if (grads != NULL && r->rank == 0) {
        st = qs_io_try_file(grads, QS_ST_MARK(GRADIENTS));
    }
    if (order != NULL && r->rank == 0 && st == QS_OK) {
        st = qs_io_try_file(order, NULL);
    }
    return qs_comm_agree(r->comm, st);
}

/* A GPU's work is not the host's to time. */
static qs_status check_trace(const run *r)
{
    if (r->options->trace == NULL || r->options->dry_run) {
        return QS_OK;
    }
    if (!r->session.apart) {
        return qs_trace_file_check(r->options->trace, r->comm);
    }
    return qs_comm_agree(
        r->comm, QS_FAIL(QS_ERR_CONFIG_PAIR,
                         "--trace: the run is on a GPU, whose time the host does not see; run it "
                         "under nsys profile --capture-range=cudaProfilerApi with --profile-steps "
                         "instead"));
}

static qs_status shape_run(run *r)
{
    qs_plan_choice choice;
    r->sampler = qs_sampler_make(r->cfg, r->train_data);
    const qs_plan_job job = qs_plan_training(r->train_data, r->eval_data, r->sampler.slots);
    r->shape = qs_plan_shape(&r->session, &job);
    QS_TRY(qs_plan_settle(&choice, &r->session, &job, &r->shape));
    r->plan = qs_memory_plan_make(&r->session, &job, &r->shape);
    return QS_OK;
}

/* This rank's share of a PEFT directory, which rank 0 reads layer by layer. */
static qs_status init_from_adapter(run *r)
{
    qs_status st = QS_OK;
    const qs_lora_layout *layout = &r->session.layout;
    const int64_t width = qs_lora_shard_width(layout, r->nranks);
    const qs_range mine = qs_lora_shard(layout, r->rank, r->nranks);
    const size_t bytes = (size_t)layout->per_layer * sizeof(float);
    qs_peft *peft = NULL;
    float *segment = NULL;
    st = QS_ALLOC(&segment, layout->per_layer, QS_MEM_WORK);
    if (st == QS_OK && r->rank == 0) {
        st = qs_peft_open(&peft, r->cfg->lora.init, layout);
    }
    QS_GOTO(qs_comm_agree(r->comm, st));
    for (int l = 0; l < layout->n_layers; l++) {
        st = r->rank == 0 ? qs_peft_read_layer(peft, l, segment) : QS_OK;
        QS_GOTO(qs_comm_agree(r->comm, st));
        QS_GOTO(qs_comm_bcast(r->comm, segment, bytes, 0));
        memcpy(r->trainer.optim->master + l * width, segment + mine.begin,
               (size_t)(mine.end - mine.begin) * sizeof(float));
    }
done:
    qs_peft_close(peft);
    qs_mem_free(segment);
    return st;
}

/* Fresh LoRA weights, or those of a PEFT directory. Collective. */
static qs_status init_lora(run *r)
{
    return r->cfg->lora.init[0] != '\0'
               ? init_from_adapter(r)
               : qs_trainer_start_anew(&r->trainer, (uint64_t)r->cfg->seed);
}

/* --dry-run: an adapter to start from is opened and checked, not read. */
static qs_status check_init(const run *r)
{
    qs_peft *peft = NULL;
    if (r->cfg->lora.init[0] == '\0' || r->rank != 0) {
        return QS_OK;
    }
    const qs_status st = qs_peft_open(&peft, r->cfg->lora.init, &r->session.layout);
    qs_peft_close(peft);
    return st;
}

static qs_ckpt_meta meta_of(const run *r, const char *config_yaml)
{
    qs_ckpt_meta meta = {.step = r->step,
                         .config_yaml = config_yaml,
                         .tokens_seen = r->tokens_seen,
                         .chat_template = r->train_data->chat_template,
                         .seen = &r->run_dir.seen};
    snprintf(meta.run_id, sizeof meta.run_id, "%s", r->run_dir.run_id);
    snprintf(meta.base_sha256, sizeof meta.base_sha256, "%s", r->session.index->hashes_sha256);
    snprintf(meta.device, sizeof meta.device, "%s", qs_device_description(r->session.device));
    snprintf(meta.data_content, sizeof meta.data_content, "%s", r->train_data->content);
    snprintf(meta.data_layout, sizeof meta.data_layout, "%s", r->train_data->layout);
    return meta;
}

/* Continue from the newest checkpoint that verifies, if there is one and the user wants it. */
static qs_status resume_or_init(run *r)
{
    qs_status st = QS_OK;
    int64_t step = -1;
    char *yaml = NULL;
    if (r->options->resume != QS_RESUME_NEVER && r->options->dump_grads == NULL) {
        QS_TRY(qs_ckpt_latest(r->cfg->output, &step, r->comm));
    }
    if (step < 0 && r->options->resume == QS_RESUME_MUST) {
        return qs_comm_agree(r->comm,
                             QS_FAIL(QS_ERR_CHECKPOINT,
                                     "%s: no checkpoint that verifies, and --resume must was "
                                     "given; use --resume auto to start anew",
                                     r->cfg->output));
    }
    if (step < 0) {
        QS_TRY(init_lora(r));
        return qs_optim_push(r->trainer.optim, r->session.queue);
    }
    yaml = qs_config_dump(r->cfg);
    const qs_ckpt_meta expect = meta_of(r, yaml);
    qs_ckpt_meta loaded;
    QS_GOTO(qs_ckpt_load(r->cfg->output, step, &expect, &r->session.layout, r->trainer.optim,
                         &loaded, r->comm));
    QS_GOTO(qs_optim_push(r->trainer.optim, r->session.queue));
    r->step = loaded.step;
    r->tokens_seen = loaded.tokens_seen;
    qs_log_info("%s: resuming after step %" PRId64, r->cfg->output, r->step);
    if (loaded.device[0] != '\0' && strcmp(loaded.device, expect.device) != 0) {
        qs_log_warn(
            "%s: the checkpoint was computed by: %s; now: %s. The run goes on, but not with "
            "the bits of an undisturbed one",
            r->cfg->output, loaded.device, expect.device);
    }
done:
    free(yaml);
    return st;
}

/* ---- one step ---- */

/* qs_slot_load: from the token file, in the order of the sampler. */
static qs_status load_slot(void *ctx, int64_t step, int64_t slot, qs_batch *batch)
{
    const run *r = ctx;
    int64_t sequence[QS_MICRO_BATCH_MAX], number[QS_MICRO_BATCH_MAX];
    const int64_t count = qs_sampler_slot(&r->sampler, step, slot, sequence, number);
    return qs_data_read(r->train_data, sequence, number, count, batch);
}

/* Write the reduced gradient under PEFT names (--dump-grads). */
static qs_status dump_grads(run *r, const float *shard)
{
    qs_status st = QS_OK;
    const qs_session *s = &r->session;
    const qs_lora_layout *layout = &s->layout;
    qs_mirror full = {0};
    QS_GOTO(qs_comm_agree(
        r->comm, qs_mirror_create(s->device, &full,
                                  (size_t)(layout->n_layers * layout->per_layer) * sizeof(float),
                                  QS_MEM_WORK)));
    QS_GOTO(qs_lora_gather(layout, &s->levels.levels, s->queue, shard, full.device));
    QS_GOTO(qs_mirror_pull(s->queue, &full, 0, full.bytes));
    QS_GOTO(qs_queue_wait(s->queue));
    if (r->rank == 0) {
        st = qs_peft_write_tensors(r->options->dump_grads, layout, full.host, GRADIENTS);
    }
    st = qs_comm_agree(r->comm, st);
done:
    qs_mirror_destroy(s->device, &full);
    return st;
}

/* The update, unless the gradient is not finite: then the step is skipped on all ranks alike. */
static qs_status apply_update(run *r, const float *shard, const qs_step_metrics *m)
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
    return qs_optim_step(r->trainer.optim, r->session.ops, r->session.queue, r->cfg, m->lr,
                         qs_clip_scale(r->cfg->optim.clip, m->grad_norm), shard);
}

static int64_t step_tokens(const run *r)
{
    int64_t tokens = 0;
    for (int64_t i = 0; i < qs_sampler_step_size(&r->sampler, r->step); i++) {
        int64_t number = 0;
        const int64_t s = qs_sampler_sequence(&r->sampler, r->step, i, &number);
        tokens += r->train_data->seq_offsets[s + 1] - r->train_data->seq_offsets[s];
    }
    return tokens;
}

static bool due(int64_t step, int64_t every)
{
    return every > 0 && step % every == 0;
}

/* Is there an evaluation behind the update that makes `step` of them? */
static bool eval_due(const run *r, int64_t step)
{
    return r->eval_data != NULL && step > 0 &&
           (due(step, r->cfg->train.eval_every) || step == r->sampler.steps);
}

/* Does the model go on with another step, as far as one knows? */
static bool another_follows(const run *r)
{
    const int64_t done = r->step + 1;
    return r->options->dump_grads == NULL && done < r->sampler.steps && !eval_due(r, done);
}

/* A rank without a sequence of the step does not learn from its own how long others' take. */
static bool has_work(const run *r)
{
    const qs_range slots = qs_slots_of(r->sampler.slots, r->rank, r->nranks);
    return slots.begin < slots.end &&
           slots.begin * r->sampler.micro_batch < qs_sampler_step_size(&r->sampler, r->step);
}

static qs_status train_step(run *r, qs_step_metrics *m)
{
    const double start = qs_time_s();
    const qs_fsdp_stats before = qs_fsdp_get_stats(r->session.fsdp);
    const double reduced = qs_grads_wait_s(r->trainer.grads);
    double loss_sum = 0;
    float *shard = NULL;
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
    const double reduce_start = qs_time_s();
    m->reduce_s = qs_grads_wait_s(r->trainer.grads) - reduced; /* between layers */
    qs_range_begin(r->session.queue, "sums");
    QS_TRY(qs_trainer_sums(&r->trainer, &shard, &m->grad_norm, &loss_sum));
    m->loss = m->tokens > 0 ? loss_sum / (double)m->tokens : 0;
    m->reduce_s += qs_time_s() - reduce_start;
    qs_range_end(r->session.queue);
    if (r->options->dump_grads != NULL) {
        return dump_grads(r, shard);
    }
    qs_range_begin(r->session.queue, "update");
    QS_TRY(qs_comm_agree(r->comm, apply_update(r, shard, m)));
    QS_TRY(qs_trainer_gather(&r->trainer));
    qs_range_end(r->session.queue);
    m->step_time_s = qs_time_s() - start;
    const qs_fsdp_stats after = qs_fsdp_get_stats(r->session.fsdp);
    m->gather_s = r->session.apart ? -1 : after.gather_s - before.gather_s;
    m->wait_s = after.wait_s - before.wait_s;
    m->compute_s = m->step_time_s - m->wait_s - m->reduce_s;
    m->peak_bytes = qs_mem_peak_total_bytes(r->plan.space);
    return QS_OK;
}

/* ---- between steps ---- */

/* A warning is all that comes of an error: a later one is a new one. */
static qs_status settle(run *r)
{
    qs_error_clear();
    return qs_comm_agree(r->comm, QS_OK);
}

/* A full disk does not end a run: the line is lost, and the end of the run says so. */
static qs_status keep_going(run *r, qs_status st)
{
    st = qs_comm_agree(r->comm, st);
    if (st != QS_ERR_IO_FULL) {
        return st;
    }
    if (r->lines_lost++ == 0) {
        qs_log_warn("step %" PRId64 ": %s; the run goes on without the line", r->step,
                    qs_error_text());
    }
    return settle(r);
}

/* A signal anywhere is everyone's. */
static qs_status signal_caught(void *ctx, bool *stop)
{
    const run *r = ctx;
    int64_t flag = qs_signals_caught() > 0;
    QS_TRY(qs_comm_max_i64(r->comm, &flag, 1));
    *stop = flag != 0;
    return QS_OK;
}

/* A stop signal ends it, and the next start makes up for it; `max_time` alone does not, or a run
 * that is started again and again by it would never see the end of a long one. */
static qs_status evaluate(run *r, bool *stop)
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

static qs_status report_ranks(run *r)
{
    const qs_fsdp_stats stats = qs_fsdp_get_stats(r->session.fsdp);
    uint64_t received = 0, foreign = 0;
    qs_session_traffic(&r->session, &received, &foreign);
    const qs_rank_metrics mine = {
        .tokens = r->trainer.tokens,
        .targets = r->trainer.targets,
        .gather_group = r->shape.group,
        .shard_group = r->session.shard.nranks,
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
    return keep_going(r, qs_metrics_ranks(r->metrics, r->step, &mine, r->comm));
}

static qs_best_of best_of(const run *r)
{
    return (qs_best_of){
        .config = r->cfg, .dir = &r->run_dir, .metrics = r->metrics, .comm = r->comm};
}

/* Save and rotate. A full disk keeps the older checkpoints and the run goes on; it counts at the
 * end. */
static qs_status save(run *r, qs_status *last_save)
{
    qs_watch_section(true, "saving step %" PRId64, r->step);
    *last_save = qs_data_check_unchanged(r->train_data, r->comm);
    QS_TRY(*last_save);
    *last_save = qs_run_dir_still_ours(&r->run_dir, r->comm);
    QS_TRY(*last_save);
    char *yaml = qs_config_dump(r->cfg);
    qs_ckpt_meta meta = meta_of(r, yaml);
    r->trainer.optim->step = r->step;
    *last_save = qs_comm_agree(r->comm, qs_optim_pull(r->trainer.optim, r->session.queue));
    if (*last_save != QS_OK) {
        free(yaml);
        return *last_save;
    }
    *last_save = qs_ckpt_save(r->cfg->output, &meta, &r->session.layout, r->trainer.optim, r->comm);
    free(yaml);
    if (*last_save == QS_ERR_IO_FULL) {
        qs_log_warn("step %" PRId64 ": not saved: %s", r->step, qs_error_text());
        return settle(r);
    }
    QS_TRY(*last_save);
    qs_log_info("%s: saved step %" PRId64, r->cfg->output, r->step);
    const qs_best_of best = best_of(r);
    return qs_best_rotate(&best);
}

/* A signal anywhere, or rank 0's clock past max_time. */
static qs_status stop_wanted(run *r, bool *stop)
{
    const bool late = r->rank == 0 && r->cfg->train.max_time > 0 &&
                      qs_time_s() - r->started_s >= r->cfg->train.max_time;
    int64_t flag = qs_signals_caught() > 0 || late;
    QS_TRY(qs_comm_max_i64(r->comm, &flag, 1));
    *stop = flag != 0;
    return QS_OK;
}

static void show(const run *r, const qs_step_metrics *m)
{
    char text[160];
    snprintf(text, sizeof text, "loss %.4f  lr %.3g  norm %.3f  %.0f tokens/s", m->loss, m->lr,
             m->grad_norm, m->step_time_s > 0 ? (double)m->all_tokens / m->step_time_s : 0);
    if (due(m->step, r->cfg->train.log_every) || m->step == r->sampler.steps) {
        qs_progress("train", m->step, r->sampler.steps, text);
    }
}

/* A run that was stopped between a checkpoint and its evaluation makes up for it. */
static qs_status missed_evaluation(run *r, bool *stop)
{
    int64_t last = qs_metrics_last_eval(r->metrics);
    QS_TRY(qs_comm_bcast(r->comm, &last, sizeof last, 0));
    return eval_due(r, r->step) && last < r->step ? evaluate(r, stop) : QS_OK;
}

/* With --trace alone: two steps of this start, behind its warm-up if there are so many. */
static void choose_profile(run *r)
{
    memcpy(r->profiled, r->options->profile_steps, sizeof r->profiled);
    if (r->options->trace != NULL && r->profiled[0] == 0) {
        const int64_t left = r->sampler.steps - r->step;
        const int64_t skipped = left > WARM_UP_STEPS ? WARM_UP_STEPS : 0;
        r->profiled[0] = r->step + skipped + 1;
        r->profiled[1] = r->profiled[0] + 1;
    }
}

static qs_status start_profile(run *r)
{
    qs_device_profile(r->session.device, true);
    return r->options->trace != NULL ? qs_trace_file_start(r->comm) : QS_OK;
}

/* A trace that finds no room is not worth a run's steps. */
static qs_status end_profile(run *r)
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

static qs_status save_here(run *r, qs_status *last_save, int64_t *saved)
{
    QS_TRY(save(r, last_save));
    *saved = *last_save == QS_OK ? r->step : *saved;
    return report_ranks(r);
}

/* One step with everything that follows it. A stop signal saves first and leaves the evaluation to
 * the next start. */
static qs_status step_and_after(run *r, qs_status *last_save, int64_t *saved, bool *stop)
{
    const int64_t *profiled = r->profiled;
    if (r->step + 1 == profiled[0]) {
        QS_TRY(start_profile(r));
    }
    qs_range_begin(r->session.queue, "step %" PRId64, r->step + 1);
    QS_TRY(train_step(r, &r->last));
    qs_range_end(r->session.queue);
    r->step++;
    r->timed_s += ++r->steps_done > WARM_UP_STEPS ? r->last.step_time_s : 0;
    if (r->step == profiled[1]) {
        QS_TRY(end_profile(r));
    }
    r->tokens_seen += r->last.all_tokens;
    QS_TRY(keep_going(r, qs_metrics_step(r->metrics, &r->last)));
    show(r, &r->last);
    QS_TRY(stop_wanted(r, stop));
    const bool ends = r->step == r->sampler.steps;
    if (*stop || ends || due(r->step, r->cfg->train.save_every)) {
        QS_TRY(save_here(r, last_save, saved));
    }
    if (eval_due(r, r->step) && (!*stop || ends)) {
        QS_TRY(evaluate(r, stop));
        const qs_best_of best = best_of(r);
        QS_TRY(qs_best_find(&best, false, &r->best));
    }
    return r->unevaluated && *saved < r->step ? save_here(r, last_save, saved) : QS_OK;
}

/* `saved`: the newest step of which there is a checkpoint, 0: none. */
static qs_status not_saved(const run *r, qs_status st, int64_t saved)
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

static qs_status step_loop(run *r)
{
    qs_status last_save = QS_OK;
    bool stop = false;
    int64_t saved = r->step;
    choose_profile(r);
    QS_TRY(missed_evaluation(r, &stop));
    qs_watch_section(true, "looking for the best checkpoint");
    const qs_best_of best = best_of(r);
    QS_TRY(qs_best_find(&best, true, &r->best));
    while (r->step < r->sampler.steps && !stop) {
        QS_TRY(step_and_after(r, &last_save, &saved, &stop));
    }
    if (qs_trace_on()) { /* the run was shorter */
        QS_TRY(end_profile(r));
    }
    qs_progress_end();
    if (last_save != QS_OK) {
        return qs_comm_agree(r->comm, not_saved(r, last_save, saved));
    }
    if (r->lines_lost > 0) {
        return qs_comm_agree(r->comm,
                             QS_FAIL(QS_ERR_IO_FULL,
                                     "%s: %" PRId64 " lines of metrics are lost: disk full; the "
                                     "checkpoints are complete",
                                     r->cfg->output, r->lines_lost));
    }
    return qs_comm_agree(
        r->comm, stop && (r->unevaluated || r->step < r->sampler.steps) ? QS_REQUEUE : QS_OK);
}

/* --dump-grads: the first step up to the reduced gradient, nothing else. */
static qs_status first_gradient(run *r)
{
    QS_TRY(train_step(r, &r->last));
    if (r->rank == 0) {
        printf("loss %.17g grad_norm %.17g\n", r->last.loss, r->last.grad_norm);
    }
    return QS_OK;
}

/* ---- the whole ---- */

/* One line a step: the sequences that it trains on, for comparing with other programs. */
static qs_status dump_order(const run *r)
{
    char *text = NULL;
    size_t bytes = 0;
    FILE *out = open_memstream(&text, &bytes);
    for (int64_t step = 0; out != NULL && step < r->sampler.steps; step++) {
        for (int64_t i = 0; i < qs_sampler_step_size(&r->sampler, step); i++) {
            int64_t number = 0;
            fprintf(out, "%s%" PRId64, i > 0 ? " " : "",
                    qs_sampler_sequence(&r->sampler, step, i, &number));
        }
        fputc('\n', out);
    }
    qs_status st = out != NULL && fclose(out) == 0
                       ? qs_io_write_file(r->options->dump_order, text, bytes)
                       : QS_FAIL(QS_ERR_MEMORY, "%s: no memory", r->options->dump_order);
    free(text);
    return st;
}

/* What `qshard plan` would have said of this run, beside what it did: on cards that the table
 * knows, each with one rank. */
static void compare_with_forecast(const run *r)
{
    const qs_gpu_kind *kind = qs_gpu_kind_of(qs_device_description(r->session.device));
    const int64_t timed = r->steps_done - WARM_UP_STEPS;
    if (kind == NULL || timed < 1 || r->cfg->allow_shared_device) {
        return;
    }
    const qs_links links = qs_links_usual(kind, qs_comm_local_nranks(r->comm));
    qs_step_work work;
    if (qs_step_work_make(&work, &r->session, r->train_data, &r->shape, r->sampler.slots) !=
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

static qs_status finish(run *r)
{
    const double seconds = qs_time_s() - r->started_s;
    const qs_best_of best = best_of(r);
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

/* The plan, with room for the alignment of some hundred buffers and for what --dump-grads gathers.
 */
static size_t reserve_bytes(const run *r)
{
    const size_t alignment = 1 << 20;
    const qs_lora_layout *layout = &r->session.layout;
    const size_t gradient = (size_t)(layout->n_layers * layout->per_layer) * sizeof(float);
    return r->plan.total_bytes[QS_MEM_DEVICE] + alignment +
           (r->options->dump_grads != NULL ? gradient : 0);
}

/* Tokens of a rank that pass a gathered unit, in the mean. */
static double tokens_of_pass(const run *r)
{
    const qs_data *data = r->train_data;
    const double sequences = (double)(r->shape.group * r->cfg->train.micro_batch);
    return sequences * (double)data->n_tokens / (double)data->n_sequences;
}

/* Load, resume, train, finish: what needs the run directory. */
static qs_status run_training(run *r)
{
    QS_TRY(qs_comm_agree(r->comm, qs_device_reserve(r->session.device, reserve_bytes(r))));
    QS_TRY(qs_session_connect(&r->session, &r->shape, true));
    QS_TRY(qs_comm_agree(r->comm,
                         qs_trainer_create(&r->trainer, &r->session, &r->shape, r->sampler.slots)));
    QS_TRY(qs_session_build(&r->session, &r->shape));
    qs_grads_attach(r->trainer.grads, r->session.fsdp);
    QS_TRY(resume_or_init(r));
    QS_TRY(qs_trainer_gather(&r->trainer));
    if (r->options->dump_grads != NULL) {
        return first_gradient(r);
    }
    QS_TRY(qs_gathers_report(&r->session, &r->shape, tokens_of_pass(r)));
    QS_TRY(qs_comm_agree(r->comm, qs_metrics_open(&r->metrics, r->cfg->output, r->step, r->rank)));
    QS_TRY(step_loop(r));
    return finish(r);
}

static qs_status run_all(run *r)
{
    QS_TRY(open_inputs(r));
    QS_TRY(check_trace(r));
    QS_TRY(check_dumps(r));
    QS_TRY(shape_run(r));
    if (r->options->dump_order != NULL) {
        return qs_comm_agree(r->comm, r->rank == 0 ? dump_order(r) : QS_OK);
    }
    QS_TRY(qs_memory_plan_require(&r->plan, &r->session, r->options->dry_run));
    if (r->options->dry_run) {
        return qs_comm_agree(r->comm, check_init(r));
    }
    if (r->options->dump_grads == NULL) {
        QS_TRY(qs_run_dir_open(&r->run_dir, r->cfg, r->options->resume, r->options->takeover,
                               r->comm));
        if (r->run_dir.finished) {
            qs_log_end("%s: this run is finished; nothing to do", r->cfg->output);
            return QS_OK;
        }
    }
    return run_training(r);
}

qs_status qs_train_run(const qs_train_options *options, qs_comm *comm)
{
    run r = {.options = options,
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
    qs_trainer_destroy(&r.trainer);
    if (st != QS_OK && r.step == 0) {
        qs_run_dir_abandon(&r.run_dir); /* nothing has been done in it */
    }
    qs_run_dir_close(&r.run_dir);
    qs_data_close(r.train_data);
    qs_data_close(r.eval_data);
    qs_session_close(&r.session);
    return st;
}
