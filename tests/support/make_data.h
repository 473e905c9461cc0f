/* Token files for tests: random ids, ragged lengths, masked labels, several documents a sequence.
 *
 *     make_data_spec spec = {.vocab = 97, .n_sequences = 20, .min_len = 3, .max_len = 40, .max_docs
 * = 3, .seed = 7}; cr_assert_eq(make_data_file(path, &spec), QS_OK);
 *
 * A test that wants a wrong file changes the arrays between make_data_create and make_data_write.
 */
#ifndef QS_TESTS_MAKE_DATA_H
#define QS_TESTS_MAKE_DATA_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"

typedef struct {
    int64_t vocab, n_sequences;
    int64_t min_len, max_len; /* tokens per sequence; at least 1 */
    int64_t max_docs;         /* per sequence; 0 or 1: one */
    uint64_t seed;
    bool prompts; /* every label -100 */
} make_data_spec;

typedef struct {
    int64_t vocab, seq_len, packed, n_sequences, n_tokens, n_targets, n_docs, decode_count, version;
    uint32_t *tokens;
    int32_t *labels;
    int64_t *seq_offsets, *doc_offsets;
    uint32_t *seq_targets;
    int64_t *decode_offsets;
    uint8_t *decode_bytes;
    bool wrong_hash;
    const char *chat_template;   /* NULL: none */
    const char *template_sha256; /* NULL: the right one */
} make_data_arrays;

/** Valid arrays; the first half or so of each document is masked. */
make_data_arrays make_data_create(const make_data_spec *spec);
void make_data_free(make_data_arrays *a);

/** Write them as they are. */
qs_status make_data_write(const char *path, const make_data_arrays *a);

/** Both. */
qs_status make_data_file(const char *path, const make_data_spec *spec);

#endif
