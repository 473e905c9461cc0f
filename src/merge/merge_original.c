/* The original checkpoint in place of the base's weights: that it is the one the base was made
 * from. Its linears cannot be compared without quantizing them again; config, shapes, and the norms
 * and biases, which the base keeps as they are, can. */
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "hf/hf_text_part.h"
#include "hf/safetensors.h"
#include "merge/merge_impl.h"
#include "store/io.h"

enum { MAX_CONFIG_BYTES = 1 << 20, PATH_ROOM = QS_PATH_MAX + 64 };

/* longrope and dynamic have frequencies by length. */
static bool same_rope(const qs_hf_config *a, const qs_hf_config *b)
{
    double theirs[QS_HEAD_DIM_MAX / 2], ours[QS_HEAD_DIM_MAX / 2];
    qs_hf_rope_frequencies(a, a->max_position, theirs);
    qs_hf_rope_frequencies(b, b->max_position, ours);
    return a->rotary_dim == b->rotary_dim && a->rope_type == b->rope_type &&
           a->rope_factor == b->rope_factor && a->rope_magnitude == b->rope_magnitude &&
           a->rope_local_theta == b->rope_local_theta &&
           a->rope_original_max_position == b->rope_original_max_position &&
           (a->rope_type != QS_ROPE_DYNAMIC || a->max_position == b->max_position) &&
           memcmp(a->rope_short_factor, b->rope_short_factor, sizeof a->rope_short_factor) == 0 &&
           memcmp(a->rope_long_factor, b->rope_long_factor, sizeof a->rope_long_factor) == 0 &&
           memcmp(theirs, ours, (size_t)(a->rotary_dim / 2) * sizeof *ours) == 0;
}

/* What the shapes do not show: with other numbers the same weights are another model. */
static bool same_numbers(const qs_hf_config *a, const qs_hf_config *b)
{
    return a->rms_norm_eps == b->rms_norm_eps && a->score_scale == b->score_scale &&
           a->embedding_multiplier == b->embedding_multiplier &&
           a->residual_multiplier == b->residual_multiplier &&
           a->logits_scaling == b->logits_scaling && a->attention_cap == b->attention_cap &&
           a->final_cap == b->final_cap && same_rope(a, b) && a->window == b->window &&
           memcmp(a->windowed, b->windowed, sizeof a->windowed) == 0 &&
           memcmp(a->unturned, b->unturned, sizeof a->unturned) == 0;
}

static qs_status compare_models(const char *path, const qs_hf_config *a, const qs_hf_config *b)
{
    const struct {
        const char *key;
        int64_t theirs, ours;
    } sizes[] = {{"num_hidden_layers", a->n_layers, b->n_layers},
                 {"hidden_size", a->hidden, b->hidden},
                 {"intermediate_size", a->ffn_hidden, b->ffn_hidden},
                 {"num_attention_heads", a->n_heads, b->n_heads},
                 {"num_key_value_heads", a->n_kv_heads, b->n_kv_heads},
                 {"head_dim", a->head_dim, b->head_dim},
                 {"vocab_size", a->vocab, b->vocab},
                 {"tie_word_embeddings", a->tied, b->tied}};
    if (strcmp(a->model_type, b->model_type) != 0) {
        return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: model_type is %s, the base's is %s", path,
                       a->model_type, b->model_type);
    }
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        if (sizes[i].theirs != sizes[i].ours) {
            return QS_FAIL(QS_ERR_INPUT_VALUE,
                           "%s: %s is %lld, the base's is %lld; give the checkpoint that the base "
                           "was made from",
                           path, sizes[i].key, (long long)sizes[i].theirs,
                           (long long)sizes[i].ours);
        }
    }
    if (!same_numbers(a, b)) {
        return QS_FAIL(QS_ERR_INPUT_VALUE,
                       "%s: rms_norm_eps, RoPE, the attention window or another number is not the "
                       "base's; give the "
                       "checkpoint that the base was made from",
                       path);
    }
    return QS_OK;
}

static qs_status open_model(qs_merge_job *job)
{
    char path[PATH_ROOM];
    qs_hf_config config;
    QS_TRY(qs_hf_check_folder(job->options->original));
    snprintf(path, sizeof path, "%s/config.json", job->options->original);
    QS_TRY(qs_hf_config_read(&config, &job->owned_text, path, MAX_CONFIG_BYTES));
    job->config_text = job->owned_text;
    if (config.bnb_4bit) {
        return QS_FAIL(QS_ERR_INPUT_UNKNOWN,
                       "%s: is quantized itself; without --original the base's weights, which are "
                       "the same, are taken",
                       path);
    }
    job->dtype = config.dtype;
    QS_TRY(compare_models(path, &config, &job->index->config));
    QS_TRY(qs_st_open(&job->original, job->options->original, "model"));
    return qs_hf_take_text_tensors(job->original, &config);
}

static qs_status find_tensor(const qs_merge_job *job, qs_merge_tensor *t)
{
    const char *dir = qs_st_path(job->original);
    const qs_st_tensor *found = qs_st_find(job->original, t->name);
    qs_dtype dtype;
    if (found == NULL) {
        return QS_FAIL(QS_ERR_INPUT_TENSOR, "%s: tensor %s is missing", dir, t->name);
    }
    int64_t first = t->rank == 2 ? t->rows : t->columns;
    if (found->rank != t->rank || found->shape[0] != first ||
        (t->rank == 2 && found->shape[1] != t->columns)) {
        return QS_FAIL(QS_ERR_INPUT_TENSOR,
                       "%s: tensor %s has %lld elements of %d dimensions, the base's has %lld x "
                       "%lld; give the checkpoint that the base was made from",
                       dir, t->name, (long long)found->count, found->rank, (long long)t->rows,
                       (long long)t->columns);
    }
    if (qs_st_to_dtype(found->dtype, &dtype) != 0) {
        return QS_FAIL(QS_ERR_INPUT_UNKNOWN,
                       "%s: tensor %s: dtype %s is not supported; BF16, F16 and F32 are", dir,
                       t->name, qs_st_dtype_name(found->dtype));
    }
    t->original = found;
    return QS_OK;
}

/* A norm or bias, rounded to the base's type: an import may have kept another one. */
static qs_status compare_small(qs_merge_job *job, const qs_merge_tensor *t)
{
    qs_status st = QS_OK;
    float *ours = NULL, *theirs = NULL;
    const qs_base_tensor *entry = &qs_merge_unit(job, t->unit)->tensors[t->entry];
    QS_GOTO(qs_merge_load_unit(job, t->unit));
    QS_GOTO(QS_ALLOC(&ours, t->columns, QS_MEM_WORK));
    QS_GOTO(QS_ALLOC(&theirs, t->columns, QS_MEM_WORK));
    qs_base_small_f32(entry, job->small, ours);
    QS_GOTO(qs_st_read_f32(job->original, t->original, 0, t->columns, theirs));
    for (int64_t i = 0; i < t->columns; i++) {
        float rounded = qs_f32_round(theirs[i], entry->dtype);
        if (memcmp(&rounded, &ours[i], sizeof rounded) != 0) {
            QS_GOTO(QS_FAIL(QS_ERR_INPUT_HASH,
                            "%s: tensor %s, element %lld is %g, but the base has %g; give the "
                            "checkpoint that the base was made from",
                            qs_st_path(job->original), t->name, (long long)i, (double)theirs[i],
                            (double)ours[i]));
        }
    }
done:
    qs_mem_free(ours);
    qs_mem_free(theirs);
    return st;
}

qs_status qs_merge_open_original(qs_merge_job *job)
{
    QS_TRY(open_model(job));
    for (int i = 0; i < job->n_tensors; i++) {
        QS_TRY(find_tensor(job, &job->tensors[i]));
    }
    return QS_OK;
}

qs_status qs_merge_check_original(qs_merge_job *job)
{
    for (int i = 0; i < job->n_tensors; i++) {
        const qs_merge_tensor *t = &job->tensors[i];
        if (qs_merge_unit(job, t->unit)->tensors[t->entry].kind == QS_TENSOR_SMALL) {
            QS_TRY(compare_small(job, t));
        }
    }
    return QS_OK;
}
