/* Rotary position embeddings: what config.json says of them, and the frequencies that follow. */
#include <math.h>
#include <string.h>

#include "hf/hf_config_impl.h"

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
    "short_factor",
    "long_factor",
};

enum { YARN = 1 << QS_ROPE_YARN, LLAMA3 = 1 << QS_ROPE_LLAMA3, LONGROPE = 1 << QS_ROPE_LONGROPE };

/* Of those the ones that not every type has; the types have a bit each. */
static const struct {
    const char *key;
    unsigned types;
    const char *name;
} own_rope_keys[] = {
    {"low_freq_factor", LLAMA3, "llama3"},
    {"high_freq_factor", LLAMA3, "llama3"},
    {"attention_factor", YARN | LONGROPE, "yarn\" or \"longrope"},
    {"beta_fast", YARN, "yarn"},
    {"beta_slow", YARN, "yarn"},
    {"mscale", YARN, "yarn"},
    {"mscale_all_dim", YARN, "yarn"},
    {"truncate", YARN, "yarn"},
    {"short_factor", LONGROPE, "longrope"},
    {"long_factor", LONGROPE, "longrope"},
};

/* "su" is what the first files of Phi-3 call longrope. */
static qs_status parse_rope_type(qs_hf_config *out, const qs_hf_arch *arch, const json_t *rope,
                                 const char *path)
{
    static const char *const names[] = {
        [QS_ROPE_DEFAULT] = "default",   [QS_ROPE_LLAMA3] = "llama3",
        [QS_ROPE_LINEAR] = "linear",     [QS_ROPE_YARN] = "yarn",
        [QS_ROPE_LONGROPE] = "longrope", [QS_ROPE_DYNAMIC] = "dynamic"};
    const char *key = qs_hf_given(rope, "rope_type") != NULL ? "rope_type" : "type";
    const char *name = "default";
    if (qs_hf_given(rope, key) != NULL) {
        QS_TRY(qs_json_text(rope, key, &name, path));
    }
    const char *meant = arch->fused && strcmp(name, "su") == 0 ? "longrope" : name;
    for (size_t i = 0; i < QS_HF_COUNT(names); i++) {
        if (strcmp(names[i], meant) == 0 &&
            (!arch->fused || i == QS_ROPE_DEFAULT || i == QS_ROPE_LONGROPE)) {
            out->rope_type = (qs_rope_type)i;
            return QS_OK;
        }
    }
    return qs_hf_refuse(path, "rope_type", name,
                        arch->fused ? "for this model_type \"default\" or \"longrope\""
                                    : "\"default\", \"linear\", \"llama3\", \"yarn\", "
                                      "\"longrope\" or \"dynamic\"");
}

static qs_status check_rope_keys(const qs_hf_config *out, const json_t *rope, const char *path)
{
    qs_hf_names unknown = {.count = 0};
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)(uintptr_t)rope, key, value)
    {
        if (!json_is_null(value) && !qs_hf_listed(rope_keys, QS_HF_COUNT(rope_keys), key)) {
            qs_hf_names_add(&unknown, key);
        }
    }
    const int count = qs_hf_names_end(&unknown);
    if (count > 0) {
        return QS_FAIL(QS_ERR_INPUT_UNKNOWN, "%s: RoPE key%s %s %s not known", path,
                       count > 1 ? "s" : "", unknown.text, count > 1 ? "are" : "is");
    }
    for (size_t i = 0; i < QS_HF_COUNT(own_rope_keys); i++) {
        if (qs_hf_given(rope, own_rope_keys[i].key) != NULL &&
            !(own_rope_keys[i].types >> out->rope_type & 1)) {
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
    QS_TRY(qs_hf_get_i64(rope, "original_max_position_embeddings", 1, 1 << 30, out->max_position,
                         &out->rope_original_max_position, path));
    QS_TRY(qs_hf_get_f64(rope, "beta_fast", 0.0, 1e6, 32.0, &out->rope_beta_fast, path));
    QS_TRY(qs_hf_get_f64(rope, "beta_slow", 0.0, 1e6, 1.0, &out->rope_beta_slow, path));
    out->rope_beta_fast = out->rope_beta_fast != 0.0 ? out->rope_beta_fast : 32.0;
    out->rope_beta_slow = out->rope_beta_slow != 0.0 ? out->rope_beta_slow : 1.0;
    QS_TRY(qs_hf_get_bool(rope, "truncate", true, &out->rope_truncate, path));
    QS_TRY(qs_hf_get_f64(rope, "mscale", 0.0, 1e6, 0.0, &mscale, path));
    QS_TRY(qs_hf_get_f64(rope, "mscale_all_dim", 0.0, 1e6, 0.0, &all_dim, path));
    const double fallback =
        mscale != 0.0 && all_dim != 0.0
            ? yarn_magnitude(out->rope_factor, mscale) / yarn_magnitude(out->rope_factor, all_dim)
            : yarn_magnitude(out->rope_factor, 1.0);
    QS_TRY(
        qs_hf_get_f64(rope, "attention_factor", 1e-6, 1e6, fallback, &out->rope_magnitude, path));
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

/* One factor for each pair that turns. */
static qs_status parse_factors(const qs_hf_config *cfg, const json_t *rope, const char *key,
                               double *out, const char *path)
{
    const json_t *list = NULL;
    const size_t pairs = (size_t)cfg->rotary_dim / 2;
    QS_TRY(qs_json_array(rope, key, &list, path));
    if (json_array_size(list) != pairs) {
        return QS_FAIL(QS_ERR_INPUT_VALUE,
                       "%s: \"%s\" has %zu numbers; it needs %zu, half of what turns of a head",
                       path, key, json_array_size(list), pairs);
    }
    for (size_t i = 0; i < pairs; i++) {
        const json_t *factor = json_array_get(list, i);
        out[i] = json_number_value(factor);
        if (!json_is_number(factor) || out[i] < 1e-3 || out[i] > 1e6) {
            return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: \"%s\"[%zu] is no number in [0.001, 1e6]", path,
                           key, i);
        }
    }
    return QS_OK;
}

/* The length that longrope's model was trained with before: in Phi-3's files at top level. */
static qs_status parse_original_length(qs_hf_config *out, const qs_hf_arch *arch,
                                       const json_t *root, const json_t *rope, const char *path)
{
    static const char *const key = "original_max_position_embeddings";
    const int64_t usual =
        arch->original_max_position > 0 ? arch->original_max_position : out->max_position;
    int64_t inner;
    QS_TRY(qs_hf_get_i64(arch->fused ? root : rope, key, 2, 1 << 30, usual,
                         &out->rope_original_max_position, path));
    QS_TRY(qs_hf_get_i64(rope, key, 2, 1 << 30, out->rope_original_max_position, &inner, path));
    if (inner != out->rope_original_max_position) {
        return QS_FAIL(QS_ERR_INPUT_VALUE,
                       "%s: \"%s\" is %lld for RoPE, but %lld at top level, which transformers "
                       "takes; write there which it is",
                       path, key, (long long)inner, (long long)out->rope_original_max_position);
    }
    return QS_OK;
}

/* LongRoPE: Ding et al. 2024, arXiv:2402.13753. */
static qs_status parse_longrope(qs_hf_config *out, const qs_hf_arch *arch, const json_t *root,
                                const json_t *rope, const char *path)
{
    QS_TRY(parse_original_length(out, arch, root, rope, path));
    QS_TRY(parse_factors(out, rope, "short_factor", out->rope_short_factor, path));
    QS_TRY(parse_factors(out, rope, "long_factor", out->rope_long_factor, path));
    const double original = (double)out->rope_original_max_position;
    if (qs_hf_given(rope, "factor") == NULL) {
        out->rope_factor = (double)out->max_position / original;
    }
    const double fallback =
        out->rope_factor <= 1.0 ? 1.0 : sqrt(1.0 + log(out->rope_factor) / log(original));
    return qs_hf_get_f64(rope, "attention_factor", 1e-6, 1e6, fallback, &out->rope_magnitude, path);
}

/* Some versions of transformers count from original_max_position_embeddings, some from
 * max_position_embeddings. */
static qs_status parse_dynamic(qs_hf_config *out, const json_t *rope, const char *path)
{
    int64_t original;
    QS_TRY(qs_hf_get_i64(rope, "original_max_position_embeddings", 1, 1 << 30, out->max_position,
                         &original, path));
    if (original != out->max_position) {
        return QS_FAIL(QS_ERR_INPUT_VALUE,
                       "%s: \"original_max_position_embeddings\" = %lld is not "
                       "\"max_position_embeddings\" = %lld, from which \"dynamic\" counts",
                       path, (long long)original, (long long)out->max_position);
    }
    if (out->rotary_dim <= 2) {
        return QS_FAIL(QS_ERR_INPUT_VALUE,
                       "%s: \"rope_type\" = \"dynamic\", but a head has %d elements that turn; it "
                       "needs more than 2",
                       path, out->rotary_dim);
    }
    return QS_OK;
}

static qs_status parse_rope_scaling(qs_hf_config *out, const qs_hf_arch *arch, const json_t *root,
                                    const json_t *rope, const char *path)
{
    const bool needs_factor =
        out->rope_type != QS_ROPE_DEFAULT && out->rope_type != QS_ROPE_LONGROPE;
    if (needs_factor && qs_hf_given(rope, "factor") == NULL) {
        return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: RoPE \"factor\" is missing", path);
    }
    QS_TRY(qs_hf_get_f64(rope, "factor", 1.0, 1e6, 1.0, &out->rope_factor, path));
    QS_TRY(check_rope_keys(out, rope, path));
    switch (out->rope_type) {
    case QS_ROPE_LLAMA3:
        return parse_llama3(out, rope, path);
    case QS_ROPE_YARN:
        return parse_yarn(out, rope, path);
    case QS_ROPE_LONGROPE:
        return parse_longrope(out, arch, root, rope, path);
    case QS_ROPE_DYNAMIC:
        return parse_dynamic(out, rope, path);
    default:
        return QS_OK;
    }
}

/* How much of a head turns: int(head_dim * partial_rotary_factor). */
static qs_status parse_rotary_dim(qs_hf_config *out, const qs_hf_arch *arch, const json_t *root,
                                  const json_t *rope, const char *path)
{
    static const char *const key = "partial_rotary_factor";
    double partial;
    QS_TRY(qs_hf_get_f64(qs_hf_given(rope, key) != NULL ? rope : root, key, 0.0, 1.0, 1.0, &partial,
                         path));
    out->rotary_dim = (int)(out->head_dim * partial);
    if (partial != 1.0 && !arch->fused) {
        return qs_hf_refuse(path, key, "a number below 1", "1");
    }
    if (out->rotary_dim < 2 || out->rotary_dim % 2 != 0) {
        return QS_FAIL(
            QS_ERR_INPUT_VALUE,
            "%s: \"%s\" = %g makes %d of %d elements of a head turn; these come in pairs", path,
            key, partial, out->rotary_dim, out->head_dim);
    }
    return QS_OK;
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
            return qs_hf_refuse(path, "rope_type", name, "for \"sliding_attention\" \"default\"");
        }
        if (!type && !json_is_null(value) && strcmp(key, "rope_theta") != 0) {
            return QS_FAIL(QS_ERR_INPUT_UNKNOWN,
                           "%s: RoPE key \"%.100s\" of \"sliding_attention\" is not known", path,
                           key);
        }
    }
    return QS_OK;
}

/* OLMo 3 has no key at top level for the base of windowed layers. */
static qs_status check_one_base(const qs_hf_arch *arch, const json_t *root, const char *path)
{
    double theta;
    QS_TRY(qs_hf_get_f64(root, "rope_theta", 1e-3, 1e12, arch->rope_local_theta, &theta, path));
    if (!arch->gemma && theta != arch->rope_local_theta) {
        return QS_FAIL(QS_ERR_INPUT_VALUE,
                       "%s: by \"rope_theta\" = %g transformers 4 turns windowed layers, too, but "
                       "transformers 5 by %g; write which it is as the \"rope_theta\" of "
                       "\"sliding_attention\" in \"rope_parameters\"",
                       path, theta, arch->rope_local_theta);
    }
    return QS_OK;
}

/* Two RoPEs. transformers 4: rope_theta and rope_scaling are those of full layers,
 * rope_local_base_freq is the base of windowed ones; 5: rope_parameters by type of layer, of which
 * *full becomes that of full layers. */
static qs_status parse_local_rope(qs_hf_config *out, const qs_hf_arch *arch, const json_t *root,
                                  const json_t **full, const char *path)
{
    const json_t *by_type = qs_hf_given(root, "rope_parameters");
    const json_t *local = qs_hf_given(by_type, "sliding_attention");
    const char *key;
    json_t *value;
    if (by_type != NULL && !json_is_object(by_type)) {
        return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: \"rope_parameters\" is not an object", path);
    }
    json_object_foreach((json_t *)(uintptr_t)by_type, key, value)
    {
        if (strcmp(key, "full_attention") != 0 && strcmp(key, "sliding_attention") != 0) {
            return qs_hf_refuse(path, "rope_parameters", key,
                                "for this model_type \"full_attention\" and \"sliding_attention\"");
        }
        if (!json_is_null(value) && !json_is_object(value)) {
            return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: \"%s\" is not an object", path, key);
        }
    }
    QS_TRY(check_local_rope(local, path));
    *full = qs_hf_given(by_type, "full_attention");
    const json_t *inner = qs_hf_given(local, "rope_theta"),
                 *outer = qs_hf_given(root, "rope_local_base_freq");
    if (inner != NULL && outer != NULL && json_number_value(inner) != json_number_value(outer)) {
        return QS_FAIL(QS_ERR_INPUT_VALUE,
                       "%s: \"rope_local_base_freq\" and the \"rope_theta\" of "
                       "\"sliding_attention\" differ",
                       path);
    }
    if (inner == NULL) {
        QS_TRY(check_one_base(arch, root, path));
    }
    return qs_hf_get_f64(inner != NULL ? local : root,
                         inner != NULL ? "rope_theta" : "rope_local_base_freq", 1e-3, 1e12,
                         arch->rope_local_theta, &out->rope_local_theta, path);
}

/* transformers 4: rope_theta and rope_scaling at top level; 5: both inside rope_parameters. */
qs_status qs_hf_rope_parse(qs_hf_config *out, const qs_hf_arch *arch, const json_t *root,
                           const char *path)
{
    const json_t *scaling = qs_hf_given(root, "rope_scaling");
    const json_t *parameters = qs_hf_given(root, "rope_parameters");
    const json_t *holder = root;
    const double usual = arch->rope_theta > 0.0 ? arch->rope_theta : 10000.0;
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
    const json_t *inner = qs_hf_given(rope, "rope_theta");
    const json_t *outer = qs_hf_given(root, "rope_theta");
    if (inner != NULL && outer != NULL && json_number_value(inner) != json_number_value(outer)) {
        return QS_FAIL(QS_ERR_INPUT_VALUE,
                       "%s: \"rope_theta\" at top level and in \"rope_parameters\" differ", path);
    }
    holder = inner != NULL ? rope : root;
    QS_TRY(qs_hf_get_f64(holder, "rope_theta", 1e-3, 1e12, usual, &out->rope_theta, path));
    QS_TRY(parse_rotary_dim(out, arch, root, rope, path));
    out->rope_factor = out->rope_magnitude = 1.0;
    if (rope == NULL) {
        return QS_OK;
    }
    QS_TRY(parse_rope_type(out, arch, rope, path));
    return parse_rope_scaling(out, arch, root, rope, path);
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
    return cfg->rotary_dim * log(original / (turns * 6.28318530717958647692)) /
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
    high = fmin(high, cfg->rotary_dim - 1);
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
    const float exponent = (float)(2 * i) / (float)cfg->rotary_dim;
    return (float)pow(theta, (double)exponent);
}

/* The base, larger for sequences beyond max_position (NTK scaling by length). There transformers
 * computes with fp32 tensors, below it with the number as it is. */
static double dynamic_theta(const qs_hf_config *cfg, int64_t seq_len)
{
    if (seq_len <= cfg->max_position) {
        return cfg->rope_theta;
    }
    const float grown = (float)cfg->rope_factor * (float)seq_len / (float)cfg->max_position -
                        (float)(cfg->rope_factor - 1.0);
    const double power = (double)cfg->rotary_dim / (cfg->rotary_dim - 2);
    return (double)((float)cfg->rope_theta * (float)pow((double)grown, (double)(float)power));
}

void qs_hf_rope_local_frequencies(const qs_hf_config *cfg, double *inv_freq)
{
    for (int i = 0; i < cfg->rotary_dim / 2; i++) {
        inv_freq[i] = (double)(1.0F / rope_period(cfg, cfg->rope_local_theta, i));
    }
}

void qs_hf_rope_frequencies(const qs_hf_config *cfg, int64_t seq_len, double *inv_freq)
{
    const bool dynamic = cfg->rope_type == QS_ROPE_DYNAMIC;
    const double theta = dynamic ? dynamic_theta(cfg, seq_len) : cfg->rope_theta;
    const double *factors =
        seq_len > cfg->rope_original_max_position ? cfg->rope_long_factor : cfg->rope_short_factor;
    for (int i = 0; i < cfg->rotary_dim / 2; i++) {
        const float period = rope_period(cfg, theta, i);
        float f = 1.0F / period;
        if (cfg->rope_type == QS_ROPE_LINEAR) {
            f /= (float)cfg->rope_factor;
        } else if (cfg->rope_type == QS_ROPE_LLAMA3) {
            f = llama3_scaled(cfg, f);
        } else if (cfg->rope_type == QS_ROPE_YARN) {
            f = yarn_scaled(cfg, i, period);
        } else if (cfg->rope_type == QS_ROPE_LONGROPE) {
            f = 1.0F / ((float)factors[i] * period);
        }
        inv_freq[i] = (double)f;
    }
}
