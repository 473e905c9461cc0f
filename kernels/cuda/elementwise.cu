/* What touches every element once: RoPE, gated MLPs, addition, scaling. bf16 in and out, or a sum
 * and what is scaled in fp32 where they are of the residual stream; fp32 between, one rounding at
 * the end; the same operations in the same order as kernels/cpu/elementwise.c, so that RoPE,
 * addition and scaling give the CPU's bits, rounded.
 *
 * Memory-bound. Bytes an element: rope 4 (tables stay in the caches: a token's rows of them serve
 * all its heads), gated MLP forward 6, backward 10, add 6, scale 4; of an fp32 stream 10 and 8. A
 * thread moves 8 elements of each matrix in pieces of 16 bytes; where an address or a length does
 * not allow that, one element.
 *
 * Registers (sm_80, 86, 89, 90a, 100, 120; by 8 elements; tests/gpu/registers.py): rope 44-48,
 * gated MLP forward 31-37, backward 40-43, add 30-37, scale 22-29; of an fp32 stream add 28-36,
 * scale 23-36. No shared memory, no spills. */
#include "kernels/cuda/vector.cuh"

namespace
{

/* ---- rotary embedding (Su et al. 2021, arXiv:2104.09864) ---- */

struct rope_call {
    qs_rows_of<qs_bf16> x;
    int head_dim, half;
    const float *cos, *sin;
    const int32_t *position;
    float sign;
};

template <int WIDTH>
__global__ void __launch_bounds__(QS_ROW_THREADS) rope_kernel(rope_call c, qs_row_tiles tiles)
{
    qs_for_groups<1>(tiles, [&](int64_t t, int64_t group) {
        const qs_rope_pair pair = qs_rope_pair_at(group, c.head_dim, c.half, WIDTH);
        const int64_t angle = (int64_t)c.position[t] * c.half + pair.angle;
        qs_bf16 *row = c.x.data + t * c.x.stride;
        float a[WIDTH], b[WIDTH], cos[WIDTH], sin[WIDTH];
        qs_load<WIDTH>(a, row + pair.low);
        qs_load<WIDTH>(b, row + pair.high);
        qs_load<WIDTH>(cos, c.cos + angle);
        qs_load<WIDTH>(sin, c.sin + angle);
        for (int i = 0; i < WIDTH; i++) {
            const float s = c.sign * sin[i], low = a[i], high = b[i];
            a[i] = low * cos[i] - high * s;
            b[i] = high * cos[i] + low * s;
        }
        qs_store<WIDTH>(row + pair.low, a);
        qs_store<WIDTH>(row + pair.high, b);
    });
}

/* ---- gated MLPs (Shazeer 2020, arXiv:2002.05202), addition, scaling: rows of up to five matrices
 * ---- */

/* STREAM: of a and y where they belong to the residual stream, bf16 or float. */
template <typename STREAM> struct rows_call {
    qs_rows_of<const STREAM> a;
    qs_rows_of<const qs_bf16> b, c;
    qs_rows_of<STREAM> y;
    qs_rows_of<qs_bf16> z;
};

__device__ __forceinline__ float sigmoid(float x)
{
    return 1.0f / (1.0f + expf(-x));
}

/* One kernel an operation, all alike: load a group of each input, `OP::apply` element by element,
 * store. A thread has read all of its elements before it writes the first, and nobody else reads
 * them: outputs may lie where inputs lie. */

/* Both gates are g sigmoid(z(g)): z = g, or 2 u, as (1 + tanh u) / 2 = sigmoid(2 u). */
template <qs_glu GLU> __device__ __forceinline__ float glu(float g)
{
    const float gelu_1 = 1.5957691216057308f;   /* 2 sqrt(2 / pi) */
    const float gelu_3 = 0.071354816272600244f; /* that times 0.044715 */
    return sigmoid(GLU == QS_GLU_SILU ? g : g * (gelu_1 + gelu_3 * (g * g)));
}

/* dz / dg */
template <qs_glu GLU> __device__ __forceinline__ float glu_slope(float g)
{
    const float gelu_1 = 1.5957691216057308f, gelu_3 = 0.071354816272600244f;
    return GLU == QS_GLU_SILU ? 1.0f : gelu_1 + 3.0f * gelu_3 * (g * g);
}

template <qs_glu GLU> struct glu_forward_op {
    enum { INPUTS = 2, OUTPUTS = 1 };
    __device__ __forceinline__ void apply(float gate, float up, float, float *act, float *) const
    {
        *act = gate * glu<GLU>(gate) * up;
    }
};

/* d (g s) / dg = s + g s (1 - s) dz / dg, s = sigmoid(z). */
template <qs_glu GLU> struct glu_backward_op {
    enum { INPUTS = 3, OUTPUTS = 2 };
    __device__ __forceinline__ void apply(float gate, float up, float dact, float *dgate,
                                          float *dup) const
    {
        const float s = glu<GLU>(gate);
        *dgate = dact * up * (s + gate * s * (1.0f - s) * glu_slope<GLU>(gate));
        *dup = dact * (gate * s);
    }
};

struct add_op {
    enum { INPUTS = 2, OUTPUTS = 1 };
    __device__ __forceinline__ void apply(float a, float b, float, float *y, float *) const
    {
        *y = a + b;
    }
};

struct scale_op {
    enum { INPUTS = 1, OUTPUTS = 1 };
    float by;
    __device__ __forceinline__ void apply(float x, float, float, float *y, float *) const
    {
        *y = x * by;
    }
};

template <typename OP, typename STREAM, int WIDTH>
__global__ void __launch_bounds__(QS_ROW_THREADS)
    rows_kernel(OP op, rows_call<STREAM> m, qs_row_tiles tiles)
{
    qs_for_groups<WIDTH>(tiles, [&](int64_t t, int64_t column) {
        float a[WIDTH], b[WIDTH], c[WIDTH], y[WIDTH], z[WIDTH];
        qs_load<WIDTH>(a, m.a.data + t * m.a.stride + column);
        if constexpr (OP::INPUTS >= 2) {
            qs_load<WIDTH>(b, m.b.data + t * m.b.stride + column);
        }
        if constexpr (OP::INPUTS == 3) {
            qs_load<WIDTH>(c, m.c.data + t * m.c.stride + column);
        }
        for (int i = 0; i < WIDTH; i++) {
            op.apply(a[i], OP::INPUTS >= 2 ? b[i] : 0.0f, OP::INPUTS == 3 ? c[i] : 0.0f, &y[i],
                     &z[i]);
        }
        qs_store<WIDTH>(m.y.data + t * m.y.stride + column, y);
        if constexpr (OP::OUTPUTS == 2) {
            qs_store<WIDTH>(m.z.data + t * m.z.stride + column, z);
        }
    });
}

template <typename T> qs_rows_of<T> rows_or_none(const qs_mat *mat)
{
    return mat != NULL ? qs_rows<T>(mat) : qs_rows_of<T>{NULL, 0};
}

/* `mats` are a, b, c, y, z of rows_call; the absent ones NULL. */
template <typename OP, typename STREAM>
qs_status for_rows_of(qs_queue *q, OP op, const qs_mat *const mats[5], const char *name)
{
    const int64_t rows = mats[0]->rows, cols = mats[0]->cols;
    if (rows == 0 || cols == 0) {
        return QS_OK;
    }
    bool vectors = true;
    for (int i = 0; i < 5; i++) {
        vectors = vectors && (mats[i] == NULL || qs_mat_is_vectors(mats[i]));
    }
    const rows_call<STREAM> call = {qs_rows<const STREAM>(mats[0]),
                                    rows_or_none<const qs_bf16>(mats[1]),
                                    rows_or_none<const qs_bf16>(mats[2]), qs_rows<STREAM>(mats[3]),
                                    rows_or_none<qs_bf16>(mats[4])};
    const qs_row_tiles tiles = qs_row_tiles_make(rows, vectors ? cols / QS_VECTOR : cols);
    if (vectors) {
        QS_LAUNCH((rows_kernel<OP, STREAM, QS_VECTOR>), qs_row_grid(tiles), QS_ROW_THREADS, 0,
                  qs_cuda_stream(q), op, call, tiles);
    } else {
        QS_LAUNCH((rows_kernel<OP, STREAM, 1>), qs_row_grid(tiles), QS_ROW_THREADS, 0,
                  qs_cuda_stream(q), op, call, tiles);
    }
    return qs_cuda_launched(name);
}

template <typename OP>
qs_status for_rows(qs_queue *q, OP op, const qs_mat *const mats[5], const char *name)
{
    return for_rows_of<OP, qs_bf16>(q, op, mats, name);
}

/* Of the residual stream: bf16 or fp32. */
template <typename OP>
qs_status for_stream(qs_queue *q, OP op, const qs_mat *const mats[5], const char *name)
{
    return mats[0]->dtype == QS_F32 ? for_rows_of<OP, float>(q, op, mats, name)
                                    : for_rows_of<OP, qs_bf16>(q, op, mats, name);
}

} // namespace

extern "C" qs_status qs_cuda_rope(qs_queue *q, qs_mat *x, int n_heads, int head_dim, int rotary_dim,
                                  const float *cos, const float *sin, const int32_t *position,
                                  bool inverse)
{
    const int half = rotary_dim / 2;
    if (x->rows == 0 || n_heads == 0 || half == 0) {
        return QS_OK;
    }
    const rope_call call = {qs_rows<qs_bf16>(x),   head_dim, half, cos, sin, position,
                            inverse ? -1.0f : 1.0f};
    const bool vectors = qs_mat_is_vectors(x) && head_dim % QS_VECTOR == 0 &&
                         qs_rows_are_vectors(cos, half, half) &&
                         qs_rows_are_vectors(sin, half, half);
    const int width = vectors ? QS_VECTOR : 1;
    const qs_row_tiles tiles = qs_row_tiles_make(x->rows, (int64_t)n_heads * (half / width));
    if (vectors) {
        QS_LAUNCH((rope_kernel<QS_VECTOR>), qs_row_grid(tiles), QS_ROW_THREADS, 0,
                  qs_cuda_stream(q), call, tiles);
    } else {
        QS_LAUNCH((rope_kernel<1>), qs_row_grid(tiles), QS_ROW_THREADS, 0, qs_cuda_stream(q), call,
                  tiles);
    }
    return qs_cuda_launched("rope");
}

extern "C" qs_status qs_cuda_glu_forward(qs_queue *q, qs_glu glu, const qs_mat *gate,
                                         const qs_mat *up, qs_mat *act)
{
    const qs_mat *const mats[5] = {gate, up, NULL, act, NULL};
    return glu == QS_GLU_SILU
               ? for_rows(q, glu_forward_op<QS_GLU_SILU>(), mats, "glu_forward")
               : for_rows(q, glu_forward_op<QS_GLU_GELU_TANH>(), mats, "glu_forward");
}

extern "C" qs_status qs_cuda_glu_backward(qs_queue *q, qs_glu glu, const qs_mat *gate,
                                          const qs_mat *up, const qs_mat *dact, qs_mat *dgate,
                                          qs_mat *dup)
{
    const qs_mat *const mats[5] = {gate, up, dact, dgate, dup};
    return glu == QS_GLU_SILU
               ? for_rows(q, glu_backward_op<QS_GLU_SILU>(), mats, "glu_backward")
               : for_rows(q, glu_backward_op<QS_GLU_GELU_TANH>(), mats, "glu_backward");
}

extern "C" qs_status qs_cuda_add(qs_queue *q, const qs_mat *a, const qs_mat *b, qs_mat *y)
{
    const qs_mat *const mats[5] = {a, b, NULL, y, NULL};
    return for_stream(q, add_op(), mats, "add");
}

extern "C" qs_status qs_cuda_scale(qs_queue *q, float by, qs_mat *y)
{
    const qs_mat *const mats[5] = {y, NULL, NULL, y, NULL};
    return for_stream(q, scale_op{by}, mats, "scale");
}
