/* What benchmarks of a GPU share: a plugin with one device and one queue, random matrices, and a
 * table whose every row has the bound beside the figure, measured in the same run. */
#ifndef QS_BENCHMARKS_BENCH_DEVICE_H
#define QS_BENCHMARKS_BENCH_DEVICE_H

#include <stdbool.h>
#include <stdio.h>

#include "backend/plugin.h"

typedef struct {
    const qs_plugin *plugin;
    qs_device *device;
    const qs_ops *ops;
    qs_queue *queue;
    bool small;         /* small shapes: to try the program itself */
    double copy_rate;   /* B/s of a copy inside device memory, read and written bytes together */
    double matmul_rate; /* FLOP/s of a large square product */
    FILE *csv;          /* NULL: none */
} bench;

/** One operation, given to b->queue. */
typedef qs_status (*bench_call)(bench *b, void *ctx);

/** What bounds an operation. */
typedef enum { BENCH_COPY, BENCH_MATMUL } bench_bound;

qs_status bench_open(bench *b, const char *plugin, bool small, const char *csv);
void bench_close(bench *b);

/** Seconds of one call: the median of 7 batches, each long enough for the clock. */
qs_status bench_time(bench *b, bench_call call, void *ctx, double *seconds);

/** Measure the two bounds; the operations must be open. */
qs_status bench_ceilings(bench *b);

/** Time `call` and print a row. `amount`: the bytes that it must move or the operations that it
 * must do. The seconds also go to *seconds, if not NULL. */
qs_status bench_row(bench *b, const char *name, const char *shape, bench_bound bound, double amount,
                    bench_call call, void *ctx, double *seconds);

/** Device memory with random contents: numbers in [-1, 1) of `dtype`, or random bytes (QS_U8). */
qs_status bench_random(bench *b, void **out, qs_dtype dtype, int64_t count);
/** Zeroed device memory. */
qs_status bench_zeros(bench *b, void **out, size_t bytes);
/** A copy of host memory. */
qs_status bench_upload(bench *b, void **out, const void *host, size_t bytes);
/** A matrix of the operations' type, `border` elements free behind each row. */
qs_status bench_mat(bench *b, qs_mat *out, int64_t rows, int64_t cols, int64_t border);

/** Everything that bench_random, _zeros, _upload and _mat took since bench_open goes. */
void bench_free_all(bench *b);

#endif
