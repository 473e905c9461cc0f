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
 * queue.
 * \return on all ranks the agreed error where one failed (qs_comm_agreed(host)). QS_ERR_PEER that
 *         was not agreed on: the other ranks did not come; only qs_comm_abort is left. */
qs_status qs_comm_nccl_create(qs_comm **out, qs_comm *host, qs_device *device);

/** Bytes there and back, as soon as the ranks are connected (comm_nccl_try.c): GPUs that say that
 * they reach each other's memory and do not let NCCL connect and then hang, or spoil what they
 * send. `host` is the communicator's. Collective; takes some KiB of `device` for the time being.
 * \return QS_ERR_PEER, not agreed on, where nothing arrives within QSHARD_NCCL_TIMEOUT;
 *         QS_ERR_DEVICE, agreed on over `host`, where something else arrives. */
qs_status qs_comm_nccl_try(qs_comm *comm, qs_comm *host, qs_device *device);

/** Wait until `queue` is empty, but not longer than QSHARD_NCCL_TIMEOUT: QS_ERR_PEER then, and
 * nothing goes through NCCL any more. `what` of a message is named. Not collective. */
qs_status qs_comm_nccl_wait(qs_comm *comm, qs_queue *queue, const char *what);

/** Has NCCL found a lost peer or a broken link meanwhile? Every collective asks first, and so does
 * a wait for a queue of the device (qs_device_watch), which would never end otherwise. QS_OK
 * for any other communicator. */
qs_status qs_comm_nccl_check(qs_comm *comm);

/** "NCCL 2.28.9", the library at hand. */
void qs_comm_nccl_version(char *out, size_t capacity);

#endif
