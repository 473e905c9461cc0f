/* run.lock is written under a name of its own and then linked to its place: link() fails if the
 * place is taken, on network file systems too, and nobody ever sees half a lock.
 *
 * Whether the owner still lives its process number says, among processes that are numbered
 * together: of one kernel and one PID namespace. Host names do not tell: containers and cloned
 * machines share them. Across the containers of a kernel the file itself is asked, which its owner
 * keeps locked (flock). Whoever is on another kernel may live, but for a machine that has been
 * started again since, and an earlier start of the same batch job. */
#define _GNU_SOURCE
#include "ckpt/run_lock.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <jansson.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/log.h"
#include "base/proc.h"
#include "base/timer.h"
#include "config/config.h"
#include "store/io.h"
#include "store/json.h"

enum { LOCK_BYTES_MAX = 4096, PATH_ROOM = QS_PATH_MAX + 64, OWNER_WAIT_S = 5, TEMP_TRIES = 5 };

typedef struct {
    char host[QS_HOST_NAME_BYTES], job[64];
    int64_t pid;
    int64_t born;                  /* start time of the process: a reused pid is another process */
    int64_t restart;               /* how often the batch system has started the job again */
    int64_t kernel, pids, machine; /* numbers of the running kernel, of its PID namespace, of the
                                      machine; 0: not known */
    int64_t held;                  /* 1: it keeps the file locked as long as it lives */
} owner;

/* Field 22 of /proc/PID/stat, in clock ticks since boot; 0 where that is not to be seen, -1 for a
 * process that is dead but has nobody to collect it, as happens in containers. */
static int64_t process_born(int64_t pid)
{
    char path[64], text[1024];
    snprintf(path, sizeof path, "/proc/%" PRId64 "/stat", pid);
    FILE *file = fopen(path, "re");
    if (!file) {
        return 0;
    }
    size_t bytes = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[bytes] = '\0';
    const char *p = strrchr(text, ')'); /* the name may hold anything */
    if (p && (strncmp(p, ") Z", 3) == 0 || strncmp(p, ") X", 3) == 0)) {
        return -1;
    }
    for (int field = 2; p && field < 22; field++) {
        p = strchr(p + 1, ' ');
    }
    return p ? strtoll(p, NULL, 10) : 0;
}

static int64_t environment_number(const char *name)
{
    const char *text = getenv(name);
    return text ? strtoll(text, NULL, 10) : 0;
}

static int64_t file_number(const char *path)
{
    return (int64_t)(qs_proc_file_number(path) & INT64_MAX);
}

static owner this_process(void)
{
    struct stat pids;
    owner me = {.pid = getpid(),
                .restart = environment_number("SLURM_RESTART_COUNT"),
                .kernel = file_number("/proc/sys/kernel/random/boot_id"),
                .machine = file_number("/etc/machine-id"),
                .held = 1};
    me.pids = stat("/proc/self/ns/pid", &pids) == 0 ? (int64_t)pids.st_ino : 0;
    me.born = process_born(me.pid);
    qs_host_name(me.host);
    const char *job = getenv("SLURM_JOB_ID");
    snprintf(me.job, sizeof me.job, "%s", job ? job : "");
    return me;
}

/* A host may get another name while a run goes on (DHCP): it counts where nothing better is known.
 */
static bool same_process(const owner *a, const owner *b)
{
    const bool known = a->kernel != 0 && a->pids != 0 && a->born != 0;
    return a->pid == b->pid && a->born == b->born && a->kernel == b->kernel && a->pids == b->pids &&
           (known || strcmp(a->host, b->host) == 0);
}

/* Locks of older programs have the host's name alone. */
static bool same_host(const owner *a, const owner *b)
{
    return a->kernel != 0 && b->kernel != 0 ? a->kernel == b->kernel
                                            : strcmp(a->host, b->host) == 0;
}

static bool numbered_together(const owner *a, const owner *b)
{
    return same_host(a, b) && (a->pids == b->pids || a->pids == 0 || b->pids == 0);
}

static bool started_again_since(const owner *other, const owner *me)
{
    return strcmp(other->host, me->host) == 0 && !same_host(other, me) && other->machine != 0 &&
           other->machine == me->machine;
}

/* Open and locked, or -1. */
static int hold(const char *path)
{
    const int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd >= 0 && flock(fd, LOCK_EX | LOCK_NB) != 0) {
        close(fd);
        return -1;
    }
    return fd;
}

static bool is_held(const char *path)
{
    const int fd = hold(path);
    if (fd >= 0) {
        close(fd);
    }
    return fd < 0;
}

/* Only what is certain: another user's process may be hidden in /proc (hidepid). */
static bool is_gone(const owner *other, const owner *me, const char *path)
{
    if (numbered_together(other, me)) {
        if (kill((pid_t)other->pid, 0) != 0 && errno == ESRCH) {
            return true;
        }
        const int64_t born = process_born(other->pid);
        return born != 0 ? born != other->born : other->held && !is_held(path);
    }
    if (same_host(other, me) && other->held && !is_held(path)) {
        return true;
    }
    return started_again_since(other, me);
}

/* Of the same batch job, on another kernel. Its host may be cut off, and it may not know yet. */
static bool is_earlier_start(const owner *other, const owner *me)
{
    return !numbered_together(other, me) && me->job[0] && strcmp(other->job, me->job) == 0 &&
           other->restart < me->restart;
}

static void lock_path(char *out, const char *dir)
{
    snprintf(out, PATH_ROOM, "%s/%s", dir, QS_RUN_LOCK_NAME);
}

static qs_status write_owner(const owner *me, const char *path)
{
    json_t *json = json_pack("{s:s, s:s, s:I, s:I, s:I, s:I, s:I, s:I, s:I}", "host", me->host,
                             "job", me->job, "pid", (json_int_t)me->pid, "born",
                             (json_int_t)me->born, "restart", (json_int_t)me->restart, "kernel",
                             (json_int_t)me->kernel, "pids", (json_int_t)me->pids, "machine",
                             (json_int_t)me->machine, "held", (json_int_t)me->held);
    char *text = json ? json_dumps(json, JSON_SORT_KEYS) : NULL;
    json_decref(json);
    if (!text) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory for the lock", path);
    }
    qs_status st = qs_io_write_new(path, text, strlen(text));
    free(text);
    return st;
}

static qs_status optional_i64(const json_t *json, const char *name, int64_t *out, const char *path)
{
    *out = 0;
    return json_object_get(json, name) == NULL ? QS_OK
                                               : qs_json_i64(json, name, 0, INT64_MAX, out, path);
}

static qs_status parse_owner(const char *text, size_t bytes, const char *path, owner *out)
{
    json_t *json = NULL;
    const char *host = NULL, *job = NULL;
    qs_status st = QS_OK;
    QS_GOTO(qs_json_parse(&json, text, bytes, path));
    QS_GOTO(qs_json_text(json, "host", &host, path));
    QS_GOTO(qs_json_text(json, "job", &job, path));
    QS_GOTO(qs_json_i64(json, "pid", 1, INT32_MAX, &out->pid, path));
    QS_GOTO(qs_json_i64(json, "born", 0, INT64_MAX, &out->born, path));
    QS_GOTO(qs_json_i64(json, "restart", 0, INT32_MAX, &out->restart, path));
    snprintf(out->host, sizeof out->host, "%s", host);
    QS_GOTO(optional_i64(json, "kernel", &out->kernel, path));
    QS_GOTO(optional_i64(json, "pids", &out->pids, path));
    QS_GOTO(optional_i64(json, "machine", &out->machine, path));
    QS_GOTO(optional_i64(json, "held", &out->held, path));
    snprintf(out->job, sizeof out->job, "%s", job);
done:
    json_decref(json);
    return st;
}

/* False if there is no lock or none that can be read; then `out` is somebody unknown. */
static bool read_owner(const char *path, owner *out)
{
    void *text = NULL;
    size_t bytes = 0;
    const bool had_error = qs_error_text()[0] != '\0'; /* at the end of a run that failed */
    memset(out, 0, sizeof *out);
    bool good = qs_io_read_file(path, LOCK_BYTES_MAX, &text, &bytes) == QS_OK &&
                parse_owner(text, bytes, path, out) == QS_OK;
    if (!good && !had_error) {
        qs_error_clear();
    }
    free(text);
    return good;
}

/* Under a name of its own. A process that has taken the lock in the meantime sweeps such files away
 * (run_dir.c), which shows here as a file that cannot be read back: then once more. */
static qs_status write_temp(const owner *me, const char *temp)
{
    qs_status st = QS_OK;
    for (int i = 0; i < TEMP_TRIES; i++) {
        qs_error_clear();
        (void)unlink(temp); /* of a process of the same number that was killed here */
        st = write_owner(me, temp);
        if (st != QS_ERR_IO_VERIFY) {
            break;
        }
    }
    return st;
}

/* The same, held: a link to the file is held, too. */
static qs_status write_held_temp(owner *me, const char *temp, int *fd)
{
    if (*fd >= 0) {
        close(*fd); /* of one that is gone */
        *fd = -1;
    }
    QS_TRY(write_temp(me, temp));
    *fd = hold(temp);
    if (*fd < 0 && me->held) { /* no locks on this file system */
        me->held = 0;
        return write_temp(me, temp);
    }
    return QS_OK;
}

/* A file system without hard links has O_EXCL. False where the place is taken. */
static bool create_in_place(const owner *me, const char *path, int *fd, qs_status *st)
{
    *st = write_owner(me, path);
    if (*st == QS_OK && *fd >= 0) {
        close(*fd);
        *fd = hold(path);
    }
    if (*st == QS_ERR_OUTPUT_TAKEN) {
        qs_error_clear();
        *st = QS_OK;
        return false;
    }
    return true;
}

/* Move the old lock aside and look again: if another process has taken it over in between, it is
 * put back. */
static qs_status remove_stale(const char *path, const owner *stale)
{
    char aside[PATH_ROOM + 32];
    owner moved;
    snprintf(aside, sizeof aside, "%s.%ld", path, (long)getpid());
    if (rename(path, aside) != 0 && errno != ENOENT) {
        return QS_FAIL(QS_ERR_IO, "%s: cannot be taken over: %s", path, strerror(errno));
    }
    if (read_owner(aside, &moved) && !same_process(&moved, stale)) {
        if (link(aside, path) != 0 && errno != EEXIST) {
            (void)rename(aside, path); /* no hard links here */
        }
    }
    (void)unlink(aside);
    return QS_OK;
}

static qs_status taken(const char *dir, const char *path, const owner *other, const owner *me,
                       bool readable)
{
    if (!readable) {
        return QS_FAIL(QS_ERR_OUTPUT_TAKEN,
                       "%s: %s cannot be read, so another run may write here; if none does, use "
                       "--takeover",
                       dir, path);
    }
    return QS_FAIL(QS_ERR_OUTPUT_TAKEN,
                   "%s: process %" PRId64 " on host %s%s%s%s writes here; wait for it, or use "
                   "--takeover if it is gone",
                   dir, other->pid, other->host,
                   same_host(other, me) && !numbered_together(other, me) ? " in another container"
                                                                         : "",
                   other->job[0] ? ", job " : "", other->job);
}

/* Link `temp` to its place, after removing a lock that does not count. The ranks of a launcher that
 * was killed are gone a few seconds later, so an owner on this host gets that time. */
static qs_status put_in_place(const char *dir, const char *temp, const char *path, owner *me,
                              bool takeover, int *fd, bool *contested)
{
    const double deadline = qs_time_s() + OWNER_WAIT_S;
    for (;;) {
        if (link(temp, path) == 0) {
            return QS_OK;
        }
        if (errno == ENOENT) { /* swept away, or the directory is gone, which writing will say */
            QS_TRY(write_held_temp(me, temp, fd));
            continue;
        }
        qs_status st = QS_OK;
        if (errno != EEXIST && create_in_place(me, path, fd, &st)) {
            return st;
        }
        owner other;
        bool readable = read_owner(path, &other);
        struct stat info;
        if (!readable && lstat(path, &info) != 0) { /* a link to nothing would never go */
            continue;                               /* released a moment ago */
        }
        const bool gone = readable && is_gone(&other, me, path);
        if (takeover || gone || (readable && is_earlier_start(&other, me))) {
            *contested = *contested || !gone;
            qs_log_info("%s: taken over from process %" PRId64 " on host %s", path, other.pid,
                        readable ? other.host : "(unknown)");
            QS_TRY(remove_stale(path, &other));
            continue;
        }
        const bool here = readable && same_host(&other, me);
        if (!here || qs_time_s() >= deadline) {
            return taken(dir, path, &other, me, readable);
        }
        usleep(100000);
    }
}

qs_status qs_run_lock_take(const char *dir, bool takeover, int *fd, bool *contested)
{
    char path[PATH_ROOM], temp[PATH_ROOM + 32];
    owner me = this_process();
    lock_path(path, dir);
    snprintf(temp, sizeof temp, "%s.new-%ld", path, (long)getpid());
    *fd = -1;
    *contested = false;
    qs_status st = write_held_temp(&me, temp, fd);
    if (st == QS_OK) {
        st = put_in_place(dir, temp, path, &me, takeover, fd, contested);
    }
    (void)unlink(temp);
    if (st != QS_OK && *fd >= 0) {
        close(*fd);
        *fd = -1;
    }
    return st;
}

void qs_run_lock_release(const char *dir, int fd)
{
    char path[PATH_ROOM];
    owner holder, me = this_process();
    lock_path(path, dir);
    if (read_owner(path, &holder) && same_process(&holder, &me)) {
        (void)unlink(path);
    }
    if (fd >= 0) {
        close(fd);
    }
}

qs_status qs_run_lock_check(const char *dir)
{
    char path[PATH_ROOM];
    owner holder, me = this_process();
    lock_path(path, dir);
    if (!read_owner(path, &holder) || same_process(&holder, &me)) {
        return QS_OK;
    }
    return QS_FAIL(QS_ERR_OUTPUT_TAKEN,
                   "%s: process %" PRId64
                   " on host %s%s%s has taken over and writes here now; this "
                   "run ends and leaves the rest to it",
                   dir, holder.pid, holder.host, holder.job[0] ? ", job " : "", holder.job);
}

int qs_run_lock_text(const char *dir, char *out, size_t capacity)
{
    char path[PATH_ROOM];
    lock_path(path, dir);
    out[0] = '\0';
    FILE *file = fopen(path, "re");
    if (file == NULL) {
        return errno;
    }
    const size_t bytes = fread(out, 1, capacity - 1, file);
    out[bytes] = '\0';
    const int error = ferror(file) ? EIO : 0;
    fclose(file);
    return error;
}
