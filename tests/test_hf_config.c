/* config.json: both spellings mean the same, and defaults are the class's. What is refused:
 * test_hf_refusals.c. */
#include <criterion/criterion.h>
#include <math.h>
#include <string.h>

#include "hf_config_text.h"

Test(hf_config, missing_keys_take_the_defaults_of_the_class)
{
    qs_hf_config c;
    cr_assert_eq(parse(&c, "{\"model_type\":\"llama\"}"), QS_OK, "%s", qs_error_text());
    cr_expect_eq(c.n_layers, 32);
    cr_expect_eq(c.n_heads, 32);
    cr_expect_eq(c.n_kv_heads, 32);
    cr_expect_eq(c.head_dim, 128);
    cr_expect_eq(c.hidden, 4096);
    cr_expect_eq(c.ffn_hidden, 11008);
    cr_expect_eq(c.vocab, 32000);
    cr_expect_eq(c.max_position, 2048);
    cr_expect_eq(c.rms_norm_eps, 1e-6f);
    cr_expect_eq(c.rope_theta, 10000.0);
    cr_expect_eq(c.rope_type, QS_ROPE_DEFAULT);
    cr_expect_eq(c.dtype, QS_F32);
    cr_expect_not(c.tied || c.bias[QS_Q] || c.bias[QS_DOWN] || c.bnb_4bit);
}

Test(hf_config, both_spellings_mean_the_same)
{
    qs_hf_config v4, v5;
    cr_assert_eq(
        parse(&v4, with("\"torch_dtype\":\"bfloat16\",\"rope_theta\":500000.0,\"rope_scaling\":{"
                        "\"type\":\"llama3\",\"factor\":8.0,\"low_freq_factor\":1.0,"
                        "\"high_freq_factor\":4.0,\"original_max_position_embeddings\":8192}")),
        QS_OK, "%s", qs_error_text());
    cr_assert_eq(
        parse(&v5, with("\"dtype\":\"bfloat16\",\"rope_parameters\":{\"rope_theta\":500000.0,"
                        "\"rope_type\":\"llama3\",\"factor\":8.0,\"low_freq_factor\":1.0,"
                        "\"high_freq_factor\":4.0,\"original_max_position_embeddings\":8192}")),
        QS_OK, "%s", qs_error_text());
    cr_assert_eq(memcmp(&v4, &v5, sizeof v4), 0);
    cr_assert_eq(v4.rope_type, QS_ROPE_LLAMA3);
    cr_assert_eq(v4.rope_original_max_position, 8192);
    cr_assert_eq(v4.dtype, QS_BF16);
}

Test(hf_config, biases_and_tied_heads_are_read)
{
    qs_hf_config c;
    cr_assert_eq(parse(&c, with("\"attention_bias\":true,\"mlp_bias\":true,"
                                "\"tie_word_embeddings\":true,\"num_key_value_heads\":2,"
                                "\"head_dim\":20")),
                 QS_OK, "%s", qs_error_text());
    for (int i = 0; i < QS_LINEAR_COUNT; i++) {
        cr_assert_eq(c.bias[i], i < QS_QKV);
    }
    cr_assert(c.tied);
    int64_t out, in;
    qs_linear_shape(&c, QS_K, &out, &in);
    cr_assert(out == 40 && in == 64);
    qs_linear_shape(&c, QS_O, &out, &in);
    cr_assert(out == 64 && in == 80);
    qs_linear_shape(&c, QS_DOWN, &out, &in);
    cr_assert(out == 64 && in == 160);
    cr_assert_str_eq(qs_linear_path(QS_GATE), "mlp.gate_proj");
}

/* ---- other architectures ---- */

Test(hf_config, windows_of_mistral_are_on_every_layer)
{
    qs_hf_config c;
    const char *class_name = "MistralForCausalLM";
    cr_assert_eq(parse(&c, as("mistral", class_name, "\"sliding_window\":7,\"head_dim\":24")),
                 QS_OK, "%s", qs_error_text());
    cr_assert(c.window == 7 && c.windowed[0] && c.windowed[2] && c.head_dim == 24);
    cr_assert(!c.bias[QS_Q] && !c.bias[QS_DOWN] && !c.qk_norm);
    cr_assert_eq(parse(&c, as("mistral", class_name, "\"sliding_window\":null")), QS_OK);
    cr_assert(c.window == 0 && !c.windowed[0]);
    cr_assert_eq(parse(&c, as("mistral", class_name, "")), QS_OK);
    cr_assert_eq(c.window, 4096); /* the default of the class */
}

Test(hf_config, windows_of_qwen_are_on_the_upper_layers)
{
    qs_hf_config v4, v5;
    const char *class_name = "Qwen2ForCausalLM";
    cr_assert_eq(parse(&v4, as("qwen2", class_name,
                               "\"use_sliding_window\":true,\"sliding_window\":5,"
                               "\"max_window_layers\":1")),
                 QS_OK, "%s", qs_error_text());
    cr_assert(v4.window == 5 && !v4.windowed[0] && v4.windowed[1] && v4.windowed[2]);
    cr_assert(v4.bias[QS_Q] && v4.bias[QS_K] && v4.bias[QS_V] && !v4.bias[QS_O] && !v4.bias[QS_UP]);
    cr_assert_eq(parse(&v5, as("qwen2", class_name,
                               "\"use_sliding_window\":true,\"sliding_window\":5,"
                               "\"max_window_layers\":1,\"layer_types\":[\"full_attention\","
                               "\"sliding_attention\",\"sliding_attention\"]")),
                 QS_OK, "%s", qs_error_text());
    cr_assert_eq(memcmp(&v4, &v5, sizeof v4), 0);
    /* As most checkpoints have it: a number that is not used. */
    cr_assert_eq(
        parse(&v4, as("qwen2", class_name, "\"use_sliding_window\":false,\"sliding_window\":5")),
        QS_OK);
    cr_assert(v4.window == 0 && !v4.windowed[2]);
}

Test(hf_config, qwen3_norms_its_heads_and_has_a_width_of_its_own)
{
    qs_hf_config c;
    cr_assert_eq(parse(&c, as("qwen3", "Qwen3ForCausalLM", "\"attention_bias\":true")), QS_OK, "%s",
                 qs_error_text());
    cr_assert(c.qk_norm && c.head_dim == 128 && c.bias[QS_O] && !c.bias[QS_GATE]);
}

Test(hf_config, gemma2_caps_and_each_second_layer_sees_a_window)
{
    qs_hf_config c, v5;
    const char *class_name = "Gemma2ForCausalLM";
    cr_assert_eq(parse(&c, as("gemma2", class_name,
                              "\"hidden_act\":\"gelu_pytorch_tanh\",\"sliding_window\":5,"
                              "\"sliding_window_size\":5,\"attn_logit_softcapping\":50.0,\"final_"
                              "logit_softcapping\":30.0,"
                              "\"query_pre_attn_scalar\":224,\"rope_theta\":10000.0")),
                 QS_OK, "%s", qs_error_text());
    cr_assert_eq(parse(&v5, as("gemma2", class_name,
                               "\"sliding_window\":5,\"query_pre_attn_scalar\":224,"
                               "\"layer_types\":[\"sliding_attention\",\"full_attention\","
                               "\"sliding_attention\"],\"rope_parameters\":{"
                               "\"rope_type\":\"default\",\"rope_theta\":10000.0}")),
                 QS_OK, "%s", qs_error_text());
    cr_assert_eq(memcmp(&c, &v5, sizeof c), 0);
    cr_assert(c.norm_plus_one && c.embedding_factor_rounded && c.glu == QS_GLU_GELU_TANH);
    cr_assert(!c.qk_norm && c.tied && c.rope_local_theta == 0.0);
    cr_assert(c.windowed[0] && !c.windowed[1] && c.windowed[2]);
    cr_assert(c.attention_cap == 50.0F && c.final_cap == 30.0F);
    cr_assert_eq(parse(&c, as("gemma2", class_name,
                              "\"attn_logit_softcapping\":null,\"final_logit_softcapping\":null")),
                 QS_OK, "%s", qs_error_text());
    cr_assert(c.attention_cap == 0.0F && c.final_cap == 0.0F);
}

Test(hf_config, olmo2_norms_behind_and_over_all_heads)
{
    qs_hf_config c;
    const char *class_name = "Olmo2ForCausalLM";
    cr_assert_eq(parse(&c, as("olmo2", class_name,
                              "\"attention_bias\":true,\"rope_theta\":500000,"
                              "\"rope_scaling\":null,\"pad_token_id\":1")),
                 QS_OK, "%s", qs_error_text());
    cr_assert(qs_norms_behind(&c) && !qs_norms_in_front(&c) && c.qk_norm && c.qk_whole);
    cr_assert_eq(qs_qk_norm_width(&c, c.n_heads), 64);
    cr_assert_eq(qs_qk_norm_width(&c, c.n_kv_heads), 32);
    cr_assert(c.bias[QS_Q] && c.bias[QS_O] && !c.bias[QS_GATE] && !c.norm_plus_one && !c.tied);
    cr_assert(c.window == 0 && c.rope_theta == 5e5 && c.rope_local_theta == 0.0);
    /* The others' norms. */
    cr_assert_eq(parse(&c, as("qwen3", "Qwen3ForCausalLM", "")), QS_OK);
    cr_assert(qs_norms_in_front(&c) && !qs_norms_behind(&c));
    cr_assert_eq(qs_qk_norm_width(&c, c.n_heads), 128);
    cr_assert_eq(parse(&c, as("gemma2", "Gemma2ForCausalLM", "")), QS_OK);
    cr_assert(qs_norms_in_front(&c) && qs_norms_behind(&c));
    cr_assert_eq(qs_qk_norm_width(&c, c.n_heads), 0);
    /* The class's own values. */
    cr_assert_eq(parse(&c, "{\"model_type\":\"olmo2\"}"), QS_OK, "%s", qs_error_text());
    cr_assert(c.n_layers == 32 && c.n_kv_heads == 32 && c.head_dim == 128 && c.hidden == 4096);
    cr_assert(c.vocab == 50304 && c.max_position == 2048 && c.rms_norm_eps == 1e-5F);
    cr_assert(c.ffn_hidden == 11008 && c.rope_theta == 1e4 && !c.bias[QS_Q]);
}

/* As AI2's files have it, and as transformers 5 writes it. */
Test(hf_config, olmo3_in_both_spellings)
{
    static qs_hf_config v4, v5, c;
    const char *class_name = "Olmo3ForCausalLM";
    static const char types[] =
        "\"sliding_window\":5,\"layer_types\":[\"sliding_attention\",\"full_attention\","
        "\"sliding_attention\"]";
    static const char yarn[] =
        "\"rope_type\":\"yarn\",\"factor\":8.0,\"attention_factor\":1.2079441541679836,"
        "\"beta_fast\":32.0,\"beta_slow\":1.0,\"original_max_position_embeddings\":8192";
    char text[1024];
    snprintf(text, sizeof text, "%s,\"rope_theta\":500000,\"rope_scaling\":{%s}", types, yarn);
    cr_assert_eq(parse(&v4, as("olmo3", class_name, text)), QS_OK, "%s", qs_error_text());
    snprintf(text, sizeof text,
             "%s,\"rope_parameters\":{\"full_attention\":{%s,\"rope_theta\":500000.0},"
             "\"sliding_attention\":{\"rope_type\":\"default\",\"rope_theta\":500000.0}}",
             types, yarn);
    cr_assert_eq(parse(&v5, as("olmo3", class_name, text)), QS_OK, "%s", qs_error_text());
    cr_assert_eq(memcmp(&v4, &v5, sizeof v4), 0);
    cr_assert(qs_norms_behind(&v4) && !qs_norms_in_front(&v4) && v4.qk_whole && !v4.norm_plus_one);
    cr_assert(v4.windowed[0] && !v4.windowed[1] && v4.windowed[2] && v4.window == 5);
    cr_assert(v4.rope_type == QS_ROPE_YARN && v4.rope_magnitude == 1.2079441541679836);
    cr_assert(v4.rope_theta == 5e5 && v4.rope_local_theta == 5e5);
    /* The class's own values: each fourth layer sees all, none scales. */
    cr_assert_eq(parse(&c, "{\"model_type\":\"olmo3\"}"), QS_OK, "%s", qs_error_text());
    cr_assert(c.windowed[2] && !c.windowed[3] && c.windowed[4] && !c.windowed[31]);
    cr_assert(c.window == 4096 && c.rope_type == QS_ROPE_DEFAULT && c.rope_magnitude == 1.0);
    cr_assert(c.rope_theta == 5e5 && c.rope_local_theta == 5e5);
    /* Another base is one where it is said for both kinds of layers. */
    cr_assert_eq(parse(&c, as("olmo3", class_name,
                              "\"rope_parameters\":{\"full_attention\":{\"rope_theta\":1e4},"
                              "\"sliding_attention\":{\"rope_theta\":2e4}}")),
                 QS_OK, "%s", qs_error_text());
    cr_assert(c.rope_theta == 1e4 && c.rope_local_theta == 2e4);
}

static const char phi3_factors[] = "\"short_factor\":[1,1.5,2],\"long_factor\":[4,8,16]";

/* As Microsoft's files have it, and as transformers 5 writes it. */
Test(hf_config, phi3_in_both_spellings)
{
    static qs_hf_config v4, v5, c;
    const char *class_name = "Phi3ForCausalLM";
    char text[1024];
    snprintf(text, sizeof text,
             "\"attention_bias\":false,\"auto_map\":{\"AutoConfig\":\"x.Y\"},\"embd_pdrop\":0.0,"
             "\"full_attn_mod\":1,\"interpolate_factor\":1,\"lm_head_bias\":false,"
             "\"mlp_bias\":false,\"max_position_embeddings\":131072,"
             "\"original_max_position_embeddings\":4096,\"partial_rotary_factor\":0.375,"
             "\"resid_pdrop\":0.0,\"rope_theta\":5000.0,\"sliding_window\":2047,"
             "\"rope_scaling\":{\"type\":\"su\",%s}",
             phi3_factors);
    cr_assert_eq(parse(&v4, as("phi3", class_name, text)), QS_OK, "%s", qs_error_text());
    snprintf(text, sizeof text,
             "\"max_position_embeddings\":131072,\"sliding_window\":2047,\"rope_parameters\":{"
             "\"original_max_position_embeddings\":4096,\"partial_rotary_factor\":0.375,"
             "\"rope_theta\":5000.0,\"rope_type\":\"longrope\",%s}",
             phi3_factors);
    cr_assert_eq(parse(&v5, as("phi3", class_name, text)), QS_OK, "%s", qs_error_text());
    cr_assert_eq(memcmp(&v4, &v5, sizeof v4), 0);
    cr_assert(v4.fused && !v4.tied && v4.rms_norm_eps == 1e-5F && v4.rotary_dim == 6);
    cr_assert(v4.window == 2047 && v4.windowed[0] && v4.windowed[2]);
    cr_assert_float_eq(v4.rope_magnitude, sqrt(1.0 + log(32.0) / log(4096.0)), 1e-15);
    int64_t out, in;
    for (int i = 0; i < QS_LINEAR_COUNT; i++) {
        qs_linear_shape(&v4, (qs_linear)i, &out, &in);
        cr_assert_eq(out > 0, qs_linears(true) >> i & 1, "%s", qs_linear_path((qs_linear)i));
        cr_assert(!v4.bias[i]);
    }
    qs_linear_shape(&v4, QS_QKV, &out, &in);
    cr_assert(out == 64 + 2 * 32 && in == 64);
    qs_linear_shape(&v4, QS_GATE_UP, &out, &in);
    cr_assert(out == 320 && in == 64);
    /* The class's own values: no window, all of a head turns. */
    cr_assert_eq(parse(&c, as("phi3", class_name, "")), QS_OK, "%s", qs_error_text());
    cr_assert(c.window == 0 && !c.windowed[0] && c.rotary_dim == 16 && c.max_position == 4096);
    cr_assert_eq(parse(&c, as("phi3", class_name, "\"sliding_window\":null")), QS_OK);
    cr_assert(c.window == 0 && !c.windowed[0]);
}

Test(hf_config, longrope_goes_by_the_length_of_the_run)
{
    static qs_hf_config c;
    double plain[3], f[3];
    char text[512];
    cr_assert_eq(parse(&c, with("\"head_dim\":6")), QS_OK, "%s", qs_error_text());
    qs_hf_rope_frequencies(&c, 9, plain);
    snprintf(text, sizeof text,
             "\"head_dim\":6,\"max_position_embeddings\":64,\"rope_scaling\":{\"rope_type\":"
             "\"longrope\",\"original_max_position_embeddings\":8,%s}",
             phi3_factors);
    cr_assert_eq(parse(&c, with(text)), QS_OK, "%s", qs_error_text());
    cr_assert_float_eq(c.rope_magnitude, sqrt(1.0 + log(8.0) / log(8.0)), 1e-15);
    static const double short_factor[] = {1.0, 1.5, 2.0}, long_factor[] = {4.0, 8.0, 16.0};
    for (int i = 0; i < 3; i++) {
        qs_hf_rope_frequencies(&c, 8, f);
        cr_assert_float_eq(f[i], plain[i] / short_factor[i], 1e-7 * plain[i]);
        qs_hf_rope_frequencies(&c, 9, f);
        cr_assert_float_eq(f[i], plain[i] / long_factor[i], 1e-7 * plain[i]);
    }
    /* A factor of its own counts for the magnitude, and a magnitude of its own more. */
    snprintf(text, sizeof text,
             "\"head_dim\":6,\"max_position_embeddings\":64,\"rope_scaling\":{\"rope_type\":"
             "\"longrope\",\"factor\":64,\"original_max_position_embeddings\":8,%s}",
             phi3_factors);
    cr_assert_eq(parse(&c, with(text)), QS_OK, "%s", qs_error_text());
    cr_assert_float_eq(c.rope_magnitude, sqrt(1.0 + log(64.0) / log(8.0)), 1e-15);
    snprintf(text, sizeof text,
             "\"head_dim\":6,\"rope_scaling\":{\"rope_type\":\"longrope\",\"factor\":64,"
             "\"attention_factor\":1.25,\"original_max_position_embeddings\":8,%s}",
             phi3_factors);
    cr_assert_eq(parse(&c, with(text)), QS_OK, "%s", qs_error_text());
    cr_assert_eq(c.rope_magnitude, 1.25);
}

/* base (factor L / max - (factor - 1))^(dim / (dim - 2)) beyond max, the base itself below it. */
Test(hf_config, dynamic_has_a_larger_base_beyond_max_position)
{
    static qs_hf_config plain, c;
    double want[8], f[8];
    cr_assert_eq(parse(&plain, with("")), QS_OK);
    cr_assert_eq(parse(&c, with("\"max_position_embeddings\":100,\"rope_scaling\":{\"rope_type\":"
                                "\"dynamic\",\"factor\":3.0}")),
                 QS_OK, "%s", qs_error_text());
    cr_assert_eq(c.rope_magnitude, 1.0);
    qs_hf_rope_frequencies(&plain, 1, want);
    for (int64_t length = 1; length <= 100; length += 33) {
        qs_hf_rope_frequencies(&c, length, f);
        cr_assert_eq(memcmp(f, want, sizeof f), 0);
    }
    qs_hf_rope_frequencies(&c, 250, f);
    const double base = 10000.0 * pow(3.0 * 2.5 - 2.0, 16.0 / 14.0);
    for (int i = 0; i < 8; i++) {
        const double frequency = pow(base, -i / 8.0);
        cr_assert_float_eq(f[i], frequency, 1e-6 * frequency, "%d", i);
    }
}

Test(hf_config, gemma3_in_both_spellings)
{
    qs_hf_config v4, v5, c;
    const char *class_name = "Gemma3ForCausalLM";
    cr_assert_eq(parse(&v4, as("gemma3_text", class_name,
                               "\"hidden_activation\":\"gelu_pytorch_tanh\","
                               "\"attn_logit_softcapping\":null,\"final_logit_softcapping\":null,"
                               "\"cache_implementation\":\"hybrid\",\"sliding_window\":5,"
                               "\"query_pre_attn_scalar\":168,\"rope_theta\":2000000.0,"
                               "\"rope_local_base_freq\":30000.0,\"sliding_window_pattern\":2,"
                               "\"rope_scaling\":{\"rope_type\":\"linear\",\"factor\":8.0}")),
                 QS_OK, "%s", qs_error_text());
    cr_assert_eq(
        parse(&v5, as("gemma3_text", class_name,
                      "\"sliding_window\":5,\"query_pre_attn_scalar\":168,"
                      "\"_sliding_window_pattern\":2,\"use_bidirectional_attention\":false,"
                      "\"layer_types\":[\"sliding_attention\",\"full_attention\","
                      "\"sliding_attention\"],\"rope_parameters\":{\"full_attention\":"
                      "{\"rope_type\":\"linear\",\"factor\":8.0,\"rope_theta\":2000000.0},"
                      "\"sliding_attention\":{\"rope_type\":\"default\","
                      "\"rope_theta\":30000.0}}")),
        QS_OK, "%s", qs_error_text());
    cr_assert_eq(memcmp(&v4, &v5, sizeof v4), 0);
    cr_assert(v4.norm_plus_one && v4.embedding_factor_rounded && v4.glu == QS_GLU_GELU_TANH);
    cr_assert(v4.qk_norm && v4.tied && v4.head_dim == 256);
    cr_assert(v4.score_scale == 1.0F / sqrtf(168.0F) && v4.embedding_multiplier == 8.0);
    cr_assert(v4.windowed[0] && !v4.windowed[1] && v4.windowed[2] && v4.window == 5);
    double full[128], local[128];
    qs_hf_rope_frequencies(&v4, 512, full);
    qs_hf_rope_local_frequencies(&v4, local);
    cr_assert_float_eq(full[0], 0.125, 0.0); /* base^0 / 8, and base^0 */
    cr_assert_float_eq(local[0], 1.0, 0.0);
    cr_assert_float_eq(full[64], 0.125 / sqrt(2e6), 1e-10);
    cr_assert_float_eq(local[64], 1.0 / sqrt(3e4), 1e-9);
    /* The class's own values: each sixth layer sees all. */
    cr_assert_eq(parse(&c, as("gemma3_text", class_name, "")), QS_OK, "%s", qs_error_text());
    cr_assert(c.windowed[2] && c.window == 4096 && c.rope_theta == 1e6 &&
              c.rope_local_theta == 1e4);
    cr_assert_eq(c.score_scale, 0.0625F);
}

/* As the published file has it, but for its sizes, and as transformers 5 writes it. */
Test(hf_config, smollm3_has_layers_without_rope)
{
    static qs_hf_config v4, v5, c;
    const char *class_name = "SmolLM3ForCausalLM";
    cr_assert_eq(
        parse(&v4, as("smollm3", class_name,
                      "\"attention_bias\":false,\"layer_types\":[\"full_attention\","
                      "\"full_attention\",\"full_attention\"],\"max_position_embeddings\":65536,"
                      "\"max_window_layers\":28,\"mlp_bias\":false,\"no_rope_layer_interval\":4,"
                      "\"no_rope_layers\":[1,0,1],\"pretraining_tp\":2,\"rope_scaling\":null,"
                      "\"rope_theta\":5000000.0,\"sliding_window\":null,"
                      "\"use_sliding_window\":false")),
        QS_OK, "%s", qs_error_text());
    cr_assert_eq(parse(&v5, as("smollm3", class_name,
                               "\"max_position_embeddings\":65536,\"no_rope_layer_interval\":2,"
                               "\"rope_parameters\":{\"rope_type\":\"default\","
                               "\"rope_theta\":5000000.0}")),
                 QS_OK, "%s", qs_error_text());
    cr_assert_eq(memcmp(&v4, &v5, sizeof v4), 0);
    cr_assert(!v4.unturned[0] && v4.unturned[1] && !v4.unturned[2] && v4.tied && v4.window == 0);
    /* Windows are on the layers without RoPE, unless layer_types says otherwise. */
    cr_assert_eq(parse(&c, as("smollm3", class_name,
                              "\"no_rope_layers\":[0,1,0,1],\"use_sliding_window\":true,"
                              "\"sliding_window\":5")),
                 QS_OK, "%s", qs_error_text());
    cr_assert(c.unturned[0] && !c.unturned[1] && c.unturned[2] && !c.unturned[3]);
    cr_assert(c.window == 5 && c.windowed[0] && !c.windowed[1] && c.windowed[2]);
    cr_assert_eq(parse(&c, as("smollm3", class_name,
                              "\"use_sliding_window\":true,\"sliding_window\":5,\"layer_types\":"
                              "[\"sliding_attention\",\"full_attention\",\"full_attention\"]")),
                 QS_OK, "%s", qs_error_text());
    cr_assert(c.windowed[0] && !c.windowed[2]);
    /* The class's own values: each fourth layer is without; a number that is not used. */
    cr_assert_eq(parse(&c, "{\"model_type\":\"smollm3\",\"sliding_window\":5}"), QS_OK, "%s",
                 qs_error_text());
    cr_assert(c.n_layers == 36 && !c.unturned[2] && c.unturned[3] && c.unturned[35]);
    cr_assert(c.window == 0 && c.rope_theta == 2e6 && c.n_kv_heads == 4);
}

Test(hf_config, granite_has_four_multipliers)
{
    static qs_hf_config c;
    const char *class_name = "GraniteForCausalLM";
    cr_assert_eq(parse(&c, as("granite", class_name,
                              "\"attention_bias\":true,\"mlp_bias\":true,"
                              "\"embedding_multiplier\":12,\"attention_multiplier\":0.0078125,"
                              "\"residual_multiplier\":0.22,\"logits_scaling\":16.0,"
                              "\"rope_theta\":10000000.0,\"tie_word_embeddings\":true")),
                 QS_OK, "%s", qs_error_text());
    cr_assert(c.embedding_multiplier == 12.0 && c.residual_multiplier == 0.22);
    cr_assert(c.logits_scaling == 16.0 && c.score_scale == 0.0078125F);
    cr_assert(c.tied && c.bias[QS_O] && c.bias[QS_DOWN]);
    cr_assert(!c.norm_plus_one && !c.embedding_factor_rounded && c.glu == QS_GLU_SILU);
    /* The class's own values: 1 for scores, too. */
    cr_assert_eq(parse(&c, as("granite", class_name, "")), QS_OK, "%s", qs_error_text());
    cr_assert(c.embedding_multiplier == 1.0 && c.residual_multiplier == 1.0);
    cr_assert(c.logits_scaling == 1.0 && c.score_scale == 1.0F && !c.tied);
    /* Others have neither the keys nor the factors. */
    cr_assert_eq(parse(&c, with("")), QS_OK);
    cr_assert(c.embedding_multiplier == 1.0 && c.residual_multiplier == 1.0);
    cr_assert(c.logits_scaling == 1.0 && c.score_scale == 0.25F);
}

Test(hf_config, bitsandbytes_config_is_recognized)
{
    qs_hf_config c;
    cr_assert_eq(parse(&c, with("\"quantization_config\":{\"quant_method\":\"bitsandbytes\","
                                "\"load_in_4bit\":true,\"load_in_8bit\":false,"
                                "\"bnb_4bit_quant_type\":\"nf4\"}")),
                 QS_OK, "%s", qs_error_text());
    cr_assert(c.bnb_4bit);
}

Test(hf_config, null_means_the_default_even_for_unknown_keys)
{
    qs_hf_config c;
    cr_assert_eq(parse(&c, with("\"rope_scaling\":null,\"sliding_window\":null,\"head_dim\":null")),
                 QS_OK, "%s", qs_error_text());
    cr_assert_eq(c.head_dim, 16);
}

Test(hf_config, rope_frequencies_follow_their_formulas)
{
    qs_hf_config c;
    double f[8], scaled[8];
    cr_assert_eq(parse(&c, with("")), QS_OK);
    qs_hf_rope_frequencies(&c, 512, f);
    cr_assert_float_eq(f[0], 1.0, 1e-15);
    cr_assert_float_eq(f[4], 1e-2, 1e-9); /* 10000^(-8/16), in fp32 */
    c.rope_type = QS_ROPE_LINEAR;
    c.rope_factor = 4.0;
    qs_hf_rope_frequencies(&c, 512, scaled);
    cr_assert_float_eq(scaled[3], f[3] / 4.0, 1e-15);
    c.rope_type = QS_ROPE_LLAMA3;
    c.rope_factor = 8.0;
    c.rope_low_freq_factor = 1.0;
    c.rope_high_freq_factor = 4.0;
    c.rope_original_max_position = 1000;
    qs_hf_rope_frequencies(&c, 512, scaled);
    cr_assert_eq(scaled[0], f[0], "wavelength 2 pi is below 1000 / 4");
    cr_assert_float_eq(scaled[7], f[7] / 8.0, 1e-18, "wavelength 19869 is above 1000 / 1");
    double turns = 1000.0 * f[4] / (2.0 * acos(-1.0)); /* wavelength 628: between */
    double smooth = (turns - 1.0) / 3.0;
    cr_assert_float_eq(scaled[4], (1.0 - smooth) * f[4] / 8.0 + smooth * f[4], 1e-9);
}

/* Qwen2.5's, with a head of 16: 10000^(-i / 8) turns 1000 10000^(-i / 8) / 2 pi times; borders at
 * the pairs of 32 turns and of 1. */
Test(hf_config, yarn_keeps_fast_frequencies_and_divides_slow_ones)
{
    qs_hf_config c;
    double plain[8], scaled[8];
    cr_assert_eq(parse(&c, with("")), QS_OK);
    qs_hf_rope_frequencies(&c, 512, plain);
    cr_assert_eq(c.rope_magnitude, 1.0);
    cr_assert_eq(parse(&c, with("\"rope_scaling\":{\"type\":\"yarn\",\"factor\":4.0,"
                                "\"original_max_position_embeddings\":1000}")),
                 QS_OK, "%s", qs_error_text());
    cr_assert_float_eq(c.rope_magnitude, 0.1 * log(4.0) + 1.0, 1e-15);
    qs_hf_rope_frequencies(&c, 512, scaled);
    /* 8 log(1000 / 64 pi) / log(10000) = 1.39, rounded down; 8 log(1000 / 2 pi) / log(10000)
     * = 4.40, rounded up */
    const double low = 1.0, high = 5.0;
    for (int i = 0; i < 8; i++) {
        const double ramp = fmin(fmax((i - low) / (high - low), 0.0), 1.0);
        const double want = plain[i] / 4.0 * ramp + plain[i] * (1.0 - ramp);
        cr_assert_float_eq(scaled[i], want, 1e-6 * want, "frequency %d is %g, not %g", i, scaled[i],
                           want);
    }
    cr_assert_eq(parse(&c, with("\"rope_scaling\":{\"type\":\"yarn\",\"factor\":40,\"mscale\":1.0,"
                                "\"mscale_all_dim\":0.5}")),
                 QS_OK, "%s", qs_error_text());
    cr_assert_float_eq(c.rope_magnitude, (0.1 * log(40.0) + 1.0) / (0.05 * log(40.0) + 1.0), 1e-15);
}
