/* In place of comm_nccl.c where the plugin is built without NCCL. */
#include "comm/comm_nccl.h"

qs_status qs_comm_nccl_create(qs_comm **out, qs_comm *host, qs_device *device)
{
    (void)host;
    (void)device;
    *out = NULL;
    return QS_FAIL(QS_ERR_ENVIRONMENT,
                   "this plugin was built without NCCL, and a GPU's ranks talk over nothing else: "
                   "install NCCL (libnccl, nccl.h) and build again, or use device: cpu");
}

/* There is nothing to try. */
qs_status qs_comm_nccl_try(qs_comm *comm, qs_comm *host, qs_device *device)
{
    (void)comm;
    (void)host;
    (void)device;
    return QS_OK;
}
