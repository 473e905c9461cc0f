/* What a plugin is: a shared library with the device, the operations and the communicator of one
 * kind of GPU, loaded at run time, so that the program itself starts on any machine. It calls back
 * into the program for errors, memory counts and the like (qshard_base).
 *
 * libqshard_cuda.so is looked for beside the program, then in ../lib and ../lib/qshard from there;
 * QSHARD_PLUGIN names another file. */
#ifndef QS_BACKEND_PLUGIN_H
#define QS_BACKEND_PLUGIN_H

#include <stddef.h>

#include "kernels/cuda/ops_cuda.h"
#include "kernels/ops.h"

struct qs_comm;

/** Changes whenever a struct or a call that crosses the border does. */
#define QS_PLUGIN_ABI "qshard-plugin-7"

typedef struct qs_plugin {
    const char *abi;  /* QS_PLUGIN_ABI: the first member, checked before anything else is read */
    const char *name; /* "cuda", "emulated" */

    /** What it was built with and for, one line. */
    const char *(*description)(void);

    /** Look whether this machine can run it. Returns the number of devices that can, 0 if none;
     * then `why` is one line that says why and what to do. Makes no context on a device. */
    int (*probe)(char *why, size_t capacity);

    /** 16 bytes that no other card in the world has, for device `index` of those that can be used.
     */
    qs_status (*card_id)(int index, uint8_t id[16]);

    /** Open device `index` of those that the process sees; qs_device_close closes it. */
    qs_status (*device_open)(qs_device **out, int index);

    const qs_ops *(*ops)(void);

    /** A communicator for this device's memory over the ranks of `host`, which stays the caller's
     * and must outlive it. */
    qs_status (*comm_create)(struct qs_comm **out, struct qs_comm *host, qs_device *device);

    /** The products alone, for tests and benchmarks. */
    qs_status (*gemm)(qs_queue *q, const qs_gemm_call *call);
} qs_plugin;

/** The one symbol of a plugin. */
typedef const qs_plugin *(*qs_plugin_getter)(void);
#define QS_PLUGIN_SYMBOL "qs_plugin_get"

/** Load the plugin in file `path` and check that it is of this program. It stays loaded.
 * \return NULL with one line in `why`. */
const qs_plugin *qs_plugin_load(const char *path, char *why, size_t capacity);

/** Load libqshard_cuda.so from where it should be. `path` (may be NULL) gets where it was found. */
const qs_plugin *qs_plugin_find(char *why, size_t capacity, char *path, size_t path_capacity);

#endif
