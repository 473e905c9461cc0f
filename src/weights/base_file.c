/* Reading the index of base.h5 on one process: what it says, where the datasets lie, and whether
 * the hash of hashes is right. */
#include "weights/base_file.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/mem.h"
#include "store/h5.h"
#include "store/hash.h"
#include "store/io.h"
#include "weights/base_impl.h"

enum { MAX_INDEX_BYTES = 256 << 20, MAX_MAPS = 65536, VERIFY_BYTES = 64 << 20 };

static void free_unit(qs_base_unit *unit)
{
    for (int i = 0; i < unit->n_tensors; i++) {
        free(unit->tensors[i].name);
    }
    free(unit->tensors);
    free(unit->name);
}

void qs_base_index_free(qs_base_index *index)
{
    if (index == NULL) {
        return;
    }
    for (int u = 0; index->units != NULL && u < index->n_units; u++) {
        free_unit(&index->units[u]);
    }
    free_unit(&index->final);
    free(index->units);
    qs_mem_free(index->maps);
    qs_mem_free(index->small);
    free(index->config_text);
    free(index->source_path);
    free(index->quantizer);
    free(index->path);
    free(index);
}

/* ---- open on one process ---- */

qs_status qs_base_read_index_text(qs_h5 *file, char **text, size_t *bytes)
{
    qs_h5_info info = {.dtype = QS_U8, .rank = 1, .dims = {-1, 0}};
    QS_TRY(qs_h5_dataset_find(file, "index", &info));
    if (info.dims[0] < 2 || info.dims[0] > MAX_INDEX_BYTES) {
        return QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: the index has %lld bytes", qs_h5_path(file),
                       (long long)info.dims[0]);
    }
    *bytes = (size_t)info.dims[0];
    *text = calloc(*bytes + 1, 1);
    if (*text == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory for its index", qs_h5_path(file));
    }
    return qs_h5_dataset_get(file, "index", &info, 0, info.dims[0], *text);
}

/* The maps, and that tensors name rows of them. */
static qs_status read_maps(qs_h5 *file, qs_base_index *index)
{
    qs_h5_info info = {.dtype = QS_F32, .rank = 2, .dims = {-1, 256}};
    QS_TRY(qs_h5_dataset_find(file, "maps", &info));
    if (info.dims[0] < 1 || info.dims[0] > MAX_MAPS) {
        return QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: %lld maps", index->path, (long long)info.dims[0]);
    }
    index->n_maps = (int)info.dims[0];
    QS_TRY(QS_ALLOC(&index->maps, info.dims[0] * 256, QS_MEM_BASE_SMALL));
    QS_TRY(qs_h5_dataset_get(file, "maps", &info, 0, info.dims[0] * 256, index->maps));
    for (int64_t i = 0; i < info.dims[0] * 256; i++) {
        if (!isfinite(index->maps[i])) {
            return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: map %lld has an entry that is not finite",
                           index->path, (long long)(i / 256));
        }
    }
    for (int u = 0; u < index->n_units; u++) {
        for (int i = 0; i < index->units[u].n_tensors; i++) {
            if (index->units[u].tensors[i].map >= index->n_maps) {
                return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: tensor %s: map %d of %d", index->path,
                               index->units[u].tensors[i].name, index->units[u].tensors[i].map,
                               index->n_maps);
            }
        }
    }
    return QS_OK;
}

uint64_t qs_base_index_hash(const qs_base_index *index, const char *text, size_t bytes)
{
    const qs_piece pieces[] = {{text, bytes},
                               {index->maps, (size_t)index->n_maps * 256 * sizeof *index->maps}};
    return qs_xxh3_64_pieces(pieces, 2);
}

/* What says how the data are to be read, with numbers that enter every weight. Files of the first
 * versions carry no hash of it. */
static qs_status check_index_hash(qs_h5 *file, const qs_base_index *index, const char *text,
                                  size_t bytes)
{
    int64_t hash = 0;
    bool exists = false;
    QS_TRY(qs_h5_attr_exists(file, "index_xxh3", &exists));
    if (!exists) {
        return QS_OK;
    }
    QS_TRY(qs_h5_attr_get_i64(file, "index_xxh3", &hash));
    if ((uint64_t)hash != qs_base_index_hash(index, text, bytes)) {
        return QS_FAIL(QS_ERR_INPUT_HASH,
                       "%s: the index or the maps do not match index_xxh3; copy the file again",
                       index->path);
    }
    return QS_OK;
}

static qs_status find_datasets(qs_h5 *file, qs_base_unit *unit, const char *group)
{
    qs_base_dataset all[QS_BASE_DATASETS];
    qs_base_unit_datasets(unit, all);
    for (int i = 0; i < QS_BASE_DATASETS; i++) {
        char name[QS_BASE_NAME];
        if (all[i].info.dims[0] == 0) {
            continue;
        }
        (void)snprintf(name, sizeof name, "%s%s/%s", group, unit->name, all[i].suffix);
        QS_TRY(qs_h5_dataset_find(file, name, &all[i].info));
        *all[i].place = all[i].info.file_offset;
    }
    return QS_OK;
}

static qs_status open_for_reading(const char *path, int *fd)
{
    *fd = open(path, O_RDONLY | O_CLOEXEC);
    return *fd >= 0
               ? QS_OK
               : QS_FAIL(QS_ERR_INPUT_MISSING, "%s: opening failed: %s", path, strerror(errno));
}

static int64_t hash_count(const qs_base_unit *unit)
{
    return unit->size.nf4_quanta + unit->size.raw_quanta;
}

/* The hashes vouch for the data, this one for the hashes. */
static qs_status check_hash_of_hashes(const qs_base_index *index, int fd)
{
    qs_status st = QS_OK;
    char hex[QS_SHA256_HEX];
    qs_sha256 *sha = qs_sha256_begin();
    uint64_t *hashes = NULL;
    if (sha == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory for hashing", index->path);
    }
    for (int u = 0; u < index->n_units && st == QS_OK; u++) {
        const qs_base_unit *unit = &index->units[u];
        size_t bytes = (size_t)hash_count(unit) * sizeof *hashes;
        hashes = malloc(bytes + 1);
        st = hashes == NULL ? QS_FAIL(QS_ERR_MEMORY, "%s: no memory for hashes", index->path)
                            : qs_io_read_all(fd, hashes, bytes, unit->hash_at, index->path);
        if (st == QS_OK) {
            qs_sha256_add(sha, hashes, bytes);
        }
        free(hashes);
    }
    qs_sha256_end(sha, hex);
    if (st == QS_OK && strcmp(hex, index->hashes_sha256) != 0) {
        st = QS_FAIL(QS_ERR_INPUT_HASH,
                     "%s: the hashes do not match hashes_sha256 in the index; copy the file again",
                     index->path);
    }
    return st;
}

static qs_status locate(qs_h5 *file, qs_base_index *index, const char *text, size_t bytes)
{
    qs_status st = QS_OK;
    int fd = -1;
    QS_TRY(read_maps(file, index));
    QS_TRY(check_index_hash(file, index, text, bytes));
    for (int u = 0; u < index->n_units; u++) {
        QS_TRY(find_datasets(file, &index->units[u], "units/"));
    }
    QS_TRY(find_datasets(file, &index->final, ""));
    QS_TRY(open_for_reading(index->path, &fd));
    st = check_hash_of_hashes(index, fd);
    (void)close(fd); /* read only */
    return st;
}

qs_status qs_base_open_with_text(qs_base_index **out, char **text, const char *path)
{
    qs_status st = QS_OK;
    qs_h5 *file = NULL;
    qs_base_index *index = NULL;
    size_t bytes = 0;
    int64_t complete = 0;
    *text = NULL;
    QS_GOTO(qs_h5_open(&file, path));
    QS_GOTO(qs_h5_expect_format(file, "qshard-base", 1));
    QS_GOTO(qs_h5_attr_get_i64(file, "complete", &complete));
    if (complete != 1) {
        QS_GOTO(QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: complete = %lld; quantize the model again", path,
                        (long long)complete));
    }
    QS_GOTO(qs_base_read_index_text(file, text, &bytes));
    QS_GOTO(qs_base_index_parse(&index, *text, bytes, path));
    QS_GOTO(locate(file, index, *text, bytes));
    *out = index;
    index = NULL;
done:
    if (st != QS_OK) {
        free(*text);
        *text = NULL;
    }
    qs_base_index_free(index);
    (void)qs_h5_close(file); /* read only */
    return st;
}

qs_status qs_base_open_local(qs_base_index **out, const char *path)
{
    char *text = NULL;
    qs_status st = qs_base_open_with_text(out, &text, path);
    free(text);
    return st;
}

/* ---- look things up ---- */

qs_status qs_base_expect(const qs_base_index *index, const char *trained, const char *name)
{
    return strcmp(trained, index->hashes_sha256) == 0
               ? QS_OK
               : QS_FAIL(QS_ERR_INPUT_HASH,
                         "%s: was trained on a base with hash %.12s..., %s has %.12s...; give the "
                         "run's own base, or qshard export the adapter, and take that without its "
                         "qshard.json",
                         name, trained, index->path, index->hashes_sha256);
}

int qs_base_layer_unit(const qs_base_index *index, int layer)
{
    (void)index;
    return layer;
}

int qs_base_embed_chunks(const qs_base_index *index)
{
    int chunks = index->n_units - index->config.n_layers;
    return index->config.tied ? chunks : chunks / 2;
}

int qs_base_embed_unit(const qs_base_index *index, int chunk)
{
    return index->config.n_layers + chunk;
}

int qs_base_head_chunks(const qs_base_index *index)
{
    return qs_base_embed_chunks(index);
}

int qs_base_head_unit(const qs_base_index *index, int chunk)
{
    int first = index->config.n_layers + (index->config.tied ? 0 : qs_base_embed_chunks(index));
    return first + chunk;
}

const qs_base_tensor *qs_base_find(const qs_base_unit *unit, const char *suffix)
{
    size_t length = strlen(suffix);
    for (int i = 0; i < unit->n_tensors; i++) {
        const char *name = unit->tensors[i].name;
        if (strlen(name) >= length && strcmp(name + strlen(name) - length, suffix) == 0) {
            return &unit->tensors[i];
        }
    }
    return NULL;
}

qs_weight qs_base_weight(const qs_base_index *index, const qs_base_tensor *tensor)
{
    return (qs_weight){
        .kind = tensor->kind == QS_TENSOR_NF4 ? QS_WEIGHT_NF4 : QS_WEIGHT_RAW,
        .out = tensor->shape[0],
        .in = tensor->shape[1],
        .quantum = tensor->quantum,
        .dtype = tensor->dtype,
        .map = index->nested ? index->maps + (size_t)tensor->map * 256 : NULL,
        .offset = tensor->offset,
    };
}

void qs_base_small_f32(const qs_base_tensor *tensor, const uint8_t *small, float *out)
{
    qs_f32_load(out, small + tensor->byte, tensor->dtype, qs_base_tensor_count(tensor));
}

/* ---- verify ---- */

/* A unit in pieces of about 64 MiB: the shares of as many imagined ranks. */
static qs_status verify_quanta(const qs_base_index *index, int fd, int u)
{
    qs_status st = QS_OK;
    uint8_t *message = NULL;
    uint64_t ignored = 0;
    const qs_unit_size *size = &index->units[u].size;
    int pieces = 1 + (int)(qs_unit_layout_make(size, 1).message_bytes / VERIFY_BYTES);
    QS_TRY(QS_ALLOC(&message, qs_unit_layout_make(size, pieces).message_bytes, QS_MEM_WORK));
    for (int r = 0; r < pieces; r++) {
        QS_GOTO(qs_base_read_share(index, fd, u, r, pieces, message, &ignored));
    }
done:
    qs_mem_free(message);
    return st;
}

static qs_status verify_small(const qs_base_index *index, int fd, const qs_base_unit *unit)
{
    uint8_t *small = NULL;
    QS_TRY(QS_ALLOC(&small, unit->small_bytes + 1, QS_MEM_WORK));
    qs_status st = qs_base_read_small(index, fd, unit, small);
    qs_mem_free(small);
    return st;
}

qs_status qs_base_verify_unit(const qs_base_index *index, int fd, int u)
{
    QS_TRY(u < index->n_units ? verify_quanta(index, fd, u) : QS_OK);
    return verify_small(index, fd, u < index->n_units ? &index->units[u] : &index->final);
}

qs_status qs_base_verify(const char *path)
{
    qs_status st = QS_OK;
    qs_base_index *index = NULL;
    int fd = -1;
    QS_GOTO(qs_base_open_local(&index, path));
    QS_GOTO(open_for_reading(path, &fd));
    for (int u = 0; u <= index->n_units; u++) {
        QS_GOTO(qs_base_verify_unit(index, fd, u));
    }
done:
    if (fd >= 0) {
        (void)close(fd); /* read only */
    }
    qs_base_index_free(index);
    return st;
}
