/* Token files and the order of samples.
 *
 * The index (offsets, target counts) is replicated; tokens are read by the rank that trains on
 * them. A rank whose host does not see the file is sent its tokens and labels once and keeps them.
 * Sample order is a keyed permutation per epoch, a pure function of (seed, epoch, position), so
 * there is no sampler state to save. */
#ifndef QS_DATA_DATA_H
#define QS_DATA_DATA_H

#include <stdint.h>
#include <stdio.h>

#include "comm/comm.h"

typedef struct {
    char *path;
    int64_t vocab, seq_len, n_sequences, n_tokens, n_targets, n_docs;
    int64_t *seq_offsets; /* [n_sequences + 1] */
    int64_t *doc_offsets; /* [n_docs + 1] */
    int64_t
        *seq_first_doc; /* [n_sequences + 1] index of the sequence's first border in doc_offsets */
    uint32_t *seq_targets;        /* [n_sequences] */
    int64_t tokens_at, labels_at; /* file offsets */
    char content[33];             /* tokens_xxh3; with `layout` it names the data in checkpoints */
    char labels[33];              /* labels_xxh3 */
    char layout[33];              /* XXH3-128 of labels_xxh3, seq_offsets and doc_offsets */
    char tokenizer[65];           /* tokenizer_sha256; "" where it is not known */
    char *chat_template; /* what shaped the data; NULL: none did, or the file does not keep it */
    int fd;              /* -1: this rank does not see the file */
    int32_t *held;       /* [2, n_tokens] tokens, then labels, where it does not; else NULL */
    uint64_t bytes_read;
    struct { /* the file when its hashes were checked */
        int64_t bytes, time_ns;
    } checked;
} qs_data;

/** Open and check; the lowest rank that sees the file reads the index, the others get it.
 * QS_ERR_DISAGREE where another host has another file of this name. Collective. `model_vocab` > 0:
 * token ids must be below it. `max_seq_len` > 0: longer sequences are refused by number. */
qs_status qs_data_open(qs_data **out, const char *path, int64_t model_vocab, int64_t max_seq_len,
                       qs_comm *comm);
void qs_data_close(qs_data *data);

/** Read tokens and labels once and compare them with their hashes: the first rank of every host
 * that sees the file does, so that no damaged copy is trained on. Collective. \return
 * QS_ERR_INPUT_HASH.
 */
qs_status qs_data_check_hashes(qs_data *data, qs_comm *comm);

/** Is the file what qs_data_check_hashes has read? Where its size or time is another, it is hashed
 * anew: something else in its place is QS_ERR_INPUT_HASH, and nothing read from it counts. A file
 * that was renamed into its place is none of ours: the old one stays open. Collective. */
qs_status qs_data_check_unchanged(qs_data *data, qs_comm *comm);

/** Bytes of the index, and of tokens and labels where this rank holds them because it does not see
 * the file: for the plan. */
size_t qs_data_bytes(const qs_data *data);

/** Data on paper, for planning before there is a file: the index of full sequences of `seq_len`
 * tokens, a document each, with loss wherever there can be any. Nothing can be read from it.
 * qs_data_close frees it. Not collective. */
qs_status qs_data_assume(qs_data **out, int64_t seq_len);

/** One micro-batch: the tokens of up to `micro_batch` whole sequences, back to back, never padded.
 */
typedef struct {
    int64_t n_sequences, n_tokens, n_targets;
    int32_t *tokens;     /* [n_tokens] */
    int32_t *target;     /* [n_tokens] id that position t has to predict, -1 if it carries no loss
                            (shifted already) */
    int32_t *position;   /* [n_tokens] within the document */
    int32_t *cu_seqlens; /* [n_docs + 1] */
    int n_docs;
    int64_t *sample; /* [n_tokens] number of the row's sequence in the run: epoch * n_sequences +
                        position in epoch */
    int64_t *row_at; /* [n_tokens] row within its sequence */
    int64_t token_capacity, doc_capacity;
} qs_batch;

/** Room for `tokens` tokens and as many documents. */
qs_status qs_batch_create(qs_batch **out, int64_t tokens, int64_t docs);

/** Bytes that it takes: for the plan. */
size_t qs_batch_bytes(int64_t tokens, int64_t docs);
void qs_batch_destroy(qs_batch *batch);

/** Lay out `tokens` tokens as documents of `length` (the last may be shorter), samples from
 * `sample` on: positions and borders. Which tokens, and what they have to predict, is the caller's.
 */
void qs_batch_lay_out(qs_batch *batch, int64_t tokens, int64_t length, int64_t sample);

/** Read the sequences `sequence[0..count)` of the file into `batch`; `number[i]` is what goes to
 * `sample`. Not collective. */
qs_status qs_data_read(qs_data *data, const int64_t *sequence, const int64_t *number, int64_t count,
                       qs_batch *batch);

/** The sequence at `position` of `epoch`: keyed permutation by (seed, epoch). */
int64_t qs_data_order(const qs_data *data, uint64_t seed, int64_t epoch, int64_t position);

/** Most tokens that `count` consecutive samples can have: an upper bound over all epochs' orders.
 * Samples across the border of two epochs can hold a sequence twice, so the longest ones count
 * twice. */
int64_t qs_data_longest(const qs_data *data, int64_t count);

/** Likewise the most positions with loss. */
int64_t qs_data_most_targets(const qs_data *data, int64_t count);

/** The decode table, for `sample` and `inspect`. Bytes of `id` in *bytes, borrowed. */
typedef struct {
    int64_t vocab;
    int64_t *offsets;
    uint8_t *bytes;
} qs_decode_table;
qs_status qs_decode_table_read(qs_decode_table *out, const char *path);
void qs_decode_table_free(qs_decode_table *table);

/** Check a whole token file, for `qshard check`: the index, both hashes, every id and label,
 * seq_targets, the decode table. */
qs_status qs_data_verify(const char *path);

/** Print what a token file holds, for `qshard inspect`: totals, lengths, and the first sequence as
 * text, with what is not learned in brackets. */
qs_status qs_data_describe(const char *path, FILE *out);

#endif
