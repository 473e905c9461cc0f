/* The watch over this rank (base/watch.h), for a run of several hosts. */
#ifndef QS_TRAIN_WATCHDOG_H
#define QS_TRAIN_WATCHDOG_H

#include "base/watch.h"
#include "comm/comm.h"

/** All zero: none. */
typedef struct {
    qs_watch *watch;
    char (*hosts)[QS_WATCH_NAME_MAX];
} qs_watchdog;

/** Watch this thread's rank until qs_watchdog_stop; `limit_s` 0: do not. A process that may have no
 * further thread goes on without, and says so. Collective. */
qs_status qs_watchdog_start(qs_watchdog *out, double limit_s, qs_comm *comm);

/** From the thread that started it. */
void qs_watchdog_stop(qs_watchdog *dog);

#endif
