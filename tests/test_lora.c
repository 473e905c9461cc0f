/* The LoRA vector: layout and start. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/lora_fixture.h"

/* ---- layout ---- */

Test(layout, segments_lie_back_to_back_in_the_order_of_the_linears)
{
    for (uint32_t targets = 1; targets < 128; targets++) {
        qs_config c = config(targets);
        qs_lora_layout l = layout_of(&c);
        int64_t at = 0;
        for (int i = 0; i < QS_LINEAR_COUNT; i++) {
            cr_assert_eq(l.targeted[i], (targets >> i & 1) != 0);
            if (!l.targeted[i]) {
                cr_assert_eq(l.a_at[i], -1);
                cr_assert_eq(l.b_at[i], -1);
                continue;
            }
            cr_assert_eq(l.a_at[i], at);
            cr_assert_eq(l.b_at[i], at + 8 * l.in[i]);
            at += 8 * (l.in[i] + l.out[i]);
        }
        cr_assert_eq(l.used, at);
        cr_assert_eq(l.per_layer % QS_LORA_CHUNK, 0);
        cr_assert_geq(l.per_layer, l.used);
        cr_assert_lt(l.per_layer - l.used, QS_LORA_CHUNK);
        cr_assert_eq(qs_lora_count(&l), 3 * at);
    }
}

/* What sets and lists are of a layer of seven linears, and of one of four (Phi-3). */
Test(layout, sets_take_what_a_layer_has_and_lists_must_be_met)
{
    enum { SEVEN = 0x7f, FOUR = 1 << QS_QKV | 1 << QS_O | 1 << QS_GATE_UP | 1 << QS_DOWN };
    static const struct {
        const char *targets;
        uint32_t seven, four; /* 0: refused */
        const char *says;
    } cases[] = {
        {"all-linear", SEVEN, FOUR, ""},
        {"attention", 0x0f, 1 << QS_QKV | 1 << QS_O, ""},
        {"mlp", 0x70, 1 << QS_GATE_UP | 1 << QS_DOWN, ""},
        {"fsdp_qlora-all", SEVEN & ~(1 << QS_O), 1 << QS_DOWN, ""},
        {"[q_proj, o_proj]", 1 << QS_Q | 1 << QS_O, 0,
         "no self_attn.q_proj, but self_attn.qkv_proj"},
        {"[qkv_proj, o_proj]", 0, 1 << QS_QKV | 1 << QS_O,
         "no self_attn.qkv_proj, but self_attn.q_proj"},
        {"[q_proj, k_proj, v_proj, gate_proj, up_proj, down_proj]", SEVEN & ~(1 << QS_O), 0,
         "q_proj"},
        {"[gate_up_proj]", 0, 1 << QS_GATE_UP, "mlp.gate_proj"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        for (int fused = 0; fused < 2; fused++) {
            char text[160];
            qs_config c;
            qs_lora_layout l;
            qs_hf_config m = model();
            m.fused = fused;
            snprintf(text, sizeof text, "base: b\nlora: {rank: 8, targets: %s}\n",
                     cases[i].targets);
            cr_assert_eq(qs_config_parse(&c, text, strlen(text), "r", NULL, 0), QS_OK);
            const uint32_t want = fused ? cases[i].four : cases[i].seven;
            qs_error_clear();
            cr_assert_eq(qs_lora_layout_make(&l, &m, &c), want ? QS_OK : QS_ERR_CONFIG_VALUE, "%s",
                         cases[i].targets);
            if (want == 0) {
                cr_assert_not_null(strstr(qs_error_text(), cases[i].says), "%s", qs_error_text());
            }
            for (int k = 0; k < QS_LINEAR_COUNT && want > 0; k++) {
                cr_assert_eq(l.targeted[k], want >> k & 1, "%s: %s", cases[i].targets,
                             qs_linear_path((qs_linear)k));
            }
        }
    }
}

Test(layout, magnitudes_follow_their_b)
{
    for (uint32_t targets = 1; targets < 128; targets++) {
        qs_config c = config(targets);
        c.lora.dora = true;
        qs_lora_layout l = layout_of(&c);
        int64_t at = 0;
        for (int i = 0; i < QS_LINEAR_COUNT; i++) {
            cr_assert_eq(l.m_at[i], l.targeted[i] ? at + 8 * (l.in[i] + l.out[i]) : -1);
            at += l.targeted[i] ? 8 * (l.in[i] + l.out[i]) + l.out[i] : 0;
        }
        cr_assert_eq(l.used, at);
        qs_lora_stretch all[QS_LORA_STRETCHES_MAX];
        const int n = qs_lora_stretches(&l, (qs_range){0, l.per_layer}, all);
        at = 0;
        for (int i = 0; i < n; i++) { /* A, B, m, A, B, m, ... without a gap */
            cr_assert_eq(all[i].which, "ABm"[i % 3]);
            cr_assert_eq(all[i].elements.begin, at);
            at = all[i].elements.end;
        }
        cr_assert_eq(at, l.used);
    }
}

Test(layout, shares_of_all_ranks_cover_the_segment_once)
{
    qs_config c = config(0x7f);
    qs_lora_layout l = layout_of(&c);
    for (int n = 1; n <= 12; n++) {
        int64_t at = 0, width = qs_lora_shard_width(&l, n);
        for (int r = 0; r < n; r++) {
            qs_range share = qs_lora_shard(&l, r, n);
            cr_assert_eq(share.begin < share.end ? share.begin : at, at);
            cr_assert_eq(share.begin % QS_LORA_CHUNK, 0);
            cr_assert_leq(share.end - share.begin, width);
            at = share.begin < share.end ? share.end : at;
        }
        cr_assert_eq(at, l.per_layer, "n=%d", n);
    }
}

Test(layout, magnitudes_of_all_ranks_are_those_of_the_layer_once)
{
    qs_config c = config(0x7f);
    cr_assert_eq(qs_lora_magnitude_width(&(qs_lora_layout){.chunks = 1}, 1), 0);
    c.lora.dora = true;
    const qs_lora_layout l = layout_of(&c);
    int64_t rows = 0;
    for (int i = 0; i < QS_LINEAR_COUNT; i++) {
        rows += l.targeted[i] ? l.out[i] : 0;
    }
    cr_assert_eq(qs_lora_magnitudes(&l), rows);
    for (int n = 1; n <= 12; n++) {
        int64_t at = 0, most = 0;
        for (int r = 0; r < n; r++) {
            const qs_range share = qs_lora_magnitude_shard(&l, r, n);
            cr_assert_eq(share.begin, at, "rank %d of %d", r, n);
            most = share.end - at > most ? share.end - at : most;
            at = share.end;
        }
        cr_assert_eq(at, rows, "n=%d", n);
        cr_assert_eq(qs_lora_magnitude_width(&l, n), most);
    }
}

Test(layout, scale_follows_alpha_rank_and_rslora)
{
    qs_config c = config(1);
    cr_assert_eq(layout_of(&c).scale, 1.5f);
    c.lora.rslora = true;
    cr_assert_eq(layout_of(&c).scale, (float)(12 / sqrt(8.0)));
}

Test(layout, nothing_to_train_is_refused)
{
    qs_config c = config(0);
    qs_hf_config m = model();
    qs_lora_layout l;
    cr_assert_eq(qs_lora_layout_make(&l, &m, &c), QS_ERR_CONFIG_VALUE);
}

/* ---- start ---- */

Test(init, does_not_depend_on_how_the_segment_is_cut)
{
    qs_config c = config(0x55);
    qs_lora_layout l = layout_of(&c);
    float *whole = malloc((size_t)l.per_layer * sizeof *whole);
    float *parts = malloc((size_t)l.per_layer * sizeof *parts);
    qs_lora_init(&l, 42, 2, (qs_range){0, l.per_layer}, whole);
    for (int n = 2; n <= 5; n++) {
        memset(parts, 0xff, (size_t)l.per_layer * sizeof *parts);
        for (int r = 0; r < n; r++) {
            qs_range share = qs_lora_shard(&l, r, n);
            if (share.begin < share.end) {
                qs_lora_init(&l, 42, 2, share, parts + share.begin);
            }
        }
        cr_assert(memcmp(whole, parts, (size_t)l.per_layer * sizeof *parts) == 0, "n=%d", n);
    }
    qs_lora_init(&l, 42, 1, (qs_range){0, l.per_layer}, parts);
    cr_assert(memcmp(whole, parts, (size_t)l.per_layer * sizeof *parts) != 0, "layers differ");
    qs_lora_init(&l, 43, 2, (qs_range){0, l.per_layer}, parts);
    cr_assert(memcmp(whole, parts, (size_t)l.per_layer * sizeof *parts) != 0, "seeds differ");
    free(whole);
    free(parts);
}

Test(init, a_is_uniform_b_and_padding_are_zero)
{
    qs_config c = config(0x7f);
    qs_lora_layout l = layout_of(&c);
    float *x = malloc((size_t)l.per_layer * sizeof *x);
    qs_lora_init(&l, 7, 0, (qs_range){0, l.per_layer}, x);
    for (int i = 0; i < QS_QKV; i++) {
        double sum = 0, squares = 0, bound = 1 / sqrt((double)l.in[i]);
        int64_t n = l.b_at[i] - l.a_at[i];
        for (int64_t e = l.a_at[i]; e < l.b_at[i]; e++) {
            cr_assert_leq(fabs(x[e]), bound * (1 + 1e-6));
            sum += x[e] / bound;
            squares += x[e] / bound * x[e] / bound;
        }
        /* mean 0 and variance 1/3 of U(-1, 1), within 5 standard errors */
        cr_assert_lt(fabs(sum / (double)n), 5 * sqrt(1 / 3.0 / (double)n));
        cr_assert_lt(fabs(squares / (double)n - 1 / 3.0), 5 * sqrt(4 / 45.0 / (double)n));
        for (int64_t e = l.b_at[i]; e < l.b_at[i] + l.out[i] * 8; e++) {
            cr_assert_eq(x[e], 0.0f);
        }
    }
    for (int64_t e = l.used; e < l.per_layer; e++) {
        cr_assert_eq(x[e], 0.0f);
    }
    free(x);
}
