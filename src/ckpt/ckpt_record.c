/* The owner's part of a checkpoint's manifest: by it a state cannot become part of another run. */
#include "ckpt/ckpt_record.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "hf/chat_template.h"
#include "store/json.h"

enum { LAYERS_MAX = 1000, FEATURES_MAX = 1 << 24 };

static const char *short_name(int linear)
{
    return strrchr(qs_linear_path((qs_linear)linear), '.') + 1;
}

static json_t *lora_object(const qs_lora_layout *layout)
{
    json_t *shapes = json_object();
    json_t *targets = json_array();
    for (int i = 0; i < QS_LINEAR_COUNT; i++) {
        if (layout->out[i] == 0) {
            continue;
        }
        json_object_set_new(
            shapes, short_name(i),
            json_pack("[I, I]", (json_int_t)layout->out[i], (json_int_t)layout->in[i]));
        if (layout->targeted[i]) {
            json_array_append_new(targets, json_string(short_name(i)));
        }
    }
    json_t *lora = json_pack("{s:i, s:i, s:f, s:o, s:o}", "rank", layout->lora_rank, "layers",
                             layout->n_layers, "scale", (double)layout->scale, "targets", targets,
                             "shapes", shapes);
    if (layout->dora) { /* for readers; ours goes by the configuration */
        json_object_set_new(lora, "dora", json_true());
    }
    if (layout->naming != QS_PEFT_PLAIN) {
        json_object_set_new(lora, "text_part", json_true());
    }
    return lora;
}

char *qs_ckpt_record_text(const qs_ckpt_meta *meta, const qs_lora_layout *layout)
{
    json_t *root =
        json_pack("{s:s, s:s, s:s, s:s, s:I, s:s, s:o}", "config", meta->config_yaml, "base_sha256",
                  meta->base_sha256, "data_xxh3", meta->data_content, "data_layout_xxh3",
                  meta->data_layout, "tokens_seen", (json_int_t)meta->tokens_seen, "device",
                  meta->device, "lora", lora_object(layout));
    int failed = root == NULL;
    if (root != NULL && meta->chat_template != NULL) {
        failed |= json_object_set_new(root, "chat_template", json_string(meta->chat_template));
    }
    char *text = failed == 0 ? json_dumps(root, JSON_REAL_PRECISION(17)) : NULL;
    json_decref(root);
    return text;
}

static qs_status copy_text(const json_t *root, const char *key, char *out, size_t capacity,
                           const char *path)
{
    const char *text = NULL;
    QS_TRY(qs_json_text(root, key, &text, path));
    if (strlen(text) >= capacity) {
        return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: %s is longer than %zu letters", path, key,
                       capacity - 1);
    }
    snprintf(out, capacity, "%s", text);
    return QS_OK;
}

/* Not there in the first checkpoints, nor where no template shaped the data. */
static qs_status copy_template(const json_t *root, qs_ckpt_record *out, const char *path)
{
    const char *text = NULL;
    if (json_object_get(root, "chat_template") == NULL) {
        return QS_OK;
    }
    QS_TRY(qs_json_text(root, "chat_template", &text, path));
    if (strlen(text) > QS_CHAT_TEMPLATE_MAX) {
        return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: chat_template has %zu bytes; at most %d are kept",
                       path, strlen(text), QS_CHAT_TEMPLATE_MAX);
    }
    out->chat_template = strdup(text);
    return out->chat_template ? QS_OK : QS_FAIL(QS_ERR_MEMORY, "%s: no memory", path);
}

static qs_status parse_shapes(const json_t *shapes, qs_ckpt_record *out, const char *path)
{
    const bool fused = json_object_get(shapes, short_name(QS_QKV)) != NULL;
    for (int i = 0; i < QS_LINEAR_COUNT; i++) {
        if (!(qs_linears(fused) >> i & 1)) {
            continue;
        }
        const json_t *shape = json_object_get(shapes, short_name(i));
        json_int_t rows = json_integer_value(json_array_get(shape, 0));
        json_int_t columns = json_integer_value(json_array_get(shape, 1));
        if (json_array_size(shape) != 2 || rows < 1 || rows > FEATURES_MAX || columns < 1 ||
            columns > FEATURES_MAX) {
            return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: lora.shapes.%s is not [1 .. %d, 1 .. %d]", path,
                           short_name(i), FEATURES_MAX, FEATURES_MAX);
        }
        out->out[i] = rows;
        out->in[i] = columns;
    }
    return QS_OK;
}

/* Two linears that meet have one width there. */
static qs_status check_widths(const qs_ckpt_record *r, const char *path)
{
    const struct {
        qs_linear linear;
        int64_t is, must_be;
    } widths[] = {{QS_K, r->in[QS_K], r->in[QS_Q]},
                  {QS_V, r->in[QS_V], r->in[QS_Q]},
                  {QS_V, r->out[QS_V], r->out[QS_K]},
                  {QS_O, r->in[QS_O], r->out[QS_Q]},
                  {QS_O, r->out[QS_O], r->in[QS_Q]},
                  {QS_GATE, r->in[QS_GATE], r->in[QS_Q]},
                  {QS_UP, r->in[QS_UP], r->in[QS_Q]},
                  {QS_UP, r->out[QS_UP], r->out[QS_GATE]},
                  {QS_DOWN, r->in[QS_DOWN], r->out[QS_UP]},
                  {QS_DOWN, r->out[QS_DOWN], r->in[QS_Q]},
                  /* one linear in place of several: k and v are alike */
                  {QS_QKV, r->out[QS_QKV], r->in[QS_O] + 2 * ((r->out[QS_QKV] - r->in[QS_O]) / 2)},
                  {QS_O, r->out[QS_O], r->in[QS_QKV]},
                  {QS_GATE_UP, r->in[QS_GATE_UP], r->in[QS_QKV]},
                  {QS_GATE_UP, r->out[QS_GATE_UP], 2 * r->in[QS_DOWN]},
                  {QS_DOWN, r->out[QS_DOWN], r->in[QS_QKV]}};
    const int plain = 10;
    const bool fused = r->out[QS_QKV] > 0;
    for (int i = fused ? plain : 0; i < (fused ? (int)(sizeof widths / sizeof *widths) : plain);
         i++) {
        if (widths[i].is != widths[i].must_be) {
            return QS_FAIL(QS_ERR_INPUT_VALUE,
                           "%s: lora.shapes.%s has a width of %lld where the linears around it "
                           "have %lld",
                           path, short_name((int)widths[i].linear), (long long)widths[i].is,
                           (long long)widths[i].must_be);
        }
    }
    return QS_OK;
}

static qs_status parse_root(const json_t *root, qs_ckpt_record *out, const char *path)
{
    const json_t *lora = NULL, *shapes = NULL;
    const char *config = NULL;
    int64_t layers = 0;
    QS_TRY(copy_text(root, "base_sha256", out->base_sha256, sizeof out->base_sha256, path));
    QS_TRY(copy_text(root, "data_xxh3", out->data_content, sizeof out->data_content, path));
    QS_TRY(qs_json_i64(root, "tokens_seen", 0, INT64_MAX, &out->tokens_seen, path));
    if (json_object_get(root, "device") != NULL) { /* not there in the first checkpoints */
        QS_TRY(copy_text(root, "device", out->device, sizeof out->device, path));
    }
    if (json_object_get(root, "data_layout_xxh3") != NULL) { /* nor was this */
        QS_TRY(
            copy_text(root, "data_layout_xxh3", out->data_layout, sizeof out->data_layout, path));
    }
    QS_TRY(copy_template(root, out, path));
    QS_TRY(qs_json_object(root, "lora", &lora, path));
    QS_TRY(qs_json_i64(lora, "layers", 1, LAYERS_MAX, &layers, path));
    QS_TRY(qs_json_object(lora, "shapes", &shapes, path));
    QS_TRY(parse_shapes(shapes, out, path));
    out->naming =
        json_is_true(json_object_get(lora, "text_part")) ? QS_PEFT_TEXT_PART : QS_PEFT_PLAIN;
    QS_TRY(check_widths(out, path));
    QS_TRY(qs_json_text(root, "config", &config, path));
    out->n_layers = (int)layers;
    out->config_yaml = strdup(config);
    return out->config_yaml ? QS_OK : QS_FAIL(QS_ERR_MEMORY, "%s: no memory", path);
}

qs_status qs_ckpt_record_parse(qs_ckpt_record *out, const char *json, const char *path)
{
    json_t *root = NULL;
    memset(out, 0, sizeof *out);
    QS_TRY(qs_json_parse(&root, json, strlen(json), path));
    qs_status st = json_is_object(root)
                       ? parse_root(root, out, path)
                       : QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: is not a JSON object", path);
    json_decref(root);
    if (st != QS_OK) {
        qs_ckpt_record_free(out);
    }
    return st;
}

void qs_ckpt_record_free(qs_ckpt_record *record)
{
    free(record->config_yaml);
    free(record->chat_template);
    record->config_yaml = record->chat_template = NULL;
}

void qs_ckpt_file_name(char *out, size_t capacity, int rank)
{
    snprintf(out, capacity, "rank-%05d.h5", rank);
}
