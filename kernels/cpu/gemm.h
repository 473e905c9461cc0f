/* The one matrix product: C (+)= A B in strict fp32, with operands that may be decoded while they
 * are packed.
 *
 * Definition of an element, the same for any number of threads, tile sizes and vector width:
 *     k is cut into blocks of QS_GEMM_KC; a block's sum is a chain of fused multiply-adds in
 * ascending k, from 0; the blocks' sums are added to C in ascending order (the first one replaces
 * C unless `accumulate`).
 *
 * Operands are packed as panels.h says:
 *
 *     A block, panels of mr rows      B block, slivers of nr columns
 *     | k0: mr floats | k1: ... |     | k0: nr floats | k1: ... |
 *
 * But where the other operand is thin, as an adapter is, an element would be packed to be used once
 * or twice: A is then read where it is, and B where its stored rows run across k.
 */
#ifndef QS_KERNELS_CPU_GEMM_H
#define QS_KERNELS_CPU_GEMM_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"
#include "device/device.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/pairs.h"

/** A matrix as it is stored: rows of contiguous elements, in memory or produced on demand. */
typedef struct qs_operand {
    const float *data; /* row r starts at data + r * stride; unused with `load` */
    int64_t stride;
    /* Elements [first, first + count) of row `row` to `out`. May be called from several threads. */
    void (*load)(const struct qs_operand *operand, int64_t row, int64_t first, int64_t count,
                 float *out);
    /* The same as pairs.h has them along a row, for an even `first`, or false; NULL: from load. */
    bool (*load_pairs)(const struct qs_operand *operand, const qs_pairs *pairs, int64_t row,
                       int64_t first, int64_t count, uint32_t *out);
    const void *ctx;
    bool
        transposed; /* what is stored is the transpose: its rows run along k for B, along m for A */
    float scale;    /* elements are multiplied by it, each rounded on its own; 0 means 1 */
} qs_operand;

/** Elements [first, first + count) of a stored row; `space` holds what is produced on demand. */
static inline const float *qs_operand_row(const qs_operand *op, int64_t row, int64_t first,
                                          int64_t count, float *space)
{
    if (op->load == NULL) {
        return op->data + row * op->stride + first;
    }
    op->load(op, row, first, count, space);
    return space;
}

/** C[m, n] (+)= A[m, k] B[k, n]. With k = 0 C is left (accumulate) or zero. */
typedef qs_status qs_gemm_function(qs_queue *queue, int64_t m, int64_t n, int64_t k,
                                   const qs_operand *a, const qs_operand *b, float *c,
                                   int64_t c_stride, bool accumulate);

/** In strict fp32. */
qs_gemm_function qs_gemm;

/** The same of both operands rounded to bf16, and with what is subnormal, operand or result, taken
 * for 0: the same bits on any CPU (pairs.h). Nothing is scaled. */
qs_gemm_function qs_gemm_bf16;

/** Floats of packing space that qs_gemm, or qs_gemm_bf16, keeps at most, for operands of up to
 * `rows` x `cols` or transposed. */
int64_t qs_gemm_scratch_count(int threads, int64_t rows, int64_t cols);

#endif
