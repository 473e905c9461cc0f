/* What touches every element once: RoPE, gated MLPs, additions. Memory-bound. */
#include "kernels/cpu/ops_impl.h"
#include "kernels/cpu/parallel.h"

/* ---- rotary embedding (Su et al. 2021, arXiv:2104.09864), rotate-half: element i turns with i +
 * rotary_dim / 2 ------ */

typedef struct {
    qs_mat *x;
    int n_heads, head_dim, half;
    const float *cos, *sin;
    const int32_t *position;
    float sign;
    int64_t rows_per_task;
} rope_args;

static void rope_task(void *ctx, int64_t index, int thread)
{
    (void)thread;
    const rope_args *r = ctx;
    int64_t first = index * r->rows_per_task;
    int64_t last = qs_min_i64(first + r->rows_per_task, r->x->rows);
    for (int64_t t = first; t < last; t++) {
        const float *cos = r->cos + (int64_t)r->position[t] * r->half;
        const float *sin = r->sin + (int64_t)r->position[t] * r->half;
        for (int h = 0; h < r->n_heads; h++) {
            float *low = qs_mat_f32(r->x) + t * r->x->stride + (int64_t)h * r->head_dim;
            float *high = low + r->half;
            for (int i = 0; i < r->half; i++) {
                float a = low[i], b = high[i], s = r->sign * sin[i];
                low[i] = a * cos[i] - b * s;
                high[i] = b * cos[i] + a * s;
            }
        }
    }
}

qs_status qs_cpu_rope(qs_queue *q, qs_mat *x, int n_heads, int head_dim, int rotary_dim,
                      const float *cos, const float *sin, const int32_t *position, bool inverse)
{
    rope_args args = {
        x, n_heads, head_dim, rotary_dim / 2, cos, sin, position, inverse ? -1.0F : 1.0F, 0};
    args.rows_per_task = qs_rows_per_task(x->cols);
    qs_parallel_for(q, qs_ceil_div(x->rows, args.rows_per_task), x->rows * x->cols, rope_task,
                    &args);
    return QS_OK;
}

/* ---- gated MLPs (Shazeer 2020, arXiv:2002.05202), addition, scaling: rows of up to five matrices
 * ---- */

typedef struct {
    const qs_isa *isa;
    qs_glu glu;
    float by;
} rows_how;

typedef struct {
    rows_how how;
    const qs_mat *a, *b, *c;
    qs_mat *y, *z;
    int64_t rows_per_task;
    void (*row)(const rows_how *how, const float *a, const float *b, const float *c, int64_t width,
                float *y, float *z);
} rows_args;

static const float *row_of(const qs_mat *mat, int64_t t)
{
    return mat == NULL ? NULL : qs_mat_f32(mat) + t * mat->stride;
}

static void rows_task(void *ctx, int64_t index, int thread)
{
    (void)thread;
    const rows_args *r = ctx;
    int64_t first = index * r->rows_per_task;
    int64_t last = qs_min_i64(first + r->rows_per_task, r->a->rows);
    for (int64_t t = first; t < last; t++) {
        float *z = r->z == NULL ? NULL : qs_mat_f32(r->z) + t * r->z->stride;
        r->row(&r->how, row_of(r->a, t), row_of(r->b, t), row_of(r->c, t), r->a->cols,
               qs_mat_f32(r->y) + t * r->y->stride, z);
    }
}

static qs_status for_rows(qs_queue *q, rows_args *args, int64_t cost)
{
    args->how.isa = qs_isa_get();
    args->rows_per_task = qs_rows_per_task(args->a->cols);
    qs_parallel_for(q, qs_ceil_div(args->a->rows, args->rows_per_task),
                    args->a->rows * args->a->cols * cost, rows_task, args);
    return QS_OK;
}

static void glu_row(const rows_how *how, const float *gate, const float *up, const float *unused,
                    int64_t width, float *act, float *unused_too)
{
    (void)unused;
    (void)unused_too;
    how->isa->glu(how->glu, gate, up, width, act);
}

static void glu_backward_row(const rows_how *how, const float *gate, const float *up,
                             const float *dact, int64_t width, float *dgate, float *dup)
{
    how->isa->glu_backward(how->glu, gate, up, dact, width, dgate, dup);
}

static void add_row(const rows_how *how, const float *a, const float *b, const float *unused,
                    int64_t width, float *y, float *z)
{
    (void)how;
    (void)unused;
    (void)z;
    for (int64_t i = 0; i < width; i++) {
        y[i] = a[i] + b[i];
    }
}

static void scale_row(const rows_how *how, const float *x, const float *unused,
                      const float *unused_too, int64_t width, float *y, float *z)
{
    (void)unused;
    (void)unused_too;
    (void)z;
    for (int64_t i = 0; i < width; i++) {
        y[i] = x[i] * how->by;
    }
}

qs_status qs_cpu_glu_forward(qs_queue *q, qs_glu glu, const qs_mat *gate, const qs_mat *up,
                             qs_mat *act)
{
    rows_args args = {.how = {.glu = glu}, .a = gate, .b = up, .y = act, .row = glu_row};
    return for_rows(q, &args, 2);
}

qs_status qs_cpu_glu_backward(qs_queue *q, qs_glu glu, const qs_mat *gate, const qs_mat *up,
                              const qs_mat *dact, qs_mat *dgate, qs_mat *dup)
{
    rows_args args = {.how = {.glu = glu},
                      .a = gate,
                      .b = up,
                      .c = dact,
                      .y = dgate,
                      .z = dup,
                      .row = glu_backward_row};
    return for_rows(q, &args, 4);
}

qs_status qs_cpu_add(qs_queue *q, const qs_mat *a, const qs_mat *b, qs_mat *y)
{
    rows_args args = {.a = a, .b = b, .y = y, .row = add_row};
    return for_rows(q, &args, 1);
}

qs_status qs_cpu_scale(qs_queue *q, float by, qs_mat *y)
{
    rows_args args = {.how = {.by = by}, .a = y, .y = y, .row = scale_row};
    return for_rows(q, &args, 1);
}

/* ---- flat arrays ---- */

enum { FLAT_PER_TASK = 16384 };

typedef struct {
    float *x;
    const float *y;
    int64_t count;
} accumulate_args;

static void accumulate_task(void *ctx, int64_t index, int thread)
{
    (void)thread;
    const accumulate_args *args = ctx;
    int64_t last = qs_min_i64((index + 1) * FLAT_PER_TASK, args->count);
    for (int64_t i = index * FLAT_PER_TASK; i < last; i++) {
        args->x[i] += args->y[i];
    }
}

qs_status qs_cpu_accumulate(qs_queue *q, float *x, const float *y, int64_t count)
{
    accumulate_args args = {x, y, count};
    qs_parallel_for(q, qs_ceil_div(count, FLAT_PER_TASK), count, accumulate_task, &args);
    return QS_OK;
}
