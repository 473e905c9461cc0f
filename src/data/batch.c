/* Micro-batches: whole sequences read from the file, back to back.
 *
 *     file     tokens  a b c | d e     labels  -100 b c | d e     (| is a document border)
 *     batch    tokens  a b c   d e     target  b c -1   e -1      (the next label of the document)
 *
 * Labels are read into `target` and shifted in place, so that reading allocates nothing. */
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "data/data.h"
#include "data/data_impl.h"
#include "store/io.h"

qs_status qs_batch_create(qs_batch **out, int64_t tokens, int64_t docs)
{
    qs_status st = QS_OK;
    *out = NULL;
    qs_batch *b = calloc(1, sizeof *b);
    if (b == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "no memory for a micro-batch");
    }
    b->token_capacity = tokens;
    b->doc_capacity = docs;
    QS_GOTO(QS_ALLOC(&b->tokens, tokens, QS_MEM_DATA));
    QS_GOTO(QS_ALLOC(&b->target, tokens, QS_MEM_DATA));
    QS_GOTO(QS_ALLOC(&b->position, tokens, QS_MEM_DATA));
    QS_GOTO(QS_ALLOC(&b->cu_seqlens, docs + 1, QS_MEM_DATA));
    QS_GOTO(QS_ALLOC(&b->sample, tokens, QS_MEM_DATA));
    QS_GOTO(QS_ALLOC(&b->row_at, tokens, QS_MEM_DATA));
    *out = b;
    b = NULL;
done:
    qs_batch_destroy(b);
    return st;
}

size_t qs_batch_bytes(int64_t tokens, int64_t docs)
{
    const size_t per_token = 3 * sizeof(int32_t) + 2 * sizeof(int64_t);
    return (size_t)tokens * per_token + (size_t)(docs + 1) * sizeof(int32_t);
}

void qs_batch_destroy(qs_batch *b)
{
    if (b == NULL) {
        return;
    }
    qs_mem_free(b->tokens);
    qs_mem_free(b->target);
    qs_mem_free(b->position);
    qs_mem_free(b->cu_seqlens);
    qs_mem_free(b->sample);
    qs_mem_free(b->row_at);
    free(b);
}

void qs_batch_lay_out(qs_batch *batch, int64_t tokens, int64_t length, int64_t sample)
{
    batch->n_tokens = tokens;
    batch->n_docs = 0;
    for (int64_t t = 0; t < tokens; t++) {
        const int64_t at = t % length;
        batch->position[t] = (int32_t)at;
        batch->row_at[t] = at;
        batch->sample[t] = sample + t / length;
        if (at == 0) {
            batch->cu_seqlens[batch->n_docs++] = (int32_t)t;
        }
    }
    batch->cu_seqlens[batch->n_docs] = (int32_t)tokens;
    batch->n_sequences = batch->n_docs;
}

/** Ids must exist, and labels be ids or QS_DATA_IGNORED. */
static qs_status check_values(const qs_data *d, int64_t sequence, const int32_t *tokens,
                              const int32_t *labels, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        if (tokens[i] < 0 || tokens[i] >= d->vocab) {
            return QS_FAIL(
                QS_ERR_INPUT_VALUE,
                "%s: sequence %lld, position %lld: token id %u is not below vocab_size=%lld; the "
                "file is damaged, prepare it again",
                d->path, (long long)sequence, (long long)i, (uint32_t)tokens[i],
                (long long)d->vocab);
        }
        if (labels[i] != QS_DATA_IGNORED && (labels[i] < 0 || labels[i] >= d->vocab)) {
            return QS_FAIL(
                QS_ERR_INPUT_VALUE,
                "%s: sequence %lld, position %lld: label %d is neither %d nor an id below "
                "vocab_size=%lld; the file is damaged, prepare it again",
                d->path, (long long)sequence, (long long)i, labels[i], QS_DATA_IGNORED,
                (long long)d->vocab);
        }
    }
    return QS_OK;
}

/** Turn the labels of one document in `target` into what each position predicts; returns how many
 * do. */
static int64_t shift_document(int32_t *target, int32_t *position, int64_t length)
{
    int64_t targets = 0;
    for (int64_t i = 0; i < length; i++) {
        position[i] = (int32_t)i;
        target[i] = i + 1 < length && target[i + 1] != QS_DATA_IGNORED ? target[i + 1] : -1;
        targets += target[i] >= 0;
    }
    return targets;
}

/** Shift the documents of a sequence and add their borders. */
static qs_status add_documents(const qs_data *d, int64_t sequence, qs_batch *b)
{
    const int64_t at = b->n_tokens;
    const int64_t begin = d->seq_offsets[sequence];
    int64_t targets = 0;
    for (int64_t doc = d->seq_first_doc[sequence]; doc < d->seq_first_doc[sequence + 1]; doc++) {
        int64_t first = at + d->doc_offsets[doc] - begin;
        int64_t last = at + d->doc_offsets[doc + 1] - begin;
        targets += shift_document(b->target + first, b->position + first, last - first);
        b->cu_seqlens[++b->n_docs] = (int32_t)last;
    }
    if (targets != d->seq_targets[sequence]) {
        return QS_FAIL(QS_ERR_INPUT_VALUE,
                       "%s: seq_targets[%lld]=%u, but its labels have %lld; the file is damaged, "
                       "prepare it again",
                       d->path, (long long)sequence, d->seq_targets[sequence], (long long)targets);
    }
    b->n_targets += targets;
    return QS_OK;
}

/* From the file, or from what this rank was sent of it. */
static qs_status read_tokens(const qs_data *d, int64_t begin, size_t bytes, int32_t *tokens,
                             int32_t *labels)
{
    if (d->held != NULL) {
        memcpy(tokens, d->held + begin, bytes);
        memcpy(labels, d->held + d->n_tokens + begin, bytes);
        return QS_OK;
    }
    const int64_t offset = begin * (int64_t)sizeof(int32_t);
    QS_TRY(qs_io_read_all(d->fd, tokens, bytes, d->tokens_at + offset, d->path));
    return qs_io_read_all(d->fd, labels, bytes, d->labels_at + offset, d->path);
}

static qs_status read_sequence(qs_data *d, int64_t sequence, int64_t number, qs_batch *b)
{
    if (sequence < 0 || sequence >= d->n_sequences) {
        return QS_FAIL(QS_ERR_BUG, "%s: there is no sequence %lld", d->path, (long long)sequence);
    }
    const int64_t begin = d->seq_offsets[sequence];
    const int64_t length = d->seq_offsets[sequence + 1] - begin;
    const int64_t docs = d->seq_first_doc[sequence + 1] - d->seq_first_doc[sequence];
    const int64_t at = b->n_tokens;
    const size_t bytes = (size_t)length * sizeof(int32_t);
    if (length > b->token_capacity - at || docs > b->doc_capacity - b->n_docs ||
        at + length > INT32_MAX) {
        return QS_FAIL(QS_ERR_BUG,
                       "%s: sequence %lld with %lld tokens does not fit a batch of %lld", d->path,
                       (long long)sequence, (long long)length, (long long)b->token_capacity);
    }
    QS_TRY(read_tokens(d, begin, bytes, b->tokens + at, b->target + at));
    d->bytes_read += 2 * bytes;
    QS_TRY(check_values(d, sequence, b->tokens + at, b->target + at, length));
    QS_TRY(add_documents(d, sequence, b));
    for (int64_t i = 0; i < length; i++) {
        b->sample[at + i] = number;
        b->row_at[at + i] = i;
    }
    b->n_tokens += length;
    b->n_sequences++;
    return QS_OK;
}

qs_status qs_data_read(qs_data *data, const int64_t *sequence, const int64_t *number, int64_t count,
                       qs_batch *batch)
{
    batch->n_sequences = 0;
    batch->n_tokens = 0;
    batch->n_targets = 0;
    batch->n_docs = 0;
    batch->cu_seqlens[0] = 0;
    for (int64_t i = 0; i < count; i++) {
        QS_TRY(read_sequence(data, sequence[i], number[i], batch));
    }
    return QS_OK;
}
