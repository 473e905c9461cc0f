/* Saving. Every stage ends in an agreement of all ranks, so that either all go on or all give up;
 * until the rename at the very end nothing that exists has changed.
 *
 *   image in memory | room on the disk | rank 0: step-N.tmp-RUN | own file: write, sync, read back
 *   | rank 0: the files of ranks that do not see the directory, piece by piece
 *   | rank 0: manifest, sync, rename to step-N, sync */
#include <errno.h>
#include <inttypes.h>
#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/mem.h"
#include "ckpt/ckpt_impl.h"
#include "store/h5.h"
#include "store/hash.h"
#include "store/io.h"
#include "store/relay.h"

enum { PIECE_BYTES = 8 << 20 };   /* of an image on its way to rank 0 */
enum { MANIFEST_ROOM = 1 << 20 }; /* for the manifest and the file system's own needs */

/* Size and hash of a rank's file, as that rank made it. */
typedef struct {
    int64_t bytes;
    char sha256[72];
} file_note;

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
    file_note *notes; /* [nranks] */
    bool *blind;      /* [nranks] does not see the directory; NULL: all do */
    bool made;        /* the temporary directory */
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
    qs_mem_note(QS_MEM_HOST, QS_MEM_OPTIM, (ptrdiff_t)s->image_bytes);
    qs_sha256_hex(s->image, s->image_bytes, s->sha256);
done:
    qs_h5_discard(file); /* open only after a failure */
    return st;
}

static bool is_blind(const saving *s, int rank)
{
    return s->blind != NULL && s->blind[rank];
}

/* `total`: of the files of all ranks. */
static qs_status check_room(const char *dir, int64_t total)
{
    return qs_io_expect_room(dir, (uint64_t)total + MANIFEST_ROOM, "a checkpoint",
                             "make room, the run can go on");
}

qs_status qs_ckpt_expect_room(const char *run_dir, const qs_lora_layout *layout, int nranks)
{
    char dir[QS_CKPT_PATH];
    struct stat info;
    snprintf(dir, sizeof dir, "%s", run_dir);
    const char *there = dir;
    while (stat(there, &info) != 0 && errno == ENOENT) { /* ends at "." or "/" */
        there = dirname(dir);
    }
    const int64_t count = layout->n_layers * qs_lora_shard_width(layout, nranks) * nranks;
    return check_room(there, 3 * count * (int64_t)sizeof(float)); /* lora, m, v */
}

static qs_status make_temp(saving *s)
{
    QS_TRY(qs_ckpt_sweep(s->run_dir, false)); /* what stays was named when it first did */
    QS_TRY(qs_manifest_remove_dir(s->temp));
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

static qs_status collect_notes(saving *s)
{
    file_note mine;
    memset(&mine, 0, sizeof mine);
    mine.bytes = (int64_t)s->image_bytes;
    memcpy(mine.sha256, s->sha256, sizeof s->sha256);
    s->notes = calloc((size_t)s->nranks, sizeof *s->notes);
    qs_status st = s->notes ? QS_OK : QS_FAIL(QS_ERR_MEMORY, "%s: no memory", s->temp);
    QS_TRY(qs_comm_agree(s->comm, st));
    return qs_comm_all_gather_now(s->comm, &mine, s->notes, sizeof mine);
}

static int64_t total_bytes(const saving *s)
{
    int64_t total = 0;
    for (int r = 0; r < s->nranks; r++) {
        total += s->notes[r].bytes;
    }
    return total;
}

/* ---- files of ranks that do not see the directory ---- */

/* Rank 0's side of one file. */
typedef struct {
    char path[QS_CKPT_PATH + 80];
    int fd;
    uint8_t *piece;
} receiving;

static qs_status receive_begin(const saving *s, int from, receiving *in)
{
    char name[64];
    qs_ckpt_file_name(name, sizeof name, from);
    snprintf(in->path, sizeof in->path, "%s/%s", s->temp, name);
    in->piece = malloc(PIECE_BYTES);
    if (in->piece == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory for a piece of it", in->path);
    }
    QS_TRY(qs_io_create(in->path, &in->fd));
    return qs_io_reserve(in->fd, (size_t)s->notes[from].bytes, in->path);
}

/* What lies on the disk must be what the rank made. */
static qs_status receive_end(const saving *s, int from, receiving *in, qs_status st)
{
    qs_manifest_file found;
    const file_note *want = &s->notes[from];
    st = st == QS_OK ? qs_io_fsync(in->fd, in->path) : st;
    if (in->fd >= 0) {
        const qs_status closed = qs_io_close(in->fd, in->path);
        st = st == QS_OK ? closed : st;
    }
    free(in->piece);
    QS_TRY(st);
    QS_TRY(qs_manifest_hash_file(s->temp, strrchr(in->path, '/') + 1, &found));
    if (found.bytes != want->bytes || strcmp(found.sha256, want->sha256) != 0) {
        return QS_FAIL(QS_ERR_IO_VERIFY,
                       "%s: reads back differently from what rank %d sent; check the disk",
                       in->path, from);
    }
    return QS_OK;
}

/* The image of rank `from`, all ranks in step. */
static qs_status receive_file(saving *s, int from)
{
    const bool writer = s->rank == 0;
    const int64_t bytes = s->notes[from].bytes;
    receiving in = {.fd = -1};
    qs_status st = writer ? receive_begin(s, from, &in) : QS_OK;
    for (int64_t at = 0; at < bytes; at += PIECE_BYTES) {
        const size_t now = (size_t)(bytes - at < PIECE_BYTES ? bytes - at : PIECE_BYTES);
        const qs_relay_want want = {.from = from, .offset = at, .bytes = now, .to = in.piece};
        st = qs_relay(s->comm, st, PIECE_BYTES, &want, writer ? 1 : 0, qs_relay_read_memory,
                      s->image);
        if (st != QS_OK) {
            break;
        }
        st = writer ? qs_io_write_all(in.fd, in.piece, now, at, in.path) : QS_OK;
    }
    st = writer ? receive_end(s, from, &in, st) : st;
    return qs_comm_agree(s->comm, st);
}

static qs_status receive_files(saving *s)
{
    for (int r = 0; r < s->nranks; r++) {
        if (is_blind(s, r)) {
            QS_TRY(receive_file(s, r));
        }
    }
    return QS_OK;
}

/* ---- publishing ---- */

static qs_status publish(const saving *s)
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
        m.files[r].bytes = s->notes[r].bytes;
        memcpy(m.files[r].sha256, s->notes[r].sha256, sizeof m.files[r].sha256);
    }
    QS_GOTO(qs_manifest_write(s->temp, &m));
    QS_GOTO(qs_io_fsync_dir(s->temp));
    QS_GOTO(qs_io_rename(s->temp, s->final));
    QS_GOTO(qs_io_fsync_dir(s->run_dir));
done:
    qs_manifest_free(&m);
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
    QS_TRY(collect_notes(s));
    QS_TRY(qs_ckpt_find_blind(s->meta, s->comm, &s->blind));
    const bool writes = !is_blind(s, s->rank); /* each may see other limits */
    QS_TRY(qs_comm_agree(s->comm, writes ? check_room(s->run_dir, total_bytes(s)) : QS_OK));
    QS_TRY(qs_comm_agree(s->comm, s->rank == 0 ? make_temp(s) : QS_OK));
    QS_TRY(qs_comm_agree(s->comm, writes ? write_file(s) : QS_OK));
    QS_TRY(receive_files(s));
    return qs_comm_agree(s->comm, s->rank == 0 ? publish(s) : QS_OK);
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
    if (s.image != NULL) {
        qs_mem_note(QS_MEM_HOST, QS_MEM_OPTIM, -(ptrdiff_t)s.image_bytes);
    }
    free(s.image);
    free(s.notes);
    free(s.blind);
    if (st != QS_OK && s.made) {
        /* Ours alone, and all ranks are past their writes. What failed is what is reported. */
        (void)qs_manifest_remove_dir(s.temp);
    }
    return st;
}
