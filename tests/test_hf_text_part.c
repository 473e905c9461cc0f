/* Models of text and images: what their config.json says of the text part, as the classes of
 * transformers read it, and the names of its tensors. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "hf/hf_text_part.h"
#include "store/io.h"
#include "store/json.h"
#include "tests/scratch.h"

static char dir[SCRATCH_MAX];

static void make_dir(void)
{
    scratch_make(dir, NULL);
}

static void remove_dir(void)
{
    scratch_remove(dir);
}

TestSuite(hf_text_part, .init = make_dir, .fini = remove_dir);

static const char *in_dir(const char *name)
{
    static char path[160];
    (void)snprintf(path, sizeof path, "%s/%s", dir, name);
    return path;
}

/* Reads `text` as the config.json of a folder; *kept is what base.h5 would keep. */
static qs_status read_config(qs_hf_config *out, const char *text, json_t **kept)
{
    char *part = NULL;
    qs_error_clear();
    cr_assert_eq(qs_io_write_file(in_dir("config.json"), text, strlen(text)), QS_OK);
    const qs_status st = qs_hf_config_read(out, &part, in_dir("config.json"), 1 << 20);
    cr_assert_eq(part != NULL, st == QS_OK);
    if (kept != NULL && part != NULL) {
        cr_assert_eq(qs_json_parse(kept, part, strlen(part), "kept"), QS_OK);
    }
    free(part);
    return st;
}

/* A small model of each kind: `outer` and `inner` are members behind those that it has. */
static const char *gemma3(const char *outer, const char *inner)
{
    static char text[4096];
    (void)snprintf(text, sizeof text,
                   "{\"model_type\":\"gemma3\",\"text_config\":{\"hidden_size\":64,"
                   "\"num_hidden_layers\":2,\"num_attention_heads\":4%s%s}%s%s}",
                   inner[0] != '\0' ? "," : "", inner, outer[0] != '\0' ? "," : "", outer);
    return text;
}

static const char *mistral3(const char *outer, const char *inner)
{
    static char text[4096];
    (void)snprintf(text, sizeof text,
                   "{\"model_type\":\"mistral3\",\"text_config\":{\"hidden_size\":64,"
                   "\"num_hidden_layers\":2,\"num_attention_heads\":4,\"num_key_value_heads\":4%s%s"
                   "}%s%s}",
                   inner[0] != '\0' ? "," : "", inner, outer[0] != '\0' ? "," : "", outer);
    return text;
}

/* As google/gemma-3-4b-it has it: what is not said is the default of Gemma3TextConfig. */
Test(hf_text_part, gemma3_as_on_the_hub)
{
    qs_hf_config c;
    json_t *kept = NULL;
    cr_assert_eq(
        read_config(&c,
                    "{\"architectures\":[\"Gemma3ForConditionalGeneration\"],"
                    "\"boi_token_index\":255999,\"eoi_token_index\":256000,"
                    "\"eos_token_id\":[1,106],\"image_token_index\":262144,"
                    "\"initializer_range\":0.02,\"mm_tokens_per_image\":256,"
                    "\"model_type\":\"gemma3\",\"text_config\":{\"hidden_size\":2560,"
                    "\"intermediate_size\":10240,\"model_type\":\"gemma3_text\","
                    "\"num_hidden_layers\":34,\"rope_scaling\":{\"factor\":8.0,"
                    "\"rope_type\":\"linear\"},\"sliding_window\":1024},"
                    "\"torch_dtype\":\"bfloat16\",\"transformers_version\":\"4.50.0.dev0\","
                    "\"vision_config\":{\"hidden_size\":1152,\"image_size\":896,"
                    "\"model_type\":\"siglip_vision_model\",\"vision_use_head\":false}}",
                    &kept),
        QS_OK, "%s", qs_error_text());
    cr_expect_str_eq(c.model_type, "gemma3_text");
    cr_expect_str_eq(c.part_of, "gemma3");
    cr_expect(c.hidden == 2560 && c.ffn_hidden == 10240 && c.n_layers == 34);
    cr_expect(c.n_heads == 8 && c.n_kv_heads == 4 && c.head_dim == 256 && c.vocab == 262208);
    cr_expect(c.tied && c.dtype == QS_BF16 && c.window == 1024 && c.rms_norm_eps == 1e-6f);
    cr_expect(c.rope_type == QS_ROPE_LINEAR && c.rope_factor == 8.0 && c.rope_theta == 1e6);
    cr_expect(c.windowed[0] && !c.windowed[5] && c.rope_local_theta == 1e4);
    json_t *wanted =
        json_pack("{s:i, s:i, s:s, s:i, s:{s:f, s:s}, s:i, s:[s], s:[i, i], s:s, s:s}",
                  "hidden_size", 2560, "intermediate_size", 10240, "model_type", "gemma3_text",
                  "num_hidden_layers", 34, "rope_scaling", "factor", 8.0, "rope_type", "linear",
                  "sliding_window", 1024, "architectures", "Gemma3ForCausalLM", "eos_token_id", 1,
                  106, "torch_dtype", "bfloat16", "transformers_version", "4.50.0.dev0");
    cr_expect(json_equal(kept, wanted));
    json_decref(wanted);
    json_decref(kept);
}

/* As mistralai/Mistral-Small-3.1-24B-Instruct-2503 has it: nothing says that the head is not tied
 * but the default of MistralConfig. */
Test(hf_text_part, mistral3_as_on_the_hub)
{
    qs_hf_config c;
    cr_assert_eq(
        read_config(&c,
                    "{\"architectures\":[\"Mistral3ForConditionalGeneration\"],"
                    "\"image_token_index\":10,\"model_type\":\"mistral3\","
                    "\"multimodal_projector_bias\":false,\"projector_hidden_act\":\"gelu\","
                    "\"spatial_merge_size\":2,\"text_config\":{\"attention_dropout\":0.0,"
                    "\"head_dim\":128,\"hidden_act\":\"silu\",\"hidden_size\":5120,"
                    "\"initializer_range\":0.02,\"intermediate_size\":32768,"
                    "\"max_position_embeddings\":131072,\"model_type\":\"mistral\","
                    "\"num_attention_heads\":32,\"num_hidden_layers\":40,"
                    "\"num_key_value_heads\":8,\"rms_norm_eps\":1e-05,"
                    "\"rope_theta\":1000000000.0,\"sliding_window\":null,\"use_cache\":true,"
                    "\"vocab_size\":131072},\"torch_dtype\":\"bfloat16\","
                    "\"transformers_version\":\"4.50.0.dev0\","
                    "\"vision_config\":{\"model_type\":\"pixtral\"},\"vision_feature_layer\":-1}",
                    NULL),
        QS_OK, "%s", qs_error_text());
    cr_expect_str_eq(c.model_type, "mistral");
    cr_expect_str_eq(c.part_of, "mistral3");
    cr_expect(c.hidden == 5120 && c.head_dim == 128 && c.vocab == 131072 && c.window == 0);
    cr_expect(!c.tied && c.dtype == QS_BF16 && c.rope_theta == 1e9 && c.rms_norm_eps == 1e-5f);
}

Test(hf_text_part, a_model_of_text_alone_is_read_as_it_is)
{
    static const char text[] = "{\"model_type\":\"llama\",\"hidden_size\":64,"
                               "\"num_attention_heads\":4, \"rms_norm_eps\":1e-5}";
    qs_hf_config c;
    char *kept = NULL, part_of[QS_HF_TYPE_BYTES] = "?";
    cr_assert_eq(qs_hf_text_part(&kept, part_of, text, strlen(text), "c"), QS_OK);
    cr_assert_null(kept);
    cr_assert_str_eq(part_of, "");
    cr_assert_eq(qs_io_write_file(in_dir("config.json"), text, strlen(text)), QS_OK);
    cr_assert_eq(qs_hf_config_read(&c, &kept, in_dir("config.json"), 1 << 20), QS_OK);
    cr_assert_str_eq(kept, text);
    cr_assert_str_eq(c.part_of, "");
    free(kept);
}

/* The type of the weights and the ids that end a text: the file around text_config is asked first,
 * in either spelling. */
Test(hf_text_part, the_outer_file_counts_where_the_classes_ask_it)
{
    qs_hf_config c;
    json_t *kept = NULL;
    cr_assert_eq(read_config(&c,
                             gemma3("\"dtype\":\"float16\",\"eos_token_id\":7",
                                    "\"torch_dtype\":\"bfloat16\",\"eos_token_id\":9"),
                             &kept),
                 QS_OK, "%s", qs_error_text());
    cr_expect_eq(c.dtype, QS_F16);
    cr_expect_eq(json_integer_value(json_object_get(kept, "eos_token_id")), 7);
    cr_expect_null(json_object_get(kept, "torch_dtype"));
    json_decref(kept);
    cr_assert_eq(read_config(&c,
                             gemma3("\"dtype\":null,\"eos_token_id\":null",
                                    "\"torch_dtype\":\"bfloat16\",\"eos_token_id\":9"),
                             &kept),
                 QS_OK, "%s", qs_error_text());
    cr_expect_eq(c.dtype, QS_BF16);
    cr_expect_eq(json_integer_value(json_object_get(kept, "eos_token_id")), 9);
    json_decref(kept);
    cr_assert_eq(read_config(&c,
                             gemma3("\"quantization_config\":{\"quant_method\":\"bitsandbytes\","
                                    "\"load_in_4bit\":true,\"bnb_4bit_quant_type\":\"nf4\"}",
                                    ""),
                             NULL),
                 QS_OK, "%s", qs_error_text());
    cr_expect(c.bnb_4bit);
}

#define TIE(value) "\"tie_word_embeddings\":" #value

Test(hf_text_part, who_says_that_the_head_is_tied)
{
    static const struct {
        bool gemma;
        const char *outer, *inner;
        int tied; /* -1: refused */
    } cases[] = {
        {true, "", "", 1},
        {true, TIE(false), "", 0},
        {true, TIE(true), TIE(false), 0}, /* the head is in the file, or it is incomplete */
        {true, "", TIE(false), 0},
        {true, TIE(false), TIE(true), -1},
        {true, TIE(null), TIE(null), 1},
        {false, "", "", 0},
        {false, TIE(true), "", 1},
        {false, TIE(true), TIE(false), 0}, /* Mistral Small, saved again by transformers 5 */
        {false, "", TIE(true), 1},
        {false, TIE(false), TIE(true), -1},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *outer = cases[i].outer, *inner = cases[i].inner;
        const char *text = cases[i].gemma ? gemma3(outer, inner) : mistral3(outer, inner);
        const int tied = cases[i].tied;
        qs_hf_config c;
        cr_assert_eq(read_config(&c, text, NULL), tied < 0 ? QS_ERR_INPUT_VALUE : QS_OK, "%s: %s",
                     text, qs_error_text());
        cr_assert(tied < 0 || c.tied == (tied == 1), "%s", text);
    }
}

Test(hf_text_part, what_is_not_known_is_refused_by_name)
{
    static const struct {
        const char *text, *says;
        qs_status status;
    } wrong[] = {
        {"{\"model_type\":\"gemma3\"}", "\"text_config\"", QS_ERR_INPUT_VALUE},
        {"{\"model_type\":\"gemma3\",\"text_config\":null}", "\"text_config\"", QS_ERR_INPUT_VALUE},
        {"{\"model_type\":\"gemma3\",\"text_config\":[7]}", "\"text_config\"", QS_ERR_INPUT_VALUE},
        {"{\"model_type\":\"gemma3\",\"text_config\":{\"model_type\":\"llama\"}}",
         "text_config: \"model_type\" = llama is not supported; gemma3_text is",
         QS_ERR_INPUT_UNKNOWN},
        {"{\"model_type\":\"mistral3\",\"text_config\":{\"model_type\":\"ministral3\"}}",
         "text_config: \"model_type\" = ministral3 is not supported; mistral is",
         QS_ERR_INPUT_UNKNOWN},
        {"{\"model_type\":\"mistral3\",\"text_config\":{\"model_type\":7}}", "\"model_type\"",
         QS_ERR_INPUT_VALUE},
        {"{\"model_type\":\"gemma3\",\"architectures\":[\"Gemma3ForCausalLM\"],"
         "\"text_config\":{}}",
         "\"architectures\" = Gemma3ForCausalLM", QS_ERR_INPUT_UNKNOWN},
        {"{\"model_type\":\"gemma3\",\"text_config\":{\"quantization_config\":"
         "{\"quant_method\":\"bitsandbytes\",\"load_in_4bit\":true}}}",
         "text_config: \"quantization_config\"", QS_ERR_INPUT_UNKNOWN},
        {"{\"model_type\":\"gemma3\",\"logit_scale\":2,\"hidden_size\":64,\"text_config\":{}}",
         "\"logit_scale\", \"hidden_size\" are not known beside \"text_config\"",
         QS_ERR_INPUT_UNKNOWN},
        {"{\"model_type\":\"gemma3\",\"text_config\":{\"logit_scale\":2}}",
         "text_config: key \"logit_scale\" is not known", QS_ERR_INPUT_UNKNOWN},
        {"{\"model_type\":\"gemma3\",\"text_config\":{\"text_config\":{}}}",
         "key \"text_config\" is not known", QS_ERR_INPUT_UNKNOWN},
        {"{\"model_type\":\"gemma3\",\"text_config\":{\"hidden_size\":-1}}",
         "text_config: \"hidden_size\"", QS_ERR_INPUT_VALUE},
        {"{\"model_type\":\"gemma3\",\"is_encoder_decoder\":true,\"text_config\":{}}",
         "is_encoder_decoder", QS_ERR_INPUT_UNKNOWN},
        /* Their text part attends otherwise, or is not known. */
        {"{\"model_type\":\"paligemma\",\"text_config\":{\"model_type\":\"gemma2\"}}",
         "paligemma is a model of text and more", QS_ERR_INPUT_UNKNOWN},
        {"{\"model_type\":\"llava\",\"text_config\":{\"model_type\":\"mistral\"}}",
         "llava is a model of text and more", QS_ERR_INPUT_UNKNOWN},
        {"{\"model_type\":7,\"text_config\":{}}", "\"model_type\"", QS_ERR_INPUT_VALUE},
        {"[]", "not a JSON object", QS_ERR_INPUT_FORMAT},
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        qs_hf_config c;
        const qs_status st = read_config(&c, wrong[i].text, NULL);
        cr_expect_eq(st, wrong[i].status, "%s: %d %s", wrong[i].text, st, qs_error_text());
        cr_expect_not_null(strstr(qs_error_text(), wrong[i].says), "%s: %s", wrong[i].text,
                           qs_error_text());
        cr_expect_not_null(strstr(qs_error_text(), "config.json"), "%s", qs_error_text());
    }
}

Test(hf_text_part, only_types_that_belong_together_do)
{
    cr_assert(qs_hf_is_text_part("gemma3", "gemma3_text"));
    cr_assert(qs_hf_is_text_part("mistral3", "mistral"));
    cr_assert_not(qs_hf_is_text_part("gemma3", "mistral"));
    cr_assert_not(qs_hf_is_text_part("mistral", "mistral"));
    cr_assert_not(qs_hf_is_text_part("", "mistral"));
}

/* ---- tensors ---- */

enum { NAMES_MAX = 8 };

/* Takes the text part of a checkpoint of tensors with these names; what is left is in *out. */
static qs_status take(const char *const names[NAMES_MAX], qs_st_dir **out)
{
    static const float number[NAMES_MAX] = {1, 2, 3, 4, 5, 6, 7, 8}; /* the tensor's place */
    qs_st_item items[NAMES_MAX];
    qs_hf_config c = {.part_of = "gemma3"};
    int count = 0;
    for (; count < NAMES_MAX && names[count] != NULL; count++) {
        items[count] = (qs_st_item){names[count], QS_F32, 1, {1}, &number[count]};
    }
    qs_error_clear();
    cr_assert_eq(qs_st_write(in_dir("model.safetensors"), items, count, NULL), QS_OK);
    cr_assert_eq(qs_st_open(out, dir, "model"), QS_OK, "%s", qs_error_text());
    return qs_hf_take_text_tensors(*out, &c);
}

Test(hf_text_part, tensors_get_plain_names_from_both_spellings)
{
    static const char *const spellings[2][NAMES_MAX] = {
        {"vision_tower.a.q_proj.weight", "language_model.lm_head.weight",
         "language_model.model.norm.weight", "multi_modal_projector.b",
         "language_model.model.embed_tokens.weight"},
        {"model.vision_tower.a.q_proj.weight", "lm_head.weight", "model.language_model.norm.weight",
         "model.multi_modal_projector.b", "model.language_model.embed_tokens.weight"}};
    static const struct {
        const char *name;
        float is;
    } plain[] = {{"lm_head.weight", 2}, {"model.embed_tokens.weight", 5}, {"model.norm.weight", 3}};
    for (int s = 0; s < 2; s++) {
        qs_st_dir *d = NULL;
        cr_assert_eq(take(spellings[s], &d), QS_OK, "%s", qs_error_text());
        cr_assert_eq(qs_st_count(d), 3);
        for (int i = 0; i < 3; i++) {
            float x = 0;
            const qs_st_tensor *t = qs_st_find(d, plain[i].name);
            cr_assert_not_null(t, "%s", plain[i].name);
            cr_assert_eq(t, qs_st_at(d, i), "sorted");
            cr_assert_eq(qs_st_read_f32(d, t, 0, 1, &x), QS_OK);
            cr_assert_eq(x, plain[i].is);
        }
        qs_st_close(d);
    }
}

Test(hf_text_part, names_of_no_part_or_of_two_spellings_are_refused)
{
    static const struct {
        const char *names[NAMES_MAX], *says;
    } wrong[] = {
        {{"model.norm.weight", "lm_head.weight"}, "no tensor of the text part of gemma3"},
        {{"vision_tower.a"}, "no tensor of the text part of gemma3"},
        {{"language_model.lm_head.weight"}, "no tensor of the text part of gemma3"},
        {{"language_model.model.norm.weight", "model.language_model.norm.weight"}, "one spelling"},
        {{"language_model.model.norm.weight", "audio_tower.a"}, "\"audio_tower.a\" belongs to no"},
        {{"language_model.model.norm.weight", "model.norm.weight"}, "\"model.norm.weight\""},
        {{"language_model.model.norm.weight", "lm_head.weight"}, "\"lm_head.weight\""},
        {{"model.language_model.norm.weight", "language_model.lm_head.weight"},
         "\"language_model.lm_head.weight\""},
        {{"model.language_model.norm.weight", "vision_tower.a"}, "\"vision_tower.a\""},
        {{"model.language_model.norm.weight", "vision_towers"}, "\"vision_towers\""},
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        qs_st_dir *d = NULL;
        cr_expect_eq(take(wrong[i].names, &d), QS_ERR_INPUT_TENSOR, "%s", wrong[i].says);
        cr_expect_not_null(strstr(qs_error_text(), wrong[i].says), "%s: %s", wrong[i].says,
                           qs_error_text());
        qs_st_close(d);
    }
}

Test(hf_text_part, two_names_that_become_one_are_refused)
{
    static const qs_st_rename rules[] = {{"a.", "x."}, {"b.", "x."}, {"c.", NULL}};
    static const float one = 1;
    const qs_st_item items[] = {{"a.w", QS_F32, 1, {1}, &one},
                                {"b.w", QS_F32, 1, {1}, &one},
                                {"c.w", QS_F32, 1, {1}, &one}};
    qs_st_dir *d = NULL;
    int64_t left_out = 0;
    cr_assert_eq(qs_st_write(in_dir("model.safetensors"), items, 3, NULL), QS_OK);
    cr_assert_eq(qs_st_open(&d, dir, "model"), QS_OK);
    cr_assert_eq(qs_st_rename_tensors(d, rules, 2, &left_out), QS_ERR_INPUT_TENSOR);
    cr_assert_not_null(strstr(qs_error_text(), "\"c.w\""), "%s", qs_error_text());
    cr_assert_eq(qs_st_count(d), 3);
    qs_error_clear();
    cr_assert_eq(qs_st_rename_tensors(d, rules, 3, &left_out), QS_ERR_INPUT_TENSOR);
    cr_assert_not_null(strstr(qs_error_text(), "\"x.w\""), "%s", qs_error_text());
    cr_assert_eq(left_out, 1);
    qs_st_close(d);
}
