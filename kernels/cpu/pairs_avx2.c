/* The bf16 product for AVX2 with FMA: register tile 4 x 16, 8 sums of 8 lanes. A word is taken
 * apart into two floats on its way to a fused multiply-add, on units that have nothing else to do,
 * so that it runs at 0.8 of the speed of fp32. */
#include "kernels/cpu/pairs.h"

#include <stddef.h>

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

#include "kernels/cpu/flush.h"

#define PAIRS_NAME "avx2"
#define PAIRS_TABLE qs_pairs_avx2
#define pairs_begin qs_flush_begin
#define pairs_end qs_flush_end
#define TILE_MR 4
#define TILE_NV 2
#define TILE_LANES 8

typedef __m256 vec;

typedef struct {
    __m256 first, second;
} tile_elems;

#define vec_load(p) _mm256_loadu_ps(p)
#define vec_store(p, v) _mm256_storeu_ps(p, v)
#define vec_zero() _mm256_setzero_ps()
#define vec_add(a, b) _mm256_add_ps(a, b)
#define add_one(a, b) ((a) + (b))

static inline tile_elems widen(__m256i words)
{
    const __m256i upper = _mm256_set1_epi32((int)0xFFFF0000U);
    return (tile_elems){_mm256_castsi256_ps(_mm256_and_si256(words, upper)),
                        _mm256_castsi256_ps(_mm256_slli_epi32(words, 16))};
}

#define tile_load(p) widen(_mm256_loadu_si256((const __m256i *)(const void *)(p)))
#define tile_splat(x) widen(_mm256_set1_epi32((int)(x)))

static inline __m256 tile_fma(tile_elems left, tile_elems right, __m256 sum)
{
    sum = _mm256_fmadd_ps(left.first, right.first, sum);
    return _mm256_fmadd_ps(left.second, right.second, sum);
}

static void pairs_nf4_blocks(const uint8_t *packed, const float *absmax, int64_t blocks,
                             qs_dtype dtype, uint32_t *out)
{
    qs_pairs_nf4_by_floats(qs_isa_avx2(), packed, absmax, blocks, dtype, out);
}

#define pairs_round qs_pairs_round

#include "kernels/cpu/pairs_template.h"

#else

const qs_pairs *qs_pairs_avx2(void)
{
    return NULL;
}

#endif
