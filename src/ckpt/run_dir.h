/* The directory of a run: ours alone, one writer at a time.
 *
 *   config.yaml     the resolved configuration
 *   run.json        run id, version and build, hosts, ranks, created; "finished": true at the end
 *   LOCK            host, pid and run id of the writer; taken over if that process is gone on this
 * host, or with --takeover metrics.jsonl, ranks.jsonl, summary.csv, step-N/
 *
 * Rank 0 touches the file system, the others are told. */
#ifndef QS_CKPT_RUN_DIR_H
#define QS_CKPT_RUN_DIR_H

#include <stdbool.h>

#include "comm/comm.h"
#include "config/config.h"

typedef enum { QS_RESUME_AUTO, QS_RESUME_MUST, QS_RESUME_NEVER } qs_resume;

typedef struct {
    char path[QS_PATH_MAX];
    char run_id[40];
    bool finished; /* the run had ended before this call: there is nothing to do */
    bool locked;   /* this process holds the lock (rank 0 only) */
} qs_run_dir;

/** Open or create cfg->output. A directory that is not empty and not ours is QS_ERR_OUTPUT_TAKEN,
 * and so is one of ours that already has checkpoints or metrics when `resume` is QS_RESUME_NEVER,
 * or that another live process writes. Collective. */
qs_status qs_run_dir_open(qs_run_dir *out, const qs_config *cfg, qs_resume resume, bool takeover,
                          qs_comm *comm);

/** Mark the run as finished. Collective. */
qs_status qs_run_dir_finish(qs_run_dir *dir, qs_comm *comm);

/** Give the lock back; does nothing if there is none. Not collective. */
void qs_run_dir_close(qs_run_dir *dir);

#endif
