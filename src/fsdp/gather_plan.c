#include "fsdp/gather_plan.h"

#include <limits.h>
#include <string.h>

#include "base/mem.h"

enum { USES_MAX = 3 }; /* of a unit in an order, on average */

int qs_gather_plan_buffers(int gathered_units, int64_t prefetch)
{
    return prefetch < gathered_units ? (int)prefetch + 1 : gathered_units;
}

qs_status qs_gather_plan_create(qs_gather_plan *s, const bool *at_hand, int n_units,
                                int64_t prefetch)
{
    *s = (qs_gather_plan){.n_units = n_units,
                          .prefetch = (int)prefetch,
                          .at_hand = at_hand,
                          .capacity = USES_MAX * n_units};
    int gathered = 0;
    for (int u = 0; u < n_units; u++) {
        gathered += !at_hand[u];
    }
    s->n_buffers = qs_gather_plan_buffers(gathered, prefetch);
    for (int b = 0; b < QS_GATHER_BUFFERS_MAX; b++) {
        s->unit_in[b] = -1;
    }
    return QS_ALLOC(&s->order, s->capacity, QS_MEM_BASE_SMALL);
}

void qs_gather_plan_destroy(qs_gather_plan *s)
{
    qs_mem_free(s->order);
    s->order = NULL;
}

qs_status qs_gather_plan_begin(qs_gather_plan *s, const int *units, int count)
{
    if (count < 0 || count > s->capacity) {
        return QS_FAIL(QS_ERR_BUG, "an order of %d uses, room for %d", count, s->capacity);
    }
    for (int i = 0; i < count; i++) {
        if (units[i] < 0 || units[i] >= s->n_units) {
            return QS_FAIL(QS_ERR_BUG, "an order with unit %d: there are %d", units[i], s->n_units);
        }
    }
    memcpy(s->order, units, (size_t)count * sizeof *units);
    s->count = count;
    s->at = 0;
    return QS_OK;
}

int qs_gather_plan_buffer_of(const qs_gather_plan *s, int u)
{
    for (int b = 0; b < s->n_buffers; b++) {
        if (s->unit_in[b] == u) {
            return b;
        }
    }
    return -1;
}

/* Position of the next use of `u`; INT_MAX: none. */
static int next_use(const qs_gather_plan *s, int u)
{
    for (int i = s->at; i < s->count; i++) {
        if (s->order[i] == u) {
            return i;
        }
    }
    return INT_MAX;
}

/* The buffer to overwrite for a use at `position`: its unit is used later than that, and latest of
 * all; among those that the order does not use again, the longest unused. -1: none. */
static int victim_for(const qs_gather_plan *s, int position)
{
    int best = -1, best_use = position;
    for (int b = 0; b < s->n_buffers; b++) {
        if (s->held[b] > 0) {
            continue;
        }
        const int use = s->unit_in[b] < 0 ? INT_MAX : next_use(s, s->unit_in[b]);
        if (use > best_use || (use == INT_MAX && best >= 0 && s->used[b] < s->used[best])) {
            best = b;
            best_use = use;
        }
    }
    return best;
}

static void put(qs_gather_plan *s, int buffer, int u)
{
    s->unit_in[buffer] = u;
    s->used[buffer] = ++s->clock;
}

qs_status qs_gather_plan_acquire(qs_gather_plan *s, int u, qs_gather *mine, bool *gather)
{
    *mine = (qs_gather){.unit = u, .buffer = -1, .position = s->at};
    *gather = false;
    if (s->at == s->count || s->order[s->at] != u) {
        return QS_FAIL(QS_ERR_BUG, "acquire of unit %d, use %d of an order of %d, which has %d", u,
                       s->at, s->count, s->at < s->count ? s->order[s->at] : -1);
    }
    s->at++;
    if (s->at_hand[u]) {
        return QS_OK;
    }
    mine->buffer = qs_gather_plan_buffer_of(s, u);
    if (mine->buffer < 0) {
        mine->buffer = victim_for(s, s->at - 1);
        *gather = true;
    }
    if (mine->buffer < 0) {
        s->at--;
        return QS_FAIL(QS_ERR_BUG, "acquire of unit %d while %d others are held", u, s->n_buffers);
    }
    put(s, mine->buffer, u);
    s->held[mine->buffer]++;
    return QS_OK;
}

bool qs_gather_plan_ahead(qs_gather_plan *s, qs_gather *next)
{
    int seen = 0;
    for (int i = s->at; i < s->count && seen < s->prefetch; i++) {
        const int u = s->order[i];
        if (s->at_hand[u] || next_use(s, u) != i) {
            continue;
        }
        seen++;
        if (qs_gather_plan_buffer_of(s, u) >= 0) {
            continue;
        }
        const int buffer = victim_for(s, i);
        if (buffer < 0) {
            return false; /* gathered when its turn comes, or a buffer is released */
        }
        put(s, buffer, u);
        *next = (qs_gather){.unit = u, .buffer = buffer, .position = i};
        return true;
    }
    return false;
}

void qs_gather_plan_release(qs_gather_plan *s, int u)
{
    s->held[qs_gather_plan_buffer_of(s, u)]--;
}

void qs_gather_plan_drop(qs_gather_plan *s, int buffer)
{
    s->unit_in[buffer] = -1;
    s->held[buffer] = 0;
}
