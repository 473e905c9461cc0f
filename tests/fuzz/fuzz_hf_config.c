/* config.json, also of a model of text and images, and with it everything that the JSON reader
 * does.
 */
#include "fuzz.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "hf/hf_text_part.h"

static void parse(const char *text, size_t bytes)
{
    qs_hf_config c;
    double inv_freq[512];
    int64_t out, in;
    qs_error_clear();
    if (qs_hf_config_parse(&c, text, bytes, "fuzz") != QS_OK) {
        FUZZ_CHECK(qs_error_text()[0] != '\0');
        return;
    }
    FUZZ_CHECK(c.n_layers >= 1 && c.n_layers <= 1000 && c.n_heads % c.n_kv_heads == 0);
    FUZZ_CHECK(c.head_dim >= 2 && c.head_dim <= 1024 && c.head_dim % 2 == 0);
    FUZZ_CHECK(c.rms_norm_eps >= 0.0F && c.rms_norm_eps <= 0.0101F && c.rope_theta > 0.0);
    FUZZ_CHECK(c.rotary_dim >= 2 && c.rotary_dim <= c.head_dim && c.rotary_dim % 2 == 0);
    static const int64_t lengths[] = {1, 4096, 1 << 20};
    for (int l = 0; l < 3; l++) {
        qs_hf_rope_frequencies(&c, lengths[l], inv_freq);
        for (int i = 0; i < c.rotary_dim / 2; i++) {
            FUZZ_CHECK(!isnan(inv_freq[i]));
        }
    }
    FUZZ_CHECK(c.rope_magnitude >= 1e-6 && c.rope_magnitude <= 1e6);
    FUZZ_CHECK(c.score_scale > 0.0F && c.rope_local_theta >= 0.0);
    FUZZ_CHECK(c.embedding_multiplier > 0.0 && c.logits_scaling > 0.0);
    FUZZ_CHECK(c.residual_multiplier >= 1e-3 && c.residual_multiplier <= 1e3);
    FUZZ_CHECK(c.attention_cap >= 0.0F && c.final_cap >= 0.0F);
    if (c.rope_local_theta > 0.0) {
        qs_hf_rope_local_frequencies(&c, inv_freq);
        FUZZ_CHECK(inv_freq[0] == 1.0);
    }
    for (int i = 0; i < QS_LINEAR_COUNT; i++) {
        qs_linear_shape(&c, (qs_linear)i, &out, &in);
        FUZZ_CHECK((out > 0 && in > 0) == (qs_linears(c.fused) >> i & 1));
        FUZZ_CHECK(in == 0 || out <= INT64_MAX / in);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    char *part = NULL, part_of[QS_HF_TYPE_BYTES];
    qs_error_clear();
    const qs_status st = qs_hf_text_part(&part, part_of, (const char *)data, bytes, "fuzz");
    FUZZ_CHECK((part != NULL) == (part_of[0] != '\0') && (st == QS_OK || part == NULL));
    if (part != NULL) {
        parse(part, strlen(part));
    }
    free(part);
    parse((const char *)data, bytes);
    return 0;
}
