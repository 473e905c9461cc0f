/* kernels/cuda/gemm_lt.c where no GPU is: behind it stands a cuBLASLt of our own on the host's
 * memory (fake_cublaslt.c), column-major as the real one, which checks what it is told. */
#include <criterion/criterion.h>
#include <stdlib.h>

#include "fake_cublaslt.h"
#include "gemm_checks.h"

static const qs_plugin plugin = {.abi = QS_PLUGIN_ABI, .name = "fake", .gemm = qs_cuda_gemm};

static qs_cuda_context context;
static tw_backend backend;

/* In context.c's place. */
qs_cuda_context *qs_cuda_context_of(qs_queue *q)
{
    return q->kernels;
}

static void setup(void)
{
    backend = (tw_backend){.name = "fake", .device = qs_device_cpu(), .plugin = &plugin};
    backend.ops = qs_ops_cpu();
    cr_assert_eq(qs_queue_create(&backend.queue, 1), QS_OK);
    context = (qs_cuda_context){.gemm_workspace_bytes = qs_cuda_gemm_workspace_bytes()};
    context.gemm_workspace = malloc(context.gemm_workspace_bytes);
    cr_assert_not_null(context.gemm_workspace);
    fake_lt = (fake_lt_state){.workspace = context.gemm_workspace,
                              .workspace_bytes = context.gemm_workspace_bytes};
    cr_assert_eq(qs_cuda_gemm_open(backend.queue, &context), QS_OK);
    backend.queue->kernels = &context;
}

static void teardown(void)
{
    qs_cuda_gemm_close(&context);
    cr_assert_eq(fake_lt.handles, 0);
    free(context.gemm_workspace);
    qs_queue_destroy(backend.queue);
}

TestSuite(gemm_lt, .init = setup, .fini = teardown);

Test(gemm_lt, products_are_right_for_every_layout)
{
    gemm_check_layouts(&backend);
}

Test(gemm_lt, long_sums_stay_in_fp32)
{
    gemm_check_long_sums(&backend);
}

Test(gemm_lt, nothing_to_multiply_leaves_c0_or_zeros)
{
    gemm_check_zeros(&backend);
    cr_assert_eq(fake_lt.products, 0);
}

Test(gemm_lt, every_shape_is_asked_for_once)
{
    gemm_check_many_shapes(&backend);
    cr_assert_eq(fake_lt.questions, 300);
    cr_assert_eq(fake_lt.products, 2 * 2 * 300);
}

Test(gemm_lt, wrong_sizes_are_our_own_mistake)
{
    gemm_check_mistakes(&backend);
    cr_assert_eq(fake_lt.products, 0);
}

/* Lists of what the library may propose: what rounds between its sums, or adds in place, is passed
 * over. */
Test(gemm_lt, an_algorithm_that_adds_out_of_order_is_not_taken)
{
    float x[64] = {0};
    void *bf16 = tw_upload(&backend, x, sizeof x);
    const qs_gemm_call call = {.m = 4,
                               .n = 4,
                               .k = 4,
                               .alpha = 1.0F,
                               .a = bf16,
                               .b = bf16,
                               .a_stride = 8,
                               .b_stride = 8,
                               .c = x,
                               .c_stride = 8,
                               .c_dtype = QS_F32};
    fake_lt.only_in_place = true;
    cr_assert_eq(qs_cuda_gemm(backend.queue, &call), QS_ERR_DEVICE);
    qs_error_clear();
    fake_lt.only_in_place = false;
    fake_lt.none = true;
    cr_assert_eq(qs_cuda_gemm(backend.queue, &call), QS_ERR_DEVICE);
    cr_assert_str_not_empty(qs_error_text());
    qs_error_clear();
    fake_lt.none = false;
    qs_cuda_gemm_close(&context);
    setenv("QSHARD_CUDA_ALGORITHM", "1", 1); /* of one that passes, the second */
    cr_assert_eq(qs_cuda_gemm_open(backend.queue, &context), QS_OK);
    cr_assert_eq(qs_cuda_gemm(backend.queue, &call), QS_ERR_DEVICE);
    qs_error_clear();
    qs_cuda_gemm_close(&context);
    unsetenv("QSHARD_CUDA_ALGORITHM");
    cr_assert_eq(qs_cuda_gemm_open(backend.queue, &context), QS_OK);
    cr_assert_eq(qs_cuda_gemm(backend.queue, &call), QS_OK, "%s", qs_error_text());
    fake_lt.fails = true;
    cr_assert_eq(qs_cuda_gemm(backend.queue, &call), QS_ERR_DEVICE);
    tw_free(&backend, bf16);
}
