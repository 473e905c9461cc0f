#include "kernels/ops.h"

#include "kernels/cpu/ops_impl.h"

const qs_ops *qs_ops_cpu(void)
{
    static const qs_ops table = {
        .name = "strict",
        .linear_forward = qs_cpu_linear_forward,
        .linear_backward = qs_cpu_linear_backward,
        .lora_forward = qs_cpu_lora_forward,
        .lora_backward = qs_cpu_lora_backward,
        .rmsnorm_forward = qs_cpu_rmsnorm_forward,
        .rmsnorm_backward = qs_cpu_rmsnorm_backward,
        .rope = qs_cpu_rope,
        .attention_forward = qs_cpu_attention_forward,
        .attention_backward = qs_cpu_attention_backward,
        .swiglu_forward = qs_cpu_swiglu_forward,
        .swiglu_backward = qs_cpu_swiglu_backward,
        .add = qs_cpu_add,
        .head_chunk = qs_cpu_head_chunk,
        .head_finish = qs_cpu_head_finish,
        .square_sums = qs_cpu_square_sums,
        .accumulate = qs_cpu_accumulate,
        .adamw = qs_cpu_adamw,
    };
    return &table;
}
