/* What the files behind the emulated runtime share. One lock guards everything: calls may come from
 * several threads of the program. */
#ifndef QS_EMULATOR_RUNTIME_H
#define QS_EMULATOR_RUNTIME_H

#include <stddef.h>
#include <stdint.h>

#include <functional>
#include <mutex>

#include "cuda_runtime_api.h"
#include "emulator.h"

#pragma GCC visibility push(hidden)
namespace emu
{

/* ---- settings: the environment, read once (device.cpp) ---- */

struct settings {
    uint64_t seed;
    size_t memory_bytes;
    int devices;
    int major, minor;
    int driver;
    bool eager;    /* streams run at once */
    bool mixed;    /* streams run now and then, as the seed says */
    bool protect;  /* device memory is out of the host's reach */
    char fail[64]; /* function that fails, "" for none */
    long fail_at;  /* in its so-manieth call */
};
const settings &config();

/* ---- errors (device.cpp) ---- */

using lock = std::lock_guard<std::recursive_mutex>;
extern std::recursive_mutex mutex;

/** Keep `error` for cudaGetLastError, and return it. */
cudaError_t keep(cudaError_t error);

/** What a call has to return at once: no device, or the error that was asked for. */
cudaError_t enter(const char *function, cudaError_t injected = cudaErrorUnknown);

int current_device();

/* ---- streams (streams.cpp) ---- */

/** Append work. */
void push(cudaStream_t stream, std::function<void()> work);
/** Run all that was given to the stream, and what that waits for. */
void force(cudaStream_t stream);
void force_all();
bool stream_exists(cudaStream_t stream);

/** Stands around work that touches device memory. */
class device_access
{
  public:
    device_access();
    ~device_access();
    device_access(const device_access &) = delete;
    device_access &operator=(const device_access &) = delete;
};

/* ---- memory (memory.cpp) ---- */

struct allocation {
    char *base;
    size_t bytes;
    cudaMemoryType type; /* Host: pinned */
    int device;
};

/** The allocation that `ptr` points into, or at the end of; nullptr: pageable. */
const allocation *allocation_of(const void *ptr);

/** Make all device memory accessible, or inaccessible. */
void set_access(bool accessible);

} // namespace emu
#pragma GCC visibility pop

#endif
