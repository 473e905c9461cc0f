/* How a row-major product is said to a library that knows column-major matrices only.
 *
 * A row-major matrix [r, c] with stride s is, byte for byte, the column-major matrix [c, r] with
 * leading dimension s: its transpose. So what is wanted,
 *
 *     C[m, n] = op(A)[m, k] op(B)[k, n],
 *
 * is transposed as a whole: the library, looking at C's bytes, sees C' = C^T [n, m], and
 *
 *     C^T[n, m] = op(B)^T[n, k] op(A)^T[k, m].
 *
 * B comes first. Its bytes are seen as
 *     [k, n] row-major  ->  [n, k] column-major, which is op(B)^T as it stands: not transposed
 *     [n, k] row-major  ->  [k, n] column-major, which must be turned:          transposed
 * and A's, second, as
 *     [m, k] row-major  ->  [k, m] column-major, which is op(A)^T as it stands: not transposed
 *     [k, m] row-major  ->  [m, k] column-major, which must be turned:          transposed
 * so each keeps its own flag, and each stride becomes a leading dimension. */
#ifndef QS_KERNELS_CUDA_CORE_GEMM_MAP_H
#define QS_KERNELS_CUDA_CORE_GEMM_MAP_H

#include "kernels/cuda/core/hd.h"

/** A matrix as column-major code sees it. */
typedef struct {
    int64_t rows, cols; /* as it lies, before it is turned */
    int64_t ld;
    bool transposed;
} qs_gemm_operand;

typedef struct {
    qs_gemm_operand first;  /* our B */
    qs_gemm_operand second; /* our A */
    int64_t rows, cols;     /* of the result: n, m; leading dimensions are its strides */
} qs_gemm_map;

QS_HD qs_gemm_map qs_gemm_map_make(int64_t m, int64_t n, int64_t k, int64_t a_stride,
                                   bool a_transposed, int64_t b_stride, bool b_transposed)
{
    qs_gemm_map map;
    map.first.rows = b_transposed ? k : n;
    map.first.cols = b_transposed ? n : k;
    map.first.ld = b_stride;
    map.first.transposed = b_transposed;
    map.second.rows = a_transposed ? m : k;
    map.second.cols = a_transposed ? k : m;
    map.second.ld = a_stride;
    map.second.transposed = a_transposed;
    map.rows = n;
    map.cols = m;
    return map;
}

/** Alignment in bytes that a matrix of `element` bytes keeps in every row: 16, or else only its
 * elements'. Not the address's own alignment, which could differ from run to run. */
QS_HD int qs_gemm_alignment(uint64_t address, int64_t stride, int element)
{
    return address % 16 == 0 && stride * element % 16 == 0 ? 16 : element;
}

#endif
