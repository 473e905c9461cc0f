/* The configuration of a run: one plain struct, filled from defaults, a YAML file and `--set
 * a.b=c`, in this order.
 *
 * One table (config_keys.c) makes the defaults, the parser, the ranges, the help text and the
 * dump, so that they cannot disagree. */
#ifndef QS_CONFIG_CONFIG_H
#define QS_CONFIG_CONFIG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

enum {
    QS_PATH_MAX = 1024,
    QS_MICRO_BATCH_MAX = 4096, /* sequences of a micro-batch */
    QS_GROUP_MAX = 1024,       /* micro-batches of a gather group */
    QS_PREFETCH_MAX = 16,      /* units gathered ahead of use */
};

typedef enum { QS_RECOMPUTE_FULL, QS_RECOMPUTE_SELECTIVE, QS_RECOMPUTE_NONE } qs_recompute;
typedef enum { QS_SCHEDULE_CONSTANT, QS_SCHEDULE_LINEAR, QS_SCHEDULE_COSINE } qs_schedule;
typedef enum {
    QS_OPTIMIZER_ADAMW,
    QS_OPTIMIZER_ADAM,
    QS_OPTIMIZER_SGD,
    QS_OPTIMIZER_ADADELTA
} qs_optimizer;
typedef enum { QS_DEVICE_AUTO, QS_DEVICE_CPU, QS_DEVICE_CUDA } qs_device_kind;
typedef enum { QS_GEMM_AUTO, QS_GEMM_STRICT, QS_GEMM_BF16, QS_GEMM_FP16, QS_GEMM_AMX } qs_gemm_kind;
/** Words of shard.group; above 0 it is a number of ranks. */
/** train.eval_every, train.save_every: where the data end. */
enum { QS_EVERY_EPOCH = -1 };

enum { QS_SHARD_AUTO = 0, QS_SHARD_WORLD = -1, QS_SHARD_NODE = -2 };
/** The word of shard.keep_resident and memory.keep_decoded; from 0 on they are numbers of layers.
 */
enum { QS_KEEP_AUTO = -1 };
/** A bit of lora.targets beside those of linears: it is a named set, of which a model takes what it
 * has; a list must name nothing else. */
#define QS_TARGETS_SET (1u << 31)
/** Bits of memory.offload. */
enum { QS_OFFLOAD_ACTIVATIONS = 1, QS_OFFLOAD_WEIGHTS = 2, QS_OFFLOAD_EMBEDDING = 4 };

typedef struct {
    char base[QS_PATH_MAX];
    char data_train[QS_PATH_MAX], data_eval[QS_PATH_MAX];
    char output[QS_PATH_MAX];
    int64_t seed;
    qs_device_kind device;

    struct {
        int64_t steps, epochs; /* one of them > 0 */
        int64_t global_batch, micro_batch, seq_len;
        qs_recompute recompute;
        bool residual_fp32, eval_first;
        int64_t gather_group; /* 0: auto */
        int64_t eval_every, log_every, save_every, keep_last, keep_every;
        int64_t patience;   /* evaluations, 0: without end */
        double save_time;   /* seconds, 0: none */
        double max_time;    /* seconds, 0: none */
        double stall_limit; /* seconds, 0: none */
    } train;
    struct {
        int64_t rank;
        double alpha, dropout;
        uint32_t targets; /* bit per qs_linear, and QS_TARGETS_SET */
        bool rslora, dora;
        char init[QS_PATH_MAX]; /* PEFT directory to continue from, or "" */
    } lora;
    struct {
        qs_optimizer name;
        double lr, beta1, beta2, eps, weight_decay, clip; /* clip 0: off */
        double lora_plus_ratio;                           /* learning rate of B over that of A */
        qs_schedule schedule;
        double warmup; /* < 1: fraction of the steps, else steps */
        double min_lr_ratio;
    } optim;
    struct {
        int64_t group;         /* ranks, or QS_SHARD_* */
        int64_t keep_resident; /* layers, or QS_KEEP_AUTO */
        int64_t prefetch;
    } shard;
    struct {
        int64_t device_limit; /* bytes, 0: what there is */
        uint32_t offload;     /* QS_OFFLOAD_* bits */
        int64_t keep_decoded; /* layers, or QS_KEEP_AUTO */
    } memory;
    struct {
        qs_gemm_kind gemm;
        int64_t threads;
    } cpu;
    bool allow_shared_device; /* --allow-shared-device: not a key, since it proves nothing about
                                 speed */
} qs_config;

/** Defaults only. */
void qs_config_defaults(qs_config *cfg);

/** Defaults, then the file, then `sets[n_sets]` ("train.steps=10"). Ranges and pairs are checked.
 * Messages name file, line, key, value, range, and for an unknown key the nearest one. */
qs_status qs_config_load(qs_config *cfg, const char *path, const char *const *sets, int n_sets);

/** The text of a configuration file, NUL-terminated; the caller frees it. */
qs_status qs_config_read(const char *path, char **text, size_t *bytes);

/** The same as qs_config_load from text. Pure: no I/O. */
qs_status qs_config_parse(qs_config *cfg, const char *text, size_t bytes, const char *path,
                          const char *const *sets, int n_sets);

/** What tells a file that qs_config_dump has made. */
#define QS_CONFIG_FIRST_LINE "# Resolved configuration of a qshard run."

/** The resolved configuration as YAML with a comment per key; caller frees. Parsing it again gives
 * the same struct. NULL: no memory. */
char *qs_config_dump(const qs_config *cfg);

/** What a command cannot do without. */
typedef enum { QS_NEED_TRAIN, QS_NEED_EVAL, QS_NEED_SAMPLE } qs_config_need;

/** Check that the settings that a command needs are there (data.train and output for a run,
 * data.eval for an evaluation) and that this build can do what they ask. `path` is for the
 * message. */
qs_status qs_config_require(const qs_config *cfg, qs_config_need need, const char *path);

/** Name of the first key in which two runs differ so that one cannot go on as the other; NULL if
 * there is none. Keys that change no bit of the result (output, logging, checkpoints, threads,
 * recompute, gather_group, paths of inputs, which are compared by content) may differ: the column
 * "neutral" of the table. `values` gets both values as text. */
const char *qs_config_first_difference(const qs_config *a, const qs_config *b, char *values,
                                       size_t capacity);

/** Print every key with default, range and meaning (`qshard train --help`, docs). */
void qs_config_print_keys(void);

#endif
