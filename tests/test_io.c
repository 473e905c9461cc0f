/* Checked I/O and hashes: known answers, whole files or none, and the class of every failure. */
#define _GNU_SOURCE /* fallocate */
#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/status.h"
#include "store/hash.h"
#include "store/io.h"
#include "tests/scratch.h"

static char dir[SCRATCH_MAX];

static const char *in_dir(const char *name)
{
    static char path[2][160];
    static int turn;
    turn = 1 - turn;
    (void)snprintf(path[turn], sizeof path[turn], "%s/%s", dir, name);
    return path[turn];
}

static void make_dir(void)
{
    scratch_make(dir, NULL);
}

static void remove_dir(void)
{
    scratch_remove(dir);
}

static int entries(const char *path)
{
    char command[96];
    int count = -1;
    (void)snprintf(command, sizeof command, "ls -A %s | wc -l", path);
    FILE *pipe = popen(command, "r");
    cr_assert_eq(fscanf(pipe, "%d", &count), 1);
    pclose(pipe);
    return count;
}

static unsigned char *pattern(size_t bytes, unsigned seed)
{
    unsigned char *data = malloc(bytes + 1);
    for (size_t i = 0; i < bytes; i++) {
        seed = seed * 1664525u + 1013904223u;
        data[i] = (unsigned char)(seed >> 24);
    }
    return data;
}

TestSuite(io, .init = make_dir, .fini = remove_dir);

Test(hash, known_answers)
{
    char sha[QS_SHA256_HEX];
    char xxh[QS_XXH128_HEX];
    qs_sha256_hex("abc", 3, sha);
    cr_assert_str_eq(sha, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    qs_sha256_hex("", 0, sha);
    cr_assert_str_eq(sha, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    qs_xxh3_128_hex("", 0, xxh);
    cr_assert_str_eq(xxh, "99aa06d3014798d86001c324468d497f");
    cr_assert_eq(qs_xxh3_64("", 0), 0x2d06800538d394c2u);
}

Test(hash, pieces_and_streams_equal_the_whole)
{
    unsigned char *data = pattern(5000, 1);
    char whole[QS_SHA256_HEX];
    char streamed[QS_SHA256_HEX];
    for (size_t cut = 0; cut <= 5000; cut += 617) {
        qs_piece pieces[3] = {{data, cut}, {data + cut, 0}, {data + cut, 5000 - cut}};
        cr_assert_eq(qs_xxh3_64_pieces(pieces, 3), qs_xxh3_64(data, 5000));
        qs_sha256 *s = qs_sha256_begin();
        qs_sha256_add(s, data, cut);
        qs_sha256_add(s, data + cut, 5000 - cut);
        qs_sha256_end(s, streamed);
        qs_sha256_hex(data, 5000, whole);
        cr_assert_str_eq(streamed, whole);
    }
    free(data);
}

Test(io, write_file_round_trip_of_all_sizes)
{
    static const size_t sizes[] = {0, 1, 4095, 4096, (1 << 20) - 1, 1 << 20, (3 << 20) + 5};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        unsigned char *data = pattern(sizes[i], (unsigned)i);
        void *back = NULL;
        size_t bytes = 0;
        cr_assert_eq(qs_io_write_file(in_dir("f"), data, sizes[i]), QS_OK, "%s", qs_error_text());
        cr_assert_eq(qs_io_read_file(in_dir("f"), 4 << 20, &back, &bytes), QS_OK);
        cr_assert_eq(bytes, sizes[i]);
        cr_assert_arr_eq(back, data, sizes[i]);
        cr_assert_eq(((char *)back)[bytes], '\0');
        free(back);
        free(data);
    }
    cr_assert_eq(entries(dir), 1, "a temporary file was left");
}

Test(io, write_file_replaces_but_write_new_does_not)
{
    void *back = NULL;
    size_t bytes = 0;
    cr_assert_eq(qs_io_write_file(in_dir("f"), "old content", 11), QS_OK);
    cr_assert_eq(qs_io_write_file(in_dir("f"), "new", 3), QS_OK);
    cr_assert_eq(qs_io_write_new(in_dir("f"), "newest", 6), QS_ERR_OUTPUT_TAKEN);
    cr_assert_eq(qs_io_read_file(in_dir("f"), 100, &back, &bytes), QS_OK);
    cr_assert_eq(bytes, 3);
    cr_assert_str_eq(back, "new");
    free(back);
}

Test(io, a_pipe_is_not_replaced_nor_a_link_to_it)
{
    char pipe[512];
    struct stat info;
    snprintf(pipe, sizeof pipe, "%s", in_dir("pipe"));
    cr_assert_eq(mkfifo(pipe, 0600), 0);
    cr_assert_eq(symlink(pipe, in_dir("link")), 0);
    cr_assert_eq(qs_io_write_file(pipe, "x", 1), QS_ERR_OUTPUT_TAKEN);
    cr_assert_not_null(strstr(qs_error_text(), "pipe: is a device or a pipe"), "%s",
                       qs_error_text());
    cr_assert_eq(qs_io_write_file(in_dir("link"), "x", 1), QS_ERR_OUTPUT_TAKEN);
    cr_assert(lstat(pipe, &info) == 0 && S_ISFIFO(info.st_mode));
    cr_assert(lstat(in_dir("link"), &info) == 0 && S_ISLNK(info.st_mode));
}

Test(io, trying_a_file_says_what_writing_it_would)
{
    char long_name[5000];
    memset(long_name, 'x', sizeof long_name - 1);
    long_name[sizeof long_name - 1] = '\0';
    const char *const paths[] = {in_dir("there/not/f"), long_name, dir};
    for (int i = 0; i < 3; i++) {
        const qs_status tried = qs_io_try_file(paths[i], NULL);
        char text[512];
        snprintf(text, sizeof text, "%s", qs_error_text());
        qs_error_clear();
        cr_assert_eq(tried, QS_ERR_IO, "%d: %s", i, text);
        cr_assert_null(strstr(text, ".tmp-"), "%s", text);
        cr_assert_eq(qs_io_write_file(paths[i], "x", 1), tried);
        qs_error_clear();
    }
    void *back = NULL;
    size_t bytes = 0;
    cr_assert_eq(qs_io_try_file(in_dir("new"), NULL), QS_OK);
    cr_assert_eq(entries(dir), 0);
    cr_assert_eq(qs_io_write_file(in_dir("empty"), "", 0), QS_OK);
    cr_assert_eq(qs_io_try_file(in_dir("empty"), NULL), QS_OK);
    cr_assert_eq(qs_io_write_file(in_dir("old"), "an old one", 10), QS_OK);
    cr_assert_eq(qs_io_try_file(in_dir("old"), "old one"), QS_OK);
    static const char *const others[] = {NULL, "old one and more", "young"};
    for (int i = 0; i < 3; i++) {
        cr_assert_eq(qs_io_try_file(in_dir("old"), others[i]), QS_ERR_OUTPUT_TAKEN);
        cr_assert_not_null(strstr(qs_error_text(), "remove it"));
        qs_error_clear();
    }
    cr_assert_eq(qs_io_read_file(in_dir("old"), 100, &back, &bytes), QS_OK);
    cr_assert_str_eq(back, "an old one");
    cr_assert_eq(entries(dir), 2);
    free(back);
}

Test(io, failures_name_file_and_class)
{
    void *back = NULL;
    size_t bytes = 0;
    cr_assert_eq(qs_io_read_file(in_dir("none"), 100, &back, &bytes), QS_ERR_INPUT_MISSING);
    cr_assert_not_null(strstr(qs_error_text(), "/none"));
    qs_error_clear();
    cr_assert_eq(qs_io_read_file(dir, 100, &back, &bytes), QS_ERR_INPUT_FORMAT);
    qs_error_clear();
    cr_assert_eq(qs_io_write_file(in_dir("no/such/dir"), "x", 1), QS_ERR_IO);
    cr_assert_not_null(strstr(qs_error_text(), "no/such/dir"));
    qs_error_clear();
    cr_assert_eq(qs_io_write_file(in_dir("f"), "12345", 5), QS_OK);
    cr_assert_eq(qs_io_read_file(in_dir("f"), 4, &back, &bytes), QS_ERR_INPUT_VALUE);
    qs_error_clear();
    cr_assert_eq(qs_io_rename(in_dir("none"), in_dir("g")), QS_ERR_IO);
    qs_error_clear();
    cr_assert_eq(qs_io_mkdir(in_dir("f")), QS_ERR_OUTPUT_TAKEN);
    cr_assert_null(back);
}

Test(io, a_file_shorter_than_asked_is_refused)
{
    char buffer[16] = {0};
    cr_assert_eq(qs_io_write_file(in_dir("f"), "0123456789", 10), QS_OK);
    int fd = open(in_dir("f"), O_RDONLY);
    cr_assert_eq(qs_io_read_all(fd, buffer, 5, 5, in_dir("f")), QS_OK);
    cr_assert_str_eq(buffer, "56789");
    cr_assert_eq(qs_io_read_all(fd, buffer, 6, 5, in_dir("f")), QS_ERR_INPUT_FORMAT);
    close(fd);
}

Test(io, write_all_at_an_offset_leaves_the_rest)
{
    char buffer[11] = {0};
    cr_assert_eq(qs_io_write_file(in_dir("f"), "0123456789", 10), QS_OK);
    int fd = open(in_dir("f"), O_RDWR);
    cr_assert_eq(qs_io_write_all(fd, "abc", 3, 4, in_dir("f")), QS_OK);
    cr_assert_eq(qs_io_read_all(fd, buffer, 10, 0, in_dir("f")), QS_OK);
    cr_assert_str_eq(buffer, "0123abc789");
    close(fd);
    cr_assert_eq(qs_io_write_all(fd, "abc", 3, 4, in_dir("f")), QS_ERR_IO, "descriptor is closed");
}

Test(io, append_adds_lines)
{
    void *back = NULL;
    size_t bytes = 0;
    int fd = open(in_dir("log"), O_WRONLY | O_CREAT | O_APPEND, 0666);
    cr_assert_eq(qs_io_append(fd, "a\n", 2, in_dir("log")), QS_OK);
    cr_assert_eq(qs_io_append(fd, "bc\n", 3, in_dir("log")), QS_OK);
    close(fd);
    cr_assert_eq(qs_io_read_file(in_dir("log"), 100, &back, &bytes), QS_OK);
    cr_assert_str_eq(back, "a\nbc\n");
    free(back);
    fd = open("/dev/full", O_WRONLY);
    cr_assert_eq(qs_io_append(fd, "x", 1, "/dev/full"), QS_ERR_IO_FULL);
    close(fd);
}

/* So that the next line, when there is room again, does not go on in the middle of it. */
Test(io, a_line_that_does_not_fit_leaves_no_half_of_it)
{
    struct rlimit limit;
    void *back = NULL;
    size_t bytes = 0;
    signal(SIGXFSZ, SIG_IGN);
    int fd = open(in_dir("log"), O_WRONLY | O_CREAT | O_APPEND, 0666);
    cr_assert_eq(getrlimit(RLIMIT_FSIZE, &limit), 0);
    const rlim_t most = limit.rlim_cur;
    limit.rlim_cur = 10;
    cr_assert_eq(setrlimit(RLIMIT_FSIZE, &limit), 0);
    const qs_status fits = qs_io_append(fd, "first\n", 6, in_dir("log"));
    const qs_status does_not = qs_io_append(fd, "second\n", 7, in_dir("log"));
    limit.rlim_cur = most;
    cr_assert_eq(setrlimit(RLIMIT_FSIZE, &limit), 0);
    cr_assert_eq(fits, QS_OK);
    cr_assert_eq(does_not, QS_ERR_IO_FULL);
    cr_assert_not_null(strstr(qs_error_text(), "ulimit -f"), "%s", qs_error_text());
    qs_error_clear();
    cr_assert_eq(qs_io_append(fd, "third\n", 6, in_dir("log")), QS_OK);
    close(fd);
    cr_assert_eq(qs_io_read_file(in_dir("log"), 100, &back, &bytes), QS_OK);
    cr_assert_str_eq(back, "first\nthird\n");
    free(back);
}

Test(io, directories_are_made_renamed_and_removed)
{
    cr_assert_eq(qs_io_mkdir(in_dir("a")), QS_OK);
    cr_assert_eq(qs_io_mkdir(in_dir("a")), QS_OK, "existing is fine");
    cr_assert_eq(qs_io_write_new(in_dir("a/x"), "x", 1), QS_OK);
    cr_assert_eq(qs_io_fsync_dir(in_dir("a")), QS_OK);
    cr_assert_eq(qs_io_rename(in_dir("a"), in_dir("b")), QS_OK);
    cr_assert_eq(qs_io_remove_dir(in_dir("b")), QS_OK);
    cr_assert_eq(qs_io_remove_dir(in_dir("b")), QS_OK, "missing is fine");
    cr_assert_eq(qs_io_mkdir(in_dir("c")), QS_OK);
    cr_assert_eq(qs_io_mkdir(in_dir("c/sub")), QS_OK);
    cr_assert_eq(qs_io_remove_dir(in_dir("c")), QS_ERR_IO, "a subdirectory is not ours");
    cr_assert_eq(access(in_dir("c/sub"), F_OK), 0);
    qs_error_clear();
    cr_assert_eq(qs_io_mkdir(in_dir("d")), QS_OK);
    cr_assert_eq(qs_io_rename(in_dir("d"), in_dir("c")), QS_ERR_OUTPUT_TAKEN);
    cr_assert_not_null(strstr(qs_error_text(), "/c: exists already"), "%s", qs_error_text());
}

Test(io, all_levels_that_are_missing_are_made_and_taken_back)
{
    static const struct {
        const char *path;
        int made;
    } rows[] = {{"up/a/b/c", 3}, {"up/a//b/", 2}, {"up/a", 1}, {"up", 0}, {"up/", 0}};
    cr_assert_eq(qs_io_mkdir(in_dir("up")), QS_OK);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        int made = -1, again = -1;
        const char *path = in_dir(rows[i].path);
        cr_assert_eq(qs_io_make_dirs(path, &made), QS_OK, "%s", qs_error_text());
        cr_assert_eq(made, rows[i].made, "%s: %d", rows[i].path, made);
        cr_assert_eq(qs_io_make_dirs(path, &again), QS_OK, "existing is fine");
        cr_assert_eq(again, 0);
        qs_io_take_back_dirs(path, made);
        cr_assert_eq(entries(dir), 1, "up was there before");
        cr_assert_eq(entries(in_dir("up")), 0, "%s", rows[i].path);
    }
}

Test(io, levels_that_are_no_longer_empty_stay)
{
    int made = 0;
    cr_assert_eq(qs_io_make_dirs(in_dir("a/b/c"), &made), QS_OK);
    cr_assert_eq(qs_io_write_new(in_dir("a/x"), "x", 1), QS_OK);
    qs_io_take_back_dirs(in_dir("a/b/c"), made);
    cr_assert_eq(entries(in_dir("a")), 1, "the file alone");
}

Test(io, levels_that_cannot_be_made_leave_none)
{
    char name[300] = "a/b/";
    int made = -1;
    memset(name + 4, 'x', sizeof name - 5); /* longer than a name may be */
    name[sizeof name - 1] = '\0';
    char path[400], below[410];
    (void)snprintf(path, sizeof path, "%s/%s", dir, name);
    (void)snprintf(below, sizeof below, "%s/c", path);
    cr_assert_eq(qs_io_make_dirs(path, &made), QS_ERR_IO);
    cr_assert_eq(made, 0);
    qs_error_clear();
    cr_assert_eq(qs_io_make_dirs(below, &made), QS_ERR_IO);
    cr_assert_eq(entries(dir), 0);
    qs_error_clear();
    cr_assert_eq(qs_io_write_new(in_dir("f"), "x", 1), QS_OK);
    cr_assert_neq(qs_io_make_dirs(in_dir("f/a/b"), &made), QS_OK);
    cr_assert_not_null(strstr(qs_error_text(), "/f/a/b: "), "%s", qs_error_text());
    cr_assert_eq(made, 0);
}

/* From here on the kernel answers fallocate with `error` in this process: as NFS before 4.2 does.
 * False where that cannot be had. */
static bool refuse_fallocate(int error)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_fallocate, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (unsigned)error),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
    struct sock_fprog program = {.len = sizeof code / sizeof *code, .filter = code};
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
           prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

ParameterizedTestParameters(io, where_space_cannot_be_reserved_nothing_is_written)
{
    static int error[] = {EOPNOTSUPP, ENOSYS, EINVAL};
    return cr_make_param_array(int, error, sizeof error / sizeof *error);
}

ParameterizedTest(int *error, io, where_space_cannot_be_reserved_nothing_is_written,
                  .init = make_dir, .fini = remove_dir)
{
    enum { ROOM = 1 << 20 };
    struct stat info;
    int fd = -1;
    cr_assert_eq(qs_io_create(in_dir("f"), &fd), QS_OK);
    if (!refuse_fallocate(*error)) {
        cr_skip_test("no filter of system calls here: %s", strerror(errno));
    }
    cr_assert(fallocate(fd, 0, 0, ROOM) == -1 && errno == *error);
    cr_assert_eq(qs_io_reserve(fd, ROOM, "f"), QS_OK, "%s", qs_error_text());
    cr_assert_eq(fstat(fd, &info), 0);
    cr_assert_eq(info.st_size, 0);
    cr_assert_eq(info.st_blocks, 0);
    cr_assert_eq(qs_io_write_file(in_dir("g"), "whole", 5), QS_OK, "%s", qs_error_text());
    close(fd);
}

Test(io, space_is_reserved_where_that_can_be_done)
{
    enum { ROOM = 1 << 20 };
    struct stat info;
    int fd = -1;
    cr_assert_eq(qs_io_create(in_dir("f"), &fd), QS_OK);
    if (fallocate(fd, 0, 0, 1) != 0) {
        cr_skip_test("this file system reserves nothing: %s", strerror(errno));
    }
    cr_assert_eq(qs_io_reserve(fd, ROOM, "f"), QS_OK, "%s", qs_error_text());
    cr_assert_eq(fstat(fd, &info), 0);
    cr_assert_eq(info.st_size, ROOM);
    cr_assert_geq(info.st_blocks * 512, ROOM);
    cr_assert_eq(qs_io_reserve(fd, 0, "f"), QS_OK, "%s", qs_error_text());
    cr_assert_eq(close(fd), 0);
    cr_assert_eq(qs_io_reserve(fd, ROOM, "closed"), QS_ERR_IO);
    cr_assert_not_null(strstr(qs_error_text(), "closed: reserving space failed"));
}

Test(io, free_bytes_is_asked_of_the_right_file_system)
{
    uint64_t bytes = 0;
    cr_assert_eq(qs_io_free_bytes(dir, &bytes), QS_OK);
    cr_assert_gt(bytes, 0);
    cr_assert_eq(qs_io_free_bytes(in_dir("none"), &bytes), QS_ERR_IO);
}

Test(io, a_full_disk_is_reported_and_loses_nothing)
{
    enum { DISK = 1 << 20 };
    const char *disk = in_dir("disk");
    char path[160];
    cr_assert_eq(mkdir(disk, 0777), 0);
    if (mount("tmpfs", disk, "tmpfs", 0, "size=1m") != 0) {
        cr_skip_test("a small tmpfs cannot be mounted here: %s", strerror(errno));
    }
    (void)snprintf(path, sizeof path, "%s/f", disk);
    unsigned char *data = pattern(2 * DISK, 3);
    qs_status first = qs_io_write_file(path, data, DISK / 2);
    qs_status too_large = qs_io_write_file(path, data + 1, 2 * DISK);
    char text[300];
    (void)snprintf(text, sizeof text, "%s", qs_error_text());
    qs_error_clear();
    qs_status no_room_for_two = qs_io_write_file(path, data + 1, DISK / 2 + 5000);
    qs_error_clear();
    void *back = NULL;
    size_t bytes = 0;
    qs_status read = qs_io_read_file(path, DISK, &back, &bytes);
    int left = entries(disk);
    int same = bytes == DISK / 2 && memcmp(back, data, bytes) == 0;
    umount(disk); /* before the asserts, so that nothing stays mounted */
    cr_assert_eq(first, QS_OK);
    cr_assert_eq(too_large, QS_ERR_IO_FULL, "%s", text);
    cr_assert_not_null(strstr(text, "free some space"), "%s", text);
    cr_assert_eq(no_room_for_two, QS_ERR_IO_FULL);
    cr_assert_eq(read, QS_OK);
    cr_assert(same, "the older file was damaged");
    cr_assert_eq(left, 1, "a temporary file was left");
    free(back);
    free(data);
}
