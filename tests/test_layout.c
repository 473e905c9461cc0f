/* Where the bytes of a gathered unit lie, and what a weight is. */
#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <string.h>

#include "ops_fixture.h"
#include "quant/layout.h"

typedef struct {
    int64_t nf4, raw;
    int nranks;
    int absmax8;
} layout_case;

ParameterizedTestParameters(layout, sections_are_padded_and_do_not_overlap)
{
    static layout_case c[] = {{1, 0, 1, 256}, {1, 0, 5, 256}, {7, 3, 2, 256}, {216, 0, 3, 256},
                              {0, 9, 4, 256}, {216, 5, 7, 0}, {0, 0, 3, 256}};
    return cr_make_param_array(layout_case, c, sizeof c / sizeof *c);
}
ParameterizedTest(layout_case *c, layout, sections_are_padded_and_do_not_overlap)
{
    qs_unit_size size = {.nf4_quanta = c->nf4,
                         .raw_quanta = c->raw,
                         .raw_quantum_elems = 577,
                         .raw_dtype = QS_BF16,
                         .absmax8_per_quantum = c->absmax8,
                         .absmax32_per_quantum = c->absmax8 > 0 ? 1 : 256};
    qs_unit_layout l = qs_unit_layout_make(&size, c->nranks);
    size_t p4 = (size_t)l.nf4_per_rank, p16 = (size_t)l.raw_per_rank;
    cr_assert_geq(l.nf4_per_rank * c->nranks, c->nf4);
    cr_assert_lt((l.nf4_per_rank - 1) * c->nranks, c->nf4 + (c->nf4 == 0));
    cr_assert_geq(l.raw_per_rank * c->nranks, c->raw);
    size_t scale_bytes = (size_t)size.absmax32_per_quantum * sizeof(float);
    cr_assert_eq(l.packed_at, 0);
    cr_assert_geq(l.absmax8_at, l.packed_at + p4 * QS_NF4_QUANTUM_PACKED_BYTES);
    cr_assert_geq(l.absmax32_at, l.absmax8_at + p4 * (size_t)c->absmax8);
    cr_assert_geq(l.raw_at, l.absmax32_at + p4 * scale_bytes);
    cr_assert_geq(l.message_bytes, l.raw_at + p16 * 577 * 2);
    cr_assert_lt(l.message_bytes,
                 p4 * (QS_NF4_QUANTUM_PACKED_BYTES + (size_t)c->absmax8 + scale_bytes) +
                     p16 * 577 * 2 + (size_t)4 * 128);
    size_t at[] = {l.absmax8_at, l.absmax32_at, l.raw_at, l.message_bytes};
    for (size_t i = 0; i < 4; i++) {
        cr_assert_eq(at[i] % 128, 0);
    }
}

Test(layout, every_quantum_lies_inside_its_message_and_alone)
{
    qs_unit_size size = {.nf4_quanta = 11,
                         .raw_quanta = 5,
                         .raw_quantum_elems = 96,
                         .raw_dtype = QS_F32,
                         .absmax8_per_quantum = 256,
                         .absmax32_per_quantum = 1};
    qs_unit_view view = {qs_unit_layout_make(&size, 3), NULL};
    size_t total = view.layout.message_bytes * 3;
    uint8_t *used = calloc(total, 1);
    view.base = used;
    for (int64_t i = 0; i < 11; i++) {
        qs_nf4_quantum q = qs_unit_nf4_quantum(&view, i);
        uint8_t *part[] = {used + (q.packed - used), used + (q.absmax8 - used),
                           used + ((const uint8_t *)q.absmax32 - used)};
        size_t bytes[] = {8192, 256, 4};
        for (int p = 0; p < 3; p++) {
            size_t at = (size_t)(part[p] - used);
            cr_assert_leq(at + bytes[p], total);
            cr_assert_eq(at / view.layout.message_bytes, (size_t)(i / 4));
            for (size_t b = 0; b < bytes[p]; b++) {
                cr_assert_eq(part[p][b]++, 0, "quantum %ld part %d overlaps", (long)i, p);
            }
        }
    }
    for (int64_t i = 0; i < 5; i++) {
        uint8_t *raw = used + (qs_unit_raw_quantum(&view, i) - used);
        cr_assert_leq((size_t)(raw - used) + 384, total);
        for (size_t b = 0; b < 384; b++) {
            cr_assert_eq(raw[b]++, 0, "raw quantum %ld overlaps", (long)i);
        }
    }
    free(used);
}

ParameterizedTestParameters(layout, decode_is_the_same_for_any_cut_into_messages)
{
    static fx_weight_spec c[] = {
        {QS_WEIGHT_NF4, 3, 64, QS_BF16, true, 1, 0},
        {QS_WEIGHT_NF4, 130, 333, QS_BF16, true, 2, 0},
        {QS_WEIGHT_NF4, 57, 1000, QS_F16, true, 3, 0},
        {QS_WEIGHT_NF4, 91, 700, QS_F32, false, 5, 0},
        {QS_WEIGHT_RAW, 77, 96, QS_BF16, true, 3, 96},
        {QS_WEIGHT_RAW, 130, 333, QS_F16, true, 2, 16384},
        {QS_WEIGHT_RAW, 5, 33, QS_F32, true, 5, 100},
    };
    return cr_make_param_array(fx_weight_spec, c, sizeof c / sizeof *c);
}
ParameterizedTest(fx_weight_spec *spec, layout, decode_is_the_same_for_any_cut_into_messages)
{
    fx_unit unit = fx_unit_create(spec, 5);
    int64_t count = spec->out * spec->in;
    float *out = fx_random(count + 1, 1);
    float guard = out[count];
    qs_weight_decode(&unit.view, &unit.weight, 0, count, out);
    cr_assert_eq(memcmp(out, unit.plain, (size_t)count * sizeof *out), 0);
    cr_assert_eq(out[count], guard);
    for (int64_t first = 0; first < count; first += 1 + count / 7) {
        int64_t run = count - first < 777 ? count - first : 777;
        qs_weight_decode(&unit.view, &unit.weight, first, run, out);
        cr_assert_eq(memcmp(out, unit.plain + first, (size_t)run * sizeof *out), 0, "from %ld",
                     (long)first);
    }
    free(out);
    fx_unit_destroy(&unit);
}

Test(layout, decode_by_hand)
{
    /* One block: absmax 2 (map[255] = 1, times 2, no offset), bytes F0 and 7F: codes 15, 0, 7, 15.
     */
    qs_unit_size size = {1, 0, 1, QS_BF16, 256, 1};
    qs_unit_view view = {qs_unit_layout_make(&size, 1), NULL};
    uint8_t *bytes = aligned_alloc(64, view.layout.message_bytes);
    memset(bytes, 0, view.layout.message_bytes);
    bytes[0] = 0xF0;
    bytes[1] = 0x7F;
    bytes[view.layout.absmax8_at] = 255;
    float two = 2.0F;
    memcpy(bytes + view.layout.absmax32_at, &two, sizeof two);
    view.base = bytes;
    qs_weight w = {QS_WEIGHT_NF4, 1, 4, 0, QS_BF16, qs_dynamic_map, 0.0F};
    float out[4];
    qs_weight_decode(&view, &w, 0, 4, out);
    cr_assert_eq(out[0], 2.0F);
    cr_assert_eq(out[1], -2.0F);
    cr_assert_eq(out[2], 0.0F);
    cr_assert_eq(out[3], 2.0F);
    free(bytes);
}
