/* Products with a frozen NF4 matrix in fp16 with fp32 sums of blocks: Y = X W^T and dX = dY W from
 * the same bytes, with never more of W decoded than 96 of its rows or columns, 4,096 deep.
 *
 * Definition of an element, the same for any number of threads and ranks, in assembly and in C:
 *     row i of the left operand is multiplied by 2^e(i), the power of two that brings its largest
 * finite magnitude into [256, 512), and rounded to fp16 (so 64 products with |w| <= 1 stay below
 * 32,768, and what is smaller than the largest by up to 2^22 keeps all 11 bits);
 *     k is cut into blocks of 4,096 and stretches of 64. A stretch is a chain of fused
 * multiply-adds in fp16 in ascending k, from 0; its sum times a scale, in fp32, is added fused to
 * the block's, in ascending order, from 0;
 *     a block's sum times 2^-e(i) is added to C in ascending order, in fp32 (the first one replaces
 * C unless `accumulate`).
 *     Y: a weight is half(code), the scale is the NF4 block's absmax. dX: a weight is half(code *
 * absmax * 2^-g), the scale 2^g; g is the power that brings the largest absmax among the stretch's
 * 64 blocks into [1/2, 1).
 * W is not rounded to the type that the model was quantized from, as the strict product does. */
#ifndef QS_KERNELS_CPU_GEMM_FP16_H
#define QS_KERNELS_CPU_GEMM_FP16_H

#include "kernels/cpu/gemm.h"
#include "kernels/ops.h"

/** Whether `w` can be multiplied so: NF4, and rows that start with a block of 64. Others are for
 * qs_gemm. */
bool qs_gemm_fp16_takes(const qs_weight *w);

/** C[m, out] (+)= A[m, in] W^T if `transposed`, else C[m, in] (+)= A[m, out] W. A is not
 * transposed. \return QS_ERR_ENVIRONMENT if there is no table (half.h). */
qs_status qs_gemm_fp16(qs_queue *queue, const qs_unit_view *unit, const qs_weight *w,
                       bool transposed, int64_t m, const qs_operand *a, float *c, int64_t c_stride,
                       bool accumulate);

/** Floats of packing space that qs_gemm_fp16 keeps beside what qs_gemm does for the same
 * operands, at most: its left operand takes half of the strict one's room, a thread's sliver
 * more. */
int64_t qs_gemm_fp16_scratch_count(int threads);

#endif
