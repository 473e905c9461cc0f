/* What the files of the command line share: the parsed words, the table of commands. */
#ifndef QS_CLI_CLI_IMPL_H
#define QS_CLI_CLI_IMPL_H

#include <argp.h>
#include <stdbool.h>

#include "ckpt/run_dir.h"
#include "comm/comm.h"
#include "config/config.h"

enum { QS_CLI_WORDS_MAX = 2, QS_CLI_SETS_MAX = 128, QS_CLI_LINKS_MAX = 2 };

/** The options of all commands; a command's own list says which of them it takes. */
typedef struct {
    const char *words[QS_CLI_WORDS_MAX]; /* arguments that are no options */
    int n_words;
    const char *sets[QS_CLI_SETS_MAX];
    int n_sets;
    const char *output, *adapter, *prompts, *base_name;
    const char *base, *original, *dtype, *shard_size;
    const char *dump_grads, *dump_order, *dump_logits, *trace;
    int64_t tokens, head_chunk_rows, threads;
    const char *gpu;
    int64_t gpus, per_node;
    const char *json; /* bench */
    int64_t begin_bytes, end_bytes, factor, repeats, warmup, group, rows, cols, heads, kv_heads,
        head_dim;
    double link_gbps[QS_CLI_LINKS_MAX]; /* in a node, between nodes; 0: not given */
    int n_links;
    qs_resume resume;
    qs_device_kind device; /* of quantize and bench; the others' stands in the configuration */
    bool device_given;
    bool takeover, dry_run, single_quant, fold_scaling, best, shared_device, help, quiet, verbose;
    int64_t profile_steps[2]; /* first and last, from 1; 0: none */
} qs_cli_args;

typedef struct {
    const char *name;
    const char *usage;   /* what follows the name: "RUN.yaml" */
    const char *summary; /* one line */
    const struct argp_option *options;
    int n_words; /* exactly so many arguments; below 0: one, or up to -n_words */
    bool keys;   /* the help ends in the table of configuration keys */
    qs_status (*run)(const qs_cli_args *args, qs_comm *comm);
    bool collective; /* else rank 0 works alone */
} qs_cli_command;

extern const qs_cli_command qs_cli_commands[];
extern const int qs_cli_commands_count;

typedef struct {
    int code;
    const char *meaning;
} qs_cli_exit_code;
extern const qs_cli_exit_code qs_cli_exit_codes[];
extern const int qs_cli_exit_codes_count;

/** Options of this group and higher ones are those of all commands. */
enum { QS_CLI_COMMON_GROUP = 90 };

/** Parse what follows the command's name. Pure but for the error record. */
qs_status qs_cli_parse(const qs_cli_command *command, int argc, char **argv, qs_cli_args *out);

/** Print the command's help on stdout. */
void qs_cli_command_help(const qs_cli_command *command);

/** "5G", "500M", "2T", "4096" behind --`option`: whole numbers of bytes; 1G is 2^30. */
qs_status qs_cli_parse_size(const char *option, const char *text, int64_t *out);

/** The configuration in file `path`, which rank 0 reads for all, with --set.
 * Collective. */
qs_status qs_cli_load_config(const qs_cli_args *args, const char *path, qs_config *cfg,
                             qs_comm *comm);

/** Option lists; each ends in an empty row. */
extern const struct argp_option qs_cli_train_options[], qs_cli_eval_options[],
    qs_cli_sample_options[], qs_cli_quantize_options[], qs_cli_export_options[],
    qs_cli_merge_options[], qs_cli_plan_options[], qs_cli_bench_options[], qs_cli_plain_options[];

qs_status qs_cli_train(const qs_cli_args *args, qs_comm *comm);
qs_status qs_cli_eval(const qs_cli_args *args, qs_comm *comm);
qs_status qs_cli_sample(const qs_cli_args *args, qs_comm *comm);
qs_status qs_cli_quantize(const qs_cli_args *args, qs_comm *comm);
qs_status qs_cli_export(const qs_cli_args *args, qs_comm *comm);
qs_status qs_cli_merge(const qs_cli_args *args, qs_comm *comm);
qs_status qs_cli_plan(const qs_cli_args *args, qs_comm *comm);
qs_status qs_cli_bench(const qs_cli_args *args, qs_comm *comm);
qs_status qs_cli_check(const qs_cli_args *args, qs_comm *comm);
qs_status qs_cli_inspect(const qs_cli_args *args, qs_comm *comm);
qs_status qs_cli_doctor(const qs_cli_args *args, qs_comm *comm);

/** What a path given to check or inspect is. */
typedef enum {
    QS_PATH_UNKNOWN,
    QS_PATH_CHECKPOINT, /* directory with manifest.json */
    QS_PATH_RUN,        /* directory with run.json */
    QS_PATH_ADAPTER,    /* directory with adapter_config.json */
    QS_PATH_MODEL,      /* directory with config.json */
    QS_PATH_BASE,       /* HDF5 files, by their format attribute */
    QS_PATH_DATA,
    QS_PATH_SHARD,
    QS_PATH_CONFIG, /* .yaml */
} qs_path_kind;

/** Find out what `path` is; QS_PATH_UNKNOWN is an error naming what there could be. */
qs_status qs_cli_path_kind(const char *path, qs_path_kind *kind);

#endif
