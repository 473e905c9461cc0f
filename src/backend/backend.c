#include "backend/backend.h"

#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "backend/plugin.h"
#include "base/log.h"

/* What was found, once a process: a plugin stays loaded, and cards do not come and go. */
static struct {
    const qs_plugin *plugin; /* NULL: none was loaded */
    int devices;
    char why[1024]; /* none can be used */
    char description[PATH_MAX + 320];
} found;

static void find(void)
{
    char path[PATH_MAX + 64] = "";
    found.plugin = qs_plugin_find(found.why, sizeof found.why, path, sizeof path);
    if (found.plugin != NULL) {
        snprintf(found.description, sizeof found.description, "%s: %s", path,
                 found.plugin->description());
        found.devices = found.plugin->probe(found.why, sizeof found.why);
    }
}

static void find_once(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    (void)pthread_once(&once, find);
}

const char *qs_backend_cuda_missing(void)
{
    find_once();
    return found.devices > 0 ? NULL : found.why;
}

const char *qs_backend_cuda_description(void)
{
    find_once();
    return found.description;
}

int qs_backend_cuda_devices(void)
{
    find_once();
    return found.devices;
}

/* One line on why the GPUs cannot serve this host's ranks; false if they can. */
static bool cannot_serve(int local_nranks, bool allow_shared, char *why, size_t capacity)
{
    if (found.devices == 0) {
        snprintf(why, capacity, "%s", found.why);
        return true;
    }
    if (found.devices < local_nranks && !allow_shared) {
        snprintf(why, capacity,
                 "%d ranks on this host see %d GPU%s: start as many ranks as GPUs, or let the job "
                 "see more (CUDA_VISIBLE_DEVICES, the scheduler's --gpus); --allow-shared-device "
                 "lets ranks share one, which is slow",
                 local_nranks, found.devices, found.devices == 1 ? "" : "s");
        return true;
    }
    return false;
}

/* NCCL takes two ranks with one host and one card for a mistake. Where that is wanted each rank is
 * a host of its own; a value that is set already is the user's. */
static void stand_apart(int local_rank)
{
    char host[256] = "", id[300];
    (void)gethostname(host, sizeof host - 1);
    snprintf(id, sizeof id, "%s-%d", host, local_rank);
    (void)setenv("NCCL_HOSTID", id, 0);
}

static qs_status open_cuda(qs_backend *out, int local_rank, int local_nranks)
{
    if (found.devices < local_nranks) {
        stand_apart(local_rank);
    }
    QS_TRY(found.plugin->device_open(&out->device, local_rank % found.devices));
    out->ops = found.plugin->ops();
    out->plugin = found.plugin;
    return QS_OK;
}

qs_status qs_backend_open(qs_backend *out, qs_device_kind kind, int local_rank, int local_nranks,
                          bool allow_shared)
{
    char why[1024] = "";
    *out = (qs_backend){.device = qs_device_cpu(), .ops = qs_ops_cpu()};
    if (kind == QS_DEVICE_CPU) {
        return QS_OK;
    }
    find_once();
    if (!cannot_serve(local_nranks, allow_shared, why, sizeof why)) {
        return open_cuda(out, local_rank, local_nranks);
    }
    if (kind == QS_DEVICE_CUDA) {
        return QS_FAIL(QS_ERR_ENVIRONMENT,
                       "device: cuda: %s. device: cpu, or auto, computes without a GPU", why);
    }
    qs_log_info("device: cpu, since %s", why);
    return QS_OK;
}

void qs_backend_close(qs_backend *backend)
{
    qs_device_close(backend->device);
    *backend = (qs_backend){0};
}

qs_status qs_backend_comm(qs_comm **out, const qs_backend *backend, qs_comm *host)
{
    if (backend->plugin == NULL) {
        *out = host;
        return QS_OK;
    }
    if (qs_comm_nranks(host) == 1) {
        return qs_comm_self_create(out); /* nobody to talk to: one GPU needs no NCCL */
    }
    return backend->plugin->comm_create(out, host, backend->device);
}

void qs_backend_comm_destroy(qs_comm *comm, const qs_comm *host)
{
    if (comm != host) {
        qs_comm_destroy(comm);
    }
}
