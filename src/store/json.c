/* JSON from strangers, on Jansson.
 *
 * Jansson already refuses NaN, Infinity, invalid UTF-8, text after the end, integers past 64 bits
 * and NUL in strings. It descends by recursion up to a depth of 2048, so the depth is counted
 * before it sees the text. */
#include "store/json.h"

#include <math.h>
#include <string.h>

enum { MAX_DEPTH = 64 };

/* Brackets outside strings, without understanding anything else: malformed text is left to the
 * parser. */
static int deepest_level(const char *text, size_t bytes)
{
    int depth = 0;
    int deepest = 0;
    bool in_string = false;
    for (size_t i = 0; i < bytes; i++) {
        char c = text[i];
        if (in_string) {
            if (c == '\\') {
                i++;
            } else if (c == '"') {
                in_string = false;
            }
        } else if (c == '"') {
            in_string = true;
        } else if (c == '{' || c == '[') {
            depth++;
            deepest = depth > deepest ? depth : deepest;
        } else if (c == '}' || c == ']') {
            depth--;
        }
        if (deepest > MAX_DEPTH) {
            break;
        }
    }
    return deepest;
}

static qs_status parse(json_t **out, const char *text, size_t bytes, size_t flags, const char *path)
{
    json_error_t error;
    if (deepest_level(text, bytes) > MAX_DEPTH) {
        return QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: JSON is nested deeper than %d levels", path,
                       MAX_DEPTH);
    }
    json_t *value = json_loadb(text, bytes, JSON_REJECT_DUPLICATES | flags, &error);
    if (value == NULL) {
        return QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: not valid JSON: line %d, column %d: %s", path,
                       error.line, error.column, error.text);
    }
    *out = value;
    return QS_OK;
}

qs_status qs_json_parse(json_t **out, const char *text, size_t bytes, const char *path)
{
    return parse(out, text, bytes, 0, path);
}

qs_status qs_json_parse_texts(json_t **out, const char *text, size_t bytes, const char *path)
{
    return parse(out, text, bytes, JSON_DECODE_INT_AS_REAL, path);
}

bool qs_json_is_utf8(const char *text)
{
    json_t *value = json_string(text); /* NULL where it is not, or there is no memory */
    json_decref(value);
    return value != NULL;
}

static const char *type_name(const json_t *value)
{
    static const char *const names[] = {
        [JSON_OBJECT] = "an object",   [JSON_ARRAY] = "an array", [JSON_STRING] = "a string",
        [JSON_INTEGER] = "an integer", [JSON_REAL] = "a number",  [JSON_TRUE] = "true",
        [JSON_FALSE] = "false",        [JSON_NULL] = "null",
    };
    return names[json_typeof(value)];
}

/* The member, or an error that says whether it is absent or of the wrong type. */
static qs_status member(const json_t *object, const char *key, bool fits, const char *wanted,
                        const char *path)
{
    const json_t *value = json_object_get(object, key);
    if (value == NULL) {
        return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: key \"%s\" is missing; it should be %s", path, key,
                       wanted);
    }
    if (!fits) {
        return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: key \"%s\" is %s; it should be %s", path, key,
                       type_name(value), wanted);
    }
    return QS_OK;
}

qs_status qs_json_i64(const json_t *object, const char *key, int64_t low, int64_t high,
                      int64_t *out, const char *path)
{
    const json_t *value = json_object_get(object, key);
    QS_TRY(member(object, key, json_is_integer(value), "an integer", path));
    int64_t number = json_integer_value(value);
    if (number < low || number > high) {
        return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: \"%s\" = %lld is outside %lld ... %lld", path, key,
                       (long long)number, (long long)low, (long long)high);
    }
    *out = number;
    return QS_OK;
}

qs_status qs_json_f64(const json_t *object, const char *key, double low, double high, double *out,
                      const char *path)
{
    const json_t *value = json_object_get(object, key);
    QS_TRY(member(object, key, json_is_number(value), "a number", path));
    double number = json_number_value(value);
    if (!isfinite(number) || number < low || number > high) {
        return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: \"%s\" = %.17g is outside %g ... %g", path, key,
                       number, low, high);
    }
    *out = number;
    return QS_OK;
}

qs_status qs_json_text(const json_t *object, const char *key, const char **out, const char *path)
{
    const json_t *value = json_object_get(object, key);
    QS_TRY(member(object, key, json_is_string(value), "a string", path));
    *out = json_string_value(value);
    return QS_OK;
}

qs_status qs_json_object(const json_t *object, const char *key, const json_t **out,
                         const char *path)
{
    const json_t *value = json_object_get(object, key);
    QS_TRY(member(object, key, json_is_object(value), "an object", path));
    *out = value;
    return QS_OK;
}

qs_status qs_json_array(const json_t *object, const char *key, const json_t **out, const char *path)
{
    const json_t *value = json_object_get(object, key);
    QS_TRY(member(object, key, json_is_array(value), "an array", path));
    *out = value;
    return QS_OK;
}
