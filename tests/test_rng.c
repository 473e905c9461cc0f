/* Philox known answers, keys, and the shuffle's permutation. */
#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

#include "base/rng.h"

/* The published vectors of Philox4x32-10 (kat_vectors of Random123, Salmon et al. 2011). */
Test(rng, philox_gives_the_published_words)
{
    static const struct {
        uint32_t counter[4], key[2], words[4];
    } vectors[] = {
        {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
         {0xffffffff, 0xffffffff},
         {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
         {0xa4093822, 0x299f31d0},
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (size_t v = 0; v < sizeof vectors / sizeof *vectors; v++) {
        qs_rng rng = {.key = vectors[v].key[0] | (uint64_t)vectors[v].key[1] << 32,
                      .site = vectors[v].counter[2],
                      .layer = vectors[v].counter[3]};
        uint64_t block = vectors[v].counter[0] | (uint64_t)vectors[v].counter[1] << 32;
        uint32_t out[4];
        qs_rng_block(&rng, block, out);
        cr_assert_arr_eq(out, vectors[v].words, sizeof out, "vector %zu", v);
    }
}

Test(rng, element_is_a_word_of_its_block)
{
    qs_rng rng = qs_rng_make(42, 7, 11, QS_RNG_DROPOUT + 3, 5);
    for (uint64_t block = 0; block < 5; block++) {
        uint32_t words[4];
        qs_rng_block(&rng, block, words);
        for (uint64_t i = 0; i < 4; i++) {
            cr_assert_eq(qs_rng_u32(&rng, 4 * block + i), words[i]);
        }
    }
}

/* Frozen: a change here would change every run and break every resume. The first line restates the
 * documented mixing. */
Test(rng, key_is_philox_of_step_and_sample)
{
    qs_rng seed_as_key = {.key = 0x0123456789abcdefULL, .site = 0x33333333, .layer = 0x44444444};
    uint32_t mixed[4];
    qs_rng_block(&seed_as_key, 0x2222222211111111ULL, mixed);
    qs_rng rng = qs_rng_make(0x0123456789abcdefULL, 0x2222222211111111ULL, 0x4444444433333333ULL,
                             QS_RNG_LORA_INIT, 9);
    cr_assert_eq(rng.key, mixed[0] | (uint64_t)mixed[1] << 32);
    cr_assert_eq(rng.site, (uint32_t)QS_RNG_LORA_INIT);
    cr_assert_eq(rng.layer, 9u);
}

Test(rng, every_part_of_the_key_and_counter_matters)
{
    qs_rng base = qs_rng_make(1, 2, 3, 4, 5);
    qs_rng other[] = {qs_rng_make(9, 2, 3, 4, 5), qs_rng_make(1, 9, 3, 4, 5),
                      qs_rng_make(1, 2, 9, 4, 5), qs_rng_make(1, 2, 3, 9, 5),
                      qs_rng_make(1, 2, 3, 4, 9), qs_rng_make(1, 3, 2, 4, 5)};
    for (size_t i = 0; i < sizeof other / sizeof *other; i++) {
        int same = 0;
        for (uint64_t e = 0; e < 64; e++) {
            same += qs_rng_u32(&base, e) == qs_rng_u32(&other[i], e);
        }
        cr_assert_lt(same, 2, "variant %zu shares %d of 64 words", i, same);
    }
    cr_assert_neq(qs_rng_u32(&base, 1), qs_rng_u32(&base, 1 + (1ULL << 34)), "high counter word");
}

Test(rng, uniform_stays_below_one_and_has_the_right_mean)
{
    qs_rng rng = qs_rng_make(5, 0, 0, QS_RNG_LORA_INIT, 0);
    enum { N = 100000 };
    double sum = 0;
    for (uint64_t e = 0; e < N; e++) {
        float u = qs_rng_uniform(&rng, e);
        cr_assert(u >= 0.0f && u < 1.0f);
        cr_assert_eq(u, (float)(qs_rng_u32(&rng, e) >> 8) / 16777216.0f);
        sum += (double)u;
    }
    /* five standard deviations of the mean of N uniforms: 5 sqrt(1/12/N) = 4.6e-3 */
    cr_assert_float_eq(sum / N, 0.5, 4.6e-3);
}

Test(rng, permute_is_a_bijection_for_all_small_counts)
{
    unsigned char seen[2000];
    for (int64_t count = 1; count <= 2000; count++) {
        memset(seen, 0, sizeof seen);
        for (int64_t i = 0; i < count; i++) {
            int64_t to = qs_rng_permute(7, (uint64_t)count, count, i);
            cr_assert(to >= 0 && to < count, "count=%ld: %ld -> %ld", (long)count, (long)i,
                      (long)to);
            cr_assert_eq(seen[to], 0, "count=%ld: %ld is hit twice", (long)count, (long)to);
            seen[to] = 1;
        }
    }
}

static int by_value(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

Test(rng, permute_has_no_collision_among_samples_of_a_billion)
{
    enum { SAMPLES = 200000 };
    const int64_t count = 1000000000;
    int64_t *to = malloc(SAMPLES * sizeof *to);
    cr_assert_not_null(to);
    for (int64_t i = 0; i < SAMPLES; i++) {
        to[i] = qs_rng_permute(3, 1, count, i * 5000 - i % 2);
        cr_assert(to[i] >= 0 && to[i] < count);
    }
    qsort(to, SAMPLES, sizeof *to, by_value);
    for (int64_t i = 1; i < SAMPLES; i++) {
        cr_assert_neq(to[i], to[i - 1]);
    }
    free(to);
}

Test(rng, permute_works_past_32_bits)
{
    const int64_t count = INT64_C(1) << 40;
    int64_t a = qs_rng_permute(3, 1, count, 0), b = qs_rng_permute(3, 1, count, count - 1);
    cr_assert(a >= 0 && a < count && b >= 0 && b < count && a != b);
}

/* A random permutation of n has one fixed point on average (Poisson): 12 or more happen once in
 * 10^9. */
Test(rng, permute_differs_per_epoch_and_from_identity)
{
    const int64_t count = 1000;
    for (uint64_t epoch = 0; epoch < 4; epoch++) {
        int fixed = 0, as_next = 0;
        for (int64_t i = 0; i < count; i++) {
            int64_t to = qs_rng_permute(1, epoch, count, i);
            fixed += to == i;
            as_next += to == qs_rng_permute(1, epoch + 1, count, i);
        }
        cr_assert_lt(fixed, 12);
        cr_assert_lt(as_next, 12);
    }
}

/* Frozen, like the keys: another order of the samples would break every resume. */
Test(rng, permute_is_frozen)
{
    static const int64_t first[] = {888, 630, 22, 278, 108, 147, 706, 692};
    for (int64_t i = 0; i < 8; i++) {
        cr_assert_eq(qs_rng_permute(42, 3, 1000, i), first[i]);
    }
}
