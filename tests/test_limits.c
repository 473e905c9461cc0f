/* What bounds a rank's memory: cgroups of either version in trees that are made up, ulimit, and how
 * ranks divide what they have in common. */
#define _GNU_SOURCE
#include <stdarg.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include "base/limits.h"
#include "tests/scratch.h"
#include "tests/team.h"
#include "train/room.h"

TestSuite(limits, .timeout = 60);
TestSuite(room, .timeout = 60);

enum { MIB = 1 << 20 };
#define V1_UNLIMITED "9223372036854771712\n"
#define V1_MOUNT "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
#define V2_MOUNT "29 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"

/* ---- trees ---- */

static char root[SCRATCH_MAX];

static void make_root(void)
{
    scratch_make(root, NULL);
}

static void remove_root(void)
{
    scratch_remove(root);
}

/* A file below the root, with the directories that it lies in. */
static void __attribute__((format(printf, 2, 3))) put(const char *path, const char *format, ...)
{
    char name[4096];
    va_list args;
    (void)snprintf(name, sizeof name, "%s%s", root, path);
    for (char *slash = strchr(name + strlen(root) + 1, '/'); slash;
         slash = strchr(slash + 1, '/')) {
        *slash = '\0';
        (void)mkdir(name, 0700);
        *slash = '/';
    }
    FILE *file = fopen(name, "w");
    cr_assert_not_null(file, "%s", name);
    va_start(args, format);
    vfprintf(file, format, args);
    va_end(args);
    cr_assert_eq(fclose(file), 0);
}

/* Where this process is said to be, and what is said to be mounted. */
static void place(const char *cgroup, const char *mounts)
{
    put("/proc/self/cgroup", "%s", cgroup);
    put("/proc/self/mountinfo", "22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n%s", mounts);
}

static qs_limits read_limits(void)
{
    qs_limits limits;
    qs_limits_read(&limits, root);
    cr_assert_geq(limits.count, 1);
    cr_assert_eq(limits.limit[0].kind, QS_LIMIT_MACHINE);
    cr_assert_gt(limits.limit[0].bytes, 64 * MIB);
    cr_assert_neq(limits.limit[0].sharers, 0);
    return limits;
}

/* The limits of cgroups alone, as "file group MiB" lines from the process upwards. */
static const char *found(void)
{
    static char text[4096];
    const qs_limits limits = read_limits();
    text[0] = '\0';
    for (int i = 0; i < limits.count; i++) {
        const qs_limit *l = &limits.limit[i];
        const size_t used = strlen(text);
        if (l->kind == QS_LIMIT_CGROUP) {
            cr_assert_neq(l->sharers, 0);
            snprintf(text + used, sizeof text - used, "%s %s %zu\n", l->file, l->group,
                     l->bytes / MIB);
        }
    }
    return text;
}

#define EXPECT_FOUND(expected)                                                                     \
    do {                                                                                           \
        const char *is = found();                                                                  \
        cr_assert_str_eq(is, expected, "found:\n%s", is);                                          \
    } while (0)

Test(limits, version_2_counts_every_level, .init = make_root, .fini = remove_root)
{
    place("0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_1\n", V2_MOUNT);
    const char *const base = "/sys/fs/cgroup/system.slice/slurmstepd.scope/job_7";
    char path[256];
    snprintf(path, sizeof path, "%s/memory.max", base);
    put(path, "%d\n", 64 * MIB);
    snprintf(path, sizeof path, "%s/memory.high", base);
    put(path, "max\n");
    snprintf(path, sizeof path, "%s/step_0/memory.max", base);
    put(path, "%d\n", 48 * MIB);
    snprintf(path, sizeof path, "%s/step_0/user/memory.max", base);
    put(path, "max\n");
    snprintf(path, sizeof path, "%s/step_0/user/task_1/memory.high", base);
    put(path, "%d\n", 32 * MIB);
    EXPECT_FOUND("memory.high /system.slice/slurmstepd.scope/job_7/step_0/user/task_1 32\n"
                 "memory.max /system.slice/slurmstepd.scope/job_7/step_0 48\n"
                 "memory.max /system.slice/slurmstepd.scope/job_7 64\n");
}

Test(limits, version_1_reads_the_memory_controller, .init = make_root, .fini = remove_root)
{
    place("9:name=systemd:/elsewhere\n4:cpu,memory:/slurm/uid_5/job_7/step_0/task_0\n3:cpuset:/\n",
          "34 31 0:31 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
          "35 31 0:32 / /sys/fs/cgroup/memory rw shared:5 - cgroup cgroup rw,cpu,memory\n");
    put("/sys/fs/cgroup/memory/slurm/uid_5/job_7/step_0/task_0/memory.limit_in_bytes",
        V1_UNLIMITED);
    put("/sys/fs/cgroup/memory/slurm/uid_5/job_7/step_0/memory.limit_in_bytes", "%d\n", 32 * MIB);
    put("/sys/fs/cgroup/memory/slurm/uid_5/job_7/memory.limit_in_bytes", "%d\n", 64 * MIB);
    put("/sys/fs/cgroup/memory/memory.limit_in_bytes", V1_UNLIMITED);
    put("/sys/fs/cgroup/memory/elsewhere/memory.limit_in_bytes", "%d\n", MIB);
    put("/sys/fs/cgroup/cpuset/memory.limit_in_bytes", "%d\n", MIB);
    EXPECT_FOUND("memory.limit_in_bytes /slurm/uid_5/job_7/step_0 32\n"
                 "memory.limit_in_bytes /slurm/uid_5/job_7 64\n");
    /* what a directory does not count, it does not limit; its own processes it does */
    put("/sys/fs/cgroup/memory/slurm/uid_5/job_7/memory.use_hierarchy", "0\n");
    put("/sys/fs/cgroup/memory/slurm/uid_5/job_7/step_0/memory.use_hierarchy", "1\n");
    EXPECT_FOUND("memory.limit_in_bytes /slurm/uid_5/job_7/step_0 32\n");
}

/* Both are mounted; the memory controller is in one of them. */
Test(limits, hybrid_machines_have_either, .init = make_root, .fini = remove_root)
{
    place("4:memory:/a\n0::/b\n",
          V1_MOUNT "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n");
    put("/sys/fs/cgroup/unified/b/cgroup.procs", "1\n");
    put("/sys/fs/cgroup/memory/a/memory.limit_in_bytes", "%d", 16 * MIB); /* no line end */
    EXPECT_FOUND("memory.limit_in_bytes /a 16\n");
    place("4:cpu:/a\n0::/b\n", "35 31 0:32 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
                               "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n");
    put("/sys/fs/cgroup/unified/b/memory.max", "%d\n", 24 * MIB);
    EXPECT_FOUND("memory.max /b 24\n");
}

/* What is mounted may be a part of the tree, under any name. */
Test(limits, containers_see_their_own_cgroup, .init = make_root, .fini = remove_root)
{
    /* a namespace: "/" is the container's */
    place("0::/\n", V2_MOUNT);
    put("/sys/fs/cgroup/memory.max", "%d\n", 32 * MIB);
    EXPECT_FOUND("memory.max / 32\n");
    /* the host's names, the container's directory mounted */
    place("4:memory:/docker/abc\n",
          "35 31 0:32 /docker/abc /my\\040cgroups rw - cgroup cgroup rw,memory\n");
    put("/my cgroups/memory.limit_in_bytes", "%d\n", 16 * MIB);
    EXPECT_FOUND("memory.limit_in_bytes / 16\n");
    /* and a process below it */
    place("4:memory:/docker/abc/in\n",
          "35 31 0:32 /docker/abc /my\\040cgroups rw - cgroup cgroup rw,memory\n");
    put("/my cgroups/in/memory.limit_in_bytes", "%d\n", 8 * MIB);
    EXPECT_FOUND("memory.limit_in_bytes /in 8\nmemory.limit_in_bytes / 16\n");
    /* a namespace inside of a mount that began above it */
    place("0::/\n", "29 23 0:26 /../.. /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n");
    EXPECT_FOUND("memory.max / 32\n");
    /* the second mount has it */
    place("4:memory:/docker/abc\n",
          "34 31 0:32 /docker/ab /sys/fs/cgroup rw - cgroup cgroup rw,memory\n"
          "35 31 0:32 /docker/abc /my\\040cgroups rw - cgroup cgroup rw,memory\n");
    EXPECT_FOUND("memory.limit_in_bytes / 16\n");
}

Test(limits, what_is_mounted_elsewhere_is_not_ours, .init = make_root, .fini = remove_root)
{
    put("/sys/fs/cgroup/memory.max", "%d\n", 32 * MIB);
    put("/sys/fs/cgroup/x/memory.max", "%d\n", 32 * MIB);
    put("/sys/fs/cgroup/memory/memory.limit_in_bytes", "%d\n", 32 * MIB);
    static const char *const places[][2] = {
        {"0::/../x\n", V2_MOUNT}, /* outside of the namespace's root */
        {"0::/x/..\n", V2_MOUNT},
        {"0::/abc/x\n", "29 23 0:26 /ab /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"},
        {"0::/x\n", V1_MOUNT},
        {"0::/x\n", ""},
        {"1:memory:/x\n", V2_MOUNT},
        {"1:cpu:/x\n", V1_MOUNT},
        {"1:memoryless:/x\n", V1_MOUNT},
        {"1:memory:/x\n", "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory2\n"},
    };
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        place(places[i][0], places[i][1]);
        const char *is = found();
        cr_assert_str_eq(is, "", "%s in %s: %s", places[i][0], places[i][1], is);
    }
}

Test(limits, no_number_is_no_limit, .init = make_root, .fini = remove_root)
{
    place("0::/x\n", V2_MOUNT);
    static const char *const texts[] = {"max\n",
                                        "max",
                                        "",
                                        "\n",
                                        "0\n",
                                        "-1\n",
                                        "-33554432\n",
                                        " 33554432\n",
                                        "+33554432\n",
                                        "33554432 \n",
                                        "33554432k\n",
                                        "0x2000000\n",
                                        "33554432\n1\n",
                                        "18446744073709551615\n",
                                        "18446744073709551616\n",
                                        "99999999999999999999999999999999999999999999999999\n",
                                        "1234567890123456789012345678901234567890123456789012345678"
                                        "90123456789012345678901234567890\n",
                                        V1_UNLIMITED};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        put("/sys/fs/cgroup/x/memory.max", "%s", texts[i]);
        const char *is = found();
        cr_assert_str_eq(is, "", "\"%s\": %s", texts[i], is);
    }
    put("/sys/fs/cgroup/x/memory.max", "33554432\n");
    EXPECT_FOUND("memory.max /x 32\n");
}

Test(limits, hostile_files_are_passed_over, .init = make_root, .fini = remove_root)
{
    static char line[20000];
    char top[SCRATCH_MAX + 64];
    snprintf(top, sizeof top, "%s/sys/fs/cgroup/memory.max", root);
    memset(line, 'a', sizeof line - 1);
    put("/sys/fs/cgroup/x/memory.max", "33554432\n");
    /* lines that are too long to be one of ours, and in whose middle one seems to begin */
    memcpy(line + 2 * 8191, "29 23 0:26 / /sys/fs/cgroup rw - cgroup2 a b", 44);
    place("0::/x\n", line);
    EXPECT_FOUND("");
    put("/proc/self/mountinfo", "%s\n%s", line, V2_MOUNT);
    EXPECT_FOUND("memory.max /x 32\n");
    put("/proc/self/cgroup", "0::/%s\n", line);
    EXPECT_FOUND("");
    put("/proc/self/cgroup", "0::/%s\n0::/x\n", line);
    EXPECT_FOUND("memory.max /x 32\n");
    put("/sys/fs/cgroup/memory.max", "33554432\n");
    static const char *const cgroups[] = {"",      "\n",      ":",        "::",
                                          "0:",    "0::",     "0:/",      "0::x",
                                          "0::\n", ":::/x\n", "00::/x\n", "memory:/x\n"};
    for (size_t i = 0; i < sizeof cgroups / sizeof *cgroups; i++) {
        put("/proc/self/cgroup", "%s", cgroups[i]);
        const char *is = found();
        cr_assert_str_eq(is, "", "\"%s\": %s", cgroups[i], is);
    }
    static const char *const mounts[] = {"- cgroup2",
                                         " - ",
                                         " - cgroup2",
                                         "1 - cgroup2 a b\n",
                                         "1 2 3 - cgroup2 a b\n",
                                         "1 2 3 / - cgroup2 a b\n",
                                         "1 2 3 / /sys/fs/cgroup - cgroup22 a b\n",
                                         "1 2 3 / /sys/fs/cgroup\\ - cgroup2 a b\n",
                                         "1 2 3 / /sys/fs/cgroup\\04 - cgroup2 a b\n"};
    cr_assert_eq(unlink(top), 0);
    for (size_t i = 0; i < sizeof mounts / sizeof *mounts; i++) {
        place("0::/x\n", mounts[i]);
        const char *is = found();
        cr_assert_str_eq(is, "", "\"%s\": %s", mounts[i], is);
    }
}

Test(limits, missing_files_and_directories_in_their_place, .init = make_root, .fini = remove_root)
{
    EXPECT_FOUND("");
    place("0::/x\n", V2_MOUNT);
    EXPECT_FOUND("");
    put("/sys/fs/cgroup/x/memory.max/file", "33554432\n");
    EXPECT_FOUND("");
    place("0::/gone (deleted)\n", V2_MOUNT);
    put("/sys/fs/cgroup/memory.high", "33554432\n");
    EXPECT_FOUND("memory.high / 32\n");
}

/* As many as there is room for; the process's own come first. */
Test(limits, deep_trees_keep_the_lowest_levels, .init = make_root, .fini = remove_root)
{
    char cgroup[256] = "", path[512], line[300];
    for (int depth = 0; depth < 30; depth++) {
        strcat(cgroup, "/d");
        snprintf(path, sizeof path, "/sys/fs/cgroup%s/memory.max", cgroup);
        put(path, "%d\n", (60 - depth) * MIB);
    }
    snprintf(line, sizeof line, "0::%s\n", cgroup);
    place(line, V2_MOUNT);
    const qs_limits limits = read_limits();
    cr_assert_eq(limits.count, QS_LIMITS_MAX);
    for (int i = 1; i < QS_LIMITS_MAX; i++) {
        cr_assert_eq(limits.limit[i].bytes, (size_t)(30 + i) * MIB);
    }
}

/* The end of a name tells cgroups apart. */
Test(limits, long_names_keep_their_end, .init = make_root, .fini = remove_root)
{
    char cgroup[1000] = "", path[1200], line[1100];
    for (int i = 0; i < 5; i++) {
        strcat(cgroup, "/");
        memset(cgroup + strlen(cgroup), 'a' + i, 150);
    }
    strcat(cgroup, "/mine");
    snprintf(path, sizeof path, "/sys/fs/cgroup%s/memory.max", cgroup);
    put(path, "%d\n", 32 * MIB);
    snprintf(line, sizeof line, "0::%s\n", cgroup);
    place(line, V2_MOUNT);
    const qs_limits limits = read_limits();
    const qs_limit *limit = &limits.limit[limits.count - 1];
    char text[QS_LIMIT_TEXT_MAX];
    cr_assert_eq(strlen(limit->group), QS_LIMIT_GROUP_MAX - 1);
    cr_assert_str_eq(limit->group + strlen(limit->group) - 7, "ee/mine");
    qs_limit_describe(limit, text, sizeof text);
    cr_assert(strstr(text, "/mine)") != NULL, "%s", text);
}

Test(limits, the_same_directory_is_shared_and_no_other, .init = make_root, .fini = remove_root)
{
    put("/sys/fs/cgroup/job_1/step_0/a/memory.max", "%d\n", 8 * MIB);
    put("/sys/fs/cgroup/job_1/step_0/b/memory.max", "%d\n", 8 * MIB);
    put("/sys/fs/cgroup/job_1/step_0/memory.max", "%d\n", 32 * MIB);
    place("0::/job_1/step_0/a\n", V2_MOUNT);
    const qs_limits a = read_limits();
    place("0::/job_1/step_0/b\n", V2_MOUNT);
    const qs_limits b = read_limits();
    /* the same cgroup as its container's root */
    place("0::/\n", "29 23 0:26 / /sys/fs/cgroup/job_1/step_0/a rw - cgroup2 cgroup2 rw\n");
    const qs_limits inside = read_limits();
    cr_assert_eq(a.count, b.count);
    const int n = a.count;
    cr_assert_eq(a.limit[0].sharers, b.limit[0].sharers);
    cr_assert_neq(a.limit[n - 2].sharers, b.limit[n - 2].sharers);
    cr_assert_eq(a.limit[n - 1].sharers, b.limit[n - 1].sharers);
    cr_assert_eq(inside.limit[inside.count - 1].sharers, a.limit[n - 2].sharers);
}

/* ---- ulimit, and what the process has already ---- */

Test(limits, ulimits_are_the_processs_own, .init = make_root, .fini = remove_root)
{
    const struct rlimit set = {(rlim_t)3 << 50, RLIM_INFINITY},
                        data = {(rlim_t)2 << 50, RLIM_INFINITY};
    put("/proc/self/statm", "1000 300 200 10 0 400 0\n");
    cr_assert_eq(setrlimit(RLIMIT_AS, &set), 0);
    cr_assert_eq(setrlimit(RLIMIT_DATA, &data), 0);
    const qs_limits limits = read_limits();
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    cr_assert_eq(limits.count, 3);
    cr_assert_eq(limits.limit[0].held, 100 * page); /* resident, not shared */
    cr_assert_eq(limits.limit[1].kind, QS_LIMIT_ADDRESS_SPACE);
    cr_assert_eq(limits.limit[1].bytes, (size_t)3 << 50);
    cr_assert_eq(limits.limit[1].held, 1000 * page);
    cr_assert_eq(limits.limit[2].kind, QS_LIMIT_DATA);
    cr_assert_eq(limits.limit[2].bytes, (size_t)2 << 50);
    cr_assert_eq(limits.limit[2].held, 400 * page);
    cr_assert(limits.limit[1].sharers == 0 && limits.limit[2].sharers == 0);
    cr_assert(strstr(qs_limit_remedy(&limits.limit[1]), "ulimit -v") != NULL);
    cr_assert(strstr(qs_limit_remedy(&limits.limit[2]), "ulimit -d") != NULL);
    static const char *const garbage[] = {"", "1", "a b c d e f", "1 2 3 4 5"};
    for (size_t i = 0; i < sizeof garbage / sizeof *garbage; i++) {
        put("/proc/self/statm", "%s\n", garbage[i]);
        cr_assert_eq(read_limits().limit[1].held, 0, "%s", garbage[i]);
    }
    put("/proc/self/statm", "1000 200 300 10 0 400 0\n");
    cr_assert_eq(read_limits().limit[0].held, 0);
}

Test(limits, the_real_ones_can_be_read)
{
    qs_limits limits;
    qs_limits_read(&limits, "");
    cr_assert_geq(limits.count, 1);
    cr_assert(limits.limit[0].held > 0 && limits.limit[0].held < limits.limit[0].bytes);
}

Test(limits, slurm_is_called_by_its_name)
{
    qs_limit limit = {.kind = QS_LIMIT_CGROUP, .bytes = (size_t)16 << 30, .file = "memory.max"};
    char text[QS_LIMIT_TEXT_MAX];
    snprintf(limit.group, sizeof limit.group, "/system.slice/slurmstepd.scope/job_7/step_0");
    qs_limit_describe(&limit, text, sizeof text);
    cr_assert_str_eq(text, "16.00 GiB that Slurm gives this job on a node (cgroup memory.max)");
    cr_assert(strstr(qs_limit_remedy(&limit), "--mem") != NULL);
    snprintf(limit.group, sizeof limit.group, "/docker/abc");
    qs_limit_describe(&limit, text, sizeof text);
    cr_assert_str_eq(text, "16.00 GiB that the container or service has (memory.max of cgroup "
                           "/docker/abc)");
    cr_assert(strstr(qs_limit_remedy(&limit), "--mem") == NULL);
}

/* ---- ranks ---- */

/* Limits that no machine set: a job's of 64 GiB, and 20 GiB of each task, of which two ranks share
 * the last one. */
typedef struct {
    size_t job_bytes, task_bytes, own_bytes;
} made_up;

enum { BESIDE = 16 * MIB }; /* what room.c leaves to a process beside its plan */

static qs_limits limits_of(const made_up *m, int rank, int nranks)
{
    const int task = rank == nranks - 1 && nranks > 1 ? rank - 1 : rank;
    qs_limits limits = {.count = 3};
    limits.limit[0] = (qs_limit){.kind = QS_LIMIT_MACHINE, .sharers = 11, .bytes = (size_t)1 << 40};
    limits.limit[1] = (qs_limit){.kind = QS_LIMIT_CGROUP,
                                 .sharers = 100 + (uint64_t)task,
                                 .bytes = m->task_bytes,
                                 .held = 1000};
    limits.limit[2] =
        (qs_limit){.kind = QS_LIMIT_CGROUP, .sharers = 12, .bytes = m->job_bytes, .held = 1000};
    if (m->own_bytes > 0) {
        limits.limit[limits.count++] =
            (qs_limit){.kind = QS_LIMIT_ADDRESS_SPACE, .bytes = m->own_bytes, .held = 5000};
    }
    return limits;
}

static qs_status check_room(team_member *me)
{
    const made_up *m = me->ctx;
    const qs_limits limits = limits_of(m, me->rank, me->nranks);
    qs_room room;
    QS_TRY(qs_room_share(&room, &limits, 1, me->comm));
    const int in_task = me->nranks > 1 && me->rank >= me->nranks - 2 ? 2 : 1;
    size_t least = ((size_t)1 << 40) / (size_t)me->nranks;
    const size_t task = m->task_bytes / (size_t)in_task - 1000,
                 job = m->job_bytes / (size_t)me->nranks - 1000,
                 own = m->own_bytes > 0 ? m->own_bytes - 5000 : SIZE_MAX;
    int sharers = me->nranks;
    const struct {
        size_t bytes;
        int sharers;
    } parts[] = {{task, in_task}, {job, me->nranks}, {own, 1}};
    for (int i = 0; i < 3; i++) {
        sharers = parts[i].bytes < least ? parts[i].sharers : sharers;
        least = parts[i].bytes < least ? parts[i].bytes : least;
    }
    TEAM_CHECK(room.bytes == least - BESIDE, "%zu, not %zu", room.bytes, least - BESIDE);
    TEAM_CHECK(room.sharers == sharers, "%d sharers, not %d", room.sharers, sharers);
    return QS_OK;
}

Test(room, what_ranks_share_is_divided_and_what_is_theirs_is_not)
{
    static const int teams[] = {1, 2, 3, 4, 5, 8};
    made_up cases[] = {{(size_t)64 << 30, (size_t)20 << 30, 0},
                       {(size_t)64 << 30, (size_t)64 << 30, 0},
                       {(size_t)1 << 39, (size_t)20 << 30, 0},
                       {(size_t)64 << 30, (size_t)20 << 30, (size_t)3 << 30},
                       {(size_t)64 << 30, (size_t)20 << 30, (size_t)15 << 30}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        for (size_t t = 0; t < sizeof teams / sizeof *teams; t++) {
            team_expect_ok(teams[t], check_room, &cases[i]);
        }
    }
}

/* Two hosts, two ranks each: neither host's memory is the other's. */
static qs_status check_hosts(team_member *me)
{
    const qs_limits limits = {
        .count = 1,
        .limit = {
            {.kind = QS_LIMIT_MACHINE, .sharers = 5 + (uint64_t)(me->rank % 2), .bytes = 1 << 30}}};
    qs_room room;
    char text[QS_ROOM_TEXT_MAX];
    QS_TRY(qs_room_share(&room, &limits, 1, me->comm));
    TEAM_CHECK(room.bytes == (1 << 29) - BESIDE && room.sharers == 2, "%zu", room.bytes);
    qs_room_describe(&room, text, sizeof text);
    TEAM_CHECK(strcmp(text, "1.00 GiB of this host for 2 ranks") == 0, "%s", text);
    return QS_OK;
}

Test(room, a_host_is_divided_among_its_own_ranks)
{
    team_expect_ok(4, check_hosts, NULL);
}

static qs_status check_threads(team_member *me)
{
    const qs_limits limits = {
        .count = 2,
        .limit = {{.kind = QS_LIMIT_MACHINE, .sharers = 5, .bytes = (size_t)1 << 40},
                  {.kind = QS_LIMIT_ADDRESS_SPACE, .bytes = (size_t)1 << 30}}};
    qs_room one, four;
    QS_TRY(qs_room_share(&one, &limits, 1, me->comm));
    QS_TRY(qs_room_share(&four, &limits, 4, me->comm));
    TEAM_CHECK(one.bytes == ((size_t)1 << 30) - BESIDE, "%zu", one.bytes);
    TEAM_CHECK(four.bytes <= one.bytes - 3 * (size_t)(64 * MIB), "%zu", four.bytes);
    const qs_limits small = {
        .count = 1,
        .limit = {{.kind = QS_LIMIT_MACHINE, .sharers = 5, .bytes = MIB, .held = 2 * MIB}}};
    QS_TRY(qs_room_share(&one, &small, 1, me->comm));
    TEAM_CHECK(one.bytes == 0, "%zu of less than nothing", one.bytes);
    return QS_OK;
}

Test(room, threads_take_addresses_and_too_little_is_nothing)
{
    team_expect_ok(1, check_threads, NULL);
}

Test(room, a_configured_limit_only_lowers_it)
{
    cr_assert_eq(qs_room_within(100, 0), 100);
    cr_assert_eq(qs_room_within(100, 99), 99);
    cr_assert_eq(qs_room_within(100, 101), 100);
}

/* On paper every rank has what this process has, and shares all but what is a process's own. */
Test(room, assumed_ranks_share)
{
    const struct rlimit set = {(rlim_t)3 << 50, RLIM_INFINITY};
    const qs_room one = qs_room_assume(1, 1), four = qs_room_assume(1, 4);
    cr_assert_lt(four.bytes, one.bytes / 4 + 1);
    cr_assert_eq(four.sharers, 4);
    cr_assert_eq(setrlimit(RLIMIT_AS, &set), 0); /* far above the machine's */
    cr_assert_eq(qs_room_assume(1, 1).limit.kind, one.limit.kind);
#ifndef __SANITIZE_ADDRESS__ /* which takes terabytes of addresses */
    const struct rlimit low = {(rlim_t)1 << 30, RLIM_INFINITY};
    cr_assert_eq(setrlimit(RLIMIT_AS, &low), 0);
    const qs_room limited = qs_room_assume(1, 1), shared = qs_room_assume(1, 2);
    cr_assert_eq(limited.limit.kind, QS_LIMIT_ADDRESS_SPACE);
    cr_assert_eq(limited.sharers, 1);
    cr_assert_eq(shared.limit.kind, QS_LIMIT_ADDRESS_SPACE);
    cr_assert_gt(2 * shared.bytes, limited.bytes + limited.bytes / 2); /* not divided */
#endif
}
