/* Slices of the head: every row of a chunk lies in one slice, every logit in one place of one
 * thread. */
#include <criterion/criterion.h>
#include <string.h>

#include "kernels/cuda/core/head_slices.h"

Test(core_head, slices_cut_every_chunk_without_gap_or_overlap)
{
    static const int64_t outs[] = {1,    2,    4095, 4096,  4097,  8191,   8192,
                                   8193, 4100, 9000, 16384, 16385, 128256, 151669};
    for (size_t c = 0; c < sizeof outs / sizeof *outs; c++) {
        int64_t next = 0;
        for (int64_t i = 0; i < qs_head_slice_count(outs[c]); i++) {
            const qs_head_slice slice = qs_head_slice_at(outs[c], i);
            cr_assert_eq(slice.first, next, "out=%lld", (long long)outs[c]);
            cr_assert(slice.count >= 1 && slice.count <= QS_HEAD_SLICE);
            next += slice.count;
        }
        cr_assert_eq(next, outs[c]);
    }
}

Test(core_head, every_element_is_one_threads_and_quads_are_aligned)
{
    static unsigned char seen[QS_HEAD_SLICE];
    memset(seen, 0, sizeof seen);
    for (int thread = 0; thread < QS_HEAD_THREADS; thread++) {
        for (int group = 0; group < QS_HEAD_GROUPS; group++) {
            const int at = qs_head_element(thread, group);
            cr_assert_eq(at % QS_HEAD_QUAD, 0);
            for (int e = 0; e < QS_HEAD_QUAD; e++) {
                cr_assert(at + e >= 0 && at + e < QS_HEAD_SLICE);
                seen[at + e]++;
            }
        }
    }
    for (int i = 0; i < QS_HEAD_SLICE; i++) {
        cr_assert_eq(seen[i], 1, "element %d is held %d times", i, seen[i]);
    }
}

Test(core_head, a_target_lies_in_exactly_one_slice)
{
    static const int64_t vocabulary = 9001, chunk = 4500;
    for (int64_t target = 0; target < vocabulary; target++) {
        int found = 0;
        for (int64_t row0 = 0; row0 < vocabulary; row0 += chunk) {
            const int64_t out = qs_hd_min(chunk, vocabulary - row0);
            for (int64_t i = 0; i < qs_head_slice_count(out); i++) {
                const qs_head_slice slice = qs_head_slice_at(out, i);
                const int64_t token = row0 + slice.first;
                const int64_t place = qs_head_place(target, token, slice.count);
                if (place >= 0) {
                    found++;
                    cr_assert_eq(token + place, target);
                    cr_assert_lt(place, slice.count);
                }
            }
        }
        cr_assert_eq(found, 1, "token %lld lies in %d slices", (long long)target, found);
    }
}

Test(core_head, tokens_that_do_not_exist_lie_nowhere)
{
    cr_assert_eq(qs_head_place(-1, 0, 4096), -1); /* an ignored token, should one get here */
    cr_assert_eq(qs_head_place(-100, 0, 4096), -1);
    cr_assert_eq(qs_head_place(4096, 0, 4096), -1);
    cr_assert_eq(qs_head_place(4095, 4096, 1), -1);
}
