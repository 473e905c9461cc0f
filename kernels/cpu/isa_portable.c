/* The inner loops in plain C: any CPU. fmaf is the library's, in software where the CPU has no
 * fused multiply-add: slow and the same bits. */
#include "quant/nf4.h"

#include <math.h>

#include "kernels/cpu/isa.h"

#define ISA_NAME "portable"
#define ISA_TABLE qs_isa_portable
#define ISA_MR 4
#define ISA_NV 4
#define VEC_LANES 1

typedef float vec;

static inline vec vec_load(const float *p)
{
    return *p;
}
static inline void vec_store(float *p, vec v)
{
    *p = v;
}
static inline vec vec_zero(void)
{
    return 0.0F;
}
static inline vec vec_splat(float x)
{
    return x;
}
static inline vec vec_add(vec a, vec b)
{
    return a + b;
}
static inline vec vec_fma(vec a, vec b, vec c)
{
    return fmaf(a, b, c);
}

static void isa_transpose(const float *src, int64_t src_stride, int rows, int64_t count, float *dst,
                          int64_t dst_stride, int lanes)
{
    for (int64_t k = 0; k < count; k++) {
        for (int r = 0; r < lanes; r++) {
            dst[k * dst_stride + r] = r < rows ? src[r * src_stride + k] : 0.0F;
        }
    }
}

/* A block has 16 possible values: they are scaled and rounded once, and the 64 codes look them up.
 */
static inline void isa_nf4_block(const uint8_t *packed, float absmax, qs_dtype dtype, float *out)
{
    float table[16];
    for (int c = 0; c < 16; c++) {
        table[c] = qs_f32_round(qs_nf4_code[c] * absmax, dtype);
    }
    for (int i = 0; i < QS_NF4_BLOCK / 2; i++) {
        out[2 * i] = table[packed[i] >> 4];
        out[2 * i + 1] = table[packed[i] & 15];
    }
}

static inline void isa_widen_f16(const uint8_t *src, int64_t count, float *out)
{
    qs_f32_load(out, src, QS_F16, count);
}

#define ISA_LANES 4
typedef float four __attribute__((vector_size(16)));
typedef int32_t four_i32 __attribute__((vector_size(16)));

static inline four select4(four_i32 mask, four yes, four no)
{
    return (four)((mask & (four_i32)yes) | (~mask & (four_i32)no));
}

static inline four isa_max(four a, four b)
{
    return select4(a > b, a, b);
}

static inline four isa_min(four a, four b)
{
    return select4(a < b, a, b);
}

static inline four isa_fma(four a, four b, four c)
{
    return (four){fmaf(a[0], b[0], c[0]), fmaf(a[1], b[1], c[1]), fmaf(a[2], b[2], c[2]),
                  fmaf(a[3], b[3], c[3])};
}

/* Products of the lower halves of two 64-bit lanes. */
#define isa_mul_even(a, b) (((a)&0xFFFFFFFFU) * ((b)&0xFFFFFFFFU))

/* Upper half to the lower, down to one lane. */
static inline float isa_fold(four v)
{
    return (v[0] + v[2]) + (v[1] + v[3]);
}

#include "kernels/cpu/isa_template.h"
