/* The bordered matrix of an opened linear (core/border.h) and its parts as matrices: what linear.cu
 * and dora.cu share on the host side. */
#ifndef QS_KERNELS_CUDA_BORDERED_CUH
#define QS_KERNELS_CUDA_BORDERED_CUH

#include "kernels/cuda/core/border.h"
#include "kernels/cuda/cuda_impl.cuh"

extern "C" {
#include "base/dtype.h"
}

typedef struct {
    const qs_cuda_linear *linear; /* NULL: the plain way */
    int64_t border;
} qs_bordered;

/** The linear of an opened unit, if its adapter stands in the border of a matrix of its own. */
static inline qs_bordered qs_bordered_linear(qs_queue *q, const qs_unit_view *unit,
                                             const qs_weight *w, const qs_lora *lora)
{
    qs_bordered found = {NULL, 0};
    const qs_cuda_context *context = qs_cuda_context_of(q);
    if (context == NULL || lora->a == NULL) {
        return found;
    }
    const qs_cuda_linear *linear = qs_cuda_opened(context, unit, w);
    found.border = qs_border_width(context->limits.lora_rank);
    if (linear != NULL && linear->joined == 1 && linear->rank == lora->rank) {
        found.linear = linear;
    }
    return found;
}

/** Has `mat`, which the linear is to multiply, a border, too? */
static inline bool qs_bordered_fits(const qs_bordered *to, const qs_mat *mat)
{
    return to->linear != NULL &&
           qs_border_usable((uintptr_t)mat->data, mat->cols, mat->stride, to->border);
}

/** Rows and columns of the bordered matrix that begins with this linear. */
static inline qs_mat qs_bordered_part(const qs_cuda_linear *linear, int64_t row, int64_t rows,
                                      int64_t col, int64_t cols)
{
    qs_bf16 *data = (qs_bf16 *)linear->matrix + row * linear->stride + col;
    return {data, rows, cols, linear->stride, QS_BF16};
}

/** A weight as a matrix [out, in]: of the opened unit, or decoded for this call. */
static inline qs_status qs_frozen_matrix(qs_queue *q, const qs_unit_view *unit, const qs_weight *w,
                                         qs_mat *matrix)
{
    const void *data;
    *matrix = {NULL, w->out, w->in, 0, QS_BF16};
    QS_TRY(qs_cuda_weight_matrix(q, unit, w, &data, &matrix->stride));
    matrix->data = const_cast<void *>(data);
    return QS_OK;
}

/** `cols` columns of a matrix's rows from `col` on, which may lie behind its own. */
static inline qs_mat qs_columns_of(const qs_mat *mat, int64_t col, int64_t cols)
{
    qs_mat part = *mat;
    part.data = (qs_bf16 *)mat->data + col;
    part.cols = cols;
    return part;
}

/** `rows` rows of a matrix from `row0` on. */
static inline qs_mat qs_rows_from(const qs_mat *mat, int64_t row0, int64_t rows)
{
    qs_mat part = *mat;
    part.data = (uint8_t *)mat->data + row0 * mat->stride * (int64_t)qs_dtype_bytes(mat->dtype);
    part.rows = rows;
    return part;
}

#endif
