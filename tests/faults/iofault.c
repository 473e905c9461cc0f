/* A library for LD_PRELOAD that makes one call of the file I/O fail.
 *
 *     FAULT=io:count        say on stderr at exit how many calls there were: "iofault: calls 37"
 *     FAULT=io:N:KIND       the N-th call (from 1) fails once
 *     FAULT=io:N:KIND+      all fail from the N-th on
 *     FAULT=read:...        likewise of calls that read: pread; KIND is an errno
 *     FAULT_PATH=TEXT       look only at calls on paths that contain TEXT
 *     FAULT_RANK=R          only in the process with OMPI_COMM_WORLD_RANK or PMIX_RANK = R
 *
 * KIND is an errno (EIO ENOSPC EDQUOT EINTR ESTALE EROFS EOPNOTSUPP), `late` (done, but EIO is
 * reported, as network file systems do), `killbefore` or `killafter` (SIGKILL), `intbefore`,
 * `termbefore` (SIGINT, SIGTERM), or what becomes of a write, other calls being left alone: `short`
 * (half the bytes), `flip` (a bit is another), `lost` (none, and success), `stale` (for a pwrite:
 * when the file is next closed, up to a page of what was there before comes back, as from the cache
 * of a host that had read it).
 *
 * Calls: write, pwrite, fsync, fdatasync, close, rename, fallocate, ftruncate, mkdir, open with
 * O_CREAT, unlink, unlinkat, rmdir. A fault that strikes is announced: "iofault: call 7 pwrite
 * /tmp/x/file: EIO". */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

enum {
    PATH_BYTES = 4096,
    LATE = -1,
    SHORT = -2,
    KILL_BEFORE = -3,
    KILL_AFTER = -4,
    FLIP = -5,
    LOST = -6,
    INT_BEFORE = -7,
    TERM_BEFORE = -8,
    STALE = -9,
    PAGE = 4096
};

static bool active, counting, for_good;
static bool of_reads; /* they are counted, and the others are not */
static long target;
static int kind; /* an errno, or one of the above */
static const char *kind_name = "";
static const char *path_part = "";
static atomic_long calls;

static const struct {
    const char *name;
    int kind;
} kinds[] = {{"EIO", EIO},
             {"ENOSPC", ENOSPC},
             {"EDQUOT", EDQUOT},
             {"EINTR", EINTR},
             {"ESTALE", ESTALE},
             {"EROFS", EROFS},
             {"EOPNOTSUPP", EOPNOTSUPP},
             {"late", LATE},
             {"short", SHORT},
             {"killbefore", KILL_BEFORE},
             {"killafter", KILL_AFTER},
             {"flip", FLIP},
             {"lost", LOST},
             {"stale", STALE},
             {"intbefore", INT_BEFORE},
             {"termbefore", TERM_BEFORE}};

static bool other_rank(void)
{
    const char *wanted = getenv("FAULT_RANK");
    const char *rank = getenv("OMPI_COMM_WORLD_RANK");
    rank = rank != NULL ? rank : getenv("PMIX_RANK");
    return wanted != NULL && strcmp(wanted, rank != NULL ? rank : "0") != 0;
}

__attribute__((constructor)) static void read_environment(void)
{
    const char *fault = getenv("FAULT");
    of_reads = fault != NULL && strncmp(fault, "read:", 5) == 0;
    if (fault == NULL || (!of_reads && strncmp(fault, "io:", 3) != 0) || other_rank()) {
        return;
    }
    fault = strchr(fault, ':') + 1;
    if (getenv("FAULT_PATH") != NULL) {
        path_part = getenv("FAULT_PATH");
    }
    counting = strcmp(fault, "count") == 0;
    active = true;
    if (counting) {
        return;
    }
    char *end = NULL;
    target = strtol(fault, &end, 10);
    for (size_t i = 0; *end == ':' && i < sizeof kinds / sizeof *kinds; i++) {
        size_t length = strlen(kinds[i].name);
        if (strncmp(end + 1, kinds[i].name, length) == 0 && strchr("+", end[1 + length]) != NULL) {
            kind = kinds[i].kind;
            kind_name = kinds[i].name;
            for_good = end[1 + length] == '+';
        }
    }
    if (target < 1 || kind == 0 || (of_reads && kind < 0)) {
        fprintf(stderr, "iofault: FAULT=...:%s is not io:count or io:N:KIND\n", fault);
        _exit(99);
    }
}

__attribute__((destructor)) static void report(void)
{
    if (counting) {
        fprintf(stderr, "iofault: calls %ld\n", atomic_load(&calls));
    }
}

/** Count a call on `path`; true if it is the one to fail. Kills before the call. */
static bool strikes(const char *call, const char *path)
{
    if (!active || of_reads != (strcmp(call, "pread") == 0) || path[0] != '/' ||
        strncmp(path, "/dev/pts", 8) == 0 || strcmp(path, "/dev/null") == 0 ||
        strstr(path, path_part) == NULL) {
        return false;
    }
    long n = atomic_fetch_add(&calls, 1) + 1;
    if (counting || n < target || (n > target && !for_good)) {
        return false;
    }
    char line[PATH_BYTES + 100];
    int length =
        snprintf(line, sizeof line, "iofault: call %ld %s %s: %s\n", n, call, path, kind_name);
    if (syscall(SYS_write, 2 /* without passing through here */, line, (size_t)length) < 0) {
        /* nobody listens */
    }
    if (kind == KILL_BEFORE || kind == INT_BEFORE || kind == TERM_BEFORE) {
        raise(kind == KILL_BEFORE ? SIGKILL : kind == INT_BEFORE ? SIGINT : SIGTERM);
    }
    return true;
}

static void path_of(int fd, char path[PATH_BYTES])
{
    char link[64];
    int saved = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, PATH_BYTES - 1);
    path[n > 0 ? n : 0] = '\0';
    errno = saved;
}

static bool strikes_fd(const char *call, int fd)
{
    char path[PATH_BYTES];
    if (!active) {
        return false;
    }
    path_of(fd, path);
    return strikes(call, path);
}

static bool strikes_path(const char *call, const char *path)
{
    char absolute[2 * PATH_BYTES];
    char here[PATH_BYTES];
    if (!active || path[0] == '/') {
        return strikes(call, path);
    }
    snprintf(absolute, sizeof absolute, "%s/%s", getcwd(here, sizeof here) != NULL ? here : "",
             path);
    return strikes(call, absolute);
}

/** What a struck call that returns -1 and errno does; `result` is the real call, made where the
 * kind wants that. */
#define STRUCK(result)                                                                             \
    do {                                                                                           \
        if (kind > 0) {                                                                            \
            errno = kind;                                                                          \
            return -1;                                                                             \
        }                                                                                          \
        __typeof__(result) done_ = (result);                                                       \
        if (kind == KILL_AFTER) {                                                                  \
            raise(SIGKILL);                                                                        \
        }                                                                                          \
        if (kind == LATE) {                                                                        \
            errno = EIO;                                                                           \
            return -1;                                                                             \
        }                                                                                          \
        return done_;                                                                              \
    } while (0)

/** The next definition of a function: the C library's, or a sanitizer's on the way there. */
#define NEXT(name)                                                                                 \
    static __typeof__(name) *real;                                                                 \
    if (real == NULL) {                                                                            \
        real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name);                                        \
    }

typedef ssize_t (*pwrite_fn)(int fd, const void *data, size_t bytes, off64_t offset);

/** What a host that had read a page before it was written still has of it. */
static struct {
    char path[PATH_BYTES]; /* "": nothing */
    char page[PAGE];
    size_t bytes;
    off64_t offset;
} held;

static void hold(int fd, size_t bytes, off64_t offset)
{
    path_of(fd, held.path);
    held.offset = offset;
    held.bytes = bytes < PAGE ? bytes : PAGE;
    memset(held.page, 0, sizeof held.page);
    if (pread64(fd, held.page, held.bytes, offset) < 0) {
        /* as behind the end of the file: zeros */
    }
}

static void give_back(int fd)
{
    char path[PATH_BYTES];
    path_of(fd, path);
    if (held.path[0] == '\0' || strcmp(path, held.path) != 0) {
        return;
    }
    held.path[0] = '\0';
    if (syscall(SYS_pwrite64, fd, held.page, held.bytes, held.offset) < 0) {
        fprintf(stderr, "iofault: %s: the old page cannot be written: %s\n", path, strerror(errno));
        _exit(99);
    }
}

/** What a struck write does; `offset` is -1 for write(). */
static ssize_t struck_write(ssize_t (*plain)(int, const void *, size_t), pwrite_fn at, int fd,
                            const void *data, size_t bytes, off64_t offset)
{
    char *copy = NULL;
    if (kind == LOST) {
        return (ssize_t)bytes;
    }
    if (kind == STALE && offset >= 0) {
        hold(fd, bytes, offset);
    }
    if (kind == SHORT && bytes > 1) {
        bytes /= 2;
    }
    if (kind == FLIP && bytes > 0 && (copy = malloc(bytes)) != NULL) {
        memcpy(copy, data, bytes);
        copy[bytes / 2] ^= 4;
        data = copy;
    }
    if (kind > 0) {
        errno = kind;
        return -1;
    }
    ssize_t done = offset < 0 ? plain(fd, data, bytes) : at(fd, data, bytes, offset);
    free(copy);
    if (kind == KILL_AFTER) {
        raise(SIGKILL);
    }
    if (kind == LATE) {
        errno = EIO;
        return -1;
    }
    return done;
}

ssize_t write(int fd, const void *data, size_t bytes)
{
    NEXT(write)
    return strikes_fd("write", fd) ? struck_write(real, NULL, fd, data, bytes, -1)
                                   : real(fd, data, bytes);
}

ssize_t pwrite(int fd, const void *data, size_t bytes, off_t offset)
{
    NEXT(pwrite)
    return strikes_fd("pwrite", fd) ? struck_write(NULL, real, fd, data, bytes, offset)
                                    : real(fd, data, bytes, offset);
}

ssize_t pwrite64(int fd, const void *data, size_t bytes, off64_t offset)
{
    NEXT(pwrite64)
    return strikes_fd("pwrite", fd) ? struck_write(NULL, real, fd, data, bytes, offset)
                                    : real(fd, data, bytes, offset);
}

ssize_t pread(int fd, void *data, size_t bytes, off_t offset)
{
    NEXT(pread)
    if (!strikes_fd("pread", fd)) {
        return real(fd, data, bytes, offset);
    }
    STRUCK(real(fd, data, bytes, offset));
}

ssize_t pread64(int fd, void *data, size_t bytes, off64_t offset)
{
    NEXT(pread64)
    if (!strikes_fd("pread", fd)) {
        return real(fd, data, bytes, offset);
    }
    STRUCK(real(fd, data, bytes, offset));
}

int fsync(int fd)
{
    NEXT(fsync)
    if (!strikes_fd("fsync", fd)) {
        return real(fd);
    }
    STRUCK(real(fd));
}

int fdatasync(int fd)
{
    NEXT(fdatasync)
    if (!strikes_fd("fdatasync", fd)) {
        return real(fd);
    }
    STRUCK(real(fd));
}

int ftruncate(int fd, off_t length)
{
    NEXT(ftruncate)
    if (!strikes_fd("ftruncate", fd)) {
        return real(fd, length);
    }
    STRUCK(real(fd, length));
}

int ftruncate64(int fd, off64_t length)
{
    NEXT(ftruncate64)
    if (!strikes_fd("ftruncate", fd)) {
        return real(fd, length);
    }
    STRUCK(real(fd, length));
}

/** Linux releases the descriptor whatever it reports. */
int close(int fd)
{
    NEXT(close)
    if (held.path[0] != '\0') {
        give_back(fd);
    }
    if (!strikes_fd("close", fd)) {
        return real(fd);
    }
    if (kind > 0) {
        real(fd);
    }
    STRUCK(real(fd));
}

int rename(const char *from, const char *to)
{
    NEXT(rename)
    if (!strikes_path("rename", from)) {
        return real(from, to);
    }
    STRUCK(real(from, to));
}

int mkdir(const char *path, mode_t mode)
{
    NEXT(mkdir)
    if (!strikes_path("mkdir", path)) {
        return real(path, mode);
    }
    STRUCK(real(path, mode));
}

int unlink(const char *path)
{
    NEXT(unlink)
    if (!strikes_path("unlink", path)) {
        return real(path);
    }
    STRUCK(real(path));
}

int unlinkat(int dir, const char *path, int flags)
{
    NEXT(unlinkat)
    if (!strikes_fd("unlinkat", dir)) {
        return real(dir, path, flags);
    }
    STRUCK(real(dir, path, flags));
}

int rmdir(const char *path)
{
    NEXT(rmdir)
    if (!strikes_path("rmdir", path)) {
        return real(path);
    }
    STRUCK(real(path));
}

int open(const char *path, int flags, ...)
{
    NEXT(open)
    va_list args;
    va_start(args, flags);
    mode_t mode = (flags & O_CREAT) != 0 ? va_arg(args, mode_t) : 0;
    va_end(args);
    if ((flags & O_CREAT) == 0 || !strikes_path("open", path)) {
        return real(path, flags, mode);
    }
    STRUCK(real(path, flags, mode));
}

int open64(const char *path, int flags, ...)
{
    NEXT(open64)
    va_list args;
    va_start(args, flags);
    mode_t mode = (flags & O_CREAT) != 0 ? va_arg(args, mode_t) : 0;
    va_end(args);
    if ((flags & O_CREAT) == 0 || !strikes_path("open", path)) {
        return real(path, flags, mode);
    }
    STRUCK(real(path, flags, mode));
}

int fallocate(int fd, int mode, off_t offset, off_t length)
{
    NEXT(fallocate)
    if (!strikes_fd("fallocate", fd)) {
        return real(fd, mode, offset, length);
    }
    STRUCK(real(fd, mode, offset, length));
}

int fallocate64(int fd, int mode, off64_t offset, off64_t length)
{
    NEXT(fallocate64)
    if (!strikes_fd("fallocate", fd)) {
        return real(fd, mode, offset, length);
    }
    STRUCK(real(fd, mode, offset, length));
}
