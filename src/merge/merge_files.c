/* What a checkpoint directory holds beside its weights: config.json, the index, and copies of the
 * tokenizer's files. */
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/log.h"
#include "hf/chat_template.h"
#include "hf/hf_text_part.h"
#include "merge/merge_impl.h"
#include "store/hash.h"
#include "store/io.h"
#include "store/json.h"

enum {
    PATH_ROOM = QS_PATH_MAX + 128,
    CONFIG_BYTES_MAX = 1 << 20,
    TEMPLATES_MAX = 64, /* beside the default one */
};

static qs_status no_memory(const char *path)
{
    return QS_FAIL(QS_ERR_MEMORY, "%s: no memory", path);
}

static qs_status write_text(const char *dir, const char *name, const char *text)
{
    char path[PATH_ROOM];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    return text != NULL ? qs_io_write_new(path, text, strlen(text)) : no_memory(path);
}

/* ---- config.json ---- */

/* As short as brings every number back: 1e-5 for what 17 digits call 1.0000000000000001e-05. */
static size_t shortest_precision(const json_t *root)
{
    size_t digits = 8;
    for (bool same = false; digits < 17 && !same; digits += !same) {
        char *text = json_dumps(root, JSON_REAL_PRECISION(digits));
        json_t *again = text != NULL ? json_loads(text, 0, NULL) : NULL;
        same = again != NULL && json_equal(root, again);
        json_decref(again);
        free(text);
    }
    return digits;
}

/* The type under the name that the source uses: "torch_dtype" (transformers 4), "dtype" (5) or
 * both; a file that leaves it out gets the older one, which both read. */
static void set_dtype(json_t *root, qs_dtype dtype)
{
    static const char *const names[] = {
        [QS_F32] = "float32", [QS_BF16] = "bfloat16", [QS_F16] = "float16"};
    bool now = json_object_get(root, "dtype") != NULL;
    if (now) {
        json_object_set_new(root, "dtype", json_string(names[dtype]));
    }
    if (!now || json_object_get(root, "torch_dtype") != NULL) {
        json_object_set_new(root, "torch_dtype", json_string(names[dtype]));
    }
}

qs_status qs_merge_put_config(const qs_merge_job *job, const char *dir)
{
    json_t *root = NULL;
    QS_TRY(qs_json_parse(&root, job->config_text, strlen(job->config_text), "config.json"));
    json_object_del(root, "quantization_config");
    set_dtype(root, job->dtype);
    size_t digits = shortest_precision(root);
    char *text = json_dumps(root, JSON_INDENT(2) | JSON_REAL_PRECISION(digits));
    json_decref(root);
    qs_status st = write_text(dir, "config.json", text);
    free(text);
    return st;
}

bool qs_merge_names_dtype(const qs_merge_job *job)
{
    json_t *root = json_loads(job->config_text, 0, NULL); /* has been parsed before */
    const json_t *old = json_object_get(root, "torch_dtype");
    const json_t *now = json_object_get(root, "dtype");
    bool named = json_is_string(old) || json_is_string(now);
    json_decref(root);
    return named;
}

/* ---- the index ---- */

void qs_merge_file_name(const qs_merge_job *job, int file, char *out, size_t capacity)
{
    if (job->n_files == 1) {
        snprintf(out, capacity, "model.safetensors");
    } else {
        snprintf(out, capacity, "model-%05d-of-%05d.safetensors", file + 1, job->n_files);
    }
}

qs_status qs_merge_put_index(const qs_merge_job *job, const char *dir)
{
    json_t *map = json_object();
    int failed = 0;
    for (int i = 0; i < job->n_tensors; i++) {
        char name[64];
        qs_merge_file_name(job, job->tensors[i].file, name, sizeof name);
        failed |= json_object_set_new(map, job->tensors[i].name, json_string(name));
    }
    json_t *root = json_pack("{s:{s:I}, s:o}", "metadata", "total_size", (json_int_t)job->bytes,
                             "weight_map", map);
    char *text = root != NULL && failed == 0 ? json_dumps(root, JSON_INDENT(2)) : NULL;
    json_decref(root);
    qs_status st = write_text(dir, "model.safetensors.index.json", text);
    free(text);
    return st;
}

/* ---- companions ---- */

/* Whether `dir` still holds the checkpoint that the base was made from, as far as config.json
 * tells. */
static bool is_source(const qs_merge_job *job, const char *dir)
{
    char path[PATH_ROOM];
    char *text = NULL;
    qs_hf_config config;
    json_t *theirs = NULL, *ours = NULL;
    snprintf(path, sizeof path, "%s/config.json", dir);
    bool same = strlen(dir) < QS_PATH_MAX &&
                qs_hf_config_read(&config, &text, path, CONFIG_BYTES_MAX) == QS_OK &&
                qs_json_parse(&theirs, text, strlen(text), path) == QS_OK &&
                qs_json_parse(&ours, job->index->config_text, strlen(job->index->config_text),
                              path) == QS_OK &&
                json_equal(theirs, ours);
    qs_error_clear(); /* a checkpoint that has gone is no error here */
    json_decref(theirs);
    json_decref(ours);
    free(text);
    return same;
}

/* Whether tokenizer.json in `dir` is the one that quantize saw, where both are known. Two models of
 * one shape have the same config.json. */
static bool has_own_tokenizer(const qs_merge_job *job, const char *dir)
{
    const char *known = job->index->tokenizer_sha256;
    char path[PATH_ROOM], found[QS_SHA256_HEX] = "";
    void *text = NULL;
    size_t bytes = 0;
    snprintf(path, sizeof path, "%s/tokenizer.json", dir);
    if (known[0] != '\0' && access(path, F_OK) == 0 &&
        qs_io_read_file(path, QS_CHAT_FILE_MAX, &text, &bytes) == QS_OK) {
        qs_sha256_hex(text, bytes, found);
    }
    qs_error_clear(); /* one that cannot be read, copying it says */
    free(text);
    return found[0] == '\0' || strcmp(found, known) == 0;
}

/* Where the model's files are copied from; NULL: the checkpoint that the base was made from is not
 * there any more. */
static const char *companions_dir(const qs_merge_job *job)
{
    const char *given = job->options->original, *source = job->index->source_path;
    if (given != NULL && !has_own_tokenizer(job, given)) {
        qs_log_warn("%s: its tokenizer.json is not the one beside which the base was made; it is "
                    "copied as it is",
                    given);
    }
    if (given != NULL || !is_source(job, source)) {
        return given;
    }
    if (has_own_tokenizer(job, source)) {
        return source;
    }
    qs_log_warn("%s: its tokenizer.json is not the one beside which the base was made, so it holds "
                "another model now, and nothing is copied from there",
                source);
    return NULL;
}

static void note(char *list, size_t capacity, const char *name)
{
    size_t used = strlen(list);
    snprintf(list + used, capacity - used, " %s", name);
}

/* `chat_template`: in place of the one that a tokenizer_config.json holds; NULL: as it is. */
static qs_status copy_one(const char *from, const char *to, const char *name,
                          const char *chat_template, bool *found)
{
    char source[PATH_ROOM], target[PATH_ROOM];
    char *other = NULL;
    void *data = NULL;
    size_t bytes = 0;
    snprintf(source, sizeof source, "%s/%s", from, name);
    snprintf(target, sizeof target, "%s/%s", to, name);
    *found = access(source, F_OK) == 0;
    if (!*found) {
        return QS_OK;
    }
    QS_TRY(qs_io_read_file(source, QS_CHAT_FILE_MAX, &data, &bytes));
    qs_status st = QS_OK;
    if (chat_template != NULL && strcmp(name, "tokenizer_config.json") == 0) {
        QS_GOTO(qs_chat_template_replace(data, bytes, chat_template, source, &other));
        bytes = strlen(other);
    }
    st = qs_io_write_new(target, other != NULL ? other : data, bytes);
done:
    free(other);
    free(data);
    return st;
}

static bool is_template(const char *name)
{
    const size_t length = strlen(name), suffix = strlen(".jinja");
    return length > suffix && strcmp(name + length - suffix, ".jinja") == 0;
}

/* One that is listed is read, or the merge fails: a link to nothing is no reason to lose it. */
static qs_status copy_template(const char *from, const char *to, const char *name)
{
    char *source = NULL, *target = NULL;
    void *data = NULL;
    size_t bytes = 0;
    qs_status st = QS_OK;
    QS_GOTO(qs_io_join(&source, from, name));
    QS_GOTO(qs_io_join(&target, to, name));
    QS_GOTO(qs_io_read_file(source, QS_CHAT_FILE_MAX, &data, &bytes));
    QS_GOTO(qs_io_mkdir(to));
    QS_GOTO(qs_io_write_new(target, data, bytes));
done:
    free(data);
    free(target);
    free(source);
    return st;
}

typedef struct {
    const char *from, *to;
    int count;
} template_copy;

static qs_status copy_entry(void *user, int dir, const char *name)
{
    template_copy *copy = user;
    (void)dir;
    if (!is_template(name)) {
        return QS_OK;
    }
    if (++copy->count > TEMPLATES_MAX) {
        return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: holds more than %d templates", copy->from,
                       TEMPLATES_MAX);
    }
    return copy_template(copy->from, copy->to, name);
}

/* Named templates for tools or documents, which transformers 4.5x writes into a directory of their
 * own; whatever else is in there stays. */
static qs_status copy_templates(const char *from_dir, const char *to_dir, bool *found)
{
    char from[PATH_ROOM], to[PATH_ROOM];
    template_copy copy = {from, to, 0};
    struct stat info;
    *found = false;
    snprintf(from, sizeof from, "%s/" QS_MERGE_TEMPLATES, from_dir);
    snprintf(to, sizeof to, "%s/" QS_MERGE_TEMPLATES, to_dir);
    if (stat(from, &info) == 0 && !S_ISDIR(info.st_mode)) {
        return QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: is not a directory", from);
    }
    QS_TRY(qs_io_list(from, QS_ERR_INPUT_MISSING, copy_entry, &copy, NULL));
    *found = copy.count > 0;
    return *found ? qs_io_fsync_dir(to) : QS_OK;
}

/* The template to write: the training data's, unless the model comes with the same one, or it is
 * not known. */
static qs_status choose_template(const qs_merge_job *job, const char *from, const char **out)
{
    char *own = NULL;
    *out = job->options->chat_template;
    if (*out == NULL || from == NULL) {
        return QS_OK;
    }
    QS_TRY(qs_chat_template_of_model(from, &own));
    if (own != NULL && strcmp(own, *out) == 0) {
        *out = NULL;
    }
    free(own);
    return QS_OK;
}

qs_status qs_merge_copy_companions(const qs_merge_job *job, const char *dir,
                                   qs_merge_report *report)
{
    static const char *const names[] = {"tokenizer.json",
                                        "tokenizer_config.json",
                                        "special_tokens_map.json",
                                        "added_tokens.json",
                                        "vocab.json",
                                        "merges.txt",
                                        "tokenizer.model",
                                        "chat_template.jinja",
                                        "chat_template.json",
                                        "generation_config.json"};
    const char *from = companions_dir(job), *chat_template = NULL;
    snprintf(report->source, sizeof report->source, "%s", from != NULL ? from : "");
    QS_TRY(choose_template(job, from, &chat_template));
    if (chat_template != NULL) {
        QS_TRY(write_text(dir, QS_CHAT_TEMPLATE_NAME, chat_template));
        report->other_template = true;
    }
    bool found = false;
    if (from != NULL && chat_template == NULL) {
        QS_TRY(copy_templates(from, dir, &found));
    }
    if (found) { /* most models have none: nobody misses them */
        note(report->copied, sizeof report->copied, QS_MERGE_TEMPLATES);
    }
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        found = false;
        if (chat_template != NULL && strncmp(names[i], "chat_template.", 14) == 0) {
            continue;
        }
        if (from != NULL) {
            QS_TRY(copy_one(from, dir, names[i], chat_template, &found));
        }
        if (found) {
            note(report->copied, sizeof report->copied, names[i]);
        } else {
            note(report->missing, sizeof report->missing, names[i]);
        }
    }
    return QS_OK;
}
