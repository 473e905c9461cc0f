/* Checked file I/O.
 *
 * Every call that can be interrupted is repeated; every other failure is recorded with the path,
 * what was being done and what to do about it. fsync is never repeated after a failure other than
 * EINTR: the kernel may have dropped the dirty pages, and a second call would then report success
 * over lost data. */
#define _GNU_SOURCE /* fallocate, memmem */
#include "store/io.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "base/watch.h"

enum { QS_IO_PATH = 4096, QS_IO_COMPARE_BYTES = 1 << 20 };
static const size_t max_call_bytes = (size_t)1
                                     << 30; /* Linux moves at most 2 GiB - 4 KiB per call */

/** Record a failed operation on something that we write. */
static qs_status output_failed(const char *path, const char *doing, int error)
{
    if (error == ENOSPC || error == EDQUOT) {
        return QS_FAIL(QS_ERR_IO_FULL, "%s: %s failed: %s; free some space or raise the quota",
                       path, doing, strerror(error));
    }
    if (error == EFBIG) { /* as a quota: smaller files still fit */
        return QS_FAIL(QS_ERR_IO_FULL,
                       "%s: %s failed: %s; raise the limit on a file's size (ulimit -f)", path,
                       doing, strerror(error));
    }
    const char *remedy = error == EACCES || error == EPERM || error == EROFS
                             ? "; check the permissions of the directory"
                             : (error == ENOENT ? "; create the directory first" : "");
    return QS_FAIL(QS_ERR_IO, "%s: %s failed: %s%s", path, doing, strerror(error), remedy);
}

/** Record a failed operation on something that we read. */
static qs_status input_failed(const char *path, const char *doing, int error)
{
    qs_status st = QS_FAIL(QS_ERR_INPUT_MISSING, "%s: %s failed: %s", path, doing, strerror(error));
    qs_error_because(error);
    return st;
}

bool qs_io_out_of_reach(int error)
{
    switch (error) {
    case EACCES:
    case EPERM:
    case EMFILE:
    case ENFILE:
    case ENOMEM:
    case ESTALE:
    case ETIMEDOUT:
    case EAGAIN:
    case EBUSY:
    case ENOTCONN:
    case ESHUTDOWN:
    case EHOSTDOWN:
    case EHOSTUNREACH:
    case ENETDOWN:
    case ENETUNREACH:
        return true;
    default: /* ENOENT, and EIO: a bad sector stays bad */
        return false;
    }
}

static int open_retrying(const char *path, int flags, mode_t mode)
{
    int fd;
    do {
        fd = open(path, flags | O_CLOEXEC, mode);
    } while (fd < 0 && errno == EINTR);
    return fd;
}

/** 0 or an errno. Linux has released the descriptor when close says EINTR, so that is no failure:
 * our callers have synced. */
static int close_once(int fd)
{
    return close(fd) == 0 || errno == EINTR ? 0 : errno;
}

static int fsync_retrying(int fd)
{
    while (fsync(fd) != 0) {
        if (errno != EINTR) {
            return errno;
        }
    }
    return 0;
}

qs_status qs_io_write_all(int fd, const void *data, size_t bytes, int64_t offset, const char *path)
{
    const char *from = data;
    size_t done = 0;
    while (done < bytes) {
        size_t want = bytes - done < max_call_bytes ? bytes - done : max_call_bytes;
        ssize_t n = pwrite(fd, from + done, want, (off_t)(offset + (int64_t)done));
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) { /* 0 has no errno and would be repeated for ever */
            return output_failed(path, "writing", n < 0 ? errno : EIO);
        }
        qs_watch_moved();
        done += (size_t)n;
    }
    return QS_OK;
}

qs_status qs_io_read_all(int fd, void *data, size_t bytes, int64_t offset, const char *path)
{
    char *to = data;
    size_t done = 0;
    while (done < bytes) {
        size_t want = bytes - done < max_call_bytes ? bytes - done : max_call_bytes;
        ssize_t n = pread(fd, to + done, want, (off_t)(offset + (int64_t)done));
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n < 0) {
            return input_failed(path, "reading", errno);
        }
        if (n == 0) {
            return QS_FAIL(
                QS_ERR_INPUT_FORMAT,
                "%s: the file ends at byte %lld, but %zu bytes from %lld are needed; it was "
                "cut off, copy it again",
                path, (long long)(offset + (int64_t)done), bytes, (long long)offset);
        }
        qs_watch_moved();
        done += (size_t)n;
    }
    return QS_OK;
}

/** Compare the file with what it should hold, in pieces. */
static qs_status compare_fd(int fd, const char *data, size_t bytes, char *piece, const char *path)
{
    for (size_t at = 0; at < bytes; at += QS_IO_COMPARE_BYTES) {
        size_t n = bytes - at < QS_IO_COMPARE_BYTES ? bytes - at : QS_IO_COMPARE_BYTES;
        const qs_status st = qs_io_read_all(fd, piece, n, (int64_t)at, path);
        const int error = st != QS_OK ? qs_error_cause() : 0; /* 0, too, where the file is short */
        if (st != QS_OK) {
            qs_error_clear();
        }
        if (error != 0) {
            return QS_FAIL(QS_ERR_IO_VERIFY, "%s: cannot be read back: %s", path, strerror(error));
        }
        if (st != QS_OK || memcmp(piece, data + at, n) != 0) {
            return QS_FAIL(
                QS_ERR_IO_VERIFY,
                "%s: reads back differently from what was written, in the %zu bytes from "
                "%zu; check the disk",
                path, n, at);
        }
    }
    return QS_OK;
}

/** Read the file back and compare it: a disk that is full or broken may say so only now, or not at
 * all. */
static qs_status read_back(const char *path, const void *data, size_t bytes)
{
    qs_status st = QS_OK;
    struct stat info;
    char *piece = malloc(QS_IO_COMPARE_BYTES);
    int fd = open_retrying(path, O_RDONLY, 0);
    if (piece == NULL) {
        st = QS_FAIL(QS_ERR_MEMORY, "%s: no memory for reading back", path);
    } else if (fd < 0 || fstat(fd, &info) != 0) {
        st = QS_FAIL(QS_ERR_IO_VERIFY, "%s: cannot be read back: %s", path, strerror(errno));
    } else if (info.st_size != (off_t)bytes) {
        st = QS_FAIL(QS_ERR_IO_VERIFY, "%s: has %lld bytes after writing %zu; check the disk", path,
                     (long long)info.st_size, bytes);
    } else {
        (void)posix_fadvise(fd, 0, 0,
                            POSIX_FADV_DONTNEED); /* from the disk, where that is possible */
        st = compare_fd(fd, data, bytes, piece, path);
    }
    if (fd >= 0) {
        close_once(fd); /* read only */
    }
    free(piece);
    return st;
}

/* File systems that cannot reserve are none the worse: the disk may then be full later, which is
 * checked as well. posix_fallocate would write a byte into every block there: dirty pages over what
 * other hosts write. */
qs_status qs_io_reserve(int fd, size_t bytes, const char *path)
{
    while (bytes > 0 && fallocate(fd, 0, 0, (off_t)bytes) != 0) {
        if (errno == EOPNOTSUPP || errno == EINVAL || errno == ENOSYS) {
            break;
        }
        if (errno != EINTR) {
            return output_failed(path, "reserving space", errno);
        }
    }
    return QS_OK;
}

qs_status qs_io_fsync(int fd, const char *path)
{
    int error = fsync_retrying(fd);
    return error == 0 ? QS_OK : output_failed(path, "fsync", error);
}

qs_status qs_io_close(int fd, const char *path)
{
    int error = close_once(fd);
    return error == 0 ? QS_OK : output_failed(path, "close", error);
}

static qs_status write_and_sync(int fd, const void *data, size_t bytes, const char *path)
{
    QS_TRY(qs_io_reserve(fd, bytes, path));
    QS_TRY(qs_io_write_all(fd, data, bytes, 0, path));
    return qs_io_fsync(fd, path);
}

qs_status qs_io_create(const char *path, int *fd)
{
    *fd = open_retrying(path, O_RDWR | O_CREAT | O_EXCL, 0666);
    if (*fd < 0 && errno == EEXIST) {
        return QS_FAIL(QS_ERR_OUTPUT_TAKEN, "%s: exists already; it is left as it is", path);
    }
    return *fd >= 0 ? QS_OK : output_failed(path, "creating", errno);
}

qs_status qs_io_write_new(const char *path, const void *data, size_t bytes)
{
    int fd = -1;
    QS_TRY(qs_io_create(path, &fd));
    qs_status st = write_and_sync(fd, data, bytes, path);
    qs_status closed = qs_io_close(fd, path);
    st = st != QS_OK ? st : closed;
    if (st == QS_OK) {
        st = read_back(path, data, bytes);
    }
    if (st != QS_OK) {
        (void)unlink(path); /* half a file helps nobody; the first error is the one to report */
    }
    return st;
}

qs_status qs_io_parent(const char *path, char *out, size_t capacity)
{
    const char *slash = strrchr(path, '/');
    size_t length = slash == NULL ? 1 : (slash == path ? 1 : (size_t)(slash - path));
    if (length >= capacity) {
        return QS_FAIL(QS_ERR_IO, "%s: the path is longer than %zu bytes", path, capacity - 1);
    }
    memcpy(out, slash == NULL ? "." : path, length);
    out[length] = '\0';
    return QS_OK;
}

/* A rename puts a plain file in the place of /dev/null or /dev/stdout, for all of a machine. */
static qs_status expect_replaceable(const char *path)
{
    struct stat info;
    return stat(path, &info) != 0 || S_ISREG(info.st_mode) || S_ISDIR(info.st_mode)
               ? QS_OK
               : QS_FAIL(QS_ERR_OUTPUT_TAKEN, "%s: is a device or a pipe; name a file", path);
}

/* What is to become `path`, beside it. */
static qs_status name_temporary(const char *path, char temp[QS_IO_PATH])
{
    if (snprintf(temp, QS_IO_PATH, "%s.tmp-%ld", path, (long)getpid()) >= QS_IO_PATH) {
        return QS_FAIL(QS_ERR_IO, "%s: the path is longer than %d bytes", path, QS_IO_PATH - 1);
    }
    (void)unlink(temp); /* of a killed process that had our number */
    return QS_OK;
}

/* Nothing that somebody may want: no file, an empty one, one of ours. */
static qs_status expect_ours(const char *path, const char *ours)
{
    char start[4096];
    struct stat info;
    if (stat(path, &info) != 0 || info.st_size == 0) {
        return QS_OK;
    }
    const int fd = open_retrying(path, O_RDONLY, 0);
    const ssize_t bytes = fd < 0 ? -1 : read(fd, start, sizeof start);
    if (fd >= 0) {
        (void)close(fd);
    }
    return ours != NULL && bytes > 0 && memmem(start, (size_t)bytes, ours, strlen(ours)) != NULL
               ? QS_OK
               : QS_FAIL(QS_ERR_OUTPUT_TAKEN,
                         "%s: is there already and is not replaced; remove it, or name another",
                         path);
}

qs_status qs_io_try_file(const char *path, const char *ours)
{
    char temp[QS_IO_PATH];
    struct stat info;
    QS_TRY(expect_replaceable(path));
    if (stat(path, &info) == 0 && S_ISDIR(info.st_mode)) {
        return output_failed(path, "writing", EISDIR);
    }
    QS_TRY(expect_ours(path, ours));
    QS_TRY(name_temporary(path, temp));
    const qs_status st = qs_io_write_new(temp, "", 0);
    (void)unlink(temp);
    if (st != QS_OK) {
        qs_error_rename(temp, path);
    }
    return st;
}

qs_status qs_io_replace(const char *path, qs_io_maker make, void *ctx)
{
    char temp[QS_IO_PATH];
    char parent[QS_IO_PATH];
    QS_TRY(expect_replaceable(path));
    QS_TRY(qs_io_parent(path, parent, sizeof parent));
    QS_TRY(name_temporary(path, temp));
    qs_status st = make(temp, ctx);
    st = st != QS_OK ? st : qs_io_rename(temp, path);
    if (st != QS_OK) {
        (void)unlink(temp); /* also when it was created, but reported otherwise */
        return st;
    }
    return qs_io_fsync_dir(parent);
}

typedef struct {
    const void *data;
    size_t bytes;
} content;

static qs_status make_of_bytes(const char *temp, void *ctx)
{
    const content *c = ctx;
    return qs_io_write_new(temp, c->data, c->bytes);
}

qs_status qs_io_write_file(const char *path, const void *data, size_t bytes)
{
    return qs_io_replace(path, make_of_bytes, &(content){.data = data, .bytes = bytes});
}

qs_status qs_io_cut(const char *path, int64_t bytes)
{
    const int fd = open_retrying(path, O_WRONLY, 0);
    int cut;
    if (fd < 0) {
        return output_failed(path, "opening", errno);
    }
    do {
        cut = ftruncate(fd, (off_t)bytes);
    } while (cut != 0 && errno == EINTR);
    const qs_status st =
        cut == 0 ? qs_io_fsync(fd, path) : output_failed(path, "cutting off its end", errno);
    const qs_status closed = qs_io_close(fd, path);
    return st != QS_OK ? st : closed;
}

qs_status qs_io_join(char **path, const char *dir, const char *name)
{
    const size_t bytes = strlen(dir) + strlen(name) + 2;
    *path = malloc(bytes);
    if (*path == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory for a path in it", dir);
    }
    (void)snprintf(*path, bytes, "%s/%s", dir, name);
    return QS_OK;
}

qs_status qs_io_open_plain(const char *path, int *fd, int64_t *bytes)
{
    struct stat info;
    *fd = open_retrying(path, O_RDONLY | O_NONBLOCK, 0); /* a pipe must not make us wait */
    if (*fd < 0) {
        return input_failed(path, "opening", errno);
    }
    qs_status st = QS_OK;
    if (fstat(*fd, &info) != 0) {
        st = input_failed(path, "reading its size", errno);
    } else if (!S_ISREG(info.st_mode)) {
        st = QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: is not a plain file", path);
    } else {
        *bytes = info.st_size;
    }
    if (st != QS_OK) {
        close_once(*fd);
        *fd = -1;
    }
    return st;
}

qs_status qs_io_read_file(const char *path, size_t limit, void **data, size_t *bytes)
{
    qs_status st = QS_OK;
    int64_t there = 0;
    char *buffer = NULL;
    int fd = -1;
    QS_TRY(qs_io_open_plain(path, &fd, &there));
    if ((uint64_t)there > limit) {
        QS_GOTO(QS_FAIL(QS_ERR_INPUT_VALUE, "%s: has %lld bytes; at most %zu are read here", path,
                        (long long)there, limit));
    }
    size_t size = (size_t)there;
    buffer = malloc(size + 1);
    if (buffer == NULL) {
        QS_GOTO(QS_FAIL(QS_ERR_MEMORY, "%s: no memory for its %zu bytes", path, size));
    }
    QS_GOTO(qs_io_read_all(fd, buffer, size, 0, path));
    buffer[size] = '\0';
    *data = buffer;
    *bytes = size;
    buffer = NULL;
done:
    free(buffer);
    close_once(fd);
    return st;
}

qs_status qs_io_open_append(const char *path, int *fd)
{
    *fd = open_retrying(path, O_WRONLY | O_CREAT | O_APPEND, 0666);
    return *fd >= 0 ? QS_OK : output_failed(path, "opening for appending", errno);
}

qs_status qs_io_append(int fd, const char *line, size_t bytes, const char *path)
{
    size_t done = 0;
    const off_t start = lseek(fd, 0, SEEK_END);
    while (
        done <
        bytes) { /* the second round only after a short write, that is on a full disk or a signal */
        ssize_t n = write(fd, line + done, bytes - done);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            const int error = n < 0 ? errno : EIO;
            if (done > 0 && start >= 0 && ftruncate(fd, start) != 0) {
                done = 0; /* half a line stays; the failure to report is the write's */
            }
            return output_failed(path, "appending a line", error);
        }
        done += (size_t)n;
    }
    return QS_OK;
}

qs_status qs_io_fsync_dir(const char *path)
{
    int fd = open_retrying(path, O_RDONLY | O_DIRECTORY, 0);
    if (fd < 0) {
        return output_failed(path, "opening the directory", errno);
    }
    int error = fsync_retrying(fd);
    close_once(fd);
    /* Some file systems have no fsync of directories and say EINVAL. */
    return error == 0 || error == EINVAL ? QS_OK
                                         : output_failed(path, "fsync of the directory", error);
}

/* *made: it was not there. */
static qs_status make_level(const char *path, bool *made)
{
    struct stat info;
    *made = false;
    while (mkdir(path, 0777) != 0) {
        if (errno == EINTR) {
            continue;
        }
        if (errno != EEXIST) {
            return output_failed(path, "creating the directory", errno);
        }
        if (stat(path, &info) == 0 && S_ISDIR(info.st_mode)) {
            return QS_OK;
        }
        return QS_FAIL(QS_ERR_OUTPUT_TAKEN, "%s: exists and is not a directory", path);
    }
    *made = true;
    return QS_OK;
}

qs_status qs_io_mkdir(const char *path)
{
    bool made = false;
    return make_level(path, &made);
}

/* What cannot be looked at is left to the levels below it: making them says what is wrong. */
static bool is_missing(const char *path)
{
    struct stat info;
    return stat(path, &info) != 0 && errno == ENOENT;
}

/* Have the name of a directory that was just made on the disk: what is synced in it later is not to
 * be found without. Where its parent may not be read, nobody can. */
static qs_status sync_name(const char *path)
{
    char copy[QS_IO_PATH];
    (void)snprintf(copy, sizeof copy, "%s", path);
    const char *parent = dirname(copy);
    return access(parent, R_OK) == 0 ? qs_io_fsync_dir(parent) : QS_OK;
}

/* From the top down; last: the lowest level that was made. */
static qs_status make_levels(const char *path, char last[QS_IO_PATH], int *made)
{
    bool is_new = false;
    const char *begin = path + (path[0] == '/');
    for (const char *end = strchr(begin, '/'); end != NULL; end = strchr(end + 1, '/')) {
        char level[QS_IO_PATH];
        (void)snprintf(level, sizeof level, "%.*s", (int)(end - path), path);
        if (end[1] == '/' || end[1] == '\0' || !is_missing(level)) {
            continue; /* at the last slash of several; the lowest level comes behind the loop */
        }
        QS_TRY(make_level(level, &is_new));
        if (is_new) {
            memcpy(last, level, sizeof level);
            ++*made;
            QS_TRY(sync_name(level));
        }
    }
    QS_TRY(make_level(path, &is_new));
    if (is_new) {
        (void)snprintf(last, QS_IO_PATH, "%s", path);
        ++*made;
        QS_TRY(sync_name(path));
    }
    return QS_OK;
}

qs_status qs_io_make_dirs(const char *path, int *made)
{
    char last[QS_IO_PATH] = "";
    *made = 0;
    if (strlen(path) >= sizeof last) {
        return QS_FAIL(QS_ERR_IO, "%s: the path is longer than %zu bytes", path, sizeof last - 1);
    }
    const qs_status st = make_levels(path, last, made);
    if (st != QS_OK) {
        qs_io_take_back_dirs(last, *made);
        *made = 0;
    }
    return st;
}

void qs_io_take_back_dirs(const char *path, int made)
{
    char level[QS_IO_PATH];
    (void)snprintf(level, sizeof level, "%s", path);
    const char *at = level;
    for (; made > 0 && rmdir(at) == 0; made--) {
        at = dirname(level);
    }
}

qs_status qs_io_rename(const char *from, const char *to)
{
    while (rename(from, to) != 0) {
        if (errno != EINTR) {
            char doing[QS_IO_PATH];
            int error = errno;
            if (error == ENOTEMPTY || error == EEXIST) {
                return QS_FAIL(QS_ERR_OUTPUT_TAKEN, "%s: exists already; choose another name", to);
            }
            (void)snprintf(doing, sizeof doing, "renaming to %s", to);
            return output_failed(from, doing, error);
        }
    }
    return QS_OK;
}

static qs_status not_listed(const char *path, qs_status failed, int error)
{
    qs_status st = QS_FAIL(failed, "%s: cannot be listed: %s", path, strerror(error));
    qs_error_because(error);
    return st;
}

qs_status qs_io_list(const char *path, qs_status failed, qs_io_entry *each, void *user, bool *there)
{
    DIR *dir = opendir(path);
    if (there != NULL) {
        *there = dir != NULL;
    }
    if (dir == NULL) {
        return errno == ENOENT ? QS_OK : not_listed(path, failed, errno);
    }
    qs_status st = QS_OK;
    const struct dirent *entry;
    while (st == QS_OK && (errno = 0, entry = readdir(dir)) != NULL) {
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0) {
            st = each(user, dirfd(dir), entry->d_name);
        }
    }
    if (st == QS_OK && errno != 0) { /* the end has none */
        st = not_listed(path, failed, errno);
    }
    (void)closedir(dir);
    return st;
}

bool qs_io_is_removed_open(const char *name)
{
    return strncmp(name, ".nfs", 4) == 0 || strncmp(name, ".fuse_hidden", 12) == 0;
}

/** 0 or an errno; what is not there is removed. */
static int unlink_retrying(int dir, const char *name, int flags)
{
    while (unlinkat(dir, name, flags) != 0) {
        if (errno != EINTR) {
            return errno == ENOENT ? 0 : errno;
        }
    }
    return 0;
}

static qs_status unlink_entry(void *user, int dir, const char *name)
{
    const char *path = user;
    char full[QS_IO_PATH];
    const int error = unlink_retrying(dir, name, 0);
    if (error == 0) {
        return QS_OK;
    }
    (void)snprintf(full, sizeof full, "%s/%s", path, name);
    return output_failed(full, "removing", error);
}

qs_status qs_io_remove(const char *path)
{
    const int error = unlink_retrying(AT_FDCWD, path, 0);
    return error == 0 ? QS_OK : output_failed(path, "removing", error);
}

qs_status qs_io_remove_dir(const char *path)
{
    QS_TRY(qs_io_list(path, QS_ERR_IO, unlink_entry, (void *)path, NULL));
    const int error = unlink_retrying(AT_FDCWD, path, AT_REMOVEDIR);
    return error == 0 ? QS_OK : output_failed(path, "removing the directory", error);
}

qs_status qs_io_free_bytes(const char *path, uint64_t *bytes)
{
    struct statvfs info;
    while (statvfs(path, &info) != 0) {
        if (errno != EINTR) {
            return output_failed(path, "asking for free space", errno);
        }
    }
    *bytes = (uint64_t)info.f_bavail * (uint64_t)info.f_frsize;
    return QS_OK;
}

qs_status qs_io_expect_room(const char *dir, uint64_t bytes, const char *what, const char *remedy)
{
    uint64_t available = 0;
    QS_TRY(qs_io_free_bytes(dir, &available));
    return available >= bytes
               ? QS_OK
               : QS_FAIL(QS_ERR_IO_FULL,
                         "%s: %s needs %" PRIu64 " bytes, but %" PRIu64 " are free; %s", dir, what,
                         bytes, available, remedy);
}
