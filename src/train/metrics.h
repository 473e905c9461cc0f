/* What a run leaves to read: metrics.jsonl (a line a step), ranks.jsonl (who did how much),
 * summary.csv (a line a finished run: opening removes it). Rank 0 writes; numbers that are compared
 * between runs are printed with 17 digits. */
#ifndef QS_TRAIN_METRICS_H
#define QS_TRAIN_METRICS_H

#include <stdbool.h>
#include <stdint.h>

#include "ckpt/ckpt.h"
#include "comm/comm.h"
#include "train/step_clock.h"

typedef struct {
    int64_t step;   /* 1-based: updates done */
    int64_t tokens; /* positions that carry loss: `tokens` and, as elsewhere, `targets` */
    int64_t all_tokens;
    double loss, lr, grad_norm;
    double step_time_s;
    double gather_s; /* that gathers were under way; negative: the device does not tell */
    double parts[QS_STEP_PARTS];
    uint64_t peak_bytes;
} qs_step_metrics;

/** What one rank did since this start of the program (a resumed run counts anew). */
typedef struct {
    int64_t tokens, targets;
    int64_t gather_group, shard_group;   /* what the settings of these names stood for, */
    int64_t keep_resident, keep_decoded; /* and of these */
    double parts[QS_STEP_PARTS];         /* of its steps */
    double flops;
    uint64_t read_bytes;     /* of base.h5 */
    uint64_t data_bytes;     /* of the token file */
    uint64_t gathered_bytes; /* received by gathers */
    uint64_t received_bytes; /* received in all */
    uint64_t foreign_bytes;  /* of these, from ranks on other hosts */
    uint64_t base_bytes;     /* largest share + gather buffers of the base held at once */
    uint64_t peak_bytes;
    uint64_t rss_bytes;
} qs_rank_metrics;

typedef struct qs_metrics qs_metrics;

/** Open the run's files for appending; lines of steps after `step` (left by a run that was killed)
 * are dropped, the last values of the others remembered. `anew`: in new files of these names,
 * because another process may still append to the old ones. On ranks other than 0 nothing is opened
 * and the other calls do nothing. */
qs_status qs_metrics_open(qs_metrics **out, const char *run_dir, int64_t step, bool anew, int rank);

/** The newest step that has an eval line, -1 if there is none (or this is not rank 0). */
int64_t qs_metrics_last_eval(const qs_metrics *metrics);

/** The evaluations so far that compare with the newest one: those since data.eval last had another
 * number of targets. Borrowed until the next evaluation; none on ranks other than 0. */
qs_ckpt_evals qs_metrics_evals(const qs_metrics *metrics);
void qs_metrics_close(qs_metrics *metrics);

/** Each line is written at once; on QS_ERR_IO_FULL it waits, up to 1 MiB of them, and is written
 * before the next one. */
qs_status qs_metrics_step(qs_metrics *metrics, const qs_step_metrics *m);
qs_status qs_metrics_eval(qs_metrics *metrics, int64_t step, double loss, int64_t targets);

/** Have all lines so far on the disk: before a checkpoint makes their steps done, since whoever
 * goes on from it does not write them again, and at the end. */
qs_status qs_metrics_sync(qs_metrics *metrics);

/** One line per rank in ranks.jsonl. Collective; all ranks get the same status. */
qs_status qs_metrics_ranks(qs_metrics *metrics, int64_t step, const qs_rank_metrics *mine,
                           qs_comm *comm);

/** summary.csv of the finished run: the last loss and evaluation, what this start took, and the
 * best evaluation of a step that has a checkpoint (step -1: none). */
qs_status qs_metrics_summary(qs_metrics *metrics, int64_t steps, double seconds, int nranks,
                             uint64_t peak_bytes, const qs_ckpt_eval *best);

#endif
