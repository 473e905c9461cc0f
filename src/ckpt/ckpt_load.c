/* Loading. Files hold shards of the LoRA vector for as many ranks as saved it; a rank reads the
 * pieces of its own share out of them, whatever the two rank counts are. Every file that a rank
 * reads is hashed by it before anything is taken out. For ranks that do not see the run directory
 * rank 0 reads, one share at a time. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "ckpt/ckpt_impl.h"
#include "store/h5.h"
#include "store/hash.h"
#include "store/relay.h"

/* One saved checkpoint, seen through its manifest. */
typedef struct {
    char dir[QS_CKPT_PATH];
    qs_manifest manifest;
    qs_ckpt_record record;
    const qs_lora_layout *layout;
} source;

static void source_close(source *s)
{
    qs_manifest_free(&s->manifest);
    qs_ckpt_record_free(&s->record);
}

/* rank-R.h5 must be file R: what a save writes, and what `add_pieces` relies on. */
static qs_status check_names(const source *s)
{
    if (s->manifest.n_files != s->manifest.nranks) {
        return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: %d files for %d ranks", s->dir, s->manifest.n_files,
                       s->manifest.nranks);
    }
    for (int r = 0; r < s->manifest.nranks; r++) {
        char name[64];
        qs_ckpt_file_name(name, sizeof name, r);
        if (strcmp(s->manifest.files[r].name, name) != 0) {
            return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: file %d is called %s, expected %s", s->dir, r,
                           s->manifest.files[r].name, name);
        }
    }
    return QS_OK;
}

static qs_status source_open(source *s, const char *dir)
{
    memset(s, 0, sizeof *s);
    snprintf(s->dir, sizeof s->dir, "%s", dir);
    QS_TRY(qs_manifest_read(dir, &s->manifest));
    qs_status st = check_names(s);
    st = st == QS_OK ? qs_ckpt_record_parse(&s->record, s->manifest.meta_json, dir) : st;
    if (st != QS_OK) {
        source_close(s);
    }
    return st;
}

/* ---- one file ---- */

static qs_status check_hash(const source *s, int r)
{
    qs_manifest_file found;
    const qs_manifest_file *want = &s->manifest.files[r];
    QS_TRY(qs_manifest_hash_file(s->dir, want->name, &found));
    if (found.bytes != want->bytes || strcmp(found.sha256, want->sha256) != 0) {
        return QS_FAIL(QS_ERR_INPUT_HASH,
                       "%s/%s: its size or sha256 is not the manifest's; the file is damaged",
                       s->dir, want->name);
    }
    return QS_OK;
}

static qs_status check_attribute(qs_h5 *file, const char *name, int64_t want)
{
    int64_t found = 0;
    QS_TRY(qs_h5_attr_get_i64(file, name, &found));
    if (found != want) {
        return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: %s=%" PRId64 ", but the manifest says %" PRId64,
                       qs_h5_path(file), name, found, want);
    }
    return QS_OK;
}

static qs_status file_open(const source *s, int r, qs_h5 **out)
{
    char path[QS_CKPT_PATH + 80];
    QS_TRY(check_hash(s, r));
    snprintf(path, sizeof path, "%s/%s", s->dir, s->manifest.files[r].name);
    QS_TRY(qs_h5_open(out, path));
    qs_status st = qs_h5_expect_format(*out, "qshard-ckpt", 1);
    st = st == QS_OK ? check_attribute(*out, "step", s->manifest.step) : st;
    st = st == QS_OK ? check_attribute(*out, "rank", r) : st;
    st = st == QS_OK ? check_attribute(*out, "nranks", s->manifest.nranks) : st;
    if (st != QS_OK) {
        (void)qs_h5_close(*out);
        *out = NULL;
    }
    return st;
}

/* Where a share of each layer goes: elements [want.begin, want.end) of layer l at
 * out + l * stride. */
typedef struct {
    qs_range want;
    float *out;
    int64_t stride;
} target;

/* Copy what saver r has of the wanted elements. In its file layer l starts at l * its width. */
static qs_status read_pieces(const source *s, qs_h5 *file, int r, const char *name,
                             const target *to)
{
    int64_t width = qs_lora_shard_width(s->layout, s->manifest.nranks);
    qs_range has = qs_lora_shard(s->layout, r, s->manifest.nranks);
    int64_t begin = has.begin > to->want.begin ? has.begin : to->want.begin;
    int64_t end = has.end < to->want.end ? has.end : to->want.end;
    qs_h5_info info = {.dtype = QS_F32, .rank = 1, .dims = {s->layout->n_layers * width, 0}};
    QS_TRY(qs_h5_dataset_find(file, name, &info));
    for (int layer = 0; layer < s->layout->n_layers && begin < end; layer++) {
        float *out = to->out + layer * to->stride + begin - to->want.begin;
        QS_TRY(qs_h5_dataset_get(file, name, &info, layer * width + begin - has.begin, end - begin,
                                 out));
        if (!qs_all_finite(out, QS_F32, end - begin)) {
            return QS_FAIL(QS_ERR_INPUT_VALUE,
                           "%s: dataset \"%s\": a number of layer %d is not finite",
                           qs_h5_path(file), name, layer);
        }
    }
    return QS_OK;
}

static bool overlaps(const source *s, int r, qs_range want)
{
    qs_range has = qs_lora_shard(s->layout, r, s->manifest.nranks);
    return has.begin < want.end && want.begin < has.end;
}

static qs_status read_state(const source *s, const char *const *names, const target *targets,
                            int count)
{
    for (int r = 0; r < s->manifest.nranks; r++) {
        if (!overlaps(s, r, targets[0].want)) {
            continue;
        }
        qs_h5 *file = NULL;
        QS_TRY(file_open(s, r, &file));
        qs_status st = QS_OK;
        for (int i = 0; i < count && st == QS_OK; i++) {
            st = read_pieces(s, file, r, names[i], &targets[i]);
        }
        qs_status closed = qs_h5_close(file);
        QS_TRY(st != QS_OK ? st : closed);
    }
    return QS_OK;
}

/* ---- is it this run's? ---- */

static qs_status differ(const source *s, const char *what, const char *then, const char *now)
{
    return QS_FAIL(QS_ERR_RESUME,
                   "%s: was saved with another %s (then and now: %.64s and %.64s); resume with "
                   "the old one, or choose another output",
                   s->dir, what, then, now);
}

static qs_status compare_configs(const source *s, const char *now_yaml)
{
    qs_config *both = calloc(2, sizeof *both);
    if (!both) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory", s->dir);
    }
    char subject[QS_CKPT_PATH + 16];
    const char *then_yaml = s->record.config_yaml;
    qs_status st = qs_config_parse(&both[0], then_yaml, strlen(then_yaml), s->dir, NULL, 0);
    if (st == QS_OK) {
        st = qs_config_parse(&both[1], now_yaml, strlen(now_yaml), "configuration", NULL, 0);
    }
    if (st == QS_OK) {
        snprintf(subject, sizeof subject, "%s: was saved", s->dir);
        st = qs_ckpt_compare_configs(&both[0], &both[1], s->manifest.step, subject);
    }
    free(both);
    return st;
}

static qs_status compare(const source *s, const qs_ckpt_meta *expect)
{
    const qs_lora_layout *l = s->layout;
    QS_TRY(compare_configs(s, expect->config_yaml));
    if (strcmp(s->record.base_sha256, expect->base_sha256) != 0) {
        return differ(s, "base", s->record.base_sha256, expect->base_sha256);
    }
    if (strcmp(s->record.data_content, expect->data_content) != 0) {
        return differ(s, "data.train", s->record.data_content, expect->data_content);
    }
    if (s->record.data_layout[0] != '\0' &&
        strcmp(s->record.data_layout, expect->data_layout) != 0) {
        return differ(s, "data.train: its labels or the borders of its sequences",
                      s->record.data_layout, expect->data_layout);
    }
    bool same = s->record.n_layers == l->n_layers &&
                memcmp(s->record.out, l->out, sizeof l->out) == 0 &&
                memcmp(s->record.in, l->in, sizeof l->in) == 0;
    return same ? QS_OK : differ(s, "model", "other shapes", "these");
}

/* ---- entry points ---- */

enum { TENSORS = 3 }; /* lora, m, v */
static const char *const tensor_names[TENSORS] = {"lora", "m", "v"};
static const size_t PIECE_BYTES = 8 << 20; /* of a state on its way to another rank */

/* The state of one rank's share; padding is zero. parts[i]: [n_layers * width]. */
static qs_status read_share(const source *s, int rank, int nranks, float *const parts[TENSORS])
{
    target targets[TENSORS];
    const int64_t width = qs_lora_shard_width(s->layout, nranks);
    const size_t bytes = (size_t)(s->layout->n_layers * width) * sizeof(float);
    for (int i = 0; i < TENSORS; i++) {
        memset(parts[i], 0, bytes);
        targets[i] = (target){
            .want = qs_lora_shard(s->layout, rank, nranks), .out = parts[i], .stride = width};
    }
    return read_state(s, tensor_names, targets, TENSORS);
}

static void fill_meta(const source *s, qs_ckpt_meta *out)
{
    *out = (qs_ckpt_meta){.step = s->manifest.step, .tokens_seen = s->record.tokens_seen};
    snprintf(out->run_id, sizeof out->run_id, "%s", s->manifest.run_id);
    snprintf(out->device, sizeof out->device, "%s", s->record.device);
    memcpy(out->base_sha256, s->record.base_sha256, sizeof out->base_sha256);
    memcpy(out->data_content, s->record.data_content, sizeof out->data_content);
    memcpy(out->data_layout, s->record.data_layout, sizeof out->data_layout);
}

/* What a rank that sees the directory does for itself. */
static qs_status load_here(source *s, const qs_ckpt_meta *expect, float *const parts[TENSORS],
                           qs_ckpt_meta *meta_out, qs_comm *comm)
{
    QS_TRY(compare(s, expect));
    QS_TRY(read_share(s, qs_comm_rank(comm), qs_comm_nranks(comm), parts));
    fill_meta(s, meta_out);
    return QS_OK;
}

/* Rank 0 reads the share of rank `to` into one buffer and sends it. `s` counts on rank 0. */
static qs_status send_share(const source *s, int to, float *const parts[TENSORS], int64_t count,
                            qs_comm *comm)
{
    const int rank = qs_comm_rank(comm);
    const size_t bytes = (size_t)count * sizeof(float);
    qs_relay_want wants[TENSORS];
    float *buffer = NULL;
    qs_status st = QS_OK;
    if (rank == 0) {
        st = QS_ALLOC(&buffer, TENSORS * count, QS_MEM_WORK);
        if (st == QS_OK) {
            float *const theirs[TENSORS] = {buffer, buffer + count, buffer + 2 * count};
            st = read_share(s, to, qs_comm_nranks(comm), theirs);
        }
    }
    for (int i = 0; i < TENSORS; i++) {
        wants[i] = (qs_relay_want){
            .from = 0, .offset = (int64_t)(bytes * (size_t)i), .bytes = bytes, .to = parts[i]};
    }
    st = qs_relay(comm, st, PIECE_BYTES, wants, rank == to ? TENSORS : 0, qs_relay_read_memory,
                  buffer);
    qs_mem_free(buffer);
    return st;
}

/* What rank 0 has loaded beside the tensors, and the tensors of those that cannot. */
static qs_status send_to_blind(const source *s, const bool *blind, float *const parts[TENSORS],
                               int64_t count, qs_ckpt_meta *meta, qs_comm *comm)
{
    QS_TRY(qs_comm_bcast(comm, meta, sizeof *meta, 0));
    for (int r = 0; r < qs_comm_nranks(comm); r++) {
        if (blind[r]) {
            QS_TRY(send_share(s, r, parts, count, comm));
        }
    }
    return QS_OK;
}

qs_status qs_ckpt_load(const char *run_dir, int64_t step, const qs_ckpt_meta *expect,
                       const qs_lora_layout *layout, qs_optim *optim, qs_ckpt_meta *meta_out,
                       qs_comm *comm)
{
    char dir[QS_CKPT_PATH];
    source s;
    bool *blind = NULL;
    bool open = false;
    qs_status st = QS_OK;
    float *const parts[TENSORS] = {optim->master, optim->m, optim->v};
    qs_manifest_step_dir(dir, sizeof dir, run_dir, step);
    memset(meta_out, 0, sizeof *meta_out);
    QS_GOTO(qs_ckpt_find_blind(expect, comm, &blind));
    if (blind == NULL || !blind[qs_comm_rank(comm)]) {
        st = source_open(&s, dir);
        open = st == QS_OK;
        s.layout = layout;
        st = open ? load_here(&s, expect, parts, meta_out, comm) : st;
    }
    QS_GOTO(qs_comm_agree(comm, st));
    if (blind != NULL) {
        QS_GOTO(send_to_blind(&s, blind, parts, optim->count, meta_out, comm));
    }
    optim->step = meta_out->step;
done:
    if (open) {
        source_close(&s);
    }
    free(blind);
    return st;
}

/* The chat template changes hands. */
static void take_origin(qs_ckpt_record *record, qs_ckpt_origin *out)
{
    memcpy(out->base_sha256, record->base_sha256, sizeof out->base_sha256);
    out->chat_template = record->chat_template;
    record->chat_template = NULL;
}

qs_status qs_ckpt_read_lora(const char *step_dir, qs_config *cfg, qs_lora_layout *layout,
                            float **vector, qs_ckpt_origin *origin)
{
    static const char *const names[] = {"lora"};
    source s;
    *vector = NULL;
    QS_TRY(source_open(&s, step_dir));
    qs_status st = QS_OK;
    const char *yaml = s.record.config_yaml;
    QS_GOTO(qs_config_parse(cfg, yaml, strlen(yaml), step_dir, NULL, 0));
    QS_GOTO(qs_lora_layout_of_shapes(layout, s.record.n_layers, s.record.out, s.record.in, cfg));
    layout->naming = s.record.naming;
    QS_GOTO(QS_ALLOC(vector, layout->n_layers * layout->per_layer, QS_MEM_LORA));
    s.layout = layout;
    target to = {.want = {0, layout->per_layer}, .out = *vector, .stride = layout->per_layer};
    QS_GOTO(read_state(&s, names, &to, 1));
    if (origin != NULL) {
        take_origin(&s.record, origin);
    }
done:
    if (st != QS_OK) {
        qs_mem_free(*vector);
        *vector = NULL;
    }
    source_close(&s);
    return st;
}
