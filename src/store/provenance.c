#define _GNU_SOURCE /* environ, strcasestr */
#include "store/provenance.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#include "base/cores.h"
#include "base/proc.h"
#include "qshard_version.h"
#include "store/h5.h"

enum { COMMAND_MAX = 1 << 16 };

/* What a rank says of itself. */
typedef struct {
    char host[QS_HOST_NAME_BYTES];
    int64_t cores, bound;
    double load; /* mean of the last minute, of the whole host; below 0: not known */
} place;

static place place_here(void)
{
    place p;
    memset(&p, 0, sizeof p);
    qs_host_name(p.host);
    p.cores = qs_cores_available();
    p.bound = qs_cores_bound() != 0;
    if (getloadavg(&p.load, 1) != 1) {
        p.load = -1;
    }
    return p;
}

/* JSON is UTF-8, and what a user or a system calls something need not be. */
static json_t *text_of(const char *text)
{
    json_t *string = json_string(text);
    char plain[512];
    if (string != NULL) {
        return string;
    }
    snprintf(plain, sizeof plain, "%s", text);
    for (char *c = plain; *c != '\0'; c++) {
        *c = (unsigned char)*c < 128 ? *c : '?';
    }
    return json_string(plain);
}

static json_t *command_line(void)
{
    json_t *words = json_array();
    char *text = calloc(COMMAND_MAX + 1, 1);
    FILE *file = fopen("/proc/self/cmdline", "r");
    if (text != NULL && file != NULL) {
        const size_t bytes = fread(text, 1, COMMAND_MAX, file);
        for (size_t at = 0; at < bytes; at += strlen(text + at) + 1) {
            json_array_append_new(words, text_of(text + at));
        }
    }
    if (file != NULL) {
        fclose(file);
    }
    free(text);
    return words;
}

/* Names of what a batch system or launcher hides in its own variables; and addresses of daemons. */
static bool is_secret(const char *name)
{
    static const char *const words[] = {
        "JWT", "TOKEN", "SECRET", "PASSWORD", "_KEY", "precondition_transports", "_uri"};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        if (strcasestr(name, words[i]) != NULL) {
            return true;
        }
    }
    return false;
}

static bool is_ours_to_tell(const char *name)
{
    static const char *const prefixes[] = {"OMPI_", "OMP_", "NCCL_", "SLURM_"};
    for (size_t i = 0; i < sizeof prefixes / sizeof *prefixes; i++) {
        if (strncmp(name, prefixes[i], strlen(prefixes[i])) == 0) {
            return !is_secret(name);
        }
    }
    return false;
}

static json_t *environment(void)
{
    json_t *variables = json_object();
    char name[256];
    for (char **e = environ; *e != NULL; e++) {
        const char *value = strchr(*e, '=');
        if (value == NULL || (size_t)(value - *e) >= sizeof name) {
            continue;
        }
        snprintf(name, sizeof name, "%.*s", (int)(value - *e), *e);
        if (is_ours_to_tell(name)) {
            json_object_set_new(variables, name, text_of(value + 1));
        }
    }
    return variables;
}

static json_t *libraries(const char *gpu)
{
    json_t *list = json_object();
    char text[256] = "";
    qs_comm_mpi_version(text, sizeof text);
    json_object_set_new(list, "mpi", text_of(text));
    qs_h5_version(text, sizeof text);
    json_object_set_new(list, "hdf5", text_of(text));
    if (gpu != NULL && gpu[0] != '\0') {
        json_object_set_new(list, "gpu", text_of(gpu));
    }
    return list;
}

static json_t *ranks_of(const place *all, int nranks)
{
    json_t *list = json_array();
    for (int r = 0; r < nranks; r++) {
        json_t *rank = json_object();
        json_object_set_new(rank, "host", text_of(all[r].host));
        json_object_set_new(rank, "cores", json_integer(all[r].cores));
        json_object_set_new(rank, "bound", json_boolean(all[r].bound));
        json_object_set_new(rank, "load", all[r].load < 0 ? json_null() : json_real(all[r].load));
        json_array_append_new(list, rank);
    }
    return list;
}

static json_t *describe(const place *all, int nranks, const char *gpu)
{
    json_t *p = json_object();
    const time_t now = time(NULL);
    struct tm utc;
    struct utsname system;
    char text[sizeof system.sysname + sizeof system.release];
    gmtime_r(&now, &utc);
    strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &utc);
    json_object_set_new(p, "date", json_string(text));
    json_object_set_new(p, "command", command_line());
    json_object_set_new(p, "version", json_string(QSHARD_VERSION));
    json_object_set_new(p, "commit", json_string(QSHARD_COMMIT));
    json_object_set_new(p, "compiler", json_string(QSHARD_COMPILER));
    json_object_set_new(p, "build", json_string(QSHARD_BUILD_TYPE " " QSHARD_BUILD_FLAGS));
    if (uname(&system) == 0) {
        snprintf(text, sizeof text, "%s %s", system.sysname, system.release);
        json_object_set_new(p, "kernel", text_of(text));
    }
    json_object_set_new(p, "libraries", libraries(gpu));
    json_object_set_new(p, "environment", environment());
    json_object_set_new(p, "ranks", ranks_of(all, nranks));
    return p;
}

qs_status qs_provenance_make(json_t **out, const char *gpu, qs_comm *comm)
{
    const int nranks = qs_comm_nranks(comm);
    const place mine = place_here();
    place *all = calloc((size_t)nranks, sizeof *all);
    qs_status st = all != NULL ? QS_OK : QS_FAIL(QS_ERR_MEMORY, "no memory for the ranks' hosts");
    *out = NULL;
    QS_GOTO(qs_comm_agree(comm, st));
    QS_GOTO(qs_comm_all_gather_now(comm, &mine, all, sizeof mine));
    if (qs_comm_rank(comm) == 0) {
        *out = describe(all, nranks, gpu);
        st = *out != NULL ? QS_OK : QS_FAIL(QS_ERR_MEMORY, "no memory for the provenance");
    }
    st = qs_comm_agree(comm, st);
done:
    free(all);
    return st;
}
