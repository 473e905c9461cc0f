/* An adapter added to the weights that it was trained over, written as a Hugging Face checkpoint.
 *
 *   W' = round(W + scale * B A)      W: what base.h5 decodes to (what training computed with), or
 * the weights of the original checkpoint; sums in fp32, one rounding
 *
 * Tensors without an adapter are copied bit by bit where their type stays the same. One unit of the
 * base is in memory at a time, never a model. */
#ifndef QS_MERGE_MERGE_H
#define QS_MERGE_MERGE_H

#include "lora/lora.h"

typedef struct {
    const char *base;     /* base.h5 */
    const char *output;   /* the directory to make */
    const char *original; /* checkpoint directory to take the weights from; NULL: the base */
    int dtype;            /* qs_dtype of all weights; -1: as config.json says, else as stored */
    int64_t shard_bytes;  /* tensors of a file have at most so many bytes, or it holds one tensor */
    int threads;
    const char *adapter; /* for messages, and the PEFT directory to read if `vector` is NULL */
    const float *vector; /* [n_layers * per_layer] a checkpoint's weights in `layout` */
    const qs_lora_layout *layout;
    const char *chat_template; /* of the training data; NULL: not known, the model's own stays */
    const char *base_sha256;   /* with `vector`: hashes_sha256 of the base that it was trained on */
} qs_merge_options;

typedef struct {
    int64_t tensors, merged; /* written; those with an adapter */
    int files;               /* of weights */
    int64_t bytes;           /* of tensors */
    qs_dtype dtype;
    double seconds;
    size_t peak_bytes;
    char source[QS_PATH_MAX]; /* where tokenizer and generation files were looked for, or "" */
    char copied[512], missing[512]; /* their names, each with a blank in front */
    bool other_template; /* that of the training data was written, which is not the model's own */
} qs_merge_report;

/** Merge. Not collective. A temporary directory, everything read back, then renamed: after a
 * failure nothing is left.
 * \return QS_ERR_OUTPUT_TAKEN if `output` exists; QS_ERR_INPUT_TENSOR or QS_ERR_INPUT_VALUE if
 *          adapter, base and original do not belong together, QS_ERR_INPUT_HASH if the adapter was
 *          trained on another base; QS_ERR_NUMERIC if a merged weight is not finite in `dtype`. */
qs_status qs_merge(const qs_merge_options *options, qs_merge_report *report);

#endif
