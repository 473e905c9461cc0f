/* The index of a token file: attributes, offsets, target counts, and the rules that they obey. */
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "data/data.h"
#include "data/data_impl.h"
#include "hf/chat_template.h"
#include "store/hash.h"
#include "store/json.h"

static qs_status get_ranged(qs_h5 *file, const char *name, int64_t low, int64_t high, int64_t *out)
{
    QS_TRY(qs_h5_attr_get_i64(file, name, out));
    if (*out < low || *out > high) {
        return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: %s=%lld is not in %lld..%lld", qs_h5_path(file),
                       name, (long long)*out, (long long)low, (long long)high);
    }
    return QS_OK;
}

static qs_status read_attributes(qs_data *d, qs_h5 *file, bool *packed)
{
    const int64_t most = (int64_t)1 << 40;
    int64_t value = 0;
    QS_TRY(qs_h5_expect_format(file, QS_DATA_FORMAT, QS_DATA_VERSION));
    QS_TRY(get_ranged(file, "vocab_size", 1, QS_DATA_MAX_VOCAB, &d->vocab));
    QS_TRY(get_ranged(file, "seq_len", 1, QS_DATA_MAX_SEQ_LEN, &d->seq_len));
    QS_TRY(get_ranged(file, "packed", 0, 1, &value));
    *packed = value == 1;
    QS_TRY(get_ranged(file, "n_sequences", 1, most, &d->n_sequences));
    QS_TRY(get_ranged(file, "n_tokens", d->n_sequences, most, &d->n_tokens));
    QS_TRY(get_ranged(file, "n_targets", 0, d->n_tokens, &d->n_targets));
    QS_TRY(qs_h5_attr_get_text(file, "tokens_xxh3", d->content, sizeof d->content));
    return qs_h5_attr_get_text(file, "labels_xxh3", d->labels, sizeof d->labels);
}

/** Find a dataset of `count` elements (-1: any) and read it whole into new memory. */
static qs_status read_whole(qs_h5 *file, const char *name, qs_dtype dtype, int64_t *count,
                            void **out)
{
    qs_h5_info info = {.dtype = dtype, .rank = 1, .dims = {*count}};
    QS_TRY(qs_h5_dataset_find(file, name, &info));
    *count = info.dims[0];
    QS_TRY(qs_mem_alloc(out, (size_t)*count * qs_dtype_bytes(dtype), QS_MEM_DATA));
    return qs_h5_dataset_get(file, name, &info, 0, *count, *out);
}

static qs_status read_datasets(qs_data *d, qs_h5 *file)
{
    qs_h5_info tokens = {.dtype = QS_I32, .rank = 1, .dims = {d->n_tokens}};
    qs_h5_info labels = tokens;
    int64_t sequences = d->n_sequences + 1;
    int64_t targets = d->n_sequences;
    int64_t documents = -1;
    QS_TRY(qs_h5_dataset_find(file, "tokens", &tokens));
    QS_TRY(qs_h5_dataset_find(file, "labels", &labels));
    d->tokens_at = tokens.file_offset;
    d->labels_at = labels.file_offset;
    QS_TRY(read_whole(file, "seq_offsets", QS_I64, &sequences, (void **)&d->seq_offsets));
    QS_TRY(read_whole(file, "doc_offsets", QS_I64, &documents, (void **)&d->doc_offsets));
    QS_TRY(read_whole(file, "seq_targets", QS_I32, &targets, (void **)&d->seq_targets));
    d->n_docs = documents - 1;
    return QS_OK;
}

/** Offsets start at 0, grow strictly and end at the number of tokens. */
static qs_status check_offsets(const qs_data *d, const char *name, const int64_t *offsets,
                               int64_t count)
{
    if (count < 1 || offsets[0] != 0 || offsets[count] != d->n_tokens) {
        return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: %s must run from 0 to n_tokens=%lld", d->path, name,
                       (long long)d->n_tokens);
    }
    for (int64_t i = 0; i < count; i++) {
        if (offsets[i + 1] <= offsets[i]) {
            return QS_FAIL(QS_ERR_INPUT_VALUE,
                           "%s: %s[%lld]=%lld is not greater than the one before, %lld", d->path,
                           name, (long long)(i + 1), (long long)offsets[i + 1],
                           (long long)offsets[i]);
        }
    }
    return QS_OK;
}

/** Every sequence border must be a document border; remembers which one. */
static qs_status match_borders(qs_data *d)
{
    QS_TRY(QS_ALLOC(&d->seq_first_doc, d->n_sequences + 1, QS_MEM_DATA));
    int64_t doc = 0;
    for (int64_t s = 0; s <= d->n_sequences; s++) {
        while (doc < d->n_docs && d->doc_offsets[doc] < d->seq_offsets[s]) {
            doc++;
        }
        if (d->doc_offsets[doc] != d->seq_offsets[s]) {
            return QS_FAIL(QS_ERR_INPUT_VALUE,
                           "%s: seq_offsets[%lld]=%lld is not a document border", d->path,
                           (long long)s, (long long)d->seq_offsets[s]);
        }
        d->seq_first_doc[s] = doc;
    }
    return QS_OK;
}

static qs_status check_sequences(const qs_data *d)
{
    int64_t sum = 0;
    for (int64_t s = 0; s < d->n_sequences; s++) {
        int64_t length = d->seq_offsets[s + 1] - d->seq_offsets[s];
        int64_t docs = d->seq_first_doc[s + 1] - d->seq_first_doc[s];
        if (length > d->seq_len) {
            return QS_FAIL(QS_ERR_INPUT_VALUE,
                           "%s: sequence %lld has %lld tokens, more than seq_len=%lld", d->path,
                           (long long)s, (long long)length, (long long)d->seq_len);
        }
        if (d->seq_targets[s] > length - docs) { /* a document's last token predicts nothing */
            return QS_FAIL(
                QS_ERR_INPUT_VALUE,
                "%s: seq_targets[%lld]=%u is more than its %lld tokens in %lld documents allow",
                d->path, (long long)s, d->seq_targets[s], (long long)length, (long long)docs);
        }
        sum += d->seq_targets[s];
    }
    if (sum != d->n_targets) {
        return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: seq_targets sums to %lld, but n_targets=%lld",
                       d->path, (long long)sum, (long long)d->n_targets);
    }
    return QS_OK;
}

/** The same tokens with other labels or borders are other data. */
static qs_status name_layout(qs_data *d)
{
    qs_xxh3_128 *hash = qs_xxh3_128_begin();
    if (hash == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory for hashing it", d->path);
    }
    qs_xxh3_128_add(hash, d->labels, strlen(d->labels));
    qs_xxh3_128_add(hash, d->seq_offsets, (size_t)(d->n_sequences + 1) * sizeof *d->seq_offsets);
    qs_xxh3_128_add(hash, d->doc_offsets, (size_t)(d->n_docs + 1) * sizeof *d->doc_offsets);
    qs_xxh3_128_end(hash, d->layout);
    return QS_OK;
}

/* Borders that moved give another attention, and sequences all the same. Files of the first
 * versions carry no hash of them. */
static qs_status check_layout(const qs_data *d, qs_h5 *file)
{
    char layout[sizeof d->layout];
    bool exists = false;
    QS_TRY(qs_h5_attr_exists(file, "layout_xxh3", &exists));
    if (!exists) {
        return QS_OK;
    }
    QS_TRY(qs_h5_attr_get_text(file, "layout_xxh3", layout, sizeof layout));
    return strcmp(layout, d->layout) == 0
               ? QS_OK
               : QS_FAIL(QS_ERR_INPUT_HASH,
                         "%s: seq_offsets, doc_offsets or labels_xxh3 do not match layout_xxh3; "
                         "copy the file again, or prepare the data again",
                         d->path);
}

static qs_status read_tokenizer(qs_data *d, qs_h5 *file)
{
    bool exists = false;
    QS_TRY(qs_h5_attr_exists(file, "tokenizer_sha256", &exists));
    return exists ? qs_h5_attr_get_text(file, "tokenizer_sha256", d->tokenizer, sizeof d->tokenizer)
                  : QS_OK;
}

static qs_status template_wrong(const qs_data *d, qs_status st, const char *what)
{
    return QS_FAIL(st, "%s: attribute \"chat_template\" %s; prepare the data again", d->path, what);
}

/* It goes to whoever serves the model, so it is the text that the data was made with, or none. */
static qs_status check_template(const qs_data *d, qs_h5 *file)
{
    char want[QS_SHA256_HEX + 1], found[QS_SHA256_HEX];
    QS_TRY(qs_h5_attr_get_text(file, "template_sha256", want, sizeof want));
    qs_sha256_hex(d->chat_template, strlen(d->chat_template), found);
    if (strcmp(want, found) != 0) {
        return template_wrong(d, QS_ERR_INPUT_HASH, "does not match template_sha256");
    }
    return qs_json_is_utf8(d->chat_template)
               ? QS_OK
               : template_wrong(d, QS_ERR_INPUT_VALUE, "is not UTF-8");
}

/* Not in the first files, nor where no template shaped the data. */
static qs_status read_template(qs_data *d, qs_h5 *file)
{
    bool exists = false;
    QS_TRY(qs_h5_attr_exists(file, "chat_template", &exists));
    if (!exists) {
        return QS_OK;
    }
    d->chat_template = malloc(QS_CHAT_TEMPLATE_MAX + 1);
    if (d->chat_template == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory for its chat template", d->path);
    }
    QS_TRY(qs_h5_attr_get_text(file, "chat_template", d->chat_template, QS_CHAT_TEMPLATE_MAX + 1));
    return check_template(d, file);
}

qs_status qs_data_read_index(qs_data *d, qs_h5 *file)
{
    bool packed = false;
    QS_TRY(read_attributes(d, file, &packed));
    QS_TRY(read_datasets(d, file));
    QS_TRY(check_offsets(d, "seq_offsets", d->seq_offsets, d->n_sequences));
    QS_TRY(check_offsets(d, "doc_offsets", d->doc_offsets, d->n_docs));
    QS_TRY(match_borders(d));
    if (!packed && d->n_docs != d->n_sequences) {
        return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: packed=0, but %lld sequences hold %lld documents",
                       d->path, (long long)d->n_sequences, (long long)d->n_docs);
    }
    QS_TRY(check_sequences(d));
    QS_TRY(name_layout(d));
    QS_TRY(check_layout(d, file));
    QS_TRY(read_tokenizer(d, file));
    return read_template(d, file);
}

qs_status qs_data_check_fit(const qs_data *d, int64_t model_vocab, int64_t max_seq_len)
{
    if (model_vocab > 0 && d->vocab > model_vocab) {
        return QS_FAIL(
            QS_ERR_INPUT_VALUE,
            "%s: vocab_size=%lld is more than the model's %lld; prepare the data with the model's "
            "own tokenizer",
            d->path, (long long)d->vocab, (long long)model_vocab);
    }
    for (int64_t s = 0; max_seq_len > 0 && s < d->n_sequences; s++) {
        int64_t length = d->seq_offsets[s + 1] - d->seq_offsets[s];
        if (length > max_seq_len) {
            return QS_FAIL(QS_ERR_INPUT_VALUE,
                           "%s: sequence %lld has %lld tokens, more than train.seq_len=%lld; raise "
                           "train.seq_len "
                           "or prepare the data again with a smaller one",
                           d->path, (long long)s, (long long)length, (long long)max_seq_len);
        }
    }
    return QS_OK;
}
