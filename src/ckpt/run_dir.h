/* The run directory: whose it is, who writes to it, and whether the run is finished.
 *
 *   config.yaml   resolved configuration      run.json   run id, build, hosts, the best checkpoint,
 *                                                        finished or not
 *   run.lock      the writer: host, process   step-N/    checkpoints
 *
 * A directory is ours if its run.json says so. One run writes at a time: run.lock is created
 * exclusively and names host, process and batch job; it is taken over only when that process is
 * certainly gone (run_lock.c), when this is a later start of the same batch job, or when asked for.
 *
 * The directory is on rank 0's host. Others see it if they read rank 0's lock in it; those that do
 * not leave all writing to rank 0. */
#ifndef QS_CKPT_RUN_DIR_H
#define QS_CKPT_RUN_DIR_H

#include <stdbool.h>

#include "ckpt/ckpt.h"
#include "ckpt/run_record.h"
#include "comm/comm.h"
#include "config/config.h"
#include "store/seen.h"

/** What to do with checkpoints in the run directory: go on from them if there are some, insist on
 * them, or start in a fresh directory only. */
typedef enum { QS_RESUME_AUTO, QS_RESUME_MUST, QS_RESUME_NEVER } qs_resume;

typedef struct {
    char dir[QS_PATH_MAX];
    char run_id[40]; /* of the first start; the same after every resume */
    bool finished;   /* nothing was opened: the run had finished before */
    bool locked;     /* this process holds run.lock (rank 0 only), */
    int lock;        /* its file */
    bool contested;  /* taken over from a process that may still live and write (rank 0 only) */
    int made;        /* how many levels of the directory were not there before (rank 0 only) */
    bool goes_on;    /* it has a checkpoint (rank 0 only) */
    qs_run_record record; /* what run.json says of this start (rank 0 only), where it goes on from
                             qs_run_dir_begin on */
    qs_seen seen;         /* which ranks see the directory; rank 0 does */
} qs_run_dir;

/** Where cfg->output holds a run with checkpoints, or a finished one, cpu.gemm: auto becomes what
 * it was for that run, so that it goes on in the same bits on whatever CPU. Collective. */
qs_status qs_run_dir_settle(qs_config *cfg, qs_comm *comm);

/** Would qs_run_dir_open take cfg->output? Its errors, but for another process at work there and
 * other hosts' directories; *finished as it would set it. Nothing is written. Not collective. */
qs_status qs_run_dir_foresee(const qs_config *cfg, qs_resume resume, bool *finished);

/** Open cfg->output for writing: create it (with all that is missing above it) or recognise it as
 * ours, take the lock, write config.yaml and run.json, unless it has a checkpoint, which may turn
 * out to be of other data; find out who else sees it. Collective; only rank 0 writes. `comm` must
 * outlive `out`. \return QS_ERR_OUTPUT_TAKEN when the directory is not ours and not empty, when
 * another process writes to it, or with QS_RESUME_NEVER when it holds a run; QS_ERR_CHECKPOINT with
 * QS_RESUME_MUST when it holds none, or none with a checkpoint; QS_ERR_RESUME when its run has
 * checkpoints of, or has finished with, another configuration; QS_ERR_DISAGREE when another host
 * has another run there.
 */
qs_status qs_run_dir_open(qs_run_dir *out, const qs_config *cfg, qs_resume resume, bool takeover,
                          qs_comm *comm);

/** The checkpoint has been loaded: nobody else has taken the directory over meanwhile
 * (QS_ERR_OUTPUT_TAKEN), and config.yaml and run.json are of this start from now on. Nothing for a
 * zeroed struct. Collective. */
qs_status qs_run_dir_begin(qs_run_dir *run, const qs_config *cfg, qs_comm *comm);

/** Before anything is written in the middle of a run: has nobody else taken the directory over, by
 * --takeover or by removing it? Collective. \return QS_ERR_OUTPUT_TAKEN naming who has. */
qs_status qs_run_dir_still_ours(const qs_run_dir *run, qs_comm *comm);

/** Write into run.json which checkpoint has the lowest loss of an evaluation; step -1: none has
 * one. Nothing is written where run.json says so already. Rank 0 only. */
qs_status qs_run_dir_note_best(const qs_run_dir *run, const qs_ckpt_eval *best);

/** What run.json in `dir` says of it; step -1: nothing. Not collective. */
qs_status qs_run_dir_read_best(const char *dir, qs_ckpt_eval *best);

/** Write into run.json that the run is finished. Collective. */
qs_status qs_run_dir_finish(qs_run_dir *run, qs_comm *comm);

/** Take back a directory that qs_run_dir_open has made, because the run failed before its first
 * step was done. Any other directory stays as it is. Not collective. */
void qs_run_dir_abandon(qs_run_dir *run);

/** Whether `dir` holds the run.json of a run: QS_ERR_INPUT_FORMAT, _VALUE or _MISSING if not. */
qs_status qs_run_dir_check(const char *dir);

/** Release the lock. A zeroed struct is fine. Not collective. */
void qs_run_dir_close(qs_run_dir *run);

#endif
