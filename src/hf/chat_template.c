#include "hf/chat_template.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "store/io.h"
#include "store/json.h"

#define KEY "chat_template"

static qs_status no_memory(const char *path)
{
    return QS_FAIL(QS_ERR_MEMORY, "%s: no memory", path);
}

/* DIR/NAME, whole; *text NULL where there is none. */
static qs_status read_there(const char *dir, const char *name, size_t limit, char **path,
                            char **text, size_t *bytes)
{
    void *data = NULL;
    *text = NULL;
    QS_TRY(qs_io_join(path, dir, name));
    if (access(*path, F_OK) != 0) {
        return QS_OK;
    }
    QS_TRY(qs_io_read_file(*path, limit, &data, bytes));
    *text = data;
    return QS_OK;
}

qs_status qs_chat_template_read(const char *dir, char **text)
{
    char *path = NULL;
    size_t bytes = 0;
    qs_status st =
        read_there(dir, QS_CHAT_TEMPLATE_NAME, QS_CHAT_TEMPLATE_MAX, &path, text, &bytes);
    if (st == QS_OK && *text != NULL && (strlen(*text) != bytes || !qs_json_is_utf8(*text))) {
        st = QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: is not a text in UTF-8", path);
    }
    free(path);
    if (st != QS_OK) {
        free(*text);
        *text = NULL;
    }
    return st;
}

/* ---- tokenizer_config.json ---- */

static qs_status parse_config(json_t **root, const char *config, size_t bytes, const char *path)
{
    QS_TRY(qs_json_parse_texts(root, config, bytes, path));
    if (!json_is_object(*root)) {
        json_decref(*root);
        *root = NULL;
        return QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: is not a JSON object", path);
    }
    return QS_OK;
}

/* A string, or a list of named ones; NULL where it is neither. */
static const char *default_of(const json_t *value)
{
    for (size_t i = 0; i < json_array_size(value); i++) {
        const json_t *entry = json_array_get(value, i);
        const char *name = json_string_value(json_object_get(entry, "name"));
        if (name != NULL && strcmp(name, "default") == 0) {
            return json_string_value(json_object_get(entry, "template"));
        }
    }
    return json_string_value(value);
}

static qs_status read_from_config(const char *dir, char **text)
{
    char *path = NULL, *config = NULL;
    size_t bytes = 0;
    json_t *root = NULL;
    qs_status st = QS_OK;
    QS_GOTO(read_there(dir, "tokenizer_config.json", QS_CHAT_FILE_MAX, &path, &config, &bytes));
    if (config != NULL) {
        QS_GOTO(parse_config(&root, config, bytes, path));
        const char *found = default_of(json_object_get(root, KEY));
        *text = found != NULL ? strdup(found) : NULL;
        if (found != NULL && *text == NULL) {
            QS_GOTO(no_memory(path));
        }
    }
done:
    json_decref(root);
    free(config);
    free(path);
    return st;
}

qs_status qs_chat_template_of_model(const char *dir, char **text)
{
    char *path = NULL;
    size_t bytes = 0;
    qs_status st = read_there(dir, QS_CHAT_TEMPLATE_NAME, QS_CHAT_FILE_MAX, &path, text, &bytes);
    free(path);
    QS_TRY(st);
    return *text != NULL ? QS_OK : read_from_config(dir, text);
}

/* ---- another template in the same text ---- */

/* The following walk over a text that is known to be JSON. It is not written anew from what was
 * parsed: numbers of more than 64 bits would not come back. */

static const char *skip_space(const char *at)
{
    return at + strspn(at, " \t\r\n,:");
}

static const char *skip_string(const char *at)
{
    for (at++; *at != '"'; at++) {
        at += *at == '\\';
    }
    return at + 1;
}

static const char *skip_value(const char *at)
{
    int depth = 0;
    if (*at != '"' && *at != '{' && *at != '[') {
        return at + strcspn(at, " \t\r\n,}");
    }
    do {
        if (*at == '"') {
            at = skip_string(at);
        } else {
            depth += (*at == '{' || *at == '[') - (*at == '}' || *at == ']');
            at++;
        }
    } while (depth > 0);
    return at;
}

static bool is_key(const char *at, const char *end)
{
    json_t *name = json_loadb(at, (size_t)(end - at), JSON_DECODE_ANY, NULL);
    const char *text = json_string_value(name);
    const bool same = text != NULL && strcmp(text, KEY) == 0;
    json_decref(name);
    return same;
}

/* Where the value of our key stands; NULL: nowhere. */
static const char *find_value(const char *config, const char **end)
{
    const char *at = skip_space(skip_space(config) + 1); /* behind the brace */
    while (*at == '"') {
        const char *key = at;
        const char *behind = skip_string(key);
        const char *value = skip_space(behind);
        *end = skip_value(value);
        if (is_key(key, behind)) {
            return value;
        }
        at = skip_space(*end);
    }
    return NULL;
}

qs_status qs_chat_template_replace(const char *config, size_t bytes, const char *chat_template,
                                   const char *path, char **out)
{
    json_t *root = NULL, *ours = NULL;
    char *quoted = NULL;
    const char *end = config;
    qs_status st = QS_OK;
    *out = NULL;
    QS_GOTO(parse_config(&root, config, bytes, path)); /* no NUL in it, either */
    ours = json_string(chat_template);
    quoted = ours != NULL ? json_dumps(ours, JSON_ENCODE_ANY) : NULL;
    const char *value = find_value(config, &end);
    const size_t room = bytes + (quoted != NULL ? strlen(quoted) : 0) + 1;
    *out = quoted != NULL ? malloc(room) : NULL;
    if (*out == NULL) {
        QS_GOTO(no_memory(path));
    }
    if (value == NULL) {
        snprintf(*out, room, "%s", config);
    } else {
        snprintf(*out, room, "%.*s%s%s", (int)(value - config), config, quoted, end);
    }
done:
    free(quoted);
    json_decref(ours);
    json_decref(root);
    return st;
}
