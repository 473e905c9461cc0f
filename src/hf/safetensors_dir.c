/* A checkpoint directory: one safetensors file, or several with an index.
 *
 * The index names files; a name that could leave the directory is refused. Symbolic links are
 * followed (the cache of the hub client consists of them), and said so at log level debug when they
 * lead outside. */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/log.h"
#include "hf/safetensors.h"
#include "hf/safetensors_impl.h"
#include "store/io.h"
#include "store/json.h"

enum { MAX_INDEX_BYTES = 64 << 20, MAX_FILES = 4096, CONVERT_ELEMS = 1 << 16 };

typedef struct {
    char *path;
    int fd;
} st_file;

struct qs_st_dir {
    char *path;
    int n_files;
    st_file *files;
    int64_t n_tensors;
    qs_st_tensor *tensors; /* sorted by name */
    bool told_of_links;
};

static qs_status no_memory(const char *path)
{
    return QS_FAIL(QS_ERR_MEMORY, "%s: no memory for the table of tensors", path);
}

/* Say once per directory that its files lie elsewhere. */
static void tell_of_link(qs_st_dir *dir, const char *path)
{
    struct stat info;
    char real_dir[PATH_MAX];
    char real[PATH_MAX];
    if (dir->told_of_links || lstat(path, &info) != 0 || !S_ISLNK(info.st_mode) ||
        realpath(dir->path, real_dir) == NULL || realpath(path, real) == NULL) {
        return;
    }
    size_t length = strlen(real_dir);
    if (strncmp(real, real_dir, length) != 0 || real[length] != '/') {
        qs_log_debug("%s is a link to %s, outside the directory", path, real);
        dir->told_of_links = true;
    }
}

static qs_status read_header(const st_file *file, qs_st_header *out)
{
    qs_status st = QS_OK;
    struct stat info;
    uint8_t word[8];
    uint64_t bytes = 0;
    if (fstat(file->fd, &info) != 0 || !S_ISREG(info.st_mode)) {
        return QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: is not a plain file", file->path);
    }
    if (info.st_size < 8) {
        return QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: %lld bytes are too few for safetensors",
                       file->path, (long long)info.st_size);
    }
    QS_TRY(qs_io_read_all(file->fd, word, sizeof word, 0, file->path));
    for (int i = 7; i >= 0; i--) {
        bytes = bytes << 8 | word[i];
    }
    if (bytes > QS_ST_MAX_HEADER || bytes > (uint64_t)info.st_size - 8) {
        return QS_FAIL(QS_ERR_INPUT_FORMAT,
                       "%s: the header claims %llu bytes, the file has %lld; cut off, a Git LFS "
                       "pointer, or not safetensors",
                       file->path, (unsigned long long)bytes, (long long)info.st_size);
    }
    char *text = malloc((size_t)bytes + 1);
    if (text == NULL) {
        return no_memory(file->path);
    }
    QS_GOTO(qs_io_read_all(file->fd, text, (size_t)bytes, 8, file->path));
    QS_GOTO(qs_st_parse_header(out, text, (size_t)bytes, info.st_size, file->path));
done:
    free(text);
    return st;
}

/* Open one file of the directory and append its tensors. */
static qs_status add_file(qs_st_dir *dir, const char *name)
{
    qs_st_header header = {0};
    char *path = NULL;
    QS_TRY(qs_io_join(&path, dir->path, name));
    st_file *files = realloc(dir->files, (size_t)(dir->n_files + 1) * sizeof *files);
    if (files != NULL) {
        dir->files = files;
    }
    if (files == NULL) {
        free(path);
        return no_memory(dir->path);
    }
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe must not make us wait */
    if (fd < 0) {
        qs_status st =
            QS_FAIL(QS_ERR_INPUT_MISSING, "%s: opening failed: %s", path, strerror(errno));
        free(path);
        return st;
    }
    tell_of_link(dir, path);
    files[dir->n_files++] = (st_file){.path = path, .fd = fd};
    QS_TRY(read_header(&files[dir->n_files - 1], &header));
    qs_st_tensor *all =
        realloc(dir->tensors, (size_t)(dir->n_tensors + header.n_tensors + 1) * sizeof *all);
    if (all == NULL) {
        qs_st_header_free(&header);
        return no_memory(dir->path);
    }
    dir->tensors = all;
    for (int64_t i = 0; i < header.n_tensors; i++) {
        all[dir->n_tensors] = header.tensors[i];
        all[dir->n_tensors++].file = dir->n_files - 1;
    }
    free(header.tensors); /* the names have moved */
    return QS_OK;
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const qs_st_tensor *)a)->name, ((const qs_st_tensor *)b)->name);
}

/* Across files: sort and refuse a name that two files hold. */
static qs_status sort_tensors(qs_st_dir *dir)
{
    if (dir->n_tensors > 0) {
        qsort(dir->tensors, (size_t)dir->n_tensors, sizeof *dir->tensors, by_name);
    }
    for (int64_t i = 1; i < dir->n_tensors; i++) {
        const qs_st_tensor *a = &dir->tensors[i - 1];
        const qs_st_tensor *b = &dir->tensors[i];
        if (strcmp(a->name, b->name) == 0) {
            return QS_FAIL(QS_ERR_INPUT_TENSOR, "%s: tensor \"%.200s\" is also in %s",
                           dir->files[a->file].path, a->name, dir->files[b->file].path);
        }
    }
    return QS_OK;
}

static bool is_bare_name(const char *name)
{
    return name[0] != '\0' && strcmp(name, ".") != 0 && strstr(name, "..") == NULL &&
           strpbrk(name, "/\\") == NULL;
}

/* Open every file that the weight map names, each once. */
static qs_status add_mapped_files(qs_st_dir *dir, const json_t *map, const char *path)
{
    const char *tensor;
    json_t *file;
    json_object_foreach((json_t *)(uintptr_t)map, tensor, file)
    {
        if (!json_is_string(file) || !is_bare_name(json_string_value(file))) {
            return QS_FAIL(QS_ERR_INPUT_FORMAT,
                           "%s: weight_map \"%.200s\": \"%.200s\" is not the bare name of a file "
                           "in the directory",
                           path, tensor, json_is_string(file) ? json_string_value(file) : "?");
        }
        bool known = false;
        for (int i = dir->n_files - 1; i >= 0 && !known; i--) {
            known = strcmp(strrchr(dir->files[i].path, '/') + 1, json_string_value(file)) == 0;
        }
        if (!known && dir->n_files == MAX_FILES) {
            return QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: weight_map names more than %d files", path,
                           MAX_FILES);
        }
        if (!known) {
            QS_TRY(add_file(dir, json_string_value(file)));
        }
    }
    return QS_OK;
}

/* Every mapped tensor is in its file, and every tensor of the files is mapped. */
static qs_status check_map(const qs_st_dir *dir, const json_t *map, const char *path)
{
    const char *name;
    json_t *file;
    json_object_foreach((json_t *)(uintptr_t)map, name, file)
    {
        const qs_st_tensor *t = qs_st_find(dir, name);
        if (t == NULL ||
            strcmp(strrchr(dir->files[t->file].path, '/') + 1, json_string_value(file)) != 0) {
            return QS_FAIL(QS_ERR_INPUT_TENSOR,
                           "%s: tensor \"%.200s\" is not in %.200s, where weight_map has it", path,
                           name, json_string_value(file));
        }
    }
    for (int64_t i = 0; i < dir->n_tensors; i++) {
        if (json_object_get(map, dir->tensors[i].name) == NULL) {
            return QS_FAIL(QS_ERR_INPUT_TENSOR,
                           "%s: tensor \"%.200s\" is not in the weight_map of "
                           "%s",
                           dir->files[dir->tensors[i].file].path, dir->tensors[i].name, path);
        }
    }
    return QS_OK;
}

/* Writers disagree on what total_size counts (shared tensors, padding), and each header has been
 * checked against its file: a warning is enough. */
static void compare_total(const qs_st_dir *dir, const json_t *root, const char *path)
{
    const json_t *total = json_object_get(json_object_get(root, "metadata"), "total_size");
    int64_t bytes = 0;
    for (int64_t i = 0; i < dir->n_tensors; i++) {
        bytes += dir->tensors[i].bytes;
    }
    if (json_is_number(total) && json_number_value(total) != (double)bytes) {
        qs_log_warn("%s: total_size = %.0f, but the tensors have %lld bytes", path,
                    json_number_value(total), (long long)bytes);
    }
}

static qs_status open_index(qs_st_dir *dir, const char *path)
{
    qs_status st = QS_OK;
    void *text = NULL;
    size_t bytes = 0;
    json_t *root = NULL;
    const json_t *map = NULL;
    QS_GOTO(qs_io_read_file(path, MAX_INDEX_BYTES, &text, &bytes));
    QS_GOTO(qs_json_parse(&root, text, bytes, path));
    if (!json_is_object(root)) {
        QS_GOTO(QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: is not a JSON object", path));
    }
    QS_GOTO(qs_json_object(root, "weight_map", &map, path));
    QS_GOTO(add_mapped_files(dir, map, path));
    QS_GOTO(sort_tensors(dir));
    QS_GOTO(check_map(dir, map, path));
    compare_total(dir, root, path);
done:
    json_decref(root);
    free(text);
    return st;
}

/* A link counts wherever it leads: opening it says what is wrong with it. */
static bool is_there(const char *path)
{
    struct stat info;
    return lstat(path, &info) == 0;
}

static qs_status open_files(qs_st_dir *dir, const char *stem)
{
    qs_status st = QS_OK;
    char name[64], index_name[80];
    char *single = NULL, *index = NULL;
    (void)snprintf(name, sizeof name, "%s.safetensors", stem);
    (void)snprintf(index_name, sizeof index_name, "%s.index.json", name);
    QS_GOTO(qs_io_join(&single, dir->path, name));
    QS_GOTO(qs_io_join(&index, dir->path, index_name));
    if (is_there(single)) {
        QS_GOTO(add_file(dir, name));
        QS_GOTO(sort_tensors(dir));
    } else if (is_there(index)) {
        QS_GOTO(open_index(dir, index));
    } else {
        QS_GOTO(QS_FAIL(QS_ERR_INPUT_MISSING,
                        "%s: holds neither %s nor %s.index.json; other weight formats are not "
                        "read, save the model as safetensors",
                        dir->path, name, name));
    }
done:
    free(single);
    free(index);
    return st;
}

qs_status qs_st_open(qs_st_dir **out, const char *path, const char *stem)
{
    qs_status st = QS_OK;
    qs_st_dir *dir = calloc(1, sizeof *dir);
    if (dir == NULL || (dir->path = strdup(path)) == NULL) {
        QS_GOTO(no_memory(path));
    }
    QS_GOTO(open_files(dir, stem));
    *out = dir;
    dir = NULL;
done:
    qs_st_close(dir);
    return st;
}

void qs_st_close(qs_st_dir *dir)
{
    if (dir == NULL) {
        return;
    }
    for (int i = 0; i < dir->n_files; i++) {
        (void)close(dir->files[i].fd); /* read only */
        free(dir->files[i].path);
    }
    for (int64_t i = 0; i < dir->n_tensors; i++) {
        free(dir->tensors[i].name);
    }
    free(dir->files);
    free(dir->tensors);
    free(dir->path);
    free(dir);
}

const char *qs_st_path(const qs_st_dir *dir)
{
    return dir->path;
}

int64_t qs_st_count(const qs_st_dir *dir)
{
    return dir->n_tensors;
}

const qs_st_tensor *qs_st_at(const qs_st_dir *dir, int64_t index)
{
    return &dir->tensors[index];
}

const qs_st_tensor *qs_st_find(const qs_st_dir *dir, const char *name)
{
    int64_t low = 0;
    int64_t high = dir->n_tensors;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        int order = strcmp(name, dir->tensors[middle].name);
        if (order == 0) {
            return &dir->tensors[middle];
        }
        if (order < 0) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return NULL;
}

/* ---- other names ---- */

static const qs_st_rename *rule_for(const char *name, const qs_st_rename *rules, int count)
{
    for (int i = 0; i < count; i++) {
        if (strncmp(name, rules[i].from, strlen(rules[i].from)) == 0) {
            return &rules[i];
        }
    }
    return NULL;
}

static qs_status rename_one(const qs_st_dir *dir, qs_st_tensor *t, const qs_st_rename *rule)
{
    const char *rest = t->name + strlen(rule->from);
    const size_t bytes = strlen(rule->to) + strlen(rest) + 1;
    char *name = malloc(bytes);
    if (name == NULL) {
        return no_memory(dir->path);
    }
    (void)snprintf(name, bytes, "%s%s", rule->to, rest);
    free(t->name);
    t->name = name;
    return QS_OK;
}

qs_status qs_st_rename_tensors(qs_st_dir *dir, const qs_st_rename *rules, int count,
                               int64_t *left_out)
{
    const int64_t before = dir->n_tensors;
    int64_t kept = 0;
    for (int64_t i = 0; i < before; i++) { /* in front, so that a failure leaves all as it was */
        if (rule_for(dir->tensors[i].name, rules, count) == NULL) {
            return QS_FAIL(QS_ERR_INPUT_TENSOR,
                           "%s: tensor \"%.200s\" belongs to no part of the model that is known",
                           dir->files[dir->tensors[i].file].path, dir->tensors[i].name);
        }
    }
    for (int64_t i = 0; i < before; i++) {
        const qs_st_tensor t = dir->tensors[i];
        if (rule_for(t.name, rules, count)->to == NULL) {
            free(t.name);
        } else {
            dir->tensors[kept++] = t;
        }
    }
    dir->n_tensors = kept;
    *left_out = before - kept;
    for (int64_t i = 0; i < kept; i++) {
        qs_st_tensor *t = &dir->tensors[i];
        QS_TRY(rename_one(dir, t, rule_for(t->name, rules, count)));
    }
    return sort_tensors(dir);
}

qs_status qs_st_read(qs_st_dir *dir, const qs_st_tensor *tensor, int64_t first, int64_t bytes,
                     void *out)
{
    if (first < 0 || bytes < 0 || first > tensor->bytes - bytes) {
        return QS_FAIL(QS_ERR_BUG, "%s: bytes [%lld, +%lld) of %lld are asked for", tensor->name,
                       (long long)first, (long long)bytes, (long long)tensor->bytes);
    }
    const st_file *file = &dir->files[tensor->file];
    return qs_io_read_all(file->fd, out, (size_t)bytes, tensor->begin + first, file->path);
}

qs_status qs_st_read_f32(qs_st_dir *dir, const qs_st_tensor *tensor, int64_t first, int64_t count,
                         float *out)
{
    qs_dtype dtype;
    if (qs_st_to_dtype(tensor->dtype, &dtype) != 0) {
        return QS_FAIL(QS_ERR_INPUT_UNKNOWN,
                       "%s: tensor \"%.200s\": dtype %s cannot be read as floats; F32, F16 and "
                       "BF16 can",
                       dir->files[tensor->file].path, tensor->name,
                       qs_st_dtype_name(tensor->dtype));
    }
    int64_t size = (int64_t)qs_dtype_bytes(dtype);
    uint8_t *piece = malloc((size_t)(CONVERT_ELEMS * size));
    if (piece == NULL) {
        return no_memory(tensor->name);
    }
    qs_status st = QS_OK;
    for (int64_t at = 0; at < count && st == QS_OK; at += CONVERT_ELEMS) {
        int64_t n = count - at < CONVERT_ELEMS ? count - at : CONVERT_ELEMS;
        st = qs_st_read(dir, tensor, (first + at) * size, n * size, piece);
        if (st == QS_OK) {
            qs_f32_load(out + at, piece, dtype, n);
        }
    }
    free(piece);
    return st;
}
