/* run.json: which run a directory holds, where it was started last, which of its checkpoints is the
 * best, and whether it has finished (docs/file-formats.md). What a program of another version has
 * put in stays. */
#ifndef QS_CKPT_RUN_RECORD_H
#define QS_CKPT_RUN_RECORD_H

#include <stdbool.h>

#include "base/proc.h"
#include "ckpt/ckpt.h"

/** A zeroed one is of no run. */
typedef struct {
    char run_id[40];
    bool finished;
    struct json_t *all; /* what the file says, to be written again */
} qs_run_record;

/** DIR/run.json. `foreign`: what it is called if the file belongs to another program. */
qs_status qs_run_record_read(qs_run_record *out, const char *dir, qs_status foreign);

void qs_run_record_free(qs_run_record *r);

/** Make it that of a start on the hosts of ranks 0 ... nranks-1: a new one if it is of no run, else
 * of a run that goes on. Nothing is written. */
qs_status qs_run_record_start(qs_run_record *r, const char *dir,
                              const char (*hosts)[QS_HOST_NAME_BYTES], int nranks);

qs_status qs_run_record_write(const qs_run_record *r, const char *dir);

/** Which checkpoint has the lowest loss of an evaluation; step -1: none, or not noted. */
qs_status qs_run_record_best(const qs_run_record *r, const char *dir, qs_ckpt_eval *best);

/** Write into DIR/run.json that it is this one; step -1: none. Nothing is written where it says so
 * already. */
qs_status qs_run_record_note_best(const char *dir, const qs_ckpt_eval *best);

/** Write into DIR/run.json that the run is finished. */
qs_status qs_run_record_finish(const char *dir);

#endif
