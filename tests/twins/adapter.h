/* What the twin tests of linears (linear_layer.h) and of LoRA alone share: an adapter on both
 * sides, the size of what was summed, and a comparison with a limit for each element. */
#ifndef QS_TESTS_ADAPTER_H
#define QS_TESTS_ADAPTER_H

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "twin.h"

/** One rounding to bf16 (8 bits of precision: 2^-8 at most), with 2 % for roundings of roundings
 * and for what fp32 sums of a few hundred terms lose. */
#define AD_HALF_ULP (1.02 * TW_BF16)

typedef struct {
    qs_lora device, host;
    float *a, *b; /* rounded to the backend's type */
    int64_t *sample, *row_at;
} adapter;

/** Number `which` of several, whose weights and sites differ. Samples of 5 rows that begin at row 3
 * of the sample, so that nothing is 0 by luck. */
static inline adapter adapter_make_one_of(const tw_backend *b, int64_t rows, int64_t in,
                                          int64_t out, int rank, float dropout, int which)
{
    const uint64_t seed = 31 + 2 * (uint64_t)which;
    adapter ad = {.a = fx_random(rank * in, seed), .b = fx_random(out * rank, seed + 1)};
    const size_t bytes = (size_t)rows * sizeof *ad.sample;
    ad.sample = malloc(bytes + 1);
    ad.row_at = malloc(bytes + 1);
    cr_assert(ad.sample != NULL && ad.row_at != NULL);
    for (int64_t t = 0; t < rows; t++) {
        ad.sample[t] = 1000 + t / 5;
        ad.row_at[t] = 3 + t % 5;
    }
    tw_round(b, ad.a, rank * in);
    tw_round(b, ad.b, out * rank);
    ad.host = (qs_lora){.a = ad.a,
                        .b = ad.b,
                        .rank = rank,
                        .scale = 0.75F,
                        .dropout = dropout,
                        .seed = 42,
                        .step = 7,
                        .site = QS_RNG_DROPOUT + 2 + (uint32_t)which,
                        .layer = 3,
                        .sample = ad.sample,
                        .row_at = ad.row_at};
    ad.device = ad.host;
    ad.device.a = tw_upload_as_act(b, ad.a, rank * in);
    ad.device.b = tw_upload_as_act(b, ad.b, out * rank);
    ad.device.sample = tw_upload(b, ad.sample, bytes);
    ad.device.row_at = tw_upload(b, ad.row_at, bytes);
    return ad;
}

static inline adapter adapter_make(const tw_backend *b, int64_t rows, int64_t in, int64_t out,
                                   int rank, float dropout)
{
    return adapter_make_one_of(b, rows, in, out, rank, dropout, 0);
}

static inline void adapter_free(const tw_backend *b, adapter *ad)
{
    tw_free(b, (void *)(uintptr_t)ad->device.a);
    tw_free(b, (void *)(uintptr_t)ad->device.b);
    tw_free(b, (void *)(uintptr_t)ad->device.sample);
    tw_free(b, (void *)(uintptr_t)ad->device.row_at);
    free(ad->a);
    free(ad->b);
    free(ad->sample);
    free(ad->row_at);
}

/** drop(x) [rows, in], contiguous, by the definition. */
static inline float *adapter_dropped(const adapter *ad, const qs_mat *x)
{
    float *out = malloc((size_t)(x->rows * x->cols + 1) * sizeof *out);
    cr_assert_not_null(out);
    for (int64_t t = 0; t < x->rows; t++) {
        const qs_rng rng = qs_rng_make(ad->host.seed, ad->host.step, (uint64_t)ad->sample[t],
                                       ad->host.site, ad->host.layer);
        for (int64_t i = 0; i < x->cols; i++) {
            const float value = qs_mat_f32(x)[t * x->stride + i];
            const uint64_t element = (uint64_t)(ad->row_at[t] * x->cols + i);
            const bool keep =
                ad->host.dropout == 0.0F || qs_rng_uniform(&rng, element) >= ad->host.dropout;
            out[t * x->cols + i] = keep ? value / (1.0F - ad->host.dropout) : 0.0F;
        }
    }
    return out;
}

/** A factor of a product of magnitudes: element (i, j) at data[i * row + j * col]. */
typedef struct {
    const float *data;
    int64_t row, col;
} ad_factor;

/** A matrix as a factor; the same transposed. */
static inline ad_factor ad_of(const tw_mat *mat)
{
    return (ad_factor){mat->host.data, mat->host.stride, 1};
}

static inline ad_factor ad_transposed(ad_factor f)
{
    return (ad_factor){f.data, f.col, f.row};
}

/** limit[i * n + j] += times * sum over k of |a[i][k]| |b[k][j]|: what rounding a's or b's elements
 * can change in a product. */
static inline void ad_add_products(double *limit, int64_t m, int64_t n, int64_t k, ad_factor a,
                                   ad_factor b, double times)
{
    for (int64_t i = 0; i < m; i++) {
        for (int64_t j = 0; j < n; j++) {
            double sum = 0.0;
            for (int64_t l = 0; l < k; l++) {
                sum += fabs((double)a.data[i * a.row + l * a.col]) *
                       fabs((double)b.data[l * b.row + j * b.col]);
            }
            limit[i * n + j] += times * sum;
        }
    }
}

/** limit[i] += times * |x[i]|, x [rows, cols] with a stride. */
static inline void ad_add_values(double *limit, const qs_mat *x, double times)
{
    for (int64_t t = 0; t < x->rows; t++) {
        for (int64_t i = 0; i < x->cols; i++) {
            limit[t * x->cols + i] += times * fabs((double)qs_mat_f32(x)[t * x->stride + i]);
        }
    }
}

/** Add to the limit of sum = product + start what rounding the product alone can change. Some of
 * cuBLASLt's kernels round it to the type of the result before the start (bias, residual, what was
 * accumulated so far) is added, as PyTorch's separate operations do, others add in fp32. `start`
 * [rows * cols]; NULL: nothing was added, the rounding is the result's own. For bf16 results. */
static inline void ad_add_rounded_product(double *limit, const qs_mat *sum, const float *start)
{
    for (int64_t i = 0; start != NULL && i < sum->rows * sum->cols; i++) {
        const float whole = qs_mat_f32(sum)[i / sum->cols * sum->stride + i % sum->cols];
        limit[i] += AD_HALF_ULP * fabs((double)whole - (double)start[i]);
    }
}

/** The same for a start that was itself rounded to bf16 (bias + residual); NULL: there was none. */
static inline void ad_add_rounded_start(double *limit, const float *start, int64_t count)
{
    for (int64_t i = 0; start != NULL && i < count; i++) {
        limit[i] += AD_HALF_ULP * fabs((double)start[i]);
    }
}

/** Roundings that the size of an adapter's part adds to in y or dx of a linear, on the longest way:
 * of xa (or s dy B), of the part as a product of its own, of the sum that it is added to and, with
 * a `start`, of the frozen product in that sum. */
static inline int ad_part_roundings(const float *start)
{
    return start != NULL ? 4 : 3;
}

static inline float *ad_zeros(int64_t count)
{
    float *out = calloc((size_t)count + 1, sizeof *out);
    cr_assert_not_null(out);
    return out;
}

static inline double *ad_limits(int64_t count)
{
    double *limit = calloc((size_t)count + 1, sizeof *limit);
    cr_assert_not_null(limit);
    return limit;
}

/** |got - want| <= limit for each element; on the CPU backend the same bits. `want` contiguous. */
static inline void ad_assert_within(const tw_backend *b, const float *got, const float *want,
                                    const double *limit, int64_t count, const char *what)
{
    for (int64_t i = 0; i < count; i++) {
        const double off = fabs((double)got[i] - (double)want[i]);
        const bool same = memcmp(&got[i], &want[i], sizeof *got) == 0;
        cr_assert(tw_is_cpu(b) ? same : isfinite(got[i]) && off <= limit[i] + 1e-30,
                  "%s on %s: element %lld of %lld is %.9g, not %.9g (off by %.3g, limit %.3g)",
                  what, b->name, (long long)i, (long long)count, (double)got[i], (double)want[i],
                  off, limit[i]);
    }
}

/** The rows of a host matrix without their gaps. */
static inline float *ad_compact(const qs_mat *mat)
{
    float *out = malloc((size_t)(mat->rows * mat->cols + 1) * sizeof *out);
    cr_assert_not_null(out);
    for (int64_t t = 0; t < mat->rows; t++) {
        memcpy(out + t * mat->cols, qs_mat_f32(mat) + t * mat->stride,
               (size_t)mat->cols * sizeof *out);
    }
    return out;
}

/** The values of a host matrix, rounded to the backend's type, on the device: overwrites it all,
 * gaps included. */
static inline void ad_upload_again(const tw_backend *b, tw_mat *mat)
{
    const int64_t count = mat->host.rows * mat->host.stride;
    void *bytes = malloc((size_t)count * qs_dtype_bytes(mat->device.dtype) + 1);
    cr_assert_not_null(bytes);
    qs_f32_store(bytes, mat->device.dtype, mat->host.data, count);
    cr_assert_eq(qs_queue_copy(b->queue, mat->device.data, bytes,
                               (size_t)count * qs_dtype_bytes(mat->device.dtype)),
                 QS_OK);
    cr_assert_eq(qs_queue_wait(b->queue), QS_OK);
    free(bytes);
}

/** What the operations of one linear [out, in] are opened with. */
static inline qs_ops_limits ad_limits_of(int64_t rows, int64_t out, int64_t in, int rank,
                                         bool dropout)
{
    return (qs_ops_limits){.threads = 2,
                           .tokens = rows,
                           .documents = 1,
                           .loss_rows = 1,
                           .widest = in > out ? in : out,
                           .n_heads = 1,
                           .n_kv_heads = 1,
                           .head_dim = 8,
                           .dropout = dropout,
                           .lora_rank = rank,
                           .n_linears = 1,
                           .out = {out},
                           .in = {in},
                           .hidden = 8,
                           .head_rows = 8};
}

#endif
