/* DoRA (Liu et al. 2024, arXiv:2402.09353) beside a linear, as peft computes it, with g the gains
 * (dora_norms.cu), d = drop(x), and Z = d (W + s B A)^T:
 *
 *     without dropout   Y = g Z + bias + residual
 *     with              Y = (g - 1) Z + x W^T + s (d A^T) B^T + bias + residual
 *     backward, U = g dY, V = (g - 1) dY:
 *         dA = s (U B)^T d,  dB = U^T (s d A^T)
 *         dX = U W + s (U B) A;   with dropout   dY W + mask / (1 - p) (V W + s (U B) A)
 *         dm = sum over tokens of dY Z, over the norm
 *
 * that is LoRA's products with other operands, on the bordered matrix where it is there
 * (linear.cu). Z is needed by Y and by dm; nobody keeps it.
 *
 * Z goes to Y in fp32: rounded to bf16 first, g Z would round back to Z for every gain nearer to 1
 * than 2^-9, and a magnitude would have no effect before it has moved that far. For the same reason
 * W's rows are not scaled in place. So the products pass through scratch, blocks of at most 2048
 * tokens at a time, about equally long: 4 B an element written and read.
 *
 * Roundings: d, xa, U, V, s U B and the Z of dm to bf16; Y once; dX once, with dropout twice (its
 * masked part is added from fp32); dA, dB, dm none.
 *
 * FLOPs beside LoRA's: 2 T out in for dm; with dropout as much again forward and for dX. Bytes an
 * element of Y: gain_kernel reads 4 and 2 of the residual, writes 2 (with dropout 8 more, and 8 of
 * the product that adds to Z); of dY: 4 for U, as much for V; columns_kernel reads 4.
 *
 * Sums over tokens have one order for each number of them: parts of 64 rows, each in 8 threads a
 * column, the parts in fp64 one behind the other.
 *
 * Registers on sm_80, 86, 89, 90a, 100, 120 (tests/gpu/registers.py); no spills:
 *     gain_kernel 1      36 36 36 38 22 22, from fp32 38 38 38 36 22 22, to fp32 36 36 36 36 32 36
 *     gain_kernel 8      28 28 28 30 32 40, from fp32 28 28 28 28 32 40, to fp32 38 40 40 32 32 40
 *     columns_kernel 1, 8  32 40 40 32 32 40, 48 48 48 44 44 44; 1 and 8 KiB of shared memory
 *     magnitude_kernel     32 32 32 32 32 40
 *     border_kernel        25 30 30 26 18 18
 */
#include "kernels/cuda/dora.cuh"

#include "kernels/cuda/bordered.cuh"
#include "kernels/cuda/core/dora.h"
#include "kernels/cuda/lora.cuh"
#include "kernels/cuda/vector.cuh"

/* ---- a matrix times gains, column by column ---- */

typedef struct {
    const float *gain;      /* NULL: 1 */
    float minus;            /* from the gain */
    const float *bias;      /* NULL: none */
    const qs_mat *residual; /* NULL: none; of the result's type, and may be it */
} gain_args;

template <typename TO> struct gain_call {
    const float *gain, *bias;
    float minus;
    qs_rows_of<const TO> residual;
};

/* to = (gain - minus) from + bias + residual; `to` may be `from`. */
template <int WIDTH, typename FROM, typename TO>
__global__ void __launch_bounds__(QS_ROW_THREADS)
    gain_kernel(gain_call<TO> c, qs_rows_of<const FROM> from, qs_rows_of<TO> to, qs_row_tiles tiles)
{
    qs_for_groups<WIDTH>(tiles, [&](int64_t t, int64_t column) {
        float value[WIDTH], other[WIDTH];
        qs_load<WIDTH>(value, from.data + t * from.stride + column);
        if (c.gain != NULL) {
            qs_load<WIDTH>(other, c.gain + column);
            for (int i = 0; i < WIDTH; i++) {
                value[i] *= other[i] - c.minus;
            }
        }
        if (c.bias != NULL) {
            qs_load<WIDTH>(other, c.bias + column);
            for (int i = 0; i < WIDTH; i++) {
                value[i] += other[i];
            }
        }
        if (c.residual.data != NULL) {
            qs_load<WIDTH>(other, c.residual.data + t * c.residual.stride + column);
            for (int i = 0; i < WIDTH; i++) {
                value[i] += other[i];
            }
        }
        qs_store<WIDTH>(to.data + t * to.stride + column, value);
    });
}

static bool on_vectors(const float *x)
{
    return (uintptr_t)x % 16 == 0; /* NULL is no obstacle */
}

template <typename FROM, typename TO>
static qs_status apply_gain(qs_queue *q, const gain_args &args, const qs_mat *from,
                            const qs_mat *to)
{
    const bool vectors = qs_mat_is_vectors(from) && qs_mat_is_vectors(to) &&
                         on_vectors(args.gain) && on_vectors(args.bias) &&
                         (args.residual == NULL || qs_mat_is_vectors(args.residual));
    const qs_row_tiles tiles =
        qs_row_tiles_make(to->rows, vectors ? to->cols / QS_VECTOR : to->cols);
    gain_call<TO> call = {args.gain, args.bias, args.minus, {NULL, 0}};
    if (args.residual != NULL) {
        call.residual = qs_rows<const TO>(args.residual);
    }
    if (vectors) {
        QS_LAUNCH((gain_kernel<QS_VECTOR, FROM, TO>), qs_row_grid(tiles), QS_ROW_THREADS, 0,
                  qs_cuda_stream(q), call, qs_rows<const FROM>(from), qs_rows<TO>(to), tiles);
    } else {
        QS_LAUNCH((gain_kernel<1, FROM, TO>), qs_row_grid(tiles), QS_ROW_THREADS, 0,
                  qs_cuda_stream(q), call, qs_rows<const FROM>(from), qs_rows<TO>(to), tiles);
    }
    return qs_cuda_launched("gain_kernel");
}

/* ---- xa into the border of what is multiplied ---- */

/* Behind its columns zeros, which meet B's zero columns. */
__global__ void __launch_bounds__(QS_ROW_THREADS)
    border_kernel(qs_rows_of<const qs_bf16> xa, int64_t rank, qs_rows_of<qs_bf16> border,
                  qs_row_tiles tiles)
{
    qs_for_groups<1>(tiles, [&](int64_t t, int64_t column) {
        qs_bf16 value = {0};
        if (column < rank) {
            value = xa.data[t * xa.stride + column];
        }
        border.data[t * border.stride + column] = value;
    });
}

static qs_status fill_border(qs_queue *q, const qs_mat *xa, const qs_mat *border)
{
    const qs_row_tiles tiles = qs_row_tiles_make(border->rows, border->cols);
    QS_LAUNCH(border_kernel, qs_row_grid(tiles), QS_ROW_THREADS, 0, qs_cuda_stream(q),
              qs_rows<const qs_bf16>(xa), xa->cols, qs_rows<qs_bf16>(border), tiles);
    return qs_cuda_launched("border_kernel");
}

/* ---- sums over tokens: of dY Z, column by column ---- */

enum { SUM_WARPS = QS_ROW_THREADS / QS_WARP };

/* One part of the rows and 32 groups of columns: thread (warp, lane) adds up every 8th row of a
 * group, then the warps' sums in order. sums [parts, stride]. */
template <int WIDTH>
__global__ void __launch_bounds__(QS_ROW_THREADS)
    columns_kernel(qs_rows_of<const qs_bf16> dy, qs_rows_of<const qs_bf16> z, int64_t rows,
                   int64_t cols, qs_rows_of<float> sums)
{
    __shared__ float of_warp[SUM_WARPS][QS_WARP * WIDTH];
    const int lane = (int)threadIdx.x % QS_WARP, warp = (int)threadIdx.x / QS_WARP;
    const int64_t column0 = (int64_t)blockIdx.x * QS_WARP * WIDTH, column = column0 + lane * WIDTH;
    const int64_t first = (int64_t)blockIdx.y * QS_DORA_SUM_ROWS;
    const int64_t last = qs_hd_min(first + QS_DORA_SUM_ROWS, rows);
    float sum[WIDTH] = {};
    for (int64_t t = first + warp; column < cols && t < last; t += SUM_WARPS) {
        float a[WIDTH], b[WIDTH];
        qs_load<WIDTH>(a, dy.data + t * dy.stride + column);
        qs_load<WIDTH>(b, z.data + t * z.stride + column);
        for (int i = 0; i < WIDTH; i++) {
            sum[i] += a[i] * b[i];
        }
    }
    for (int i = 0; i < WIDTH; i++) {
        of_warp[warp][lane * WIDTH + i] = sum[i];
    }
    __syncthreads(); /* all warps' sums are there */
    const int mine = (int)threadIdx.x;
    if (mine < QS_WARP * WIDTH && column0 + mine < cols) {
        float whole = 0.0f;
        for (int i = 0; i < SUM_WARPS; i++) {
            whole += of_warp[i][mine];
        }
        sums.data[blockIdx.y * sums.stride + column0 + mine] = whole;
    }
}

/* dm = the parts' sums, behind those of the blocks before; at last over the norm. */
__global__ void __launch_bounds__(QS_ROW_THREADS)
    magnitude_kernel(qs_rows_of<const float> sums, int64_t parts, int64_t cols, const float *norm,
                     bool is_first, bool is_last, float *dm)
{
    const int64_t column = (int64_t)blockIdx.x * QS_ROW_THREADS + threadIdx.x;
    if (column >= cols) {
        return;
    }
    double sum = is_first ? 0.0 : (double)dm[column];
    for (int64_t p = 0; p < parts; p++) {
        sum += (double)sums.data[p * sums.stride + column];
    }
    const float whole = (float)sum, length = norm[column];
    dm[column] = !is_last ? whole : length > 0.0f ? whole / length : 0.0f;
}

static_assert(QS_ROW_THREADS >= QS_WARP * QS_VECTOR, "a thread writes a column of a part");

static void columns_launch(qs_queue *q, const qs_mat *dy, const qs_mat *z, const qs_mat *sums)
{
    const bool vectors = qs_mat_is_vectors(dy) && qs_mat_is_vectors(z);
    const int64_t per_block = QS_WARP * (vectors ? QS_VECTOR : 1);
    const dim3 grid((unsigned)qs_hd_ceil_div(z->cols, per_block), (unsigned)sums->rows);
    if (vectors) {
        QS_LAUNCH(columns_kernel<QS_VECTOR>, grid, QS_ROW_THREADS, 0, qs_cuda_stream(q),
                  qs_rows<const qs_bf16>(dy), qs_rows<const qs_bf16>(z), z->rows, z->cols,
                  qs_rows<float>(sums));
    } else {
        QS_LAUNCH(columns_kernel<1>, grid, QS_ROW_THREADS, 0, qs_cuda_stream(q),
                  qs_rows<const qs_bf16>(dy), qs_rows<const qs_bf16>(z), z->rows, z->cols,
                  qs_rows<float>(sums));
    }
}

static qs_status magnitude_launch(qs_queue *q, const qs_mat *sums, const float *norm, bool is_first,
                                  bool is_last, float *dm)
{
    QS_LAUNCH(magnitude_kernel, (unsigned)qs_hd_ceil_div(sums->cols, QS_ROW_THREADS),
              QS_ROW_THREADS, 0, qs_cuda_stream(q), qs_rows<const float>(sums), sums->rows,
              sums->cols, norm, is_first, is_last, dm);
    return qs_cuda_launched("magnitude_kernel");
}

/* ---- a linear, and blocks of its tokens ---- */

typedef struct {
    qs_queue *q;
    qs_bordered to;
    qs_mat w, a, b;     /* [out, in], [rank, in], [out, rank] */
    uint8_t *scratch;   /* as core/dora.h cuts it */
    qs_dora_scratch at; /* sizes of its three pieces */
    int64_t rows;       /* of a block, at most */
} dora_linear;

/* Some tokens of one call. */
typedef struct {
    int64_t row0, rows;
    bool is_first, is_last;
    qs_lora lora;
    qs_mat x, xa;
} token_block;

static qs_status open_linear(qs_queue *q, const qs_unit_view *unit, const qs_weight *w,
                             const qs_lora *lora, int64_t rows, dora_linear *l)
{
    const qs_cuda_context *context = qs_cuda_context_of(q);
    if (context == NULL) {
        return QS_ERR_BUG;
    }
    const qs_ops_limits *limits = &context->limits;
    if (context->dora == NULL || rows > limits->tokens || w->out > limits->widest ||
        w->in > limits->widest || lora->rank > limits->lora_rank) {
        return QS_FAIL(QS_ERR_BUG,
                       "DoRA on %lld tokens of a linear of %lld x %lld, rank %d: more than the "
                       "limits say",
                       (long long)rows, (long long)w->out, (long long)w->in, lora->rank);
    }
    l->q = q;
    l->to = qs_bordered_linear(q, unit, w, lora);
    l->a = qs_cuda_lora_a(lora, w->in);
    l->b = qs_cuda_lora_b(lora, w->out);
    if (l->to.linear != NULL) {
        l->a = qs_bordered_part(l->to.linear, w->out, lora->rank, 0, w->in);
        l->b = qs_bordered_part(l->to.linear, 0, w->out, w->in, lora->rank);
    }
    l->scratch = (uint8_t *)context->dora;
    l->at = qs_cuda_dora_pieces(limits);
    l->rows = qs_dora_block_rows(rows);
    return qs_frozen_matrix(q, unit, w, &l->w);
}

static token_block block_at(const dora_linear *l, const qs_lora *lora, const qs_mat *x,
                            const qs_mat *xa, int64_t row0)
{
    token_block t;
    t.row0 = row0;
    t.rows = qs_hd_min(l->rows, x->rows - row0);
    t.is_first = row0 == 0;
    t.is_last = row0 + t.rows == x->rows;
    t.lora = qs_cuda_lora_rows(lora, row0);
    t.x = qs_rows_from(x, row0, t.rows);
    t.xa = qs_rows_from(xa, row0, t.rows);
    return t;
}

/* The scratch for what is multiplied, `cols` columns and the border behind them; for products; for
 * the parts' sums. */
static qs_mat operand_of(const dora_linear *l, int64_t rows, int64_t cols)
{
    return {l->scratch, rows, cols, qs_border_stride(cols, l->to.border), QS_BF16};
}

static qs_mat product_of(const dora_linear *l, int64_t rows, int64_t cols, qs_dtype dtype)
{
    return {l->scratch + l->at.operand, rows, cols, qs_rows_stride(cols), dtype};
}

static qs_mat sums_of(const dora_linear *l, int64_t rows, int64_t cols)
{
    return {l->scratch + l->at.operand + l->at.product, qs_hd_ceil_div(rows, QS_DORA_SUM_ROWS),
            cols, qs_rows_stride(cols), QS_F32};
}

/* d: x itself without dropout. */
static qs_status dropped(const dora_linear *l, const token_block *t, qs_mat *d)
{
    if (!qs_cuda_has_dropout(&t->lora)) {
        *d = t->x;
        return QS_OK;
    }
    *d = operand_of(l, t->rows, t->x.cols);
    return qs_cuda_lora_drop(l->q, &t->lora, &t->x, d);
}

/* z = in W^T + xa B^T, added to z if `accumulate`. */
static qs_status moved_product(const dora_linear *l, const qs_mat *in, const qs_mat *xa,
                               bool accumulate, qs_mat *z)
{
    const qs_mat *start = accumulate ? z : NULL;
    if (qs_bordered_fits(&l->to, in)) {
        const qs_mat wide = qs_columns_of(in, 0, in->cols + l->to.border);
        const qs_mat border = qs_columns_of(in, in->cols, l->to.border);
        const qs_mat w_and_b =
            qs_bordered_part(l->to.linear, 0, l->w.rows, 0, l->w.cols + l->to.border);
        QS_TRY(fill_border(l->q, xa, &border));
        return qs_cuda_multiply(l->q, 1.0f, &wide, false, &w_and_b, true, start, z);
    }
    QS_TRY(qs_cuda_multiply(l->q, 1.0f, in, false, &l->w, true, start, z));
    return qs_cuda_multiply(l->q, 1.0f, xa, false, &l->b, true, z, z);
}

/* ---- forward ---- */

static qs_status forward_block(const dora_linear *l, token_block *t, gain_args end, qs_mat *y)
{
    qs_mat z = product_of(l, t->rows, y->cols, QS_F32), d;
    QS_TRY(dropped(l, t, &d));
    QS_TRY(qs_cuda_multiply(l->q, t->lora.scale, &d, false, &l->a, true, NULL, &t->xa));
    QS_TRY(moved_product(l, &d, &t->xa, false, &z));
    if (qs_cuda_has_dropout(&t->lora)) {
        const gain_args but_one = {t->lora.gain, 1.0f, NULL, NULL};
        QS_TRY((apply_gain<float, float>(l->q, but_one, &z, &z)));
        QS_TRY(moved_product(l, &t->x, &t->xa, true, &z));
        end.gain = NULL;
    }
    return y->dtype == QS_F32 ? apply_gain<float, float>(l->q, end, &z, y)
                              : apply_gain<float, qs_bf16>(l->q, end, &z, y);
}

qs_status qs_cuda_dora_forward(qs_queue *q, const qs_unit_view *unit, const qs_weight *w,
                               const float *bias, const qs_mat *residual, const qs_lora *lora,
                               const qs_mat *x, qs_mat *xa, qs_mat *y)
{
    dora_linear l;
    QS_TRY(open_linear(q, unit, w, lora, x->rows, &l));
    for (int64_t row0 = 0; row0 < x->rows; row0 += l.rows) {
        token_block t = block_at(&l, lora, x, xa, row0);
        qs_mat to = qs_rows_from(y, row0, t.rows), from;
        if (residual != NULL) {
            from = qs_rows_from(residual, row0, t.rows);
        }
        const gain_args end = {lora->gain, 0.0f, bias, residual != NULL ? &from : NULL};
        QS_TRY(forward_block(&l, &t, end, &to));
    }
    return QS_OK;
}

/* ---- backward ---- */

/* s U B: with its padding into U's border, or into `work` without one. */
static qs_status output_gradient_by_b(const dora_linear *l, const token_block *t, const qs_mat *u,
                                      const qs_mat *work, qs_mat *product)
{
    if (!qs_bordered_fits(&l->to, u)) {
        *product = qs_rows_from(work, t->row0, t->rows);
        return qs_cuda_multiply(l->q, t->lora.scale, u, false, &l->b, false, NULL, product);
    }
    const qs_mat b = qs_bordered_part(l->to.linear, 0, l->w.rows, l->w.cols, l->to.border);
    qs_mat border = qs_columns_of(u, u->cols, l->to.border);
    *product = qs_columns_of(u, u->cols, t->lora.rank);
    return qs_cuda_multiply(l->q, t->lora.scale, u, false, &b, false, NULL, &border);
}

/* to = u W + product A, added to `to` if `accumulate`: [u | product] [W ; A] where product stands
 * in u's border. */
static qs_status input_gradient(const dora_linear *l, const qs_mat *u, const qs_mat *product,
                                bool accumulate, qs_mat *to)
{
    const qs_mat *start = accumulate ? to : NULL;
    if (qs_bordered_fits(&l->to, u)) {
        const qs_mat wide = qs_columns_of(u, 0, u->cols + l->to.border);
        const qs_mat w_over_a =
            qs_bordered_part(l->to.linear, 0, l->w.rows + l->to.border, 0, l->w.cols);
        return qs_cuda_multiply(l->q, 1.0f, &wide, false, &w_over_a, false, start, to);
    }
    QS_TRY(qs_cuda_multiply(l->q, 1.0f, u, false, &l->w, false, start, to));
    return qs_cuda_multiply(l->q, 1.0f, product, false, &l->a, false, to, to);
}

/* dx (+)= dY W + mask / (1 - p) (V W + product A); V takes U's place. */
static qs_status masked_input_gradient(const dora_linear *l, const token_block *t, const qs_mat *dy,
                                       const qs_mat *u, const qs_mat *product, bool accumulate,
                                       qs_mat *dx)
{
    const gain_args but_one = {t->lora.gain, 1.0f, NULL, NULL};
    qs_mat sum = product_of(l, t->rows, dx->cols, QS_F32);
    QS_TRY(qs_cuda_multiply(l->q, 1.0f, dy, false, &l->w, false, accumulate ? dx : NULL, dx));
    QS_TRY((apply_gain<qs_bf16, qs_bf16>(l->q, but_one, dy, u)));
    QS_TRY(input_gradient(l, u, product, false, &sum));
    return qs_cuda_lora_add_masked(l->q, &t->lora, &sum, dx);
}

static qs_status gradients_of_block(const dora_linear *l, const token_block *t, const qs_mat *dy,
                                    const qs_mat *work, float *da, float *db, qs_mat *dx,
                                    bool accumulate)
{
    const gain_args gained = {t->lora.gain, 0.0f, NULL, NULL};
    const qs_mat u = operand_of(l, t->rows, dy->cols);
    qs_mat product;
    QS_TRY((apply_gain<qs_bf16, qs_bf16>(l->q, gained, dy, &u)));
    QS_TRY(output_gradient_by_b(l, t, &u, work, &product));
    QS_TRY(qs_cuda_lora_gradients(l->q, &t->lora, 1.0f, 1.0f, &t->x, &t->xa, &u, &product,
                                  !t->is_first, da, db));
    if (dx == NULL) {
        return QS_OK;
    }
    return qs_cuda_has_dropout(&t->lora)
               ? masked_input_gradient(l, t, dy, &u, &product, accumulate, dx)
               : input_gradient(l, &u, &product, accumulate, dx);
}

/* No tokens: nothing to add up. */
static qs_status zero_gradients(qs_queue *q, const qs_weight *w, const qs_lora *lora, float *da,
                                float *db)
{
    QS_TRY(qs_queue_zero(q, da, (size_t)(lora->rank * w->in) * sizeof *da));
    return qs_queue_zero(q, db, (size_t)(w->out * lora->rank) * sizeof *db);
}

qs_status qs_cuda_dora_gradients(qs_queue *q, const qs_unit_view *unit, const qs_weight *w,
                                 const qs_lora *lora, const qs_mat *x, const qs_mat *xa,
                                 const qs_mat *dy, const qs_mat *work, float *da, float *db,
                                 qs_mat *dx, bool accumulate)
{
    dora_linear l;
    if (x->rows == 0) {
        return zero_gradients(q, w, lora, da, db);
    }
    QS_TRY(open_linear(q, unit, w, lora, x->rows, &l));
    for (int64_t row0 = 0; row0 < x->rows; row0 += l.rows) {
        const token_block t = block_at(&l, lora, x, xa, row0);
        const qs_mat from = qs_rows_from(dy, row0, t.rows);
        qs_mat to;
        if (dx != NULL) {
            to = qs_rows_from(dx, row0, t.rows);
        }
        QS_TRY(
            gradients_of_block(&l, &t, &from, work, da, db, dx != NULL ? &to : NULL, accumulate));
    }
    return QS_OK;
}

/* ---- the magnitudes ---- */

extern "C" qs_status qs_cuda_dora_backward(qs_queue *q, const qs_unit_view *unit,
                                           const qs_weight *w, const qs_lora *lora, const qs_mat *x,
                                           const qs_mat *xa, const qs_mat *dy, float *dm)
{
    dora_linear l;
    if (x->rows == 0) {
        return qs_queue_zero(q, dm, (size_t)w->out * sizeof *dm);
    }
    QS_TRY(open_linear(q, unit, w, lora, x->rows, &l));
    for (int64_t row0 = 0; row0 < x->rows; row0 += l.rows) {
        const token_block t = block_at(&l, lora, x, xa, row0);
        const qs_mat from = qs_rows_from(dy, row0, t.rows);
        qs_mat z = product_of(&l, t.rows, w->out, QS_BF16), d;
        const qs_mat sums = sums_of(&l, t.rows, w->out);
        QS_TRY(dropped(&l, &t, &d));
        QS_TRY(moved_product(&l, &d, &t.xa, false, &z));
        columns_launch(q, &from, &z, &sums);
        QS_TRY(magnitude_launch(q, &sums, lora->norm, t.is_first, t.is_last, dm));
    }
    return QS_OK;
}
