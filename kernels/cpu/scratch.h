/* Scratch memory of the kernels: it belongs to the thread that calls an operation, grows to the
 * largest size that was asked for, and is freed when the thread ends. So operations may run in
 * several threads at once (ranks that are threads of one process), and the step loop allocates
 * nothing once it has seen its largest micro-batch. */
#ifndef QS_KERNELS_CPU_SCRATCH_H
#define QS_KERNELS_CPU_SCRATCH_H

#include <stdint.h>

#include "base/status.h"

/** Who uses the piece; pieces of different users may be held at the same time. */
typedef enum {
    QS_SCRATCH_PACK_A,
    QS_SCRATCH_PACK_B,
    QS_SCRATCH_LORA,
    QS_SCRATCH_DORA,
    QS_SCRATCH_ATTENTION,
    QS_SCRATCH_HEAD,
    QS_SCRATCH_COUNT
} qs_scratch_user;

/** `count` floats, 64-byte aligned, contents undefined; valid until the same user asks again in
 * this thread. */
qs_status qs_scratch(qs_scratch_user user, int64_t count, float **out);

#endif
