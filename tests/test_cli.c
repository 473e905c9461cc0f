/* The program as users meet it: whatever is wrong with what they typed, exactly one line says so,
 * and the exit code has its class. */
#define _GNU_SOURCE
#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <libgen.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/log.h"
#include "ckpt/ckpt.h"
#include "ckpt/run_dir.h"
#include "lora/lora.h"
#include "store/io.h"
#include "store/manifest.h"
#include "tests/program.h"
#include "tests/scratch.h"

static char folder[SCRATCH_MAX], binaries[PROGRAM_FOLDER_MAX], output[PROGRAM_OUTPUT_MAX];

static void make_folder(void)
{
    qs_log_init(0, 1, QS_LOG_QUIET, false);
    program_find(binaries);
    cr_assert_eq(program_run(output, binaries, "", "--version"), 0, "%s: %s", binaries, output);
    scratch_make(folder, NULL);
    cr_assert_eq(chdir(folder), 0);
}

static void remove_folder(void)
{
    cr_assert_eq(chdir("/"), 0);
    scratch_remove(folder);
}

TestSuite(cli, .init = make_folder, .fini = remove_folder, .timeout = 120);

static int run(const char *arguments)
{
    return program_run(output, binaries, "", arguments);
}

static void put(const char *name, const char *text)
{
    cr_assert_eq(qs_io_write_file(name, text, strlen(text)), QS_OK, "%s", qs_error_text());
}

/* ---- bad command lines ---- */

typedef struct {
    const char *arguments;
    int code;
    const char *says;
} bad_call;

static const bad_call CALLS[] = {
    {"", 2, "no command is given"},
    {"''", 2, "no command is given"},
    {"trian run.yaml", 2, "did you mean \"train\"?"},
    {"quantise x", 2, "did you mean \"quantize\"?"},
    {"Train run.yaml", 2, "did you mean \"train\"?"},
    {"generate run.yaml", 2, "unknown command \"generate\"; see qshard --help"},
    {"train --config good.yaml", 2, "unknown option --config; --help lists"},
    {"help trian", 2, "did you mean \"train\"?"},
    {"train good.yaml --lr 1e-4", 2,
     "unknown option --lr; settings go through --set optim.lr=1e-4\n"},
    {"train good.yaml --lr=1e-4", 2, "through --set optim.lr=1e-4\n"},
    {"train good.yaml --learning-rate 1e-4 --quiet", 2, "through --set optim.lr=1e-4\n"},
    {"--quiet", 2, "unknown option --quiet"},
    {"train good.yaml --optim.lr=1e-4", 2, "through --set optim.lr=1e-4\n"},
    {"train good.yaml --seed", 2, "through --set seed=VALUE\n"},
    {"train good.yaml --use_rslora --quiet", 2, "through --set lora.rslora=true\n"},
    {"train good.yaml --bf16", 2, "unknown option --bf16; the device chooses"},
    {"quantize model --lr 1e-4", 2, "unknown option --lr; --help lists"},
    {"train good.yaml optim.lr=1e-4", 2,
     "\"optim.lr=1e-4\": settings go through --set optim.lr=1e-4\n"},
    {"train good.yaml lr=1e-4 seed=1 output=x train.steps=2", 2, "--set optim.lr=1e-4\n"},
    {"train good.yaml other=1", 2, "\"other=1\" is one argument too many"},
    {"train lr=1.yaml", 3, "lr=1.yaml: No such file"},
    {"--verison", 2, "--version"},
    {"-v", 2, "unknown option -v"},
    {"merge run", 2, "merge needs -o HF_DIR"},
    {"merge nowhere -o x", 3, "nowhere: No such file"},
    {"merge empty -o x", 3, "empty: neither a checkpoint (manifest.json), nor a run"},
    {"merge run --original", 2, "--original needs a value"},
    {"train", 2, "an argument is missing; usage: qshard train"},
    {"train a.yaml b.yaml", 2, "\"b.yaml\" is one argument too many"},
    {"train a.yaml b.yaml c.yaml", 2, "one argument too many"},
    {"train good.yaml --dryrun", 2, "did you mean --dry-run?"},
    {"train good.yaml --dry-run=yes", 2, "--dry-run takes no value"},
    {"train good.yaml --set", 2, "--set needs a value"},
    {"train good.yaml --set=", 2, "is empty"},
    {"train good.yaml --resume", 2, "--resume needs a value"},
    {"quantize model -o base.h5 --device gpu", 2, "--device: \"gpu\" is not known; allowed: auto"},
    {"train good.yaml --device cuda", 2, "unknown option --device"},
    {"train good.yaml --resume maybe", 2, "auto | must | never"},
    {"train good.yaml --prompts x", 2, "unknown option --prompts"},
    {"train good.yaml -o x", 2, "unknown option -o"},
    {"train good.yaml --d", 2, "unknown option --d;"}, /* begins three options */
    {"eval good.yaml --resume must", 2, "unknown option --resume"},
    {"sample good.yaml", 2, "--prompts FILE and --tokens N"},
    {"sample good.yaml --prompts p.h5", 2, "--prompts FILE and --tokens N"},
    {"sample good.yaml --prompts p.h5 --tokens 0", 2, "whole number in 1 .. "},
    {"sample good.yaml --prompts p.h5 --tokens 5x", 2, "whole number in 1 .. "},
    {"sample good.yaml --prompts p.h5 --tokens 99999999999999999999", 2, "whole number"},
    {"quantize model", 2, "quantize needs -o"},
    {"quantize model -o", 2, "option -o needs a value"},
    {"quantize model -o x.h5 --threads -3", 2, "whole number in 1 .. "},
    {"quantize model -o x.h5 --head-chunk-rows 1.5", 2, "whole number in 1 .. "},
    {"quantize ORG/MODEL -o x.h5", 3,
     "ORG/MODEL: No such file or directory; nothing is downloaded"},
    {"quantize text.txt -o x.h5", 3, "text.txt: is a file; name the folder"},
    {"quantize empty -o x.h5", 3, "empty: holds no config.json; name the folder"},
    {"export run", 2, "export needs -o DIR"},
    {"export nowhere -o x", 3, "nowhere: No such file"},
    {"export empty -o x", 3, "empty: neither a checkpoint (manifest.json), nor a run"},
    {"export text.txt -o x", 3, "text.txt"},
    {"plan", 2, "an argument is missing; usage: qshard plan"},
    {"plan good.yaml --gpu V100", 2, "known are RTX3090"},
    {"plan good.yaml --gpus 0", 2, "whole number in 1 .. "},
    {"plan good.yaml --link 0", 2, "is no rate"},
    {"plan good.yaml --link 1 --link 2 --link 3", 2, "more than 2 times"},
    {"plan good.yaml", 3, "base: base.h5: not in /"},
    {"plan nowhere.yaml", 3, "nowhere.yaml"},
    {"plan good.yaml --set base=empty", 3, "empty: holds no config.json"},
    {"check nowhere", 3, "nowhere: No such file"},
    {"check empty", 3, "not a checkpoint"},
    {"check text.txt", 3, "text.txt"},
    {"check zero.h5", 3, "zero.h5"},
    {"check /dev/null", 3, "neither a file nor a directory"},
    {"check bad.yaml", 2, "bad.yaml:2"},
    {"inspect nowhere", 3, "nowhere: No such file"},
    {"inspect text.txt", 3, "text.txt"},
    {"inspect bad.yaml", 2, "bad.yaml:2"},
    {"doctor now", 2, "one argument too many"},
    {"doctor --fix", 2, "unknown option --fix"},
    {"train nowhere.yaml", 3, "nowhere.yaml"},
    {"train empty", 3, "empty: is a folder; name a YAML file"},
    {"train nul.yaml", 2, "NUL"},
    {"train good.yaml --set train.stps=1", 2, "did you mean \"train.steps\"?"},
    {"train good.yaml --set train.steps", 2, "expected key=value"},
    {"train good.yaml --set train.steps=-1", 2, "allowed: 0 .. "},
    {"train good.yaml --set data.train=", 2, "data.train is missing"},
    {"train good.yaml --set output=", 2, "output is missing"},
    {"eval good.yaml --set data.eval=", 2, "data.eval is missing"},
    {"train good.yaml --set train.micro_batch=99", 2, "micro_batch=99 is above"},
    {"train good.yaml", 3, "error[E300] base: base.h5: not in /"},
    {"train good.yaml", 3,
     "(paths start where qshard was started; ~ and $VARIABLES are not expanded); "
     "qshard quantize makes it"},
    {"train good.yaml --set base=/no/base.h5", 3,
     "error[E300] base: /no/base.h5: is not there; qshard quantize makes it"},
    {"train good.yaml --set base=text.txt/base.h5", 3, "base: text.txt/base.h5: not in /"},
    {"train good.yaml --set base='~/base.h5'", 3, "base: ~/base.h5: not in /"},
    {"eval good.yaml", 3, "base: base.h5: not in /"},
    {"bench step good.yaml", 3, "base: base.h5: not in /"},
};
enum { CALL_COUNT = sizeof CALLS / sizeof *CALLS };

ParameterizedTestParameters(cli, bad_call_gives_one_line_and_its_code)
{
    static int rows[CALL_COUNT];
    for (int i = 0; i < CALL_COUNT; i++) {
        rows[i] = i;
    }
    return cr_make_param_array(int, rows, CALL_COUNT);
}

ParameterizedTest(int *row, cli, bad_call_gives_one_line_and_its_code)
{
    const bad_call *call = &CALLS[*row];
    put("good.yaml", "base: base.h5\ndata: {train: train.h5, eval: eval.h5}\noutput: run\n");
    put("bad.yaml", "base: base.h5\nseed: ten\n");
    put("text.txt", "hello\n");
    cr_assert_eq(mkdir("empty", 0777), 0);
    cr_assert_eq(qs_io_write_file("nul.yaml", "base: a\n\0\n", 10), QS_OK);
    cr_assert_eq(qs_io_write_file("zero.h5", "", 0), QS_OK);
    int code = run(call->arguments);
    cr_assert_eq(code, call->code, "%s: exit %d\n%s", call->arguments, code, output);
    cr_assert_eq(program_error_lines(output), 1, "%s:\n%s", call->arguments, output);
    cr_assert_not_null(strstr(output, call->says), "%s:\n%s", call->arguments, output);
    cr_assert_not_null(strchr(output, '\n'));
    cr_assert_neq(access("run", F_OK), 0, "nothing is made");
    cr_assert_neq(access("x", F_OK), 0, "nothing is made");
    cr_assert_neq(access("x.h5", F_OK), 0, "nothing is made");
}

/* ---- bad configurations, through the program ---- */

static const bad_call FILES[] = {
    {"", 2, "empty"},
    {"train: {steps: 1}", 2, "base is missing"},
    {"base: b\nbase: c", 2, "given twice"},
    {"base: b\nlearning_rate: 1", 2, "unknown key"},
    {"base: b\nlora: {r: 4}", 2, "lora.r"},
    {"base: b\nlora: {target_modules: all-linear}", 2, "unknown key"},
    {"base: b\ntrain: {steps: 1e3}", 2, "is not an integer"},
    {"base: b\ntrain: {steps: no}", 2, "is not an integer"},
    {"base: b\noptim: {lr: '1e-4'}", 2, "without quotes"},
    {"base: b\noptim: {lr: 2}", 2, "at most 1"},
    {"base: b\noptim: {betas: [0.9]}", 2, "two numbers"},
    {"base: b\nlora: {targets: [lm_head]}", 2, "not a linear"},
    {"base: b\nlora: {rslora: on}", 2, "true nor false"},
    {"base: b\ntrain: [1]", 2, "is a section"},
    {"base: &x b", 2, "anchor"},
    {"base: !!str b", 2, "a tag"},
    {"base: b\n---\nbase: c", 2, "one document"},
    {"base: [", 2, "not valid YAML"},
    {"{", 2, "not valid YAML"},
    {"base: b\nmemory: {offload: [lora]}", 2, "not a known name"},
    {"base: b\nshard: {prefetch: 99}", 2, "1 .. 16"},
    {"base: b\ntrain: {steps: 0}", 2, "both 0"},
    {"base: b\ntrain: {steps: 5, epochs: 5}", 2, "contradict"},
    {"base: b\noptim: {warmup: 500}", 2, "leaves nothing"},
    {"base: b\ntrain: {eval_every: 2}", 2, "needs data.eval"},
};
enum { FILE_COUNT = sizeof FILES / sizeof *FILES };

Test(cli, bad_configuration_gives_one_line_and_code_2)
{
    for (int i = 0; i < FILE_COUNT; i++) {
        put("run.yaml", FILES[i].arguments);
        cr_assert_eq(run("train run.yaml --dry-run"), FILES[i].code, "%s:\n%s", FILES[i].arguments,
                     output);
        cr_assert_eq(program_error_lines(output), 1, "%s:\n%s", FILES[i].arguments, output);
        cr_assert_not_null(strstr(output, FILES[i].says), "%s:\n%s", FILES[i].arguments, output);
        cr_assert(strncmp(output, "error[E2", 8) == 0, "%s", output);
    }
}

/* ---- what works ---- */

Test(cli, help_and_version_go_to_standard_output)
{
    static const char *const commands[] = {"quantize", "train",   "eval",  "sample", "export",
                                           "merge",    "inspect", "check", "doctor"};
    cr_assert_eq(run("--help 2>/dev/null"), 0);
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++) {
        cr_assert_not_null(strstr(output, commands[i]), "%s", output);
    }
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++) {
        char arguments[64];
        snprintf(arguments, sizeof arguments, "%s --help", commands[i]);
        cr_assert_eq(run(arguments), 0, "%s", output);
        cr_assert_not_null(strstr(output, "--help"), "%s", output);
        cr_assert_eq(program_error_lines(output), 0);
    }
    cr_assert_eq(run("train --help"), 0);
    cr_assert_not_null(strstr(output, "train.gather_group"), "the keys: %s", output);
    char *whole = strdup(output);
    static const char *const same[] = {"train -h", "train run.yaml -h", "help train"};
    for (size_t i = 0; i < 3; i++) {
        cr_assert_eq(run(same[i]), 0, "%s", output);
        cr_assert_str_eq(output, whole);
    }
    free(whole);
    cr_assert_eq(run("-h"), 0);
    cr_assert_not_null(strstr(output, "qshard-prep"), "%s", output);
    cr_assert_eq(run("--version"), 0);
    cr_assert(strncmp(output, "qshard ", 7) == 0 && strstr(output, "MPI") &&
                  strstr(output, "HDF5") && strstr(output, "kernels"),
              "%s", output);
    cr_assert_eq(program_run(output, binaries, "QSHARD_PLUGIN=/nowhere.so", "--version"), 0);
    cr_assert_not_null(strstr(output, "  GPU       no plugin\n"), "%s", output);
}

Test(cli, resolved_configuration_is_shown_and_checked)
{
    put("run.yaml", "base: b.h5\ntrain: {epochs: 3}\n");
    cr_assert_eq(run("check run.yaml"), 0, "%s", output);
    cr_assert_eq(run("inspect run.yaml > resolved.yaml"), 0, "%s", output);
    cr_assert_eq(run("check resolved.yaml"), 0, "%s", output);
    cr_assert_eq(run("inspect resolved.yaml"), 0);
    cr_assert_not_null(strstr(output, "epochs: 3"), "%s", output);
    cr_assert_not_null(strstr(output, "steps: 0"), "%s", output);
}

Test(cli, output_that_cannot_be_written_is_an_error)
{
    cr_assert_eq(run("--version > /dev/full"), 4, "%s", output);
    cr_assert_eq(program_error_lines(output), 1, "%s", output);
}

Test(cli, doctor_finds_a_good_environment_and_a_bad_one)
{
    cr_assert_eq(run("doctor"), 0, "%s", output);
    cr_assert_not_null(strstr(output, "OK    writing"), "%s", output);
    cr_assert_null(strstr(output, "FAIL"), "%s", output);
    cr_assert_eq(program_run(output, binaries, "cd /proc &&", "doctor"), 8, "%s", output);
    cr_assert_not_null(strstr(output, "FAIL  writing"), "%s", output);
    cr_assert_eq(program_error_lines(output), 1, "%s", output);
}

/* ---- checkpoints through export, check and inspect ---- */

static const char RUN_YAML[] =
    "base: gone.h5\ndata: {train: t.h5}\noutput: run\n"
    "lora: {rank: 4, alpha: 8, rslora: true, targets: [q_proj, up_proj]}\n";

/* A run directory with the checkpoints of steps 1 ... `steps`, saved by one rank. */
static void make_long_run(qs_lora_layout *layout, int steps)
{
    qs_hf_config m = {.n_layers = 2, .n_heads = 4, .n_kv_heads = 2, .head_dim = 8};
    m.hidden = 32;
    m.ffn_hidden = 48;
    qs_config cfg;
    qs_comm *comm = NULL;
    qs_optim *o = NULL;
    qs_run_dir run_dir;
    cr_assert_eq(qs_config_parse(&cfg, RUN_YAML, strlen(RUN_YAML), "r", NULL, 0), QS_OK);
    cr_assert_eq(qs_lora_layout_make(layout, &m, &cfg), QS_OK);
    cr_assert_eq(qs_comm_self_create(&comm), QS_OK);
    cr_assert_eq(qs_run_dir_open(&run_dir, &cfg, QS_RESUME_AUTO, false, comm), QS_OK);
    cr_assert_eq(qs_optim_create(&o, qs_device_cpu(), layout, 0, 1), QS_OK);
    char *yaml = qs_config_dump(&cfg);
    for (int step = 1; step <= steps; step++) {
        for (int layer = 0; layer < layout->n_layers; layer++) {
            for (int64_t e = 0; e < layout->used; e++) {
                o->master[layer * layout->per_layer + e] = (float)(step * 100 + layer) + 0.25f;
            }
        }
        qs_ckpt_meta meta = {.step = step, .config_yaml = yaml, .base_sha256 = "a"};
        snprintf(meta.run_id, sizeof meta.run_id, "%s", run_dir.run_id);
        cr_assert_eq(qs_ckpt_save("run", &meta, layout, o, comm), QS_OK, "%s", qs_error_text());
    }
    qs_run_dir_close(&run_dir);
    free(yaml);
    qs_optim_destroy(o);
    qs_comm_destroy(comm);
}

static void make_run(qs_lora_layout *layout)
{
    make_long_run(layout, 2);
}

static void expect_adapter(const char *dir, const qs_lora_layout *layout, float a, float b)
{
    qs_peft *peft = NULL;
    float *segment = malloc((size_t)layout->per_layer * sizeof *segment);
    qs_error_clear();
    cr_assert_eq(qs_peft_open(&peft, dir, layout), QS_OK, "%s", qs_error_text());
    cr_assert_eq(qs_peft_read_layer(peft, 0, segment), QS_OK);
    cr_assert_eq(segment[layout->a_at[QS_Q]], a);
    cr_assert_eq(segment[layout->b_at[QS_UP]], b);
    qs_peft_close(peft);
    free(segment);
}

Test(cli, export_writes_the_newest_or_the_named_checkpoint)
{
    qs_lora_layout layout;
    make_run(&layout);
    cr_assert_eq(run("export run -o newest --base-name org/model"), 0, "%s", output);
    cr_assert_not_null(strstr(output, "llama.cpp  no: it ignores rslora"), "%s", output);
    cr_assert_not_null(strstr(output, "--max-lora-rank 8"), "%s", output);
    expect_adapter("newest", &layout, 200.25f, 200.25f);
    cr_assert_eq(run("export run/step-00000001/ -o first --fold-scaling --base-name m"), 0, "%s",
                 output);
    cr_assert_not_null(strstr(output, "llama.cpp  yes"), "%s", output);
    layout.scale = 2.0f; /* 8 / 4; sqrt(4) moved into B */
    expect_adapter("first", &layout, 100.25f, 200.5f);
    cr_assert_eq(run("check newest"), 0, "%s", output);
    cr_assert_eq(run("inspect first"), 0, "%s", output);
    cr_assert_not_null(strstr(output, "rank        4"), "%s", output);
    cr_assert_eq(run("export run -o newest"), 2, "%s", output);
    cr_assert_not_null(strstr(output, "newest: exists already"), "%s", output);
    cr_assert_null(strstr(output, "warning"), "nothing was written, so nothing records a path: %s",
                   output);
}

Test(cli, inspect_names_all_checkpoints_of_a_long_run)
{
    enum { STEPS = 70 };
    qs_lora_layout layout;
    make_long_run(&layout, STEPS);
    cr_assert_eq(run("inspect run"), 0, "%s", output);
    for (int step = 1; step <= STEPS; step++) {
        char line[64];
        snprintf(line, sizeof line, "  checkpoint  step %d\n", step);
        cr_assert_not_null(strstr(output, line), "%d: %s", step, output);
    }
}

/* The newest one has a good manifest, so that it is taken for the newest that there is. */
Test(cli, a_damaged_checkpoint_leads_to_the_newest_good_one)
{
    static const char *const commands[] = {"export run -o x", "merge run -o x",
                                           "export run/step-00000002 -o x"};
    qs_lora_layout layout;
    make_run(&layout);
    cr_assert_eq(truncate("run/step-00000002/rank-00000.h5", 3000), 0);
    for (size_t i = 0; i < 3; i++) {
        cr_assert_eq(run(commands[i]), 3, "%s", output);
        cr_assert_eq(program_error_lines(output), 1, "%s", output);
        cr_assert_not_null(strstr(output, "] run/step-00000002/"), "%s", output);
        cr_assert_eq(strstr(output, "; run/step-00000001 verifies: name that one\n") != NULL, i < 2,
                     "%s", output);
    }
    cr_assert_eq(truncate("run/step-00000001/rank-00000.h5", 3000), 0);
    cr_assert_eq(run("export run -o x"), 3, "%s", output);
    cr_assert_null(strstr(output, "verifies"), "%s", output);
}

Test(cli, a_run_in_place_of_a_configuration_leads_to_its_own)
{
    qs_lora_layout layout;
    make_run(&layout);
    cr_assert_eq(run("eval run"), 3, "%s", output);
    cr_assert_not_null(
        strstr(output, "run: is a folder; the configuration in it is run/config.yaml\n"), "%s",
        output);
}

/* As it is asked for, and not where it is written at first. */
Test(cli, errors_of_an_export_name_the_output)
{
    char prefix[2048], library[1024];
    const char *asan = getenv("ASAN_OPTIONS");
    qs_lora_layout layout;
    make_run(&layout);
    snprintf(library, sizeof library, "%s/tests/libiofault.so",
             getenv("QSHARD_BINARY_DIR") ? getenv("QSHARD_BINARY_DIR") : ".");
    if (access(library, R_OK) != 0) {
        cr_skip_test("no %s", library);
    }
    snprintf(prefix, sizeof prefix,
             "FAULT=io:3:EIO FAULT_PATH=/new ASAN_OPTIONS=%s:verify_asan_link_order=0 "
             "LD_PRELOAD=%s",
             asan ? asan : "", library);
    cr_assert_eq(program_run(output, binaries, prefix, "export run -o new --base-name org/model"),
                 4, "%s", output);
    cr_assert_not_null(strstr(output, "error[E400] new/adapter_model.safetensors: "), "%s", output);
    cr_assert_null(strstr(strstr(output, "error["), "tmp-"), "%s", output);
}

Test(cli, a_signal_leaves_nothing_of_an_export)
{
    char prefix[2048], library[1024];
    const char *asan = getenv("ASAN_OPTIONS");
    qs_lora_layout layout;
    make_run(&layout);
    snprintf(library, sizeof library, "%s/tests/libiofault.so",
             getenv("QSHARD_BINARY_DIR") ? getenv("QSHARD_BINARY_DIR") : ".");
    if (access(library, R_OK) != 0) {
        cr_skip_test("no %s", library);
    }
    for (int n = 2; n <= 10; n++) { /* from the first file in the directory on */
        snprintf(prefix, sizeof prefix,
                 "FAULT=io:%d:termbefore FAULT_PATH=/new ASAN_OPTIONS=%s:verify_asan_link_order=0 "
                 "LD_PRELOAD=%s",
                 n, asan ? asan : "", library);
        cr_assert_eq(
            program_run(output, binaries, prefix, "export run -o new --base-name org/model"),
            128 + SIGTERM, "%d: %s", n, output);
        cr_assert_eq(system("test -z \"$(ls -d new* 2> /dev/null)\""), 0, "call %d", n);
    }
}

Test(cli, check_tells_good_from_bad_checkpoints)
{
    qs_lora_layout layout;
    make_run(&layout);
    cr_assert_eq(run("check run"), 0, "%s", output);
    cr_assert_eq(run("check run/step-00000001"), 0, "%s", output);
    cr_assert_eq(run("inspect run"), 0, "%s", output);
    cr_assert_not_null(strstr(output, "step 2"), "%s", output);
    cr_assert_eq(run("inspect run/step-00000002"), 0, "%s", output);
    cr_assert_not_null(strstr(output, "q_proj up_proj"), "%s", output);
    cr_assert_eq(run("inspect run/step-00000002/rank-00000.h5"), 0, "%s", output);
    cr_assert_eq(run("check run/step-00000002/rank-00000.h5"), 2, "%s", output);
    cr_assert_eq(truncate("run/step-00000001/rank-00000.h5", 3000), 0);
    cr_assert_eq(run("check run"), 3, "%s", output);
    cr_assert_eq(program_error_lines(output), 1, "%s", output);
    cr_assert_not_null(strstr(output, "(1 of 2 checkpoints are bad)"), "%s", output);
    cr_assert_eq(run("export run/step-00000001 -o x"), 3, "%s", output);
    cr_assert_neq(access("x", F_OK), 0);
    cr_assert_eq(run("export run -o x --base-name m"), 0, "the newest one is good: %s", output);
}

/* ---- several ranks ---- */

Test(cli, many_ranks_print_one_error_line_and_one_help)
{
    if (system("command -v mpirun > /dev/null") != 0) {
        cr_skip_test("no mpirun");
    }
    cr_assert_eq(program_run(output, binaries, "timeout -k 2 50 mpirun -np 3", "trian"), 2, "%s",
                 output);
    cr_assert_eq(program_error_lines(output), 1, "%s", output);
    put("run.yaml", "base: b\nseed: x\n");
    cr_assert_eq(program_run(output, binaries, "timeout -k 2 50 mpirun -np 3", "train run.yaml"), 2,
                 "%s", output);
    cr_assert_eq(program_error_lines(output), 1, "%s", output);
    cr_assert_eq(program_run(output, binaries, "timeout -k 2 50 mpirun -np 3", "check nowhere"), 3,
                 "%s", output);
    cr_assert_eq(program_error_lines(output), 1, "%s", output);
    cr_assert_eq(program_run(output, binaries, "timeout -k 2 50 mpirun -np 3", "--version"), 0,
                 "%s", output);
    const char *first = strstr(output, "qshard ");
    cr_assert_not_null(first);
    cr_assert_null(strstr(first + 1, "\nqshard "), "%s", output);
}
