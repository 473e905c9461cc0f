/* A library for LD_PRELOAD that does what network file systems do and a local one does not.
 *
 * With NETFS=hidden a file that is removed while this process has it open is renamed instead, to
 * .nfs and a number beside it, and goes away when it is closed (NFS, FUSE). With NETFS=list:NAME a
 * listing fails with EIO where an entry comes whose name begins with NAME. NETFS_PATH=TEXT looks
 * only at paths that contain TEXT. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { PATH_BYTES = 4096, DESCRIPTORS = 1024 };

static const char *wish, *path_part;

__attribute__((constructor)) static void read_environment(void)
{
    wish = getenv("NETFS") != NULL ? getenv("NETFS") : "";
    path_part = getenv("NETFS_PATH") != NULL ? getenv("NETFS_PATH") : "";
}

#define NEXT(name)                                                                                 \
    static __typeof__(name) *real;                                                                 \
    if (real == NULL) {                                                                            \
        real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name);                                        \
    }

/* "" for what has none. */
static void path_of(int fd, char path[PATH_BYTES])
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    const ssize_t n = readlink(link, path, PATH_BYTES - 1);
    path[n > 0 ? n : 0] = '\0';
}

/* By this name, which is what a network file system looks at; besides as `not_this`. */
static bool is_open(const struct stat *file, const char *name, int not_this)
{
    struct stat info;
    char path[PATH_BYTES];
    const char *slash = strrchr(name, '/');
    const char *bare = slash != NULL ? slash + 1 : name;
    bool found = false;
    for (int fd = 0; fd < DESCRIPTORS && !found; fd++) {
        if (fd != not_this && fstat(fd, &info) == 0 && info.st_dev == file->st_dev &&
            info.st_ino == file->st_ino) {
            path_of(fd, path);
            slash = strrchr(path, '/');
            found = slash != NULL && strcmp(slash + 1, bare) == 0;
        }
    }
    return found;
}

static bool concerns(int dir, const char *name)
{
    char path[PATH_BYTES] = "";
    if (dir != AT_FDCWD) {
        path_of(dir, path);
    }
    return strstr(path, path_part) != NULL || strstr(name, path_part) != NULL;
}

/* Renamed instead: true. */
static bool hide(int dir, const char *name)
{
    static int number;
    char hidden[PATH_BYTES];
    struct stat info;
    if (strcmp(wish, "hidden") != 0 || !concerns(dir, name) ||
        fstatat(dir, name, &info, AT_SYMLINK_NOFOLLOW) != 0 || !S_ISREG(info.st_mode) ||
        !is_open(&info, name, -1)) {
        return false;
    }
    const char *slash = strrchr(name, '/');
    snprintf(hidden, sizeof hidden, "%.*s.nfs%04d", slash != NULL ? (int)(slash - name + 1) : 0,
             name, ++number);
    return renameat(dir, name, dir, hidden) == 0;
}

int unlink(const char *path)
{
    NEXT(unlink)
    return hide(AT_FDCWD, path) ? 0 : real(path);
}

int unlinkat(int dir, const char *path, int flags)
{
    NEXT(unlinkat)
    return flags == 0 && hide(dir, path) ? 0 : real(dir, path, flags);
}

int close(int fd)
{
    NEXT(close)
    char path[PATH_BYTES];
    struct stat info;
    path_of(fd, path);
    const char *slash = strrchr(path, '/');
    if (strcmp(wish, "hidden") == 0 && slash != NULL && strncmp(slash + 1, ".nfs", 4) == 0 &&
        fstat(fd, &info) == 0 && !is_open(&info, path, fd)) {
        (void)syscall(SYS_unlink, path); /* not hidden again */
    }
    return real(fd);
}

struct dirent *readdir(DIR *dir)
{
    NEXT(readdir)
    struct dirent *entry = real(dir);
    if (entry != NULL && strncmp(wish, "list:", 5) == 0 && concerns(dirfd(dir), "") &&
        strncmp(entry->d_name, wish + 5, strlen(wish + 5)) == 0) {
        errno = EIO;
        return NULL;
    }
    return entry;
}
