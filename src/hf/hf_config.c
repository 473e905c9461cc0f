/* config.json: what each key means, what it may be, and what is refused.
 *
 * transformers ignores a key that it does not know. Here such a key is refused by name, because it
 * may stand for maths that this program does not do; keys that change nothing are listed as
 * harmless. A missing key means the default of the architecture's class, as in transformers. */
#include "hf/hf_config.h"

#include <float.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "hf/hf_arch.h"
#include "hf/json.h"

static const char *const used_keys[] = {
    "model_type",
    "architectures",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "hidden_act",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "rope_interleaved",
    "torch_dtype",
    "dtype",
    "quantization_config",
    "attention_dropout",
    "layer_types",
    "use_mrope",
    "is_encoder_decoder",
    "add_cross_attention",
};

/* Generation settings, bookkeeping and labels: nothing that the forward or the backward pass sees.
 */
static const char *const harmless_keys[] = {
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_attn_implementation_internal",
    "_commit_hash",
    "_flash_attn_2_enabled",
    "_name_or_path",
    "attn_implementation",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "cache_implementation",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "eos_token_id",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_llama_config",
    "label2id",
    "length_penalty",
    "max_length",
    "max_window_layers",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "pad_token_id",
    "prefix",
    "pretraining_tp",
    "problem_type",
    "pruned_heads",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "typical_p",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
};

/* Of architectures with windowed layers; null, as for absent ones, is fine everywhere. */
static const char *const window_keys[] = {
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
};

/* Of Gemma 2 and 3. */
static const char *const gemma_keys[] = {
    "hidden_activation",       "query_pre_attn_scalar",       "attn_logit_softcapping",
    "final_logit_softcapping", "use_bidirectional_attention",
};

/* Of Gemma 3. _sliding_window_pattern is what transformers 5 made of the key without the line; it
 * does not read it back. */
static const char *const gemma3_keys[] = {
    "sliding_window_pattern",
    "_sliding_window_pattern",
    "rope_local_base_freq",
};

static const char *const rope_keys[] = {
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
};

/* Of those the ones that one type alone has. */
static const struct {
    const char *key;
    qs_rope_type type;
    const char *name;
} own_rope_keys[] = {
    {"low_freq_factor", QS_ROPE_LLAMA3, "llama3"}, {"high_freq_factor", QS_ROPE_LLAMA3, "llama3"},
    {"attention_factor", QS_ROPE_YARN, "yarn"},    {"beta_fast", QS_ROPE_YARN, "yarn"},
    {"beta_slow", QS_ROPE_YARN, "yarn"},           {"mscale", QS_ROPE_YARN, "yarn"},
    {"mscale_all_dim", QS_ROPE_YARN, "yarn"},      {"truncate", QS_ROPE_YARN, "yarn"},
};

#define COUNT(array) (sizeof(array) / sizeof *(array))

static bool listed(const char *const *list, size_t count, const char *key)
{
    for (size_t i = 0; i < count; i++) {
        if (strcmp(list[i], key) == 0) {
            return true;
        }
    }
    return false;
}

/* The member, NULL where it is absent or null: both mean the default. */
static const json_t *given(const json_t *object, const char *key)
{
    const json_t *value = json_object_get(object, key);
    return json_is_null(value) ? NULL : value;
}

static qs_status refuse(const char *path, const char *key, const char *value, const char *known)
{
    return QS_FAIL(QS_ERR_INPUT_UNKNOWN, "%s: \"%s\" = %.100s is not supported; %s is", path, key,
                   value, known);
}

static qs_status get_i64(const json_t *root, const char *key, int64_t low, int64_t high,
                         int64_t fallback, int64_t *out, const char *path)
{
    *out = fallback;
    return given(root, key) == NULL ? QS_OK : qs_json_i64(root, key, low, high, out, path);
}

static qs_status get_f64(const json_t *root, const char *key, double low, double high,
                         double fallback, double *out, const char *path)
{
    *out = fallback;
    return given(root, key) == NULL ? QS_OK : qs_json_f64(root, key, low, high, out, path);
}

static qs_status get_bool(const json_t *root, const char *key, bool fallback, bool *out,
                          const char *path)
{
    const json_t *value = given(root, key);
    *out = value == NULL ? fallback : json_is_true(value);
    if (value != NULL && !json_is_boolean(value)) {
        return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: \"%s\" is neither true nor false", path, key);
    }
    return QS_OK;
}

/* A switch that must be off. */
static qs_status expect_false(const json_t *root, const char *key, const char *path)
{
    bool on;
    QS_TRY(get_bool(root, key, false, &on, path));
    return on ? refuse(path, key, "true", "false") : QS_OK;
}

static qs_status check_keys(const qs_hf_arch *arch, const json_t *root, const char *path)
{
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)(uintptr_t)root, key, value)
    {
        const bool windowed =
            arch->window != QS_WINDOW_NEVER && listed(window_keys, COUNT(window_keys), key);
        const bool gemma = (arch->gemma && listed(gemma_keys, COUNT(gemma_keys), key)) ||
                           (arch->local_rope && listed(gemma3_keys, COUNT(gemma3_keys), key));
        if (!json_is_null(value) && !windowed && !gemma &&
            !listed(used_keys, COUNT(used_keys), key) &&
            !listed(harmless_keys, COUNT(harmless_keys), key)) {
            return QS_FAIL(QS_ERR_INPUT_UNKNOWN,
                           "%s: key \"%.100s\" is not known for model_type \"%s\"; if it does "
                           "not change the maths, remove it from a copy of the file",
                           path, key, arch->model_type);
        }
    }
    return QS_OK;
}

static qs_status find_architecture(const qs_hf_arch **out, const json_t *root, const char *path)
{
    const char *type = NULL;
    char known[160];
    const json_t *list = given(root, "architectures");
    QS_TRY(qs_json_text(root, "model_type", &type, path));
    *out = qs_hf_arch_find(type);
    if (*out == NULL) {
        qs_hf_arch_names(known, sizeof known);
        return QS_FAIL(QS_ERR_INPUT_UNKNOWN,
                       "%s: \"model_type\" = %.100s is not supported; these are: %s", path, type,
                       known);
    }
    for (size_t i = 0; i < json_array_size(list); i++) {
        const char *name = json_string_value(json_array_get(list, i));
        if (name == NULL || strcmp(name, (*out)->class_name) != 0) {
            return refuse(path, "architectures", name != NULL ? name : "?", (*out)->class_name);
        }
    }
    return QS_OK;
}

static qs_status parse_sizes(qs_hf_config *out, const qs_hf_arch *arch, const json_t *root,
                             const char *path)
{
    int64_t layers, heads, kv_heads, head_dim;
    double eps;
    QS_TRY(get_i64(root, "num_hidden_layers", 1, QS_LAYERS_MAX, arch->n_layers, &layers, path));
    QS_TRY(get_i64(root, "num_attention_heads", 1, 4096, arch->n_heads, &heads, path));
    QS_TRY(get_i64(root, "num_key_value_heads", 1, heads,
                   arch->n_kv_heads > 0 ? arch->n_kv_heads : heads, &kv_heads, path));
    QS_TRY(get_i64(root, "hidden_size", 1, 1 << 20, arch->hidden, &out->hidden, path));
    QS_TRY(
        get_i64(root, "intermediate_size", 1, 1 << 22, arch->ffn_hidden, &out->ffn_hidden, path));
    QS_TRY(get_i64(root, "vocab_size", 1, 1 << 22, arch->vocab, &out->vocab, path));
    QS_TRY(get_i64(root, "max_position_embeddings", 1, 1 << 30, arch->max_position,
                   &out->max_position, path));
    QS_TRY(get_f64(root, "rms_norm_eps", DBL_MIN, 1e-2, 1e-6, &eps, path));
    const int64_t usual = arch->head_dim > 0 ? arch->head_dim : out->hidden / heads;
    const bool divides = given(root, "head_dim") == NULL && arch->head_dim == 0;
    if (out->hidden % heads != 0 && (divides || arch->window == QS_WINDOW_NEVER)) {
        return QS_FAIL(QS_ERR_INPUT_VALUE,
                       "%s: \"hidden_size\" = %lld is not a multiple of \"num_attention_heads\" = "
                       "%lld",
                       path, (long long)out->hidden, (long long)heads);
    }
    if (heads % kv_heads != 0) {
        return QS_FAIL(QS_ERR_INPUT_VALUE,
                       "%s: \"num_attention_heads\" = %lld is not a multiple of "
                       "\"num_key_value_heads\" = %lld",
                       path, (long long)heads, (long long)kv_heads);
    }
    QS_TRY(get_i64(root, "head_dim", 2, 1024, usual, &head_dim, path));
    if (head_dim % 2 != 0 || head_dim > 1024) {
        return QS_FAIL(QS_ERR_INPUT_VALUE,
                       "%s: \"head_dim\" = %lld; rotary embeddings need an even number up to 1024",
                       path, (long long)head_dim);
    }
    out->n_layers = (int)layers;
    out->n_heads = (int)heads;
    out->n_kv_heads = (int)kv_heads;
    out->head_dim = (int)head_dim;
    out->rms_norm_eps = (float)eps;
    return QS_OK;
}

static qs_status parse_biases(qs_hf_config *out, const qs_hf_arch *arch, const json_t *root,
                              const char *path)
{
    bool attention = false, mlp = false;
    QS_TRY(get_bool(root, "attention_bias", false, &attention, path));
    QS_TRY(get_bool(root, "mlp_bias", false, &mlp, path));
    if (arch->bias != QS_BIAS_BY_KEY && attention) {
        return refuse(path, "attention_bias", "true", "for this model_type false");
    }
    if ((arch->bias != QS_BIAS_BY_KEY || arch->qk_norm) && mlp) {
        return refuse(path, "mlp_bias", "true", "for this model_type false");
    }
    for (int i = 0; i < QS_LINEAR_COUNT; i++) {
        out->bias[i] = i <= QS_O ? attention : mlp;
    }
    if (arch->bias == QS_BIAS_QKV) {
        out->bias[QS_Q] = out->bias[QS_K] = out->bias[QS_V] = true;
    }
    return QS_OK;
}

/* Which layers are windowed: layer_types (transformers 5) says it layer by layer and must then
 * agree with the rule that transformers 4 applies. */
static qs_status parse_layer_types(qs_hf_config *out, const json_t *root, const char *path)
{
    const json_t *types = given(root, "layer_types");
    if (types == NULL) {
        return QS_OK;
    }
    for (size_t l = 0; l < json_array_size(types); l++) {
        const char *type = json_string_value(json_array_get(types, l));
        const bool full = type != NULL && strcmp(type, "full_attention") == 0;
        const bool sliding = type != NULL && strcmp(type, "sliding_attention") == 0;
        if (!full && (!sliding || out->window == 0)) {
            return refuse(path, "layer_types", type != NULL ? type : "?",
                          out->window > 0 ? "\"full_attention\" or \"sliding_attention\""
                                          : "\"full_attention\"");
        }
        if (l < QS_LAYERS_MAX) {
            out->windowed[l] = sliding;
        }
    }
    if (json_array_size(types) != (size_t)out->n_layers) {
        return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: \"layer_types\" is no list of %d entries", path,
                       out->n_layers);
    }
    return QS_OK;
}

/* Gemma: a full layer behind some windowed ones. */
static qs_status parse_window_pattern(qs_hf_config *out, const qs_hf_arch *arch, const json_t *root,
                                      const char *path)
{
    int64_t pattern;
    if (json_is_null(json_object_get(root, "sliding_window"))) {
        return refuse(path, "sliding_window", "null", "for this model_type a number");
    }
    QS_TRY(get_i64(root, "sliding_window", 1, 1 << 30, arch->window_default, &out->window, path));
    QS_TRY(
        get_i64(root, "sliding_window_pattern", 1, 1 << 20, arch->window_pattern, &pattern, path));
    for (int l = 0; l < out->n_layers; l++) {
        out->windowed[l] = (l + 1) % pattern != 0;
    }
    return parse_layer_types(out, root, path);
}

static qs_status parse_window(qs_hf_config *out, const qs_hf_arch *arch, const json_t *root,
                              const char *path)
{
    bool on = arch->window == QS_WINDOW_ALL;
    int64_t from = 0;
    if (arch->window == QS_WINDOW_UPPER) {
        QS_TRY(get_bool(root, "use_sliding_window", false, &on, path));
        QS_TRY(get_i64(root, "max_window_layers", 0, 1 << 20, arch->window_layers, &from, path));
    }
    const json_t *window = json_object_get(root, "sliding_window");
    if (arch->window == QS_WINDOW_PATTERN) {
        return parse_window_pattern(out, arch, root, path);
    }
    if (on && !json_is_null(window)) { /* null: none; absent: the default */
        QS_TRY(
            get_i64(root, "sliding_window", 1, 1 << 30, arch->window_default, &out->window, path));
        for (int l = 0; l < out->n_layers; l++) {
            out->windowed[l] = l >= from;
        }
    }
    return parse_layer_types(out, root, path);
}

static qs_status expect_activation(const json_t *root, const char *key, const char *const *names,
                                   size_t count, const char *path)
{
    const json_t *act = given(root, key);
    const char *name = json_is_string(act) ? json_string_value(act) : "?";
    char known[64];
    snprintf(known, sizeof known, "\"%s\"", names[0]);
    return act == NULL || listed(names, count, name) ? QS_OK : refuse(path, key, name, known);
}

/* Gemma's class reads hidden_activation; hidden_act stands beside it in older files. */
static qs_status parse_activation(const qs_hf_arch *arch, const json_t *root, const char *path)
{
    static const char *const silu[] = {"silu", "swish"};
    static const char *const gelu[] = {"gelu_pytorch_tanh"};
    if (arch->gemma) {
        QS_TRY(expect_activation(root, "hidden_activation", gelu, COUNT(gelu), path));
        return expect_activation(root, "hidden_act", gelu, COUNT(gelu), path);
    }
    return expect_activation(root, "hidden_act", silu, COUNT(silu), path);
}

/* null: none; absent: the default of the class. */
static qs_status parse_cap(float *out, bool computed, double usual, const json_t *root,
                           const char *key, const char *path)
{
    double cap = 0.0;
    if (given(root, key) != NULL && !computed) {
        return refuse(path, key, "a number", "for this model_type null");
    }
    if (!json_is_null(json_object_get(root, key))) {
        QS_TRY(get_f64(root, key, 1e-3, 1e6, usual, &cap, path));
    }
    *out = (float)cap;
    return QS_OK;
}

static qs_status parse_gemma(qs_hf_config *out, const qs_hf_arch *arch, const json_t *root,
                             const char *path)
{
    out->gemma = arch->gemma;
    out->query_scalar = out->head_dim;
    if (!arch->gemma) {
        return QS_OK;
    }
    QS_TRY(expect_false(root, "use_bidirectional_attention", path));
    QS_TRY(parse_cap(&out->attention_cap, arch->cap == QS_CAP_BOTH, arch->attention_cap, root,
                     "attn_logit_softcapping", path));
    QS_TRY(
        parse_cap(&out->final_cap, true, arch->final_cap, root, "final_logit_softcapping", path));
    return get_f64(root, "query_pre_attn_scalar", 1e-6, 1e6, 256.0, &out->query_scalar, path);
}

static qs_status parse_switches(qs_hf_config *out, const qs_hf_arch *arch, const json_t *root,
                                const char *path)
{
    double dropout;
    QS_TRY(get_bool(root, "tie_word_embeddings", arch->tied, &out->tied, path));
    QS_TRY(expect_false(root, "rope_interleaved", path));
    QS_TRY(expect_false(root, "use_mrope", path));
    QS_TRY(expect_false(root, "is_encoder_decoder", path));
    QS_TRY(expect_false(root, "add_cross_attention", path));
    QS_TRY(get_f64(root, "attention_dropout", 0.0, 1.0, 0.0, &dropout, path));
    if (dropout != 0.0) {
        return refuse(path, "attention_dropout", "a number above 0", "0");
    }
    return parse_activation(arch, root, path);
}

/* "torch_dtype" (transformers 4) and "dtype" (5); absent means float32. */
static qs_status parse_dtype(qs_hf_config *out, const json_t *root, const char *path)
{
    const json_t *old = given(root, "torch_dtype");
    const json_t *now = given(root, "dtype");
    out->dtype = QS_F32;
    if (old != NULL && now != NULL && !json_equal(old, now)) {
        return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: \"torch_dtype\" and \"dtype\" differ", path);
    }
    const char *key = now != NULL ? "dtype" : "torch_dtype";
    if (now == NULL && old == NULL) {
        return QS_OK;
    }
    const char *name = NULL;
    QS_TRY(qs_json_text(root, key, &name, path));
    int dtype = qs_dtype_parse(name);
    if (dtype != (int)QS_BF16 && dtype != (int)QS_F16 && dtype != (int)QS_F32) {
        return refuse(path, key, name, "bfloat16, float16 or float32");
    }
    out->dtype = (qs_dtype)dtype;
    return QS_OK;
}

static qs_status parse_rope_type(qs_hf_config *out, const json_t *rope, const char *path)
{
    static const char *const names[] = {[QS_ROPE_DEFAULT] = "default",
                                        [QS_ROPE_LLAMA3] = "llama3",
                                        [QS_ROPE_LINEAR] = "linear",
                                        [QS_ROPE_YARN] = "yarn"};
    const char *key = given(rope, "rope_type") != NULL ? "rope_type" : "type";
    const char *name = "default";
    if (given(rope, key) != NULL) {
        QS_TRY(qs_json_text(rope, key, &name, path));
    }
    for (size_t i = 0; i < COUNT(names); i++) {
        if (strcmp(names[i], name) == 0) {
            out->rope_type = (qs_rope_type)i;
            return QS_OK;
        }
    }
    return refuse(path, "rope_type", name, "\"default\", \"linear\", \"llama3\" or \"yarn\"");
}

static qs_status check_rope_keys(const qs_hf_config *out, const json_t *rope, const char *path)
{
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)(uintptr_t)rope, key, value)
    {
        if (!json_is_null(value) && !listed(rope_keys, COUNT(rope_keys), key)) {
            return QS_FAIL(QS_ERR_INPUT_UNKNOWN, "%s: RoPE key \"%.100s\" is not known", path, key);
        }
    }
    for (size_t i = 0; i < COUNT(own_rope_keys); i++) {
        if (given(rope, own_rope_keys[i].key) != NULL && out->rope_type != own_rope_keys[i].type) {
            return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: \"%s\" belongs to rope_type \"%s\"", path,
                           own_rope_keys[i].key, own_rope_keys[i].name);
        }
    }
    if (out->rope_type == QS_ROPE_DEFAULT && out->rope_factor != 1.0) {
        return QS_FAIL(QS_ERR_INPUT_VALUE,
                       "%s: RoPE \"factor\" = %g, but rope_type \"default\" does not scale", path,
                       out->rope_factor);
    }
    return QS_OK;
}

static qs_status parse_llama3(qs_hf_config *out, const json_t *rope, const char *path)
{
    QS_TRY(qs_json_f64(rope, "low_freq_factor", 1e-6, 1e6, &out->rope_low_freq_factor, path));
    QS_TRY(qs_json_f64(rope, "high_freq_factor", 1e-6, 1e6, &out->rope_high_freq_factor, path));
    QS_TRY(qs_json_i64(rope, "original_max_position_embeddings", 1, 1 << 30,
                       &out->rope_original_max_position, path));
    if (out->rope_high_freq_factor <= out->rope_low_freq_factor) {
        return QS_FAIL(QS_ERR_INPUT_VALUE,
                       "%s: \"high_freq_factor\" = %g is not above \"low_freq_factor\" = %g", path,
                       out->rope_high_freq_factor, out->rope_low_freq_factor);
    }
    return QS_OK;
}

static double yarn_magnitude(double factor, double mscale)
{
    return factor <= 1.0 ? 1.0 : 0.1 * mscale * log(factor) + 1.0;
}

/* 0 for mscale, as for the betas, means that it is not given, as in transformers. */
static qs_status parse_yarn(qs_hf_config *out, const json_t *rope, const char *path)
{
    double mscale, all_dim;
    QS_TRY(get_i64(rope, "original_max_position_embeddings", 1, 1 << 30, out->max_position,
                   &out->rope_original_max_position, path));
    QS_TRY(get_f64(rope, "beta_fast", 0.0, 1e6, 32.0, &out->rope_beta_fast, path));
    QS_TRY(get_f64(rope, "beta_slow", 0.0, 1e6, 1.0, &out->rope_beta_slow, path));
    out->rope_beta_fast = out->rope_beta_fast != 0.0 ? out->rope_beta_fast : 32.0;
    out->rope_beta_slow = out->rope_beta_slow != 0.0 ? out->rope_beta_slow : 1.0;
    QS_TRY(get_bool(rope, "truncate", true, &out->rope_truncate, path));
    QS_TRY(get_f64(rope, "mscale", 0.0, 1e6, 0.0, &mscale, path));
    QS_TRY(get_f64(rope, "mscale_all_dim", 0.0, 1e6, 0.0, &all_dim, path));
    const double fallback =
        mscale != 0.0 && all_dim != 0.0
            ? yarn_magnitude(out->rope_factor, mscale) / yarn_magnitude(out->rope_factor, all_dim)
            : yarn_magnitude(out->rope_factor, 1.0);
    QS_TRY(get_f64(rope, "attention_factor", 1e-6, 1e6, fallback, &out->rope_magnitude, path));
    if (out->rope_theta <= 1.0) {
        return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: \"rope_theta\" = %g, but yarn needs more than 1",
                       path, out->rope_theta);
    }
    if (out->rope_beta_fast < out->rope_beta_slow) {
        return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: \"beta_fast\" = %g is below \"beta_slow\" = %g",
                       path, out->rope_beta_fast, out->rope_beta_slow);
    }
    return QS_OK;
}

static qs_status parse_rope_scaling(qs_hf_config *out, const json_t *rope, const char *path)
{
    if (out->rope_type != QS_ROPE_DEFAULT && given(rope, "factor") == NULL) {
        return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: RoPE \"factor\" is missing", path);
    }
    QS_TRY(get_f64(rope, "factor", 1.0, 1e6, 1.0, &out->rope_factor, path));
    QS_TRY(check_rope_keys(out, rope, path));
    return out->rope_type == QS_ROPE_LLAMA3 ? parse_llama3(out, rope, path)
           : out->rope_type == QS_ROPE_YARN ? parse_yarn(out, rope, path)
                                            : QS_OK;
}

/* RoPE of windowed layers, which do not scale. */
static qs_status check_local_rope(const json_t *local, const char *path)
{
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)(uintptr_t)local, key, value)
    {
        const bool type = strcmp(key, "rope_type") == 0 || strcmp(key, "type") == 0;
        const char *name = json_is_string(value) ? json_string_value(value) : "?";
        if (type && !json_is_null(value) && strcmp(name, "default") != 0) {
            return refuse(path, "rope_type", name, "for \"sliding_attention\" \"default\"");
        }
        if (!type && !json_is_null(value) && strcmp(key, "rope_theta") != 0) {
            return QS_FAIL(QS_ERR_INPUT_UNKNOWN,
                           "%s: RoPE key \"%.100s\" of \"sliding_attention\" is not known", path,
                           key);
        }
    }
    return QS_OK;
}

/* Two RoPEs. transformers 4: rope_theta and rope_scaling are those of full layers,
 * rope_local_base_freq is the base of windowed ones; 5: rope_parameters by type of layer, of which
 * *full becomes that of full layers. */
static qs_status parse_local_rope(qs_hf_config *out, const qs_hf_arch *arch, const json_t *root,
                                  const json_t **full, const char *path)
{
    const json_t *by_type = given(root, "rope_parameters");
    const json_t *local = given(by_type, "sliding_attention");
    const char *key;
    json_t *value;
    if (by_type != NULL && !json_is_object(by_type)) {
        return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: \"rope_parameters\" is not an object", path);
    }
    json_object_foreach((json_t *)(uintptr_t)by_type, key, value)
    {
        if (strcmp(key, "full_attention") != 0 && strcmp(key, "sliding_attention") != 0) {
            return refuse(path, "rope_parameters", key,
                          "for this model_type \"full_attention\" and \"sliding_attention\"");
        }
        if (!json_is_null(value) && !json_is_object(value)) {
            return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: \"%s\" is not an object", path, key);
        }
    }
    QS_TRY(check_local_rope(local, path));
    *full = given(by_type, "full_attention");
    const json_t *inner = given(local, "rope_theta"), *outer = given(root, "rope_local_base_freq");
    if (inner != NULL && outer != NULL && json_number_value(inner) != json_number_value(outer)) {
        return QS_FAIL(QS_ERR_INPUT_VALUE,
                       "%s: \"rope_local_base_freq\" and the \"rope_theta\" of "
                       "\"sliding_attention\" differ",
                       path);
    }
    return get_f64(inner != NULL ? local : root,
                   inner != NULL ? "rope_theta" : "rope_local_base_freq", 1e-3, 1e12,
                   arch->rope_local_theta, &out->rope_local_theta, path);
}

/* transformers 4: rope_theta and rope_scaling at top level; 5: both inside rope_parameters. */
static qs_status parse_rope(qs_hf_config *out, const qs_hf_arch *arch, const json_t *root,
                            const char *path)
{
    const json_t *scaling = given(root, "rope_scaling");
    const json_t *parameters = given(root, "rope_parameters");
    const json_t *holder = root;
    const double usual = arch->rope_theta > 0.0 ? arch->rope_theta : 10000.0;
    double partial;
    if (arch->local_rope) {
        QS_TRY(parse_local_rope(out, arch, root, &parameters, path));
    }
    if (scaling != NULL && parameters != NULL && !json_equal(scaling, parameters)) {
        return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: \"rope_scaling\" and \"rope_parameters\" differ",
                       path);
    }
    const json_t *rope = parameters != NULL ? parameters : scaling;
    if (rope != NULL && !json_is_object(rope)) {
        return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: \"rope_scaling\" is not an object", path);
    }
    const json_t *inner = given(rope, "rope_theta");
    const json_t *outer = given(root, "rope_theta");
    if (inner != NULL && outer != NULL && json_number_value(inner) != json_number_value(outer)) {
        return QS_FAIL(QS_ERR_INPUT_VALUE,
                       "%s: \"rope_theta\" at top level and in \"rope_parameters\" differ", path);
    }
    holder = inner != NULL ? rope : root;
    QS_TRY(get_f64(holder, "rope_theta", 1e-3, 1e12, usual, &out->rope_theta, path));
    holder = given(rope, "partial_rotary_factor") != NULL ? rope : root;
    QS_TRY(get_f64(holder, "partial_rotary_factor", 0.0, 1.0, 1.0, &partial, path));
    if (partial != 1.0) {
        return refuse(path, "partial_rotary_factor", "a number below 1", "1");
    }
    out->rope_factor = out->rope_magnitude = 1.0;
    if (rope == NULL) {
        return QS_OK;
    }
    QS_TRY(parse_rope_type(out, rope, path));
    return parse_rope_scaling(out, rope, path);
}

static qs_status parse_quantization(qs_hf_config *out, const json_t *root, const char *path)
{
    const json_t *q = given(root, "quantization_config");
    const char *method = NULL;
    const char *type = NULL;
    bool four = false;
    bool eight = false;
    if (q == NULL) {
        return QS_OK;
    }
    if (!json_is_object(q)) {
        return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: \"quantization_config\" is not an object", path);
    }
    QS_TRY(qs_json_text(q, "quant_method", &method, path));
    if (strcmp(method, "bitsandbytes") != 0) {
        return refuse(path, "quant_method", method, "\"bitsandbytes\" (4 bits, NF4)");
    }
    QS_TRY(get_bool(q, "load_in_4bit", false, &four, path));
    QS_TRY(get_bool(q, "load_in_8bit", false, &eight, path));
    if (eight || !four) {
        return refuse(path, "load_in_4bit", "false", "a bitsandbytes checkpoint with true");
    }
    if (given(q, "bnb_4bit_quant_type") == NULL) {
        type = "fp4"; /* the default of the library */
    } else {
        QS_TRY(qs_json_text(q, "bnb_4bit_quant_type", &type, path));
    }
    if (strcmp(type, "nf4") != 0) {
        return refuse(path, "bnb_4bit_quant_type", type, "\"nf4\"");
    }
    out->bnb_4bit = true;
    return QS_OK;
}

static qs_status parse_root(qs_hf_config *out, const json_t *root, const char *path)
{
    if (!json_is_object(root)) {
        return QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: is not a JSON object", path);
    }
    const qs_hf_arch *arch = NULL;
    QS_TRY(find_architecture(&arch, root, path));
    strcpy(out->model_type, arch->model_type);
    out->qk_norm = arch->qk_norm;
    QS_TRY(check_keys(arch, root, path));
    QS_TRY(parse_sizes(out, arch, root, path));
    QS_TRY(parse_biases(out, arch, root, path));
    QS_TRY(parse_switches(out, arch, root, path));
    QS_TRY(parse_gemma(out, arch, root, path));
    QS_TRY(parse_window(out, arch, root, path));
    QS_TRY(parse_dtype(out, root, path));
    QS_TRY(parse_rope(out, arch, root, path));
    return parse_quantization(out, root, path);
}

qs_status qs_hf_config_parse(qs_hf_config *out, const char *text, size_t bytes, const char *path)
{
    json_t *root = NULL;
    memset(out, 0, sizeof *out);
    QS_TRY(qs_json_parse(&root, text, bytes, path));
    qs_status st = parse_root(out, root, path);
    json_decref(root);
    return st;
}

/* Frequencies whose wavelength is below L0/high stay, those above L0/low are divided by the factor,
 * between them the two are blended (Llama 3.1's rule). */
static float llama3_scaled(const qs_hf_config *cfg, float frequency)
{
    const float factor = (float)cfg->rope_factor;
    const float low = (float)cfg->rope_low_freq_factor, high = (float)cfg->rope_high_freq_factor;
    const float original = (float)cfg->rope_original_max_position;
    const float wavelength = 6.28318530717958647692F / frequency;
    if (wavelength < original / high) {
        return frequency;
    }
    if (wavelength > original / low) {
        return frequency / factor;
    }
    const float smooth = (original / wavelength - low) / (high - low);
    return (1.0F - smooth) * frequency / factor + smooth * frequency;
}

/* The frequency, counted from the highest, that makes so many turns over the original positions. */
static double yarn_border(const qs_hf_config *cfg, double turns)
{
    const double original = (double)cfg->rope_original_max_position;
    return cfg->head_dim * log(original / (turns * 6.28318530717958647692)) /
           (2.0 * log(cfg->rope_theta));
}

/* Frequencies of many turns stay, those of few are divided by the factor, between them the two are
 * blended (YaRN: Peng et al. 2023, arXiv:2309.00071). `period` is 1 / frequency. */
static float yarn_scaled(const qs_hf_config *cfg, int i, float period)
{
    double low = yarn_border(cfg, cfg->rope_beta_fast);
    double high = yarn_border(cfg, cfg->rope_beta_slow);
    if (cfg->rope_truncate) {
        low = floor(low);
        high = ceil(high);
    }
    low = fmax(low, 0.0);
    high = fmin(high, cfg->head_dim - 1);
    high += low == high ? 0.001 : 0.0;
    const float ramp = ((float)i - (float)low) / (float)(high - low);
    const float keep = 1.0F - fminf(fmaxf(ramp, 0.0F), 1.0F);
    const float divided = 1.0F / ((float)cfg->rope_factor * period), kept = 1.0F / period;
    return divided * (1.0F - keep) + kept * keep;
}

/* Rounded to fp32 after each operation, as transformers does: an ulp of a frequency, times a
 * position in the hundreds, is an error in every attention score that is larger than all other fp32
 * errors of the step together. */
static float rope_period(const qs_hf_config *cfg, double theta, int i)
{
    const float exponent = (float)(2 * i) / (float)cfg->head_dim;
    return (float)pow(theta, (double)exponent);
}

void qs_hf_rope_local_frequencies(const qs_hf_config *cfg, double *inv_freq)
{
    for (int i = 0; i < cfg->head_dim / 2; i++) {
        inv_freq[i] = (double)(1.0F / rope_period(cfg, cfg->rope_local_theta, i));
    }
}

void qs_hf_rope_frequencies(const qs_hf_config *cfg, double *inv_freq)
{
    for (int i = 0; i < cfg->head_dim / 2; i++) {
        const float period = rope_period(cfg, cfg->rope_theta, i);
        float f = 1.0F / period;
        if (cfg->rope_type == QS_ROPE_LINEAR) {
            f /= (float)cfg->rope_factor;
        } else if (cfg->rope_type == QS_ROPE_LLAMA3) {
            f = llama3_scaled(cfg, f);
        } else if (cfg->rope_type == QS_ROPE_YARN) {
            f = yarn_scaled(cfg, i, period);
        }
        inv_freq[i] = (double)f;
    }
}

const char *qs_linear_path(qs_linear linear)
{
    static const char *const paths[QS_LINEAR_COUNT] = {
        [QS_Q] = "self_attn.q_proj", [QS_K] = "self_attn.k_proj", [QS_V] = "self_attn.v_proj",
        [QS_O] = "self_attn.o_proj", [QS_GATE] = "mlp.gate_proj", [QS_UP] = "mlp.up_proj",
        [QS_DOWN] = "mlp.down_proj"};
    return paths[linear];
}

void qs_linear_shape(const qs_hf_config *cfg, qs_linear linear, int64_t *out, int64_t *in)
{
    int64_t q = (int64_t)cfg->n_heads * cfg->head_dim;
    int64_t kv = (int64_t)cfg->n_kv_heads * cfg->head_dim;
    *out = linear == QS_Q                         ? q
           : linear == QS_K || linear == QS_V     ? kv
           : linear == QS_GATE || linear == QS_UP ? cfg->ffn_hidden
                                                  : cfg->hidden;
    *in = linear == QS_O ? q : linear == QS_DOWN ? cfg->ffn_hidden : cfg->hidden;
}
