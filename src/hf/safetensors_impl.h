/* What the files of the safetensors module share. */
#ifndef QS_HF_SAFETENSORS_IMPL_H
#define QS_HF_SAFETENSORS_IMPL_H

#include "hf/safetensors.h"

enum { QS_ST_MAX_HEADER = 100000000 }; /* bytes, as the reference reader */

/** A file to be written: its tensors in the order of their data, and the text of its header. */
typedef struct {
    const qs_st_item **sorted; /* [count], into the items */
    char *header;              /* [header_bytes], padded */
    size_t header_bytes;
    size_t file_bytes; /* length word, header and data */
} qs_st_arranged;

/** Arrange; free with qs_st_arranged_free, also after a failure. */
qs_status qs_st_arrange(qs_st_arranged *out, const char *path, const qs_st_item *items,
                        int64_t count, const char *mark);
void qs_st_arranged_free(qs_st_arranged *arranged);

size_t qs_st_item_bytes(const qs_st_item *item);

/** The length word and the header, [8 + header_bytes]. */
void qs_st_put_header(const qs_st_arranged *arranged, uint8_t *out);

#endif
