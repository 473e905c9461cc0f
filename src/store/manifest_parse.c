/* Reading the text of a manifest: nothing is trusted, no file is touched.
 *
 * The manifest's own hash comes first, so that damage is told from a wrong field. A forged hash is
 * easy to make: hence every field is checked all the same, and a file name cannot leave the
 * directory. */
#include <ctype.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "store/manifest.h"
#include "store/manifest_impl.h"

bool qs_manifest_name_is_bare(const char *name)
{
    size_t length = strlen(name);
    if (length == 0 || length >= sizeof((qs_manifest_file *)0)->name || name[0] == '.' ||
        strcmp(name, QS_MANIFEST_NAME) == 0) {
        return false;
    }
    for (size_t i = 0; i < length; i++) {
        if (!isalnum((unsigned char)name[i]) && strchr("-_.+", name[i]) == NULL) {
            return false;
        }
    }
    return true;
}

bool qs_manifest_key_is_ours(const char *key)
{
    static const char *const ours[] = {"format", "format_version", "step",       "nranks",
                                       "run_id", "files",          "self_sha256"};
    for (size_t i = 0; i < sizeof ours / sizeof *ours; i++) {
        if (strcmp(key, ours[i]) == 0) {
            return true;
        }
    }
    return false;
}

int64_t qs_manifest_block_count(int64_t bytes)
{
    return bytes / QS_MANIFEST_BLOCK_BYTES + (bytes % QS_MANIFEST_BLOCK_BYTES != 0);
}

static bool is_hex(const char *text, size_t digits)
{
    return strlen(text) == digits && strspn(text, "0123456789abcdef") == digits;
}

/** The text must end in its own hash. */
static qs_status check_self_hash(const char *text, size_t bytes, const char *path)
{
    static const char before[] = "\"self_sha256\": \"";
    static const char after[] = "\"\n}\n";
    const size_t digits = QS_SHA256_HEX - 1;
    const size_t need = QS_MANIFEST_TAIL + sizeof before - 1;
    char stored[QS_SHA256_HEX];
    char found[QS_SHA256_HEX];
    if (bytes < need || memcmp(text + bytes - need, before, sizeof before - 1) != 0 ||
        memcmp(text + bytes - (sizeof after - 1), after, sizeof after - 1) != 0) {
        return QS_FAIL(QS_ERR_INPUT_FORMAT,
                       "%s: does not end in its self_sha256; it was cut off or edited", path);
    }
    memcpy(stored, text + bytes - QS_MANIFEST_TAIL, digits);
    stored[digits] = '\0';
    qs_sha256 *sha = qs_sha256_begin();
    if (sha == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory for hashing it", path);
    }
    qs_sha256_add(sha, text, bytes - QS_MANIFEST_TAIL);
    qs_sha256_add(sha, QS_MANIFEST_ZEROS, digits);
    qs_sha256_add(sha, after, sizeof after - 1);
    qs_sha256_end(sha, found);
    if (strcmp(stored, found) != 0) {
        return QS_FAIL(
            QS_ERR_INPUT_HASH,
            "%s: self_sha256=%s, but its content hashes to %s; it was changed or damaged", path,
            stored, found);
    }
    return QS_OK;
}

static qs_status get_integer(const json_t *object, const char *key, int64_t least, int64_t most,
                             const char *path, int64_t *out)
{
    const json_t *value = json_object_get(object, key);
    if (!json_is_integer(value)) {
        return QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: \"%s\" is missing or not an integer", path, key);
    }
    *out = json_integer_value(value);
    if (*out < least || *out > most) {
        return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: %s=%lld is not in %lld..%lld", path, key,
                       (long long)*out, (long long)least, (long long)most);
    }
    return QS_OK;
}

static qs_status get_text(const json_t *object, const char *key, const char *path, const char **out)
{
    *out = json_string_value(json_object_get(object, key));
    return *out != NULL
               ? QS_OK
               : QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: \"%s\" is missing or not a string", path, key);
}

static qs_status parse_file(const json_t *entry, const char *path, qs_manifest_file *file)
{
    const char *name = NULL;
    const char *sha256 = NULL;
    QS_TRY(get_text(entry, "name", path, &name));
    if (!qs_manifest_name_is_bare(name)) {
        return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: name=\"%.80s\" is not a bare file name", path,
                       name);
    }
    memcpy(file->name, name, strlen(name) + 1);
    QS_TRY(get_integer(entry, "size", 0, (int64_t)1 << 50, path, &file->bytes));
    QS_TRY(get_text(entry, "sha256", path, &sha256));
    if (!is_hex(sha256, QS_SHA256_HEX - 1)) {
        return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: sha256 of %s is not 64 hex digits", path, name);
    }
    memcpy(file->sha256, sha256, QS_SHA256_HEX);
    const json_t *blocks = json_object_get(entry, "xxh3");
    int64_t need = qs_manifest_block_count(file->bytes);
    if (!json_is_array(blocks) || (int64_t)json_array_size(blocks) != need) {
        return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: xxh3 of %s has %zu hashes; its size needs %lld",
                       path, name, json_array_size(blocks), (long long)need);
    }
    return QS_OK;
}

/** Copy the block hashes of all files, whose numbers were checked, into one array. */
static qs_status parse_blocks(const json_t *files, const char *path, qs_manifest *out)
{
    int64_t total = 0;
    for (int i = 0; i < out->n_files; i++) {
        total +=
            qs_manifest_block_count(out->files[i].bytes); /* bounded by the length of the text */
    }
    out->blocks = malloc((size_t)(total + 1) * sizeof *out->blocks);
    if (out->blocks == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory for its block hashes", path);
    }
    int64_t at = 0;
    for (int i = 0; i < out->n_files; i++) {
        const json_t *blocks = json_object_get(json_array_get(files, (size_t)i), "xxh3");
        for (size_t b = 0; b < json_array_size(blocks); b++, at++) {
            const char *hash = json_string_value(json_array_get(blocks, b));
            if (hash == NULL || !is_hex(hash, QS_XXH128_HEX - 1)) {
                return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: xxh3[%zu] of %s is not 32 hex digits", path,
                               b, out->files[i].name);
            }
            memcpy(out->blocks[at], hash, QS_XXH128_HEX);
        }
    }
    return QS_OK;
}

static int by_name(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

static qs_status check_names_differ(const qs_manifest *m, const char *path)
{
    qs_status st = QS_OK;
    const char **names = malloc((size_t)m->n_files * sizeof *names);
    if (names == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory for its file names", path);
    }
    for (int i = 0; i < m->n_files; i++) {
        names[i] = m->files[i].name;
    }
    qsort(names, (size_t)m->n_files, sizeof *names, by_name);
    for (int i = 1; st == QS_OK && i < m->n_files; i++) {
        if (strcmp(names[i - 1], names[i]) == 0) {
            st = QS_FAIL(QS_ERR_INPUT_VALUE, "%s: name=\"%s\" occurs twice", path, names[i]);
        }
    }
    free(names);
    return st;
}

static qs_status parse_files(const json_t *root, const char *path, qs_manifest *out)
{
    const json_t *files = json_object_get(root, "files");
    size_t count = json_array_size(files); /* 0 if it is no array */
    if (count == 0 || count > INT32_MAX) {
        return QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: \"files\" is missing, empty or not a list", path);
    }
    out->files = calloc(count, sizeof *out->files);
    if (out->files == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory for its %zu files", path, count);
    }
    out->n_files = (int)count;
    for (size_t i = 0; i < count; i++) {
        QS_TRY(parse_file(json_array_get(files, i), path, &out->files[i]));
    }
    QS_TRY(check_names_differ(out, path));
    return parse_blocks(files, path, out);
}

/** What is not the manifest's own belongs to its owner. */
static qs_status parse_meta(const json_t *root, const char *path, qs_manifest *out)
{
    const char *key;
    json_t *value;
    json_t *meta = json_object();
    int failed = meta == NULL;
    json_object_foreach((json_t *)root, key, value)
    {
        if (!qs_manifest_key_is_ours(key)) {
            failed |= json_object_set(meta, key, value);
        }
    }
    out->meta_json = failed != 0 ? NULL : json_dumps(meta, JSON_REAL_PRECISION(17));
    json_decref(meta);
    return out->meta_json != NULL ? QS_OK
                                  : QS_FAIL(QS_ERR_MEMORY, "%s: no memory for its fields", path);
}

static qs_status parse_root(const json_t *root, const char *path, qs_manifest *out)
{
    const char *format = NULL;
    const char *run_id = NULL;
    int64_t version = 0;
    int64_t nranks = 0;
    QS_TRY(get_text(root, "format", path, &format));
    if (strcmp(format, QS_MANIFEST_FORMAT) != 0) {
        return QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: format=\"%.40s\" is not \"%s\"", path, format,
                       QS_MANIFEST_FORMAT);
    }
    QS_TRY(get_integer(root, "format_version", 0, INT32_MAX, path, &version));
    if (version != QS_MANIFEST_VERSION) {
        return QS_FAIL(QS_ERR_INPUT_UNKNOWN, "%s: format_version=%lld; this program reads %d", path,
                       (long long)version, QS_MANIFEST_VERSION);
    }
    QS_TRY(get_integer(root, "step", 0, (int64_t)1 << 50, path, &out->step));
    QS_TRY(get_integer(root, "nranks", 1, QS_MANIFEST_MAX_RANKS, path, &nranks));
    out->nranks = (int)nranks;
    QS_TRY(get_text(root, "run_id", path, &run_id));
    if (strlen(run_id) >= sizeof out->run_id) {
        return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: run_id has %zu bytes; at most %zu are allowed",
                       path, strlen(run_id), sizeof out->run_id - 1);
    }
    memcpy(out->run_id, run_id, strlen(run_id) + 1);
    QS_TRY(parse_files(root, path, out));
    return parse_meta(root, path, out);
}

qs_status qs_manifest_parse(const char *text, size_t bytes, const char *path, qs_manifest *out)
{
    json_error_t error;
    *out = (qs_manifest){0};
    QS_TRY(check_self_hash(text, bytes, path));
    json_t *root = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, &error);
    if (!json_is_object(root)) {
        json_decref(root);
        return QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: is not a JSON object: %s", path, error.text);
    }
    qs_status st = parse_root(root, path, out);
    json_decref(root);
    if (st != QS_OK) {
        qs_manifest_free(out);
    }
    return st;
}
