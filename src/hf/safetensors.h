/* safetensors: a parser of the header as a pure function, a reader of a checkpoint directory, and
 * a writer.
 *
 * The header comes from strangers: every length is checked against what is left of the file
 * before anything is allocated, regions must cover the data without holes or overlaps, names must
 * be unique. */
#ifndef QS_HF_SAFETENSORS_H
#define QS_HF_SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>

#include "base/dtype.h"
#include "base/status.h"

typedef enum {
    QS_ST_BOOL,
    QS_ST_U8,
    QS_ST_I8,
    QS_ST_I16,
    QS_ST_U16,
    QS_ST_F16,
    QS_ST_BF16,
    QS_ST_I32,
    QS_ST_U32,
    QS_ST_F32,
    QS_ST_F64,
    QS_ST_I64,
    QS_ST_U64,
    QS_ST_F8
} qs_st_dtype;

typedef struct {
    char *name;
    qs_st_dtype dtype;
    int rank;
    int64_t shape[8];
    int64_t count; /* product of shape */
    int64_t begin; /* byte offset in the file */
    int64_t bytes;
    int file; /* index of the file within a directory; 0 for a single header */
} qs_st_tensor;

typedef struct {
    int64_t n_tensors;
    qs_st_tensor *tensors; /* sorted by name */
} qs_st_header;

/** Parse a header: `text` is the JSON of `bytes` bytes that followed the length word of a file of
 * `file_bytes` bytes. Pure: no I/O. */
qs_status qs_st_parse_header(qs_st_header *out, const char *text, size_t bytes, int64_t file_bytes,
                             const char *path);
void qs_st_header_free(qs_st_header *header);

/** A checkpoint directory: model.safetensors or the files that model.safetensors.index.json names;
 * or one adapter file. */
typedef struct qs_st_dir qs_st_dir;

/** Open. `stem` is "model" or "adapter_model". */
qs_status qs_st_open(qs_st_dir **out, const char *dir, const char *stem);
void qs_st_close(qs_st_dir *dir);
const char *qs_st_path(const qs_st_dir *dir);

int64_t qs_st_count(const qs_st_dir *dir);
const qs_st_tensor *qs_st_at(const qs_st_dir *dir, int64_t index);
/** NULL if there is none of that name. */
const qs_st_tensor *qs_st_find(const qs_st_dir *dir, const char *name);

/** What becomes of names that begin with `from`: they begin with `to`, or, where that is NULL, the
 * tensor is left out. */
typedef struct {
    const char *from, *to;
} qs_st_rename;

/** Rename all tensors, each by the first of the rules that fits. What qs_st_at and qs_st_find gave
 * is void. \return QS_ERR_INPUT_TENSOR for a name that no rule fits, and where two become one. */
qs_status qs_st_rename_tensors(qs_st_dir *dir, const qs_st_rename *rules, int count,
                               int64_t *left_out);

/** Read bytes [first, first + bytes) of a tensor. */
qs_status qs_st_read(qs_st_dir *dir, const qs_st_tensor *tensor, int64_t first, int64_t bytes,
                     void *out);
/** Read elements [first, first + count) of an F32, F16 or BF16 tensor as floats. */
qs_status qs_st_read_f32(qs_st_dir *dir, const qs_st_tensor *tensor, int64_t first, int64_t count,
                         float *out);
int qs_st_to_dtype(qs_st_dtype dtype, qs_dtype *out); /* 0 if it is one of ours */
/** "BF16", ...; as in the header. */
const char *qs_st_dtype_name(qs_st_dtype dtype);

/** One tensor to write. */
typedef struct {
    const char *name;
    qs_dtype dtype;
    int rank;
    int64_t shape[8];
    const void *data;
} qs_st_item;

/** What tells a file with this `mark` (qs_st_write): words of its beginning. */
#define QS_ST_MARK(mark) "\"qshard\":\"" mark "\""

/** Write a safetensors file (ordered as the reference writer does, header padded to 8, metadata
 * format pt and, unless it is NULL, qshard `mark`), through qs_io_write_file. */
qs_status qs_st_write(const char *path, const qs_st_item *items, int64_t count, const char *mark);

/** The same file, written piece by piece: for tensors that do not fit into memory. */
typedef struct qs_st_writer qs_st_writer;

/** Create the file with its full size and its header; `items` without data, borrowed until it is
 * closed. QS_ERR_OUTPUT_TAKEN if `path` exists. */
qs_status qs_st_writer_open(qs_st_writer **out, const char *path, const qs_st_item *items,
                            int64_t count);
/** The next `bytes` of item number `item`. Items may take turns. */
qs_status qs_st_writer_put(qs_st_writer *writer, int64_t item, const void *data, size_t bytes);
/** Sync, read everything back, close. QS_ERR_BUG if an item is not complete. The writer is freed in
 * any case, the file stays. */
qs_status qs_st_writer_close(qs_st_writer *writer);
/** Close after a failure elsewhere; NULL is fine. */
void qs_st_writer_abandon(qs_st_writer *writer);

#endif
