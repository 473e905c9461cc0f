/* qshard export: the LoRA weights of a checkpoint as a PEFT adapter directory, and which programs
 * will load it. */
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "base/mem.h"
#include "ckpt/ckpt.h"
#include "cli/cli_impl.h"
#include "store/h5.h"

enum { PATH_ROOM = QS_PATH_MAX + 64, NAME_ROOM = 1024, INDEX_BYTES_MAX = 64 << 20 };

/* The base model's directory as it was given to quantize; false if base.h5 is not at hand. */
static bool name_from_base(const char *base, char *out, size_t capacity)
{
    qs_h5 *file = NULL;
    json_t *index = NULL;
    char *text = NULL;
    qs_h5_info info = {.dtype = QS_U8, .rank = 1, .dims = {-1, -1}};
    bool found = false;
    if (qs_h5_open(&file, base) == QS_OK && qs_h5_expect_format(file, "qshard-base", 1) == QS_OK &&
        qs_h5_dataset_find(file, "index", &info) == QS_OK && info.dims[0] < INDEX_BYTES_MAX &&
        (text = malloc((size_t)info.dims[0])) != NULL &&
        qs_h5_dataset_get(file, "index", &info, 0, info.dims[0], text) == QS_OK) {
        index = json_loadb(text, (size_t)info.dims[0], 0, NULL);
        const char *path =
            json_string_value(json_object_get(json_object_get(index, "source"), "path"));
        found = path && *path;
        snprintf(out, capacity, "%s", found ? path : "");
    }
    (void)qs_h5_close(file);
    qs_error_clear(); /* a base that is elsewhere is no error here */
    json_decref(index);
    free(text);
    return found;
}

static void choose_base_name(const qs_cli_args *args, const qs_config *cfg, char *out,
                             size_t capacity)
{
    if (args->base_name) {
        snprintf(out, capacity, "%s", args->base_name);
    } else if (!name_from_base(cfg->base, out, capacity)) {
        snprintf(out, capacity, "%s", cfg->base);
        qs_log_warn("%s: cannot be asked for the base model's name; tools that load the base by "
                    "the adapter's record need --base-name",
                    cfg->base);
    }
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

qs_status qs_cli_export(const qs_cli_args *args, qs_comm *comm)
{
    (void)comm;
    if (!args->output) {
        return QS_FAIL(QS_ERR_USAGE, "export needs -o DIR; see qshard export --help");
    }
    char step_dir[PATH_ROOM], base_name[NAME_ROOM];
    qs_config cfg;
    qs_lora_layout layout;
    float *vector = NULL;
    QS_TRY(qs_cli_find_step(args->words[0], step_dir, sizeof step_dir));
    QS_TRY(qs_ckpt_read_lora(step_dir, &cfg, &layout, &vector));
    if (args->fold_scaling) {
        fold_scaling(&cfg, &layout, vector);
    }
    choose_base_name(args, &cfg, base_name, sizeof base_name);
    qs_status st = qs_peft_write(args->output, &layout, &cfg, base_name, vector);
    qs_mem_free(vector);
    QS_TRY(st);
    printf("%s: %s, %d layers, %srank %lld, %lld weights, base %s\n", args->output, step_dir,
           layout.n_layers, layout.dora ? "DoRA of " : "", (long long)cfg.lora.rank,
           (long long)qs_lora_count(&layout), base_name);
    print_loaders(&cfg);
    return QS_OK;
}
