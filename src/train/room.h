/* What a rank may have of the memory where it computes: a plan is held against it, and `auto`
 * chooses by it.
 *
 * On a host several limits hold at once (base/limits.h): the machine's memory, a cgroup of the job,
 * one of the step inside it, one of the rank's own, ulimit. What ranks have in common is divided by
 * the number of ranks that share it, which they find out by comparing; what is a rank's own is not.
 * The smallest of these parts is the rank's room. Other programs in the same cgroup are not asked.
 */
#ifndef QS_TRAIN_ROOM_H
#define QS_TRAIN_ROOM_H

#include "base/limits.h"
#include "comm/comm.h"
#include "device/device.h"

typedef struct {
    size_t bytes; /* its part of `limit`, less what this process held already when it asked, and
                     what it needs beside a plan */
    qs_limit limit;
    int sharers; /* ranks that have `limit` together */
} qs_room;

enum { QS_ROOM_TEXT_MAX = QS_LIMIT_TEXT_MAX + 32 };

/** This rank's part of its host, for `threads` threads of its own. Collective. */
qs_status qs_room_on_host(qs_room *out, int threads, qs_comm *world);

/** The same for limits that are given: tests. */
qs_status qs_room_share(qs_room *out, const qs_limits *mine, int threads, qs_comm *world);

/** On paper: each of `local_nranks` ranks that this process's limits hold for. Not collective. */
qs_room qs_room_assume(int threads, int local_nranks);

/** "16.00 GiB that Slurm gives this job on a node (cgroup memory.max) for 4 ranks"; `out`
 * [QS_ROOM_TEXT_MAX] holds any. */
void qs_room_describe(const qs_room *room, char *out, size_t capacity);

/** The smaller of both; `limit_bytes` 0: no limit. */
size_t qs_room_within(size_t there, int64_t limit_bytes);

/** What `device` has free now, or on the CPU this rank's part of the host, within the limit. */
size_t qs_room_here(const qs_device *device, const qs_room *host, int64_t limit_bytes);

#endif
