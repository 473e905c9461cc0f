/* Where a base came from, without a look at anything else in it. */
#include <stdlib.h>

#include "store/json.h"
#include "weights/base_impl.h"

static void copy_text(char out[QS_BASE_ORIGIN_BYTES], const json_t *value)
{
    const char *text = json_string_value(value);
    (void)snprintf(out, QS_BASE_ORIGIN_BYTES, "%s", text != NULL ? text : "");
}

qs_base_origin qs_base_read_origin(const char *path)
{
    qs_h5 *file = NULL;
    json_t *index = NULL;
    char *text = NULL;
    size_t bytes = 0;
    qs_base_origin from = {.path = ""};
    if (qs_h5_open(&file, path) == QS_OK && qs_h5_expect_format(file, "qshard-base", 1) == QS_OK &&
        qs_base_read_index_text(file, &text, &bytes) == QS_OK &&
        qs_json_parse(&index, text, bytes, path) == QS_OK) {
        copy_text(from.path, json_object_get(json_object_get(index, "source"), "path"));
        copy_text(from.name_or_path,
                  json_object_get(json_object_get(index, "config"), "_name_or_path"));
    }
    (void)qs_h5_close(file);
    qs_error_clear();
    json_decref(index);
    free(text);
    return from;
}
