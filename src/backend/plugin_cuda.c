/* The table that libqshard_cuda.so hands to the program. */
#include <stdio.h>
#include <string.h>

#include "backend/plugin.h"
#include "comm/comm_nccl.h"
#include "device/device_cuda.h"

__attribute__((visibility("default"))) const qs_plugin *qs_plugin_get(void);

static const char *description(void)
{
    static char text[256];
    char gemm[64];
    qs_cuda_gemm_version(gemm, sizeof gemm);
    snprintf(text, sizeof text, "%s; code for %s", gemm, QSHARD_CUDA_ARCHITECTURES);
    return text;
}

static void append(char *line, size_t capacity, const char *version)
{
    const size_t length = strlen(line);
    snprintf(line + length, capacity - length, ", %s", version);
}

static qs_status device_open(qs_device **out, int index)
{
    QS_TRY(qs_device_cuda_open(out, index));
    char gemm[64];
    qs_cuda_gemm_version(gemm, sizeof gemm);
    append((*out)->description, sizeof(*out)->description, gemm);
    append((*out)->traits, sizeof(*out)->traits, gemm);
    return QS_OK;
}

/* Connected, and seen to work. */
static qs_status comm_create(qs_comm **out, qs_comm *host, qs_device *device)
{
    qs_comm *comm = NULL;
    *out = NULL;
    QS_TRY(qs_comm_nccl_create(&comm, host, device));
    const qs_status st = qs_comm_nranks(host) > 1 ? qs_comm_nccl_try(comm, host, device) : QS_OK;
    if (st != QS_OK) {
        qs_comm_destroy(comm);
        return st;
    }
    *out = comm;
    return QS_OK;
}

const qs_plugin *qs_plugin_get(void)
{
    static const qs_plugin plugin = {
        .abi = QS_PLUGIN_ABI,
        .name = "cuda",
        .description = description,
        .probe = qs_device_cuda_probe,
        .card_id = qs_device_cuda_card_id,
        .device_open = device_open,
        .ops = qs_ops_cuda,
        .comm_create = comm_create,
        .gemm = qs_cuda_gemm,
    };
    return &plugin;
}
