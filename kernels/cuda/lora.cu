/* LoRA (Hu et al. 2021, arXiv:2106.09685) beside a linear: products of rank r by cuBLASLt, and
 * dropout by two kernels whose mask is a function of (seed, step, sample, row, feature) alone
 * (core/philox.h), so that it is never stored.
 *
 * Roundings, besides the fp32 sums of the products:
 *     drop(x) = x / (1 - p) to bf16; xa and work to bf16; y, and dx, to bf16 once more, and with
 *     some of cuBLASLt's kernels their product before it is added;
 *     the masked gradient is added from an fp32 product: no rounding between.
 *
 * dropout_kernel reads 2 and writes 2 B an element, masked_add_kernel reads 6 and writes 2 B; both
 * draw a quarter of a Philox block (10 rounds, about 100 instructions) an element, and an eighth
 * for the row's key: near 40 instructions an element, as long as the memory takes on an H100.
 *
 * Registers on sm_80, 86, 89, 90a, 100, 120; no shared memory, no spills:
 *     dropout_kernel 1, 8      26 28 28 26 22 26, 38 34 34 36 38 32
 *     masked_add_kernel 1, 8   26 28 28 26 26 28, 42 44 44 40 40 46
 */
#include "kernels/cuda/lora.cuh"

#include "kernels/cuda/bordered.cuh"
#include "kernels/cuda/core/philox.h"
#include "kernels/cuda/vector.cuh"

/* ---- products ---- */

qs_status qs_cuda_multiply(qs_queue *q, float alpha, const qs_mat *a, bool a_transposed,
                           const qs_mat *b, bool b_transposed, const qs_mat *c0, qs_mat *c)
{
    qs_gemm_call call;
    call.m = c->rows;
    call.n = c->cols;
    call.k = a_transposed ? a->rows : a->cols;
    if ((a_transposed ? a->cols : a->rows) != call.m ||
        (b_transposed ? b->rows : b->cols) != call.n ||
        (b_transposed ? b->cols : b->rows) != call.k) {
        return QS_FAIL(QS_ERR_BUG, "a product of %lld x %lld and %lld x %lld to %lld x %lld",
                       (long long)a->rows, (long long)a->cols, (long long)b->rows,
                       (long long)b->cols, (long long)c->rows, (long long)c->cols);
    }
    call.alpha = alpha;
    call.a = a->data;
    call.b = b->data;
    call.a_stride = a->stride;
    call.b_stride = b->stride;
    call.a_transposed = a_transposed;
    call.b_transposed = b_transposed;
    call.c0 = c0 != NULL ? c0->data : NULL;
    call.c0_stride = c0 != NULL ? c0->stride : 0;
    call.c = c->data;
    call.c_stride = c->stride;
    call.c_dtype = c->dtype;
    return qs_cuda_gemm(q, &call);
}

/* ---- dropout ---- */

typedef struct {
    uint64_t seed, step;
    uint32_t site, layer;
    float p, scale;
    int64_t width;
    const int64_t *sample, *row_at;
} noise;

static noise noise_of(const qs_lora *lora, int64_t width)
{
    noise n;
    n.seed = lora->seed;
    n.step = lora->step;
    n.site = lora->site;
    n.layer = lora->layer;
    n.p = lora->dropout;
    n.scale = qs_dropout_scale(lora->dropout);
    n.width = width;
    n.sample = lora->sample;
    n.row_at = lora->row_at;
    return n;
}

/* The mask applied to WIDTH elements of row `t` from `column` on; 8 elements begin on a multiple of
 * 8. Not x * 0: a dropped element is 0 whatever it was. */
template <int WIDTH>
static __device__ __forceinline__ void drop(const noise &n, int64_t t, int64_t column,
                                            float x[WIDTH])
{
    const qs_philox_rng rng =
        qs_philox_rng_make(n.seed, n.step, (uint64_t)n.sample[t], n.site, n.layer);
    const uint64_t element = (uint64_t)(n.row_at[t] * n.width + column);
    if constexpr (WIDTH == 1) {
        x[0] = qs_dropout_keeps(qs_philox_u32(&rng, element), n.p) ? x[0] * n.scale : 0.0f;
    } else {
#pragma unroll
        for (int i = 0; i < WIDTH; i += 4) {
            const qs_philox words = qs_philox_block(&rng, element / 4 + i / 4);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                x[i + j] = qs_dropout_keeps(words.word[j], n.p) ? x[i + j] * n.scale : 0.0f;
            }
        }
    }
}

template <int WIDTH>
__global__ void __launch_bounds__(QS_ROW_THREADS)
    dropout_kernel(noise n, qs_rows_of<const qs_bf16> x, qs_rows_of<qs_bf16> y, qs_row_tiles tiles)
{
    qs_for_groups<WIDTH>(tiles, [&](int64_t t, int64_t column) {
        float value[WIDTH];
        qs_load<WIDTH>(value, x.data + t * x.stride + column);
        drop<WIDTH>(n, t, column, value);
        qs_store<WIDTH>(y.data + t * y.stride + column, value);
    });
}

template <int WIDTH>
__global__ void __launch_bounds__(QS_ROW_THREADS)
    masked_add_kernel(noise n, qs_rows_of<const float> product, qs_rows_of<qs_bf16> dx,
                      qs_row_tiles tiles)
{
    qs_for_groups<WIDTH>(tiles, [&](int64_t t, int64_t column) {
        float value[WIDTH], sum[WIDTH];
        qs_load<WIDTH>(value, product.data + t * product.stride + column);
        qs_load<WIDTH>(sum, dx.data + t * dx.stride + column);
        drop<WIDTH>(n, t, column, value);
        for (int i = 0; i < WIDTH; i++) {
            sum[i] += value[i];
        }
        qs_store<WIDTH>(dx.data + t * dx.stride + column, sum);
    });
}

qs_status qs_cuda_lora_drop(qs_queue *q, const qs_lora *lora, const qs_mat *x, const qs_mat *y)
{
    const bool vectors = qs_mat_is_vectors(x) && qs_mat_is_vectors(y);
    const qs_row_tiles tiles = qs_row_tiles_make(x->rows, vectors ? x->cols / QS_VECTOR : x->cols);
    const noise n = noise_of(lora, x->cols);
    if (vectors) {
        QS_LAUNCH((dropout_kernel<QS_VECTOR>), qs_row_grid(tiles), QS_ROW_THREADS, 0,
                  qs_cuda_stream(q), n, qs_rows<const qs_bf16>(x), qs_rows<qs_bf16>(y), tiles);
    } else {
        QS_LAUNCH((dropout_kernel<1>), qs_row_grid(tiles), QS_ROW_THREADS, 0, qs_cuda_stream(q), n,
                  qs_rows<const qs_bf16>(x), qs_rows<qs_bf16>(y), tiles);
    }
    return qs_cuda_launched("dropout_kernel");
}

qs_status qs_cuda_lora_add_masked(qs_queue *q, const qs_lora *lora, const qs_mat *product,
                                  const qs_mat *dx)
{
    const bool vectors = qs_mat_is_vectors(product) && qs_mat_is_vectors(dx);
    const qs_row_tiles tiles =
        qs_row_tiles_make(dx->rows, vectors ? dx->cols / QS_VECTOR : dx->cols);
    const noise n = noise_of(lora, dx->cols);
    if (vectors) {
        QS_LAUNCH((masked_add_kernel<QS_VECTOR>), qs_row_grid(tiles), QS_ROW_THREADS, 0,
                  qs_cuda_stream(q), n, qs_rows<const float>(product), qs_rows<qs_bf16>(dx), tiles);
    } else {
        QS_LAUNCH((masked_add_kernel<1>), qs_row_grid(tiles), QS_ROW_THREADS, 0, qs_cuda_stream(q),
                  n, qs_rows<const float>(product), qs_rows<qs_bf16>(dx), tiles);
    }
    return qs_cuda_launched("masked_add_kernel");
}

/* ---- scratch: drop(x) in bf16, or as many rows of an fp32 product as fit in its place ---- */

/* A matrix of `width` columns in the scratch, with as many of `rows` rows as fit. */
static qs_status scratch_matrix(qs_queue *q, int64_t rows, int64_t width, qs_dtype dtype,
                                qs_mat *out)
{
    const qs_cuda_context *context = qs_cuda_context_of(q);
    if (context == NULL) {
        return QS_ERR_BUG;
    }
    const int64_t row_bytes = qs_rows_stride(width) * (int64_t)qs_dtype_bytes(dtype);
    const int64_t fit = (int64_t)context->lora_bytes / row_bytes;
    *out = {context->lora, qs_hd_min(rows, fit), width, qs_rows_stride(width), dtype};
    if (fit == 0) {
        return QS_FAIL(QS_ERR_BUG, "dropout on %lld columns, which the limits do not know of",
                       (long long)width);
    }
    return QS_OK;
}

/* ---- an adapter's products ---- */

qs_status qs_cuda_lora_input(qs_queue *q, const qs_lora *lora, const qs_mat *x, qs_mat *input)
{
    if (!qs_cuda_has_dropout(lora) || x->rows == 0) {
        *input = *x;
        return QS_OK;
    }
    QS_TRY(scratch_matrix(q, x->rows, x->cols, QS_BF16, input));
    if (input->rows < x->rows) {
        return QS_FAIL(QS_ERR_BUG, "dropout on %lld rows, more than the limits say",
                       (long long)x->rows);
    }
    return qs_cuda_lora_drop(q, lora, x, input);
}

/* A block of rows at a time: the product in fp32, then its masked elements to dx. */
static qs_status add_masked_product(qs_queue *q, const qs_lora *lora, float scale,
                                    const qs_mat *work, const qs_mat *a, const qs_mat *dx)
{
    qs_mat product;
    QS_TRY(scratch_matrix(q, dx->rows, dx->cols, QS_F32, &product));
    const int64_t block = product.rows;
    for (int64_t row0 = 0; row0 < dx->rows; row0 += block) {
        product.rows = qs_hd_min(block, dx->rows - row0);
        const qs_mat work_part = qs_rows_from(work, row0, product.rows);
        const qs_mat dx_part = qs_rows_from(dx, row0, product.rows);
        const qs_lora lora_part = qs_cuda_lora_rows(lora, row0);
        QS_TRY(qs_cuda_multiply(q, scale, &work_part, false, a, false, NULL, &product));
        QS_TRY(qs_cuda_lora_add_masked(q, &lora_part, &product, &dx_part));
    }
    return QS_OK;
}

qs_status qs_cuda_lora_input_gradient(qs_queue *q, const qs_lora *lora, float scale,
                                      const qs_mat *work, qs_mat *dx)
{
    const qs_mat a = qs_cuda_lora_a(lora, dx->cols);
    if (dx->rows == 0) {
        return QS_OK;
    }
    if (qs_cuda_has_dropout(lora)) {
        return add_masked_product(q, lora, scale, work, &a, dx);
    }
    return qs_cuda_multiply(q, scale, work, false, &a, false, dx, dx);
}

qs_status qs_cuda_lora_add(qs_queue *q, const qs_lora *lora, float first, float second,
                           const qs_mat *x, qs_mat *xa, qs_mat *y)
{
    const qs_mat a = qs_cuda_lora_a(lora, x->cols);
    const qs_mat b = qs_cuda_lora_b(lora, y->cols);
    qs_mat input;
    QS_TRY(qs_cuda_lora_input(q, lora, x, &input));
    QS_TRY(qs_cuda_multiply(q, first, &input, false, &a, true, NULL, xa));
    return qs_cuda_multiply(q, second, xa, false, &b, true, y, y);
}

qs_status qs_cuda_lora_gradients(qs_queue *q, const qs_lora *lora, float a_scale, float b_scale,
                                 const qs_mat *x, const qs_mat *xa, const qs_mat *dy,
                                 const qs_mat *work, bool accumulate, float *da, float *db)
{
    qs_mat a_gradient = {da, lora->rank, x->cols, x->cols, QS_F32};
    qs_mat b_gradient = {db, dy->cols, lora->rank, lora->rank, QS_F32};
    qs_mat input;
    QS_TRY(qs_cuda_lora_input(q, lora, x, &input));
    QS_TRY(qs_cuda_multiply(q, a_scale, work, true, &input, false, accumulate ? &a_gradient : NULL,
                            &a_gradient));
    return qs_cuda_multiply(q, b_scale, dy, true, xa, false, accumulate ? &b_gradient : NULL,
                            &b_gradient);
}

/* ---- the operations: s with the second product, so that xa = A drop(x) and work = dy B ---- */

extern "C" qs_status qs_cuda_lora_forward(qs_queue *q, const qs_lora *lora, const qs_mat *x,
                                          qs_mat *xa, qs_mat *y)
{
    if (lora->a == NULL || x->rows == 0) {
        return QS_OK;
    }
    return qs_cuda_lora_add(q, lora, 1.0f, lora->scale, x, xa, y);
}

extern "C" qs_status qs_cuda_lora_backward(qs_queue *q, const qs_lora *lora, const qs_mat *x,
                                           const qs_mat *xa, const qs_mat *dy, qs_mat *work,
                                           float *da, float *db, qs_mat *dx)
{
    if (lora->a == NULL) {
        return QS_OK;
    }
    const qs_mat b = qs_cuda_lora_b(lora, dy->cols);
    QS_TRY(qs_cuda_multiply(q, 1.0f, dy, false, &b, false, NULL, work));
    QS_TRY(
        qs_cuda_lora_gradients(q, lora, lora->scale, lora->scale, x, xa, dy, work, false, da, db));
    return dx == NULL ? QS_OK : qs_cuda_lora_input_gradient(q, lora, lora->scale, work, dx);
}
