#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "base/mem.h"
#include "hf/safetensors.h"
#include "store/input.h"
#include "train/run_impl.h"

static qs_status open_init(const qs_run *r, qs_peft **peft)
{
    const qs_base_index *base = r->session.on.index;
    const char *dir = r->cfg->lora.init;
    QS_TRY(qs_input_expect_here("lora.init", dir, "name a PEFT directory"));
    QS_TRY(qs_peft_open(peft, dir, &r->session.on.layout));
    return qs_peft_expect_base(dir, base->hashes_sha256, base->path);
}

/* This rank's share of a PEFT directory, which rank 0 reads layer by layer. */
static qs_status init_from_adapter(qs_run *r)
{
    qs_status st = QS_OK;
    const qs_lora_layout *layout = &r->session.on.layout;
    const int64_t width = qs_lora_shard_width(layout, r->nranks);
    const qs_range mine = qs_lora_shard(layout, r->rank, r->nranks);
    const size_t bytes = (size_t)layout->per_layer * sizeof(float);
    qs_peft *peft = NULL;
    float *segment = NULL;
    st = QS_ALLOC(&segment, layout->per_layer, QS_MEM_WORK);
    if (st == QS_OK && r->rank == 0) {
        st = open_init(r, &peft);
    }
    QS_GOTO(qs_comm_agree(r->comm, st));
    for (int l = 0; l < layout->n_layers; l++) {
        st = r->rank == 0 ? qs_peft_read_layer(peft, l, segment) : QS_OK;
        QS_GOTO(qs_comm_agree(r->comm, st));
        QS_GOTO(qs_comm_bcast(r->comm, segment, bytes, 0));
        memcpy(r->trainer.optim->master + l * width, segment + mine.begin,
               (size_t)(mine.end - mine.begin) * sizeof(float));
    }
done:
    qs_peft_close(peft);
    qs_mem_free(segment);
    return st;
}

/* Fresh LoRA weights, or those of a PEFT directory. Collective. */
static qs_status init_lora(qs_run *r)
{
    return r->cfg->lora.init[0] != '\0'
               ? init_from_adapter(r)
               : qs_trainer_start_anew(&r->trainer, (uint64_t)r->cfg->seed);
}

qs_status qs_run_check_init(const qs_run *r)
{
    qs_peft *peft = NULL;
    if (r->cfg->lora.init[0] == '\0' || r->rank != 0) {
        return QS_OK;
    }
    const qs_status st = open_init(r, &peft);
    qs_peft_close(peft);
    return st;
}

qs_status qs_run_config_text(const qs_run *r, char **yaml)
{
    *yaml = qs_config_dump(r->cfg);
    return qs_comm_agree(r->comm, *yaml != NULL ? QS_OK
                                                : QS_FAIL(QS_ERR_MEMORY,
                                                          "%s: no memory for the configuration",
                                                          r->cfg->output));
}

qs_ckpt_meta qs_run_meta(const qs_run *r, const char *config_yaml)
{
    qs_ckpt_meta meta = {.step = r->step,
                         .config_yaml = config_yaml,
                         .tokens_seen = r->tokens_seen,
                         .chat_template = r->train_data->chat_template,
                         .seen = &r->run_dir.seen};
    snprintf(meta.run_id, sizeof meta.run_id, "%s", r->run_dir.run_id);
    snprintf(meta.base_sha256, sizeof meta.base_sha256, "%s", r->session.on.index->hashes_sha256);
    snprintf(meta.device, sizeof meta.device, "%s", qs_device_description(r->session.device));
    snprintf(meta.data_content, sizeof meta.data_content, "%s", r->train_data->content);
    snprintf(meta.data_layout, sizeof meta.data_layout, "%s", r->train_data->layout);
    return meta;
}

qs_status qs_run_begin(qs_run *r)
{
    qs_status st = QS_OK;
    int64_t step = -1;
    char *yaml = NULL;
    if (r->options->resume != QS_RESUME_NEVER && r->options->dump_grads == NULL) {
        QS_TRY(qs_ckpt_latest(r->cfg->output, &step, r->comm));
    }
    if (step < 0 && r->options->resume == QS_RESUME_MUST) {
        return qs_comm_agree(r->comm,
                             QS_FAIL(QS_ERR_CHECKPOINT,
                                     "%s: no checkpoint that verifies, and --resume must was "
                                     "given; use --resume auto to start anew",
                                     r->cfg->output));
    }
    if (step < 0) {
        QS_TRY(init_lora(r));
        return qs_optim_push(r->trainer.optim, r->session.queue);
    }
    QS_GOTO(qs_run_config_text(r, &yaml));
    const qs_ckpt_meta expect = qs_run_meta(r, yaml);
    qs_ckpt_meta loaded;
    QS_GOTO(qs_ckpt_load(r->cfg->output, step, &expect, &r->session.on.layout, r->trainer.optim,
                         &loaded, r->comm));
    QS_GOTO(qs_optim_push(r->trainer.optim, r->session.queue));
    r->step = loaded.step;
    r->tokens_seen = loaded.tokens_seen;
    qs_log_info("%s: resuming after step %" PRId64, r->cfg->output, r->step);
    if (loaded.device[0] != '\0' && strcmp(loaded.device, expect.device) != 0) {
        qs_log_warn(
            "%s: the checkpoint was computed by: %s; now: %s. The run goes on, but not with "
            "the bits of an undisturbed one",
            r->cfg->output, loaded.device, expect.device);
    }
done:
    free(yaml);
    return st;
}
