#include "train/session.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cores.h"
#include "base/log.h"
#include "base/mem.h"
#include "base/minmax.h"
#include "base/proc.h"
#include "ckpt/adapter_dir.h"
#include "ckpt/ckpt.h"
#include "store/input.h"
#include "train/products.h"

/* Sizes of the model alone. */
static qs_ops_limits model_limits(const qs_hf_config *model)
{
    return (qs_ops_limits){.n_heads = model->n_heads,
                           .n_kv_heads = model->n_kv_heads,
                           .head_dim = model->head_dim,
                           .q_norm = qs_norm_width(model, QS_NORM_Q),
                           .hidden = model->hidden};
}

/* The CPU's operations take every model, a GPU's may not: said before anything is loaded. */
static qs_status check_model_taken(qs_session *s)
{
    char why[256] = "";
    const qs_ops_limits model = model_limits(&s->index->config);
    if (s->backend.ops->takes(&model, why, sizeof why)) {
        return QS_OK;
    }
    if (s->config.device == QS_DEVICE_CUDA) {
        return QS_FAIL(
            QS_ERR_CONFIG_PAIR,
            "%s: %s, so not with device: cuda; device: cpu, or auto, computes without a GPU",
            s->config.base, why);
    }
    qs_log_info("device: cpu, since %s: %s", s->config.base, why);
    qs_backend_close(&s->backend);
    return qs_backend_open(&s->backend, QS_DEVICE_CPU, s->comm, false);
}

/* What cpu.gemm says, on a CPU. */
static qs_status choose_products(qs_session *s)
{
    int *gemm = &s->config.cpu.gemm;
    if (qs_device_is_host(s->device)) {
        return qs_products_choose(s->comm, gemm, &s->ops);
    }
    if (*gemm != QS_GEMM_STRICT && *gemm != QS_GEMM_AUTO) {
        qs_log_warn("cpu.gemm: %s is for the CPU and has no effect with device: cuda",
                    qs_products_name(*gemm));
    }
    *gemm = QS_GEMM_STRICT;
    return QS_OK;
}

static qs_status open_device(qs_session *s)
{
    const qs_config *config = &s->config;
    QS_TRY(qs_comm_agree(s->comm, qs_backend_open(&s->backend, (qs_device_kind)config->device,
                                                  s->comm, config->allow_shared_device)));
    QS_TRY(qs_comm_agree(s->comm, check_model_taken(s)));
    s->device = s->backend.device;
    s->ops = s->backend.ops;
    if (config->device != QS_DEVICE_CPU) {
        QS_TRY(qs_backend_check_alike(&s->backend, s->comm));
    }
    QS_TRY(choose_products(s));
    s->apart = !qs_device_is_host(s->device);
    s->config.device = s->apart ? QS_DEVICE_CUDA : QS_DEVICE_CPU;
    QS_TRY(qs_comm_threads(s->comm, (int)config->cpu.threads, &s->threads));
    return qs_comm_agree(s->comm, qs_queue_create_on(s->device, &s->queue, s->threads));
}

/* Scaling by length: which it is, since the run's length decides, not each sequence's. */
static void describe_rope(const qs_session *s)
{
    const qs_hf_config *model = &s->index->config;
    const long long length = s->config.train.seq_len, original = model->rope_original_max_position;
    if (model->rope_type == QS_ROPE_LONGROPE) {
        qs_log_info("RoPE: longrope by the %s factors: train.seq_len %lld, original length %lld",
                    length > original ? "long" : "short", length, original);
    } else if (model->rope_type == QS_ROPE_DYNAMIC && length > model->max_position) {
        qs_log_info("RoPE: dynamic scaling to train.seq_len %lld, beyond %lld", length,
                    (long long)model->max_position);
    }
}

/* With --verbose: what the launcher has made of the request, by every rank. */
static void describe_place(const qs_session *s)
{
    char host[QS_HOST_NAME_BYTES];
    qs_host_name(host);
    qs_log_debug("on host %s: local rank %d of %d, %d cores%s, %d threads", host,
                 qs_comm_local_rank(s->comm), qs_comm_local_nranks(s->comm), qs_cores_available(),
                 qs_cores_bound() ? " (bound)" : "", s->threads);
}

/* What --map-by node and -m cyclic cost. */
static void warn_of_turns(const qs_session *s)
{
    if (qs_comm_in_turns(s->comm)) {
        qs_log_warn("ranks are dealt out to the hosts in turns: every rank sends its gradients to "
                    "other hosts, where each host would send one sum, and shard.group: N cuts "
                    "across hosts; start neighbours on one host: mpirun --map-by slot, srun -m "
                    "block");
    }
}

static void describe(const qs_session *s)
{
    const int nranks = qs_comm_nranks(s->comm);
    qs_log_info("%s: %d layers, hidden %lld, vocabulary %lld; %d rank%s (%s), kernels %s",
                s->config.base, s->index->config.n_layers, (long long)s->index->config.hidden,
                (long long)s->index->config.vocab, nranks, nranks > 1 ? "s" : "",
                qs_comm_name(s->comm), s->ops->name);
    describe_rope(s);
    if (qs_device_is_host(s->device)) {
        const int threads = qs_queue_threads(s->queue);
        qs_log_info("cpu: %d thread%s a rank", threads, threads > 1 ? "s" : "");
    } else {
        qs_log_info("%s: %s", qs_device_name(s->device), qs_device_description(s->device));
    }
}

qs_status qs_session_open(qs_session *s, const qs_config *config, qs_comm *comm)
{
    memset(s, 0, sizeof *s);
    s->config = *config;
    s->comm = comm;
    s->nranks = qs_comm_nranks(comm);
    s->per_host = qs_comm_per_host(comm);
    QS_TRY(qs_watchdog_start(&s->watchdog, config->train.stall_limit, comm));
    QS_TRY(qs_input_expect("base", config->base, QS_INPUT_BASE, comm));
    QS_TRY(qs_base_index_read(&s->index, config->base, comm));
    QS_TRY(open_device(s));
    describe(s);
    warn_of_turns(s);
    describe_place(s);
    const qs_fsdp_options options = qs_session_group_options(s);
    QS_TRY(qs_room_on_host(&s->host, s->threads, comm));
    s->room = qs_room_here(s->device, &s->host, config->memory.device_limit);
    const qs_group_links usual = qs_group_links_usual(
        qs_gpu_kind_of(qs_device_description(s->device)), s->nranks, qs_comm_local_nranks(comm));
    return qs_shard_group_make(&s->shard, config, s->index, &options, s->room,
                               s->apart ? &usual : NULL, comm);
}

/* The whole LoRA vector of a PEFT directory. */
static qs_status read_peft(qs_session *s, const char *dir)
{
    qs_status st = QS_OK;
    qs_peft *peft = NULL;
    QS_TRY(qs_peft_settings(dir, &s->config));
    QS_TRY(qs_lora_layout_make(&s->layout, &s->index->config, &s->config));
    QS_TRY(QS_ALLOC(&s->adapter, s->layout.n_layers * s->layout.per_layer, QS_MEM_LORA));
    QS_GOTO(qs_peft_open(&peft, dir, &s->layout));
    QS_GOTO(qs_peft_expect_base(dir, s->index->hashes_sha256, s->index->path));
    for (int l = 0; l < s->layout.n_layers; l++) {
        QS_GOTO(qs_peft_read_layer(peft, l, s->adapter + (int64_t)l * s->layout.per_layer));
    }
done:
    qs_peft_close(peft);
    return st;
}

/* A checkpoint carries the configuration that it was trained with; only the adapter's part is
 * taken. */
static qs_status read_checkpoint(qs_session *s, const char *path, const char *step_dir)
{
    qs_config trained;
    qs_ckpt_origin origin;
    QS_TRY(qs_adapter_name_good(
        qs_ckpt_read_lora(step_dir, &trained, &s->layout, &s->adapter, &origin), path, step_dir));
    free(origin.chat_template);
    s->config.lora = trained.lora;
    QS_TRY(qs_lora_layout_check(&s->layout, &s->index->config, step_dir, s->index->path));
    return qs_base_expect(s->index, origin.base_sha256, step_dir);
}

static qs_status read_adapter(qs_session *s, const char *path)
{
    qs_adapter_dir found;
    QS_TRY(qs_input_expect_here("--adapter", path, "name a PEFT directory, a checkpoint or a run"));
    QS_TRY(qs_adapter_find(&found, path, false));
    return found.kind == QS_ADAPTER_PEFT ? read_peft(s, path) : read_checkpoint(s, path, found.dir);
}

/* What rank 0 has read: the settings, the layout, the vector. */
static qs_status share_adapter(qs_session *s)
{
    const bool reader = qs_comm_rank(s->comm) == 0;
    QS_TRY(qs_comm_bcast(s->comm, &s->config.lora, sizeof s->config.lora, 0));
    QS_TRY(qs_comm_bcast(s->comm, &s->layout, sizeof s->layout, 0));
    const int64_t count = s->layout.n_layers * s->layout.per_layer;
    qs_status st = reader ? QS_OK : QS_ALLOC(&s->adapter, count, QS_MEM_LORA);
    QS_TRY(qs_comm_agree(s->comm, st));
    return qs_comm_bcast(s->comm, s->adapter, (size_t)count * sizeof *s->adapter, 0);
}

qs_status qs_session_load_adapter(qs_session *s, const char *path)
{
    if (path == NULL || path[0] == '\0') {
        return QS_OK;
    }
    const bool reader = qs_comm_rank(s->comm) == 0;
    QS_TRY(qs_comm_agree(s->comm, reader ? read_adapter(s, path) : QS_OK));
    QS_TRY(share_adapter(s));
    qs_log_info("%s: %s rank %d, scale %g, %lld weights", path, s->layout.dora ? "DoRA" : "LoRA",
                s->layout.lora_rank, (double)s->layout.scale, (long long)qs_lora_count(&s->layout));
    return QS_OK;
}

/* ---- what is built for a shape ---- */

qs_ops_limits qs_session_limits(const qs_session *s, const qs_model_shape *shape)
{
    const qs_hf_config *model = &s->index->config;
    qs_ops_limits limits = model_limits(model);
    limits.threads = s->threads;
    limits.tokens = limits.documents = shape->max_tokens;
    limits.loss_rows = shape->max_targets;
    limits.dropout = s->config.lora.dropout > 0;
    limits.dora = s->config.lora.dora;
    limits.lora_rank = s->layout.lora_rank;
    limits.head_rows = s->index->head_chunk_rows;
    limits.kept_units = qs_model_kept_units(model, shape);
    for (int i = 0; i < QS_LINEAR_COUNT; i++) {
        if (qs_linears(model->fused) >> i & 1) {
            const int n = limits.n_linears++;
            qs_linear_shape(model, (qs_linear)i, &limits.out[n], &limits.in[n]);
            limits.joined[n] = qs_model_joins(model, limits.dora, (qs_linear)i);
            limits.widest = qs_max_i64(limits.widest, qs_max_i64(limits.out[n], limits.in[n]));
        }
    }
    return limits;
}

qs_fsdp_options qs_session_fsdp_options(const qs_session *s, const qs_model_shape *shape)
{
    const uint32_t offload = s->apart ? s->config.memory.offload : 0; /* the CPU's is the host's */
    return (qs_fsdp_options){.ops = s->ops,
                             .max_tokens = shape->max_tokens,
                             .offload_layers = (offload & QS_OFFLOAD_WEIGHTS) != 0,
                             .offload_vocabulary = (offload & QS_OFFLOAD_EMBEDDING) != 0,
                             .prefetch = s->config.shard.prefetch,
                             .keep_resident =
                                 qs_max_i64(shape->keep_resident, shape->keep_decoded)};
}

qs_fsdp_options qs_session_group_options(const qs_session *s)
{
    const int64_t kept = s->config.shard.keep_resident;
    return qs_session_fsdp_options(
        s, &(qs_model_shape){.max_tokens = 1, .keep_resident = qs_max_i64(kept, 0)});
}

static int64_t lora_count(const qs_session *s)
{
    return s->layout.n_layers * s->layout.per_layer;
}

static int64_t send_count(const qs_session *s)
{
    const int64_t width = qs_lora_shard_width(&s->layout, s->nranks);
    return s->ops->act_dtype == QS_F32 ? 0 : s->layout.n_layers * width;
}

/* Magnitudes that lie beside the vector, which is rounded, and those that a rank sends. */
static int64_t magnitude_count(const qs_session *s)
{
    return s->ops->act_dtype == QS_F32 ? 0 : s->layout.n_layers * qs_lora_magnitudes(&s->layout);
}

static int64_t magnitude_send_count(const qs_session *s)
{
    return s->ops->act_dtype == QS_F32
               ? 0
               : s->layout.n_layers * qs_lora_magnitude_width(&s->layout, s->nranks);
}

size_t qs_session_lora_bytes(const qs_session *s, bool trained)
{
    const int64_t sent = trained ? send_count(s) : 0;
    const int64_t magnitudes_sent = trained ? magnitude_send_count(s) : 0;
    return (size_t)(lora_count(s) + sent) * qs_dtype_bytes(s->ops->act_dtype) +
           (size_t)(magnitude_count(s) + magnitudes_sent) * sizeof(float);
}

size_t qs_session_adapter_bytes(const qs_session *s)
{
    return (size_t)lora_count(s) * sizeof *s->adapter;
}

/* Room for the LoRA vector on the device, and for DoRA's magnitudes beside it. */
static qs_status allocate_lora(qs_session *s, bool trained)
{
    const size_t element = qs_dtype_bytes(s->ops->act_dtype);
    const int64_t magnitudes = magnitude_count(s);
    if (trained) {
        QS_TRY(qs_device_alloc(s->device, &s->lora_send, (size_t)send_count(s) * element,
                               QS_MEM_LORA));
    }
    if (trained && magnitudes > 0) {
        QS_TRY(
            QS_DEVICE_ALLOC(s->device, &s->magnitudes_send, magnitude_send_count(s), QS_MEM_LORA));
    }
    if (magnitudes > 0) {
        QS_TRY(QS_DEVICE_ALLOC(s->device, &s->magnitudes, magnitudes, QS_MEM_LORA));
    }
    return qs_device_alloc(s->device, &s->lora, (size_t)lora_count(s) * element, QS_MEM_LORA);
}

/* What was loaded, in the type of the operations. */
static qs_status upload_lora(qs_session *s)
{
    const size_t bytes = (size_t)lora_count(s) * qs_dtype_bytes(s->ops->act_dtype);
    void *rounded = NULL;
    QS_TRY(qs_mem_alloc(&rounded, bytes, QS_MEM_LORA));
    qs_f32_store(rounded, s->ops->act_dtype, s->adapter, lora_count(s));
    qs_status st = qs_queue_copy(s->queue, s->lora, rounded, bytes);
    if (st == QS_OK) {
        st = qs_queue_wait(s->queue);
    }
    qs_mem_free(rounded);
    return st;
}

/* The magnitudes of what was loaded, layer by layer and linear by linear. */
static qs_status upload_magnitudes(qs_session *s)
{
    const qs_lora_layout *layout = &s->layout;
    float *to = s->magnitudes;
    for (int64_t l = 0; magnitude_count(s) > 0 && l < layout->n_layers; l++) {
        const float *segment = s->adapter + l * layout->per_layer;
        for (int i = 0; i < QS_LINEAR_COUNT; i++) {
            if (layout->m_at[i] >= 0) {
                QS_TRY(qs_queue_copy(s->queue, to, segment + layout->m_at[i],
                                     (size_t)layout->out[i] * sizeof *to));
                to += layout->out[i];
            }
        }
    }
    return qs_queue_wait(s->queue);
}

/* Room for the LoRA vector, and what was loaded into it. */
static qs_status prepare_lora(qs_session *s, bool trained)
{
    if (!trained && s->adapter == NULL) {
        return QS_OK;
    }
    QS_TRY(allocate_lora(s, trained));
    if (s->adapter == NULL) {
        return QS_OK;
    }
    QS_TRY(upload_lora(s));
    return upload_magnitudes(s);
}

qs_session_parts qs_session_parts_of(const qs_session *s, bool trained)
{
    const bool grouped = s->shard.most < s->nranks, levelled = trained && s->per_host > 0;
    const bool group_is_host = grouped && s->shard.most == s->per_host;
    return (qs_session_parts){.world = s->nranks,
                              .group = grouped ? s->shard.nranks : 0,
                              .inside = levelled && !group_is_host ? s->per_host : 0,
                              .across = levelled ? s->nranks / s->per_host : 0};
}

int qs_session_nccl_count(const qs_session *s, bool trained)
{
    const qs_session_parts p = qs_session_parts_of(s, trained);
    return s->apart ? (p.world > 1) + (p.group > 1) + (p.inside > 1) + (p.across > 1) : 0;
}

static qs_status connect_group(qs_session *s, const qs_session_parts *parts)
{
    s->base_comm = s->device_comm;
    if (parts->group == 0) {
        return QS_OK;
    }
    s->base_comm = NULL;
    return qs_comm_agree_after(s->comm, s->shard.comm,
                               qs_backend_comm(&s->base_comm, &s->backend, s->shard.comm));
}

/* Gradients and LoRA's new weights take two levels where hosts have several ranks each. The group
 * that shares the base serves inside of a host if it is that. */
static qs_status connect_levels(qs_session *s, const qs_session_parts *parts)
{
    const bool opens = parts->inside > 0;
    QS_TRY(qs_backend_levels_open(&s->levels, &s->backend, s->comm, s->device_comm,
                                  opens ? NULL : s->shard.comm, opens ? NULL : s->base_comm));
    if (parts->across > 0) {
        qs_log_info(
            "LoRA: sums and weights inside of each host first, then between %d hosts of %d ranks",
            parts->across, s->per_host);
    }
    return QS_OK;
}

/* With --verbose: what NCCL takes memory for, to be compared with the plan. */
static void describe_nccl(const qs_session *s)
{
    const qs_comm *comms[QS_SESSION_COMMS_MAX];
    int count = 0;
    for (int i = qs_session_comms(s, comms) - 1; i >= 0; i--) {
        count += strcmp(qs_comm_name(comms[i]), "nccl") == 0;
    }
    if (s->apart) {
        qs_log_debug("NCCL: %d communicator%s", count, count == 1 ? "" : "s");
    }
}

qs_status qs_session_connect(qs_session *s, const qs_model_shape *shape, bool trained)
{
    const qs_ops_limits limits = qs_session_limits(s, shape);
    const qs_session_parts parts = qs_session_parts_of(s, trained);
    /* a rank that NCCL did not connect in time has nobody to agree with */
    QS_TRY(qs_comm_agree_after(s->comm, s->comm,
                               qs_backend_comm(&s->device_comm, &s->backend, s->comm)));
    QS_TRY(connect_group(s, &parts));
    if (trained) {
        QS_TRY(connect_levels(s, &parts));
    }
    describe_nccl(s);
    qs_status st = s->ops->open(s->queue, &limits);
    s->ops_open = st == QS_OK;
    if (st == QS_OK) {
        st = prepare_lora(s, trained);
    }
    return qs_comm_agree(s->comm, st);
}

qs_status qs_session_build(qs_session *s, const qs_model_shape *shape)
{
    const qs_fsdp_options options = qs_session_fsdp_options(s, shape);
    QS_TRY(
        qs_comm_agree_after(s->comm, s->base_comm,
                            qs_fsdp_create(&s->fsdp, s->index, s->base_comm, s->queue, &options)));
    return qs_comm_agree(s->comm, qs_model_create(&s->model, s->index, s->fsdp, s->ops, s->queue,
                                                  &s->layout, s->lora, s->magnitudes, shape));
}

void qs_session_close(qs_session *s)
{
    qs_model_destroy(s->model);
    qs_fsdp_destroy(s->fsdp);
    if (s->device != NULL) {
        qs_device_free(s->device, s->lora);
        qs_device_free(s->device, s->lora_send);
        qs_device_free(s->device, s->magnitudes);
        qs_device_free(s->device, s->magnitudes_send);
    }
    qs_mem_free(s->adapter);
    qs_base_index_free(s->index);
    if (s->ops_open) {
        s->ops->close(s->queue);
    }
    qs_backend_levels_close(&s->levels);
    if (s->base_comm != s->device_comm && s->base_comm != NULL) {
        qs_backend_comm_destroy(s->base_comm, s->shard.comm);
    }
    qs_backend_comm_destroy(s->device_comm, s->comm);
    qs_shard_group_destroy(&s->shard, s->comm);
    qs_queue_destroy(s->queue);
    qs_backend_close(&s->backend);
    qs_watchdog_stop(&s->watchdog); /* last: what was started ahead may wait for a stopped peer */
    memset(s, 0, sizeof *s);
}

int qs_session_comms(const qs_session *s, const qs_comm *out[QS_SESSION_COMMS_MAX])
{
    const qs_comm *const comms[QS_SESSION_COMMS_MAX] = {
        s->comm,          s->device_comm,   s->shard.comm,           s->base_comm,
        s->levels.inside, s->levels.across, s->levels.levels.inside, s->levels.levels.across};
    int count = 0;
    for (int i = 0; i < QS_SESSION_COMMS_MAX; i++) {
        bool seen = comms[i] == NULL;
        for (int j = 0; j < count; j++) {
            seen = seen || out[j] == comms[i];
        }
        if (!seen) {
            out[count++] = comms[i];
        }
    }
    return count;
}

void qs_session_traffic(const qs_session *s, uint64_t *received, uint64_t *foreign)
{
    const qs_comm *comms[QS_SESSION_COMMS_MAX];
    *received = *foreign = 0;
    for (int i = qs_session_comms(s, comms) - 1; i >= 0; i--) {
        *received += qs_comm_received_bytes(comms[i]);
        *foreign += qs_comm_foreign_bytes(comms[i]);
    }
}

int64_t qs_session_group(const qs_session *s, int64_t slots)
{
    const int64_t per_rank = qs_shard_width(slots, s->nranks);
    int64_t group = s->config.train.gather_group;
    if (group == 0) {
        group = s->shard.most > 1 ? QS_AUTO_GROUP_MAX : 1;
    }
    return group < per_rank ? group : per_rank;
}
