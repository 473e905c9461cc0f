#include "make_data.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "store/h5.h"
#include "store/hash.h"
#include "store/io.h"

static uint64_t next(uint64_t *state)
{
    uint64_t z = (*state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static int64_t between(uint64_t *state, int64_t low, int64_t high)
{
    return low + (int64_t)(next(state) % (uint64_t)(high - low + 1));
}

/** Fill one document; returns the number of its targets. */
static uint32_t fill_document(make_data_arrays *a, int64_t begin, int64_t end,
                              const make_data_spec *spec, uint64_t *state)
{
    uint32_t targets = 0;
    int64_t masked = between(state, 0, end - begin);
    for (int64_t i = begin; i < end; i++) {
        a->tokens[i] = (uint32_t)between(state, 0, spec->vocab - 1);
        bool learned = !spec->prompts && i - begin >= masked;
        a->labels[i] = learned ? (int32_t)a->tokens[i] : -100;
        targets += learned && i > begin;
    }
    return targets;
}

/** Cut a sequence into documents and fill them. */
static void fill_sequence(make_data_arrays *a, int64_t s, const make_data_spec *spec,
                          uint64_t *state)
{
    int64_t begin = a->seq_offsets[s];
    const int64_t end = a->seq_offsets[s + 1];
    int64_t docs = between(state, 1, spec->max_docs > 1 ? spec->max_docs : 1);
    while (begin < end) {
        docs--;
        int64_t cut =
            docs > 0 && end - begin > 1 ? begin + between(state, 1, end - begin - 1) : end;
        a->seq_targets[s] += fill_document(a, begin, cut, spec, state);
        a->doc_offsets[++a->n_docs] = cut;
        begin = cut;
    }
    a->n_targets += a->seq_targets[s];
}

/** Id i decodes to "<i>". */
static void fill_decode(make_data_arrays *a)
{
    int64_t at = 0;
    a->decode_count = a->vocab + 1;
    a->decode_offsets =
        calloc((size_t)a->decode_count + 8, sizeof *a->decode_offsets); /* room for wrong counts */
    a->decode_bytes = calloc((size_t)a->vocab * 16 + 1, 1);
    for (int64_t i = 0; i < a->vocab; i++) {
        a->decode_offsets[i] = at;
        at += snprintf((char *)a->decode_bytes + at, 16, "<%lld>", (long long)i);
    }
    a->decode_offsets[a->vocab] = at;
}

make_data_arrays make_data_create(const make_data_spec *spec)
{
    uint64_t state = spec->seed;
    make_data_arrays a = {.vocab = spec->vocab,
                          .seq_len = spec->max_len,
                          .packed = spec->max_docs > 1,
                          .n_sequences = spec->n_sequences,
                          .version = 1};
    a.seq_offsets = calloc((size_t)spec->n_sequences + 1, sizeof *a.seq_offsets);
    a.seq_targets = calloc((size_t)spec->n_sequences, sizeof *a.seq_targets);
    for (int64_t s = 0; s < spec->n_sequences; s++) {
        a.seq_offsets[s + 1] = a.seq_offsets[s] + between(&state, spec->min_len, spec->max_len);
    }
    a.n_tokens = a.seq_offsets[spec->n_sequences];
    a.tokens = calloc((size_t)a.n_tokens, sizeof *a.tokens);
    a.labels = calloc((size_t)a.n_tokens, sizeof *a.labels);
    a.doc_offsets = calloc((size_t)a.n_tokens + 1, sizeof *a.doc_offsets);
    for (int64_t s = 0; s < spec->n_sequences; s++) {
        fill_sequence(&a, s, spec, &state);
    }
    fill_decode(&a);
    return a;
}

void make_data_free(make_data_arrays *a)
{
    free(a->tokens);
    free(a->labels);
    free(a->seq_offsets);
    free(a->doc_offsets);
    free(a->seq_targets);
    free(a->decode_offsets);
    free(a->decode_bytes);
}

static qs_status put_template(qs_h5 *file, const make_data_arrays *a)
{
    char hash[QS_SHA256_HEX] = "";
    if (a->chat_template != NULL) {
        qs_sha256_hex(a->chat_template, strlen(a->chat_template), hash);
        QS_TRY(qs_h5_attr_put_text(file, "chat_template", a->chat_template));
    }
    return qs_h5_attr_put_text(file, "template_sha256",
                               a->template_sha256 != NULL ? a->template_sha256 : hash);
}

static qs_status put_attributes(qs_h5 *file, const make_data_arrays *a)
{
    char hash[QS_XXH128_HEX];
    const struct {
        const char *name;
        int64_t value;
    } integers[] = {{"format_version", a->version},  {"vocab_size", a->vocab},
                    {"seq_len", a->seq_len},         {"packed", a->packed},
                    {"n_sequences", a->n_sequences}, {"n_tokens", a->n_tokens},
                    {"n_targets", a->n_targets}};
    QS_TRY(qs_h5_attr_put_text(file, "format", "qshard-data"));
    for (size_t i = 0; i < sizeof integers / sizeof *integers; i++) {
        QS_TRY(qs_h5_attr_put_i64(file, integers[i].name, integers[i].value));
    }
    QS_TRY(qs_h5_attr_put_text(file, "tokenizer_sha256", ""));
    QS_TRY(put_template(file, a));
    QS_TRY(qs_h5_attr_put_text(file, "source", "made for a test"));
    qs_xxh3_128_hex(a->tokens, (size_t)a->n_tokens * 4 - (a->wrong_hash ? 1 : 0), hash);
    QS_TRY(qs_h5_attr_put_text(file, "tokens_xxh3", hash));
    qs_xxh3_128_hex(a->labels, (size_t)a->n_tokens * 4, hash);
    return qs_h5_attr_put_text(file, "labels_xxh3", hash);
}

static qs_status put(qs_h5 *file, const char *name, qs_dtype dtype, int64_t count, const void *data)
{
    qs_h5_info info = {.dtype = dtype, .rank = 1, .dims = {count}};
    return qs_h5_dataset_put(file, name, &info, data);
}

static qs_status put_datasets(qs_h5 *file, const make_data_arrays *a)
{
    QS_TRY(put(file, "tokens", QS_I32, a->n_tokens, a->tokens));
    QS_TRY(put(file, "labels", QS_I32, a->n_tokens, a->labels));
    QS_TRY(put(file, "seq_offsets", QS_I64, a->n_sequences + 1, a->seq_offsets));
    QS_TRY(put(file, "doc_offsets", QS_I64, a->n_docs + 1, a->doc_offsets));
    QS_TRY(put(file, "seq_targets", QS_I32, a->n_sequences, a->seq_targets));
    QS_TRY(put(file, "decode_offsets", QS_I64, a->decode_count, a->decode_offsets));
    return put(file, "decode_bytes", QS_U8, a->decode_offsets[a->vocab], a->decode_bytes);
}

qs_status make_data_write(const char *path, const make_data_arrays *a)
{
    qs_h5 *file = NULL;
    void *image = NULL;
    size_t bytes = 0;
    QS_TRY(qs_h5_create(&file, NULL));
    qs_status st = put_attributes(file, a);
    st = st != QS_OK ? st : put_datasets(file, a);
    qs_status closed = qs_h5_close_image(file, &image, &bytes);
    st = st != QS_OK ? st : closed;
    if (st == QS_OK) {
        st = qs_io_write_file(path, image, bytes);
    }
    free(image);
    return st;
}

qs_status make_data_file(const char *path, const make_data_spec *spec)
{
    make_data_arrays a = make_data_create(spec);
    qs_status st = make_data_write(path, &a);
    make_data_free(&a);
    return st;
}
