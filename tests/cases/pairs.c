/* Compares the bf16 product's inner loops (pairs.h), those that this CPU runs, with portable C, bit
 * for bit: exit 0 if they agree, 1 if not, 77 if it runs no others. Links statically and needs
 * nothing else, so that it can run as the only program of an emulated machine. */
#include "kernels/cpu/pairs.h"

#include <stdio.h>
#include <string.h>

#include "bit_checks.h"
#include "kernels/cpu/isa.h"

enum {
    DEPTH = 37,                    /* words */
    COUNT = DEPTH * 2,             /* bf16 along k */
    LEFT = COUNT * QS_GEMM_MR_MAX, /* of a packed operand */
    RIGHT = COUNT * QS_GEMM_NR_MAX,
    STRIDE = QS_GEMM_NR_MAX + 3,
    SUMS = QS_GEMM_MR_MAX * STRIDE,
    LENGTH = 131,
    BLOCKS = 7,
};

/* Element (k, lane) of a matrix of `lanes`, packed for a table whose tile has `width` of them. */
static void pack(const uint16_t *plain, int lanes, int width, uint32_t *words)
{
    memset(words, 0, (size_t)(DEPTH * width) * sizeof *words);
    for (int p = 0; p < DEPTH; p++) {
        for (int i = 0; i < lanes; i++) {
            words[p * width + i] =
                (uint32_t)plain[2 * p * lanes + i] << 16 | plain[(2 * p + 1) * lanes + i];
        }
    }
}

/* One tile of both tables, with rows and columns that both have. */
static int compare_tile(const qs_pairs *fast, const qs_pairs *slow, int kind, int round)
{
    static uint16_t a[LEFT], b[RIGHT];
    static uint32_t left[LEFT], right[RIGHT];
    static float c[2][SUMS], before[SUMS];
    const qs_pairs *tables[2] = {fast, slow};
    const int most_rows = fast->mr < slow->mr ? fast->mr : slow->mr;
    const int most_cols = fast->nr < slow->nr ? fast->nr : slow->nr;
    const int rows = 1 + (int)(random_bits() % (unsigned)most_rows);
    const int cols = round % 2 == 0 ? most_cols : 1 + (int)(random_bits() % (unsigned)most_cols);
    const int64_t pairs = round % 3 == 0 ? DEPTH : random_bits() % (DEPTH + 1);
    const bool accumulate = random_bits() % 2 == 0;
    for (int i = 0; i < COUNT * rows; i++) { /* the last kind: a few of any, no NaN everywhere */
        a[i] = random_bf16(kind == BF16_KINDS - 1 && random_bits() % 500 != 0 ? 0 : kind);
    }
    for (int i = 0; i < COUNT * cols; i++) {
        b[i] = random_bf16(kind == BF16_KINDS - 1 ? 0 : kind);
    }
    for (int i = 0; i < SUMS; i++) { /* some are subnormal */
        const uint32_t upper = (uint32_t)random_bf16(kind) << 16 | (random_bits() & 0xFFFFU);
        memcpy(&before[i], &upper, sizeof upper);
    }
    for (int t = 0; t < 2; t++) {
        pack(a, rows, tables[t]->mr, left);
        pack(b, cols, tables[t]->nr, right);
        memcpy(c[t], before, sizeof before);
        const unsigned mode = tables[t]->begin();
        tables[t]->tile(rows, cols, pairs, left, right, c[t], STRIDE, accumulate);
        tables[t]->end(mode);
    }
    return differ_f32("tile", round, c[0], c[1], SUMS); /* beyond its columns, too */
}

static int compare_tiles(const qs_pairs *fast, const qs_pairs *slow)
{
    enum { ROUNDS = 240 };
    for (int round = 0; round < ROUNDS; round++) {
        if (compare_tile(fast, slow, round % BF16_KINDS, round) != 0) {
            return 1;
        }
    }
    return 0;
}

static int differ_words(const char *what, int round, const uint32_t *a, const uint32_t *b,
                        int count)
{
    for (int i = 0; i < count; i++) {
        if (a[i] != b[i]) {
            printf("%s, round %d: word %d is %08x, not %08x\n", what, round, i, a[i], b[i]);
            return 1;
        }
    }
    return 0;
}

/* Any bits, many of which are ties, subnormal, or not finite. */
static void any_floats(float *x, int count)
{
    for (int i = 0; i < count; i++) {
        uint32_t bits = random_bits();
        const uint32_t kind = random_bits() % 8;
        bits = kind == 0   ? (bits & 0xFFFF0000U) | 0x8000U
               : kind == 1 ? bits & 0x807FFFFFU
               : kind == 2 ? bits | 0x7F800000U
                           : bits;
        memcpy(&x[i], &bits, sizeof bits);
    }
}

static int compare_packs(const qs_pairs *fast, const qs_pairs *slow)
{
    enum { ROUNDS = 300 };
    const qs_pairs *tables[2] = {fast, slow};
    for (int round = 0; round < ROUNDS; round++) {
        uint32_t round_out[2][LENGTH], take_out[2][LENGTH], zip_out[2][LENGTH + 1];
        float x[LENGTH];
        uint8_t raw[2 * LENGTH + 1];
        uint32_t above[LENGTH], below[LENGTH];
        const int count = 1 + (int)(random_bits() % LENGTH), words = (count + 1) / 2;
        any_floats(x, LENGTH);
        for (int i = 0; i < LENGTH; i++) {
            const uint32_t bits = random_bits();
            memcpy(raw + 1 + 2 * i, &bits, 2);
            above[i] = random_bits();
            below[i] = random_bits();
        }
        memset(round_out, 0x55, sizeof round_out);
        memset(take_out, 0x55, sizeof take_out);
        for (int t = 0; t < 2; t++) {
            tables[t]->round(x, count, round_out[t]);
            tables[t]->take(raw + 1, count, take_out[t]);
            tables[t]->zip(above, below, count, zip_out[t]);
        }
        if (differ_words("round", round, round_out[0], round_out[1], LENGTH) != 0 ||
            differ_words("take", round, take_out[0], take_out[1], LENGTH) != 0 ||
            differ_words("zip", round, zip_out[0], zip_out[1], count) != 0 ||
            round_out[0][words] != 0x55555555U) {
            return 1;
        }
    }
    return 0;
}

static int compare_decode(const qs_pairs *fast, const qs_pairs *slow)
{
    enum { ROUNDS = 300, WORDS = BLOCKS * QS_NF4_BLOCK / 2 };
    static const qs_dtype dtypes[] = {QS_BF16, QS_F16, QS_F32};
    for (int round = 0; round < ROUNDS; round++) {
        uint8_t packed[WORDS];
        float absmax[BLOCKS];
        uint32_t out[2][WORDS];
        any_floats(absmax, BLOCKS);
        for (int i = 0; i < WORDS; i++) {
            packed[i] = (uint8_t)random_bits();
        }
        fast->nf4_decode(packed, absmax, BLOCKS, dtypes[round % 3], out[0]);
        slow->nf4_decode(packed, absmax, BLOCKS, dtypes[round % 3], out[1]);
        for (int i = 0; i < WORDS; i++) { /* NaN is NaN, of whatever sign */
            for (int t = 0; t < 2; t++) {
                out[t][i] |= (out[t][i] & 0x7FFF0000U) > 0x7F800000U ? 0xFFFF0000U : 0U;
                out[t][i] |= (out[t][i] & 0x7FFFU) > 0x7F80U ? 0xFFFFU : 0U;
            }
        }
        if (differ_words("nf4_decode", round, out[0], out[1], WORDS) != 0) {
            return 1;
        }
    }
    return 0;
}

int main(void)
{
    enum { SKIPPED = 77 };
    static const char *const names[] = {"avx2", "avx512bf16"};
    int compared = 0, wrong = 0;
    for (int i = 0; i < 2; i++) {
        if (!qs_pairs_force(names[i])) {
            printf("pairs: this CPU or this build has no %s: not compared\n", names[i]);
            continue;
        }
        const qs_pairs *fast = qs_pairs_get(), *slow = qs_pairs_portable();
        const int bad =
            compare_tiles(fast, slow) + compare_packs(fast, slow) + compare_decode(fast, slow);
        printf("pairs: %s: %s\n", fast->name, bad == 0 ? "the same bits" : "DIFFERENT BITS");
        compared++;
        wrong += bad;
    }
    return wrong > 0 ? 1 : compared > 0 ? 0 : SKIPPED;
}
