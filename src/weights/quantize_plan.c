/* The plan of a quantization: config.json and the headers of the checkpoint decide the table of
 * units, the kind and dtype of every tensor and where its bytes come from. Every tensor of the
 * checkpoint must be accounted for. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"
#include "base/mem.h"
#include "hf/hf_text_part.h"
#include "hf/safetensors.h"
#include "qshard_version.h"
#include "store/hash.h"
#include "store/io.h"
#include "store/json.h"
#include "weights/quantize.h"
#include "weights/quantize_impl.h"

enum { MAX_CONFIG_BYTES = 1 << 20, MAX_TOKENIZER_BYTES = 256 << 20, MAX_MAPS = 4096 };

/* What the steps of planning share. */
typedef struct {
    qs_plan *plan;
    bool *used; /* [qs_st_count] */
    bool import;
    int nested_seen; /* -1: no bitsandbytes tensor seen yet */
} planner;

qs_base_unit *qs_plan_unit(const qs_plan *plan, int u)
{
    return u < plan->index->n_units ? &plan->index->units[u] : &plan->index->final;
}

void qs_plan_free(qs_plan *plan)
{
    for (int u = 0; plan->sources != NULL && u <= plan->index->n_units; u++) {
        free(plan->sources[u]);
    }
    free(plan->sources);
    qs_base_index_free(plan->index);
    qs_st_close(plan->dir);
    *plan = (qs_plan){0};
}

static void mark_used(void *user, const qs_st_tensor *tensor)
{
    planner *p = user;
    bool *used = &p->used[tensor - qs_st_at(p->plan->dir, 0)];
    p->plan->source_bytes += *used ? 0 : tensor->bytes;
    *used = true;
}

static qs_status read_config(qs_base_index *index, const char *hf_dir)
{
    char *path = NULL;
    QS_TRY(qs_hf_check_folder(hf_dir));
    QS_TRY(qs_io_join(&path, hf_dir, "config.json"));
    const qs_status st =
        qs_hf_config_read(&index->config, &index->config_text, path, MAX_CONFIG_BYTES);
    free(path);
    return st;
}

static qs_status add_eos(qs_base_index *index, const json_t *id, const char *path)
{
    const json_int_t value = json_integer_value(id);
    if (!json_is_integer(id)) {
        return QS_FAIL(QS_ERR_INPUT_VALUE,
                       "%s: eos_token_id is neither a token id nor a list of them", path);
    }
    if (value < 0 || value >= index->config.vocab) {
        return QS_OK; /* -1 stands for none in some; no other such id comes up, either */
    }
    if (index->n_eos == QS_EOS_MAX) {
        return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: eos_token_id lists more than %d ids", path,
                       QS_EOS_MAX);
    }
    index->eos[index->n_eos++] = (int32_t)value;
    return QS_OK;
}

static qs_status parse_generation(qs_base_index *index, const json_t *root, const char *path)
{
    const json_t *eos = json_object_get(root, "eos_token_id");
    if (!json_is_object(root)) {
        return QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: is not a JSON object", path);
    }
    if (eos == NULL || json_is_null(eos)) {
        return QS_OK;
    }
    if (!json_is_array(eos)) {
        return add_eos(index, eos, path);
    }
    for (size_t i = 0; i < json_array_size(eos); i++) {
        QS_TRY(add_eos(index, json_array_get(eos, i), path));
    }
    return QS_OK;
}

/* No weight depends on what a file says: one that is no good costs that, and a warning. */
static qs_status forgive(qs_status st, const char *cost)
{
    if (st == QS_OK || st == QS_ERR_MEMORY) {
        return st;
    }
    qs_log_warn("%s; %s", qs_error_text(), cost);
    qs_error_clear();
    return QS_OK;
}

/* Chat models name the token that ends a turn there, and in config.json the one that ends a
 * document. */
static qs_status read_generation(qs_base_index *index, const char *hf_dir)
{
    qs_status st = QS_OK;
    void *text = NULL;
    char *path = NULL;
    size_t bytes = 0;
    json_t *root = NULL;
    QS_TRY(qs_io_join(&path, hf_dir, "generation_config.json"));
    if (access(path, F_OK) == 0) {
        QS_GOTO(qs_io_read_file(path, MAX_CONFIG_BYTES, &text, &bytes));
        QS_GOTO(qs_json_parse(&root, text, bytes, path));
        QS_GOTO(parse_generation(index, root, path));
    }
done:
    index->n_eos = st == QS_OK ? index->n_eos : 0;
    json_decref(root);
    free(text);
    free(path);
    return forgive(st,
                   "its eos_token_id is left out, so qshard sample stops at config.json's alone");
}

/* Find a 16- or 32-bit tensor of the wanted shape. `rows` counts the whole tensor where a chunk
 * wants a part of it. */
static qs_status take_floats(planner *p, qs_base_tensor *t, int64_t rows, qs_source *source)
{
    const qs_st_tensor *data = qs_st_find(p->plan->dir, t->name);
    if (data == NULL) {
        return QS_FAIL(QS_ERR_INPUT_TENSOR, "%s: tensor %s is missing", qs_st_path(p->plan->dir),
                       t->name);
    }
    if (data->rank != t->rank || data->shape[0] != rows ||
        (t->rank == 2 && data->shape[1] != t->shape[1])) {
        return QS_FAIL(QS_ERR_INPUT_TENSOR,
                       "%s: tensor %s: shape [%lld, %lld] of %d dimensions does not follow from "
                       "config.json, which gives [%lld, %lld]",
                       qs_st_path(p->plan->dir), t->name,
                       data->rank > 0 ? (long long)data->shape[0] : 0LL,
                       data->rank > 1 ? (long long)data->shape[1] : 0LL, data->rank,
                       (long long)rows, (long long)t->shape[1]);
    }
    if (qs_st_to_dtype(data->dtype, &t->dtype) != 0) {
        return QS_FAIL(QS_ERR_INPUT_UNKNOWN,
                       "%s: tensor %s: dtype %s is not supported; BF16, F16 and F32 are",
                       qs_st_path(p->plan->dir), t->name, qs_st_dtype_name(data->dtype));
    }
    source->data = data;
    mark_used(p, data);
    return QS_OK;
}

/* The row of `maps` that holds this map, appended if it is new. Row 0 is the one that we write. */
static qs_status map_row(qs_base_index *index, const float map[256], int *row)
{
    for (*row = 0; *row < index->n_maps; ++*row) {
        if (memcmp(index->maps + *row * 256, map, 256 * sizeof *map) == 0) {
            return QS_OK;
        }
    }
    if (index->n_maps == MAX_MAPS) {
        return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: more than %d different nested_quant_map",
                       index->path, MAX_MAPS);
    }
    float *grown = NULL;
    QS_TRY(QS_ALLOC(&grown, (index->n_maps + 1) * 256, QS_MEM_WORK));
    memcpy(grown, index->maps, (size_t)index->n_maps * 256 * sizeof *map);
    memcpy(grown + index->n_maps * 256, map, 256 * sizeof *map);
    qs_mem_free(index->maps);
    index->maps = grown;
    index->n_maps++;
    return QS_OK;
}

static qs_status take_bnb(planner *p, qs_base_tensor *t, qs_source *source)
{
    qs_bnb_tensor bnb;
    QS_TRY(qs_bnb_read(p->plan->dir, t->name, t->shape[0], t->shape[1], &bnb, mark_used, p));
    if (p->nested_seen >= 0 && p->nested_seen != (int)bnb.nested) {
        return QS_FAIL(QS_ERR_INPUT_UNKNOWN,
                       "%s: tensor %s: nested = %s, unlike the tensors before; a checkpoint must "
                       "use double quantization for all or for none",
                       qs_st_path(p->plan->dir), t->name, bnb.nested ? "true" : "false");
    }
    p->nested_seen = bnb.nested;
    *source = bnb.source;
    t->dtype = bnb.dtype;
    t->offset = bnb.offset;
    return bnb.nested ? map_row(p->plan->index, bnb.map, &t->map) : QS_OK;
}

static qs_status plan_tensor(planner *p, qs_base_unit *unit, qs_base_tensor *t, qs_source *source)
{
    bool bnb = qs_bnb_present(p->plan->dir, t->name);
    if (t->kind == QS_TENSOR_NF4 && bnb) {
        p->plan->linears++;
        return take_bnb(p, t, source);
    }
    if (bnb) {
        return QS_FAIL(QS_ERR_INPUT_UNKNOWN,
                       "%s: tensor %s is quantized; only the linears of layers may be",
                       qs_st_path(p->plan->dir), t->name);
    }
    QS_TRY(take_floats(p, t, t->shape[0], source));
    if (t->kind == QS_TENSOR_NF4 && p->import) {
        t->kind = QS_TENSOR_RAW; /* a linear that the checkpoint left at 16 bits */
    }
    p->plan->linears += t->kind == QS_TENSOR_NF4;
    for (int i = 0; t->kind == QS_TENSOR_RAW && i < unit->n_tensors && &unit->tensors[i] != t;
         i++) {
        const qs_base_tensor *other = &unit->tensors[i];
        if (other->kind == QS_TENSOR_RAW && other->dtype != t->dtype) {
            return QS_FAIL(QS_ERR_INPUT_UNKNOWN,
                           "%s: tensors %s and %s were left unquantized with different dtypes",
                           qs_st_path(p->plan->dir), other->name, t->name);
        }
    }
    return QS_OK;
}

/* Chunk `c` of a table: rows [c * head_chunk_rows, ...) of one tensor. */
static qs_status plan_chunk(planner *p, qs_base_tensor *t, int64_t c, qs_source *source)
{
    const qs_base_index *index = p->plan->index;
    if (qs_bnb_present(p->plan->dir, t->name)) {
        return QS_FAIL(QS_ERR_INPUT_UNKNOWN,
                       "%s: tensor %s is quantized; only the linears of layers may be",
                       qs_st_path(p->plan->dir), t->name);
    }
    source->first = c * index->head_chunk_rows * index->config.hidden;
    return take_floats(p, t, index->config.vocab, source);
}

static qs_status plan_units(planner *p)
{
    qs_base_index *index = p->plan->index;
    int chunks = qs_base_embed_chunks(index);
    for (int u = 0; u <= index->n_units; u++) {
        qs_base_unit *unit = qs_plan_unit(p->plan, u);
        p->plan->sources[u] = calloc((size_t)unit->n_tensors, sizeof **p->plan->sources);
        if (p->plan->sources[u] == NULL) {
            return QS_FAIL(QS_ERR_MEMORY, "%s: no memory for the plan", index->path);
        }
        bool chunk = u >= index->config.n_layers && u < index->n_units;
        for (int i = 0; i < unit->n_tensors; i++) {
            qs_source *source = &p->plan->sources[u][i];
            QS_TRY(chunk ? plan_chunk(p, &unit->tensors[i], (u - index->config.n_layers) % chunks,
                                      source)
                         : plan_tensor(p, unit, &unit->tensors[i], source));
        }
    }
    return QS_OK;
}

static bool ends_in(const char *name, const char *suffix)
{
    size_t n = strlen(name);
    size_t m = strlen(suffix);
    return n >= m && strcmp(name + n - m, suffix) == 0;
}

/* A head beside a tied embedding is a copy of it, or one that was trained apart, which transformers
 * (5.0 and later) uses and older ones do not. Training a head alone changes all of its rows, so
 * that elements of 512 places, spread evenly, tell. */
static qs_status check_tied_head(const qs_plan *plan, const qs_st_tensor *head)
{
    enum { PLACES = 512, RUN = 256 };
    const qs_st_tensor *embed = qs_st_find(plan->dir, "model.embed_tokens.weight");
    bool same = embed != NULL && embed->count == head->count;
    for (int64_t i = 0; i < PLACES && same; i++) {
        float a[RUN], b[RUN];
        const int64_t run = head->count < RUN ? head->count : RUN;
        const int64_t first = (head->count - run) / PLACES * i;
        QS_TRY(qs_st_read_f32(plan->dir, head, first, run, a));
        QS_TRY(qs_st_read_f32(plan->dir, embed, first, run, b));
        same = memcmp(a, b, (size_t)run * sizeof *a) == 0;
    }
    if (!same) {
        return QS_FAIL(QS_ERR_INPUT_TENSOR,
                       "%s: tie_word_embeddings is true, but lm_head.weight is not the embedding; "
                       "in a copy of the model set it to false, or leave that tensor out",
                       qs_st_path(plan->dir));
    }
    qs_log_info("%s: lm_head.weight is ignored, as it is the embedding once more",
                qs_st_path(plan->dir));
    return QS_OK;
}

/* What is left over must be known to change nothing. */
static qs_status check_leftovers(const planner *p)
{
    for (int64_t i = 0; i < qs_st_count(p->plan->dir); i++) {
        const qs_st_tensor *t = qs_st_at(p->plan->dir, i);
        if (p->used[i] || ends_in(t->name, "rotary_emb.inv_freq")) {
            continue;
        }
        if (p->plan->index->config.tied && strcmp(t->name, "lm_head.weight") == 0) {
            QS_TRY(check_tied_head(p->plan, t));
            continue;
        }
        return QS_FAIL(QS_ERR_INPUT_TENSOR,
                       "%s: tensor \"%.200s\" has no place in a model of this config.json",
                       qs_st_path(p->plan->dir), t->name);
    }
    return QS_OK;
}

/* A checkpoint is an import if any tensor is in NF4, whatever config.json says. */
static qs_status detect_import(planner *p)
{
    for (int64_t i = 0; i < qs_st_count(p->plan->dir) && !p->import; i++) {
        p->import = ends_in(qs_st_at(p->plan->dir, i)->name, ".quant_state.bitsandbytes__nf4");
    }
    if (p->plan->index->config.bnb_4bit && !p->import) {
        return QS_FAIL(QS_ERR_INPUT_TENSOR,
                       "%s: config.json has a quantization_config, but no tensor has a "
                       "quant_state.bitsandbytes__nf4",
                       qs_st_path(p->plan->dir));
    }
    return QS_OK;
}

/* The index is JSON and names the checkpoint. */
static qs_status check_name(const char *hf_dir)
{
    return qs_json_is_utf8(hf_dir)
               ? QS_OK
               : QS_FAIL(QS_ERR_CONFIG_VALUE,
                         "%s: the path of the checkpoint is not UTF-8; rename it", hf_dir);
}

static qs_status start_index(qs_plan *plan, const char *hf_dir, int64_t head_chunk_rows)
{
    QS_TRY(check_name(hf_dir));
    qs_base_index *index = calloc(1, sizeof *index);
    plan->index = index;
    if (index == NULL || (index->path = strdup(hf_dir)) == NULL ||
        (index->source_path = strdup(hf_dir)) == NULL ||
        (index->quantizer = strdup("qshard " QSHARD_VERSION)) == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory for the plan", hf_dir);
    }
    QS_TRY(read_config(index, hf_dir));
    QS_TRY(read_generation(index, hf_dir));
    index->head_chunk_rows = head_chunk_rows;
    index->n_maps = 1;
    QS_TRY(QS_ALLOC(&index->maps, 256, QS_MEM_WORK));
    memcpy(index->maps, qs_dynamic_map, sizeof qs_dynamic_map);
    return qs_base_make_units(index);
}

/* Number the quanta of every unit, once kinds and dtypes are known. */
static void place_units(qs_plan *plan)
{
    for (int u = 0; u <= plan->index->n_units; u++) {
        qs_base_place(plan->index, qs_plan_unit(plan, u), qs_base_raw_elems(plan->index, u));
    }
}

static qs_status fill(planner *p, const char *hf_dir, int64_t head_chunk_rows, bool double_quant)
{
    qs_plan *plan = p->plan;
    QS_TRY(start_index(plan, hf_dir, head_chunk_rows));
    QS_TRY(qs_st_open(&plan->dir, hf_dir, "model"));
    qs_base_index *index = plan->index;
    QS_TRY(qs_hf_take_text_tensors(plan->dir, &index->config));
    p->used = calloc((size_t)qs_st_count(plan->dir) + 1, sizeof *p->used);
    plan->sources = calloc((size_t)index->n_units + 1, sizeof *plan->sources);
    if (p->used == NULL || plan->sources == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory for the plan", hf_dir);
    }
    QS_TRY(detect_import(p));
    QS_TRY(plan_units(p));
    QS_TRY(check_leftovers(p));
    index->nested = p->nested_seen >= 0 ? p->nested_seen == 1 : double_quant;
    place_units(plan);
    return QS_OK;
}

qs_status qs_base_index_expected(qs_base_index **out, const char *hf_dir)
{
    qs_plan plan = {0};
    qs_status st = start_index(&plan, hf_dir, QS_DEFAULT_CHUNK_ROWS);
    *out = NULL;
    if (st == QS_OK) {
        plan.index->nested = true;
        place_units(&plan);
        *out = plan.index;
        plan.index = NULL;
    }
    qs_plan_free(&plan);
    return st;
}

qs_status qs_plan_make(qs_plan *plan, const char *hf_dir, int64_t head_chunk_rows,
                       bool double_quant)
{
    planner p = {.plan = plan, .nested_seen = -1};
    *plan = (qs_plan){0};
    qs_status st = fill(&p, hf_dir, head_chunk_rows, double_quant);
    free(p.used);
    if (st != QS_OK) {
        qs_plan_free(plan);
    }
    return st;
}

qs_status qs_plan_hash_tokenizer(qs_plan *plan, const char *hf_dir)
{
    qs_status st = QS_OK;
    void *text = NULL;
    char *path = NULL;
    size_t bytes = 0;
    QS_TRY(qs_io_join(&path, hf_dir, "tokenizer.json"));
    if (access(path, F_OK) == 0) {
        QS_GOTO(qs_io_read_file(path, MAX_TOKENIZER_BYTES, &text, &bytes));
        qs_sha256_hex(text, bytes, plan->index->tokenizer_sha256);
    }
done:
    free(text);
    free(path);
    return forgive(st,
                   "its hash is left out, so data that were prepared with another tokenizer are "
                   "not noticed");
}
