/* The table of configuration keys, shared by the files of this folder and by the checkpoint's
 * comparison. One row says everything about a key: name, type, default, range, where it is kept. */
#ifndef QS_CONFIG_CONFIG_KEYS_H
#define QS_CONFIG_CONFIG_KEYS_H

#include <stdbool.h>
#include <stddef.h>

#include "config/config.h"

typedef enum {
    QS_KEY_I64,
    QS_KEY_F64,
    QS_KEY_BOOL,
    QS_KEY_PATH,    /* char[QS_PATH_MAX] */
    QS_KEY_ENUM,    /* int or an enum of its size, index into `names` */
    QS_KEY_BYTES,   /* int64_t, with a suffix K, M, G or T */
    QS_KEY_TARGETS, /* uint32_t, bits */
    QS_KEY_PAIR,    /* two doubles, one after the other */
    QS_KEY_FLAGS,   /* uint32_t, a bit for each of `names` */
} qs_key_type;

enum { QS_KEY_NAMES_MAX = 5, QS_VALUE_ITEMS_MAX = 16 };

typedef struct {
    const char *name; /* "train.steps" */
    qs_key_type type;
    size_t offset;      /* in qs_config */
    const char *preset; /* the default, as it would stand in the file */
    double low, high;   /* inclusive */
    bool above_low;     /* `low` itself is not allowed */
    bool neutral;       /* may change when a run is resumed: it changes no bit of the result */
    const char *zero;   /* word that stands for 0 ("auto"), or NULL */
    const char *names[QS_KEY_NAMES_MAX]; /* of QS_KEY_I64: words that stand for -1, -2, ... */
    const char *unit;                    /* "steps"; "" without */
    const char *meaning;                 /* for the help and the dump's comments */
} qs_key;

extern const qs_key qs_keys[];
extern const int qs_keys_count;

/** A value as it stood in the file or after `--set`: one scalar or a flat list. */
typedef struct {
    bool list;
    int count; /* 1 for a scalar */
    struct {
        char text[QS_PATH_MAX];
        bool plain; /* not quoted */
    } items[QS_VALUE_ITEMS_MAX];
} qs_value;

/** Index of the key called `name`; -1 if there is none. */
int qs_key_find(const char *name);

/** True if some key is called `name`.something. */
bool qs_key_is_section(const char *name);

/** Check `value` against the key's row and store it. `where` ("run.yaml:7") opens the message. */
qs_status qs_key_set(qs_config *cfg, const qs_key *key, const qs_value *value, const char *where);

/** What the range or the list of names allows, for messages and help: "1 .. 1024", "a | b". */
void qs_key_allowed(const qs_key *key, char *out, size_t capacity);

/** The value of a key as it would stand in the file; at most `capacity` bytes with the NUL. */
void qs_key_format(const qs_config *cfg, const qs_key *key, char *out, size_t capacity);

/** Room that qs_key_format needs at most: a path with every byte escaped. */
enum { QS_KEY_TEXT_MAX = 2 * QS_PATH_MAX + 16 };

/** Feed the events of a YAML text to the table. `seen[qs_keys_count]` notes which keys it gave. */
qs_status qs_config_read_yaml(qs_config *cfg, const char *text, size_t bytes, const char *path,
                              bool *seen);

#endif
