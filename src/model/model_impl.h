/* What the files of src/model share: the buffers of a model and the steps through one layer and
 * through the head. */
#ifndef QS_MODEL_MODEL_IMPL_H
#define QS_MODEL_MODEL_IMPL_H

#include "model/model.h"

/** The frozen parameters of one layer: where the linears lie in its unit, and norms and biases as
 * floats. */
typedef struct {
    qs_weight linear[QS_LINEAR_COUNT];
    const float *bias[QS_LINEAR_COUNT]; /* [out] or NULL */
    const float *norm1, *norm2;         /* [hidden] */
} qs_layer_params;

/** What the forward of one layer leaves for its backward, for one micro-batch. Which of the
 * pointers are the layer's own and which are shared between layers (and computed again) is the
 * recompute mode. */
typedef struct {
    float *x;                   /* [T, hidden] input */
    float *rstd1, *rstd2;       /* [T] */
    float *q, *k, *v;           /* after RoPE */
    float *o, *lse;             /* attention output [T, q width], [n_heads, T] */
    float *x2;                  /* [T, hidden] after attention */
    float *gate, *up;           /* [T, ffn] */
    float *xa[QS_LINEAR_COUNT]; /* [T, lora_rank] A x of each linear */
} qs_layer_acts;

/** Scratch shared by all layers and micro-batches. */
typedef struct {
    float *norm;      /* [T, hidden] */
    float *act;       /* [T, ffn] */
    float *d_act;     /* [T, ffn] */
    float *d_norm;    /* [T, hidden] */
    float *d_o, *d_q; /* [T, q width] */
    float *d_k, *d_v; /* [T, kv width] */
    float *delta;     /* [n_heads, T] */
    float *lora;      /* [T, lora_rank] */
    qs_rng *row_rng;  /* [T] */
    float *rows;      /* [R, hidden] */
    float *d_rows;    /* [R, hidden] */
    float *row_loss;  /* [R] */
} qs_model_work;

/** One micro-batch of the group: what it keeps through a pass. */
typedef struct {
    qs_layer_acts *layers; /* [n_layers] */
    float *x_last;         /* [T, hidden] output of the last layer */
    float *dx;             /* [T, hidden] gradient on its way down */
    qs_head_state head;
    int32_t *target_row;  /* [R] rows of the micro-batch that carry loss */
    int32_t *head_target; /* [R] their target ids */
    float *head_rows;     /* [R, hidden] after the final norm; then their gradient */
    float *row_rstd;      /* [R] of the final norm */
} qs_micro_acts;

struct qs_model {
    const qs_base_index *index;
    const qs_hf_config *config;
    qs_fsdp *fsdp;
    const qs_ops *ops;
    qs_queue *queue;
    const qs_lora_layout *layout; /* NULL: base only */
    const float *lora;
    qs_model_shape shape;
    int64_t q_width, kv_width;

    qs_layer_params *layers;
    const float *final_norm;
    float *small;               /* all norms and biases */
    float *rope_cos, *rope_sin; /* [max_tokens, head_dim / 2] */

    void *activation_block, *work_block;
    qs_micro_acts *micro; /* [group] */
    qs_model_work work;
    double flops;
};

/** What one call through a layer works on. */
typedef struct {
    qs_model *model;
    int layer;
    const qs_unit_view *unit;
    const qs_batch *batch;
    const qs_model_noise *noise; /* NULL: no dropout */
    qs_layer_acts *acts;
} qs_layer_call;

qs_mat qs_mat_of(float *data, int64_t rows, int64_t cols);

/** acts->x to `x_next` [T, hidden]. */
qs_status qs_layer_forward(const qs_layer_call *call, float *x_next);

/** Compute again what `recompute` did not keep. */
qs_status qs_layer_recompute(const qs_layer_call *call);

/** `dx` [T, hidden]: gradient of the layer's output, replaced by that of its input; `grad`
 * [per_layer]: LoRA gradients. */
qs_status qs_layer_backward(const qs_layer_call *call, float *dx, float *grad);

/** The rows of a micro-batch that carry loss, through the final norm, into a fresh head state. */
qs_status qs_head_begin(qs_model *model, qs_micro_acts *micro, const qs_batch *batch);

/** All chunks of the vocabulary past all micro-batches of the group; `next` is the unit after the
 * last chunk. */
qs_status qs_head_run(qs_model *model, int64_t count, bool keep, int next);

/** Loss sum of one micro-batch and, with `keep`, the gradient of its last layer's output in
 * micro->dx. */
qs_status qs_head_end(qs_model *model, qs_micro_acts *micro, const qs_batch *batch,
                      float loss_scale, bool keep, double *loss_sum);

/** Lay out all buffers of a model: with model->activation_block NULL only the sizes are computed.
 */
void qs_model_carve(qs_model *model, size_t *activation_bytes, size_t *work_bytes);

/** Load norms, biases, weights' places and RoPE tables. */
qs_status qs_model_load_params(qs_model *model);

#endif
