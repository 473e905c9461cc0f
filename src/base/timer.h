/* Wall time in seconds from a monotonic clock. */
#ifndef QS_BASE_TIMER_H
#define QS_BASE_TIMER_H

double qs_time_s(void);

#endif
