/* NF4 tensors of a bitsandbytes checkpoint: read their state, check that it is the scheme that
 * base.h5 holds, and say where the bytes lie. The bytes themselves are taken over as they are.
 *
 *   P.weight                                   packed codes, any storage dtype
 *   P.weight.absmax                            u8 per block (nested) or f32 per block
 *   P.weight.quant_map                         f32 [16]
 *   P.weight.nested_absmax, .nested_quant_map  f32 per 256 blocks, f32 [256]
 *   P.weight.quant_state.bitsandbytes__nf4     JSON */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "hf/safetensors.h"
#include "store/json.h"
#include "weights/quantize_impl.h"

enum { MAX_STATE_BYTES = 1 << 16, NAME = 512, PATH = 1024 };

static const char state_suffix[] = "quant_state.bitsandbytes__nf4";

static const qs_st_tensor *find(const qs_st_dir *dir, const char *name, const char *suffix)
{
    char full[NAME];
    (void)snprintf(full, sizeof full, "%s.%s", name, suffix);
    return qs_st_find(dir, full);
}

bool qs_bnb_present(const qs_st_dir *dir, const char *name)
{
    return find(dir, name, state_suffix) != NULL;
}

static qs_status unsupported(const qs_st_dir *dir, const char *name, const char *field,
                             const char *value, const char *wanted)
{
    return QS_FAIL(QS_ERR_INPUT_UNKNOWN, "%s: tensor %s: %s = %.80s is not supported; %s is",
                   qs_st_path(dir), name, field, value, wanted);
}

/* A sidecar that must exist with this dtype and element count. */
static qs_status sidecar(const qs_st_dir *dir, const char *name, const char *suffix,
                         qs_st_dtype dtype, int64_t count, const qs_st_tensor **out)
{
    const qs_st_tensor *t = find(dir, name, suffix);
    if (t == NULL) {
        return QS_FAIL(QS_ERR_INPUT_TENSOR, "%s: tensor %s.%s is missing", qs_st_path(dir), name,
                       suffix);
    }
    if (t->dtype != dtype || t->count != count) {
        return QS_FAIL(QS_ERR_INPUT_TENSOR, "%s: tensor %s.%s: %lld of %s; %lld of %s are needed",
                       qs_st_path(dir), name, suffix, (long long)t->count,
                       qs_st_dtype_name(t->dtype), (long long)count, qs_st_dtype_name(dtype));
    }
    *out = t;
    return QS_OK;
}

/* "FILE: tensor NAME: quant_state", for the messages about its fields. */
static const char *state_path(char out[PATH], const qs_st_dir *dir, const char *name)
{
    (void)snprintf(out, PATH, "%s: tensor %s: quant_state", qs_st_path(dir), name);
    return out;
}

static qs_status expect_text(const qs_st_dir *dir, const json_t *state, const char *name,
                             const char *key, const char *wanted)
{
    const char *text = NULL;
    char path[PATH];
    QS_TRY(qs_json_text(state, key, &text, state_path(path, dir, name)));
    return strcmp(text, wanted) == 0 ? QS_OK : unsupported(dir, name, key, text, wanted);
}

static qs_status expect_number(const qs_st_dir *dir, const json_t *state, const char *name,
                               const char *key, int64_t wanted)
{
    int64_t got;
    char value[32], want[32], path[PATH];
    QS_TRY(qs_json_i64(state, key, INT64_MIN, INT64_MAX, &got, state_path(path, dir, name)));
    (void)snprintf(value, sizeof value, "%lld", (long long)got);
    (void)snprintf(want, sizeof want, "%lld", (long long)wanted);
    return got == wanted ? QS_OK : unsupported(dir, name, key, value, want);
}

static qs_status check_keys(const qs_st_dir *dir, const json_t *state, const char *name)
{
    static const char *const known[] = {"quant_type",       "blocksize",    "dtype",        "shape",
                                        "nested_blocksize", "nested_dtype", "nested_offset"};
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)(uintptr_t)state, key, value)
    {
        bool found = false;
        for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
            found = found || strcmp(known[i], key) == 0;
        }
        if (!found) {
            return unsupported(dir, name, "a quant_state key", key, "none beyond bitsandbytes'");
        }
    }
    return QS_OK;
}

static qs_status check_shape(const qs_st_dir *dir, const json_t *state, const char *name,
                             int64_t out, int64_t in)
{
    const json_t *shape = NULL;
    char path[PATH];
    QS_TRY(qs_json_array(state, "shape", &shape, state_path(path, dir, name)));
    if (json_array_size(shape) != 2 || json_integer_value(json_array_get(shape, 0)) != out ||
        json_integer_value(json_array_get(shape, 1)) != in) {
        return QS_FAIL(QS_ERR_INPUT_TENSOR,
                       "%s: tensor %s: shape in its quant_state is not [%lld, %lld]",
                       qs_st_path(dir), name, (long long)out, (long long)in);
    }
    return QS_OK;
}

static qs_status check_state(qs_st_dir *dir, const json_t *state, const char *name,
                             qs_bnb_tensor *bnb, int64_t out, int64_t in)
{
    const char *text = NULL;
    double offset;
    char path[PATH];
    QS_TRY(check_keys(dir, state, name));
    QS_TRY(expect_text(dir, state, name, "quant_type", "nf4"));
    QS_TRY(expect_number(dir, state, name, "blocksize", QS_NF4_BLOCK));
    QS_TRY(check_shape(dir, state, name, out, in));
    QS_TRY(qs_json_text(state, "dtype", &text, state_path(path, dir, name)));
    int dtype = qs_dtype_parse(text);
    if (dtype != (int)QS_BF16 && dtype != (int)QS_F16 && dtype != (int)QS_F32) {
        return unsupported(dir, name, "dtype", text, "bfloat16, float16 or float32");
    }
    bnb->dtype = (qs_dtype)dtype;
    bnb->nested = json_object_get(state, "nested_blocksize") != NULL;
    if (bnb->nested) {
        QS_TRY(expect_number(dir, state, name, "nested_blocksize", QS_NF4_QUANTUM_BLOCKS));
        QS_TRY(expect_text(dir, state, name, "nested_dtype", "float32"));
        QS_TRY(
            qs_json_f64(state, "nested_offset", -3e38, 3e38, &offset, state_path(path, dir, name)));
        bnb->offset = (float)offset;
    }
    return QS_OK;
}

static qs_status read_state(qs_st_dir *dir, const qs_st_tensor *tensor, const char *name,
                            qs_bnb_tensor *bnb, int64_t out, int64_t in)
{
    qs_status st = QS_OK;
    json_t *state = NULL;
    char path[PATH];
    if (tensor->dtype != QS_ST_U8 || tensor->bytes > MAX_STATE_BYTES) {
        return QS_FAIL(QS_ERR_INPUT_TENSOR, "%s: tensor %s: is not a text of at most %d bytes",
                       qs_st_path(dir), tensor->name, MAX_STATE_BYTES);
    }
    char *text = calloc((size_t)tensor->bytes + 1, 1);
    if (text == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory for its quant_state", name);
    }
    QS_GOTO(qs_st_read(dir, tensor, 0, tensor->bytes, text));
    QS_GOTO(qs_json_parse(&state, text, (size_t)tensor->bytes, state_path(path, dir, name)));
    if (!json_is_object(state)) {
        QS_GOTO(QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: is not a JSON object", path));
    }
    QS_GOTO(check_state(dir, state, name, bnb, out, in));
done:
    json_decref(state);
    free(text);
    return st;
}

/* The codebook must be NF4's, bit for bit; the second-level map only has to be finite. */
static qs_status read_maps(qs_st_dir *dir, const char *name, qs_bnb_tensor *bnb,
                           const qs_st_tensor *code, const qs_st_tensor *map)
{
    float values[16];
    QS_TRY(qs_st_read_f32(dir, code, 0, 16, values));
    for (int i = 0; i < 16; i++) {
        if (values[i] != qs_nf4_code[i]) {
            char value[48];
            (void)snprintf(value, sizeof value, "%.9g at entry %d", (double)values[i], i);
            return unsupported(dir, name, "quant_map", value, "the NF4 code");
        }
    }
    if (map == NULL) {
        return QS_OK;
    }
    QS_TRY(qs_st_read_f32(dir, map, 0, 256, bnb->map));
    for (int i = 0; i < 256; i++) {
        if (!isfinite(bnb->map[i])) {
            return unsupported(dir, name, "nested_quant_map", "not finite", "a finite map");
        }
    }
    return QS_OK;
}

qs_status qs_bnb_read(qs_st_dir *dir, const char *name, int64_t out, int64_t in, qs_bnb_tensor *bnb,
                      void (*mark)(void *, const qs_st_tensor *), void *user)
{
    int64_t count = out * in;
    int64_t blocks = (count + QS_NF4_BLOCK - 1) / QS_NF4_BLOCK;
    const qs_st_tensor *state = find(dir, name, state_suffix);
    const qs_st_tensor *code = NULL;
    const qs_st_tensor *map = NULL;
    memset(bnb, 0, sizeof *bnb);
    bnb->source.data = qs_st_find(dir, name);
    if (bnb->source.data == NULL || bnb->source.data->bytes != (count + 1) / 2) {
        return QS_FAIL(QS_ERR_INPUT_TENSOR,
                       "%s: tensor %s: %lld bytes; %lld packed bytes are needed", qs_st_path(dir),
                       name, bnb->source.data == NULL ? 0LL : (long long)bnb->source.data->bytes,
                       (long long)(count + 1) / 2);
    }
    QS_TRY(read_state(dir, state, name, bnb, out, in));
    QS_TRY(sidecar(dir, name, "quant_map", QS_ST_F32, 16, &code));
    QS_TRY(sidecar(dir, name, "absmax", bnb->nested ? QS_ST_U8 : QS_ST_F32, blocks,
                   &bnb->source.absmax));
    if (bnb->nested) {
        QS_TRY(sidecar(dir, name, "nested_absmax", QS_ST_F32, qs_nf4_quanta(count),
                       &bnb->source.nested_absmax));
        QS_TRY(sidecar(dir, name, "nested_quant_map", QS_ST_F32, 256, &map));
        mark(user, bnb->source.nested_absmax);
        mark(user, map);
    }
    mark(user, bnb->source.data);
    mark(user, bnb->source.absmax);
    mark(user, code);
    mark(user, state);
    return read_maps(dir, name, bnb, code, map);
}
