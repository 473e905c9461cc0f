/* The emulated device: what the environment says of it, its properties, and errors.
 *
 *   QSHARD_EMULATOR_SEED        order in which threads run (default 1)
 *   QSHARD_EMULATOR_STREAMS     lazy (default), eager, mixed: see streams.cpp
 *   QSHARD_EMULATOR_EAGER=1     the same as STREAMS=eager
 *   QSHARD_EMULATOR_PROTECT=1   device memory is out of the host's reach: see memory.cpp
 *   QSHARD_EMULATOR_MEMORY      bytes of the device (default 8 GiB)
 *   QSHARD_EMULATOR_DEVICES     how many (default 1); 0: no device; -1: the driver is too old
 *   QSHARD_EMULATOR_NAME        what the card is called (default emulated)
 *   QSHARD_EMULATOR_CAPABILITY  compute capability (default 9.0)
 *   QSHARD_EMULATOR_DRIVER      the driver's CUDA version (default 13000)
 *   QSHARD_EMULATOR_FAIL=function:n   the n-th call of the function fails; a launch is
 *                               cudaLaunchKernel, creations count together as cudaStreamCreate and
 *                               cudaEventCreate
 *   QSHARD_NVTX_LOG             a file that gets the ranges: include/nvtx3/nvToolsExt.h
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "runtime.h"

namespace emu
{
namespace
{

const char *text(const char *name, const char *otherwise)
{
    const char *value = getenv(name);
    return value != nullptr && value[0] != '\0' ? value : otherwise;
}

settings read_settings()
{
    settings s = {};
    const char *streams = text("QSHARD_EMULATOR_STREAMS", "lazy");
    s.seed = strtoull(text("QSHARD_EMULATOR_SEED", "1"), nullptr, 10);
    s.memory_bytes = strtoull(text("QSHARD_EMULATOR_MEMORY", "8589934592"), nullptr, 10);
    s.devices = atoi(text("QSHARD_EMULATOR_DEVICES", "1"));
    s.driver = atoi(text("QSHARD_EMULATOR_DRIVER", "13000"));
    s.eager = strcmp(streams, "eager") == 0 || atoi(text("QSHARD_EMULATOR_EAGER", "0")) != 0;
    s.mixed = strcmp(streams, "mixed") == 0;
    s.protect = atoi(text("QSHARD_EMULATOR_PROTECT", "0")) != 0;
    if (sscanf(text("QSHARD_EMULATOR_CAPABILITY", "9.0"), "%d.%d", &s.major, &s.minor) != 2) {
        die("QSHARD_EMULATOR_CAPABILITY is not like 9.0");
    }
    const char *fail = text("QSHARD_EMULATOR_FAIL", "");
    if (fail[0] != '\0' && sscanf(fail, "%63[^:]:%ld", s.fail, &s.fail_at) != 2) {
        die("QSHARD_EMULATOR_FAIL is not like cudaMalloc:3");
    }
    return s;
}

thread_local cudaError_t last_error;
thread_local int device;
long n_failing_calls;

cudaError_t device_error()
{
    if (config().devices < 0) {
        return cudaErrorInsufficientDriver;
    }
    return config().devices == 0 ? cudaErrorNoDevice : cudaSuccess;
}

} // namespace

std::recursive_mutex mutex;

const settings &config()
{
    static const settings s = read_settings();
    return s;
}

cudaError_t keep(cudaError_t error)
{
    last_error = error != cudaSuccess ? error : last_error;
    return error;
}

cudaError_t enter(const char *function, cudaError_t injected)
{
    const cudaError_t error = device_error();
    if (error != cudaSuccess) {
        return keep(error);
    }
    const settings &s = config();
    if (s.fail[0] != '\0' && strcmp(s.fail, function) == 0 && ++n_failing_calls == s.fail_at) {
        return keep(injected);
    }
    return cudaSuccess;
}

int current_device()
{
    return device;
}

} // namespace emu

using namespace emu;

extern "C" {

cudaError_t cudaGetDeviceCount(int *count)
{
    lock guard(emu::mutex);
    *count = 0;
    const cudaError_t failed = enter("cudaGetDeviceCount");
    if (failed == cudaSuccess) {
        *count = config().devices;
    }
    return failed;
}

static cudaError_t enter_device(const char *function, int number)
{
    const cudaError_t failed = enter(function);
    if (failed != cudaSuccess) {
        return failed;
    }
    return number < 0 || number >= config().devices ? keep(cudaErrorInvalidDevice) : cudaSuccess;
}

cudaError_t cudaSetDevice(int number)
{
    lock guard(emu::mutex);
    const cudaError_t failed = enter_device("cudaSetDevice", number);
    if (failed == cudaSuccess) {
        device = number;
    }
    return failed;
}

cudaError_t cudaGetDevice(int *number)
{
    lock guard(emu::mutex);
    const cudaError_t failed = enter("cudaGetDevice");
    *number = device;
    return failed;
}

/* Which card a process means by `number`: the entry of CUDA_VISIBLE_DEVICES, as a scheduler sets it
 * for each rank. How many it sees is QSHARD_EMULATOR_DEVICES alone. */
static int physical_number(int number)
{
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    for (int i = 0; visible != NULL && i < number; i++) {
        visible = strchr(visible, ',');
        visible = visible != NULL ? visible + 1 : NULL;
    }
    return visible != NULL && *visible >= '0' && *visible <= '9' ? atoi(visible) : number;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *prop, int number)
{
    lock guard(emu::mutex);
    const cudaError_t failed = enter_device("cudaGetDeviceProperties", number);
    if (failed != cudaSuccess) {
        return failed;
    }
    *prop = cudaDeviceProp();
    snprintf(prop->name, sizeof prop->name, "%s", text("QSHARD_EMULATOR_NAME", "emulated"));
    prop->totalGlobalMem = config().memory_bytes;
    prop->sharedMemPerBlock = 48 << 10;
    prop->sharedMemPerBlockOptin = 227 << 10;
    prop->sharedMemPerMultiprocessor = 228 << 10;
    prop->regsPerBlock = prop->regsPerMultiprocessor = 65536;
    prop->warpSize = LANES;
    prop->maxThreadsPerBlock = 1024;
    prop->maxThreadsDim[0] = prop->maxThreadsDim[1] = 1024;
    prop->maxThreadsDim[2] = 64;
    prop->maxGridSize[0] = 0x7fffffff;
    prop->maxGridSize[1] = prop->maxGridSize[2] = 65535;
    prop->totalConstMem = 64 << 10;
    prop->major = config().major;
    prop->minor = config().minor;
    prop->multiProcessorCount = 4; /* few, so that grids have several rounds */
    prop->canMapHostMemory = 1;
    prop->concurrentKernels = 1;
    prop->pciBusID = number + 1;
    prop->uuid.bytes[0] = (char)(1 + physical_number(number));
    prop->asyncEngineCount = 2;
    prop->unifiedAddressing = 1;
    prop->memoryBusWidth = 5120;
    prop->l2CacheSize = 50 << 20;
    prop->maxThreadsPerMultiProcessor = 2048;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attr, int number)
{
    lock guard(emu::mutex);
    cudaDeviceProp prop;
    const cudaError_t failed = cudaGetDeviceProperties(&prop, number);
    if (failed != cudaSuccess) {
        return failed;
    }
    switch (attr) {
    case cudaDevAttrMaxThreadsPerBlock:
        *value = prop.maxThreadsPerBlock;
        break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
        *value = (int)prop.sharedMemPerBlock;
        break;
    case cudaDevAttrWarpSize:
        *value = prop.warpSize;
        break;
    case cudaDevAttrMaxRegistersPerBlock:
        *value = prop.regsPerBlock;
        break;
    case cudaDevAttrClockRate:
    case cudaDevAttrMemoryClockRate:
        *value = 1000000; /* kHz */
        break;
    case cudaDevAttrMultiProcessorCount:
        *value = prop.multiProcessorCount;
        break;
    case cudaDevAttrPciBusId:
        *value = prop.pciBusID;
        break;
    case cudaDevAttrPciDeviceId:
        *value = prop.pciDeviceID;
        break;
    case cudaDevAttrPciDomainId:
        *value = prop.pciDomainID;
        break;
    case cudaDevAttrGlobalMemoryBusWidth:
        *value = prop.memoryBusWidth;
        break;
    case cudaDevAttrL2CacheSize:
        *value = prop.l2CacheSize;
        break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
        *value = prop.maxThreadsPerMultiProcessor;
        break;
    case cudaDevAttrAsyncEngineCount:
        *value = prop.asyncEngineCount;
        break;
    case cudaDevAttrComputeCapabilityMajor:
        *value = prop.major;
        break;
    case cudaDevAttrComputeCapabilityMinor:
        *value = prop.minor;
        break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
        *value = (int)prop.sharedMemPerMultiprocessor;
        break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        *value = (int)prop.sharedMemPerBlockOptin;
        break;
    default:
        return keep(cudaErrorInvalidValue);
    }
    return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char *out, int length, int number)
{
    lock guard(emu::mutex);
    const cudaError_t failed = enter_device("cudaDeviceGetPCIBusId", number);
    if (failed == cudaSuccess) {
        snprintf(out, (size_t)length, "0000:%02X:00.0", (unsigned)number + 1);
    }
    return failed;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest)
{
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaDeviceReset(void)
{
    return cudaDeviceSynchronize();
}

cudaError_t cudaDriverGetVersion(int *version)
{
    *version = config().devices < 0 ? 0 : config().driver;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version)
{
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaGetLastError(void)
{
    const cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

cudaError_t cudaPeekAtLastError(void)
{
    return last_error;
}

struct error_text {
    cudaError_t error;
    const char *name, *text;
};

#define ERROR(error, text)                                                                         \
    {                                                                                              \
        error, #error, text                                                                        \
    }
static const error_text error_texts[] = {
    ERROR(cudaSuccess, "no error"),
    ERROR(cudaErrorInvalidValue, "invalid argument"),
    ERROR(cudaErrorMemoryAllocation, "out of memory"),
    ERROR(cudaErrorInitializationError, "initialization error"),
    ERROR(cudaErrorInvalidConfiguration, "invalid configuration argument"),
    ERROR(cudaErrorInvalidMemcpyDirection, "invalid copy direction"),
    ERROR(cudaErrorInsufficientDriver, "the driver is older than the runtime"),
    ERROR(cudaErrorNoDevice, "no device"),
    ERROR(cudaErrorInvalidDevice, "invalid device number"),
    ERROR(cudaErrorInvalidResourceHandle, "invalid resource handle"),
    ERROR(cudaErrorNotReady, "not ready"),
    ERROR(cudaErrorIllegalAddress, "illegal memory access"),
    ERROR(cudaErrorLaunchFailure, "launch failure"),
    ERROR(cudaErrorNotSupported, "not supported"),
};
#undef ERROR

const char *cudaGetErrorString(cudaError_t error)
{
    for (const error_text &e : error_texts) {
        if (e.error == error) {
            return e.text;
        }
    }
    return "unknown error";
}

const char *cudaGetErrorName(cudaError_t error)
{
    for (const error_text &e : error_texts) {
        if (e.error == error) {
            return e.name;
        }
    }
    return "cudaErrorUnknown";
}

} // extern "C"
