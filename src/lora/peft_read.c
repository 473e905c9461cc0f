/* A PEFT adapter directory as a source of LoRA weights. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "hf/safetensors.h"
#include "lora/lora_impl.h"

struct qs_peft {
    qs_st_dir *tensors;
    qs_lora_layout layout;
    qs_peft_naming naming; /* of the tensors, whatever the layout's */
};

enum { NAME_ROOM = 160 };

/* ---- which linears ---- */

typedef struct {
    qs_peft_naming naming;
    uint32_t targets; /* linears that any layer has an adapter of */
    int n_layers;
    int sample[QS_LINEAR_COUNT]; /* a layer that has one */
} census;

static qs_status count_linears(const qs_st_dir *tensors, census *out)
{
    *out = (census){.targets = 0};
    for (int64_t i = 0; i < qs_st_count(tensors); i++) {
        int layer = 0;
        qs_peft_naming naming;
        qs_linear linear;
        char which;
        const char *name = qs_st_at(tensors, i)->name;
        if (!qs_lora_peft_parse(name, &naming, &layer, &linear, &which)) {
            return QS_FAIL(QS_ERR_INPUT_TENSOR,
                           "%s: tensor \"%s\" belongs to no linear of a layer; only adapters of "
                           "those are supported",
                           qs_st_path(tensors), name);
        }
        if (i > 0 && naming != out->naming) {
            return QS_FAIL(QS_ERR_INPUT_TENSOR,
                           "%s: tensors \"%s\" and \"%s\": names of one model are expected, of "
                           "text alone or with a text part",
                           qs_st_path(tensors), qs_st_at(tensors, 0)->name, name);
        }
        out->naming = naming;
        out->targets |= 1u << linear;
        out->sample[linear] = layer;
        out->n_layers = layer >= out->n_layers ? layer + 1 : out->n_layers;
    }
    return out->targets != 0
               ? QS_OK
               : QS_FAIL(QS_ERR_INPUT_TENSOR, "%s: holds no tensor", qs_st_path(tensors));
}

static bool has_linear(const qs_st_dir *tensors, qs_peft_naming naming, int layer, qs_linear linear)
{
    static const char parts[] = {'A', 'B', 'm'};
    char name[NAME_ROOM];
    bool found = false;
    for (size_t i = 0; i < sizeof parts && !found; i++) {
        qs_lora_peft_name(name, sizeof name, naming, layer, linear, parts[i]);
        found = qs_st_find(tensors, name) != NULL;
    }
    return found;
}

/* One layout serves all layers, so they must be alike. */
static qs_status find_targets(const qs_st_dir *tensors, uint32_t *targets, qs_peft_naming *naming)
{
    census all;
    QS_TRY(count_linears(tensors, &all));
    for (int layer = 0; layer < all.n_layers; layer++) {
        for (int i = 0; i < QS_LINEAR_COUNT; i++) {
            if (all.targets >> i & 1 && !has_linear(tensors, all.naming, layer, (qs_linear)i)) {
                return QS_FAIL(QS_ERR_INPUT_TENSOR,
                               "%s: layer %d has no adapter of %s, layer %d has one; only adapters "
                               "that are alike in all layers are supported",
                               qs_st_path(tensors), layer, qs_linear_path((qs_linear)i),
                               all.sample[i]);
            }
        }
    }
    *targets = all.targets;
    *naming = all.naming;
    return QS_OK;
}

qs_status qs_peft_targets(const char *dir, uint32_t *targets)
{
    qs_st_dir *tensors = NULL;
    qs_peft_naming naming;
    QS_TRY(qs_st_open(&tensors, dir, "adapter_model"));
    const qs_status st = find_targets(tensors, targets, &naming);
    qs_st_close(tensors);
    return st;
}

/* ---- does it fit ---- */

static const char *yes_no(bool value)
{
    return value ? "true" : "false";
}

/* "[q_proj, v_proj]", as it may be given to lora.targets. */
static void list_targets(uint32_t targets, char *out, size_t capacity)
{
    size_t used = 0;
    for (int i = 0; i < QS_LINEAR_COUNT && used < capacity; i++) {
        if (targets >> i & 1) {
            used += (size_t)snprintf(out + used, capacity - used, "%s%s", used > 0 ? ", " : "[",
                                     strrchr(qs_linear_path((qs_linear)i), '.') + 1);
        }
    }
    if (used < capacity) {
        snprintf(out + used, capacity - used, "]");
    }
}

static qs_status check_targets(const qs_lora_layout *layout, uint32_t targets, const char *dir)
{
    char list[160];
    list_targets(targets, list, sizeof list);
    for (int i = 0; i < QS_LINEAR_COUNT; i++) {
        const bool has = targets >> i & 1;
        if (layout->out[i] > 0 && has != layout->targeted[i]) {
            return QS_FAIL(QS_ERR_INPUT_VALUE,
                           "%s: the adapter has %s%s, but lora.targets %s; set "
                           "lora.targets to the adapter's, %s",
                           dir, has ? "" : "no ", qs_linear_path((qs_linear)i),
                           has ? "does not name it" : "names it", list);
        }
    }
    return QS_OK;
}

/* The adapter must compute what the layout says: rank and scale. */
static qs_status check_settings(const qs_lora_layout *layout, const char *dir)
{
    qs_peft_config found;
    QS_TRY(qs_peft_config_read(&found, dir));
    if (found.lora_rank != layout->lora_rank) {
        return QS_FAIL(QS_ERR_INPUT_VALUE,
                       "%s: r=%lld, but lora.rank is %d; set lora.rank to the adapter's", dir,
                       (long long)found.lora_rank, layout->lora_rank);
    }
    float scale = qs_lora_scale(found.alpha, found.lora_rank, found.rslora);
    if (scale != layout->scale) {
        return QS_FAIL(QS_ERR_INPUT_VALUE,
                       "%s: lora_alpha=%g with use_rslora=%s is a scale of %g, but the "
                       "configuration's is %g; set lora.alpha and lora.rslora to the adapter's",
                       dir, found.alpha, yes_no(found.rslora), (double)scale,
                       (double)layout->scale);
    }
    if (found.dora != layout->dora) {
        return QS_FAIL(QS_ERR_INPUT_VALUE,
                       "%s: use_dora=%s, but lora.dora is %s; set lora.dora to the adapter's", dir,
                       yes_no(found.dora), yes_no(layout->dora));
    }
    return QS_OK;
}

static qs_status wrong_shape(const char *path, const qs_st_tensor *t, const qs_lora_part *part)
{
    char expected[64];
    snprintf(expected, sizeof expected, part->rank == 2 ? "[%lld, %lld]" : "[%lld]",
             (long long)part->shape[0], (long long)part->shape[1]);
    return QS_FAIL(QS_ERR_INPUT_TENSOR,
                   "%s: tensor \"%s\" has %d dimensions [%lld, %lld], expected %s; the adapter "
                   "belongs to another model than the base",
                   path, t->name, t->rank, (long long)(t->rank > 0 ? t->shape[0] : 0),
                   (long long)(t->rank > 1 ? t->shape[1] : 0), expected);
}

static qs_status find_tensor(const qs_peft *peft, int layer, int linear, const qs_lora_part *part,
                             const qs_st_tensor **out)
{
    char name[NAME_ROOM];
    qs_dtype dtype;
    const char *path = qs_st_path(peft->tensors);
    qs_lora_peft_name(name, sizeof name, peft->naming, layer, (qs_linear)linear, part->which);
    const qs_st_tensor *t = qs_st_find(peft->tensors, name);
    if (!t) {
        return QS_FAIL(QS_ERR_INPUT_TENSOR, "%s: tensor \"%s\" is missing", path, name);
    }
    if (t->rank != part->rank || t->shape[0] != part->shape[0] ||
        (t->rank == 2 && t->shape[1] != part->shape[1])) {
        return wrong_shape(path, t, part);
    }
    if (qs_st_to_dtype(t->dtype, &dtype) != 0 ||
        (dtype != QS_F32 && dtype != QS_F16 && dtype != QS_BF16)) {
        return QS_FAIL(QS_ERR_INPUT_UNKNOWN, "%s: tensor \"%s\" is neither F32, F16 nor BF16", path,
                       name);
    }
    *out = t;
    return QS_OK;
}

/* Everything that is wanted is there; then equal counts say that nothing else is. */
static qs_status check_tensors(const qs_peft *peft)
{
    int64_t wanted = 0;
    const qs_st_tensor *t;
    for (int layer = 0; layer < peft->layout.n_layers; layer++) {
        for (int i = 0; i < QS_LINEAR_COUNT; i++) {
            qs_lora_part parts[QS_LORA_PARTS_MAX];
            const int n = qs_lora_parts(&peft->layout, i, parts);
            for (int k = 0; k < n; k++) {
                QS_TRY(find_tensor(peft, layer, i, &parts[k], &t));
            }
            wanted += n;
        }
    }
    if (qs_st_count(peft->tensors) != wanted) {
        return QS_FAIL(QS_ERR_INPUT_TENSOR,
                       "%s: holds %lld tensors, but the model has room for %lld; it belongs to "
                       "another model",
                       qs_st_path(peft->tensors), (long long)qs_st_count(peft->tensors),
                       (long long)wanted);
    }
    return QS_OK;
}

qs_status qs_peft_open(qs_peft **out, const char *dir, const qs_lora_layout *layout)
{
    uint32_t targets = 0;
    qs_status st = QS_OK;
    *out = NULL;
    qs_peft *peft = calloc(1, sizeof *peft);
    if (!peft) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory", dir);
    }
    peft->layout = *layout;
    QS_GOTO(check_settings(layout, dir));
    QS_GOTO(qs_st_open(&peft->tensors, dir, "adapter_model"));
    QS_GOTO(find_targets(peft->tensors, &targets, &peft->naming));
    QS_GOTO(check_targets(layout, targets, dir));
    QS_GOTO(check_tensors(peft));
    *out = peft;
done:
    if (st != QS_OK) {
        qs_peft_close(peft);
    }
    return st;
}

static qs_status read_tensor(qs_peft *peft, int layer, int linear, const qs_lora_part *part,
                             float *out)
{
    const qs_st_tensor *t = NULL;
    QS_TRY(find_tensor(peft, layer, linear, part, &t));
    QS_TRY(qs_st_read_f32(peft->tensors, t, 0, t->count, out));
    for (int64_t i = 0; i < t->count; i++) {
        if (!isfinite(out[i])) {
            return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: tensor \"%s\": element %lld is not finite",
                           qs_st_path(peft->tensors), t->name, (long long)i);
        }
    }
    return QS_OK;
}

qs_status qs_peft_read_layer(qs_peft *peft, int layer, float *segment)
{
    const qs_lora_layout *layout = &peft->layout;
    memset(segment, 0, (size_t)layout->per_layer * sizeof *segment);
    for (int i = 0; i < QS_LINEAR_COUNT; i++) {
        qs_lora_part parts[QS_LORA_PARTS_MAX];
        const int n = qs_lora_parts(layout, i, parts);
        for (int k = 0; k < n; k++) {
            QS_TRY(read_tensor(peft, layer, i, &parts[k], segment + parts[k].at));
        }
    }
    return QS_OK;
}

void qs_peft_close(qs_peft *peft)
{
    if (peft) {
        qs_st_close(peft->tensors);
        free(peft);
    }
}
