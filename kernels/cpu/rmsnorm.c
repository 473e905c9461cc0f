/* RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467). Memory-bound: one read and one write of a row;
 * sums over a row in 16 lanes. */
#include <math.h>

#include "kernels/cpu/ops_impl.h"
#include "kernels/cpu/parallel.h"

typedef struct {
    const qs_isa *isa;
    const qs_mat *x, *dy;
    const float *w;
    float eps;
    float *rstd;
    const float *rstd_in;
    qs_mat *out;
    int64_t rows_per_task;
} norm_args;

static void forward_task(void *ctx, int64_t index, int thread)
{
    (void)thread;
    const norm_args *n = ctx;
    int64_t width = n->x->cols;
    int64_t first = index * n->rows_per_task;
    int64_t last = qs_min_i64(first + n->rows_per_task, n->x->rows);
    for (int64_t t = first; t < last; t++) {
        const float *x = qs_mat_f32(n->x) + t * n->x->stride;
        float *y = qs_mat_f32(n->out) + t * n->out->stride;
        float mean = n->isa->dot(x, x, width) / (float)width;
        float rstd = 1.0F / sqrtf(mean + n->eps);
        n->rstd[t] = rstd;
        for (int64_t i = 0; i < width; i++) {
            y[i] = x[i] * rstd * n->w[i];
        }
    }
}

/* With g = dy * w and x_hat = x * rstd: dx += rstd * (g - x_hat * mean(g * x_hat)). */
static void backward_task(void *ctx, int64_t index, int thread)
{
    (void)thread;
    const norm_args *n = ctx;
    int64_t width = n->x->cols;
    int64_t first = index * n->rows_per_task;
    int64_t last = qs_min_i64(first + n->rows_per_task, n->x->rows);
    for (int64_t t = first; t < last; t++) {
        const float *x = qs_mat_f32(n->x) + t * n->x->stride;
        const float *dy = qs_mat_f32(n->dy) + t * n->dy->stride;
        float *dx = qs_mat_f32(n->out) + t * n->out->stride;
        float rstd = n->rstd_in[t];
        float sum = n->isa->dot3(dy, n->w, x, width);
        float mean = sum * rstd / (float)width;
        for (int64_t i = 0; i < width; i++) {
            dx[i] += rstd * (dy[i] * n->w[i] - x[i] * rstd * mean);
        }
    }
}

qs_status qs_cpu_rmsnorm_forward(qs_queue *q, const qs_mat *x, const float *w, float eps,
                                 float *rstd, qs_mat *y)
{
    norm_args args = {.isa = qs_isa_get(), .x = x, .w = w, .eps = eps, .rstd = rstd, .out = y};
    args.rows_per_task = qs_rows_per_task(x->cols);
    qs_parallel_for(q, qs_ceil_div(x->rows, args.rows_per_task), x->rows * x->cols, forward_task,
                    &args);
    return QS_OK;
}

qs_status qs_cpu_rmsnorm_backward(qs_queue *q, const qs_mat *dy, const qs_mat *x, const float *w,
                                  const float *rstd, qs_mat *dx)
{
    norm_args args = {.isa = qs_isa_get(), .x = x, .dy = dy, .w = w, .rstd_in = rstd, .out = dx};
    args.rows_per_task = qs_rows_per_task(x->cols);
    qs_parallel_for(q, qs_ceil_div(x->rows, args.rows_per_task), x->rows * x->cols, backward_task,
                    &args);
    return QS_OK;
}
