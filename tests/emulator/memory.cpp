/* Memory of the emulated device, and pinned memory. Both are the host's, each allocation for itself
 * and filled with 0xff (NaN, in every float format). Behind each lie canaries, which are looked at
 * when it is freed; under AddressSanitizer its red zones do that better.
 *
 * With QSHARD_EMULATOR_PROTECT=1 device memory is inaccessible but while the device works: a host
 * that reads or writes it directly gets a segmentation fault where it does so. */
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <map>
#include <memory>

#include "runtime.h"

namespace emu
{
namespace
{

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t CANARY_BYTES = 0;
#else
constexpr size_t CANARY_BYTES = 256;
#endif
constexpr unsigned char POISON = 0xff, CANARY = 0xa5;
constexpr size_t ALIGNMENT = 256, PAGE = 4096, GRANULE = 512;
/* Filling more than this costs too much where somebody takes the whole device. */
constexpr size_t POISON_MOST = (size_t)1 << 30;

struct registry {
    std::map<uintptr_t, allocation> allocations; /* by address */
    std::map<int, size_t> used;                  /* device -> bytes */
};

registry &all()
{
    static auto *r = new registry;
    return *r;
}

size_t round_up(size_t bytes, size_t multiple)
{
    return (bytes + multiple - 1) / multiple * multiple;
}

char *obtain(size_t bytes, bool whole_pages)
{
    void *at = nullptr;
    const size_t wanted = bytes + CANARY_BYTES;
    if (posix_memalign(&at, whole_pages ? PAGE : ALIGNMENT,
                       whole_pages ? round_up(wanted, PAGE) : wanted) != 0) {
        return nullptr;
    }
    memset(at, POISON, bytes < POISON_MOST ? bytes : POISON_MOST);
    memset((char *)at + bytes, CANARY, CANARY_BYTES);
    return (char *)at;
}

/** Only whole pages can be protected, so that the canaries have to be looked at before. */
bool is_protected(const allocation &a)
{
    return config().protect && a.type == cudaMemoryTypeDevice;
}

void protect(const allocation &a, bool accessible)
{
    if (mprotect(a.base, round_up(a.bytes + CANARY_BYTES, PAGE),
                 accessible ? PROT_READ | PROT_WRITE : PROT_NONE) != 0) {
        die("mprotect: %s", strerror(errno));
    }
}

cudaError_t allocate(void **out, size_t bytes, cudaMemoryType type)
{
    *out = nullptr;
    if (bytes == 0) {
        return cudaSuccess;
    }
    const int device = current_device();
    const bool is_device = type == cudaMemoryTypeDevice;
    size_t &used = all().used[device];
    const size_t taken = round_up(bytes, GRANULE);
    if (is_device && (taken < bytes || taken > config().memory_bytes - used)) {
        return keep(cudaErrorMemoryAllocation);
    }
    const bool pages = is_device && config().protect;
    char *base = obtain(bytes, pages);
    if (base == nullptr) {
        return keep(cudaErrorMemoryAllocation);
    }
    used += is_device ? taken : 0;
    const allocation a = {base, bytes, type, device};
    all().allocations[(uintptr_t)base] = a;
    if (pages) {
        protect(a, false);
    }
    *out = base;
    return cudaSuccess;
}

void check_canary(const allocation &a)
{
    for (size_t i = 0; i < CANARY_BYTES; i++) {
        if ((unsigned char)a.base[a.bytes + i] != CANARY) {
            die("somebody wrote %zu bytes past the end of an allocation of %zu bytes", i, a.bytes);
        }
    }
}

cudaError_t release(void *ptr, cudaMemoryType type)
{
    if (ptr == nullptr) {
        return cudaSuccess;
    }
    const auto found = all().allocations.find((uintptr_t)ptr);
    if (found == all().allocations.end() || found->second.type != type) {
        return keep(cudaErrorInvalidValue);
    }
    force_all(); /* as CUDA, which waits for the device before it frees */
    const allocation a = found->second;
    if (is_protected(a)) {
        protect(a, true);
    }
    check_canary(a);
    if (type == cudaMemoryTypeDevice) {
        all().used[a.device] -= round_up(a.bytes, GRANULE);
    }
    all().allocations.erase(found);
    free(a.base);
    return cudaSuccess;
}

/** True if [ptr, ptr + bytes) leaves the allocation that it begins in. */
bool overruns(const allocation *a, const void *ptr, size_t bytes)
{
    return a != nullptr && bytes > a->bytes - (size_t)((const char *)ptr - a->base);
}

bool is_device(const allocation *a)
{
    return a != nullptr && a->type == cudaMemoryTypeDevice;
}

bool kind_fits(cudaMemcpyKind kind, bool to_device, bool from_device)
{
    switch (kind) {
    case cudaMemcpyHostToHost:
        return !to_device && !from_device;
    case cudaMemcpyHostToDevice:
        return to_device && !from_device;
    case cudaMemcpyDeviceToHost:
        return !to_device && from_device;
    case cudaMemcpyDeviceToDevice:
        return to_device && from_device;
    default:
        return kind == cudaMemcpyDefault;
    }
}

cudaError_t copy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream,
                 bool wait)
{
    if (bytes == 0) {
        return cudaSuccess;
    }
    const allocation *target = allocation_of(to), *source = allocation_of(from);
    if (to == nullptr || from == nullptr || overruns(target, to, bytes) ||
        overruns(source, from, bytes)) {
        return keep(cudaErrorInvalidValue);
    }
    if (!kind_fits(kind, is_device(target), is_device(source))) {
        return keep(cudaErrorInvalidMemcpyDirection);
    }
    if (!stream_exists(stream)) {
        return keep(cudaErrorInvalidResourceHandle);
    }
    if (source == nullptr && target != nullptr && !wait) {
        /* Pageable memory may be reused when the call returns: it is read now. */
        const std::shared_ptr<char> kept((char *)malloc(bytes), free);
        if (!kept) {
            return keep(cudaErrorMemoryAllocation);
        }
        memcpy(kept.get(), from, bytes);
        push(stream, [to, kept, bytes] { memcpy(to, kept.get(), bytes); });
        return cudaSuccess;
    }
    push(stream, [to, from, bytes] { memmove(to, from, bytes); });
    if (wait || target == nullptr) {
        force(stream); /* pageable targets have arrived when the call returns */
    }
    return cudaSuccess;
}

cudaError_t set(void *ptr, int value, size_t bytes, cudaStream_t stream, bool wait)
{
    const allocation *a = allocation_of(ptr);
    if (bytes == 0) {
        return cudaSuccess;
    }
    if (a == nullptr || overruns(a, ptr, bytes)) {
        return keep(cudaErrorInvalidValue);
    }
    if (!stream_exists(stream)) {
        return keep(cudaErrorInvalidResourceHandle);
    }
    push(stream, [ptr, value, bytes] { memset(ptr, value, bytes); });
    if (wait) {
        force(stream);
    }
    return cudaSuccess;
}

} // namespace

const allocation *allocation_of(const void *ptr)
{
    auto found = all().allocations.upper_bound((uintptr_t)ptr);
    if (found == all().allocations.begin()) {
        return nullptr;
    }
    const allocation &a = (--found)->second;
    return (const char *)ptr <= a.base + a.bytes ? &a : nullptr;
}

void set_access(bool accessible)
{
    if (!config().protect) {
        return;
    }
    for (const auto &entry : all().allocations) {
        if (is_protected(entry.second)) {
            protect(entry.second, accessible);
        }
    }
}

} // namespace emu

using namespace emu;

extern "C" {

cudaError_t cudaMalloc(void **out, size_t bytes)
{
    lock guard(emu::mutex);
    const cudaError_t failed = enter("cudaMalloc", cudaErrorMemoryAllocation);
    return failed != cudaSuccess ? failed : allocate(out, bytes, cudaMemoryTypeDevice);
}

cudaError_t cudaFree(void *ptr)
{
    lock guard(emu::mutex);
    const cudaError_t failed = enter("cudaFree");
    return failed != cudaSuccess ? failed : release(ptr, cudaMemoryTypeDevice);
}

cudaError_t cudaHostAlloc(void **out, size_t bytes, unsigned int flags)
{
    (void)flags;
    lock guard(emu::mutex);
    const cudaError_t failed = enter("cudaHostAlloc", cudaErrorMemoryAllocation);
    return failed != cudaSuccess ? failed : allocate(out, bytes, cudaMemoryTypeHost);
}

cudaError_t cudaMallocHost(void **out, size_t bytes)
{
    lock guard(emu::mutex);
    const cudaError_t failed = enter("cudaMallocHost", cudaErrorMemoryAllocation);
    return failed != cudaSuccess ? failed : allocate(out, bytes, cudaMemoryTypeHost);
}

cudaError_t cudaFreeHost(void *ptr)
{
    lock guard(emu::mutex);
    const cudaError_t failed = enter("cudaFreeHost");
    return failed != cudaSuccess ? failed : release(ptr, cudaMemoryTypeHost);
}

cudaError_t cudaHostGetDevicePointer(void **out, void *host, unsigned int flags)
{
    (void)flags;
    lock guard(emu::mutex);
    const allocation *a = allocation_of(host);
    if (a == nullptr || a->type != cudaMemoryTypeHost) {
        return keep(cudaErrorInvalidValue);
    }
    *out = host;
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes)
{
    lock guard(emu::mutex);
    const cudaError_t failed = enter("cudaMemGetInfo");
    if (failed != cudaSuccess) {
        return failed;
    }
    *total_bytes = config().memory_bytes;
    *free_bytes = *total_bytes - all().used[current_device()];
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *out, const void *ptr)
{
    lock guard(emu::mutex);
    const allocation *a = allocation_of(ptr);
    *out = cudaPointerAttributes();
    out->device = a != nullptr ? a->device : -2;
    out->type = a != nullptr ? a->type : cudaMemoryTypeUnregistered;
    out->devicePointer = a != nullptr ? const_cast<void *>(ptr) : nullptr;
    out->hostPointer = is_device(a) ? nullptr : const_cast<void *>(ptr);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream)
{
    lock guard(emu::mutex);
    const cudaError_t failed = enter("cudaMemcpyAsync");
    return failed != cudaSuccess ? failed : copy(to, from, bytes, kind, stream, false);
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind)
{
    lock guard(emu::mutex);
    const cudaError_t failed = enter("cudaMemcpy");
    return failed != cudaSuccess ? failed : copy(to, from, bytes, kind, nullptr, true);
}

cudaError_t cudaMemsetAsync(void *ptr, int value, size_t bytes, cudaStream_t stream)
{
    lock guard(emu::mutex);
    const cudaError_t failed = enter("cudaMemsetAsync");
    return failed != cudaSuccess ? failed : set(ptr, value, bytes, stream, false);
}

/** Rows of `width` bytes. Device memory only: nothing else is wanted. */
static cudaError_t check_rows(const void *ptr, size_t pitch, size_t width, size_t height)
{
    const allocation *a = allocation_of(ptr);
    return !is_device(a) || pitch < width || overruns(a, ptr, pitch * (height - 1) + width)
               ? keep(cudaErrorInvalidValue)
               : cudaSuccess;
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch,
                              size_t width, size_t height, cudaMemcpyKind kind, cudaStream_t stream)
{
    lock guard(emu::mutex);
    cudaError_t failed = enter("cudaMemcpy2DAsync");
    if (failed != cudaSuccess || width == 0 || height == 0) {
        return failed;
    }
    if (!kind_fits(kind, true, true)) {
        return keep(cudaErrorInvalidMemcpyDirection);
    }
    failed = check_rows(to, to_pitch, width, height);
    failed = failed == cudaSuccess ? check_rows(from, from_pitch, width, height) : failed;
    if (failed != cudaSuccess || !stream_exists(stream)) {
        return keep(failed != cudaSuccess ? failed : cudaErrorInvalidResourceHandle);
    }
    push(stream, [=] {
        for (size_t row = 0; row < height; row++) {
            memmove((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width);
        }
    });
    return cudaSuccess;
}

cudaError_t cudaMemset2DAsync(void *ptr, size_t pitch, int value, size_t width, size_t height,
                              cudaStream_t stream)
{
    lock guard(emu::mutex);
    cudaError_t failed = enter("cudaMemset2DAsync");
    if (failed != cudaSuccess || width == 0 || height == 0) {
        return failed;
    }
    failed = check_rows(ptr, pitch, width, height);
    if (failed != cudaSuccess || !stream_exists(stream)) {
        return keep(failed != cudaSuccess ? failed : cudaErrorInvalidResourceHandle);
    }
    push(stream, [=] {
        for (size_t row = 0; row < height; row++) {
            memset((char *)ptr + row * pitch, value, width);
        }
    });
    return cudaSuccess;
}

cudaError_t cudaMemset(void *ptr, int value, size_t bytes)
{
    lock guard(emu::mutex);
    const cudaError_t failed = enter("cudaMemset");
    return failed != cudaSuccess ? failed : set(ptr, value, bytes, nullptr, true);
}

} // extern "C"
