/* The table of the CUDA operations. */
#include "kernels/cuda/ops_cuda.h"

#include <stdio.h>

#include "kernels/cuda/core/attention_tiles.h"
#include "kernels/cuda/core/norm.h"

/* The attention moves pieces of 16 bytes and has a width for every head; the norm keeps a row in
 * the registers of one block of threads. */
static bool takes(const qs_ops_limits *l, char *why, size_t capacity)
{
    if (l->head_dim < 8 || l->head_dim % 8 != 0 || qs_attention_padded_dim(l->head_dim) == 0) {
        snprintf(why, capacity, "head_dim=%d: the CUDA operations take multiples of 8 up to 256",
                 l->head_dim);
        return false;
    }
    if (l->hidden > QS_NORM_COLS_MAX) {
        snprintf(why, capacity, "hidden_size=%lld: the CUDA operations take up to %d",
                 (long long)l->hidden, QS_NORM_COLS_MAX);
        return false;
    }
    return true;
}

const qs_ops *qs_ops_cuda(void)
{
    static const qs_ops table = {
        .name = "cuda",
        .act_dtype = QS_BF16,
        .takes = takes,
        .scratch_bytes = qs_cuda_scratch_bytes,
        .open = qs_cuda_open,
        .close = qs_cuda_close,
        .border = qs_cuda_border,
        .unit_open = qs_cuda_unit_open,
        .unit_close = qs_cuda_unit_close,
        .linear_forward = qs_cuda_linear_forward,
        .linear_backward = qs_cuda_linear_backward,
        .linear_lora_forward = qs_cuda_linear_lora_forward,
        .linear_lora_backward = qs_cuda_linear_lora_backward,
        .lora_forward = qs_cuda_lora_forward,
        .lora_backward = qs_cuda_lora_backward,
        .rmsnorm_forward = qs_cuda_rmsnorm_forward,
        .rmsnorm_backward = qs_cuda_rmsnorm_backward,
        .rope = qs_cuda_rope,
        .attention_forward = qs_cuda_attention_forward,
        .attention_backward = qs_cuda_attention_backward,
        .swiglu_forward = qs_cuda_swiglu_forward,
        .swiglu_backward = qs_cuda_swiglu_backward,
        .add = qs_cuda_add,
        .gather_rows = qs_cuda_gather_rows,
        .scatter_rows = qs_cuda_scatter_rows,
        .copy_rows = qs_cuda_copy_rows,
        .convert = qs_cuda_convert,
        .head_chunk = qs_cuda_head_chunk,
        .head_finish = qs_cuda_head_finish,
        .square_sums = qs_cuda_square_sums,
        .accumulate = qs_cuda_accumulate,
        .update = qs_cuda_update,
        .nf4_quantize_blocks = qs_cuda_nf4_quantize_blocks,
        .nf4_quantize_absmax = qs_cuda_nf4_quantize_absmax,
    };
    return &table;
}
