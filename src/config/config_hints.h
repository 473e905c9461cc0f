/* What other trainers call keys and values, and what else an unknown key may have meant: for
 * messages only. */
#ifndef QS_CONFIG_CONFIG_HINTS_H
#define QS_CONFIG_CONFIG_HINTS_H

#include <stdbool.h>
#include <stddef.h>

/** A key by another trainer's name for it; for messages only. */
typedef struct {
    const char *theirs, *ours;
} qs_other_name;
extern const qs_other_name qs_other_names[];
extern const int qs_other_names_count;

/** What another trainer calls something that is no key here, and where it is. */
typedef struct {
    const char *theirs, *says;
} qs_other_remark;
extern const qs_other_remark qs_other_remarks[];
extern const int qs_other_remarks_count;

/** What another trainer calls a value of `key`, and how the message goes on behind it. */
typedef struct {
    const char *key, *theirs, *says;
} qs_other_value;
extern const qs_other_value qs_other_values[];
extern const int qs_other_values_count;

/** The key that `name` says without its section, or in another trainer's word; NULL: none, or
 * several. */
const char *qs_key_meant(const char *name);

/** What does here what another trainer calls `name`; NULL: nothing is known. */
const char *qs_key_remark(const char *name);

/** Room for any hint. */
enum { QS_KEY_HINT_MAX = 160 };

/** The end of the message for the unknown key `name`: the key that it was meant for, by its
 * spelling or by its name in other trainers, or what that is here, or else where all keys stand. A
 * section is meant only by what `holds_keys` itself. */
void qs_key_hint(const char *name, bool holds_keys, char *out, size_t capacity);

#endif
