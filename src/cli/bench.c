/* qshard bench: from the command line to the options of a benchmark. */
#include <stdio.h>
#include <string.h>

#include "bench/bench.h"
#include "cli/cli_impl.h"

/* ---- options that a benchmark does not read ---- */

enum {
    OF_STEP = 1 << QS_BENCH_STEP,
    OF_ATTENTION = 1 << QS_BENCH_ATTENTION,
    OF_COLLECTIVES = 1 << QS_BENCH_GATHER | 1 << QS_BENCH_REDUCE,
    OF_WEIGHTS = 1 << QS_BENCH_GEMM | 1 << QS_BENCH_DECODE | 1 << QS_BENCH_HEAD,
    OF_ROWS = 1 << QS_BENCH_GEMM | 1 << QS_BENCH_ATTENTION | 1 << QS_BENCH_HEAD
};

/* "gemm, attention, head" */
static void list_benchmarks(unsigned of, char *out, size_t capacity)
{
    size_t used = 0;
    for (int i = 0; i < QS_BENCH_COUNT; i++) {
        if (of >> i & 1 && used < capacity) {
            used += (size_t)snprintf(out + used, capacity - used, "%s%s", used > 0 ? ", " : "",
                                     qs_bench_name((qs_bench_kind)i));
        }
    }
}

static qs_status check_options(const qs_cli_args *args, qs_bench_kind kind)
{
    const struct {
        const char *name;
        bool given;
        unsigned of;
    } options[] = {
        {"set", args->n_sets > 0, OF_STEP},
        {"base", args->base != NULL, OF_STEP},
        {"begin-bytes", args->begin_bytes > 0, OF_COLLECTIVES},
        {"end-bytes", args->end_bytes > 0, OF_COLLECTIVES},
        {"factor", args->factor > 0, OF_COLLECTIVES},
        {"group", args->group != QS_SHARD_WORLD, OF_COLLECTIVES},
        {"shape", args->rows > 0, OF_WEIGHTS},
        {"tokens", args->tokens > 0, OF_ROWS},
        {"heads", args->heads > 0, OF_ATTENTION},
        {"kv-heads", args->kv_heads > 0, OF_ATTENTION},
        {"head-dim", args->head_dim > 0, OF_ATTENTION},
        {"warmup", args->warmup >= 0, OF_COLLECTIVES | OF_STEP},
    };
    for (size_t i = 0; i < sizeof options / sizeof *options; i++) {
        if (options[i].given && !(options[i].of >> kind & 1)) {
            char of[96] = "";
            list_benchmarks(options[i].of, of, sizeof of);
            return QS_FAIL(QS_ERR_USAGE, "--%s: bench %s does not read it; that is for %s",
                           options[i].name, qs_bench_name(kind), of);
        }
    }
    return QS_OK;
}

/* Two words only for a step, which then has its base from the file. */
static qs_status check_words(const qs_cli_args *args, const qs_bench_options *o)
{
    if (args->n_words > 1 && o->kind != QS_BENCH_STEP) {
        return QS_FAIL(QS_ERR_USAGE,
                       "\"%.80s\" is one argument too many: only bench step reads a configuration",
                       args->words[1]);
    }
    if (args->n_words > 1 && args->base != NULL) {
        return QS_FAIL(QS_ERR_USAGE,
                       "--base: %.80s names a base already; leave one of them out, or give --set "
                       "base=%.80s",
                       args->words[1], args->base);
    }
    return QS_OK;
}

static bool sets_base(const qs_cli_args *args)
{
    for (int i = 0; i < args->n_sets; i++) {
        if (strncmp(args->sets[i], "base=", 5) == 0) {
            return true;
        }
    }
    return false;
}

/* The defaults with a base, and --set. */
static qs_status default_config(const qs_cli_args *args, qs_config *config)
{
    static const char none[] = "seed: 42\n"; /* a document must not be empty */
    const char *sets[QS_CLI_SETS_MAX + 1];
    char base[QS_PATH_MAX + 8] = "";
    int count = 0;
    if (args->base == NULL && !sets_base(args)) {
        return QS_FAIL(QS_ERR_USAGE, "bench step needs --base BASE.h5, or a RUN.yaml that names "
                                     "one; see qshard bench --help");
    }
    if (args->base != NULL) {
        if (snprintf(base, sizeof base, "base=%s", args->base) >= (int)sizeof base) {
            return QS_FAIL(QS_ERR_USAGE, "--base: the path is longer than %d bytes", QS_PATH_MAX);
        }
        sets[count++] = base;
    }
    for (int i = 0; i < args->n_sets; i++) {
        sets[count++] = args->sets[i];
    }
    return qs_config_parse(config, none, sizeof none - 1, "qshard bench step", sets, count);
}

/* The configuration of a step: a file's, or the defaults; --set changes either. */
static qs_status step_config(const qs_cli_args *args, qs_config *config, qs_comm *comm)
{
    static const char *const devices[] = {[QS_DEVICE_AUTO] = "device=auto",
                                          [QS_DEVICE_CPU] = "device=cpu",
                                          [QS_DEVICE_CUDA] = "device=cuda"};
    qs_cli_args changed = *args;
    if (args->device_given) {
        if (args->n_sets == QS_CLI_SETS_MAX) {
            return qs_comm_agree(comm, QS_FAIL(QS_ERR_USAGE,
                                               "--device and --set are given more "
                                               "than %d times",
                                               QS_CLI_SETS_MAX));
        }
        changed.sets[changed.n_sets++] = devices[args->device];
    }
    if (args->n_words > 1) {
        return qs_cli_load_config(&changed, args->words[1], config, comm);
    }
    const qs_status st = default_config(&changed, config);
    config->allow_shared_device = args->shared_device;
    return qs_comm_agree(comm, st);
}

qs_status qs_cli_bench(const qs_cli_args *args, qs_comm *comm)
{
    qs_bench_options o = {.device = args->device,
                          .allow_shared_device = args->shared_device,
                          .threads = args->threads,
                          .json = args->json,
                          .repeats = args->repeats,
                          .warmup = args->warmup,
                          .begin_bytes = args->begin_bytes,
                          .end_bytes = args->end_bytes,
                          .factor = args->factor,
                          .group = args->group,
                          .tokens = args->tokens,
                          .rows = args->rows,
                          .cols = args->cols,
                          .heads = args->heads,
                          .kv_heads = args->kv_heads,
                          .head_dim = args->head_dim};
    qs_status st = qs_bench_find(args->words[0], &o.kind);
    st = st == QS_OK ? check_words(args, &o) : st;
    st = st == QS_OK ? check_options(args, o.kind) : st;
    QS_TRY(qs_comm_agree(comm, st));
    if (o.kind == QS_BENCH_STEP) {
        QS_TRY(step_config(args, &o.config, comm));
        o.config.cpu.threads = args->threads > 0 ? args->threads : o.config.cpu.threads;
    }
    return qs_bench_run(&o, comm);
}
