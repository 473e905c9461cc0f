/* qs_cuda_gemm without cuBLASLt: the product as a piece of work on the queue's stream. An element
 * is one fp32 sum in order of k, then alpha, then c0, then one rounding; blocks and vectors only
 * change which elements are at work together, so that results depend on neither.
 *
 * It runs whole trainings of small models, so it is blocked for registers: panels of A and B are
 * converted to fp32 and laid out in the order of use, and a tile of TILE_M x TILE_N sums stays in
 * registers while k runs. */
#include <stdio.h>
#include <string.h>

#include <vector>

extern "C" {
#include "kernels/cuda/ops_cuda.h"
}

#include <cuda_runtime.h>

#include "emulator_c.h"
#include "kernels/cuda/core/bf16.h"

namespace
{

constexpr int64_t TILE_M = 4, TILE_N = 16, BLOCK_K = 256, BLOCK_N = 256;

/* The same multiplications and additions with any of these: contraction is off. */
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
#define QS_EMULATOR_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define QS_EMULATOR_CLONES
#endif

/** As many sums as stand side by side in AVX registers; elsewhere the compiler splits them. */
constexpr int64_t WIDTH = 8;
typedef float vector __attribute__((vector_size(WIDTH * sizeof(float))));

/** sums[TILE_M][TILE_N] += a[k][TILE_M] b[k][TILE_N]. */
QS_EMULATOR_CLONES
void multiply_tile(float *__restrict__ sums, const float *__restrict__ a,
                   const float *__restrict__ b, int64_t k)
{
    vector kept[TILE_M][TILE_N / WIDTH];
    memcpy(kept, sums, sizeof kept);
    for (int64_t p = 0; p < k; p++) {
        vector row[TILE_N / WIDTH];
        memcpy(row, b + p * TILE_N, sizeof row);
        for (int64_t i = 0; i < TILE_M; i++) {
            for (int64_t j = 0; j < TILE_N / WIDTH; j++) {
                kept[i][j] += a[p * TILE_M + i] * row[j];
            }
        }
    }
    memcpy(sums, kept, sizeof kept);
}

/** One of the two operands, as rows of the result's side: element (i, p) of op(A) or of op(B)^T. */
struct operand {
    const qs_bf16 *data;
    int64_t stride, rows;
    bool k_is_contiguous;

    float at(int64_t row, int64_t p) const
    {
        return row < rows ? qs_bf16_to_f32(k_is_contiguous ? data[row * stride + p]
                                                           : data[p * stride + row])
                          : 0.0f;
    }
};

/** out[row / tile][p][row % tile] for rows row0.. and k0 .. k0 + k - 1; zeros past the end. */
void pack(const operand &from, int64_t row0, int64_t n_rows, int64_t k0, int64_t k, int64_t tile,
          float *out)
{
    for (int64_t first = row0; first < row0 + n_rows; first += tile) {
        for (int64_t p = 0; p < k; p++) {
            for (int64_t i = 0; i < tile; i++) {
                *out++ = from.at(first + i, k0 + p);
            }
        }
    }
}

float element_of(const void *matrix, qs_dtype dtype, int64_t at)
{
    return dtype == QS_F32 ? static_cast<const float *>(matrix)[at]
                           : qs_bf16_to_f32(static_cast<const qs_bf16 *>(matrix)[at]);
}

/** c = alpha sums + c0 for the part of the tile that lies inside. */
void store_tile(const qs_gemm_call &g, const float *sums, int64_t row0, int64_t column0)
{
    for (int64_t i = 0; i < TILE_M && row0 + i < g.m; i++) {
        for (int64_t j = 0; j < TILE_N && column0 + j < g.n; j++) {
            float value = g.alpha * sums[i * TILE_N + j];
            if (g.c0 != nullptr) {
                value += element_of(g.c0, g.c_dtype, (row0 + i) * g.c0_stride + column0 + j);
            }
            const int64_t at = (row0 + i) * g.c_stride + column0 + j;
            if (g.c_dtype == QS_F32) {
                static_cast<float *>(g.c)[at] = value;
            } else {
                static_cast<qs_bf16 *>(g.c)[at] = qs_bf16_round(value);
            }
        }
    }
}

/** Columns column0 .. column0 + columns - 1 of the result, all rows. */
void multiply_columns(const qs_gemm_call &g, int64_t column0, int64_t columns)
{
    const operand a = {static_cast<const qs_bf16 *>(g.a), g.a_stride, g.m, !g.a_transposed};
    const operand b = {static_cast<const qs_bf16 *>(g.b), g.b_stride, g.n, g.b_transposed};
    const int64_t tiles_m = qs_hd_ceil_div(g.m, TILE_M), tiles_n = qs_hd_ceil_div(columns, TILE_N);
    std::vector<float> sums((size_t)(tiles_m * tiles_n * TILE_M * TILE_N), 0.0f);
    std::vector<float> packed_a((size_t)(BLOCK_K * TILE_M));
    std::vector<float> packed_b((size_t)(tiles_n * TILE_N * BLOCK_K));
    for (int64_t k0 = 0; k0 < g.k; k0 += BLOCK_K) {
        const int64_t k = qs_hd_min(BLOCK_K, g.k - k0);
        pack(b, column0, tiles_n * TILE_N, k0, k, TILE_N, packed_b.data());
        for (int64_t i = 0; i < tiles_m; i++) {
            pack(a, i * TILE_M, TILE_M, k0, k, TILE_M, packed_a.data());
            for (int64_t j = 0; j < tiles_n; j++) {
                multiply_tile(&sums[(size_t)((i * tiles_n + j) * TILE_M * TILE_N)], packed_a.data(),
                              &packed_b[(size_t)(j * k * TILE_N)], k);
            }
        }
    }
    for (int64_t i = 0; i < tiles_m; i++) {
        for (int64_t j = 0; j < tiles_n; j++) {
            store_tile(g, &sums[(size_t)((i * tiles_n + j) * TILE_M * TILE_N)], i * TILE_M,
                       column0 + j * TILE_N);
        }
    }
}

void run(void *data)
{
    const qs_gemm_call &g = *static_cast<const qs_gemm_call *>(data);
    for (int64_t column = 0; column < g.n; column += BLOCK_N) {
        multiply_columns(g, column, qs_hd_min(BLOCK_N, g.n - column));
    }
}

void release(void *data)
{
    delete static_cast<qs_gemm_call *>(data);
}

/** What a GPU could not read, or would read past the end of. */
bool is_sound(const qs_gemm_call &g)
{
    return g.m >= 0 && g.n >= 0 && g.k >= 0 && (g.c_dtype == QS_F32 || g.c_dtype == QS_BF16) &&
           g.a_stride >= (g.a_transposed ? g.m : g.k) &&
           g.b_stride >= (g.b_transposed ? g.k : g.n) && g.c_stride >= g.n &&
           (g.c0 == nullptr || g.c0_stride >= g.n) && (g.m == 0 || g.n == 0 || g.c != nullptr) &&
           (g.m == 0 || g.n == 0 || g.k == 0 || (g.a != nullptr && g.b != nullptr));
}

} // namespace

extern "C" {

qs_status qs_cuda_gemm(qs_queue *q, const qs_gemm_call *call)
{
    if (!is_sound(*call)) {
        return QS_FAIL(QS_ERR_BUG, "gemm: a product of %lld x %lld x %lld with impossible strides",
                       (long long)call->m, (long long)call->n, (long long)call->k);
    }
    if (call->m == 0 || call->n == 0) {
        return QS_OK;
    }
    if (call->k > 0) {
        emu::check_argument("gemm", 0, call->a);
        emu::check_argument("gemm", 1, call->b);
    }
    emu::check_argument("gemm", 2, call->c0);
    emu::check_argument("gemm", 3, call->c);
    qs_emulator_push((cudaStream_t)qs_queue_native(q), run, release, new qs_gemm_call(*call));
    return QS_OK;
}

qs_status qs_cuda_gemm_open(qs_queue *q, qs_cuda_context *context)
{
    (void)q;
    context->gemm = nullptr;
    return QS_OK;
}

void qs_cuda_gemm_close(qs_cuda_context *context)
{
    (void)context;
}

size_t qs_cuda_gemm_workspace_bytes(void)
{
    return 0;
}

void qs_cuda_gemm_version(char *out, size_t capacity)
{
    snprintf(out, capacity, "emulated products");
}

} // extern "C"
