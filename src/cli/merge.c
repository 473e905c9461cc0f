/* qshard merge: an adapter and the weights under it as one Hugging Face checkpoint. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cores.h"
#include "base/mem.h"
#include "ckpt/adapter_dir.h"
#include "ckpt/ckpt.h"
#include "cli/cli_impl.h"
#include "hf/chat_template.h"
#include "merge/merge.h"

#define MIB (1024.0 * 1024.0)
static const int64_t default_shard_bytes = INT64_C(5) << 30;

static qs_status parse_dtype(const char *text, int *out)
{
    static const struct {
        const char *name;
        qs_dtype dtype;
    } known[] = {{"bf16", QS_BF16}, {"f16", QS_F16}, {"f32", QS_F32}};
    for (int i = 0; i < 3; i++) {
        if (strcmp(text, known[i].name) == 0) {
            *out = (int)known[i].dtype;
            return QS_OK;
        }
    }
    return QS_FAIL(QS_ERR_USAGE, "--dtype: \"%.40s\" is not known; allowed: bf16 | f16 | f32",
                   text);
}

static qs_status read_options(const qs_cli_args *args, const qs_comm *comm, qs_merge_options *out)
{
    *out = (qs_merge_options){.base = args->base,
                              .output = args->output,
                              .original = args->original,
                              .dtype = -1,
                              .shard_bytes = default_shard_bytes,
                              .adapter = args->words[0]};
    out->threads = qs_threads_for_rank(qs_comm_local_nranks(comm), qs_comm_local_rank(comm),
                                       (int)args->threads);
    if (args->output == NULL) {
        return QS_FAIL(QS_ERR_USAGE, "merge needs -o HF_DIR; see qshard merge --help");
    }
    if (args->dtype != NULL) {
        QS_TRY(parse_dtype(args->dtype, &out->dtype));
    }
    return args->shard_size != NULL
               ? qs_cli_parse_size("shard-size", args->shard_size, &out->shard_bytes)
               : QS_OK;
}

/* `step_dir`: what the command line's `path` stands for. */
static qs_status merge_checkpoint(qs_merge_options o, const char *path, const char *step_dir,
                                  qs_merge_report *report)
{
    qs_ckpt_origin origin;
    qs_config config;
    qs_lora_layout layout;
    float *vector = NULL;
    QS_TRY(qs_adapter_name_good(qs_ckpt_read_lora(step_dir, &config, &layout, &vector, &origin),
                                path, step_dir));
    o.adapter = step_dir;
    o.chat_template = origin.chat_template;
    o.vector = vector;
    o.layout = &layout;
    o.base_sha256 = origin.base_sha256;
    o.base = o.base != NULL ? o.base : config.base;
    const qs_status st = qs_merge(&o, report);
    free(origin.chat_template);
    qs_mem_free(vector);
    return st;
}

/* Whoever wrote the adapter may have put the template of its training data beside it, as export
 * does. */
static qs_status merge_adapter(qs_merge_options o, qs_merge_report *report)
{
    char *chat_template = NULL;
    if (o.base == NULL) {
        return QS_FAIL(QS_ERR_USAGE,
                       "%s: a PEFT directory does not say which base.h5 it belongs "
                       "to; give it with --base",
                       o.adapter);
    }
    QS_TRY(qs_chat_template_read(o.adapter, &chat_template));
    o.chat_template = chat_template;
    const qs_status st = qs_merge(&o, report);
    free(chat_template);
    return st;
}

static void print_report(const qs_merge_options *o, const char *adapter, const qs_merge_report *r)
{
    printf("%s: %s over %s, %lld of %lld tensors merged, %s, %.1f MiB in %d file%s, %.1f s, peak "
           "%.1f MiB\n",
           o->output, adapter, o->original != NULL ? o->original : "the dequantized base",
           (long long)r->merged, (long long)r->tensors, qs_dtype_name(r->dtype),
           (double)r->bytes / MIB, r->files, r->files == 1 ? "" : "s", r->seconds,
           (double)r->peak_bytes / MIB);
    if (r->other_template) {
        printf("  template   " QS_CHAT_TEMPLATE_NAME " is that of the training data%s\n",
               r->source[0] != '\0' ? ", not the model's own"
                                    : "; keep it in place of the tokenizer's");
    }
    if (r->source[0] == '\0') {
        printf(
            "  not there  the checkpoint that the base was made from; copy the tokenizer's files "
            "by hand, or give --original\n");
        return;
    }
    printf("  copied    %s from %s\n", r->copied[0] != '\0' ? r->copied : " nothing", r->source);
    if (r->missing[0] != '\0') {
        printf("  not there %s\n", r->missing);
    }
}

qs_status qs_cli_merge(const qs_cli_args *args, qs_comm *comm)
{
    const char *path = args->words[0];
    qs_merge_options options;
    qs_merge_report report;
    qs_adapter_dir found;
    QS_TRY(read_options(args, comm, &options));
    QS_TRY(qs_adapter_find(&found, path, args->best));
    QS_TRY(found.kind == QS_ADAPTER_PEFT ? merge_adapter(options, &report)
                                         : merge_checkpoint(options, path, found.dir, &report));
    print_report(&options, path, &report);
    return QS_OK;
}
