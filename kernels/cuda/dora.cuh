/* What linear.cu hands to dora.cu: a linear whose adapter has a gain. Arguments as of
 * linear_lora_forward and linear_lora_backward (kernels/ops.h). */
#ifndef QS_KERNELS_CUDA_DORA_CUH
#define QS_KERNELS_CUDA_DORA_CUH

#include "kernels/cuda/cuda_impl.cuh"

qs_status qs_cuda_dora_forward(qs_queue *q, const qs_unit_view *unit, const qs_weight *w,
                               const float *bias, const qs_mat *residual, const qs_lora *lora,
                               const qs_mat *x, qs_mat *xa, qs_mat *y);

qs_status qs_cuda_dora_gradients(qs_queue *q, const qs_unit_view *unit, const qs_weight *w,
                                 const qs_lora *lora, const qs_mat *x, const qs_mat *xa,
                                 const qs_mat *dy, const qs_mat *work, float *da, float *db,
                                 qs_mat *dx, bool accumulate);

#endif
