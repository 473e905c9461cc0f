#include "hf/hf_arch.h"

#include <stdio.h>
#include <string.h>

static const qs_hf_arch rows[] = {
    {.model_type = "llama",
     .class_name = "LlamaForCausalLM",
     .bias = QS_BIAS_BY_KEY,
     .hidden = 4096,
     .ffn_hidden = 11008,
     .vocab = 32000,
     .max_position = 2048,
     .n_layers = 32,
     .n_heads = 32},
    {.model_type = "mistral",
     .class_name = "MistralForCausalLM",
     .bias = QS_BIAS_NEVER,
     .window = QS_WINDOW_ALL,
     .hidden = 4096,
     .ffn_hidden = 14336,
     .vocab = 32000,
     .max_position = 131072,
     .window_default = 4096,
     .n_layers = 32,
     .n_heads = 32,
     .n_kv_heads = 8},
    {.model_type = "qwen2",
     .class_name = "Qwen2ForCausalLM",
     .bias = QS_BIAS_QKV,
     .window = QS_WINDOW_UPPER,
     .hidden = 4096,
     .ffn_hidden = 22016,
     .vocab = 151936,
     .max_position = 32768,
     .window_default = 4096,
     .n_layers = 32,
     .n_heads = 32,
     .n_kv_heads = 32,
     .window_layers = 28},
    {.model_type = "qwen3",
     .class_name = "Qwen3ForCausalLM",
     .bias = QS_BIAS_BY_KEY, /* mlp_bias is no key of the class: check_keys refuses it */
     .qk_norm = true,
     .window = QS_WINDOW_UPPER,
     .hidden = 4096,
     .ffn_hidden = 22016,
     .vocab = 151936,
     .max_position = 32768,
     .window_default = 4096,
     .n_layers = 32,
     .n_heads = 32,
     .n_kv_heads = 32,
     .head_dim = 128,
     .window_layers = 28},
    {.model_type = "gemma2",
     .class_name = "Gemma2ForCausalLM",
     .bias = QS_BIAS_BY_KEY,
     .gemma = true,
     .tied = true,
     .window = QS_WINDOW_PATTERN,
     .cap = QS_CAP_BOTH,
     .hidden = 2304,
     .ffn_hidden = 9216,
     .vocab = 256000,
     .max_position = 8192,
     .window_default = 4096,
     .n_layers = 26,
     .n_heads = 8,
     .n_kv_heads = 4,
     .head_dim = 256,
     .window_pattern = 2,
     .attention_cap = 50.0,
     .final_cap = 30.0},
    {.model_type = "gemma3_text",
     .class_name = "Gemma3ForCausalLM",
     .bias = QS_BIAS_BY_KEY,
     .qk_norm = true,
     .gemma = true,
     .tied = true,
     .window = QS_WINDOW_PATTERN,
     .cap = QS_CAP_FINAL, /* it reads attn_logit_softcapping, and does not compute it */
     .local_rope = true,
     .hidden = 2304,
     .ffn_hidden = 9216,
     .vocab = 262208,
     .max_position = 131072,
     .window_default = 4096,
     .n_layers = 26,
     .n_heads = 8,
     .n_kv_heads = 4,
     .head_dim = 256,
     .window_pattern = 6,
     .rope_theta = 1e6,
     .rope_local_theta = 1e4},
    {.model_type = "phi3",
     .class_name = "Phi3ForCausalLM",
     .bias = QS_BIAS_NEVER,
     .fused = true,
     .window = QS_WINDOW_ALL,
     .hidden = 3072,
     .ffn_hidden = 8192,
     .vocab = 32064,
     .max_position = 4096,
     .original_max_position = 4096,
     .n_layers = 32,
     .n_heads = 32,
     .eps = 1e-5},
};
enum { ROWS = sizeof rows / sizeof *rows };

const qs_hf_arch *qs_hf_arch_find(const char *model_type)
{
    for (int i = 0; i < ROWS; i++) {
        if (strcmp(rows[i].model_type, model_type) == 0) {
            return &rows[i];
        }
    }
    return NULL;
}

void qs_hf_arch_names(char *out, size_t capacity)
{
    size_t used = 0;
    for (int i = 0; i < ROWS && used < capacity; i++) {
        used += (size_t)snprintf(out + used, capacity - used, "%s\"%s\"", i > 0 ? ", " : "",
                                 rows[i].model_type);
    }
}
