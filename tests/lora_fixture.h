/* A small model, its configuration and layout: for the tests of the LoRA vector and of its PEFT
 * form. */
#ifndef QS_TESTS_LORA_FIXTURE_H
#define QS_TESTS_LORA_FIXTURE_H

#include <criterion/criterion.h>

#include "lora/lora.h"

/* A small model with grouped queries, so that the seven shapes differ. */
static inline qs_hf_config model(void)
{
    qs_hf_config m = {.n_layers = 3, .n_heads = 6, .n_kv_heads = 2, .head_dim = 16};
    m.hidden = 96;
    m.ffn_hidden = 200;
    m.vocab = 100;
    return m;
}

static inline qs_config config(uint32_t targets)
{
    qs_config c;
    qs_config_defaults(&c);
    c.lora.rank = 8;
    c.lora.alpha = 12;
    c.lora.targets = targets;
    return c;
}

static inline qs_lora_layout layout_of(const qs_config *c)
{
    qs_hf_config m = model();
    qs_lora_layout layout;
    cr_assert_eq(qs_lora_layout_make(&layout, &m, c), QS_OK, "%s", qs_error_text());
    return layout;
}

#endif
