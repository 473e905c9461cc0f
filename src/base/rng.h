/* Random numbers by counter: Philox4x32-10 (Salmon et al. 2011, doi:10.1145/2063384.2063405) from
 * Random123.
 *
 * There is no state. A number is a pure function of a key (seed, step, global sample) and a
 * counter (element, site | layer), so that it does not depend on ranks, threads or the order of
 * evaluation, and a resumed run draws what the undisturbed one would have drawn. */
#ifndef QS_BASE_RNG_H
#define QS_BASE_RNG_H

#include <stdint.h>

/** What a random number is for; part of the counter. */
typedef enum {
    QS_RNG_LORA_INIT = 1,
    QS_RNG_SHUFFLE = 2,
    QS_RNG_DROPOUT = 16, /* + index of the linear within its layer */
} qs_rng_site;

typedef struct {
    uint64_t key; /* of seed, step and sample */
    uint32_t site;
    uint32_t layer;
} qs_rng;

/** Mix (seed, step, sample) into a generator for one site of one layer. */
qs_rng qs_rng_make(uint64_t seed, uint64_t step, uint64_t sample, uint32_t site, uint32_t layer);

/** 32 random bits: word (element % 4) of block (element / 4). */
uint32_t qs_rng_u32(const qs_rng *rng, uint64_t element);

/** Four consecutive words, elements 4 block .. 4 block + 3. */
void qs_rng_block(const qs_rng *rng, uint64_t block, uint32_t out[4]);

/** Uniform in [0, 1) with 24 bits: (u32 >> 8) * 2^-24. */
float qs_rng_uniform(const qs_rng *rng, uint64_t element);

/** A pseudo-random permutation of 0..count-1, evaluated at `index`: cycle walking over a 4-round
 * Feistel network keyed by (seed, epoch). */
int64_t qs_rng_permute(uint64_t seed, uint64_t epoch, int64_t count, int64_t index);

#endif
