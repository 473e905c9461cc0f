/* What a path that is given as an adapter stands for. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "ckpt/adapter_dir.h"
#include "ckpt_fixture.h"
#include "store/io.h"

TestSuite(adapter_dir, .init = fx_make_folder, .fini = fx_remove_folder, .timeout = 60);

static const char run_json[] = "{\"format\": \"qshard-run\", \"format_version\": 1, \"run_id\": "
                               "\"a\", \"finished\": false%s}";

static void put(const char *name, const char *format, const char *argument)
{
    char path[256], text[512];
    snprintf(path, sizeof path, "%s/%s", fx_run_dir, name);
    snprintf(text, sizeof text, format, argument);
    cr_assert_eq(qs_io_write_file(path, text, strlen(text)), QS_OK, "%s", qs_error_text());
}

static void expect_step(const char *path, bool best, int step)
{
    qs_adapter_dir found;
    char wanted[256];
    qs_error_clear();
    snprintf(wanted, sizeof wanted, "%s/step-%08d", fx_run_dir, step);
    cr_assert_eq(qs_adapter_find(&found, path, best), QS_OK, "%s", qs_error_text());
    cr_assert_eq(found.kind, QS_ADAPTER_CHECKPOINT);
    cr_assert_str_eq(found.dir, wanted);
}

static void expect_refused(const char *path, bool best, qs_status status, const char *text)
{
    qs_adapter_dir found;
    qs_error_clear();
    cr_assert_eq(qs_adapter_find(&found, path, best), status, "%s", qs_error_text());
    cr_assert_not_null(strstr(qs_error_text(), text), "%s", qs_error_text());
}

Test(adapter_dir, a_run_stands_for_its_newest_or_its_best_checkpoint)
{
    char step[256];
    put("run.json", run_json, ", \"best\": {\"step\": 4, \"eval_loss\": 1.5}");
    expect_refused(fx_run_dir, false, QS_ERR_CHECKPOINT, "the run has no checkpoint");
    expect_refused(fx_run_dir, true, QS_ERR_CHECKPOINT, "is no longer there");
    fx_save_step(4, 1);
    fx_save_step(8, 1);
    expect_step(fx_run_dir, false, 8);
    expect_step(fx_run_dir, true, 4);
    snprintf(step, sizeof step, "%s/step-00000004", fx_run_dir);
    expect_step(step, false, 4);
    expect_refused(step, true, QS_ERR_USAGE, "--best");
    put("run.json", run_json, "");
    expect_refused(fx_run_dir, true, QS_ERR_CHECKPOINT, "none is the best");
    put("step-00000008/manifest.json", "{%s", "");
    expect_step(fx_run_dir, false, 4);
}

Test(adapter_dir, a_run_that_lost_its_run_json_still_has_checkpoints)
{
    fx_save_step(4, 1);
    cr_assert_eq(qs_adapter_kind_of(fx_run_dir), QS_ADAPTER_NONE);
    expect_step(fx_run_dir, false, 4);
}

Test(adapter_dir, a_peft_directory_is_one_even_if_its_file_leads_nowhere)
{
    char path[256];
    qs_adapter_dir found;
    snprintf(path, sizeof path, "%s/adapter_config.json", fx_run_dir);
    cr_assert_eq(symlink("nowhere", path), 0);
    cr_assert_eq(qs_adapter_find(&found, fx_run_dir, false), QS_OK, "%s", qs_error_text());
    cr_assert_eq(found.kind, QS_ADAPTER_PEFT);
    cr_assert_str_eq(found.dir, fx_run_dir);
    expect_refused(fx_run_dir, true, QS_ERR_USAGE, "--best");
}

Test(adapter_dir, what_is_none_of_them_is_told_what_there_is)
{
    char path[256];
    expect_refused(fx_run_dir, false, QS_ERR_INPUT_FORMAT, "neither a checkpoint");
    put("file", "x%s", "");
    snprintf(path, sizeof path, "%s/file", fx_run_dir);
    expect_refused(path, false, QS_ERR_INPUT_FORMAT, "neither a checkpoint");
    snprintf(path, sizeof path, "%s/nowhere", fx_run_dir);
    expect_refused(path, false, QS_ERR_INPUT_MISSING, "nowhere: No such file");
}

/* As a read of the newest one ends in which a file is not what its manifest says. */
Test(adapter_dir, beside_a_damaged_checkpoint_of_a_run_the_newest_good_one_is_named)
{
    char step[256], file[300];
    fx_save_step(4, 1);
    fx_save_step(8, 1);
    snprintf(step, sizeof step, "%s/step-00000008", fx_run_dir);
    snprintf(file, sizeof file, "%s/rank-00000.h5", step);
    cr_assert_eq(truncate(file, 100), 0);
    const qs_status damaged = QS_FAIL(QS_ERR_INPUT_HASH, "damaged");
    cr_assert_eq(qs_adapter_name_good(damaged, fx_run_dir, step), QS_ERR_INPUT_HASH);
    cr_assert_not_null(strstr(qs_error_text(), "damaged; "), "%s", qs_error_text());
    cr_assert_not_null(strstr(qs_error_text(), "step-00000004 verifies: name that one"), "%s",
                       qs_error_text());
    qs_error_clear();
    (void)QS_FAIL(QS_ERR_INPUT_HASH, "damaged");
    cr_assert_eq(qs_adapter_name_good(damaged, step, step), QS_ERR_INPUT_HASH);
    cr_assert_str_eq(qs_error_text(), "damaged", "it was named by itself");
}
