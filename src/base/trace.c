#include "base/trace.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/timer.h"

enum { FIRST_SPANS = 1024, SPANS_MAX = 1 << 20 };

static struct {
    bool on;
    double zero_s;
    qs_span *spans;
    size_t count, capacity, lost;
} trace;

void qs_trace_start(void)
{
    trace.on = true;
    trace.zero_s = qs_time_s();
    trace.count = trace.lost = 0;
}

void qs_trace_stop(void)
{
    trace.on = false;
}

bool qs_trace_on(void)
{
    return trace.on;
}

static bool make_room(void)
{
    if (trace.count < trace.capacity) {
        return true;
    }
    const size_t capacity = trace.capacity > 0 ? 2 * trace.capacity : FIRST_SPANS;
    qs_span *spans = capacity <= SPANS_MAX ? realloc(trace.spans, capacity * sizeof *spans) : NULL;
    if (spans == NULL) {
        return false;
    }
    trace.spans = spans;
    trace.capacity = capacity;
    return true;
}

static void add(qs_lane lane, double begin_s, double end_s, const char *format, va_list args)
{
    if (!trace.on || begin_s < trace.zero_s) {
        return;
    }
    if (!make_room()) {
        trace.lost++;
        return;
    }
    qs_span *span = &trace.spans[trace.count++];
    span->lane = lane;
    span->begin_s = begin_s - trace.zero_s;
    span->end_s = end_s - trace.zero_s;
    vsnprintf(span->name, sizeof span->name, format, args);
}

void qs_trace_add(qs_lane lane, double begin_s, double end_s, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    add(lane, begin_s, end_s, format, args);
    va_end(args);
}

double qs_trace_wait(double since_s, const char *format, ...)
{
    const double now_s = qs_time_s();
    va_list args;
    va_start(args, format);
    add(QS_LANE_COMPUTE, since_s, now_s, format, args);
    va_end(args);
    return now_s - since_s;
}

const qs_span *qs_trace_spans(size_t *count, size_t *lost)
{
    *count = trace.count;
    *lost = trace.lost;
    return trace.spans;
}

const char *qs_lane_name(qs_lane lane)
{
    static const char *const names[] = {"compute", "gather", "reduce"};
    return names[lane];
}
