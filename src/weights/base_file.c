/* Reading base.h5. Rank 0 opens the file, checks the index, the places of all datasets and the hash
 * of hashes, and tells the others; from then on every rank preads what is its own and compares it
 * with the hash of each quantum. */
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
    free(index->config_text);
    free(index->source_path);
    free(index->quantizer);
    free(index->path);
    free(index);
}

/* ---- open on one process ---- */

static qs_status read_index_text(qs_h5 *file, char **text, size_t *bytes)
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

static qs_status locate(qs_h5 *file, qs_base_index *index)
{
    qs_status st = QS_OK;
    int fd = -1;
    QS_TRY(read_maps(file, index));
    for (int u = 0; u < index->n_units; u++) {
        QS_TRY(find_datasets(file, &index->units[u], "units/"));
    }
    QS_TRY(find_datasets(file, &index->final, ""));
    QS_TRY(open_for_reading(index->path, &fd));
    st = check_hash_of_hashes(index, fd);
    (void)close(fd); /* read only */
    return st;
}

/* The index, and its text for the other ranks. */
static qs_status open_with_text(qs_base_index **out, char **text, const char *path)
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
    QS_GOTO(read_index_text(file, text, &bytes));
    QS_GOTO(qs_base_index_parse(&index, *text, bytes, path));
    QS_GOTO(locate(file, index));
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
    qs_status st = open_with_text(out, &text, path);
    free(text);
    return st;
}

/* ---- open on all ranks ---- */

enum { PLACES = 6 };

static int64_t *const *places_of(qs_base_unit *unit, int64_t *at[PLACES])
{
    at[0] = &unit->packed_at;
    at[1] = &unit->absmax8_at;
    at[2] = &unit->absmax32_at;
    at[3] = &unit->raw_at;
    at[4] = &unit->small_at;
    at[5] = &unit->hash_at;
    return at;
}

static qs_base_unit *unit_or_final(qs_base_index *index, int u)
{
    return u < index->n_units ? &index->units[u] : &index->final;
}

/* The places of all datasets and the maps, from rank 0. Both sides have parsed the same text, so
 * the sizes agree. */
static qs_status share_places(qs_base_index *index, qs_comm *comm)
{
    qs_status st = QS_OK;
    int64_t *at[PLACES];
    int64_t n_maps = index->n_maps;
    size_t bytes = (size_t)(index->n_units + 1) * PLACES * sizeof(int64_t);
    int64_t *places = malloc(bytes);
    st =
        places == NULL ? QS_FAIL(QS_ERR_MEMORY, "%s: no memory for its index", index->path) : QS_OK;
    QS_GOTO(qs_comm_agree(comm, st));
    for (int u = 0; u <= index->n_units; u++) {
        places_of(unit_or_final(index, u), at);
        for (int i = 0; i < PLACES; i++) {
            places[u * PLACES + i] = *at[i];
        }
    }
    QS_GOTO(qs_comm_bcast(comm, places, bytes, 0));
    for (int u = 0; u <= index->n_units; u++) {
        places_of(unit_or_final(index, u), at);
        for (int i = 0; i < PLACES; i++) {
            *at[i] = places[u * PLACES + i];
        }
    }
    QS_GOTO(qs_comm_bcast(comm, &n_maps, sizeof n_maps, 0));
    if (index->maps == NULL) {
        st = QS_ALLOC(&index->maps, n_maps * 256, QS_MEM_BASE_SMALL);
    }
    QS_GOTO(qs_comm_agree(comm, st));
    index->n_maps = (int)n_maps;
    QS_GOTO(qs_comm_bcast(comm, index->maps, (size_t)n_maps * 256 * sizeof(float), 0));
done:
    free(places);
    return st;
}

qs_status qs_base_index_read(qs_base_index **out, const char *path, qs_comm *comm)
{
    qs_status st = QS_OK;
    qs_base_index *index = NULL;
    char *text = NULL;
    if (qs_comm_rank(comm) == 0) {
        st = open_with_text(&index, &text, path);
    }
    QS_GOTO(qs_comm_agree(comm, st));
    QS_GOTO(qs_comm_bcast_text(comm, &text, 0));
    if (index == NULL) {
        st = qs_base_index_parse(&index, text, strlen(text), path);
    }
    QS_GOTO(qs_comm_agree(comm, st));
    QS_GOTO(share_places(index, comm));
    *out = index;
    index = NULL;
done:
    free(text);
    qs_base_index_free(index);
    return st;
}

/* ---- look things up ---- */

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

/* ---- read ---- */

uint64_t qs_base_nf4_hash(const qs_unit_size *size, const uint8_t *packed, const uint8_t *absmax8,
                          const uint8_t *absmax32, int64_t i)
{
    size_t a8 = (size_t)size->absmax8_per_quantum;
    size_t a32 = (size_t)size->absmax32_per_quantum * sizeof(float);
    size_t at = (size_t)i;
    qs_piece pieces[3] = {{packed + at * QS_NF4_QUANTUM_PACKED_BYTES, QS_NF4_QUANTUM_PACKED_BYTES},
                          {a8 == 0 ? packed : absmax8 + at * a8, a8},
                          {absmax32 + at * a32, a32}};
    return qs_xxh3_64_pieces(pieces, 3);
}

/* The tensor that quantum `q` belongs to, for messages. */
static const char *owner_of(const qs_base_unit *unit, qs_tensor_kind kind, int64_t q)
{
    const char *name = "?";
    for (int i = 0; i < unit->n_tensors; i++) {
        if (unit->tensors[i].kind == kind && unit->tensors[i].quantum <= q) {
            name = unit->tensors[i].name;
        }
    }
    return name;
}

static qs_status hash_failed(const qs_base_index *index, const qs_base_unit *unit,
                             qs_tensor_kind kind, int64_t quantum)
{
    return QS_FAIL(QS_ERR_INPUT_HASH,
                   "%s: unit %s, %s quantum %lld (%s) does not match its hash; copy the file again",
                   index->path, unit->name, kind == QS_TENSOR_NF4 ? "NF4" : "raw",
                   (long long)quantum, owner_of(unit, kind, quantum));
}

typedef struct {
    int64_t begin, count;
} span;

static span share_of(int64_t total, int64_t per_rank, int rank)
{
    int64_t begin = rank * per_rank < total ? rank * per_rank : total;
    int64_t end = begin + per_rank < total ? begin + per_rank : total;
    return (span){begin, end - begin};
}

/* One section of a message: quanta [s.begin, +s.count) of `each` bytes from the dataset at `place`.
 */
static qs_status read_section(const qs_base_index *index, int fd, int64_t place, span s,
                              size_t each, uint8_t *out, uint64_t *bytes_read)
{
    size_t bytes = (size_t)s.count * each;
    if (bytes == 0) {
        return QS_OK;
    }
    *bytes_read += bytes;
    return qs_io_read_all(fd, out, bytes, place + s.begin * (int64_t)each, index->path);
}

/* \return the first quantum of `s` whose hash differs, -1 if there is none. One thread: XXH3 is as
 * fast as memory, and the other ranks of the host are doing the same. */
static int64_t first_wrong_nf4(const qs_unit_layout *l, const uint8_t *message, span s,
                               const uint64_t *want)
{
    for (int64_t i = 0; i < s.count; i++) {
        if (qs_base_nf4_hash(&l->size, message + l->packed_at, message + l->absmax8_at,
                             message + l->absmax32_at, i) != want[i]) {
            return s.begin + i;
        }
    }
    return -1;
}

static int64_t first_wrong_raw(const qs_unit_layout *l, const uint8_t *message, span s,
                               const uint64_t *want)
{
    size_t each = qs_raw_quantum_bytes(&l->size);
    for (int64_t i = 0; i < s.count; i++) {
        if (qs_xxh3_64(message + l->raw_at + (size_t)i * each, each) != want[i]) {
            return s.begin + i;
        }
    }
    return -1;
}

static qs_status not_finite(const qs_base_index *index, const qs_base_unit *unit,
                            const char *tensor, const char *dataset)
{
    return QS_FAIL(QS_ERR_INPUT_VALUE,
                   "%s: unit %s, tensor %s: a number in %s is not finite; quantize the model again",
                   index->path, unit->name, tensor, dataset);
}

/* A hash says that the bytes are those that were written, not that they were fit to be. */
static qs_status check_numbers(const qs_base_index *index, const qs_base_unit *unit,
                               const qs_unit_layout *l, const uint8_t *message, span nf4, span raw)
{
    int64_t floats = l->size.absmax32_per_quantum;
    for (int64_t i = 0; i < nf4.count; i++) {
        const uint8_t *absmax32 = message + l->absmax32_at + (size_t)(i * floats) * sizeof(float);
        if (!qs_all_finite(absmax32, QS_F32, floats)) {
            return not_finite(index, unit, owner_of(unit, QS_TENSOR_NF4, nf4.begin + i),
                              "absmax32");
        }
    }
    for (int64_t i = 0; i < raw.count; i++) {
        const uint8_t *quantum = message + l->raw_at + (size_t)i * qs_raw_quantum_bytes(&l->size);
        if (!qs_all_finite(quantum, l->size.raw_dtype, l->size.raw_quantum_elems)) {
            return not_finite(index, unit, owner_of(unit, QS_TENSOR_RAW, raw.begin + i), "raw");
        }
    }
    return QS_OK;
}

static qs_status verify_share(const qs_base_index *index, int fd, const qs_base_unit *unit,
                              const qs_unit_layout *l, const uint8_t *message, span nf4, span raw)
{
    qs_status st = QS_OK;
    size_t each = sizeof(uint64_t);
    uint64_t ignored = 0;
    span raw_hashes = {unit->size.nf4_quanta + raw.begin, raw.count};
    uint64_t *want = malloc((size_t)(nf4.count + raw.count) * each + 1);
    if (want == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory for hashes", index->path);
    }
    QS_GOTO(read_section(index, fd, unit->hash_at, nf4, each, (uint8_t *)want, &ignored));
    QS_GOTO(read_section(index, fd, unit->hash_at, raw_hashes, each, (uint8_t *)(want + nf4.count),
                         &ignored));
    int64_t wrong = first_wrong_nf4(l, message, nf4, want);
    if (wrong >= 0) {
        QS_GOTO(hash_failed(index, unit, QS_TENSOR_NF4, wrong));
    }
    wrong = first_wrong_raw(l, message, raw, want + nf4.count);
    if (wrong >= 0) {
        QS_GOTO(hash_failed(index, unit, QS_TENSOR_RAW, wrong));
    }
    QS_GOTO(check_numbers(index, unit, l, message, nf4, raw));
done:
    free(want);
    return st;
}

qs_status qs_base_read_share(const qs_base_index *index, int fd, int u, int rank, int nranks,
                             uint8_t *message, uint64_t *bytes_read)
{
    const qs_base_unit *unit = &index->units[u];
    const qs_unit_layout l = qs_unit_layout_make(&unit->size, nranks);
    span nf4 = share_of(unit->size.nf4_quanta, l.nf4_per_rank, rank);
    span raw = share_of(unit->size.raw_quanta, l.raw_per_rank, rank);
    size_t absmax32_bytes = (size_t)l.size.absmax32_per_quantum * sizeof(float);
    memset(message, 0, l.message_bytes); /* the padding is sent along: no stray bytes */
    QS_TRY(read_section(index, fd, unit->packed_at, nf4, QS_NF4_QUANTUM_PACKED_BYTES,
                        message + l.packed_at, bytes_read));
    QS_TRY(read_section(index, fd, unit->absmax8_at, nf4, (size_t)l.size.absmax8_per_quantum,
                        message + l.absmax8_at, bytes_read));
    QS_TRY(read_section(index, fd, unit->absmax32_at, nf4, absmax32_bytes, message + l.absmax32_at,
                        bytes_read));
    QS_TRY(read_section(index, fd, unit->raw_at, raw, qs_raw_quantum_bytes(&l.size),
                        message + l.raw_at, bytes_read));
    return verify_share(index, fd, unit, &l, message, nf4, raw);
}

qs_status qs_base_read_small(const qs_base_index *index, int fd, const qs_base_unit *unit,
                             uint8_t *small)
{
    size_t bytes = (size_t)unit->small_bytes;
    QS_TRY(bytes == 0 ? QS_OK : qs_io_read_all(fd, small, bytes, unit->small_at, index->path));
    if (qs_xxh3_64(small, bytes) != unit->small_xxh3) {
        return QS_FAIL(QS_ERR_INPUT_HASH,
                       "%s: unit %s, small tensors do not match their hash; copy the file again",
                       index->path, unit->name);
    }
    for (int i = 0; i < unit->n_tensors; i++) {
        const qs_base_tensor *t = &unit->tensors[i];
        if (t->kind == QS_TENSOR_SMALL &&
            !qs_all_finite(small + t->byte, t->dtype, qs_base_tensor_count(t))) {
            return not_finite(index, unit, t->name, "small");
        }
    }
    return QS_OK;
}

void qs_base_small_f32(const qs_base_tensor *tensor, const uint8_t *small, float *out)
{
    qs_f32_load(out, small + tensor->byte, tensor->dtype, qs_base_tensor_count(tensor));
}

/* ---- verify ---- */

/* A unit in pieces of about 64 MiB: the shares of as many imagined ranks. */
static qs_status verify_unit(const qs_base_index *index, int fd, int u)
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

qs_status qs_base_verify(const char *path)
{
    qs_status st = QS_OK;
    qs_base_index *index = NULL;
    int fd = -1;
    QS_GOTO(qs_base_open_local(&index, path));
    QS_GOTO(open_for_reading(path, &fd));
    for (int u = 0; u < index->n_units; u++) {
        QS_GOTO(verify_unit(index, fd, u));
        QS_GOTO(verify_small(index, fd, &index->units[u]));
    }
    QS_GOTO(verify_small(index, fd, &index->final));
done:
    if (fd >= 0) {
        (void)close(fd); /* read only */
    }
    qs_base_index_free(index);
    return st;
}
