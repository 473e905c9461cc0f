/* The one matrix product: C (+)= A B in strict fp32, with operands that may be decoded while they
 * are packed.
 *
 * Definition of an element, the same for any number of threads, tile sizes and vector width:
 *     k is cut into blocks of QS_GEMM_KC; a block's sum is a chain of fused multiply-adds in
 * ascending k, from 0; the blocks' sums are added to C in ascending order (the first one replaces
 * C unless `accumulate`).
 *
 * Loops after Goto & van de Geijn 2008 (doi:10.1145/1356052.1356053), arranged for micro-batches
 * (m is 50 to 4,000 rows) and for threads that are not equally fast: A is packed once; then a
 * task owns some columns of C for all k, packs and decodes its part of B itself, block by block,
 * and meets nobody:
 *
 *     A block, panels of mr rows      B block, slivers of nr columns
 *     | k0: mr floats | k1: ... |     | k0: nr floats | k1: ... |
 */
#ifndef QS_KERNELS_CPU_GEMM_H
#define QS_KERNELS_CPU_GEMM_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"
#include "device/device.h"
#include "kernels/cpu/isa.h"

/** A matrix as it is stored: rows of contiguous elements, in memory or produced on demand. */
typedef struct qs_operand {
    const float *data; /* row r starts at data + r * stride; unused with `load` */
    int64_t stride;
    /* Elements [first, first + count) of row `row` to `out`. May be called from several threads. */
    void (*load)(const struct qs_operand *operand, int64_t row, int64_t first, int64_t count,
                 float *out);
    const void *ctx;
    bool
        transposed; /* what is stored is the transpose: its rows run along k for B, along m for A */
    float scale;    /* A only: elements are multiplied by it; 0 means 1 */
} qs_operand;

/** C[m, n] (+)= A[m, k] B[k, n]. With k = 0 C is left (accumulate) or zero. */
qs_status qs_gemm(qs_queue *queue, int64_t m, int64_t n, int64_t k, const qs_operand *a,
                  const qs_operand *b, float *c, int64_t c_stride, bool accumulate);

/** Floats of packing space that qs_gemm keeps at most, for operands of up to `rows` x `cols` or
 * transposed. */
int64_t qs_gemm_scratch_count(int threads, int64_t rows, int64_t cols);

/* ---- the same product, the same bits, in the calling thread alone ---- */

/** Floats that a packed left operand [m, k] or right operand [k, n] takes at most, with any
 * instruction set. */
static inline int64_t qs_packed_count(int64_t m_or_n, int64_t k)
{
    return (m_or_n + QS_GEMM_NR_MAX) * k;
}

/** Pack A[m, k], or B[k, n], for qs_multiply_packed. */
void qs_pack_left(const qs_isa *isa, const qs_operand *a, int64_t m, int64_t k, float *packed);
void qs_pack_right(const qs_isa *isa, const qs_operand *b, int64_t n, int64_t k, float *packed);

/** C (+)= A B of packed operands. */
void qs_multiply_packed(const qs_isa *isa, int64_t m, int64_t n, int64_t k, const float *left,
                        const float *right, float *c, int64_t c_stride, bool accumulate);

#endif
