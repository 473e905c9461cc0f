/* Models of text and images whose text part is a model that is supported: Gemma 3 from 4B on,
 * Mistral Small 3.1 and 3.2. Here their text part becomes a model of text alone: its config.json,
 * and its tensors under the names that they have there. Nothing behind this file knows more than
 * the name of the model that it came out of (qs_hf_config.part_of), by which adapters are named. */
#ifndef QS_HF_HF_TEXT_PART_H
#define QS_HF_HF_TEXT_PART_H

#include <stdbool.h>
#include <stddef.h>

#include "hf/hf_config.h"
#include "hf/safetensors.h"

/** Is `model_type` that of the text part of a `wrapper`? False for a wrapper that is not known. */
bool qs_hf_is_text_part(const char *wrapper, const char *model_type);

enum { QS_HF_NAME_BYTES = 2 * QS_HF_TYPE_BYTES + 24 };

/** What a model is, for people: "llama", or "gemma3_text, the text part of gemma3". */
void qs_hf_config_name(const qs_hf_config *config, char out[QS_HF_NAME_BYTES]);

/** The config.json of the text part: text_config, and what the file around it says for it. Pure: no
 * I/O. \param [out] out   its text, the caller's to free; NULL: `text` is none of a known wrapper.
 * \param [out] part_of  model_type of the wrapper, or "". */
qs_status qs_hf_text_part(char **out, char part_of[QS_HF_TYPE_BYTES], const char *text,
                          size_t bytes, const char *path);

/** Whether `hf_dir` is a folder with a config.json; if not, what to name instead. */
qs_status qs_hf_check_folder(const char *hf_dir);

/** Read and parse the config.json at `path`, of a wrapper that of its text part. \param [out] text
 * what was parsed, with a NUL behind it, the caller's to free; NULL is fine. */
qs_status qs_hf_config_read(qs_hf_config *out, char **text, const char *path, size_t max_bytes);

/** Give the tensors of the text part their plain names and leave the others out, if `config` is
 * that of a text part; what was found before is void then. \return QS_ERR_INPUT_TENSOR for a name
 * of no known part, or names in both spellings. */
qs_status qs_hf_take_text_tensors(qs_st_dir *dir, const qs_hf_config *config);

#endif
