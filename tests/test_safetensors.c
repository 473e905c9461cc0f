/* safetensors: what the writer writes the reader reads, and what strangers get wrong is refused by
 * name. */
#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "hf/safetensors.h"
#include "store/io.h"
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

static const char *in_dir(const char *name)
{
    static char path[160];
    (void)snprintf(path, sizeof path, "%s/%s", dir, name);
    return path;
}

static void put(const char *name, const void *data, size_t bytes)
{
    cr_assert_eq(qs_io_write_file(in_dir(name), data, bytes), QS_OK, "%s", qs_error_text());
}

/* ---- the header ---- */

typedef struct {
    char text[300];
    int data; /* bytes behind the header */
    qs_status status;
    char named[40]; /* in the message */
} header_case;

#define T "\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":"

ParameterizedTestParameters(safetensors, bad_headers_are_refused)
{
    static header_case c[] = {
        {"", 0, QS_ERR_INPUT_FORMAT, "JSON"},
        {"{", 0, QS_ERR_INPUT_FORMAT, "JSON"},
        {" {}", 0, QS_ERR_INPUT_FORMAT, "JSON"},
        {"{}\n", 0, QS_ERR_INPUT_FORMAT, "JSON"},
        {"[]", 0, QS_ERR_INPUT_FORMAT, "JSON"},
        {"{}", 1, QS_ERR_INPUT_FORMAT, "end at byte 0"},
        {"{\"a\":{" T "[0,8]}}", 9, QS_ERR_INPUT_FORMAT, "end at byte 8"},
        {"{\"a\":{" T "[0,8]}}", 7, QS_ERR_INPUT_FORMAT, "outside"},
        {"{\"a\":{" T "[0,7]}}", 7, QS_ERR_INPUT_FORMAT, "2 elements"},
        {"{\"a\":{" T "[8,0]}}", 8, QS_ERR_INPUT_FORMAT, "outside"},
        {"{\"a\":{" T "[-8,0]}}", 8, QS_ERR_INPUT_FORMAT, "outside"},
        {"{\"a\":{" T "[0,8.0]}}", 8, QS_ERR_INPUT_FORMAT, "two integers"},
        {"{\"a\":{" T "[0]}}", 8, QS_ERR_INPUT_FORMAT, "two integers"},
        {"{\"a\":{" T "[0,8,8]}}", 8, QS_ERR_INPUT_FORMAT, "two integers"},
        {"{\"a\":{" T "[0,18446744073709551616]}}", 8, QS_ERR_INPUT_FORMAT, "JSON"},
        {"{\"a\":{" T "[0,8]},\"b\":{" T "[7,15]}}", 15, QS_ERR_INPUT_FORMAT, "overlap"},
        {"{\"a\":{" T "[0,8]},\"b\":{" T "[0,8]}}", 8, QS_ERR_INPUT_FORMAT, "overlap"},
        {"{\"a\":{" T "[0,8]},\"b\":{" T "[9,17]}}", 17, QS_ERR_INPUT_FORMAT, "hole"},
        {"{\"a\":{" T "[4,12]}}", 12, QS_ERR_INPUT_FORMAT, "hole"},
        {"{\"a\":{" T "[0,8]},\"a\":{" T "[8,16]}}", 16, QS_ERR_INPUT_FORMAT, "uplicate"},
        {"{\"\":{" T "[0,8]}}", 8, QS_ERR_INPUT_FORMAT, "name"},
        {"{\"a\":7}", 8, QS_ERR_INPUT_FORMAT, "object"},
        {"{\"a\":{" T "[0,8],\"x\":1}}", 8, QS_ERR_INPUT_FORMAT, "no more"},
        {"{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,8]}}", 8, QS_ERR_INPUT_FORMAT, "no more"},
        {"{\"a\":{\"dtype\":\"F33\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8,
         QS_ERR_INPUT_UNKNOWN, "F33"},
        {"{\"a\":{\"dtype\":\"BOOM\",\"shape\":[8],\"data_offsets\":[0,8]}}", 8,
         QS_ERR_INPUT_UNKNOWN, "BOOM"},
        {"{\"a\":{\"dtype\":7,\"shape\":[2],\"data_offsets\":[0,8]}}", 8, QS_ERR_INPUT_FORMAT,
         "dtype"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[-2],\"data_offsets\":[0,8]}}", 8,
         QS_ERR_INPUT_FORMAT, "shape"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,2],\"data_offsets\":[0,8]}}", 8,
         QS_ERR_INPUT_FORMAT, "8 dimensions"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,0]}}", 0,
         QS_ERR_INPUT_FORMAT, "product"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4611686018427387904],\"data_offsets\":[0,0]}}", 0,
         QS_ERR_INPUT_FORMAT, "elements"}, /* times 4 wraps to 0 */
        {"{\"__metadata__\":{\"a\":1}}", 0, QS_ERR_INPUT_FORMAT, "__metadata__"},
        {"{\"__metadata__\":[]}", 0, QS_ERR_INPUT_FORMAT, "__metadata__"},
    };
    return cr_make_param_array(header_case, c, sizeof c / sizeof *c);
}

ParameterizedTest(header_case *c, safetensors, bad_headers_are_refused)
{
    qs_st_header h;
    size_t bytes = strlen(c->text);
    qs_status st =
        qs_st_parse_header(&h, c->text, bytes, 8 + (int64_t)bytes + c->data, "m.safetensors");
    cr_assert_eq(st, c->status, "%s: %s", c->text, qs_error_text());
    cr_assert_not_null(strstr(qs_error_text(), c->named), "%s: %s", c->text, qs_error_text());
    cr_assert_not_null(strstr(qs_error_text(), "m.safetensors"));
}

Test(safetensors, good_header_is_sorted_by_name_with_places_in_the_file)
{
    const char *text = "{\"__metadata__\":{\"format\":\"pt\"},"
                       "\"b\":{\"dtype\":\"BF16\",\"shape\":[2,3],\"data_offsets\":[0,12]},"
                       "\"z\":{\"dtype\":\"U8\",\"shape\":[0,5],\"data_offsets\":[12,12]},"
                       "\"a\":{\"dtype\":\"I64\",\"shape\":[],\"data_offsets\":[12,20]}}   ";
    qs_st_header h;
    int64_t n = (int64_t)strlen(text);
    cr_assert_eq(qs_st_parse_header(&h, text, (size_t)n, 8 + n + 20, "m"), QS_OK, "%s",
                 qs_error_text());
    cr_assert_eq(h.n_tensors, 3);
    cr_assert_str_eq(h.tensors[0].name, "a");
    cr_assert_eq(h.tensors[0].count, 1);
    cr_assert_eq(h.tensors[0].begin, 8 + n + 12);
    cr_assert_eq(h.tensors[1].begin, 8 + n);
    cr_assert_eq(h.tensors[1].rank, 2);
    cr_assert_eq(h.tensors[2].bytes, 0);
    qs_st_header_free(&h);
}

Test(safetensors, header_longer_than_the_file_is_refused)
{
    qs_st_header h;
    cr_assert_eq(qs_st_parse_header(&h, "{}", 2, 9, "m"), QS_ERR_INPUT_FORMAT);
}

Test(safetensors, long_names_are_refused)
{
    char text[1200] = "{\"";
    memset(text + 2, 'x', 1025);
    strcpy(text + 2 + 1025, "\":{" T "[0,8]}}");
    qs_st_header h;
    cr_assert_eq(qs_st_parse_header(&h, text, strlen(text), 8 + (int64_t)strlen(text) + 8, "m"),
                 QS_ERR_INPUT_FORMAT);
    cr_assert_not_null(strstr(qs_error_text(), "1024"));
}

/* ---- files ---- */

static void write_two(const char *name, const char *a, const char *b)
{
    static float f[4] = {1.0f, -2.5f, 3.25f, 65504.0f};
    static uint16_t h[3] = {0x3C00, 0xC000, 0x3555};
    qs_st_item items[2] = {{a, QS_F16, 1, {3}, h}, {b, QS_F32, 2, {2, 2}, f}};
    cr_assert_eq(qs_st_write(in_dir(name), items, 2, NULL), QS_OK, "%s", qs_error_text());
}

Test(safetensors, written_file_reads_back, .init = make_dir, .fini = remove_dir)
{
    qs_st_dir *d = NULL;
    float x[4];
    write_two("model.safetensors", "half", "full");
    cr_assert_eq(qs_st_open(&d, dir, "model"), QS_OK, "%s", qs_error_text());
    cr_assert_eq(qs_st_count(d), 2);
    const qs_st_tensor *full = qs_st_find(d, "full");
    const qs_st_tensor *half = qs_st_find(d, "half");
    cr_assert(full != NULL && half != NULL && qs_st_find(d, "other") == NULL);
    cr_assert_lt(full->begin, half->begin, "wide dtypes first");
    cr_assert_eq(full->begin % 8, 0, "header padded to 8");
    cr_assert_eq(qs_st_read_f32(d, full, 1, 2, x), QS_OK);
    cr_assert(x[0] == -2.5f && x[1] == 3.25f);
    cr_assert_eq(qs_st_read_f32(d, half, 0, 3, x), QS_OK);
    cr_assert(x[0] == 1.0f && x[1] == -2.0f && x[2] == 0.333251953125f);
    cr_assert_eq(qs_st_read(d, half, 4, 4, x), QS_ERR_BUG, "past the end of the tensor");
    qs_st_close(d);
}

Test(safetensors, cut_file_is_refused_at_every_length, .init = make_dir, .fini = remove_dir)
{
    void *whole = NULL;
    size_t bytes = 0;
    write_two("model.safetensors", "half", "full");
    cr_assert_eq(qs_io_read_file(in_dir("model.safetensors"), 1 << 20, &whole, &bytes), QS_OK);
    for (size_t n = 0; n < bytes; n++) {
        qs_st_dir *d = NULL;
        put("model.safetensors", whole, n);
        qs_error_clear();
        cr_assert_eq(qs_st_open(&d, dir, "model"), QS_ERR_INPUT_FORMAT, "%zu bytes", n);
    }
    free(whole);
}

Test(safetensors, absurd_length_words_are_refused, .init = make_dir, .fini = remove_dir)
{
    static const uint64_t words[] = {0, 1, 3, UINT64_MAX, 1ULL << 63, 100000001ULL, 9};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        qs_st_dir *d = NULL;
        uint8_t file[16] = {0};
        memcpy(file, &words[i], 8);
        memcpy(file + 8, "{}      ", 8);
        put("model.safetensors", file, sizeof file);
        qs_error_clear();
        cr_assert_eq(qs_st_open(&d, dir, "model"), QS_ERR_INPUT_FORMAT, "%llu",
                     (unsigned long long)words[i]);
    }
}

Test(safetensors, missing_weights_are_named, .init = make_dir, .fini = remove_dir)
{
    qs_st_dir *d = NULL;
    cr_assert_eq(qs_st_open(&d, dir, "model"), QS_ERR_INPUT_MISSING);
    cr_assert_not_null(strstr(qs_error_text(), "model.safetensors"));
}

/* ---- an index ---- */

static qs_status open_with_index(const char *index)
{
    qs_st_dir *d = NULL;
    write_two("one.safetensors", "a", "b");
    write_two("two.safetensors", "c", "d");
    put("model.safetensors.index.json", index, strlen(index));
    qs_error_clear();
    qs_status st = qs_st_open(&d, dir, "model");
    if (st == QS_OK) {
        cr_assert_eq(qs_st_count(d), 4);
        cr_assert_neq(qs_st_find(d, "a")->file, qs_st_find(d, "d")->file);
    }
    qs_st_close(d);
    return st;
}

#define REST "\"b\":\"one.safetensors\",\"c\":\"two.safetensors\",\"d\":\"two.safetensors\"}}"

typedef struct {
    char text[300];
    qs_status status;
    char named[40];
} index_case;

ParameterizedTestParameters(safetensors, index_is_checked_against_its_files)
{
    static index_case c[] = {
        {"{\"weight_map\":{\"a\":\"one.safetensors\"," REST, QS_OK, ""},
        {"{\"metadata\":{\"total_size\":1},\"weight_map\":{\"a\":\"one.safetensors\"," REST, QS_OK,
         ""},
        {"{\"weight_map\":{" REST, QS_ERR_INPUT_TENSOR, "\"a\" is not in the weight_map"},
        {"{\"weight_map\":{\"a\":\"two.safetensors\"," REST, QS_ERR_INPUT_TENSOR,
         "\"a\" is not in two"},
        {"{\"weight_map\":{\"x\":\"one.safetensors\",\"a\":\"one.safetensors\"," REST,
         QS_ERR_INPUT_TENSOR, "\"x\""},
        {"{\"weight_map\":{\"a\":\"three.safetensors\"," REST, QS_ERR_INPUT_MISSING, "three"},
        {"{\"weight_map\":{\"a\":\"../one.safetensors\"," REST, QS_ERR_INPUT_FORMAT, "bare name"},
        {"{\"weight_map\":{\"a\":\"/etc/passwd\"," REST, QS_ERR_INPUT_FORMAT, "bare name"},
        {"{\"weight_map\":{\"a\":\"x\\\\y\"," REST, QS_ERR_INPUT_FORMAT, "bare name"},
        {"{\"weight_map\":{\"a\":\"..\"," REST, QS_ERR_INPUT_FORMAT, "bare name"},
        {"{\"weight_map\":{\"a\":\"\"," REST, QS_ERR_INPUT_FORMAT, "bare name"},
        {"{\"weight_map\":{\"a\":7," REST, QS_ERR_INPUT_FORMAT, "bare name"},
        {"{\"weight_map\":[]}", QS_ERR_INPUT_VALUE, "weight_map"},
        {"{}", QS_ERR_INPUT_VALUE, "weight_map"},
        {"[]", QS_ERR_INPUT_FORMAT, "object"},
    };
    return cr_make_param_array(index_case, c, sizeof c / sizeof *c);
}

ParameterizedTest(index_case *c, safetensors, index_is_checked_against_its_files, .init = make_dir,
                  .fini = remove_dir)
{
    cr_assert_eq(open_with_index(c->text), c->status, "%s: %s", c->text, qs_error_text());
    cr_assert_not_null(strstr(qs_error_text(), c->named), "%s: %s", c->text, qs_error_text());
}

Test(safetensors, tensor_in_two_files_is_refused, .init = make_dir, .fini = remove_dir)
{
    qs_st_dir *d = NULL;
    const char *index = "{\"weight_map\":{\"a\":\"one.safetensors\",\"b\":\"two.safetensors\"}}";
    write_two("one.safetensors", "a", "b");
    write_two("two.safetensors", "a", "b");
    put("model.safetensors.index.json", index, strlen(index));
    cr_assert_eq(qs_st_open(&d, dir, "model"), QS_ERR_INPUT_TENSOR);
    cr_assert_not_null(strstr(qs_error_text(), "also in"));
}

Test(safetensors, links_out_of_the_directory_are_followed, .init = make_dir, .fini = remove_dir)
{
    qs_st_dir *d = NULL;
    char sub[160];
    (void)snprintf(sub, sizeof sub, "%s/snapshot", dir);
    cr_assert_eq(qs_io_mkdir(sub), QS_OK);
    write_two("blob", "a", "b");
    cr_assert_eq(symlink("../blob", in_dir("snapshot/model.safetensors")), 0);
    cr_assert_eq(qs_st_open(&d, sub, "model"), QS_OK, "%s", qs_error_text());
    cr_assert_eq(qs_st_count(d), 2);
    qs_st_close(d);
}
