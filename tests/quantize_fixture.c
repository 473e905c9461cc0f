#include "quantize_fixture.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"
#include "mpirun.h"
#include "store/io.h"
#include "weights/base_impl.h"

char qf_dir[SCRATCH_MAX], qf_model[96], qf_out[96];

void qf_make_dirs(void)
{
    scratch_make(qf_dir, NULL);
    (void)snprintf(qf_model, sizeof qf_model, "%s/model", qf_dir);
    (void)snprintf(qf_out, sizeof qf_out, "%s/out", qf_dir);
    cr_assert(qs_io_mkdir(qf_model) == QS_OK && qs_io_mkdir(qf_out) == QS_OK);
    qs_log_init(0, 1, QS_LOG_QUIET, false);
}

void qf_remove_dirs(void)
{
    scratch_remove(qf_dir);
}

const char *qf_file(const char *name)
{
    static char path[2][160];
    static int turn;
    turn = 1 - turn;
    (void)snprintf(path[turn], sizeof path[turn], "%s/%s", qf_out, name);
    return path[turn];
}

int qf_files(void)
{
    mpirun_result r;
    shell(&r, 10, "sh -c 'ls -A %s | wc -l'", qf_out);
    return atoi(r.output);
}

void qf_sha256(const char *path, char hex[QS_SHA256_HEX])
{
    void *data = NULL;
    size_t bytes = 0;
    cr_assert_eq(qs_io_read_file(path, 1 << 28, &data, &bytes), QS_OK, "%s", qs_error_text());
    qs_sha256_hex(data, bytes, hex);
    free(data);
}

qf_run qf_to_file(const char *path, int threads)
{
    return (qf_run){.options = {.hf_dir = qf_model,
                                .output = path,
                                .head_chunk_rows = 100,
                                .double_quant = true,
                                .threads = threads}};
}

static qs_status quantize_body(team_member *me)
{
    qf_run *c = me->ctx;
    return qs_quantize(&c->options, me->comm, &c->report[me->rank]);
}

qs_status qf_quantize_on(int nranks, qf_run *c, char text[512])
{
    team_member members[TEAM_MAX];
    team_run(members, nranks, quantize_body, c);
    text[0] = '\0';
    for (int r = 0; r < nranks; r++) {
        cr_assert_eq(members[r].st, members[0].st, "rank %d: %d, rank 0: %d", r, members[r].st,
                     members[0].st);
        if (members[r].text[0] != '\0') {
            strcpy(text, members[r].text);
        }
    }
    return members[0].st;
}

void qf_quantize(const char *path)
{
    char text[512];
    qf_run c = qf_to_file(path, 1);
    cr_assert_eq(qf_quantize_on(1, &c, text), QS_OK, "%s", text);
}

qs_base_index *qf_index(void)
{
    qs_base_index *index = NULL;
    const char *path = qf_file("index.h5");
    qf_quantize(path);
    cr_assert_eq(qs_base_verify(path), QS_OK, "%s", qs_error_text());
    cr_assert_eq(qs_base_open_local(&index, path), QS_OK, "%s", qs_error_text());
    cr_assert_eq(unlink(path), 0);
    return index;
}
