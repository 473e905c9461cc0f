/* What measurements of single operations share, in `qshard bench` and in benchmarks/bench_ops.c: a
 * queue of some device, buffers of random numbers, the time of a call, and the two bounds that
 * every figure is held against, measured in the same run. Needs neither MPI nor HDF5. */
#ifndef QS_BENCH_KERNELS_MEASURE_H
#define QS_BENCH_KERNELS_MEASURE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "backend/plugin.h"
#include "kernels/ops.h"

enum { QS_BENCH_BUFFERS_MAX = 256, QS_BENCH_BATCHES_MAX = 1000 };

typedef struct {
    const qs_plugin *plugin; /* NULL: the CPU */
    qs_device *device;       /* borrowed */
    const qs_ops *ops;
    qs_queue *queue;
    bool ops_open;
    bool small;           /* tiny shapes, one call a batch: to try the program itself */
    int batches;          /* timed per figure */
    int sharers;          /* ranks of this host that measure at the same time */
    double copy_rate;     /* B/s of a copy inside the device's memory, read + written */
    double matmul_rate;   /* FLOP/s: see qs_bench_bounds */
    char matmul_name[32]; /* what it was measured by: "bf16 8192^3" */
    uint64_t random;      /* state of the generator */
    void *taken[QS_BENCH_BUFFERS_MAX];
    int n_taken;
} qs_bench;

/** One operation, given to b->queue. */
typedef qs_status (*qs_bench_call)(qs_bench *b, void *ctx);

/** What bounds an operation. */
typedef enum { QS_BENCH_COPY, QS_BENCH_MATMUL } qs_bench_bound;

/** Seconds of one call. */
typedef struct {
    double median, min, max;
} qs_bench_times;

/** Ascending, in place. */
void qs_bench_sort(double *values, int64_t count);

/** The q-th part (0..1) of `sorted`, between its neighbours, as numpy's quantile. */
double qs_bench_quantile(const double *sorted, int64_t count, double q);

/** A queue of `device` with `threads` (CPU). `plugin` NULL: the CPU. */
qs_status qs_bench_open(qs_bench *b, const qs_plugin *plugin, qs_device *device, const qs_ops *ops,
                        int threads, bool small);

/** Prepare the operations for calls up to `limits`. */
qs_status qs_bench_open_ops(qs_bench *b, const qs_ops_limits *limits);

/** Buffers, operations and queue go; the device stays. A zeroed object is fine. */
void qs_bench_close(qs_bench *b);

/** Measure the two bounds; the operations must be open. On a GPU a copy of 1 GiB in device memory
 * and a product of 8192^3 in bf16; on the CPU a copy of 256 MiB over all sharers, and fused
 * multiply-adds of the register tile on operands in the L1 cache, both on all threads of the queue
 * at once. */
qs_status qs_bench_bounds(qs_bench *b);

/** FLOP/s of the products of a table of the CPU, as qs_bench_bounds measures them, and of what. */
double qs_bench_products_rate(qs_bench *b, const qs_ops *ops, const char **name);

/** Time `call` in b->batches batches, each long enough for the clock. */
qs_status qs_bench_time(qs_bench *b, qs_bench_call call, void *ctx, qs_bench_times *out);

/* ---- buffers of the device; all of them go with qs_bench_free ---- */

/** Random contents: numbers in [-1, 1) of `dtype`, or random bytes (QS_U8). */
qs_status qs_bench_random(qs_bench *b, void **out, qs_dtype dtype, int64_t count);
/** Zeroed. */
qs_status qs_bench_zeros(qs_bench *b, void **out, size_t bytes);
/** A copy of host memory. */
qs_status qs_bench_upload(qs_bench *b, void **out, const void *host, size_t bytes);
/** A matrix of the operations' type, `border` elements free behind each row. */
qs_status qs_bench_mat(qs_bench *b, qs_mat *out, int64_t rows, int64_t cols, int64_t border);

void qs_bench_free(qs_bench *b);

/** A copy of device memory on the host, to be freed with free(). Waits. */
qs_status qs_bench_download(qs_bench *b, void **out, const void *device, size_t bytes);

#endif
