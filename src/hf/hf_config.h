/* config.json of a Hugging Face checkpoint, for the architectures that are supported (hf_arch.c),
 * in both spellings (transformers 4 and 5). What is not known is refused by name, never ignored. */
#ifndef QS_HF_HF_CONFIG_H
#define QS_HF_HF_CONFIG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/dtype.h"
#include "base/status.h"
#include "kernels/ops.h"

enum { QS_HEAD_DIM_MAX = 1024, QS_LAYERS_MAX = 1000, QS_HF_TYPE_BYTES = 32 };

/** The linears of a layer, in the order that units and the LoRA vector use. Phi-3 has one for q, k
 * and v, whose rows stand in this order, and one for gate and up: stored, quantized and adapted as
 * one; so no layer has all. */
typedef enum {
    QS_Q,
    QS_K,
    QS_V,
    QS_O,
    QS_GATE,
    QS_UP,
    QS_DOWN,
    QS_QKV,
    QS_GATE_UP,
    QS_LINEAR_COUNT
} qs_linear;

/** Sets of them, a bit each: what makes q, k and v, what makes gate and up, and what stands before
 * the MLP. */
enum {
    QS_LINEARS_QKV = 1 << QS_Q | 1 << QS_K | 1 << QS_V | 1 << QS_QKV,
    QS_LINEARS_GATE_UP = 1 << QS_GATE | 1 << QS_UP | 1 << QS_GATE_UP,
    QS_LINEARS_ATTENTION = QS_LINEARS_QKV | 1 << QS_O,
    QS_LINEARS_DOWN = 1 << QS_DOWN,
    QS_LINEARS_ALL = (1 << QS_LINEAR_COUNT) - 1,
};

typedef enum {
    QS_ROPE_DEFAULT,
    QS_ROPE_LLAMA3,
    QS_ROPE_LINEAR,
    QS_ROPE_YARN,
    QS_ROPE_LONGROPE,
    QS_ROPE_DYNAMIC,
} qs_rope_type;

/** Where attention and MLP have norms: in front of them, behind them (before the residual is
 * added), or both. */
typedef enum { QS_NORMS_IN_FRONT, QS_NORMS_BEHIND, QS_NORMS_BOTH } qs_norms;

typedef struct {
    char model_type[QS_HF_TYPE_BYTES]; /* "llama", "mistral", ... */
    char part_of[QS_HF_TYPE_BYTES];    /* model_type of the model of text and images that it is the
                                          text part of (hf_text_part.h); "": a model of its own */
    int n_layers, n_heads, n_kv_heads, head_dim;
    int64_t hidden, ffn_hidden, vocab;
    int64_t max_position;
    float rms_norm_eps;
    bool tied;                     /* head = embedding table */
    bool fused;                    /* one linear for q, k and v, one for gate and up */
    bool bias[QS_LINEAR_COUNT];    /* the linear has one */
    bool qk_norm;                  /* RMSNorm over each head of q and k, before RoPE */
    bool norm_plus_one;            /* norms multiply by 1 + w, not by w */
    qs_glu glu;                    /* what gates the MLP */
    float score_scale;             /* of scores: 1 / sqrt(head_dim) but for Gemma and Granite */
    bool embedding_factor_rounded; /* embedding_multiplier is, to the type of the rows */
    double embedding_multiplier;  /* Gemma: sqrt(hidden); 1 but for it and Granite, as are these: */
    double residual_multiplier;   /* of what attention and MLP add to the residual stream */
    double logits_scaling;        /* logits are divided by it */
    int64_t window;               /* keys that a query of a windowed layer sees; 0: no such layer */
    bool windowed[QS_LAYERS_MAX]; /* [n_layers] */
    bool unturned[QS_LAYERS_MAX]; /* [n_layers]: without RoPE */
    float attention_cap;          /* of scores; 0: none */
    float final_cap;              /* of logits; 0: none */
    int rotary_dim;               /* elements of a head that RoPE turns, the first ones */
    double rope_theta;
    double rope_local_theta; /* of windowed layers, which then scale nothing; 0: as the others */
    qs_rope_type rope_type;
    double rope_factor, rope_low_freq_factor, rope_high_freq_factor;
    int64_t rope_original_max_position;
    double rope_beta_fast, rope_beta_slow; /* turns of a frequency that yarn keeps, and divides */
    bool rope_truncate;                    /* yarn's borders are whole numbers */
    double rope_magnitude;                 /* of cosine and sine; 1 but for yarn and longrope */
    /* longrope: what periods are multiplied by, [rotary_dim / 2] */
    double rope_short_factor[QS_HEAD_DIM_MAX / 2], rope_long_factor[QS_HEAD_DIM_MAX / 2];
    qs_norms norms;
    bool qk_whole;  /* with qk_norm: over all heads of a token together */
    qs_dtype dtype; /* of the checkpoint */
    /* quantization_config of a bitsandbytes checkpoint */
    bool bnb_4bit;
} qs_hf_config;

/** Parse the text of config.json. Pure: no I/O. */
qs_status qs_hf_config_parse(qs_hf_config *out, const char *text, size_t bytes, const char *path);

/** Inverse frequencies of RoPE [rotary_dim / 2], with scaling: fp32 values, rounded as transformers
 * rounds them. What longrope and dynamic scaling give depends on `seq_len`, the longest sequence:
 * above the original length long factors in place of the short ones, above max_position a larger
 * base. */
void qs_hf_rope_frequencies(const qs_hf_config *cfg, int64_t seq_len, double *inv_freq);
/** The same of windowed layers, where these have their own: rope_local_theta is not 0. */
void qs_hf_rope_local_frequencies(const qs_hf_config *cfg, double *inv_freq);

/** "self_attn.q_proj" ... "mlp.gate_up_proj". */
const char *qs_linear_path(qs_linear linear);
/** Those of a layer, a bit per qs_linear. */
uint32_t qs_linears(bool fused);
/** Shape of a linear [out, in]; [0, 0] if layers have none of this name. */
void qs_linear_shape(const qs_hf_config *cfg, qs_linear linear, int64_t *out, int64_t *in);
/** Whether attention and MLP have a norm in front of them, and behind them. */
bool qs_norms_in_front(const qs_hf_config *cfg);
bool qs_norms_behind(const qs_hf_config *cfg);
/** Columns of the norm over q (or k) with so many heads: those of a head or of all; 0: none. */
int64_t qs_qk_norm_width(const qs_hf_config *cfg, int heads);

/** The norms of a layer, in the order of units. */
typedef enum {
    QS_NORM_INPUT,
    QS_NORM_POST_ATTENTION, /* in front of the MLP where none stand behind, else behind attention */
    QS_NORM_PRE_FEEDFORWARD,
    QS_NORM_POST_FEEDFORWARD,
    QS_NORM_Q,
    QS_NORM_K,
    QS_NORM_COUNT
} qs_norm;

/** "input_layernorm" ... "self_attn.k_norm". */
const char *qs_norm_path(qs_norm norm);
/** Its columns; 0: layers have none of this name. */
int64_t qs_norm_width(const qs_hf_config *cfg, qs_norm norm);

#endif
