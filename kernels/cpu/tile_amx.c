/* The bf16 product on AMX. All eight tiles are in use: 0-3 sums, 4-5 of X, 6-7 of W. A step loads
 * four tiles for four products, which take the multiplier 16 cycles each; a load takes the ports 8.
 */
#include "kernels/cpu/tile.h"

#include <stddef.h>

#if defined(QS_TILE_ASSEMBLER)

/* What ldtilecfg reads: all tiles 16 rows of 64 bytes. */
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} shape;

static unsigned amx_begin(void)
{
    static const shape all = {.palette = 1,
                              .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64},
                              .rows = {16, 16, 16, 16, 16, 16, 16, 16}};
    __asm__ volatile("ldtilecfg %0" : : "m"(all));
    return 0;
}

static void amx_end(unsigned before)
{
    (void)before;
    __asm__ volatile("tilerelease" : : : "memory");
}

static void amx_tile(int64_t steps, const uint16_t *a, const uint16_t *b, float *y)
{
    enum { ROW_BYTES = 64, Y_ROW_BYTES = QS_TILE_SIDE * sizeof(float) };
    float *lower = y + (ptrdiff_t)QS_TILE_HALF * QS_TILE_SIDE;
    __asm__ volatile("tilezero %%tmm0\n\t"
                     "tilezero %%tmm1\n\t"
                     "tilezero %%tmm2\n\t"
                     "tilezero %%tmm3\n\t"
                     "test %[steps], %[steps]\n\t"
                     "jz 2f\n"
                     ".p2align 5\n"
                     "1:\n\t"
                     "tileloadd (%[b],%[row]), %%tmm6\n\t"
                     "tileloadd (%[a],%[row]), %%tmm4\n\t"
                     "tileloadd 1024(%[b],%[row]), %%tmm7\n\t"
                     "tileloadd 1024(%[a],%[row]), %%tmm5\n\t"
                     "tdpbf16ps %%tmm6, %%tmm4, %%tmm0\n\t"
                     "tdpbf16ps %%tmm7, %%tmm4, %%tmm1\n\t"
                     "tdpbf16ps %%tmm6, %%tmm5, %%tmm2\n\t"
                     "tdpbf16ps %%tmm7, %%tmm5, %%tmm3\n\t"
                     "add $2048, %[a]\n\t"
                     "add $2048, %[b]\n\t"
                     "dec %[steps]\n\t"
                     "jnz 1b\n"
                     "2:\n\t"
                     "tilestored %%tmm0, (%[y],%[y_row])\n\t"
                     "tilestored %%tmm1, 64(%[y],%[y_row])\n\t"
                     "tilestored %%tmm2, (%[lower],%[y_row])\n\t"
                     "tilestored %%tmm3, 64(%[lower],%[y_row])\n\t"
                     : [a] "+r"(a), [b] "+r"(b), [steps] "+r"(steps)
                     : [y] "r"(y), [lower] "r"(lower), [row] "r"((int64_t)ROW_BYTES),
                       [y_row] "r"((int64_t)Y_ROW_BYTES)
                     : "cc", "memory");
}

const qs_tile *qs_tile_amx(void)
{
    static const qs_tile table = {.name = "amx",
                                  .begin = amx_begin,
                                  .end = amx_end,
                                  .tile = amx_tile,
                                  .round = qs_tile_round,
                                  .pair = qs_tile_pair};
    return &table;
}

#else

const qs_tile *qs_tile_amx(void)
{
    return NULL;
}

#endif
