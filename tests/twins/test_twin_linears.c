/* Linears that read the same x, together (linears_lora_*). One product for all or one by one: which
 * way is taken is seen from the borders that are written, and both meet the limits of the single
 * linears (linear_layer.h). dX is rounded once where all is one product, and not once a linear. */
#include "linear_layer.h"

#include <stdio.h>

enum { MOST = QS_OPS_JOINED_MAX, STRANGER = 1 };

/* How a pass is computed on a GPU: as products of their own, with each its border, or as one. */
typedef enum { APART, BORDERED, JOINED } way;

typedef enum { NO_BIAS, BIASES, SOME_BIASES } bias_kind;

/* Where the limits put the weights. SWAPPED: the last two of one matrix in another order; SHIFTED:
 * the stranger and the first one in one matrix, the others in the next. */
typedef enum { OWN_MATRICES, ONE_MATRIX, SWAPPED, SHIFTED } unit_kind;

enum { ALL = QS_OPS_JOINED_MAX };

/* Where everything lies, how many linears a call has, from the first one on, and which way it has
 * to take. */
typedef struct {
    bool opened;
    unit_kind unit;
    bool in_rows;      /* y's and dy's side by side; else each in a matrix of its own */
    int x_pad, dy_pad; /* BORDER: for all, and some behind them that nobody may touch */
    int at_once;
    way forward, backward;
} arrangement;

typedef struct {
    int count;
    int64_t rows, in, out[MOST];
    int rank[MOST], most_rank; /* 0: no adapter */
    float dropout;
    const arrangement *at;
    bias_kind bias;
    dx_kind dx;
} linears_case;

typedef struct {
    const tw_backend *b;
    const linears_case *c;
    tw_unit unit;
    layer_case each[MOST];
    layer part[MOST];
    tw_mat x, dx, work;
    tw_mat y[MOST], dy[MOST]; /* in_rows: the first one is all */
} linears;

/* ---- making them ---- */

static int64_t width_of(const linears *l)
{
    return l->b->ops->border(l->c->most_rank);
}

static int64_t columns_behind(const linears *l, int pad)
{
    enum { BEYOND = 8 };
    return pad == BORDER ? l->c->count * width_of(l) + BEYOND : pad;
}

static tw_mat columns_of(const tw_mat *mat, int64_t col, int64_t cols)
{
    tw_mat part = *mat;
    part.host.cols = part.device.cols = cols;
    part.host.data = qs_mat_f32(&mat->host) + col;
    part.device.data =
        (uint8_t *)mat->device.data + (size_t)col * qs_dtype_bytes(mat->device.dtype);
    return part;
}

/* A row more than is used, so that what begins in the middle of a row can be read whole. */
static tw_mat make_rows(const linears *l, int64_t cols, int pad, uint64_t seed)
{
    tw_mat mat = tw_mat_make(l->b, l->c->rows + 1, cols, columns_behind(l, pad), 1.0F, seed);
    mat.host.rows = mat.device.rows = l->c->rows;
    return mat;
}

/* y's or dy's; `part` gets each one's. */
static void make_results(const linears *l, int pad, uint64_t seed, tw_mat *own, tw_mat *part)
{
    const linears_case *c = l->c;
    int64_t sum = 0;
    for (int i = 0; i < c->count; i++) {
        sum += c->out[i];
    }
    if (c->at->in_rows) {
        own[0] = make_rows(l, sum, pad, seed);
    }
    for (int64_t i = 0, col = 0; i < c->count; col += c->out[i++]) {
        if (!c->at->in_rows) {
            own[i] = make_rows(l, c->out[i], pad, seed + (uint64_t)i);
        }
        part[i] = c->at->in_rows ? columns_of(&own[0], col, c->out[i]) : own[i];
    }
}

static layer_vector make_vector(const tw_backend *b, int64_t count, uint64_t seed)
{
    layer_vector v = {.host = fx_random(count, seed), .count = count};
    v.device = tw_upload(b, v.host, (size_t)count * sizeof *v.host);
    return v;
}

static bool has_bias(const linears_case *c, int i)
{
    return c->bias == BIASES || (c->bias == SOME_BIASES && i == 0);
}

/* Linear i lies in a quantum of its own. */
static void make_part(linears *l, int i)
{
    const linears_case *c = l->c;
    const tw_backend *b = l->b;
    const int64_t count = c->out[i] * c->in;
    const int room = c->rank[i] > 0 ? c->rank[i] : 1;
    layer *p = &l->part[i];
    uint64_t seed = 100 * (uint64_t)(i + 1);
    l->each[i] = (layer_case){.rows = c->rows,
                              .out = c->out[i],
                              .in = c->in,
                              .rank = c->rank[i],
                              .dropout = c->dropout,
                              .bias = has_bias(c, i),
                              .dx = c->dx};
    *p = (layer){.b = b, .c = &l->each[i], .unit = l->unit, .x = l->x};
    p->unit.host.weight.out = p->unit.weight.out = c->out[i];
    p->unit.host.weight.in = p->unit.weight.in = c->in;
    p->unit.host.weight.quantum = p->unit.weight.quantum = 1 + i;
    p->unit.host.plain = malloc((size_t)count * sizeof(float));
    cr_assert_not_null(p->unit.host.plain);
    qs_weight_decode(&l->unit.host.view, &p->unit.host.weight, 0, count, p->unit.host.plain);
    p->ad = adapter_make_one_of(b, c->rows, c->in, c->out[i], room, c->dropout, i);
    p->bias = make_vector(b, c->out[i], seed++);
    p->da = make_vector(b, room * c->in, seed++);
    p->db = make_vector(b, c->out[i] * room, seed++);
    p->xa = tw_mat_make(b, c->rows, room, 3, 1.0F, seed++);
    p->work = tw_mat_make(b, c->rows, room, 0, 1.0F, seed++);
    p->dropped = adapter_dropped(&p->ad, &l->x.host);
    snprintf(p->what, sizeof p->what,
             "linear %d of %d: T %lld in %lld out %lld rank %d of %d p %g opened %d unit %d in "
             "rows %d pads %d %d bias %d dx %d",
             i, c->count, (long long)c->rows, (long long)c->in, (long long)c->out[i], c->rank[i],
             c->most_rank, (double)c->dropout, c->at->opened, (int)c->at->unit, c->at->in_rows,
             c->at->x_pad, c->at->dy_pad, (int)c->bias, (int)c->dx);
}

static void linears_make(linears *l, const tw_backend *b, const linears_case *c)
{
    tw_mat y[MOST], dy[MOST];
    *l = (linears){.b = b, .c = c, .unit = layer_weight(b, NF4, 256, 256)};
    l->x = make_rows(l, c->in, c->at->x_pad, 41);
    l->dx = tw_mat_make(b, c->rows, c->in, 8, 1.0F, 42);
    l->work = tw_mat_make(b, c->rows, 64, 0, 1.0F, 43);
    make_results(l, 8, 50, l->y, y);
    make_results(l, c->at->dy_pad, 60, l->dy, dy);
    for (int i = 0; i < c->count; i++) {
        make_part(l, i);
        l->part[i].y = y[i];
        l->part[i].dy = dy[i];
    }
}

static void linears_free(linears *l)
{
    const tw_backend *b = l->b;
    for (int i = 0; i < l->c->count; i++) {
        layer *p = &l->part[i];
        const layer_vector vectors[] = {p->bias, p->da, p->db};
        for (int v = 0; v < 3; v++) {
            tw_free(b, vectors[v].device);
            free(vectors[v].host);
        }
        tw_mat_free(b, &p->xa);
        tw_mat_free(b, &p->work);
        adapter_free(b, &p->ad);
        free(p->dropped);
        free(p->unit.host.plain);
        if (i == 0 || !l->c->at->in_rows) {
            tw_mat_free(b, &l->y[i]);
            tw_mat_free(b, &l->dy[i]);
        }
    }
    tw_mat_free(b, &l->x);
    tw_mat_free(b, &l->dx);
    tw_mat_free(b, &l->work);
    tw_unit_free(b, &l->unit);
}

/* Behind a stranger that reads another x. Opened twice, the second time with the weights as they
 * lie there; nothing may stay of what the first adapters wrote, of the largest rank on every
 * linear. */
static void linears_open(const linears *l)
{
    const linears_case *c = l->c;
    const tw_backend *b = l->b;
    const int64_t strange = c->at->unit == SHIFTED ? c->in : 40;
    qs_ops_limits limits = ad_limits_of(c->rows, 24, strange, c->most_rank, c->dropout > 0.0F);
    qs_weight w[STRANGER + MOST] = {l->unit.weight};
    qs_lora lora[STRANGER + MOST] = {{0}}, others[STRANGER + MOST] = {{0}};
    adapter other[MOST];
    const int other_rank = c->most_rank > 0 ? c->most_rank : 1;
    w[0].quantum = 4;
    w[0].out = 24;
    w[0].in = strange;
    limits.n_linears = STRANGER + c->count;
    limits.widest = 256;
    for (int i = 0; i < c->count; i++) {
        const int at = STRANGER + (c->at->unit == SWAPPED && i > 0 ? c->count - i : i);
        limits.out[at] = c->out[i];
        limits.in[at] = c->in;
        limits.joined[at] = c->at->unit == SHIFTED ? at != 2 : c->at->unit != OWN_MATRICES && i > 0;
        w[at] = l->part[i].unit.weight;
        lora[at] = c->rank[i] > 0 ? l->part[i].ad.device : (qs_lora){0};
        other[i] = adapter_make_one_of(b, c->rows, c->in, c->out[i], other_rank, 0.0F, 9);
        others[at] = other[i].device;
    }
    tw_open(b, &limits);
    if (c->at->opened) {
        const int count = STRANGER + c->count;
        tw_ok(b, b->ops->unit_open(b->queue, &l->unit.view, w, others, count, 0, false));
        tw_ok(b, b->ops->unit_open(b->queue, &l->unit.view, w, lora, count, 0, true));
    }
    for (int i = 0; i < c->count; i++) {
        adapter_free(b, &other[i]);
    }
}

/* ---- both passes ---- */

/* What the operations are given; `work` is shared on the device, as a model does it. */
static void describe(const linears *l, bool host, bool backward, qs_joined_linear *out)
{
    for (int i = 0; i < l->c->count; i++) {
        const layer *p = &l->part[i];
        const bool adapted = l->c->rank[i] > 0;
        const layer_vector *vectors[] = {&p->bias, &p->da, &p->db};
        float *at[3];
        for (int v = 0; v < 3; v++) {
            at[v] = host ? vectors[v]->host : vectors[v]->device;
        }
        const tw_mat *y = backward ? &p->dy : &p->y;
        const tw_mat work = columns_of(&l->work, 0, p->work.host.cols);
        out[i] = (qs_joined_linear){.w = host ? &p->unit.host.weight : &p->unit.weight,
                                    .bias = has_bias(l->c, i) ? at[0] : NULL,
                                    .y = host ? y->host : y->device};
        if (adapted) {
            out[i].lora = host ? p->ad.host : p->ad.device;
            out[i].xa = host ? p->xa.host : p->xa.device;
            out[i].work = host ? p->work.host : work.device;
            out[i].da = at[1];
            out[i].db = at[2];
        }
    }
}

static void run(const linears *l, bool host)
{
    const linears_case *c = l->c;
    const qs_ops *ops = host ? qs_ops_cpu() : l->b->ops;
    qs_queue *q = host ? l->b->cpu_queue : l->b->queue;
    const qs_unit_view *view = host ? &l->unit.host.view : &l->unit.view;
    const qs_mat *x = host ? &l->x.host : &l->x.device;
    qs_mat dx = host ? l->dx.host : l->dx.device;
    qs_joined_linear joined[MOST];
    for (int i = 0; i < c->count; i += c->at->at_once) {
        const int n = c->count - i < c->at->at_once ? c->count - i : c->at->at_once;
        describe(l, host, false, joined);
        tw_ok(l->b, ops->linears_lora_forward(q, view, joined + i, n, x));
        describe(l, host, true, joined);
        tw_ok(l->b,
              ops->linears_lora_backward(q, view, joined + i, n, x, c->dx == NO_DX ? NULL : &dx,
                                         c->dx == DX_ADD || i > 0));
    }
}

/* ---- comparisons ---- */

/* Contents as they were; behind them so many columns were written, with numbers, and none more. */
static void check_input(const linears *l, const char *name, const tw_mat *mat, int64_t written)
{
    qs_mat all = mat->device;
    all.cols = all.stride;
    float *got = tw_mat_read(l->b, &all);
    for (int64_t t = 0; t < all.rows; t++) {
        const float *row = got + t * all.stride, *host = qs_mat_f32(&mat->host) + t * all.stride;
        cr_assert_arr_eq(row, host, (size_t)mat->host.cols * sizeof *row, "%s: %s was changed",
                         l->part[0].what, name);
        for (int64_t i = mat->host.cols; i < all.stride; i++) {
            cr_assert_eq(isnan(row[i]) == 0, i < mat->host.cols + written,
                         "%s on %s: column %lld of %s, of which %lld and %lld were to be written",
                         l->part[0].what, l->b->name, (long long)i, name, (long long)mat->host.cols,
                         (long long)written);
        }
    }
    free(got);
}

/* The borders that a way writes: of all adapters, or of one. */
static int64_t border_of(const linears *l, way taken)
{
    int64_t adapters = 0;
    for (int i = 0; i < l->c->count; i++) {
        adapters += l->c->rank[i] > 0;
    }
    return tw_is_cpu(l->b) || taken == APART || adapters == 0 ? 0
           : taken == JOINED                                  ? adapters * width_of(l)
                                                              : width_of(l);
}

static void check_borders(const linears *l)
{
    const linears_case *c = l->c;
    check_input(l, "x", &l->x, border_of(l, c->at->forward));
    for (int i = 0; i < (c->at->in_rows ? 1 : c->count); i++) {
        const bool adapted = c->at->in_rows || c->rank[i] > 0;
        check_input(l, "dy", &l->dy[i], adapted ? border_of(l, c->at->backward) : 0);
        cr_assert(tw_gap_intact(l->b, &l->y[i].device), "%s: behind y", l->part[0].what);
    }
    cr_assert(tw_gap_intact(l->b, &l->dx.device), "%s: behind dx", l->part[0].what);
}

/* Everything that a run gave, one behind the other, to compare two runs bit by bit. */
static float *results_of(const linears *l, int64_t *count)
{
    float *all = ad_zeros(1 << 17);
    int64_t at = 0;
    for (int i = -1; i < l->c->count; i++) {
        const layer *p = &l->part[i < 0 ? 0 : i];
        const qs_mat *mats[] = {&p->y.device, &p->xa.device, &l->dx.device};
        for (int k = i < 0 ? 2 : 0; k < (i < 0 ? 3 : 2); k++) {
            float *part = tw_mat_read(l->b, mats[k]);
            memcpy(all + at, part, (size_t)(mats[k]->rows * mats[k]->cols) * sizeof *all);
            at += mats[k]->rows * mats[k]->cols;
            free(part);
        }
        const layer_vector *const vectors[] = {&p->da, &p->db};
        for (int k = 0; i >= 0 && k < 2; k++) {
            float *part = layer_read(p, vectors[k]);
            memcpy(all + at, part, (size_t)vectors[k]->count * sizeof *all);
            at += vectors[k]->count;
            free(part);
        }
    }
    cr_assert_leq(at, 1 << 17);
    *count = at;
    return all;
}

static float *start_of_y(const layer *p)
{
    float *start = p->c->bias ? ad_zeros(p->c->rows * p->c->out) : NULL;
    for (int64_t i = 0; p->c->bias && i < p->c->rows * p->c->out; i++) {
        start[i] = p->bias.host[i % p->c->out];
    }
    return start;
}

/* Roundings of a sum to which `part` is added; `apart`: as a product that may be rounded before. */
static void add_part(double *limit, float *sum, const float *part, int64_t count, bool apart)
{
    for (int64_t i = 0; i < count; i++) {
        sum[i] += part[i];
        limit[i] += AD_HALF_ULP * fabs((double)sum[i]);
        limit[i] += apart ? AD_HALF_ULP * fabs((double)part[i]) : 0.0;
    }
}

/* What each linear adds to dX: its frozen product, and its adapter's. */
typedef struct {
    float *frozen[MOST], *adapter[MOST];
} parts_of_dx;

/* The parts in the order in which they are added. One product without dropout: all at once. With it
 * all frozen ones at once, then each adapter's, which is masked in fp32. Else linear by linear. */
static void add_parts(const linears *l, const parts_of_dx *parts, const float *start, double *limit)
{
    const linears_case *c = l->c;
    const int64_t elems = c->rows * c->in;
    const bool joined = c->at->backward == JOINED, dropout = c->dropout > 0.0F;
    float *sum = ad_zeros(elems), *all = ad_zeros(elems);
    for (int64_t e = 0; e < elems; e++) {
        sum[e] = start != NULL ? start[e] : 0.0F;
        for (int i = 0; i < c->count; i++) {
            all[e] += parts->frozen[i][e] + (dropout ? 0.0F : parts->adapter[i][e]);
        }
    }
    if (joined) {
        add_part(limit, sum, all, elems, start != NULL);
    }
    for (int i = 0; i < c->count; i++) {
        if (!joined) {
            add_part(limit, sum, parts->frozen[i], elems, start != NULL || i > 0);
        }
        if ((!joined || dropout) && c->rank[i] > 0) {
            add_part(limit, sum, parts->adapter[i], elems, !dropout);
        }
    }
    free(sum);
    free(all);
}

/* Besides these roundings, s dY B was rounded. */
static void check_dx(const linears *l, const parts_of_dx *parts, const float *start)
{
    const linears_case *c = l->c;
    double *limit = ad_limits(c->rows * c->in);
    add_parts(l, parts, start, limit);
    for (int i = 0; i < c->count; i++) {
        const layer *p = &l->part[i];
        const double s = (double)p->ad.host.scale / (1.0 - (double)c->dropout);
        ad_add_products(limit, c->rows, c->in, c->out[i], ad_of(&p->dy),
                        (ad_factor){p->unit.host.plain, c->in, 1}, 1e-6);
        ad_add_products(limit, c->rows, c->in, c->rank[i], ad_of(&p->work),
                        (ad_factor){p->ad.a, c->in, 1}, s * AD_HALF_ULP);
    }
    layer_assert_mat(&l->part[0], "dx", &l->dx, limit);
}

/* On the host, into the gradients that are there once more. */
static parts_of_dx find_parts(const linears *l)
{
    const linears_case *c = l->c;
    const qs_ops *ops = qs_ops_cpu();
    const qs_unit_view *view = &l->unit.host.view;
    parts_of_dx parts = {{NULL}, {NULL}};
    qs_joined_linear joined[MOST];
    describe(l, true, true, joined);
    for (int i = 0; i < c->count; i++) {
        const qs_weight *w = joined[i].w;
        parts.frozen[i] = ad_zeros(c->rows * c->in);
        parts.adapter[i] = ad_zeros(c->rows * c->in);
        qs_mat frozen = {parts.frozen[i], c->rows, c->in, c->in, QS_F32};
        qs_mat whole = {parts.adapter[i], c->rows, c->in, c->in, QS_F32};
        tw_ok(l->b, ops->linear_backward(l->b->cpu_queue, view, w, &joined[i].y, &frozen, false));
        tw_ok(l->b, ops->linears_lora_backward(l->b->cpu_queue, view, joined + i, 1, &l->x.host,
                                               &whole, false));
        for (int64_t e = 0; e < c->rows * c->in; e++) {
            parts.adapter[i][e] -= parts.frozen[i][e];
        }
    }
    return parts;
}

static void check_results(const linears *l, const float *dx_start)
{
    const linears_case *c = l->c;
    parts_of_dx parts = find_parts(l);
    for (int i = 0; i < c->count; i++) {
        float *y_start = start_of_y(&l->part[i]);
        layer_check_y(&l->part[i], y_start);
        if (c->rank[i] > 0) {
            layer_check_gradients(&l->part[i]);
        }
        free(y_start);
    }
    if (c->dx != NO_DX) {
        check_dx(l, &parts, dx_start);
    }
    for (int i = 0; i < c->count; i++) {
        free(parts.frozen[i]);
        free(parts.adapter[i]);
    }
}

static void check(const tw_backend *b, const linears_case *c)
{
    linears l;
    int64_t count;
    linears_make(&l, b, c);
    float *dx_start = c->dx == DX_ADD ? ad_compact(&l.dx.host) : NULL;
    linears_open(&l);
    run(&l, false);
    float *first = results_of(&l, &count);
    ad_upload_again(b, &l.dx);
    run(&l, false);
    float *second = results_of(&l, &count);
    cr_assert_arr_eq(first, second, (size_t)count * sizeof *first, "%s: other bits in a second run",
                     l.part[0].what);
    check_borders(&l);
    run(&l, true);
    check_results(&l, dx_start);
    b->ops->unit_close(b->queue);
    b->ops->close(b->queue);
    free(dx_start);
    free(first);
    free(second);
    linears_free(&l);
}

/* ---- tests ---- */

static const arrangement side_by_side = {true,   ONE_MATRIX, true,   BORDER,
                                         BORDER, ALL,        JOINED, JOINED};
static const arrangement side_by_side_without_room = {true, ONE_MATRIX, true,  3,
                                                      5,    ALL,        APART, APART};
static const arrangement own_matrices = {true,   OWN_MATRICES, false,    BORDER,
                                         BORDER, ALL,          BORDERED, BORDERED};

/* q, k and v, and gate and up, with their columns side by side. */
Test(twin_linears, one_product)
{
    static const linears_case cases[] = {
        {3, 21, 88, {64, 16, 24}, {8, 8, 8}, 8, 0.0F, &side_by_side, NO_BIAS, DX},
        {2, 21, 72, {104, 104}, {16, 16}, 16, 0.0F, &side_by_side, NO_BIAS, DX_ADD},
        {3, 1, 8, {8, 16, 8}, {1, 1, 1}, 1, 0.0F, &side_by_side, NO_BIAS, DX},
        {3, 17, 128, {64, 64, 64}, {13, 13, 13}, 13, 0.0F, &side_by_side, BIASES, DX_ADD},
        {3, 17, 64, {40, 8, 16}, {3, 13, 8}, 30, 0.0F, &side_by_side, NO_BIAS, DX},
        {2, 19, 72, {5, 11}, {64, 64}, 64, 0.0F, &side_by_side, BIASES, NO_DX},
        {3, 300, 16, {16, 8, 8}, {4, 4, 4}, 4, 0.0F, &side_by_side, NO_BIAS, DX},
        {1, 21, 88, {64}, {8}, 8, 0.0F, &side_by_side, BIASES, DX_ADD},
    };
    TW_CHECK_CASES(check, cases);
}

/* Adapters on some of the linears, or on none: then nothing needs a border. */
Test(twin_linears, adapters_on_some)
{
    static const arrangement bare = {true, ONE_MATRIX, true, 3, 5, ALL, JOINED, JOINED};
    static const linears_case cases[] = {
        {3, 21, 88, {64, 16, 24}, {8, 0, 8}, 8, 0.0F, &side_by_side, NO_BIAS, DX},
        {3, 21, 88, {64, 16, 24}, {0, 5, 13}, 13, 0.0F, &side_by_side, BIASES, DX_ADD},
        {3, 21, 88, {64, 16, 24}, {0, 0, 8}, 8, 0.0F, &side_by_side, NO_BIAS, DX},
        {2, 21, 88, {64, 16}, {8, 0}, 8, 0.0F, &side_by_side, NO_BIAS, NO_DX},
        {3, 21, 88, {64, 16, 24}, {0, 0, 0}, 8, 0.0F, &bare, BIASES, DX_ADD},
        {3, 21, 88, {64, 16, 24}, {0, 0, 0}, 0, 0.0F, &bare, NO_BIAS, DX},
    };
    TW_CHECK_CASES(check, cases);
}

/* Each adapter has a mask of its own. */
Test(twin_linears, dropout)
{
    static const linears_case cases[] = {
        {3, 23, 88, {64, 16, 24}, {8, 8, 8}, 8, 0.3F, &side_by_side, NO_BIAS, DX},
        {3, 23, 88, {64, 16, 24}, {8, 0, 13}, 16, 0.3F, &side_by_side, BIASES, DX_ADD},
        {2, 23, 72, {40, 40}, {5, 5}, 5, 0.1F, &side_by_side, NO_BIAS, NO_DX},
        {2, 23, 72, {40, 40}, {8, 8}, 8, 0.3F, &side_by_side_without_room, NO_BIAS, DX},
        {2, 23, 72, {40, 40}, {8, 8}, 8, 0.3F, &own_matrices, NO_BIAS, DX_ADD},
    };
    TW_CHECK_CASES(check, cases);
}

/* Too little room behind x or dy; widths that are no whole pieces; a bias here and there; results
 * in matrices of their own; not opened; an adapter larger than the limits say. */
Test(twin_linears, one_by_one_where_they_cannot_join)
{
    static const arrangement x_in_short = {true, ONE_MATRIX, true, 16, BORDER, ALL, APART, JOINED};
    static const arrangement dy_in_short = {true, ONE_MATRIX, true, BORDER, 16, ALL, JOINED, APART};
    static const arrangement up = {true, ONE_MATRIX, true, BORDER, BORDER, ALL, APART, JOINED};
    static const arrangement down = {true, ONE_MATRIX, true, BORDER, BORDER, ALL, JOINED, APART};
    static const arrangement both = {true, ONE_MATRIX, true, BORDER, BORDER, ALL, APART, APART};
    static const arrangement scattered = {true,   ONE_MATRIX, false, BORDER,
                                          BORDER, ALL,        APART, APART};
    static const arrangement closed = {false, ONE_MATRIX, true, BORDER, BORDER, ALL, APART, APART};
    static const linears_case cases[] = {
        {3, 21, 88, {64, 16, 24}, {8, 8, 8}, 8, 0.0F, &x_in_short, NO_BIAS, DX},
        {3, 21, 88, {64, 16, 24}, {8, 8, 8}, 8, 0.0F, &dy_in_short, NO_BIAS, DX},
        {2, 9, 333, {40, 40}, {5, 5}, 5, 0.0F, &up, BIASES, DX_ADD},
        {2, 9, 64, {45, 20}, {5, 5}, 5, 0.0F, &down, NO_BIAS, DX},
        {3, 21, 88, {64, 16, 24}, {8, 8, 8}, 8, 0.0F, &up, SOME_BIASES, DX},
        {3, 21, 88, {64, 16, 24}, {8, 8, 8}, 8, 0.0F, &scattered, NO_BIAS, DX},
        {2, 21, 88, {8, 8}, {8, 8}, 8, 0.0F, &scattered, NO_BIAS, DX_ADD},
        {3, 21, 88, {64, 16, 24}, {8, 8, 8}, 8, 0.0F, &closed, BIASES, DX_ADD},
        {3, 21, 88, {64, 16, 24}, {8, 13, 8}, 8, 0.0F, &both, NO_BIAS, DX},
    };
    TW_CHECK_CASES(check, cases);
}

/* Linears of one matrix in another order, called alone, or not all of them, or some of two
 * matrices; and linears of matrices of their own, whose dy's have no borders where another one's
 * begins. */
Test(twin_linears, parts_of_what_is_joined)
{
    static const arrangement alone = {true, ONE_MATRIX, true, BORDER, BORDER, 1, APART, APART};
    static const arrangement in_pairs = {true, ONE_MATRIX, true, BORDER, BORDER, 2, APART, APART};
    static const arrangement swapped = {true, SWAPPED, true, BORDER, BORDER, ALL, APART, APART};
    static const arrangement shifted = {true, SHIFTED, true, BORDER, BORDER, 2, APART, APART};
    static const arrangement hemmed = {true,   OWN_MATRICES, true,     BORDER,
                                       BORDER, ALL,          BORDERED, APART};
    static const linears_case cases[] = {
        {3, 21, 88, {64, 16, 24}, {8, 8, 8}, 8, 0.0F, &alone, BIASES, DX},
        {3, 21, 88, {64, 16, 24}, {8, 8, 8}, 8, 0.3F, &alone, NO_BIAS, DX},
        {3, 21, 88, {64, 16, 24}, {8, 0, 8}, 8, 0.0F, &in_pairs, NO_BIAS, DX_ADD},
        {3, 21, 88, {64, 16, 16}, {8, 8, 8}, 8, 0.0F, &swapped, NO_BIAS, DX},
        {3, 21, 88, {16, 16, 16}, {8, 8, 8}, 8, 0.0F, &shifted, NO_BIAS, DX},
        {3, 21, 88, {64, 16, 24}, {8, 8, 8}, 8, 0.0F, &own_matrices, NO_BIAS, DX_ADD},
        {3, 21, 88, {64, 16, 24}, {8, 8, 0}, 8, 0.0F, &hemmed, NO_BIAS, DX},
    };
    TW_CHECK_CASES(check, cases);
}

/* ---- calls with little to do, and others' calls ---- */

/* Without rows all gradients are zero. */
static void check_empty(const tw_backend *b, const linears_case *c)
{
    linears l;
    linears_make(&l, b, c);
    linears_open(&l);
    tw_mat *const shared[] = {&l.x, &l.dx, &l.work};
    for (int i = 0; i < 3; i++) {
        shared[i]->device.rows = 0;
    }
    for (int i = 0; i < c->count; i++) {
        layer *p = &l.part[i];
        p->y.device.rows = p->dy.device.rows = p->xa.device.rows = 0;
    }
    run(&l, false);
    for (int i = 0; i < c->count; i++) {
        const layer_vector *const vectors[] = {&l.part[i].da, &l.part[i].db};
        for (int v = 0; v < 2; v++) {
            float *got = layer_read(&l.part[i], vectors[v]);
            for (int64_t e = 0; e < vectors[v]->count; e++) {
                cr_assert_eq(got[e], 0.0F, "%s: gradient %d", l.part[i].what, v);
            }
            free(got);
        }
    }
    b->ops->unit_close(b->queue);
    b->ops->close(b->queue);
    linears_free(&l);
}

Test(twin_linears, no_rows)
{
    static const linears_case cases[] = {
        {3, 4, 88, {64, 16, 24}, {8, 3, 8}, 8, 0.0F, &side_by_side, BIASES, DX},
        {2, 4, 88, {64, 16}, {8, 3}, 8, 0.5F, &side_by_side, BIASES, DX_ADD},
        {2, 4, 88, {64, 16}, {8, 3}, 8, 0.0F, &side_by_side_without_room, BIASES, NO_DX},
    };
    TW_CHECK_CASES(check_empty, cases);
}

/* Operations that know of one linear see each in the joined matrix as if it were alone. */
static void check_others(const tw_backend *b, const linears_case *c)
{
    linears l;
    linears_make(&l, b, c);
    linears_open(&l);
    for (int i = 0; i < c->count; i++) {
        layer *p = &l.part[i];
        const int64_t count = c->rows * c->out[i];
        tw_mat y = tw_mat_make_as(b, QS_F32, c->rows, c->out[i], 0, 1.0F, 1);
        layer_vector norm = make_vector(b, c->out[i], 2);
        tw_ok(b, b->ops->linear_forward(b->queue, &p->unit.view, &p->unit.weight, NULL, &l.x.device,
                                        &y.device));
        tw_ok(b, b->ops->dora_norms(b->queue, &p->unit.view, &p->unit.weight, &p->ad.device, NULL,
                                    norm.device, NULL));
        tw_ok(b, qs_ops_cpu()->linear_forward(b->cpu_queue, &p->unit.host.view,
                                              &p->unit.host.weight, NULL, &l.x.host, &y.host));
        tw_ok(b, qs_ops_cpu()->dora_norms(b->cpu_queue, &p->unit.host.view, &p->unit.host.weight,
                                          &p->ad.host, NULL, norm.host, NULL));
        double *limit = ad_limits(count), *norm_limit = ad_limits(norm.count);
        ad_add_products(limit, c->rows, c->out[i], c->in, ad_of(&l.x),
                        (ad_factor){p->unit.host.plain, 1, c->in}, 1e-6);
        for (int64_t e = 0; e < norm.count; e++) { /* sums of squares in other orders */
            norm_limit[e] = 1e-6 * (double)norm.host[e];
        }
        layer_assert_mat(p, "frozen y", &y, limit);
        layer_assert_vector(p, "norm", &norm, norm_limit);
        tw_free(b, norm.device);
        free(norm.host);
        tw_mat_free(b, &y);
    }
    b->ops->unit_close(b->queue);
    b->ops->close(b->queue);
    linears_free(&l);
}

Test(twin_linears, others_see_each_alone)
{
    static const linears_case cases[] = {
        {3, 21, 88, {64, 16, 24}, {8, 3, 8}, 8, 0.0F, &side_by_side, NO_BIAS, DX},
        {2, 21, 72, {40, 48}, {0, 13}, 13, 0.0F, &side_by_side, NO_BIAS, DX},
    };
    TW_CHECK_CASES(check_others, cases);
}

/* Linears wider than those that the limits join, in a unit that takes no more room than theirs: the
 * gradients of A have no scratch of that width, and what lies behind it is not theirs to write. */
static void check_wider(const tw_backend *b, const linears_case *c)
{
    const int64_t narrow = 16;
    qs_ops_limits limits = ad_limits_of(c->rows, 24, c->in, c->most_rank, false);
    qs_joined_linear joined[MOST];
    qs_weight w[STRANGER + MOST];
    qs_lora lora[STRANGER + MOST] = {{0}};
    linears l;
    linears_make(&l, b, c);
    w[0] = l.unit.weight;
    w[0].quantum = 4;
    w[0].out = 24;
    w[0].in = narrow;
    limits.n_linears = STRANGER + c->count;
    limits.widest = c->in;
    for (int i = 0; i < c->count; i++) {
        const int at = STRANGER + i;
        limits.out[at] = c->out[i];
        limits.in[at] = narrow;
        limits.joined[at] = i > 0;
        w[at] = l.part[i].unit.weight;
        lora[at] = l.part[i].ad.device;
    }
    tw_open(b, &limits);
    tw_ok(b, b->ops->unit_open(b->queue, &l.unit.view, w, lora, STRANGER + c->count, 0, false));
    describe(&l, false, false, joined);
    tw_ok(b, b->ops->linears_lora_forward(b->queue, &l.unit.view, joined, c->count, &l.x.device));
    describe(&l, false, true, joined);
    const qs_status st = b->ops->linears_lora_backward(b->queue, &l.unit.view, joined, c->count,
                                                       &l.x.device, NULL, false);
    cr_assert_eq(st, tw_is_cpu(b) ? QS_OK : QS_ERR_BUG, "%s: %s", b->name, qs_error_text());
    qs_error_clear();
    tw_ok(b, qs_queue_wait(b->queue));
    b->ops->unit_close(b->queue);
    b->ops->close(b->queue);
    linears_free(&l);
}

Test(twin_linears, no_scratch_for_wider_ones)
{
    static const linears_case cases[] = {
        {2, 5, 160, {8, 8}, {8, 8}, 8, 0.0F, &side_by_side, NO_BIAS, NO_DX},
    };
    TW_CHECK_CASES(check_wider, cases);
}
