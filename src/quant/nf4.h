/* NF4 with double quantization: constants, quantizer and scalar decode (Dettmers et al. 2023,
 * arXiv:2305.14314, app. E; bytes as in bitsandbytes).
 *
 *   elements   | 64 | 64 | ...                        row-major [out, in], blocks may cross rows
 *   packed     one byte per two elements, the first in the high nibble
 *   absmax     one float per block of 64
 *   absmax8    with double quantization one byte per block: absmax = map[byte] * absmax32 + offset
 *   absmax32   one float per 256 blocks (the nested absmax)
 *
 * A quantum is 16,384 elements = 256 blocks = 1 nested absmax: the smallest piece that can be
 * decoded alone. */
#ifndef QS_QUANT_NF4_H
#define QS_QUANT_NF4_H

#include <stdint.h>

#include "base/dtype.h"

enum {
    QS_NF4_BLOCK = 64,
    QS_NF4_QUANTUM = 16384,
    QS_NF4_QUANTUM_PACKED_BYTES = 8192,
    QS_NF4_QUANTUM_BLOCKS = 256,
    QS_NF4_ZERO_BYTE = 0x77, /* two codes of value 0 */
};

/** The 16 values, ascending; code 7 is 0. */
extern const float qs_nf4_code[16];

/** The 15 thresholds between them, midpoints in fp32; a value on a threshold takes the lower code.
 */
extern const float qs_nf4_threshold[15];

/** The 8-bit map of the second level that we write: 256 exact rationals rounded once to fp32,
 * ascending. */
extern const float qs_dynamic_map[256];

/** Quanta that `count` elements take. */
int64_t qs_nf4_quanta(int64_t count);

/** Code of one value, given 1/absmax. */
uint8_t qs_nf4_encode(float value, float inverse_absmax);

/** First level: `count` floats (one tensor or part of one that starts on a block) to packed codes
 * and absmax.
 * \param [out] packed  [(count + 1) / 2]; a last odd element leaves code 7 in the low nibble.
 * \param [out] absmax  [ceil(count / 64)].
 * \return the number of blocks that are all zero (written as 0x77, absmax 0). */
int64_t qs_nf4_quantize_blocks(const float *x, int64_t count, uint8_t *packed, float *absmax);

/** Second level for `n_blocks` absmax that start on a group of 256, given the tensor's `offset`.
 *  \param [out] absmax8   [n_blocks] nearest map entry of (absmax - offset) / absmax32, ties to the
 * lower. \param [out] absmax32  [ceil(n_blocks / 256)]. */
void qs_nf4_quantize_absmax(const float *absmax, int64_t n_blocks, float offset, uint8_t *absmax8,
                            float *absmax32);

/** First-level absmax of one block: map[absmax8] * absmax32 + offset, two fp32 roundings. */
float qs_nf4_absmax(const float *map, uint8_t absmax8, float absmax32, float offset);

#endif
