/* The configuration of a run: one plain struct, filled from defaults, a YAML file and `--set a.b=c`, in this order.
 *
 * One table (config_keys.c) makes the defaults, the parser, the ranges, the help text and the dump, so that they cannot disagree. */
#ifndef QS_CONFIG_CONFIG_H
#define QS_CONFIG_CONFIG_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"

enum { QS_PATH_MAX = 1024, QS_TARGETS_MAX = 256 };

typedef enum { QS_RECOMPUTE_FULL, QS_RECOMPUTE_SELECTIVE, QS_RECOMPUTE_NONE } qs_recompute;
typedef enum { QS_SCHEDULE_CONSTANT, QS_SCHEDULE_LINEAR, QS_SCHEDULE_COSINE } qs_schedule;
typedef enum { QS_DEVICE_AUTO, QS_DEVICE_CPU, QS_DEVICE_CUDA } qs_device_kind;
typedef enum { QS_GEMM_AUTO, QS_GEMM_STRICT } qs_gemm_kind;

typedef struct {
    char base[QS_PATH_MAX];
    char data_train[QS_PATH_MAX], data_eval[QS_PATH_MAX];
    char output[QS_PATH_MAX];
    int64_t seed;
    int device; /* qs_device_kind */

    struct {
        int64_t steps, epochs; /* one of them > 0 */
        int64_t global_batch, micro_batch, seq_len;
        int recompute;        /* qs_recompute */
        int64_t gather_group; /* 0: auto */
        int64_t eval_every, log_every, save_every, keep_last, keep_every;
        double max_time; /* seconds, 0: none */
    } train;
    struct {
        int64_t rank;
        double alpha, dropout;
        uint32_t targets; /* bit per qs_linear */
        bool rslora;
        char init[QS_PATH_MAX]; /* PEFT directory to continue from, or "" */
    } lora;
    struct {
        double lr, beta1, beta2, eps, weight_decay, clip; /* clip 0: off */
        int schedule;                                     /* qs_schedule */
        double warmup; /* < 1: fraction of the steps, else steps */
        double min_lr_ratio;
    } optim;
    struct {
        int64_t keep_resident, prefetch;
    } shard;
    struct {
        int64_t device_limit; /* bytes, 0: none */
    } memory;
    struct {
        int gemm; /* qs_gemm_kind */
        int64_t threads;
    } cpu;
} qs_config;

/** Defaults only. */
void qs_config_defaults(qs_config *cfg);

/** Defaults, then the file, then `sets[n_sets]` ("train.steps=10"). Ranges and pairs are checked. Messages name file, line,
 *  key, value, range, and for an unknown key the nearest one. */
qs_status qs_config_load(qs_config *cfg, const char *path, const char *const *sets, int n_sets);

/** The same from text. Pure: no I/O. */
qs_status qs_config_parse(qs_config *cfg, const char *text, size_t bytes, const char *path,
                          const char *const *sets, int n_sets);

/** The resolved configuration as YAML with a comment per key; caller frees. Parsing it again gives the same struct. */
char *qs_config_dump(const qs_config *cfg);

/** Print every key with default, range and meaning (`qshard train --help`, docs). */
void qs_config_print_keys(void);

#endif
