#include "twin.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "backend/plugin.h"

/* ---- which backends there are ---- */

static void add_backend(tw_backend *b, const char *name, qs_device *device, const qs_ops *ops)
{
    *b = (tw_backend){.device = device, .ops = ops};
    snprintf(b->name, sizeof b->name, "%s", name);
    cr_assert_eq(qs_queue_create_on(device, &b->queue, 2), QS_OK, "%s: %s", name, qs_error_text());
    cr_assert_eq(qs_queue_create(&b->cpu_queue, 2), QS_OK);
}

static bool is_wanted(const char *name)
{
    const char *only = getenv("QSHARD_TWIN");
    return only == NULL || *only == '\0' || strcmp(only, name) == 0;
}

/* A plugin that was built must load; one that was not built is no error, and neither is a missing
 * GPU. */
static bool add_plugin(tw_backend *b, const char *name)
{
    char path[1024], why[1024] = "";
    const char *folder = getenv("QSHARD_BINARY_DIR");
    snprintf(path, sizeof path, "%s/libqshard_%s.so", folder != NULL ? folder : ".", name);
    if (!is_wanted(name) || access(path, F_OK) != 0) {
        return false;
    }
    const qs_plugin *plugin = qs_plugin_load(path, why, sizeof why);
    cr_assert_not_null(plugin, "%s", why);
    if (plugin->probe(why, sizeof why) < 1) {
        cr_assert_str_neq(name, "emulated", "%s", why);
        printf("%s: not here: %s\n", name, why);
        return false;
    }
    qs_device *device = NULL;
    cr_assert_eq(plugin->device_open(&device, 0), QS_OK, "%s: %s", name, qs_error_text());
    add_backend(b, name, device, plugin->ops());
    b->plugin = plugin;
    return true;
}

int tw_backends(tw_backend out[TW_BACKENDS_MAX])
{
    int count = 0;
    if (is_wanted("cpu")) {
        add_backend(&out[count++], "cpu", qs_device_cpu(), qs_ops_cpu());
    }
    count += add_plugin(&out[count], "emulated") ? 1 : 0;
    count += add_plugin(&out[count], "cuda") ? 1 : 0;
    return count;
}

void tw_backends_close(tw_backend *backends, int count)
{
    for (int i = 0; i < count; i++) {
        qs_queue_destroy(backends[i].queue);
        qs_queue_destroy(backends[i].cpu_queue);
        qs_device_close(backends[i].device);
    }
}

bool tw_is_cpu(const tw_backend *b)
{
    return qs_device_is_host(b->device);
}

void tw_open(const tw_backend *b, const qs_ops_limits *limits)
{
    cr_assert_eq(b->ops->open(b->queue, limits), QS_OK, "%s: %s", b->name, qs_error_text());
}

void tw_each_backend(void (*body)(const tw_backend *b))
{
    tw_backend backends[TW_BACKENDS_MAX];
    const int count = tw_backends(backends);
    for (int i = 0; i < count; i++) {
        body(&backends[i]);
    }
    tw_backends_close(backends, count);
}

void tw_on_backends(void (*body)(const tw_backend *b))
{
    tw_backend backends[TW_BACKENDS_MAX];
    const int count = tw_backends(backends);
    const qs_ops_limits limits = {.threads = 2,
                                  .tokens = 64,
                                  .documents = 4,
                                  .loss_rows = 8,
                                  .widest = 64,
                                  .n_heads = 1,
                                  .n_kv_heads = 1,
                                  .head_dim = 64,
                                  .hidden = 64,
                                  .head_rows = 64};
    for (int i = 0; i < count; i++) {
        tw_open(&backends[i], &limits);
        body(&backends[i]);
        backends[i].ops->close(backends[i].queue);
    }
    tw_backends_close(backends, count);
}

void tw_ok(const tw_backend *b, qs_status status)
{
    cr_assert_eq(status, QS_OK, "%s: %s", b->name, qs_error_text());
}

/* ---- memory ---- */

static void *host_bytes(size_t bytes)
{
    void *out = malloc(bytes > 0 ? bytes : 1);
    cr_assert_not_null(out);
    return out;
}

void *tw_upload(const tw_backend *b, const void *host, size_t bytes)
{
    void *device = NULL;
    cr_assert_eq(qs_device_alloc(b->device, &device, bytes, QS_MEM_WORK), QS_OK, "%s: %s", b->name,
                 qs_error_text());
    cr_assert_eq(qs_queue_copy(b->queue, device, host, bytes), QS_OK, "%s: %s", b->name,
                 qs_error_text());
    cr_assert_eq(qs_queue_wait(b->queue), QS_OK, "%s: %s", b->name, qs_error_text());
    return device;
}

void *tw_read(const tw_backend *b, const void *device, size_t bytes)
{
    void *host = host_bytes(bytes);
    cr_assert_eq(qs_queue_copy(b->queue, host, device, bytes), QS_OK, "%s: %s", b->name,
                 qs_error_text());
    cr_assert_eq(qs_queue_wait(b->queue), QS_OK, "%s: %s", b->name, qs_error_text());
    return host;
}

void tw_free(const tw_backend *b, void *device)
{
    qs_device_free(b->device, device);
}

void tw_round(const tw_backend *b, float *x, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        x[i] = qs_f32_round(x[i], b->ops->act_dtype);
    }
}

void *tw_upload_as(const tw_backend *b, qs_dtype dtype, const float *x, int64_t count)
{
    const size_t bytes = (size_t)count * qs_dtype_bytes(dtype);
    void *host = host_bytes(bytes);
    qs_f32_store(host, dtype, x, count);
    void *device = tw_upload(b, host, bytes);
    free(host);
    return device;
}

void *tw_upload_as_act(const tw_backend *b, const float *x, int64_t count)
{
    return tw_upload_as(b, b->ops->act_dtype, x, count);
}

/* ---- matrices ---- */

tw_mat tw_mat_make_as(const tw_backend *b, qs_dtype dtype, int64_t rows, int64_t cols, int64_t pad,
                      float scale, uint64_t seed)
{
    tw_mat mat = {.host = fx_mat(rows, cols, pad, seed)};
    const int64_t count = rows * mat.host.stride;
    float *x = qs_mat_f32(&mat.host);
    for (int64_t i = 0; i < count; i++) { /* a NaN in a gap stays one */
        x[i] = qs_f32_round(x[i] * scale, dtype);
    }
    mat.device = mat.host;
    mat.device.dtype = dtype;
    mat.device.data = tw_upload_as(b, dtype, x, count);
    return mat;
}

tw_mat tw_mat_make(const tw_backend *b, int64_t rows, int64_t cols, int64_t pad, float scale,
                   uint64_t seed)
{
    return tw_mat_make_as(b, b->ops->act_dtype, rows, cols, pad, scale, seed);
}

void tw_mat_free(const tw_backend *b, tw_mat *mat)
{
    tw_free(b, mat->device.data);
    fx_mat_free(&mat->host);
    *mat = (tw_mat){0};
}

/* The whole of it as floats, gaps and all. */
static float *read_rows(const tw_backend *b, const qs_mat *mat)
{
    const int64_t count = mat->rows * mat->stride;
    void *raw = tw_read(b, mat->data, (size_t)count * qs_dtype_bytes(mat->dtype));
    float *x = host_bytes((size_t)count * sizeof *x);
    qs_f32_load(x, raw, mat->dtype, count);
    free(raw);
    return x;
}

float *tw_mat_read(const tw_backend *b, const qs_mat *device)
{
    float *x = read_rows(b, device);
    for (int64_t row = 0; row < device->rows; row++) {
        memmove(x + row * device->cols, x + row * device->stride, (size_t)device->cols * sizeof *x);
    }
    return x;
}

bool tw_gap_intact(const tw_backend *b, const qs_mat *device)
{
    qs_mat host = *device;
    host.dtype = QS_F32;
    host.data = read_rows(b, device);
    const bool intact = fx_mat_gap_intact(&host);
    free(host.data);
    return intact;
}

/* ---- units ---- */

tw_unit tw_unit_make(const tw_backend *b, const fx_weight_spec *spec, uint64_t seed)
{
    tw_unit unit = {.host = fx_unit_create(spec, seed)};
    const qs_unit_layout *layout = &unit.host.view.layout;
    unit.view = unit.host.view;
    unit.view.base =
        tw_upload(b, unit.host.view.base, layout->message_bytes * (size_t)layout->nranks);
    unit.weight = unit.host.weight;
    if (unit.weight.map != NULL) {
        unit.weight.map = tw_upload(b, unit.weight.map, 256 * sizeof(float));
    }
    return unit;
}

void tw_unit_free(const tw_backend *b, tw_unit *unit)
{
    tw_free(b, (void *)(uintptr_t)unit->view.base);
    tw_free(b, (void *)(uintptr_t)unit->weight.map);
    fx_unit_destroy(&unit->host);
    *unit = (tw_unit){0};
}

/* ---- comparisons ---- */

static void assert_same_bits(const float *got, const float *want, int64_t count, const char *what)
{
    for (int64_t i = 0; i < count; i++) {
        cr_assert_eq(memcmp(&got[i], &want[i], sizeof *got), 0,
                     "%s: element %lld is %.9g, not %.9g (the same code must give the same bits)",
                     what, (long long)i, (double)got[i], (double)want[i]);
    }
}

void tw_assert_close(const tw_backend *b, const float *got, const float *want, int64_t count,
                     double relative, double absolute, const char *what)
{
    if (tw_is_cpu(b)) {
        assert_same_bits(got, want, count, what);
        return;
    }
    for (int64_t i = 0; i < count; i++) {
        const double difference = fabs((double)got[i] - (double)want[i]);
        const double limit = relative * fabs((double)want[i]) + absolute;
        /* isfinite first: a NaN is below no limit, and an infinite `want` above all */
        cr_assert(isfinite(got[i]) && isfinite(want[i]) && difference <= limit,
                  "%s on %s: element %lld of %lld is %.9g, not %.9g (off by %.3g, limit %.3g)",
                  what, b->name, (long long)i, (long long)count, (double)got[i], (double)want[i],
                  difference, limit);
    }
}

void tw_assert_norm(const tw_backend *b, const float *got, const float *want, int64_t count,
                    double limit, const char *what)
{
    if (tw_is_cpu(b)) {
        assert_same_bits(got, want, count, what);
        return;
    }
    double difference = 0.0, size = 0.0;
    for (int64_t i = 0; i < count; i++) {
        const double d = (double)got[i] - (double)want[i];
        difference += d * d;
        size += (double)want[i] * (double)want[i];
    }
    cr_assert(isfinite(difference) && sqrt(difference) <= limit * sqrt(size),
              "%s on %s: off by %.3g of the norm %.3g, limit %.3g", what, b->name, sqrt(difference),
              sqrt(size), limit);
}
