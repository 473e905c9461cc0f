/* Is what a case's calls wrote right? Some of its elements are computed again in fp64, by the
 * textbook, from the same inputs; a weight is what qs_weight_decode says. Limits count roundings:
 * fp32 sums on the CPU, bf16 results and probabilities on a GPU. */
#ifndef QS_BENCH_KERNELS_CHECK_H
#define QS_BENCH_KERNELS_CHECK_H

#include "bench/kernels/cases.h"

typedef struct {
    double error;           /* largest difference, over the largest magnitude of the reference */
    int64_t wrong, checked; /* elements: above the limit, in all */
} qs_bench_check;

/** Every weight of the unit on the CPU; on a GPU, which keeps what it decoded to itself, columns of
 * each linear by way of products with unit vectors. Exact. Calls the operations. */
qs_status qs_bench_check_decode(qs_bench *b, const qs_bench_unit *u, qs_bench_check *out);

/** After qs_bench_linear_forward, _dense, _backward: rows of y, y, dx. */
qs_status qs_bench_check_forward(qs_bench *b, const qs_bench_linear *l, qs_bench_check *out);
qs_status qs_bench_check_dense(qs_bench *b, const qs_bench_linear *l, qs_bench_check *out);
qs_status qs_bench_check_backward(qs_bench *b, const qs_bench_linear *l, qs_bench_check *out);

/** After both calls: rows of o and dq, and the last rows of dk and dv (all of a head's queries that
 * see them count there). */
qs_status qs_bench_check_attention(qs_bench *b, const qs_bench_attention *a, bool backward,
                                   qs_bench_check *out);

/** After qs_bench_head_chunk: the logarithm of the sum, the target's logit and O / sum. */
qs_status qs_bench_check_head(qs_bench *b, const qs_bench_head *h, qs_bench_check *out);

#endif
