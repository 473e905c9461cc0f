/* A tiny Llama or Phi-3 checkpoint on disk for tests: random weights by seed, with the variations
 * that the quantizer must handle. */
#ifndef QS_TESTS_TINY_HF_H
#define QS_TESTS_TINY_HF_H

#include <stdbool.h>

#include "base/dtype.h"

typedef enum { TINY_FLOAT, TINY_BNB_NESTED, TINY_BNB_PLAIN } tiny_scheme;

typedef struct {
    qs_dtype dtype; /* of every tensor; dequantization type of bitsandbytes ones */
    tiny_scheme scheme;
    bool untied, biases;
    bool fused;        /* Phi-3: one linear for q, k and v, one for gate and up */
    bool zero_rows;    /* gate_proj of layer 0 is all zero */
    bool foreign_map;  /* bitsandbytes: the second-level map differs from ours in one entry */
    bool bf16_storage; /* bitsandbytes: packed bytes declared as BF16 */
    int leave_raw; /* bitsandbytes: number + 1 of the linear of layer 0 that stays as it is; 0: none
                    */
    const char *drop;   /* name of a tensor to leave out */
    const char *add;    /* name of a tensor to add */
    const char *poison; /* name of a float tensor whose element 7 is to be NaN */
    const char *state;  /* bitsandbytes: text that replaces the quant_state of layer 0's q_proj */
    const char *config; /* members to append to config.json, with a leading comma */
} tiny_hf;

enum {
    TINY_LAYERS = 2,
    TINY_HIDDEN = 72, /* no multiple of 64: blocks cross rows */
    TINY_FFN = 500,   /* 36,000 weights: three quanta, the last one ragged */
    TINY_HEADS = 4,
    TINY_KV_HEADS = 2,
    TINY_HEAD_DIM = 18,
    TINY_VOCAB = 301,
};

/** Linears of a layer. */
int tiny_hf_linears(const tiny_hf *options);

/** Write config.json and model.safetensors into an existing directory. Asserts by Criterion. */
void tiny_hf_write(const char *dir, const tiny_hf *options);

#endif
