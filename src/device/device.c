/* The calls of device.h, passed on to the table of the device or queue at hand. */
#include "device/device_impl.h"

#include <stdarg.h>
#include <stdio.h>

#include "base/watch.h"

qs_device *qs_device_cpu(void)
{
    static qs_device cpu = {.ops = &qs_device_cpu_ops, .description = "cpu"};
    return &cpu;
}

void qs_device_close(qs_device *device)
{
    if (device != NULL && device->ops->close != NULL) {
        device->ops->close(device);
    }
}

const char *qs_device_name(const qs_device *device)
{
    return device->ops->name;
}

bool qs_device_is_host(const qs_device *device)
{
    return device->ops->is_host;
}

const char *qs_device_description(const qs_device *device)
{
    return device->description;
}

const char *qs_device_traits(const qs_device *device)
{
    return device->traits;
}

void qs_device_memory(const qs_device *device, size_t *free_bytes, size_t *total_bytes)
{
    *free_bytes = *total_bytes = 0;
    if (device->ops->memory != NULL) {
        device->ops->memory(device, free_bytes, total_bytes);
    }
}

qs_status qs_device_reserve(qs_device *device, size_t bytes)
{
    return device->ops->reserve != NULL ? device->ops->reserve(device, bytes) : QS_OK;
}

qs_status qs_device_alloc(qs_device *device, void **out, size_t bytes, qs_mem_class kind)
{
    return device->ops->alloc(device, out, bytes, kind);
}

void qs_device_free(qs_device *device, void *ptr)
{
    if (ptr != NULL) {
        device->ops->free(device, ptr);
    }
}

qs_status qs_device_host_alloc(qs_device *device, void **out, size_t bytes, qs_mem_class kind)
{
    return device->ops->host_alloc(device, out, bytes, kind);
}

void qs_device_host_free(qs_device *device, void *ptr)
{
    if (ptr != NULL) {
        device->ops->host_free(device, ptr);
    }
}

qs_status qs_device_watch(qs_device *device, qs_status (*watch)(void *ctx), void *ctx)
{
    for (int i = 0; i < QS_DEVICE_WATCHES_MAX; i++) {
        if (device->watches[i].watch == NULL) {
            device->watches[i].watch = watch;
            device->watches[i].ctx = ctx;
            return QS_OK;
        }
    }
    return QS_FAIL(QS_ERR_BUG, "a device has %d watches already", QS_DEVICE_WATCHES_MAX);
}

void qs_device_unwatch(qs_device *device, const void *ctx)
{
    for (int i = 0; i < QS_DEVICE_WATCHES_MAX; i++) {
        if (device->watches[i].ctx == ctx) {
            device->watches[i].watch = NULL;
            device->watches[i].ctx = NULL;
        }
    }
}

qs_status qs_queue_create(qs_queue **out, int threads)
{
    return qs_queue_create_on(qs_device_cpu(), out, threads);
}

qs_status qs_queue_create_on(qs_device *device, qs_queue **out, int threads)
{
    *out = NULL;
    return device->ops->queue_create(device, out, threads);
}

void qs_queue_destroy(qs_queue *queue)
{
    if (queue != NULL) {
        queue->ops->queue_destroy(queue);
    }
}

qs_device *qs_queue_device(const qs_queue *queue)
{
    return queue->device;
}

int qs_queue_threads(const qs_queue *queue)
{
    return queue->ops->queue_threads != NULL ? queue->ops->queue_threads(queue) : 1;
}

void *qs_queue_native(const qs_queue *queue)
{
    return queue->ops->queue_native != NULL ? queue->ops->queue_native(queue) : NULL;
}

qs_status qs_queue_copy(qs_queue *queue, void *to, const void *from, size_t bytes)
{
    return bytes > 0 ? queue->ops->copy(queue, to, from, bytes) : QS_OK;
}

qs_status qs_queue_zero(qs_queue *queue, void *ptr, size_t bytes)
{
    return bytes > 0 ? queue->ops->zero(queue, ptr, bytes) : QS_OK;
}

/* For whom the host waits in a queue: a GPU's collectives are among its work. */
static const char *whom(const qs_queue *queue)
{
    return queue->device->ops->is_host ? "other ranks" : "the GPU, or other ranks through it";
}

qs_status qs_queue_wait(qs_queue *queue)
{
    qs_status st;
    QS_WHILE_WAITING(whom(queue), st = queue->ops->wait(queue));
    return st;
}

qs_event qs_event_record(qs_queue *queue)
{
    return (qs_event){.queue = queue, .number = queue->ops->record(queue)};
}

qs_status qs_event_wait(qs_event event)
{
    if (event.queue == NULL) {
        return QS_OK;
    }
    qs_status st;
    QS_WHILE_WAITING(whom(event.queue), st = event.queue->ops->wait_for(event.queue, event.number));
    return st;
}

qs_status qs_queue_after(qs_queue *queue, qs_event event)
{
    if (event.queue == NULL || event.queue == queue) {
        return QS_OK; /* a queue is in order by itself */
    }
    /* A mark in another device's queue is known to the host alone. */
    const bool same = queue->ops == event.queue->ops && queue->ops->after != NULL;
    return same ? queue->ops->after(queue, event) : qs_event_wait(event);
}

qs_status qs_queue_push(qs_queue *queue, qs_pending_poll poll, void (*release)(void *), void *ctx)
{
    if (queue->ops->push == NULL) {
        return QS_FAIL(QS_ERR_BUG, "an operation that wants polling was given to a queue of %s",
                       queue->ops->name);
    }
    return queue->ops->push(queue, poll, release, ctx);
}

qs_status qs_queue_poll(qs_queue *queue)
{
    return queue->ops->poll != NULL ? queue->ops->poll(queue) : QS_OK;
}

void qs_queue_set_idle(qs_queue *queue, void (*idle)(void *), void *ctx)
{
    if (queue->ops->set_idle != NULL) {
        queue->ops->set_idle(queue, idle, ctx);
    }
}

void qs_queue_idle(qs_queue *queue)
{
    qs_watch_moved(); /* a loop may be long */
    if (queue->ops->idle != NULL) {
        queue->ops->idle(queue);
    }
}

qs_status qs_mirror_create(qs_device *device, qs_mirror *mirror, size_t bytes, qs_mem_class kind)
{
    *mirror = (qs_mirror){.bytes = bytes};
    QS_TRY(qs_device_alloc(device, &mirror->device, bytes, kind));
    if (qs_device_is_host(device)) {
        mirror->host = mirror->device;
        return QS_OK;
    }
    return qs_device_host_alloc(device, &mirror->host, bytes, kind);
}

void qs_mirror_destroy(qs_device *device, qs_mirror *mirror)
{
    if (mirror->host != mirror->device) {
        qs_device_host_free(device, mirror->host);
    }
    qs_device_free(device, mirror->device);
    *mirror = (qs_mirror){0};
}

qs_status qs_mirror_push(qs_queue *queue, const qs_mirror *mirror, size_t at, size_t bytes)
{
    char *to = (char *)mirror->device + at;
    const char *from = (const char *)mirror->host + at;
    return to == from ? QS_OK : qs_queue_copy(queue, to, from, bytes);
}

qs_status qs_mirror_pull(qs_queue *queue, const qs_mirror *mirror, size_t at, size_t bytes)
{
    char *to = (char *)mirror->host + at;
    const char *from = (const char *)mirror->device + at;
    return to == from ? QS_OK : qs_queue_copy(queue, to, from, bytes);
}

void qs_span_begin(qs_queue *queue, const char *format, ...)
{
    qs_watch_moved();
    if (queue->ops->span_begin == NULL) {
        return;
    }
    char name[64];
    va_list args;
    va_start(args, format);
    vsnprintf(name, sizeof name, format, args);
    va_end(args);
    queue->ops->span_begin(queue, name);
}

void qs_span_end(qs_queue *queue)
{
    if (queue->ops->span_end != NULL) {
        queue->ops->span_end(queue);
    }
}

void qs_device_profile(qs_device *device, bool on)
{
    if (device->ops->profile != NULL) {
        device->ops->profile(device, on);
    }
}
