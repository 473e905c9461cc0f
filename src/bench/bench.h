/* `qshard bench`: what the parts of a step cost on the machine at hand, each beside its bound and
 * with its result checked. Collectives and steps run on all ranks, single operations on one. */
#ifndef QS_BENCH_BENCH_H
#define QS_BENCH_BENCH_H

#include "comm/comm.h"
#include "config/config.h"

typedef enum {
    QS_BENCH_GATHER,    /* all-gather, as of a unit's shares */
    QS_BENCH_REDUCE,    /* sums of gradients along the slot tree */
    QS_BENCH_STEP,      /* a training step and its parts */
    QS_BENCH_GEMM,      /* Y = X W^T, dX = dY W */
    QS_BENCH_DECODE,    /* NF4 to what products read */
    QS_BENCH_ATTENTION, /* forward and backward */
    QS_BENCH_HEAD,      /* a chunk of the vocabulary */
    QS_BENCH_COUNT
} qs_bench_kind;

/** 0 in a number stands for its default. */
typedef struct {
    qs_bench_kind kind;
    qs_device_kind device; /* of a step the configuration's counts */
    bool allow_shared_device;
    int64_t threads;
    const char *json;        /* file to write the results to, or NULL */
    int64_t repeats, warmup; /* warmup -1: default */

    /* gather, reduce */
    int64_t begin_bytes, end_bytes, factor;
    int64_t group; /* ranks, or QS_SHARD_WORLD, QS_SHARD_NODE */

    /* single operations */
    int64_t tokens;
    int64_t rows, cols; /* of the weight: out and in, chunk and hidden */
    int64_t heads, kv_heads, head_dim;

    qs_config config; /* step: base, train, lora, optim, shard, memory, cpu; its data are made up */
} qs_bench_options;

/** Measure and print a table on stdout of rank 0. Collective.
 * \return QS_ERR_NUMERIC if a result is wrong, after everything is printed and written. */
qs_status qs_bench_run(const qs_bench_options *options, qs_comm *comm);

const char *qs_bench_name(qs_bench_kind kind);

/** The number of the benchmark called `name`. \return QS_ERR_USAGE naming those that there are. */
qs_status qs_bench_find(const char *name, qs_bench_kind *out);

#endif
