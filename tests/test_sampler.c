/* The sampler: every sequence once an epoch, slots that do not depend on anything but the
 * configuration. */
#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <stdlib.h>
#include <string.h>

#include "train/sampler.h"

/* An index of `n` sequences with i + 1 tokens and i % 3 targets each; nothing else of qs_data is
 * looked at. */
static qs_data make_data(int64_t n)
{
    qs_data data = {.n_sequences = n};
    data.seq_offsets = calloc((size_t)n + 1, sizeof *data.seq_offsets);
    data.seq_targets = calloc((size_t)n, sizeof *data.seq_targets);
    for (int64_t i = 0; i < n; i++) {
        data.seq_offsets[i + 1] = data.seq_offsets[i] + i + 1;
        data.seq_targets[i] = (uint32_t)(i % 3);
    }
    return data;
}

static void free_data(qs_data *data)
{
    free(data->seq_offsets);
    free(data->seq_targets);
}

static qs_config make_config(int64_t steps, int64_t epochs, int64_t global_batch,
                             int64_t micro_batch)
{
    qs_config cfg;
    qs_config_defaults(&cfg);
    cfg.train.steps = steps;
    cfg.train.epochs = epochs;
    cfg.train.global_batch = global_batch;
    cfg.train.micro_batch = micro_batch;
    return cfg;
}

typedef struct {
    int64_t n, global_batch, micro_batch;
} sizes;

ParameterizedTestParameters(sampler, an_epoch_has_every_sequence_once)
{
    static sizes list[] = {{1, 1, 1}, {5, 2, 1}, {7, 4, 3}, {64, 16, 2}, {10, 16, 4}, {9, 3, 3}};
    return cr_make_param_array(sizes, list, sizeof list / sizeof *list);
}

ParameterizedTest(sizes *p, sampler, an_epoch_has_every_sequence_once)
{
    qs_data data = make_data(p->n);
    const qs_config cfg = make_config(0, 2, p->global_batch, p->micro_batch);
    const qs_sampler s = qs_sampler_make(&cfg, &data);
    int64_t *seen = calloc((size_t)p->n, sizeof *seen);
    int64_t *sequence = calloc((size_t)p->micro_batch, sizeof *sequence);
    int64_t *number = calloc((size_t)p->micro_batch, sizeof *number);
    int64_t next = 0;
    for (int64_t step = 0; step < s.steps; step++) {
        for (int64_t slot = 0; slot < s.slots; slot++) {
            const int64_t count = qs_sampler_slot(&s, step, slot, sequence, number);
            for (int64_t i = 0; i < count; i++) {
                cr_assert_eq(number[i], next++, "numbers of the run are consecutive");
                seen[sequence[i]]++;
            }
        }
    }
    cr_assert_eq(next, 2 * p->n, "two epochs");
    for (int64_t i = 0; i < p->n; i++) {
        cr_assert_eq(seen[i], 2, "sequence %ld seen %ld times", (long)i, (long)seen[i]);
    }
    free(seen);
    free(sequence);
    free(number);
    free_data(&data);
}

Test(sampler, targets_are_those_of_the_steps_sequences)
{
    qs_data data = make_data(11);
    const qs_config cfg = make_config(5, 0, 4, 3);
    const qs_sampler s = qs_sampler_make(&cfg, &data);
    for (int64_t step = 0; step < 5; step++) {
        int64_t sum = 0, sequence[3], number[3];
        for (int64_t slot = 0; slot < s.slots; slot++) {
            const int64_t count = qs_sampler_slot(&s, step, slot, sequence, number);
            for (int64_t i = 0; i < count; i++) {
                sum += data.seq_targets[sequence[i]];
            }
        }
        cr_assert_eq(qs_sampler_targets(&s, step), sum);
    }
    free_data(&data);
}

Test(sampler, steps_go_on_over_the_end_of_the_data)
{
    qs_data data = make_data(3);
    const qs_config cfg = make_config(4, 0, 5, 2);
    const qs_sampler s = qs_sampler_make(&cfg, &data);
    cr_assert_eq(s.steps, 4);
    cr_assert_eq(s.slots, 3);
    for (int64_t step = 0; step < 4; step++) {
        cr_assert_eq(qs_sampler_step_size(&s, step), 5);
    }
    free_data(&data);
}

/* ---- what the data say about the configuration ---- */

/* In the step that takes an epoch's last sequence, be it the step's last or not. */
Test(sampler, epochs_end_in_the_step_with_their_last_sequence)
{
    static const struct {
        int64_t n, batch;
        const char *ends; /* of steps 1, 2, ... */
    } cases[] = {{9, 4, "..x.x.x"},
                 {4, 2, ".x.x.x"},
                 {3, 8, "xx"},
                 {5, 5, "xxx"},
                 {7, 1, "......x......x......x"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const qs_data data = {.n_sequences = cases[i].n};
        const qs_config cfg = {
            .train = {.epochs = 3, .global_batch = cases[i].batch, .micro_batch = 1}};
        const qs_sampler s = qs_sampler_make(&cfg, &data);
        cr_assert_eq((size_t)s.steps, strlen(cases[i].ends));
        cr_assert_not(qs_sampler_ends_epoch(&s, 0));
        for (int64_t step = 1; step <= s.steps; step++) {
            cr_assert_eq(qs_sampler_ends_epoch(&s, step), cases[i].ends[step - 1] == 'x',
                         "case %d, step %d", (int)i, (int)step);
        }
    }
}

Test(sampler, a_warmup_leaves_something_of_the_epochs)
{
    static const struct {
        double warmup;
        qs_status st;
    } cases[] = {{0, QS_OK}, {0.999, QS_OK},          {1, QS_OK},
                 {3, QS_OK}, {4, QS_ERR_CONFIG_PAIR}, {1000, QS_ERR_CONFIG_PAIR}};
    qs_data data = make_data(9);
    data.path = "train.h5";
    qs_config cfg = make_config(0, 3, 8, 1); /* 27 sequences: 4 steps */
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        qs_error_clear();
        cfg.optim.warmup = cases[i].warmup;
        cr_assert_eq(qs_sampler_check(&cfg, &data), cases[i].st, "%g", cases[i].warmup);
    }
    cr_assert_not_null(strstr(qs_error_text(),
                              "train.h5: optim.warmup=1000 steps leaves nothing of the 4 that "
                              "train.epochs=3 makes of it; lower it"),
                       "%s", qs_error_text());
    free_data(&data);
}
