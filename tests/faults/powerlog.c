/* A library for LD_PRELOAD that notes what would be left if the power failed.
 *
 * With POWER_ROOT=DIR and POWER_LOG=DIR2 each fsync of a file or directory in DIR leaves two files
 * in DIR2, both named by the time, so that those of several processes stand in one order:
 *
 *   TIME.names      just before it: all there is in DIR, "INODE KIND BYTES PATH", each with a NUL
 *   TIME.d-INODE    what is on the disk from then on of a directory: "INODE KIND BYTES NAME", or
 *   TIME.f-INODE    of a file: its bytes
 *
 * A name that its directory has not been synced with, and bytes that no fsync has followed, are on
 * no disk. tests/e2e/test_power.py builds folders of it. Inodes must not be used again: tmpfs. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { PATH_BYTES = 4096, NAME_BYTES = PATH_BYTES + 64, PIECE_BYTES = 1 << 16, DESCRIPTORS = 16 };

static FILE *listing;

static void must(int good, const char *what)
{
    if (!good) {
        perror(what);
        _exit(99);
    }
}

static void list(const struct stat *info, const char *name)
{
    fprintf(listing, "%lu %c %lld %s%c", (unsigned long)info->st_ino,
            S_ISDIR(info->st_mode) ? 'd' : 'f', (long long)info->st_size, name, '\0');
}

static int list_path(const char *path, const struct stat *info, int type, struct FTW *ftw)
{
    (void)ftw;
    if (type != FTW_NS) { /* another process has removed it meanwhile */
        list(info, path);
    }
    return 0;
}

static void copy_directory(const char *path, const char *to)
{
    const struct dirent *entry;
    struct stat info;
    DIR *dir = opendir(path);
    listing = fopen(to, "we");
    must(dir != NULL && listing != NULL, to);
    while ((entry = readdir(dir)) != NULL) {
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0 &&
            fstatat(dirfd(dir), entry->d_name, &info, AT_SYMLINK_NOFOLLOW) == 0) {
            list(&info, entry->d_name);
        }
    }
    closedir(dir);
    must(fclose(listing) == 0, to);
}

/* By another descriptor: this one may be for writing only. */
static void copy_file(const char *path, const char *to)
{
    char piece[PIECE_BYTES];
    ssize_t bytes;
    const int in = open(path, O_RDONLY | O_CLOEXEC);
    const int out = open(to, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    must(in >= 0 && out >= 0, to);
    while ((bytes = read(in, piece, sizeof piece)) > 0) {
        must(write(out, piece, (size_t)bytes) == bytes, to);
    }
    close(in);
    close(out);
}

/* False: not in the folder that is looked at. */
static int name_of(int fd, char path[PATH_BYTES])
{
    char link[64];
    const char *root = getenv("POWER_ROOT");
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    const ssize_t n = readlink(link, path, PATH_BYTES - 1);
    path[n > 0 ? n : 0] = '\0';
    return root != NULL && strncmp(path, root, strlen(root)) == 0;
}

static int synced(int fd, const char *call)
{
    char path[PATH_BYTES], to[NAME_BYTES];
    struct timespec now;
    struct stat info;
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, call);
    if (!name_of(fd, path)) {
        return real(fd);
    }
    clock_gettime(CLOCK_MONOTONIC, &now);
    const int length = snprintf(to, sizeof to, "%s/%012lld%09ld", getenv("POWER_LOG"),
                                (long long)now.tv_sec, now.tv_nsec);
    snprintf(to + length, sizeof to - (size_t)length, ".names");
    listing = fopen(to, "we");
    must(listing != NULL, to);
    nftw(getenv("POWER_ROOT"), list_path, DESCRIPTORS, FTW_PHYS);
    must(fclose(listing) == 0 && fstat(fd, &info) == 0, to);
    const int result = real(fd);
    const int is_directory = S_ISDIR(info.st_mode);
    snprintf(to + length, sizeof to - (size_t)length, ".%c-%lu", is_directory ? 'd' : 'f',
             (unsigned long)info.st_ino);
    (is_directory ? copy_directory : copy_file)(path, to);
    return result;
}

int fsync(int fd)
{
    return synced(fd, "fsync");
}

int fdatasync(int fd)
{
    return synced(fd, "fdatasync");
}
