/* The emulator does what CUDA's and PTX's manuals say, and finds the mistakes that it is there to
 * find. Each test is a process of its own: the environment is read once, and some are to die.
 *
 *   test_emulator [name]
 */
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <vector>

extern "C" {
#include "kernels/cuda/ops_cuda.h"
}
#include "kernels/cuda/core/bf16.h"
#include "kernels/cuda/core/wgmma.h"
#include "kernels/cuda/ptx.cuh"

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                        \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)
#define CUDA(call) CHECK((call) == cudaSuccess)

static const unsigned ALL = 0xffffffffu;

/* What gemm_emulated.cpp asks of the core. */
extern "C" {
void *qs_queue_native(const qs_queue *queue)
{
    return const_cast<qs_queue *>(queue);
}

qs_status qs_error_set(qs_status status, const char *, int, const char *, ...)
{
    return status;
}
}

namespace
{

template <class T> T *device(size_t count)
{
    T *out;
    CUDA(cudaMalloc(&out, count * sizeof(T)));
    return out;
}

template <class T> T *upload(const std::vector<T> &from)
{
    T *out = device<T>(from.size());
    CUDA(cudaMemcpy(out, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice));
    return out;
}

template <class T> std::vector<T> download(const T *from, size_t count)
{
    std::vector<T> out(count);
    CUDA(cudaDeviceSynchronize());
    CUDA(cudaMemcpy(out.data(), from, count * sizeof(T), cudaMemcpyDeviceToHost));
    return out;
}

cudaStream_t new_stream()
{
    cudaStream_t out;
    CUDA(cudaStreamCreateWithFlags(&out, cudaStreamNonBlocking));
    return out;
}

uint64_t random_state = 1;

unsigned random_below(unsigned n)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (unsigned)(random_state >> 33) % n;
}

/** Small multiples of 1/8: sums of their products are exact in fp32, in any order. */
qs_bf16 random_bf16()
{
    return qs_bf16_round((float)((int)random_below(65) - 32) / 8);
}

/* ---- threads and warps ---- */

__global__ void index_kernel(unsigned *out)
{
    const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    out[block * blockDim.x * blockDim.y * blockDim.z + thread] =
        threadIdx.x + 10 * threadIdx.y + 100 * threadIdx.z + 1000 * blockIdx.x +
        10000 * blockIdx.y + 100000 * blockIdx.z;
}

void every_thread_runs_once()
{
    const dim3 grid(2, 3, 4), threads(5, 3, 2);
    const unsigned blocks = 24, count = 30;
    unsigned *out = device<unsigned>(blocks * count);
    for (int launch = 0; launch < 5; launch++) {
        QS_LAUNCH(index_kernel, grid, threads, 0, nullptr, out);
        const std::vector<unsigned> got = download(out, blocks * count);
        for (unsigned i = 0; i < blocks * count; i++) {
            const unsigned t = i % count, b = i / count;
            CHECK(got[i] == t % 5 + 10 * (t / 5 % 3) + 100 * (t / 15) + 1000 * (b % 2) +
                                10000 * (b / 2 % 3) + 100000 * (b / 6));
        }
    }
    CUDA(cudaGetLastError());
}

enum { SHUFFLES = 7 };

__global__ void shuffle_kernel(int *out, int width, int by)
{
    const int value = (int)threadIdx.x * 3;
    int *mine = out + threadIdx.x * SHUFFLES;
    mine[0] = __shfl_sync(ALL, value, by, width);
    mine[1] = __shfl_xor_sync(ALL, value, by, width);
    mine[2] = __shfl_down_sync(ALL, value, (unsigned)by, width);
    mine[3] = __shfl_up_sync(ALL, value, (unsigned)by, width);
    mine[4] = (int)__ballot_sync(ALL, (int)(threadIdx.x % 32) > by);
    mine[5] = __any_sync(ALL, (int)threadIdx.x == by);
    mine[6] = __all_sync(ALL, (int)threadIdx.x >= by);
}

/* CUDA C++ Programming Guide, warp shuffle functions: segments of `width` lanes; a source outside
 * of it is the lane itself, but for __shfl_sync, which takes it modulo width. */
void shuffles_are_as_documented()
{
    const int threads = 64;
    int *out = device<int>(threads * SHUFFLES);
    for (int width = 2; width <= 32; width *= 2) {
        for (int by = 0; by < 32; by += 3) {
            QS_LAUNCH(shuffle_kernel, 1, threads, 0, nullptr, out, width, by);
            const std::vector<int> got = download(out, threads * SHUFFLES);
            for (int i = 0; i < threads; i++) {
                const int lane = i % 32, warp = i - lane, first = lane / width * width;
                const int *mine = &got[(size_t)(i * SHUFFLES)];
                const int x = lane ^ by, down = lane + by, up = lane - by;
                CHECK(mine[0] == 3 * (warp + first + by % width));
                CHECK(mine[1] == 3 * (warp + (x < first + width ? x : lane)));
                CHECK(mine[2] == 3 * (warp + (down < first + width ? down : lane)));
                CHECK(mine[3] == 3 * (warp + (up >= first ? up : lane)));
                CHECK((unsigned)mine[4] == (by == 31 ? 0 : ALL << (by + 1)));
                CHECK(mine[5] == (by / 32 * 32 == warp));
                CHECK(mine[6] == (warp >= by));
            }
        }
    }
}

__global__ void wide_shuffle_kernel(double *out)
{
    out[threadIdx.x] = __shfl_xor_sync(ALL, 1.0 / (1.0 + threadIdx.x), 1);
}

void shuffles_take_eight_bytes()
{
    double *out = device<double>(32);
    QS_LAUNCH(wide_shuffle_kernel, 1, 32, 0, nullptr, out);
    const std::vector<double> got = download(out, 32);
    for (unsigned i = 0; i < 32; i++) {
        CHECK(got[i] == 1.0 / (1.0 + (i ^ 1u)));
    }
}

/** Each round, every thread reads what another warp wrote in the round before. */
__global__ void rotate_kernel(int *out, int rounds, bool with_barrier)
{
    QS_DYNAMIC_SHARED(int, value);
    const unsigned n = blockDim.x;
    value[threadIdx.x] = (int)threadIdx.x;
    __syncthreads();
    for (int i = 0; i < rounds; i++) {
        const int next = value[(threadIdx.x + 37) % n];
        if (with_barrier) {
            __syncthreads();
        }
        value[threadIdx.x] = next + 1;
        __syncthreads();
    }
    out[threadIdx.x] = value[threadIdx.x];
}

void barriers_order_the_block()
{
    const unsigned n = 1024;
    int *out = device<int>(n);
    for (int launch = 0; launch < 6; launch++) {
        QS_LAUNCH(rotate_kernel, 1, n, n * sizeof(int), nullptr, out, 5, true);
        const std::vector<int> got = download(out, n);
        for (unsigned i = 0; i < n; i++) {
            CHECK(got[i] == (int)((i + 5 * 37) % n) + 5);
        }
    }
}

void a_missing_barrier_is_seen()
{
    const unsigned n = 128;
    int *out = device<int>(n);
    QS_LAUNCH(rotate_kernel, 1, n, n * sizeof(int), nullptr, out, 3, false);
    const std::vector<int> first = download(out, n);
    int differ = 0;
    for (int launch = 0; launch < 6; launch++) {
        QS_LAUNCH(rotate_kernel, 1, n, n * sizeof(int), nullptr, out, 3, false);
        differ += download(out, n) != first;
    }
    CHECK(differ > 0);
}

__global__ void warp_rotate_kernel(int *out)
{
    QS_DYNAMIC_SHARED(int, value);
    value[threadIdx.x] = (int)threadIdx.x;
    out[threadIdx.x] = value[threadIdx.x ^ 1u]; /* lacks a __syncwarp */
}

void a_missing_warp_barrier_is_seen()
{
    int *out = device<int>(32);
    QS_LAUNCH(warp_rotate_kernel, 1, 32, 32 * sizeof(int), nullptr, out);
    const std::vector<int> got = download(out, 32);
    int wrong = 0;
    for (int i = 0; i < 32; i++) {
        wrong += got[(size_t)i] != (i ^ 1);
        CHECK(got[(size_t)i] == (i ^ 1) || got[(size_t)i] == -1); /* poison */
    }
    CHECK(wrong > 0);
}

__global__ void mixed_kernel(float *out)
{
    QS_DYNAMIC_SHARED(float, part);
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float sum = (float)threadIdx.x;
    for (int i = 0; i < (int)warp; i++) { /* warps meet at different times */
        sum = __shfl_xor_sync(ALL, sum, 1);
    }
    for (int step = 16; step > 0; step /= 2) {
        sum += __shfl_xor_sync(ALL, sum, step);
    }
    if (lane == 0) {
        part[warp] = sum;
    }
    __syncthreads();
    if (warp == 0) {
        float all = lane < blockDim.x / 32 ? part[lane] : 0.0f;
        for (int step = 16; step > 0; step /= 2) {
            all += __shfl_xor_sync(ALL, all, step);
        }
        if (lane == 0) {
            out[blockIdx.x] = all;
        }
    }
}

void a_block_sums()
{
    const unsigned blocks = 50, n = 512;
    float *out = device<float>(blocks);
    for (int launch = 0; launch < 6; launch++) {
        QS_LAUNCH(mixed_kernel, blocks, n, n, nullptr, out);
        for (const float got : download(out, blocks)) {
            CHECK(got == (float)(n * (n - 1) / 2));
        }
    }
}

/* The second warpgroup turns its numbers round by itself; the first is at another barrier. */
__global__ void warpgroup_kernel(int *out)
{
    QS_DYNAMIC_SHARED(int, value);
    const unsigned group = threadIdx.x / 128, at = threadIdx.x;
    value[at] = (int)at;
    if (group == 1) {
        qs_warpgroup_sync(1);
        const int other = value[at ^ 127u];
        qs_warpgroup_sync(1);
        value[at] = other;
    }
    __syncthreads();
    out[at] = value[255 - at];
}

void a_warpgroup_meets()
{
    int *out = device<int>(256);
    for (int launch = 0; launch < 6; launch++) {
        QS_LAUNCH(warpgroup_kernel, 1, 256, 256 * sizeof(int), nullptr, out);
        const std::vector<int> got = download(out, 256);
        for (int i = 0; i < 256; i++) {
            CHECK(got[(size_t)i] == (i < 128 ? 128 + i : 255 - i));
        }
    }
}

__global__ void count_kernel(int *total, unsigned long long *wide)
{
    atomicAdd(total, 2);
    atomicAdd(wide, 1ull << 32);
}

void atomics_add()
{
    int *total = upload(std::vector<int>{0});
    unsigned long long *wide = upload(std::vector<unsigned long long>{0});
    QS_LAUNCH(count_kernel, 10, 100, 0, nullptr, total, wide);
    CHECK(download(total, 1)[0] == 2000);
    CHECK(download(wide, 1)[0] == 1000ull << 32);
}

/* ---- what ends the program ---- */

__global__ void half_barrier_kernel()
{
    if (threadIdx.x < 16) {
        __syncthreads();
    }
}

__global__ void others_barrier_kernel()
{
    qs_warpgroup_sync(1);
}

__global__ void parted_lanes_kernel(int *out)
{
    if (threadIdx.x % 32 < 16) {
        out[threadIdx.x] = __shfl_xor_sync(ALL, 1, 1);
    }
}

__global__ void different_kernel(int *out)
{
    out[threadIdx.x] = threadIdx.x % 2 == 0 ? __shfl_xor_sync(ALL, 1, 1) : __any_sync(ALL, 1);
}

__global__ void shuffle_and_barrier_kernel(int *out)
{
    if (threadIdx.x % 32 == 7) {
        __syncthreads();
    }
    out[threadIdx.x] = __shfl_xor_sync(ALL, 1, 1);
}

__global__ void misaligned_kernel()
{
    QS_DYNAMIC_SHARED(unsigned char, bytes);
    uint32_t r[4];
    qs_ldmatrix_x4(r, bytes + 8);
}

template <class... P, class... A>
void launch_to_die(const char *name, unsigned threads, void (*kernel)(P...), A... args)
{
    emu::launcher<P...>(name, kernel, 1, threads, 1024, nullptr)(args...);
    CUDA(cudaDeviceSynchronize());
}

void die_at_barrier()
{
    launch_to_die("half_barrier_kernel", 64, half_barrier_kernel);
}

void die_at_anothers_barrier()
{
    launch_to_die("others_barrier_kernel", 256, others_barrier_kernel);
}

void die_of_exited_lanes()
{
    launch_to_die("parted_lanes_kernel", 64, parted_lanes_kernel, device<int>(64));
}

void die_at_different_operations()
{
    launch_to_die("different_kernel", 32, different_kernel, device<int>(64));
}

void die_between_shuffle_and_barrier()
{
    launch_to_die("shuffle_and_barrier_kernel", 64, shuffle_and_barrier_kernel, device<int>(64));
}

void die_of_half_a_warp()
{
    launch_to_die("different_kernel", 48, different_kernel, device<int>(64));
}

void die_of_alignment()
{
    launch_to_die("misaligned_kernel", 32, misaligned_kernel);
}

void die_of_host_pointer()
{
    std::vector<int> host(64);
    launch_to_die("different_kernel", 32, different_kernel, host.data());
}

__global__ void overrun_kernel(char *out, int at)
{
    out[at] = 1;
}

void die_of_overrun()
{
    char *out = device<char>(100);
    QS_LAUNCH(overrun_kernel, 1, 1, 0, nullptr, out, 100);
    CUDA(cudaFree(out));
}

void die_of_host_access()
{
    int *out = device<int>(4);
    CUDA(cudaMemset(out, 0, 16));
    CHECK(download(out, 4)[3] == 0);
    *(volatile int *)out = 1;
}

/* ---- tensor cores: layouts as in the PTX ISA manual, "Matrix Fragments for mma.m16n8k16" ---- */

__global__ void mma_kernel(const qs_bf16 *a, const qs_bf16 *b, float *d)
{
    const unsigned group = threadIdx.x >> 2, in_group = threadIdx.x % 4;
    uint32_t ra[4], rb[2];
    float rd[4];
    for (unsigned i = 0; i < 8; i++) {
        const unsigned row = i % 4 < 2 ? group : group + 8;
        const unsigned column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
        memcpy((char *)ra + 2 * i, &a[row * 16 + column], 2);
    }
    for (unsigned i = 0; i < 4; i++) {
        const unsigned row = in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0);
        memcpy((char *)rb + 2 * i, &b[row * 8 + group], 2);
    }
    for (unsigned i = 0; i < 4; i++) {
        rd[i] = d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)];
    }
    qs_mma_bf16(rd, ra, rb);
    for (unsigned i = 0; i < 4; i++) {
        d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = rd[i];
    }
}

void mma_is_the_product()
{
    std::vector<qs_bf16> a(16 * 16), b(16 * 8);
    std::vector<float> d(16 * 8);
    for (qs_bf16 &x : a) {
        x = random_bf16();
    }
    for (qs_bf16 &x : b) {
        x = random_bf16();
    }
    for (float &x : d) {
        x = qs_bf16_to_f32(random_bf16());
    }
    float *device_d = upload(d);
    QS_LAUNCH(mma_kernel, 1, 32, 0, nullptr, upload(a), upload(b), device_d);
    const std::vector<float> got = download(device_d, d.size());
    for (size_t i = 0; i < 16; i++) {
        for (size_t j = 0; j < 8; j++) {
            double want = d[i * 8 + j];
            for (size_t k = 0; k < 16; k++) {
                want += (double)qs_bf16_to_f32(a[i * 16 + k]) * qs_bf16_to_f32(b[k * 8 + j]);
            }
            CHECK(got[i * 8 + j] == (float)want);
        }
    }
}

__global__ void ldmatrix_kernel(uint32_t *out)
{
    QS_DYNAMIC_SHARED(uint16_t, rows);
    for (unsigned i = threadIdx.x; i < 32 * 8; i += 32) {
        rows[i] = (uint16_t)i; /* matrix i / 64, row i / 8 % 8, column i % 8 */
    }
    __syncwarp();
    qs_ldmatrix_x4(out + threadIdx.x * 8, rows + threadIdx.x * 8);
    qs_ldmatrix_x4_trans(out + threadIdx.x * 8 + 4, rows + threadIdx.x * 8);
}

void ldmatrix_is_as_documented()
{
    uint32_t *out = device<uint32_t>(32 * 8);
    QS_LAUNCH(ldmatrix_kernel, 1, 32, 32 * 16, nullptr, out);
    const std::vector<uint32_t> got = download(out, 32 * 8);
    for (uint32_t lane = 0; lane < 32; lane++) {
        for (uint32_t m = 0; m < 4; m++) {
            const uint32_t row = lane / 4, column = lane % 4 * 2;
            const uint32_t plain = m * 64 + row * 8 + column;
            CHECK(got[lane * 8 + m] == (plain | (plain + 1) << 16));
            const uint32_t turned = m * 64 + column * 8 + row;
            CHECK(got[lane * 8 + 4 + m] == (turned | (turned + 8) << 16));
        }
    }
}

__global__ void cp_async_kernel(const uint32_t *from, uint32_t *out)
{
    QS_DYNAMIC_SHARED(uint32_t, to);
    uint32_t *mine = to + threadIdx.x * 12;
    for (int i = 0; i < 12; i++) {
        mine[i] = 0;
    }
    qs_cp_async_16(mine, from, true);
    qs_cp_async_commit();
    qs_cp_async_16(mine + 4, from + 4, true);
    qs_cp_async_commit();
    qs_cp_async_16(mine + 8, from + 8, false);
    qs_cp_async_commit();
    uint32_t *seen = out + threadIdx.x * 12;
    for (int i = 0; i < 3; i++) {
        seen[i] = mine[4 * i]; /* nothing has arrived */
    }
    qs_cp_async_wait<2>();
    for (int i = 0; i < 3; i++) {
        seen[3 + i] = mine[4 * i];
    }
    qs_cp_async_wait<1>();
    for (int i = 0; i < 3; i++) {
        seen[6 + i] = mine[4 * i];
    }
    qs_cp_async_wait<0>();
    for (int i = 0; i < 3; i++) {
        seen[9 + i] = mine[4 * i];
    }
}

void cp_async_arrives_at_its_wait()
{
    const std::vector<uint32_t> from = {1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
    uint32_t *out = device<uint32_t>(64 * 12);
    QS_LAUNCH(cp_async_kernel, 1, 64, 64 * 48, nullptr, upload(from), out);
    const std::vector<uint32_t> got = download(out, 64 * 12);
    const std::vector<uint32_t> want = {ALL, ALL, ALL, 1, ALL, ALL, 1, 2, ALL, 1, 2, 0};
    for (size_t i = 0; i < got.size(); i++) {
        CHECK(got[i] == want[i % 12]);
    }
}

/* ---- warpgroups: d = a b^T, then d += a b, a from shared memory and from registers ---- */

enum { WG_N = 128, WG_FENCE = 1, WG_SHARED_FENCE = 2 };

__device__ __forceinline__ void load_panel(qs_bf16 *tile, const qs_bf16 *from, int rows)
{
    for (int i = (int)threadIdx.x; i < rows * 8; i += 128) {
        qs_cp_async_16(tile + qs_panel_chunk(rows, i / 8, i % 8) * 8, from + i * 8, true);
    }
}

/* a [64, 64], b [N, 64], c [64, N]: d [64, N] = a b^T + a c; d2 the same, a in registers in the
 * second product. early: d before the wait. */
__global__ void wgmma_kernel(const qs_bf16 *a, const qs_bf16 *b, const qs_bf16 *c, int fences,
                             float *d, float *d2, uint32_t *early)
{
    QS_DYNAMIC_SHARED_PANELS(qs_bf16, tile_a);
    qs_bf16 *tile_b = tile_a + 64 * 64, *tile_c = tile_b + WG_N * 64;
    load_panel(tile_a, a, 64);
    load_panel(tile_b, b, WG_N);
    load_panel(tile_c, c, 64); /* columns 0..63, and the other panel behind them */
    load_panel(tile_c + 64 * 64, c + 64 * 64, 64);
    qs_cp_async_commit();
    qs_cp_async_wait<0>();
    if ((fences & WG_SHARED_FENCE) != 0) {
        qs_fence_shared_for_wgmma();
    }
    __syncthreads();
    const unsigned lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
    float sum[WG_N / 8][4], sum2[WG_N / 8][4];
    if ((fences & WG_FENCE) != 0) {
        qs_wgmma_fence();
    }
    for (int k = 0; k < 4; k++) {
        const uint64_t left =
            qs_wgmma_k_major(qs_shared_address(tile_a) + qs_panel_k_major_at(64, 0, k));
        const uint64_t right =
            qs_wgmma_k_major(qs_shared_address(tile_b) + qs_panel_k_major_at(WG_N, 0, k));
        qs_wgmma<WG_N, 0>(sum, left, right, k > 0);
        qs_wgmma<WG_N, 0>(sum2, left, right, k > 0);
    }
    qs_wgmma_commit();
    memcpy(early + threadIdx.x, &sum[0][0], 4);
    for (int k = 0; k < 4; k++) {
        const uint64_t right =
            qs_wgmma_mn_major(qs_shared_address(tile_c) + qs_panel_mn_major_at(k), 64);
        uint32_t fragment[4];
        for (unsigned part = 0; part < 4; part++) {
            const unsigned r = row + part % 2 * 8;
            const unsigned column = (unsigned)k * 16 + lane % 4 * 2 + part / 2 * 8;
            memcpy(&fragment[part], a + r * 64 + column, 4);
        }
        qs_wgmma<WG_N, 1>(
            sum, qs_wgmma_k_major(qs_shared_address(tile_a) + qs_panel_k_major_at(64, 0, k)), right,
            1);
        qs_wgmma<WG_N>(sum2, fragment, right, 1);
    }
    qs_wgmma_commit();
    qs_wgmma_wait<0>();
    qs_wgmma_keep(sum);
    qs_wgmma_keep(sum2);
    for (unsigned n = 0; n < WG_N / 8; n++) {
        for (unsigned i = 0; i < 4; i++) {
            const unsigned at = (row + i / 2 * 8) * WG_N + n * 8 + lane % 4 * 2 + i % 2;
            d[at] = sum[n][i];
            d2[at] = sum2[n][i];
        }
    }
}

struct wgmma_job {
    std::vector<qs_bf16> a, b, c;
    float *d, *d2;
    uint32_t *early;
};

/* c lies as two panels of 64 columns: [2][64][64]. */
wgmma_job run_wgmma(int fences)
{
    wgmma_job job = {std::vector<qs_bf16>(64 * 64),   std::vector<qs_bf16>(WG_N * 64),
                     std::vector<qs_bf16>(64 * WG_N), device<float>(64 * WG_N),
                     device<float>(64 * WG_N),        device<uint32_t>(128)};
    for (std::vector<qs_bf16> *matrix : {&job.a, &job.b, &job.c}) {
        for (qs_bf16 &x : *matrix) {
            x = random_bf16();
        }
    }
    QS_LAUNCH(wgmma_kernel, 1, 128, (64 * 64 + WG_N * 64 + 64 * WG_N) * sizeof(qs_bf16), nullptr,
              upload(job.a), upload(job.b), upload(job.c), fences, job.d, job.d2, job.early);
    CUDA(cudaDeviceSynchronize());
    return job;
}

void wgmma_is_the_product()
{
    const wgmma_job job = run_wgmma(WG_FENCE | WG_SHARED_FENCE);
    const std::vector<float> d = download(job.d, 64 * WG_N), d2 = download(job.d2, 64 * WG_N);
    for (size_t i = 0; i < 64; i++) {
        for (size_t j = 0; j < WG_N; j++) {
            double want = 0.0;
            for (size_t k = 0; k < 64; k++) {
                const double left = qs_bf16_to_f32(job.a[i * 64 + k]);
                want += left * qs_bf16_to_f32(job.b[j * 64 + k]);
                want += left * qs_bf16_to_f32(job.c[(j / 64 * 64 + k) * 64 + j % 64]);
            }
            CHECK(fabs(d[i * WG_N + j] - want) <= 1e-5 * (1.0 + fabs(want)));
            CHECK(d2[i * WG_N + j] == d[i * WG_N + j]);
        }
    }
    for (uint32_t bits : download(job.early, 128)) {
        CHECK(bits == ALL); /* nothing is there before the wait */
    }
}

void die_without_wgmma_fence()
{
    run_wgmma(WG_SHARED_FENCE);
}

void die_without_shared_fence()
{
    run_wgmma(WG_FENCE);
}

/* ---- streams ---- */

__global__ void set_kernel(int *x, int value)
{
    *x = value;
}

int read_on(cudaStream_t stream, const int *x)
{
    int out = 0;
    CUDA(cudaMemcpyAsync(&out, x, sizeof out, cudaMemcpyDeviceToHost, stream));
    return out;
}

void a_missing_wait_is_seen()
{
    int *x = device<int>(1);
    const cudaStream_t a = new_stream(), b = new_stream();
    QS_LAUNCH(set_kernel, 1, 1, 0, a, x, 5);
    CHECK(read_on(b, x) == -1);
    cudaEvent_t event;
    CUDA(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    CUDA(cudaEventRecord(event, a));
    QS_LAUNCH(set_kernel, 1, 1, 0, a, x, 6);
    CUDA(cudaStreamWaitEvent(b, event, 0));
    CHECK(read_on(b, x) == 5); /* the mark, and not what came behind it */
    CUDA(cudaStreamSynchronize(a));
    CHECK(read_on(b, x) == 6);
    CUDA(cudaEventDestroy(event));
    CUDA(cudaStreamDestroy(a));
    CUDA(cudaStreamDestroy(b));
    CHECK(cudaStreamSynchronize(a) == cudaErrorInvalidResourceHandle);
}

void a_wait_keeps_its_mark()
{
    int *x = device<int>(1);
    const cudaStream_t a = new_stream(), b = new_stream();
    cudaEvent_t event;
    CUDA(cudaEventCreate(&event));
    CUDA(cudaStreamWaitEvent(b, event, 0)); /* never recorded: nothing to wait for */
    QS_LAUNCH(set_kernel, 1, 1, 0, a, x, 1);
    CUDA(cudaEventRecord(event, a));
    CUDA(cudaStreamWaitEvent(b, event, 0));
    QS_LAUNCH(set_kernel, 1, 1, 0, a, x, 2);
    CUDA(cudaEventRecord(event, a));
    CHECK(read_on(b, x) == 1);
    CUDA(cudaEventSynchronize(event));
    CHECK(read_on(b, x) == 2);
}

void eager_streams_run_at_once()
{
    int *x = device<int>(1);
    const cudaStream_t a = new_stream(), b = new_stream();
    QS_LAUNCH(set_kernel, 1, 1, 0, a, x, 5);
    CHECK(read_on(b, x) == 5);
}

void polling_gets_there()
{
    int *x = device<int>(1);
    const cudaStream_t a = new_stream(), b = new_stream();
    cudaEvent_t start, end;
    CUDA(cudaEventCreate(&start));
    CUDA(cudaEventCreate(&end));
    CUDA(cudaEventRecord(start, a));
    QS_LAUNCH(set_kernel, 1, 1, 0, a, x, 5);
    CUDA(cudaEventRecord(end, a));
    int polls = 1;
    float ms = -1.0f;
    CHECK(cudaEventElapsedTime(&ms, start, end) == cudaErrorNotReady);
    while (cudaEventQuery(end) == cudaErrorNotReady) {
        polls++;
    }
    CHECK(polls == 3);
    CHECK(read_on(b, x) == 5);
    CUDA(cudaEventElapsedTime(&ms, start, end));
    CHECK(ms >= 0.0f);
    (void)cudaGetLastError();
    CHECK(cudaStreamQuery(a) == cudaSuccess);
}

void the_null_stream_waits_for_blocking_ones()
{
    int *x = device<int>(1);
    cudaStream_t blocking;
    CUDA(cudaStreamCreate(&blocking));
    const cudaStream_t other = new_stream();
    QS_LAUNCH(set_kernel, 1, 1, 0, other, x, 1);
    QS_LAUNCH(set_kernel, 1, 1, 0, blocking, x, 2);
    int got = 0;
    CUDA(cudaMemcpy(&got, x, sizeof got, cudaMemcpyDeviceToHost));
    CHECK(got == 2);
    CUDA(cudaDeviceSynchronize());
    CUDA(cudaMemcpy(&got, x, sizeof got, cudaMemcpyDeviceToHost));
    CHECK(got == 1);
}

void host_memory_is_read_when_it_should()
{
    int *x = device<int>(2), *pinned = nullptr, pageable = 1;
    const cudaStream_t a = new_stream();
    CUDA(cudaMallocHost(&pinned, sizeof *pinned));
    *pinned = 1;
    CUDA(cudaMemcpyAsync(x, &pageable, sizeof(int), cudaMemcpyHostToDevice, a));
    CUDA(cudaMemcpyAsync(x + 1, pinned, sizeof(int), cudaMemcpyDefault, a));
    pageable = *pinned = 2;
    CUDA(cudaStreamSynchronize(a));
    CHECK(read_on(a, x) == 1);
    CHECK(read_on(a, x + 1) == 2); /* changed too early: that is what the copy takes */
    CUDA(cudaMemcpyAsync(pinned, x, sizeof(int), cudaMemcpyDefault, a));
    CHECK(*pinned == 2);
    CUDA(cudaStreamSynchronize(a));
    CHECK(*pinned == 1);
    CUDA(cudaFreeHost(pinned));
}

void mixed_streams_are_in_order()
{
    int *x = device<int>(100);
    const cudaStream_t a = new_stream(), b = new_stream();
    cudaEvent_t event;
    CUDA(cudaEventCreate(&event));
    for (int i = 0; i < 100; i++) {
        const cudaStream_t from = i % 2 ? a : b, to = i % 2 ? b : a;
        QS_LAUNCH(set_kernel, 1, 1, 0, from, x + i, i);
        CUDA(cudaEventRecord(event, from));
        CUDA(cudaStreamWaitEvent(to, event, 0));
    }
    CUDA(cudaStreamSynchronize(a));
    const std::vector<int> got = download(x, 100);
    for (int i = 0; i < 100; i++) {
        CHECK(got[(size_t)i] == i);
    }
}

/* ---- memory, launches, devices ---- */

void memory_is_limited_and_poisoned()
{
    size_t free_bytes, total;
    void *p = nullptr, *q = nullptr;
    CUDA(cudaMemGetInfo(&free_bytes, &total));
    CHECK(free_bytes == 1 << 20 && total == 1 << 20);
    CUDA(cudaMalloc(&p, 1 << 19));
    CHECK(cudaMalloc(&q, (1 << 19) + 1) == cudaErrorMemoryAllocation && q == nullptr);
    CHECK(cudaGetLastError() == cudaErrorMemoryAllocation);
    CHECK(cudaGetLastError() == cudaSuccess);
    CUDA(cudaMemGetInfo(&free_bytes, &total));
    CHECK(free_bytes == 1 << 19);
    for (const unsigned char byte : download((unsigned char *)p, 1 << 19)) {
        CHECK(byte == 0xff);
    }
    CUDA(cudaFree(p));
    CUDA(cudaMalloc(&q, 1 << 20));
    CHECK(cudaFree((char *)q + 1) == cudaErrorInvalidValue);
    CHECK(cudaFreeHost(q) == cudaErrorInvalidValue);
    CHECK(cudaMemset(q, 0, (1 << 20) + 1) == cudaErrorInvalidValue);
    int host = 0;
    CHECK(cudaMemcpy(q, &host, 4, cudaMemcpyDeviceToHost) == cudaErrorInvalidMemcpyDirection);
    CHECK(cudaMemcpy((char *)q + (1 << 20) - 2, &host, 4, cudaMemcpyDefault) ==
          cudaErrorInvalidValue);
    CUDA(cudaFree(q));
    CUDA(cudaFree(nullptr));
}

void rows_are_copied_and_set()
{
    const cudaStream_t a = new_stream();
    int *x = device<int>(12), *y = device<int>(12);
    CUDA(cudaMemset2DAsync(x, 16, 0, 8, 3, a));
    CUDA(cudaMemcpy2DAsync(y + 1, 16, x + 1, 16, 8, 3, cudaMemcpyDeviceToDevice, a));
    CUDA(cudaStreamSynchronize(a));
    const std::vector<int> gx = download(x, 12), gy = download(y, 12);
    for (size_t i = 0; i < 12; i++) {
        CHECK(gx[i] == (i % 4 < 2 ? 0 : -1));
        CHECK(gy[i] == (i % 4 == 1 ? 0 : -1));
    }
}

__global__ void nothing_kernel()
{
}

void impossible_launches_are_refused()
{
    QS_LAUNCH(nothing_kernel, 0, 32, 0, nullptr);
    CHECK(cudaGetLastError() == cudaErrorInvalidConfiguration);
    QS_LAUNCH(nothing_kernel, 1, 1025, 0, nullptr);
    CHECK(cudaGetLastError() == cudaErrorInvalidConfiguration);
    QS_LAUNCH(nothing_kernel, dim3(1, 65536), 1, 0, nullptr);
    CHECK(cudaPeekAtLastError() == cudaErrorInvalidConfiguration);
    CHECK(cudaGetLastError() == cudaErrorInvalidConfiguration);
    QS_LAUNCH(nothing_kernel, 1, 1, (48 << 10) + 1, nullptr);
    CHECK(cudaGetLastError() == cudaErrorInvalidValue);
    CHECK(cudaFuncSetAttribute(nothing_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               (227 << 10) + 1) == cudaErrorInvalidValue);
    CHECK(cudaGetLastError() == cudaErrorInvalidValue);
    CUDA(cudaFuncSetAttribute(nothing_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              227 << 10));
    QS_LAUNCH(nothing_kernel, 3, 1024, 227 << 10, nullptr);
    CHECK(cudaGetLastError() == cudaSuccess);
}

void no_device()
{
    int count = 7, version = 7;
    CHECK(cudaGetDeviceCount(&count) == cudaErrorNoDevice && count == 0);
    CUDA(cudaDriverGetVersion(&version));
    CHECK(version == 13000);
}

void no_driver()
{
    int count = 7, version = 7;
    CHECK(cudaGetDeviceCount(&count) == cudaErrorInsufficientDriver);
    CUDA(cudaDriverGetVersion(&version));
    CHECK(version == 0);
}

void devices_are_as_told()
{
    int count = 0, version = 0, sms = 0;
    cudaDeviceProp prop;
    CUDA(cudaGetDeviceCount(&count));
    CHECK(count == 2);
    CUDA(cudaGetDeviceProperties(&prop, 1));
    CHECK(prop.major == 8 && prop.minor == 6 && strcmp(prop.name, "emulated") == 0);
    CUDA(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
    CHECK(sms == prop.multiProcessorCount);
    CUDA(cudaDriverGetVersion(&version));
    CHECK(version == 12040);
    CHECK(cudaSetDevice(2) == cudaErrorInvalidDevice);
    CUDA(cudaSetDevice(1));
}

void the_third_allocation_fails()
{
    void *p;
    CUDA(cudaMalloc(&p, 1));
    CUDA(cudaMalloc(&p, 1));
    CHECK(cudaMalloc(&p, 1) == cudaErrorMemoryAllocation);
    CUDA(cudaMalloc(&p, 1));
}

void the_second_launch_fails()
{
    QS_LAUNCH(nothing_kernel, 1, 1, 0, nullptr);
    CUDA(cudaGetLastError());
    QS_LAUNCH(nothing_kernel, 1, 1, 0, nullptr);
    CHECK(cudaGetLastError() == cudaErrorUnknown);
    CHECK(strcmp(cudaGetErrorName(cudaErrorMemoryAllocation), "cudaErrorMemoryAllocation") == 0);
}

/* ---- the product ---- */

struct matrix {
    std::vector<qs_bf16> values;
    int64_t stride;
    bool transposed;

    matrix(int64_t rows, int64_t columns, bool turned)
        : values((size_t)((turned ? columns : rows) * ((turned ? rows : columns) + 3))),
          stride((turned ? rows : columns) + 3), transposed(turned)
    {
        for (qs_bf16 &x : values) {
            x = random_bf16();
        }
    }

    float at(int64_t i, int64_t j) const
    {
        return qs_bf16_to_f32(values[(size_t)(transposed ? j * stride + i : i * stride + j)]);
    }
};

void check_gemm(int64_t m, int64_t n, int64_t k, bool turn_a, bool turn_b, bool with_c0,
                qs_dtype dtype)
{
    const matrix a(m, k, turn_a), b(k, n, turn_b), c0(m, n, false);
    const cudaStream_t stream = new_stream();
    std::vector<float> c0_wide(c0.values.size());
    for (size_t i = 0; i < c0_wide.size(); i++) {
        c0_wide[i] = qs_bf16_to_f32(c0.values[i]);
    }
    qs_gemm_call call = {};
    call.m = m;
    call.n = n;
    call.k = k;
    call.alpha = 0.5f;
    call.a = k > 0 ? upload(a.values) : nullptr;
    call.b = k > 0 ? upload(b.values) : nullptr;
    call.a_stride = a.stride;
    call.b_stride = b.stride;
    call.a_transposed = turn_a;
    call.b_transposed = turn_b;
    const void *base = dtype == QS_F32 ? (const void *)upload(c0_wide) : upload(c0.values);
    call.c0 = with_c0 ? base : nullptr;
    call.c0_stride = call.c_stride = c0.stride;
    call.c_dtype = dtype;
    call.c = const_cast<void *>(base);
    CHECK(qs_cuda_gemm((qs_queue *)stream, &call) == QS_OK);
    CUDA(cudaStreamSynchronize(stream));
    const size_t count = (size_t)(m * c0.stride);
    const std::vector<float> wide =
        dtype == QS_F32 ? download((const float *)call.c, count) : std::vector<float>();
    const std::vector<qs_bf16> narrow =
        dtype == QS_BF16 ? download((const qs_bf16 *)call.c, count) : std::vector<qs_bf16>();
    for (int64_t i = 0; i < m; i++) {
        for (int64_t j = 0; j < c0.stride; j++) {
            const size_t at = (size_t)(i * c0.stride + j);
            double want = 0.0;
            for (int64_t p = 0; j < n && p < k; p++) {
                want += (double)a.at(i, p) * b.at(p, j);
            }
            want = j < n ? 0.5 * want + (with_c0 ? c0_wide[at] : 0.0) : c0_wide[at];
            const float expected = (float)want; /* exact: see random_bf16 */
            CHECK(dtype == QS_F32 ? wide[at] == expected
                                  : narrow[at].bits == qs_bf16_round(expected).bits);
        }
    }
    CUDA(cudaStreamDestroy(stream));
}

void gemm_is_the_product()
{
    static const int64_t sizes[][3] = {{1, 1, 1},   {4, 16, 8},   {5, 17, 33}, {64, 300, 257},
                                       {3, 512, 1}, {33, 1, 600}, {7, 9, 0}};
    for (const auto &s : sizes) {
        for (int flags = 0; flags < 16; flags++) {
            check_gemm(s[0], s[1], s[2], flags & 1, flags & 2, flags & 4,
                       flags & 8 ? QS_F32 : QS_BF16);
        }
    }
    check_gemm(0, 5, 5, false, false, true, QS_F32);
}

/* ---- the tests ---- */

struct test {
    const char *name;
    void (*run)();
    const char *environment; /* "A=1 B=2" */
    const char *last_words;  /* of one that is to die; "" for a fault */
};

#define TEST(function, ...)                                                                        \
    {                                                                                              \
#function, function, __VA_ARGS__                                                           \
    }
const test tests[] = {
    TEST(every_thread_runs_once, "", nullptr),
    TEST(shuffles_are_as_documented, "", nullptr),
    TEST(shuffles_take_eight_bytes, "", nullptr),
    TEST(barriers_order_the_block, "", nullptr),
    TEST(barriers_order_the_block, "QSHARD_EMULATOR_SEED=2", nullptr),
    TEST(a_missing_barrier_is_seen, "", nullptr),
    TEST(a_missing_barrier_is_seen, "QSHARD_EMULATOR_SEED=2", nullptr),
    TEST(a_missing_barrier_is_seen, "QSHARD_EMULATOR_SEED=3", nullptr),
    TEST(a_missing_warp_barrier_is_seen, "", nullptr),
    TEST(a_block_sums, "", nullptr),
    TEST(a_warpgroup_meets, "", nullptr),
    TEST(a_warpgroup_meets, "QSHARD_EMULATOR_SEED=2", nullptr),
    TEST(atomics_add, "", nullptr),
    TEST(die_at_barrier, "", "half_barrier_kernel, block (0, 0, 0), thread"),
    TEST(die_at_barrier, "", "48 (thread 16 the first): has ended"),
    TEST(die_of_exited_lanes, "", "has ended"),
    TEST(die_at_different_operations, "", "others of its warp wait at"),
    TEST(die_between_shuffle_and_barrier, "", "waits at __syncthreads"),
    TEST(die_at_anothers_barrier, "", "qs_warpgroup_sync(1) of a thread of another warpgroup"),
    TEST(die_of_half_a_warp, "", "warp of 16 threads"),
    TEST(die_of_alignment, "", "not 16-byte aligned"),
    TEST(die_of_host_pointer, "", "argument 0 points to"),
#ifdef __SANITIZE_ADDRESS__
    TEST(die_of_overrun, "", "heap-buffer-overflow"),
#else
    TEST(die_of_overrun, "", "wrote 0 bytes past the end of an allocation of 100 bytes"),
#endif
    TEST(die_of_host_access, "QSHARD_EMULATOR_PROTECT=1", ""),
    TEST(mma_is_the_product, "", nullptr),
    TEST(ldmatrix_is_as_documented, "", nullptr),
    TEST(cp_async_arrives_at_its_wait, "", nullptr),
    TEST(wgmma_is_the_product, "", nullptr),
    TEST(die_without_wgmma_fence, "", "without a qs_wgmma_fence"),
    TEST(die_without_shared_fence, "", "without a qs_fence_shared_for_wgmma"),
    TEST(a_missing_wait_is_seen, "", nullptr),
    TEST(a_wait_keeps_its_mark, "", nullptr),
    TEST(eager_streams_run_at_once, "QSHARD_EMULATOR_EAGER=1", nullptr),
    TEST(polling_gets_there, "", nullptr),
    TEST(the_null_stream_waits_for_blocking_ones, "", nullptr),
    TEST(host_memory_is_read_when_it_should, "", nullptr),
    TEST(mixed_streams_are_in_order, "QSHARD_EMULATOR_STREAMS=mixed", nullptr),
    TEST(mixed_streams_are_in_order, "QSHARD_EMULATOR_PROTECT=1", nullptr),
    TEST(memory_is_limited_and_poisoned, "QSHARD_EMULATOR_MEMORY=1048576", nullptr),
    TEST(rows_are_copied_and_set, "", nullptr),
    TEST(impossible_launches_are_refused, "", nullptr),
    TEST(no_device, "QSHARD_EMULATOR_DEVICES=0", nullptr),
    TEST(no_driver, "QSHARD_EMULATOR_DEVICES=-1", nullptr),
    TEST(devices_are_as_told,
         "QSHARD_EMULATOR_DEVICES=2 QSHARD_EMULATOR_CAPABILITY=8.6 QSHARD_EMULATOR_DRIVER=12040",
         nullptr),
    TEST(the_third_allocation_fails, "QSHARD_EMULATOR_FAIL=cudaMalloc:3", nullptr),
    TEST(the_second_launch_fails, "QSHARD_EMULATOR_FAIL=cudaLaunchKernel:2", nullptr),
    TEST(gemm_is_the_product, "", nullptr),
};
#undef TEST

[[noreturn]] void run_here(const test &t, int output)
{
    std::vector<char> environment(t.environment, t.environment + strlen(t.environment) + 1);
    for (char *word = strtok(environment.data(), " "); word != nullptr;
         word = strtok(nullptr, " ")) {
        putenv(strdup(word));
    }
    if (t.last_words != nullptr) {
        dup2(output, STDERR_FILENO);
    }
    t.run();
    _exit(0);
}

bool passes(const test &t)
{
    int ends[2];
    CHECK(pipe(ends) == 0);
    fflush(nullptr);
    const pid_t child = fork();
    if (child == 0) {
        close(ends[0]);
        run_here(t, ends[1]);
    }
    close(ends[1]);
    std::vector<char> text;
    char piece[4096];
    for (ssize_t n; (n = read(ends[0], piece, sizeof piece)) > 0;) {
        text.insert(text.end(), piece, piece + n);
    }
    text.push_back('\0');
    close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    if (t.last_words == nullptr) {
        return WIFEXITED(status) && WEXITSTATUS(status) == 0;
    }
    const bool died = WIFSIGNALED(status) || (WIFEXITED(status) && WEXITSTATUS(status) != 0);
    const bool said = strstr(text.data(), t.last_words) != nullptr;
    if (!died || !said) {
        printf("%s\nwas to die with: %s\n", text.data(), t.last_words);
    }
    return died && said;
}

} // namespace

int main(int argc, char **argv)
{
    int failed = 0;
    for (const test &t : tests) {
        if (argc > 1 && strcmp(argv[1], t.name) != 0) {
            continue;
        }
        const bool good = passes(t);
        printf("%-6s %s %s\n", good ? "ok" : "FAILED", t.name, t.environment);
        failed += !good;
    }
    return failed > 0;
}
