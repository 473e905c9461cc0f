/* Where a warpgroup's products (wgmma, sm_90a) find their operands in shared memory.
 *
 * A tile of `rows` rows lies in panels of 64 columns, bf16: within a panel a row is 128 bytes, and
 * its eight chunks of 16 bytes are exchanged, so that the same chunk of eight rows lies in
 * different banks (the hardware's 128-byte swizzle):
 *
 *     chunk c of row r    at byte (c / 8 * rows + r) * 128 + ((c % 8) ^ (r % 8)) * 16
 *
 * A tile begins at a multiple of 1024 bytes and has a multiple of eight rows. Both readings of it
 * take the same bytes: rows along k ("k-major": Q and K in Q K^T) and columns along k ("mn-major",
 * transposed: V in P V). What the hardware reads is told by a descriptor of 64 bits, in units of
 * 16 bytes (PTX ISA, "Matrix descriptor"). */
#ifndef QS_KERNELS_CUDA_CORE_WGMMA_H
#define QS_KERNELS_CUDA_CORE_WGMMA_H

#include "kernels/cuda/core/hd.h"

enum {
    QS_PANEL_COLS = 64,
    QS_PANEL_ALIGNMENT = 1024, /* of a tile, in bytes */
    QS_WGMMA_ROWS = 64,        /* of a warpgroup's product */
    QS_WGMMA_K = 16,
};

/** Where chunk `chunk` (16 bytes, eight columns) of row `row` of a tile of `rows` rows lies, in
 * chunks. */
QS_HD int qs_panel_chunk(int rows, int row, int chunk)
{
    return (chunk / 8 * rows + row) * 8 + ((chunk & 7) ^ (row & 7));
}

/** Bytes from a tile's first to the 16 columns `step` of rows [row, ...), row a multiple of 8:
 * where an operand that has k along its rows begins. */
QS_HD uint32_t qs_panel_k_major_at(int rows, int row, int step)
{
    return (uint32_t)((step / 4 * rows + row) * 128 + step % 4 * 32);
}

/** Bytes from a tile's first to its rows [16 step, ...): where an operand that has k down its rows
 * begins. */
QS_HD uint32_t qs_panel_mn_major_at(int step)
{
    return (uint32_t)(step * QS_WGMMA_K * 128);
}

/** A descriptor: the address in shared memory, then the distance of panels (mn-major alone) and of
 * groups of eight rows, all in bytes; 128-byte swizzle. */
QS_HD uint64_t qs_wgmma_descriptor(uint32_t address, uint32_t panel_bytes, uint32_t group_bytes)
{
    return (uint64_t)((address & 0x3ffff) >> 4) | (uint64_t)((panel_bytes & 0x3ffff) >> 4) << 16 |
           (uint64_t)((group_bytes & 0x3ffff) >> 4) << 32 | (uint64_t)1 << 62;
}

QS_HD uint64_t qs_wgmma_k_major(uint32_t address)
{
    return qs_wgmma_descriptor(address, 16, 8 * 128);
}

/** `rows` of the tile: its panels are so many times 128 bytes apart. */
QS_HD uint64_t qs_wgmma_mn_major(uint32_t address, int rows)
{
    return qs_wgmma_descriptor(address, (uint32_t)rows * 128, 8 * 128);
}

/** The descriptor of what lies `bytes` (a multiple of 16) further on, in the same 256 KB: one
 * addition. A new one is five instructions that wait for each other, about as long as a product. */
QS_HD uint64_t qs_wgmma_further(uint64_t descriptor, uint32_t bytes)
{
    return (descriptor >> 32 << 32) | (uint64_t)((uint32_t)descriptor + (bytes >> 4));
}

/** What the hardware makes of a descriptor: the byte of element (mn, k), 0 <= k < 16, of a k-major
 * or an mn-major operand. The exchange of chunks goes by the bits of the address itself. */
QS_HD uint32_t qs_wgmma_byte(uint64_t descriptor, bool mn_major, int mn, int k)
{
    const uint32_t address = (uint32_t)(descriptor & 0x3fff) << 4;
    const uint32_t panel = (uint32_t)(descriptor >> 16 & 0x3fff) << 4;
    const uint32_t group = (uint32_t)(descriptor >> 32 & 0x3fff) << 4;
    const int row = mn_major ? k : mn, col = mn_major ? mn : k;
    const uint32_t at = address + (uint32_t)(col / QS_PANEL_COLS) * panel +
                        (uint32_t)(row / 8) * group + (uint32_t)(row % 8) * 128 +
                        (uint32_t)(col % QS_PANEL_COLS) * 2;
    return at ^ (at >> 7 & 7) << 4;
}

#endif
