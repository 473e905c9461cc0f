/* A token file of random documents that all carry loss: for benchmarks.
 *
 *     make_tokens FILE VOCAB SEQUENCES LENGTH */
#include <stdio.h>
#include <stdlib.h>

#include "tests/support/make_data.h"

/* Every token is a target but the first. */
static void unmask(make_data_arrays *a)
{
    a->n_targets = 0;
    for (int64_t i = 0; i < a->n_tokens; i++) {
        a->labels[i] = (int32_t)a->tokens[i];
    }
    for (int64_t s = 0; s < a->n_sequences; s++) {
        a->seq_targets[s] = (uint32_t)(a->seq_offsets[s + 1] - a->seq_offsets[s] - 1);
        a->n_targets += a->seq_targets[s];
    }
}

int main(int argc, char **argv)
{
    if (argc != 5) {
        (void)fprintf(stderr, "usage: make_tokens FILE VOCAB SEQUENCES LENGTH\n");
        return 2;
    }
    const int64_t length = strtoll(argv[4], NULL, 10);
    const make_data_spec spec = {.vocab = strtoll(argv[2], NULL, 10),
                                 .n_sequences = strtoll(argv[3], NULL, 10),
                                 .min_len = length,
                                 .max_len = length,
                                 .seed = 7};
    if (spec.vocab < 1 || spec.n_sequences < 1 || length < 2) {
        (void)fprintf(stderr, "make_tokens: numbers from 1, a length from 2\n");
        return 2;
    }
    make_data_arrays arrays = make_data_create(&spec);
    unmask(&arrays);
    const qs_status st = make_data_write(argv[1], &arrays);
    make_data_free(&arrays);
    if (st != QS_OK) {
        qs_error_print(st);
    }
    return qs_exit_code(st);
}
