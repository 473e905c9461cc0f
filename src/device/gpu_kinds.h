/* GPUs by name: what a plan or a forecast has to know of a card that is not in this machine.
 * docs/planning.md has the table with the source of each figure. */
#ifndef QS_DEVICE_GPU_KINDS_H
#define QS_DEVICE_GPU_KINDS_H

#include <stdbool.h>
#include <stddef.h>

enum { QS_GPU_MODELS_MAX = 4 };

typedef struct {
    const char *name;                      /* as --gpu takes it: "A100-80" */
    const char *models[QS_GPU_MODELS_MAX]; /* what the driver calls such cards, whole names */
    double bf16_tflops;                    /* dense products of bf16 with fp32 sums, datasheet */
    double memory_gbps;                    /* datasheet */
    double memory_gib;                     /* that the driver shows */
    const char *link;                      /* what usually joins cards of a node */
    double link_gbps;                      /* of it, in one direction, datasheet */
} qs_gpu_kind;

extern const qs_gpu_kind qs_gpu_kinds[];
extern const int qs_gpu_kinds_count;

/** The kind called `name`: letters and digits count, in either case; a vendor's words in front and
 * GB behind may be there ("NVIDIA GeForce RTX 4090", "a100 80GB"). NULL if there is none. */
const qs_gpu_kind *qs_gpu_kind_find(const char *name);

/** The kind of the card that `description` (qs_device_description) is of; NULL: not in the table.
 * Variants with other clocks (PCIe, laptop, MIG slices) are not taken for it. */
const qs_gpu_kind *qs_gpu_kind_of(const char *description);

/** All names, with commas. */
void qs_gpu_kind_names(char *out, size_t capacity);

/** Bytes that a run can have of a card that nobody else uses: what the driver keeps for itself and
 * the context is not among them. */
size_t qs_gpu_kind_free_bytes(const qs_gpu_kind *kind);

#endif
