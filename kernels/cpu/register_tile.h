/* The register tile, written once for any kind of elements. The including file defines
 *
 *   TILE_MR, TILE_NV, TILE_LANES   rows of the tile, vectors of a row, floats of a vector
 *   vec, and vec_load, vec_store, vec_zero, vec_add
 *                                  a vector of sums; add_one(a, b) of single ones
 *   tile_elem                      what operands are packed as: a float, or a word of two bf16
 *   tile_elems, and tile_load, tile_splat
 *                                  TILE_LANES of them, of the right and of the left operand
 *   tile_fma(left, right, sum)     one step of all sums of a vector
 *
 * and gets tile_packed and tile_plain, as isa.h has them. */

/* Element (i, k) of the left operand is at a[i * a_row + k * a_step]. `rows`, `vectors` and some of
 * the steps are constants at every call below: the sums stay in registers, and of the operands
 * only two pointers move. */
static inline __attribute__((always_inline)) void
tile_fixed(int rows, int vectors, int64_t depth, const tile_elem *a, int64_t a_row, int64_t a_step,
           const tile_elem *b, int64_t b_step, float *c, int64_t c_stride, bool accumulate)
{
    vec sum[TILE_MR][TILE_NV];
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            sum[i][v] = vec_zero();
        }
    }
    for (int64_t k = 0; k < depth; k++) {
        tile_elems right[TILE_NV];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            right[v] = tile_load(b + v * TILE_LANES);
        }
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) {
            tile_elems left = tile_splat(a[i * a_row]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                sum[i][v] = tile_fma(left, right[v], sum[i][v]);
            }
        }
        a += a_step;
        b += b_step;
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            float *to = c + i * c_stride + v * TILE_LANES;
            vec_store(to, accumulate ? vec_add(vec_load(to), sum[i][v]) : sum[i][v]);
        }
    }
}

#define TILE_CASE(r)                                                                               \
    case r:                                                                                        \
        tile_fixed(r <= TILE_MR ? r : TILE_MR, vectors, depth, a, a_row, a_step, b, b_step, c,     \
                   c_stride, accumulate);                                                          \
        break;

static inline __attribute__((always_inline)) void
tile_rows(int rows, int vectors, int64_t depth, const tile_elem *a, int64_t a_row, int64_t a_step,
          const tile_elem *b, int64_t b_step, float *c, int64_t c_stride, bool accumulate)
{
    switch (rows) {
        TILE_CASE(1)
        TILE_CASE(2)
        TILE_CASE(3)
        TILE_CASE(4)
#if TILE_MR > 4
        TILE_CASE(5)
        TILE_CASE(6)
#endif
#if TILE_MR > 6
        TILE_CASE(7)
        TILE_CASE(8)
        TILE_CASE(9)
        TILE_CASE(10)
        TILE_CASE(11)
        TILE_CASE(12)
        TILE_CASE(13)
        TILE_CASE(14)
#endif
    }
}

enum { TILE_COLS = TILE_NV * TILE_LANES };

/* A function of its own for each way in which operands lie, of constant steps where they have any.
 */
#define TILE(name, vectors, a_row, a_step, b_step)                                                 \
    static void name(int rows, int64_t depth, const tile_elem *a, int64_t a_stride,                \
                     const tile_elem *b, int64_t b_stride, float *c, int64_t c_stride,             \
                     bool accumulate)                                                              \
    {                                                                                              \
        (void)a_stride;                                                                            \
        (void)b_stride;                                                                            \
        tile_rows(rows, vectors, depth, a, a_row, a_step, b, b_step, c, c_stride, accumulate);     \
    }
TILE(tile_whole, TILE_NV, 1, TILE_MR, TILE_COLS)
TILE(tile_narrow, 1, 1, TILE_MR, TILE_COLS) /* adapters of rank 16 and less need no more */
TILE(tile_in_rows, TILE_NV, a_stride, 1, b_stride)
TILE(tile_in_rows_narrow, 1, a_stride, 1, b_stride)
TILE(tile_in_columns, TILE_NV, 1, a_stride, b_stride)
TILE(tile_in_columns_narrow, 1, 1, a_stride, b_stride)

typedef void tile_function(int rows, int64_t depth, const tile_elem *a, int64_t a_stride,
                           const tile_elem *b, int64_t b_stride, float *c, int64_t c_stride,
                           bool accumulate);

/* A ragged right edge: the whole tile beside C, then the columns that exist. */
static void tile_edge(tile_function *tile, int rows, int cols, int64_t depth, const tile_elem *a,
                      int64_t a_stride, const tile_elem *b, int64_t b_stride, float *c,
                      int64_t c_stride, bool accumulate)
{
    float whole[TILE_MR * TILE_COLS];
    tile(rows, depth, a, a_stride, b, b_stride, whole, TILE_COLS, false);
    for (int i = 0; i < rows; i++) {
        for (int j = 0; j < cols; j++) {
            float sum = whole[i * TILE_COLS + j];
            c[i * c_stride + j] = accumulate ? add_one(c[i * c_stride + j], sum) : sum;
        }
    }
}

/* Packed operands. */
static void tile_packed(int rows, int cols, int64_t depth, const tile_elem *a, const tile_elem *b,
                        float *c, int64_t c_stride, bool accumulate)
{
    if (cols == TILE_COLS) {
        tile_whole(rows, depth, a, 0, b, 0, c, c_stride, accumulate);
    } else if (cols == TILE_LANES) {
        tile_narrow(rows, depth, a, 0, b, 0, c, c_stride, accumulate);
    } else {
        tile_edge(cols < TILE_LANES ? tile_narrow : tile_whole, rows, cols, depth, a, 0, b, 0, c,
                  c_stride, accumulate);
    }
}

/* Operands that were not packed, at least not both. */
static void tile_plain(int rows, int cols, int64_t depth, const tile_elem *a, int64_t a_stride,
                       bool a_in_columns, const tile_elem *b, int64_t b_stride, float *c,
                       int64_t c_stride, bool accumulate)
{
    tile_function *tile = a_in_columns ? tile_in_columns : tile_in_rows;
    if (cols <= TILE_LANES) {
        tile = a_in_columns ? tile_in_columns_narrow : tile_in_rows_narrow;
    }
    if (cols == TILE_COLS || cols == TILE_LANES) {
        tile(rows, depth, a, a_stride, b, b_stride, c, c_stride, accumulate);
    } else {
        tile_edge(tile, rows, cols, depth, a, a_stride, b, b_stride, c, c_stride, accumulate);
    }
}
