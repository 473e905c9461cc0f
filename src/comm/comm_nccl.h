/* The communicator for the memory of GPUs. It stands on another one, `host`, over the same ranks:
 * what the host says to its peers (bcast, barrier, agreements) and what travels on a queue of the
 * CPU goes there unchanged; what is given to a queue of the GPU goes through NCCL, in the order of
 * that queue.
 *
 * QSHARD_NCCL_TIMEOUT [s] (default 120): how long connecting to the other ranks may take, at the
 * start and when a pair of ranks speaks for the first time. A peer that does not come in that time
 * is lost: QS_ERR_PEER. */
#ifndef QS_COMM_COMM_NCCL_H
#define QS_COMM_COMM_NCCL_H

#include "comm/comm.h"

/** Collective over `host`, which is borrowed and must outlive the result. `device` is the one that
 * this thread has opened; every rank has its own. One rank needs no NCCL: its copies go through the
 * queue. The result counts the bytes that `host` has received so far as its own.
 * \return on all ranks the agreed error where one failed (qs_comm_agreed(host)). QS_ERR_PEER that
 *         was not agreed on: the other ranks did not come; only qs_comm_abort is left. */
qs_status qs_comm_nccl_create(qs_comm **out, qs_comm *host, qs_device *device);

/** Has NCCL found a lost peer or a broken link meanwhile? Every collective asks first, and so does
 * a wait for a queue of the device (qs_device_watch), which would never end otherwise. QS_OK
 * for any other communicator. */
qs_status qs_comm_nccl_check(qs_comm *comm);

/** "NCCL 2.28.9", the library at hand. */
void qs_comm_nccl_version(char *out, size_t capacity);

#endif
