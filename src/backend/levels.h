/* The two levels of an exchange among all ranks (comm.h), over the device's memory. */
#ifndef QS_BACKEND_LEVELS_H
#define QS_BACKEND_LEVELS_H

#include "backend/backend.h"

typedef struct {
    qs_levels levels;         /* over the device's memory; what exchanges take */
    qs_comm *inside, *across; /* the same ranks over the host's; NULL: one level */
    bool borrowed;            /* `inside` and what is made of it are the caller's */
} qs_backend_levels;

/** Connect the levels of the ranks of `world`, of which qs_backend_comm has made `device_world`:
 * two where qs_comm_per_host says so, else that one. `host`, and `device_host` made of it, serve
 * inside if the caller has them for just the ranks of each host (NULL: they are made). All are
 * borrowed. Collective over `world`. Close what was left by an error, too. */
qs_status qs_backend_levels_open(qs_backend_levels *out, const qs_backend *backend, qs_comm *world,
                                 qs_comm *device_world, qs_comm *host, qs_comm *device_host);
void qs_backend_levels_close(qs_backend_levels *levels);

#endif
