/* Checkpoints: LoRA master and moments by global index, so that any number of ranks loads what
 * any number has saved.
 *
 * Saving follows the manifest protocol: rank 0 makes step-N.tmp-<run>; each rank writes its
 * image, syncs, reads back; all agree; rank 0 writes the manifest and renames; only then old ones
 * are rotated away. A failure leaves the older ones as they are. */
#ifndef QS_CKPT_CKPT_H
#define QS_CKPT_CKPT_H

#include <stdbool.h>
#include <stdint.h>

#include "comm/comm.h"
#include "config/config.h"
#include "lora/lora.h"
#include "optim/optim.h"
#include "store/seen.h"

/** What a checkpoint records beside the tensors; strings are borrowed while saving. */
typedef struct {
    int64_t step;
    char run_id[40];
    const char *config_yaml; /* resolved */
    char base_sha256[65];    /* hashes_sha256 of base.h5 */
    char data_content[33];   /* of the tokens */
    char data_layout[33];    /* of labels and borders; "" in checkpoints before it was kept */
    int64_t tokens_seen;
    char device[192]; /* what computed: qs_device_description; "" in checkpoints before it was kept
                       */
    const char *chat_template; /* of the training data; NULL: none, or not known */
    const qs_seen *seen; /* which ranks see the run directory, rank 0 among them; NULL: all do */
} qs_ckpt_meta;

/** Save. Collective. On QS_ERR_IO_FULL nothing has changed and
 * training may go on. What a rank that does not see `run_dir` saves is written by rank 0. */
qs_status qs_ckpt_save(const char *run_dir, const qs_ckpt_meta *meta, const qs_lora_layout *layout,
                       const qs_optim *optim, qs_comm *comm);

/** Is there room for one checkpoint of a run in `run_dir`, or in the first folder above it that is
 * there? QS_ERR_IO_FULL if not. Not collective. */
qs_status qs_ckpt_expect_room(const char *run_dir, const qs_lora_layout *layout, int nranks);

/** Newest step in `run_dir` whose manifest and files verify; -1 if there is none. Damaged ones are
 * renamed to .bad and named in the log. Collective. */
qs_status qs_ckpt_latest(const char *run_dir, int64_t *step, qs_comm *comm);

/** Load step `step` into this rank's shard; checks that config, base and data are the run's own
 * (QS_ERR_RESUME naming the first difference). For a rank that does not see `run_dir` rank 0 reads
 * and sends. Collective. \param [out] meta_out  what the checkpoint records: step, run id, tokens,
 * device and hashes; its borrowed pointers are NULL. */
qs_status qs_ckpt_load(const char *run_dir, int64_t step, const qs_ckpt_meta *expect,
                       const qs_lora_layout *layout, qs_optim *optim, qs_ckpt_meta *meta_out,
                       qs_comm *comm);

/** The loss of a run's evaluation behind a step. */
typedef struct {
    int64_t step;
    double loss; /* one that is not finite is nobody's best */
} qs_ckpt_eval;

/** Evaluations of one run on the same data; borrowed. */
typedef struct {
    const qs_ckpt_eval *list;
    int64_t count;
} qs_ckpt_evals;

/** Delete what is older than the last `keep_last`, but every `keep_every`-th step (0: none) and the
 * one of the lowest loss in `evals` among those that are there. Rank 0 only; what does not verify
 * does not count. */
qs_status qs_ckpt_rotate(const char *run_dir, int64_t keep_last, int64_t keep_every,
                         qs_ckpt_evals evals);

/** The evaluation of the lowest loss among those of steps that have a checkpoint in `run_dir`, the
 * earlier of equals; its step is -1 if there is none. With `verify` the checkpoint is read: a
 * damaged one is renamed to .bad and named in the log, and the next one asked. Rank 0 only. */
qs_status qs_ckpt_best(const char *run_dir, qs_ckpt_evals evals, bool verify, qs_ckpt_eval *best);

/** What the weights of a checkpoint were trained on. */
typedef struct {
    char base_sha256[65]; /* hashes_sha256 of the base */
    char *chat_template;  /* that shaped the data, the caller's to free; NULL: none did, or the
                             checkpoint or the data are older than that */
} qs_ckpt_origin;

/** Read the whole LoRA vector of a checkpoint directory (step-N) without a communicator: for
 * export, merge, eval and sample. Fills `cfg` from the resolved configuration inside. Caller frees
 * *vector with qs_mem_free. \param [out] origin  NULL: not asked. */
qs_status qs_ckpt_read_lora(const char *step_dir, qs_config *cfg, qs_lora_layout *layout,
                            float **vector, qs_ckpt_origin *origin);

#endif
