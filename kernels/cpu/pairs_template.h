/* The table of a kind of pairs: what isa_template.h is for floats. The including file defines what
 * register_tile.h asks for with words as elements, and
 *
 *   PAIRS_NAME, PAIRS_TABLE       "avx2", qs_pairs_avx2
 *   pairs_begin, pairs_end        of the table (flush.h)
 *   pairs_round, pairs_nf4_blocks round and nf4_decode of the table */
#include "kernels/cpu/pairs.h"

typedef uint32_t tile_elem;

#include "kernels/cpu/register_tile.h"

static void pairs_take(const uint8_t *src, int64_t count, uint32_t *out)
{
    for (int64_t i = 0; i < count / 2; i++) {
        uint32_t word;
        memcpy(&word, src + 4 * i, sizeof word);
        out[i] = word << 16 | word >> 16;
    }
    if (count % 2 != 0) {
        uint16_t last;
        memcpy(&last, src + 2 * (count - 1), sizeof last);
        out[count / 2] = (uint32_t)last << 16;
    }
}

static void pairs_zip(const uint32_t *above, const uint32_t *below, int64_t count, uint32_t *out)
{
    for (int64_t i = 0; i < (count + 1) / 2; i++) {
        out[2 * i] = (above[i] & 0xFFFF0000U) | below[i] >> 16;
        out[2 * i + 1] = above[i] << 16 | (below[i] & 0xFFFFU);
    }
}

const qs_pairs *PAIRS_TABLE(void)
{
    static const qs_pairs table = {.name = PAIRS_NAME,
                                   .mr = TILE_MR,
                                   .nr = TILE_COLS,
                                   .begin = pairs_begin,
                                   .end = pairs_end,
                                   .tile = tile_packed,
                                   .tile_plain = tile_plain,
                                   .round = pairs_round,
                                   .nf4_decode = pairs_nf4_blocks,
                                   .take = pairs_take,
                                   .zip = pairs_zip};
    return &table;
}
