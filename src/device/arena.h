/* Who holds which bytes of a region: a list of blocks in the order of their addresses, and first
 * fit among the gaps. Arithmetic on numbers only: the region may be a GPU's memory, which the host
 * cannot touch. Blocks are few (hundreds) and made before the first step, so lists are searched.
 *
 *     base                                                    base + bytes
 *     |  block 0  | gap |  block 1  |  block 2  |     gap     |
 */
#ifndef QS_DEVICE_ARENA_H
#define QS_DEVICE_ARENA_H

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>

enum { QS_ARENA_ALIGNMENT = 256 };

typedef struct {
    uint64_t at, bytes; /* bytes: as asked for, not rounded */
    int kind;           /* the owner's own */
} qs_arena_block;

/** Zeroed: empty. */
typedef struct {
    qs_arena_block *blocks; /* [count], ascending addresses, none overlap */
    int64_t count, capacity;
} qs_arena;

static inline uint64_t qs_arena_round(uint64_t bytes)
{
    return (bytes + QS_ARENA_ALIGNMENT - 1) / QS_ARENA_ALIGNMENT * QS_ARENA_ALIGNMENT;
}

/** Index of the first block at `at` or behind it. */
static inline int64_t qs_arena_lower(const qs_arena *arena, uint64_t at)
{
    int64_t low = 0, high = arena->count;
    while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (arena->blocks[middle].at < at) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

/** Where `bytes` fit first into the region; false if nowhere. `base` must be aligned. */
static inline bool qs_arena_fit(const qs_arena *arena, uint64_t base, uint64_t region,
                                uint64_t bytes, uint64_t *at)
{
    const uint64_t end = base + region;
    uint64_t start = base;
    for (int64_t i = qs_arena_lower(arena, base); i <= arena->count; i++) {
        const bool last = i == arena->count || arena->blocks[i].at >= end;
        const uint64_t stop = last ? end : arena->blocks[i].at;
        if (stop >= start && stop - start >= bytes) {
            *at = start;
            return true;
        }
        if (last) {
            return false;
        }
        start = arena->blocks[i].at + qs_arena_round(arena->blocks[i].bytes);
    }
    return false;
}

/** Bytes of the largest block that fits, and of all gaps together. */
static inline void qs_arena_gaps(const qs_arena *arena, uint64_t base, uint64_t region,
                                 uint64_t *largest, uint64_t *total)
{
    const uint64_t end = base + region;
    uint64_t start = base;
    *largest = *total = 0;
    for (int64_t i = qs_arena_lower(arena, base); i <= arena->count; i++) {
        const bool last = i == arena->count || arena->blocks[i].at >= end;
        const uint64_t stop = last ? end : arena->blocks[i].at;
        const uint64_t gap = stop > start ? stop - start : 0;
        *total += gap;
        *largest = gap > *largest ? gap : *largest;
        if (last) {
            return;
        }
        start = arena->blocks[i].at + qs_arena_round(arena->blocks[i].bytes);
    }
}

/** Room for one more block in the list; false without memory. Before qs_arena_add. */
static inline bool qs_arena_make_room(qs_arena *arena)
{
    if (arena->count < arena->capacity) {
        return true;
    }
    const int64_t capacity = arena->capacity > 0 ? 2 * arena->capacity : 64;
    qs_arena_block *blocks =
        (qs_arena_block *)realloc(arena->blocks, (size_t)capacity * sizeof *blocks);
    if (blocks == NULL) {
        return false;
    }
    arena->blocks = blocks;
    arena->capacity = capacity;
    return true;
}

static inline void qs_arena_add(qs_arena *arena, uint64_t at, uint64_t bytes, int kind)
{
    const int64_t place = qs_arena_lower(arena, at);
    for (int64_t i = arena->count; i > place; i--) {
        arena->blocks[i] = arena->blocks[i - 1];
    }
    arena->blocks[place].at = at;
    arena->blocks[place].bytes = bytes;
    arena->blocks[place].kind = kind;
    arena->count++;
}

/** Take the block that starts at `at` out of the list into *block; false if there is none. */
static inline bool qs_arena_remove(qs_arena *arena, uint64_t at, qs_arena_block *block)
{
    const int64_t place = qs_arena_lower(arena, at);
    if (place == arena->count || arena->blocks[place].at != at) {
        return false;
    }
    *block = arena->blocks[place];
    arena->count--;
    for (int64_t i = place; i < arena->count; i++) {
        arena->blocks[i] = arena->blocks[i + 1];
    }
    return true;
}

static inline void qs_arena_clear(qs_arena *arena)
{
    free(arena->blocks);
    arena->blocks = NULL;
    arena->count = arena->capacity = 0;
}

#endif
