/* Choice of the table, and the portable one: the definition of the bits. */
#include "kernels/cpu/tile.h"

#include <math.h>
#include <stdatomic.h>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels/cpu/choice.h"
#include "kernels/cpu/isa.h"

enum { SIDE = QS_TILE_SIDE, HALF = QS_TILE_HALF, STEP = QS_TILE_STEP };

/* ---- portable ---- */

/* A result as the tiles give it: to fp32, and 0 where it would be subnormal. What is at least half
 * a last place below the smallest normal number is not: it rounds up to it. */
static inline float normal(double exact)
{
    const double least = 0x1p-126 * (1 - 0x1p-25);
    return (float)(fabs(exact) < least ? copysign(0.0, exact) : exact);
}

static inline float widen(uint32_t bf16)
{
    const uint32_t bits = (bf16 & 0x7F80U) == 0 ? (bf16 & 0x8000U) << 16 : bf16 << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* One step of one row. A product of two bf16 is exact in double, and so is its sum with a float
 * wherever that could change what it rounds to: if they are so far apart that it is not, the larger
 * one is a float itself, and no tie is near. */
static void step_row(const uint16_t *a, const float b[STEP][SIDE], float *y)
{
    float even[SIDE] = {0}, odd[SIDE] = {0};
    for (int k = 0; k < STEP; k += 2) {
        const double x0 = widen(a[k]), x1 = widen(a[k + 1]);
        for (int j = 0; j < SIDE; j++) {
            even[j] = normal(x0 * b[k][j] + even[j]);
            odd[j] = normal(x1 * b[k + 1][j] + odd[j]);
        }
    }
    for (int j = 0; j < SIDE; j++) {
        const float sum = normal((double)even[j] + odd[j]);
        y[j] = normal((double)y[j] + sum);
    }
}

static void portable_tile(int64_t steps, const uint16_t *a, const uint16_t *b, float *y)
{
    memset(y, 0, sizeof *y * SIDE * SIDE);
    for (int64_t s = 0; s < steps; s++, a += QS_TILE_STEP_ELEMS, b += QS_TILE_STEP_ELEMS) {
        float wide[STEP][SIDE];
        for (int j = 0; j < SIDE; j++) {
            const uint16_t *half = b + j / HALF * HALF * STEP + j % HALF * 2;
            for (int k = 0; k < STEP; k++) {
                wide[k][j] = widen(half[k / 2 * STEP + k % 2]);
            }
        }
        for (int i = 0; i < SIDE; i++) {
            step_row(a + i * STEP, wide, y + i * SIDE);
        }
    }
}

static unsigned nothing(void)
{
    return 0;
}

static void nothing_after(unsigned before)
{
    (void)before;
}

const qs_tile *qs_tile_portable(void)
{
    static const qs_tile table = {.name = "portable",
                                  .begin = nothing,
                                  .end = nothing_after,
                                  .tile = portable_tile,
                                  .round = qs_tile_round,
                                  .pair = qs_tile_pair};
    return &table;
}

/* ---- choice ---- */

#if defined(__x86_64__) && defined(__linux__)
static bool cpu_has_tiles(void)
{
    const unsigned amx = 1U << 22 | 1U << 24;   /* leaf 7, EDX: AMX-BF16, AMX-TILE */
    const unsigned saved = 1U << 17 | 1U << 18; /* XCR0: the kernel keeps tiles and their shape */
    unsigned a, b, c, d, low, high;
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 ||
        (d & amx) != amx) {
        return false;
    }
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & saved) == saved;
}

/* Linux gives the tiles' registers only to processes that ask (5.16 and later). */
static bool kernel_permits_tiles(void)
{
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}
#else
static bool cpu_has_tiles(void)
{
    return false;
}

static bool kernel_permits_tiles(void)
{
    return false;
}
#endif

bool qs_tile_supported(void)
{
    static _Atomic int known; /* 0: not yet, else 1 + the answer; whoever comes first asks */
    if (known == 0) {
        known = 1 + (qs_tile_amx() != NULL && cpu_has_tiles() && kernel_permits_tiles());
    }
    return known == 2;
}

/* By name, NULL if there is none or this CPU cannot run it. */
static const void *find(const char *name)
{
    if (strcmp(name, "amx") == 0) {
        return qs_tile_supported() ? qs_tile_amx() : NULL;
    }
    if (strcmp(name, "avx2") == 0) {
        return qs_isa_runs("avx2") ? qs_tile_avx2() : NULL;
    }
    return strcmp(name, "portable") == 0 ? qs_tile_portable() : NULL;
}

static qs_choice choice = {
    .variable = "QSHARD_CPU_AMX", .names = {"amx", "avx2", "portable"}, .find = find};

const qs_tile *qs_tile_get(void)
{
    return qs_choice_get(&choice);
}

bool qs_tile_force(const char *name)
{
    return qs_choice_force(&choice, name);
}
