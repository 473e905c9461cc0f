/* Looking at a token file: the decode table, the full check, the description. */
#include <ctype.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/mem.h"
#include "data/data.h"
#include "data/data_impl.h"
#include "store/hash.h"
#include "store/io.h"

enum { HASH_PIECE = 1 << 20, HISTOGRAM_BAR = 40 };

/* ---- decode table ---- */

void qs_decode_table_free(qs_decode_table *table)
{
    qs_mem_free(table->offsets);
    qs_mem_free(table->bytes);
    *table = (qs_decode_table){0};
}

static qs_status check_table(const qs_decode_table *t, int64_t bytes, const char *path)
{
    bool good = t->offsets[0] == 0 && t->offsets[t->vocab] == bytes;
    for (int64_t i = 0; good && i < t->vocab; i++) {
        if (t->offsets[i + 1] < t->offsets[i]) {
            return QS_FAIL(QS_ERR_INPUT_VALUE,
                           "%s: decode_offsets[%lld]=%lld is less than the one before, %lld", path,
                           (long long)(i + 1), (long long)t->offsets[i + 1],
                           (long long)t->offsets[i]);
        }
    }
    return good ? QS_OK
                : QS_FAIL(QS_ERR_INPUT_VALUE,
                          "%s: decode_offsets must run from 0 to the %lld bytes of decode_bytes",
                          path, (long long)bytes);
}

static qs_status read_table(qs_decode_table *t, qs_h5 *file)
{
    QS_TRY(qs_h5_expect_format(file, QS_DATA_FORMAT, QS_DATA_VERSION));
    QS_TRY(qs_h5_attr_get_i64(file, "vocab_size", &t->vocab));
    if (t->vocab < 1 || t->vocab > QS_DATA_MAX_VOCAB) {
        return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: vocab_size=%lld is not in 1..%d", qs_h5_path(file),
                       (long long)t->vocab, QS_DATA_MAX_VOCAB);
    }
    qs_h5_info offsets = {.dtype = QS_I64, .rank = 1, .dims = {t->vocab + 1}};
    qs_h5_info bytes = {.dtype = QS_U8, .rank = 1, .dims = {-1}};
    QS_TRY(qs_h5_dataset_find(file, "decode_offsets", &offsets));
    QS_TRY(qs_h5_dataset_find(file, "decode_bytes", &bytes));
    QS_TRY(QS_ALLOC(&t->offsets, t->vocab + 1, QS_MEM_DATA));
    QS_TRY(QS_ALLOC(&t->bytes, bytes.dims[0], QS_MEM_DATA));
    QS_TRY(qs_h5_dataset_get(file, "decode_offsets", &offsets, 0, t->vocab + 1, t->offsets));
    QS_TRY(qs_h5_dataset_get(file, "decode_bytes", &bytes, 0, bytes.dims[0], t->bytes));
    return check_table(t, bytes.dims[0], qs_h5_path(file));
}

qs_status qs_decode_table_read(qs_decode_table *out, const char *path)
{
    qs_h5 *file = NULL;
    *out = (qs_decode_table){0};
    QS_TRY(qs_h5_open(&file, path));
    qs_status st = read_table(out, file);
    qs_status closed = qs_h5_close(file);
    st = st != QS_OK ? st : closed;
    if (st != QS_OK) {
        qs_decode_table_free(out);
    }
    return st;
}

/* ---- hashes, and the full check ---- */

static qs_status hash_range(const qs_data *d, int64_t offset, int64_t bytes,
                            char out[QS_XXH128_HEX])
{
    qs_status st = QS_OK;
    qs_xxh3_128 *hash = qs_xxh3_128_begin();
    void *piece = malloc(HASH_PIECE);
    if (hash == NULL || piece == NULL) {
        st = QS_FAIL(QS_ERR_MEMORY, "%s: no memory for hashing it", d->path);
    }
    for (int64_t at = 0; st == QS_OK && at < bytes; at += HASH_PIECE) {
        size_t n = bytes - at < HASH_PIECE ? (size_t)(bytes - at) : HASH_PIECE;
        st = qs_io_read_all(d->fd, piece, n, offset + at, d->path);
        if (st == QS_OK) {
            qs_xxh3_128_add(hash, piece, n);
        }
    }
    if (hash != NULL) {
        qs_xxh3_128_end(hash, out);
    }
    free(piece);
    return st;
}

static qs_status check_hash(const qs_data *d, const char *name, int64_t offset, const char *stored)
{
    char found[QS_XXH128_HEX] = "";
    QS_TRY(hash_range(d, offset, d->n_tokens * (int64_t)sizeof(int32_t), found));
    return strcmp(found, stored) == 0
               ? QS_OK
               : QS_FAIL(QS_ERR_INPUT_HASH,
                         "%s: %s hashes to %s, but the file says %s; it was changed or damaged",
                         d->path, name, found, stored);
}

static qs_status check_hashes(const qs_data *d)
{
    QS_TRY(check_hash(d, "tokens", d->tokens_at, d->content));
    return check_hash(d, "labels", d->labels_at, d->labels);
}

/* One rank of a host looks at the host's file. */
static bool looks(const qs_data *d, const qs_comm *comm)
{
    return d->fd >= 0 && qs_comm_local_rank(comm) == 0;
}

/* What changes when somebody writes into the file; 0 if the system does not say. */
static void look(const qs_data *d, int64_t *bytes, int64_t *time_ns)
{
    struct stat info = {0};
    (void)fstat(d->fd, &info);
    *bytes = info.st_size;
    *time_ns = (int64_t)info.st_mtim.tv_sec * 1000000000 + info.st_mtim.tv_nsec;
}

qs_status qs_data_check_hashes(qs_data *data, qs_comm *comm)
{
    qs_status st = QS_OK;
    if (looks(data, comm)) {
        look(data, &data->checked.bytes,
             &data->checked.time_ns); /* before: a change behind shows */
        st = check_hashes(data);
    }
    return qs_comm_agree(comm, st);
}

/** A time alone says nothing: the file may have been touched, or a copy restored. */
static qs_status check_changed(qs_data *d)
{
    int64_t bytes, time_ns;
    look(d, &bytes, &time_ns);
    if (bytes == d->checked.bytes && time_ns == d->checked.time_ns) {
        return QS_OK;
    }
    d->checked.bytes = bytes;
    d->checked.time_ns = time_ns;
    const qs_status st = check_hashes(d);
    if (st != QS_ERR_INPUT_HASH && st != QS_ERR_INPUT_FORMAT /* cut short */) {
        return st;
    }
    qs_error_clear();
    return QS_FAIL(QS_ERR_INPUT_HASH,
                   "%s: was changed while the run was reading it; put the old file back and start "
                   "again, or train on the new one into another output",
                   d->path);
}

qs_status qs_data_check_unchanged(qs_data *data, qs_comm *comm)
{
    return qs_comm_agree(comm, looks(data, comm) ? check_changed(data) : QS_OK);
}

/** Read every sequence, which checks ids, labels and seq_targets. */
static qs_status check_sequences(qs_data *d)
{
    qs_batch *batch = NULL;
    QS_TRY(qs_batch_create(&batch, d->seq_len, d->seq_len));
    qs_status st = QS_OK;
    for (int64_t s = 0; st == QS_OK && s < d->n_sequences; s++) {
        st = qs_data_read(d, &s, &s, 1, batch);
    }
    qs_batch_destroy(batch);
    return st;
}

qs_status qs_data_verify(const char *path)
{
    qs_data *d = NULL;
    qs_decode_table table;
    QS_TRY(qs_data_open_alone(&d, path));
    qs_status st = check_hashes(d);
    st = st != QS_OK ? st : check_sequences(d);
    qs_data_close(d);
    QS_TRY(st);
    QS_TRY(qs_decode_table_read(&table, path));
    qs_decode_table_free(&table);
    return QS_OK;
}

/* ---- the description ---- */

/** Lengths in classes of powers of two. */
static void print_lengths(const qs_data *d, FILE *out)
{
    int64_t counts[32] = {0};
    int64_t most = 1;
    for (int64_t s = 0; s < d->n_sequences; s++) {
        int64_t length = d->seq_offsets[s + 1] - d->seq_offsets[s];
        int class = 63 - __builtin_clzll((unsigned long long)length);
        counts[class]++;
        most = counts[class] > most ? counts[class] : most;
    }
    fprintf(out, "lengths (tokens: sequences)\n");
    for (int class = 0; class < 32; class ++) {
        if (counts[class] > 0) {
            int bar = (int)((counts[class] * HISTOGRAM_BAR + most - 1) / most);
            fprintf(out, "  %8lld..%-8lld %10lld %.*s\n", 1LL << class, (1LL << (class + 1)) - 1,
                    (long long)counts[class], bar, "########################################");
        }
    }
}

/** The data's control characters must not steer the terminal. */
static void print_bytes(const qs_decode_table *t, int32_t id, FILE *out)
{
    for (int64_t i = t->offsets[id]; i < t->offsets[id + 1]; i++) {
        uint8_t c = t->bytes[i];
        if (iscntrl(c) && c != '\n' && c != '\t') {
            fprintf(out, "\\x%02x", c);
        } else {
            fputc(c, out);
        }
    }
}

/** Position i is learned if it is the target of the position before. */
static void print_text(const qs_batch *b, const qs_decode_table *t, FILE *out)
{
    bool masked = false;
    for (int64_t i = 0; i < b->n_tokens; i++) {
        bool border = i > 0 && b->position[i] == 0;
        bool learned = i > 0 && !border && b->target[i - 1] >= 0;
        if (masked && (learned || border)) {
            fputs("⟧", out);
            masked = false;
        }
        if (border) {
            fputs("\n--- next document\n", out);
        }
        if (!masked && !learned) {
            fputs("⟦", out);
            masked = true;
        }
        print_bytes(t, b->tokens[i], out);
    }
    fputs(masked ? "⟧\n" : "\n", out);
}

static qs_status describe_first(qs_data *d, FILE *out)
{
    const int64_t first = 0;
    qs_batch *batch = NULL;
    qs_decode_table table;
    QS_TRY(qs_decode_table_read(&table, d->path));
    qs_status st = qs_batch_create(&batch, d->seq_len, d->seq_len);
    if (st == QS_OK) {
        st = qs_data_read(d, &first, &first, 1, batch);
    }
    if (st == QS_OK) {
        fprintf(out, "sequence 0: %lld tokens, %lld learned; what is not learned stands in ⟦⟧\n",
                (long long)batch->n_tokens, (long long)batch->n_targets);
        print_text(batch, &table, out);
    }
    qs_batch_destroy(batch);
    qs_decode_table_free(&table);
    return st;
}

qs_status qs_data_describe(const char *path, FILE *out)
{
    qs_data *d = NULL;
    QS_TRY(qs_data_open_alone(&d, path));
    fprintf(out, "%s: token file, format version %d\n", path, QS_DATA_VERSION);
    fprintf(out, "sequences        %lld\ndocuments        %lld\ntokens           %lld\n",
            (long long)d->n_sequences, (long long)d->n_docs, (long long)d->n_tokens);
    fprintf(out, "tokens learned   %lld (%.1f %%)\n", (long long)d->n_targets,
            100.0 * (double)d->n_targets / (double)d->n_tokens);
    fprintf(
        out, "longest sequence %lld of seq_len %lld\nvocabulary       %lld\ntokens_xxh3      %s\n",
        (long long)qs_data_longest(d, 1), (long long)d->seq_len, (long long)d->vocab, d->content);
    if (d->tokenizer[0] != '\0') {
        fprintf(out, "tokenizer_sha256 %s\n", d->tokenizer);
    }
    if (d->chat_template != NULL) {
        fprintf(out, "chat template    %zu bytes, kept for the model that is trained on it\n",
                strlen(d->chat_template));
    }
    print_lengths(d, out);
    qs_status st = describe_first(d, out);
    qs_data_close(d);
    return st;
}
