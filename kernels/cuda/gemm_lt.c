/* Matrix products by cuBLASLt.
 *
 * The bound: 2 m n k flops at the tensor cores' bf16 rate, or the bytes of A, B and C where one
 * side is short (an adapter's).
 *
 * The same bits every run. NVIDIA promises for cuBLAS (its manual, "Results reproducibility"): with
 * one version of the library, on cards of one architecture with the same number of multiprocessors,
 * every run gives the same bits, unless several streams share a workspace or the handle may use
 * atomics. So every queue has a handle and a workspace of its own, and the algorithm is part of the
 * shape: it is asked for once, with limits that depend on nothing but the shape (workspace,
 * alignment of rows), and kept. Split-K sums are allowed where parts are kept in fp32 in the
 * workspace and added in a step of their own, in order; not where they are rounded to bf16 in
 * between, or added in place.
 *
 * Descriptors live on the stack: a plan is the algorithm alone, 64 bytes and its key, since ragged
 * micro-batches bring ever new numbers of tokens. */
#include <cublasLt.h>
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "device/cuda_status.h"
#include "kernels/cuda/core/gemm_map.h"
#include "kernels/cuda/ops_cuda.h"

enum {
    FIRST_PLANS = 256,   /* a power of two, as all sizes of the table */
    MOST_PLANS = 1 << 16 /* then the library is asked at each call: slower, the same answers */
};

/* All that an algorithm depends on. Compared as bytes: no padding (asserted), cleared first. */
typedef struct {
    int64_t m, n, k;
    int64_t a_stride, b_stride, c0_stride, c_stride;
    uint8_t a_transposed, b_transposed, has_c0, c_is_f32;
    uint8_t a_alignment, b_alignment, c0_alignment, c_alignment;
} plan_key;

_Static_assert(sizeof(plan_key) == 7 * sizeof(int64_t) + 8, "a key is compared as bytes");

typedef struct {
    plan_key key;
    bool used;
    cublasLtMatmulAlgo_t algo;
} plan;

typedef struct {
    cublasLtHandle_t handle;
    int passed_over; /* algorithms of each list: 0 but for benchmarks/bench_products.c */
    plan *plans;     /* [capacity], open addressing */
    int64_t count, capacity;
} gemm_state;

/* A product in the library's words. */
typedef struct {
    cublasLtMatmulDescOpaque_t product;
    cublasLtMatrixLayoutOpaque_t first, second, c0, c;
} descriptors;

/* ---- errors ---- */

#define QS_LT(call) check((call), #call, __FILE__, __LINE__)

static qs_status check(cublasStatus_t status, const char *call, const char *file, int line)
{
    if (status == CUBLAS_STATUS_SUCCESS) {
        return QS_OK;
    }
    return qs_error_set(QS_ERR_DEVICE, file, line, "%s: %s (%s)", call,
                        cublasLtGetStatusString(status), cublasLtGetStatusName(status));
}

/* ---- plans ---- */

static uint64_t hash_of(const plan_key *key) /* FNV-1a */
{
    const uint8_t *bytes = (const uint8_t *)key;
    uint64_t hash = UINT64_C(0xcbf29ce484222325);
    for (size_t i = 0; i < sizeof *key; i++) {
        hash = (hash ^ bytes[i]) * UINT64_C(0x100000001b3);
    }
    return hash ^ (hash >> 32);
}

/* The plan of `key`, or the free place for it. The table is never full. */
static plan *place_of(plan *plans, int64_t capacity, const plan_key *key)
{
    uint64_t at = hash_of(key);
    for (;; at++) {
        plan *p = &plans[at & (uint64_t)(capacity - 1)];
        if (!p->used || memcmp(&p->key, key, sizeof *key) == 0) {
            return p;
        }
    }
}

/* Keep the table at most half full; false without memory, or when it is as large as it may be. */
static bool make_room(gemm_state *state)
{
    if (2 * (state->count + 1) <= state->capacity) {
        return true;
    }
    const int64_t capacity = 2 * state->capacity;
    plan *plans = capacity <= 2 * MOST_PLANS ? calloc((size_t)capacity, sizeof *plans) : NULL;
    if (plans == NULL) {
        return false;
    }
    for (int64_t i = 0; i < state->capacity; i++) {
        if (state->plans[i].used) {
            *place_of(plans, capacity, &state->plans[i].key) = state->plans[i];
        }
    }
    free(state->plans);
    state->plans = plans;
    state->capacity = capacity;
    return true;
}

/* ---- a product in the library's words ---- */

static plan_key key_of(const qs_gemm_call *call)
{
    const int c_bytes = (int)qs_dtype_bytes(call->c_dtype);
    plan_key key;
    memset(&key, 0, sizeof key);
    key.m = call->m;
    key.n = call->n;
    key.k = call->k;
    key.a_stride = call->a_stride;
    key.b_stride = call->b_stride;
    key.c_stride = call->c_stride;
    key.a_transposed = call->a_transposed;
    key.b_transposed = call->b_transposed;
    key.c_is_f32 = call->c_dtype == QS_F32;
    key.a_alignment = (uint8_t)qs_gemm_alignment((uintptr_t)call->a, call->a_stride, 2);
    key.b_alignment = (uint8_t)qs_gemm_alignment((uintptr_t)call->b, call->b_stride, 2);
    key.c_alignment = (uint8_t)qs_gemm_alignment((uintptr_t)call->c, call->c_stride, c_bytes);
    key.c0_stride = key.c_stride; /* without c0, c stands in its place */
    key.c0_alignment = key.c_alignment;
    if (call->c0 != NULL) {
        key.has_c0 = 1;
        key.c0_stride = call->c0_stride;
        key.c0_alignment =
            (uint8_t)qs_gemm_alignment((uintptr_t)call->c0, call->c0_stride, c_bytes);
    }
    return key;
}

static qs_status set_layout(cublasLtMatrixLayoutOpaque_t *layout, cudaDataType type,
                            const qs_gemm_operand *operand)
{
    return QS_LT(cublasLtMatrixLayoutInit(layout, type, (uint64_t)operand->rows,
                                          (uint64_t)operand->cols, operand->ld));
}

static qs_status describe(const plan_key *key, descriptors *d)
{
    const qs_gemm_map map = qs_gemm_map_make(key->m, key->n, key->k, key->a_stride,
                                             key->a_transposed, key->b_stride, key->b_transposed);
    const qs_gemm_operand c0 = {.rows = map.rows, .cols = map.cols, .ld = key->c0_stride};
    const qs_gemm_operand c = {.rows = map.rows, .cols = map.cols, .ld = key->c_stride};
    const cudaDataType c_type = key->c_is_f32 ? CUDA_R_32F : CUDA_R_16BF;
    const cublasOperation_t first = map.first.transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    const cublasOperation_t second = map.second.transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    QS_TRY(QS_LT(cublasLtMatmulDescInit(&d->product, CUBLAS_COMPUTE_32F, CUDA_R_32F)));
    QS_TRY(QS_LT(cublasLtMatmulDescSetAttribute(&d->product, CUBLASLT_MATMUL_DESC_TRANSA, &first,
                                                sizeof first)));
    QS_TRY(QS_LT(cublasLtMatmulDescSetAttribute(&d->product, CUBLASLT_MATMUL_DESC_TRANSB, &second,
                                                sizeof second)));
    QS_TRY(set_layout(&d->first, CUDA_R_16BF, &map.first));
    QS_TRY(set_layout(&d->second, CUDA_R_16BF, &map.second));
    QS_TRY(set_layout(&d->c0, c_type, &c0));
    return set_layout(&d->c, c_type, &c);
}

/* ---- the choice ---- */

static qs_status prefer(cublasLtMatmulPreferenceOpaque_t *preference,
                        cublasLtMatmulPreferenceAttributes_t attribute, uint32_t value)
{
    return QS_LT(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof value));
}

static qs_status set_preference(const plan_key *key, uint64_t workspace_bytes,
                                cublasLtMatmulPreferenceOpaque_t *p)
{
    QS_TRY(QS_LT(cublasLtMatmulPreferenceInit(p)));
    QS_TRY(QS_LT(cublasLtMatmulPreferenceSetAttribute(p, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                      &workspace_bytes, sizeof workspace_bytes)));
    /* The library's A is our B (gemm_map.h). */
    QS_TRY(prefer(p, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, key->b_alignment));
    QS_TRY(prefer(p, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, key->a_alignment));
    QS_TRY(prefer(p, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, key->c0_alignment));
    QS_TRY(prefer(p, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, key->c_alignment));
    /* No split (0) is always allowed. */
    return prefer(p, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                  CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE);
}

static uint32_t config_of(const cublasLtMatmulAlgo_t *algo,
                          cublasLtMatmulAlgoConfigAttributes_t attribute)
{
    uint32_t value = 0;
    size_t written = 0;
    const cublasStatus_t status =
        cublasLtMatmulAlgoConfigGetAttribute(algo, attribute, &value, sizeof value, &written);
    return status == CUBLAS_STATUS_SUCCESS ? value : 0;
}

/* The same for those that the library keeps in 16 bits. */
static uint32_t short_config_of(const cublasLtMatmulAlgo_t *algo,
                                cublasLtMatmulAlgoConfigAttributes_t attribute)
{
    uint16_t value = 0;
    size_t written = 0;
    const cublasStatus_t status =
        cublasLtMatmulAlgoConfigGetAttribute(algo, attribute, &value, sizeof value, &written);
    return status == CUBLAS_STATUS_SUCCESS ? value : 0;
}

static bool adds_in_order(const cublasLtMatmulAlgo_t *algo)
{
    const uint32_t scheme = config_of(algo, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME);
    return scheme == CUBLASLT_REDUCTION_SCHEME_NONE ||
           scheme == CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
}

static void log_choice(const plan_key *key, const cublasLtMatmulHeuristicResult_t *result)
{
    const cublasLtMatmulAlgo_t *algo = &result->algo;
    qs_log_debug(
        "gemm m=%lld n=%lld k=%lld %c%c%s %s: algorithm %u tile %u stages %u split_k %u "
        "reduction %u swizzle %u option %u inner %u cluster %u workspace %zu",
        (long long)key->m, (long long)key->n, (long long)key->k, key->a_transposed ? 't' : 'n',
        key->b_transposed ? 't' : 'n', key->has_c0 ? "+c" : "", key->c_is_f32 ? "f32" : "bf16",
        config_of(algo, CUBLASLT_ALGO_CONFIG_ID), config_of(algo, CUBLASLT_ALGO_CONFIG_TILE_ID),
        config_of(algo, CUBLASLT_ALGO_CONFIG_STAGES_ID),
        config_of(algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM),
        config_of(algo, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME),
        config_of(algo, CUBLASLT_ALGO_CONFIG_CTA_SWIZZLING),
        config_of(algo, CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION),
        short_config_of(algo, CUBLASLT_ALGO_CONFIG_INNER_SHAPE_ID),
        short_config_of(algo, CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID), result->workspaceSize);
}

/* The library's best that passes: its list is a function of the shape, the card and its version. */
static qs_status choose(const gemm_state *state, const plan_key *key, descriptors *d,
                        uint64_t workspace_bytes, cublasLtMatmulAlgo_t *out)
{
    enum { ASKED = 8 };
    cublasLtMatmulHeuristicResult_t results[ASKED];
    cublasLtMatmulPreferenceOpaque_t preference;
    int found = 0, left = state->passed_over;
    QS_TRY(set_preference(key, workspace_bytes, &preference));
    const cublasStatus_t status =
        cublasLtMatmulAlgoGetHeuristic(state->handle, &d->product, &d->first, &d->second, &d->c0,
                                       &d->c, &preference, ASKED, results, &found);
    if (status != CUBLAS_STATUS_NOT_SUPPORTED) { /* that is "none", as 0 found */
        QS_TRY(check(status, "cublasLtMatmulAlgoGetHeuristic", __FILE__, __LINE__));
        for (int i = 0; i < found; i++) {
            if (results[i].state == CUBLAS_STATUS_SUCCESS && adds_in_order(&results[i].algo) &&
                results[i].workspaceSize <= workspace_bytes && left-- == 0) {
                *out = results[i].algo;
                log_choice(key, &results[i]);
                return QS_OK;
            }
        }
    }
    return QS_FAIL(QS_ERR_DEVICE,
                   "cuBLASLt has no algorithm for a product of bf16 matrices: m=%lld n=%lld "
                   "k=%lld, strides %lld, %lld, %lld, %lld, alignments %d, %d, %d, %d%s%s%s",
                   (long long)key->m, (long long)key->n, (long long)key->k,
                   (long long)key->a_stride, (long long)key->b_stride, (long long)key->c0_stride,
                   (long long)key->c_stride, key->a_alignment, key->b_alignment, key->c0_alignment,
                   key->c_alignment, key->a_transposed ? ", A transposed" : "",
                   key->b_transposed ? ", B transposed" : "", key->c_is_f32 ? ", result fp32" : "");
}

static qs_status algorithm_for(gemm_state *state, const plan_key *key, descriptors *d,
                               uint64_t workspace_bytes, cublasLtMatmulAlgo_t *out)
{
    const plan *known = place_of(state->plans, state->capacity, key);
    if (known->used) {
        *out = known->algo;
        return QS_OK;
    }
    QS_TRY(choose(state, key, d, workspace_bytes, out));
    if (make_room(state)) {
        plan *place = place_of(state->plans, state->capacity, key);
        *place = (plan){.key = *key, .used = true, .algo = *out};
        state->count++;
    }
    return QS_OK;
}

/* ---- calls ---- */

/* Nothing to multiply: c = c0, or zeros. */
static qs_status without_product(qs_queue *q, const qs_gemm_call *call)
{
    const cudaStream_t stream = (cudaStream_t)qs_queue_native(q);
    const size_t element = qs_dtype_bytes(call->c_dtype);
    const size_t width = (size_t)call->n * element, pitch = (size_t)call->c_stride * element;
    if (call->m == 0 || call->n == 0 || call->c0 == call->c) {
        return QS_OK;
    }
    if (call->c0 == NULL) {
        return QS_CUDA(cudaMemset2DAsync(call->c, pitch, 0, width, (size_t)call->m, stream));
    }
    return QS_CUDA(cudaMemcpy2DAsync(call->c, pitch, call->c0, (size_t)call->c0_stride * element,
                                     width, (size_t)call->m, cudaMemcpyDeviceToDevice, stream));
}

static qs_status check_call(const qs_gemm_call *call)
{
    const bool sound = call->m >= 0 && call->n >= 0 && call->k >= 0 &&
                       call->a_stride >= (call->a_transposed ? call->m : call->k) &&
                       call->b_stride >= (call->b_transposed ? call->k : call->n) &&
                       call->c_stride >= call->n &&
                       (call->c0 == NULL || call->c0_stride >= call->n) &&
                       (call->c0 != call->c || call->c0_stride == call->c_stride) &&
                       (call->c_dtype == QS_BF16 || call->c_dtype == QS_F32);
    return sound ? QS_OK
                 : QS_FAIL(QS_ERR_BUG,
                           "a product with wrong sizes: m=%lld n=%lld k=%lld, strides %lld, %lld, "
                           "%lld, %lld",
                           (long long)call->m, (long long)call->n, (long long)call->k,
                           (long long)call->a_stride, (long long)call->b_stride,
                           (long long)call->c0_stride, (long long)call->c_stride);
}

qs_status qs_cuda_gemm(qs_queue *q, const qs_gemm_call *call)
{
    qs_cuda_context *context = qs_cuda_context_of(q);
    if (context == NULL) {
        return QS_ERR_BUG;
    }
    QS_TRY(check_call(call));
    if (call->m == 0 || call->n == 0 || call->k == 0) {
        return without_product(q, call);
    }
    gemm_state *state = context->gemm;
    const cudaStream_t stream = (cudaStream_t)qs_queue_native(q); /* makes its device current */
    const plan_key key = key_of(call);
    const size_t workspace_bytes = context->gemm_workspace_bytes;
    descriptors d;
    cublasLtMatmulAlgo_t algo;
    QS_TRY(describe(&key, &d));
    QS_TRY(algorithm_for(state, &key, &d, workspace_bytes, &algo));
    /* In place means the same matrix and the same descriptor. Without c0 nothing is read: beta is
     * 0. */
    const bool apart = call->c0 != NULL && call->c0 != call->c;
    const float beta = call->c0 != NULL ? 1.0F : 0.0F;
    return QS_LT(cublasLtMatmul(state->handle, &d.product, &call->alpha, call->b, &d.first, call->a,
                                &d.second, &beta, apart ? call->c0 : call->c, apart ? &d.c0 : &d.c,
                                call->c, &d.c, &algo, context->gemm_workspace, workspace_bytes,
                                stream));
}

qs_status qs_cuda_gemm_open(qs_queue *q, qs_cuda_context *context)
{
    gemm_state *state = calloc(1, sizeof *state);
    plan *plans = calloc(FIRST_PLANS, sizeof *plans);
    if (state == NULL || plans == NULL) {
        free(state);
        free(plans);
        return QS_FAIL(QS_ERR_MEMORY, "memory: the products of a queue cannot be opened");
    }
    const char *number = getenv("QSHARD_CUDA_ALGORITHM");
    state->passed_over = number != NULL ? atoi(number) : 0;
    state->plans = plans;
    state->capacity = FIRST_PLANS;
    context->gemm = state;
    (void)qs_queue_native(q); /* makes the queue's device the one that the handle is for */
    return QS_LT(cublasLtCreate(&state->handle));
}

void qs_cuda_gemm_close(qs_cuda_context *context)
{
    gemm_state *state = context->gemm;
    if (state == NULL) {
        return;
    }
    if (state->handle != NULL) {
        (void)cublasLtDestroy(state->handle);
    }
    free(state->plans);
    free(state);
    context->gemm = NULL;
}

size_t qs_cuda_gemm_workspace_bytes(void)
{
    return QS_CUDA_GEMM_WORKSPACE_BYTES;
}

void qs_cuda_gemm_version(char *out, size_t capacity)
{
    const size_t version = cublasLtGetVersion();
    snprintf(out, capacity, "cuBLASLt %zu.%zu.%zu", version / 10000, version % 10000 / 100,
             version % 100);
}
