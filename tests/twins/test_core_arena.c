/* src/device/arena.h: blocks of a region stay inside it, apart and aligned, whatever the order of
 * allocations and frees; and what is free is found. */
#include <criterion/criterion.h>
#include <string.h>

#include "base/rng.h"
#include "device/arena.h"

static const uint64_t BASE = UINT64_C(0x7f0000000000);

static void assert_sound(const qs_arena *arena, uint64_t region)
{
    uint64_t end = BASE;
    for (int64_t i = 0; i < arena->count; i++) {
        const qs_arena_block *b = &arena->blocks[i];
        cr_assert_eq(b->at % QS_ARENA_ALIGNMENT, 0);
        cr_assert_geq(b->at, end, "block %lld overlaps the one before", (long long)i);
        end = b->at + b->bytes;
    }
    cr_assert_leq(end, BASE + region);
}

static bool place(qs_arena *arena, uint64_t region, uint64_t bytes, uint64_t *at)
{
    cr_assert(qs_arena_make_room(arena));
    if (!qs_arena_fit(arena, BASE, region, bytes, at)) {
        return false;
    }
    qs_arena_add(arena, *at, bytes, (int)(bytes % 7));
    return true;
}

Test(core_arena, blocks_follow_each_other_and_fill_the_region)
{
    qs_arena arena = {0};
    uint64_t at;
    for (uint64_t i = 0; i < 16; i++) {
        cr_assert(place(&arena, 4096, 1 + i, &at));
        cr_assert_eq(at, BASE + 256 * i);
    }
    cr_assert_not(place(&arena, 4096, 1, &at), "the region is full");
    qs_arena_clear(&arena);
    cr_assert(place(&arena, 4096, 4096, &at));
    cr_assert_eq(at, BASE);
    qs_arena_clear(&arena);
    cr_assert_not(place(&arena, 4096, 4097, &at));
    cr_assert_not(place(&arena, 4096, UINT64_MAX - 100, &at), "no overflow");
    cr_assert_not(place(&arena, 0, 1, &at));
    qs_arena_clear(&arena);
}

Test(core_arena, a_freed_gap_is_used_again_where_it_is_large_enough)
{
    qs_arena arena = {0};
    uint64_t at[4], again;
    for (int i = 0; i < 4; i++) {
        cr_assert(place(&arena, 1 << 20, 1000, &at[i]));
    }
    qs_arena_block freed;
    cr_assert(qs_arena_remove(&arena, at[1], &freed));
    cr_assert_eq(freed.bytes, 1000);
    cr_assert_eq(freed.kind, 1000 % 7);
    cr_assert_not(qs_arena_remove(&arena, at[1], &freed), "freed twice");
    cr_assert_not(qs_arena_remove(&arena, at[2] + 256, &freed), "the middle of a block is none");
    cr_assert(place(&arena, 1 << 20, 1025, &again), "does not fit into 1024 bytes");
    cr_assert_gt(again, at[3]);
    cr_assert(place(&arena, 1 << 20, 1024, &again));
    cr_assert_eq(again, at[1]);
    qs_arena_clear(&arena);
}

Test(core_arena, blocks_outside_of_the_region_are_not_its)
{
    qs_arena arena = {0};
    uint64_t at;
    for (int i = 0; i < 3; i++) { /* what cudaMalloc gave, below, behind, and at the very end */
        static const uint64_t foreign[] = {0x1000, 0x7f0000000000 + 4096, 0x7f0000000000 + 65536};
        cr_assert(qs_arena_make_room(&arena));
        qs_arena_add(&arena, foreign[i], 5000, 0);
    }
    cr_assert(place(&arena, 4096, 4096, &at));
    cr_assert_eq(at, BASE);
    uint64_t largest, total;
    qs_arena_gaps(&arena, BASE, 4096, &largest, &total);
    cr_assert_eq(largest, 0);
    cr_assert_eq(total, 0);
    qs_arena_clear(&arena);
}

/* Against a map of the region, unit by unit, with the simplest possible search. */
Test(core_arena, agrees_with_a_map_of_units_over_random_histories)
{
    enum { UNITS = 64 };
    const uint64_t region = UNITS * QS_ARENA_ALIGNMENT;
    for (uint64_t seed = 1; seed <= 50; seed++) {
        qs_arena arena = {0};
        qs_rng rng = qs_rng_make(seed, 0, 0, 7, 0);
        bool taken[UNITS] = {false};
        for (uint64_t step = 0; step < 400; step++) {
            const uint32_t dice = qs_rng_u32(&rng, step);
            if (dice % 5 < 2 && arena.count > 0) {
                qs_arena_block block = arena.blocks[dice / 8 % (uint32_t)arena.count];
                cr_assert(qs_arena_remove(&arena, block.at, &block));
                for (uint64_t u = 0; u < (block.bytes + 255) / 256; u++) {
                    taken[(block.at - BASE) / 256 + u] = false;
                }
                continue;
            }
            const uint64_t bytes = 1 + dice / 8 % 3000, units = (bytes + 255) / 256;
            int64_t want = -1;
            uint64_t run = 0, largest = 0, total = 0;
            for (int64_t u = 0; u < UNITS; u++) {
                run = taken[u] ? 0 : run + 1;
                total += taken[u] ? 0 : 256;
                largest = run * 256 > largest ? run * 256 : largest;
                if (want < 0 && run == units) {
                    want = u + 1 - (int64_t)units;
                }
            }
            uint64_t at = 0, seen_largest, seen_total;
            qs_arena_gaps(&arena, BASE, region, &seen_largest, &seen_total);
            cr_assert_eq(seen_largest, largest);
            cr_assert_eq(seen_total, total);
            cr_assert_eq(place(&arena, region, bytes, &at), want >= 0);
            if (want >= 0) {
                cr_assert_eq(at, BASE + 256 * (uint64_t)want);
                memset(taken + want, true, units);
            }
            assert_sound(&arena, region);
        }
        qs_arena_clear(&arena);
    }
}
