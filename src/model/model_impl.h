/* What the files of src/model share: the buffers of a model and the steps through one layer and
 * through the head. Everything that operations touch lies in device memory. */
#ifndef QS_MODEL_MODEL_IMPL_H
#define QS_MODEL_MODEL_IMPL_H

#include "model/model.h"

/** The frozen parameters of one layer: where the linears lie in its unit, and norms and biases as
 * floats. */
typedef struct {
    qs_weight linear[QS_LINEAR_COUNT];
    const float *bias[QS_LINEAR_COUNT]; /* [out] or NULL */
    const float *norm1, *norm2;         /* [hidden] in front of attention and MLP, or NULL */
    const float *post1, *post2;         /* [hidden] behind them, or NULL */
    const float *q_norm, *k_norm;       /* [qs_qk_norm_width] or NULL */
} qs_layer_params;

/** What the forward of one layer leaves for its backward, for one micro-batch. Which of the
 * pointers are the layer's own and which are shared between layers (and computed again) is the
 * recompute mode. `void *` is the operations' act_dtype, but for the residual stream, which is of
 * the model's stream_dtype; + border: the matrix feeds a linear and its rows have room for the
 * adapter (qs_ops.border). */
typedef struct {
    void *x;                 /* [T, hidden] input, of the stream */
    float *rstd1, *rstd2;    /* [T] of the norms in front, where there are such */
    void *q_in, *k_in;       /* [T, q width], [T, kv width] before the norm of q and k, where there
                                is one; else NULL */
    float *rstd_q, *rstd_k;  /* [T, heads] of that norm, or [T] */
    void *q, *k, *v;         /* after RoPE; with qkv_width rows of one matrix */
    void *o;                 /* [T, q width + border] attention output */
    float *lse;              /* [n_heads, T] */
    void *x2;                /* [T, hidden] after attention, of the stream */
    void *gate, *up;         /* [T, ffn]; or [T, gate_up_width + gate_up_border] */
    void *branch1, *branch2; /* [T, hidden] of attention and MLP before the norm behind them, where
                                there is one; else NULL */
    float *rstd_post1, *rstd_post2; /* [T] of that norm */
    void *xa[QS_LINEAR_COUNT];      /* [T, lora_rank] A x of each linear */
} qs_layer_acts;

/** Scratch shared by all layers and micro-batches. */
typedef struct {
    void *norm;            /* [T, hidden + norm_border] what linears read of the stream */
    void *act;             /* [T, ffn + border] */
    void *d_act;           /* [T, ffn + border] */
    void *d_norm;          /* [T, hidden] its gradient */
    void *d_branch;        /* [T, hidden + border] where there are norms behind the branches */
    void *d_o;             /* [T, q width] */
    void *d_q;             /* [T, q width + border]; no border where q and k are normed; or with k
                              and v [T, qkv_width + qkv_border] */
    void *d_q_in, *d_k_in; /* [T, q width], [T, kv width] where they are */
    void *d_k, *d_v;       /* [T, kv width + border] */
    float *delta;          /* [n_heads, T] */
    void *lora;            /* [T, lora_rank] */
    void *rows;            /* [R, hidden] of the stream */
    void *d_rows;          /* [R, hidden] */
    float *logits;         /* [logit_rows, head_chunk_rows] */
} qs_model_work;

/** What the operations read of a micro-batch, one array behind the other in a mirror, and the
 * losses that come back in it. */
typedef struct {
    int32_t *position, *cu_seqlens;    /* [T], [n_docs + 1] */
    int64_t *sample, *row_at;          /* [T] */
    int32_t *target_row, *head_target; /* [R] rows that carry loss, their target ids */
    float *row_loss;                   /* [R] */
} qs_input_arrays;

typedef struct {
    qs_mirror mirror;
    qs_input_arrays host, device;
    size_t pushed_bytes; /* everything in front of row_loss */
    int64_t longest;     /* tokens of the longest document */
} qs_micro_input;

/** One micro-batch of the group: what it keeps through a pass. */
typedef struct {
    qs_micro_input input;
    qs_layer_acts *layers; /* [n_layers] */
    void *x_last;          /* [T, hidden] output of the last layer, of the stream */
    void *dx;              /* [T, hidden + border] gradient on its way down */
    qs_head_state head;
    void *head_rows; /* [R, hidden] after the final norm; then their gradient */
    float *row_rstd; /* [R] of the final norm */
} qs_micro_acts;

typedef struct {
    float *cos, *sin; /* [max_tokens, rotary_dim / 2] */
} qs_rope_table;

/** DoRA: of every layer's adapted linears, one behind the other, on the device. */
typedef struct {
    float *norm, *gain;     /* [n_layers, rows]; NULL without DoRA */
    const float *magnitude; /* [n_layers, rows]; NULL: they stand in the LoRA vector */
    int64_t rows;           /* of a layer */
    int at[QS_LINEAR_COUNT];
    bool ready; /* they are those of the adapter as it is now */
} qs_dora_state;

/** Where layers are decoded to. */
typedef struct {
    int *of_layer; /* [n_layers] the place that a layer is decoded to */
    int *holds;    /* [1 + kept units] the layer whose weights lie in a place, -1: none */
} qs_decoded;

/** Whose rows of the embedding are wanted next (embedding.c): micro-batches of the pass at hand,
 * then those of the next. */
typedef struct {
    const qs_micro_batch *now, *next; /* [count] each; next may be NULL */
    int64_t count;
    int64_t asked; /* of both together */
} qs_coming;

struct qs_model {
    const qs_base_index *index;
    const qs_hf_config *config;
    qs_fsdp *fsdp;
    const qs_ops *ops;
    qs_device *device;
    qs_queue *queue;
    const qs_lora_layout *layout; /* NULL: base only */
    const void *lora;             /* act_dtype */
    qs_model_shape shape;
    int64_t q_width, kv_width;
    int64_t qkv_width;     /* of a row that holds q, k and v; 0: a matrix each */
    int64_t gate_up_width; /* of one that holds gate and up; 0: likewise */
    int64_t border;        /* columns behind the operand of a linear, for its adapter */
    int64_t qkv_border, gate_up_border; /* the same behind gradients of q, k and v, of gate and up:
                                           of each matrix, or of the one that holds all */
    int64_t norm_border;                /* behind the outputs of norms, which all of these read */
    size_t act_bytes;                   /* of one element of act_dtype */
    qs_dtype stream_dtype;              /* of the residual stream: act_dtype, or fp32 */
    size_t stream_bytes;                /* of one element of it */
    float stream_eps; /* of norms of the stream, which holds what the architecture's does divided by
                         residual_multiplier m: so branches are added as they are, and norm(m x)
                         with eps is norm(x) with eps / m^2 */

    int *order; /* [3 n_units] of the pass at hand */
    qs_layer_params *layers;
    const float *final_norm;
    float *small;       /* all norms and biases */
    int32_t *every_row; /* [max_tokens] 0, 1, ..; NULL where norms stand in front */
    float *maps;        /* [n_maps, 256] second-level maps of the weights */
    qs_rope_table rope;
    qs_rope_table rope_local; /* of windowed layers; without data where they turn as the others */

    void *activation_block, *work_block;
    qs_micro_acts *micro; /* [group] */
    qs_model_work work;
    qs_decoded decoded;
    qs_dora_state dora;
    qs_coming coming;
    struct qs_offload *offload; /* NULL: activations stay on the device */
    double flops;
};

/** What one call through a layer works on. */
typedef struct {
    qs_model *model;
    int layer;
    const qs_unit_view *unit;
    const qs_batch *batch;
    const qs_micro_input *input;
    const qs_model_noise *noise; /* NULL: no dropout */
    qs_layer_acts *acts;
} qs_layer_call;

/** A matrix of act_dtype; `border` free columns behind each row. */
qs_mat qs_model_mat(const qs_model *model, void *data, int64_t rows, int64_t cols, int64_t border);

/** [rows, hidden] of the residual stream. */
qs_mat qs_model_stream(const qs_model *model, void *data, int64_t rows);

/** Decode the layer's unit and its adapters for the calls below, until qs_layer_close. */
qs_status qs_layer_open(qs_model *model, int layer, const qs_unit_view *unit);
void qs_layer_close(qs_model *model);

/** The adapter's weights of a linear, with DoRA its gains; a and b stay NULL where there is none.
 */
qs_lora qs_layer_adapter(const qs_model *model, int layer, qs_linear linear);

/** acts->x to `x_next` [T, hidden], of the stream. */
qs_status qs_layer_forward(const qs_layer_call *call, void *x_next);

/** Compute again what `recompute` did not keep. */
qs_status qs_layer_recompute(const qs_layer_call *call);

/** `dx` [T, hidden + border]: gradient of the layer's output, replaced by that of its input; `grad`
 * [per_layer]: LoRA gradients. */
qs_status qs_layer_backward(const qs_layer_call *call, void *dx, float *grad);

/** Which layers have a place of their own. */
qs_status qs_decoded_create(qs_model *model);
void qs_decoded_destroy(qs_model *model);
/** Decode `layer`, unless its place holds it still, and make its adapters ready. */
qs_status qs_decoded_open(qs_model *model, int layer, const qs_unit_view *unit, const qs_weight *w,
                          const qs_lora *lora, int count);

/** DoRA's norms and gains. Without it these do nothing. */
qs_status qs_dora_create(qs_model *model);
void qs_dora_destroy(qs_model *model);
size_t qs_dora_bytes(const qs_model *model);
/** Point an adapter to its norms and gains. */
void qs_dora_attach(const qs_model *model, int layer, qs_linear linear, qs_lora *lora);
/** Compute those of a layer, unless a pass did so since the adapter changed. */
qs_status qs_dora_layer_norms(qs_model *model, int layer, const qs_unit_view *unit);
/** A pass upwards has been through all layers. */
void qs_dora_pass_done(qs_model *model);

/** Nothing to compute for it. */
bool qs_model_is_idle(const qs_micro_batch *micro);

/** Begin a pass: its micro-batches go to the device, and rows are asked for as far as none are.
 * `next`: the micro-batches of the pass behind it, NULL for none. Both are borrowed until the end
 * of the pass. Collective, as are the two below. */
qs_status qs_embedding_begin(qs_model *model, const qs_micro_batch *now, const qs_micro_batch *next,
                             int64_t count);
/** The rows of micro-batch g to the input of its layer 0; in ascending order. */
qs_status qs_embedding_place(qs_model *model, int64_t g);
/** Move the requests ahead on: answer what has been asked, ask for what follows. */
qs_status qs_embedding_proceed(qs_model *model);

/** Bring what the operations read of `batch` to the device. */
qs_status qs_input_load(qs_model *model, qs_micro_acts *micro, const qs_batch *batch);

/** Bytes of a micro-batch's mirror. */
size_t qs_input_bytes(const qs_model_shape *shape);
qs_status qs_input_create(qs_model *model, qs_micro_input *input);

/** The rows of a micro-batch that carry loss, through the final norm, into a fresh head state. */
qs_status qs_head_begin(qs_model *model, qs_micro_acts *micro);

/** All chunks of the vocabulary past all micro-batches of the group. */
qs_status qs_head_run(qs_model *model, int64_t count, bool keep);

/** Losses of one micro-batch on their way to its mirror and, with `keep`, the gradient of its last
 * layer's output in micro->dx. */
qs_status qs_head_end(qs_model *model, qs_micro_acts *micro, int64_t n_tokens, float loss_scale,
                      bool keep);

/** Their sum, fp64 in row order, once the queue has passed. */
double qs_head_loss(const qs_micro_acts *micro);

/** Element types, widths and borders of a model's rows, from its configuration, adapters and
 * operations. */
void qs_model_set_widths(qs_model *model);

/** Lay out all buffers of a model: with model->activation_block NULL only the sizes are computed.
 */
void qs_model_carve(qs_model *model, size_t *activation_bytes, size_t *work_bytes);

/** Load norms, biases, weights' places and RoPE tables. */
qs_status qs_model_load_params(qs_model *model);

/** qs_base_weight with the map that the operations can read. */
qs_weight qs_model_weight(const qs_model *model, const qs_base_tensor *tensor);

#endif
