/* qshard export: the LoRA weights of a checkpoint as a PEFT adapter directory, and which programs
 * will load it. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "base/mem.h"
#include "ckpt/adapter_dir.h"
#include "ckpt/ckpt.h"
#include "cli/cli_impl.h"
#include "hf/chat_template.h"
#include "weights/base_file.h"

enum { NAME_ROOM = QS_BASE_ORIGIN_BYTES };

/* Hugging Face's cache keeps ORG/NAME as .../models--ORG--NAME/snapshots/REVISION. */
static bool name_in_cache(const char *path, char *out, size_t capacity)
{
    static const char before[] = "models--", behind[] = "/snapshots/";
    const char *end = strstr(path, behind);
    const char *begin = end;
    while (begin != NULL && begin > path && begin[-1] != '/') {
        begin--;
    }
    if (begin == NULL || strncmp(begin, before, strlen(before)) != 0) {
        return false;
    }
    begin += strlen(before);
    const char *border = strstr(begin, "--"); /* no name on the Hub has two hyphens in a row */
    if (border != NULL && border < end) {
        snprintf(out, capacity, "%.*s/%.*s", (int)(border - begin), begin, (int)(end - border - 2),
                 border + 2);
    } else {
        snprintf(out, capacity, "%.*s", (int)(end - begin), begin);
    }
    return end > begin;
}

/* The name that the adapter records; false if it is a local path. */
static bool choose_base_name(const qs_cli_args *args, const qs_config *cfg,
                             const qs_base_origin *from, char *out, size_t capacity)
{
    if (args->base_name) {
        snprintf(out, capacity, "%s", args->base_name);
        return true;
    }
    if (name_in_cache(from->path, out, capacity)) {
        return true;
    }
    snprintf(out, capacity, "%s", from->path[0] != '\0' ? from->path : cfg->base);
    return false;
}

/* Without a name the adapter records a directory, as peft does for a model that was loaded from
 * one. _name_or_path is what the author of the checkpoint had loaded: of a fine-tuned model its
 * parent, so it is told and not written. */
static void warn_of_path(const char *output, const char *path, const qs_base_origin *from)
{
    const bool hint = from->name_or_path[0] != '\0' && strcmp(from->name_or_path, from->path) != 0;
    qs_log_warn("%s: the adapter records the local path \"%s\" as its base; for programs that load "
                "the base by name, export it with --base-name ORG/MODEL%s%.200s%s",
                output, path, hint ? " (its config.json names \"" : "",
                hint ? from->name_or_path : "", hint ? "\", itself or its parent)" : "");
}

/* y = W x + (alpha / sqrt(r)) B A x = W x + (alpha / r) (sqrt(r) B) A x */
static void fold_scaling(qs_config *cfg, qs_lora_layout *layout, float *vector)
{
    if (!cfg->lora.rslora) {
        return; /* alpha / rank is what every program computes */
    }
    float factor = (float)sqrt((double)cfg->lora.rank);
    for (int layer = 0; layer < layout->n_layers; layer++) {
        float *segment = vector + layer * layout->per_layer;
        for (int i = 0; i < QS_LINEAR_COUNT; i++) {
            for (int64_t e = 0; layout->targeted[i] && e < layout->out[i] * layout->lora_rank;
                 e++) {
                segment[layout->b_at[i] + e] *= factor;
            }
        }
    }
    cfg->lora.rslora = false;
    layout->scale = (float)(cfg->lora.alpha / (double)cfg->lora.rank);
}

/* What peft, vLLM and llama.cpp make of such a directory: vLLM honours rslora and knows certain
 * ranks, llama.cpp's converter copies lora_alpha alone. */
static void print_loaders(const qs_config *cfg)
{
    static const int64_t vllm_ranks[] = {1, 8, 16, 32, 64, 128, 256, 320, 512};
    int64_t fits = 0;
    for (int i = (int)(sizeof vllm_ranks / sizeof *vllm_ranks) - 1; i >= 0; i--) {
        fits = vllm_ranks[i] >= cfg->lora.rank ? vllm_ranks[i] : fits;
    }
    printf("  loads in  peft       yes\n");
    if (cfg->lora.dora) {
        printf("            vLLM       no: it has no DoRA; qshard merge makes a checkpoint for it\n"
               "            llama.cpp  no: its converter knows no magnitudes; convert what qshard "
               "merge makes\n");
        return;
    }
    if (fits) {
        printf("            vLLM       yes, with --max-lora-rank %lld\n", (long long)fits);
    } else {
        printf("            vLLM       no: lora.rank is above 512\n");
    }
    printf("            llama.cpp  %s\n",
           cfg->lora.rslora ? "no: it ignores rslora's scale; export with --fold-scaling"
                            : "yes, through convert_lora_to_gguf.py");
}

static qs_status find_checkpoint(const qs_cli_args *args, qs_adapter_dir *out)
{
    QS_TRY(qs_adapter_find(out, args->words[0], args->best));
    return out->kind == QS_ADAPTER_CHECKPOINT
               ? QS_OK
               : QS_FAIL(QS_ERR_INPUT_FORMAT,
                         "%s: is a PEFT directory already; name a checkpoint (step-N) or a run "
                         "directory",
                         args->words[0]);
}

qs_status qs_cli_export(const qs_cli_args *args, qs_comm *comm)
{
    (void)comm;
    if (!args->output) {
        return QS_FAIL(QS_ERR_USAGE, "export needs -o DIR; see qshard export --help");
    }
    char base_name[NAME_ROOM];
    qs_adapter_dir found;
    qs_config cfg;
    qs_lora_layout layout;
    float *vector = NULL;
    qs_ckpt_origin trained;
    QS_TRY(find_checkpoint(args, &found));
    const char *step_dir = found.dir;
    QS_TRY(qs_adapter_name_good(qs_ckpt_read_lora(step_dir, &cfg, &layout, &vector, &trained),
                                args->words[0], step_dir));
    if (args->fold_scaling) {
        fold_scaling(&cfg, &layout, vector);
    }
    const qs_base_origin from = qs_base_read_origin(cfg.base);
    const bool named = choose_base_name(args, &cfg, &from, base_name, sizeof base_name);
    const qs_status st = qs_peft_write(args->output, &layout, &cfg, base_name, trained.base_sha256,
                                       trained.chat_template, vector);
    const bool with_template = trained.chat_template != NULL;
    free(trained.chat_template);
    qs_mem_free(vector);
    QS_TRY(st);
    if (!named) {
        warn_of_path(args->output, base_name, &from);
    }
    printf("%s: %s, %d layers, %srank %lld, %lld weights, base %s\n", args->output, step_dir,
           layout.n_layers, layout.dora ? "DoRA of " : "", (long long)cfg.lora.rank,
           (long long)qs_lora_count(&layout), base_name);
    if (with_template) {
        printf("  template  " QS_CHAT_TEMPLATE_NAME
               ": that of the training data, to serve it with\n");
    }
    print_loaders(&cfg);
    return QS_OK;
}
