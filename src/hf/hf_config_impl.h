/* What the readers of config.json share: hf_config.c and hf_rope.c. `path` is for messages. */
#ifndef QS_HF_HF_CONFIG_IMPL_H
#define QS_HF_HF_CONFIG_IMPL_H

#include "hf/hf_arch.h"
#include "hf/hf_config.h"
#include "store/json.h"

#define QS_HF_COUNT(array) (sizeof(array) / sizeof *(array))

bool qs_hf_listed(const char *const *list, size_t count, const char *key);

/** Is it a key that changes nothing in any model? */
bool qs_hf_is_harmless(const char *key);

/** The member, NULL where it is absent or null: both mean the default. */
const json_t *qs_hf_given(const json_t *object, const char *key);

/** QS_ERR_INPUT_UNKNOWN: `value` of `key` is not supported, `known` is. */
qs_status qs_hf_refuse(const char *path, const char *key, const char *value, const char *known);

/** Names in the order of the file, as they stand in a message: `"a", "b" and 3 more`. */
typedef struct {
    char text[700]; /* an error's has 2048 bytes */
    size_t used;
    int count, left_out;
} qs_hf_names;
void qs_hf_names_add(qs_hf_names *names, const char *name);
/** Behind the last one; then `text` is complete. \return how many there are. */
int qs_hf_names_end(qs_hf_names *names);

/** Members within [low, high]; `fallback` where they are not given. */
qs_status qs_hf_get_i64(const json_t *root, const char *key, int64_t low, int64_t high,
                        int64_t fallback, int64_t *out, const char *path);
qs_status qs_hf_get_f64(const json_t *root, const char *key, double low, double high,
                        double fallback, double *out, const char *path);
qs_status qs_hf_get_bool(const json_t *root, const char *key, bool fallback, bool *out,
                         const char *path);

/** All that begins with rope; the sizes and windows of `out` are there. */
qs_status qs_hf_rope_parse(qs_hf_config *out, const qs_hf_arch *arch, const json_t *root,
                           const char *path);

#endif
