/* Checkpoints: any rank count loads what any other has saved, nothing older is lost by a failure,
 * and what is not this run's is refused by name. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/mem.h"
#include "base/rng.h"
#include "ckpt_fixture.h"
#include "store/io.h"
#include "store/manifest.h"

TestSuite(ckpt, .init = fx_make_folder, .fini = fx_remove_folder, .timeout = 120);
TestSuite(rotate, .init = fx_make_folder, .fini = fx_remove_folder, .timeout = 120);

static qs_status load_body(team_member *me)
{
    fx_plan *p = me->ctx;
    qs_optim *o = NULL;
    qs_ckpt_meta found;
    int64_t step = -1;
    bool equal = true;
    QS_TRY(fx_make_optim(p, me->comm, &o));
    memset(o->m, 0xff, (size_t)o->count * sizeof *o->m);
    qs_status st = QS_OK;
    QS_GOTO(qs_ckpt_latest(fx_run_dir, &step, me->comm));
    if (step != p->meta.step) {
        QS_GOTO(QS_FAIL(QS_ERR_BUG, "latest is %lld", (long long)step));
    }
    QS_GOTO(qs_ckpt_load(fx_run_dir, step, &p->meta, &p->layout, o, &found, me->comm));
    fx_each_element(p, o, me->rank, me->nranks, &equal);
    if (!equal || o->step != step || found.step != step || found.tokens_seen != 1000 + step ||
        strcmp(found.run_id, "run-1") != 0 || strcmp(found.device, "a card") != 0) {
        QS_GOTO(QS_FAIL(QS_ERR_BUG, "rank %d of %d: another state", me->rank, me->nranks));
    }
done:
    qs_optim_destroy(o);
    return st;
}

/* ---- save and load ---- */

Test(ckpt, every_rank_count_loads_what_every_rank_count_saved)
{
    for (int saved = 1; saved <= 5; saved++) {
        fx_plan p;
        fx_plan_init(&p, saved);
        team_expect_ok(saved, fx_save_body, &p);
        for (int loaded = 1; loaded <= 5; loaded++) {
            team_expect_ok(loaded, load_body, &p);
        }
        free(p.yaml);
    }
    cr_assert_eq(fx_entries(), 5, "no temporary directory is left");
}

Test(ckpt, more_ranks_than_chunks_save_and_load)
{
    fx_plan p;
    fx_plan_init(&p, 3);
    team_expect_ok(8, fx_save_body, &p);
    team_expect_ok(8, load_body, &p);
    team_expect_ok(2, load_body, &p);
    free(p.yaml);
}

Test(ckpt, whole_vector_is_read_without_a_communicator)
{
    fx_save_step(7, 3);
    fx_plan p;
    fx_plan_init(&p, 7);
    char dir[160];
    qs_config found;
    qs_lora_layout layout;
    float *vector = NULL;
    qs_manifest_step_dir(dir, sizeof dir, fx_run_dir, 7);
    cr_assert_eq(qs_ckpt_read_lora(dir, &found, &layout, &vector, NULL), QS_OK, "%s",
                 qs_error_text());
    cr_assert(memcmp(&layout, &p.layout, sizeof layout) == 0);
    cr_assert(memcmp(&found, &p.config, sizeof found) == 0);
    for (int l = 0; l < layout.n_layers; l++) {
        for (int64_t e = 0; e < layout.per_layer; e++) {
            cr_assert_eq(vector[l * layout.per_layer + e], fx_value(0, l, e));
        }
    }
    qs_mem_free(vector);
    free(p.yaml);
}

/* Not in the first checkpoints: one of a model of text alone is as they were. */
Test(ckpt, names_of_a_text_part_are_kept)
{
    for (int step = 0; step < 2; step++) {
        fx_plan p;
        char dir[160], path[192];
        qs_config found;
        qs_lora_layout layout;
        float *vector = NULL;
        void *text = NULL;
        size_t bytes = 0;
        fx_plan_init(&p, step);
        p.layout.naming = step == 0 ? QS_PEFT_PLAIN : QS_PEFT_TEXT_PART;
        team_expect_ok(2, fx_save_body, &p);
        qs_manifest_step_dir(dir, sizeof dir, fx_run_dir, step);
        cr_assert_eq(qs_ckpt_read_lora(dir, &found, &layout, &vector, NULL), QS_OK, "%s",
                     qs_error_text());
        cr_assert_eq(layout.naming, p.layout.naming);
        snprintf(path, sizeof path, "%s/manifest.json", dir);
        cr_assert_eq(qs_io_read_file(path, 1 << 20, &text, &bytes), QS_OK);
        cr_assert_eq(strstr(text, "text_part") != NULL, step == 1);
        free(text);
        qs_mem_free(vector);
        free(p.yaml);
    }
}

Test(ckpt, the_chat_template_of_the_data_is_kept_and_none_is_made_up)
{
    static const char *const templates[] = {NULL, "", "\"{{ m }}\"\n\t\\ \xc2\xab\x01"};
    for (int step = 0; step < 3; step++) {
        fx_plan p;
        char dir[160];
        qs_config config;
        qs_lora_layout layout;
        float *vector = NULL;
        qs_ckpt_origin origin;
        fx_plan_init(&p, step);
        p.meta.chat_template = templates[step];
        team_expect_ok(3, fx_save_body, &p);
        team_expect_ok(2, load_body, &p);
        qs_manifest_step_dir(dir, sizeof dir, fx_run_dir, step);
        cr_assert_eq(qs_ckpt_read_lora(dir, &config, &layout, &vector, &origin), QS_OK, "%s",
                     qs_error_text());
        const char *found = origin.chat_template;
        cr_assert_str_eq(origin.base_sha256, p.meta.base_sha256);
        cr_assert_eq(found == NULL, templates[step] == NULL);
        cr_assert(found == NULL || strcmp(found, templates[step]) == 0, "%s", found);
        free(origin.chat_template);
        qs_mem_free(vector);
        free(p.yaml);
    }
}

Test(ckpt, saving_a_step_again_keeps_the_one_that_is_there)
{
    struct stat before, after;
    char path[160];
    fx_save_step(4, 2);
    snprintf(path, sizeof path, "%s/step-00000004/manifest.json", fx_run_dir);
    cr_assert_eq(stat(path, &before), 0);
    fx_save_step(4, 3);
    cr_assert_eq(stat(path, &after), 0);
    cr_assert_eq(before.st_ino, after.st_ino);
    cr_assert_eq(fx_entries(), 1);
}

static void flip_byte(const char *name, off_t at)
{
    char path[256];
    unsigned char byte;
    snprintf(path, sizeof path, "%s/%s", fx_run_dir, name);
    int fd = open(path, O_RDWR);
    cr_assert_geq(fd, 0, "%s", path);
    cr_assert_eq(pread(fd, &byte, 1, at), 1);
    byte ^= 4;
    cr_assert_eq(pwrite(fd, &byte, 1, at), 1);
    close(fd);
}

Test(ckpt, saving_over_a_damaged_step_sets_it_aside)
{
    fx_save_step(4, 2);
    flip_byte("step-00000004/rank-00001.h5", 9000);
    fx_save_step(4, 2);
    cr_assert(fx_exists("step-00000004.bad"));
    fx_plan p;
    fx_plan_init(&p, 4);
    team_expect_ok(2, load_body, &p);
    free(p.yaml);
}

Test(ckpt, leftovers_of_killed_saves_go_with_the_next_one)
{
    char path[256];
    snprintf(path, sizeof path, "%s/step-00000009.tmp-dead", fx_run_dir);
    cr_assert_eq(mkdir(path, 0777), 0);
    strcat(path, "/rank-00000.h5");
    cr_assert_eq(qs_io_write_new(path, "x", 1), QS_OK);
    fx_save_step(2, 2);
    cr_assert(!fx_exists("step-00000009.tmp-dead"));
    cr_assert_eq(fx_entries(), 1);
}

Test(ckpt, failure_on_one_rank_is_everyones_and_leaves_nothing)
{
    fx_save_step(1, 3);
    for (int bad = 0; bad < 3; bad++) {
        fx_plan p;
        team_member members[TEAM_MAX];
        fx_plan_init(&p, 2);
        p.fail_rank = bad;
        team_run(members, 3, fx_save_body, &p);
        for (int r = 0; r < 3; r++) {
            cr_assert_eq(members[r].st, QS_ERR_BUG, "rank %d", r);
        }
        cr_assert_eq(fx_entries(), 1);
        free(p.yaml);
    }
}

Test(ckpt, full_disk_is_told_and_older_checkpoints_stay)
{
    if (mount("tmpfs", fx_run_dir, "tmpfs", 0, "size=3m") != 0) {
        cr_skip_test("mounting a small tmpfs is not allowed here");
    }
    char path[160];
    fx_save_step(1, 2); /* 3 layers * 8 chunks * 3 * 16 KiB = 1.1 MiB; 1 MiB is kept free */
    snprintf(path, sizeof path, "%s/filler", fx_run_dir);
    void *filler = calloc(1, 1 << 20);
    cr_assert_eq(qs_io_write_new(path, filler, 1 << 20), QS_OK);
    fx_plan p;
    team_member members[TEAM_MAX];
    fx_plan_init(&p, 2);
    team_run(members, 2, fx_save_body, &p);
    for (int r = 0; r < 2; r++) {
        cr_expect_eq(members[r].st, QS_ERR_IO_FULL, "rank %d: %d", r, (int)members[r].st);
    }
    cr_expect_eq(fx_entries(), 2, "nothing new");
    cr_assert_eq(unlink(path), 0);
    free(p.yaml);
    fx_plan_init(&p, 1);
    team_expect_ok(3, load_body, &p);
    free(p.yaml);
    free(filler);
    cr_assert_eq(umount(fx_run_dir), 0);
}

/* ---- latest ---- */

static int64_t latest(void)
{
    qs_comm *comm = NULL;
    int64_t step = -2;
    cr_assert_eq(qs_comm_self_create(&comm), QS_OK);
    cr_assert_eq(qs_ckpt_latest(fx_run_dir, &step, comm), QS_OK, "%s", qs_error_text());
    qs_comm_destroy(comm);
    return step;
}

Test(ckpt, latest_is_the_newest_that_verifies_and_bad_ones_are_set_aside)
{
    cr_assert_eq(latest(), -1);
    for (int64_t step = 1; step <= 5; step++) {
        fx_save_step(step, 2);
    }
    fx_save_step(100000000, 1); /* nine digits: sorted by number, not by name */
    cr_assert_eq(latest(), 100000000);
    flip_byte("step-100000000/manifest.json", 20);
    cr_assert_eq(latest(), 5);
    cr_assert(fx_exists("step-100000000.bad") && !fx_exists("step-100000000"));
    flip_byte("step-00000005/rank-00000.h5", 4000);
    cr_assert_eq(latest(), 4);
    char path[256];
    snprintf(path, sizeof path, "%s/step-00000004/rank-00001.h5", fx_run_dir);
    cr_assert_eq(truncate(path, 5000), 0);
    cr_assert_eq(latest(), 3);
    snprintf(path, sizeof path, "%s/step-00000003/rank-00001.h5", fx_run_dir);
    cr_assert_eq(unlink(path), 0);
    cr_assert_eq(latest(), 2);
    snprintf(path, sizeof path, "%s/step-00000002/manifest.json", fx_run_dir);
    cr_assert_eq(unlink(path), 0);
    cr_assert_eq(latest(), 1);
    cr_assert_eq(fx_entries(), 6, "nothing was deleted");
}

/* As in a group's directory where a colleague's checkpoints are readable to the colleague alone.
 * For root, who may read everything, as another user. */
static void put_out_of_reach(const char *name)
{
    char path[256];
    snprintf(path, sizeof path, "%s/%s", fx_run_dir, name);
    cr_assert_eq(chmod(path, 0), 0);
    if (geteuid() == 0) {
        cr_assert_eq(chmod(fx_folder, 0777), 0);
        cr_assert_eq(chmod(fx_run_dir, 0777), 0);
        cr_assert_eq(seteuid(65534), 0);
    }
}

static void back_in_reach(const char *name)
{
    char path[256];
    snprintf(path, sizeof path, "%s/%s", fx_run_dir, name);
    (void)seteuid(getuid());
    cr_assert_eq(chmod(path, 0700), 0);
}

Test(ckpt, a_checkpoint_out_of_reach_is_neither_set_aside_nor_passed_over)
{
    qs_comm *comm = NULL;
    int64_t steps[2], step = -2;
    int count = 0;
    fx_save_step(1, 1);
    fx_save_step(2, 1);
    cr_assert_eq(qs_comm_self_create(&comm), QS_OK);
    put_out_of_reach("step-00000002");
    const qs_status latest = qs_ckpt_latest(fx_run_dir, &step, comm);
    const bool says = strstr(qs_error_text(), "Permission denied") != NULL;
    qs_error_clear();
    const qs_status listed = qs_manifest_list(fx_run_dir, steps, 2, &count);
    back_in_reach("step-00000002");
    qs_comm_destroy(comm);
    cr_assert_eq(latest, QS_ERR_INPUT_MISSING);
    cr_assert(says);
    cr_assert_eq(listed, QS_ERR_INPUT_MISSING);
    cr_assert(fx_exists("step-00000002") && fx_exists("step-00000001"));
    cr_assert_eq(fx_entries(), 2);
}

Test(ckpt, missing_run_directory_has_no_checkpoint)
{
    cr_assert_eq(rmdir(fx_run_dir), 0);
    cr_assert_eq(latest(), -1);
}

/* ---- not this run's ---- */

static void expect_refusal(fx_plan *p, qs_status status, const char *says)
{
    team_member members[TEAM_MAX];
    team_run(members, 2, load_body, p);
    for (int r = 0; r < 2; r++) {
        cr_assert_eq(members[r].st, status, "%d: %s", (int)members[r].st, members[r].text);
    }
    cr_assert_not_null(strstr(members[0].text, says), "%s", members[0].text);
}

static void change(fx_plan *p, const char *set)
{
    cr_assert_eq(qs_config_parse(&p->config, p->yaml, strlen(p->yaml), "r", &set, 1), QS_OK);
    free(p->yaml);
    p->yaml = qs_config_dump(&p->config);
    p->meta.config_yaml = p->yaml;
}

Test(ckpt, state_of_another_run_is_refused_naming_the_first_difference)
{
    fx_save_step(1, 2);
    static const char *const sets[][2] = {
        {"optim.lr=5e-4", "optim.lr"},
        {"train.steps=7", "train.steps"},
        {"seed=3", "seed"},
        {"lora.alpha=1", "lora.alpha"},
        {"train.seq_len=64", "train.seq_len"},
        {"train.micro_batch=4", "train.micro_batch"},
    };
    fx_plan p;
    for (size_t i = 0; i < sizeof sets / sizeof *sets; i++) {
        fx_plan_init(&p, 1);
        change(&p, sets[i][0]);
        expect_refusal(&p, QS_ERR_RESUME, sets[i][1]);
        free(p.yaml);
    }
    fx_plan_init(&p, 1);
    strcpy(p.meta.base_sha256, "cc");
    expect_refusal(&p, QS_ERR_RESUME, "another base");
    free(p.yaml);
    fx_plan_init(&p, 1);
    strcpy(p.meta.data_content, "cc");
    expect_refusal(&p, QS_ERR_RESUME, "another data.train");
    free(p.yaml);
    fx_plan_init(&p, 1);
    strcpy(p.meta.data_layout, "cc");
    expect_refusal(&p, QS_ERR_RESUME, "another data.train: its labels or the borders");
    free(p.yaml);
    fx_plan_init(&p, 1);
    change(&p, "train.save_every=9");
    team_expect_ok(2, load_body, &p); /* changes no bit */
    free(p.yaml);
}

/* The manifest verifies, the file does not: the reader looks for itself. */
Test(ckpt, damage_after_the_choice_is_found_by_the_rank_that_reads_it)
{
    fx_save_step(1, 2);
    flip_byte("step-00000001/rank-00001.h5", 9000);
    fx_plan p;
    fx_plan_init(&p, 1);
    qs_comm *comm = NULL;
    qs_optim *o = NULL;
    qs_ckpt_meta found;
    cr_assert_eq(qs_comm_self_create(&comm), QS_OK);
    cr_assert_eq(fx_make_optim(&p, comm, &o), QS_OK);
    cr_assert_eq(qs_ckpt_load(fx_run_dir, 1, &p.meta, &p.layout, o, &found, comm),
                 QS_ERR_INPUT_HASH);
    cr_assert_not_null(strstr(qs_error_text(), "rank-00001.h5"));
    qs_optim_destroy(o);
    qs_comm_destroy(comm);
    free(p.yaml);
}

/* ---- rotation ---- */

static const qs_ckpt_evals NO_EVALS = {.count = 0};

Test(rotate, newest_and_milestones_stay)
{
    for (int64_t step = 1; step <= 9; step++) {
        fx_save_step(step, 1);
    }
    cr_assert_eq(qs_ckpt_rotate(fx_run_dir, 2, 4, NO_EVALS), QS_OK);
    for (int64_t step = 1; step <= 9; step++) {
        char name[32];
        snprintf(name, sizeof name, "step-%08lld", (long long)step);
        cr_assert_eq(fx_exists(name), step >= 8 || step == 4, "%s", name);
    }
    cr_assert_eq(fx_entries(), 3);
    cr_assert_eq(qs_ckpt_rotate(fx_run_dir, 1, 0, NO_EVALS), QS_OK);
    cr_assert_eq(fx_entries(), 1);
    cr_assert(fx_exists("step-00000009"));
}

static int rename_error; /* 0: as it should be */
int __real_rename(const char *from, const char *to);
int __wrap_rename(const char *from, const char *to);

int __wrap_rename(const char *from, const char *to)
{
    errno = rename_error;
    return rename_error != 0 ? -1 : __real_rename(from, to);
}

/* Where a name is copied on write: the run goes on, as it does without room for a checkpoint. */
Test(rotate, what_there_is_no_room_to_rename_stays_until_there_is)
{
    static const struct {
        int error;
        qs_status st;
        int left;
    } tries[] = {{ENOSPC, QS_OK, 3}, {EDQUOT, QS_OK, 3}, {EIO, QS_ERR_IO, 3}, {0, QS_OK, 1}};
    for (int64_t step = 1; step <= 3; step++) {
        fx_save_step(step, 1);
    }
    for (size_t i = 0; i < sizeof tries / sizeof *tries; i++) {
        rename_error = tries[i].error;
        cr_assert_eq(qs_ckpt_rotate(fx_run_dir, 1, 0, NO_EVALS), tries[i].st, "%s",
                     qs_error_text());
        cr_assert_eq(fx_entries(), tries[i].left, "%s", strerror(tries[i].error));
        cr_assert_eq(qs_error_text()[0] != '\0', tries[i].st != QS_OK);
        qs_error_clear();
    }
}

Test(rotate, damaged_newer_ones_do_not_count)
{
    for (int64_t step = 1; step <= 4; step++) {
        fx_save_step(step, 1);
    }
    flip_byte("step-00000004/rank-00000.h5", 9000);
    char path[256];
    snprintf(path, sizeof path, "%s/step-00000003/rank-00000.h5", fx_run_dir);
    cr_assert_eq(truncate(path, 10), 0);
    cr_assert_eq(qs_ckpt_rotate(fx_run_dir, 1, 0, NO_EVALS), QS_OK);
    cr_assert(fx_exists("step-00000002"), "the newest good one");
    cr_assert(!fx_exists("step-00000001"));
    cr_assert(fx_exists("step-00000003") && fx_exists("step-00000004"), "not ours to judge here");
}

/* Saves, damage and rotations in random order against a list of what is good. */
Test(rotate, random_histories_never_lose_the_newest_good_ones)
{
    qs_rng rng = qs_rng_make(5, 0, 0, 60, 0);
    uint64_t draw = 0;
    int64_t step = 0, good[64];
    int n_good = 0;
    char name[64];
    for (int round = 0; round < 40; round++) {
        step += 1 + qs_rng_u32(&rng, draw++) % 3;
        fx_save_step(step, 1 + (int)(qs_rng_u32(&rng, draw++) % 2));
        if (qs_rng_u32(&rng, draw++) % 3 == 0) {
            snprintf(name, sizeof name, "step-%08lld/rank-00000.h5", (long long)step);
            flip_byte(name, 9000);
        } else {
            good[n_good++] = step;
        }
        int keep = 1 + (int)(qs_rng_u32(&rng, draw++) % 3);
        cr_assert_eq(qs_ckpt_rotate(fx_run_dir, keep, 5, NO_EVALS), QS_OK);
        for (int i = n_good - 1; i >= 0 && i >= n_good - keep; i--) {
            snprintf(name, sizeof name, "step-%08lld", (long long)good[i]);
            if (!fx_exists(name)) {
                /* only an earlier rotation that kept fewer may have taken it */
                cr_assert(i < n_good - 1, "round %d: the newest good one is gone", round);
            }
        }
        for (int i = 0; i < n_good; i++) {
            snprintf(name, sizeof name, "step-%08lld", (long long)good[i]);
            cr_assert(fx_exists(name) || good[i] % 5 != 0, "milestone %s is gone", name);
        }
        cr_assert_eq(latest(), n_good ? good[n_good - 1] : -1, "round %d", round);
    }
    cr_assert_gt(n_good, 20, "the history has something to lose");
}

/* ---- the best ---- */

/* Losses of steps 1, 2, ...: the list of an array. */
#define EVALS(losses) evals_of(losses, sizeof(losses) / sizeof *(losses))

static qs_ckpt_evals evals_of(const double *losses, size_t count)
{
    static qs_ckpt_eval list[16];
    for (size_t i = 0; i < count; i++) {
        list[i] = (qs_ckpt_eval){.step = (int64_t)i + 1, .loss = losses[i]};
    }
    return (qs_ckpt_evals){.list = list, .count = (int64_t)count};
}

static int64_t best_step(qs_ckpt_evals evals, bool verify)
{
    qs_ckpt_eval best = {.step = -7};
    qs_error_clear();
    cr_assert_eq(qs_ckpt_best(fx_run_dir, evals, verify, &best), QS_OK, "%s", qs_error_text());
    cr_assert_str_eq(qs_error_text(), "");
    return best.step;
}

static void expect_steps(const char *steps)
{
    for (int64_t step = 1; step <= 9; step++) {
        char name[32];
        snprintf(name, sizeof name, "step-%08lld", (long long)step);
        cr_assert_eq(fx_exists(name), strchr(steps, '0' + (int)step) != NULL, "%s of %s", name,
                     steps);
    }
}

Test(rotate, the_best_stays_beside_the_newest_and_goes_when_another_is)
{
    static const double losses[] = {5, 3, 4, 3.5, 6, 2, 7};
    for (int64_t step = 1; step <= 7; step++) {
        fx_save_step(step, 1);
        /* the evaluation of a step comes after its checkpoint */
        qs_ckpt_evals evals = evals_of(losses, (size_t)step - 1);
        cr_assert_eq(qs_ckpt_rotate(fx_run_dir, 1, 0, evals), QS_OK);
        static const char *const left[] = {"1", "12", "23", "24", "25", "26", "67"};
        expect_steps(left[step - 1]);
    }
    cr_assert_eq(best_step(EVALS(losses), true), 6);
    cr_assert_eq(qs_ckpt_rotate(fx_run_dir, 2, 0, EVALS(losses)), QS_OK);
    expect_steps("67");
}

Test(rotate, the_best_is_one_of_the_newest_where_it_is_among_them)
{
    static const double losses[] = {5, 4, 3, 2};
    for (int64_t step = 1; step <= 4; step++) {
        fx_save_step(step, 2);
    }
    cr_assert_eq(qs_ckpt_rotate(fx_run_dir, 2, 0, EVALS(losses)), QS_OK);
    expect_steps("34");
}

Test(rotate, losses_that_are_not_finite_or_equal)
{
    static const double losses[] = {NAN, 3, 3, -INFINITY, NAN};
    static const double none[] = {NAN, INFINITY, NAN, NAN, NAN};
    for (int64_t step = 1; step <= 5; step++) {
        fx_save_step(step, 1);
    }
    cr_assert_eq(best_step(EVALS(none), false), -1);
    cr_assert_eq(best_step(NO_EVALS, true), -1);
    cr_assert_eq(best_step(EVALS(losses), true), 2, "the earlier of equals");
    cr_assert_eq(qs_ckpt_rotate(fx_run_dir, 1, 0, EVALS(losses)), QS_OK);
    expect_steps("25");
}

Test(rotate, the_best_is_among_steps_that_have_a_good_checkpoint)
{
    static const double losses[] = {9, 1, 2, 3, 4, 5};
    for (int64_t step = 1; step <= 6; step += 1 + (step == 1)) { /* no step 2 */
        fx_save_step(step, 1);
    }
    cr_assert_eq(best_step(EVALS(losses), true), 3);
    char path[256];
    snprintf(path, sizeof path, "%s/step-00000003/rank-00000.h5", fx_run_dir);
    cr_assert_eq(truncate(path, 10), 0);
    cr_assert_eq(qs_ckpt_rotate(fx_run_dir, 1, 0, EVALS(losses)), QS_OK);
    cr_assert(fx_exists("step-00000004"), "the next best");
    cr_assert(!fx_exists("step-00000001") && !fx_exists("step-00000005"));
    cr_assert_eq(best_step(EVALS(losses), false), 4);
    flip_byte("step-00000004/rank-00000.h5", 9000);
    cr_assert_eq(best_step(EVALS(losses), false), 4, "not read");
    cr_assert_eq(best_step(EVALS(losses), true), 6, "read");
    cr_assert(fx_exists("step-00000004.bad") && !fx_exists("step-00000004"));
    flip_byte("step-00000006/rank-00000.h5", 9000);
    cr_assert_eq(best_step(EVALS(losses), true), -1);
}
