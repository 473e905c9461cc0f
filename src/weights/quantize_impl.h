/* What the files of the quantizer share: the plan (which source tensor becomes which tensor of
 * base.h5), the quantizer proper, the work on one unit, and the import of bitsandbytes tensors. */
#ifndef QS_WEIGHTS_QUANTIZE_IMPL_H
#define QS_WEIGHTS_QUANTIZE_IMPL_H

#include "backend/backend.h"
#include "hf/safetensors.h"
#include "weights/base_impl.h"

enum { QS_DEFAULT_CHUNK_ROWS = 4096 }; /* of the vocabulary */

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

/** Put the hash of tokenizer.json into the index, by which a run knows data that were prepared with
 * another. No file: none. Needed of the rank that writes the index alone. */
qs_status qs_plan_hash_tokenizer(qs_plan *plan, const char *hf_dir);

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

/* ---- floats to NF4 ---- */

/** A piece: what is in memory of a tensor at a time. */
enum { QS_PIECE_QUANTA = 64, QS_PIECE_BYTES = QS_PIECE_QUANTA * QS_NF4_QUANTUM * 4 };

/** The quantizer of a rank: buffers for one piece, and for the absmax of one tensor. */
typedef struct {
    qs_device *device;
    const qs_ops *ops;
    qs_queue *queue;
    qs_mirror source;      /* [at least QS_PIECE_BYTES] the caller's to fill */
    qs_mirror packed;      /* [QS_PIECE_QUANTA, 8192] the caller's to read */
    qs_mirror zero_blocks; /* [1] */
    qs_mirror absmax;      /* [blocks of the largest tensor] */
    uint8_t *absmax8;      /* [likewise], and a float for every 256: the device's memory */
    float *absmax32;
} qs_encoder;

/** `backend` NULL: the CPU. Not collective. */
qs_status qs_encoder_open(qs_encoder *e, const qs_backend *backend, const qs_plan *plan,
                          int threads);
/** A zeroed encoder is fine. */
void qs_encoder_close(qs_encoder *e);

/** First level of elements [first, first + count) of a tensor, which lie at the start of
 * e->source.host: whole quanta of codes in e->packed.host, absmax in e->absmax.host from block
 * first / 64 on. Synchronous. `finite`: none of the elements is infinite or NaN. */
qs_status qs_encoder_piece(qs_encoder *e, qs_dtype dtype, int64_t first, int64_t count,
                           int64_t *zero_blocks, bool *finite);

/** Second level of the tensor whose pieces were the last, [blocks] in all. Synchronous.
 * \param [out] absmax8   [blocks]
 * \param [out] absmax32  [ceil(blocks / 256)] */
qs_status qs_encoder_finish(qs_encoder *e, int64_t blocks, float *offset, uint8_t *absmax8,
                            float *absmax32);

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

/** `plan` and `path` are borrowed until the batch is freed; `backend` as in qs_encoder_open. */
qs_status qs_unit_batch_begin(qs_unit_batch **out, const qs_plan *plan, int fd, const char *path,
                              const qs_backend *backend, int threads);
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
