/* Manifests: a directory is a checkpoint if and only if its manifest verifies.
 *
 * The manifest lists every file with size, SHA-256 and XXH3-128 per 1 MiB block, carries a free JSON object of its owner, and ends
 * in the SHA-256 of itself. It is written last, so that a run killed at any moment leaves either a whole checkpoint or none. */
#ifndef QS_STORE_MANIFEST_H
#define QS_STORE_MANIFEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "store/hash.h"

typedef struct {
    char name[64]; /* bare file name */
    int64_t bytes;
    char sha256[QS_SHA256_HEX];
} qs_manifest_file;

typedef struct {
    int64_t step;
    int nranks;
    char run_id[40];
    char *meta_json; /* owner's object, a JSON text */
    int n_files;
    qs_manifest_file *files;
} qs_manifest;

void qs_manifest_free(qs_manifest *m);

/** Hash one file as it lies on disk. */
qs_status qs_manifest_hash_file(const char *dir, const char *name, qs_manifest_file *out);

/** Write DIR/manifest.json (qs_io_write_new; the directory is still a temporary one). */
qs_status qs_manifest_write(const char *dir, const qs_manifest *m);

/** Parse and check DIR/manifest.json itself: format, own hash, field ranges, bare file names. */
qs_status qs_manifest_read(const char *dir, qs_manifest *out);

/** Read and check that every file has its size and hash. */
qs_status qs_manifest_verify(const char *dir, qs_manifest *out);

/** Steps of the directories `step-*` in `dir` whose manifest reads well, descending, at most `capacity`. Missing dir: none. */
qs_status qs_manifest_list(const char *dir, int64_t *steps, int capacity, int *count);

/** dir/step-00000042 */
void qs_manifest_step_dir(char *out, size_t capacity, const char *dir, int64_t step);

#endif
