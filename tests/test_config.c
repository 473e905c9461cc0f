/* Configuration: the table against the parser, the dump and the messages. */
#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/rng.h"
#include "config/config_keys.h"
#include "hf/hf_config.h"

static qs_status parse(qs_config *cfg, const char *text)
{
    qs_error_clear();
    return qs_config_parse(cfg, text, strlen(text), "run.yaml", NULL, 0);
}

static qs_status parse_set(qs_config *cfg, const char *text, const char *set)
{
    qs_error_clear();
    return qs_config_parse(cfg, text, strlen(text), "run.yaml", &set, 1);
}

/* ---- defaults and values ---- */

Test(config, defaults_are_those_of_the_design)
{
    qs_config c;
    cr_assert_eq(parse(&c, "base: b.h5\n"), QS_OK, "%s", qs_error_text());
    cr_assert_eq(c.seed, 42);
    cr_assert_eq(c.train.steps, 100);
    cr_assert_eq(c.train.global_batch, 16);
    cr_assert_eq(c.train.micro_batch, 2);
    cr_assert_eq(c.train.seq_len, 512);
    cr_assert_eq(c.train.recompute, QS_RECOMPUTE_FULL);
    cr_assert_eq(c.train.gather_group, 0);
    cr_assert_eq(c.train.keep_last, 2);
    cr_assert_eq(c.lora.rank, 16);
    cr_assert_eq(c.lora.alpha, 32.0);
    cr_assert_eq(c.lora.targets, QS_LINEARS_ALL | QS_TARGETS_SET);
    cr_assert_eq(c.optim.lr, 2e-4);
    cr_assert_eq(c.optim.beta1, 0.9);
    cr_assert_eq(c.optim.beta2, 0.999);
    cr_assert_eq(c.optim.eps, 1e-8);
    cr_assert_eq(c.optim.schedule, QS_SCHEDULE_COSINE);
    cr_assert_eq(c.optim.warmup, 0.03);
    cr_assert_eq(c.shard.prefetch, 1);
    cr_assert_eq(c.cpu.gemm, QS_GEMM_AUTO);
}

Test(config, block_and_flow_styles_mean_the_same)
{
    qs_config flow, block;
    cr_assert_eq(parse(&flow, "{base: b.h5, train: {steps: 7, micro_batch: 1}, "
                              "lora: {targets: [q_proj, down_proj]}, optim: {betas: [0.8, 0.9]}}"),
                 QS_OK);
    cr_assert_eq(parse(&block, "# a comment\nbase: \"b.h5\"\ntrain:\n  steps: 7 # seven\n"
                               "  micro_batch: 1\nlora:\n  targets:\n  - q_proj\n  - down_proj\n"
                               "optim:\n  betas:\n  - 0.8\n  - 0.9\n"),
                 QS_OK);
    cr_assert(memcmp(&flow, &block, sizeof flow) == 0);
    cr_assert_eq(flow.lora.targets, 1u << QS_Q | 1u << QS_DOWN);
}

Test(config, yaml_1_1_guesses_do_not_apply)
{
    qs_config c;
    cr_assert_eq(parse(&c, "base: no\noutput: 1e3\ndata: {train: 010}\n"), QS_OK);
    cr_assert_str_eq(c.base, "no");
    cr_assert_str_eq(c.output, "1e3");
    cr_assert_str_eq(c.data_train, "010");
    cr_assert_eq(parse(&c, "base: b\noptim: {lr: 1e-4}\n"), QS_OK);
    cr_assert_eq(c.optim.lr, 1e-4);
    cr_assert_eq(parse(&c, "base: b\noptim: {lr: 0001e-4}\n"), QS_OK);
    cr_assert_eq(c.optim.lr, 1e-4);
}

Test(config, set_overrides_the_file_and_the_last_one_wins)
{
    qs_config c;
    const char *sets[] = {"train.steps=5", "output=a b#c: \"d\"", "lora.targets=[v_proj, q_proj]",
                          "train.steps=6", "data.train=",         "memory.device_limit=3G"};
    const char *text = "base: b\ntrain: {steps: 4}\ndata: {train: t.h5}\n";
    cr_assert_eq(qs_config_parse(&c, text, strlen(text), "run.yaml", sets, 6), QS_OK, "%s",
                 qs_error_text());
    cr_assert_eq(c.train.steps, 6);
    cr_assert_str_eq(c.output, "a b#c: \"d\"");
    cr_assert_eq(c.lora.targets, 1u << QS_Q | 1u << QS_V);
    cr_assert_str_eq(c.data_train, "");
    cr_assert_eq(c.memory.device_limit, (int64_t)3 << 30);
}

Test(config, epochs_alone_replace_the_default_steps)
{
    qs_config c;
    cr_assert_eq(parse(&c, "base: b\ntrain: {epochs: 3}\n"), QS_OK);
    cr_assert_eq(c.train.steps, 0);
    cr_assert_eq(parse_set(&c, "base: b\n", "train.epochs=2"), QS_OK);
    cr_assert_eq(c.train.steps, 0);
    cr_assert_eq(parse(&c, "base: b\ntrain: {epochs: 3, steps: 100}\n"), QS_ERR_CONFIG_PAIR);
}

Test(config, numbers_may_have_words)
{
    static const struct {
        const char *text;
        int64_t value;
    } groups[] = {
        {"auto", QS_SHARD_AUTO}, {"world", QS_SHARD_WORLD}, {"node", QS_SHARD_NODE}, {"8", 8}};
    for (size_t i = 0; i < sizeof groups / sizeof *groups; i++) {
        char text[100], line[100];
        qs_config c;
        snprintf(text, sizeof text, "base: b\nshard: {group: %s}\n", groups[i].text);
        cr_assert_eq(qs_config_parse(&c, text, strlen(text), "r", NULL, 0), QS_OK, "%s",
                     qs_error_text());
        cr_assert_eq(c.shard.group, groups[i].value, "%s", groups[i].text);
        char *dump = qs_config_dump(&c);
        snprintf(line, sizeof line, "group: %s ", groups[i].text);
        cr_assert_not_null(strstr(dump, line), "%s", dump);
        free(dump);
    }
}

Test(config, sets_of_targets_have_names)
{
    static const struct {
        const char *name;
        uint32_t bits;
    } sets[] = {{"all-linear", QS_LINEARS_ALL},
                {"attention", QS_LINEARS_ATTENTION},
                {"mlp", QS_LINEARS_GATE_UP | QS_LINEARS_DOWN},
                {"fsdp_qlora-all", 0x7f & ~(1u << QS_O)}};
    for (size_t i = 0; i < sizeof sets / sizeof *sets; i++) {
        char text[100];
        qs_config c;
        snprintf(text, sizeof text, "base: b\nlora: {targets: %s}\n", sets[i].name);
        cr_assert_eq(qs_config_parse(&c, text, strlen(text), "r", NULL, 0), QS_OK, "%s",
                     qs_error_text());
        cr_assert_eq(c.lora.targets, sets[i].bits | QS_TARGETS_SET, "%s", sets[i].name);
        char *dump = qs_config_dump(&c), line[64];
        snprintf(line, sizeof line, "targets: %s ", sets[i].name);
        cr_assert_not_null(strstr(dump, line), "%s", dump);
        free(dump);
    }
}

Test(config, targets_are_the_linears_of_a_layer_in_their_order)
{
    for (int i = 0; i < QS_LINEAR_COUNT; i++) {
        char text[128];
        const char *path = qs_linear_path((qs_linear)i);
        snprintf(text, sizeof text, "base: b\nlora: {targets: [%s]}\n", strrchr(path, '.') + 1);
        qs_config c;
        cr_assert_eq(parse(&c, text), QS_OK, "%s: %s", text, qs_error_text());
        cr_assert_eq(c.lora.targets, 1u << i, "%s", path);
    }
}

/* ---- the dump ---- */

/* A value that the row allows, by chance; lands on both ends of the range too. */
static double random_in(const qs_rng *rng, uint64_t i, const qs_key *key)
{
    double u = qs_rng_uniform(rng, 2 * i);
    uint32_t kind = qs_rng_u32(rng, 2 * i + 1) % 8;
    if (kind == 0 && !key->above_low) {
        return key->low;
    }
    if (kind == 1) {
        return key->high;
    }
    double low = key->low, high = key->high;
    /* by magnitude, so that 1e-9 and 1e9 both come up */
    double value = low + (high - low) * pow(2.0, -40.0 * u) * (1 - 1e-7);
    return value;
}

static void randomize(qs_config *cfg, const qs_rng *rng, uint64_t at)
{
    static const char *const paths[] = {"a.h5",
                                        "dir with space/\"q\"\\x",
                                        "#no: {x}",
                                        "~",
                                        "null",
                                        "  edges  ",
                                        "\xc3\xa9\xe6\x97\xa5\xf0\x9f\x98\x80",
                                        "-"};
    for (int k = 0; k < qs_keys_count; k++) {
        const qs_key *key = &qs_keys[k];
        void *field = (char *)cfg + key->offset;
        uint64_t i = at + 8 * (uint64_t)k;
        uint32_t bits = qs_rng_u32(rng, 2 * i);
        int names = 0;
        while (names < QS_KEY_NAMES_MAX && key->names[names]) {
            names++;
        }
        switch (key->type) {
        case QS_KEY_I64:
        case QS_KEY_BYTES:
            *(int64_t *)field = (int64_t)random_in(rng, i, key);
            break;
        case QS_KEY_PAIR:
            ((double *)field)[1] = random_in(rng, i + 1, key);
            *(double *)field = random_in(rng, i, key);
            break;
        case QS_KEY_F64:
            *(double *)field = random_in(rng, i, key);
            break;
        case QS_KEY_BOOL:
            *(bool *)field = bits & 1;
            break;
        case QS_KEY_PATH:
            memset(field, 0, QS_PATH_MAX);
            strcpy(field, paths[bits % 8]);
            break;
        case QS_KEY_ENUM:
            *(int *)field = (int)(bits % (uint32_t)names);
            break;
        case QS_KEY_TARGETS:
            *(uint32_t *)field =
                bits % 8 > 0 ? 1 + bits / 8 % QS_LINEARS_ALL : QS_LINEARS_ALL | QS_TARGETS_SET;
            break;
        case QS_KEY_FLAGS:
            *(uint32_t *)field = bits & ((1u << names) - 1);
            break;
        default:
            break;
        }
    }
}

/* Pairs that qs_config_parse checks. */
static void make_consistent(qs_config *c)
{
    c->train.steps = c->train.steps ? c->train.steps : 1 + !c->train.epochs;
    c->train.epochs = 0;
    c->train.global_batch = c->train.micro_batch + c->train.global_batch / 32;
    c->train.keep_every = c->train.save_every > 0 ? c->train.save_every : 0;
    c->train.patience = c->train.eval_every != 0 ? c->train.patience : 0;
    c->train.eval_first = c->train.eval_first && c->data_eval[0] != '\0';
    c->memory.offload &= c->train.recompute == QS_RECOMPUTE_FULL ? UINT32_MAX : 6;
    if (c->optim.warmup >= 1) {
        c->optim.warmup = c->train.steps > 3 ? floor(fmin(c->optim.warmup, 3)) : 0;
    }
    snprintf(c->output, sizeof c->output, "out");
    memset(c->output + 3, 0, sizeof c->output - 3);
}

Test(config, dump_parses_back_to_the_same_struct)
{
    qs_rng rng = qs_rng_make(11, 0, 0, 99, 0);
    for (uint64_t trial = 0; trial < 500; trial++) {
        qs_config a, b;
        memset(&a, 0, sizeof a);
        randomize(&a, &rng, trial * 1024);
        make_consistent(&a);
        char *text = qs_config_dump(&a);
        cr_assert_not_null(text);
        cr_assert_eq(parse(&b, text), QS_OK, "trial %d: %s\n%s", (int)trial, qs_error_text(), text);
        cr_assert(memcmp(&a, &b, sizeof a) == 0, "trial %d:\n%s", (int)trial, text);
        char *again = qs_config_dump(&b);
        cr_assert_str_eq(text, again);
        free(text);
        free(again);
    }
}

Test(config, dump_carries_every_key_and_a_comment)
{
    qs_config c;
    qs_config_defaults(&c);
    char *text = qs_config_dump(&c);
    for (int k = 0; k < qs_keys_count; k++) {
        const char *dot = strrchr(qs_keys[k].name, '.');
        char line[64];
        snprintf(line, sizeof line, "%s: ", dot ? dot + 1 : qs_keys[k].name);
        const char *at = strstr(text, line);
        cr_assert_not_null(at, "%s", qs_keys[k].name);
        cr_assert_not_null(strstr(text, qs_keys[k].meaning), "%s", qs_keys[k].name);
    }
    free(text);
}

/* ---- what may change on resume ---- */

Test(config, set_takes_a_path_with_quotes_around_it)
{
    static const struct {
        const char *set, *path;
    } cases[] = {{"data.eval=\"eval.h5\"", "eval.h5"},
                 {"data.eval='a b.h5'", "a b.h5"},
                 {"data.eval=\"\"", ""},
                 {"data.eval=", ""},
                 {"data.eval=\"half.h5", "\"half.h5"},
                 {"data.eval=\"mixed'", "\"mixed'"},
                 {"data.eval=\"", "\""}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        qs_config c;
        cr_assert_eq(parse_set(&c, "base: b\n", cases[i].set), QS_OK, "%s", qs_error_text());
        cr_assert_str_eq(c.data_eval, cases[i].path, "%s", cases[i].set);
    }
}

Test(config, set_takes_quotes_as_the_file_does)
{
    qs_config c;
    cr_assert_eq(parse_set(&c, "base: b\n", "lora.targets=[\"v_proj\", 'q_proj']"), QS_OK, "%s",
                 qs_error_text());
    cr_assert_eq(c.lora.targets, 1u << QS_Q | 1u << QS_V);
    cr_assert_eq(parse_set(&c, "base: b\n", "optim.name=\"sgd\""), QS_OK, "%s", qs_error_text());
    cr_assert_eq(parse_set(&c, "base: b\n", "seed='3'"), QS_ERR_CONFIG_VALUE);
    cr_assert_not_null(strstr(qs_error_text(), "write it without quotes"), "%s", qs_error_text());
}

Test(config, resume_allows_what_changes_no_bit_and_names_the_rest)
{
    static const struct {
        const char *set, *key; /* key NULL: allowed */
    } cases[] = {
        {"train.log_every=3", NULL},
        {"train.save_every=5", NULL},
        {"train.keep_last=5", NULL},
        {"train.max_time=9", NULL},
        {"cpu.threads=3", NULL},
        {"train.recompute=none", NULL},
        {"train.gather_group=4", NULL},
        {"shard.keep_resident=auto", NULL},
        {"memory.keep_decoded=3", NULL},
        {"output=elsewhere", NULL},
        {"base=moved.h5", NULL},
        {"data.train=moved.h5", NULL},
        {"memory.device_limit=1G", NULL},
        {"optim.lr=1e-3", "optim.lr"},
        {"train.steps=50", "train.steps"},
        {"train.micro_batch=1", "train.micro_batch"},
        {"seed=1", "seed"},
        {"lora.targets=[q_proj]", "lora.targets"},
        {"lora.dropout=0.1", "lora.dropout"},
        {"optim.betas=[0.9, 0.99]", "optim.betas"},
        {"cpu.gemm=strict", "cpu.gemm"},
        {"train.seq_len=256", "train.seq_len"},
        {"optim.schedule=linear", "optim.schedule"},
        {"lora.init=d", "lora.init"},
    };
    qs_config a, b;
    char values[512];
    cr_assert_eq(parse(&a, "base: b\n"), QS_OK);
    cr_assert_null(qs_config_first_difference(&a, &a, values, sizeof values));
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        cr_assert_eq(parse_set(&b, "base: b\n", cases[i].set), QS_OK, "%s", qs_error_text());
        const char *key = qs_config_first_difference(&a, &b, values, sizeof values);
        if (cases[i].key) {
            cr_assert_not_null(key, "%s", cases[i].set);
            cr_assert_str_eq(key, cases[i].key);
        } else {
            cr_assert_null(key, "%s: %s", cases[i].set, key);
        }
    }
}

/* ---- refusals ---- */

typedef struct {
    const char *text;
    qs_status status;
    const char *says; /* must be part of the message */
} bad_file;

#define B "base: b.h5\n"

static const bad_file BAD[] = {
    {"", QS_ERR_CONFIG_VALUE, "empty"},
    {"# only a comment\n", QS_ERR_CONFIG_VALUE, "empty"},
    {"train: {steps: 1}\n", QS_ERR_CONFIG_VALUE, "base is missing"},
    {"- base\n", QS_ERR_CONFIG_VALUE, "run.yaml:1: expected key: value"},
    {"just text\n", QS_ERR_CONFIG_VALUE, "expected key: value"},
    {B "bsae: c\n", QS_ERR_CONFIG_KEY, "run.yaml:2: unknown key \"bsae\"; did you mean \"base\"?"},
    {B "train:\n  stepz: 3\n", QS_ERR_CONFIG_KEY,
     "run.yaml:3: unknown key \"train.stepz\"; did "
     "you mean \"train.steps\"?"},
    {B "steps: 3\n", QS_ERR_CONFIG_KEY, "did you mean \"train.steps\"?"},
    {B "train: {learning_rate: 3}\n", QS_ERR_CONFIG_KEY, "did you mean \"optim.lr\"?"},
    {B "lora: {r: 3}\n", QS_ERR_CONFIG_KEY, "did you mean \"lora.rank\"?"},
    {B "optim: {momentum: 3}\n", QS_ERR_CONFIG_KEY, "\"optim.momentum\"; qshard train --help"},
    {B "trian: {steps: 3}\n", QS_ERR_CONFIG_KEY, "key \"trian\"; did you mean \"train\"?"},
    {B "bsae: &a c\n", QS_ERR_CONFIG_KEY,
     "run.yaml:2: unknown key \"bsae\"; did you mean \"base\"?"},
    {B "bsae: [\n", QS_ERR_CONFIG_KEY, "run.yaml:2: unknown key \"bsae\"; did you mean \"base\"?"},
    {B "bsae: \"c\n", QS_ERR_CONFIG_KEY,
     "run.yaml:2: unknown key \"bsae\"; did you mean \"base\"?"},
    {B "memroy: 3\n", QS_ERR_CONFIG_KEY, "key \"memroy\"; qshard train --help lists all"},
    {B "memroy:\n  offload: []\n", QS_ERR_CONFIG_KEY,
     "run.yaml:2: unknown key \"memroy\"; did you mean \"memory\"?"},
    {B "low_memory: true\n", QS_ERR_CONFIG_KEY, "key \"low_memory\"; so it is in any case"},
    {B "train: {train_type: qlora}\n", QS_ERR_CONFIG_KEY, "it is QLoRA in any case"},
    {B "train.steps: 3\n", QS_ERR_CONFIG_KEY, "unknown key \"train.steps\""},
    {B B, QS_ERR_CONFIG_KEY, "run.yaml:2: \"base\" is given twice"},
    {B "train: {steps: 1}\ntrain: {epochs: 0}\n", QS_ERR_CONFIG_KEY, "\"train\" is given twice"},
    {B "train: {steps: 1, steps: 2}\n", QS_ERR_CONFIG_KEY, "given twice"},
    {B "train: 5\n", QS_ERR_CONFIG_VALUE, "train is a section"},
    {B "train:\n", QS_ERR_CONFIG_VALUE, "train is a section"},
    {B "seed: {a: 1}\n", QS_ERR_CONFIG_VALUE, "not a mapping"},
    {B "train: {steps: {a: 1}}\n", QS_ERR_CONFIG_VALUE, "not a mapping"},
    {B "train: {steps: [1]}\n", QS_ERR_CONFIG_VALUE, "is a list"},
    {B "lora: {targets: [[q_proj]]}\n", QS_ERR_CONFIG_VALUE, "list of plain values"},
    {B "? [a]\n: 1\n", QS_ERR_CONFIG_VALUE, "a key must be a plain name"},
    {B "seed: ten\n", QS_ERR_CONFIG_VALUE, "run.yaml:2: seed: \"ten\" is not an integer"},
    {B "seed: 1.0\n", QS_ERR_CONFIG_VALUE, "not an integer"},
    {B "seed: 1e3\n", QS_ERR_CONFIG_VALUE, "not an integer"},
    {B "seed: 0x1f\n", QS_ERR_CONFIG_VALUE, "not an integer"},
    {B "seed: 010\n", QS_ERR_CONFIG_VALUE, "not an integer"},
    {B "seed: 1_000\n", QS_ERR_CONFIG_VALUE, "not an integer"},
    {B "seed: +1\n", QS_ERR_CONFIG_VALUE, "not an integer"},
    {B "seed: \"1\"\n", QS_ERR_CONFIG_VALUE, "without quotes"},
    {B "seed:\n", QS_ERR_CONFIG_VALUE, "not an integer"},
    {B "seed: -1\n", QS_ERR_CONFIG_VALUE, "out of range; allowed: 0 .. "},
    {B "seed: 9223372036854775808\n", QS_ERR_CONFIG_VALUE, "not an integer"},
    {B "train: {steps: 1000000001}\n", QS_ERR_CONFIG_VALUE, "out of range"},
    {B "train: {micro_batch: 0}\n", QS_ERR_CONFIG_VALUE, "allowed: 1 .. "},
    {B "train: {gather_group: 0}\n", QS_ERR_CONFIG_VALUE, "auto | 1 .. "},
    {B "train: {seq_len: 1}\n", QS_ERR_CONFIG_VALUE, "allowed: 2 .. "},
    {B "train: {recompute: half}\n", QS_ERR_CONFIG_VALUE, "full | selective | none"},
    {B "train: {max_time: -1}\n", QS_ERR_CONFIG_VALUE, "out of range"},
    {B "optim: {lr: fast}\n", QS_ERR_CONFIG_VALUE, "is not a number"},
    {B "optim: {lr: .nan}\n", QS_ERR_CONFIG_VALUE, "is not a number"},
    {B "optim: {lr: .inf}\n", QS_ERR_CONFIG_VALUE, "is not a number"},
    {B "optim: {lr: 1e999}\n", QS_ERR_CONFIG_VALUE, "is not a number"},
    {B "optim: {lr: 0x1p-3}\n", QS_ERR_CONFIG_VALUE, "is not a number"},
    {B "optim: {lr: 1e}\n", QS_ERR_CONFIG_VALUE, "is not a number"},
    {B "optim: {lr: 0}\n", QS_ERR_CONFIG_VALUE, "above 0, at most 1"},
    {B "optim: {lr: '1e-4'}\n", QS_ERR_CONFIG_VALUE, "without quotes"},
    {B "optim: {betas: 0.9}\n", QS_ERR_CONFIG_VALUE, "is not a list"},
    {B "optim: {betas: [0.9]}\n", QS_ERR_CONFIG_VALUE, "has not two numbers"},
    {B "optim: {betas: [0.9, 1]}\n", QS_ERR_CONFIG_VALUE, "out of range"},
    {B "optim: {betas: [0.9, \"0.9\"]}\n", QS_ERR_CONFIG_VALUE, "quoted"},
    {B "optim: {betas: [1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17]}\n", QS_ERR_CONFIG_VALUE,
     "more than 16 items"},
    {B "optim: {name: lion}\n", QS_ERR_CONFIG_VALUE, "allowed: adamw | adam | sgd | adadelta"},
    {B "optim: {schedule: cosin}\n", QS_ERR_CONFIG_VALUE, "constant | linear | cosine"},
    {B "optim: {warmup: 1.5}\n", QS_ERR_CONFIG_PAIR, "whole number"},
    {B "optim: {warmup: 100}\n", QS_ERR_CONFIG_PAIR, "leaves nothing of train.steps=100"},
    {B "lora: {rslora: yes}\n", QS_ERR_CONFIG_VALUE, "neither true nor false"},
    {B "lora: {rslora: 1}\n", QS_ERR_CONFIG_VALUE, "neither true nor false"},
    {B "lora: {targets: []}\n", QS_ERR_CONFIG_VALUE, "nothing to train"},
    {B "lora: {targets: [lm_head]}\n", QS_ERR_CONFIG_VALUE, "not a linear of a layer"},
    {B "lora: {targets: [q_proj, q_proj]}\n", QS_ERR_CONFIG_VALUE, "named twice"},
    {B "lora: {targets: q_proj}\n", QS_ERR_CONFIG_VALUE,
     "all-linear | attention | mlp | fsdp_qlora-all | ["},
    {B "lora: {targets: q_proj}\n", QS_ERR_CONFIG_VALUE, "as in [q_proj, v_proj]"},
    {B "lora: {rank: 0}\n", QS_ERR_CONFIG_VALUE, "1 .. 1024"},
    {B "lora: {dropout: 1}\n", QS_ERR_CONFIG_VALUE, "0 .. 0.95"},
    {B "shard: {group: 0}\n", QS_ERR_CONFIG_VALUE, "auto | world | node | 1 .. 1000000 (ranks)"},
    {B "shard: {group: -1}\n", QS_ERR_CONFIG_VALUE, "auto | world | node"},
    {B "shard: {group: nodes}\n", QS_ERR_CONFIG_VALUE, "auto | world | node"},
    {B "shard: {keep_resident: -1}\n", QS_ERR_CONFIG_VALUE, "none | auto | 1 .. 1000000"},
    {B "shard: {prefetch: 0}\n", QS_ERR_CONFIG_VALUE, "1 .. 16"},
    {B "shard: {prefetch: 17}\n", QS_ERR_CONFIG_VALUE, "1 .. 16"},
    {B "memory: {offload: [weight]}\n", QS_ERR_CONFIG_VALUE, "any of [activations, weights"},
    {B "memory: {offload: [weights, weights]}\n", QS_ERR_CONFIG_VALUE, "named twice"},
    {B "memory: {offload: [activations]}\ntrain: {steps: 1, recompute: none}\n", QS_ERR_CONFIG_PAIR,
     "recompute"},
    {B "memory: {offload: weights}\n", QS_ERR_CONFIG_VALUE, "is not a list"},
    {B "memory: {device_limit: 8Q}\n", QS_ERR_CONFIG_VALUE, "not an integer"},
    {B "memory: {device_limit: 8GB}\n", QS_ERR_CONFIG_VALUE, "as in 8G"},
    {B "train:\nsteps: 3\n", QS_ERR_CONFIG_VALUE, "each indented"},
    {B "memory: {device_limit: 9000000000000T}\n", QS_ERR_CONFIG_VALUE, "out of range"},
    {B "device: tpu\n", QS_ERR_CONFIG_VALUE, "auto | cpu | cuda"},
    {B "cpu: {gemm: fast}\n", QS_ERR_CONFIG_VALUE, "auto | strict | bf16 | fp16 | amx"},
    {B "output: ~\n", QS_ERR_CONFIG_VALUE, "is no path"},
    {B "output:\n", QS_ERR_CONFIG_VALUE, "is no path"},
    {B "output: [a]\n", QS_ERR_CONFIG_VALUE, "is a list"},
    {B "output: \"a\\nb\"\n", QS_ERR_CONFIG_VALUE, "control character"},
    {B "output: \"a\\0b\"\n", QS_ERR_CONFIG_VALUE, "NUL"},
    {B "output: b.h5\n", QS_ERR_CONFIG_PAIR, "output and base are both"},
    {B "train: {steps: 0}\n", QS_ERR_CONFIG_PAIR, "both 0"},
    {B "train: {steps: 1, epochs: 1}\n", QS_ERR_CONFIG_PAIR, "contradict"},
    {B "train: {global_batch: 1}\n", QS_ERR_CONFIG_PAIR, "micro_batch=2 is above"},
    {B "train: {eval_every: 5}\n", QS_ERR_CONFIG_PAIR, "needs data.eval"},
    {B "train: {eval_every: epoch}\n", QS_ERR_CONFIG_PAIR,
     "train.eval_every=epoch needs data.eval"},
    {B "train: {eval_first: true}\n", QS_ERR_CONFIG_PAIR, "needs data.eval"},
    {B "train: {save_every: epoch, keep_every: 5}\n", QS_ERR_CONFIG_PAIR, "train.keep_last"},
    {B "train: {save_every: step}\n", QS_ERR_CONFIG_VALUE, "epoch"},
    {B "train: {keep_every: 5}\n", QS_ERR_CONFIG_PAIR, "no multiple"},
    {B "train: {keep_every: 5, save_every: 2}\n", QS_ERR_CONFIG_PAIR, "no multiple"},
    {"base: &x b.h5\n", QS_ERR_CONFIG_VALUE, "anchor"},
    {B "output: *x\n", QS_ERR_CONFIG_VALUE, "anchor"},
    {B "seed: !!int 3\n", QS_ERR_CONFIG_VALUE, "a tag"},
    {B "train: &t {steps: 3}\n", QS_ERR_CONFIG_VALUE, "anchor"},
    {B "lora: {targets: !x [q_proj]}\n", QS_ERR_CONFIG_VALUE, "a tag"},
    {B "---\n" B, QS_ERR_CONFIG_VALUE, "one document"},
    {B "seed: [1\n", QS_ERR_CONFIG_VALUE, "not valid YAML"},
    {B "\tseed: 1\n", QS_ERR_CONFIG_VALUE, "not valid YAML"},
    {B "train:\n\tsteps: 1\n", QS_ERR_CONFIG_VALUE, "with spaces, not with tabs"},
    {B "seed: \"\xff\"\n", QS_ERR_CONFIG_VALUE, "not valid YAML"},
    {B "<<: {seed: 1}\n", QS_ERR_CONFIG_KEY, "unknown key"},
};

/* The parameter is the number of the row: each test is a process of its own, with other addresses.
 */
ParameterizedTestParameters(config, bad_file_is_refused_by_name_and_line)
{
    static int rows[sizeof BAD / sizeof *BAD];
    for (size_t i = 0; i < sizeof BAD / sizeof *BAD; i++) {
        rows[i] = (int)i;
    }
    return cr_make_param_array(int, rows, sizeof BAD / sizeof *BAD);
}

ParameterizedTest(int *row, config, bad_file_is_refused_by_name_and_line)
{
    const bad_file *bad = &BAD[*row];
    qs_config c;
    cr_assert_eq(parse(&c, bad->text), bad->status, "%s -> %s", bad->text, qs_error_text());
    cr_assert_not_null(strstr(qs_error_text(), bad->says), "%s -> %s", bad->text, qs_error_text());
    cr_assert_null(strchr(qs_error_text(), '\n'));
}

Test(config, bad_set_is_refused_by_name)
{
    static const bad_file sets[] = {
        {"train.steps", QS_ERR_USAGE, "key=value"},
        {"=5", QS_ERR_USAGE, "key=value"},
        {"train.stesp=5", QS_ERR_CONFIG_KEY, "did you mean \"train.steps\"?"},
        {"train=5", QS_ERR_CONFIG_KEY, "unknown key"},
        {"train.steps=", QS_ERR_CONFIG_VALUE, "train.steps"},
        {"train.steps=five", QS_ERR_CONFIG_VALUE, "train.steps"},
        {"train.steps=[5]", QS_ERR_CONFIG_VALUE, "is a list"},
        {"optim.betas=[0.9, 0.99", QS_ERR_CONFIG_VALUE, "no closing ]"},
        {"optim.betas=[0.9,,0.99]", QS_ERR_CONFIG_VALUE, "has not two"},
        {"optim.betas=[,]", QS_ERR_CONFIG_VALUE, "is not a number"},
        {"output=\x01", QS_ERR_CONFIG_VALUE, "control character"},
        {"output=\xff\xfe", QS_ERR_CONFIG_VALUE, "not UTF-8"},
        {"output=\xe2\x80\xa8", QS_ERR_CONFIG_VALUE, "control character"},
        {"train.micro_batch=99", QS_ERR_CONFIG_PAIR, "micro_batch=99"},
    };
    for (size_t i = 0; i < sizeof sets / sizeof *sets; i++) {
        qs_config c;
        cr_assert_eq(parse_set(&c, "base: b\n", sets[i].text), sets[i].status, "%s -> %s",
                     sets[i].text, qs_error_text());
        cr_assert_not_null(strstr(qs_error_text(), sets[i].says), "%s -> %s", sets[i].text,
                           qs_error_text());
    }
}

Test(config, limits_of_size_and_depth_hold)
{
    qs_config c;
    size_t big = (1 << 20) + 1;
    char *text = malloc(big + 1);
    memset(text, '#', big);
    text[big] = '\0';
    cr_assert_eq(parse(&c, text), QS_ERR_CONFIG_VALUE);
    cr_assert_not_null(strstr(qs_error_text(), "too many"));
    memset(text, '[', big - 2); /* nesting is refused at the first level, not followed */
    text[big - 2] = '\0';
    cr_assert_eq(parse(&c, text), QS_ERR_CONFIG_VALUE);
    memcpy(text, "base: ", 6);
    memset(text + 6, 'a', QS_PATH_MAX);
    text[6 + QS_PATH_MAX] = '\0';
    cr_assert_eq(parse(&c, text), QS_ERR_CONFIG_VALUE);
    cr_assert_not_null(strstr(qs_error_text(), "longer than 1023 bytes"));
    text[6 + QS_PATH_MAX - 1] = '\0';
    cr_assert_eq(parse(&c, text), QS_OK, "%s", qs_error_text());
    cr_assert_eq(strlen(c.base), QS_PATH_MAX - 1);
    free(text);
}

Test(config, commands_ask_for_what_they_need)
{
    qs_config c;
    cr_assert_eq(parse(&c, "base: b\n"), QS_OK);
    cr_assert_eq(qs_config_require(&c, QS_NEED_SAMPLE, "run.yaml"), QS_OK);
    cr_assert_eq(qs_config_require(&c, QS_NEED_EVAL, "run.yaml"), QS_ERR_CONFIG_VALUE);
    cr_assert_not_null(strstr(qs_error_text(), "data.eval is missing"));
    cr_assert_eq(parse(&c, "base: b\ndata: {train: t}\n"), QS_OK);
    qs_error_clear();
    cr_assert_eq(qs_config_require(&c, QS_NEED_TRAIN, "run.yaml"), QS_ERR_CONFIG_VALUE);
    cr_assert_not_null(strstr(qs_error_text(), "output is missing"));
    /* Whether there is a GPU is found out where it is opened, not here. */
    cr_assert_eq(parse(&c, "base: b\ndevice: cuda\n"), QS_OK);
    cr_assert_eq(qs_config_require(&c, QS_NEED_SAMPLE, "run.yaml"), QS_OK);
}

Test(config, missing_file_is_named)
{
    qs_config c;
    cr_assert_eq(qs_config_load(&c, "/nonexistent/run.yaml", NULL, 0), QS_ERR_INPUT_MISSING);
    cr_assert_not_null(strstr(qs_error_text(), "/nonexistent/run.yaml"));
    qs_error_clear();
    cr_assert_eq(qs_config_load(&c, "/tmp", NULL, 0), QS_ERR_INPUT_FORMAT);
}

Test(config, true_and_false_have_the_spellings_of_yaml_1_2)
{
    static const char *const yes[] = {"true", "True", "TRUE"};
    static const char *const no[] = {"false", "False", "FALSE"};
    static const char *const neither[] = {"yes", "no",   "on", "off", "Yes", "NO",
                                          "y",   "tRUE", "1",  "0",   "",    "\"True\""};
    for (size_t i = 0; i < 3 + 3 + sizeof neither / sizeof *neither; i++) {
        const char *word = i < 3 ? yes[i] : i < 6 ? no[i - 3] : neither[i - 6];
        char text[64], set[32];
        const char *sets[] = {set};
        qs_config c, d;
        snprintf(text, sizeof text, B "lora: {dora: %s}\n", word);
        snprintf(set, sizeof set, "lora.dora=%s", word);
        qs_error_clear();
        const qs_status st = parse(&c, text);
        qs_error_clear();
        cr_assert_eq(st, i < 6 ? QS_OK : QS_ERR_CONFIG_VALUE, "%s", text);
        cr_assert_eq(qs_config_parse(&d, B, strlen(B), "run.yaml", sets, 1), st, "%s", set);
        cr_assert(i >= 6 || (c.lora.dora == (i < 3) && d.lora.dora == (i < 3)), "%s", word);
    }
}
