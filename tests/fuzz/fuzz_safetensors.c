/* The header of a safetensors file. Input: 8 bytes, the size of the data behind the header (mod
 * 2^40), then the header. */
#include "fuzz.h"

#include <string.h>

#include "hf/safetensors.h"

static void check(const qs_st_header *h, int64_t data_begin, int64_t file_bytes)
{
    int64_t total = 0;
    for (int64_t i = 0; i < h->n_tensors; i++) {
        const qs_st_tensor *t = &h->tensors[i];
        int64_t count = 1;
        for (int d = 0; d < t->rank; d++) {
            count *= t->shape[d];
        }
        FUZZ_CHECK(t->rank >= 0 && t->rank <= 8 && count == t->count && t->bytes >= count);
        FUZZ_CHECK(t->begin >= data_begin && t->bytes <= file_bytes - t->begin);
        FUZZ_CHECK(i == 0 || strcmp(h->tensors[i - 1].name, t->name) < 0);
        total += t->bytes;
    }
    FUZZ_CHECK(total == file_bytes - data_begin);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    qs_st_header header;
    uint64_t data_bytes;
    if (bytes < sizeof data_bytes) {
        return 0;
    }
    memcpy(&data_bytes, data, sizeof data_bytes);
    bytes -= sizeof data_bytes;
    int64_t file_bytes = 8 + (int64_t)bytes + (int64_t)(data_bytes & 0xFFFFFFFFFFULL);
    qs_error_clear();
    if (qs_st_parse_header(&header, (const char *)data + 8, bytes, file_bytes, "fuzz") == QS_OK) {
        check(&header, 8 + (int64_t)bytes, file_bytes);
        qs_st_header_free(&header);
    }
    return 0;
}
