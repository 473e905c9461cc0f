/* Whose a directory is, before anything is written there. */
#ifndef QS_CKPT_RUN_LOOK_H
#define QS_CKPT_RUN_LOOK_H

#include "base/status.h"

typedef enum {
    QS_RUN_NONE,  /* no such directory */
    QS_RUN_EMPTY, /* nothing in it, or only what a killed start of ours left */
    QS_RUN_THERE  /* it has a run.json, which nobody has read yet */
} qs_run_found;

/** \return QS_ERR_OUTPUT_TAKEN naming a file that is not ours where there is no run.json, or why
 * `dir` is no directory. */
qs_status qs_run_look(const char *dir, qs_run_found *out);

/** Remove what a killed process left half written or half removed, be there another save or not.
 * The lock must be ours. */
qs_status qs_run_sweep(const char *dir);

#endif
