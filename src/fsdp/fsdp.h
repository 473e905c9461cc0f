/* Fully sharded base: every rank keeps its share of each unit, and sees a whole unit only between
 * acquire and release.
 *
 * A pass announces the order in which it will use units (qs_fsdp_begin). acquire(u) waits for the
 * gather of u, starts the gathers of the next ones into the buffers that are free, and hands out a
 * view of u. The gathers run on a queue of their own; the compute queue polls it between tiles
 * (qs_queue_set_idle). With one rank nothing is copied: the share is the unit. Zhao et al. 2023,
 * arXiv:2304.11277 (FSDP); the unit protocol is theirs, the bytes are NF4. */
#ifndef QS_FSDP_FSDP_H
#define QS_FSDP_FSDP_H

#include <stdint.h>

#include "comm/comm.h"
#include "device/device.h"
#include "kernels/ops.h"
#include "weights/base_file.h"

typedef struct qs_fsdp qs_fsdp;

typedef struct {
    uint64_t gathered_bytes; /* received from others by gathers */
    uint64_t read_bytes;     /* of base.h5, by this rank */
    uint64_t gathers;
    double gather_s; /* time that gathers were under way; 0 on a device that does not tell */
    double wait_s;   /* time that compute stood still for them, and for rows of the embedding */
    qs_comm_traffic embedding; /* ids and rows that came from others */
} qs_fsdp_stats;

/** What qs_fsdp_create needs to know beside the base. */
typedef struct {
    const qs_ops *ops;       /* for the rows of the embedding; of the compute queue's device */
    int64_t max_tokens;      /* of one request for rows of the embedding; alike on all ranks */
    bool offload_layers;     /* keep the layers' shares in pinned host memory */
    bool offload_vocabulary; /* likewise embedding and head */
    int64_t prefetch;        /* gathers ahead of use, 1 to QS_PREFETCH_MAX; one buffer more */
    int64_t keep_resident;   /* layers that every rank keeps whole on the device */
} qs_fsdp_options;

/** Read this rank's share of every unit into the memory of the compute queue's device, gather the
 * layers that stay, and allocate the gather buffers. Collective. `index` is borrowed. */
qs_status qs_fsdp_create(qs_fsdp **out, const qs_base_index *index, qs_comm *comm,
                         qs_queue *compute, const qs_fsdp_options *options);
void qs_fsdp_destroy(qs_fsdp *fsdp);

/** Whether unit `u` must come from other ranks when it is used. */
bool qs_fsdp_is_gathered(const qs_fsdp *fsdp, int u);

/** Whether unit `u` lies whole on this rank's device all the time. */
bool qs_fsdp_stays(const qs_fsdp *fsdp, int u);

/** Wait for the other ranks that share the base. Collective. */
qs_status qs_fsdp_barrier(qs_fsdp *fsdp);

/** Announce the order in which the next calls of qs_fsdp_acquire use units: `units` [count], at
 * most three times as many as there are. Collective: all ranks, the same order. */
qs_status qs_fsdp_begin(qs_fsdp *fsdp, const int *units, int count);

/** The unit `u`, the next of the order, whole, in device memory, for what is given to the compute
 * queue until qs_fsdp_release. Those behind it in the order are gathered meanwhile.
 * Collective: all ranks, same order. A unit that still lies in a buffer, released or not, is not
 * gathered again. QS_ERR_BUG out of order, with all buffers held (prefetch + 1), or for the release
 * of a unit that is not held. */
qs_status qs_fsdp_acquire(qs_fsdp *fsdp, int u, qs_unit_view *view);
qs_status qs_fsdp_release(qs_fsdp *fsdp, int u);

/* Rows of the embedding table: owners are asked by all-to-all, no rank gathers the table. Requests
 * are answered and placed in the order in which they are made. All calls are collective, the same
 * sequence on every rank; calls that need rows wait as long as the compute between them does not
 * cover the transfer. */

enum { QS_EMBED_OPEN_MAX = 2 }; /* requests: rows of one are on their way, ids of another */

/** Send the ids of `tokens` [count] (host memory; count may be 0), which are not needed any more
 * when the call returns. At most QS_EMBED_OPEN_MAX requests are open. An id outside of the
 * vocabulary is everybody's QS_ERR_BUG when the request is answered. */
qs_status qs_fsdp_embed_ask(qs_fsdp *fsdp, const int32_t *tokens, int64_t count);

/** Requests that have been made and not placed. */
int qs_fsdp_embed_open(const qs_fsdp *fsdp);

/** Send the rows that others want for the oldest open request. Nothing to do without one, or the
 * second time. */
qs_status qs_fsdp_embed_answer(qs_fsdp *fsdp);

/** Rows of the oldest open request, as `dtype`, fp32 or the ops' act_dtype, to out [count, hidden]
 * on the device. Answers first where nobody has. */
qs_status qs_fsdp_embed_place(qs_fsdp *fsdp, qs_dtype dtype, void *out);

/** All three in act_dtype, without a request ahead: QS_ERR_BUG if one is open. */
qs_status qs_fsdp_embed(qs_fsdp *fsdp, const int32_t *tokens, int64_t count, void *out);

qs_fsdp_stats qs_fsdp_get_stats(const qs_fsdp *fsdp);

/** The queue of the gathers, for what else is to move along with them. */
qs_queue *qs_fsdp_queue(const qs_fsdp *fsdp);

/** Whether a rank of `nranks` never gathers unit `u`: all of a single rank's that lie on its
 * device, and the layers that stay. Those are spread evenly over the model, so that the gathers
 * between them have twice the time where every second layer stays. */
bool qs_fsdp_at_hand(const qs_base_index *index, int u, int nranks, const qs_fsdp_options *options);

/** Bytes that qs_fsdp_create will hold for a rank, for the plan: shares (and layers that stay) on
 * the device, shares in pinned host memory, gather buffers, and what the embedding's exchange takes
 * on either side. */
typedef struct {
    size_t device_shard_bytes, host_shard_bytes, gather_bytes;
    size_t embed_device_bytes, embed_host_bytes;
} qs_fsdp_bytes;
qs_fsdp_bytes qs_fsdp_plan(const qs_base_index *index, int nranks, const qs_fsdp_options *options);

#endif
