/* The model: forward, loss and backward of a pass, layer by layer over gathered units.
 *
 * A pass takes a group of up to G micro-batches through every unit in turn (layer-outer
 * accumulation), so that a unit is gathered once per direction for the whole group. Every launch
 * sees one micro-batch. A rank without work joins every gather. */
#ifndef QS_MODEL_MODEL_H
#define QS_MODEL_MODEL_H

#include <stdbool.h>
#include <stdint.h>

#include "config/config.h"
#include "data/data.h"
#include "fsdp/fsdp.h"
#include "fsdp/grads.h"
#include "kernels/ops.h"

typedef struct qs_model qs_model;

/** What a model is built for: buffers are allocated once, from these. */
typedef struct {
    int64_t max_tokens;  /* of one micro-batch */
    int64_t max_targets; /* of one micro-batch */
    int64_t seq_len;     /* of the run: RoPE that scales by length goes by it, for all sequences
                            alike */
    int64_t group;       /* micro-batches per pass */
    qs_recompute recompute;
    bool backward;           /* false: evaluation only */
    int64_t logit_rows;      /* rows of one qs_model_logits; 0: not asked for */
    int64_t head_chunk_rows; /* of the base */
    bool offload;            /* keep the layers' inputs in pinned host memory (recompute: full) */
    int64_t keep_resident;   /* layers that stay whole on every rank (fsdp.h); and as many, if they
                                are more, as stay decoded: */
    int64_t keep_decoded;    /* layers whose decoded weights stay; 0 where operations keep none */
    bool residual_f32;       /* the residual stream in fp32, whatever the operations' act_dtype */
} qs_model_shape;

/** One micro-batch of a pass. */
typedef struct {
    const qs_batch *batch; /* NULL or n_tokens 0: nothing to compute, contributes zeros */
    int64_t slot; /* its number in the step; -1: this rank has no slot in this place of the pass */
    double loss_sum; /* out: sum over its targets, fp64 in row order */
} qs_micro_batch;

/** All pointers are borrowed for the life of the model. `lora` is the full LoRA vector, [n_layers
 * * per_layer] of the ops' act_dtype on the queue's device; NULL: base only. `magnitudes`: DoRA's,
 * [n_layers * qs_lora_magnitudes] in fp32 there; NULL: they are read of `lora`, which is fp32.
 * `ops` must be open on `queue`. */
qs_status qs_model_create(qs_model **out, const qs_base_index *index, qs_fsdp *fsdp,
                          const qs_ops *ops, qs_queue *queue, const qs_lora_layout *layout,
                          const void *lora, const float *magnitudes, const qs_model_shape *shape);
void qs_model_destroy(qs_model *model);

/** `lora` and `magnitudes` have new values: what was derived from them (DoRA's norms) is computed
 * again in the next pass. */
void qs_model_adapter_changed(qs_model *model);

/** DoRA's start: the norms of the rows of every adapted W, for elements `elements` of the layers'
 * segments (lora.h); those of layer l go to out + l * stride, on the host, where nothing but
 * magnitudes is written. Does nothing without DoRA. Collective; waits. */
qs_status qs_model_magnitudes(qs_model *model, qs_range elements, int64_t stride, float *out);

/** What the operations must be opened for (qs_ops_limits.kept_units) so that so many layers stay.
 */
int qs_model_kept_units(const qs_hf_config *config, const qs_model_shape *shape);

/** Does this linear of a layer read the x of the one before it, and can they be one product
 * (qs_ops_limits.joined)? Not with norms of heads, which want q and k apart, nor with DoRA, whose
 * gains come between. */
bool qs_model_joins(const qs_hf_config *config, bool dora, qs_linear linear);

/** Bytes that qs_model_create will allocate on the device, by class, for the plan; and, with
 * `offload`, in pinned host memory. */
typedef struct {
    size_t activation_bytes, work_bytes, small_bytes, input_bytes;
    size_t adapter_bytes; /* derived from the adapter */
    size_t host_activation_bytes;
} qs_model_bytes;
qs_model_bytes qs_model_plan(const qs_hf_config *config, const qs_lora_layout *layout,
                             const qs_ops *ops, const qs_model_shape *shape);

/** Dropout of a training step: probability and key. */
typedef struct {
    float dropout;
    uint64_t seed, step;
} qs_model_noise;

/** Forward, loss and backward of `group[count]` (count <= shape.group; the same on every rank).
 * The gradient of the loss sum times `loss_scale` goes into `grads`; after the last pass of a
 * step (`reduce`) each layer's reduction starts as soon as its backward ends. `next` [count]: what
 * the very next pass of this model will be given as `group`, whose rows of the embedding come
 * behind this pass; NULL where that is not known. Collective over the ranks that share the base;
 * waits. */
qs_status qs_model_train_pass(qs_model *model, qs_micro_batch *group, const qs_micro_batch *next,
                              int64_t count, float loss_scale, const qs_model_noise *noise,
                              qs_grads *grads, bool reduce);

/** Forward and loss only. Collective over the ranks that share the base; waits. */
qs_status qs_model_eval_pass(qs_model *model, qs_micro_batch *group, const qs_micro_batch *next,
                             int64_t count);

/** Logits of the last token of each document of `batch` ([n_docs, vocab]) or, with `all`, of every
 * token, in host memory. Collective. */
qs_status qs_model_logits(qs_model *model, const qs_batch *batch, bool all, float *logits);

/** Units in the order in which a pass uses them: layers up, head and, with `backward`, layers down.
 * \param [out] units  [3 n_units].
 * \return how many. */
int qs_model_order(const qs_base_index *index, bool backward, int *units);

/** What a layer takes on this rank. */
typedef struct {
    double gather_s[2]; /* of a layer, and of another, from all others of the group: the first opens
                           connections; 0: there is none that is gathered */
    size_t gather_bytes; /* that each of them sends */
    double token_s;      /* of a layer's forward, for each token; 0: not measured */
} qs_probe;

/** Measure it, before the first pass: the forward of `tokens` tokens (at most max_tokens; 0: none)
 * in documents of `length`. Collective. */
qs_status qs_model_probe(qs_model *model, int64_t tokens, int64_t length, qs_probe *out);

/** Floating-point operations of this rank so far: 2 per multiply-add of linears, LoRA, attention
 * (visible pairs) and head (flops.h). */
double qs_model_flops(const qs_model *model);

#endif
