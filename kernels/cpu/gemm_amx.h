/* Products with a frozen NF4 matrix in bf16 tiles with fp32 sums: Y = X W^T and dX = dY W from the
 * same bytes, with never more of W decoded than 256 of its rows or columns, 1,024 deep, a thread.
 *
 * Definition of an element, the same for any number of threads and ranks, by AMX and in C:
 *     the left operand is rounded to bf16; a weight is what the strict product multiplies, code *
 * absmax rounded to the type that the model was quantized from, and then to bf16 (exact where that
 * type is bf16);
 *     k is cut into blocks of 1,024 and steps of 32, the last one filled up with zeros. A block's
 * sum is that of its steps in ascending order, from 0, by the tile's arithmetic (tile.h);
 *     the blocks' sums are added to C in ascending order, in fp32 (the first one replaces C unless
 * `accumulate`). */
#ifndef QS_KERNELS_CPU_GEMM_AMX_H
#define QS_KERNELS_CPU_GEMM_AMX_H

#include "kernels/cpu/gemm.h"

/** A is not transposed and not scaled. */
qs_gemm_function qs_gemm_amx;

/** Floats of packing space that qs_gemm_amx keeps beside what qs_gemm does for the same operands,
 * at most; `longest` is the largest of m and k. */
int64_t qs_gemm_amx_scratch_count(int threads, int64_t longest);

#endif
