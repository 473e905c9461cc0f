/* Bytes that one rank holds, in a file or in memory, and that another one needs. */
#ifndef QS_STORE_RELAY_H
#define QS_STORE_RELAY_H

#include <stddef.h>
#include <stdint.h>

#include "comm/comm.h"

/** A stretch that this rank wants: `bytes` at `offset` of what rank `from` offers, to `to`. */
typedef struct {
    int from;
    int64_t offset;
    size_t bytes;
    void *to;
} qs_relay_want;

/** Read `bytes` at `offset` of what this rank offers. */
typedef qs_status (*qs_relay_read)(void *ctx, int64_t offset, size_t bytes, void *out);

/** A qs_relay_read of memory: `ctx` is where it begins. */
qs_status qs_relay_read_memory(void *ctx, int64_t offset, size_t bytes, void *out);

/** Bring every rank the `count` stretches that it wants (0: it only serves), in pieces of at most
 * `piece_bytes`: a rank that serves n others holds n pieces. Collective, blocking.
 * \param [in] so_far  what this rank has failed at since the ranks last agreed: told to all, so
 *                     that none waits for it.
 * \return the same on all ranks. */
qs_status qs_relay(qs_comm *comm, qs_status so_far, size_t piece_bytes, const qs_relay_want *wants,
                   int count, qs_relay_read read, void *ctx);

#endif
