/* Which layers are decoded in a pass, and where to: every open is recorded by operations that do
 * nothing else. */
#include <criterion/criterion.h>
#include <stdlib.h>

#include "fsdp/fsdp_impl.h"
#include "model/model_impl.h"

enum { LAYERS = 5, SLOTS_MAX = LAYERS + 1 };

/* What a GPU would have in its slots: the layer, told by its one weight's quantum. */
static int64_t lies_in[SLOTS_MAX];
static int decodes;
static bool fails;

static qs_status record(qs_queue *q, const qs_unit_view *unit, const qs_weight *w,
                        const qs_lora *lora, int count, int slot, bool decoded)
{
    (void)q;
    (void)unit;
    (void)lora;
    cr_assert_eq(count, 1);
    cr_assert(slot >= 0 && slot < SLOTS_MAX);
    if (fails) {
        lies_in[slot] = -1;
        return QS_FAIL(QS_ERR_DEVICE, "a launch failed");
    }
    if (decoded) {
        cr_assert_eq(lies_in[slot], w->quantum, "slot %d holds %lld, not layer %lld", slot,
                     (long long)lies_in[slot], (long long)w->quantum);
    }
    lies_in[slot] = w->quantum;
    decodes += !decoded;
    return QS_OK;
}

static void open_layer(qs_model *m, int layer, qs_status expected)
{
    const qs_unit_view unit = {0};
    const qs_lora none = {0};
    const qs_weight w = {.quantum = layer};
    cr_assert_eq(qs_decoded_open(m, layer, &unit, &w, &none, 1), expected);
}

/* Layers that are decoded in a pass up and, with `backward`, down. */
static int decodes_of_pass(qs_model *m, bool backward)
{
    decodes = 0;
    for (int l = 0; l < LAYERS; l++) {
        open_layer(m, l, QS_OK);
    }
    for (int l = LAYERS - 1; backward && l >= 0; l--) {
        open_layer(m, l, QS_OK);
    }
    return decodes;
}

static const qs_ops ops = {.unit_open = record};
static const qs_hf_config config = {.n_layers = LAYERS};

/* A model of which `stays` [LAYERS] layers stay whole on the device; `keep` of them decoded. */
static qs_model model_of(qs_fsdp *fsdp, const bool *stays, int64_t keep)
{
    qs_model m = {.config = &config, .fsdp = fsdp, .ops = &ops, .shape = {.keep_decoded = keep}};
    fsdp->at_hand = (bool *)(uintptr_t)stays;
    cr_assert_eq(qs_decoded_create(&m), QS_OK);
    for (int i = 0; i < SLOTS_MAX; i++) {
        lies_in[i] = -1;
    }
    return m;
}

static const bool all[LAYERS] = {true, true, true, true, true};

/* Of the layers in slot 0 the last is decoded once a turn, and so is the first. */
Test(decoded, a_pass_decodes_what_does_not_stay)
{
    for (int keep = 0; keep <= LAYERS; keep++) {
        qs_fsdp fsdp = {0};
        qs_model m = model_of(&fsdp, all, keep);
        const int turns = LAYERS - qs_model_kept_units(&config, &m.shape); /* layers in slot 0 */
        cr_assert_eq(qs_model_kept_units(&config, &m.shape), keep < LAYERS ? keep : LAYERS - 1);
        cr_assert_eq(decodes_of_pass(&m, true), LAYERS + turns - 1, "%d stay", keep);
        for (int pass = 0; pass < 2; pass++) {
            cr_assert_eq(decodes_of_pass(&m, true), 2 * (turns - 1), "%d stay", keep);
        }
        cr_assert_eq(decodes_of_pass(&m, false), turns - 1);
        cr_assert_eq(decodes_of_pass(&m, false), turns > 1 ? turns : 0, "evaluation");
        qs_decoded_destroy(&m);
    }
}

/* A layer that is gathered for each use gets no slot, so that those get them that are not. */
Test(decoded, layers_that_are_gathered_do_not_stay)
{
    static const bool some[LAYERS] = {false, true, false, true, false};
    qs_fsdp fsdp = {0};
    qs_model m = model_of(&fsdp, some, 2);
    for (int l = 0; l < LAYERS; l++) {
        cr_assert_eq(m.decoded.of_layer[l], some[l] ? (l + 1) / 2 : 0);
    }
    (void)decodes_of_pass(&m, true);
    cr_assert_eq(decodes_of_pass(&m, true), 4);
    qs_decoded_destroy(&m);
}

Test(decoded, an_open_that_failed_left_nothing)
{
    qs_fsdp fsdp = {0};
    qs_model m = model_of(&fsdp, all, LAYERS);
    (void)decodes_of_pass(&m, true);
    fails = true;
    open_layer(&m, 2, QS_ERR_DEVICE);
    fails = false;
    cr_assert_eq(decodes_of_pass(&m, true), 1);
    qs_decoded_destroy(&m);
}
