/* qshard.json beside an adapter: which base it was trained on. peft has no such field, and some of
 * its versions refuse an adapter_config.json with keys that they do not know; files that they do
 * not know they leave alone. */
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "lora/lora_impl.h"
#include "store/io.h"
#include "store/json.h"

enum { ORIGIN_BYTES_MAX = 64 << 10 };

char *qs_peft_origin_text(const char *base_sha256)
{
    json_t *root = json_pack("{s:s}", "base_sha256", base_sha256);
    char *text = root != NULL ? json_dumps(root, JSON_INDENT(2)) : NULL;
    json_decref(root);
    return text;
}

bool qs_peft_is_hash(const char *text)
{
    return strspn(text, "0123456789abcdef") == QS_SHA256_HEX - 1 && text[QS_SHA256_HEX - 1] == '\0';
}

static qs_status parse(char out[QS_SHA256_HEX], const char *text, size_t bytes, const char *path)
{
    json_t *root = NULL;
    QS_TRY(qs_json_parse(&root, text, bytes, path));
    const char *found = json_string_value(json_object_get(root, "base_sha256"));
    const bool good = found != NULL && qs_peft_is_hash(found);
    memcpy(out, good ? found : "", good ? QS_SHA256_HEX : 1);
    json_decref(root);
    return good ? QS_OK
                : QS_FAIL(QS_ERR_INPUT_VALUE,
                          "%s: base_sha256 is not the hash of a base; export the adapter again, or "
                          "remove the file",
                          path);
}

qs_status qs_peft_read_base(const char *dir, char out[QS_SHA256_HEX])
{
    qs_status st = QS_OK;
    char *path = NULL;
    void *text = NULL;
    size_t bytes = 0;
    out[0] = '\0';
    QS_TRY(qs_io_join(&path, dir, QS_PEFT_ORIGIN_NAME));
    if (access(path, F_OK) == 0) {
        QS_GOTO(qs_io_read_file(path, ORIGIN_BYTES_MAX, &text, &bytes));
        QS_GOTO(parse(out, text, bytes, path));
    }
done:
    free(text);
    free(path);
    return st;
}

qs_status qs_peft_expect_base(const char *dir, const char *base_sha256, const char *base)
{
    char trained[QS_SHA256_HEX];
    QS_TRY(qs_peft_read_base(dir, trained));
    return trained[0] == '\0' || strcmp(trained, base_sha256) == 0
               ? QS_OK
               : QS_FAIL(QS_ERR_INPUT_HASH,
                         "%s: was trained on a base with hash %.12s..., %s has %.12s...; give that "
                         "base, or remove " QS_PEFT_ORIGIN_NAME
                         " from the adapter to take it over this one",
                         dir, trained, base, base_sha256);
}
