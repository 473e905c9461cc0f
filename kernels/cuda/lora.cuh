/* What linear.cu and lora.cu share on the host side: products of matrices, and the four products of
 * an adapter with the scale s wherever it is wanted. */
#ifndef QS_KERNELS_CUDA_LORA_CUH
#define QS_KERNELS_CUDA_LORA_CUH

#include "kernels/cuda/cuda_impl.cuh"

/** c = alpha op(a) op(b) + c0; c0 NULL: nothing is added. */
qs_status qs_cuda_multiply(qs_queue *q, float alpha, const qs_mat *a, bool a_transposed,
                           const qs_mat *b, bool b_transposed, const qs_mat *c0, qs_mat *c);

/** y = drop(x), with dropout. */
qs_status qs_cuda_lora_drop(qs_queue *q, const qs_lora *lora, const qs_mat *x, const qs_mat *y);

/** dx += product * mask / (1 - p), with dropout; product in fp32. */
qs_status qs_cuda_lora_add_masked(qs_queue *q, const qs_lora *lora, const qs_mat *product,
                                  const qs_mat *dx);

/** drop(x): x itself without dropout, else written to context->lora, where it lies until the next
 * call of this or of qs_cuda_lora_input_gradient. */
qs_status qs_cuda_lora_input(qs_queue *q, const qs_lora *lora, const qs_mat *x, qs_mat *input);

/** dx += scale (work A) * mask / (1 - p), no mask without dropout. */
qs_status qs_cuda_lora_input_gradient(qs_queue *q, const qs_lora *lora, float scale,
                                      const qs_mat *work, qs_mat *dx);

/** Both products of the forward: xa = first * drop(x) A^T; y += second * xa B^T. */
qs_status qs_cuda_lora_add(qs_queue *q, const qs_lora *lora, float first, float second,
                           const qs_mat *x, qs_mat *xa, qs_mat *y);

/** The gradients of A and B: da = a_scale * work^T drop(x), db = b_scale * dy^T xa; added to da and
 * db if `accumulate`. */
qs_status qs_cuda_lora_gradients(qs_queue *q, const qs_lora *lora, float a_scale, float b_scale,
                                 const qs_mat *x, const qs_mat *xa, const qs_mat *dy,
                                 const qs_mat *work, bool accumulate, float *da, float *db);

/** The adapter's matrices, A [rank, in] and B [out, rank]. */
static inline qs_mat qs_cuda_lora_a(const qs_lora *lora, int64_t in)
{
    return {const_cast<void *>(lora->a), lora->rank, in, in, QS_BF16};
}

static inline qs_mat qs_cuda_lora_b(const qs_lora *lora, int64_t out)
{
    return {const_cast<void *>(lora->b), out, lora->rank, lora->rank, QS_BF16};
}

/** The adapter for rows from `row0` on. */
static inline qs_lora qs_cuda_lora_rows(const qs_lora *lora, int64_t row0)
{
    qs_lora part = *lora;
    if (lora->dropout > 0.0f) {
        part.sample += row0;
        part.row_at += row0;
    }
    return part;
}

static inline bool qs_cuda_has_dropout(const qs_lora *lora)
{
    return lora->dropout > 0.0f;
}

#endif
