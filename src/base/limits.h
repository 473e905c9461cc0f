/* What bounds the memory of this process: the machine's memory, the cgroups that it is in (a Slurm
 * job, a container, a service) and ulimit. Past a cgroup's limit the kernel kills without a word,
 * past the others allocations fail; whoever plans asks here first. */
#ifndef QS_BASE_LIMITS_H
#define QS_BASE_LIMITS_H

#include <stddef.h>
#include <stdint.h>

typedef enum {
    QS_LIMIT_MACHINE, /* its memory: the whole of it, not what happens to be free, since files that
                         were read fill the rest and go when they have to */
    QS_LIMIT_CGROUP,
    QS_LIMIT_ADDRESS_SPACE, /* RLIMIT_AS, ulimit -v */
    QS_LIMIT_DATA,          /* RLIMIT_DATA, ulimit -d */
} qs_limit_kind;

enum { QS_LIMIT_GROUP_MAX = 160, QS_LIMIT_TEXT_MAX = 256 };

typedef struct {
    qs_limit_kind kind;
    uint64_t sharers; /* processes that have the same number here have `bytes` together, other
                         machines' have others; 0: this process alone */
    size_t bytes;
    size_t held;                              /* what this process has of them already */
    char file[24], group[QS_LIMIT_GROUP_MAX]; /* of a cgroup: "memory.max", its path; else "" */
} qs_limit;

enum { QS_LIMITS_MAX = 16 };

typedef struct {
    int count; /* at least 1: the machine's is the first */
    qs_limit limit[QS_LIMITS_MAX];
} qs_limits;

/** All limits that are set. `root` stands in front of /proc/self and of what it says of mounts: ""
 * for the real ones. A cgroup's are memory.max and memory.high (version 2), or
 * memory.limit_in_bytes (version 1), of its directory and of all above it that are mounted here;
 * what cannot be read or is no number is no limit. */
void qs_limits_read(qs_limits *out, const char *root);

/** "16.0 GiB that Slurm gives this job on a node (cgroup memory.max)"; `out` [QS_LIMIT_TEXT_MAX]
 * holds any. */
void qs_limit_describe(const qs_limit *limit, char *out, size_t capacity);

/** What gives more of it: "ask for more with --mem"; "" if nothing does. */
const char *qs_limit_remedy(const qs_limit *limit);

#endif
