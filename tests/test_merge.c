/* qshard merge: every weight is W + scale * B A, rounded once, under its name and in its shape;
 * what has no adapter is copied; what does not belong together is refused, and nothing is left
 * behind. */
#define _GNU_SOURCE
#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <fcntl.h>
#include <jansson.h>
#include <libgen.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/log.h"
#include "base/mem.h"
#include "ckpt/ckpt.h"
#include "ckpt/run_dir.h"
#include "hf/safetensors.h"
#include "merge/merge.h"
#include "store/io.h"
#include "support/tiny_hf.h"
#include "tests/scratch.h"
#include "weights/base_file.h"
#include "weights/quantize.h"

enum {
    ALL = (1 << QS_QKV) - 1, /* of a layer of Llama */
    FUSED = 1 << QS_QKV | 1 << QS_O | 1 << QS_GATE_UP | 1 << QS_DOWN,
    SHARD = 100 << 10,
    RANK = 4
};

static char folder[SCRATCH_MAX], binaries[1024], output[1 << 16];

static void find_binaries(void)
{
    char self[900] = "";
    const char *dir = getenv("QSHARD_BINARY_DIR");
    if (dir) {
        snprintf(binaries, sizeof binaries, "%s", dir);
        return;
    }
    cr_assert_gt(readlink("/proc/self/exe", self, sizeof self - 1), 0);
    snprintf(binaries, sizeof binaries, "%s/..", dirname(self));
}

static void make_folder(void)
{
    qs_log_init(0, 1, QS_LOG_QUIET, false);
    find_binaries();
    scratch_make(folder, NULL);
    cr_assert_eq(chdir(folder), 0);
}

static void remove_folder(void)
{
    cr_assert_eq(chdir("/"), 0);
    scratch_remove(folder);
}

TestSuite(merge, .init = make_folder, .fini = remove_folder, .timeout = 300);

/* ---- what is merged ---- */

static void quantize(const char *model, const char *base)
{
    qs_quantize_report report;
    qs_comm *comm = NULL;
    qs_quantize_options options = {.hf_dir = model,
                                   .output = base,
                                   .head_chunk_rows = 100, /* 301 rows: a short last chunk */
                                   .double_quant = true,
                                   .threads = 2};
    cr_assert_eq(qs_comm_self_create(&comm), QS_OK);
    cr_assert_eq(qs_quantize(&options, comm, &report), QS_OK, "%s", qs_error_text());
    qs_comm_destroy(comm);
}

static void make_model(const char *model, const char *base, const tiny_hf *o)
{
    cr_assert_eq(mkdir(model, 0777), 0);
    tiny_hf_write(model, o);
    quantize(model, base);
}

static qs_base_index *open_index(const char *base)
{
    qs_comm *self = NULL;
    qs_base_index *index = NULL;
    cr_assert_eq(qs_comm_self_create(&self), QS_OK);
    cr_assert_eq(qs_base_index_read(&index, base, self), QS_OK, "%s", qs_error_text());
    qs_comm_destroy(self);
    return index;
}

typedef struct {
    qs_config config;
    qs_lora_layout layout;
    float *vector;
} adapter;

static adapter make_adapter(const qs_hf_config *model, uint32_t targets, bool rslora, bool dora,
                            float size)
{
    adapter a;
    memset(&a, 0, sizeof a);
    a.config.lora.rank = RANK;
    a.config.lora.alpha = 10;
    a.config.lora.rslora = rslora;
    a.config.lora.dora = dora;
    a.config.lora.targets = targets;
    cr_assert_eq(qs_lora_layout_make(&a.layout, model, &a.config), QS_OK);
    int64_t count = a.layout.n_layers * a.layout.per_layer;
    uint32_t seed = 5;
    a.vector = calloc((size_t)count, sizeof *a.vector);
    for (int64_t i = 0; i < count; i++) {
        seed = seed * 1664525U + 1013904223U;
        a.vector[i] = i % a.layout.per_layer < a.layout.used
                          ? size * ((float)(seed >> 8) * 0x1p-24f - 0.5f)
                          : 0.0f;
    }
    return a;
}

static void write_adapter(const char *dir, const adapter *a)
{
    cr_assert_eq(qs_peft_write(dir, &a->layout, &a->config, "m", a->vector), QS_OK, "%s",
                 qs_error_text());
}

/* model/, base.h5 and adapter/ of the usual kind. */
static void make_usual(void)
{
    tiny_hf o = {.dtype = QS_BF16, .untied = true, .biases = true};
    make_model("model", "base.h5", &o);
    qs_base_index *index = open_index("base.h5");
    adapter a = make_adapter(&index->config, ALL, false, false, 0.5f);
    write_adapter("adapter", &a);
    free(a.vector);
    qs_base_index_free(index);
}

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
static double product(const adapter *a, int layer, int linear, int64_t i, int64_t j, double *size)
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
static double row_factor(const qs_st_tensor *t, const float *w, const adapter *a, int layer,
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

static void check_sum(const qs_st_tensor *t, const float *got, const float *w, const adapter *a,
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
        double most = half_ulp(exact, dtype) + (2 * RANK + 2) * 0x1p-24 * size * fabs(factor);
        most += a->layout.dora ? 2 * RANK * 0x1p-24 * fabs(exact) : 0;
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
static void check_result(const char *dir, const merge_case *c, const adapter *a, qs_dtype dtype)
{
    qs_base_index *index = open_index("base.h5");
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

static int leftovers(void)
{
    int count = -1;
    FILE *pipe = popen("ls -A | grep -c tmp-", "r");
    cr_assert_eq(fscanf(pipe, "%d", &count), 1);
    pclose(pipe);
    return count;
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
    {{.dtype = QS_BF16, .untied = true, .biases = true}, ALL, -1, INT64_MAX, false, false, false},
    {{.dtype = QS_BF16, .zero_rows = true},
     1 << QS_K | 1 << QS_DOWN,
     -1,
     SHARD,
     false,
     true,
     false},
    {{.dtype = QS_F16, .untied = true}, ALL, QS_F16, SHARD, false, false, false},
    {{.dtype = QS_F32, .biases = true}, ALL, QS_F32, INT64_MAX, false, false, false},
    {{.dtype = QS_F32}, 1 << QS_GATE, QS_BF16, SHARD, false, false, false},
    {{.dtype = QS_BF16}, ALL, QS_F32, INT64_MAX, false, false, false},
    {{.dtype = QS_BF16, .scheme = TINY_BNB_NESTED, .leave_raw = 1 + QS_K, .foreign_map = true},
     ALL,
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
    {{.dtype = QS_BF16, .untied = true, .biases = true, false}, ALL, -1, SHARD, true, false, false},
    {{.dtype = QS_F32}, ALL, QS_BF16, INT64_MAX, true, true, false},
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
    {{.dtype = QS_BF16, .untied = true}, ALL, QS_F32, INT64_MAX, false, true, true},
    {{.dtype = QS_BF16}, 1 << QS_K | 1 << QS_DOWN, -1, INT64_MAX, false, false, true},
    {{.dtype = QS_F16}, ALL, QS_F32, INT64_MAX, true, false, true},
};

ParameterizedTestParameters(merge, weights_are_the_sum_rounded_once)
{
    return cr_make_param_array(merge_case, CASES, sizeof CASES / sizeof *CASES);
}

ParameterizedTest(merge_case *c, merge, weights_are_the_sum_rounded_once, .timeout = 300)
{
    qs_merge_report report;
    make_model("model", "base.h5", &c->model);
    qs_base_index *index = open_index("base.h5");
    adapter a = make_adapter(&index->config, c->targets, c->rslora, c->dora, 0.5f);
    qs_dtype dtype = c->dtype >= 0 ? (qs_dtype)c->dtype : c->model.dtype;
    qs_base_index_free(index);
    write_adapter("adapter", &a);
    cr_assert_eq(merge(c, "out", 2, &report), QS_OK, "%s", qs_error_text());
    cr_assert_eq(report.dtype, dtype);
    check_files("out", c, &report);
    check_result("out", c, &a, dtype);
    cr_assert_eq(leftovers(), 0);
    free(a.vector);
}

static int differs(const char *a, const char *b)
{
    char command[256];
    snprintf(command, sizeof command, "diff -r %s %s > /dev/null", a, b);
    return system(command);
}

Test(merge, threads_and_the_form_of_the_adapter_do_not_matter)
{
    merge_case c = {.dtype = QS_BF16, .shard_bytes = SHARD, .targets = ALL};
    qs_merge_report report;
    make_usual();
    cr_assert_eq(merge(&c, "one", 1, &report), QS_OK, "%s", qs_error_text());
    cr_assert_eq(merge(&c, "three/", 3, &report), QS_OK, "%s", qs_error_text());
    cr_assert_eq(differs("one", "three"), 0);
    qs_base_index *index = open_index("base.h5");
    adapter a = make_adapter(&index->config, ALL, false, false, 0.5f);
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
    cr_assert_eq(differs("one", "vector"), 0);
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
        make_model("model", "base.h5", &o);
        qs_base_index *index = open_index("base.h5");
        adapter a = make_adapter(&index->config, ALL, false, false, 0.5f);
        qs_base_index_free(index);
        write_adapter("adapter", &a);
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

static void put(const char *name, const char *text)
{
    cr_assert_eq(qs_io_write_file(name, text, strlen(text)), QS_OK, "%s", qs_error_text());
}

Test(merge, tokenizer_comes_along_while_the_source_is_the_same)
{
    merge_case c = {.dtype = -1, .shard_bytes = INT64_MAX};
    qs_merge_report report;
    make_usual();
    put("model/tokenizer.json", "{}");
    put("model/generation_config.json", "{\"a\": 1}");
    cr_assert_eq(merge(&c, "near", 1, &report), QS_OK, "%s", qs_error_text());
    cr_assert_str_eq(report.source, "model");
    cr_assert_str_eq(report.copied, " tokenizer.json generation_config.json");
    cr_assert_not_null(strstr(report.missing, "tokenizer_config.json"));
    cr_assert_eq(differs("model/tokenizer.json", "near/tokenizer.json"), 0);
    cr_assert_eq(rename("model", "moved"), 0);
    cr_assert_eq(merge(&c, "far", 1, &report), QS_OK, "%s", qs_error_text());
    cr_assert_str_eq(report.source, "");
    cr_assert_neq(access("far/tokenizer.json", F_OK), 0);
    cr_assert_eq(mkdir("model", 0777), 0); /* another model of that name */
    put("model/tokenizer.json", "{}");
    put("model/config.json", "{\"model_type\": \"llama\"}");
    cr_assert_eq(merge(&c, "other", 1, &report), QS_OK, "%s", qs_error_text());
    cr_assert_str_eq(report.source, "");
}

/* ---- through the program ---- */

static int run_with(const char *prefix, const char *arguments)
{
    char command[4096];
    snprintf(command, sizeof command, "{ %s timeout -k 2 60 %s/qshard merge %s ; } 2>&1", prefix,
             binaries, arguments);
    FILE *pipe = popen(command, "r");
    cr_assert_not_null(pipe);
    size_t bytes = fread(output, 1, sizeof output - 1, pipe);
    output[bytes] = '\0';
    int status = pclose(pipe);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static int error_lines(void)
{
    int count = 0;
    for (const char *p = output; (p = strstr(p, "error[")); p++) {
        count += p == output || p[-1] == '\n';
    }
    return count;
}

static const struct {
    const char *arguments;
    int code;
    const char *says;
} REFUSALS[] = {
    {"adapter --base base.h5", 2, "merge needs -o HF_DIR"},
    {"adapter -o out", 2, "give it with --base"},
    {"adapter --base base.h5 -o out --dtype fp8", 2, "bf16 | f16 | f32"},
    {"adapter --base base.h5 -o out --dtype float32", 2, "bf16 | f16 | f32"},
    {"adapter --base base.h5 -o out --shard-size 5X", 2, "is no size"},
    {"adapter --base base.h5 -o out --shard-size 5GB", 2, "is no size"},
    {"adapter --base base.h5 -o out --shard-size 1.5G", 2, "is no size"},
    {"adapter --base base.h5 -o out --shard-size 0", 2, "is no size"},
    {"adapter --base base.h5 -o out --shard-size -5G", 2, "is no size"},
    {"adapter --base base.h5 -o out --shard-size 9999999T", 2, "is no size"},
    {"adapter --base base.h5 -o out --threads 0", 2, "whole number"},
    {"adapter --base base.h5 -o taken", 2, "error[E204] taken: exists already"},
    {"adapter --base base.h5 -o taken/", 2, "error[E204] taken: exists already"},
    {"adapter --base base.h5 -o base.h5", 2, "error[E204] base.h5: exists already"},
    {"nowhere --base base.h5 -o out", 3, "nowhere: No such file"},
    {"model --base base.h5 -o out", 3, "neither a checkpoint"},
    {"base.h5 --base base.h5 -o out", 3, "neither a checkpoint"},
    {"taken --base base.h5 -o out", 3, "not a checkpoint"},
    {"empty_adapter --base base.h5 -o out", 3, "peft_type"},
    {"no_tensors --base base.h5 -o out", 3, "holds neither adapter_model.safetensors"},
    {"deep --base base.h5 -o out", 3, "it belongs to another model"},
    {"broad --base base.h5 -o out", 3, "expected [4, 72]"},
    {"adapter --base nowhere.h5 -o out", 3, "nowhere.h5"},
    {"adapter --base adapter -o out", 3, "error[E3"},
    {"adapter --base cut.h5 -o out", 3, "cut.h5"},
    {"adapter --base base.h5 -o out --original nowhere", 3, "nowhere/config.json"},
    {"adapter --base base.h5 -o out --original taken", 3, "taken/config.json"},
    {"adapter --base base.h5 -o out --original tied", 3, "tie_word_embeddings is 1"},
    {"adapter --base base.h5 -o out --original other", 3, "error[E304] other: tensor model."},
    {"adapter --base base.h5 -o out --original bnb", 3, "is quantized itself"},
    {"adapter --base base.h5 -o out --original holed", 3, "up_proj.weight is missing"},
    {"huge --base base.h5 -o out --dtype f16", 5, "not finite in f16; choose --dtype bf16"},
    {"adapter --base base.h5 -o no/such/out", 4, "no/such"},
};

/* Adapters, bases and originals that do not belong to make_usual's. */
static void make_unusual(void)
{
    qs_base_index *index = open_index("base.h5");
    adapter huge =
        make_adapter(&index->config, 1 << QS_V, false, false, 400.0f); /* 2.5 * 4 * 200^2 */
    write_adapter("huge", &huge);
    qs_hf_config other = index->config;
    other.n_layers = 3;
    adapter deep = make_adapter(&other, ALL, false, false, 0.5f);
    write_adapter("deep", &deep);
    other = index->config;
    other.hidden = 80;
    adapter broad = make_adapter(&other, ALL, false, false, 0.5f);
    write_adapter("broad", &broad);
    free(huge.vector);
    free(deep.vector);
    free(broad.vector);
    qs_base_index_free(index);
    static const struct {
        const char *dir;
        tiny_hf model;
    } models[] = {
        {"tied", {.dtype = QS_BF16, .biases = true}},
        {"other",
         {.dtype = QS_BF16, .untied = true, .biases = true, .drop = "model.embed_tokens.weight"}},
        {"bnb", {.dtype = QS_BF16, .untied = true, .biases = true, .scheme = TINY_BNB_NESTED}},
        {"holed",
         {.dtype = QS_BF16,
          .untied = true,
          .biases = true,
          .drop = "model.layers.1.mlp.up_proj.weight"}}};
    for (size_t i = 0; i < sizeof models / sizeof *models; i++) {
        cr_assert_eq(mkdir(models[i].dir, 0777), 0);
        tiny_hf_write(models[i].dir, &models[i].model);
    }
    cr_assert_eq(mkdir("taken", 0777), 0);
    cr_assert_eq(mkdir("empty_adapter", 0777), 0);
    put("empty_adapter/adapter_config.json", "{}");
    cr_assert_eq(system("mkdir no_tensors; cp adapter/adapter_config.json no_tensors; head -c 9000 "
                        "base.h5 > cut.h5"),
                 0);
}

Test(merge, what_does_not_fit_is_refused_with_one_line)
{
    make_usual();
    make_unusual();
    /* another model of these shapes: the same numbers with one norm changed */
    cr_assert_eq(system("cp model/model.safetensors other/"), 0);
    qs_st_dir *dir = NULL;
    cr_assert_eq(qs_st_open(&dir, "other", "model"), QS_OK);
    const qs_st_tensor *norm = qs_st_find(dir, "model.norm.weight");
    int fd = open("other/model.safetensors", O_WRONLY);
    cr_assert_eq(pwrite(fd, "\1\2", 2, norm->begin + 20), 2);
    close(fd);
    qs_st_close(dir);
    for (size_t i = 0; i < sizeof REFUSALS / sizeof *REFUSALS; i++) {
        int code = run_with("", REFUSALS[i].arguments);
        cr_assert_eq(code, REFUSALS[i].code, "%s: exit %d\n%s", REFUSALS[i].arguments, code,
                     output);
        cr_assert_eq(error_lines(), 1, "%s:\n%s", REFUSALS[i].arguments, output);
        cr_assert_not_null(strstr(output, REFUSALS[i].says), "%s:\n%s", REFUSALS[i].arguments,
                           output);
        cr_assert_neq(access("out", F_OK), 0, "%s: something is made", REFUSALS[i].arguments);
        cr_assert_eq(leftovers(), 0, "%s", REFUSALS[i].arguments);
        cr_assert_eq(rmdir("taken"), 0, "%s: taken is no longer empty", REFUSALS[i].arguments);
        cr_assert_eq(mkdir("taken", 0777), 0);
    }
}

/* A run directory with one checkpoint that was trained on the base of hash `sha`. */
static void make_run(const qs_hf_config *model, const char *sha)
{
    static const char yaml[] = "base: base.h5\ndata: {train: t.h5}\noutput: run\n"
                               "lora: {rank: 4, alpha: 10, targets: all-linear}\n";
    qs_config cfg;
    qs_lora_layout layout;
    qs_comm *comm = NULL;
    qs_optim *o = NULL;
    qs_run_dir run_dir;
    adapter a = make_adapter(model, ALL, false, false, 0.5f);
    cr_assert_eq(qs_config_parse(&cfg, yaml, strlen(yaml), "r", NULL, 0), QS_OK);
    cr_assert_eq(qs_lora_layout_make(&layout, model, &cfg), QS_OK);
    cr_assert_eq(qs_comm_self_create(&comm), QS_OK);
    cr_assert_eq(qs_run_dir_open(&run_dir, &cfg, QS_RESUME_AUTO, false, comm), QS_OK);
    int64_t count = layout.n_layers * layout.per_layer;
    cr_assert_eq(qs_optim_create(&o, qs_device_cpu(), &layout, 0, 1), QS_OK);
    memcpy(o->master, a.vector, (size_t)count * sizeof *a.vector);
    char *text = qs_config_dump(&cfg);
    qs_ckpt_meta meta = {.step = 1, .config_yaml = text};
    snprintf(meta.base_sha256, sizeof meta.base_sha256, "%s", sha);
    snprintf(meta.run_id, sizeof meta.run_id, "%s", run_dir.run_id);
    cr_assert_eq(qs_ckpt_save("run", &meta, &layout, o, comm), QS_OK, "%s", qs_error_text());
    qs_run_dir_close(&run_dir);
    free(text);
    free(a.vector);
    qs_optim_destroy(o);
    qs_comm_destroy(comm);
}

Test(merge, a_run_is_merged_onto_its_own_base_only)
{
    make_usual();
    qs_base_index *index = open_index("base.h5");
    make_run(&index->config, index->hashes_sha256);
    qs_base_index_free(index);
    cr_assert_eq(run_with("", "adapter --base base.h5 -o peft"), 0, "%s", output);
    cr_assert_not_null(strstr(output, "14 of 35 tensors merged, bf16"), "%s", output);
    cr_assert_eq(run_with("", "run -o run_out"), 0, "%s", output);
    cr_assert_eq(run_with("", "run/step-00000001 --base base.h5 -o step_out"), 0, "%s", output);
    cr_assert_eq(differs("peft", "run_out") | differs("peft", "step_out"), 0);
    cr_assert_eq(run_with("timeout -k 2 50 mpirun -np 3", "run -o ranks_out"), 0, "%s", output);
    cr_assert_eq(differs("peft", "ranks_out"), 0);
    tiny_hf small = {.dtype = QS_BF16, .untied = true}; /* other shapes are found first */
    make_model("plain", "plain.h5", &small);
    cr_assert_eq(run_with("", "run --base plain.h5 -o out"), 3, "%s", output);
    cr_assert_eq(error_lines(), 1, "%s", output);
    cr_assert_not_null(strstr(output, "error[E304] run/step-00000001: was trained on a base"), "%s",
                       output);
    cr_assert_neq(access("out", F_OK), 0);
    cr_assert_eq(truncate("run/step-00000001/rank-00000.h5", 3000), 0);
    cr_assert_eq(run_with("", "run/step-00000001 -o out"), 3, "%s", output);
    cr_assert_eq(error_lines(), 1, "%s", output);
    cr_assert_neq(access("out", F_OK), 0);
}

/* ---- a disk that fails ---- */

static int run_faulty(const char *fault)
{
    char prefix[2048];
    const char *asan = getenv("ASAN_OPTIONS");
    snprintf(prefix, sizeof prefix,
             "FAULT=%s FAULT_PATH=out ASAN_OPTIONS=%s:verify_asan_link_order=0 "
             "LD_PRELOAD=%s/tests/libiofault.so",
             fault, asan ? asan : "", binaries);
    return run_with(prefix, "adapter --base base.h5 -o out --shard-size 100K --quiet");
}

Test(merge, any_call_may_fail_and_nothing_half_done_is_left)
{
    static const char *const kinds[] = {"ENOSPC", "EIO", "late", "short", "EINTR", "flip", "lost"};
    int calls = 0;
    make_usual();
    cr_assert_eq(run_with("", "adapter --base base.h5 -o good --shard-size 100K"), 0);
    cr_assert_eq(run_faulty("io:count"), 0, "%s", output);
    const char *at = strstr(output, "iofault: calls ");
    cr_assert(at && sscanf(at, "iofault: calls %d", &calls) == 1, "%s", output);
    cr_assert_gt(calls, 30, "five files and more");
    for (int n = 1; n <= calls; n += 1 + n / 8) { /* closer at the start, all kinds of call */
        for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++) {
            char fault[64];
            snprintf(fault, sizeof fault, "io:%d:%s", n, kinds[k]);
            cr_assert_eq(system("rm -rf out"), 0);
            int code = run_faulty(fault);
            cr_assert(code == 0 || code == 4, "%s: exit %d\n%s", fault, code, output);
            cr_assert_eq(error_lines(), code == 4, "%s:\n%s", fault, output);
            cr_assert_eq(leftovers(), 0, "%s:\n%s", fault, output);
            bool there = access("out", F_OK) == 0;
            cr_assert(there || code == 4, "%s: success without a result", fault);
            cr_assert(!there || differs("good", "out") == 0, "%s: a wrong result", fault);
        }
    }
}

/* What a shell says of a process that a signal ended: 128 + its number. */
Test(merge, a_signal_at_any_call_leaves_nothing_half_done)
{
    int calls = 0;
    make_usual();
    cr_assert_eq(run_with("", "adapter --base base.h5 -o good --shard-size 100K"), 0);
    cr_assert_eq(run_faulty("io:count"), 0, "%s", output);
    cr_assert_eq(sscanf(strstr(output, "iofault: calls "), "iofault: calls %d", &calls), 1);
    for (int n = 1; n <= calls; n += 1 + n / 8) {
        char fault[64];
        const bool interrupt = n % 2 != 0;
        snprintf(fault, sizeof fault, "io:%d:%s", n, interrupt ? "intbefore" : "termbefore");
        cr_assert_eq(system("rm -rf out"), 0);
        const int code = run_faulty(fault);
        cr_assert_eq(code, 128 + (interrupt ? SIGINT : SIGTERM), "%s: %d\n%s", fault, code, output);
        cr_assert_eq(leftovers(), 0, "%s:\n%s", fault, output);
        cr_assert(access("out", F_OK) != 0 || differs("good", "out") == 0, "%s", fault);
    }
}

Test(merge, leftovers_of_killed_commands_are_removed_and_others_are_not)
{
    static const char *const made[] = {"out.tmp-999999991", "out.tmp-999999992",
                                       "out.tmp-999999993", "out.tmp-999999994", "out.tmp-9x"};
    char command[512];
    make_usual();
    for (size_t i = 0; i < sizeof made / sizeof *made; i++) {
        snprintf(command, sizeof command,
                 "mkdir %s && touch %s/model.safetensors && %s touch -d 2001-01-01 %s/* && "
                 "%s touch -d 2001-01-01 %s",
                 made[i], made[i], i == 1 ? ": written into of late:" : "", made[i],
                 i == 2 ? ": changed of late:" : "", made[i]);
        cr_assert_eq(system(command), 0, "%s", command);
    }
    snprintf(command, sizeof command, "mkdir %s/by_hand && touch -d 2001-01-01 %s", made[3],
             made[3]);
    cr_assert_eq(system(command), 0);
    cr_assert_eq(run_with("", "adapter --base base.h5 -o out/"), 0, "%s", output);
    cr_assert_neq(access(made[0], F_OK), 0);
    for (size_t i = 1; i < sizeof made / sizeof *made; i++) {
        snprintf(command, sizeof command, "%s/model.safetensors", made[i]);
        cr_assert_eq(access(command, F_OK), 0, "%s", made[i]);
    }
}

Test(merge, a_full_disk_is_exit_4)
{
    make_usual();
    cr_assert_eq(run_faulty("io:5:ENOSPC"), 4, "%s", output);
    cr_assert_not_null(strstr(output, "error[E401]"), "%s", output);
    cr_assert_neq(access("out", F_OK), 0);
    cr_assert_eq(leftovers(), 0);
}
