/* The index of base.h5. What is accepted must have places inside its datasets, and survive being
 * written again. */
#include "fuzz.h"

#include <string.h>

#include "weights/base_impl.h"

static void check_unit(const qs_base_unit *unit)
{
    for (int i = 0; i < unit->n_tensors; i++) {
        const qs_base_tensor *t = &unit->tensors[i];
        int64_t count = qs_base_tensor_count(t);
        switch (t->kind) {
        case QS_TENSOR_NF4:
            FUZZ_CHECK(t->quantum >= 0 &&
                       t->quantum + qs_nf4_quanta(count) <= unit->size.nf4_quanta);
            break;
        case QS_TENSOR_RAW:
            FUZZ_CHECK(t->quantum >= 0 && count <= (unit->size.raw_quanta - t->quantum) *
                                                       unit->size.raw_quantum_elems);
            break;
        case QS_TENSOR_SMALL:
            FUZZ_CHECK(t->byte >= 0 &&
                       t->byte + count * (int64_t)qs_dtype_bytes(t->dtype) <= unit->small_bytes);
            break;
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    qs_base_index *index = NULL;
    qs_base_index *again = NULL;
    char *text = NULL;
    qs_error_clear();
    if (qs_base_index_parse(&index, (const char *)data, bytes, "fuzz") != QS_OK) {
        FUZZ_CHECK(qs_error_text()[0] != '\0');
        return 0;
    }
    for (int u = 0; u < index->n_units; u++) {
        check_unit(&index->units[u]);
    }
    check_unit(&index->final);
    FUZZ_CHECK(qs_base_index_text(index, &text) == QS_OK);
    FUZZ_CHECK(qs_base_index_parse(&again, text, strlen(text), "again") == QS_OK);
    FUZZ_CHECK(again->n_units == index->n_units);
    free(text);
    qs_base_index_free(again);
    qs_base_index_free(index);
    return 0;
}
