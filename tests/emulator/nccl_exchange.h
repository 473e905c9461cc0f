/* What a call of NCCL, or a group of calls, moves between ranks: nccl_mpi.c's own. */
#ifndef QS_EMULATOR_NCCL_EXCHANGE_H
#define QS_EMULATOR_NCCL_EXCHANGE_H

#include <mpi.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "nccl.h"

enum { TEXT_BYTES = 160 }; /* of what is said of a call */

typedef enum { ALL_GATHER, BROADCAST, POINT_TO_POINT } call_kind;

/** What a piece belongs to, which both sides must agree on. */
typedef struct {
    int64_t bytes, collectives; /* that this communicator has had before */
    int32_t kind, root;
} word;

/** What goes to a peer or comes from it. */
typedef struct {
    char *at;    /* device memory */
    char *aside; /* host memory */
    size_t bytes;
    int peer;
    bool send;
    word mine, theirs;
    MPI_Request request; /* of the word that comes */
    bool open;           /* it has come, and so may the bytes */
} piece;

/** Everything of a call, or of a group of calls. */
typedef struct exchange {
    ncclComm_t comm;
    struct exchange *older;        /* of the communicator */
    struct exchange *next, **from; /* of all that this process has under way */
    cudaStream_t stream;
    piece *pieces;
    int n_pieces, capacity;
    MPI_Request *requests;
    int n_requests;
    bool collective, arrived;
    bool spoiled; /* brings wrong bytes */
} exchange;

struct ncclComm {
    int rank, nranks;
    bool blocking;
    MPI_Comm mpi;        /* MPI_COMM_NULL: one rank */
    MPI_Request joining; /* of the duplicate that mpi is to be */
    exchange *current;   /* those that streams still have, the last one first */
    bool destroyed;      /* freed with the last of them */
    bool was_polled;     /* since the last call */
    int64_t collectives; /* so far */
    atomic_bool ended;   /* aborted: nothing arrives any more, and it may not be used */
    ncclResult_t failed;
};

/** End the program with a line that begins with "emulator:". */
_Noreturn void nm_die(const char *what);

/** Zeros, or the end of the program. */
void *nm_allocate(size_t count, size_t bytes);

/** One piece more; its `aside` is made here. */
void nm_add(exchange *x, piece p);

/** An exchange that has not run. */
void nm_free(exchange *x);

/** Begin it, in its stream, which frees it. \return what the call says, ncclInProgress where the
 * communicator does not block. */
ncclResult_t nm_run(exchange *x);

/** Has everything come? With `wait`, true unless the communicator is aborted meanwhile. */
bool nm_has_arrived(exchange *x, bool wait);

/** Free a communicator that has been destroyed, now or with the last of what streams still have. */
void nm_comm_free(ncclComm_t comm);

#endif
