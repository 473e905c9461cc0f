/* What the files of the quantizer share: the plan (which source tensor becomes which tensor of
 * base.h5), the work on one unit, and the import of bitsandbytes tensors. */
#ifndef QS_WEIGHTS_QUANTIZE_IMPL_H
#define QS_WEIGHTS_QUANTIZE_IMPL_H

#include "hf/safetensors.h"
#include "weights/base_impl.h"

/** Where the bytes of one tensor of base.h5 come from. */
typedef struct {
    const qs_st_tensor *data;   /* floats; packed codes if absmax is set */
    int64_t first;              /* first element of it that belongs to this tensor (chunks) */
    const qs_st_tensor *absmax; /* bitsandbytes only */
    const qs_st_tensor *nested_absmax; /* bitsandbytes with double quantization only */
} qs_source;

typedef struct {
    qs_st_dir *dir;
    qs_base_index *index; /* complete but for offsets, hashes and places in the file */
    qs_source **sources;  /* [n_units + 1][n_tensors]; the last is index->final */
    int64_t linears, source_bytes;
} qs_plan;

/** Read the headers of a checkpoint and decide everything that does not need the weights. Every
 * rank makes the same plan. */
qs_status qs_plan_make(qs_plan *plan, const char *hf_dir, int64_t head_chunk_rows,
                       bool double_quant);
void qs_plan_free(qs_plan *plan);

/** A unit by number; number n_units is "final". */
qs_base_unit *qs_plan_unit(const qs_plan *plan, int u);

/* ---- bitsandbytes ---- */

/** What a quantized weight of a bitsandbytes checkpoint says of itself. */
typedef struct {
    qs_source source;
    qs_dtype dtype; /* dequantization rounds to it */
    bool nested;
    float offset;
    float map[256]; /* second level; zero without double quantization */
} qs_bnb_tensor;

/** True if the directory holds a NF4 state for the weight called `name`. */
bool qs_bnb_present(const qs_st_dir *dir, const char *name);

/** Read and check the state of weight `name` [out, in]: NF4 in blocks of 64, nested 256 or none.
 * Calls mark(user, tensor) for every tensor that belongs to it. */
qs_status qs_bnb_read(qs_st_dir *dir, const char *name, int64_t out, int64_t in, qs_bnb_tensor *bnb,
                      void (*mark)(void *, const qs_st_tensor *), void *user);

/* ---- units ---- */

/** What the owner of a unit finds out while writing it. */
typedef struct {
    uint64_t *hash;        /* [nf4_quanta + raw_quanta] */
    uint64_t *source_hash; /* [n_tensors] of the bytes that were read */
    float *offset;         /* [n_tensors] nested offsets */
    int64_t zero_blocks;
} qs_unit_result;

qs_status qs_unit_result_alloc(qs_unit_result *out, const qs_base_unit *unit);
void qs_unit_result_free(qs_unit_result *result);

/** Units that are written and then read back together, so that a small model is not synced unit by
 * unit. Not collective. */
typedef struct qs_unit_batch qs_unit_batch;

/** `plan` and `path` are borrowed until the batch is freed. */
qs_status qs_unit_batch_begin(qs_unit_batch **out, const qs_plan *plan, int fd, const char *path,
                              int threads);
void qs_unit_batch_free(qs_unit_batch *batch);

/** Write the packed, absmax8, absmax32 and raw datasets of unit `u`; `result` is borrowed until the
 * next check, which happens by itself after enough bytes. */
qs_status qs_unit_batch_write(qs_unit_batch *batch, int u, qs_unit_result *result);

/** Sync what has been written, read all of it back, and fill the hashes. To be called after the
 * last unit. */
qs_status qs_unit_batch_check(qs_unit_batch *batch);

/** The small bytes of unit `u`: norms and biases as stored. \param [out] small [small_bytes],
 * zeroed before. */
qs_status qs_quantize_small(const qs_plan *plan, int u, uint8_t *small);

#endif
