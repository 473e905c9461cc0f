/* RMSNorm, RoPE, gated MLPs, addition, scaling, gather, scatter, copies and conversion against
 * their CPU twins.
 *
 * What is only moved, or computed by the same fp32 operations (RoPE, addition), must have the CPU's
 * bits after one rounding. RMSNorm adds in another order and gates have another exponential: there
 * the fp32 results differ by a few ulp before the same rounding. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/rng.h"
#include "twin.h"

#define COUNT_OF(array) (sizeof(array) / sizeof *(array))

/* One rounding to bf16, of values that themselves differ by what fp32 sums of up to 16,384 terms in
 * two orders do: about sqrt(16384) 2^-24. */
static const double FP32_SLACK = 1e-5;
static const double ONE_ROUNDING = TW_BF16 + 1e-5;

/* Rows and columns below, at and past vectors, warps' and blocks' shares, and the shapes that take
 * the longer plans of RMSNorm, up to the longest rows it takes. Odd columns or an odd pad go
 * element by element. */
typedef struct {
    int64_t rows, cols, pad;
} shape;

static const shape SHAPES[] = {
    {0, 64, 0},    {1, 1, 0},     {5, 7, 0},     {9, 8, 0},     {3, 8, 8},     {4, 9, 3},
    {33, 33, 0},   {40, 64, 0},   {17, 64, 8},   {5, 72, 8},    {130, 128, 0}, {7, 128, 5},
    {3, 255, 1},   {11, 256, 0},  {3, 257, 0},   {2, 264, 8},   {3, 1000, 0},  {2, 2048, 8},
    {2, 2056, 0},  {1, 4104, 0},  {2, 5120, 16}, {1, 8200, 40}, {1, 8193, 0},  {1, 16392, 8},
    {2, 16385, 0}, {2, 32768, 0},
};

/* A part of a matrix that starts `by` columns further right; no part of anything but the view. */
static qs_mat columns_from(const qs_mat *mat, int64_t by)
{
    qs_mat part = *mat;
    part.data = (char *)mat->data + by * (int64_t)qs_dtype_bytes(mat->dtype);
    part.cols -= by;
    return part;
}

/* The device's rows are the host's, rounded once: equal bits. */
static void assert_rounded(const tw_backend *b, const qs_mat *device, const qs_mat *host,
                           const char *what)
{
    float *got = tw_mat_read(b, device);
    for (int64_t t = 0; t < host->rows; t++) {
        for (int64_t i = 0; i < host->cols; i++) {
            const float want = qs_f32_round(qs_mat_f32(host)[t * host->stride + i], device->dtype);
            cr_assert_eq(memcmp(&got[t * host->cols + i], &want, sizeof want), 0,
                         "%s on %s, %lld x %lld: row %lld, column %lld is %.9g, not %.9g", what,
                         b->name, (long long)host->rows, (long long)host->cols, (long long)t,
                         (long long)i, (double)got[t * host->cols + i], (double)want);
        }
    }
    free(got);
    cr_assert(tw_gap_intact(b, device), "%s on %s", what, b->name);
}

static void assert_close(const tw_backend *b, const qs_mat *device, const qs_mat *host,
                         double relative, double absolute, const char *what)
{
    float *got = tw_mat_read(b, device);
    for (int64_t t = 0; t < host->rows; t++) {
        tw_assert_close(b, got + t * host->cols, qs_mat_f32(host) + t * host->stride, host->cols,
                        relative, absolute, what);
    }
    free(got);
    cr_assert(tw_gap_intact(b, device), "%s on %s", what, b->name);
}

/* ---- RMSNorm ---- */

typedef struct {
    shape s;
    tw_mat x, dy, y;
    float *w, *rstd; /* host */
    float *w_device, *rstd_device;
} norm_case;

/* x of the residual stream: of the backend's type, or fp32. */
static norm_case norm_make(const tw_backend *b, qs_dtype stream, shape s)
{
    norm_case n = {.s = s};
    n.x = tw_mat_make_as(b, stream, s.rows, s.cols, s.pad, 3.0F, 1);
    n.dy = tw_mat_make(b, s.rows, s.cols, s.pad, 1.0F, 2);
    n.y = tw_mat_make(b, s.rows, s.cols, s.pad, 2.0F, 3); /* dx of the backward: added to */
    n.w = fx_random(s.cols, 4);
    n.rstd = fx_random(s.rows, 5);
    n.w_device = tw_upload(b, n.w, (size_t)s.cols * sizeof *n.w);
    n.rstd_device = tw_upload(b, n.rstd, (size_t)s.rows * sizeof *n.rstd);
    return n;
}

static void norm_free(const tw_backend *b, norm_case *n)
{
    tw_mat_free(b, &n->x);
    tw_mat_free(b, &n->dy);
    tw_mat_free(b, &n->y);
    tw_free(b, n->w_device);
    tw_free(b, n->rstd_device);
    free(n->w);
    free(n->rstd);
}

/* rstd and y of a row in fp64. */
static double fp64_rstd(const norm_case *n, int64_t t, double eps)
{
    double sum = 0.0;
    for (int64_t i = 0; i < n->s.cols; i++) {
        sum += fx_at(&n->x.host, t, i) * fx_at(&n->x.host, t, i);
    }
    return 1.0 / sqrt(sum / (double)n->s.cols + eps);
}

static void norm_forward_of(const tw_backend *b, qs_dtype stream)
{
    for (size_t k = 0; k < COUNT_OF(SHAPES); k++) {
        norm_case n = norm_make(b, stream, SHAPES[k]);
        tw_ok(b, b->ops->rmsnorm_forward(b->queue, &n.x.device, n.w_device, 1e-5F, n.rstd_device,
                                         &n.y.device));
        tw_ok(b, qs_ops_cpu()->rmsnorm_forward(b->cpu_queue, &n.x.host, n.w, 1e-5F, n.rstd,
                                               &n.y.host));
        assert_close(b, &n.y.device, &n.y.host, ONE_ROUNDING, 0.0, "rmsnorm_forward");
        float *rstd = tw_read(b, n.rstd_device, (size_t)SHAPES[k].rows * sizeof *rstd);
        tw_assert_close(b, rstd, n.rstd, SHAPES[k].rows, FP32_SLACK, 0.0, "rstd");
        float *y = tw_mat_read(b, &n.y.device);
        for (int64_t t = 0; t < SHAPES[k].rows; t++) {
            const double want = fp64_rstd(&n, t, (double)1e-5F);
            cr_assert_leq(fabs((double)rstd[t] - want), FP32_SLACK * want, "rstd against fp64");
            for (int64_t i = 0; i < SHAPES[k].cols; i++) {
                const double exact = fx_at(&n.x.host, t, i) * want * (double)n.w[i];
                cr_assert_leq(fabs((double)y[t * SHAPES[k].cols + i] - exact),
                              ONE_ROUNDING * fabs(exact), "y against fp64");
            }
        }
        free(y);
        free(rstd);
        norm_free(b, &n);
    }
}

static void norm_forward_shapes(const tw_backend *b)
{
    norm_forward_of(b, b->ops->act_dtype);
    norm_forward_of(b, QS_F32);
}

Test(twin_rows, rmsnorm_forward)
{
    tw_on_backends(norm_forward_shapes);
}

static void norm_backward_of(const tw_backend *b, qs_dtype stream)
{
    for (size_t k = 0; k < COUNT_OF(SHAPES); k++) {
        norm_case n = norm_make(b, stream, SHAPES[k]);
        tw_ok(b, b->ops->rmsnorm_backward(b->queue, &n.dy.device, &n.x.device, n.w_device,
                                          n.rstd_device, &n.y.device));
        tw_ok(b, qs_ops_cpu()->rmsnorm_backward(b->cpu_queue, &n.dy.host, &n.x.host, n.w, n.rstd,
                                                &n.y.host));
        /* terms of up to 3 x 3 cancel: their fp32 rest is absolute */
        assert_close(b, &n.y.device, &n.y.host, ONE_ROUNDING, 9 * FP32_SLACK, "rmsnorm_backward");
        norm_free(b, &n);
    }
}

static void norm_backward_shapes(const tw_backend *b)
{
    norm_backward_of(b, b->ops->act_dtype);
    norm_backward_of(b, QS_F32);
}

Test(twin_rows, rmsnorm_backward)
{
    tw_on_backends(norm_backward_shapes);
}

/* The same values at another stride or address, in another number of rows, again: the same bits. */
static void norm_bits_of(const tw_backend *b, qs_dtype stream, int64_t cols)
{
    enum { ROWS = 9 };
    const qs_dtype act = b->ops->act_dtype;
    tw_mat x = tw_mat_make_as(b, stream, ROWS, cols, 0, 1.0F, 6);
    tw_mat dy = tw_mat_make(b, ROWS, cols, 0, 1.0F, 7);
    const int64_t pads[] = {0, 8, 1};
    float *w = fx_random(cols, 8);
    float *w_device = tw_upload(b, w, (size_t)cols * sizeof *w);
    float *first[2] = {NULL, NULL};
    for (size_t k = 0; k < COUNT_OF(pads); k++) {
        const int64_t rows = k == 1 ? ROWS / 2 : ROWS, stride = cols + pads[k];
        tw_mat padded[2], out[2];
        const tw_mat *from[2] = {&x, &dy};
        for (int m = 0; m < 2; m++) {
            const qs_dtype dtype = m == 0 ? stream : act;
            padded[m] = tw_mat_make_as(b, dtype, rows, cols, pads[k], 1.0F, 0);
            for (int64_t t = 0; t < rows; t++) {
                memcpy(qs_mat_f32(&padded[m].host) + t * stride,
                       qs_mat_f32(&from[m]->host) + t * cols, (size_t)cols * sizeof(float));
            }
            tw_free(b, padded[m].device.data);
            padded[m].device.data = tw_upload_as(b, dtype, padded[m].host.data, rows * stride);
            out[m] = tw_mat_make(b, rows, cols, pads[k], 1.0F, 0);
            tw_ok(b, qs_queue_zero(b->queue, out[m].device.data,
                                   (size_t)(rows * stride) * qs_dtype_bytes(act)));
        }
        float *rstd = tw_upload(b, qs_mat_f32(&x.host), (size_t)rows * sizeof *rstd);
        tw_ok(b, b->ops->rmsnorm_forward(b->queue, &padded[0].device, w_device, 1e-6F, rstd,
                                         &out[0].device));
        tw_ok(b, b->ops->rmsnorm_backward(b->queue, &padded[1].device, &padded[0].device, w_device,
                                          rstd, &out[1].device));
        for (int m = 0; m < 2; m++) {
            float *got = tw_mat_read(b, &out[m].device);
            if (first[m] == NULL) {
                first[m] = got;
            } else {
                cr_assert_arr_eq(got, first[m], (size_t)(rows * cols) * sizeof *got,
                                 "%s: %lld columns, pad %lld", b->name, (long long)cols,
                                 (long long)pads[k]);
                free(got);
            }
            tw_mat_free(b, &out[m]);
            tw_mat_free(b, &padded[m]);
        }
        tw_free(b, rstd);
    }
    free(first[0]);
    free(first[1]);
    free(w);
    tw_free(b, w_device);
    tw_mat_free(b, &x);
    tw_mat_free(b, &dy);
}

static void norm_bits(const tw_backend *b)
{
    const int64_t cols[] = {8, 64, 128, 200, 256, 264, 2048, 2056, 4104};
    for (size_t i = 0; i < COUNT_OF(cols); i++) {
        norm_bits_of(b, b->ops->act_dtype, cols[i]);
        norm_bits_of(b, QS_F32, cols[i]);
    }
}

Test(twin_rows, rmsnorm_bits_depend_on_the_row_alone)
{
    tw_on_backends(norm_bits);
}

static void norm_too_wide(const tw_backend *b)
{
    if (tw_is_cpu(b)) {
        return;
    }
    norm_case n = norm_make(b, b->ops->act_dtype, (shape){1, 32769, 0});
    cr_assert_eq(b->ops->rmsnorm_forward(b->queue, &n.x.device, n.w_device, 1e-5F, n.rstd_device,
                                         &n.y.device),
                 QS_ERR_BUG);
    cr_assert(strstr(qs_error_text(), "32769") != NULL, "%s", qs_error_text());
    qs_error_clear();
    norm_free(b, &n);
}

Test(twin_rows, rmsnorm_says_which_rows_are_too_long)
{
    tw_on_backends(norm_too_wide);
}

/* ---- RoPE ---- */

static void rope_of(const tw_backend *b, int64_t rows, int heads, int head_dim, int rotary_dim,
                    int64_t pad, bool inverse)
{
    enum { POSITIONS = 50 };
    const int64_t half = rotary_dim / 2;
    tw_mat x = tw_mat_make(b, rows, (int64_t)heads * head_dim, pad, 2.0F, 9);
    float *cos = fx_random(POSITIONS * half, 10), *sin = fx_random(POSITIONS * half, 11);
    int32_t *position = malloc((size_t)(rows + 1) * sizeof *position);
    for (int64_t t = 0; t < rows; t++) {
        position[t] = (int32_t)((t * 7 + 49) % POSITIONS);
    }
    float *cos_device = tw_upload(b, cos, (size_t)(POSITIONS * half) * sizeof *cos);
    float *sin_device = tw_upload(b, sin, (size_t)(POSITIONS * half) * sizeof *sin);
    int32_t *position_device = tw_upload(b, position, (size_t)rows * sizeof *position);
    tw_ok(b, b->ops->rope(b->queue, &x.device, heads, head_dim, rotary_dim, cos_device, sin_device,
                          position_device, inverse));
    tw_ok(b, qs_ops_cpu()->rope(b->cpu_queue, &x.host, heads, head_dim, rotary_dim, cos, sin,
                                position, inverse));
    assert_rounded(b, &x.device, &x.host, "rope");
    tw_free(b, cos_device);
    tw_free(b, sin_device);
    tw_free(b, position_device);
    free(position);
    free(cos);
    free(sin);
    tw_mat_free(b, &x);
}

static void rope_shapes(const tw_backend *b)
{
    static const struct {
        int64_t rows;
        int heads, head_dim, rotary_dim;
        int64_t pad;
    } cases[] = {{0, 2, 64, 64, 0},    {1, 1, 2, 2, 0},      {7, 3, 16, 16, 0}, {9, 5, 16, 16, 3},
                 {3, 4, 64, 64, 8},    {5, 2, 128, 128, 0},  {2, 3, 80, 80, 0}, {2, 3, 20, 20, 4},
                 {33, 2, 256, 256, 8}, {2, 40, 128, 128, 0}, {3, 9, 96, 96, 0}, {5, 3, 128, 96, 8},
                 {4, 2, 64, 16, 0},    {3, 3, 24, 18, 0},    {2, 2, 20, 16, 0}};
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        rope_of(b, cases[i].rows, cases[i].heads, cases[i].head_dim, cases[i].rotary_dim,
                cases[i].pad, false);
        rope_of(b, cases[i].rows, cases[i].heads, cases[i].head_dim, cases[i].rotary_dim,
                cases[i].pad, true);
    }
}

Test(twin_rows, rope_has_the_cpus_bits_rounded)
{
    tw_on_backends(rope_shapes);
}

/* ---- gated MLPs, addition, scaling ---- */

/* Some gates far out, where the exponential over- and underflows. */
static void spread(const tw_backend *b, tw_mat *mat)
{
    static const float far[] = {0.0F, -0.0F, 20.0F, -20.0F, 88.0F, -88.0F, 1e4F, -1e4F, 1e-30F};
    float *x = qs_mat_f32(&mat->host);
    for (int64_t t = 0; t < mat->host.rows; t++) {
        for (int64_t i = t % 5; i < mat->host.cols; i += 11) {
            x[t * mat->host.stride + i] = far[(size_t)(t + i) % COUNT_OF(far)];
        }
    }
    tw_round(b, x, mat->host.rows * mat->host.stride);
    tw_free(b, mat->device.data);
    mat->device.data = tw_upload_as_act(b, x, mat->host.rows * mat->host.stride);
}

/* A sigmoid is within a few ulp on both sides; below 2^-126 (gates past -87) the CPU's is 0. */
static const double TINY = 1e-30;

static void glu_forward_of(const tw_backend *b, qs_glu glu)
{
    for (size_t k = 0; k < COUNT_OF(SHAPES); k++) {
        const shape s = SHAPES[k];
        tw_mat gate = tw_mat_make(b, s.rows, s.cols, s.pad, 4.0F, 12);
        tw_mat up = tw_mat_make(b, s.rows, s.cols, 2 * s.pad, 4.0F, 13);
        tw_mat act = tw_mat_make(b, s.rows, s.cols, s.pad, 4.0F, 14);
        spread(b, &gate);
        tw_ok(b, b->ops->glu_forward(b->queue, glu, &gate.device, &up.device, &act.device));
        tw_ok(b, qs_ops_cpu()->glu_forward(b->cpu_queue, glu, &gate.host, &up.host, &act.host));
        assert_close(b, &act.device, &act.host, ONE_ROUNDING, TINY, "glu_forward");
        tw_mat_free(b, &gate);
        tw_mat_free(b, &up);
        tw_mat_free(b, &act);
    }
}

static void glu_forward_shapes(const tw_backend *b)
{
    glu_forward_of(b, QS_GLU_SILU);
    glu_forward_of(b, QS_GLU_GELU_TANH);
}

Test(twin_rows, glu_forward)
{
    tw_on_backends(glu_forward_shapes);
}

/* alias 0: outputs of their own; 1: dgate lies where dact does; 2: dup does; 3: dgate and dup where
 * gate and up do. */
static void glu_backward_of(const tw_backend *b, qs_glu glu, shape s, int alias)
{
    tw_mat gate = tw_mat_make(b, s.rows, s.cols, s.pad, 4.0F, 15);
    tw_mat up = tw_mat_make(b, s.rows, s.cols, s.pad, 4.0F, 16);
    tw_mat dact = tw_mat_make(b, s.rows, s.cols, s.pad, 1.0F, 17);
    tw_mat own[2] = {tw_mat_make(b, s.rows, s.cols, s.pad, 1.0F, 18),
                     tw_mat_make(b, s.rows, s.cols, 2 * s.pad, 1.0F, 19)};
    spread(b, &gate);
    tw_mat *dgate = alias == 1 ? &dact : alias == 3 ? &gate : &own[0];
    tw_mat *dup = alias == 2 ? &dact : alias == 3 ? &up : &own[1];
    tw_ok(b, b->ops->glu_backward(b->queue, glu, &gate.device, &up.device, &dact.device,
                                  &dgate->device, &dup->device));
    tw_ok(b, qs_ops_cpu()->glu_backward(b->cpu_queue, glu, &gate.host, &up.host, &dact.host,
                                        &dgate->host, &dup->host));
    /* s + g s (1 - s) cancels near g = -1.28: a few fp32 ulp of 4 s are left, times 4 */
    assert_close(b, &dgate->device, &dgate->host, ONE_ROUNDING, 4e-6, "dgate");
    assert_close(b, &dup->device, &dup->host, ONE_ROUNDING, TINY, "dup");
    tw_mat_free(b, &gate);
    tw_mat_free(b, &up);
    tw_mat_free(b, &dact);
    tw_mat_free(b, &own[0]);
    tw_mat_free(b, &own[1]);
}

static void glu_backward_shapes(const tw_backend *b)
{
    for (size_t k = 0; k < COUNT_OF(SHAPES); k++) {
        for (int alias = 0; alias < 4; alias++) {
            glu_backward_of(b, QS_GLU_SILU, SHAPES[k], alias);
            glu_backward_of(b, QS_GLU_GELU_TANH, SHAPES[k], alias);
        }
    }
}

Test(twin_rows, glu_backward_also_where_its_inputs_lie)
{
    tw_on_backends(glu_backward_shapes);
}

/* y = a + b in a matrix of its own, or where a lies; a and y of the residual stream. */
static void add_of(const tw_backend *b, qs_dtype stream, shape s, bool in_place)
{
    tw_mat from = tw_mat_make_as(b, stream, s.rows, s.cols, s.pad, 1.0F, 20);
    tw_mat other = tw_mat_make(b, s.rows, s.cols, 2 * s.pad, 1.0F, 21);
    tw_mat own = tw_mat_make_as(b, stream, s.rows, s.cols, 3 * s.pad, 1.0F, 22);
    tw_mat *y = in_place ? &from : &own;
    tw_ok(b, b->ops->add(b->queue, &from.device, &other.device, &y->device));
    tw_ok(b, qs_ops_cpu()->add(b->cpu_queue, &from.host, &other.host, &y->host));
    assert_rounded(b, &y->device, &y->host, "add");
    tw_mat_free(b, &from);
    tw_mat_free(b, &other);
    tw_mat_free(b, &own);
}

static void add_shapes(const tw_backend *b)
{
    for (size_t k = 0; k < COUNT_OF(SHAPES); k++) {
        for (int in_place = 0; in_place < 2; in_place++) {
            add_of(b, b->ops->act_dtype, SHAPES[k], in_place);
            add_of(b, QS_F32, SHAPES[k], in_place);
        }
    }
}

Test(twin_rows, add_has_the_cpus_bits_rounded)
{
    tw_on_backends(add_shapes);
}

static void scale_of(const tw_backend *b, qs_dtype stream, shape s)
{
    tw_mat y = tw_mat_make_as(b, stream, s.rows, s.cols, s.pad, 1.0F, 20);
    tw_ok(b, b->ops->scale(b->queue, 33.75F, &y.device));
    tw_ok(b, qs_ops_cpu()->scale(b->cpu_queue, 33.75F, &y.host));
    assert_rounded(b, &y.device, &y.host, "scale");
    tw_mat_free(b, &y);
}

static void scale_shapes(const tw_backend *b)
{
    for (size_t k = 0; k < COUNT_OF(SHAPES); k++) {
        scale_of(b, b->ops->act_dtype, SHAPES[k]);
        scale_of(b, QS_F32, SHAPES[k]);
    }
}

Test(twin_rows, scale_has_the_cpus_bits_rounded)
{
    tw_on_backends(scale_shapes);
}

/* Whole vectors of columns that start anywhere, beside others that must stay: y where b lies, and
 * where a lies, of the residual stream. */
static void add_to_columns_of(const tw_backend *b, qs_dtype stream, bool y_is_a, int64_t x_by,
                              int64_t y_by)
{
    enum { ALL = 40, ADDED = 24 };
    tw_mat x = tw_mat_make(b, 5, ALL, 0, 1.0F, 22);
    tw_mat y = tw_mat_make_as(b, stream, 5, ALL, 0, 1.0F, 23);
    qs_mat x_part = columns_from(&x.device, x_by), x_host = columns_from(&x.host, x_by);
    qs_mat y_part = columns_from(&y.device, y_by), y_host = columns_from(&y.host, y_by);
    x_part.cols = x_host.cols = y_part.cols = y_host.cols = ADDED;
    const qs_mat *first = y_is_a ? &y_part : &x_part, *second = y_is_a ? &x_part : &y_part;
    tw_ok(b, b->ops->add(b->queue, first, second, &y_part));
    tw_ok(b, qs_ops_cpu()->add(b->cpu_queue, &x_host, &y_host, &y_host));
    assert_rounded(b, &y.device, &y.host, "add to columns");
    tw_mat_free(b, &x);
    tw_mat_free(b, &y);
}

static void add_to_columns(const tw_backend *b)
{
    for (int64_t x_by = 0; x_by <= 8; x_by++) {
        for (int64_t y_by = 0; y_by <= 8; y_by++) {
            add_to_columns_of(b, b->ops->act_dtype, false, x_by, y_by);
            add_to_columns_of(b, QS_F32, true, x_by, y_by);
        }
    }
}

Test(twin_rows, columns_may_start_anywhere)
{
    tw_on_backends(add_to_columns);
}

/* ---- gather and scatter ---- */

static void gather_of(const tw_backend *b, qs_dtype dtype, qs_dtype to, shape s)
{
    enum { TABLE = 29 };
    tw_mat x = tw_mat_make_as(b, dtype, TABLE, s.cols, s.pad, 2.0F, 24);
    tw_mat y = tw_mat_make_as(b, to, s.rows, s.cols, 2 * s.pad, 1.0F, 25);
    int32_t *index = malloc((size_t)(s.rows + 1) * sizeof *index);
    for (int64_t i = 0; i < s.rows; i++) {
        index[i] = (int32_t)((i * 17 + 28) % TABLE); /* the last row, repeats, no order */
    }
    int32_t *index_device = tw_upload(b, index, (size_t)s.rows * sizeof *index);
    tw_ok(b, b->ops->gather_rows(b->queue, &x.device, index_device, &y.device));
    tw_ok(b, qs_ops_cpu()->gather_rows(b->cpu_queue, &x.host, index, &y.host));
    assert_rounded(b, &y.device, &y.host, "gather_rows");
    for (int64_t i = 0; i < s.rows; i++) { /* and the CPU's are the table's */
        cr_assert_arr_eq(qs_mat_f32(&y.host) + i * y.host.stride,
                         qs_mat_f32(&x.host) + index[i] * x.host.stride,
                         (size_t)s.cols * sizeof(float));
    }
    tw_free(b, index_device);
    free(index);
    tw_mat_free(b, &x);
    tw_mat_free(b, &y);
}

static void gather_shapes(const tw_backend *b)
{
    const qs_dtype types[] = {QS_F32, QS_BF16, QS_F16};
    for (size_t type = 0; type < COUNT_OF(types); type++) {
        for (size_t k = 0; k < COUNT_OF(SHAPES); k++) {
            gather_of(b, types[type], b->ops->act_dtype, SHAPES[k]);
            gather_of(b, types[type], QS_F32, SHAPES[k]);
        }
    }
}

Test(twin_rows, gather_takes_rows_of_any_type)
{
    tw_on_backends(gather_shapes);
}

/* The CPU's gather reads what is not fp32, too. */
Test(twin_rows, the_cpus_gather_widens_half_types)
{
    const uint16_t table[2][3] = {{0x3c00, 0xc000, 0x0001}, {0x7bff, 0x8000, 0x3555}};
    const int32_t index[3] = {1, 0, 1};
    float out[3][3];
    qs_queue *queue = fx_queue(2);
    const qs_dtype types[] = {QS_F16, QS_BF16};
    for (size_t k = 0; k < COUNT_OF(types); k++) {
        const qs_mat x = {(void *)(uintptr_t)table, 2, 3, 3, types[k]};
        qs_mat y = {out, 3, 3, 3, QS_F32};
        cr_assert_eq(qs_ops_cpu()->gather_rows(queue, &x, index, &y), QS_OK);
        for (int i = 0; i < 3; i++) {
            float want[3];
            qs_f32_load(want, table[index[i]], types[k], 3);
            cr_assert_arr_eq(out[i], want, sizeof want);
        }
    }
    qs_queue_destroy(queue);
}

static void scatter_of(const tw_backend *b, shape s, int every)
{
    int32_t *index = malloc((size_t)(s.rows + 1) * sizeof *index);
    int64_t count = 0;
    for (int64_t row = 0; row < s.rows; row++) {
        if (every > 0 && (row * 5 + 3) % every == 0) {
            index[count++] = (int32_t)row;
        }
    }
    tw_mat x = tw_mat_make(b, count, s.cols, s.pad, 1.0F, 26);
    tw_mat y = tw_mat_make(b, s.rows, s.cols, 2 * s.pad, 1.0F, 27);
    int32_t *index_device = tw_upload(b, index, (size_t)count * sizeof *index);
    tw_ok(b, b->ops->scatter_rows(b->queue, &x.device, index_device, &y.device));
    tw_ok(b, qs_ops_cpu()->scatter_rows(b->cpu_queue, &x.host, index, &y.host));
    assert_rounded(b, &y.device, &y.host, "scatter_rows");
    int64_t at = 0;
    for (int64_t row = 0; row < s.rows; row++) { /* and the CPU's are what the contract says */
        const bool comes = at < count && index[at] == row;
        for (int64_t i = 0; i < s.cols; i++) {
            cr_assert_eq(fx_at(&y.host, row, i), comes ? fx_at(&x.host, at, i) : 0.0);
        }
        at += comes ? 1 : 0;
    }
    tw_free(b, index_device);
    free(index);
    tw_mat_free(b, &x);
    tw_mat_free(b, &y);
}

static void scatter_shapes(const tw_backend *b)
{
    for (size_t k = 0; k < COUNT_OF(SHAPES); k++) {
        for (int every = 0; every <= 3; every++) { /* none, all, half, a third */
            scatter_of(b, SHAPES[k], every);
        }
    }
}

Test(twin_rows, scatter_zeroes_every_other_row)
{
    tw_on_backends(scatter_shapes);
}

/* ---- copies of bytes ---- */

/* Rows at multiples of `grain`, to an address that is `shift` off a good one. */
static void copy_of(const tw_backend *b, bool pinned, size_t row_bytes, int64_t count,
                    int64_t grain, size_t shift)
{
    const size_t base_bytes = 8192, out_bytes = (size_t)count * row_bytes;
    qs_rng rng = qs_rng_make(28, 0, 0, 99, 0);
    uint8_t *base = malloc(base_bytes), *want = malloc(out_bytes + shift + 1);
    for (size_t i = 0; i < base_bytes; i++) {
        base[i] = (uint8_t)(256.0F * qs_rng_uniform(&rng, i));
    }
    int64_t *at = malloc((size_t)(count + 1) * sizeof *at);
    memset(want, 0xEE, out_bytes + shift + 1);
    for (int64_t i = 0; i < count; i++) {
        const int64_t places = ((int64_t)base_bytes - (int64_t)row_bytes) / grain;
        at[i] = (i * 37 + 5) % places * grain;
        memcpy(want + shift + (size_t)i * row_bytes, base + at[i], row_bytes);
    }
    uint8_t *filled = malloc(out_bytes + shift + 1);
    memset(filled, 0xEE, out_bytes + shift + 1);
    uint8_t *out = tw_upload(b, filled, out_bytes + shift + 1);
    int64_t *at_device = tw_upload(b, at, (size_t)count * sizeof *at);
    void *from = NULL;
    if (pinned) {
        tw_ok(b, qs_device_host_alloc(b->device, &from, base_bytes, QS_MEM_WORK));
        memcpy(from, base, base_bytes);
    } else {
        from = tw_upload(b, base, base_bytes);
    }
    tw_ok(b, b->ops->copy_rows(b->queue, from, at_device, count, row_bytes, out + shift));
    uint8_t *got = tw_read(b, out, out_bytes + shift + 1);
    cr_assert_arr_eq(got, want, out_bytes + shift + 1, "%s: %lld rows of %zu bytes, shift %zu",
                     b->name, (long long)count, row_bytes, shift);
    if (pinned) {
        qs_device_host_free(b->device, from);
    } else {
        tw_free(b, from);
    }
    tw_free(b, out);
    tw_free(b, at_device);
    free(got);
    free(filled);
    free(at);
    free(want);
    free(base);
}

static void copy_sizes(const tw_backend *b)
{
    const size_t bytes[] = {0, 1, 2, 3, 4, 7, 8, 16, 17, 31, 32, 34, 64, 100, 256, 4096, 5000};
    const int64_t counts[] = {0, 1, 9, 33};
    for (size_t k = 0; k < COUNT_OF(bytes); k++) {
        for (size_t c = 0; c < COUNT_OF(counts); c++) {
            copy_of(b, false, bytes[k], counts[c], 16, 0);
            copy_of(b, true, bytes[k], counts[c], 16, 0);
            copy_of(b, false, bytes[k], counts[c], 2, 0);
            copy_of(b, true, bytes[k], counts[c], 1, 3);
        }
    }
}

Test(twin_rows, copies_rows_of_bytes_from_any_address)
{
    tw_on_backends(copy_sizes);
}

/* ---- conversion ---- */

/* A NaN must stay one; which, is the instruction's affair. */
static void same_nans(uint16_t *got, const uint16_t *want, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        if (isnan(qs_f32_from_bf16(got[i])) && isnan(qs_f32_from_bf16(want[i]))) {
            got[i] = want[i];
        }
    }
}

static void convert_of(const tw_backend *b, int64_t count, int64_t from, int64_t to)
{
    static const uint32_t odd[] = {0x00000000, 0x80000000, 0x3f808000, 0x3f818000, 0x3f807fff,
                                   0x3f808001, 0x7f800000, 0xff800000, 0x7fc00000, 0x00000001,
                                   0x00008000, 0x7f7fffff, 0x807fffff};
    const size_t size = qs_dtype_bytes(b->ops->act_dtype);
    float *x = fx_random(count + from, 29);
    for (int64_t i = 0; i < count + from; i += 3) {
        memcpy(&x[i], &odd[(size_t)(i / 3) % COUNT_OF(odd)], sizeof *x);
    }
    const size_t bytes = (size_t)(count + to + 1) * size;
    uint8_t *want = malloc(bytes);
    memset(want, 0xEE, bytes);
    float *x_device = tw_upload(b, x, (size_t)(count + from) * sizeof *x);
    uint8_t *out = tw_upload(b, want, bytes);
    tw_ok(b, b->ops->convert(b->queue, x_device + from, count, out + (size_t)to * size));
    qs_f32_store(want + (size_t)to * size, b->ops->act_dtype, x + from, count);
    uint8_t *got = tw_read(b, out, bytes);
    if (size == sizeof(uint16_t)) {
        same_nans((uint16_t *)got, (const uint16_t *)want, bytes / size);
    }
    cr_assert_arr_eq(got, want, bytes, "%s: %lld elements from %lld to %lld", b->name,
                     (long long)count, (long long)from, (long long)to);
    free(got);
    free(want);
    free(x);
    tw_free(b, x_device);
    tw_free(b, out);
}

static void convert_counts(const tw_backend *b)
{
    const int64_t counts[] = {0, 1, 7, 8, 9, 33, 255, 256, 257, 1000, 2047, 2048, 2049, 5000};
    for (size_t k = 0; k < COUNT_OF(counts); k++) {
        convert_of(b, counts[k], 0, 0);
        convert_of(b, counts[k], 1, 0);
        convert_of(b, counts[k], 4, 8);
        convert_of(b, counts[k], 0, 1);
    }
}

Test(twin_rows, convert_rounds_to_nearest_even)
{
    tw_on_backends(convert_counts);
}
