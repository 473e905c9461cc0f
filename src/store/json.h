/* Reading JSON that strangers wrote: Jansson with duplicate keys refused, depth and size limited,
 * and accessors that name file, key, value and range when they fail. */
#ifndef QS_STORE_JSON_H
#define QS_STORE_JSON_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

/** Parse `bytes` of text. NaN and Infinity, duplicate keys and depth over 64 are refused. Caller
 * decrefs *out. */
qs_status qs_json_parse(json_t **out, const char *text, size_t bytes, const char *path);

/** The same for files of which texts alone are wanted: whole numbers are read as doubles, because
 * tokenizers' files hold some of more than 64 bits. */
qs_status qs_json_parse_texts(json_t **out, const char *text, size_t bytes, const char *path);

/** Is it UTF-8, as every text in JSON is? */
bool qs_json_is_utf8(const char *text);

/** Required integer member in [low, high]. */
qs_status qs_json_i64(const json_t *object, const char *key, int64_t low, int64_t high,
                      int64_t *out, const char *path);
/** Required finite number in [low, high]. */
qs_status qs_json_f64(const json_t *object, const char *key, double low, double high, double *out,
                      const char *path);
/** Required string without NUL; borrowed from `object`. */
qs_status qs_json_text(const json_t *object, const char *key, const char **out, const char *path);
/** Required object or array member. */
qs_status qs_json_object(const json_t *object, const char *key, const json_t **out,
                         const char *path);
qs_status qs_json_array(const json_t *object, const char *key, const json_t **out,
                        const char *path);

#endif
