/* Our HDF5 files: fixed names, scalar attributes, contiguous datasets. The only user of hdf5.h.
 *
 * HDF5 shapes the bytes; io.h writes them. Small files are built as an image in memory and
 * written by qs_io_write_*; large ones get early-allocated datasets whose file offsets are used
 * with pread and pwrite. Serial API, one mutex around every call (HDF5 is not thread-safe), no
 * plugins, no iteration, external links and filters refused. Every H5*close is checked. */
#ifndef QS_STORE_H5_H
#define QS_STORE_H5_H

#include <stddef.h>
#include <stdint.h>

#include "base/dtype.h"
#include "base/status.h"

typedef struct qs_h5 qs_h5;

/** What a dataset is, as found or as wanted. */
typedef struct {
    qs_dtype
        dtype; /* QS_U8, QS_I32, QS_I64, QS_F32; u32 is QS_I32 and u64 is QS_I64 of the same size */
    int rank;  /* 1 or 2 */
    int64_t dims[2];
    int64_t file_offset; /* of its first byte; -1 for an empty dataset */
} qs_h5_info;

/** Open an existing file for reading. Empty, cut-off or garbled files are QS_ERR_INPUT_FORMAT. */
qs_status qs_h5_open(qs_h5 **out, const char *path);

/** Create a new file on disk (QS_ERR_OUTPUT_TAKEN if it exists) or, with path NULL, an image in
 * memory. On disk no page of 4,096 bytes holds bytes of two datasets, or of one and HDF5's own. */
qs_status qs_h5_create(qs_h5 **out, const char *path);

/** Close. For a file being written every close is checked and the file is synced. NULL is fine. */
qs_status qs_h5_close(qs_h5 *file);

/** Give up a file after a failure: nothing is synced or read back, and the recorded error stays the
 * one to report. What lies on the disk is the caller's to remove. NULL is fine. */
void qs_h5_discard(qs_h5 *file);

/** Take the finished image of a file created with path NULL; the caller frees it. Closes `file`. */
qs_status qs_h5_close_image(qs_h5 *file, void **image, size_t *bytes);

qs_status qs_h5_attr_put_i64(qs_h5 *file, const char *name, int64_t value);
qs_status qs_h5_attr_put_text(qs_h5 *file, const char *name, const char *text);
/** Is a root attribute there? For what the first versions of a format do not have. */
qs_status qs_h5_attr_exists(qs_h5 *file, const char *name, bool *exists);

/** Read a root attribute; wrong class, size or rank is QS_ERR_INPUT_FORMAT naming file and
 * attribute. */
qs_status qs_h5_attr_get_i64(qs_h5 *file, const char *name, int64_t *value);
qs_status qs_h5_attr_get_text(qs_h5 *file, const char *name, char *text, size_t capacity);

/** Check `format` and `format_version` of the root. */
qs_status qs_h5_expect_format(qs_h5 *file, const char *format, int64_t version);

/** Create a dataset (and the groups in its name) with its space allocated; `info->file_offset` is
 * set. No data is written. */
qs_status qs_h5_dataset_create(qs_h5 *file, const char *name, qs_h5_info *info);

/** Create and fill a small dataset through HDF5. */
qs_status qs_h5_dataset_put(qs_h5 *file, const char *name, qs_h5_info *info, const void *data);

/** Look a dataset up: must exist, be contiguous and little-endian, of `want->dtype` and
 * `want->rank`; dims with want >= 0 must be equal. Fills dims and file_offset. */
qs_status qs_h5_dataset_find(qs_h5 *file, const char *name, qs_h5_info *want);

/** Read elements [first, first + count) of a dataset, flattened. */
qs_status qs_h5_dataset_get(qs_h5 *file, const char *name, const qs_h5_info *info, int64_t first,
                            int64_t count, void *data);

const char *qs_h5_path(const qs_h5 *file);

/** Version of the HDF5 library in use, "1.10.8". */
void qs_h5_version(char *out, size_t capacity);

#endif
