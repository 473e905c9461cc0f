#include "train/watchdog.h"

#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "base/proc.h"
#include "train/train.h"

static const char REMEDY[] =
    "a rank may be stopped, a host down, the network or a file system away: look there, then start "
    "again, and a run goes on from its last checkpoint (train.stall_limit says how long to wait)";

static qs_status name_hosts(qs_watchdog *dog, qs_comm *comm)
{
    char mine[QS_WATCH_NAME_MAX] = "";
    qs_host_name(mine);
    dog->hosts = calloc((size_t)qs_comm_nranks(comm), sizeof *dog->hosts);
    QS_TRY(qs_comm_agree(comm, dog->hosts != NULL ? QS_OK
                                                  : QS_FAIL(QS_ERR_MEMORY,
                                                            "memory: the names of %d ranks' hosts "
                                                            "cannot be kept",
                                                            qs_comm_nranks(comm))));
    return qs_comm_all_gather_now(comm, mine, dog->hosts, sizeof mine);
}

qs_status qs_watchdog_start(qs_watchdog *out, double limit_s, qs_comm *comm)
{
    memset(out, 0, sizeof *out);
    if (limit_s <= 0) {
        return QS_OK;
    }
    QS_TRY(name_hosts(out, comm));
    const qs_watch_options options = {.rank = qs_comm_rank(comm),
                                      .hosts = (const char(*)[QS_WATCH_NAME_MAX])out->hosts,
                                      .limit_s = limit_s,
                                      .terminations = qs_signals_terminations,
                                      .remedy = REMEDY};
    if (qs_watch_start(&out->watch, &options) != QS_OK) {
        qs_log_warn("%s; the run goes on without", qs_error_text());
        qs_error_clear();
    }
    return QS_OK;
}

void qs_watchdog_stop(qs_watchdog *dog)
{
    qs_watch_stop(dog->watch);
    free(dog->hosts);
    memset(dog, 0, sizeof *dog);
}
