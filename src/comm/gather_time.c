/* What an all-gather takes on this machine's links. */
#include <stdlib.h>

#include "base/timer.h"
#include "comm/comm_impl.h"

enum { ROUNDS = 3 };
static const size_t MEASURED_BYTES = (size_t)8 << 20;

/* The best of some rounds; each starts together. */
static qs_status best_round(qs_comm *comm, char *bytes, size_t per_rank, double *seconds)
{
    const char *own = bytes + (size_t)qs_comm_rank(comm) * per_rank;
    for (int i = 0; i <= ROUNDS; i++) { /* the first opens connections */
        QS_TRY(qs_comm_barrier(comm));
        const double since = qs_time_s();
        QS_TRY(qs_comm_all_gather_now(comm, own, bytes, per_rank));
        const double took = qs_time_s() - since;
        *seconds = i <= 1 || took < *seconds ? took : *seconds;
    }
    return QS_OK;
}

qs_status qs_comm_gather_time(qs_comm *comm, size_t bytes, double *seconds)
{
    const size_t nranks = (size_t)qs_comm_nranks(comm);
    const size_t measured = bytes < MEASURED_BYTES ? bytes : MEASURED_BYTES;
    const size_t per_rank = measured / nranks > 0 ? measured / nranks : 1;
    *seconds = 0;
    if (nranks == 1) {
        return QS_OK;
    }
    char *buffer = calloc(nranks, per_rank);
    qs_status st = buffer != NULL ? QS_OK
                                  : QS_FAIL(QS_ERR_MEMORY, "memory: %zu bytes for timing a gather",
                                            nranks * per_rank);
    st = qs_comm_agree(comm, st);
    if (st == QS_OK) {
        const uint64_t received = comm->received_bytes, foreign = comm->foreign_bytes;
        st = best_round(comm, buffer, per_rank, seconds);
        comm->received_bytes = received; /* the counters tell what a run's own work moves */
        comm->foreign_bytes = foreign;
        *seconds *= (double)bytes / (double)(nranks * per_rank);
    }
    free(buffer);
    return st;
}
