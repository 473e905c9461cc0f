#include "ckpt_fixture.h"

#include <dirent.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/log.h"
#include "tests/scratch.h"

char fx_folder[SCRATCH_MAX], fx_run_dir[96];

void fx_make_folder(void)
{
    qs_log_init(0, 1, QS_LOG_QUIET, false);
    scratch_make(fx_folder, NULL);
    snprintf(fx_run_dir, sizeof fx_run_dir, "%s/run", fx_folder);
    cr_assert_eq(mkdir(fx_run_dir, 0777), 0);
}

void fx_remove_folder(void)
{
    scratch_remove(fx_folder);
}

qs_config fx_config(void)
{
    qs_config c;
    const char *text =
        "base: b.h5\ndata: {train: t.h5}\nlora: {rank: 8, targets: [q_proj, up_proj]}";
    cr_assert_eq(qs_config_parse(&c, text, strlen(text), "run.yaml", NULL, 0), QS_OK);
    snprintf(c.output, sizeof c.output, "%s", fx_run_dir);
    return c;
}

qs_lora_layout fx_layout(const qs_config *c)
{
    qs_hf_config m = {.n_layers = 3, .n_heads = 12, .n_kv_heads = 4, .head_dim = 64};
    m.hidden = 768;
    m.ffn_hidden = 1200;
    m.vocab = 10;
    qs_lora_layout l;
    cr_assert_eq(qs_lora_layout_make(&l, &m, c), QS_OK);
    return l;
}

float fx_value(int which, int layer, int64_t element)
{
    return (float)(which + 1) * 1e6f + (float)layer * 1e5f + (float)element * 0.5f;
}

void fx_plan_init(fx_plan *p, int64_t step)
{
    memset(p, 0, sizeof *p);
    p->config = fx_config();
    p->layout = fx_layout(&p->config);
    cr_assert_eq(p->layout.chunks, 7);
    p->yaml = qs_config_dump(&p->config);
    p->fail_rank = -1;
    p->meta = (qs_ckpt_meta){.step = step,
                             .run_id = "run-1",
                             .config_yaml = p->yaml,
                             .base_sha256 = "aa",
                             .data_content = "bb",
                             .data_layout = "dd",
                             .tokens_seen = 1000 + step,
                             .device = "a card"};
}

void fx_each_element(const fx_plan *p, qs_optim *o, int rank, int nranks, bool *equal)
{
    int64_t width = qs_lora_shard_width(&p->layout, nranks);
    qs_range mine = qs_lora_shard(&p->layout, rank, nranks);
    float *parts[] = {o->master, o->m, o->v};
    for (int w = 0; w < 3; w++) {
        for (int l = 0; l < p->layout.n_layers; l++) {
            for (int64_t i = 0; i < width; i++) {
                bool padding = i >= mine.end - mine.begin;
                float want = padding ? 0 : fx_value(w, l, mine.begin + i);
                float *at = &parts[w][l * width + i];
                if (equal) {
                    *equal = *equal && *at == want;
                } else {
                    *at = want;
                }
            }
        }
    }
}

qs_status fx_make_optim(const fx_plan *p, qs_comm *comm, qs_optim **out)
{
    return qs_optim_create(out, qs_device_cpu(), &p->layout, qs_comm_rank(comm),
                           qs_comm_nranks(comm));
}

qs_status fx_save_body(team_member *me)
{
    fx_plan *p = me->ctx;
    qs_optim *o = NULL;
    QS_TRY(fx_make_optim(p, me->comm, &o));
    fx_each_element(p, o, me->rank, me->nranks, NULL);
    o->count -= me->rank == p->fail_rank ? QS_LORA_CHUNK : 0;
    qs_status st = qs_ckpt_save(fx_run_dir, &p->meta, &p->layout, o, me->comm);
    qs_optim_destroy(o);
    return st;
}

void fx_save_step(int64_t step, int nranks)
{
    fx_plan p;
    fx_plan_init(&p, step);
    team_expect_ok(nranks, fx_save_body, &p);
    free(p.yaml);
}

bool fx_exists(const char *name)
{
    char path[256];
    struct stat info;
    snprintf(path, sizeof path, "%s/%s", fx_run_dir, name);
    return lstat(path, &info) == 0;
}

int fx_entries(void)
{
    int count = 0;
    DIR *d = opendir(fx_run_dir);
    for (struct dirent *e = readdir(d); e; e = readdir(d)) {
        count += e->d_name[0] != '.';
    }
    closedir(d);
    return count;
}
