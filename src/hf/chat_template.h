/* Chat templates of Hugging Face directories: the text that turns a conversation into a prompt.
 *
 * transformers takes DIR/chat_template.jinja before "chat_template" of tokenizer_config.json, and
 * llama.cpp's converter the other way round, so a directory must hold one template alone. */
#ifndef QS_HF_CHAT_TEMPLATE_H
#define QS_HF_CHAT_TEMPLATE_H

#include <stddef.h>

#include "base/status.h"

#define QS_CHAT_TEMPLATE_NAME "chat_template.jinja"

enum {
    QS_CHAT_TEMPLATE_MAX =
        256 << 10,                /* bytes of one that is kept; qprep/tokenfile.py has the same */
    QS_CHAT_FILE_MAX = 256 << 20, /* of a file that may hold one */
};

/** DIR/chat_template.jinja, NULL where there is none; at most QS_CHAT_TEMPLATE_MAX bytes of UTF-8.
 * The caller frees *text. */
qs_status qs_chat_template_read(const char *dir, char **text);

/** The template that transformers takes for the model in `dir`, NULL where it has none: the file,
 * else the one of tokenizer_config.json, of several the one called "default". The caller frees
 * *text. */
qs_status qs_chat_template_of_model(const char *dir, char **text);

/** The text of a tokenizer_config.json with `chat_template` in place of its own, where it has any;
 * nothing else of it changes. `path` is for messages. The caller frees *out. */
qs_status qs_chat_template_replace(const char *config, size_t bytes, const char *chat_template,
                                   const char *path, char **out);

#endif
