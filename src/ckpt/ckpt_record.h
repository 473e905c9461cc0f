/* What the manifest of a checkpoint says beside its files: whose state it is, and enough about LoRA
 * to read it without the base. */
#ifndef QS_CKPT_CKPT_RECORD_H
#define QS_CKPT_CKPT_RECORD_H

#include "ckpt/ckpt.h"

/** What the manifest carries beside the files: the owner's part of manifest.json. */
typedef struct {
    char *config_yaml;
    char base_sha256[65];
    char data_content[33], data_layout[33];
    int64_t tokens_seen;
    char device[192];
    char *chat_template; /* NULL: none, or from before it was kept */
    int n_layers;
    qs_peft_naming naming; /* plain in checkpoints from before it was kept */
    int64_t out[QS_LINEAR_COUNT], in[QS_LINEAR_COUNT];
} qs_ckpt_record;

/** The record as JSON text; caller frees. NULL without memory. */
char *qs_ckpt_record_text(const qs_ckpt_meta *meta, const qs_lora_layout *layout);

/** Parse and check what qs_ckpt_record_text wrote. Free with qs_ckpt_record_free. */
qs_status qs_ckpt_record_parse(qs_ckpt_record *out, const char *json, const char *path);
void qs_ckpt_record_free(qs_ckpt_record *record);

#endif
