#include "train/session.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"
#include "base/mem.h"
#include "ckpt/ckpt.h"
#include "store/manifest.h"

enum { AUTO_GROUP_MAX = 4 };

static qs_status check_device(const qs_config *config)
{
    if (config->device == QS_DEVICE_CUDA) {
        return QS_FAIL(QS_ERR_ENVIRONMENT,
                       "device: cuda: this build has no GPU plugin; use device: auto or cpu");
    }
    return QS_OK;
}

qs_status qs_session_open(qs_session *s, const qs_config *config, qs_comm *comm)
{
    memset(s, 0, sizeof *s);
    s->config = *config;
    s->comm = comm;
    s->ops = qs_ops_cpu();
    QS_TRY(qs_comm_agree(comm, check_device(config)));
    int threads = 1;
    QS_TRY(qs_comm_threads(comm, (int)config->cpu.threads, &threads));
    QS_TRY(qs_comm_agree(comm, qs_queue_create(&s->queue, threads)));
    QS_TRY(qs_base_index_read(&s->index, config->base, comm));
    qs_log_info("%s: %d layers, hidden %lld, vocabulary %lld; %d ranks (%s), %d threads each, "
                "kernels %s",
                config->base, s->index->config.n_layers, (long long)s->index->config.hidden,
                (long long)s->index->config.vocab, qs_comm_nranks(comm), qs_comm_name(comm),
                threads, s->ops->name);
    return QS_OK;
}

/* The whole LoRA vector of a PEFT directory. */
static qs_status read_peft(qs_session *s, const char *dir)
{
    qs_status st = QS_OK;
    qs_peft *peft = NULL;
    QS_TRY(qs_peft_settings(dir, &s->config));
    QS_TRY(qs_lora_layout_make(&s->layout, &s->index->config, &s->config));
    QS_TRY(QS_ALLOC(&s->lora, s->layout.n_layers * s->layout.per_layer, QS_MEM_LORA));
    QS_GOTO(qs_peft_open(&peft, dir, &s->layout));
    for (int l = 0; l < s->layout.n_layers; l++) {
        QS_GOTO(qs_peft_read_layer(peft, l, s->lora + (int64_t)l * s->layout.per_layer));
    }
done:
    qs_peft_close(peft);
    return st;
}

/* The adapter's shapes are those of the model that it was trained on: they must be this model's,
 * too. */
static qs_status check_fit(const qs_session *s, const char *path)
{
    const qs_hf_config *model = &s->index->config;
    if (s->layout.n_layers != model->n_layers) {
        return QS_FAIL(QS_ERR_INPUT_VALUE,
                       "%s: adapter of %d layers, but %s has %d; give the base "
                       "that it was trained on",
                       path, s->layout.n_layers, s->index->path, model->n_layers);
    }
    for (int i = 0; i < QS_LINEAR_COUNT; i++) {
        int64_t out = 0, in = 0;
        qs_linear_shape(model, (qs_linear)i, &out, &in);
        if (s->layout.targeted[i] && (s->layout.out[i] != out || s->layout.in[i] != in)) {
            return QS_FAIL(QS_ERR_INPUT_VALUE,
                           "%s: adapter of a %s of [%lld, %lld], but %s has [%lld, %lld]; give the "
                           "base that it was trained on",
                           path, qs_linear_path((qs_linear)i), (long long)s->layout.out[i],
                           (long long)s->layout.in[i], s->index->path, (long long)out,
                           (long long)in);
        }
    }
    return QS_OK;
}

/* A checkpoint carries the configuration that it was trained with; only the adapter's part is
 * taken. */
static qs_status read_checkpoint(qs_session *s, const char *step_dir)
{
    qs_config trained;
    QS_TRY(qs_ckpt_read_lora(step_dir, &trained, &s->layout, &s->lora));
    s->config.lora = trained.lora;
    return check_fit(s, step_dir);
}

static bool has_file(const char *dir, const char *name)
{
    char path[QS_PATH_MAX + 64];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    return access(path, R_OK) == 0;
}

static qs_status read_adapter(qs_session *s, const char *path)
{
    if (has_file(path, "adapter_config.json")) {
        return read_peft(s, path);
    }
    if (has_file(path, "manifest.json")) {
        return read_checkpoint(s, path);
    }
    int64_t step = -1;
    int count = 0;
    QS_TRY(qs_manifest_list(path, &step, 1, &count));
    if (count == 0) {
        return QS_FAIL(QS_ERR_INPUT_MISSING,
                       "%s: neither a PEFT directory (adapter_config.json), nor a checkpoint "
                       "(manifest.json), nor a run with checkpoints (step-*)",
                       path);
    }
    char step_dir[QS_PATH_MAX + 64];
    qs_manifest_step_dir(step_dir, sizeof step_dir, path, step);
    return read_checkpoint(s, step_dir);
}

qs_status qs_session_load_adapter(qs_session *s, const char *path)
{
    if (path == NULL || path[0] == '\0') {
        return QS_OK;
    }
    QS_TRY(qs_comm_agree(s->comm, read_adapter(s, path)));
    qs_log_info("%s: LoRA rank %d, scale %g, %lld weights", path, s->layout.lora_rank,
                (double)s->layout.scale, (long long)qs_lora_count(&s->layout));
    return QS_OK;
}

qs_status qs_session_build(qs_session *s, const qs_model_shape *shape)
{
    QS_TRY(qs_fsdp_create(&s->fsdp, s->index, s->comm, s->queue));
    return qs_comm_agree(s->comm, qs_model_create(&s->model, s->index, s->fsdp, s->ops, s->queue,
                                                  &s->layout, s->lora, shape));
}

void qs_session_close(qs_session *s)
{
    qs_model_destroy(s->model);
    qs_fsdp_destroy(s->fsdp);
    qs_mem_free(s->lora);
    qs_base_index_free(s->index);
    qs_queue_destroy(s->queue);
    memset(s, 0, sizeof *s);
}

int64_t qs_session_group(const qs_config *config, int64_t slots, int nranks)
{
    const int64_t per_rank = (slots + nranks - 1) / nranks;
    int64_t group = config->train.gather_group;
    if (group == 0) {
        group = nranks > 1 ? AUTO_GROUP_MAX : 1;
    }
    return group < per_rank ? group : per_rank;
}
