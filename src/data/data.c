/* Token files: opening on all ranks, and the order of samples.
 *
 * The lowest rank that sees the file reads and checks the index and sends it to the others; each
 * rank opens the file for its own tokens. The first rank of every other host also looks at the
 * hashes, so that two hosts cannot train on two files of one name. Ranks of a host without the file
 * are sent all tokens and labels: the order of samples runs through the whole file. */
#include "data/data.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/mem.h"
#include "base/rng.h"
#include "data/data_impl.h"
#include "store/hash.h"
#include "store/seen.h"

/** The scalars of the index, as they travel. */
typedef struct {
    int64_t vocab, seq_len, n_sequences, n_tokens, n_targets, n_docs, tokens_at, labels_at;
    char content[33], labels[33], layout[33], tokenizer[65];
} header;

void qs_data_close(qs_data *data)
{
    if (data == NULL) {
        return;
    }
    if (data->fd >= 0) {
        (void)close(data->fd); /* read only */
    }
    qs_mem_free(data->held);
    qs_mem_free(data->seq_offsets);
    qs_mem_free(data->doc_offsets);
    qs_mem_free(data->seq_first_doc);
    qs_mem_free(data->seq_targets);
    free(data->chat_template);
    free(data->path);
    free(data);
}

static qs_status create(qs_data **out, const char *path)
{
    qs_data *d = calloc(1, sizeof *d);
    if (d == NULL || (d->path = strdup(path)) == NULL) {
        free(d);
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory to open it", path);
    }
    d->fd = -1;
    *out = d;
    return QS_OK;
}

qs_status qs_data_open_bytes(qs_data *d)
{
    d->fd = open(d->path, O_RDONLY | O_CLOEXEC);
    if (d->fd < 0) {
        return QS_FAIL(QS_ERR_INPUT_MISSING, "%s: cannot be opened: %s", d->path, strerror(errno));
    }
    return QS_OK;
}

/** Open, read and check the index on this process. */
static qs_status load_index(qs_data *d)
{
    qs_h5 *file = NULL;
    QS_TRY(qs_h5_open(&file, d->path));
    qs_status st = qs_data_read_index(d, file);
    qs_status closed = qs_h5_close(file);
    return st != QS_OK ? st : closed;
}

qs_status qs_data_open_alone(qs_data **out, const char *path)
{
    qs_data *d = NULL;
    *out = NULL;
    QS_TRY(create(&d, path));
    qs_status st = load_index(d);
    if (st == QS_OK) {
        st = qs_data_open_bytes(d);
    }
    if (st != QS_OK) {
        qs_data_close(d);
        return st;
    }
    *out = d;
    return QS_OK;
}

static qs_status share_header(qs_data *d, const qs_seen *seen)
{
    header h = {.vocab = d->vocab,
                .seq_len = d->seq_len,
                .n_sequences = d->n_sequences,
                .n_tokens = d->n_tokens,
                .n_targets = d->n_targets,
                .n_docs = d->n_docs,
                .tokens_at = d->tokens_at,
                .labels_at = d->labels_at};
    memcpy(h.content, d->content, sizeof h.content);
    memcpy(h.labels, d->labels, sizeof h.labels);
    memcpy(h.layout, d->layout, sizeof h.layout);
    memcpy(h.tokenizer, d->tokenizer, sizeof h.tokenizer);
    QS_TRY(qs_comm_bcast(seen->comm, &h, sizeof h, seen->root));
    d->vocab = h.vocab;
    d->seq_len = h.seq_len;
    d->n_sequences = h.n_sequences;
    d->n_tokens = h.n_tokens;
    d->n_targets = h.n_targets;
    d->n_docs = h.n_docs;
    d->tokens_at = h.tokens_at;
    d->labels_at = h.labels_at;
    memcpy(d->content, h.content, sizeof h.content);
    memcpy(d->labels, h.labels, sizeof h.labels);
    memcpy(d->layout, h.layout, sizeof h.layout);
    memcpy(d->tokenizer, h.tokenizer, sizeof h.tokenizer);
    return QS_OK;
}

static qs_status allocate_index(qs_data *d)
{
    QS_TRY(QS_ALLOC(&d->seq_offsets, d->n_sequences + 1, QS_MEM_DATA));
    QS_TRY(QS_ALLOC(&d->seq_first_doc, d->n_sequences + 1, QS_MEM_DATA));
    QS_TRY(QS_ALLOC(&d->seq_targets, d->n_sequences, QS_MEM_DATA));
    return QS_ALLOC(&d->doc_offsets, d->n_docs + 1, QS_MEM_DATA);
}

static qs_status share_index(qs_data *d, const qs_seen *seen)
{
    qs_comm *comm = seen->comm;
    const int root = seen->root;
    QS_TRY(share_header(d, seen));
    QS_TRY(qs_comm_bcast_text(comm, &d->chat_template, root));
    QS_TRY(qs_comm_agree(comm, qs_comm_rank(comm) == root ? QS_OK : allocate_index(d)));
    const size_t sequences = (size_t)d->n_sequences;
    const size_t documents = (size_t)d->n_docs;
    QS_TRY(qs_comm_bcast(comm, d->seq_offsets, (sequences + 1) * sizeof *d->seq_offsets, root));
    QS_TRY(qs_comm_bcast(comm, d->seq_first_doc, (sequences + 1) * sizeof *d->seq_first_doc, root));
    QS_TRY(qs_comm_bcast(comm, d->seq_targets, sequences * sizeof *d->seq_targets, root));
    return qs_comm_bcast(comm, d->doc_offsets, (documents + 1) * sizeof *d->doc_offsets, root);
}

/** Both hashes, as the file of this host has them. */
typedef struct {
    char tokens[QS_XXH128_HEX], labels[QS_XXH128_HEX];
} content;

static qs_status read_content(const char *path, content *out)
{
    qs_h5 *file = NULL;
    QS_TRY(qs_h5_open(&file, path));
    qs_status st = qs_h5_attr_get_text(file, "tokens_xxh3", out->tokens, sizeof out->tokens);
    st = st == QS_OK ? qs_h5_attr_get_text(file, "labels_xxh3", out->labels, sizeof out->labels)
                     : st;
    qs_status closed = qs_h5_close(file);
    return st != QS_OK ? st : closed;
}

/** Every host that has a file of this name must have the same one; *found: its hashes. */
static qs_status compare_copies(const qs_data *d, const qs_seen *seen, content *found)
{
    char mark[160] = "";
    qs_status st = QS_OK;
    memset(found, 0, sizeof *found);
    if (qs_comm_rank(seen->comm) == seen->root || seen->compares) {
        st = read_content(d->path, found);
        snprintf(mark, sizeof mark, "tokens_xxh3=%s and labels_xxh3=%s", found->tokens,
                 found->labels);
    }
    QS_TRY(qs_seen_compare(seen, d->path, st, mark));
    return qs_comm_bcast(seen->comm, found, sizeof *found, seen->root);
}

/** What was sent must be what the file says of itself. */
static qs_status check_held(const qs_data *d, const content *want)
{
    const size_t bytes = (size_t)d->n_tokens * sizeof *d->held;
    char hex[QS_XXH128_HEX];
    qs_xxh3_128_hex(d->held, bytes, hex);
    bool same = strcmp(hex, want->tokens) == 0;
    qs_xxh3_128_hex(d->held + d->n_tokens, bytes, hex);
    same = same && strcmp(hex, want->labels) == 0;
    return same ? QS_OK
                : QS_FAIL(QS_ERR_INPUT_HASH,
                          "%s: its tokens or labels do not match their hashes; prepare the data "
                          "again",
                          d->path);
}

static qs_status open_everywhere(qs_data *d, const qs_seen *seen)
{
    content want;
    qs_status st = seen->mine ? qs_data_open_bytes(d) : QS_OK;
    QS_TRY(qs_comm_agree(seen->comm, st));
    if (seen->simple) {
        return QS_OK;
    }
    QS_TRY(compare_copies(d, seen, &want));
    if (seen->everywhere) {
        return QS_OK;
    }
    const size_t bytes = (size_t)d->n_tokens * sizeof *d->held;
    qs_stretch stretches[2] = {{.offset = d->tokens_at, .bytes = bytes},
                               {.offset = d->labels_at, .bytes = bytes}};
    if (!seen->mine) {
        st = QS_ALLOC(&d->held, 2 * d->n_tokens, QS_MEM_DATA);
        stretches[0].to = d->held;
        stretches[1].to = d->held + d->n_tokens;
    }
    QS_TRY(qs_seen_read(seen, st, d->fd, d->path, stretches, seen->mine ? 0 : 2));
    return qs_comm_agree(seen->comm, seen->mine ? QS_OK : check_held(d, &want));
}

qs_status qs_data_open(qs_data **out, const char *path, int64_t model_vocab, int64_t max_seq_len,
                       qs_comm *comm)
{
    qs_data *d = NULL;
    qs_seen seen;
    *out = NULL;
    QS_TRY(qs_seen_find(&seen, path, "its ranks are sent all tokens by", comm));
    qs_status st = create(&d, path);
    if (st == QS_OK && qs_comm_rank(comm) == seen.root) {
        st = load_index(d);
        st = st != QS_OK ? st : qs_data_check_fit(d, model_vocab, max_seq_len);
    }
    QS_GOTO(qs_comm_agree(comm, st));
    QS_GOTO(share_index(d, &seen));
    QS_GOTO(open_everywhere(d, &seen));
    *out = d;
    d = NULL;
done:
    qs_data_close(d);
    return st;
}

size_t qs_data_bytes(const qs_data *data)
{
    const size_t per_sequence = 2 * sizeof(int64_t) + sizeof(uint32_t);
    const size_t index = (size_t)(data->n_sequences + 1) * per_sequence +
                         (size_t)(data->n_docs + 1) * sizeof(int64_t);
    return index + (data->held != NULL ? 2 * (size_t)data->n_tokens * sizeof *data->held : 0);
}

/* ---- on paper ---- */

/* One sequence stands for all: they are alike. */
qs_status qs_data_assume(qs_data **out, int64_t seq_len)
{
    qs_status st = QS_OK;
    qs_data *d = NULL;
    QS_TRY(create(&d, "assumed"));
    d->seq_len = d->n_tokens = seq_len;
    d->n_sequences = d->n_docs = 1;
    d->n_targets = seq_len - 1; /* the last token predicts nothing */
    QS_GOTO(QS_ALLOC(&d->seq_offsets, 2, QS_MEM_DATA));
    QS_GOTO(QS_ALLOC(&d->doc_offsets, 2, QS_MEM_DATA));
    QS_GOTO(QS_ALLOC(&d->seq_first_doc, 2, QS_MEM_DATA));
    QS_GOTO(QS_ALLOC(&d->seq_targets, 1, QS_MEM_DATA));
    d->seq_offsets[1] = d->doc_offsets[1] = seq_len;
    d->seq_first_doc[1] = 1;
    d->seq_targets[0] = (uint32_t)d->n_targets;
    *out = d;
    d = NULL;
done:
    qs_data_close(d);
    return st;
}

/* ---- order ---- */

int64_t qs_data_order(const qs_data *data, uint64_t seed, int64_t epoch, int64_t position)
{
    return qs_rng_permute(seed, (uint64_t)epoch, data->n_sequences, position);
}

typedef int64_t (*value_of)(const qs_data *d, int64_t sequence);

static int64_t length_of(const qs_data *d, int64_t sequence)
{
    return d->seq_offsets[sequence + 1] - d->seq_offsets[sequence];
}

static int64_t targets_of(const qs_data *d, int64_t sequence)
{
    return d->seq_targets[sequence];
}

/** The `rank`-th largest value, from 1: the largest border that as many values reach. Sorting a
 * copy would need memory, which one rank alone might lack. */
static int64_t largest(const qs_data *d, value_of value, int64_t rank)
{
    int64_t low = 0, high = d->seq_len; /* that many reach `low`; all values are at most `high` */
    while (low < high) {
        const int64_t middle = high - (high - low) / 2;
        int64_t reach = 0;
        for (int64_t s = 0; s < d->n_sequences; s++) {
            reach += value(d, s) >= middle;
        }
        low = reach >= rank ? middle : low;
        high = reach >= rank ? high : middle - 1;
    }
    return low;
}

/** Sum of the `count` largest values. */
static int64_t sum_of_largest(const qs_data *d, value_of value, int64_t count)
{
    if (count == 0) {
        return 0;
    }
    const int64_t border = largest(d, value, count);
    int64_t sum = 0, above = 0;
    for (int64_t s = 0; s < d->n_sequences; s++) {
        const int64_t v = value(d, s);
        sum += v > border ? v : 0;
        above += v > border;
    }
    return sum + (count - above) * border;
}

/** Largest sum of the values of `count` consecutive samples: each sequence as often as that many
 * can hold it. */
static int64_t largest_sum(const qs_data *d, value_of value, int64_t count)
{
    const int64_t n = d->n_sequences;
    /* The end of one epoch, whole ones, the begin of another. */
    const int64_t times = count < 2 ? 1 : (count - 2) / n + 2;
    const int64_t whole = count / times; /* sequences that are there so often: at most n */
    int64_t sum = times * sum_of_largest(d, value, whole);
    if (whole < n && count % times > 0) {
        sum += count % times * largest(d, value, whole + 1);
    }
    return sum;
}

int64_t qs_data_longest(const qs_data *data, int64_t count)
{
    return largest_sum(data, length_of, count);
}

int64_t qs_data_most_targets(const qs_data *data, int64_t count)
{
    return largest_sum(data, targets_of, count);
}
