/* Checked file I/O: whoever writes, renames or removes files does it by these functions, but for
 * HDF5's own, locks, and what a signal takes back.
 *
 * Calls of at most 1 GiB, EINTR and short writes handled, every errno turned into one line with
 * the path. ENOSPC and EDQUOT are QS_ERR_IO_FULL, so that a full disk can be told from a broken
 * one. Nothing is published before it has been synced, read back and renamed. */
#ifndef QS_STORE_IO_H
#define QS_STORE_IO_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

/** Create a file, which must not exist, for writing and reading back. */
qs_status qs_io_create(const char *path, int *fd);

/** Write all of `data` at `offset` of an open file; `path` is for messages. */
qs_status qs_io_write_all(int fd, const void *data, size_t bytes, int64_t offset, const char *path);

/** Read exactly `bytes` at `offset`; a short file is QS_ERR_INPUT_FORMAT. */
qs_status qs_io_read_all(int fd, void *data, size_t bytes, int64_t offset, const char *path);

/** Reserve the first `bytes` of a file opened for writing, so that a full disk shows before the
 * first byte is written. Where the file system cannot do that, nothing happens. */
qs_status qs_io_reserve(int fd, size_t bytes, const char *path);

/** Have what was written through `fd` on the disk. Not to be repeated after a failure: the data
 * may be gone. */
qs_status qs_io_fsync(int fd, const char *path);

/** Close a file that was written. The descriptor is gone in any case. */
qs_status qs_io_close(int fd, const char *path);

/** Write a whole file so that it is there completely or not at all: temporary name in the same
 * directory, allocate, write, fsync, close, read back and compare, rename, fsync of the
 * directory. An older file of the name is replaced, a device or a pipe is QS_ERR_OUTPUT_TAKEN. */
qs_status qs_io_write_file(const char *path, const void *data, size_t bytes);

/** Makes a whole new file under this name, synced and read back. What it leaves after a failure is
 * removed. */
typedef qs_status (*qs_io_maker)(const char *temp, void *ctx);

/** Like qs_io_write_file, for what does not fit into memory: `make` writes it under the temporary
 * name. */
qs_status qs_io_replace(const char *path, qs_io_maker make, void *ctx);

/** Cut a file off behind its first `bytes`, and have that on the disk. */
qs_status qs_io_cut(const char *path, int64_t bytes);

/** Could qs_io_write_file write there now? For what a user names and is written at the end of long
 * work. Nothing is left. The reasons are its own, and QS_ERR_OUTPUT_TAKEN where a file stands that
 * is neither empty nor one of `ours`: with these words in its first 4 KiB; NULL: none is. */
qs_status qs_io_try_file(const char *path, const char *ours);

/** Like qs_io_write_file without the rename: `path` is a new file in a directory that is not
 * published yet. */
qs_status qs_io_write_new(const char *path, const void *data, size_t bytes);

/** Does this errno of a file that we read say nothing about the file itself: no permission, no
 * descriptor left, a file system that went away? */
bool qs_io_out_of_reach(int error);

/** The directory that `path` stands in, "." if it says none. */
qs_status qs_io_parent(const char *path, char *out, size_t capacity);

/** DIR/NAME, of whatever length; the caller frees *path. */
qs_status qs_io_join(char **path, const char *dir, const char *name);

/** Open a plain file for reading, and no other: a pipe must not make us wait. */
qs_status qs_io_open_plain(const char *path, int *fd, int64_t *bytes);

/** Read a whole file of at most `limit` bytes. Caller frees *data; a NUL follows the last byte. */
qs_status qs_io_read_file(const char *path, size_t limit, void **data, size_t *bytes);

/** Open a log file (metrics), or make it. */
qs_status qs_io_open_append(const char *path, int *fd);

/** Append one line to it, in one write where that is possible. Of a line that a full disk cuts
 * short nothing stays. */
qs_status qs_io_append(int fd, const char *line, size_t bytes, const char *path);

qs_status qs_io_fsync_dir(const char *path);
qs_status qs_io_mkdir(const char *path); /* one level; existing is fine */

/** Make a directory with all that is missing above it, and have their names on the disk. *made: how
 * many levels were not there before, for qs_io_take_back_dirs; 0 after a failure, which leaves
 * nothing. */
qs_status qs_io_make_dirs(const char *path, int *made);

/** Remove `path` and the levels above it, `made` in all, as far as they are empty. */
void qs_io_take_back_dirs(const char *path, int made);

qs_status qs_io_rename(const char *from, const char *to);
qs_status qs_io_remove(const char *path); /* a file; missing is fine */
/** Remove a directory and the plain files in it (no subdirectories); missing is fine. */
qs_status qs_io_remove_dir(const char *path);

/** Of qs_io_list: an entry of the open directory `dir` that is neither "." nor "..". */
typedef qs_status qs_io_entry(void *user, int dir, const char *name);

/** Call `each` for the entries of a directory, in no order, until one fails. *there (NULL: not
 * asked): is it one that can be opened? None at all is no error. A listing that fails is `failed`,
 * with the errno as its cause: what it leaves out may be what is looked for. */
qs_status qs_io_list(const char *path, qs_status failed, qs_io_entry *each, void *user,
                     bool *there);

/** Is `name` what a network file system makes of a file that somebody removes while it is open? It
 * goes away when that one closes it. */
bool qs_io_is_removed_open(const char *name);

/** Free bytes for this user in the file system of `path`. */
qs_status qs_io_free_bytes(const char *path, uint64_t *bytes);

/** Are there so many in that of `dir`? QS_ERR_IO_FULL if not, saying what they are needed for, and
 * what to do. */
qs_status qs_io_expect_room(const char *dir, uint64_t bytes, const char *what, const char *remedy);

#endif
