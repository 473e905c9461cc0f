/* Every I/O call of the save path fails in turn, in every way: what was good stays good, and
 * success is never claimed in vain.
 *
 * tests/faults/iofault.c makes the n-th call fail in tests/cases/save_dummy.c. A judge then looks
 * at the folder:
 * 1. the exit code is 0, 4 or death by SIGKILL, as the fault allows;
 * 2. every directory that lists as a checkpoint verifies, and the older ones are there;
 * 3. after exit 0 the new one verifies;
 * 4. a fault that does not kill leaves no temporary file, and exactly one error line if it made the
 * program fail;
 * 5. the same command without a fault then succeeds. */
#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/status.h"
#include "store/h5.h"
#include "store/io.h"
#include "store/manifest.h"
#include "tests/scratch.h"

enum { FILE_BYTES = 300000, H5_COUNT = 5000, ERRORS = 8192, STATE_BYTES = 5000 };

static char dir[SCRATCH_MAX];

/** In memory where that is possible: thousands of fsyncs. */
static void make_dir(void)
{
    scratch_make(dir, scratch_in_memory());
}

static void remove_dir(void)
{
    scratch_remove(dir);
}

static const char *in_build(const char *name)
{
    static char path[2][512];
    static int turn;
    const char *build = getenv("QSHARD_BINARY_DIR");
    turn = 1 - turn;
    (void)snprintf(path[turn], sizeof path[turn], "%s/tests/%s", build != NULL ? build : ".", name);
    return path[turn];
}

typedef struct {
    int exit_code; /* -1: killed by SIGKILL, -2: anything else */
    char errors[ERRORS];
} outcome;

/** In the child: the environment of a fault, then the program. */
static void become(const char *fault, char *const arguments[])
{
    if (fault != NULL) {
        setenv("FAULT", fault, 1);
        setenv("FAULT_PATH", dir, 1);
        setenv("LD_PRELOAD", in_build("libiofault.so"), 1);
        const char *asan =
            getenv("ASAN_OPTIONS"); /* the shim comes before the sanitizer's library */
        char options[512];
        (void)snprintf(options, sizeof options, "%s:verify_asan_link_order=0",
                       asan != NULL ? asan : "");
        setenv("ASAN_OPTIONS", options, 1);
    }
    execv(in_build("case_save_dummy"), arguments);
    _exit(98);
}

static outcome run(const char *fault, char *const arguments[])
{
    outcome o = {.exit_code = -2};
    int status = 0;
    size_t got = 0;
    ssize_t n = 0;
    int ends[2];
    cr_assert_eq(pipe(ends), 0);
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 2);
        close(ends[0]);
        close(ends[1]);
        become(fault, arguments);
    }
    close(ends[1]);
    while (got < ERRORS - 1 && (n = read(ends[0], o.errors + got, ERRORS - 1 - got)) > 0) {
        got += (size_t)n;
    }
    close(ends[0]);
    cr_assert_eq(waitpid(child, &status, 0), child);
    if (WIFEXITED(status)) {
        o.exit_code = WEXITSTATUS(status);
    } else if (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) {
        o.exit_code = -1;
    }
    return o;
}

static outcome run_save(const char *fault, int step, size_t bytes, int keep)
{
    char numbers[3][24];
    (void)snprintf(numbers[0], sizeof numbers[0], "%d", step);
    (void)snprintf(numbers[1], sizeof numbers[1], "%zu", bytes);
    (void)snprintf(numbers[2], sizeof numbers[2], "%d", keep);
    return run(fault,
               (char *[]){"save_dummy", "save", dir, numbers[0], numbers[1], numbers[2], NULL});
}

static outcome run_write(const char *fault, const char *mode, const char *path, int seed)
{
    char number[24];
    (void)snprintf(number, sizeof number, "%d", seed);
    return run(fault, (char *[]){"save_dummy", (char *)mode, (char *)path, number, NULL});
}

static int count_calls(const outcome *o)
{
    int calls = 0;
    const char *at = strstr(o->errors, "iofault: calls ");
    cr_assert_eq(o->exit_code, 0, "%s", o->errors);
    cr_assert(at != NULL && sscanf(at, "iofault: calls %d", &calls) == 1, "%s", o->errors);
    return calls;
}

static int occurrences(const char *text, const char *word)
{
    int count = 0;
    for (const char *at = text; (at = strstr(at, word)) != NULL; at++) {
        count++;
    }
    return count;
}

static int temporary_entries(void)
{
    char command[128];
    int count = -1;
    (void)snprintf(command, sizeof command, "ls -A %s | grep -c tmp", dir);
    FILE *pipe = popen(command, "r");
    cr_assert_eq(fscanf(pipe, "%d", &count), 1);
    pclose(pipe);
    return count;
}

static bool verifies(int step)
{
    char path[128];
    qs_manifest m;
    qs_manifest_step_dir(path, sizeof path, dir, step);
    bool good = qs_manifest_verify(path, &m) == QS_OK;
    if (good) {
        qs_manifest_free(&m);
    }
    qs_error_clear();
    return good;
}

/** Number of checkpoints, all of which must verify. */
static int good_checkpoints(const char *fault)
{
    int64_t steps[16];
    int count = 0;
    cr_assert_eq(qs_manifest_list(dir, steps, 16, &count), QS_OK);
    for (int i = 0; i < count; i++) {
        cr_assert(verifies((int)steps[i]), "%s: step %d is listed, but does not verify", fault,
                  (int)steps[i]);
    }
    return count;
}

typedef struct {
    char name[16];
    bool kills, must_succeed;
} fault_kind;

static fault_kind all_kinds[] = {
    {"EIO", false, false},    {"ENOSPC", false, false},    {"EDQUOT", false, false},
    {"ESTALE", false, false}, {"late", false, false},      {"ENOSPC+", false, false},
    {"EINTR", false, true},   {"short", false, true},      {"flip", false, false},
    {"lost", false, false},   {"killbefore", true, false}, {"killafter", true, false}};

ParameterizedTestParameters(faults, save)
{
    return cr_make_param_array(fault_kind, all_kinds, sizeof all_kinds / sizeof *all_kinds);
}

/** Rules 1 and 4, common to all ways of writing. */
static void judge_process(const outcome *o, const fault_kind *kind, const char *fault)
{
    cr_assert_not_null(strstr(o->errors, "iofault: call "), "%s did not strike", fault);
    if (kind->kills) {
        cr_assert_eq(o->exit_code, -1, "%s: exit %d", fault, o->exit_code);
        return;
    }
    cr_assert(o->exit_code == 0 || (o->exit_code == 4 && !kind->must_succeed), "%s: exit %d\n%s",
              fault, o->exit_code, o->errors);
    cr_assert_eq(occurrences(o->errors, "error[E4"), o->exit_code == 4, "%s:\n%s", fault,
                 o->errors);
    bool full = strncmp(kind->name, "ENOSPC", 6) == 0 || strcmp(kind->name, "EDQUOT") == 0;
    if (full && o->exit_code == 4) {
        cr_assert_not_null(strstr(o->errors, "error[E401]"), "%s:\n%s", fault, o->errors);
    }
    if (strchr(kind->name, '+') == NULL) { /* else removing fails as well */
        cr_assert_eq(temporary_entries(), 0, "%s left a temporary file", fault);
    }
}

ParameterizedTest(fault_kind *kind, faults, save, .init = make_dir, .fini = remove_dir,
                  .timeout = 300)
{
    char fault[64];
    char path[128];
    cr_assert_eq(run_save(NULL, 1, STATE_BYTES, 0).exit_code, 0);
    cr_assert_eq(run_save(NULL, 2, STATE_BYTES, 0).exit_code, 0);
    qs_manifest_step_dir(path, sizeof path, dir, 3);
    const outcome counted = run_save("io:count", 3, STATE_BYTES, 0);
    const int calls = count_calls(&counted);
    cr_assert_gt(calls, 15, "two files, a manifest, two directories");
    for (int n = 1; n <= calls; n++) {
        cr_assert_eq(qs_io_remove_dir(path), QS_OK);
        (void)snprintf(fault, sizeof fault, "io:%d:%s", n, kind->name);
        const outcome o = run_save(fault, 3, STATE_BYTES, 0);
        judge_process(&o, kind, fault);
        const int good = good_checkpoints(fault);
        cr_assert(verifies(1) && verifies(2), "%s: an older checkpoint is lost", fault);
        cr_assert(o.exit_code != 0 || verifies(3), "%s: FALSE SUCCESS", fault);
        cr_assert_eq(good, 2 + verifies(3), "%s", fault);
        const outcome again = run_save(NULL, 3, STATE_BYTES, 0);
        cr_assert_eq(again.exit_code, 0, "%s, then again: %s", fault, again.errors);
        cr_assert(verifies(3), "%s, then again", fault);
        cr_assert_eq(temporary_entries(), 0, "%s, then again", fault);
    }
}

ParameterizedTestParameters(faults, rotation)
{
    static fault_kind kinds[] = {
        {"EIO", false, false}, {"killbefore", true, false}, {"killafter", true, false}};
    return cr_make_param_array(fault_kind, kinds, sizeof kinds / sizeof *kinds);
}

ParameterizedTest(fault_kind *kind, faults, rotation, .init = make_dir, .fini = remove_dir,
                  .timeout = 300)
{
    char fault[64];
    int calls = 1000;
    for (int n = 0; n <= calls; n++) {
        remove_dir();
        cr_assert_eq(mkdir(dir, 0700), 0);
        cr_assert_eq(run_save(NULL, 1, STATE_BYTES, 0).exit_code, 0);
        cr_assert_eq(run_save(NULL, 2, STATE_BYTES, 0).exit_code, 0);
        if (n == 0) {
            const outcome counted = run_save("io:count", 3, STATE_BYTES, 2);
            calls = count_calls(&counted);
            cr_assert(!verifies(1) && verifies(2) && verifies(3), "rotated");
            n = calls - 12; /* the removal; the calls before are those of the sweep above */
            continue;
        }
        (void)snprintf(fault, sizeof fault, "io:%d:%s", n, kind->name);
        const outcome o = run_save(fault, 3, STATE_BYTES, 2);
        cr_assert(o.exit_code == (kind->kills ? -1 : 0) || o.exit_code == 4, "%s: exit %d\n%s",
                  fault, o.exit_code, o.errors);
        cr_assert_geq(good_checkpoints(fault), 2, "%s: fewer than two good checkpoints", fault);
        cr_assert(o.exit_code != 0 || verifies(3), "%s: FALSE SUCCESS", fault);
    }
}

static bool holds(const char *path, int seed)
{
    void *data = NULL;
    size_t bytes = 0;
    bool good = qs_io_read_file(path, 1 << 20, &data, &bytes) == QS_OK && bytes == FILE_BYTES;
    for (size_t i = 0; good && i < bytes; i++) {
        good = ((char *)data)[i] == (char)((uint64_t)seed * 131 + i * 7 + i / 251);
    }
    qs_error_clear();
    free(data);
    return good;
}

ParameterizedTestParameters(faults, write_file)
{
    return cr_make_param_array(fault_kind, all_kinds, sizeof all_kinds / sizeof *all_kinds);
}

ParameterizedTest(fault_kind *kind, faults, write_file, .init = make_dir, .fini = remove_dir,
                  .timeout = 300)
{
    char fault[64];
    char path[128];
    (void)snprintf(path, sizeof path, "%s/f", dir);
    const outcome counted = run_write("io:count", "file", path, 1);
    const int calls = count_calls(&counted);
    cr_assert_gt(calls, 6);
    for (int n = 1; n <= calls; n++) {
        cr_assert_eq(run_write(NULL, "file", path, 1).exit_code, 0);
        (void)snprintf(fault, sizeof fault, "io:%d:%s", n, kind->name);
        const outcome o = run_write(fault, "file", path, 2);
        judge_process(&o, kind, fault);
        cr_assert(holds(path, 1) || holds(path, 2), "%s: neither the old file nor the new", fault);
        cr_assert(o.exit_code != 0 || holds(path, 2), "%s: FALSE SUCCESS", fault);
    }
}

/* Nor is it a file of other bytes. */
Test(faults, a_file_that_cannot_be_read_back_is_told_so, .init = make_dir, .fini = remove_dir)
{
    char fault[64], path[128];
    (void)snprintf(path, sizeof path, "%s/f", dir);
    const outcome counted = run_write("read:count", "file", path, 1);
    const int calls = count_calls(&counted);
    cr_assert_gt(calls, 0);
    for (int n = 1; n <= calls; n++) {
        (void)snprintf(fault, sizeof fault, "read:%d:EIO", n);
        const outcome o = run_write(fault, "file", path, 2);
        cr_assert_eq(o.exit_code, 4, "%s: %s", fault, o.errors);
        cr_assert_not_null(strstr(o.errors, "error[E402]"), "%s: %s", fault, o.errors);
        cr_assert_not_null(strstr(o.errors, ": cannot be read back: Input/output error"), "%s: %s",
                           fault, o.errors);
        cr_assert(holds(path, 1), "%s: the old file stays", fault);
        cr_assert_eq(temporary_entries(), 0, "%s", fault);
    }
}

/** The file that save_dummy writes, whole. */
static bool h5_holds(const char *path, int seed)
{
    qs_h5 *file = NULL;
    int64_t found = 0;
    char data[H5_COUNT];
    qs_h5_info filled = {.dtype = QS_U8, .rank = 1, .dims = {H5_COUNT}};
    qs_h5_info room = {.dtype = QS_F32, .rank = 2, .dims = {100, 64}};
    bool good = qs_h5_open(&file, path) == QS_OK &&
                qs_h5_attr_get_i64(file, "seed", &found) == QS_OK && found == seed &&
                qs_h5_dataset_find(file, "a/room", &room) == QS_OK &&
                qs_h5_dataset_find(file, "a/filled", &filled) == QS_OK &&
                qs_h5_dataset_get(file, "a/filled", &filled, 0, H5_COUNT, data) == QS_OK;
    for (size_t i = 0; good && i < H5_COUNT; i++) {
        good = data[i] == (char)((uint64_t)seed * 131 + i * 7 + i / 251);
    }
    good = qs_h5_close(file) == QS_OK && good;
    qs_error_clear();
    return good;
}

ParameterizedTestParameters(faults, hdf5)
{
    static fault_kind kinds[] = {{"EIO", false, false},   {"ENOSPC", false, false},
                                 {"late", false, false},  {"ENOSPC+", false, false},
                                 {"EINTR", false, false}, {"flip", false, false},
                                 {"lost", false, false},  {"short", false, true}};
    return cr_make_param_array(fault_kind, kinds, sizeof kinds / sizeof *kinds);
}

/* HDF5 itself hides failed writes (contiguous data: 1 fault point of 7); our reading back must not.
 */
ParameterizedTest(fault_kind *kind, faults, hdf5, .init = make_dir, .fini = remove_dir,
                  .timeout = 300)
{
    char fault[64];
    char path[128];
    (void)snprintf(path, sizeof path, "%s/f.h5", dir);
    const outcome counted = run_write("io:count", "h5", path, 1);
    const int calls = count_calls(&counted);
    cr_assert(h5_holds(path, 1));
    cr_assert_gt(calls, 6);
    for (int n = 1; n <= calls; n++) {
        (void)unlink(path);
        (void)snprintf(fault, sizeof fault, "io:%d:%s", n, kind->name);
        const outcome o = run_write(fault, "h5", path, 2);
        cr_assert_not_null(strstr(o.errors, "iofault: call "), "%s did not strike", fault);
        cr_assert(o.exit_code == 0 || (o.exit_code == 4 && !kind->must_succeed), "%s: exit %d\n%s",
                  fault, o.exit_code, o.errors);
        cr_assert_eq(occurrences(o.errors, "error[E4"), o.exit_code == 4, "%s:\n%s", fault,
                     o.errors);
        cr_assert(o.exit_code != 0 || h5_holds(path, 2), "%s: FALSE SUCCESS", fault);
    }
}

ParameterizedTestParameters(faults, a_file_system_that_reserves_nothing_is_as_good)
{
    static char mode[][8] = {"file", "h5"};
    return cr_make_param_array(char[8], mode, sizeof mode / sizeof *mode);
}

ParameterizedTest(char *mode, faults, a_file_system_that_reserves_nothing_is_as_good,
                  .init = make_dir, .fini = remove_dir)
{
    char fault[64];
    char path[128];
    int reserved = 0;
    (void)snprintf(path, sizeof path, "%s/f", dir);
    const outcome counted = run_write("io:count", mode, path, 1);
    const int calls = count_calls(&counted);
    for (int n = 1; n <= calls; n++) {
        (void)unlink(path);
        (void)snprintf(fault, sizeof fault, "io:%d:EOPNOTSUPP", n);
        const outcome o = run_write(fault, mode, path, 2);
        if (strstr(o.errors, " fallocate ") != NULL) {
            reserved++;
            cr_assert_eq(o.exit_code, 0, "%s: %s", fault, o.errors);
            cr_assert(strcmp(mode, "h5") == 0 ? h5_holds(path, 2) : holds(path, 2), "%s", fault);
        }
    }
    cr_assert_eq(reserved, 1);
}

Test(faults, a_disk_that_fills_up_loses_nothing, .init = make_dir, .fini = remove_dir)
{
    enum { LARGE = 150000 };
    int step = 0;
    outcome o = {.exit_code = 0};
    if (mount("tmpfs", dir, "tmpfs", 0, "size=1m") != 0) {
        cr_skip_test("a small tmpfs cannot be mounted here: %s", strerror(errno));
    }
    while (o.exit_code == 0 && step < 10) {
        o = run_save(NULL, ++step, LARGE, 0);
    }
    bool good = true;
    for (int s = 1; s < step; s++) {
        good = good && verifies(s);
    }
    const bool listed = verifies(step);
    const int temporary = temporary_entries();
    cr_assert_eq(umount(dir), 0);
    cr_assert_eq(step, 4, "three of 300 kB fit into 1 MiB");
    cr_assert_eq(o.exit_code, 4, "%s", o.errors);
    cr_assert_not_null(strstr(o.errors, "error[E401]"), "%s", o.errors);
    cr_assert(good, "an older checkpoint is lost");
    cr_assert_not(listed, "half a checkpoint verifies");
    cr_assert_eq(temporary, 0);
}
