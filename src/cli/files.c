/* qshard check and inspect: is it whole, and what does it hold? Both work on whatever the program
 * reads or writes. */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ckpt/ckpt_record.h"
#include "cli/cli_impl.h"
#include "data/data.h"
#include "hf/hf_text_part.h"
#include "hf/safetensors.h"
#include "lora/lora.h"
#include "store/h5.h"
#include "store/io.h"
#include "store/manifest.h"
#include "weights/base_file.h"

enum { PATH_ROOM = QS_PATH_MAX + 128, PIECE = 1 << 16, HF_CONFIG_MAX = 16 << 20 };

/* ---- tensors of a directory ---- */

/* Read every float of a tensor; NaN and infinity are damage. */
static qs_status check_finite(qs_st_dir *dir, const qs_st_tensor *t, float *piece)
{
    qs_dtype dtype;
    if (qs_st_to_dtype(t->dtype, &dtype) != 0 ||
        (dtype != QS_F32 && dtype != QS_F16 && dtype != QS_BF16)) {
        return QS_OK;
    }
    for (int64_t at = 0; at < t->count; at += PIECE) {
        int64_t n = t->count - at < PIECE ? t->count - at : PIECE;
        QS_TRY(qs_st_read_f32(dir, t, at, n, piece));
        for (int64_t i = 0; i < n; i++) {
            if (!isfinite(piece[i])) {
                return QS_FAIL(QS_ERR_INPUT_VALUE,
                               "%s: tensor \"%s\": element %" PRId64 " is not finite",
                               qs_st_path(dir), t->name, at + i);
            }
        }
    }
    return QS_OK;
}

static qs_status check_tensors(const char *path, const char *stem)
{
    qs_st_dir *dir = NULL;
    QS_TRY(qs_st_open(&dir, path, stem));
    float *piece = malloc(PIECE * sizeof *piece);
    qs_status st = piece ? QS_OK : QS_FAIL(QS_ERR_MEMORY, "%s: no memory", path);
    for (int64_t i = 0; i < qs_st_count(dir) && st == QS_OK; i++) {
        st = check_finite(dir, qs_st_at(dir, i), piece);
    }
    free(piece);
    qs_st_close(dir);
    return st;
}

/* `model`: of a checkpoint that may hold more than the text part; NULL: of an adapter. */
static qs_status describe_tensors(const char *path, const char *stem, const qs_hf_config *model)
{
    qs_st_dir *dir = NULL;
    int64_t bytes = 0, elements = 0;
    QS_TRY(qs_st_open(&dir, path, stem));
    const qs_status st = model != NULL ? qs_hf_take_text_tensors(dir, model) : QS_OK;
    if (st != QS_OK) {
        qs_st_close(dir);
        return st;
    }
    for (int64_t i = 0; i < qs_st_count(dir); i++) {
        bytes += qs_st_at(dir, i)->bytes;
        elements += qs_st_at(dir, i)->count;
    }
    printf("  tensors     %" PRId64 "\n  elements    %" PRId64 "\n  bytes       %" PRId64 "\n",
           qs_st_count(dir), elements, bytes);
    qs_st_close(dir);
    return QS_OK;
}

static qs_status read_model_config(const char *path, qs_hf_config *config)
{
    char file[PATH_ROOM];
    snprintf(file, sizeof file, "%s/config.json", path);
    return qs_hf_config_read(config, NULL, file, HF_CONFIG_MAX);
}

/* ---- check ---- */

static qs_status check_checkpoint(const char *path)
{
    qs_manifest m;
    QS_TRY(qs_manifest_verify(path, &m));
    qs_manifest_free(&m);
    return QS_OK;
}

/* Every checkpoint of a run; the first bad one is the error, the others are lines of the table. */
static qs_status check_run(const char *path)
{
    QS_TRY(qs_run_dir_check(path));
    int64_t *steps = NULL;
    int count = 0, bad = 0;
    qs_status first = QS_OK;
    char why[1024] = "";
    QS_TRY(qs_manifest_scan(path, &steps, &count));
    for (int i = count - 1; i >= 0; i--) {
        char dir[PATH_ROOM];
        qs_manifest_step_dir(dir, sizeof dir, path, steps[i]);
        qs_status one = check_checkpoint(dir);
        printf("%-48s %s\n", dir, one == QS_OK ? "good" : "BAD");
        if (one != QS_OK && bad++ == 0) {
            first = one;
            snprintf(why, sizeof why, "%s", qs_error_text());
        }
        qs_error_clear();
    }
    free(steps);
    return bad ? QS_FAIL(first, "%s (%d of %d checkpoints are bad)", why, bad, count) : QS_OK;
}

static qs_status check_adapter(const char *path)
{
    qs_peft_config config;
    char base_sha256[QS_SHA256_HEX];
    QS_TRY(qs_peft_config_read(&config, path));
    QS_TRY(qs_peft_read_base(path, base_sha256));
    return check_tensors(path, "adapter_model");
}

static qs_status check_model(const char *path)
{
    qs_hf_config config;
    QS_TRY(read_model_config(path, &config));
    return check_tensors(path, "model");
}

static qs_status check_config(const char *path)
{
    qs_config cfg;
    return qs_config_load(&cfg, path, NULL, 0);
}

qs_status qs_cli_check(const qs_cli_args *args, qs_comm *comm)
{
    (void)comm;
    const char *path = args->words[0];
    qs_path_kind kind;
    QS_TRY(qs_cli_path_kind(path, &kind));
    qs_status st = QS_OK;
    switch (kind) {
    case QS_PATH_CHECKPOINT:
        st = check_checkpoint(path);
        break;
    case QS_PATH_RUN:
        st = check_run(path);
        break;
    case QS_PATH_ADAPTER:
        st = check_adapter(path);
        break;
    case QS_PATH_MODEL:
        st = check_model(path);
        break;
    case QS_PATH_BASE:
        st = qs_base_verify(path);
        break;
    case QS_PATH_DATA:
        st = qs_data_verify(path);
        break;
    case QS_PATH_CONFIG:
        st = check_config(path);
        break;
    default:
        st = QS_FAIL(QS_ERR_USAGE,
                     "%s: is one rank's part of a checkpoint; check its directory, whose manifest "
                     "has the hashes",
                     path);
    }
    QS_TRY(st);
    printf("%s: good\n", path);
    return QS_OK;
}

/* ---- inspect ---- */

static void print_targets(const bool targeted[QS_LINEAR_COUNT])
{
    bool all = true;
    for (int i = 0; i < QS_LINEAR_COUNT; i++) {
        all = all && targeted[i];
    }
    printf("  targets    %s", all ? " all-linear" : "");
    for (int i = 0; i < QS_LINEAR_COUNT && !all; i++) {
        if (targeted[i]) {
            printf(" %s", strrchr(qs_linear_path((qs_linear)i), '.') + 1);
        }
    }
    printf("\n");
}

static qs_status inspect_checkpoint(const char *path)
{
    qs_manifest m;
    qs_ckpt_record record;
    qs_config cfg;
    qs_lora_layout layout;
    QS_TRY(qs_manifest_read(path, &m));
    qs_status st = qs_ckpt_record_parse(&record, m.meta_json, path);
    if (st != QS_OK) {
        qs_manifest_free(&m);
        return st;
    }
    QS_GOTO(qs_config_parse(&cfg, record.config_yaml, strlen(record.config_yaml), path, NULL, 0));
    QS_GOTO(qs_lora_layout_of_shapes(&layout, record.n_layers, record.out, record.in, &cfg));
    printf("%s: checkpoint\n  step        %" PRId64 "\n  run         %s\n  ranks       %d\n", path,
           m.step, m.run_id, m.nranks);
    printf("  %s        %d layers, rank %d, scale %g, %" PRId64 " weights\n",
           layout.dora ? "DoRA" : "LoRA", layout.n_layers, layout.lora_rank, (double)layout.scale,
           qs_lora_count(&layout));
    print_targets(layout.targeted);
    printf("  base        %s\n  data        %s\n", record.base_sha256, record.data_content);
    for (int i = 0; i < m.n_files; i++) {
        printf("  file        %s %" PRId64 " bytes\n", m.files[i].name, m.files[i].bytes);
    }
done:
    qs_ckpt_record_free(&record);
    qs_manifest_free(&m);
    return st;
}

/* Those whose manifests read well, newest first. */
static qs_status print_checkpoints(const char *path)
{
    int64_t *steps = NULL;
    int count = 0;
    QS_TRY(qs_manifest_scan(path, &steps, &count));
    const qs_status st = qs_manifest_list(path, steps, count, &count);
    for (int i = 0; st == QS_OK && i < count; i++) {
        printf("  checkpoint  step %" PRId64 "\n", steps[i]);
    }
    free(steps);
    return st;
}

static qs_status inspect_run(const char *path)
{
    char file[PATH_ROOM];
    void *text = NULL;
    size_t bytes = 0;
    QS_TRY(qs_run_dir_check(path));
    snprintf(file, sizeof file, "%s/run.json", path);
    QS_TRY(qs_io_read_file(file, 1 << 20, &text, &bytes));
    printf("%s: run\n%s\n", path, (const char *)text);
    free(text);
    return print_checkpoints(path);
}

static qs_status inspect_adapter(const char *path)
{
    qs_peft_config config;
    bool targeted[QS_LINEAR_COUNT];
    uint32_t targets = 0;
    char base_sha256[QS_SHA256_HEX];
    QS_TRY(qs_peft_config_read(&config, path));
    QS_TRY(qs_peft_targets(path, &targets));
    QS_TRY(qs_peft_read_base(path, base_sha256));
    for (int i = 0; i < QS_LINEAR_COUNT; i++) {
        targeted[i] = targets >> i & 1;
    }
    printf("%s: PEFT adapter%s\n  rank        %" PRId64 "\n  alpha       %g%s\n", path,
           config.dora ? ", DoRA" : "", config.lora_rank, config.alpha,
           config.rslora ? " (rslora)" : "");
    if (base_sha256[0] != '\0') {
        printf("  base        trained on the one with hashes_sha256 %s\n", base_sha256);
    }
    print_targets(targeted);
    return describe_tensors(path, "adapter_model", NULL);
}

static qs_status inspect_model(const char *path)
{
    qs_hf_config c;
    char name[QS_HF_NAME_BYTES];
    QS_TRY(read_model_config(path, &c));
    qs_hf_config_name(&c, name);
    printf("%s: Hugging Face checkpoint\n  model       %s%s\n", path, name,
           c.bnb_4bit ? ", bitsandbytes 4-bit" : "");
    printf("  layers      %d\n  hidden      %" PRId64 " (mlp %" PRId64 ")\n", c.n_layers, c.hidden,
           c.ffn_hidden);
    printf("  heads       %d, %d for keys and values, of %d\n", c.n_heads, c.n_kv_heads,
           c.head_dim);
    printf("  vocabulary  %" PRId64 "%s\n", c.vocab, c.tied ? ", tied" : "");
    return describe_tensors(path, "model", &c);
}

static qs_status inspect_config(const char *path)
{
    qs_config cfg;
    QS_TRY(qs_config_load(&cfg, path, NULL, 0));
    char *text = qs_config_dump(&cfg);
    if (!text) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory", path);
    }
    fputs(text, stdout);
    free(text);
    return QS_OK;
}

static qs_status inspect_shard(const char *path)
{
    static const char *const names[] = {"step", "rank", "nranks"};
    qs_h5 *file = NULL;
    QS_TRY(qs_h5_open(&file, path));
    qs_status st = QS_OK;
    printf("%s: one rank's part of a checkpoint\n", path);
    for (int i = 0; i < 3 && st == QS_OK; i++) {
        int64_t value = 0;
        st = qs_h5_attr_get_i64(file, names[i], &value);
        printf("  %-11s %" PRId64 "\n", names[i], value);
    }
    qs_h5_info info = {.dtype = QS_F32, .rank = 1, .dims = {-1, -1}};
    st = st == QS_OK ? qs_h5_dataset_find(file, "lora", &info) : st;
    printf("  elements    %" PRId64 " of lora, m and v each\n", info.dims[0]);
    qs_status closed = qs_h5_close(file);
    return st != QS_OK ? st : closed;
}

qs_status qs_cli_inspect(const qs_cli_args *args, qs_comm *comm)
{
    (void)comm;
    const char *path = args->words[0];
    qs_path_kind kind;
    QS_TRY(qs_cli_path_kind(path, &kind));
    switch (kind) {
    case QS_PATH_CHECKPOINT:
        return inspect_checkpoint(path);
    case QS_PATH_RUN:
        return inspect_run(path);
    case QS_PATH_ADAPTER:
        return inspect_adapter(path);
    case QS_PATH_MODEL:
        return inspect_model(path);
    case QS_PATH_BASE:
        return qs_base_describe(path, stdout);
    case QS_PATH_DATA:
        return qs_data_describe(path, stdout);
    case QS_PATH_CONFIG:
        return inspect_config(path);
    default:
        return inspect_shard(path);
    }
}
