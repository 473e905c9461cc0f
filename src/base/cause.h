/* The error of a rank that waits for the others to hear of it.
 *
 * Ranks agree on an error before one of them prints it (qs_comm_agree). Until all have come a rank
 * that has failed waits, and the others may never come: one hangs, or is killed, or aborts the job,
 * and the launcher ends this rank with its line unsaid. So the line is put together before the wait
 * and printed during it, once, by whichever comes first:
 *
 *   - the grace is over (GRACE_S, long enough for ranks that are on their way);
 *   - the process is told to end (TERM, the launcher's way);
 *   - the watch over the rank (watch.h) gives it up.
 *
 * What was printed so is not printed again. A process has one rank; where threads play ranks, the
 * first that fails has this, the others wait as they are. */
#ifndef QS_BASE_CAUSE_H
#define QS_BASE_CAUSE_H

#include "base/status.h"

/** From here on this thread waits for other ranks to hear of its recorded error. Nothing happens if
 * there is none, or it was printed already, or is another rank's. */
void qs_cause_wait(qs_status status);

/** They have heard of it, or never will. \return true if this thread's error has been printed, now
 * or before. */
bool qs_cause_end(void);

/** Print the line of the rank that waits, if it has not been. From any thread. \return its status,
 * QS_OK: no rank waits so. */
qs_status qs_cause_say(void);

/** For tests: another grace. */
void qs_cause_set_grace(double seconds);

#endif
