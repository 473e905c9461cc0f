/* An output that is there completely or not at all: a file, or a directory of files and perhaps one
 * more directory of such.
 *
 *   name    OUTPUT, OUTPUT.tmp-PID beside it, and their directory
 *   begin   the name is free, there is room; from here on a signal removes what is being written
 *   ...     the caller writes and syncs under `temp`
 *   publish the name is still free: rename, and sync of the directory
 *   end     after a failure nothing is left, and its message names the output
 *
 * What a killed command left beside the same output goes at the beginning (store/temp.h). */
#ifndef QS_STORE_STAGED_H
#define QS_STORE_STAGED_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"
#include "config/config.h"

enum { QS_STAGED_PATH = QS_PATH_MAX + 64 };

/** A zeroed one has nothing to end. */
typedef struct {
    char place[QS_PATH_MAX]; /* the output, without slashes at its end */
    char temp[QS_STAGED_PATH];
    char parent[QS_PATH_MAX];
    const char *inner; /* the directory that a directory may hold; NULL: none. Borrowed */
    bool ours;         /* what stands under `temp` is ours to remove */
    bool taken;        /* it is another's */
} qs_staged;

/** Choose the names. Nothing is looked at. */
qs_status qs_staged_name(qs_staged *s, const char *output, const char *inner);

/** \return QS_ERR_OUTPUT_TAKEN if there is anything under the name, a link to nothing included;
 * QS_ERR_IO where the directory that it is to stand in is missing. */
qs_status qs_staged_expect_free(const qs_staged *s);

/** Begin to write `bytes` bytes; 0: so few that nobody asks. One at a time in a process. \return as
 * qs_staged_expect_free, or QS_ERR_IO_FULL. */
qs_status qs_staged_begin(qs_staged *s, uint64_t bytes);

/** Make `temp` a new directory; one of a killed process that had our number is removed. */
qs_status qs_staged_make_dir(qs_staged *s);

/** Somebody else was found to write under `temp`: leave it alone. */
void qs_staged_disown(qs_staged *s);

/** Give it its name. All that is in it has been synced. */
qs_status qs_staged_publish(const qs_staged *s);

/** Whatever has happened since qs_staged_name, `st` is what it has come to. */
void qs_staged_end(qs_staged *s, qs_status st);

#endif
