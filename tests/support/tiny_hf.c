#include "tiny_hf.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "hf/safetensors.h"
#include "quant/nf4.h"
#include "store/io.h"

enum { MAX_ITEMS = 256 };

typedef struct {
    const tiny_hf *o;
    qs_st_item items[MAX_ITEMS];
    int count;
    uint32_t seed;
} builder;

/* In the order of the units. */
typedef struct {
    const char *path;
    int64_t out, in;
} linear_shape;

static const linear_shape seven[] = {
    {"self_attn.q_proj", TINY_HEADS *TINY_HEAD_DIM, TINY_HIDDEN},
    {"self_attn.k_proj", TINY_KV_HEADS *TINY_HEAD_DIM, TINY_HIDDEN},
    {"self_attn.v_proj", TINY_KV_HEADS *TINY_HEAD_DIM, TINY_HIDDEN},
    {"self_attn.o_proj", TINY_HIDDEN, TINY_HEADS *TINY_HEAD_DIM},
    {"mlp.gate_proj", TINY_FFN, TINY_HIDDEN},
    {"mlp.up_proj", TINY_FFN, TINY_HIDDEN},
    {"mlp.down_proj", TINY_HIDDEN, TINY_FFN},
};
static const linear_shape four[] = {
    {"self_attn.o_proj", TINY_HIDDEN, TINY_HEADS *TINY_HEAD_DIM},
    {"mlp.down_proj", TINY_HIDDEN, TINY_FFN},
    {"self_attn.qkv_proj", (TINY_HEADS + 2 * TINY_KV_HEADS) * TINY_HEAD_DIM, TINY_HIDDEN},
    {"mlp.gate_up_proj", 2 * TINY_FFN, TINY_HIDDEN},
};

int tiny_hf_linears(const tiny_hf *o)
{
    return (int)(o->fused ? sizeof four / sizeof *four : sizeof seven / sizeof *seven);
}

/* `data` and `name` become the builder's. columns 0: a vector. */
static void add(builder *b, char *name, qs_dtype dtype, int64_t rows, int64_t columns, void *data)
{
    cr_assert_lt(b->count, MAX_ITEMS);
    if (b->o->drop != NULL && strcmp(b->o->drop, name) == 0) {
        free(name);
        free(data);
        return;
    }
    b->items[b->count++] = (qs_st_item){.name = name,
                                        .dtype = dtype,
                                        .rank = columns > 0 ? 2 : 1,
                                        .shape = {rows, columns},
                                        .data = data};
}

static char *name_of(const char *format, int layer, const char *middle, const char *end)
{
    char text[160];
    (void)snprintf(text, sizeof text, format, layer, middle, end);
    return strdup(text);
}

static float *random_floats(builder *b, int64_t count, bool zero)
{
    float *x = malloc((size_t)count * sizeof *x);
    for (int64_t i = 0; i < count; i++) {
        b->seed = b->seed * 1664525U + 1013904223U;
        x[i] =
            zero ? 0.0f : ((float)(b->seed >> 8) * 0x1p-24f - 0.5f) * (i % 211 == 3 ? 9.0f : 1.0f);
    }
    return x;
}

static void add_floats(builder *b, char *name, int64_t rows, int64_t columns, bool zero)
{
    int64_t count = rows * (columns > 0 ? columns : 1);
    float *x = random_floats(b, count, zero);
    if (b->o->poison != NULL && strcmp(b->o->poison, name) == 0) {
        x[7] = NAN;
    }
    void *stored = malloc((size_t)count * qs_dtype_bytes(b->o->dtype));
    qs_f32_store(stored, b->o->dtype, x, count);
    free(x);
    add(b, name, b->o->dtype, rows, columns, stored);
}

static char *suffixed(const char *name, const char *suffix)
{
    char text[200];
    (void)snprintf(text, sizeof text, "%s.%s", name, suffix);
    return strdup(text);
}

static void add_state(builder *b, const char *name, int64_t out, int64_t in, float offset)
{
    static const char *const dtypes[] = {
        [QS_F32] = "float32", [QS_BF16] = "bfloat16", [QS_F16] = "float16"};
    char text[400], nested[120] = "";
    if (b->o->scheme == TINY_BNB_NESTED) {
        (void)snprintf(nested, sizeof nested,
                       ", \"nested_blocksize\": 256, \"nested_dtype\": \"float32\", "
                       "\"nested_offset\": %.17g",
                       (double)offset);
    }
    (void)snprintf(text, sizeof text,
                   "{\"quant_type\": \"nf4\", \"blocksize\": 64, \"dtype\": \"%s\", \"shape\": "
                   "[%lld, %lld]%s}",
                   dtypes[b->o->dtype], (long long)out, (long long)in, nested);
    const char *used = text;
    if (b->o->state != NULL && strcmp(name, "model.layers.0.self_attn.q_proj.weight") == 0) {
        used = b->o->state;
    }
    add(b, suffixed(name, "quant_state.bitsandbytes__nf4"), QS_U8, (int64_t)strlen(used), 0,
        strdup(used));
}

static float *copied(const float *x, int64_t count)
{
    float *out = malloc((size_t)count * sizeof *out);
    memcpy(out, x, (size_t)count * sizeof *out);
    return out;
}

/* A weight as bitsandbytes stores it. */
static void add_bnb(builder *b, char *name, int64_t out, int64_t in)
{
    int64_t count = out * in;
    int64_t blocks = (count + 63) / 64;
    float *x = random_floats(b, count, false);
    float *absmax = malloc((size_t)blocks * sizeof *absmax);
    float *absmax32 = malloc((size_t)qs_nf4_quanta(count) * sizeof *absmax32);
    uint8_t *absmax8 = malloc((size_t)blocks);
    uint8_t *packed = malloc((size_t)(count + 1) / 2);
    float offset = 0.5f;
    qs_nf4_quantize_blocks(x, count, packed, absmax);
    qs_nf4_quantize_absmax(absmax, blocks, offset, absmax8, absmax32);
    free(x);
    add(b, suffixed(name, "quant_map"), QS_F32, 16, 0, copied(qs_nf4_code, 16));
    if (b->o->scheme == TINY_BNB_NESTED) {
        float *map = copied(qs_dynamic_map, 256);
        map[3] = b->o->foreign_map ? nextafterf(map[3], 0.0f) : map[3];
        add(b, suffixed(name, "absmax"), QS_U8, blocks, 0, absmax8);
        add(b, suffixed(name, "nested_absmax"), QS_F32, qs_nf4_quanta(count), 0, absmax32);
        add(b, suffixed(name, "nested_quant_map"), QS_F32, 256, 0, map);
        free(absmax);
    } else {
        add(b, suffixed(name, "absmax"), QS_F32, blocks, 0, absmax);
        free(absmax8);
        free(absmax32);
    }
    add_state(b, name, out, in, offset);
    if (b->o->bf16_storage) {
        add(b, name, QS_BF16, count / 4, 1, packed);
    } else {
        add(b, name, QS_U8, (count + 1) / 2, 1, packed);
    }
}

static void add_layer(builder *b, int layer)
{
    static const char *const format = "model.layers.%d.%s.%s";
    const linear_shape *linears = b->o->fused ? four : seven;
    for (int i = 0; i < tiny_hf_linears(b->o); i++) {
        char *name = name_of(format, layer, linears[i].path, "weight");
        bool raw = b->o->scheme == TINY_FLOAT || (layer == 0 && b->o->leave_raw == i + 1);
        if (raw) {
            add_floats(b, name, linears[i].out, linears[i].in,
                       b->o->zero_rows && layer == 0 && i == 4);
        } else {
            add_bnb(b, name, linears[i].out, linears[i].in);
        }
        if (b->o->biases) {
            add_floats(b, name_of(format, layer, linears[i].path, "bias"), linears[i].out, 0,
                       false);
        }
    }
    add_floats(b, name_of(format, layer, "input_layernorm", "weight"), TINY_HIDDEN, 0, false);
    add_floats(b, name_of(format, layer, "post_attention_layernorm", "weight"), TINY_HIDDEN, 0,
               false);
}

static void write_config(const char *dir, const tiny_hf *o)
{
    char text[2048], path[300];
    static const char *const bnb =
        ",\"quantization_config\":{\"quant_method\":\"bitsandbytes\",\"load_in_4bit\":true,"
        "\"bnb_4bit_quant_type\":\"nf4\"}";
    int n = snprintf(text, sizeof text,
                     "{\"model_type\":\"%s\",\"hidden_size\":%d,\"intermediate_size\":%d,"
                     "\"num_hidden_layers\":%d,\"num_attention_heads\":%d,"
                     "\"num_key_value_heads\":%d,\"head_dim\":%d,\"vocab_size\":%d,"
                     "\"tie_word_embeddings\":%s,\"attention_bias\":%s,\"mlp_bias\":%s,"
                     "\"rms_norm_eps\":1e-5%s%s}",
                     o->fused ? "phi3" : "llama", TINY_HIDDEN, TINY_FFN, TINY_LAYERS, TINY_HEADS,
                     TINY_KV_HEADS, TINY_HEAD_DIM, TINY_VOCAB, o->untied ? "false" : "true",
                     o->biases ? "true" : "false", o->biases ? "true" : "false",
                     o->scheme == TINY_FLOAT ? "" : bnb, o->config != NULL ? o->config : "");
    (void)snprintf(path, sizeof path, "%s/config.json", dir);
    cr_assert_eq(qs_io_write_file(path, text, (size_t)n), QS_OK, "%s", qs_error_text());
}

void tiny_hf_write(const char *dir, const tiny_hf *o)
{
    char path[300];
    builder *b = calloc(1, sizeof *b);
    b->o = o;
    b->seed = 77;
    add_floats(b, strdup("model.embed_tokens.weight"), TINY_VOCAB, TINY_HIDDEN, false);
    for (int l = 0; l < TINY_LAYERS; l++) {
        add_layer(b, l);
    }
    add_floats(b, strdup("model.norm.weight"), TINY_HIDDEN, 0, false);
    if (o->untied) {
        add_floats(b, strdup("lm_head.weight"), TINY_VOCAB, TINY_HIDDEN, false);
    }
    if (o->add != NULL) {
        add_floats(b, strdup(o->add), TINY_HIDDEN, 0, false);
    }
    write_config(dir, o);
    (void)snprintf(path, sizeof path, "%s/model.safetensors", dir);
    cr_assert_eq(qs_st_write(path, b->items, b->count, NULL), QS_OK, "%s", qs_error_text());
    for (int i = 0; i < b->count; i++) {
        free((void *)(uintptr_t)b->items[i].name);
        free((void *)(uintptr_t)b->items[i].data);
    }
    free(b);
}
