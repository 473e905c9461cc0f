/* Options by glibc's argp, with the project's own error lines: an unknown option names the nearest
 * one, and nothing but that one line is printed. */
#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli/cli_impl.h"
#include "config/config_hints.h"
#include "config/config_keys.h"
#include "config/nearest.h"

enum {
    KEY_HELP = 'h',
    KEY_SET = 256,
    KEY_ADAPTER,
    KEY_PROMPTS,
    KEY_TOKENS,
    KEY_BASE_NAME,
    KEY_DUMP_GRADS,
    KEY_DUMP_ORDER,
    KEY_DUMP_LOGITS,
    KEY_HEAD_ROWS,
    KEY_SINGLE_QUANT,
    KEY_THREADS,
    KEY_RESUME,
    KEY_TAKEOVER,
    KEY_DRY_RUN,
    KEY_DEVICE,
    KEY_SHARED_DEVICE,
    KEY_PROFILE_STEPS,
    KEY_TRACE,
    KEY_FOLD,
    KEY_BEST,
    KEY_BASE,
    KEY_ORIGINAL,
    KEY_DTYPE,
    KEY_SHARD_SIZE,
    KEY_GPU,
    KEY_GPUS,
    KEY_PER_NODE,
    KEY_LINK,
    KEY_JSON,
    KEY_BEGIN,
    KEY_END,
    KEY_FACTOR,
    KEY_REPEATS,
    KEY_WARMUP,
    KEY_GROUP,
    KEY_SHAPE,
    KEY_HEADS,
    KEY_KV_HEADS,
    KEY_HEAD_DIM,
    KEY_QUIET,
    KEY_VERBOSE,
};

#define COMMON                                                                                     \
    {"quiet", KEY_QUIET, NULL, 0, "Warnings, errors and the result only", QS_CLI_COMMON_GROUP},    \
        {"verbose", KEY_VERBOSE, NULL, 0, "Say more, on all ranks", QS_CLI_COMMON_GROUP},          \
        {"help", KEY_HELP, NULL, 0, "Show this help", QS_CLI_COMMON_GROUP + 1},                    \
    {                                                                                              \
        NULL, 0, NULL, 0, NULL, 0                                                                  \
    }

#define SET                                                                                        \
    {                                                                                              \
        "set", KEY_SET, "KEY=VALUE", 0,                                                            \
            "Override a key of the configuration; default: as the file says, or the key's own", 1  \
    }

#define BEST                                                                                       \
    {                                                                                              \
        "best", KEY_BEST, NULL, 0,                                                                 \
            "Of a run, take the checkpoint with the lowest eval_loss; default: the newest", 2      \
    }

#define SHARED_DEVICE                                                                              \
    {                                                                                              \
        "allow-shared-device", KEY_SHARED_DEVICE, NULL, 0,                                         \
            "Let several ranks use one GPU: for tests of bits and memory, never of speed", 5       \
    }

const struct argp_option qs_cli_train_options[] = {
    SET,
    {"resume", KEY_RESUME, "auto|must|never", 0,
     "Go on from the newest checkpoint if there is one (default), insist on one, or start in a "
     "fresh directory only",
     2},
    {"takeover", KEY_TAKEOVER, NULL, 0,
     "Write to a run directory whose writer is gone without a trace", 2},
    {"dry-run", KEY_DRY_RUN, NULL, 0, "Check everything, print the memory table, stop", 3},
    {"dump-grads", KEY_DUMP_GRADS, "FILE", 0,
     "Do not train: write the gradients of the first step as safetensors (default: a run)", 4},
    {"dump-order", KEY_DUMP_ORDER, "FILE", 0,
     "Do not train: write the sequences of each step as text (default: a run)", 4},
    SHARED_DEVICE,
    {"profile-steps", KEY_PROFILE_STEPS, "A:B", 0,
     "Let an attached profiler, or --trace, see step A to step B (default: no step; with --trace "
     "the third and fourth)",
     5},
    {"trace", KEY_TRACE, "FILE", 0,
     "Write what each rank computed, gathered and waited for in these steps, for chrome://tracing "
     "(on the CPU; default: none)",
     5},
    COMMON};

const struct argp_option qs_cli_eval_options[] = {
    SET,
    {"adapter", KEY_ADAPTER, "DIR", 0, "PEFT directory, checkpoint or run; default: base only", 2},
    BEST,
    {"dump-logits", KEY_DUMP_LOGITS, "FILE", 0,
     "Write the logits of the first sequence as safetensors (default: none)", 3},
    SHARED_DEVICE,
    COMMON};

const struct argp_option qs_cli_sample_options[] = {
    SET,
    {"prompts", KEY_PROMPTS, "FILE", 0,
     "Token file of prompts, made by qshard-prep --prompts (needed)", 1},
    {"tokens", KEY_TOKENS, "N", 0,
     "Tokens to add to each prompt, within the model's positions; each computes the whole text "
     "again (needed)",
     1},
    {"adapter", KEY_ADAPTER, "DIR", 0, "PEFT directory, checkpoint or run; default: base only", 2},
    BEST,
    SHARED_DEVICE,
    COMMON};

const struct argp_option qs_cli_quantize_options[] = {
    {"output", 'o', "FILE", 0, "The base to write; must not exist (needed)", 1},
    {"head-chunk-rows", KEY_HEAD_ROWS, "N", 0,
     "Vocabulary rows that are gathered together (default 4096)", 2},
    {"no-double-quant", KEY_SINGLE_QUANT, NULL, 0, "Keep the first-level absmax as floats", 2},
    {"threads", KEY_THREADS, "N", 0, "Threads of a rank; default: the cores it was given", 3},
    {"device", KEY_DEVICE, "auto|cpu|cuda", 0,
     "Where to compute (default cpu); the file is the same", 3},
    SHARED_DEVICE,
    COMMON};

const struct argp_option qs_cli_export_options[] = {
    {"output", 'o', "DIR", 0, "The PEFT directory to write; must not exist (needed)", 1},
    BEST,
    {"base-name", KEY_BASE_NAME, "NAME", 0,
     "Hub id or path of the base model, for tools that load it from there; default: where the "
     "base was made from, a directory or, in Hugging Face's cache, the id",
     2},
    {"fold-scaling", KEY_FOLD, NULL, 0,
     "Multiply rslora's part of the scale into lora_B, for tools that know alpha / r only", 3},
    COMMON};

const struct argp_option qs_cli_merge_options[] = {
    {"output", 'o', "DIR", 0, "The Hugging Face checkpoint to write; must not exist (needed)", 1},
    BEST,
    {"base", KEY_BASE, "FILE", 0,
     "The base under the adapter; default: the run's own, needed for a PEFT directory", 2},
    {"original", KEY_ORIGINAL, "HF_DIR", 0,
     "Add the adapter to the weights of the checkpoint that the base was made from; default: to "
     "the dequantized base, which training computed with",
     2},
    {"dtype", KEY_DTYPE, "bf16|f16|f32", 0, "Type of all weights; default: as config.json says", 3},
    {"shard-size", KEY_SHARD_SIZE, "SIZE", 0, "Weights of a file, for example 500M (default 5G)",
     3},
    {"threads", KEY_THREADS, "N", 0, "Threads; default: the cores of this rank", 4},
    COMMON};

const struct argp_option qs_cli_plan_options[] = {
    SET,
    {"gpu", KEY_GPU, "GPU", 0,
     "Kind of GPU, for example H100 or RTX4090; default: a line for each kind that is known", 2},
    {"gpus", KEY_GPUS, "N", 0, "GPUs, a rank each (default 1)", 2},
    {"per-node", KEY_PER_NODE, "N", 0, "GPUs of a node (default 8, or all if they are fewer)", 2},
    {"link", KEY_LINK, "GBPS", 0,
     "10^9 bytes a second that a GPU gets from the others of its node; given again: that a node "
     "gets from the others; default: what is usual for the kind, and 20 between nodes",
     3},
    COMMON};

const struct argp_option qs_cli_bench_options[] = {
    SET,
    {"base", KEY_BASE, "FILE", 0,
     "step: the base, with the settings' defaults; default: a RUN.yaml names it", 1},
    {"begin-bytes", KEY_BEGIN, "SIZE", 0, "gather, reduce: the first size (default 16K)", 2},
    {"end-bytes", KEY_END, "SIZE", 0, "gather, reduce: no size above it (default 16M)", 2},
    {"factor", KEY_FACTOR, "N", 0, "gather, reduce: from size to size (default 4)", 2},
    {"group", KEY_GROUP, "world|node|N", 0,
     "gather, reduce: among all ranks (default), those of a node, or N at a time", 2},
    {"shape", KEY_SHAPE, "OUTxIN", 0,
     "gemm, decode: of the weight, default: four usual ones; head: rows of the chunk and hidden "
     "(default 4096x2048)",
     3},
    {"tokens", KEY_TOKENS, "N", 0, "gemm, attention, head: rows (default 512)", 3},
    {"heads", KEY_HEADS, "N", 0, "attention: heads of queries (default 32)", 3},
    {"kv-heads", KEY_KV_HEADS, "N", 0,
     "attention: heads of keys and values; default: a quarter of --heads", 3},
    {"head-dim", KEY_HEAD_DIM, "N", 0, "attention: width of a head (default 64)", 3},
    {"repeats", KEY_REPEATS, "N", 0,
     "Measurements of a figure; default: 20 for gather and reduce, 5 for step, 7 else", 4},
    {"warmup", KEY_WARMUP, "N", 0,
     "gather, reduce, step: rounds before them that do not count; default: 5, step 2", 4},
    {"json", KEY_JSON, "FILE", 0, "Write the results there as well; default: nowhere", 4},
    {"threads", KEY_THREADS, "N", 0, "Threads of a rank; default: the cores it was given", 5},
    {"device", KEY_DEVICE, "auto|cpu|cuda", 0,
     "Where to compute; default: cpu, of a step what the key device says", 5},
    SHARED_DEVICE,
    COMMON};

const struct argp_option qs_cli_plain_options[] = {COMMON};

/* ---- one option ---- */

static qs_status whole_number(const char *option, const char *text, int64_t low, int64_t high,
                              int64_t *out)
{
    char *end;
    errno = 0;
    long long value = strtoll(text, &end, 10);
    if (errno || end == text || *end || value < low || value > high) {
        return QS_FAIL(QS_ERR_USAGE, "--%s: \"%.40s\" is not a whole number in %lld .. %lld",
                       option, text, (long long)low, (long long)high);
    }
    *out = value;
    return QS_OK;
}

qs_status qs_cli_parse_size(const char *option, const char *text, int64_t *out)
{
    static const char units[] = "KMGT";
    char *end;
    errno = 0;
    long long value = strtoll(text, &end, 10);
    const char *unit = *end != '\0' ? strchr(units, *end) : NULL;
    int shift = unit != NULL ? 10 * (int)(unit - units + 1) : 0;
    bool number = text[0] >= '1' && text[0] <= '9' && errno == 0;
    if (!number || (unit == NULL ? *end != '\0' : end[1] != '\0') || value > INT64_MAX >> shift) {
        return QS_FAIL(QS_ERR_USAGE,
                       "--%s: \"%.40s\" is no size; give bytes, or a whole number with K, M, G or "
                       "T, for example 5G",
                       option, text);
    }
    *out = value << shift;
    return QS_OK;
}

/* "4096x2048" */
static qs_status set_shape(qs_cli_args *out, const char *text)
{
    long long rows = 0, cols = 0;
    int end = 0;
    if (sscanf(text, "%lldx%lld%n", &rows, &cols, &end) != 2 || text[end] != '\0' || rows < 1 ||
        cols < 1 || rows > 1 << 20 || cols > 1 << 20) {
        return QS_FAIL(QS_ERR_USAGE,
                       "--shape: \"%.40s\" is not OUTxIN with numbers in 1 .. 1048576, for example "
                       "4096x2048",
                       text);
    }
    out->rows = rows;
    out->cols = cols;
    return QS_OK;
}

static qs_status set_group(qs_cli_args *out, const char *text)
{
    if (strcmp(text, "world") == 0 || strcmp(text, "node") == 0) {
        out->group = text[0] == 'w' ? QS_SHARD_WORLD : QS_SHARD_NODE;
        return QS_OK;
    }
    return whole_number("group", text, 1, 1000000, &out->group);
}

/* The first is inside a node, the second between nodes. */
static qs_status add_link(qs_cli_args *out, const char *text)
{
    char *end;
    const double gbps = strtod(text, &end);
    if (end == text || *end || !(gbps > 0) || gbps > 1e6) {
        return QS_FAIL(QS_ERR_USAGE, "--link: \"%.40s\" is no rate in 10^9 bytes a second", text);
    }
    if (out->n_links == QS_CLI_LINKS_MAX) {
        return QS_FAIL(QS_ERR_USAGE,
                       "--link is given more than %d times: inside a node, between nodes",
                       QS_CLI_LINKS_MAX);
    }
    out->link_gbps[out->n_links++] = gbps;
    return QS_OK;
}

/* "A:B", both from 1, A <= B. */
static qs_status set_steps(qs_cli_args *out, const char *text)
{
    long long from = 0, to = 0;
    int end = 0;
    if (sscanf(text, "%lld:%lld%n", &from, &to, &end) != 2 || text[end] != '\0' || from < 1 ||
        to < from) {
        return QS_FAIL(QS_ERR_USAGE,
                       "--profile-steps: \"%.40s\" is not A:B with 1 <= A <= B, for example 5:7",
                       text);
    }
    out->profile_steps[0] = from;
    out->profile_steps[1] = to;
    return QS_OK;
}

/* One of three names; its number in the order given. */
static qs_status one_of(const char *option, const char *text, const char *const names[3], int *out)
{
    for (int i = 0; i < 3; i++) {
        if (strcmp(text, names[i]) == 0) {
            *out = i;
            return QS_OK;
        }
    }
    return QS_FAIL(QS_ERR_USAGE, "--%s: \"%.40s\" is not known; allowed: %s | %s | %s", option,
                   text, names[0], names[1], names[2]);
}

static qs_status set_resume(qs_cli_args *out, const char *text)
{
    static const char *const names[] = {
        [QS_RESUME_AUTO] = "auto", [QS_RESUME_MUST] = "must", [QS_RESUME_NEVER] = "never"};
    int number = 0;
    QS_TRY(one_of("resume", text, names, &number));
    out->resume = (qs_resume)number;
    return QS_OK;
}

static qs_status set_device(qs_cli_args *out, const char *text)
{
    static const char *const names[] = {
        [QS_DEVICE_AUTO] = "auto", [QS_DEVICE_CPU] = "cpu", [QS_DEVICE_CUDA] = "cuda"};
    int number = 0;
    QS_TRY(one_of("device", text, names, &number));
    out->device = (qs_device_kind)number;
    out->device_given = true;
    return QS_OK;
}

static qs_status add_set(qs_cli_args *out, const char *text)
{
    if (out->n_sets == QS_CLI_SETS_MAX) {
        return QS_FAIL(QS_ERR_USAGE, "--set is given more than %d times", QS_CLI_SETS_MAX);
    }
    out->sets[out->n_sets++] = text;
    return QS_OK;
}

static qs_status add_word(qs_cli_args *out, const char *text)
{
    if (out->n_words == QS_CLI_WORDS_MAX) {
        return QS_FAIL(QS_ERR_USAGE, "\"%.80s\" is one argument too many; see --help", text);
    }
    out->words[out->n_words++] = text;
    return QS_OK;
}

/* ---- what each option means ---- */

typedef enum {
    FLAG,   /* bool: it is there */
    TEXT,   /* const char *: as it stands */
    NUMBER, /* int64_t within [low, high] */
    SIZE,   /* int64_t, qs_cli_parse_size */
    OWN,    /* a function of its own */
} option_kind;

typedef struct {
    int key;
    option_kind kind;
    const char *name; /* for messages */
    size_t offset;    /* in qs_cli_args */
    int64_t low, high;
    qs_status (*own)(qs_cli_args *out, const char *text);
} option_row;

#define AT(field) offsetof(qs_cli_args, field)
#define NUMBER_ROW(k, text, field, least, most)                                                    \
    {                                                                                              \
        .key = k, .kind = NUMBER, .name = text, .offset = AT(field), .low = least, .high = most    \
    }

static const option_row rows[] = {
    {.key = KEY_HELP, .kind = FLAG, .offset = AT(help)},
    {.key = KEY_QUIET, .kind = FLAG, .offset = AT(quiet)},
    {.key = KEY_VERBOSE, .kind = FLAG, .offset = AT(verbose)},
    {.key = KEY_TAKEOVER, .kind = FLAG, .offset = AT(takeover)},
    {.key = KEY_DRY_RUN, .kind = FLAG, .offset = AT(dry_run)},
    {.key = KEY_SHARED_DEVICE, .kind = FLAG, .offset = AT(shared_device)},
    {.key = KEY_SINGLE_QUANT, .kind = FLAG, .offset = AT(single_quant)},
    {.key = KEY_BEST, .kind = FLAG, .offset = AT(best)},
    {.key = KEY_FOLD, .kind = FLAG, .offset = AT(fold_scaling)},

    {.key = 'o', .kind = TEXT, .offset = AT(output)},
    {.key = KEY_ADAPTER, .kind = TEXT, .offset = AT(adapter)},
    {.key = KEY_PROMPTS, .kind = TEXT, .offset = AT(prompts)},
    {.key = KEY_BASE_NAME, .kind = TEXT, .offset = AT(base_name)},
    {.key = KEY_BASE, .kind = TEXT, .offset = AT(base)},
    {.key = KEY_ORIGINAL, .kind = TEXT, .offset = AT(original)},
    {.key = KEY_DTYPE, .kind = TEXT, .offset = AT(dtype)},
    {.key = KEY_SHARD_SIZE, .kind = TEXT, .offset = AT(shard_size)},
    {.key = KEY_GPU, .kind = TEXT, .offset = AT(gpu)},
    {.key = KEY_JSON, .kind = TEXT, .offset = AT(json)},
    {.key = KEY_TRACE, .kind = TEXT, .offset = AT(trace)},
    {.key = KEY_DUMP_GRADS, .kind = TEXT, .offset = AT(dump_grads)},
    {.key = KEY_DUMP_ORDER, .kind = TEXT, .offset = AT(dump_order)},
    {.key = KEY_DUMP_LOGITS, .kind = TEXT, .offset = AT(dump_logits)},

    NUMBER_ROW(KEY_TOKENS, "tokens", tokens, 1, 1 << 20),
    NUMBER_ROW(KEY_HEAD_ROWS, "head-chunk-rows", head_chunk_rows, 1, 1 << 22),
    NUMBER_ROW(KEY_THREADS, "threads", threads, 1, 4096),
    NUMBER_ROW(KEY_GPUS, "gpus", gpus, 1, 65536),
    NUMBER_ROW(KEY_PER_NODE, "per-node", per_node, 1, 65536),
    NUMBER_ROW(KEY_FACTOR, "factor", factor, 2, 1 << 20),
    NUMBER_ROW(KEY_REPEATS, "repeats", repeats, 1, 1000),
    NUMBER_ROW(KEY_WARMUP, "warmup", warmup, 0, 1000),
    NUMBER_ROW(KEY_HEADS, "heads", heads, 1, 1024),
    NUMBER_ROW(KEY_KV_HEADS, "kv-heads", kv_heads, 1, 1024),
    NUMBER_ROW(KEY_HEAD_DIM, "head-dim", head_dim, 2, 1024),

    {.key = KEY_BEGIN, .kind = SIZE, .name = "begin-bytes", .offset = AT(begin_bytes)},
    {.key = KEY_END, .kind = SIZE, .name = "end-bytes", .offset = AT(end_bytes)},

    {.key = KEY_SET, .kind = OWN, .own = add_set},
    {.key = KEY_LINK, .kind = OWN, .own = add_link},
    {.key = KEY_GROUP, .kind = OWN, .own = set_group},
    {.key = KEY_SHAPE, .kind = OWN, .own = set_shape},
    {.key = KEY_RESUME, .kind = OWN, .own = set_resume},
    {.key = KEY_DEVICE, .kind = OWN, .own = set_device},
    {.key = KEY_PROFILE_STEPS, .kind = OWN, .own = set_steps},
    {.key = ARGP_KEY_ARG, .kind = OWN, .own = add_word},
};

static const option_row *row_of(int key)
{
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        if (rows[i].key == key) {
            return &rows[i];
        }
    }
    return NULL;
}

static qs_status take(qs_cli_args *out, int key, const char *text)
{
    const option_row *row = row_of(key);
    if (row == NULL) {
        return QS_FAIL(QS_ERR_BUG, "option %d has no meaning", key);
    }
    void *field = (char *)out + row->offset;
    switch (row->kind) {
    case FLAG:
        *(bool *)field = true;
        return QS_OK;
    case TEXT:
        *(const char **)field = text;
        return QS_OK;
    case NUMBER:
        return whole_number(row->name, text, row->low, row->high, field);
    case SIZE:
        return qs_cli_parse_size(row->name, text, field);
    default:
        return row->own(out, text);
    }
}

static error_t parse_one(int key, char *text, struct argp_state *state)
{
    if (key >= ARGP_KEY_END) {
        return ARGP_ERR_UNKNOWN; /* argp's own events: all are above every option */
    }
    if (text && !*text) {
        (void)QS_FAIL(QS_ERR_USAGE, "an argument or a value of an option is empty");
        return EINVAL;
    }
    return take(state->input, key, text) == QS_OK ? 0 : EINVAL;
}

/* ---- what argp would not tell ---- */

/* The long option that `name` means: exactly, or as the only one that begins so. */
static const struct argp_option *find_option(const struct argp_option *options, const char *name,
                                             size_t length)
{
    const struct argp_option *found = NULL;
    int matches = 0;
    for (const struct argp_option *o = options; o->name; o++) {
        if (strncmp(o->name, name, length) == 0) {
            if (strlen(o->name) == length) {
                return o;
            }
            found = o;
            matches++;
        }
    }
    return matches == 1 ? found : NULL;
}

static bool takes_keys(const struct argp_option *options)
{
    bool takes = false;
    for (const struct argp_option *o = options; o->name; o++) {
        takes = takes || o->key == KEY_SET;
    }
    return takes;
}

/* "--lr 1e-4": a key as most programs take it. `value`: behind the equals sign, or the next word;
 * NULL: there is none. */
static qs_status key_as_option(const char *name, const char *key, const char *value)
{
    const bool is_switch = qs_keys[qs_key_find(key)].type == QS_KEY_BOOL;
    if (value == NULL || value[0] == '\0' || value[0] == '-') {
        value = is_switch ? "true" : "VALUE";
    }
    return QS_FAIL(QS_ERR_USAGE, "unknown option --%s; settings go through --set %s=%.80s", name,
                   key, value);
}

/* The key or remark that an option's name stands for, which others write with minus signs. */
static const char *as_key(const char *name, const char *(*look)(const char *))
{
    char key[64];
    snprintf(key, sizeof key, "%s", name);
    for (char *c = key; *c != '\0'; c++) {
        *c = *c == '-' ? '_' : *c;
    }
    return look(key);
}

static qs_status unknown_option(const struct argp_option *options, const char *word, size_t length,
                                const char *next)
{
    const char *names[32];
    int count = 0;
    char name[64];
    for (const struct argp_option *o = options; o->name && count < 32; o++) {
        names[count++] = o->name;
    }
    snprintf(name, sizeof name, "%.*s", (int)(length < 63 ? length : 63), word);
    const char *key = takes_keys(options) ? as_key(name, qs_key_meant) : NULL;
    const char *says = takes_keys(options) ? as_key(name, qs_key_remark) : NULL;
    if (key != NULL) {
        return key_as_option(name, key, word[length] == '=' ? word + length + 1 : next);
    }
    if (says != NULL) {
        return QS_FAIL(QS_ERR_USAGE, "unknown option --%s; %s", name, says);
    }
    const char *near = qs_nearest(name, names, count);
    return near != NULL
               ? QS_FAIL(QS_ERR_USAGE, "unknown option --%s; did you mean --%s?", name, near)
               : QS_FAIL(QS_ERR_USAGE, "unknown option --%s; --help lists those of the command",
                         name);
}

static qs_status needs_value(const char *word)
{
    return QS_FAIL(QS_ERR_USAGE, "option %.64s needs a value; see --help", word);
}

/* Look at one word before argp does; *skip becomes true if the next word is its value. */
static qs_status check_word(const struct argp_option *options, const char *word, const char *next,
                            bool *skip)
{
    *skip = false;
    if (strncmp(word, "--", 2) == 0) {
        size_t length = strcspn(word + 2, "=");
        const struct argp_option *o = find_option(options, word + 2, length);
        if (!o) {
            return unknown_option(options, word + 2, length, next);
        }
        bool given = word[2 + length] == '=';
        if (given && !o->arg) {
            return QS_FAIL(QS_ERR_USAGE, "option --%s takes no value", o->name);
        }
        *skip = o->arg && !given;
        return *skip && !next ? needs_value(word) : QS_OK;
    }
    for (const struct argp_option *o = options; o->name; o++) {
        if (o->key == word[1]) {
            *skip = o->arg && !word[2];
            return *skip && !next ? needs_value(word) : QS_OK;
        }
    }
    return QS_FAIL(QS_ERR_USAGE, "unknown option %.64s; options are written --name", word);
}

/* "train run.yaml optim.lr=1e-4"; a first argument of that form is the name of a file. */
static qs_status check_argument(const struct argp_option *options, const char *word)
{
    char name[64];
    const size_t length = strcspn(word, "=");
    snprintf(name, sizeof name, "%.*s", (int)(length < 63 ? length : 63), word);
    const char *key = word[length] == '=' && takes_keys(options) ? qs_key_meant(name) : NULL;
    return key == NULL ? QS_OK
                       : QS_FAIL(QS_ERR_USAGE, "\"%.80s\": settings go through --set %s=%.80s",
                                 word, key, word + length + 1);
}

static qs_status check_words(const struct argp_option *options, int argc, char **argv)
{
    bool first = true;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--") == 0) {
            break;
        }
        bool skip = false;
        if (argv[i][0] == '-' && argv[i][1]) {
            QS_TRY(check_word(options, argv[i], argv[i + 1], &skip));
        } else {
            QS_TRY(first ? QS_OK : check_argument(options, argv[i]));
            first = false;
        }
        i += skip;
    }
    return QS_OK;
}

static struct argp argp_of(const qs_cli_command *command)
{
    return (struct argp){.options = command->options,
                         .parser = parse_one,
                         .args_doc = command->usage,
                         .doc = command->summary};
}

qs_status qs_cli_parse(const qs_cli_command *command, int argc, char **argv, qs_cli_args *out)
{
    struct argp argp = argp_of(command);
    *out = (qs_cli_args){.device = QS_DEVICE_CPU, .warmup = -1, .group = QS_SHARD_WORLD};
    QS_TRY(check_words(command->options, argc, argv));
    error_t failed = argp_parse(&argp, argc, argv, ARGP_NO_ERRS | ARGP_NO_HELP, NULL, out);
    if (failed) { /* parse_one has said why; the rest was caught above */
        return QS_FAIL(QS_ERR_USAGE, "the command line cannot be understood; see qshard %s --help",
                       command->name);
    }
    const int least = command->n_words < 0 ? 1 : command->n_words, most = abs(command->n_words);
    if (!out->help && (out->n_words < least || out->n_words > most)) {
        return out->n_words > most
                   ? QS_FAIL(QS_ERR_USAGE,
                             "\"%.80s\" is one argument too many; usage: qshard %s [OPTION...] %s",
                             out->words[most], command->name, command->usage)
                   : QS_FAIL(QS_ERR_USAGE,
                             "an argument is missing; usage: qshard %s [OPTION...] %s",
                             command->name, command->usage);
    }
    return QS_OK;
}

void qs_cli_command_help(const qs_cli_command *command)
{
    struct argp argp = argp_of(command);
    char name[64];
    snprintf(name, sizeof name, "qshard %s", command->name);
    argp_help(&argp, stdout, ARGP_HELP_USAGE | ARGP_HELP_PRE_DOC | ARGP_HELP_LONG, name);
    if (command->keys) {
        printf("\nKeys of the configuration:\n");
        qs_config_print_keys();
    }
}
