/* Launches: the checks that CUDA makes, and the grid as a piece of work for the stream. */
#include <map>
#include <numeric>

#include "block.h"
#include "mix.h"
#include "runtime.h"

namespace emu
{
namespace
{

/* Of every card since compute capability 8.0; 227 KiB is 9.0's, the largest there is. */
constexpr size_t SHARED_BYTES = 48 << 10, SHARED_BYTES_OPTIN = 227 << 10;

std::map<const void *, size_t> &shared_limits()
{
    static auto *limits = new std::map<const void *, size_t>;
    return *limits;
}

size_t shared_limit_of(const void *kernel)
{
    const auto found = shared_limits().find(kernel);
    return found != shared_limits().end() ? found->second : SHARED_BYTES;
}

cudaError_t check(const launch_shape &s)
{
    const dim3 &g = s.grid, &t = s.threads;
    if (g.x == 0 || g.y == 0 || g.z == 0 || g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535) {
        return cudaErrorInvalidConfiguration;
    }
    if (t.x == 0 || t.y == 0 || t.z == 0 || t.x > 1024 || t.y > 1024 || t.z > 64 ||
        (uint64_t)t.x * t.y * t.z > 1024) {
        return cudaErrorInvalidConfiguration;
    }
    if (s.shared_bytes > shared_limit_of(s.kernel)) {
        return cudaErrorInvalidValue;
    }
    if (!stream_exists(s.stream)) {
        return cudaErrorInvalidResourceHandle;
    }
    return cudaSuccess;
}

/** The order of a launch's blocks, which CUDA leaves open: forwards, backwards, or in steps that
 * have no divisor in common with their number, from somewhere on. */
struct block_order {
    uint64_t count, first, step;

    block_order(uint64_t blocks, uint64_t order) : count(blocks), first(0), step(1)
    {
        switch (mix(order, 1) % 3) {
        case 0:
            break;
        case 1:
            first = step = count - 1;
            break;
        default:
            first = mix(order, 2) % count;
            for (step = mix(order, 3) % count + 1; std::gcd(step, count) != 1; step++) {
            }
        }
    }

    uint64_t at(uint64_t turn) const
    {
        return (first + turn * step) % count;
    }
};

void run_grid(const launch_shape &s, uint64_t order, const std::function<void()> &body)
{
    const uint64_t count = (uint64_t)s.grid.x * s.grid.y * s.grid.z;
    const block_order blocks(count, order);
    block_prepare(s, order);
    for (uint64_t i = 0; i < count; i++) {
        const uint64_t at = blocks.at(i);
        const uint64_t row = at / s.grid.x;
        block_index = {(unsigned)(at % s.grid.x), (unsigned)(row % s.grid.y),
                       (unsigned)(row / s.grid.y)};
        block_run(body);
    }
}

uint64_t n_launches;

} // namespace

void launch(const launch_shape &shape, std::function<void()> body)
{
    lock guard(mutex);
    if (enter("cudaLaunchKernel") != cudaSuccess) {
        return;
    }
    const cudaError_t error = check(shape);
    if (error != cudaSuccess) {
        keep(error);
        return;
    }
    const uint64_t order = mix(config().seed, n_launches++);
    push(shape.stream, [shape, order, body = std::move(body)] { run_grid(shape, order, body); });
}

void check_argument(const char *kernel, int number, const void *pointer)
{
    if (pointer == nullptr) {
        return;
    }
    lock guard(mutex);
    if (allocation_of(pointer) == nullptr) {
        die("kernel %s: argument %d points to %p, which is neither device nor pinned memory",
            kernel, number, pointer);
    }
}

} // namespace emu

using namespace emu;

extern "C" cudaError_t cudaFuncSetAttribute(const void *kernel, cudaFuncAttribute attr, int value)
{
    lock guard(emu::mutex);
    const cudaError_t failed = enter("cudaFuncSetAttribute");
    if (failed != cudaSuccess) {
        return failed;
    }
    if (attr == cudaFuncAttributePreferredSharedMemoryCarveout) {
        return cudaSuccess;
    }
    if (kernel == nullptr || value < 0 || (size_t)value > SHARED_BYTES_OPTIN) {
        return keep(cudaErrorInvalidValue);
    }
    shared_limits()[kernel] = (size_t)value > SHARED_BYTES ? (size_t)value : SHARED_BYTES;
    return cudaSuccess;
}

extern "C" cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *out, const void *kernel)
{
    lock guard(emu::mutex);
    const cudaError_t failed = enter("cudaFuncGetAttributes");
    if (failed != cudaSuccess) {
        return failed;
    }
    *out = cudaFuncAttributes();
    out->maxThreadsPerBlock = 1024;
    out->maxDynamicSharedSizeBytes = (int)shared_limit_of(kernel);
    out->binaryVersion = out->ptxVersion = config().major * 10 + config().minor;
    return cudaSuccess;
}
