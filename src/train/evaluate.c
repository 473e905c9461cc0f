#include "train/evaluate.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/log.h"
#include "base/mem.h"
#include "hf/safetensors.h"
#include "store/input.h"
#include "store/io.h"
#include "train/session_plan.h"
#include "train/tokenizers.h"
#include "train/train.h"

typedef struct {
    qs_data *data;
    int64_t micro_batch;
} file_order;

/* qs_slot_load: sequences [slot * micro_batch, ...) of the file, in file order. */
static qs_status load_slot(void *ctx, int64_t step, int64_t slot, qs_batch *batch)
{
    (void)step;
    const file_order *o = ctx;
    int64_t sequence[QS_MICRO_BATCH_MAX];
    int64_t count = 0;
    for (int64_t i = slot * o->micro_batch; count < o->micro_batch && i < o->data->n_sequences;
         i++) {
        sequence[count++] = i;
    }
    return qs_data_read(o->data, sequence, sequence, count, batch);
}

/* The pass at hand is finished in any case: others may be sending rows for it. If it is the last
 * one, nothing has been given up. */
static qs_status eval_passes(qs_session *s, qs_feed *feed, qs_feed_source *source,
                             qs_eval_stop stop, void *ctx, double *sums)
{
    qs_micro_batch *micro;
    bool last = false;
    int64_t first = 0;
    for (; !last; first += feed->group) {
        if (stop != NULL) {
            QS_TRY(stop(ctx, &source->ends));
        }
        QS_TRY(qs_feed_turn(feed, source, 0, first, false, &micro, &last));
        QS_TRY(qs_model_eval_pass(s->model, micro, qs_feed_ahead(feed), feed->group));
        qs_feed_keep_losses(feed, source, sums);
    }
    source->ends = first < qs_shard_width(source->slots, qs_comm_nranks(source->comm));
    return QS_OK;
}

qs_status qs_evaluate(qs_session *s, qs_data *data, int64_t micro_batch, qs_feed *feed,
                      qs_eval_stop stop, void *ctx, qs_eval_result *out)
{
    qs_status st = QS_OK;
    const int64_t slots = (data->n_sequences + micro_batch - 1) / micro_batch;
    file_order order = {.data = data, .micro_batch = micro_batch};
    qs_feed_source source = qs_feed_source_make(s->comm, slots, load_slot, &order);
    double *sums = NULL, *work = NULL, total = 0;
    qs_watch_section(source.mine.begin == source.mine.end, "evaluation");
    st = QS_ALLOC(&sums, source.mine.end - source.mine.begin, QS_MEM_WORK);
    st = st == QS_OK ? QS_ALLOC(&work, qs_slot_sums_work(slots, s->on.nranks), QS_MEM_WORK) : st;
    QS_GOTO(qs_comm_agree(s->comm, st));
    QS_GOTO(eval_passes(s, feed, &source, stop, ctx, sums));
    *out = (qs_eval_result){.stopped = source.ends};
    if (source.ends) {
        goto done;
    }
    QS_GOTO(qs_sum_slots(s->comm, slots, sums, work, &total));
    *out = (qs_eval_result){.loss = data->n_targets > 0 ? total / (double)data->n_targets : 0,
                            .targets = data->n_targets,
                            .sequences = data->n_sequences};
done:
    qs_mem_free(sums);
    qs_mem_free(work);
    return st;
}

/* Logits of every token of the first sequence, by rank 0 into a safetensors file; the others join
 * the gathers. */
#define LOGITS "logits" /* what tells files of --dump-logits */

static qs_status dump_logits(qs_session *s, qs_data *data, qs_batch *batch, const char *path)
{
    qs_status st = QS_OK;
    const int64_t first = 0, vocab = s->on.index->config.vocab;
    const bool mine = qs_comm_rank(s->comm) == 0;
    float *logits = NULL;
    QS_GOTO(qs_comm_agree(s->comm, qs_data_read(data, &first, &first, mine ? 1 : 0, batch)));
    QS_GOTO(qs_comm_agree(s->comm, QS_ALLOC(&logits, batch->n_tokens * vocab, QS_MEM_WORK)));
    QS_GOTO(qs_model_logits(s->model, batch, true, logits));
    if (mine) {
        const qs_st_item item = {.name = "logits",
                                 .dtype = QS_F32,
                                 .rank = 2,
                                 .shape = {batch->n_tokens, vocab},
                                 .data = logits};
        st = qs_st_write(path, &item, 1, LOGITS);
    }
    st = qs_comm_agree(s->comm, st);
done:
    qs_mem_free(logits);
    return st;
}

/* The largest micro-batch decides the room. */
static qs_model_shape shape_of(const qs_session *s, const qs_eval_options *options,
                               const qs_plan_job *job)
{
    const int64_t micro_batch = options->config.train.micro_batch;
    const int64_t tokens = qs_data_longest(job->eval, micro_batch);
    const bool all = options->dump_logits != NULL;
    return (qs_model_shape){.max_tokens = tokens,
                            .max_targets =
                                all ? tokens : qs_data_most_targets(job->eval, micro_batch),
                            .seq_len = options->config.train.seq_len,
                            .group = qs_setting_gather_group(&s->on, job->slots),
                            .logit_rows = all ? tokens : 0,
                            .residual_f32 = options->config.train.residual_fp32,
                            .head_chunk_rows = s->on.index->head_chunk_rows};
}

/* Sums of losses, this rank's and everybody's, and the first sequence's logits. */
static size_t result_bytes(const qs_session *s, const qs_eval_options *options, const qs_data *data,
                           int64_t slots)
{
    const int64_t logits =
        options->dump_logits != NULL ? qs_data_longest(data, 1) * s->on.index->config.vocab : 0;
    return (size_t)(3 * slots) * sizeof(double) + (size_t)logits * sizeof(float);
}

static qs_status eval_with(qs_session *s, const qs_eval_options *options, qs_data *data)
{
    qs_status st = QS_OK;
    const int64_t micro_batch = options->config.train.micro_batch;
    const int64_t slots = (data->n_sequences + micro_batch - 1) / micro_batch;
    const qs_plan_job job = {.eval = data,
                             .slots = slots,
                             .result_bytes = result_bytes(s, options, data, slots),
                             .settings =
                                 "lower train.micro_batch, train.gather_group, "
                                 "memory.keep_decoded, shard.keep_resident or shard.prefetch"};
    qs_model_shape shape = shape_of(s, options, &job);
    qs_memory_plan plan;
    qs_feed feed = {0};
    qs_eval_result result;
    QS_GOTO(qs_session_plan(s, &job, &shape, &plan));
    QS_GOTO(qs_session_connect(s, &shape, false));
    QS_GOTO(qs_session_build(s, &shape));
    QS_GOTO(qs_comm_agree(s->comm, qs_feed_create(&feed, shape.group, shape.max_tokens)));
    if (options->dump_logits != NULL) {
        QS_GOTO(dump_logits(s, data, feed.batches[0], options->dump_logits));
    }
    QS_GOTO(qs_evaluate(s, data, micro_batch, &feed, NULL, NULL, &result));
    qs_memory_plan_compare(&plan);
    if (qs_comm_rank(s->comm) == 0) {
        printf("eval_loss %.17g perplexity %.6g targets %lld sequences %lld\n", result.loss,
               exp(result.loss), (long long)result.targets, (long long)result.sequences);
        fflush(stdout);
    }
done:
    qs_feed_destroy(&feed);
    return st;
}

qs_status qs_eval_run(const qs_eval_options *options, qs_comm *comm)
{
    qs_status st = QS_OK;
    qs_session s = {0};
    qs_data *data = NULL;
    if (options->dump_logits != NULL && qs_comm_rank(comm) == 0) {
        st = qs_io_try_file(options->dump_logits, QS_ST_MARK(LOGITS));
    }
    QS_GOTO(qs_comm_agree(comm, st));
    QS_GOTO(qs_session_open(&s, &options->config, comm));
    QS_GOTO(qs_session_load_adapter(&s, options->adapter));
    QS_GOTO(qs_input_expect("data.eval", options->config.data_eval, QS_INPUT_DATA, comm));
    QS_GOTO(qs_data_open(&data, options->config.data_eval, s.on.index->config.vocab, 0, comm));
    QS_GOTO(qs_data_check_hashes(data, comm));
    qs_tokenizers_compare(s.on.index, (const qs_data *[]){data}, 1);
    if (data->n_targets == 0) {
        st = qs_comm_agree(comm, QS_FAIL(QS_ERR_INPUT_VALUE,
                                         "%s: n_targets=0: no position carries loss, there is "
                                         "nothing to evaluate",
                                         data->path));
        goto done;
    }
    QS_GOTO(eval_with(&s, options, data));
done:
    qs_comm_end_unagreed(comm, st); /* what follows waits for what peers may never send */
    qs_data_close(data);
    qs_session_close(&s);
    return st;
}
