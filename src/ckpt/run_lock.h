/* The file that says which process writes to a run directory. */
#ifndef QS_CKPT_RUN_LOCK_H
#define QS_CKPT_RUN_LOCK_H

#include <stdbool.h>
#include <stddef.h>

#include "base/status.h"

/** Create DIR/run.lock in the name of this process. A lock whose owner is gone is taken over, any
 * other one only with `takeover`. *fd, for qs_run_lock_release, is its file, locked: other
 * containers of this host see by it that this process lives; -1 where files cannot be locked.
 * *contested: it was taken from a process that may still live. \return QS_ERR_OUTPUT_TAKEN naming
 * the owner. */
qs_status qs_run_lock_take(const char *dir, bool takeover, int *fd, bool *contested);

/** Remove DIR/run.lock if it is still this process's own, and close its file. */
void qs_run_lock_release(const char *dir, int fd);

/** Does nobody else hold DIR/run.lock by now? A lock that somebody has removed is not held by
 * anybody. \return QS_ERR_OUTPUT_TAKEN naming who does. */
qs_status qs_run_lock_check(const char *dir);

/** What DIR/run.lock says, as text to compare by: it names one process at one time, so that two
 * hosts that read the same text see the same directory. "" where there is none.
 * \return 0, or the errno of a file that cannot be read. */
int qs_run_lock_text(const char *dir, char *out, size_t capacity);

/** Name of the lock file and of what taking it leaves behind when killed: "run.lock". */
#define QS_RUN_LOCK_NAME "run.lock"

#endif
