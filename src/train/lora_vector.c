#include "train/lora_vector.h"

#include <stdlib.h>

#include "base/log.h"
#include "base/mem.h"
#include "ckpt/adapter_dir.h"
#include "ckpt/ckpt.h"
#include "store/input.h"

static int64_t count_of(const qs_lora_layout *layout)
{
    return layout->n_layers * layout->per_layer;
}

/* ---- what is read ---- */

/* The whole LoRA vector of a PEFT directory. */
static qs_status read_peft(qs_lora_vector *v, qs_setting *on, const char *dir)
{
    qs_status st = QS_OK;
    qs_peft *peft = NULL;
    QS_TRY(qs_peft_settings(dir, &on->config));
    QS_TRY(qs_lora_layout_make(&on->layout, &on->index->config, &on->config));
    QS_TRY(QS_ALLOC(&v->loaded, count_of(&on->layout), QS_MEM_LORA));
    QS_GOTO(qs_peft_open(&peft, dir, &on->layout));
    QS_GOTO(qs_peft_expect_base(dir, on->index->hashes_sha256, on->index->path));
    for (int l = 0; l < on->layout.n_layers; l++) {
        QS_GOTO(qs_peft_read_layer(peft, l, v->loaded + (int64_t)l * on->layout.per_layer));
    }
done:
    qs_peft_close(peft);
    return st;
}

/* A checkpoint carries the configuration that it was trained with; only the adapter's part is
 * taken. */
static qs_status read_checkpoint(qs_lora_vector *v, qs_setting *on, const char *path,
                                 const char *step_dir)
{
    qs_config trained;
    qs_ckpt_origin origin;
    QS_TRY(qs_adapter_name_good(
        qs_ckpt_read_lora(step_dir, &trained, &on->layout, &v->loaded, &origin), path, step_dir));
    free(origin.chat_template);
    on->config.lora = trained.lora;
    QS_TRY(qs_lora_layout_check(&on->layout, &on->index->config, step_dir, on->index->path));
    return qs_base_expect(on->index, origin.base_sha256, step_dir);
}

static qs_status read_adapter(qs_lora_vector *v, qs_setting *on, const char *path)
{
    qs_adapter_dir found;
    QS_TRY(qs_input_expect_here("--adapter", path, "name a PEFT directory, a checkpoint or a run"));
    QS_TRY(qs_adapter_find(&found, path, false));
    return found.kind == QS_ADAPTER_PEFT ? read_peft(v, on, path)
                                         : read_checkpoint(v, on, path, found.dir);
}

/* What rank 0 has read: the settings, the layout, the vector. */
static qs_status share(qs_lora_vector *v, qs_setting *on, qs_comm *comm)
{
    const bool reader = qs_comm_rank(comm) == 0;
    QS_TRY(qs_comm_bcast(comm, &on->config.lora, sizeof on->config.lora, 0));
    QS_TRY(qs_comm_bcast(comm, &on->layout, sizeof on->layout, 0));
    const int64_t count = count_of(&on->layout);
    const qs_status st = reader ? QS_OK : QS_ALLOC(&v->loaded, count, QS_MEM_LORA);
    QS_TRY(qs_comm_agree(comm, st));
    return qs_comm_bcast(comm, v->loaded, (size_t)count * sizeof *v->loaded, 0);
}

qs_status qs_lora_vector_load(qs_lora_vector *v, qs_setting *on, const char *path, qs_comm *comm)
{
    const bool reader = qs_comm_rank(comm) == 0;
    QS_TRY(qs_comm_agree(comm, reader ? read_adapter(v, on, path) : QS_OK));
    QS_TRY(share(v, on, comm));
    on->loaded = true;
    qs_log_info("%s: %s rank %d, scale %g, %lld weights", path, on->layout.dora ? "DoRA" : "LoRA",
                on->layout.lora_rank, (double)on->layout.scale,
                (long long)qs_lora_count(&on->layout));
    return QS_OK;
}

/* ---- on the device ---- */

/* Of a vector that is rounded to act_dtype: the share of it that a rank sends as such, and the
 * magnitudes, which lie beside it in fp32, and those that a rank sends. */
typedef struct {
    int64_t send, magnitudes, magnitudes_send;
} rounded_counts;

static rounded_counts count_rounded(const qs_setting *on)
{
    const qs_lora_layout *layout = &on->layout;
    if (on->ops->act_dtype == QS_F32) {
        return (rounded_counts){0};
    }
    return (rounded_counts){.send = layout->n_layers * qs_lora_shard_width(layout, on->nranks),
                            .magnitudes = layout->n_layers * qs_lora_magnitudes(layout),
                            .magnitudes_send =
                                layout->n_layers * qs_lora_magnitude_width(layout, on->nranks)};
}

size_t qs_lora_vector_bytes(const qs_setting *on, bool trained)
{
    const rounded_counts counts = count_rounded(on);
    const int64_t sent = trained ? counts.send : 0;
    const int64_t magnitudes_sent = trained ? counts.magnitudes_send : 0;
    return (size_t)(count_of(&on->layout) + sent) * qs_dtype_bytes(on->ops->act_dtype) +
           (size_t)(counts.magnitudes + magnitudes_sent) * sizeof(float);
}

size_t qs_lora_vector_loaded_bytes(const qs_setting *on)
{
    return on->loaded ? (size_t)count_of(&on->layout) * sizeof(float) : 0;
}

static qs_status allocate(qs_lora_vector *v, const qs_setting *on, qs_device *device, bool trained)
{
    const size_t element = qs_dtype_bytes(on->ops->act_dtype);
    const rounded_counts counts = count_rounded(on);
    if (trained) {
        QS_TRY(qs_device_alloc(device, &v->send, (size_t)counts.send * element, QS_MEM_LORA));
    }
    if (trained && counts.magnitudes > 0) {
        QS_TRY(QS_DEVICE_ALLOC(device, &v->magnitudes_send, counts.magnitudes_send, QS_MEM_LORA));
    }
    if (counts.magnitudes > 0) {
        QS_TRY(QS_DEVICE_ALLOC(device, &v->magnitudes, counts.magnitudes, QS_MEM_LORA));
    }
    return qs_device_alloc(device, &v->weights, (size_t)count_of(&on->layout) * element,
                           QS_MEM_LORA);
}

/* In the type of the operations. */
static qs_status upload_weights(qs_lora_vector *v, const qs_setting *on, qs_queue *queue)
{
    const int64_t count = count_of(&on->layout);
    const size_t bytes = (size_t)count * qs_dtype_bytes(on->ops->act_dtype);
    void *rounded = NULL;
    QS_TRY(qs_mem_alloc(&rounded, bytes, QS_MEM_LORA));
    qs_f32_store(rounded, on->ops->act_dtype, v->loaded, count);
    qs_status st = qs_queue_copy(queue, v->weights, rounded, bytes);
    if (st == QS_OK) {
        st = qs_queue_wait(queue);
    }
    qs_mem_free(rounded);
    return st;
}

/* Layer by layer and linear by linear. */
static qs_status upload_magnitudes(qs_lora_vector *v, const qs_setting *on, qs_queue *queue)
{
    const qs_lora_layout *layout = &on->layout;
    float *to = v->magnitudes;
    for (int64_t l = 0; to != NULL && l < layout->n_layers; l++) {
        const float *segment = v->loaded + l * layout->per_layer;
        for (int i = 0; i < QS_LINEAR_COUNT; i++) {
            if (layout->m_at[i] >= 0) {
                QS_TRY(qs_queue_copy(queue, to, segment + layout->m_at[i],
                                     (size_t)layout->out[i] * sizeof *to));
                to += layout->out[i];
            }
        }
    }
    return qs_queue_wait(queue);
}

qs_status qs_lora_vector_prepare(qs_lora_vector *v, const qs_setting *on, qs_queue *queue,
                                 bool trained)
{
    if (!trained && v->loaded == NULL) {
        return QS_OK;
    }
    QS_TRY(allocate(v, on, qs_queue_device(queue), trained));
    if (v->loaded == NULL) {
        return QS_OK;
    }
    QS_TRY(upload_weights(v, on, queue));
    return upload_magnitudes(v, on, queue);
}

void qs_lora_vector_free(qs_lora_vector *v, qs_device *device)
{
    if (device != NULL) {
        qs_device_free(device, v->weights);
        qs_device_free(device, v->send);
        qs_device_free(device, v->magnitudes);
        qs_device_free(device, v->magnitudes_send);
    }
    qs_mem_free(v->loaded);
    *v = (qs_lora_vector){0};
}
