/* base.h5: every rank count reads the same weights, and no damaged byte goes unnoticed. */
#define _GNU_SOURCE
#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"
#include "base/mem.h"
#include "hf/safetensors.h"
#include "store/io.h"
#include "support/tiny_hf.h"
#include "team.h"
#include "tests/scratch.h"
#include "weights/base_file.h"
#include "weights/base_impl.h"
#include "weights/quantize.h"

static char dir[SCRATCH_MAX], base[96];

/* A model with its own head, biases, two quanta per large tensor and a short last chunk. */
static void make_base(void)
{
    tiny_hf o = {.dtype = QS_BF16, .untied = true, .biases = true};
    qs_quantize_report report;
    qs_comm *comm = NULL;
    scratch_make(dir, NULL);
    qs_log_init(0, 1, QS_LOG_QUIET, false);
    tiny_hf_write(dir, &o);
    (void)snprintf(base, sizeof base, "%s/base.h5", dir);
    qs_quantize_options options = {
        .hf_dir = dir, .output = base, .head_chunk_rows = 100, .double_quant = true, .threads = 2};
    cr_assert_eq(qs_comm_self_create(&comm), QS_OK);
    cr_assert_eq(qs_quantize(&options, comm, &report), QS_OK, "%s", qs_error_text());
    qs_comm_destroy(comm);
}

static void remove_dir(void)
{
    scratch_remove(dir);
}

TestSuite(base_file, .init = make_base, .fini = remove_dir);

static qs_base_index *open_index(void)
{
    qs_base_index *index = NULL;
    cr_assert_eq(qs_base_open_local(&index, base), QS_OK, "%s", qs_error_text());
    return index;
}

Test(base_file, index_says_where_everything_is)
{
    qs_base_index *index = open_index();
    cr_assert_eq(index->n_units, 2 + 4 + 4, "two layers, four chunks of each table");
    cr_assert_eq(qs_base_embed_chunks(index), 4);
    cr_assert_eq(qs_base_head_chunks(index), 4);
    cr_assert_str_eq(index->units[qs_base_layer_unit(index, 1)].name, "layers.1");
    cr_assert_str_eq(index->units[qs_base_embed_unit(index, 3)].name, "embed.3");
    cr_assert_str_eq(index->units[qs_base_head_unit(index, 0)].name, "head.0");
    const qs_base_unit *last = &index->units[qs_base_embed_unit(index, 3)];
    cr_assert_eq(last->tensors[0].shape[0], 1, "301 rows in chunks of 100");
    cr_assert_eq(last->size.raw_quantum_elems, TINY_HIDDEN);
    const qs_base_unit *layer = &index->units[1];
    const qs_base_tensor *up = qs_base_find(layer, "up_proj.weight");
    cr_assert_not_null(up);
    cr_assert_str_eq(up->name, "model.layers.1.mlp.up_proj.weight");
    cr_assert_null(qs_base_find(layer, "q_norm.weight"));
    cr_assert_eq(layer->packed_at % 4096, 0);
    cr_assert_eq(index->n_maps, 1);
    cr_assert_eq(memcmp(index->maps, qs_dynamic_map, sizeof qs_dynamic_map), 0);
    cr_assert_str_eq(index->source_path, dir);
    qs_weight w = qs_base_weight(index, up);
    cr_assert(w.kind == QS_WEIGHT_NF4 && w.out == TINY_FFN && w.in == TINY_HIDDEN &&
              w.map == index->maps && w.dtype == QS_BF16);
    qs_base_index_free(index);
}

/* ---- shares ---- */

/* A unit as `n` ranks gather it. */
static uint8_t *gather(const qs_base_index *index, int u, int n)
{
    qs_unit_layout l = qs_unit_layout_make(&index->units[u].size, n);
    uint8_t *all = NULL;
    uint64_t bytes = 0;
    int fd = open(base, O_RDONLY);
    cr_assert_eq(QS_ALLOC(&all, l.message_bytes * (size_t)n, QS_MEM_WORK), QS_OK);
    for (int r = 0; r < n; r++) {
        cr_assert_eq(
            qs_base_read_share(index, fd, u, r, n, all + (size_t)r * l.message_bytes, &bytes),
            QS_OK, "%s", qs_error_text());
    }
    close(fd);
    const qs_unit_size *s = &index->units[u].size;
    cr_assert_eq(bytes, (uint64_t)s->nf4_quanta * (8192 + 256 + 4) +
                            (uint64_t)s->raw_quanta * qs_raw_quantum_bytes(s));
    return all;
}

static float *decode(const qs_base_index *index, int u, int n, int tensor)
{
    const qs_base_tensor *t = &index->units[u].tensors[tensor];
    float *out = malloc((size_t)qs_base_tensor_count(t) * sizeof *out);
    uint8_t *all = gather(index, u, n);
    qs_unit_view view = {qs_unit_layout_make(&index->units[u].size, n), all};
    qs_weight w = qs_base_weight(index, t);
    qs_weight_decode(&view, &w, 0, qs_base_tensor_count(t), out);
    qs_mem_free(all);
    return out;
}

ParameterizedTestParameters(base_file, every_rank_count_reads_the_same_weights)
{
    static int n[] = {2, 3, 5, 16};
    return cr_make_param_array(int, n, sizeof n / sizeof *n);
}

ParameterizedTest(int *n, base_file, every_rank_count_reads_the_same_weights)
{
    qs_base_index *index = open_index();
    for (int u = 0; u < index->n_units; u++) {
        for (int i = 0; i < index->units[u].n_tensors; i++) {
            const qs_base_tensor *t = &index->units[u].tensors[i];
            if (t->kind == QS_TENSOR_SMALL) {
                continue;
            }
            float *one = decode(index, u, 1, i);
            float *many = decode(index, u, *n, i);
            cr_assert_eq(memcmp(one, many, (size_t)qs_base_tensor_count(t) * sizeof *one), 0,
                         "%s, %d ranks", t->name, *n);
            free(one);
            free(many);
        }
    }
    qs_base_index_free(index);
}

Test(base_file, raw_and_small_tensors_are_the_checkpoints)
{
    qs_base_index *index = open_index();
    qs_st_dir *hf = NULL;
    float want[TINY_HIDDEN * 100], got[TINY_HIDDEN];
    uint8_t small[4096];
    cr_assert_eq(qs_st_open(&hf, dir, "model"), QS_OK);
    const qs_st_tensor *head = qs_st_find(hf, "lm_head.weight");
    cr_assert_eq(qs_st_read_f32(hf, head, 100 * TINY_HIDDEN, 100 * TINY_HIDDEN, want), QS_OK);
    float *chunk = decode(index, qs_base_head_unit(index, 1), 3, 0);
    cr_assert_eq(memcmp(chunk, want, sizeof want), 0);
    int fd = open(base, O_RDONLY);
    cr_assert_leq(index->units[1].small_bytes, (int64_t)sizeof small);
    cr_assert_eq(qs_base_read_small(index, fd, &index->units[1], small), QS_OK);
    const qs_base_tensor *bias = qs_base_find(&index->units[1], "k_proj.bias");
    qs_base_small_f32(bias, small, got);
    cr_assert_eq(qs_st_read_f32(hf, qs_st_find(hf, bias->name), 0, bias->shape[0], want), QS_OK);
    cr_assert_eq(memcmp(got, want, (size_t)bias->shape[0] * sizeof *got), 0);
    close(fd);
    free(chunk);
    qs_st_close(hf);
    qs_base_index_free(index);
}

/* ---- all ranks ---- */

static qs_status read_on_all(team_member *me)
{
    qs_base_index *index = NULL;
    const qs_base_index *first = me->ctx;
    QS_TRY(qs_base_index_read(&index, base, me->comm));
    TEAM_CHECK(index->n_units == first->n_units && index->n_maps == 1, "sizes differ");
    TEAM_CHECK(memcmp(index->maps, first->maps, 1024) == 0, "maps differ");
    for (int u = 0; u < index->n_units; u++) {
        TEAM_CHECK(index->units[u].packed_at == first->units[u].packed_at &&
                       index->units[u].raw_at == first->units[u].raw_at &&
                       index->units[u].hash_at == first->units[u].hash_at,
                   "places of unit %d differ", u);
    }
    TEAM_CHECK(index->final.small_at == first->final.small_at, "place of final differs");
    qs_base_index_free(index);
    return QS_OK;
}

Test(base_file, all_ranks_get_rank_0s_index)
{
    team_member members[TEAM_MAX];
    qs_base_index *index = open_index();
    team_run(members, 3, read_on_all, index);
    for (int r = 0; r < 3; r++) {
        cr_assert_eq(members[r].st, QS_OK, "rank %d: %s", r, members[r].text);
    }
    qs_base_index_free(index);
}

Test(base_file, all_ranks_fail_alike_without_a_file)
{
    team_member members[TEAM_MAX];
    qs_base_index *index = open_index();
    cr_assert_eq(unlink(base), 0);
    team_run(members, 3, read_on_all, index);
    for (int r = 0; r < 3; r++) {
        cr_assert_eq(members[r].st, QS_ERR_INPUT_MISSING, "rank %d", r);
    }
    qs_base_index_free(index);
}

/* ---- damage ---- */

static void flip(int64_t at)
{
    uint8_t byte;
    int fd = open(base, O_RDWR);
    cr_assert_eq(pread(fd, &byte, 1, at), 1);
    byte ^= 4;
    cr_assert_eq(pwrite(fd, &byte, 1, at), 1);
    close(fd);
}

Test(base_file, undamaged_file_verifies)
{
    cr_assert_eq(qs_base_verify(base), QS_OK, "%s", qs_error_text());
}

Test(base_file, a_flipped_bit_anywhere_in_the_data_is_found_and_named)
{
    qs_base_index *index = open_index();
    const qs_base_unit *layer = &index->units[1];
    const struct {
        int64_t at;
        const char *named;
    } place[] = {
        {layer->packed_at, "q_proj"},
        {layer->packed_at + layer->size.nf4_quanta * 8192 - 1, "down_proj"}, /* padding counts */
        {layer->absmax8_at + 256 * 3, "layers.1"},
        {layer->absmax32_at + 4 * (layer->size.nf4_quanta - 1), "down_proj"},
        {layer->small_at, "layers.1"},
        {layer->hash_at, "hashes_sha256"},
        {index->units[3].raw_at + 7, "embed_tokens"},
        {index->units[9].raw_at, "lm_head"},
        {index->final.small_at + 143, "final"},
    };
    for (size_t i = 0; i < sizeof place / sizeof *place; i++) {
        flip(place[i].at);
        qs_error_clear();
        cr_assert_eq(qs_base_verify(base), QS_ERR_INPUT_HASH, "place %zu", i);
        cr_assert_not_null(strstr(qs_error_text(), place[i].named), "%s", qs_error_text());
        flip(place[i].at);
    }
    cr_assert_eq(qs_base_verify(base), QS_OK);
    qs_base_index_free(index);
}

/* Numbers of the index and entries of a map stay what they may be, and are others. */
Test(base_file, a_flipped_bit_in_the_index_or_the_maps_is_found)
{
    static const char *const fields[] = {"\"offset\":0.", "\"rms_norm_eps\":"};
    qs_base_index *index = open_index();
    void *data = NULL;
    size_t bytes = 0;
    cr_assert_eq(qs_io_read_file(base, 1 << 26, &data, &bytes), QS_OK);
    int64_t place[3];
    for (int i = 0; i < 2; i++) {
        const char *field = memmem(data, bytes, fields[i], strlen(fields[i]));
        cr_assert_not_null(field, "the index has no %s", fields[i]);
        place[i] = field + strlen(fields[i]) + strcspn(field + strlen(fields[i]), "01234567") -
                   (const char *)data;
    }
    const char *map = memmem(data, bytes, index->maps, 256 * sizeof(float));
    cr_assert_not_null(map);
    place[2] = map + 200 * sizeof(float) + 1 - (const char *)data;
    for (int i = 0; i < 3; i++) {
        qs_base_index *damaged = NULL;
        flip(place[i]);
        qs_error_clear();
        cr_assert_eq(qs_base_open_local(&damaged, base), QS_ERR_INPUT_HASH, "place %d", i);
        cr_assert_not_null(strstr(qs_error_text(), "index_xxh3"), "%s", qs_error_text());
        flip(place[i]);
    }
    free(data);
    qs_base_index_free(index);
}

Test(base_file, the_owner_of_a_damaged_quantum_finds_it_and_others_do_not)
{
    qs_base_index *index = open_index();
    qs_unit_layout l = qs_unit_layout_make(&index->units[0].size, 2);
    uint8_t *message = NULL;
    uint64_t bytes = 0;
    cr_assert_eq(QS_ALLOC(&message, l.message_bytes, QS_MEM_WORK), QS_OK);
    flip(index->units[0].packed_at + 8192 * l.nf4_per_rank); /* the first of rank 1 */
    int fd = open(base, O_RDONLY);
    cr_expect_eq(qs_base_read_share(index, fd, 0, 0, 2, message, &bytes), QS_OK);
    cr_expect_eq(qs_base_read_share(index, fd, 0, 1, 2, message, &bytes), QS_ERR_INPUT_HASH);
    close(fd);
    qs_mem_free(message);
    qs_base_index_free(index);
}

Test(base_file, cut_files_do_not_open)
{
    void *data = NULL;
    size_t bytes = 0;
    cr_assert_eq(qs_io_read_file(base, 1 << 26, &data, &bytes), QS_OK);
    for (size_t n = 0; n < bytes; n += 4093) {
        qs_base_index *index = NULL;
        cr_assert_eq(truncate(base, 0), 0);
        cr_assert_eq(qs_io_write_file(base, data, n), QS_OK);
        qs_error_clear();
        cr_assert_eq(qs_exit_code(qs_base_open_local(&index, base)), 3, "%zu of %zu bytes", n,
                     bytes);
    }
    free(data);
}

/* ---- a hostile index ---- */

/* The JSON of the file with the first `from` replaced by `to`. */
static qs_status parse_changed(const qs_base_index *index, const char *from, const char *to)
{
    char *text = NULL;
    char *changed;
    qs_base_index *out = NULL;
    cr_assert_eq(qs_base_index_text(index, &text), QS_OK);
    const char *at = strstr(text, from);
    cr_assert_not_null(at, "the index has no %s", from);
    changed = calloc(strlen(text) + strlen(to) + 1, 1);
    memcpy(changed, text, (size_t)(at - text));
    strcat(changed, to);
    strcat(changed, at + strlen(from));
    qs_error_clear();
    qs_status st = qs_base_index_parse(&out, changed, strlen(changed), "b.h5");
    qs_base_index_free(out);
    free(changed);
    free(text);
    return st;
}

Test(base_file, an_index_that_contradicts_its_config_is_refused)
{
    static const char *const change[][2] = {
        {"\"nf4_quanta\":13", "\"nf4_quanta\":14"},
        {"\"nf4_quanta\":13", "\"nf4_quanta\":-1"},
        {"\"name\":\"layers.1\"", "\"name\":\"layers.2\""},
        {"self_attn.k_proj.weight", "self_attn.q_proj.weight"},
        {"\"shape\":[72,72]", "\"shape\":[72,71]"},
        {"\"shape\":[72,72]", "\"shape\":[5184]"},
        {"\"kind\":\"nf4\"", "\"kind\":\"small\""},
        {"\"kind\":\"nf4\"", "\"kind\":\"raw\""},
        {"\"kind\":\"small\"", "\"kind\":\"nf4\""},
        {"\"dtype\":\"bf16\"", "\"dtype\":\"u8\""},
        {"\"quantum\":1,", "\"quantum\":0,"},
        {"\"byte\":144", "\"byte\":140"},
        {"\"map\":0", "\"map\":-1"},
        {"\"offset\":", "\"offset\":1e39,\"x\":"},
        {"\"small_xxh3\":\"", "\"small_xxh3\":\"0"},
        {"\"head_chunk_rows\":100", "\"head_chunk_rows\":1"},
        {"\"head_chunk_rows\":100", "\"head_chunk_rows\":0"},
        {"\"num_hidden_layers\":2", "\"num_hidden_layers\":1000"},
        {"\"vocab_size\":301", "\"vocab_size\":4000000"},
        {"\"model_type\":\"llama\"", "\"model_type\":\"mamba\""},
        {"\"nested\":true", "\"nested\":false"},
        {"\"nested\":true", "\"nested\":1"},
        {"\"hashes_sha256\":\"", "\"hashes_sha256\":\"zz"},
        {"\"final\":{", "\"final\":7,\"x\":{"},
    };
    qs_base_index *index = open_index();
    for (size_t i = 0; i < sizeof change / sizeof *change; i++) {
        bool harmless = strstr(change[i][0], "\"nested\":true") != NULL &&
                        strstr(change[i][1], "false") != NULL; /* shapes decide that, in the file */
        qs_status st = parse_changed(index, change[i][0], change[i][1]);
        cr_assert_eq(qs_exit_code(st), harmless ? 0 : 3, "%s -> %s: %d %s", change[i][0],
                     change[i][1], st, qs_error_text());
    }
    cr_assert_eq(parse_changed(index, "\"nested\":true", "\"nested\":true"), QS_OK, "%s",
                 qs_error_text());
    qs_base_index_free(index);
}

/* Not in the first files: an index without it is as it was. */
Test(base_file, ids_that_end_a_text_are_kept_and_checked)
{
    static const char *const wrong[] = {
        "7",     "\"7\"",   "{}",    "[]",   "[301]", "[-1]",
        "[1.5]", "[\"7\"]", "[[7]]", "null", "true",  "[0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0]"};
    qs_base_index *index = open_index(), *again = NULL;
    char *text = NULL;
    cr_assert_eq(index->n_eos, 0);
    cr_assert_eq(qs_base_index_text(index, &text), QS_OK);
    cr_assert_null(strstr(text, "eos_token_ids"));
    free(text);
    index->n_eos = 2;
    index->eos[0] = 300;
    index->eos[1] = 0;
    cr_assert_eq(qs_base_index_text(index, &text), QS_OK);
    cr_assert_not_null(strstr(text, "\"eos_token_ids\":[300,0]"));
    cr_assert_eq(qs_base_index_parse(&again, text, strlen(text), "b.h5"), QS_OK, "%s",
                 qs_error_text());
    cr_assert(again->n_eos == 2 && again->eos[0] == 300 && again->eos[1] == 0);
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        char to[96];
        snprintf(to, sizeof to, "\"eos_token_ids\":%s", wrong[i]);
        qs_status st = parse_changed(index, "\"eos_token_ids\":[300,0]", to);
        cr_assert_eq(qs_exit_code(st), 3, "%s: %s", wrong[i], qs_error_text());
        cr_assert_not_null(strstr(qs_error_text(), "eos_token_ids"), "%s", qs_error_text());
    }
    qs_error_clear();
    free(text);
    qs_base_index_free(again);
    qs_base_index_free(index);
}

/* Likewise. This index is of no text part. */
Test(base_file, a_text_part_is_kept_and_checked)
{
    static const char *const wrong[] = {
        "7",          "null",      "\"\"",
        "\"gemma3\"", "\"llama\"", "\"0123456789012345678901234567890123456789\""};
    qs_base_index *index = open_index(), *again = NULL;
    char *text = NULL;
    cr_assert_str_eq(index->config.part_of, "");
    cr_assert_eq(qs_base_index_text(index, &text), QS_OK);
    cr_assert_null(strstr(text, "part_of"));
    strcpy(index->config.part_of, "mistral3");
    free(text);
    cr_assert_eq(qs_base_index_text(index, &text), QS_OK);
    cr_assert_not_null(strstr(text, "\"part_of\":\"mistral3\""));
    cr_assert_eq(qs_base_index_parse(&again, text, strlen(text), "b.h5"), QS_ERR_INPUT_FORMAT);
    cr_assert_not_null(strstr(qs_error_text(), "llama is no text part of \"mistral3\""), "%s",
                       qs_error_text());
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        char to[96];
        snprintf(to, sizeof to, "\"part_of\":%s", wrong[i]);
        qs_status st = parse_changed(index, "\"part_of\":\"mistral3\"", to);
        cr_assert_eq(qs_exit_code(st), 3, "%s: %s", wrong[i], qs_error_text());
    }
    qs_error_clear();
    free(text);
    qs_base_index_free(index);
}

/* Likewise. */
Test(base_file, hash_of_the_tokenizer_is_kept_and_checked)
{
    static const char *const wrong[] = {"7", "null", "[]", "\"\"", "\"0123\""};
    const char known[] = "\"tokenizer_sha256\":"
                         "\"00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff\"";
    qs_base_index *index = open_index(), *again = NULL;
    char *text = NULL;
    cr_assert_str_eq(index->tokenizer_sha256, "");
    cr_assert_eq(qs_base_index_text(index, &text), QS_OK);
    cr_assert_null(strstr(text, "tokenizer_sha256"));
    free(text);
    (void)snprintf(index->tokenizer_sha256, sizeof index->tokenizer_sha256, "%.64s",
                   known + strlen("\"tokenizer_sha256\":\""));
    cr_assert_eq(qs_base_index_text(index, &text), QS_OK);
    cr_assert_not_null(strstr(text, known));
    cr_assert_eq(qs_base_index_parse(&again, text, strlen(text), "b.h5"), QS_OK, "%s",
                 qs_error_text());
    cr_assert_str_eq(again->tokenizer_sha256, index->tokenizer_sha256);
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        char to[96];
        (void)snprintf(to, sizeof to, "\"tokenizer_sha256\":%s", wrong[i]);
        cr_assert_eq(qs_exit_code(parse_changed(index, known, to)), 3, "%s: %s", wrong[i],
                     qs_error_text());
        cr_assert_not_null(strstr(qs_error_text(), "tokenizer_sha256"), "%s", qs_error_text());
    }
    qs_error_clear();
    free(text);
    qs_base_index_free(again);
    qs_base_index_free(index);
}

Test(base_file, describe_prints_what_the_file_holds)
{
    char *text = NULL;
    size_t bytes = 0;
    FILE *out = open_memstream(&text, &bytes);
    cr_assert_eq(qs_base_describe(base, out), QS_OK);
    fclose(out);
    cr_assert_not_null(strstr(text, "2 layers, hidden 72, ffn 500, heads 4 / 2 of 18, vocab 301"));
    cr_assert_not_null(strstr(text, "14 in NF4"), "%s", text);
    cr_assert_not_null(strstr(text, "double quantization"));
    cr_assert_not_null(strstr(text, dir));
    free(text);
}
