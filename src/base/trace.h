/* Spans of time, kept while tracing is on: what a rank computed, waited for and had under way. For
 * chrome://tracing and Perfetto (train/trace_file.h writes them). State of the process, as the log
 * is; off, a call costs a test of one flag. */
#ifndef QS_BASE_TRACE_H
#define QS_BASE_TRACE_H

#include <stdbool.h>
#include <stddef.h>

/** Rows of the picture. */
typedef enum { QS_LANE_COMPUTE, QS_LANE_GATHER, QS_LANE_REDUCE, QS_LANE_COUNT } qs_lane;

typedef struct {
    char name[44];
    qs_lane lane;
    double begin_s, end_s; /* since qs_trace_start */
} qs_span;

/** From now on, which is time 0, spans are kept; those from before are dropped. */
void qs_trace_start(void);

/** No more spans; those there are stay. */
void qs_trace_stop(void);
bool qs_trace_on(void);

/** Add a span that began at `begin_s` and ended at `end_s` (qs_time_s). Where no memory is left
 * the span is lost, and counted. */
void qs_trace_add(qs_lane lane, double begin_s, double end_s, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

/** The calling rank stood still since `since_s`: a span in the row of compute.
 * \return for how long, seconds, whether tracing is on or not. */
double qs_trace_wait(double since_s, const char *format, ...) __attribute__((format(printf, 2, 3)));

/** The spans [*count], in the order in which they ended; *lost of them could not be kept. Valid
 * until the next call of this file. */
const qs_span *qs_trace_spans(size_t *count, size_t *lost);

const char *qs_lane_name(qs_lane lane);

#endif
