/* What kernels, compiled for the host, ask of the emulator: who they are, where they meet, and how
 * they are launched. C++; part of the emulated cuda_runtime.h. */
#ifndef QS_EMULATOR_EMULATOR_H
#define QS_EMULATOR_EMULATOR_H

#include <stddef.h>
#include <stdint.h>

#include <functional>
#include <tuple>
#include <type_traits>

#include "cuda_runtime_api.h"

#pragma GCC visibility push(hidden)
namespace emu
{

enum { LANES = 32 };

/* ---- the running thread ---- */

struct warp;
struct context;

/** One CUDA thread. */
struct thread {
    uint3 index; /* threadIdx */
    unsigned lane;
    warp *in;
    thread *next;   /* the lane that runs after this one; a ring */
    context *where; /* its stack; nullptr: not begun */
};

extern thread *self;
extern uint3 block_index;
extern dim3 block_dim, grid_dim;
extern unsigned char *dynamic_shared;

/* ---- meeting points ---- */

enum class meeting { shuffle, vote, sync, mma, ldmatrix, ldmatrix_trans, wgmma };

/** __syncthreads: every thread of the block. */
void barrier();

/** Every thread of the warpgroup, its own. */
void warpgroup_barrier(int group);

/** All 32 lanes of the warp come here with a value and leave with everybody's, valid until the
 * lane's next meeting. `finish`, if any, is called once, by the last to come, while all others
 * stand still. */
const uint64_t *meet(meeting what, uint64_t value, void (*finish)(const uint64_t *) = nullptr);

/** Ends the program with a message that names the kernel, the block and the thread. */
[[noreturn]] void die(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* ---- what ptx.cuh has words for ---- */

void mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2]);
void ldmatrix_x4(uint32_t r[4], const void *row, bool transposed);
void check_aligned(const void *at, size_t bytes); /* of an access in one piece */
void cp_async_16(void *shared, const void *global, bool valid);
void cp_async_commit();
void cp_async_wait(int open_groups);
void fence_shared_for_wgmma();
void wgmma_fence();
/** d [16 rows of the warp, n] (+)= A [64, 16] B [16, n]; `a`: A's fragment, or nullptr for the
 * descriptor. */
void wgmma(float *d, int n, const uint32_t *a, uint64_t a_descriptor, uint64_t b_descriptor,
           bool b_mn_major, bool add);
void wgmma_commit();
void wgmma_wait(int open_groups);

/* ---- launches ---- */

struct launch_shape {
    const char *name;
    const void *kernel;
    dim3 grid, threads;
    size_t shared_bytes;
    cudaStream_t stream;
};

/** Check the shape, and queue the kernel on its stream. An error is found by cudaGetLastError. */
void launch(const launch_shape &shape, std::function<void()> body);

/** Ends the program if a kernel is given a pointer that a GPU could not follow. */
void check_argument(const char *kernel, int number, const void *pointer);

/** kernel<<<...>>>: called with the arguments, which are converted and copied there and then. */
template <class... P> class launcher
{
  public:
    launcher(const char *name, void (*kernel)(P...), dim3 grid, dim3 threads, size_t shared_bytes,
             cudaStream_t stream)
        : kernel_(kernel), shape_{name,         reinterpret_cast<const void *>(kernel),
                                  grid,         threads,
                                  shared_bytes, stream}
    {
    }

    __attribute__((noinline)) void operator()(P... args) const
    {
        int number = 0;
        (check(number++, args), ...);
        launch(shape_, [kernel = kernel_, kept = std::tuple<std::decay_t<P>...>(args...)] {
            std::apply(kernel, kept);
        });
    }

  private:
    template <class T> void check(int number, const T &arg) const
    {
        if constexpr (std::is_pointer_v<T>) {
            check_argument(shape_.name, number, arg);
        }
    }

    void (*kernel_)(P...);
    launch_shape shape_;
};

} // namespace emu

#pragma GCC visibility pop

#endif
