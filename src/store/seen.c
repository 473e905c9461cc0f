#include "store/seen.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"
#include "base/proc.h"
#include "store/io.h"
#include "store/relay.h"

enum { MARK_MAX_BYTES = 192, NAMED_HOSTS = 3 };
enum { SERVED_BYTES = 16 << 20, PIECE_MIN_BYTES = 64 << 10, WANTS_MAX = 16 };

/** What a rank says of itself. */
typedef struct {
    int64_t host;  /* lowest rank on its host */
    int64_t error; /* 0: it sees the file */
    char name[QS_HOST_NAME_BYTES];
} witness;

bool qs_seen_by_all(const qs_seen *seen)
{
    return seen->comm == NULL || seen->everywhere;
}

/* ---- who sees it ---- */

static int count_seers(const witness *all, int nranks)
{
    int seers = 0;
    for (int r = 0; r < nranks; r++) {
        seers += all[r].error == 0;
    }
    return seers;
}

/* The rank that sees it and has `before` others below it that do. */
static int seer_number(const witness *all, int before)
{
    int r = 0;
    for (;; r++) {
        before -= all[r].error == 0;
        if (before < 0) {
            return r;
        }
    }
}

/* Those that do not see it go round those that do. */
static void assign(qs_seen *s, const witness *all, int rank, int nranks)
{
    const int seers = count_seers(all, nranks);
    int blind_before = 0;
    for (int r = 0; r < rank; r++) {
        blind_before += all[r].error != 0;
    }
    s->mine = all[rank].error == 0;
    s->everywhere = s->simple = seers == nranks;
    s->root = seers > 0 ? seer_number(all, 0) : 0;
    s->server = s->mine || seers == 0 ? rank : seer_number(all, blind_before % seers);
    s->compares = s->mine && all[rank].host != all[s->root].host;
    for (int r = 0; r < rank; r++) {
        s->compares = s->compares && !(all[r].error == 0 && all[r].host == all[rank].host);
    }
    for (int r = 0; r < nranks; r++) {
        s->simple = s->simple && all[r].host == all[0].host;
    }
    const int served = seers > 0 ? (nranks - seers + seers - 1) / seers : 1;
    const size_t piece = SERVED_BYTES / (size_t)(served > 0 ? served : 1);
    s->piece_bytes = piece > PIECE_MIN_BYTES ? piece : PIECE_MIN_BYTES;
}

/* Append to `text`, as far as it fits. */
static void append(char *text, size_t capacity, const char *more)
{
    const size_t length = strlen(text);
    snprintf(text + length, capacity - length, "%s", more);
}

static void report(const qs_seen *s, const char *path, const char *instead, const witness *all,
                   int nranks)
{
    char hosts[NAMED_HOSTS * (QS_HOST_NAME_BYTES + 2) + 64] = "";
    int count = 0;
    int64_t error = 0;
    for (int r = 0; r < nranks; r++) {
        bool told = all[r].error == 0;
        for (int before = 0; before < r && !told; before++) {
            told = all[before].error != 0 && all[before].host == all[r].host;
        }
        if (told) {
            continue;
        }
        if (count < NAMED_HOSTS) {
            append(hosts, sizeof hosts, count > 0 ? ", " : "");
            append(hosts, sizeof hosts, all[r].name);
        }
        error = count == 0 ? all[r].error : error;
        count++;
    }
    if (count > NAMED_HOSTS) {
        char more[48];
        snprintf(more, sizeof more, " and %d more", count - NAMED_HOSTS);
        append(hosts, sizeof hosts, more);
    }
    qs_log_info("%s: not seen on host%s %s (%s): %s host %s", path, count > 1 ? "s" : "", hosts,
                strerror((int)error), instead, all[s->root].name);
}

qs_status qs_seen_agree(qs_seen *out, const char *path, int error, const char *instead,
                        qs_comm *comm)
{
    qs_status st = QS_OK;
    const int nranks = qs_comm_nranks(comm), rank = qs_comm_rank(comm);
    witness mine = {.host = qs_comm_host(comm), .error = error};
    qs_host_name(mine.name);
    witness *all = calloc((size_t)nranks, sizeof *all);
    memset(out, 0, sizeof *out);
    out->comm = comm;
    QS_GOTO(qs_comm_agree(
        comm, all != NULL ? QS_OK : QS_FAIL(QS_ERR_MEMORY, "no memory for %d ranks", nranks)));
    QS_GOTO(qs_comm_all_gather_now(comm, &mine, all, sizeof mine));
    assign(out, all, rank, nranks);
    if (rank == 0 && !out->everywhere && count_seers(all, nranks) > 0) {
        report(out, path, instead, all, nranks);
    }
done:
    free(all);
    return st;
}

qs_status qs_seen_find(qs_seen *out, const char *path, const char *instead, qs_comm *comm)
{
    int error = 0;
    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe must not make us wait */
    if (fd < 0) {
        error = errno;
    } else {
        (void)close(fd); /* read only */
    }
    return qs_seen_agree(out, path, error, instead, comm);
}

/* ---- is it the same everywhere? ---- */

typedef struct {
    char host[QS_HOST_NAME_BYTES], mark[MARK_MAX_BYTES];
} copy_note;

/* A bad copy must be found: its host is what the message lacks. */
static qs_status bad_copy(const copy_note *mine, const char *root_host, qs_status looked)
{
    char why[1024];
    snprintf(why, sizeof why, "%s", qs_error_text());
    qs_error_clear();
    return QS_FAIL(looked,
                   "%s (on host %s; the file of host %s is good: copy that, or remove this)", why,
                   mine->host, root_host);
}

qs_status qs_seen_compare(const qs_seen *seen, const char *path, qs_status looked, const char *mark)
{
    copy_note mine = {{0}, {0}};
    qs_host_name(mine.host);
    snprintf(mine.mark, sizeof mine.mark, "%s", looked == QS_OK ? mark : "");
    copy_note theirs = mine;
    QS_TRY(qs_comm_bcast(seen->comm, &theirs, sizeof theirs, seen->root));
    qs_status st = QS_OK;
    if (seen->compares && looked != QS_OK) {
        st = bad_copy(&mine, theirs.host, looked);
    } else if (seen->compares && strcmp(mine.mark, theirs.mark) != 0) {
        st = QS_FAIL(QS_ERR_DISAGREE,
                     "%s: host %s has %s, host %s another file of that name with %s; copy the "
                     "right one to the other host, or remove the wrong one: its ranks are then "
                     "sent what they need",
                     path, theirs.host, theirs.mark, mine.host, mine.mark);
    }
    return qs_comm_agree(seen->comm, st);
}

/* ---- reading ---- */

typedef struct {
    int fd;
    const char *path;
} open_file;

static qs_status read_open_file(void *ctx, int64_t offset, size_t bytes, void *out)
{
    const open_file *file = ctx;
    return qs_io_read_all(file->fd, out, bytes, offset, file->path);
}

static qs_status read_own(int fd, const char *path, const qs_stretch *stretches, int count)
{
    for (int i = 0; i < count; i++) {
        if (stretches[i].bytes > 0) {
            QS_TRY(
                qs_io_read_all(fd, stretches[i].to, stretches[i].bytes, stretches[i].offset, path));
        }
    }
    return QS_OK;
}

qs_status qs_seen_read(const qs_seen *seen, qs_status so_far, int fd, const char *path,
                       const qs_stretch *stretches, int count)
{
    const bool alone = qs_seen_by_all(seen);
    qs_relay_want wants[WANTS_MAX];
    open_file file = {.fd = fd, .path = path};
    int n_wants = 0;
    qs_status st = so_far;
    if (st == QS_OK && count > WANTS_MAX) {
        st = QS_FAIL(QS_ERR_BUG, "%s: %d stretches in one call", path, count);
    }
    if (st == QS_OK && (alone || seen->mine)) {
        st = read_own(fd, path, stretches, count);
    }
    if (alone) {
        return st;
    }
    for (int i = 0; i < count && st == QS_OK && !seen->mine; i++) {
        wants[n_wants++] = (qs_relay_want){.from = seen->server,
                                           .offset = stretches[i].offset,
                                           .bytes = stretches[i].bytes,
                                           .to = stretches[i].to};
    }
    return qs_relay(seen->comm, st, seen->piece_bytes, wants, n_wants, read_open_file, &file);
}
