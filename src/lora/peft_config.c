/* adapter_config.json, read and written. peft fills missing keys with defaults and drops unknown
 * ones; here a key that changes what the adapter computes is either understood or refused. */
#include <errno.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "lora/lora_impl.h"
#include "store/io.h"
#include "store/json.h"

enum { CONFIG_BYTES_MAX = 1 << 20 };

static const char *short_name(qs_linear linear)
{
    return strrchr(qs_linear_path(linear), '.') + 1;
}

/* ---- reading ---- */

/* Keys that must be absent, null, false, or empty: anything else is a feature that this program
 * does not have. target_modules and exclude_modules choose linears by rules over the names of a
 * model's modules; the names of the tensors are what came of it. */
static const char *const MUST_BE_EMPTY[] = {
    "modules_to_save",   "rank_pattern",      "alpha_pattern",
    "fan_in_fan_out",    "lora_bias",         "layers_to_transform",
    "layers_pattern",    "layer_replication", "trainable_token_indices",
    "target_parameters", "use_qalora",        "alora_invocation_tokens",
    "arrow_config",      "use_bdlora"};

static bool is_empty(const json_t *value)
{
    return !value || json_is_null(value) || json_is_false(value) ||
           (json_is_object(value) && json_object_size(value) == 0) ||
           (json_is_array(value) && json_array_size(value) == 0) ||
           (json_is_string(value) && json_string_length(value) == 0);
}

static qs_status check_features(const json_t *config, const char *path)
{
    for (size_t i = 0; i < sizeof MUST_BE_EMPTY / sizeof *MUST_BE_EMPTY; i++) {
        if (!is_empty(json_object_get(config, MUST_BE_EMPTY[i]))) {
            return QS_FAIL(
                QS_ERR_INPUT_UNKNOWN,
                "%s: %s is set, which is not supported; only LoRA and DoRA on linears are", path,
                MUST_BE_EMPTY[i]);
        }
    }
    const char *type = NULL;
    QS_TRY(qs_json_text(config, "peft_type", &type, path));
    if (strcmp(type, "LORA") != 0) {
        return QS_FAIL(QS_ERR_INPUT_UNKNOWN, "%s: peft_type: \"%.40s\" is not supported; only LORA",
                       path, type);
    }
    const json_t *bias = json_object_get(config, "bias");
    if (bias && (!json_is_string(bias) || strcmp(json_string_value(bias), "none") != 0)) {
        return QS_FAIL(QS_ERR_INPUT_UNKNOWN, "%s: bias is not \"none\", which is not supported",
                       path);
    }
    return QS_OK;
}

/* Some ways to start an adapter (pissa, olora, loftq, corda) take its first value out of the base,
 * so that it fits a changed base only. */
static qs_status check_init(const json_t *config, const char *path)
{
    static const char *const harmless[] = {"gaussian", "eva", "orthogonal"};
    const json_t *init = json_object_get(config, "init_lora_weights");
    if (!init || json_is_boolean(init) || json_is_null(init)) {
        return QS_OK;
    }
    const char *name = json_is_string(init) ? json_string_value(init) : "?";
    for (size_t i = 0; i < sizeof harmless / sizeof *harmless; i++) {
        if (strcmp(name, harmless[i]) == 0) {
            return QS_OK;
        }
    }
    return QS_FAIL(QS_ERR_INPUT_UNKNOWN,
                   "%s: init_lora_weights: \"%.40s\" changes the base, which is not supported",
                   path, name);
}

static qs_status parse_flag(const json_t *config, const char *key, bool *out, const char *path)
{
    const json_t *flag = json_object_get(config, key);
    if (flag && !json_is_null(flag) && !json_is_boolean(flag)) {
        return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: %s is neither true nor false", path, key);
    }
    *out = json_is_true(flag);
    return QS_OK;
}

static qs_status parse_fields(qs_peft_config *out, const json_t *config, const char *path)
{
    QS_TRY(check_features(config, path));
    QS_TRY(check_init(config, path));
    QS_TRY(qs_json_i64(config, "r", 1, 1024, &out->lora_rank, path));
    QS_TRY(qs_json_f64(config, "lora_alpha", 1e-9, 1e6, &out->alpha, path));
    QS_TRY(parse_flag(config, "use_rslora", &out->rslora, path));
    QS_TRY(parse_flag(config, "use_dora", &out->dora, path));
    if (json_object_get(config, "lora_dropout")) {
        QS_TRY(qs_json_f64(config, "lora_dropout", 0, 1, &out->dropout, path));
    }
    return QS_OK;
}

qs_status qs_peft_config_parse(qs_peft_config *out, const char *text, size_t bytes,
                               const char *path)
{
    json_t *config = NULL;
    memset(out, 0, sizeof *out);
    QS_TRY(qs_json_parse(&config, text, bytes, path));
    qs_status st = json_is_object(config)
                       ? parse_fields(out, config, path)
                       : QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: is not a JSON object", path);
    json_decref(config);
    return st;
}

qs_status qs_peft_config_read(qs_peft_config *out, const char *dir)
{
    char path[QS_PATH_MAX + 32];
    void *text = NULL;
    size_t bytes = 0;
    struct stat info;
    snprintf(path, sizeof path, "%s/adapter_config.json", dir);
    if (lstat(path, &info) != 0 &&
        (errno == ENOENT || errno == ENOTDIR)) { /* a link to nothing, opening it names */
        return QS_FAIL(QS_ERR_INPUT_MISSING,
                       "%s: a PEFT directory (adapter_config.json) is expected; qshard export "
                       "makes one of a run or a checkpoint",
                       dir);
    }
    QS_TRY(qs_io_read_file(path, CONFIG_BYTES_MAX, &text, &bytes));
    qs_status st = qs_peft_config_parse(out, text, bytes, path);
    free(text);
    return st;
}

qs_status qs_peft_settings(const char *dir, qs_config *cfg)
{
    qs_peft_config found;
    uint32_t targets = 0;
    QS_TRY(qs_peft_config_read(&found, dir));
    QS_TRY(qs_peft_targets(dir, &targets));
    cfg->lora.rank = found.lora_rank;
    cfg->lora.alpha = found.alpha;
    cfg->lora.dropout = found.dropout;
    cfg->lora.rslora = found.rslora;
    cfg->lora.dora = found.dora;
    cfg->lora.targets = targets | QS_TARGETS_SET; /* peft, too, takes those it finds */
    return QS_OK;
}

/* ---- writing ---- */

/* A whole number is written as one: tools declare lora_alpha as an integer. */
static json_t *number(double value)
{
    return value == floor(value) && fabs(value) < 1e15 ? json_integer((json_int_t)value)
                                                       : json_real(value);
}

static json_t *target_list(const qs_lora_layout *layout)
{
    json_t *list = json_array();
    for (int i = 0; i < QS_LINEAR_COUNT; i++) {
        if (layout->targeted[i]) {
            json_array_append_new(list, json_string(short_name((qs_linear)i)));
        }
    }
    return list;
}

/* A vision tower may have linears of the same names: a pattern that names those of the text part
 * alone, which peft compares with whole names of modules. */
static json_t *target_pattern(const qs_lora_layout *layout)
{
    char text[256] = ".*language_model\\..*\\.(";
    for (int i = 0; i < QS_LINEAR_COUNT; i++) {
        const size_t used = strlen(text);
        if (layout->targeted[i]) {
            snprintf(text + used, sizeof text - used, "%s%s", text[used - 1] == '(' ? "" : "|",
                     short_name((qs_linear)i));
        }
    }
    strcat(text, ")");
    return json_string(text);
}

/* Digits that bring both numbers back exactly, so that 0.1 is not written as 0.1000...01. */
static size_t digits_for(double a, double b)
{
    size_t digits = 1;
    for (; digits < 17; digits++) {
        char first[40], second[40];
        snprintf(first, sizeof first, "%.*g", (int)digits, a);
        snprintf(second, sizeof second, "%.*g", (int)digits, b);
        if (strtod(first, NULL) == a && strtod(second, NULL) == b) {
            break;
        }
    }
    return digits;
}

char *qs_peft_config_text(const qs_config *cfg, const qs_lora_layout *layout, const char *base_name)
{
    json_t *config = json_pack(
        "{s:{}, s:s, s:s, s:b, s:b, s:b, s:o, s:f, s:n, s:s, s:I, s:{}, s:n, s:o, s:s, s:b, s:b}",
        "alpha_pattern", "base_model_name_or_path", base_name, "bias", "none", "fan_in_fan_out", 0,
        "inference_mode", 1, "init_lora_weights", 1, "lora_alpha", number(cfg->lora.alpha),
        "lora_dropout", cfg->lora.dropout, "modules_to_save", "peft_type", "LORA", "r",
        (json_int_t)cfg->lora.rank, "rank_pattern", "revision", "target_modules",
        layout->naming == QS_PEFT_PLAIN ? target_list(layout) : target_pattern(layout), "task_type",
        "CAUSAL_LM", "use_dora", (int)cfg->lora.dora, "use_rslora", (int)cfg->lora.rslora);
    if (!config) {
        return NULL;
    }
    size_t digits = digits_for(cfg->lora.alpha, cfg->lora.dropout);
    char *text = json_dumps(config, JSON_INDENT(2) | JSON_SORT_KEYS | JSON_REAL_PRECISION(digits));
    json_decref(config);
    return text;
}
