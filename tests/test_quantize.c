/* qshard quantize: the same file from any number of ranks and threads, bitsandbytes' bytes taken
 * over, bad checkpoints refused by name, and nothing left behind by a failure. */
#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <utime.h>

#include "base/log.h"
#include "base/mem.h"
#include "hf/safetensors.h"
#include "mpirun.h"
#include "store/hash.h"
#include "store/io.h"
#include "support/tiny_hf.h"
#include "team.h"
#include "tests/scratch.h"
#include "weights/base_file.h"
#include "weights/base_impl.h"
#include "weights/quantize.h"

static char dir[SCRATCH_MAX], model[96], out_dir[96];

static void make_dirs(void)
{
    scratch_make(dir, NULL);
    (void)snprintf(model, sizeof model, "%s/model", dir);
    (void)snprintf(out_dir, sizeof out_dir, "%s/out", dir);
    cr_assert(qs_io_mkdir(model) == QS_OK && qs_io_mkdir(out_dir) == QS_OK);
    qs_log_init(0, 1, QS_LOG_QUIET, false);
}

static void remove_dirs(void)
{
    scratch_remove(dir);
}

TestSuite(quantize, .init = make_dirs, .fini = remove_dirs);

static const char *out_file(const char *name)
{
    static char path[2][160];
    static int turn;
    turn = 1 - turn;
    (void)snprintf(path[turn], sizeof path[turn], "%s/%s", out_dir, name);
    return path[turn];
}

static int files_in_out(void)
{
    mpirun_result r;
    shell(&r, 10, "sh -c 'ls -A %s | wc -l'", out_dir);
    return atoi(r.output);
}

static void sha256_of(const char *path, char hex[QS_SHA256_HEX])
{
    void *data = NULL;
    size_t bytes = 0;
    cr_assert_eq(qs_io_read_file(path, 1 << 28, &data, &bytes), QS_OK, "%s", qs_error_text());
    qs_sha256_hex(data, bytes, hex);
    free(data);
}

/* ---- runs ---- */

typedef struct {
    qs_quantize_options options;
    qs_quantize_report report[TEAM_MAX];
} run_context;

static qs_status quantize_body(team_member *me)
{
    run_context *c = me->ctx;
    return qs_quantize(&c->options, me->comm, &c->report[me->rank]);
}

/* Quantize on `nranks` threads-as-ranks; all must end alike. The error text of rank 0's kind is
 * left in *text. */
static qs_status quantize_on(int nranks, run_context *c, char text[512])
{
    team_member members[TEAM_MAX];
    team_run(members, nranks, quantize_body, c);
    text[0] = '\0';
    for (int r = 0; r < nranks; r++) {
        cr_assert_eq(members[r].st, members[0].st, "rank %d: %d, rank 0: %d", r, members[r].st,
                     members[0].st);
        if (members[r].text[0] != '\0') {
            strcpy(text, members[r].text);
        }
    }
    return members[0].st;
}

static run_context to_file(const char *path, int threads)
{
    return (run_context){.options = {.hf_dir = model,
                                     .output = path,
                                     .head_chunk_rows = 100,
                                     .double_quant = true,
                                     .threads = threads}};
}

static qs_quantize_report quantize(const char *path)
{
    char text[512];
    run_context c = to_file(path, 1);
    cr_assert_eq(quantize_on(1, &c, text), QS_OK, "%s", text);
    return c.report[0];
}

Test(quantize, file_is_the_same_for_any_ranks_and_threads)
{
    tiny_hf o = {.dtype = QS_BF16, .untied = true, .biases = true, .zero_rows = true};
    char first[QS_SHA256_HEX], other[QS_SHA256_HEX], text[512], name[16];
    tiny_hf_write(model, &o);
    for (int nranks = 1; nranks <= 4; nranks++) {
        for (int threads = 1; threads <= 3; threads += 2) {
            (void)snprintf(name, sizeof name, "%d-%d.h5", nranks, threads);
            run_context c = to_file(out_file(name), threads);
            cr_assert_eq(quantize_on(nranks, &c, text), QS_OK, "%s", text);
            cr_assert_eq(c.report[nranks - 1].linears, 14);
            cr_assert_eq(c.report[nranks - 1].zero_blocks, (TINY_FFN * TINY_HIDDEN + 63) / 64);
            sha256_of(c.options.output, nranks == 1 && threads == 1 ? first : other);
            cr_assert(nranks * threads == 1 || strcmp(first, other) == 0, "%s differs", name);
        }
    }
    cr_assert_eq(files_in_out(), 8, "no temporary file is left");
}

/* ---- generation_config.json ---- */

static void put_generation(const char *text)
{
    char path[160];
    (void)snprintf(path, sizeof path, "%s/generation_config.json", model);
    (void)unlink(path);
    cr_assert(text == NULL || qs_io_write_new(path, text, strlen(text)) == QS_OK);
}

/* The ids that base.h5 has, and its hash. */
static void ids_of(const char *name, char ids[128], char sha256[QS_SHA256_HEX])
{
    qs_base_index *index = NULL;
    const char *path = out_file(name);
    (void)quantize(path);
    sha256_of(path, sha256);
    cr_assert_eq(qs_base_open_local(&index, path), QS_OK, "%s", qs_error_text());
    ids[0] = '\0';
    for (int i = 0; i < index->n_eos; i++) {
        (void)snprintf(ids + strlen(ids), 128 - strlen(ids), " %d", index->eos[i]);
    }
    qs_base_index_free(index);
    cr_assert_eq(unlink(path), 0);
}

/* What is no good costs the ids alone; without any the file is that of a model that has none. */
Test(quantize, ids_that_end_a_text_come_from_generation_config)
{
    static char deep[300], many[16384];
    const struct {
        const char *text, *ids;
    } rows[] = {{NULL, ""},
                {"{\"eos_token_id\": [1, 300, 7], \"x\": [0.5]}", " 1 300 7"},
                {"{\"eos_token_id\": 7}", " 7"},
                {"{\"eos_token_id\": [-1, 301, 4294967296, 5]}", " 5"},
                {"{\"eos_token_id\": [0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15]}",
                 " 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15"},
                {"{\"eos_token_id\": [0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16]}", ""},
                {"{\"eos_token_id\": null}", ""},
                {"{\"eos_token_id\": -1}", ""},
                {"{\"eos_token_id\": \"7\"}", ""},
                {"{\"eos_token_id\": [1, \"7\"]}", ""},
                {"{\"eos_token_id\": [1, [7]]}", ""},
                {"{\"eos_token_id\": {\"a\": 7}}", ""},
                {"{\"eos_token_id\": 99999999999999999999}", ""},
                {"{\"a\": 1}", ""},
                {"[7]", ""},
                {"", ""},
                {"{\"eos_token_id\": [1,", ""},
                {"{\"eos_token_id\": 1, \"eos_token_id\": 2}", ""},
                {deep, ""},
                {many, ""}};
    tiny_hf o = {.dtype = QS_BF16};
    char ids[128], none[QS_SHA256_HEX], sha256[QS_SHA256_HEX];
    memset(deep, '[', sizeof deep - 1);
    (void)strcpy(many, "{\"eos_token_id\": [");
    for (size_t at = strlen(many); at + 4 < sizeof many; at += 2) {
        (void)memcpy(many + at, "7,", 3);
    }
    (void)strcat(many, "7]}");
    tiny_hf_write(model, &o);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        put_generation(rows[i].text);
        ids_of("base.h5", ids, i == 0 ? none : sha256);
        cr_assert_str_eq(ids, rows[i].ids, "%s", rows[i].text);
        cr_assert(i == 0 || (strcmp(none, sha256) == 0) == (rows[i].ids[0] == '\0'), "%s",
                  rows[i].text);
    }
}

/* ---- tokenizer.json ---- */

static void tokenizer_of(char sha256[QS_SHA256_HEX])
{
    qs_base_index *index = NULL;
    const char *path = out_file("base.h5");
    (void)quantize(path);
    cr_assert_eq(qs_base_open_local(&index, path), QS_OK, "%s", qs_error_text());
    (void)strcpy(sha256, index->tokenizer_sha256);
    qs_base_index_free(index);
    cr_assert_eq(unlink(path), 0);
}

/* A folder of that name costs the hash alone. */
Test(quantize, hash_of_the_tokenizer_is_kept)
{
    tiny_hf o = {.dtype = QS_BF16};
    char sha256[QS_SHA256_HEX], expected[QS_SHA256_HEX], path[160];
    tiny_hf_write(model, &o);
    (void)snprintf(path, sizeof path, "%s/tokenizer.json", model);
    (void)unlink(path);
    tokenizer_of(sha256);
    cr_assert_str_eq(sha256, "");
    cr_assert_eq(qs_io_write_new(path, "{}", 2), QS_OK);
    tokenizer_of(sha256);
    qs_sha256_hex("{}", 2, expected);
    cr_assert_str_eq(sha256, expected);
    cr_assert_eq(unlink(path), 0);
    cr_assert_eq(mkdir(path, 0700), 0);
    tokenizer_of(sha256);
    cr_assert_str_eq(sha256, "");
    cr_assert_eq(rmdir(path), 0);
}

Test(quantize, file_is_the_same_under_mpirun, .timeout = 120)
{
    tiny_hf o = {.dtype = QS_F16};
    char first[QS_SHA256_HEX], other[QS_SHA256_HEX];
    mpirun_result r;
    tiny_hf_write(model, &o);
    quantize(out_file("self.h5"));
    sha256_of(out_file("self.h5"), first);
    for (int n = 1; n <= 3; n++) {
        shell(&r, 60, "mpirun -np %d %s %s %s/mpi%d.h5 2", n, case_path("quantize"), model, out_dir,
              n);
        cr_assert_eq(r.code, 0, "np %d: %s", n, r.output);
        char name[16];
        (void)snprintf(name, sizeof name, "mpi%d.h5", n);
        sha256_of(out_file(name), other);
        cr_assert_str_eq(first, other, "np %d", n);
    }
}

/* ---- content ---- */

typedef struct {
    qs_base_index *index;
    qs_st_dir *hf;
    int fd;
} opened;

static opened open_result(const char *path)
{
    opened f = {.fd = open(path, O_RDONLY)};
    cr_assert_eq(qs_base_verify(path), QS_OK, "%s", qs_error_text());
    cr_assert_eq(qs_base_open_local(&f.index, path), QS_OK, "%s", qs_error_text());
    cr_assert_eq(qs_st_open(&f.hf, model, "model"), QS_OK, "%s", qs_error_text());
    return f;
}

static void close_result(opened *f)
{
    qs_base_index_free(f->index);
    qs_st_close(f->hf);
    close(f->fd);
}

/* All weights of tensor `i` of unit `u`, as one rank sees them. */
static float *decoded(const opened *f, int u, int i)
{
    const qs_base_unit *unit = &f->index->units[u];
    qs_unit_view view = {.layout = qs_unit_layout_make(&unit->size, 1)};
    int64_t count = qs_base_tensor_count(&unit->tensors[i]);
    float *out = malloc((size_t)count * sizeof *out);
    uint8_t *message = NULL;
    uint64_t bytes = 0;
    cr_assert_eq(QS_ALLOC(&message, view.layout.message_bytes, QS_MEM_WORK), QS_OK);
    cr_assert_eq(qs_base_read_share(f->index, f->fd, u, 0, 1, message, &bytes), QS_OK);
    view.base = message;
    qs_weight w = qs_base_weight(f->index, &unit->tensors[i]);
    qs_weight_decode(&view, &w, 0, count, out);
    qs_mem_free(message);
    return out;
}

/* The same by the definition, from the whole tensor in memory. */
static float *expected(const float *x, int64_t count, bool nested, qs_dtype dtype)
{
    int64_t blocks = (count + 63) / 64;
    float *y = malloc((size_t)count * sizeof *y);
    float *absmax = malloc((size_t)blocks * sizeof *absmax);
    float *absmax32 = malloc((size_t)blocks * sizeof *absmax32);
    uint8_t *packed = malloc((size_t)count), *absmax8 = malloc((size_t)blocks);
    double sum = 0.0;
    qs_nf4_quantize_blocks(x, count, packed, absmax);
    for (int64_t i = 0; i < blocks; i++) {
        sum += (double)absmax[i];
    }
    float offset = (float)(sum / (double)blocks);
    qs_nf4_quantize_absmax(absmax, blocks, offset, absmax8, absmax32);
    for (int64_t i = 0; i < count; i++) {
        int64_t b = i / 64;
        float scale = nested ? qs_nf4_absmax(qs_dynamic_map, absmax8[b], absmax32[b / 256], offset)
                             : absmax[b];
        int code = i % 2 == 0 ? packed[i / 2] >> 4 : packed[i / 2] & 15;
        y[i] = qs_f32_round(qs_nf4_code[code] * scale, dtype);
    }
    free(absmax);
    free(absmax32);
    free(absmax8);
    free(packed);
    return y;
}

typedef struct {
    qs_dtype dtype;
    bool nested;
} scheme;

ParameterizedTestParameters(quantize, weights_are_code_times_absmax_rounded)
{
    static scheme s[] = {{QS_BF16, true}, {QS_F16, true}, {QS_F32, true}, {QS_BF16, false}};
    return cr_make_param_array(scheme, s, sizeof s / sizeof *s);
}

ParameterizedTest(scheme *s, quantize, weights_are_code_times_absmax_rounded)
{
    tiny_hf o = {.dtype = s->dtype, .zero_rows = true};
    char text[512];
    tiny_hf_write(model, &o);
    run_context c = to_file(out_file("b.h5"), 2);
    c.options.double_quant = s->nested;
    cr_assert_eq(quantize_on(2, &c, text), QS_OK, "%s", text);
    opened f = open_result(out_file("b.h5"));
    cr_assert_eq(f.index->nested, s->nested);
    for (int i = 0; i < 7; i++) {
        const qs_base_tensor *t = &f.index->units[0].tensors[i];
        int64_t count = qs_base_tensor_count(t);
        float *x = malloc((size_t)count * sizeof *x);
        cr_assert_eq(qs_st_read_f32(f.hf, qs_st_find(f.hf, t->name), 0, count, x), QS_OK);
        float *want = expected(x, count, s->nested, s->dtype);
        float *got = decoded(&f, 0, i);
        cr_assert_eq(memcmp(want, got, (size_t)count * sizeof *x), 0, "%s", t->name);
        free(x);
        free(want);
        free(got);
    }
    close_result(&f);
}

/* ---- bitsandbytes ---- */

typedef struct {
    tiny_hf o;
    int n_maps;
} import_case;

ParameterizedTestParameters(quantize, bitsandbytes_bytes_are_taken_over)
{
    static import_case c[] = {
        {{.dtype = QS_BF16, .scheme = TINY_BNB_NESTED}, 1},
        {{.dtype = QS_F16, .scheme = TINY_BNB_NESTED, .foreign_map = true}, 2},
        {{.dtype = QS_F32, .scheme = TINY_BNB_NESTED, .bf16_storage = true}, 1},
        {{.dtype = QS_BF16, .scheme = TINY_BNB_PLAIN, .leave_raw = 2, .biases = true}, 1},
        {{.dtype = QS_BF16, .scheme = TINY_BNB_NESTED, .leave_raw = 7, .untied = true}, 1},
        {{.dtype = QS_BF16, .scheme = TINY_BNB_NESTED, .fused = true}, 1},
        {{.dtype = QS_F16, .scheme = TINY_BNB_PLAIN, .leave_raw = 3, .fused = true}, 1},
    };
    return cr_make_param_array(import_case, c, sizeof c / sizeof *c);
}

static void compare_bytes(const opened *f, const char *name, const char *suffix, int64_t at)
{
    char full[200];
    (void)snprintf(full, sizeof full, "%s%s", name, suffix);
    const qs_st_tensor *t = qs_st_find(f->hf, full);
    uint8_t *want = malloc((size_t)t->bytes), *got = malloc((size_t)t->bytes);
    cr_assert_eq(qs_st_read(f->hf, t, 0, t->bytes, want), QS_OK);
    cr_assert_eq(qs_io_read_all(f->fd, got, (size_t)t->bytes, at, "b.h5"), QS_OK);
    cr_assert_eq(memcmp(want, got, (size_t)t->bytes), 0, "%s", full);
    free(want);
    free(got);
}

static void compare_import(const opened *f, const qs_base_unit *unit, const qs_base_tensor *t,
                           bool nested)
{
    if (t->kind == QS_TENSOR_RAW) {
        int64_t each = (int64_t)qs_raw_quantum_bytes(&unit->size);
        compare_bytes(f, t->name, "", unit->raw_at + t->quantum * each);
        return;
    }
    int64_t q = t->quantum;
    compare_bytes(f, t->name, "", unit->packed_at + q * 8192);
    if (nested) {
        compare_bytes(f, t->name, ".absmax", unit->absmax8_at + q * 256);
        compare_bytes(f, t->name, ".nested_absmax", unit->absmax32_at + q * 4);
        cr_assert_eq(t->offset, 0.5f);
        float map[256];
        char full[200];
        (void)snprintf(full, sizeof full, "%s.nested_quant_map", t->name);
        cr_assert_eq(qs_st_read_f32(f->hf, qs_st_find(f->hf, full), 0, 256, map), QS_OK);
        cr_assert_eq(memcmp(map, f->index->maps + t->map * 256, sizeof map), 0, "%s", full);
    } else {
        compare_bytes(f, t->name, ".absmax", unit->absmax32_at + q * 1024);
    }
}

ParameterizedTest(import_case *c, quantize, bitsandbytes_bytes_are_taken_over)
{
    char text[512];
    bool nested = c->o.scheme == TINY_BNB_NESTED;
    tiny_hf_write(model, &c->o);
    run_context run = to_file(out_file("b.h5"), 2);
    run.options.double_quant = !nested; /* an import keeps what the checkpoint has */
    cr_assert_eq(quantize_on(2, &run, text), QS_OK, "%s", text);
    const int linears = tiny_hf_linears(&c->o);
    cr_assert_eq(run.report[0].linears, TINY_LAYERS * linears - (c->o.leave_raw != 0));
    opened f = open_result(out_file("b.h5"));
    cr_assert_eq(f.index->n_maps, c->n_maps);
    cr_assert_eq(f.index->nested, nested);
    for (int u = 0; u < TINY_LAYERS; u++) {
        for (int i = 0; i < linears; i++) {
            const qs_base_tensor *t = &f.index->units[u].tensors[i];
            cr_assert_eq(t->dtype, c->o.dtype);
            cr_assert_eq(t->kind == QS_TENSOR_RAW, u == 0 && c->o.leave_raw == i + 1, "%s",
                         t->name);
            compare_import(&f, &f.index->units[u], t, nested);
        }
    }
    close_result(&f);
}

ParameterizedTestParameters(quantize, real_bitsandbytes_checkpoints_decode_to_its_weights)
{
    static char name[][24] = {"bnb_tiny", "bnb_tiny_plain"};
    return cr_make_param_array(char[24], name, 2);
}

ParameterizedTest(char *name, quantize, real_bitsandbytes_checkpoints_decode_to_its_weights)
{
    char golden[512], path[600];
    const char *source = getenv("QSHARD_SOURCE_DIR");
    (void)snprintf(golden, sizeof golden, "%s/tests/golden", source != NULL ? source : ".");
    (void)snprintf(path, sizeof path, "%s/%s/config.json", golden, name);
    if (access(path, R_OK) != 0) {
        cr_skip_test("no %s", path);
    }
    mpirun_result r;
    shell(&r, 10,
          "sh -c 'cp %s/%s/* %s/ && mkdir %s/want && cp %s/%s_weights.safetensors "
          "%s/want/model.safetensors'",
          golden, name, model, dir, golden, name, dir);
    cr_assert_eq(r.code, 0, "%s", r.output);
    quantize(out_file("b.h5"));
    opened f = open_result(out_file("b.h5"));
    qs_st_dir *want = NULL;
    (void)snprintf(path, sizeof path, "%s/want", dir);
    cr_assert_eq(qs_st_open(&want, path, "model"), QS_OK, "%s", qs_error_text());
    int compared = 0;
    for (int i = 0; i < 7; i++) {
        const qs_base_tensor *t = &f.index->units[0].tensors[i];
        const qs_st_tensor *w = qs_st_find(want, t->name);
        if (w == NULL) {
            cr_assert_eq(t->kind, QS_TENSOR_RAW, "%s has no golden weights", t->name);
            continue;
        }
        float *x = malloc((size_t)w->count * sizeof *x);
        cr_assert_eq(qs_st_read_f32(want, w, 0, w->count, x), QS_OK, "%s", qs_error_text());
        float *got = decoded(&f, 0, i);
        cr_assert_eq(memcmp(x, got, (size_t)w->count * sizeof *x), 0, "%s", t->name);
        compared++;
        free(x);
        free(got);
    }
    cr_assert_geq(compared, 6);
    qs_st_close(want);
    close_result(&f);
}

/* ---- refusals ---- */

typedef struct {
    tiny_hf o;
    qs_status status;
    char named[64];
} refusal;

#define BNB .dtype = QS_BF16, .scheme = TINY_BNB_NESTED
#define NESTED "\"nested_blocksize\":256,\"nested_dtype\":\"float32\",\"nested_offset\":0.5}"

/* Pointers to constants are the same in the process of each parameterized test, as it is a copy of
 * this one. */
static const refusal refusals[] = {
    {{.drop = "model.layers.1.mlp.up_proj.weight"}, QS_ERR_INPUT_TENSOR, "layers.1.mlp.up_proj"},
    {{.drop = "model.norm.weight"}, QS_ERR_INPUT_TENSOR, "model.norm.weight"},
    {{.add = "model.layers.0.self_attn.q_norm.weight"}, QS_ERR_INPUT_TENSOR, "q_norm"},
    {{.add = "model.layers.0.self_attn.q_proj.bias"}, QS_ERR_INPUT_TENSOR, "q_proj.bias"},
    {{.poison = "model.layers.1.mlp.down_proj.weight"},
     QS_ERR_INPUT_VALUE,
     "layers.1.mlp.down_proj"},
    {{.config = ",\"vocab_size2\":3"}, QS_ERR_INPUT_UNKNOWN, "vocab_size2"},
    {{.untied = true, .drop = "lm_head.weight"}, QS_ERR_INPUT_TENSOR, "lm_head.weight"},
    {{BNB, .drop = "model.layers.1.mlp.up_proj.weight.absmax"},
     QS_ERR_INPUT_TENSOR,
     "up_proj.weight.absmax"},
    {{BNB, .drop = "model.layers.1.mlp.up_proj.weight.nested_quant_map"},
     QS_ERR_INPUT_TENSOR,
     "nested_quant_map"},
    {{BNB, .drop = "model.layers.1.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"},
     QS_ERR_INPUT_TENSOR,
     "up_proj"},
    {{BNB, .state = "{\"quant_type\":\"fp4\",\"blocksize\":64,\"dtype\":\"bfloat16\",\"shape\":[72,"
                    "72]," NESTED},
     QS_ERR_INPUT_UNKNOWN,
     "quant_type = fp4"},
    {{BNB, .state = "{\"quant_type\":\"nf4\",\"blocksize\":128,\"dtype\":\"bfloat16\",\"shape\":["
                    "72,72]," NESTED},
     QS_ERR_INPUT_UNKNOWN,
     "blocksize = 128"},
    {{BNB, .state = "{\"quant_type\":\"nf4\",\"blocksize\":64,\"dtype\":\"float64\",\"shape\":[72,"
                    "72]," NESTED},
     QS_ERR_INPUT_UNKNOWN,
     "dtype = float64"},
    {{BNB, .state = "{\"quant_type\":\"nf4\",\"blocksize\":64,\"dtype\":\"bfloat16\",\"shape\":[36,"
                    "144]," NESTED},
     QS_ERR_INPUT_TENSOR,
     "shape"},
    {{BNB, .state =
               "{\"quant_type\":\"nf4\",\"blocksize\":64,\"dtype\":\"bfloat16\",\"shape\":[72,72],"
               "\"nested_blocksize\":128,\"nested_dtype\":\"float32\",\"nested_offset\":0.5}"},
     QS_ERR_INPUT_UNKNOWN,
     "nested_blocksize = 128"},
    {{BNB,
      .state =
          "{\"quant_type\":\"nf4\",\"blocksize\":64,\"dtype\":\"bfloat16\",\"shape\":[72,72]}"},
     QS_ERR_INPUT_TENSOR,
     "absmax"},
    {{BNB, .state = "{\"quant_type\":\"nf4\",\"blocksize\":64,\"dtype\":\"bfloat16\",\"shape\":[72,"
                    "72],\"y\":1," NESTED},
     QS_ERR_INPUT_UNKNOWN,
     "y"},
    {{BNB, .state = "{"}, QS_ERR_INPUT_FORMAT, "q_proj"},
};

ParameterizedTestParameters(quantize, bad_checkpoints_are_refused_by_name_and_leave_nothing)
{
    static int number[sizeof refusals / sizeof *refusals];
    for (int i = 0; i < (int)(sizeof refusals / sizeof *refusals); i++) {
        number[i] = i;
    }
    return cr_make_param_array(int, number, sizeof refusals / sizeof *refusals);
}

ParameterizedTest(int *number, quantize, bad_checkpoints_are_refused_by_name_and_leave_nothing)
{
    const refusal *r = &refusals[*number];
    char text[512];
    tiny_hf_write(model, &r->o);
    run_context c = to_file(out_file("b.h5"), 1);
    cr_assert_eq(quantize_on(3, &c, text), r->status, "%d: %s", *number, text);
    cr_assert_not_null(strstr(text, r->named), "%d: %s", *number, text);
    cr_assert_eq(files_in_out(), 0);
}

/* A checkpoint with a head of its own, of which config.json says that there is none. */
static void write_tied_with_head(void)
{
    tiny_hf o = {.dtype = QS_BF16, .untied = true};
    char path[160];
    void *config = NULL;
    size_t bytes = 0;
    tiny_hf_write(model, &o);
    (void)snprintf(path, sizeof path, "%s/config.json", model);
    cr_assert_eq(qs_io_read_file(path, 1 << 20, &config, &bytes), QS_OK);
    char *tied = strstr(config, "\"tie_word_embeddings\":false");
    memcpy(tied, "\"tie_word_embeddings\":true ", 27);
    cr_assert_eq(qs_io_write_file(path, config, bytes), QS_OK);
    free(config);
}

/* Write the embedding over the head, but for the last `bytes_left` bytes. */
static void copy_embedding_to_head(int64_t bytes_left)
{
    char path[160];
    void *file = NULL;
    size_t bytes = 0;
    qs_st_dir *tensors = NULL;
    cr_assert_eq(qs_st_open(&tensors, model, "model"), QS_OK);
    const qs_st_tensor *from = qs_st_find(tensors, "model.embed_tokens.weight");
    const qs_st_tensor *to = qs_st_find(tensors, "lm_head.weight");
    cr_assert_eq(from->bytes, to->bytes);
    (void)snprintf(path, sizeof path, "%s/model.safetensors", model);
    cr_assert_eq(qs_io_read_file(path, 1 << 30, &file, &bytes), QS_OK);
    memcpy((char *)file + to->begin, (char *)file + from->begin, (size_t)(to->bytes - bytes_left));
    cr_assert_eq(qs_io_write_file(path, file, bytes), QS_OK);
    qs_st_close(tensors);
    free(file);
}

Test(quantize, head_that_is_the_tied_embedding_once_more_is_ignored)
{
    char text[512];
    write_tied_with_head();
    copy_embedding_to_head(0);
    run_context c = to_file(out_file("b.h5"), 1);
    cr_assert_eq(quantize_on(1, &c, text), QS_OK, "%s", text);
    opened f = open_result(out_file("b.h5"));
    cr_assert_eq(f.index->n_units, TINY_LAYERS + 4);
    cr_assert_eq(qs_base_head_unit(f.index, 0), qs_base_embed_unit(f.index, 0));
    close_result(&f);
}

/* transformers would compute with it: to leave it out in silence gives another model. */
Test(quantize, another_head_beside_a_tied_embedding_is_refused)
{
    char text[512];
    for (int part = 0; part < 2; part++) {
        write_tied_with_head();
        if (part == 1) {
            copy_embedding_to_head(TINY_VOCAB * TINY_HIDDEN); /* the first half is the embedding */
        }
        run_context c = to_file(out_file("b.h5"), 1);
        cr_assert_eq(quantize_on(2, &c, text), QS_ERR_INPUT_TENSOR, "%s", text);
        cr_assert_not_null(strstr(text, "lm_head.weight is not the embedding"), "%s", text);
        cr_assert_eq(files_in_out(), 0);
    }
}

Test(quantize, existing_output_is_left_alone)
{
    tiny_hf o = {.dtype = QS_BF16};
    char text[512];
    void *data = NULL;
    size_t bytes = 0;
    tiny_hf_write(model, &o);
    cr_assert_eq(qs_io_write_file(out_file("b.h5"), "mine", 4), QS_OK);
    run_context c = to_file(out_file("b.h5"), 1);
    cr_assert_eq(quantize_on(2, &c, text), QS_ERR_OUTPUT_TAKEN);
    cr_assert_eq(qs_io_read_file(out_file("b.h5"), 100, &data, &bytes), QS_OK);
    cr_assert(bytes == 4 && memcmp(data, "mine", 4) == 0);
    cr_assert_eq(files_in_out(), 1);
    free(data);
}

Test(quantize, leftovers_of_killed_runs_are_removed_and_others_are_not)
{
    tiny_hf o = {.dtype = QS_BF16};
    struct utimbuf old = {1000000000, 1000000000};
    char mine[64];
    (void)snprintf(mine, sizeof mine, "b.h5.tmp-%d", (int)getppid()); /* alive */
    const char *const names[] = {"b.h5.tmp-999999999", "b.h5.tmp-999999998", "c.h5.tmp-999999999",
                                 "b.h5.tmp-",          "b.h5.tmp-9x",        mine};
    tiny_hf_write(model, &o);
    for (int i = 0; i < 6; i++) {
        cr_assert_eq(qs_io_write_file(out_file(names[i]), "x", 1), QS_OK);
        if (i != 1) { /* the second is young: its writer may be on another host */
            cr_assert_eq(utime(out_file(names[i]), &old), 0);
        }
    }
    quantize(out_file("b.h5"));
    cr_assert_neq(access(out_file(names[0]), F_OK), 0);
    for (int i = 1; i < 6; i++) {
        cr_assert_eq(access(out_file(names[i]), F_OK), 0, "%s", names[i]);
    }
}

/* ---- faults: the n-th I/O call on the output fails ---- */

static const char *fault_library(void)
{
    static char path[512];
    const char *build = getenv("QSHARD_BINARY_DIR");
    (void)snprintf(path, sizeof path, "%s/tests/libiofault.so", build != NULL ? build : ".");
    return path;
}

/* One run with FAULT=io:`fault`. The library comes before the sanitizer's, if there is one. */
static void run_with_fault(mpirun_result *r, const char *fault)
{
    const char *asan = getenv("ASAN_OPTIONS");
    shell(r, 60,
          "env ASAN_OPTIONS=%s:verify_asan_link_order=0 FAULT=io:%s FAULT_PATH=b.h5 LD_PRELOAD=%s "
          "%s %s %s 1",
          asan != NULL ? asan : "", fault, fault_library(), case_path("quantize"), model,
          out_file("b.h5"));
}

static int fault_calls(void)
{
    mpirun_result r;
    int calls = 0;
    run_with_fault(&r, "count");
    const char *at = strstr(r.output, "iofault: calls ");
    cr_assert_eq(r.code, 0, "%s", r.output);
    cr_assert(at != NULL && sscanf(at, "iofault: calls %d", &calls) == 1, "%s", r.output);
    cr_assert_eq(unlink(out_file("b.h5")), 0);
    return calls;
}

static void expect_all_or_nothing(int n, const char *kind, const mpirun_result *r)
{
    bool there = access(out_file("b.h5"), F_OK) == 0;
    bool killed = strncmp(kind, "kill", 4) == 0;
    cr_assert_leq(files_in_out(), 1, "call %d %s", n, kind);
    if (there) {
        cr_assert_eq(qs_base_verify(out_file("b.h5")), QS_OK, "call %d %s", n, kind);
        cr_assert_eq(unlink(out_file("b.h5")), 0);
    } else {
        cr_assert_neq(r->code, 0, "call %d %s: success without a file: %s", n, kind, r->output);
    }
    if (!killed) {
        cr_assert(r->code == 0 || r->code == 4, "call %d %s: exit %d: %s", n, kind, r->code,
                  r->output);
        cr_assert_eq(files_in_out(), 0, "call %d %s leaves a file: %s", n, kind, r->output);
    }
    shell((mpirun_result *)(uintptr_t)r, 10, "sh -c 'rm -f %s/*'", out_dir);
}

/* What a shell says of a process that a signal ended: 128 + its number. */
ParameterizedTestParameters(quantize, a_signal_at_any_call_leaves_a_whole_file_or_none)
{
    static char kind[][12] = {"intbefore", "termbefore"};
    return cr_make_param_array(char[12], kind, sizeof kind / sizeof *kind);
}

ParameterizedTest(char *kind, quantize, a_signal_at_any_call_leaves_a_whole_file_or_none,
                  .timeout = 300)
{
    tiny_hf o = {.dtype = QS_BF16};
    mpirun_result r;
    char fault[32];
    const int code = 128 + (strcmp(kind, "intbefore") == 0 ? SIGINT : SIGTERM);
    if (access(fault_library(), R_OK) != 0) {
        cr_skip_test("no %s", fault_library());
    }
    tiny_hf_write(model, &o);
    int calls = fault_calls();
    for (int n = 1; n <= calls; n += n < 8 || n > calls - 6 ? 1 : 13) {
        (void)snprintf(fault, sizeof fault, "%d:%s", n, kind);
        run_with_fault(&r, fault);
        cr_assert_eq(r.code, code, "call %d: exit %d: %s", n, r.code, r.output);
        const bool there = access(out_file("b.h5"), F_OK) == 0;
        cr_assert_eq(files_in_out(), there, "call %d leaves a file: %s", n, r.output);
        if (there) {
            cr_assert_eq(qs_base_verify(out_file("b.h5")), QS_OK, "call %d", n);
            cr_assert_eq(unlink(out_file("b.h5")), 0);
        }
    }
}

/* mpirun ends the others, and rank 0 has the file. */
Test(quantize, a_signal_to_another_rank_leaves_nothing, .timeout = 120)
{
    tiny_hf o = {.dtype = QS_BF16};
    mpirun_result r;
    const char *asan = getenv("ASAN_OPTIONS");
    if (access(fault_library(), R_OK) != 0 || system("command -v mpirun > /dev/null") != 0) {
        cr_skip_test("no mpirun or no %s", fault_library());
    }
    tiny_hf_write(model, &o);
    shell(&r, 60,
          "env ASAN_OPTIONS=%s:verify_asan_link_order=0 FAULT=io:2:termbefore FAULT_RANK=1 "
          "FAULT_PATH=b.h5 mpirun -np 2 -x LD_PRELOAD=%s %s %s %s 1",
          asan != NULL ? asan : "", fault_library(), case_path("quantize"), model,
          out_file("b.h5"));
    cr_assert_not_null(strstr(r.output, "iofault: call 2"), "%s", r.output);
    cr_assert_eq(r.code, 128 + SIGTERM, "exit %d: %s", r.code, r.output);
    cr_assert_eq(files_in_out(), 0, "%s", r.output);
}

ParameterizedTestParameters(quantize, a_fault_in_any_call_leaves_a_whole_file_or_none)
{
    static char kind[][12] = {"ENOSPC", "EIO", "late", "killbefore"};
    return cr_make_param_array(char[12], kind, sizeof kind / sizeof *kind);
}

ParameterizedTest(char *kind, quantize, a_fault_in_any_call_leaves_a_whole_file_or_none,
                  .timeout = 300)
{
    tiny_hf o = {.dtype = QS_BF16};
    mpirun_result r;
    char fault[32];
    if (access(fault_library(), R_OK) != 0) {
        cr_skip_test("no %s", fault_library());
    }
    tiny_hf_write(model, &o);
    int calls = fault_calls();
    cr_assert_gt(calls, 40);
    for (int n = 1; n <= calls; n += n < 8 || n > calls - 12 ? 1 : 13) {
        (void)snprintf(fault, sizeof fault, "%d:%s", n, kind);
        run_with_fault(&r, fault);
        expect_all_or_nothing(n, kind, &r);
    }
}
