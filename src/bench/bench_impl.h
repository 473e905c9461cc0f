/* What the benchmarks share: where they run, and what they say about it. */
#ifndef QS_BENCH_BENCH_IMPL_H
#define QS_BENCH_BENCH_IMPL_H

#include "backend/backend.h"
#include "bench/bench.h"
#include "bench/kernels/measure.h"
#include "bench/report.h"

/** A benchmark that is running. */
typedef struct {
    const qs_bench_options *options;
    qs_comm *world; /* over the host's memory; borrowed */
    qs_bench_report *report;
    int64_t wrong; /* elements, of all ranks: the same on every rank */
} qs_bench_job;

/** Say what the place is: CPU, ranks, nodes, threads, device. Collective. */
qs_status qs_bench_describe(qs_bench_job *job, const qs_device *device, const qs_ops *ops,
                            int threads, const char *comm_name);

/** Room in the operations for nothing: for collectives and bounds on a GPU. */
qs_ops_limits qs_bench_least_limits(int threads);

/** Median (between the middle two where there are two), least and largest of `values` [count],
 * which are sorted. */
qs_bench_times qs_bench_summary(double *values, int64_t count);

/** The bound as a share of the time, in percent; NaN above 100, where it is no bound: what it was
 * measured by was slower than the step, which other programs or caches may make it. */
double qs_bench_share(double bound, double time);

/** Replace `values` [count] of seconds by the largest of all ranks. Collective. */
qs_status qs_bench_slowest(qs_comm *comm, double *values, int64_t count);

qs_status qs_bench_collectives(qs_bench_job *job);
qs_status qs_bench_single(qs_bench_job *job);
qs_status qs_bench_step(qs_bench_job *job);

#endif
