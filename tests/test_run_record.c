/* run.json: what a start writes into it. */
#include <criterion/criterion.h>
#include <jansson.h>
#include <stdio.h>
#include <string.h>

#include "ckpt/run_record.h"
#include "tests/scratch.h"

static char dir[SCRATCH_MAX];

static void make_dir(void)
{
    scratch_make(dir, NULL);
}

static void remove_dir(void)
{
    scratch_remove(dir);
}

TestSuite(run_record, .init = make_dir, .fini = remove_dir, .timeout = 60);

static json_t *load(void)
{
    char path[SCRATCH_MAX + 16];
    snprintf(path, sizeof path, "%s/run.json", dir);
    json_t *all = json_load_file(path, 0, NULL);
    cr_assert_not_null(all);
    return all;
}

/* As `mpirun --map-by node` deals ranks out: neighbours are on different hosts. */
Test(run_record, each_host_is_named_once_in_the_order_of_its_first_rank)
{
    static const char hosts[7][QS_HOST_NAME_BYTES] = {"b", "a", "c", "b", "a", "c", "b"};
    static const char *const wanted[] = {"b", "a", "c"};
    qs_run_record r = {.finished = false};
    cr_assert_eq(qs_run_record_start(&r, dir, hosts, 7), QS_OK, "%s", qs_error_text());
    cr_assert_eq(qs_run_record_write(&r, dir), QS_OK, "%s", qs_error_text());
    qs_run_record_free(&r);
    json_t *all = load();
    const json_t *list = json_object_get(all, "hosts");
    cr_assert_eq(json_array_size(list), 3);
    for (size_t i = 0; i < 3; i++) {
        cr_assert_str_eq(json_string_value(json_array_get(list, i)), wanted[i]);
    }
    cr_assert_eq(json_integer_value(json_object_get(all, "nranks")), 7);
    json_decref(all);
}

Test(run_record, a_later_start_keeps_what_it_does_not_know_and_forgets_the_end)
{
    static const char hosts[1][QS_HOST_NAME_BYTES] = {"a"};
    char path[SCRATCH_MAX + 16];
    qs_run_record r = {.finished = false};
    snprintf(path, sizeof path, "%s/run.json", dir);
    cr_assert_eq(qs_run_record_start(&r, dir, hosts, 1), QS_OK, "%s", qs_error_text());
    cr_assert_eq(qs_run_record_write(&r, dir), QS_OK, "%s", qs_error_text());
    cr_assert_eq(qs_run_record_finish(dir), QS_OK, "%s", qs_error_text());
    qs_run_record_free(&r);
    json_t *all = load();
    cr_assert_not_null(json_object_get(all, "ended"));
    cr_assert_eq(json_object_set_new(all, "later", json_integer(7)), 0);
    cr_assert_eq(json_dump_file(all, path, 0), 0);
    json_decref(all);

    cr_assert_eq(qs_run_record_read(&r, dir, QS_ERR_INPUT_FORMAT), QS_OK, "%s", qs_error_text());
    cr_assert(r.finished);
    cr_assert_eq(qs_run_record_start(&r, dir, hosts, 1), QS_OK, "%s", qs_error_text());
    cr_assert_eq(qs_run_record_write(&r, dir), QS_OK, "%s", qs_error_text());
    all = load();
    cr_assert_str_eq(json_string_value(json_object_get(all, "run_id")), r.run_id);
    cr_assert_eq(json_integer_value(json_object_get(all, "starts")), 2);
    cr_assert_eq(json_integer_value(json_object_get(all, "later")), 7);
    cr_assert_null(json_object_get(all, "ended"));
    cr_assert(json_is_false(json_object_get(all, "finished")));
    json_decref(all);
    qs_run_record_free(&r);
}
