/* qshard quantize: the same file from any number of ranks and threads, what it takes from a model's
 * folder, and bitsandbytes' bytes taken over. (tests/test_quantize_fails.c has what goes wrong.) */
#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/mem.h"
#include "hf/safetensors.h"
#include "mpirun.h"
#include "quantize_fixture.h"
#include "store/io.h"
#include "support/tiny_hf.h"
#include "weights/base_impl.h"

TestSuite(quantize, .init = qf_make_dirs, .fini = qf_remove_dirs);

Test(quantize, file_is_the_same_for_any_ranks_and_threads)
{
    tiny_hf o = {.dtype = QS_BF16, .untied = true, .biases = true, .zero_rows = true};
    char first[QS_SHA256_HEX], other[QS_SHA256_HEX], text[512], name[16];
    tiny_hf_write(qf_model, &o);
    for (int nranks = 1; nranks <= 4; nranks++) {
        for (int threads = 1; threads <= 3; threads += 2) {
            (void)snprintf(name, sizeof name, "%d-%d.h5", nranks, threads);
            qf_run c = qf_to_file(qf_file(name), threads);
            cr_assert_eq(qf_quantize_on(nranks, &c, text), QS_OK, "%s", text);
            cr_assert_eq(c.report[nranks - 1].linears, 14);
            cr_assert_eq(c.report[nranks - 1].zero_blocks, (TINY_FFN * TINY_HIDDEN + 63) / 64);
            qf_sha256(c.options.output, nranks == 1 && threads == 1 ? first : other);
            cr_assert(nranks * threads == 1 || strcmp(first, other) == 0, "%s differs", name);
        }
    }
    cr_assert_eq(qf_files(), 8, "no temporary file is left");
}

/* ---- generation_config.json ---- */

static void put_generation(const char *text)
{
    char path[160];
    (void)snprintf(path, sizeof path, "%s/generation_config.json", qf_model);
    (void)unlink(path);
    cr_assert(text == NULL || qs_io_write_new(path, text, strlen(text)) == QS_OK);
}

/* The ids that base.h5 has. */
static void ids_of_base(char ids[128])
{
    qs_base_index *index = qf_index();
    ids[0] = '\0';
    for (int i = 0; i < index->n_eos; i++) {
        (void)snprintf(ids + strlen(ids), 128 - strlen(ids), " %d", index->eos[i]);
    }
    qs_base_index_free(index);
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
    tiny_hf_write(qf_model, &o);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        put_generation(rows[i].text);
        ids_of_base(ids);
        qf_quantize(qf_file("base.h5"));
        qf_sha256(qf_file("base.h5"), i == 0 ? none : sha256);
        cr_assert_eq(unlink(qf_file("base.h5")), 0);
        cr_assert_str_eq(ids, rows[i].ids, "%s", rows[i].text);
        cr_assert(i == 0 || (strcmp(none, sha256) == 0) == (rows[i].ids[0] == '\0'), "%s",
                  rows[i].text);
    }
}

/* ---- tokenizer.json ---- */

static void assert_tokenizer(const char *sha256)
{
    qs_base_index *index = qf_index();
    cr_assert_str_eq(index->tokenizer_sha256, sha256);
    qs_base_index_free(index);
}

/* A folder of that name costs the hash alone. */
Test(quantize, hash_of_the_tokenizer_is_kept)
{
    tiny_hf o = {.dtype = QS_BF16};
    char sha256[QS_SHA256_HEX], path[160];
    tiny_hf_write(qf_model, &o);
    (void)snprintf(path, sizeof path, "%s/tokenizer.json", qf_model);
    (void)unlink(path);
    assert_tokenizer("");
    cr_assert_eq(qs_io_write_new(path, "{}", 2), QS_OK);
    qs_sha256_hex("{}", 2, sha256);
    assert_tokenizer(sha256);
    cr_assert_eq(unlink(path), 0);
    cr_assert_eq(mkdir(path, 0700), 0);
    assert_tokenizer("");
    cr_assert_eq(rmdir(path), 0);
}

Test(quantize, file_is_the_same_under_mpirun, .timeout = 120)
{
    tiny_hf o = {.dtype = QS_F16};
    char first[QS_SHA256_HEX], other[QS_SHA256_HEX];
    mpirun_result r;
    tiny_hf_write(qf_model, &o);
    qf_quantize(qf_file("self.h5"));
    qf_sha256(qf_file("self.h5"), first);
    for (int n = 1; n <= 3; n++) {
        shell(&r, 60, "mpirun -np %d %s %s %s/mpi%d.h5 2", n, case_path("quantize"), qf_model,
              qf_out, n);
        cr_assert_eq(r.code, 0, "np %d: %s", n, r.output);
        char name[16];
        (void)snprintf(name, sizeof name, "mpi%d.h5", n);
        qf_sha256(qf_file(name), other);
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
    cr_assert_eq(qs_st_open(&f.hf, qf_model, "model"), QS_OK, "%s", qs_error_text());
    return f;
}

static void close_result(opened *f)
{
    qs_base_index_free(f->index);
    qs_st_close(f->hf);
    close(f->fd);
}

/* ---- pages ---- */

enum { PAGE = 4096 };

/* One more dataset, number `id` from 1 on, which must be alone in its pages: [n_pages] whose each
 * is, 0 for HDF5's. What lies in them beside it must be zero. */
static void take_pages(int *pages, const uint8_t *file, int64_t at, int64_t bytes, int id,
                       const char *name)
{
    for (int64_t page = at / PAGE; page * PAGE < at + bytes; page++) {
        cr_assert_eq(pages[page], 0, "page %lld has bytes of dataset %d, too: %d, %s",
                     (long long)page, pages[page], id, name);
        pages[page] = id;
        for (int64_t i = page * PAGE; i < (page + 1) * PAGE; i++) {
            cr_assert((i >= at && i < at + bytes) || file[i] == 0,
                      "page %lld has other bytes than those of %s", (long long)page, name);
        }
    }
}

ParameterizedTestParameters(quantize, no_page_has_bytes_of_two_datasets)
{
    static tiny_hf models[] = {{.dtype = QS_BF16},
                               {.dtype = QS_F32, .untied = true, .biases = true},
                               {.dtype = QS_BF16, .scheme = TINY_BNB_PLAIN, .leave_raw = 2}};
    return cr_make_param_array(tiny_hf, models, sizeof models / sizeof *models);
}

/* Whole pages are what clients of network file systems write back, each of its own host's. */
ParameterizedTest(tiny_hf *o, quantize, no_page_has_bytes_of_two_datasets)
{
    char text[512];
    void *file = NULL;
    size_t bytes = 0;
    int id = 0;
    tiny_hf_write(qf_model, o);
    qf_run c = qf_to_file(qf_file("b.h5"), 1);
    cr_assert_eq(qf_quantize_on(3, &c, text), QS_OK, "%s", text);
    opened f = open_result(c.options.output);
    cr_assert_eq(qs_io_read_file(c.options.output, 1 << 28, &file, &bytes), QS_OK);
    file = realloc(file, bytes + PAGE);
    memset((uint8_t *)file + bytes, 0, PAGE); /* the last page's rest */
    int *pages = calloc(bytes / PAGE + 1, sizeof *pages);
    for (int u = 0; u <= f.index->n_units; u++) {
        qs_base_dataset all[QS_BASE_DATASETS];
        qs_base_unit *unit = u < f.index->n_units ? &f.index->units[u] : &f.index->final;
        qs_base_unit_datasets(unit, all);
        for (int i = 0; i < QS_BASE_DATASETS; i++) {
            const qs_h5_info *d = &all[i].info;
            const int64_t size =
                d->dims[0] * (d->rank == 2 ? d->dims[1] : 1) * (int64_t)qs_dtype_bytes(d->dtype);
            if (size > 0) {
                cr_assert_eq(*all[i].place % PAGE, 0);
                take_pages(pages, file, *all[i].place, size, ++id, all[i].suffix);
            }
        }
    }
    cr_assert_geq(id, 18);
    free(pages);
    free(file);
    close_result(&f);
}

/* ---- weights ---- */

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
    tiny_hf_write(qf_model, &o);
    qf_run c = qf_to_file(qf_file("b.h5"), 2);
    c.options.double_quant = s->nested;
    cr_assert_eq(qf_quantize_on(2, &c, text), QS_OK, "%s", text);
    opened f = open_result(qf_file("b.h5"));
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
    tiny_hf_write(qf_model, &c->o);
    qf_run run = qf_to_file(qf_file("b.h5"), 2);
    run.options.double_quant = !nested; /* an import keeps what the checkpoint has */
    cr_assert_eq(qf_quantize_on(2, &run, text), QS_OK, "%s", text);
    const int linears = tiny_hf_linears(&c->o);
    cr_assert_eq(run.report[0].linears, TINY_LAYERS * linears - (c->o.leave_raw != 0));
    opened f = open_result(qf_file("b.h5"));
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
          golden, name, qf_model, qf_dir, golden, name, qf_dir);
    cr_assert_eq(r.code, 0, "%s", r.output);
    qf_quantize(qf_file("b.h5"));
    opened f = open_result(qf_file("b.h5"));
    qs_st_dir *want = NULL;
    (void)snprintf(path, sizeof path, "%s/want", qf_dir);
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
