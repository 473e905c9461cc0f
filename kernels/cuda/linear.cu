/* The frozen linears, and linears as a layer has them: with adapter, bias and residual, one alone
 * or those that read the same x together.
 *
 * All is matrix products on bf16 matrices [out, in] that unit.cu provides. On an opened unit the
 * adapter costs no pass of its own over Y or dX: its part stands in the border of the matrix
 * (core/border.h), s X A^T is written into the border of X, and one product with K = in + border
 * does both; backwards likewise with s dY B in the border of dY and K = out + border. That takes a
 * border behind X (or dY); else, and for dX with dropout, whose mask does not factor, the adapter
 * is a product of its own.
 *
 * Linears that read the same x are one such matrix (limits.joined), so that all is one product each
 * way, where their y's (dy's) are columns of the same rows: N = the sum of their out forward, K for
 * dX. Of the thin products, s X A^T of all adapters is one (with dropout, where each has an X of
 * its own, one each), s dY B is one, since the B's stand block by block, and dA is one, whose rows
 * then go from scratch to where each belongs (da_kernel); dB is one each. Whoever cannot be
 * computed so is computed one by one, and a linear alone out of such a matrix as one without a
 * border.
 *
 * FLOPs: 2 T in out forward, the same for dX, and 2 T r in or 2 T r out for each of the six
 * products of rank r; of n joined linears Y and dY B multiply with the zeros between the blocks,
 * too, n - 1 times as much as with the B's. What the thin ones read again: X for XA and for dA, dY
 * for dY B and for dB; joined linears read X once for all.
 *
 * xa is s A drop(x), bf16, whatever way was taken: each of forward and backward decides by itself.
 * Linears with a gain are DoRA's: dora.cu.
 *
 * Roundings: Y, dX once to bf16 from an fp32 sum; with a start (residual, or bias + residual
 * rounded to Y's type, or the dX so far) some of cuBLASLt's kernels round the product to bf16, too,
 * before they add it, as separate operations would, others do not: seen on an H200. Adapter apart:
 * the same for its product, which starts from the rounded Y or dX. xa and s dY B to bf16; dA, dB
 * none.
 *
 * Registers on sm_80 to sm_120: bias_kernel 20 to 40, xa_kernel 22 to 28, da_kernel 24 to 28; no
 * shared memory, no spills.
 */
#include "kernels/cuda/bordered.cuh"
#include "kernels/cuda/dora.cuh"
#include "kernels/cuda/lora.cuh"
#include "kernels/cuda/vector.cuh"

/* ---- small kernels: what a product starts from, and what moves to where it is kept ---- */

/* y = bias, or bias + residual (which y may be). */
template <int WIDTH, typename T>
__global__ void __launch_bounds__(QS_ROW_THREADS)
    bias_kernel(const float *bias, qs_rows_of<const T> residual, qs_rows_of<T> y,
                qs_row_tiles tiles)
{
    qs_for_groups<WIDTH>(tiles, [&](int64_t t, int64_t column) {
        float sum[WIDTH], add[WIDTH];
        qs_load<WIDTH>(sum, bias + column);
        if (residual.data != NULL) {
            qs_load<WIDTH>(add, residual.data + t * residual.stride + column);
            for (int i = 0; i < WIDTH; i++) {
                sum[i] += add[i];
            }
        }
        qs_store<WIDTH>(y.data + t * y.stride + column, sum);
    });
}

template <typename T>
static void bias_launch(qs_queue *q, const float *bias, const qs_mat *residual, const qs_mat *y)
{
    const qs_rows_of<const T> from =
        residual != NULL ? qs_rows<const T>(residual) : qs_rows_of<const T>{NULL, 0};
    const bool vectors = qs_mat_is_vectors(y) && (uintptr_t)bias % 16 == 0 &&
                         (residual == NULL || qs_mat_is_vectors(residual));
    const qs_row_tiles tiles = qs_row_tiles_make(y->rows, vectors ? y->cols / QS_VECTOR : y->cols);
    if (vectors) {
        QS_LAUNCH((bias_kernel<QS_VECTOR, T>), qs_row_grid(tiles), QS_ROW_THREADS, 0,
                  qs_cuda_stream(q), bias, from, qs_rows<T>(y), tiles);
    } else {
        QS_LAUNCH((bias_kernel<1, T>), qs_row_grid(tiles), QS_ROW_THREADS, 0, qs_cuda_stream(q),
                  bias, from, qs_rows<T>(y), tiles);
    }
}

/* What the product is added to: the residual, or bias (+ residual) put into y, or nothing. */
static qs_status start_sum(qs_queue *q, const float *bias, const qs_mat *residual, const qs_mat *y,
                           const qs_mat **start)
{
    *start = residual;
    if (bias == NULL || y->rows == 0 || y->cols == 0) {
        return QS_OK;
    }
    *start = y;
    if (y->dtype == QS_F32) {
        bias_launch<float>(q, bias, residual, y);
    } else {
        bias_launch<qs_bf16>(q, bias, residual, y);
    }
    return qs_cuda_launched("bias_kernel");
}

/* Where A x of a matrix's adapters goes, in the order of their columns of the border. */
typedef struct {
    qs_rows_of<qs_bf16> to[QS_OPS_JOINED_MAX];
    int rank[QS_OPS_JOINED_MAX];
} kept_xa;

/* The border of X has padding, and X is soon written over: each xa keeps its rank's columns. */
__global__ void __launch_bounds__(QS_ROW_THREADS)
    xa_kernel(qs_rows_of<const qs_bf16> border, kept_xa xa, uint32_t width, qs_row_tiles tiles)
{
    qs_for_groups<1>(tiles, [&](int64_t t, int64_t column) {
        const uint32_t which = (uint32_t)column / width, k = (uint32_t)column % width;
        if ((int)k < xa.rank[which]) {
            xa.to[which].data[t * xa.to[which].stride + k] =
                border.data[t * border.stride + column];
        }
    });
}

/* The gradients of the A's of a matrix, as one product leaves them, to where each belongs. */
typedef struct {
    float *to[QS_OPS_JOINED_MAX]; /* [rank, in] */
    int rank[QS_OPS_JOINED_MAX];
} kept_da;

__global__ void __launch_bounds__(QS_ROW_THREADS)
    da_kernel(qs_rows_of<const float> sums, kept_da da, uint32_t width, qs_row_tiles tiles)
{
    qs_for_groups<1>(tiles, [&](int64_t row, int64_t column) {
        const uint32_t which = (uint32_t)row / width, k = (uint32_t)row % width;
        if ((int)k < da.rank[which]) {
            da.to[which][k * sums.stride + column] = sums.data[row * sums.stride + column];
        }
    });
}

/* ---- linears of one bordered matrix ---- */

/* Linears of an opened unit that are one matrix, called with the adapters that stand in its border
 * or without any, and their y's (dy's) as one. */
typedef struct {
    const qs_cuda_linear *first;
    int64_t border; /* of all adapters; 0: without */
    int64_t width;  /* of one */
    float scale;    /* of all */
    qs_mat y;
} joined;

/* Does `next` stand behind the columns of `row` in the rows of one matrix? */
static bool is_beside(const qs_mat *row, const qs_mat *next)
{
    const int64_t bytes = row->cols * (int64_t)qs_dtype_bytes(row->dtype);
    return next->data == (const uint8_t *)row->data + bytes && next->stride == row->stride &&
           next->rows == row->rows && next->dtype == row->dtype;
}

/* What the adapters of a call have to say of all: *any is there, with which scale; false if they
 * differ in it, are DoRA's, or are not those that stand in the matrix. */
static bool adapters_agree(const qs_cuda_linear *first, const qs_joined_linear *l, int count,
                           bool *any, float *scale)
{
    bool opened = true;
    *any = false;
    for (int i = 0; i < count; i++) {
        const qs_lora *lora = &l[i].lora;
        const bool adapted = lora->a != NULL;
        if (adapted && (lora->gain != NULL || (*any && lora->scale != *scale))) {
            return false;
        }
        opened = opened && first[i].rank == (adapted ? lora->rank : 0);
        *scale = adapted ? lora->scale : *scale;
        *any = *any || adapted;
    }
    return opened || !*any;
}

/* Are these all linears of one matrix, and their y's side by side? */
static bool find_joined(qs_queue *q, const qs_unit_view *unit, const qs_joined_linear *l, int count,
                        joined *found)
{
    const qs_cuda_context *context = qs_cuda_context_of(q);
    const qs_cuda_linear *first = context != NULL ? qs_cuda_opened(context, unit, l[0].w) : NULL;
    bool adapted;
    *found = {first, 0, 0, 0.0f, l[0].y};
    if (first == NULL || first->place != 0 || first->joined != count ||
        !adapters_agree(first, l, count, &adapted, &found->scale)) {
        return false;
    }
    found->border = adapted ? first->border : 0;
    found->width = qs_border_width(context->limits.lora_rank);
    for (int i = 1; i < count; i++) {
        if (qs_cuda_opened(context, unit, l[i].w) != first + i || !is_beside(&found->y, &l[i].y)) {
            return false;
        }
        found->y.cols += l[i].y.cols;
    }
    return found->y.cols <= found->y.stride;
}

/* Has `mat`, which they are to multiply, a border for all? */
static bool have_border(const joined *to, const qs_mat *mat)
{
    return to->border == 0 ||
           qs_border_usable((uintptr_t)mat->data, mat->cols, mat->stride, to->border);
}

static bool have_dropout(const qs_joined_linear *l, int count)
{
    bool any = false;
    for (int i = 0; i < count; i++) {
        any = any || (l[i].lora.a != NULL && qs_cuda_has_dropout(&l[i].lora));
    }
    return any;
}

/* All have a bias, or none. */
static bool biases_agree(const qs_joined_linear *l, int count)
{
    bool agree = true;
    for (int i = 1; i < count; i++) {
        agree = agree && (l[i].bias != NULL) == (l[0].bias != NULL);
    }
    return agree;
}

/* ---- frozen ---- */

/* y = x W^T + start */
static qs_status frozen_forward(qs_queue *q, const qs_unit_view *unit, const qs_weight *w,
                                const qs_mat *x, const qs_mat *start, qs_mat *y)
{
    qs_mat matrix;
    QS_TRY(qs_frozen_matrix(q, unit, w, &matrix));
    return qs_cuda_multiply(q, 1.0f, x, false, &matrix, true, start, y);
}

extern "C" qs_status qs_cuda_linear_forward(qs_queue *q, const qs_unit_view *unit,
                                            const qs_weight *w, const float *bias, const qs_mat *x,
                                            qs_mat *y)
{
    const qs_mat *start;
    if (x->rows == 0) {
        return QS_OK;
    }
    QS_TRY(start_sum(q, bias, NULL, y, &start));
    return frozen_forward(q, unit, w, x, start, y);
}

extern "C" qs_status qs_cuda_linear_backward(qs_queue *q, const qs_unit_view *unit,
                                             const qs_weight *w, const qs_mat *dy, qs_mat *dx,
                                             bool accumulate)
{
    qs_mat matrix;
    if (dy->rows == 0) {
        return QS_OK;
    }
    QS_TRY(qs_frozen_matrix(q, unit, w, &matrix));
    return qs_cuda_multiply(q, 1.0f, dy, false, &matrix, false, accumulate ? dx : NULL, dx);
}

/* ---- with adapters, forward ---- */

/* Each xa from the border of X. */
static qs_status keep_xa(qs_queue *q, const joined *to, const qs_joined_linear *l, int count,
                         const qs_mat *border)
{
    const qs_row_tiles tiles = qs_row_tiles_make(border->rows, border->cols);
    kept_xa kept;
    int n = 0;
    for (int i = 0; i < count; i++) {
        if (l[i].lora.a != NULL) {
            kept.to[n] = qs_rows<qs_bf16>(&l[i].xa);
            kept.rank[n++] = l[i].lora.rank;
        }
    }
    QS_LAUNCH(xa_kernel, qs_row_grid(tiles), QS_ROW_THREADS, 0, qs_cuda_stream(q),
              qs_rows<const qs_bf16>(border), kept, (uint32_t)to->width, tiles);
    return qs_cuda_launched("xa_kernel");
}

/* s drop(X) A^T of all adapters into X's border: one product, but with dropout, for which each has
 * an X of its own. All of it is written: zero rows of A make the zeros that meet zero columns of B.
 */
static qs_status input_by_a(qs_queue *q, const joined *to, const qs_joined_linear *l, int count,
                            const qs_mat *x)
{
    const qs_cuda_linear *m = to->first;
    const int64_t below = to->y.cols;
    if (!have_dropout(l, count)) {
        const qs_mat a = qs_bordered_part(m, below, to->border, 0, m->in);
        qs_mat border = qs_columns_of(x, x->cols, to->border);
        return qs_cuda_multiply(q, to->scale, x, false, &a, true, NULL, &border);
    }
    for (int i = 0; i < count; i++) {
        if (l[i].lora.a != NULL) {
            const qs_mat a = qs_bordered_part(m, below + m[i].at, to->width, 0, m->in);
            qs_mat border = qs_columns_of(x, x->cols + m[i].at, to->width), input;
            QS_TRY(qs_cuda_lora_input(q, &l[i].lora, x, &input));
            QS_TRY(qs_cuda_multiply(q, to->scale, &input, false, &a, true, NULL, &border));
        }
    }
    return QS_OK;
}

/* [Y1 | Y2 ..] = [X | s drop(X) A1^T | ..] [W1 B1 ; W2 B2 ; ..]^T + start */
static qs_status joined_forward(qs_queue *q, joined *to, const qs_joined_linear *l, int count,
                                const qs_mat *residual, const qs_mat *x)
{
    const qs_mat w_and_b = qs_bordered_part(to->first, 0, to->y.cols, 0, x->cols + to->border);
    const qs_mat wide = qs_columns_of(x, 0, x->cols + to->border);
    const qs_mat *start = residual;
    for (int i = 0; l[0].bias != NULL && i < count; i++) {
        QS_TRY(start_sum(q, l[i].bias, residual, &l[i].y, &start));
        start = &to->y;
    }
    if (to->border > 0) {
        const qs_mat border = qs_columns_of(x, x->cols, to->border);
        QS_TRY(input_by_a(q, to, l, count, x));
        QS_TRY(keep_xa(q, to, l, count, &border));
    }
    return qs_cuda_multiply(q, 1.0f, &wide, false, &w_and_b, true, start, &to->y);
}

/* The frozen product and the adapter's, one after the other. */
static qs_status forward_apart(qs_queue *q, const qs_unit_view *unit, const qs_joined_linear *l,
                               const qs_mat *residual, const qs_mat *x)
{
    const qs_mat *start;
    qs_mat xa = l->xa, y = l->y;
    if (l->lora.a != NULL && l->lora.gain != NULL) {
        return qs_cuda_dora_forward(q, unit, l->w, l->bias, residual, &l->lora, x, &xa, &y);
    }
    QS_TRY(start_sum(q, l->bias, residual, &y, &start));
    QS_TRY(frozen_forward(q, unit, l->w, x, start, &y));
    return l->lora.a == NULL ? QS_OK
                             : qs_cuda_lora_add(q, &l->lora, l->lora.scale, 1.0f, x, &xa, &y);
}

/* As one product, or one by one; a residual belongs to one alone. */
static qs_status forward(qs_queue *q, const qs_unit_view *unit, const qs_joined_linear *l,
                         int count, const qs_mat *residual, const qs_mat *x)
{
    joined to;
    if (x->rows == 0) {
        return QS_OK;
    }
    if (find_joined(q, unit, l, count, &to) && have_border(&to, x) && biases_agree(l, count)) {
        return joined_forward(q, &to, l, count, residual, x);
    }
    if (count == 1) {
        return forward_apart(q, unit, l, residual, x);
    }
    for (int i = 0; i < count; i++) {
        QS_TRY(forward(q, unit, &l[i], 1, NULL, x));
    }
    return QS_OK;
}

extern "C" qs_status qs_cuda_linears_lora_forward(qs_queue *q, const qs_unit_view *unit,
                                                  const qs_joined_linear *linears, int count,
                                                  const qs_mat *x)
{
    return forward(q, unit, linears, count, NULL, x);
}

extern "C" qs_status qs_cuda_linear_lora_forward(qs_queue *q, const qs_unit_view *unit,
                                                 const qs_weight *w, const float *bias,
                                                 const qs_mat *residual, const qs_lora *lora,
                                                 const qs_mat *x, qs_mat *xa, qs_mat *y)
{
    qs_joined_linear alone = {};
    alone.w = w;
    alone.bias = bias;
    alone.lora = *lora;
    alone.y = *y;
    if (lora->a != NULL) {
        alone.xa = *xa;
    }
    return forward(q, unit, &alone, 1, residual, x);
}

/* ---- with adapters, backward ---- */

/* s dY B of an adapter, out of the border that `all` is. */
static qs_mat product_of(const joined *to, const qs_joined_linear *l, int i, const qs_mat *all)
{
    return qs_columns_of(all, to->first[i].at, l[i].lora.rank);
}

/* The gradients of all A's, in one product, by way of scratch; and of each B. */
static qs_status gradients_together(qs_queue *q, const joined *to, const qs_joined_linear *l,
                                    int count, const qs_mat *x, const qs_mat *all)
{
    const qs_cuda_context *context = qs_cuda_context_of(q);
    qs_mat sums = {context->lora_sum, to->border, x->cols, x->cols, QS_F32};
    const qs_row_tiles tiles = qs_row_tiles_make(sums.rows, sums.cols);
    kept_da kept;
    int n = 0;
    if ((size_t)(sums.rows * sums.cols) * sizeof(float) > context->lora_sum_bytes) {
        return QS_FAIL(QS_ERR_BUG, "gradients of %lld x %lld, which the limits do not know of",
                       (long long)sums.rows, (long long)sums.cols);
    }
    QS_TRY(qs_cuda_multiply(q, 1.0f, all, true, x, false, NULL, &sums));
    for (int i = 0; i < count; i++) {
        if (l[i].lora.a != NULL) {
            qs_mat db = {l[i].db, l[i].y.cols, l[i].lora.rank, l[i].lora.rank, QS_F32};
            QS_TRY(qs_cuda_multiply(q, 1.0f, &l[i].y, true, &l[i].xa, false, NULL, &db));
            kept.to[n] = l[i].da;
            kept.rank[n++] = l[i].lora.rank;
        }
    }
    QS_LAUNCH(da_kernel, qs_row_grid(tiles), QS_ROW_THREADS, 0, qs_cuda_stream(q),
              qs_rows<const float>(&sums), kept, (uint32_t)to->width, tiles);
    return qs_cuda_launched("da_kernel");
}

/* Those of a single adapter, or with dropout, need no way round. */
static qs_status gradients(qs_queue *q, const joined *to, const qs_joined_linear *l, int count,
                           const qs_mat *x, const qs_mat *all)
{
    if (to->border > to->width && !have_dropout(l, count)) {
        return gradients_together(q, to, l, count, x, all);
    }
    for (int i = 0; i < count; i++) {
        if (l[i].lora.a != NULL) {
            const qs_mat product = product_of(to, l, i, all);
            QS_TRY(qs_cuda_lora_gradients(q, &l[i].lora, 1.0f, 1.0f, x, &l[i].xa, &l[i].y, &product,
                                          false, l[i].da, l[i].db));
        }
    }
    return QS_OK;
}

/* dX (+)= [dY1 | dY2 .. | s dY1 B1 | ..] [W1 ; W2 ; .. ; A1 ; ..]. A mask does not factor: with
 * dropout that is the frozen part alone, and each adapter's is added by itself. */
static qs_status input_gradient(qs_queue *q, const joined *to, const qs_joined_linear *l, int count,
                                const qs_mat *all, qs_mat *dx, bool accumulate)
{
    const bool dropout = have_dropout(l, count);
    const int64_t k = to->y.cols + (dropout ? 0 : to->border);
    const qs_mat w = qs_bordered_part(to->first, 0, k, 0, dx->cols);
    const qs_mat wide = qs_columns_of(&to->y, 0, k);
    QS_TRY(qs_cuda_multiply(q, 1.0f, &wide, false, &w, false, accumulate ? dx : NULL, dx));
    for (int i = 0; dropout && i < count; i++) {
        if (l[i].lora.a != NULL) {
            const qs_mat product = product_of(to, l, i, all);
            QS_TRY(qs_cuda_lora_input_gradient(q, &l[i].lora, 1.0f, &product, dx));
        }
    }
    return QS_OK;
}

/* The B's stand block by block, so that one product of all dY gives each adapter its own s dY B. */
static qs_status joined_backward(qs_queue *q, const joined *to, const qs_joined_linear *l,
                                 int count, const qs_mat *x, qs_mat *dx, bool accumulate)
{
    qs_mat all = qs_columns_of(&to->y, to->y.cols, to->border);
    if (to->border > 0) {
        const qs_mat b = qs_bordered_part(to->first, 0, to->y.cols, x->cols, to->border);
        QS_TRY(qs_cuda_multiply(q, to->scale, &to->y, false, &b, false, NULL, &all));
        QS_TRY(gradients(q, to, l, count, x, &all));
    }
    return dx == NULL ? QS_OK : input_gradient(q, to, l, count, &all, dx, accumulate);
}

static qs_status backward_apart(qs_queue *q, const qs_unit_view *unit, const qs_joined_linear *l,
                                const qs_mat *x, qs_mat *dx, bool accumulate)
{
    const qs_lora *lora = &l->lora;
    qs_mat work = l->work;
    if (lora->a != NULL && lora->gain != NULL) {
        return qs_cuda_dora_gradients(q, unit, l->w, lora, x, &l->xa, &l->y, &work, l->da, l->db,
                                      dx, accumulate);
    }
    if (lora->a != NULL) {
        const qs_mat b = qs_cuda_lora_b(lora, l->y.cols);
        QS_TRY(qs_cuda_multiply(q, lora->scale, &l->y, false, &b, false, NULL, &work));
        QS_TRY(qs_cuda_lora_gradients(q, lora, 1.0f, 1.0f, x, &l->xa, &l->y, &work, false, l->da,
                                      l->db));
    }
    if (dx == NULL) {
        return QS_OK;
    }
    QS_TRY(qs_cuda_linear_backward(q, unit, l->w, &l->y, dx, accumulate));
    return lora->a == NULL ? QS_OK : qs_cuda_lora_input_gradient(q, lora, 1.0f, &work, dx);
}

/* Does another one's dY lie behind that of linear i, where its border would be? */
static bool is_hemmed(const qs_joined_linear *l, int count, int i)
{
    const int64_t row = l[i].y.stride * (int64_t)qs_dtype_bytes(l[i].y.dtype);
    bool hemmed = false;
    for (int j = 0; j < count; j++) {
        const int64_t on = (const uint8_t *)l[j].y.data - (const uint8_t *)l[i].y.data;
        hemmed = hemmed || (on > 0 && on < row);
    }
    return hemmed;
}

static qs_status backward(qs_queue *q, const qs_unit_view *unit, const qs_joined_linear *l,
                          int count, const qs_mat *x, qs_mat *dx, bool accumulate)
{
    joined to;
    if (find_joined(q, unit, l, count, &to) && have_border(&to, &to.y)) {
        return joined_backward(q, &to, l, count, x, dx, accumulate);
    }
    if (count == 1) {
        return backward_apart(q, unit, l, x, dx, accumulate);
    }
    for (int i = 0; i < count; i++) {
        const bool add = accumulate || i > 0;
        QS_TRY(is_hemmed(l, count, i) ? backward_apart(q, unit, &l[i], x, dx, add)
                                      : backward(q, unit, &l[i], 1, x, dx, add));
    }
    return QS_OK;
}

extern "C" qs_status qs_cuda_linears_lora_backward(qs_queue *q, const qs_unit_view *unit,
                                                   const qs_joined_linear *linears, int count,
                                                   const qs_mat *x, qs_mat *dx, bool accumulate)
{
    return backward(q, unit, linears, count, x, dx, accumulate);
}

extern "C" qs_status qs_cuda_linear_lora_backward(qs_queue *q, const qs_unit_view *unit,
                                                  const qs_weight *w, const qs_lora *lora,
                                                  const qs_mat *x, const qs_mat *xa,
                                                  const qs_mat *dy, qs_mat *work, float *da,
                                                  float *db, qs_mat *dx, bool accumulate)
{
    qs_joined_linear alone = {};
    alone.w = w;
    alone.lora = *lora;
    alone.y = *dy;
    if (lora->a != NULL) {
        alone.xa = *xa;
        alone.work = *work;
        alone.da = da;
        alone.db = db;
    }
    return backward(q, unit, &alone, 1, x, dx, accumulate);
}
