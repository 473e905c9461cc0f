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

#include "hf/hf_config_impl.h"

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
    "max_sequence_length", /* LLaMA's first files; max_position_embeddings stands beside it */
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

/* Of Gemma 2 and 3. sliding_window_size stands beside sliding_window in Google's first files of
 * Gemma 2; no class reads it. */
static const char *const gemma_keys[] = {
    "hidden_activation",       "query_pre_attn_scalar",       "attn_logit_softcapping",
    "final_logit_softcapping", "use_bidirectional_attention", "sliding_window_size",
};

/* Of Gemma 3, not of others that have a second base, too. _sliding_window_pattern is what
 * transformers 5 made of the key without the line; it does not read it back. */
static const char *const gemma3_keys[] = {
    "sliding_window_pattern",
    "_sliding_window_pattern",
    "rope_local_base_freq",
};

/* Of Phi-3; the maps name code of the repository's own, which transformers does not need. */
static const char *const phi3_keys[] = {
    "original_max_position_embeddings",
    "resid_pdrop",
    "embd_pdrop",
    "full_attn_mod",
    "interpolate_factor",
    "lm_head_bias",
    "auto_map",
};

/* Of SmolLM3. */
static const char *const nope_keys[] = {"no_rope_layers", "no_rope_layer_interval"};

/* Of Granite. */
static const char *const multiplier_keys[] = {
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logits_scaling",
};

bool qs_hf_listed(const char *const *list, size_t count, const char *key)
{
    for (size_t i = 0; i < count; i++) {
        if (strcmp(list[i], key) == 0) {
            return true;
        }
    }
    return false;
}

bool qs_hf_is_harmless(const char *key)
{
    return qs_hf_listed(harmless_keys, QS_HF_COUNT(harmless_keys), key);
}

const json_t *qs_hf_given(const json_t *object, const char *key)
{
    const json_t *value = json_object_get(object, key);
    return json_is_null(value) ? NULL : value;
}

qs_status qs_hf_refuse(const char *path, const char *key, const char *value, const char *known)
{
    return QS_FAIL(QS_ERR_INPUT_UNKNOWN, "%s: \"%s\" = %.100s is not supported; %s is", path, key,
                   value, known);
}

qs_status qs_hf_get_i64(const json_t *root, const char *key, int64_t low, int64_t high,
                        int64_t fallback, int64_t *out, const char *path)
{
    *out = fallback;
    return qs_hf_given(root, key) == NULL ? QS_OK : qs_json_i64(root, key, low, high, out, path);
}

qs_status qs_hf_get_f64(const json_t *root, const char *key, double low, double high,
                        double fallback, double *out, const char *path)
{
    *out = fallback;
    return qs_hf_given(root, key) == NULL ? QS_OK : qs_json_f64(root, key, low, high, out, path);
}

qs_status qs_hf_get_bool(const json_t *root, const char *key, bool fallback, bool *out,
                         const char *path)
{
    const json_t *value = qs_hf_given(root, key);
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
    QS_TRY(qs_hf_get_bool(root, key, false, &on, path));
    return on ? qs_hf_refuse(path, key, "true", "false") : QS_OK;
}

/* ---- everything that is refused, in one message ---- */

enum { TOLD_MAX = 1500 }; /* an error's text has 2048 bytes */

typedef struct {
    char text[TOLD_MAX]; /* what was refused so far, without the path */
} refusals;

/* A refusal is noted and parsing goes on, with the default in its place; what is wrong otherwise
 * ends it. */
static qs_status note(refusals *told, const char *path, qs_status st)
{
    if (st != QS_ERR_INPUT_UNKNOWN) {
        return st;
    }
    const char *text = qs_error_text();
    const size_t skip = strlen(path), used = strlen(told->text);
    text += strncmp(text, path, skip) == 0 && strncmp(text + skip, ": ", 2) == 0 ? skip + 2 : 0;
    snprintf(told->text + used, sizeof told->text - used, "%s%s", used > 0 ? "; " : "", text);
    qs_error_clear();
    return QS_OK;
}

static bool known_key(const qs_hf_arch *arch, const char *key)
{
    return (arch->window != QS_WINDOW_NEVER &&
            qs_hf_listed(window_keys, QS_HF_COUNT(window_keys), key)) ||
           (arch->gemma && qs_hf_listed(gemma_keys, QS_HF_COUNT(gemma_keys), key)) ||
           (arch->gemma && arch->local_rope &&
            qs_hf_listed(gemma3_keys, QS_HF_COUNT(gemma3_keys), key)) ||
           (arch->fused && qs_hf_listed(phi3_keys, QS_HF_COUNT(phi3_keys), key)) ||
           (arch->nope_interval > 0 && qs_hf_listed(nope_keys, QS_HF_COUNT(nope_keys), key)) ||
           (arch->multipliers &&
            qs_hf_listed(multiplier_keys, QS_HF_COUNT(multiplier_keys), key)) ||
           qs_hf_listed(used_keys, QS_HF_COUNT(used_keys), key) || qs_hf_is_harmless(key);
}

void qs_hf_names_add(qs_hf_names *names, const char *name)
{
    static const size_t reserve = 24; /* quotes, a comma, " and 100000 more" */
    enum { shown = 100 };             /* bytes of a name, so that the first one always fits */
    if (names->left_out > 0 || names->used + strnlen(name, shown) + reserve >= sizeof names->text) {
        names->left_out++;
    } else {
        names->used += (size_t)snprintf(names->text + names->used, sizeof names->text - names->used,
                                        "%s\"%.*s\"", names->count > 0 ? ", " : "", shown, name);
    }
    names->count++;
}

int qs_hf_names_end(qs_hf_names *names)
{
    if (names->left_out > 0) {
        snprintf(names->text + names->used, sizeof names->text - names->used, "%s%d more",
                 names->used > 0 ? " and " : "", names->left_out);
    }
    return names->count;
}

static qs_status check_keys(const qs_hf_arch *arch, const json_t *root, const char *path)
{
    qs_hf_names unknown = {.count = 0};
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)(uintptr_t)root, key, value)
    {
        if (!json_is_null(value) && !known_key(arch, key)) {
            qs_hf_names_add(&unknown, key);
        }
    }
    const int count = qs_hf_names_end(&unknown);
    if (count == 0) {
        return QS_OK;
    }
    const bool one = count == 1;
    return QS_FAIL(QS_ERR_INPUT_UNKNOWN,
                   "%s: %s %s %s not known for model_type \"%s\"; if %s not change the maths, "
                   "remove %s from a copy of the file",
                   path, one ? "key" : "keys", unknown.text, one ? "is" : "are", arch->model_type,
                   one ? "it does" : "they do", one ? "it" : "them");
}

static qs_status find_architecture(const qs_hf_arch **out, const json_t *root, const char *path)
{
    const char *type = NULL;
    char known[160];
    const json_t *list = qs_hf_given(root, "architectures");
    QS_TRY(qs_json_text(root, "model_type", &type, path));
    *out = qs_hf_arch_find(type);
    if (*out == NULL) {
        if (json_is_object(json_object_get(root, "text_config"))) {
            return QS_FAIL(QS_ERR_INPUT_UNKNOWN,
                           "%s: \"model_type\" = %.100s is a model of text and more; of gemma3 and "
                           "mistral3 the text part is taken, of others it has to be saved alone "
                           "(docs/troubleshooting.md)",
                           path, type);
        }
        qs_hf_arch_names(known, sizeof known);
        return QS_FAIL(QS_ERR_INPUT_UNKNOWN,
                       "%s: \"model_type\" = %.100s is not supported; these are: %s", path, type,
                       known);
    }
    for (size_t i = 0; i < json_array_size(list); i++) {
        const char *name = json_string_value(json_array_get(list, i));
        if (name == NULL || strcmp(name, (*out)->class_name) != 0) {
            return qs_hf_refuse(path, "architectures", name != NULL ? name : "?",
                                (*out)->class_name);
        }
    }
    return QS_OK;
}

static qs_status parse_sizes(qs_hf_config *out, const qs_hf_arch *arch, const json_t *root,
                             const char *path)
{
    int64_t layers, heads, kv_heads, head_dim;
    double eps;
    QS_TRY(
        qs_hf_get_i64(root, "num_hidden_layers", 1, QS_LAYERS_MAX, arch->n_layers, &layers, path));
    QS_TRY(qs_hf_get_i64(root, "num_attention_heads", 1, 4096, arch->n_heads, &heads, path));
    QS_TRY(qs_hf_get_i64(root, "num_key_value_heads", 1, heads,
                         arch->n_kv_heads > 0 ? arch->n_kv_heads : heads, &kv_heads, path));
    QS_TRY(qs_hf_get_i64(root, "hidden_size", 1, 1 << 20, arch->hidden, &out->hidden, path));
    QS_TRY(qs_hf_get_i64(root, "intermediate_size", 1, 1 << 22, arch->ffn_hidden, &out->ffn_hidden,
                         path));
    QS_TRY(qs_hf_get_i64(root, "vocab_size", 1, 1 << 22, arch->vocab, &out->vocab, path));
    QS_TRY(qs_hf_get_i64(root, "max_position_embeddings", 1, 1 << 30, arch->max_position,
                         &out->max_position, path));
    QS_TRY(qs_hf_get_f64(root, "rms_norm_eps", DBL_MIN, 1e-2, arch->eps > 0.0 ? arch->eps : 1e-6,
                         &eps, path));
    const int64_t usual = arch->head_dim > 0 ? arch->head_dim : out->hidden / heads;
    const bool divides = qs_hf_given(root, "head_dim") == NULL && arch->head_dim == 0;
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
    QS_TRY(qs_hf_get_i64(root, "head_dim", 2, 1024, usual, &head_dim, path));
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
                              const char *path, refusals *told)
{
    bool attention = false, mlp = false;
    QS_TRY(qs_hf_get_bool(root, "attention_bias", false, &attention, path));
    QS_TRY(qs_hf_get_bool(root, "mlp_bias", false, &mlp, path));
    if (arch->bias != QS_BIAS_BY_KEY && attention) {
        QS_TRY(note(told, path,
                    qs_hf_refuse(path, "attention_bias", "true", "for this model_type false")));
    }
    if ((arch->bias != QS_BIAS_BY_KEY || arch->qk_norm) && mlp) {
        QS_TRY(
            note(told, path, qs_hf_refuse(path, "mlp_bias", "true", "for this model_type false")));
    }
    for (int i = 0; i < QS_LINEAR_COUNT; i++) {
        const bool some = QS_LINEARS_ATTENTION >> i & 1 ? attention : mlp;
        out->bias[i] = some && (qs_linears(arch->fused) >> i & 1);
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
    const json_t *types = qs_hf_given(root, "layer_types");
    if (types == NULL) {
        return QS_OK;
    }
    for (size_t l = 0; l < json_array_size(types); l++) {
        const char *type = json_string_value(json_array_get(types, l));
        const bool full = type != NULL && strcmp(type, "full_attention") == 0;
        const bool sliding = type != NULL && strcmp(type, "sliding_attention") == 0;
        if (!full && (!sliding || out->window == 0)) {
            return qs_hf_refuse(path, "layer_types", type != NULL ? type : "?",
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

/* Gemma, OLMo 3: a full layer behind some windowed ones. */
static qs_status parse_window_pattern(qs_hf_config *out, const qs_hf_arch *arch, const json_t *root,
                                      const char *path)
{
    int64_t pattern, again;
    if (json_is_null(json_object_get(root, "sliding_window"))) {
        return qs_hf_refuse(path, "sliding_window", "null", "for this model_type a number");
    }
    QS_TRY(qs_hf_get_i64(root, "sliding_window", 1, 1 << 30, arch->window_default, &out->window,
                         path));
    QS_TRY(qs_hf_get_i64(root, "sliding_window_size", 1, 1 << 30, out->window, &again, path));
    if (again != out->window) {
        return QS_FAIL(QS_ERR_INPUT_VALUE,
                       "%s: \"sliding_window\" = %lld and \"sliding_window_size\" = %lld differ",
                       path, (long long)out->window, (long long)again);
    }
    QS_TRY(qs_hf_get_i64(root, "sliding_window_pattern", 1, 1 << 20, arch->window_pattern, &pattern,
                         path));
    for (int l = 0; l < out->n_layers; l++) {
        out->windowed[l] = (l + 1) % pattern != 0;
    }
    return parse_layer_types(out, root, path);
}

/* SmolLM3: a layer without RoPE behind some with it, or a list of what each layer has. */
static qs_status parse_nope(qs_hf_config *out, const qs_hf_arch *arch, const json_t *root,
                            const char *path)
{
    const json_t *list = qs_hf_given(root, "no_rope_layers");
    int64_t interval;
    if (arch->nope_interval == 0) {
        return QS_OK;
    }
    QS_TRY(qs_hf_get_i64(root, "no_rope_layer_interval", 1, 1 << 20, arch->nope_interval, &interval,
                         path));
    if (list != NULL && json_array_size(list) < (size_t)out->n_layers) {
        return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: \"no_rope_layers\" is no list of %d entries", path,
                       out->n_layers);
    }
    for (int l = 0; l < out->n_layers; l++) {
        const json_t *turned = json_array_get(list, (size_t)l);
        const json_int_t value = json_integer_value(turned);
        if (list != NULL && (!json_is_integer(turned) || value < 0 || value > 1)) {
            return QS_FAIL(QS_ERR_INPUT_VALUE,
                           "%s: \"no_rope_layers\"[%d] is neither 1 (RoPE) nor 0 (none)", path, l);
        }
        out->unturned[l] = list != NULL ? value == 0 : (l + 1) % interval == 0;
    }
    return QS_OK;
}

static qs_status parse_window(qs_hf_config *out, const qs_hf_arch *arch, const json_t *root,
                              const char *path)
{
    const bool nope = arch->window == QS_WINDOW_NOPE;
    bool on = arch->window == QS_WINDOW_ALL;
    int64_t from = 0;
    if (arch->window == QS_WINDOW_UPPER || nope) {
        QS_TRY(qs_hf_get_bool(root, "use_sliding_window", false, &on, path));
        QS_TRY(
            qs_hf_get_i64(root, "max_window_layers", 0, 1 << 20, arch->window_layers, &from, path));
    }
    const json_t *window = json_object_get(root, "sliding_window");
    if (arch->window == QS_WINDOW_PATTERN) {
        return parse_window_pattern(out, arch, root, path);
    }
    const bool given = window != NULL ? !json_is_null(window) : arch->window_default > 0;
    if (on && given) { /* null: none; absent: the default */
        QS_TRY(qs_hf_get_i64(root, "sliding_window", 1, 1 << 30, arch->window_default, &out->window,
                             path));
        for (int l = 0; l < out->n_layers; l++) {
            out->windowed[l] = nope ? out->unturned[l] : l >= from;
        }
    }
    return parse_layer_types(out, root, path);
}

static qs_status expect_activation(const json_t *root, const char *key, const char *const *names,
                                   size_t count, const char *path)
{
    const json_t *act = qs_hf_given(root, key);
    const char *name = json_is_string(act) ? json_string_value(act) : "?";
    char known[64];
    snprintf(known, sizeof known, "\"%s\"", names[0]);
    return act == NULL || qs_hf_listed(names, count, name) ? QS_OK
                                                           : qs_hf_refuse(path, key, name, known);
}

/* Gemma's class reads hidden_activation; hidden_act stands beside it in older files. */
static qs_status parse_activation(const qs_hf_arch *arch, const json_t *root, const char *path)
{
    static const char *const silu[] = {"silu", "swish"};
    static const char *const gelu[] = {"gelu_pytorch_tanh"};
    if (arch->glu == QS_GLU_GELU_TANH) {
        QS_TRY(expect_activation(root, "hidden_activation", gelu, QS_HF_COUNT(gelu), path));
        return expect_activation(root, "hidden_act", gelu, QS_HF_COUNT(gelu), path);
    }
    return expect_activation(root, "hidden_act", silu, QS_HF_COUNT(silu), path);
}

/* null: none; absent: the default of the class. */
static qs_status parse_cap(float *out, bool computed, double usual, const json_t *root,
                           const char *key, const char *path)
{
    double cap = 0.0;
    if (qs_hf_given(root, key) != NULL && !computed) {
        return qs_hf_refuse(path, key, "a number", "for this model_type null");
    }
    if (!json_is_null(json_object_get(root, key))) {
        QS_TRY(qs_hf_get_f64(root, key, 1e-3, 1e6, usual, &cap, path));
    }
    *out = (float)cap;
    return QS_OK;
}

static qs_status parse_gemma(qs_hf_config *out, const qs_hf_arch *arch, const json_t *root,
                             const char *path)
{
    double scalar;
    if (!arch->gemma) {
        return QS_OK;
    }
    out->embedding_multiplier = sqrt((double)out->hidden);
    QS_TRY(expect_false(root, "use_bidirectional_attention", path));
    QS_TRY(parse_cap(&out->attention_cap, arch->cap == QS_CAP_BOTH, arch->attention_cap, root,
                     "attn_logit_softcapping", path));
    QS_TRY(
        parse_cap(&out->final_cap, true, arch->final_cap, root, "final_logit_softcapping", path));
    QS_TRY(qs_hf_get_f64(root, "query_pre_attn_scalar", 1e-6, 1e6, 256.0, &scalar, path));
    out->score_scale = 1.0F / sqrtf((float)scalar);
    return QS_OK;
}

/* What has no key in most architectures. */
static void take_usual_multipliers(qs_hf_config *out)
{
    out->score_scale = 1.0F / sqrtf((float)out->head_dim);
    out->embedding_multiplier = out->residual_multiplier = out->logits_scaling = 1.0;
}

/* The bounds keep eps / residual_multiplier^2, which norms of the stream add, far from the ends of
 * fp32. */
static qs_status parse_multipliers(qs_hf_config *out, const qs_hf_arch *arch, const json_t *root,
                                   const char *path)
{
    double of_scores;
    if (!arch->multipliers) {
        return QS_OK;
    }
    QS_TRY(qs_hf_get_f64(root, "embedding_multiplier", 1e-6, 1e6, 1.0, &out->embedding_multiplier,
                         path));
    QS_TRY(qs_hf_get_f64(root, "residual_multiplier", 1e-3, 1e3, 1.0, &out->residual_multiplier,
                         path));
    QS_TRY(qs_hf_get_f64(root, "logits_scaling", 1e-6, 1e6, 1.0, &out->logits_scaling, path));
    QS_TRY(qs_hf_get_f64(root, "attention_multiplier", 1e-6, 1e6, 1.0, &of_scores, path));
    out->score_scale = (float)of_scores;
    return QS_OK;
}

static qs_status parse_switches(qs_hf_config *out, const qs_hf_arch *arch, const json_t *root,
                                const char *path, refusals *told)
{
    static const char *const false_alone[] = {"rope_interleaved", "use_mrope", "is_encoder_decoder",
                                              "add_cross_attention", "lm_head_bias"};
    static const char *const dropouts[] = {"attention_dropout", "resid_pdrop", "embd_pdrop"};
    double dropout;
    QS_TRY(qs_hf_get_bool(root, "tie_word_embeddings", arch->tied, &out->tied, path));
    for (size_t i = 0; i < QS_HF_COUNT(false_alone); i++) {
        QS_TRY(note(told, path, expect_false(root, false_alone[i], path)));
    }
    for (size_t i = 0; i < QS_HF_COUNT(dropouts); i++) {
        QS_TRY(qs_hf_get_f64(root, dropouts[i], 0.0, 1.0, 0.0, &dropout, path));
        if (dropout != 0.0) {
            QS_TRY(note(told, path, qs_hf_refuse(path, dropouts[i], "a number above 0", "0")));
        }
    }
    return note(told, path, parse_activation(arch, root, path));
}

/* What Phi-3's files have beside; the class computes what 1 says. */
static qs_status parse_phi3(const qs_hf_arch *arch, const json_t *root, const char *path)
{
    static const char *const ones[] = {"full_attn_mod", "interpolate_factor"};
    int64_t one;
    for (size_t i = 0; i < QS_HF_COUNT(ones) && arch->fused; i++) {
        QS_TRY(qs_hf_get_i64(root, ones[i], 1, 1, 1, &one, path));
    }
    return QS_OK;
}

/* "torch_dtype" (transformers 4) and "dtype" (5); absent means float32. */
static qs_status parse_dtype(qs_hf_config *out, const json_t *root, const char *path)
{
    const json_t *old = qs_hf_given(root, "torch_dtype");
    const json_t *now = qs_hf_given(root, "dtype");
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
        return qs_hf_refuse(path, key, name, "bfloat16, float16 or float32");
    }
    out->dtype = (qs_dtype)dtype;
    return QS_OK;
}

static qs_status parse_quantization(qs_hf_config *out, const json_t *root, const char *path)
{
    const json_t *q = qs_hf_given(root, "quantization_config");
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
        return qs_hf_refuse(path, "quant_method", method, "\"bitsandbytes\" (4 bits, NF4)");
    }
    QS_TRY(qs_hf_get_bool(q, "load_in_4bit", false, &four, path));
    QS_TRY(qs_hf_get_bool(q, "load_in_8bit", false, &eight, path));
    if (eight || !four) {
        return qs_hf_refuse(path, "load_in_4bit", "false", "a bitsandbytes checkpoint with true");
    }
    if (qs_hf_given(q, "bnb_4bit_quant_type") == NULL) {
        type = "fp4"; /* the default of the library */
    } else {
        QS_TRY(qs_json_text(q, "bnb_4bit_quant_type", &type, path));
    }
    if (strcmp(type, "nf4") != 0) {
        return qs_hf_refuse(path, "bnb_4bit_quant_type", type, "\"nf4\"");
    }
    out->bnb_4bit = true;
    return QS_OK;
}

/* Sizes come first: the others are read by them. */
static qs_status parse_keys(qs_hf_config *out, const qs_hf_arch *arch, const json_t *root,
                            const char *path, refusals *told)
{
    QS_TRY(note(told, path, check_keys(arch, root, path)));
    QS_TRY(parse_sizes(out, arch, root, path));
    QS_TRY(parse_biases(out, arch, root, path, told));
    QS_TRY(parse_switches(out, arch, root, path, told));
    take_usual_multipliers(out);
    QS_TRY(note(told, path, parse_gemma(out, arch, root, path)));
    QS_TRY(parse_multipliers(out, arch, root, path));
    QS_TRY(parse_phi3(arch, root, path));
    QS_TRY(parse_nope(out, arch, root, path));
    QS_TRY(note(told, path, parse_window(out, arch, root, path)));
    QS_TRY(note(told, path, parse_dtype(out, root, path)));
    QS_TRY(note(told, path, qs_hf_rope_parse(out, arch, root, path)));
    return note(told, path, parse_quantization(out, root, path));
}

static qs_status parse_root(qs_hf_config *out, const json_t *root, const char *path)
{
    if (!json_is_object(root)) {
        return QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: is not a JSON object", path);
    }
    const qs_hf_arch *arch = NULL;
    refusals told = {.text = ""};
    QS_TRY(find_architecture(&arch, root, path));
    strcpy(out->model_type, arch->model_type);
    out->norms = arch->norms;
    out->norm_plus_one = arch->norm_plus_one;
    out->glu = arch->glu;
    out->embedding_factor_rounded = arch->embedding_factor_rounded;
    out->qk_norm = arch->qk_norm;
    out->qk_whole = arch->qk_whole;
    out->fused = arch->fused;
    const qs_status st = parse_keys(out, arch, root, path, &told);
    if (told.text[0] == '\0') {
        return st;
    }
    qs_error_clear(); /* what is wrong behind a refusal may follow from it */
    return QS_FAIL(QS_ERR_INPUT_UNKNOWN, "%s: %s", path, told.text);
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
