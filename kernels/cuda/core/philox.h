/* Philox4x32-10 (Salmon et al. 2011, doi:10.1145/2063384.2063405) for the device, and the counters
 * of base/rng.h around it: the same words for the same (seed, step, sample, site, layer, element).
 */
#ifndef QS_KERNELS_CUDA_CORE_PHILOX_H
#define QS_KERNELS_CUDA_CORE_PHILOX_H

#include "kernels/cuda/core/hd.h"

typedef struct {
    uint32_t word[4];
} qs_philox;

/* Ten rounds. A round multiplies two of the four words by constants to 64 bits and mixes the halves
 * with the other two and the key, which then moves on by a Weyl sequence. */
QS_HD qs_philox qs_philox_make(uint64_t counter_low, uint64_t counter_high, uint64_t key)
{
    uint32_t c0 = (uint32_t)counter_low, c1 = (uint32_t)(counter_low >> 32);
    uint32_t c2 = (uint32_t)counter_high, c3 = (uint32_t)(counter_high >> 32);
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    qs_philox out;
    for (int round = 0; round < 10; round++) {
        const uint64_t p0 = (uint64_t)c0 * 0xD2511F53u;
        const uint64_t p1 = (uint64_t)c2 * 0xCD9E8D57u;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)p1;
        c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out.word[0] = c0;
    out.word[1] = c1;
    out.word[2] = c2;
    out.word[3] = c3;
    return out;
}

/** A generator: qs_rng without its struct's origin. */
typedef struct {
    uint64_t key, site_layer;
} qs_philox_rng;

/** As qs_rng_make. */
QS_HD qs_philox_rng qs_philox_rng_make(uint64_t seed, uint64_t step, uint64_t sample, uint32_t site,
                                       uint32_t layer)
{
    const qs_philox mixed = qs_philox_make(step, sample, seed);
    qs_philox_rng rng;
    rng.key = mixed.word[0] | (uint64_t)mixed.word[1] << 32;
    rng.site_layer = site | (uint64_t)layer << 32;
    return rng;
}

/** As qs_rng_block: the words of elements 4 block .. 4 block + 3. */
QS_HD qs_philox qs_philox_block(const qs_philox_rng *rng, uint64_t block)
{
    return qs_philox_make(block, rng->site_layer, rng->key);
}

/** As qs_rng_u32. */
QS_HD uint32_t qs_philox_u32(const qs_philox_rng *rng, uint64_t element)
{
    const qs_philox words = qs_philox_block(rng, element / 4);
    const uint32_t low = (element & 1) != 0 ? words.word[1] : words.word[0];
    const uint32_t high = (element & 1) != 0 ? words.word[3] : words.word[2];
    return (element & 2) != 0 ? high : low;
}

/** Dropout's rule for one word: an element is kept where its uniform number (qs_rng_uniform) is at
 * least p. */
QS_HD bool qs_dropout_keeps(uint32_t word, float p)
{
    return (float)(int32_t)(word >> 8) * 0x1p-24f >= p;
}

/** What kept elements are multiplied by; at p = 1 nothing is kept, and it does not matter. */
QS_HD float qs_dropout_scale(float p)
{
    return p < 1.0f ? 1.0f / (1.0f - p) : 0.0f;
}

#endif
