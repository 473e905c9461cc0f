/* The commands that all ranks run together: quantize, train, eval, sample. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/backend.h"
#include "base/log.h"
#include "ckpt/adapter_dir.h"
#include "cli/cli_impl.h"
#include "train/train.h"
#include "weights/quantize.h"

#define MIB (1024.0 * 1024.0)

/* Rank 0 reads the file and tells the others, which may not see it; each parses the same text. */
qs_status qs_cli_load_config(const qs_cli_args *args, const char *path, qs_config *cfg,
                             qs_comm *comm)
{
    char *text = NULL;
    size_t bytes = 0;
    qs_status st = QS_OK;
    if (qs_comm_rank(comm) == 0) {
        st = qs_config_read(path, &text, &bytes);
    }
    QS_GOTO(qs_comm_agree(comm, st));
    QS_GOTO(qs_comm_bcast_text(comm, &text, 0));
    st = qs_comm_agree(comm,
                       qs_config_parse(cfg, text, strlen(text), path, args->sets, args->n_sets));
    cfg->allow_shared_device = args->shared_device;
done:
    free(text);
    return st;
}

static qs_status load_config(const qs_cli_args *args, qs_config_need need, qs_comm *comm,
                             qs_config *cfg)
{
    QS_TRY(qs_cli_load_config(args, args->words[0], cfg, comm));
    return qs_comm_agree(comm, qs_config_require(cfg, need, args->words[0]));
}

qs_status qs_cli_train(const qs_cli_args *args, qs_comm *comm)
{
    qs_train_options options = {.resume = args->resume,
                                .takeover = args->takeover,
                                .dry_run = args->dry_run,
                                .dump_grads = args->dump_grads,
                                .dump_order = args->dump_order,
                                .trace = args->trace,
                                .profile_steps = {args->profile_steps[0], args->profile_steps[1]}};
    QS_TRY(load_config(args, QS_NEED_TRAIN, comm, &options.config));
    return qs_train_run(&options, comm);
}

/* Of --adapter, with --best, the checkpoint that rank 0 finds: all ranks are told its name. */
static qs_status choose_adapter(const qs_cli_args *args, qs_comm *comm, qs_adapter_dir *best,
                                const char **adapter)
{
    *adapter = args->adapter;
    if (!args->best) {
        return QS_OK;
    }
    if (args->adapter == NULL) {
        return qs_comm_agree(comm, QS_FAIL(QS_ERR_USAGE, "--best chooses a checkpoint of the run "
                                                         "that --adapter names; there is none"));
    }
    memset(best, 0, sizeof *best);
    QS_TRY(qs_comm_agree(comm, qs_comm_rank(comm) == 0 ? qs_adapter_find(best, args->adapter, true)
                                                       : QS_OK));
    *adapter = best->dir;
    return qs_comm_bcast(comm, best, sizeof *best, 0);
}

qs_status qs_cli_eval(const qs_cli_args *args, qs_comm *comm)
{
    qs_adapter_dir best;
    qs_eval_options options = {.dump_logits = args->dump_logits};
    QS_TRY(choose_adapter(args, comm, &best, &options.adapter));
    QS_TRY(load_config(args, QS_NEED_EVAL, comm, &options.config));
    return qs_eval_run(&options, comm);
}

qs_status qs_cli_sample(const qs_cli_args *args, qs_comm *comm)
{
    qs_adapter_dir best;
    qs_sample_options options = {.prompts = args->prompts, .tokens = args->tokens};
    if (!args->prompts || args->tokens == 0) {
        return qs_comm_agree(comm, QS_FAIL(QS_ERR_USAGE,
                                           "sample needs --prompts FILE and --tokens N; see "
                                           "qshard sample --help"));
    }
    QS_TRY(choose_adapter(args, comm, &best, &options.adapter));
    QS_TRY(load_config(args, QS_NEED_SAMPLE, comm, &options.config));
    return qs_sample_run(&options, comm);
}

/* On the device that the command line names. */
static qs_status quantize_on_device(const qs_cli_args *args, qs_quantize_options *options,
                                    qs_comm *comm, qs_quantize_report *report)
{
    qs_status st = QS_OK;
    qs_backend backend;
    QS_GOTO(
        qs_comm_agree(comm, qs_backend_open(&backend, args->device, comm, args->shared_device)));
    if (!qs_device_is_host(backend.device)) {
        qs_log_info("%s: %s", qs_device_name(backend.device),
                    qs_device_description(backend.device));
    }
    options->backend = &backend;
    st = qs_quantize(options, comm, report);
done:
    qs_backend_close(&backend);
    return st;
}

qs_status qs_cli_quantize(const qs_cli_args *args, qs_comm *comm)
{
    qs_quantize_options options = {.hf_dir = args->words[0],
                                   .output = args->output,
                                   .head_chunk_rows = args->head_chunk_rows,
                                   .double_quant = !args->single_quant};
    qs_quantize_report report;
    if (!args->output) {
        return qs_comm_agree(
            comm, QS_FAIL(QS_ERR_USAGE, "quantize needs -o BASE.h5; see qshard quantize --help"));
    }
    QS_TRY(qs_comm_threads(comm, (int)args->threads, &options.threads));
    QS_TRY(quantize_on_device(args, &options, comm, &report));
    if (qs_comm_rank(comm) == 0) {
        printf("%s: %lld linears, %.1f MiB from %.1f MiB, %lld zero blocks, %.1f s, peak %.1f MiB "
               "a rank\n",
               args->output, (long long)report.linears, (double)report.output_bytes / MIB,
               (double)report.source_bytes / MIB, (long long)report.zero_blocks, report.seconds,
               (double)report.peak_bytes / MIB);
    }
    return QS_OK;
}
