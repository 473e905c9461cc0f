/* What a model of text and images says of its text part, and under which names it has it.
 *
 * transformers 5 takes the type of the weights, quantization_config and the ids that end a text
 * from the file around text_config, and everything else of the text part from text_config with the
 * defaults of its class. Whether the head is tied both may say: version 4 goes by text_config, 5 by
 * the other and then by whether the head is there. */
#include "hf/hf_text_part.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/log.h"
#include "hf/hf_config_impl.h"
#include "store/io.h"

/* Those whose text part attends like the model of text alone. That of others, as PaliGemma, sees
 * all of a prompt. */
static const struct {
    const char *model_type, *class_name, *text_type;
} wrappers[] = {
    {"gemma3", "Gemma3ForConditionalGeneration", "gemma3_text"},
    {"mistral3", "Mistral3ForConditionalGeneration", "mistral"},
};

/* Of the model around the text part: what is none of the text part's business. */
static const char *const own_keys[] = {
    "architectures",        "model_type",
    "text_config",          "vision_config",
    "image_token_index",    "image_token_id",
    "boi_token_index",      "boi_token_id",
    "eoi_token_index",      "eoi_token_id",
    "mm_tokens_per_image",  "multimodal_projector_bias",
    "projector_hidden_act", "spatial_merge_size",
    "vision_feature_layer", "tie_word_embeddings", /* this and the types: below */
    "torch_dtype",          "dtype",
};

/* What counts for the text part as it stands here. */
static const char *const taken_keys[] = {
    "_name_or_path",      "add_cross_attention", "bos_token_id", "eos_token_id",
    "is_encoder_decoder", "quantization_config", "pad_token_id", "transformers_version",
};

static int find_wrapper(const char *model_type)
{
    for (int i = 0; i < (int)QS_HF_COUNT(wrappers); i++) {
        if (model_type != NULL && strcmp(wrappers[i].model_type, model_type) == 0) {
            return i;
        }
    }
    return -1;
}

bool qs_hf_is_text_part(const char *wrapper, const char *model_type)
{
    const int w = find_wrapper(wrapper);
    return w >= 0 && strcmp(wrappers[w].text_type, model_type) == 0;
}

void qs_hf_config_name(const qs_hf_config *config, char out[QS_HF_NAME_BYTES])
{
    snprintf(out, QS_HF_NAME_BYTES, "%s%s%s", config->model_type,
             config->part_of[0] != '\0' ? ", the text part of " : "", config->part_of);
}

/* ---- config.json ---- */

static qs_status check_keys(const json_t *root, const char *path)
{
    qs_hf_names unknown = {.count = 0};
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)(uintptr_t)root, key, value)
    {
        if (!json_is_null(value) && !qs_hf_listed(own_keys, QS_HF_COUNT(own_keys), key) &&
            !qs_hf_listed(taken_keys, QS_HF_COUNT(taken_keys), key) && !qs_hf_is_harmless(key)) {
            qs_hf_names_add(&unknown, key);
        }
    }
    const int count = qs_hf_names_end(&unknown);
    return count == 0 ? QS_OK
                      : QS_FAIL(QS_ERR_INPUT_UNKNOWN,
                                "%s: %s %s %s not known beside \"text_config\"; remove what does "
                                "not change the maths from a copy of the file",
                                path, count == 1 ? "key" : "keys", unknown.text,
                                count == 1 ? "is" : "are");
}

static qs_status check_class(int w, const json_t *root, const char *path)
{
    const json_t *list = qs_hf_given(root, "architectures");
    for (size_t i = 0; i < json_array_size(list); i++) {
        const char *name = json_string_value(json_array_get(list, i));
        if (name == NULL || strcmp(name, wrappers[w].class_name) != 0) {
            return qs_hf_refuse(path, "architectures", name != NULL ? name : "?",
                                wrappers[w].class_name);
        }
    }
    return QS_OK;
}

/* The classes make a text part of their own type where none is named. */
static qs_status check_text(int w, const json_t *text, const char *path)
{
    const char *type = wrappers[w].text_type;
    if (qs_hf_given(text, "model_type") != NULL) {
        QS_TRY(qs_json_text(text, "model_type", &type, path));
    }
    if (strcmp(type, wrappers[w].text_type) != 0) {
        return qs_hf_refuse(path, "model_type", type, wrappers[w].text_type);
    }
    return qs_hf_given(text, "quantization_config") == NULL
               ? QS_OK
               : QS_FAIL(QS_ERR_INPUT_UNKNOWN,
                         "%s: \"quantization_config\" is not supported here, where no class of "
                         "transformers reads it, but beside \"text_config\"",
                         path);
}

static void take_types(json_t *text, const json_t *root)
{
    static const char *const keys[] = {"torch_dtype", "dtype"};
    bool given = false;
    for (size_t i = 0; i < QS_HF_COUNT(keys); i++) {
        given = given || qs_hf_given(root, keys[i]) != NULL;
    }
    for (size_t i = 0; i < QS_HF_COUNT(keys) && given; i++) {
        json_object_del(text, keys[i]);
        if (qs_hf_given(root, keys[i]) != NULL) {
            json_object_set(text, keys[i], json_object_get(root, keys[i]));
        }
    }
}

/* true here and false in text_config is what transformers 5 writes of a head of its own that it has
 * found in the file. */
static qs_status take_tied(json_t *text, const json_t *root, const char *path)
{
    static const char key[] = "tie_word_embeddings";
    const json_t *outer = qs_hf_given(root, key), *inner = qs_hf_given(text, key);
    if (json_is_false(outer) && json_is_true(inner)) {
        return QS_FAIL(QS_ERR_INPUT_VALUE,
                       "%s: \"%s\" is false, but true in text_config; in a copy of the file make "
                       "it true in both, or false if there is a tensor lm_head.weight",
                       path, key);
    }
    if (outer != NULL && inner == NULL) {
        json_object_set(text, key, (json_t *)(uintptr_t)outer);
    }
    return QS_OK;
}

/* `where`: the path that messages about text_config begin with. */
static qs_status make_text_config(char **out, int w, const json_t *root, const char *path,
                                  const char *where)
{
    const json_t *given = NULL;
    qs_status st = QS_OK;
    QS_TRY(qs_json_object(root, "text_config", &given, path));
    QS_TRY(check_class(w, root, path));
    QS_TRY(check_keys(root, path));
    QS_TRY(check_text(w, given, where));
    json_t *text = json_deep_copy(given);
    json_object_set_new(text, "model_type", json_string(wrappers[w].text_type));
    json_object_set_new(text, "architectures",
                        json_pack("[s]", qs_hf_arch_find(wrappers[w].text_type)->class_name));
    for (size_t i = 0; i < QS_HF_COUNT(taken_keys); i++) {
        if (qs_hf_given(root, taken_keys[i]) != NULL) {
            json_object_set(text, taken_keys[i], json_object_get(root, taken_keys[i]));
        }
    }
    take_types(text, root);
    QS_GOTO(take_tied(text, root, path));
    *out = json_dumps(text, JSON_INDENT(2));
    st = *out != NULL ? QS_OK : QS_FAIL(QS_ERR_MEMORY, "%s: no memory", path);
done:
    json_decref(text);
    return st;
}

/* "DIR/config.json: text_config" */
static char *text_path(const char *path)
{
    static const char format[] = "%s: text_config";
    const size_t bytes = strlen(path) + sizeof format;
    char *where = malloc(bytes);
    if (where != NULL) {
        snprintf(where, bytes, format, path);
    }
    return where;
}

qs_status qs_hf_text_part(char **out, char part_of[QS_HF_TYPE_BYTES], const char *text,
                          size_t bytes, const char *path)
{
    json_t *root = NULL;
    char *where = NULL;
    qs_status st = QS_OK;
    *out = NULL;
    part_of[0] = '\0';
    QS_TRY(qs_json_parse(&root, text, bytes, path));
    const int w = find_wrapper(json_string_value(json_object_get(root, "model_type")));
    if (w >= 0) {
        where = text_path(path);
        st = where != NULL ? make_text_config(out, w, root, path, where)
                           : QS_FAIL(QS_ERR_MEMORY, "%s: no memory", path);
        snprintf(part_of, QS_HF_TYPE_BYTES, "%s", st == QS_OK ? wrappers[w].model_type : "");
    }
    free(where);
    json_decref(root);
    return st;
}

/* The name of a model on a hub, the file with its weights, or a folder above the model's (a cache
 * of the Hub) is what is given by mistake. */
qs_status qs_hf_check_folder(const char *hf_dir)
{
    struct stat info;
    char *path = NULL;
    if (stat(hf_dir, &info) != 0) {
        return QS_FAIL(QS_ERR_INPUT_MISSING,
                       "%s: %s; nothing is downloaded: name a folder with config.json and "
                       "safetensors, as hf download ORG/MODEL --local-dir FOLDER makes it",
                       hf_dir, strerror(errno));
    }
    if (!S_ISDIR(info.st_mode)) {
        return QS_FAIL(QS_ERR_INPUT_FORMAT,
                       "%s: is a file; name the folder with config.json and safetensors", hf_dir);
    }
    QS_TRY(qs_io_join(&path, hf_dir, "config.json"));
    const bool there = lstat(path, &info) == 0 || errno != ENOENT; /* else opening it says why */
    free(path);
    return there ? QS_OK
                 : QS_FAIL(QS_ERR_INPUT_MISSING,
                           "%s: holds no config.json; name the folder with config.json and "
                           "safetensors, in a cache of the Hub snapshots/...",
                           hf_dir);
}

qs_status qs_hf_config_read(qs_hf_config *out, char **text, const char *path, size_t max_bytes)
{
    qs_status st = QS_OK;
    void *whole = NULL;
    char *part = NULL, *where = text_path(path), part_of[QS_HF_TYPE_BYTES];
    size_t bytes = 0;
    if (where == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory", path);
    }
    QS_GOTO(qs_io_read_file(path, max_bytes, &whole, &bytes));
    QS_GOTO(qs_hf_text_part(&part, part_of, whole, bytes, path));
    QS_GOTO(part != NULL ? qs_hf_config_parse(out, part, strlen(part), where)
                         : qs_hf_config_parse(out, whole, bytes, path));
    strcpy(out->part_of, part_of);
    if (text != NULL) {
        *text = part != NULL ? part : whole;
        whole = part != NULL ? whole : NULL;
        part = NULL;
    }
done:
    free(part);
    free(whole);
    free(where);
    return st;
}

/* ---- tensors ---- */

enum { SPELLINGS = 2, RULES = 4 };

/* How transformers 4 and the Hub have them, and how some files that version 5 wrote do. */
static const qs_st_rename spellings[SPELLINGS][RULES] = {
    {{"language_model.model.", "model."},
     {"language_model.lm_head.", "lm_head."},
     {"vision_tower.", NULL},
     {"multi_modal_projector.", NULL}},
    {{"model.language_model.", "model."},
     {"lm_head.", "lm_head."},
     {"model.vision_tower.", NULL},
     {"model.multi_modal_projector.", NULL}},
};

/* A tensor of layers or embedding in each spelling, NULL where there is none. */
static void find_spellings(const qs_st_dir *dir, const char *found[SPELLINGS])
{
    for (int64_t i = 0; i < qs_st_count(dir); i++) {
        const char *name = qs_st_at(dir, i)->name;
        for (int s = 0; s < SPELLINGS; s++) {
            const char *prefix = spellings[s][0].from;
            found[s] = strncmp(name, prefix, strlen(prefix)) == 0 ? name : found[s];
        }
    }
}

qs_status qs_hf_take_text_tensors(qs_st_dir *dir, const qs_hf_config *config)
{
    const char *found[SPELLINGS] = {NULL, NULL};
    int64_t left_out = 0;
    if (config->part_of[0] == '\0') {
        return QS_OK;
    }
    find_spellings(dir, found);
    if (found[0] == NULL && found[1] == NULL) {
        return QS_FAIL(QS_ERR_INPUT_TENSOR,
                       "%s: has no tensor of the text part of %s, %s... or %s...", qs_st_path(dir),
                       config->part_of, spellings[0][0].from, spellings[1][0].from);
    }
    if (found[0] != NULL && found[1] != NULL) {
        return QS_FAIL(QS_ERR_INPUT_TENSOR,
                       "%s: tensors \"%.200s\" and \"%.200s\": names of the text part are "
                       "expected in one spelling",
                       qs_st_path(dir), found[0], found[1]);
    }
    QS_TRY(qs_st_rename_tensors(dir, spellings[found[0] != NULL ? 0 : 1], RULES, &left_out));
    qs_log_info(
        "%s: the text part of %s, which alone is trained; %lld tensors of its other parts are "
        "left out",
        qs_st_path(dir), config->part_of, (long long)left_out);
    return QS_OK;
}
