/* Whether data were prepared with the model's tokenizer. */
#ifndef QS_TRAIN_TOKENIZERS_H
#define QS_TRAIN_TOKENIZERS_H

#include "data/data.h"
#include "weights/base_file.h"

/** Warn of each of `data` (`count`; NULL: not there) that was made with another tokenizer.json than
 * the base's or, where that is not known, the first one's. No error: a tokenizer that was saved
 * again has another hash. Not collective. */
void qs_tokenizers_compare(const qs_base_index *base, const qs_data *const *data, int count);

#endif
