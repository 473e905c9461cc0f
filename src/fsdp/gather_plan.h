/* Which unit is gathered when, and into which buffer: arithmetic on the order of use that a pass
 * announces, never on what has arrived, so that all ranks gather the same units in the same order.
 *
 *   order      0 1 2 3 | head | 3 2 1 0        prefetch 1: two buffers
 *   gathers    0 1 2 3   head     2 1 0        3 still lies in a buffer at the turn
 *
 * A buffer keeps its unit until the room is needed; of those that nobody holds the one whose unit
 * is used last, or not at all, gives way (Belady 1966, doi:10.1147/sj.52.0078: the fewest gathers
 * that so many buffers allow). Pure, but for the array of the order. */
#ifndef QS_FSDP_GATHER_PLAN_H
#define QS_FSDP_GATHER_PLAN_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"
#include "config/config.h"

enum { QS_GATHER_BUFFERS_MAX = QS_PREFETCH_MAX + 1 };

/** A gather to start: of `unit` into `buffer`, for the use at `position` of the order. */
typedef struct {
    int unit, buffer, position;
} qs_gather;

typedef struct {
    int n_units, n_buffers, prefetch;
    const bool *at_hand; /* [n_units] borrowed: units that are never gathered */
    int *order;          /* [capacity] */
    int capacity, count;
    int at;                             /* uses of the order that have been acquired */
    int unit_in[QS_GATHER_BUFFERS_MAX]; /* -1: nothing */
    int held[QS_GATHER_BUFFERS_MAX];    /* acquires that have not been released */
    uint64_t used[QS_GATHER_BUFFERS_MAX], clock;
} qs_gather_plan;

/** Buffers for `prefetch` gathers ahead: one more, but no more than the units that are gathered. */
int qs_gather_plan_buffers(int gathered_units, int64_t prefetch);

/** `prefetch`: 1 to QS_PREFETCH_MAX. */
qs_status qs_gather_plan_create(qs_gather_plan *plan, const bool *at_hand, int n_units,
                                int64_t prefetch);
void qs_gather_plan_destroy(qs_gather_plan *plan);

/** The next uses: `units` [count], at most 3 n_units, a unit as often as it is acquired. What is
 * left of an order before is forgotten; buffers keep their units.
 * \return QS_ERR_BUG for a unit that there is not. */
qs_status qs_gather_plan_begin(qs_gather_plan *plan, const int *units, int count);

/** Unit `u` is used now: it must be the order's next. *mine gets its buffer (-1: at hand), and
 * *gather says whether it must be gathered into it.
 * \return QS_ERR_BUG if it is not the next one, or all buffers hold others. */
qs_status qs_gather_plan_acquire(qs_gather_plan *plan, int u, qs_gather *mine, bool *gather);

/** A gather ahead that can start now; false: none. Ask until there is none. */
bool qs_gather_plan_ahead(qs_gather_plan *plan, qs_gather *next);

/** The buffer of `u`, -1: none. */
int qs_gather_plan_buffer_of(const qs_gather_plan *plan, int u);

/** A use of `u`, which lies in a buffer, is over. */
void qs_gather_plan_release(qs_gather_plan *plan, int u);

/** The gather into `buffer` has failed: it holds nothing. */
void qs_gather_plan_drop(qs_gather_plan *plan, int buffer);

#endif
