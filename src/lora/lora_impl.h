/* What the files of this folder share. */
#ifndef QS_LORA_LORA_IMPL_H
#define QS_LORA_LORA_IMPL_H

#include "lora/lora.h"
#include "store/hash.h"

/** What adapter_config.json says, as far as it matters here. */
typedef struct {
    int64_t lora_rank;
    double alpha, dropout;
    bool rslora, dora;
} qs_peft_config;

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

/** Read and parse DIR/adapter_config.json. */
qs_status qs_peft_config_read(qs_peft_config *out, const char *dir);

/** The text of qshard.json; caller frees. NULL without memory. */
char *qs_peft_origin_text(const char *base_sha256);

/** Whether a text has the form of a hash: what else is recorded of a base, is left out. */
bool qs_peft_is_hash(const char *text);

/** hashes_sha256 of the base that DIR/qshard.json names; "" where there is no such file. */
qs_status qs_peft_read_base(const char *dir, char out[QS_SHA256_HEX]);

/** The linears (bit per qs_linear) of which DIR/adapter_model.safetensors has tensors. \return
 * QS_ERR_INPUT_TENSOR naming a tensor of anything else, or the first layer that differs. */
qs_status qs_peft_targets(const char *dir, uint32_t *targets);

/** The inverse of qs_lora_peft_name; false for any other name. */
bool qs_lora_peft_parse(const char *name, qs_peft_naming *naming, int *layer, qs_linear *linear,
                        char *which);

/** alpha / rank, or alpha / sqrt(rank). */
float qs_lora_scale(double alpha, int64_t lora_rank, bool rslora);

#endif
