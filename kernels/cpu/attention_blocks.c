/* Blocks of a head in a thread's cache, and their products on the register tile. */
#include "kernels/cpu/attention_impl.h"
#include "kernels/cpu/parallel.h"

enum { TURN_LANES = 16 };

static const float *head_at(const qs_attention_plan *plan, const qs_mat *mat, int64_t row, int head)
{
    return qs_mat_f32(mat) + row * mat->stride + (int64_t)head * plan->shape->head_dim;
}

void qs_block_copy(const qs_attention_plan *plan, const qs_mat *mat, int64_t row, int64_t rows,
                   int head, float *copy)
{
    const float *from = head_at(plan, mat, row, head);
    const int64_t dim = plan->shape->head_dim;
    const int64_t read = qs_ceil_div(dim, QS_GEMM_NR_MAX) * QS_GEMM_NR_MAX;
    for (int64_t i = 0; i < rows; i++) {
        memcpy(copy, from, (size_t)dim * sizeof *copy);
        for (int64_t j = dim; j < read; j++) {
            copy[j] = 0.0F;
        }
        from += mat->stride;
        copy += plan->copy_stride;
    }
}

void qs_block_turn(const qs_attention_plan *plan, const qs_mat *mat, int64_t row, int64_t rows,
                   int head, float *turned)
{
    const float *from = head_at(plan, mat, row, head);
    const int64_t read = qs_ceil_div(rows, QS_GEMM_NR_MAX) * QS_GEMM_NR_MAX;
    for (int64_t i = 0; i < read; i += TURN_LANES) {
        int64_t left = qs_min_i64(TURN_LANES, rows - i);
        qs_isa_get()->transpose(from + i * mat->stride, mat->stride, left > 0 ? (int)left : 0,
                                plan->shape->head_dim, turned + i, QS_ATTENTION_TURNED, TURN_LANES);
    }
}

void qs_block_multiply(int64_t m, int64_t n, int64_t k, qs_block left, const float *right,
                       int64_t right_stride, float *c, int64_t c_stride, bool accumulate)
{
    const qs_isa *isa = qs_isa_get();
    const int64_t row_step = left.in_columns ? 1 : left.stride;
    const int64_t k_step = left.in_columns ? left.stride : 1;
    for (int64_t k0 = 0; k0 < k; k0 += QS_GEMM_KC) {
        int64_t depth = qs_min_i64(QS_GEMM_KC, k - k0);
        const float *a = left.data + k0 * k_step, *b = right + k0 * right_stride;
        for (int64_t j = 0; j < n; j += isa->nr) {
            int cols = (int)qs_min_i64(isa->nr, n - j);
            for (int64_t i = 0; i < m; i += isa->mr) {
                isa->tile_plain((int)qs_min_i64(isa->mr, m - i), cols, depth, a + i * row_step,
                                left.stride, left.in_columns, b + j, right_stride,
                                c + i * c_stride + j, c_stride, accumulate || k0 > 0);
            }
        }
    }
}
