/* The PEFT directories that the LoRA vector comes from and goes to. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/rng.h"
#include "hf/safetensors.h"
#include "lora/lora_impl.h"
#include "store/io.h"
#include "tests/lora_fixture.h"
#include "tests/scratch.h"

static char folder[SCRATCH_MAX];

static void make_folder(void)
{
    scratch_make(folder, NULL);
}

static void remove_folder(void)
{
    scratch_remove(folder);
}

TestSuite(peft, .init = make_folder, .fini = remove_folder);

static float *random_vector(const qs_lora_layout *l)
{
    float *x = calloc((size_t)(l->n_layers * l->per_layer), sizeof *x);
    qs_rng rng = qs_rng_make(1, 0, 0, 77, 0);
    for (int layer = 0; layer < l->n_layers; layer++) {
        for (int64_t e = 0; e < l->used; e++) {
            x[layer * l->per_layer + e] =
                qs_rng_uniform(&rng, (uint64_t)(layer * l->per_layer + e)) - 0.5f;
        }
    }
    return x;
}

static void path_in(char out[192], const char *name)
{
    snprintf(out, 192, "%s/%s", folder, name);
}

Test(peft, directory_reads_back_bit_by_bit_for_every_choice_of_linears)
{
    static const uint32_t choices[] = {0x7f, 1, 0x40, 0x55, 0x0f};
    for (size_t k = 0; k < sizeof choices / sizeof *choices; k++) {
        qs_config c = config(choices[k]), found;
        c.lora.rslora = k == 1;
        c.lora.dora = k >= 3;
        c.lora.dropout = 0.1;
        qs_lora_layout l = layout_of(&c);
        float *x = random_vector(&l), *segment = malloc((size_t)l.per_layer * sizeof *segment);
        char dir[192], name[16];
        snprintf(name, sizeof name, "adapter%zu/", k);
        path_in(dir, name);
        cr_assert_eq(qs_peft_write(dir, &l, &c, "org/\"model\"", NULL, NULL, x), QS_OK, "%s",
                     qs_error_text());
        char card[256];
        void *text = NULL;
        size_t bytes = 0;
        snprintf(card, sizeof card, "%s/README.md", dir);
        cr_assert_eq(qs_io_read_file(card, 1 << 16, &text, &bytes), QS_OK, "%s", qs_error_text());
        cr_assert_not_null(strstr(text, "CausalLM.from_pretrained(\"org/\\\"model\\\"\", dtype"));
        free(text);
        qs_config_defaults(&found);
        cr_assert_eq(qs_peft_settings(dir, &found), QS_OK, "%s", qs_error_text());
        cr_assert_eq(found.lora.rank, 8);
        cr_assert_eq(found.lora.alpha, 12);
        cr_assert_eq(found.lora.dropout, 0.1);
        cr_assert_eq(found.lora.rslora, c.lora.rslora);
        cr_assert_eq(found.lora.dora, c.lora.dora);
        cr_assert_eq(found.lora.targets, choices[k] | QS_TARGETS_SET);
        qs_peft *peft = NULL;
        cr_assert_eq(qs_peft_open(&peft, dir, &l), QS_OK, "%s", qs_error_text());
        for (int layer = 0; layer < l.n_layers; layer++) {
            cr_assert_eq(qs_peft_read_layer(peft, layer, segment), QS_OK);
            cr_assert(memcmp(segment, x + layer * l.per_layer,
                             (size_t)l.per_layer * sizeof *segment) == 0);
        }
        qs_peft_close(peft);
        free(segment);
        free(x);
    }
}

static void expect_open(const char *dir, const qs_lora_layout *l, qs_status status,
                        const char *says)
{
    qs_peft *peft = NULL;
    qs_error_clear();
    cr_assert_eq(qs_peft_open(&peft, dir, l), status, "%s", qs_error_text());
    cr_assert_null(peft);
    cr_assert_not_null(strstr(qs_error_text(), says), "%s", qs_error_text());
}

/* One linear in place of several: the names, and the adapter of all, as peft writes them. */
Test(peft, fused_linears_have_adapters_of_their_own)
{
    qs_config c = config(QS_LINEARS_ALL | QS_TARGETS_SET), found;
    qs_hf_config m = model();
    qs_lora_layout l, again;
    m.fused = true;
    cr_assert_eq(qs_lora_layout_make(&l, &m, &c), QS_OK, "%s", qs_error_text());
    cr_assert_eq(l.out[QS_QKV], 6 * 16 + 2 * 2 * 16);
    cr_assert_eq(l.out[QS_GATE_UP], 400);
    char *text = qs_peft_config_text(&c, &l, "m"), name[96], dir[192];
    cr_assert_not_null(strstr(text,
                              "[\n    \"o_proj\",\n    \"down_proj\",\n    \"qkv_proj\",\n    "
                              "\"gate_up_proj\"\n  ]"),
                       "%s", text);
    qs_lora_peft_name(name, sizeof name, QS_PEFT_PLAIN, 2, QS_GATE_UP, 'B');
    cr_assert_str_eq(name, "base_model.model.model.layers.2.mlp.gate_up_proj.lora_B.weight");
    float *x = random_vector(&l), *segment = malloc((size_t)l.per_layer * sizeof *segment);
    path_in(dir, "fused");
    cr_assert_eq(qs_peft_write(dir, &l, &c, "m", NULL, NULL, x), QS_OK, "%s", qs_error_text());
    qs_config_defaults(&found);
    cr_assert_eq(qs_peft_settings(dir, &found), QS_OK, "%s", qs_error_text());
    cr_assert_eq(qs_lora_layout_make(&again, &m, &found), QS_OK, "%s", qs_error_text());
    cr_assert_eq(memcmp(&again, &l, sizeof l), 0);
    qs_peft *peft = NULL;
    cr_assert_eq(qs_peft_open(&peft, dir, &l), QS_OK, "%s", qs_error_text());
    cr_assert_eq(qs_peft_read_layer(peft, 1, segment), QS_OK);
    cr_assert_eq(memcmp(segment, x + l.per_layer, (size_t)l.used * sizeof *x), 0);
    qs_peft_close(peft);
    /* Over a model of seven linears two of its names are found, with other shapes. */
    m.fused = false;
    cr_assert_eq(qs_lora_layout_make(&again, &m, &found), QS_OK, "%s", qs_error_text());
    expect_open(dir, &again, QS_ERR_INPUT_TENSOR,
                "holds 24 tensors, but the model has room for 12");
    free(segment);
    free(x);
    free(text);
}

/* The text part of a model of text and images: its names, a pattern that finds its linears and not
 * those of the vision part, and the class that has them. */
Test(peft, a_text_part_is_named_as_in_the_whole_model)
{
    qs_config c = config(1u << QS_Q | 1u << QS_DOWN), found;
    qs_hf_config m = model();
    qs_lora_layout l, plain = layout_of(&c), again;
    strcpy(m.part_of, "gemma3");
    cr_assert_eq(qs_lora_layout_make(&l, &m, &c), QS_OK, "%s", qs_error_text());
    float *x = random_vector(&l), *segment = malloc((size_t)l.per_layer * sizeof *segment);
    char dir[192], file[256];
    void *text = NULL;
    size_t bytes = 0;
    path_in(dir, "part");
    cr_assert_eq(qs_peft_write(dir, &l, &c, "m", NULL, NULL, x), QS_OK, "%s", qs_error_text());
    qs_st_dir *tensors = NULL;
    cr_assert_eq(qs_st_open(&tensors, dir, "adapter_model"), QS_OK);
    cr_assert_eq(qs_st_count(tensors), 12);
    cr_assert_str_eq(qs_st_at(tensors, 0)->name,
                     "base_model.model.model.language_model.layers.0.mlp.down_proj.lora_A.weight");
    qs_st_close(tensors);
    snprintf(file, sizeof file, "%s/adapter_config.json", dir);
    cr_assert_eq(qs_io_read_file(file, 1 << 16, &text, &bytes), QS_OK);
    cr_assert_not_null(
        strstr(text, "\"target_modules\": \".*language_model\\\\..*\\\\.(q_proj|down_proj)\""),
        "%s", (char *)text);
    free(text);
    snprintf(file, sizeof file, "%s/README.md", dir);
    cr_assert_eq(qs_io_read_file(file, 1 << 16, &text, &bytes), QS_OK);
    cr_assert_not_null(strstr(text, "= AutoModelForImageTextToText.from_pretrained("));
    cr_assert_null(strstr(text, "CausalLM"));
    free(text);
    /* Read for a base of either kind. */
    qs_config_defaults(&found);
    cr_assert_eq(qs_peft_settings(dir, &found), QS_OK, "%s", qs_error_text());
    cr_assert_eq(qs_lora_layout_make(&again, &m, &found), QS_OK, "%s", qs_error_text());
    cr_assert_eq(memcmp(&again, &l, sizeof l), 0);
    for (int k = 0; k < 2; k++) {
        qs_peft *peft = NULL;
        cr_assert_eq(qs_peft_open(&peft, dir, k == 0 ? &l : &plain), QS_OK, "%s", qs_error_text());
        cr_assert_eq(qs_peft_read_layer(peft, 2, segment), QS_OK);
        cr_assert_eq(memcmp(segment, x + 2 * l.per_layer, (size_t)l.used * sizeof *x), 0);
        qs_peft_close(peft);
    }
    free(segment);
    free(x);
}

/* Adapters of text parts from before transformers 4.52, and files that no program writes. */
Test(peft, names_are_read_in_one_spelling_whatever_it_is)
{
    static const struct {
        const char *a, *b;
        qs_status status;
        const char *says;
    } cases[] = {
        {"base_model.model.model.", "base_model.model.model.", QS_OK, ""},
        {"base_model.model.model.language_model.", "base_model.model.model.language_model.", QS_OK,
         ""},
        {"base_model.model.language_model.model.", "base_model.model.language_model.model.", QS_OK,
         ""},
        {"base_model.model.model.", "base_model.model.model.language_model.", QS_ERR_INPUT_TENSOR,
         "names of one model"},
        {"base_model.model.language_model.model.", "base_model.model.model.language_model.",
         QS_ERR_INPUT_TENSOR, "names of one model"},
        {"base_model.model.language_model.", "base_model.model.language_model.",
         QS_ERR_INPUT_TENSOR, "belongs to no linear"},
        {"base_model.model.model.vision_tower.encoder.",
         "base_model.model.model.vision_tower.encoder.", QS_ERR_INPUT_TENSOR,
         "belongs to no linear"},
    };
    qs_config c = config(1u << QS_Q);
    qs_hf_config m = model();
    qs_lora_layout l;
    m.n_layers = 1;
    cr_assert_eq(qs_lora_layout_make(&l, &m, &c), QS_OK);
    float *x = random_vector(&l);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char dir[192], name[16], names[2][128], path[256];
        snprintf(name, sizeof name, "names%zu", i);
        path_in(dir, name);
        snprintf(names[0], sizeof names[0], "%slayers.0.self_attn.q_proj.lora_A.weight",
                 cases[i].a);
        snprintf(names[1], sizeof names[1], "%slayers.0.self_attn.q_proj.lora_B.weight",
                 cases[i].b);
        const qs_st_item items[] = {{names[0], QS_F32, 2, {8, 96}, x + l.a_at[QS_Q]},
                                    {names[1], QS_F32, 2, {96, 8}, x + l.b_at[QS_Q]}};
        cr_assert_eq(qs_peft_write(dir, &l, &c, "m", NULL, NULL, x), QS_OK, "%s", qs_error_text());
        snprintf(path, sizeof path, "%s/adapter_model.safetensors", dir);
        cr_assert_eq(qs_st_write(path, items, 2, NULL), QS_OK, "%s", qs_error_text());
        if (cases[i].status != QS_OK) {
            expect_open(dir, &l, cases[i].status, cases[i].says);
            continue;
        }
        qs_peft *peft = NULL;
        float *segment = malloc((size_t)l.per_layer * sizeof *segment);
        cr_assert_eq(qs_peft_open(&peft, dir, &l), QS_OK, "%s", qs_error_text());
        cr_assert_eq(qs_peft_read_layer(peft, 0, segment), QS_OK);
        cr_assert_eq(memcmp(segment, x, (size_t)l.used * sizeof *x), 0);
        qs_peft_close(peft);
        free(segment);
    }
    free(x);
}

Test(peft, config_text_is_the_one_of_peft)
{
    qs_config c = config(1u << QS_Q | 1u << QS_DOWN);
    c.lora.dropout = 0.05;
    const qs_lora_layout l = layout_of(&c);
    char *text = qs_peft_config_text(&c, &l, "org/model");
    cr_assert_str_eq(text, "{\n"
                           "  \"alpha_pattern\": {},\n"
                           "  \"base_model_name_or_path\": \"org/model\",\n"
                           "  \"bias\": \"none\",\n"
                           "  \"fan_in_fan_out\": false,\n"
                           "  \"inference_mode\": true,\n"
                           "  \"init_lora_weights\": true,\n"
                           "  \"lora_alpha\": 12,\n"
                           "  \"lora_dropout\": 0.05,\n"
                           "  \"modules_to_save\": null,\n"
                           "  \"peft_type\": \"LORA\",\n"
                           "  \"r\": 8,\n"
                           "  \"rank_pattern\": {},\n"
                           "  \"revision\": null,\n"
                           "  \"target_modules\": [\n"
                           "    \"q_proj\",\n"
                           "    \"down_proj\"\n"
                           "  ],\n"
                           "  \"task_type\": \"CAUSAL_LM\",\n"
                           "  \"use_dora\": false,\n"
                           "  \"use_rslora\": false\n"
                           "}");
    free(text);
}

Test(peft, a_chat_template_stands_beside_the_weights)
{
    static const char *const templates[] = {"{{ m }}\n", NULL};
    qs_config c = config(1);
    qs_lora_layout l = layout_of(&c);
    float *x = random_vector(&l);
    for (int i = 0; i < 2; i++) {
        char dir[192], file[256], name[16];
        void *text = NULL;
        size_t bytes = 0;
        snprintf(name, sizeof name, "adapter%d", i);
        path_in(dir, name);
        cr_assert_eq(qs_peft_write(dir, &l, &c, "m", NULL, templates[i], x), QS_OK, "%s",
                     qs_error_text());
        snprintf(file, sizeof file, "%s/chat_template.jinja", dir);
        cr_assert_eq(access(file, F_OK) == 0, i == 0);
        if (i == 0) {
            cr_assert_eq(qs_io_read_file(file, 1 << 16, &text, &bytes), QS_OK);
            cr_assert_str_eq(text, templates[0]);
            free(text);
        }
    }
    free(x);
}

/* What is no hash, is not written: it would be refused when it is read. */
Test(peft, base_is_named_in_a_file_of_its_own_and_another_is_refused)
{
    static const char one[] = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
    static const char other[] = "f123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
    static const char *const given[] = {one, NULL, "aa", ""};
    qs_config c = config(1);
    qs_lora_layout l = layout_of(&c);
    float *x = random_vector(&l);
    for (int i = 0; i < 4; i++) {
        char dir[192], file[256], name[16], found[QS_SHA256_HEX];
        snprintf(name, sizeof name, "adapter%d", i);
        path_in(dir, name);
        cr_assert_eq(qs_peft_write(dir, &l, &c, "m", given[i], NULL, x), QS_OK, "%s",
                     qs_error_text());
        snprintf(file, sizeof file, "%s/qshard.json", dir);
        cr_assert_eq(access(file, F_OK) == 0, i == 0);
        cr_assert_eq(qs_peft_read_base(dir, found), QS_OK, "%s", qs_error_text());
        cr_assert_str_eq(found, i == 0 ? one : "");
        cr_assert_eq(qs_peft_expect_base(dir, one, "b.h5"), QS_OK);
        cr_assert_eq(qs_peft_expect_base(dir, other, "b.h5"), i == 0 ? QS_ERR_INPUT_HASH : QS_OK);
    }
    cr_assert_not_null(strstr(qs_error_text(), "was trained on a base with hash 0123456789ab..., "
                                               "b.h5 has f123456789ab..."),
                       "%s", qs_error_text());
    free(x);
}

Test(peft, existing_directory_is_never_overwritten)
{
    qs_config c = config(1);
    qs_lora_layout l = layout_of(&c);
    float *x = random_vector(&l);
    char dir[192];
    path_in(dir, "taken");
    cr_assert_eq(mkdir(dir, 0777), 0);
    cr_assert_eq(qs_peft_write(dir, &l, &c, "m", NULL, NULL, x), QS_ERR_OUTPUT_TAKEN);
    cr_assert_eq(rmdir(dir), 0, "nothing was put into it");
    qs_error_clear();
    path_in(dir, "missing/adapter");
    cr_assert_eq(qs_exit_code(qs_peft_write(dir, &l, &c, "m", NULL, NULL, x)), 4);
    free(x);
}

/* What lora.init is given by mistake. */
Test(peft, run_in_place_of_a_peft_directory_is_named)
{
    static const char *const files[] = {"run.json", "manifest.json"};
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        qs_config c = config(1);
        char dir[192], file[256];
        path_in(dir, i == 0 ? "run" : "checkpoint");
        cr_assert_eq(mkdir(dir, 0777), 0);
        snprintf(file, sizeof file, "%s/%s", dir, files[i]);
        cr_assert_eq(qs_io_write_file(file, "{}", 2), QS_OK);
        qs_error_clear();
        cr_assert_eq(qs_peft_settings(dir, &c), QS_ERR_INPUT_MISSING);
        cr_assert_not_null(strstr(qs_error_text(), "qshard export makes one"), "%s",
                           qs_error_text());
    }
}

/* The key and the shape are peft's. */
Test(peft, magnitudes_are_written_as_peft_names_them)
{
    qs_config c = config(1u << QS_K);
    c.lora.dora = true;
    qs_lora_layout l = layout_of(&c);
    float *x = random_vector(&l);
    char dir[192];
    path_in(dir, "dora");
    cr_assert_eq(qs_peft_write(dir, &l, &c, "m", NULL, NULL, x), QS_OK, "%s", qs_error_text());
    qs_st_dir *tensors = NULL;
    cr_assert_eq(qs_st_open(&tensors, dir, "adapter_model"), QS_OK);
    cr_assert_eq(qs_st_count(tensors), 9);
    const qs_st_tensor *t = qs_st_find(
        tensors, "base_model.model.model.layers.2.self_attn.k_proj.lora_magnitude_vector");
    cr_assert_not_null(t);
    cr_assert_eq(t->rank, 1);
    cr_assert_eq(t->shape[0], l.out[QS_K]);
    qs_st_close(tensors);
    qs_lora_layout plain = l;
    plain.dora = false;
    qs_peft *peft = NULL;
    cr_assert_eq(qs_peft_open(&peft, dir, &plain), QS_ERR_INPUT_VALUE);
    cr_assert_not_null(strstr(qs_error_text(), "use_dora=true, but lora.dora is false"), "%s",
                       qs_error_text());
    free(x);
}

/* An adapter of 16-bit weights is widened exactly. */
static void write_16_bit(const char *dir, const qs_lora_layout *l, const qs_config *c,
                         const float *x, qs_dtype dtype, int64_t skip)
{
    qs_st_item items[6];
    char names[6][96], path[256];
    uint16_t *data = malloc((size_t)(l->n_layers * l->per_layer) * sizeof *data);
    qs_f32_store(data, dtype, x, l->n_layers * l->per_layer);
    int n = 0;
    for (int layer = 0; layer < l->n_layers; layer++) {
        for (int b = 0; b < 2; b++, n++) {
            qs_lora_peft_name(names[n], sizeof names[n], QS_PEFT_PLAIN, layer, QS_Q, b ? 'B' : 'A');
            items[n] = (qs_st_item){.name = names[n],
                                    .dtype = dtype,
                                    .rank = 2,
                                    .shape = {b ? l->out[QS_Q] : 8, b ? 8 : l->in[QS_Q]},
                                    .data = data + layer * l->per_layer +
                                            (b ? l->b_at[QS_Q] : l->a_at[QS_Q])};
        }
    }
    cr_assert_eq(qs_io_mkdir(dir), QS_OK);
    snprintf(path, sizeof path, "%s/adapter_model.safetensors", dir);
    cr_assert_eq(qs_st_write(path, items, n - skip, NULL), QS_OK, "%s", qs_error_text());
    char *text = qs_peft_config_text(c, l, "m");
    snprintf(path, sizeof path, "%s/adapter_config.json", dir);
    cr_assert_eq(qs_io_write_new(path, text, strlen(text)), QS_OK);
    free(text);
    free(data);
}

Test(peft, half_precision_adapters_are_widened)
{
    static const qs_dtype dtypes[] = {QS_BF16, QS_F16};
    qs_config c = config(1u << QS_Q);
    qs_lora_layout l = layout_of(&c);
    float *x = random_vector(&l), *segment = malloc((size_t)l.per_layer * sizeof *segment);
    for (int k = 0; k < 2; k++) {
        char dir[192];
        path_in(dir, k ? "f16" : "bf16");
        write_16_bit(dir, &l, &c, x, dtypes[k], 0);
        qs_peft *peft = NULL;
        cr_assert_eq(qs_peft_open(&peft, dir, &l), QS_OK, "%s", qs_error_text());
        for (int layer = 0; layer < l.n_layers; layer++) {
            cr_assert_eq(qs_peft_read_layer(peft, layer, segment), QS_OK);
            for (int64_t e = 0; e < l.used; e++) {
                cr_assert_eq(segment[e], qs_f32_round(x[layer * l.per_layer + e], dtypes[k]));
            }
        }
        qs_peft_close(peft);
    }
    free(segment);
    free(x);
}

Test(peft, adapter_that_does_not_fit_is_refused_by_name)
{
    qs_config c = config(1u << QS_Q);
    qs_lora_layout l = layout_of(&c), other;
    float *x = random_vector(&l);
    char dir[192];
    path_in(dir, "whole");
    write_16_bit(dir, &l, &c, x, QS_F16, 0);
    other = l;
    other.lora_rank = 4;
    expect_open(dir, &other, QS_ERR_INPUT_VALUE, "r=8, but lora.rank is 4");
    other = l;
    other.scale = 1.0f;
    expect_open(dir, &other, QS_ERR_INPUT_VALUE, "lora_alpha=12");
    other = l;
    other.targeted[QS_K] = true;
    expect_open(dir, &other, QS_ERR_INPUT_VALUE, "self_attn.k_proj");
    other = l;
    other.in[QS_Q]++;
    expect_open(dir, &other, QS_ERR_INPUT_TENSOR,
                "expected [8, 97]; the adapter belongs to another");
    other = l;
    other.n_layers = 2;
    expect_open(dir, &other, QS_ERR_INPUT_TENSOR, "holds 6 tensors");
    path_in(dir, "short");
    write_16_bit(dir, &l, &c, x, QS_F16, 1);
    expect_open(dir, &l, QS_ERR_INPUT_TENSOR,
                "\"base_model.model.model.layers.2.self_attn.q_proj.lora_B.weight\" is missing");
    path_in(dir, "nowhere");
    expect_open(dir, &l, QS_ERR_INPUT_MISSING, "adapter_config.json");
    path_in(dir, "nan");
    x[l.per_layer + l.b_at[QS_Q] + 5] = NAN;
    write_16_bit(dir, &l, &c, x, QS_F16, 0);
    qs_peft *peft = NULL;
    qs_error_clear();
    cr_assert_eq(qs_peft_open(&peft, dir, &l), QS_OK);
    float *segment = malloc((size_t)l.per_layer * sizeof *segment);
    cr_assert_eq(qs_peft_read_layer(peft, 1, segment), QS_ERR_INPUT_VALUE);
    cr_assert_not_null(strstr(qs_error_text(), "element 5 is not finite"), "%s", qs_error_text());
    qs_peft_close(peft);
    free(segment);
    free(x);
}

/* ---- which linears: the tensors say ---- */

/* The adapter in `dir` with another adapter_config.json: `old` replaced by `new`. */
static void change_settings(const char *dir, const char *old, const char *new)
{
    char path[256], changed[2048];
    void *text = NULL;
    size_t bytes = 0;
    snprintf(path, sizeof path, "%s/adapter_config.json", dir);
    cr_assert_eq(qs_io_read_file(path, 1 << 16, &text, &bytes), QS_OK);
    const char *at = strstr(text, old);
    cr_assert_not_null(at, "%s in %s", old, (const char *)text);
    snprintf(changed, sizeof changed, "%.*s%s%s", (int)(at - (const char *)text), (char *)text, new,
             at + strlen(old));
    cr_assert_eq(qs_io_write_file(path, changed, strlen(changed)), QS_OK);
    free(text);
}

/* As peft 0.21 writes them: names over the model's modules, and what they chose in the tensors. */
Test(peft, targets_are_those_of_the_tensors_however_they_were_named)
{
    static const char *const forms[] = {
        "\"target_modules\": \".*self_attn\\\\.(q|v)_proj\"",
        "\"target_modules\": [\"model.layers.0.self_attn.q_proj\", "
        "\"model.layers.0.self_attn.v_proj\","
        "\"model.layers.1.self_attn.q_proj\", \"model.layers.1.self_attn.v_proj\","
        "\"model.layers.2.self_attn.q_proj\", \"model.layers.2.self_attn.v_proj\"]",
        "\"exclude_modules\": [\"lm_head\", \"k_proj\"], \"target_modules\": \"all-linear\"",
        "\"exclude_modules\": \".*(k|o)_proj\", \"target_modules\": [\"self_attn.q_proj\", "
        "\"v_proj\"]",
        "\"target_modules\": null"};
    static const char old[] = "\"target_modules\": [\n    \"q_proj\",\n    \"v_proj\"\n  ]";
    for (size_t i = 0; i < sizeof forms / sizeof *forms; i++) {
        qs_config c = config(1u << QS_Q | 1u << QS_V), found;
        c.lora.dora = i == 1;
        qs_lora_layout l = layout_of(&c);
        float *x = random_vector(&l), *segment = malloc((size_t)l.per_layer * sizeof *segment);
        char dir[192], name[16];
        snprintf(name, sizeof name, "form%zu", i);
        path_in(dir, name);
        cr_assert_eq(qs_peft_write(dir, &l, &c, "m", NULL, NULL, x), QS_OK, "%s", qs_error_text());
        change_settings(dir, old, forms[i]);
        qs_config_defaults(&found);
        cr_assert_eq(qs_peft_settings(dir, &found), QS_OK, "%s", qs_error_text());
        cr_assert_eq(found.lora.targets, 1u << QS_Q | 1u << QS_V | QS_TARGETS_SET);
        qs_peft *peft = NULL;
        cr_assert_eq(qs_peft_open(&peft, dir, &l), QS_OK, "%s", qs_error_text());
        cr_assert_eq(qs_peft_read_layer(peft, 2, segment), QS_OK);
        cr_assert_eq(memcmp(segment, x + 2 * l.per_layer, (size_t)l.used * sizeof *x), 0);
        qs_peft_close(peft);
        free(segment);
        free(x);
    }
}

/* A copy of the adapter in `dir` without the tensors that have `without` in their name, and with
 * one called `extra`. */
static void copy_tensors(const char *dir, const char *to, const char *without, const char *extra)
{
    qs_st_item items[64];
    static char names[64][128];
    char path[256];
    static const float zeros[1 << 16];
    qs_st_dir *tensors = NULL;
    int n = 0;
    cr_assert_eq(qs_st_open(&tensors, dir, "adapter_model"), QS_OK);
    for (int64_t i = 0; i < qs_st_count(tensors); i++) {
        const qs_st_tensor *t = qs_st_at(tensors, i);
        if (without != NULL && strstr(t->name, without) != NULL) {
            continue;
        }
        cr_assert(t->count <= 1 << 16 && n < 63);
        snprintf(names[n], sizeof names[n], "%s", t->name);
        items[n] = (qs_st_item){.dtype = QS_F32,
                                .rank = t->rank,
                                .shape = {t->shape[0], t->rank > 1 ? t->shape[1] : 0}};
        n++;
    }
    if (extra != NULL) {
        snprintf(names[n], sizeof names[n], "%s", extra);
        items[n++] = (qs_st_item){.dtype = QS_F32, .rank = 2, .shape = {8, 8}};
    }
    for (int i = 0; i < n; i++) {
        items[i].name = names[i];
        items[i].data = zeros;
    }
    qs_st_close(tensors);
    cr_assert_eq(qs_io_mkdir(to), QS_OK);
    snprintf(path, sizeof path, "%s/adapter_model.safetensors", to);
    cr_assert_eq(qs_st_write(path, items, n, NULL), QS_OK, "%s", qs_error_text());
    snprintf(path, sizeof path, "%s/adapter_config.json", dir);
    void *text = NULL;
    size_t bytes = 0;
    cr_assert_eq(qs_io_read_file(path, 1 << 16, &text, &bytes), QS_OK);
    snprintf(path, sizeof path, "%s/adapter_config.json", to);
    cr_assert_eq(qs_io_write_file(path, text, bytes), QS_OK);
    free(text);
}

Test(peft, layers_that_differ_and_other_modules_are_named)
{
    static const struct {
        const char *without, *extra, *says;
    } cases[] = {
        {"layers.1.self_attn.v_proj", NULL,
         "layer 1 has no adapter of self_attn.v_proj, layer 2 has one"},
        {"layers.0.", NULL, "layer 0 has no adapter of self_attn.q_proj, layer 2 has one"},
        {NULL, "base_model.model.model.layers.2000000000.self_attn.q_proj.lora_A.weight",
         "layer 3 has no adapter of self_attn.q_proj, layer 2000000000 has one"},
        {NULL, "base_model.model.model.layers.2.mlp.up_proj.lora_B.weight",
         "layer 0 has no adapter of mlp.up_proj, layer 2 has one"},
        {NULL, "base_model.model.lm_head.lora_A.weight",
         "tensor \"base_model.model.lm_head.lora_A.weight\" belongs to no linear of a layer"},
        {NULL, "base_model.model.model.embed_tokens.lora_embedding_A", "belongs to no linear"},
        {NULL, "base_model.model.model.layers.01.self_attn.q_proj.lora_A.weight",
         "belongs to no linear"},
        {NULL, "base_model.model.model.layers.1.mlp.experts.0.up_proj.lora_A.weight",
         "belongs to no linear"},
        {NULL, "base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight",
         "belongs to no linear"},
        {NULL, "base_model.model.model.layers.1.self_attn.q_proj.lora_Aweight",
         "belongs to no linear"},
        {"", NULL, "holds no tensor"},
    };
    qs_config c = config(1u << QS_Q | 1u << QS_V), found;
    qs_lora_layout l = layout_of(&c);
    float *x = random_vector(&l);
    char dir[192], other[192];
    path_in(dir, "whole");
    cr_assert_eq(qs_peft_write(dir, &l, &c, "m", NULL, NULL, x), QS_OK, "%s", qs_error_text());
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char name[16];
        snprintf(name, sizeof name, "case%zu", i);
        path_in(other, name);
        copy_tensors(dir, other, cases[i].without, cases[i].extra);
        expect_open(other, &l, QS_ERR_INPUT_TENSOR, cases[i].says);
        qs_error_clear();
        qs_config_defaults(&found);
        cr_assert_eq(qs_peft_settings(other, &found), QS_ERR_INPUT_TENSOR);
        cr_assert_not_null(strstr(qs_error_text(), cases[i].says), "%s", qs_error_text());
    }
    path_in(other, "short"); /* alike, but the model has a layer more */
    copy_tensors(dir, other, "layers.2.", NULL);
    expect_open(other, &l, QS_ERR_INPUT_TENSOR,
                "\"base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight\" is missing");
    c = config(1u << QS_Q);
    l = layout_of(&c);
    expect_open(dir, &l, QS_ERR_INPUT_VALUE,
                "the adapter has self_attn.v_proj, but lora.targets does not name it; set "
                "lora.targets to the adapter's, [q_proj, v_proj]");
    c = config(0x7f);
    l = layout_of(&c);
    expect_open(dir, &l, QS_ERR_INPUT_VALUE,
                "the adapter has no self_attn.k_proj, but lora.targets");
    free(x);
}

/* ---- adapter_config.json of strangers ---- */

typedef struct {
    const char *extra; /* put into a good object */
    qs_status status;
    const char *says;
} peft_case;

static const peft_case PEFT_CASES[] = {
    {"\"use_dora\": false, \"unknown_key\": [1, {}]", QS_OK, ""},
    {"\"use_dora\": true", QS_OK, ""},
    {"\"use_dora\": null", QS_OK, ""},
    {"\"use_dora\": 1", QS_ERR_INPUT_VALUE, "use_dora"},
    {"\"bias\": \"all\"", QS_ERR_INPUT_UNKNOWN, "bias"},
    {"\"bias\": \"none\"", QS_OK, ""},
    {"\"modules_to_save\": [\"lm_head\"]", QS_ERR_INPUT_UNKNOWN, "modules_to_save"},
    {"\"modules_to_save\": null", QS_OK, ""},
    {"\"rank_pattern\": {\"q_proj\": 4}", QS_ERR_INPUT_UNKNOWN, "rank_pattern"},
    {"\"alpha_pattern\": {\"q_proj\": 4}", QS_ERR_INPUT_UNKNOWN, "alpha_pattern"},
    {"\"fan_in_fan_out\": true", QS_ERR_INPUT_UNKNOWN, "fan_in_fan_out"},
    {"\"layers_to_transform\": [1]", QS_ERR_INPUT_UNKNOWN, "layers_to_transform"},
    {"\"exclude_modules\": [\"lm_head\"]", QS_OK, ""},
    {"\"lora_bias\": true", QS_ERR_INPUT_UNKNOWN, "lora_bias"},
    {"\"init_lora_weights\": \"pissa\"", QS_ERR_INPUT_UNKNOWN, "pissa"},
    {"\"init_lora_weights\": \"gaussian\"", QS_OK, ""},
    {"\"use_rslora\": 1", QS_ERR_INPUT_VALUE, "use_rslora"},
    {"\"lora_dropout\": 2", QS_ERR_INPUT_VALUE, "lora_dropout"},
    {"\"r\": 8", QS_ERR_INPUT_FORMAT, ""},
};

Test(peft_config, features_are_known_or_refused_by_name)
{
    for (size_t i = 0; i < sizeof PEFT_CASES / sizeof *PEFT_CASES; i++) {
        const peft_case *k = &PEFT_CASES[i];
        char text[512];
        snprintf(text, sizeof text,
                 "{\"peft_type\": \"LORA\", \"r\": 4, \"lora_alpha\": 8, \"target_modules\": "
                 "[\"q_proj\", \"mlp.down_proj\"], %s}",
                 k->extra);
        qs_peft_config c;
        qs_error_clear();
        cr_assert_eq(qs_peft_config_parse(&c, text, strlen(text), "a.json"), k->status, "%s: %s",
                     k->extra, qs_error_text());
        cr_assert_not_null(strstr(qs_error_text(), k->says), "%s: %s", k->extra, qs_error_text());
        if (k->status == QS_OK) {
            cr_assert_eq(c.lora_rank, 4);
        }
    }
}

Test(peft_config, missing_or_mistyped_fields_are_named)
{
    static const struct {
        const char *text, *says;
    } cases[] = {
        {"[]", "object"},
        {"{}", "peft_type"},
        {"{\"peft_type\": \"IA3\"}", "IA3"},
        {"{\"peft_type\": \"LORA\"}", "\"r\""},
        {"{\"peft_type\": \"LORA\", \"r\": 0}", "r"},
        {"{\"peft_type\": \"LORA\", \"r\": 4}", "lora_alpha"},
        {"{\"peft_type\": \"LORA\", \"r\": 4, \"lora_alpha\": 0}", "lora_alpha"},
        {"not json", ""},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        qs_peft_config c;
        qs_error_clear();
        qs_status st = qs_peft_config_parse(&c, cases[i].text, strlen(cases[i].text), "a.json");
        cr_assert_eq(qs_exit_code(st), 3, "%s", cases[i].text);
        cr_assert_not_null(strstr(qs_error_text(), cases[i].says), "%s -> %s", cases[i].text,
                           qs_error_text());
    }
    const char *all =
        "{\"peft_type\": \"LORA\", \"r\": 4, \"lora_alpha\": 8.5, \"target_modules\": "
        "\"all-linear\", \"use_rslora\": true}";
    qs_peft_config c;
    qs_error_clear();
    cr_assert_eq(qs_peft_config_parse(&c, all, strlen(all), "a.json"), QS_OK);
    cr_assert_eq(c.alpha, 8.5);
    cr_assert(c.rslora);
}
