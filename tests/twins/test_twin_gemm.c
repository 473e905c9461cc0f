/* The matrix products of every backend that has some of its own: on the CPU they are inside the
 * operations. */
#include <criterion/criterion.h>

#include "gemm_checks.h"

static void open_queue(const tw_backend *b)
{
    const qs_ops_limits limits = {.threads = 2,
                                  .tokens = 64,
                                  .documents = 1,
                                  .loss_rows = 1,
                                  .widest = 64,
                                  .n_heads = 1,
                                  .n_kv_heads = 1,
                                  .head_dim = 16,
                                  .hidden = 16,
                                  .head_rows = 16};
    tw_open(b, &limits);
}

static void on_each(void (*test)(const tw_backend *b))
{
    tw_backend backends[TW_BACKENDS_MAX];
    const int count = tw_backends(backends);
    for (int i = 0; i < count; i++) {
        if (backends[i].plugin != NULL) {
            open_queue(&backends[i]);
            test(&backends[i]);
            backends[i].ops->close(backends[i].queue);
        }
    }
    tw_backends_close(backends, count);
}

Test(twin_gemm, products_are_right_for_every_layout)
{
    on_each(gemm_check_layouts);
}

Test(twin_gemm, long_sums_stay_in_fp32)
{
    on_each(gemm_check_long_sums);
}

Test(twin_gemm, nothing_to_multiply_leaves_c0_or_zeros)
{
    on_each(gemm_check_zeros);
}

Test(twin_gemm, many_shapes_one_after_the_other)
{
    on_each(gemm_check_many_shapes);
}

Test(twin_gemm, wrong_sizes_are_our_own_mistake)
{
    on_each(gemm_check_mistakes);
}
