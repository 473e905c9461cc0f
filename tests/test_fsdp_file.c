/* From a checkpoint through `quantize` to gathered units: what ranks see of a real base.h5 does not
 * depend on their number. */
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/mem.h"
#include "base/rng.h"
#include "fsdp/fsdp.h"
#include "hf/safetensors.h"
#include "store/hash.h"
#include "team.h"
#include "tests/scratch.h"
#include "weights/quantize.h"

enum { LAYERS = 2, HIDDEN = 256, KV = 128, FFN = 320, VOCAB = 100, CHUNK_ROWS = 40 };

static const char *config_json =
    "{\"model_type\": \"llama\", \"architectures\": [\"LlamaForCausalLM\"], \"hidden_size\": 256,"
    " \"intermediate_size\": 320, \"num_hidden_layers\": 2, \"num_attention_heads\": 4,"
    " \"num_key_value_heads\": 2, \"head_dim\": 64, \"vocab_size\": 100, \"rms_norm_eps\": 1e-5,"
    " \"max_position_embeddings\": 128, \"rope_theta\": 10000.0, \"tie_word_embeddings\": true,"
    " \"hidden_act\": \"silu\", \"attention_bias\": false, \"mlp_bias\": false,"
    " \"torch_dtype\": \"bfloat16\"}";

/* ---- a checkpoint ---- */

typedef struct {
    char dir[SCRATCH_MAX], base[96];
    uint16_t *table; /* [VOCAB, HIDDEN] bf16, as in the checkpoint */
} model_files;

static uint16_t *random_bf16(int64_t count, uint32_t site)
{
    uint16_t *out = malloc((size_t)count * sizeof *out);
    cr_assert_not_null(out);
    qs_rng rng = qs_rng_make(3, 0, 0, site, 0);
    for (int64_t i = 0; i < count; i++) {
        out[i] = qs_bf16_from_f32(qs_rng_uniform(&rng, (uint64_t)i) - 0.5f);
    }
    return out;
}

static void write_checkpoint(model_files *m)
{
    static const struct {
        const char *name;
        int64_t out, in;
    } of_layer[] = {{"self_attn.q_proj", HIDDEN, HIDDEN},   {"self_attn.k_proj", KV, HIDDEN},
                    {"self_attn.v_proj", KV, HIDDEN},       {"self_attn.o_proj", HIDDEN, HIDDEN},
                    {"mlp.gate_proj", FFN, HIDDEN},         {"mlp.up_proj", FFN, HIDDEN},
                    {"mlp.down_proj", HIDDEN, FFN},         {"input_layernorm", HIDDEN, 0},
                    {"post_attention_layernorm", HIDDEN, 0}};
    enum { PER_LAYER = sizeof of_layer / sizeof *of_layer, ITEMS = LAYERS * PER_LAYER + 2 };
    static char names[ITEMS][96];
    qs_st_item items[ITEMS];
    char path[128];
    int n = 0;
    for (int l = 0; l < LAYERS; l++) {
        for (size_t t = 0; t < PER_LAYER; t++, n++) {
            int64_t out = of_layer[t].out, in = of_layer[t].in;
            snprintf(names[n], sizeof names[n], "model.layers.%d.%s.weight", l, of_layer[t].name);
            items[n] = (qs_st_item){.name = names[n],
                                    .dtype = QS_BF16,
                                    .rank = in > 0 ? 2 : 1,
                                    .shape = {out, in},
                                    .data = random_bf16(in > 0 ? out * in : out, (uint32_t)n)};
        }
    }
    m->table = random_bf16(VOCAB * HIDDEN, 1000);
    items[n++] =
        (qs_st_item){"model.embed_tokens.weight", QS_BF16, 2, {VOCAB, HIDDEN}, .data = m->table};
    items[n] =
        (qs_st_item){"model.norm.weight", QS_BF16, 1, {HIDDEN}, .data = random_bf16(HIDDEN, 1001)};
    snprintf(path, sizeof path, "%s/model.safetensors", m->dir);
    cr_assert_eq(qs_st_write(path, items, ITEMS, NULL), QS_OK, "%s", qs_error_text());
    snprintf(path, sizeof path, "%s/config.json", m->dir);
    FILE *file = fopen(path, "w");
    cr_assert_not_null(file);
    cr_assert(fputs(config_json, file) >= 0 && fclose(file) == 0);
    for (int i = 0; i < ITEMS; i++) {
        if (items[i].data != m->table) {
            free((void *)items[i].data);
        }
    }
}

static model_files make_base(void)
{
    model_files m = {0};
    scratch_make(m.dir, NULL);
    write_checkpoint(&m);
    snprintf(m.base, sizeof m.base, "%s/base.h5", m.dir);
    qs_quantize_options options = {.hf_dir = m.dir,
                                   .output = m.base,
                                   .head_chunk_rows = CHUNK_ROWS,
                                   .double_quant = true,
                                   .threads = 1};
    qs_quantize_report report;
    qs_comm *comm = NULL;
    cr_assert_eq(qs_comm_self_create(&comm), QS_OK);
    cr_assert_eq(qs_quantize(&options, comm, &report), QS_OK, "%s", qs_error_text());
    qs_comm_destroy(comm);
    return m;
}

static void remove_base(model_files *m)
{
    static const char *const names[] = {"model.safetensors", "config.json", "base.h5"};
    char path[128];
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        snprintf(path, sizeof path, "%s/%s", m->dir, names[i]);
        unlink(path);
    }
    rmdir(m->dir);
    free(m->table);
}

/* ---- what a rank sees ---- */

typedef struct {
    const model_files *files;
    uint64_t hash[64]; /* of each unit, by rank 0; compared by the others and between rank counts */
    int n_units;
    int64_t read_bytes; /* of all ranks */
} sight;

/* One hash over the quanta in their order, however they lie. */
static uint64_t hash_of_unit(const qs_unit_view *view)
{
    uint64_t hash = 0;
    const qs_unit_size *size = &view->layout.size;
    for (int64_t q = 0; q < size->nf4_quanta; q++) {
        qs_nf4_quantum got = qs_unit_nf4_quantum(view, q);
        qs_piece pieces[] = {{&hash, sizeof hash},
                             {got.packed, QS_NF4_QUANTUM_PACKED_BYTES},
                             {got.absmax8, (size_t)size->absmax8_per_quantum},
                             {got.absmax32, (size_t)size->absmax32_per_quantum * sizeof(float)}};
        hash = qs_xxh3_64_pieces(pieces, 4);
    }
    for (int64_t q = 0; q < size->raw_quanta; q++) {
        qs_piece pieces[] = {{&hash, sizeof hash},
                             {qs_unit_raw_quantum(view, q), qs_raw_quantum_bytes(size)}};
        hash = qs_xxh3_64_pieces(pieces, 2);
    }
    return hash;
}

static qs_status see_units(qs_fsdp *f, const qs_base_index *index, team_member *me, sight *s)
{
    TEAM_CHECK(index->n_units == LAYERS + 3, "%d units", index->n_units);
    int order[LAYERS + 3];
    for (int u = 0; u < index->n_units; u++) {
        order[u] = u;
    }
    QS_TRY(qs_fsdp_begin(f, order, index->n_units));
    for (int u = 0; u < index->n_units; u++) {
        qs_unit_view view;
        QS_TRY(qs_fsdp_acquire(f, u, &view));
        uint64_t mine = hash_of_unit(&view), hash = mine;
        QS_TRY(qs_comm_bcast(me->comm, &hash, sizeof hash, 0));
        TEAM_CHECK(hash == mine, "unit %d differs between ranks", u);
        if (me->rank == 0) {
            s->hash[u] = hash;
            s->n_units = index->n_units;
        }
        QS_TRY(qs_fsdp_release(f, u));
    }
    return QS_OK;
}

static qs_status see_rows(qs_fsdp *f, team_member *me, const sight *s)
{
    int32_t tokens[VOCAB];
    float *rows = NULL;
    QS_TRY(QS_ALLOC(&rows, VOCAB * HIDDEN, QS_MEM_WORK));
    for (int i = 0; i < VOCAB; i++) {
        tokens[i] = (i * 37 + me->rank) % VOCAB; /* each id once, in another order */
    }
    qs_status st = qs_fsdp_embed(f, tokens, VOCAB, rows);
    for (int64_t i = 0; st == QS_OK && i < VOCAB * HIDDEN; i++) {
        int64_t id = tokens[i / HIDDEN];
        if (rows[i] != qs_f32_from_bf16(s->files->table[id * HIDDEN + i % HIDDEN])) {
            st = QS_FAIL(QS_ERR_BUG, "token %d: element %d differs", (int)id, (int)(i % HIDDEN));
        }
    }
    qs_mem_free(rows);
    return st;
}

static qs_status sight_body(team_member *me)
{
    sight *s = me->ctx;
    qs_status st = QS_OK;
    qs_base_index *index = NULL;
    qs_fsdp *f = NULL;
    QS_GOTO(qs_base_index_read(&index, s->files->base, me->comm));
    QS_GOTO(qs_fsdp_create(
        &f, index, me->comm, me->queue,
        &(qs_fsdp_options){.ops = qs_ops_cpu(), .max_tokens = VOCAB, .prefetch = 1}));
    QS_GOTO(see_units(f, index, me, s));
    QS_GOTO(see_rows(f, me, s));
    int64_t read = (int64_t)qs_fsdp_get_stats(f).read_bytes;
    QS_GOTO(qs_comm_sum_i64(me->comm, &read, 1));
    if (me->rank == 0) {
        s->read_bytes = read;
    }
done:
    qs_fsdp_destroy(f);
    qs_base_index_free(index);
    return st;
}

Test(fsdp_file, units_and_rows_are_the_same_for_every_rank_count, .timeout = 120)
{
    static const int nranks[] = {2, 3, 4, 5, 8};
    model_files files = make_base();
    sight one = {.files = &files};
    team_expect_ok(1, sight_body, &one);
    for (size_t i = 0; i < sizeof nranks / sizeof *nranks; i++) {
        sight many = {.files = &files};
        team_expect_ok(nranks[i], sight_body, &many);
        cr_expect_eq(memcmp(many.hash, one.hash, sizeof one.hash), 0, "%d ranks", nranks[i]);
    }
    remove_base(&files);
}

Test(fsdp_file, every_byte_is_read_by_one_rank, .timeout = 120)
{
    model_files files = make_base();
    sight one = {.files = &files}, many = {.files = &files};
    team_expect_ok(1, sight_body, &one);
    team_expect_ok(5, sight_body, &many);
    cr_expect_gt(one.read_bytes, 0);
    cr_expect_eq(many.read_bytes, one.read_bytes, "%ld, %ld", (long)many.read_bytes,
                 (long)one.read_bytes);
    remove_base(&files);
}

/* Where the first layer's packed bytes lie in the file. */
static int64_t packed_at(const char *base)
{
    qs_comm *comm = NULL;
    qs_base_index *index = NULL;
    cr_assert_eq(qs_comm_self_create(&comm), QS_OK);
    cr_assert_eq(qs_base_index_read(&index, base, comm), QS_OK, "%s", qs_error_text());
    int64_t at = index->units[0].packed_at;
    qs_base_index_free(index);
    qs_comm_destroy(comm);
    return at;
}

Test(fsdp_file, a_damaged_quantum_is_everyones_error, .timeout = 120)
{
    model_files files = make_base();
    off_t at = (off_t)packed_at(files.base) + 12345; /* quantum 1: with 5 ranks, of rank 0 */
    uint8_t byte = 0;
    int fd = open(files.base, O_RDWR);
    cr_assert(fd >= 0 && pread(fd, &byte, 1, at) == 1);
    byte ^= 0x10;
    cr_assert(pwrite(fd, &byte, 1, at) == 1 && close(fd) == 0);
    sight s = {.files = &files};
    team_member members[TEAM_MAX];
    team_run(members, 5, sight_body, &s);
    for (int r = 0; r < 5; r++) {
        cr_expect_eq(members[r].st, QS_ERR_INPUT_HASH, "rank %d: %d %s", r, (int)members[r].st,
                     members[r].text);
        cr_expect_not_null(strstr(members[r].text, "base.h5"), "%s", members[r].text);
    }
    remove_base(&files);
}
