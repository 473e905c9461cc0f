/* Floating-point operations of a pass, 2 per multiply-add of linears, adapters, attention and head:
 * what a run counts (qs_model_flops) and what a forecast foresees are made of these. Norms, gates,
 * RoPE and the norms of DoRA's rows are not counted. Arithmetic only. */
#ifndef QS_MODEL_FLOPS_H
#define QS_MODEL_FLOPS_H

#include "lora/lora.h"

/** What the work of a linear depends on besides tokens. */
typedef struct {
    const qs_hf_config *config;
    const qs_lora_layout *lora; /* NULL: base only */
    bool dropout; /* of adapters: with DoRA W then multiplies x and drop(x), which differ */
} qs_flops;

/** A linear and its adapter upwards; 0 for one that layers do not have. */
double qs_flops_forward(const qs_flops *f, qs_linear linear, double tokens);

/** Downwards: gradients of the adapter and, with DoRA, of its magnitudes, which takes W once more;
 * with `dx` the gradient of the input. Below the first layer nothing is trained, so there it is
 * wanted of none of q, k and v. */
double qs_flops_backward(const qs_flops *f, qs_linear linear, double tokens, bool dx);

/** Query-key pairs that the mask and, unless it is 0, a window let through in a document. */
double qs_flops_pairs(double tokens, double window);

/** Two products of scores and V, downwards four: scores that are computed again do not count. */
double qs_flops_attention(const qs_hf_config *config, double pairs, bool backward);

/** Logits of `rows` that carry loss over so many rows of the vocabulary; with `gradient` the sum of
 * W that they weight. */
double qs_flops_head(const qs_hf_config *config, double rows, double vocab, bool gradient);

#endif
