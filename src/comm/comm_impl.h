/* What the communicators share: the table of calls behind comm.h, and the part of the object that
 * comm.c knows. */
#ifndef QS_COMM_IMPL_H
#define QS_COMM_IMPL_H

#include "comm/comm.h"

/** One transport. comm.c checks arguments, counts bytes, and builds the small reductions on
 * all_gather_now and bcast. */
typedef struct {
    const char *name;
    qs_status (*all_gather)(qs_comm *comm, const void *send, void *recv, size_t bytes_per_rank,
                            qs_queue *queue);
    qs_status (*all_to_all_v)(qs_comm *comm, const void *send, const size_t *send_bytes,
                              const size_t *send_at, void *recv, const size_t *recv_bytes,
                              const size_t *recv_at, qs_queue *queue);
    qs_status (*batch_begin)(qs_comm *comm); /* NULL, and the next: every call sets out by itself */
    qs_status (*batch_end)(qs_comm *comm, qs_status st);
    qs_status (*all_gather_now)(qs_comm *comm, const void *send, void *recv, size_t bytes_per_rank);
    qs_status (*bcast)(qs_comm *comm, void *data, size_t bytes, int root);
    qs_status (*barrier)(qs_comm *comm);
    qs_status (*split)(qs_comm *comm, int color, qs_comm **out);
    void (*progress)(qs_comm *comm); /* messages under way move on; NULL: they do by themselves */
    void (*abort)(qs_comm *comm, qs_status status);
    void (*destroy)(qs_comm *comm); /* frees the whole object */
} qs_comm_ops;

/** Values per rank that the scratch holds: longer vectors are reduced in pieces, so that no call
 * allocates. */
enum { QS_COMM_SCRATCH_VALUES = 64 };

/** First member of every communicator. */
struct qs_comm {
    const qs_comm_ops *ops;
    int rank, nranks;
    int world_rank; /* by which people know this one; `rank` unless split off */
    int local_rank, local_nranks;
    int *hosts; /* [nranks] the lowest rank on each rank's host */
    uint64_t received_bytes, foreign_bytes;
    qs_comm_traffic traffic[QS_COMM_KIND_COUNT];
    int64_t *scratch; /* [nranks * QS_COMM_SCRATCH_VALUES] */
    bool by_mpirun;   /* Open MPI's mpirun started this process, and has bound it */
    bool agreed;      /* an error was agreed on: all ranks are leaving */
};

/** Fill in the common part; the local ranks are those of one host with all ranks. */
qs_status qs_comm_init(qs_comm *comm, const qs_comm_ops *ops, int rank, int nranks);

/** Free what qs_comm_init allocated. */
void qs_comm_fini(qs_comm *comm);

#endif
