/* Blocks of a head in a thread's cache, and their products on the register tile. */
#include "kernels/cpu/attention_impl.h"
#include "kernels/cpu/parallel.h"

enum { TURN_LANES = 16, TURN_DIMS = 128 /* that are rounded at once */ };

static const float *head_at(const qs_attention_plan *plan, const qs_mat *mat, int64_t row, int head)
{
    return qs_mat_f32(mat) + row * mat->stride + (int64_t)head * plan->shape->head_dim;
}

static uint32_t *words_in(float *words)
{
    return (uint32_t *)(void *)words;
}

/* Rows as words along them, at the same stride. */
static void round_rows(const qs_pairs *pairs, const float *from, int64_t stride, int64_t rows,
                       int64_t cols, float *words, int64_t words_stride)
{
    for (int64_t i = 0; i < rows; i++) {
        pairs->round(from + i * stride, cols, words_in(words + i * words_stride));
    }
}

/* Rows as words across two of them each; below an odd last one there are zeros. */
static void zip_rows(const qs_pairs *pairs, const float *from, int64_t stride, int64_t rows,
                     int64_t cols, float *words, int64_t words_stride)
{
    for (int64_t i = 0; i < rows; i += 2, from += 2 * stride, words += words_stride) {
        for (int64_t j = 0; j < cols; j += QS_ATTENTION_OWN) {
            uint32_t along[2][QS_ATTENTION_OWN / 2] = {{0}};
            const int64_t count = qs_min_i64(QS_ATTENTION_OWN, cols - j);
            pairs->round(from + j, count, along[0]);
            if (i + 1 < rows) {
                pairs->round(from + stride + j, count, along[1]);
            }
            pairs->zip(along[0], along[1], count, words_in(words + j));
        }
    }
}

/* Zeros behind rows of head_dim, up to what a tile reads. */
static void fill_up(const qs_attention_plan *plan, int64_t rows, float *copy)
{
    const int64_t dim = plan->shape->head_dim;
    const int64_t read = qs_ceil_div(dim, QS_GEMM_NR_MAX) * QS_GEMM_NR_MAX;
    for (int64_t i = 0; i < rows && read > dim; i++) {
        memset(copy + i * plan->copy_stride + dim, 0, (size_t)(read - dim) * sizeof *copy);
    }
}

void qs_block_copy(const qs_attention_plan *plan, const qs_mat *mat, int64_t row, int64_t rows,
                   int head, float *copy)
{
    const float *from = head_at(plan, mat, row, head);
    const int64_t dim = plan->shape->head_dim;
    if (plan->pairs != NULL) {
        round_rows(plan->pairs, from, mat->stride, rows, dim, copy, plan->copy_stride);
        return;
    }
    for (int64_t i = 0; i < rows; i++) {
        memcpy(copy + i * plan->copy_stride, from + i * mat->stride, (size_t)dim * sizeof *copy);
    }
    fill_up(plan, rows, copy);
}

const float *qs_block_right(const qs_attention_plan *plan, const qs_mat *mat, int64_t row,
                            int64_t rows, int head, const float *copy, float *space)
{
    if (plan->pairs == NULL) {
        if (copy == NULL) {
            qs_block_copy(plan, mat, row, rows, head, space);
        }
        return copy != NULL ? copy : space;
    }
    zip_rows(plan->pairs, head_at(plan, mat, row, head), mat->stride, rows, plan->shape->head_dim,
             space, plan->copy_stride);
    fill_up(plan, qs_ceil_div(rows, 2), space);
    return space;
}

/* At most TURN_LANES rows. */
static void turn_rows(const qs_attention_plan *plan, const float *from, int64_t stride, int rows,
                      float *turned)
{
    const int64_t dim = plan->shape->head_dim;
    if (plan->pairs == NULL) {
        plan->isa->transpose(from, stride, rows, dim, turned, QS_ATTENTION_TURNED, TURN_LANES);
        return;
    }
    for (int64_t d = 0; d < dim; d += TURN_DIMS) {
        float words[TURN_LANES * TURN_DIMS / 2];
        const int64_t here = qs_min_i64(TURN_DIMS, dim - d);
        round_rows(plan->pairs, from + d, stride, rows, here, words, TURN_DIMS / 2);
        plan->isa->transpose(words, TURN_DIMS / 2, rows, qs_ceil_div(here, 2),
                             turned + d / 2 * QS_ATTENTION_TURNED, QS_ATTENTION_TURNED, TURN_LANES);
    }
}

void qs_block_turn(const qs_attention_plan *plan, const qs_mat *mat, int64_t row, int64_t rows,
                   int head, float *turned)
{
    const float *from = head_at(plan, mat, row, head);
    const int64_t read = qs_ceil_div(rows, QS_GEMM_NR_MAX) * QS_GEMM_NR_MAX;
    for (int64_t i = 0; i < read; i += TURN_LANES) {
        const int here = (int)(rows > i ? qs_min_i64(TURN_LANES, rows - i) : 0);
        turn_rows(plan, from + i * mat->stride, mat->stride, here, turned + i);
    }
}

qs_block qs_block_scores(const qs_attention_plan *plan, const float *scores, int64_t stride,
                         int64_t rows, int64_t cols, float *space)
{
    if (plan->pairs == NULL) {
        return (qs_block){scores, stride, false};
    }
    round_rows(plan->pairs, scores, stride, rows, cols, space, stride);
    return (qs_block){space, stride, false};
}

qs_block qs_block_scores_turned(const qs_attention_plan *plan, const float *scores, int64_t stride,
                                int64_t rows, int64_t cols, float *space)
{
    if (plan->pairs == NULL) {
        return (qs_block){scores, stride, true};
    }
    zip_rows(plan->pairs, scores, stride, rows, cols, space, stride);
    return (qs_block){space, stride, true};
}

/* One tile of either kind. */
static void tile(const qs_attention_plan *plan, int rows, int cols, int64_t depth, const float *a,
                 qs_block left, const float *b, int64_t b_stride, float *c, int64_t c_stride,
                 bool accumulate)
{
    if (plan->pairs == NULL) {
        plan->isa->tile_plain(rows, cols, depth, a, left.stride, left.in_columns, b, b_stride, c,
                              c_stride, accumulate);
    } else {
        plan->pairs->tile_plain(rows, cols, depth, (const uint32_t *)(const void *)a, left.stride,
                                left.in_columns, (const uint32_t *)(const void *)b, b_stride, c,
                                c_stride, accumulate);
    }
}

void qs_block_multiply(const qs_attention_plan *plan, int64_t m, int64_t n, int64_t k,
                       qs_block left, const float *right, int64_t right_stride, float *c,
                       int64_t c_stride, bool accumulate)
{
    const qs_pairs *pairs = plan->pairs;
    const int64_t mr = pairs != NULL ? pairs->mr : plan->isa->mr;
    const int64_t nr = pairs != NULL ? pairs->nr : plan->isa->nr;
    const int64_t per_word = pairs != NULL ? 2 : 1, step = QS_GEMM_KC / per_word;
    const int64_t row_step = left.in_columns ? 1 : left.stride;
    const int64_t k_step = left.in_columns ? left.stride : 1, words = qs_ceil_div(k, per_word);
    const unsigned mode = pairs != NULL ? pairs->begin() : 0;
    for (int64_t k0 = 0; k0 < words; k0 += step) {
        const int64_t depth = qs_min_i64(step, words - k0);
        const float *a = left.data + k0 * k_step, *b = right + k0 * right_stride;
        for (int64_t j = 0; j < n; j += nr) {
            int cols = (int)qs_min_i64(nr, n - j);
            for (int64_t i = 0; i < m; i += mr) {
                tile(plan, (int)qs_min_i64(mr, m - i), cols, depth, a + i * row_step, left, b + j,
                     right_stride, c + i * c_stride + j, c_stride, accumulate || k0 > 0);
            }
        }
    }
    if (pairs != NULL) {
        pairs->end(mode);
    }
}
