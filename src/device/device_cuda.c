/* An NVIDIA GPU as a device: memory, queues that are streams, marks that are events.
 *
 * Memory comes from one arena once qs_device_reserve was called, from cudaMalloc before. Every
 * block is known by its address, so that what is freed can be uncounted. Events are a ring of a
 * queue: a mark is a number, and one that has left the ring is answered by the oldest mark still in
 * it, which lies behind it and so waits for it too. */
#include "device/device_cuda.h"

#include <cuda_profiler_api.h>
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#if __has_include(<nvtx3/nvToolsExt.h>)
#include <nvtx3/nvToolsExt.h>
#define HAVE_NVTX 1
#else
#define HAVE_NVTX 0
#endif

#include "base/timer.h"
#include "device/arena.h"
#include "device/cuda_archs.h"
#include "device/cuda_status.h"

#define GIB (1024.0 * 1024.0 * 1024.0)

enum { EVENTS = 64, LEAST_CAPABILITY = 80 };

/* Room for rounding blocks up to the arena's alignment, which plans need not know: 16,384 blocks.
 */
static const size_t ARENA_SLACK = (size_t)4 << 20;

static const double WATCH_PERIOD_S = 0.05, SPIN_S = 1e-3;

typedef struct {
    qs_device base;
    int index;             /* CUDA's number of the device */
    cudaStream_t stream;   /* for the device's own work: zeroing */
    pthread_mutex_t mutex; /* of everything below */
    qs_arena blocks;       /* of the device, inside and outside of the arena */
    qs_arena host_blocks;  /* pinned */
    char *arena;           /* NULL: none */
    size_t arena_bytes;
    bool freed; /* a block of the arena was freed since the device was last waited for */
} cuda_device;

typedef struct {
    qs_queue base;
    cudaStream_t stream;
    cudaEvent_t events[EVENTS]; /* mark n is at n % EVENTS */
    uint64_t marks;             /* recorded so far: the newest mark's number */
    qs_status failed;           /* of a record, which cannot say so itself */
} cuda_queue;

static const qs_device_ops cuda_ops;

/* A thread has a current device, which allocations and launches go to. */
static qs_status make_current(const cuda_device *device)
{
    static _Thread_local int current = -1;
    if (current != device->index) {
        QS_TRY(QS_CUDA(cudaSetDevice(device->index)));
        current = device->index;
    }
    return QS_OK;
}

/* ---- what the machine has ---- */

static int capability_of(int index)
{
    int major = 0, minor = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index) != cudaSuccess) {
        (void)cudaGetLastError();
        return 0;
    }
    return 10 * major + minor;
}

static bool is_usable(int index)
{
    const int capability = capability_of(index);
    return capability >= LEAST_CAPABILITY &&
           qs_cuda_archs_cover(QSHARD_CUDA_ARCHITECTURES, capability / 10, capability % 10);
}

static void versions(int *driver, int *runtime)
{
    *driver = *runtime = 0;
    (void)cudaDriverGetVersion(driver); /* 0 without a driver */
    (void)cudaRuntimeGetVersion(runtime);
    (void)cudaGetLastError();
}

/* One line on why nothing can be used, in the order in which things can be missing. */
static void say_why(char *why, size_t capacity, cudaError_t error, int count)
{
    int driver, runtime;
    versions(&driver, &runtime);
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    if (driver == 0) {
        snprintf(why, capacity,
                 "no NVIDIA driver is loaded (libcuda.so.1); CUDA %d.%d needs one of version %s or "
                 "later",
                 runtime / 1000, runtime % 1000 / 10, runtime >= 13000 ? "580" : "525");
    } else if (driver / 1000 < runtime / 1000) {
        snprintf(why, capacity,
                 "the NVIDIA driver is too old: it is for CUDA %d.%d, this plugin for CUDA %d.%d; "
                 "update the driver, or build with CUDA %d",
                 driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10,
                 driver / 1000);
    } else if (error == cudaErrorNoDevice || (error == cudaSuccess && count == 0)) {
        snprintf(why, capacity, "no GPU is visible%s%s%s", visible ? " (CUDA_VISIBLE_DEVICES=" : "",
                 visible ? visible : "", visible ? ")" : "");
    } else if (error != cudaSuccess) {
        snprintf(why, capacity, "the GPUs cannot be asked for: %s (%s)", cudaGetErrorString(error),
                 cudaGetErrorName(error));
    } else {
        const int capability = capability_of(0);
        snprintf(why, capacity,
                 "no GPU can be used: device 0 is sm_%d; sm_80 (Ampere) or later is needed, and "
                 "this plugin has code for %s",
                 capability, QSHARD_CUDA_ARCHITECTURES);
    }
}

int qs_device_cuda_probe(char *why, size_t capacity)
{
    int driver, runtime, count = 0, usable = 0;
    versions(&driver, &runtime);
    cudaError_t error = cudaErrorInsufficientDriver;
    if (driver / 1000 >= runtime / 1000) {
        error = cudaGetDeviceCount(&count);
        (void)cudaGetLastError();
    }
    for (int i = 0; error == cudaSuccess && i < count; i++) {
        usable += is_usable(i) ? 1 : 0;
    }
    if (usable == 0) {
        say_why(why, capacity, error, count);
    }
    return usable;
}

/* CUDA's number of the `wanted`-th usable device; -1 if there are fewer. */
static int number_of(int wanted)
{
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess) {
        (void)cudaGetLastError();
        return -1;
    }
    for (int i = 0; i < count; i++) {
        if (is_usable(i) && wanted-- == 0) {
            return i;
        }
    }
    return -1;
}

qs_status qs_device_cuda_card_id(int index, uint8_t id[QS_CARD_ID_BYTES])
{
    struct cudaDeviceProp properties;
    const int number = number_of(index);
    if (number < 0) {
        return QS_FAIL(QS_ERR_ENVIRONMENT, "GPU %d was asked for, but there are fewer", index);
    }
    QS_TRY(QS_CUDA(cudaGetDeviceProperties(&properties, number)));
    memcpy(id, properties.uuid.bytes, QS_CARD_ID_BYTES);
    return QS_OK;
}

static qs_status describe(cuda_device *device)
{
    struct cudaDeviceProp properties;
    char card[112], libraries[64];
    int driver, runtime;
    QS_TRY(QS_CUDA(cudaGetDeviceProperties(&properties, device->index)));
    versions(&driver, &runtime);
    snprintf(card, sizeof card, "%.64s, sm_%d%d, %d SMs", properties.name, properties.major,
             properties.minor, properties.multiProcessorCount);
    snprintf(libraries, sizeof libraries, "driver %d.%d, runtime %d.%d", driver / 1000,
             driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
    snprintf(device->base.description, sizeof device->base.description, "%s, %.1f GiB; %s", card,
             (double)properties.totalGlobalMem / GIB, libraries);
    snprintf(device->base.traits, sizeof device->base.traits, "%s; %s", card, libraries);
    return QS_OK;
}

static void device_close(qs_device *base);

qs_status qs_device_cuda_open(qs_device **out, int index)
{
    *out = NULL;
    cuda_device *device = calloc(1, sizeof *device);
    if (device == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "memory: a device cannot be opened");
    }
    device->base.ops = &cuda_ops;
    device->index = number_of(index);
    pthread_mutex_init(&device->mutex, NULL);
    qs_status st = QS_OK;
    if (device->index < 0) {
        QS_GOTO(QS_FAIL(QS_ERR_ENVIRONMENT, "GPU %d was asked for, but there are fewer", index));
    }
    QS_GOTO(make_current(device));
    QS_GOTO(describe(device));
    QS_GOTO(QS_CUDA(cudaStreamCreateWithFlags(&device->stream, cudaStreamNonBlocking)));
    *out = &device->base;
    return QS_OK;
done:
    device_close(&device->base);
    return st;
}

/* ---- memory ---- */

static void memory(const qs_device *base, size_t *free_bytes, size_t *total_bytes)
{
    cuda_device *device = (cuda_device *)(uintptr_t)base;
    if (make_current(device) != QS_OK || cudaMemGetInfo(free_bytes, total_bytes) != cudaSuccess) {
        (void)cudaGetLastError();
        *free_bytes = *total_bytes = 0;
    }
    pthread_mutex_lock(&device->mutex);
    if (device->arena != NULL) {
        uint64_t largest, gaps;
        qs_arena_gaps(&device->blocks, (uintptr_t)device->arena, device->arena_bytes, &largest,
                      &gaps);
        *free_bytes = (size_t)gaps; /* the rest of the card is not for qs_device_alloc any more */
    }
    pthread_mutex_unlock(&device->mutex);
}

static qs_status no_memory(cuda_device *device, size_t bytes, const char *what)
{
    size_t free_bytes = 0, total_bytes = 0;
    if (cudaMemGetInfo(&free_bytes, &total_bytes) != cudaSuccess) {
        (void)cudaGetLastError();
    }
    return QS_FAIL(QS_ERR_MEMORY,
                   "memory: %.3f GiB (%zu bytes) for %s cannot be allocated on GPU %d: %.3f of "
                   "%.3f GiB are free; use more ranks, a smaller micro_batch or seq_len, or "
                   "recompute: full, or end what else uses this GPU (nvidia-smi)",
                   (double)bytes / GIB, bytes, what, device->index, (double)free_bytes / GIB,
                   (double)total_bytes / GIB);
}

static qs_status take(cuda_device *device, void **out, size_t bytes, const char *what)
{
    const cudaError_t error = cudaMalloc(out, bytes);
    if (error == cudaErrorMemoryAllocation) {
        *out = NULL;
        (void)cudaGetLastError();
        return no_memory(device, bytes, what);
    }
    return QS_CUDA(error);
}

static qs_status reserve(qs_device *base, size_t bytes)
{
    cuda_device *device = (cuda_device *)base;
    if (device->arena != NULL) {
        return QS_FAIL(QS_ERR_BUG, "the memory of a device was reserved twice");
    }
    size_t whole;
    if (!qs_size_mul_add(bytes, 1, ARENA_SLACK + QS_ARENA_ALIGNMENT, &whole)) {
        return QS_FAIL(QS_ERR_BUG, "%zu bytes of a device were asked for", bytes);
    }
    QS_TRY(make_current(device));
    void *arena = NULL;
    const size_t rounded = (size_t)qs_arena_round(bytes) + ARENA_SLACK;
    QS_TRY(take(device, &arena, rounded, "everything this rank holds"));
    device->arena = arena;
    device->arena_bytes = rounded;
    return QS_OK;
}

static qs_status place_in_arena(cuda_device *device, void **out, size_t bytes, qs_mem_class kind)
{
    const uint64_t base = (uintptr_t)device->arena;
    uint64_t at = 0, largest = 0, gaps = 0;
    if (!qs_arena_fit(&device->blocks, base, device->arena_bytes, bytes, &at)) {
        qs_arena_gaps(&device->blocks, base, device->arena_bytes, &largest, &gaps);
        return QS_FAIL(QS_ERR_MEMORY,
                       "memory: %zu bytes for %s do not fit into what was reserved: %zu bytes, of "
                       "which %llu are free, %llu in one piece",
                       bytes, qs_mem_class_name(kind), device->arena_bytes,
                       (unsigned long long)gaps, (unsigned long long)largest);
    }
    *out = device->arena + (at - base);
    if (device->freed) { /* work that was given to a queue may still use what was freed */
        QS_TRY(QS_CUDA_WORK(cudaDeviceSynchronize()));
        device->freed = false;
    }
    return QS_OK;
}

static bool in_arena(const cuda_device *device, const void *ptr)
{
    const uintptr_t at = (uintptr_t)ptr, base = (uintptr_t)device->arena;
    return device->arena != NULL && at >= base && at - base < device->arena_bytes;
}

static qs_status place(cuda_device *device, void **out, size_t bytes, qs_mem_class kind)
{
    if (!qs_arena_make_room(&device->blocks)) {
        return QS_FAIL(QS_ERR_MEMORY, "memory: the list of a device's blocks cannot grow");
    }
    QS_TRY(device->arena != NULL ? place_in_arena(device, out, bytes, kind)
                                 : take(device, out, bytes, qs_mem_class_name(kind)));
    qs_arena_add(&device->blocks, (uintptr_t)*out, bytes, (int)kind);
    return QS_OK;
}

static void device_free(qs_device *base, void *ptr)
{
    cuda_device *device = (cuda_device *)base;
    qs_arena_block block;
    pthread_mutex_lock(&device->mutex);
    const bool known = qs_arena_remove(&device->blocks, (uintptr_t)ptr, &block);
    const bool inside = in_arena(device, ptr);
    device->freed = device->freed || inside;
    pthread_mutex_unlock(&device->mutex);
    if (!known) {
        fprintf(stderr, "qs_device_free: %p is not a block of this device\n", ptr);
        abort();
    }
    qs_mem_note(QS_MEM_DEVICE, (qs_mem_class)block.kind, -(ptrdiff_t)block.bytes);
    if (!inside && make_current(device) == QS_OK && cudaFree(ptr) != cudaSuccess) {
        (void)cudaGetLastError(); /* an error of earlier work; who waits for that is told */
    }
}

static qs_status device_alloc(qs_device *base, void **out, size_t bytes, qs_mem_class kind)
{
    cuda_device *device = (cuda_device *)base;
    *out = NULL;
    if (bytes == 0) {
        return QS_OK;
    }
    QS_TRY(make_current(device));
    pthread_mutex_lock(&device->mutex);
    qs_status st = place(device, out, bytes, kind);
    pthread_mutex_unlock(&device->mutex);
    if (st != QS_OK) {
        *out = NULL;
        return st;
    }
    qs_mem_note(QS_MEM_DEVICE, kind, (ptrdiff_t)bytes);
    st = QS_CUDA(cudaMemsetAsync(*out, 0, bytes, device->stream));
    if (st == QS_OK) {
        st = QS_CUDA_WORK(cudaStreamSynchronize(device->stream));
    }
    if (st != QS_OK) {
        device_free(base, *out);
        *out = NULL;
    }
    return st;
}

/* Portable: for every thread's current device. Under unified addressing, which every supported card
 * has on 64-bit Linux, kernels read it at the same address. */
static qs_status host_alloc(qs_device *base, void **out, size_t bytes, qs_mem_class kind)
{
    cuda_device *device = (cuda_device *)base;
    *out = NULL;
    if (bytes == 0) {
        return QS_OK;
    }
    QS_TRY(make_current(device));
    void *ptr = NULL;
    const cudaError_t error =
        cudaHostAlloc(&ptr, bytes, cudaHostAllocPortable | cudaHostAllocMapped);
    if (error == cudaErrorMemoryAllocation) {
        (void)cudaGetLastError();
        return QS_FAIL(QS_ERR_MEMORY,
                       "memory: %zu bytes of pinned host memory for %s cannot be allocated; is "
                       "the host's memory, or its limit for locked memory, used up?",
                       bytes, qs_mem_class_name(kind));
    }
    QS_TRY(QS_CUDA(error));
    memset(ptr, 0, bytes);
    pthread_mutex_lock(&device->mutex);
    const bool room = qs_arena_make_room(&device->host_blocks);
    if (room) {
        qs_arena_add(&device->host_blocks, (uintptr_t)ptr, bytes, (int)kind);
    }
    pthread_mutex_unlock(&device->mutex);
    if (!room) {
        (void)cudaFreeHost(ptr);
        return QS_FAIL(QS_ERR_MEMORY, "memory: the list of pinned blocks cannot grow");
    }
    qs_mem_note(QS_MEM_HOST, kind, (ptrdiff_t)bytes);
    *out = ptr;
    return QS_OK;
}

static void host_free(qs_device *base, void *ptr)
{
    cuda_device *device = (cuda_device *)base;
    qs_arena_block block;
    pthread_mutex_lock(&device->mutex);
    const bool known = qs_arena_remove(&device->host_blocks, (uintptr_t)ptr, &block);
    pthread_mutex_unlock(&device->mutex);
    if (!known) {
        fprintf(stderr, "qs_device_host_free: %p is not pinned memory of this device\n", ptr);
        abort();
    }
    qs_mem_note(QS_MEM_HOST, (qs_mem_class)block.kind, -(ptrdiff_t)block.bytes);
    if (make_current(device) == QS_OK && cudaFreeHost(ptr) != cudaSuccess) {
        (void)cudaGetLastError();
    }
}

static void device_close(qs_device *base)
{
    cuda_device *device = (cuda_device *)base;
    while (device->blocks.count > 0) {
        device_free(base, (void *)(uintptr_t)device->blocks.blocks[0].at);
    }
    while (device->host_blocks.count > 0) {
        host_free(base, (void *)(uintptr_t)device->host_blocks.blocks[0].at);
    }
    if (device->arena != NULL) {
        (void)cudaFree(device->arena);
    }
    if (device->stream != NULL) {
        (void)cudaStreamDestroy(device->stream);
    }
    (void)cudaGetLastError();
    qs_arena_clear(&device->blocks);
    qs_arena_clear(&device->host_blocks);
    pthread_mutex_destroy(&device->mutex);
    free(device);
}

/* ---- queues ---- */

static void queue_destroy(qs_queue *base)
{
    cuda_queue *queue = (cuda_queue *)base;
    for (int i = 0; i < EVENTS; i++) {
        if (queue->events[i] != NULL) {
            (void)cudaEventDestroy(queue->events[i]);
        }
    }
    if (queue->stream != NULL) {
        (void)cudaStreamDestroy(queue->stream); /* what is under way still runs to its end */
    }
    (void)cudaGetLastError();
    free(queue);
}

/* Non-blocking: the default stream, which libraries use, orders nothing against it. */
static qs_status queue_create(qs_device *device, qs_queue **out, int threads)
{
    (void)threads;
    QS_TRY(make_current((cuda_device *)device));
    cuda_queue *queue = calloc(1, sizeof *queue);
    if (queue == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "memory: a queue cannot be allocated");
    }
    qs_status st = QS_OK;
    queue->base = (qs_queue){.ops = &cuda_ops, .device = device};
    QS_GOTO(QS_CUDA(cudaStreamCreateWithFlags(&queue->stream, cudaStreamNonBlocking)));
    for (int i = 0; i < EVENTS; i++) {
        QS_GOTO(QS_CUDA(cudaEventCreateWithFlags(&queue->events[i], cudaEventDisableTiming)));
    }
    *out = &queue->base;
    return QS_OK;
done:
    queue_destroy(&queue->base);
    return st;
}

/* Asked for before every launch: the place to see that the launch goes to the right device. */
static void *queue_native(const qs_queue *base)
{
    (void)make_current((const cuda_device *)base->device);
    return (void *)((const cuda_queue *)base)->stream;
}

static qs_status zero(qs_queue *base, void *ptr, size_t bytes)
{
    cuda_queue *queue = (cuda_queue *)base;
    QS_TRY(make_current((cuda_device *)base->device));
    return QS_CUDA(cudaMemsetAsync(ptr, 0, bytes, queue->stream));
}

static bool is_watched(const qs_device *device)
{
    for (int i = 0; i < QS_DEVICE_WATCHES_MAX; i++) {
        if (device->watches[i].watch != NULL) {
            return true;
        }
    }
    return false;
}

static qs_status ask_watches(const qs_device *device)
{
    for (int i = 0; i < QS_DEVICE_WATCHES_MAX; i++) {
        if (device->watches[i].watch != NULL) {
            QS_TRY(device->watches[i].watch(device->watches[i].ctx));
        }
    }
    return QS_OK;
}

/* What NCCL has under way never ends when a peer is lost, so whoever watches over it is asked
 * between looks; the first millisecond spins, since most waits are short. */
static qs_status watched_wait(const cuda_queue *queue, cudaEvent_t event)
{
    const qs_device *device = queue->base.device;
    const struct timespec pause = {.tv_nsec = 20000};
    const double begun_s = qs_time_s();
    double asked_s = begun_s;
    for (;;) {
        const cudaError_t error =
            event != NULL ? cudaEventQuery(event) : cudaStreamQuery(queue->stream);
        if (error != cudaErrorNotReady) {
            return QS_CUDA_WORK(error);
        }
        (void)cudaGetLastError(); /* "not ready" is kept there like an error */
        const double now_s = qs_time_s();
        if (now_s - asked_s > WATCH_PERIOD_S) {
            asked_s = now_s;
            QS_TRY(ask_watches(device));
        }
        if (now_s - begun_s > SPIN_S) {
            (void)nanosleep(&pause, NULL);
        }
    }
}

/* The host waits for `event`, or for all of the queue if it is NULL. */
static qs_status host_wait(const cuda_queue *queue, cudaEvent_t event)
{
    if (is_watched(queue->base.device)) {
        return watched_wait(queue, event);
    }
    return QS_CUDA_WORK(event != NULL ? cudaEventSynchronize(event)
                                      : cudaStreamSynchronize(queue->stream));
}

static qs_status wait_empty(qs_queue *base)
{
    const cuda_queue *queue = (const cuda_queue *)base;
    QS_TRY(host_wait(queue, NULL));
    return queue->failed;
}

static bool is_pageable(const void *ptr)
{
    struct cudaPointerAttributes attributes;
    if (cudaPointerGetAttributes(&attributes, ptr) != cudaSuccess) {
        (void)cudaGetLastError();
        return true;
    }
    return attributes.type == cudaMemoryTypeUnregistered;
}

/* For pageable memory CUDA promises nothing about when the call returns ("might be synchronous"),
 * so the host waits. What should be asynchronous uses pinned memory. Where there are watches the
 * host waits before as well: the call itself would stand behind what never ends, and ask nobody. */
static qs_status copy(qs_queue *base, void *to, const void *from, size_t bytes)
{
    cuda_queue *queue = (cuda_queue *)base;
    QS_TRY(make_current((cuda_device *)base->device));
    const bool pageable = is_pageable(to) || is_pageable(from);
    if (pageable && is_watched(base->device)) {
        QS_TRY(watched_wait(queue, NULL));
    }
    QS_TRY(QS_CUDA(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, queue->stream)));
    return pageable ? host_wait(queue, NULL) : QS_OK;
}

static uint64_t record(qs_queue *base)
{
    cuda_queue *queue = (cuda_queue *)base;
    (void)make_current((cuda_device *)base->device);
    queue->marks++;
    const qs_status st =
        QS_CUDA(cudaEventRecord(queue->events[queue->marks % EVENTS], queue->stream));
    if (queue->failed == QS_OK) {
        queue->failed = st;
    }
    return queue->marks;
}

/* The event of mark `number`, or of the oldest mark behind it that the ring still has. */
static cudaEvent_t event_of(const cuda_queue *queue, uint64_t number)
{
    const uint64_t oldest = queue->marks >= EVENTS ? queue->marks - EVENTS + 1 : 1;
    return queue->events[(number > oldest ? number : oldest) % EVENTS];
}

static qs_status wait_for(qs_queue *base, uint64_t number)
{
    const cuda_queue *queue = (const cuda_queue *)base;
    QS_TRY(host_wait(queue, event_of(queue, number)));
    return queue->failed;
}

static qs_status after(qs_queue *base, qs_event event)
{
    cuda_queue *queue = (cuda_queue *)base;
    const cuda_queue *other = (const cuda_queue *)event.queue;
    QS_TRY(other->failed);
    QS_TRY(make_current((cuda_device *)base->device));
    return QS_CUDA(cudaStreamWaitEvent(queue->stream, event_of(other, event.number), 0));
}

/* ---- profilers ---- */

static void span_begin(qs_queue *base, const char *name)
{
    (void)base;
#if HAVE_NVTX
    nvtxRangePushA(name);
#else
    (void)name;
#endif
}

static void span_end(qs_queue *base)
{
    (void)base;
#if HAVE_NVTX
    nvtxRangePop();
#endif
}

static void profile(qs_device *base, bool on)
{
    (void)base;
    (void)(on ? cudaProfilerStart() : cudaProfilerStop());
    (void)cudaGetLastError();
}

static const qs_device_ops cuda_ops = {
    .name = "cuda",
    .close = device_close,
    .memory = memory,
    .reserve = reserve,
    .alloc = device_alloc,
    .free = device_free,
    .host_alloc = host_alloc,
    .host_free = host_free,
    .queue_create = queue_create,
    .queue_destroy = queue_destroy,
    .queue_native = queue_native,
    .copy = copy,
    .zero = zero,
    .wait = wait_empty,
    .record = record,
    .wait_for = wait_for,
    .after = after,
    .span_begin = span_begin,
    .span_end = span_end,
    .profile = profile,
};
