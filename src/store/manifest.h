/* Manifests: a directory is a checkpoint if and only if its manifest verifies.
 *
 * The manifest lists every file with size, SHA-256 and XXH3-128 per 1 MiB block, carries a free
 * JSON object of its owner, and ends in the SHA-256 of itself. It is written last, so that a run
 * killed at any moment leaves either a whole checkpoint or none. */
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
    char *meta_json; /* owner's object, a JSON text; its keys stand beside the manifest's own. NULL:
                        none */
    int n_files;
    qs_manifest_file *files;
    char (*blocks)[QS_XXH128_HEX]; /* of all files, ceil(bytes / 1 MiB) each; only in a manifest
                                      that was read */
} qs_manifest;

enum { QS_MANIFEST_BLOCK_BYTES = 1 << 20 };

void qs_manifest_free(qs_manifest *m);

/** Hash one file as it lies on disk. */
qs_status qs_manifest_hash_file(const char *dir, const char *name, qs_manifest_file *out);

/** Write DIR/manifest.json (qs_io_write_new; the directory is still a temporary one). Every file
 * is read for its block hashes, and must have the size and hash that `m` says: QS_ERR_IO_VERIFY
 * otherwise, so that nothing unread is published. */
qs_status qs_manifest_write(const char *dir, const qs_manifest *m);

/** Parse and check the text of a manifest, without touching any file. `path` is for messages. */
qs_status qs_manifest_parse(const char *text, size_t bytes, const char *path, qs_manifest *out);

/** Parse and check DIR/manifest.json itself: format, own hash, field ranges, bare file names, and
 * that its step is the one in the name of a directory called step-N. */
qs_status qs_manifest_read(const char *dir, qs_manifest *out);

/** Read and check that every file has its size and hash. */
qs_status qs_manifest_verify(const char *dir, qs_manifest *out);

/** After qs_manifest_read or _verify: does the error `st` say nothing about the checkpoint? There
 * was no memory, or the files are there and out of reach (qs_io_out_of_reach). */
bool qs_manifest_undecided(qs_status st);

/** Steps of all names step-N in `dir`, whatever they hold, descending: *steps [*count], to be
 * freed. Missing dir: none. */
qs_status qs_manifest_scan(const char *dir, int64_t **steps, int *count);

/** Steps of the directories `step-*` in `dir` whose manifest reads well, descending, at most
 * `capacity`. Missing dir: none. What is undecided is an error. */
qs_status qs_manifest_list(const char *dir, int64_t *steps, int capacity, int *count);

/** Remove a checkpoint, as qs_io_remove_dir removes a directory: what makes it one goes first, so
 * that a removal cut short leaves no manifest without its files. */
qs_status qs_manifest_remove_dir(const char *path);

/** dir/step-00000042 */
void qs_manifest_step_dir(char *out, size_t capacity, const char *dir, int64_t step);

#endif
