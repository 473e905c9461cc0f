/* What the files of this folder share. */
#ifndef QS_LORA_LORA_IMPL_H
#define QS_LORA_LORA_IMPL_H

#include "lora/lora.h"

/** Parse adapter_config.json. What would change the function of the adapter and is not supported
 * (biases, patterns, trained whole modules, ...) is refused by name. Which linears it adapts, the
 * tensors say: target_modules may be a pattern over the names of a model's modules. Pure: no I/O.
 */
qs_status qs_peft_config_parse(qs_peft_config *out, const char *text, size_t bytes,
                               const char *path);

/** The text of adapter_config.json, with the linears that `layout` adapts; caller frees. NULL
 * without memory. */
char *qs_peft_config_text(const qs_config *cfg, const qs_lora_layout *layout,
                          const char *base_name);

/** The text of qshard.json; caller frees. NULL without memory. */
char *qs_peft_origin_text(const char *base_sha256);

/** Whether a text has the form of a hash: what else is recorded of a base, is left out. */
bool qs_peft_is_hash(const char *text);

/** The inverse of qs_lora_peft_name; false for any other name. */
bool qs_lora_peft_parse(const char *name, qs_peft_naming *naming, int *layer, qs_linear *linear,
                        char *which);

/** alpha / rank, or alpha / sqrt(rank). */
float qs_lora_scale(double alpha, int64_t lora_rank, bool rslora);

#endif
