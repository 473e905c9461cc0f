/* The calls of cuBLASLt and of the CUDA runtime that kernels/cuda/gemm_lt.c makes, on host memory
 * and at once. Matrices are column-major, as cuBLASLt's manual has it: D = alpha op(A) op(B) + beta
 * C. What the manual asks of a caller is asserted. */
#include "fake_cublaslt.h"

#include <criterion/criterion.h>
#include <cublasLt.h>
#include <cuda_runtime_api.h>
#include <string.h>

#include "base/dtype.h"

fake_lt_state fake_lt;

typedef struct {
    uint64_t rows, cols;
    int64_t ld;
    cudaDataType type;
} layout;

typedef struct {
    cublasOperation_t a, b;
    int made;
} product;

typedef struct {
    uint64_t workspace_bytes;
    uint32_t alignment[4], schemes;
} preference;

/* An algorithm remembers what it was chosen for: it must not be used for anything else. */
typedef struct {
    uint32_t alignment[4], scheme;
    layout a, b, c, d;
    uint8_t ops;
} algorithm;

_Static_assert(sizeof(layout) <= sizeof(cublasLtMatrixLayoutOpaque_t), "fits");
_Static_assert(sizeof(preference) <= sizeof(cublasLtMatmulPreferenceOpaque_t), "fits");

/* Kept beside: an algorithm's 64 bytes hold a number. */
enum { MOST = 4096 };
static algorithm algorithms[MOST];
static int n_algorithms;

/* ---- descriptors ---- */

cublasStatus_t cublasLtMatrixLayoutInit_internal(cublasLtMatrixLayout_t out, size_t size,
                                                 cudaDataType type, uint64_t rows, uint64_t cols,
                                                 int64_t ld)
{
    cr_assert_eq(size, sizeof(cublasLtMatrixLayoutOpaque_t));
    cr_assert_geq(ld, (int64_t)rows, "column-major: a column has `rows` elements");
    *(layout *)out = (layout){.rows = rows, .cols = cols, .ld = ld, .type = type};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescInit_internal(cublasLtMatmulDesc_t out, size_t size,
                                               cublasComputeType_t compute, cudaDataType_t scale)
{
    cr_assert_eq(size, sizeof(cublasLtMatmulDescOpaque_t));
    cr_assert_eq(compute, CUBLAS_COMPUTE_32F);
    cr_assert_eq(scale, CUDA_R_32F);
    *(product *)out = (product){.a = CUBLAS_OP_N, .b = CUBLAS_OP_N, .made = 1};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc,
                                              cublasLtMatmulDescAttributes_t attribute,
                                              const void *value, size_t size)
{
    product *p = (product *)desc;
    cr_assert_eq(size, sizeof(cublasOperation_t));
    cr_assert(attribute == CUBLASLT_MATMUL_DESC_TRANSA || attribute == CUBLASLT_MATMUL_DESC_TRANSB);
    memcpy(attribute == CUBLASLT_MATMUL_DESC_TRANSA ? &p->a : &p->b, value, size);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceInit_internal(cublasLtMatmulPreference_t out, size_t size)
{
    cr_assert_eq(size, sizeof(cublasLtMatmulPreferenceOpaque_t));
    *(preference *)out = (preference){.alignment = {256, 256, 256, 256}, .schemes = 7};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t pref,
                                                    cublasLtMatmulPreferenceAttributes_t attribute,
                                                    const void *value, size_t size)
{
    preference *p = (preference *)pref;
    if (attribute == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES) {
        cr_assert_eq(size, sizeof(uint64_t));
        memcpy(&p->workspace_bytes, value, size);
        return CUBLAS_STATUS_SUCCESS;
    }
    cr_assert_eq(size, sizeof(uint32_t));
    if (attribute == CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK) {
        memcpy(&p->schemes, value, size);
        return CUBLAS_STATUS_SUCCESS;
    }
    cr_assert(attribute >= CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES &&
              attribute <= CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES);
    memcpy(&p->alignment[attribute - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES], value, size);
    return CUBLAS_STATUS_SUCCESS;
}

/* ---- algorithms ---- */

static void propose(const preference *p, const product *desc, const layout *a, const layout *b,
                    const layout *c, const layout *d, uint32_t scheme,
                    cublasLtMatmulHeuristicResult_t *out)
{
    cr_assert_lt(n_algorithms, MOST);
    algorithm *algo = &algorithms[n_algorithms];
    *algo = (algorithm){.scheme = scheme, .a = *a, .b = *b, .c = *c, .d = *d};
    algo->ops = (uint8_t)(2 * (desc->a == CUBLAS_OP_T) + (desc->b == CUBLAS_OP_T));
    memcpy(algo->alignment, p->alignment, sizeof algo->alignment);
    *out = (cublasLtMatmulHeuristicResult_t){.state = CUBLAS_STATUS_SUCCESS, .workspaceSize = 4096};
    out->algo.data[0] = (uint64_t)n_algorithms++;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t pref, int asked,
                                              cublasLtMatmulHeuristicResult_t results[], int *found)
{
    const preference *p = (const preference *)pref;
    const product *made = (const product *)desc;
    cr_assert_not_null(handle);
    cr_assert_geq(asked, 2);
    cr_assert_eq(p->workspace_bytes, fake_lt.workspace_bytes);
    cr_assert_eq(p->schemes, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE);
    fake_lt.questions++;
    *found = 0;
    if (fake_lt.none) {
        return CUBLAS_STATUS_NOT_SUPPORTED;
    }
    const layout *la = (const layout *)a, *lb = (const layout *)b, *lc = (const layout *)c,
                 *ld = (const layout *)d;
    propose(p, made, la, lb, lc, ld, CUBLASLT_REDUCTION_SCHEME_INPLACE, &results[(*found)++]);
    if (!fake_lt.only_in_place) {
        propose(p, made, la, lb, lc, ld, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE,
                &results[(*found)++]);
    }
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoConfigGetAttribute(const cublasLtMatmulAlgo_t *algo,
                                                    cublasLtMatmulAlgoConfigAttributes_t attribute,
                                                    void *value, size_t size, size_t *written)
{
    const uint32_t scheme =
        attribute == CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME ? algorithms[algo->data[0]].scheme : 1;
    memcpy(value, &scheme, size < sizeof scheme ? size : sizeof scheme);
    *written = sizeof scheme;
    return CUBLAS_STATUS_SUCCESS;
}

/* ---- the product ---- */

static float get(const void *data, const layout *l, uint64_t row, uint64_t col)
{
    float value;
    const qs_dtype type = l->type == CUDA_R_32F ? QS_F32 : QS_BF16;
    const size_t at = (size_t)row + (size_t)col * (size_t)l->ld;
    qs_f32_load(&value, (const char *)data + at * qs_dtype_bytes(type), type, 1);
    return value;
}

static void put(void *data, const layout *l, uint64_t row, uint64_t col, float value)
{
    const qs_dtype type = l->type == CUDA_R_32F ? QS_F32 : QS_BF16;
    const size_t at = (size_t)row + (size_t)col * (size_t)l->ld;
    qs_f32_store((char *)data + at * qs_dtype_bytes(type), type, &value, 1);
}

static void assert_aligned(const void *data, const layout *l, uint32_t alignment)
{
    const uint64_t element = l->type == CUDA_R_32F ? 4 : 2;
    cr_assert_eq((uintptr_t)data % alignment, 0);
    cr_assert(alignment <= element || (uint64_t)l->ld * element % alignment == 0,
              "%u bytes were promised, but rows are %lld elements", alignment, (long long)l->ld);
}

static bool same(const layout *x, const layout *y)
{
    return x->rows == y->rows && x->cols == y->cols && x->ld == y->ld && x->type == y->type;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const void *alpha,
                              const void *a, cublasLtMatrixLayout_t a_desc, const void *b,
                              cublasLtMatrixLayout_t b_desc, const void *beta, const void *c,
                              cublasLtMatrixLayout_t c_desc, void *d, cublasLtMatrixLayout_t d_desc,
                              const cublasLtMatmulAlgo_t *chosen, void *workspace,
                              size_t workspace_bytes, cudaStream_t stream)
{
    (void)stream;
    const product *p = (const product *)desc;
    const layout *la = (const layout *)a_desc, *lb = (const layout *)b_desc,
                 *lc = (const layout *)c_desc, *ld = (const layout *)d_desc;
    const algorithm *algo = &algorithms[chosen->data[0]];
    cr_assert_not_null(handle);
    cr_assert_eq(p->made, 1);
    cr_assert_eq(workspace, fake_lt.workspace);
    cr_assert_leq(workspace_bytes, fake_lt.workspace_bytes);
    cr_assert_eq(algo->scheme, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE);
    cr_assert(same(&algo->a, la) && same(&algo->b, lb) && same(&algo->d, ld));
    cr_assert_eq(algo->ops, 2 * (p->a == CUBLAS_OP_T) + (p->b == CUBLAS_OP_T));
    cr_assert(la->type == CUDA_R_16BF && lb->type == CUDA_R_16BF && lc->type == ld->type);
    cr_assert(c != d || lc == ld, "in place: the same descriptor");
    assert_aligned(a, la, algo->alignment[0]);
    assert_aligned(b, lb, algo->alignment[1]);
    assert_aligned(c, lc, algo->alignment[2]);
    assert_aligned(d, ld, algo->alignment[3]);
    const uint64_t k = p->a == CUBLAS_OP_T ? la->rows : la->cols;
    cr_assert_eq(p->a == CUBLAS_OP_T ? la->cols : la->rows, ld->rows);
    cr_assert_eq(p->b == CUBLAS_OP_T ? lb->rows : lb->cols, ld->cols);
    cr_assert_eq(p->b == CUBLAS_OP_T ? lb->cols : lb->rows, k);
    cr_assert(lc->rows == ld->rows && lc->cols == ld->cols);
    fake_lt.products++;
    if (fake_lt.fails) {
        return CUBLAS_STATUS_EXECUTION_FAILED;
    }
    const float scale = *(const float *)alpha, kept = *(const float *)beta;
    for (uint64_t col = 0; col < ld->cols; col++) {
        for (uint64_t row = 0; row < ld->rows; row++) {
            float sum = 0.0F;
            for (uint64_t i = 0; i < k; i++) {
                const float x = p->a == CUBLAS_OP_T ? get(a, la, i, row) : get(a, la, row, i);
                const float y = p->b == CUBLAS_OP_T ? get(b, lb, col, i) : get(b, lb, i, col);
                sum += x * y;
            }
            sum *= scale;
            sum += kept != 0.0F ? kept * get(c, lc, row, col) : 0.0F;
            put(d, ld, row, col, sum);
        }
    }
    return CUBLAS_STATUS_SUCCESS;
}

/* ---- the rest ---- */

cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle)
{
    *handle = (cublasLtHandle_t)&fake_lt;
    fake_lt.handles++;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle)
{
    (void)handle;
    fake_lt.handles--;
    return CUBLAS_STATUS_SUCCESS;
}

size_t cublasLtGetVersion(void)
{
    return 130100;
}

const char *cublasLtGetStatusName(cublasStatus_t status)
{
    (void)status;
    return "CUBLAS_STATUS_FAKE";
}

const char *cublasLtGetStatusString(cublasStatus_t status)
{
    (void)status;
    return "as the test wanted";
}

cudaError_t cudaMemset2DAsync(void *data, size_t pitch, int value, size_t width, size_t height,
                              cudaStream_t stream)
{
    (void)stream;
    for (size_t row = 0; row < height; row++) {
        memset((char *)data + row * pitch, value, width);
    }
    return cudaSuccess;
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch,
                              size_t width, size_t height, enum cudaMemcpyKind kind,
                              cudaStream_t stream)
{
    (void)stream;
    cr_assert_eq(kind, cudaMemcpyDeviceToDevice);
    for (size_t row = 0; row < height; row++) {
        memcpy((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width);
    }
    return cudaSuccess;
}

cudaError_t cudaGetLastError(void)
{
    return cudaSuccess;
}

const char *cudaGetErrorString(cudaError_t error)
{
    (void)error;
    return "";
}

const char *cudaGetErrorName(cudaError_t error)
{
    (void)error;
    return "";
}
