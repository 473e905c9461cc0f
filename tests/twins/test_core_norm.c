/* How RMSNorm shares a row (kernels/cuda/core/norm.h). */
#include <criterion/criterion.h>
#include <stdlib.h>

#include "kernels/cuda/core/norm.h"

static void check_plan(int64_t cols)
{
    const qs_norm_plan p = qs_norm_plan_make(cols);
    cr_assert(p.vectors == 1 || p.vectors == 2 || p.vectors == 4, "%lld columns: %d vectors",
              (long long)cols, p.vectors);
    if (cols <= QS_NORM_SHORT) {
        cr_assert(p.vectors == 1 && p.threads == QS_NORM_THREADS);
        cr_assert(p.lanes == 8 || p.lanes == 16 || p.lanes == 32);
    } else { /* the launches of rmsnorm.cu are compiled for these */
        cr_assert(p.lanes == p.threads && p.threads % 32 == 0);
        cr_assert_leq(p.threads, p.vectors < 4 ? QS_NORM_THREADS : QS_NORM_THREADS_MAX);
    }
    uint8_t *visits = calloc((size_t)cols + QS_VECTOR, 1);
    cr_assert_not_null(visits);
    for (int lane = 0; lane < p.lanes; lane++) {
        for (int k = 0; k < p.vectors; k++) {
            const int64_t column = qs_norm_column(p.lanes, lane, k);
            for (int i = 0; i < QS_VECTOR && column + i < cols; i++) {
                visits[column + i]++;
            }
        }
    }
    for (int64_t i = 0; i < cols; i++) {
        cr_assert_eq(visits[i], 1, "%lld columns: column %lld is held %d times", (long long)cols,
                     (long long)i, visits[i]);
    }
    free(visits);
}

Test(core_norm, lanes_hold_every_column_once)
{
    for (int64_t cols = 1; cols <= 9000; cols++) {
        check_plan(cols);
    }
    for (int64_t cols = QS_NORM_COLS_MAX; cols > QS_NORM_COLS_MAX - 300; cols--) {
        check_plan(cols);
        check_plan(cols / 2);
    }
}

Test(core_norm, wide_models_keep_their_warps_busy)
{
    const int64_t hidden[] = {576, 896, 2048, 2560, 3072, 4096, 5120, 8192, 16384};
    for (size_t i = 0; i < sizeof hidden / sizeof *hidden; i++) {
        const qs_norm_plan p = qs_norm_plan_make(hidden[i]);
        const int64_t places = (int64_t)p.lanes * p.vectors * QS_VECTOR;
        cr_assert_lt(places - hidden[i], (int64_t)32 * p.vectors * QS_VECTOR,
                     "%lld columns in %lld places: less than a warp's are idle",
                     (long long)hidden[i], (long long)places);
    }
}
