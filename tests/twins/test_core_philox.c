/* The device's Philox against the published vectors and against base/rng.h, word by word. */
#include <criterion/criterion.h>
#include <math.h>

#include "base/rng.h"
#include "kernels/cuda/core/philox.h"

typedef struct {
    uint32_t counter[4], key[2], want[4];
} vector;

static uint64_t pair(const uint32_t words[2])
{
    return words[0] | (uint64_t)words[1] << 32;
}

/* philox4x32 10 of Random123's kat_vectors. */
Test(core_philox, known_answers)
{
    static const vector vectors[] = {
        {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
         {0xffffffff, 0xffffffff},
         {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
         {0xa4093822, 0x299f31d0},
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (size_t i = 0; i < sizeof vectors / sizeof *vectors; i++) {
        const vector *v = &vectors[i];
        const qs_philox got = qs_philox_make(pair(v->counter), pair(v->counter + 2), pair(v->key));
        for (int w = 0; w < 4; w++) {
            cr_assert_eq(got.word[w], v->want[w], "vector %zu word %d: %08x", i, w, got.word[w]);
        }
    }
}

/* Numbers whose halves and signs differ, so that a swap shows. */
static uint64_t mixed(uint64_t i)
{
    return (i + 1) * 0x9E3779B97F4A7C15U;
}

Test(core_philox, generators_are_those_of_the_host)
{
    for (uint64_t i = 0; i < 200; i++) {
        const uint64_t seed = mixed(i), step = mixed(i + 1000), sample = mixed(i + 2000);
        const uint32_t site = (uint32_t)mixed(i + 3000), layer = (uint32_t)mixed(i + 4000);
        const qs_rng host = qs_rng_make(seed, step, sample, site, layer);
        const qs_philox_rng rng = qs_philox_rng_make(seed, step, sample, site, layer);
        cr_assert_eq(rng.key, host.key);
        for (uint64_t block = 0; block < 8; block++) {
            const uint64_t at = block < 4 ? block : mixed(block + i);
            uint32_t want[4];
            qs_rng_block(&host, at, want);
            const qs_philox got = qs_philox_block(&rng, at);
            cr_assert_arr_eq(got.word, want, sizeof want);
        }
        for (uint64_t e = 0; e < 9; e++) {
            const uint64_t element = (i % 2 == 0 ? 0 : mixed(i) >> 1) + e;
            cr_assert_eq(qs_philox_u32(&rng, element), qs_rng_u32(&host, element));
        }
    }
}

Test(core_philox, dropout_keeps_what_the_host_keeps)
{
    static const float probabilities[] = {0.0F, 0x1p-24F, 0.05F, 0.1F, 0.5F, 0.999F, 1.0F};
    const qs_rng host = qs_rng_make(3, 5, 7, QS_RNG_DROPOUT, 2);
    const qs_philox_rng rng = qs_philox_rng_make(3, 5, 7, QS_RNG_DROPOUT, 2);
    for (size_t i = 0; i < sizeof probabilities / sizeof *probabilities; i++) {
        const float p = probabilities[i];
        for (uint64_t element = 0; element < 2000; element++) {
            cr_assert_eq(qs_dropout_keeps(qs_philox_u32(&rng, element), p),
                         qs_rng_uniform(&host, element) >= p);
        }
        /* The edge, in words of 24 bits: the smallest kept one, the largest dropped one. */
        const uint32_t edge = (uint32_t)ceilf(p * 0x1p24F);
        cr_assert(edge == 1U << 24 || qs_dropout_keeps(edge << 8, p));
        cr_assert(edge == 0 || !qs_dropout_keeps((edge - 1) << 8 | 0xff, p));
        cr_assert_eq(qs_dropout_scale(p), p < 1.0F ? 1.0F / (1.0F - p) : 0.0F);
    }
    cr_assert_not(qs_dropout_keeps(0xffffffff, 1.0F), "at p = 1 nothing is kept");
    cr_assert(qs_dropout_keeps(0, 0.0F), "at p = 0 everything is");
}
