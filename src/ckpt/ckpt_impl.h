/* What the files of this folder share. */
#ifndef QS_CKPT_CKPT_IMPL_H
#define QS_CKPT_CKPT_IMPL_H

#include "ckpt/ckpt.h"
#include "ckpt/ckpt_record.h"
#include "store/manifest.h"

enum { QS_CKPT_PATH = QS_PATH_MAX + 128 };

/** Remove directories that a killed save or rotation left half done: step-*.tmp-*. One that cannot
 * be removed stays, with a warning if `say`; QS_ERR_IO where `run_dir` cannot be listed. */
qs_status qs_ckpt_sweep(const char *run_dir, bool say);

/** Move a directory that is no good checkpoint out of the way: step-N.bad, .bad2, ... */
qs_status qs_ckpt_set_aside(const char *run_dir, int64_t step);

/** Which ranks do not see the run directory, as meta->seen says: *blind [nranks], to be freed; NULL
 * where all see it. Collective, and the same on all ranks. */
qs_status qs_ckpt_find_blind(const qs_ckpt_meta *meta, qs_comm *comm, bool **blind);

/** May a run of `then` whose checkpoint has `done` steps (0: there is none) go on as `now`?
 * QS_ERR_RESUME with the first setting that forbids it and what to do; the text begins with
 * `subject`, as "DIR: was saved". `then` gets the length of `now` where that may change. */
qs_status qs_ckpt_compare_configs(qs_config *then, const qs_config *now, int64_t done,
                                  const char *subject);

/** Name of rank r's file: rank-00003.h5 */
void qs_ckpt_file_name(char *out, size_t capacity, int rank);

#endif
