/* config.json: what is not supported, out of range or no JSON is refused by name, in one message.
 */
#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "hf_config_text.h"
#include "store/json.h"

typedef struct {
    const char *type, *class_name, *extra, *named;
} arch_refusal;

Test(hf_refusals, what_an_architecture_does_not_have_is_refused_by_name)
{
    static const arch_refusal r[] = {
        {"mistral", "LlamaForCausalLM", "", "MistralForCausalLM"},
        {"mistral", "MistralForCausalLM", "\"attention_bias\":true", "attention_bias"},
        {"mistral", "MistralForCausalLM", "\"sliding_window\":0", "sliding_window"},
        {"mistral", "MistralForCausalLM", "\"sliding_window\":-3", "sliding_window"},
        {"qwen2", "Qwen2ForCausalLM", "\"use_mrope\":true", "use_mrope"},
        {"qwen2", "Qwen2ForCausalLM", "\"layer_types\":[\"full_attention\"]", "layer_types"},
        {"qwen2", "Qwen2ForCausalLM",
         "\"layer_types\":[\"full_attention\",\"sliding_attention\",\"full_attention\"]",
         "sliding_attention"},
        {"qwen2", "Qwen2ForCausalLM", "\"use_sliding_window\":1", "use_sliding_window"},
        {"qwen3", "Qwen3ForCausalLM", "\"mlp_bias\":true", "mlp_bias"},
        {"qwen3", "Qwen3ForCausalLM", "\"rope_local_base_freq\":1e4", "rope_local_base_freq"},
        {"phi", "PhiForCausalLM", "", "\"llama\", \"mistral\", \"qwen2\", \"qwen3\", \"gemma2\""},
        {"phi3", "Phi3ForCausalLM", "\"attention_bias\":true", "attention_bias"},
        {"phi3", "Phi3ForCausalLM", "\"lm_head_bias\":true", "lm_head_bias"},
        {"phi3", "Phi3ForCausalLM", "\"resid_pdrop\":0.1", "resid_pdrop"},
        {"phi3", "Phi3ForCausalLM", "\"embd_pdrop\":0.1", "embd_pdrop"},
        {"phi3", "Phi3ForCausalLM", "\"full_attn_mod\":2", "full_attn_mod"},
        {"phi3", "Phi3ForCausalLM", "\"sliding_window\":0", "sliding_window"},
        {"phi3", "Phi3ForCausalLM", "\"partial_rotary_factor\":0.1", "partial_rotary_factor"},
        {"phi3", "Phi3ForCausalLM", "\"partial_rotary_factor\":0.7", "partial_rotary_factor"},
        {"phi3", "Phi3ForCausalLM", "\"partial_rotary_factor\":1.5", "partial_rotary_factor"},
        {"phi3", "Phi3ForCausalLM", "\"rope_scaling\":{\"type\":\"yarn\",\"factor\":2}",
         "for this model_type \"default\" or \"longrope\""},
        {"phi3", "Phi3ForCausalLM", "\"rope_scaling\":{\"type\":\"longrope\"}", "short_factor"},
        {"phi3", "Phi3ForCausalLM",
         "\"rope_scaling\":{\"type\":\"su\",\"short_factor\":[1,1,1,1,1,1,1],"
         "\"long_factor\":[1,1,1,1,1,1,1,1]}",
         "\"short_factor\" has 7 numbers; it needs 8"},
        {"phi3", "Phi3ForCausalLM",
         "\"rope_scaling\":{\"type\":\"su\",\"short_factor\":[1,1,1,1,1,1,1,1],"
         "\"long_factor\":[1,1,1,1,1,1,1,0]}",
         "\"long_factor\"[7]"},
        {"phi3", "Phi3ForCausalLM",
         "\"rope_scaling\":{\"type\":\"su\",\"short_factor\":[1,1,1,1,1,1,1,true],"
         "\"long_factor\":[1,1,1,1,1,1,1,1]}",
         "\"short_factor\"[7]"},
        {"phi3", "Phi3ForCausalLM",
         "\"rope_scaling\":{\"type\":\"su\",\"original_max_position_embeddings\":2048,"
         "\"short_factor\":[1,1,1,1,1,1,1,1],\"long_factor\":[1,1,1,1,1,1,1,1]}",
         "is 2048 for RoPE, but 4096 at top level"},
        {"olmo2", "Olmo3ForCausalLM", "", "Olmo2ForCausalLM"},
        {"olmo2", "Olmo2ForCausalLM", "\"sliding_window\":4", "sliding_window"},
        {"olmo2", "Olmo2ForCausalLM", "\"mlp_bias\":true", "mlp_bias"},
        {"olmo2", "Olmo2ForCausalLM", "\"clip_qkv\":8.0", "clip_qkv"},
        {"olmo2", "Olmo2ForCausalLM", "\"hidden_act\":\"gelu\"", "hidden_act"},
        {"olmo2", "Olmo2ForCausalLM",
         "\"layer_types\":[\"full_attention\",\"sliding_attention\",\"full_attention\"]",
         "sliding_attention"},
        {"olmo2", "Olmo2ForCausalLM", "\"rope_parameters\":{\"full_attention\":{}}",
         "full_attention"},
        {"olmo2", "Olmo2ForCausalLM", "\"partial_rotary_factor\":0.5", "partial_rotary_factor"},
        {"olmo3", "Olmo3ForCausalLM", "\"sliding_window\":null", "sliding_window"},
        {"olmo3", "Olmo3ForCausalLM", "\"sliding_window\":0", "sliding_window"},
        {"olmo3", "Olmo3ForCausalLM", "\"sliding_window_pattern\":2", "sliding_window_pattern"},
        {"olmo3", "Olmo3ForCausalLM", "\"rope_local_base_freq\":1e4", "rope_local_base_freq"},
        {"olmo3", "Olmo3ForCausalLM", "\"query_pre_attn_scalar\":8", "query_pre_attn_scalar"},
        {"olmo3", "Olmo3ForCausalLM", "\"layer_types\":[\"sliding_attention\"]", "layer_types"},
        {"olmo3", "Olmo3ForCausalLM", "\"rope_theta\":1e4", "\"rope_theta\" = 10000"},
        {"olmo3", "Olmo3ForCausalLM",
         "\"rope_theta\":1e4,\"rope_parameters\":{\"full_attention\":{}}",
         "\"rope_theta\" = 10000"},
        {"olmo3", "Olmo3ForCausalLM", "\"rope_parameters\":{\"rope_type\":\"yarn\",\"factor\":8}",
         "full_attention"},
        {"olmo3", "Olmo3ForCausalLM",
         "\"rope_parameters\":{\"sliding_attention\":{\"rope_type\":\"yarn\",\"factor\":8}}",
         "for \"sliding_attention\" \"default\""},
        {"mistral", "MistralForCausalLM", "\"original_max_position_embeddings\":2048",
         "original_max_position_embeddings"},
        {"mistral", "MistralForCausalLM", "\"auto_map\":{\"AutoModel\":\"x.Y\"}", "auto_map"},
        {"gemma3", "Gemma3ForConditionalGeneration", "", "gemma3 is not supported; these are"},
        {"gemma3", "Gemma3ForConditionalGeneration", "\"text_config\":{}", "text part"},
        {"gemma2", "Gemma2ForCausalLM", "\"final_logit_softcapping\":-1",
         "final_logit_softcapping"},
        {"gemma2", "Gemma2ForCausalLM", "\"sliding_window_pattern\":6", "sliding_window_pattern"},
        {"gemma2", "Gemma2ForCausalLM", "\"sliding_window\":5,\"sliding_window_size\":4",
         "\"sliding_window\" = 5 and \"sliding_window_size\" = 4 differ"},
        {"llama", "LlamaForCausalLM", "\"sliding_window_size\":4", "sliding_window_size"},
        {"gemma2", "Gemma2ForCausalLM", "\"rope_local_base_freq\":1e4", "rope_local_base_freq"},
        {"gemma2", "Gemma2ForCausalLM", "\"rope_parameters\":{\"full_attention\":{}}",
         "full_attention"},
        {"gemma3_text", "Gemma3ForCausalLM", "\"sliding_window\":null", "sliding_window"},
        {"gemma3_text", "Gemma3ForCausalLM", "\"sliding_window_pattern\":0",
         "sliding_window_pattern"},
        {"gemma3_text", "Gemma3ForCausalLM", "\"use_bidirectional_attention\":true",
         "use_bidirectional_attention"},
        {"gemma3_text", "Gemma3ForCausalLM", "\"attn_logit_softcapping\":50.0",
         "attn_logit_softcapping"},
        {"gemma3_text", "Gemma3ForCausalLM", "\"hidden_activation\":\"gelu\"", "hidden_activation"},
        {"gemma3_text", "Gemma3ForCausalLM", "\"hidden_act\":\"silu\"", "hidden_act"},
        {"gemma3_text", "Gemma3ForCausalLM", "\"query_pre_attn_scalar\":0",
         "query_pre_attn_scalar"},
        {"gemma3_text", "Gemma3ForCausalLM", "\"rope_parameters\":{\"rope_type\":\"default\"}",
         "full_attention"},
        {"gemma3_text", "Gemma3ForCausalLM",
         "\"rope_parameters\":{\"sliding_attention\":{\"rope_type\":\"linear\",\"factor\":8}}",
         "sliding_attention"},
        {"gemma3_text", "Gemma3ForCausalLM",
         "\"rope_local_base_freq\":1e4,\"rope_parameters\":{\"sliding_attention\":"
         "{\"rope_theta\":2e4}}",
         "rope_local_base_freq"},
        {"gemma3_text", "Gemma3ForCausalLM", "\"rope_parameters\":{\"full_attention\":7}",
         "full_attention"},
        {"smollm3", "SmolLM3ForCausalLM", "\"no_rope_layers\":[1,0]",
         "\"no_rope_layers\" is no list of 3 entries"},
        {"smollm3", "SmolLM3ForCausalLM", "\"no_rope_layers\":3", "no list of 3"},
        {"smollm3", "SmolLM3ForCausalLM", "\"no_rope_layers\":{\"a\":1,\"b\":1,\"c\":1}",
         "no list of 3"},
        {"smollm3", "SmolLM3ForCausalLM", "\"no_rope_layers\":[1,0,2]", "\"no_rope_layers\"[2]"},
        {"smollm3", "SmolLM3ForCausalLM", "\"no_rope_layers\":[1,-1,1]", "\"no_rope_layers\"[1]"},
        {"smollm3", "SmolLM3ForCausalLM", "\"no_rope_layers\":[true,1,1]", "\"no_rope_layers\"[0]"},
        {"smollm3", "SmolLM3ForCausalLM", "\"no_rope_layer_interval\":0", "no_rope_layer_interval"},
        {"smollm3", "SmolLM3ForCausalLM", "\"no_rope_layer_interval\":2.0",
         "no_rope_layer_interval"},
        {"smollm3", "SmolLM3ForCausalLM", "\"use_sliding_window\":true,\"sliding_window\":0",
         "sliding_window"},
        {"smollm3", "SmolLM3ForCausalLM",
         "\"sliding_window\":5,\"layer_types\":[\"full_attention\",\"full_attention\","
         "\"sliding_attention\"]",
         "sliding_attention"},
        {"smollm3", "SmolLM3ForCausalLM", "\"residual_multiplier\":0.22", "residual_multiplier"},
        {"llama", "LlamaForCausalLM", "\"no_rope_layers\":[1,1,0]", "no_rope_layers"},
        {"llama", "LlamaForCausalLM", "\"attention_multiplier\":0.5", "attention_multiplier"},
        {"granite", "GraniteForCausalLM", "\"no_rope_layer_interval\":4", "no_rope_layer_interval"},
        {"granite", "GraniteForCausalLM", "\"sliding_window\":7", "sliding_window"},
        {"granite", "GraniteForCausalLM", "\"embedding_multiplier\":0", "embedding_multiplier"},
        {"granite", "GraniteForCausalLM", "\"attention_multiplier\":-0.1", "attention_multiplier"},
        {"granite", "GraniteForCausalLM", "\"residual_multiplier\":0", "residual_multiplier"},
        {"granite", "GraniteForCausalLM", "\"residual_multiplier\":1e-30", "residual_multiplier"},
        {"granite", "GraniteForCausalLM", "\"residual_multiplier\":\"0.22\"",
         "residual_multiplier"},
        {"granite", "GraniteForCausalLM", "\"logits_scaling\":0", "logits_scaling"},
        {"granite", "GraniteForCausalLM", "\"logits_scaling\":1e300", "logits_scaling"},
        {"granite", "LlamaForCausalLM", "", "GraniteForCausalLM"},
    };
    for (size_t i = 0; i < sizeof r / sizeof *r; i++) {
        qs_hf_config c;
        qs_error_clear();
        cr_assert_neq(parse(&c, as(r[i].type, r[i].class_name, r[i].extra)), QS_OK, "%zu", i);
        cr_assert_not_null(strstr(qs_error_text(), r[i].named), "%zu: %s", i, qs_error_text());
    }
}

typedef struct {
    char extra[200];
    qs_status status;
    char named[48]; /* what the message must name */
} refusal;

ParameterizedTestParameters(hf_refusals, unsupported_is_refused_by_name)
{
    static refusal r[] = {
        {"\"qk_norm\":true", QS_ERR_INPUT_UNKNOWN, "qk_norm"},
        {"\"sliding_window\":4096", QS_ERR_INPUT_UNKNOWN, "sliding_window"},
        {"\"auto_map\":{\"AutoModel\":\"x.Y\"}", QS_ERR_INPUT_UNKNOWN, "auto_map"},
        {"\"hidden_act\":\"gelu\"", QS_ERR_INPUT_UNKNOWN, "gelu"},
        {"\"hidden_act\":7", QS_ERR_INPUT_UNKNOWN, "hidden_act"},
        {"\"architectures\":[\"LlamaModel\"]", QS_ERR_INPUT_UNKNOWN, "LlamaModel"},
        {"\"layer_types\":[\"sliding_attention\"]", QS_ERR_INPUT_UNKNOWN, "sliding_attention"},
        {"\"rope_interleaved\":true", QS_ERR_INPUT_UNKNOWN, "rope_interleaved"},
        {"\"attention_dropout\":0.1", QS_ERR_INPUT_UNKNOWN, "attention_dropout"},
        {"\"partial_rotary_factor\":0.5", QS_ERR_INPUT_UNKNOWN, "partial_rotary_factor"},
        {"\"torch_dtype\":\"float64\"", QS_ERR_INPUT_UNKNOWN, "float64"},
        {"\"rope_scaling\":{\"rope_type\":\"proportional\",\"factor\":2}", QS_ERR_INPUT_UNKNOWN,
         "\"longrope\" or \"dynamic\""},
        {"\"rope_scaling\":{\"rope_type\":\"su\",\"factor\":2}", QS_ERR_INPUT_UNKNOWN, "su"},
        {"\"quantization_config\":{\"quant_method\":\"gptq\"}", QS_ERR_INPUT_UNKNOWN, "gptq"},
        {"\"quantization_config\":{\"quant_method\":\"bitsandbytes\",\"load_in_8bit\":true}",
         QS_ERR_INPUT_UNKNOWN, "load_in_4bit"},
        {"\"quantization_config\":{\"quant_method\":\"bitsandbytes\",\"load_in_4bit\":true}",
         QS_ERR_INPUT_UNKNOWN, "fp4"},
    };
    return cr_make_param_array(refusal, r, sizeof r / sizeof *r);
}

ParameterizedTest(refusal *r, hf_refusals, unsupported_is_refused_by_name)
{
    qs_hf_config c;
    cr_assert_eq(parse(&c, with(r->extra)), r->status, "%s", r->extra);
    cr_assert_not_null(strstr(qs_error_text(), r->named), "%s", qs_error_text());
    cr_assert_not_null(strstr(qs_error_text(), "config.json"));
}

ParameterizedTestParameters(hf_refusals, values_out_of_range_are_refused)
{
    static refusal r[] = {
        {"\"num_key_value_heads\":3", QS_ERR_INPUT_VALUE, "num_key_value_heads"},
        {"\"num_key_value_heads\":8", QS_ERR_INPUT_VALUE, "num_key_value_heads"},
        {"\"head_dim\":15", QS_ERR_INPUT_VALUE, "head_dim"},
        {"\"head_dim\":2048", QS_ERR_INPUT_VALUE, "head_dim"},
        {"\"rms_norm_eps\":0", QS_ERR_INPUT_VALUE, "rms_norm_eps"},
        {"\"rms_norm_eps\":0.02", QS_ERR_INPUT_VALUE, "rms_norm_eps"},
        {"\"rope_theta\":0", QS_ERR_INPUT_VALUE, "rope_theta"},
        {"\"rope_theta\":-1", QS_ERR_INPUT_VALUE, "rope_theta"},
        {"\"rope_theta\":\"1e4\"", QS_ERR_INPUT_VALUE, "rope_theta"},
        {"\"max_position_embeddings\":0", QS_ERR_INPUT_VALUE, "max_position_embeddings"},
        {"\"tie_word_embeddings\":1", QS_ERR_INPUT_VALUE, "tie_word_embeddings"},
        {"\"dtype\":\"float16\",\"torch_dtype\":\"bfloat16\"", QS_ERR_INPUT_VALUE, "differ"},
        {"\"rope_theta\":1e4,\"rope_parameters\":{\"rope_theta\":1e5}", QS_ERR_INPUT_VALUE,
         "rope_theta"},
        {"\"rope_scaling\":{\"rope_type\":\"linear\"}", QS_ERR_INPUT_VALUE, "factor"},
        {"\"rope_scaling\":{\"rope_type\":\"linear\",\"factor\":0.5}", QS_ERR_INPUT_VALUE,
         "factor"},
        {"\"rope_scaling\":{\"rope_type\":\"default\",\"factor\":2}", QS_ERR_INPUT_VALUE, "factor"},
        {"\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8,\"low_freq_factor\":4,"
         "\"high_freq_factor\":4,\"original_max_position_embeddings\":8192}",
         QS_ERR_INPUT_VALUE, "high_freq_factor"},
        {"\"rope_scaling\":{\"rope_type\":\"yarn\"}", QS_ERR_INPUT_VALUE, "factor"},
        {"\"rope_scaling\":{\"rope_type\":\"linear\",\"factor\":2,\"beta_fast\":3}",
         QS_ERR_INPUT_VALUE, "\"beta_fast\" belongs to rope_type \"yarn\""},
        {"\"rope_scaling\":{\"rope_type\":\"linear\",\"factor\":2,\"speed\":3}",
         QS_ERR_INPUT_UNKNOWN, "speed"},
        {"\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":2,\"beta_fast\":1,\"beta_slow\":3}",
         QS_ERR_INPUT_VALUE, "beta_fast"},
        {"\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":2,\"truncate\":1}",
         QS_ERR_INPUT_VALUE, "truncate"},
        {"\"rope_scaling\":{\"rope_type\":\"dynamic\"}", QS_ERR_INPUT_VALUE, "factor"},
        {"\"rope_scaling\":{\"rope_type\":\"dynamic\",\"factor\":2,"
         "\"original_max_position_embeddings\":1024}",
         QS_ERR_INPUT_VALUE, "= 1024 is not \"max_position_embeddings\" = 2048"},
        {"\"head_dim\":2,\"rope_scaling\":{\"rope_type\":\"dynamic\",\"factor\":2}",
         QS_ERR_INPUT_VALUE, "dynamic"},
        {"\"rope_scaling\":{\"rope_type\":\"dynamic\",\"factor\":2,\"long_factor\":[1]}",
         QS_ERR_INPUT_VALUE, "\"long_factor\" belongs to rope_type \"longrope\""},
        {"\"rope_scaling\":{\"rope_type\":\"longrope\",\"short_factor\":7,\"long_factor\":7}",
         QS_ERR_INPUT_VALUE, "short_factor"},
        {"\"rope_scaling\":{\"rope_type\":\"longrope\",\"original_max_position_embeddings\":1}",
         QS_ERR_INPUT_VALUE, "original_max_position"},
        {"\"rope_scaling\":{\"rope_type\":\"linear\",\"factor\":2,\"attention_factor\":3}",
         QS_ERR_INPUT_VALUE, "\"yarn\" or \"longrope\""},
        {"\"rope_scaling\":7", QS_ERR_INPUT_VALUE, "rope_scaling"},
    };
    return cr_make_param_array(refusal, r, sizeof r / sizeof *r);
}

ParameterizedTest(refusal *r, hf_refusals, values_out_of_range_are_refused)
{
    qs_hf_config c;
    cr_assert_eq(parse(&c, with(r->extra)), r->status, "%s", r->extra);
    cr_assert_not_null(strstr(qs_error_text(), r->named), "%s", qs_error_text());
}

ParameterizedTestParameters(hf_refusals, whole_texts_are_refused)
{
    static refusal r[] = {
        {"", QS_ERR_INPUT_FORMAT, "JSON"},
        {"[]", QS_ERR_INPUT_FORMAT, "object"},
        {"{", QS_ERR_INPUT_FORMAT, "JSON"},
        {"{}", QS_ERR_INPUT_VALUE, "model_type"},
        {"{\"model_type\":\"gpt2\"}", QS_ERR_INPUT_UNKNOWN, "qwen2"},
        {"{\"model_type\":\"llama\",\"vocab_size\":NaN}", QS_ERR_INPUT_FORMAT, "JSON"},
        {"{\"model_type\":\"llama\",\"rope_theta\":Infinity}", QS_ERR_INPUT_FORMAT, "JSON"},
        {"{\"model_type\":\"llama\",\"model_type\":\"llama\"}", QS_ERR_INPUT_FORMAT, "duplicate"},
        {"{\"model_type\":\"llama\",\"hidden_size\":65,\"num_attention_heads\":4}",
         QS_ERR_INPUT_VALUE, "hidden_size"},
        {"{\"model_type\":\"llama\",\"num_hidden_layers\":1001}", QS_ERR_INPUT_VALUE,
         "num_hidden_layers"},
        {"{\"model_type\":\"llama\",\"vocab_size\":4194305}", QS_ERR_INPUT_VALUE, "vocab_size"},
        {"{\"model_type\":\"llama\",\"vocab_size\":99999999999999999999}", QS_ERR_INPUT_FORMAT,
         "JSON"},
        {"{\"model_type\":\"llama\"} x", QS_ERR_INPUT_FORMAT, "JSON"},
    };
    return cr_make_param_array(refusal, r, sizeof r / sizeof *r);
}

ParameterizedTest(refusal *r, hf_refusals, whole_texts_are_refused)
{
    qs_hf_config c;
    cr_assert_eq(parse(&c, r->extra), r->status, "%s: %s", r->extra, qs_error_text());
    cr_assert_not_null(strstr(qs_error_text(), r->named), "%s", qs_error_text());
}

Test(hf_refusals, all_that_is_refused_stands_in_one_message)
{
    static const char *const want[] = {
        "config.json: keys \"zeta\", \"alpha_two\", \"moe_width\" are not known for model_type ",
        "; if they do not change the maths, remove them from a copy of the file; ",
        "\"use_mrope\" = true",
        "\"lm_head_bias\" = true",
        "\"attention_dropout\" = ",
        "\"hidden_act\" = gelu",
        "\"rope_type\" = quadratic",
        "\"quant_method\" = gptq"};
    qs_hf_config c;
    cr_assert_eq(parse(&c, as("phi3", "Phi3ForCausalLM",
                              "\"zeta\":1,\"alpha_two\":2,\"moe_width\":3,\"use_mrope\":true,"
                              "\"lm_head_bias\":true,\"attention_dropout\":0.5,"
                              "\"hidden_act\":\"gelu\","
                              "\"rope_scaling\":{\"rope_type\":\"quadratic\"},"
                              "\"quantization_config\":{\"quant_method\":\"gptq\"}")),
                 QS_ERR_INPUT_UNKNOWN, "%s", qs_error_text());
    const char *at = qs_error_text();
    for (size_t i = 0; i < sizeof want / sizeof *want; i++) {
        const char *found = strstr(at, want[i]);
        cr_assert_not_null(found, "%s: %s", want[i], qs_error_text());
        at = found;
    }
}

Test(hf_refusals, a_long_name_is_cut)
{
    qs_hf_config c;
    char extra[1024] = "\"";
    memset(extra + 1, 'k', 900);
    strcat(extra, "\":1");
    cr_assert_eq(parse(&c, with(extra)), QS_ERR_INPUT_UNKNOWN);
    cr_assert_not_null(strstr(qs_error_text(), "kkk\" is not known"), "%s", qs_error_text());
}

Test(hf_refusals, all_unknown_keys_of_rope_stand_in_one_message)
{
    qs_hf_config c;
    cr_assert_eq(parse(&c, with("\"zeta\":1,\"rope_scaling\":{\"rope_type\":\"linear\","
                                "\"factor\":2,\"omega\":1,\"alpha\":2}")),
                 QS_ERR_INPUT_UNKNOWN);
    cr_assert_not_null(strstr(qs_error_text(), "key \"zeta\" is not known"), "%s", qs_error_text());
    cr_assert_not_null(strstr(qs_error_text(), "; RoPE keys \"omega\", \"alpha\" are not known"),
                       "%s", qs_error_text());
}

/* A value out of range behind a refused key may follow from the default that was taken for it. */
Test(hf_refusals, a_refusal_is_told_before_what_is_wrong_otherwise)
{
    qs_hf_config c;
    cr_assert_eq(parse(&c, with("\"zeta\":1,\"max_position_embeddings\":0")), QS_ERR_INPUT_UNKNOWN);
    cr_assert_not_null(strstr(qs_error_text(), "key \"zeta\" is not known"), "%s", qs_error_text());
    cr_assert_null(strstr(qs_error_text(), "max_position"), "%s", qs_error_text());
}

Test(hf_refusals, more_keys_than_a_line_holds_are_counted)
{
    qs_hf_config c;
    char extra[2000] = "";
    for (int i = 0; i < 90; i++) {
        char key[24];
        snprintf(key, sizeof key, "%s\"strange_%02d\":1", i > 0 ? "," : "", i);
        strcat(extra, key);
    }
    cr_assert_eq(parse(&c, as("llama", "LlamaForCausalLM", extra)), QS_ERR_INPUT_UNKNOWN);
    cr_assert_not_null(strstr(qs_error_text(), "\"strange_00\", \"strange_01\""));
    int last = -1, more = 0;
    for (const char *p = qs_error_text(); (p = strstr(p, "strange_")) != NULL; p++) {
        last = atoi(p + 8);
    }
    const char *count = strstr(qs_error_text(), " and ");
    cr_assert(count != NULL && sscanf(count, " and %d more are not known", &more) == 1, "%s",
              qs_error_text());
    cr_assert_eq(last + 1 + more, 90, "%s", qs_error_text());
}

Test(hf_refusals, depth_is_limited_before_the_parser_descends)
{
    char text[2000] = "{\"model_type\":";
    memset(text + strlen(text), '[', 1500);
    json_t *root = NULL;
    cr_assert_eq(qs_json_parse(&root, text, strlen(text), "deep.json"), QS_ERR_INPUT_FORMAT);
    cr_assert_not_null(strstr(qs_error_text(), "deeper than 64"), "%s", qs_error_text());
    qs_error_clear();
    const char *in_string =
        "{\"a\":\"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[\\\"[[\"}";
    cr_assert_eq(qs_json_parse(&root, in_string, strlen(in_string), "flat.json"), QS_OK);
    json_decref(root);
}
