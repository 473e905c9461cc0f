/* base.h5: the model as units of NF4 quanta (docs/file-formats.md), seen from a rank that owns a
 * share of each. */
#ifndef QS_WEIGHTS_BASE_FILE_H
#define QS_WEIGHTS_BASE_FILE_H

#include <stdint.h>
#include <stdio.h>

#include "comm/comm.h"
#include "hf/hf_config.h"
#include "quant/layout.h"
#include "store/hash.h"
#include "store/seen.h"

typedef enum { QS_TENSOR_NF4, QS_TENSOR_RAW, QS_TENSOR_SMALL } qs_tensor_kind;

/** One tensor of a unit. */
typedef struct {
    char *name; /* as in the checkpoint */
    qs_tensor_kind kind;
    int rank;
    int64_t shape[2];
    qs_dtype dtype;  /* NF4: what W is rounded to; else the stored type */
    int64_t quantum; /* NF4, raw: first quantum */
    int64_t byte;    /* small: offset in the unit's small bytes */
    int map;         /* NF4: row of the maps */
    float offset;    /* NF4: nested offset */
} qs_base_tensor;

typedef struct {
    char *name; /* "layers.3", "embed.0", "head.0", "final" */
    qs_unit_size size;
    int64_t small_bytes;
    uint64_t small_xxh3;
    int n_tensors;
    qs_base_tensor *tensors;
    /* where the datasets lie in the file; -1 if empty */
    int64_t packed_at, absmax8_at, absmax32_at, raw_at, small_at, hash_at;
    int64_t small_from; /* where its small bytes begin in index->small */
} qs_base_unit;

/** Most ids that may end a text. */
enum { QS_EOS_MAX = 16 };

/** The whole index; equal on all ranks, but for what `seen` says of this one. */
typedef struct {
    char *path;
    char *config_text; /* config.json as given */
    qs_hf_config config;
    int n_eos; /* those of generation_config.json, beside those of config.json; 0: none, or from
                  before they were kept */
    int32_t eos[QS_EOS_MAX];              /* below config.vocab */
    char tokenizer_sha256[QS_SHA256_HEX]; /* of tokenizer.json; "" as n_eos is 0 */
    int64_t head_chunk_rows;
    bool nested;
    int n_maps;
    float *maps; /* [n_maps, 256] */
    int n_units; /* without "final" */
    qs_base_unit *units;
    qs_base_unit final;
    char hashes_sha256[QS_SHA256_HEX];
    char source_sha256[QS_SHA256_HEX];
    char *source_path;   /* where the checkpoint was, as given to qshard quantize */
    char *quantizer;     /* program and version that wrote the file */
    int64_t zero_blocks; /* all-zero NF4 blocks found while quantizing */
    qs_seen seen;        /* which ranks can read the file */
    uint8_t *small;      /* the small bytes of all units, where not every rank can; else NULL */
} qs_base_index;

/** Open FILE and read its index: the lowest rank that sees the file opens and verifies it, the
 * others are told. QS_ERR_DISAGREE where another host has another file of this name. Collective.
 * `comm` must outlive the index. Caller frees with qs_base_index_free. */
qs_status qs_base_index_read(qs_base_index **out, const char *path, qs_comm *comm);
void qs_base_index_free(qs_base_index *index);

/** Units: layers first, then embedding chunks, then head chunks (none when tied). */
int qs_base_layer_unit(const qs_base_index *index, int layer);
int qs_base_embed_chunks(const qs_base_index *index);
int qs_base_embed_unit(const qs_base_index *index, int chunk);
/** The units that the head passes: the head's own, or the embedding's when tied. */
int qs_base_head_chunks(const qs_base_index *index);
int qs_base_head_unit(const qs_base_index *index, int chunk);

/** Is this the base with `trained` as hashes_sha256, on which the adapter called `name` was
 * trained? QS_ERR_INPUT_HASH if not: its numbers would mean nothing here. */
qs_status qs_base_expect(const qs_base_index *index, const char *trained, const char *name);

/** The tensor of a unit whose name ends in `suffix`, NULL if there is none. */
const qs_base_tensor *qs_base_find(const qs_base_unit *unit, const char *suffix);

/** The kernel's description of an NF4 or raw tensor. */
qs_weight qs_base_weight(const qs_base_index *index, const qs_base_tensor *tensor);

/** Read this rank's share of unit `u` as one message (qs_unit_layout_make(size, nranks)) and
 * verify the hash of every quantum. Not collective. \param [out] message [layout.message_bytes].
 * Adds the bytes read to *bytes_read. */
qs_status qs_base_read_share(const qs_base_index *index, int fd, int u, int rank, int nranks,
                             uint8_t *message, uint64_t *bytes_read);

/** The same for a rank that may not see the file (index->seen): its server reads the share, the
 * verifying is this rank's. Collective over index->seen.comm, unless qs_seen_by_all: all ranks ask
 * for a share at the same time. An error is this rank's alone if it comes from the verifying. */
qs_status qs_base_fetch_share(const qs_base_index *index, int fd, int u, int rank, int nranks,
                              uint8_t *message, uint64_t *bytes_read);

/** Read the small bytes of a unit, from index->small where that is, and verify them. \param [out]
 * small [small_bytes]. */
qs_status qs_base_read_small(const qs_base_index *index, int fd, const qs_base_unit *unit,
                             uint8_t *small);

/** A small tensor as floats, from bytes read by qs_base_read_small. */
void qs_base_small_f32(const qs_base_tensor *tensor, const uint8_t *small, float *out);

enum { QS_BASE_ORIGIN_BYTES = 1024 };

/** What base.h5 records of the checkpoint that it was made from; "" where it does not. */
typedef struct {
    char path[QS_BASE_ORIGIN_BYTES];         /* as it was given to quantize */
    char name_or_path[QS_BASE_ORIGIN_BYTES]; /* _name_or_path in its config.json */
} qs_base_origin;

/** That of the base at `path`. One that is elsewhere, or damaged, is no error: nothing is known
 * then. Not collective. */
qs_base_origin qs_base_read_origin(const char *path);

/** Verify everything in the file (qshard check). Not collective. */
qs_status qs_base_verify(const char *path);

/** Print what the file holds as a table for humans (qshard inspect): model, units, bytes by class,
 * provenance. The index is verified, the data is not read. Not collective. */
qs_status qs_base_describe(const char *path, FILE *out);

#endif
