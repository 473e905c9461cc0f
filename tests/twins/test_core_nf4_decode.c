/* The decode kernel's arithmetic on the host: where quanta lie, which thread writes which element,
 * and the bits of an element, against quant/layout.h. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/core/nf4_decode.h"
#include "quant/layout.h"
#include "tests/ops_fixture.h"

static qs_decode_unit unit_of(const qs_unit_view *view)
{
    const qs_unit_layout *l = &view->layout;
    return (qs_decode_unit){.base = view->base,
                            .message_bytes = l->message_bytes,
                            .packed_at = l->packed_at,
                            .absmax8_at = l->absmax8_at,
                            .absmax32_at = l->absmax32_at,
                            .raw_at = l->raw_at,
                            .nf4_per_rank = (uint32_t)l->nf4_per_rank,
                            .raw_per_rank = (uint32_t)l->raw_per_rank,
                            .raw_quantum_bytes = qs_raw_quantum_bytes(&l->size),
                            .nested = l->size.absmax8_per_quantum != 0};
}

Test(core_nf4_decode, quanta_lie_where_the_layout_says)
{
    static const uint8_t base[1]; /* addresses only */
    for (int nranks = 1; nranks <= 6; nranks++) {
        for (int64_t quanta = 1; quanta <= 13; quanta++) {
            for (int nested = 0; nested <= 1; nested++) {
                const qs_unit_size size = {.nf4_quanta = quanta,
                                           .raw_quanta = quanta + 1,
                                           .raw_quantum_elems = 24,
                                           .raw_dtype = QS_BF16,
                                           .absmax8_per_quantum = nested ? 256 : 0,
                                           .absmax32_per_quantum = nested ? 1 : 256};
                const qs_unit_view view = {qs_unit_layout_make(&size, nranks), base};
                const qs_decode_unit unit = unit_of(&view);
                for (uint32_t q = 0; q < quanta; q++) {
                    const qs_nf4_quantum want = qs_unit_nf4_quantum(&view, q);
                    const qs_decode_place got = qs_decode_place_of(&unit, q);
                    cr_assert_eq(base + got.packed, want.packed);
                    cr_assert_eq((const void *)(base + got.absmax32), (const void *)want.absmax32);
                    cr_assert(nested ? base + got.absmax8 == want.absmax8 : got.absmax8 == 0);
                }
                for (uint32_t q = 0; q <= quanta; q++) {
                    cr_assert_eq(base + qs_decode_raw_place(&unit, q),
                                 qs_unit_raw_quantum(&view, q));
                }
            }
        }
    }
}

/* The walk of decode_kernel: (quantum, thread, step) to elements of a matrix with `gap` more in a
 * row, for every thread there is. */
static void walk(int64_t out, uint32_t in, uint32_t gap, uint8_t *seen)
{
    const int64_t elems = out * in, stride = (int64_t)in + gap;
    const int64_t quanta = (elems + QS_DECODE_QUANTUM - 1) / QS_DECODE_QUANTUM;
    const uint32_t cols = QS_DECODE_SPAN % in;
    const int64_t by = QS_DECODE_SPAN / in * stride + cols;
    for (int64_t q = 0; q < quanta; q++) {
        for (uint32_t thread = 0; thread < QS_DECODE_THREADS; thread++) {
            int64_t element = q * QS_DECODE_QUANTUM + thread * QS_DECODE_GROUP;
            qs_decode_cursor cursor = qs_decode_cursor_at(qs_decode_cell_of(element, in), stride);
            for (uint32_t step = 0; step < QS_DECODE_STEPS; step++) {
                cr_assert_eq(cursor.at, element / in * stride + element % in);
                cr_assert_eq(cursor.col, element % in);
                qs_decode_cursor one = cursor;
                for (int i = 0; i < QS_DECODE_GROUP && element + i < elems; i++) {
                    seen[one.at / stride * in + one.at % stride]++;
                    one = qs_decode_cursor_step(one, 1, 1, in, gap);
                }
                cursor = qs_decode_cursor_step(cursor, by, cols, in, gap);
                element += QS_DECODE_SPAN;
            }
        }
    }
}

Test(core_nf4_decode, every_element_once)
{
    static const uint32_t widths[] = {1,   2,   3,    7,    8,    9,    63,    64,    65,    100,
                                      333, 576, 2047, 2048, 2049, 5000, 16383, 16384, 16385, 40000};
    for (size_t w = 0; w < sizeof widths / sizeof *widths; w++) {
        const uint32_t in = widths[w];
        /* Ends before, at and behind the first quantum's end, and one row. */
        const int64_t outs[] = {1, QS_DECODE_QUANTUM / in, QS_DECODE_QUANTUM / in + 1,
                                2 * QS_DECODE_QUANTUM / in + 3};
        for (size_t o = 0; o < sizeof outs / sizeof *outs; o++) {
            const int64_t elems = outs[o] * in;
            uint8_t *seen = calloc((size_t)elems + 1, 1);
            cr_assert_not_null(seen);
            walk(outs[o], in, (uint32_t)(7 * o), seen);
            for (int64_t i = 0; i < elems; i++) {
                cr_assert_eq(seen[i], 1, "%lld x %u: element %lld", (long long)outs[o], in,
                             (long long)i);
            }
            free(seen);
        }
    }
}

/* Groups of 8 stay in a row, on 16 bytes, when the width is a multiple of 8. */
Test(core_nf4_decode, groups_stay_whole)
{
    for (uint32_t in = 8; in <= 4096; in += 8) {
        const qs_decode_cell start = qs_decode_cell_of((int64_t)in * 3 + 16384, in);
        for (uint32_t thread = 0; thread < QS_DECODE_THREADS; thread++) {
            const qs_decode_cell cell = qs_decode_cell_after(start, thread * QS_DECODE_GROUP, in);
            cr_assert(cell.col % 8 == 0 && cell.col + 8 <= in);
        }
    }
}

/* Widths and places near the largest that 32 bits of columns allow. */
Test(core_nf4_decode, large_places)
{
    const uint32_t in = (1u << 31) - 9;
    const int64_t element = (int64_t)in * 1000003 - 5;
    qs_decode_cell cell = qs_decode_cell_of(element, in);
    cr_assert(cell.row == 1000002 && cell.col == in - 5);
    cell = qs_decode_cell_after(cell, QS_DECODE_SPAN - 8, in);
    cr_assert(cell.row == 1000003 && cell.col == QS_DECODE_SPAN - 8 - 5);
    qs_decode_cursor cursor = qs_decode_cursor_at(cell, (int64_t)in + 3);
    cr_assert_eq(cursor.at, ((int64_t)in + 3) * 1000003 + cell.col);
    cursor = qs_decode_cursor_step(cursor, QS_DECODE_SPAN, QS_DECODE_SPAN % in, in, 3);
    cr_assert_eq(cursor.at, ((int64_t)in + 3) * 1000003 + cursor.col);
    cr_assert_eq(cursor.col, 2 * QS_DECODE_SPAN - 8 - 5);
}

Test(core_nf4_decode, nibbles)
{
    const uint8_t bytes[4] = {0x01, 0x23, 0x45,
                              0x67}; /* the first element of a byte is its high half */
    uint32_t word;
    memcpy(&word, bytes, sizeof word);
    for (int i = 0; i < QS_DECODE_GROUP; i++) {
        cr_assert_eq(qs_decode_nibble(word, i), (uint32_t)i);
    }
}

static void assert_bits(float got, float want, float from)
{
    cr_assert_eq(memcmp(&got, &want, sizeof got), 0, "%a becomes %a, not %a", (double)from,
                 (double)got, (double)want);
}

Test(core_nf4_decode, rounding_to_fp16)
{
    /* Every fp16 number, the middle to the next one, and the floats beside both. */
    for (uint32_t half = 0; half <= 0xffff; half++) {
        const float exact = qs_f32_from_f16((uint16_t)half);
        const float next = qs_f32_from_f16((uint16_t)(half + 1));
        const float middle = 0.5F * exact + 0.5F * next;
        const float around[] = {exact, middle, nextafterf(exact, next), nextafterf(middle, exact),
                                nextafterf(middle, next)};
        for (size_t i = 0; i < sizeof around / sizeof *around; i++) {
            assert_bits(qs_decode_round_f16(around[i]), qs_f32_round(around[i], QS_F16), around[i]);
        }
    }
    for (uint64_t bits = 0; bits < (uint64_t)1 << 32; bits += 2039) { /* and of all floats some */
        const float value = qs_hd_bits_float((uint32_t)bits);
        assert_bits(qs_decode_round_f16(value), qs_f32_round(value, QS_F16), value);
    }
}

Test(core_nf4_decode, absmax_has_two_roundings)
{
    float *scale = fx_random(4096, 3);
    for (int i = 0; i < 4096; i++) {
        for (int index = 0; index < 256; index += 5) {
            const float want = qs_nf4_absmax(qs_dynamic_map, (uint8_t)index, scale[i], 0.0437F);
            assert_bits(qs_decode_absmax(qs_dynamic_map[index], scale[i], 0.0437F), want, scale[i]);
        }
    }
    free(scale);
}

/* An element as the kernel makes it, against the definition, rounded. */
Test(core_nf4_decode, elements_are_those_of_the_layout)
{
    static const qs_dtype types[] = {QS_BF16, QS_F16, QS_F32};
    for (int type = 0; type < 3; type++) {
        for (int nested = 0; nested <= 1; nested++) {
            const fx_weight_spec spec = {.kind = QS_WEIGHT_NF4,
                                         .out = 61,
                                         .in = 333,
                                         .dtype = types[type],
                                         .nested = nested != 0,
                                         .nranks = 3};
            fx_unit unit = fx_unit_create(&spec, 11);
            const qs_decode_unit from = unit_of(&unit.view);
            for (int64_t e = 0; e < spec.out * spec.in; e++) {
                const uint32_t q = (uint32_t)(unit.weight.quantum + e / QS_DECODE_QUANTUM);
                const qs_decode_place place = qs_decode_place_of(&from, q);
                const int64_t at = e % QS_DECODE_QUANTUM, block = at / QS_DECODE_BLOCK;
                uint32_t word;
                float absmax;
                memcpy(&word, from.base + place.packed + at / 8 * 4, sizeof word);
                memcpy(&absmax, from.base + place.absmax32 + (nested ? 0 : block * 4),
                       sizeof absmax);
                if (nested) {
                    const uint8_t index = from.base[place.absmax8 + (uint64_t)block];
                    absmax = qs_decode_absmax(unit.weight.map[index], absmax, unit.weight.offset);
                }
                const float code = qs_nf4_code[qs_decode_nibble(word, (int)(at % 8))];
                const float got = qs_bf16_to_f32(
                    qs_bf16_round(qs_decode_value(code, absmax, types[type] == QS_F16)));
                assert_bits(got, qs_f32_round(unit.plain[e], QS_BF16), unit.plain[e]);
            }
            fx_unit_destroy(&unit);
        }
    }
}
