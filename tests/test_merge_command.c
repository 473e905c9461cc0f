/* qshard merge as a command: what does not belong together is refused in one line, and whatever
 * fails, a disk, a signal, a host, leaves nothing half done. */
#define _GNU_SOURCE
#include <criterion/criterion.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "ckpt/ckpt.h"
#include "ckpt/run_dir.h"
#include "hf/safetensors.h"
#include "merge_fixture.h"

TestSuite(merge_command, .init = mf_make_folder, .fini = mf_remove_folder, .timeout = 300);

static char output[PROGRAM_OUTPUT_MAX];

static int run_merge(const char *prefix, const char *options)
{
    char arguments[3072];
    snprintf(arguments, sizeof arguments, "merge %s", options);
    return program_run(output, mf_binaries, prefix, arguments);
}

static const struct {
    const char *arguments;
    int code;
    const char *says;
} REFUSALS[] = {
    {"adapter --base base.h5", 2, "merge needs -o HF_DIR"},
    {"adapter -o out", 2, "give it with --base"},
    {"adapter --base base.h5 -o out --dtype fp8", 2, "bf16 | f16 | f32"},
    {"adapter --base base.h5 -o out --dtype float32", 2, "bf16 | f16 | f32"},
    {"adapter --base base.h5 -o out --shard-size 5X", 2, "is no size"},
    {"adapter --base base.h5 -o out --shard-size 5GB", 2, "is no size"},
    {"adapter --base base.h5 -o out --shard-size 1.5G", 2, "is no size"},
    {"adapter --base base.h5 -o out --shard-size 0", 2, "is no size"},
    {"adapter --base base.h5 -o out --shard-size -5G", 2, "is no size"},
    {"adapter --base base.h5 -o out --shard-size 9999999T", 2, "is no size"},
    {"adapter --base base.h5 -o out --shard-size 9223372036854775808", 2, "is no size"},
    {"adapter --base base.h5 -o out --threads 0", 2, "whole number"},
    {"adapter --base base.h5 -o taken", 2, "error[E204] taken: exists already"},
    {"adapter --base base.h5 -o taken/", 2, "error[E204] taken: exists already"},
    {"adapter --base base.h5 -o base.h5", 2, "error[E204] base.h5: exists already"},
    {"nowhere --base base.h5 -o out", 3, "nowhere: No such file"},
    {"model --base base.h5 -o out", 3, "neither a checkpoint"},
    {"base.h5 --base base.h5 -o out", 3, "neither a checkpoint"},
    {"taken --base base.h5 -o out", 3, "neither a checkpoint"},
    {"empty_adapter --base base.h5 -o out", 3, "peft_type"},
    {"no_tensors --base base.h5 -o out", 3, "holds neither adapter_model.safetensors"},
    {"deep --base base.h5 -o out", 3, "it belongs to another model"},
    {"broad --base base.h5 -o out", 3, "expected [4, 72]"},
    {"adapter --base nowhere.h5 -o out", 3, "nowhere.h5"},
    {"adapter --base adapter -o out", 3, "error[E3"},
    {"adapter --base cut.h5 -o out", 3, "cut.h5"},
    {"adapter --base base.h5 -o out --original nowhere", 3, "nowhere: No such file"},
    {"adapter --base base.h5 -o out --original taken", 3,
     "taken: holds no config.json; name the folder"},
    {"adapter --base base.h5 -o out --original tied", 3, "tie_word_embeddings is 1"},
    {"adapter --base base.h5 -o out --original other", 3, "error[E304] other: tensor model."},
    {"adapter --base base.h5 -o out --original bnb", 3, "is quantized itself"},
    {"adapter --base base.h5 -o out --original holed", 3, "up_proj.weight is missing"},
    {"huge --base base.h5 -o out --dtype f16", 5, "not finite in f16; choose --dtype bf16"},
    {"adapter --base base.h5 -o no/such/out", 4, "no/such"},
};

/* Adapters, bases and originals that do not belong to mf_make_usual's. */
static void make_unusual(void)
{
    qs_base_index *index = mf_open_index("base.h5");
    mf_adapter huge =
        mf_make_adapter(&index->config, 1 << QS_V, false, false, 400.0f); /* 2.5 * 4 * 200^2 */
    mf_write_adapter("huge", &huge);
    qs_hf_config other = index->config;
    other.n_layers = 3;
    mf_adapter deep = mf_make_adapter(&other, MF_ALL, false, false, 0.5f);
    mf_write_adapter("deep", &deep);
    other = index->config;
    other.hidden = 80;
    mf_adapter broad = mf_make_adapter(&other, MF_ALL, false, false, 0.5f);
    mf_write_adapter("broad", &broad);
    free(huge.vector);
    free(deep.vector);
    free(broad.vector);
    qs_base_index_free(index);
    static const struct {
        const char *dir;
        tiny_hf model;
    } models[] = {
        {"tied", {.dtype = QS_BF16, .biases = true}},
        {"other",
         {.dtype = QS_BF16, .untied = true, .biases = true, .drop = "model.embed_tokens.weight"}},
        {"bnb", {.dtype = QS_BF16, .untied = true, .biases = true, .scheme = TINY_BNB_NESTED}},
        {"holed",
         {.dtype = QS_BF16,
          .untied = true,
          .biases = true,
          .drop = "model.layers.1.mlp.up_proj.weight"}}};
    for (size_t i = 0; i < sizeof models / sizeof *models; i++) {
        cr_assert_eq(mkdir(models[i].dir, 0777), 0);
        tiny_hf_write(models[i].dir, &models[i].model);
    }
    cr_assert_eq(mkdir("taken", 0777), 0);
    cr_assert_eq(mkdir("empty_adapter", 0777), 0);
    mf_put("empty_adapter/adapter_config.json", "{}");
    cr_assert_eq(system("mkdir no_tensors; cp adapter/adapter_config.json no_tensors; head -c 9000 "
                        "base.h5 > cut.h5"),
                 0);
}

Test(merge_command, what_does_not_fit_is_refused_with_one_line)
{
    mf_make_usual();
    make_unusual();
    /* another model of these shapes: the same numbers with one norm changed */
    cr_assert_eq(system("cp model/model.safetensors other/"), 0);
    qs_st_dir *dir = NULL;
    cr_assert_eq(qs_st_open(&dir, "other", "model"), QS_OK);
    const qs_st_tensor *norm = qs_st_find(dir, "model.norm.weight");
    int fd = open("other/model.safetensors", O_WRONLY);
    cr_assert_eq(pwrite(fd, "\1\2", 2, norm->begin + 20), 2);
    close(fd);
    qs_st_close(dir);
    for (size_t i = 0; i < sizeof REFUSALS / sizeof *REFUSALS; i++) {
        int code = run_merge("", REFUSALS[i].arguments);
        cr_assert_eq(code, REFUSALS[i].code, "%s: exit %d\n%s", REFUSALS[i].arguments, code,
                     output);
        cr_assert_eq(program_error_lines(output), 1, "%s:\n%s", REFUSALS[i].arguments, output);
        cr_assert_not_null(strstr(output, REFUSALS[i].says), "%s:\n%s", REFUSALS[i].arguments,
                           output);
        cr_assert_neq(access("out", F_OK), 0, "%s: something is made", REFUSALS[i].arguments);
        cr_assert_eq(mf_leftovers(), 0, "%s", REFUSALS[i].arguments);
        cr_assert_eq(rmdir("taken"), 0, "%s: taken is no longer empty", REFUSALS[i].arguments);
        cr_assert_eq(mkdir("taken", 0777), 0);
    }
}

/* A run directory with one checkpoint that was trained on the base of hash `sha`. */
static void make_run(const qs_hf_config *model, const char *sha)
{
    static const char yaml[] = "base: base.h5\ndata: {train: t.h5}\noutput: run\n"
                               "lora: {rank: 4, alpha: 10, targets: all-linear}\n";
    qs_config cfg;
    qs_lora_layout layout;
    qs_comm *comm = NULL;
    qs_optim *o = NULL;
    qs_run_dir run_dir;
    mf_adapter a = mf_make_adapter(model, MF_ALL, false, false, 0.5f);
    cr_assert_eq(qs_config_parse(&cfg, yaml, strlen(yaml), "r", NULL, 0), QS_OK);
    cr_assert_eq(qs_lora_layout_make(&layout, model, &cfg), QS_OK);
    cr_assert_eq(qs_comm_self_create(&comm), QS_OK);
    cr_assert_eq(qs_run_dir_open(&run_dir, &cfg, QS_RESUME_AUTO, false, comm), QS_OK);
    int64_t count = layout.n_layers * layout.per_layer;
    cr_assert_eq(qs_optim_create(&o, qs_device_cpu(), &layout, 0, 1), QS_OK);
    memcpy(o->master, a.vector, (size_t)count * sizeof *a.vector);
    char *text = qs_config_dump(&cfg);
    qs_ckpt_meta meta = {.step = 1, .config_yaml = text};
    snprintf(meta.base_sha256, sizeof meta.base_sha256, "%s", sha);
    snprintf(meta.run_id, sizeof meta.run_id, "%s", run_dir.run_id);
    cr_assert_eq(qs_ckpt_save("run", &meta, &layout, o, comm), QS_OK, "%s", qs_error_text());
    qs_run_dir_close(&run_dir);
    free(text);
    free(a.vector);
    qs_optim_destroy(o);
    qs_comm_destroy(comm);
}

Test(merge_command, a_run_is_merged_onto_its_own_base_only)
{
    mf_make_usual();
    qs_base_index *index = mf_open_index("base.h5");
    make_run(&index->config, index->hashes_sha256);
    qs_base_index_free(index);
    cr_assert_eq(run_merge("", "adapter --base base.h5 -o peft"), 0, "%s", output);
    cr_assert_not_null(strstr(output, "14 of 35 tensors merged, bf16"), "%s", output);
    cr_assert_eq(run_merge("", "run -o run_out"), 0, "%s", output);
    cr_assert_eq(run_merge("", "run/step-00000001 --base base.h5 -o step_out"), 0, "%s", output);
    cr_assert_eq(mf_differs("peft", "run_out") | mf_differs("peft", "step_out"), 0);
    cr_assert_eq(run_merge("timeout -k 2 50 mpirun -np 3", "run -o ranks_out"), 0, "%s", output);
    cr_assert_eq(mf_differs("peft", "ranks_out"), 0);
    tiny_hf small = {.dtype = QS_BF16, .untied = true}; /* other shapes are found first */
    mf_make_model("plain", "plain.h5", &small);
    cr_assert_eq(run_merge("", "run --base plain.h5 -o out"), 3, "%s", output);
    cr_assert_eq(program_error_lines(output), 1, "%s", output);
    cr_assert_not_null(strstr(output, "error[E304] run/step-00000001: was trained on a base"), "%s",
                       output);
    cr_assert_neq(access("out", F_OK), 0);
    cr_assert_eq(truncate("run/step-00000001/rank-00000.h5", 3000), 0);
    cr_assert_eq(run_merge("", "run/step-00000001 -o out"), 3, "%s", output);
    cr_assert_eq(program_error_lines(output), 1, "%s", output);
    cr_assert_neq(access("out", F_OK), 0);
}

/* ---- a disk that fails ---- */

static int run_faulty(const char *fault)
{
    char prefix[2048];
    const char *asan = getenv("ASAN_OPTIONS");
    snprintf(prefix, sizeof prefix,
             "FAULT=%s FAULT_PATH=out ASAN_OPTIONS=%s:verify_asan_link_order=0 "
             "LD_PRELOAD=%s/tests/libiofault.so",
             fault, asan ? asan : "", mf_binaries);
    return run_merge(prefix, "adapter --base base.h5 -o out --shard-size 100K --quiet");
}

/* As many calls of the library as a merge makes, which leaves its result in good: with a directory
 * in it. */
static int calls_of_a_merge(void)
{
    int calls = 0;
    cr_assert_eq(mkdir("model/additional_chat_templates", 0777), 0);
    mf_put("model/additional_chat_templates/tool_use.jinja", "{{ tools }}");
    mf_put("model/additional_chat_templates/rag.jinja", "{{ documents }}");
    cr_assert_eq(run_merge("", "adapter --base base.h5 -o good --shard-size 100K"), 0);
    cr_assert_eq(run_faulty("io:count"), 0, "%s", output);
    const char *at = strstr(output, "iofault: calls ");
    cr_assert(at && sscanf(at, "iofault: calls %d", &calls) == 1, "%s", output);
    cr_assert_gt(calls, 30, "five files and more");
    return calls;
}

Test(merge_command, any_call_may_fail_and_nothing_half_done_is_left)
{
    static const char *const kinds[] = {"ENOSPC", "EIO", "late", "short", "EINTR", "flip", "lost"};
    mf_make_usual();
    const int calls = calls_of_a_merge();
    for (int n = 1; n <= calls; n += 1 + n / 8) { /* closer at the start, all kinds of call */
        for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++) {
            char fault[64];
            snprintf(fault, sizeof fault, "io:%d:%s", n, kinds[k]);
            cr_assert_eq(system("rm -rf out"), 0);
            int code = run_faulty(fault);
            cr_assert(code == 0 || code == 4, "%s: exit %d\n%s", fault, code, output);
            cr_assert_eq(program_error_lines(output), code == 4, "%s:\n%s", fault, output);
            cr_assert_eq(mf_leftovers(), 0, "%s:\n%s", fault, output);
            bool there = access("out", F_OK) == 0;
            cr_assert(there || code == 4, "%s: success without a result", fault);
            cr_assert(!there || mf_differs("good", "out") == 0, "%s: a wrong result", fault);
        }
    }
}

/* What a shell says of a process that a signal ended: 128 + its number. */
Test(merge_command, a_signal_at_any_call_leaves_nothing_half_done)
{
    mf_make_usual();
    const int calls = calls_of_a_merge();
    for (int n = 1; n <= calls; n += 1 + n / 8) {
        char fault[64];
        const bool interrupt = n % 2 != 0;
        snprintf(fault, sizeof fault, "io:%d:%s", n, interrupt ? "intbefore" : "termbefore");
        cr_assert_eq(system("rm -rf out"), 0);
        const int code = run_faulty(fault);
        cr_assert_eq(code, 128 + (interrupt ? SIGINT : SIGTERM), "%s: %d\n%s", fault, code, output);
        cr_assert_eq(mf_leftovers(), 0, "%s:\n%s", fault, output);
        cr_assert(access("out", F_OK) != 0 || mf_differs("good", "out") == 0, "%s", fault);
    }
}

Test(merge_command, leftovers_of_killed_commands_are_removed_and_others_are_not)
{
    static const char *const made[] = {"out.tmp-999999991", "out.tmp-999999992",
                                       "out.tmp-999999993", "out.tmp-999999994",
                                       "out.tmp-999999995", "out.tmp-9x"};
    char command[512];
    mf_make_usual();
    for (size_t i = 0; i < sizeof made / sizeof *made; i++) {
        snprintf(command, sizeof command,
                 "mkdir %s && touch %s/model.safetensors && %s touch -d 2001-01-01 %s/* && "
                 "%s touch -d 2001-01-01 %s",
                 made[i], made[i], i == 1 ? ": written into of late:" : "", made[i],
                 i == 2 ? ": changed of late:" : "", made[i]);
        cr_assert_eq(system(command), 0, "%s", command);
    }
    for (int i = 0; i < 5; i += i == 0 ? 3 : 1) { /* the first has what a merge makes */
        static const char *const inner[] = {"additional_chat_templates", NULL, NULL, "by_hand",
                                            "additional_chat_templates"};
        snprintf(command, sizeof command,
                 "cd %s && mkdir -p %s/%s && touch %s/x.jinja && touch -d 2001-01-01 %s/* %s .",
                 made[i], inner[i], i == 4 ? "more" : "", inner[i], inner[i], inner[i]);
        cr_assert_eq(system(command), 0, "%s", command);
    }
    cr_assert_eq(run_merge("", "adapter --base base.h5 -o out/"), 0, "%s", output);
    cr_assert_neq(access(made[0], F_OK), 0);
    for (size_t i = 1; i < sizeof made / sizeof *made; i++) {
        snprintf(command, sizeof command, "%s/model.safetensors", made[i]);
        cr_assert_eq(access(command, F_OK), 0, "%s", made[i]);
    }
}

Test(merge_command, a_full_disk_is_exit_4)
{
    mf_make_usual();
    cr_assert_eq(run_faulty("io:5:ENOSPC"), 4, "%s", output);
    cr_assert_not_null(strstr(output, "error[E401]"), "%s", output);
    cr_assert_neq(access("out", F_OK), 0);
    cr_assert_eq(mf_leftovers(), 0);
}
