/* The work on units: read pieces of the source, quantize or copy them, write them, and read all
 * of it back.
 *
 * A tensor is never in memory as a whole. The first level goes piece by piece; the second level
 * needs the mean of all first-level absmax, which the encoder keeps (1/16 byte per weight, for one
 * tensor). What has been written is synced and read back from the file, many units at a time where
 * they are small; the hash of a quantum is taken from the bytes read back, after they have matched
 * what was written. */
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "store/hash.h"
#include "store/io.h"
#include "weights/quantize_impl.h"

enum { BATCH_BYTES = 256 << 20 };

typedef struct {
    const qs_plan *plan;
    const qs_base_unit *unit;
    const qs_source *sources; /* [n_tensors] */
    qs_unit_result *result;
    int fd;
    const char *path;
    qs_encoder *encoder;   /* the batch's; its buffers on the host: */
    uint8_t *piece;        /* source bytes, or bytes read back */
    uint8_t *packed;       /* [QS_PIECE_QUANTA, 8192] */
    uint8_t *absmax8;      /* of the whole unit, as in the file */
    float *absmax32;       /* likewise */
    uint64_t *packed_hash; /* [nf4_quanta] of the packed bytes alone */
} worker;

struct qs_unit_batch {
    const qs_plan *plan;
    int fd;
    const char *path;
    qs_encoder encoder;
    worker *written; /* [n_written] not yet read back */
    int n_written, capacity;
    int64_t bytes;
};

qs_status qs_unit_result_alloc(qs_unit_result *out, const qs_base_unit *unit)
{
    size_t quanta = (size_t)(unit->size.nf4_quanta + unit->size.raw_quanta);
    size_t tensors = (size_t)unit->n_tensors;
    out->hash = calloc(quanta + 1, sizeof *out->hash);
    out->source_hash = calloc(tensors + 1, sizeof *out->source_hash);
    out->offset = calloc(tensors + 1, sizeof *out->offset);
    return out->hash != NULL && out->source_hash != NULL && out->offset != NULL
               ? QS_OK
               : QS_FAIL(QS_ERR_MEMORY, "unit %s: no memory for its hashes", unit->name);
}

void qs_unit_result_free(qs_unit_result *result)
{
    free(result->hash);
    free(result->source_hash);
    free(result->offset);
    *result = (qs_unit_result){0};
}

/* Chain the hash of one more piece onto the tensor's source hash. Pieces are a function of the
 * shape alone. */
static void note_source(worker *w, int i, const void *data, size_t bytes)
{
    uint64_t piece = qs_xxh3_64(data, bytes);
    qs_piece chain[2] = {{&w->result->source_hash[i], sizeof piece}, {&piece, sizeof piece}};
    w->result->source_hash[i] = qs_xxh3_64_pieces(chain, 2);
}

static qs_status read_source(worker *w, int i, const qs_st_tensor *tensor, int64_t first,
                             int64_t bytes, void *out)
{
    QS_TRY(qs_st_read(w->plan->dir, tensor, first, bytes, out));
    note_source(w, i, out, (size_t)bytes);
    return QS_OK;
}

static qs_status weight_not_finite(const worker *w, int i, int64_t first, int64_t count)
{
    return QS_FAIL(QS_ERR_INPUT_VALUE,
                   "%s: tensor %s: a weight among elements %lld ... %lld is not finite",
                   qs_st_path(w->plan->dir), w->unit->tensors[i].name, (long long)first,
                   (long long)(first + count - 1));
}

/* ---- NF4 from floats ---- */

/* The packed bytes of `n` quanta in w->packed, to the file; `first` counts within the unit. */
static qs_status write_packed(worker *w, int64_t first, int64_t n)
{
    const int64_t each = QS_NF4_QUANTUM_PACKED_BYTES;
    for (int64_t q = 0; q < n; q++) {
        w->packed_hash[first + q] = qs_xxh3_64(w->packed + q * each, (size_t)each);
    }
    return qs_io_write_all(w->fd, w->packed, (size_t)(n * each), w->unit->packed_at + first * each,
                           w->path);
}

/* First level of elements [first, first + count), at most one piece. */
static qs_status quantize_piece(worker *w, int i, int64_t first, int64_t count)
{
    const qs_base_tensor *t = &w->unit->tensors[i];
    const int64_t size = (int64_t)qs_dtype_bytes(t->dtype);
    int64_t zero_blocks = 0;
    bool finite = false;
    QS_TRY(read_source(w, i, w->sources[i].data, first * size, count * size, w->piece));
    QS_TRY(qs_encoder_piece(w->encoder, t->dtype, first, count, &zero_blocks, &finite));
    if (!finite) {
        return weight_not_finite(w, i, first, count);
    }
    w->result->zero_blocks += zero_blocks;
    return write_packed(w, t->quantum + first / QS_NF4_QUANTUM, qs_nf4_quanta(count));
}

/* Second level of a whole tensor, or the copy of the first where there is none. */
static qs_status finish_absmax(worker *w, int i, int64_t blocks)
{
    const qs_base_tensor *t = &w->unit->tensors[i];
    if (!w->plan->index->nested) {
        memcpy(w->absmax32 + t->quantum * QS_NF4_QUANTUM_BLOCKS, w->encoder->absmax.host,
               (size_t)blocks * sizeof(float));
        return QS_OK;
    }
    return qs_encoder_finish(w->encoder, blocks, &w->result->offset[i],
                             w->absmax8 + t->quantum * QS_NF4_QUANTUM_BLOCKS,
                             w->absmax32 + t->quantum);
}

static qs_status quantize_tensor(worker *w, int i)
{
    const int64_t count = qs_base_tensor_count(&w->unit->tensors[i]);
    const int64_t piece = (int64_t)QS_PIECE_QUANTA * QS_NF4_QUANTUM;
    for (int64_t first = 0; first < count; first += piece) {
        QS_TRY(quantize_piece(w, i, first, count - first < piece ? count - first : piece));
    }
    return finish_absmax(w, i, (count + QS_NF4_BLOCK - 1) / QS_NF4_BLOCK);
}

/* ---- NF4 from bitsandbytes ---- */

static qs_status import_absmax(worker *w, int i)
{
    const qs_base_tensor *t = &w->unit->tensors[i];
    const qs_source *s = &w->sources[i];
    int64_t q = t->quantum;
    int64_t floats;
    float *absmax32;
    if (s->nested_absmax != NULL) {
        QS_TRY(read_source(w, i, s->absmax, 0, s->absmax->bytes,
                           w->absmax8 + q * QS_NF4_QUANTUM_BLOCKS));
        absmax32 = w->absmax32 + q;
        floats = s->nested_absmax->count;
        QS_TRY(read_source(w, i, s->nested_absmax, 0, s->nested_absmax->bytes, absmax32));
    } else {
        absmax32 = w->absmax32 + q * QS_NF4_QUANTUM_BLOCKS;
        floats = s->absmax->count;
        QS_TRY(read_source(w, i, s->absmax, 0, s->absmax->bytes, absmax32));
    }
    if (!qs_all_finite(absmax32, QS_F32, floats)) {
        return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: tensor %s: a number of its %s is not finite",
                       qs_st_path(w->plan->dir), t->name,
                       s->nested_absmax != NULL ? "nested_absmax" : "absmax");
    }
    w->result->offset[i] = t->offset;
    return QS_OK;
}

static qs_status import_tensor(worker *w, int i)
{
    const qs_base_tensor *t = &w->unit->tensors[i];
    int64_t count = qs_base_tensor_count(t);
    int64_t bytes = (count + 1) / 2;
    const int64_t piece = (int64_t)QS_PIECE_QUANTA * QS_NF4_QUANTUM_PACKED_BYTES;
    for (int64_t first = 0; first < bytes; first += piece) {
        int64_t n = bytes - first < piece ? bytes - first : piece;
        int64_t quanta = (n + QS_NF4_QUANTUM_PACKED_BYTES - 1) / QS_NF4_QUANTUM_PACKED_BYTES;
        memset(w->packed, QS_NF4_ZERO_BYTE, (size_t)(quanta * QS_NF4_QUANTUM_PACKED_BYTES));
        QS_TRY(read_source(w, i, w->sources[i].data, first, n, w->packed));
        if (first + n == bytes && count % 2 != 0) { /* the half byte past the end is padding */
            uint8_t *last = &w->packed[n - 1];
            *last = (uint8_t)((*last & 0xF0) | (QS_NF4_ZERO_BYTE & 0x0F));
        }
        QS_TRY(write_packed(w, t->quantum + first / QS_NF4_QUANTUM_PACKED_BYTES, quanta));
    }
    return import_absmax(w, i);
}

/* ---- raw ---- */

/* Quanta that go through the piece buffer at once; a wide row of a table may fill it alone. */
static int64_t raw_quanta_per_piece(const qs_base_unit *unit)
{
    int64_t each = (int64_t)qs_raw_quantum_bytes(&unit->size);
    return each < QS_PIECE_BYTES ? QS_PIECE_BYTES / each : 1;
}

static qs_status copy_tensor(worker *w, int i)
{
    const qs_base_tensor *t = &w->unit->tensors[i];
    int64_t each = (int64_t)qs_raw_quantum_bytes(&w->unit->size);
    int64_t size = (int64_t)qs_dtype_bytes(t->dtype);
    int64_t bytes = qs_base_tensor_count(t) * size;
    int64_t step = raw_quanta_per_piece(w->unit) * each;
    uint64_t *hash = w->result->hash + w->unit->size.nf4_quanta + t->quantum;
    for (int64_t first = 0; first < bytes; first += step) {
        int64_t n = bytes - first < step ? bytes - first : step;
        int64_t padded = (n + each - 1) / each * each;
        QS_TRY(
            read_source(w, i, w->sources[i].data, w->sources[i].first * size + first, n, w->piece));
        if (!qs_all_finite(w->piece, t->dtype, n / size)) {
            return weight_not_finite(w, i, first / size, n / size);
        }
        memset(w->piece + n, 0, (size_t)(padded - n));
        for (int64_t q = 0; q < padded / each; q++) {
            hash[first / each + q] = qs_xxh3_64(w->piece + q * each, (size_t)each);
        }
        QS_TRY(qs_io_write_all(w->fd, w->piece, (size_t)padded,
                               w->unit->raw_at + t->quantum * each + first, w->path));
    }
    return QS_OK;
}

/* ---- read back ---- */

static qs_status differs(const worker *w, const char *dataset, int64_t quantum)
{
    qs_error_clear();
    return QS_FAIL(QS_ERR_IO_VERIFY,
                   "%s: unit %s: %s reads back differently from what was written, at quantum %lld; "
                   "check the disk",
                   w->path, w->unit->name, dataset, (long long)quantum);
}

static qs_status reread(const worker *w, const char *dataset, void *out, size_t bytes, int64_t at)
{
    if (qs_io_read_all(w->fd, out, bytes, at, w->path) == QS_OK) {
        return QS_OK;
    }
    const int error = qs_error_cause();
    if (error == 0) { /* the file ends before */
        return differs(w, dataset, 0);
    }
    qs_error_clear();
    return QS_FAIL(QS_ERR_IO_VERIFY, "%s: unit %s: %s cannot be read back: %s", w->path,
                   w->unit->name, dataset, strerror(error));
}

/* An array that is still in memory, in pieces. */
static qs_status compare(const worker *w, const char *dataset, const void *data, size_t bytes,
                         int64_t at)
{
    const uint8_t *want = data;
    for (size_t done = 0; done < bytes; done += QS_PIECE_BYTES) {
        size_t n = bytes - done < QS_PIECE_BYTES ? bytes - done : QS_PIECE_BYTES;
        QS_TRY(reread(w, dataset, w->piece, n, at + (int64_t)done));
        if (memcmp(w->piece, want + done, n) != 0) {
            return differs(w, dataset, 0);
        }
    }
    return QS_OK;
}

/* Packed bytes against the hash of what was written; with the absmax in memory they give the
 * quantum's hash. */
static qs_status check_packed(const worker *w)
{
    const qs_unit_size *size = &w->unit->size;
    const int64_t each = QS_NF4_QUANTUM_PACKED_BYTES;
    for (int64_t first = 0; first < size->nf4_quanta; first += QS_PIECE_QUANTA) {
        int64_t left = size->nf4_quanta - first;
        int64_t n = left < QS_PIECE_QUANTA ? left : QS_PIECE_QUANTA;
        QS_TRY(
            reread(w, "packed", w->packed, (size_t)(n * each), w->unit->packed_at + first * each));
        const uint8_t *absmax8 = w->absmax8 + first * size->absmax8_per_quantum;
        const float *absmax32 = w->absmax32 + first * size->absmax32_per_quantum;
        for (int64_t q = 0; q < n; q++) {
            if (qs_xxh3_64(w->packed + q * each, (size_t)each) != w->packed_hash[first + q]) {
                return differs(w, "packed", first + q);
            }
            w->result->hash[first + q] =
                qs_base_nf4_hash(size, w->packed, absmax8, (const uint8_t *)absmax32, q);
        }
    }
    return QS_OK;
}

static qs_status check_raw(const worker *w)
{
    const qs_unit_size *size = &w->unit->size;
    int64_t each = (int64_t)qs_raw_quantum_bytes(size);
    int64_t step = raw_quanta_per_piece(w->unit);
    const uint64_t *hash = w->result->hash + size->nf4_quanta;
    for (int64_t first = 0; first < size->raw_quanta; first += step) {
        int64_t n = size->raw_quanta - first < step ? size->raw_quanta - first : step;
        QS_TRY(reread(w, "raw", w->piece, (size_t)(n * each), w->unit->raw_at + first * each));
        for (int64_t q = 0; q < n; q++) {
            if (qs_xxh3_64(w->piece + q * each, (size_t)each) != hash[first + q]) {
                return differs(w, "raw", first + q);
            }
        }
    }
    return QS_OK;
}

static void drop_cache(const worker *w, int64_t at, int64_t bytes)
{
    if (bytes > 0) { /* advice: where it is not taken, the comparison sees the page cache */
        (void)posix_fadvise(w->fd, (off_t)at, (off_t)bytes, POSIX_FADV_DONTNEED);
    }
}

static size_t absmax8_bytes(const worker *w)
{
    return (size_t)(w->unit->size.nf4_quanta * w->unit->size.absmax8_per_quantum);
}

static size_t absmax32_bytes(const worker *w)
{
    return (size_t)(w->unit->size.nf4_quanta * w->unit->size.absmax32_per_quantum) * sizeof(float);
}

static int64_t packed_bytes(const worker *w)
{
    return w->unit->size.nf4_quanta * QS_NF4_QUANTUM_PACKED_BYTES;
}

static int64_t raw_bytes(const worker *w)
{
    return w->unit->size.raw_quanta * (int64_t)qs_raw_quantum_bytes(&w->unit->size);
}

static qs_status check_unit(const worker *w)
{
    drop_cache(w, w->unit->packed_at, packed_bytes(w));
    drop_cache(w, w->unit->absmax8_at, (int64_t)absmax8_bytes(w));
    drop_cache(w, w->unit->absmax32_at, (int64_t)absmax32_bytes(w));
    drop_cache(w, w->unit->raw_at, raw_bytes(w));
    QS_TRY(compare(w, "absmax8", w->absmax8, absmax8_bytes(w), w->unit->absmax8_at));
    QS_TRY(compare(w, "absmax32", w->absmax32, absmax32_bytes(w), w->unit->absmax32_at));
    QS_TRY(check_packed(w));
    return check_raw(w);
}

/* ---- a unit ---- */

static qs_status alloc_worker(worker *w)
{
    const qs_unit_size *size = &w->unit->size;
    QS_TRY(QS_ALLOC(&w->absmax8, absmax8_bytes(w), QS_MEM_WORK));
    QS_TRY(QS_ALLOC(&w->absmax32, size->nf4_quanta * size->absmax32_per_quantum, QS_MEM_WORK));
    return QS_ALLOC(&w->packed_hash, size->nf4_quanta, QS_MEM_WORK);
}

static void free_worker(worker *w)
{
    qs_mem_free(w->absmax8);
    qs_mem_free(w->absmax32);
    qs_mem_free(w->packed_hash);
}

/* Norms and biases are written by rank 0; the owner only checks and notes what they were. */
static qs_status note_small(worker *w, int i)
{
    const qs_st_tensor *data = w->sources[i].data;
    uint8_t *bytes = NULL;
    QS_TRY(QS_ALLOC(&bytes, data->bytes, QS_MEM_WORK));
    qs_status st = read_source(w, i, data, 0, data->bytes, bytes);
    if (st == QS_OK && !qs_all_finite(bytes, w->unit->tensors[i].dtype, data->count)) {
        st = weight_not_finite(w, i, 0, data->count);
    }
    qs_mem_free(bytes);
    return st;
}

static qs_status do_tensor(worker *w, int i)
{
    switch (w->unit->tensors[i].kind) {
    case QS_TENSOR_NF4:
        return w->sources[i].absmax != NULL ? import_tensor(w, i) : quantize_tensor(w, i);
    case QS_TENSOR_RAW:
        return copy_tensor(w, i);
    case QS_TENSOR_SMALL:
        return note_small(w, i);
    }
    return QS_OK;
}

static qs_status write_unit(worker *w)
{
    QS_TRY(alloc_worker(w));
    for (int i = 0; i < w->unit->n_tensors; i++) {
        QS_TRY(do_tensor(w, i));
    }
    QS_TRY(qs_io_write_all(w->fd, w->absmax8, absmax8_bytes(w), w->unit->absmax8_at, w->path));
    return qs_io_write_all(w->fd, w->absmax32, absmax32_bytes(w), w->unit->absmax32_at, w->path);
}

/* ---- a batch ---- */

qs_status qs_unit_batch_begin(qs_unit_batch **out, const qs_plan *plan, int fd, const char *path,
                              const qs_backend *backend, int threads)
{
    qs_unit_batch *b = calloc(1, sizeof *b);
    *out = NULL;
    if (b == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory for quantizing", path);
    }
    *b = (qs_unit_batch){.plan = plan, .fd = fd, .path = path};
    qs_status st = qs_encoder_open(&b->encoder, backend, plan, threads);
    if (st != QS_OK) {
        qs_unit_batch_free(b);
        return st;
    }
    *out = b;
    return QS_OK;
}

static void forget_written(qs_unit_batch *b)
{
    for (int i = 0; i < b->n_written; i++) {
        free_worker(&b->written[i]);
    }
    b->n_written = 0;
    b->bytes = 0;
}

void qs_unit_batch_free(qs_unit_batch *b)
{
    if (b == NULL) {
        return;
    }
    forget_written(b);
    free(b->written);
    qs_encoder_close(&b->encoder);
    free(b);
}

qs_status qs_unit_batch_write(qs_unit_batch *b, int u, qs_unit_result *result)
{
    if (b->n_written == b->capacity) {
        int capacity = 2 * b->capacity + 16;
        worker *grown = realloc(b->written, (size_t)capacity * sizeof *grown);
        if (grown == NULL) {
            return QS_FAIL(QS_ERR_MEMORY, "%s: no memory for quantizing", b->path);
        }
        b->written = grown;
        b->capacity = capacity;
    }
    worker *w = &b->written[b->n_written++];
    *w = (worker){.plan = b->plan,
                  .unit = qs_plan_unit(b->plan, u),
                  .sources = b->plan->sources[u],
                  .result = result,
                  .fd = b->fd,
                  .path = b->path,
                  .encoder = &b->encoder,
                  .piece = b->encoder.source.host,
                  .packed = b->encoder.packed.host};
    QS_TRY(write_unit(w));
    b->bytes += packed_bytes(w) + raw_bytes(w);
    return b->bytes < BATCH_BYTES ? QS_OK : qs_unit_batch_check(b);
}

qs_status qs_unit_batch_check(qs_unit_batch *b)
{
    if (b->bytes > 0) {
        QS_TRY(qs_io_fsync(b->fd, b->path));
    }
    for (int i = 0; i < b->n_written; i++) {
        QS_TRY(check_unit(&b->written[i]));
    }
    forget_written(b);
    return QS_OK;
}

qs_status qs_quantize_small(const qs_plan *plan, int u, uint8_t *small)
{
    const qs_base_unit *unit = qs_plan_unit(plan, u);
    for (int i = 0; i < unit->n_tensors; i++) {
        if (unit->tensors[i].kind == QS_TENSOR_SMALL) {
            const qs_st_tensor *data = plan->sources[u][i].data;
            QS_TRY(qs_st_read(plan->dir, data, 0, data->bytes, small + unit->tensors[i].byte));
        }
    }
    return QS_OK;
}
