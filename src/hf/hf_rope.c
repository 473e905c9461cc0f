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

static qs_status parse_rope_type(qs_hf_config *out, const json_t *rope, const char *path)
{
    static const char *const names[] = {[QS_ROPE_DEFAULT] = "default",
                                        [QS_ROPE_LLAMA3] = "llama3",
                                        [QS_ROPE_LINEAR] = "linear",
                                        [QS_ROPE_YARN] = "yarn"};
    const char *key = qs_hf_given(rope, "rope_type") != NULL ? "rope_type" : "type";
    const char *name = "default";
    if (qs_hf_given(rope, key) != NULL) {
        QS_TRY(qs_json_text(rope, key, &name, path));
    }
    for (size_t i = 0; i < QS_HF_COUNT(names); i++) {
        if (strcmp(names[i], name) == 0) {
            out->rope_type = (qs_rope_type)i;
            return QS_OK;
        }
    }
    return qs_hf_refuse(path, "rope_type", name, "\"default\", \"linear\", \"llama3\" or \"yarn\"");
}

static qs_status check_rope_keys(const qs_hf_config *out, const json_t *rope, const char *path)
{
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)(uintptr_t)rope, key, value)
    {
        if (!json_is_null(value) && !qs_hf_listed(rope_keys, QS_HF_COUNT(rope_keys), key)) {
            return QS_FAIL(QS_ERR_INPUT_UNKNOWN, "%s: RoPE key \"%.100s\" is not known", path, key);
        }
    }
    for (size_t i = 0; i < QS_HF_COUNT(own_rope_keys); i++) {
        if (qs_hf_given(rope, own_rope_keys[i].key) != NULL &&
            out->rope_type != own_rope_keys[i].type) {
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

static qs_status parse_rope_scaling(qs_hf_config *out, const json_t *rope, const char *path)
{
    if (out->rope_type != QS_ROPE_DEFAULT && qs_hf_given(rope, "factor") == NULL) {
        return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: RoPE \"factor\" is missing", path);
    }
    QS_TRY(qs_hf_get_f64(rope, "factor", 1.0, 1e6, 1.0, &out->rope_factor, path));
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
    const json_t *inner = qs_hf_given(rope, "rope_theta");
    const json_t *outer = qs_hf_given(root, "rope_theta");
    if (inner != NULL && outer != NULL && json_number_value(inner) != json_number_value(outer)) {
        return QS_FAIL(QS_ERR_INPUT_VALUE,
                       "%s: \"rope_theta\" at top level and in \"rope_parameters\" differ", path);
    }
    holder = inner != NULL ? rope : root;
    QS_TRY(qs_hf_get_f64(holder, "rope_theta", 1e-3, 1e12, usual, &out->rope_theta, path));
    holder = qs_hf_given(rope, "partial_rotary_factor") != NULL ? rope : root;
    QS_TRY(qs_hf_get_f64(holder, "partial_rotary_factor", 0.0, 1.0, 1.0, &partial, path));
    if (partial != 1.0) {
        return qs_hf_refuse(path, "partial_rotary_factor", "a number below 1", "1");
    }
    out->rope_factor = out->rope_magnitude = 1.0;
    if (rope == NULL) {
        return QS_OK;
    }
    QS_TRY(parse_rope_type(out, rope, path));
    return parse_rope_scaling(out, rope, path);
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
