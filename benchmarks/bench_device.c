#include "bench_device.h"

#include <stdlib.h>
#include <string.h>

#include "base/timer.h"

enum { BATCHES = 7, TAKEN_MAX = 256, CHUNK = 1 << 22 };
static const double BATCH_S = 0.02;

static void *taken[TAKEN_MAX];
static int n_taken;

static int compare(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

qs_status bench_open(bench *b, const char *path, bool small, const char *csv)
{
    char why[1024] = "";
    *b = (bench){.small = small};
    b->plugin = qs_plugin_load(path, why, sizeof why);
    if (b->plugin == NULL || b->plugin->probe(why, sizeof why) < 1) {
        return QS_FAIL(QS_ERR_ENVIRONMENT, "%s", why);
    }
    QS_TRY(b->plugin->device_open(&b->device, 0));
    b->ops = b->plugin->ops();
    QS_TRY(qs_queue_create_on(b->device, &b->queue, 1));
    if (csv != NULL) {
        b->csv = fopen(csv, "w");
        if (b->csv == NULL) {
            return QS_FAIL(QS_ERR_IO, "%s: cannot be written", csv);
        }
        (void)fprintf(b->csv, "name,shape,ms,figure,unit,share,bound\n");
    }
    printf("# %s\n", qs_device_description(b->device));
    return QS_OK;
}

void bench_close(bench *b)
{
    if (b->queue != NULL) {
        (void)qs_queue_wait(b->queue);
        b->ops->close(b->queue);
    }
    bench_free_all(b);
    qs_queue_destroy(b->queue);
    qs_device_close(b->device);
    if (b->csv != NULL && fclose(b->csv) != 0) {
        (void)fprintf(stderr, "the CSV file could not be written\n");
    }
}

/* ---- time ---- */

static qs_status batch(bench *b, bench_call call, void *ctx, int repeat, double *seconds)
{
    const double start = qs_time_s();
    for (int i = 0; i < repeat; i++) {
        QS_TRY(call(b, ctx));
    }
    QS_TRY(qs_queue_wait(b->queue));
    *seconds = (qs_time_s() - start) / repeat;
    return QS_OK;
}

qs_status bench_time(bench *b, bench_call call, void *ctx, double *seconds)
{
    double times[BATCHES], once = 0;
    QS_TRY(batch(b, call, ctx, 2, &once)); /* plans, code, clocks */
    QS_TRY(batch(b, call, ctx, 1, &once));
    const double wanted = BATCH_S / (once > 1e-7 ? once : 1e-7);
    const int repeat = b->small ? 1 : wanted < 1 ? 1 : wanted > 1000 ? 1000 : (int)wanted;
    for (int i = 0; i < BATCHES; i++) {
        QS_TRY(batch(b, call, ctx, repeat, &times[i]));
    }
    qsort(times, BATCHES, sizeof *times, compare);
    *seconds = times[BATCHES / 2];
    return QS_OK;
}

qs_status bench_row(bench *b, const char *name, const char *shape, bench_bound bound, double amount,
                    bench_call call, void *ctx, double *out)
{
    double seconds = 0;
    QS_TRY(bench_time(b, call, ctx, &seconds));
    const double rate = amount / seconds;
    const double ceiling = bound == BENCH_COPY ? b->copy_rate : b->matmul_rate;
    const double figure = bound == BENCH_COPY ? rate * 1e-9 : rate * 1e-12;
    const char *unit = bound == BENCH_COPY ? "GB/s" : "TFLOP/s";
    const char *of = bound == BENCH_COPY ? "copy" : "matmul";
    const double share = ceiling > 0 ? 100 * rate / ceiling : 0;
    printf("%-22s %-30s %10.4f ms %9.2f %-7s %6.1f %% of %s\n", name, shape, seconds * 1e3, figure,
           unit, share, of);
    if (b->csv != NULL) {
        (void)fprintf(b->csv, "%s,%s,%.6f,%.4f,%s,%.2f,%s\n", name, shape, seconds * 1e3, figure,
                      unit, share, of);
    }
    (void)fflush(stdout);
    if (out != NULL) {
        *out = seconds;
    }
    return QS_OK;
}

/* ---- memory ---- */

qs_status bench_zeros(bench *b, void **out, size_t bytes)
{
    if (n_taken == TAKEN_MAX) {
        return QS_FAIL(QS_ERR_BUG, "more than %d buffers", TAKEN_MAX);
    }
    QS_TRY(qs_device_alloc(b->device, out, bytes, QS_MEM_WORK));
    taken[n_taken++] = *out;
    return QS_OK;
}

void bench_free_all(bench *b)
{
    while (n_taken > 0) {
        qs_device_free(b->device, taken[--n_taken]);
    }
}

qs_status bench_upload(bench *b, void **out, const void *host, size_t bytes)
{
    QS_TRY(bench_zeros(b, out, bytes));
    QS_TRY(qs_queue_copy(b->queue, *out, host, bytes));
    return qs_queue_wait(b->queue);
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
qs_status bench_random(bench *b, void **out, qs_dtype dtype, int64_t count)
{
    static uint64_t state = 88172645463325252U;
    qs_status st = QS_OK;
    const size_t size = qs_dtype_bytes(dtype);
    const int64_t piece = count < CHUNK ? count : CHUNK;
    void *chunk = malloc((size_t)piece * size + 1);
    if (chunk == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "no memory for random numbers");
    }
    fill(chunk, dtype, piece, &state);
    QS_GOTO(bench_zeros(b, out, (size_t)count * size));
    for (int64_t at = 0; at < count; at += piece) {
        const int64_t n = count - at < piece ? count - at : piece;
        QS_GOTO(qs_queue_copy(b->queue, (char *)*out + (size_t)at * size, chunk, (size_t)n * size));
    }
    QS_GOTO(qs_queue_wait(b->queue));
done:
    free(chunk);
    return st;
}

qs_status bench_mat(bench *b, qs_mat *out, int64_t rows, int64_t cols, int64_t border)
{
    *out = (qs_mat){NULL, rows, cols, cols + border, b->ops->act_dtype};
    return bench_random(b, &out->data, out->dtype, rows * out->stride);
}

/* ---- bounds ---- */

typedef struct {
    void *to, *from;
    size_t bytes;
} copy_case;

static qs_status copy(bench *b, void *ctx)
{
    const copy_case *c = ctx;
    return qs_queue_copy(b->queue, c->to, c->from, c->bytes);
}

static qs_status matmul(bench *b, void *ctx)
{
    return b->plugin->gemm(b->queue, ctx);
}

qs_status bench_ceilings(bench *b)
{
    const int64_t side = b->small ? 64 : 8192;
    const size_t bytes = b->small ? 1 << 16 : (size_t)1 << 30;
    copy_case c = {.bytes = bytes};
    qs_mat x, w, y;
    double seconds = 0;
    QS_TRY(bench_random(b, &c.from, QS_U8, (int64_t)bytes));
    QS_TRY(bench_zeros(b, &c.to, bytes));
    QS_TRY(bench_time(b, copy, &c, &seconds));
    b->copy_rate = 2.0 * (double)bytes / seconds;

    QS_TRY(bench_mat(b, &x, side, side, 0));
    QS_TRY(bench_mat(b, &w, side, side, 0));
    QS_TRY(bench_mat(b, &y, side, side, 0));
    const qs_gemm_call call = {.m = side,
                               .n = side,
                               .k = side,
                               .alpha = 1.0F,
                               .a = x.data,
                               .b = w.data,
                               .a_stride = side,
                               .b_stride = side,
                               .b_transposed = true,
                               .c = y.data,
                               .c_stride = side,
                               .c_dtype = QS_BF16};
    QS_TRY(bench_time(b, matmul, (void *)&call, &seconds));
    b->matmul_rate = 2.0 * (double)side * (double)side * (double)side / seconds;
    printf("# bounds of this run: copy %.1f GB/s (read + written), matmul of %lld^3 in bf16 %.2f "
           "TFLOP/s\n",
           b->copy_rate * 1e-9, (long long)side, b->matmul_rate * 1e-12);
    if (b->csv != NULL) {
        (void)fprintf(b->csv, "bound copy,%zu B,,%.4f,GB/s,100,copy\n", bytes, b->copy_rate * 1e-9);
        (void)fprintf(b->csv, "bound matmul,%lld^3,,%.4f,TFLOP/s,100,matmul\n", (long long)side,
                      b->matmul_rate * 1e-12);
    }
    bench_free_all(b);
    return QS_OK;
}
