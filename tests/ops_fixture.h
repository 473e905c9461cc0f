/* What the tests of the kernels share: random matrices, gathered units with a plain second copy of
 * their contents, and central differences in fp64. */
#ifndef QS_TESTS_OPS_FIXTURE_H
#define QS_TESTS_OPS_FIXTURE_H

#include <stdbool.h>
#include <stdint.h>

#include "kernels/ops.h"

/** `count` floats in [-1, 1), the same for the same seed. Free with free. */
float *fx_random(int64_t count, uint64_t seed);

/** A random matrix whose rows lie `pad` elements further apart than they are long; the gap holds
 * NaN, so that reading it shows, and fx_mat_gap_intact tells whether it was written. */
qs_mat fx_mat(int64_t rows, int64_t cols, int64_t pad, uint64_t seed);
bool fx_mat_gap_intact(const qs_mat *mat);
void fx_mat_free(qs_mat *mat);

double fx_at(const qs_mat *mat, int64_t row, int64_t col);

/** An adapter of random A [rank, in] and B [out, rank] (free both) with a scale, and dropout of
 * some step and layer; `sample` and `row_at` are the caller's. */
qs_lora fx_adapter(int rank, int64_t in, int64_t out, float dropout, uint64_t seed);

/** A weight inside a unit that was gathered from `nranks` messages. */
typedef struct {
    qs_weight_kind kind;
    int64_t out, in;
    qs_dtype dtype;
    bool nested;
    int nranks;
    int64_t raw_quantum_elems; /* raw only */
} fx_weight_spec;

typedef struct {
    qs_unit_view view;
    qs_weight weight;
    float *plain; /* [out * in] what the weight is, computed from the bytes before they were cut
                     into messages */
    uint8_t *bytes;
} fx_unit;

/** Random bytes; the tensor starts at quantum 1 of its unit. */
fx_unit fx_unit_create(const fx_weight_spec *spec, uint64_t seed);
void fx_unit_destroy(fx_unit *unit);

/** (f(x + step) - f(x - step)) / 2 step in element `at` of x. */
double fx_difference(double (*f)(const void *ctx), const void *ctx, double *x, int64_t at,
                     double step);

/** fp64 copy of `count` floats. */
double *fx_double(const float *x, int64_t count);

/** A queue with `threads` threads; ends the test on failure. */
qs_queue *fx_queue(int threads);

#endif
