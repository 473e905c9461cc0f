/* Tensor-core products, matrix loads and asynchronous copies. For the first two the last lane to
 * come does the work of all 32, while they stand still: as on the GPU, where a warp does it in one
 * instruction. */
#include <string.h>

#include <vector>

#include "block.h"
#include "emulator.h"
#include "kernels/cuda/core/wgmma.h"

namespace emu
{

static float low_half(uint32_t pair)
{
    const uint32_t bits = pair << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static float high_half(uint32_t pair)
{
    const uint32_t bits = pair & 0xffff0000u;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* ---- mma.m16n8k16: the fragments' layout stands in ptx.cuh ---- */

namespace
{

constexpr int M = 16, N = 8, K = 16;

struct mma_operands {
    float *d;
    const uint32_t *a, *b;
};

/** A row of d or b: the compiler makes of it what the processor has. */
typedef float row_of_b __attribute__((vector_size(N * sizeof(float))));

/** d[i][j] += a[i][k] b[k][j], k ascending. The product of two bf16 is exact in fp32. */
void multiply(float d[M][N], const float a[M][K], const float b[K][N])
{
    row_of_b right[K];
    memcpy(right, b, sizeof right);
    for (int i = 0; i < M; i++) {
        row_of_b sum;
        memcpy(&sum, d[i], sizeof sum);
        for (int k = 0; k < K; k++) {
            sum += a[i][k] * right[k];
        }
        memcpy(d[i], &sum, sizeof sum);
    }
}

void finish_mma(const uint64_t *values)
{
    float a[M][K], b[K][N], d[M][N];
    for (int lane = 0; lane < LANES; lane++) {
        const mma_operands *o = (const mma_operands *)(uintptr_t)values[lane];
        const int g = lane / 4, t = lane % 4 * 2;
        for (int part = 0; part < 4; part++) {
            const int row = g + part % 2 * 8, column = t + part / 2 * 8;
            a[row][column] = low_half(o->a[part]);
            a[row][column + 1] = high_half(o->a[part]);
            d[g + part / 2 * 8][t + part % 2] = o->d[part];
        }
        for (int part = 0; part < 2; part++) {
            b[t + part * 8][g] = low_half(o->b[part]);
            b[t + part * 8 + 1][g] = high_half(o->b[part]);
        }
    }
    multiply(d, a, b);
    for (int lane = 0; lane < LANES; lane++) {
        const mma_operands *o = (const mma_operands *)(uintptr_t)values[lane];
        const int g = lane / 4, t = lane % 4 * 2;
        for (int part = 0; part < 4; part++) {
            o->d[part] = d[g + part / 2 * 8][t + part % 2];
        }
    }
}

} // namespace

void mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2])
{
    const mma_operands operands = {d, a, b};
    meet(meeting::mma, (uintptr_t)&operands, finish_mma);
}

/* ---- ldmatrix ---- */

namespace
{

struct ldmatrix_operands {
    uint32_t *r;
    const unsigned char *row;
};

/** Row `row` of matrix `matrix` is where lane 8 * matrix + row points. */
uint32_t element(const uint64_t *values, int matrix, int row, int column)
{
    const ldmatrix_operands *o = (const ldmatrix_operands *)(uintptr_t)values[8 * matrix + row];
    uint16_t bits;
    memcpy(&bits, o->row + 2 * column, sizeof bits);
    return bits;
}

void finish_ldmatrix(const uint64_t *values, bool transposed)
{
    for (int lane = 0; lane < LANES; lane++) {
        const ldmatrix_operands *o = (const ldmatrix_operands *)(uintptr_t)values[lane];
        const int g = lane / 4, t = lane % 4 * 2;
        for (int matrix = 0; matrix < 4; matrix++) {
            const uint32_t low =
                transposed ? element(values, matrix, t, g) : element(values, matrix, g, t);
            const uint32_t high =
                transposed ? element(values, matrix, t + 1, g) : element(values, matrix, g, t + 1);
            o->r[matrix] = low | high << 16;
        }
    }
}

void finish_ldmatrix_plain(const uint64_t *values)
{
    finish_ldmatrix(values, false);
}

void finish_ldmatrix_trans(const uint64_t *values)
{
    finish_ldmatrix(values, true);
}

} // namespace

void ldmatrix_x4(uint32_t r[4], const void *row, bool transposed)
{
    if ((uintptr_t)row % 16 != 0) {
        die("ldmatrix: a row at %p, which is not 16-byte aligned", row);
    }
    const ldmatrix_operands operands = {r, (const unsigned char *)row};
    if (transposed) {
        meet(meeting::ldmatrix_trans, (uintptr_t)&operands, finish_ldmatrix_trans);
    } else {
        meet(meeting::ldmatrix, (uintptr_t)&operands, finish_ldmatrix_plain);
    }
}

/* ---- cp.async: nothing arrives before its wait ---- */

namespace
{

struct pending_copy {
    void *to;
    const void *from; /* nullptr: zeros */
    unsigned group;
};

struct copies {
    std::vector<pending_copy> pending; /* oldest first */
    unsigned group;                    /* number of the open group */
    bool unfenced;                     /* some have arrived that wgmma was not told of */
};

std::vector<copies> of_thread;

copies &mine()
{
    return of_thread[thread_number(self)];
}

} // namespace

void cp_async_prepare(unsigned threads)
{
    if (of_thread.size() < threads) {
        of_thread.resize(threads);
    }
}

void cp_async_drop()
{
    copies &c = mine();
    c.pending.clear();
    c.group = 0;
    c.unfenced = false;
}

void check_aligned(const void *at, size_t bytes)
{
    if ((uintptr_t)at % bytes != 0) {
        die("%zu bytes in one piece at %p, which is no multiple of that", bytes, at);
    }
}

void cp_async_16(void *shared, const void *global, bool valid)
{
    if ((uintptr_t)shared % 16 != 0 || (valid && (uintptr_t)global % 16 != 0)) {
        die("cp.async: from %p to %p, not both 16-byte aligned", global, shared);
    }
    memset(shared, 0xff, 16);
    copies &c = mine();
    c.pending.push_back({shared, valid ? global : nullptr, c.group});
}

void cp_async_commit()
{
    mine().group++;
}

void cp_async_wait(int open_groups)
{
    copies &c = mine();
    size_t done = 0;
    while (done < c.pending.size() && c.pending[done].group + (unsigned)open_groups < c.group) {
        const pending_copy &p = c.pending[done++];
        if (p.from != nullptr) {
            memcpy(p.to, p.from, 16);
        } else {
            memset(p.to, 0, 16);
        }
    }
    c.pending.erase(c.pending.begin(), c.pending.begin() + (long)done);
    c.unfenced = c.unfenced || done > 0;
}

/* ---- wgmma: each warp computes its 16 rows, at the wait ---- */

namespace
{

constexpr int MOST_COLUMNS = 128;

struct product {
    float *d;
    float before[MOST_COLUMNS / 2]; /* this lane's sums, or zeros */
    int n;
    bool a_in_registers, b_mn_major;
    uint32_t a[4];
    uint64_t a_descriptor, b_descriptor;
    bool goes_on; /* adds to what an earlier product, still under way, writes */
    unsigned group;
};

struct products {
    std::vector<product> pending; /* oldest first */
    unsigned group;               /* number of the open group */
    bool fenced;
};

std::vector<products> products_of_thread;

products &my_products()
{
    return products_of_thread[thread_number(self)];
}

float shared_element(uint64_t descriptor, bool mn_major, int mn, int k)
{
    uint16_t bits;
    memcpy(&bits, dynamic_shared + qs_wgmma_byte(descriptor, mn_major, mn, k), sizeof bits);
    return low_half(bits);
}

/* The left operand of the warp, whose lanes ask for the same product. */
void gather_a(float a[M][K], const product *const of_lane[LANES], int first_row)
{
    if (!of_lane[0]->a_in_registers) {
        for (int i = 0; i < M; i++) {
            for (int k = 0; k < K; k++) {
                a[i][k] = shared_element(of_lane[0]->a_descriptor, false, first_row + i, k);
            }
        }
        return;
    }
    for (int lane = 0; lane < LANES; lane++) {
        for (int part = 0; part < 4; part++) {
            const int row = lane / 4 + part % 2 * 8, column = lane % 4 * 2 + part / 2 * 8;
            a[row][column] = low_half(of_lane[lane]->a[part]);
            a[row][column + 1] = high_half(of_lane[lane]->a[part]);
        }
    }
}

void finish_product(const product *const of_lane[LANES], int first_row)
{
    const product *p = of_lane[0];
    float a[M][K], b[K][N], d[M][N];
    gather_a(a, of_lane, first_row);
    for (int tile = 0; tile < p->n / N; tile++) {
        for (int k = 0; k < K; k++) {
            for (int j = 0; j < N; j++) {
                b[k][j] = shared_element(p->b_descriptor, p->b_mn_major, tile * N + j, k);
            }
        }
        for (int lane = 0; lane < LANES; lane++) {
            for (int part = 0; part < 4; part++) {
                d[lane / 4 + part / 2 * 8][lane % 4 * 2 + part % 2] =
                    of_lane[lane]->before[tile * 4 + part];
            }
        }
        multiply(d, a, b);
        for (int lane = 0; lane < LANES; lane++) {
            for (int part = 0; part < 4; part++) {
                of_lane[lane]->d[tile * 4 + part] =
                    d[lane / 4 + part / 2 * 8][lane % 4 * 2 + part % 2];
            }
        }
    }
}

bool same(const product &x, const product &y)
{
    return x.n == y.n && x.a_in_registers == y.a_in_registers && x.b_mn_major == y.b_mn_major &&
           x.a_descriptor == y.a_descriptor && x.b_descriptor == y.b_descriptor;
}

/* The first products of all lanes; a sum that a later one adds to goes on from the earlier. */
void finish_wgmma(const uint64_t *values)
{
    products *of_lane[LANES];
    for (int lane = 0; lane < LANES; lane++) {
        of_lane[lane] = (products *)(uintptr_t)values[lane];
        if (of_lane[lane]->pending.size() != of_lane[0]->pending.size() ||
            !same(of_lane[lane]->pending[0], of_lane[0]->pending[0])) {
            die("wgmma: the lanes of a warp ask for different products");
        }
    }
    const product *first[LANES];
    for (int lane = 0; lane < LANES; lane++) {
        first[lane] = &of_lane[lane]->pending[0];
    }
    finish_product(first, (int)(thread_number(self) / LANES % 4) * M);
}

} // namespace

void wgmma_prepare(unsigned threads)
{
    if (products_of_thread.size() < threads) {
        products_of_thread.resize(threads);
    }
}

void wgmma_drop()
{
    products &p = my_products();
    if (!p.pending.empty()) {
        die("the thread ends with products of wgmma under way");
    }
    p.group = 0;
    p.fenced = false;
}

void fence_shared_for_wgmma()
{
    mine().unfenced = false;
}

void wgmma_fence()
{
    my_products().fenced = true;
}

void wgmma(float *d, int n, const uint32_t *a, uint64_t a_descriptor, uint64_t b_descriptor,
           bool b_mn_major, bool add)
{
    products &p = my_products();
    if (!p.fenced) {
        die("wgmma without a qs_wgmma_fence since the last wait");
    }
    if (mine().unfenced) {
        die("wgmma without a qs_fence_shared_for_wgmma since copies arrived");
    }
    product now = {d,     {},     n, a != nullptr, b_mn_major, {}, a_descriptor, b_descriptor,
                   false, p.group};
    if (a != nullptr) {
        memcpy(now.a, a, sizeof now.a);
    }
    for (const product &other : p.pending) {
        now.goes_on = now.goes_on || (add && other.d == d);
    }
    if (add && !now.goes_on) {
        memcpy(now.before, d, (size_t)n / 2 * sizeof *d);
    }
    p.pending.push_back(now);
    memset(d, 0xff, (size_t)n / 2 * sizeof *d);
}

void wgmma_commit()
{
    my_products().group++;
}

void wgmma_wait(int open_groups)
{
    products &p = my_products();
    p.fenced = false;
    while (!p.pending.empty() && p.pending[0].group + (unsigned)open_groups < p.group) {
        product &now = p.pending[0];
        if (now.goes_on) {
            memcpy(now.before, now.d, (size_t)now.n / 2 * sizeof *now.d);
        }
        meet(meeting::wgmma, (uintptr_t)&p, finish_wgmma);
        p.pending.erase(p.pending.begin());
    }
}

} // namespace emu
