/* Counters and keys around Random123's Philox4x32-10.
 *
 * A block of four words is Philox(counter, key) with
 *     counter = {block low 32 bits, block high 32 bits, site, layer}
 *     key     = {low, high 32 bits of qs_rng.key}
 * and qs_rng.key = {word 0, word 1} of Philox with
 *     counter = {step low, step high, sample low, sample high}
 *     key     = {seed low, seed high}.
 * Philox is its own mixing function here: it is a bijection of the counter, so that two (step,
 * sample) of one seed share a key only by the chance of a 64-bit random function, and nothing has
 * to be invented. */
#include "base/rng.h"

#include <Random123/philox.h>

static philox4x32_ctr_t philox(uint64_t low, uint64_t high, uint64_t key)
{
    philox4x32_ctr_t counter = {
        {(uint32_t)low, (uint32_t)(low >> 32), (uint32_t)high, (uint32_t)(high >> 32)}};
    philox4x32_key_t words = {{(uint32_t)key, (uint32_t)(key >> 32)}};
    return philox4x32_R(10, counter, words);
}

qs_rng qs_rng_make(uint64_t seed, uint64_t step, uint64_t sample, uint32_t site, uint32_t layer)
{
    philox4x32_ctr_t mixed = philox(step, sample, seed);
    return (qs_rng){.key = mixed.v[0] | (uint64_t)mixed.v[1] << 32, .site = site, .layer = layer};
}

void qs_rng_block(const qs_rng *rng, uint64_t block, uint32_t out[4])
{
    philox4x32_ctr_t words = philox(block, rng->site | (uint64_t)rng->layer << 32, rng->key);
    for (int i = 0; i < 4; i++) {
        out[i] = words.v[i];
    }
}

uint32_t qs_rng_u32(const qs_rng *rng, uint64_t element)
{
    uint32_t words[4];
    qs_rng_block(rng, element / 4, words);
    return words[element % 4];
}

float qs_rng_uniform(const qs_rng *rng, uint64_t element)
{
    return (float)(qs_rng_u32(rng, element) >> 8) * 0x1p-24f;
}

/* A Feistel round maps (L, R) to (R, L ^ f(R)), which can be undone whatever f is: so the network
 * is a bijection of 2 * half_bits bits. The domain is the smallest such power of two >= count (at
 * least 16, so that few elements mix, too); an index that lands outside walks on until it is
 * inside, which keeps the map a bijection of 0..count-1. */
int64_t qs_rng_permute(uint64_t seed, uint64_t epoch, int64_t count, int64_t index)
{
    if (count <= 1) {
        return 0;
    }
    int half_bits = 2;
    while (half_bits < 32 && (uint64_t)count > (uint64_t)1 << (2 * half_bits)) {
        half_bits++;
    }
    const uint64_t mask = ((uint64_t)1 << half_bits) - 1;
    qs_rng rng = qs_rng_make(seed, epoch, 0, QS_RNG_SHUFFLE, 0);
    uint64_t at = (uint64_t)index;
    do {
        uint64_t left = at >> half_bits, right = at & mask;
        for (uint32_t round = 0; round < 4; round++) {
            uint32_t words[4];
            rng.layer = round;
            qs_rng_block(&rng, right, words);
            uint64_t next = left ^ (words[0] & mask);
            left = right;
            right = next;
        }
        at = left << half_bits | right;
    } while (at >= (uint64_t)count);
    return (int64_t)at;
}
