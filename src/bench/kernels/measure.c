#include "bench/kernels/measure.h"

#include <stdlib.h>
#include <string.h>

#include "base/timer.h"

enum { BATCHES = 7, CHUNK = 1 << 22, REPEAT_MAX = 1000 };
static const double BATCH_S = 0.02;

qs_status qs_bench_open(qs_bench *b, const qs_plugin *plugin, qs_device *device, const qs_ops *ops,
                        int threads, bool small)
{
    *b = (qs_bench){.plugin = plugin,
                    .device = device,
                    .ops = ops,
                    .small = small,
                    .batches = BATCHES,
                    .sharers = 1,
                    .random = 88172645463325252U};
    return qs_queue_create_on(device, &b->queue, threads);
}

qs_status qs_bench_open_ops(qs_bench *b, const qs_ops_limits *limits)
{
    QS_TRY(b->ops->open(b->queue, limits));
    b->ops_open = true;
    return QS_OK;
}

void qs_bench_close(qs_bench *b)
{
    if (b->queue != NULL) {
        (void)qs_queue_wait(b->queue);
    }
    if (b->ops_open) {
        b->ops->close(b->queue);
    }
    qs_bench_free(b);
    qs_queue_destroy(b->queue);
    *b = (qs_bench){0};
}

/* ---- time ---- */

static int compare(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

void qs_bench_sort(double *values, int64_t count)
{
    qsort(values, (size_t)count, sizeof *values, compare);
}

double qs_bench_quantile(const double *sorted, int64_t count, double q)
{
    const double at = q * (double)(count - 1);
    const int64_t below = (int64_t)at;
    const int64_t above = below + 1 < count ? below + 1 : below;
    return sorted[below] + (at - (double)below) * (sorted[above] - sorted[below]);
}

static qs_status batch(qs_bench *b, qs_bench_call call, void *ctx, int repeat, double *seconds)
{
    const double start = qs_time_s();
    for (int i = 0; i < repeat; i++) {
        QS_TRY(call(b, ctx));
    }
    QS_TRY(qs_queue_wait(b->queue));
    *seconds = (qs_time_s() - start) / repeat;
    return QS_OK;
}

qs_status qs_bench_time(qs_bench *b, qs_bench_call call, void *ctx, qs_bench_times *out)
{
    double times[QS_BENCH_BATCHES_MAX], once = 0;
    QS_TRY(batch(b, call, ctx, 2, &once)); /* plans, code, clocks */
    QS_TRY(batch(b, call, ctx, 1, &once));
    const double wanted = BATCH_S / (once > 1e-7 ? once : 1e-7);
    const int repeat = b->small              ? 1
                       : wanted < 1          ? 1
                       : wanted > REPEAT_MAX ? REPEAT_MAX
                                             : (int)wanted;
    const int n = b->batches;
    for (int i = 0; i < n; i++) {
        QS_TRY(batch(b, call, ctx, repeat, &times[i]));
    }
    qs_bench_sort(times, n);
    *out = (qs_bench_times){.median = times[n / 2], .min = times[0], .max = times[n - 1]};
    return QS_OK;
}

/* ---- memory ---- */

qs_status qs_bench_zeros(qs_bench *b, void **out, size_t bytes)
{
    if (b->n_taken == QS_BENCH_BUFFERS_MAX) {
        return QS_FAIL(QS_ERR_BUG, "more than %d buffers", QS_BENCH_BUFFERS_MAX);
    }
    QS_TRY(qs_device_alloc(b->device, out, bytes, QS_MEM_WORK));
    b->taken[b->n_taken++] = *out;
    return QS_OK;
}

void qs_bench_free(qs_bench *b)
{
    while (b->n_taken > 0) {
        qs_device_free(b->device, b->taken[--b->n_taken]);
    }
}

qs_status qs_bench_upload(qs_bench *b, void **out, const void *host, size_t bytes)
{
    QS_TRY(qs_bench_zeros(b, out, bytes));
    QS_TRY(qs_queue_copy(b->queue, *out, host, bytes));
    return qs_queue_wait(b->queue);
}

qs_status qs_bench_download(qs_bench *b, void **out, const void *device, size_t bytes)
{
    *out = malloc(bytes > 0 ? bytes : 1);
    if (*out == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "memory: %zu bytes for a check cannot be allocated", bytes);
    }
    qs_status st = qs_queue_copy(b->queue, *out, device, bytes);
    st = st == QS_OK ? qs_queue_wait(b->queue) : st;
    if (st != QS_OK) {
        free(*out);
        *out = NULL;
    }
    return st;
}

/* xorshift64*: Vigna 2016, arXiv:1402.6246. */
static uint64_t next(uint64_t *state)
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * 0x2545f4914f6cdd1dU;
}

static void fill(void *chunk, qs_dtype dtype, int64_t count, uint64_t *state)
{
    for (int64_t i = 0; i < count; i++) {
        const uint64_t word = next(state);
        if (dtype == QS_U8) {
            ((uint8_t *)chunk)[i] = (uint8_t)(word >> 56);
        } else {
            const float x = (float)(word >> 40) * 0x1p-23F - 1.0F;
            qs_f32_store((char *)chunk + (size_t)i * qs_dtype_bytes(dtype), dtype, &x, 1);
        }
    }
}

/* The same few million random elements again and again: no cache holds them. */
qs_status qs_bench_random(qs_bench *b, void **out, qs_dtype dtype, int64_t count)
{
    qs_status st = QS_OK;
    const size_t size = qs_dtype_bytes(dtype);
    const int64_t piece = count < CHUNK ? count : CHUNK;
    void *chunk = malloc((size_t)piece * size + 1);
    if (chunk == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "no memory for random numbers");
    }
    fill(chunk, dtype, piece, &b->random);
    QS_GOTO(qs_bench_zeros(b, out, (size_t)count * size));
    for (int64_t at = 0; at < count; at += piece) {
        const int64_t n = count - at < piece ? count - at : piece;
        QS_GOTO(qs_queue_copy(b->queue, (char *)*out + (size_t)at * size, chunk, (size_t)n * size));
    }
    QS_GOTO(qs_queue_wait(b->queue));
done:
    free(chunk);
    return st;
}

qs_status qs_bench_mat(qs_bench *b, qs_mat *out, int64_t rows, int64_t cols, int64_t border)
{
    *out = (qs_mat){NULL, rows, cols, cols + border, b->ops->act_dtype};
    return qs_bench_random(b, &out->data, out->dtype, rows * out->stride);
}
