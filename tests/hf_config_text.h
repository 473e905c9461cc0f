/* Texts of config.json for tests of what they mean and of what is refused. */
#ifndef QS_TESTS_HF_CONFIG_TEXT_H
#define QS_TESTS_HF_CONFIG_TEXT_H

#include <stdio.h>
#include <string.h>

#include "hf/hf_config.h"

static inline qs_status parse(qs_hf_config *out, const char *text)
{
    qs_error_clear();
    return qs_hf_config_parse(out, text, strlen(text), "config.json");
}

/* A good config with `extra` members appended. */
static inline const char *with(const char *extra)
{
    static char text[4096];
    (void)snprintf(text, sizeof text,
                   "{\"model_type\":\"llama\",\"hidden_size\":64,\"intermediate_size\":160,"
                   "\"num_hidden_layers\":2,\"num_attention_heads\":4,\"vocab_size\":100%s%s}",
                   extra[0] != '\0' ? "," : "", extra);
    return text;
}

/* The same for another architecture, with three layers and grouped queries. */
static inline const char *as(const char *type, const char *class_name, const char *extra)
{
    static char text[2048];
    snprintf(text, sizeof text,
             "{\"model_type\":\"%s\",\"architectures\":[\"%s\"],\"hidden_size\":64,"
             "\"intermediate_size\":160,\"num_hidden_layers\":3,\"num_attention_heads\":4,"
             "\"num_key_value_heads\":2,\"vocab_size\":320,\"torch_dtype\":\"bfloat16\"%s%s}",
             type, class_name, extra[0] != '\0' ? "," : "", extra);
    return text;
}

#endif
