/* Compares the bf16 product's inner loops for AVX2 and for AMX with the portable ones, bit for bit:
 * exit 0 if they agree, 1 if not, 77 if those that ran do, but this CPU, its kernel or this build
 * has no AMX, and says which. Links
 * statically and needs nothing else, so that it can run as the only program of an emulated machine.
 */
#include "kernels/cpu/tile.h"

#include <stdio.h>
#include <string.h>

#include "bit_checks.h"
#include "kernels/cpu/isa.h"

#ifdef QS_TILE_NO_UNDERFLOW /* an emulator that is wrong there: tests/bare_metal/run.sh */
enum { SMALL_ONES = 0 };
#else
enum { SMALL_ONES = 1 };
#endif

enum {
    STEPS = 5,
    COUNT = STEPS * QS_TILE_STEP_ELEMS,
    SUMS = QS_TILE_SIDE * QS_TILE_SIDE,
    ROUNDS = 24,
    LENGTH = 77,
};

/* All tiles under one `begin`, as a product multiplies them: the shape's instruction zeroes the
 * registers, so that under one each nobody would see whether `tile` itself starts from 0. */
static int compare_tiles(const qs_tile *fast, const qs_tile *slow)
{
    static uint16_t a[COUNT], b[COUNT];
    static float y[2][SUMS];
    int wrong = 0;
    const unsigned before = fast->begin();
    for (int round = 0; round < ROUNDS && wrong == 0; round++) {
        const int kind = round % BF16_KINDS;
        if ((kind == 1 || kind == 2) && !SMALL_ONES) {
            continue;
        }
        const int64_t steps = round < BF16_KINDS ? STEPS : random_bits() % (STEPS + 1);
        for (int i = 0; i < COUNT;
             i++) { /* the last kind: a few of any in one, no NaN everywhere */
            a[i] = random_bf16(kind == BF16_KINDS - 1 && random_bits() % 500 != 0 ? 0 : kind);
            b[i] = random_bf16(kind == BF16_KINDS - 1 ? 0 : kind);
        }
        memset(y, 0x55, sizeof y);
        fast->tile(steps, a, b, y[0]);
        slow->tile(steps, a, b, y[1]);
        wrong = differ_f32("tile", round, y[0], y[1], SUMS);
    }
    fast->end(before);
    return wrong;
}

static int compare_packs(const qs_tile *fast, const qs_tile *slow)
{
    for (int round = 0; round < ROUNDS; round++) {
        uint32_t words[2][LENGTH], out[2][2 * LENGTH];
        float x[2][LENGTH];
        const int64_t count = 1 + random_bits() % LENGTH;
        for (int i = 0; i < LENGTH; i++) {
            words[0][i] = random_bits();
            words[1][i] = random_bits() % 8 == 0 ? 0x7F800001U : words[0][i] ^ 0x8000U; /* ties */
        }
        memcpy(x, words, sizeof x);
        memset(out, 0x55, sizeof out);
        fast->pair(x[0], x[1], count, out[0]);
        fast->round(x[1], count, (uint16_t *)(void *)(out[0] + LENGTH));
        slow->pair(x[0], x[1], count, out[1]);
        slow->round(x[1], count, (uint16_t *)(void *)(out[1] + LENGTH));
        if (memcmp(out[0], out[1], sizeof out[0]) != 0) {
            printf("round or pair, round %d: differ\n", round);
            return 1;
        }
    }
    return 0;
}

/* Why qs_tile_supported says no. */
static const char *why_not(void)
{
    enum { AMX_BF16 = 22 }; /* bit of leaf 7's EDX */
    if (qs_tile_amx() == NULL) {
        return "this build has no code for AMX-BF16, for want of an assembler that knows it";
    }
    return cpu_has(AMX_BF16) ? "this CPU has AMX-BF16, but the kernel, or a sandbox in its place, "
                               "does not lend the tiles' registers (arch_prctl)"
                             : "this CPU has no AMX-BF16";
}

static int compare(const qs_tile *fast)
{
    const qs_tile *slow = qs_tile_portable();
    const int wrong = compare_tiles(fast, slow) + compare_packs(fast, slow);
    printf("tile: %s: %s\n", fast->name, wrong == 0 ? "the same bits" : "DIFFERENT BITS");
    return wrong;
}

int main(void)
{
    enum { SKIPPED = 77 };
    int wrong = 0;
    if (qs_tile_avx2() != NULL && qs_isa_runs("avx2")) {
        wrong += compare(qs_tile_avx2());
    }
    if (qs_tile_supported()) {
        wrong += compare(qs_tile_amx());
    } else {
        printf("tile: %s: not compared\n", why_not());
    }
    return wrong > 0 ? 1 : qs_tile_supported() ? 0 : SKIPPED;
}
