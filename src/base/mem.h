/* Memory by class: every large buffer says what it is for, so that the plan printed before a run
 * can be checked against what the run really held. Thread-safe. */
#ifndef QS_BASE_MEM_H
#define QS_BASE_MEM_H

#include <stddef.h>

#include "base/status.h"

typedef enum {
    QS_MEM_BASE_SHARD,   /* this rank's share of the base */
    QS_MEM_BASE_GATHER,  /* gathered units (prefetch + 1 buffers) */
    QS_MEM_BASE_DECODED, /* layers whose decoded weights stay */
    QS_MEM_BASE_SMALL,   /* replicated norms, biases, table, hashes */
    QS_MEM_LORA,         /* LoRA weights in the compute dtype, all ranks the same */
    QS_MEM_LORA_GRAD,    /* partial sums of the slot tree and reduction buffers */
    QS_MEM_OPTIM,        /* fp32 master and moments of this rank's LoRA shard, and while they are
                          saved the image of their file */
    QS_MEM_ACTIVATION,   /* kept between forward and backward */
    QS_MEM_WORK,         /* scratch of one layer, of the head, of the kernels */
    QS_MEM_DATA,         /* tokens, labels, index */
    QS_MEM_CLASS_COUNT
} qs_mem_class;

/** Where memory lies. */
typedef enum { QS_MEM_HOST, QS_MEM_DEVICE, QS_MEM_SPACE_COUNT } qs_mem_space;

/** Count memory that somebody else allocated (`bytes` > 0) or freed (< 0): a device's buffers,
 * pinned host memory. */
void qs_mem_note(qs_mem_space space, qs_mem_class kind, ptrdiff_t bytes);

/** Allocate `bytes` of zeroed, 64-byte aligned memory in `*out`, counted under `kind`. 0 bytes
 * gives NULL.
 * \return QS_ERR_MEMORY naming class and size. Free with qs_mem_free. */
qs_status qs_mem_alloc(void **out, size_t bytes, qs_mem_class kind);

/** Free; NULL is fine. */
void qs_mem_free(void *ptr);

size_t qs_mem_now_bytes(qs_mem_space space, qs_mem_class kind);
size_t qs_mem_peak_bytes(qs_mem_space space, qs_mem_class kind);
size_t qs_mem_peak_total_bytes(qs_mem_space space);
const char *qs_mem_class_name(qs_mem_class kind);

/** Largest resident set of this process so far, from the operating system. */
size_t qs_mem_peak_rss_bytes(void);

/** *out = a * b + c; false if that does not fit. */
bool qs_size_mul_add(size_t a, size_t b, size_t c, size_t *out);

/** Allocation with the macro's own type: QS_TRY(QS_ALLOC(&p, n, class)) */
#define QS_ALLOC(pp, count, kind)                                                                  \
    qs_mem_alloc((void **)(pp), (size_t)(count) * sizeof **(pp), (kind))

#endif
