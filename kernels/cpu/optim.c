/* The optimizer's two passes over this rank's LoRA shard. Memory-bound. */
#include <math.h>

#include "kernels/cpu/ops_impl.h"
#include "kernels/cpu/parallel.h"

enum { CHUNK = 4096, CHUNKS_PER_TASK = 8, ADAMW_PER_TASK = 8192 };

typedef struct {
    const float *x;
    double *out;
    int64_t chunks;
} square_args;

/* A chunk is one chain of additions; several chunks together hide its latency. */
static void square_sums_task(void *ctx, int64_t index, int thread)
{
    (void)thread;
    const square_args *args = ctx;
    int64_t first = index * CHUNKS_PER_TASK;
    int64_t here = qs_min_i64(CHUNKS_PER_TASK, args->chunks - first);
    double sum[CHUNKS_PER_TASK] = {0};
    const float *x = args->x + first * CHUNK;
    if (here == CHUNKS_PER_TASK) {
        for (int64_t i = 0; i < CHUNK; i++) {
            for (int64_t c = 0; c < CHUNKS_PER_TASK; c++) {
                double value = (double)x[c * CHUNK + i];
                sum[c] += value * value;
            }
        }
    } else {
        for (int64_t c = 0; c < here; c++) {
            for (int64_t i = 0; i < CHUNK; i++) {
                double value = (double)x[c * CHUNK + i];
                sum[c] += value * value;
            }
        }
    }
    for (int64_t c = 0; c < here; c++) {
        args->out[first + c] = sum[c];
    }
}

qs_status qs_cpu_square_sums(qs_queue *q, const float *x, int64_t chunks, double *out)
{
    square_args args = {x, out, chunks};
    qs_parallel_for(q, qs_ceil_div(chunks, CHUNKS_PER_TASK), chunks * CHUNK, square_sums_task,
                    &args);
    return QS_OK;
}

typedef struct {
    const qs_adamw_args *args;
    int64_t count;
    const float *grad;
    float *master, *m, *v;
} adamw_call;

static void adamw_task(void *ctx, int64_t index, int thread)
{
    (void)thread;
    const adamw_call *call = ctx;
    const qs_adamw_args *a = call->args;
    /* Scalars in fp64, rounded once: in fp32, 1 - 0.999 would already be off by 1e-5. */
    const float decay = (float)(1.0 - a->lr * a->weight_decay);
    const float step = (float)(a->lr / a->bias_correction1);
    const float root2 = (float)sqrt(a->bias_correction2);
    const float beta2 = (float)a->beta2, eps = (float)a->eps, clip = (float)a->grad_scale;
    const float rest1 = (float)(1.0 - a->beta1), rest2 = (float)(1.0 - a->beta2);
    int64_t last = qs_min_i64((index + 1) * ADAMW_PER_TASK, call->count);
    for (int64_t i = index * ADAMW_PER_TASK; i < last; i++) {
        float g = call->grad[i] * clip;
        float m = call->m[i] + rest1 * (g - call->m[i]);
        float v = call->v[i] * beta2 + rest2 * g * g;
        float denominator = sqrtf(v) / root2 + eps;
        call->m[i] = m;
        call->v[i] = v;
        call->master[i] = call->master[i] * decay - step * m / denominator;
    }
}

qs_status qs_cpu_adamw(qs_queue *q, const qs_adamw_args *args, int64_t count, const float *grad,
                       float *master, float *m, float *v)
{
    adamw_call call = {args, count, grad, master, m, v};
    qs_parallel_for(q, qs_ceil_div(count, ADAMW_PER_TASK), count * 8, adamw_task, &call);
    return QS_OK;
}
