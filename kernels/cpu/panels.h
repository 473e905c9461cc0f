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

/** What is a kind of products' own. The functions may be called from several threads. */
typedef struct {
    int64_t mr, nr, kc;      /* rows of a panel, columns of a sliver, depth of a block of k */
    int64_t step_panels;     /* that are multiplied in one go: a task has no fewer */
    int64_t task_slivers;    /* most of a task */
    int64_t numbers_a_float; /* of packed A */
    int64_t speed;           /* multiply-adds in the time of moving a number */

    /** Floats that A, and `cols` columns of a block of B, take when they are packed. */
    int64_t (*left_count)(const qs_panels *p);
    int64_t (*right_count)(const qs_panels *p, int64_t cols);

    /** Pack A into p->left, in so many tasks. */
    int64_t (*left_tasks)(const qs_panels *p);
    void (*pack_left)(const qs_panels *p, int64_t task);

    /** Pack columns [j0, j0 + cols) of B, `depth` of its rows from k0 on. */
    void (*pack_right)(const qs_panels *p, int64_t j0, int64_t cols, int64_t k0, int64_t depth,
                       float *right);

    /** C (+)= rows [i, i + rows) of A times what pack_right has packed; i is that of a panel. */
    void (*multiply)(const qs_panels *p, int64_t i, int64_t rows, int64_t j0, int64_t cols,
                     int64_t k0, int64_t depth, const float *right, bool accumulate);
} qs_panels_kind;

/** One block of rows of a product. */
struct qs_panels {
    const qs_panels_kind *kind;
    const void *ctx; /* the kind's operands */
    qs_queue *queue;
    int64_t i0, m, n, k; /* rows [i0, i0 + m) of A and C */
    float *left;
    float *c; /* row i0 */
    int64_t c_stride;
    bool accumulate;
    /* how it is shared out */
    int64_t task_panels, task_cols, row_tasks;
    float *right; /* [threads][right_count] */
};

/** C[m, n] (+)= A B. With k = 0 C is left (accumulate) or zero. */
qs_status qs_panels_multiply(qs_queue *queue, const qs_panels_kind *kind, const void *ctx,
                             int64_t m, int64_t n, int64_t k, float *c, int64_t c_stride,
                             bool accumulate);

/** Most floats that packed A takes, of up to `rows` x `cols` or transposed, in panels of up to `mr`
 * rows. */
int64_t qs_panels_left_most(int64_t rows, int64_t cols, int64_t mr, int64_t step_panels);

/** Panels of the block of rows. */
int64_t qs_panels_count(const qs_panels *p);

#endif
