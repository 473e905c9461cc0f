#include "train/tokenizers.h"

#include <string.h>

#include "base/log.h"

void qs_tokenizers_compare(const qs_base_index *base, const qs_data *const *data, int count)
{
    const char *name = base->path, *known = base->tokenizer_sha256;
    for (int i = 0; i < count; i++) {
        const char *own = data[i] != NULL ? data[i]->tokenizer : "";
        if (own[0] == '\0') {
            continue;
        }
        if (known[0] == '\0') {
            name = data[i]->path;
            known = own;
        }
        if (strcmp(own, known) != 0) {
            qs_log_warn("%s was made with another tokenizer.json (%.12s...) than %s (%.12s...): if "
                        "it is not the same tokenizer saved again, its ids mean other words; "
                        "prepare the data with the model's",
                        data[i]->path, own, name, known);
        }
    }
}
