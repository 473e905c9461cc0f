/* The header of a safetensors file, as a pure function, and the writer.
 *
 *   | u64 N | N bytes of JSON, padded with spaces | tensor data, no holes |
 *
 * The header is checked in this order: shape of the JSON, each entry alone, then the regions
 * together. Nothing is read from the data here, so that a hostile file costs at most its own header
 * in memory. */
#include "hf/safetensors.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "hf/safetensors_impl.h"
#include "store/io.h"
#include "store/json.h"

enum { MAX_NAME = 1024, MAX_TENSORS = 1000000, MAX_RANK = 8 };

static const struct {
    const char *name;
    qs_st_dtype dtype;
    int bytes;
} dtypes[] = {
    {"BOOL", QS_ST_BOOL, 1}, {"U8", QS_ST_U8, 1},      {"I8", QS_ST_I8, 1},
    {"I16", QS_ST_I16, 2},   {"U16", QS_ST_U16, 2},    {"F16", QS_ST_F16, 2},
    {"BF16", QS_ST_BF16, 2}, {"I32", QS_ST_I32, 4},    {"U32", QS_ST_U32, 4},
    {"F32", QS_ST_F32, 4},   {"F64", QS_ST_F64, 8},    {"I64", QS_ST_I64, 8},
    {"U64", QS_ST_U64, 8},   {"F8_E4M3", QS_ST_F8, 1}, {"F8_E5M2", QS_ST_F8, 1},
};
enum { N_DTYPES = sizeof dtypes / sizeof *dtypes };

const char *qs_st_dtype_name(qs_st_dtype dtype)
{
    for (int i = 0; i < N_DTYPES; i++) {
        if (dtypes[i].dtype == dtype) {
            return dtype == QS_ST_F8 ? "F8" : dtypes[i].name;
        }
    }
    return "?";
}

int qs_st_to_dtype(qs_st_dtype dtype, qs_dtype *out)
{
    switch (dtype) {
    case QS_ST_F32:
        *out = QS_F32;
        return 0;
    case QS_ST_BF16:
        *out = QS_BF16;
        return 0;
    case QS_ST_F16:
        *out = QS_F16;
        return 0;
    default:
        return -1;
    }
}

static qs_status entry_failed(const char *path, const char *name, const char *field,
                              const char *what)
{
    return QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: tensor \"%.200s\": %s %s", path, name, field, what);
}

static qs_status parse_dtype(qs_st_tensor *t, int *elem_bytes, const json_t *entry,
                             const char *path)
{
    const json_t *value = json_object_get(entry, "dtype");
    if (!json_is_string(value)) {
        return entry_failed(path, t->name, "dtype", "is missing or not a string");
    }
    for (int i = 0; i < N_DTYPES; i++) {
        if (strcmp(dtypes[i].name, json_string_value(value)) == 0) {
            t->dtype = dtypes[i].dtype;
            *elem_bytes = dtypes[i].bytes;
            return QS_OK;
        }
    }
    return QS_FAIL(QS_ERR_INPUT_UNKNOWN, "%s: tensor \"%.200s\": dtype \"%.40s\" is not known",
                   path, t->name, json_string_value(value));
}

static qs_status parse_shape(qs_st_tensor *t, const json_t *entry, const char *path)
{
    const json_t *shape = json_object_get(entry, "shape");
    if (!json_is_array(shape)) {
        return entry_failed(path, t->name, "shape", "is missing or not an array");
    }
    if (json_array_size(shape) > MAX_RANK) {
        return entry_failed(path, t->name, "shape", "has more than 8 dimensions");
    }
    t->rank = (int)json_array_size(shape);
    t->count = 1;
    for (int i = 0; i < t->rank; i++) {
        const json_t *dim = json_array_get(shape, (size_t)i);
        if (!json_is_integer(dim) || json_integer_value(dim) < 0) {
            return entry_failed(path, t->name, "shape", "has a dimension that is not 0 or more");
        }
        t->shape[i] = json_integer_value(dim);
        if (__builtin_mul_overflow(t->count, t->shape[i], &t->count)) {
            return entry_failed(path, t->name, "shape", "has a product past 2^63");
        }
    }
    return QS_OK;
}

/* Offsets are kept relative to the data here; qs_st_parse_header moves them once the regions are
 * known to be good. */
static qs_status parse_offsets(qs_st_tensor *t, int elem_bytes, int64_t data_bytes,
                               const json_t *entry, const char *path)
{
    const json_t *offsets = json_object_get(entry, "data_offsets");
    const json_t *first = json_array_get(offsets, 0);
    const json_t *last = json_array_get(offsets, 1);
    if (json_array_size(offsets) != 2 || !json_is_integer(first) || !json_is_integer(last)) {
        return entry_failed(path, t->name, "data_offsets", "is missing or not two integers");
    }
    int64_t begin = json_integer_value(first);
    int64_t end = json_integer_value(last);
    if (begin < 0 || end < begin || end > data_bytes) {
        return QS_FAIL(QS_ERR_INPUT_FORMAT,
                       "%s: tensor \"%.200s\": data_offsets [%lld, %lld] are outside the %lld "
                       "bytes of data; is the file cut off?",
                       path, t->name, (long long)begin, (long long)end, (long long)data_bytes);
    }
    int64_t expected;
    if (__builtin_mul_overflow(t->count, (int64_t)elem_bytes, &expected) ||
        expected != end - begin) {
        return QS_FAIL(QS_ERR_INPUT_FORMAT,
                       "%s: tensor \"%.200s\": data_offsets [%lld, %lld] do not hold %lld elements "
                       "of %d bytes",
                       path, t->name, (long long)begin, (long long)end, (long long)t->count,
                       elem_bytes);
    }
    t->begin = begin;
    t->bytes = end - begin;
    return QS_OK;
}

static qs_status parse_entry(qs_st_tensor *t, const char *name, const json_t *entry,
                             int64_t data_bytes, const char *path)
{
    int elem_bytes = 0;
    size_t length = strlen(name);
    if (length == 0 || length > MAX_NAME) {
        return QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: a tensor's name has %zu bytes; 1 ... %d are read",
                       path, length, MAX_NAME);
    }
    t->name = strdup(name);
    if (t->name == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory for the names of its tensors", path);
    }
    if (!json_is_object(entry)) {
        return entry_failed(path, name, "entry", "is not an object");
    }
    if (json_object_size(entry) != 3) {
        return entry_failed(path, name, "entry",
                            "must have dtype, shape, data_offsets and no more");
    }
    QS_TRY(parse_dtype(t, &elem_bytes, entry, path));
    QS_TRY(parse_shape(t, entry, path));
    return parse_offsets(t, elem_bytes, data_bytes, entry, path);
}

static qs_status check_metadata(const json_t *metadata, const char *path)
{
    const char *key;
    json_t *value;
    if (!json_is_object(metadata)) {
        return QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: __metadata__ is not an object", path);
    }
    json_object_foreach((json_t *)(uintptr_t)metadata, key, value)
    {
        if (!json_is_string(value)) {
            return QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: __metadata__ \"%.200s\" is not a string", path,
                           key);
        }
    }
    return QS_OK;
}

static int by_region(const void *a, const void *b)
{
    const qs_st_tensor *x = a;
    const qs_st_tensor *y = b;
    if (x->begin != y->begin) {
        return x->begin < y->begin ? -1 : 1;
    }
    return (x->bytes > y->bytes) - (x->bytes < y->bytes);
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const qs_st_tensor *)a)->name, ((const qs_st_tensor *)b)->name);
}

/* Sorted by place, each region must begin where the one before ends, and the last must end with the
 * file. */
static qs_status check_regions(qs_st_header *header, int64_t data_bytes, const char *path)
{
    int64_t cursor = 0;
    if (header->n_tensors > 0) {
        qsort(header->tensors, (size_t)header->n_tensors, sizeof *header->tensors, by_region);
    }
    for (int64_t i = 0; i < header->n_tensors; i++) {
        const qs_st_tensor *t = &header->tensors[i];
        if (t->begin != cursor) {
            return QS_FAIL(QS_ERR_INPUT_FORMAT,
                           "%s: tensor \"%.200s\": data_offsets begin at %lld, but the region "
                           "before ends at %lld: %s",
                           path, t->name, (long long)t->begin, (long long)cursor,
                           t->begin < cursor ? "they overlap" : "a hole");
        }
        cursor += t->bytes;
    }
    if (cursor != data_bytes) {
        return QS_FAIL(QS_ERR_INPUT_FORMAT,
                       "%s: the tensors end at byte %lld of the data, the file at %lld", path,
                       (long long)cursor, (long long)data_bytes);
    }
    return QS_OK;
}

static qs_status check_text(const char *text, size_t bytes, int64_t file_bytes, const char *path)
{
    size_t end = bytes;
    if (bytes > QS_ST_MAX_HEADER || file_bytes < 8 || bytes > (uint64_t)(file_bytes - 8)) {
        return QS_FAIL(QS_ERR_INPUT_FORMAT,
                       "%s: header of %zu bytes in a file of %lld; at most %d and the file's size "
                       "are read",
                       path, bytes, (long long)file_bytes, QS_ST_MAX_HEADER);
    }
    while (end > 0 && text[end - 1] == ' ') {
        end--;
    }
    if (end < 2 || text[0] != '{' || text[end - 1] != '}') {
        return QS_FAIL(QS_ERR_INPUT_FORMAT,
                       "%s: the header is not a JSON object padded with spaces; not safetensors?",
                       path);
    }
    return QS_OK;
}

static qs_status parse_entries(qs_st_header *out, const json_t *root, int64_t data_bytes,
                               const char *path)
{
    const char *name;
    json_t *entry;
    size_t entries = json_object_size(root);
    if (entries > MAX_TENSORS) {
        return QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: %zu tensors; at most %d are read", path, entries,
                       MAX_TENSORS);
    }
    out->tensors = calloc(entries + 1, sizeof *out->tensors);
    if (out->tensors == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory for %zu table entries", path, entries);
    }
    json_object_foreach((json_t *)(uintptr_t)root, name, entry)
    {
        if (strcmp(name, "__metadata__") == 0) {
            QS_TRY(check_metadata(entry, path));
        } else {
            qs_st_tensor *t = &out->tensors[out->n_tensors++];
            QS_TRY(parse_entry(t, name, entry, data_bytes, path));
        }
    }
    return QS_OK;
}

qs_status qs_st_parse_header(qs_st_header *out, const char *text, size_t bytes, int64_t file_bytes,
                             const char *path)
{
    qs_status st = QS_OK;
    json_t *root = NULL;
    qs_st_header header = {0};
    QS_GOTO(check_text(text, bytes, file_bytes, path));
    QS_GOTO(qs_json_parse(&root, text, bytes, path));
    int64_t data_begin = 8 + (int64_t)bytes;
    QS_GOTO(parse_entries(&header, root, file_bytes - data_begin, path));
    QS_GOTO(check_regions(&header, file_bytes - data_begin, path));
    for (int64_t i = 0; i < header.n_tensors; i++) {
        header.tensors[i].begin += data_begin;
    }
    if (header.n_tensors > 0) {
        qsort(header.tensors, (size_t)header.n_tensors, sizeof *header.tensors, by_name);
    }
    *out = header;
    header = (qs_st_header){0};
done:
    qs_st_header_free(&header);
    json_decref(root);
    return st;
}

void qs_st_header_free(qs_st_header *header)
{
    for (int64_t i = 0; i < header->n_tensors; i++) {
        free(header->tensors[i].name);
    }
    free(header->tensors);
    *header = (qs_st_header){0};
}

/* ---- writer ---- */

static qs_st_dtype to_st(qs_dtype dtype)
{
    static const qs_st_dtype table[] = {
        [QS_F32] = QS_ST_F32, [QS_BF16] = QS_ST_BF16, [QS_F16] = QS_ST_F16,
        [QS_U8] = QS_ST_U8,   [QS_I32] = QS_ST_I32,   [QS_I64] = QS_ST_I64,
    };
    return table[dtype];
}

/* The reference writer's order: widest dtype first (our enumeration ascends as its does), then by
 * name. */
static int by_dtype_then_name(const void *a, const void *b)
{
    const qs_st_item *x = *(const qs_st_item *const *)a;
    const qs_st_item *y = *(const qs_st_item *const *)b;
    int order = (int)to_st(y->dtype) - (int)to_st(x->dtype);
    return order != 0 ? order : strcmp(x->name, y->name);
}

size_t qs_st_item_bytes(const qs_st_item *item)
{
    size_t bytes = qs_dtype_bytes(item->dtype);
    for (int i = 0; i < item->rank; i++) {
        bytes *= (size_t)item->shape[i];
    }
    return bytes;
}

/* One entry: {"dtype":"F32","shape":[..],"data_offsets":[b,e]}; NULL without memory. */
static json_t *entry_of(const qs_st_item *item, size_t begin, size_t end)
{
    json_t *shape = json_array();
    for (int i = 0; i < item->rank; i++) {
        json_array_append_new(shape, json_integer(item->shape[i]));
    }
    return json_pack("{s:s, s:o, s:[I, I]}", "dtype", qs_st_dtype_name(to_st(item->dtype)), "shape",
                     shape, "data_offsets", (json_int_t)begin, (json_int_t)end);
}

/* Text of the header, padded to 8; the caller frees it. NULL without memory. */
static char *header_text(const qs_st_item *const *sorted, int64_t count, const char *mark,
                         size_t *bytes)
{
    char *padded = NULL;
    size_t at = 0;
    json_t *root = json_pack("{s:{s:s}}", "__metadata__", "format", "pt");
    if (mark != NULL) {
        json_object_set_new(json_object_get(root, "__metadata__"), "qshard", json_string(mark));
    }
    for (int64_t i = 0; i < count; i++) {
        size_t end = at + qs_st_item_bytes(sorted[i]);
        json_object_set_new(root, sorted[i]->name, entry_of(sorted[i], at, end));
        at = end;
    }
    char *text = json_dumps(root, JSON_COMPACT);
    json_decref(root);
    if (text != NULL) {
        size_t length = strlen(text);
        *bytes = (length + 7) / 8 * 8;
        padded = malloc(*bytes);
        if (padded != NULL) {
            memset(padded, ' ', *bytes);
            memcpy(padded, text, length);
        }
    }
    free(text);
    return padded;
}

qs_status qs_st_arrange(qs_st_arranged *out, const char *path, const qs_st_item *items,
                        int64_t count, const char *mark)
{
    *out = (qs_st_arranged){.sorted = calloc((size_t)count + 1, sizeof *out->sorted)};
    if (out->sorted == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory for %lld entries", path, (long long)count);
    }
    out->file_bytes = 8;
    for (int64_t i = 0; i < count; i++) {
        out->sorted[i] = &items[i];
        out->file_bytes += qs_st_item_bytes(&items[i]);
    }
    qsort(out->sorted, (size_t)count, sizeof *out->sorted, by_dtype_then_name);
    out->header = header_text(out->sorted, count, mark, &out->header_bytes);
    out->file_bytes += out->header_bytes;
    return out->header != NULL ? QS_OK
                               : QS_FAIL(QS_ERR_MEMORY, "%s: no memory for its header", path);
}

void qs_st_arranged_free(qs_st_arranged *arranged)
{
    free(arranged->header);
    free(arranged->sorted);
    *arranged = (qs_st_arranged){0};
}

void qs_st_put_header(const qs_st_arranged *arranged, uint8_t *out)
{
    for (int i = 0; i < 8; i++) {
        out[i] = (uint8_t)((uint64_t)arranged->header_bytes >> 8 * i);
    }
    memcpy(out + 8, arranged->header, arranged->header_bytes);
}

qs_status qs_st_write(const char *path, const qs_st_item *items, int64_t count, const char *mark)
{
    qs_status st = QS_OK;
    uint8_t *image = NULL;
    qs_st_arranged arranged = {0};
    QS_GOTO(qs_st_arrange(&arranged, path, items, count, mark));
    image = malloc(arranged.file_bytes);
    if (image == NULL) {
        QS_GOTO(QS_FAIL(QS_ERR_MEMORY, "%s: no memory for an image of %zu bytes", path,
                        arranged.file_bytes));
    }
    qs_st_put_header(&arranged, image);
    uint8_t *at = image + 8 + arranged.header_bytes;
    for (int64_t i = 0; i < count; i++) {
        size_t bytes = qs_st_item_bytes(arranged.sorted[i]);
        if (bytes > 0) {
            memcpy(at, arranged.sorted[i]->data, bytes);
        }
        at += bytes;
    }
    QS_GOTO(qs_io_write_file(path, image, arranged.file_bytes));
done:
    free(image);
    qs_st_arranged_free(&arranged);
    return st;
}
