/* The table of the CUDA operations. */
#include "kernels/cuda/ops_cuda.h"

const qs_ops *qs_ops_cuda(void)
{
    static const qs_ops table = {
        .name = "cuda",
        .act_dtype = QS_BF16,
        .takes = qs_cuda_takes,
        .scratch_bytes = qs_cuda_scratch_bytes,
        .kept_bytes = qs_cuda_kept_bytes,
        .open = qs_cuda_open,
        .close = qs_cuda_close,
        .border = qs_cuda_border,
        .unit_open = qs_cuda_unit_open,
        .unit_close = qs_cuda_unit_close,
        .linear_forward = qs_cuda_linear_forward,
        .linear_backward = qs_cuda_linear_backward,
        .linear_lora_forward = qs_cuda_linear_lora_forward,
        .linear_lora_backward = qs_cuda_linear_lora_backward,
        .dora_norms = qs_cuda_dora_norms,
        .dora_backward = qs_cuda_dora_backward,
        .lora_forward = qs_cuda_lora_forward,
        .lora_backward = qs_cuda_lora_backward,
        .rmsnorm_forward = qs_cuda_rmsnorm_forward,
        .rmsnorm_backward = qs_cuda_rmsnorm_backward,
        .rope = qs_cuda_rope,
        .attention_forward = qs_cuda_attention_forward,
        .attention_backward = qs_cuda_attention_backward,
        .glu_forward = qs_cuda_glu_forward,
        .glu_backward = qs_cuda_glu_backward,
        .add = qs_cuda_add,
        .scale = qs_cuda_scale,
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
