/* What a path that is given as an adapter stands for: a PEFT directory, a checkpoint, or a run,
 * which stands for one of its checkpoints. By what is in it, and not by its name. */
#ifndef QS_CKPT_ADAPTER_DIR_H
#define QS_CKPT_ADAPTER_DIR_H

#include <stdbool.h>

#include "config/config.h"

typedef enum {
    QS_ADAPTER_NONE,
    QS_ADAPTER_PEFT,       /* directory with adapter_config.json */
    QS_ADAPTER_CHECKPOINT, /* directory with manifest.json */
    QS_ADAPTER_RUN         /* directory with run.json */
} qs_adapter_kind;

/** Nothing is opened: what is wrong with it, opening it says. */
qs_adapter_kind qs_adapter_kind_of(const char *path);

typedef struct {
    qs_adapter_kind kind; /* a PEFT directory or a checkpoint */
    char dir[QS_PATH_MAX + 64];
} qs_adapter_dir;

/** Find it: of a run the newest checkpoint, or with `best`, which is of a run alone, the one that
 * its run.json calls so. A folder of checkpoints that has lost its run.json is taken as well. */
qs_status qs_adapter_find(qs_adapter_dir *out, const char *path, bool best);

/** What reading checkpoint `dir`, which qs_adapter_find found for `path`, has come to: where it is
 * damaged and `path` is a run, the message names the newest one that verifies, too. */
qs_status qs_adapter_name_good(qs_status st, const char *path, const char *dir);

#endif
