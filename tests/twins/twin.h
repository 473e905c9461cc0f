/* Twin tests: the same inputs through the operations of a backend and through the CPU's strict
 * table, which is what right means. One test runs on every backend that this machine has: "cpu"
 * (the strict table through the same copies: equal bits), "emulated" (the CUDA kernels run by
 * tests/emulator on the CPU) and "cuda" (a GPU). tw_backends lists them; a test loops.
 *
 * Inputs are made as floats, rounded to the backend's type, and given to both sides, so that what
 * differs is the operation alone. */
#ifndef QS_TESTS_TWIN_H
#define QS_TESTS_TWIN_H

#include <stdbool.h>
#include <stdint.h>

#include "kernels/ops.h"
#include "tests/ops_fixture.h"

typedef struct {
    char name[32];
    qs_device *device;
    const qs_ops *ops;
    qs_queue *queue;                /* of `device` */
    qs_queue *cpu_queue;            /* for the twin */
    const struct qs_plugin *plugin; /* backend/plugin.h; NULL: "cpu" */
} tw_backend;

enum { TW_BACKENDS_MAX = 4 };

/** All backends of this machine, "cpu" first. Ends the test if a plugin that should load does not.
 */
int tw_backends(tw_backend out[TW_BACKENDS_MAX]);
void tw_backends_close(tw_backend *backends, int count);

bool tw_is_cpu(const tw_backend *b);

/** Run `body(b)` on every backend, which opens it itself. */
void tw_each_backend(void (*body)(const tw_backend *b));

/** `check(b, &cases[i])` for every case of an array, on every backend. */
#define TW_CHECK_CASES(check, cases)                                                               \
    do {                                                                                           \
        tw_backend tw_backends_[TW_BACKENDS_MAX];                                                  \
        const int tw_count_ = tw_backends(tw_backends_);                                           \
        for (int tw_i_ = 0; tw_i_ < tw_count_; tw_i_++) {                                          \
            for (size_t tw_c_ = 0; tw_c_ < sizeof(cases) / sizeof *(cases); tw_c_++) {             \
                check(&tw_backends_[tw_i_], &(cases)[tw_c_]);                                      \
            }                                                                                      \
        }                                                                                          \
        tw_backends_close(tw_backends_, tw_count_);                                                \
    } while (0)

/** Run `body(b)` on every backend, opened for small calls: for operations that take nothing from
 * the limits. */
void tw_on_backends(void (*body)(const tw_backend *b));

/** Assert that an operation succeeded, naming the backend. */
void tw_ok(const tw_backend *b, qs_status status);

/** ops->open with `limits` on the backend's queue, asserting success; close with b->ops->close. */
void tw_open(const tw_backend *b, const qs_ops_limits *limits);

/** A matrix on the device and the same values as floats on the host. The gap behind each row holds
 * NaN on both sides. */
typedef struct {
    qs_mat device;
    qs_mat host; /* fp32, the same stride */
} tw_mat;

/** Random in [-scale, scale), rounded to the backend's act_dtype. */
tw_mat tw_mat_make(const tw_backend *b, int64_t rows, int64_t cols, int64_t pad, float scale,
                   uint64_t seed);
/** The same with the type given (fp32 logits, fp16 rows of a table). */
tw_mat tw_mat_make_as(const tw_backend *b, qs_dtype dtype, int64_t rows, int64_t cols, int64_t pad,
                      float scale, uint64_t seed);
void tw_mat_free(const tw_backend *b, tw_mat *mat);

/** The device's matrix as floats [rows * cols], contiguous; waits for the queue. Free with free. */
float *tw_mat_read(const tw_backend *b, const qs_mat *device);

/** True if the device's gaps still hold what tw_mat_make put there. */
bool tw_gap_intact(const tw_backend *b, const qs_mat *device);

/** Copy to / from new device memory; waits for the queue. `tw_read`'s result is freed with free. */
void *tw_upload(const tw_backend *b, const void *host, size_t bytes);
void *tw_read(const tw_backend *b, const void *device, size_t bytes);
void tw_free(const tw_backend *b, void *device);

/** Floats rounded to the backend's act_dtype, in place: for weights of adapters and the like. */
void tw_round(const tw_backend *b, float *x, int64_t count);
/** Rounded floats as the backend stores them, or as `dtype`, on the device. */
void *tw_upload_as_act(const tw_backend *b, const float *x, int64_t count);
void *tw_upload_as(const tw_backend *b, qs_dtype dtype, const float *x, int64_t count);

/** A gathered unit on the device beside its host copy (tests/ops_fixture.h). */
typedef struct {
    fx_unit host;
    qs_unit_view view; /* device */
    qs_weight weight;  /* its map in device memory */
} tw_unit;
tw_unit tw_unit_make(const tw_backend *b, const fx_weight_spec *spec, uint64_t seed);
void tw_unit_free(const tw_backend *b, tw_unit *unit);

/** |got - want| <= relative * |want| + absolute for every element, and both finite. For the CPU
 * backend: equal bits. `what` names the comparison in the message. */
void tw_assert_close(const tw_backend *b, const float *got, const float *want, int64_t count,
                     double relative, double absolute, const char *what);

/** ||got - want|| / ||want|| <= limit (0 on the CPU backend). */
void tw_assert_norm(const tw_backend *b, const float *got, const float *want, int64_t count,
                    double limit, const char *what);

/** Half an ulp of bf16, relative: what rounding a result costs. */
#define TW_BF16 (1.0 / 256)

#endif
