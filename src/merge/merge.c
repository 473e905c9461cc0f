/* From the options to a directory: check that everything belongs together, decide which tensor goes
 * into which file, write file after file, look at the result as a reader will, and give it its
 * name. */
#include "merge/merge.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"
#include "base/mem.h"
#include "base/timer.h"
#include "merge/merge_impl.h"
#include "store/input.h"
#include "store/io.h"
#include "store/staged.h"

enum {
    PATH_ROOM = QS_PATH_MAX + 128,
    FILES_MAX = 4096,          /* what our own reader takes */
    METADATA_BYTES = 64 << 20, /* beside the tensors: headers, index, tokenizer */
};

const qs_base_unit *qs_merge_unit(const qs_merge_job *job, int u)
{
    return u < job->index->n_units ? &job->index->units[u] : &job->index->final;
}

int64_t qs_merge_bytes(const qs_merge_job *job, const qs_merge_tensor *t)
{
    return t->rows * t->columns * (int64_t)qs_dtype_bytes(job->dtype);
}

/* ---- what belongs together ---- */

static qs_status open_base(qs_merge_job *job)
{
    const bool of_run = job->options->vector != NULL;
    qs_comm *self = NULL;
    QS_TRY(qs_input_expect_here(of_run ? "base" : "--base", job->options->base,
                                of_run ? "--base says where it is now" : QS_INPUT_BASE));
    QS_TRY(qs_comm_self_create(&self));
    qs_status st = qs_base_index_read(&job->index, job->options->base, self);
    qs_comm_destroy(self);
    QS_TRY(st);
    job->fd = open(job->options->base, O_RDONLY | O_CLOEXEC);
    job->dtype = job->index->config.dtype;
    job->config_text = job->index->config_text;
    return job->fd >= 0 ? QS_OK
                        : QS_FAIL(QS_ERR_INPUT_MISSING, "%s: opening failed: %s",
                                  job->options->base, strerror(errno));
}

static qs_status open_adapter(qs_merge_job *job)
{
    const qs_merge_options *o = job->options;
    qs_config settings;
    if (o->vector == NULL) {
        memset(&settings, 0, sizeof settings);
        QS_TRY(qs_peft_settings(o->adapter, &settings));
        QS_TRY(qs_lora_layout_make(&job->layout, &job->index->config, &settings));
        QS_TRY(qs_peft_open(&job->peft, o->adapter, &job->layout));
        return qs_peft_expect_base(o->adapter, job->index->hashes_sha256, o->base);
    }
    job->layout = *o->layout;
    QS_TRY(qs_lora_layout_check(&job->layout, &job->index->config, o->adapter, o->base));
    return qs_base_expect(job->index, o->base_sha256, o->adapter);
}

/* ---- the list ---- */

/* A layer's linears come first, in the order of qs_linear. -1: this entry is none, or has no
 * adapter. */
static int adapted_linear(const qs_merge_job *job, int entry)
{
    const uint32_t linears = qs_linears(job->index->config.fused);
    for (int i = 0; i < QS_LINEAR_COUNT; i++) {
        if ((linears >> i & 1) && entry-- == 0) {
            return job->layout.targeted[i] ? i : -1;
        }
    }
    return -1;
}

static void add_tensor(qs_merge_job *job, int unit, int units, int entry)
{
    const qs_base_tensor *e = &qs_merge_unit(job, unit)->tensors[entry];
    qs_merge_tensor *t = &job->tensors[job->n_tensors++];
    *t = (qs_merge_tensor){.name = e->name,
                           .rank = e->rank,
                           .rows = e->rank == 2 ? e->shape[0] : 1,
                           .columns = e->rank == 2 ? e->shape[1] : e->shape[0],
                           .unit = unit,
                           .units = units,
                           .entry = entry,
                           .layer = unit,
                           .linear = -1};
    if (unit < job->index->config.n_layers) {
        t->linear = adapted_linear(job, entry);
    }
    if (units > 1) {
        t->rows = job->index->config.vocab;
    }
}

/* In the order of the model: embedding, layers, norm, head. */
static qs_status list_tensors(qs_merge_job *job)
{
    const qs_base_index *index = job->index;
    int chunks = qs_base_embed_chunks(index);
    int most = 3;
    for (int l = 0; l < index->config.n_layers; l++) {
        most += index->units[qs_base_layer_unit(index, l)].n_tensors;
    }
    job->tensors = calloc((size_t)most, sizeof *job->tensors);
    if (job->tensors == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory for the list of tensors", index->path);
    }
    add_tensor(job, qs_base_embed_unit(index, 0), chunks, 0);
    for (int l = 0; l < index->config.n_layers; l++) {
        int unit = qs_base_layer_unit(index, l);
        for (int i = 0; i < index->units[unit].n_tensors; i++) {
            add_tensor(job, unit, 1, i);
        }
    }
    add_tensor(job, index->n_units, 1, 0);
    if (!index->config.tied) {
        add_tensor(job, qs_base_head_unit(index, 0), chunks, 0);
    }
    return QS_OK;
}

/* A file is closed when the next tensor would make it larger than it may be. */
static qs_status assign_files(qs_merge_job *job)
{
    int64_t used = 0;
    job->n_files = 1;
    for (int i = 0; i < job->n_tensors; i++) {
        int64_t bytes = qs_merge_bytes(job, &job->tensors[i]);
        if (used > 0 && bytes > job->options->shard_bytes - used) {
            job->n_files++;
            used = 0;
        }
        used += bytes;
        job->bytes += bytes;
        job->tensors[i].file = job->n_files - 1;
    }
    if (job->n_files > FILES_MAX) {
        return QS_FAIL(QS_ERR_USAGE, "--shard-size: %d files would be made; at most %d are",
                       job->n_files, FILES_MAX);
    }
    return QS_OK;
}

/* ---- writing ---- */

static void start_items(const qs_merge_job *job, const qs_merge_tensor *first, int count,
                        qs_st_item *items)
{
    for (int i = 0; i < count; i++) {
        const qs_merge_tensor *t = &first[i];
        items[i] = (qs_st_item){.name = t->name, .dtype = job->dtype, .rank = t->rank};
        items[i].shape[0] = t->rank == 2 ? t->rows : t->columns;
        items[i].shape[1] = t->columns;
    }
}

/* Tensors [first, first + count) of the list are file number `file`. */
static qs_status write_file(qs_merge_job *job, const char *dir, int first, int count)
{
    qs_status st = QS_OK;
    char name[64], path[PATH_ROOM + 64];
    qs_st_writer *writer = NULL;
    qs_st_item *items = calloc((size_t)count, sizeof *items);
    qs_merge_file_name(job, job->tensors[first].file, name, sizeof name);
    snprintf(path, sizeof path, "%s/%s", dir, name);
    if (items == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory for its table", path);
    }
    start_items(job, job->tensors + first, count, items);
    QS_GOTO(qs_st_writer_open(&writer, path, items, count));
    for (int i = 0; i < count; i++) {
        const qs_merge_tensor *t = &job->tensors[first + i];
        QS_GOTO(qs_merge_write_tensor(job, t, writer, i));
        if (i + 1 == count || t[1].unit != t->unit) {
            qs_progress("merge", first + i + 1, job->n_tensors, qs_merge_unit(job, t->unit)->name);
        }
    }
    st = qs_st_writer_close(writer);
    writer = NULL;
done:
    qs_st_writer_abandon(writer);
    free(items);
    return st;
}

static qs_status write_weights(qs_merge_job *job, const char *dir)
{
    for (int first = 0; first < job->n_tensors;) {
        int end = first + 1;
        while (end < job->n_tensors && job->tensors[end].file == job->tensors[first].file) {
            end++;
        }
        QS_TRY(write_file(job, dir, first, end - first));
        first = end;
    }
    return job->n_files > 1 ? qs_merge_put_index(job, dir) : QS_OK;
}

/* What our own reader makes of it. */
static qs_status look_at(const qs_merge_job *job, const char *dir)
{
    qs_st_dir *found = NULL;
    QS_TRY(qs_st_open(&found, dir, "model"));
    int64_t count = qs_st_count(found);
    qs_st_close(found);
    return count == job->n_tensors ? QS_OK
                                   : QS_FAIL(QS_ERR_BUG, "%s: %lld of %d tensors were written", dir,
                                             (long long)count, job->n_tensors);
}

static qs_status fill_directory(qs_merge_job *job, const char *dir, qs_merge_report *report)
{
    QS_TRY(qs_merge_put_config(job, dir)); /* what may be refused, before the long work */
    QS_TRY(qs_merge_copy_companions(job, dir, report));
    QS_TRY(write_weights(job, dir));
    QS_TRY(look_at(job, dir));
    return qs_io_fsync_dir(dir);
}

/* ---- all of it ---- */

/* Where config.json does not say, the type that the embedding is stored in: what transformers takes
 * then. */
static qs_dtype choose_dtype(const qs_merge_job *job)
{
    const qs_merge_tensor *embedding = &job->tensors[0];
    qs_dtype stored = qs_merge_unit(job, embedding->unit)->tensors[0].dtype;
    if (embedding->original != NULL) {
        (void)qs_st_to_dtype(embedding->original->dtype, &stored);
    }
    if (job->options->dtype >= 0) {
        return (qs_dtype)job->options->dtype;
    }
    return qs_merge_names_dtype(job) ? job->dtype : stored;
}

static qs_status prepare(qs_merge_job *job)
{
    const qs_merge_options *o = job->options;
    QS_TRY(open_base(job));
    QS_TRY(open_adapter(job));
    QS_TRY(list_tensors(job));
    if (o->original != NULL) {
        QS_TRY(qs_merge_open_original(job));
    }
    job->dtype = choose_dtype(job);
    QS_TRY(assign_files(job));
    QS_TRY(qs_merge_buffers(job));
    return o->original != NULL ? qs_merge_check_original(job) : QS_OK;
}

static void cleanup(qs_merge_job *job)
{
    qs_merge_buffers_free(job);
    qs_peft_close(job->peft);
    qs_st_close(job->original);
    if (job->fd >= 0) {
        (void)close(job->fd); /* read only */
    }
    free(job->tensors);
    free(job->owned_text);
    qs_base_index_free(job->index);
}

static void fill_report(const qs_merge_job *job, double start, qs_merge_report *report)
{
    report->tensors = job->n_tensors;
    for (int i = 0; i < job->n_tensors; i++) {
        report->merged += job->tensors[i].linear >= 0;
    }
    report->files = job->n_files;
    report->bytes = job->bytes;
    report->dtype = job->dtype;
    report->seconds = qs_time_s() - start;
    report->peak_bytes = qs_mem_peak_rss_bytes();
}

static uint64_t bytes_needed(const qs_merge_job *job)
{
    return (uint64_t)job->bytes + (job->bytes < METADATA_BYTES ? 0 : METADATA_BYTES);
}

qs_status qs_merge(const qs_merge_options *options, qs_merge_report *report)
{
    qs_status st = QS_OK;
    qs_merge_job job = {.options = options, .fd = -1};
    qs_staged out;
    const double start = qs_time_s();
    memset(report, 0, sizeof *report);
    QS_TRY(qs_staged_name(&out, options->output, QS_MERGE_TEMPLATES));
    QS_GOTO(qs_staged_expect_free(&out)); /* before the work of preparing */
    QS_GOTO(prepare(&job));
    QS_GOTO(qs_staged_begin(&out, bytes_needed(&job)));
    QS_GOTO(qs_staged_make_dir(&out));
    st = fill_directory(&job, out.temp, report);
    qs_progress_end();
    QS_GOTO(st);
    QS_GOTO(qs_staged_publish(&out));
    fill_report(&job, start, report);
done:
    qs_staged_end(&out, st);
    cleanup(&job);
    return st;
}
