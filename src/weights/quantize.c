/* qshard quantize: the collective protocol around the units.
 *
 *   all  plan      every rank reads the headers and makes the same plan
 *   0    create    FILE.tmp-PID: datasets allocated, space reserved, norms and biases written
 *   all  write     each unit by one rank, synced and read back by it
 *   all  tell      hashes, offsets and counts of every unit, from its owner; close
 *   0    finish    hashes, maps, index, then `complete`; close, sync, read back, open as a reader
 *                  would
 *   0    verify    all data, where they came from several hosts
 *   0    rename    FILE.tmp-PID to FILE, and sync of the directory
 *
 * A dataset has one writer, and no page of the file holds bytes of two (store/h5.h): caches of
 * different hosts are not told of each other's writes by NFS, and write back whole pages. Where
 * pages are larger than 4,096 bytes, or a file system does worse, the verifying finds it.
 *
 * A failure anywhere is agreed on before the next step, and rank 0 removes the temporary file; so
 * it does at a signal that ends it (store/temp.h). */
#include "weights/quantize.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cores.h"
#include "base/log.h"
#include "base/mem.h"
#include "base/timer.h"
#include "store/hash.h"
#include "store/io.h"
#include "store/staged.h"
#include "weights/quantize_impl.h"

enum { METADATA_BYTES = 4 << 20, PAGE_BYTES = 4096 };

typedef struct {
    const qs_quantize_options *options;
    qs_comm *comm;
    qs_plan plan;
    int64_t *load;          /* [nranks] cost of what a rank has been given */
    int *owner;             /* [n_units + 1] the rank that writes the unit */
    qs_unit_result *result; /* [n_units + 1] */
    qs_staged out;          /* begun on rank 0, whose temporary name all have */
    qs_h5 *file;            /* rank 0 */
    int fd;
    int64_t zero_blocks;
} job;

static bool is_root(const job *j)
{
    return qs_comm_rank(j->comm) == 0;
}

static int n_units(const job *j)
{
    return j->plan.index->n_units;
}

/* ---- space ---- */

static int64_t dataset_bytes(const qs_h5_info *info)
{
    int64_t count = info->dims[0] * (info->rank == 2 ? info->dims[1] : 1);
    return count * (int64_t)qs_dtype_bytes(info->dtype);
}

/* A group and each dataset have a page of their own for what HDF5 keeps of them. */
static int64_t unit_bytes(qs_base_unit *unit)
{
    qs_base_dataset all[QS_BASE_DATASETS];
    int64_t bytes = PAGE_BYTES;
    qs_base_unit_datasets(unit, all);
    for (int i = 0; i < QS_BASE_DATASETS; i++) {
        bytes += dataset_bytes(&all[i].info) + PAGE_BYTES /* alignment */ + PAGE_BYTES;
    }
    return bytes;
}

static uint64_t bytes_needed(const job *j)
{
    int64_t needed = METADATA_BYTES;
    for (int u = 0; u <= n_units(j); u++) {
        needed += unit_bytes(qs_plan_unit(&j->plan, u));
    }
    return (uint64_t)needed;
}

/* ---- create ---- */

static void unit_dataset_name(char out[QS_BASE_NAME], const job *j, int u, const char *suffix)
{
    (void)snprintf(out, QS_BASE_NAME, "%s%s/%s", u < n_units(j) ? "units/" : "",
                   qs_plan_unit(&j->plan, u)->name, suffix);
}

/* Norms and biases are read, hashed and written at once. */
static qs_status put_small(job *j, int u, const char *name, qs_base_dataset *d)
{
    qs_base_unit *unit = qs_plan_unit(&j->plan, u);
    uint8_t *small = NULL;
    QS_TRY(QS_ALLOC(&small, unit->small_bytes, QS_MEM_WORK));
    qs_status st = qs_quantize_small(&j->plan, u, small);
    if (st == QS_OK) {
        unit->small_xxh3 = qs_xxh3_64(small, (size_t)unit->small_bytes);
        st = qs_h5_dataset_put(j->file, name, &d->info, small);
    }
    qs_mem_free(small);
    return st;
}

/* All datasets of a unit but `hash`, which is put when it is known. */
static qs_status create_unit(job *j, int u, int64_t *end)
{
    qs_base_dataset all[QS_BASE_DATASETS];
    qs_base_unit *unit = qs_plan_unit(&j->plan, u);
    qs_base_unit_datasets(unit, all);
    unit->small_xxh3 = qs_xxh3_64("", 0);
    for (int i = 0; i < QS_BASE_DATASETS - 1; i++) {
        char name[QS_BASE_NAME];
        if (all[i].info.dims[0] == 0) {
            continue;
        }
        unit_dataset_name(name, j, u, all[i].suffix);
        if (strcmp(all[i].suffix, "small") == 0) {
            QS_TRY(put_small(j, u, name, &all[i]));
        } else {
            QS_TRY(qs_h5_dataset_create(j->file, name, &all[i].info));
        }
        *all[i].place = all[i].info.file_offset;
        int64_t last = all[i].info.file_offset + dataset_bytes(&all[i].info);
        *end = last > *end ? last : *end;
    }
    return QS_OK;
}

static qs_status open_temp(job *j)
{
    j->fd = open(j->out.temp, O_RDWR | O_CLOEXEC);
    return j->fd >= 0 ? QS_OK
                      : QS_FAIL(QS_ERR_IO, "%s: opening failed: %s; do all hosts see it?",
                                j->out.temp, strerror(errno));
}

/* Rank 0: the file with everything allocated and room for it on the disk. */
static qs_status create_file(job *j)
{
    int64_t end = 0;
    QS_TRY(qs_staged_begin(&j->out, bytes_needed(j)));
    const qs_status st = qs_h5_create(&j->file, j->out.temp);
    if (st == QS_ERR_OUTPUT_TAKEN) { /* any other creation that failed may have left a file */
        qs_staged_disown(&j->out);
    }
    QS_TRY(st);
    QS_TRY(qs_h5_attr_put_text(j->file, "format", "qshard-base"));
    QS_TRY(qs_h5_attr_put_i64(j->file, "format_version", 1));
    for (int u = 0; u <= n_units(j); u++) {
        QS_TRY(create_unit(j, u, &end));
    }
    QS_TRY(open_temp(j));
    return qs_io_reserve(j->fd, (size_t)end, j->out.temp);
}

/* The name and the places, from rank 0. */
static qs_status share_places(job *j)
{
    enum { SHARED = 4 };
    qs_status st = QS_OK;
    size_t bytes = (size_t)(n_units(j) + 1) * SHARED * sizeof(int64_t);
    int64_t *places = malloc(bytes);
    st = places != NULL ? QS_OK : QS_FAIL(QS_ERR_MEMORY, "%s: no memory", j->options->output);
    QS_GOTO(qs_comm_agree(j->comm, st));
    QS_GOTO(qs_comm_bcast(j->comm, j->out.temp, sizeof j->out.temp, 0));
    for (int u = 0; u <= n_units(j); u++) {
        const qs_base_unit *unit = qs_plan_unit(&j->plan, u);
        int64_t at[SHARED] = {unit->packed_at, unit->absmax8_at, unit->absmax32_at, unit->raw_at};
        memcpy(places + u * SHARED, at, sizeof at);
    }
    QS_GOTO(qs_comm_bcast(j->comm, places, bytes, 0));
    for (int u = 0; u <= n_units(j); u++) {
        qs_base_unit *unit = qs_plan_unit(&j->plan, u);
        unit->packed_at = places[u * SHARED];
        unit->absmax8_at = places[u * SHARED + 1];
        unit->absmax32_at = places[u * SHARED + 2];
        unit->raw_at = places[u * SHARED + 3];
    }
    QS_GOTO(qs_comm_agree(j->comm, j->fd >= 0 ? QS_OK : open_temp(j)));
done:
    free(places);
    return st;
}

/* ---- write ---- */

/* Each unit to the rank with the least work so far. A raw byte costs a copy, a weight to be
 * quantized several. */
static void assign_owners(job *j)
{
    int nranks = qs_comm_nranks(j->comm);
    for (int u = 0; u <= n_units(j); u++) {
        const qs_unit_size *size = &qs_plan_unit(&j->plan, u)->size;
        int least = 0;
        for (int r = 1; r < nranks; r++) {
            least = j->load[r] < j->load[least] ? r : least;
        }
        j->owner[u] = least;
        j->load[least] += size->nf4_quanta * QS_NF4_QUANTUM * 4 +
                          size->raw_quanta * (int64_t)qs_raw_quantum_bytes(size) + 1;
    }
}

static qs_status write_units(job *j)
{
    qs_status st = QS_OK;
    int threads = qs_threads_for_rank(qs_comm_local_nranks(j->comm), qs_comm_local_rank(j->comm),
                                      j->options->threads);
    int64_t mine = 0;
    int64_t done = 0;
    qs_unit_batch *batch = NULL;
    for (int u = 0; u <= n_units(j); u++) {
        mine += j->owner[u] == qs_comm_rank(j->comm);
    }
    QS_GOTO(
        qs_unit_batch_begin(&batch, &j->plan, j->fd, j->out.temp, j->options->backend, threads));
    for (int u = 0; u <= n_units(j); u++) {
        if (j->owner[u] == qs_comm_rank(j->comm)) {
            QS_GOTO(qs_unit_batch_write(batch, u, &j->result[u]));
            qs_progress("quantize", ++done, mine, qs_plan_unit(&j->plan, u)->name);
        }
    }
    QS_GOTO(qs_unit_batch_check(batch));
done:
    qs_unit_batch_free(batch);
    return st;
}

/* What the owner of each unit found, to all ranks. */
static qs_status share_results(job *j)
{
    for (int u = 0; u <= n_units(j); u++) {
        const qs_base_unit *unit = qs_plan_unit(&j->plan, u);
        qs_unit_result *r = &j->result[u];
        size_t quanta = (size_t)(unit->size.nf4_quanta + unit->size.raw_quanta);
        size_t tensors = (size_t)unit->n_tensors;
        QS_TRY(qs_comm_bcast(j->comm, r->hash, quanta * sizeof *r->hash, j->owner[u]));
        QS_TRY(
            qs_comm_bcast(j->comm, r->source_hash, tensors * sizeof *r->source_hash, j->owner[u]));
        QS_TRY(qs_comm_bcast(j->comm, r->offset, tensors * sizeof *r->offset, j->owner[u]));
        QS_TRY(qs_comm_bcast(j->comm, &r->zero_blocks, sizeof r->zero_blocks, j->owner[u]));
        j->zero_blocks += r->zero_blocks;
    }
    return QS_OK;
}

/* What was written has been synced. Closing is what tells other hosts' clients of a network file
 * system to look anew. */
static qs_status close_data(job *j)
{
    int fd = j->fd;
    j->fd = -1;
    return qs_io_close(fd, j->out.temp);
}

/* ---- finish ---- */

static qs_status put_hashes(job *j)
{
    qs_status st = QS_OK;
    qs_base_dataset all[QS_BASE_DATASETS];
    qs_sha256 *sha = qs_sha256_begin();
    if (sha == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory for hashing", j->out.temp);
    }
    for (int u = 0; u < n_units(j) && st == QS_OK; u++) {
        char name[QS_BASE_NAME];
        qs_base_unit_datasets(qs_plan_unit(&j->plan, u), all);
        qs_h5_info *info = &all[QS_BASE_DATASETS - 1].info;
        unit_dataset_name(name, j, u, "hash");
        st = qs_h5_dataset_put(j->file, name, info, j->result[u].hash);
        qs_sha256_add(sha, j->result[u].hash, (size_t)dataset_bytes(info));
    }
    qs_sha256_end(sha, j->plan.index->hashes_sha256);
    return st;
}

static qs_status hash_sources(job *j)
{
    qs_sha256 *sha = qs_sha256_begin();
    if (sha == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory for hashing", j->out.temp);
    }
    for (int u = 0; u <= n_units(j); u++) {
        size_t tensors = (size_t)qs_plan_unit(&j->plan, u)->n_tensors;
        qs_sha256_add(sha, j->result[u].source_hash, tensors * sizeof *j->result[u].source_hash);
    }
    qs_sha256_end(sha, j->plan.index->source_sha256);
    return QS_OK;
}

static qs_status put_index(job *j)
{
    qs_base_index *index = j->plan.index;
    char *text = NULL;
    qs_h5_info maps = {.dtype = QS_F32, .rank = 2, .dims = {index->n_maps, 256}};
    for (int u = 0; u <= n_units(j); u++) {
        qs_base_unit *unit = qs_plan_unit(&j->plan, u);
        for (int i = 0; i < unit->n_tensors; i++) {
            unit->tensors[i].offset = j->result[u].offset[i];
        }
    }
    index->zero_blocks = j->zero_blocks;
    QS_TRY(qs_h5_dataset_put(j->file, "maps", &maps, index->maps));
    QS_TRY(qs_base_index_text(index, &text));
    qs_h5_info info = {.dtype = QS_U8, .rank = 1, .dims = {(int64_t)strlen(text), 0}};
    const int64_t hash = (int64_t)qs_base_index_hash(index, text, strlen(text));
    qs_status st = qs_h5_dataset_put(j->file, "index", &info, text);
    st = st == QS_OK ? qs_h5_attr_put_i64(j->file, "index_xxh3", hash) : st;
    free(text);
    return st;
}

static bool on_several_hosts(const job *j)
{
    return qs_comm_local_nranks(j->comm) < qs_comm_nranks(j->comm);
}

static qs_status overwritten(const job *j, const char *what, const char *name, qs_status st)
{
    if (st == QS_ERR_MEMORY) {
        return st;
    }
    const int error = qs_error_cause();
    qs_error_clear();
    if (error != 0) {
        return QS_FAIL(QS_ERR_IO_VERIFY, "%s: %s%s cannot be read back: %s", j->options->output,
                       what, name, strerror(error));
    }
    return QS_FAIL(QS_ERR_IO_VERIFY,
                   "%s: %s%s reads back differently from what was written: this file system may "
                   "lose what several hosts write to one file; run qshard quantize on one host, "
                   "or write to a local disk or another file system",
                   j->options->output, what, name);
}

/* Each rank has compared what it wrote with what its own host reads. What another host has written
 * over it shows only here, where the file is read by one that has none of it in its cache. */
static qs_status verify_data(const job *j, const qs_base_index *index)
{
    qs_status st = QS_OK;
    int fd = open(j->out.temp, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return QS_FAIL(QS_ERR_IO_VERIFY, "%s: cannot be read back: %s", j->out.temp,
                       strerror(errno));
    }
    (void)posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    for (int u = 0; u <= n_units(j) && st == QS_OK; u++) {
        const char *name = qs_plan_unit(&j->plan, u)->name;
        st = qs_base_verify_unit(index, fd, u);
        if (st == QS_OK) {
            qs_progress("verify", u + 1, n_units(j) + 1, name);
        } else {
            st = overwritten(j, "unit ", name, st);
        }
    }
    qs_progress_end();
    (void)close(fd); /* read only */
    return st;
}

/* On one host there is one cache, and its ranks have read it. */
static qs_status look_as_reader(const job *j)
{
    qs_base_index *index = NULL;
    qs_status st = qs_base_open_local(&index, j->out.temp);
    if (on_several_hosts(j)) {
        st = st == QS_OK ? verify_data(j, index) : overwritten(j, "the index", "", st);
    }
    qs_base_index_free(index);
    return st;
}

/* Rank 0: complete the file, look at it as a reader will, and give it its name. */
static qs_status finish_file(job *j)
{
    QS_TRY(put_hashes(j));
    QS_TRY(hash_sources(j));
    QS_TRY(put_index(j));
    QS_TRY(qs_h5_attr_put_i64(j->file, "complete", 1));
    qs_h5 *file = j->file;
    j->file = NULL;
    QS_TRY(qs_h5_close(file));
    QS_TRY(look_as_reader(j));
    return qs_staged_publish(&j->out);
}

/* ---- all of it ---- */

static qs_status alloc_results(job *j)
{
    size_t units = (size_t)n_units(j) + 1;
    j->load = calloc((size_t)qs_comm_nranks(j->comm), sizeof *j->load);
    j->owner = calloc(units, sizeof *j->owner);
    j->result = calloc(units, sizeof *j->result);
    if (j->load == NULL || j->owner == NULL || j->result == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory for the plan", j->options->output);
    }
    for (int u = 0; u <= n_units(j); u++) {
        QS_TRY(qs_unit_result_alloc(&j->result[u], qs_plan_unit(&j->plan, u)));
    }
    return QS_OK;
}

static qs_status prepare(job *j)
{
    const qs_quantize_options *o = j->options;
    int64_t rows = o->head_chunk_rows == 0 ? QS_DEFAULT_CHUNK_ROWS : o->head_chunk_rows;
    if (rows < 1 || rows > 1 << 22) {
        return QS_FAIL(QS_ERR_USAGE, "head_chunk_rows = %lld is outside 1 ... %d", (long long)rows,
                       1 << 22);
    }
    QS_TRY(qs_staged_name(&j->out, o->output, NULL));
    QS_TRY(qs_plan_make(&j->plan, o->hf_dir, rows, o->double_quant));
    QS_TRY(is_root(j) ? qs_plan_hash_tokenizer(&j->plan, o->hf_dir) : QS_OK);
    return alloc_results(j);
}

static qs_status run(job *j)
{
    QS_TRY(qs_comm_agree(j->comm, prepare(j)));
    QS_TRY(qs_comm_agree(j->comm, is_root(j) ? create_file(j) : QS_OK));
    QS_TRY(share_places(j));
    assign_owners(j);
    qs_status st = write_units(j);
    qs_progress_end();
    QS_TRY(qs_comm_agree(j->comm, st));
    QS_TRY(share_results(j));
    QS_TRY(qs_comm_agree(j->comm, close_data(j)));
    return qs_comm_agree(j->comm, is_root(j) ? finish_file(j) : QS_OK);
}

static void cleanup(job *j, qs_status st)
{
    qs_h5_discard(j->file); /* open only after a failure */
    qs_staged_end(&j->out, st);
    if (j->fd >= 0) {
        (void)close(j->fd); /* after a failure */
    }
    for (int u = 0; j->result != NULL && u <= n_units(j); u++) {
        qs_unit_result_free(&j->result[u]);
    }
    free(j->result);
    free(j->owner);
    free(j->load);
    if (j->plan.index != NULL) {
        qs_plan_free(&j->plan);
    }
}

static qs_status fill_report(const job *j, double start, qs_quantize_report *report)
{
    struct stat info = {0};
    int64_t peak = (int64_t)qs_mem_peak_rss_bytes();
    QS_TRY(qs_comm_max_i64(j->comm, &peak, 1));
    (void)stat(j->out.place, &info);
    *report = (qs_quantize_report){.linears = j->plan.linears,
                                   .zero_blocks = j->zero_blocks,
                                   .source_bytes = j->plan.source_bytes,
                                   .output_bytes = info.st_size,
                                   .seconds = qs_time_s() - start,
                                   .peak_bytes = (size_t)peak};
    return QS_OK;
}

qs_status qs_quantize(const qs_quantize_options *options, qs_comm *comm, qs_quantize_report *report)
{
    job j = {.options = options, .comm = comm, .fd = -1};
    double start = qs_time_s();
    qs_status st = run(&j);
    if (st == QS_OK) {
        st = fill_report(&j, start, report);
    }
    cleanup(&j, st);
    return st;
}
