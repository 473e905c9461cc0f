/* Inputs of layers in pinned host memory (memory.offload: activations, with recompute: full).
 *
 * The device keeps SLOTS inputs per micro-batch. On the way up the input of layer l is copied to
 * the host behind the compute of the layers after it, before its slot is written again by layer l +
 * SLOTS - 1; the last SLOTS inputs stay. On the way down a slot that has become free takes the
 * input that is wanted SLOTS layers later.
 *
 *   up      compute  l=0 | l=1 | l=2 | l=3 ...      down   compute  l=9 | l=8 | l=7 ...
 *           copy           x0  | x1  | x2  ...             copy           x6  | x5  ...
 *
 * All calls do nothing for a model without offload. */
#ifndef QS_MODEL_OFFLOAD_H
#define QS_MODEL_OFFLOAD_H

#include "model/model_impl.h"

enum { QS_OFFLOAD_SLOTS = 3 };

/** Pinned bytes that qs_offload_create takes. */
size_t qs_offload_bytes(const qs_model *model);
qs_status qs_offload_create(qs_model *model);
void qs_offload_destroy(qs_model *model);

/** Around the forward of `layer` for micro-batch `g` of `n_tokens`. */
qs_status qs_offload_before_forward(qs_model *model, int64_t g, int layer);
qs_status qs_offload_after_forward(qs_model *model, int64_t g, int layer, int64_t n_tokens);

/** Around its recompute and backward. */
qs_status qs_offload_before_backward(qs_model *model, int64_t g, int layer);
qs_status qs_offload_after_backward(qs_model *model, int64_t g, int layer, int64_t n_tokens);

#endif
