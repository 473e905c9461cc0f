/* How many threads a rank should use: the cores that the launcher gave it, or its share of the
 * machine. */
#ifndef QS_BASE_CORES_H
#define QS_BASE_CORES_H

#include <stdint.h>

/** Cores (not hardware threads) that this process may run on: its binding within what the job may
 * use. At least 1. */
int qs_cores_available(void);

/** Nonzero if the process is bound to a part of the cores that the job may use on this host. */
int qs_cores_bound(void);

/** Threads for this rank: `wanted` if positive; else the first number in OMP_NUM_THREADS; else all
 * cores of the binding if the process is bound; else its share of the cores among `local_nranks`
 * ranks, at least 1 (the first ranks get one more where the division leaves a rest). A binding is
 * taken for this rank's own. Where a job is started inside one (`taskset -c 0-7 mpirun -np 4
 * ...`, a batch script that the scheduler has bound) the ranks share it: qs_comm_threads finds
 * that out by asking the others. */
int qs_threads_for_rank(int local_nranks, int local_rank, int wanted);

/** The same, knowing that `sharers` ranks run on the cores of this rank's binding, this one being
 * number `index`. */
int qs_threads_for_share(int sharers, int index, int wanted);

/** Settle down on a binding that no other rank shares, for `threads` threads of a team. Bound by
 * the launcher, and with a core for each of them: each gets one of its own (places.h). Not bound,
 * others may be on the same cores without knowing, and the system may choose. On cores next to
 * several memory nodes: pages go to these nodes in turns, because tasks go to any thread; with a
 * rank for each node, which is faster, they are the rank's own. */
void qs_cores_place(int threads);

/** What qs_comm_threads compares: processes that can compete for cores have equal `host`, and do
 * if their masks of hardware threads overlap (numbers past the mask are folded into it, which can
 * only make a share smaller). */
enum { QS_CORES_MASK_WORDS = 16 };
typedef struct {
    uint64_t
        host; /* of the running kernel, so that two containers of one machine count as one host */
    uint64_t mask[QS_CORES_MASK_WORDS];
} qs_cores_binding;

void qs_cores_get_binding(qs_cores_binding *out);
int qs_cores_overlap(const qs_cores_binding *a, const qs_cores_binding *b);

/** Cores of this host that the job may use (Slurm's count, where it is smaller and no control group
 * says so), and those of them that one of the bindings, of all ranks, reaches. */
typedef struct {
    int used, all;
} qs_cores_use;

qs_cores_use qs_cores_count_use(const qs_cores_binding *bindings, int count);

/** Threads that somebody has asked for, by `wanted` or OMP_NUM_THREADS; 0: nobody has. */
int qs_threads_asked_for(int wanted);

#endif
