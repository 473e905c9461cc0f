/* The index of base.h5 as JSON: written from the table of units, and parsed by making the table
 * that its config implies and comparing entry by entry, so that a hostile index can at most be
 * refused. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "hf/hf_text_part.h"
#include "store/json.h"
#include "weights/base_impl.h"

static const char *const kind_names[] = {
    [QS_TENSOR_NF4] = "nf4", [QS_TENSOR_RAW] = "raw", [QS_TENSOR_SMALL] = "small"};

/* ---- write ---- */

static json_t *tensor_json(const qs_base_tensor *t)
{
    json_t *shape = json_array();
    for (int i = 0; i < t->rank; i++) {
        json_array_append_new(shape, json_integer(t->shape[i]));
    }
    json_t *out = json_pack("{s:s, s:s, s:o, s:s}", "name", t->name, "kind", kind_names[t->kind],
                            "shape", shape, "dtype", qs_dtype_name(t->dtype));
    if (t->kind == QS_TENSOR_SMALL) {
        json_object_set_new(out, "byte", json_integer(t->byte));
    } else {
        json_object_set_new(out, "quantum", json_integer(t->quantum));
    }
    if (t->kind == QS_TENSOR_NF4) {
        json_object_set_new(out, "map", json_integer(t->map));
        json_object_set_new(out, "offset", json_real((double)t->offset));
    }
    return out;
}

static json_t *unit_json(const qs_base_unit *unit)
{
    char hash[17];
    json_t *tensors = json_array();
    for (int i = 0; i < unit->n_tensors; i++) {
        json_array_append_new(tensors, tensor_json(&unit->tensors[i]));
    }
    (void)snprintf(hash, sizeof hash, "%016llx", (unsigned long long)unit->small_xxh3);
    return json_pack("{s:s, s:I, s:I, s:I, s:s, s:I, s:s, s:o}", "name", unit->name, "nf4_quanta",
                     (json_int_t)unit->size.nf4_quanta, "raw_quanta",
                     (json_int_t)unit->size.raw_quanta, "raw_quantum_elems",
                     (json_int_t)unit->size.raw_quantum_elems, "raw_dtype",
                     qs_dtype_name(unit->size.raw_dtype), "small_bytes",
                     (json_int_t)unit->small_bytes, "small_xxh3", hash, "tensors", tensors);
}

/* Nothing where there is none: then the text is that of the first versions. */
static void put_tokenizer(json_t *root, const qs_base_index *index)
{
    if (index->tokenizer_sha256[0] != '\0') {
        json_object_set_new(root, "tokenizer_sha256", json_string(index->tokenizer_sha256));
    }
}

static void put_part_of(json_t *root, const qs_base_index *index)
{
    if (index->config.part_of[0] != '\0') {
        json_object_set_new(root, "part_of", json_string(index->config.part_of));
    }
}

static void put_eos(json_t *root, const qs_base_index *index)
{
    json_t *ids = index->n_eos > 0 ? json_array() : NULL;
    for (int i = 0; i < index->n_eos; i++) {
        json_array_append_new(ids, json_integer(index->eos[i]));
    }
    if (ids != NULL) {
        json_object_set_new(root, "eos_token_ids", ids);
    }
}

qs_status qs_base_index_text(const qs_base_index *index, char **text)
{
    json_t *config = NULL;
    json_t *units = json_array();
    QS_TRY(qs_json_parse(&config, index->config_text, strlen(index->config_text), index->path));
    for (int u = 0; u < index->n_units; u++) {
        json_array_append_new(units, unit_json(&index->units[u]));
    }
    json_t *root = json_pack(
        "{s:o, s:{s:s, s:s}, s:I, s:b, s:s, s:I, s:o, s:o, s:s}", "config", config, "source",
        "path", index->source_path, "sha256", index->source_sha256, "head_chunk_rows",
        (json_int_t)index->head_chunk_rows, "nested", (int)index->nested, "quantizer",
        index->quantizer, "zero_blocks", (json_int_t)index->zero_blocks, "units", units, "final",
        unit_json(&index->final), "hashes_sha256", index->hashes_sha256);
    put_eos(root, index);
    put_tokenizer(root, index);
    put_part_of(root, index);
    *text = root == NULL ? NULL : json_dumps(root, JSON_COMPACT);
    json_decref(root);
    return *text != NULL ? QS_OK
                         : QS_FAIL(QS_ERR_INPUT_VALUE,
                                   "%s: the index cannot be made: no memory, or the path of the "
                                   "checkpoint is not UTF-8",
                                   index->path);
}

/* ---- parse ---- */

static qs_status wrong(const char *path, const char *where, const char *field)
{
    return QS_FAIL(QS_ERR_INPUT_FORMAT,
                   "%s: index: %s: \"%s\" does not follow from the config in the index", path,
                   where, field);
}

static qs_status expect_i64(const json_t *object, const char *key, int64_t value, const char *where,
                            const char *path)
{
    int64_t got;
    QS_TRY(qs_json_i64(object, key, 0, INT64_MAX, &got, path));
    return got == value ? QS_OK : wrong(path, where, key);
}

static qs_status parse_hex(const json_t *object, const char *key, uint64_t *out, const char *path)
{
    const char *text = NULL;
    QS_TRY(qs_json_text(object, key, &text, path));
    if (strlen(text) != 16 || strspn(text, "0123456789abcdef") != 16) {
        return QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: index: \"%s\" is not 16 hex digits", path, key);
    }
    *out = strtoull(text, NULL, 16);
    return QS_OK;
}

static qs_status parse_sha256(const json_t *object, const char *key, char out[QS_SHA256_HEX],
                              const char *path)
{
    const char *text = NULL;
    QS_TRY(qs_json_text(object, key, &text, path));
    if (strlen(text) != QS_SHA256_HEX - 1 || strspn(text, "0123456789abcdef") != strlen(text)) {
        return QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: index: \"%s\" is not 64 hex digits", path, key);
    }
    strcpy(out, text);
    return QS_OK;
}

static qs_status parse_float_dtype(const json_t *object, const char *key, qs_dtype *out,
                                   const char *path)
{
    const char *text = NULL;
    QS_TRY(qs_json_text(object, key, &text, path));
    int dtype = qs_dtype_parse(text);
    if (dtype != (int)QS_F32 && dtype != (int)QS_BF16 && dtype != (int)QS_F16) {
        return QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: index: \"%s\" = \"%.40s\" is not f32, bf16 or f16",
                       path, key, text);
    }
    *out = (qs_dtype)dtype;
    return QS_OK;
}

/* A linear may be NF4 or raw; every other tensor is what the table says. */
static qs_status parse_kind(qs_base_tensor *t, const json_t *entry, const char *path)
{
    const char *text = NULL;
    QS_TRY(qs_json_text(entry, "kind", &text, path));
    if (t->kind == QS_TENSOR_NF4 && strcmp(text, "raw") == 0) {
        t->kind = QS_TENSOR_RAW;
    }
    return strcmp(text, kind_names[t->kind]) == 0 ? QS_OK : wrong(path, t->name, "kind");
}

/* What a tensor says of itself; its place is compared once the whole unit is known. */
static qs_status parse_tensor(qs_base_tensor *t, const json_t *entry, const char *path)
{
    const char *name = NULL;
    const json_t *shape = NULL;
    int64_t map;
    double offset;
    QS_TRY(qs_json_text(entry, "name", &name, path));
    if (strcmp(name, t->name) != 0) {
        return wrong(path, t->name, "name");
    }
    QS_TRY(parse_kind(t, entry, path));
    QS_TRY(qs_json_array(entry, "shape", &shape, path));
    for (int i = 0; i < t->rank; i++) {
        if (json_array_size(shape) != (size_t)t->rank ||
            json_integer_value(json_array_get(shape, (size_t)i)) != t->shape[i]) {
            return wrong(path, t->name, "shape");
        }
    }
    QS_TRY(parse_float_dtype(entry, "dtype", &t->dtype, path));
    if (t->kind == QS_TENSOR_NF4) {
        QS_TRY(qs_json_i64(entry, "map", 0, 1 << 20, &map, path));
        QS_TRY(qs_json_f64(entry, "offset", -3e38, 3e38, &offset, path));
        t->map = (int)map;
        t->offset = (float)offset;
    }
    return QS_OK;
}

static qs_status expect_text(const json_t *object, const char *key, const char *value,
                             const char *where, const char *path)
{
    const char *got = NULL;
    QS_TRY(qs_json_text(object, key, &got, path));
    return strcmp(got, value) == 0 ? QS_OK : wrong(path, where, key);
}

static qs_status check_places(const qs_base_unit *unit, const json_t *object, const json_t *list,
                              const char *path)
{
    const qs_unit_size *size = &unit->size;
    QS_TRY(expect_i64(object, "nf4_quanta", size->nf4_quanta, unit->name, path));
    QS_TRY(expect_i64(object, "raw_quanta", size->raw_quanta, unit->name, path));
    QS_TRY(expect_i64(object, "raw_quantum_elems", size->raw_quantum_elems, unit->name, path));
    QS_TRY(expect_i64(object, "small_bytes", unit->small_bytes, unit->name, path));
    QS_TRY(expect_text(object, "raw_dtype", qs_dtype_name(size->raw_dtype), unit->name, path));
    for (int i = 0; i < unit->n_tensors; i++) {
        const qs_base_tensor *t = &unit->tensors[i];
        const json_t *entry = json_array_get(list, (size_t)i);
        bool small = t->kind == QS_TENSOR_SMALL;
        QS_TRY(expect_i64(entry, small ? "byte" : "quantum", small ? t->byte : t->quantum, t->name,
                          path));
        if (t->kind == QS_TENSOR_RAW && t->dtype != size->raw_dtype) {
            return wrong(path, t->name, "dtype");
        }
    }
    return QS_OK;
}

static qs_status parse_unit(const qs_base_index *index, qs_base_unit *unit, const json_t *object,
                            int64_t raw_elems, const char *path)
{
    const char *name = NULL;
    const json_t *list = NULL;
    QS_TRY(qs_json_text(object, "name", &name, path));
    QS_TRY(qs_json_array(object, "tensors", &list, path));
    if (strcmp(name, unit->name) != 0 || json_array_size(list) != (size_t)unit->n_tensors) {
        return wrong(path, unit->name, strcmp(name, unit->name) != 0 ? "name" : "tensors");
    }
    for (int i = 0; i < unit->n_tensors; i++) {
        QS_TRY(parse_tensor(&unit->tensors[i], json_array_get(list, (size_t)i), path));
    }
    qs_base_place(index, unit, raw_elems);
    QS_TRY(check_places(unit, object, list, path));
    return parse_hex(object, "small_xxh3", &unit->small_xxh3, path);
}

static qs_status parse_config(qs_base_index *index, const json_t *root, const char *path)
{
    const json_t *config = NULL;
    QS_TRY(qs_json_object(root, "config", &config, path));
    index->config_text = json_dumps(config, JSON_INDENT(2));
    if (index->config_text == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory for its config", path);
    }
    return qs_hf_config_parse(&index->config, index->config_text, strlen(index->config_text), path);
}

/* Not there for a model that is no text part, nor in the first files. */
static qs_status parse_part_of(qs_base_index *index, const json_t *root, const char *path)
{
    const char *text = NULL;
    if (json_object_get(root, "part_of") == NULL) {
        return QS_OK;
    }
    QS_TRY(qs_json_text(root, "part_of", &text, path));
    if (!qs_hf_is_text_part(text, index->config.model_type)) {
        return QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: index: %s is no text part of \"%.40s\"", path,
                       index->config.model_type, text);
    }
    strcpy(index->config.part_of, text);
    return QS_OK;
}

static qs_status parse_provenance(qs_base_index *index, const json_t *root, const char *path)
{
    const json_t *source = NULL;
    const char *text = NULL;
    QS_TRY(qs_json_object(root, "source", &source, path));
    QS_TRY(qs_json_text(source, "path", &text, path));
    index->source_path = strdup(text);
    QS_TRY(qs_json_text(root, "quantizer", &text, path));
    index->quantizer = strdup(text);
    if (index->source_path == NULL || index->quantizer == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory for its index", path);
    }
    QS_TRY(parse_sha256(source, "sha256", index->source_sha256, path));
    QS_TRY(parse_sha256(root, "hashes_sha256", index->hashes_sha256, path));
    return json_object_get(root, "zero_blocks") == NULL
               ? QS_OK
               : qs_json_i64(root, "zero_blocks", 0, INT64_MAX, &index->zero_blocks, path);
}

/* Not there in the first files, nor without a generation_config.json. */
static qs_status parse_eos(qs_base_index *index, const json_t *root, const char *path)
{
    const json_t *ids = json_object_get(root, "eos_token_ids");
    const size_t count = json_array_size(ids); /* 0 if it is no array */
    if (ids == NULL) {
        return QS_OK;
    }
    if (count == 0 || count > QS_EOS_MAX) {
        return QS_FAIL(QS_ERR_INPUT_FORMAT,
                       "%s: index: \"eos_token_ids\" is not a list of 1 to %d ids", path,
                       QS_EOS_MAX);
    }
    for (size_t i = 0; i < count; i++) {
        const json_t *id = json_array_get(ids, i);
        const json_int_t value = json_integer_value(id);
        if (!json_is_integer(id) || value < 0 || value >= index->config.vocab) {
            return QS_FAIL(QS_ERR_INPUT_VALUE,
                           "%s: index: eos_token_ids[%zu] is not an id below vocab_size=%lld", path,
                           i, (long long)index->config.vocab);
        }
        index->eos[index->n_eos++] = (int32_t)value;
    }
    return QS_OK;
}

/* Not there in the first files, nor without a tokenizer.json. */
static qs_status parse_tokenizer(qs_base_index *index, const json_t *root, const char *path)
{
    return json_object_get(root, "tokenizer_sha256") != NULL
               ? parse_sha256(root, "tokenizer_sha256", index->tokenizer_sha256, path)
               : QS_OK;
}

static qs_status parse_root(qs_base_index *index, const json_t *root, const char *path)
{
    const json_t *units = NULL;
    const json_t *nested = json_object_get(root, "nested");
    QS_TRY(parse_config(index, root, path));
    QS_TRY(parse_part_of(index, root, path));
    QS_TRY(parse_eos(index, root, path));
    QS_TRY(parse_tokenizer(index, root, path));
    QS_TRY(parse_provenance(index, root, path));
    QS_TRY(qs_json_i64(root, "head_chunk_rows", 1, 1 << 22, &index->head_chunk_rows, path));
    if (!json_is_boolean(nested)) {
        return QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: index: \"nested\" is neither true nor false",
                       path);
    }
    index->nested = json_is_true(nested);
    QS_TRY(qs_json_array(root, "units", &units, path));
    int64_t expected = qs_base_count_units(&index->config, index->head_chunk_rows);
    if ((int64_t)json_array_size(units) != expected) { /* before anything is allocated for them */
        return QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: index: %zu units; its config needs %lld", path,
                       json_array_size(units), (long long)expected);
    }
    QS_TRY(qs_base_make_units(index));
    for (int u = 0; u < index->n_units; u++) {
        QS_TRY(parse_unit(index, &index->units[u], json_array_get(units, (size_t)u),
                          qs_base_raw_elems(index, u), path));
    }
    const json_t *final = NULL;
    QS_TRY(qs_json_object(root, "final", &final, path));
    return parse_unit(index, &index->final, final, qs_base_raw_elems(index, index->n_units), path);
}

qs_status qs_base_index_parse(qs_base_index **out, const char *text, size_t bytes, const char *path)
{
    qs_status st = QS_OK;
    json_t *root = NULL;
    qs_base_index *index = calloc(1, sizeof *index);
    if (index == NULL || (index->path = strdup(path)) == NULL) {
        QS_GOTO(QS_FAIL(QS_ERR_MEMORY, "%s: no memory for its index", path));
    }
    QS_GOTO(qs_json_parse(&root, text, bytes, path));
    if (!json_is_object(root)) {
        QS_GOTO(QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: the index is not a JSON object", path));
    }
    QS_GOTO(parse_root(index, root, path));
    *out = index;
    index = NULL;
done:
    qs_base_index_free(index);
    json_decref(root);
    return st;
}
