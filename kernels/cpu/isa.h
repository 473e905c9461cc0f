/* The inner loops, one table per instruction set, from one source (isa_template.h).
 *
 * All tables give the same bits: vectors run along independent outputs, a product-sum is a chain
 * of fused multiply-adds in ascending k, and where a sum must run along the vector it is defined
 * as 16
 * lanes (element i goes to lane i % 16) added as a fixed tree. QSHARD_CPU_ISA=avx512|avx2|portable
 * forces a table. */
#ifndef QS_KERNELS_CPU_ISA_H
#define QS_KERNELS_CPU_ISA_H

#include <stdbool.h>
#include <stdint.h>

#include "base/dtype.h"
#include "base/rng.h"
#include "kernels/ops.h"

enum {
    QS_GEMM_KC =
        256, /* depth of a block of the product-sum; part of the definition of the result */
    QS_GEMM_MR_MAX = 14,
    QS_GEMM_NR_MAX = 32,
};

typedef struct {
    const char *name;
    int mr, nr; /* rows and columns of a register tile */

    /** c[rows, cols] (+)= sum over k < depth of a[k * mr + i] * b[k * nr + j]; rows <= mr, cols <=
     * nr. */
    void (*tile)(int rows, int cols, int64_t depth, const float *a, const float *b, float *c,
                 int64_t c_stride, bool accumulate);

    /** The same of operands that need not be packed: the left one's element (i, k) is at
     * a[i * a_stride + k], or at a[k * a_stride + i] with `a_in_columns`; the right one's (k, j) at
     * b[k * b_stride + j], where nr columns are read. */
    void (*tile_plain)(int rows, int cols, int64_t depth, const float *a, int64_t a_stride,
                       bool a_in_columns, const float *b, int64_t b_stride, float *c,
                       int64_t c_stride, bool accumulate);

    /** dst[k * dst_stride + r] = src[r * src_stride + k] for k < count and r < rows, 0 for rows <=
     * r < lanes. lanes <= 16; nothing beyond dst[(count - 1) * dst_stride + lanes - 1] is
     * written. */
    void (*transpose)(const float *src, int64_t src_stride, int rows, int64_t count, float *dst,
                      int64_t dst_stride, int lanes);

    /** Whole NF4 blocks of 64: out = round(code * absmax[block]) to `dtype`. */
    void (*nf4_decode)(const uint8_t *packed, const float *absmax, int64_t blocks, qs_dtype dtype,
                       float *out);

    /** Widen bf16, f16 or f32 at `src` (any alignment). */
    void (*widen)(const uint8_t *src, qs_dtype dtype, int64_t count, float *out);

    /** Sum of x[i] * y[i], 16 lanes. */
    float (*dot)(const float *x, const float *y, int64_t count);

    /** Sum of (x[i] * y[i]) * z[i], 16 lanes. */
    float (*dot3)(const float *x, const float *y, const float *z, int64_t count);

    /** Largest element; -infinity for none. NaN may be lost: the sum of exponentials keeps it. */
    float (*max)(const float *x, int64_t count);

    /** x[i] = exp(x[i] * scale - shift) in place. \return their sum, 16 lanes. */
    float (*exp_sum)(float *x, int64_t count, float scale, float shift);

    /** x[i] = cap * tanh(x[i] * scale / cap) in place. */
    void (*soft_cap)(float *x, int64_t count, float scale, float cap);

    /** d[i] = (d[i] - delta) * (1 - (capped[i] / cap)^2) in place: the gradient of soft_cap,
     * without its scale. */
    void (*soft_cap_backward)(const float *capped, int64_t count, float delta, float cap, float *d);

    /** ds[i] = p[i] * (ds[i] - delta) * scale in place: the gradient of a softmax. */
    void (*softmax_backward)(const float *p, int64_t count, float delta, float scale, float *ds);

    /** act = glu(gate) * up. */
    void (*glu)(qs_glu glu, const float *gate, const float *up, int64_t count, float *act);

    /** dgate and dup of the above; either may alias dact. */
    void (*glu_backward)(qs_glu glu, const float *gate, const float *up, const float *dact,
                         int64_t count, float *dgate, float *dup);

    /** out[i] = x[i] * keep where the uniform number of element `element` + i is at least p, else
     * 0. */
    void (*dropout)(const qs_rng *rng, uint64_t element, int64_t count, float p, float keep,
                    const float *x, float *out);
} qs_isa;

/** The table in use: the widest that the CPU has, unless forced. */
const qs_isa *qs_isa_get(void);

/** Use the table called `name` from now on (for tests). \return false if there is none or the CPU
 * cannot run it. */
bool qs_isa_force(const char *name);

/** Whether this CPU can run the table called `name`. */
bool qs_isa_runs(const char *name);

/** The tables, NULL where the compiler could not build one. */
const qs_isa *qs_isa_avx512(void);
const qs_isa *qs_isa_avx2(void);
const qs_isa *qs_isa_portable(void);

/** Natural logarithm of a positive finite number by fixed fp64 operations (libm's differs between
 * CPUs). */
double qs_log_fixed(double x);

/** exp(x) as in the tables. */
float qs_exp_fixed(float x);

#endif
