/* Saving. Every stage ends in an agreement of all ranks, so that either all go on or all give up;
 * until the rename at the very end nothing that exists has changed.
 *
 *   image in memory | room on the disk | rank 0: step-N.tmp-RUN | own file: write, sync, read back
 *   | rank 0: manifest, sync, rename to step-N, sync */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "ckpt/ckpt_impl.h"
#include "store/h5.h"
#include "store/hash.h"
#include "store/io.h"

enum { MANIFEST_ROOM = 1 << 20 }; /* for the manifest and the file system's own needs */

typedef struct {
    const char *run_dir;
    const qs_ckpt_meta *meta;
    const qs_lora_layout *layout;
    const qs_optim *optim;
    qs_comm *comm;
    int rank, nranks;
    char temp[QS_CKPT_PATH], final[QS_CKPT_PATH];
    void *image;
    size_t image_bytes;
    char sha256[QS_SHA256_HEX];
    bool made; /* the temporary directory */
} saving;

static qs_status put_dataset(qs_h5 *file, const char *name, const float *data, int64_t count)
{
    qs_h5_info info = {.dtype = QS_F32, .rank = 1, .dims = {count, 0}};
    return qs_h5_dataset_put(file, name, &info, data);
}

static qs_status build_image(saving *s)
{
    qs_h5 *file = NULL;
    qs_status st = QS_OK;
    const qs_optim *o = s->optim;
    if (o->count != s->layout->n_layers * qs_lora_shard_width(s->layout, s->nranks)) {
        return QS_FAIL(QS_ERR_BUG, "the optimizer holds %" PRId64 " elements, not its share",
                       o->count);
    }
    QS_GOTO(qs_h5_create(&file, NULL));
    QS_GOTO(qs_h5_attr_put_text(file, "format", "qshard-ckpt"));
    QS_GOTO(qs_h5_attr_put_i64(file, "format_version", 1));
    QS_GOTO(qs_h5_attr_put_i64(file, "step", s->meta->step));
    QS_GOTO(qs_h5_attr_put_i64(file, "rank", s->rank));
    QS_GOTO(qs_h5_attr_put_i64(file, "nranks", s->nranks));
    QS_GOTO(put_dataset(file, "lora", o->master, o->count));
    QS_GOTO(put_dataset(file, "m", o->m, o->count));
    QS_GOTO(put_dataset(file, "v", o->v, o->count));
    st = qs_h5_close_image(file, &s->image, &s->image_bytes);
    file = NULL;
    QS_GOTO(st);
    qs_sha256_hex(s->image, s->image_bytes, s->sha256);
done:
    qs_h5_discard(file); /* open only after a failure */
    return st;
}

/* Asked on every rank, since each may see other limits; the files of all must fit. */
static qs_status check_room(const saving *s, int64_t total)
{
    uint64_t free_bytes = 0;
    QS_TRY(qs_io_free_bytes(s->run_dir, &free_bytes));
    if (free_bytes < (uint64_t)total + MANIFEST_ROOM) {
        return QS_FAIL(QS_ERR_IO_FULL,
                       "%s: a checkpoint needs %" PRId64 " bytes, but %" PRIu64
                       " are free; make room, the run can go on",
                       s->run_dir, total + (int64_t)MANIFEST_ROOM, free_bytes);
    }
    return QS_OK;
}

static qs_status make_temp(saving *s)
{
    QS_TRY(qs_ckpt_sweep(s->run_dir));
    QS_TRY(qs_io_mkdir(s->temp));
    s->made = true;
    return QS_OK;
}

static qs_status write_file(const saving *s)
{
    char name[64], path[QS_CKPT_PATH + 80];
    qs_ckpt_file_name(name, sizeof name, s->rank);
    snprintf(path, sizeof path, "%s/%s", s->temp, name);
    return qs_io_write_new(path, s->image, s->image_bytes);
}

/* Size and hash of a rank's file, as that rank made it. */
typedef struct {
    int64_t bytes;
    char sha256[72];
} file_note;

static qs_status publish(const saving *s, const file_note *notes)
{
    qs_manifest m = {.step = s->meta->step, .nranks = s->nranks, .n_files = s->nranks};
    qs_status st = QS_OK;
    snprintf(m.run_id, sizeof m.run_id, "%s", s->meta->run_id);
    m.meta_json = qs_ckpt_record_text(s->meta, s->layout);
    m.files = calloc((size_t)s->nranks, sizeof *m.files);
    if (!m.meta_json || !m.files) {
        QS_GOTO(QS_FAIL(QS_ERR_MEMORY, "%s: no memory for the manifest", s->temp));
    }
    for (int r = 0; r < s->nranks; r++) {
        qs_ckpt_file_name(m.files[r].name, sizeof m.files[r].name, r);
        m.files[r].bytes = notes[r].bytes;
        memcpy(m.files[r].sha256, notes[r].sha256, sizeof m.files[r].sha256);
    }
    QS_GOTO(qs_manifest_write(s->temp, &m));
    QS_GOTO(qs_io_fsync_dir(s->temp));
    QS_GOTO(qs_io_rename(s->temp, s->final));
    QS_GOTO(qs_io_fsync_dir(s->run_dir));
done:
    qs_manifest_free(&m);
    return st;
}

static qs_status collect_and_publish(saving *s)
{
    file_note mine;
    memset(&mine, 0, sizeof mine);
    mine.bytes = (int64_t)s->image_bytes;
    memcpy(mine.sha256, s->sha256, sizeof s->sha256);
    file_note *notes = calloc((size_t)s->nranks, sizeof *notes);
    qs_status st = notes ? QS_OK : QS_FAIL(QS_ERR_MEMORY, "%s: no memory", s->temp);
    st = qs_comm_agree(s->comm, st);
    st = st == QS_OK ? qs_comm_all_gather_now(s->comm, &mine, notes, sizeof mine) : st;
    if (st == QS_OK) {
        st = qs_comm_agree(s->comm, s->rank == 0 ? publish(s, notes) : QS_OK);
    }
    free(notes);
    return st;
}

/* A step that is there already: by determinism it holds this very state, if it is this run's and
 * verifies; otherwise it makes room. */
static qs_status look_at_existing(const saving *s, int64_t *saved)
{
    struct stat info;
    qs_manifest m;
    if (stat(s->final, &info) != 0) {
        return QS_OK;
    }
    if (qs_manifest_verify(s->final, &m) == QS_OK) {
        *saved = strcmp(m.run_id, s->meta->run_id) == 0;
        qs_manifest_free(&m);
    }
    qs_error_clear();
    return *saved ? QS_OK : qs_ckpt_set_aside(s->run_dir, s->meta->step);
}

static qs_status stages(saving *s)
{
    QS_TRY(qs_comm_agree(s->comm, build_image(s)));
    int64_t total = (int64_t)s->image_bytes;
    QS_TRY(qs_comm_sum_i64(s->comm, &total, 1));
    QS_TRY(qs_comm_agree(s->comm, check_room(s, total)));
    QS_TRY(qs_comm_agree(s->comm, s->rank == 0 ? make_temp(s) : QS_OK));
    QS_TRY(qs_comm_agree(s->comm, write_file(s)));
    return collect_and_publish(s);
}

/* Do all ranks mean the same step? */
static qs_status check_step(saving *s)
{
    int64_t ends[2] = {s->meta->step, -s->meta->step};
    QS_TRY(qs_comm_max_i64(s->comm, ends, 2));
    if (ends[0] != -ends[1]) {
        return QS_FAIL(QS_ERR_DISAGREE, "ranks want to save steps %" PRId64 " and %" PRId64,
                       -ends[1], ends[0]);
    }
    return QS_OK;
}

qs_status qs_ckpt_save(const char *run_dir, const qs_ckpt_meta *meta, const qs_lora_layout *layout,
                       const qs_optim *optim, qs_comm *comm)
{
    saving s = {.run_dir = run_dir,
                .meta = meta,
                .layout = layout,
                .optim = optim,
                .comm = comm,
                .rank = qs_comm_rank(comm),
                .nranks = qs_comm_nranks(comm)};
    QS_TRY(check_step(&s));
    qs_manifest_step_dir(s.final, sizeof s.final, run_dir, meta->step);
    snprintf(s.temp, sizeof s.temp, "%.*s.tmp-%s", (int)sizeof s.temp - 48, s.final, meta->run_id);
    int64_t saved = 0;
    QS_TRY(qs_comm_agree(comm, s.rank == 0 ? look_at_existing(&s, &saved) : QS_OK));
    QS_TRY(qs_comm_bcast(comm, &saved, sizeof saved, 0));
    if (saved) {
        return QS_OK;
    }
    qs_status st = stages(&s);
    free(s.image);
    if (st != QS_OK && s.made) {
        /* Ours alone, and all ranks are past their writes. What failed is what is reported. */
        (void)qs_io_remove_dir(s.temp);
    }
    return st;
}
