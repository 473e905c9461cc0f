#define _GNU_SOURCE
#include "merge_fixture.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/log.h"
#include "store/io.h"
#include "tests/scratch.h"
#include "weights/quantize.h"

char mf_binaries[PROGRAM_FOLDER_MAX];
static char folder[SCRATCH_MAX];

void mf_make_folder(void)
{
    qs_log_init(0, 1, QS_LOG_QUIET, false);
    program_find(mf_binaries);
    scratch_make(folder, NULL);
    cr_assert_eq(chdir(folder), 0);
}

void mf_remove_folder(void)
{
    cr_assert_eq(chdir("/"), 0);
    scratch_remove(folder);
}

static void quantize(const char *model, const char *base)
{
    qs_quantize_report report;
    qs_comm *comm = NULL;
    qs_quantize_options options = {.hf_dir = model,
                                   .output = base,
                                   .head_chunk_rows = 100, /* 301 rows: a short last chunk */
                                   .double_quant = true,
                                   .threads = 2};
    cr_assert_eq(qs_comm_self_create(&comm), QS_OK);
    cr_assert_eq(qs_quantize(&options, comm, &report), QS_OK, "%s", qs_error_text());
    qs_comm_destroy(comm);
}

void mf_make_model(const char *model, const char *base, const tiny_hf *o)
{
    cr_assert_eq(mkdir(model, 0777), 0);
    tiny_hf_write(model, o);
    quantize(model, base);
}

qs_base_index *mf_open_index(const char *base)
{
    qs_comm *self = NULL;
    qs_base_index *index = NULL;
    cr_assert_eq(qs_comm_self_create(&self), QS_OK);
    cr_assert_eq(qs_base_index_read(&index, base, self), QS_OK, "%s", qs_error_text());
    qs_comm_destroy(self);
    return index;
}

mf_adapter mf_make_adapter(const qs_hf_config *model, uint32_t targets, bool rslora, bool dora,
                           float size)
{
    mf_adapter a;
    memset(&a, 0, sizeof a);
    a.config.lora.rank = MF_RANK;
    a.config.lora.alpha = 10;
    a.config.lora.rslora = rslora;
    a.config.lora.dora = dora;
    a.config.lora.targets = targets;
    cr_assert_eq(qs_lora_layout_make(&a.layout, model, &a.config), QS_OK);
    int64_t count = a.layout.n_layers * a.layout.per_layer;
    uint32_t seed = 5;
    a.vector = calloc((size_t)count, sizeof *a.vector);
    for (int64_t i = 0; i < count; i++) {
        seed = seed * 1664525U + 1013904223U;
        a.vector[i] = i % a.layout.per_layer < a.layout.used
                          ? size * ((float)(seed >> 8) * 0x1p-24f - 0.5f)
                          : 0.0f;
    }
    return a;
}

void mf_write_adapter(const char *dir, const mf_adapter *a)
{
    cr_assert_eq(qs_peft_write(dir, &a->layout, &a->config, "m", NULL, NULL, a->vector), QS_OK,
                 "%s", qs_error_text());
}

void mf_make_usual(void)
{
    tiny_hf o = {.dtype = QS_BF16, .untied = true, .biases = true};
    mf_make_model("model", "base.h5", &o);
    qs_base_index *index = mf_open_index("base.h5");
    mf_adapter a = mf_make_adapter(&index->config, MF_ALL, false, false, 0.5f);
    mf_write_adapter("adapter", &a);
    free(a.vector);
    qs_base_index_free(index);
}

int mf_leftovers(void)
{
    int count = -1;
    FILE *pipe = popen("ls -A | grep -c tmp-", "r");
    cr_assert_eq(fscanf(pipe, "%d", &count), 1);
    pclose(pipe);
    return count;
}

int mf_differs(const char *a, const char *b)
{
    char command[256];
    snprintf(command, sizeof command, "diff -r %s %s > /dev/null", a, b);
    return system(command);
}

void mf_put(const char *name, const char *text)
{
    cr_assert_eq(qs_io_write_file(name, text, strlen(text)), QS_OK, "%s", qs_error_text());
}
