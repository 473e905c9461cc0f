/* Compares the inner loops of each instruction set that this CPU runs with their definitions, bit
 * for bit: exit 0 if they agree, 1 if not, 77 where the CPU runs the portable ones alone. Links
 * statically and needs nothing else, so that it can run as the only program of an emulated
 * machine. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "bit_checks.h"
#include "kernels/cpu/isa.h"
#include "quant/nf4.h"

enum { ROUNDS = 60, MOST = 100, DEPTH = 40, SIDE = 64 };

/* Now and then a value that is none, or extreme. */
static void fill(float *x, int count, float size)
{
    static const float extremes[] = {0.0F, -0.0F, 1e-40F, 87.5F, -87.5F, 3e38F, INFINITY, NAN};
    for (int i = 0; i < count; i++) {
        x[i] = random_bits() % 400 == 0 ? extremes[random_bits() % 8] : random_float() * size;
    }
}

/* A tile of both kinds against the chain of fused multiply-adds that defines it. */
static int compare_tiles(const qs_isa *isa)
{
    static float a[SIDE * SIDE], b[SIDE * SIDE], packed[SIDE * SIDE], c[4][SIDE * SIDE];
    for (int round = 0; round < ROUNDS; round++) {
        const int rows = 1 + (int)(random_bits() % (unsigned)isa->mr);
        const int cols = round % 3 == 0 ? isa->nr : 1 + (int)(random_bits() % (unsigned)isa->nr);
        const int depth = 1 + (int)(random_bits() % DEPTH);
        const bool accumulate = random_bits() % 2 == 0;
        fill(a, SIDE * SIDE, 1.0F);
        fill(b, SIDE * SIDE, 1.0F);
        fill(c[0], SIDE * SIDE, 1.0F);
        for (int i = 1; i < 4; i++) {
            memcpy(c[i], c[0], sizeof c[0]);
        }
        for (int i = 0; i < rows; i++) {
            for (int j = 0; j < cols; j++) {
                float sum = 0.0F;
                for (int k = 0; k < depth; k++) {
                    sum = fmaf(a[i * SIDE + k], b[k * SIDE + j], sum);
                }
                c[0][i * SIDE + j] = accumulate ? c[0][i * SIDE + j] + sum : sum;
            }
        }
        isa->tile_plain(rows, cols, depth, a, SIDE, false, b, SIDE, c[1], SIDE, accumulate);
        for (int k = 0; k < depth; k++) { /* a's transpose */
            for (int i = 0; i < rows; i++) {
                packed[k * SIDE + i] = a[i * SIDE + k];
            }
        }
        isa->tile_plain(rows, cols, depth, packed, SIDE, true, b, SIDE, c[2], SIDE, accumulate);
        static float left[DEPTH * QS_GEMM_MR_MAX], right[DEPTH * QS_GEMM_NR_MAX];
        isa->transpose(a, SIDE, rows, depth, left, isa->mr, isa->mr);
        for (int k = 0; k < depth; k++) {
            memcpy(right + k * isa->nr, b + k * SIDE, (size_t)isa->nr * sizeof *right);
        }
        isa->tile(rows, cols, depth, left, right, c[3], SIDE, accumulate);
        if (differ_f32("tile_plain, rows", round, c[1], c[0], SIDE * SIDE) ||
            differ_f32("tile_plain, columns", round, c[2], c[0], SIDE * SIDE) ||
            differ_f32("tile", round, c[3], c[0], SIDE * SIDE)) {
            return 1;
        }
    }
    return 0;
}

static int compare_transposes(const qs_isa *isa)
{
    static float src[16 * SIDE], out[2][SIDE * 20];
    for (int round = 0; round < ROUNDS; round++) {
        const int lanes = 1 + (int)(random_bits() % 16),
                  rows = (int)(random_bits() % (unsigned)(lanes + 1));
        const int count = 1 + (int)(random_bits() % SIDE);
        const int stride = lanes + (int)(random_bits() % 5);
        fill(src, 16 * SIDE, 1.0F);
        fill(out[0], SIDE * 20, 1.0F);
        memcpy(out[1], out[0], sizeof out[0]);
        for (int k = 0; k < count; k++) {
            for (int i = 0; i < lanes; i++) {
                out[0][k * stride + i] = i < rows ? src[i * SIDE + k] : 0.0F;
            }
        }
        isa->transpose(src, SIDE, rows, count, out[1], stride, lanes);
        if (differ_f32("transpose", round, out[1], out[0], SIDE * 20)) {
            return 1;
        }
    }
    return 0;
}

static int compare_decoders(const qs_isa *isa, const qs_isa *slow)
{
    static const qs_dtype types[] = {QS_F32, QS_BF16, QS_F16};
    static uint8_t bytes[4 * MOST];
    static float absmax[3], out[2][3 * QS_NF4_BLOCK];
    for (int round = 0; round < ROUNDS; round++) {
        const qs_dtype type = types[round % 3];
        for (int i = 0; i < 4 * MOST; i++) {
            bytes[i] = (uint8_t)(random_bits() >> 8);
        }
        fill(absmax, 3, 2.0F);
        isa->nf4_decode(bytes, absmax, 3, type, out[0]);
        slow->nf4_decode(bytes, absmax, 3, type, out[1]);
        if (differ_f32("nf4_decode", round, out[0], out[1], 3 * QS_NF4_BLOCK)) {
            return 1;
        }
        isa->widen(bytes, type, MOST, out[0]);
        slow->widen(bytes, type, MOST, out[1]);
        if (differ_f32("widen", round, out[0], out[1], MOST)) {
            return 1;
        }
    }
    return 0;
}

static int compare_rows(const qs_isa *isa, const qs_isa *slow)
{
    const qs_isa *of[] = {isa, slow};
    static float x[MOST], y[MOST], z[MOST], out[2][7][MOST], sums[2][4];
    for (int round = 0; round < ROUNDS; round++) {
        const int count = round < 3 ? MOST : (int)(random_bits() % MOST);
        const qs_glu glu = round % 2 == 0 ? QS_GLU_SILU : QS_GLU_GELU_TANH;
        const qs_rng rng = {.key = (uint64_t)random_bits() << 32 | random_bits(),
                            .site = random_bits(),
                            .layer = random_bits()};
        const uint64_t element = (uint64_t)random_bits() << (random_bits() % 20);
        fill(x, MOST, round % 4 == 0 ? 90.0F : 3.0F);
        fill(y, MOST, 3.0F);
        fill(z, MOST, 3.0F);
        for (int i = 0; i < 2; i++) {
            float(*to)[MOST] = out[i];
            for (int n = 0; n < 7; n++) {
                memcpy(to[n], x, sizeof x);
            }
            sums[i][0] = of[i]->dot(x, y, count);
            sums[i][1] = of[i]->dot3(x, y, z, count);
            sums[i][2] = of[i]->max(y, count);
            sums[i][3] = of[i]->exp_sum(to[0], count, 0.7F, 0.3F);
            of[i]->soft_cap(to[1], count, 0.5F, 2.0F);
            of[i]->soft_cap_backward(y, count, 0.1F, 5.0F, to[2]);
            of[i]->softmax_backward(y, count, 0.1F, 0.125F, to[3]);
            of[i]->glu(glu, x, y, count, to[4]);
            of[i]->glu_backward(glu, x, y, z, count, to[5], to[6]);
        }
        static const char *const names[] = {
            "exp_sum", "soft_cap",           "soft_cap_backward", "softmax_backward",
            "glu",     "glu_backward, gate", "glu_backward, up",
        };
        for (int n = 0; n < 7; n++) {
            if (differ_f32(names[n], round, out[0][n], out[1][n], MOST)) {
                return 1;
            }
        }
        for (int i = 0; i < 2; i++) {
            of[i]->dropout(&rng, element, count, 0.3F, 1.25F, x, out[i][0]);
        }
        /* `max` may lose a NaN, which one is in y by chance: not compared then. */
        sums[0][2] = isnan(sums[0][1]) ? 0.0F : sums[0][2];
        sums[1][2] = isnan(sums[1][1]) ? 0.0F : sums[1][2];
        if (differ_f32("dropout", round, out[0][0], out[1][0], MOST) ||
            differ_f32("dot, dot3, max, exp_sum", round, sums[0], sums[1], 4)) {
            return 1;
        }
    }
    return 0;
}

static int compare(const qs_isa *isa)
{
    const int wrong = compare_tiles(isa) + compare_transposes(isa) +
                      compare_decoders(isa, qs_isa_portable()) +
                      compare_rows(isa, qs_isa_portable());
    printf("isa: %s: %s\n", isa->name, wrong == 0 ? "the same bits" : "DIFFERENT BITS");
    return wrong;
}

int main(void)
{
    enum { SKIPPED = 77 };
    const qs_isa *all[] = {qs_isa_avx2(), qs_isa_avx512()};
    int compared = 0, wrong = 0;
    for (int i = 0; i < 2; i++) {
        if (all[i] != NULL && qs_isa_runs(all[i]->name)) {
            wrong += compare(all[i]);
            compared++;
        }
    }
    if (compared == 0) {
        printf("isa: this CPU, or this build, has the portable loops alone: not compared\n");
        return SKIPPED;
    }
    return wrong == 0 ? 0 : 1;
}
