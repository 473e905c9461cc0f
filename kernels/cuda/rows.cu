/* What moves whole rows: gather, scatter, copies of bytes; and conversion. Nothing is computed but
 * roundings; memory-bound.
 *
 * Bytes an element: gather the two types' sizes, scatter 4 where a row comes and 2 where zeros do,
 * convert 6; copy_rows 2 a byte, or what the bus gives where `base` is the host's memory, which is
 * read in pieces of 16 bytes, neighbours by neighbouring lanes, where addresses allow that.
 *
 * Registers (sm_80, 86, 89, 90a, 100, 120; by 8 elements): gather 20-32, scatter 23-24, copy 38-48,
 * convert 20-24. No shared memory, no spills. */
#include "kernels/cuda/vector.cuh"

namespace
{

/* ---- gather ---- */

template <typename X, typename Y, int WIDTH>
__global__ void __launch_bounds__(QS_ROW_THREADS)
    gather_kernel(qs_rows_of<const X> x, const int32_t *index, qs_rows_of<Y> y, qs_row_tiles tiles)
{
    qs_for_groups<WIDTH>(tiles, [&](int64_t i, int64_t column) {
        float value[WIDTH];
        qs_load<WIDTH>(value, x.data + (int64_t)index[i] * x.stride + column);
        qs_store<WIDTH>(y.data + i * y.stride + column, value);
    });
}

template <typename X, typename Y>
qs_status gather(qs_queue *q, const qs_mat *x, const int32_t *index, qs_mat *y)
{
    const bool vectors = qs_rows_are_vectors(x->data, x->stride, y->cols) && qs_mat_is_vectors(y);
    const qs_row_tiles tiles = qs_row_tiles_make(y->rows, vectors ? y->cols / QS_VECTOR : y->cols);
    if (vectors) {
        QS_LAUNCH((gather_kernel<X, Y, QS_VECTOR>), qs_row_grid(tiles), QS_ROW_THREADS, 0,
                  qs_cuda_stream(q), qs_rows<const X>(x), index, qs_rows<Y>(y), tiles);
    } else {
        QS_LAUNCH((gather_kernel<X, Y, 1>), qs_row_grid(tiles), QS_ROW_THREADS, 0,
                  qs_cuda_stream(q), qs_rows<const X>(x), index, qs_rows<Y>(y), tiles);
    }
    return qs_cuda_launched("gather_rows");
}

template <typename Y>
qs_status gather_to(qs_queue *q, const qs_mat *x, const int32_t *index, qs_mat *y)
{
    switch (x->dtype) {
    case QS_F32:
        return gather<float, Y>(q, x, index, y);
    case QS_BF16:
        return gather<qs_bf16, Y>(q, x, index, y);
    case QS_F16:
        return gather<qs_f16, Y>(q, x, index, y);
    default:
        return QS_FAIL(QS_ERR_BUG, "gather_rows: rows of %s", qs_dtype_name(x->dtype));
    }
}

/* ---- scatter ---- */

/* One pass over y: each row looks whether a row of x comes to it. All threads of a row make the
 * same search, whose few addresses the caches hold. */
template <int WIDTH>
__global__ void __launch_bounds__(QS_ROW_THREADS)
    scatter_kernel(qs_rows_of<const qs_bf16> x, int64_t count, const int32_t *index,
                   qs_rows_of<qs_bf16> y, qs_row_tiles tiles)
{
    qs_for_groups<WIDTH>(tiles, [&](int64_t row, int64_t column) {
        const int64_t from = qs_row_find(index, count, row);
        float value[WIDTH];
        if (from >= 0) {
            qs_load<WIDTH>(value, x.data + from * x.stride + column);
        } else {
            for (int i = 0; i < WIDTH; i++) {
                value[i] = 0.0f;
            }
        }
        qs_store<WIDTH>(y.data + row * y.stride + column, value);
    });
}

/* ---- copies of bytes ---- */

/* Rows are cut into pieces of 16 bytes, one a thread, so that the tiles of core/rows.h serve. A
 * piece goes as wide as the row's two addresses and its length allow. */
enum { PIECE = 16 };

template <typename T>
__device__ __forceinline__ void copy_piece(uint8_t *to, const uint8_t *from, int bytes)
{
    for (int i = 0; i < bytes; i += (int)sizeof(T)) {
        *reinterpret_cast<T *>(to + i) = *reinterpret_cast<const T *>(from + i);
    }
}

__global__ void __launch_bounds__(QS_ROW_THREADS)
    copy_kernel(const uint8_t *base, const int64_t *at, int64_t row_bytes, uint8_t *out,
                qs_row_tiles tiles)
{
    qs_for_groups<PIECE>(tiles, [&](int64_t row, int64_t first) {
        const uint8_t *from = base + at[row] + first;
        uint8_t *to = out + row * row_bytes + first;
        const int bytes = (int)qs_hd_min(PIECE, row_bytes - first);
        switch (qs_copy_width((uintptr_t)from | (uintptr_t)to | (uint64_t)bytes)) {
        case 16:
            copy_piece<uint4>(to, from, bytes);
            break;
        case 4:
            copy_piece<uint32_t>(to, from, bytes);
            break;
        case 2:
            copy_piece<uint16_t>(to, from, bytes);
            break;
        default:
            copy_piece<uint8_t>(to, from, bytes);
        }
    });
}

/* ---- conversion ---- */

struct convert_op {
    const float *src;
    qs_bf16 *dst;

    template <int WIDTH> __device__ __forceinline__ void at(int64_t i) const
    {
        float value[WIDTH];
        qs_load<WIDTH>(value, src + i);
        qs_store<WIDTH>(dst + i, value);
    }
};

} // namespace

extern "C" qs_status qs_cuda_gather_rows(qs_queue *q, const qs_mat *x, const int32_t *index,
                                         qs_mat *y)
{
    if (y->rows == 0 || y->cols == 0) {
        return QS_OK;
    }
    switch (y->dtype) {
    case QS_BF16:
        return gather_to<qs_bf16>(q, x, index, y);
    case QS_F32:
        return gather_to<float>(q, x, index, y);
    default:
        return QS_FAIL(QS_ERR_BUG, "gather_rows: to rows of %s", qs_dtype_name(y->dtype));
    }
}

extern "C" qs_status qs_cuda_scatter_rows(qs_queue *q, const qs_mat *x, const int32_t *index,
                                          qs_mat *y)
{
    if (y->rows == 0 || y->cols == 0) {
        return QS_OK;
    }
    const qs_rows_of<const qs_bf16> from = qs_rows<const qs_bf16>(x);
    const qs_rows_of<qs_bf16> to = qs_rows<qs_bf16>(y);
    const bool vectors = qs_rows_are_vectors(x->data, x->stride, y->cols) && qs_mat_is_vectors(y);
    const qs_row_tiles tiles = qs_row_tiles_make(y->rows, vectors ? y->cols / QS_VECTOR : y->cols);
    if (vectors) {
        QS_LAUNCH((scatter_kernel<QS_VECTOR>), qs_row_grid(tiles), QS_ROW_THREADS, 0,
                  qs_cuda_stream(q), from, x->rows, index, to, tiles);
    } else {
        QS_LAUNCH((scatter_kernel<1>), qs_row_grid(tiles), QS_ROW_THREADS, 0, qs_cuda_stream(q),
                  from, x->rows, index, to, tiles);
    }
    return qs_cuda_launched("scatter_rows");
}

extern "C" qs_status qs_cuda_copy_rows(qs_queue *q, const uint8_t *base, const int64_t *at,
                                       int64_t count, size_t row_bytes, uint8_t *out)
{
    if (count == 0 || row_bytes == 0) {
        return QS_OK;
    }
    const int64_t bytes = (int64_t)row_bytes;
    const qs_row_tiles tiles = qs_row_tiles_make(count, qs_hd_ceil_div(bytes, PIECE));
    QS_LAUNCH(copy_kernel, qs_row_grid(tiles), QS_ROW_THREADS, 0, qs_cuda_stream(q), base, at,
              bytes, out, tiles);
    return qs_cuda_launched("copy_rows");
}

extern "C" qs_status qs_cuda_convert(qs_queue *q, const float *src, int64_t count, void *dst)
{
    const convert_op op = {src, static_cast<qs_bf16 *>(dst)};
    return qs_launch_flat(q, op, count, ((uintptr_t)src | (uintptr_t)dst) % 16 == 0, "convert");
}
