/* qshard merge: every weight is W + scale * B A, rounded once, under its name and in its shape;
 * what has no adapter is copied, and so is what stands beside the weights. */
#define _GNU_SOURCE
#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <fcntl.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "hf/safetensors.h"
#include "merge/merge.h"
#include "merge_fixture.h"
#include "store/io.h"

enum {
    FUSED = 1 << QS_QKV | 1 << QS_O | 1 << QS_GATE_UP | 1 << QS_DOWN,
    SHARD = 100 << 10,
};

TestSuite(merge, .init = mf_make_folder, .fini = mf_remove_folder, .timeout = 300);

/* ---- the reference, in double ---- */

typedef struct {
    tiny_hf model;
    uint32_t targets;
    int dtype; /* -1: as stored */
    int64_t shard_bytes;
    bool original, rslora, dora;
} merge_case;

/* All of a tensor of the base as floats, its chunks put together. */
static float *read_base(const qs_base_index *index, int fd, const char *name, int64_t count)
{
    float *out = malloc((size_t)count * sizeof *out);
    int64_t at = 0;
    for (int u = 0; u <= index->n_units; u++) {
        const qs_base_unit *unit = u < index->n_units ? &index->units[u] : &index->final;
        for (int i = 0; i < unit->n_tensors; i++) {
            const qs_base_tensor *t = &unit->tensors[i];
            uint64_t bytes = 0;
            if (strcmp(t->name, name) != 0) {
                continue;
            }
            uint8_t *data = NULL;
            qs_unit_view view = {qs_unit_layout_make(&unit->size, 1), NULL};
            size_t most = view.layout.message_bytes + (size_t)unit->small_bytes + 1;
            cr_assert_eq(QS_ALLOC(&data, most, QS_MEM_WORK), QS_OK);
            if (t->kind == QS_TENSOR_SMALL) {
                cr_assert_eq(qs_base_read_small(index, fd, unit, data), QS_OK);
                qs_base_small_f32(t, data, out + at);
                at += t->shape[0];
            } else {
                cr_assert_eq(qs_base_read_share(index, fd, u, 0, 1, data, &bytes), QS_OK);
                view.base = data;
                qs_weight w = qs_base_weight(index, t);
                qs_weight_decode(&view, &w, 0, w.out * w.in, out + at);
                at += w.out * w.in;
            }
            qs_mem_free(data);
        }
    }
    cr_assert_eq(at, count, "%s: %ld of %ld", name, (long)at, (long)count);
    return out;
}

/* What B A adds to element [i, j]; *size grows by the magnitudes of its terms. */
static double product(const mf_adapter *a, int layer, int linear, int64_t i, int64_t j,
                      double *size)
{
    const qs_lora_layout *l = &a->layout;
    const float *segment = a->vector + layer * l->per_layer;
    double sum = 0;
    for (int k = 0; k < l->lora_rank; k++) {
        double term = (double)segment[l->b_at[linear] + i * l->lora_rank + k] *
                      (double)segment[l->a_at[linear] + k * l->in[linear] + j];
        sum += term;
        *size += fabs(term) * (double)l->scale;
    }
    return sum * (double)l->scale;
}

static double half_ulp(double x, qs_dtype dtype)
{
    static const double relative[] = {[QS_F32] = 0x1p-24, [QS_BF16] = 0x1p-8, [QS_F16] = 0x1p-11};
    return fabs(x) * relative[dtype] + (dtype == QS_F16 ? 0x1p-25 : 0);
}

/* The linear that a name belongs to, or -1. */
static int linear_of(const char *name, int *layer)
{
    char expected[128];
    for (*layer = 0; *layer < TINY_LAYERS; ++*layer) {
        for (int i = 0; i < QS_LINEAR_COUNT; i++) {
            snprintf(expected, sizeof expected, "model.layers.%d.%s.weight", *layer,
                     qs_linear_path((qs_linear)i));
            if (strcmp(expected, name) == 0) {
                return i;
            }
        }
    }
    return -1;
}

/* What DoRA multiplies row `row` of W + scale B A by; 1 without it. */
static double row_factor(const qs_st_tensor *t, const float *w, const mf_adapter *a, int layer,
                         int linear, int64_t row)
{
    const int64_t n = t->shape[1];
    double squares = 0, ignored = 0;
    if (!a->layout.dora) {
        return 1;
    }
    for (int64_t j = 0; j < n; j++) {
        const double x = (double)w[row * n + j] + product(a, layer, linear, row, j, &ignored);
        squares += x * x;
    }
    const float *segment = a->vector + layer * a->layout.per_layer;
    return (double)segment[a->layout.m_at[linear] + row] / sqrt(squares);
}

static void check_sum(const qs_st_tensor *t, const float *got, const float *w, const mf_adapter *a,
                      int layer, int linear, qs_dtype dtype)
{
    double factor = 1;
    for (int64_t e = 0; e < t->count; e++) {
        const int64_t row = e / t->shape[1], column = e % t->shape[1];
        double size = fabs((double)w[e]);
        double exact = (double)w[e];
        factor = column == 0 ? row_factor(t, w, a, layer, linear, row) : factor;
        exact = factor * (exact + product(a, layer, linear, row, column, &size));
        /* fp32: a rounding for each product and each sum, of terms that are at most `size`; the
         * length is a mean over the row, and better than its worst element. */
        double most = half_ulp(exact, dtype) + (2 * MF_RANK + 2) * 0x1p-24 * size * fabs(factor);
        most += a->layout.dora ? 2 * MF_RANK * 0x1p-24 * fabs(exact) : 0;
        cr_assert_leq(fabs((double)got[e] - exact), most, "%s: element %ld is %.9g, not %.9g",
                      t->name, (long)e, (double)got[e], exact);
    }
}

static void check_copy(const qs_st_tensor *t, const float *got, const float *w, qs_dtype dtype)
{
    for (int64_t e = 0; e < t->count; e++) {
        float expected = qs_f32_round(w[e], dtype);
        cr_assert_eq(memcmp(&got[e], &expected, sizeof expected), 0,
                     "%s: element %ld is %.9g, not %.9g", t->name, (long)e, (double)got[e],
                     (double)expected);
    }
}

/* Everything that lies in `dir` against base or original, and that all of it is there. */
static void check_result(const char *dir, const merge_case *c, const mf_adapter *a, qs_dtype dtype)
{
    qs_base_index *index = mf_open_index("base.h5");
    int fd = open("base.h5", O_RDONLY);
    qs_st_dir *merged = NULL, *model = NULL;
    int linears = 0, tensors = 0;
    cr_assert_eq(qs_st_open(&merged, dir, "model"), QS_OK, "%s", qs_error_text());
    cr_assert_eq(qs_st_open(&model, "model", "model"), QS_OK);
    for (int64_t i = 0; i < qs_st_count(merged); i++) {
        const qs_st_tensor *t = qs_st_at(merged, i);
        qs_dtype stored;
        int layer, linear = linear_of(t->name, &layer);
        cr_assert_eq(qs_st_to_dtype(t->dtype, &stored), 0);
        cr_assert_eq(stored, dtype, "%s", t->name);
        float *got = malloc((size_t)t->count * sizeof *got), *w = NULL;
        cr_assert_eq(qs_st_read_f32(merged, t, 0, t->count, got), QS_OK);
        if (c->original) {
            const qs_st_tensor *o = qs_st_find(model, t->name);
            cr_assert(o && o->rank == t->rank && o->shape[0] == t->shape[0], "%s", t->name);
            w = malloc((size_t)t->count * sizeof *w);
            cr_assert_eq(qs_st_read_f32(model, o, 0, o->count, w), QS_OK);
        } else {
            w = read_base(index, fd, t->name, t->count);
        }
        if (linear >= 0) {
            int64_t out, in;
            qs_linear_shape(&index->config, (qs_linear)linear, &out, &in);
            cr_assert(t->rank == 2 && t->shape[0] == out && t->shape[1] == in, "%s", t->name);
        }
        if (linear >= 0 && (c->targets >> linear & 1)) {
            check_sum(t, got, w, a, layer, linear, dtype);
            linears++;
        } else {
            check_copy(t, got, w, dtype);
        }
        tensors++;
        free(got);
        free(w);
    }
    const int of_layer = tiny_hf_linears(&c->model) * (c->model.biases ? 2 : 1);
    cr_assert_eq(tensors, TINY_LAYERS * (of_layer + 2) + 2 + c->model.untied);
    cr_assert_eq(linears, TINY_LAYERS * __builtin_popcount(c->targets));
    cr_assert_eq(qs_st_find(merged, "lm_head.weight") != NULL, c->model.untied);
    qs_st_close(merged);
    qs_st_close(model);
    close(fd);
    qs_base_index_free(index);
}

/* ---- the files ---- */

static json_t *read_json(const char *dir, const char *name)
{
    char path[256];
    json_error_t error;
    snprintf(path, sizeof path, "%s/%s", dir, name);
    json_t *root = json_load_file(path, JSON_REJECT_DUPLICATES, &error);
    cr_assert_not_null(root, "%s: %s", path, error.text);
    return root;
}

static void check_files(const char *dir, const merge_case *c, const qs_merge_report *r)
{
    char path[256];
    struct stat info;
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    cr_assert_eq(access(path, F_OK) == 0, r->files == 1);
    snprintf(path, sizeof path, "%s/model.safetensors.index.json", dir);
    cr_assert_eq(access(path, F_OK) == 0, r->files > 1);
    cr_assert_eq(r->files > 1, c->shard_bytes == SHARD);
    if (r->files == 1) {
        return;
    }
    json_t *index = read_json(dir, "model.safetensors.index.json");
    cr_assert_eq(
        json_integer_value(json_object_get(json_object_get(index, "metadata"), "total_size")),
        r->bytes);
    cr_assert_eq((int64_t)json_object_size(json_object_get(index, "weight_map")), r->tensors);
    json_decref(index);
    for (int i = 1; i <= r->files;
         i++) { /* up.proj alone is 72,000 bytes: two never share a file */
        snprintf(path, sizeof path, "%s/model-%05d-of-%05d.safetensors", dir, i, r->files);
        cr_assert_eq(stat(path, &info), 0, "%s", path);
        cr_assert_leq(info.st_size, SHARD + 8192, "%s", path);
    }
}

static qs_status merge(const merge_case *c, const char *out, int threads, qs_merge_report *report)
{
    qs_merge_options options = {.base = "base.h5",
                                .output = out,
                                .original = c->original ? "model" : NULL,
                                .dtype = c->dtype,
                                .shard_bytes = c->shard_bytes,
                                .threads = threads,
                                .adapter = "adapter"};
    return qs_merge(&options, report);
}

/* ---- what must hold ---- */

static merge_case CASES[] = {
    {{.dtype = QS_BF16, .untied = true, .biases = true},
     MF_ALL,
     -1,
     INT64_MAX,
     false,
     false,
     false},
    {{.dtype = QS_BF16, .zero_rows = true},
     1 << QS_K | 1 << QS_DOWN,
     -1,
     SHARD,
     false,
     true,
     false},
    {{.dtype = QS_F16, .untied = true}, MF_ALL, QS_F16, SHARD, false, false, false},
    {{.dtype = QS_F32, .biases = true}, MF_ALL, QS_F32, INT64_MAX, false, false, false},
    {{.dtype = QS_F32}, 1 << QS_GATE, QS_BF16, SHARD, false, false, false},
    {{.dtype = QS_BF16}, MF_ALL, QS_F32, INT64_MAX, false, false, false},
    {{.dtype = QS_BF16, .scheme = TINY_BNB_NESTED, .leave_raw = 1 + QS_K, .foreign_map = true},
     MF_ALL,
     -1,
     INT64_MAX,
     false,
     false,
     false},
    {{.dtype = QS_F16, .scheme = TINY_BNB_PLAIN, .leave_raw = 1 + QS_K},
     1 << QS_Q | 1 << QS_V,
     -1,
     SHARD,
     false,
     false,
     false},
    {{.dtype = QS_BF16, .untied = true, .biases = true, false},
     MF_ALL,
     -1,
     SHARD,
     true,
     false,
     false},
    {{.dtype = QS_F32}, MF_ALL, QS_BF16, INT64_MAX, true, true, false},
    {{.dtype = QS_F16}, 1 << QS_O, QS_F32, INT64_MAX, true, false, false},
    {{.dtype = QS_BF16, .fused = true, false}, FUSED, -1, INT64_MAX, false, false, false},
    {{.dtype = QS_BF16, .fused = true, .untied = true, false},
     FUSED,
     QS_F32,
     INT64_MAX,
     true,
     false,
     false},
    {{.dtype = QS_F16, .scheme = TINY_BNB_NESTED, .fused = true, .leave_raw = 3},
     1 << QS_QKV | 1 << QS_DOWN,
     -1,
     INT64_MAX,
     false,
     false,
     false},
    {{.dtype = QS_BF16, .untied = true}, MF_ALL, QS_F32, INT64_MAX, false, true, true},
    {{.dtype = QS_BF16}, 1 << QS_K | 1 << QS_DOWN, -1, INT64_MAX, false, false, true},
    {{.dtype = QS_F16}, MF_ALL, QS_F32, INT64_MAX, true, false, true},
};

ParameterizedTestParameters(merge, weights_are_the_sum_rounded_once)
{
    return cr_make_param_array(merge_case, CASES, sizeof CASES / sizeof *CASES);
}

ParameterizedTest(merge_case *c, merge, weights_are_the_sum_rounded_once, .timeout = 300)
{
    qs_merge_report report;
    mf_make_model("model", "base.h5", &c->model);
    qs_base_index *index = mf_open_index("base.h5");
    mf_adapter a = mf_make_adapter(&index->config, c->targets, c->rslora, c->dora, 0.5f);
    qs_dtype dtype = c->dtype >= 0 ? (qs_dtype)c->dtype : c->model.dtype;
    qs_base_index_free(index);
    mf_write_adapter("adapter", &a);
    cr_assert_eq(merge(c, "out", 2, &report), QS_OK, "%s", qs_error_text());
    cr_assert_eq(report.dtype, dtype);
    check_files("out", c, &report);
    check_result("out", c, &a, dtype);
    cr_assert_eq(mf_leftovers(), 0);
    free(a.vector);
}

Test(merge, threads_and_the_form_of_the_adapter_do_not_matter)
{
    merge_case c = {.dtype = QS_BF16, .shard_bytes = SHARD, .targets = MF_ALL};
    qs_merge_report report;
    mf_make_usual();
    cr_assert_eq(merge(&c, "one", 1, &report), QS_OK, "%s", qs_error_text());
    cr_assert_eq(merge(&c, "three/", 3, &report), QS_OK, "%s", qs_error_text());
    cr_assert_eq(mf_differs("one", "three"), 0);
    qs_base_index *index = mf_open_index("base.h5");
    mf_adapter a = mf_make_adapter(&index->config, MF_ALL, false, false, 0.5f);
    qs_merge_options options = {.base = "base.h5",
                                .output = "vector",
                                .dtype = QS_BF16,
                                .shard_bytes = SHARD,
                                .threads = 1,
                                .adapter = "step",
                                .vector = a.vector,
                                .layout = &a.layout,
                                .base_sha256 = index->hashes_sha256};
    cr_assert_eq(qs_merge(&options, &report), QS_OK, "%s", qs_error_text());
    cr_assert_eq(mf_differs("one", "vector"), 0);
    qs_base_index_free(index);
    free(a.vector);
}

/* ---- config.json and companions ---- */

static const char *text_of(const json_t *root, const char *key)
{
    const char *text = json_string_value(json_object_get(root, key));
    return text ? text : "";
}

Test(merge, config_keeps_its_spelling_and_loses_the_quantization)
{
    static const struct {
        const char *given, *old, *now;
    } rows[] = {{"", "float16", ""},
                {",\"torch_dtype\":\"bfloat16\"", "float16", ""},
                {",\"dtype\":\"bfloat16\"", "", "float16"},
                {",\"dtype\":\"bfloat16\",\"torch_dtype\":\"bfloat16\"", "float16", "float16"}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        merge_case c = {.dtype = QS_F16, .shard_bytes = INT64_MAX};
        tiny_hf o = {.dtype = QS_BF16, .scheme = TINY_BNB_NESTED, .config = rows[i].given};
        qs_merge_report report;
        mf_make_model("model", "base.h5", &o);
        qs_base_index *index = mf_open_index("base.h5");
        mf_adapter a = mf_make_adapter(&index->config, MF_ALL, false, false, 0.5f);
        qs_base_index_free(index);
        mf_write_adapter("adapter", &a);
        cr_assert_eq(merge(&c, "out", 1, &report), QS_OK, "%s", qs_error_text());
        json_t *source = read_json("model", "config.json"),
               *config = read_json("out", "config.json");
        cr_assert_not_null(json_object_get(source, "quantization_config"));
        cr_assert_null(json_object_get(config, "quantization_config"));
        cr_assert_str_eq(text_of(config, "torch_dtype"), rows[i].old, "%s", rows[i].given);
        cr_assert_str_eq(text_of(config, "dtype"), rows[i].now, "%s", rows[i].given);
        json_object_del(source, "quantization_config");
        json_object_del(source, "dtype");
        json_object_del(source, "torch_dtype");
        json_object_del(config, "dtype");
        json_object_del(config, "torch_dtype");
        cr_assert(json_equal(source, config), "%s", rows[i].given);
        json_decref(source);
        json_decref(config);
        free(a.vector);
        cr_assert_eq(system("rm -rf model base.h5 adapter out"), 0);
    }
}

Test(merge, tokenizer_comes_along_while_the_source_is_the_same)
{
    merge_case c = {.dtype = -1, .shard_bytes = INT64_MAX};
    qs_merge_report report;
    mf_make_usual();
    mf_put("model/tokenizer.json", "{}");
    mf_put("model/generation_config.json", "{\"a\": 1}");
    cr_assert_eq(merge(&c, "near", 1, &report), QS_OK, "%s", qs_error_text());
    cr_assert_str_eq(report.source, "model");
    cr_assert_str_eq(report.copied, " tokenizer.json generation_config.json");
    cr_assert_not_null(strstr(report.missing, "tokenizer_config.json"));
    cr_assert_eq(mf_differs("model/tokenizer.json", "near/tokenizer.json"), 0);
    cr_assert_eq(rename("model", "moved"), 0);
    cr_assert_eq(merge(&c, "far", 1, &report), QS_OK, "%s", qs_error_text());
    cr_assert_str_eq(report.source, "");
    cr_assert_neq(access("far/tokenizer.json", F_OK), 0);
    cr_assert_eq(mkdir("model", 0777), 0); /* another model of that name */
    mf_put("model/tokenizer.json", "{}");
    mf_put("model/config.json", "{\"model_type\": \"llama\"}");
    cr_assert_eq(merge(&c, "other", 1, &report), QS_OK, "%s", qs_error_text());
    cr_assert_str_eq(report.source, "");
}

/* ---- the chat template ---- */

/* What a file holds; NULL: it is not there. The caller frees it. */
static char *content(const char *dir, const char *name)
{
    char path[256];
    void *text = NULL;
    size_t bytes = 0;
    snprintf(path, sizeof path, "%s/%s", dir, name);
    if (access(path, F_OK) == 0) {
        cr_assert_eq(qs_io_read_file(path, 1 << 20, &text, &bytes), QS_OK, "%s", qs_error_text());
    }
    return text;
}

static void expect_content(const char *name, const char *expected, size_t row)
{
    char *found = content("out", name);
    cr_assert_eq(found == NULL, expected == NULL, "%zu: %s", row, name);
    cr_assert(found == NULL || strcmp(found, expected) == 0, "%zu: %s: %s", row, name, found);
    free(found);
}

/* `chat_template`: of the training data; NULL: not known. */
static qs_status merge_trained(const char *chat_template, qs_merge_report *report)
{
    const qs_merge_options options = {.base = "base.h5",
                                      .output = "out",
                                      .dtype = -1,
                                      .shard_bytes = INT64_MAX,
                                      .threads = 1,
                                      .adapter = "adapter",
                                      .chat_template = chat_template};
    return qs_merge(&options, report);
}

static void put_or_remove(const char *name, const char *text)
{
    (void)unlink(name);
    if (text != NULL) {
        mf_put(name, text);
    }
}

/* transformers takes the file before tokenizer_config.json's, llama.cpp the other way round: the
 * result holds one template alone. What else stands in tokenizer_config.json comes along byte for
 * byte, a number of more than 64 bits too. */
Test(merge, the_template_of_the_training_data_takes_the_place_of_another)
{
#define NUMBER "\"model_max_length\": 1000000000000000019884624838656"
#define NAMED                                                                                      \
    "{\"chat_template\": [{\"name\": \"tool_use\", \"template\": \"t\"}, {\"name\": \"default\", " \
    "\"template\": \"own\"}], " NUMBER "}\n"
#define PLAIN "{\"a\": 1.50,\n \"chat_template\":\"own\"," NUMBER "}"
#define FULL                                                                                       \
    "{\"a\": {\"chat_template\": \"in\"}, \"b\\\"\": \"]}\\\\\", \"chat_templat\\u0065\" : null "  \
    ", \"c\": "                                                                                    \
    "[-1, {\"d\": \"\\\"\"}]}"
#define WITHOUT "{ " NUMBER " }"
#define OTHER "{{ \"m\" }}\n\\ \xc2\xab"
#define QUOTED "\"{{ \\\"m\\\" }}\\n\\\\ \xc2\xab\""
    static const struct {
        const char *config, *jinja, *json; /* of the model */
        const char *trained;
        const char *config_out, *jinja_out, *json_out;
    } rows[] = {
        {PLAIN, NULL, "{}", NULL, PLAIN, NULL, "{}"}, /* not known */
        {PLAIN, "file", "{}", NULL, PLAIN, "file", "{}"},
        {PLAIN, NULL, NULL, "own", PLAIN, NULL, NULL}, /* the model's own */
        {NAMED, NULL, "{}", "own", NAMED, NULL, "{}"},
        {PLAIN, "file", NULL, "file", PLAIN, "file", NULL},
        {PLAIN, NULL, "{}", OTHER, "{\"a\": 1.50,\n \"chat_template\":" QUOTED "," NUMBER "}",
         OTHER, NULL},
        {NAMED, NULL, NULL, "t", "{\"chat_template\": \"t\", " NUMBER "}\n", "t", NULL},
        {PLAIN, "file", NULL, "own", PLAIN, "own", NULL},
        {FULL, NULL, NULL, OTHER,
         "{\"a\": {\"chat_template\": \"in\"}, \"b\\\"\": \"]}\\\\\", \"chat_templat\\u0065\" "
         ": " QUOTED " , \"c\": [-1, {\"d\": \"\\\"\"}]}",
         OTHER, NULL},
        {WITHOUT, "file", NULL, OTHER, WITHOUT, OTHER, NULL},
        {WITHOUT, NULL, NULL, "", WITHOUT, "", NULL},
        {"{}", NULL, NULL, OTHER, "{}", OTHER, NULL},
        {NULL, NULL, NULL, OTHER, NULL, OTHER, NULL},
    };
    mf_make_usual();
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        qs_merge_report report;
        put_or_remove("model/tokenizer_config.json", rows[i].config);
        put_or_remove("model/chat_template.jinja", rows[i].jinja);
        put_or_remove("model/chat_template.json", rows[i].json);
        cr_assert_eq(merge_trained(rows[i].trained, &report), QS_OK, "%zu: %s", i, qs_error_text());
        expect_content("tokenizer_config.json", rows[i].config_out, i);
        expect_content("chat_template.jinja", rows[i].jinja_out, i);
        expect_content("chat_template.json", rows[i].json_out, i);
        cr_assert_eq(report.other_template, i >= 5, "%zu", i);
        cr_assert_eq(system("rm -r out"), 0);
    }
    cr_assert_eq(rename("model", "moved"), 0); /* then there is nothing to compare with */
    qs_merge_report report;
    cr_assert_eq(merge_trained("own", &report), QS_OK, "%s", qs_error_text());
    expect_content("chat_template.jinja", "own", 99);
    cr_assert(report.other_template && report.source[0] == '\0');
}

#define TEMPLATES "model/additional_chat_templates"

/* transformers 4.5x keeps templates for tools or documents in files of their own. */
Test(merge, other_templates_come_along_unless_the_training_data_has_another)
{
    qs_merge_report report;
    mf_make_usual();
    cr_assert_eq(mkdir(TEMPLATES, 0777), 0);
    cr_assert_eq(merge_trained(NULL, &report), QS_OK, "%s", qs_error_text());
    cr_assert_neq(access("out/additional_chat_templates", F_OK), 0); /* there was none in it */
    cr_assert_eq(system("rm -r out"), 0);
    mf_put("model/chat_template.jinja", "own");
    mf_put(TEMPLATES "/tool_use.jinja", "{{ tools }}");
    mf_put(TEMPLATES "/odd \n\33[2J.jinja", "");
    mf_put(TEMPLATES "/notes.txt", "not a template");
    mf_put(TEMPLATES "/.jinja", "nor this");
    cr_assert_eq(symlink("../chat_template.jinja", TEMPLATES "/rag.jinja"), 0); /* as in caches */
    cr_assert_eq(mkdir(TEMPLATES "/more", 0777), 0);
    for (int own = 0; own < 2; own++) {
        cr_assert_eq(merge_trained(own ? "own" : NULL, &report), QS_OK, "%s", qs_error_text());
        expect_content("additional_chat_templates/tool_use.jinja", "{{ tools }}", 0);
        expect_content("additional_chat_templates/odd \n\33[2J.jinja", "", 0);
        expect_content("additional_chat_templates/rag.jinja", "own", 0);
        cr_assert_eq(system("test $(ls -A out/additional_chat_templates | grep -c jinja) = 3"), 0);
        cr_assert_neq(access("out/additional_chat_templates/notes.txt", F_OK), 0);
        cr_assert_eq(strncmp(report.copied, " additional_chat_templates", 26), 0, "%s",
                     report.copied);
        cr_assert_eq(system("rm -r out"), 0);
    }
    cr_assert_eq(merge_trained("another", &report), QS_OK, "%s", qs_error_text());
    cr_assert_neq(access("out/additional_chat_templates", F_OK), 0);
    cr_assert(report.other_template && strstr(report.copied, "additional") == NULL);
}

Test(merge, other_templates_that_are_none_are_named_and_leave_nothing)
{
    static const struct {
        const char *make;
        qs_status st;
        const char *named;
    } rows[] = {
        {"touch $D", QS_ERR_INPUT_FORMAT, TEMPLATES ": "},
        {"mkfifo $D", QS_ERR_INPUT_FORMAT, TEMPLATES ": "},
        {"ln -s $PWD/model/loop $D && ln -s loop model/loop", QS_ERR_INPUT_MISSING, TEMPLATES ": "},
        {"mkdir -p $D/x.jinja", QS_ERR_INPUT_FORMAT, TEMPLATES "/x.jinja: is not a plain file"},
        {"mkdir $D && mkfifo $D/x.jinja", QS_ERR_INPUT_FORMAT, TEMPLATES "/x.jinja: is not"},
        {"mkdir $D && ln -s /dev/zero $D/x.jinja", QS_ERR_INPUT_FORMAT, TEMPLATES "/x.jinja: is"},
        {"mkdir $D && ln -s nowhere $D/x.jinja", QS_ERR_INPUT_MISSING, TEMPLATES "/x.jinja: "},
        {"mkdir $D && truncate -s 257M $D/x.jinja", QS_ERR_INPUT_VALUE, TEMPLATES "/x.jinja: has"},
        {"mkdir $D && touch $(seq -f $D/%g.jinja 65)", QS_ERR_INPUT_VALUE, TEMPLATES ": holds"},
    };
    char command[512];
    qs_merge_report report;
    mf_make_usual();
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        snprintf(command, sizeof command, "D=" TEMPLATES "; rm -rf $D; %s", rows[i].make);
        cr_assert_eq(system(command), 0, "%s", command);
        qs_error_clear();
        cr_assert_eq(merge_trained(NULL, &report), rows[i].st, "%zu: %s", i, qs_error_text());
        cr_assert_eq(strncmp(qs_error_text(), rows[i].named, strlen(rows[i].named)), 0, "%s",
                     qs_error_text());
        cr_assert_neq(access("out", F_OK), 0);
        cr_assert_eq(mf_leftovers(), 0, "%zu", i);
    }
    qs_error_clear();
    cr_assert_eq(system("D=" TEMPLATES "; rm $D/65.jinja"), 0); /* as many as are taken */
    cr_assert_eq(merge_trained(NULL, &report), QS_OK, "%s", qs_error_text());
    cr_assert_eq(mf_differs(TEMPLATES, "out/additional_chat_templates"), 0);
}

Test(merge, a_tokenizer_config_that_is_none_is_named_and_leaves_nothing)
{
    static const char *const wrong[] = {"", "{", "[1]", "{\"a\": 1, \"a\": 2}",
                                        "{\"a\": \"\xff\"}"};
    qs_merge_report report;
    mf_make_usual();
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        mf_put("model/tokenizer_config.json", wrong[i]);
        qs_error_clear();
        cr_assert_eq(merge_trained("own", &report), QS_ERR_INPUT_FORMAT, "%zu: %s", i,
                     qs_error_text());
        cr_assert_eq(strncmp(qs_error_text(), "model/tokenizer_config.json: ", 29), 0, "%s",
                     qs_error_text());
        cr_assert_neq(access("out", F_OK), 0);
        cr_assert_eq(mf_leftovers(), 0);
    }
    qs_error_clear();
}
