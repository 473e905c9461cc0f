/* Manifests: writing, listing and checking against the files. The text itself is read in
 * manifest_parse.c.
 *
 * The last field is the SHA-256 of the file with the hash's 64 digits replaced by zeros, so that
 * one flipped bit anywhere in the manifest shows. Every file is hashed twice over: SHA-256 as a
 * whole, XXH3-128 per 1 MiB block, which says where the damage is. */
#include "store/manifest.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/log.h"
#include "store/io.h"
#include "store/manifest_impl.h"

enum { PATH_BYTES = 4096 };

void qs_manifest_free(qs_manifest *m)
{
    free(m->meta_json);
    free(m->files);
    free(m->blocks);
    *m = (qs_manifest){0};
}

qs_status qs_manifest_remove_dir(const char *path)
{
    const int dir = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (dir >= 0) {
        if (unlinkat(dir, QS_MANIFEST_NAME, 0) == 0) {
            (void)fsync(dir); /* removing the rest says what is wrong */
        }
        (void)close(dir);
    }
    return qs_io_remove_dir(path);
}

void qs_manifest_step_dir(char *out, size_t capacity, const char *dir, int64_t step)
{
    (void)snprintf(out, capacity, "%s/step-%08lld", dir, (long long)step);
}

static qs_status join(char out[PATH_BYTES], const char *dir, const char *name)
{
    if (snprintf(out, PATH_BYTES, "%s/%s", dir, name) >= PATH_BYTES) {
        return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: the path is longer than %d bytes", dir,
                       PATH_BYTES - 1);
    }
    return QS_OK;
}

/* ---- hashing files ---- */

/** Called for every block of a file, in order. */
typedef qs_status (*block_fn)(void *user, int64_t block, const char xxh3[QS_XXH128_HEX]);

/** Read an open file of `out->bytes` bytes once: SHA-256 into `out`, block hashes to `each` (may be
 * NULL). */
static qs_status hash_blocks(int fd, const char *path, qs_manifest_file *out, block_fn each,
                             void *user)
{
    qs_status st = QS_OK;
    char xxh3[QS_XXH128_HEX];
    qs_sha256 *sha = qs_sha256_begin();
    char *block = malloc(QS_MANIFEST_BLOCK_BYTES);
    if (sha == NULL || block == NULL) {
        st = QS_FAIL(QS_ERR_MEMORY, "%s: no memory for hashing it", path);
    }
    for (int64_t at = 0; st == QS_OK && at < out->bytes; at += QS_MANIFEST_BLOCK_BYTES) {
        int64_t left = out->bytes - at;
        size_t n = left < QS_MANIFEST_BLOCK_BYTES ? (size_t)left : QS_MANIFEST_BLOCK_BYTES;
        st = qs_io_read_all(fd, block, n, at, path);
        if (st == QS_OK) {
            qs_sha256_add(sha, block, n);
        }
        if (st == QS_OK && each != NULL) {
            qs_xxh3_128_hex(block, n, xxh3);
            st = each(user, at / QS_MANIFEST_BLOCK_BYTES, xxh3);
        }
    }
    if (sha != NULL) {
        qs_sha256_end(sha, out->sha256);
    }
    free(block);
    return st;
}

/** Open dir/name as a plain file; its size goes to *bytes. */
static qs_status open_plain(const char *path, int *fd, int64_t *bytes)
{
    struct stat info;
    *fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe must not make us wait */
    if (*fd < 0) {
        const int error = errno;
        qs_status st =
            QS_FAIL(QS_ERR_INPUT_MISSING, "%s: cannot be opened: %s", path, strerror(error));
        qs_error_because(error);
        return st;
    }
    if (fstat(*fd, &info) != 0 || !S_ISREG(info.st_mode)) {
        (void)close(*fd);
        return QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: is not a plain file", path);
    }
    *bytes = info.st_size;
    return QS_OK;
}

qs_status qs_manifest_hash_file(const char *dir, const char *name, qs_manifest_file *out)
{
    char path[PATH_BYTES];
    int fd = -1;
    if (!qs_manifest_name_is_bare(name)) {
        return QS_FAIL(QS_ERR_BUG, "\"%s\" is not a bare file name for a manifest", name);
    }
    *out = (qs_manifest_file){0};
    (void)snprintf(out->name, sizeof out->name, "%s", name);
    QS_TRY(join(path, dir, name));
    QS_TRY(open_plain(path, &fd, &out->bytes));
    qs_status st = hash_blocks(fd, path, out, NULL, NULL);
    (void)close(fd);
    return st;
}

/* ---- writing ---- */

static qs_status append_block(void *user, int64_t block, const char xxh3[QS_XXH128_HEX])
{
    (void)block;
    return json_array_append_new(user, json_string(xxh3)) == 0
               ? QS_OK
               : QS_FAIL(QS_ERR_MEMORY, "no memory for a manifest");
}

/** Describe one file, reading it: it must be what `file` says. */
static qs_status describe_file(const char *dir, const qs_manifest_file *file, json_t *files)
{
    char path[PATH_BYTES];
    int fd = -1;
    qs_manifest_file found = {0};
    if (!qs_manifest_name_is_bare(file->name)) {
        return QS_FAIL(QS_ERR_BUG, "\"%s\" is not a bare file name for a manifest", file->name);
    }
    QS_TRY(join(path, dir, file->name));
    QS_TRY(open_plain(path, &fd, &found.bytes));
    json_t *blocks = json_array();
    qs_status st = hash_blocks(fd, path, &found, append_block, blocks);
    (void)close(fd);
    if (st == QS_OK && (found.bytes != file->bytes || strcmp(found.sha256, file->sha256) != 0)) {
        st = QS_FAIL(
            QS_ERR_IO_VERIFY,
            "%s: has %lld bytes with sha256=%s, but %lld bytes with sha256=%s were written; "
            "check the disk",
            path, (long long)found.bytes, found.sha256, (long long)file->bytes, file->sha256);
    }
    if (st != QS_OK) {
        json_decref(blocks);
        return st;
    }
    json_t *entry = json_pack("{s:s, s:I, s:s, s:o}", "name", file->name, "size",
                              (json_int_t)file->bytes, "sha256", file->sha256, "xxh3", blocks);
    return entry != NULL && json_array_append_new(files, entry) == 0
               ? QS_OK
               : QS_FAIL(QS_ERR_MEMORY, "%s: no memory for the manifest", path);
}

/** Put the owner's keys into `root`; none may be one of ours. */
static qs_status add_meta(json_t *root, const char *meta_json)
{
    const char *key;
    json_t *value;
    json_error_t error;
    json_t *meta = json_loads(meta_json != NULL ? meta_json : "{}", JSON_REJECT_DUPLICATES, &error);
    if (!json_is_object(meta)) {
        json_decref(meta);
        return QS_FAIL(QS_ERR_BUG, "the manifest's meta_json is not a JSON object: %s", error.text);
    }
    qs_status st = QS_OK;
    json_object_foreach(meta, key, value)
    {
        if (qs_manifest_key_is_ours(key)) {
            st = QS_FAIL(QS_ERR_BUG, "the manifest's meta_json has the reserved key \"%s\"", key);
        } else if (json_object_set(root, key, value) != 0) {
            st = QS_FAIL(QS_ERR_MEMORY, "no memory for a manifest");
        }
    }
    json_decref(meta);
    return st;
}

static qs_status build(const char *dir, const qs_manifest *m, json_t *root)
{
    json_t *files = json_array();
    int failed = json_object_set_new(root, "format", json_string(QS_MANIFEST_FORMAT));
    failed |= json_object_set_new(root, "format_version", json_integer(QS_MANIFEST_VERSION));
    failed |= json_object_set_new(root, "step", json_integer(m->step));
    failed |= json_object_set_new(root, "nranks", json_integer(m->nranks));
    failed |= json_object_set_new(root, "run_id", json_string(m->run_id));
    qs_status st = failed != 0 ? QS_FAIL(QS_ERR_MEMORY, "%s: no memory for the manifest", dir)
                               : add_meta(root, m->meta_json);
    for (int i = 0; st == QS_OK && i < m->n_files; i++) {
        st = describe_file(dir, &m->files[i], files);
    }
    failed = json_object_set_new(root, "files", files); /* takes the list in any case */
    failed |= json_object_set_new(root, "self_sha256", json_string(QS_MANIFEST_ZEROS));
    return st == QS_OK && failed != 0
               ? QS_FAIL(QS_ERR_MEMORY, "%s: no memory for the manifest", dir)
               : st;
}

/** The text with its own hash in place; the caller frees it. */
static char *to_text(const json_t *root, size_t *bytes)
{
    char hash[QS_SHA256_HEX];
    char *body = json_dumps(root, JSON_INDENT(1) | JSON_REAL_PRECISION(17));
    if (body == NULL) {
        return NULL;
    }
    size_t length = strlen(body);
    char *text = realloc(body, length + 2);
    if (text == NULL) {
        free(body);
        return NULL;
    }
    text[length] = '\n';
    text[length + 1] = '\0';
    *bytes = length + 1;
    qs_sha256_hex(text, *bytes, hash);
    memcpy(text + *bytes - QS_MANIFEST_TAIL, hash, QS_SHA256_HEX - 1);
    return text;
}

qs_status qs_manifest_write(const char *dir, const qs_manifest *m)
{
    char path[PATH_BYTES];
    char *text = NULL;
    size_t bytes = 0;
    qs_manifest parsed = {0};
    QS_TRY(join(path, dir, QS_MANIFEST_NAME));
    json_t *root = json_object();
    qs_status st = build(dir, m, root);
    if (st == QS_OK && (text = to_text(root, &bytes)) == NULL) {
        st = QS_FAIL(QS_ERR_MEMORY, "%s: no memory for the manifest", path);
    }
    json_decref(root);
    if (st == QS_OK) { /* what we write, we can read */
        st = qs_manifest_parse(text, bytes, path, &parsed);
        qs_manifest_free(&parsed);
    }
    if (st == QS_OK) {
        st = qs_io_write_new(path, text, bytes);
    }
    free(text);
    return st;
}

/* ---- reading and checking ---- */

/** The step in the name "step-N" with N printed with 8 digits or more; -1 for other names. */
static int64_t step_of_name(const char *name)
{
    char canonical[64];
    if (strncmp(name, "step-", 5) != 0 || strlen(name) > 5 + 18 ||
        strspn(name + 5, "0123456789") != strlen(name + 5)) {
        return -1;
    }
    long long step = strtoll(name + 5, NULL, 10);
    (void)snprintf(canonical, sizeof canonical, "step-%08lld", step);
    return strcmp(canonical, name) == 0 ? step : -1;
}

/** Last component of a path, trailing slashes left out; false if it is too long to be one of ours.
 */
static bool last_name(const char *dir, char name[64])
{
    size_t end = strlen(dir);
    while (end > 1 && dir[end - 1] == '/') {
        end--;
    }
    size_t begin = end;
    while (begin > 0 && dir[begin - 1] != '/') {
        begin--;
    }
    if (end - begin >= 64) {
        return false;
    }
    memcpy(name, dir + begin, end - begin);
    name[end - begin] = '\0';
    return true;
}

qs_status qs_manifest_read(const char *dir, qs_manifest *out)
{
    char path[PATH_BYTES];
    char name[64];
    void *text = NULL;
    size_t bytes = 0;
    *out = (qs_manifest){0};
    QS_TRY(join(path, dir, QS_MANIFEST_NAME));
    QS_TRY(qs_io_read_file(path, QS_MANIFEST_LIMIT, &text, &bytes));
    qs_status st = qs_manifest_parse(text, bytes, path, out);
    free(text);
    QS_TRY(st);
    int64_t step = last_name(dir, name) ? step_of_name(name) : -1;
    if (step >= 0 && step != out->step) {
        st = QS_FAIL(QS_ERR_INPUT_VALUE,
                     "%s: step=%lld, but the directory is called %s; rename it back", path,
                     (long long)out->step, name);
        qs_manifest_free(out);
    }
    return st;
}

typedef struct {
    const char *path;
    const char (*blocks)[QS_XXH128_HEX];
} expected_blocks;

static qs_status compare_block(void *user, int64_t block, const char xxh3[QS_XXH128_HEX])
{
    const expected_blocks *want = user;
    if (strcmp(want->blocks[block], xxh3) == 0) {
        return QS_OK;
    }
    return QS_FAIL(
        QS_ERR_INPUT_HASH,
        "%s: block %lld (from byte %lld) has xxh3=%s, but the manifest says %s; the file was "
        "changed or damaged",
        want->path, (long long)block, (long long)block * QS_MANIFEST_BLOCK_BYTES, xxh3,
        want->blocks[block]);
}

static qs_status verify_file(const char *dir, const qs_manifest_file *file,
                             const char (*blocks)[QS_XXH128_HEX])
{
    char path[PATH_BYTES];
    int fd = -1;
    qs_manifest_file found = {0};
    QS_TRY(join(path, dir, file->name));
    QS_TRY(open_plain(path, &fd, &found.bytes));
    qs_status st = QS_OK;
    if (found.bytes != file->bytes) {
        st = QS_FAIL(QS_ERR_INPUT_HASH,
                     "%s: size=%lld, but the manifest says %lld; the file was changed or cut off",
                     path, (long long)found.bytes, (long long)file->bytes);
    }
    expected_blocks want = {path, blocks};
    if (st == QS_OK) {
        st = hash_blocks(fd, path, &found, compare_block, &want);
    }
    (void)close(fd);
    if (st == QS_OK && strcmp(found.sha256, file->sha256) != 0) {
        st = QS_FAIL(QS_ERR_INPUT_HASH,
                     "%s: sha256=%s, but the manifest says %s; the file was changed or damaged",
                     path, found.sha256, file->sha256);
    }
    return st;
}

qs_status qs_manifest_verify(const char *dir, qs_manifest *out)
{
    int64_t block = 0;
    QS_TRY(qs_manifest_read(dir, out));
    qs_status st = QS_OK;
    for (int i = 0; st == QS_OK && i < out->n_files; i++) {
        st = verify_file(dir, &out->files[i], (const char(*)[QS_XXH128_HEX])(out->blocks + block));
        block += qs_manifest_block_count(out->files[i].bytes);
    }
    if (st != QS_OK) {
        qs_manifest_free(out);
    }
    return st;
}

bool qs_manifest_undecided(qs_status st)
{
    return st == QS_ERR_MEMORY || st == QS_ERR_BUG ||
           (st == QS_ERR_INPUT_MISSING && qs_io_out_of_reach(qs_error_cause()));
}

/* ---- listing ---- */

static int descending(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a;
    int64_t y = *(const int64_t *)b;
    return (x < y) - (x > y);
}

typedef struct {
    int64_t *steps;
    int count, capacity;
} step_list;

static qs_status add_step(void *user, int dir, const char *name)
{
    step_list *list = user;
    const int64_t step = step_of_name(name);
    (void)dir;
    if (step < 0) {
        return QS_OK;
    }
    if (list->count == list->capacity) {
        const int capacity = list->capacity > 0 ? 2 * list->capacity : 16;
        int64_t *grown = realloc(list->steps, (size_t)capacity * sizeof *grown);
        if (grown == NULL) {
            return QS_FAIL(QS_ERR_MEMORY, "no memory for a list of checkpoints");
        }
        list->steps = grown;
        list->capacity = capacity;
    }
    list->steps[list->count++] = step;
    return QS_OK;
}

qs_status qs_manifest_scan(const char *dir, int64_t **steps, int *count)
{
    step_list list = {NULL, 0, 0};
    *steps = NULL;
    *count = 0;
    const qs_status st = qs_io_list(dir, QS_ERR_IO, add_step, &list, NULL);
    if (st != QS_OK) {
        free(list.steps);
        return st;
    }
    if (list.count > 0) {
        qsort(list.steps, (size_t)list.count, sizeof *list.steps, descending);
    }
    *steps = list.steps;
    *count = list.count;
    return QS_OK;
}

qs_status qs_manifest_list(const char *dir, int64_t *steps, int capacity, int *count)
{
    int64_t *found = NULL;
    int n = 0;
    char path[PATH_BYTES];
    bool had_error = qs_error_text()[0] != '\0';
    qs_status st = QS_OK;
    *count = 0;
    QS_TRY(qs_manifest_scan(dir, &found, &n));
    for (int i = 0; i < n && *count < capacity && st == QS_OK; i++) {
        qs_manifest m = {0};
        qs_manifest_step_dir(path, sizeof path, dir, found[i]);
        const qs_status read = qs_manifest_read(path, &m);
        if (read == QS_OK) {
            steps[(*count)++] = found[i];
            qs_manifest_free(&m);
        } else if (!had_error && qs_manifest_undecided(read)) {
            st = read;
        } else if (!had_error) { /* not ours to report: it is simply no checkpoint */
            qs_log_warn("%s is not a checkpoint and is left alone: %s", path, qs_error_text());
            qs_error_clear();
        }
    }
    free(found);
    return st;
}
