/* The spans of all ranks as one file in the Trace Event Format, which chrome://tracing and Perfetto
 * show: a process a rank, a row for what it computed, gathered and reduced. */
#ifndef QS_TRAIN_TRACE_FILE_H
#define QS_TRAIN_TRACE_FILE_H

#include "comm/comm.h"

/** Whether rank 0 can write `path`, in the place of nothing but an older trace: before a run whose
 * trace would be lost. Collective. */
qs_status qs_trace_file_check(const char *path, qs_comm *comm);

/** Start tracing on all ranks at the same time, as far as a barrier goes. Collective. */
qs_status qs_trace_file_start(qs_comm *comm);

/** Stop, and write what all ranks have kept to `path` on rank 0, replacing it.
 * Errors of the file leave the run as it is. Collective. */
qs_status qs_trace_file_write(const char *path, qs_comm *comm);

#endif
