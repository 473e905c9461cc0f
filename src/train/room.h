/* What a rank may have of the memory where it computes: a plan is held against it, and `auto`
 * chooses by it. */
#ifndef QS_TRAIN_ROOM_H
#define QS_TRAIN_ROOM_H

#include "comm/comm.h"
#include "device/device.h"

/** A rank's part of this host's memory: the whole of it, not what happens to be free, since files
 * that were read fill the rest and go when they have to. */
size_t qs_room_on_host(int local_nranks);

/** The smaller of both; `limit_bytes` 0: no limit. */
size_t qs_room_within(size_t there, int64_t limit_bytes);

/** What `device` has free now, or on the CPU this rank's part of the host, within the limit. */
size_t qs_room_here(const qs_device *device, int64_t limit_bytes, const qs_comm *world);

#endif
