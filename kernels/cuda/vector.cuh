/* Groups of WIDTH neighbouring elements between memory and registers: QS_VECTOR of them in pieces
 * of 16 bytes, or one. Values are floats in registers; a store rounds once. */
#ifndef QS_KERNELS_CUDA_VECTOR_CUH
#define QS_KERNELS_CUDA_VECTOR_CUH

#include "kernels/cuda/core/f16.h"
#include "kernels/cuda/core/rows.h"
#include "kernels/cuda/cuda_impl.cuh"

/* ---- one element ---- */

__device__ __forceinline__ float qs_widen(float value)
{
    return value;
}

__device__ __forceinline__ float qs_widen(qs_bf16 value)
{
    return qs_bf16_to_f32(value);
}

__device__ __forceinline__ float qs_widen(qs_f16 value)
{
    return qs_f16_to_f32(value);
}

__device__ __forceinline__ void qs_narrow(float *out, float value)
{
    *out = value;
}

__device__ __forceinline__ void qs_narrow(qs_bf16 *out, float value)
{
    *out = qs_bf16_round(value);
}

/* ---- 8 elements, 16-byte aligned ---- */

/** Two bf16 of a word, the first in the lower half. */
__device__ __forceinline__ void qs_unpack_pair(float out[2], uint32_t word)
{
    out[0] = qs_hd_bits_float(word << 16);
    out[1] = qs_hd_bits_float(word & 0xffff0000u);
}

__device__ __forceinline__ void qs_unpack_bf16(float out[QS_VECTOR], uint4 words)
{
    qs_unpack_pair(out, words.x);
    qs_unpack_pair(out + 2, words.y);
    qs_unpack_pair(out + 4, words.z);
    qs_unpack_pair(out + 6, words.w);
}

__device__ __forceinline__ uint4 qs_pack_bf16(const float in[QS_VECTOR])
{
    return make_uint4(qs_round_pair(in[0], in[1]), qs_round_pair(in[2], in[3]),
                      qs_round_pair(in[4], in[5]), qs_round_pair(in[6], in[7]));
}

__device__ __forceinline__ void qs_load_vector(float out[QS_VECTOR], const qs_bf16 *from)
{
    qs_unpack_bf16(out, qs_load_16(from));
}

__device__ __forceinline__ void qs_load_vector(float out[QS_VECTOR], const qs_f16 *from)
{
    const uint4 words = qs_load_16(from);
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
    for (int i = 0; i < QS_VECTOR; i++) {
        qs_f16 half;
        half.bits = (uint16_t)(word[i / 2] >> (16 * (i % 2)));
        out[i] = qs_f16_to_f32(half);
    }
}

__device__ __forceinline__ void qs_load_vector(float out[QS_VECTOR], const float *from)
{
    for (int i = 0; i < QS_VECTOR; i += 4) {
        const uint4 words = qs_load_16(from + i);
        out[i] = qs_hd_bits_float(words.x);
        out[i + 1] = qs_hd_bits_float(words.y);
        out[i + 2] = qs_hd_bits_float(words.z);
        out[i + 3] = qs_hd_bits_float(words.w);
    }
}

__device__ __forceinline__ void qs_store_vector(qs_bf16 *to, const float in[QS_VECTOR])
{
    qs_store_16(to, qs_pack_bf16(in));
}

__device__ __forceinline__ void qs_store_vector(float *to, const float in[QS_VECTOR])
{
    for (int i = 0; i < QS_VECTOR; i += 4) {
        qs_store_16(to + i, make_uint4(qs_hd_float_bits(in[i]), qs_hd_float_bits(in[i + 1]),
                                       qs_hd_float_bits(in[i + 2]), qs_hd_float_bits(in[i + 3])));
    }
}

/* ---- either ---- */

template <int WIDTH, typename T>
__device__ __forceinline__ void qs_load(float out[WIDTH], const T *from)
{
    static_assert(WIDTH == 1 || WIDTH == QS_VECTOR, "one element, or 16 bytes of bf16");
    if constexpr (WIDTH == 1) {
        out[0] = qs_widen(*from);
    } else {
        qs_load_vector(out, from);
    }
}

template <int WIDTH, typename T>
__device__ __forceinline__ void qs_store(T *to, const float in[WIDTH])
{
    static_assert(WIDTH == 1 || WIDTH == QS_VECTOR, "one element, or 16 bytes of bf16");
    if constexpr (WIDTH == 1) {
        qs_narrow(to, in[0]);
    } else {
        qs_store_vector(to, in);
    }
}

/* ---- launches over rows (core/rows.h) ---- */

/** Call body(row, column) for every group of WIDTH elements of this block's tiles. */
template <int WIDTH, typename Body>
__device__ __forceinline__ void qs_for_groups(const qs_row_tiles &tiles, Body body)
{
    const int64_t group = qs_row_group(&tiles, blockIdx.x, (int)threadIdx.x);
    if (group >= tiles.groups) {
        return;
    }
    const int64_t step = qs_row_step(&tiles);
    for (int64_t row = qs_row_first(&tiles, blockIdx.y, (int)threadIdx.x); row < tiles.rows;
         row += step) {
        body(row, group * WIDTH);
    }
}

static inline dim3 qs_row_grid(const qs_row_tiles &tiles)
{
    return dim3((unsigned)tiles.blocks_x, (unsigned)tiles.blocks_y);
}

/** A matrix as a kernel gets it. */
template <typename T> struct qs_rows_of {
    T *data;
    int64_t stride;
};

template <typename T> static inline qs_rows_of<T> qs_rows(const qs_mat *mat)
{
    return {static_cast<T *>(mat->data), mat->stride};
}

/** True if groups of QS_VECTOR elements of the matrix lie on 16 bytes. */
static inline bool qs_mat_is_vectors(const qs_mat *mat)
{
    return qs_rows_are_vectors(mat->data, mat->stride, mat->cols);
}

/* ---- launches over flat arrays: OP::at<WIDTH>(i) for the WIDTH elements from i on ---- */

template <typename OP, int WIDTH>
__global__ void __launch_bounds__(QS_ROW_THREADS) qs_flat_kernel(OP op, int64_t count)
{
    const int64_t step = (int64_t)gridDim.x * QS_ROW_THREADS * WIDTH;
    int64_t i = ((int64_t)blockIdx.x * QS_ROW_THREADS + (int)threadIdx.x) * WIDTH;
    for (; i + WIDTH <= count; i += step) {
        op.template at<WIDTH>(i);
    }
    for (; i < count; i++) { /* one thread at most: the last group, where it is not whole */
        op.template at<1>(i);
    }
}

/** `vectors`: every array starts on 16 bytes. */
template <typename OP>
static inline qs_status qs_launch_flat(qs_queue *q, const OP &op, int64_t count, bool vectors,
                                       const char *name)
{
    if (count == 0) {
        return QS_OK;
    }
    const int64_t per_block = (int64_t)QS_ROW_THREADS * (vectors ? QS_VECTOR : 1);
    const unsigned grid = qs_cuda_grid(qs_hd_ceil_div(count, per_block));
    if (vectors) {
        QS_LAUNCH((qs_flat_kernel<OP, QS_VECTOR>), grid, QS_ROW_THREADS, 0, qs_cuda_stream(q), op,
                  count);
    } else {
        QS_LAUNCH((qs_flat_kernel<OP, 1>), grid, QS_ROW_THREADS, 0, qs_cuda_stream(q), op, count);
    }
    return qs_cuda_launched(name);
}

#endif
