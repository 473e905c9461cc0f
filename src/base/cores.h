/* How many threads a rank should use: the cores that the launcher gave it, or its share of the
 * machine. */
#ifndef QS_BASE_CORES_H
#define QS_BASE_CORES_H

/** Cores (not hardware threads) that this process may run on: its binding within what the job may
 * use. At least 1. */
int qs_cores_available(void);

/** Nonzero if the process is bound to a part of the cores that the job may use on this host. */
int qs_cores_bound(void);

/** Threads for this rank: `wanted` if positive; else the first number in OMP_NUM_THREADS; else all
 * cores of the binding if the process is bound; else its share of the cores among `local_nranks`
 * ranks, at least 1 (the first ranks get one more where the division leaves a rest). */
int qs_threads_for_rank(int local_nranks, int local_rank, int wanted);

#endif
