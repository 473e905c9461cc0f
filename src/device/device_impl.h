/* What devices share: the table of calls behind device.h, and the parts of the objects that
 * device.c knows. */
#ifndef QS_DEVICE_IMPL_H
#define QS_DEVICE_IMPL_H

#include "device/device.h"

/** One kind of processor. NULL entries are calls that it has no use for: device.c then does
 * nothing and succeeds. */
typedef struct {
    const char *name;
    bool is_host;
    void (*close)(qs_device *device);
    void (*memory)(const qs_device *device, size_t *free_bytes, size_t *total_bytes);
    qs_status (*reserve)(qs_device *device, size_t bytes);
    qs_status (*alloc)(qs_device *device, void **out, size_t bytes, qs_mem_class kind);
    void (*free)(qs_device *device, void *ptr);
    qs_status (*host_alloc)(qs_device *device, void **out, size_t bytes, qs_mem_class kind);
    void (*host_free)(qs_device *device, void *ptr);
    qs_status (*queue_create)(qs_device *device, qs_queue **out, int threads);
    void (*queue_destroy)(qs_queue *queue);
    int (*queue_threads)(const qs_queue *queue);
    void *(*queue_native)(const qs_queue *queue);
    qs_status (*copy)(qs_queue *queue, void *to, const void *from, size_t bytes);
    qs_status (*zero)(qs_queue *queue, void *ptr, size_t bytes);
    qs_status (*wait)(qs_queue *queue);
    uint64_t (*record)(qs_queue *queue);
    qs_status (*wait_for)(qs_queue *queue, uint64_t number); /* the host */
    qs_status (*after)(qs_queue *queue, qs_event event);     /* the queue; NULL: the host waits */
    qs_status (*push)(qs_queue *queue, qs_pending_poll poll, void (*release)(void *), void *ctx);
    qs_status (*poll)(qs_queue *queue);
    void (*set_idle)(qs_queue *queue, void (*idle)(void *), void *ctx);
    void (*idle)(qs_queue *queue);
    void (*span_begin)(qs_queue *queue, const char *name);
    void (*span_end)(qs_queue *queue);
    void (*profile)(qs_device *device, bool on);
} qs_device_ops;

/** First member of every device. */
struct qs_device {
    const qs_device_ops *ops;
    char description[192], traits[192];
    struct {
        qs_status (*watch)(void *ctx); /* NULL: free */
        void *ctx;
    } watches[QS_DEVICE_WATCHES_MAX];
};

/** First member of every queue. */
struct qs_queue {
    const qs_device_ops *ops;
    qs_device *device;
    void *kernels; /* what qs_ops.open keeps with this queue */
};

/** The CPU's table, for device.c. */
extern const qs_device_ops qs_device_cpu_ops;

#endif
