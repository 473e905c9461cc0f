/* Opening base.h5 on all ranks. The lowest rank that sees the file checks the index, the places of
 * all datasets and the hash of hashes, and tells the others. A host that has a file of this name
 * must have the same one; ranks of a host that has none are sent what they need: the small tensors
 * here, their shares when they ask for them (qs_base_fetch_share). */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/mem.h"
#include "store/hash.h"
#include "weights/base_impl.h"

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

static size_t places_bytes(const qs_base_index *index)
{
    return (size_t)(index->n_units + 1) * PLACES * sizeof(int64_t);
}

static void get_places(qs_base_index *index, int64_t *places)
{
    int64_t *at[PLACES];
    for (int u = 0; u <= index->n_units; u++) {
        places_of(unit_or_final(index, u), at);
        for (int i = 0; i < PLACES; i++) {
            places[u * PLACES + i] = *at[i];
        }
    }
}

/* The places of all datasets and the maps, from rank `root`. Both sides have parsed the same text,
 * so the sizes agree. */
static qs_status share_places(qs_base_index *index, qs_comm *comm, int root)
{
    qs_status st = QS_OK;
    int64_t *at[PLACES];
    int64_t n_maps = index->n_maps;
    const size_t bytes = places_bytes(index);
    int64_t *places = malloc(bytes);
    st =
        places == NULL ? QS_FAIL(QS_ERR_MEMORY, "%s: no memory for its index", index->path) : QS_OK;
    QS_GOTO(qs_comm_agree(comm, st));
    get_places(index, places);
    QS_GOTO(qs_comm_bcast(comm, places, bytes, root));
    for (int u = 0; u <= index->n_units; u++) {
        places_of(unit_or_final(index, u), at);
        for (int i = 0; i < PLACES; i++) {
            *at[i] = places[u * PLACES + i];
        }
    }
    QS_GOTO(qs_comm_bcast(comm, &n_maps, sizeof n_maps, root));
    if (index->maps == NULL) {
        st = QS_ALLOC(&index->maps, n_maps * 256, QS_MEM_BASE_SMALL);
    }
    QS_GOTO(qs_comm_agree(comm, st));
    index->n_maps = (int)n_maps;
    QS_GOTO(qs_comm_bcast(comm, index->maps, (size_t)n_maps * 256 * sizeof(float), root));
done:
    free(places);
    return st;
}

/* ---- the same file on every host ---- */

/* Size, content, and where it lies in the file, since all ranks read at the same places. */
static qs_status mark_of(qs_base_index *index, const char *text, char *mark, size_t capacity)
{
    struct stat info;
    const size_t bytes = places_bytes(index);
    if (stat(index->path, &info) != 0) {
        return QS_FAIL(QS_ERR_INPUT_MISSING, "%s: %s", index->path, strerror(errno));
    }
    int64_t *places = malloc(bytes);
    if (places == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory for its index", index->path);
    }
    get_places(index, places);
    const qs_piece pieces[] = {{text, strlen(text)}, {places, bytes}};
    snprintf(mark, capacity, "%lld bytes, hashes_sha256 %.16s..., index %016llx",
             (long long)info.st_size, index->hashes_sha256,
             (unsigned long long)qs_xxh3_64_pieces(pieces, 2));
    free(places);
    return QS_OK;
}

static qs_status compare_copies(qs_base_index *index, const char *text, const qs_seen *seen)
{
    char mark[160] = "";
    qs_status st = QS_OK;
    if (qs_comm_rank(seen->comm) == seen->root) {
        st = mark_of(index, text, mark, sizeof mark);
    } else if (seen->compares) {
        qs_base_index *own = NULL;
        char *own_text = NULL;
        st = qs_base_open_with_text(&own, &own_text, index->path);
        st = st == QS_OK ? mark_of(own, own_text, mark, sizeof mark) : st;
        free(own_text);
        qs_base_index_free(own);
    }
    return qs_seen_compare(seen, index->path, st, mark);
}

/* ---- the small tensors, where not every rank can read them ---- */

/* They lie back to back, in the order of the units. */
static int64_t place_small(qs_base_index *index)
{
    int64_t bytes = 0;
    for (int u = 0; u <= index->n_units; u++) {
        qs_base_unit *unit = unit_or_final(index, u);
        unit->small_from = bytes;
        bytes += unit->small_bytes;
    }
    return bytes;
}

static qs_status read_all_small(qs_base_index *index, uint8_t *out)
{
    const int fd = open(index->path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return QS_FAIL(QS_ERR_INPUT_MISSING, "%s: opening failed: %s", index->path,
                       strerror(errno));
    }
    qs_status st = QS_OK;
    for (int u = 0; u <= index->n_units && st == QS_OK; u++) {
        const qs_base_unit *unit = unit_or_final(index, u);
        st = qs_base_read_small(index, fd, unit, out + unit->small_from);
    }
    (void)close(fd); /* read only */
    return st;
}

static qs_status share_small(qs_base_index *index, const qs_seen *seen)
{
    const int64_t bytes = place_small(index);
    uint8_t *small = NULL;
    qs_status st = QS_ALLOC(&small, bytes + 1, QS_MEM_BASE_SMALL);
    if (st == QS_OK && qs_comm_rank(seen->comm) == seen->root) {
        st = read_all_small(index, small);
    }
    st = qs_comm_agree(seen->comm, st);
    st = st == QS_OK ? qs_comm_bcast(seen->comm, small, (size_t)bytes, seen->root) : st;
    if (st != QS_OK) {
        qs_mem_free(small);
        return st;
    }
    index->small = small;
    return QS_OK;
}

qs_status qs_base_index_read(qs_base_index **out, const char *path, qs_comm *comm)
{
    qs_status st = QS_OK;
    qs_base_index *index = NULL;
    char *text = NULL;
    qs_seen seen;
    QS_GOTO(qs_seen_find(&seen, path, "its ranks are sent their shares by", comm));
    if (qs_comm_rank(comm) == seen.root) {
        st = qs_base_open_with_text(&index, &text, path);
    }
    QS_GOTO(qs_comm_agree(comm, st));
    QS_GOTO(qs_comm_bcast_text(comm, &text, seen.root));
    if (index == NULL) {
        st = qs_base_index_parse(&index, text, strlen(text), path);
    }
    QS_GOTO(qs_comm_agree(comm, st));
    QS_GOTO(share_places(index, comm, seen.root));
    index->seen = seen;
    if (!seen.simple) {
        QS_GOTO(compare_copies(index, text, &seen));
    }
    if (!seen.everywhere) {
        QS_GOTO(share_small(index, &seen));
    }
    *out = index;
    index = NULL;
done:
    free(text);
    qs_base_index_free(index);
    return st;
}
