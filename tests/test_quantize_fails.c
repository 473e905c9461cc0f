/* qshard quantize where something is wrong: bad checkpoints are refused by name, and no failure,
 * signal or kill leaves more or less than a whole file or none. */
#define _GNU_SOURCE /* memmem */
#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <utime.h>

#include "hf/safetensors.h"
#include "mpirun.h"
#include "quantize_fixture.h"
#include "store/io.h"
#include "support/tiny_hf.h"

TestSuite(quantize_fails, .init = qf_make_dirs, .fini = qf_remove_dirs);

/* ---- refusals ---- */

typedef struct {
    tiny_hf o;
    qs_status status;
    char named[64];
} refusal;

#define BNB .dtype = QS_BF16, .scheme = TINY_BNB_NESTED
#define NESTED "\"nested_blocksize\":256,\"nested_dtype\":\"float32\",\"nested_offset\":0.5}"

/* Pointers to constants are the same in the process of each parameterized test, as it is a copy of
 * this one. */
static const refusal refusals[] = {
    {{.drop = "model.layers.1.mlp.up_proj.weight"}, QS_ERR_INPUT_TENSOR, "layers.1.mlp.up_proj"},
    {{.drop = "model.norm.weight"}, QS_ERR_INPUT_TENSOR, "model.norm.weight"},
    {{.add = "model.layers.0.self_attn.q_norm.weight"}, QS_ERR_INPUT_TENSOR, "q_norm"},
    {{.add = "model.layers.0.self_attn.q_proj.bias"}, QS_ERR_INPUT_TENSOR, "q_proj.bias"},
    {{.poison = "model.layers.1.mlp.down_proj.weight"},
     QS_ERR_INPUT_VALUE,
     "layers.1.mlp.down_proj"},
    {{.config = ",\"vocab_size2\":3"}, QS_ERR_INPUT_UNKNOWN, "vocab_size2"},
    {{.untied = true, .drop = "lm_head.weight"}, QS_ERR_INPUT_TENSOR, "lm_head.weight"},
    {{BNB, .drop = "model.layers.1.mlp.up_proj.weight.absmax"},
     QS_ERR_INPUT_TENSOR,
     "up_proj.weight.absmax"},
    {{BNB, .drop = "model.layers.1.mlp.up_proj.weight.nested_quant_map"},
     QS_ERR_INPUT_TENSOR,
     "nested_quant_map"},
    {{BNB, .drop = "model.layers.1.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"},
     QS_ERR_INPUT_TENSOR,
     "up_proj"},
    {{BNB, .state = "{\"quant_type\":\"fp4\",\"blocksize\":64,\"dtype\":\"bfloat16\",\"shape\":[72,"
                    "72]," NESTED},
     QS_ERR_INPUT_UNKNOWN,
     "quant_type = fp4"},
    {{BNB, .state = "{\"quant_type\":\"nf4\",\"blocksize\":128,\"dtype\":\"bfloat16\",\"shape\":["
                    "72,72]," NESTED},
     QS_ERR_INPUT_UNKNOWN,
     "blocksize = 128"},
    {{BNB, .state = "{\"quant_type\":\"nf4\",\"blocksize\":64,\"dtype\":\"float64\",\"shape\":[72,"
                    "72]," NESTED},
     QS_ERR_INPUT_UNKNOWN,
     "dtype = float64"},
    {{BNB, .state = "{\"quant_type\":\"nf4\",\"blocksize\":64,\"dtype\":\"bfloat16\",\"shape\":[36,"
                    "144]," NESTED},
     QS_ERR_INPUT_TENSOR,
     "shape"},
    {{BNB, .state =
               "{\"quant_type\":\"nf4\",\"blocksize\":64,\"dtype\":\"bfloat16\",\"shape\":[72,72],"
               "\"nested_blocksize\":128,\"nested_dtype\":\"float32\",\"nested_offset\":0.5}"},
     QS_ERR_INPUT_UNKNOWN,
     "nested_blocksize = 128"},
    {{BNB,
      .state =
          "{\"quant_type\":\"nf4\",\"blocksize\":64,\"dtype\":\"bfloat16\",\"shape\":[72,72]}"},
     QS_ERR_INPUT_TENSOR,
     "absmax"},
    {{BNB, .state = "{\"quant_type\":\"nf4\",\"blocksize\":64,\"dtype\":\"bfloat16\",\"shape\":[72,"
                    "72],\"y\":1," NESTED},
     QS_ERR_INPUT_UNKNOWN,
     "y"},
    {{BNB, .state = "{"}, QS_ERR_INPUT_FORMAT, "q_proj"},
};

ParameterizedTestParameters(quantize_fails, bad_checkpoints_are_refused_by_name_and_leave_nothing)
{
    static int number[sizeof refusals / sizeof *refusals];
    for (int i = 0; i < (int)(sizeof refusals / sizeof *refusals); i++) {
        number[i] = i;
    }
    return cr_make_param_array(int, number, sizeof refusals / sizeof *refusals);
}

ParameterizedTest(int *number, quantize_fails,
                  bad_checkpoints_are_refused_by_name_and_leave_nothing)
{
    const refusal *r = &refusals[*number];
    char text[512];
    tiny_hf_write(qf_model, &r->o);
    qf_run c = qf_to_file(qf_file("b.h5"), 1);
    cr_assert_eq(qf_quantize_on(3, &c, text), r->status, "%d: %s", *number, text);
    cr_assert_not_null(strstr(text, r->named), "%d: %s", *number, text);
    cr_assert_eq(qf_files(), 0);
}

/* A checkpoint with a head of its own, of which config.json says that there is none. */
static void write_tied_with_head(void)
{
    tiny_hf o = {.dtype = QS_BF16, .untied = true};
    char path[160];
    void *config = NULL;
    size_t bytes = 0;
    tiny_hf_write(qf_model, &o);
    (void)snprintf(path, sizeof path, "%s/config.json", qf_model);
    cr_assert_eq(qs_io_read_file(path, 1 << 20, &config, &bytes), QS_OK);
    char *tied = strstr(config, "\"tie_word_embeddings\":false");
    memcpy(tied, "\"tie_word_embeddings\":true ", 27);
    cr_assert_eq(qs_io_write_file(path, config, bytes), QS_OK);
    free(config);
}

/* Write the embedding over the head, but for the last `bytes_left` bytes. */
static void copy_embedding_to_head(int64_t bytes_left)
{
    char path[160];
    void *file = NULL;
    size_t bytes = 0;
    qs_st_dir *tensors = NULL;
    cr_assert_eq(qs_st_open(&tensors, qf_model, "model"), QS_OK);
    const qs_st_tensor *from = qs_st_find(tensors, "model.embed_tokens.weight");
    const qs_st_tensor *to = qs_st_find(tensors, "lm_head.weight");
    cr_assert_eq(from->bytes, to->bytes);
    (void)snprintf(path, sizeof path, "%s/model.safetensors", qf_model);
    cr_assert_eq(qs_io_read_file(path, 1 << 30, &file, &bytes), QS_OK);
    memcpy((char *)file + to->begin, (char *)file + from->begin, (size_t)(to->bytes - bytes_left));
    cr_assert_eq(qs_io_write_file(path, file, bytes), QS_OK);
    qs_st_close(tensors);
    free(file);
}

Test(quantize_fails, head_that_is_the_tied_embedding_once_more_is_ignored)
{
    write_tied_with_head();
    copy_embedding_to_head(0);
    qs_base_index *index = qf_index();
    cr_assert_eq(index->n_units, TINY_LAYERS + 4);
    cr_assert_eq(qs_base_head_unit(index, 0), qs_base_embed_unit(index, 0));
    qs_base_index_free(index);
}

/* transformers would compute with it: to leave it out in silence gives another model. */
Test(quantize_fails, another_head_beside_a_tied_embedding_is_refused)
{
    char text[512];
    for (int part = 0; part < 2; part++) {
        write_tied_with_head();
        if (part == 1) {
            copy_embedding_to_head(TINY_VOCAB * TINY_HIDDEN); /* the first half is the embedding */
        }
        qf_run c = qf_to_file(qf_file("b.h5"), 1);
        cr_assert_eq(qf_quantize_on(2, &c, text), QS_ERR_INPUT_TENSOR, "%s", text);
        cr_assert_not_null(strstr(text, "lm_head.weight is not the embedding"), "%s", text);
        cr_assert_eq(qf_files(), 0);
    }
}

Test(quantize_fails, existing_output_is_left_alone)
{
    tiny_hf o = {.dtype = QS_BF16};
    char text[512];
    void *data = NULL;
    size_t bytes = 0;
    tiny_hf_write(qf_model, &o);
    cr_assert_eq(qs_io_write_file(qf_file("b.h5"), "mine", 4), QS_OK);
    qf_run c = qf_to_file(qf_file("b.h5"), 1);
    cr_assert_eq(qf_quantize_on(2, &c, text), QS_ERR_OUTPUT_TAKEN);
    cr_assert_eq(qs_io_read_file(qf_file("b.h5"), 100, &data, &bytes), QS_OK);
    cr_assert(bytes == 4 && memcmp(data, "mine", 4) == 0);
    cr_assert_eq(qf_files(), 1);
    free(data);
}

Test(quantize_fails, leftovers_of_killed_runs_are_removed_and_others_are_not)
{
    tiny_hf o = {.dtype = QS_BF16};
    struct utimbuf old = {1000000000, 1000000000};
    char mine[64];
    (void)snprintf(mine, sizeof mine, "b.h5.tmp-%d", (int)getppid()); /* alive */
    const char *const names[] = {"b.h5.tmp-999999999",
                                 "b.h5.tmp-999999998",
                                 "c.h5.tmp-999999999",
                                 "b.h5.tmp-",
                                 "b.h5.tmp-9x",
                                 "b.h5.tmp-+999999999",
                                 "b.h5.tmp- 99999999",
                                 "b.h5.tmp-9999999999",
                                 "b.h5.tmp-0",
                                 "b.h5.tmp--9999999999",
                                 mine};
    enum { NAMES = sizeof names / sizeof *names };
    tiny_hf_write(qf_model, &o);
    for (int i = 0; i < NAMES; i++) {
        cr_assert_eq(qs_io_write_file(qf_file(names[i]), "x", 1), QS_OK);
        if (i != 1) { /* the second is young: its writer may be on another host */
            cr_assert_eq(utime(qf_file(names[i]), &old), 0);
        }
    }
    qf_quantize(qf_file("b.h5"));
    cr_assert_neq(access(qf_file(names[0]), F_OK), 0);
    for (int i = 1; i < NAMES; i++) {
        cr_assert_eq(access(qf_file(names[i]), F_OK), 0, "%s", names[i]);
    }
}

/* ---- faults: the n-th I/O call on the output fails ---- */

static const char *fault_library(void)
{
    static char path[512];
    const char *build = getenv("QSHARD_BINARY_DIR");
    (void)snprintf(path, sizeof path, "%s/tests/libiofault.so", build != NULL ? build : ".");
    return path;
}

/* One run with FAULT=`fault`. The library comes before the sanitizer's, if there is one. */
static void run_with_fault(mpirun_result *r, const char *fault)
{
    const char *asan = getenv("ASAN_OPTIONS");
    shell(r, 60,
          "env ASAN_OPTIONS=%s:verify_asan_link_order=0 FAULT=%s FAULT_PATH=b.h5 LD_PRELOAD=%s "
          "%s %s %s 1",
          asan != NULL ? asan : "", fault, fault_library(), case_path("quantize"), qf_model,
          qf_file("b.h5"));
}

static int fault_calls(void)
{
    mpirun_result r;
    int calls = 0;
    run_with_fault(&r, "io:count");
    const char *at = strstr(r.output, "iofault: calls ");
    cr_assert_eq(r.code, 0, "%s", r.output);
    cr_assert(at != NULL && sscanf(at, "iofault: calls %d", &calls) == 1, "%s", r.output);
    cr_assert_eq(unlink(qf_file("b.h5")), 0);
    return calls;
}

/* As it was asked for, and not where it is written at first. */
static void expect_output_named(const mpirun_result *r)
{
    const char *error = strstr(r->output, "error[");
    cr_assert_not_null(error, "%s", r->output);
    const size_t length = strcspn(error, "\n");
    cr_assert_null(memmem(error, length, ".tmp-", 5), "%s", r->output);
}

static void expect_all_or_nothing(int n, const char *kind, const mpirun_result *r)
{
    bool there = access(qf_file("b.h5"), F_OK) == 0;
    bool killed = strncmp(kind, "kill", 4) == 0;
    cr_assert_leq(qf_files(), 1, "call %d %s", n, kind);
    if (there) {
        cr_assert_eq(qs_base_verify(qf_file("b.h5")), QS_OK, "call %d %s", n, kind);
        cr_assert_eq(unlink(qf_file("b.h5")), 0);
    } else {
        cr_assert_neq(r->code, 0, "call %d %s: success without a file: %s", n, kind, r->output);
    }
    if (!killed) {
        cr_assert(r->code == 0 || r->code == 4, "call %d %s: exit %d: %s", n, kind, r->code,
                  r->output);
        cr_assert_eq(qf_files(), 0, "call %d %s leaves a file: %s", n, kind, r->output);
        if (r->code == 4) {
            expect_output_named(r);
        }
    }
    shell((mpirun_result *)(uintptr_t)r, 10, "sh -c 'rm -f %s/*'", qf_out);
}

Test(quantize_fails, a_unit_that_cannot_be_read_back_is_told_so)
{
    tiny_hf o = {.dtype = QS_BF16};
    mpirun_result r;
    if (access(fault_library(), R_OK) != 0) {
        cr_skip_test("no %s", fault_library());
    }
    tiny_hf_write(qf_model, &o);
    run_with_fault(&r, "read:1:EIO");
    cr_assert_eq(r.code, 4, "%s", r.output);
    cr_assert_not_null(strstr(r.output, "error[E402]"), "%s", r.output);
    cr_assert_not_null(strstr(r.output, "b.h5: unit "), "%s", r.output);
    cr_assert_not_null(strstr(r.output, " cannot be read back: Input/output error"), "%s",
                       r.output);
    cr_assert_eq(qf_files(), 0);
}

/* What a shell says of a process that a signal ended: 128 + its number. */
ParameterizedTestParameters(quantize_fails, a_signal_at_any_call_leaves_a_whole_file_or_none)
{
    static char kind[][12] = {"intbefore", "termbefore"};
    return cr_make_param_array(char[12], kind, sizeof kind / sizeof *kind);
}

ParameterizedTest(char *kind, quantize_fails, a_signal_at_any_call_leaves_a_whole_file_or_none,
                  .timeout = 300)
{
    tiny_hf o = {.dtype = QS_BF16};
    mpirun_result r;
    char fault[32];
    const int code = 128 + (strcmp(kind, "intbefore") == 0 ? SIGINT : SIGTERM);
    if (access(fault_library(), R_OK) != 0) {
        cr_skip_test("no %s", fault_library());
    }
    tiny_hf_write(qf_model, &o);
    int calls = fault_calls();
    for (int n = 1; n <= calls; n += n < 8 || n > calls - 6 ? 1 : 13) {
        (void)snprintf(fault, sizeof fault, "io:%d:%s", n, kind);
        run_with_fault(&r, fault);
        cr_assert_eq(r.code, code, "call %d: exit %d: %s", n, r.code, r.output);
        const bool there = access(qf_file("b.h5"), F_OK) == 0;
        cr_assert_eq(qf_files(), there, "call %d leaves a file: %s", n, r.output);
        if (there) {
            cr_assert_eq(qs_base_verify(qf_file("b.h5")), QS_OK, "call %d", n);
            cr_assert_eq(unlink(qf_file("b.h5")), 0);
        }
    }
}

/* mpirun ends the others, and rank 0 has the file. */
Test(quantize_fails, a_signal_to_another_rank_leaves_nothing, .timeout = 120)
{
    tiny_hf o = {.dtype = QS_BF16};
    mpirun_result r;
    const char *asan = getenv("ASAN_OPTIONS");
    if (access(fault_library(), R_OK) != 0 || system("command -v mpirun > /dev/null") != 0) {
        cr_skip_test("no mpirun or no %s", fault_library());
    }
    tiny_hf_write(qf_model, &o);
    shell(&r, 60,
          "env ASAN_OPTIONS=%s:verify_asan_link_order=0 FAULT=io:2:termbefore FAULT_RANK=1 "
          "FAULT_PATH=b.h5 mpirun -np 2 -x LD_PRELOAD=%s %s %s %s 1",
          asan != NULL ? asan : "", fault_library(), case_path("quantize"), qf_model,
          qf_file("b.h5"));
    cr_assert_not_null(strstr(r.output, "iofault: call 2"), "%s", r.output);
    cr_assert_eq(r.code, 128 + SIGTERM, "exit %d: %s", r.code, r.output);
    cr_assert_eq(qf_files(), 0, "%s", r.output);
}

ParameterizedTestParameters(quantize_fails, a_fault_in_any_call_leaves_a_whole_file_or_none)
{
    static char kind[][12] = {"ENOSPC", "EIO", "late", "killbefore"};
    return cr_make_param_array(char[12], kind, sizeof kind / sizeof *kind);
}

ParameterizedTest(char *kind, quantize_fails, a_fault_in_any_call_leaves_a_whole_file_or_none,
                  .timeout = 300)
{
    tiny_hf o = {.dtype = QS_BF16};
    mpirun_result r;
    char fault[32];
    if (access(fault_library(), R_OK) != 0) {
        cr_skip_test("no %s", fault_library());
    }
    tiny_hf_write(qf_model, &o);
    int calls = fault_calls();
    cr_assert_gt(calls, 40);
    for (int n = 1; n <= calls; n += n < 8 || n > calls - 12 ? 1 : 13) {
        (void)snprintf(fault, sizeof fault, "io:%d:%s", n, kind);
        run_with_fault(&r, fault);
        expect_all_or_nothing(n, kind, &r);
    }
}
