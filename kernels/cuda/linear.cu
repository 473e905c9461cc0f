/* The frozen linears, and a linear as a layer has it: with its adapter, bias and residual.
 *
 * All is matrix products on bf16 matrices [out, in] that unit.cu provides. On an opened unit the
 * adapter costs no pass of its own over Y or dX: its part stands in the border of the matrix
 * (core/border.h), s X A^T is written into the border of X, and one product with K = in + border
 * does both; backwards likewise with s dY B in the border of dY and K = out + border. That takes a
 * border behind X (or dY); else, and for dX with dropout, whose mask does not factor, the adapter
 * is a product of its own.
 *
 * FLOPs: 2 T in out forward, the same for dX, and 2 T r in or 2 T r out for each of the six
 * products of rank r. What the thin ones read again: X for XA and for dA, dY for dY B and for dB.
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
 * Registers on sm_80 to sm_120: bias_kernel 20 to 40, xa_kernel 30 to 32; no shared memory, no
 * spills.
 */
#include "kernels/cuda/bordered.cuh"
#include "kernels/cuda/dora.cuh"
#include "kernels/cuda/lora.cuh"
#include "kernels/cuda/vector.cuh"

/* ---- small kernels: what a product starts from, and xa out of its border ---- */

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

/* The border of X has padding, and X is soon written over: xa keeps the rank's columns. */
__global__ void __launch_bounds__(QS_ROW_THREADS)
    xa_kernel(qs_rows_of<const qs_bf16> border, qs_rows_of<qs_bf16> xa, qs_row_tiles tiles)
{
    qs_for_groups<1>(tiles, [&](int64_t t, int64_t column) {
        xa.data[t * xa.stride + column] = border.data[t * border.stride + column];
    });
}

static qs_status keep_xa(qs_queue *q, const qs_mat *border, const qs_mat *xa)
{
    const qs_row_tiles tiles = qs_row_tiles_make(xa->rows, xa->cols);
    QS_LAUNCH(xa_kernel, qs_row_grid(tiles), QS_ROW_THREADS, 0, qs_cuda_stream(q),
              qs_rows<const qs_bf16>(border), qs_rows<qs_bf16>(xa), tiles);
    return qs_cuda_launched("xa_kernel");
}

/* ---- the bordered matrix ---- */

/* The linear of an opened unit with its adapter in the border, if `mat` has a border, too. */
static qs_bordered find_bordered(qs_queue *q, const qs_unit_view *unit, const qs_weight *w,
                                 const qs_lora *lora, const qs_mat *mat)
{
    qs_bordered found = qs_bordered_linear(q, unit, w, lora);
    if (!qs_bordered_fits(&found, mat)) {
        found.linear = NULL;
    }
    return found;
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

/* ---- with the adapter ---- */

/* Y = [X | s drop(X) A^T] [W | B]^T + start. The whole border is written: A's zero rows make the
 * zeros that meet B's zero columns. */
static qs_status bordered_forward(qs_queue *q, const qs_bordered *to, const qs_lora *lora,
                                  const qs_mat *x, const qs_mat *start, qs_mat *xa, qs_mat *y)
{
    const qs_cuda_linear *l = to->linear;
    const qs_mat a = qs_bordered_part(l, l->out, to->border, 0, l->in);
    const qs_mat w_and_b = qs_bordered_part(l, 0, l->out, 0, l->in + to->border);
    const qs_mat wide = qs_columns_of(x, 0, x->cols + to->border);
    qs_mat border = qs_columns_of(x, x->cols, to->border);
    qs_mat input;
    QS_TRY(qs_cuda_lora_input(q, lora, x, &input));
    QS_TRY(qs_cuda_multiply(q, lora->scale, &input, false, &a, true, NULL, &border));
    QS_TRY(keep_xa(q, &border, xa));
    return qs_cuda_multiply(q, 1.0f, &wide, false, &w_and_b, true, start, y);
}

extern "C" qs_status qs_cuda_linear_lora_forward(qs_queue *q, const qs_unit_view *unit,
                                                 const qs_weight *w, const float *bias,
                                                 const qs_mat *residual, const qs_lora *lora,
                                                 const qs_mat *x, qs_mat *xa, qs_mat *y)
{
    const qs_mat *start;
    if (x->rows == 0) {
        return QS_OK;
    }
    if (lora->a != NULL && lora->gain != NULL) {
        return qs_cuda_dora_forward(q, unit, w, bias, residual, lora, x, xa, y);
    }
    QS_TRY(start_sum(q, bias, residual, y, &start));
    const qs_bordered to = find_bordered(q, unit, w, lora, x);
    if (to.linear != NULL) {
        return bordered_forward(q, &to, lora, x, start, xa, y);
    }
    QS_TRY(frozen_forward(q, unit, w, x, start, y));
    return lora->a == NULL ? QS_OK : qs_cuda_lora_add(q, lora, lora->scale, 1.0f, x, xa, y);
}

/* dX (+)= [dY | s dY B] [W ; A], when s dY B stands in dY's border. */
static qs_status bordered_input_gradient(qs_queue *q, const qs_bordered *to, const qs_mat *dy,
                                         qs_mat *dx, bool accumulate)
{
    const qs_cuda_linear *l = to->linear;
    const qs_mat w_over_a = qs_bordered_part(l, 0, l->out + to->border, 0, l->in);
    const qs_mat wide = qs_columns_of(dy, 0, dy->cols + to->border);
    return qs_cuda_multiply(q, 1.0f, &wide, false, &w_over_a, false, accumulate ? dx : NULL, dx);
}

/* s dY B: with its padding into dY's border, or into `work` without one. */
static qs_status output_gradient_by_b(qs_queue *q, const qs_bordered *to, const qs_lora *lora,
                                      const qs_mat *dy, const qs_mat *work, qs_mat *product)
{
    if (to->linear == NULL) {
        const qs_mat b = qs_cuda_lora_b(lora, dy->cols);
        *product = *work;
        return qs_cuda_multiply(q, lora->scale, dy, false, &b, false, NULL, product);
    }
    const qs_cuda_linear *l = to->linear;
    const qs_mat b = qs_bordered_part(l, 0, l->out, l->in, to->border);
    qs_mat border = qs_columns_of(dy, dy->cols, to->border);
    *product = qs_columns_of(dy, dy->cols, lora->rank);
    return qs_cuda_multiply(q, lora->scale, dy, false, &b, false, NULL, &border);
}

extern "C" qs_status qs_cuda_linear_lora_backward(qs_queue *q, const qs_unit_view *unit,
                                                  const qs_weight *w, const qs_lora *lora,
                                                  const qs_mat *x, const qs_mat *xa,
                                                  const qs_mat *dy, qs_mat *work, float *da,
                                                  float *db, qs_mat *dx, bool accumulate)
{
    if (lora->a == NULL) {
        return dx == NULL ? QS_OK : qs_cuda_linear_backward(q, unit, w, dy, dx, accumulate);
    }
    if (lora->gain != NULL) {
        return qs_cuda_dora_gradients(q, unit, w, lora, x, xa, dy, work, da, db, dx, accumulate);
    }
    const qs_bordered to = find_bordered(q, unit, w, lora, dy);
    qs_mat product;
    QS_TRY(output_gradient_by_b(q, &to, lora, dy, work, &product));
    QS_TRY(qs_cuda_lora_gradients(q, lora, 1.0f, 1.0f, x, xa, dy, &product, false, da, db));
    if (dx == NULL) {
        return QS_OK;
    }
    if (to.linear != NULL && !qs_cuda_has_dropout(lora)) {
        return bordered_input_gradient(q, &to, dy, dx, accumulate);
    }
    QS_TRY(qs_cuda_linear_backward(q, unit, w, dy, dx, accumulate));
    return qs_cuda_lora_input_gradient(q, lora, 1.0f, &product, dx);
}
