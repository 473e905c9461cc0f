#include "store/input.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { FOLDER_SHOWN = 512 };

/* 0, or the errno that says why not. */
static int try_open(const char *path)
{
    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe must not make us wait */
    if (fd < 0) {
        return errno;
    }
    (void)close(fd); /* read only */
    return 0;
}

/* A relative path is most often meant from somewhere else, or for a shell. */
static qs_status not_there(const char *key, const char *path, const char *remedy)
{
    char folder[FOLDER_SHOWN];
    struct stat info;
    if (lstat(path, &info) == 0 && S_ISLNK(info.st_mode)) {
        return QS_FAIL(QS_ERR_INPUT_MISSING, "%s: %s: is a link to what is not there; %s", key,
                       path, remedy);
    }
    if (path[0] == '/' || getcwd(folder, sizeof folder) == NULL) {
        return QS_FAIL(QS_ERR_INPUT_MISSING, "%s: %s: is not there; %s", key, path, remedy);
    }
    return QS_FAIL(QS_ERR_INPUT_MISSING,
                   "%s: %s: not in %s (paths start where qshard was started; ~ and $VARIABLES are "
                   "not expanded); %s",
                   key, path, folder, remedy);
}

static qs_status refuse(const char *key, const char *path, const char *remedy, int error)
{
    return error == ENOENT || error == ENOTDIR
               ? not_there(key, path, remedy)
               : QS_FAIL(QS_ERR_INPUT_MISSING, "%s: %s: cannot be opened: %s", key, path,
                         strerror(error));
}

qs_status qs_input_expect_here(const char *key, const char *path, const char *remedy)
{
    const int error = try_open(path);
    return error == 0 ? QS_OK : refuse(key, path, remedy, error);
}

qs_status qs_input_expect(const char *key, const char *path, const char *remedy, qs_comm *comm)
{
    const int error = try_open(path);
    int64_t seen = error == 0;
    QS_TRY(qs_comm_max_i64(comm, &seen, 1));
    return qs_comm_agree(comm, seen == 0 ? refuse(key, path, remedy, error) : QS_OK);
}
