/* The LoRA vector: every adapter weight of the model in one order, cut into chunks and shared out
 * over the ranks.
 *
 *   unit (layer) u:  | A_q | B_q | A_k | B_k | ... targets in qs_linear order | padding to 4096 |
 *   with DoRA:       | A_q | B_q | m_q | A_k | B_k | m_k | ...    m: magnitudes [out]
 *
 * A unit's segment has C chunks of 4,096 elements; rank r owns chunks [r p, (r+1) p), p = ceil(C
 * / N). All layers are alike, so one layout serves them all. Sums over the vector (norm, slot
 * tree) run in chunk order and are independent of N. */
#ifndef QS_LORA_LORA_H
#define QS_LORA_LORA_H

#include <stdint.h>

#include "config/config.h"
#include "hf/hf_config.h"
#include "shard/shard.h"
#include "store/hash.h"

enum { QS_LORA_CHUNK = 4096 };

/** How peft calls the modules of the model: one of text alone, or the text part of another
 * (qs_hf_config.part_of), as it is called today and was before transformers 4.52. */
typedef enum {
    QS_PEFT_PLAIN,
    QS_PEFT_TEXT_PART,
    QS_PEFT_TEXT_PART_OLD,
    QS_PEFT_NAMINGS,
} qs_peft_naming;

typedef struct {
    int n_layers;
    qs_peft_naming naming; /* of what is written; any is read */
    int lora_rank;
    float scale;
    bool dora;
    bool targeted[QS_LINEAR_COUNT];
    int64_t out[QS_LINEAR_COUNT], in[QS_LINEAR_COUNT];
    int64_t a_at[QS_LINEAR_COUNT],
        b_at[QS_LINEAR_COUNT];     /* element offsets in the layer's segment; -1 */
    int64_t m_at[QS_LINEAR_COUNT]; /* of the magnitudes; -1 without DoRA */
    int64_t used;                  /* elements of a layer that are weights */
    int64_t chunks;                /* per layer */
    int64_t per_layer;             /* chunks * 4096 */
} qs_lora_layout;

/** Layout for a model and a configuration. */
qs_status qs_lora_layout_make(qs_lora_layout *out, const qs_hf_config *model, const qs_config *cfg);

/** The same from the shapes of the linears, [QS_LINEAR_COUNT] each, 0 where layers have none: what
 * a checkpoint records. Names are plain. */
qs_status qs_lora_layout_of_shapes(qs_lora_layout *out, int n_layers, const int64_t *out_features,
                                   const int64_t *in_features, const qs_config *cfg);

/** Check that a layout that came with an adapter is one for `model`; `adapter` and `base` are their
 * paths, for the message. \return QS_ERR_INPUT_TENSOR. */
qs_status qs_lora_layout_check(const qs_lora_layout *layout, const qs_hf_config *model,
                               const char *adapter, const char *base);

/** Weights in all: n_layers * used. */
int64_t qs_lora_count(const qs_lora_layout *layout);

/** This rank's chunks of a layer, in elements: [begin, end) of the segment. */
qs_range qs_lora_shard(const qs_lora_layout *layout, int rank, int nranks);

/** Elements of a layer per rank, padded: p * 4096, the same on every rank. */
int64_t qs_lora_shard_width(const qs_lora_layout *layout, int nranks);

/** DoRA's magnitudes of a layer, its linears one behind the other: how many there are (0 without
 * DoRA), those that lie in this rank's chunks, and the most that lie in any rank's. */
int64_t qs_lora_magnitudes(const qs_lora_layout *layout);
qs_range qs_lora_magnitude_shard(const qs_lora_layout *layout, int rank, int nranks);
int64_t qs_lora_magnitude_width(const qs_lora_layout *layout, int nranks);

/** One tensor of a linear's adapter. */
typedef struct {
    char which; /* 'A', 'B', 'm': DoRA's magnitudes */
    int64_t at; /* in the segment */
    int rank;   /* dimensions */
    int64_t shape[2];
    int64_t count;
} qs_lora_part;

enum { QS_LORA_PARTS_MAX = 3 };

/** The tensors of a linear's adapter, in the order of the segment. \return how many; 0: no adapter.
 */
int qs_lora_parts(const qs_lora_layout *layout, int linear, qs_lora_part out[QS_LORA_PARTS_MAX]);

/** A stretch of a segment that is one tensor. */
typedef struct {
    qs_range elements;
    char which; /* as in qs_lora_part */
} qs_lora_stretch;

enum { QS_LORA_STRETCHES_MAX = QS_LORA_PARTS_MAX * QS_LINEAR_COUNT };

/** The stretches of `elements` of a segment, in order; padding is in none. \return how many. */
int qs_lora_stretches(const qs_lora_layout *layout, qs_range elements,
                      qs_lora_stretch out[QS_LORA_STRETCHES_MAX]);

/** Initial value of one element of layer `layer`: A ~ U(-1/sqrt(in), 1/sqrt(in)) by counter from
 * `seed`, B = 0, padding 0. Magnitudes are left 0: they come from the base (qs_model_magnitudes).
 */
void qs_lora_init(const qs_lora_layout *layout, uint64_t seed, int layer, qs_range elements,
                  float *out);

/** PEFT name of a weight: base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight; of
 * magnitudes ...q_proj.lora_magnitude_vector, as peft writes it. */
void qs_lora_peft_name(char *out, size_t capacity, qs_peft_naming naming, int layer,
                       qs_linear linear, char which);

/** What adapter_config.json says, as far as it matters here. */
typedef struct {
    int64_t lora_rank;
    double alpha, dropout;
    bool rslora, dora;
} qs_peft_config;

/** Read and parse DIR/adapter_config.json. */
qs_status qs_peft_config_read(qs_peft_config *out, const char *dir);

/** The linears (bit per qs_linear) of which DIR/adapter_model.safetensors has tensors. \return
 * QS_ERR_INPUT_TENSOR naming a tensor of anything else, or the first layer that differs. */
qs_status qs_peft_targets(const char *dir, uint32_t *targets);

/** An open PEFT adapter directory (peft_read.c). */
typedef struct qs_peft qs_peft;

/** Open DIR (adapter_config.json, adapter_model.safetensors) and check that it fits: rank, alpha,
 * targets, shapes. */
qs_status qs_peft_open(qs_peft **out, const char *dir, const qs_lora_layout *layout);
/** Settings that a PEFT directory carries, for commands that take them from there. */
qs_status qs_peft_settings(const char *dir, qs_config *cfg);
/** Fill the whole segment [per_layer] of a layer. */
qs_status qs_peft_read_layer(qs_peft *peft, int layer, float *segment);
void qs_peft_close(qs_peft *peft);

/** The file beside an adapter that says which base it was trained on. */
#define QS_PEFT_ORIGIN_NAME "qshard.json"

/** hashes_sha256 of the base that DIR/qshard.json names; "" where there is no such file. */
qs_status qs_peft_read_base(const char *dir, char out[QS_SHA256_HEX]);

/** Refuse an adapter that says that it was trained on another base than `base`, whose
 * hashes_sha256 is given; one that does not say it is taken. \return QS_ERR_INPUT_HASH. */
qs_status qs_peft_expect_base(const char *dir, const char *base_sha256, const char *base);

/** Write a PEFT adapter directory: `vector` [n_layers * per_layer] complete. `base_sha256`:
 * hashes_sha256 of the base that it was trained on; NULL: not known. `chat_template` goes into a
 * file beside it; NULL: none. A temporary directory, read back, renamed. QS_ERR_OUTPUT_TAKEN if DIR
 * exists. */
qs_status qs_peft_write(const char *dir, const qs_lora_layout *layout, const qs_config *cfg,
                        const char *base_name, const char *base_sha256, const char *chat_template,
                        const float *vector);

/** Write any LoRA-shaped vector as one safetensors file with PEFT names (train --dump-grads),
 * marked with `mark` (qs_st_write). */
qs_status qs_peft_write_tensors(const char *path, const qs_lora_layout *layout, const float *vector,
                                const char *mark);

#endif
