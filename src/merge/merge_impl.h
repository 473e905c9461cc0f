/* What the files of this folder share: the list of tensors to write, and what a merge has open. */
#ifndef QS_MERGE_MERGE_IMPL_H
#define QS_MERGE_MERGE_IMPL_H

#include "hf/safetensors.h"
#include "merge/merge.h"
#include "weights/base_file.h"

/** The directory of the model's other chat templates; the one that a result may hold. */
#define QS_MERGE_TEMPLATES "additional_chat_templates"

/** One tensor of the result. A table of the vocabulary is several tensors of the base, one a
 * unit; all others are one. */
typedef struct {
    const char *name; /* borrowed from the index, as everything else here */
    int rank;
    int64_t rows, columns; /* of the whole; a vector is one row */
    int unit, units;       /* first unit and how many; number n_units is "final" */
    int entry;             /* number within the unit */
    int layer, linear;     /* its adapter; linear -1: none */
    int file;              /* of the result, from 0 */
    const qs_st_tensor *original;
} qs_merge_tensor;

typedef struct {
    const qs_merge_options *options;
    qs_base_index *index;
    int fd; /* of the base */
    qs_st_dir *original;
    const char *config_text; /* config.json that the result's is made from */
    char *owned_text;        /* it, if it is the original's */
    qs_lora_layout layout;
    qs_peft *peft;
    qs_dtype dtype;
    qs_merge_tensor *tensors; /* in the order of the model */
    int n_tensors, n_files;
    int64_t bytes;

    /* what is in memory */
    int unit;          /* -1: none */
    uint8_t *message;  /* the unit's quanta */
    uint8_t *small;    /* its small bytes */
    int layer;         /* -1: none */
    float *segment;    /* that layer's adapter weights, where they come from a PEFT directory */
    float *wide;       /* rows of a tensor */
    uint8_t *in, *out; /* the same as read and as written */
    int64_t piece_elems;
} qs_merge_job;

/** A unit by number; number n_units is "final". */
const qs_base_unit *qs_merge_unit(const qs_merge_job *job, int u);

/** Bytes of a tensor in the result. */
int64_t qs_merge_bytes(const qs_merge_job *job, const qs_merge_tensor *t);

/* ---- merge_tensor.c ---- */

/** Allocate what is in memory. Free with qs_merge_buffers_free. */
qs_status qs_merge_buffers(qs_merge_job *job);
void qs_merge_buffers_free(qs_merge_job *job);

/** Bring the small bytes of a unit into memory, and its quanta unless weights come from the
 * original. */
qs_status qs_merge_load_unit(qs_merge_job *job, int u);

/** Compute tensor `t` and put it as item `item`. */
qs_status qs_merge_write_tensor(qs_merge_job *job, const qs_merge_tensor *t, qs_st_writer *writer,
                                int64_t item);

/* ---- merge_original.c ---- */

/** Open the original checkpoint and check that it can be what the base was made from: the same
 * config and shapes. Sets the result's config and type. */
qs_status qs_merge_open_original(qs_merge_job *job);

/** The same norms and biases, once there are buffers. */
qs_status qs_merge_check_original(qs_merge_job *job);

/* ---- merge_files.c ---- */

/** Write config.json of the result into `dir`. */
qs_status qs_merge_put_config(const qs_merge_job *job, const char *dir);

/** Whether config.json says which type the weights have. */
bool qs_merge_names_dtype(const qs_merge_job *job);

/** Write model.safetensors.index.json into `dir`. */
qs_status qs_merge_put_index(const qs_merge_job *job, const char *dir);

/** Name of file number `file` of the weights. */
void qs_merge_file_name(const qs_merge_job *job, int file, char *out, size_t capacity);

/** Copy tokenizer and generation files and chat templates of the source checkpoint, where it is
 * still there, into `dir`, the template of the training data alone in place of others, and note in
 * the report what was found. */
qs_status qs_merge_copy_companions(const qs_merge_job *job, const char *dir,
                                   qs_merge_report *report);

#endif
