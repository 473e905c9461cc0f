/* NF4's quantizer as an operation: the bytes of src/quant/nf4.c on every backend. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "quant/nf4.h"
#include "twin.h"

#define COUNT_OF(array) (sizeof(array) / sizeof *(array))

enum { GUARD = 16 }; /* bytes behind each output that must stay */

/* An output of `bytes`, filled with 0xEE, its guard too. */
static uint8_t *filled(size_t bytes)
{
    uint8_t *out = malloc(bytes + GUARD);
    cr_assert_not_null(out);
    memset(out, 0xEE, bytes + GUARD);
    return out;
}

static uint8_t *upload_filled(const tw_backend *b, size_t bytes)
{
    uint8_t *host = filled(bytes), *device = tw_upload(b, host, bytes + GUARD);
    free(host);
    return device;
}

static void assert_bytes(const tw_backend *b, const void *device, const void *want, size_t bytes,
                         const char *what, int64_t count)
{
    uint8_t *got = tw_read(b, device, bytes + GUARD);
    for (size_t i = 0; i < bytes + GUARD; i++) {
        cr_assert_eq(got[i], ((const uint8_t *)want)[i],
                     "%s on %s, %lld elements: byte %zu of %zu is %02x, not %02x", what, b->name,
                     (long long)count, i, bytes, got[i], ((const uint8_t *)want)[i]);
    }
    free(got);
}

/* ---- first level ---- */

/* Every eighth block of each kind: random; zero; with NaN, with infinities; denormal; on
 * thresholds; tiny beside large; zeros of both signs with NaN. */
static float *blocks_make(int64_t count)
{
    float *x = fx_random(count, 41);
    for (int64_t i = 0; i < count; i++) {
        const int64_t in_block = i % QS_NF4_BLOCK;
        switch (i / QS_NF4_BLOCK % 8) {
        case 1:
            x[i] = 0.0F;
            break;
        case 2:
            x[i] = in_block % 9 == 4 ? NAN : x[i];
            break;
        case 3:
            x[i] = in_block == 17 ? INFINITY : in_block == 40 ? -INFINITY : x[i];
            break;
        case 4:
            x[i] = ldexpf(x[i], -140);
            break;
        case 5: /* absmax 1: thresholds, and the next float on either side */
            x[i] = in_block == 0
                       ? 1.0F
                       : nextafterf(qs_nf4_threshold[in_block % 15],
                                    in_block % 3 == 0   ? INFINITY
                                    : in_block % 3 == 1 ? -INFINITY
                                                        : qs_nf4_threshold[in_block % 15]);
            break;
        case 6:
            x[i] = in_block == 63 ? 3e38F : ldexpf(x[i], -(int)in_block);
            break;
        case 7:
            x[i] = in_block % 3 == 0 ? NAN : in_block % 3 == 1 ? -0.0F : 0.0F;
            break;
        default:
            break;
        }
    }
    return x;
}

typedef struct {
    qs_dtype dtype;
    int64_t count;
    size_t x_shift, packed_shift; /* elements of x, bytes */
} blocks_case;

static void blocks_of(const tw_backend *b, blocks_case k)
{
    const size_t size = qs_dtype_bytes(k.dtype), packed_bytes = (size_t)(k.count + 1) / 2;
    const size_t absmax_bytes = (size_t)((k.count + 63) / 64) * sizeof(float);
    float *x = blocks_make(k.count);
    uint8_t *raw = malloc(((size_t)k.count + k.x_shift + 1) * size);
    qs_f32_store(raw + k.x_shift * size, k.dtype, x, k.count);
    qs_f32_load(x, raw + k.x_shift * size, k.dtype, k.count); /* what the type holds of it */

    uint8_t *packed = filled(packed_bytes + k.packed_shift), *absmax = filled(absmax_bytes);
    float *want_absmax = calloc(absmax_bytes + 4, 1);
    const int64_t zero = qs_nf4_quantize_blocks(x, k.count, packed + k.packed_shift, want_absmax);
    memcpy(absmax, want_absmax, absmax_bytes);

    void *raw_device = tw_upload(b, raw, ((size_t)k.count + k.x_shift) * size);
    uint8_t *packed_device = upload_filled(b, packed_bytes + k.packed_shift);
    uint8_t *absmax_device = upload_filled(b, absmax_bytes);
    int64_t *zero_device = tw_upload(b, &(int64_t){77}, sizeof *zero_device); /* overwritten */
    tw_ok(b, b->ops->nf4_quantize_blocks(b->queue, (uint8_t *)raw_device + k.x_shift * size,
                                         k.dtype, k.count, packed_device + k.packed_shift,
                                         (float *)(void *)absmax_device, zero_device));
    assert_bytes(b, packed_device, packed, packed_bytes + k.packed_shift, "packed", k.count);
    assert_bytes(b, absmax_device, absmax, absmax_bytes, "absmax", k.count);
    int64_t *got_zero = tw_read(b, zero_device, sizeof *got_zero);
    cr_assert_eq(*got_zero, zero, "%s, %lld elements: %lld zero blocks, not %lld", b->name,
                 (long long)k.count, (long long)*got_zero, (long long)zero);
    free(got_zero);
    free(want_absmax);
    free(absmax);
    free(packed);
    free(raw);
    free(x);
    tw_free(b, raw_device);
    tw_free(b, packed_device);
    tw_free(b, absmax_device);
    tw_free(b, zero_device);
}

static void blocks_cases(const tw_backend *b)
{
    const qs_dtype types[] = {QS_F32, QS_BF16, QS_F16};
    const int64_t counts[] = {0,   1,   2,   7,   8,    9,    63,   64,   65,
                              127, 128, 129, 511, 1000, 2048, 2049, 5000, 16384 + 65};
    for (size_t t = 0; t < COUNT_OF(types); t++) {
        for (size_t c = 0; c < COUNT_OF(counts); c++) {
            blocks_of(b, (blocks_case){types[t], counts[c], 0, 0});
        }
        blocks_of(b, (blocks_case){types[t], 1000, 1, 0});
        blocks_of(b, (blocks_case){types[t], 1000, 0, 1});
        blocks_of(b, (blocks_case){types[t], 1000, 8, 4});
    }
}

Test(twin_quantize, first_level_has_the_cpus_bytes)
{
    tw_on_backends(blocks_cases);
}

/* ---- second level ---- */

/* Groups of five kinds: random around the offset; all equal to it; with NaN and infinity; denormal
 * differences; on the midpoints of the map, which where they are exact are ties. */
static float *absmax_make(int64_t n_blocks, float offset)
{
    float *x = fx_random(n_blocks, 42);
    for (int64_t i = 0; i < n_blocks; i++) {
        switch (i / QS_NF4_QUANTUM_BLOCKS % 5) {
        case 1:
            x[i] = offset;
            break;
        case 2:
            x[i] = i % 50 == 7 ? NAN : i % 50 == 9 ? INFINITY : x[i];
            break;
        case 3:
            x[i] = offset + ldexpf(x[i], offset == 0.0F ? -140 : -20);
            break;
        case 4: { /* the last entry, 1, is the group's largest */
            const int64_t at = i % QS_NF4_QUANTUM_BLOCKS;
            x[i] = (qs_dynamic_map[at] + qs_dynamic_map[at < 255 ? at + 1 : at]) / 2.0F;
            break;
        }
        default:
            break;
        }
    }
    return x;
}

static void absmax_of(const tw_backend *b, int64_t n_blocks, float offset)
{
    const size_t small = (size_t)n_blocks;
    const size_t nested = (size_t)((n_blocks + 255) / 256) * sizeof(float);
    float *x = absmax_make(n_blocks, offset), *want32 = calloc(nested + 4, 1);
    uint8_t *absmax8 = filled(small), *absmax32 = filled(nested);
    qs_nf4_quantize_absmax(x, n_blocks, offset, absmax8, want32);
    memcpy(absmax32, want32, nested);
    float *x_device = tw_upload(b, x, small * sizeof *x);
    uint8_t *absmax8_device = upload_filled(b, small), *absmax32_device = upload_filled(b, nested);
    tw_ok(b, b->ops->nf4_quantize_absmax(b->queue, x_device, n_blocks, offset, absmax8_device,
                                         (float *)(void *)absmax32_device));
    assert_bytes(b, absmax8_device, absmax8, small, "absmax8", n_blocks);
    assert_bytes(b, absmax32_device, absmax32, nested, "absmax32", n_blocks);
    free(want32);
    free(absmax32);
    free(absmax8);
    free(x);
    tw_free(b, x_device);
    tw_free(b, absmax8_device);
    tw_free(b, absmax32_device);
}

static void absmax_cases(const tw_backend *b)
{
    const int64_t counts[] = {0, 1, 2, 31, 33, 255, 256, 257, 512, 1000, 1024, 1280, 2700};
    const float offsets[] = {0.0F, 0.037F, -1.5F, 1e-40F};
    for (size_t c = 0; c < COUNT_OF(counts); c++) {
        for (size_t o = 0; o < COUNT_OF(offsets); o++) {
            absmax_of(b, counts[c], offsets[o]);
        }
    }
}

Test(twin_quantize, second_level_has_the_cpus_bytes)
{
    tw_on_backends(absmax_cases);
}
