/* A rank's share of base.h5: where it lies in the file, and whether it is what was written. Every
 * byte is compared with the hash of its quantum, also when another rank has read it for this one.
 */
#include <stdlib.h>
#include <string.h>

#include "store/hash.h"
#include "store/io.h"
#include "weights/base_impl.h"

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

/* What of the file makes a share: the sections of the message, then the hashes of its quanta. */
enum { SECTIONS = 4, STRETCHES = SECTIONS + 2 };
typedef struct {
    span nf4, raw;
    uint64_t *hashes; /* [nf4.count + raw.count] as the file has them */
    qs_stretch at[STRETCHES];
} share;

/* Quanta [s.begin, +s.count) of `each` bytes from the dataset at `place`. */
static qs_stretch stretch_of(int64_t place, span s, size_t each, void *to)
{
    return (qs_stretch){
        .offset = place + s.begin * (int64_t)each, .bytes = (size_t)s.count * each, .to = to};
}

static qs_status share_make(share *s, const qs_base_index *index, const qs_base_unit *unit,
                            const qs_unit_layout *l, int rank, uint8_t *message)
{
    const size_t hash_bytes = sizeof *s->hashes;
    s->nf4 = share_of(unit->size.nf4_quanta, l->nf4_per_rank, rank);
    s->raw = share_of(unit->size.raw_quanta, l->raw_per_rank, rank);
    s->hashes = malloc((size_t)(s->nf4.count + s->raw.count) * hash_bytes + 1);
    if (s->hashes == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory for hashes", index->path);
    }
    const size_t absmax32_bytes = (size_t)l->size.absmax32_per_quantum * sizeof(float);
    const span raw_hashes = {unit->size.nf4_quanta + s->raw.begin, s->raw.count};
    s->at[0] =
        stretch_of(unit->packed_at, s->nf4, QS_NF4_QUANTUM_PACKED_BYTES, message + l->packed_at);
    s->at[1] = stretch_of(unit->absmax8_at, s->nf4, (size_t)l->size.absmax8_per_quantum,
                          message + l->absmax8_at);
    s->at[2] = stretch_of(unit->absmax32_at, s->nf4, absmax32_bytes, message + l->absmax32_at);
    s->at[3] =
        stretch_of(unit->raw_at, s->raw, qs_raw_quantum_bytes(&l->size), message + l->raw_at);
    s->at[4] = stretch_of(unit->hash_at, s->nf4, hash_bytes, s->hashes);
    s->at[5] = stretch_of(unit->hash_at, raw_hashes, hash_bytes, s->hashes + s->nf4.count);
    return QS_OK;
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

static qs_status verify_share(const qs_base_index *index, const qs_base_unit *unit,
                              const qs_unit_layout *l, const uint8_t *message, const share *s)
{
    int64_t wrong = first_wrong_nf4(l, message, s->nf4, s->hashes);
    if (wrong >= 0) {
        return hash_failed(index, unit, QS_TENSOR_NF4, wrong);
    }
    wrong = first_wrong_raw(l, message, s->raw, s->hashes + s->nf4.count);
    if (wrong >= 0) {
        return hash_failed(index, unit, QS_TENSOR_RAW, wrong);
    }
    return check_numbers(index, unit, l, message, s->nf4, s->raw);
}

static qs_status get_share(const qs_base_index *index, const qs_seen *seen, int fd, int u, int rank,
                           int nranks, uint8_t *message, uint64_t *bytes_read)
{
    const qs_base_unit *unit = &index->units[u];
    const qs_unit_layout l = qs_unit_layout_make(&unit->size, nranks);
    share s = {.hashes = NULL};
    memset(message, 0, l.message_bytes); /* the padding is sent along: no stray bytes */
    qs_status st = share_make(&s, index, unit, &l, rank, message);
    st = qs_seen_read(seen, st, fd, index->path, s.at, s.hashes != NULL ? STRETCHES : 0);
    for (int i = 0; i < SECTIONS && st == QS_OK; i++) {
        *bytes_read += s.at[i].bytes;
    }
    if (st == QS_OK) {
        st = verify_share(index, unit, &l, message, &s);
    }
    free(s.hashes);
    return st;
}

qs_status qs_base_read_share(const qs_base_index *index, int fd, int u, int rank, int nranks,
                             uint8_t *message, uint64_t *bytes_read)
{
    const qs_seen by_all = {.comm = NULL};
    return get_share(index, &by_all, fd, u, rank, nranks, message, bytes_read);
}

qs_status qs_base_fetch_share(const qs_base_index *index, int fd, int u, int rank, int nranks,
                              uint8_t *message, uint64_t *bytes_read)
{
    return get_share(index, &index->seen, fd, u, rank, nranks, message, bytes_read);
}

qs_status qs_base_read_small(const qs_base_index *index, int fd, const qs_base_unit *unit,
                             uint8_t *small)
{
    size_t bytes = (size_t)unit->small_bytes;
    if (index->small != NULL) {
        memcpy(small, index->small + unit->small_from, bytes);
    } else if (bytes > 0) {
        QS_TRY(qs_io_read_all(fd, small, bytes, unit->small_at, index->path));
    }
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
