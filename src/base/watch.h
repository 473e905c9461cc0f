/* Whether a rank still gets on. A peer that is stopped, a cable that is out or a file system that
 * hangs makes every rank wait, and MPI waits for ever. So a thread of its own looks at what the
 * rank's thread notes here, and where nothing has moved for too long it says so in one line and
 * ends the process with exit code 6; the launcher then ends the others. It asks nobody and needs no
 * network.
 *
 * Too long is never a matter of the rank's own speed: whoever works, or hears of others, moves. It
 * is `limit_s` seconds, or four times what the section (a step, an evaluation) has taken until it
 * came to a stop, whichever is more, since others may have as much to do on a slower machine;
 * before and between passes, where files are read and written, and in a pass in which this rank has
 * no work to compare with, PATIENT times `limit_s`. Time during which this process was itself
 * stopped (a suspended job, a debugger) does not count. Some seconds more decide who speaks, so
 * that the line comes from where the trouble is near.
 *
 * The notes are made by one thread, the rank's, and cost next to nothing; a thread without a watch
 * makes none. */
#ifndef QS_BASE_WATCH_H
#define QS_BASE_WATCH_H

#include <stdbool.h>

#include "base/proc.h"
#include "base/status.h"

typedef struct qs_watch qs_watch;

enum { QS_WATCH_NAME_MAX = QS_HOST_NAME_BYTES, QS_WATCH_PATIENT = 12 };

typedef struct {
    int rank;
    const char (*hosts)[QS_WATCH_NAME_MAX]; /* of each rank; borrowed, NULL: not known */
    double limit_s;                         /* above 0 */
    int (*terminations)(void); /* TERM signals that came so far; NULL: they are not caught */
    const char *remedy;        /* ends the line; borrowed */
} qs_watch_options;

/** Begin to watch the calling thread. One watch a thread. \return QS_ERR_MEMORY. */
qs_status qs_watch_start(qs_watch **out, const qs_watch_options *options);

/** End it, from the thread that it watches. NULL is fine. */
void qs_watch_stop(qs_watch *watch);

/** A section begins: what the line will name ("step 14"). `patient`: files are read or written, or
 * this rank has no work in it. */
void qs_watch_section(bool patient, const char *format, ...) __attribute__((format(printf, 2, 3)));

/** This rank has done something, or something has arrived. */
void qs_watch_moved(void);

/** From here on the rank waits for `what` (a literal: "the other ranks' answers"), or works: NULL.
 * \return what it was before, to be given back at the end. Both are moves. */
const char *qs_watch_wait(const char *what);

/** Runs a statement that waits for `what`. */
#define QS_WHILE_WAITING(what, statement)                                                          \
    do {                                                                                           \
        const char *qs_waited_before = qs_watch_wait(what);                                        \
        statement;                                                                                 \
        qs_watch_wait(qs_waited_before);                                                           \
    } while (0)

/** Should the waiting thread say whose messages are missing? Asked while it polls. */
bool qs_watch_asks(void);

/** They are: `ranks` [count], of the world. */
void qs_watch_missing(const int *ranks, int count);

#endif
