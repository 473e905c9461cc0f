/* Checkpoints and the run directory: any rank count loads what any other has saved, nothing older
 * is lost by a failure, and what is not this run's is refused by name. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/log.h"
#include "base/mem.h"
#include "base/rng.h"
#include "ckpt/ckpt.h"
#include "ckpt/run_dir.h"
#include "ckpt/run_lock.h"
#include "store/io.h"
#include "store/manifest.h"
#include "team.h"
#include "tests/scratch.h"

static char folder[SCRATCH_MAX], run_dir[96];

static void make_folder(void)
{
    qs_log_init(0, 1, QS_LOG_QUIET, false);
    scratch_make(folder, NULL);
    snprintf(run_dir, sizeof run_dir, "%s/run", folder);
    cr_assert_eq(mkdir(run_dir, 0777), 0);
}

static void remove_folder(void)
{
    scratch_remove(folder);
}

TestSuite(ckpt, .init = make_folder, .fini = remove_folder, .timeout = 120);
TestSuite(rotate, .init = make_folder, .fini = remove_folder, .timeout = 120);
TestSuite(run_dir, .init = make_folder, .fini = remove_folder, .timeout = 120);

/* ---- a state of known values ---- */

static qs_config config(void)
{
    qs_config c;
    const char *text =
        "base: b.h5\ndata: {train: t.h5}\nlora: {rank: 8, targets: [q_proj, up_proj]}";
    cr_assert_eq(qs_config_parse(&c, text, strlen(text), "run.yaml", NULL, 0), QS_OK);
    snprintf(c.output, sizeof c.output, "%s", run_dir);
    return c;
}

/* 7 chunks a layer: no rank count of the tests divides it but 1 and 7 */
static qs_lora_layout layout_of(const qs_config *c)
{
    qs_hf_config m = {.n_layers = 3, .n_heads = 12, .n_kv_heads = 4, .head_dim = 64};
    m.hidden = 768;
    m.ffn_hidden = 1200;
    m.vocab = 10;
    qs_lora_layout l;
    cr_assert_eq(qs_lora_layout_make(&l, &m, c), QS_OK);
    return l;
}

static float value_of(int which, int layer, int64_t element)
{
    return (float)(which + 1) * 1e6f + (float)layer * 1e5f + (float)element * 0.5f;
}

typedef struct {
    qs_config config;
    qs_lora_layout layout;
    qs_ckpt_meta meta;
    char *yaml;
    int fail_rank; /* saves a share of the wrong size */
} plan;

static void plan_init(plan *p, int64_t step)
{
    memset(p, 0, sizeof *p);
    p->config = config();
    p->layout = layout_of(&p->config);
    cr_assert_eq(p->layout.chunks, 7);
    p->yaml = qs_config_dump(&p->config);
    p->fail_rank = -1;
    p->meta = (qs_ckpt_meta){.step = step,
                             .run_id = "run-1",
                             .config_yaml = p->yaml,
                             .base_sha256 = "aa",
                             .data_content = "bb",
                             .data_layout = "dd",
                             .tokens_seen = 1000 + step,
                             .device = "a card"};
}

static void each_element(const plan *p, qs_optim *o, int rank, int nranks, bool *equal)
{
    int64_t width = qs_lora_shard_width(&p->layout, nranks);
    qs_range mine = qs_lora_shard(&p->layout, rank, nranks);
    float *parts[] = {o->master, o->m, o->v};
    for (int w = 0; w < 3; w++) {
        for (int l = 0; l < p->layout.n_layers; l++) {
            for (int64_t i = 0; i < width; i++) {
                bool padding = i >= mine.end - mine.begin;
                float want = padding ? 0 : value_of(w, l, mine.begin + i);
                float *at = &parts[w][l * width + i];
                if (equal) {
                    *equal = *equal && *at == want;
                } else {
                    *at = want;
                }
            }
        }
    }
}

static qs_status make_optim(const plan *p, qs_comm *comm, qs_optim **out)
{
    return qs_optim_create(out, qs_device_cpu(), &p->layout, qs_comm_rank(comm),
                           qs_comm_nranks(comm));
}

static qs_status save_body(team_member *me)
{
    plan *p = me->ctx;
    qs_optim *o = NULL;
    QS_TRY(make_optim(p, me->comm, &o));
    each_element(p, o, me->rank, me->nranks, NULL);
    o->count -= me->rank == p->fail_rank ? QS_LORA_CHUNK : 0;
    qs_status st = qs_ckpt_save(run_dir, &p->meta, &p->layout, o, me->comm);
    qs_optim_destroy(o);
    return st;
}

static qs_status load_body(team_member *me)
{
    plan *p = me->ctx;
    qs_optim *o = NULL;
    qs_ckpt_meta found;
    int64_t step = -1;
    bool equal = true;
    QS_TRY(make_optim(p, me->comm, &o));
    memset(o->m, 0xff, (size_t)o->count * sizeof *o->m);
    qs_status st = QS_OK;
    QS_GOTO(qs_ckpt_latest(run_dir, &step, me->comm));
    if (step != p->meta.step) {
        QS_GOTO(QS_FAIL(QS_ERR_BUG, "latest is %lld", (long long)step));
    }
    QS_GOTO(qs_ckpt_load(run_dir, step, &p->meta, &p->layout, o, &found, me->comm));
    each_element(p, o, me->rank, me->nranks, &equal);
    if (!equal || o->step != step || found.step != step || found.tokens_seen != 1000 + step ||
        strcmp(found.run_id, "run-1") != 0 || strcmp(found.device, "a card") != 0) {
        QS_GOTO(QS_FAIL(QS_ERR_BUG, "rank %d of %d: another state", me->rank, me->nranks));
    }
done:
    qs_optim_destroy(o);
    return st;
}

static void save_step(int64_t step, int nranks)
{
    plan p;
    plan_init(&p, step);
    team_expect_ok(nranks, save_body, &p);
    free(p.yaml);
}

static bool exists(const char *name)
{
    char path[256];
    struct stat info;
    snprintf(path, sizeof path, "%s/%s", run_dir, name);
    return lstat(path, &info) == 0;
}

static int entries(void)
{
    int count = 0;
    DIR *d = opendir(run_dir);
    for (struct dirent *e = readdir(d); e; e = readdir(d)) {
        count += e->d_name[0] != '.';
    }
    closedir(d);
    return count;
}

/* ---- save and load ---- */

Test(ckpt, every_rank_count_loads_what_every_rank_count_saved)
{
    for (int saved = 1; saved <= 5; saved++) {
        plan p;
        plan_init(&p, saved);
        team_expect_ok(saved, save_body, &p);
        for (int loaded = 1; loaded <= 5; loaded++) {
            team_expect_ok(loaded, load_body, &p);
        }
        free(p.yaml);
    }
    cr_assert_eq(entries(), 5, "no temporary directory is left");
}

Test(ckpt, more_ranks_than_chunks_save_and_load)
{
    plan p;
    plan_init(&p, 3);
    team_expect_ok(8, save_body, &p);
    team_expect_ok(8, load_body, &p);
    team_expect_ok(2, load_body, &p);
    free(p.yaml);
}

Test(ckpt, whole_vector_is_read_without_a_communicator)
{
    save_step(7, 3);
    plan p;
    plan_init(&p, 7);
    char dir[160];
    qs_config found;
    qs_lora_layout layout;
    float *vector = NULL;
    qs_manifest_step_dir(dir, sizeof dir, run_dir, 7);
    cr_assert_eq(qs_ckpt_read_lora(dir, &found, &layout, &vector), QS_OK, "%s", qs_error_text());
    cr_assert(memcmp(&layout, &p.layout, sizeof layout) == 0);
    cr_assert(memcmp(&found, &p.config, sizeof found) == 0);
    for (int l = 0; l < layout.n_layers; l++) {
        for (int64_t e = 0; e < layout.per_layer; e++) {
            cr_assert_eq(vector[l * layout.per_layer + e], value_of(0, l, e));
        }
    }
    qs_mem_free(vector);
    free(p.yaml);
}

Test(ckpt, saving_a_step_again_keeps_the_one_that_is_there)
{
    struct stat before, after;
    char path[160];
    save_step(4, 2);
    snprintf(path, sizeof path, "%s/step-00000004/manifest.json", run_dir);
    cr_assert_eq(stat(path, &before), 0);
    save_step(4, 3);
    cr_assert_eq(stat(path, &after), 0);
    cr_assert_eq(before.st_ino, after.st_ino);
    cr_assert_eq(entries(), 1);
}

static void flip_byte(const char *name, off_t at)
{
    char path[256];
    unsigned char byte;
    snprintf(path, sizeof path, "%s/%s", run_dir, name);
    int fd = open(path, O_RDWR);
    cr_assert_geq(fd, 0, "%s", path);
    cr_assert_eq(pread(fd, &byte, 1, at), 1);
    byte ^= 4;
    cr_assert_eq(pwrite(fd, &byte, 1, at), 1);
    close(fd);
}

Test(ckpt, saving_over_a_damaged_step_sets_it_aside)
{
    save_step(4, 2);
    flip_byte("step-00000004/rank-00001.h5", 9000);
    save_step(4, 2);
    cr_assert(exists("step-00000004.bad"));
    plan p;
    plan_init(&p, 4);
    team_expect_ok(2, load_body, &p);
    free(p.yaml);
}

Test(ckpt, leftovers_of_killed_saves_go_with_the_next_one)
{
    char path[256];
    snprintf(path, sizeof path, "%s/step-00000009.tmp-dead", run_dir);
    cr_assert_eq(mkdir(path, 0777), 0);
    strcat(path, "/rank-00000.h5");
    cr_assert_eq(qs_io_write_new(path, "x", 1), QS_OK);
    save_step(2, 2);
    cr_assert(!exists("step-00000009.tmp-dead"));
    cr_assert_eq(entries(), 1);
}

Test(ckpt, failure_on_one_rank_is_everyones_and_leaves_nothing)
{
    save_step(1, 3);
    for (int bad = 0; bad < 3; bad++) {
        plan p;
        team_member members[TEAM_MAX];
        plan_init(&p, 2);
        p.fail_rank = bad;
        team_run(members, 3, save_body, &p);
        for (int r = 0; r < 3; r++) {
            cr_assert_eq(members[r].st, QS_ERR_BUG, "rank %d", r);
        }
        cr_assert_eq(entries(), 1);
        free(p.yaml);
    }
}

Test(ckpt, full_disk_is_told_and_older_checkpoints_stay)
{
    if (mount("tmpfs", run_dir, "tmpfs", 0, "size=3m") != 0) {
        cr_skip_test("mounting a small tmpfs is not allowed here");
    }
    char path[160];
    save_step(1, 2); /* 3 layers * 8 chunks * 3 * 16 KiB = 1.1 MiB; 1 MiB is kept free */
    snprintf(path, sizeof path, "%s/filler", run_dir);
    void *filler = calloc(1, 1 << 20);
    cr_assert_eq(qs_io_write_new(path, filler, 1 << 20), QS_OK);
    plan p;
    team_member members[TEAM_MAX];
    plan_init(&p, 2);
    team_run(members, 2, save_body, &p);
    for (int r = 0; r < 2; r++) {
        cr_expect_eq(members[r].st, QS_ERR_IO_FULL, "rank %d: %d", r, (int)members[r].st);
    }
    cr_expect_eq(entries(), 2, "nothing new");
    cr_assert_eq(unlink(path), 0);
    free(p.yaml);
    plan_init(&p, 1);
    team_expect_ok(3, load_body, &p);
    free(p.yaml);
    free(filler);
    cr_assert_eq(umount(run_dir), 0);
}

/* ---- latest ---- */

static int64_t latest(void)
{
    qs_comm *comm = NULL;
    int64_t step = -2;
    cr_assert_eq(qs_comm_self_create(&comm), QS_OK);
    cr_assert_eq(qs_ckpt_latest(run_dir, &step, comm), QS_OK, "%s", qs_error_text());
    qs_comm_destroy(comm);
    return step;
}

Test(ckpt, latest_is_the_newest_that_verifies_and_bad_ones_are_set_aside)
{
    cr_assert_eq(latest(), -1);
    for (int64_t step = 1; step <= 5; step++) {
        save_step(step, 2);
    }
    save_step(100000000, 1); /* nine digits: sorted by number, not by name */
    cr_assert_eq(latest(), 100000000);
    flip_byte("step-100000000/manifest.json", 20);
    cr_assert_eq(latest(), 5);
    cr_assert(exists("step-100000000.bad") && !exists("step-100000000"));
    flip_byte("step-00000005/rank-00000.h5", 4000);
    cr_assert_eq(latest(), 4);
    char path[256];
    snprintf(path, sizeof path, "%s/step-00000004/rank-00001.h5", run_dir);
    cr_assert_eq(truncate(path, 5000), 0);
    cr_assert_eq(latest(), 3);
    snprintf(path, sizeof path, "%s/step-00000003/rank-00001.h5", run_dir);
    cr_assert_eq(unlink(path), 0);
    cr_assert_eq(latest(), 2);
    snprintf(path, sizeof path, "%s/step-00000002/manifest.json", run_dir);
    cr_assert_eq(unlink(path), 0);
    cr_assert_eq(latest(), 1);
    cr_assert_eq(entries(), 6, "nothing was deleted");
}

/* As in a group's directory where a colleague's checkpoints are readable to the colleague alone.
 * For root, who may read everything, as another user. */
static void put_out_of_reach(const char *name)
{
    char path[256];
    snprintf(path, sizeof path, "%s/%s", run_dir, name);
    cr_assert_eq(chmod(path, 0), 0);
    if (geteuid() == 0) {
        cr_assert_eq(chmod(folder, 0777), 0);
        cr_assert_eq(chmod(run_dir, 0777), 0);
        cr_assert_eq(seteuid(65534), 0);
    }
}

static void back_in_reach(const char *name)
{
    char path[256];
    snprintf(path, sizeof path, "%s/%s", run_dir, name);
    (void)seteuid(getuid());
    cr_assert_eq(chmod(path, 0700), 0);
}

Test(ckpt, a_checkpoint_out_of_reach_is_neither_set_aside_nor_passed_over)
{
    qs_comm *comm = NULL;
    int64_t steps[2], step = -2;
    int count = 0;
    save_step(1, 1);
    save_step(2, 1);
    cr_assert_eq(qs_comm_self_create(&comm), QS_OK);
    put_out_of_reach("step-00000002");
    const qs_status latest = qs_ckpt_latest(run_dir, &step, comm);
    const bool says = strstr(qs_error_text(), "Permission denied") != NULL;
    qs_error_clear();
    const qs_status listed = qs_manifest_list(run_dir, steps, 2, &count);
    back_in_reach("step-00000002");
    qs_comm_destroy(comm);
    cr_assert_eq(latest, QS_ERR_INPUT_MISSING);
    cr_assert(says);
    cr_assert_eq(listed, QS_ERR_INPUT_MISSING);
    cr_assert(exists("step-00000002") && exists("step-00000001"));
    cr_assert_eq(entries(), 2);
}

Test(ckpt, missing_run_directory_has_no_checkpoint)
{
    cr_assert_eq(rmdir(run_dir), 0);
    cr_assert_eq(latest(), -1);
}

/* ---- not this run's ---- */

static void expect_refusal(plan *p, qs_status status, const char *says)
{
    team_member members[TEAM_MAX];
    team_run(members, 2, load_body, p);
    for (int r = 0; r < 2; r++) {
        cr_assert_eq(members[r].st, status, "%d: %s", (int)members[r].st, members[r].text);
    }
    cr_assert_not_null(strstr(members[0].text, says), "%s", members[0].text);
}

static void change(plan *p, const char *set)
{
    cr_assert_eq(qs_config_parse(&p->config, p->yaml, strlen(p->yaml), "r", &set, 1), QS_OK);
    free(p->yaml);
    p->yaml = qs_config_dump(&p->config);
    p->meta.config_yaml = p->yaml;
}

Test(ckpt, state_of_another_run_is_refused_naming_the_first_difference)
{
    save_step(1, 2);
    static const char *const sets[][2] = {
        {"optim.lr=5e-4", "optim.lr"},
        {"train.steps=7", "train.steps"},
        {"seed=3", "seed"},
        {"lora.alpha=1", "lora.alpha"},
        {"train.seq_len=64", "train.seq_len"},
        {"train.micro_batch=4", "train.micro_batch"},
    };
    plan p;
    for (size_t i = 0; i < sizeof sets / sizeof *sets; i++) {
        plan_init(&p, 1);
        change(&p, sets[i][0]);
        expect_refusal(&p, QS_ERR_RESUME, sets[i][1]);
        free(p.yaml);
    }
    plan_init(&p, 1);
    strcpy(p.meta.base_sha256, "cc");
    expect_refusal(&p, QS_ERR_RESUME, "another base");
    free(p.yaml);
    plan_init(&p, 1);
    strcpy(p.meta.data_content, "cc");
    expect_refusal(&p, QS_ERR_RESUME, "another data.train");
    free(p.yaml);
    plan_init(&p, 1);
    strcpy(p.meta.data_layout, "cc");
    expect_refusal(&p, QS_ERR_RESUME, "another data.train: its labels or the borders");
    free(p.yaml);
    plan_init(&p, 1);
    change(&p, "train.save_every=9");
    team_expect_ok(2, load_body, &p); /* changes no bit */
    free(p.yaml);
}

/* The manifest verifies, the file does not: the reader looks for itself. */
Test(ckpt, damage_after_the_choice_is_found_by_the_rank_that_reads_it)
{
    save_step(1, 2);
    flip_byte("step-00000001/rank-00001.h5", 9000);
    plan p;
    plan_init(&p, 1);
    qs_comm *comm = NULL;
    qs_optim *o = NULL;
    qs_ckpt_meta found;
    cr_assert_eq(qs_comm_self_create(&comm), QS_OK);
    cr_assert_eq(make_optim(&p, comm, &o), QS_OK);
    cr_assert_eq(qs_ckpt_load(run_dir, 1, &p.meta, &p.layout, o, &found, comm), QS_ERR_INPUT_HASH);
    cr_assert_not_null(strstr(qs_error_text(), "rank-00001.h5"));
    qs_optim_destroy(o);
    qs_comm_destroy(comm);
    free(p.yaml);
}

/* ---- rotation ---- */

Test(rotate, newest_and_milestones_stay)
{
    for (int64_t step = 1; step <= 9; step++) {
        save_step(step, 1);
    }
    cr_assert_eq(qs_ckpt_rotate(run_dir, 2, 4), QS_OK);
    for (int64_t step = 1; step <= 9; step++) {
        char name[32];
        snprintf(name, sizeof name, "step-%08lld", (long long)step);
        cr_assert_eq(exists(name), step >= 8 || step == 4, "%s", name);
    }
    cr_assert_eq(entries(), 3);
    cr_assert_eq(qs_ckpt_rotate(run_dir, 1, 0), QS_OK);
    cr_assert_eq(entries(), 1);
    cr_assert(exists("step-00000009"));
}

Test(rotate, damaged_newer_ones_do_not_count)
{
    for (int64_t step = 1; step <= 4; step++) {
        save_step(step, 1);
    }
    flip_byte("step-00000004/rank-00000.h5", 9000);
    char path[256];
    snprintf(path, sizeof path, "%s/step-00000003/rank-00000.h5", run_dir);
    cr_assert_eq(truncate(path, 10), 0);
    cr_assert_eq(qs_ckpt_rotate(run_dir, 1, 0), QS_OK);
    cr_assert(exists("step-00000002"), "the newest good one");
    cr_assert(!exists("step-00000001"));
    cr_assert(exists("step-00000003") && exists("step-00000004"), "not ours to judge here");
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
        save_step(step, 1 + (int)(qs_rng_u32(&rng, draw++) % 2));
        if (qs_rng_u32(&rng, draw++) % 3 == 0) {
            snprintf(name, sizeof name, "step-%08lld/rank-00000.h5", (long long)step);
            flip_byte(name, 9000);
        } else {
            good[n_good++] = step;
        }
        int keep = 1 + (int)(qs_rng_u32(&rng, draw++) % 3);
        cr_assert_eq(qs_ckpt_rotate(run_dir, keep, 5), QS_OK);
        for (int i = n_good - 1; i >= 0 && i >= n_good - keep; i--) {
            snprintf(name, sizeof name, "step-%08lld", (long long)good[i]);
            if (!exists(name)) {
                /* only an earlier rotation that kept fewer may have taken it */
                cr_assert(i < n_good - 1, "round %d: the newest good one is gone", round);
            }
        }
        for (int i = 0; i < n_good; i++) {
            snprintf(name, sizeof name, "step-%08lld", (long long)good[i]);
            cr_assert(exists(name) || good[i] % 5 != 0, "milestone %s is gone", name);
        }
        cr_assert_eq(latest(), n_good ? good[n_good - 1] : -1, "round %d", round);
    }
    cr_assert_gt(n_good, 20, "the history has something to lose");
}

/* ---- run directory ---- */

static qs_status open_as(qs_run_dir *run, const qs_config *c, qs_resume resume, bool takeover)
{
    qs_comm *comm = NULL;
    qs_error_clear();
    cr_assert_eq(qs_comm_self_create(&comm), QS_OK);
    qs_status st = qs_run_dir_open(run, c, resume, takeover, comm);
    qs_comm_destroy(comm);
    return st;
}

static void write_text(const char *name, const char *text)
{
    char path[256];
    snprintf(path, sizeof path, "%s/%s", run_dir, name);
    cr_assert_eq(qs_io_write_file(path, text, strlen(text)), QS_OK);
}

Test(run_dir, is_made_with_its_parent_and_recognised_later)
{
    qs_config c = config();
    qs_run_dir run, again;
    char other[160], path[256];
    snprintf(other, sizeof other, "%s/runs/demo", folder);
    snprintf(c.output, sizeof c.output, "%s", other);
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK, "%s", qs_error_text());
    cr_assert_gt(strlen(run.run_id), 8);
    cr_assert(!run.finished && run.locked);
    qs_run_dir_close(&run);
    cr_assert_eq(open_as(&again, &c, QS_RESUME_AUTO, false), QS_OK, "%s", qs_error_text());
    cr_assert_str_eq(again.run_id, run.run_id);
    qs_config found;
    snprintf(path, sizeof path, "%s/config.yaml", other);
    cr_assert_eq(qs_config_load(&found, path, NULL, 0), QS_OK);
    cr_assert(memcmp(&found, &c, sizeof c) == 0);
    qs_run_dir_close(&again);
}

Test(run_dir, finished_run_is_told_and_not_touched)
{
    qs_config c = config();
    qs_run_dir run;
    qs_comm *comm = NULL;
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK);
    cr_assert_eq(qs_comm_self_create(&comm), QS_OK);
    cr_assert_eq(qs_run_dir_finish(&run, comm), QS_OK, "%s", qs_error_text());
    qs_comm_destroy(comm);
    qs_run_dir_close(&run);
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK);
    cr_assert(run.finished && !run.locked);
    cr_assert(!exists("run.lock"));
    c.optim.lr = 0.5;
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_ERR_RESUME);
    cr_assert_not_null(strstr(qs_error_text(), "optim.lr"), "%s", qs_error_text());
}

Test(run_dir, strangers_directory_is_refused_and_left_alone)
{
    qs_config c = config();
    qs_run_dir run;
    write_text("thesis.tex", "x");
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_ERR_OUTPUT_TAKEN);
    cr_assert_not_null(strstr(qs_error_text(), "thesis.tex"), "%s", qs_error_text());
    cr_assert_eq(entries(), 1);
    write_text("run.json", "{\"format\": \"other\"}");
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, true), QS_ERR_OUTPUT_TAKEN);
    write_text("run.json", "{\"format\": ");
    cr_assert_eq(qs_exit_code(open_as(&run, &c, QS_RESUME_AUTO, true)), 3);
    cr_assert_eq(entries(), 2);
    char file[160];
    snprintf(file, sizeof file, "%s/thesis.tex", run_dir);
    snprintf(c.output, sizeof c.output, "%s", file);
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, true), QS_ERR_OUTPUT_TAKEN);
}

Test(run_dir, wishes_about_resuming_are_kept)
{
    qs_config c = config();
    qs_run_dir run;
    cr_assert_eq(open_as(&run, &c, QS_RESUME_MUST, false), QS_ERR_CHECKPOINT);
    cr_assert_eq(open_as(&run, &c, QS_RESUME_NEVER, false), QS_OK);
    qs_run_dir_close(&run);
    cr_assert_eq(open_as(&run, &c, QS_RESUME_NEVER, false), QS_ERR_OUTPUT_TAKEN);
    cr_assert_eq(open_as(&run, &c, QS_RESUME_MUST, false), QS_ERR_CHECKPOINT, "none written yet");
}

Test(run_dir, abandoned_directory_goes_only_if_it_was_made_and_nothing_else_is_in_it)
{
    qs_config c = config();
    qs_run_dir run;
    snprintf(c.output, sizeof c.output, "%s/new/demo", folder);
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK);
    qs_run_dir_abandon(&run);
    cr_assert_neq(access(c.output, F_OK), 0);
    cr_assert_neq(access(dirname(c.output), F_OK), 0, "the parent was made as well");
    c = config();
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK);
    qs_run_dir_abandon(&run);
    cr_assert(exists("run.json"), "the directory was there before");
    qs_run_dir_close(&run);
    cr_assert(!exists("run.lock"));
}

Test(run_dir, configuration_may_change_until_there_is_a_checkpoint)
{
    qs_config c = config();
    qs_run_dir run;
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK);
    qs_run_dir_close(&run);
    c.optim.lr = 0.5;
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK);
    qs_run_dir_close(&run);
    save_step(1, 1);
    c.train.log_every = 7;
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK);
    qs_run_dir_close(&run);
    c.optim.lr = 0.25;
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_ERR_RESUME);
    cr_assert_not_null(strstr(qs_error_text(), "optim.lr (then and now: 0.5 and 0.25)"), "%s",
                       qs_error_text());
    cr_assert(!exists("run.lock"));
}

Test(run_dir, second_writer_is_refused_while_the_first_lives)
{
    qs_config c = config();
    qs_run_dir run, other;
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK);
    pid_t child = fork();
    if (child == 0) {
        qs_status st = open_as(&other, &c, QS_RESUME_AUTO, false);
        _exit(st == QS_ERR_OUTPUT_TAKEN && strstr(qs_error_text(), "--takeover") ? 0 : 1);
    }
    int status = 0;
    cr_assert_eq(waitpid(child, &status, 0), child);
    cr_assert(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    cr_assert(exists("run.lock"), "still the first one's");
    qs_run_dir_close(&run);
    cr_assert(!exists("run.lock"));
}

Test(run_dir, lock_of_a_killed_process_is_taken_over)
{
    qs_config c = config();
    qs_run_dir run;
    int status = 0;
    pid_t child = fork();
    if (child == 0) {
        _exit(open_as(&run, &c, QS_RESUME_AUTO, false) == QS_OK ? 0 : 1); /* without close */
    }
    cr_assert_eq(waitpid(child, &status, 0), child);
    cr_assert(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    cr_assert(exists("run.lock"));
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK, "%s", qs_error_text());
    qs_run_dir_close(&run);
    cr_assert_eq(entries(), 2, "config.yaml and run.json");
}

Test(run_dir, lock_of_a_dead_process_that_nobody_collected_is_taken_over)
{
    qs_config c = config();
    qs_run_dir run;
    pid_t child = fork();
    if (child == 0) {
        _exit(open_as(&run, &c, QS_RESUME_AUTO, false) == QS_OK ? 0 : 1); /* without close */
    }
    siginfo_t info; /* see that it is dead, and leave it so */
    cr_assert_eq(waitid(P_PID, (id_t)child, &info, WEXITED | WNOWAIT), 0);
    cr_assert_eq(info.si_status, 0);
    cr_assert(exists("run.lock"));
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK, "%s", qs_error_text());
    qs_run_dir_close(&run);
    cr_assert_eq(entries(), 2, "config.yaml and run.json");
}

Test(run_dir, writer_that_is_just_dying_is_waited_for)
{
    qs_config c = config();
    qs_run_dir run;
    int ready[2], status = 0;
    char byte = 0;
    cr_assert_eq(pipe(ready), 0);
    pid_t child = fork();
    if (child == 0) {
        bool good = open_as(&run, &c, QS_RESUME_AUTO, false) == QS_OK;
        good = write(ready[1], "x", 1) == 1 && good;
        usleep(500000);
        _exit(good ? 0 : 1); /* without close */
    }
    cr_assert_eq(read(ready[0], &byte, 1), 1);
    pid_t second = fork(); /* a dead child counts as alive until somebody waits for it */
    if (second == 0) {
        _exit(open_as(&run, &c, QS_RESUME_AUTO, false) == QS_OK ? 0 : 1);
    }
    cr_assert_eq(waitpid(child, &status, 0), child);
    cr_assert(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    cr_assert_eq(waitpid(second, &status, 0), second);
    cr_assert(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

Test(run_dir, lock_of_another_host_needs_takeover_or_the_same_job)
{
    static const char *const lock = "{\"host\": \"elsewhere\", \"job\": \"77\", \"pid\": 1, "
                                    "\"born\": 5, \"restart\": 0}";
    qs_config c = config();
    qs_run_dir run;
    unsetenv("SLURM_JOB_ID");
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK);
    qs_run_dir_close(&run);
    write_text("run.lock", lock);
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_ERR_OUTPUT_TAKEN);
    cr_assert_not_null(strstr(qs_error_text(), "host elsewhere, job 77"), "%s", qs_error_text());
    setenv("SLURM_JOB_ID", "77", 1);
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_ERR_OUTPUT_TAKEN);
    setenv("SLURM_RESTART_COUNT", "1", 1);
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK, "%s", qs_error_text());
    qs_run_dir_close(&run);
    unsetenv("SLURM_JOB_ID");
    write_text("run.lock", lock);
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, true), QS_OK, "%s", qs_error_text());
    qs_run_dir_close(&run);
    write_text("run.lock", "");
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_ERR_OUTPUT_TAKEN);
    cr_assert_not_null(strstr(qs_error_text(), "cannot be read"), "%s", qs_error_text());
}

/* link() of the process, which taking the lock uses: tests act in the moment before it. */
static void (*before_link)(void);
static bool no_hard_links;
static int links;

int link(const char *from, const char *to)
{
    void (*act)(void) = before_link;
    before_link = NULL;
    links++;
    if (act != NULL) {
        act();
    }
    if (no_hard_links) {
        errno = EPERM;
        return -1;
    }
    return linkat(AT_FDCWD, from, AT_FDCWD, to, 0);
}

static void in_another_process(void (*work)(void))
{
    int status = 0;
    const pid_t child = fork();
    if (child == 0) {
        work();
        _exit(0);
    }
    cr_assert_eq(waitpid(child, &status, 0), child);
    cr_assert(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void hold_the_lock(void) /* and die without releasing it */
{
    qs_config c = config();
    qs_run_dir run;
    if (open_as(&run, &c, QS_RESUME_AUTO, false) != QS_OK) {
        _exit(1);
    }
}

static void run_to_the_end(void)
{
    qs_config c = config();
    qs_run_dir run;
    qs_comm *comm = NULL;
    c.optim.lr = 0.5;
    if (qs_comm_self_create(&comm) != QS_OK || open_as(&run, &c, QS_RESUME_AUTO, true) != QS_OK ||
        qs_run_dir_finish(&run, comm) != QS_OK) {
        _exit(1);
    }
    qs_run_dir_close(&run);
    qs_comm_destroy(comm);
}

Test(run_dir, locks_do_without_hard_links)
{
    qs_config c = config();
    qs_run_dir run, other;
    no_hard_links = true;
    in_another_process(hold_the_lock);
    cr_assert(exists("run.lock"));
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK, "%s", qs_error_text());
    const pid_t child = fork();
    if (child == 0) {
        const qs_status st = open_as(&other, &c, QS_RESUME_AUTO, false);
        _exit(st == QS_ERR_OUTPUT_TAKEN && strstr(qs_error_text(), "--takeover") ? 0 : 1);
    }
    int status = 0;
    cr_assert_eq(waitpid(child, &status, 0), child);
    cr_assert(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the first one lives");
    cr_assert_eq(open_as(&other, &c, QS_RESUME_AUTO, true), QS_OK, "%s", qs_error_text());
    qs_run_dir_close(&other);
    cr_assert_eq(entries(), 2, "config.yaml and run.json");
}

static void sweep_all(void)
{
    char path[400];
    DIR *d = opendir(run_dir);
    for (const struct dirent *e = readdir(d); e != NULL; e = readdir(d)) {
        if (strncmp(e->d_name, "run.lock.new-", 13) == 0) {
            snprintf(path, sizeof path, "%s/%s", run_dir, e->d_name);
            cr_assert_eq(unlink(path), 0);
        }
    }
    closedir(d);
}

/* What a process that has just got the lock takes for leftovers. */
Test(run_dir, a_lock_that_is_swept_away_half_taken_is_written_again)
{
    qs_config c = config();
    qs_run_dir run;
    before_link = sweep_all;
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK, "%s", qs_error_text());
    cr_assert_eq(links, 2, "nobody may see half a lock");
    cr_assert(exists("run.lock"));
    qs_run_dir_close(&run);
    cr_assert_eq(entries(), 2, "config.yaml and run.json");
}

static void finish_another(void)
{
    in_another_process(run_to_the_end);
}

Test(run_dir, a_run_that_came_and_went_before_the_lock_was_ours_is_seen)
{
    qs_config c = config();
    qs_run_dir run;
    cr_assert_eq(rmdir(run_dir), 0);
    before_link = finish_another;
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_ERR_RESUME, "%s", qs_error_text());
    cr_assert(exists("run.json") && exists("config.yaml"), "they are the other one's");
    cr_assert(!exists("run.lock"));
    c.optim.lr = 0.5;
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK, "%s", qs_error_text());
    cr_assert(run.finished);
}

Test(run_dir, a_run_that_was_taken_over_notices_and_leaves_the_other_alone)
{
    qs_config c = config();
    qs_run_dir run;
    qs_comm *comm = NULL;
    char path[256];
    void *before = NULL, *after = NULL;
    size_t bytes = 0;
    cr_assert_eq(rmdir(run_dir), 0);
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK);
    cr_assert_eq(qs_comm_self_create(&comm), QS_OK);
    cr_assert_eq(qs_run_dir_still_ours(&run, comm), QS_OK, "%s", qs_error_text());
    write_text("run.lock", "{\"host\": \"elsewhere\", \"job\": \"77\", \"pid\": 1, "
                           "\"born\": 5, \"restart\": 0}");
    snprintf(path, sizeof path, "%s/run.json", run_dir);
    cr_assert_eq(qs_io_read_file(path, 1000, &before, &bytes), QS_OK);
    cr_assert_eq(qs_run_dir_still_ours(&run, comm), QS_ERR_OUTPUT_TAKEN);
    cr_assert_not_null(strstr(qs_error_text(), "process 1 on host elsewhere, job 77"), "%s",
                       qs_error_text());
    cr_assert_eq(qs_run_dir_finish(&run, comm), QS_ERR_OUTPUT_TAKEN);
    qs_run_dir_abandon(&run);
    qs_error_clear();
    cr_assert_eq(qs_io_read_file(path, 1000, &after, &bytes), QS_OK, "%s", qs_error_text());
    cr_assert_str_eq(after, before);
    cr_assert(exists("run.lock"));
    qs_comm_destroy(comm);
    free(before);
    free(after);
}

Test(run_dir, an_error_is_still_told_where_the_directory_went_away)
{
    qs_config c = config();
    qs_run_dir run;
    cr_assert_eq(open_as(&run, &c, QS_RESUME_AUTO, false), QS_OK);
    scratch_remove(folder);
    (void)QS_FAIL(QS_ERR_IO, "what happened");
    qs_run_dir_abandon(&run);
    qs_run_dir_close(&run);
    cr_assert_str_eq(qs_error_text(), "what happened");
}

Test(run_dir, a_start_without_room_leaves_nothing)
{
    struct rlimit limit;
    qs_config c = config();
    qs_run_dir run;
    signal(SIGXFSZ, SIG_IGN);
    cr_assert_eq(getrlimit(RLIMIT_FSIZE, &limit), 0);
    for (rlim_t room = 0; room < 1200; room += 100) { /* lock, config.yaml, run.json */
        snprintf(c.output, sizeof c.output, "%s/new/demo", folder);
        const rlim_t most = limit.rlim_cur;
        limit.rlim_cur = room;
        cr_assert_eq(setrlimit(RLIMIT_FSIZE, &limit), 0);
        const qs_status st = open_as(&run, &c, QS_RESUME_AUTO, false);
        limit.rlim_cur = most;
        cr_assert_eq(setrlimit(RLIMIT_FSIZE, &limit), 0);
        cr_assert_eq(st, QS_ERR_IO_FULL, "%s", qs_error_text());
        cr_assert_not_null(strstr(qs_error_text(), "ulimit -f"), "%s", qs_error_text());
        cr_assert_neq(access(dirname(c.output), F_OK), 0, "with room for %d bytes", (int)room);
    }
}

static qs_status open_body(team_member *me)
{
    qs_run_dir run;
    qs_status st = qs_run_dir_open(&run, me->ctx, QS_RESUME_AUTO, false, me->comm);
    if (st == QS_OK) {
        TEAM_CHECK(run.run_id[0], "rank %d was not told the run id", me->rank);
        TEAM_CHECK(run.locked == (me->rank == 0), "rank %d: locked", me->rank);
        QS_TRY(qs_run_dir_finish(&run, me->comm));
        qs_run_dir_close(&run);
    }
    return st;
}

Test(run_dir, all_ranks_hear_what_rank_0_found)
{
    qs_config c = config();
    team_member members[TEAM_MAX];
    team_expect_ok(3, open_body, &c);
    write_text("run.json", "{}");
    team_run(members, 3, open_body, &c);
    for (int r = 0; r < 3; r++) {
        cr_assert_eq(qs_exit_code(members[r].st), 3);
    }
}
