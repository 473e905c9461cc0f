/* The schedule of a product C[m, n] (+)= A[m, k] B[k, n], whatever its numbers are (gemm.c,
 * gemm_fp16.c, gemm_amx.c).
 *
 * Loops after Goto & van de Geijn 2008 (doi:10.1145/1356052.1356053), arranged for micro-batches
 * (m is 50 to 4,000 rows) and for threads that are not equally fast: A is packed once, in panels of
 * mr rows; then a task owns some slivers of nr columns of C for all k, packs its part of B itself,
 * block by block of k, and meets nobody. An element's terms come in ascending k whoever computes
 * it. */
#ifndef QS_KERNELS_CPU_PANELS_H
#define QS_KERNELS_CPU_PANELS_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"
#include "device/device.h"

typedef struct qs_panels qs_panels;

/** Rows [i, i + rows), columns [j, j + cols) and numbers [k0, k0 + depth) along k; i is a panel's
 * first row, j a sliver's first column, k0 a block's first number. */
typedef struct {
    int64_t i, rows, j, cols, k0, depth;
    bool accumulate;
    float *right; /* this part of packed B */
} qs_panels_part;

/** May be called from several threads. */
typedef void qs_panels_function(const qs_panels *p, const qs_panels_part *part);

/** What is a kind of products' own. */
typedef struct {
    int64_t mr, nr, kc;              /* rows of a panel, columns of a sliver, depth of a block */
    int64_t left_panels, left_depth; /* that a task packs of A: panels, numbers along k */
    int64_t step_panels;             /* that are multiplied in one go: a task has no fewer */
    int64_t task_slivers;            /* most of a task */
    int64_t panel_floats;            /* of a packed panel, with all k */
    int64_t sliver_floats;           /* of a packed sliver, one block deep */
    int64_t speed;                   /* multiply-adds in the time of moving a number */

    qs_panels_function *pack_left;  /* rows of A to p->left; this part has no columns. NULL: A is
                                       read where it is */
    qs_panels_function *pack_right; /* columns of B to part->right */
    qs_panels_function *multiply;   /* the part of C (+)= that of A times that of B, both packed */
} qs_panels_kind;

/** One block of rows of a product. */
struct qs_panels {
    const qs_panels_kind *kind;
    const void *ctx; /* the kind's operands */
    qs_queue *queue;
    int64_t row0, m, n, k; /* rows [row0, row0 + m) of A and C */
    float *c;              /* row row0 */
    int64_t c_stride;
    bool accumulate;
    int64_t task_rows, task_cols, row_tasks; /* how it is shared out */
    float *left, *right; /* [panels][panel_floats]; [threads][slivers of a task][sliver_floats] */
};

/** C[m, n] (+)= A B. With k = 0 C is left (accumulate) or zero. */
qs_status qs_panels_multiply(qs_queue *queue, const qs_panels_kind *kind, const void *ctx,
                             int64_t m, int64_t n, int64_t k, float *c, int64_t c_stride,
                             bool accumulate);

/** Most floats that packed A takes, of up to `rows` x `cols` or transposed, in panels of up to `mr`
 * rows with a float for each number. */
int64_t qs_panels_left_most(int64_t rows, int64_t cols, int64_t mr, int64_t step_panels);

/** The panel of row i, where a panel with all k is in one piece. */
float *qs_panels_left(const qs_panels *p, int64_t i);

/** A tile's sums y[mr][cols] to C, the first one to (i, j); those beyond C are left out. Row r is
 * multiplied by factor[r] before (NULL: 1), rounded on its own. */
void qs_panels_store(const qs_panels *p, int64_t i, int64_t j, const float *y, int64_t cols,
                     const float *factor, bool accumulate);

#endif
