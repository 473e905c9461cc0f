#include "store/temp.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "base/log.h"

enum { PATH_ROOM = 4096 + 64, STALE_AFTER_S = 600, TRIES = 100, DEPTH = 2 };

/* ---- signals: nothing here allocates or takes a lock ---- */

static const int ending[] = {SIGINT, SIGTERM, SIGHUP};
enum { ENDING = sizeof ending / sizeof *ending };

static char guarded[PATH_ROOM];
static volatile sig_atomic_t armed;
static bool taken[ENDING];

/* opendir allocates, so the kernel is asked, whose record on 64 bits is the library's. */
_Static_assert(offsetof(struct dirent, d_reclen) == 16 && offsetof(struct dirent, d_name) == 19,
               "struct dirent is what getdents64 fills");

static bool is_itself(const char *name)
{
    return strcmp(name, ".") == 0 || strcmp(name, "..") == 0;
}

/* A file, or a directory `depth` deep at most. Again, as long as another thread puts files in, or a
 * listing that was changed skipped some. */
static bool remove_whole(int parent, const char *name, int depth)
{
    if (unlinkat(parent, name, 0) == 0) {
        return true;
    }
    if (depth == 0 || (errno != EISDIR && errno != EPERM)) {
        return false;
    }
    for (int i = 0; i < TRIES; i++) {
        if (unlinkat(parent, name, AT_REMOVEDIR) == 0) {
            return true;
        }
        const int dir = errno == ENOTEMPTY || errno == EEXIST
                            ? openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC)
                            : -1;
        if (dir < 0) {
            return false;
        }
        _Alignas(struct dirent) char entries[4096];
        long bytes;
        while ((bytes = syscall(SYS_getdents64, dir, entries, sizeof entries)) > 0) {
            for (long at = 0; at < bytes;) {
                const struct dirent *entry = (const void *)(entries + at);
                if (!is_itself(entry->d_name)) {
                    (void)remove_whole(dir, entry->d_name, depth - 1);
                }
                at += entry->d_reclen;
            }
        }
        (void)close(dir);
    }
    return false;
}

/* The default action is back already (SA_RESETHAND): a second signal does not wait for the first,
 * and raising this one again ends the process with the code that a shell knows. */
static void on_signal(int number)
{
    if (armed) {
        (void)remove_whole(AT_FDCWD, guarded, DEPTH);
    }
    (void)raise(number);
}

void qs_temp_guard(const char *path)
{
    struct sigaction action = {.sa_handler = on_signal,
                               .sa_flags = (int)(SA_RESETHAND | SA_NODEFER)};
    struct sigaction old;
    sigemptyset(&action.sa_mask);
    armed = 0;
    if (snprintf(guarded, sizeof guarded, "%s", path) >= (int)sizeof guarded) {
        return; /* no such name can be written */
    }
    armed = 1;
    for (int i = 0; i < ENDING; i++) {
        taken[i] = taken[i] || (sigaction(ending[i], NULL, &old) == 0 &&
                                (old.sa_flags & SA_SIGINFO) == 0 && old.sa_handler == SIG_DFL);
        if (taken[i]) {
            (void)sigaction(ending[i], &action, NULL);
        }
    }
}

void qs_temp_release(void)
{
    armed = 0;
    for (int i = 0; i < ENDING; i++) {
        if (taken[i]) {
            (void)signal(ending[i], SIG_DFL);
        }
        taken[i] = false;
    }
}

/* ---- leftovers ---- */

int qs_temp_pid(const char *entry, const char *name, const char *mark)
{
    const size_t length = strlen(name), marked = length + strlen(mark);
    if (strncmp(entry, name, length) != 0 || strncmp(entry + length, mark, marked - length) != 0) {
        return 0;
    }
    const char *number = entry + marked;
    const size_t digits = strspn(number, "0123456789");
    const long pid = digits > 0 && number[digits] == '\0' ? strtol(number, NULL, 10) : 0;
    return pid <= INT_MAX ? (int)pid : 0; /* more than a pid_t holds */
}

/* Is this a plain file that nobody has written into of late? */
static bool old_file(int dir, const char *name)
{
    struct stat info;
    return fstatat(dir, name, &info, AT_SYMLINK_NOFOLLOW) == 0 && S_ISREG(info.st_mode) &&
           time(NULL) - info.st_mtime > STALE_AFTER_S;
}

/* Likewise a directory in which all are such, or that one directory: a command makes no other. */
static bool old_directory(int parent, const char *name, const char *inner)
{
    struct stat info;
    const struct dirent *entry;
    const int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    DIR *dir = fd >= 0 ? fdopendir(fd) : NULL;
    bool old = dir != NULL && fstat(fd, &info) == 0 && time(NULL) - info.st_mtime > STALE_AFTER_S;
    while (old && (entry = readdir(dir)) != NULL) {
        const bool is_inner = inner != NULL && strcmp(entry->d_name, inner) == 0;
        old = is_itself(entry->d_name) || old_file(fd, entry->d_name) ||
              (is_inner && old_directory(fd, inner, NULL));
    }
    if (dir != NULL) {
        closedir(dir);
    } else if (fd >= 0) {
        (void)close(fd);
    }
    return old;
}

/* OUTPUT without slashes at its end, cut into directory and name. */
void qs_temp_remove_stale(const char *output, const char *inner)
{
    char *first = strdup(output), *second = strdup(output);
    const char *parent = first != NULL ? dirname(first) : NULL;
    const char *name = second != NULL ? basename(second) : NULL;
    DIR *dir = parent != NULL && name != NULL ? opendir(parent) : NULL;
    const struct dirent *entry;
    while (dir != NULL && (entry = readdir(dir)) != NULL) {
        const int pid = qs_temp_pid(entry->d_name, name, QS_TEMP_MARK);
        if (pid > 0 && kill(pid, 0) != 0 && errno == ESRCH &&
            (old_file(dirfd(dir), entry->d_name) ||
             old_directory(dirfd(dir), entry->d_name, inner)) &&
            remove_whole(dirfd(dir), entry->d_name, DEPTH)) {
            qs_log_info("%s/%s: removed, left by a killed run", parent, entry->d_name);
        }
    }
    if (dir != NULL) {
        closedir(dir);
    }
    free(first);
    free(second);
}
