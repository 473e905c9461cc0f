/* Decoding NF4 quanta to rows of a matrix: where the bytes of a quantum lie in a gathered unit,
 * which thread decodes what, and what an element becomes. quant/layout.h is the definition.
 *
 * One block of threads decodes one quantum, 16,384 elements in row-major order of [out, in], which
 * may begin and end inside a row. In each of its steps thread t takes the 8 codes of one 32-bit
 * word, so that a warp reads 128 and writes 512 bytes in one piece:
 *
 *     step 0: | t0: 8 | t1: 8 | ... | t255: 8 |   step 1: 2048 elements further on, ...
 *
 * and the place moves by constants from step to step: one division a thread. */
#ifndef QS_KERNELS_CUDA_CORE_NF4_DECODE_H
#define QS_KERNELS_CUDA_CORE_NF4_DECODE_H

#include "kernels/cuda/core/bf16.h"
#include "kernels/cuda/core/hd.h"

enum {
    QS_DECODE_QUANTUM = 16384,
    QS_DECODE_BLOCK = 64, /* elements that share an absmax */
    QS_DECODE_BLOCKS = QS_DECODE_QUANTUM / QS_DECODE_BLOCK,
    QS_DECODE_THREADS = 256,
    QS_DECODE_GROUP = 8, /* codes of a word */
    QS_DECODE_SPAN = QS_DECODE_THREADS * QS_DECODE_GROUP,
    QS_DECODE_STEPS = QS_DECODE_QUANTUM / QS_DECODE_SPAN,
};

/** A gathered unit's layout as a kernel's parameter. Quanta are counted with 32 bits: 2^32 of them
 * are 36 TB. */
typedef struct {
    const uint8_t *base;
    uint64_t message_bytes, packed_at, absmax8_at, absmax32_at, raw_at;
    uint32_t nf4_per_rank, raw_per_rank;
    uint64_t raw_quantum_bytes;
    bool nested;
} qs_decode_unit;

/** Byte offsets from the unit's base. */
typedef struct {
    uint64_t packed, absmax8, absmax32;
} qs_decode_place;

/** As qs_unit_nf4_quantum; absmax8 is 0 without double quantization. */
QS_HD qs_decode_place qs_decode_place_of(const qs_decode_unit *unit, uint32_t quantum)
{
    const uint64_t message = (uint64_t)(quantum / unit->nf4_per_rank) * unit->message_bytes;
    const uint64_t at = quantum % unit->nf4_per_rank;
    qs_decode_place place;
    place.packed = message + unit->packed_at + at * (QS_DECODE_QUANTUM / 2);
    place.absmax8 = unit->nested ? message + unit->absmax8_at + at * QS_DECODE_BLOCKS : 0;
    place.absmax32 = message + unit->absmax32_at + at * (unit->nested ? 4 : 4 * QS_DECODE_BLOCKS);
    return place;
}

/** As qs_unit_raw_quantum. */
QS_HD uint64_t qs_decode_raw_place(const qs_decode_unit *unit, uint32_t quantum)
{
    return (uint64_t)(quantum / unit->raw_per_rank) * unit->message_bytes + unit->raw_at +
           (uint64_t)(quantum % unit->raw_per_rank) * unit->raw_quantum_bytes;
}

/** An element's place in the matrix. */
typedef struct {
    int64_t row;
    uint32_t col;
} qs_decode_cell;

/** Place of element `element` of the tensor. */
QS_HD qs_decode_cell qs_decode_cell_of(int64_t element, uint32_t in)
{
    qs_decode_cell cell;
    cell.row = element / in;
    cell.col = (uint32_t)(element - cell.row * in);
    return cell;
}

/** The place `by` elements further on, by < 2^31 (and in < 2^31): one division of 32 bits. */
QS_HD qs_decode_cell qs_decode_cell_after(qs_decode_cell cell, uint32_t by, uint32_t in)
{
    const uint32_t col = cell.col + by;
    const uint32_t rows = col / in;
    cell.row += rows;
    cell.col = col - rows * in;
    return cell;
}

/** A place that is moved on without its row: its element of a matrix, and its column. */
typedef struct {
    int64_t at;
    uint32_t col;
} qs_decode_cursor;

QS_HD qs_decode_cursor qs_decode_cursor_at(qs_decode_cell cell, int64_t stride)
{
    const qs_decode_cursor cursor = {cell.row * stride + cell.col, cell.col};
    return cursor;
}

/** The place rows * in + cols elements of the tensor further on, cols < in: `by` = rows * stride +
 * cols elements of the matrix, and the `gap` = stride - in between two rows where cols crosses it.
 */
QS_HD qs_decode_cursor qs_decode_cursor_step(qs_decode_cursor cursor, int64_t by, uint32_t cols,
                                             uint32_t in, uint32_t gap)
{
    cursor.at += by;
    cursor.col += cols;
    if (cursor.col >= in) {
        cursor.col -= in;
        cursor.at += gap;
    }
    return cursor;
}

/** Code `i` of a little-endian word of four bytes: the first element of a byte is its high half. */
QS_HD uint32_t qs_decode_nibble(uint32_t word, int i)
{
    return (word >> (8 * (i / 2) + (i % 2 == 0 ? 4 : 0))) & 15u;
}

/** As qs_nf4_absmax: two roundings, so this must not be contracted (see cuda_impl.cuh). */
QS_HD float qs_decode_absmax(float mapped, float absmax32, float offset)
{
    const float scaled = mapped * absmax32;
    return scaled + offset;
}

/** `value` rounded to fp16 and widened again, as qs_f32_round(value, QS_F16). */
QS_HD float qs_decode_round_f16(float value)
{
    const uint32_t bits = qs_hd_float_bits(value);
    const uint32_t sign = bits & 0x80000000u;
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) { /* NaN: quiet, what fits of the payload */
        magnitude = 0x7fc00000u | (magnitude & 0x007fe000u);
    } else if (magnitude >= 0x477ff000u) { /* 65520 and more */
        magnitude = 0x7f800000u;
    } else if (magnitude >= 0x38800000u) { /* normal: 13 of 23 bits of the mantissa go */
        magnitude = (magnitude + 0xfffu + ((magnitude >> 13) & 1u)) & ~0x1fffu;
    } else { /* subnormal: 0.5 has 2^-24 as its ulp, the addition rounds */
        const float up = qs_hd_bits_float(magnitude) + 0.5f;
        magnitude = qs_hd_float_bits(up - 0.5f);
    }
    return qs_hd_bits_float(sign | magnitude);
}

/** An element before it becomes bf16: code * absmax, rounded to fp16 first if the weight is fp16.
 * fp32 and bf16 weights need nothing: rounding to bf16 is the only rounding left. */
QS_HD float qs_decode_value(float code, float absmax, bool f16)
{
    const float value = code * absmax;
    return f16 ? qs_decode_round_f16(value) : value;
}

#endif
