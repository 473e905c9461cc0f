/* The optimizer's passes against their CPU twins: equal bits on every backend, because the norm,
 * the slot tree and the weights of a run must not depend on where it runs. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "twin.h"

#define COUNT_OF(array) (sizeof(array) / sizeof *(array))

enum { CHUNK = 4096 };

/* Floats from denormal to huge, so that the order of a sum shows. */
static float *wide(int64_t count, uint64_t seed)
{
    float *x = fx_random(count, seed), *exponent = fx_random(count, seed + 1000);
    for (int64_t i = 0; i < count; i++) {
        x[i] = ldexpf(x[i], (int)(exponent[i] * (i % 7 == 0 ? 120.0F : 12.0F)));
    }
    free(exponent);
    return x;
}

/* ---- sums of squares ---- */

static void square_sums_of(const tw_backend *b, int64_t chunks, int64_t shift)
{
    const int64_t count = chunks * CHUNK;
    float *x = wide(count + shift, 31);
    double *want = malloc((size_t)(chunks + 1) * sizeof *want);
    double *filled = malloc((size_t)(chunks + 1) * sizeof *filled);
    for (int64_t c = 0; c <= chunks; c++) {
        want[c] = filled[c] = -1.0;
    }
    for (int64_t c = 0; c < chunks; c++) {
        double sum = 0.0;
        for (int64_t i = 0; i < CHUNK; i++) {
            const double value = (double)x[shift + c * CHUNK + i];
            sum += value * value;
        }
        want[c] = sum;
    }
    float *x_device = tw_upload(b, x, (size_t)(count + shift) * sizeof *x);
    double *out = tw_upload(b, filled, (size_t)(chunks + 1) * sizeof *out);
    tw_ok(b, b->ops->square_sums(b->queue, x_device + shift, chunks, out));
    double *got = tw_read(b, out, (size_t)(chunks + 1) * sizeof *got);
    for (int64_t c = 0; c <= chunks; c++) { /* the last is nobody's */
        cr_assert_eq(memcmp(&got[c], &want[c], sizeof *got), 0,
                     "%s: chunk %lld of %lld: %a, not %a", b->name, (long long)c, (long long)chunks,
                     got[c], want[c]);
    }
    free(got);
    free(filled);
    free(want);
    free(x);
    tw_free(b, x_device);
    tw_free(b, out);
}

static void square_sums_counts(const tw_backend *b)
{
    const int64_t chunks[] = {0, 1, 2, 31, 32, 33, 65};
    for (size_t k = 0; k < COUNT_OF(chunks); k++) {
        square_sums_of(b, chunks[k], 0);
    }
    square_sums_of(b, 3, 1);
}

Test(twin_optim, square_sums_add_in_element_order)
{
    tw_on_backends(square_sums_counts);
}

/* ---- element by element ---- */

/* Counts at, below and past a vector, a block, and two; and addresses off a vector. */
static const struct {
    int64_t count, shift;
} FLAT[] = {{0, 0},   {1, 0},    {7, 0},    {8, 0},    {9, 0},    {33, 0},   {255, 0}, {256, 0},
            {257, 0}, {1000, 0}, {2048, 0}, {2049, 0}, {5003, 0}, {1000, 1}, {9, 3},   {1, 2}};

static void assert_bits(const tw_backend *b, const float *device, const float *want, int64_t count,
                        const char *what)
{
    float *got = tw_read(b, device, (size_t)count * sizeof *got);
    for (int64_t i = 0; i < count; i++) {
        cr_assert_eq(memcmp(&got[i], &want[i], sizeof *got), 0,
                     "%s on %s: element %lld of %lld is %a, not %a", what, b->name, (long long)i,
                     (long long)count, (double)got[i], (double)want[i]);
    }
    free(got);
}

static void accumulate_counts(const tw_backend *b)
{
    for (size_t k = 0; k < COUNT_OF(FLAT); k++) {
        const int64_t count = FLAT[k].count, shift = FLAT[k].shift, all = count + shift + 1;
        float *x = wide(all, 32), *y = wide(all, 33);
        float *x_device = tw_upload(b, x, (size_t)all * sizeof *x);
        float *y_device = tw_upload(b, y, (size_t)all * sizeof *y);
        tw_ok(b, b->ops->accumulate(b->queue, x_device + shift, y_device + shift, count));
        tw_ok(b, qs_ops_cpu()->accumulate(b->cpu_queue, x + shift, y + shift, count));
        assert_bits(b, x_device, x, all, "accumulate");
        free(x);
        free(y);
        tw_free(b, x_device);
        tw_free(b, y_device);
    }
}

Test(twin_optim, accumulate_has_the_cpus_bits)
{
    tw_on_backends(accumulate_counts);
}

enum { GRAD, MASTER, M, V, ARRAYS };

static void update_of(const tw_backend *b, qs_optim_kind kind, int64_t count, int64_t shift,
                      double weight_decay)
{
    enum { STEPS = 4 };
    const int64_t all = count + shift + 1;
    float *host[ARRAYS], *device[ARRAYS];
    for (int a = 0; a < ARRAYS; a++) {
        host[a] = wide(all, 34 + (uint64_t)a);
        for (int64_t i = 0; i < all; i++) {
            const bool moment = a == M || a == V; /* zero at the start */
            host[a][i] = moment || (a == GRAD && i % 13 == 0) ? 0.0F : host[a][i];
        }
        device[a] = tw_upload(b, host[a], (size_t)all * sizeof(float));
    }
    for (int step = 1; step <= STEPS; step++) {
        const qs_update_args args = {.kind = kind,
                                     .lr = 2e-4 * step,
                                     .beta1 = 0.9,
                                     .beta2 = 0.999,
                                     .eps = 1e-8,
                                     .weight_decay = weight_decay,
                                     .grad_scale = step == 2 ? 0.37 : 1.0,
                                     .bias_correction1 = 1.0 - pow(0.9, step),
                                     .bias_correction2 = 1.0 - pow(0.999, step)};
        tw_ok(b, b->ops->update(b->queue, &args, count, device[GRAD] + shift,
                                device[MASTER] + shift, device[M] + shift, device[V] + shift));
        tw_ok(b, qs_ops_cpu()->update(b->cpu_queue, &args, count, host[GRAD] + shift,
                                      host[MASTER] + shift, host[M] + shift, host[V] + shift));
    }
    const char *const names[ARRAYS] = {"gradient", "master", "m", "v"};
    for (int a = 0; a < ARRAYS; a++) {
        assert_bits(b, device[a], host[a], all, names[a]);
        free(host[a]);
        tw_free(b, device[a]);
    }
}

static void update_counts(const tw_backend *b)
{
    for (int kind = QS_OPTIM_ADAMW; kind <= QS_OPTIM_ADADELTA; kind++) {
        for (size_t k = 0; k < COUNT_OF(FLAT); k++) {
            update_of(b, (qs_optim_kind)kind, FLAT[k].count, FLAT[k].shift, 0.0);
            update_of(b, (qs_optim_kind)kind, FLAT[k].count, FLAT[k].shift, 0.01);
        }
    }
}

Test(twin_optim, every_update_rule_has_the_cpus_bits)
{
    tw_on_backends(update_counts);
}
