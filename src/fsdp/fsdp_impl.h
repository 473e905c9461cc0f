/* What the files of src/fsdp share, and the way in for tests that have no base.h5. */
#ifndef QS_FSDP_FSDP_IMPL_H
#define QS_FSDP_FSDP_IMPL_H

#include "fsdp/fsdp.h"
#include "shard/shard.h"

/** Fill this rank's share of unit `u` (what qs_base_read_share does) and add the bytes read to
 * *bytes_read. */
typedef qs_status (*qs_share_fill)(void *ctx, int u, int rank, int nranks, uint8_t *message,
                                   uint64_t *bytes_read);

/** qs_fsdp_create with another source of the shares. Collective. */
qs_status qs_fsdp_create_from(qs_fsdp **out, const qs_base_index *index, qs_comm *comm,
                              qs_queue *compute, qs_share_fill fill, void *ctx);

/** Buffers of the embedding's exchange, grown on demand. Positions count rows, owner by owner. */
typedef struct {
    int32_t *row_of; /* [vocab] position of a token's row in `want` while a call runs, else -1 */
    int32_t *unique; /* [want_capacity] ids in order of first appearance */
    int32_t *want;   /* [want_capacity] the same ids, grouped by owner */
    uint8_t *rows;   /* [want_capacity * row_bytes] their rows, as stored */
    int64_t want_capacity; /* rows */
    int32_t *asked;        /* [asked_capacity] ids that others want from here */
    uint8_t *answer;       /* [asked_capacity * row_bytes] */
    int64_t asked_capacity;
    int64_t *counts;  /* [2 nranks] rows wanted from each rank, rows that each rank asks */
    size_t *exchange; /* [4 nranks] bytes and offsets of an exchange */
    int64_t *at;      /* [nranks + 1] first position of each owner in `want` */
} qs_embed;

/** One of the two gather buffers. `unit` is what it holds or is about to hold (-1: nothing). */
typedef struct {
    uint8_t *bytes;
    int unit;
    int held;        /* acquires that have not been released */
    bool in_flight;  /* the gather has not been waited for */
    qs_event landed; /* valid while in_flight */
    uint64_t used;   /* when it was last acquired, for the choice of a victim */
} qs_gather_buffer;

enum { QS_GATHER_BUFFERS = 2 };

struct qs_fsdp {
    const qs_base_index *index;
    qs_comm *comm;
    qs_queue *compute;
    qs_queue *queue; /* gathers, embedding exchanges, attached reductions, in program order */
    int rank, nranks;
    qs_unit_layout *layouts; /* [n_units] */
    size_t *share_at;        /* [n_units] */
    uint8_t *shares;         /* this rank's messages of all units */
    int *held;               /* [n_units] acquires per unit; the only state with one rank */
    qs_gather_buffer buffers[QS_GATHER_BUFFERS];
    uint64_t clock;
    qs_embed embed;
    qs_fsdp_stats stats;
};

void qs_embed_free(qs_embed *embed);
qs_status qs_embed_init(qs_fsdp *fsdp);

/* ---- partial sums of the slot tree (partials.c) ---- */

/** A node of the tree and its sum. */
typedef struct {
    qs_slot_node node;
    float *sum;
} qs_partial;

/** The nodes that wait for a sibling, in slot order: the digits of a binary counter. */
typedef struct {
    qs_partial *at;
    int depth;
} qs_partials;

/** Buffers of one size, handed out last in, first out. */
typedef struct {
    float **free;
    int count;
} qs_float_pool;

/** What the additions need. */
typedef struct {
    const qs_ops *ops;
    qs_queue *compute;
    int64_t slots;
    int64_t count; /* elements of a sum */
} qs_tree;

/** Push a node and carry: as long as the last two are siblings, left += right, and the right
 * buffer goes to `pool` (NULL: nowhere); a node without a sibling rises. */
qs_status qs_partials_push(qs_partials *stack, qs_partial partial, const qs_tree *tree,
                           qs_float_pool *pool);

/** Gradient buffers that a rank with `range` of the slots holds at most, in passes of `group`
 * slots through `n_layers`. In the last pass a layer's buffers are free again when its reduction,
 * one of `in_flight`, has ended. */
int qs_partials_buffers(int n_layers, int64_t slots, int nranks, int rank, int64_t group,
                        int in_flight);

#endif
