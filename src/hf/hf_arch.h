/* The architectures that are supported: one row says in what a family differs from Llama. The rows
 * are read where config.json is parsed; everything else asks the parsed configuration. */
#ifndef QS_HF_HF_ARCH_H
#define QS_HF_HF_ARCH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "hf/hf_config.h"

/** Which linears have a bias. */
typedef enum {
    QS_BIAS_BY_KEY, /* attention_bias: q, k, v, o; mlp_bias: gate, up, down */
    QS_BIAS_NEVER,
    QS_BIAS_QKV, /* always q, k and v */
} qs_bias_rule;

/** Which layers see a window of the last positions only. */
typedef enum {
    QS_WINDOW_NEVER,
    QS_WINDOW_ALL,     /* all, when sliding_window is a number */
    QS_WINDOW_UPPER,   /* those from max_window_layers on, when use_sliding_window is true */
    QS_WINDOW_PATTERN, /* all but each n-th: window_pattern */
    QS_WINDOW_NOPE,    /* those without RoPE, when use_sliding_window is true and sliding_window a
                          number */
} qs_window_rule;

/** Which of attn_logit_softcapping and final_logit_softcapping the class computes. */
typedef enum { QS_CAP_NEITHER, QS_CAP_FINAL, QS_CAP_BOTH } qs_cap_rule;

typedef struct {
    const char *model_type; /* "mistral" */
    const char *class_name; /* "MistralForCausalLM" */
    qs_bias_rule bias;
    qs_norms norms;
    /* With qk_norm: rather over all heads of a token together. */
    bool qk_whole;
    bool qk_norm; /* RMSNorm over each head of q and k, before RoPE */
    bool gemma;   /* its kind of file: an embedding times sqrt(hidden) without a key for it;
                     hidden_activation; query_pre_attn_scalar */
    bool norm_plus_one, embedding_factor_rounded; /* hf_config.h */
    qs_glu glu;
    bool tied;  /* unless the file says otherwise */
    bool fused; /* Phi-3's layer: one linear for q, k and v, one for gate and up; RoPE turns a part
                   of each head (partial_rotary_factor), and scales by longrope or not at all; its
                   original length stands at top level */
    qs_window_rule window;
    qs_cap_rule cap;
    bool local_rope;  /* windowed layers turn by rope_local_base_freq, without scaling */
    bool multipliers; /* Granite's: of embedding, scores and branches, and what logits are divided
                         by; 1 where a key is missing, for scores, too */
    /* What a missing key means: the defaults of the class in transformers. 0: as for Llama, that is
     * heads for kv_heads, hidden / heads for head_dim. */
    int64_t hidden, ffn_hidden, vocab, max_position, window_default;
    int n_layers, n_heads, n_kv_heads, head_dim, window_layers, window_pattern;
    int nope_interval; /* each n-th layer is without RoPE, or those that no_rope_layers says; 0:
                          such are not known */
    int64_t original_max_position;
    double eps, rope_theta, rope_local_theta, attention_cap, final_cap;
} qs_hf_arch;

/** The row of `model_type`; NULL if there is none. */
const qs_hf_arch *qs_hf_arch_find(const char *model_type);

/** "\"llama\", \"mistral\", ...": all rows, for messages. */
void qs_hf_arch_names(char *out, size_t capacity);

#endif
