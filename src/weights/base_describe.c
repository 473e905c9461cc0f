/* qshard inspect of a base.h5: what it holds, for humans. */
#include <string.h>

#include "hf/hf_text_part.h"
#include "weights/base_impl.h"

typedef struct {
    int64_t packed, absmax, raw, small, elements, linears;
} totals;

static int64_t unit_absmax_bytes(const qs_unit_size *s)
{
    return s->nf4_quanta *
           (s->absmax8_per_quantum + s->absmax32_per_quantum * (int64_t)sizeof(float));
}

static void add_unit(totals *t, const qs_base_unit *unit)
{
    t->packed += unit->size.nf4_quanta * QS_NF4_QUANTUM_PACKED_BYTES;
    t->absmax += unit_absmax_bytes(&unit->size);
    t->raw += unit->size.raw_quanta * (int64_t)qs_raw_quantum_bytes(&unit->size);
    t->small += unit->small_bytes;
    for (int i = 0; i < unit->n_tensors; i++) {
        bool nf4 = unit->tensors[i].kind == QS_TENSOR_NF4;
        t->linears += nf4;
        t->elements += nf4 ? qs_base_tensor_count(&unit->tensors[i]) : 0;
    }
}

static void print_model(const qs_base_index *index, FILE *out)
{
    const qs_hf_config *c = &index->config;
    char name[QS_HF_NAME_BYTES];
    qs_hf_config_name(c, name);
    (void)fprintf(out, "%s: NF4 base, format 1\n", index->path);
    (void)fprintf(
        out,
        "model       %s, %d layers, hidden %lld, ffn %lld, heads %d / %d of %d, vocab %lld%s\n",
        name, c->n_layers, (long long)c->hidden, (long long)c->ffn_hidden, c->n_heads,
        c->n_kv_heads, c->head_dim, (long long)c->vocab, c->tied ? ", tied head" : "");
    (void)fprintf(out, "scheme      blocks of %d, %s, %d second-level %s\n", QS_NF4_BLOCK,
                  index->nested ? "double quantization in groups of 256" : "fp32 absmax",
                  index->n_maps, index->n_maps == 1 ? "map" : "maps");
}

static void print_row(FILE *out, const char *name, int count, const qs_base_unit *unit)
{
    const qs_unit_size *s = &unit->size;
    (void)fprintf(out, "%-11s %6d %12lld %12lld %14lld %14lld %14lld %10lld\n", name, count,
                  (long long)s->nf4_quanta, (long long)s->raw_quanta,
                  (long long)(s->nf4_quanta * QS_NF4_QUANTUM_PACKED_BYTES),
                  (long long)unit_absmax_bytes(s),
                  (long long)(s->raw_quanta * (int64_t)qs_raw_quantum_bytes(s)),
                  (long long)unit->small_bytes);
}

static bool same_sizes(const qs_base_unit *a, const qs_base_unit *b)
{
    return a->size.nf4_quanta == b->size.nf4_quanta && a->size.raw_quanta == b->size.raw_quanta &&
           a->size.raw_dtype == b->size.raw_dtype && a->small_bytes == b->small_bytes &&
           strcspn(a->name, ".") == strcspn(b->name, ".") &&
           strncmp(a->name, b->name, strcspn(a->name, ".")) == 0;
}

/* A row for each run of equal units. */
static void print_units(const qs_base_index *index, FILE *out)
{
    (void)fprintf(out, "# unit       count   nf4_quanta   raw_quanta         packed         absmax"
                       "            raw      small   (a unit; bytes)\n");
    for (int u = 0; u < index->n_units;) {
        int end = u + 1;
        while (end < index->n_units && same_sizes(&index->units[u], &index->units[end])) {
            end++;
        }
        print_row(out, index->units[u].name, end - u, &index->units[u]);
        u = end;
    }
    print_row(out, index->final.name, 1, &index->final);
}

static void print_totals(const qs_base_index *index, FILE *out)
{
    totals t = {0};
    for (int u = 0; u < index->n_units; u++) {
        add_unit(&t, &index->units[u]);
    }
    add_unit(&t, &index->final);
    (void)fprintf(out, "bytes       packed %lld, absmax %lld, raw %lld, small %lld\n",
                  (long long)t.packed, (long long)t.absmax, (long long)t.raw, (long long)t.small);
    if (t.elements > 0) {
        (void)fprintf(out,
                      "linears     %lld in NF4, %lld weights, %.3f bits each, %lld zero blocks\n",
                      (long long)t.linears, (long long)t.elements,
                      8.0 * (double)(t.packed + t.absmax) / (double)t.elements,
                      (long long)index->zero_blocks);
    }
    (void)fprintf(out, "source      %s\n            sha256 %s\n", index->source_path,
                  index->source_sha256);
    if (index->tokenizer_sha256[0] != '\0') {
        (void)fprintf(out, "tokenizer   sha256 %s\n", index->tokenizer_sha256);
    }
    (void)fprintf(out, "hashes      sha256 %s\nwritten by  %s\n", index->hashes_sha256,
                  index->quantizer);
}

qs_status qs_base_describe(const char *path, FILE *out)
{
    qs_base_index *index = NULL;
    QS_TRY(qs_base_open_local(&index, path));
    print_model(index, out);
    print_units(index, out);
    print_totals(index, out);
    qs_base_index_free(index);
    return QS_OK;
}
