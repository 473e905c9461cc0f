/* The linears and norms of a layer: their names and shapes. */
#include "hf/hf_config.h"

const char *qs_linear_path(qs_linear linear)
{
    static const char *const paths[QS_LINEAR_COUNT] = {
        [QS_Q] = "self_attn.q_proj",      [QS_K] = "self_attn.k_proj",
        [QS_V] = "self_attn.v_proj",      [QS_O] = "self_attn.o_proj",
        [QS_GATE] = "mlp.gate_proj",      [QS_UP] = "mlp.up_proj",
        [QS_DOWN] = "mlp.down_proj",      [QS_QKV] = "self_attn.qkv_proj",
        [QS_GATE_UP] = "mlp.gate_up_proj"};
    return paths[linear];
}

uint32_t qs_linears(bool fused)
{
    const uint32_t both = 1u << QS_O | 1u << QS_DOWN, one = 1u << QS_QKV | 1u << QS_GATE_UP;
    return fused ? both | one : QS_LINEARS_ALL & ~one;
}

void qs_linear_shape(const qs_hf_config *cfg, qs_linear linear, int64_t *out, int64_t *in)
{
    int64_t q = (int64_t)cfg->n_heads * cfg->head_dim;
    int64_t kv = (int64_t)cfg->n_kv_heads * cfg->head_dim;
    const struct {
        int64_t out, in;
    } shapes[QS_LINEAR_COUNT] = {
        [QS_Q] = {q, cfg->hidden},
        [QS_K] = {kv, cfg->hidden},
        [QS_V] = {kv, cfg->hidden},
        [QS_O] = {cfg->hidden, q},
        [QS_GATE] = {cfg->ffn_hidden, cfg->hidden},
        [QS_UP] = {cfg->ffn_hidden, cfg->hidden},
        [QS_DOWN] = {cfg->hidden, cfg->ffn_hidden},
        [QS_QKV] = {q + 2 * kv, cfg->hidden},
        [QS_GATE_UP] = {2 * cfg->ffn_hidden, cfg->hidden},
    };
    const bool present = qs_linears(cfg->fused) >> linear & 1;
    *out = present ? shapes[linear].out : 0;
    *in = present ? shapes[linear].in : 0;
}

bool qs_norms_in_front(const qs_hf_config *cfg)
{
    return cfg->norms != QS_NORMS_BEHIND;
}

bool qs_norms_behind(const qs_hf_config *cfg)
{
    return cfg->norms != QS_NORMS_IN_FRONT;
}

int64_t qs_qk_norm_width(const qs_hf_config *cfg, int heads)
{
    return !cfg->qk_norm ? 0 : (int64_t)(cfg->qk_whole ? heads : 1) * cfg->head_dim;
}

const char *qs_norm_path(qs_norm norm)
{
    static const char *const paths[QS_NORM_COUNT] = {
        [QS_NORM_INPUT] = "input_layernorm",
        [QS_NORM_POST_ATTENTION] = "post_attention_layernorm",
        [QS_NORM_PRE_FEEDFORWARD] = "pre_feedforward_layernorm",
        [QS_NORM_POST_FEEDFORWARD] = "post_feedforward_layernorm",
        [QS_NORM_Q] = "self_attn.q_norm",
        [QS_NORM_K] = "self_attn.k_norm"};
    return paths[norm];
}

int64_t qs_norm_width(const qs_hf_config *cfg, qs_norm norm)
{
    const bool front = qs_norms_in_front(cfg), behind = qs_norms_behind(cfg);
    const int64_t widths[QS_NORM_COUNT] = {[QS_NORM_INPUT] = front ? cfg->hidden : 0,
                                           [QS_NORM_POST_ATTENTION] = cfg->hidden,
                                           [QS_NORM_PRE_FEEDFORWARD] =
                                               front && behind ? cfg->hidden : 0,
                                           [QS_NORM_POST_FEEDFORWARD] = behind ? cfg->hidden : 0,
                                           [QS_NORM_Q] = qs_qk_norm_width(cfg, cfg->n_heads),
                                           [QS_NORM_K] = qs_qk_norm_width(cfg, cfg->n_kv_heads)};
    return widths[norm];
}
