/* The inner loops, written once. The including file defines
 *
 *   ISA_NAME, ISA_TABLE            "avx512", qs_isa_avx512
 *   ISA_MR, ISA_NV                 rows and vectors of a register tile
 *   vec, VEC_LANES                 the vector of the register tile, and vec_load, vec_store,
 * vec_zero, vec_splat, vec_add, vec_fma, each one instruction isa_transpose, isa_nf4_block,
 * isa_round16, isa_widen_f16
 *
 * Everything below the tile works on 16 lanes as GCC vectors: one register, two, or four, the
 * same operations on the same lanes in each. Multiplication and addition are not contracted
 * (-ffp-contract=off). */
#include <math.h>
#include <string.h>

#include "kernels/cpu/isa.h"

/* ---- register tile ---- */

/* `rows` and `vectors` are constants at every call below, so that the sums stay in registers. */
static inline __attribute__((always_inline)) void tile_fixed(int rows, int vectors, int64_t depth,
                                                             const float *a, const float *b,
                                                             float *c, int64_t c_stride,
                                                             bool accumulate)
{
    vec sum[ISA_MR][ISA_NV];
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            sum[i][v] = vec_zero();
        }
    }
    for (int64_t k = 0; k < depth; k++) {
        vec right[ISA_NV];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            right[v] = vec_load(b + v * VEC_LANES);
        }
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) {
            vec left = vec_splat(a[i]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                sum[i][v] = vec_fma(left, right[v], sum[i][v]);
            }
        }
        a += ISA_MR;
        b += ISA_NV * VEC_LANES;
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            float *to = c + i * c_stride + v * VEC_LANES;
            vec_store(to, accumulate ? vec_add(vec_load(to), sum[i][v]) : sum[i][v]);
        }
    }
}

#define TILE_CASE(r)                                                                               \
    case r:                                                                                        \
        tile_fixed(r <= ISA_MR ? r : ISA_MR, vectors, depth, a, b, c, c_stride, accumulate);       \
        break;

static inline __attribute__((always_inline)) void tile_rows(int rows, int vectors, int64_t depth,
                                                            const float *a, const float *b,
                                                            float *c, int64_t c_stride,
                                                            bool accumulate)
{
    switch (rows) {
        TILE_CASE(1)
        TILE_CASE(2)
        TILE_CASE(3)
        TILE_CASE(4)
#if ISA_MR > 4
        TILE_CASE(5)
        TILE_CASE(6)
#endif
#if ISA_MR > 6
        TILE_CASE(7)
        TILE_CASE(8)
        TILE_CASE(9)
        TILE_CASE(10)
        TILE_CASE(11)
        TILE_CASE(12)
        TILE_CASE(13)
        TILE_CASE(14)
#endif
    }
}

/* All vectors, or the first only: adapters of rank 16 and less need no more. */
static void tile_wide(int rows, int64_t depth, const float *a, const float *b, float *c,
                      int64_t c_stride, bool accumulate)
{
    tile_rows(rows, ISA_NV, depth, a, b, c, c_stride, accumulate);
}

static void tile_narrow(int rows, int64_t depth, const float *a, const float *b, float *c,
                        int64_t c_stride, bool accumulate)
{
    tile_rows(rows, 1, depth, a, b, c, c_stride, accumulate);
}

static void isa_tile(int rows, int cols, int64_t depth, const float *a, const float *b, float *c,
                     int64_t c_stride, bool accumulate)
{
    enum { NR = ISA_NV * VEC_LANES };
    if (cols == NR) {
        tile_wide(rows, depth, a, b, c, c_stride, accumulate);
        return;
    }
    if (cols == VEC_LANES) {
        tile_narrow(rows, depth, a, b, c, c_stride, accumulate);
        return;
    }
    /* A ragged right edge: the whole tile beside C, then the columns that exist. */
    float whole[ISA_MR * NR];
    if (cols < VEC_LANES) {
        tile_narrow(rows, depth, a, b, whole, NR, false);
    } else {
        tile_wide(rows, depth, a, b, whole, NR, false);
    }
    for (int i = 0; i < rows; i++) {
        for (int j = 0; j < cols; j++) {
            float sum = whole[i * NR + j];
            c[i * c_stride + j] = accumulate ? c[i * c_stride + j] + sum : sum;
        }
    }
}

/* ---- NF4 ---- */

static void isa_nf4_decode(const uint8_t *packed, const float *absmax, int64_t blocks,
                           qs_dtype dtype, float *out)
{
    for (int64_t i = 0; i < blocks; i++) {
        isa_nf4_block(packed, absmax[i], dtype, out);
        packed += QS_NF4_BLOCK / 2;
        out += QS_NF4_BLOCK;
    }
}

static void isa_widen(const uint8_t *src, qs_dtype dtype, int64_t count, float *out)
{
    if (dtype == QS_BF16) {
        for (int64_t i = 0; i < count; i++) {
            uint16_t half;
            memcpy(&half, src + 2 * i, sizeof half);
            uint32_t bits = (uint32_t)half << 16;
            memcpy(&out[i], &bits, sizeof bits);
        }
    } else if (dtype == QS_F16) {
        isa_widen_f16(src, count, out);
    } else {
        memcpy(out, src, (size_t)count * sizeof *out);
    }
}

/* ---- 16 lanes ---- */

typedef float f16x __attribute__((vector_size(64)));
typedef int32_t i16x __attribute__((vector_size(64)));

static inline f16x lanes_load(const float *p)
{
    f16x v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline void lanes_store(float *p, f16x v)
{
    memcpy(p, &v, sizeof v);
}

/* The last, shorter vector: missing lanes are `fill`. */
static inline f16x lanes_load_part(const float *p, int64_t count, float fill)
{
    float part[16];
    for (int i = 0; i < 16; i++) {
        part[i] = i < count ? p[i] : fill;
    }
    return lanes_load(part);
}

static inline void lanes_store_part(float *p, int64_t count, f16x v)
{
    float part[16];
    lanes_store(part, v);
    memcpy(p, part, (size_t)count * sizeof *p);
}

static inline f16x lanes_splat(float x)
{
    return (f16x){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
}

/* The tree of every 16-lane sum: the upper half is added to the lower until one lane is left. */
static inline float lanes_sum(f16x v)
{
    v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3);
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1);
    v += __builtin_shufflevector(v, v, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0);
    return v[0];
}

/* exp: n = round(x / ln 2), r = x - n ln 2 in two pieces, the series to r^7 (|r| <= 0.347: the next
 * term is 5e-9), times 2^n. Below -87 the result is 0, because denormals are not worth their
 * time; from 88.38 on, where n = 128, it is infinity. The bounds are the first operands, so that
 * NaN goes through. */
static inline f16x lanes_exp(f16x x)
{
    const f16x lo = lanes_splat(-87.0F), hi = lanes_splat(89.0F);
    const f16x round = lanes_splat(12582912.0F); /* 1.5 * 2^23: adding it rounds to an integer */
    f16x bounded = isa_min16(hi, isa_max16(lo, x));
    f16x shifted = bounded * lanes_splat(1.44269504F) + round;
    f16x n = shifted - round;
    f16x r = bounded - n * lanes_splat(0.693359375F);
    r = r - n * lanes_splat(-2.12194440e-4F);
    /* (1/2 + r/6) + r^2 ((1/24 + r/120) + r^2 (1/720 + r/5040)): shorter chains than Horner's. */
    f16x square = r * r;
    f16x low = r * lanes_splat(1.0F / 6.0F) + lanes_splat(0.5F);
    f16x middle = r * lanes_splat(1.0F / 120.0F) + lanes_splat(1.0F / 24.0F);
    f16x high = r * lanes_splat(1.0F / 5040.0F) + lanes_splat(1.0F / 720.0F);
    f16x value = ((high * square + middle) * square + low) * square + r + lanes_splat(1.0F);
    value *= (f16x)(((i16x)shifted - ((i16x)round - 127)) << 23);
    return (f16x)(~(x <= lo) & (i16x)value);
}

static float isa_dot(const float *x, const float *y, int64_t count)
{
    f16x sum = lanes_splat(0.0F);
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        sum += lanes_load(x + i) * lanes_load(y + i);
    }
    if (i < count) {
        sum += lanes_load_part(x + i, count - i, 0.0F) * lanes_load_part(y + i, count - i, 0.0F);
    }
    return lanes_sum(sum);
}

static float isa_dot3(const float *x, const float *y, const float *z, int64_t count)
{
    f16x sum = lanes_splat(0.0F);
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        sum += lanes_load(x + i) * lanes_load(y + i) * lanes_load(z + i);
    }
    if (i < count) {
        int64_t left = count - i;
        sum += lanes_load_part(x + i, left, 0.0F) * lanes_load_part(y + i, left, 0.0F) *
               lanes_load_part(z + i, left, 0.0F);
    }
    return lanes_sum(sum);
}

static float isa_max(const float *x, int64_t count)
{
    f16x most = lanes_splat(-INFINITY);
    for (int64_t i = 0; i < count; i += 16) {
        f16x v = i + 16 <= count ? lanes_load(x + i) : lanes_load_part(x + i, count - i, -INFINITY);
        most = isa_max16(v, most); /* of NaN and a number, the number */
    }
    float lane[16];
    lanes_store(lane, most);
    for (int i = 1; i < 16; i++) {
        lane[0] = lane[i] > lane[0] ? lane[i] : lane[0];
    }
    return lane[0];
}

static float isa_exp_sum(float *x, int64_t count, float scale, float shift)
{
    f16x sum = lanes_splat(0.0F);
    const f16x by = lanes_splat(scale), minus = lanes_splat(shift);
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        f16x e = lanes_exp(lanes_load(x + i) * by - minus);
        lanes_store(x + i, e);
        sum += e;
    }
    if (i < count) {
        f16x e = lanes_exp(lanes_load_part(x + i, count - i, 0.0F) * by - minus);
        lanes_store_part(x + i, count - i, e);
        sum += lanes_load_part(x + i, count - i, 0.0F);
    }
    return lanes_sum(sum);
}

static void isa_softmax_backward(const float *p, int64_t count, float delta, float scale, float *ds)
{
    for (int64_t i = 0; i < count; i++) {
        ds[i] = p[i] * (ds[i] - delta) * scale;
    }
}

/* tanh within 2 ulp: near 0 the polynomial of Cephes' tanhf, where 1 - 2 / (1 + exp(2 |x|)) would
 * cancel. */
static inline f16x lanes_tanh(f16x x)
{
    const f16x one = lanes_splat(1.0F), z = x * x;
    f16x near = lanes_splat(-5.70498872745e-3F) * z + lanes_splat(2.06390887954e-2F);
    near = near * z + lanes_splat(-5.37397155531e-2F);
    near = near * z + lanes_splat(1.33314422036e-1F);
    near = near * z + lanes_splat(-3.33332819422e-1F);
    near = near * z * x + x;
    const i16x sign = (i16x)x & (i16x)lanes_splat(-0.0F);
    const f16x size = (f16x)((i16x)x ^ sign);
    const f16x far = one - lanes_splat(2.0F) / (one + lanes_exp(size + size));
    const i16x is_near = size < lanes_splat(0.625F);
    return (f16x)((is_near & (i16x)near) | (~is_near & ((i16x)far | sign)));
}

static void isa_soft_cap(float *x, int64_t count, float scale, float cap)
{
    const f16x by = lanes_splat(scale), most = lanes_splat(cap);
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        lanes_store(x + i, most * lanes_tanh(lanes_load(x + i) * by / most));
    }
    if (i < count) {
        const f16x part = lanes_load_part(x + i, count - i, 0.0F);
        lanes_store_part(x + i, count - i, most * lanes_tanh(part * by / most));
    }
}

static void isa_soft_cap_backward(const float *capped, int64_t count, float delta, float cap,
                                  float *d)
{
    for (int64_t i = 0; i < count; i++) {
        const float tanh = capped[i] / cap;
        d[i] = (d[i] - delta) * (1.0F - tanh * tanh);
    }
}

static inline f16x lanes_sigmoid(f16x x)
{
    return lanes_splat(1.0F) / (lanes_splat(1.0F) + lanes_exp(-x));
}

/* Both gates are g sigmoid(z(g)): z = g, or 2 u, as (1 + tanh u) / 2 = sigmoid(2 u). Without tanh
 * nothing cancels where a gate is nearly closed. */
static const float GELU_1 = 1.5957691216057308F;   /* 2 sqrt(2 / pi) */
static const float GELU_3 = 0.071354816272600244F; /* that times 0.044715 */

static inline f16x lanes_glu(qs_glu glu, f16x g)
{
    const f16x z = g * (lanes_splat(GELU_1) + lanes_splat(GELU_3) * (g * g));
    return lanes_sigmoid(glu == QS_GLU_SILU ? g : z);
}

/* dz / dg */
static inline f16x lanes_glu_slope(qs_glu glu, f16x g)
{
    const f16x slope = lanes_splat(GELU_1) + lanes_splat(3.0F * GELU_3) * (g * g);
    return glu == QS_GLU_SILU ? lanes_splat(1.0F) : slope;
}

static void isa_glu(qs_glu glu, const float *gate, const float *up, int64_t count, float *act)
{
    for (int64_t i = 0; i < count; i += 16) {
        if (i + 16 <= count) {
            f16x g = lanes_load(gate + i);
            lanes_store(act + i, g * lanes_glu(glu, g) * lanes_load(up + i));
        } else {
            f16x g = lanes_load_part(gate + i, count - i, 0.0F);
            f16x u = lanes_load_part(up + i, count - i, 0.0F);
            lanes_store_part(act + i, count - i, g * lanes_glu(glu, g) * u);
        }
    }
}

/* d (g s) / dg = s + g s (1 - s) dz / dg, s = sigmoid(z). */
static void isa_glu_backward(qs_glu glu, const float *gate, const float *up, const float *dact,
                             int64_t count, float *dgate, float *dup)
{
    const f16x one = lanes_splat(1.0F);
    for (int64_t i = 0; i < count; i += 16) {
        bool whole = i + 16 <= count;
        int64_t left = count - i;
        f16x g = whole ? lanes_load(gate + i) : lanes_load_part(gate + i, left, 0.0F);
        f16x u = whole ? lanes_load(up + i) : lanes_load_part(up + i, left, 0.0F);
        f16x d = whole ? lanes_load(dact + i) : lanes_load_part(dact + i, left, 0.0F);
        f16x s = lanes_glu(glu, g);
        f16x dg = d * u * (s + g * s * (one - s) * lanes_glu_slope(glu, g));
        f16x du = d * (g * s);
        if (whole) {
            lanes_store(dgate + i, dg);
            lanes_store(dup + i, du);
        } else {
            lanes_store_part(dgate + i, left, dg);
            lanes_store_part(dup + i, left, du);
        }
    }
}

/* ---- dropout ---- */

typedef uint32_t u16x __attribute__((vector_size(64)));
typedef uint64_t u8x __attribute__((vector_size(64)));

static inline u16x lanes_splat_u32(uint32_t x)
{
    return (u16x){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
}

/* High and low words of 16 products of 32 bits: those of the even lanes, then of the odd ones. */
static inline u16x mul_words(u16x x, uint32_t by, u16x *high)
{
    const u8x upper = (u8x)lanes_splat_u32(0) + 0xFFFFFFFF00000000U;
    u16x factor = lanes_splat_u32(by);
    u8x even = isa_mul_even((u8x)x, (u8x)factor);
    u8x odd = isa_mul_even((u8x)x >> 32, (u8x)factor);
    *high = (u16x)((even >> 32) | (odd & upper));
    return (u16x)((even & ~upper) | (odd << 32));
}

/* Words of blocks block .. block + 15 in element order: Philox4x32-10 as behind qs_rng_block, a
 * block in each lane. */
static void philox16(const qs_rng *rng, uint64_t block, uint32_t out[64])
{
    uint32_t low[16], high[16];
    for (uint64_t lane = 0; lane < 16; lane++) {
        low[lane] = (uint32_t)(block + lane);
        high[lane] = (uint32_t)((block + lane) >> 32);
    }
    u16x c0, c1, c2 = lanes_splat_u32(rng->site), c3 = lanes_splat_u32(rng->layer);
    memcpy(&c0, low, sizeof c0);
    memcpy(&c1, high, sizeof c1);
    uint32_t key0 = (uint32_t)rng->key, key1 = (uint32_t)(rng->key >> 32);
    for (int round = 0; round < 10; round++) {
        u16x high0, high1;
        u16x low0 = mul_words(c0, 0xD2511F53U, &high0);
        u16x low1 = mul_words(c2, 0xCD9E8D57U, &high1);
        c0 = high1 ^ c1 ^ lanes_splat_u32(key0);
        c2 = high0 ^ c3 ^ lanes_splat_u32(key1);
        c1 = low1;
        c3 = low0;
        key0 += 0x9E3779B9U;
        key1 += 0xBB67AE85U;
    }
    for (int half = 0; half < 2; half++) {
        u16x first, second; /* words 0 and 1, and 2 and 3, of eight blocks */
        if (half == 0) {
            first = __builtin_shufflevector(c0, c1, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22,
                                            7, 23);
            second = __builtin_shufflevector(c2, c3, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6,
                                             22, 7, 23);
        } else {
            first = __builtin_shufflevector(c0, c1, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29,
                                            14, 30, 15, 31);
            second = __builtin_shufflevector(c2, c3, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29,
                                             14, 30, 15, 31);
        }
        u16x four = __builtin_shufflevector(first, second, 0, 1, 16, 17, 2, 3, 18, 19, 4, 5, 20, 21,
                                            6, 7, 22, 23);
        u16x more = __builtin_shufflevector(first, second, 8, 9, 24, 25, 10, 11, 26, 27, 12, 13, 28,
                                            29, 14, 15, 30, 31);
        memcpy(out + half * 32, &four, sizeof four);
        memcpy(out + half * 32 + 16, &more, sizeof more);
    }
}

static void isa_dropout(const qs_rng *rng, uint64_t element, int64_t count, float p, float keep,
                        const float *x, float *out)
{
    while (count > 0) {
        uint32_t words[64];
        int64_t skip = (int64_t)(element % 4);
        int64_t here = 64 - skip < count ? 64 - skip : count;
        philox16(rng, element / 4, words);
        for (int64_t i = 0; i < here; i++) {
            /* As qs_rng_uniform. Not x * 0: a dropped element is 0 whatever it was. */
            float uniform = (float)(int32_t)(words[skip + i] >> 8) * 0x1p-24F;
            float kept = x[i] * keep;
            out[i] = uniform >= p ? kept : 0.0F;
        }
        element += (uint64_t)here;
        x += here;
        out += here;
        count -= here;
    }
}

const qs_isa *ISA_TABLE(void)
{
    static const qs_isa table = {
        .name = ISA_NAME,
        .mr = ISA_MR,
        .nr = ISA_NV * VEC_LANES,
        .tile = isa_tile,
        .transpose = isa_transpose,
        .nf4_decode = isa_nf4_decode,
        .widen = isa_widen,
        .dot = isa_dot,
        .dot3 = isa_dot3,
        .max = isa_max,
        .exp_sum = isa_exp_sum,
        .softmax_backward = isa_softmax_backward,
        .soft_cap = isa_soft_cap,
        .soft_cap_backward = isa_soft_cap_backward,
        .glu = isa_glu,
        .glu_backward = isa_glu_backward,
        .dropout = isa_dropout,
    };
    return &table;
}
