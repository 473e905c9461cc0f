/* Choice of the table, and the portable one: the definition of the bits. */
#include "kernels/cpu/pairs.h"

#include <math.h>
#include <stdatomic.h>

#include "kernels/cpu/choice.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

/* ---- portable ---- */

#define PAIRS_NAME "portable"
#define PAIRS_TABLE qs_pairs_portable
#define TILE_MR 4
#define TILE_NV 4
#define TILE_LANES 1

typedef float vec;

/* A word's numbers; the later one first is what its bits are for. */
typedef struct {
    float first, second;
} tile_elems;

/* 0 for what is subnormal, of its sign. */
static inline float flush(float x)
{
    return fabsf(x) < 0x1p-126F ? copysignf(0.0F, x) : x;
}

/* To fp32, and 0 where that would be subnormal: what is at least half a last place below the
 * smallest normal number is not, it rounds up to it. */
static inline float narrow(double exact)
{
    const double least = 0x1p-126 * (1 - 0x1p-25);
    return (float)(fabs(exact) < least ? copysign(0.0, exact) : exact);
}

static inline float number(uint32_t upper)
{
    float value;
    memcpy(&value, &upper, sizeof value);
    return flush(value);
}

static inline tile_elems widen(uint32_t word)
{
    return (tile_elems){number(word & 0xFFFF0000U), number(word << 16)};
}

static inline float vec_add(float a, float b)
{
    return narrow((double)flush(a) + b);
}

/* A product of two bf16 is exact in double, and so is its sum with a float wherever that could
 * change what it rounds to: if they are so far apart that it is not, the larger one is a float
 * itself, and no tie is near. */
static inline float tile_fma(tile_elems left, tile_elems right, float sum)
{
    sum = narrow((double)left.first * right.first + sum);
    return narrow((double)left.second * right.second + sum);
}

#define vec_load(p) (*(p))
#define vec_store(p, v) (*(p) = (v))
#define vec_zero() 0.0F
#define add_one(a, b) vec_add(a, b)
#define tile_load(p) widen(*(p))
#define tile_splat(x) widen(x)

static unsigned pairs_begin(void)
{
    return 0;
}

static void pairs_end(unsigned before)
{
    (void)before;
}

static void pairs_nf4_blocks(const uint8_t *packed, const float *absmax, int64_t blocks,
                             qs_dtype dtype, uint32_t *out)
{
    qs_pairs_nf4_by_floats(qs_isa_portable(), packed, absmax, blocks, dtype, out);
}

#define pairs_round qs_pairs_round

#include "kernels/cpu/pairs_template.h"

/* ---- choice ---- */

/* vdpbf16ps, with zmm registers that the operating system saves. Asked once: under a hypervisor
 * cpuid takes as long as a small product. */
static bool has_avx512_bf16(void)
{
#if defined(__x86_64__)
    static _Atomic int known; /* 0: not yet, else 1 + the answer */
    if (known == 0) {
        unsigned a, b, c, d;
        known = 1 + (qs_pairs_avx512() != NULL && qs_isa_runs("avx512") &&
                     __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & 1U << 5) != 0);
    }
    return known == 2;
#else
    return false;
#endif
}

/* By name, NULL if there is none or this CPU cannot run it. */
static const void *find(const char *name)
{
    if (strcmp(name, "avx512bf16") == 0) {
        return has_avx512_bf16() ? qs_pairs_avx512() : NULL;
    }
    if (strcmp(name, "avx2") == 0) {
        return qs_isa_runs("avx2") ? qs_pairs_avx2() : NULL;
    }
    return strcmp(name, "portable") == 0 ? qs_pairs_portable() : NULL;
}

static qs_choice choice = {
    .variable = "QSHARD_CPU_BF16", .names = {"avx512bf16", "avx2", "portable"}, .find = find};

const qs_pairs *qs_pairs_get(void)
{
    return qs_choice_get(&choice);
}

bool qs_pairs_force(const char *name)
{
    return qs_choice_force(&choice, name);
}

bool qs_pairs_are_faster(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_is("amd") && qs_pairs_get() == qs_pairs_avx512();
#else
    return false;
#endif
}
