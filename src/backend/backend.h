/* Where a run computes: a device, the operations on it, and what its ranks talk over. Chosen once
 * at the start; everything above asks the three and never which kind they are. */
#ifndef QS_BACKEND_BACKEND_H
#define QS_BACKEND_BACKEND_H

#include <stdbool.h>

#include "comm/comm.h"
#include "config/config.h"
#include "device/device.h"
#include "kernels/ops.h"

typedef struct {
    qs_device *device;
    const qs_ops *ops;
    const struct qs_plugin *plugin; /* NULL: the CPU */
} qs_backend;

/** Open the device of this rank. `kind` is the configuration's: QS_DEVICE_AUTO takes GPUs where
 * every rank has one of its own, and says in the log why not otherwise; QS_DEVICE_CUDA insists. A
 * rank takes the GPU of its number on the host where all ranks see all of the host's, as slurm/
 * asks for and NCCL likes best; where each sees some, one that no lower rank has taken (cards.h).
 * That two ranks would have to share a card is refused, unless `allow_shared`. Collective over
 * `host`; hosts without a GPU beside others with one are the caller's to refuse. \return
 * QS_ERR_ENVIRONMENT with what is missing, on some ranks or on all. */
qs_status qs_backend_open(qs_backend *out, qs_device_kind kind, qs_comm *host, bool allow_shared);

/** Look whether all ranks of a run compute alike. A GPU on some alone is refused, since the kinds
 * of device differ in bits (QS_ERR_DISAGREE: the first rank without one, its host, and why); GPUs,
 * drivers or libraries that differ are warned of. For QS_DEVICE_AUTO and _CUDA. Collective. */
qs_status qs_backend_check_alike(const qs_backend *backend, qs_comm *host);

/** Open GPU `index` of those that this process can use, alone. Not collective. */
qs_status qs_backend_open_gpu(qs_backend *out, int index);

/** Close the device: its buffers and queues are gone. A zeroed backend is fine. */
void qs_backend_close(qs_backend *backend);

/** The communicator for the device's memory over the ranks of `host`: `host` itself on the CPU,
 * else the plugin's, which is to be destroyed before `host`. Collective. */
qs_status qs_backend_comm(qs_comm **out, const qs_backend *backend, qs_comm *host);

/** Destroy what qs_backend_comm gave, unless it is `host` itself. */
void qs_backend_comm_destroy(qs_comm *comm, const qs_comm *host);

/** Why no GPU can be used, one line; NULL if one can. */
const char *qs_backend_cuda_missing(void);

/** For qshard doctor: the plugin's file and versions, "" where none is loaded; number of GPUs. */
const char *qs_backend_cuda_description(void);
int qs_backend_cuda_devices(void);

#endif
