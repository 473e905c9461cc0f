/* The directories of a run: which steps there are, which of them are good, which may go. Order is
 * by the step in the name and the manifest; times of files are never looked at. */
#define _GNU_SOURCE
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/log.h"
#include "ckpt/ckpt_impl.h"
#include "store/io.h"

/* ---- names ---- */

typedef struct {
    const char *run_dir;
    bool say;
} sweeping;

static qs_status sweep_entry(void *user, int dir, const char *name)
{
    const sweeping *s = user;
    char path[QS_CKPT_PATH + NAME_MAX];
    (void)dir;
    if (strncmp(name, "step-", 5) != 0 || strstr(name, ".tmp-") == NULL) {
        return QS_OK;
    }
    snprintf(path, sizeof path, "%s/%s", s->run_dir, name);
    if (qs_manifest_remove_dir(path) != QS_OK) {
        if (s->say) {
            qs_log_warn("%s: no checkpoint any more, and stays: %s", path, qs_error_text());
        }
        qs_error_clear();
    }
    return QS_OK;
}

qs_status qs_ckpt_sweep(const char *run_dir, bool say)
{
    sweeping s = {run_dir, say};
    return qs_io_list(run_dir, QS_ERR_IO, sweep_entry, &s, NULL);
}

/* FROM and the suffix, with a number where that is taken. */
static void unused_name(char out[QS_CKPT_PATH + 32], const char *from, const char *suffix)
{
    struct stat info;
    snprintf(out, QS_CKPT_PATH + 32, "%s%s", from, suffix);
    for (int n = 2; lstat(out, &info) == 0; n++) {
        snprintf(out, QS_CKPT_PATH + 32, "%s%s%d", from, suffix, n);
    }
}

qs_status qs_ckpt_set_aside(const char *run_dir, int64_t step)
{
    char from[QS_CKPT_PATH], to[QS_CKPT_PATH + 32];
    qs_manifest_step_dir(from, sizeof from, run_dir, step);
    unused_name(to, from, ".bad");
    QS_TRY(qs_io_rename(from, to));
    return qs_io_fsync_dir(run_dir);
}

qs_status qs_ckpt_find_blind(const qs_ckpt_meta *meta, qs_comm *comm, bool **blind)
{
    *blind = NULL;
    if (meta->seen == NULL || qs_seen_by_all(meta->seen)) {
        return QS_OK;
    }
    const bool mine = !meta->seen->mine;
    *blind = calloc((size_t)qs_comm_nranks(comm), sizeof **blind);
    QS_TRY(qs_comm_agree(
        comm, *blind != NULL ? QS_OK : QS_FAIL(QS_ERR_MEMORY, "no memory for a flag a rank")));
    return qs_comm_all_gather_now(comm, &mine, *blind, sizeof mine);
}

/* ---- the newest good one ---- */

static qs_status latest_here(const char *run_dir, int64_t *found)
{
    int64_t *steps = NULL;
    int count = 0;
    qs_status st = QS_OK;
    QS_TRY(qs_manifest_scan(run_dir, &steps, &count));
    for (int i = 0; i < count && *found < 0; i++) {
        char dir[QS_CKPT_PATH];
        qs_manifest m;
        qs_manifest_step_dir(dir, sizeof dir, run_dir, steps[i]);
        st = qs_manifest_verify(dir, &m);
        if (st == QS_OK) {
            qs_manifest_free(&m);
            *found = steps[i];
            break;
        }
        if (qs_manifest_undecided(st)) { /* to go on without it would lose its steps */
            goto done;
        }
        char why[512];
        snprintf(why, sizeof why, "%s", qs_error_text());
        qs_error_clear();
        QS_GOTO(qs_ckpt_set_aside(run_dir, steps[i]));
        qs_log_warn("%s: no good checkpoint, renamed to .bad: %s", dir, why);
    }
done:
    free(steps);
    return st;
}

qs_status qs_ckpt_latest(const char *run_dir, int64_t *step, qs_comm *comm)
{
    *step = -1;
    QS_TRY(qs_comm_agree(comm, qs_comm_rank(comm) == 0 ? latest_here(run_dir, step) : QS_OK));
    return qs_comm_bcast(comm, step, sizeof *step, 0);
}

/* ---- rotation ---- */

/* The manifest reads well and all files have their sizes; with `fully` their hashes too. */
static bool is_good(const char *run_dir, int64_t step, bool fully, char run_id[40])
{
    char dir[QS_CKPT_PATH], path[QS_CKPT_PATH + 80];
    qs_manifest m;
    struct stat info;
    qs_manifest_step_dir(dir, sizeof dir, run_dir, step);
    if ((fully ? qs_manifest_verify(dir, &m) : qs_manifest_read(dir, &m)) != QS_OK) {
        qs_error_clear();
        return false;
    }
    bool good = true;
    for (int i = 0; i < m.n_files; i++) {
        snprintf(path, sizeof path, "%s/%s", dir, m.files[i].name);
        good = good && stat(path, &info) == 0 && info.st_size == m.files[i].bytes;
    }
    snprintf(run_id, 40, "%s", m.run_id);
    qs_manifest_free(&m);
    return good;
}

/* Under a name that no reader takes for a checkpoint first: a killed deletion leaves no half one.
 * What cannot be removed, because another process reads it or has put something in, stays until it
 * can (qs_ckpt_sweep); what a full disk has no room to rename stays until the next rotation. */
static qs_status delete_step(const char *run_dir, int64_t step)
{
    char from[QS_CKPT_PATH], to[QS_CKPT_PATH + 32];
    qs_manifest_step_dir(from, sizeof from, run_dir, step);
    unused_name(to, from, ".tmp-old");
    const qs_status st = qs_io_rename(from, to);
    if (st == QS_ERR_IO_FULL) {
        qs_log_warn("%s; the checkpoint stays for now", qs_error_text());
        qs_error_clear();
        return QS_OK;
    }
    QS_TRY(st);
    if (qs_manifest_remove_dir(to) != QS_OK) {
        qs_log_warn("%s: no checkpoint any more, and stays until it can be removed: %s", to,
                    qs_error_text());
        qs_error_clear();
    }
    return QS_OK;
}

/* The checkpoints of a run, newest first. */
typedef struct {
    int count;
    int64_t *steps; /* [count] */
    bool *ours;     /* [count] good, and of the run that the newest good one is of */
} inventory;

static void inventory_free(inventory *all)
{
    free(all->steps);
    free(all->ours);
    *all = (inventory){0};
}

/* With `fully` the newest is read: it alone has not been looked at by an earlier rotation. */
static qs_status take_inventory(inventory *all, const char *run_dir, bool fully)
{
    char newest[40] = "", run_id[40] = "";
    qs_status st = QS_OK;
    *all = (inventory){0};
    QS_GOTO(qs_manifest_scan(run_dir, &all->steps, &all->count));
    all->ours = calloc((size_t)all->count + 1, sizeof *all->ours); /* there may be none */
    if (all->ours == NULL) {
        QS_GOTO(QS_FAIL(QS_ERR_MEMORY, "%s: no memory", run_dir));
    }
    for (int i = 0; i < all->count; i++) {
        if (!is_good(run_dir, all->steps[i], fully && i == 0, run_id)) {
            continue;
        }
        if (newest[0] == '\0') {
            memcpy(newest, run_id, sizeof newest);
        }
        all->ours[i] = strcmp(run_id, newest) == 0;
    }
done:
    if (st != QS_OK) {
        inventory_free(all);
    }
    return st;
}

static bool has_checkpoint(const inventory *all, int64_t step)
{
    bool found = false;
    for (int i = 0; i < all->count && !found; i++) {
        found = all->ours[i] && all->steps[i] == step;
    }
    return found;
}

static bool is_better(const qs_ckpt_eval *a, const qs_ckpt_eval *b)
{
    return b->step < 0 || a->loss < b->loss || (a->loss == b->loss && a->step < b->step);
}

static qs_ckpt_eval best_of(const inventory *all, qs_ckpt_evals evals)
{
    qs_ckpt_eval best = {.step = -1, .loss = NAN};
    for (int64_t i = 0; i < evals.count; i++) {
        const qs_ckpt_eval *e = &evals.list[i];
        if (isfinite(e->loss) && is_better(e, &best) && has_checkpoint(all, e->step)) {
            best = *e;
        }
    }
    return best;
}

qs_status qs_ckpt_rotate(const char *run_dir, int64_t keep_last, int64_t keep_every,
                         qs_ckpt_evals evals)
{
    inventory all;
    int64_t good = 0;
    qs_status st = QS_OK;
    QS_TRY(take_inventory(&all, run_dir, true));
    const int64_t best = best_of(&all, evals).step;
    for (int i = 0; i < all.count; i++) {
        const int64_t step = all.steps[i];
        const bool spared = (keep_every > 0 && step % keep_every == 0) || step == best;
        if (all.ours[i] && good >= keep_last && !spared) {
            QS_GOTO(delete_step(run_dir, step));
        }
        good += all.ours[i];
    }
done:
    inventory_free(&all);
    return st;
}

/* Does the checkpoint verify? One that is out of reach counts: nothing says that it is damaged. */
static qs_status verify_best(const char *run_dir, int64_t step, bool *good)
{
    char dir[QS_CKPT_PATH], why[512];
    qs_manifest m;
    qs_manifest_step_dir(dir, sizeof dir, run_dir, step);
    const qs_status st = qs_manifest_verify(dir, &m);
    *good = st == QS_OK || qs_manifest_undecided(st);
    if (st == QS_OK) {
        qs_manifest_free(&m);
    }
    snprintf(why, sizeof why, "%s", qs_error_text());
    qs_error_clear();
    if (*good) {
        return QS_OK;
    }
    QS_TRY(qs_ckpt_set_aside(run_dir, step));
    qs_log_warn("%s: had the best eval_loss, but is no good checkpoint any more, renamed to .bad: "
                "%s",
                dir, why);
    return QS_OK;
}

qs_status qs_ckpt_best(const char *run_dir, qs_ckpt_evals evals, bool verify, qs_ckpt_eval *best)
{
    bool good = false;
    while (!good) {
        inventory all;
        QS_TRY(take_inventory(&all, run_dir, false));
        *best = best_of(&all, evals);
        inventory_free(&all);
        good = !verify || best->step < 0;
        if (!good) {
            QS_TRY(verify_best(run_dir, best->step, &good));
        }
    }
    return QS_OK;
}
