#include "backend/levels.h"

/* A part of `world`, over both memories. */
static qs_status connect_part(qs_comm **part, qs_comm **device_part, const qs_backend *backend,
                              qs_comm *world, int color)
{
    QS_TRY(qs_comm_split(world, color, part));
    return qs_comm_agree_after(world, *part, qs_backend_comm(device_part, backend, *part));
}

qs_status qs_backend_levels_open(qs_backend_levels *out, const qs_backend *backend, qs_comm *world,
                                 qs_comm *device_world, qs_comm *host, qs_comm *device_host)
{
    const int per_host = qs_comm_per_host(world), rank = qs_comm_rank(world);
    *out = (qs_backend_levels){.levels = {.world = device_world}};
    if (per_host == 0) {
        return QS_OK;
    }
    if (host != NULL) {
        out->borrowed = true;
        out->inside = host;
        out->levels.inside = device_host;
    } else {
        QS_TRY(connect_part(&out->inside, &out->levels.inside, backend, world, rank / per_host));
    }
    return connect_part(&out->across, &out->levels.across, backend, world, rank % per_host);
}

static void destroy_part(qs_comm *part, qs_comm *device_part)
{
    if (device_part != NULL) {
        qs_backend_comm_destroy(device_part, part);
    }
    qs_comm_destroy(part);
}

void qs_backend_levels_close(qs_backend_levels *l)
{
    destroy_part(l->across, l->levels.across);
    if (!l->borrowed) {
        destroy_part(l->inside, l->levels.inside);
    }
    *l = (qs_backend_levels){0};
}
