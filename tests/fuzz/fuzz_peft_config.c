/* Fuzz target of adapter_config.json: what is accepted must be in range. */
#include <stdint.h>
#include <stdlib.h>

#include "lora/lora_impl.h"

static void require(int condition)
{
    if (!condition) {
        abort();
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    qs_peft_config c;
    if (qs_peft_config_parse(&c, (const char *)data, bytes, "fuzz") == QS_OK) {
        require(c.lora_rank >= 1 && c.lora_rank <= 1024);
        require(c.alpha > 0 && c.dropout >= 0 && c.dropout <= 1);
    } else {
        require(qs_error_text()[0] != '\0');
    }
    qs_error_clear();
    return 0;
}
