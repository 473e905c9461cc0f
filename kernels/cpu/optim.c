/* The optimizer's two passes over this rank's LoRA shard. Memory-bound. */
#include "kernels/cpu/ops_impl.h"
#include "kernels/cpu/parallel.h"
#include "kernels/update_rule.h"

enum { CHUNK = 4096, CHUNKS_PER_TASK = 8, UPDATE_PER_TASK = 8192 };

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
    qs_optim_kind kind;
    qs_update_rule rule;
    int64_t count;
    const float *grad;
    float *master, *m, *v;
} update_call;

/* One loop for each rule: inlined with the rule known, so that it vectorizes. */
static inline __attribute__((always_inline)) void
update_range(const update_call *call, int64_t first, int64_t last,
             void (*one)(const qs_update_rule *, float, float *, float *, float *))
{
    const qs_update_rule rule = call->rule;
    const float *restrict grad = call->grad;
    float *restrict w = call->master, *restrict m = call->m, *restrict v = call->v;
    for (int64_t i = first; i < last; i++) {
        one(&rule, grad[i], &w[i], &m[i], &v[i]);
    }
}

static void update_task(void *ctx, int64_t index, int thread)
{
    (void)thread;
    const update_call *call = ctx;
    const int64_t first = index * UPDATE_PER_TASK;
    const int64_t last = qs_min_i64(first + UPDATE_PER_TASK, call->count);
    switch (call->kind) {
    case QS_OPTIM_ADAMW:
        update_range(call, first, last, qs_update_adamw);
        break;
    case QS_OPTIM_ADAM:
        update_range(call, first, last, qs_update_adam);
        break;
    case QS_OPTIM_SGD:
        update_range(call, first, last, qs_update_sgd);
        break;
    case QS_OPTIM_ADADELTA:
        update_range(call, first, last, qs_update_adadelta);
        break;
    }
}

qs_status qs_cpu_update(qs_queue *q, const qs_update_args *args, int64_t count, const float *grad,
                        float *master, float *m, float *v)
{
    update_call call = {args->kind,
                        qs_update_rule_make(args->lr, args->beta1, args->beta2, args->eps,
                                            args->weight_decay, args->grad_scale,
                                            args->bias_correction1, args->bias_correction2),
                        count,
                        grad,
                        master,
                        m,
                        v};
    qs_parallel_for(q, qs_ceil_div(count, UPDATE_PER_TASK), count * 8, update_task, &call);
    return QS_OK;
}
