/* Checks of qs_cuda_gemm, C = alpha op(A) op(B) + C0, against sums in fp64: for every
 * transposition, type, and way of adding C0, with strides that are and are not multiples of 8. The
 * backend's plugin makes the products, on its opened queue. */
#ifndef QS_TESTS_GEMM_CHECKS_H
#define QS_TESTS_GEMM_CHECKS_H

#include "backend/plugin.h"
#include "twin.h"

/** Small sizes at, below and past multiples of 8, in every layout. */
void gemm_check_layouts(const tw_backend *b);

/** An adapter's gradient: two short sides, and tokens to sum over, where libraries split k. */
void gemm_check_long_sums(const tw_backend *b);

/** m, n or k of 0: c0, or zeros; what lies in the gaps of c stays. */
void gemm_check_zeros(const tw_backend *b);

/** More shapes than the table of plans begins with, twice: as from ragged micro-batches. */
void gemm_check_many_shapes(const tw_backend *b);

/** Sizes that cannot be: QS_ERR_BUG. */
void gemm_check_mistakes(const tw_backend *b);

#endif
