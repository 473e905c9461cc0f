/* Collectives over the ranks of a run. The communicator of one rank is comm_self.c, not an `if`
 * at each call; comm_threads.c makes N ranks out of N threads of one process, for tests;
 * comm_mpi.c is the real one (host memory).
 *
 * Every call is collective and is made by all ranks in the same order. After an error that is not
 * a status of qs_comm_agree only qs_comm_destroy and qs_comm_abort are allowed. No call sums
 * floats across ranks: sums whose order matters are made by the callers from gathered parts, so
 * that no result depends on the number of ranks. */
#ifndef QS_COMM_COMM_H
#define QS_COMM_COMM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "device/device.h"

typedef struct qs_comm qs_comm;

qs_status qs_comm_self_create(qs_comm **out);

/** One communicator per rank of a team of threads. `out[nranks]`; each thread uses and destroys
 * its own. */
qs_status qs_comm_threads_create(qs_comm **out, int nranks);

/** MPI_Init (if it has not happened) and the world communicator. qs_comm_destroy finalizes MPI if
 * this call initialized it. */
qs_status qs_comm_mpi_create(qs_comm **out, int *argc, char ***argv);

/** Nonzero if a launcher started this process as one of several: Open MPI's mpirun, PMIx, PMI, or
 * an srun step. Where it is zero, qs_comm_self_create is the right one, and MPI need not start. */
int qs_comm_launched(void);

/** Did Open MPI's mpirun start this process? Before MPI starts: afterwards its variables are there
 * under srun as well. */
bool qs_comm_launched_by_mpirun(void);

/** Name and version of the MPI library, one line. MPI need not have started. */
void qs_comm_mpi_version(char *out, size_t capacity);

/** A communicator of the ranks that give the same `color` (from 0 on), in the order that they have
 * here. Collective over `comm`, which must outlive it; calls on the two may alternate, in the same
 * order on all ranks that both have. Of a communicator over the host's memory: the one over a
 * device's is made of the part (qs_backend_comm). */
qs_status qs_comm_split(qs_comm *comm, int color, qs_comm **out);

/** Ranks of every host, if all hosts have as many, more than one, there are several hosts, and the
 * ranks of each are neighbours; else 0. */
int qs_comm_per_host(const qs_comm *comm);

/** True where it is the order of the ranks alone that makes it 0: the launcher has dealt them out
 * to the hosts in turns. */
bool qs_comm_in_turns(const qs_comm *comm);

/** The ranks of a run, and the two levels that an exchange among all of them can take: inside of a
 * host, then across, between ranks that have the same number on their hosts. Rank r is number r %
 * n on host r / n for n ranks a host. */
typedef struct {
    qs_comm *world;
    qs_comm *inside, *across; /* NULL: one level */
} qs_levels;

void qs_comm_destroy(qs_comm *comm);

int qs_comm_rank(const qs_comm *comm);
int qs_comm_nranks(const qs_comm *comm);
int qs_comm_local_rank(const qs_comm *comm);   /* within the host */
int qs_comm_local_nranks(const qs_comm *comm); /* ranks on this host */
int qs_comm_host(const qs_comm *comm);         /* the lowest rank on this host: a name for it */
const char *qs_comm_name(const qs_comm *comm); /* "self", "threads", "mpi", "nccl" */

/** Gather every rank's shard, in rank order; asynchronous on `queue`.
 * \param [in]  send  [bytes_per_rank]; not to be changed until the queue has passed.
 * \param [out] recv  [nranks * bytes_per_rank]; `send` may lie at its own place in it. */
qs_status qs_comm_all_gather(qs_comm *comm, const void *send, void *recv, size_t bytes_per_rank,
                             qs_queue *queue);

/** Exchange pieces: `send_bytes[r]` bytes from send + send_at[r] go to rank r, and arrive at recv
 * + recv_at[..]. Asynchronous on `queue`; arrays are copied, buffers borrowed until the queue has
 * passed. Sizes may be zero and must match. */
qs_status qs_comm_all_to_all_v(qs_comm *comm, const void *send, const size_t *send_bytes,
                               const size_t *send_at, void *recv, const size_t *recv_bytes,
                               const size_t *recv_at, qs_queue *queue);

/** Calls of qs_comm_all_to_all_v from here to qs_comm_batch_end set out together, at its end: a
 * transport that takes its time to start a call starts them as one. None may send what another of
 * them receives. `st`, what came of them, is returned if it is an error; the batch is closed in any
 * case. Collective. */
qs_status qs_comm_batch_begin(qs_comm *comm);
qs_status qs_comm_batch_end(qs_comm *comm, qs_status st);

/** Blocking small ones. */
qs_status qs_comm_bcast(qs_comm *comm, void *data, size_t bytes, int root);
qs_status qs_comm_barrier(qs_comm *comm);
qs_status qs_comm_max_i64(qs_comm *comm, int64_t *values, int count);
qs_status qs_comm_sum_i64(qs_comm *comm, int64_t *values, int count);

/** Blocking all-gather of a few bytes per rank. */
qs_status qs_comm_all_gather_now(qs_comm *comm, const void *send, void *recv,
                                 size_t bytes_per_rank);

/** The time that this rank takes for an all-gather of `bytes` in all, the best of three; more than
 * 8 MiB are extrapolated from that much. 0 with one rank. Not counted as traffic. Collective. */
qs_status qs_comm_gather_time(qs_comm *comm, size_t bytes, double *seconds);

/** One rank's failure is everyone's: returns QS_OK on all ranks if `mine` is QS_OK on all, else on
 * all ranks the status of the lowest failing rank (QS_ERR_PEER counts only where nobody knows of
 * more), whose own error text stays the one to print; the others are told and keep silent. The line
 * ends with that rank and its host, unless it is rank 0. A rank that waits here for others that do
 * not come prints its error by itself (base/cause.h); it is the one whose status counts then. */
qs_status qs_comm_agree(qs_comm *comm, qs_status mine);

/** The same, and on the same way the largest `*most` of all ranks, which stays as it is after an
 * error. All ranks make this call, or all make the one above. */
qs_status qs_comm_agree_most(qs_comm *comm, qs_status mine, int64_t *most);

/** After a call that was collective over `part` alone, a communicator split from this one: what
 * failed there is over for all, if the part has agreed on it; else it is this rank's alone, and
 * returned as it is. Collective over `comm`. */
qs_status qs_comm_agree_after(qs_comm *comm, const qs_comm *part, qs_status st);

/** Threads for this rank: `wanted`, OMP_NUM_THREADS, or its share of the cores that it is bound to
 * among all ranks whose bindings overlap its own (base/cores.h). Collective, since only the
 * others know whether they run on the same cores; where none does, the rank settles down on its
 * binding (qs_cores_place). */
qs_status qs_comm_threads(qs_comm *comm, int wanted, int *threads);

/** True if the last qs_comm_agree returned an error: every rank knows, and all may leave in peace.
 * An error without it is this rank's alone, the others may be waiting for it in another call, and
 * only qs_comm_abort ends the job. */
bool qs_comm_agreed(const qs_comm *comm);

/** Broadcast a string from rank `root` (NULL elsewhere); every rank gets its own copy in *text, to
 * be freed. */
qs_status qs_comm_bcast_text(qs_comm *comm, char **text, int root);

/** Print the error, with this rank and its host, and end the whole job at once with the exit code
 * of `status`: for errors on which the ranks cannot agree. Does not return, but for a team of
 * threads: there every later call of the other ranks returns QS_ERR_PEER. `comm` may be NULL: this
 * process ends. */
void qs_comm_abort(qs_comm *comm, qs_status status);

/** The same, after an error that was not agreed on; after any other status nothing happens. It may
 * be this rank's alone, with the others waiting elsewhere. It may also have come up on all ranks,
 * so that the lower ones get the time to speak first; and where it says that a peer was lost
 * (QS_ERR_PEER), that one has most likely failed by itself, and gets more time to say of what. */
void qs_comm_end_unagreed(qs_comm *comm, qs_status status);

/** Bytes that this rank received from others so far (all collectives). */
uint64_t qs_comm_received_bytes(const qs_comm *comm);

/** Those of them that came from other hosts. */
uint64_t qs_comm_foreign_bytes(const qs_comm *comm);

/** Calls by what they are made of: all_gather and all_to_all_v are a message to and from every
 * other rank that has something to say; the small ones (all_gather_now, bcast, barrier, and what is
 * built on them) are the transport's own affair, so that their messages are not counted. */
typedef enum { QS_COMM_GATHERS, QS_COMM_EXCHANGES, QS_COMM_SMALL, QS_COMM_KIND_COUNT } qs_comm_kind;

typedef struct {
    uint64_t calls;
    uint64_t messages; /* that this rank received from others; longer than 1 GiB still one */
    uint64_t bytes;    /* received from others */
} qs_comm_traffic;

/** What this rank has asked for and received so far. */
qs_comm_traffic qs_comm_get_traffic(const qs_comm *comm, qs_comm_kind kind);

#endif
