/* Where each adapter weight lies in the LoRA vector, and what it starts as. */
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/rng.h"
#include "lora/lora_impl.h"

float qs_lora_scale(double alpha, int64_t lora_rank, bool rslora)
{
    double rank = (double)lora_rank;
    return (float)(alpha / (rslora ? sqrt(rank) : rank));
}

/* Only a named set may name linears that the model does not have. */
static qs_status check_targets(const int64_t *out_features, const qs_config *cfg)
{
    for (int i = 0; i < QS_LINEAR_COUNT; i++) {
        const bool absent = cfg->lora.targets >> i & 1 && out_features[i] == 0;
        if (absent && !(cfg->lora.targets & QS_TARGETS_SET)) {
            return QS_FAIL(QS_ERR_CONFIG_VALUE,
                           "lora.targets: the layers of this model have no %s, but %s and %s; name "
                           "those, or all-linear",
                           qs_linear_path((qs_linear)i),
                           qs_linear_path(out_features[QS_QKV] > 0 ? QS_QKV : QS_Q),
                           qs_linear_path(out_features[QS_QKV] > 0 ? QS_GATE_UP : QS_GATE));
        }
    }
    return QS_OK;
}

qs_status qs_lora_layout_of_shapes(qs_lora_layout *out, int n_layers, const int64_t *out_features,
                                   const int64_t *in_features, const qs_config *cfg)
{
    QS_TRY(check_targets(out_features, cfg));
    memset(out, 0, sizeof *out);
    out->n_layers = n_layers;
    out->lora_rank = (int)cfg->lora.rank;
    out->scale = qs_lora_scale(cfg->lora.alpha, cfg->lora.rank, cfg->lora.rslora);
    out->dora = cfg->lora.dora;
    for (int i = 0; i < QS_LINEAR_COUNT; i++) {
        out->out[i] = out_features[i];
        out->in[i] = in_features[i];
        out->a_at[i] = out->b_at[i] = out->m_at[i] = -1;
        out->targeted[i] = cfg->lora.targets >> i & 1 && out->out[i] > 0;
        if (!out->targeted[i]) {
            continue;
        }
        /* Ranges of config.json and of lora.rank keep these products below 2^50. */
        out->a_at[i] = out->used;
        out->b_at[i] = out->a_at[i] + cfg->lora.rank * out->in[i];
        out->used = out->b_at[i] + out->out[i] * cfg->lora.rank;
        if (out->dora) {
            out->m_at[i] = out->used;
            out->used += out->out[i];
        }
    }
    if (out->used == 0) {
        return QS_FAIL(QS_ERR_CONFIG_VALUE, "lora.targets: no linear is named; nothing to train");
    }
    out->chunks = (out->used + QS_LORA_CHUNK - 1) / QS_LORA_CHUNK;
    out->per_layer = out->chunks * QS_LORA_CHUNK;
    return QS_OK;
}

qs_status qs_lora_layout_make(qs_lora_layout *out, const qs_hf_config *model, const qs_config *cfg)
{
    int64_t out_features[QS_LINEAR_COUNT], in_features[QS_LINEAR_COUNT];
    for (int i = 0; i < QS_LINEAR_COUNT; i++) {
        qs_linear_shape(model, (qs_linear)i, &out_features[i], &in_features[i]);
    }
    QS_TRY(qs_lora_layout_of_shapes(out, model->n_layers, out_features, in_features, cfg));
    out->naming = model->part_of[0] != '\0' ? QS_PEFT_TEXT_PART : QS_PEFT_PLAIN;
    return QS_OK;
}

int64_t qs_lora_count(const qs_lora_layout *layout)
{
    return layout->n_layers * layout->used;
}

qs_range qs_lora_shard(const qs_lora_layout *layout, int rank, int nranks)
{
    qs_range chunks = qs_shard_of(layout->chunks, rank, nranks);
    return (qs_range){chunks.begin * QS_LORA_CHUNK, chunks.end * QS_LORA_CHUNK};
}

int64_t qs_lora_shard_width(const qs_lora_layout *layout, int nranks)
{
    return qs_shard_width(layout->chunks, nranks) * QS_LORA_CHUNK;
}

static int64_t max_of(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

static int64_t min_of(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

int qs_lora_parts(const qs_lora_layout *layout, int linear, qs_lora_part out[QS_LORA_PARTS_MAX])
{
    const int64_t rank = layout->lora_rank, rows = layout->out[linear], in = layout->in[linear];
    if (!layout->targeted[linear]) {
        return 0;
    }
    out[0] = (qs_lora_part){'A', layout->a_at[linear], 2, {rank, in}, rank * in};
    out[1] = (qs_lora_part){'B', layout->b_at[linear], 2, {rows, rank}, rows * rank};
    out[2] = (qs_lora_part){'m', layout->m_at[linear], 1, {rows, 0}, rows};
    return layout->dora ? 3 : 2;
}

int qs_lora_stretches(const qs_lora_layout *layout, qs_range elements,
                      qs_lora_stretch out[QS_LORA_STRETCHES_MAX])
{
    int count = 0;
    for (int i = 0; i < QS_LINEAR_COUNT; i++) {
        qs_lora_part parts[QS_LORA_PARTS_MAX];
        const int n = qs_lora_parts(layout, i, parts);
        for (int k = 0; k < n; k++) {
            const qs_range common = {max_of(parts[k].at, elements.begin),
                                     min_of(parts[k].at + parts[k].count, elements.end)};
            if (common.begin < common.end) {
                out[count++] = (qs_lora_stretch){common, parts[k].which};
            }
        }
    }
    return count;
}

/* Magnitudes in front of element `end` of a segment. */
static int64_t magnitudes_before(const qs_lora_layout *layout, int64_t end)
{
    int64_t count = 0;
    for (int i = 0; i < QS_LINEAR_COUNT; i++) {
        if (layout->m_at[i] >= 0 && layout->m_at[i] < end) {
            count += min_of(layout->out[i], end - layout->m_at[i]);
        }
    }
    return count;
}

int64_t qs_lora_magnitudes(const qs_lora_layout *layout)
{
    return layout->dora ? magnitudes_before(layout, layout->per_layer) : 0;
}

qs_range qs_lora_magnitude_shard(const qs_lora_layout *layout, int rank, int nranks)
{
    const qs_range elements = qs_lora_shard(layout, rank, nranks);
    if (!layout->dora) {
        return (qs_range){0, 0};
    }
    return (qs_range){magnitudes_before(layout, elements.begin),
                      magnitudes_before(layout, max_of(elements.end, elements.begin))};
}

int64_t qs_lora_magnitude_width(const qs_lora_layout *layout, int nranks)
{
    int64_t most = 0;
    for (int r = 0; r < nranks; r++) {
        const qs_range share = qs_lora_magnitude_shard(layout, r, nranks);
        most = max_of(most, share.end - share.begin);
    }
    return most;
}

/* Kaiming uniform with a = sqrt(5) in PEFT's words: U(-1/sqrt(in), 1/sqrt(in)). The counter is the
 * place in the segment, so a value does not depend on who computes it. */
void qs_lora_init(const qs_lora_layout *layout, uint64_t seed, int layer, qs_range elements,
                  float *out)
{
    qs_rng rng = qs_rng_make(seed, 0, 0, QS_RNG_LORA_INIT, (uint32_t)layer);
    memset(out, 0, (size_t)max_of(elements.end - elements.begin, 0) * sizeof *out);
    for (int i = 0; i < QS_LINEAR_COUNT; i++) {
        if (!layout->targeted[i]) {
            continue;
        }
        float bound = (float)(1.0 / sqrt((double)layout->in[i]));
        int64_t begin = max_of(layout->a_at[i], elements.begin);
        int64_t end = min_of(layout->b_at[i], elements.end);
        for (int64_t e = begin; e < end; e++) {
            float unit = 2.0f * qs_rng_uniform(&rng, (uint64_t)e) - 1.0f; /* exact */
            out[e - elements.begin] = unit * bound;
        }
    }
}

/* In front of the number of a layer. */
static const char *const prefixes[QS_PEFT_NAMINGS] = {
    [QS_PEFT_PLAIN] = "base_model.model.model.layers.",
    [QS_PEFT_TEXT_PART] = "base_model.model.model.language_model.layers.",
    [QS_PEFT_TEXT_PART_OLD] = "base_model.model.language_model.model.layers.",
};

void qs_lora_peft_name(char *out, size_t capacity, qs_peft_naming naming, int layer,
                       qs_linear linear, char which)
{
    char part[32] = "magnitude_vector";
    if (which != 'm') {
        snprintf(part, sizeof part, "%c.weight", which);
    }
    snprintf(out, capacity, "%s%d.%s.lora_%s", prefixes[naming], layer, qs_linear_path(linear),
             part);
}

static bool parse_as(const char *name, qs_peft_naming naming, int *layer, qs_linear *linear,
                     char *which)
{
    static const char middle[] = ".lora_";
    const size_t prefix = strlen(prefixes[naming]);
    const char *part = strstr(name, middle);
    if (strncmp(name, prefixes[naming], prefix) != 0 || part == NULL) {
        return false;
    }
    const long number = strtol(name + prefix, NULL, 10);
    const char first = part[sizeof middle - 1];
    for (int i = 0; i < QS_LINEAR_COUNT && number >= 0 && number < INT_MAX; i++) {
        char whole[128];
        *layer = (int)number;
        *linear = (qs_linear)i;
        *which = first;
        qs_lora_peft_name(whole, sizeof whole, naming, *layer, *linear, first);
        if (strcmp(whole, name) == 0) { /* one spelling, so that it is found again */
            return true;
        }
    }
    return false;
}

bool qs_lora_peft_parse(const char *name, qs_peft_naming *naming, int *layer, qs_linear *linear,
                        char *which)
{
    for (int i = 0; i < QS_PEFT_NAMINGS; i++) {
        if (parse_as(name, (qs_peft_naming)i, layer, linear, which)) {
            *naming = (qs_peft_naming)i;
            return true;
        }
    }
    return false;
}

qs_status qs_lora_layout_check(const qs_lora_layout *layout, const qs_hf_config *model,
                               const char *adapter, const char *base)
{
    if (layout->n_layers != model->n_layers) {
        return QS_FAIL(QS_ERR_INPUT_TENSOR,
                       "%s: has adapters for %d layers, but %s has %d; it belongs to another model",
                       adapter, layout->n_layers, base, model->n_layers);
    }
    for (int i = 0; i < QS_LINEAR_COUNT; i++) {
        int64_t out = 0, in = 0;
        qs_linear_shape(model, (qs_linear)i, &out, &in);
        if (layout->out[i] != out || layout->in[i] != in) {
            return QS_FAIL(QS_ERR_INPUT_TENSOR,
                           "%s: %s is [%lld, %lld], but in %s [%lld, %lld]; it belongs to another "
                           "model",
                           adapter, qs_linear_path((qs_linear)i), (long long)layout->out[i],
                           (long long)layout->in[i], base, (long long)out, (long long)in);
        }
    }
    return QS_OK;
}
