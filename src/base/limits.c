/* Where cgroups are looked for:
 *
 *   /proc/self/cgroup      4:memory:/slurm/uid_7/job_1/step_0/task_0     version 1
 *                          0::/system.slice/.../job_1/step_0/user/task_0  version 2
 *   /proc/self/mountinfo   32 31 0:29 ROOT MOUNT_POINT rw - cgroup|cgroup2 SOURCE OPTIONS
 *
 * The process's directory is its path, less ROOT, below MOUNT_POINT; limits of the directories
 * between the two count as well. In a container ROOT is often the container's own cgroup, so that
 * nothing above it is seen. Machines with both versions have the memory controller in one of them:
 * the other's directories lack the files. */
#define _GNU_SOURCE /* fopen's "e" */
#include "base/limits.h"

#include <errno.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/proc.h"

static const double GIB = 1073741824.0;
enum { LINE_MAX_BYTES = 8192, PATH_BYTES = 4096 };

/* ---- lines and numbers ---- */

/* The next line, without its end; longer ones are passed over, since half of one may look like
 * another. */
static bool next_line(FILE *file, char line[LINE_MAX_BYTES])
{
    while (fgets(line, LINE_MAX_BYTES, file) != NULL) {
        const size_t length = strlen(line);
        if (length > 0 && line[length - 1] == '\n') {
            line[length - 1] = '\0';
            return true;
        }
        if (length + 1 < LINE_MAX_BYTES) {
            return true; /* the last one */
        }
        int c = 0;
        while (c != '\n' && c != EOF) {
            c = fgetc(file);
        }
    }
    return false;
}

/* `root` and `path` as one; false if that is too long. */
static bool join(char out[PATH_BYTES], const char *root, const char *path, const char *rest)
{
    const int length = snprintf(out, PATH_BYTES, "%s%s%s", root, path, rest);
    return length >= 0 && length < PATH_BYTES;
}

static FILE *open_below(const char *root, const char *path)
{
    char name[PATH_BYTES];
    return join(name, root, path, "") ? fopen(name, "re") : NULL;
}

/* The number that a file consists of; 0 for "max", for one that 64 bits do not hold, and for
 * anything else. A limit of 0 bytes is none either: nobody could ask about it. */
static uint64_t number_in(const char *dir, const char *name)
{
    char path[PATH_BYTES], text[64] = "";
    FILE *file = join(path, dir, "/", name) ? fopen(path, "re") : NULL;
    if (file == NULL) {
        return 0;
    }
    const size_t length = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[length] = '\0';
    char *end = text;
    errno = 0;
    const uint64_t value = text[0] >= '0' && text[0] <= '9' ? strtoull(text, &end, 10) : 0;
    const bool whole = end != text && (*end == '\0' || strcmp(end, "\n") == 0);
    return whole && errno == 0 ? value : 0;
}

/* ---- what the process has ---- */

typedef struct {
    size_t address_space, data, anonymous;
} held_bytes;

static held_bytes read_held(const char *root)
{
    unsigned long long size = 0, resident = 0, shared = 0, text = 0, library = 0, data = 0;
    FILE *file = open_below(root, "/proc/self/statm");
    if (file != NULL) {
        if (fscanf(file, "%llu %llu %llu %llu %llu %llu", &size, &resident, &shared, &text,
                   &library, &data) != 6) {
            size = resident = shared = data = 0;
        }
        fclose(file);
    }
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    return (held_bytes){.address_space = (size_t)size * page,
                        .data = (size_t)data * page,
                        .anonymous = resident > shared ? (size_t)(resident - shared) * page : 0};
}

/* ---- cgroups ---- */

/* FNV-1a of some numbers, never 0. */
static uint64_t number_of(const uint64_t *words, int count)
{
    uint64_t hash = UINT64_C(0xcbf29ce484222325);
    for (int i = 0; i < 8 * count; i++) {
        hash = (hash ^ (words[i / 8] >> (8 * (i % 8)) & 0xff)) * UINT64_C(0x100000001b3);
    }
    return hash != 0 ? hash : 1;
}

/* A directory of cgroups has the same inode number wherever it is mounted, under whatever name: two
 * containers that both call theirs "/" are told apart. */
static uint64_t number_of_dir(const char *dir)
{
    struct stat info;
    if (stat(dir, &info) != 0) {
        return 0;
    }
    return number_of((const uint64_t[]){qs_proc_host_number(), info.st_dev, info.st_ino}, 3);
}

/* Longer texts keep their end: a cgroup's own name stands there. */
static void keep_end(char *out, size_t capacity, const char *text)
{
    const size_t length = strlen(text);
    snprintf(out, capacity, "%s", length < capacity ? text : text + length + 1 - capacity);
}

static void add_limit(qs_limits *out, const char *dir, const char *group, const char *file,
                      size_t held)
{
    const uint64_t bytes = number_in(dir, file), sharers = number_of_dir(dir);
    if (bytes == 0 || bytes >= out->limit[0].bytes || sharers == 0 || out->count == QS_LIMITS_MAX) {
        return; /* more than the machine has is none: as many share that, or more */
    }
    qs_limit *limit = &out->limit[out->count++];
    *limit = (qs_limit){
        .kind = QS_LIMIT_CGROUP, .sharers = sharers, .bytes = (size_t)bytes, .held = held};
    snprintf(limit->file, sizeof limit->file, "%s", file);
    keep_end(limit->group, sizeof limit->group, group);
}

/* Where a hierarchy is mounted, and which of its directories that is. */
typedef struct {
    char root[PATH_BYTES], point[PATH_BYTES];
} mount_place;

static bool is_octal(char c)
{
    return c >= '0' && c <= '7';
}

/* "\040" is a blank: mountinfo writes so what would end a field. */
static void unescape(char *text)
{
    char *to = text;
    for (const char *from = text; *from != '\0'; to++) {
        if (from[0] == '\\' && is_octal(from[1]) && is_octal(from[2]) && is_octal(from[3])) {
            *to = (char)((from[1] - '0') * 64 + (from[2] - '0') * 8 + (from[3] - '0'));
            from += 4;
        } else {
            *to = *from++;
        }
    }
    *to = '\0';
}

/* Is `word` one of those that commas part? */
static bool has_word(const char *list, const char *word)
{
    const size_t length = strlen(word);
    for (const char *at = list; at != NULL; at = strchr(at, ',')) {
        at += *at == ',';
        if (strncmp(at, word, length) == 0 && (at[length] == '\0' || at[length] == ',')) {
            return true;
        }
    }
    return false;
}

/* A line of mountinfo: is it the mount that is looked for? */
static bool read_mount(char *line, bool version2, mount_place *out)
{
    char *separator = strstr(line, " - ");
    char type[32] = "", options[512] = "";
    if (separator == NULL ||
        sscanf(separator, " - %31s %*s %511s", type, options) < 1 + (version2 ? 0 : 1)) {
        return false;
    }
    *separator = '\0';
    if (strcmp(type, version2 ? "cgroup2" : "cgroup") != 0 ||
        (!version2 && !has_word(options, "memory")) ||
        sscanf(line, "%*s %*s %*s %4095s %4095s", out->root, out->point) != 2) {
        return false;
    }
    unescape(out->root);
    unescape(out->point);
    return true;
}

/* Does `path` have a component ".." (a process outside of its namespace's root)? */
static bool climbs(const char *path)
{
    for (const char *at = strstr(path, "/.."); at != NULL; at = strstr(at + 1, "/..")) {
        if (at[3] == '/' || at[3] == '\0') {
            return true;
        }
    }
    return false;
}

/* The part of a cgroup's path below the mount; NULL: it is not below. */
static const char *below_mount(const mount_place *mount, const char *path)
{
    const size_t length = strcmp(mount->root, "/") == 0 ? 0 : strlen(mount->root);
    if (climbs(path)) {
        return NULL;
    }
    if (climbs(mount->root)) {
        return ""; /* mounted from above the namespace's root: all that is known is above us */
    }
    if (strncmp(path, mount->root, length) != 0 || (path[length] != '\0' && path[length] != '/')) {
        return NULL;
    }
    return strcmp(path + length, "/") == 0 ? "" : path + length;
}

/* The first mount that has the cgroup `path`. \return the path below it; NULL: none has. */
static const char *find_mount(const char *root, bool version2, const char *path, mount_place *out)
{
    char line[LINE_MAX_BYTES];
    const char *below = NULL;
    FILE *file = open_below(root, "/proc/self/mountinfo");
    while (file != NULL && below == NULL && next_line(file, line)) {
        below = read_mount(line, version2, out) ? below_mount(out, path) : NULL;
    }
    if (file != NULL) {
        fclose(file);
    }
    return below;
}

/* Version 1 can leave what is below a directory out of its count. */
static bool counts_below(const char *dir)
{
    char path[PATH_BYTES], text[4] = "";
    FILE *file = join(path, dir, "/memory.use_hierarchy", "") ? fopen(path, "re") : NULL;
    if (file != NULL) {
        const size_t length = fread(text, 1, sizeof text - 1, file);
        text[length] = '\0';
        fclose(file);
    }
    return text[0] != '0';
}

/* The limits of a directory, and of those above it up to the mount point. */
static void climb(qs_limits *out, const char *root, const mount_place *mount, const char *below,
                  bool version2, size_t held)
{
    char dir[PATH_BYTES];
    if (!join(dir, root, mount->point, below)) {
        return;
    }
    const size_t top = strlen(root) + strlen(mount->point);
    for (bool own = true;; own = false) {
        const char *group = dir[top] != '\0' ? dir + top : "/";
        if (version2) {
            add_limit(out, dir, group, "memory.max", held);
            add_limit(out, dir, group, "memory.high", held);
        } else if (own || counts_below(dir)) {
            add_limit(out, dir, group, "memory.limit_in_bytes", held);
        }
        char *slash = strrchr(dir, '/');
        if (slash == NULL || slash < dir + top) {
            return;
        }
        *slash = '\0';
    }
}

/* A line of /proc/self/cgroup. */
static void read_cgroup_line(qs_limits *out, const char *root, char *line, size_t held)
{
    char *controllers = strchr(line, ':');
    char *path = controllers != NULL ? strchr(controllers + 1, ':') : NULL;
    if (path == NULL || path[1] != '/') {
        return;
    }
    *path++ = '\0';
    const bool version2 = strcmp(line, "0:") == 0;
    if (!version2 && !has_word(controllers + 1, "memory")) {
        return;
    }
    mount_place mount;
    const char *below = find_mount(root, version2, path, &mount);
    if (below != NULL) {
        climb(out, root, &mount, below, version2, held);
    }
}

static void read_cgroups(qs_limits *out, const char *root, size_t held)
{
    char line[LINE_MAX_BYTES];
    FILE *file = open_below(root, "/proc/self/cgroup");
    while (file != NULL && next_line(file, line)) {
        read_cgroup_line(out, root, line, held);
    }
    if (file != NULL) {
        fclose(file);
    }
}

/* ---- the others ---- */

static void add_machine(qs_limits *out, size_t held)
{
    const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
    const uint64_t host = qs_proc_host_number();
    out->limit[out->count++] = (qs_limit){
        .kind = QS_LIMIT_MACHINE,
        .sharers = number_of(&host, 1),
        .bytes = pages > 0 && page > 0 ? (size_t)pages * (size_t)page : (size_t)INT64_MAX,
        .held = held};
}

static void add_rlimit(qs_limits *out, qs_limit_kind kind, size_t held)
{
    struct rlimit limit;
    const int got =
        kind == QS_LIMIT_DATA ? getrlimit(RLIMIT_DATA, &limit) : getrlimit(RLIMIT_AS, &limit);
    if (got == 0 && limit.rlim_cur != RLIM_INFINITY && out->count < QS_LIMITS_MAX) {
        out->limit[out->count++] =
            (qs_limit){.kind = kind, .bytes = (size_t)limit.rlim_cur, .held = held};
    }
}

void qs_limits_read(qs_limits *out, const char *root)
{
    const held_bytes held = read_held(root);
    *out = (qs_limits){0};
    add_machine(out, held.anonymous);
    add_rlimit(out, QS_LIMIT_ADDRESS_SPACE, held.address_space);
    add_rlimit(out, QS_LIMIT_DATA, held.data);
    read_cgroups(out, root, held.anonymous);
}

/* ---- what is said ---- */

/* Slurm's cgroups: .../job_7/step_0/user/task_0. */
static bool is_slurm(const qs_limit *limit)
{
    return limit->kind == QS_LIMIT_CGROUP && strstr(limit->group, "/job_") != NULL;
}

void qs_limit_describe(const qs_limit *limit, char *out, size_t capacity)
{
    const double gib = (double)limit->bytes / GIB;
    switch (limit->kind) {
    case QS_LIMIT_MACHINE:
        snprintf(out, capacity, "%.2f GiB of this host", gib);
        return;
    case QS_LIMIT_ADDRESS_SPACE:
        snprintf(out, capacity, "%.2f GiB of address space (ulimit -v)", gib);
        return;
    case QS_LIMIT_DATA:
        snprintf(out, capacity, "%.2f GiB of data (ulimit -d)", gib);
        return;
    case QS_LIMIT_CGROUP:
        if (is_slurm(limit)) {
            snprintf(out, capacity, "%.2f GiB that Slurm gives this job on a node (cgroup %s)", gib,
                     limit->file);
        } else {
            snprintf(out, capacity, "%.2f GiB that the container or service has (%s of cgroup %s)",
                     gib, limit->file, limit->group);
        }
        return;
    }
}

const char *qs_limit_remedy(const qs_limit *limit)
{
    switch (limit->kind) {
    case QS_LIMIT_ADDRESS_SPACE:
        return "raise it with ulimit -v unlimited";
    case QS_LIMIT_DATA:
        return "raise it with ulimit -d unlimited";
    case QS_LIMIT_CGROUP:
        return is_slurm(limit) ? "ask for more with --mem (0: all of the node's)"
                               : "start the container or service with more memory";
    case QS_LIMIT_MACHINE:
        break;
    }
    return "";
}
