/* What the files of qs_fsdp share, and the way in for tests that have no base.h5. */
#ifndef QS_FSDP_FSDP_IMPL_H
#define QS_FSDP_FSDP_IMPL_H

#include "fsdp/fsdp.h"
#include "fsdp/gather_plan.h"
#include "shard/shard.h"

/** Fill this rank's share of unit `u` (what qs_base_read_share does) and add the bytes read to
 * *bytes_read. */
typedef qs_status (*qs_share_fill)(void *ctx, int u, int rank, int nranks, uint8_t *message,
                                   uint64_t *bytes_read);

/** Where shares come from. */
typedef struct {
    qs_share_fill fill;
    void *ctx;
    qs_comm *together; /* `fill` is collective over these ranks, unit by unit; NULL: it is not */
} qs_share_source;

/** qs_fsdp_create with another source of the shares. Collective. */
qs_status qs_fsdp_create_filled(qs_fsdp **out, const qs_base_index *index, qs_comm *comm,
                                qs_queue *compute, const qs_fsdp_options *options,
                                const qs_share_source *source);

/** The same with a `fill` that is not collective. */
qs_status qs_fsdp_create_from(qs_fsdp **out, const qs_base_index *index, qs_comm *comm,
                              qs_queue *compute, const qs_fsdp_options *options, qs_share_fill fill,
                              void *ctx);

/** Rows of the embedding that have been asked for. Positions count rows, owner by owner. */
typedef struct {
    int64_t tokens;
    qs_status st;             /* what came of collecting the ids; told when they are answered */
    int32_t *want;            /* [room] each id once, grouped by owner */
    int64_t *at;              /* [nranks + 1] first position of each owner in `want` */
    int32_t *sent, *received; /* [nranks, header + round] messages of ids to and from each rank */
    qs_mirror index;          /* [max_tokens] int32: the row of each token */
    qs_event arrived;         /* `received` is there */
    qs_event index_read;      /* the device has taken `index` */
} qs_embed_request;

/** Buffers of the embedding's exchange. */
typedef struct {
    int64_t room;  /* ids that one call can want */
    int64_t round; /* rows that one rank gets from one owner in a round */
    qs_embed_request requests[QS_EMBED_OPEN_MAX];
    int first, open;    /* those that have been asked and not placed: from `first` on */
    bool is_answered;   /* the first of them: its rows are on their way */
    int32_t *row_of;    /* [vocab] position of a token's row while ids are collected, else -1 */
    int32_t *unique;    /* [room] ids in order of first appearance */
    int64_t *counts;    /* [4 nranks] rows of a round that are wanted and asked, and their places */
    size_t *exchange;   /* [4 nranks] bytes and offsets of an exchange */
    qs_mirror asked_at; /* [nranks * round] int64: where the asked rows lie in the shares, bytes */
    uint8_t *answer;    /* [nranks * round * row_bytes] on the device */
    uint8_t *rows;      /* [room * row_bytes] on the device: rows as stored */
    double departed_s;  /* when the rows of the first request set out */
    qs_event answered;  /* `asked_at` and `answer` have been read */
    qs_event landed;    /* `rows` are there */
    qs_event rows_read; /* compute has read `rows` */
} qs_embed;

/** Gathers that the host may have given to a queue and that have not landed. NCCL has room for some
 * thousand messages of a rank's under way, dozens to a gather, and may wait for ever beyond it
 * (nccl#2353): a rank without work in a step would give it a whole step's. */
enum { QS_FSDP_LEAD_MAX = 16 };

/** What is under way into a gather buffer; which unit that is, the plan knows. */
typedef struct {
    uint8_t *bytes;
    bool in_flight;    /* the gather has not been waited for */
    qs_event landed;   /* valid while in_flight */
    qs_event released; /* compute has passed what was given to it before the last release */
    qs_fsdp *fsdp;     /* for the clock at the end of a gather: */
    int unit;          /* of the last gather, */
    double started_s;  /* and when it started */
} qs_gather_buffer;

struct qs_fsdp {
    const qs_base_index *index;
    qs_fsdp_options options;
    qs_comm *comm;
    qs_device *device;
    qs_queue *compute;
    qs_queue *queue;      /* gathers and attached reductions, in program order */
    qs_queue *host_queue; /* ids of the embedding: they wait for no gather */
    qs_queue *row_queue;  /* rows of the embedding: on the CPU with the ids, else with gathers */
    int rank, nranks;
    qs_unit_layout *layouts; /* [n_units] */
    uint8_t **share;         /* [n_units] this rank's message of each unit */
    bool *offloaded;         /* [n_units] the share lies in pinned host memory */
    bool *at_hand;        /* [n_units] whole on this rank, its share at its place: never gathered */
    uint8_t *shares;      /* those on the device, and units that stay */
    uint8_t *host_shares; /* those in pinned host memory */
    int *held;            /* [n_units] acquires per unit */
    qs_gather_plan plan;
    qs_gather_buffer buffers[QS_GATHER_BUFFERS_MAX];
    qs_event last_landed[QS_FSDP_LEAD_MAX]; /* of the last gathers, in turn */
    qs_embed embed;
    double gathers_until_s; /* end of the last gather */
    qs_fsdp_stats stats;
};

/** Fill all shares (fill.c). `so_far`: what creating has come to on this rank, `fsdp` may then be
 * NULL; ranks that fill together are told. */
qs_status qs_shares_fill(qs_fsdp *fsdp, qs_status so_far, const qs_share_source *source);

void qs_embed_free(qs_fsdp *fsdp);
qs_status qs_embed_init(qs_fsdp *fsdp);
void qs_embed_plan(const qs_base_index *index, int nranks, const qs_fsdp_options *options,
                   qs_fsdp_bytes *bytes);

#endif
