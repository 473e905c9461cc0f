/* Outputs that are there completely or not at all. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "store/io.h"
#include "store/staged.h"
#include "tests/scratch.h"

static char dir[SCRATCH_MAX];

/* Tests work in the scratch folder, so that names are short. */
static void enter_dir(void)
{
    scratch_make(dir, NULL);
    cr_assert_eq(chdir(dir), 0);
}

static void leave_dir(void)
{
    cr_assert_eq(chdir("/"), 0);
    scratch_remove(dir);
}

TestSuite(staged, .init = enter_dir, .fini = leave_dir, .timeout = 60);

static void put(const char *folder, const char *name)
{
    char path[QS_STAGED_PATH + 64];
    snprintf(path, sizeof path, "%s%s%s", folder, name[0] != '\0' ? "/" : "", name);
    cr_assert_eq(qs_io_write_new(path, "x", 1), QS_OK, "%s", qs_error_text());
}

/* Begun for OUT, with directory "inner" allowed in it. */
static qs_staged begun(void)
{
    qs_staged s;
    cr_assert_eq(qs_staged_name(&s, "out", "inner"), QS_OK, "%s", qs_error_text());
    cr_assert_eq(qs_staged_begin(&s, 1), QS_OK, "%s", qs_error_text());
    return s;
}

Test(staged, slashes_at_the_end_are_no_part_of_the_name)
{
    static const char *const rows[][3] = {{"out", "out", "."},
                                          {"out//", "out", "."},
                                          {"/out/", "/out", "/"},
                                          {"a/b/", "a/b", "a"},
                                          {"/a/b.h5", "/a/b.h5", "/a"}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        qs_staged s;
        char temp[64];
        cr_assert_eq(qs_staged_name(&s, rows[i][0], NULL), QS_OK);
        cr_assert_str_eq(s.place, rows[i][1]);
        cr_assert_str_eq(s.parent, rows[i][2]);
        snprintf(temp, sizeof temp, "%s.tmp-%ld", rows[i][1], (long)getpid());
        cr_assert_str_eq(s.temp, temp);
    }
}

Test(staged, what_is_no_name_is_refused)
{
    qs_staged s;
    char longest[QS_PATH_MAX + 1];
    memset(longest, 'x', sizeof longest - 1);
    longest[sizeof longest - 1] = '\0';
    cr_assert_eq(qs_staged_name(&s, "", NULL), QS_ERR_USAGE);
    qs_staged_end(&s, QS_ERR_USAGE);
    qs_error_clear();
    cr_assert_eq(qs_staged_name(&s, longest, NULL), QS_ERR_USAGE);
    qs_staged_end(&s, QS_ERR_USAGE);
}

Test(staged, a_name_that_is_taken_is_refused_even_by_a_link_to_nothing)
{
    qs_staged s;
    cr_assert_eq(mkdir("folder", 0777), 0);
    put("file", "");
    cr_assert_eq(symlink("nowhere", "link"), 0);
    static const char *const names[] = {"folder", "file", "link", "folder/"};
    for (size_t i = 0; i < 4; i++) {
        cr_assert_eq(qs_staged_name(&s, names[i], NULL), QS_OK);
        cr_assert_eq(qs_staged_begin(&s, 0), QS_ERR_OUTPUT_TAKEN, "%s", names[i]);
        qs_staged_end(&s, QS_ERR_OUTPUT_TAKEN);
        cr_assert_not_null(strstr(qs_error_text(), "exists already"), "%s", qs_error_text());
        qs_error_clear();
    }
    cr_assert_eq(access("folder", F_OK), 0);
}

Test(staged, a_directory_that_is_missing_is_named)
{
    static const char *const rows[][2] = {{"a/b/out", "a/b;"}, {"file/out", "file;"}};
    put("file", "");
    for (size_t i = 0; i < 2; i++) {
        qs_staged s;
        cr_assert_eq(qs_staged_name(&s, rows[i][0], NULL), QS_OK);
        cr_assert_eq(qs_staged_begin(&s, 1), QS_ERR_IO);
        cr_assert_not_null(strstr(qs_error_text(), rows[i][1]), "%s", qs_error_text());
        qs_error_clear();
    }
    cr_assert_neq(access("a", F_OK), 0);
}

Test(staged, there_must_be_room)
{
    qs_staged s;
    cr_assert_eq(qs_staged_name(&s, "out", NULL), QS_OK);
    cr_assert_eq(qs_staged_begin(&s, UINT64_MAX), QS_ERR_IO_FULL);
    cr_assert_not_null(strstr(qs_error_text(), ".: out needs 18446744073709551615 bytes, but "),
                       "%s", qs_error_text());
    qs_staged_end(&s, QS_ERR_IO_FULL);
}

Test(staged, a_directory_gets_its_name_whole)
{
    qs_staged s = begun();
    cr_assert_eq(qs_staged_make_dir(&s), QS_OK, "%s", qs_error_text());
    put(s.temp, "a");
    cr_assert_neq(access("out", F_OK), 0);
    cr_assert_eq(qs_staged_publish(&s), QS_OK, "%s", qs_error_text());
    qs_staged_end(&s, QS_OK);
    cr_assert_eq(access("out/a", F_OK), 0);
    cr_assert_neq(access(s.temp, F_OK), 0);
}

/* rename() would put a directory in the place of an empty one. */
Test(staged, a_name_that_was_taken_meanwhile_is_left_alone)
{
    qs_staged s = begun();
    cr_assert_eq(qs_staged_make_dir(&s), QS_OK);
    put(s.temp, "a");
    cr_assert_eq(mkdir("out", 0777), 0);
    cr_assert_eq(qs_staged_publish(&s), QS_ERR_OUTPUT_TAKEN);
    qs_staged_end(&s, QS_ERR_OUTPUT_TAKEN);
    cr_assert_neq(access("out/a", F_OK), 0);
    cr_assert_eq(access("out", F_OK), 0);
    cr_assert_neq(access(s.temp, F_OK), 0);
}

Test(staged, a_failure_leaves_nothing_and_names_the_output)
{
    char inner[QS_STAGED_PATH + 16];
    qs_staged s = begun();
    cr_assert_eq(qs_staged_make_dir(&s), QS_OK);
    snprintf(inner, sizeof inner, "%s/inner", s.temp);
    cr_assert_eq(mkdir(inner, 0777), 0);
    put(s.temp, "a");
    put(inner, "b");
    qs_staged_end(&s, QS_FAIL(QS_ERR_IO, "%s/a: no luck", s.temp));
    cr_assert_str_eq(qs_error_text(), "out/a: no luck");
    cr_assert_neq(access(s.temp, F_OK), 0);

    s = begun();
    put(s.temp, "");
    qs_staged_end(&s, QS_ERR_IO);
    cr_assert_neq(access(s.temp, F_OK), 0, "a file goes, too");
}

Test(staged, what_a_killed_process_of_our_number_left_is_replaced)
{
    qs_staged s = begun();
    cr_assert_eq(mkdir(s.temp, 0777), 0);
    put(s.temp, "old");
    cr_assert_eq(qs_staged_make_dir(&s), QS_OK, "%s", qs_error_text());
    cr_assert_eq(rmdir(s.temp), 0, "it is empty");
    qs_staged_end(&s, QS_OK);
}

Test(staged, what_another_writes_is_left_alone_and_named)
{
    char text[QS_STAGED_PATH + 8];
    qs_staged s = begun();
    put(s.temp, "");
    const qs_status st = qs_io_write_new(s.temp, "x", 1);
    cr_assert_eq(st, QS_ERR_OUTPUT_TAKEN);
    qs_staged_disown(&s);
    qs_staged_end(&s, st);
    cr_assert_eq(access(s.temp, F_OK), 0);
    snprintf(text, sizeof text, "%s: ", s.temp);
    cr_assert_not_null(strstr(qs_error_text(), text), "%s", qs_error_text());
}
