/* The head and its loss in one pass over the vocabulary, without its T x V logits: attention of X
 * over keys = values = W (online softmax: Milakov & Gimelshein 2018, arXiv:1805.02867). A chunk of
 * the vocabulary is taken SLICE rows at a time:
 *
 *     l = X W^T;   m' = max(m, max l);   p = exp(l - m');   sum = sum exp(m - m') + sum p;
 *     O = O exp(m - m') + p W
 *
 * With a cap l = cap tanh(X W^T / cap), and W counts in O times the slope 1 - (l / cap)^2. */
#include <math.h>
#include <string.h>

#include "kernels/cpu/ops_impl.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/scratch.h"

enum { SLICE = 512, ROWS_PER_TASK = 16 };

typedef struct {
    const qs_isa *isa;
    qs_head_state *state;
    const qs_unit_view *unit;
    const qs_weight *w;
    float *logits;        /* [rows, SLICE] */
    int64_t token, count; /* token ids of the slice */
    int64_t row0;         /* token id of the chunk's first row */
} slice_args;

static void start_row(qs_head_state *s, int64_t r)
{
    s->max[r] = -INFINITY;
    s->sum[r] = 0.0F;
    s->target_logit[r] = 0.0F;
    if (s->o != NULL) {
        memset(s->o + r * s->hidden, 0, (size_t)s->hidden * sizeof *s->o);
    }
}

/* The logits of a row to capped ones, with their slopes. */
static void cap_row(const slice_args *c, float *logits, float *slope)
{
    c->isa->soft_cap(logits, c->count, 1.0F, c->state->cap);
    for (int64_t i = 0; i < c->count; i++) {
        slope[i] = 1.0F;
    }
    c->isa->soft_cap_backward(logits, c->count, 0.0F, c->state->cap, slope);
}

static void multiply(float *x, const float *by, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        x[i] *= by[i];
    }
}

/* The target's logit and its row of W, times `slope` [slice] if there is one. */
static void take_target(const slice_args *c, int64_t r, int64_t target, const float *slope)
{
    qs_head_state *s = c->state;
    s->target_logit[r] = c->logits[r * SLICE + target];
    if (s->w_target == NULL) {
        return;
    }
    float *w = s->w_target + r * s->hidden;
    qs_weight_decode_fast(c->isa, c->unit, c->w, (s->target[r] - c->row0) * s->hidden, s->hidden,
                          w);
    for (int64_t i = 0; i < s->hidden && slope != NULL; i++) {
        w[i] *= slope[target];
    }
}

static void slice_row(const slice_args *c, int64_t r)
{
    qs_head_state *s = c->state;
    float *logits = c->logits + r * SLICE;
    const bool capped = s->cap > 0.0F;
    float slope[SLICE];
    int64_t target = s->target[r] - c->token;
    if (capped) {
        cap_row(c, logits, slope);
    }
    if (target >= 0 && target < c->count) {
        take_target(c, r, target, capped ? slope : NULL);
    }
    float most = c->isa->max(logits, c->count), before = s->max[r];
    if (most > before) {
        float by = before - most;
        c->isa->exp_sum(&by, 1, 1.0F, 0.0F);
        s->max[r] = most;
        s->sum[r] *= by;
        if (s->o != NULL) {
            float *o = s->o + r * s->hidden;
            for (int64_t i = 0; i < s->hidden; i++) {
                o[i] *= by;
            }
        }
    }
    s->sum[r] += c->isa->exp_sum(logits, c->count, 1.0F, s->max[r]);
    if (capped) {
        multiply(logits, slope, c->count);
    }
}

static void slice_task(void *ctx, int64_t index, int thread)
{
    (void)thread;
    const slice_args *c = ctx;
    int64_t last = qs_min_i64((index + 1) * ROWS_PER_TASK, c->state->rows);
    for (int64_t r = index * ROWS_PER_TASK; r < last; r++) {
        if (c->token == 0) {
            start_row(c->state, r);
        }
        slice_row(c, r);
    }
}

int64_t qs_head_scratch_count(int64_t loss_rows)
{
    return loss_rows * SLICE;
}

qs_status qs_cpu_head_chunk(qs_queue *q, const qs_unit_view *unit, const qs_weight *w, int64_t row0,
                            qs_head_state *state)
{
    slice_args c = {.isa = qs_isa_get(), .state = state, .unit = unit, .w = w, .row0 = row0};
    int64_t rows = state->rows, hidden = state->hidden;
    if (rows == 0) {
        return QS_OK;
    }
    QS_TRY(qs_scratch(QS_SCRATCH_HEAD, qs_head_scratch_count(rows), &c.logits));
    qs_operand x = {.data = state->x, .stride = hidden};
    qs_operand p = {.data = c.logits, .stride = SLICE};
    for (int64_t first = 0; first < w->out; first += SLICE) {
        c.token = row0 + first;
        c.count = qs_min_i64(SLICE, w->out - first);
        qs_weight_source slice = {unit, w, c.isa, first};
        qs_operand keys = qs_weight_operand(&slice, true);
        qs_operand values = qs_weight_operand(&slice, false);
        QS_TRY(qs_gemm(q, rows, c.count, hidden, &x, &keys, c.logits, SLICE, false));
        qs_parallel_for(q, qs_ceil_div(rows, ROWS_PER_TASK), rows * (c.count * 4 + hidden),
                        slice_task, &c);
        if (state->o != NULL) {
            QS_TRY(qs_gemm(q, rows, hidden, c.count, &p, &values, state->o, hidden, true));
        }
    }
    return QS_OK;
}

typedef struct {
    qs_head_state *state;
    float scale;
    float *loss, *dx;
} finish_args;

static void finish_task(void *ctx, int64_t index, int thread)
{
    (void)thread;
    const finish_args *f = ctx;
    const qs_head_state *s = f->state;
    int64_t last = qs_min_i64((index + 1) * ROWS_PER_TASK, s->rows);
    for (int64_t r = index * ROWS_PER_TASK; r < last; r++) {
        double log_sum = (double)s->max[r] + qs_log_fixed((double)s->sum[r]);
        f->loss[r] = (float)(log_sum - (double)s->target_logit[r]);
        if (s->o == NULL || f->dx == NULL) {
            continue;
        }
        const float *o = s->o + r * s->hidden, *w = s->w_target + r * s->hidden;
        float *dx = f->dx + r * s->hidden;
        float inverse = 1.0F / s->sum[r];
        for (int64_t i = 0; i < s->hidden; i++) {
            dx[i] = (o[i] * inverse - w[i]) * f->scale;
        }
    }
}

qs_status qs_cpu_head_finish(qs_queue *q, qs_head_state *state, float scale, float *loss, void *dx)
{
    finish_args args = {state, scale, loss, dx};
    qs_parallel_for(q, qs_ceil_div(state->rows, ROWS_PER_TASK), state->rows * state->hidden,
                    finish_task, &args);
    return QS_OK;
}
