/* The inner loops, written once. The including file defines
 *
 *   ISA_NAME, ISA_TABLE       "avx512", qs_isa_avx512
 *   ISA_MR, ISA_NV            rows and vectors of a register tile
 *   vec, VEC_LANES            the vector of the register tile, and vec_load, vec_store, vec_zero,
 *                             vec_splat, vec_add, vec_fma, each one instruction
 *   ISA_LANES                 floats of the vector that everything below the tile works on: 4, 8
 *                             or 16
 *   isa_max, isa_min, isa_fma, isa_mul_even, isa_fold
 *                             of such vectors, where C has no operator for it
 *   isa_transpose, isa_nf4_block, isa_widen_f16
 *
 * Below the tile a loop takes 16 elements at a time, in as many vectors as they need: the same
 * operations on the same 16 lanes for any of them. (GCC's vectors may be wider than a register, but
 * GCC 12 then moves them through memory.) Multiplication and addition are not contracted
 * (-ffp-contract=off). */
#include <math.h>
#include <string.h>

#include "kernels/cpu/isa.h"

/* ---- register tile ---- */

#define TILE_MR ISA_MR
#define TILE_NV ISA_NV
#define TILE_LANES VEC_LANES
#define add_one(a, b) ((a) + (b))
#define tile_load(p) vec_load(p)
#define tile_splat(x) vec_splat(x)
#define tile_fma(a, b, c) vec_fma(a, b, c)

typedef float tile_elem;
typedef vec tile_elems;

#include "kernels/cpu/register_tile.h"

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

/* ---- vectors of ISA_LANES floats; 16 elements are LANE_PARTS of them ---- */

enum { LANE_PARTS = 16 / ISA_LANES };

typedef float lanes __attribute__((vector_size(4 * ISA_LANES)));
typedef int32_t lanes_i32 __attribute__((vector_size(4 * ISA_LANES)));

static inline lanes lanes_load(const float *p)
{
    lanes v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline void lanes_store(float *p, lanes v)
{
    memcpy(p, &v, sizeof v);
}

static inline lanes lanes_splat(float x)
{
    return x - (lanes){0};
}

/* The last elements of a row, fewer than 16: a copy with `fill` behind them. */
static inline const float *tail(const float *p, int64_t count, float fill, float copy[16])
{
    for (int i = 0; i < 16; i++) {
        copy[i] = i < count ? p[i] : fill;
    }
    return copy;
}

/* The tree of every 16-lane sum: the upper half is added to the lower until one lane is left. */
static inline float lanes_sum(lanes part[LANE_PARTS])
{
    for (int half = LANE_PARTS / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; i++) {
            part[i] += part[i + half];
        }
    }
    return isa_fold(part[0]);
}

/* exp: n = round(x / ln 2), r = x - n ln 2 in two pieces, the series to r^7 (|r| <= 0.347: the next
 * term is 5e-9), times 2^n. From -87.68 down, where n = -127, that is 0, because denormals are not
 * worth their time; from 88.38 on, where n = 128, it is infinity: the bits of both powers say so,
 * and no lane has to be asked. The bounds are the first operands, so that NaN goes through. */
static inline lanes lanes_exp(lanes x)
{
    const lanes lo = lanes_splat(-88.0F), hi = lanes_splat(89.0F);
    const lanes round = lanes_splat(12582912.0F); /* 1.5 * 2^23: adding it rounds to an integer */
    lanes bounded = isa_min(hi, isa_max(lo, x));
    lanes shifted = isa_fma(bounded, lanes_splat(1.44269504F), round);
    lanes n = shifted - round;
    lanes r = isa_fma(n, lanes_splat(-0.693359375F), bounded);
    r = isa_fma(n, lanes_splat(2.12194440e-4F), r);
    /* 1 + r + r^2 ((1/2 + r/6) + r^2 ((1/24 + r/120) + r^2 (1/720 + r/5040))): shorter chains than
     * Horner's. */
    lanes square = r * r;
    lanes low = isa_fma(r, lanes_splat(1.0F / 6.0F), lanes_splat(0.5F));
    lanes middle = isa_fma(r, lanes_splat(1.0F / 120.0F), lanes_splat(1.0F / 24.0F));
    lanes high = isa_fma(r, lanes_splat(1.0F / 5040.0F), lanes_splat(1.0F / 720.0F));
    lanes value = isa_fma(isa_fma(high, square, middle), square, low);
    value = isa_fma(value, square, r) + lanes_splat(1.0F);
    return value * (lanes)(((lanes_i32)shifted - ((lanes_i32)round - 127)) << 23);
}

static inline void dot_step(lanes sum[LANE_PARTS], const float *x, const float *y)
{
    for (int p = 0; p < LANE_PARTS; p++) {
        sum[p] += lanes_load(x + p * ISA_LANES) * lanes_load(y + p * ISA_LANES);
    }
}

static float isa_dot(const float *x, const float *y, int64_t count)
{
    lanes sum[LANE_PARTS] = {{0}};
    float left[16], right[16];
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        dot_step(sum, x + i, y + i);
    }
    if (i < count) {
        dot_step(sum, tail(x + i, count - i, 0.0F, left), tail(y + i, count - i, 0.0F, right));
    }
    return lanes_sum(sum);
}

static inline void dot3_step(lanes sum[LANE_PARTS], const float *x, const float *y, const float *z)
{
    for (int p = 0; p < LANE_PARTS; p++) {
        sum[p] += lanes_load(x + p * ISA_LANES) * lanes_load(y + p * ISA_LANES) *
                  lanes_load(z + p * ISA_LANES);
    }
}

static float isa_dot3(const float *x, const float *y, const float *z, int64_t count)
{
    lanes sum[LANE_PARTS] = {{0}};
    float first[16], second[16], third[16];
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        dot3_step(sum, x + i, y + i, z + i);
    }
    if (i < count) {
        int64_t left = count - i;
        dot3_step(sum, tail(x + i, left, 0.0F, first), tail(y + i, left, 0.0F, second),
                  tail(z + i, left, 0.0F, third));
    }
    return lanes_sum(sum);
}

static float isa_largest(const float *x, int64_t count)
{
    lanes most = lanes_splat(-INFINITY);
    float copy[16], lane[ISA_LANES];
    for (int64_t i = 0; i < count; i += 16) {
        const float *from = i + 16 <= count ? x + i : tail(x + i, count - i, -INFINITY, copy);
        for (int p = 0; p < LANE_PARTS; p++) {
            most = isa_max(lanes_load(from + p * ISA_LANES), most); /* of NaN and a number, this */
        }
    }
    lanes_store(lane, most);
    for (int i = 1; i < ISA_LANES; i++) {
        lane[0] = lane[i] > lane[0] ? lane[i] : lane[0];
    }
    return lane[0];
}

/* In place; a tail is the caller's. */
static inline void exp_step(float *x, lanes by, lanes minus)
{
    for (int p = 0; p < LANE_PARTS; p++) {
        float *at = x + p * ISA_LANES;
        lanes_store(at, lanes_exp(lanes_load(at) * by - minus));
    }
}

static inline void sum_step(lanes sum[LANE_PARTS], const float *x)
{
    for (int p = 0; p < LANE_PARTS; p++) {
        sum[p] += lanes_load(x + p * ISA_LANES);
    }
}

static float isa_exp_sum(float *x, int64_t count, float scale, float shift)
{
    lanes sum[LANE_PARTS] = {{0}};
    const lanes by = lanes_splat(scale), minus = lanes_splat(shift);
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        exp_step(x + i, by, minus);
        sum_step(sum, x + i);
    }
    if (i < count) {
        float copy[16];
        tail(x + i, count - i, 0.0F, copy);
        exp_step(copy, by, minus);
        memcpy(x + i, copy, (size_t)(count - i) * sizeof *x);
        sum_step(sum, tail(x + i, count - i, 0.0F, copy));
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
static inline lanes lanes_tanh(lanes x)
{
    const lanes one = lanes_splat(1.0F), z = x * x;
    lanes near = lanes_splat(-5.70498872745e-3F) * z + lanes_splat(2.06390887954e-2F);
    near = near * z + lanes_splat(-5.37397155531e-2F);
    near = near * z + lanes_splat(1.33314422036e-1F);
    near = near * z + lanes_splat(-3.33332819422e-1F);
    near = near * z * x + x;
    const lanes_i32 sign = (lanes_i32)x & (lanes_i32)lanes_splat(-0.0F);
    const lanes size = (lanes)((lanes_i32)x ^ sign);
    const lanes far = one - lanes_splat(2.0F) / (one + lanes_exp(size + size));
    const lanes_i32 is_near = size < lanes_splat(0.625F);
    return (lanes)((is_near & (lanes_i32)near) | (~is_near & ((lanes_i32)far | sign)));
}

static inline void soft_cap_step(float *x, lanes by, lanes most)
{
    for (int p = 0; p < LANE_PARTS; p++) {
        float *at = x + p * ISA_LANES;
        lanes_store(at, most * lanes_tanh(lanes_load(at) * by / most));
    }
}

static void isa_soft_cap(float *x, int64_t count, float scale, float cap)
{
    const lanes by = lanes_splat(scale), most = lanes_splat(cap);
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        soft_cap_step(x + i, by, most);
    }
    if (i < count) {
        float copy[16];
        tail(x + i, count - i, 0.0F, copy);
        soft_cap_step(copy, by, most);
        memcpy(x + i, copy, (size_t)(count - i) * sizeof *x);
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

static inline lanes lanes_sigmoid(lanes x)
{
    return lanes_splat(1.0F) / (lanes_splat(1.0F) + lanes_exp(-x));
}

/* Both gates are g sigmoid(z(g)): z = g, or 2 u, as (1 + tanh u) / 2 = sigmoid(2 u). Without tanh
 * nothing cancels where a gate is nearly closed. */
static const float GELU_1 = 1.5957691216057308F;   /* 2 sqrt(2 / pi) */
static const float GELU_3 = 0.071354816272600244F; /* that times 0.044715 */

static inline lanes lanes_glu(qs_glu glu, lanes g)
{
    const lanes z = g * (lanes_splat(GELU_1) + lanes_splat(GELU_3) * (g * g));
    return lanes_sigmoid(glu == QS_GLU_SILU ? g : z);
}

/* dz / dg */
static inline lanes lanes_glu_slope(qs_glu glu, lanes g)
{
    const lanes slope = lanes_splat(GELU_1) + lanes_splat(3.0F * GELU_3) * (g * g);
    return glu == QS_GLU_SILU ? lanes_splat(1.0F) : slope;
}

static inline void glu_step(qs_glu glu, const float *gate, const float *up, float *act)
{
    for (int p = 0; p < LANE_PARTS; p++) {
        lanes g = lanes_load(gate + p * ISA_LANES);
        lanes_store(act + p * ISA_LANES, g * lanes_glu(glu, g) * lanes_load(up + p * ISA_LANES));
    }
}

static void isa_glu(qs_glu glu, const float *gate, const float *up, int64_t count, float *act)
{
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        glu_step(glu, gate + i, up + i, act + i);
    }
    if (i < count) {
        float g[16], u[16], out[16];
        int64_t left = count - i;
        glu_step(glu, tail(gate + i, left, 0.0F, g), tail(up + i, left, 0.0F, u), out);
        memcpy(act + i, out, (size_t)left * sizeof *act);
    }
}

/* d (g s) / dg = s + g s (1 - s) dz / dg, s = sigmoid(z). */
static inline void glu_backward_step(qs_glu glu, const float *gate, const float *up,
                                     const float *dact, float *dgate, float *dup)
{
    const lanes one = lanes_splat(1.0F);
    for (int p = 0; p < LANE_PARTS; p++) {
        lanes g = lanes_load(gate + p * ISA_LANES), u = lanes_load(up + p * ISA_LANES);
        lanes d = lanes_load(dact + p * ISA_LANES), s = lanes_glu(glu, g);
        lanes_store(dgate + p * ISA_LANES,
                    d * u * (s + g * s * (one - s) * lanes_glu_slope(glu, g)));
        lanes_store(dup + p * ISA_LANES, d * (g * s));
    }
}

static void isa_glu_backward(qs_glu glu, const float *gate, const float *up, const float *dact,
                             int64_t count, float *dgate, float *dup)
{
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        glu_backward_step(glu, gate + i, up + i, dact + i, dgate + i, dup + i);
    }
    if (i < count) {
        float g[16], u[16], d[16], dg[16], du[16];
        int64_t left = count - i;
        glu_backward_step(glu, tail(gate + i, left, 0.0F, g), tail(up + i, left, 0.0F, u),
                          tail(dact + i, left, 0.0F, d), dg, du);
        memcpy(dgate + i, dg, (size_t)left * sizeof *dgate);
        memcpy(dup + i, du, (size_t)left * sizeof *dup);
    }
}

/* ---- dropout ---- */

typedef uint64_t lanes_u64 __attribute__((vector_size(4 * ISA_LANES)));

enum {
    PHILOX_LANES = ISA_LANES / 2, /* blocks in a vector, each in 64 bits */
    PHILOX_SETS = 2,              /* vectors at a time, whose chains of products are independent */
    PHILOX_WORDS = 4 * PHILOX_LANES * PHILOX_SETS,
};

/* The words of blocks from `block` on, in element order: Philox4x32-10 as behind qs_rng_block. What
 * counts of a lane is its lower half: a product has both of its words where they are needed next,
 * and nothing is masked until the end. */
static inline void philox(const qs_rng *rng, uint64_t block, uint32_t out[PHILOX_WORDS])
{
    lanes_u64 c0[PHILOX_SETS], c1[PHILOX_SETS], c2[PHILOX_SETS], c3[PHILOX_SETS];
    static const uint64_t number[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int s = 0; s < PHILOX_SETS; s++) {
        memcpy(&c0[s], number + s * PHILOX_LANES, sizeof c0[s]);
        c0[s] += block;
        c1[s] = c0[s] >> 32;
        c2[s] = (lanes_u64){0} + rng->site;
        c3[s] = (lanes_u64){0} + rng->layer;
    }
    const lanes_u64 by0 = (lanes_u64){0} + 0xD2511F53U, by1 = (lanes_u64){0} + 0xCD9E8D57U;
    uint32_t key0 = (uint32_t)rng->key, key1 = (uint32_t)(rng->key >> 32);
    for (int round = 0; round < 10; round++) {
        for (int s = 0; s < PHILOX_SETS; s++) {
            lanes_u64 first = isa_mul_even(c0[s], by0), second = isa_mul_even(c2[s], by1);
            c0[s] = (second >> 32) ^ c1[s] ^ key0;
            c2[s] = (first >> 32) ^ c3[s] ^ key1;
            c1[s] = second;
            c3[s] = first;
        }
        key0 += 0x9E3779B9U;
        key1 += 0xBB67AE85U;
    }
    for (int s = 0; s < PHILOX_SETS; s++) {
        const lanes_u64 pairs[2] = {(c0[s] & 0xFFFFFFFFU) | (c1[s] << 32),
                                    (c2[s] & 0xFFFFFFFFU) | (c3[s] << 32)};
        uint64_t half[2][PHILOX_LANES], whole[2 * PHILOX_LANES];
        memcpy(half, pairs, sizeof half);
        for (int i = 0; i < PHILOX_LANES; i++) {
            whole[2 * i] = half[0][i];
            whole[2 * i + 1] = half[1][i];
        }
        memcpy(out + s * 4 * PHILOX_LANES, whole, sizeof whole);
    }
}

/* As qs_rng_uniform. Not x * 0: a dropped element is 0 whatever it was. */
static inline void dropout_step(const uint32_t *words, float p, float keep, const float *x,
                                float *out)
{
    lanes_i32 bits; /* 24 of them: no sign */
    memcpy(&bits, words, sizeof bits);
    bits = (bits >> 8) & 0xFFFFFF;
    const lanes uniform = __builtin_convertvector(bits, lanes) * lanes_splat(0x1p-24F);
    const lanes_i32 kept = uniform >= lanes_splat(p);
    lanes_store(out, (lanes)(kept & (lanes_i32)(lanes_load(x) * lanes_splat(keep))));
}

static void isa_dropout(const qs_rng *rng, uint64_t element, int64_t count, float p, float keep,
                        const float *x, float *out)
{
    while (count > 0) {
        uint32_t words[PHILOX_WORDS];
        int64_t skip = (int64_t)(element % 4);
        int64_t here = PHILOX_WORDS - skip < count ? PHILOX_WORDS - skip : count;
        philox(rng, element / 4, words);
        int64_t i = 0;
        for (; i + ISA_LANES <= here; i += ISA_LANES) {
            dropout_step(words + skip + i, p, keep, x + i, out + i);
        }
        for (; i < here; i++) {
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
        .tile = tile_packed,
        .tile_plain = tile_plain,
        .transpose = isa_transpose,
        .nf4_decode = isa_nf4_decode,
        .widen = isa_widen,
        .dot = isa_dot,
        .dot3 = isa_dot3,
        .max = isa_largest,
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
