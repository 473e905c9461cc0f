/* What a descriptor makes the hardware read is where tiles in panels have it: every element of
 * every operand, both ways. */
#include <criterion/criterion.h>
#include <stdint.h>
#include <string.h>

#include "kernels/cuda/core/wgmma.h"

enum { MOST_ROWS = 128, MOST_COLS = 128, BASE = 3 * QS_PANEL_ALIGNMENT };

/* Byte of element (row, col) of a tile. */
static uint32_t stored_at(int rows, int row, int col)
{
    return BASE + (uint32_t)qs_panel_chunk(rows, row, col / 8) * 16 + (uint32_t)(col % 8) * 2;
}

Test(core_wgmma, a_tile_fills_its_panels)
{
    static const int shapes[][2] = {{64, 64}, {64, 128}, {128, 64}, {128, 128}};
    static uint8_t used[MOST_ROWS * MOST_COLS / 8];
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        const int rows = shapes[s][0], chunks = shapes[s][1] / 8;
        memset(used, 0, sizeof used);
        for (int row = 0; row < rows; row++) {
            for (int chunk = 0; chunk < chunks; chunk++) {
                const int at = qs_panel_chunk(rows, row, chunk);
                cr_assert(at >= 0 && at < rows * chunks && !used[at], "row %d chunk %d", row,
                          chunk);
                used[at] = 1;
            }
        }
    }
}

Test(core_wgmma, eight_rows_of_a_chunk_lie_in_different_banks)
{
    for (int row = 0; row < MOST_ROWS; row += 8) {
        for (int chunk = 0; chunk < MOST_COLS / 8; chunk++) {
            unsigned banks = 0;
            for (int r = 0; r < 8; r++) {
                banks |= 1U << qs_panel_chunk(MOST_ROWS, row + r, chunk) % 8;
            }
            cr_assert_eq(banks, 0xffU);
        }
    }
}

static void check_k_major(int rows, int cols, int first)
{
    const uint64_t begin = qs_wgmma_k_major(BASE + qs_panel_k_major_at(rows, first, 0));
    for (int step = 0; step < cols / QS_WGMMA_K; step++) {
        const uint64_t d = qs_wgmma_k_major(BASE + qs_panel_k_major_at(rows, first, step));
        cr_assert_eq(qs_wgmma_further(begin, qs_panel_k_major_at(rows, 0, step)), d);
        for (int mn = 0; first + mn < rows; mn++) {
            for (int k = 0; k < QS_WGMMA_K; k++) {
                cr_assert_eq(qs_wgmma_byte(d, false, mn, k),
                             stored_at(rows, first + mn, step * QS_WGMMA_K + k),
                             "%d x %d from row %d, step %d: row %d k %d", rows, cols, first, step,
                             mn, k);
            }
        }
    }
}

static void check_mn_major(int rows, int cols)
{
    const uint64_t begin = qs_wgmma_mn_major(BASE, rows);
    for (int step = 0; step < rows / QS_WGMMA_K; step++) {
        const uint64_t d = qs_wgmma_mn_major(BASE + qs_panel_mn_major_at(step), rows);
        cr_assert_eq(qs_wgmma_further(begin, qs_panel_mn_major_at(step)), d);
        for (int mn = 0; mn < cols; mn++) {
            for (int k = 0; k < QS_WGMMA_K; k++) {
                cr_assert_eq(qs_wgmma_byte(d, true, mn, k),
                             stored_at(rows, step * QS_WGMMA_K + k, mn),
                             "%d x %d, step %d: column %d k %d", rows, cols, step, mn, k);
            }
        }
    }
}

Test(core_wgmma, descriptors_read_what_was_stored)
{
    for (int rows = 64; rows <= MOST_ROWS; rows += 64) {
        for (int cols = 64; cols <= MOST_COLS; cols += 64) {
            for (int first = 0; first < rows; first += QS_WGMMA_ROWS) {
                check_k_major(rows, cols, first);
            }
            check_mn_major(rows, cols);
        }
    }
}

/* The fields, as PTX has them: address, distances, 128-byte swizzle. */
Test(core_wgmma, a_descriptor_is_what_the_hardware_wants)
{
    cr_assert_eq(qs_wgmma_k_major(0x400), UINT64_C(0x4000004000010040));
    cr_assert_eq(qs_wgmma_mn_major(0x2c000, 128), UINT64_C(0x4000004004002c00));
}
