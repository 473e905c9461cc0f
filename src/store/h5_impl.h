/* What the files of the HDF5 module share. Nobody else includes this, nor hdf5.h. */
#ifndef QS_STORE_H5_IMPL_H
#define QS_STORE_H5_IMPL_H

#include <hdf5.h>
#include <stdbool.h>

#include "store/h5.h"
#include "store/hash.h"

enum { QS_H5_NAME = 256 }; /* longest dataset name, with its NUL */

typedef enum { QS_H5_RECORD_I64, QS_H5_RECORD_TEXT, QS_H5_RECORD_DATASET } qs_h5_record_kind;

/** What was put into a file on disk, to be compared after it was closed. */
typedef struct {
    qs_h5_record_kind kind;
    char *name;
    char *text;
    int64_t value;
    qs_h5_info info;
    bool filled; /* through qs_h5_dataset_put */
    char hash[QS_XXH128_HEX];
} qs_h5_record;

typedef struct {
    void *buffer;
    size_t bytes;
    bool refused; /* memory that the library asked for */
} qs_h5_image;

struct qs_h5 {
    hid_t id;
    int fd; /* -1 for an image */
    bool writing;
    char *path;
    int64_t file_bytes; /* when opened for reading */
    qs_h5_image image;
    qs_h5_record *records;
    int n_records, record_capacity;
};

/** Around every group of calls of the library. */
void qs_h5_lock(void);
void qs_h5_unlock(void);

/** Turn a result of the library (negative: failed) into a status with the library's innermost
 * reason. */
qs_status qs_h5_check(const qs_h5 *file, int64_t result, const char *doing, const char *name);

/** The first failure of two: `st`, then the result of a close. */
qs_status qs_h5_closed(const qs_h5 *file, qs_status st, herr_t result, const char *name);

/** Add a record, borrowed until the next call. */
qs_status qs_h5_remember(qs_h5 *file, qs_h5_record_kind kind, const char *name, qs_h5_record **out);

#endif
